/* What the trainer gives updaters of several workers: shares, steps on rows of others, sums of samples, workers that run
   out of data. The workers are two threads with a net each, and an updater that meets at barriers. The oracle is one net
   that trains on both workers' batches together. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "support.h"

enum { WORKERS = 2, SAMPLES = 60, WORDS = 37, BATCH = 6 };

static int64_t words[SAMPLES * 5], starts[SAMPLES + 1], labels[SAMPLES];
static pd_real features[SAMPLES * 4];

static void make_data(void) {
    random_seed(3);
    for (int64_t i = 0; i < SAMPLES; i++) {
        int64_t length = below(6);
        for (int64_t k = 0; k < length; k++) words[starts[i] + k] = below(1 + below(WORDS));
        starts[i + 1] = starts[i] + length;
        labels[i] = below(3);
        for (int k = 0; k < 4; k++) features[4 * i + k] = (pd_real)uniform(-1, 1);
    }
}

/* ---- the updater ---- */

typedef struct worker {
    pd_updater updater;
    int rank;
    pd_trainer *trainer;
    int64_t samples;
    double sums[4096];
    pd_real *merged; /* gradient rows of the share */
    int64_t *rows, row_count;
    pd_status status; /* of pd_train */
    pd_net *net;
    pd_layer *output, *cost;
    pd_reader *reader, *test;
    double test_cost;
} worker;

static worker workers[WORKERS];
static pthread_barrier_t meeting;

static void meet(void) { pthread_barrier_wait(&meeting); }

static pd_status worker_start(pd_updater *u, pd_trainer *t) {
    worker *w = (worker *)u->self;
    w->trainer = t;
    return pd_trainer_shard(t, w->rank, WORKERS);
}

static pd_param *param_of(int rank, int index) { return pd_trainer_param(workers[rank].trainer, index); }

/* Every owner gives all that ask what they will read. */
static pd_status worker_begin(pd_updater *u, int64_t samples) {
    worker *w = (worker *)u->self;
    w->samples = samples;
    meet();
    for (int i = 0; param_of(0, i); i++)
        for (int other = 0; other < WORKERS && param_of(other, i)->opts.sparse; other++) {
            const pd_param *p = param_of(other, i);
            for (int64_t k = 0; k < p->rows.count; k++)
                if (p->rows.ids[k] % WORKERS == w->rank)
                    pd_trainer_read_rows(w->trainer, param_of(w->rank, i), 1, &p->rows.ids[k],
                                         p->row_values + k * p->dims[1]);
        }
    meet();
    return PD_OK;
}

static pd_status worker_final(pd_updater *u, pd_param *p) {
    (void)u;
    (void)p;
    return PD_OK;
}

static pd_status step_sparse(worker *w, int index, int64_t samples) {
    pd_param *p = param_of(w->rank, index);
    int64_t width = p->dims[1], count = 0;
    for (int64_t row = w->rank; row < p->dims[0]; row += WORKERS) {
        bool touched = false;
        for (int k = 0; k < WORKERS; k++) {
            const pd_param *q = param_of(k, index);
            int64_t place = pd_param_place(q, row);
            if (place < 0) continue;
            for (int64_t i = 0; i < width; i++)
                w->merged[count * width + i] =
                    (touched ? w->merged[count * width + i] : 0) + q->grad[place * width + i];
            touched = true;
        }
        if (touched) w->rows[count++] = row;
    }
    w->row_count = count;
    return pd_trainer_apply_rows(w->trainer, p, count, w->rows, w->merged, samples, 1);
}

