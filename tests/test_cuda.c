/* paddle_cuda.cu against the CPU device of the same build: every operation on random shapes; memory; whole nets; two
   devices in two threads; the same bits every time; nothing allocated in a steady state; and failures of every kind.
   Runs on a GPU, or, with STAND_IN, on tests/cuda_on_cpu, which can also fail on demand and count. Without a GPU it
   says so and ends with 77. Argument: the seed. */
#define _POSIX_C_SOURCE 200809L
#ifndef STAND_IN
#define PADDLE_IMPLEMENTATION
#endif
#include "../paddle.h"
#include "../paddle_cuda.cu"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>
#include <cmocka.h>

#include "support.h"
#ifdef STAND_IN
#include "cuda_on_cpu/control.h"
#endif

enum { CPU, GPU };
static pd_device *device[2];
static uint64_t seed = 1;

#define BOTH for (int i = CPU; i <= GPU; i++)

/* ======================================================================================================== */
/* Numbers that both devices have                                                                           */

typedef struct numbers {
    int64_t n;
    pd_real *at[2]; /* NULL: there are none */
} numbers;

static const numbers nothing = { 0, { NULL, NULL } };

static void set(const numbers *x, const pd_real *values) {
    BOTH device[i]->upload(device[i], x->at[i], values, (size_t)x->n * sizeof *values);
}

static numbers given(int64_t n, const pd_real *values) {
    numbers x = { n, { NULL, NULL } };
    BOTH {
        x.at[i] = (pd_real *)device[i]->alloc(device[i], (size_t)n * sizeof *values);
        assert_non_null(x.at[i]);
        assert_int_equal((uintptr_t)x.at[i] % 64, 0);
    }
    set(&x, values);
    return x;
}

static pd_real *host(int64_t n) {
    pd_real *values = (pd_real *)calloc((size_t)n + 1, sizeof *values);
    assert_non_null(values);
    return values;
}

static numbers between(int64_t n, double low, double high) {
    pd_real *values = host(n);
    numbers x;
    for (int64_t k = 0; k < n; k++) values[k] = (pd_real)uniform(low, high);
    x = given(n, values);
    free(values);
    return x;
}
static numbers any(int64_t n) { return between(n, -1, 1); }
static numbers maybe(int64_t n) { return below(3) ? any(n) : nothing; }

static pd_real *fetch(const numbers *x, int i) {
    pd_real *values = host(x->n);
    device[i]->download(device[i], values, x->at[i], (size_t)x->n * sizeof *values);
    return values;
}

/* Gives the numbers back, too. */
static void compare_within(numbers x, double tolerance, const char *what) {
    pd_real *values[2];
    char message[200];
    if (!x.at[CPU]) return;
    BOTH values[i] = fetch(&x, i);
    BOTH device[i]->free(device[i], x.at[i]);
    if (device[GPU]->wait(device[GPU], message, sizeof message) != PD_OK) fail_msg("%s: %s", what, message);
    for (int64_t k = 0; k < x.n; k++) {
        double a = (double)values[GPU][k], b = (double)values[CPU][k];
        if (a == b || (a != a && b != b)) continue;
        if (!(fabs(a - b) <= tolerance * (1 + fabs(b))))
            fail_msg("%s: number %lld of %lld is %.17g, on the CPU %.17g (seed %llu)", what, (long long)k,
                     (long long)x.n, a, b, (unsigned long long)random_key);
    }
    BOTH free(values[i]);
}
static void compare(numbers x, const char *what) { compare_within(x, REAL_TOLERANCE, what); }

/* 0 at times, 1 often, else up to `most`. */
static int64_t some(int64_t most) {
    int64_t choice = below(12);
    return choice == 0 ? 0 : choice < 4 ? 1 : 1 + below(most);
}
static int64_t at_least_one(int64_t most) { return below(4) ? 1 + below(most) : 1; }

/* Each test begins with numbers of its own. */
static void begin(const char *name) {
    uint64_t key = seed;
    for (; *name; name++) key = pd_random(key, (uint64_t)(unsigned char)*name);
    random_seed(key);
}

/* ======================================================================================================== */
/* Memory and basics                                                                                        */

static void test_memory(void **state) {
    const int64_t sizes[] = { 0, 1, 7, 1000, 262144, 262145, 3000001 }; /* the last ones exceed the pinned memory */
    (void)state;
    begin("memory");
    for (int round = 0; round < 3; round++)
        for (int k = 0; k < COUNT(sizes); k++) {
            pd_device *d = device[GPU];
            size_t bytes = (size_t)sizes[k] * sizeof(uint32_t);
            uint32_t *a = (uint32_t *)malloc(bytes + 1), *b = (uint32_t *)malloc(bytes + 1);
            void *there = d->alloc(d, bytes);
            assert_non_null(there);
            for (int64_t i = 0; i < sizes[k]; i++) a[i] = (uint32_t)(i * 2654435761u + (uint32_t)round);
            d->upload(d, there, a, bytes);
            memset(a, 7, bytes); /* what was given is the caller's again */
            d->download(d, b, there, bytes);
            for (int64_t i = 0; i < sizes[k]; i++)
                if (b[i] != (uint32_t)(i * 2654435761u + (uint32_t)round))
                    fail_msg("%lld of %lld", (long long)i, (long long)sizes[k]);
            d->free(d, there);
            free(a);
            free(b);
        }
    device[GPU]->free(device[GPU], NULL);
}

static void test_fill(void **state) {
    (void)state;
    begin("fill");
    for (int round = 0; round < rounds(10); round++) {
        int64_t n = some(round < 5 ? 600 : 100000), first = below(n + 1);
        numbers y = any(n);
        BOTH device[i]->fill(device[i], n - first, (pd_real)round, y.at[i] + first);
        compare(y, "fill");
    }
}

/* Strides for a box in any order of the axes, with gaps; 0 where `repeated`. Returns the numbers that are needed. */
static int64_t lay_out(const int64_t size[4], const bool repeated[4], int64_t strides[4]) {
    int order[4] = { 0, 1, 2, 3 };
    int64_t step = 1, last = 0;
    for (int k = 3; k > 0 && below(2); k--) {
        int other = (int)below(k + 1), kept = order[k];
        order[k] = order[other];
        order[other] = kept;
    }
    for (int k = 3; k >= 0; k--) {
        int axis = order[k];
        strides[axis] = repeated[axis] ? 0 : step;
        if (repeated[axis] || size[axis] == 0) continue;
        last += (size[axis] - 1) * step;
        step *= size[axis];
        if (below(4) == 0) step += 1 + below(3);
    }
    return last + 1;
}

static void one_contract(const int64_t size[4], const bool sums[4], const bool again_a[4], const bool again_b[4]) {
    int64_t as[4], bs[4], ys[4];
    numbers a = any(lay_out(size, again_a, as)), b = maybe(lay_out(size, again_b, bs)),
            y = any(lay_out(size, sums, ys));
    pd_real alpha = (pd_real)uniform(-2, 2);
    double terms = 1;
    for (int k = 0; k < 4; k++) terms *= sums[k] ? (double)size[k] : 1;
    BOTH device[i]->contract(device[i], size, alpha, a.at[i], as, b.at[i], bs, y.at[i], ys);
    compare_within(y, (1 + terms / 1000) * REAL_TOLERANCE, "contract"); /* the CPU adds up columns in pd_real */
    compare(a, "contract's a");
    compare(b, "contract's b");
}

