/* paddle_cuda.cu - v0.1.0 - paddle.h on an NVIDIA GPU: a pd_device by CUDA and cuBLAS - MIT-or-Unlicense

   Compiled by nvcc it is the implementation; included from C or C++ (it includes paddle.h), declarations only:

       nvcc -O2 -arch=native -c paddle_cuda.cu
       cc -O2 -fopenmp -c app.c
       nvcc -Xcompiler -fopenmp app.o paddle_cuda.o -o app -lcublas -lm

   With PADDLE_DOUBLE defined for one of the two define it for the other; a mix doesn't link. Needs CUDA 11.4 or later
   and a GPU that it supports.

   A WHOLE PROGRAM

   ```c
   #define PADDLE_IMPLEMENTATION
   #include "paddle.h"
   #include "paddle_cuda.cu"

   int main(void) {
       char why[256];
       pd_device *gpu = pd_cuda_new(0, NULL, why, sizeof why);
       if (!gpu) fprintf(stderr, "%s; going on with the CPU\n", why);
       pd_net *net = pd_net_new(&(pd_net_opts){ .device = gpu });
       .. as without a GPU ..
       pd_net_free(net);
       pd_cuda_free(gpu);
   }
   ```

   WHAT RUNS ON THE GPU

   All operations of pd_device. Layers that are written in them run there; layers that touch numbers themselves run on
   the host, and their numbers are carried there and back.

   Results differ from the CPU's in rounding, by some 1e-6 of the number in float. The same program on the same GPU with
   the same versions of CUDA and cuBLAS gives the same bits every time: every sum has a fixed order, there are no atomic
   additions. The matrix product is cuBLAS's, in full float precision unless tf32 is set. Convolutions lay patches out
   as columns, as many images at a time as work_space holds, and multiply.

   THREADS, STREAMS, MEMORY

   A device object has one stream and is used by one thread at a time; others, on the same GPU or another, may be used
   by other threads at the same time. Every call makes the object's GPU the calling thread's current device.

   What comes from the host (samples, ids, offsets) passes through 4 MiB of pinned memory and is taken when the call
   returns. The GPU runs behind the host, which waits for it to download, to add up squares, when the pinned memory is
   full, and to wait. After batches of the largest size have been seen nothing is allocated.

   FAILURES

   The first failure is kept, later operations do nothing, and `wait` (so pd_forward and the like) says what
   failed, where, and what CUDA calls it. A kernel's failure shows in a later call; with the option `synchronous` in its
   own. After some failures (an illegal address) CUDA refuses to go on in this process.

   CONTENTS: search for ">>name": declarations, core, memory, basics, optimizers, activations, convolution, pooling,
   costs (and dropout), normalisation, sparse rows (recurrent units, attention), table.

   Licence: at the end of this file. */
/* ======================================================================================================== */
/* >>declarations                                                                                           */

#ifndef PADDLE_CUDA_H
#define PADDLE_CUDA_H

#include "paddle.h"

#ifdef PADDLE_DOUBLE
#define pd_cuda_new pd_cuda_new_of_double
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pd_cuda_opts {
    bool tf32;         /* products of matrices of floats may round their factors to 10 bits: faster from Ampere on */
    bool synchronous;  /* wait after every kernel, so that the message names the one that failed; slow */
    size_t work_space; /* bytes that a convolution's columns may take (one image's they always may); default 64 MiB */
} pd_cuda_opts;

/* A device on GPU `device` (0 is the first that CUDA_VISIBLE_DEVICES leaves), or NULL: then `message` says why, also
   where there is no GPU or no driver. opts may be NULL. Free it after the nets that use it. */
pd_device *pd_cuda_new(int device, const pd_cuda_opts *opts, char *message, size_t size);
void pd_cuda_free(pd_device *device);

/* Number of GPUs that CUDA can use; 0 also when it can't tell. */
int pd_cuda_count(void);

#ifdef __cplusplus
}
#endif

#endif /* PADDLE_CUDA_H */

/* The implementation: by nvcc, unless PADDLE_CUDA_DECLARATIONS is defined for files that only call it; or by a C++
   compiler that was given another PD_CUDA_LAUNCH, as the tests do to run it without a GPU. */
#if (defined(__CUDACC__) || defined(PD_CUDA_LAUNCH)) && !defined(PADDLE_CUDA_DECLARATIONS)

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The one way in which kernels are launched; a template's name goes in parentheses. */
#ifndef PD_CUDA_LAUNCH
#define PD_CUDA_LAUNCH(kernel, grid, block, shared, stream, ...)                                                       \
    kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif

#ifdef PADDLE_DOUBLE
#define PD__CUDA_REAL_MIN DBL_MIN
#define PD__CUDA_GEMM cublasDgemm
#else
#define PD__CUDA_REAL_MIN FLT_MIN
#define PD__CUDA_GEMM cublasSgemm
#endif

/* ======================================================================================================== */
/* >>core: the device's own data, failures, launches                                                        */

enum {
    PD__CUDA_BLOCK = 256, /* threads of most blocks; a power of two, as are all others */
    PD__CUDA_ALIGN = 256,
    PD__CUDA_PARTS = 4, /* of the pinned memory */
    PD__CUDA_PART = 1 << 20
};

/* Memory of the device that an operation works in. Operations run in order, so one after the other can have it. */
enum { PD__CUDA_ARGUMENTS, PD__CUDA_COLUMNS, PD__CUDA_SUMS, PD__CUDA_SPACES };

typedef struct pd__cuda_space {
    void *memory;
    size_t bytes;
} pd__cuda_space;

typedef struct pd__cuda {
    pd_device table;
    char name[64];
    int device, processors;
    bool synchronous;
    size_t work_space;
    cudaStream_t stream;
    cublasHandle_t blas;
    void *blas_space;
    pd_failure failure; /* the first since the last `wait` */
    pd__cuda_space spaces[PD__CUDA_SPACES];
    /* Pinned memory on the way to the device, its parts used in turn: each is free again when its event has come. */
    char *pinned;
    double *answer; /* pinned too */
    cudaEvent_t taken[PD__CUDA_PARTS];
    int part;
    size_t part_used;
} pd__cuda;

static void pd__cuda_fail(pd__cuda *c, pd_status status, int line, const char *format, ...) {
    va_list args;
    int n;
    if (c->failure.status != PD_OK) return;
    c->failure.status = status;
    n = snprintf(c->failure.text, sizeof c->failure.text, "paddle_cuda.cu:%d: ", line);
    va_start(args, format);
    vsnprintf(c->failure.text + n, sizeof c->failure.text - (size_t)n, format, args);
    va_end(args);
}

/* The name of a kernel, which may be in parentheses, or of a call. */
static const char *pd__cuda_name(const char *what, int *length) {
    what += *what == '(';
    *length = (int)strcspn(what, "(<)");
    return what;
}

/* Keeps CUDA's error, if it is one, of the kernel or call `what`. Is all well? */
static bool pd__cuda_check(pd__cuda *c, cudaError_t error, const char *what, int line) {
    int length;
    if (error == cudaSuccess) return c->failure.status == PD_OK;
    what = pd__cuda_name(what, &length);
    pd__cuda_fail(c, error == cudaErrorMemoryAllocation ? PD_E_MEMORY : PD_E_DEVICE, line, "%.*s: %s (%s)", length,
                  what, cudaGetErrorString(error), cudaGetErrorName(error));
    cudaGetLastError(); /* it is told once */
    return false;
}

static bool pd__cuda_check_blas(pd__cuda *c, cublasStatus_t status, const char *what, int line) {
    int length;
    if (status == CUBLAS_STATUS_SUCCESS) return c->failure.status == PD_OK;
    what = pd__cuda_name(what, &length);
    pd__cuda_fail(c, status == CUBLAS_STATUS_ALLOC_FAILED ? PD_E_MEMORY : PD_E_DEVICE, line, "%.*s: %s", length, what,
                  cublasGetStatusName(status));
    cudaGetLastError();
    return false;
}

/* These do nothing after a failure. */
#define PD__CUDA_TRY(c, call) pd__cuda_check(c, (c)->failure.status == PD_OK ? (call) : cudaSuccess, #call, __LINE__)
#define PD__CUDA_TRY_BLAS(c, call) PD__CUDA_TRY_EXPANDED(c, call)
#define PD__CUDA_TRY_EXPANDED(c, call)                                                                                 \
    pd__cuda_check_blas(c, (c)->failure.status == PD_OK ? (call) : CUBLAS_STATUS_SUCCESS, #call, __LINE__)
#define PD__CUDA_RUN(c, kernel, grid, block, ...)                                                                      \
    do {                                                                                                               \
        if ((c)->failure.status != PD_OK) break;                                                                       \
        PD_CUDA_LAUNCH(kernel, grid, block, 0, (c)->stream, __VA_ARGS__);                                              \
        pd__cuda_check(c, cudaGetLastError(), #kernel, __LINE__);                                                      \
        if ((c)->synchronous && (c)->failure.status == PD_OK)                                                          \
            pd__cuda_check(c, cudaStreamSynchronize((c)->stream), #kernel, __LINE__);                                  \
    } while (0)

/* Every operation begins with this. NULL after a failure. */
static pd__cuda *pd__cuda_of(pd_device *d) {
    pd__cuda *c = (pd__cuda *)d->self;
    return PD__CUDA_TRY(c, cudaSetDevice(c->device)) ? c : NULL;
}

static inline __host__ __device__ int64_t pd__cuda_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline __host__ __device__ int64_t pd__cuda_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pd__cuda_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Blocks for n > 0 pieces of work that blocks take in strides: as many as the GPU runs at once, and some. */
static unsigned pd__cuda_blocks(const pd__cuda *c, int64_t n) {
    return (unsigned)pd__cuda_min(n, (int64_t)c->processors * 16);
}
/* The same for work of single threads. */
static unsigned pd__cuda_grid(const pd__cuda *c, int64_t n) {
    return pd__cuda_blocks(c, pd__cuda_ceil_div(n, PD__CUDA_BLOCK));
}

/* In a kernel: for this thread's part of i = 0 .. n - 1, and for this block's. */
#define PD__CUDA_EACH(i, n)                                                                                            \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (int64_t)gridDim.x * blockDim.x)
#define PD__CUDA_EACH_BLOCK(i, n) for (int64_t i = blockIdx.x; i < (n); i += gridDim.x)
/* For this thread's part of its block's work. */
#define PD__CUDA_EACH_IN_BLOCK(i, n) for (int64_t i = threadIdx.x; i < (n); i += blockDim.x)

/* The sum of v over the block, in all its threads; always in the same order. */
static __device__ double pd__cuda_block_sum(double v) {
    __shared__ double sums[PD__CUDA_BLOCK];
    sums[threadIdx.x] = v;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    v = sums[0];
    __syncthreads();
    return v;
}

/* The largest of the row that the block works on, in all its threads. */
static __device__ pd_real pd__cuda_largest(const pd_real *x, int64_t width) {
    __shared__ pd_real tops[PD__CUDA_BLOCK];
    pd_real top = x[0];
    PD__CUDA_EACH_IN_BLOCK(i, width) top = x[i] > top ? x[i] : top;
    tops[threadIdx.x] = top;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && tops[threadIdx.x + half] > tops[threadIdx.x])
            tops[threadIdx.x] = tops[threadIdx.x + half];
        __syncthreads();
    }
    top = tops[0];
    __syncthreads();
    return top;
}

/* Threads of a block that works on a row. */
static unsigned pd__cuda_row_block(int64_t width) {
    unsigned threads = 32;
    while (threads < PD__CUDA_BLOCK && threads < width) threads *= 2;
    return threads;
}

/* ======================================================================================================== */
/* >>memory                                                                                                 */

static void *pd__cuda_alloc(pd_device *d, size_t size) {
    pd__cuda *c = pd__cuda_of(d);
    void *memory = NULL;
    if (!c || cudaMalloc(&memory, size ? size : 1) == cudaSuccess) return memory;
    cudaGetLastError(); /* the caller knows */
    return NULL;
}

/* Goes on after a failure, its own too. */
static void pd__cuda_free_memory(pd_device *d, void *memory) {
    pd__cuda *c = (pd__cuda *)d->self;
    if (!memory) return;
    pd__cuda_check(c, cudaSetDevice(c->device), "cudaSetDevice", __LINE__);
    pd__cuda_check(c, cudaStreamSynchronize(c->stream), "cudaStreamSynchronize", __LINE__);
    pd__cuda_check(c, cudaFree(memory), "cudaFree", __LINE__);
}

/* At least so many bytes to work in, or NULL after a failure. Grows in steps, so that it soon doesn't. */
static void *pd__cuda_space_of(pd__cuda *c, int which, int64_t bytes) {
    pd__cuda_space *s = &c->spaces[which];
    size_t wanted = (size_t)bytes;
    if (c->failure.status != PD_OK) return NULL;
    if (wanted <= s->bytes) return s->memory;
    if (!PD__CUDA_TRY(c, cudaStreamSynchronize(c->stream)) || !PD__CUDA_TRY(c, cudaFree(s->memory))) return NULL;
    s->memory = NULL;
    s->bytes = 0;
    if (which != PD__CUDA_COLUMNS) wanted += wanted / 2;
    if (!PD__CUDA_TRY(c, cudaMalloc(&s->memory, wanted))) return NULL;
    s->bytes = wanted;
    return s->memory;
}

/* Pinned memory for up to `wanted` bytes that are on their way. */
static char *pd__cuda_pinned(pd__cuda *c, size_t wanted, size_t *got) {
    char *at;
    if (c->part_used == PD__CUDA_PART) {
        if (!PD__CUDA_TRY(c, cudaEventRecord(c->taken[c->part], c->stream))) return NULL;
        c->part = (c->part + 1) % PD__CUDA_PARTS;
        c->part_used = 0;
        if (!PD__CUDA_TRY(c, cudaEventSynchronize(c->taken[c->part]))) return NULL;
    }
    *got = (size_t)pd__cuda_min((int64_t)wanted, (int64_t)(PD__CUDA_PART - c->part_used));
    at = c->pinned + (size_t)c->part * PD__CUDA_PART + c->part_used;
    c->part_used += *got;
    return at;
}

static void pd__cuda_send(pd__cuda *c, void *to, const void *from_host, size_t size) {
    for (size_t done = 0, n; done < size; done += n) {
        char *pinned = pd__cuda_pinned(c, size - done, &n);
        if (!pinned) return;
        memcpy(pinned, (const char *)from_host + done, n);
        if (!PD__CUDA_TRY(c, cudaMemcpyAsync((char *)to + done, pinned, n, cudaMemcpyHostToDevice, c->stream))) return;
    }
}

static void pd__cuda_upload(pd_device *d, void *to, const void *from_host, size_t size) {
    pd__cuda *c = pd__cuda_of(d);
    if (c) pd__cuda_send(c, to, from_host, size);
}

/* After a failure there is nothing to give but zeros. */
static void pd__cuda_download(pd_device *d, void *to_host, const void *from, size_t size) {
    pd__cuda *c = pd__cuda_of(d);
    if (size == 0) return;
    if (!c || !PD__CUDA_TRY(c, cudaMemcpyAsync(to_host, from, size, cudaMemcpyDeviceToHost, c->stream)) ||
        !PD__CUDA_TRY(c, cudaStreamSynchronize(c->stream)))
        memset(to_host, 0, size);
}

static pd_status pd__cuda_wait(pd_device *d, char *message, size_t size) {
    pd__cuda *c = (pd__cuda *)d->self;
    pd_status status;
    if (pd__cuda_of(d)) PD__CUDA_TRY(c, cudaStreamSynchronize(c->stream));
    status = c->failure.status;
    if (status != PD_OK) snprintf(message, size, "%s", c->failure.text);
    c->failure.status = PD_OK;
    return status;
}

/* ---- arrays of the host that a kernel reads ----
   First the space for all of them, NULL after a failure, then each: `at` is where the next one goes. What is NULL stays
   NULL. */

static int64_t pd__cuda_rounded(int64_t bytes) { return pd__cuda_ceil_div(bytes, PD__CUDA_ALIGN) * PD__CUDA_ALIGN; }

static char *pd__cuda_arguments(pd__cuda *c, int count, int64_t bytes) {
    return (char *)pd__cuda_space_of(c, PD__CUDA_ARGUMENTS, bytes + (int64_t)count * PD__CUDA_ALIGN);
}

template <class T> static const T *pd__cuda_argument(pd__cuda *c, char **at, const T *array, int64_t count) {
    const int64_t bytes = count * (int64_t)sizeof *array;
    char *to = *at;
    if (!array || !to) return NULL;
    pd__cuda_send(c, to, array, (size_t)bytes);
    *at += pd__cuda_rounded(bytes);
    return (const T *)to;
}

/* ======================================================================================================== */
/* >>basics                                                                                                 */

static __global__ void pd__cuda_fill_kernel(int64_t n, pd_real value, pd_real *y) { PD__CUDA_EACH(i, n) y[i] = value; }

static void pd__cuda_fill(pd_device *d, int64_t n, pd_real value, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || n == 0) return;
    PD__CUDA_RUN(c, pd__cuda_fill_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, n, value, y);
}