static pd_status worker_end(pd_updater *u, int64_t *samples) {
    worker *w = (worker *)u->self;
    pd_status status = PD_OK;
    pd_param *p;
    meet();
    *samples = 0;
    for (int k = 0; k < WORKERS; k++) *samples += workers[k].samples;
    for (int i = 0; *samples > 0 && status == PD_OK && (p = param_of(w->rank, i)) != NULL; i++) {
        int64_t first, count;
        pd_param_shard(p, w->rank, WORKERS, &first, &count);
        assert_true(p->opts.sparse ? count == 0 : first >= 0 && first + count <= p->size);
        if (p->opts.sparse) {
            status = step_sparse(w, i, *samples);
            continue;
        }
        for (int64_t k = first; k < first + count; k++) p->grad[k] += param_of(1 - w->rank, i)->grad[k];
        meet(); /* all of the others' gradients have been read */
        status = pd_trainer_apply(w->trainer, p, *samples, 1);
        meet();
        pd_param_shard(p, 1 - w->rank, WORKERS, &first, &count);
        memcpy(p->value + first, param_of(1 - w->rank, i)->value + first, (size_t)count * sizeof(pd_real));
    }
    meet();
    return status;
}

static pd_status worker_sync(pd_updater *u) {
    worker *w = (worker *)u->self;
    meet();
    for (int i = 0; param_of(0, i); i++) {
        pd_param *p = param_of(w->rank, i), *q = param_of(1 - w->rank, i);
        for (int64_t row = w->rank; p->opts.sparse && row < p->dims[0]; row += WORKERS)
            pd_trainer_read_rows(w->trainer, p, 1, &row, q->value + row * p->dims[1]);
    }
    meet();
    return PD_OK;
}

static pd_status worker_reduce(pd_updater *u, double *sums, int64_t count) {
    worker *w = (worker *)u->self;
    for (int64_t first = 0; first < count; first += 4096) {
        int64_t n = smaller(4096, count - first);
        memcpy(w->sums, sums + first, (size_t)n * sizeof *sums);
        meet();
        for (int64_t i = 0; i < n; i++) sums[first + i] = workers[0].sums[i] + workers[1].sums[i];
        meet();
    }
    return PD_OK;
}

static const pd_updater meeting_updater = { PD_API_VERSION, "meeting", NULL,       worker_start, worker_begin,  NULL,
                                            worker_final,   NULL,      worker_end, worker_sync,  worker_reduce, NULL };

/* ---- the nets ---- */

static pd_layer *build(pd_net *net, bool sparse, pd_layer **output) {
    pd_layer *sentence = pd_sequence(pd_ids(net, "words", WORDS)), *x = pd_vector(net, "x", 4), *both[2];
    pd_layer *label = pd_label(net, "label", 3);
    pd_layer *rows = pd_embedding(net, sentence, 3, &(pd_embedding_opts){ .name = "e", .weight.sparse = sparse });
    both[0] = pd_sequence_pool(net, pd_gru(net, rows, 5, &(pd_gru_opts){ .name = "g" }), PD_LAST, NULL);
    both[1] = x;
    *output = pd_fc_sum(net, both, 2, 3, &(pd_fc_opts){ .name = "o", .act = PD_SOFTMAX });
    return pd_cross_entropy(net, *output, label, NULL);
}

static pd_reader *open_reader(pd_net *net, int64_t samples) {
    pd_array arrays[3] = { { .ids = words, .starts = starts }, { .data = features }, { .ids = labels } };
    return pd_array_reader(net, samples, arrays, 3);
}

static pd_optimizer optimizer_of(int k) {
    return k == 0 ? pd_momentum(0.2, 0.9) : k == 1 ? pd_sgd(0.3) : pd_adam(0.02);
}
static const pd_trainer_opts options_of[3] = { { .l2 = 0.01 }, { .l2 = 0 }, { .l2 = 0.01 } };

static void *work(void *argument) {
    worker *w = (worker *)argument;
    w->status = pd_train(w->trainer, w->reader, 2, &(pd_train_opts){ .batch_size = BATCH / WORKERS });
    if (w->status == PD_OK) w->status = pd_test(w->trainer, w->test, 4, &w->test_cost);
    return NULL;
}

/* One whose sums are added, and one that merges them by its own means. */
static void add_evaluators(pd_net *net, pd_layer *output) {
    pd_eval_error(net, output, pd_layer_find(net, "label"), NULL);
    pd_eval_auc(net, pd_slice(net, output, 0, 1, NULL), pd_slice(net, pd_layer_find(net, "x"), 0, 1, NULL), NULL);
}

