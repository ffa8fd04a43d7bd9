/* gemm.c - MIT-or-Unlicense - GFLOP/s of matrix products at the shapes of real nets, beside OpenBLAS's

   gemm [THREADS..] prints, for each number of threads (default 1 and 2), lines
       bench gemm-nn-512x512x512 threads 1 ours V GFLOP/s peer openblas V GFLOP/s ratio R
   for products of m x n x k (nn: A B, nt: A B^T, tn: A^T B), then the geometric means by kind and over all, the worst
   one, and what share of the fused multiply-adds that this machine can do the largest square product reaches. Without
   -DPEER_OPENBLAS the peer is left out. Which kernels either side takes is said first; PADDLE_SIMD and
   OPENBLAS_CORETYPE choose them. The sides take turns, in memory that they share, and their results are compared. */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef PEER_OPENBLAS
#ifdef PADDLE_DOUBLE
#error "OpenBLAS is called for floats"
#endif
#include <cblas.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { SAMPLES = 7, SIDES = 2, OURS = 0, PEER = 1 };
#ifdef PEER_OPENBLAS
enum { SIDES_HERE = 2 };
#else
enum { SIDES_HERE = 1 };
#endif
static const double sample_seconds = 0.05, shape_seconds = 6; /* at least, and about at most */

typedef struct product {
    const char *group;
    const char *form; /* "nn": A B, "nt": A B^T, "tn": A^T B */
    int m, n, k;
} product;

/* clang-format off */
#define ALL_FORMS(group, m, n, k) { group, "nn", m, n, k }, { group, "nt", m, n, k }, { group, "tn", m, n, k }
/* Forward, data gradient and weight gradient of a layer y = x W; W is in x out. */
#define FC(group, rows, in, out)                                                                                       \
    { group, "nn", rows, out, in }, { group, "nt", rows, in, out }, { group, "tn", in, out, rows }
/* The same of a convolution of one image, as products with its windows laid out in columns. */
#define CONV(filters, window, area)                                                                                    \
    { "conv", "nn", filters, area, window }, { "conv", "tn", window, area, filters },                                  \
    { "conv", "nt", filters, window, area }
static const product products[] = {
    ALL_FORMS("square", 128, 128, 128), ALL_FORMS("square", 256, 256, 256), ALL_FORMS("square", 512, 512, 512),
    ALL_FORMS("square", 1024, 1024, 1024), ALL_FORMS("square", 2048, 2048, 2048),
    FC("fc", 64, 9216, 4096), FC("fc", 64, 4096, 4096), FC("fc", 64, 4096, 1000), /* AlexNet, batch of 64 */
    CONV(96, 363, 3025), CONV(256, 2400, 729), CONV(384, 2304, 169), CONV(384, 3456, 169), CONV(256, 3456, 169),
    FC("lstm", 64, 512, 2048), FC("lstm", 64, 1024, 4096), /* the four gates of one step */
    FC("words", 64, 512, 10000),                           /* an output layer over 10,000 words */
    { "row", "nn", 1, 4096, 4096 }, { "row", "nn", 1, 4096, 9216 }, { "row", "nn", 1, 10000, 512 }, /* batch of 1 */
    { "row", "nt", 1, 4096, 4096 }, { "row", "nt", 1, 4096, 9216 }, { "row", "nt", 1, 10000, 512 },
};
/* clang-format on */
enum { PRODUCTS = sizeof products / sizeof *products };

static char simd[32]; /* " simd LEVEL" where PADDLE_SIMD holds ours to a level: a line says so */

static const char *name_of(const product *p, char *name, size_t size) {
    snprintf(name, size, "%s-%dx%dx%d", p->form, p->m, p->n, p->k);
    return name;
}

static double flops(const product *p) { return 2.0 * p->m * p->n * p->k; }

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- the machine's peak ---- */