/* ---- contract ----
   The axes that move in y are taken apart from those that are summed. In both, neighbours become one axis where that
   makes no difference. */

typedef struct pd__cuda_axes {
    int used;
    int64_t size[4], a[4], b[4], y[4]; /* past `used`: 1 and three times 0 */
    int64_t count;                     /* the product of the sizes */
} pd__cuda_axes;

static pd__cuda_axes pd__cuda_no_axes(void) {
    pd__cuda_axes x;
    memset(&x, 0, sizeof x);
    for (int i = 0; i < 4; i++) x.size[i] = 1;
    x.count = 1;
    return x;
}

static void pd__cuda_add_axis(pd__cuda_axes *x, int64_t size, int64_t a, int64_t b, int64_t y) {
    int last = x->used - 1;
    if (size == 1) return;
    x->count *= size;
    if (last < 0 || x->a[last] != a * size || x->b[last] != b * size || x->y[last] != y * size) last = x->used++;
    x->size[last] *= size;
    x->a[last] = a;
    x->b[last] = b;
    x->y[last] = y;
}

/* Where index i of the axes is. AXES: at least as many as are used. */
typedef struct pd__cuda_place {
    int64_t a, b, y;
} pd__cuda_place;

template <int AXES> static __device__ pd__cuda_place pd__cuda_place_of(const pd__cuda_axes &x, int64_t i) {
    pd__cuda_place p = { 0, 0, 0 };
    for (int k = AXES - 1; k >= 0; k--) {
        int64_t rest = k > 0 ? i / x.size[k] : 0, at = i - rest * x.size[k];
        p.a += at * x.a[k];
        p.b += at * x.b[k];
        p.y += at * x.y[k];
        i = rest;
    }
    return p;
}

template <int AXES>
static __global__ void pd__cuda_contract_kernel(pd__cuda_axes x, pd_real alpha, const pd_real *a, const pd_real *b,
                                                pd_real *y) {
    PD__CUDA_EACH(i, x.count) {
        pd__cuda_place p = pd__cuda_place_of<AXES>(x, i);
        y[p.y] += alpha * a[p.a] * (b ? b[p.b] : 1);
    }
}

/* How sums are shared out: a block has `lanes` threads for each of its outputs; blockIdx.y is the part of the sum. */
typedef struct pd__cuda_split {
    unsigned lanes, outputs; /* their product is the block */
    bool across;             /* neighbouring threads have neighbouring outputs, else neighbouring terms */
    int64_t parts, per_part;
} pd__cuda_split;

/* Sums run in double. With more than one part they go to `sums`, part by part. */
template <int AXES>
static __global__ void pd__cuda_contract_sum(pd__cuda_axes out, pd__cuda_axes in, pd__cuda_split s, pd_real alpha,
                                             const pd_real *a, const pd_real *b, pd_real *y, double *sums) {
    __shared__ double shared[PD__CUDA_BLOCK];
    const unsigned t = threadIdx.x, step = s.across ? s.outputs : 1;
    const unsigned lane = s.across ? t / s.outputs : t % s.lanes, mine = s.across ? t % s.outputs : t / s.lanes;
    const int64_t end = pd__cuda_min(in.count, (blockIdx.y + 1) * s.per_part);
    for (int64_t first = (int64_t)blockIdx.x * s.outputs; first < out.count; first += (int64_t)gridDim.x * s.outputs) {
        const bool used = first + mine < out.count;
        const pd__cuda_place p = pd__cuda_place_of<4>(out, used ? first + mine : 0);
        double sum = 0;
        for (int64_t i = blockIdx.y * s.per_part + lane; used && i < end; i += s.lanes) {
            const pd__cuda_place q = pd__cuda_place_of<AXES>(in, i);
            sum += (double)a[p.a + q.a] * (b ? (double)b[p.b + q.b] : 1.0);
        }
        shared[t] = sum;
        __syncthreads();
        for (unsigned half = s.lanes / 2; half > 0; half /= 2) {
            if (lane < half) shared[t] += shared[t + half * step];
            __syncthreads();
        }
        if (used && lane == 0) {
            if (s.parts > 1) sums[blockIdx.y * out.count + first + mine] = shared[t];
            else y[p.y] += alpha * (pd_real)shared[t];
        }
        __syncthreads();
    }
}

static __global__ void pd__cuda_contract_parts(pd__cuda_axes out, int64_t parts, pd_real alpha, const double *sums,
                                               pd_real *y) {
    PD__CUDA_EACH(i, out.count) {
        double sum = 0;
        for (int64_t k = 0; k < parts; k++) sum += sums[k * out.count + i];
        y[pd__cuda_place_of<4>(out, i).y] += alpha * (pd_real)sum;
    }
}

static int64_t pd__cuda_last_step(const pd__cuda_axes *x) { return x->used ? llabs(x->a[x->used - 1]) : INT64_MAX; }

/* Enough blocks for the GPU, but no thread with few terms. */
static pd__cuda_split pd__cuda_split_of(const pd__cuda *c, const pd__cuda_axes *out, const pd__cuda_axes *in) {
    pd__cuda_split s;
    int64_t blocks, parts;
    s.across = pd__cuda_last_step(out) < pd__cuda_last_step(in);
    s.lanes = s.across ? 8 : in->count <= 1024 ? 32 : PD__CUDA_BLOCK;
    s.outputs = PD__CUDA_BLOCK / s.lanes;
    blocks = pd__cuda_ceil_div(out->count, s.outputs);
    parts = pd__cuda_min(pd__cuda_ceil_div(4 * c->processors, blocks), in->count / (16 * s.lanes));
    s.per_part = pd__cuda_ceil_div(in->count, pd__cuda_max(parts, 1));
    s.parts = pd__cuda_ceil_div(in->count, s.per_part);
    return s;
}

static void pd__cuda_contract_sums(pd__cuda *c, const pd__cuda_axes *out, const pd__cuda_axes *in, pd_real alpha,
                                   const pd_real *a, const pd_real *b, pd_real *y) {
    const pd__cuda_split s = pd__cuda_split_of(c, out, in);
    const dim3 grid(pd__cuda_blocks(c, pd__cuda_ceil_div(out->count, s.outputs)), (unsigned)s.parts);
    double *sums = NULL;
    if (s.parts > 1) {
        sums = (double *)pd__cuda_space_of(c, PD__CUDA_SUMS, s.parts * out->count * (int64_t)sizeof *sums);
        if (!sums) return;
    }
    if (in->used <= 1)
        PD__CUDA_RUN(c, (pd__cuda_contract_sum<1>), grid, PD__CUDA_BLOCK, *out, *in, s, alpha, a, b, y, sums);
    else PD__CUDA_RUN(c, (pd__cuda_contract_sum<4>), grid, PD__CUDA_BLOCK, *out, *in, s, alpha, a, b, y, sums);
    if (s.parts > 1)
        PD__CUDA_RUN(c, pd__cuda_contract_parts, pd__cuda_grid(c, out->count), PD__CUDA_BLOCK, *out, s.parts, alpha,
                     sums, y);
}

static void pd__cuda_contract(pd_device *d, const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                              const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]) {
    pd__cuda *c = pd__cuda_of(d);
    pd__cuda_axes out = pd__cuda_no_axes(), in = out;
    unsigned grid;
    for (int i = 0; i < 4; i++) pd__cuda_add_axis(ys[i] ? &out : &in, size[i], as[i], b ? bs[i] : 0, ys[i]);
    if (!c || out.count == 0 || in.count == 0) return;
    grid = pd__cuda_grid(c, out.count);
    if (in.count > 1) pd__cuda_contract_sums(c, &out, &in, alpha, a, b, y);
    else if (out.used <= 1) PD__CUDA_RUN(c, (pd__cuda_contract_kernel<1>), grid, PD__CUDA_BLOCK, out, alpha, a, b, y);
    else if (out.used == 2) PD__CUDA_RUN(c, (pd__cuda_contract_kernel<2>), grid, PD__CUDA_BLOCK, out, alpha, a, b, y);
    else PD__CUDA_RUN(c, (pd__cuda_contract_kernel<4>), grid, PD__CUDA_BLOCK, out, alpha, a, b, y);
}

