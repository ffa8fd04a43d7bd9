/* Sparse inputs and sparse parameters. The oracle is the same net with dense gradients: what lags behind and is caught up
   later must end where stepping on every row in every batch ends. */
#define _GNU_SOURCE /* memmem */
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <pthread.h>
#include <unistd.h>
#include <cmocka.h>

#include "far_device.h"
#include "support.h"

/* Values differ by rounding: the dense run rounds a row that nothing touches once per step, the sparse one once in all. */
#define CLOSE (sizeof(pd_real) == 8 ? 1e-12 : 1e-5)

/* ---- two nets that differ in `sparse` only ---- */

typedef struct model {
    pd_net *net;
    pd_layer *words, *features, *label, *cost, *output;
    pd_trainer *trainer;
    pd_batch *batch;
} model;

/* words (sequences of ids) -> embedding -> average; features (sparse rows) -> fc; both -> fc -> cross-entropy. The table
   is used twice. */
static model build(bool sparse, int64_t height, pd_optimizer optimizer, const pd_trainer_opts *opts,
                   const pd_net_opts *net_opts) {
    model m;
    pd_embedding_opts table = { .weight = { .name = "table", .sparse = sparse, .l2 = 0 } };
    pd_fc_opts wide = { .name = "wide", .weight = { .sparse = sparse, .rate_factor = 0.5 } };
    pd_layer *both[2];
    m.net = pd_net_new(net_opts);
    m.words = pd_sequence(pd_ids(m.net, "words", height));
    m.features = pd_sparse_vector(m.net, "features", height + 3);
    m.label = pd_label(m.net, "label", 3);
    table.name = "first";
    both[0] = pd_sequence_pool(m.net, pd_embedding(m.net, m.words, 4, &table), PD_AVERAGE, NULL);
    table.name = "second";
    both[1] = pd_sequence_pool(m.net, pd_embedding(m.net, m.words, 4, &table), PD_LAST, NULL);
    both[0] = pd_concat(m.net, both, 2, NULL);
    both[1] = pd_fc(m.net, m.features, 5, &wide);
    m.output = pd_fc_sum(m.net, both, 2, 3, &(pd_fc_opts){ .name = "out", .act = PD_SOFTMAX });
    m.cost = pd_cross_entropy(m.net, m.output, m.label, NULL);
    m.trainer = pd_trainer_new(m.net, m.cost, optimizer, opts);
    if (!m.trainer) fail_msg("%s", pd_error(m.net));
    m.batch = pd_batch_new(m.net);
    return m;
}

static void free_model(model *m) {
    pd_batch_free(m->batch);
    pd_trainer_free(m->trainer);
    pd_net_free(m->net);
}

