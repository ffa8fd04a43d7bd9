/* The CPU device's operations at every instruction set of this machine against plain loops in double: within a bound on
   their rounding, the same bits for any number of threads, and nothing written or read beside what they are given. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "inside.h"
#include "support.h"

#define EPSILON (sizeof(pd_real) == 8 ? DBL_EPSILON : (double)FLT_EPSILON)
#define TINIEST (sizeof(pd_real) == 8 ? DBL_MIN : (double)FLT_MIN)
#define LARGEST (sizeof(pd_real) == 8 ? DBL_MAX : (double)FLT_MAX)

static const char *const level_names[PD_SIMD_COUNT] = { "best", "scalar", "baseline", "avx2", "avx512" };

/* ---- a net for every level that this machine has, and every number of threads ---- */

enum { TEAMS = 4 };
static const int teams[TEAMS] = { 1, 2, 3, 7 };
static pd_net *nets[PD_SIMD_COUNT][TEAMS]; /* NULL: this machine lacks the level */

static int make_nets(void **state) {
    (void)state;
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++)
        for (int t = 0; t < TEAMS; t++) {
            pd_net *net = pd_net_new(&(pd_net_opts){ .simd = (pd_simd)level, .threads = teams[t] });
            if (net && pd_error_status(net) != PD_OK) {
                pd_net_free(net);
                net = NULL;
            }
            nets[level][t] = net;
        }
    return 0;
}

/* ---- one call of an operation: what goes in, what must come out ---- */

enum { INPUTS = 7, OUTPUTS = 4, GUARD = 17 };

typedef struct job {
    char what[240];
    void (*run)(pd_device *d, const struct job *j);
    const void *args;
    pd_real *in[INPUTS], *out[OUTPUTS]; /* `out`, only while it runs; NULL: not wanted */
    int64_t count[OUTPUTS];
    pd_real *first[OUTPUTS];                /* what the outputs hold before */
    double *want[OUTPUTS], *slack[OUTPUTS]; /* what they must hold after, and by how much it may be missed */
} job;

static void *kept[64]; /* memory of the case at hand */
static int kept_count;

static void *keep(int64_t count, size_t size) {
    assert_true(kept_count < 64);
    kept[kept_count] = calloc((size_t)(count > 0 ? count : 1), size);
    assert_non_null(kept[kept_count]);
    return kept[kept_count++];
}
static void forget(void) {
    while (kept_count > 0) free(kept[--kept_count]);
}

/* The next case. */
static void begin(uint64_t seed) {
    forget();
    random_seed(seed);
}

static int free_nets(void **state) {
    (void)state;
    forget();
    for (int level = 0; level < PD_SIMD_COUNT; level++)
        for (int t = 0; t < TEAMS; t++) pd_net_free(nets[level][t]);
    return 0;
}

/* Memory that ends where the numbers end, so that sanitizers see who goes on, and begins anywhere. */
static pd_real *numbers(int64_t count, double low, double high) {
    int64_t offset = below(4);
    pd_real *x = (pd_real *)malloc((size_t)(offset + count) * sizeof *x + (offset + count == 0));
    assert_true(x && kept_count < 64);
    kept[kept_count++] = x;
    for (int64_t i = 0; i < offset; i++) x[i] = (pd_real)NAN;
    x += offset;
    for (int64_t i = 0; i < count; i++) x[i] = (pd_real)uniform(low, high);
    return x;
}

/* Output k, which holds random numbers; unless more is said, they must stay. */
static pd_real *output(job *j, int k, int64_t count, double low, double high) {
    j->first[k] = numbers(count, low, high);
    j->count[k] = count;
    j->want[k] = (double *)keep(count, sizeof(double));
    j->slack[k] = (double *)keep(count, sizeof(double));
    for (int64_t i = 0; i < count; i++) j->want[k][i] = (double)j->first[k][i];
    return j->first[k];
}

/* The bound on a sum: of `terms` products whose absolute values sum up to `size`; after Higham and Mary 2019. */
static double sum_slack(double terms, double size) { return EPSILON * (4 + 2 * sqrt(terms)) * size; }

static bool agrees(double got, double want, double slack) {
    if (want != want) return got != got;
    if (fabs(want) > LARGEST) return got == (want > 0 ? (double)INFINITY : -(double)INFINITY);
    return fabs(got - want) <= slack + (slack > 0 ? 2 * TINIEST : 0);
}

static void check_output(const job *j, int k, const pd_real *got, const char *level, int threads) {
    for (int64_t i = 0; i < j->count[k]; i++)
        if (!agrees((double)got[i], j->want[k][i], j->slack[k][i]))
            fail_msg("%s, %s, %d threads: number %lld of output %d: got %.17g, expected %.17g +- %g (seed %llu)",
                     j->what, level, threads, (long long)i, k, (double)got[i], j->want[k][i], j->slack[k][i],
                     (unsigned long long)random_key);
}

/* Runs the job at every level: with some number of threads, or with all numbers of threads, which must give the same
   bits. `same`: so must the levels. */
static void check(const job *given, bool all_teams, bool same) {
    pd_real *bits[OUTPUTS] = { NULL };
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++) {
        int chosen = all_teams ? -1 : (int)below(TEAMS);
        for (int t = 0; t < TEAMS; t++) {
            pd_real *block[OUTPUTS] = { NULL };
            int64_t before = below(4), after = below(2) * GUARD; /* numbers around that nobody may write */
            pd_device *d;
            char message[100];
            job j = *given;
            if ((chosen >= 0 && t != chosen) || !nets[level][t]) continue;
            d = inside_device(nets[level][t]);
            inside_set_team(d, teams[t]); /* on a busy machine it may have gone on with fewer */
            for (int k = 0; k < OUTPUTS; k++) {
                if (!j.first[k]) continue;
                block[k] = (pd_real *)malloc((size_t)(before + j.count[k] + after + 1) * sizeof(pd_real));
                assert_non_null(block[k]);
                /* the one number more lies in front, so that the end is the end where `after` is 0 */
                for (int64_t i = 0; i <= before; i++) block[k][i] = 77;
                j.out[k] = block[k] + before + 1;
                memcpy(j.out[k], j.first[k], (size_t)j.count[k] * sizeof(pd_real));
                for (int64_t i = 0; i < after; i++) j.out[k][j.count[k] + i] = 77;
            }
            j.run(d, &j);
            assert_int_equal(d->wait(d, message, sizeof message), PD_OK);
            for (int k = 0; k < OUTPUTS; k++) {
                bool clean = true;
                size_t size = (size_t)j.count[k] * sizeof(pd_real);
                if (!j.first[k]) continue;
                check_output(&j, k, j.out[k], level_names[level], teams[t]);
                for (int64_t i = 0; i <= before; i++) clean = clean && block[k][i] == 77;
                for (int64_t i = 0; i < after; i++) clean = clean && j.out[k][j.count[k] + i] == 77;
                if (!clean)
                    fail_msg("%s, %s: wrote outside of output %d (seed %llu)", j.what, level_names[level], k,
                             (unsigned long long)random_key);
                if (bits[k] && memcmp(bits[k], j.out[k], size) != 0)
                    fail_msg("%s, %s: output %d has other bits with %d threads than with 1 (seed %llu)", j.what,
                             level_names[level], k, teams[t], (unsigned long long)random_key);
                if (!bits[k] && (all_teams || same)) {
                    bits[k] = (pd_real *)malloc(size + 1);
                    assert_non_null(bits[k]);
                    memcpy(bits[k], j.out[k], size);
                }
                free(block[k]);
            }
        }
        for (int k = 0; k < OUTPUTS && !same; k++) {
            free(bits[k]);
            bits[k] = NULL;
        }
    }
    for (int k = 0; k < OUTPUTS; k++) free(bits[k]);
}

/* "name(1 2 3)" */
static void describe(job *j, const char *name, const int64_t *sizes, int count) {
    int length = snprintf(j->what, sizeof j->what, "%s(", name);
    for (int i = 0; i < count; i++)
        length +=
            snprintf(j->what + length, sizeof j->what - (size_t)length, i ? " %lld" : "%lld", (long long)sizes[i]);
    snprintf(j->what + length, sizeof j->what - (size_t)length, ")");
}

/* A whole number from low to high. */
static int64_t whole(int64_t low, int64_t high) { return low + below(high - low + 1); }
static bool chance(double probability) { return uniform(0, 1) < probability; }
static pd_real either_sign(double low, double high) {
    return (pd_real)(chance(0.5) ? uniform(low, high) : -uniform(low, high));
}

static void test_levels(void **state) {
    const char *asked = getenv("PADDLE_SIMD");
    (void)state;
    for (int t = 0; t < TEAMS; t++) {
        assert_non_null(nets[PD_SIMD_SCALAR][t]);
#if defined(__GNUC__)
        assert_non_null(nets[PD_SIMD_BASELINE][t]);
#endif
        /* A machine with a level has those below. */
        for (int level = PD_SIMD_BASELINE; level < PD_SIMD_COUNT; level++)
            assert_true(nets[level - 1][t] || !nets[level][t]);
    }
    /* Nor is a level left out that the tests are to be run with. */
    for (int level = PD_SIMD_SCALAR; asked && level < PD_SIMD_COUNT; level++)
        if (strcmp(asked, level_names[level]) == 0) assert_non_null(nets[level][0]);
}

/* ---- gemm ---- */

typedef struct gemm_args {
    bool ta, tb;
    int64_t m, n, k, lda, ldb, ldc;
    pd_real alpha, beta;
    const pd_epilogue *after;
    bool kept;
} gemm_args;

/* Any epilogue, or none: NULL. */
static const pd_epilogue *any_epilogue(int64_t channels) {
    static const pd_act acts[] = { PD_LINEAR, PD_LINEAR, PD_RELU, PD_RELU, PD_LEAKY_RELU, PD_BRELU, PD_SQUARE };
    pd_epilogue *e;
    if (chance(0.4)) return NULL;
    e = (pd_epilogue *)keep(1, sizeof *e);
    e->scale = chance(0.5) ? numbers(channels, -2, 2) : NULL;
    e->center = chance(0.3) ? numbers(channels, -2, 2) : NULL;
    e->bias = chance(0.6) ? numbers(channels, -2, 2) : NULL;
    e->act = acts[below(COUNT(acts))];
    e->alpha = (pd_real)(chance(0.5) ? uniform(0.1, 1) : e->act == PD_BRELU ? 24 : 0.01);
    return e;
}

/* What an epilogue makes of a sum that may be missed by *slack. */
static double finished(const pd_epilogue *e, int64_t channel, double sum, double *slack) {
    double alpha;
    if (!e) return sum;
    alpha = (double)e->alpha;
    if (e->center)
        sum -= (double)e->center[channel], *slack += 2 * EPSILON * (fabs(sum) + fabs((double)e->center[channel]));
    if (e->scale) sum *= (double)e->scale[channel], *slack *= fabs((double)e->scale[channel]);
    if (e->bias) sum += (double)e->bias[channel];
    *slack += 2 * EPSILON * fabs(sum);
    switch (e->act) {
    case PD_RELU: return sum > 0 ? sum : 0;
    case PD_LEAKY_RELU: return sum > 0 ? sum : alpha * sum;
    case PD_BRELU: return sum > alpha ? alpha : sum > 0 ? sum : 0;
    case PD_SQUARE: *slack = 2 * fabs(sum) * *slack + *slack * *slack + EPSILON * sum * sum; return sum * sum;
    default: return sum;
    }
}

static void run_gemm(pd_device *d, const job *j) {
    const gemm_args *g = (const gemm_args *)j->args;
    if (g->kept) d->freeze(d, j->in[1], true);
    for (int i = 0; i < (g->kept ? 2 : 1); i++) /* the second time what was packed is there */
        d->gemm(d, g->ta, g->tb, g->m, g->n, g->k, g->alpha, j->in[0], g->lda, j->in[1], g->ldb, g->beta, j->out[0],
                g->ldc, g->after);
    if (g->kept) d->freeze(d, j->in[1], false);
}

static int64_t matrix_size(int64_t rows, int64_t columns, int64_t ld) {
    return rows > 0 && columns > 0 ? (rows - 1) * ld + columns : 0;
}

static void check_gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, bool all_teams) {
    gemm_args g = { ta, tb, m, n, k, 0, 0, 0, 0, 0, NULL, false };
    job j = { .run = run_gemm, .args = &g };
    int64_t sizes[8] = { ta, tb, m, n, k };
    double *sum, *size;
    g.lda = (ta ? m : k) + below(3) * below(9);
    g.ldb = (tb ? k : n) + below(3) * below(9);
    g.ldc = n + below(3) * below(9);
    g.alpha = chance(0.5) ? 1 : (pd_real)uniform(-2, 2);
    g.beta = chance(0.3) ? 0 : chance(0.4) ? 1 : (pd_real)uniform(-2, 2);
    g.after = any_epilogue(n);
    g.kept = g.beta == 0 && chance(0.5);
    sizes[5] = g.lda, sizes[6] = g.ldb, sizes[7] = g.ldc;
    describe(&j, "gemm", sizes, 8);
    j.in[0] = numbers(ta ? matrix_size(k, m, g.lda) : matrix_size(m, k, g.lda), -1, 1);
    j.in[1] = numbers(tb ? matrix_size(n, k, g.ldb) : matrix_size(k, n, g.ldb), -1, 1);
    output(&j, 0, matrix_size(m, n, g.ldc), -1, 1);
    sum = (double *)keep(n, sizeof *sum);
    size = (double *)keep(n, sizeof *size);
    for (int64_t r = 0; r < m; r++) {
        memset(sum, 0, (size_t)n * sizeof *sum);
        memset(size, 0, (size_t)n * sizeof *size);
        for (int64_t p = 0; p < k; p++) {
            double a = (double)j.in[0][ta ? p * g.lda + r : r * g.lda + p];
            for (int64_t c = 0; c < n; c++) {
                double v = a * (double)j.in[1][tb ? c * g.ldb + p : p * g.ldb + c];
                sum[c] += v;
                size[c] += fabs(v);
            }
        }
        for (int64_t c = 0; c < n; c++) {
            int64_t i = r * g.ldc + c;
            double before = g.beta == 0 ? 0 : (double)g.beta * (double)j.first[0][i];
            j.want[0][i] = (double)g.alpha * sum[c] + before;
            j.slack[0][i] = sum_slack((double)k, fabs((double)g.alpha) * size[c] + fabs(before));
            j.want[0][i] = finished(g.after, c, j.want[0][i], &j.slack[0][i]);
            if (g.beta == 0) j.first[0][i] = (pd_real)NAN; /* must not be read */
        }
    }
    check(&j, all_teams, false);
}

