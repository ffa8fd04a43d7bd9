/* cuBLAS: a plain gemm that adds in double. */
#include "internal.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdio.h>
#include <algorithm>
#include <vector>

using namespace cuda_on_cpu;

struct cublasContext {
    int device;
    cudaStream_t stream;
    cublasMath_t math;
    cublasPointerMode_t pointers;
    char *workspace;
    size_t workspace_bytes;
};

namespace {

struct matrix {
    const char *name;
    char *data;
    cudaDataType type;
    int64_t ld, stride;
};

struct product {
    bool transpose_a, transpose_b, tf32;
    int64_t m, n, k, batch;
    double alpha, beta;
    matrix a, b, c;
};

size_t size_of(cudaDataType type) {
    switch (type) {
    case CUDA_R_64F: return 8;
    case CUDA_R_32F: return 4;
    case CUDA_R_16F:
    case CUDA_R_16BF: return 2;
    default: return 0;
    }
}

double get(const char *p, cudaDataType type) {
    switch (type) {
    case CUDA_R_64F: return *(const double *)p;
    case CUDA_R_32F: return *(const float *)p;
    case CUDA_R_16F: return __half2float(*(const __half *)p);
    default: return __bfloat162float(*(const __nv_bfloat16 *)p);
    }
}

void put(char *p, cudaDataType type, double value) {
    switch (type) {
    case CUDA_R_64F: *(double *)p = value; break;
    case CUDA_R_32F: *(float *)p = (float)value; break;
    case CUDA_R_16F: *(__half *)p = __float2half((float)value); break;
    default: *(__nv_bfloat16 *)p = __float2bfloat16((float)value);
    }
}

/* What a tensor core makes of its inputs: 10 bits after the point, to nearest. */
double to_tf32(double value) {
    uint32_t bits = bits_as<uint32_t>((float)value);
    if ((bits >> 23 & 255) != 255) bits += 0xfff + (bits >> 13 & 1);
    return bits_as<float>(bits & ~0x1fffu);
}

/* Bounds first, column by column for TSan. A matrix of rows x columns has `ld` between columns. */
void check(const matrix &x, int64_t rows, int64_t columns, int64_t batch, int device, bool written) {
    const int64_t size = (int64_t)size_of(x.type);
    if (!rows || !columns) return;
    for (int64_t i = 0; i < batch; i++) {
        char *p = x.data + i * x.stride * size, what[160];
        snprintf(what, sizeof what, "cublas gemm: %s of %lldx%lld, leading dimension %lld, number %lld of %lld", x.name,
                 (long long)rows, (long long)columns, (long long)x.ld, (long long)i, (long long)batch);
        check_device_range(what, p, (size_t)(((columns - 1) * x.ld + rows) * size), device);
        for (int64_t j = 0; j < columns; j++)
            if (written) note_write(p + j * x.ld * size, (size_t)(rows * size));
            else note_read(p + j * x.ld * size, (size_t)(rows * size));
    }
}

/* op(x), its columns one after the other. */
std::vector<double> unpack(const matrix &x, int64_t number, bool transposed, int64_t rows, int64_t columns, bool tf32) {
    std::vector<double> out((size_t)(rows * columns));
    const size_t size = size_of(x.type);
    const char *p = x.data + number * x.stride * (int64_t)size;
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) {
            const double value = get(p + (transposed ? i * x.ld + j : j * x.ld + i) * (int64_t)size, x.type);
            out[(size_t)(j * rows + i)] = tf32 ? to_tf32(value) : value;
        }
    return out;
}

