/* The CUDA runtime: devices and their memory, streams and events, errors. */
#include "internal.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <set>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace cuda_on_cpu {

/* What happened in an event's cudaEventRecord. Waiting is for the record of that moment, not for later ones. */
struct record {
    bool done = false;
    double seconds = 0;
};

} // namespace cuda_on_cpu

using namespace cuda_on_cpu;

struct operation_in_stream {
    uint64_t number; /* in the order of the host's calls */
    std::shared_ptr<record> waits_for;
    std::function<void()> run;
};

struct CUstream_st {
    int device;
    bool blocking;     /* with the null stream */
    uint64_t priority; /* drawn anew in each wait; has nothing to do with CUDA's */
    std::deque<operation_in_stream> queue;
    void *tsan;
    char host_sync, before, after; /* addresses for TSan */
};

struct CUevent_st {
    int device;
    bool timing;
    std::shared_ptr<record> last;
};

namespace cuda_on_cpu {

constexpr int MAX_DEVICES = 16, PAGEABLE = -1, PINNED = -2;
constexpr size_t ALIGNMENT = 256, GAP = 256, QUARANTINE = 64 << 20;
constexpr unsigned char CANARY = 0xA5, FREED = 0xFF;

struct allocation {
    size_t bytes;
    uint64_t number;
    bool dying; /* its cudaFreeAsync is in a queue */
};

struct hole {
    char *p;
    size_t bytes;
};

/* A device's memory is a range of addresses that can be touched only while that device works. Freed memory is not
   given out again for a while. */
struct device {
    char *base, *top; /* top: the highest address used so far */
    bool open;
    std::map<char *, allocation> live;
    std::map<char *, size_t> holes;
    std::deque<hole> freed;
    size_t freed_bytes;
    bool peers[MAX_DEVICES];
    CUstream_st null_stream;
    std::set<CUstream_st *> streams; /* with the null stream */
};

struct fault {
    int64_t after;
    bool sticky;
};

/* Never destroyed, since a program may call until its very end. */
static std::recursive_mutex &lock = *new std::recursive_mutex;
static device *const devices = new device[MAX_DEVICES]();
static int device_count;
static size_t device_bytes;
static std::map<char *, size_t> &pinned = *new std::map<char *, size_t>; /* host memory from CUDA */
static std::set<CUevent_st *> &events = *new std::set<CUevent_st *>;
/* by kernel: cudaFuncAttributeMaxDynamicSharedMemorySize */
static std::map<const void *, int> &asked_shared = *new std::map<const void *, int>;
static cuda_on_cpu_counts counts;
static fault faults[CUDA_ON_CPU_KINDS];
static cudaError_t sticky;
static cuda_on_cpu_order order_now;
static uint64_t seed, random_state, operations, allocations;
static bool started, running; /* running: work in streams is being done */
static int entered;

/* ---- small things ---- */

static void say(const char *format, va_list list) {
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
}

void fatal(const char *format, ...) {
    va_list list;
    va_start(list, format);
    say(format, list);
    va_end(list);
    fprintf(stderr, "cuda_on_cpu: again with CUDA_ON_CPU_SEED=%llu\n", (unsigned long long)seed);
    signal(SIGABRT, SIG_DFL);
    abort();
}

void complain(const char *format, ...) {
    va_list list;
    va_start(list, format);
    say(format, list);
    va_end(list);
}

uint64_t random_below(uint64_t n) {
    uint64_t x = random_state += 0x9E3779B97F4A7C15u; /* splitmix64 */
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (x ^ x >> 31) % n;
}

cuda_on_cpu_order order() { return order_now; }

/* Per host thread. No thread_local here: kernels take that for shared memory. */
struct host_thread {
    int device = 0;
    cudaError_t last = cudaSuccess;
};

static host_thread &host() {
    static pthread_key_t key;
    static const int made = pthread_key_create(&key, [](void *p) { delete (host_thread *)p; });
    (void)made;
    auto *h = (host_thread *)pthread_getspecific(key);
    if (!h) pthread_setspecific(key, h = new host_thread());
    return *h;
}

static cudaError_t result(cudaError_t error) {
    if (error && error != cudaErrorNotReady) host().last = error;
    return error;
}

/* ---- protection ---- */

/* Every call opens and closes the devices' memory, which costs next to nothing with pages of 2 MB. */
enum { LARGE_PAGE = 2 << 20 };
static size_t whole_pages(size_t bytes) { return (bytes + LARGE_PAGE - 1) & ~(size_t)(LARGE_PAGE - 1); }

static char *reserve(size_t bytes) {
    const size_t size = whole_pages(bytes);
    char *memory = (char *)mmap(nullptr, size + LARGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fatal("no address space for %zu bytes of device memory", bytes);
    const size_t before = whole_pages((size_t)memory) - (size_t)memory;
    if (before) munmap(memory, before);
    if (before < LARGE_PAGE) munmap(memory + before + size, LARGE_PAGE - before);
    madvise(memory + before, size, MADV_HUGEPAGE);
    return memory + before;
}

static void set_open(device &d, bool open) {
    if (d.open == open || !d.base) return;
    mprotect(d.base, (size_t)(d.top - d.base), open ? PROT_READ | PROT_WRITE : PROT_NONE);
    d.open = open;
}

static void open_only(unsigned set) {
    for (int i = 0; i < device_count; i++) set_open(devices[i], set >> i & 1);
}

static unsigned reachable_from(int d) {
    unsigned set = 1u << d;
    for (int i = 0; i < device_count; i++) set |= (unsigned)devices[d].peers[i] << i;
    return set;
}

static int device_at(const void *p) {
    for (int i = 0; i < device_count; i++)
        if ((char *)p >= devices[i].base && (char *)p < devices[i].base + device_bytes) return i;
    return PAGEABLE;
}

static const char *memory_name(const void *p) {
    static char text[2][160];
    static int turn;
    char *out = text[turn = !turn];
    const int at = device_at(p);
    if (at < 0) {
        snprintf(out, sizeof text[0], "host memory %p", p);
        return out;
    }
    device &d = devices[at];
    auto next = d.live.upper_bound((char *)p);
    for (const hole &h : d.freed)
        if ((char *)p >= h.p && (char *)p < h.p + h.bytes) {
            snprintf(out, sizeof text[0], "freed memory of device %d", at);
            return out;
        }
    if (next == d.live.begin()) snprintf(out, sizeof text[0], "no allocation of device %d", at);
    else {
        --next;
        snprintf(out, sizeof text[0], "byte %zu of allocation %llu of %zu bytes on device %d",
                 (size_t)((char *)p - next->first), (unsigned long long)next->second.number, next->second.bytes, at);
    }
    return out;
}

static struct sigaction old_segv;

/* Says what was touched, then lets the access happen again under the handler that was there before: a sanitizer's, or
   the system's. */
static void on_segv(int, siginfo_t *info, void *) {
    const char *where = where_in_kernel(), *who = *where ? where : running ? "work in a stream" : "host code";
    const int at = device_at(info->si_addr);
    if (at >= 0 && !devices[at].open)
        complain("%s touches device memory it has no access to: %s%s", who, memory_name(info->si_addr),
                 *where ? " (is peer access enabled?)" : "");
    else if (at >= 0) complain("%s touches %s", who, memory_name(info->si_addr));
    else if (on_fiber_guard((char *)info->si_addr)) complain("%s: out of stack", who);
    else complain("%s touches address %p, which is not valid", who, info->si_addr);
    fprintf(stderr, "cuda_on_cpu: again with CUDA_ON_CPU_SEED=%llu\n", (unsigned long long)seed);
    sigaction(SIGSEGV, &old_segv, nullptr);
}

#if defined(CUDA_ON_CPU_ASAN)
static void on_asan_report(const char *) {
    const char *where = where_in_kernel();
    complain("%s, at %s; again with CUDA_ON_CPU_SEED=%llu", *where ? where : "outside of kernels",
             memory_name(__asan_get_report_address()), (unsigned long long)seed);
}
#endif

/* ---- start and end ---- */

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static void new_stream(CUstream_st &s, int device, bool blocking) {
    s.device = device;
    s.blocking = blocking;
    s.queue.clear();
#if defined(CUDA_ON_CPU_TSAN)
    s.tsan = __tsan_create_fiber(0);
#endif
    devices[device].streams.insert(&s);
}

static void start_devices(int n, size_t bytes) {
    if (n < 0 || n > MAX_DEVICES) fatal("%d devices: must be 0 to %d", n, MAX_DEVICES);
    bytes = (bytes + 65535) & ~(size_t)65535;
    for (int i = 0; i < MAX_DEVICES; i++) {
        device &d = devices[i];
        if (d.base) {
            unpoison(d.base, device_bytes);
            munmap(d.base, whole_pages(device_bytes));
            for (CUstream_st *s : d.streams)
                if (s != &d.null_stream) delete s;
        }
        d.base = nullptr;
        d.live.clear(), d.holes.clear(), d.freed.clear(), d.streams.clear();
        memset(d.peers, 0, sizeof d.peers);
        d.open = false;
        d.freed_bytes = 0;
    }
    device_count = n;
    device_bytes = bytes;
    for (int i = 0; i < n; i++) {
        device &d = devices[i];
        d.base = reserve(bytes);
        d.top = d.base;
        d.holes[d.base] = bytes;
        poison(d.base, bytes);
        new_stream(d.null_stream, i, true);
    }
}

static void read_faults(const char *text) {
    static const char *const names[] = { "malloc", "launch", "copy", "cublas", "sync" };
    while (*text) {
        int kind = 0, length = 0;
        long long n = 0;
        while (kind < CUDA_ON_CPU_KINDS && strncmp(text, names[kind], strlen(names[kind]))) kind++;
        if (kind == CUDA_ON_CPU_KINDS || sscanf(text += strlen(names[kind]), ":%lld%n", &n, &length) != 1)
            fatal("CUDA_ON_CPU_FAIL: not understood: \"%s\"", text);
        text += length;
        faults[kind] = { n, !strncmp(text, ":sticky", 7) };
        if (faults[kind].sticky) text += 7;
        if (*text == ',') text++;
    }
}

static void start() {
    static bool handlers;
    started = true;
    counts = {};
    sticky = cudaSuccess;
    memset(faults, 0, sizeof faults);
    read_faults(setting("CUDA_ON_CPU_FAIL", ""));
    random_state = seed = strtoull(setting("CUDA_ON_CPU_SEED", "1"), nullptr, 10);
    const std::string o = setting("CUDA_ON_CPU_ORDER", "random");
    order_now = o == "forward" ? CUDA_ON_CPU_FORWARD : o == "reverse" ? CUDA_ON_CPU_REVERSE : CUDA_ON_CPU_RANDOM;
    start_devices(atoi(setting("CUDA_ON_CPU_DEVICES", "1")),
                  strtoull(setting("CUDA_ON_CPU_BYTES", "1073741824"), nullptr, 10));
    if (handlers) return;
    handlers = true;
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    static char stack[64 * 1024]; /* a fiber may have none left */
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    stack_t before;
    if (!sigaltstack(nullptr, &before) && before.ss_flags & SS_DISABLE) sigaltstack(&alternative, nullptr);
    sigaction(SIGSEGV, &action, &old_segv);
#if defined(CUDA_ON_CPU_ASAN)
    __asan_set_error_report_callback(on_asan_report);
#endif
}

entry::entry() {
    lock.lock();
    unseen(true);
    if (!started) start();
    entered++;
}

entry::~entry() {
    if (!--entered) open_only(0);
    unseen(false);
    lock.unlock();
}

/* At the beginning of calls that must fail after a sticky error. */
#define ENTER()                                                                                                        \
    entry here;                                                                                                        \
    if (sticky) return result(sticky);                                                                                 \
    if (!device_count) return result(cudaErrorNoDevice)

/* Whether this call is the one to fail. */
static bool fails(cuda_on_cpu_kind kind, bool *is_sticky) {
    counts.calls[kind]++;
    if (faults[kind].after <= 0 || --faults[kind].after) return false;
    *is_sticky = faults[kind].sticky;
    return true;
}

static void forget_queues() {
    for (int i = 0; i < device_count; i++)
        for (CUstream_st *s : devices[i].streams) s->queue.clear();
}

static void set_sticky() {
    sticky = cudaErrorIllegalAddress;
    forget_queues();
}

/* ---- memory ---- */

static size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + GAP; }

/* Without ASan, a write to freed memory is seen when the memory is to be used again. */
static void check_freed(const hole &h) {
#if !defined(CUDA_ON_CPU_ASAN)
    for (size_t i = 0; i < h.bytes - GAP; i++)
        if ((unsigned char)h.p[i] != FREED) fatal("freed device memory was written: byte %zu of %zu", i, h.bytes);
#endif
    (void)h;
}

static void release_oldest(device &d) {
    const hole h = d.freed.front();
    d.freed.pop_front();
    d.freed_bytes -= h.bytes;
    set_open(d, true);
    check_freed(h);
    auto at = d.holes.emplace(h.p, h.bytes).first, next = std::next(at);
    if (next != d.holes.end() && at->first + at->second == next->first) at->second += next->second, d.holes.erase(next);
    if (at == d.holes.begin()) return;
    auto before = std::prev(at);
    if (before->first + before->second == at->first) before->second += at->second, d.holes.erase(at);
}

static char *find_memory(device &d, size_t bytes) {
    for (auto h = d.holes.begin(); h != d.holes.end(); ++h) {
        if (h->second < bytes) continue;
        char *p = h->first;
        const size_t rest = h->second - bytes;
        d.holes.erase(h);
        if (rest) d.holes[p + bytes] = rest;
        return p;
    }
    return nullptr;
}

static void fill_new(device &d, char *p, size_t bytes) {
    set_open(d, true);
    unpoison(p, bytes);
    note_write(p, bytes);
    memset(p, 0xFF, bytes);
#if !defined(CUDA_ON_CPU_ASAN)
    memset(p + bytes, CANARY, rounded(bytes) - bytes);
#endif
}

static cudaError_t take(void **out, size_t bytes, int at) {
    device &d = devices[at];
    *out = nullptr;
    if (!bytes) return cudaSuccess;
    if (bytes > device_bytes) return cudaErrorMemoryAllocation;
    char *p = find_memory(d, rounded(bytes));
    while (!p && !d.freed.empty()) {
        release_oldest(d);
        p = find_memory(d, rounded(bytes));
    }
    if (!p) return cudaErrorMemoryAllocation;
    if (p + rounded(bytes) > d.top) {
        set_open(d, false);
        d.top = d.base + whole_pages((size_t)(p - d.base) + rounded(bytes));
    }
    d.live[p] = { bytes, ++allocations, false };
    counts.live_allocations++;
    counts.live_bytes += (int64_t)bytes;
    counts.peak_bytes = std::max(counts.peak_bytes, counts.live_bytes);
    *out = p;
    return cudaSuccess;
}

static void check_canary(const char *p, const allocation &a, const char *after) {
#if !defined(CUDA_ON_CPU_ASAN)
    for (size_t i = a.bytes; i < rounded(a.bytes); i++)
        if ((unsigned char)p[i] != CANARY)
            fatal("%s wrote past the end: byte %zu of allocation %llu of %zu bytes", after, i,
                  (unsigned long long)a.number, a.bytes);
#endif
    (void)p, (void)a, (void)after;
}

static void check_canaries(const char *after) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].open)
            for (auto &entry : devices[i].live) check_canary(entry.first, entry.second, after);
}