/* ---- matrix product ----
   cuBLAS goes by columns: what it sees of a row-major matrix is the transpose, so it computes C^T = op(B)^T op(A)^T. */

static void pd__cuda_multiply(pd__cuda *c, bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha,
                              const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *to,
                              int64_t ldc) {
    if (m == 0 || n == 0) return;
    /* cuBLAS looks at steps that it never makes, too. */
    lda = pd__cuda_max(1, (ta ? k : m) > 1 ? lda : ta ? m : k);
    ldb = pd__cuda_max(1, (tb ? n : k) > 1 ? ldb : tb ? k : n);
    ldc = m > 1 ? ldc : n;
    if (pd__cuda_max(pd__cuda_max(m, n), pd__cuda_max(k, pd__cuda_max(lda, pd__cuda_max(ldb, ldc)))) > INT_MAX) {
        pd__cuda_fail(c, PD_E_UNSUPPORTED, __LINE__, "matrix product of %lldx%lldx%lld: expected sides below 2^31",
                      (long long)m, (long long)n, (long long)k);
        return;
    }
    PD__CUDA_TRY_BLAS(c, PD__CUDA_GEMM(c->blas, tb ? CUBLAS_OP_T : CUBLAS_OP_N, ta ? CUBLAS_OP_T : CUBLAS_OP_N, (int)n,
                                       (int)m, (int)k, &alpha, b, (int)ldb, a, (int)lda, &beta, to, (int)ldc));
    if (c->synchronous) PD__CUDA_TRY(c, cudaStreamSynchronize(c->stream));
}

/* With >>activations: the epilogue of rows x width finished sums, ld apart; `area` columns to a channel. */
static void pd__cuda_finish(pd__cuda *c, const pd_epilogue *after, int64_t rows, int64_t width, int64_t ld,
                            int64_t area, pd_real *y);

static void pd__cuda_gemm(pd_device *d, bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha,
                          const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *to,
                          int64_t ldc, const pd_epilogue *after) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c) return;
    pd__cuda_multiply(c, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, to, ldc);
    pd__cuda_finish(c, after, m, n, ldc, 1, to);
}

/* ---- norm ---- */

/* Of the squares of scale x. */
static __global__ void pd__cuda_squares_kernel(int64_t n, double scale, const pd_real *x, double *sums) {
    double sum = 0;
    PD__CUDA_EACH(i, n) sum += scale * (double)x[i] * (scale * (double)x[i]);
    sum = pd__cuda_block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/* By one block: *sum = of n numbers. */
static __global__ void pd__cuda_sum_kernel(int64_t n, const double *x, double *to) {
    double sum = 0;
    PD__CUDA_EACH_IN_BLOCK(i, n) sum += x[i];
    sum = pd__cuda_block_sum(sum);
    if (threadIdx.x == 0) *to = sum;
}

/* After a failure 0, which stops nobody: `wait` will tell. */
static double pd__cuda_squares(pd__cuda *c, int64_t n, double scale, const pd_real *x) {
    const unsigned blocks = pd__cuda_grid(c, n);
    double *sums = (double *)pd__cuda_space_of(c, PD__CUDA_SUMS, ((int64_t)blocks + 1) * (int64_t)sizeof *sums);
    if (!sums) return 0;
    PD__CUDA_RUN(c, pd__cuda_squares_kernel, blocks, PD__CUDA_BLOCK, n, scale, x, sums + 1);
    PD__CUDA_RUN(c, pd__cuda_sum_kernel, 1, PD__CUDA_BLOCK, blocks, sums + 1, sums);
    PD__CUDA_TRY(c, cudaMemcpyAsync(c->answer, sums, sizeof *sums, cudaMemcpyDeviceToHost, c->stream));
    return PD__CUDA_TRY(c, cudaStreamSynchronize(c->stream)) ? *c->answer : 0;
}

static double pd__cuda_norm(pd_device *d, int64_t n, const pd_real *x) {
    pd__cuda *c = pd__cuda_of(d);
    double sum;
    if (!c || n == 0) return 0;
    sum = pd__cuda_squares(c, n, 1, x);
    if (isfinite(sum)) return sqrt(sum);
    /* Is a number not finite, or is only its square too large? */
    sum = pd__cuda_squares(c, n, ldexp(1, -600), x);
    return isfinite(sum) ? fmin(sqrt(sum) * ldexp(1, 600), DBL_MAX) : sum;
}

/* ======================================================================================================== */
/* >>optimizers                                                                                             */

/* What every number's step has in common, worked out on the host. */
typedef struct pd__cuda_step {
    pd_update u;
    double correct1, correct2, l2, shrink;
} pd__cuda_step;

static pd__cuda_step pd__cuda_step_of(const pd_update *u) {
    pd__cuda_step s;
    s.u = *u;
    s.correct1 = 1 - pow(u->optimizer.beta1, (double)u->step);
    s.correct2 = 1 - pow(u->optimizer.beta2, (double)u->step);
    s.l2 = u->optimizer.kind == PD_OPT_ADAMW ? 0 : u->l2;
    s.shrink = u->rate * u->l1;
    return s;
}

/* The gradient that the method sees: scaled, clipped, with coupled L2. */
static __device__ double pd__cuda_gradient(const pd__cuda_step &s, pd_real w, pd_real g) {
    double v = s.u.scale * (double)g;
    if (s.u.clip > 0) v = v > s.u.clip ? s.u.clip : v < -s.u.clip ? -s.u.clip : v;
    return v + s.l2 * (double)w;
}

/* One number, as the CPU has it. s0, s1, s2: its states, where the method has them. Returns the new value. */
static __device__ double pd__cuda_update_one(const pd__cuda_step &t, double w, double g, pd_real *s0, pd_real *s1,
                                             pd_real *s2) {
    const pd_optimizer &o = t.u.optimizer;
    double r = t.u.rate, m, v, step;
    switch (o.kind) {
    case PD_OPT_SGD: return w - r * g;
    case PD_OPT_MOMENTUM:
        m = o.momentum * (double)*s0 - r * g;
        *s0 = (pd_real)m;
        return o.nesterov ? w + o.momentum * m - r * g : w + m;
    case PD_OPT_ADAGRAD:
        v = (double)*s0 + g * g;
        *s0 = (pd_real)v;
        return w - r * g / (sqrt(v) + o.epsilon);
    case PD_OPT_ADADELTA:
        v = o.rho * (double)*s0 + (1 - o.rho) * g * g;
        step = sqrt(((double)*s1 + o.epsilon) / (v + o.epsilon)) * g;
        *s0 = (pd_real)v;
        *s1 = (pd_real)(o.rho * (double)*s1 + (1 - o.rho) * step * step);
        return w - r * step;
    case PD_OPT_RMSPROP:
        v = o.rho * (double)*s0 + (1 - o.rho) * g * g;
        *s0 = (pd_real)v;
        if (o.centered) {
            m = o.rho * (double)*s2 + (1 - o.rho) * g;
            *s2 = (pd_real)m;
            v = v > m * m ? v - m * m : 0;
        }
        step = r * g / (sqrt(v) + o.epsilon);
        if (o.momentum == 0) return w - step;
        m = o.momentum * (double)*s1 - step;
        *s1 = (pd_real)m;
        return w + m;
    case PD_OPT_DECAYED_ADAGRAD:
        v = o.rho * (double)*s0 + (1 - o.rho) * g * g;
        *s0 = (pd_real)v;
        return w - r * g / sqrt(v + o.epsilon);
    case PD_OPT_ADAM:
    case PD_OPT_ADAMW:
        m = o.beta1 * (double)*s0 + (1 - o.beta1) * g;
        v = o.beta2 * (double)*s1 + (1 - o.beta2) * g * g;
        *s0 = (pd_real)m;
        *s1 = (pd_real)v;
        if (o.kind == PD_OPT_ADAMW) w -= r * t.u.l2 * w;
        return w - r * (m / t.correct1) / (sqrt(v / t.correct2) + o.epsilon);
    case PD_OPT_ADAMAX:
        m = o.beta1 * (double)*s0 + (1 - o.beta1) * g;
        v = o.beta2 * (double)*s1;
        v = v > fabs(g) + o.epsilon ? v : fabs(g) + o.epsilon;
        *s0 = (pd_real)m;
        *s1 = (pd_real)v;
        return w - r / t.correct1 * m / v;
    case PD_OPT_COUNT: break;
    }
    return w;
}

static __global__ void pd__cuda_update_kernel(pd__cuda_step s, int64_t n, pd_real *w, const pd_real *g,
                                              const unsigned char *mask, pd_real *s0, pd_real *s1, pd_real *s2) {
    PD__CUDA_EACH(i, n) {
        double v = pd__cuda_update_one(s, (double)w[i], pd__cuda_gradient(s, w[i], g[i]), s0 ? s0 + i : NULL,
                                       s1 ? s1 + i : NULL, s2 ? s2 + i : NULL);
        if (s.shrink > 0) v = v > s.shrink ? v - s.shrink : v < -s.shrink ? v + s.shrink : 0;
        w[i] = mask && !mask[i] ? 0 : (pd_real)v;
    }
}

static void pd__cuda_update(pd_device *d, const pd_update *u, int64_t n, pd_real *w, const pd_real *g,
                            const unsigned char *mask, pd_real *const *states) {
    pd__cuda *c = pd__cuda_of(d);
    char *at = NULL;
    if (!c || n == 0) return;
    if (mask) at = pd__cuda_arguments(c, 1, n);
    mask = pd__cuda_argument(c, &at, mask, n);
    PD__CUDA_RUN(c, pd__cuda_update_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, pd__cuda_step_of(u), n, w, g, mask,
                 states[0], states[1], states[2]);
}

/* The steps that a number has missed: of carry[4 r] on. One function for rows that step and copies of them, so that these
   are the same to the bit. */
static __device__ void pd__cuda_carry(const double *c, pd_real *value, pd_real *own) {
    const double before = (double)*value, moved = (double)*own;
    *value = (pd_real)(c[0] * before + c[1] * moved);
    *own = (pd_real)(c[2] * before + c[3] * moved);
}

static __global__ void pd__cuda_update_rows_kernel(pd__cuda_step s, int64_t count, int64_t width, const int64_t *rows,
                                                   const int64_t *state_rows, const double *carry, pd_real *w,
                                                   const pd_real *g, pd_real *state) {
    PD__CUDA_EACH(i, count * width) {
        const int64_t r = i / width, k = i - r * width;
        pd_real unused = 0, *value = w + rows[r] * width + k,
                *own = state ? state + state_rows[r] * width + k : &unused;
        if (carry) pd__cuda_carry(carry + 4 * r, value, own);
        if (g)
            *value =
                (pd_real)pd__cuda_update_one(s, (double)*value, pd__cuda_gradient(s, *value, g[i]), own, NULL, NULL);
    }
}

static void pd__cuda_update_rows(pd_device *d, const pd_update *u, int64_t count, int64_t width, const int64_t *rows,
                                 const int64_t *state_rows, const double *carry, pd_real *w, const pd_real *g,
                                 pd_real *state) {
    pd__cuda *c = pd__cuda_of(d);
    char *at;
    if (!c || count * width == 0) return;
    if (!state) state_rows = NULL;
    at = pd__cuda_arguments(c, 3, count * (int64_t)(2 * sizeof *rows + 4 * sizeof *carry));
    rows = pd__cuda_argument(c, &at, rows, count);
    state_rows = pd__cuda_argument(c, &at, state_rows, count);
    carry = pd__cuda_argument(c, &at, carry, 4 * count);
    PD__CUDA_RUN(c, pd__cuda_update_rows_kernel, pd__cuda_grid(c, count * width), PD__CUDA_BLOCK, pd__cuda_step_of(u),
                 count, width, rows, state_rows, carry, w, g, state);
}

static __global__ void pd__cuda_gather_rows_kernel(int64_t count, int64_t width, const int64_t *rows,
                                                   const int64_t *state_rows, const double *carry, const pd_real *w,
                                                   const pd_real *state, pd_real *y) {
    PD__CUDA_EACH(i, count * width) {
        const int64_t r = i / width, k = i - r * width;
        pd_real value = w[rows[r] * width + k], own = carry && state ? state[state_rows[r] * width + k] : 0;
        if (carry) pd__cuda_carry(carry + 4 * r, &value, &own);
        y[i] = value;
    }
}

static void pd__cuda_gather_rows(pd_device *d, int64_t count, int64_t width, const int64_t *rows,
                                 const int64_t *state_rows, const double *carry, const pd_real *w, const pd_real *state,
                                 pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    char *at;
    if (!c || count * width == 0) return;
    if (!state) state_rows = NULL;
    at = pd__cuda_arguments(c, 3, count * (int64_t)(2 * sizeof *rows + 4 * sizeof *carry));
    rows = pd__cuda_argument(c, &at, rows, count);
    state_rows = pd__cuda_argument(c, &at, state_rows, count);
    carry = pd__cuda_argument(c, &at, carry, 4 * count);
    PD__CUDA_RUN(c, pd__cuda_gather_rows_kernel, pd__cuda_grid(c, count * width), PD__CUDA_BLOCK, count, width, rows,
                 state_rows, carry, w, state, y);
}

/* ======================================================================================================== */
/* >>activations                                                                                            */

#define PD__CUDA_STANH_A 1.7159
#define PD__CUDA_STANH_B (2.0 / 3.0)

static __device__ pd_real pd__cuda_sigmoid(pd_real x) {
    pd_real e = exp(x < 0 ? x : -x); /* never overflows */
    return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

static __device__ pd_real pd__cuda_activated(pd_act act, pd_real alpha, pd_real v) {
    switch (act) {
    case PD_RELU: return v < 0 ? 0 : v; /* so written, NaN stays */
    case PD_BRELU: return v < 0 ? 0 : v > alpha ? alpha : v;
    case PD_SOFTRELU: return (v > 0 ? v : 0) + log1p(exp(-fabs(v)));
    case PD_LEAKY_RELU: return v < 0 ? alpha * v : v;
    case PD_GELU: return v > 40 ? v : (v < -40 ? -40 : v) / 2 * erfc(v * (pd_real)-0.70710678118654752);
    case PD_SIGMOID: return pd__cuda_sigmoid(v);
    case PD_TANH: return tanh(v);
    case PD_STANH: return (pd_real)PD__CUDA_STANH_A * tanh((pd_real)PD__CUDA_STANH_B * v);
    case PD_EXP: return exp(v);
    case PD_LOG: return log(v);
    case PD_ABS: return fabs(v);
    case PD_SQUARE: return v * v;
    case PD_SQRT: return sqrt(v);
    case PD_RECIPROCAL: return 1 / v;
    case PD_LINEAR:
    case PD_SOFTMAX:
    case PD_ACT_COUNT: break;
    }
    return v;
}

/* The derivative from the input x, where the activation needs it, and the output y. */
static __device__ pd_real pd__cuda_slope(pd_act act, pd_real alpha, pd_real x, pd_real y) {
    const pd_real ratio = (pd_real)(PD__CUDA_STANH_B / PD__CUDA_STANH_A);
    const pd_real square = (pd_real)(PD__CUDA_STANH_A * PD__CUDA_STANH_A);
    switch (act) {
    case PD_RELU: return (pd_real)(y > 0);
    case PD_BRELU: return (pd_real)(y > 0 && y < alpha);
    case PD_SOFTRELU: return -expm1(-y);
    case PD_LEAKY_RELU: return y < 0 ? alpha : 1;
    case PD_GELU:
        x = x > 40 ? 40 : x < -40 ? -40 : x;
        return erfc(x * (pd_real)-0.70710678118654752) / 2 + x * exp(-x * x / 2) * (pd_real)0.39894228040143268;
    case PD_SIGMOID: return y * (1 - y);
    case PD_TANH: return 1 - y * y;
    case PD_STANH: return ratio * (square - y * y);
    case PD_EXP: return y;
    case PD_LOG: return 1 / x;
    case PD_ABS: return (pd_real)((x > 0) - (x < 0));
    case PD_SQUARE: return 2 * x;
    case PD_SQRT: return y == 0 ? 0 : (pd_real)0.5 / y;
    case PD_RECIPROCAL: return -y * y;
    case PD_LINEAR:
    case PD_SOFTMAX:
    case PD_ACT_COUNT: break;
    }
    return 1;
}

static __global__ void pd__cuda_activate_kernel(pd_act act, pd_real alpha, int64_t n, const pd_real *x, pd_real *y) {
    PD__CUDA_EACH(i, n) y[i] = pd__cuda_activated(act, alpha, x[i]);
}

static __global__ void pd__cuda_activate_backward_kernel(pd_act act, pd_real alpha, int64_t n, const pd_real *x,
                                                         const pd_real *y, pd_real *grad) {
    const bool poles = act == PD_EXP || act == PD_LOG || act == PD_SQUARE || act == PD_RECIPROCAL; /* 0 stays 0 there */
    PD__CUDA_EACH(i, n) {
        if (poles && grad[i] == 0) grad[i] = 0;
        else grad[i] *= pd__cuda_slope(act, alpha, x ? x[i] : 0, y[i]);
    }
}

/* A block per row. x may be y. */
static __global__ void pd__cuda_softmax_kernel(int64_t rows, int64_t width, const pd_real *x, pd_real *y) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        const pd_real *from = x + r * width, top = pd__cuda_largest(from, width);
        pd_real *to = y + r * width;
        double sum = 0;
        PD__CUDA_EACH_IN_BLOCK(i, width) {
            to[i] = exp(from[i] - top);
            sum += (double)to[i];
        }
        sum = pd__cuda_block_sum(sum);
        PD__CUDA_EACH_IN_BLOCK(i, width) to[i] = (pd_real)((double)to[i] / sum);
    }
}