static void test_contract(void **state) {
    const int64_t large[][4] = { { 1, 1, 1, 70001 }, { 1, 1, 300, 301 }, { 1, 1, 7, 20000 },
                                 { 1, 1, 20000, 7 }, { 1, 16, 33, 81 },  { 1, 3, 40, 300 },
                                 { 2, 3, 5, 1201 },  { 1, 1, 5000, 1 },  { 1, 1, 1, 5000 } };
    (void)state;
    begin("contract");
    for (int round = 0; round < rounds(150); round++) {
        int64_t size[4];
        bool again[3][4];
        if (!chosen()) continue;
        for (int k = 0; k < 4; k++) {
            size[k] = round % 8 ? at_least_one(9) : some(9);
            for (int j = 0; j < 3; j++) again[j][k] = below(3) == 0;
        }
        one_contract(size, again[0], again[1], again[2]);
    }
    for (int k = 0; k < COUNT(large); k++)
        for (int which = 0; which < 16; which++) {
            bool sums[4], no[4] = { false, false, false, false }, other = true;
            for (int j = 0; j < 4; j++) {
                sums[j] = which >> j & 1;
                other = other && !(sums[j] && large[k][j] == 1); /* a sum of one number is none */
            }
            if (other && chosen()) one_contract(large[k], sums, no, no);
        }
}

/* a or b may be y, if every number goes to its own place. */
static void test_contract_in_place(void **state) {
    int64_t size[4] = { 1, 1, 13, 101 }, strides[4] = { 0, 0, 101, 1 };
    numbers y;
    (void)state;
    begin("contract in place");
    y = any(13 * 101);
    BOTH device[i]->contract(device[i], size, (pd_real)-0.25, y.at[i], strides, NULL, strides, y.at[i], strides);
    BOTH device[i]->contract(device[i], size, 1, y.at[i], strides, y.at[i], strides, y.at[i], strides);
    compare(y, "contract in place");
}

/* The `round`th of the ways to end a product. */
static pd_epilogue any_epilogue(const pd_real *scale, const pd_real *center, const pd_real *bias, int round) {
    const pd_act acts[] = { PD_LINEAR, PD_RELU, PD_TANH, PD_BRELU };
    pd_epilogue after = { round & 1 ? scale : NULL, round % 3 ? NULL : center, round & 2 ? bias : NULL,
                          acts[round / 4 % 4], (pd_real)0.5 };
    return after;
}

static void one_gemm(int64_t m, int64_t n, int64_t k, int round) {
    bool ta = below(2) != 0, tb = below(2) != 0;
    int64_t lda = (ta ? m : k) + below(3), ldb = (tb ? k : n) + below(3), ldc = n + below(3);
    numbers a = any((ta ? k : m) * lda), b = any((tb ? n : k) * ldb), c = any(m * ldc);
    const pd_real betas[] = { 0, 1, (pd_real)-0.5 };
    pd_real alpha = (pd_real)uniform(-2, 2), beta = betas[below(3)];
    if (beta == 0 && ldc == n) BOTH device[i]->fill(device[i], m * n, (pd_real)NAN, c.at[i]); /* must not be read */
    numbers scale = any(n), center = any(n), bias = any(n);
    pd_epilogue after[2];
    bool finish = below(2) != 0;
    BOTH {
        after[i] = any_epilogue(scale.at[i], center.at[i], bias.at[i], round);
        device[i]->gemm(device[i], ta, tb, m, n, k, alpha, a.at[i], lda, b.at[i], ldb, beta, c.at[i], ldc,
                        finish ? &after[i] : NULL);
    }
    compare(c, "gemm");
    compare(a, "gemm's a");
    compare(b, "gemm's b");
    compare(scale, "gemm's scale");
    compare(bias, "gemm's bias");
}

static void test_gemm(void **state) {
    (void)state;
    begin("gemm");
    for (int round = 0; round < rounds(100); round++) {
        int64_t m = some(40), n = some(40);
        one_gemm(m, n, some(40), round);
    }
    for (int round = 0; round < 8; round++)
        one_gemm(round & 1 ? 1 : 65, round & 2 ? 1 : 130, round & 4 ? 1 : 257, 3 * round);
}

static void test_norm(void **state) {
    const int64_t sizes[] = { 0, 1, 2, 31, 32, 255, 256, 257, 4097, 100003 };
    (void)state;
    begin("norm");
    for (int k = 0; k < COUNT(sizes); k++) {
        int64_t n = sizes[k];
        numbers x = between(n, -3, 3);
        double sums[2];
        BOTH sums[i] = device[i]->norm(device[i], n, x.at[i]);
        check_near(sums[GPU], sums[CPU], 1e-12, "norm");
        BOTH sums[i] = device[i]->norm(device[i], n, x.at[i]);
        check_near(sums[GPU], sums[CPU], 1e-12, "norm again");
        for (int bad = 0; n > 0 && bad < 3; bad++) {
            pd_real value = bad == 0 ? (pd_real)NAN : bad == 1 ? (pd_real)INFINITY : (pd_real)-INFINITY;
            BOTH device[i]->fill(device[i], 1, value, x.at[i] + below(n));
            assert_false(isfinite(device[GPU]->norm(device[GPU], n, x.at[GPU])));
        }
        BOTH device[i]->free(device[i], x.at[i]);
    }
}

/* ======================================================================================================== */
/* Optimizers                                                                                               */

static pd_optimizer optimizer(int kind) {
    pd_optimizer o;
    switch (kind) {
    case 0: return pd_sgd(0.1);
    case 1: return pd_momentum(0.1, 0.9);
    case 2: return pd_nesterov(0.1, 0.9);
    case 3: return pd_adagrad(0.1);
    case 4: return pd_adadelta(1);
    case 5: return pd_rmsprop(0.1);
    case 6:
        o = pd_rmsprop(0.1);
        o.momentum = 0.5;
        o.centered = true;
        return o;
    case 7: return pd_decayed_adagrad(0.1);
    case 8: return pd_adam(0.1);
    case 9: return pd_adamw(0.1);
    default: return pd_adamax(0.1);
    }
}

static void test_update(void **state) {
    (void)state;
    begin("update");
    for (int round = 0; round < rounds(66); round++) {
        int64_t n = some(round < 55 ? 300 : 9000);
        pd_update u;
        numbers w = any(n), states[PD_MAX_STATES];
        unsigned char *mask = below(2) ? (unsigned char *)malloc((size_t)n + 1) : NULL;
        memset(&u, 0, sizeof u);
        u.optimizer = optimizer(round % 11);
        u.rate = u.optimizer.rate;
        u.scale = uniform(0.1, 1);
        u.clip = below(2) ? 0.3 : 0;
        u.l1 = below(2) ? 0.01 : 0;
        u.l2 = below(2) ? 0.1 : 0;
        for (int k = 0; k < PD_MAX_STATES; k++) {
            states[k] = k < pd_optimizer_states(&u.optimizer) ? any(n) : nothing;
            if (states[k].at[CPU]) BOTH device[i]->fill(device[i], n, 0, states[k].at[i]);
        }
        for (u.step = 1; u.step <= 3; u.step++) {
            numbers g = any(n);
            BOTH {
                pd_real *at[PD_MAX_STATES] = { states[0].at[i], states[1].at[i], states[2].at[i] };
                for (int64_t k = 0; mask && k < n; k++) mask[k] = k % 3 != 0;
                device[i]->update(device[i], &u, n, w.at[i], g.at[i], mask, at);
                if (mask) memset(mask, 0, (size_t)n);
            }
            compare(g, "update's gradient");
        }
        compare(w, "update");
        for (int k = 0; k < PD_MAX_STATES; k++) compare(states[k], "update's states");
        free(mask);
    }
}

