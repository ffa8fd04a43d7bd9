/* Small kernels with one bug each, which CUDA on the CPU must find, and the same without the bug, which must pass:
       planted NAME right|wrong
   Ends with 0 if the result is as it should be. Run by tests/test_cuda_on_cpu.sh, which knows how each bug shows. */
#include <cuda_runtime.h>
#include <cublas_v2.h>
#include <cuda_fp16.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <vector>
#include "control.h"

static bool wrong; /* plant the bug */

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        const auto status = (call);                                                                                    \
        if (status) return printf("%s:%d: %s: status %d\n", __FILE__, __LINE__, #call, (int)status), 1;                \
    } while (0)
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) return printf("%s:%d: wrong result: %s\n", __FILE__, __LINE__, #condition), 1;               \
    } while (0)

/* A device array that holds 0, 1, 2.. */
static float *counting(int n) {
    std::vector<float> values((size_t)n);
    for (int i = 0; i < n; i++) values[(size_t)i] = (float)i;
    float *p = nullptr;
    cudaMalloc(&p, sizeof(float) * (size_t)n);
    cudaMemcpy(p, values.data(), sizeof(float) * (size_t)n, cudaMemcpyHostToDevice);
    return p;
}

static std::vector<float> fetch(const float *p, int n) {
    std::vector<float> values((size_t)n);
    cudaMemcpy(values.data(), p, sizeof(float) * (size_t)n, cudaMemcpyDeviceToHost);
    return values;
}

/* ---- inside a block ---- */

__global__ void reverse_in_shared(const float *in, float *out, bool leave_out) {
    __shared__ float s[128];
    const int t = (int)threadIdx.x;
    s[t] = in[t];
    if (!leave_out) __syncthreads();
    out[128 * (int)blockIdx.x + t] = s[127 - t];
}

static int missing_barrier() {
    float *in = counting(128), *out = counting(256);
    PD_CUDA_LAUNCH(reverse_in_shared, 2, 128, 0, nullptr, in, out, wrong);
    const std::vector<float> got = fetch(out, 256);
    for (int t = 0; t < 256; t++) EXPECT(got[(size_t)t] == (float)(127 - t % 128));
    return 0;
}

__global__ void warp_exchange(const float *in, float *out, bool leave_out) {
    PD_CUDA_SHARED(float, s);
    const unsigned t = threadIdx.x;
    s[t] = in[t];
    if (!leave_out) __syncwarp();
    out[t] = s[t ^ 1];
}

static int missing_syncwarp() {
    float *in = counting(64), *out = counting(64);
    PD_CUDA_LAUNCH(warp_exchange, 1, 64, 64 * sizeof(float), nullptr, in, out, wrong);
    const std::vector<float> got = fetch(out, 64);
    for (int t = 0; t < 64; t++) EXPECT(got[(size_t)t] == (float)(t ^ 1));
    return 0;
}

template <int N> __global__ void half_filled(float *out, bool leave_out) {
    __shared__ float s[N];
    PD_CUDA_SHARED(float, dynamic);
    const int t = (int)threadIdx.x;
    if (!leave_out || t < N / 2) s[t] = dynamic[t] = 1;
    __syncthreads();
    out[N * (int)blockIdx.x + t] = N == 32 ? s[t] : dynamic[t];
}

template <int N> static int uninitialised() {
    float *out = counting(3 * N);
    PD_CUDA_LAUNCH((half_filled<N>), 3, N, N * sizeof(float), nullptr, out, wrong);
    for (float value : fetch(out, 3 * N)) EXPECT(value == 1);
    return 0;
}

__global__ void diverge(float *out, bool half) {
    if (!half || threadIdx.x < 16) __syncthreads();
    out[threadIdx.x] = 1;
}

static int divergent_barrier() {
    float *out = counting(32);
    PD_CUDA_LAUNCH(diverge, 1, 32, 0, nullptr, out, wrong);
    for (float value : fetch(out, 32)) EXPECT(value == 1);
    return 0;
}

__global__ void diverge_in_two(float *out, bool two) {
    if (!two || threadIdx.x < 16) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 1;
}