/* Sizes at which tiles and blocks end, or nearly. */
static int64_t edge_size(void) {
    static const int64_t multiples[] = { 4, 6, 8, 14, 16, 24, 32, 48, 64 };
    static const int64_t primes[] = { 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67 };
    if (chance(0.1)) return 1;
    if (chance(0.3)) return primes[below(COUNT(primes))];
    return whole(1, 2) * multiples[below(COUNT(multiples))] + whole(-1, 1);
}
static int64_t edge_depth(void) {
    static const int64_t depths[] = { 0, 1, 2, 255, 256, 257, 300, 511, 512, 513, 769 };
    return chance(0.4) ? depths[below(COUNT(depths))] : edge_size();
}

static void test_gemm(void **state) {
    (void)state;
    for (int i = 0; i < rounds(320); i++) {
        int64_t m, n, k;
        begin((uint64_t)(1000 + i));
        do m = edge_size(), n = edge_size(), k = edge_depth();
        while (m * n * k > 150000);
        if (i % 40 == 0) m = 1, n = whole(1, 70), k = whole(1000, 2000);
        if (i % 40 == 10) n = 1, m = whole(1, 70), k = whole(1000, 2000);
        if (i % 40 == 20) m = n = 1, k = whole(1000, 5000);
        if (i % 80 == 30) m = 0;
        if (i % 80 == 70) n = 0;
        check_gemm(i & 1, i & 2, m, n, k, false);
    }
}

static void test_gemm_teams(void **state) {
    static const int64_t shapes[][3] = { { 100, 90, 101 }, { 1, 700, 1100 }, { 900, 1, 1000 }, { 345, 40, 60 },
                                         { 13, 2100, 30 }, { 40, 37, 700 },  { 7, 131, 900 },  { 1, 1, 600000 },
                                         { 171, 170, 30 }, { 500, 1100, 1 } };
    (void)state;
    for (int i = 0; i < 2 * COUNT(shapes); i++) {
        const int64_t *s = shapes[i / 2];
        if (!chosen()) continue;
        begin((uint64_t)(2000 + i));
        if (i % 2) check_gemm(true, i & 4, s[0], s[1], s[2], true);
        else check_gemm(false, !(i & 4), s[0], s[1], s[2], true);
    }
}

/* ---- convolutions ---- */

typedef struct conv_args {
    const pd_conv_shape *s;
    pd_real beta;
    const pd_epilogue *after;
    bool kept;
} conv_args;

static void run_conv(pd_device *d, const job *j) {
    const conv_args *a = (const conv_args *)j->args;
    if (a->kept) d->freeze(d, j->in[1], true);
    for (int i = 0; i < (a->kept ? 2 : 1); i++) d->conv(d, a->s, j->in[0], j->in[1], a->beta, j->out[0], a->after);
    if (a->kept) d->freeze(d, j->in[1], false);
}
static void run_conv_backward_data(pd_device *d, const job *j) {
    d->conv_backward_data(d, ((const conv_args *)j->args)->s, j->in[1], j->in[2], j->out[0]);
}
static void run_conv_backward_filter(pd_device *d, const job *j) {
    d->conv_backward_filter(d, ((const conv_args *)j->args)->s, j->in[0], j->in[2], j->out[0]);
}

/* Calls visit for every product of the convolution: with the places in x, w and y. */
static void each_product(const pd_conv_shape *s, void (*visit)(void *to, int64_t x, int64_t w, int64_t y), void *to) {
    int64_t channels = s->in_c / s->groups, filters = s->out_c / s->groups, y = 0;
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t f = 0; f < s->out_c; f++)
            for (int64_t oh = 0; oh < s->out_h; oh++)
                for (int64_t ow = 0; ow < s->out_w; ow++, y++)
                    for (int64_t c = 0; c < channels; c++)
                        for (int64_t i = 0; i < s->filter_h; i++)
                            for (int64_t k = 0; k < s->filter_w; k++) {
                                int64_t h = oh * s->stride_h - s->pad_h + i * s->dilation_h;
                                int64_t w = ow * s->stride_w - s->pad_w + k * s->dilation_w;
                                int64_t channel = f / filters * channels + c;
                                if (h < 0 || h >= s->in_h || w < 0 || w >= s->in_w) continue;
                                visit(to, ((row * s->in_c + channel) * s->in_h + h) * s->in_w + w,
                                      ((f * channels + c) * s->filter_h + i) * s->filter_w + k, y);
                            }
}

static void visit_conv(void *to, int64_t x, int64_t w, int64_t y) {
    job *jobs = (job *)to; /* of the forward pass, the data's and the filters' gradient */
    double a = (double)jobs->in[0][x], b = (double)jobs->in[1][w], dy = (double)jobs->in[2][y];
    jobs[0].want[0][y] += a * b, jobs[0].slack[0][y] += fabs(a * b);
    jobs[1].want[0][x] += b * dy, jobs[1].slack[0][x] += fabs(b * dy);
    jobs[2].want[0][w] += a * dy, jobs[2].slack[0][w] += fabs(a * dy);
}

static void check_conv(const pd_conv_shape *s, bool all_teams) {
    static const char *const names[3] = { "conv", "conv_backward_data", "conv_backward_filter" };
    int64_t window = s->filter_h * s->filter_w, area = s->out_h * s->out_w;
    int64_t sizes[3] = { s->rows * s->out_c * area, s->rows * s->in_c * s->in_h * s->in_w,
                         s->out_c * (s->in_c / s->groups) * window };
    int64_t terms[3] = { s->in_c / s->groups * window, s->out_c / s->groups * window, s->rows * area };
    const int64_t shape[15] = { s->rows,     s->in_c,  s->in_h,     s->in_w,       s->out_c,
                                s->out_h,    s->out_w, s->filter_h, s->filter_w,   s->stride_h,
                                s->stride_w, s->pad_h, s->pad_w,    s->dilation_h, s->groups };
    conv_args args = { s, 0, NULL, false };
    job jobs[3];
    memset(jobs, 0, sizeof jobs);
    args.beta = chance(0.4) ? 0 : chance(0.5) ? 1 : (pd_real)uniform(-2, 2);
    args.after = any_epilogue(s->out_c);
    args.kept = args.beta == 0 && chance(0.5);
    jobs[0].run = run_conv;
    jobs[1].run = run_conv_backward_data;
    jobs[2].run = run_conv_backward_filter;
    for (int k = 0; k < 3; k++) {
        describe(&jobs[k], names[k], shape, 15);
        jobs[k].args = &args;
        output(&jobs[k], 0, sizes[k], -1, 1);
        jobs[k].in[0] = k ? jobs->in[0] : numbers(sizes[1], -1, 1);
        jobs[k].in[1] = k ? jobs->in[1] : numbers(sizes[2], -1, 1);
        jobs[k].in[2] = k ? jobs->in[2] : numbers(sizes[0], -1, 1);
        for (int64_t i = 0; i < sizes[k]; i++) {
            if (k == 0) jobs[k].want[0][i] *= (double)args.beta;
            if (k == 0 && args.beta == 0) jobs[k].first[0][i] = (pd_real)NAN; /* must not be read */
            jobs[k].slack[0][i] = fabs(jobs[k].want[0][i]);
        }
    }
    each_product(s, visit_conv, jobs);
    for (int k = 0; k < 3; k++) {
        double size = 0;
        for (int64_t i = 0; i < sizes[k]; i++) size = fmax(size, jobs[k].slack[0][i]);
        for (int64_t i = 0; i < sizes[k]; i++) /* Winograd's share the rounding of their tiles */
            jobs[k].slack[0][i] = sum_slack((double)terms[k], inside_winograd_fits(s) ? size : jobs[k].slack[0][i]);
    }
    for (int64_t i = 0; i < sizes[0]; i++)
        jobs[0].want[0][i] = finished(args.after, i / area % s->out_c, jobs[0].want[0][i], &jobs[0].slack[0][i]);
    for (int k = 0; k < 3; k++) check(&jobs[k], all_teams, false);
}

static void set_outputs(pd_conv_shape *s) {
    s->out_h = (s->in_h + 2 * s->pad_h - (s->filter_h - 1) * s->dilation_h - 1) / s->stride_h + 1;
    s->out_w = (s->in_w + 2 * s->pad_w - (s->filter_w - 1) * s->dilation_w - 1) / s->stride_w + 1;
}

static int64_t conv_work(const pd_conv_shape *s) {
    return s->rows * s->out_c * s->out_h * s->out_w * (s->in_c / s->groups) * s->filter_h * s->filter_w;
}

static pd_conv_shape random_conv(int kind) {
    for (;;) {
        pd_conv_shape s;
        int64_t channels = whole(1, 6), filters = chance(0.3) ? whole(1, 40) : whole(1, 9), side = whole(1, 14);
        s.rows = whole(0, 5);
        s.one_answer = chance(0.2);
        s.groups = chance(0.5) ? 1 : whole(2, 4);
        s.filter_h = whole(1, 5), s.filter_w = whole(1, 5);
        s.stride_h = whole(1, 3), s.stride_w = whole(1, 3);
        s.pad_h = below(4), s.pad_w = below(4);
        s.dilation_h = whole(1, 3), s.dilation_w = whole(1, 3);
        s.in_h = chance(0.5) ? side : whole(1, 14), s.in_w = side;
        switch (kind) {
        case 0: /* 1x1 filters */
            s.filter_h = s.filter_w = s.stride_h = s.stride_w = 1, s.pad_h = s.pad_w = 0;
            channels = whole(1, 40);
            break;
        case 1: /* depthwise */ channels = 1, s.groups = whole(2, 12), filters = whole(1, 2); break;
        case 2: /* images smaller than a vector */ s.in_h = whole(1, 3), s.in_w = whole(1, 3); break;
        case 3: /* one number each */
            s.in_h = s.in_w = 1, s.rows = whole(1, 40);
            if (chance(0.5)) s.filter_h = s.filter_w = 1, s.pad_h = s.pad_w = 0;
            break;
        case 4: /* areas larger than a block of the sum */
            s.in_h = whole(16, 24), s.in_w = whole(17, 24), s.stride_h = s.stride_w = 1, s.rows = whole(1, 2);
            channels = whole(1, 2), filters = whole(1, 5);
            break;
        case 5: /* depths larger than one */ channels = whole(60, 90), s.in_h = s.in_w = whole(1, 5); break;
        case 6: /* and the same with many filters */ filters = whole(250, 280), s.groups = 1, s.in_h = 3; break;
        case 7: /* what is common */
            s.groups = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
            s.filter_h = s.filter_w = whole(1, 2) * 2 + 1, s.pad_h = s.pad_w = s.filter_h / 2;
            break;
        case 8: /* Winograd's */
            s.filter_h = s.filter_w = 3, s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
            s.pad_h = below(3), s.pad_w = below(3), s.in_h = whole(1, 20), s.in_w = whole(1, 40), s.rows = whole(1, 5);
            s.groups = whole(1, 2), channels = whole(20, 50), filters = whole(20, 50);
            if (chance(0.5)) break;
            s.in_h = whole(1, 10), s.in_w = whole(1, 18), s.rows = whole(6, 36); /* many small images */
            s.groups = 1, channels = whole(12, 30), filters = whole(12, 30);
            break;
        default: break;
        }
        s.in_c = channels * s.groups, s.out_c = filters * s.groups;
        if (s.in_h + 2 * s.pad_h <= (s.filter_h - 1) * s.dilation_h) continue;
        if (s.in_w + 2 * s.pad_w <= (s.filter_w - 1) * s.dilation_w) continue;
        set_outputs(&s);
        if (kind == 8 ? inside_winograd_fits(&s) && conv_work(&s) <= 6000000 : conv_work(&s) <= 120000) return s;
    }
}

static void test_conv(void **state) {
    (void)state;
    for (int i = 0; i < rounds(250); i++) {
        pd_conv_shape s;
        if (!chosen()) continue;
        begin((uint64_t)(3000 + i));
        s = random_conv(i % 10);
        check_conv(&s, false);
    }
}

static void test_conv_teams(void **state) {
    /* rows, in_c, in_h, in_w, outputs, filter_h, filter_w, stride, pad, dilation, groups */
    static const int64_t shapes[][11] = {
        { 9, 8, 12, 12, 16, 3, 3, 1, 1, 1, 1 },   { 1, 16, 24, 24, 20, 3, 3, 1, 1, 1, 1 },
        { 2, 64, 4, 4, 128, 3, 3, 1, 1, 1, 1 },   { 3, 12, 23, 21, 12, 5, 3, 1, 2, 1, 2 },
        { 4, 24, 31, 29, 24, 3, 3, 1, 1, 1, 24 }, { 2, 20, 41, 42, 9, 1, 1, 1, 0, 1, 1 },
        { 40, 260, 1, 1, 64, 3, 3, 1, 1, 1, 1 },  { 2, 10, 29, 31, 7, 4, 4, 2, 3, 2, 1 },
        { 1, 2, 60, 65, 3, 3, 3, 1, 0, 1, 1 },    { 37, 8, 5, 5, 8, 3, 3, 1, 1, 1, 2 },
        { 3, 28, 15, 21, 47, 3, 3, 1, 1, 1, 1 },  { 2, 76, 14, 15, 80, 3, 3, 1, 2, 1, 2 },
        { 1, 40, 12, 12, 70, 3, 3, 1, 1, 1, 1 },  { 50, 57, 3, 3, 90, 3, 3, 1, 1, 1, 1 },
        { 1, 56, 26, 27, 64, 3, 3, 1, 1, 1, 1 },  { 3, 60, 10, 9, 72, 3, 3, 1, 1, 1, 1 },
        { 1, 64, 7, 9, 260, 3, 3, 1, 1, 1, 1 },   { 1, 6, 40, 41, 24, 5, 5, 2, 2, 1, 1 },
        { 1, 3, 47, 45, 16, 11, 11, 4, 1, 1, 1 }, { 1, 18, 21, 20, 12, 5, 4, 3, 1, 2, 2 },
    };
    (void)state;
    for (int i = 0; i < COUNT(shapes); i++) {
        const int64_t *n = shapes[i];
        if (!chosen()) continue;
        pd_conv_shape s = { n[0], n[1], n[2], n[3], n[4], 0,    0,     n[5], n[6],
                            n[7], n[7], n[8], n[8], n[9], n[9], n[10], false };
        set_outputs(&s);
        begin((uint64_t)(4000 + i));
        check_conv(&s, true);
    }
}

