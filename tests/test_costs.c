/* Every cost against its formula, written once more in double, and its gradient against central differences of that
   formula: on random shapes, with and without sample weights, with the activation fused and not; misuse; lack of
   memory. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "far_device.h"
#include "inside.h"
#include "support.h"

#define IS_DOUBLE (sizeof(pd_real) == 8)

/* ---- the formulas: x is what stands before the activation, t numbers or one-hot, o has the defaults filled in ---- */

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static double sum_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0;
    (void)t, (void)o;
    for (int64_t j = 0; j < n; j++) sum += x[j];
    return sum;
}

static double squared_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0;
    (void)o;
    for (int64_t j = 0; j < n; j++) sum += pow(x[j] - t[j], 2);
    return sum;
}

static double huber_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) {
        double d = fabs(x[j] - t[j]);
        sum += d <= o->delta ? d * d / 2 : o->delta * (d - o->delta / 2);
    }
    return sum;
}

static double smooth_l1_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) {
        double d = fabs(x[j] - t[j]);
        sum += d < o->delta ? d * d / (2 * o->delta) : d - meant(o->delta, 1) / 2;
    }
    return sum;
}

static double binary_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0;
    (void)o;
    for (int64_t j = 0; j < n; j++) sum -= t[j] * log(sigmoid(x[j])) + (1 - t[j]) * log(1 - sigmoid(x[j]));
    return sum;
}

static double entropy_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double total = 0, sum = 0;
    for (int64_t j = 0; j < n; j++) total += exp(x[j]);
    for (int64_t j = 0; j < n; j++)
        sum -= (o->class_weights ? o->class_weights[j] : 1) * t[j] * log(o->probabilities ? x[j] : exp(x[j]) / total);
    return sum;
}

static double two_class_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double z = (2 * t[1] - 1) * x[0];
    (void)n, (void)o;
    return z >= 1 ? 0 : z >= -1 ? (1 - z) * (1 - z) : -4 * z;
}

static double hinge_row(const double *x, const double *t, int64_t n, const pd_cost_opts *o) {
    double sum = 0, right = 0;
    (void)o;
    if (n == 1) return fmax(0, 1 - (2 * t[1] - 1) * x[0]);
    for (int64_t j = 0; j < n; j++) right += t[j] * x[j];
    for (int64_t j = 0; j < n; j++)
        if (t[j] == 0) sum += fmax(0, 1 - right + x[j]);
    return sum;
}

static pd_layer *build_sum(pd_net *net, pd_layer *x, pd_layer *t, const pd_cost_opts *opts) {
    (void)t;
    return pd_sum_cost(net, x, opts);
}

typedef enum target_kind { NOTHING, NUMBERS, SHARES, CLASSES } target_kind;

typedef struct cost_case {
    const char *name;
    target_kind target;
    int64_t width; /* 0: random */
    pd_act act;    /* of the layer that the cost reads */
    bool class_weights, probabilities;
    double delta; /* 1: random */
    pd_layer *(*build)(pd_net *net, pd_layer *x, pd_layer *t, const pd_cost_opts *opts);
    double (*row)(const double *x, const double *t, int64_t n, const pd_cost_opts *o);
} cost_case;

static const cost_case cases[] = {
    { "sum_cost", NOTHING, 0, PD_LINEAR, false, false, false, build_sum, sum_row },
    { "squared_error", NUMBERS, 0, PD_LINEAR, false, false, false, pd_squared_error, squared_row },
    { "huber", NUMBERS, 0, PD_LINEAR, false, false, true, pd_huber, huber_row },
    { "huber, delta by default", NUMBERS, 0, PD_LINEAR, false, false, false, pd_huber, huber_row },
    { "smooth_l1", NUMBERS, 0, PD_LINEAR, false, false, true, pd_smooth_l1, smooth_l1_row },
    { "smooth_l1, delta by default", NUMBERS, 0, PD_LINEAR, false, false, false, pd_smooth_l1, smooth_l1_row },
    { "binary_cross_entropy", SHARES, 0, PD_LINEAR, false, false, false, pd_binary_cross_entropy, binary_row },
    { "binary_cross_entropy of sigmoid", SHARES, 0, PD_SIGMOID, false, false, false, pd_binary_cross_entropy,
      binary_row },
    { "cross_entropy", CLASSES, 0, PD_LINEAR, false, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy, soft", SHARES, 0, PD_LINEAR, false, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy of softmax", CLASSES, 0, PD_SOFTMAX, false, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy of softmax, soft", SHARES, 0, PD_SOFTMAX, false, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy, class weights", CLASSES, 0, PD_LINEAR, true, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy of softmax, class weights", CLASSES, 0, PD_SOFTMAX, true, false, false, pd_cross_entropy,
      entropy_row },
    { "cross_entropy, soft, class weights", SHARES, 0, PD_SOFTMAX, true, false, false, pd_cross_entropy, entropy_row },
    { "cross_entropy of probabilities", CLASSES, 0, PD_LINEAR, true, true, false, pd_cross_entropy, entropy_row },
    { "cross_entropy of probabilities, soft", SHARES, 0, PD_LINEAR, false, true, false, pd_cross_entropy, entropy_row },
    { "huber_two_class", CLASSES, 1, PD_LINEAR, false, false, false, pd_huber_two_class, two_class_row },
    { "hinge, two classes", CLASSES, 1, PD_LINEAR, false, false, false, pd_hinge, hinge_row },
    { "hinge", CLASSES, 0, PD_LINEAR, false, false, false, pd_hinge, hinge_row },
    { "smooth_l1, delta of 0", NUMBERS, 0, PD_LINEAR, false, false, PD_ZERO, pd_smooth_l1, smooth_l1_row }
};

