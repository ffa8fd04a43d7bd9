/* Layers over sequences, ids and sparse rows (embedding, fc, gru, lstm, attention, sequence_pool): against straight-line
   twins in double, gradients against central differences, sparse gradients against dense ones; batches with empty, short and no
   sequences, in any order, in any number of threads; shared tables and nets; misuse; lack of memory. */
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

/* ======================================================================================================== */
/* Random problems: a net with one layer under test, and a batch                                             */

typedef struct problem {
    const struct layer_case *c;
    uint64_t seed;
    pd_net *net;
    pd_layer *layer, *cost;
    pd_batch *batch;
    /* wishes */
    bool sparse; /* parameters of layers that can have such */
    bool large;  /* so large that threads are used */
    int threads;
    pd_allocator allocator;
    pd_device *device;
    /* what build chose */
    pd_act act;
    pd_pool_method method;
    bool reverse, sequence;
    int first, first_cell; /* the inputs that are first states of an lstm; 0: none */
    bool kinks;            /* in float, a step of the gradient check may make another number the maximum */
} problem;

typedef struct layer_case {
    const char *name;
    pd_layer *(*build)(problem *p);
    void (*twin)(const problem *p, double *y); /* before the activation */
} layer_case;

#define FAIL_AT(p, format, ...)                                                                                        \
    fail_msg("%s (seed %llu): " format, (p)->c->name, (unsigned long long)(p)->seed, __VA_ARGS__)

static int64_t size(const problem *p, int64_t most, int64_t large) { return p->large ? large : 1 + below(most); }

static pd_layer *input(pd_layer *x, bool sequence) { return sequence ? pd_sequence(x) : x; }

static pd_layer *vectors(problem *p, bool sequence) {
    pd_layer *x = input(pd_vector(p->net, NULL, size(p, 5, 24)), sequence);
    pd_want_gradient(x);
    return x;
}

/* ---- batches ---- */

/* Small ids are frequent, as words are. */
static int64_t any_id(int64_t width) { return below(1 + below(width)); }

/* A third of the columns, or none; sometimes all 1. */
static void add_sparse(pd_batch *batch, int slot) {
    int64_t columns[256], count = 0, width = batch->slots[slot].width;
    pd_real values[256];
    for (int64_t c = below(4) ? 0 : width; c < width; c++)
        if (below(3) == 0) {
            values[count] = (pd_real)uniform(-2, 2);
            columns[count++] = c;
        }
    assert_int_equal(pd_batch_add_sparse(batch, slot, columns, below(3) ? values : NULL, count), PD_OK);
}

static bool other_lengths; /* slots but the first one have lengths of their own: those of an attention's keys */

/* A sample of `rows` rows in slots of sequences, one in others. */
static void add_sample(pd_batch *batch, int64_t rows) {
    int64_t others = !other_lengths ? rows : below(3) ? below(9) : below(2);
    for (int k = 0; k < batch->slot_count; k++)
        for (int64_t r = !batch->slots[k].sequence ? 1 : k > 0 ? others : rows; r > 0; r--) {
            const pd_slot *s = &batch->slots[k];
            pd_real *row;
            if (s->kind == PD_SLOT_SPARSE) add_sparse(batch, k);
            if (s->kind == PD_SLOT_IDS) assert_int_equal(pd_batch_add_id(batch, k, any_id(s->width)), PD_OK);
            if (s->kind != PD_SLOT_DENSE) continue;
            row = pd_batch_add_row(batch, k);
            for (int64_t i = 0; i < s->width; i++) row[i] = (pd_real)uniform(-1.5, 1.5);
        }
    if (pd_batch_end_sample(batch) != PD_OK) fail_msg("%s", batch->error.text);
}

/* Ragged: many of length 0 and 1. */
static int64_t any_length(const problem *p) {
    switch (below(4)) {
    case 0: return 0;
    case 1: return 1;
    default: return below(p->large ? 40 : 7);
    }
}

static pd_batch *any_batch(const problem *p) {
    pd_batch *batch = pd_batch_new(p->net);
    int64_t samples = p->large ? 100 : 1 + below(5), last = below(samples);
    for (int64_t i = 0; i < samples; i++) add_sample(batch, i == last ? 1 + below(5) : any_length(p));
    return batch;
}

/* The samples of `from` in another order. */
static pd_batch *batch_in_order(const problem *p, const pd_batch *from, const int64_t *order, int64_t count) {
    pd_batch *batch = pd_batch_new(p->net);
    for (int64_t i = 0; i < count; i++) assert_int_equal(pd_batch_copy_sample(batch, from, order[i]), PD_OK);
    return batch;
}

/* ---- the problem of a case and a seed ---- */

static void free_problem(problem *p) {
    pd_batch_free(p->batch);
    pd_net_free(p->net);
}

/* The cost is a sum of squares, so that every output's gradient is different. */
static void make(problem *p) {
    static const pd_act acts[] = { PD_LINEAR, PD_LINEAR, PD_TANH };
    p->net = pd_net_new(
        &(pd_net_opts){ .seed = p->seed, .threads = p->threads, .allocator = p->allocator, .device = p->device });
    random_seed(p->seed);
    p->act = acts[below(3)];
    p->sequence = below(2) == 0;
    p->reverse = below(2) == 0;
    other_lengths = false;
    p->layer = p->c->build(p);
    p->cost = pd_sum_cost(p->net, pd_multiply(p->net, p->layer, p->layer, NULL), NULL);
    if (!p->cost) FAIL_AT(p, "%s", pd_error(p->net));
    for (pd_param *q = pd_param_first(p->net); q; q = q->next) {
        pd_real *values = (pd_real *)malloc((size_t)q->size * sizeof *values);
        for (int64_t i = 0; i < q->size; i++) values[i] = (pd_real)uniform(-0.8, 0.8);
        assert_int_equal(pd_param_set(q, values, q->size), PD_OK);
        free(values);
    }
    p->batch = any_batch(p);
}

static problem make_problem(const layer_case *c, uint64_t seed) {
    problem p;
    memset(&p, 0, sizeof p);
    p.c = c;
    p.seed = seed;
    make(&p);
    return p;
}

static void forward(problem *p, const pd_batch *batch, pd_mode mode) {
    pd_layer *targets[2] = { p->cost, p->layer }; /* when predicting only targets keep their numbers */
    if (pd_forward(p->net, batch, mode, targets, mode == PD_PREDICT ? 2 : 1) != PD_OK)
        FAIL_AT(p, "%s", pd_error(p->net));
}

/* Adds to the gradients. */
static void backward(problem *p, const pd_batch *batch) {
    forward(p, batch, PD_TRAIN);
    if (pd_backward(p->net, p->cost) != PD_OK) FAIL_AT(p, "%s", pd_error(p->net));
}

static pd_real *copy(const pd_real *from, int64_t count) {
    pd_real *to = (pd_real *)malloc((size_t)(count + 1) * sizeof *to);
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
    return to;
}

static pd_real *output_of(const problem *p) {
    return copy(p->layer->out.data, p->layer->out.rows * p->layer->out.width);
}

static pd_real *gradient_of(const problem *p, const pd_param *q) {
    pd_real *g = (pd_real *)malloc((size_t)q->size * sizeof *g);
    if (pd_param_get_grad(q, g, q->size) != PD_OK) FAIL_AT(p, "%s", pd_error(p->net));
    return g;
}

/* ======================================================================================================== */
/* The layers: what builds one with random sizes and options, and the definition of its output                */

static const pd_tensor *in(const problem *p, int k) { return &p->layer->inputs[k]->out; }
static double value(const problem *p, int param, int64_t i) { return (double)p->layer->params[param]->value[i]; }

/* ---- embedding, fc ---- */

static pd_layer *build_embedding(problem *p) {
    pd_layer *ids = input(pd_ids(p->net, NULL, size(p, 12, 200)), p->sequence);
    pd_embedding_opts o = { .act = p->act, .weight.sparse = p->sparse };
    return pd_embedding(p->net, ids, size(p, 5, 40), &o);
}

static void twin_embedding(const problem *p, double *y) {
    int64_t n = p->layer->out.width;
    for (int64_t i = 0; i < in(p, 0)->rows * n; i++) y[i] = value(p, 0, in(p, 0)->ids[i / n] * n + i % n);
}

static pd_layer *sparse_input(problem *p) {
    return input(pd_sparse_vector(p->net, NULL, size(p, 12, 200)), p->sequence);
}

static pd_layer *build_sparse_fc(problem *p) {
    pd_fc_opts o = { .act = p->act, .no_bias = below(3) == 0, .weight.sparse = p->sparse };
    return pd_fc(p->net, sparse_input(p), size(p, 5, 40), &o);
}

static pd_layer *build_fc_sum(problem *p) {
    pd_fc_opts o = { .act = p->act, .no_bias = below(3) == 0, .weight.sparse = p->sparse };
    int count = 2 + (int)below(2);
    pd_layer *inputs[3];
    for (int k = 0; k < count; k++) inputs[k] = sparse_input(p);
    return pd_fc_sum(p->net, inputs, count, size(p, 5, 40), &o);
}

static pd_layer *build_mixed_fc(problem *p) {
    pd_fc_opts o = { .act = p->act, .no_bias = below(3) == 0 };
    int count = 2 + (int)below(2), dense = (int)below(count);
    pd_layer *inputs[3];
    for (int k = 0; k < count; k++) inputs[k] = k == dense ? vectors(p, p->sequence) : sparse_input(p);
    return pd_fc_sum(p->net, inputs, count, size(p, 5, 40), &o);
}

static void twin_fc(const problem *p, double *y) {
    int64_t n = p->layer->out.width, rows = in(p, 0)->rows;
    int count = p->layer->input_count;
    for (int64_t i = 0; i < rows * n; i++) y[i] = p->layer->param_count > count ? value(p, count, i % n) : 0;
    for (int k = 0; k < count; k++)
        for (int64_t i = 0; i < rows * n; i++) {
            const pd_tensor *x = in(p, k);
            int64_t r = i / n;
            for (int64_t j = 0; x->data && j < x->width; j++)
                y[i] += (double)x->data[r * x->width + j] * value(p, k, j * n + i % n);
            for (int64_t e = x->data ? 0 : x->row_starts[r]; !x->data && e < x->row_starts[r + 1]; e++)
                y[i] += (x->values ? (double)x->values[e] : 1) * value(p, k, x->ids[e] * n + i % n);
        }
}