/* ---- fill, contract, sums of squares, sparse products ---- */

/* Of operations on vectors and on rows. */
typedef struct flat_args {
    int64_t n[5];
    double f[3];
    pd_real alpha;
    int flag;
    const int64_t *ids;
} flat_args;

static void run_fill(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->fill(d, a->n[0], a->alpha, j->out[0]);
}

static void test_fill(void **state) {
    (void)state;
    for (int64_t n = 0; n <= 72; n++) {
        flat_args a = { .n = { n < 71 ? n : 70000 + n } };
        job j = { .run = run_fill, .args = &a };
        begin((uint64_t)(5000 + n));
        a.alpha = (pd_real)uniform(-1, 1);
        describe(&j, "fill", a.n, 1);
        output(&j, 0, a.n[0], -1, 1);
        for (int64_t i = 0; i < a.n[0]; i++) j.want[0][i] = (double)a.alpha;
        check(&j, n >= 71, true);
    }
}

typedef struct contract_args {
    int64_t size[4], as[4], bs[4], ys[4];
    pd_real alpha;
} contract_args;

static void run_contract(pd_device *d, const job *j) {
    const contract_args *a = (const contract_args *)j->args;
    d->contract(d, a->size, a->alpha, j->in[0], a->as, j->in[1], a->bs, j->out[0], a->ys);
}

/* Strides of the box's axes in any order, with gaps, and 0 for some; returns the numbers needed. */
static int64_t random_strides(const int64_t size[4], double zero, int64_t strides[4]) {
    int order[4] = { 0, 1, 2, 3 };
    int64_t stride = chance(0.8) ? 1 : 2, count = 1;
    if (chance(0.5))
        for (int i = 3; i > 0; i--) {
            int other = (int)below(i + 1), t = order[i];
            order[i] = order[other], order[other] = t;
        }
    for (int i = 3; i >= 0; i--) {
        int axis = order[i];
        strides[axis] = 0;
        if (chance(zero)) continue;
        strides[axis] = stride;
        count += (size[axis] > 0 ? size[axis] - 1 : 0) * stride;
        stride *= size[axis] > 0 ? size[axis] : 1;
        if (chance(0.2)) stride += below(3);
    }
    return count;
}

static void check_contract(contract_args *a, const int64_t counts[3], bool with_b, bool all_teams) {
    job j = { .run = run_contract, .args = a };
    int64_t shape[16];
    double *terms;
    for (int i = 0; i < 4; i++)
        shape[i] = a->size[i], shape[4 + i] = a->as[i], shape[8 + i] = with_b ? a->bs[i] : -1, shape[12 + i] = a->ys[i];
    describe(&j, "contract", shape, 16);
    a->alpha = chance(0.3) ? 1 : (pd_real)uniform(-2, 2);
    j.in[0] = numbers(counts[0], -1, 1);
    j.in[1] = with_b ? numbers(counts[1], -1, 1) : NULL;
    output(&j, 0, counts[2], -1, 1);
    terms = (double *)keep(counts[2], sizeof *terms);
    for (int64_t p = 0; p < a->size[0]; p++)
        for (int64_t q = 0; q < a->size[1]; q++)
            for (int64_t r = 0; r < a->size[2]; r++)
                for (int64_t s = 0; s < a->size[3]; s++) {
                    int64_t ai = p * a->as[0] + q * a->as[1] + r * a->as[2] + s * a->as[3];
                    int64_t bi = p * a->bs[0] + q * a->bs[1] + r * a->bs[2] + s * a->bs[3];
                    int64_t yi = p * a->ys[0] + q * a->ys[1] + r * a->ys[2] + s * a->ys[3];
                    double v = (double)a->alpha * (double)j.in[0][ai] * (with_b ? (double)j.in[1][bi] : 1);
                    if (terms[yi]++ == 0) j.slack[0][yi] = fabs(j.want[0][yi]);
                    j.want[0][yi] += v;
                    j.slack[0][yi] += fabs(v);
                }
    /* Small boxes repeat the same numbers, whose roundings need not cancel each other. */
    for (int64_t i = 0; i < counts[2]; i++)
        j.slack[0][i] = all_teams ? sum_slack(terms[i], j.slack[0][i]) : EPSILON * (4 + terms[i]) * j.slack[0][i];
    check(&j, all_teams, false);
}

static void test_contract(void **state) {
    /* size, then strides of a, b and y: sums of columns, of rows, broadcast, transposed, a long vector */
    static const contract_args known[] = {
        { { 1, 1, 700, 101 }, { 0, 0, 101, 1 }, { 0, 0, 0, 0 }, { 0, 0, 0, 1 }, 0 },
        { { 1, 1, 101, 700 }, { 0, 0, 700, 1 }, { 0, 0, 700, 1 }, { 0, 0, 1, 0 }, 0 },
        { { 1, 1, 700, 101 }, { 0, 0, 0, 1 }, { 0, 0, 1, 0 }, { 0, 0, 101, 1 }, 0 },
        { { 1, 3, 160, 150 }, { 0, 24000, 1, 160 }, { 0, 0, 0, 0 }, { 0, 24000, 150, 1 }, 0 },
        { { 1, 1, 1, 70001 }, { 0, 0, 0, 1 }, { 0, 0, 0, 1 }, { 0, 0, 0, 1 }, 0 },
        { { 1, 1, 1, 70001 }, { 0, 0, 0, 1 }, { 0, 0, 0, 1 }, { 0, 0, 0, 0 }, 0 },
        { { 5, 17, 31, 29 }, { 15283, 899, 29, 1 }, { 0, 1, 0, 0 }, { 0, 1, 0, 0 }, 0 },
    };
    (void)state;
    for (int i = 0; i < rounds(400); i++) {
        contract_args a;
        int64_t counts[3];
        begin((uint64_t)(6000 + i));
        do
            for (int k = 0; k < 4; k++) a.size[k] = chance(0.02) ? 0 : chance(0.4) ? 1 : whole(1, k == 3 ? 70 : 12);
        while (a.size[0] * a.size[1] * a.size[2] * a.size[3] > 8000);
        counts[0] = random_strides(a.size, 0.15, a.as);
        counts[1] = random_strides(a.size, 0.4, a.bs);
        counts[2] = random_strides(a.size, 0.25, a.ys);
        check_contract(&a, counts, chance(0.6), false);
    }
    for (int i = 0; i < 2 * COUNT(known); i++) {
        contract_args a = known[i / 2];
        int64_t counts[3] = { 1, 1, 1 };
        begin((uint64_t)(6500 + i));
        for (int k = 0; k < 4; k++) {
            counts[0] += (a.size[k] - 1) * a.as[k];
            counts[1] += (a.size[k] - 1) * a.bs[k];
            counts[2] += (a.size[k] - 1) * a.ys[k];
        }
        check_contract(&a, counts, i % 2, true);
    }
}

static void test_norm(void **state) {
    static const double scales[] = { 1, sizeof(pd_real) == 4 ? 1e38 : 1e160, sizeof(pd_real) == 4 ? 1e-18 : 1e-150,
                                     1e-3 };
    (void)state;
    for (int n = 0; n < 300; n++) {
        int64_t count = n < 280 ? n / 4 : n < 298 ? 100 * n - 27990 : 250 * n;
        double sum = 0, one = 0, scale = scales[n % 4];
        pd_real *x;
        begin((uint64_t)(7000 + n));
        x = numbers(count, -scale, scale);
        for (int64_t i = 0; i < count; i++) sum += (double)x[i] / scale * ((double)x[i] / scale);
        sum = sqrt(sum) * scale;
        for (int level = 0; level < PD_SIMD_COUNT; level++)
            for (int t = 0; t < TEAMS; t++) {
                pd_device *d = nets[level][t] ? inside_device(nets[level][t]) : NULL;
                double got = d ? d->norm(d, count, x) : sum;
                if (t == 0) one = got;
                if (!(fabs(got - sum) <= 1e-13 * sum) || memcmp(&got, &one, sizeof got) != 0)
                    fail_msg("norm(%lld), %s, %d threads: got %.17g, expected %.17g, with 1 thread %.17g",
                             (long long)count, level_names[level], teams[t], got, sum, one);
                /* not finite if and only if some number isn't */
                for (int k = 0; d && count > 0 && t == 0 && k < 4; k++) {
                    int64_t i = below(count);
                    pd_real before = x[i];
                    x[i] = (pd_real)(k == 0           ? NAN
                                     : k == 1         ? INFINITY
                                     : k == 2         ? -INFINITY
                                     : sizeof *x == 4 ? 3e38
                                                      : 1.7e308);
                    got = d->norm(d, count, x);
                    assert_true((got - got == 0) == (k == 3));
                    x[i] = before;
                }
            }
    }
}

static void run_sparse_product(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    pd_csr s = { a->n[0], NULL, NULL, j->in[1] };
    s.starts = a->flag ? a->ids : NULL;
    s.columns = a->flag ? a->ids + a->n[0] + 1 : a->ids;
    d->sparse_product(d, &s, a->n[1], j->in[0], j->out[0]);
}

static void test_sparse_product(void **state) {
    (void)state;
    for (int i = 0; i < rounds(100); i++) {
        bool big = i >= 97;
        begin((uint64_t)(8000 + i));
        int64_t rows = big ? 300 : whole(0, 12), width = big ? whole(60, 70) : whole(1, 70), table = whole(1, 20);
        int64_t entries = 0, *ids = (int64_t *)keep(rows + 1 + rows * 8, sizeof *ids);
        flat_args a = { .n = { rows, width, table } };
        job j = { .run = run_sparse_product, .args = &a };
        describe(&j, "sparse_product", a.n, 3);
        a.ids = ids;
        a.flag = big || chance(0.7);
        if (a.flag)
            for (int64_t r = 0; r < rows; r++) ids[r + 1] = entries += big ? 7 : below(8);
        else entries = rows;
        for (int64_t k = 0; k < entries; k++) ids[(a.flag ? rows + 1 : 0) + k] = below(table);
        j.in[0] = numbers(table * width, -1, 1);
        j.in[1] = chance(0.6) ? numbers(entries, -1, 1) : NULL;
        output(&j, 0, rows * width, -1, 1);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < width; c++) {
                int64_t o = r * width + c, first = a.flag ? ids[r] : r, end = a.flag ? ids[r + 1] : r + 1;
                double size = fabs(j.want[0][o]);
                for (int64_t k = first; k < end; k++) {
                    double v = (double)j.in[0][ids[(a.flag ? rows + 1 : 0) + k] * width + c];
                    if (j.in[1]) v *= (double)j.in[1][k];
                    j.want[0][o] += v;
                    size += fabs(v);
                }
                j.slack[0][o] = sum_slack((double)(end - first), size);
            }
        check(&j, big, false);
    }
}

/* ---- activations ---- */

static double activation(pd_act act, double alpha, double x) {
    switch (act) {
    case PD_RELU: return x < 0 ? 0 : x;
    case PD_BRELU: return x < 0 ? 0 : x > alpha ? alpha : x;
    case PD_SOFTRELU: return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
    case PD_LEAKY_RELU: return x < 0 ? alpha * x : x;
    case PD_GELU: return x < -40 ? 0 : x * erfc(-x / sqrt(2.0)) / 2;
    case PD_SIGMOID: return 1 / (1 + exp(-x));
    case PD_TANH: return tanh(x);
    case PD_STANH: return 1.7159 * tanh(2.0 / 3.0 * x);
    case PD_EXP: return exp(x);
    case PD_LOG: return log(x);
    case PD_ABS: return fabs(x);
    case PD_SQUARE: return x * x;
    case PD_SQRT: return sqrt(x);
    case PD_RECIPROCAL: return 1 / x;
    default: return x;
    }
}

/* The derivative, from the output where pd_device says so; *size, where parts of it cancel, of the larger one. */
static double derivative(pd_act act, double alpha, double x, double y, double *size) {
    *size = 0;
    switch (act) {
    case PD_RELU: return y > 0;
    case PD_BRELU: return y > 0 && y < alpha;
    case PD_SOFTRELU: return -expm1(-y);
    case PD_LEAKY_RELU: return y < 0 ? alpha : 1;
    case PD_GELU:
        if (fabs(x) > 40) return x > 0;
        y = x * exp(-x * x / 2) / sqrt(2 * 3.14159265358979324);
        *size = (1 + x * x) * fabs(y);
        return erfc(-x / sqrt(2.0)) / 2 + y;
    case PD_SIGMOID: return y * (1 - y);
    case PD_TANH: *size = 1; return 1 - y * y;
    case PD_STANH: *size = 2; return 2.0 / 3.0 / 1.7159 * (1.7159 * 1.7159 - y * y);
    case PD_EXP: return y;
    case PD_LOG: return 1 / x;
    case PD_ABS: return x > 0 ? 1 : x < 0 ? -1 : 0;
    case PD_SQUARE: return 2 * x;
    case PD_SQRT: return y == 0 ? 0 : 0.5 / y;
    case PD_RECIPROCAL: return -y * y;
    default: return 1;
    }
}

static void run_activate(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->activate(d, (pd_act)a->flag, a->alpha, a->n[0], a->n[1], j->in[0] ? j->in[0] : j->out[0], j->out[0]);
}
static void run_activate_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->activate_backward(d, (pd_act)a->flag, a->alpha, a->n[0], a->n[1], j->in[0], j->in[1], j->out[0]);
}

static pd_real argument(void) {
    static const double special[] = { 0.0,      -0.0,  1,   -1,        1e-30, -1e-30, 20,       -20,
                                      88,       -88,   100, -100,      1000,  -1000,  1e10,     -1e10,
                                      0.999999, -1e-6, 24,  1.0000001, NAN,   NAN,    INFINITY, -INFINITY };
    if (chance(0.3)) return (pd_real)special[below(COUNT(special))];
    return (pd_real)(chance(0.5) ? uniform(-1, 1) : uniform(-12, 12));
}