/* ---- one random net and batch per case and seed ---- */

enum { MAX_ROWS = 12, MAX_WIDTH = 7 };

typedef struct problem {
    const cost_case *c;
    bool learned; /* x goes through a layer with parameters first */
    pd_cost_opts opts;
    double class_weights[MAX_WIDTH];
    int64_t rows, width, targets; /* targets: numbers per row of t */
    double x[MAX_ROWS][MAX_WIDTH], t[MAX_ROWS][MAX_WIDTH], inner[MAX_ROWS], outer[MAX_ROWS];
    pd_net *net;
    pd_layer *x_layer, *t_layer, *cost, *total;
    pd_batch *batch;
} problem;

static double row_cost(const problem *p, int64_t r) {
    return p->c->row(p->x[r], p->t[r], p->width, &p->opts) * (p->opts.weight ? p->inner[r] : 1);
}

/* A random number as the library will see it. */
static double real(double low, double high) { return (double)(pd_real)uniform(low, high); }

static void make_numbers(problem *p, const cost_case *c) {
    p->c = c;
    p->rows = below(MAX_ROWS + 1);
    p->width = c->width ? c->width : (c->target == CLASSES ? 2 : 1) + below(MAX_WIDTH - 1);
    p->targets = c->target == CLASSES && p->width == 1 ? 2 : p->width;
    for (int64_t r = 0; r < p->rows; r++) {
        int64_t label = below(p->targets);
        for (int64_t j = 0; j < p->width; j++) p->x[r][j] = c->probabilities ? real(0.05, 1) : real(-3, 3);
        for (int64_t j = 0; j < p->targets; j++)
            p->t[r][j] = c->target == CLASSES ? j == label : c->target == SHARES ? real(0, 1) : real(-3, 3);
        p->inner[r] = below(4) ? real(0, 2) : 0;
        p->outer[r] = real(-1, 2);
    }
    for (int64_t j = 0; j < p->width; j++) p->class_weights[j] = real(0.5, 2);
    if (c->class_weights) p->opts.class_weights = p->class_weights;
    p->opts.probabilities = c->probabilities;
    p->opts.delta = c->delta == 1 ? real(0.3, 2.5) : c->delta;
}

/* total = sum over rows of outer * cost. Not fused: a second layer reads what the cost reads. */
static void make_net(problem *p, bool fused) {
    pd_layer *w, *v, *parts[2];
    pd_cost_opts outer;
    memset(&outer, 0, sizeof outer);
    p->net = pd_net_new(NULL);
    p->x_layer = pd_vector(p->net, "x", p->width);
    assert_int_equal(pd_want_gradient(p->x_layer), PD_OK);
    p->t_layer = p->c->target == NOTHING   ? NULL
                 : p->c->target == CLASSES ? pd_label(p->net, "t", p->targets)
                                           : pd_vector(p->net, "t", p->targets);
    w = pd_vector(p->net, "inner", 1);
    v = pd_vector(p->net, "outer", 1);
    p->opts.weight = below(2) ? w : NULL;
    parts[0] = p->learned ? pd_fc(p->net, p->x_layer, p->width, NULL) : p->x_layer;
    if (p->c->act != PD_LINEAR) parts[0] = pd_activation(p->net, parts[0], p->c->act, NULL);
    p->cost = p->total = p->c->build(p->net, parts[0], p->t_layer, &p->opts);
    if (!fused) {
        parts[1] = pd_sum_cost(p->net, parts[0], NULL);
        parts[0] = p->cost;
        p->total = pd_add(p->net, parts, 2, NULL);
    }
    outer.weight = v;
    p->total = pd_sum_cost(p->net, p->total, &outer);
    if (p->c->target == NUMBERS || (p->c->target == SHARES && p->c->build == pd_binary_cross_entropy))
        pd_want_gradient(p->t_layer);
    if (!p->total) fail_msg("%s: %s", p->c->name, pd_error(p->net));
    if (p->opts.delta == 0) p->opts.delta = 1;
}

static void make_batch(problem *p) {
    p->batch = pd_batch_new(p->net);
    for (int64_t r = 0; r < p->rows; r++) {
        int slot = 0;
        pd_real *row = pd_batch_add_row(p->batch, slot++);
        for (int64_t j = 0; j < p->width; j++) row[j] = (pd_real)p->x[r][j];
        row = p->c->target == NUMBERS || p->c->target == SHARES ? pd_batch_add_row(p->batch, slot++) : NULL;
        for (int64_t j = 0; row && j < p->targets; j++) row[j] = (pd_real)p->t[r][j];
        for (int64_t j = 0; p->c->target == CLASSES && j < p->targets; j++)
            if (p->t[r][j] == 1) pd_batch_add_id(p->batch, slot++, j);
        *pd_batch_add_row(p->batch, slot++) = (pd_real)p->inner[r];
        *pd_batch_add_row(p->batch, slot++) = (pd_real)p->outer[r];
        assert_int_equal(pd_batch_end_sample(p->batch), PD_OK);
    }
}

