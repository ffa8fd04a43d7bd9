/* CUDA on the CPU, for tests: a .cu file compiled by g++ with this header forced in front of it,

       g++ -x c++ -std=c++17 -include tests/cuda_on_cpu/cuda_on_cpu.h -I$CUDA_HOME/include file.cu ...

   and linked with the .cpp files beside it runs without a GPU. NVIDIA's own headers give types and prototypes; here
   and there are the functions. tests/cuda_on_cpu/build knows the options of the three builds:

       plain   results; canaries around allocations
       asan    the exact line of accesses out of bounds and of undefined behaviour
       tsan    races inside kernels, between blocks, and between streams

   In all of them: block threads run in random order between barriers, blocks in random order, work in streams as late
   and as mixed as is legal; device memory, freed memory and shared memory are poisoned with NaN; the host cannot touch
   device memory and a device not that of another without peer access; divergent barriers and shuffles with absent lanes
   are named; the n-th call of a kind can be made to fail. control.h is what tests may set and ask.

   The .cu launches by PD_CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...), with a template's name
   in parentheses, and has dynamic shared memory by PD_CUDA_SHARED(type, name). The program must have no thread_local
   of its own: all of it is taken for shared memory (see __shared__ below).

   LIMITS, so that nobody trusts it too far
     - One thread runs at a time. There is no weak memory model: a missing __threadfence passes; atomics are sequential,
       and the order-dependence of float atomicAdd shows through the random order alone. `volatile` is not a barrier.
     - TSan sees races between blocks, and between kernels on streams, for most pairs of threads but not all (fibers are
       reused). A shuffle orders nothing, as in CUDA.
     - No occupancy, no co-residency of blocks (a kernel that waits for another block hangs), no registers, banks or
       coalescing, and no speed. __launch_bounds__ is not checked against the launch, nor static shared memory added up.
     - Host libm in place of __expf and of flushing to zero; other contraction to FMA; no tensor cores (but TF32 rounding
       of the inputs of a gemm that is allowed it). gemm adds in double, so it is better than cuBLAS.
     - x86 forgives misaligned access, except in the asan build.
     - cudaMemcpyPeer needs peer access, which CUDA can do without. A host function in a stream must not wait for a host
       thread that calls CUDA.
     - No graphs, no textures, no dynamic parallelism, no managed memory, no cooperative groups, no inline PTX.
     - Kernels that read host memory through a pointer inside a struct are not noticed; pointer arguments are. */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <functional>
#include <tuple>
#include <type_traits>

#define CUDA_ON_CPU 1

/* Thread-local variables lie together in one segment which the runtime can find, also those of templates; so it can
   poison all static shared memory before each block. */
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

/* ---- launches ---- */

namespace cuda_on_cpu {

struct place {
    const char *file;
    int line;
};

cudaError_t launch(const char *name, place at, const void *kernel, dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, const void *const *pointers, int pointer_count, std::function<void()> body);
void *shared_memory();

/* Arguments become the kernel's parameter types now, as in CUDA, and are kept until the kernel runs. */
template <class... P, class... A>
void launch_call(const char *name, place at, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                 cudaStream_t stream, A &&...arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "this kernel takes another number of arguments");
    std::tuple<std::decay_t<P>...> values(std::forward<A>(arguments)...);
    const void *pointers[sizeof...(P) + 1] = {};
    int count = 0;
    auto note = [&](const auto &value) {
        if constexpr (std::is_pointer_v<std::decay_t<decltype(value)>>) pointers[count] = (const void *)value;
        count++;
    };
    std::apply([&](const auto &...value) { (note(value), ...); }, values);
    launch(name, at, (const void *)kernel, grid, block, shared, stream, pointers, count,
           [kernel, values] { std::apply(kernel, values); });
}

} // namespace cuda_on_cpu

#define PD_CUDA_LAUNCH(kernel, ...)                                                                                    \
    cuda_on_cpu::launch_call(#kernel, cuda_on_cpu::place{ __FILE__, __LINE__ }, kernel, __VA_ARGS__)
#define PD_CUDA_SHARED(type, name) type *name = (type *)cuda_on_cpu::shared_memory()

/* cuda_runtime.h has this for nvcc alone. */
template <class T> cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}

/* ---- barriers and warps ---- */

namespace cuda_on_cpu {

enum operation { SYNC, ALL, ANY, COUNT, BALLOT, SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR };
int barrier(operation what, int predicate, place at);
uint64_t warp(operation what, unsigned mask, uint64_t value, int lane, int width, place at);
void atomic_step();
void fence();

template <class T> T shuffle(operation what, unsigned mask, T value, int lane, int width, place at) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_arithmetic_v<T>, "shuffles take numbers");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = warp(what, mask, bits, lane, width, at);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

} // namespace cuda_on_cpu

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_ON_CPU_AT                                                                                                 \
    cuda_on_cpu::place { file, line }

static inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::barrier(cuda_on_cpu::SYNC, 0, CUDA_ON_CPU_AT); }
static inline int __syncthreads_and(int p, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::barrier(cuda_on_cpu::ALL, p, CUDA_ON_CPU_AT);
}
static inline int __syncthreads_or(int p, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::barrier(cuda_on_cpu::ANY, p, CUDA_ON_CPU_AT);
}
static inline int __syncthreads_count(int p, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::barrier(cuda_on_cpu::COUNT, p, CUDA_ON_CPU_AT);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::warp(cuda_on_cpu::SYNC, mask, 0, 0, 32, CUDA_ON_CPU_AT);
}
static inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) {
    return (unsigned)cuda_on_cpu::warp(cuda_on_cpu::BALLOT, mask, p != 0, 0, 32, CUDA_ON_CPU_AT);
}
static inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) {
    return (int)cuda_on_cpu::warp(cuda_on_cpu::ALL, mask, p != 0, 0, 32, CUDA_ON_CPU_AT);
}
static inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) {
    return (int)cuda_on_cpu::warp(cuda_on_cpu::ANY, mask, p != 0, 0, 32, CUDA_ON_CPU_AT);
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::SHUFFLE, mask, value, lane, width, CUDA_ON_CPU_AT);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::SHUFFLE_UP, mask, value, (int)delta, width, CUDA_ON_CPU_AT);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::SHUFFLE_DOWN, mask, value, (int)delta, width, CUDA_ON_CPU_AT);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::SHUFFLE_XOR, mask, value, lanes, width, CUDA_ON_CPU_AT);
}

#undef CUDA_ON_CPU_HERE
#undef CUDA_ON_CPU_AT

static inline void __threadfence() { cuda_on_cpu::fence(); }
static inline void __threadfence_block() { cuda_on_cpu::fence(); }
static inline void __threadfence_system() { cuda_on_cpu::fence(); }

/* ---- atomics: relaxed, as in CUDA, so that TSan takes them for atomic but not for a barrier ---- */

namespace cuda_on_cpu {

template <class T, class F> T atomic_update(T *address, F &&change) {
    using bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static_assert(sizeof(T) == sizeof(bits), "atomics are of 4 or 8 bytes");
    atomic_step();
    bits old = __atomic_load_n((bits *)address, __ATOMIC_RELAXED);
    for (;;) {
        T before, after;
        memcpy(&before, &old, sizeof(T));
        after = change(before);
        bits next;
        memcpy(&next, &after, sizeof(T));
        if (__atomic_compare_exchange_n((bits *)address, &old, next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return before;
    }
}

template <class T, class... U> constexpr bool is_one_of = (std::is_same_v<T, U> || ...);
template <class T> using same = std::common_type_t<T>; /* so that the type comes from the address alone */
using ull = unsigned long long;

} // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, result, ...)                                                                          \
    template <class T> T name(T *address, cuda_on_cpu::same<T> value) {                                                \
        static_assert(cuda_on_cpu::is_one_of<T, __VA_ARGS__>, "CUDA has no " #name " of this type");                   \
        return cuda_on_cpu::atomic_update(address, [value](T old) -> T { return result; });                            \
    }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value, int, unsigned, cuda_on_cpu::ull, float, double)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value, int, unsigned)
CUDA_ON_CPU_ATOMIC(atomicExch, ((void)old, value), int, unsigned, cuda_on_cpu::ull, float)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, cuda_on_cpu::ull, long long)
CUDA_ON_CPU_ATOMIC(atomicMax, value > old ? value : old, int, unsigned, cuda_on_cpu::ull, long long)
CUDA_ON_CPU_ATOMIC(atomicAnd, old &value, int, unsigned, cuda_on_cpu::ull)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value, int, unsigned, cuda_on_cpu::ull)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value, int, unsigned, cuda_on_cpu::ull)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1, unsigned)
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1, unsigned)
#undef CUDA_ON_CPU_ATOMIC

template <class T> T atomicCAS(T *address, cuda_on_cpu::same<T> compare, cuda_on_cpu::same<T> value) {
    static_assert(cuda_on_cpu::is_one_of<T, int, unsigned, cuda_on_cpu::ull>, "CUDA has no atomicCAS of this type");
    return cuda_on_cpu::atomic_update(address, [=](T old) -> T { return old == compare ? value : old; });
}

/* ---- arithmetic ---- */

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }

/* Macros, since glibc declares some of these names without defining them. */
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __fdividef(x, y) ((float)(x) / (float)(y))
#define __fadd_rn(x, y) ((float)(x) + (float)(y))
#define __fmul_rn(x, y) ((float)(x) * (float)(y))
#define __fdiv_rn(x, y) ((float)(x) / (float)(y))
#define __fmaf_rn(x, y, z) fmaf(x, y, z)
#define __fsqrt_rn(x) sqrtf(x)
#define __frcp_rn(x) (1.0f / (float)(x))
#define __frsqrt_rn(x) (1.0f / sqrtf(x))
#define rsqrtf(x) (1.0f / sqrtf(x))
#define rsqrt(x) (1.0 / sqrt(x))
#define __saturatef(x) fminf(fmaxf(x, 0.0f), 1.0f)
#define __float2int_rn(x) ((int)nearbyintf(x))
#define __float2int_rz(x) ((int)(x))
#define __float2int_rd(x) ((int)floorf(x))
#define __float2int_ru(x) ((int)ceilf(x))
#define __int2float_rn(x) ((float)(x))

namespace cuda_on_cpu {
template <class To, class From> To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}
} // namespace cuda_on_cpu
static inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
static inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
static inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
static inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
static inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits_as<long long>(x); }
static inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits_as<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

#define CUDA_ON_CPU_MIN_MAX(type)                                                                                      \
    static inline type min(type a, type b) { return b < a ? b : a; }                                                   \
    static inline type max(type a, type b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
#undef CUDA_ON_CPU_MIN_MAX
/* NaN loses, as in CUDA. */
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

#endif