/* A batch that follows from its number alone; small ids are frequent. */
static void fill(pd_batch *batch, int64_t height, uint64_t number) {
    random_seed(1000 + number);
    pd_batch_clear(batch);
    for (int64_t samples = 1 + below(5); samples > 0; samples--) {
        int64_t columns[4], length = below(4), entries = below(5);
        pd_real values[4];
        for (int64_t i = 0; i < length; i++)
            assert_int_equal(pd_batch_add_id(batch, 0, below(1 + below(height))), PD_OK);
        for (int64_t i = 0; i < entries; i++) {
            columns[i] = i * (height / 4) + below(height / 4);
            values[i] = (pd_real)uniform(-1, 1);
        }
        assert_int_equal(pd_batch_add_sparse(batch, 1, columns, below(2) ? values : NULL, entries), PD_OK);
        assert_int_equal(pd_batch_add_id(batch, 2, below(3)), PD_OK);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
}

static double step(model *m, int64_t height, uint64_t number) {
    double cost = 0;
    fill(m->batch, height, number);
    if (pd_train_batch(m->trainer, m->batch, &cost) != PD_OK) fail_msg("%s", pd_error(m->net));
    return cost;
}

static void check_values(model *a, model *b, double tolerance, const char *what) {
    for (pd_param *p = pd_param_first(a->net), *q = pd_param_first(b->net); p; p = p->next, q = q->next) {
        pd_real *x = (pd_real *)calloc((size_t)p->size, sizeof *x), *y = (pd_real *)calloc((size_t)p->size, sizeof *y);
        assert_int_equal(pd_param_get(p, x, p->size), PD_OK);
        assert_int_equal(pd_param_get(q, y, q->size), PD_OK);
        for (int64_t i = 0; i < p->size; i++)
            if (!(fabs((double)x[i] - (double)y[i]) <= tolerance * (1 + fabs((double)y[i]))))
                fail_msg("%s: %s[%lld] is %.9g, expected %.9g", what, p->name, (long long)i, (double)x[i],
                         (double)y[i]);
        free(x);
        free(y);
    }
}

/* ---- equal to dense ---- */

typedef struct method {
    const char *name;
    pd_optimizer optimizer;
    pd_trainer_opts opts;
} method;

static int method_list(method *list) {
    const pd_schedule fall = { .kind = PD_SCHEDULE_EXP, .a = 0.7, .b = 100 };
    int n = 0;
    list[n++] = (method){ "sgd", pd_sgd(0.1), { .l2 = 0 } };
    list[n++] = (method){ "sgd, l2", pd_sgd(0.1), { .l2 = 0.03 } };
    list[n++] = (method){ "momentum", pd_momentum(0.1, 0.9), { .l2 = 0 } };
    list[n++] = (method){ "momentum 0", pd_momentum(0.1, 0), { .l2 = 0.1 } };
    list[n++] = (method){ "momentum, l2", pd_momentum(0.1, 0.9), { .l2 = 0.03 } };
    list[n++] = (method){ "momentum 0.99, l2, schedule", pd_momentum(0.05, 0.99), { .l2 = 0.01, .schedule = fall } };
    list[n++] = (method){ "nesterov, l2, schedule", pd_nesterov(0.1, 0.8), { .l2 = 0.03, .schedule = fall } };
    list[n++] = (method){ "clip", pd_momentum(0.1, 0.9), { .l2 = 0.03, .clip_value = 0.02 } };
    list[n++] = (method){ "clip_norm", pd_momentum(0.1, 0.9), { .l2 = 0.03, .clip_norm = 0.1 } };
    list[n++] = (method){ "sum", pd_momentum(0.05, 0.5), { .sum_gradients = true, .l2 = 0.01 } };
    return n;
}

/* After every step the costs agree, so what is read is current; in between and at the end so does every row. */
static void test_equals_dense(void **state) {
    method methods[16];
    int count = method_list(methods);
    (void)state;
    for (int k = 0; k < count; k++)
        for (int64_t height = 8; height <= 200; height += 192) {
            model sparse = build(true, height, methods[k].optimizer, &methods[k].opts, NULL);
            model dense = build(false, height, methods[k].optimizer, &methods[k].opts, NULL);
            for (uint64_t i = 0; i < 60; i++) {
                check_near(step(&sparse, height, i), step(&dense, height, i), 10 * CLOSE, methods[k].name);
                if (i % 25 == 10) check_values(&sparse, &dense, CLOSE, methods[k].name);
            }
            check_values(&sparse, &dense, CLOSE, methods[k].name);
            free_model(&sparse);
            free_model(&dense);
        }
}

/* The reference's case: one gradient, then nothing for long; the momentum's tail must arrive all the same. */
static void test_tail(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *id = pd_ids(net, "id", 3000);
    pd_layer *row =
        pd_embedding(net, id, 1, &(pd_embedding_opts){ .weight = { .sparse = true, .init = pd_constant(1) } });
    pd_trainer *trainer = pd_trainer_new(net, pd_sum_cost(net, row, NULL), pd_momentum(0.1, 0.9), NULL);
    pd_batch *batch = pd_batch_new(net);
    pd_real *values = (pd_real *)calloc(3000, sizeof *values);
    (void)state;
    for (int i = 0; i < 2500; i++) { /* beyond the window */
        pd_batch_clear(batch);
        pd_batch_add_id(batch, 0, i == 5 ? 7 : 8 + i);
        pd_batch_end_sample(batch);
        assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_OK);
    }
    assert_int_equal(pd_param_get(pd_param_first(net), values, 3000), PD_OK);
    check_near((double)values[7], 0, 1e-6, "the row with one gradient");
    check_near((double)values[9], 0, 1e-6, "another");
    assert_true(values[0] == 1);
    check_near((double)values[8 + 2499], 0.9, 1e-6, "the last one");
    check_near((double)values[8 + 2498], 1 - 0.1 - 0.09, 1e-6, "the one before");
    free(values);
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

/* A long run with rows that come back after any time, over several rounds of the table. */
static void test_long_run(void **state) {
    const pd_schedule fall = { .kind = PD_SCHEDULE_POLY, .a = 0.001, .b = 0.5 };
    pd_trainer_opts opts = { .l2 = 0.001, .schedule = fall };
    model sparse = build(true, 40, pd_momentum(0.02, 0.95), &opts, NULL);
    model dense = build(false, 40, pd_momentum(0.02, 0.95), &opts, NULL);
    (void)state;
    for (uint64_t i = 0; i < 2600; i++) {
        step(&sparse, 40, i % 7 ? i % 3 : i);
        step(&dense, 40, i % 7 ? i % 3 : i);
    }
    check_values(&sparse, &dense, 20 * CLOSE, "long run");
    free_model(&sparse);
    free_model(&dense);
}

static void test_gradient_equals_dense(void **state) {
    model sparse = build(true, 30, pd_sgd(0.1), NULL, NULL), dense = build(false, 30, pd_sgd(0.1), NULL, NULL);
    (void)state;
    pd_zero_grads(sparse.net);
    pd_zero_grads(dense.net);
    for (uint64_t i = 0; i < 5; i++) { /* added up over batches */
        model *both[2] = { &sparse, &dense };
        for (int k = 0; k < 2; k++) {
            fill(both[k]->batch, 30, i);
            assert_int_equal(pd_forward(both[k]->net, both[k]->batch, PD_TRAIN, &both[k]->cost, 1), PD_OK);
            assert_int_equal(pd_backward(both[k]->net, both[k]->cost), PD_OK);
            fill(both[k]->batch, 30, 50 + i); /* a prediction in between has nothing to do with it */
            assert_int_equal(pd_forward(both[k]->net, both[k]->batch, PD_PREDICT, &both[k]->output, 1), PD_OK);
        }
        for (pd_param *p = pd_param_first(sparse.net), *q = pd_param_first(dense.net); p; p = p->next, q = q->next) {
            pd_real x[400], y[400];
            assert_int_equal(pd_param_get_grad(p, x, p->size), PD_OK);
            assert_int_equal(pd_param_get_grad(q, y, q->size), PD_OK);
            for (int64_t j = 0; j < p->size; j++) check_near((double)x[j], (double)y[j], REAL_TOLERANCE, p->name);
            if (p->opts.sparse) assert_true(p->rows.count > 0 && p->rows.count < p->dims[0]);
        }
    }
    assert_int_equal(pd_zero_grads(sparse.net), PD_OK);
    assert_int_equal(pd_param_find(sparse.net, "table")->rows.count, 0);
    free_model(&sparse);
    free_model(&dense);
}

static void test_gradients(void **state) {
    (void)state;
    for (int sparse = 0; sparse < 2; sparse++) {
        model m = build(sparse, 20, pd_sgd(0.1), NULL, NULL);
        pd_gradcheck check;
        fill(m.batch, 20, 3);
        assert_int_equal(pd_check_gradients(m.cost, m.batch, NULL, &check), PD_OK);
        assert_false(check.all_zero);
        if (sizeof(pd_real) == 8 && !(check.error < 1e-6 && check.accumulation < 1e-12))
            fail_msg("%s: %g, %g", check.worst, check.error, check.accumulation);
        free_model(&m);
    }
}

/* ---- reading what lags: saving, predicting, sharing, a second trainer, a checkpoint ---- */

static void test_values_are_current(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    model sparse = build(true, 50, pd_momentum(0.1, 0.9), NULL, NULL);
    model dense = build(false, 50, pd_momentum(0.1, 0.9), NULL, NULL);
    model loaded = build(false, 50, pd_momentum(0.1, 0.9), NULL, NULL);
    pd_real x[50 * 4], y[50 * 4];
    pd_layer *twin;
    pd_net *shared;
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 30; i++) step(&sparse, 50, i), step(&dense, 50, i);
    assert_int_equal(pd_save(sparse.net, path), PD_OK);
    assert_int_equal(pd_load(loaded.net, path, NULL), PD_OK);
    check_values(&loaded, &dense, CLOSE, "saved");
    for (uint64_t i = 30; i < 40; i++) step(&sparse, 50, i), step(&dense, 50, i);
    shared = pd_net_share(sparse.net);
    twin = pd_layer_find(shared, sparse.output->name);
    fill(dense.batch, 50, 77);
    fill(sparse.batch, 50, 77);
    assert_int_equal(pd_forward(dense.net, dense.batch, PD_PREDICT, &dense.output, 1), PD_OK);
    assert_int_equal(pd_forward(shared, sparse.batch, PD_PREDICT, &twin, 1), PD_OK);
    for (int64_t i = 0; i < twin->out.rows * 3; i++)
        check_near((double)twin->out.data[i], (double)dense.output->out.data[i], 10 * CLOSE, "shared net");
    assert_int_equal(pd_param_get(pd_param_find(dense.net, "table"), x, COUNT(x)), PD_OK);
    assert_int_equal(pd_param_get(pd_layer_find(shared, "first")->params[0], y, COUNT(y)), PD_OK);
    for (int i = 0; i < COUNT(x); i++) check_near((double)y[i], (double)x[i], CLOSE, "a shared net's layer's table");
    pd_net_free(shared);
    for (uint64_t i = 40; i < 50; i++) step(&sparse, 50, i), step(&dense, 50, i);
    assert_int_equal(pd_forward(dense.net, dense.batch, PD_PREDICT, &dense.output, 1), PD_OK);
    assert_int_equal(pd_forward(sparse.net, sparse.batch, PD_PREDICT, &sparse.output, 1), PD_OK);
    for (int64_t i = 0; i < sparse.output->out.rows * 3; i++)
        check_near((double)sparse.output->out.data[i], (double)dense.output->out.data[i], 10 * CLOSE, "prediction");
    /* loading in the middle: momentum goes on from the new values, as in the dense net */
    assert_int_equal(pd_load(sparse.net, path, NULL), PD_OK);
    assert_int_equal(pd_load(dense.net, path, NULL), PD_OK);
    for (uint64_t i = 50; i < 60; i++) step(&sparse, 50, i), step(&dense, 50, i);
    check_values(&sparse, &dense, CLOSE, "trained on after loading");
    free_model(&sparse);
    free_model(&dense);
    free_model(&loaded);
    remove(path);
}

static void test_two_trainers(void **state) {
    model sparse = build(true, 30, pd_momentum(0.1, 0.9), NULL, NULL);
    model dense = build(false, 30, pd_momentum(0.1, 0.9), NULL, NULL);
    pd_trainer_opts opts = { .l2 = 0.1 };
    pd_trainer *second[2] = { pd_trainer_new(sparse.net, sparse.cost, pd_sgd(0.2), &opts),
                              pd_trainer_new(dense.net, dense.cost, pd_sgd(0.2), &opts) };
    (void)state;
    for (uint64_t i = 0; i < 40; i++) {
        step(&sparse, 30, i);
        step(&dense, 30, i);
        if (i % 3) continue;
        assert_int_equal(pd_train_batch(second[0], sparse.batch, NULL), PD_OK);
        assert_int_equal(pd_train_batch(second[1], dense.batch, NULL), PD_OK);
    }
    check_values(&sparse, &dense, CLOSE, "two trainers");
    pd_trainer_free(second[0]); /* what it has left for later is done first */
    pd_trainer_free(second[1]);
    step(&sparse, 30, 99);
    step(&dense, 30, 99);
    check_values(&sparse, &dense, CLOSE, "one trainer left");
    free_model(&sparse);
    free_model(&dense);
}

/* Zeroed between forward and backward, the gradient is that of the one backward. */
static void test_zeroed_in_between(void **state) {
    model m = build(true, 20, pd_sgd(0.1), NULL, NULL);
    pd_param *p = pd_param_find(m.net, "table");
    double squares = 0;
    pd_real grad[80], again[80];
    (void)state;
    fill(m.batch, 20, 3);
    assert_int_equal(pd_forward(m.net, m.batch, PD_TRAIN, &m.cost, 1), PD_OK);
    assert_int_equal(pd_zero_grads(m.net), PD_OK);
    assert_int_equal(pd_backward(m.net, m.cost), PD_OK);
    assert_int_equal(pd_param_get_grad(p, grad, 80), PD_OK);
    for (int i = 0; i < 80; i++) squares += (double)grad[i] * (double)grad[i];
    assert_true(squares > 0);
    fill(m.batch, 20, 4); /* and stays when other rows are named by a prediction */
    assert_int_equal(pd_forward(m.net, m.batch, PD_PREDICT, &m.output, 1), PD_OK);
    assert_int_equal(pd_param_get_grad(p, again, 80), PD_OK);
    assert_memory_equal(again, grad, sizeof grad);
    free_model(&m);
}