void multiply(const product &q, int device) {
    const size_t size = size_of(q.c.type);
    const bool inputs = q.alpha != 0 && q.k > 0;
    if (inputs) {
        check(q.a, q.transpose_a ? q.k : q.m, q.transpose_a ? q.m : q.k, q.batch, device, false);
        check(q.b, q.transpose_b ? q.n : q.k, q.transpose_b ? q.k : q.n, q.batch, device, false);
    }
    check(q.c, q.m, q.n, q.batch, device, true);
    std::vector<double> column((size_t)q.m);
    for (int64_t number = 0; number < q.batch; number++) {
        std::vector<double> a, b;
        if (inputs) {
            a = unpack(q.a, number, q.transpose_a, q.m, q.k, q.tf32);
            b = unpack(q.b, number, q.transpose_b, q.k, q.n, q.tf32);
        }
        for (int64_t j = 0; j < q.n; j++) {
            std::fill(column.begin(), column.end(), 0.0);
            for (int64_t p = 0; inputs && p < q.k; p++) {
                const double factor = b[(size_t)(j * q.k + p)], *from = &a[(size_t)(p * q.m)];
                for (int64_t i = 0; i < q.m; i++) column[(size_t)i] += from[i] * factor;
            }
            for (int64_t i = 0; i < q.m; i++) {
                char *to = q.c.data + (number * q.c.stride + j * q.c.ld + i) * (int64_t)size;
                /* with beta 0, C may be anything, NaN too */
                const double old = q.beta != 0 ? q.beta * get(to, q.c.type) : 0;
                put(to, q.c.type, (inputs ? q.alpha * column[(size_t)i] : 0) + old);
            }
        }
    }
}

cublasStatus_t gemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, product q, const void *alpha,
                    const void *beta, cudaDataType scalars) {
    entry here;
    cudaError_t error;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!cublas_begins(&error)) return CUBLAS_STATUS_EXECUTION_FAILED;
    q.transpose_a = ta != CUBLAS_OP_N;
    q.transpose_b = tb != CUBLAS_OP_N;
    if (q.m < 0 || q.n < 0 || q.k < 0 || q.batch < 0 || q.a.ld < std::max<int64_t>(1, q.transpose_a ? q.k : q.m) ||
        q.b.ld < std::max<int64_t>(1, q.transpose_b ? q.n : q.k) || q.c.ld < std::max<int64_t>(1, q.m)) {
        complain("cublas gemm: %lldx%lldx%lld with leading dimensions %lld, %lld, %lld", (long long)q.m, (long long)q.n,
                 (long long)q.k, (long long)q.a.ld, (long long)q.b.ld, (long long)q.c.ld);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (!size_of(q.a.type) || !size_of(q.b.type) || !size_of(q.c.type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!q.m || !q.n || !q.batch) return CUBLAS_STATUS_SUCCESS;
    if (h->math == CUBLAS_TF32_TENSOR_OP_MATH && q.a.type == CUDA_R_32F) q.tf32 = true;
    const bool on_device = h->pointers == CUBLAS_POINTER_MODE_DEVICE;
    if (!on_device) q.alpha = get((const char *)alpha, scalars), q.beta = get((const char *)beta, scalars);
    enqueue_computation(h->stream, "cublas gemm",
                        [q, on_device, alpha, beta, scalars, device = h->device, workspace = h->workspace,
                         bytes = h->workspace_bytes]() mutable {
                            if (on_device) {
                                check_device_range("cublas gemm: alpha", alpha, size_of(scalars), device);
                                check_device_range("cublas gemm: beta", beta, size_of(scalars), device);
                                note_read(alpha, size_of(scalars));
                                note_read(beta, size_of(scalars));
                                q.alpha = get((const char *)alpha, scalars), q.beta = get((const char *)beta, scalars);
                            }
                            if (workspace) { /* cuBLAS may leave anything in it */
                                check_device_range("cublas gemm: workspace", workspace, bytes, device);
                                const size_t some = std::min<size_t>(bytes, 4096);
                                note_write(workspace, bytes);
                                memset(workspace, 0xFF, some);
                                memset(workspace + bytes - some, 0xFF, some);
                            }
                            multiply(q, device);
                        });
    return CUBLAS_STATUS_SUCCESS;
}

template <class T>
product operands(int64_t m, int64_t n, int64_t k, const T *a, int64_t lda, int64_t stride_a, const T *b, int64_t ldb,
                 int64_t stride_b, T *c, int64_t ldc, int64_t stride_c, int64_t batch) {
    const cudaDataType type = sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_64F;
    return { false,
             false,
             false,
             m,
             n,
             k,
             batch,
             0,
             0,
             { "A", (char *)a, type, lda, stride_a },
             { "B", (char *)b, type, ldb, stride_b },
             { "C", (char *)c, type, ldc, stride_c } };
}

} // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    entry here;
    cudaError_t error;
    int device = 0;
    if (!cublas_begins(&error)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (cudaGetDevice(&device)) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new cublasContext{ device, nullptr, CUBLAS_DEFAULT_MATH, CUBLAS_POINTER_MODE_HOST, nullptr, 0 };
    handle_lives(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t h) {
    entry here;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle_lives(-1);
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t stream) {
    entry here;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (stream && device_of_stream(stream) != h->device)
        fatal("cublasSetStream: a handle of device %d and a stream of device %d", h->device, device_of_stream(stream));
    h->stream = stream;
    h->workspace = nullptr; /* this call takes back cublasSetWorkspace */
    h->workspace_bytes = 0;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *workspace, size_t bytes) {
    entry here;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if ((uintptr_t)workspace % 256) return CUBLAS_STATUS_INVALID_VALUE;
    check_device_range("cublasSetWorkspace", workspace, bytes, h->device);
    h->workspace = (char *)workspace;
    h->workspace_bytes = bytes;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t mode) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    h->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t mode) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    h->pointers = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int *version) {
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusName(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_UNKNOWN";
    }
}