static void test_update_rows(void **state) {
    enum { TABLE = 50, MOST = 40 };
    (void)state;
    begin("update_rows");
    for (int round = 0; round < rounds(40); round++) {
        int64_t count = some(MOST), width = at_least_one(70), rows[TABLE], state_rows[TABLE], kept[2][MOST];
        double carry[4 * MOST], kept_carry[4 * MOST];
        bool momentum = below(2) != 0, carried = below(2) != 0, stepped = !carried || below(2);
        numbers w = any(TABLE * width), g = stepped ? any(count * width) : nothing;
        numbers s = momentum ? any(TABLE * width) : nothing;
        pd_update u;
        memset(&u, 0, sizeof u);
        u.optimizer = momentum ? pd_momentum(0.1, 0.9) : pd_sgd(0.1);
        u.rate = 0.1, u.scale = 0.5, u.l2 = 0.01, u.step = 3, u.clip = below(2) ? 0.2 : 0;
        for (int64_t k = 0; k < TABLE; k++) rows[k] = state_rows[k] = k;
        for (int64_t k = TABLE - 1; k > 0; k--) {
            int64_t j = below(k + 1), kept_row = rows[k];
            rows[k] = rows[j], rows[j] = kept_row;
            j = below(k + 1), kept_row = state_rows[k];
            state_rows[k] = state_rows[j], state_rows[j] = kept_row;
        }
        for (int64_t k = 0; k < 4 * MOST; k++) /* without a state there is none to add */
            kept_carry[k] = !momentum && k % 4 == 1 ? 0 : uniform(0, 1);
        memcpy(kept[0], rows, sizeof kept[0]);
        memcpy(kept[1], state_rows, sizeof kept[1]);
        BOTH {
            memcpy(rows, kept[0], sizeof kept[0]);
            memcpy(state_rows, kept[1], sizeof kept[1]);
            memcpy(carry, kept_carry, sizeof carry);
            device[i]->update_rows(device[i], &u, count, width, rows, momentum ? state_rows : NULL,
                                   carried ? carry : NULL, w.at[i], g.at[i], s.at[i]);
            memset(rows, -1, sizeof rows);
            memset(state_rows, -1, sizeof state_rows);
            memset(carry, -1, sizeof carry);
        }
        compare(w, "update_rows");
        compare(g, "update_rows' gradient");
        compare(s, "update_rows' state");
    }
}

static void test_gather_rows(void **state) {
    enum { TABLE = 50, MOST = 40 };
    (void)state;
    begin("gather_rows");
    for (int round = 0; round < rounds(40); round++) {
        int64_t count = some(MOST), width = at_least_one(70), rows[2][MOST], state_rows[2][MOST];
        double carry[2][4 * MOST];
        bool momentum = below(2) != 0, carried = below(2) != 0;
        numbers w = any(TABLE * width), s = momentum ? any(TABLE * width) : nothing, y = any(count * width);
        for (int64_t k = 0; k < MOST; k++) rows[0][k] = below(TABLE), state_rows[0][k] = below(TABLE);
        for (int64_t k = 0; k < 4 * MOST; k++) carry[0][k] = uniform(0, 1);
        BOTH {
            memcpy(rows[1], rows[0], sizeof rows[0]);
            memcpy(state_rows[1], state_rows[0], sizeof state_rows[0]);
            memcpy(carry[1], carry[0], sizeof carry[0]);
            device[i]->gather_rows(device[i], count, width, rows[1], momentum ? state_rows[1] : NULL,
                                   carried ? carry[1] : NULL, w.at[i], s.at[i], y.at[i]);
            memset(rows[1], -1, sizeof rows[1]);
            memset(state_rows[1], -1, sizeof state_rows[1]);
            memset(carry[1], -1, sizeof carry[1]);
        }
        compare(w, "gather_rows' table");
        compare(s, "gather_rows' state");
        compare(y, "gather_rows");
    }
}

/* ======================================================================================================== */
/* Activations, convolution, pooling                                                                        */

static void test_activations(void **state) {
    (void)state;
    begin("activations");
    for (int act = 0; act < PD_ACT_COUNT; act++)
        for (int round = 0; round < 8; round++) {
            bool positive = act == PD_LOG || act == PD_SQRT || act == PD_RECIPROCAL, in_place = below(2) != 0;
            bool needs_x = act == PD_GELU || act == PD_LOG || act == PD_ABS || act == PD_SQUARE;
            int64_t rows = some(20), width = at_least_one(round < 6 ? 70 : 1000), n = rows * width;
            pd_real alpha = (pd_real)(below(2) ? 0.3 : act == PD_BRELU ? 24 : 0.01);
            numbers x = between(n, positive ? 0.1 : -4, 4), y = any(n), grad = any(n);
            BOTH {
                pd_real *to = in_place ? x.at[i] : y.at[i];
                device[i]->activate(device[i], (pd_act)act, alpha, rows, width, x.at[i], to);
                if (in_place && needs_x) continue;
                device[i]->activate_backward(device[i], (pd_act)act, alpha, rows, width, needs_x ? x.at[i] : NULL, to,
                                             grad.at[i]);
            }
            compare(grad, "activate_backward");
            compare(x, "activate");
            compare(y, "activate's output");
        }
}