/* ---- gru ---- */

/* A layer with one row of n numbers per sample, or, as often, none. */
static pd_layer *any_first(problem *p, int64_t n) {
    pd_layer *first = below(2) ? pd_vector(p->net, NULL, n) : NULL;
    if (first) pd_want_gradient(first);
    return first;
}

static pd_layer *build_gru(problem *p) {
    pd_layer *x = vectors(p, true);
    int64_t n = size(p, 5, 24);
    pd_gru_opts o = { .reverse = p->reverse, .first = any_first(p, n) };
    p->act = PD_LINEAR;
    return pd_gru(p->net, x, n, &o);
}

/* The state that sequence q begins with, by input k (0: none). */
static void first_state(const problem *p, int k, int64_t q, int64_t n, double *state) {
    for (int64_t j = 0; j < n; j++) state[j] = k ? (double)in(p, k)->data[q * n + j] : 0;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* Column j of x w, w being `width` wide. */
static double product(const pd_real *x, const double *h, int64_t m, const pd_real *w, int64_t width, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < m; i++) sum += (x ? (double)x[i] : h[i]) * (double)w[i * width + j];
    return sum;
}

/* One row after the other, from the definition. */
static void twin_gru(const problem *p, double *y) {
    const pd_tensor *x = in(p, 0);
    pd_param **params = p->layer->params;
    int64_t n = p->layer->out.width;
    for (int64_t q = 0; q < x->sequences; q++) {
        double h[64], next[64];
        int64_t length = x->starts[q + 1] - x->starts[q];
        first_state(p, p->layer->input_count - 1, q, n, h);
        for (int64_t t = 0; t < length; t++) {
            int64_t row = x->starts[q] + (p->reverse ? length - 1 - t : t);
            for (int64_t j = 0; j < n; j++) {
                double a[3], u[3], z, r, c;
                for (int gate = 0; gate < 3; gate++) {
                    int64_t column = gate * n + j;
                    a[gate] = product(x->data + row * x->width, NULL, x->width, params[0]->value, 3 * n, column) +
                              value(p, 2, column);
                    u[gate] = product(NULL, h, n, params[1]->value, 3 * n, column);
                }
                z = sigmoid(a[0] + u[0]);
                r = sigmoid(a[1] + u[1]);
                c = tanh(a[2] + r * (u[2] + value(p, 3, j)));
                y[row * n + j] = next[j] = (1 - z) * c + z * h[j];
            }
            memcpy(h, next, sizeof h);
        }
    }
}

/* ---- lstm ---- */

static pd_layer *build_lstm(problem *p) {
    pd_layer *x = vectors(p, true);
    int64_t n = size(p, 5, 24);
    pd_lstm_opts o = { .reverse = p->reverse, .peepholes = below(2), .cells = below(2) };
    p->act = PD_LINEAR;
    o.first = any_first(p, n);
    o.first_cell = any_first(p, n);
    p->first = o.first ? 1 : 0;
    p->first_cell = o.first_cell ? 1 + p->first : 0;
    return pd_lstm(p->net, x, n, &o);
}

/* One row after the other, from the definition. */
static void twin_lstm(const problem *p, double *y) {
    const pd_tensor *x = in(p, 0);
    pd_param **params = p->layer->params;
    int64_t n = params[1]->dims[0], width = p->layer->out.width;
    bool peepholes = p->layer->param_count > 3;
    for (int64_t q = 0; q < x->sequences; q++) {
        double h[64], c[64], next[64];
        int64_t length = x->starts[q + 1] - x->starts[q];
        first_state(p, p->first, q, n, h);
        first_state(p, p->first_cell, q, n, c);
        for (int64_t t = 0; t < length; t++) {
            int64_t row = x->starts[q] + (p->reverse ? length - 1 - t : t);
            for (int64_t j = 0; j < n; j++) {
                double a[4], w[3] = { 0, 0, 0 };
                for (int gate = 0; gate < 4; gate++)
                    a[gate] = product(x->data + row * x->width, NULL, x->width, params[0]->value, 4 * n, gate * n + j) +
                              product(NULL, h, n, params[1]->value, 4 * n, gate * n + j) + value(p, 2, gate * n + j);
                for (int k = 0; k < 3 && peepholes; k++) w[k] = value(p, 3, k * n + j);
                double i = sigmoid(a[0] + w[0] * c[j]), f = sigmoid(a[1] + w[1] * c[j]);
                c[j] = f * c[j] + i * tanh(a[2]);
                y[row * width + j] = next[j] = sigmoid(a[3] + w[2] * c[j]) * tanh(c[j]);
                if (width == 2 * n) y[row * width + n + j] = c[j];
            }
            memcpy(h, next, sizeof h);
        }
    }
}

/* ---- attention ---- */

static pd_layer *wanted(problem *p, int64_t width, bool sequence) {
    pd_layer *x = input(pd_vector(p->net, NULL, width), sequence);
    pd_want_gradient(x);
    return x;
}

/* Sometimes a sequence that looks at itself, or keys that are the values. */
static pd_layer *build_attention(problem *p) {
    int64_t width = size(p, 5, 300);
    pd_layer *query = wanted(p, width, p->sequence), *keys = query, *values;
    other_lengths = !p->sequence || below(8) > 0;
    if (other_lengths) keys = wanted(p, width, true);
    values = below(5) ? wanted(p, size(p, 5, 270), true) : keys;
    if (!other_lengths) values = query;
    p->act = PD_LINEAR;
    return pd_attention(p->net, query, keys, values, NULL);
}

/* The weights of row r of the queries, which looks at the keys of sample q. */
static void twin_weights(const problem *p, int64_t q, int64_t r, double *weights) {
    const pd_tensor *query = in(p, 0), *keys = in(p, 1);
    int64_t first = keys->starts[q], end = keys->starts[q + 1];
    double top = -HUGE_VAL, sum = 0;
    for (int64_t k = first; k < end; k++) {
        double *score = weights + (k - first);
        *score = 0;
        for (int64_t i = 0; i < query->width; i++)
            *score += value(p, 0, i) *
                      tanh((double)query->data[r * query->width + i] + (double)keys->data[k * keys->width + i]);
        top = fmax(top, *score);
    }
    for (int64_t k = 0; k < end - first; k++) sum += weights[k] = exp(weights[k] - top);
    for (int64_t k = 0; k < end - first; k++) weights[k] /= sum;
}

static void twin_attention(const problem *p, double *y) {
    const pd_tensor *query = in(p, 0), *values = in(p, 2);
    for (int64_t q = 0; q < values->sequences; q++)
        for (int64_t r = query->starts ? query->starts[q] : q; r < (query->starts ? query->starts[q + 1] : q + 1);
             r++) {
            int64_t first = values->starts[q], end = values->starts[q + 1];
            double weights[64];
            twin_weights(p, q, r, weights);
            for (int64_t i = 0; i < values->width; i++) {
                y[r * values->width + i] = 0;
                for (int64_t k = first; k < end; k++)
                    y[r * values->width + i] += weights[k - first] * (double)values->data[k * values->width + i];
            }
        }
}

/* ---- sequence_pool ---- */

static pd_layer *build_pool_by(problem *p, pd_pool_method method) {
    int64_t channels = size(p, 3, 5), height = size(p, 2, 3);
    pd_layer *x = pd_image(p->net, NULL, channels, height, size(p, 2, 2));
    p->method = method;
    p->kinks = method == PD_MAX;
    pd_sequence(x);
    pd_want_gradient(x);
    return pd_sequence_pool(p->net, x, method, &(pd_layer_opts){ .act = p->act });
}
static pd_layer *build_max(problem *p) { return build_pool_by(p, PD_MAX); }
static pd_layer *build_average(problem *p) { return build_pool_by(p, PD_AVERAGE); }
static pd_layer *build_sum(problem *p) { return build_pool_by(p, PD_SUM); }
static pd_layer *build_sqrt_n(problem *p) { return build_pool_by(p, PD_SQRT_N); }
static pd_layer *build_first(problem *p) { return build_pool_by(p, PD_FIRST); }
static pd_layer *build_last(problem *p) { return build_pool_by(p, PD_LAST); }

static void twin_pool(const problem *p, double *y) {
    const pd_tensor *x = in(p, 0);
    for (int64_t i = 0; i < x->sequences * x->width; i++) {
        int64_t first = x->starts[i / x->width], end = x->starts[i / x->width + 1];
        double sum = 0, largest = -HUGE_VAL, n = (double)(end - first);
        y[i] = 0;
        if (n == 0) continue;
        for (int64_t r = first; r < end; r++) {
            double v = (double)x->data[r * x->width + i % x->width];
            sum += v;
            largest = fmax(largest, v);
        }
        if (p->method == PD_MAX) y[i] = largest;
        if (p->method == PD_AVERAGE) y[i] = sum / n;
        if (p->method == PD_SUM) y[i] = sum;
        if (p->method == PD_SQRT_N) y[i] = sum / sqrt(n);
        if (p->method == PD_FIRST) y[i] = (double)x->data[first * x->width + i % x->width];
        if (p->method == PD_LAST) y[i] = (double)x->data[(end - 1) * x->width + i % x->width];
    }
}

static const layer_case cases[] = {
    { "embedding", build_embedding, twin_embedding },
    { "fc of sparse rows", build_sparse_fc, twin_fc },
    { "fc of several sparse rows", build_fc_sum, twin_fc },
    { "fc of sparse and dense rows", build_mixed_fc, twin_fc },
    { "gru", build_gru, twin_gru },
    { "lstm", build_lstm, twin_lstm },
    { "attention", build_attention, twin_attention },
    { "sequence_pool: max", build_max, twin_pool },
    { "sequence_pool: average", build_average, twin_pool },
    { "sequence_pool: sum", build_sum, twin_pool },
    { "sequence_pool: sqrt_n", build_sqrt_n, twin_pool },
    { "sequence_pool: first", build_first, twin_pool },
    { "sequence_pool: last", build_last, twin_pool },
};
enum { CASES = sizeof cases / sizeof *cases, TABLES = 3 /* the first ones have parameters that may be sparse */ };

