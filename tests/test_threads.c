/* How many threads the CPU device goes on with where other work has the processors: what it makes of scripted times; and
   whatever it does, trainings give the same bits, in several threads and inside a parallel region too. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "inside.h"
#include "support.h"

/* ---- scripted machines: seconds of a loop of 100 us of work in so many threads, and what the least busy worked ---- */

typedef void machine(double now, int team, double *spent, double *least);

static void good(double now, int team, double *spent, double *least) {
    (void)now;
    *least = 1e-4 / team;
    *spent = *least + (team > 1 ? 5e-6 : 0);
}
/* Three items for two threads. */
static void uneven(double now, int team, double *spent, double *least) {
    (void)now;
    *least = 1e-4 / (team > 1 ? 3 : 1);
    *spent = team > 1 ? 2.2 * *least : *least;
}
/* One loop in ten waits for a thread that has lost its processor. */
static void starved(double now, int team, double *spent, double *least) {
    static int count;
    good(now, team, spent, least);
    if (team > 1 && ++count % 10 == 0) *spent += 6e-3;
}
static void busy_until_5(double now, int team, double *spent, double *least) {
    (now < 5 ? starved : good)(now, team, spent, least);
}
/* Four processors for eight threads. */
static void half(double now, int team, double *spent, double *least) {
    (team > 4 ? starved : good)(now, team, spent, least);
}
/* Once in a tenth of a second something else runs for 12 ms. */
static void disturbed(double now, int team, double *spent, double *least) {
    static double next;
    if (now < 1e-3) next = 0.1;
    good(now, team, spent, least);
    if (now < next) return;
    *spent += 12e-3;
    next += 0.1;
}

/* Runs for so many seconds; returns the part of the time in teams of `team`. */
static double share_of_time(int threads, machine *loop, double seconds, int team) {
    inside_pace *p = inside_pace_new(threads);
    double now = 0, in_team = 0;
    assert_non_null(p);
    for (int size = threads; now < seconds;) {
        double spent, least;
        loop(now, size, &spent, &least);
        now += spent;
        if (size == team) in_team += spent;
        size = inside_pace_note(p, now, spent, size, least);
    }
    free(p);
    return in_team / now;
}

static void test_pace(void **state) {
    (void)state;
    assert_true(share_of_time(2, good, 1, 2) == 1);
    assert_true(share_of_time(8, good, 1, 8) == 1);
    assert_true(share_of_time(2, uneven, 10, 2) == 1);
    assert_true(share_of_time(2, disturbed, 10, 2) == 1);
    /* tries take little of the time, in the long run and from the beginning */
    assert_true(share_of_time(2, starved, 60, 1) > 0.98 && share_of_time(2, starved, 60, 1) < 1);
    assert_true(share_of_time(2, starved, 1, 1) > 0.9);
    assert_true(share_of_time(8, starved, 60, 1) > 0.97);
    assert_true(share_of_time(8, half, 60, 4) > 0.97);
    /* and it is noticed within a second or so when the others have gone */
    assert_true(share_of_time(2, busy_until_5, 11, 2) > 4.8 / 11);
    assert_true(share_of_time(64, busy_until_5, 11, 64) > 4.6 / 11);
}

/* Something else may run for 5 ms at the very beginning, for longer later. */
static void test_hiccup(void **state) {
    inside_pace *p = inside_pace_new(2);
    double now = 0.005;
    (void)state;
    assert_non_null(p);
    assert_int_equal(inside_pace_note(p, now, 0.005, 2, 5e-5), 2);
    for (int i = 0; i < 1000; i++) assert_int_equal(inside_pace_note(p, now += 1e-4, 1e-4, 2, 9e-5), 2);
    assert_int_equal(inside_pace_note(p, now += 0.025, 0.025, 2, 5e-5), 2);
    assert_int_equal(inside_pace_note(p, now += 0.025, 0.025, 2, 5e-5), 1);
    free(p);
}

/* ---- trainings ---- */

enum { SAMPLES = 64, STEPS = 12 };

typedef struct training {
    int threads;
    bool changes; /* the number of threads, between steps */
    pd_net *net;
    pd_layer *cost;
    pd_status status;
} training;

