/* Training: what pd_train does, tells, writes and survives; that it can be stopped and continued at any batch with the
   same bits; that bits do not depend on threads; that steps take no memory; the order in which updaters are called. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <dirent.h>
#include <fcntl.h>
#include <locale.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "support.h"

/* ---- data: points around three centres, and the same as images ---- */

enum { TRAIN = 70, TEST = 30, SAMPLES = TRAIN + TEST, WIDTH = 6, CLASSES = 3, BATCH = 16, BATCHES = 5, SIDE = 12 };
static pd_real points[SAMPLES * WIDTH], images[SAMPLES * 2 * SIDE * SIDE];
static int64_t labels[SAMPLES];

static char directory[64], path[128];

static int make_data(void **state) {
    (void)state;
    random_seed(1);
    for (int i = 0; i < SAMPLES; i++) {
        labels[i] = i % CLASSES;
        for (int j = 0; j < WIDTH; j++)
            points[i * WIDTH + j] = (pd_real)(uniform(-1, 1) + (j % CLASSES == labels[i] ? 2 : 0));
        for (int j = 0; j < 2 * SIDE * SIDE; j++)
            images[i * 2 * SIDE * SIDE + j] = (pd_real)(uniform(-1, 1) + (j % CLASSES == labels[i] ? 0.5 : 0));
    }
    strcpy(directory, "/tmp/test_trainer.XXXXXX");
    if (!mkdtemp(directory)) return -1;
    snprintf(path, sizeof path, "%s/file", directory);
    return 0;
}

/* Number of files in a directory and their bytes; removes them. */
static int empty_directory(const char *where, int64_t *bytes) {
    DIR *dir = opendir(where);
    struct dirent *entry;
    int count = 0;
    while (dir && (entry = readdir(dir)) != NULL) {
        char name[512];
        struct stat s;
        if (entry->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "%s/%s", where, entry->d_name);
        assert_int_equal(stat(name, &s), 0);
        if (S_ISDIR(s.st_mode)) empty_directory(name, bytes);
        else *bytes += s.st_size;
        assert_int_equal(remove(name), 0);
        count++;
    }
    if (dir) closedir(dir);
    return count;
}

static int remove_data(void **state) {
    int64_t bytes;
    (void)state;
    empty_directory(directory, &bytes);
    return rmdir(directory);
}

/* ---- a net, its readers and its trainer ---- */

typedef struct plan {
    uint64_t seed;
    int threads;
    bool conv; /* convolution, batch norm, dropout, pooling instead of fully connected layers */
    double dropout;
    int64_t shuffle; /* pool; 0: as they stand */
    int prefetch;    /* depth */
    double prune;
    pd_optimizer optimizer;
    pd_trainer_opts trainer;
} plan;

static const plan plain = { .seed = 3, .optimizer = { .kind = PD_OPT_SGD, .rate = 0.2 } };

/* Everything random at once. */
static const plan lively = { .seed = 3,
                             .dropout = 0.3,
                             .shuffle = 40,
                             .optimizer = { .kind = PD_OPT_MOMENTUM, .rate = 0.05, .momentum = 0.9 } };
static const plan lively_conv = { .seed = 4,
                                  .conv = true,
                                  .dropout = 0.3,
                                  .shuffle = 100,
                                  .prefetch = 2,
                                  .optimizer = { .kind = PD_OPT_MOMENTUM, .rate = 0.05, .momentum = 0.9 } };

typedef struct model {
    failing_allocator memory; /* never fails; counts */
    pd_net *net;
    pd_layer *out, *cost;
    pd_evaluator *error;
    pd_reader *train, *test;
    pd_trainer *trainer;
} model;

static pd_layer *dense_layers(pd_net *net, pd_layer *x, const plan *p) {
    const pd_fc_opts hidden = { .name = "hidden", .act = PD_TANH, .weight.prune = p->prune };
    pd_layer *h = pd_dropout(net, pd_fc(net, x, 8, &hidden), p->dropout, NULL);
    return pd_fc(net, h, CLASSES, &(pd_fc_opts){ .name = "out", .act = PD_SOFTMAX });
}

static pd_layer *conv_layers(pd_net *net, pd_layer *x, const plan *p) {
    pd_layer *c = pd_conv(net, x, 8, 3, &(pd_conv_opts){ .name = "conv", .pad = 1 });
    pd_layer *n = pd_batch_norm(net, c, &(pd_batch_norm_opts){ .name = "norm", .act = PD_RELU });
    pd_layer *h = pd_pool(net, pd_dropout(net, n, p->dropout, NULL), 2, NULL);
    return pd_fc(net, h, CLASSES, &(pd_fc_opts){ .name = "out", .act = PD_SOFTMAX });
}

static pd_reader *make_reader(model *m, const plan *p, int64_t first, int64_t count) {
    const pd_array arrays[] = { { .data = p->conv ? images + first * 2 * SIDE * SIDE : points + first * WIDTH },
                                { .ids = labels + first } };
    return pd_array_reader(m->net, count, arrays, 2);
}

static void open_model(model *m, const plan *p) {
    pd_net_opts opts = { .seed = p->seed, .threads = p->threads };
    pd_layer *x, *label;
    memset(m, 0, sizeof *m);
    m->memory.fail_at = -1;
    opts.allocator = (pd_allocator){ failing_alloc, failing_free, &m->memory };
    m->net = pd_net_new(&opts);
    x = p->conv ? pd_image(m->net, "x", 2, SIDE, SIDE) : pd_vector(m->net, "x", WIDTH);
    label = pd_label(m->net, "label", CLASSES);
    m->out = p->conv ? conv_layers(m->net, x, p) : dense_layers(m->net, x, p);
    m->cost = pd_cross_entropy(m->net, m->out, label, NULL);
    m->error = pd_eval_error(m->net, m->out, label, &(pd_evaluator_opts){ .name = "wrong" });
    m->train = make_reader(m, p, 0, TRAIN);
    m->test = make_reader(m, p, TRAIN, TEST);
    if (p->shuffle) m->train = pd_shuffle(m->net, m->train, p->shuffle, 7);
    if (p->prefetch) m->train = pd_prefetch(m->net, m->train, p->prefetch);
    m->trainer = pd_trainer_new(m->net, m->cost, p->optimizer, &p->trainer);
    if (!m->trainer || !m->train || !m->test) fail_msg("%s", pd_error(m->net));
}

static void close_model(model *m) {
    pd_reader_free(m->train);
    pd_reader_free(m->test);
    pd_trainer_free(m->trainer);
    pd_net_free(m->net);
    assert_int_equal(m->memory.in_use, 0);
}

/* A hash (FNV-1a) of all parameters and statistics. */
static uint64_t bits_of(pd_net *net) {
    uint64_t hash = UINT64_C(14695981039346656037);
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        size_t bytes = (size_t)p->size * sizeof(pd_real);
        unsigned char *values = (unsigned char *)malloc(bytes);
        assert_non_null(values);
        assert_int_equal(pd_param_get(p, (pd_real *)(void *)values, p->size), PD_OK);
        for (size_t i = 0; i < bytes; i++) hash = (hash ^ values[i]) * UINT64_C(1099511628211);
        free(values);
    }
    return hash;
}

static bool all_finite(pd_net *net) {
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        pd_real values[1024];
        assert_true(p->size <= 1024);
        assert_int_equal(pd_param_get(p, values, p->size), PD_OK);
        for (int64_t i = 0; i < p->size; i++)
            if (!isfinite((double)values[i])) return false;
    }
    return true;
}

static void check_status(const model *m, pd_status got, pd_status expected) {
    if (got != expected)
        fail_msg("expected \"%s\", got \"%s\": %s", pd_status_text(expected), pd_status_text(got), pd_error(m->net));
}

static void train(model *m, int64_t passes, const pd_train_opts *opts) {
    check_status(m, pd_train(m->trainer, m->train, passes, opts), PD_OK);
}

/* A trained model's bits, with `passes` passes in one go. */
static uint64_t bits_after(const plan *p, int64_t passes) {
    const pd_train_opts opts = { .batch_size = BATCH };
    model m;
    uint64_t bits;
    open_model(&m, p);
    train(&m, passes, &opts);
    bits = bits_of(m.net);
    close_model(&m);
    return bits;
}

/* Keeps all events, and stops at number `stop_at`, counted from 1. */
typedef struct diary {
    int count, stop_at;
    pd_event events[256];
    uint64_t bits[256];
} diary;

static int write_diary(void *user, const pd_event *event) {
    diary *d = (diary *)user;
    assert_true(d->count < 256);
    d->events[d->count] = *event;
    d->bits[d->count++] = bits_of(pd_trainer_net(event->trainer));
    return d->count == d->stop_at;
}

/* ---- learning ---- */

static void test_learns(void **state) {
    model m;
    double before, after;
    (void)state;
    open_model(&m, &plain);
    assert_int_equal(pd_test(m.trainer, m.test, 0, &before), PD_OK);
    assert_true(before > 0.5 && pd_evaluator_value(m.error, 0) > 0.2);
    train(&m, 20, NULL);
    assert_int_equal(pd_test(m.trainer, m.test, 7, &after), PD_OK);
    assert_true(after < before / 4);
    assert_true(pd_evaluator_value(m.error, 0) < 0.05);
    assert_int_equal(pd_trainer_samples(m.trainer), 20 * TRAIN);
    assert_string_equal(pd_error(m.net), "");
    close_model(&m);
}

/* The mean cost and the evaluators do not depend on how the test is cut into batches; testing changes nothing. */
static void test_testing(void **state) {
    static const int64_t sizes[] = { 1, 7, 30, 1000 };
    model m;
    double first, cost;
    uint64_t bits;
    (void)state;
    open_model(&m, &plain);
    bits = bits_of(m.net);
    assert_int_equal(pd_test(m.trainer, m.test, 0, &first), PD_OK);
    for (int i = 0; i < COUNT(sizes); i++) {
        int64_t wrong = 0;
        const pd_real *p = pd_predict(m.out, points + TRAIN * WIDTH, TEST);
        for (int s = 0; s < TEST; s++) {
            int best = 0;
            for (int c = 1; c < CLASSES; c++) best = p[s * CLASSES + c] > p[s * CLASSES + best] ? c : best;
            wrong += best != labels[TRAIN + s];
        }
        assert_int_equal(pd_test(m.trainer, m.test, sizes[i], &cost), PD_OK);
        check_near(cost, first, REAL_TOLERANCE, "test cost");
        check_near(pd_evaluator_value(m.error, 0), (double)wrong / TEST, 1e-12, "share of wrong samples");
    }
    assert_int_equal(pd_test(m.trainer, m.test, 0, NULL), PD_OK);
    assert_true(bits_of(m.net) == bits);
    close_model(&m);
}

/* With averaging on it is the averages that are tested, and afterwards the values are back. */
static void test_testing_averages(void **state) {
    plan p = plain;
    model m;
    double tested, averaged, latest;
    uint64_t bits;
    (void)state;
    p.trainer.average_window = 1;
    open_model(&m, &p);
    train(&m, 2, NULL);
    bits = bits_of(m.net);
    assert_int_equal(pd_test(m.trainer, m.test, 0, &tested), PD_OK);
    assert_true(bits_of(m.net) == bits);
    pd_use_average(m.trainer, true);
    assert_true(bits_of(m.net) != bits);
    assert_int_equal(pd_test(m.trainer, m.test, 0, &averaged), PD_OK);
    assert_true(tested == averaged && bits_of(m.net) != bits); /* it leaves swapped in what was */
    train(&m, 2, NULL);
    assert_true(bits_of(m.net) == bits); /* but nobody trains averages */
    pd_trainer_free(m.trainer);
    m.trainer = pd_trainer_new(m.net, m.cost, p.optimizer, NULL);
    assert_int_equal(pd_test(m.trainer, m.test, 0, &latest), PD_OK);
    assert_true(latest != averaged);
    close_model(&m);
}

/* Every step drops others. */
static void test_dropout_changes(void **state) {
    plan p = lively;
    model m;
    pd_batch *batch;
    double first, second;
    (void)state;
    p.optimizer.rate = 1e-20;
    open_model(&m, &p);
    batch = pd_batch_new(m.net);
    assert_int_equal(m.test->next(m.test, batch, BATCH), PD_OK);
    assert_int_equal(pd_train_batch(m.trainer, batch, &first), PD_OK);
    assert_int_equal(pd_train_batch(m.trainer, batch, &second), PD_OK);
    assert_true(first != second);
    pd_batch_free(batch);
    close_model(&m);
}