#define FOR_SEEDS(count, c, seed)                                                                                      \
    for (const layer_case *c = cases; c < cases + (count); c++)                                                        \
        for (uint64_t seed = 1000 * (uint64_t)(c - cases); seed % 1000 < (uint64_t)rounds(60); seed++)                 \
            if (asked_for(c->name))

/* ======================================================================================================== */
/* Values and gradients                                                                                      */

static void check_shape(const problem *p) {
    const pd_tensor *x = in(p, 0), *y = &p->layer->out;
    bool pooled = p->c->twin == twin_pool;
    assert_int_equal(y->rows, pooled ? x->sequences : x->rows);
    assert_int_equal(y->sequences, pooled ? 0 : x->sequences);
    assert_ptr_equal(y->starts, pooled ? NULL : x->starts);
    assert_true(p->layer->is_sequence == (!pooled && p->layer->inputs[0]->is_sequence));
    if (pooled) assert_true(memcmp(&p->layer->shape, &p->layer->inputs[0]->shape, sizeof(pd_shape)) == 0);
}

static void check_values(problem *p) {
    int64_t count = p->layer->out.rows * p->layer->out.width;
    double *y = (double *)calloc((size_t)count + 1, sizeof *y);
    p->c->twin(p, y);
    for (int64_t i = 0; i < count; i++)
        check_near((double)p->layer->out.data[i], p->act == PD_TANH ? tanh(y[i]) : y[i], 10 * REAL_TOLERANCE,
                   p->c->name);
    free(y);
}

static void test_values(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        problem p = make_problem(c, seed);
        forward(&p, p.batch, PD_PREDICT);
        check_shape(&p);
        check_values(&p);
        backward(&p, p.batch);
        check_values(&p);
        free_problem(&p);
    }
}

static void check_gradients(problem *p) {
    pd_gradcheck r;
    if (pd_check_gradients(p->layer, p->batch, &(pd_gradcheck_opts){ .seed = p->seed }, &r) != PD_OK)
        FAIL_AT(p, "%s", pd_error(p->net));
    if (r.error > (IS_DOUBLE ? 1e-6 : p->kinks ? 2 : 5e-2))
        FAIL_AT(p, "gradient of %s[%lld] is %g, differences say %g", r.worst, (long long)r.worst_index, r.analytic,
                r.numeric);
    if (r.accumulation > REAL_TOLERANCE) FAIL_AT(p, "twice a gradient is off by %g", r.accumulation);
}

static void test_gradients(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        for (int sparse = 0; sparse < (c < cases + TABLES ? 2 : 1); sparse++) {
            problem p = { .c = c, .seed = seed, .sparse = sparse != 0 };
            make(&p);
            check_gradients(&p);
            free_problem(&p);
        }
    }
}

/* Every layer's input has other users, which add to the same gradient. */
static void test_gradients_of_many_users(void **state) {
    static const layer_case many = { "many users", NULL, NULL };
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        problem p = { .c = &many, .seed = seed, .kinks = true };
        pd_layer *x[4], *joined, *pools[PD_LAST + 1];
        p.net = pd_net_new(&(pd_net_opts){ .seed = seed });
        random_seed(seed);
        x[0] = vectors(&p, true);
        x[1] = pd_gru(p.net, x[0], 3, NULL);
        x[2] = pd_gru(p.net, x[0], 2, &(pd_gru_opts){ .reverse = true });
        x[3] = pd_lstm(p.net, x[0], 2, &(pd_lstm_opts){ .cells = true });
        joined = pd_concat(p.net, x, 4, NULL);
        for (int method = 0; method <= PD_LAST; method++)
            pools[method] = pd_sequence_pool(p.net, joined, (pd_pool_method)method, NULL);
        p.layer = pd_concat(p.net, pools, PD_LAST + 1, NULL);
        p.batch = any_batch(&p);
        check_gradients(&p);
        free_problem(&p);
    }
}

/* Same bits, over two batches, and only the rows of these batches have a place. */
static void test_sparse_is_dense(void **state) {
    (void)state;
    FOR_SEEDS(TABLES, c, seed) {
        problem dense = { .c = c, .seed = seed }, sparse = { .c = c, .seed = seed, .sparse = true };
        problem *both[] = { &dense, &sparse };
        for (int i = 0; i < 2; i++) {
            problem *p = both[i];
            make(p);
            for (int again = 0; again < 2; again++) {
                backward(p, p->batch);
                pd_batch_free(p->batch);
                p->batch = any_batch(p);
            }
        }
        for (pd_param *a = pd_param_first(dense.net), *b = pd_param_first(sparse.net); a; a = a->next, b = b->next) {
            pd_real *expected = gradient_of(&dense, a), *actual = gradient_of(&sparse, b);
            int64_t rows = 0;
            assert_memory_equal(actual, expected, (size_t)a->size * sizeof *actual);
            for (int64_t r = 0; b->opts.sparse && r < b->dims[0]; r++) {
                bool zero = true;
                for (int64_t i = 0; i < b->dims[1]; i++) zero = zero && expected[r * b->dims[1] + i] == 0;
                if (!zero) assert_true(pd_param_place(b, r) >= 0);
                rows += pd_param_place(b, r) >= 0;
            }
            assert_int_equal(b->rows.count, rows);
            assert_true(b->opts.sparse == (b->dim_count == 2));
            free(expected);
            free(actual);
        }
        free_problem(&dense);
        free_problem(&sparse);
    }
}

/* ---- time orders ---- */

/* A net of GRUs: one for each set bit of `which`, over inputs of sequences "a" and "b", and one over b reversed. */
static pd_net *net_of_grus(unsigned which, pd_layer *grus[3], pd_layer **cost) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 5 });
    pd_layer *x[2], *squares[3];
    int count = 0;
    for (int k = 0; k < 2; k++) x[k] = pd_sequence(pd_vector(net, k ? "b" : "a", 3));
    for (int k = 0; k < 3; k++) {
        const char *names[] = { "on a", "on b", "back on b" };
        if (!(which >> k & 1)) continue;
        grus[k] = pd_gru(net, x[k > 0], 4, &(pd_gru_opts){ .name = names[k], .reverse = k == 2 });
        squares[count++] = pd_sequence_pool(net, pd_multiply(net, grus[k], grus[k], NULL), PD_SUM, NULL);
    }
    *cost = pd_sum_cost(net, count > 1 ? pd_concat(net, squares, count, NULL) : squares[0], NULL);
    assert_non_null(*cost);
    return net;
}

/* Samples of these lengths, of a and of b. */
static pd_batch *two_sequences(pd_net *net, const int *a, const int *b, int samples) {
    pd_batch *batch = pd_batch_new(net);
    random_seed(3);
    for (int q = 0; q < samples; q++) {
        for (int k = 0; k < 2; k++)
            for (int r = 0; r < (k ? b : a)[q]; r++) {
                pd_real *row = pd_batch_add_row(batch, k);
                for (int i = 0; i < 3; i++) row[i] = (pd_real)uniform(-1, 1);
            }
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

static void run_grus(pd_net *net, pd_layer *cost, const pd_batch *batch) {
    for (pd_param *q = pd_param_first(net); q; q = q->next) {
        random_seed((uint64_t)strlen(q->name)); /* those of one name have the same values in every net */
        for (int64_t i = 0; i < q->size; i++) q->value[i] = (pd_real)uniform(-0.8, 0.8);
        if (q->grad) memset(q->grad, 0, (size_t)q->size * sizeof *q->grad);
    }
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &cost, 1), PD_OK);
    assert_int_equal(pd_backward(net, cost), PD_OK);
}

/* Layers over equal offsets share one time order, of each direction, and it makes no difference. */
static void test_time_orders(void **state) {
    const int lengths[] = { 2, 0, 5, 1, 5 }, others[] = { 2, 0, 4, 2, 5 };
    pd_layer *grus[3], *cost, *alone[3], *lonely_cost;
    pd_net *net = net_of_grus(7, grus, &cost);
    pd_batch *equal = two_sequences(net, lengths, lengths, 5), *unequal = two_sequences(net, lengths, others, 5);
    (void)state;
    for (int turn = 0; turn < 4; turn++) {
        const pd_batch *batch = turn % 2 ? unequal : equal;
        run_grus(net, cost, batch);
        assert_int_equal(inside_orders(net), turn % 2 ? 3 : 2);
        assert_int_equal(inside_kept_orders(net), turn ? 3 : 2);
        for (int k = 0; k < 3; k++) {
            pd_net *one = net_of_grus(1u << k, alone, &lonely_cost);
            run_grus(one, lonely_cost, batch);
            assert_int_equal(inside_orders(one), 1);
            assert_memory_equal(grus[k]->out.data, alone[k]->out.data,
                                (size_t)(grus[k]->out.rows * 4) * sizeof(pd_real));
            for (int i = 0; i < 4; i++)
                assert_memory_equal(grus[k]->params[i]->grad, alone[k]->params[i]->grad,
                                    (size_t)grus[k]->params[i]->size * sizeof(pd_real));
            pd_net_free(one);
        }
    }
    pd_batch_free(equal);
    pd_batch_free(unequal);
    pd_net_free(net);
}

/* The gradient of a largest number that stands there twice goes to the first; a NaN is the largest. */
static void test_ties(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", 1)), *y = pd_sequence_pool(net, x, PD_MAX, NULL);
    pd_layer *cost = pd_sum_cost(net, y, NULL);
    pd_batch *batch = pd_batch_new(net);
    const pd_real numbers[] = { -2, -1, -3, -1 };
    (void)state;
    pd_want_gradient(x);
    for (int i = 0; i < 4; i++) *pd_batch_add_row(batch, 0) = numbers[i];
    pd_batch_end_sample(batch);
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &cost, 1), PD_OK);
    assert_true(*pd_output(y, NULL, NULL) == -1);
    assert_int_equal(pd_backward(net, cost), PD_OK);
    for (int i = 0; i < 4; i++) assert_true(x->out.grad[i] == (i == 1 ? 1 : 0));
    batch->slots[0].data[2] = (pd_real)NAN;
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_OK);
    assert_true(isnan((double)*pd_output(y, NULL, NULL)));
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- attention: of what the net wants, and of what a call is asked for ---- */