static void free_problem(problem *p) {
    pd_batch_free(p->batch);
    pd_net_free(p->net);
}

/* d(total)/d(number): `number` is in row r of x or t. What the second layer of an unfused net adds is sum(softmax) = 1,
   or the sum of sigmoids. */
static double numeric_gradient(problem *p, double *number, int64_t r, bool fused) {
    double kept = *number, step = 1e-6, high, low, extra = 0;
    *number = kept + step;
    high = row_cost(p, r);
    *number = kept - step;
    low = row_cost(p, r);
    *number = kept;
    if (!fused && p->c->act == PD_SIGMOID) extra = sigmoid(kept) * (1 - sigmoid(kept));
    if (!fused && p->c->act == PD_LINEAR) extra = 1;
    return p->outer[r] * ((high - low) / (2 * step) + extra);
}

static void check_problem(problem *p, bool fused) {
    int64_t rows, width;
    const pd_real *costs;
    assert_int_equal(pd_forward(p->net, p->batch, PD_CHECK, &p->total, 1), PD_OK);
    costs = pd_output(p->cost, &rows, &width);
    assert_non_null(costs);
    assert_int_equal(rows, p->rows);
    assert_int_equal(width, 1);
    for (int64_t r = 0; r < rows; r++) check_near((double)costs[r], row_cost(p, r), REAL_TOLERANCE, p->c->name);
    if (pd_backward(p->net, p->total) != PD_OK) fail_msg("%s: %s", p->c->name, pd_error(p->net));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < p->width; j++)
            check_near((double)p->x_layer->out.grad[r * p->width + j], numeric_gradient(p, &p->x[r][j], r, fused), 1e-4,
                       p->c->name);
    if (!p->t_layer || !p->t_layer->out.grad) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < p->width; j++)
            check_near((double)p->t_layer->out.grad[r * p->width + j], numeric_gradient(p, &p->t[r][j], r, true), 1e-4,
                       p->c->name);
}

static void test_formulas(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (uint64_t seed = 0; seed < 40; seed++) {
            bool fused = seed % 2 == 0;
            problem p;
            memset(&p, 0, sizeof p);
            random_seed(seed * 100 + i);
            make_numbers(&p, &cases[i]);
            make_net(&p, fused);
            make_batch(&p);
            check_problem(&p, fused);
            check_problem(&p, fused); /* the same again: nothing stays behind */
            pd_batch_clear(p.batch);
            p.rows = 0;
            check_problem(&p, fused);
            free_problem(&p);
        }
}

#ifdef PADDLE_DOUBLE
static void test_gradient_checker(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (uint64_t seed = 0; seed < 12; seed++) {
            problem p;
            pd_gradcheck result;
            memset(&p, 0, sizeof p);
            random_seed(seed * 1000 + i);
            do make_numbers(&p, &cases[i]);
            while (p.rows == 0 || (p.width == 1 && !cases[i].width)); /* a softmax of one number has no gradient */
            for (int64_t r = 0; r < p.rows; r++) p.inner[r] += 0.1; /* a cost whose rows all weigh 0 has no gradient */
            p.learned = seed % 3 != 0 && !p.c->probabilities;
            make_net(&p, seed % 2 == 0);
            make_batch(&p);
            if (pd_check_gradients(p.total, p.batch, NULL, &result) != PD_OK) fail_msg("%s", pd_error(p.net));
            if (result.all_zero) fail_msg("%s: all gradients are zero", p.c->name);
            if (result.error > 1e-6)
                fail_msg("%s: relative error %g at %s[%lld]: %.12g, by differences %.12g (seed %llu)", p.c->name,
                         result.error, result.worst, (long long)result.worst_index, result.analytic, result.numeric,
                         (unsigned long long)random_key);
            if (result.accumulation > 1e-12) fail_msg("%s: accumulation %g", p.c->name, result.accumulation);
            free_problem(&p);
        }
}
#endif

/* ---- costs of their own shape ---- */