static int two_barriers() {
    float *out = counting(32);
    PD_CUDA_LAUNCH(diverge_in_two, 1, 32, 0, nullptr, out, wrong);
    for (float value : fetch(out, 32)) EXPECT(value == 1);
    return 0;
}

__global__ void warp_sum(const float *in, float *out, bool leave, unsigned mask) {
    if (leave && threadIdx.x % 32 == 5) return;
    float v = in[threadIdx.x];
    for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(mask, v, (unsigned)d);
    if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = v;
}

static int absent_lane() {
    float *in = counting(64), *out = counting(2);
    PD_CUDA_LAUNCH(warp_sum, 1, 64, 0, nullptr, in, out, wrong, 0xffffffffu);
    EXPECT(fetch(out, 2) == std::vector<float>({ 496, 496 + 1024 }));
    return 0;
}

static int lane_beyond_block() {
    float *in = counting(32), *out = counting(1);
    PD_CUDA_LAUNCH(warp_sum, 1, wrong ? 31 : 32, 0, nullptr, in, out, false, 0xffffffffu);
    EXPECT(fetch(out, 1)[0] == 496);
    return 0;
}

/* ---- memory ---- */

__global__ void store_up_to(float *out, int n, bool one_more) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n || (one_more && i == n)) out[i] = 1; /* HERE out_of_bounds */
}

static int out_of_bounds() {
    float *out = counting(100);
    PD_CUDA_LAUNCH(store_up_to, 4, 32, 0, nullptr, out, 100, wrong);
    for (float value : fetch(out, 100)) EXPECT(value == 1);
    return 0;
}

__global__ void store_shared(float *out, int n) {
    PD_CUDA_SHARED(float, s);
    for (int i = 0; i < n; i++) s[i] = (float)i; /* HERE shared_out_of_bounds */
    out[0] = s[n - 1];
}

static int shared_out_of_bounds() {
    float *out = counting(1);
    PD_CUDA_LAUNCH(store_shared, 1, 1, 32 * sizeof(float), nullptr, out, wrong ? 33 : 32);
    EXPECT(fetch(out, 1)[0] == (wrong ? 32 : 31));
    return 0;
}

__global__ void store_static_shared(float *out, int n) {
    __shared__ float s[32];
    for (int i = 0; i < n; i++) s[i] = (float)i; /* HERE static_out_of_bounds */
    out[0] = s[n - 1];
}

static int static_out_of_bounds() {
    float *out = counting(1);
    PD_CUDA_LAUNCH(store_static_shared, 1, 1, 0, nullptr, out, wrong ? 33 : 32);
    EXPECT(fetch(out, 1)[0] == 31);
    return 0;
}

__global__ void copy(const float *in, float *out, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[i];
}

static int use_after_free() {
    float *in = counting(64), *out = counting(64);
    if (wrong) CHECK(cudaFree(in));
    PD_CUDA_LAUNCH(copy, 2, 32, 0, nullptr, in, out, 64);
    EXPECT(fetch(out, 64)[63] == 63);
    return 0;
}

static int free_before_use() {
    float *in = nullptr, *out = counting(64);
    cudaStream_t s;
    CHECK(cudaStreamCreate(&s));
    CHECK(cudaMallocAsync(&in, 64 * sizeof(float), s));
    CHECK(cudaMemsetAsync(in, 0, 64 * sizeof(float), s));
    if (wrong) CHECK(cudaFreeAsync(in, s));
    PD_CUDA_LAUNCH(copy, 2, 32, 0, s, in, out, 64);
    if (!wrong) CHECK(cudaFreeAsync(in, s));
    CHECK(cudaStreamSynchronize(s));
    EXPECT(fetch(out, 64)[63] == 0);
    return 0;
}

static int uninitialised_memory() {
    float *in = counting(64), *out = nullptr;
    CHECK(cudaMalloc(&out, 64 * sizeof(float)));
    PD_CUDA_LAUNCH(copy, 2, 32, 0, nullptr, in, out, wrong ? 63 : 64);
    EXPECT(fetch(out, 64)[63] == 63);
    return 0;
}

static int host_touches_device() {
    float *in = counting(4);
    EXPECT((wrong ? in[2] : fetch(in, 4)[2]) == 2);
    return 0;
}