enum { GRADIENTS = 4 }; /* of query, keys, values and v */

typedef struct looking {
    pd_net *net;
    pd_layer *inputs[3], *layer, *cost;
    pd_batch *batch;
} looking;

/* `wants` has a bit for each gradient. */
static looking make_looking(uint64_t seed, int wants) {
    looking a;
    pd_attention_opts o = { .name = "look", .weight.is_static = !(wants & 8) };
    a.net = pd_net_new(&(pd_net_opts){ .seed = seed });
    random_seed(seed);
    a.inputs[0] = input(pd_vector(a.net, NULL, 5), seed % 3 != 0);
    a.inputs[1] = pd_sequence(pd_vector(a.net, NULL, 5));
    a.inputs[2] = pd_sequence(pd_vector(a.net, NULL, 3));
    for (int k = 0; k < 3; k++)
        if (wants >> k & 1) pd_want_gradient(a.inputs[k]);
    a.layer = pd_attention(a.net, a.inputs[0], a.inputs[1], a.inputs[2], &o);
    a.cost = pd_sum_cost(a.net, pd_multiply(a.net, a.layer, a.layer, NULL), NULL);
    if (!a.cost) fail_msg("%s", pd_error(a.net));
    a.batch = pd_batch_new(a.net);
    other_lengths = true;
    for (int i = 0; i < 6; i++) add_sample(a.batch, below(5));
    return a;
}

static pd_real *look_gradient(const looking *a, int k, int64_t *count) {
    *count = k < 3 ? a->inputs[k]->out.rows * a->inputs[k]->out.width : a->layer->params[0]->size;
    return k < 3 ? a->inputs[k]->out.grad : a->layer->params[0]->grad;
}

static void free_looking(looking *a) {
    pd_batch_free(a->batch);
    pd_net_free(a->net);
}

/* Each gradient has the same bits whatever others are wanted. */
static void test_attention_of_what_learns(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 12; seed++) {
        looking all = make_looking(seed, 15);
        assert_int_equal(pd_forward(all.net, all.batch, PD_TRAIN, &all.cost, 1), PD_OK);
        assert_int_equal(pd_backward(all.net, all.cost), PD_OK);
        for (int wants = 1; wants < 15; wants++) {
            looking some = make_looking(seed, wants);
            assert_int_equal(pd_forward(some.net, some.batch, PD_TRAIN, &some.cost, 1), PD_OK);
            assert_int_equal(pd_backward(some.net, some.cost), PD_OK);
            for (int k = 0; k < GRADIENTS; k++) {
                int64_t count;
                const pd_real *want = look_gradient(&all, k, &count), *got = look_gradient(&some, k, &count);
                assert_true((got != NULL) == (wants >> k & 1));
                if (got && count) assert_memory_equal(got, want, (size_t)count * sizeof *got);
            }
            free_looking(&some);
        }
        free_looking(&all);
    }
}

/* One call that hides the gradients whose bits `shown` lacks. */
static void backward_of(const looking *a, int shown) {
    pd_real *hidden[GRADIENTS];
    for (int k = 0; k < 3; k++) hidden[k] = a->inputs[k]->out.grad;
    hidden[3] = a->layer->params[0]->grad;
    for (int k = 0; k < 3; k++)
        if (!(shown >> k & 1)) a->inputs[k]->out.grad = NULL;
    if (!(shown & 8)) a->layer->params[0]->grad = NULL;
    assert_int_equal(inside_backward(a->layer), PD_OK);
    for (int k = 0; k < 3; k++) a->inputs[k]->out.grad = hidden[k];
    a->layer->params[0]->grad = hidden[3];
}

/* Gradients of inputs by one call and that of v by another are those of one call; also when it is called again with
   other gradients of the output. */
static void test_attention_in_parts(void **state) {
    enum { NONE = 16 };
    static const int parts[][2][4] = { { { 7, 8 }, { 7, 8 } },       { { 15 }, { 8, 7 } },
                                       { { 15, NONE }, { 15 } },     { { 1, 6, 8 }, { 1, 14 } },
                                       { { 8, 1, 6 }, { 15 } },      { { 7, NONE, 8 }, { 8, 7 } },
                                       { { 6, NONE, 9 }, { 7, 8 } }, { { 7, 8 }, { 8, 7 } } };
    (void)state;
    for (uint64_t seed = 0; seed < 12; seed++) {
        looking whole = make_looking(seed, 15);
        assert_int_equal(pd_forward(whole.net, whole.batch, PD_TRAIN, &whole.cost, 1), PD_OK);
        for (int64_t i = 0; i < whole.layer->out.rows * 3; i++) whole.layer->out.grad[i] = (pd_real)(i % 7) - 3;
        backward_of(&whole, 15);
        for (int64_t i = 0; i < whole.layer->out.rows * 3; i++) whole.layer->out.grad[i] = (pd_real)(i % 4);
        backward_of(&whole, 15);
        for (int c = 0; c < COUNT(parts); c++) {
            looking a = make_looking(seed, 15);
            assert_int_equal(pd_forward(a.net, a.batch, PD_TRAIN, &a.cost, 1), PD_OK);
            for (int turn = 0; turn < 2; turn++) {
                for (int64_t i = 0; i < a.layer->out.rows * 3; i++)
                    a.layer->out.grad[i] = turn == 0 ? (pd_real)(i % 7) - 3 : (pd_real)(i % 4);
                for (int k = 0; k < 4 && parts[c][turn][k]; k++) backward_of(&a, parts[c][turn][k]);
            }
            for (int k = 0; k < GRADIENTS; k++) {
                int64_t count;
                const pd_real *want = look_gradient(&whole, k, &count), *got = look_gradient(&a, k, &count);
                for (int64_t i = 0; i < count; i++) /* the order in which two are added to one may be another */
                    check_near((double)got[i], (double)want[i], REAL_TOLERANCE, "attention in parts");
            }
            free_looking(&a);
        }
        free_looking(&whole);
    }
}

/* Weights are those of the definition, in every mode, and none are given where there are none. */
static void test_attention_weights(void **state) {
    static const pd_mode modes[] = { PD_PREDICT, PD_TRAIN, PD_CHECK };
    (void)state;
    for (uint64_t seed = 0; seed < 30; seed++) {
        looking a = make_looking(seed, 15);
        problem p = { .seed = seed, .layer = a.layer };
        const pd_tensor *y = &a.layer->out, *keys = &a.inputs[1]->out;
        int64_t count = -1, rows;
        pd_batch *empty;
        assert_null(pd_attention_weights(a.layer, 0, 0, &count));
        assert_string_equal(pd_error(a.net), "look: pd_attention_weights: it had no part in the last run");
        assert_int_equal(pd_forward(a.net, a.batch, modes[seed % 3], &a.cost, 1), PD_OK); /* it is no target */
        for (int64_t q = 0; q < keys->sequences; q++) {
            rows = y->starts ? y->starts[q + 1] - y->starts[q] : 1;
            for (int64_t r = 0; r < rows; r++) {
                double want[64], sum = 0;
                const pd_real *got = pd_attention_weights(a.layer, q, r, &count);
                assert_non_null(got);
                assert_int_equal(count, keys->starts[q + 1] - keys->starts[q]);
                twin_weights(&p, q, (y->starts ? y->starts[q] : q) + r, want);
                for (int64_t k = 0; k < count; k++) {
                    check_near((double)got[k], want[k], REAL_TOLERANCE, "weight");
                    sum += (double)got[k];
                }
                if (count > 0) check_near(sum, 1, REAL_TOLERANCE, "sum of weights");
            }
            assert_null(pd_attention_weights(a.layer, q, rows, &count));
            assert_null(pd_attention_weights(a.layer, q, -1, &count));
        }
        assert_null(pd_attention_weights(a.layer, 6, 0, &count));
        assert_string_equal(pd_error(a.net), "look: pd_attention_weights: there is no row 0 of sample 6");
        assert_null(pd_attention_weights(a.inputs[1], 0, 0, &count));
        check_contains(pd_error(a.net), ": pd_attention_weights: it is of type ");
        assert_null(pd_attention_weights(NULL, 0, 0, &count));
        assert_int_equal(pd_forward(a.net, a.batch, PD_PREDICT, &a.inputs[0], 1), PD_OK);
        assert_null(pd_attention_weights(a.layer, 0, 0, &count));
        empty = pd_batch_new(a.net);
        assert_int_equal(pd_forward(a.net, empty, PD_PREDICT, &a.layer, 1), PD_OK);
        assert_null(pd_attention_weights(a.layer, 0, 0, &count));
        check_contains(pd_error(a.net), "there is no row 0 of sample 0");
        pd_batch_free(empty);
        free_looking(&a);
    }
}

/* ======================================================================================================== */
/* Batches                                                                                                   */

/* Where sample i begins in the layer's output. */
static int64_t row_of(const problem *p, int64_t sample) {
    const pd_tensor *y = &p->layer->out;
    return y->starts ? y->starts[sample] : sample;
}

/* Every sample alone puts out the same. */
static void test_alone(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        problem p = make_problem(c, seed);
        int64_t samples = p.batch->samples, n = p.layer->out.width, at[8] = { 0 };
        pd_real *together;
        forward(&p, p.batch, PD_PREDICT);
        together = output_of(&p);
        for (int64_t i = 0; i <= samples; i++) at[i] = row_of(&p, i);
        for (int64_t i = 0; i < samples; i++) {
            pd_batch *one = batch_in_order(&p, p.batch, &i, 1);
            forward(&p, one, PD_PREDICT);
            assert_int_equal(p.layer->out.rows, at[i + 1] - at[i]);
            for (int64_t k = 0; k < p.layer->out.rows * n; k++)
                check_near((double)p.layer->out.data[k], (double)together[at[i] * n + k], REAL_TOLERANCE, c->name);
            pd_batch_free(one);
        }
        free(together);
        free_problem(&p);
    }
}