/* grad = y (grad - sum y grad) */
static __global__ void pd__cuda_softmax_backward_kernel(int64_t rows, int64_t width, const pd_real *y, pd_real *grad) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        const pd_real *from = y + r * width;
        pd_real *to = grad + r * width;
        double dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, width) dot += (double)from[i] * (double)to[i];
        dot = pd__cuda_block_sum(dot);
        PD__CUDA_EACH_IN_BLOCK(i, width) to[i] = from[i] * (to[i] - (pd_real)dot);
    }
}

static void pd__cuda_activate(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width, const pd_real *x,
                              pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * width;
    if (!c || n == 0 || act == PD_LINEAR) return;
    if (act == PD_SOFTMAX)
        PD__CUDA_RUN(c, pd__cuda_softmax_kernel, pd__cuda_blocks(c, rows), pd__cuda_row_block(width), rows, width, x,
                     y);
    else PD__CUDA_RUN(c, pd__cuda_activate_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, act, alpha, n, x, y);
}

static __global__ void pd__cuda_finish_kernel(pd_epilogue after, int64_t rows, int64_t width, int64_t ld, int64_t area,
                                              pd_real *y) {
    PD__CUDA_EACH(i, rows * width) {
        const int64_t row = i / width, column = i - row * width, channel = column / area;
        const pd_real scale = after.scale ? after.scale[channel] : 1, bias = after.bias ? after.bias[channel] : 0;
        const pd_real center = after.center ? after.center[channel] : 0;
        pd_real *at = y + row * ld + column;
        *at = pd__cuda_activated(after.act, after.alpha, scale * (*at - center) + bias);
    }
}

static void pd__cuda_finish(pd__cuda *c, const pd_epilogue *after, int64_t rows, int64_t width, int64_t ld,
                            int64_t area, pd_real *y) {
    if (!after || rows == 0 || width == 0) return;
    if (!after->scale && !after->center && !after->bias && after->act == PD_LINEAR) return;
    PD__CUDA_RUN(c, pd__cuda_finish_kernel, pd__cuda_grid(c, rows * width), PD__CUDA_BLOCK, *after, rows, width, ld,
                 area, y);
}

static void pd__cuda_activate_backward(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width,
                                       const pd_real *x, const pd_real *y, pd_real *grad) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * width;
    if (!c || n == 0 || act == PD_LINEAR) return;
    if (act == PD_SOFTMAX)
        PD__CUDA_RUN(c, pd__cuda_softmax_backward_kernel, pd__cuda_blocks(c, rows), pd__cuda_row_block(width), rows,
                     width, y, grad);
    else
        PD__CUDA_RUN(c, pd__cuda_activate_backward_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, act, alpha, n, x, y,
                     grad);
}

/* ======================================================================================================== */
/* >>convolution: the patches of some images become columns, groups * depth x images * area, channels come before
   images in what is multiplied with them, and each group is one product                                    */

typedef struct pd__cuda_patches {
    int64_t depth, filters, area, in_size, out_size; /* per group: depth, filters; per image: the sizes */
    int64_t most;                                    /* images at a time */
    pd_real *columns, *turned;                       /* turned: out_c x images * area */
} pd__cuda_patches;

static bool pd__cuda_patches_begin(pd__cuda *c, const pd_conv_shape *s, pd__cuda_patches *v) {
    int64_t each;
    v->depth = s->in_c / s->groups * s->filter_h * s->filter_w;
    v->filters = s->out_c / s->groups;
    v->area = s->out_h * s->out_w;
    v->in_size = s->in_c * s->in_h * s->in_w;
    v->out_size = s->out_c * v->area;
    if (s->rows == 0) return false;
    each = (s->groups * v->depth * v->area + v->out_size) * (int64_t)sizeof(pd_real);
    v->most = pd__cuda_min((int64_t)c->work_space / each, INT_MAX / v->area);
    v->most = pd__cuda_min(pd__cuda_max(v->most, 1), s->rows);
    v->columns = (pd_real *)pd__cuda_space_of(c, PD__CUDA_COLUMNS, v->most * each);
    v->turned = v->columns + v->most * s->groups * v->depth * v->area;
    return v->columns != NULL;
}

static __global__ void pd__cuda_to_columns(pd_conv_shape s, int64_t images, const pd_real *x, pd_real *columns) {
    const int64_t area = s.out_h * s.out_w, wide = images * area;
    PD__CUDA_EACH(i, s.in_c * wide) {
        const int64_t channel = i / wide, p = i - channel * wide, image = p / area, o = p - image * area;
        const int64_t oh = o / s.out_w, h0 = oh * s.stride_h - s.pad_h, w0 = (o - oh * s.out_w) * s.stride_w - s.pad_w;
        const pd_real *map = x + (image * s.in_c + channel) * s.in_h * s.in_w;
        pd_real *to = columns + channel * s.filter_h * s.filter_w * wide + p;
        for (int64_t kh = 0, h = h0; kh < s.filter_h; kh++, h += s.dilation_h)
            for (int64_t kw = 0, w = w0; kw < s.filter_w; kw++, w += s.dilation_w, to += wide)
                *to = h >= 0 && h < s.in_h && w >= 0 && w < s.in_w ? map[h * s.in_w + w] : 0;
    }
}

/* Each cell of dx gathers what the patches that it is in have for it. */
static __global__ void pd__cuda_from_columns(pd_conv_shape s, int64_t images, const pd_real *columns, pd_real *dx) {
    const int64_t area = s.out_h * s.out_w, wide = images * area, in_area = s.in_h * s.in_w;
    PD__CUDA_EACH(i, images * s.in_c * in_area) {
        const int64_t map = i / in_area, cell = i - map * in_area, image = map / s.in_c, channel = map - image * s.in_c;
        const int64_t row = cell / s.in_w, h = row + s.pad_h, w = cell - row * s.in_w + s.pad_w;
        const pd_real *from = columns + channel * s.filter_h * s.filter_w * wide + image * area;
        pd_real sum = 0;
        for (int64_t kh = 0; kh < s.filter_h; kh++) {
            const int64_t up = h - kh * s.dilation_h, oh = up / s.stride_h;
            if (up < 0 || oh * s.stride_h != up || oh >= s.out_h) continue;
            for (int64_t kw = 0; kw < s.filter_w; kw++) {
                const int64_t left = w - kw * s.dilation_w, ow = left / s.stride_w;
                if (left < 0 || ow * s.stride_w != left || ow >= s.out_w) continue;
                sum += from[(kh * s.filter_w + kw) * wide + oh * s.out_w + ow];
            }
        }
        dx[i] += sum;
    }
}

/* turned[channel][image] = y[image][channel], or, if `back`, y = turned + beta y (beta 0: y is not read). */
static __global__ void pd__cuda_turn(int64_t images, int64_t channels, int64_t area, bool back, pd_real beta,
                                     pd_real *y, pd_real *turned) {
    PD__CUDA_EACH(i, images * channels * area) {
        const int64_t map = i / area, image = map / channels, channel = map - image * channels;
        const int64_t t = (channel * images + image) * area + i - map * area;
        if (back) y[i] = turned[t] + (beta != 0 ? beta * y[i] : 0);
        else turned[t] = y[i];
    }
}

static void pd__cuda_lay_out(pd__cuda *c, const pd_conv_shape *s, const pd__cuda_patches *v, int64_t images,
                             const pd_real *x) {
    PD__CUDA_RUN(c, pd__cuda_to_columns, pd__cuda_grid(c, s->in_c * images * v->area), PD__CUDA_BLOCK, *s, images, x,
                 v->columns);
}