/* pd_train_batch steps are no part of a pass: the pass that follows sees all samples. */
static void test_single_batches(void **state) {
    model m;
    diary d = { .stop_at = -1 };
    const pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &d };
    pd_batch *batch;
    double cost = -1, last = HUGE_VAL;
    (void)state;
    open_model(&m, &plain);
    batch = pd_batch_new(m.net);
    assert_int_equal(pd_train_batch(m.trainer, batch, &cost), PD_OK); /* an empty one changes nothing */
    assert_true(cost == 0 && pd_trainer_samples(m.trainer) == 0);
    assert_int_equal(m.train->next(m.train, batch, BATCH), PD_OK);
    for (int i = 0; i < 5; i++, last = cost) {
        assert_int_equal(pd_train_batch(m.trainer, batch, &cost), PD_OK);
        assert_true(cost < last);
    }
    assert_int_equal(pd_train_batch(m.trainer, batch, NULL), PD_OK);
    train(&m, 1, &opts);
    assert_int_equal(d.count, BATCHES + 2);
    assert_int_equal(d.events[1].batch, 0);
    assert_int_equal(d.events[BATCHES].samples, 6 * BATCH + TRAIN);
    pd_batch_free(batch);
    close_model(&m);
}

/* ---- events ---- */

static void test_events(void **state) {
    const plan p = { .seed = 3,
                     .optimizer = { .kind = PD_OPT_SGD, .rate = 0.2 },
                     .trainer.schedule = { .kind = PD_SCHEDULE_LINEAR, .a = 0.001 } };
    model m;
    diary d = { .stop_at = -1 };
    pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &d };
    int n = 0;
    double sum = 0, cost;
    (void)state;
    open_model(&m, &p);
    opts.test = m.test;
    train(&m, 3, &opts);
    assert_int_equal(d.count, 3 * (BATCHES + 2));
    for (int pass = 0; pass < 3; pass++)
        for (int k = -1; k <= BATCHES; k++) {
            const pd_event *e = &d.events[n++];
            int64_t seen = pass * TRAIN + smaller((k + 1) * BATCH, TRAIN), samples = smaller(BATCH, TRAIN - k * BATCH);
            assert_int_equal(e->kind, k < 0 ? PD_BEGIN_PASS : k < BATCHES ? PD_END_BATCH : PD_END_PASS);
            assert_ptr_equal(e->trainer, m.trainer);
            assert_int_equal(e->pass, pass);
            assert_int_equal(e->samples, seen);
            check_near(e->rate, 0.2 * fmax(0, 1 - 0.001 * (double)seen), 1e-14, "rate");
            if (k < 0) sum = 0;
            if (k >= 0 && k < BATCHES) {
                assert_int_equal(e->batch, k);
                sum += e->cost * (double)samples;
            }
            if (k == BATCHES) check_near(e->cost, sum / TRAIN, 1e-12, "cost of the pass");
            assert_true((e->test_cost == e->test_cost) == (k == BATCHES));
        }
    assert_int_equal(pd_test(m.trainer, m.test, BATCH, &cost), PD_OK);
    assert_true(cost == d.events[n - 1].test_cost);
    train(&m, 3, &opts); /* finished already */
    assert_int_equal(d.count, n);
    close_model(&m);
}

/* ---- stopping and going on ---- */

/* Stops at event number `stop_at` of three passes and calls again: nothing may be lost or seen twice. */
static void stop_and_go_on(const plan *p, int stop_at, uint64_t expected) {
    model m;
    diary before = { .stop_at = stop_at }, after = { .stop_at = -1 };
    pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &before };
    int batches = 0;
    open_model(&m, p);
    check_status(&m, pd_train(m.trainer, m.train, 3, &opts), PD_STOPPED);
    assert_int_equal(before.count, stop_at);
    opts.user = &after;
    train(&m, 3, &opts);
    if (bits_of(m.net) != expected) fail_msg("stopped at event %d: other bits", stop_at);
    for (int i = 0; i < before.count; i++) batches += before.events[i].kind == PD_END_BATCH;
    for (int i = 0; i < after.count; i++) batches += after.events[i].kind == PD_END_BATCH;
    assert_int_equal(batches, 3 * BATCHES);
    assert_int_equal(pd_trainer_samples(m.trainer), 3 * TRAIN);
    close_model(&m);
}

static void test_stop_and_go_on(void **state) {
    uint64_t expected = bits_after(&lively, 3);
    (void)state;
    for (int stop_at = 1; stop_at <= 3 * (BATCHES + 2); stop_at++) stop_and_go_on(&lively, stop_at, expected);
    stop_and_go_on(&lively_conv, 10, bits_after(&lively_conv, 3));
}

/* Pass by pass is the same as all at once. */
static void test_several_calls(void **state) {
    const pd_train_opts opts = { .batch_size = BATCH };
    model m;
    (void)state;
    open_model(&m, &lively);
    for (int pass = 0; pass <= 4; pass++) train(&m, pass, &opts);
    train(&m, 2, &opts);
    assert_true(bits_of(m.net) == bits_after(&lively, 4));
    close_model(&m);
}

/* The same plan gives the same bits; another seed or another order gives others. */
static void test_seeds(void **state) {
    plan other = lively;
    (void)state;
    other.seed++;
    assert_true(bits_after(&lively, 2) == bits_after(&lively, 2));
    assert_true(bits_after(&lively, 2) != bits_after(&other, 2));
    other = lively;
    other.shuffle = 0;
    assert_true(bits_after(&lively, 2) != bits_after(&other, 2));
    other = lively;
    other.prefetch = 3;
    assert_true(bits_after(&lively, 2) == bits_after(&other, 2));
}

/* ---- checkpoints ---- */

/* Trains, stops at event `stop_at`, saves; a new model of another seed loads that and goes on. */
static void save_and_load(const plan *p, int stop_at, const char *what) {
    model whole, first, second;
    plan other = *p;
    diary d = { .stop_at = stop_at };
    pd_train_opts stopping = { .batch_size = BATCH, .on_event = write_diary, .user = &d };
    const pd_train_opts on = { .batch_size = BATCH };
    other.seed += 17;
    open_model(&whole, p);
    open_model(&first, p);
    open_model(&second, &other);
    train(&second, 1, &on);
    pd_use_average(second.trainer, true); /* all of this must be forgotten */
    train(&whole, 3, &on);
    check_status(&first, pd_train(first.trainer, first.train, 3, &stopping), PD_STOPPED);
    pd_use_average(first.trainer, stop_at % 2 != 0); /* must make no difference to what is saved */
    check_status(&first, pd_checkpoint_save(first.trainer, path), PD_OK);
    check_status(&second, pd_checkpoint_load(second.trainer, path), PD_OK);
    assert_int_equal(pd_trainer_samples(first.trainer), pd_trainer_samples(second.trainer));
    train(&first, 3, &on);
    train(&second, 3, &on);
    for (int averaged = 0; averaged < 2; averaged++) {
        model *all[] = { &whole, &first, &second };
        for (int i = 0; i < 3; i++) pd_use_average(all[i]->trainer, averaged);
        if (bits_of(whole.net) != bits_of(first.net)) fail_msg("%s: saving changed the bits", what);
        if (bits_of(whole.net) != bits_of(second.net)) fail_msg("%s: loading changed the bits", what);
    }
    close_model(&whole);
    close_model(&first);
    close_model(&second);
}

static void test_checkpoints(void **state) {
    const struct {
        const char *name;
        pd_optimizer optimizer;
        bool centered;
    } methods[] = { { "sgd", pd_sgd(0.1), false },
                    { "momentum", pd_momentum(0.05, 0.9), false },
                    { "nesterov", pd_nesterov(0.05, 0.9), false },
                    { "adagrad", pd_adagrad(0.1), false },
                    { "adadelta", pd_adadelta(1), false },
                    { "rmsprop", pd_rmsprop(0.01), false },
                    { "rmsprop, centered", pd_rmsprop(0.01), true },
                    { "decayed_adagrad", pd_decayed_adagrad(0.05), false },
                    { "adam", pd_adam(0.01), false },
                    { "adamw", pd_adamw(0.01), false },
                    { "adamax", pd_adamax(0.01), false } };
    plan p = lively;
    (void)state;
    p.prune = 0.4;
    p.trainer.schedule.warm_up = 50;
    p.trainer.l2 = 0.01;
    for (int i = 0; i < COUNT(methods); i++) {
        p.trainer.average_window = i % 2 ? 0.4 : 0;
        p.optimizer = methods[i].optimizer;
        p.optimizer.centered = methods[i].centered;
        if (methods[i].centered) p.optimizer.momentum = 0.5;
        save_and_load(&p, 4 + i, methods[i].name);
    }
    p = lively_conv;
    p.trainer.average_window = 0.4;
    save_and_load(&p, 11, "convolution");
}

/* The files that pd_train itself writes, after passes and after so many batches. */
static void test_checkpoints_by_the_way(void **state) {
    static const int64_t every[] = { 0, 1, 4 };
    uint64_t expected = bits_after(&lively, 3);
    plan other = lively;
    (void)state;
    other.seed = 99;
    for (int i = 0; i < COUNT(every); i++) {
        model first, second;
        diary d = { .stop_at = 2 * (BATCHES + 2) - 1 }; /* after batch 4 of pass 1: step 10 */
        pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &d, .checkpoint = path };
        const pd_train_opts on = { .batch_size = BATCH };
        opts.checkpoint_every = every[i];
        open_model(&first, &lively);
        check_status(&first, pd_train(first.trainer, first.train, 3, &opts), PD_STOPPED);
        close_model(&first);
        open_model(&second, &other);
        check_status(&second, pd_checkpoint_load(second.trainer, path), PD_OK);
        assert_int_equal(pd_trainer_samples(second.trainer), every[i] == 0   ? TRAIN
                                                             : every[i] == 1 ? 2 * TRAIN
                                                                             : TRAIN + 3 * BATCH);
        train(&second, 3, &on);
        assert_true(bits_of(second.net) == expected);
        close_model(&second);
    }
}

/* ---- readers of our own: scripted trouble ---- */

typedef struct script {
    pd_reader reader;
    int64_t at, fail_at, nan_at; /* samples, -1: never */
    int resets, spoil_from;      /* from this reset on the labels are wrong .. */
    int trouble_from;            /* .. and from this one on come the failure and the NaN */
    pd_status reset_status;
} script;