static void drop(device &d, char *p) {
    const auto found = d.live.find(p);
    const size_t bytes = found->second.bytes;
    set_open(d, true);
    check_canary(p, found->second, "something before cudaFree");
    unpoison(p, rounded(bytes));
    note_write(p, bytes);
    memset(p, FREED, rounded(bytes) - GAP);
    poison(p, rounded(bytes));
    d.live.erase(found);
    counts.live_allocations--;
    counts.live_bytes -= (int64_t)bytes;
    d.freed.push_back({ p, rounded(bytes) });
    d.freed_bytes += rounded(bytes);
    while (d.freed_bytes > QUARANTINE) release_oldest(d);
}

/* PAGEABLE, PINNED or a device. */
static int kind_of(const void *p) {
    const int d = device_at(p);
    if (d >= 0) return d;
    auto next = pinned.upper_bound((char *)p);
    if (next == pinned.begin()) return PAGEABLE;
    --next;
    return (char *)p < next->first + next->second ? PINNED : PAGEABLE;
}

void check_device_range(const char *what, const void *p, size_t bytes, int on) {
    if (!bytes) return;
    const int at = device_at(p);
    if (at < 0) fatal("%s: %s is not device memory", what, memory_name(p));
    if (on >= 0 && !(reachable_from(on) >> at & 1))
        fatal("%s: device %d has no access to %s (is peer access enabled?)", what, on, memory_name(p));
    auto next = devices[at].live.upper_bound((char *)p);
    const auto found = next == devices[at].live.begin() ? devices[at].live.end() : std::prev(next);
    if (found == devices[at].live.end() || (char *)p + bytes > found->first + found->second.bytes)
        fatal("%s: %zu bytes do not fit at %s", what, bytes, memory_name(p));
}