/* Backwards, all samples put out the same, and the gradients of parameters are the same. */
static void test_order(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        problem p = make_problem(c, seed);
        int64_t samples = p.batch->samples, n = p.layer->out.width, order[8] = { 0 }, at[9] = { 0 };
        pd_real *there, *gradients[8] = { NULL };
        pd_batch *reversed;
        int k = 0;
        for (int64_t i = 0; i < samples; i++) order[i] = samples - 1 - i;
        reversed = batch_in_order(&p, p.batch, order, samples);
        backward(&p, p.batch);
        there = output_of(&p);
        for (int64_t i = 0; i <= samples; i++) at[i] = row_of(&p, i);
        for (pd_param *q = pd_param_first(p.net); q; q = q->next) gradients[k++] = gradient_of(&p, q);
        pd_zero_grads(p.net);
        backward(&p, reversed);
        for (int64_t i = 0; i < samples; i++)
            for (int64_t j = 0; j < (at[i + 1] - at[i]) * n; j++)
                check_near((double)p.layer->out.data[row_of(&p, order[i]) * n + j], (double)there[at[i] * n + j],
                           REAL_TOLERANCE, c->name);
        k = 0;
        for (pd_param *q = pd_param_first(p.net); q; q = q->next, k++) {
            pd_real *again = gradient_of(&p, q);
            for (int64_t i = 0; i < q->size; i++)
                check_near((double)again[i], (double)gradients[k][i], 10 * REAL_TOLERANCE, q->name);
            free(again);
            free(gradients[k]);
        }
        free(there);
        pd_batch_free(reversed);
        free_problem(&p);
    }
}

/* Without samples, or with sequences without rows, before and after others: nothing is learned, pools give zeros. */
static void test_empty(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        problem p = { .c = c, .seed = seed, .sparse = c < cases + TABLES };
        pd_batch *empty;
        bool sequences;
        make(&p);
        sequences = p.layer->inputs[0]->is_sequence;
        empty = pd_batch_new(p.net);
        for (int turn = 0; turn < 4; turn++) {
            if (turn == 2 && sequences)
                for (int i = 0; i < 3; i++) add_sample(empty, 0);
            forward(&p, empty, PD_PREDICT);
            assert_int_equal(pd_zero_grads(p.net), PD_OK);
            backward(&p, empty);
            assert_int_equal(p.layer->out.rows, c->twin == twin_pool ? empty->samples : 0);
            for (int64_t i = 0; i < p.layer->out.rows * p.layer->out.width; i++) assert_true(p.layer->out.data[i] == 0);
            for (pd_param *q = pd_param_first(p.net); q; q = q->next) {
                pd_real *g = gradient_of(&p, q);
                for (int64_t i = 0; i < q->size; i++) assert_true(g[i] == 0);
                free(g);
            }
            backward(&p, p.batch);
            check_values(&p);
        }
        pd_batch_free(empty);
        free_problem(&p);
    }
}

/* All output and gradients of a large problem. */
static pd_real *run_large(const layer_case *c, uint64_t seed, int threads, int64_t *count) {
    problem p = { .c = c, .seed = seed, .sparse = c < cases + TABLES, .large = true, .threads = threads };
    pd_real *numbers;
    make(&p);
    backward(&p, p.batch);
    *count = p.layer->out.rows * p.layer->out.width;
    numbers = (pd_real *)malloc((size_t)*count * sizeof *numbers);
    memcpy(numbers, p.layer->out.data, (size_t)*count * sizeof *numbers);
    for (pd_param *q = pd_param_first(p.net); q; q = q->next) {
        pd_real *g = gradient_of(&p, q);
        numbers = (pd_real *)realloc(numbers, (size_t)(*count + q->size) * sizeof *numbers);
        memcpy(numbers + *count, g, (size_t)q->size * sizeof *g);
        *count += q->size;
        free(g);
    }
    for (int k = 0; k < p.layer->input_count; k++) {
        const pd_tensor *x = in(&p, k);
        int64_t n = x->grad ? x->rows * x->width : 0;
        numbers = (pd_real *)realloc(numbers, (size_t)(*count + n) * sizeof *numbers);
        for (int64_t i = 0; i < n; i++) numbers[(*count)++] = x->grad[i];
    }
    check_values(&p);
    free_problem(&p);
    return numbers;
}

static void test_threads(void **state) {
    (void)state;
    for (const layer_case *c = cases; c < cases + CASES; c++)
        for (uint64_t seed = 1; seed < 3; seed++) {
            int64_t count, again;
            if (!asked_for(c->name) || !chosen()) continue;
            pd_real *one = run_large(c, seed, 1, &count);
            for (int threads = 2; threads < 5; threads++) {
                pd_real *more = run_large(c, seed, threads, &again);
                assert_int_equal(count, again);
                assert_memory_equal(one, more, (size_t)count * sizeof *one);
                free(more);
            }
            free(one);
        }
}

/* The same bits of two problems, one of which may be on a far device. */
static void check_same(const problem *a, const problem *b, const pd_real *x, const pd_real *y, int64_t count,
                       const char *what) {
    if (memcmp(x, y, (size_t)count * sizeof *x) != 0) FAIL_AT(a, "%s of device %s differs", what, b->device->name);
}

static void check_same_problems(const problem *near_one, const problem *far_one) {
    int64_t rows, width, far_rows;
    const pd_real *y = pd_output(near_one->layer, &rows, &width), *far_y = pd_output(far_one->layer, &far_rows, NULL);
    assert_int_equal(far_rows, rows);
    check_same(near_one, far_one, y, far_y, rows * width, "the output");
    for (pd_param *a = pd_param_first(near_one->net), *b = pd_param_first(far_one->net); a; a = a->next, b = b->next) {
        pd_real *g = gradient_of(near_one, a), *far_g = gradient_of(far_one, b);
        check_same(near_one, far_one, g, far_g, a->size, a->name);
        free(g);
        free(far_g);
    }
    for (int k = 0; k < near_one->layer->input_count; k++) {
        const pd_tensor *x = in(near_one, k), *far_x = in(far_one, k);
        pd_real *g = (pd_real *)malloc((size_t)(x->rows * x->width + 1) * sizeof *g);
        far_one->device->download(far_one->device, g, far_x->grad, (size_t)(x->rows * x->width) * sizeof *g);
        check_same(near_one, far_one, x->grad, g, x->rows * x->width, near_one->layer->inputs[k]->name);
        free(g);
    }
}

/* On a device without host memory recurrent layers run there, or, where it lacks one of their operations, on the CPU. */
static void test_far_device(void **state) {
    const uint64_t lacking[] = { 0, PD_OP(gru) | PD_OP(lstm), PD_OP(gru_backward) | PD_OP(lstm_backward) };
    pd_net *host = pd_net_new(NULL);
    (void)state;
    for (int k = 0; k < COUNT(lacking); k++) {
        far_device far = make_far(cpu_of(host), ~lacking[k]);
        far.device.self = &far;
        FOR_SEEDS(CASES, c, seed) {
            problem p = { .c = c, .seed = seed }, q = { .c = c, .seed = seed, .device = &far.device };
            char info[400];
            if (c->twin != twin_gru && c->twin != twin_lstm) continue;
            make(&p);
            make(&q);
            for (int turn = 0; turn < 2; turn++) {
                backward(&p, p.batch);
                backward(&q, q.batch);
                check_same_problems(&p, &q);
            }
            pd_info(q.net, info, sizeof info);
            assert_true((strstr(info, q.layer->name) != NULL) == (k > 0));
            free_problem(&p);
            free_problem(&q);
        }
    }
    pd_net_free(host);
}

static void test_shared_net(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        problem p = { .c = c, .seed = seed, .sparse = c < cases + TABLES };
        pd_net *shared;
        pd_layer *twin;
        pd_real *y;
        make(&p);
        forward(&p, p.batch, PD_PREDICT);
        y = output_of(&p);
        shared = pd_net_share(p.net);
        if (!shared) FAIL_AT(&p, "%s", pd_error(p.net));
        twin = pd_layer_find(shared, p.layer->name);
        assert_int_equal(pd_forward(shared, p.batch, PD_PREDICT, &twin, 1), PD_OK);
        assert_memory_equal(twin->out.data, y, (size_t)(twin->out.rows * twin->out.width) * sizeof *y);
        free(y);
        pd_net_free(shared);
        free_problem(&p);
    }
}

/* ======================================================================================================== */
/* Tables                                                                                                    */

/* Two embeddings and a sparse fc that read one table: its gradient is the sum of those of three tables. */
static pd_net *three_readers(bool shared, bool sparse, pd_layer **cost) {
    const char *name = shared ? "table" : NULL;
    pd_net *net = pd_net_new(NULL);
    pd_layer *a = pd_ids(net, "a", 7), *b = pd_ids(net, "b", 7), *c = pd_sparse_vector(net, "c", 7), *parts[3];
    pd_embedding_opts embedding = { .weight = { .name = name, .init = pd_constant(0.5), .sparse = sparse } };
    pd_fc_opts fc = { .no_bias = true, .weight = embedding.weight };
    parts[0] = pd_embedding(net, a, 3, &embedding);
    parts[1] = pd_embedding(net, b, 3, shared ? &(pd_embedding_opts){ .weight.name = name } : &embedding);
    parts[2] = pd_fc(net, c, 3, &fc);
    *cost = pd_concat(net, parts, 3, NULL);
    *cost = pd_sum_cost(net, pd_multiply(net, *cost, *cost, NULL), NULL);
    if (!*cost) fail_msg("%s", pd_error(net));
    return net;
}

static void test_shared_table(void **state) {
    (void)state;
    for (int sparse = 0; sparse < 2; sparse++) {
        pd_layer *cost[2];
        pd_net *nets[2] = { three_readers(true, sparse != 0, &cost[0]), three_readers(false, sparse != 0, &cost[1]) };
        pd_real sum[21] = { 0 }, g[21];
        pd_param *table = pd_param_find(nets[0], "table");
        assert_ptr_equal(table, pd_param_first(nets[0]));
        assert_null(table->next);
        for (int i = 0; i < 2; i++) {
            pd_batch *batch = pd_batch_new(nets[i]);
            random_seed(5);
            for (int k = 0; k < 4; k++) add_sample(batch, 1);
            assert_int_equal(pd_forward(nets[i], batch, PD_TRAIN, &cost[i], 1), PD_OK);
            assert_int_equal(pd_backward(nets[i], cost[i]), PD_OK);
            pd_batch_free(batch);
        }
        for (pd_param *p = pd_param_first(nets[1]); p; p = p->next) {
            assert_int_equal(pd_param_get_grad(p, g, 21), PD_OK);
            for (int i = 0; i < 21; i++) sum[i] += g[i];
        }
        assert_int_equal(pd_param_get_grad(table, g, 21), PD_OK);
        for (int i = 0; i < 21; i++) check_near((double)g[i], (double)sum[i], REAL_TOLERANCE, "shared table");
        for (int i = 0; i < 2; i++) pd_net_free(nets[i]);
    }
}

