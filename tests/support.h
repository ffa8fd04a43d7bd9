/* For tests: random numbers, comparison, and an allocator that fails. Included after paddle.h and cmocka.h. */
#ifndef PADDLE_TESTS_SUPPORT_H
#define PADDLE_TESTS_SUPPORT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- random numbers: everything in a test follows from its seed, which messages name ---- */

static uint64_t random_key, random_count;
static inline void random_seed(uint64_t seed) { random_key = seed, random_count = 0; }
static inline double uniform(double low, double high) {
    return low + (high - low) * ((double)(pd_random(random_key, random_count++) >> 11) * (1.0 / 9007199254740992.0));
}
static inline int64_t below(int64_t n) { return (int64_t)(pd_random(random_key, random_count++) % (uint64_t)n); }

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

#endif