static void check_range(const char *what, const void *p, size_t bytes) {
    if (kind_of(p) >= 0) check_device_range(what, p, bytes, -1);
    if (kind_of(p) != PINNED) return;
    const auto found = std::prev(pinned.upper_bound((char *)p));
    if ((char *)p + bytes > found->first + found->second)
        fatal("%s: %zu bytes do not fit at byte %zu of %zu bytes of pinned memory", what, bytes,
              (size_t)((char *)p - found->first), found->second);
}

/* ---- streams ---- */

static CUstream_st *stream_of(cudaStream_t s, const char *call) {
    if (!s || s == cudaStreamLegacy) return &devices[host().device].null_stream;
    for (int i = 0; i < device_count; i++)
        if (devices[i].streams.count(s)) return s;
    fatal("%s: no such stream; was it destroyed?", call);
}

static void check_event(cudaEvent_t e, const char *call) {
    if (!events.count(e)) fatal("%s: no such event; was it destroyed?", call);
}

/* The null stream waits for what was in the others before, and they for it. */
static bool may_run(const CUstream_st &s) {
    if (s.queue.empty()) return false;
    const operation_in_stream &first = s.queue.front();
    if (first.waits_for && !first.waits_for->done) return false;
    device &d = devices[s.device];
    if (&s != &d.null_stream)
        return !s.blocking || d.null_stream.queue.empty() || d.null_stream.queue.front().number > first.number;
    for (const CUstream_st *other : d.streams)
        if (other != &s && other->blocking && !other->queue.empty() && other->queue.front().number < first.number)
            return false;
    return true;
}