static pd_status script_next(pd_reader *r, pd_batch *batch, int64_t count) {
    script *s = (script *)r->self;
    for (; count > 0; count--, s->at++) {
        pd_real *row;
        bool trouble = s->resets > s->trouble_from;
        if (trouble && s->at == s->fail_at)
            return pd_reader_fail(r, PD_E_FORMAT, "data.csv:%d: expected a number", (int)s->at);
        if (s->at >= TEST) return PD_END;
        row = pd_batch_add_row(batch, 0);
        memcpy(row, points + (TRAIN + s->at) * WIDTH, WIDTH * sizeof *row);
        if (trouble && s->at == s->nan_at) row[1] = (pd_real)NAN;
        pd_batch_add_id(batch, 1, (labels[TRAIN + s->at] + (s->resets > s->spoil_from)) % CLASSES);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return PD_OK;
}

static pd_status script_reset(pd_reader *r, int64_t pass) {
    script *s = (script *)r->self;
    (void)pass;
    s->at = 0;
    s->resets++;
    if (s->reset_status != PD_OK) return pd_reader_fail(r, s->reset_status, "data.csv: gone");
    return PD_OK;
}

/* In place: it must not be moved. */
static void write_script(script *s) {
    memset(s, 0, sizeof *s);
    s->reader.api_version = PD_API_VERSION;
    s->reader.name = "script";
    s->reader.self = s;
    s->reader.next = script_next;
    s->reader.reset = script_reset;
    s->fail_at = s->nan_at = -1;
    s->spoil_from = 1000;
}

static void test_reader_failures(void **state) {
    model m;
    script s;
    pd_train_opts opts = { .batch_size = BATCH };
    double cost;
    uint64_t bits;
    (void)state;
    open_model(&m, &plain);
    write_script(&s);
    bits = bits_of(m.net);
    s.fail_at = 0;
    check_status(&m, pd_train(m.trainer, &s.reader, 1, &opts), PD_E_FORMAT);
    check_contains(pd_error(m.net), "data.csv:0: expected a number");
    assert_true(bits_of(m.net) == bits);
    s.fail_at = BATCH + 4; /* the four before it are used */
    check_status(&m, pd_train(m.trainer, &s.reader, 1, &opts), PD_E_FORMAT);
    check_contains(pd_error(m.net), "data.csv:20: expected a number");
    assert_int_equal(pd_trainer_samples(m.trainer), BATCH + 4);
    s.reset_status = PD_E_IO;
    check_status(&m, pd_train(m.trainer, &s.reader, 1, &opts), PD_E_IO);
    check_contains(pd_error(m.net), "data.csv: gone");
    check_status(&m, pd_test(m.trainer, &s.reader, 0, &cost), PD_E_IO);
    check_contains(pd_error(m.net), "data.csv: gone");
    s.reset_status = PD_OK;
    s.fail_at = 3;
    check_status(&m, pd_test(m.trainer, &s.reader, 0, &cost), PD_E_FORMAT);
    check_contains(pd_error(m.net), "data.csv:3: expected a number");
    opts.test = &s.reader;
    check_status(&m, pd_train(m.trainer, m.train, 1, &opts), PD_E_FORMAT);
    s.fail_at = -1;
    train(&m, 2, &opts);
    close_model(&m);
}

/* A pass without samples is reported, not repeated for ever. */
static void test_empty_readers(void **state) {
    model m;
    pd_reader *empty;
    double cost = 0;
    const pd_array arrays[] = { { .data = points }, { .ids = labels } };
    (void)state;
    open_model(&m, &plain);
    empty = pd_array_reader(m.net, 0, arrays, 2);
    assert_non_null(empty);
    check_status(&m, pd_train(m.trainer, empty, 2, NULL), PD_E_FORMAT);
    check_contains(pd_error(m.net), "no samples");
    check_status(&m, pd_test(m.trainer, empty, 0, &cost), PD_E_FORMAT);
    assert_string_equal(pd_error(m.net), "reader array: there are no samples to test");
    assert_true(cost != cost);
    pd_reader_free(empty);
    close_model(&m);
}

/* ---- early stopping ---- */

typedef struct best {
    int passes;
    uint64_t bits[32], averaged[32];
    double costs[32];
} best;

static int note_bits(void *user, const pd_event *event) {
    best *b = (best *)user;
    pd_net *net = pd_trainer_net(event->trainer);
    if (event->kind != PD_END_PASS) return 0;
    b->costs[b->passes] = event->test_cost;
    b->bits[b->passes] = bits_of(net);
    pd_use_average(event->trainer, true);
    b->averaged[b->passes++] = bits_of(net);
    pd_use_average(event->trainer, false);
    return 0;
}

/* The test's labels become wrong after `good` tests: it must stop `patience` passes later, at the values of then, and
   these, no average of later ones, must be what is tested. */
static void stop_early(const plan *p, int good, int patience) {
    model m;
    script s;
    best b = { .passes = 0 };
    pd_train_opts opts = { .batch_size = BATCH, .on_event = note_bits, .user = &b };
    double cost;
    open_model(&m, p);
    write_script(&s);
    s.spoil_from = good;
    opts.test = &s.reader;
    opts.patience = patience;
    train(&m, 20, &opts);
    assert_int_equal(b.passes, good + patience);
    assert_true(bits_of(m.net) == (p->trainer.average_window > 0 ? b.averaged : b.bits)[good - 1]);
    s.spoil_from = 1000;
    assert_int_equal(pd_test(m.trainer, &s.reader, BATCH, &cost), PD_OK);
    assert_true(cost == b.costs[good - 1]);
    close_model(&m);
}

static void test_early_stopping(void **state) {
    plan p = plain;
    (void)state;
    stop_early(&p, 4, 1);
    stop_early(&p, 4, 3);
    p.trainer.average_window = 0.5;
    stop_early(&p, 4, 2);
}

/* ---- how a training ends: what is left behind, however it does ---- */

enum {
    BY_PASSES,
    BY_PATIENCE,
    BY_CALLBACK_IN_PASS,
    BY_CALLBACK_AFTER_PASS,
    BY_READER,
    BY_NAN,
    BY_TEST_READER,
    BY_NAN_IN_TEST,
    BY_CHECKPOINT,
    ENDINGS
};

/* What was there after the last step, and at the best test. */
typedef struct witness {
    int ending, tests, batches;
    uint64_t last, best;
    double best_cost;
    char place[250]; /* of the checkpoint */
} witness;

static int witness_event(void *user, const pd_event *event) {
    witness *w = (witness *)user;
    pd_net *net = pd_trainer_net(event->trainer);
    if (event->kind != PD_BEGIN_PASS) w->last = bits_of(net);
    if (event->kind == PD_END_PASS && event->test_cost < w->best_cost) {
        w->best_cost = event->test_cost;
        pd_use_average(event->trainer, true);
        w->best = bits_of(net);
        pd_use_average(event->trainer, false);
    }
    w->tests += event->kind == PD_END_PASS;
    if (w->tests == 5 && event->kind == PD_END_PASS && w->ending == BY_CHECKPOINT) {
        int64_t bytes = 0;
        assert_int_equal(empty_directory(w->place, &bytes), 1);
        assert_int_equal(rmdir(w->place), 0);
    }
    w->batches = event->kind == PD_END_BATCH ? w->batches + 1 : 0;
    return w->tests == 5 && (w->ending == BY_CALLBACK_IN_PASS ? w->batches == 1 : w->ending == BY_CALLBACK_AFTER_PASS);
}

/* Trains up to 8 passes, with trouble in the sixth. The test is best after pass 3, and then becomes wrong. */
static void check_ending(const plan *p, int ending, int patience) {
    static const pd_status statuses[] = { PD_OK,        PD_OK,       PD_STOPPED,   PD_STOPPED, PD_E_FORMAT,
                                          PD_E_NUMERIC, PD_E_FORMAT, PD_E_NUMERIC, PD_E_IO };
    static const char *const messages[] = { "",
                                            "",
                                            "",
                                            "",
                                            "data.csv:9: expected a number",
                                            "x: the input is not finite in row 1 of batch 1 of pass 5",
                                            "data.csv:9: expected a number",
                                            "x: the input is not finite in row 1 of batch 1 of the test",
                                            "nowhere/file" };
    model m, other;
    script data, test;
    witness w = { .ending = ending, .best_cost = HUGE_VAL };
    pd_train_opts opts = { .batch_size = 8, .on_event = witness_event, .user = &w, .patience = patience };
    char file[300];
    uint64_t bits;
    int64_t samples;
    bool in_pass = ending == BY_CALLBACK_IN_PASS || ending == BY_READER || ending == BY_NAN;
    open_model(&m, p);
    open_model(&other, p);
    write_script(&data), write_script(&test);
    opts.test = &test.reader;
    test.spoil_from = 3;
    data.trouble_from = test.trouble_from = 5;
    if (ending == BY_PATIENCE) opts.patience = 2;
    if (ending == BY_READER) data.fail_at = 9;
    if (ending == BY_NAN) data.nan_at = 9;
    if (ending == BY_TEST_READER) test.fail_at = 9;
    if (ending == BY_NAN_IN_TEST) test.nan_at = 9;
    if (ending == BY_CHECKPOINT) { /* whose directory goes away after the fifth pass */
        snprintf(w.place, sizeof w.place, "%s/nowhere", directory);
        assert_int_equal(mkdir(w.place, 0700), 0);
        snprintf(file, sizeof file, "%s/file", w.place);
        opts.checkpoint = file;
    }
    check_status(&m, pd_train(m.trainer, &data.reader, 8, &opts), statuses[ending]);
    check_contains(pd_error(m.net), messages[ending]);
    bits = bits_of(m.net);
    /* what is in the net, and what in a checkpoint */
    assert_true(bits == (opts.patience ? w.best : w.last));
    if (opts.patience) assert_true(w.best != w.last);
    check_status(&m, pd_checkpoint_save(m.trainer, path), PD_OK);
    check_status(&other, pd_checkpoint_load(other.trainer, path), PD_OK);
    assert_true(bits_of(other.net) == w.last);
    assert_true(bits_of(m.net) == bits);
    check_status(&m, pd_save(m.net, path), PD_OK);
    samples = ending == BY_PASSES                ? 8 * TEST
              : ending == BY_PATIENCE            ? 5 * TEST
              : ending == BY_CALLBACK_AFTER_PASS ? 5 * TEST
              : ending == BY_READER              ? 5 * TEST + 9
              : in_pass                          ? 5 * TEST + 8
                                                 : 6 * TEST;
    assert_int_equal(pd_trainer_samples(m.trainer), samples);
    for (pd_param *q = pd_param_first(m.net); q; q = q->next) {
        pd_real grad[1024];
        if (!q->grad) continue;
        assert_int_equal(pd_param_get_grad(q, grad, q->size), PD_OK);
        for (int64_t i = 0; i < q->size; i++) assert_true(grad[i] == 0);
    }
    /* without the trouble it goes on, and sees what is left of the eight passes */
    data.fail_at = data.nan_at = test.fail_at = test.nan_at = -1;
    opts.patience = 0, opts.on_event = NULL, opts.checkpoint = NULL;
    check_status(&m, pd_train(m.trainer, &data.reader, 8, &opts), PD_OK);
    assert_int_equal(pd_trainer_samples(m.trainer), 8 * TEST);
    close_model(&m);
    close_model(&other);
}

static void test_endings(void **state) {
    plan averaging = plain;
    (void)state;
    averaging.trainer.average_window = 0.5;
    for (int ending = 0; ending < ENDINGS; ending++)
        for (int patience = 0; patience <= 20; patience += 20) {
            check_ending(&plain, ending, patience);
            check_ending(&averaging, ending, patience);
        }
}

/* With patience the net has the best values, a checkpoint the last; a training that goes on from it is as if it had not
   been stopped, while this one goes on from the best. */
static void test_best_and_last(void **state) {
    model whole, first, second;
    script data[3], test[3];
    model *all[] = { &whole, &first, &second };
    pd_train_opts opts = { .batch_size = 8, .patience = 4 };
    diary d = { .stop_at = 5 * (TEST / 8 + 3) };
    (void)state;
    for (int i = 0; i < 3; i++) {
        open_model(all[i], &plain);
        write_script(&data[i]), write_script(&test[i]);
        test[i].spoil_from = 3;
    }
    opts.test = &test[0].reader;
    train(&whole, 20, &opts);
    opts.test = &test[1].reader, opts.on_event = write_diary, opts.user = &d;
    check_status(&first, pd_train(first.trainer, first.train, 20, &opts), PD_STOPPED);
    check_status(&first, pd_checkpoint_save(first.trainer, path), PD_OK);
    check_status(&second, pd_checkpoint_load(second.trainer, path), PD_OK);
    opts.test = &test[1].reader, opts.on_event = NULL;
    train(&second, 20, &opts);
    assert_true(bits_of(whole.net) == bits_of(second.net));
    assert_int_equal(pd_trainer_samples(whole.trainer), pd_trainer_samples(second.trainer));
    for (int i = 0; i < 3; i++) close_model(all[i]);
}

/* Each call judges anew, from what there is; so does one that goes on with a checkpoint, but only if the training in there
   had run out of patience. */
static void test_judging_anew(void **state) {
    (void)state;
    for (int by_checkpoint = 0; by_checkpoint < 2; by_checkpoint++) {
        model m;
        script test;
        best b = { .passes = 0 };
        pd_train_opts opts = { .batch_size = BATCH, .on_event = note_bits, .user = &b, .patience = 3 };
        uint64_t bits;
        open_model(&m, &plain);
        write_script(&test);
        test.spoil_from = 4;
        opts.test = &test.reader;
        if (by_checkpoint) opts.checkpoint = path;
        train(&m, 30, &opts);
        assert_int_equal(b.passes, 7);
        bits = bits_of(m.net);
        assert_true(bits == b.bits[3]);
        for (int call = 1; call <= 2; call++) {
            if (by_checkpoint) {
                pd_trainer_free(m.trainer);
                m.trainer = pd_trainer_new(m.net, m.cost, plain.optimizer, NULL);
                check_status(&m, pd_checkpoint_load(m.trainer, path), PD_OK);
            }
            b.passes = 0;
            train(&m, 30, &opts);
            assert_int_equal(b.passes, 3); /* none is better than what it began with */
            assert_true(bits_of(m.net) == bits);
        }
        test.spoil_from = 1000; /* everything is better than the last test */
        b.passes = 0;
        opts.checkpoint = NULL;
        train(&m, 25, &opts);
        assert_int_equal(b.passes, 25 - 13);
        assert_true(bits_of(m.net) != bits);
        close_model(&m);
    }
}

/* A training that comes from a checkpoint and could not begin, or had nothing to do, is what it was. */
static void test_resumed_later(void **state) {
    (void)state;
    for (int k = 0; k < 2; k++) {
        model whole, part;
        script data[2], test[2];
        pd_train_opts opts = { .batch_size = 8, .patience = 4 };
        open_model(&whole, &plain), open_model(&part, &plain);
        for (int i = 0; i < 2; i++) write_script(&data[i]), write_script(&test[i]), test[i].spoil_from = 3;
        opts.test = &test[0].reader;
        check_status(&whole, pd_train(whole.trainer, &data[0].reader, 5, &opts), PD_OK);
        check_status(&whole, pd_checkpoint_save(whole.trainer, path), PD_OK);
        check_status(&part, pd_checkpoint_load(part.trainer, path), PD_OK);
        opts.test = &test[1].reader;
        test[1].resets = 5;
        if (k == 0) { /* a log that can't be opened: nothing has happened yet */
            opts.csv_log = "/nowhere/log.csv";
            check_status(&part, pd_train(part.trainer, &data[1].reader, 20, &opts), PD_E_IO);
            opts.csv_log = NULL;
        } else { /* no passes to do */
            check_status(&part, pd_train(part.trainer, &data[1].reader, 5, &opts), PD_OK);
        }
        assert_true(bits_of(part.net) == bits_of(whole.net)); /* the best values, but the last are still there */
        check_status(&part, pd_checkpoint_save(part.trainer, path), PD_OK);
        check_status(&whole, pd_checkpoint_load(whole.trainer, path), PD_OK);
        check_status(&part, pd_checkpoint_load(part.trainer, path), PD_OK);
        assert_true(bits_of(part.net) == bits_of(whole.net));
        test[0].resets = test[1].resets = 5;
        check_status(&part, pd_train(part.trainer, &data[1].reader, 20, &opts), PD_OK);
        opts.test = &test[0].reader;
        check_status(&whole, pd_train(whole.trainer, &data[0].reader, 20, &opts), PD_OK);
        assert_true(bits_of(part.net) == bits_of(whole.net));
        assert_int_equal(pd_trainer_samples(part.trainer), pd_trainer_samples(whole.trainer));
        close_model(&whole), close_model(&part);
    }
}

/* A call that has nothing to train leaves a checkpoint the last values. */
static void test_nothing_to_train(void **state) {
    model m;
    script data, test;
    pd_train_opts opts = { .batch_size = 8, .patience = 20, .test = &test.reader };
    static char first[1 << 16], second[1 << 16];
    size_t sizes[2];
    (void)state;
    open_model(&m, &plain);
    write_script(&data), write_script(&test);
    test.spoil_from = 3;
    for (int i = 0; i < 2; i++) {
        FILE *f;
        check_status(&m, pd_train(m.trainer, &data.reader, 6, &opts), PD_OK);
        check_status(&m, pd_checkpoint_save(m.trainer, path), PD_OK);
        f = fopen(path, "rb");
        assert_non_null(f);
        sizes[i] = fread(i ? second : first, 1, sizeof first, f);
        fclose(f);
    }
    assert_true(sizes[0] == sizes[1] && sizes[0] < sizeof first);
    assert_memory_equal(first, second, sizes[0]);
    close_model(&m);
}

/* What the net has loaded before is tested first; and values that come by pd_param_set between two calls count, not those
   of a checkpoint. */
static void test_given_values(void **state) {
    (void)state;
    for (int k = 0; k < 2; k++) {
        model good, m;
        script data, test;
        pd_train_opts opts = { .batch_size = 8, .patience = 2, .test = &test.reader };
        pd_real values[1024];
        uint64_t bits;
        open_model(&good, &plain), open_model(&m, &plain);
        write_script(&data), write_script(&test);
        train(&good, 20, &(pd_train_opts){ .batch_size = 8 });
        check_status(&good, pd_save(good.net, path), PD_OK);
        bits = bits_of(good.net);
        if (k == 1) { /* a training with worse values behind it, from a checkpoint */
            char other[300];
            snprintf(other, sizeof other, "%s/other", directory);
            check_status(&m, pd_train(m.trainer, &data.reader, 1, &opts), PD_OK);
            check_status(&m, pd_checkpoint_save(m.trainer, other), PD_OK);
            check_status(&m, pd_checkpoint_load(m.trainer, other), PD_OK);
            remove(other);
            for (pd_param *p = pd_param_first(m.net), *q = pd_param_first(good.net); p; p = p->next, q = q->next) {
                assert_true(q->size <= COUNT(values));
                assert_int_equal(pd_param_get(q, values, q->size), PD_OK);
                assert_int_equal(pd_param_set(p, values, p->size), PD_OK);
            }
        } else {
            check_status(&m, pd_load(m.net, path, NULL), PD_OK);
        }
        data.spoil_from = data.resets; /* what comes can only be worse */
        check_status(&m, pd_train(m.trainer, &data.reader, 9, &opts), PD_OK);
        assert_int_equal(pd_trainer_samples(m.trainer), (2 + k) * TEST);
        assert_true(bits_of(m.net) == bits);
        close_model(&good), close_model(&m);
    }
}

/* Layers may be added between two calls. */
static void test_net_that_grows(void **state) {
    model m;
    script data, test;
    pd_train_opts opts = { .batch_size = 8, .patience = 5, .test = &test.reader };
    (void)state;
    open_model(&m, &plain);
    write_script(&data), write_script(&test);
    check_status(&m, pd_train(m.trainer, &data.reader, 2, &opts), PD_OK);
    assert_non_null(pd_fc(m.net, m.out, 300, &(pd_fc_opts){ .name = "grown" }));
    check_status(&m, pd_checkpoint_save(m.trainer, path), PD_OK);
    check_status(&m, pd_train(m.trainer, &data.reader, 4, &opts), PD_OK);
    check_status(&m, pd_checkpoint_save(m.trainer, path), PD_OK);
    check_status(&m, pd_checkpoint_load(m.trainer, path), PD_OK);
    assert_non_null(pd_fc(m.net, m.out, 500, NULL));
    close_model(&m);
}

/* Averaged values that on_event leaves in the net are gone at the end, and are not taken for the best. */
static int leave_averages(void *user, const pd_event *event) {
    (void)user;
    if (event->kind != PD_END_PASS) return 0;
    pd_use_average(event->trainer, true);
    return event->pass == 5;
}

static void test_averages_left(void **state) {
    plan averaging = plain;
    (void)state;
    averaging.trainer.average_window = 0.5;
    for (int patience = 0; patience <= 9; patience += 9) {
        model m, other;
        script data[2], test[2];
        pd_train_opts opts = { .batch_size = 8, .patience = patience };
        open_model(&m, &averaging), open_model(&other, &averaging);
        for (int i = 0; i < 2; i++) write_script(&data[i]), write_script(&test[i]), test[i].spoil_from = 3;
        opts.test = &test[0].reader;
        check_status(&other, pd_train(other.trainer, &data[0].reader, 6, &opts), PD_OK);
        opts.test = &test[1].reader, opts.on_event = leave_averages;
        check_status(&m, pd_train(m.trainer, &data[1].reader, 9, &opts), PD_STOPPED);
        assert_true(bits_of(m.net) == bits_of(other.net));
        pd_use_average(m.trainer, false);
        assert_true(bits_of(m.net) == bits_of(other.net));
        close_model(&m), close_model(&other);
    }
}

/* ---- what is in use ---- */

typedef struct meddler {
    model *m;
    pd_batch *batch;
    int calls;
} meddler;

/* From within pd_train: what would spoil it is refused by name, the rest works. */
static int meddle(void *user, const pd_event *event) {
    meddler *x = (meddler *)user;
    model *m = x->m;
    double cost;
    if (event->kind == PD_END_BATCH && event->batch > 1) return 0;
    x->calls++;
    check_status(m, pd_train(m->trainer, m->test, 9, NULL), PD_E_STATE);
    assert_string_equal(pd_error(m->net), "pd_train: this trainer is in use, by pd_train");
    check_status(m, pd_train_batch(m->trainer, x->batch, NULL), PD_E_STATE);
    check_status(m, pd_checkpoint_load(m->trainer, path), PD_E_STATE);
    pd_trainer_free(m->trainer); /* does nothing */
    assert_string_equal(pd_error(m->net), "pd_trainer_free: this trainer is in use, by pd_train");
    if (event->kind == PD_END_PASS) {
        check_status(m, pd_test(m->trainer, m->train, BATCH, &cost), PD_OK);
    } else {
        check_status(m, pd_test(m->trainer, m->train, BATCH, &cost), PD_E_STATE);
        check_contains(pd_error(m->net), "pd_test: reader ");
        check_contains(pd_error(m->net), " is in use, by pd_train in the midst of a pass");
    }
    check_status(m, pd_test(m->trainer, m->test, BATCH, &cost), PD_OK);
    check_status(m, pd_checkpoint_save(m->trainer, path), PD_OK);
    return 0;
}

static void test_in_use(void **state) {
    model m;
    meddler x = { &m, NULL, 0 };
    (void)state;
    open_model(&m, &lively);
    x.batch = pd_batch_new(m.net);
    assert_int_equal(m.test->next(m.test, x.batch, BATCH), PD_OK);
    train(&m, 3, &(pd_train_opts){ .batch_size = BATCH, .on_event = meddle, .user = &x });
    assert_int_equal(x.calls, 12);
    assert_int_equal(pd_trainer_samples(m.trainer), 3 * TRAIN);
    assert_true(bits_of(m.net) == bits_after(&lively, 3));
    pd_batch_free(x.batch);
    close_model(&m);
}

/* A reader that tests with the trainer that waits for it, and one that has no second pass. */
static model *reader_model;
static pd_status testing_next(void *user, pd_batch *batch) {
    double cost;
    (void)user, (void)batch;
    check_status(reader_model, pd_test(reader_model->trainer, reader_model->test, 0, &cost), PD_E_STATE);
    check_contains(pd_error(reader_model->net), "pd_test: this trainer is in use");
    check_status(reader_model, pd_train(reader_model->trainer, reader_model->train, 1, NULL), PD_E_STATE);
    return PD_END;
}
static pd_status one_sample(void *user, pd_batch *batch) {
    pd_real *row = *(int *)user > 0 ? pd_batch_add_row(batch, 0) : NULL;
    if ((*(int *)user)-- <= 0) return PD_END;
    memcpy(row, points, WIDTH * sizeof *row);
    return pd_batch_add_id(batch, 1, labels[0]);
}
static pd_status one_pass(void *user, int64_t pass) {
    *(int *)user = 3;
    return pass == 0 ? PD_OK : PD_END;
}

static void test_in_use_by_reader(void **state) {
    model m;
    int left = 0;
    pd_reader *reader;
    double cost;
    (void)state;
    open_model(&m, &plain);
    reader_model = &m;
    reader = pd_stream_reader(m.net, testing_next, NULL, NULL);
    check_status(&m, pd_test(m.trainer, reader, 0, &cost), PD_E_FORMAT);
    check_status(&m, pd_train(m.trainer, reader, 1, NULL), PD_E_FORMAT);
    pd_reader_free(reader);
    reader = pd_stream_reader(m.net, one_sample, one_pass, &left);
    for (int i = 0; i < 2; i++) {
        check_status(&m, pd_train(m.trainer, reader, 2, NULL), PD_E_STATE);
        check_contains(pd_error(m.net), "pass 1 could not be begun");
        assert_int_equal(pd_trainer_samples(m.trainer), 3);
    }
    pd_reader_free(reader);
    close_model(&m);
}

/* A step begins with gradients of 0, whatever the user's own backward or a check left. */
static void test_left_over_gradients(void **state) {
    uint64_t expected = 0;
    (void)state;
    for (int k = 0; k < 4; k++) {
        model m;
        pd_batch *batch;
        pd_gradcheck checked;
        open_model(&m, &plain);
        batch = pd_batch_new(m.net);
        assert_int_equal(m.test->next(m.test, batch, BATCH), PD_OK);
        if (k == 1 || k == 3) {
            assert_int_equal(pd_forward(m.net, batch, PD_CHECK, &m.cost, 1), PD_OK);
            assert_int_equal(pd_backward(m.net, m.cost), PD_OK);
        }
        if (k == 2) assert_int_equal(pd_check_gradients(m.cost, batch, NULL, &checked), PD_OK);
        if (k == 3) { /* a step that fails */
            batch->slots[0].data[0] = (pd_real)NAN;
            check_status(&m, pd_train_batch(m.trainer, batch, NULL), PD_E_NUMERIC);
            batch->slots[0].data[0] = points[TRAIN * WIDTH];
        }
        check_status(&m, pd_train_batch(m.trainer, batch, NULL), PD_OK);
        check_status(&m, pd_train_batch(m.trainer, batch, NULL), PD_OK);
        if (k == 0) expected = bits_of(m.net);
        if (bits_of(m.net) != expected) fail_msg("case %d: other bits", k);
        pd_batch_free(batch);
        close_model(&m);
    }
}

/* Each pass in a new trainer that loads a checkpoint: the count of bad tests and the best values are not forgotten. */
static void test_early_stopping_is_saved(void **state) {
    model first, second;
    script s;
    best b = { .passes = 0 };
    pd_train_opts opts = { .batch_size = BATCH, .on_event = note_bits, .user = &b, .patience = 3 };
    (void)state;
    open_model(&first, &plain);
    open_model(&second, &plain);
    write_script(&s);
    s.spoil_from = 4;
    opts.test = &s.reader;
    train(&first, 10, &opts);
    s.resets = 0;
    opts.on_event = NULL;
    opts.checkpoint = path;
    for (int pass = 1; pass <= 6; pass++) {
        diary d = { .stop_at = BATCHES + 2 };
        opts.on_event = write_diary;
        opts.user = &d;
        pd_trainer_free(second.trainer);
        second.trainer = pd_trainer_new(second.net, second.cost, plain.optimizer, NULL);
        if (pass > 1) check_status(&second, pd_checkpoint_load(second.trainer, path), PD_OK);
        check_status(&second, pd_train(second.trainer, second.train, 10, &opts), PD_STOPPED);
    }
    opts.on_event = NULL;
    pd_trainer_free(second.trainer);
    second.trainer = pd_trainer_new(second.net, second.cost, plain.optimizer, NULL);
    check_status(&second, pd_checkpoint_load(second.trainer, path), PD_OK);
    train(&second, 10, &opts);
    assert_int_equal(s.resets, 7);
    assert_true(bits_of(second.net) == bits_of(first.net));
    close_model(&first);
    close_model(&second);
}

/* ---- numbers that are not finite ---- */

/* Expects pd_train_batch to fail with all these parts in the message. */
static void expect_numeric(model *m, const pd_batch *batch, const char *const *parts, int count) {
    check_status(m, pd_train_batch(m->trainer, batch, NULL), PD_E_NUMERIC);
    for (int i = 0; i < count; i++) check_contains(pd_error(m->net), parts[i]);
    assert_null(strchr(pd_error(m->net), '\n'));
}

/* Bad numbers in the data are named by input, row, batch and pass. Values and statistics stay finite, and training can
   go on. */
static void spoil_data(const plan *p) {
    const pd_real bad[] = { (pd_real)NAN, (pd_real)INFINITY, -(pd_real)INFINITY };
    static const char *const parts[] = { "x: the input", "row 5", "batch 2 of pass 1" };
    for (int k = 0; k < COUNT(bad); k++) {
        model m;
        pd_batch *batch;
        diary d = { .stop_at = BATCHES + 2 + 3 }; /* after batch 1 of pass 1 */
        const pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &d };
        uint64_t bits;
        open_model(&m, p);
        batch = pd_batch_new(m.net);
        check_status(&m, pd_train(m.trainer, m.train, 3, &opts), PD_STOPPED);
        assert_int_equal(m.test->next(m.test, batch, BATCH), PD_OK);
        batch->slots[0].data[5 * batch->slots[0].width + 1] = bad[k];
        bits = bits_of(m.net);
        expect_numeric(&m, batch, parts, COUNT(parts));
        if (!p->conv && k == 0) assert_true(bits_of(m.net) == bits); /* else a bounded activation lets it get on */
        assert_true(all_finite(m.net));
        check_status(&m, pd_train(m.trainer, m.train, 3, NULL), PD_OK);
        assert_true(all_finite(m.net));
        pd_batch_free(batch);
        close_model(&m);
    }
}