static void check_activation(pd_act act, int64_t rows, int64_t width, bool all_teams) {
    flat_args a = { .n = { rows, width, act }, .flag = (int)act };
    job j = { .run = run_activate, .args = &a };
    int64_t n = rows * width;
    pd_real *x, *y;
    double alpha;
    a.alpha = (pd_real)(chance(0.5) ? uniform(0.05, 5) : act == PD_BRELU ? 24 : 0.01);
    alpha = (double)a.alpha;
    describe(&j, "activate", a.n, 3);
    output(&j, 0, n, -1, 1);
    x = numbers(n, -1, 1);
    for (int64_t i = 0; i < n; i++) x[i] = argument();
    if (chance(0.5)) j.in[0] = x;
    else memcpy(j.first[0], x, (size_t)n * sizeof *x); /* in place */
    for (int64_t i = 0; i < n; i++) {
        double v = (double)x[i];
        j.want[0][i] = activation(act, alpha, v);
        j.slack[0][i] = 8 * EPSILON * fabs(j.want[0][i]) * (act == PD_GELU && fabs(v) < 40 ? 1 + v * v : 1) + TINIEST;
    }
    check(&j, all_teams, false);

    memset(&j, 0, sizeof j);
    j.run = run_activate_backward;
    j.args = &a;
    describe(&j, "activate_backward", a.n, 3);
    output(&j, 0, n, -1, 1);
    x = numbers(n, -1, 1);
    y = numbers(n, -1, 1);
    for (int64_t i = 0; i < n; i++) {
        double size;
        do x[i] = argument(); /* derivatives at NaN are nobody's business */
        while (!(x[i] == x[i]) || !(activation(act, alpha, (double)x[i]) == activation(act, alpha, (double)x[i])));
        y[i] = (pd_real)activation(act, alpha, (double)x[i]);
        j.first[0][i] = chance(0.05) ? (pd_real)NAN : either_sign(0.1, 1);
        if (chance(0.1)) j.first[0][i] = 0; /* which stays, even where the slope is infinite */
        j.want[0][i] = (double)j.first[0][i] * derivative(act, alpha, (double)x[i], (double)y[i], &size);
        if (j.first[0][i] == 0) j.want[0][i] = 0;
        j.slack[0][i] = 8 * EPSILON * (fabs(j.want[0][i]) + size * fabs((double)j.first[0][i])) + TINIEST;
    }
#define ONLY_IF_NEEDED(name, text, needs)                                                                              \
    if (act == name) j.in[0] = strcmp(#needs, "PD__FROM_X") == 0 ? x : NULL;
    PD_ACTIVATIONS(ONLY_IF_NEEDED)
#undef ONLY_IF_NEEDED
    j.in[1] = y;
    check(&j, all_teams, false);
}

static void test_activations(void **state) {
    (void)state;
    for (int act = 0; act < PD_ACT_COUNT; act++) {
        if (act == PD_LINEAR || act == PD_SOFTMAX) continue; /* linear layers don't call it; softmax is below */
        for (int64_t n = 1; n <= 70; n++) {
            begin((uint64_t)(9000 + 100 * act + n));
            check_activation((pd_act)act, n % 5 == 0 ? 5 : 1, n % 5 == 0 ? n / 5 : n, false);
        }
        begin((uint64_t)(9000 + 100 * act));
        check_activation((pd_act)act, 7, 5003, true);
    }
}

static void check_softmax(int64_t rows, int64_t width, double range, bool odd, bool all_teams) {
    flat_args a = { .n = { rows, width }, .flag = PD_SOFTMAX };
    job j = { .run = run_activate, .args = &a };
    int64_t n = rows * width;
    double offset = chance(0.5) ? 0 : uniform(-range, range);
    double sums = 2 * DBL_EPSILON * sqrt((double)width); /* both sums are of doubles */
    pd_real *y;
    describe(&j, "softmax", a.n, 2);
    output(&j, 0, n, -range + offset, range + offset);
    if (odd)
        for (int64_t r = 0; r < rows; r++)
            j.first[0][r * width + below(width)] = (pd_real)(chance(0.5) ? -INFINITY : chance(0.5) ? NAN : INFINITY);
    if (chance(0.5)) {
        j.in[0] = numbers(n, 0, 0);
        memcpy(j.in[0], j.first[0], (size_t)n * sizeof(pd_real));
    }
    for (int64_t r = 0; r < rows; r++) {
        const pd_real *x = j.first[0] + r * width;
        double top = (double)x[0], sum = 0;
        for (int64_t i = 0; i < width; i++) top = (double)x[i] > top ? (double)x[i] : top;
        for (int64_t i = 0; i < width; i++) sum += exp((double)x[i] - top);
        for (int64_t i = 0; i < width; i++) {
            double below_top = fmin(top - (double)x[i], 1000), want = exp((double)x[i] - top) / sum;
            j.want[0][r * width + i] = want;
            j.slack[0][r * width + i] = EPSILON * (8 + 2 * below_top) * want + sums * want + 2 * TINIEST;
        }
    }
    check(&j, all_teams, false);

    memset(&j, 0, sizeof j);
    j.run = run_activate_backward;
    j.args = &a;
    describe(&j, "softmax backward", a.n, 2);
    output(&j, 0, n, -1, 1);
    j.in[1] = y = numbers(n, 0, 1);
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0, dot = 0, size = 0;
        for (int64_t i = r * width; i < (r + 1) * width; i++) sum += (double)y[i];
        for (int64_t i = r * width; i < (r + 1) * width; i++) {
            y[i] = (pd_real)((double)y[i] / sum);
            dot += (double)y[i] * (double)j.first[0][i];
            size += fabs((double)y[i] * (double)j.first[0][i]);
        }
        for (int64_t i = r * width; i < (r + 1) * width; i++) {
            double g = (double)j.first[0][i];
            j.want[0][i] = (double)y[i] * (g - dot);
            j.slack[0][i] = sum_slack((double)width, (double)y[i] * (fabs(g) + size));
        }
    }
    check(&j, all_teams, false);
}

static void test_softmax(void **state) {
    static const double ranges[] = { 1, 10, 100, 1e4, 1e30 };
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(11000 + i));
        check_softmax(whole(1, 9), 1 + i % 70, ranges[i % COUNT(ranges)], i % 7 == 6, false);
    }
    for (int i = 0; i < 3; i++) {
        begin((uint64_t)(11500 + i));
        check_softmax(i == 0 ? 3 : 70, i == 0 ? 12001 : 501 + i, 5, false, true);
    }
}

/* ---- optimizers ---- */

typedef struct update_args {
    pd_update u;
    int64_t n, count;
    const unsigned char *mask;
    const int64_t *rows, *state_rows;
    const double *carry;
} update_args;

static void run_update(pd_device *d, const job *j) {
    const update_args *a = (const update_args *)j->args;
    d->update(d, &a->u, a->n, j->out[0], j->in[0], a->mask, j->out + 1);
}

/* One number's step: w and its states s become the new ones, and size[k] is about the largest number in what made each. */
static void step(const pd_update *u, double given, double *w, double s[3], double size[4]) {
    const pd_optimizer *o = &u->optimizer;
    bool decoupled = o->kind == PD_OPT_ADAMW;
    double g = u->scale * given, bound = fabs(g), r = u->rate, move = 0, decay, before = *w, old[3];
    if (u->clip > 0) g = fmin(fmax(g, -u->clip), u->clip);
    decay = decoupled ? 0 : u->l2 * *w;
    g += decay;
    bound += fabs(decay);
    memcpy(old, s, sizeof old);
    for (int k = 0; k < 4; k++) size[k] = 0;
    switch (o->kind) {
    case PD_OPT_SGD: move = -r * g; break;
    case PD_OPT_MOMENTUM:
        s[0] = o->momentum * old[0] - r * g;
        size[1] = fabs(old[0]) + r * bound;
        size[0] = size[1];
        move = o->nesterov ? o->momentum * s[0] - r * g : s[0];
        break;
    case PD_OPT_ADAGRAD:
        s[0] = old[0] + g * g;
        move = -r * g / (sqrt(s[0]) + o->epsilon);
        break;
    case PD_OPT_ADADELTA: {
        double delta;
        s[0] = o->rho * old[0] + (1 - o->rho) * g * g;
        delta = -sqrt(old[1] + o->epsilon) / sqrt(s[0] + o->epsilon) * g;
        s[1] = o->rho * old[1] + (1 - o->rho) * delta * delta;
        move = r * delta;
        break;
    }
    case PD_OPT_RMSPROP: {
        double a = s[0] = o->rho * old[0] + (1 - o->rho) * g * g;
        if (o->centered) {
            s[2] = o->rho * old[2] + (1 - o->rho) * g;
            size[3] = fabs(old[2]) + bound;
            a -= s[2] * s[2];
        }
        move = -r * g / (sqrt(a) + o->epsilon);
        if (o->momentum > 0) {
            size[2] = fabs(old[1]) + fabs(move);
            move = s[1] = o->momentum * old[1] + move;
            size[0] = size[2];
        }
        break;
    }
    case PD_OPT_DECAYED_ADAGRAD:
        s[0] = o->rho * old[0] + (1 - o->rho) * g * g;
        move = -r * g / sqrt(s[0] + o->epsilon);
        break;
    case PD_OPT_ADAM:
    case PD_OPT_ADAMW:
        s[0] = o->beta1 * old[0] + (1 - o->beta1) * g;
        s[1] = o->beta2 * old[1] + (1 - o->beta2) * g * g;
        size[1] = fabs(old[0]) + bound;
        move = -r * (s[0] / (1 - pow(o->beta1, (double)u->step))) /
               (sqrt(s[1] / (1 - pow(o->beta2, (double)u->step))) + o->epsilon);
        if (fabs(s[0]) > 0) size[0] = fabs(move) * size[1] / fabs(s[0]);
        if (decoupled) move -= r * u->l2 * before;
        break;
    case PD_OPT_ADAMAX:
        s[0] = o->beta1 * old[0] + (1 - o->beta1) * g;
        s[1] = fmax(o->beta2 * old[1], fabs(g) + o->epsilon);
        size[1] = fabs(old[0]) + bound;
        move = -r / (1 - pow(o->beta1, (double)u->step)) * s[0] / s[1];
        if (fabs(s[0]) > 0) size[0] = fabs(move) * size[1] / fabs(s[0]);
        break;
    case PD_OPT_COUNT: break;
    }
    /* what the gradient lost when l2 was added */
    if (fabs(g) > 0) size[0] += fabs(move) * bound / fabs(g);
    size[0] += fabs(before) + fabs(move);
    for (int k = 0; k < 3; k++) size[k + 1] += fabs(s[k]) * (fabs(g) > 0 ? 1 + bound / fabs(g) : 1);
    *w = before + move;
    if (*w > r * u->l1) *w -= r * u->l1;
    else if (*w < -r * u->l1) *w += r * u->l1;
    else *w = 0;
}

static pd_optimizer optimizer_of(int kind) {
    pd_optimizer o;
    switch (kind) {
    case 0: return pd_sgd(uniform(0.001, 0.5));
    case 1: return pd_momentum(uniform(0.001, 0.5), uniform(0, 0.99));
    case 2: return pd_nesterov(uniform(0.001, 0.5), uniform(0, 0.99));
    case 3: return pd_adagrad(uniform(0.001, 0.5));
    case 4: return pd_adadelta(uniform(0.5, 1));
    case 5: return pd_rmsprop(uniform(0.001, 0.5));
    case 6:
        o = pd_rmsprop(uniform(0.001, 0.1));
        o.centered = true;
        return o;
    case 7:
        o = pd_rmsprop(uniform(0.001, 0.1));
        o.centered = chance(0.5);
        o.momentum = 0.9;
        return o;
    case 8: return pd_decayed_adagrad(uniform(0.001, 0.5));
    case 9: return pd_adam(uniform(0.001, 0.1));
    case 10: return pd_adamw(uniform(0.001, 0.1));
    default: return pd_adamax(uniform(0.001, 0.1));
    }
}
enum { OPTIMIZERS = 12 };

static pd_update random_update(int kind) {
    pd_update u;
    memset(&u, 0, sizeof u);
    u.optimizer = optimizer_of(kind);
    u.rate = u.optimizer.rate * uniform(0.5, 2);
    u.scale = uniform(0.01, 1);
    u.clip = chance(0.5) ? 0 : uniform(0.01, 0.5);
    u.l1 = chance(0.5) ? 0 : uniform(0, 0.1);
    u.l2 = chance(0.5) ? 0 : uniform(0, 0.1);
    u.step = whole(1, 50);
    return u;
}

static void check_update(int kind, int64_t n, bool all_teams) {
    update_args a;
    job j = { .run = run_update, .args = &a };
    int64_t shape[2] = { kind, n };
    int states;
    unsigned char *mask = (unsigned char *)keep(n, 1);
    memset(&a, 0, sizeof a);
    a.u = random_update(kind);
    a.n = n;
    states = pd_optimizer_states(&a.u.optimizer);
    describe(&j, "update", shape, 2);
    if (chance(0.5)) a.mask = mask;
    j.in[0] = numbers(n, -2, 2);
    output(&j, 0, n, -1, 1);
    /* means of squares; but the first state is a mean, and small, where there are two moments or momentum */
    for (int k = 0; k < states; k++) output(&j, 1 + k, n, 0.5, 1.5);
    for (int64_t i = 0; i < n; i++) {
        bool mean_first = (kind >= 9 || kind == 1 || kind == 2) && states > 0;
        double w = (double)j.first[0][i], s[3] = { 0, 0, 0 }, size[4];
        mask[i] = chance(0.8);
        if (mean_first) j.first[1][i] = (pd_real)uniform(-0.3, 0.3);
        if (kind == 7) j.first[2][i] = (pd_real)uniform(-0.3, 0.3);
        if (a.u.optimizer.centered) j.first[3][i] = (pd_real)uniform(-0.3, 0.3);
        for (int k = 0; k < states; k++) s[k] = (double)j.first[1 + k][i];
        step(&a.u, (double)j.in[0][i], &w, s, size);
        if (a.mask && !mask[i]) w = size[0] = 0;
        j.want[0][i] = w;
        j.slack[0][i] = 8 * EPSILON * size[0];
        for (int k = 0; k < states; k++) j.want[1 + k][i] = s[k], j.slack[1 + k][i] = 8 * EPSILON * size[1 + k];
        if (a.u.optimizer.centered && kind == 6) j.slack[2][i] = 0; /* no momentum: not touched */
        if (a.u.optimizer.centered && kind == 6) j.want[2][i] = (double)j.first[2][i];
    }
    check(&j, all_teams, false);
}

static void test_update(void **state) {
    (void)state;
    for (int kind = 0; kind < OPTIMIZERS; kind++) {
        for (int i = 1; i <= 40; i++) {
            begin((uint64_t)(13000 + 100 * kind + i));
            check_update(kind, i, false);
        }
        begin((uint64_t)(13000 + 100 * kind));
        check_update(kind, 20011, true);
    }
}