/* For TSan each stream is a thread. */
static void run_first(CUstream_st &s) {
    operation_in_stream first = std::move(s.queue.front());
    s.queue.pop_front();
    device &d = devices[s.device];
    const bool nested = running;
    running = true;
#if defined(CUDA_ON_CPU_TSAN)
    void *before = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(s.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    unseen(true);
    acquire(&s.host_sync);
    if (first.waits_for) acquire(first.waits_for.get());
    if (&s == &d.null_stream) {
        for (CUstream_st *other : d.streams)
            if (other->blocking) acquire(&other->after);
    } else if (s.blocking) acquire(&d.null_stream.after);
    first.run();
    first.run = nullptr;
    release(&s.after);
    unseen(false);
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_switch_to_fiber(before, __tsan_switch_to_fiber_no_sync);
#endif
    running = nested;
}

static void draw_priorities() {
    uint64_t n = 0;
    for (int i = 0; i < device_count; i++)
        for (CUstream_st *s : devices[i].streams)
            s->priority = order_now == CUDA_ON_CPU_RANDOM ? random_below(1 << 30) : ++n;
}

/* Runs one operation of the streams that can go on. Priorities which stay for a while, rather than a new draw each time,
   let one stream run far ahead of another, which is what uncovers a missing wait. */
static bool step() {
    if (order_now == CUDA_ON_CPU_RANDOM && !random_below(8)) draw_priorities();
    CUstream_st *best = nullptr;
    for (int i = 0; i < device_count; i++)
        for (CUstream_st *s : devices[i].streams)
            if (may_run(*s) && (!best || (s->priority > best->priority))) best = s;
    if (!best) return false;
    run_first(*best);
    return true;
}

template <class F> static void run_until(F &&reached) {
    draw_priorities();
    while (!reached())
        if (!step()) {
            if (sticky) return;
            fatal("streams wait for each other");
        }
}

static uint64_t enqueue(CUstream_st &s, std::function<void()> run, std::shared_ptr<record> waits_for = nullptr) {
    release(&s.host_sync);
    s.queue.push_back({ ++operations, std::move(waits_for), std::move(run) });
    const uint64_t number = operations;
    if (order_now == CUDA_ON_CPU_FORWARD) {
        while (step()) continue;
    } else if (order_now == CUDA_ON_CPU_RANDOM && !random_below(4)) {
        draw_priorities();
        for (uint64_t n = random_below(4); n > 0 && step(); n--) continue;
    }
    return number;
}

/* The host goes on when this operation is done. */
static void wait_for(CUstream_st &s, uint64_t number) {
    run_until([&] { return s.queue.empty() || s.queue.front().number > number; });
    acquire(&s.after);
}

static void wait_for_stream(CUstream_st &s) { wait_for(s, operations); }

static void wait_for_device(int d) {
    run_until([&] {
        for (CUstream_st *s : devices[d].streams)
            if (!s->queue.empty()) return false;
        return true;
    });
    for (CUstream_st *s : devices[d].streams) acquire(&s->after);
}

bool enqueue_computation(cudaStream_t stream, const char *what, std::function<void()> run) {
    CUstream_st *s = stream_of(stream, what);
    const int d = s->device;
    enqueue(*s, [=] {
        open_only(reachable_from(d));
        run();
        check_canaries(what);
    });
    return true;
}

int device_of_stream(cudaStream_t stream) { return stream_of(stream, "cublasSetStream")->device; }
void handle_lives(int change) { counts.live_handles += change; }
bool cublas_begins(cudaError_t *error) {
    bool is_sticky = false;
    *error = sticky;
    if (sticky) return false;
    if (!fails(CUDA_ON_CPU_CUBLAS, &is_sticky)) return true;
    *error = cudaErrorUnknown;
    if (is_sticky) set_sticky();
    return false;
}

/* ---- launches ---- */

cudaError_t launch(const char *name, place at, const void *kernel, dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, const void *const *pointers, int pointer_count, std::function<void()> body) {
    ENTER();
    CUstream_st *s = stream_of(stream, name);
    const int d = host().device;
    bool is_sticky = false;
    const uint64_t size = (uint64_t)block.x * block.y * block.z;
    const char *wrong = nullptr;
    if (!grid.x || !grid.y || !grid.z || !size) wrong = "a size is zero";
    else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) wrong = "grid is too large";
    else if (size > MAX_THREADS || block.x > 1024 || block.y > 1024 || block.z > 64) wrong = "block is too large";
    if (wrong) {
        complain("%s:%d: launch of %s with grid (%u,%u,%u) and block (%u,%u,%u): %s", at.file, at.line, name, grid.x,
                 grid.y, grid.z, block.x, block.y, block.z, wrong);
        return result(cudaErrorInvalidConfiguration);
    }
    const auto asked = asked_shared.find(kernel);
    const size_t allowed = asked == asked_shared.end() ? MAX_SHARED_UNASKED : (size_t)asked->second;
    if (shared > allowed) {
        complain("%s:%d: launch of %s: %zu bytes of dynamic shared memory, but %zu are allowed%s", at.file, at.line,
                 name, shared, allowed, asked == asked_shared.end() ? " without cudaFuncSetAttribute" : "");
        return result(cudaErrorInvalidValue);
    }
    if (s->device != d) {
        complain("%s:%d: launch of %s in a stream of device %d, but device %d is set", at.file, at.line, name,
                 s->device, d);
        return result(cudaErrorInvalidResourceHandle);
    }
    for (int i = 0; i < pointer_count; i++) {
        if (!pointers[i] || kind_of(pointers[i]) == PINNED) continue;
        const int owner = device_at(pointers[i]);
        if (owner < 0) fatal("%s:%d: launch of %s: argument %d points to host memory", at.file, at.line, name, i + 1);
        if (!(reachable_from(d) >> owner & 1))
            fatal("%s:%d: launch of %s on device %d: argument %d points to %s (is peer access enabled?)", at.file,
                  at.line, name, d, i + 1, memory_name(pointers[i]));
    }
    if (fails(CUDA_ON_CPU_LAUNCH, &is_sticky)) {
        if (!is_sticky) return result(cudaErrorLaunchOutOfResources);
        set_sticky();
        return cudaSuccess;
    }
    enqueue(*s, [=] {
        const kernel_call call = { name, at, d, grid, block, shared, &body, &s->before, &s->after };
        open_only(reachable_from(d));
        run_kernel(call);
        check_canaries(name);
    });
    return cudaSuccess;
}