static void test_rank_cost(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *left = pd_vector(net, "left", 1), *right = pd_vector(net, "right", 1), *p = pd_vector(net, "p", 1);
        pd_layer *cost = pd_rank_cost(net, left, right, p, NULL);
        pd_batch *batch = pd_batch_new(net);
        double numbers[3][8];
        random_seed(seed);
        pd_want_gradient(left), pd_want_gradient(right), pd_want_gradient(p);
        for (int r = 0; r < 8; r++) {
            numbers[0][r] = real(-3, 3), numbers[1][r] = real(-3, 3), numbers[2][r] = (double)below(3) / 2;
            for (int k = 0; k < 3; k++) *pd_batch_add_row(batch, k) = (pd_real)numbers[k][r];
            pd_batch_end_sample(batch);
        }
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &cost, 1), PD_OK);
        assert_int_equal(pd_backward(net, cost), PD_OK);
        for (int r = 0; r < 8; r++) {
            double o = numbers[0][r] - numbers[1][r], slope = sigmoid(o) - numbers[2][r];
            check_near((double)cost->out.data[r], log(1 + exp(o)) - numbers[2][r] * o, REAL_TOLERANCE, "rank_cost");
            check_near((double)left->out.grad[r], slope, REAL_TOLERANCE, "rank_cost, left");
            check_near((double)right->out.grad[r], -slope, REAL_TOLERANCE, "rank_cost, right");
            check_near((double)p->out.grad[r], -o, REAL_TOLERANCE, "rank_cost, p");
        }
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* 1 - NDCG@top and its lambdas for one query, with ranks counted and all pairs visited. */
static double naive_lambda_rank(const double *score, const double *relevance, int64_t n, int64_t top, double *lambdas) {
    double dcg = 0, best = 0, discount[64];
    for (int64_t i = 0; i < n; i++) {
        int64_t rank = 0, best_rank = 0;
        for (int64_t j = 0; j < n; j++) {
            rank += score[j] > score[i] || (score[j] == score[i] && j < i);
            best_rank += relevance[j] > relevance[i] || (relevance[j] == relevance[i] && j < i);
        }
        discount[i] = rank < top ? log(2.0) / log(2.0 + (double)rank) : 0;
        dcg += (pow(2, relevance[i]) - 1) * discount[i];
        if (best_rank < top) best += (pow(2, relevance[i]) - 1) * log(2.0) / log(2.0 + (double)best_rank);
        lambdas[i] = 0;
    }
    if (best == 0) return 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++)
            if (relevance[i] > relevance[j]) {
                double change = (pow(2, relevance[i]) - pow(2, relevance[j])) * fabs(discount[i] - discount[j]) / best;
                lambdas[i] -= change / (1 + exp(score[i] - score[j]));
                lambdas[j] += change / (1 + exp(score[i] - score[j]));
            }
    return 1 - dcg / best;
}