static void run_update_rows(pd_device *d, const job *j) {
    const update_args *a = (const update_args *)j->args;
    d->update_rows(d, &a->u, a->count, a->n, a->rows, a->state_rows, a->carry, j->out[0], j->in[0], j->out[1]);
}

static void test_update_rows(void **state) {
    (void)state;
    for (int i = 0; i < rounds(90); i++) {
        bool big = i >= 87;
        begin((uint64_t)(15000 + i));
        int64_t count = big ? 300 : whole(0, 9), width = big ? 67 : whole(1, 70), table = count + whole(1, 9);
        int64_t shape[3] = { count, width, i % 3 };
        int64_t *rows = (int64_t *)keep(count, sizeof *rows), *state_rows = (int64_t *)keep(count, sizeof *rows);
        double *carry = (double *)keep(4 * count, sizeof *carry);
        update_args a;
        job j = { .run = run_update_rows, .args = &a };
        memset(&a, 0, sizeof a);
        a.u = random_update(i % 3);
        a.u.l1 = 0;
        a.n = width, a.count = count, a.rows = rows, a.state_rows = state_rows;
        a.carry = chance(0.6) ? carry : NULL;
        describe(&j, "update_rows", shape, 3);
        if (!a.carry || chance(0.7)) j.in[0] = numbers(count * width, -2, 2);
        output(&j, 0, table * width, -1, 1);
        if (i % 3) output(&j, 1, table * width, -1, 1);
        for (int64_t k = 0; k < 4 * count; k++) /* sgd has no state that could move a number */
            carry[k] = i % 3 == 0 && k % 4 == 1 ? 0 : uniform(-1, 1);
        for (int64_t k = 0; k < count; k++) { /* no row twice; the states' order is another */
            rows[k] = table - 1 - k;
            state_rows[k] = (k + 1) % count;
            for (int64_t c = 0; c < width; c++) {
                int64_t at = rows[k] * width + c, state_at = state_rows[k] * width + c;
                double w = j.want[0][at], s[3] = { i % 3 ? j.want[1][state_at] : 0, 0, 0 }, size[4] = { 0, 0, 0, 0 };
                double old_w = w, old_s = s[0], *x = carry + 4 * k;
                if (a.carry) w = x[0] * old_w + x[1] * old_s, s[0] = x[2] * old_w + x[3] * old_s;
                if (j.in[0]) step(&a.u, (double)j.in[0][k * width + c], &w, s, size);
                j.want[0][at] = w;
                j.slack[0][at] = 16 * EPSILON * (size[0] + fabs(old_w) + fabs(old_s));
                if (i % 3) j.want[1][state_at] = s[0];
                if (i % 3) j.slack[1][state_at] = 16 * EPSILON * (size[1] + fabs(old_w) + fabs(old_s));
            }
        }
        check(&j, big, false);
    }
}

static void run_gather_rows(pd_device *d, const job *j) {
    const update_args *a = (const update_args *)j->args;
    d->gather_rows(d, a->count, a->n, a->rows, a->state_rows, a->carry, j->in[0], j->in[1], j->out[0]);
}

/* Rows twice too; and those that come once are, to the bit, what update_rows makes of them in place. */
static void test_gather_rows(void **state) {
    (void)state;
    for (int i = 0; i < rounds(90); i++) {
        bool big = i >= 87;
        begin((uint64_t)(15500 + i));
        int64_t count = big ? 300 : whole(0, 9), width = big ? 67 : whole(1, 70), table = count + whole(1, 9);
        int64_t shape[3] = { count, width, i % 3 };
        int64_t *rows = (int64_t *)keep(count, sizeof *rows), *state_rows = (int64_t *)keep(count, sizeof *rows);
        double *carry = (double *)keep(4 * count, sizeof *carry);
        update_args a;
        job j = { .run = run_gather_rows, .args = &a };
        memset(&a, 0, sizeof a);
        a.n = width, a.count = count, a.rows = rows, a.state_rows = state_rows;
        a.carry = i % 3 ? carry : NULL;
        describe(&j, "gather_rows", shape, 3);
        j.in[0] = numbers(table * width, -1, 1);
        if (i % 3 != 1) j.in[1] = numbers(table * width, -1, 1);
        output(&j, 0, count * width, -1, 1);
        for (int64_t k = 0; k < 4 * count; k++) carry[k] = uniform(-1, 1);
        for (int64_t k = 0; k < count; k++) {
            rows[k] = i % 2 ? table - 1 - k : below(table);
            state_rows[k] = i % 2 ? (k + 1) % count : below(table);
            for (int64_t c = 0; c < width; c++) {
                double w = (double)j.in[0][rows[k] * width + c];
                double s = j.in[1] ? (double)j.in[1][state_rows[k] * width + c] : 0;
                j.want[0][k * width + c] = a.carry ? carry[4 * k] * w + carry[4 * k + 1] * s : w;
                j.slack[0][k * width + c] = a.carry ? 16 * EPSILON : 0;
            }
        }
        check(&j, big, false);
    }
}

static void test_gathered_as_updated(void **state) {
    enum { ROWS = 7, WIDTH = 45 };
    pd_update u = random_update(1);
    int64_t rows[ROWS], state_rows[ROWS];
    double carry[4 * ROWS];
    (void)state;
    begin(15600);
    for (int k = 0; k < ROWS; k++) rows[k] = (k + 3) % ROWS, state_rows[k] = k;
    for (int k = 0; k < 4 * ROWS; k++) carry[k] = uniform(-1, 1);
    for (int level = 0; level < PD_SIMD_COUNT; level++) {
        pd_device *d = nets[level][0] ? inside_device(nets[level][0]) : NULL;
        pd_real *w = numbers(ROWS * WIDTH, -1, 1), *s = numbers(ROWS * WIDTH, -1, 1), y[ROWS * WIDTH];
        if (!d) continue;
        d->gather_rows(d, ROWS, WIDTH, rows, state_rows, carry, w, s, y);
        d->update_rows(d, &u, ROWS, WIDTH, rows, state_rows, carry, w, NULL, s);
        for (int k = 0; k < ROWS; k++)
            assert_memory_equal(y + k * WIDTH, w + rows[k] * WIDTH, WIDTH * sizeof *y);
    }
}

/* ---- dropout ---- */

static void run_dropout(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->dropout(d, a->n[0], (uint64_t)a->n[1], a->f[0], j->in[0], j->out[0]);
}

static void test_dropout(void **state) {
    (void)state;
    for (int i = 0; i < rounds(150); i++) {
        flat_args a = { .n = { i < 70 ? i + 1 : i < 148 ? 37 * i : 70000 + i, i } };
        job j = { .run = run_dropout, .args = &a };
        bool zeros = i % 2 == 0; /* then all levels round in the same way, and must have the same bits */
        double kept_numbers = 0;
        begin((uint64_t)(16000 + i));
        a.f[0] = i % 10 == 9 ? 0 : uniform(0.05, 0.95);
        describe(&j, "dropout", a.n, 2);
        j.in[0] = numbers(a.n[0], 0.5, 1);
        output(&j, 0, a.n[0], zeros ? 0 : -1, zeros ? 0 : 1);
        for (int64_t k = 0; k < a.n[0]; k++) {
            double random = (double)(pd_random((uint64_t)a.n[1], (uint64_t)k) >> 11) / 9007199254740992.0;
            double v = (double)j.in[0][k] / (1 - a.f[0]);
            if (random < a.f[0]) continue;
            kept_numbers++;
            j.slack[0][k] = 4 * EPSILON * (fabs(j.want[0][k]) + v);
            j.want[0][k] += v;
        }
        if (a.n[0] > 70000) assert_true(fabs(kept_numbers / (double)a.n[0] - (1 - a.f[0])) < 0.02);
        check(&j, a.n[0] > 70000, zeros);
    }
}

/* ---- pooling ---- */

static void run_pool(pd_device *d, const job *j) { d->pool(d, (const pd_pool_shape *)j->args, j->in[0], j->out[0]); }
static void run_pool_backward(pd_device *d, const job *j) {
    d->pool_backward(d, (const pd_pool_shape *)j->args, j->in[0], j->in[1], j->in[2], j->out[0]);
}

static void check_pool(const pd_pool_shape *s, bool all_teams) {
    const int64_t shape[13] = { s->rows,   s->channels, s->in_h,     s->in_w,  s->out_h, s->out_w,          s->size_h,
                                s->size_w, s->stride_h, s->stride_w, s->pad_h, s->pad_w, (int64_t)s->method };
    int64_t maps = s->rows * s->channels, in_area = s->in_h * s->in_w, area = s->out_h * s->out_w;
    job j = { .run = run_pool, .args = s }, back = { .run = run_pool_backward, .args = s };
    describe(&j, "pool", shape, 13);
    describe(&back, "pool_backward", shape, 13);
    j.in[0] = back.in[0] = numbers(maps * in_area, -1, 1);
    if (chance(0.5)) /* equal ones */
        for (int64_t i = 0; i < maps * in_area; i++) j.in[0][i] = (pd_real)whole(-2, 2);
    back.in[1] = numbers(maps * area, 0, 0);
    back.in[2] = numbers(maps * area, -1, 1);
    output(&j, 0, maps * area, -1, 1);
    output(&back, 0, maps * in_area, -1, 1);
    for (int64_t i = 0; i < maps * in_area; i++) back.slack[0][i] = 4 * EPSILON * fabs(back.want[0][i]);
    for (int64_t o = 0; o < maps * area; o++) {
        int64_t top = o / s->out_w % s->out_h * s->stride_h - s->pad_h, left = o % s->out_w * s->stride_w - s->pad_w;
        int64_t cells = 0, best = -1;
        double sum = 0, size = 0, factor = 1, dy = (double)back.in[2][o];
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t h = top; h < top + s->size_h; h++)
                for (int64_t w = left; w < left + s->size_w; w++) {
                    int64_t at = o / area * in_area + h * s->in_w + w;
                    double x;
                    if (h < 0 || h >= s->in_h || w < 0 || w >= s->in_w) continue;
                    x = (double)j.in[0][at];
                    if (pass == 0) {
                        cells++, sum += x, size += fabs(x);
                        if (best < 0 || x > (double)j.in[0][best]) best = at;
                    } else if (s->method != PD_MAX) {
                        back.want[0][at] += factor * dy;
                        back.slack[0][at] += 8 * EPSILON * fabs(factor * dy);
                    }
                }
            if (s->method == PD_AVERAGE) factor = 1 / (double)cells;
            if (s->method == PD_SQRT_N) factor = 1 / sqrt((double)cells);
        }
        assert_true(cells > 0);
        j.want[0][o] = s->method == PD_MAX ? (double)j.in[0][best] : sum * factor;
        j.slack[0][o] = s->method == PD_MAX ? 0 : sum_slack((double)cells, size * factor);
        back.in[1][o] = (pd_real)j.want[0][o];
        if (s->method == PD_MAX) {
            back.want[0][best] += dy;
            back.slack[0][best] += 4 * EPSILON * fabs(dy);
        }
    }
    check(&j, all_teams, false);
    check(&back, all_teams, false);
}

static void test_pool(void **state) {
    (void)state;
    for (int i = 0; i < rounds(240); i++) {
        bool big = i >= 236;
        pd_pool_shape s;
        begin((uint64_t)(17000 + i));
        s.method = (pd_pool_method)(i % 4);
        s.rows = big ? 4 : whole(0, 4), s.channels = big ? 5 : whole(1, 5);
        do {
            int64_t side = big ? 50 : whole(1, 20);
            s.in_h = chance(0.5) ? side : whole(1, 20), s.in_w = side;
            s.size_h = whole(1, 4), s.size_w = big ? 3 : chance(0.5) ? s.size_h : whole(1, 4);
            s.stride_h = whole(1, 3), s.stride_w = big ? 1 : chance(0.5) ? s.stride_h : whole(1, 3);
            s.pad_h = below(s.size_h), s.pad_w = below(s.size_w);
            s.out_h = (s.in_h + 2 * s.pad_h - s.size_h) / s.stride_h + 1;
            s.out_w = (s.in_w + 2 * s.pad_w - s.size_w) / s.stride_w + 1;
            if (big) s.in_h = 30, s.size_h = 3, s.stride_h = 1, s.pad_h = 1, s.out_h = 30;
        } while (s.in_h + 2 * s.pad_h < s.size_h || s.in_w + 2 * s.pad_w < s.size_w ||
                 (s.out_h - 1) * s.stride_h - s.pad_h >= s.in_h || (s.out_w - 1) * s.stride_w - s.pad_w >= s.in_w);
        /* windows that stick out at the end */
        if (chance(0.3) && s.out_h * s.stride_h - s.pad_h < s.in_h) s.out_h++;
        if (chance(0.3) && s.out_w * s.stride_w - s.pad_w < s.in_w) s.out_w++;
        check_pool(&s, big);
    }
}

/* Windows of 2 x 2 that cover the image have a path of their own where rows are whole vectors. */
static void test_pool_pairs(void **state) {
    (void)state;
    for (int i = 0; i < rounds(120); i++) {
        pd_pool_shape s = { 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0, (pd_pool_method)(i % 4) };
        bool big = i >= 116;
        begin((uint64_t)(17300 + i));
        s.rows = big ? 4 : whole(1, 3), s.channels = big ? 5 : whole(1, 5);
        s.out_h = big ? 33 : whole(1, 6), s.out_w = big ? 64 : (1 + i / 4 % 3) * (int64_t[]){ 1, 2, 4, 8, 5 }[below(5)];
        s.in_h = 2 * s.out_h, s.in_w = 2 * s.out_w;
        check_pool(&s, big);
    }
}

static void test_pool_nan(void **state) {
    (void)state;
    for (int64_t side = 1; side <= 20; side++) {
        pd_pool_shape s = { 1, 1, side, side, 1, 1, side, side, 1, 1, 0, 0, PD_MAX };
        job j = { .run = run_pool, .args = &s };
        begin((uint64_t)(17500 + side));
        describe(&j, "pool with NaN", &side, 1);
        j.in[0] = numbers(side * side, -1, 1);
        j.in[0][below(side * side)] = (pd_real)NAN;
        output(&j, 0, 1, -1, 1);
        j.want[0][0] = NAN;
        check(&j, false, false);
    }
}

/* ---- normalisation ---- */

static void run_moments(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->channel_moments(d, a->n[0], a->n[1], a->n[2], j->in[0], j->out[0]);
}
static void run_batch_norm(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->batch_norm(d, a->n[0], a->n[1], a->n[2], j->in[0], j->in[1], j->in[6], j->in[2], a->f[0], j->in[3], j->in[4],
                  j->out[0]);
}
static void run_batch_norm_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->batch_norm_backward(d, a->n[0], a->n[1], a->n[2], j->in[0], j->in[1], j->in[6], j->in[2], a->f[0], a->flag,
                           j->in[3], j->in[5], j->out[0], j->out[1], j->out[2]);
}