static void pd__cuda_turn_images(pd__cuda *c, const pd_conv_shape *s, const pd__cuda_patches *v, int64_t images,
                                 bool back, pd_real beta, const pd_real *y) {
    PD__CUDA_RUN(c, pd__cuda_turn, pd__cuda_grid(c, images * v->out_size), PD__CUDA_BLOCK, images, s->out_c, v->area,
                 back, beta, (pd_real *)(uintptr_t)y, v->turned);
}

static void pd__cuda_conv(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *w, pd_real beta,
                          pd_real *y, const pd_epilogue *after) {
    pd__cuda *c = pd__cuda_of(d);
    pd__cuda_patches v;
    if (!c || !pd__cuda_patches_begin(c, s, &v)) return;
    for (int64_t first = 0; first < s->rows; first += v.most) {
        const int64_t images = pd__cuda_min(v.most, s->rows - first), wide = images * v.area;
        pd__cuda_lay_out(c, s, &v, images, x + first * v.in_size);
        for (int64_t g = 0; g < s->groups; g++)
            pd__cuda_multiply(c, false, false, v.filters, wide, v.depth, 1, w + g * v.filters * v.depth, v.depth,
                              v.columns + g * v.depth * wide, wide, 0, v.turned + g * v.filters * wide, wide);
        pd__cuda_turn_images(c, s, &v, images, true, beta, y + first * v.out_size);
    }
    pd__cuda_finish(c, after, s->rows, v.out_size, v.out_size, v.area, y);
}

static void pd__cuda_conv_backward_data(pd_device *d, const pd_conv_shape *s, const pd_real *w, const pd_real *dy,
                                        pd_real *dx) {
    pd__cuda *c = pd__cuda_of(d);
    pd__cuda_patches v;
    if (!c || !pd__cuda_patches_begin(c, s, &v)) return;
    for (int64_t first = 0; first < s->rows; first += v.most) {
        const int64_t images = pd__cuda_min(v.most, s->rows - first), wide = images * v.area;
        pd__cuda_turn_images(c, s, &v, images, false, 0, dy + first * v.out_size);
        for (int64_t g = 0; g < s->groups; g++)
            pd__cuda_multiply(c, true, false, v.depth, wide, v.filters, 1, w + g * v.filters * v.depth, v.depth,
                              v.turned + g * v.filters * wide, wide, 0, v.columns + g * v.depth * wide, wide);
        PD__CUDA_RUN(c, pd__cuda_from_columns, pd__cuda_grid(c, images * v.in_size), PD__CUDA_BLOCK, *s, images,
                     v.columns, dx + first * v.in_size);
    }
}

static void pd__cuda_conv_backward_filter(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *dy,
                                          pd_real *dw) {
    pd__cuda *c = pd__cuda_of(d);
    pd__cuda_patches v;
    if (!c || !pd__cuda_patches_begin(c, s, &v)) return;
    for (int64_t first = 0; first < s->rows; first += v.most) {
        const int64_t images = pd__cuda_min(v.most, s->rows - first), wide = images * v.area;
        pd__cuda_lay_out(c, s, &v, images, x + first * v.in_size);
        pd__cuda_turn_images(c, s, &v, images, false, 0, dy + first * v.out_size);
        for (int64_t g = 0; g < s->groups; g++)
            pd__cuda_multiply(c, false, true, v.filters, v.depth, wide, 1, v.turned + g * v.filters * wide, wide,
                              v.columns + g * v.depth * wide, wide, 1, dw + g * v.filters * v.depth, v.depth);
    }
}

/* ======================================================================================================== */
/* >>pooling                                                                                                */

/* The cells of output (oh, ow) that lie inside the image: rows h0 .. h1 - 1, columns w0 .. w1 - 1. */
typedef struct pd__cuda_window {
    int64_t h0, h1, w0, w1;
} pd__cuda_window;

static __device__ pd__cuda_window pd__cuda_window_of(const pd_pool_shape &s, int64_t oh, int64_t ow) {
    pd__cuda_window v;
    v.h0 = oh * s.stride_h - s.pad_h;
    v.w0 = ow * s.stride_w - s.pad_w;
    v.h1 = pd__cuda_min(v.h0 + s.size_h, s.in_h);
    v.w1 = pd__cuda_min(v.w0 + s.size_w, s.in_w);
    v.h0 = pd__cuda_max(v.h0, 0);
    v.w0 = pd__cuda_max(v.w0, 0);
    return v;
}

/* What a sum over the window is multiplied with. */
static __device__ pd_real pd__cuda_pool_factor(const pd_pool_shape &s, const pd__cuda_window &v) {
    const double cells = (double)((v.h1 - v.h0) * (v.w1 - v.w0));
    if (s.method == PD_AVERAGE) return (pd_real)(1 / cells);
    return s.method == PD_SQRT_N ? (pd_real)(1 / sqrt(cells)) : 1;
}

static __global__ void pd__cuda_pool_kernel(pd_pool_shape s, const pd_real *x, pd_real *y) {
    const int64_t area = s.out_h * s.out_w;
    PD__CUDA_EACH(i, s.rows * s.channels * area) {
        const int64_t m = i / area, o = i - m * area, oh = o / s.out_w;
        const pd__cuda_window v = pd__cuda_window_of(s, oh, o - oh * s.out_w);
        const pd_real *map = x + m * s.in_h * s.in_w;
        pd_real best = map[v.h0 * s.in_w + v.w0], sum = 0;
        for (int64_t h = v.h0; h < v.h1; h++)
            for (int64_t w = v.w0; w < v.w1; w++) {
                const pd_real value = map[h * s.in_w + w];
                sum += value;
                if (value > best || value != value) best = value;
            }
        y[i] = s.method == PD_MAX ? best : sum * pd__cuda_pool_factor(s, v);
    }
}

static __device__ bool pd__cuda_same(pd_real a, pd_real b) { return a == b || (a != a && b != b); }

/* Is the cell (h, w), which has the value y, the first of its window that has? */
static __device__ bool pd__cuda_is_first(const pd_pool_shape &s, const pd__cuda_window &v, const pd_real *map,
                                         int64_t h, int64_t w, pd_real y) {
    for (int64_t i = v.h0; i <= h; i++)
        for (int64_t j = v.w0; j < (i < h ? v.w1 : w); j++)
            if (pd__cuda_same(map[i * s.in_w + j], y)) return false;
    return true;
}

/* The windows that a cell lies in, along one side: first .. last - 1. */
static __device__ void pd__cuda_windows(int64_t at, int64_t size, int64_t stride, int64_t count, int64_t *first,
                                        int64_t *last) {
    *first = at < size ? 0 : (at - size) / stride + 1;
    *last = pd__cuda_min(at / stride + 1, count);
}

/* Each cell of dx gathers from the windows that it lies in. */
static __global__ void pd__cuda_pool_backward_kernel(pd_pool_shape s, const pd_real *x, const pd_real *y,
                                                     const pd_real *dy, pd_real *dx) {
    const int64_t in_area = s.in_h * s.in_w;
    PD__CUDA_EACH(i, s.rows * s.channels * in_area) {
        const int64_t m = i / in_area, cell = i - m * in_area, h = cell / s.in_w, w = cell - h * s.in_w;
        int64_t top, bottom, left, right;
        pd_real sum = 0;
        pd__cuda_windows(h + s.pad_h, s.size_h, s.stride_h, s.out_h, &top, &bottom);
        pd__cuda_windows(w + s.pad_w, s.size_w, s.stride_w, s.out_w, &left, &right);
        for (int64_t oh = top; oh < bottom; oh++)
            for (int64_t ow = left; ow < right; ow++) {
                const pd__cuda_window v = pd__cuda_window_of(s, oh, ow);
                const int64_t o = (m * s.out_h + oh) * s.out_w + ow;
                if (s.method != PD_MAX) sum += pd__cuda_pool_factor(s, v) * dy[o];
                else if (pd__cuda_same(x[i], y[o]) && pd__cuda_is_first(s, v, x + m * in_area, h, w, y[o]))
                    sum += dy[o];
            }
        dx[i] += sum;
    }
}

static void pd__cuda_pool(pd_device *d, const pd_pool_shape *s, const pd_real *x, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = s->rows * s->channels * s->out_h * s->out_w;
    if (c && n > 0) PD__CUDA_RUN(c, pd__cuda_pool_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, *s, x, y);
}

static void pd__cuda_pool_backward(pd_device *d, const pd_pool_shape *s, const pd_real *x, const pd_real *y,
                                   const pd_real *dy, pd_real *dx) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = s->rows * s->channels * s->in_h * s->in_w;
    if (c && n > 0)
        PD__CUDA_RUN(c, pd__cuda_pool_backward_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, *s, x, y, dy, dx);
}

/* ======================================================================================================== */
/* >>costs                                                                                                  */

static __device__ pd_real pd__cuda_at_least_tiny(pd_real p) {
    return p > PD__CUDA_REAL_MIN || p != p ? p : PD__CUDA_REAL_MIN;
}

/* The weighted target of one class: soft or, by id, 1 in one class. */
static __device__ pd_real pd__cuda_target(const int64_t *ids, const pd_real *soft, const pd_real *class_weights,
                                          int64_t r, int64_t width, int64_t k) {
    const pd_real t = soft ? soft[r * width + k] : (pd_real)(ids[r] == k);
    return class_weights ? t * class_weights[k] : t;
}

/* A block per row: least is -log of the largest p, of which, where it is close to 1, the others know more. With x NULL ids
   need no more than a thread. */
static __global__ void pd__cuda_cross_entropy_kernel(int64_t rows, int64_t width, const pd_real *x, const pd_real *p,
                                                     const int64_t *ids, const pd_real *soft,
                                                     const pd_real *row_weights, const pd_real *class_weights,
                                                     pd_real *cost) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        const double weight = row_weights ? (double)row_weights[r] : 1;
        double sum = 0, top = 0, least = 0;
        if (x) {
            const double largest = (double)pd__cuda_largest(p + r * width, width);
            double others = 0;
            top = (double)pd__cuda_largest(x + r * width, width);
            PD__CUDA_EACH_IN_BLOCK(k, width) others += (double)p[r * width + k];
            others = pd__cuda_block_sum(others) - largest;
            least = others < 0.5 ? -log1p(-(others > 0 ? others : 0)) : -log(largest);
        }
        PD__CUDA_EACH_IN_BLOCK(i, ids ? 1 : width) {
            const int64_t k = ids ? ids[r] : i;
            const double t = (double)pd__cuda_target(ids, soft, class_weights, r, width, k);
            if (t != 0)
                sum += t * (x ? top - (double)x[r * width + k] + least
                              : -log((double)pd__cuda_at_least_tiny(p[r * width + k])));
        }
        sum = pd__cuda_block_sum(sum);
        if (threadIdx.x == 0) cost[r] = weight != 0 ? (pd_real)(weight * sum) : 0;
    }
}

static __global__ void pd__cuda_cross_entropy_backward_kernel(int64_t rows, int64_t width, const pd_real *p,
                                                              const int64_t *ids, const pd_real *soft,
                                                              const pd_real *class_weights, const pd_real *dcost,
                                                              bool by_x, pd_real *dx) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        double total = 0;
        if (dcost[r] == 0) continue; /* the whole block does */
        if (by_x) {
            PD__CUDA_EACH_IN_BLOCK(k, width) total += (double)pd__cuda_target(ids, soft, class_weights, r, width, k);
            total = pd__cuda_block_sum(total);
        }
        PD__CUDA_EACH_IN_BLOCK(k, width) {
            const pd_real t = pd__cuda_target(ids, soft, class_weights, r, width, k), v = p[r * width + k];
            if (ids && !by_x && k != ids[r]) continue;
            dx[r * width + k] += dcost[r] * (by_x ? (pd_real)total * v - t : -t / pd__cuda_at_least_tiny(v));
        }
    }
}

static void pd__cuda_cross_entropy(pd_device *d, int64_t rows, int64_t width, const pd_real *x, const pd_real *p,
                                   const int64_t *ids, const pd_real *soft, const pd_real *row_weights,
                                   const pd_real *class_weights, pd_real *cost) {
    pd__cuda *c = pd__cuda_of(d);
    char *at = NULL;
    if (!c || rows == 0) return;
    if (ids) at = pd__cuda_arguments(c, 1, rows * (int64_t)sizeof *ids);
    ids = pd__cuda_argument(c, &at, ids, rows);
    PD__CUDA_RUN(c, pd__cuda_cross_entropy_kernel, pd__cuda_blocks(c, rows), ids && !x ? 32 : pd__cuda_row_block(width),
                 rows, width, x, p, ids, soft, row_weights, class_weights, cost);
}