static int host_pointer() {
    static float host[64];
    float *in = counting(64), *out = counting(64);
    PD_CUDA_LAUNCH(copy, 2, 32, 0, nullptr, wrong ? host : in, out, 64);
    EXPECT(fetch(out, 64)[63] == 63);
    return 0;
}

struct where {
    float *p;
};
__global__ void store_in_struct(where to) { to.p[threadIdx.x] = 1; }

/* Of two devices. */
static int peer(int how) {
    float *in = counting(32);
    CHECK(cudaSetDevice(1));
    if (!wrong) CHECK(cudaDeviceEnablePeerAccess(0, 0));
    float *out = counting(32);
    if (how == 0) PD_CUDA_LAUNCH(copy, 1, 32, 0, nullptr, in, out, 32);
    if (how == 1) {
        PD_CUDA_LAUNCH(store_in_struct, 1, 32, 0, nullptr, where{ in });
        CHECK(cudaDeviceSynchronize());
    }
    if (how == 2) CHECK(cudaMemcpyPeerAsync(out, 1, in, 0, 32 * sizeof(float), nullptr));
    EXPECT(fetch(out, 32)[31] == 31);
    return 0;
}

/* ---- blocks and streams ---- */

__global__ void count_all(float *total, bool plainly) {
    if (!plainly) atomicAdd(total, 1.0f);
    else if (threadIdx.x == blockIdx.x) *total += 1; /* each block by another thread; no barrier helps between blocks */
}

static int blocks_race() {
    float *total = counting(1);
    PD_CUDA_LAUNCH(count_all, 32, 32, 0, nullptr, total, wrong);
    EXPECT(fetch(total, 1)[0] == (wrong ? 32 : 1024));
    return 0;
}

__global__ void reverse(const float *in, float *out, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[n - 1 - i];
}

static int missing_event() {
    float *a = counting(256), *b = counting(256), *c = counting(256);
    cudaStream_t first, second;
    cudaEvent_t ready;
    CHECK(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming));
    PD_CUDA_LAUNCH(reverse, 2, 128, 0, first, a, b, 256);
    CHECK(cudaEventRecord(ready, first));
    if (!wrong) CHECK(cudaStreamWaitEvent(second, ready, 0));
    PD_CUDA_LAUNCH(reverse, 2, 128, 0, second, b, c, 256);
    CHECK(cudaDeviceSynchronize());
    EXPECT(fetch(c, 256)[0] == 0);
    EXPECT(fetch(b, 256)[0] == 255);
    CHECK(cudaEventDestroy(ready));
    CHECK(cudaStreamDestroy(first));
    CHECK(cudaStreamDestroy(second));
    return 0;
}

static int missing_event_before_gemm() {
    float *a = counting(64), *b = counting(64), *c = counting(64);
    cudaStream_t first, second;
    cudaEvent_t ready;
    cublasHandle_t h;
    const float one = 1, zero = 0;
    CHECK(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&ready));
    CHECK(cublasCreate(&h));
    CHECK(cublasSetStream(h, second));
    PD_CUDA_LAUNCH(reverse, 1, 64, 0, first, a, b, 64);
    CHECK(cudaEventRecord(ready, first));
    if (!wrong) CHECK(cudaStreamWaitEvent(second, ready, 0));
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 64, &one, b, 1, a, 64, &zero, c, 1));
    CHECK(cudaDeviceSynchronize());
    float sum = 0;
    for (int i = 0; i < 64; i++) sum += (float)(i * (63 - i));
    EXPECT(fetch(c, 1)[0] == sum);
    CHECK(cublasDestroy(h));
    return 0;
}

/* A staging buffer that is filled again before it was copied. */
static int pinned_reuse() {
    float *host = nullptr, *a = counting(64), *b = counting(64);
    cudaStream_t s;
    CHECK(cudaMallocHost(&host, 64 * sizeof(float)));
    CHECK(cudaStreamCreate(&s));
    for (int i = 0; i < 64; i++) host[i] = 1;
    CHECK(cudaMemcpyAsync(a, host, 64 * sizeof(float), cudaMemcpyHostToDevice, s));
    if (!wrong) CHECK(cudaStreamSynchronize(s));
    for (int i = 0; i < 64; i++) host[i] = 2;
    CHECK(cudaMemcpyAsync(b, host, 64 * sizeof(float), cudaMemcpyHostToDevice, s));
    CHECK(cudaStreamSynchronize(s));
    EXPECT(fetch(a, 64)[5] == 1);
    EXPECT(fetch(b, 64)[5] == 2);
    CHECK(cudaFreeHost(host));
    return 0;
}