/* What one trainer has left for later is in the checkpoint of another, and a message outlives both. */
static void test_settled_by_others(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    model m = build(true, 30, pd_momentum(0.1, 0.9), NULL, NULL), loaded = build(true, 30, pd_sgd(0.2), NULL, NULL);
    model other;
    pd_trainer *second = pd_trainer_new(m.net, m.cost, pd_sgd(0.2), NULL);
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 10; i++) step(&m, 30, i);
    assert_int_equal(pd_checkpoint_save(second, path), PD_OK);
    assert_int_equal(pd_checkpoint_load(loaded.trainer, path), PD_OK);
    check_values(&loaded, &m, 0, "the checkpoint of another trainer");
    step(&m, 30, 11);
    other = m;
    other.trainer = second;
    step(&other, 30, 12); /* leaves values to be brought up to date */
    assert_int_equal(pd_backward(m.net, NULL), PD_E_STATE);
    pd_trainer_free(second);
    pd_trainer_free(m.trainer);
    m.trainer = NULL;
    check_contains(pd_error(m.net), "pd_backward");
    free_model(&m);
    free_model(&loaded);
    remove(path);
}

/* Nets over the same parameters predict in turn, with layers that are carried to the host. */
typedef struct predictor {
    pd_net *net;
    pd_layer *output;
    const pd_batch *batch;
    pd_real expected[64];
} predictor;

static void predict(predictor *p) {
    const pd_real *y;
    assert_int_equal(pd_forward(p->net, p->batch, PD_PREDICT, &p->output, 1), PD_OK);
    y = pd_output(p->output, NULL, NULL);
    assert_non_null(y);
    assert_memory_equal(y, p->expected, (size_t)p->output->out.rows * 3 * sizeof *y);
}

static void test_shared_on_a_far_device(void **state) {
    pd_net *host = pd_net_new(&(pd_net_opts){ .threads = 1 });
    far_device far = make_far(cpu_of(host), 0);
    predictor p[2];
    model m;
    (void)state;
    far.device.self = &far;
    m = build(true, 40, pd_momentum(0.1, 0.9), NULL, &(pd_net_opts){ .device = &far.device, .threads = 1 });
    for (uint64_t i = 0; i < 5; i++) step(&m, 40, i);
    fill(m.batch, 40, 7);
    assert_int_equal(pd_forward(m.net, m.batch, PD_PREDICT, &m.output, 1), PD_OK);
    for (int k = 0; k < 2; k++) {
        const pd_real *y = pd_output(m.output, NULL, NULL);
        memcpy(p[k].expected, y, (size_t)m.output->out.rows * 3 * sizeof *y);
    }
    for (int k = 0; k < 2; k++) {
        p[k].net = pd_net_share(m.net);
        p[k].output = pd_layer_find(p[k].net, m.output->name);
        p[k].batch = m.batch;
    }
    for (int i = 0; i < 6; i++) predict(&p[i % 2]);
    for (int k = 0; k < 2; k++) pd_net_free(p[k].net);
    free_model(&m);
    pd_net_free(host);
}

/* The rows of a batch are forgotten with the next prediction, or memory would grow. */
static void test_predicted_rows(void **state) {
    model m = build(true, 1000, pd_momentum(0.1, 0.9), NULL, NULL);
    pd_param *p = pd_param_find(m.net, "table");
    (void)state;
    for (uint64_t i = 0; i < 200; i++) {
        const pd_slot *words = &m.batch->slots[0];
        fill(m.batch, 1000, i);
        assert_int_equal(pd_forward(m.net, m.batch, PD_PREDICT, &m.output, 1), PD_OK);
        assert_true(p->rows.count <= words->rows);
        for (int64_t k = 0; k < words->rows; k++) {
            int64_t place = pd_param_place(p, words->ids[k]);
            assert_true(place >= 0 && place < p->rows.count && p->rows.ids[place] == words->ids[k]);
        }
        for (int64_t row = 0; row < 1000; row++) {
            bool named = false;
            for (int64_t k = 0; k < words->rows; k++) named = named || words->ids[k] == row;
            assert_int_equal(pd_param_place(p, row) >= 0, named);
        }
    }
    free_model(&m);
}

/* Nets that share a table of which rows lag, in threads of their own, each with other rows. */
static void *predict_often(void *argument) {
    predictor *p = (predictor *)argument;
    for (int i = 0; i < 20; i++) predict(p);
    return NULL;
}

static void test_shared_in_threads(void **state) {
    enum { THREADS = 3 };
    predictor p[THREADS];
    pthread_t threads[THREADS];
    pd_batch *batches[THREADS];
    model m = build(true, 40, pd_momentum(0.1, 0.9), NULL, &(pd_net_opts){ .threads = 1 });
    (void)state;
    for (uint64_t i = 0; i < 9; i++) step(&m, 40, i);
    for (int k = 0; k < THREADS; k++) {
        p[k].net = pd_net_share(m.net);
        p[k].output = pd_layer_find(p[k].net, m.output->name);
        p[k].batch = batches[k] = pd_batch_new(m.net);
        fill(batches[k], 40, 50 + (uint64_t)k);
        assert_int_equal(pd_forward(m.net, batches[k], PD_PREDICT, &m.output, 1), PD_OK);
        memcpy(p[k].expected, pd_output(m.output, NULL, NULL), (size_t)m.output->out.rows * 3 * sizeof(pd_real));
    }
    for (int k = 0; k < THREADS; k++) assert_int_equal(pthread_create(&threads[k], NULL, predict_often, &p[k]), 0);
    for (int k = 0; k < THREADS; k++) pthread_join(threads[k], NULL);
    for (int k = 0; k < THREADS; k++) pd_batch_free(batches[k]), pd_net_free(p[k].net);
    free_model(&m);
}

/* A dense trainer's checkpoint is one of a sparse one of which no row lags; the other way round only as a model. */
static void test_checkpoint(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    pd_trainer_opts opts = { .l2 = 0.01 };
    model a = build(true, 60, pd_momentum(0.1, 0.9), &opts, NULL),
          b = build(true, 60, pd_momentum(0.1, 0.9), &opts, NULL);
    model dense = build(false, 60, pd_momentum(0.1, 0.9), &opts, NULL);
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 25; i++) step(&a, 60, i), step(&dense, 60, i);
    assert_int_equal(pd_checkpoint_save(a.trainer, path), PD_OK);
    assert_int_equal(pd_checkpoint_load(dense.trainer, path), PD_E_FORMAT);
    check_contains(pd_error(dense.net), "this trainer has no place for tensor \"");
    assert_int_equal(pd_checkpoint_load(b.trainer, path), PD_OK);
    for (uint64_t i = 25; i < 50; i++) step(&a, 60, i), step(&b, 60, i), step(&dense, 60, i);
    check_values(&a, &b, 0, "resumed"); /* to the bit */
    check_values(&a, &dense, CLOSE, "trained densely");
    assert_int_equal(pd_checkpoint_save(dense.trainer, path), PD_OK);
    assert_int_equal(pd_checkpoint_load(b.trainer, path), PD_OK);
    for (uint64_t i = 50; i < 60; i++) step(&dense, 60, i), step(&b, 60, i);
    check_values(&b, &dense, CLOSE, "resumed sparsely");
    free_model(&a);
    free_model(&b);
    free_model(&dense);
    remove(path);
}

/* ---- reading changes nothing: stopping, saving, testing and predicting give the same bits as not doing so ---- */

enum { READ_HEIGHT = 60, READ_STEPS = 45 };

static void check_bits(model *a, model *b, const char *what) {
    for (pd_param *p = pd_param_first(a->net), *q = pd_param_first(b->net); p; p = p->next, q = q->next) {
        size_t bytes = (size_t)p->size * sizeof(pd_real);
        pd_real *x = (pd_real *)malloc(2 * bytes), *y = x + p->size;
        assert_int_equal(pd_param_get(p, x, p->size), PD_OK);
        assert_int_equal(pd_param_get(q, y, q->size), PD_OK);
        if (memcmp(x, y, bytes) != 0) fail_msg("%s: %s has other bits", what, p->name);
        free(x);
    }
}

