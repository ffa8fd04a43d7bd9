/* For tests: random numbers, comparison, an allocator that fails, and running them. Included after paddle.h and cmocka.h. */
#ifndef PADDLE_TESTS_SUPPORT_H
#define PADDLE_TESTS_SUPPORT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- random numbers: everything in a test follows from its seed, which messages name ---- */

static uint64_t random_key, random_count;
static inline void random_seed(uint64_t seed) { random_key = seed, random_count = 0; }
static inline double uniform(double low, double high) {
    return low + (high - low) * ((double)(pd_random(random_key, random_count++) >> 11) * (1.0 / 9007199254740992.0));
}
static inline int64_t below(int64_t n) { return (int64_t)(pd_random(random_key, random_count++) % (uint64_t)n); }

/* ---- options: 0 is the default, PD_ZERO 0 ---- */

static inline double meant(double option, double otherwise) {
    return option == 0 ? otherwise : option == PD_ZERO ? 0 : option;
}

/* ---- comparison ---- */

#define REAL_TOLERANCE (sizeof(pd_real) == 8 ? 1e-11 : 2e-5)

static inline void check_near(double actual, double expected, double tolerance, const char *what) {
    if (!(fabs(actual - expected) <= tolerance * (1 + fabs(expected))))
        fail_msg("%s: got %.17g, expected %.17g (seed %llu)", what, actual, expected, (unsigned long long)random_key);
}

static inline void check_contains(const char *text, const char *part) {
    if (!strstr(text, part)) fail_msg("expected a message with\n  %s\ngot\n  %s", part, text);
}

/* ---- an allocator that fails its call number `fail_at` (from 0) and counts blocks in use, for any threads ---- */

typedef struct failing_allocator {
    int64_t calls, fail_at, in_use;
} failing_allocator;

static inline void *failing_alloc(void *user, size_t size, size_t align) {
    failing_allocator *f = (failing_allocator *)user;
    void *memory = NULL;
    if (__sync_fetch_and_add(&f->calls, 1) == f->fail_at || posix_memalign(&memory, align, size) != 0) return NULL;
    __sync_fetch_and_add(&f->in_use, 1);
    return memory;
}

/* Also while other threads are at it. */
static inline int64_t failing_calls(failing_allocator *f) { return __sync_fetch_and_add(&f->calls, 0); }

static inline void failing_free(void *user, void *memory, size_t size) {
    (void)size;
    __sync_fetch_and_sub(&((failing_allocator *)user)->in_use, 1);
    free(memory);
}

/* ---- how much: ROUNDS in the environment is percent of the usual; tests/run sets it ---- */

static inline int64_t percent(void) {
    const char *text = getenv("ROUNDS");
    return text ? atoi(text) : 100;
}

/* In loops over random cases: how many. Below 100 percent as many as usual, of which chosen() leaves some out. */
static inline int rounds(int usual) { return percent() > 100 ? (int)(usual * percent() / 100) : usual; }

/* In loops over cases that take long: is this one among those to do? They are spread evenly over all that ask, so a loop
   that asks less often than 100 / ROUNDS times may find none. */
static inline bool chosen(void) {
    static int64_t sum = 99; /* the first is */
    sum += percent() < 100 ? percent() : 100;
    if (sum < 100) return false;
    sum -= 100;
    return true;
}

/* ---- running: says of each test how long it took. Parts of names, with blanks between, may be in the environment: CASE
   of the tests to run, or, if there are no such tests, of the layers to which lists of cases are confined; LEAVE_OUT of
   tests not to run ---- */

static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void timed_test(void **state) {
    const struct CMUnitTest *test = (const struct CMUnitTest *)*state;
    double begin = seconds();
    *state = test->initial_state;
    test->test_func(state);
    print_message("[   TIME   ] %8.3f s %s\n", seconds() - begin, test->name);
}

static inline bool has_part(const char *name, const char *parts) {
    char part[64];
    int length;
    for (; sscanf(parts, "%63s%n", part, &length) == 1; parts += length)
        if (strstr(name, part)) return true;
    return false;
}

static const char *layer_part; /* CASE, where it is not of tests */
static int layers_met;

/* In lists of cases: is this layer among those asked for? */
static inline bool asked_for(const char *layer) {
    bool asked = !layer_part || has_part(layer, layer_part);
    layers_met += asked;
    return asked;
}

#define run_group(tests, setup, teardown) run_timed(#tests, tests, COUNT(tests), setup, teardown)
static inline int run_timed(const char *group, const struct CMUnitTest *tests, int count, CMFixtureFunction setup,
                            CMFixtureFunction teardown) {
    const char *wanted = getenv("CASE"), *unwanted = getenv("LEAVE_OUT");
    struct CMUnitTest *timed = (struct CMUnitTest *)malloc((size_t)count * sizeof *timed);
    int n = 0, named = 0, failed = 1;
    for (int i = 0; i < count && wanted; i++) named += has_part(tests[i].name, wanted);
    if (wanted && named == 0) {
        layer_part = wanted;
        wanted = NULL;
    }
    for (int i = 0; i < count; i++) {
        if ((wanted && !has_part(tests[i].name, wanted)) || (unwanted && has_part(tests[i].name, unwanted))) continue;
        timed[n] = tests[i];
        timed[n].test_func = timed_test;
        timed[n++].initial_state = (void *)(uintptr_t)&tests[i];
    }
    if (n > 0) failed = _cmocka_run_group_tests(group, timed, (size_t)n, setup, teardown);
    if (n == 0 || (layer_part && layers_met == 0)) {
        failed = 1;
        printf("no layer and none of these tests has \"%s\" in its name:", layer_part ? layer_part : "");
        for (int i = 0; i < count; i++) printf(" %s", tests[i].name);
        printf("\n");
    }
    free(timed);
    return failed;
}

#endif