/* Worker 1 has `short_by` samples less than worker 0 (at batches' borders). */
static void train_workers(int kind, int64_t short_by) {
    pthread_t threads[WORKERS];
    pthread_barrier_init(&meeting, NULL, WORKERS);
    for (int k = 0; k < WORKERS; k++) {
        worker *w = &workers[k];
        memset(w, 0, sizeof *w);
        w->updater = meeting_updater;
        w->updater.self = w;
        w->rank = k;
        w->merged = (pd_real *)calloc(WORDS * 3, sizeof *w->merged);
        w->rows = (int64_t *)calloc(WORDS, sizeof *w->rows);
        w->net = pd_net_new(&(pd_net_opts){ .seed = 4, .threads = 1 });
        w->cost = build(w->net, kind < 2, &w->output);
        add_evaluators(w->net, w->output);
        pd_trainer_opts opts = options_of[kind];
        opts.updater = &w->updater;
        w->trainer = pd_trainer_new(w->net, w->cost, optimizer_of(kind), &opts);
        w->reader = open_reader(w->net, SAMPLES - (k ? 2 * short_by : 0));
        w->test = open_reader(w->net, SAMPLES);
        if (!w->trainer || !w->reader || !w->test) fail_msg("%s", pd_error(w->net));
        assert_int_equal(pd_reader_shard(w->reader, k, WORKERS), PD_OK);
        assert_int_equal(pd_reader_shard(w->test, k, WORKERS), PD_OK);
    }
    for (int k = 0; k < WORKERS; k++) assert_int_equal(pthread_create(&threads[k], NULL, work, &workers[k]), 0);
    for (int k = 0; k < WORKERS; k++) pthread_join(threads[k], NULL);
    for (int k = 0; k < WORKERS; k++)
        if (workers[k].status != PD_OK) fail_msg("worker %d: %s", k, pd_error(workers[k].net));
}

static void free_workers(void) {
    for (int k = 0; k < WORKERS; k++) {
        pd_reader_free(workers[k].reader);
        pd_reader_free(workers[k].test);
        pd_trainer_free(workers[k].trainer);
        pd_net_free(workers[k].net);
        free(workers[k].merged);
        free(workers[k].rows);
    }
    pthread_barrier_destroy(&meeting);
}

static double auc_of(const worker *w) { return pd_evaluator_value(pd_evaluator_first(w->net)->next, 0); }

/* The same by one net, with the samples that both workers have. */
static void check_against_one(int kind, int64_t short_by) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 4 });
    pd_layer *output, *cost = build(net, false, &output);
    pd_trainer *t = pd_trainer_new(net, cost, optimizer_of(kind), &options_of[kind]);
    pd_reader *reader = open_reader(net, SAMPLES);
    pd_batch *all = pd_batch_new(net), *part = pd_batch_new(net);
    pd_evaluator *error, *auc;
    double test_cost;
    add_evaluators(net, output);
    error = pd_evaluator_first(net), auc = error->next;
    for (int64_t pass = 0; pass < 2; pass++) {
        assert_int_equal(reader->reset(reader, pass), PD_OK);
        for (int64_t at = 0; at < SAMPLES; at += BATCH) {
            pd_batch_clear(all);
            pd_batch_clear(part);
            assert_true(reader->next(reader, all, BATCH) != PD_E_ARGUMENT);
            for (int64_t i = 0; i < all->samples; i++)
                if ((at + i) % 2 == 0 || at + i < SAMPLES - 2 * short_by)
                    assert_int_equal(pd_batch_copy_sample(part, all, i), PD_OK);
            assert_int_equal(pd_train_batch(t, part, NULL), PD_OK);
        }
    }
    assert_int_equal(pd_trainer_samples(t), 2 * (SAMPLES - short_by));
    assert_int_equal(pd_test(t, reader, 7, &test_cost), PD_OK);
    for (int k = 0; k < WORKERS; k++) {
        assert_int_equal(pd_trainer_samples(workers[k].trainer), pd_trainer_samples(t));
        check_near(workers[k].test_cost, test_cost, sizeof(pd_real) == 8 ? 1e-11 : 1e-4, "test cost");
        assert_true(pd_evaluator_value(pd_evaluator_first(workers[k].net), 0) == pd_evaluator_value(error, 0));
        check_near(auc_of(&workers[k]), pd_evaluator_value(auc, 0), 1e-3, "auc"); /* scores differ by rounding */
        assert_true(auc_of(&workers[k]) == auc_of(&workers[0]));
        for (pd_param *p = pd_param_first(workers[k].net), *q = pd_param_first(net); p; p = p->next, q = q->next) {
            pd_real *x = (pd_real *)calloc((size_t)p->size, 2 * sizeof *x), *y = x + p->size;
            assert_int_equal(pd_param_get(p, x, p->size), PD_OK);
            assert_int_equal(pd_param_get(q, y, q->size), PD_OK);
            for (int64_t i = 0; i < p->size; i++)
                check_near((double)x[i], (double)y[i], sizeof(pd_real) == 8 ? 1e-11 : 2e-4, p->name);
            free(x);
        }
    }
    pd_batch_free(all);
    pd_batch_free(part);
    pd_reader_free(reader);
    pd_trainer_free(t);
    pd_net_free(net);
}