/* A reader of `count` samples that follow from their number. Its arrays last as long as the program. */
static pd_reader *made_reader(pd_net *net, int64_t count) {
    static int64_t words[400], word_starts[101], columns[400], column_starts[101], labels[100];
    pd_array arrays[3] = { { .ids = words, .starts = word_starts },
                           { .ids = columns, .row_starts = column_starts },
                           { .ids = labels } };
    assert_true(count <= 100);
    random_seed(5);
    for (int64_t i = 0; i < 100; i++) {
        word_starts[i + 1] = word_starts[i] + below(4);
        for (int64_t k = word_starts[i]; k < word_starts[i + 1]; k++) words[k] = below(1 + below(READ_HEIGHT));
        column_starts[i + 1] = column_starts[i] + 2;
        columns[2 * i] = below(30);
        columns[2 * i + 1] = 30 + below(30);
        labels[i] = (words[word_starts[i]] + columns[2 * i]) % 3;
    }
    return pd_array_reader(net, count, arrays, 3);
}

/* Whatever reads parameters, one after the other by `number`. */
static void look(model *m, int number, const char *path) {
    pd_gradcheck check;
    double cost;
    pd_layer *twin;
    pd_net *shared;
    pd_reader *reader;
    pd_param *p = pd_param_find(m->net, "table");
    pd_real *values;
    switch (number) {
    case 0: assert_int_equal(pd_save(m->net, path), PD_OK); break;
    case 1:
        values = (pd_real *)malloc((size_t)p->size * sizeof *values);
        assert_int_equal(pd_param_get(p, values, p->size), PD_OK);
        free(values);
        break;
    case 2:
        reader = made_reader(m->net, 20);
        assert_int_equal(pd_test(m->trainer, reader, 6, &cost), PD_OK);
        pd_reader_free(reader);
        break;
    case 3: assert_int_equal(pd_checkpoint_save(m->trainer, path), PD_OK); break;
    case 4:
        fill(m->batch, READ_HEIGHT, 99);
        assert_int_equal(pd_forward(m->net, m->batch, PD_PREDICT, &m->output, 1), PD_OK);
        break;
    case 5:
        shared = pd_net_share(m->net);
        twin = pd_layer_find(shared, m->output->name);
        fill(m->batch, READ_HEIGHT, 98);
        assert_int_equal(pd_forward(shared, m->batch, PD_PREDICT, &twin, 1), PD_OK);
        pd_net_free(shared);
        break;
    case 6:
        fill(m->batch, READ_HEIGHT, 97);
        assert_int_equal(pd_forward(m->net, m->batch, PD_TRAIN, &m->cost, 1), PD_OK);
        assert_int_equal(pd_backward(m->net, m->cost), PD_OK);
        break;
    case 7:
        fill(m->batch, READ_HEIGHT, 96);
        assert_int_equal(pd_check_gradients(m->cost, m->batch, &(pd_gradcheck_opts){ .elements = 2 }, &check), PD_OK);
        break;
    case 8: assert_int_equal(pd_sync(m->trainer), PD_OK); break;
    }
}
enum { LOOKS = 9 };

static void test_reading_changes_nothing(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX", what[100];
    method methods[16];
    int count = method_list(methods), file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (int k = 0; k < count; k++) {
        pd_net_opts threads = { .threads = 1 + k % 2 };
        model straight = build(true, READ_HEIGHT, methods[k].optimizer, &methods[k].opts, &threads);
        for (uint64_t i = 0; i < READ_STEPS; i++) step(&straight, READ_HEIGHT, i);
        for (int number = k == 4 ? 0 : LOOKS; number < LOOKS + 1; number++) { /* the last time all of them */
            model m = build(true, READ_HEIGHT, methods[k].optimizer, &methods[k].opts, &threads);
            snprintf(what, sizeof what, "%s, look %d", methods[k].name, number);
            for (uint64_t i = 0; i < READ_STEPS; i++) {
                step(&m, READ_HEIGHT, i);
                for (int n = 0; n < LOOKS; n++)
                    if (n == number || number == LOOKS) look(&m, n, path);
            }
            check_bits(&m, &straight, what);
            free_model(&m);
        }
        free_model(&straight);
    }
    remove(path);
}

/* At any point, from a checkpoint; and once more from one of the continued training. */
static void test_resume_at_any_point(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX", what[100];
    method methods[16];
    int count = method_list(methods), file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (int k = 0; k < count; k++) {
        model straight = build(true, READ_HEIGHT, methods[k].optimizer, &methods[k].opts, NULL);
        for (uint64_t i = 0; i < READ_STEPS; i++) step(&straight, READ_HEIGHT, i);
        for (uint64_t stop = 0; stop < READ_STEPS; stop += 1 + stop / 3) {
            model m = build(true, READ_HEIGHT, methods[k].optimizer, &methods[k].opts, NULL);
            snprintf(what, sizeof what, "%s, stopped after %d", methods[k].name, (int)stop);
            for (uint64_t i = 0; i < READ_STEPS; i++) {
                if (i == stop || i == stop + 7) {
                    assert_int_equal(pd_checkpoint_save(m.trainer, path), PD_OK);
                    free_model(&m);
                    m = build(true, READ_HEIGHT, methods[k].optimizer, &methods[k].opts, NULL);
                    if (pd_checkpoint_load(m.trainer, path) != PD_OK) fail_msg("%s: %s", what, pd_error(m.net));
                }
                step(&m, READ_HEIGHT, i);
            }
            check_bits(&m, &straight, what);
            free_model(&m);
        }
        free_model(&straight);
    }
    remove(path);
}

/* A checkpoint is a model with current values, for any reader. */
static void test_checkpoint_as_model(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    pd_trainer_opts opts = { .l2 = 0.01 };
    model m = build(true, READ_HEIGHT, pd_momentum(0.1, 0.9), &opts, NULL);
    model reader = build(false, READ_HEIGHT, pd_momentum(0.1, 0.9), &opts, NULL);
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 20; i++) step(&m, READ_HEIGHT, i);
    assert_int_equal(pd_checkpoint_save(m.trainer, path), PD_OK);
    assert_int_equal(pd_load(reader.net, path, NULL), PD_OK);
    check_bits(&reader, &m, "loaded as a model");
    free_model(&m);
    free_model(&reader);
    remove(path);
}

/* ---- pd_train: checkpoints in any interval, patience, going back to the best values ---- */

typedef struct watcher {
    model *m;
    const char *path;
    int seen, every, stop; /* looks after so many batches; stops after so many */
} watcher;

static int watch(void *user, const pd_event *event) {
    watcher *w = (watcher *)user;
    if (event->kind != PD_END_BATCH) return 0;
    w->seen++;
    if (w->every && w->seen % w->every == 0)
        for (int n = 0; n < 6; n++) look(w->m, n, w->path);
    return w->stop && w->seen == w->stop;
}

static pd_status train_model(model *m, int64_t passes, int patience, const char *checkpoint, int64_t every,
                             watcher *w) {
    pd_reader *reader = pd_shuffle(m->net, made_reader(m->net, 100), 100, 3), *test = made_reader(m->net, 30);
    pd_train_opts opts = { .batch_size = 8, .on_event = watch, .user = w };
    pd_status status;
    w->m = m;
    if (patience) opts.test = test, opts.patience = patience;
    if (checkpoint) opts.checkpoint = checkpoint, opts.checkpoint_every = every;
    status = pd_train(m->trainer, reader, passes, &opts);
    pd_reader_free(reader);
    pd_reader_free(test);
    return status;
}