static void build(training *t) {
    t->net = pd_net_new(&(pd_net_opts){ .seed = 5, .threads = t->threads });
    pd_layer *image = pd_image(t->net, "image", 4, 8, 8), *label = pd_label(t->net, "label", 10);
    pd_layer *x = pd_conv(t->net, image, 8, 3, &(pd_conv_opts){ .pad = 1, .act = PD_RELU });
    x = pd_fc(t->net, pd_batch_norm(t->net, x, NULL), 64, &(pd_fc_opts){ .act = PD_TANH });
    x = pd_fc(t->net, x, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    t->cost = pd_cross_entropy(t->net, x, label, NULL);
}

static void *train(void *argument) {
    training *t = (training *)argument;
    pd_trainer *trainer = pd_trainer_new(t->net, t->cost, pd_adam(0.01), NULL);
    pd_batch *batch = pd_batch_new(t->net);
    for (uint64_t i = 0; i < SAMPLES; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        for (uint64_t k = 0; row && k < 256; k++) row[k] = (pd_real)(pd_random(i, k) >> 40) / (1 << 24);
        pd_batch_add_id(batch, 1, (int64_t)(i % 10));
        pd_batch_end_sample(batch);
    }
    t->status = trainer ? PD_OK : pd_error_status(t->net);
    for (int i = 0; i < STEPS && t->status == PD_OK; i++) {
        if (t->changes) inside_set_team(inside_device(t->net), 1 + (t->threads + i) % t->threads);
        t->status = pd_train_batch(trainer, batch, NULL);
    }
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    return NULL;
}

static void check_equal_and_free(training *t, int count) {
    for (int i = 0; i < count; i++)
        if (t[i].status != PD_OK) fail_msg("training %d: %s", i, pd_error(t[i].net));
    for (int i = 1; i < count; i++) {
        pd_param *p = pd_param_first(t[0].net), *q = pd_param_first(t[i].net);
        for (; p; p = p->next, q = q->next) assert_memory_equal(p->value, q->value, (size_t)p->size * sizeof *p->value);
    }
    for (int i = 0; i < count; i++) pd_net_free(t[i].net);
}

static void test_same_bits(void **state) {
    training t[4] = { { .threads = 1 }, { .threads = 4 }, { .threads = 4, .changes = true }, { .threads = 4 } };
    (void)state;
    for (int i = 0; i < 4; i++) build(&t[i]);
    for (int i = 0; i < 4; i++) {
        pd_device *cpu = inside_device(t[i].net);
        int usual = inside_team(cpu);
        if (i == 3) inside_loop(cpu, pd_seconds(), 0.1, usual, 5e-5); /* this one believes that it is starved */
        assert_int_equal(inside_team(cpu), i == 3 ? (usual + 1) / 2 : usual);
        train(&t[i]);
    }
    check_equal_and_free(t, 4);
}

/* Nets in threads of their own that share the processors, and then inside a parallel region, where OpenMP gives each
   fewer threads than it asks for. */
static void test_many(void **state) {
    training t[4] = { { .threads = 1 }, { .threads = 2 }, { .threads = 3, .changes = true }, { .threads = 4 } };
    pthread_t threads[4];
    (void)state;
    for (int i = 0; i < 4; i++) build(&t[i]);
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&threads[i], NULL, train, &t[i]), 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    check_equal_and_free(t, 4);
    for (int i = 0; i < 4; i++) build(&t[i]);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(2)
#endif
    for (int i = 0; i < 4; i++) train(&t[i]);
    check_equal_and_free(t, 4);
}

/* Loops that are really run bring the threads back, and the profile tells what happened. */
static void test_recovery(void **state) {
    training t = { .threads = 4 };
    double begin = seconds(), percent = 0;
    pd_trainer *trainer;
    pd_device *cpu;
    pd_real *numbers = (pd_real *)calloc(100000, sizeof *numbers);
    char text[4096];
    const char *line;
    (void)state;
    build(&t);
    cpu = inside_device(t.net);
    trainer = pd_trainer_new(t.net, t.cost, pd_sgd(0.1), NULL);
    assert_non_null(trainer);
    assert_true(pd_profile(trainer, text, sizeof text) < sizeof text);
#if defined(_OPENMP)
    check_contains(text, "threads: 4, missing or waited for in 0.0% of 0.00 s");
    for (int i = 0; i < 2; i++) inside_loop(cpu, pd_seconds() - 10, 0.1, inside_team(cpu), 5e-5);
    assert_int_equal(inside_team(cpu), 1);
    while (inside_team(cpu) < 4) {
        nanosleep(&(struct timespec){ .tv_nsec = 50000000 }, NULL); /* longer than it waits between 2 and 4 */
        /* of one thread's products there is one share */
        cpu->gemm(cpu, false, false, 100, 100, 100, 1, numbers, 100, numbers, 100, 0, numbers + 10000, 100, NULL);
        if (seconds() - begin > 60) fail_msg("after a minute %d threads of 4", inside_team(cpu));
    }
    pd_profile(trainer, text, sizeof text);
    line = strstr(text, "missing or waited for in ");
    assert_non_null(line);
    assert_int_equal(sscanf(line, "missing or waited for in %lf%%", &percent), 1);
    assert_true(percent > 0 && percent <= 100);
#else
    assert_null(strstr(text, "threads: "));
    (void)begin, (void)percent, (void)line, (void)cpu;
#endif
    free(numbers);
    pd_trainer_free(trainer);
    pd_net_free(t.net);
}