/* Independent chains of fused multiply-adds in registers: more chains than latency times units. */
enum { CHAIN_COUNT = 12 };
#define FMA_LOOP(vector, set, fma, add, store, lanes)                                                                  \
    vector slope = set(0.999f), rise = set(0.001f);                                                                    \
    FMA_DECLARE(vector, set)                                                                                           \
    for (int64_t i = 0; i < count; i++) {                                                                              \
        FMA_STEP(fma)                                                                                                  \
    }                                                                                                                  \
    FMA_SUM(add)                                                                                                       \
    float sum[lanes];                                                                                                  \
    store(sum, c0);                                                                                                    \
    return sum[0]
#define FMA_DECLARE(vector, set)                                                                                       \
    vector c0 = set(0), c1 = set(1), c2 = set(2), c3 = set(3), c4 = set(4), c5 = set(5), c6 = set(6), c7 = set(7),     \
           c8 = set(8), c9 = set(9), c10 = set(10), c11 = set(11);
#define FMA_SUM(add)                                                                                                   \
    c0 = add(add(add(add(c0, c1), add(c2, c3)), add(add(c4, c5), add(c6, c7))), add(add(c8, c9), add(c10, c11)));

#if defined(__x86_64__) && defined(__GNUC__)
#define FMA_STEP(fma)                                                                                                  \
    c0 = fma(c0, slope, rise), c1 = fma(c1, slope, rise), c2 = fma(c2, slope, rise), c3 = fma(c3, slope, rise),        \
    c4 = fma(c4, slope, rise), c5 = fma(c5, slope, rise), c6 = fma(c6, slope, rise), c7 = fma(c7, slope, rise),        \
    c8 = fma(c8, slope, rise), c9 = fma(c9, slope, rise), c10 = fma(c10, slope, rise), c11 = fma(c11, slope, rise);
__attribute__((target("avx2,fma"))) static float fma_avx2(int64_t count) {
    FMA_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps, _mm256_storeu_ps, 8);
}
__attribute__((target("avx512f"))) static float fma_avx512(int64_t count) {
    FMA_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_storeu_ps, 16);
}
static float (*fma_choose(int *lanes, const char **name))(int64_t) {
    if (__builtin_cpu_supports("avx512f")) return *lanes = 16, *name = "avx512", fma_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *lanes = 8, *name = "avx2", fma_avx2;
    return NULL;
}
#elif defined(__aarch64__)
#define FMA_STEP(fma)                                                                                                  \
    c0 = fma(rise, c0, slope), c1 = fma(rise, c1, slope), c2 = fma(rise, c2, slope), c3 = fma(rise, c3, slope),        \
    c4 = fma(rise, c4, slope), c5 = fma(rise, c5, slope), c6 = fma(rise, c6, slope), c7 = fma(rise, c7, slope),        \
    c8 = fma(rise, c8, slope), c9 = fma(rise, c9, slope), c10 = fma(rise, c10, slope), c11 = fma(rise, c11, slope);
static float fma_neon(int64_t count) { FMA_LOOP(float32x4_t, vdupq_n_f32, vfmaq_f32, vaddq_f32, vst1q_f32, 4); }
static float (*fma_choose(int *lanes, const char **name))(int64_t) { return *lanes = 4, *name = "neon", fma_neon; }
#else
static float (*fma_choose(int *lanes, const char **name))(int64_t) { return (void)lanes, (void)name, NULL; }
#endif

/* GFLOP/s of `threads` threads that do nothing else: the best of some tries, since it is a bound. 0: not known. */
static double measure_peak(int threads, const char **name) {
    int lanes = 0;
    float (*run)(int64_t) = fma_choose(&lanes, name);
    double best = 0;
    const int64_t count = 20000000;
    for (int try = 0; run && try < 5; try++) {
        volatile float sink = 0;
        double start = pd_seconds();
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
        for (int t = 0; t < threads; t++) {
            float sum = run(count);
            if (sum < 0) sink = sum;
        }
        double rate = 2e-9 * (double)count * CHAIN_COUNT * lanes * threads / (pd_seconds() - start);
        if (rate > best) best = rate;
        (void)sink;
    }
    return best;
}

/* ---- the products ---- */

typedef struct bench {
    pd_device *device;
    pd_real *a, *b, *c[SIDES];
} bench;