static void test_train_in_pieces(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX", other[] = "/tmp/paddle-sparse-XXXXXX";
    const pd_schedule fall = { .kind = PD_SCHEDULE_EXP, .a = 0.7, .b = 100 };
    pd_trainer_opts opts = { .l2 = 0.003, .schedule = fall, .clip_norm = 1 };
    int files[2] = { mkstemp(path), mkstemp(other) };
    (void)state;
    assert_true(files[0] >= 0 && files[1] >= 0);
    close(files[0]);
    close(files[1]);
    for (int kind = 0; kind < 3; kind++) {
        pd_optimizer o = kind == 0 ? pd_sgd(0.3) : kind == 1 ? pd_momentum(0.1, 0.9) : pd_nesterov(0.1, 0.9);
        model straight = build(true, READ_HEIGHT, o, &opts, NULL), m;
        watcher w = { .path = other };
        assert_int_equal(train_model(&straight, 5, 0, NULL, 0, &w), PD_OK);
        for (int64_t every = 1; every <= 5; every += 2) {
            watcher looks = { .path = other, .every = 2 };
            m = build(true, READ_HEIGHT, o, &opts, NULL);
            assert_int_equal(train_model(&m, 5, 0, path, every, &looks), PD_OK);
            check_bits(&m, &straight, "checkpoints in between");
            free_model(&m);
        }
        for (int patience = 0; patience < 2; patience++) /* tests and best values too */
            for (int stop = 1; stop < 60; stop += 17) {
                watcher stops = { .path = other, .every = 5, .stop = stop }, goes_on = { .path = other };
                m = build(true, READ_HEIGHT, o, &opts, NULL);
                assert_int_equal(train_model(&m, 5, 9 * patience, NULL, 0, &stops), PD_STOPPED);
                assert_int_equal(pd_checkpoint_save(m.trainer, path), PD_OK); /* the last values, if it went back */
                free_model(&m);
                m = build(true, READ_HEIGHT, o, &opts, NULL);
                if (pd_checkpoint_load(m.trainer, path) != PD_OK) fail_msg("%s", pd_error(m.net));
                assert_int_equal(train_model(&m, 5, 0, NULL, 0, &goes_on), PD_OK);
                check_bits(&m, &straight, patience ? "stopped, with patience" : "stopped");
                free_model(&m);
            }
        free_model(&straight);
    }
    remove(path);
    remove(other);
}

/* Gone back to the best values, and trained on from them, is where the dense net is. */
static void test_best_values(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    pd_trainer_opts opts = { .l2 = 0.003 };
    model sparse = build(true, READ_HEIGHT, pd_momentum(0.3, 0.9), &opts, NULL);
    model dense = build(false, READ_HEIGHT, pd_momentum(0.3, 0.9), &opts, NULL);
    model resumed = build(true, READ_HEIGHT, pd_momentum(0.3, 0.9), &opts, NULL);
    watcher w = { .path = path };
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    assert_int_equal(train_model(&sparse, 7, 2, NULL, 0, &w), PD_OK);
    assert_int_equal(train_model(&dense, 7, 2, NULL, 0, &w), PD_OK);
    assert_true(pd_trainer_samples(sparse.trainer) == pd_trainer_samples(dense.trainer));
    check_values(&sparse, &dense, 100 * CLOSE, "the best values");
    assert_int_equal(pd_checkpoint_save(sparse.trainer, path), PD_OK);
    check_values(&sparse, &dense, 100 * CLOSE, "the best values, after saving the last");
    for (uint64_t i = 0; i < 5; i++) step(&sparse, READ_HEIGHT, i), step(&dense, READ_HEIGHT, i);
    check_values(&sparse, &dense, 1000 * CLOSE, "trained on from the best values");
    /* and from the checkpoint with the best values in it, as without stopping */
    if (pd_checkpoint_load(resumed.trainer, path) != PD_OK) fail_msg("%s", pd_error(resumed.net));
    assert_int_equal(pd_load(dense.net, path, NULL), PD_OK);
    check_bits(&dense, &resumed, "the last values, loaded as a model");
    if (pd_checkpoint_load(sparse.trainer, path) != PD_OK) fail_msg("%s", pd_error(sparse.net));
    assert_int_equal(train_model(&resumed, 12, 2, NULL, 0, &w), PD_OK);
    assert_int_equal(train_model(&sparse, 12, 2, NULL, 0, &w), PD_OK);
    check_bits(&sparse, &resumed, "resumed with best values");
    free_model(&sparse);
    free_model(&dense);
    free_model(&resumed);
    remove(path);
}

static int stop_at_once(void *user, const pd_event *event) { return user == NULL && event->kind == PD_BEGIN_PASS; }

/* A training that goes back to the values that it came with, before it has made a step, leaves nothing of another
   trainer's to be made up for twice. */
static void test_back_before_the_first_step(void **state) {
    model m = build(true, READ_HEIGHT, pd_momentum(0.3, 0.9), NULL, NULL);
    pd_trainer *second = pd_trainer_new(m.net, m.cost, pd_sgd(0.1), NULL);
    pd_reader *reader = made_reader(m.net, 20), *test = made_reader(m.net, 20);
    pd_train_opts opts = { .on_event = stop_at_once, .test = test, .patience = 1 };
    pd_real before[READ_HEIGHT * 4], after[READ_HEIGHT * 4];
    pd_param *table = pd_param_find(m.net, "table");
    (void)state;
    for (uint64_t i = 0; i < 20; i++) step(&m, READ_HEIGHT, i);
    assert_int_equal(pd_param_get(table, before, table->size), PD_OK);
    assert_int_equal(pd_train(second, reader, 1, &opts), PD_STOPPED);
    assert_int_equal(pd_param_get(table, after, table->size), PD_OK);
    assert_memory_equal(after, before, sizeof before);
    pd_reader_free(reader);
    pd_reader_free(test);
    pd_trainer_free(second);
    free_model(&m);
}

/* ---- checkpoints that lie ---- */

/* The bytes of tensor `name`, in a checkpoint whose checksums nobody looks at any more. */
static unsigned char *tensor_of(unsigned char *file, size_t size, const char *name) {
    unsigned char *at;
    uint64_t header = 0;
    char quoted[100];
    long long begin;
    for (int i = 7; i >= 0; i--) header = header << 8 | file[i];
    while ((at = (unsigned char *)memmem(file, (size_t)header, "\"checksum", 9)) != NULL) at[1] = 'C';
    snprintf(quoted, sizeof quoted, "\"%s\":{", name);
    at = (unsigned char *)memmem(file, size, quoted, strlen(quoted));
    assert_non_null(at);
    at = (unsigned char *)memmem(at, 200, "data_offsets\":[", 15);
    assert_int_equal(sscanf((const char *)at + 15, "%lld", &begin), 1);
    return file + 8 + header + begin;
}

static void test_lying_checkpoints(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    pd_trainer_opts opts = { .l2 = 0.01 };
    model m = build(true, READ_HEIGHT, pd_momentum(0.1, 0.9), &opts, NULL);
    model other = build(true, READ_HEIGHT, pd_momentum(0.1, 0.9), &opts, NULL);
    model before = build(true, READ_HEIGHT, pd_momentum(0.1, 0.9), &opts, NULL);
    static unsigned char bytes[100000], bad[100000];
    static const struct {
        const char *tensor;
        int at, size;
        unsigned char with[9];
        pd_status status;
        const char *text;
    } lies[] = {
        { "behind/table", 4 * 7, 4, "\xff\xff\xff\xff", PD_E_FORMAT, "\"behind/table\": row 7 is -1 steps behind" },
        { "behind/table", 4 * 59, 4, "\x15\0\0\0", PD_E_FORMAT, "row 59 is 21 steps behind, expected 0 to" },
        { "behind/table", 0, 4, "\x04\0\0\0", PD_E_FORMAT,
          "row 0 is 4 steps behind, expected 0 to 3" }, /* its turn was 17 */
        { "behind/table", 0, 4, "\xff\xff\xff\x7f", PD_E_FORMAT, "row 0 is 2147483647 steps behind, expected 0 to" },
        { "steps/wide.weight", 8 * 5, 8, "\0\0\0\0\0\0\xf0\x7f", PD_E_NUMERIC,
          "\"steps/wide.weight\": number 5 is inf" },
        { "stored/table", 0, 8, "\xff\xff\xff\xff\xff\xff\xff\xff", PD_E_NUMERIC, "\"stored/table\": number 0, " },
    };
    FILE *f;
    size_t n;
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 20; i++) step(&m, READ_HEIGHT, i);
    assert_int_equal(pd_checkpoint_save(m.trainer, path), PD_OK);
    f = fopen(path, "rb");
    n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    assert_true(n > 1000 && n < sizeof bytes);
    for (int i = 0; i <= COUNT(lies) + 1; i++) {
        memcpy(bad, bytes, n);
        if (i < COUNT(lies)) {
            memcpy(tensor_of(bad, n, lies[i].tensor) + lies[i].at, lies[i].with, (size_t)lies[i].size);
        } else if (i == COUNT(lies)) { /* it has made fewer steps than rows have missed */
            unsigned char *at = (unsigned char *)memmem(bad, n, "\"updates/table\":\"20\"", 20);
            tensor_of(bad, n, "table");
            memcpy(at + 17, "03", 2);
        }
        f = fopen(path, "wb");
        assert_int_equal(fwrite(bad, 1, n, f), n);
        fclose(f);
        if (i > COUNT(lies)) break;
        assert_int_equal(pd_checkpoint_load(other.trainer, path), i < COUNT(lies) ? lies[i].status : PD_E_FORMAT);
        check_contains(pd_error(other.net), i < COUNT(lies) ? lies[i].text : "steps behind, expected 0 to 3");
        check_bits(&other, &before, "after a refusal");
    }
    memcpy(bad, bytes, n); /* no row is behind, but there are matrices of more steps than were made */
    memset(tensor_of(bad, n, "behind/table"), 0, 4 * READ_HEIGHT);
    memcpy((unsigned char *)memmem(bad, n, "\"updates/table\":\"20\"", 20) + 17, "03", 2);
    f = fopen(path, "wb");
    assert_int_equal(fwrite(bad, 1, n, f), n);
    fclose(f);
    assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_E_FORMAT);
    check_contains(pd_error(other.net), "steps, expected at most 3");
    check_bits(&other, &before, "after a refusal");
    for (int i = 0; i < 3; i++) { /* one of the three is not there */
        static const char *const names[] = { "\"stored/table\":", "\"steps/table\":", "\"behind/table\":" };
        memcpy(bad, bytes, n);
        tensor_of(bad, n, "table");
        ((unsigned char *)memmem(bad, n, names[i], strlen(names[i])))[3] = 'X';
        f = fopen(path, "wb");
        assert_int_equal(fwrite(bad, 1, n, f), n);
        fclose(f);
        assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_E_FORMAT);
        check_contains(pd_error(other.net), i == 0   ? "no tensor \"stored/table\", which this trainer needs"
                                            : i == 1 ? "no tensor \"steps/table\", which this trainer needs"
                                                     : "no tensor \"behind/table\", which this trainer needs");
        check_bits(&other, &before, "after a refusal");
    }
    f = fopen(path, "wb");
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
    assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_OK); /* as it was written */
    for (uint64_t i = 20; i < 30; i++) step(&m, READ_HEIGHT, i), step(&other, READ_HEIGHT, i);
    check_bits(&other, &m, "the true one");
    free_model(&m);
    free_model(&other);
    free_model(&before);
    remove(path);
}