/* ---- copies ---- */

static cudaError_t copy(const char *what, void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                        cudaStream_t stream, bool host_waits) {
    ENTER();
    bool is_sticky = false;
    CUstream_st *s = stream_of(stream, what);
    const int to_kind = kind_of(to), from_kind = kind_of(from);
    if (fails(CUDA_ON_CPU_COPY, &is_sticky)) {
        if (!is_sticky) return result(cudaErrorUnknown);
        set_sticky();
        return host_waits ? result(sticky) : cudaSuccess;
    }
    if (!bytes) return cudaSuccess;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (to_device != (to_kind >= 0) || from_device != (from_kind >= 0))) {
        complain("%s: its kind says otherwise than its pointers, to %s from %s", what, memory_name(to),
                 memory_name(from));
        return result(cudaErrorInvalidValue);
    }
    check_range(what, to, bytes);
    check_range(what, from, bytes);
    unsigned set = 0;
    if (to_kind >= 0) set |= 1u << to_kind;
    if (from_kind >= 0) set |= 1u << from_kind;
    if (to_kind >= 0 && from_kind >= 0 && to_kind != from_kind) {
        if (!devices[to_kind].peers[from_kind] && !devices[from_kind].peers[to_kind]) {
            complain("%s: from device %d to device %d without peer access", what, from_kind, to_kind);
            return result(cudaErrorPeerAccessNotEnabled);
        }
        counts.bytes_between_devices += (int64_t)bytes;
    } else if (to_kind >= 0 && from_kind >= 0) counts.bytes_on_device += (int64_t)bytes;
    else if (to_kind >= 0) counts.bytes_to_device += (int64_t)bytes;
    else if (from_kind >= 0) counts.bytes_to_host += (int64_t)bytes;
    if ((to_kind == PAGEABLE && from_kind >= 0) || (from_kind == PAGEABLE && to_kind >= 0)) counts.pageable_copies++;
    /* Pageable memory is read before the call returns; pinned memory whenever the copy happens. */
    std::shared_ptr<std::vector<char>> taken;
    if (from_kind == PAGEABLE) {
        note_read(from, bytes);
        taken = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    }
    const uint64_t number = enqueue(*s, [=] {
        open_only(set);
        if (to_kind >= 0) check_device_range(what, to, bytes, -1);
        if (from_kind >= 0) check_device_range(what, from, bytes, -1);
        if (!taken) note_read(from, bytes);
        note_write(to, bytes);
        memmove(to, taken ? taken->data() : from, bytes);
    });
    /* On one device cudaMemcpy does not wait; into pageable memory cudaMemcpyAsync does. */
    if ((host_waits && !(to_kind >= 0 && from_kind >= 0)) || to_kind == PAGEABLE) wait_for(*s, number);
    return sticky ? result(sticky) : cudaSuccess;
}

