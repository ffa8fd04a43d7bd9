/* Runs kernels: the threads of a block are fibers, one block at a time. */
#include "internal.h"

#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if !defined(CUDA_ON_CPU_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CUDA_ON_CPU_UCONTEXT
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

/* ---- fibers ---- */

/* Sanitizers have large frames, and report on the stack of the culprit. */
#if defined(CUDA_ON_CPU_ASAN) || defined(CUDA_ON_CPU_TSAN)
constexpr size_t STACK = 512 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif
constexpr size_t GUARD = 64 * 1024; /* below a stack; a multiple of the page size everywhere */

struct fiber {
#if defined(CUDA_ON_CPU_UCONTEXT)
    ucontext_t context;
#else
    void *sp;
#endif
    const void *bottom; /* of the stack, for ASan; that of the thread which runs the kernel is learned on switching */
    size_t size;
    void *asan_stack, *tsan;
};

static fiber scheduler;
/* Like all containers of the runtime never destroyed: a program may call it until its very end. */
static std::vector<fiber *> &fibers = *new std::vector<fiber *>, &idle = *new std::vector<fiber *>;

#if defined(CUDA_ON_CPU_UCONTEXT)
static void swap(fiber &from, fiber &to) { swapcontext(&from.context, &to.context); }
#else
/* Saves what a function must preserve on the old stack, and takes it from the new one. ucontext would also save the
   signal mask, by a system call: four times slower. */
extern "C" void cuda_on_cpu_swap(void **from, void *to);
#if defined(__x86_64__)
asm(R"(
    .text
    .globl cuda_on_cpu_swap
    .hidden cuda_on_cpu_swap
    .type cuda_on_cpu_swap, @function
cuda_on_cpu_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_on_cpu_swap, .-cuda_on_cpu_swap
)");
constexpr int SAVED = 6, RETURN = 6, FRAME = 8; /* words: registers, place of the return address, all of it */
#else
asm(R"(
    .text
    .globl cuda_on_cpu_swap
    .hidden cuda_on_cpu_swap
    .type cuda_on_cpu_swap, %function
cuda_on_cpu_swap:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_on_cpu_swap, .-cuda_on_cpu_swap
)");
constexpr int SAVED = 20, RETURN = 11, FRAME = 20;
#endif
static void swap(fiber &from, fiber &to) { cuda_on_cpu_swap(&from.sp, to.sp); }
#endif

static void switch_fiber(fiber &from, fiber &to) {
#if defined(CUDA_ON_CPU_ASAN)
    __sanitizer_start_switch_fiber(&from.asan_stack, to.bottom, to.size);
#elif defined(CUDA_ON_CPU_TSAN)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync); /* a switch is no order in the kernel */
#endif
    swap(from, to);
#if defined(CUDA_ON_CPU_ASAN)
    const bool home = &from == &scheduler;
    __sanitizer_finish_switch_fiber(from.asan_stack, home ? nullptr : &scheduler.bottom,
                                    home ? nullptr : &scheduler.size);
#endif
}

static void fiber_main();

#if !defined(CUDA_ON_CPU_UCONTEXT)
static void fiber_entry() {
#else
static void fiber_entry(void) {
#endif
#if defined(CUDA_ON_CPU_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
    fiber_main();
}

static fiber *new_fiber() {
    char *memory = (char *)mmap(nullptr, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + GUARD, STACK, PROT_READ | PROT_WRITE)) fatal("no memory for stacks");
    fiber *f = new fiber();
    f->bottom = memory + GUARD;
    f->size = STACK;
#if defined(CUDA_ON_CPU_UCONTEXT)
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = memory + GUARD;
    f->context.uc_stack.ss_size = STACK;
    makecontext(&f->context, fiber_entry, 0);
#else
    void **frame = (void **)(memory + GUARD + STACK) - FRAME; /* new memory is zero */
    frame[RETURN] = (void *)fiber_entry;
    f->sp = frame;
    static_assert(SAVED <= FRAME && RETURN < FRAME);
#endif
#if defined(CUDA_ON_CPU_TSAN)
    f->tsan = __tsan_create_fiber(0);
#endif
    return f;
}

bool on_fiber_guard(const char *address) {
    for (const fiber *f : fibers)
        if (address >= (const char *)f->bottom - GUARD && address < (const char *)f->bottom) return true;
    return false;
}

/* ---- the block that runs ---- */

enum state { NEW, READY, BARRIER, WARP, DONE };

struct thread {
    state now = NEW;
    fiber *stack = nullptr;
    place at = {}; /* of the barrier or warp operation it is in */
    operation what = SYNC;
    unsigned mask = 0;
    uint64_t value = 0, result = 0;
    int lane = 0, width = 32; /* arguments of a shuffle */
};