/* A refused checkpoint of a longer training leaves the steps that rows have missed as they are. */
static void test_refused_after_growth(void **state) {
    enum { HEIGHT = 4200, NUMBERS = HEIGHT * 4 };
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    model longer = build(true, HEIGHT, pd_momentum(0.1, 0.9), NULL, NULL);
    model m = build(true, HEIGHT, pd_momentum(0.1, 0.9), NULL, NULL);
    pd_real *before = (pd_real *)malloc(2 * NUMBERS * sizeof *before), *after = before + NUMBERS;
    unsigned char *bytes;
    long size;
    FILE *f;
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (uint64_t i = 0; i < 1100; i++) step(&longer, HEIGHT, i); /* the least tree reaches 1,024 */
    for (uint64_t i = 0; i < 10; i++) step(&m, HEIGHT, i);
    assert_int_equal(pd_checkpoint_save(longer.trainer, path), PD_OK);
    f = fopen(path, "r+b");
    fseek(f, 0, SEEK_END);
    size = ftell(f);
    rewind(f);
    bytes = (unsigned char *)malloc((size_t)size);
    assert_int_equal(fread(bytes, 1, (size_t)size, f), size);
    memset(tensor_of(bytes, (size_t)size, "behind/wide.weight"), 0xff, 4); /* that of the table is true */
    rewind(f);
    assert_int_equal(fwrite(bytes, 1, (size_t)size, f), size);
    fclose(f);
    assert_int_equal(pd_param_get(pd_param_find(m.net, "table"), before, NUMBERS), PD_OK);
    assert_int_equal(pd_checkpoint_load(m.trainer, path), PD_E_FORMAT);
    check_contains(pd_error(m.net), "\"behind/wide.weight\": row 0 is -1 steps behind");
    assert_int_equal(pd_param_get(pd_param_find(m.net, "table"), after, NUMBERS), PD_OK);
    assert_memory_equal(after, before, NUMBERS * sizeof *after);
    free(bytes);
    free(before);
    free_model(&longer);
    free_model(&m);
    remove(path);
}

/* ---- rows that sleep, for 1 to 10,000 batches ---- */

typedef struct sleeper {
    pd_net *net;
    pd_layer *row, *cost;
    pd_trainer *trainer;
    pd_batch *batch;
} sleeper;

static sleeper new_sleeper(bool sparse, int64_t height, pd_optimizer o, const pd_trainer_opts *opts, int threads) {
    sleeper s;
    pd_layer *pair[2];
    s.net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pair[0] = s.row = pd_embedding(s.net, pd_ids(s.net, "id", height), 3,
                                   &(pd_embedding_opts){ .weight = { .name = "table", .sparse = sparse } });
    pair[1] = pd_vector(s.net, "target", 3);
    s.cost = pd_squared_error(s.net, pair[0], pair[1], NULL);
    s.trainer = pd_trainer_new(s.net, s.cost, o, opts);
    if (!s.trainer) fail_msg("%s", pd_error(s.net));
    s.batch = pd_batch_new(s.net);
    return s;
}

static void free_sleeper(sleeper *s) {
    pd_batch_free(s->batch);
    pd_trainer_free(s->trainer);
    pd_net_free(s->net);
}

/* Two rows: one of the few that are often seen, and at step i the one that was last seen 2 i / 3 steps ago or so. */
static void wake(sleeper *s, int64_t i, int64_t height) {
    int64_t ids[2] = { i % 7, 7 + (i % 3 ? i : i / 3) % (height - 7) };
    pd_batch_clear(s->batch);
    for (int k = 0; k < 2; k++) {
        pd_real *target = (pd_batch_add_id(s->batch, 0, ids[k]), pd_batch_add_row(s->batch, 1));
        for (int c = 0; c < 3; c++) target[c] = (pd_real)(ids[k] % 5 + c);
        assert_int_equal(pd_batch_end_sample(s->batch), PD_OK);
    }
    if (pd_train_batch(s->trainer, s->batch, NULL) != PD_OK) fail_msg("%s", pd_error(s->net));
}

/* Of what the row has missed all must be there when it is next read, whatever the tree of steps looks like then: of 50
   rows it reaches 1,024 steps, of 20,000 it grows to 8,192. */
static void test_sleep(void **state) {
    const pd_schedule fall = { .kind = PD_SCHEDULE_POLY, .a = 0.0001, .b = 0.5 };
    const pd_trainer_opts opts = { .l2 = 0.001, .schedule = fall };
    const int64_t heights[] = { 50, 20000 }, steps = sizeof(pd_real) == 8 ? 10500 : 2500;
    (void)state;
    for (int k = 0; k < 3; k++) {
        pd_optimizer o = k == 0 ? pd_sgd(0.05) : k == 1 ? pd_momentum(0.02, 0.99) : pd_nesterov(0.02, 0.9);
        int64_t height = heights[k % 2], count = 3 * height;
        sleeper sparse = new_sleeper(true, height, o, &opts, 1), dense = new_sleeper(false, height, o, &opts, 1);
        pd_real *x = (pd_real *)malloc(2 * (size_t)count * sizeof *x), *y = x + count;
        for (int64_t i = 0; i < steps; i++) wake(&sparse, i, height), wake(&dense, i, height);
        assert_int_equal(pd_param_get(pd_param_first(sparse.net), x, count), PD_OK);
        assert_int_equal(pd_param_get(pd_param_first(dense.net), y, count), PD_OK);
        for (int64_t i = 0; i < count; i++)
            check_near((double)x[i], (double)y[i], sizeof(pd_real) == 8 ? 1e-10 : 1e-3, "a row that slept");
        free(x);
        free_sleeper(&sparse);
        free_sleeper(&dense);
    }
}