static void test_bad_data(void **state) {
    (void)state;
    spoil_data(&plain);
    spoil_data(&lively);
}

static void test_bad_data_and_batch_norm(void **state) {
    (void)state;
    spoil_data(&lively_conv);
}

/* A net of its own: x -> fc "low" -> act -> fc "high" -> squared error with x's first number. */
static void open_regression(model *m, pd_act act, double init, pd_optimizer optimizer, const pd_trainer_opts *opts) {
    pd_net_opts net_opts = { .seed = 1 };
    pd_layer *x, *y, *low;
    memset(m, 0, sizeof *m);
    m->memory.fail_at = -1;
    net_opts.allocator = (pd_allocator){ failing_alloc, failing_free, &m->memory };
    m->net = pd_net_new(&net_opts);
    x = pd_vector(m->net, "x", 2);
    y = pd_vector(m->net, "y", 1);
    low = pd_fc(m->net, x, 3,
                &(pd_fc_opts){ .name = "low", .act = act, .no_bias = true, .weight.init = pd_constant(init) });
    m->out = pd_fc(m->net, low, 1, &(pd_fc_opts){ .name = "high", .weight.init = pd_constant(1) });
    m->cost = pd_squared_error(m->net, m->out, y, NULL);
    m->trainer = pd_trainer_new(m->net, m->cost, optimizer, opts);
    if (!m->trainer) fail_msg("%s", pd_error(m->net));
}