static cudaError_t fill(const char *what, void *p, int value, size_t bytes, cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, what);
    if (!bytes) return cudaSuccess;
    check_device_range(what, p, bytes, s->device);
    enqueue(*s, [=] {
        open_only(1u << device_at(p));
        check_device_range(what, p, bytes, -1);
        note_write(p, bytes);
        memset(p, value, bytes);
    });
    return cudaSuccess;
}

/* ---- waiting for the device, with faults ---- */

template <class F> static cudaError_t waiting(F &&wait) {
    bool is_sticky = false;
    const bool failed = fails(CUDA_ON_CPU_SYNC, &is_sticky);
    if (failed && is_sticky) set_sticky();
    else if (failed) return result(cudaErrorUnknown);
    else wait();
    return sticky ? result(sticky) : cudaSuccess;
}

} // namespace cuda_on_cpu

/* ---- control.h ---- */

extern "C" {

void cuda_on_cpu_set_order(cuda_on_cpu_order order) {
    entry here;
    order_now = order;
}

void cuda_on_cpu_set_seed(uint64_t value) {
    entry here;
    random_state = seed = value;
}

void cuda_on_cpu_fail(cuda_on_cpu_kind kind, int64_t n, int is_sticky) {
    entry here;
    faults[kind] = { n, is_sticky != 0 };
}

cuda_on_cpu_counts cuda_on_cpu_count(void) {
    entry here;
    return counts;
}

int64_t cuda_on_cpu_leaks(void) {
    entry here;
    for (int i = 0; i < device_count; i++)
        for (auto &a : devices[i].live)
            complain("not freed: allocation %llu of %zu bytes on device %d", (unsigned long long)a.second.number,
                     a.second.bytes, i);
    if (counts.live_host_allocations)
        complain("not freed: %lld of pinned memory", (long long)counts.live_host_allocations);
    if (counts.live_streams) complain("not destroyed: %lld streams", (long long)counts.live_streams);
    if (counts.live_events) complain("not destroyed: %lld events", (long long)counts.live_events);
    if (counts.live_handles) complain("not destroyed: %lld cuBLAS handles", (long long)counts.live_handles);
    return counts.live_allocations + counts.live_host_allocations + counts.live_streams + counts.live_events +
           counts.live_handles;
}

void cuda_on_cpu_reset(void) {
    entry here;
    forget_queues();
    for (auto &p : pinned) free(p.first);
    for (CUevent_st *e : events) delete e;
    pinned.clear();
    events.clear();
    asked_shared.clear();
    host() = host_thread();
    start();
}

void cuda_on_cpu_set_devices(int n, size_t bytes_of_each) {
    entry here;
    if (counts.live_allocations || counts.live_streams) fatal("cuda_on_cpu_set_devices: something is allocated");
    start_devices(n, bytes_of_each ? bytes_of_each : device_bytes);
}

/* ---- cuda_runtime.h: devices ---- */

cudaError_t cudaGetDeviceCount(int *count) {
    entry here;
    *count = device_count;
    return device_count ? sticky : result(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
    ENTER();
    if (device < 0 || device >= device_count) return result(cudaErrorInvalidDevice);
    host().device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    ENTER();
    *device = host().device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    ENTER();
    if (device < 0 || device >= device_count) return result(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "CUDA on CPU %d", device);
    p->totalGlobalMem = device_bytes;
    p->sharedMemPerBlock = MAX_SHARED_UNASKED;
    p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = MAX_SHARED;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = (int)MAX_THREADS;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->major = 8; /* from 9 on programs take work space for cuBLAS by tens of MiB, which is slow to guard */
    p->multiProcessorCount = 4; /* few, so that persistent kernels are small */
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->concurrentKernels = p->asyncEngineCount = p->unifiedAddressing = p->canMapHostMemory = 1;
    p->memoryPoolsSupported = p->streamPrioritiesSupported = 1;
    p->pciBusID = device;
    p->l2CacheSize = 1 << 20;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    const cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMemoryPoolsSupported: *value = p.memoryPoolsSupported; break;
    case cudaDevAttrUnifiedAddressing: *value = p.unifiedAddressing; break;
    case cudaDevAttrConcurrentKernels: *value = p.concurrentKernels; break;
    case cudaDevAttrAsyncEngineCount: *value = p.asyncEngineCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrCooperativeLaunch: *value = 0; break;
    default:
        complain("cudaDeviceGetAttribute: attribute %d is not known here", attribute);
        return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    ENTER();
    if (device < 0 || device >= device_count || peer < 0 || peer >= device_count) return result(cudaErrorInvalidDevice);
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    ENTER();
    const int d = host().device;
    if (peer < 0 || peer >= device_count || peer == d) return result(cudaErrorInvalidDevice);
    if (flags) return result(cudaErrorInvalidValue);
    if (devices[d].peers[peer]) return result(cudaErrorPeerAccessAlreadyEnabled);
    devices[d].peers[peer] = true;
    return cudaSuccess;
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
    ENTER();
    const int d = host().device;
    if (peer < 0 || peer >= device_count || !devices[d].peers[peer]) return result(cudaErrorPeerAccessNotEnabled);
    wait_for_device(d);
    devices[d].peers[peer] = false;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    ENTER();
    return waiting([] { wait_for_device(host().device); });
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- errors ---- */

cudaError_t cudaGetLastError(void) {
    entry here;
    const cudaError_t error = sticky ? sticky : host().last;
    host().last = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    entry here;
    return sticky ? sticky : host().last;
}

#define ERRORS(X)                                                                                                      \
    X(cudaSuccess, "no error")                                                                                         \
    X(cudaErrorInvalidValue, "invalid argument")                                                                       \
    X(cudaErrorMemoryAllocation, "out of memory")                                                                      \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                                 \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                                         \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                                                \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                                       \
    X(cudaErrorNotReady, "device not ready")                                                                           \
    X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                                             \
    X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                                        \
    X(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled")                                             \
    X(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled")                                               \
    X(cudaErrorNotPermitted, "operation not permitted")                                                                \
    X(cudaErrorUnknown, "unknown error")

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
#define X(name, text)                                                                                                  \
    case name: return #name;
        ERRORS(X)
#undef X
    default: return "unrecognized error code";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
#define X(name, text)                                                                                                  \
    case name: return text;
        ERRORS(X)
#undef X
    default: return "unrecognized error code";
    }
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t bytes) {
    ENTER();
    bool is_sticky = false;
    const bool failed = fails(CUDA_ON_CPU_MALLOC, &is_sticky);
    if (failed && is_sticky) set_sticky();
    if (failed) return result(is_sticky ? sticky : cudaErrorMemoryAllocation);
    const cudaError_t error = take(p, bytes, host().device);
    if (error) return result(error);
    if (*p) fill_new(devices[host().device], (char *)*p, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    ENTER();
    if (!p) return cudaSuccess;
    const int d = device_at(p);
    if (d < 0 || !devices[d].live.count((char *)p) || devices[d].live[(char *)p].dying) {
        complain("cudaFree: %s is not the beginning of an allocation", memory_name(p));
        return result(cudaErrorInvalidValue);
    }
    wait_for_device(d); /* as CUDA does */
    drop(devices[d], (char *)p);
    return cudaSuccess;
}

/* The address is known at once; the memory exists from then on in the order of the stream. */
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    bool is_sticky = false;
    const bool failed = fails(CUDA_ON_CPU_MALLOC, &is_sticky);
    if (failed && is_sticky) set_sticky();
    if (failed) return result(is_sticky ? sticky : cudaErrorMemoryAllocation);
    const cudaError_t error = take(p, bytes, s->device);
    if (error) return result(error);
    if (*p) enqueue(*s, [s, at = (char *)*p, bytes] { fill_new(devices[s->device], at, bytes); });
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    if (!p) return cudaSuccess;
    const int d = device_at(p);
    if (d < 0 || !devices[d].live.count((char *)p) || devices[d].live[(char *)p].dying) {
        complain("cudaFreeAsync: %s is not the beginning of an allocation", memory_name(p));
        return result(cudaErrorInvalidValue);
    }
    devices[d].live[(char *)p].dying = true;
    enqueue(*s, [=] { drop(devices[d], (char *)p); });
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
    ENTER();
    bool is_sticky = false;
    (void)flags;
    *p = nullptr;
    const bool failed = fails(CUDA_ON_CPU_MALLOC, &is_sticky);
    if (failed && is_sticky) set_sticky();
    if (failed) return result(is_sticky ? sticky : cudaErrorMemoryAllocation);
    if (!bytes) return cudaSuccess;
    if (posix_memalign(p, 256, bytes)) return result(cudaErrorMemoryAllocation);
    memset(*p, 0xFF, bytes);
    pinned[(char *)*p] = bytes;
    counts.live_host_allocations++;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }

cudaError_t cudaFreeHost(void *p) {
    ENTER();
    if (!p) return cudaSuccess;
    if (!pinned.count((char *)p)) {
        complain("cudaFreeHost: %s was not pinned", memory_name(p));
        return result(cudaErrorInvalidValue);
    }
    for (int i = 0; i < device_count; i++) wait_for_device(i);
    pinned.erase((char *)p);
    counts.live_host_allocations--;
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    ENTER();
    *total = *free_bytes = device_bytes;
    for (auto &a : devices[host().device].live) *free_bytes -= rounded(a.second.bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return copy("cudaMemcpy", to, from, bytes, kind, nullptr, true);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    return copy("cudaMemcpyAsync", to, from, bytes, kind, stream, false);
}

static cudaError_t copy_peer(const char *what, void *to, int to_device, const void *from, int from_device, size_t bytes,
                             cudaStream_t stream, bool host_waits) {
    ENTER();
    if (bytes && (device_at(to) != to_device || device_at(from) != from_device)) {
        complain("%s: from device %d to %d, but the pointers are of devices %d and %d", what, from_device, to_device,
                 device_at(from), device_at(to));
        return result(cudaErrorInvalidValue);
    }
    return copy(what, to, from, bytes, cudaMemcpyDeviceToDevice, stream, host_waits);
}

cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes) {
    return copy_peer("cudaMemcpyPeer", to, to_device, from, from_device, bytes, nullptr, true);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    return copy_peer("cudaMemcpyPeerAsync", to, to_device, from, from_device, bytes, stream, false);
}

cudaError_t cudaMemset(void *p, int value, size_t bytes) { return fill("cudaMemset", p, value, bytes, nullptr); }

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    return fill("cudaMemsetAsync", p, value, bytes, stream);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    ENTER();
    *stream = new CUstream_st();
    new_stream(**stream, host().device, !(flags & cudaStreamNonBlocking));
    counts.live_streams++;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    if (s == &devices[s->device].null_stream) return result(cudaErrorInvalidResourceHandle);
    run_until([&] { return s->queue.empty(); }); /* without the host knowing: it acquires nothing */
    devices[s->device].streams.erase(s);
#if defined(CUDA_ON_CPU_TSAN)
    __tsan_destroy_fiber(s->tsan);
#endif
    counts.live_streams--;
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    return waiting([=] { wait_for_stream(*s); });
}