/* What is not finite stays so, in the same places. */
static void test_not_finite(void **state) {
    const pd_real values[] = { 1, (pd_real)NAN, -2, (pd_real)INFINITY, (pd_real)-INFINITY, 0, (pd_real)-0.0, 3 };
    (void)state;
    const pd_real zeros[8] = { 0, 0, 0, 0, 0, 0, 0, 0 }, ones[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    const pd_real alpha = (pd_real)0.5;
    begin("not finite");
    for (int act = 0; act < PD_ACT_COUNT; act++) {
        numbers x = given(8, values);
        int64_t rows = act == PD_SOFTMAX ? 4 : 1;
        BOTH device[i]->activate(device[i], (pd_act)act, alpha, rows, 8 / rows, x.at[i], x.at[i]);
        compare(x, "activate of what is not finite");
        if (act == PD_SOFTMAX) continue;
        numbers at = given(8, values), y = given(8, values), none = given(8, zeros), some_grad = given(8, ones);
        BOTH {
            device[i]->activate(device[i], (pd_act)act, alpha, 1, 8, at.at[i], y.at[i]);
            device[i]->activate_backward(device[i], (pd_act)act, alpha, 1, 8, at.at[i], y.at[i], none.at[i]);
            device[i]->activate_backward(device[i], (pd_act)act, alpha, 1, 8, at.at[i], y.at[i], some_grad.at[i]);
        }
        compare(none, "activate_backward of 0 where a slope may be infinite");
        compare(some_grad, "activate_backward where a slope may be infinite");
        compare(at, "activate_backward's x");
        compare(y, "activate_backward's y");
    }
}

static pd_conv_shape any_conv(void) {
    pd_conv_shape s;
    memset(&s, 0, sizeof s);
    s.rows = some(5);
    s.groups = at_least_one(3);
    s.in_c = s.groups * at_least_one(4);
    s.out_c = s.groups * at_least_one(5);
    for (;;) {
        int64_t reach_h, reach_w;
        s.in_h = at_least_one(9), s.in_w = at_least_one(9);
        s.filter_h = at_least_one(4), s.filter_w = at_least_one(4);
        s.stride_h = at_least_one(3), s.stride_w = at_least_one(3);
        s.pad_h = below(3), s.pad_w = below(3);
        s.dilation_h = at_least_one(3), s.dilation_w = at_least_one(3);
        reach_h = s.dilation_h * (s.filter_h - 1) + 1, reach_w = s.dilation_w * (s.filter_w - 1) + 1;
        if (reach_h > s.in_h + 2 * s.pad_h || reach_w > s.in_w + 2 * s.pad_w) continue;
        s.out_h = (s.in_h + 2 * s.pad_h - reach_h) / s.stride_h + 1;
        s.out_w = (s.in_w + 2 * s.pad_w - reach_w) / s.stride_w + 1;
        return s;
    }
}

static void check_convolutions(int rounds) {
    for (int round = 0; round < rounds; round++) {
        pd_conv_shape s = any_conv();
        int64_t weights = s.out_c * s.in_c / s.groups * s.filter_h * s.filter_w;
        numbers x = any(s.rows * s.in_c * s.in_h * s.in_w), dx = any(x.n);
        numbers y = any(s.rows * s.out_c * s.out_h * s.out_w), dy = any(y.n), w = any(weights), dw = any(weights);
        numbers scale = any(s.out_c), center = any(s.out_c), bias = any(s.out_c);
        pd_real beta = round % 3 == 0 ? 0 : round % 3 == 1 ? 1 : (pd_real)-0.5;
        if (beta == 0) BOTH device[i]->fill(device[i], y.n, (pd_real)NAN, y.at[i]); /* must not be read */
        BOTH {
            pd_epilogue after = any_epilogue(scale.at[i], center.at[i], bias.at[i], round);
            device[i]->conv(device[i], &s, x.at[i], w.at[i], beta, y.at[i], round % 5 ? &after : NULL);
            device[i]->conv_backward_data(device[i], &s, w.at[i], dy.at[i], dx.at[i]);
            device[i]->conv_backward_filter(device[i], &s, x.at[i], dy.at[i], dw.at[i]);
        }
        compare(y, "conv");
        compare(dx, "conv_backward_data");
        compare(dw, "conv_backward_filter");
        compare(x, "conv's x");
        compare(w, "conv's w");
        compare(dy, "conv's dy");
        compare(scale, "conv's scale");
        compare(bias, "conv's bias");
    }
}

static void test_convolution(void **state) {
    (void)state;
    begin("convolution");
    check_convolutions(60);
}

/* With work space for one image, for some, and with waiting. */
static void test_options(void **state) {
    const size_t spaces[] = { 1, 5000, 20000 };
    pd_device *usual = device[GPU];
    char message[300];
    (void)state;
    begin("options");
    for (int k = 0; k < COUNT(spaces); k++) {
        pd_cuda_opts opts = { .work_space = spaces[k], .synchronous = k == 1 };
        device[GPU] = pd_cuda_new(0, &opts, message, sizeof message);
        if (!device[GPU]) fail_msg("%s", message);
        check_convolutions(12);
        pd_cuda_free(device[GPU]);
    }
    device[GPU] = usual;
}

static void test_tf32(void **state) {
    pd_cuda_opts opts = { .tf32 = true };
    pd_device *usual = device[GPU];
    char message[300];
    (void)state;
    begin("tf32");
    device[GPU] = pd_cuda_new(0, &opts, message, sizeof message);
    if (!device[GPU]) fail_msg("%s", message);
    for (int round = 0; round < 5; round++) {
        int64_t m = 64, n = 72, k = 40;
        numbers a = any(m * k), b = any(k * n), c = any(m * n);
        BOTH device[i]->gemm(device[i], false, false, m, n, k, 1, a.at[i], k, b.at[i], n, 1, c.at[i], n, NULL);
        compare_within(c, sizeof(pd_real) == 8 ? REAL_TOLERANCE : 1e-2, "gemm with tf32");
        compare(a, "a");
        compare(b, "b");
    }
    pd_cuda_free(device[GPU]);
    device[GPU] = usual;
}

/* The output's side; windows never lie wholly outside. */
static int64_t pooled(int64_t in, int64_t size, int64_t stride, int64_t pad, bool ceil) {
    int64_t out = (in + 2 * pad - size + (ceil ? stride - 1 : 0)) / stride + 1;
    while ((out - 1) * stride >= in + pad) out--;
    return out;
}

static void test_pooling(void **state) {
    (void)state;
    begin("pooling");
    for (int round = 0; round < rounds(120); round++) {
        pd_pool_shape s;
        bool ceil = below(2) != 0, ties = below(2) != 0;
        numbers x, y, dy, dx;
        memset(&s, 0, sizeof s);
        s.method = (pd_pool_method)(round % 4);
        s.rows = some(4), s.channels = at_least_one(3);
        s.size_h = at_least_one(4), s.size_w = at_least_one(4);
        s.in_h = s.size_h + below(7), s.in_w = s.size_w + below(7);
        s.stride_h = at_least_one(5), s.stride_w = at_least_one(5);
        s.pad_h = below(s.size_h), s.pad_w = below(s.size_w);
        s.out_h = pooled(s.in_h, s.size_h, s.stride_h, s.pad_h, ceil);
        s.out_w = pooled(s.in_w, s.size_w, s.stride_w, s.pad_w, ceil);
        x = any(s.rows * s.channels * s.in_h * s.in_w);
        if (ties) {
            pd_real *values = host(x.n);
            for (int64_t k = 0; k < x.n; k++) values[k] = below(40) ? (pd_real)below(3) : (pd_real)NAN;
            set(&x, values);
            free(values);
        }
        dx = any(x.n), y = any(s.rows * s.channels * s.out_h * s.out_w), dy = any(y.n);
        BOTH {
            device[i]->pool(device[i], &s, x.at[i], y.at[i]);
            device[i]->pool_backward(device[i], &s, x.at[i], y.at[i], dy.at[i], dx.at[i]);
        }
        compare(y, "pool");
        compare(dx, "pool_backward");
        compare(x, "pool's x");
        compare(dy, "pool's dy");
    }
}

/* ======================================================================================================== */
/* Costs, dropout, normalisation                                                                            */

static void test_cross_entropy(void **state) {
    (void)state;
    begin("cross_entropy");
    for (int round = 0; round < rounds(80); round++) {
        int64_t rows = some(30), width = at_least_one(round < 70 ? 40 : 700), *ids = NULL, *kept = NULL;
        bool by_x = below(2) != 0;
        numbers p = between(rows * width, below(4) ? 0.05 : 0, 1), soft = nothing, weights = nothing, cost = any(rows);
        numbers dcost = any(rows), dx = any(rows * width), x = nothing, row_weights = nothing;
        if (below(2)) x = any(rows * width);
        if (below(2)) row_weights = below(4) ? any(rows) : between(rows, 0, 0);
        if (below(2)) soft = between(rows * width, 0, 1);
        else {
            ids = (int64_t *)malloc(((size_t)rows + 1) * sizeof *ids);
            kept = (int64_t *)malloc(((size_t)rows + 1) * sizeof *ids);
            for (int64_t r = 0; r < rows; r++) kept[r] = below(width);
        }
        if (below(2)) weights = between(width, 0, 2);
        BOTH {
            if (ids) memcpy(ids, kept, (size_t)rows * sizeof *ids);
            if (x.n > 0) device[i]->activate(device[i], PD_SOFTMAX, 0, rows, width, x.at[i], p.at[i]);
            device[i]->cross_entropy(device[i], rows, width, x.at[i], p.at[i], ids, soft.at[i], row_weights.at[i],
                                     weights.at[i], cost.at[i]);
            if (ids) memset(ids, -1, (size_t)rows * sizeof *ids);
            if (ids) memcpy(ids, kept, (size_t)rows * sizeof *ids);
            device[i]->cross_entropy_backward(device[i], rows, width, p.at[i], ids, soft.at[i], weights.at[i],
                                              dcost.at[i], by_x, dx.at[i]);
            if (ids) memset(ids, -1, (size_t)rows * sizeof *ids);
        }
        compare(cost, "cross_entropy");
        compare(dx, "cross_entropy_backward");
        compare(x, "cross_entropy's x");
        compare(row_weights, "cross_entropy's weights of rows");
        compare(p, "cross_entropy's p");
        compare(soft, "cross_entropy's targets");
        compare(weights, "cross_entropy's weights");
        compare(dcost, "cross_entropy's dcost");
        free(ids);
        free(kept);
    }
}

static void test_dropout(void **state) {
    (void)state;
    begin("dropout");
    for (int round = 0; round < rounds(20); round++) {
        int64_t n = some(round < 15 ? 500 : 30000);
        uint64_t key = pd_random(seed, (uint64_t)round);
        double rate = round % 3 ? uniform(0, 0.99) : 0;
        numbers x = any(n), y = any(n);
        BOTH device[i]->dropout(device[i], n, key, rate, x.at[i], y.at[i]);
        compare(x, "dropout's x");
        compare(y, "dropout"); /* a wrong bit moves a number by x / (1 - rate) */
    }
}

static void test_batch_norm(void **state) {
    (void)state;
    begin("batch_norm");
    for (int round = 0; round < rounds(60); round++) {
        int64_t rows = some(8), channels = at_least_one(7), area = at_least_one(round < 50 ? 30 : 600);
        int64_t n = rows * channels * area;
        double epsilon = 1e-3;
        bool batch_moments = below(2) != 0, with_rest = below(2) != 0;
        numbers x = any(n), y = any(n), dy = any(n), moments = between(3 * channels, 0.1, 2);
        numbers weight = maybe(channels), bias = maybe(channels), dx = maybe(n);
        numbers dweight = maybe(channels), dbias = maybe(channels);
        BOTH {
            if (batch_moments) device[i]->channel_moments(device[i], rows, channels, area, x.at[i], moments.at[i]);
            const pd_real *mean = moments.at[i], *variance = mean + 2 * channels,
                          *rest = with_rest ? mean + channels : NULL;
            device[i]->batch_norm(device[i], rows, channels, area, x.at[i], mean, rest, variance, epsilon, weight.at[i],
                                  bias.at[i], y.at[i]);
            device[i]->batch_norm_backward(device[i], rows, channels, area, x.at[i], mean, rest, variance, epsilon,
                                           batch_moments, weight.at[i], dy.at[i], dx.at[i], dweight.at[i], dbias.at[i]);
        }
        compare(moments, "channel_moments");
        compare(y, "batch_norm");
        compare_within(dx, 5 * REAL_TOLERANCE, "batch_norm_backward's dx"); /* divided by small deviations */
        compare_within(dweight, 5 * REAL_TOLERANCE, "batch_norm_backward's dweight");
        compare(dbias, "batch_norm_backward's dbias");
        compare(x, "batch_norm's x");
        compare(dy, "batch_norm's dy");
        compare(weight, "batch_norm's weight");
        compare(bias, "batch_norm's bias");
    }
}

static void test_layer_norm(void **state) {
    (void)state;
    begin("layer_norm");
    for (int round = 0; round < rounds(60); round++) {
        int64_t rows = some(20), width = at_least_one(round < 50 ? 40 : 900), n = rows * width;
        numbers x = any(n), y = any(n), dy = any(n), moments = any(3 * rows), weight = maybe(width);
        numbers bias = maybe(width), dx = maybe(n), dweight = maybe(width), dbias = maybe(width);
        BOTH {
            device[i]->layer_norm(device[i], rows, width, x.at[i], 1e-3, weight.at[i], bias.at[i], moments.at[i],
                                  y.at[i]);
            device[i]->layer_norm_backward(device[i], rows, width, x.at[i], moments.at[i], weight.at[i], dy.at[i],
                                           dx.at[i], dweight.at[i], dbias.at[i]);
        }
        compare(moments, "layer_norm's moments");
        compare(y, "layer_norm");
        compare_within(dx, 5 * REAL_TOLERANCE, "layer_norm_backward's dx");
        compare(dweight, "layer_norm_backward's dweight");
        compare(dbias, "layer_norm_backward's dbias");
        compare(x, "layer_norm's x");
        compare(dy, "layer_norm's dy");
        compare(weight, "layer_norm's weight");
        compare(bias, "layer_norm's bias");
    }
}

static void test_group_norm(void **state) {
    (void)state;
    begin("group_norm");
    for (int round = 0; round < rounds(60); round++) {
        int64_t rows = some(20), groups = at_least_one(5), channels = groups * at_least_one(5);
        int64_t area = at_least_one(round < 50 ? 9 : 300), n = rows * channels * area;
        numbers x = any(n), y = any(n), dy = any(n), moments = any(3 * rows * groups), weight = maybe(channels);
        numbers bias = maybe(channels), dx = maybe(n), dweight = maybe(channels), dbias = maybe(channels);
        BOTH {
            device[i]->group_norm(device[i], rows, channels, area, groups, x.at[i], 1e-3, weight.at[i], bias.at[i],
                                  moments.at[i], y.at[i]);
            device[i]->group_norm_backward(device[i], rows, channels, area, groups, x.at[i], moments.at[i],
                                           weight.at[i], dy.at[i], dx.at[i], dweight.at[i], dbias.at[i]);
        }
        compare(moments, "group_norm's moments");
        compare(y, "group_norm");
        compare_within(dx, 5 * REAL_TOLERANCE, "group_norm_backward's dx");
        compare_within(dweight, 5 * REAL_TOLERANCE, "group_norm_backward's dweight");
        compare(dbias, "group_norm_backward's dbias");
        compare(x, "group_norm's x");
        compare(dy, "group_norm's dy");
        compare(weight, "group_norm's weight");
        compare(bias, "group_norm's bias");
    }
}

static void test_response_norm(void **state) {
    (void)state;
    begin("response_norm");
    for (int round = 0; round < rounds(40); round++) {
        int64_t rows = some(4), channels = at_least_one(9), area = at_least_one(20), size = at_least_one(11);
        int64_t n = rows * channels * area;
        double alpha = uniform(0.01, 1), beta = uniform(0.3, 1), k = uniform(0.5, 2);
        numbers x = any(n), y = any(n), scales = any(n), dy = any(n), dx = any(n);
        BOTH {
            device[i]->response_norm(device[i], rows, channels, area, size, alpha, beta, k, x.at[i], scales.at[i],
                                     y.at[i]);
            device[i]->response_norm_backward(device[i], rows, channels, area, size, alpha, beta, x.at[i], scales.at[i],
                                              dy.at[i], dx.at[i]);
        }
        compare(scales, "response_norm's scales");
        compare(y, "response_norm");
        compare(dx, "response_norm_backward");
        compare(x, "response_norm's x");
        compare(dy, "response_norm's dy");
    }
}

/* ======================================================================================================== */
/* Sparse rows and recurrent units                                                                          */

static void test_sparse_product(void **state) {
    enum { MOST = 30, PER_ROW = 8 };
    (void)state;
    begin("sparse_product");
    for (int round = 0; round < rounds(80); round++) {
        int64_t rows = some(MOST), width = at_least_one(90), table = at_least_one(40), entries = 0;
        int64_t starts[2][MOST + 1], columns[2][MOST * PER_ROW + 3];
        pd_real values[2][MOST * PER_ROW + 3];
        bool ids = below(3) == 0, ones = below(2) != 0;
        numbers x = any(table * width), y = any(rows * width);
        entries = ids ? 0 : below(3); /* the first row need not begin at entry 0 */
        for (int64_t r = 0; r <= rows; r++) {
            starts[0][r] = entries;
            if (r < rows) entries += ids ? 1 : below(PER_ROW + 1);
        }
        for (int64_t k = 0; k < entries; k++) columns[0][k] = below(table), values[0][k] = (pd_real)uniform(-1, 1);
        BOTH {
            pd_csr s = { rows, ids ? NULL : starts[1], columns[1], ones ? NULL : values[1] };
            memcpy(starts[1], starts[0], sizeof starts[0]);
            memcpy(columns[1], columns[0], sizeof columns[0]);
            memcpy(values[1], values[0], sizeof values[0]);
            device[i]->sparse_product(device[i], &s, width, x.at[i], y.at[i]);
            memset(starts[1], -1, sizeof starts[1]);
            memset(columns[1], -1, sizeof columns[1]);
            memset(values[1], -1, sizeof values[1]);
        }
        compare(x, "sparse_product's x");
        compare(y, "sparse_product");
    }
}

static void test_gru(void **state) {
    (void)state;
    begin("gru");
    for (int round = 0; round < rounds(40); round++) {
        int64_t rows = some(12), width = at_least_one(50), n = rows * width;
        numbers gates = any(3 * n), recurrent = any(3 * n), before = maybe(n), after = any(n), dafter = any(n);
        numbers dbefore = before.at[CPU] && below(3) ? any(n) : nothing;
        BOTH {
            device[i]->gru(device[i], rows, width, gates.at[i], recurrent.at[i], before.at[i], after.at[i]);
            device[i]->gru_backward(device[i], rows, width, gates.at[i], recurrent.at[i], before.at[i], dafter.at[i],
                                    dbefore.at[i]);
        }
        compare(after, "gru");
        compare(gates, "gru_backward's gates");
        compare(recurrent, "gru_backward's recurrent");
        compare(dbefore, "gru_backward's dbefore");
        compare(before, "gru's before");
        compare(dafter, "gru's dafter");
    }
}

static void test_lstm(void **state) {
    (void)state;
    begin("lstm");
    for (int round = 0; round < rounds(40); round++) {
        int64_t rows = some(12), width = at_least_one(50), n = rows * width;
        numbers gates = any(4 * n), peephole = maybe(3 * width), before = maybe(n), cells = any(n), after = any(n);
        numbers dafter = any(n), dcells = any(n);
        BOTH {
            device[i]->lstm(device[i], rows, width, gates.at[i], peephole.at[i], before.at[i], cells.at[i],
                            after.at[i]);
            device[i]->lstm_backward(device[i], rows, width, gates.at[i], peephole.at[i], before.at[i], cells.at[i],
                                     dafter.at[i], dcells.at[i]);
        }
        compare(after, "lstm");
        compare(cells, "lstm's cells");
        compare(gates, "lstm_backward's gates");
        compare(dcells, "lstm_backward's dcells");
        compare(peephole, "lstm's peephole");
        compare(before, "lstm's before");
        compare(dafter, "lstm's dafter");
    }
}

enum { MOST_QUERIES = 60 };

/* The spans of `sentences` with random numbers of queries and keys; gone once the operation has returned. */
static pd_attention_shape any_spans(int64_t spans[3 * MOST_QUERIES], int64_t *keys, int64_t *weights) {
    pd_attention_shape s = { 0, at_least_one(300), at_least_one(300), spans };
    *keys = *weights = 0;
    for (int64_t sentence = below(6); sentence > 0; sentence--) {
        int64_t count = some(12);
        for (int64_t query = some(10); query > 0; query--, s.rows++) {
            spans[3 * s.rows] = *keys, spans[3 * s.rows + 1] = *keys + count, spans[3 * s.rows + 2] = *weights;
            *weights += count;
        }
        *keys += count;
    }
    return s;
}

static void test_attention(void **state) {
    (void)state;
    begin("attention");
    for (int round = 0; round < rounds(40); round++) {
        int64_t spans[3 * MOST_QUERIES], sent[3 * MOST_QUERIES], keys, count;
        pd_attention_shape s = any_spans(spans, &keys, &count);
        int64_t n = s.rows * s.width;
        numbers query = any(n), key = any(keys * s.width), value = any(keys * s.value_width), v = any(s.width);
        numbers weights = any(count), y = any(s.rows * s.value_width), dy = any(y.n), dv = maybe(n);
        numbers dquery = maybe(n), dkeys = maybe(key.n), dvalues = maybe(value.n);
        if (s.rows > 0 && below(2)) /* a row without a gradient */
            BOTH device[i]->fill(device[i], s.value_width, 0, dy.at[i]);
        s.spans = sent;
        BOTH {
            memcpy(sent, spans, sizeof sent);
            device[i]->attention(device[i], &s, query.at[i], key.at[i], value.at[i], v.at[i], weights.at[i], y.at[i]);
            memset(sent, -1, sizeof sent);
            memcpy(sent, spans, sizeof sent);
            device[i]->attention_backward(device[i], &s, query.at[i], key.at[i], value.at[i], v.at[i], weights.at[i],
                                          dy.at[i], dquery.at[i], dkeys.at[i], dvalues.at[i], dv.at[i]);
            memset(sent, -1, sizeof sent);
        }
        compare(weights, "attention's weights");
        compare(y, "attention");
        compare(dquery, "attention_backward's dquery");
        compare(dkeys, "attention_backward's dkeys");
        compare(dvalues, "attention_backward's dvalues");
        compare(dv, "attention_backward's dv");
        compare(query, "attention's query");
        compare(key, "attention's keys");
        compare(value, "attention's values");
        compare(v, "attention's v");
        compare(dy, "attention's dy");
    }
}

/* ======================================================================================================== */
/* Whole nets                                                                                               */

enum { SAMPLES = 24, SIDE = 7, WORDS = 60 };

typedef struct model {
    pd_net *net;
    pd_trainer *trainer;
    pd_batch *batch;
    pd_layer *cost;
} model;

/* Something of everything that has operations of its own, and a layer that runs on the host. */
static pd_status build(model *m, pd_device *d, int64_t samples) {
    static const double weights[] = { 1, 2, 0.5 };
    pd_layer *image, *words, *label, *x, *v, *joined[2];
    memset(m, 0, sizeof *m);
    m->net = pd_net_new(&(pd_net_opts){ .seed = 3, .device = d });
    if (!m->net) return PD_E_MEMORY;
    image = pd_image(m->net, "image", 2, SIDE, SIDE);
    words = pd_sequence(pd_ids(m->net, "words", WORDS));
    label = pd_label(m->net, "label", 3);
    x = pd_conv(m->net, image, 4, 3, &(pd_conv_opts){ .pad = 1, .groups = 2, .act = PD_GELU });
    x = pd_response_norm(m->net, pd_batch_norm(m->net, x, &(pd_batch_norm_opts){ .act = PD_RELU }), NULL);
    x = pd_pool(m->net, pd_maxout(m->net, x, 2, NULL), 2, &(pd_pool_opts){ .ceil = true });
    x = pd_layer_norm(m->net, pd_dropout(m->net, pd_fc(m->net, x, 8, NULL), 0.2, NULL), NULL);
    v = pd_embedding(m->net, words, 6, &(pd_embedding_opts){ .weight.sparse = true });
    x = pd_fc(m->net, x, 5, NULL);
    v = pd_gru(m->net, v, 5, &(pd_gru_opts){ .first = x });
    v = pd_lstm(m->net, v, 5, &(pd_lstm_opts){ .first = x, .first_cell = x, .cells = true, .peepholes = true });
    v = pd_sequence_pool(m->net, v, PD_LAST, NULL);
    joined[0] = x, joined[1] = v;
    x = pd_fc_sum(m->net, joined, 2, 3, &(pd_fc_opts){ .act = PD_SOFTMAX, .weight.prune = 0.1 });
    m->cost = pd_cross_entropy(m->net, x, label, &(pd_cost_opts){ .class_weights = weights });
    m->trainer =
        pd_trainer_new(m->net, m->cost, pd_momentum(0.05, 0.9), &(pd_trainer_opts){ .l2 = 1e-3, .clip_norm = 5 });
    m->batch = m->trainer ? pd_batch_new(m->net) : NULL;
    if (!m->batch) return pd_error_status(m->net);
    for (int64_t s = 0; s < samples; s++) {
        pd_real *row = pd_batch_add_row(m->batch, 0);
        for (int i = 0; row && i < 2 * SIDE * SIDE; i++) row[i] = (pd_real)uniform(-1, 1);
        for (int64_t k = below(6); k >= 0; k--) pd_batch_add_id(m->batch, 1, below(WORDS));
        pd_batch_add_id(m->batch, 2, below(3));
        if (pd_batch_end_sample(m->batch) != PD_OK) return PD_E_MEMORY;
    }
    return PD_OK;
}

static void free_model(model *m) {
    pd_batch_free(m->batch);
    pd_trainer_free(m->trainer);
    pd_net_free(m->net);
}

static pd_status train(model *m, int steps, double *cost) {
    pd_status status = PD_OK;
    for (int step = 0; status == PD_OK && step < steps; step++) status = pd_train_batch(m->trainer, m->batch, cost);
    return status;
}

/* All parameters, one after the other. */
static pd_real *parameters(const model *m, int64_t *n) {
    pd_real *values;
    *n = 0;
    for (pd_param *p = pd_param_first(m->net); p; p = p->next) *n += p->size;
    values = host(*n);
    *n = 0;
    for (pd_param *p = pd_param_first(m->net); p; *n += p->size, p = p->next)
        if (pd_param_get(p, values + *n, p->size) != PD_OK) fail_msg("%s", pd_error(m->net));
    return values;
}

static void test_training(void **state) {
    model m[2];
    pd_real *values[2];
    int64_t n = 0;
    double costs[2];
    (void)state;
    BOTH {
        begin("training");
        if (build(&m[i], device[i], SAMPLES) != PD_OK) fail_msg("%s", pd_error(m[i].net));
        if (train(&m[i], 10, &costs[i]) != PD_OK) fail_msg("%s", pd_error(m[i].net));
        values[i] = parameters(&m[i], &n);
    }
    check_near(costs[GPU], costs[CPU], 1e-5, "cost after training");
    for (int64_t k = 0; k < n; k++) check_near((double)values[GPU][k], (double)values[CPU][k], 1e-4, "parameter");
    BOTH {
        free_model(&m[i]);
        free(values[i]);
    }
}

static void test_gradient_check(void **state) {
    pd_gradcheck check;
    model m;
    (void)state;
    begin("gradients");
    if (build(&m, device[GPU], 5) != PD_OK) fail_msg("%s", pd_error(m.net));
    if (pd_check_gradients(m.cost, m.batch, NULL, &check) != PD_OK) fail_msg("%s", pd_error(m.net));
    assert_false(check.all_zero);
    if (sizeof(pd_real) == 8 && !(check.error < 1e-5)) fail_msg("%s: %g", check.worst, check.error);
    free_model(&m);
}

/* Two trainings from the same start. */
static void test_same_bits(void **state) {
    pd_real *values[2];
    int64_t n = 0;
    (void)state;
    for (int k = 0; k < 2; k++) {
        model m;
        begin("bits");
        if (build(&m, device[GPU], SAMPLES) != PD_OK || train(&m, 5, NULL) != PD_OK) fail_msg("%s", pd_error(m.net));
        values[k] = parameters(&m, &n);
        free_model(&m);
    }
    assert_memory_equal(values[0], values[1], (size_t)n * sizeof *values[0]);
    free(values[0]);
    free(values[1]);
}

typedef struct worker {
    int gpu;
    model m;
    pd_status status;
} worker;

static void *work(void *argument) {
    worker *w = (worker *)argument;
    w->status = train(&w->m, 5, NULL);
    return NULL;
}

/* Two devices in two threads, on two GPUs if there are, do what one does. */
static void test_threads(void **state) {
    worker workers[3];
    pd_device *devices[3];
    pthread_t threads[2];
    pd_real *values[3];
    int64_t n = 0;
    char message[300];
    (void)state;
    for (int k = 0; k < 3; k++) {
        workers[k].gpu = k % pd_cuda_count();
        devices[k] = pd_cuda_new(workers[k].gpu, NULL, message, sizeof message);
        if (!devices[k]) fail_msg("%s", message);
        begin("threads");
        assert_int_equal(build(&workers[k].m, devices[k], SAMPLES), PD_OK);
    }
    for (int k = 0; k < 2; k++) assert_int_equal(pthread_create(&threads[k], NULL, work, &workers[k]), 0);
    for (int k = 0; k < 2; k++) assert_int_equal(pthread_join(threads[k], NULL), 0);
    work(&workers[2]);
    for (int k = 0; k < 3; k++) {
        if (workers[k].status != PD_OK) fail_msg("%s", pd_error(workers[k].m.net));
        values[k] = parameters(&workers[k].m, &n);
        free_model(&workers[k].m);
        pd_cuda_free(devices[k]);
    }
    for (int k = 0; k < 2; k++) assert_memory_equal(values[k], values[2], (size_t)n * sizeof *values[k]);
    for (int k = 0; k < 3; k++) free(values[k]);
}

static void test_no_such_device(void **state) {
    char message[300] = "";
    (void)state;
    assert_true(pd_cuda_count() > 0);
    assert_null(pd_cuda_new(pd_cuda_count(), NULL, message, sizeof message));
    check_contains(message, "no usable GPU: ");
    assert_null(pd_cuda_new(-1, NULL, message, sizeof message));
    assert_null(pd_cuda_new(-1, NULL, NULL, 0));
    pd_cuda_free(NULL);
}

/* More memory than there is: the caller is told, and it goes on. */
static void test_out_of_memory(void **state) {
    pd_device *d = device[GPU];
    char message[300] = "";
    (void)state;
    assert_null(d->alloc(d, (size_t)1 << 50));
    assert_int_equal(d->wait(d, message, sizeof message), PD_OK);
    assert_string_equal(message, "");
}

static void test_table(void **state) {
    (void)state;
#define HAS(name) assert_non_null(device[GPU]->name);
    PD_OPERATIONS(HAS)
    assert_false(device[GPU]->host_memory);
    check_contains(device[GPU]->name, "cuda 0: ");
}

#ifdef STAND_IN
/* ======================================================================================================== */
/* With the stand-in: counts and failures on demand                                                         */

static void test_steady_state(void **state) {
    model m;
    int64_t calls;
    (void)state;
    begin("steady state");
    assert_int_equal(build(&m, device[GPU], SAMPLES), PD_OK);
    assert_int_equal(train(&m, 2, NULL), PD_OK);
    calls = cuda_on_cpu_count().calls[CUDA_ON_CPU_MALLOC];
    assert_int_equal(train(&m, 5, NULL), PD_OK);
    assert_int_equal(cuda_on_cpu_count().calls[CUDA_ON_CPU_MALLOC], calls);
    free_model(&m);
}

static int64_t living(void) {
    cuda_on_cpu_counts c = cuda_on_cpu_count();
    return c.live_allocations + c.live_host_allocations + c.live_streams + c.live_events + c.live_handles;
}

/* Every call that can fail does so once, while a device is made, used and freed. Messages name file and line, nothing
   is left behind, and what comes after a failure is harmless. */
static void test_failures(void **state) {
    char path[] = "/tmp/paddle-cuda-XXXXXX"; /* saving hears of the last operations, too */
    int file = mkstemp(path);
    int64_t before = living();
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (int kind = 0; kind < CUDA_ON_CPU_KINDS; kind++)
        for (int64_t at = 1;; at += 1 + at / 4) { /* what repeats need not be seen each time */
            char message[600] = "";
            int64_t calls = cuda_on_cpu_count().calls[kind];
            pd_device *d;
            pd_status status = PD_OK;
            bool reached;
            model m;
            begin("failures");
            cuda_on_cpu_fail((cuda_on_cpu_kind)kind, at, 0);
            d = pd_cuda_new(0, NULL, message, sizeof message);
            if (!d) check_contains(message, "no usable GPU: paddle_cuda.cu:");
            else {
                status = build(&m, d, 4);
                if (status == PD_OK) status = train(&m, 2, NULL);
                if (status == PD_OK) status = pd_save(m.net, path);
                snprintf(message, sizeof message, "%s", pd_error(m.net));
                if (status == PD_E_DEVICE) check_contains(message, "device cuda 0: ");
                reached = cuda_on_cpu_count().calls[kind] >= calls + at;
                if (status == PD_E_DEVICE) check_contains(message, "paddle_cuda.cu:");
                else if (status != PD_E_MEMORY) assert_int_equal(status, PD_OK);
                if (reached && status == PD_OK) fail_msg("failure %lld of kind %d was not seen", (long long)at, kind);
                free_model(&m);
                pd_cuda_free(d);
                if (!reached) {
                    assert_int_equal(status, PD_OK);
                    cuda_on_cpu_fail((cuda_on_cpu_kind)kind, 0, 0);
                    break;
                }
            }
            cuda_on_cpu_fail((cuda_on_cpu_kind)kind, 0, 0);
            assert_int_equal(living(), before);
        }
    remove(path);
}

/* What did not arrive is not taken for numbers: the getters and saving tell, and the older file stays what it was. */
static void test_failed_copies(void **state) {
    char path[] = "/tmp/paddle-cuda-XXXXXX";
    int file = mkstemp(path);
    int64_t n = 0;
    pd_real *saved, *x;
    pd_param *p;
    model m;
    (void)state;
    begin("failed copies");
    assert_true(file >= 0);
    close(file);
    assert_int_equal(build(&m, device[GPU], SAMPLES), PD_OK);
    saved = parameters(&m, &n);
    assert_int_equal(pd_save(m.net, path), PD_OK);
    assert_int_equal(train(&m, 1, NULL), PD_OK);
    p = pd_param_first(m.net);
    x = host(p->size);
    for (int call = 0; call < 4; call++) {
        cuda_on_cpu_fail(CUDA_ON_CPU_COPY, 1 + (call == 3), 0); /* at 3: the file has begun */
        assert_int_equal(call == 0   ? pd_param_get(p, x, p->size)
                         : call == 1 ? pd_param_get_grad(p, x, p->size)
                                     : pd_save(m.net, path),
                         PD_E_DEVICE);
        check_contains(pd_error(m.net), "paddle_cuda.cu:");
    }
    assert_int_equal(pd_load(m.net, path, NULL), PD_OK);
    n = 0;
    for (; p; n += p->size, p = p->next) {
        pd_real *now = host(p->size);
        assert_int_equal(pd_param_get(p, now, p->size), PD_OK);
        assert_memory_equal(now, saved + n, (size_t)p->size * sizeof *now);
        free(now);
    }
    free(x);
    free(saved);
    free_model(&m);
    remove(path);
}

/* A kernel that failed is told by its name with waiting, else by a later call; then the process is done for. */
static void test_illegal_address(void **state) {
    (void)state;
    for (int synchronous = 0; synchronous < 2; synchronous++) {
        pd_cuda_opts opts = { .synchronous = synchronous != 0 };
        char message[300] = "";
        pd_device *d;
        pd_real *x;
        d = pd_cuda_new(0, &opts, message, sizeof message);
        assert_non_null(d);
        x = (pd_real *)d->alloc(d, 100 * sizeof *x);
        cuda_on_cpu_fail(CUDA_ON_CPU_LAUNCH, 1, 1);
        d->fill(d, 100, 1, x);
        d->fill(d, 100, 2, x);
        assert_int_equal(d->norm(d, 100, x), 0);
        assert_int_equal(d->wait(d, message, sizeof message), PD_E_DEVICE);
        check_contains(message, "cudaErrorIllegalAddress");
        if (synchronous) check_contains(message, "pd__cuda_fill_kernel: ");
        assert_int_equal(d->wait(d, message, sizeof message), PD_E_DEVICE); /* for ever */
        d->free(d, x);
        pd_cuda_free(d);
        assert_int_equal(pd_cuda_count(), 0);
        cuda_on_cpu_reset();
    }
}

static void test_no_device(void **state) {
    char message[300] = "";
    (void)state;
    cuda_on_cpu_set_devices(0, 0);
    assert_int_equal(pd_cuda_count(), 0);
    assert_null(pd_cuda_new(0, NULL, message, sizeof message));
    check_contains(message, "no usable GPU: paddle_cuda.cu:");
    check_contains(message, "cudaErrorNoDevice");
    cuda_on_cpu_reset();
}
#endif

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_fill),
        cmocka_unit_test(test_contract),
        cmocka_unit_test(test_contract_in_place),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_update),
        cmocka_unit_test(test_update_rows),
        cmocka_unit_test(test_gather_rows),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_convolution),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_tf32),
        cmocka_unit_test(test_pooling),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_batch_norm),
        cmocka_unit_test(test_layer_norm),
        cmocka_unit_test(test_group_norm),
        cmocka_unit_test(test_response_norm),
        cmocka_unit_test(test_sparse_product),
        cmocka_unit_test(test_gru),
        cmocka_unit_test(test_lstm),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_training),
        cmocka_unit_test(test_gradient_check),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_no_such_device),
        cmocka_unit_test(test_out_of_memory),