static void pd__cuda_cross_entropy_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *p,
                                            const int64_t *ids, const pd_real *soft, const pd_real *class_weights,
                                            const pd_real *dcost, bool by_x, pd_real *dx) {
    pd__cuda *c = pd__cuda_of(d);
    char *at = NULL;
    if (!c || rows == 0) return;
    if (ids) at = pd__cuda_arguments(c, 1, rows * (int64_t)sizeof *ids);
    ids = pd__cuda_argument(c, &at, ids, rows);
    PD__CUDA_RUN(c, pd__cuda_cross_entropy_backward_kernel, pd__cuda_blocks(c, rows), pd__cuda_row_block(width), rows,
                 width, p, ids, soft, class_weights, dcost, by_x, dx);
}

/* ---- dropout ---- */

/* pd_random */
static __device__ uint64_t pd__cuda_random(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static __global__ void pd__cuda_dropout_kernel(int64_t n, uint64_t key, double p, pd_real factor, const pd_real *x,
                                               pd_real *y) {
    PD__CUDA_EACH(i, n) {
        const double u = (double)(pd__cuda_random(key, (uint64_t)i) >> 11) * (1.0 / 9007199254740992.0);
        if (u >= p) y[i] += factor * x[i];
    }
}

static void pd__cuda_dropout(pd_device *d, int64_t n, uint64_t key, double p, const pd_real *x, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || n == 0) return;
    PD__CUDA_RUN(c, pd__cuda_dropout_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, n, key, p, (pd_real)(1 / (1 - p)), x,
                 y);
}

/* ======================================================================================================== */
/* >>normalisation                                                                                          */

/* A block per channel, of which value i of n is at: */
static __device__ int64_t pd__cuda_in_channel(int64_t i, int64_t channel, int64_t channels, int64_t area) {
    const int64_t r = i / area;
    return (r * channels + channel) * area + i - r * area;
}

static __global__ void pd__cuda_moments_kernel(int64_t n, int64_t channels, int64_t area, const pd_real *x,
                                               pd_real *moments) {
    PD__CUDA_EACH_BLOCK(c, channels) {
        double sum = 0, squares = 0;
        PD__CUDA_EACH_IN_BLOCK(i, n) sum += (double)x[pd__cuda_in_channel(i, c, channels, area)];
        sum = pd__cuda_block_sum(sum) / (double)pd__cuda_max(n, 1);
        PD__CUDA_EACH_IN_BLOCK(i, n) {
            const double v = (double)x[pd__cuda_in_channel(i, c, channels, area)] - sum;
            squares += v * v;
        }
        squares = pd__cuda_block_sum(squares) / (double)pd__cuda_max(n, 1);
        if (threadIdx.x == 0) {
            moments[c] = (pd_real)sum;
            moments[channels + c] = (pd_real)(sum - (double)moments[c]);
            moments[2 * channels + c] = (pd_real)squares;
        }
    }
}

static void pd__cuda_channel_moments(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                     pd_real *moments) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || channels == 0) return;
    PD__CUDA_RUN(c, pd__cuda_moments_kernel, pd__cuda_blocks(c, channels), pd__cuda_row_block(rows * area), rows * area,
                 channels, area, x, moments);
}

static __global__ void pd__cuda_batch_norm_kernel(int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                                  const pd_real *mean, const pd_real *rest, const pd_real *variance,
                                                  pd_real epsilon, const pd_real *weight, const pd_real *bias,
                                                  pd_real *y) {
    PD__CUDA_EACH(i, rows * channels * area) {
        const int64_t c = i / area % channels;
        const pd_real factor = (weight ? weight[c] : 1) / sqrt(variance[c] + epsilon);
        y[i] = (x[i] - mean[c] - (rest ? rest[c] : 0)) * factor + (bias ? bias[c] : 0);
    }
}

static void pd__cuda_batch_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                const pd_real *mean, const pd_real *rest, const pd_real *variance, double epsilon,
                                const pd_real *weight, const pd_real *bias, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * channels * area;
    if (!c || n == 0) return;
    PD__CUDA_RUN(c, pd__cuda_batch_norm_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, rows, channels, area, x, mean,
                 rest, variance, (pd_real)epsilon, weight, bias, y);
}

/* With xhat = (x - mean) / deviation: dx = weight / deviation (dy - mean(dy) - xhat mean(dy xhat)), the two means only
   if the moments depend on x. */
static __global__ void pd__cuda_batch_norm_backward_kernel(int64_t n, int64_t channels, int64_t area, const pd_real *x,
                                                           const pd_real *mean, const pd_real *rest,
                                                           const pd_real *variance, double epsilon, bool batch_moments,
                                                           const pd_real *weight, const pd_real *dy, pd_real *dx,
                                                           pd_real *dweight, pd_real *dbias) {
    PD__CUDA_EACH_BLOCK(c, channels) {
        const double inverse = 1 / sqrt((double)variance[c] + epsilon);
        const double middle = (double)mean[c] + (rest ? (double)rest[c] : 0);
        const pd_real factor = (pd_real)(inverse * (weight ? (double)weight[c] : 1));
        double sum = 0, dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, n) {
            const int64_t at = pd__cuda_in_channel(i, c, channels, area);
            sum += (double)dy[at];
            dot += (double)dy[at] * ((double)x[at] - middle);
        }
        sum = pd__cuda_block_sum(sum);
        dot = pd__cuda_block_sum(dot) * inverse;
        if (threadIdx.x == 0 && dweight) dweight[c] += (pd_real)dot;
        if (threadIdx.x == 0 && dbias) dbias[c] += (pd_real)sum;
        sum = batch_moments ? sum / (double)n : 0;
        dot = batch_moments ? dot * inverse / (double)n : 0;
        PD__CUDA_EACH_IN_BLOCK(i, dx ? n : 0) {
            const int64_t at = pd__cuda_in_channel(i, c, channels, area);
            dx[at] += factor * (pd_real)((double)dy[at] - sum - ((double)x[at] - middle) * dot);
        }
    }
}

static void pd__cuda_batch_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                         const pd_real *mean, const pd_real *rest, const pd_real *variance,
                                         double epsilon, bool batch_moments, const pd_real *weight, const pd_real *dy,
                                         pd_real *dx, pd_real *dweight, pd_real *dbias) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * area;
    if (!c || n * channels == 0) return;
    PD__CUDA_RUN(c, pd__cuda_batch_norm_backward_kernel, pd__cuda_blocks(c, channels), pd__cuda_row_block(n), n,
                 channels, area, x, mean, rest, variance, epsilon, batch_moments, weight, dy, dx, dweight, dbias);
}

/* Of n numbers, by a block: *mean, 1 / deviation, and what backward wants of both; see pd_op_layer_norm. */
static __device__ double pd__cuda_put_moments(int64_t n, const pd_real *x, double epsilon, pd_real *moments,
                                              double *mean) {
    double sum = 0, variance = 0, inverse;
    PD__CUDA_EACH_IN_BLOCK(i, n) sum += (double)x[i];
    *mean = pd__cuda_block_sum(sum) / (double)n;
    PD__CUDA_EACH_IN_BLOCK(i, n) variance += ((double)x[i] - *mean) * ((double)x[i] - *mean);
    inverse = 1 / sqrt(pd__cuda_block_sum(variance) / (double)n + epsilon);
    if (threadIdx.x == 0) {
        moments[0] = (pd_real)*mean;
        moments[1] = (pd_real)(*mean - (double)moments[0]);
        moments[2] = (pd_real)inverse;
    }
    return inverse;
}

static __global__ void pd__cuda_layer_norm_kernel(int64_t rows, int64_t width, const pd_real *x, double epsilon,
                                                  const pd_real *weight, const pd_real *bias, pd_real *moments,
                                                  pd_real *y) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        const pd_real *row = x + r * width;
        double mean, inverse = pd__cuda_put_moments(width, row, epsilon, moments + 3 * r, &mean);
        PD__CUDA_EACH_IN_BLOCK(i, width)
        y[r * width + i] =
            (pd_real)(((double)row[i] - mean) * inverse) * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
}

static void pd__cuda_layer_norm(pd_device *d, int64_t rows, int64_t width, const pd_real *x, double epsilon,
                                const pd_real *weight, const pd_real *bias, pd_real *moments, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    PD__CUDA_RUN(c, pd__cuda_layer_norm_kernel, pd__cuda_blocks(c, rows), pd__cuda_row_block(width), rows, width, x,
                 epsilon, weight, bias, moments, y);
}

static __global__ void pd__cuda_layer_norm_data_kernel(int64_t rows, int64_t width, const pd_real *x,
                                                       const pd_real *moments, const pd_real *weight, const pd_real *dy,
                                                       pd_real *dx) {
    PD__CUDA_EACH_BLOCK(r, rows) {
        const double mean = (double)moments[3 * r] + (double)moments[3 * r + 1], inverse = (double)moments[3 * r + 2];
        const pd_real *from = x + r * width, *grad = dy + r * width;
        double sum = 0, dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, width) {
            const double g = (double)grad[i] * (weight ? (double)weight[i] : 1);
            sum += g;
            dot += g * ((double)from[i] - mean) * inverse;
        }
        sum = pd__cuda_block_sum(sum) / (double)width;
        dot = pd__cuda_block_sum(dot) / (double)width;
        PD__CUDA_EACH_IN_BLOCK(i, width) {
            const double g = (double)grad[i] * (weight ? (double)weight[i] : 1);
            dx[r * width + i] += (pd_real)(inverse * (g - sum - ((double)from[i] - mean) * inverse * dot));
        }
    }
}

/* A thread per column. */
static __global__ void pd__cuda_layer_norm_params_kernel(int64_t rows, int64_t width, const pd_real *x,
                                                         const pd_real *moments, const pd_real *dy, pd_real *dweight,
                                                         pd_real *dbias) {
    PD__CUDA_EACH(i, width) {
        double sum = 0, dot = 0;
        for (int64_t r = 0; r < rows; r++) {
            const double mean = (double)moments[3 * r] + (double)moments[3 * r + 1];
            sum += (double)dy[r * width + i];
            dot += (double)dy[r * width + i] * ((double)x[r * width + i] - mean) * (double)moments[3 * r + 2];
        }
        if (dweight) dweight[i] += (pd_real)dot;
        if (dbias) dbias[i] += (pd_real)sum;
    }
}

static void pd__cuda_layer_norm_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *x,
                                         const pd_real *moments, const pd_real *weight, const pd_real *dy, pd_real *dx,
                                         pd_real *dweight, pd_real *dbias) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    if (dx)
        PD__CUDA_RUN(c, pd__cuda_layer_norm_data_kernel, pd__cuda_blocks(c, rows), pd__cuda_row_block(width), rows,
                     width, x, moments, weight, dy, dx);
    if (dweight || dbias)
        PD__CUDA_RUN(c, pd__cuda_layer_norm_params_kernel, pd__cuda_grid(c, width), PD__CUDA_BLOCK, rows, width, x,
                     moments, dy, dweight, dbias);
}

/* A block per group. */
static __global__ void pd__cuda_group_norm_kernel(int64_t count, int64_t groups, int64_t members, int64_t area,
                                                  const pd_real *x, double epsilon, const pd_real *weight,
                                                  const pd_real *bias, pd_real *moments, pd_real *y) {
    const int64_t size = members * area;
    PD__CUDA_EACH_BLOCK(group, count) {
        const int64_t first = group % groups * members;
        const pd_real *from = x + group * size;
        double mean, inverse = pd__cuda_put_moments(size, from, epsilon, moments + 3 * group, &mean);
        PD__CUDA_EACH_IN_BLOCK(i, size) {
            const int64_t c = first + i / area;
            y[group * size + i] =
                (pd_real)(((double)from[i] - mean) * inverse) * (weight ? weight[c] : 1) + (bias ? bias[c] : 0);
        }
    }
}

static void pd__cuda_group_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                const pd_real *x, double epsilon, const pd_real *weight, const pd_real *bias,
                                pd_real *moments, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t count = rows * groups, members = channels / groups;
    if (!c || rows * channels * area == 0) return;
    PD__CUDA_RUN(c, pd__cuda_group_norm_kernel, pd__cuda_blocks(c, count), pd__cuda_row_block(members * area), count,
                 groups, members, area, x, epsilon, weight, bias, moments, y);
}