static void check_batch_norm(int64_t rows, int64_t channels, int64_t area, bool all_teams) {
    flat_args a = { .n = { rows, channels, area }, .f = { 1e-5 }, .flag = chance(0.5) };
    job moments = { .run = run_moments, .args = &a }, forward = { .run = run_batch_norm, .args = &a },
        back = { .run = run_batch_norm_backward, .args = &a };
    int64_t n = rows * channels * area, count = rows * area;
    double offset = uniform(-3, 3);
    describe(&moments, "channel_moments", a.n, 3);
    describe(&forward, "batch_norm", a.n, 3);
    describe(&back, "batch_norm_backward", a.n, 3);
    forward.in[0] = numbers(n, offset - 1, offset + 1);
    forward.in[1] = numbers(channels, offset - 0.1, offset + 0.1);
    forward.in[2] = numbers(channels, 0.1, 1);
    forward.in[3] = chance(0.8) ? numbers(channels, -2, 2) : NULL;
    forward.in[4] = chance(0.8) ? numbers(channels, -2, 2) : NULL;
    forward.in[5] = numbers(n, -1, 1);
    forward.in[6] = chance(0.5) ? numbers(channels, -1e-3, 1e-3) : NULL;
    moments.in[0] = forward.in[0];
    memcpy(back.in, forward.in, sizeof back.in);
    output(&moments, 0, 3 * channels, -1, 1);
    output(&forward, 0, n, -1, 1);
    if (chance(0.8)) output(&back, 0, n, -1, 1);
    if (chance(0.8)) output(&back, 1, channels, -1, 1);
    if (chance(0.8)) output(&back, 2, channels, -1, 1);
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0, size = 0, squares = 0, bias, weight, inverse;
        double mean = (double)forward.in[1][c] + (forward.in[6] ? (double)forward.in[6][c] : 0);
        double dsum = 0, dsize = 0, dot = 0, dot_size = 0;
        inverse = 1 / sqrt((double)forward.in[2][c] + 1e-5);
        weight = forward.in[3] ? (double)forward.in[3][c] : 1;
        bias = forward.in[4] ? (double)forward.in[4][c] : 0;
        for (int64_t k = 0; k < count; k++) {
            int64_t i = (k / area * channels + c) * area + k % area;
            double x = (double)forward.in[0][i], dy = (double)forward.in[5][i];
            sum += x, size += fabs(x);
            forward.want[0][i] = (x - mean) * inverse * weight + bias;
            forward.slack[0][i] = 8 * EPSILON * ((fabs(x) + fabs(mean)) * inverse * fabs(weight) + fabs(bias));
            dsum += dy, dsize += fabs(dy);
            dot += dy * (x - mean) * inverse, dot_size += fabs(dy) * (fabs(x) + fabs(mean)) * inverse;
        }
        for (int64_t k = 0; k < count; k++) {
            double x = (double)forward.in[0][(k / area * channels + c) * area + k % area];
            squares += (x - sum / (double)count) * (x - sum / (double)count);
        }
        moments.want[0][c] = sum / (double)count;
        moments.slack[0][c] = sum_slack((double)count, size / (double)count);
        moments.want[0][channels + c] = 0; /* less than what a number of this size can be off by */
        moments.slack[0][channels + c] = EPSILON * fabs(sum / (double)count);
        moments.want[0][2 * channels + c] = squares / (double)count;
        moments.slack[0][2 * channels + c] =
            sum_slack((double)count, squares / (double)count + EPSILON * size * size / (double)(count * count));
        for (int64_t k = 0; back.first[0] && k < count; k++) {
            int64_t i = (k / area * channels + c) * area + k % area;
            double x = (double)forward.in[0][i], dy = (double)forward.in[5][i], v = dy, v_size = fabs(dy);
            if (a.flag) v -= (dsum + (x - mean) * inverse * dot) / (double)count;
            if (a.flag) v_size += (dsize + (fabs(x) + fabs(mean)) * inverse * dot_size) / (double)count;
            back.slack[0][i] =
                sum_slack((double)(a.flag ? count : 1), fabs(back.want[0][i]) + inverse * fabs(weight) * v_size);
            back.want[0][i] += inverse * weight * v;
        }
        if (back.first[1]) back.slack[1][c] = sum_slack((double)count, fabs(back.want[1][c]) + dot_size);
        if (back.first[1]) back.want[1][c] += dot;
        if (back.first[2]) back.slack[2][c] = sum_slack((double)count, fabs(back.want[2][c]) + dsize);
        if (back.first[2]) back.want[2][c] += dsum;
    }
    check(&moments, all_teams, false);
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

static void test_batch_norm(void **state) {
    (void)state;
    for (int i = 0; i < rounds(100); i++) {
        begin((uint64_t)(18000 + i));
        check_batch_norm(whole(1, 6), whole(1, 9), i % 3 == 0 ? 1 : whole(1, 70), false);
    }
    begin(18500);
    check_batch_norm(11, 13, 500, true);
    begin(18501);
    check_batch_norm(900, 80, 1, true);
}

static void run_layer_norm(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->layer_norm(d, a->n[0], a->n[1], j->in[0], a->f[0], j->in[1], j->in[2], j->out[0], j->out[1]);
}
static void run_layer_norm_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->layer_norm_backward(d, a->n[0], a->n[1], j->in[0], j->in[4], j->in[1], j->in[3], j->out[0], j->out[1],
                           j->out[2]);
}

static void check_layer_norm(int64_t rows, int64_t width, bool all_teams) {
    flat_args a = { .n = { rows, width }, .f = { 1e-3 } };
    job forward = { .run = run_layer_norm, .args = &a }, back = { .run = run_layer_norm_backward, .args = &a };
    int64_t n = rows * width;
    double *column[4], w = (double)width;
    describe(&forward, "layer_norm", a.n, 2);
    describe(&back, "layer_norm_backward", a.n, 2);
    forward.in[0] = numbers(n, -1, 2);
    forward.in[1] = chance(0.8) ? numbers(width, -2, 2) : NULL;
    forward.in[2] = chance(0.8) ? numbers(width, -2, 2) : NULL;
    forward.in[3] = numbers(n, -1, 1);
    forward.in[4] = numbers(3 * rows, 0, 0);
    memcpy(back.in, forward.in, sizeof back.in);
    output(&forward, 0, 3 * rows, -1, 1);
    output(&forward, 1, n, -1, 1);
    if (chance(0.8)) output(&back, 0, n, -1, 1);
    if (chance(0.8)) output(&back, 1, width, -1, 1);
    if (chance(0.8)) output(&back, 2, width, -1, 1);
    for (int k = 0; k < 4; k++) column[k] = (double *)keep(width, sizeof(double)); /* dweight, dbias and their sizes */
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0, size = 0, squares = 0, mean, inverse, error, dsum = 0, dsize = 0, dot = 0, dot_size = 0;
        for (int64_t i = r * width; i < (r + 1) * width; i++)
            sum += (double)forward.in[0][i], size += fabs((double)forward.in[0][i]);
        mean = sum / w;
        for (int64_t i = r * width; i < (r + 1) * width; i++)
            squares += ((double)forward.in[0][i] - mean) * ((double)forward.in[0][i] - mean);
        inverse = 1 / sqrt(squares / w + 1e-3);
        error = sum_slack(w, size / w); /* of the mean */
        forward.want[0][3 * r] = mean, forward.slack[0][3 * r] = error;
        forward.want[0][3 * r + 1] = 0, forward.slack[0][3 * r + 1] = EPSILON * fabs(mean);
        forward.want[0][3 * r + 2] = inverse, forward.slack[0][3 * r + 2] = sum_slack(w, inverse);
        forward.in[4][3 * r] = (pd_real)mean, forward.in[4][3 * r + 1] = (pd_real)uniform(-1e-3, 1e-3);
        forward.in[4][3 * r + 2] = (pd_real)inverse;
        for (int64_t i = 0; i < width; i++) {
            double x = (double)forward.in[0][r * width + i];
            double weight = forward.in[1] ? (double)forward.in[1][i] : 1;
            double bias = forward.in[2] ? (double)forward.in[2][i] : 0;
            forward.want[1][r * width + i] = (x - mean) * inverse * weight + bias;
            forward.slack[1][r * width + i] =
                inverse * fabs(weight) * error +
                sum_slack(w, (fabs(x) + fabs(mean)) * inverse * fabs(weight) + fabs(bias));
        }
        mean = (double)forward.in[4][3 * r] + (double)forward.in[4][3 * r + 1];
        inverse = (double)forward.in[4][3 * r + 2];
        for (int64_t i = 0; i < width; i++) {
            double x = (double)forward.in[0][r * width + i], dy = (double)forward.in[3][r * width + i];
            double g = dy * (forward.in[1] ? (double)forward.in[1][i] : 1), x_size = (fabs(x) + fabs(mean)) * inverse;
            dsum += g, dsize += fabs(g);
            dot += g * (x - mean) * inverse, dot_size += fabs(g) * x_size;
            column[0][i] += dy * (x - mean) * inverse, column[1][i] += fabs(dy) * x_size;
            column[2][i] += dy, column[3][i] += fabs(dy);
        }
        for (int64_t i = 0; back.first[0] && i < width; i++) {
            double x = (double)forward.in[0][r * width + i], dy = (double)forward.in[3][r * width + i];
            double g = dy * (forward.in[1] ? (double)forward.in[1][i] : 1), x_size = (fabs(x) + fabs(mean)) * inverse;
            double *want = &back.want[0][r * width + i];
            back.slack[0][r * width + i] =
                sum_slack(w, fabs(*want) + inverse * (fabs(g) + (dsize + x_size * dot_size) / w));
            *want += inverse * (g - (dsum + (x - mean) * inverse * dot) / w);
        }
    }
    for (int k = 1; k < 3; k++)
        for (int64_t i = 0; back.first[k] && i < width; i++) {
            back.slack[k][i] = sum_slack((double)rows, fabs(back.want[k][i]) + column[2 * k - 1][i]);
            back.want[k][i] += column[2 * k - 2][i];
        }
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

static void test_layer_norm(void **state) {
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(19000 + i));
        check_layer_norm(whole(1, 6), 1 + i % 70, false);
    }
    begin(19500);
    check_layer_norm(101, 700, true);
    begin(19501);
    check_layer_norm(900, 80, true);
}

static void run_response_norm(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->response_norm(d, a->n[0], a->n[1], a->n[2], a->n[3], a->f[0], a->f[1], a->f[2], j->in[0], j->out[0], j->out[1]);
}
static void run_response_norm_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->response_norm_backward(d, a->n[0], a->n[1], a->n[2], a->n[3], a->f[0], a->f[1], j->in[0], j->in[1], j->in[2],
                              j->out[0]);
}

/* Channel c looks at channels c - size / 2 .. c - size / 2 + size - 1. */
static void check_response_norm(int64_t rows, int64_t channels, int64_t area, int64_t size, bool all_teams) {
    flat_args a = { .n = { rows, channels, area, size } };
    job forward = { .run = run_response_norm, .args = &a }, back = { .run = run_response_norm_backward, .args = &a };
    int64_t n = rows * channels * area;
    double alpha = a.f[0] = uniform(0.01, 0.5), beta = a.f[1] = uniform(0.3, 1.2), k = a.f[2] = uniform(0.5, 2);
    describe(&forward, "response_norm", a.n, 4);
    describe(&back, "response_norm_backward", a.n, 4);
    forward.in[0] = numbers(n, -2, 2);
    forward.in[1] = numbers(n, 0, 0);
    forward.in[2] = numbers(n, -1, 1);
    memcpy(back.in, forward.in, sizeof back.in);
    output(&forward, 0, n, -1, 1);
    output(&forward, 1, n, -1, 1);
    output(&back, 0, n, -1, 1);
    for (int64_t i = 0; i < n; i++) {
        int64_t c = i / area % channels;
        double sum = 0;
        for (int64_t o = c - size / 2; o < c - size / 2 + size; o++)
            if (o >= 0 && o < channels)
                sum += (double)forward.in[0][i + (o - c) * area] * (double)forward.in[0][i + (o - c) * area];
        forward.want[0][i] = k + alpha / (double)size * sum;
        forward.slack[0][i] = sum_slack((double)size, forward.want[0][i]);
        forward.want[1][i] = (double)forward.in[0][i] * pow(forward.want[0][i], -beta);
        forward.slack[1][i] = sum_slack((double)size + 16, fabs(forward.want[1][i]));
        forward.in[1][i] = (pd_real)forward.want[0][i];
    }
    for (int64_t i = 0; i < n; i++) back.slack[0][i] = fabs(back.want[0][i]);
    for (int64_t i = 0; i < n; i++) { /* y_c depends on x_c, and through its scale on all x_o it looks at */
        int64_t c = i / area % channels;
        double dy = (double)forward.in[2][i], s = (double)forward.in[1][i], x = (double)forward.in[0][i];
        back.want[0][i] += dy * pow(s, -beta);
        back.slack[0][i] += fabs(dy) * pow(s, -beta);
        for (int64_t o = c - size / 2; o < c - size / 2 + size; o++)
            if (o >= 0 && o < channels) {
                int64_t to = i + (o - c) * area;
                double v = -dy * x * beta * pow(s, -beta - 1) * 2 * alpha / (double)size * (double)forward.in[0][to];
                back.want[0][to] += v;
                back.slack[0][to] += fabs(v);
            }
    }
    for (int64_t i = 0; i < n; i++) back.slack[0][i] = sum_slack((double)size + 16, back.slack[0][i]);
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

static void test_response_norm(void **state) {
    (void)state;
    for (int i = 0; i < rounds(70); i++) {
        begin((uint64_t)(20000 + i));
        check_response_norm(whole(1, 3), whole(1, 9), 1 + i, whole(1, 7), false);
    }
    begin(20500);
    check_response_norm(3, 11, 500, 5, true);
}

/* ---- cross-entropy ---- */

static void run_cross_entropy(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->cross_entropy(d, a->n[0], a->n[1], j->in[5], j->in[0], a->ids, j->in[1], j->in[4], j->in[2], j->out[0]);
}
static void run_cross_entropy_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->cross_entropy_backward(d, a->n[0], a->n[1], j->in[0], a->ids, j->in[1], j->in[2], j->in[3], a->flag, j->out[0]);
}