/* Results that are looked at before they are there. */
static int missing_synchronize() {
    float *host = nullptr, *a = counting(64);
    cudaStream_t s;
    CHECK(cudaMallocHost(&host, 64 * sizeof(float)));
    CHECK(cudaStreamCreate(&s));
    CHECK(cudaMemcpyAsync(host, a, 64 * sizeof(float), cudaMemcpyDeviceToHost, s));
    if (!wrong) CHECK(cudaStreamSynchronize(s));
    EXPECT(host[63] == 63);
    CHECK(cudaFreeHost(host));
    return 0;
}

/* ---- errors ---- */

/* Takes three arrays; if one can't be had, gives back those it has, or forgets to. */
static cudaError_t take_three(float **p) {
    for (int i = 0; i < 3; i++) {
        const cudaError_t error = cudaMalloc(&p[i], 100);
        if (!error) continue;
        for (int j = 0; j < i && !wrong; j++) cudaFree(p[j]);
        return error;
    }
    return cudaSuccess;
}

static int failing_malloc() {
    float *p[3];
    for (int n = 1; n <= 3; n++) {
        cuda_on_cpu_fail(CUDA_ON_CPU_MALLOC, n, 0);
        EXPECT(take_three(p) == cudaErrorMemoryAllocation);
        EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation);
        EXPECT(cudaGetLastError() == cudaSuccess);
        EXPECT(cuda_on_cpu_leaks() == 0);
    }
    CHECK(take_three(p));
    EXPECT(cuda_on_cpu_count().live_allocations == 3);
    EXPECT(cuda_on_cpu_count().calls[CUDA_ON_CPU_MALLOC] == 1 + 2 + 3 + 3);
    return 0;
}

static int gemm_bounds() {
    float *a = counting(6), *b = counting(12), *c = counting(8);
    const float one = 1, zero = 0;
    cublasHandle_t h;
    CHECK(cublasCreate(&h));
    /* 2x3 times 3x4; with a leading dimension of 3, A would have eight numbers */
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 4, 3, &one, a, wrong ? 3 : 2, b, 3, &zero, c, 2));
    EXPECT(fetch(c, 8) == std::vector<float>({ 10, 13, 28, 40, 46, 67, 64, 94 }));
    CHECK(cublasDestroy(h));
    return 0;
}

/* ---- what has no bug: the functions themselves ---- */

__global__ void warp_functions(int *out) {
    const int t = (int)threadIdx.x;
    int ok = 1;
    ok &= __shfl_sync(0xffffffffu, t, 3, 8) == t / 8 * 8 + 3;
    ok &= __shfl_sync(0xffffffffu, t, 35) == t / 32 * 32 + 3;
    ok &= __shfl_up_sync(0xffffffffu, t, 2, 16) == (t % 16 < 2 ? t : t - 2);
    ok &= __shfl_down_sync(0xffffffffu, (double)t, 2, 16) == (t % 16 >= 14 ? t : t + 2);
    ok &= __shfl_xor_sync(0xffffffffu, (long long)t, 5) == (t ^ 5);
    ok &= __ballot_sync(0xffffffffu, t % 2) == 0xaaaaaaaau;
    ok &= __all_sync(0xffffffffu, t >= 0) && !__all_sync(0xffffffffu, t % 32 != 7);
    ok &= __any_sync(0xffffffffu, t % 32 == 7) && !__any_sync(0xffffffffu, t < 0);
    ok &= __syncthreads_count(t < 5) == 5;
    ok &= __syncthreads_or(t == 40) && !__syncthreads_and(t == 40) && __syncthreads_and(1);
    if (t % 32 < 4) ok &= __shfl_xor_sync(0xfu, t, 1) == (t ^ 1); /* a part of the warp */
    out[t] = ok;
}