/* A layer that makes ids of numbers. */
static int64_t made_ids[8];
static pd_status round_setup(pd_layer *l) {
    l->shape = (pd_shape){ 5, 1, 1 };
    l->is_ids = true;
    return PD_OK;
}
static pd_status round_forward(pd_layer *l) {
    for (int64_t r = 0; r < l->out.rows; r++) made_ids[r] = (int64_t)l->inputs[0]->out.data[r];
    l->out.ids = made_ids;
    return PD_OK;
}
static const pd_layer_type round_type = { PD_API_VERSION, "round",       1,    1,    0,    0,    0, round_setup,
                                          NULL,           round_forward, NULL, NULL, NULL, NULL, -1 };

/* Ids need not be an input of the net, except for sparse tables, and are checked. */
static void test_ids_of_a_layer(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 1), *ids = pd_layer_add(net, &round_type, "ids", &x, 1, NULL);
    pd_layer *y = pd_embedding(net, ids, 2, &(pd_embedding_opts){ .name = "words" });
    pd_layer *cost = pd_sum_cost(net, y, NULL);
    pd_batch *batch = pd_batch_new(net);
    pd_real g[10];
    (void)state;
    for (int i = 0; i < 3; i++) {
        *pd_batch_add_row(batch, 0) = i == 1 ? 4 : 0;
        pd_batch_end_sample(batch);
    }
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &cost, 1), PD_OK);
    assert_int_equal(pd_backward(net, cost), PD_OK);
    pd_param_get_grad(pd_param_first(net), g, 10);
    for (int i = 0; i < 10; i++) assert_true(g[i] == (i < 2 ? 2 : i < 8 ? 0 : 1));
    for (int wrong = -1; wrong < 6; wrong += 6) {
        batch->slots[0].data[2] = (pd_real)wrong;
        assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_E_FORMAT);
        check_contains(pd_error(net),
                       wrong < 0 ? "words: row 2 of \"ids\": expected an id below 5, got -1" : "below 5, got 5");
    }
    pd_batch_free(batch);
    assert_null(pd_embedding(net, ids, 2, &(pd_embedding_opts){ .weight.sparse = true }));
    assert_string_equal(pd_error(net), "embedding2: parameter \"embedding2.weight\" is sparse, but \"ids\" is not an "
                                       "input of ids or sparse rows");
    pd_net_free(net);
}

/* Deviation 1/sqrt(size), other numbers for other seeds. */
static void test_initial_values(void **state) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 3 });
    pd_layer *ids = pd_ids(net, "ids", 1000);
    pd_param *table;
    double squares = 0;
    (void)state;
    pd_embedding(net, ids, 16, NULL);
    table = pd_param_first(net);
    assert_string_equal(table->name, "embedding1.weight");
    for (int64_t i = 0; i < table->size; i++) squares += (double)table->value[i] * (double)table->value[i];
    check_near(squares / (double)table->size, 1.0 / 16, 2e-3, "variance");
    pd_net_free(net);
}

/* The forget gate's bias begins at 1 or what is asked for, on top of its own initial value; loaded values are as they
   are, and a shared bias is added to once. */
static void test_forget_bias(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", 2));
    const pd_param_opts three = { .name = "three", .init = pd_constant(3) };
    const double wanted[][2] = { { 0, 1 }, { 0, 0 }, { 3, 5.5 } };
    pd_lstm_opts o = { .recurrent = { .name = "recurrent", .init = pd_constant(0.1) } };
    (void)state;
    pd_lstm(net, x, 700, &o);
    o.forget_bias = PD_ZERO;
    pd_lstm(net, x, 700, &o);
    o.forget_bias = 2.5;
    o.bias = three;
    for (int i = 0; i < 2; i++) pd_lstm(net, x, 700, &o);
    for (int k = 0; k < 3; k++) {
        const char *names[] = { "lstm1.bias", "lstm2.bias", "three" };
        const pd_param *bias = pd_param_find(net, names[k]);
        assert_int_equal(bias->size, 2800);
        for (int i = 0; i < 2800; i++) assert_true(bias->value[i] == (pd_real)wanted[k][i >= 700 && i < 1400]);
    }
    pd_net_free(net);
}

/* A step on a batch of a size seen before takes no memory. */
static void test_steady_memory(void **state) {
    (void)state;
    FOR_SEEDS(CASES, c, seed) {
        failing_allocator f = { 0, -1, 0 };
        problem p = { .c = c, .seed = seed, .sparse = c < cases + TABLES };
        int64_t calls;
        p.allocator = (pd_allocator){ failing_alloc, failing_free, &f };
        make(&p);
        backward(&p, p.batch);
        calls = f.calls;
        for (int again = 0; again < 2; again++) {
            backward(&p, p.batch);
            pd_zero_grads(p.net);
        }
        if (f.calls != calls) FAIL_AT(&p, "%lld allocations in a step", (long long)(f.calls - calls));
        free_problem(&p);
        assert_int_equal(f.in_use, 0);
    }
}

/* ======================================================================================================== */
/* Misuse, lack of memory                                                                                    */

static struct {
    pd_net *net;
    pd_layer *vec, *vecs, *ids, *words, *rare, *rares;
} the;

static void begin(void) {
    pd_net *net = the.net = pd_net_new(NULL);
    the.vec = pd_vector(net, "vec", 6);
    the.vecs = pd_sequence(pd_vector(net, "vecs", 6));
    the.ids = pd_ids(net, "ids", 6);
    the.words = pd_sequence(pd_ids(net, "words", 6));
    the.rare = pd_sparse_vector(net, "rare", 6);
    the.rares = pd_sequence(pd_sparse_vector(net, "rares", 6));
    pd_embedding(net, the.ids, 9, &(pd_embedding_opts){ .weight = { .name = "table", .sparse = true } });
}

static void check_refused(int line, const pd_layer *layer, const char *message) {
    if (layer) fail_msg("line %d: was accepted, expected\n  %s", line, message);
    if (strcmp(pd_error(the.net), message) != 0)
        fail_msg("line %d: expected the message\n  %s\ngot\n  %s", line, message, pd_error(the.net));
    pd_net_free(the.net);
}
#define REFUSED(message, ...) (begin(), check_refused(__LINE__, (__VA_ARGS__), message))