static void check_cross_entropy(int64_t rows, int64_t width, bool all_teams) {
    flat_args a = { .n = { rows, width }, .flag = chance(0.5) };
    job forward = { .run = run_cross_entropy, .args = &a }, back = { .run = run_cross_entropy_backward, .args = &a };
    int64_t n = rows * width, *ids = (int64_t *)keep(rows, sizeof *ids);
    describe(&forward, "cross_entropy", a.n, 2);
    describe(&back, "cross_entropy_backward", a.n, 2);
    a.ids = chance(0.5) ? ids : NULL;
    forward.in[0] = numbers(n, 0, 1);
    forward.in[1] = a.ids ? NULL : numbers(n, 0, 1);
    forward.in[2] = chance(0.5) ? numbers(width, 0, 2) : NULL;
    forward.in[3] = numbers(rows, -1, 1);
    if (chance(0.5)) forward.in[4] = numbers(rows, -1, 1);
    memcpy(back.in, forward.in, sizeof back.in);
    output(&forward, 0, rows, -1, 1);
    output(&back, 0, n, -1, 1);
    for (int64_t r = 0; r < rows; r++) {
        double total = 0, sum = 0, size = 0, dcost, weight = 1;
        if (chance(0.1)) forward.in[3][r] = 0;
        if (forward.in[4] && chance(0.1)) forward.in[4][r] = 0;
        if (forward.in[4]) weight = (double)forward.in[4][r];
        dcost = (double)forward.in[3][r];
        ids[r] = below(width);
        for (int64_t c = 0; c < width; c++) {
            int64_t i = r * width + c;
            double t = a.ids ? c == ids[r] : (double)forward.in[1][i], p;
            if (chance(0.05)) forward.in[0][i] = chance(0.5) ? 0 : 1;
            if (!a.ids && chance(0.1)) t = (double)(forward.in[1][i] = 0);
            if (forward.in[2]) t *= (double)forward.in[2][c];
            p = fmax((double)forward.in[0][i], TINIEST); /* so that a logarithm stays finite */
            sum -= t * log(p);
            size += fabs(t * log(p));
            total += t;
            back.slack[0][i] = 8 * EPSILON * (fabs(back.want[0][i]) + (a.flag ? 0 : fabs(dcost * t / p)));
            if (!a.flag) back.want[0][i] -= dcost * t / p;
        }
        for (int64_t c = 0; a.flag && c < width; c++) {
            int64_t i = r * width + c;
            double t =
                (a.ids ? c == ids[r] : (double)forward.in[1][i]) * (forward.in[2] ? (double)forward.in[2][c] : 1);
            double p = (double)forward.in[0][i];
            back.want[0][i] += dcost * (total * p - t);
            back.slack[0][i] += sum_slack((double)width, fabs(dcost) * (total * p + t));
        }
        forward.want[0][r] = weight * sum;
        forward.slack[0][r] = sum_slack((double)width, fabs(weight) * size);
    }
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

/* Of what comes before the softmax, however far apart. */
static void check_softmax_cost(int64_t rows, int64_t width, double range, bool all_teams) {
    flat_args a = { .n = { rows, width } };
    job forward = { .run = run_cross_entropy, .args = &a };
    int64_t *ids = (int64_t *)keep(rows, sizeof *ids);
    describe(&forward, "cross_entropy", a.n, 2);
    a.ids = chance(0.5) ? ids : NULL;
    forward.in[0] = numbers(rows * width, 0, 0);
    forward.in[1] = a.ids ? NULL : numbers(rows * width, 0, 1);
    forward.in[5] = numbers(rows * width, -range, range);
    output(&forward, 0, rows, -1, 1);
    for (int64_t r = 0; r < rows; r++) {
        const pd_real *x = forward.in[5] + r * width;
        double sum = 0, size = 0;
        int64_t top = 0;
        forward.want[0][r] = 0;
        ids[r] = below(width);
        for (int64_t c = 1; c < width; c++)
            if (x[c] > x[top]) top = c;
        for (int64_t c = 0; c < width; c++)
            if (c != top) sum += exp((double)x[c] - (double)x[top]);
        for (int64_t c = 0; c < width; c++)
            forward.in[0][r * width + c] = (pd_real)(exp((double)x[c] - (double)x[top]) / (1 + sum));
        for (int64_t c = 0; c < width; c++) {
            double t = a.ids ? c == ids[r] : (double)forward.in[1][r * width + c];
            forward.want[0][r] += t * ((double)x[top] - (double)x[c] + log1p(sum));
            size += t * log1p(sum);
        }
        forward.slack[0][r] = 4 * EPSILON * (fabs(forward.want[0][r]) + size) + sum_slack((double)width, size);
        forward.slack[0][r] += 1e-15 * (double)width; /* what the sum of the others leaves in double */
    }
    check(&forward, all_teams, false);
}

static void test_cross_entropy(void **state) {
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(21000 + i));
        check_cross_entropy(whole(1, 9), 1 + i % 70, false);
    }
    for (int i = 0; i < 4; i++) {
        begin((uint64_t)(21500 + i));
        check_cross_entropy(i % 2 ? 9000 : 151, i % 2 ? 5 : 300, true);
    }
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(22000 + i));
        check_softmax_cost(whole(1, 9), 1 + i % 70, pow(10, (double)(i % 7) - 2), false);
    }
    begin(22500);
    check_softmax_cost(151, 700, 200, true);
}

/* ---- recurrent units ---- */

static void run_gru(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->gru(d, a->n[0], a->n[1], j->out[0], j->in[0], j->in[1], j->out[1]);
}
static void run_gru_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->gru_backward(d, a->n[0], a->n[1], j->out[0], j->out[1], j->in[1], j->in[2], j->out[2]);
}

static void check_gru(int64_t rows, int64_t width, double range, bool all_teams) {
    flat_args a = { .n = { rows, width } };
    job forward = { .run = run_gru, .args = &a }, back = { .run = run_gru_backward, .args = &a };
    int64_t n = rows * width;
    describe(&forward, "gru", a.n, 2);
    describe(&back, "gru_backward", a.n, 2);
    forward.in[0] = numbers(3 * n, -range, range);
    forward.in[1] = back.in[1] = chance(0.8) ? numbers(n, -1, 1) : NULL;
    back.in[2] = numbers(n, -1, 1);
    output(&forward, 0, 3 * n, -range, range);
    output(&forward, 1, n, -1, 1);
    output(&back, 0, 3 * n, 0, 1); /* gates as forward leaves them: z and r in 0 .. 1, c in -1 .. 1 */
    output(&back, 1, 3 * n, -range, range);
    if (chance(0.8)) output(&back, 2, n, -1, 1);
    for (int64_t i = 0; i < n; i++) {
        int64_t zi = i / width * 3 * width + i % width, ri = zi + width, ci = ri + width;
        double h = forward.in[1] ? (double)forward.in[1][i] : 0, uc = (double)forward.in[0][ci];
        double az = (double)forward.first[0][zi], bz = (double)forward.in[0][zi], ac = (double)forward.first[0][ci];
        double ar = (double)forward.first[0][ri], br = (double)forward.in[0][ri];
        double z = 1 / (1 + exp(-az - bz)), r = 1 / (1 + exp(-ar - br)), c = tanh(ac + r * uc);
        double size = 8 * EPSILON, dh = (double)back.in[2][i], dz, dc, dr, c_size;
        forward.want[0][zi] = z, forward.slack[0][zi] = size * (1 + fabs(az) + fabs(bz));
        forward.want[0][ri] = r, forward.slack[0][ri] = size * (1 + fabs(ar) + fabs(br));
        forward.want[0][ci] = c;
        forward.slack[0][ci] = size * (1 + fabs(ac) + fabs(uc) * (1 + fabs(ar) + fabs(br)));
        forward.want[1][i] = (1 - z) * c + z * h;
        forward.slack[1][i] = forward.slack[0][ci] + 2 * forward.slack[0][zi] + size;

        back.first[0][ci] = (pd_real)uniform(-1, 1);
        if (chance(0.1)) back.first[0][zi] = chance(0.5) ? 0 : 1; /* saturated */
        z = (double)back.first[0][zi], r = (double)back.first[0][ri], c = (double)back.first[0][ci];
        uc = (double)back.first[1][ci];
        dc = dh * (1 - z) * (1 - c * c);
        c_size = size * fabs(dh) * (1 - z);
        dz = dh * (h - c) * z * (1 - z);
        dr = dc * uc * r * (1 - r);
        back.want[0][zi] = back.want[1][zi] = dz;
        back.slack[0][zi] = back.slack[1][zi] = size * fabs(dh) * (fabs(h) + fabs(c)) * z * (1 - z);
        back.want[0][ri] = back.want[1][ri] = dr;
        back.slack[0][ri] = back.slack[1][ri] = c_size * fabs(uc) * r * (1 - r);
        back.want[0][ci] = dc, back.slack[0][ci] = c_size;
        back.want[1][ci] = dc * r, back.slack[1][ci] = c_size * r;
        if (back.first[2]) back.slack[2][i] = size * (fabs(back.want[2][i]) + fabs(dh * z));
        if (back.first[2]) back.want[2][i] += dh * z;
    }
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

static void test_gru(void **state) {
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(22000 + i));
        check_gru(whole(1, 5), 1 + i % 70, i % 5 == 4 ? 200 : 3, false);
    }
    begin(22500);
    check_gru(90, 67, 3, true);
}

static void run_lstm(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->lstm(d, a->n[0], a->n[1], j->out[0], j->in[0], j->in[1], j->out[1], j->out[2]);
}
static void run_lstm_backward(pd_device *d, const job *j) {
    const flat_args *a = (const flat_args *)j->args;
    d->lstm_backward(d, a->n[0], a->n[1], j->out[0], j->in[0], j->in[1], j->in[2], j->in[3], j->out[1]);
}

/* Gates, cell and output of number k in row r. */
static void expect_lstm(job *j, int64_t r, int64_t k, int64_t width) {
    int64_t at = r * width + k, gate = r * 4 * width + k;
    double a[4], p[3] = { 0, 0, 0 }, old = j->in[1] ? (double)j->in[1][at] : 0, size = 8 * EPSILON, y[4], slack[4], c;
    for (int i = 0; i < 4; i++) a[i] = (double)j->first[0][gate + i * width];
    for (int i = 0; i < 3 && j->in[0]; i++) p[i] = (double)j->in[0][i * width + k];
    for (int i = 0; i < 2; i++) {
        y[i] = 1 / (1 + exp(-a[i] - p[i] * old));
        slack[i] = size * (1 + fabs(a[i]) + fabs(p[i] * old));
    }
    y[2] = tanh(a[2]), slack[2] = size * (1 + fabs(a[2]));
    c = y[1] * old + y[0] * y[2];
    j->want[1][at] = c;
    j->slack[1][at] = fabs(old) * slack[1] + slack[0] + slack[2] + size * (1 + fabs(old));
    y[3] = 1 / (1 + exp(-a[3] - p[2] * c));
    slack[3] = size * (1 + fabs(a[3]) + fabs(p[2] * c)) + fabs(p[2]) * j->slack[1][at];
    j->want[2][at] = y[3] * tanh(c), j->slack[2][at] = slack[3] + j->slack[1][at] + size;
    for (int i = 0; i < 4; i++) j->want[0][gate + i * width] = y[i], j->slack[0][gate + i * width] = slack[i];
}

/* The gradients from gates as forward leaves them: in 0 .. 1, the candidate in -1 .. 1; saturated at times. */
static void expect_lstm_back(job *j, int64_t r, int64_t k, int64_t width) {
    int64_t at = r * width + k, gate = r * 4 * width + k;
    double p[3] = { 0, 0, 0 }, old = j->in[1] ? (double)j->in[1][at] : 0, size = 16 * EPSILON, y, i, f, g, o, dh, dc;
    double d_o, di, df, all;
    if (chance(0.1)) j->first[0][gate + below(2) * width] = chance(0.5) ? 0 : 1;
    if (chance(0.5)) j->first[0][gate + 2 * width] = -j->first[0][gate + 2 * width];
    i = (double)j->first[0][gate], f = (double)j->first[0][gate + width];
    g = (double)j->first[0][gate + 2 * width], o = (double)j->first[0][gate + 3 * width];
    for (int n = 0; n < 3 && j->in[0]; n++) p[n] = (double)j->in[0][n * width + k];
    y = tanh((double)j->in[2][at]), dh = (double)j->in[3][at];
    d_o = dh * y * o * (1 - o);
    dc = (double)j->first[1][at] + dh * o * (1 - y * y) + d_o * p[2];
    all = fabs((double)j->first[1][at]) + fabs(dh) * (1 + fabs(p[2])); /* what dc is a sum of */
    di = dc * g * i * (1 - i), df = dc * old * f * (1 - f);
    j->want[0][gate] = di, j->slack[0][gate] = size * all;
    j->want[0][gate + width] = df, j->slack[0][gate + width] = size * all * fabs(old);
    j->want[0][gate + 2 * width] = dc * i * (1 - g * g), j->slack[0][gate + 2 * width] = size * all;
    j->want[0][gate + 3 * width] = d_o, j->slack[0][gate + 3 * width] = size * fabs(dh);
    j->want[1][at] = dc * f + di * p[0] + df * p[1];
    j->slack[1][at] = size * all * (1 + fabs(p[0]) + fabs(p[1] * old));
}