static pd_batch *regression_batch(model *m, double x0, double x1, double y) {
    pd_batch *batch = pd_batch_new(m->net);
    for (int i = 0; i < 4; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        row[0] = (pd_real)x0, row[1] = (pd_real)x1;
        *pd_batch_add_row(batch, 1) = (pd_real)y;
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

#define NEARLY_0 (sizeof(pd_real) == 8 ? 1e-310 : 1e-40) /* its logarithm is finite, the slope is not */

/* A layer whose output or gradient is infinite: said with layer, parameter and batch; values stay as they can be. */
static void test_bad_layers(void **state) {
    static const struct {
        pd_act act;
        double init;
        const char *parts[3];
    } cases[] = { { PD_LOG, NEARLY_0, { "low: the gradient of parameter \"low.weight\"", "batch 0", "pass 0" } },
                  { PD_LOG, 0, { "low: the output", "row 0", "batch 0" } },
                  { PD_RECIPROCAL, 0, { "low: the output", "row 0", "batch 0" } },
                  { PD_SQRT, -1, { "low: the output", "row 0", "batch 0" } },
                  { PD_EXP, 1e4, { "low: the output", "row 0", "batch 0" } } };
    static const pd_trainer_opts options[] = { { .l2 = 0 }, { .clip_norm = 1 }, { .clip_value = 1 } };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++)
        for (int k = 0; k < COUNT(options); k++) {
            model m;
            pd_batch *batch;
            pd_real grad[6];
            uint64_t bits;
            open_regression(&m, cases[i].act, cases[i].init, pd_sgd(0.1), &options[k]);
            batch = regression_batch(&m, 1, 2, 1);
            bits = bits_of(m.net);
            expect_numeric(&m, batch, cases[i].parts, 3);
            assert_true(all_finite(m.net));
            if (options[k].clip_norm > 0) assert_true(bits_of(m.net) == bits); /* no step before all are known */
            assert_int_equal(pd_param_get_grad(pd_param_find(m.net, "low.weight"), grad, 6), PD_OK);
            for (int j = 0; j < 6; j++) assert_true(grad[j] == 0);
            assert_int_equal(pd_trainer_samples(m.trainer), 0);
            pd_batch_free(batch);
            close_model(&m);
        }
}

/* With clip_norm nothing steps before all is known to be finite, also what comes before the bad parameter. */
static void test_bad_last_parameter(void **state) {
    const pd_fc_opts fine = { .name = "fine" },
                     bad = { .name = "bad", .act = PD_LOG, .weight.init = pd_constant(NEARLY_0) };
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 2), *costs[2];
    pd_trainer *trainer;
    pd_batch *batch;
    pd_real *row;
    uint64_t bits;
    (void)state;
    costs[0] = pd_sum_cost(net, pd_fc(net, x, 2, &fine), NULL);
    costs[1] = pd_sum_cost(net, pd_fc(net, x, 2, &bad), NULL);
    trainer = pd_trainer_new(net, pd_add(net, costs, 2, NULL), pd_momentum(0.1, 0.9),
                             &(pd_trainer_opts){ .clip_norm = 1, .l2 = 0.1 });
    batch = pd_batch_new(net);
    row = pd_batch_add_row(batch, 0);
    row[0] = row[1] = 1;
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    bits = bits_of(net);
    assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_E_NUMERIC);
    check_contains(pd_error(net), "bad: the gradient of parameter \"bad.weight\"");
    assert_true(bits_of(net) == bits);
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

/* A rate that is too large: the weights grow until the cost is beyond the range, with every value still finite. */
static void test_explosion(void **state) {
    model m;
    pd_batch *batch;
    pd_status status = PD_OK;
    int steps = 0;
    char where[64];
    (void)state;
    open_regression(&m, PD_LINEAR, 0.5, pd_sgd(10), NULL);
    batch = regression_batch(&m, 1, 2, 3);
    while (status == PD_OK && steps < 1000) {
        assert_true(all_finite(m.net));
        status = pd_train_batch(m.trainer, batch, NULL);
        steps += status == PD_OK;
    }
    check_status(&m, status, PD_E_NUMERIC);
    snprintf(where, sizeof where, "batch %d of pass 0", steps);
    check_contains(pd_error(m.net), where);
    assert_int_equal(pd_trainer_samples(m.trainer), 4 * steps);
    pd_batch_free(batch);
    close_model(&m);
}

/* A parameter that is not finite, however it came about, is named before the layers that it spoils. */
static void test_bad_parameter(void **state) {
    static const char *const parts[] = { "high: parameter \"high.weight\"", "before batch 0 of pass 0" };
    model m;
    pd_batch *batch;
    (void)state;
    open_regression(&m, PD_TANH, 0.5, pd_adam(0.1), NULL);
    batch = regression_batch(&m, 1, 2, 3);
    pd_param_find(m.net, "high.weight")->value[1] = (pd_real)NAN;
    expect_numeric(&m, batch, parts, COUNT(parts));
    pd_batch_free(batch);
    close_model(&m);
}

/* ---- logs and what is shown ---- */

static char *read_text(const char *name) {
    static char text[65536];
    FILE *f = fopen(name, "rb");
    size_t n;
    assert_non_null(f);
    n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = '\0';
    return text;
}

/* The fields of a CSV line; returns the start of the next line. */
static char *split(char *line, char **fields, int *count) {
    char *end = strchr(line, '\n');
    assert_non_null(end);
    *end = '\0';
    for (*count = 0; line; line = strchr(line, ',') ? strchr(line, ',') + 1 : NULL) {
        assert_true(*count < 16);
        fields[(*count)++] = line;
    }
    for (int i = 1; i < *count; i++) fields[i][-1] = '\0';
    return end + 1;
}

/* Two calls append to one file, with one heading; every second batch has a line without test values. */
static void check_csv(const char *locale) {
    model m;
    diary d = { .stop_at = -1 };
    pd_train_opts opts = { .batch_size = BATCH, .on_event = write_diary, .user = &d, .csv_log = path, .log_every = 2 };
    char *text, *fields[16];
    int count, lines = 0;
    remove(path);
    open_model(&m, &plain);
    opts.test = m.test;
    setlocale(LC_NUMERIC, locale);
    train(&m, 1, &opts);
    train(&m, 2, &opts);
    setlocale(LC_NUMERIC, "C");
    text = read_text(path);
    assert_int_equal(strncmp(text, "pass,samples,seconds,rate,cost,test_cost,wrong.error\n", 53), 0);
    text = split(text, fields, &count);
    for (int i = 0, steps = 0; i < d.count; i++) { /* what the callback saw must stand there */
        const pd_event *e = &d.events[i];
        bool end = e->kind == PD_END_PASS;
        if (e->kind == PD_END_BATCH) steps++;
        if (!(end || (e->kind == PD_END_BATCH && steps % 2 == 0))) continue;
        text = split(text, fields, &count);
        lines++;
        assert_int_equal(count, 7);
        assert_int_equal(atoi(fields[0]), e->pass + end);
        assert_int_equal(atoi(fields[1]), e->samples);
        assert_true(strtod(fields[2], NULL) >= 0);
        check_near(strtod(fields[3], NULL), 0.2, 1e-8, "rate");
        check_near(strtod(fields[4], NULL), e->cost, 1e-8, "cost");
        if (end) check_near(strtod(fields[5], NULL), e->test_cost, 1e-8, "test cost");
        assert_true((*fields[5] != 0) == end && (*fields[6] != 0) == end);
    }
    assert_int_equal(lines, 2 + BATCHES);
    assert_int_equal(*text, 0);
    close_model(&m);
}