static void test_refused(void **state) {
    const int64_t huge = INT64_MAX / 2;
    const pd_param_opts table = { .name = "table" }, sparse = { .sparse = true };
    (void)state;
    REFUSED("embedding: input 0 is NULL", pd_embedding(the.net, NULL, 3, NULL));
    REFUSED("embedding2: size is 0, expected at least 1", pd_embedding(the.net, the.ids, 0, NULL));
    REFUSED("embedding2: unknown activation 99", pd_embedding(the.net, the.ids, 3, &(pd_embedding_opts){ .act = 99 }));
    REFUSED("embedding2: input \"vec\" holds numbers, expected ids; pd_fc takes them",
            pd_embedding(the.net, the.vec, 3, NULL));
    REFUSED("embedding2: input \"rare\" holds sparse rows, expected ids; pd_fc takes them",
            pd_embedding(the.net, the.rare, 3, NULL));
    REFUSED("embedding2: parameter \"table\" is 6x9, but 6x3 is needed here",
            pd_embedding(the.net, the.ids, 3, &(pd_embedding_opts){ .weight = table }));
    REFUSED("embedding2: parameter \"embedding2.weight\" would have impossible dimensions",
            pd_embedding(the.net, the.ids, huge, NULL));

    REFUSED("fc1: input \"ids\" holds ids, expected numbers; pd_embedding makes them of ids",
            pd_fc(the.net, the.ids, 3, NULL));
    REFUSED("fc1: input \"ids\" holds ids, expected numbers; pd_embedding makes them of ids",
            pd_fc_sum(the.net, (pd_layer *[]){ the.rare, the.ids }, 2, 3, NULL));
    REFUSED("fc: input 1 is NULL", pd_fc_sum(the.net, (pd_layer *[]){ the.rare, NULL }, 2, 3, NULL));
    REFUSED("fc1: size is 0, expected at least 1", pd_fc(the.net, the.rare, 0, NULL));
    REFUSED("fc1: parameter \"fc1.weight\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_fc(the.net, the.vec, 3, &(pd_fc_opts){ .weight = sparse }));
    REFUSED("fc1: parameter \"fc1.bias\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_fc(the.net, the.rare, 3, &(pd_fc_opts){ .bias = sparse }));
    REFUSED("fc1: parameter \"fc1.weight1\" is sparse, but \"vec\" is not an input of ids or sparse rows",
            pd_fc_sum(the.net, (pd_layer *[]){ the.rare, the.vec }, 2, 3, &(pd_fc_opts){ .weight = sparse }));
    REFUSED("fc1: parameter \"table\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_fc(the.net, the.vec, 9, &(pd_fc_opts){ .weight = table }));

    REFUSED("gru: input 0 is NULL", pd_gru(the.net, NULL, 3, NULL));
    REFUSED("gru1: size is -1, expected at least 1", pd_gru(the.net, the.vecs, -1, NULL));
    REFUSED("gru1: input \"vec\" carries no sequences; pd_sequence makes a net's input carry them",
            pd_gru(the.net, the.vec, 3, NULL));
    REFUSED("gru1: input \"words\" holds ids, expected numbers", pd_gru(the.net, the.words, 3, NULL));
    REFUSED("gru: gru takes no sparse input such as \"rares\"; pd_fc does", pd_gru(the.net, the.rares, 3, NULL));
    REFUSED("gru1: size 4611686018427387903 is too large", pd_gru(the.net, the.vecs, huge, NULL));
    REFUSED("gru1: parameter \"table\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_gru(the.net, the.vecs, 3, &(pd_gru_opts){ .weight = table }));
    REFUSED("gru1: parameter \"gru1.recurrent\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_gru(the.net, the.vecs, 3, &(pd_gru_opts){ .recurrent = sparse }));

    REFUSED("attention: input 1 is NULL", pd_attention(the.net, the.vec, NULL, the.vecs, NULL));
    REFUSED("attention1: its keys, \"vec\", carry no sequences",
            pd_attention(the.net, the.vecs, the.vec, the.vecs, NULL));
    REFUSED("attention1: its values, \"vec\", carry no sequences",
            pd_attention(the.net, the.vec, the.vecs, the.vec, NULL));
    REFUSED("attention1: input \"words\" holds ids, expected numbers",
            pd_attention(the.net, the.vec, the.words, the.vecs, NULL));
    REFUSED("attention1: its query, \"other\", has 7 numbers per row, but its keys, \"vecs\", 6",
            pd_attention(the.net, pd_vector(the.net, "other", 7), the.vecs, the.vecs, NULL));
    REFUSED(
        "attention1: parameter \"attention1.weight\" can't be sparse: that is for tables read by ids or sparse inputs",
        pd_attention(the.net, the.vec, the.vecs, the.vecs, &(pd_attention_opts){ .weight = sparse }));
    REFUSED("gru1: first state \"vec\" is 6, expected 3 numbers",
            pd_gru(the.net, the.vecs, 3, &(pd_gru_opts){ .first = the.vec }));
    REFUSED("gru1: first state \"vecs\" carries sequences, expected one row for each of \"vecs\"",
            pd_gru(the.net, the.vecs, 6, &(pd_gru_opts){ .first = the.vecs }));
    REFUSED("gru1: input \"ids\" holds ids, expected numbers",
            pd_gru(the.net, the.vecs, 1, &(pd_gru_opts){ .first = the.ids }));
    REFUSED("gru: gru takes no sparse input such as \"rare\"; pd_fc does",
            pd_gru(the.net, the.vecs, 6, &(pd_gru_opts){ .first = the.rare }));

    REFUSED("lstm: input 0 is NULL", pd_lstm(the.net, NULL, 3, NULL));
    REFUSED("lstm1: size is 0, expected at least 1", pd_lstm(the.net, the.vecs, 0, NULL));
    REFUSED("lstm1: input \"vec\" carries no sequences; pd_sequence makes a net's input carry them",
            pd_lstm(the.net, the.vec, 3, NULL));
    REFUSED("lstm1: input \"words\" holds ids, expected numbers", pd_lstm(the.net, the.words, 3, NULL));
    REFUSED("lstm: lstm takes no sparse input such as \"rares\"; pd_fc does", pd_lstm(the.net, the.rares, 3, NULL));
    REFUSED("lstm1: size 4611686018427387903 is too large", pd_lstm(the.net, the.vecs, huge, NULL));
    REFUSED("lstm1: forget_bias is inf, expected a finite number",
            pd_lstm(the.net, the.vecs, 3, &(pd_lstm_opts){ .forget_bias = HUGE_VAL }));
    REFUSED("lstm1: first state \"vec\" is 6, expected 3 numbers",
            pd_lstm(the.net, the.vecs, 3, &(pd_lstm_opts){ .first = the.vec }));
    REFUSED("lstm1: first state \"vec\" is 6, expected 3 numbers",
            pd_lstm(the.net, the.vecs, 3, &(pd_lstm_opts){ .first_cell = the.vec }));
    REFUSED("lstm1: first state \"vecs\" carries sequences, expected one row for each of \"vecs\"",
            pd_lstm(the.net, the.vecs, 6, &(pd_lstm_opts){ .first = the.vec, .first_cell = the.vecs }));
    REFUSED("lstm1: input \"ids\" holds ids, expected numbers",
            pd_lstm(the.net, the.vecs, 1, &(pd_lstm_opts){ .first_cell = the.ids }));
    REFUSED("lstm1: parameter \"table\" is 6x9, but 3x3 is needed here",
            pd_lstm(the.net, the.vecs, 3, &(pd_lstm_opts){ .peepholes = true, .peephole = table }));
    REFUSED("lstm1: parameter \"lstm1.recurrent\" can't be sparse: that is for tables read by ids or sparse inputs",
            pd_lstm(the.net, the.vecs, 3, &(pd_lstm_opts){ .recurrent = sparse }));

    REFUSED("sequence_pool: input 0 is NULL", pd_sequence_pool(the.net, NULL, PD_SUM, NULL));
    REFUSED("sequence_pool1: input \"vec\" carries no sequences; pd_sequence makes a net's input carry them",
            pd_sequence_pool(the.net, the.vec, PD_MAX, NULL));
    REFUSED("sequence_pool1: input \"words\" holds ids, expected numbers",
            pd_sequence_pool(the.net, the.words, PD_LAST, NULL));
    REFUSED("sequence_pool: sequence_pool takes no sparse input such as \"rares\"; pd_fc does",
            pd_sequence_pool(the.net, the.rares, PD_SUM, NULL));
    REFUSED("sequence_pool1: unknown method 6", pd_sequence_pool(the.net, the.vecs, (pd_pool_method)6, NULL));
    REFUSED("sequence_pool1: unknown method -1", pd_sequence_pool(the.net, the.vecs, (pd_pool_method)-1, NULL));

    REFUSED("pool1: PD_LAST is a method of pd_sequence_pool, not of pd_pool",
            pd_pool(the.net, the.vec, 1, &(pd_pool_opts){ .method = PD_LAST }));
    REFUSED("pool1: PD_FIRST is a method of pd_sequence_pool, not of pd_pool",
            pd_pool(the.net, the.vecs, 1, &(pd_pool_opts){ .method = PD_FIRST }));
}

/* ---- inputs that are combined row by row have the same rows in the same samples ---- */

typedef struct pair {
    pd_layer *a, *b;
} pair;

static pd_layer *add_of(pd_net *net, pair p) { return pd_add(net, &p.a, 2, NULL); }
static pd_layer *concat_of(pd_net *net, pair p) { return pd_concat(net, &p.a, 2, NULL); }
static pd_layer *fc_of(pd_net *net, pair p) { return pd_fc_sum(net, &p.a, 2, 3, NULL); }
static pd_layer *multiply_of(pd_net *net, pair p) { return pd_multiply(net, p.a, p.b, NULL); }
static pd_layer *scale_of(pd_net *net, pair p) { return pd_scale(net, p.a, p.b, NULL); }
static pd_layer *interpolate_of(pd_net *net, pair p) { return pd_interpolate(net, p.a, p.a, p.b, NULL); }
static pd_layer *cosine_of(pd_net *net, pair p) { return pd_cosine(net, p.a, p.b, 1, NULL); }
static pd_layer *outer_of(pd_net *net, pair p) { return pd_outer(net, p.a, p.b, NULL); }
static pd_layer *bilinear_of(pd_net *net, pair p) { return pd_bilinear(net, p.a, p.b, 2, NULL); }
static pd_layer *cross_entropy_of(pd_net *net, pair p) { return pd_cross_entropy(net, p.a, p.b, NULL); }
static pd_layer *bernoulli_of(pd_net *net, pair p) { return pd_binary_cross_entropy(net, p.a, p.b, NULL); }
static pd_layer *squared_of(pd_net *net, pair p) { return pd_squared_error(net, p.a, p.b, NULL); }
static pd_layer *huber_of(pd_net *net, pair p) { return pd_huber(net, p.a, p.b, NULL); }
static pd_layer *smooth_of(pd_net *net, pair p) { return pd_smooth_l1(net, p.a, p.b, NULL); }
static pd_layer *rank_of(pd_net *net, pair p) { return pd_rank_cost(net, p.a, p.a, p.b, NULL); }
static pd_layer *lambda_of(pd_net *net, pair p) { return pd_lambda_rank(net, p.a, p.b, NULL); }
static pd_layer *weighed_of(pd_net *net, pair p) { return pd_sum_cost(net, p.a, &(pd_cost_opts){ .weight = p.b }); }

typedef pd_layer *(*combination)(pd_net *net, pair p);
static const combination combinations[] = { add_of,         concat_of,  fc_of,    multiply_of, scale_of,
                                            interpolate_of, cosine_of,  outer_of, bilinear_of, cross_entropy_of,
                                            bernoulli_of,   squared_of, huber_of, smooth_of,   rank_of,
                                            lambda_of,      weighed_of };

/* `kinds` has a bit for each of the two that carries sequences. */
static pair two_inputs(pd_net *net, int kinds) {
    pair p;
    p.a = input(pd_vector(net, "a", 1), kinds & 1);
    p.b = input(pd_vector(net, "b", 1), kinds & 2);
    return p;
}

/* Samples of so many rows in the two slots. */
static pd_batch *two_lengths(pd_net *net, const int (*lengths)[2], int samples) {
    pd_batch *batch = pd_batch_new(net);
    for (int i = 0; i < samples; i++) {
        for (int slot = 0; slot < 2; slot++)
            for (int r = 0; r < lengths[i][slot]; r++) *pd_batch_add_row(batch, slot) = 1;
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

static void check_lengths(combination c, const int (*lengths)[2], int samples, const char *message) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *y = c(net, two_inputs(net, 3));
    pd_batch *batch = two_lengths(net, lengths, samples);
    pd_status status = pd_forward(net, batch, PD_PREDICT, &y, 1);
    assert_int_equal(status, message ? PD_E_SHAPE : PD_OK);
    if (message) {
        assert_null(pd_output(y, NULL, NULL)); /* which leaves the reason */
        check_contains(pd_error(net), message);
    }
    pd_batch_free(batch);
    pd_net_free(net);
}

static void test_lengths_that_do_not_fit(void **state) {
    static const int equal[][2] = { { 2, 2 }, { 0, 0 }, { 1, 1 } }, empty[][2] = { { 0, 0 } };
    static const int shared_out[][2] = { { 1, 1 }, { 2, 1 }, { 1, 2 } },
                     shorter[][2] = { { 2, 2 }, { 0, 0 }, { 3, 2 } };
    (void)state;
    for (int c = 0; c < COUNT(combinations); c++) {
        check_lengths(combinations[c], equal, 3, NULL);
        check_lengths(combinations[c], empty, 1, NULL);
        check_lengths(combinations[c], empty, 0, NULL);
        check_lengths(combinations[c], shared_out, 3, ": sample 1 of \"b\" has 1 rows, but that of \"a\" has 2");
        check_lengths(combinations[c], shorter, 3, ": sample 2 of \"b\" has 2 rows, but that of \"a\" has 3");
    }
}

static pd_layer *keys_of(pd_net *net, pair p) { return pd_attention(net, p.a, p.b, p.b, NULL); }
static pd_layer *values_of(pd_net *net, pair p) { return pd_attention(net, p.a, p.a, p.b, NULL); }

/* A layer that drops the last row. */
static pd_status drop_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    return PD_OK;
}
static pd_status drop_resize(pd_layer *l) {
    l->out.rows--;
    return PD_OK;
}
static pd_status drop_forward(pd_layer *l) {
    for (int64_t r = 0; r < l->out.rows; r++) l->out.data[r] = l->inputs[0]->out.data[r];
    return PD_OK;
}
static const pd_layer_type drop_type = { PD_API_VERSION, "drop",       1,    1,    0,    0,    0, drop_setup,
                                         drop_resize,    drop_forward, NULL, NULL, NULL, NULL, 0 };

/* Queries and keys may have other lengths, keys and values not. */
static void test_lengths_of_attention(void **state) {
    static const int lengths[][2] = { { 2, 2 }, { 0, 1 }, { 1, 0 } };
    pd_net *net = pd_net_new(NULL);
    pair p = two_inputs(net, 2);
    pd_layer *y = keys_of(net, p);
    pd_batch *batch = two_lengths(net, &(const int[2]){ 1, 3 }, 1);
    (void)state;
    check_lengths(keys_of, lengths, 3, NULL);
    check_lengths(values_of, lengths, 3, "attention1: sample 1 of \"b\" has 1 rows, but that of \"a\" has 0");
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_OK);
    p.a = pd_layer_add(net, &drop_type, "fewer", &p.a, 1, NULL);
    y = keys_of(net, p);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_E_SHAPE);
    assert_string_equal(pd_error(net), "attention2: \"fewer\" has 0 rows, but \"b\" has 1 sequences");
    pd_batch_free(batch);
    pd_net_free(net);
}

static void test_sequences_and_rows(void **state) {
    (void)state;
    for (int c = 0; c < COUNT(combinations); c++)
        for (int kinds = 1; kinds <= 2; kinds++) {
            pd_net *net = pd_net_new(NULL);
            assert_null(combinations[c](net, two_inputs(net, kinds)));
            check_contains(pd_error(net), kinds == 1
                                              ? ": input \"b\" has one row per sample, but \"a\" carries sequences"
                                              : ": input \"b\" carries sequences, but \"a\" has one row per sample");
            pd_net_free(net);
        }
}

/* Half as many rows as the input. */
static pd_status half_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    return PD_OK;
}
static pd_status half_resize(pd_layer *l) {
    l->out.rows /= 2;
    return PD_OK;
}
static pd_status half_forward(pd_layer *l) {
    memcpy(l->out.data, l->inputs[0]->out.data, (size_t)(l->out.rows * l->out.width) * sizeof(pd_real));
    return PD_OK;
}
static const pd_layer_type half_type = { PD_API_VERSION, "half",       1,    1,    0,    0,    0, half_setup,
                                         half_resize,    half_forward, NULL, NULL, NULL, NULL, 0 };

/* As many first states as sequences. */
static void test_rows_of_first(void **state) {
    static const int lengths[][2] = { { 1, 1 }, { 2, 1 }, { 0, 1 }, { 3, 1 } };
    pd_net *net = pd_net_new(NULL);
    pair p = two_inputs(net, 1);
    pd_layer *half = pd_layer_add(net, &half_type, "half", &p.b, 1, NULL);
    pd_layer *gru = pd_gru(net, p.a, 1, &(pd_gru_opts){ .first = half });
    pd_layer *lstm = pd_lstm(net, p.a, 1, &(pd_lstm_opts){ .first = p.b, .first_cell = half });
    pd_batch *batch = two_lengths(net, lengths, 4), *none = two_lengths(net, lengths, 0);
    (void)state;
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &gru, 1), PD_E_SHAPE);
    assert_string_equal(pd_error(net), "gru1: first state \"half\" has 2 rows, but \"a\" has 4 sequences");
    assert_int_equal(pd_forward(net, none, PD_PREDICT, &gru, 1), PD_OK);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &lstm, 1), PD_E_SHAPE);
    assert_string_equal(pd_error(net), "lstm1: first state \"half\" has 2 rows, but \"a\" has 4 sequences");
    pd_batch_free(batch);
    pd_batch_free(none);
    pd_net_free(net);
}