static void test_workers(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++)
        for (int64_t short_by = 0; short_by <= 12; short_by += 12) {
            train_workers(kind, short_by);
            check_against_one(kind, short_by);
            free_workers();
        }
}

/* Shares are disjoint, in order, and all there is; none is larger than another by more than one. */
static void test_shares(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *output;
    (void)state;
    build(net, true, &output);
    for (int ranks = 1; ranks <= 40; ranks++)
        for (pd_param *p = pd_param_first(net); p; p = p->next) {
            int64_t end = 0, least = INT64_MAX, most = 0;
            for (int rank = 0; rank < ranks; rank++) {
                int64_t first, count;
                pd_param_shard(p, rank, ranks, &first, &count);
                if (p->opts.sparse) {
                    assert_int_equal(count, 0);
                    continue;
                }
                assert_int_equal(first, end);
                end = first + count;
                least = smaller(least, count);
                if (count > most) most = count;
            }
            if (!p->opts.sparse) assert_true(end == p->size && most - least <= 1);
        }
    pd_net_free(net);
}

/* With a share of the state there is neither averaging nor a checkpoint. */
static void test_refused(void **state) {
    worker *w = &workers[1];
    pd_trainer_opts opts = { .average_window = 0.5, .updater = &w->updater };
    (void)state;
    memset(workers, 0, sizeof workers);
    w->updater = meeting_updater;
    w->updater.self = w;
    w->rank = 1;
    w->net = pd_net_new(NULL);
    w->cost = build(w->net, false, &w->output);
    assert_null(pd_trainer_new(w->net, w->cost, pd_sgd(0.1), &opts));
    check_contains(pd_error(w->net), "no model averaging with 2 workers");
    pd_clear_error(w->net);
    opts.average_window = 0;
    w->trainer = pd_trainer_new(w->net, w->cost, pd_sgd(0.1), &opts);
    assert_non_null(w->trainer);
    assert_int_equal(pd_checkpoint_save(w->trainer, "build/none"), PD_E_UNSUPPORTED);
    check_contains(pd_error(w->net), "no checkpoints yet with 2 workers");
    assert_int_equal(pd_checkpoint_load(w->trainer, "build/none"), PD_E_UNSUPPORTED);
    assert_int_equal(pd_trainer_shard(w->trainer, 2, 2), PD_E_ARGUMENT);
    assert_null(pd_trainer_param(w->trainer, 99));
    pd_trainer_free(w->trainer);
    pd_net_free(w->net);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_workers),
        cmocka_unit_test(test_shares),
        cmocka_unit_test(test_refused),
    };
    make_data();
    return run_group(tests, NULL, NULL);
}