static void test_csv_log(void **state) {
    (void)state;
    check_csv("C");
    check_csv("de_DE.UTF-8"); /* where the decimal sign is a comma; C again if that isn't installed */
}

static void test_tensorboard(void **state) {
    model m;
    char where[96];
    int64_t bytes = 0;
    pd_train_opts opts = { .tensorboard = where, .log_every = 1 };
    (void)state;
    snprintf(where, sizeof where, "%s/new/runs", directory);
    open_model(&m, &plain);
    opts.test = m.test;
    train(&m, 1, &opts);
    train(&m, 3, &opts);
    close_model(&m);
    assert_int_equal(empty_directory(where, &bytes), 2);
    assert_true(bytes > 500);
}

/* Files that can't be written are reported by name, before anything is trained. */
static void test_bad_logs(void **state) {
    static const struct {
        pd_train_opts opts;
        const char *text;
    } cases[] = { { { .csv_log = "/nowhere/log.csv" }, "/nowhere/log.csv" },
                  { { .tensorboard = "/dev/null/runs" }, "/dev/null/runs" },
                  { { .csv_log = "/dev/full" }, "/dev/full" },
                  { { .checkpoint = "/nowhere/checkpoint" }, "/nowhere/checkpoint" } };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++) {
        model m;
        open_model(&m, &plain);
        check_status(&m, pd_train(m.trainer, m.train, 1, &cases[i].opts), PD_E_IO);
        check_contains(pd_error(m.net), cases[i].text);
        close_model(&m);
    }
}

/* Trains two passes with stdout and stderr going to `path`. */
static const char *printed(bool progress, bool tested) {
    model m;
    pd_train_opts opts = { .batch_size = BATCH, .progress = progress };
    int kept[2], file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    pd_status status;
    open_model(&m, &plain);
    if (tested) opts.test = m.test;
    for (int i = 0; i < 2; i++) {
        fflush(i ? stderr : stdout);
        kept[i] = dup(i + 1);
        dup2(file, i + 1);
    }
    status = pd_train(m.trainer, m.train, 2, &opts);
    pd_train(NULL, m.train, 2, &opts);
    pd_train(m.trainer, NULL, 2, &opts);
    for (int i = 0; i < 2; i++) {
        fflush(i ? stderr : stdout);
        dup2(kept[i], i + 1);
        close(kept[i]);
    }
    close(file);
    check_status(&m, status, PD_OK);
    close_model(&m);
    return read_text(path);
}

static void test_progress(void **state) {
    const char *text;
    (void)state;
    assert_string_equal(printed(false, true), "");
    text = printed(true, false);
    check_contains(text, "pass 1/2: cost ");
    check_contains(text, "pass 2/2: cost ");
    assert_null(strstr(text, "test cost"));
    assert_null(strchr(text, '\r')); /* not a terminal */
    text = printed(true, true);
    check_contains(text, ", test cost ");
    check_contains(text, ", error ");
    assert_int_equal(strlen(strchr(strchr(text, '\n') + 1, '\n')), 1); /* one line per pass */
}

/* Events go to the log hook: failures as they happen. */
static void count_lines(void *user, pd_status status, const char *text) {
    int *counts = (int *)user;
    assert_null(strchr(text, '\n'));
    counts[status != PD_OK]++;
}

static void test_logger(void **state) {
    int counts[2] = { 0, 0 };
    pd_net_opts opts = { .logger = { count_lines, counts } };
    pd_net *net = pd_net_new(&opts);
    pd_trainer *trainer;
    pd_layer *cost = pd_sum_cost(net, pd_fc(net, pd_vector(net, "x", 2), 1, NULL), NULL);
    (void)state;
    trainer = pd_trainer_new(net, cost, pd_sgd(0.1), NULL);
    assert_int_equal(pd_train(trainer, NULL, 1, NULL), PD_E_ARGUMENT);
    assert_int_equal(counts[0], 0);
    assert_int_equal(counts[1], 1);
    assert_int_equal(pd_save(net, path), PD_OK);
    assert_int_equal(counts[0], 1);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

static void test_texts(void **state) {
    model m;
    char text[8192], small[10];
    size_t length;
    const char *graph;
    (void)state;
    open_model(&m, &lively_conv);
    train(&m, 1, NULL);
    length = pd_profile(m.trainer, text, sizeof text);
    assert_int_equal(length, strlen(text));
    for (int i = 0; pd_layer_at(m.net, i); i++) check_contains(text, pd_layer_at(m.net, i)->name);
    check_contains(text, "2x12x12");
    check_contains(text, "waiting for data: ");
    assert_int_equal(pd_profile(m.trainer, small, sizeof small), length);
    assert_int_equal(strlen(small), sizeof small - 1);
    assert_int_equal(pd_profile(m.trainer, NULL, 0), length);
    assert_int_equal(pd_profile(NULL, text, sizeof text), 0);

    length = pd_info(m.net, text, sizeof text);
    assert_int_equal(length, strlen(text));
    check_contains(text, PD_VERSION);
    check_contains(text, sizeof(pd_real) == 8 ? "double" : "float");
    check_contains(text, "threads");
    assert_true(pd_info(NULL, small, sizeof small) > 0);

    assert_int_equal(pd_graphviz(m.net, path), PD_OK);
    graph = read_text(path);
    check_contains(graph, "digraph");
    check_contains(graph, "conv\\nconv\\n8x12x12");
    check_contains(graph, "norm\\nbatch_norm relu");
    check_contains(graph, "n0 -> n2;"); /* x into conv; label is n1 */
    check_status(&m, pd_graphviz(m.net, "/nowhere/net.dot"), PD_E_IO);
    check_contains(pd_error(m.net), "/nowhere/net.dot");
    check_status(&m, pd_graphviz(m.net, NULL), PD_E_IO);
    assert_int_equal(pd_graphviz(NULL, path), PD_E_MEMORY);
    close_model(&m);
}

/* ---- threads ---- */

static void test_same_bits_for_any_threads(void **state) {
    plan p = lively_conv;
    uint64_t expected;
    (void)state;
    p.threads = 1;
    expected = bits_after(&p, 2);
    for (int threads = 2; threads <= 4; threads++) {
        p.threads = threads;
        assert_true(bits_after(&p, 2) == expected);
    }
}

typedef struct task {
    plan p;
    uint64_t bits;
    pthread_t thread;
} task;

static void *run_task(void *argument) {
    task *t = (task *)argument;
    t->bits = bits_after(&t->p, 3);
    return NULL;
}

static void test_nets_in_threads(void **state) {
    task tasks[2] = { { .p = lively }, { .p = lively_conv } };
    (void)state;
    for (int i = 0; i < 2; i++) {
        tasks[i].p.threads = 1;
        assert_int_equal(pthread_create(&tasks[i].thread, NULL, run_task, &tasks[i]), 0);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(tasks[i].thread, NULL), 0);
        assert_true(tasks[i].bits == bits_after(&tasks[i].p, 3));
    }
}

/* ---- memory ---- */

/* After the first passes neither steps, readers, tests nor callbacks take any. */
static void test_no_allocation_later(void **state) {
    plan plans[] = { plain, lively, lively_conv, lively_conv };
    (void)state;
    plans[0].trainer.clip_norm = 1;
    plans[2].prefetch = 0;
    plans[2].trainer.average_window = 0.5;
    for (int i = 0; i < COUNT(plans); i++) {
        model m;
        pd_train_opts opts = { .batch_size = BATCH };
        int64_t calls;
        double cost;
        open_model(&m, &plans[i]);
        opts.test = m.test;
        opts.patience = 100;
        train(&m, 2, &opts);
        calls = m.memory.calls;
        train(&m, 6, &opts);
        assert_int_equal(pd_test(m.trainer, m.test, 7, &cost), PD_OK);
        if (m.memory.calls != calls) fail_msg("plan %d: %d allocations", i, (int)(m.memory.calls - calls));
        close_model(&m);
    }
}

/* ---- two trainers of one net ---- */

/* Both train "shared"; each must take its own steps, whichever was made last. */
static void test_two_trainers(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 1);
    const pd_fc_opts a = { .no_bias = true, .weight = { .name = "shared", .init = pd_constant(1) } };
    const pd_fc_opts b = { .no_bias = true, .weight = { .name = "extra", .init = pd_constant(1) } };
    pd_layer *extra = pd_fc(net, x, 1, &b), *first = pd_fc(net, x, 1, &a), *second = pd_fc(net, extra, 1, &a);
    pd_trainer *one = pd_trainer_new(net, pd_sum_cost(net, first, NULL), pd_sgd(0.25), NULL);
    pd_trainer *two = pd_trainer_new(net, pd_sum_cost(net, second, NULL), pd_sgd(0.5), NULL);
    pd_batch *batch = pd_batch_new(net);
    double shared = 1, other = 1;
    pd_real value;
    (void)state;
    if (!one || !two) fail_msg("%s", pd_error(net));
    *pd_batch_add_row(batch, 0) = 1;
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    for (int i = 0; i < 3; i++) {
        double before = shared;
        assert_int_equal(pd_train_batch(one, batch, NULL), PD_OK); /* cost = shared x */
        before = shared -= 0.25;
        assert_int_equal(pd_train_batch(two, batch, NULL), PD_OK); /* cost = shared extra x */
        shared -= 0.5 * other;
        other -= 0.5 * before;
        pd_param_get(pd_param_find(net, "shared"), &value, 1);
        check_near((double)value, shared, REAL_TOLERANCE, "shared");
        pd_param_get(pd_param_find(net, "extra"), &value, 1);
        check_near((double)value, other, REAL_TOLERANCE, "extra");
    }
    pd_batch_free(batch);
    pd_trainer_free(one);
    pd_trainer_free(two);
    pd_net_free(net);
}

/* ---- updaters ---- */

/* Everything that happens, in one text: calls of the updater, and "name>" and "<name" when a probe runs forward and
   backward. */
typedef struct record {
    pd_updater updater;
    pd_trainer *trainer;
    int64_t samples;
    char text[1024];
    int polls;
    const char *failing; /* the call that is to fail, or NULL */
    bool silent;         /* .. without a message */
} record;

/* One at a time, and where probes write. */
static record current;

static void note(const char *what, const char *name) {
    size_t length = strlen(current.text);
    snprintf(current.text + length, sizeof current.text - length, "%s%s ", what, name);
}

/* Notes the call, and fails if that is wanted. */
static pd_status note_call(pd_updater *u, const char *call, const char *name) {
    const record *r = (const record *)u->self;
    note(call, name);
    if (!r->failing || strcmp(call, r->failing) != 0) return PD_OK;
    return r->silent ? PD_E_IO : pd_trainer_fail(r->trainer, PD_E_IO, "line cut in \"%s\"", call);
}

static pd_status record_start(pd_updater *u, pd_trainer *trainer) {
    ((record *)u->self)->trainer = trainer;
    return note_call(u, "start", "");
}
static pd_status record_begin(pd_updater *u, int64_t samples) {
    char number[32];
    snprintf(number, sizeof number, "%d", (int)samples);
    ((record *)u->self)->samples = samples;
    return note_call(u, "begin:", number);
}
static pd_status record_needed(pd_updater *u, pd_param *p) { return note_call(u, "need:", p->name); }
static pd_status record_final(pd_updater *u, pd_param *p) { return note_call(u, "final:", p->name); }
static pd_status record_poll(pd_updater *u) {
    record *r = (record *)u->self;
    r->polls++;
    return r->failing && strcmp(r->failing, "poll") == 0 ? PD_E_IO : PD_OK;
}
/* The simplest distributed updater: all steps at the end. */
static pd_status record_end(pd_updater *u, int64_t *samples) {
    record *r = (record *)u->self;
    pd_status status = note_call(u, "end", "");
    assert_int_equal(*samples, r->samples);
    for (pd_param *p = pd_param_first(pd_trainer_net(r->trainer)); p && status == PD_OK; p = p->next)
        status = pd_trainer_apply(r->trainer, p, r->samples, 1);
    return status;
}
static pd_status record_sync(pd_updater *u) { return note_call(u, "sync", ""); }
static void record_stop(pd_updater *u) { note_call(u, "stop", ""); }