static void test_lambda_rank(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 60; seed++) {
        bool sequences = seed % 3 != 0, ids = seed % 2 == 0, ties = seed % 5 == 0;
        pd_net *net = pd_net_new(NULL);
        pd_layer *score = pd_vector(net, "score", 1);
        pd_layer *relevance, *weight, *cost;
        pd_batch *batch;
        pd_cost_opts opts;
        int64_t starts[8] = { 0 }, queries = 1 + below(6), row = 0;
        double s[64], rel[64], w[64], lambdas[64];
        random_seed(seed);
        memset(&opts, 0, sizeof opts);
        pd_want_gradient(score);
        if (sequences) pd_sequence(score);
        relevance = ids ? pd_label(net, "relevance", 4) : pd_vector(net, "relevance", 1);
        if (sequences) pd_sequence(relevance);
        weight = pd_vector(net, "weight", 1);
        if (sequences) pd_sequence(weight);
        if (seed % 4 == 1) opts.weight = weight;
        if (seed % 7 != 0) opts.top = 1 + below(12);
        cost = pd_lambda_rank(net, score, relevance, &opts);
        if (!cost) fail_msg("%s", pd_error(net));
        batch = pd_batch_new(net);
        for (int64_t q = 0; q < queries; q++) {
            int64_t n = below(10), grades = 1 + below(4);
            for (int64_t r = 0; r < n; r++, row++) {
                s[row] = ties ? (double)below(3) : real(-2, 2);
                rel[row] = (double)below(grades);
                w[row] = opts.weight ? real(0, 2) : 1;
                *pd_batch_add_row(batch, 0) = (pd_real)s[row];
                if (ids) pd_batch_add_id(batch, 1, (int64_t)rel[row]);
                else *pd_batch_add_row(batch, 1) = (pd_real)rel[row];
                *pd_batch_add_row(batch, 2) = (pd_real)w[row];
                if (!sequences) pd_batch_end_sample(batch);
            }
            if (sequences) pd_batch_end_sample(batch);
            starts[q + 1] = row;
        }
        if (!sequences) starts[1] = row, queries = 1;
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &cost, 1), PD_OK);
        assert_int_equal(pd_backward(net, cost), PD_OK);
        for (int64_t q = 0; q < queries; q++) {
            int64_t first = starts[q], n = starts[q + 1] - first;
            double expected = naive_lambda_rank(s + first, rel + first, n, opts.top ? opts.top : 5, lambdas);
            for (int64_t r = 0; r < n; r++) {
                check_near((double)cost->out.data[first + r], w[first + r] * expected / (double)n, REAL_TOLERANCE,
                           "lambda_rank");
                check_near((double)score->out.grad[first + r], w[first + r] * lambdas[r], REAL_TOLERANCE,
                           "lambda_rank, lambda");
            }
        }
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* The lambdas of a row are added up before they are rounded: of many of one size nothing is lost. */
static void test_lambda_rank_of_many(void **state) {
    enum { ROWS = 1500 };
    double expected = 0;
    pd_net *net = pd_net_new(NULL);
    pd_layer *score = pd_vector(net, "score", 1), *relevance = pd_label(net, "relevance", 2);
    pd_layer *cost = pd_lambda_rank(net, score, relevance, &(pd_cost_opts){ .top = ROWS });
    pd_batch *batch = pd_batch_new(net);
    (void)state;
    pd_want_gradient(score);
    for (int r = 0; r < ROWS; r++) {
        expected -= (1 - 1 / log2(2 + r)) / 2;
        *pd_batch_add_row(batch, 0) = 0;
        pd_batch_add_id(batch, 1, r == 0);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    assert_int_equal(pd_forward(net, batch, PD_CHECK, &cost, 1), PD_OK);
    assert_int_equal(pd_backward(net, cost), PD_OK);
    check_near((double)score->out.grad[0], expected, sizeof(pd_real) == 8 ? 1e-13 : 6.1e-8, "lambda");
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- exact however sure the net is, and whoever else reads its probabilities ---- */

enum {
    ALONE,
    TWICE,
    BESIDE_ANOTHER,
    OTHERS
}; /* who reads the probabilities beside the cost: nobody, a second one of its
                                                  kind, a squared error, that and an evaluator and a sample weight */

typedef struct sure {
    pd_net *net;
    pd_layer *x, *p, *cost, *other;
    pd_batch *batch;
} sure;

/* Cross-entropy (binary: of two sigmoids) of rows with two numbers, the second 0. `via`: through a layer with that
   activation. Samples: logits xs[r], label or target ts[r]. */
static sure make_sure(pd_device *device, bool binary, bool via, int readers, bool soft, const double *xs,
                      const double *ts, int rows) {
    pd_act act = binary ? PD_SIGMOID : PD_SOFTMAX;
    pd_layer *label, *target, *parts[2];
    sure s;
    s.net = pd_net_new(&(pd_net_opts){ .device = device });
    s.x = pd_vector(s.net, "x", 2);
    label = pd_label(s.net, "label", 2);
    target = pd_vector(s.net, "target", 2);
    pd_want_gradient(s.x);
    s.p = via ? pd_activation(s.net, s.x, act, NULL) : s.x;
    if (binary) s.cost = pd_binary_cross_entropy(s.net, s.p, target, NULL);
    else s.cost = pd_cross_entropy(s.net, s.p, soft ? target : label, NULL);
    s.other = NULL;
    if (readers == TWICE) {
        parts[0] = s.cost;
        parts[1] =
            binary ? pd_binary_cross_entropy(s.net, s.p, target, NULL) : pd_cross_entropy(s.net, s.p, label, NULL);
        s.cost = pd_add(s.net, parts, 2, NULL);
    }
    if (readers >= BESIDE_ANOTHER) {
        pd_layer *weight = pd_slice(s.net, s.p, 0, 1, NULL);
        s.other = pd_squared_error(s.net, s.p, target, readers == OTHERS ? &(pd_cost_opts){ .weight = weight } : NULL);
        parts[0] = s.cost, parts[1] = s.other;
        s.cost = pd_add(s.net, parts, 2, NULL);
        if (readers == OTHERS) pd_eval_mean_error(s.net, s.p, target, NULL);
    }
    s.batch = pd_batch_new(s.net);
    if (!s.batch) fail_msg("%s", pd_error(s.net));
    for (int r = 0; r < rows; r++) {
        pd_real *row = pd_batch_add_row(s.batch, 0), *t;
        row[0] = (pd_real)xs[r], row[1] = 0;
        pd_batch_add_id(s.batch, 1, ts[r] == 1 ? 0 : 1);
        t = pd_batch_add_row(s.batch, 2);
        t[0] = (pd_real)ts[r], t[1] = (pd_real)(1 - ts[r]);
        assert_int_equal(pd_batch_end_sample(s.batch), PD_OK);
    }
    return s;
}

static void free_sure(sure *s) {
    pd_batch_free(s->batch);
    pd_net_free(s->net);
}

static double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

/* On the CPU, on a device that can do all, and on one where the costs run on the host. Every one against the formula in double, predicting too; and the gradient check agrees, of a step that a float has. */
static void test_exact_costs(void **state) {
    static const double xs[] = { 1000, -1000, 1000, -1000, 0, 90, -90, 200, 17, 30, -30, 5, 1e-3 };
    static const double ts[] = { 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0 };
    enum { ROWS = COUNT(xs) };
    pd_net *host = pd_net_new(NULL);
    far_device far[2] = { make_far(inside_device(host), ~(uint64_t)0), make_far(inside_device(host), 0) };
    (void)state;
    for (int k = 0; k < 96; k++) {
        bool binary = k % 2, via = k / 2 % 2, soft = k / 16 % 2;
        pd_device *device = k < 32 ? NULL : (far[k / 64].device.self = &far[k / 64], &far[k / 64].device);
        int readers = k / 4 % 4;
        double times = readers == TWICE ? 2 : 1;
        sure s;
        pd_gradcheck checked;
        if ((binary && soft) || (!via && readers != ALONE)) continue;
        s = make_sure(device, binary, via, readers, soft, xs, ts, ROWS);
        for (int mode = PD_PREDICT; mode <= PD_CHECK; mode += PD_CHECK) {
            pd_layer *targets[2] = { s.cost, s.other };
            assert_int_equal(pd_forward(s.net, s.batch, (pd_mode)mode, targets, s.other && !mode ? 2 : 1), PD_OK);
            const pd_real *cost = pd_output(s.cost, NULL, NULL),
                          *other = s.other ? pd_output(s.other, NULL, NULL) : NULL;
            for (int r = 0; r < ROWS; r++) {
                double want = times * (softplus(xs[r]) - xs[r] * ts[r] + (binary ? log(2) : 0));
                if (other) want += (double)other[r];
                check_near((double)cost[r], want, REAL_TOLERANCE, "cost");
            }
        }
        assert_int_equal(pd_backward(s.net, s.cost), PD_OK);
        for (int r = 0; r < ROWS; r++) {
            double p = sigmoid(xs[r]), want = times * (p - ts[r]);
            if (s.other) /* the squares of both numbers, which for a softmax mirror each other */
                want += (readers == OTHERS ? p : 1) * (binary ? 1 : 2) * 2 * (p - ts[r]) * p * (1 - p);
            check_near((double)(device ? near(s.x->out.grad) : s.x->out.grad)[2 * r], want, REAL_TOLERANCE, "gradient");
        }
        assert_int_equal(pd_check_gradients(s.cost, s.batch, &(pd_gradcheck_opts){ .elements = 40 }, &checked), PD_OK);
        if (readers != OTHERS && !(checked.error < (IS_DOUBLE ? 1e-6 : 0.05))) /* no gradient flows into weights */
            fail_msg("case %d: %g by backward, %g by differences", k, checked.analytic, checked.numeric);
        free_sure(&s);
    }
    pd_net_free(host);
}

/* Given probabilities, none too small, and 0. */
static void test_given_probabilities(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 2), *label = pd_label(net, "label", 2);
    pd_layer *cost = pd_cross_entropy(net, x, label, &(pd_cost_opts){ .probabilities = true });
    pd_batch *batch = pd_batch_new(net);
    const double least = IS_DOUBLE ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
    (void)state;
    pd_want_gradient(x);
    for (int r = 0; r < 3; r++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        row[0] = r == 0 ? (pd_real)0.25 : r == 1 ? (pd_real)1e-30 : 0, row[1] = 1 - row[0];
        pd_batch_add_id(batch, 1, 0);
        pd_batch_end_sample(batch);
    }
    assert_int_equal(pd_forward(net, batch, PD_CHECK, &cost, 1), PD_OK);
    assert_int_equal(pd_backward(net, cost), PD_OK);
    check_near((double)cost->out.data[0], log(4), REAL_TOLERANCE, "1/4");
    check_near((double)cost->out.data[1], 30 * log(10), REAL_TOLERANCE, "1e-30");
    check_near((double)cost->out.data[2], -log(least), REAL_TOLERANCE, "0");
    check_near((double)x->out.grad[0], -4, REAL_TOLERANCE, "1/4, gradient");
    check_near((double)x->out.grad[4] * least, -1, REAL_TOLERANCE, "0, gradient");
    assert_true(x->out.grad[5] == 0);
    pd_batch_free(batch);
    pd_net_free(net);
}

/* A row of weight 0 counts for nothing, even if what it costs is beyond all bounds. */
static void test_no_weight(void **state) {
    const pd_real far = (pd_real)(IS_DOUBLE ? 1e200 : 1e30);
    (void)state;
    for (int k = 0; k < 5; k++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 1), *t = pd_vector(net, "t", 1), *w = pd_vector(net, "w", 1), *cost;
        pd_layer *label = pd_label(net, "label", 2), *pair[2];
        pd_cost_opts o = { .weight = w };
        pd_batch *batch;
        pd_want_gradient(x);
        pair[0] = x, pair[1] = pd_affine(net, x, -1, 0, NULL);
        cost = k == 0   ? pd_squared_error(net, x, t, &o)
               : k == 1 ? pd_cross_entropy(net, pd_concat(net, pair, 2, NULL), label, &o)
               : k == 2 ? pd_binary_cross_entropy(net, pd_activation(net, x, PD_SIGMOID, NULL), t, &o)
               : k == 3 ? pd_hinge(net, x, label, &o)
                        : pd_rank_cost(net, x, pair[1], t, &o);
        batch = pd_batch_new(net);
        for (int r = 0; r < 3; r++) {
            *pd_batch_add_row(batch, 0) = r == 0 ? far : r == 1 ? (pd_real)INFINITY : 0;
            *pd_batch_add_row(batch, 1) = 0;
            *pd_batch_add_row(batch, 2) = r == 2;
            pd_batch_add_id(batch, 3, 1);
            pd_batch_end_sample(batch);
        }
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &cost, 1), PD_OK);
        assert_int_equal(pd_backward(net, cost), PD_OK);
        for (int r = 0; r < 2; r++) assert_true(cost->out.data[r] == 0 && x->out.grad[r] == 0);
        assert_true(isfinite(cost->out.data[2]) && (cost->out.data[2] != 0 || k == 0));
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* The caller's array may go away; a shared net has the weights too, and may outlive nothing. */
static void test_class_weights_are_copied(void **state) {
    double weights[3] = { 1, 2, 4 };
    pd_cost_opts opts;
    pd_net *net = pd_net_new(NULL), *shared;
    pd_layer *x = pd_vector(net, "x", 3), *label = pd_label(net, "label", 3), *cost, *twin;
    pd_batch *batch;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.name = "cost";
    opts.class_weights = weights;
    cost = pd_cross_entropy(net, x, label, &opts);
    assert_non_null(cost);
    weights[0] = weights[1] = weights[2] = -1;
    shared = pd_net_share(net);
    if (!shared) fail_msg("%s", pd_error(net));
    twin = pd_layer_find(shared, "cost");
    batch = pd_batch_new(net);
    for (int r = 0; r < 3; r++) {
        memset(pd_batch_add_row(batch, 0), 0, 3 * sizeof(pd_real));
        pd_batch_add_id(batch, 1, r);
        pd_batch_end_sample(batch);
    }
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &cost, 1), PD_OK);
    assert_int_equal(pd_forward(shared, batch, PD_PREDICT, &twin, 1), PD_OK);
    for (int r = 0; r < 3; r++) {
        check_near((double)cost->out.data[r], (1 << r) * log(3), REAL_TOLERANCE, "class weights");
        check_near((double)twin->out.data[r], (1 << r) * log(3), REAL_TOLERANCE, "class weights of a shared net");
    }
    pd_net_free(shared);
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- misuse ---- */