const char *cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

#define GEMM(letter, T, type)                                                                                          \
    cublasStatus_t cublas##letter##gemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, \
                                           int k, const T *alpha, const T *a, int lda, const T *b, int ldb,            \
                                           const T *beta, T *c, int ldc) {                                             \
        return gemm(h, ta, tb, operands(m, n, k, a, lda, 0, b, ldb, 0, c, ldc, 0, 1), alpha, beta, type);              \
    }                                                                                                                  \
    cublasStatus_t cublas##letter##gemmStridedBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,    \
                                                      int m, int n, int k, const T *alpha, const T *a, int lda,        \
                                                      long long stride_a, const T *b, int ldb, long long stride_b,     \
                                                      const T *beta, T *c, int ldc, long long stride_c, int batch) {   \
        return gemm(h, ta, tb, operands(m, n, k, a, lda, stride_a, b, ldb, stride_b, c, ldc, stride_c, batch), alpha,  \
                    beta, type);                                                                                       \
    }
GEMM(S, float, CUDA_R_32F)
GEMM(D, double, CUDA_R_64F)
#undef GEMM

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                          int k, const void *alpha, const void *a, cudaDataType type_a, int lda,
                                          long long stride_a, const void *b, cudaDataType type_b, int ldb,
                                          long long stride_b, const void *beta, void *c, cudaDataType type_c, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
    product q = { false,
                  false,
                  compute == CUBLAS_COMPUTE_32F_FAST_TF32,
                  m,
                  n,
                  k,
                  batch,
                  0,
                  0,
                  { "A", (char *)a, type_a, lda, stride_a },
                  { "B", (char *)b, type_b, ldb, stride_b },
                  { "C", (char *)c, type_c, ldc, stride_c } };
    switch (compute) {
    case CUBLAS_COMPUTE_32F:
    case CUBLAS_COMPUTE_32F_PEDANTIC:
    case CUBLAS_COMPUTE_32F_FAST_TF32: return gemm(h, ta, tb, q, alpha, beta, CUDA_R_32F);
    case CUBLAS_COMPUTE_64F:
    case CUBLAS_COMPUTE_64F_PEDANTIC: return gemm(h, ta, tb, q, alpha, beta, CUDA_R_64F);
    default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b,
                            cudaDataType type_b, int ldb, const void *beta, void *c, cudaDataType type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c,
                                      ldc, 0, 1, compute, algorithm);
}

} // extern "C"