/* A query must make some progress, or a program that polls would never end. */
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    for (uint64_t n = random_below(3); n < 3 && step(); n++) continue;
    if (!s->queue.empty()) return cudaErrorNotReady;
    acquire(&s->after);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    check_event(event, __func__);
    if (event->last)
        enqueue(
            *s, [] {}, event->last);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    ENTER();
    CUstream_st *s = stream_of(stream, __func__);
    enqueue(*s, [=] {
        open_only(0);
        function(data);
    });
    return cudaSuccess;
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    ENTER();
    *event = new CUevent_st{ host().device, !(flags & cudaEventDisableTiming), nullptr };
    events.insert(*event);
    counts.live_events++;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    ENTER();
    check_event(event, __func__);
    events.erase(event);
    counts.live_events--;
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER();
    check_event(event, __func__);
    CUstream_st *s = stream_of(stream, __func__);
    if (s->device != event->device) {
        complain("cudaEventRecord: an event of device %d in a stream of device %d", event->device, s->device);
        return result(cudaErrorInvalidResourceHandle);
    }
    event->last = std::make_shared<record>();
    enqueue(*s, [r = event->last] {
        r->done = true;
        r->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
        release(r.get());
    });
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER();
    check_event(event, __func__);
    return waiting([=] {
        if (!event->last) return;
        run_until([=] { return event->last->done; });
        acquire(event->last.get());
    });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    ENTER();
    check_event(event, __func__);
    for (uint64_t n = random_below(3); n < 3 && step(); n++) continue;
    if (event->last && !event->last->done) return cudaErrorNotReady;
    if (event->last) acquire(event->last.get());
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    ENTER();
    check_event(start, __func__);
    check_event(end, __func__);
    if (!start->last || !end->last || !start->timing || !end->timing) return result(cudaErrorInvalidResourceHandle);
    if (!start->last->done || !end->last->done) return cudaErrorNotReady;
    *milliseconds = (float)(1e3 * (end->last->seconds - start->last->seconds));
    return cudaSuccess;
}

/* ---- kernels ---- */

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    ENTER();
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > MAX_SHARED) return result(cudaErrorInvalidValue);
    asked_shared[kernel] = value;
    return cudaSuccess;
}

} // extern "C"