/* The expression builds on these layers and must be refused with this status and text. */
#define REFUSED(wanted, text, expression)                                                                              \
    do {                                                                                                               \
        pd_net *net = pd_net_new(NULL);                                                                                \
        pd_layer *x1 = pd_vector(net, "x1", 1), *x3 = pd_vector(net, "x3", 3), *l2 = pd_label(net, "l2", 2);           \
        pd_layer *l3 = pd_label(net, "l3", 3), *image = pd_image(net, "image", 1, 2, 2);                               \
        pd_cost_opts o;                                                                                                \
        memset(&o, 0, sizeof o);                                                                                       \
        o.name = "cost";                                                                                               \
        (void)x1, (void)x3, (void)l2, (void)l3, (void)image;                                                           \
        assert_null(expression);                                                                                       \
        check_contains(pd_error(net), text);                                                                           \
        assert_int_equal(pd_error_status(net), wanted);                                                                \
        assert_null(pd_sum_cost(net, x1, NULL));                                                                       \
        check_contains(pd_error(net), text); /* the first message stays */                                             \
        pd_net_free(net);                                                                                              \
    } while (0)

static void test_misuse(void **state) {
    double weights[3] = { 1, 0, 1 };
    (void)state;
    assert_null(pd_squared_error(NULL, NULL, NULL, NULL));
    REFUSED(PD_E_ARGUMENT, "input 1 is NULL", pd_squared_error(net, x1, NULL, NULL));
    REFUSED(PD_E_SHAPE, "cost: input 0: expected numbers of shape 3, got \"l3\" with ids below 3",
            pd_cross_entropy(net, l3, l3, &o));
    REFUSED(PD_E_SHAPE, "cost: input 1: expected ids below 3, got \"l2\" with ids below 2",
            pd_cross_entropy(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "cost: input 1: expected numbers of shape 3, got \"image\" with numbers of shape 1x2x2",
            pd_cross_entropy(net, x3, image, &o));
    REFUSED(PD_E_SHAPE, "cost: input 1: expected numbers of shape 3, got \"x1\" with numbers of shape 1",
            pd_squared_error(net, x3, x1, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 3, got \"l3\"", pd_binary_cross_entropy(net, x3, l3, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 3", pd_huber(net, x3, image, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 3", pd_smooth_l1(net, x3, image, &o));
    REFUSED(PD_E_SHAPE, "input 0: expected numbers of shape 1, got \"x3\"", pd_huber_two_class(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected ids below 2, got \"l3\"", pd_huber_two_class(net, x1, l3, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected ids below 2, got \"x1\"", pd_hinge(net, x1, x1, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected ids below 3, got \"l2\"", pd_hinge(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 1, got \"x3\"", pd_rank_cost(net, x1, x3, x1, &o));
    REFUSED(PD_E_SHAPE, "input 2: expected numbers of shape 1, got \"l2\"", pd_rank_cost(net, x1, x1, l2, &o));
    REFUSED(PD_E_SHAPE, "input 0: expected numbers of shape 1, got \"x3\"", pd_lambda_rank(net, x3, l3, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 1, got \"x3\"", pd_lambda_rank(net, x1, x3, &o));
    REFUSED(PD_E_SHAPE, "input 0: expected numbers of shape 3, got \"l3\"", pd_sum_cost(net, l3, &o));
    REFUSED(PD_E_SHAPE, "input 1: expected numbers of shape 1, got \"x3\"", (o.weight = x3, pd_sum_cost(net, x3, &o)));
    REFUSED(PD_E_SHAPE, "input 2: expected numbers of shape 1, got \"l2\" with ids below 2",
            (o.weight = l2, pd_squared_error(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected delta > 0, got -1", (o.delta = -1, pd_huber(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected delta > 0, got 0", (o.delta = PD_ZERO, pd_huber(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected delta > 0, got inf", (o.delta = INFINITY, pd_huber(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected delta > 0, got -1", (o.delta = -1, pd_smooth_l1(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "squared_error has no option delta", (o.delta = PD_ZERO, pd_squared_error(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected delta > 0, got nan", (o.delta = NAN, pd_smooth_l1(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "cost: expected top > 0, got -5", (o.top = -5, pd_lambda_rank(net, x1, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "expected class_weights > 0, got 0 for class 1",
            (o.class_weights = weights, pd_cross_entropy(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "hinge has no option class_weights", (o.class_weights = weights, pd_hinge(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "binary_cross_entropy has no option probabilities",
            (o.probabilities = true, pd_binary_cross_entropy(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "squared_error has no option delta", (o.delta = 1, pd_squared_error(net, x3, x3, &o)));
    REFUSED(PD_E_ARGUMENT, "rank_cost has no option top", (o.top = 1, pd_rank_cost(net, x1, x1, x1, &o)));
    REFUSED(PD_E_UNSUPPORTED, "no gradient can flow into the labels, but \"x3\" learns",
            (pd_want_gradient(x3), pd_cross_entropy(net, x3, x3, &o)));
}

/* What only a batch shows. */
static void test_wrong_batches(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *many = pd_sequence(pd_vector(net, "many", 1)), *one = pd_sequence(pd_vector(net, "one", 1)), *costs[2];
    pd_batch *batch;
    (void)state;
    costs[0] = pd_squared_error(net, many, one, NULL);
    costs[1] = pd_lambda_rank(net, many, many, NULL);
    if (!costs[0] || !costs[1]) fail_msg("%s", pd_error(net));
    batch = pd_batch_new(net);
    *pd_batch_add_row(batch, 0) = 1;
    *pd_batch_add_row(batch, 0) = -1;
    *pd_batch_add_row(batch, 1) = 1;
    pd_batch_end_sample(batch);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &costs[0], 1), PD_E_SHAPE);
    check_contains(pd_error(net), "sample 0 of \"one\" has 1 rows, but that of \"many\" has 2");
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &costs[1], 1), PD_E_FORMAT);
    check_contains(pd_error(net), "row 1 of \"many\": expected relevance 0 to 1000, got -1");
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- lack of memory ---- */

/* Builds and runs costs, stops at the first failure; true if there was none. */
static bool run_without_some_memory(failing_allocator *f) {
    double weights[3] = { 1, 2, 3 };
    pd_net_opts opts;
    pd_cost_opts o;
    pd_net *net;
    pd_layer *x, *t, *score, *entropy, *rank, *squares;
    pd_batch *batch = NULL;
    bool ok;
    memset(&opts, 0, sizeof opts), memset(&o, 0, sizeof o);
    opts.allocator.alloc = failing_alloc, opts.allocator.free = failing_free, opts.allocator.user = f;
    net = pd_net_new(&opts);
    if (!net) return false;
    x = pd_vector(net, "x", 3), t = pd_label(net, "t", 3), score = pd_vector(net, "score", 1);
    pd_want_gradient(x), pd_want_gradient(score);
    o.weight = score;
    squares = pd_squared_error(net, x, x, &o);
    rank = pd_lambda_rank(net, score, t, &o);
    o.class_weights = weights;
    entropy = pd_cross_entropy(net, x, t, &o);
    ok = entropy && (batch = pd_batch_new(net)) != NULL;
    for (int r = 0; ok && r < 4; r++) {
        pd_real *row = pd_batch_add_row(batch, 0), *one = pd_batch_add_row(batch, 2);
        ok = row && one && pd_batch_add_id(batch, 1, r % 3) == PD_OK;
        if (ok) row[0] = row[1] = row[2] = *one = (pd_real)r;
        ok = ok && pd_batch_end_sample(batch) == PD_OK;
    }
    ok = ok && pd_forward(net, batch, PD_TRAIN, &squares, 1) == PD_OK && pd_backward(net, squares) == PD_OK &&
         pd_forward(net, batch, PD_TRAIN, &rank, 1) == PD_OK && pd_backward(net, rank) == PD_OK &&
         pd_forward(net, batch, PD_TRAIN, &entropy, 1) == PD_OK && pd_backward(net, entropy) == PD_OK;
    if (!ok && f->calls <= f->fail_at) fail_msg("%s", pd_error(net));
    if (!ok && !(batch && batch->error.status)) assert_int_equal(pd_error_status(net), PD_E_MEMORY);
    pd_batch_free(batch);
    pd_net_free(net);
    return ok;
}

static void test_lack_of_memory(void **state) {
    bool ok = false;
    (void)state;
    for (int64_t n = 0; !ok; n++) {
        failing_allocator f = { 0, 0, 0 };
        f.fail_at = n;
        ok = run_without_some_memory(&f);
        assert_int_equal(f.in_use, 0);
        assert_true(ok || f.calls > n);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_formulas),
#ifdef PADDLE_DOUBLE
                                        cmocka_unit_test(test_gradient_checker),
#endif
                                        cmocka_unit_test(test_rank_cost),
                                        cmocka_unit_test(test_lambda_rank),
                                        cmocka_unit_test(test_lambda_rank_of_many),
                                        cmocka_unit_test(test_exact_costs),
                                        cmocka_unit_test(test_given_probabilities),
                                        cmocka_unit_test(test_no_weight),
                                        cmocka_unit_test(test_class_weights_are_copied),
                                        cmocka_unit_test(test_misuse),
                                        cmocka_unit_test(test_wrong_batches),
                                        cmocka_unit_test(test_lack_of_memory) };
    return run_group(tests, NULL, NULL);
}