static __global__ void pd__cuda_group_norm_data_kernel(int64_t count, int64_t groups, int64_t members, int64_t area,
                                                       const pd_real *x, const pd_real *moments, const pd_real *weight,
                                                       const pd_real *dy, pd_real *dx) {
    const int64_t size = members * area;
    PD__CUDA_EACH_BLOCK(group, count) {
        const double mean = (double)moments[3 * group] + (double)moments[3 * group + 1];
        const double inverse = (double)moments[3 * group + 2];
        const int64_t first = group % groups * members;
        const pd_real *from = x + group * size, *grad = dy + group * size;
        double sum = 0, dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, size) {
            const double g = (double)grad[i] * (weight ? (double)weight[first + i / area] : 1);
            sum += g;
            dot += g * ((double)from[i] - mean) * inverse;
        }
        sum = pd__cuda_block_sum(sum) / (double)size;
        dot = pd__cuda_block_sum(dot) / (double)size;
        PD__CUDA_EACH_IN_BLOCK(i, size) {
            const double g = (double)grad[i] * (weight ? (double)weight[first + i / area] : 1);
            dx[group * size + i] += (pd_real)(inverse * (g - sum - ((double)from[i] - mean) * inverse * dot));
        }
    }
}

/* A block per channel. */
static __global__ void pd__cuda_group_norm_params_kernel(int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                                         const pd_real *x, const pd_real *moments, const pd_real *dy,
                                                         pd_real *dweight, pd_real *dbias) {
    PD__CUDA_EACH_BLOCK(c, channels) {
        double sum = 0, dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, rows * area) {
            const int64_t r = i / area, at = (r * channels + c) * area + i - r * area;
            const pd_real *m = moments + 3 * (r * groups + c / (channels / groups));
            sum += (double)dy[at];
            dot += (double)dy[at] * ((double)x[at] - ((double)m[0] + (double)m[1])) * (double)m[2];
        }
        sum = pd__cuda_block_sum(sum);
        dot = pd__cuda_block_sum(dot);
        if (threadIdx.x == 0) {
            if (dweight) dweight[c] += (pd_real)dot;
            if (dbias) dbias[c] += (pd_real)sum;
        }
    }
}

static void pd__cuda_group_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                         const pd_real *x, const pd_real *moments, const pd_real *weight,
                                         const pd_real *dy, pd_real *dx, pd_real *dweight, pd_real *dbias) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t count = rows * groups, members = channels / groups;
    if (!c || rows * channels * area == 0) return;
    if (dx)
        PD__CUDA_RUN(c, pd__cuda_group_norm_data_kernel, pd__cuda_blocks(c, count), pd__cuda_row_block(members * area),
                     count, groups, members, area, x, moments, weight, dy, dx);
    if (dweight || dbias)
        PD__CUDA_RUN(c, pd__cuda_group_norm_params_kernel, pd__cuda_blocks(c, channels),
                     pd__cuda_row_block(rows * area), rows, channels, area, groups, x, moments, dy, dweight, dbias);
}

static __global__ void pd__cuda_response_norm_kernel(int64_t n, int64_t channels, int64_t area, int64_t size,
                                                     pd_real alpha, pd_real beta, pd_real k, const pd_real *x,
                                                     pd_real *scales, pd_real *y) {
    PD__CUDA_EACH(i, n) {
        const int64_t c = i / area % channels, first = pd__cuda_max(0, c - size / 2);
        const int64_t last = pd__cuda_min(channels, c - size / 2 + size);
        pd_real sum = 0;
        for (int64_t j = first; j < last; j++) sum += x[i + (j - c) * area] * x[i + (j - c) * area];
        scales[i] = k + alpha * sum;
        y[i] = x[i] * pow(scales[i], -beta);
    }
}

/* dx_j += dy_j s_j^-beta - 2 alpha beta x_j sum over the windows c that hold j of dy_c x_c s_c^(-beta - 1); alpha is
   already divided by the window's size */
static __global__ void pd__cuda_response_norm_backward_kernel(int64_t n, int64_t channels, int64_t area, int64_t size,
                                                              pd_real alpha, pd_real beta, const pd_real *x,
                                                              const pd_real *scales, const pd_real *dy, pd_real *dx) {
    PD__CUDA_EACH(i, n) {
        const int64_t j = i / area % channels, first = pd__cuda_max(0, j + size / 2 - size + 1);
        const int64_t last = pd__cuda_min(channels, j + size / 2 + 1);
        pd_real sum = 0;
        for (int64_t c = first; c < last; c++) {
            const int64_t o = i + (c - j) * area;
            sum += dy[o] * x[o] * pow(scales[o], -beta - 1);
        }
        dx[i] += dy[i] * pow(scales[i], -beta) - 2 * alpha * beta * x[i] * sum;
    }
}

static void pd__cuda_response_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                   double alpha, double beta, double k, const pd_real *x, pd_real *scales, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * channels * area;
    if (!c || n == 0) return;
    PD__CUDA_RUN(c, pd__cuda_response_norm_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, n, channels, area, size,
                 (pd_real)(alpha / (double)size), (pd_real)beta, (pd_real)k, x, scales, y);
}

static void pd__cuda_response_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                            double alpha, double beta, const pd_real *x, const pd_real *scales,
                                            const pd_real *dy, pd_real *dx) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t n = rows * channels * area;
    if (!c || n == 0) return;
    PD__CUDA_RUN(c, pd__cuda_response_norm_backward_kernel, pd__cuda_grid(c, n), PD__CUDA_BLOCK, n, channels, area,
                 size, (pd_real)(alpha / (double)size), (pd_real)beta, x, scales, dy, dx);
}

/* ======================================================================================================== */
/* >>sparse rows                                                                                            */

/* Entry k is numbered from `first`, the first that was sent. */
static __global__ void pd__cuda_sparse_kernel(int64_t rows, int64_t width, int64_t first, const int64_t *starts,
                                              const int64_t *columns, const pd_real *values, const pd_real *x,
                                              pd_real *y) {
    PD__CUDA_EACH(i, rows * width) {
        const int64_t r = i / width, at = i - r * width;
        const int64_t begin = starts ? starts[r] - first : r, end = starts ? starts[r + 1] - first : r + 1;
        pd_real sum = y[i];
        for (int64_t k = begin; k < end; k++) sum += (values ? values[k] : 1) * x[columns[k] * width + at];
        y[i] = sum;
    }
}

static void pd__cuda_sparse_product(pd_device *d, const pd_csr *s, int64_t width, const pd_real *x, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    const int64_t *starts = s->starts, *columns;
    const pd_real *values;
    int64_t first, entries;
    char *at;
    if (!c || s->rows * width == 0) return;
    first = starts ? starts[0] : 0;
    entries = starts ? starts[s->rows] - first : s->rows;
    if (entries == 0) return;
    at =
        pd__cuda_arguments(c, 3, (s->rows + 1 + entries) * (int64_t)sizeof *starts + entries * (int64_t)sizeof *values);
    starts = pd__cuda_argument(c, &at, starts, s->rows + 1);
    columns = pd__cuda_argument(c, &at, s->columns + first, entries);
    values = pd__cuda_argument(c, &at, s->values ? s->values + first : NULL, entries);
    PD__CUDA_RUN(c, pd__cuda_sparse_kernel, pd__cuda_grid(c, s->rows * width), PD__CUDA_BLOCK, s->rows, width, first,
                 starts, columns, values, x, y);
}

/* ---- recurrent units ---- */

static __global__ void pd__cuda_gru_kernel(int64_t rows, int64_t width, pd_real *gates, const pd_real *recurrent,
                                           const pd_real *before, pd_real *after) {
    PD__CUDA_EACH(i, rows * width) {
        const int64_t r = i / width, zero = r * 2 * width + i; /* of z; reset and c follow */
        const pd_real z = pd__cuda_sigmoid(gates[zero] + recurrent[zero]);
        const pd_real reset = pd__cuda_sigmoid(gates[zero + width] + recurrent[zero + width]);
        const pd_real c = tanh(gates[zero + 2 * width] + reset * recurrent[zero + 2 * width]);
        gates[zero] = z;
        gates[zero + width] = reset;
        gates[zero + 2 * width] = c;
        after[i] = (1 - z) * c + (before ? z * before[i] : 0);
    }
}

static __global__ void pd__cuda_gru_backward_kernel(int64_t rows, int64_t width, pd_real *gates, pd_real *recurrent,
                                                    const pd_real *before, const pd_real *dafter, pd_real *dbefore) {
    PD__CUDA_EACH(i, rows * width) {
        const int64_t r = i / width, zero = r * 2 * width + i;
        const pd_real z = gates[zero], reset = gates[zero + width], c = gates[zero + 2 * width];
        const pd_real dh = dafter[i], h = before ? before[i] : 0;
        const pd_real dz = dh * (h - c) * z * (1 - z), dc = dh * (1 - z) * (1 - c * c);
        const pd_real dr = dc * recurrent[zero + 2 * width] * reset * (1 - reset);
        if (dbefore) dbefore[i] += dh * z;
        gates[zero] = recurrent[zero] = dz;
        gates[zero + width] = recurrent[zero + width] = dr;
        gates[zero + 2 * width] = dc;
        recurrent[zero + 2 * width] = dc * reset;
    }
}

static void pd__cuda_gru(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *recurrent,
                         const pd_real *before, pd_real *after) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    PD__CUDA_RUN(c, pd__cuda_gru_kernel, pd__cuda_grid(c, rows * width), PD__CUDA_BLOCK, rows, width, gates, recurrent,
                 before, after);
}

static void pd__cuda_gru_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, pd_real *recurrent,
                                  const pd_real *before, const pd_real *dafter, pd_real *dbefore) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    PD__CUDA_RUN(c, pd__cuda_gru_backward_kernel, pd__cuda_grid(c, rows * width), PD__CUDA_BLOCK, rows, width, gates,
                 recurrent, before, dafter, dbefore);
}

static __global__ void pd__cuda_lstm_kernel(int64_t rows, int64_t width, pd_real *gates, const pd_real *peephole,
                                            const pd_real *before, pd_real *cells, pd_real *after) {
    PD__CUDA_EACH(at, rows * width) {
        const int64_t r = at / width, k = at - r * width;
        pd_real *gate = gates + r * 3 * width + at; /* of i; f, g and o follow */
        const pd_real old = before ? before[at] : 0;
        const pd_real i = pd__cuda_sigmoid(gate[0] + (peephole ? peephole[k] * old : 0));
        const pd_real f = pd__cuda_sigmoid(gate[width] + (peephole ? peephole[width + k] * old : 0));
        const pd_real g = tanh(gate[2 * width]), c = f * old + i * g;
        const pd_real o = pd__cuda_sigmoid(gate[3 * width] + (peephole ? peephole[2 * width + k] * c : 0));
        gate[0] = i;
        gate[width] = f;
        gate[2 * width] = g;
        gate[3 * width] = o;
        cells[at] = c;
        after[at] = o * tanh(c);
    }
}

static __global__ void pd__cuda_lstm_backward_kernel(int64_t rows, int64_t width, pd_real *gates,
                                                     const pd_real *peephole, const pd_real *before,
                                                     const pd_real *cells, const pd_real *dafter, pd_real *dcells) {
    PD__CUDA_EACH(at, rows * width) {
        const int64_t r = at / width, k = at - r * width;
        pd_real *gate = gates + r * 3 * width + at;
        const pd_real i = gate[0], f = gate[width], g = gate[2 * width], o = gate[3 * width];
        const pd_real old = before ? before[at] : 0, dh = dafter[at], y = tanh(cells[at]), d_o = dh * y * o * (1 - o);
        const pd_real dc = dcells[at] + dh * o * (1 - y * y) + (peephole ? d_o * peephole[2 * width + k] : 0);
        const pd_real di = dc * g * i * (1 - i), df = dc * old * f * (1 - f);
        gate[0] = di;
        gate[width] = df;
        gate[2 * width] = dc * i * (1 - g * g);
        gate[3 * width] = d_o;
        dcells[at] = dc * f + (peephole ? di * peephole[k] + df * peephole[width + k] : 0);
    }
}

static void pd__cuda_lstm(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *peephole,
                          const pd_real *before, pd_real *cells, pd_real *after) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    PD__CUDA_RUN(c, pd__cuda_lstm_kernel, pd__cuda_grid(c, rows * width), PD__CUDA_BLOCK, rows, width, gates, peephole,
                 before, cells, after);
}

static void pd__cuda_lstm_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *peephole,
                                   const pd_real *before, const pd_real *cells, const pd_real *dafter,
                                   pd_real *dcells) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || rows * width == 0) return;
    PD__CUDA_RUN(c, pd__cuda_lstm_backward_kernel, pd__cuda_grid(c, rows * width), PD__CUDA_BLOCK, rows, width, gates,
                 peephole, before, cells, dafter, dcells);
}

/* ---- attention ---- */