static const kernel_call *call;
static thread threads[MAX_THREADS];
static unsigned ready[MAX_THREADS]; /* threads that may run: new ones, and those past their barrier */
static unsigned thread_count, ready_count, current, next_thread, waiting, done;
static bool has_next;
static int pool; /* TSan: which set of fibers this block has */

/* Barriers and ends of warps of different blocks must not order these blocks for TSan: so one of each in each pool. */
constexpr int POOLS = 4;
static char barrier_sync[POOLS], warp_sync[POOLS][MAX_THREADS / 32], fence_sync;

alignas(128) static char shared[MAX_SHARED + 1024]; /* dynamic shared memory and canaries */
constexpr unsigned char CANARY = 0xA5;

void *shared_memory() { return shared; }

static uint3 index_of(unsigned i) {
    const dim3 &d = call->block;
    return uint3{ i % d.x, i / d.x % d.y, i / (d.x * d.y) };
}

static const char *thread_name(unsigned i) {
    static char text[4][64];
    static int turn;
    char *out = text[turn = (turn + 1) % 4];
    const uint3 at = index_of(i);
    snprintf(out, sizeof text[0], "thread (%u,%u,%u)", at.x, at.y, at.z);
    return out;
}

static const char *block_name() {
    static char text[512];
    snprintf(text, sizeof text, "kernel %s (launched at %s:%d), block (%u,%u,%u)", call->name, call->at.file,
             call->at.line, blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

const char *where_in_kernel() {
    static char text[640];
    text[0] = 0;
    if (call) snprintf(text, sizeof text, "%s, %s", block_name(), thread_name(current));
    return text;
}

static unsigned take_ready() {
    size_t i = 0;
    if (order() == CUDA_ON_CPU_RANDOM) i = random_below(ready_count);
    for (size_t j = 1; order() != CUDA_ON_CPU_RANDOM && j < ready_count; j++)
        if ((ready[j] < ready[i]) == (order() == CUDA_ON_CPU_FORWARD)) i = j;
    const unsigned thread = ready[i];
    ready[i] = ready[--ready_count];
    return thread;
}

static void enter(unsigned i) {
    current = i;
    threadIdx = index_of(i);
}

static void suspend() { switch_fiber(*threads[current].stack, scheduler); }

/* A fiber runs one thread after the other, and only switches when one must wait; with TSan, each has a fiber. */
static void fiber_main() {
    for (;;) {
        fiber *self = threads[current].stack;
        acquire(call->before);
        (*call->body)();
        release(call->after);
        threads[current].now = DONE;
        done++;
        has_next = false;
#if !defined(CUDA_ON_CPU_TSAN)
        if (ready_count) {
            next_thread = take_ready();
            if (threads[next_thread].now == NEW) {
                threads[next_thread].stack = self;
                enter(next_thread);
                continue;
            }
            has_next = true;
        }
        idle.push_back(self);
#endif
        switch_fiber(*self, scheduler);
    }
}

static fiber *fiber_for(unsigned i) {
#if defined(CUDA_ON_CPU_TSAN)
    static fiber *all[POOLS][MAX_THREADS];
    fiber *&f = all[pool][i];
    if (!f) fibers.push_back(f = new_fiber());
    return f;
#else
    (void)i;
    if (idle.empty()) {
        fibers.push_back(new_fiber());
        return fibers.back();
    }
    fiber *f = idle.back();
    idle.pop_back();
    return f;
#endif
}

static const char *operation_name(operation what, bool in_warp) {
    static const char *const names[] = { "__syncwarp",     "__all_sync",  "__any_sync",     "",
                                         "__ballot_sync",  "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                         "__shfl_xor_sync" };
    return in_warp ? names[what] : "__syncthreads";
}

static void describe(unsigned i, char *out, size_t size) {
    const thread &t = threads[i];
    if (t.now == DONE) snprintf(out, size, "%s has returned", thread_name(i));
    else if (t.now == WARP)
        snprintf(out, size, "%s is in %s with mask %08x at %s:%d", thread_name(i), operation_name(t.what, true), t.mask,
                 t.at.file, t.at.line);
    else snprintf(out, size, "%s is in __syncthreads at %s:%d", thread_name(i), t.at.file, t.at.line);
}

/* Nobody can go on: says who waits for whom. */
[[noreturn]] static void name_deadlock() {
    char a[600], b[600];
    for (unsigned i = 0; i < thread_count; i++) {
        if (threads[i].now != WARP) continue;
        describe(i, a, sizeof a);
        for (unsigned j = i / 32 * 32; j < i / 32 * 32 + 32 && j < thread_count; j++) {
            const thread &t = threads[j];
            if (!(threads[i].mask >> j % 32 & 1) || (t.now == WARP && t.mask == threads[i].mask &&
                                                     t.what == threads[i].what && t.at.line == threads[i].at.line))
                continue;
            describe(j, b, sizeof b);
            fatal("%s: absent lane: %s, but %s", block_name(), a, b);
        }
    }
    for (unsigned i = 0; i < thread_count; i++) {
        if (threads[i].now != BARRIER) continue;
        describe(i, a, sizeof a);
        for (unsigned j = 0; j < thread_count; j++) {
            if (threads[j].now == BARRIER) continue;
            describe(j, b, sizeof b);
            fatal("%s: divergent barrier: %s, but %s", block_name(), a, b);
        }
    }
    fatal("%s: nothing can go on", block_name());
}

int barrier(operation what, int predicate, place at) {
    thread &self = threads[current];
    self.now = BARRIER;
    self.what = what;
    self.at = at;
    self.value = predicate != 0;
    release(&barrier_sync[pool]);
    if (++waiting == thread_count) {
        uint64_t count = 0;
        for (unsigned i = 0; i < thread_count; i++) {
            if (threads[i].at.line != at.line || threads[i].what != what) {
                char a[600], b[600];
                describe(i, a, sizeof a);
                describe(current, b, sizeof b);
                fatal("%s: divergent barrier: %s, but %s", block_name(), a, b);
            }
            count += threads[i].value;
        }
        for (unsigned i = 0; i < thread_count; i++) {
            thread &t = threads[i];
            t.result = what == ALL ? count == thread_count : what == ANY ? count > 0 : count;
            t.now = READY;
            ready[ready_count++] = i;
        }
        waiting = 0;
    }
    suspend();
    acquire(&barrier_sync[pool]);
    return (int)threads[current].result;
}

/* The lane that a shuffle reads; its own where the segment ends. */
static int source_lane(const thread &t, int lane) {
    const int first = lane / t.width * t.width, end = first + t.width;
    switch (t.what) {
    case SHUFFLE: return first + (t.lane & (t.width - 1));
    case SHUFFLE_UP: return lane - t.lane < first ? lane : lane - t.lane;
    case SHUFFLE_DOWN: return lane + t.lane >= end ? lane : lane + t.lane;
    default: return (lane ^ t.lane) >= end ? lane : lane ^ t.lane;
    }
}

uint64_t warp(operation what, unsigned mask, uint64_t value, int lane, int width, place at) {
    const unsigned first = current / 32 * 32, size = thread_count;
    const unsigned there = size - first >= 32 ? ~0u : (1u << (size - first)) - 1;
    const char *name = operation_name(what, true);
    if (what == SYNC) mask &= there; /* its default names all 32 lanes also where the last warp is smaller */
    if (mask & ~there)
        fatal("%s: absent lane: %s at %s:%d has mask %08x, which names lanes beyond the block of %u threads",
              where_in_kernel(), name, at.file, at.line, mask, size);
    if (!(mask >> current % 32 & 1))
        fatal("%s: %s at %s:%d has mask %08x, without the lane that calls it", where_in_kernel(), name, at.file,
              at.line, mask);
    if (width < 1 || width > 32 || (width & (width - 1)))
        fatal("%s: %s at %s:%d has width %d", where_in_kernel(), name, at.file, at.line, width);
    thread &self = threads[current];
    self.now = WARP;
    self.what = what;
    self.mask = mask;
    self.value = value;
    self.lane = lane;
    self.width = width;
    self.at = at;
    if (what == SYNC) release(&warp_sync[pool][current / 32]);
    unsigned arrived = 0, votes = 0;
    for (unsigned i = 0; i < 32 && first + i < size; i++) {
        const thread &t = threads[first + i];
        if (!(mask >> i & 1) || t.now != WARP || t.mask != mask || t.what != what || t.at.line != at.line) continue;
        arrived |= 1u << i;
        votes |= (unsigned)(t.value & 1) << i;
    }
    for (unsigned i = 0; arrived == mask && i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        thread &t = threads[first + i];
        if (what == ALL) t.result = votes == mask;
        else if (what == ANY) t.result = votes != 0;
        else if (what == BALLOT) t.result = votes;
        else if (what != SYNC) {
            const int from = source_lane(t, (int)i);
            t.result = mask >> from & 1 ? threads[first + (unsigned)from].value : ~(uint64_t)0; /* undefined: NaN */
        }
        t.now = READY;
        ready[ready_count++] = first + i;
    }
    suspend();
    if (what == SYNC) acquire(&warp_sync[pool][current / 32]);
    return threads[current].result;
}

/* Before each atomic another thread may run: one that spins until a lock is free must let the others go on. */
void atomic_step() {
    static unsigned turn;
    if (order() == CUDA_ON_CPU_RANDOM ? random_below(8) : ++turn % 1024) return;
    threads[current].now = READY;
    ready[ready_count++] = current;
    suspend();
}

void fence() {
    release(&fence_sync);
    acquire(&fence_sync);
}

/* ---- the grid ---- */

/* All thread_local variables of the program, which are its static shared memory. */
static int find_static_shared(dl_phdr_info *info, size_t, void *out) {
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS) {
            auto *found = (std::pair<char *, size_t> *)out;
            *found = { (char *)info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz };
        }
    return 1; /* the program itself comes first */
}

/* To TSan, shared memory is new in each block: without this it would see races between blocks in it. It has no call
   for that, but one for garbage collectors, which moves what it knows of some memory and leaves nothing there. */
static void forget(char *p, size_t bytes) {
#if defined(CUDA_ON_CPU_TSAN)
    static char *untouched;
    if (!untouched) {
        untouched = (char *)mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        __tsan_java_init((unsigned long)untouched, 1 << 20);
    }
    char *begin = (char *)((uintptr_t)p & ~(uintptr_t)7);
    const size_t n = ((size_t)(p + bytes - begin) + 7) & ~(size_t)7;
    if (n) __tsan_java_move((unsigned long)untouched, (unsigned long)begin, n);
#else
    (void)p, (void)bytes;
#endif
}

static void run_block(std::pair<char *, size_t> statics) {
    const unsigned count = call->block.x * call->block.y * call->block.z;
    const size_t bytes = call->shared, past = sizeof shared - bytes < 256 ? sizeof shared - bytes : 256;
    memset(shared, 0xFF, bytes);
    memset(shared + bytes, CANARY, past);
    memset(statics.first, 0xFF, statics.second);
    forget(shared, bytes);
    forget(statics.first, statics.second);
    poison(shared + bytes, sizeof shared - bytes);

    for (unsigned i = 0; i < count; i++) threads[i] = thread(), ready[i] = i;
    thread_count = ready_count = count;
    waiting = done = 0;
    has_next = false;
#if defined(CUDA_ON_CPU_TSAN)
    pool = (int)random_below(count <= 64 ? POOLS : 2); /* fibers are dear to make */
#endif
    while (done < count) {
        if (!has_next) {
            if (!ready_count) name_deadlock();
            next_thread = take_ready();
        }
        has_next = false;
        thread &t = threads[next_thread];
        if (t.now == NEW) t.stack = fiber_for(next_thread);
        enter(next_thread);
        switch_fiber(scheduler, *t.stack);
    }
    unpoison(shared + bytes, sizeof shared - bytes);
    for (size_t i = 0; i < past; i++)
        if ((unsigned char)shared[bytes + i] != CANARY)
            fatal("%s: wrote %zu bytes past the %zu of its dynamic shared memory", block_name(), i, bytes);
}

static uint64_t common_divisor(uint64_t a, uint64_t b) { return b ? common_divisor(b, a % b) : a; }

void run_kernel(const kernel_call &it) {
    std::pair<char *, size_t> statics = { nullptr, 0 };
    dl_iterate_phdr(find_static_shared, &statics);
    call = &it;
    gridDim = it.grid;
    blockDim = it.block;
#if defined(CUDA_ON_CPU_TSAN)
    scheduler.tsan = __tsan_get_current_fiber();
#endif
    release(it.before);
    /* A random order that needs no list: steps of a size without a divisor in common with the number of blocks. */
    const uint64_t blocks = (uint64_t)it.grid.x * it.grid.y * it.grid.z;
    uint64_t step = 1, b = 0;
    if (order() == CUDA_ON_CPU_REVERSE) step = blocks - 1, b = blocks - 1;
    if (order() == CUDA_ON_CPU_RANDOM) {
        b = random_below(blocks);
        do step = 1 + random_below(blocks);
        while (common_divisor(step, blocks) != 1);
    }
    for (uint64_t i = 0; i < blocks; i++, b = (b + step) % blocks) {
        blockIdx = uint3{ (unsigned)(b % it.grid.x), (unsigned)(b / it.grid.x % it.grid.y),
                          (unsigned)(b / it.grid.x / it.grid.y) };
        run_block(statics);
    }
    acquire(it.after);
    call = nullptr;
}

} // namespace cuda_on_cpu