/* The same bits for any number of threads, and after a stop, where the tree has grown and gone round. */
static void test_sleep_resumed(void **state) {
    enum { HEIGHT = 4200, STEPS = 2600, COUNT_ALL = 3 * HEIGHT };
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    const pd_schedule fall = { .kind = PD_SCHEDULE_POLY, .a = 0.0001, .b = 0.5 };
    const pd_trainer_opts opts = { .l2 = 0.001, .schedule = fall };
    pd_real *x = (pd_real *)malloc(2 * COUNT_ALL * sizeof *x), *y = x + COUNT_ALL;
    sleeper straight = new_sleeper(true, HEIGHT, pd_momentum(0.02, 0.99), &opts, 1);
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (int64_t i = 0; i < STEPS; i++) wake(&straight, i, HEIGHT);
    assert_int_equal(pd_param_get(pd_param_first(straight.net), x, COUNT_ALL), PD_OK);
    for (int64_t stop = 1000; stop < STEPS; stop += 523) {
        sleeper s = new_sleeper(true, HEIGHT, pd_momentum(0.02, 0.99), &opts, 2);
        for (int64_t i = 0; i < STEPS; i++) {
            if (i == stop) {
                assert_int_equal(pd_checkpoint_save(s.trainer, path), PD_OK);
                free_sleeper(&s);
                s = new_sleeper(true, HEIGHT, pd_momentum(0.02, 0.99), &opts, 2);
                if (pd_checkpoint_load(s.trainer, path) != PD_OK) fail_msg("%s", pd_error(s.net));
            }
            wake(&s, i, HEIGHT);
        }
        assert_int_equal(pd_param_get(pd_param_first(s.net), y, COUNT_ALL), PD_OK);
        assert_memory_equal(x, y, COUNT_ALL * sizeof *x);
        free_sleeper(&s);
    }
    free_sleeper(&straight);
    free(x);
    remove(path);
}

/* ---- the cost is that of the rows; threads; devices ---- */

static void test_threads(void **state) {
    model one = build(true, 3000, pd_momentum(0.1, 0.9), NULL, &(pd_net_opts){ .threads = 1 });
    (void)state;
    for (uint64_t i = 0; i < 20; i++) step(&one, 3000, i);
    for (int threads = 2; threads <= 4; threads++) {
        model more = build(true, 3000, pd_momentum(0.1, 0.9), NULL, &(pd_net_opts){ .threads = threads });
        for (uint64_t i = 0; i < 20; i++) step(&more, 3000, i);
        check_values(&more, &one, 0, "threads");
        free_model(&more);
    }
    free_model(&one);
}

static void test_far_device(void **state) {
    static const uint64_t kinds[] = { ~(uint64_t)0, 0, PD_OP(sparse_product) };
    pd_net *host = pd_net_new(NULL);
    model cpu = build(true, 40, pd_momentum(0.1, 0.9), NULL, NULL);
    (void)state;
    for (uint64_t i = 0; i < 20; i++) step(&cpu, 40, i);
    for (int k = 0; k < COUNT(kinds); k++) {
        far_device far = make_far(cpu_of(host), kinds[k]);
        model m;
        far.device.self = &far;
        m = build(true, 40, pd_momentum(0.1, 0.9), NULL, &(pd_net_opts){ .device = &far.device });
        for (uint64_t i = 0; i < 20; i++) step(&m, 40, i);
        check_values(&m, &cpu, 0, "far device");
        free_model(&m);
    }
    free_model(&cpu);
    pd_net_free(host);
}

static void test_steady_state(void **state) {
    failing_allocator f = { 0, -1, 0 };
    model m = build(true, 500, pd_momentum(0.1, 0.9), NULL,
                    &(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f } });
    int64_t calls;
    (void)state;
    for (uint64_t i = 0; i < 200; i++) step(&m, 500, i);
    calls = failing_calls(&f);
    for (uint64_t i = 0; i < 200; i++) step(&m, 500, i);
    assert_int_equal(failing_calls(&f), calls);
    free_model(&m);
    assert_int_equal(f.in_use, 0);
}

static void test_no_memory(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    for (int64_t fail_at = 0;; fail_at++) {
        failing_allocator f = { 0, fail_at, 0 };
        pd_net *net = pd_net_new(&(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f } });
        pd_layer *x = net ? pd_sparse_vector(net, "x", 9) : NULL, *y;
        pd_trainer *trainer = NULL;
        pd_batch *batch = NULL;
        int64_t columns[2] = { 3, 5 };
        pd_net *shared;
        pd_layer *twin;
        pd_real values[18];
        bool ok;
        y = net ? pd_fc(net, x, 2, &(pd_fc_opts){ .weight.sparse = true }) : NULL;
        if (net) trainer = pd_trainer_new(net, pd_sum_cost(net, y, NULL), pd_momentum(0.1, 0.9), NULL);
        if (trainer) batch = pd_batch_new(net);
        ok = batch && pd_batch_add_sparse(batch, 0, columns, NULL, 2) == PD_OK && pd_batch_end_sample(batch) == PD_OK &&
             pd_train_batch(trainer, batch, NULL) == PD_OK && pd_train_batch(trainer, batch, NULL) == PD_OK;
        ok = ok && pd_checkpoint_save(trainer, path) == PD_OK && pd_checkpoint_load(trainer, path) == PD_OK;
        ok = ok && pd_param_get(pd_param_first(net), values, 18) == PD_OK;
        shared = ok ? pd_net_share(net) : NULL;
        twin = shared ? pd_layer_find(shared, y->name) : NULL;
        ok = twin && pd_forward(shared, batch, PD_PREDICT, &twin, 1) == PD_OK;
        pd_net_free(shared);
        if (net && !ok && !batch) assert_int_equal(pd_error_status(net), PD_E_MEMORY);
        pd_batch_free(batch);
        pd_trainer_free(trainer);
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
        if (f.calls <= fail_at) {
            assert_true(ok);
            break;
        }
        assert_false(ok);
    }
    remove(path);
}

/* ---- batches ---- */

static void test_batches(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_sparse_vector(net, "x", 6));
    pd_batch *a = pd_batch_new(net), *b = pd_batch_new(net);
    const int64_t columns[3] = { 4, 0, 2 };
    const pd_real values[3] = { 1, (pd_real)-0.5, 3 };
    (void)state;
    (void)x;
    for (int64_t sample = 0; sample < 3; sample++) { /* of 1, 2, 3 rows with 0 .. 3 entries */
        for (int64_t row = 0; row <= sample; row++)
            assert_int_equal(pd_batch_add_sparse(a, 0, columns, row ? values : NULL, (sample + row) % 4), PD_OK);
        assert_int_equal(pd_batch_end_sample(a), PD_OK);
    }
    assert_int_equal(a->slots[0].row_starts[6], 0 + 1 + 2 + 2 + 3 + 0);
    for (int64_t i = 2; i >= 0; i--) assert_int_equal(pd_batch_copy_sample(b, a, i), PD_OK);
    assert_int_equal(b->slots[0].rows, 6);
    assert_int_equal(b->slots[0].row_starts[1], 2);
    assert_true(b->slots[0].values[2] == 1 && b->slots[0].values[3] == (pd_real)-0.5);
    assert_int_equal(b->slots[0].ids[4], 2);
    /* refused, and the batch stays as it was */
    assert_int_equal(pd_batch_add_sparse(a, 0, (int64_t[]){ 6 }, NULL, 1), PD_E_FORMAT);
    check_contains(a->error.text, "input \"x\": column 6, expected 0 to 5");
    assert_int_equal(pd_batch_add_sparse(a, 0, columns, (pd_real[]){ (pd_real)NAN }, 1), PD_E_NUMERIC);
    assert_int_equal(pd_batch_add_sparse(a, 0, NULL, NULL, 2), PD_E_ARGUMENT);
    assert_int_equal(pd_batch_add_sparse(a, 0, columns, NULL, -1), PD_E_ARGUMENT);
    assert_int_equal(pd_batch_add_id(a, 0, 1), PD_E_ARGUMENT);
    check_contains(a->error.text, "slot 0 is not an input of ids");
    assert_int_equal(a->slots[0].rows, 6);
    assert_int_equal(a->slots[0].row_starts[6], 8);
    pd_batch_free(a);
    pd_batch_free(b);
    pd_net_free(net);
}