static void check_lstm(int64_t rows, int64_t width, double range, bool all_teams) {
    flat_args a = { .n = { rows, width } };
    job forward = { .run = run_lstm, .args = &a }, back = { .run = run_lstm_backward, .args = &a };
    int64_t n = rows * width;
    describe(&forward, "lstm", a.n, 2);
    describe(&back, "lstm_backward", a.n, 2);
    forward.in[0] = back.in[0] = chance(0.5) ? numbers(3 * width, -1, 1) : NULL;
    forward.in[1] = back.in[1] = chance(0.8) ? numbers(n, -2, 2) : NULL;
    back.in[2] = numbers(n, -2, 2);
    back.in[3] = numbers(n, -1, 1);
    output(&forward, 0, 4 * n, -range, range);
    output(&forward, 1, n, -1, 1);
    output(&forward, 2, n, -1, 1);
    output(&back, 0, 4 * n, 0, 1);
    output(&back, 1, n, -1, 1);
    for (int64_t i = 0; i < n; i++) {
        expect_lstm(&forward, i / width, i % width, width);
        expect_lstm_back(&back, i / width, i % width, width);
    }
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

/* ---- attention ---- */

static void run_attention(pd_device *d, const job *j) {
    const pd_attention_shape *s = (const pd_attention_shape *)j->args;
    d->attention(d, s, j->in[0], j->in[1], j->in[2], j->in[3], j->out[0], j->out[1]);
}
static void run_attention_backward(pd_device *d, const job *j) {
    const pd_attention_shape *s = (const pd_attention_shape *)j->args;
    d->attention_backward(d, s, j->in[0], j->in[1], j->in[2], j->in[3], j->in[4], j->in[5], j->out[0], j->out[1],
                          j->out[2], j->out[3]);
}

/* What row r, which looks at `count` keys from `key` on, puts out. */
static void expect_attention(const job *j, const pd_attention_shape *s, int64_t r) {
    int64_t key = s->spans[3 * r], count = s->spans[3 * r + 1] - key, first = s->spans[3 * r + 2];
    double e[32], top = -HUGE_VAL, sum = 0, slack = 0;
    for (int64_t k = 0; k < count; k++) {
        double size = 0;
        e[k] = 0;
        for (int64_t i = 0; i < s->width; i++) {
            double x = (double)j->in[0][r * s->width + i] + (double)j->in[1][(key + k) * s->width + i];
            e[k] += (double)j->in[3][i] * tanh(x);
            size += fabs((double)j->in[3][i]);
        }
        top = fmax(top, e[k]);
        slack = fmax(slack, sum_slack((double)s->width, 4 * size));
    }
    slack = 2 * slack + 10 * EPSILON + sum_slack((double)count, 1);
    for (int64_t k = 0; k < count; k++) sum += e[k] = exp(e[k] - top);
    for (int64_t k = 0; k < count; k++) {
        j->want[0][first + k] = e[k] / sum;
        j->slack[0][first + k] = slack * e[k] / sum;
    }
    for (int64_t i = 0; i < s->value_width; i++) {
        int64_t o = r * s->value_width + i;
        j->want[1][o] = j->slack[1][o] = 0;
        for (int64_t k = 0; k < count; k++) {
            double term = e[k] / sum * (double)j->in[2][(key + k) * s->value_width + i];
            j->want[1][o] += term;
            j->slack[1][o] += 2 * slack * fabs(term);
        }
    }
}

/* What row r adds to gradients: to `slack` what rounding may make of them, but for that of the sums. */
static void expect_attention_backward(const job *j, const pd_attention_shape *s, int64_t r) {
    int64_t key = s->spans[3 * r], count = s->spans[3 * r + 1] - key;
    const pd_real *a = j->in[4] + s->spans[3 * r + 2], *dy = j->in[5] + r * s->value_width;
    double da[32], size[32], mean = 0, mean_size = 0;
    for (int64_t i = 0; i < s->width; i++) j->want[3][r * s->width + i] = j->slack[3][r * s->width + i] = 0;
    for (int64_t k = 0; k < count; k++) {
        da[k] = size[k] = 0;
        for (int64_t i = 0; i < s->value_width; i++) {
            int64_t o = (key + k) * s->value_width + i;
            double term = (double)dy[i] * (double)j->in[2][o], add = (double)a[k] * (double)dy[i];
            da[k] += term;
            size[k] += fabs(term);
            j->want[2][o] += add;
            j->slack[2][o] += sum_slack((double)s->rows, fabs(add));
        }
        mean += (double)a[k] * da[k];
        mean_size += (double)a[k] * size[k];
    }
    for (int64_t k = 0; k < count; k++) {
        double score = (double)a[k] * (da[k] - mean), slack = 8 * EPSILON * (double)a[k] * (size[k] + mean_size);
        for (int64_t i = 0; i < s->width; i++) {
            int64_t from = r * s->width + i, to = (key + k) * s->width + i;
            double v = (double)j->in[3][i], t = tanh((double)j->in[0][from] + (double)j->in[1][to]);
            double add = score * v * (1 - t * t);
            double off = fabs(v) * (slack + 16 * EPSILON * fabs(score)) + sum_slack((double)s->rows, fabs(add));
            j->want[0][from] += add, j->slack[0][from] += off + sum_slack((double)count, fabs(add));
            j->want[1][to] += add, j->slack[1][to] += off;
            j->want[3][from] += score * t;
            j->slack[3][from] += slack + 8 * EPSILON * fabs(score) + sum_slack((double)count, fabs(score));
        }
    }
}

/* Sentences of up to so many queries and keys. */
static void check_attention(int64_t sentences, int64_t queries, int64_t most, int64_t width, int64_t value_width,
                            double range, bool all_teams) {
    int64_t *spans = (int64_t *)keep(3 * sentences * queries, sizeof *spans), keys = 0, weights = 0;
    pd_attention_shape s = { 0, width, value_width, spans };
    job forward = { .run = run_attention, .args = &s }, back = { .run = run_attention_backward, .args = &s };
    for (int64_t q = 0; q < sentences; q++) {
        int64_t count = below(4) ? below(most + 1) : below(2), rows = below(queries + 1);
        for (int64_t r = 0; r < rows; r++, s.rows++, weights += count)
            spans[3 * s.rows] = keys, spans[3 * s.rows + 1] = keys + count, spans[3 * s.rows + 2] = weights;
        keys += count;
    }
    describe(&forward, "attention", (const int64_t[]){ s.rows, keys, width, value_width }, 4);
    describe(&back, "attention_backward", (const int64_t[]){ s.rows, keys, width, value_width }, 4);
    forward.in[0] = numbers(s.rows * width, -range, range);
    forward.in[1] = numbers(keys * width, -range, range);
    forward.in[2] = numbers(keys * value_width, -1, 1);
    forward.in[3] = numbers(width, -1, 1);
    memcpy(back.in, forward.in, sizeof back.in);
    back.in[4] = numbers(weights, 0, 1);
    back.in[5] = numbers(s.rows * value_width, -1, 1);
    for (int64_t r = 0; r < s.rows; r++) /* some have no gradient */
        for (int64_t i = 0, none = below(4); none == 0 && i < value_width; i++) back.in[5][r * value_width + i] = 0;
    output(&forward, 0, weights, -1, 1);
    output(&forward, 1, s.rows * value_width, -1, 1);
    output(&back, 0, s.rows * width, -1, 1);
    output(&back, 1, keys * width, -1, 1);
    output(&back, 2, keys * value_width, -1, 1);
    output(&back, 3, s.rows * width, -1, 1);
    for (int k = 0; k < 3; k++)
        for (int64_t i = 0; i < back.count[k]; i++)
            back.slack[k][i] = sum_slack((double)s.rows, fabs((double)back.first[k][i]));
    for (int64_t r = 0; r < s.rows; r++) {
        expect_attention(&forward, &s, r);
        expect_attention_backward(&back, &s, r);
    }
    for (int k = 0; k < 4; k++) /* not wanted */
        if (!all_teams && chance(0.2)) back.first[k] = NULL;
    check(&forward, all_teams, false);
    check(&back, all_teams, false);
}

static void test_lstm(void **state) {
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(23000 + i));
        check_lstm(whole(1, 5), 1 + i % 70, i % 5 == 4 ? 200 : 3, false);
    }
    begin(23500);
    check_lstm(90, 67, 3, true);
}

static void test_attention(void **state) {
    (void)state;
    for (int i = 0; i < rounds(140); i++) {
        begin((uint64_t)(24000 + i));
        check_attention(whole(1, 4), whole(1, 5), whole(1, 7), 1 + i % 70, whole(1, 40), i % 5 == 4 ? 30 : 1, false);
    }
    begin(24500);
    check_attention(6, 8, 30, 700, 300, 1, true);
    check_attention(1, 40, 30, 513, 600, 1, true);
}

/* ---- a whole net ---- */

static double train_small(pd_simd level, int threads, double *first) {
    enum { SAMPLES = 24, SIDE = 9, CLASSES = 4 };
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 5, .simd = level, .threads = threads });
    pd_layer *image = pd_image(net, "image", 2, SIDE, SIDE), *label = pd_label(net, "label", CLASSES);
    pd_layer *conv = pd_conv(net, image, 7, 3, &(pd_conv_opts){ .pad = 1, .act = PD_TANH });
    pd_layer *pool = pd_pool(net, pd_batch_norm(net, conv, NULL), 3, &(pd_pool_opts){ .method = PD_AVERAGE });
    pd_layer *second = pd_conv(net, pool, 6, 2, &(pd_conv_opts){ .act = PD_GELU });
    pd_layer *hidden = pd_dropout(net, pd_fc(net, second, 19, &(pd_fc_opts){ .act = PD_SIGMOID }), 0.1, NULL);
    pd_layer *out = pd_fc(net, hidden, CLASSES, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_trainer *trainer = pd_trainer_new(net, pd_cross_entropy(net, out, label, NULL), pd_adam(0.02), NULL);
    pd_batch *batch = pd_batch_new(net);
    double cost = 0;
    if (!trainer || !batch) fail_msg("%s", pd_error(net));
    random_seed(23000);
    for (int i = 0; i < SAMPLES; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        int64_t kind = below(CLASSES);
        for (int k = 0; k < 2 * SIDE * SIDE; k++) row[k] = (pd_real)(uniform(-1, 1) + (k % CLASSES == kind));
        assert_int_equal(pd_batch_add_id(batch, 1, kind), PD_OK);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    for (int i = 0; i < 10; i++) {
        if (pd_train_batch(trainer, batch, &cost) != PD_OK) fail_msg("%s", pd_error(net));
        if (i == 0) *first = cost;
    }
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return cost;
}

static void test_net(void **state) {
    double first, cost = train_small(PD_SIMD_SCALAR, 1, &first), bound = sizeof(pd_real) == 8 ? 1e-10 : 1e-4;
    (void)state;
    if (!(cost > 0 && cost < 0.7 * first)) fail_msg("cost %g, at first %g", cost, first);
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++) {
        double one, other;
        if (!nets[level][0]) continue;
        one = train_small((pd_simd)level, 1, &first);
        other = train_small((pd_simd)level, 3, &first);
        if (!(fabs(one - cost) <= bound * cost))
            fail_msg("after 10 steps at %s: cost %.17g, at scalar %.17g", level_names[level], one, cost);
        assert_true(one == other);
    }
}

/* ---- asking for a level ---- */

static void check_refused(const pd_net_opts *opts, const char *part) {
    pd_net *net = pd_net_new(opts);
    assert_non_null(net);
    assert_int_equal(pd_error_status(net), PD_E_ARGUMENT);
    check_contains(pd_error(net), "instruction set");
    check_contains(pd_error(net), part);
    for (int level = PD_SIMD_COUNT - 1; level > 0; level--) /* what can be had */
        if (nets[level][0]) {
            check_contains(pd_error(net), level_names[level]);
            break;
        }
    assert_null(pd_vector(net, "x", 3));
    pd_net_free(net);
}

static void check_info(const pd_net *net, const char *name) {
    char text[200], part[40];
    snprintf(part, sizeof part, ", %s kernels", name);
    assert_non_null(net);
    assert_int_equal(pd_error_status(net), PD_OK);
    assert_true(pd_info(net, text, sizeof text) < sizeof text);
    check_contains(text, part);
}

static void check_made(const pd_net_opts *opts, const char *name) {
    pd_net *net = pd_net_new(opts);
    check_info(net, name);
    pd_net_free(net);
}

static void test_asking(void **state) {
    const char *given = getenv("PADDLE_SIMD"), *best = NULL;
    char *before = given ? (char *)malloc(strlen(given) + 1) : NULL;
    pd_net *net, *shared;
    (void)state;
    if (before) strcpy(before, given);
    unsetenv("PADDLE_SIMD");
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++)
        if (nets[level][0]) best = level_names[level];
    assert_non_null(best);

    check_made(NULL, best);
    check_refused(&(pd_net_opts){ .simd = PD_SIMD_COUNT }, "unknown");
    check_refused(&(pd_net_opts){ .simd = (pd_simd)99 }, "unknown");
    check_refused(&(pd_net_opts){ .simd = (pd_simd)-1 }, "unknown");
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++) {
        const pd_net_opts opts = { .simd = (pd_simd)level };
        if (nets[level][0]) check_made(&opts, level_names[level]);
        else check_refused(&opts, level_names[level]);
        assert_int_equal(setenv("PADDLE_SIMD", level_names[level], 1), 0);
        if (nets[level][0]) check_made(NULL, level_names[level]);
        else check_refused(NULL, level_names[level]);
        check_made(&(pd_net_opts){ .simd = PD_SIMD_SCALAR }, "scalar"); /* an option beats the environment */
    }
    setenv("PADDLE_SIMD", "nonsense", 1);
    check_refused(NULL, "nonsense");
    check_made(&(pd_net_opts){ .simd = PD_SIMD_SCALAR }, "scalar");
    setenv("PADDLE_SIMD", "Scalar", 1);
    check_refused(NULL, "Scalar");
    setenv("PADDLE_SIMD", "scalar ", 1);
    check_refused(NULL, "scalar ");
    setenv("PADDLE_SIMD", "", 1); /* as if it weren't there */
    check_made(NULL, best);

    /* A shared net computes as its origin does, whatever the environment says by then. */
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++) {
        if (!nets[level][0]) continue;
        setenv("PADDLE_SIMD", level_names[level], 1);
        net = pd_net_new(NULL);
        assert_non_null(pd_fc(net, pd_vector(net, "x", 3), 2, NULL));
        setenv("PADDLE_SIMD", level % 2 ? "nonsense" : "scalar", 1);
        shared = pd_net_share(net);
        check_info(shared, level_names[level]);
        pd_net_free(shared);
        pd_net_free(net);
    }
    if (before) setenv("PADDLE_SIMD", before, 1);
    else unsetenv("PADDLE_SIMD");
    free(before);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_gemm_teams),
        cmocka_unit_test(test_conv),
        cmocka_unit_test(test_conv_teams),
        cmocka_unit_test(test_fill),
        cmocka_unit_test(test_contract),
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_sparse_product),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_softmax),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_update_rows),
        cmocka_unit_test(test_gather_rows),
        cmocka_unit_test(test_gathered_as_updated),
        cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_pool_pairs),
        cmocka_unit_test(test_pool_nan),
        cmocka_unit_test(test_batch_norm),
        cmocka_unit_test(test_layer_norm),
        cmocka_unit_test(test_response_norm),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_gru),
        cmocka_unit_test(test_lstm),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_net),
        cmocka_unit_test(test_asking),
    };
    return run_group(tests, make_nets, free_nets);
}