__global__ void atomic_functions(int *i, unsigned *u, unsigned long long *l, float *f, double *d, int *lock,
                                 int *held) {
    const int t = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(i, 1);
    atomicAdd(u, 2u);
    atomicAdd(l, 3ull);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    atomicMax(i + 1, t);
    atomicMin(i + 2, -t);
    while (atomicCAS(lock, 0, 1)) continue;
    __threadfence();
    *held += 1;
    __threadfence();
    atomicExch(lock, 0);
}

static int functions() {
    int *ints, out[64];
    unsigned *u;
    unsigned long long *l;
    float *f, float_sum;
    double *d, double_sum;
    CHECK(cudaMalloc(&ints, 64 * sizeof(int)));
    PD_CUDA_LAUNCH(warp_functions, 1, 64, 0, nullptr, ints);
    CHECK(cudaMemcpy(out, ints, sizeof out, cudaMemcpyDeviceToHost));
    for (int ok : out) EXPECT(ok == 1);
    CHECK(cudaMalloc(&u, sizeof *u));
    CHECK(cudaMalloc(&l, sizeof *l));
    CHECK(cudaMalloc(&f, sizeof *f));
    CHECK(cudaMalloc(&d, sizeof *d));
    CHECK(cudaMemset(ints, 0, 64 * sizeof(int)));
    CHECK(cudaMemset(u, 0, sizeof *u));
    CHECK(cudaMemset(l, 0, sizeof *l));
    CHECK(cudaMemset(f, 0, sizeof *f));
    CHECK(cudaMemset(d, 0, sizeof *d));
    PD_CUDA_LAUNCH(atomic_functions, 4, 64, 0, nullptr, ints, u, l, f, d, ints + 3, ints + 4);
    unsigned unsigned_sum;
    unsigned long long long_sum;
    CHECK(cudaMemcpy(out, ints, sizeof out, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&unsigned_sum, u, sizeof *u, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&long_sum, l, sizeof *l, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&float_sum, f, sizeof *f, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&double_sum, d, sizeof *d, cudaMemcpyDeviceToHost));
    EXPECT(out[0] == 256 && out[1] == 255 && out[2] == -255 && out[3] == 0 && out[4] == 256);
    EXPECT(unsigned_sum == 512 && long_sum == 768 && float_sum == 128 && double_sum == 64);
    return 0;
}

static int gemms() {
    const int m = 3, n = 4, k = 5, ld = 7, batch = 2, size = 64;
    cublasHandle_t h;
    CHECK(cublasCreate(&h));
    std::vector<float> values((size_t)(batch * size));
    for (size_t i = 0; i < values.size(); i++) values[i] = (float)((i * 7 + i / 5) % 11) - 5;
    float *a, *b, *c;
    const size_t bytes = values.size() * sizeof(float);
    CHECK(cudaMalloc(&a, bytes));
    CHECK(cudaMalloc(&b, bytes));
    CHECK(cudaMalloc(&c, bytes));
    CHECK(cudaMemcpy(a, values.data(), bytes, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(b, values.data(), bytes, cudaMemcpyHostToDevice));
    for (int kind = 0; kind < 8; kind++) {
        const bool ta = kind & 1, tb = kind & 2, add = kind & 4;
        const float alpha = 2, beta = add ? 3 : 0;
        if (add) CHECK(cudaMemcpy(c, values.data(), bytes, cudaMemcpyHostToDevice));
        else CHECK(cudaMemset(c, 0xFF, bytes)); /* NaN, which must not be read */
        CHECK(cublasSgemmStridedBatched(h, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k,
                                        &alpha, a, ld, size, b, ld, size, &beta, c, ld, size, batch));
        const std::vector<float> got = fetch(c, batch * size);
        for (int z = 0; z < batch; z++)
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) {
                    double sum = 0;
                    const float *x = values.data() + z * size;
                    for (int p = 0; p < k; p++)
                        sum += x[ta ? i * ld + p : p * ld + i] * x[tb ? p * ld + j : j * ld + p];
                    EXPECT(got[(size_t)(z * size + j * ld + i)] == 2 * sum + (add ? 3 * x[j * ld + i] : 0));
                }
    }
    /* TF32 keeps 10 bits: 1 + 2^-11 is 1, 1 + 3 * 2^-11 is 1 + 2^-9 */
    const float one = 1, zero = 0, x[2] = { 1 + 1 / 2048.0f, 1 + 3 / 2048.0f };
    CHECK(cudaMemcpy(a, x, sizeof x, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(b, &one, sizeof one, cudaMemcpyHostToDevice));
    CHECK(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 1, 1, &one, a, 2, b, 1, &zero, c, 2));
    EXPECT(fetch(c, 2)[0] == x[0] && fetch(c, 2)[1] == x[1]);
    CHECK(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 1, 1, &one, a, CUDA_R_32F, 2, b, CUDA_R_32F, 1, &zero, c,
                       CUDA_R_32F, 2, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
    EXPECT(fetch(c, 2)[0] == 1 && fetch(c, 2)[1] == 1 + 1 / 512.0f);
    const __half halves[2] = { __float2half(1.5f), __float2half(-2.0f) };
    CHECK(cudaMemcpy(a, halves, sizeof halves, cudaMemcpyHostToDevice));
    CHECK(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_T, 2, 2, 1, &one, a, CUDA_R_16F, 2, a, CUDA_R_16F, 2, &zero, c,
                       CUDA_R_32F, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    EXPECT(fetch(c, 4) == std::vector<float>({ 2.25f, -3, -3, 4 }));
    EXPECT(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 1, 1, &one, a, 1, b, 1, &zero, c, 2) ==
           CUBLAS_STATUS_INVALID_VALUE);
    cuda_on_cpu_fail(CUDA_ON_CPU_CUBLAS, 1, 0);
    EXPECT(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, a, 1, b, 1, &zero, c, 1) != CUBLAS_STATUS_SUCCESS);
    CHECK(cublasDestroy(h));
    return 0;
}