/* A block per row: the scores, one after the other, their softmax, and the sum of the values. */
static __global__ void pd__cuda_attention_kernel(pd_attention_shape s, const pd_real *query, const pd_real *keys,
                                                 const pd_real *values, const pd_real *v, pd_real *weights,
                                                 pd_real *y) {
    PD__CUDA_EACH_BLOCK(r, s.rows) {
        const int64_t *span = s.spans + 3 * r, count = span[1] - span[0];
        pd_real *w = weights + span[2];
        double sum = 0;
        for (int64_t k = 0; k < count; k++) {
            const pd_real *key = keys + (span[0] + k) * s.width;
            double score = 0;
            PD__CUDA_EACH_IN_BLOCK(i, s.width) score += (double)(v[i] * tanh(query[r * s.width + i] + key[i]));
            score = pd__cuda_block_sum(score);
            if (threadIdx.x == 0) w[k] = (pd_real)score;
        }
        __syncthreads();
        if (count > 0) {
            const pd_real top = pd__cuda_largest(w, count);
            PD__CUDA_EACH_IN_BLOCK(k, count) {
                w[k] = exp(w[k] - top);
                sum += (double)w[k];
            }
            sum = pd__cuda_block_sum(sum);
            PD__CUDA_EACH_IN_BLOCK(k, count) w[k] = (pd_real)((double)w[k] / sum);
            __syncthreads();
        }
        PD__CUDA_EACH_IN_BLOCK(i, s.value_width) {
            pd_real mean = 0;
            for (int64_t k = 0; k < count; k++) mean += w[k] * values[(span[0] + k) * s.value_width + i];
            y[r * s.value_width + i] = mean;
        }
    }
}

/* A block per row, whose part of `space` receives 1, or 0 if its dy is 0, then the gradients of its scores. */
static __global__ void pd__cuda_attention_scores_kernel(pd_attention_shape s, int64_t per_row, const pd_real *values,
                                                        const pd_real *weights, const pd_real *dy, pd_real *space) {
    PD__CUDA_EACH_BLOCK(r, s.rows) {
        const int64_t *span = s.spans + 3 * r, count = span[1] - span[0];
        const pd_real *w = weights + span[2], *grad = dy + r * s.value_width;
        pd_real *to = space + r * per_row;
        double any = 0, dot = 0;
        PD__CUDA_EACH_IN_BLOCK(i, s.value_width) any += grad[i] != 0;
        any = count > 0 ? pd__cuda_block_sum(any) : 0;
        if (threadIdx.x == 0) to[0] = any > 0;
        if (any == 0) continue;
        for (int64_t k = 0; k < count; k++) {
            double sum = 0;
            PD__CUDA_EACH_IN_BLOCK(i, s.value_width)
            sum += (double)grad[i] * (double)values[(span[0] + k) * s.value_width + i];
            sum = pd__cuda_block_sum(sum);
            if (threadIdx.x == 0) to[1 + k] = (pd_real)sum;
            dot += (double)w[k] * (double)(pd_real)sum;
        }
        __syncthreads();
        PD__CUDA_EACH_IN_BLOCK(k, count) to[1 + k] = w[k] * (to[1 + k] - (pd_real)dot);
    }
}

static __device__ bool pd__cuda_same_keys(const pd_attention_shape &s, int64_t r) {
    const int64_t *span = s.spans + 3 * r;
    return r > 0 && span[0] == span[-3] && span[1] == span[-2];
}

/* A thread per column and run of rows that look at the same keys. */
static __global__ void pd__cuda_attention_keys_kernel(pd_attention_shape s, int64_t per_row, const pd_real *query,
                                                      const pd_real *keys, const pd_real *v, const pd_real *space,
                                                      pd_real *dquery, pd_real *dkeys, pd_real *dv) {
    PD__CUDA_EACH(unit, s.rows * s.width) {
        const int64_t i = unit % s.width;
        int64_t r = unit / s.width;
        if (pd__cuda_same_keys(s, r)) continue;
        do {
            const int64_t *span = s.spans + 3 * r, at = r * s.width + i;
            const pd_real *scores = space + r * per_row;
            pd_real sum = 0, summand = 0;
            for (int64_t k = span[0]; scores[0] != 0 && k < span[1]; k++) {
                const pd_real t = tanh(query[at] + keys[k * s.width + i]), score = scores[1 + k - span[0]];
                const pd_real dkey = score * v[i] * (1 - t * t);
                summand += score * t;
                sum += dkey;
                if (dkeys) dkeys[k * s.width + i] += dkey;
            }
            if (dv) dv[at] = summand;
            if (dquery && scores[0] != 0) dquery[at] += sum;
        } while (++r < s.rows && pd__cuda_same_keys(s, r));
    }
}

static __global__ void pd__cuda_attention_values_kernel(pd_attention_shape s, int64_t per_row, const pd_real *weights,
                                                        const pd_real *space, const pd_real *dy, pd_real *dvalues) {
    PD__CUDA_EACH(unit, s.rows * s.value_width) {
        const int64_t i = unit % s.value_width;
        int64_t r = unit / s.value_width;
        if (pd__cuda_same_keys(s, r)) continue;
        do {
            const int64_t *span = s.spans + 3 * r;
            for (int64_t k = span[0]; space[r * per_row] != 0 && k < span[1]; k++)
                dvalues[k * s.value_width + i] += weights[span[2] + k - span[0]] * dy[r * s.value_width + i];
        } while (++r < s.rows && pd__cuda_same_keys(s, r));
    }
}

/* The shape with its spans on the device. */
static pd_attention_shape pd__cuda_attention_shape(pd__cuda *c, const pd_attention_shape *s) {
    pd_attention_shape there = *s;
    char *at = pd__cuda_arguments(c, 1, 3 * s->rows * (int64_t)sizeof *s->spans);
    there.spans = pd__cuda_argument(c, &at, s->spans, 3 * s->rows);
    return there;
}

static void pd__cuda_attention(pd_device *d, const pd_attention_shape *shape, const pd_real *query, const pd_real *keys,
                               const pd_real *values, const pd_real *v, pd_real *weights, pd_real *y) {
    pd__cuda *c = pd__cuda_of(d);
    if (!c || shape->rows == 0) return;
    const pd_attention_shape s = pd__cuda_attention_shape(c, shape);
    PD__CUDA_RUN(c, pd__cuda_attention_kernel, pd__cuda_blocks(c, s.rows), pd__cuda_row_block(s.width), s, query, keys,
                 values, v, weights, y);
}

static void pd__cuda_attention_backward(pd_device *d, const pd_attention_shape *shape, const pd_real *query,
                                        const pd_real *keys, const pd_real *values, const pd_real *v,
                                        const pd_real *weights, const pd_real *dy, pd_real *dquery, pd_real *dkeys,
                                        pd_real *dvalues, pd_real *dv) {
    pd__cuda *c = pd__cuda_of(d);
    int64_t per_row = 1;
    if (!c || shape->rows == 0) return;
    for (int64_t r = 0; r < shape->rows; r++)
        per_row = pd__cuda_max(per_row, 1 + shape->spans[3 * r + 1] - shape->spans[3 * r]);
    const pd_attention_shape s = pd__cuda_attention_shape(c, shape);
    pd_real *space = (pd_real *)pd__cuda_space_of(c, PD__CUDA_SUMS, s.rows * per_row * (int64_t)sizeof *space);
    PD__CUDA_RUN(c, pd__cuda_attention_scores_kernel, pd__cuda_blocks(c, s.rows), pd__cuda_row_block(s.value_width), s,
                 per_row, values, weights, dy, space);
    if (dquery || dkeys || dv)
        PD__CUDA_RUN(c, pd__cuda_attention_keys_kernel, pd__cuda_grid(c, s.rows * s.width), PD__CUDA_BLOCK, s, per_row,
                     query, keys, v, space, dquery, dkeys, dv);
    if (dvalues)
        PD__CUDA_RUN(c, pd__cuda_attention_values_kernel, pd__cuda_grid(c, s.rows * s.value_width), PD__CUDA_BLOCK, s,
                     per_row, weights, space, dy, dvalues);
}

/* ======================================================================================================== */
/* >>table                                                                                                  */

/* What this device has not got is said here, as `static pd_op_NAME *const pd__cuda_NAME = NULL;`: nothing. */

static void pd__cuda_fill_table(pd_device *d) {
    d->api_version = PD_API_VERSION;
    d->host_memory = false;
    d->alloc = pd__cuda_alloc;
    d->free = pd__cuda_free_memory;
    d->upload = pd__cuda_upload;
    d->download = pd__cuda_download;
    d->wait = pd__cuda_wait;
#define PD__CUDA_OPERATION(name) d->name = pd__cuda_##name;
    PD_OPERATIONS(PD__CUDA_OPERATION)
#undef PD__CUDA_OPERATION
}

int pd_cuda_count(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

/* cuBLAS gets a work space of its own, of the size that NVIDIA advises, so that it never takes memory by itself. */
static bool pd__cuda_open_blas(pd__cuda *c, const pd_cuda_opts *opts) {
    int major = 0;
    size_t bytes;
    if (!PD__CUDA_TRY(c, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c->device))) return false;
    bytes = (size_t)(major >= 9 ? 32 : 4) << 20;
    return PD__CUDA_TRY(c, cudaMalloc(&c->blas_space, bytes)) && PD__CUDA_TRY_BLAS(c, cublasCreate(&c->blas)) &&
           PD__CUDA_TRY_BLAS(c, cublasSetStream(c->blas, c->stream)) &&
           PD__CUDA_TRY_BLAS(c, cublasSetWorkspace(c->blas, c->blas_space, bytes)) &&
           PD__CUDA_TRY_BLAS(
               c, cublasSetMathMode(c->blas, opts && opts->tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH));
}

static bool pd__cuda_open(pd__cuda *c, const pd_cuda_opts *opts) {
    cudaDeviceProp properties;
    int count = 0;
    if (!PD__CUDA_TRY(c, cudaGetDeviceCount(&count))) return false;
    if (c->device < 0 || c->device >= count) {
        pd__cuda_fail(c, PD_E_ARGUMENT, __LINE__, "GPU %d: expected 0 to %d", c->device, count - 1);
        return false;
    }
    if (!PD__CUDA_TRY(c, cudaSetDevice(c->device)) ||
        !PD__CUDA_TRY(c, cudaGetDeviceProperties(&properties, c->device)) ||
        !PD__CUDA_TRY(c, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking)))
        return false;
    snprintf(c->name, sizeof c->name, "cuda %d: %.50s", c->device, properties.name);
    c->processors = properties.multiProcessorCount;
    for (int i = 0; i < PD__CUDA_PARTS; i++)
        if (!PD__CUDA_TRY(c, cudaEventCreateWithFlags(&c->taken[i], cudaEventDisableTiming))) return false;
    return PD__CUDA_TRY(c, cudaMallocHost((void **)&c->pinned, (size_t)PD__CUDA_PARTS * PD__CUDA_PART)) &&
           PD__CUDA_TRY(c, cudaMallocHost((void **)&c->answer, sizeof *c->answer)) && pd__cuda_open_blas(c, opts);
}

static void pd__cuda_close(pd__cuda *c) {
    cudaSetDevice(c->device);
    if (c->stream) cudaStreamSynchronize(c->stream);
    if (c->blas) cublasDestroy(c->blas);
    cudaFree(c->blas_space);
    for (int i = 0; i < PD__CUDA_SPACES; i++) cudaFree(c->spaces[i].memory);
    for (int i = 0; i < PD__CUDA_PARTS; i++)
        if (c->taken[i]) cudaEventDestroy(c->taken[i]);
    if (c->pinned) cudaFreeHost(c->pinned);
    if (c->answer) cudaFreeHost(c->answer);
    if (c->stream) cudaStreamDestroy(c->stream);
    cudaGetLastError();
    free(c);
}

pd_device *pd_cuda_new(int device, const pd_cuda_opts *opts, char *message, size_t size) {
    pd__cuda *c = (pd__cuda *)calloc(1, sizeof *c);
    if (!c) {
        snprintf(message, size, "out of memory for a device");
        return NULL;
    }
    c->device = device;
    c->synchronous = opts && opts->synchronous;
    c->work_space = opts && opts->work_space ? opts->work_space : (size_t)64 << 20;
    if (!pd__cuda_open(c, opts)) {
        snprintf(message, size, "no usable GPU: %s", c->failure.text);
        pd__cuda_close(c);
        return NULL;
    }
    pd__cuda_fill_table(&c->table);
    c->table.name = c->name;
    c->table.self = c;
    return &c->table;
}

void pd_cuda_free(pd_device *device) {
    if (device) pd__cuda_close((pd__cuda *)device->self);
}

#endif /* the implementation */

/*
   This software is available under two licences; choose the one you like.
   -----------------------------------------------------------------------------
   Licence A - MIT

   Copyright (c) 2026 the paddle.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
   of the Software, and to permit persons to whom the Software is furnished to do
   so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all
   copies or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
   SOFTWARE.
   -----------------------------------------------------------------------------
   Licence B - Public Domain (Unlicense, www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
   ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
   WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