/* A product in every team that threads may go on with takes no more memory than there is, and gives the same bits. */
static void test_products(void **state) {
    static const int64_t shapes[][3] = { { 150, 200, 256 }, { 64, 1000, 64 }, { 700, 30, 90 }, { 3, 2000, 100 } };
    (void)state;
    for (int s = 0; s < COUNT(shapes); s++) {
        const int64_t m = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
        pd_real *a = (pd_real *)calloc((size_t)(m * k + k * n + 2 * m * n), sizeof *a), *b = a + m * k, *c = b + k * n;
        assert_non_null(a);
        random_seed((uint64_t)s);
        for (int64_t i = 0; i < m * k + k * n; i++) a[i] = (pd_real)uniform(-1, 1);
        for (int threads = 1; threads <= 17; threads++) {
            pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
            pd_device *cpu = inside_device(net);
            for (int team = threads, down = 1; team <= threads && team > 0; team = down ? team / 2 : 2 * team) {
                pd_real *to = threads == 1 ? c : c + m * n;
                inside_set_team(cpu, team);
                cpu->gemm(cpu, false, false, m, n, k, 1, a, k, b, n, 0, to, n, NULL);
                assert_memory_equal(to, c, (size_t)(m * n) * sizeof *c);
                if (team == 1 && down) down = 0;
            }
            pd_net_free(net);
        }
        free(a);
    }
}

/* Threads flush the smallest numbers to 0 if, and as long as, the one that uses the net does. */
static void test_flushing(void **state) {
#if defined(__SSE2__)
    enum { N = 100000, FLUSH = 0x8040 };
    const int64_t size[4] = { 1, 1, 1, N }, strides[4] = { 0, 0, 0, 1 };
    const pd_real tiny = (pd_real)(sizeof(pd_real) == 4 ? 1e-30 : 1e-300), alpha = (pd_real)1e-10;
    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = 4 });
    pd_device *cpu = inside_device(net);
    const pd_real smallest = (pd_real)(sizeof(pd_real) == 4 ? 1e-40 : 1e-310); /* below what has full precision */
    pd_real *x = (pd_real *)calloc(N, sizeof *x), *y = (pd_real *)calloc(N, sizeof *y), product;
    int64_t kept = 0;
    unsigned usual = _mm_getcsr();
    (void)state;
    assert_true(x && y);
    for (int flush = 0; flush < 4; flush++) { /* no, yes, no, yes */
        _mm_setcsr(flush % 2 ? usual | FLUSH : usual);
        inside_set_team(cpu, 4);
        cpu->fill(cpu, N, tiny, x);
        cpu->fill(cpu, N, 0, y);
        cpu->contract(cpu, size, alpha, x, strides, NULL, strides, y, strides);
        _mm_setcsr(usual);
        product = flush % 2 ? 0 : tiny * alpha;
        for (int64_t i = 0; i < N; i++)
            if (memcmp(&y[i], &product, sizeof product) != 0) fail_msg("number %d is %g", (int)i, (double)y[i]);
        _mm_setcsr(flush % 2 ? usual | FLUSH : usual); /* and in loops that are not measured */
        cpu->fill(cpu, N, smallest, x);
        cpu->fill(cpu, N, 0, y);
        cpu->dropout(cpu, N, 1, 0.01, x, y);
        _mm_setcsr(usual);
        for (int64_t i = 0; i < N; i++) kept += y[i] != 0;
        assert_true(flush % 2 ? kept == 0 : kept > N / 2);
        kept = 0;
    }
    free(x);
    free(y);
    pd_net_free(net);
#else
    (void)state;
    skip();
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pace),     cmocka_unit_test(test_hiccup),   cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_many),     cmocka_unit_test(test_recovery), cmocka_unit_test(test_products),
        cmocka_unit_test(test_flushing),
    };
    return run_group(tests, NULL, NULL);
}