static void run(const bench *s, const product *p, int side) {
    bool ta = p->form[0] == 't', tb = p->form[1] == 't';
    int lda = ta ? p->m : p->k, ldb = tb ? p->k : p->n;
    if (side == OURS) {
        s->device->gemm(s->device, ta, tb, p->m, p->n, p->k, 1, s->a, lda, s->b, ldb, 0, s->c[OURS], p->n, NULL);
        return;
    }
#ifdef PEER_OPENBLAS
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, p->m, p->n, p->k, 1,
                s->a, lda, s->b, ldb, 0, s->c[PEER], p->n);
#endif
}

static double time_of(const bench *s, const product *p, int side, int calls) {
    double start = pd_seconds();
    for (int i = 0; i < calls; i++) run(s, p, side);
    return (pd_seconds() - start) / calls;
}

/* Median seconds of one call of each side. */
static void measure(const bench *s, const product *p, double seconds[SIDES]) {
    double times[SIDES][SAMPLES], first[SIDES], both = 0;
    int calls[SIDES], samples = SAMPLES;
    for (int side = 0; side < SIDES_HERE; side++) {
        time_of(s, p, side, 1); /* touches the memory */
        first[side] = time_of(s, p, side, 1);
        calls[side] = first[side] < sample_seconds ? (int)(sample_seconds / first[side]) + 1 : 1;
        both += first[side] * calls[side];
    }
    if (both * samples > shape_seconds) samples = 3;
    for (int i = 0; i < samples; i++)
        for (int side = 0; side < SIDES_HERE; side++) times[side][i] = time_of(s, p, side, calls[side]);
    for (int side = 0; side < SIDES_HERE; side++) {
        qsort(times[side], (size_t)samples, sizeof times[side][0], compare);
        seconds[side] = times[side][samples / 2];
    }
}

/* Whether the two results are the same up to rounding; the inputs are between -1 and 1. */
static bool agree(const bench *s, const product *p) {
    double worst = 0, bound = 1e-5 * sqrt((double)p->k);
    for (int64_t i = 0; SIDES_HERE == 2 && i < (int64_t)p->m * p->n; i++)
        worst = fmax(worst, fabs((double)s->c[OURS][i] - (double)s->c[PEER][i]));
    if (worst <= bound) return true;
    fprintf(stderr, "gemm: %dx%dx%d: the results differ by %g\n", p->m, p->n, p->k, worst);
    return false;
}

static void print(const char *name, int threads, double ours, double peer, const char *rest) {
    printf("bench gemm-%s%s threads %d ours %.2f GFLOP/s", name, simd, threads, ours);
    if (peer > 0) printf(" peer openblas %.2f GFLOP/s ratio %.3f", peer, ours / peer);
    printf("%s\n", rest);
    fflush(stdout);
}

/* Geometric means over the products of a group, or of all. */
static void print_mean(const char *group, int threads, double (*rates)[SIDES]) {
    double logs[SIDES] = { 0, 0 };
    int count = 0;
    for (int i = 0; i < PRODUCTS; i++) {
        if (group && strcmp(group, products[i].group) != 0) continue;
        for (int side = 0; side < SIDES_HERE; side++) logs[side] += log(rates[i][side]);
        count++;
    }
    char name[64];
    snprintf(name, sizeof name, "geomean%s%s", group ? "-" : "", group ? group : "");
    print(name, threads, exp(logs[OURS] / count), SIDES_HERE == 2 ? exp(logs[PEER] / count) : 0, "");
}