static void start_record(void) {
    const pd_updater u = { PD_API_VERSION, "record",    &current,   record_start, record_begin, record_needed,
                           record_final,   record_poll, record_end, record_sync,  NULL,         record_stop };
    memset(&current, 0, sizeof current);
    current.updater = u;
}

static pd_status probe_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    return PD_OK;
}
static pd_status probe_forward(pd_layer *l) {
    note(l->name, ">");
    memcpy(l->out.data, l->inputs[0]->out.data, (size_t)(l->out.rows * l->out.width) * sizeof(pd_real));
    return PD_OK;
}
static pd_status probe_backward(pd_layer *l) {
    note("<", l->name);
    for (int64_t i = 0; i < l->out.rows * l->out.width; i++) l->inputs[0]->out.grad[i] += l->out.grad[i];
    return PD_OK;
}
static const pd_layer_type probe = { PD_API_VERSION, "probe",        1,    1,    0,    0, 0, probe_setup, NULL,
                                     probe_forward,  probe_backward, NULL, NULL, NULL, -1 };

/* x -> a (W) -> p1 -> b (W again, static bias) -> p2 -> c (weight, bias) -> p3 -> cost; d is not used. */
static pd_net *recorded_net(pd_layer **cost) {
    pd_net *net = pd_net_new(NULL);
    const pd_fc_opts a = { .name = "a", .no_bias = true, .weight.name = "W" };
    const pd_fc_opts b = { .name = "b", .weight.name = "W", .bias = { .name = "S", .is_static = true } };
    pd_layer *x = pd_vector(net, "x", 3), *l = pd_fc(net, x, 3, &a);
    l = pd_layer_add(net, &probe, "p1", &l, 1, NULL);
    l = pd_fc(net, l, 3, &b);
    l = pd_layer_add(net, &probe, "p2", &l, 1, NULL);
    l = pd_fc(net, l, 2, &(pd_fc_opts){ .name = "c" });
    l = pd_layer_add(net, &probe, "p3", &l, 1, NULL);
    *cost = pd_sum_cost(net, l, NULL);
    pd_fc(net, x, 2, &(pd_fc_opts){ .name = "d" });
    return net;
}

#define STEP                                                                                                           \
    "begin:2 need:W p1> need:S p2> need:c.weight need:c.bias p3> "                                                     \
    "<p3 final:c.weight final:c.bias <p2 <p1 final:W end "

static const pd_real recorded_data[6] = { 1, 2, 3, -1, 0, 1 };

static void test_updater_order(void **state) {
    pd_layer *cost;
    pd_net *net = recorded_net(&cost);
    pd_trainer_opts opts = { .updater = &current.updater };
    const pd_array array = { .data = recorded_data };
    pd_reader *reader = pd_array_reader(net, 2, &array, 1);
    pd_batch *empty = pd_batch_new(net);
    pd_trainer *trainer;
    (void)state;
    start_record();
    trainer = pd_trainer_new(net, cost, pd_sgd(0.1), &opts);
    if (!trainer) fail_msg("%s", pd_error(net));
    assert_int_equal(pd_train(trainer, reader, 2, NULL), PD_OK);
    assert_string_equal(current.text, "start " STEP STEP "sync ");
    assert_true(current.polls >= 2 * 2 * 7); /* between all layers, both ways */
    current.text[0] = 0;
    assert_int_equal(pd_test(trainer, reader, 0, NULL), PD_OK); /* no updater in between: values are current */
    assert_string_equal(current.text, "sync p1> p2> p3> ");
    current.text[0] = 0;
    assert_int_equal(pd_checkpoint_save(trainer, path), PD_OK);
    assert_string_equal(current.text, "sync ");
    current.text[0] = 0;
    assert_int_equal(pd_train_batch(trainer, empty, NULL), PD_OK); /* other workers may have samples */
    assert_int_equal(strncmp(current.text, "begin:0 need:W ", 15), 0);
    assert_non_null(strstr(current.text, "final:W end "));
    current.text[0] = 0;
    pd_reader_free(reader);
    pd_batch_free(empty);
    pd_trainer_free(trainer);
    assert_string_equal(current.text, "stop ");
    pd_net_free(net);
}

/* Steps at the end of backward give the same bits as steps during it. */
static void test_updater_applies(void **state) {
    plan p = lively;
    uint64_t expected = bits_after(&p, 3);
    (void)state;
    start_record();
    p.trainer.updater = &current.updater;
    assert_true(bits_after(&p, 3) == expected);
}

/* What any call returns is what pd_train_batch returns, with its message or at least the updater's name. Afterwards
   training can go on. */
static void test_updater_failures(void **state) {
    static const char *const calls[] = { "begin:", "need:", "final:", "poll", "end", "sync" };
    (void)state;
    for (int i = 0; i < 2 * COUNT(calls); i++) {
        pd_layer *cost;
        pd_net *net = recorded_net(&cost);
        pd_trainer_opts opts = { .updater = &current.updater };
        const pd_array array = { .data = recorded_data };
        pd_reader *reader = pd_array_reader(net, 2, &array, 1);
        pd_trainer *trainer;
        start_record();
        trainer = pd_trainer_new(net, cost, pd_sgd(0.1), &opts);
        assert_non_null(trainer);
        current.failing = calls[i / 2];
        current.silent = i % 2;
        assert_int_equal(pd_train(trainer, reader, 1, NULL), PD_E_IO);
        if (current.silent || strcmp(current.failing, "poll") == 0) check_contains(pd_error(net), "updater record: ");
        else check_contains(pd_error(net), "line cut in ");
        assert_int_equal(pd_error_status(net), PD_E_IO);
        current.failing = NULL;
        assert_int_equal(pd_train(trainer, reader, 2, NULL), PD_OK);
        assert_string_equal(pd_error(net), "");
        pd_reader_free(reader);
        pd_trainer_free(trainer);
        pd_net_free(net);
    }
}

static void test_updater_does_not_start(void **state) {
    (void)state;
    for (int silent = 0; silent < 2; silent++) {
        pd_layer *cost;
        pd_net *net = recorded_net(&cost);
        pd_trainer_opts opts = { .updater = &current.updater };
        start_record();
        current.failing = "start";
        current.silent = silent;
        assert_null(pd_trainer_new(net, cost, pd_sgd(0.1), &opts));
        check_contains(pd_error(net), silent ? "updater record: " : "line cut in ");
        assert_string_equal(current.text, "start "); /* and no stop */
        pd_net_free(net);
    }
}

/* ---- misuse ---- */

/* What a beginner forgets, or mistypes, must not pass in silence. */
static void test_oversights(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 2), *words = pd_sequence(pd_vector(net, "words", 2));
    pd_layer *fc = pd_fc(net, x, 1, NULL), *cost = pd_sum_cost(net, fc, NULL), *sum = pd_sum_cost(net, words, NULL);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_sgd(0.1), NULL);
    pd_real numbers[4] = { 1, 2, 3, 4 };
    int64_t starts[3] = { 0, 1, 2 };
    pd_array arrays[2] = { { .data = numbers }, { .data = numbers, .starts = starts } };
    pd_reader *reader = pd_array_reader(net, 2, arrays, 2);
    pd_batch *batch = pd_batch_new(net);
    pd_gradcheck check;
    (void)state;
    assert_non_null(reader);
    /* a test reader that could not be made */
    assert_int_equal(pd_train(trainer, reader, 1, &(pd_train_opts){ .test = pd_csv_reader(net, "none.csv", NULL) }),
                     PD_E_ARGUMENT);
    check_contains(pd_error(net), "no test reader, and one reader could not be made: csv reader: ");
    assert_non_null(pd_fc(net, x, 2, NULL)); /* success of a builder does not forget it */
    assert_int_equal(pd_error_status(net), PD_E_ARGUMENT);
    pd_clear_error(net);
    assert_int_equal(pd_error_status(net), PD_OK);
    assert_string_equal(pd_error(net), "");
    assert_int_equal(pd_train(trainer, reader, 1, NULL), PD_OK);
    /* no samples, and a sample not ended */
    assert_int_equal(pd_check_gradients(cost, batch, NULL, &check), PD_E_ARGUMENT);
    check_contains(pd_error(net), "the batch has no samples");
    memcpy(pd_batch_add_row(batch, 0), numbers, 2 * sizeof *numbers);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &fc, 1), PD_E_STATE);
    check_contains(pd_error(net), "has not been ended (pd_batch_end_sample)");
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &fc, 1), PD_OK);
    /* sequences that pd_predict does not get */
    assert_non_null(pd_predict(fc, numbers, 2));
    assert_null(pd_predict(sum, numbers, 2));
    check_contains(pd_error(net), "words: the batch has 2 samples, but 0 rows for this input");
    pd_batch_free(batch);
    pd_reader_free(reader);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

static void test_misuse(void **state) {
    static const struct {
        pd_train_opts opts;
        const char *text;
    } cases[] = { { { .batch_size = -1 }, "batch_size" },
                  { { .patience = -1 }, "patience" },
                  { { .patience = 2 }, "patience needs a test reader" },
                  { { .log_every = -2 }, "log_every" },
                  { { .log_every = 2 }, "log_every" },
                  { { .checkpoint_every = -1 }, "checkpoint_every" },
                  { { .checkpoint_every = 3 }, "checkpoint_every" } };
    model m;
    pd_batch *batch;
    script s;
    double cost = 1;
    uint64_t bits;
    (void)state;
    open_model(&m, &plain);
    bits = bits_of(m.net);
    batch = pd_batch_new(m.net);
    for (int i = 0; i < COUNT(cases); i++) {
        check_status(&m, pd_train(m.trainer, m.train, 1, &cases[i].opts), PD_E_ARGUMENT);
        check_contains(pd_error(m.net), cases[i].text);
    }
    check_status(&m, pd_train(m.trainer, m.train, -1, NULL), PD_E_ARGUMENT);
    check_status(&m, pd_train(m.trainer, NULL, 1, NULL), PD_E_ARGUMENT);
    check_contains(pd_error(m.net), "reader");
    assert_null(pd_csv_reader(m.net, "/nowhere/data.csv", NULL)); /* its message is not lost */
    check_status(&m, pd_train(m.trainer, pd_shuffle(m.net, NULL, 10, 1), 1, NULL), PD_E_ARGUMENT);
    check_contains(pd_error(m.net), "/nowhere/data.csv");
    check_status(&m, pd_train_batch(m.trainer, NULL, &cost), PD_E_ARGUMENT);
    check_contains(pd_error(m.net), "batch");
    assert_true(cost == 0);
    check_status(&m, pd_test(m.trainer, NULL, 1, &cost), PD_E_ARGUMENT);
    assert_true(cost != cost);
    check_status(&m, pd_test(m.trainer, m.test, -1, &cost), PD_E_ARGUMENT);
    write_script(&s);
    s.reader.api_version++;
    check_status(&m, pd_train(m.trainer, &s.reader, 1, NULL), PD_E_ARGUMENT);
    check_status(&m, pd_test(m.trainer, &s.reader, 1, NULL), PD_E_ARGUMENT);
    write_script(&s);
    s.reader.next = NULL;
    check_status(&m, pd_train(m.trainer, &s.reader, 1, NULL), PD_E_ARGUMENT);
    check_status(&m, pd_test(m.trainer, &s.reader, 1, NULL), PD_E_ARGUMENT);
    assert_int_equal(pd_train(NULL, m.train, 1, NULL), PD_E_MEMORY);
    assert_int_equal(pd_train_batch(NULL, batch, &cost), PD_E_MEMORY);
    assert_int_equal(pd_test(NULL, m.test, 1, &cost), PD_E_MEMORY);
    assert_int_equal(pd_trainer_samples(NULL), 0);
    assert_null(pd_trainer_net(NULL));
    pd_trainer_free(NULL);
    pd_reader_free(NULL);
    pd_batch_free(NULL);
    assert_true(bits_of(m.net) == bits);
    pd_batch_free(batch);
    close_model(&m);
}