/* A word that is refused fails its sample, though other words of the sentence were fine, and nothing of it stays. */
static void test_refused_word(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_batch *batch;
    (void)state;
    pd_sequence(pd_ids(net, "words", 10));
    batch = pd_batch_new(net);
    assert_int_equal(pd_batch_add_id(batch, 0, 3), PD_OK);
    assert_int_equal(pd_batch_add_id(batch, 0, 10), PD_E_FORMAT);
    assert_int_equal(pd_batch_add_id(batch, 0, 4), PD_OK);
    assert_int_equal(pd_batch_end_sample(batch), PD_E_FORMAT);
    check_contains(batch->error.text, "input \"words\": id 10, expected 0 to 9");
    assert_true(batch->samples == 0 && batch->slots[0].rows == 0);
    assert_int_equal(pd_batch_add_id(batch, 0, 5), PD_OK); /* the next one is new */
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    assert_int_equal(pd_batch_add_id(batch, 1, 5), PD_E_ARGUMENT);
    pd_batch_drop_sample(batch);
    assert_int_equal(pd_batch_end_sample(batch), PD_OK); /* an empty sentence */
    assert_int_equal(batch->samples, 2);
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- readers ---- */

/* "label index:value" into a sparse input is what it is into a dense one. */
static void test_libsvm(void **state) {
    char path[] = "/tmp/paddle-sparse-XXXXXX";
    const char *text = "1 1:0.5 4:2\n0\n2 7:-1 8:3 # comment\n1 2:1\n";
    int file = mkstemp(path);
    pd_net *nets[2];
    pd_real rows[2][4][8];
    (void)state;
    memset(rows, 0, sizeof rows);
    assert_true(file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text));
    close(file);
    for (int sparse = 0; sparse < 2; sparse++) {
        pd_net *net = nets[sparse] = pd_net_new(NULL);
        pd_batch *batch;
        pd_reader *reader;
        if (sparse) pd_sparse_vector(net, "x", 8);
        else pd_vector(net, "x", 8);
        pd_label(net, "y", 3);
        batch = pd_batch_new(net);
        reader = pd_shuffle(net, pd_libsvm_reader(net, path, &(pd_reader_opts){ .scale = 2 }), 3, 5);
        if (!reader) fail_msg("%s", pd_error(net));
        assert_int_equal(reader->reset(reader, 0), PD_OK);
        assert_int_equal(reader->next(reader, batch, 10), PD_END);
        assert_int_equal(batch->samples, 4);
        for (int64_t r = 0; r < 4; r++) {
            const pd_slot *s = &batch->slots[0];
            if (!sparse) memcpy(rows[0][r], s->data + 8 * r, sizeof rows[0][r]);
            for (int64_t k = sparse ? s->row_starts[r] : 0; sparse && k < s->row_starts[r + 1]; k++)
                rows[1][r][s->ids[k]] = s->values[k];
        }
        pd_batch_free(batch);
        pd_reader_free(reader);
    }
    assert_memory_equal(rows[0], rows[1], sizeof rows[0]);
    assert_null(pd_libsvm_reader(nets[1], path, &(pd_reader_opts){ .shift = 1 }));
    check_contains(pd_error(nets[1]), "input \"x\" is sparse: absent numbers stay 0");
    assert_null(pd_csv_reader(nets[1], path, NULL));
    check_contains(pd_error(nets[1]), "input \"x\" is sparse");
    pd_net_free(nets[0]);
    pd_net_free(nets[1]);
    remove(path);
}

static void test_arrays(void **state) {
    pd_net *net = pd_net_new(NULL);
    const int64_t starts[4] = { 0, 2, 2, 3 }, ids[3] = { 1, 4, 0 }, falling[4] = { 0, 2, 1, 3 };
    const pd_real values[3] = { 1, 2, 3 };
    pd_array array = { .ids = ids, .row_starts = starts, .values = values };
    pd_reader *reader;
    pd_batch *batch;
    (void)state;
    pd_sparse_vector(net, "x", 5);
    batch = pd_batch_new(net);
    reader = pd_array_reader(net, 3, &array, 1);
    if (!reader) fail_msg("%s", pd_error(net));
    assert_int_equal(reader->reset(reader, 0), PD_OK);
    assert_int_equal(reader->next(reader, batch, 3), PD_OK);
    assert_int_equal(batch->slots[0].row_starts[3], 3);
    assert_true(batch->slots[0].ids[2] == 0 && batch->slots[0].values[2] == 3);
    pd_reader_free(reader);
    array.row_starts = falling;
    assert_null(pd_array_reader(net, 3, &array, 1));
    check_contains(pd_error(net), "row_starts[2] is 1; they must rise");
    array.row_starts = NULL;
    assert_null(pd_array_reader(net, 3, &array, 1));
    check_contains(pd_error(net), "input \"x\" takes row_starts, ids and values");
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- misuse ---- */

static pd_net *with_table(pd_layer **cost, const pd_param_opts *weight) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *row = pd_embedding(net, pd_ids(net, "id", 9), 2, &(pd_embedding_opts){ .name = "e", .weight = *weight });
    *cost = row ? pd_sum_cost(net, row, NULL) : NULL;
    return net;
}

static void test_refused(void **state) {
    static const pd_optimizer_kind lacking[] = { PD_OPT_ADAGRAD, PD_OPT_ADAM, PD_OPT_RMSPROP };
    pd_layer *cost;
    pd_net *net;
    (void)state;
    for (int k = 0; k < 3; k++) {
        net = with_table(&cost, &(pd_param_opts){ .sparse = true });
        pd_optimizer o = k == 0 ? pd_adagrad(0.1) : k == 1 ? pd_adam(0.1) : pd_rmsprop(0.1);
        assert_int_equal(o.kind, lacking[k]);
        assert_null(pd_trainer_new(net, cost, o, NULL));
        check_contains(pd_error(net), "parameter \"e.weight\" is sparse, which goes with sgd and momentum");
        pd_net_free(net);
    }
    net = with_table(&cost, &(pd_param_opts){ .sparse = true });
    assert_null(pd_trainer_new(net, cost, pd_sgd(0.1), &(pd_trainer_opts){ .l1 = 0.1 }));
    check_contains(pd_error(net), "which does not go with l1");
    pd_net_free(net);
    net = with_table(&cost, &(pd_param_opts){ .sparse = true, .l1 = PD_ZERO }); /* that of the trainer is for others */
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_sgd(0.1), &(pd_trainer_opts){ .l1 = 0.1 });
    assert_non_null(trainer);
    pd_trainer_free(trainer);
    pd_net_free(net);
    net = with_table(&cost, &(pd_param_opts){ .sparse = true });
    assert_null(pd_trainer_new(net, cost, pd_sgd(0.1), &(pd_trainer_opts){ .average_window = 0.1 }));
    check_contains(pd_error(net), "which does not go with model averaging");
    pd_net_free(net);
    net = with_table(&cost, &(pd_param_opts){ .sparse = true, .prune = 0.5 });
    check_contains(pd_error(net), "e: parameter \"e.weight\" is sparse, which goes with neither l1 nor prune");
    pd_net_free(net);
    net = pd_net_new(NULL);
    assert_null(pd_conv(net, pd_image(net, "i", 1, 4, 4), 2, 3, &(pd_conv_opts){ .name = "c", .weight.sparse = true }));
    check_contains(pd_error(net), "c: parameter \"c.weight\" can't be sparse: that is for tables read by ids");
    pd_net_free(net);
    net = pd_net_new(NULL);
    assert_null(pd_add(net, (pd_layer *[]){ pd_sparse_vector(net, "s", 4) }, 1, NULL));
    check_contains(pd_error(net), "takes no sparse input such as \"s\"; pd_fc does");
    pd_net_free(net);
    net = pd_net_new(NULL);
    pd_sparse_vector(net, "s", 4);
    assert_null(pd_eval_error(net, pd_vector(net, "x", 2), pd_layer_find(net, "s"), NULL));
    check_contains(pd_error(net), "sparse");
    pd_net_free(net);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_dense),
        cmocka_unit_test(test_tail),
        cmocka_unit_test(test_long_run),
        cmocka_unit_test(test_gradient_equals_dense),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_values_are_current),
        cmocka_unit_test(test_two_trainers),
        cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_reading_changes_nothing),
        cmocka_unit_test(test_resume_at_any_point),
        cmocka_unit_test(test_checkpoint_as_model),
        cmocka_unit_test(test_train_in_pieces),
        cmocka_unit_test(test_best_values),
        cmocka_unit_test(test_back_before_the_first_step),
        cmocka_unit_test(test_lying_checkpoints),
        cmocka_unit_test(test_refused_after_growth),
        cmocka_unit_test(test_sleep),
        cmocka_unit_test(test_sleep_resumed),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_far_device),
        cmocka_unit_test(test_steady_state),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_batches),
        cmocka_unit_test(test_libsvm),
        cmocka_unit_test(test_arrays),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_zeroed_in_between),
        cmocka_unit_test(test_settled_by_others),
        cmocka_unit_test(test_shared_on_a_far_device),
        cmocka_unit_test(test_shared_in_threads),
        cmocka_unit_test(test_predicted_rows),
        cmocka_unit_test(test_refused_word),
    };
    return run_group(tests, NULL, NULL);
}
