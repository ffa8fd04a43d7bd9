/* What the parts of the runtime know of each other. They are compiled without a sanitizer, also for the builds that have
   one: they tell it what it must know through its interface. */
#ifndef CUDA_ON_CPU_INTERNAL_H
#define CUDA_ON_CPU_INTERNAL_H

#include "cuda_on_cpu.h"
#include "control.h"

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(CUDA_ON_CPU_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void *p, unsigned long bytes);
void __tsan_write_range(void *p, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
void __tsan_java_init(unsigned long begin, unsigned long bytes);
void __tsan_java_move(unsigned long from, unsigned long to, unsigned long bytes);
}
#endif

namespace cuda_on_cpu {

constexpr size_t MAX_SHARED = 227 * 1024, MAX_SHARED_UNASKED = 48 * 1024;
constexpr unsigned MAX_THREADS = 1024;

struct kernel_call {
    const char *name;
    place at;
    int device;
    dim3 grid, block;
    size_t shared;
    const std::function<void()> *body;
    void *before, *after; /* TSan: its threads follow what was released to one, and release to the other */
};
void run_kernel(const kernel_call &call);
/* "kernel k (file.cu:12), block (0,0,0), thread (3,0,0)", or an empty text outside of kernels */
const char *where_in_kernel();
bool on_fiber_guard(const char *address);

[[noreturn]] void fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Something wrong that CUDA answers with an error code. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t random_below(uint64_t n);
cuda_on_cpu_order order();

/* Puts work that touches the device's memory into a stream; cuBLAS's way in. */
bool enqueue_computation(cudaStream_t stream, const char *what, std::function<void()> run);
bool cublas_begins(cudaError_t *error); /* counts the call and injects faults */
void check_device_range(const char *what, const void *p, size_t bytes, int device);
void handle_lives(int change);
int device_of_stream(cudaStream_t stream);

/* Held by each call: one host thread at a time is in the runtime. Device memory is shut again when the outermost call
   returns. */
struct entry {
    entry();
    ~entry();
};

/* ---- sanitizers ---- */

#if defined(CUDA_ON_CPU_TSAN)
inline void acquire(void *p) { __tsan_acquire(p); }
inline void release(void *p) { __tsan_release(p); }
/* What the runtime itself does is no business of TSan, which sees its malloc and memcpy; what it does for the program,
   it notes. */
inline void unseen(bool begin) {
    if (begin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    else AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
inline void note_read(const void *p, size_t n) {
    unseen(false);
    __tsan_read_range((void *)p, n);
    unseen(true);
}
inline void note_write(void *p, size_t n) {
    unseen(false);
    __tsan_write_range(p, n);
    unseen(true);
}
#else
inline void unseen(bool) {}
inline void acquire(void *) {}
inline void release(void *) {}
inline void note_read(const void *, size_t) {}
inline void note_write(void *, size_t) {}
#endif

inline void poison(const void *p, size_t n) {
#if defined(CUDA_ON_CPU_ASAN)
    __asan_poison_memory_region(p, n);
#else
    (void)p, (void)n;
#endif
}

inline void unpoison(const void *p, size_t n) {
#if defined(CUDA_ON_CPU_ASAN)
    __asan_unpoison_memory_region(p, n);
#else
    (void)p, (void)n;
#endif
}

} // namespace cuda_on_cpu

#endif