/* Costs that can't be trained. */
static void test_wrong_costs(void **state) {
    (void)state;
    for (int i = 0; i < 7; i++) {
        static const char *const texts[] = { "fc1: a cost has one number per row, this is 2",
                                             "NULL",
                                             "another net's",
                                             "nothing that it depends on learns",
                                             "nothing that it depends on learns",
                                             "number per row",
                                             "size" };
        static const pd_fc_opts fixed = { .weight.is_static = true, .no_bias = true };
        pd_net *net = pd_net_new(NULL), *other = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 2), *label = pd_label(net, "label", 1), *cost = NULL;
        if (i == 0) cost = pd_fc(net, x, 2, NULL);
        if (i == 2) cost = pd_sum_cost(other, pd_fc(other, pd_vector(other, "x", 2), 1, NULL), NULL);
        if (i == 3) cost = pd_sum_cost(net, x, NULL);
        if (i == 4) cost = pd_sum_cost(net, pd_fc(net, x, 1, &fixed), NULL);
        if (i == 5) cost = label;
        if (i == 6) cost = pd_sum_cost(net, pd_fc(net, x, 0, NULL), NULL); /* the first message stays */
        assert_null(pd_trainer_new(net, cost, pd_sgd(1), NULL));
        check_contains(pd_error(net), texts[i]);
        assert_true((pd_fc(net, x, 1, NULL) != NULL) == (i != 6)); /* the net is as it was */
        pd_net_free(net);
        pd_net_free(other);
    }
    assert_null(pd_trainer_new(NULL, NULL, pd_sgd(1), NULL));
}

/* A shared net is for predicting. */
static void test_shared_nets_are_not_trained(void **state) {
    model m;
    pd_net *shared;
    (void)state;
    open_model(&m, &plain);
    train(&m, 1, NULL);
    shared = pd_net_share(m.net);
    assert_non_null(shared);
    assert_null(pd_trainer_new(shared, pd_layer_find(shared, m.cost->name), pd_sgd(1), NULL));
    check_contains(pd_error(shared), "shared");
    pd_net_free(shared);
    close_model(&m);
}

/* ---- batches by tokens: sentences of 0 to 9 words, a word to be told from the one before ---- */

enum { SENTENCES = 60 };
static int64_t sentence_words[SENTENCES * 9], sentence_starts[SENTENCES + 1];

static void make_sentences(uint64_t seed, int64_t length) {
    random_seed(seed);
    for (int i = 0; i < SENTENCES; i++) {
        int64_t n = length ? length : below(10);
        sentence_starts[i + 1] = sentence_starts[i] + n;
        for (int64_t k = sentence_starts[i]; k < sentence_starts[i + 1]; k++) sentence_words[k] = below(7);
    }
}

typedef struct tagger {
    pd_net *net;
    pd_reader *train, *test;
    pd_trainer *trainer;
    int64_t sizes[8 * SENTENCES], seen; /* of the batches */
    int count, stop_at;
} tagger;

/* `stacked`: shuffled and read ahead. */
static void open_tagger(tagger *m, uint64_t seed, bool stacked) {
    pd_array arrays[3] = { { .ids = sentence_words, .starts = sentence_starts },
                           { .ids = sentence_words, .starts = sentence_starts },
                           { .ids = sentence_words } };
    pd_layer *x, *next;
    memset(m, 0, sizeof *m);
    m->net = pd_net_new(&(pd_net_opts){ .seed = seed });
    x = pd_sequence(pd_ids(m->net, "words", 7));
    next = pd_sequence(pd_label(m->net, "tags", 7));
    pd_ids(m->net, "single", 7);
    x = pd_embedding(m->net, x, 4, NULL);
    x = pd_fc(m->net, pd_gru(m->net, x, 5, NULL), 7, NULL);
    m->trainer = pd_trainer_new(m->net, pd_cross_entropy(m->net, x, next, NULL), pd_adam(0.01), NULL);
    if (!m->trainer) fail_msg("%s", pd_error(m->net));
    m->train = pd_array_reader(m->net, SENTENCES, arrays, 3);
    m->test = pd_array_reader(m->net, SENTENCES, arrays, 3);
    if (stacked) m->train = pd_prefetch(m->net, pd_shuffle(m->net, m->train, 20, 1), 5);
}

static void close_tagger(tagger *m) {
    pd_reader_free(m->train);
    pd_reader_free(m->test);
    pd_trainer_free(m->trainer);
    pd_net_free(m->net);
}

static int note_size(void *user, const pd_event *event) {
    tagger *m = user;
    if (event->kind != PD_END_BATCH) return 0;
    assert_true(m->count < COUNT(m->sizes));
    m->sizes[m->count++] = event->samples - m->seen;
    m->seen = event->samples;
    return m->count == m->stop_at;
}

static void check_tagger(tagger *m, pd_status got, pd_status expected) {
    if (got != expected) fail_msg("status %d instead of %d: %s", got, expected, pd_error(m->net));
}

/* Each batch ends with the sentence that brings its words to `tokens`, or with sample `size` of it. */
static void test_batches_by_tokens(void **state) {
    (void)state;
    for (int64_t tokens = 1; tokens < 80; tokens += 13)
        for (int64_t size = 0; size < 12; size += 4) {
            tagger m;
            int batch = 0;
            pd_train_opts o = { .batch_size = size, .batch_tokens = tokens, .on_event = note_size };
            make_sentences((uint64_t)tokens, 0);
            open_tagger(&m, 1, false);
            o.user = &m;
            check_tagger(&m, pd_train(m.trainer, m.train, 2, &o), PD_OK);
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < SENTENCES; batch++) {
                    int first = i;
                    while (i < SENTENCES && (!size || i - first < size) &&
                           sentence_starts[i] - sentence_starts[first] < tokens)
                        i++;
                    assert_int_equal(m.sizes[batch], i - first);
                }
            assert_int_equal(m.count, batch);
            close_tagger(&m);
        }
}

/* Where all sentences are equally long, so are batches of so many samples: the same bits, tests with patience too. */
static void test_tokens_as_samples(void **state) {
    uint64_t bits[2];
    (void)state;
    make_sentences(1, 5);
    for (int stacked = 0; stacked < 2; stacked++) {
        for (int by_tokens = 0; by_tokens < 2; by_tokens++) {
            tagger m;
            pd_train_opts o = { .patience = 5 };
            open_tagger(&m, 1, stacked);
            o.test = m.test;
            if (by_tokens) o.batch_tokens = 31; /* 7 sentences */
            else o.batch_size = 7;
            if (stacked) o.tokens_of = by_tokens ? "tags" : NULL;
            check_tagger(&m, pd_train(m.trainer, m.train, 3, &o), PD_OK);
            bits[by_tokens] = bits_of(m.net);
            close_tagger(&m);
        }
        assert_true(bits[0] == bits[1]);
    }
}

/* Stopped after any batch and continued from its checkpoint in another net: the same bits, and the same batches. */
static void test_tokens_and_checkpoints(void **state) {
    uint64_t bits = 0;
    int64_t sizes[8 * SENTENCES];
    int batches = 0;
    (void)state;
    make_sentences(3, 0);
    for (int stop_at = 0; stop_at <= batches; stop_at++) {
        tagger m, other;
        pd_train_opts o = { .batch_tokens = 40, .on_event = note_size, .user = &m };
        open_tagger(&m, 1, true);
        m.stop_at = stop_at;
        check_tagger(&m, pd_train(m.trainer, m.train, 2, &o), stop_at ? PD_STOPPED : PD_OK);
        if (stop_at == 0) {
            bits = bits_of(m.net);
            batches = m.count;
            memcpy(sizes, m.sizes, sizeof sizes);
            assert_true(batches > 10);
        } else {
            check_tagger(&m, pd_checkpoint_save(m.trainer, path), PD_OK);
            open_tagger(&other, 2, true);
            check_tagger(&other, pd_checkpoint_load(other.trainer, path), PD_OK);
            other.seen = m.seen;
            o.user = &other;
            check_tagger(&other, pd_train(other.trainer, other.train, 2, &o), PD_OK);
            if (bits_of(other.net) != bits) fail_msg("stopped after %d batches", stop_at);
            assert_int_equal(other.count, batches - stop_at);
            assert_memory_equal(other.sizes, sizes + stop_at, (size_t)other.count * sizeof *sizes);
            close_tagger(&other);
        }
        close_tagger(&m);
    }
}

static pd_status no_samples(pd_reader *r, pd_batch *batch, int64_t count) {
    (void)batch;
    if (count > 0) r->self = NULL;
    return PD_OK;
}
static pd_status never_fails(pd_reader *r, int64_t pass) {
    (void)r;
    (void)pass;
    return PD_OK;
}

static void test_tokens_refused(void **state) {
    pd_reader nothing = { .api_version = PD_API_VERSION, .name = "nothing", .next = no_samples, .reset = never_fails };
    tagger m;
    model dense;
    const struct {
        pd_train_opts opts;
        const char *message;
    } bad[] = {
        { { .batch_tokens = -1 }, "batch_tokens, patience, log_every and checkpoint_every must not be negative" },
        { { .tokens_of = "words" }, "tokens_of needs batch_tokens" },
        { { .batch_tokens = 9, .tokens_of = "word" }, "tokens_of: no input \"word\"" },
        { { .batch_tokens = 9, .tokens_of = "single" }, "tokens_of: input \"single\" carries no sequences" },
    };
    (void)state;
    make_sentences(3, 0);
    open_tagger(&m, 1, false);
    for (int i = 0; i < COUNT(bad); i++) {
        check_tagger(&m, pd_train(m.trainer, m.train, 1, &bad[i].opts), PD_E_ARGUMENT);
        check_contains(pd_error(m.net), bad[i].message);
    }
    check_tagger(&m, pd_train(m.trainer, &nothing, 1, &(pd_train_opts){ .batch_tokens = 9 }), PD_E_STATE);
    check_contains(pd_error(m.net), "reader nothing: gave no sample, and did not say that the pass is over");
    close_tagger(&m);
    open_model(&dense, &plain);
    check_status(&dense, pd_train(dense.trainer, dense.train, 1, &(pd_train_opts){ .batch_tokens = 9 }), PD_E_ARGUMENT);
    check_contains(pd_error(dense.net), "batch_tokens, but no input carries sequences");
    close_model(&dense);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_learns),
        cmocka_unit_test(test_testing),
        cmocka_unit_test(test_testing_averages),
        cmocka_unit_test(test_dropout_changes),
        cmocka_unit_test(test_single_batches),
        cmocka_unit_test(test_events),
        cmocka_unit_test(test_stop_and_go_on),
        cmocka_unit_test(test_several_calls),
        cmocka_unit_test(test_seeds),
        cmocka_unit_test(test_checkpoints),
        cmocka_unit_test(test_checkpoints_by_the_way),
        cmocka_unit_test(test_reader_failures),
        cmocka_unit_test(test_empty_readers),
        cmocka_unit_test(test_early_stopping),
        cmocka_unit_test(test_endings),
        cmocka_unit_test(test_best_and_last),
        cmocka_unit_test(test_judging_anew),
        cmocka_unit_test(test_resumed_later),
        cmocka_unit_test(test_nothing_to_train),
        cmocka_unit_test(test_given_values),
        cmocka_unit_test(test_net_that_grows),
        cmocka_unit_test(test_averages_left),
        cmocka_unit_test(test_in_use),
        cmocka_unit_test(test_in_use_by_reader),
        cmocka_unit_test(test_left_over_gradients),
        cmocka_unit_test(test_early_stopping_is_saved),
        cmocka_unit_test(test_bad_data),
        cmocka_unit_test(test_bad_data_and_batch_norm),
        cmocka_unit_test(test_bad_layers),
        cmocka_unit_test(test_bad_last_parameter),
        cmocka_unit_test(test_explosion),
        cmocka_unit_test(test_bad_parameter),
        cmocka_unit_test(test_csv_log),
        cmocka_unit_test(test_tensorboard),
        cmocka_unit_test(test_bad_logs),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_logger),
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_same_bits_for_any_threads),
        cmocka_unit_test(test_nets_in_threads),
        cmocka_unit_test(test_no_allocation_later),
        cmocka_unit_test(test_two_trainers),
        cmocka_unit_test(test_updater_order),
        cmocka_unit_test(test_updater_applies),
        cmocka_unit_test(test_updater_failures),
        cmocka_unit_test(test_updater_does_not_start),
        cmocka_unit_test(test_oversights),
        cmocka_unit_test(test_misuse),
        cmocka_unit_test(test_wrong_costs),
        cmocka_unit_test(test_shared_nets_are_not_trained),
        cmocka_unit_test(test_batches_by_tokens),
        cmocka_unit_test(test_tokens_as_samples),
        cmocka_unit_test(test_tokens_and_checkpoints),
        cmocka_unit_test(test_tokens_refused),
    };
    return run_group(tests, make_data, remove_data);
}