static bool with_threads(int threads) {
    char text[512], name[96];
    double rates[PRODUCTS][SIDES];
    const char *fma = "";
    bool ok = true;
    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *any = pd_vector(net, "any", 1);
    if (!any) return pd_net_free(net), false;
    pd_info(net, text, sizeof text);
    printf("# ours: %s\n", text);
#ifdef PEER_OPENBLAS
    openblas_set_num_threads(threads);
    printf("# peer: %s, kernels for %s, %d threads\n", openblas_get_config(), openblas_get_corename(),
           openblas_get_num_threads());
#endif
    double peak = measure_peak(threads, &fma);

    bench s = { .device = any->device };
    int64_t a = 0, b = 0, c = 0;
    for (const product *p = products; p < products + PRODUCTS; p++) {
        if ((int64_t)p->m * p->k > a) a = (int64_t)p->m * p->k;
        if ((int64_t)p->k * p->n > b) b = (int64_t)p->k * p->n;
        if ((int64_t)p->m * p->n > c) c = (int64_t)p->m * p->n;
    }
    s.a = (pd_real *)s.device->alloc(s.device, (size_t)a * sizeof *s.a);
    s.b = (pd_real *)s.device->alloc(s.device, (size_t)b * sizeof *s.b);
    for (int side = 0; side < SIDES_HERE; side++)
        s.c[side] = (pd_real *)s.device->alloc(s.device, (size_t)c * sizeof *s.a);
    if (!s.a || !s.b || !s.c[OURS] || !s.c[SIDES_HERE - 1]) return fprintf(stderr, "gemm: out of memory\n"), false;
    for (int64_t i = 0; i < a; i++) s.a[i] = (pd_real)(pd_random(1, (uint64_t)i) >> 40) / (1 << 23) - 1;
    for (int64_t i = 0; i < b; i++) s.b[i] = (pd_real)(pd_random(2, (uint64_t)i) >> 40) / (1 << 23) - 1;

    int worst = 0, largest = 0;
    for (int i = 0; i < PRODUCTS; i++) {
        const product *p = &products[i];
        double seconds[SIDES] = { 0, 0 };
        measure(&s, p, seconds);
        ok = agree(&s, p) && ok;
        for (int side = 0; side < SIDES_HERE; side++) rates[i][side] = 1e-9 * flops(p) / seconds[side];
        print(name_of(p, name, sizeof name), threads, rates[i][OURS], SIDES_HERE == 2 ? rates[i][PEER] : 0, "");
        if (rates[i][OURS] * rates[worst][PEER] < rates[worst][OURS] * rates[i][PEER]) worst = i;
        if (strcmp(p->form, "nn") == 0 && p->m == 2048) largest = i;
    }
    for (int i = 0; i < PRODUCTS; i++)
        if (i == 0 || strcmp(products[i].group, products[i - 1].group) != 0)
            print_mean(products[i].group, threads, rates);
    print_mean(NULL, threads, rates);
    if (SIDES_HERE == 2) {
        snprintf(text, sizeof text, " at %s", name_of(&products[worst], name, sizeof name));
        print("worst", threads, rates[worst][OURS], rates[worst][PEER], text);
    }
    if (peak > 0) { /* again: a bound should not come from a moment when the machine was busy */
        double again = measure_peak(threads, &fma);
        if (again > peak) peak = again;
        printf("bench gemm-peak-share%s threads %d ours %.1f %%", simd, threads, 100 * rates[largest][OURS] / peak);
        if (SIDES_HERE == 2)
            printf(" peer openblas %.1f %% ratio %.3f", 100 * rates[largest][PEER] / peak,
                   rates[largest][OURS] / rates[largest][PEER]);
        printf(" of %.1f GFLOP/s %s\n", peak, fma);
    }
    s.device->free(s.device, s.a);
    s.device->free(s.device, s.b);
    for (int side = 0; side < SIDES_HERE; side++) s.device->free(s.device, s.c[side]);
    pd_net_free(net);
    return ok;
}

int main(int argc, char **argv) {
    bool ok = true;
    if (getenv("PADDLE_SIMD")) snprintf(simd, sizeof simd, " simd %.20s", getenv("PADDLE_SIMD"));
    for (int i = 1; i < argc; i++) {
        int threads = atoi(argv[i]);
        if (threads < 1) return fprintf(stderr, "usage: gemm [THREADS..]\n"), 2;
        ok = with_threads(threads) && ok;
    }
    for (int threads = 1; argc == 1 && threads <= 2; threads++) ok = with_threads(threads) && ok;
    return !ok;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