/* A host thread for each device. */
static void *work_on_device(void *p) {
    const int device = *(int *)p;
    int failed = cudaSetDevice(device);
    float *in = counting(128), *out = counting(256);
    cudaStream_t s;
    failed |= cudaStreamCreate(&s);
    for (int i = 0; i < 10; i++) {
        PD_CUDA_LAUNCH(reverse_in_shared, 2, 128, 0, s, in, out, false);
        PD_CUDA_LAUNCH(copy, 1, 128, 0, s, out, in, 128);
        failed |= cudaStreamSynchronize(s);
    }
    failed |= fetch(in, 128)[5] != 5;
    failed |= cudaStreamDestroy(s) | cudaFree(in) | cudaFree(out) | cudaGetLastError();
    *(int *)p = failed;
    return nullptr;
}

static int peer_threads() {
    int devices[2] = { 0, 1 };
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], nullptr, work_on_device, &devices[i]));
    for (int i = 0; i < 2; i++) CHECK(pthread_join(threads[i], nullptr));
    EXPECT(devices[0] == 0 && devices[1] == 0);
    EXPECT(cuda_on_cpu_leaks() == 0);
    return 0;
}

static void add_one(void *p) { ++*(int *)p; }

static int interface() {
    float *p = counting(64), host[64];
    int count = 0, value = 0, called = 0;
    CHECK(cudaGetDeviceCount(&count));
    EXPECT(count == 1);
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
    EXPECT(value == 4);
    EXPECT(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);

    PD_CUDA_LAUNCH(copy, 0, 32, 0, nullptr, p, p, 1);
    EXPECT(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    PD_CUDA_LAUNCH(copy, 1, 1025, 0, nullptr, p, p, 1);
    EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
    PD_CUDA_LAUNCH(copy, dim3(1, 65536), 1, 0, nullptr, p, p, 1);
    EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
    PD_CUDA_LAUNCH(store_shared, 1, 1, 60000, nullptr, p, 15000);
    EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(store_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000));
    PD_CUDA_LAUNCH(store_shared, 1, 1, 60000, nullptr, p, 15000);
    CHECK(cudaGetLastError());
    EXPECT(fetch(p, 1)[0] == 14999);
    EXPECT(cudaFuncSetAttribute(store_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 + 1) !=
           cudaSuccess);
    cudaGetLastError();

    EXPECT(cudaMemcpy(p, host, sizeof host, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    EXPECT(cudaFree(p + 1) == cudaErrorInvalidValue);
    float *big = nullptr;
    EXPECT(cudaMalloc(&big, (size_t)1 << 40) == cudaErrorMemoryAllocation);
    for (int i = 0; i < 12; i++) { /* freed memory comes back in the end */
        CHECK(cudaMalloc(&big, (size_t)20 << 20));
        CHECK(cudaFree(big));
    }

    cudaStream_t s;
    cudaEvent_t begin, end;
    float milliseconds = -1;
    CHECK(cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, -1));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventQuery(begin)); /* never recorded: done */
    CHECK(cudaEventRecord(begin, s));
    CHECK(cudaLaunchHostFunc(s, add_one, &called));
    CHECK(cudaMemsetAsync(p, 0, 64 * sizeof(float), s));
    CHECK(cudaEventRecord(end, s));
    while (cudaEventQuery(end) == cudaErrorNotReady) continue;
    EXPECT(called == 1);
    CHECK(cudaStreamQuery(s));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    EXPECT(milliseconds >= 0);
    CHECK(cudaMemcpyAsync(host, p, sizeof host, cudaMemcpyDeviceToHost, s)); /* pageable: waits */
    EXPECT(host[63] == 0);
    host[63] = 7;
    CHECK(cudaMemcpyAsync(p, host, sizeof host, cudaMemcpyHostToDevice, s)); /* pageable: taken now */
    host[63] = 8;
    CHECK(cudaStreamSynchronize(s));
    EXPECT(fetch(p, 64)[63] == 7);
    EXPECT(cuda_on_cpu_leaks() == 1 + 1 + 2);
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(s));

    cuda_on_cpu_fail(CUDA_ON_CPU_COPY, 2, 0);
    CHECK(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice));
    EXPECT(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice) != cudaSuccess);
    CHECK(cudaMemcpy(p, host, sizeof host, cudaMemcpyHostToDevice));
    cuda_on_cpu_fail(CUDA_ON_CPU_SYNC, 1, 0);
    EXPECT(cudaDeviceSynchronize() != cudaSuccess);
    cudaGetLastError();
    cuda_on_cpu_fail(CUDA_ON_CPU_LAUNCH, 1, 1);
    PD_CUDA_LAUNCH(copy, 1, 32, 0, nullptr, p, p, 1);
    EXPECT(cudaDeviceSynchronize() == cudaErrorIllegalAddress && cudaFree(p) == cudaErrorIllegalAddress);
    EXPECT(cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaErrorIllegalAddress);
    cuda_on_cpu_reset();
    CHECK(cudaDeviceSynchronize());
    EXPECT(cuda_on_cpu_leaks() == 0);
    return 0;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)();
    } cases[] = {
        { "missing_barrier", missing_barrier },
        { "missing_syncwarp", missing_syncwarp },
        { "uninitialised_shared", uninitialised<32> },
        { "uninitialised_dynamic", uninitialised<64> },
        { "divergent_barrier", divergent_barrier },
        { "two_barriers", two_barriers },
        { "absent_lane", absent_lane },
        { "lane_beyond_block", lane_beyond_block },
        { "out_of_bounds", out_of_bounds },
        { "shared_out_of_bounds", shared_out_of_bounds },
        { "static_out_of_bounds", static_out_of_bounds },
        { "use_after_free", use_after_free },
        { "free_before_use", free_before_use },
        { "uninitialised_memory", uninitialised_memory },
        { "host_touches_device", host_touches_device },
        { "host_pointer", host_pointer },
        { "peer_argument", [] { return peer(0); } },
        { "peer_struct", [] { return peer(1); } },
        { "peer_copy", [] { return peer(2); } },
        { "blocks_race", blocks_race },
        { "missing_event", missing_event },
        { "missing_event_before_gemm", missing_event_before_gemm },
        { "pinned_reuse", pinned_reuse },
        { "missing_synchronize", missing_synchronize },
        { "failing_malloc", failing_malloc },
        { "gemm_bounds", gemm_bounds },
        { "functions", functions },
        { "gemms", gemms },
        { "interface", interface },
        { "peer_threads", peer_threads },
    };
    if (argc != 3) return 2;
    wrong = !strcmp(argv[2], "wrong");
    for (const auto &it : cases)
        if (!strcmp(it.name, argv[1])) return it.run();
    printf("no case %s\n", argv[1]);
    return 2;
}