#ifdef STAND_IN
        cmocka_unit_test(test_steady_state),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_failed_copies),
#endif
    };
#ifdef STAND_IN
    const struct CMUnitTest last[] = { cmocka_unit_test(test_illegal_address), cmocka_unit_test(test_no_device) };
#endif
    char message[300];
    pd_net *net = pd_net_new(NULL);
    int failed;
#ifdef STAND_IN
    setenv("CUDA_ON_CPU_BYTES", "33554432", 0); /* which it protects and opens in every call */
#endif
    if (argc > 1) seed = strtoull(argv[1], NULL, 10);
    device[CPU] = pd_vector(net, NULL, 1)->device;
    device[GPU] = pd_cuda_new(0, NULL, message, sizeof message);
    if (!device[GPU]) {
        printf("skipped: %s\n", message);
        pd_net_free(net);
        return 77;
    }
    printf("%s, seed %llu\n", device[GPU]->name, (unsigned long long)seed);
    failed = run_group(tests, NULL, NULL);
    pd_cuda_free(device[GPU]);
#ifdef STAND_IN
    if (cuda_on_cpu_leaks()) failed++;
    if (!getenv("CASE")) failed += run_group(last, NULL, NULL); /* nothing works after these */
#endif
    pd_net_free(net);
    return failed != 0;
}