/* Evaluators too, each of their inputs. */
static void test_evaluated_rows(void **state) {
    static const int lengths[][2] = { { 1, 1 }, { 2, 1 }, { 1, 2 } };
    (void)state;
    for (int k = 0; k < 4; k++) {
        pd_evaluator_opts o = { .name = "e" };
        pd_net *net = pd_net_new(NULL);
        pair p = two_inputs(net, k < 2 ? 3 : 1);
        pd_layer *cost = pd_sum_cost(net, p.a, NULL), *other = pd_sum_cost(net, p.b, NULL), *costs[2];
        pd_batch *batch = two_lengths(net, lengths, k < 2 ? 3 : 1);
        if (k % 2) o.weight = p.b;
        costs[0] = cost, costs[1] = other;
        if (k >= 2) {
            assert_null(pd_eval_mean_error(net, p.a, k % 2 ? p.a : p.b, &o));
            check_contains(pd_error(net),
                           k % 2 ? "e: its weight, \"b\", has one row per sample, but \"a\" carries sequences"
                                 : "e: its label, \"b\", has one row per sample, but \"a\" carries sequences");
        } else {
            assert_non_null(pd_eval_mean_error(net, p.a, k % 2 ? p.a : p.b, &o));
            assert_int_equal(pd_forward(net, batch, PD_PREDICT, costs, 2), PD_OK);
            assert_int_equal(inside_evaluators_update(net), PD_E_SHAPE);
            assert_string_equal(pd_error(net), "e: sample 1 of \"b\" has 1 rows, but that of \"a\" has 2");
        }
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* All layers in one net, built, run forward and back twice, shared; every allocation fails once. */
static pd_status use_all(pd_net *net, pd_failure *failure) {
    pd_layer *words = pd_sequence(pd_ids(net, "words", 9)), *rare = pd_sparse_vector(net, "rare", 9), *pools[3], *cost;
    pd_layer *x = pd_embedding(net, words, 3, &(pd_embedding_opts){ .weight.sparse = true });
    pd_layer *first = pd_fc(net, rare, 3, NULL);
    pd_layer *h = pd_gru(net, x, 3, &(pd_gru_opts){ .reverse = true, .first = first });
    pd_batch *batch = pd_batch_new(net);
    pd_status status;
    h = pd_lstm(net, h, 3, &(pd_lstm_opts){ .first_cell = first, .cells = true, .peepholes = true });
    pools[0] = pd_sequence_pool(net, h, PD_MAX, NULL);
    pools[1] = pd_sequence_pool(net, h, PD_SQRT_N, NULL);
    pools[2] = pd_fc(net, rare, 3, &(pd_fc_opts){ .weight.sparse = true });
    pools[2] = pd_attention(net, pools[2], x, h, NULL);
    cost = pd_sum_cost(net, pd_concat(net, pools, 3, NULL), NULL);
    status = cost && batch ? PD_OK : pd_error_status(net);
    for (int i = 0; i < 12 && status == PD_OK; i++) {
        const int64_t columns[2] = { i % 9, (i + 4) % 9 };
        const pd_real values[2] = { 1, 2 };
        for (int k = 0; k < i && status == PD_OK; k++) status = pd_batch_add_id(batch, 0, (i + k) % 9);
        if (status == PD_OK) status = pd_batch_add_sparse(batch, 1, columns, i > 3 ? values : NULL, 2);
        if (status == PD_OK) status = pd_batch_end_sample(batch);
        if (status == PD_OK && i % 4 == 1) status = pd_forward(net, batch, PD_TRAIN, &cost, 1);
        if (status == PD_OK && i % 4 == 1) status = pd_backward(net, cost);
    }
    snprintf(failure->text, sizeof failure->text, "%s",
             batch && batch->error.status ? batch->error.text : pd_error(net));
    pd_batch_free(batch);
    return status;
}

static void test_no_memory(void **state) {
    bool failed = true;
    (void)state;
    for (int64_t fail_at = 0; failed; fail_at++) {
        failing_allocator f = { 0, fail_at, 0 };
        pd_net *net = pd_net_new(&(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f } });
        pd_failure failure = { PD_OK, "out of memory" };
        pd_status status = net ? use_all(net, &failure) : PD_E_MEMORY;
        failed = f.calls > fail_at;
        if (failed ? status != PD_E_MEMORY || !strstr(failure.text, "out of memory") : status != PD_OK)
            fail_msg("status %d, message \"%s\" without allocation %lld", (int)status, failure.text,
                     (long long)fail_at);
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_gradients_of_many_users),
        cmocka_unit_test(test_sparse_is_dense),
        cmocka_unit_test(test_time_orders),
        cmocka_unit_test(test_ties),
        cmocka_unit_test(test_attention_of_what_learns),
        cmocka_unit_test(test_attention_in_parts),
        cmocka_unit_test(test_attention_weights),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_empty),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_far_device),
        cmocka_unit_test(test_shared_net),
        cmocka_unit_test(test_shared_table),
        cmocka_unit_test(test_ids_of_a_layer),
        cmocka_unit_test(test_initial_values),
        cmocka_unit_test(test_forget_bias),
        cmocka_unit_test(test_steady_memory),
        cmocka_unit_test(test_lengths_that_do_not_fit),
        cmocka_unit_test(test_lengths_of_attention),
        cmocka_unit_test(test_sequences_and_rows),
        cmocka_unit_test(test_rows_of_first),
        cmocka_unit_test(test_evaluated_rows),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_no_memory),
    };
    return run_group(tests, NULL, NULL);
}
