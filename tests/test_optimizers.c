/* Every optimizer under every option against straight-line formulas in double; schedules; model averaging against a
   list of all values; options that must be refused. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "support.h"

/* ---- a net whose gradients are known ---- */

/* The cost of a row is sum_k x_k . w_k, so the gradient of w_k is the sum of the rows' x_k. */

enum { PARAMS = 3, MOST = 8, STEPS = 50, BATCH = 4 };
static const int64_t sizes[PARAMS] = { 8, 5, 1 };

typedef struct known {
    pd_net *net;
    pd_layer *cost;
    pd_param *params[PARAMS], *idle; /* idle: of a layer that the cost does not depend on */
    pd_trainer *trainer;
    pd_batch *batch;
} known;

/* `opts` are those of parameter 0; the others have none. */
static known known_net(const pd_param_opts *opts) {
    known k;
    pd_layer *costs[PARAMS];
    memset(&k, 0, sizeof k);
    k.net = pd_net_new(NULL);
    for (int i = 0; i < PARAMS; i++) {
        char name[16];
        pd_fc_opts o;
        memset(&o, 0, sizeof o);
        if (opts && i == 0) o.weight = *opts;
        o.no_bias = true;
        snprintf(name, sizeof name, "x%d", i);
        costs[i] = pd_sum_cost(k.net, pd_fc(k.net, pd_vector(k.net, name, sizes[i]), 1, &o), NULL);
        k.params[i] = i == 0 ? pd_param_first(k.net) : k.params[i - 1] ? k.params[i - 1]->next : NULL;
    }
    k.cost = pd_add(k.net, costs, PARAMS, NULL);
    pd_fc(k.net, pd_layer_find(k.net, "x0"), 2, NULL);
    k.idle = k.params[2] ? k.params[2]->next : NULL;
    return k;
}

static known known_trainer(const pd_param_opts *param, pd_optimizer optimizer, const pd_trainer_opts *opts) {
    known k = known_net(param);
    k.trainer = pd_trainer_new(k.net, k.cost, optimizer, opts);
    if (!k.trainer) fail_msg("%s", pd_error(k.net));
    k.batch = pd_batch_new(k.net);
    assert_non_null(k.batch);
    return k;
}

static void known_free(known *k) {
    pd_batch_free(k->batch);
    pd_trainer_free(k->trainer);
    pd_net_free(k->net);
}

static void get(const pd_param *p, double *values) {
    pd_real numbers[MOST];
    assert_int_equal(pd_param_get(p, numbers, p->size), PD_OK);
    for (int64_t i = 0; i < p->size; i++) values[i] = (double)numbers[i];
}

/* Multiples of 1/64, of which float makes exact sums, and many zeros. */
static double random_number(void) { return below(4) == 0 ? 0 : (double)(below(257) - 128) / 64; }

/* One step on 1 to BATCH random samples; their summed gradients. Returns the number of samples. */
static int64_t known_step(known *k, double gradients[PARAMS][MOST]) {
    int64_t samples = 1 + below(BATCH);
    double cost, expected = 0, w[MOST];
    memset(gradients, 0, PARAMS * sizeof *gradients);
    pd_batch_clear(k->batch);
    for (int64_t s = 0; s < samples; s++) {
        for (int i = 0; i < PARAMS; i++) {
            pd_real *row = pd_batch_add_row(k->batch, i);
            assert_non_null(row);
            for (int64_t j = 0; j < sizes[i]; j++) gradients[i][j] += (double)(row[j] = (pd_real)random_number());
        }
        assert_int_equal(pd_batch_end_sample(k->batch), PD_OK);
    }
    for (int i = 0; i < PARAMS; i++) {
        get(k->params[i], w);
        for (int64_t j = 0; j < sizes[i]; j++) expected += w[j] * gradients[i][j];
    }
    assert_int_equal(pd_train_batch(k->trainer, k->batch, &cost), PD_OK);
    check_near(cost, expected / (double)samples, 10 * REAL_TOLERANCE, "cost");
    return samples;
}

/* ---- the formulas ---- */

typedef struct number {
    double w, a, b, c; /* the value and what the method keeps about it */
    bool held;         /* at zero, by pruning */
} number;

static void formula(const pd_optimizer *o, double r, double l2, double t, double g, number *n) {
    double step;
    switch (o->kind) {
    case PD_OPT_SGD: n->w -= r * g; break;
    case PD_OPT_MOMENTUM:
        n->a = o->momentum * n->a - r * g;
        n->w += o->nesterov ? o->momentum * n->a - r * g : n->a;
        break;
    case PD_OPT_ADAGRAD:
        n->a += g * g;
        n->w -= r * g / (sqrt(n->a) + o->epsilon);
        break;
    case PD_OPT_ADADELTA:
        n->a = o->rho * n->a + (1 - o->rho) * g * g;
        step = -sqrt(n->b + o->epsilon) / sqrt(n->a + o->epsilon) * g;
        n->b = o->rho * n->b + (1 - o->rho) * step * step;
        n->w += r * step;
        break;
    case PD_OPT_RMSPROP:
        n->a = o->rho * n->a + (1 - o->rho) * g * g;
        n->b = o->rho * n->b + (1 - o->rho) * g;
        step = r * g / (sqrt(o->centered ? fmax(n->a - n->b * n->b, 0) : n->a) + o->epsilon);
        n->c = o->momentum * n->c - step;
        n->w += n->c;
        break;
    case PD_OPT_DECAYED_ADAGRAD:
        n->a = o->rho * n->a + (1 - o->rho) * g * g;
        n->w -= r * g / sqrt(n->a + o->epsilon);
        break;
    case PD_OPT_ADAM:
    case PD_OPT_ADAMW:
        n->a = o->beta1 * n->a + (1 - o->beta1) * g;
        n->b = o->beta2 * n->b + (1 - o->beta2) * g * g;
        if (o->kind == PD_OPT_ADAMW) n->w *= 1 - r * l2;
        n->w -= r * (n->a / (1 - pow(o->beta1, t))) / (sqrt(n->b / (1 - pow(o->beta2, t))) + o->epsilon);
        break;
    case PD_OPT_ADAMAX:
        n->a = o->beta1 * n->a + (1 - o->beta1) * g;
        n->b = fmax(o->beta2 * n->b, fabs(g) + o->epsilon);
        n->w -= r / (1 - pow(o->beta1, t)) * n->a / n->b;
        break;
    case PD_OPT_COUNT: fail();
    }
}

static double clamp(double x, double bound) { return bound > 0 ? fmax(-bound, fmin(bound, x)) : x; }

/* What holds for every method: scale, clip by norm, clip by value, l2, the method, l1, pruning. */
static void reference_step(number n[PARAMS][MOST], double gradients[PARAMS][MOST], int64_t samples, int64_t seen, int t,
                           const pd_optimizer *o, const pd_trainer_opts *opts, const pd_param_opts *own) {
    static const pd_param_opts none;
    double scale = opts->sum_gradients ? 1 : 1 / (double)samples, squares = 0;
    for (int i = own->is_static; i < PARAMS; i++)
        for (int64_t j = 0; j < sizes[i]; j++) squares += pow(scale * gradients[i][j], 2);
    if (opts->clip_norm > 0 && sqrt(squares) > opts->clip_norm) scale *= opts->clip_norm / sqrt(squares);
    for (int i = own->is_static; i < PARAMS; i++) {
        const pd_param_opts *p = i == 0 ? own : &none;
        double r = o->rate * meant(p->rate_factor, 1) * pd_schedule_factor(&opts->schedule, (double)seen);
        double l1 = meant(p->l1, opts->l1), l2 = meant(p->l2, opts->l2);
        for (int64_t j = 0; j < sizes[i]; j++) {
            double g = clamp(scale * gradients[i][j], meant(p->clip, opts->clip_value));
            if (o->kind != PD_OPT_ADAMW) g += l2 * n[i][j].w;
            formula(o, r, l2, t, g, &n[i][j]);
            n[i][j].w = copysign(fmax(fabs(n[i][j].w) - r * l1, 0), n[i][j].w);
            if (n[i][j].held) n[i][j].w = 0;
        }
    }
}

/* ---- every optimizer under every option ---- */

typedef struct method {
    const char *name;
    pd_optimizer o;
    int states;
} method;

static pd_optimizer rmsprop(double rate, double momentum, bool centered) {
    pd_optimizer o = pd_rmsprop(rate);
    o.momentum = momentum;
    o.centered = centered;
    return o;
}

/* The share `prune` of the smallest magnitudes. No two are equal. */
static void hold_smallest(number *n, int64_t size, double prune) {
    for (int64_t j = 0; j < size; j++) {
        int64_t smaller = 0;
        for (int64_t k = 0; k < size; k++) smaller += fabs(n[k].w) < fabs(n[j].w);
        n[j].held = smaller < fmin(floor(prune * (double)size + 0.5), (double)(size - 1));
    }
    for (int64_t j = 0; j < size; j++)
        if (n[j].held) n[j].w = 0;
}

static void compare(const method *m, const char *option, const pd_trainer_opts *opts, const pd_param_opts *own) {
    known before = known_net(own), k;
    number n[PARAMS][MOST];
    double gradients[PARAMS][MOST], w[MOST], idle_before[2 * MOST], idle[2 * MOST];
    pd_real numbers[2 * MOST];
    int64_t seen = 0;
    memset(n, 0, sizeof n);
    for (int i = 0; i < PARAMS; i++) {
        get(before.params[i], w);
        for (int64_t j = 0; j < sizes[i]; j++) n[i][j].w = w[j];
    }
    hold_smallest(n[0], sizes[0], own->prune);
    assert_int_equal(pd_param_get(before.idle, numbers, 2 * sizes[0]), PD_OK);
    for (int64_t j = 0; j < 2 * sizes[0]; j++) idle_before[j] = (double)numbers[j];
    known_free(&before);
    k = known_trainer(own, m->o, opts);
    for (int t = 1; t <= STEPS; t++) {
        int64_t samples = known_step(&k, gradients);
        reference_step(n, gradients, samples, seen, t, &m->o, opts, own);
        seen += samples;
        assert_int_equal(pd_trainer_samples(k.trainer), seen);
        for (int i = 0; i < PARAMS; i++) {
            get(k.params[i], w);
            for (int64_t j = 0; j < sizes[i]; j++) {
                char what[128];
                snprintf(what, sizeof what, "%s with %s: element %d of parameter %d after step %d", m->name, option,
                         (int)j, i, t);
                check_near(w[j], n[i][j].w, REAL_TOLERANCE, what);
            }
        }
    }
    assert_int_equal(pd_param_get(k.idle, numbers, 2 * sizes[0]), PD_OK);
    for (int64_t j = 0; j < 2 * sizes[0]; j++) idle[j] = (double)numbers[j];
    assert_memory_equal(idle_before, idle, (size_t)(2 * sizes[0]) * sizeof *idle);
    known_free(&k);
}

static void test_methods_and_options(void **state) {
    const method methods[] = { { "sgd", pd_sgd(0.1), 0 },
                               { "momentum", pd_momentum(0.02, 0.9), 1 },
                               { "nesterov", pd_nesterov(0.02, 0.8), 1 },
                               { "adagrad", pd_adagrad(0.1), 1 },
                               { "adadelta", pd_adadelta(1), 2 },
                               { "rmsprop", rmsprop(0.01, 0, false), 1 },
                               { "rmsprop, centered", rmsprop(0.01, 0, true), 3 },
                               { "rmsprop, momentum", rmsprop(0.01, 0.7, false), 2 },
                               { "rmsprop, centered, momentum", rmsprop(0.01, 0.7, true), 3 },
                               { "decayed_adagrad", pd_decayed_adagrad(0.05), 1 },
                               { "adam", pd_adam(0.05), 2 },
                               { "adamw", pd_adamw(0.05), 2 },
                               { "adamax", pd_adamax(0.05), 2 } };
    static const struct {
        const char *name;
        pd_trainer_opts trainer;
        pd_param_opts param;
    } options[] = {
        { "no options", { .l1 = 0 }, { .rate_factor = 0 } },
        { "l1", { .l1 = 0.1 }, { .rate_factor = 0 } },
        { "l2", { .l2 = 0.2 }, { .rate_factor = 0 } },
        { "l1 and l2", { .l1 = 0.02, .l2 = 0.1 }, { .rate_factor = 0 } },
        { "neither l1 nor l2", { .l1 = 0.05, .l2 = 0.1 }, { .l1 = PD_ZERO, .l2 = PD_ZERO } },
        { "no l1", { .l1 = 0.05, .l2 = 0.1 }, { .l1 = PD_ZERO } },
        { "own l1 and l2", { .l1 = 0.02, .l2 = 0.1 }, { .l1 = 0.1, .l2 = 0.01 } },
        { "own l2 and no l1", { .l1 = 0.02, .l2 = 0.1 }, { .l1 = PD_ZERO, .l2 = 0.3 } },
        { "rate factor", { .l1 = 0.02, .l2 = 0.1 }, { .rate_factor = 2.5 } },
        { "clip_value", { .clip_value = 0.25 }, { .rate_factor = 0 } },
        { "own clip", { .clip_value = 0.25 }, { .clip = 0.5 } },
        { "no clip", { .clip_value = 0.25 }, { .clip = PD_ZERO } },
        { "no clip, l1 and l2 where the trainer has none",
          { .l1 = 0 },
          { .l1 = PD_ZERO, .l2 = PD_ZERO, .clip = PD_ZERO } },
        { "clip_norm", { .clip_norm = 0.75, .l2 = 0.1 }, { .rate_factor = 0 } },
        { "clip_norm and clip_value", { .clip_norm = 1, .clip_value = 0.125 }, { .rate_factor = 0 } },
        { "sum_gradients", { .sum_gradients = true }, { .rate_factor = 0 } },
        { "sum_gradients and clip_norm", { .sum_gradients = true, .clip_norm = 2 }, { .rate_factor = 0 } },
        { "prune", { .l2 = 0.1 }, { .prune = 0.5 } },
        { "prune so that rounding counts", { .l2 = 0.1 }, { .prune = 0.7 } },
        { "prune nearly all", { .clip_norm = 1 }, { .prune = 0.99 } },
        { "static", { .clip_norm = 0.5, .l2 = 0.1 }, { .is_static = true } },
        { "a schedule",
          { .schedule = { .kind = PD_SCHEDULE_STEP, .a = 0.5, .b = 40, .warm_up = 50 } },
          { .rate_factor = 0 } },
    };
    uint64_t seed = 1;
    (void)state;
    for (int m = 0; m < COUNT(methods); m++) {
        assert_int_equal(pd_optimizer_states(&methods[m].o), methods[m].states);
        for (int i = 0; i < COUNT(options); i++) {
            random_seed(seed++);
            compare(&methods[m], options[i].name, &options[i].trainer, &options[i].param);
        }
    }
}

/* The constants that the declarations promise. */
static void test_usual_constants(void **state) {
    static const struct {
        pd_optimizer_kind kind;
        double rho, epsilon;
    } expected[] = { { PD_OPT_ADAGRAD, 0, 1e-10 },   { PD_OPT_ADADELTA, 0.9, 1e-6 },
                     { PD_OPT_RMSPROP, 0.99, 1e-8 }, { PD_OPT_DECAYED_ADAGRAD, 0.95, 1e-6 },
                     { PD_OPT_ADAM, 0, 1e-8 },       { PD_OPT_ADAMW, 0, 1e-8 },
                     { PD_OPT_ADAMAX, 0, 1e-8 } };
    const pd_optimizer made[] = { pd_adagrad(2), pd_adadelta(2), pd_rmsprop(2), pd_decayed_adagrad(2),
                                  pd_adam(2),    pd_adamw(2),    pd_adamax(2) };
    (void)state;
    for (int i = 0; i < COUNT(made); i++) {
        assert_int_equal(made[i].kind, expected[i].kind);
        assert_true(made[i].rate == 2 && made[i].rho == expected[i].rho && made[i].epsilon == expected[i].epsilon);
        if (made[i].kind >= PD_OPT_ADAM) assert_true(made[i].beta1 == 0.9 && made[i].beta2 == 0.999);
    }
    assert_true(pd_nesterov(1, 0.5).nesterov && pd_nesterov(1, 0.5).momentum == 0.5 && !pd_momentum(1, 0.5).nesterov);
}

/* ---- schedules ---- */

static void test_schedules(void **state) {
    static const double bounds[] = { 100, 200, 1000 }, factors[] = { 1, 0.5, 0.25 };
    static const double seen[] = { 0,  1,   2,   31,  32,  33,  49.5, 50,   63,  64,
                                   99, 100, 101, 199, 200, 999, 1000, 1001, 1e5, 1e12 };
    const pd_schedule poly = { .kind = PD_SCHEDULE_POLY, .a = 0.01, .b = 0.75 };
    const pd_schedule exponential = { .kind = PD_SCHEDULE_EXP, .a = 0.5, .b = 64 };
    const pd_schedule step = { .kind = PD_SCHEDULE_STEP, .a = 0.5, .b = 32 };
    const pd_schedule linear = { .kind = PD_SCHEDULE_LINEAR, .a = 0.01, .b = 0.25 };
    const pd_schedule cosine = { .kind = PD_SCHEDULE_COSINE, .a = 200, .b = 0.125 };
    const pd_schedule table = { .kind = PD_SCHEDULE_TABLE, .samples = bounds, .factors = factors, .count = 3 };
    const pd_schedule constant = { .kind = PD_SCHEDULE_CONSTANT };
    (void)state;
    for (int i = 0; i < COUNT(seen); i++) {
        double s = seen[i], pi = acos(-1);
        const struct {
            const char *name;
            pd_schedule schedule;
            double factor;
        } cases[] = { { "constant", constant, 1 },
                      { "poly", poly, pow(1 + s / 100, -0.75) },
                      { "exp", exponential, exp2(-s / 64) },
                      { "step", step, exp2(-floor(s / 32)) },
                      { "linear", linear, fmax(1 - s / 100, 0.25) },
                      { "cosine", cosine, s < 200 ? 0.125 + 0.875 * (1 + cos(pi * s / 200)) / 2 : 0.125 },
                      { "table", table,
                        s < 100   ? 1
                        : s < 200 ? 0.5
                                  : 0.25 } };
        for (int k = 0; k < COUNT(cases); k++)
            for (double warm_up = 0; warm_up <= 50; warm_up += 25) {
                pd_schedule schedule = cases[k].schedule;
                double rising = warm_up > 0 && s < warm_up ? s / warm_up : 1;
                schedule.warm_up = warm_up;
                check_near(pd_schedule_factor(&schedule, s), cases[k].factor * rising, 1e-14, cases[k].name);
            }
    }
}

/* ---- what is refused ---- */

/* The first line of `text`'s failure must name what is wrong; then nothing runs any more. */
static void refuse(pd_optimizer o, const pd_trainer_opts *opts, const char *text, int line) {
    known k = known_net(NULL);
    pd_trainer *trainer = pd_trainer_new(k.net, k.cost, o, opts);
    if (trainer) fail_msg("line %d: expected to be refused: %s", line, text);
    check_contains(pd_error(k.net), text);
    check_contains(pd_error(k.net), "pd_trainer_new: ");
    assert_int_equal(pd_error_status(k.net), PD_E_ARGUMENT);
    known_free(&k);
}

/* `change` sets fields of the optimizer `o`, the options `t`, or the schedule `s` in them. */
#define REFUSED(made, change, text)                                                                                    \
    do {                                                                                                               \
        pd_optimizer o = made;                                                                                         \
        pd_trainer_opts t;                                                                                             \
        pd_schedule *s = &t.schedule;                                                                                  \
        memset(&t, 0, sizeof t);                                                                                       \
        (void)s;                                                                                                       \
        change;                                                                                                        \
        refuse(o, &t, text, __LINE__);                                                                                 \
    } while (0)

static void test_wrong_optimizers_are_refused(void **state) {
    const double nan = (double)NAN, inf = (double)INFINITY;
    (void)state;
    REFUSED(pd_sgd(1), o.kind = PD_OPT_COUNT, "unknown optimizer");
    REFUSED(pd_sgd(1), o.kind = (pd_optimizer_kind)-1, "unknown optimizer");
    REFUSED(pd_sgd(0), (void)0, "rate");
    REFUSED(pd_sgd(-1), (void)0, "rate");
    REFUSED(pd_adam(nan), (void)0, "rate");
    REFUSED(pd_adam(inf), (void)0, "rate");
    REFUSED(pd_momentum(1, 1), (void)0, "momentum");
    REFUSED(pd_momentum(1, -0.1), (void)0, "momentum");
    REFUSED(pd_momentum(1, nan), (void)0, "momentum");
    REFUSED(pd_sgd(1), o.momentum = 0.9, "momentum");
    REFUSED(pd_adam(1), o.momentum = 0.9, "momentum");
    REFUSED(pd_adagrad(1), o.momentum = 0.9, "momentum");
    REFUSED(pd_adam(1), o.nesterov = true, "nesterov");
    REFUSED(pd_rmsprop(1), o.nesterov = true, "nesterov");
    REFUSED(pd_adagrad(1), o.centered = true, "centered");
    REFUSED(pd_momentum(1, 0.9), o.centered = true, "centered");
    REFUSED(pd_rmsprop(1), o.rho = 1, "rho");
    REFUSED(pd_adadelta(1), o.rho = -0.1, "rho");
    REFUSED(pd_decayed_adagrad(1), o.rho = nan, "rho");
    REFUSED(pd_sgd(1), o.rho = 0.9, "rho");
    REFUSED(pd_adagrad(1), o.rho = 0.9, "rho");
    REFUSED(pd_adam(1), o.beta1 = 1, "beta");
    REFUSED(pd_adam(1), o.beta2 = 1, "beta");
    REFUSED(pd_adamw(1), o.beta1 = -1, "beta");
    REFUSED(pd_adamax(1), o.beta2 = nan, "beta");
    REFUSED(pd_sgd(1), o.beta1 = 0.5, "beta");
    REFUSED(pd_rmsprop(1), o.beta2 = 0.5, "beta");
    REFUSED(pd_adam(1), o.epsilon = -1, "epsilon");
    REFUSED(pd_adam(1), o.epsilon = nan, "epsilon");
    REFUSED(pd_adam(1), o.epsilon = inf, "epsilon");
    REFUSED(pd_adagrad(1), o.epsilon = 0, "epsilon"); /* would divide 0 by 0 where a gradient is 0 */
    REFUSED(pd_sgd(1), o.epsilon = 0.1, "epsilon");
    REFUSED(pd_momentum(1, 0.9), o.epsilon = 0.1, "epsilon");
}

static void test_wrong_options_are_refused(void **state) {
    static const double good[] = { 1, 2 }, falling[] = { 2, 1 }, equal[] = { 1, 1 };
    static const double odd[] = { 1, NAN }, negative[] = { 1, -1 };
    static const pd_updater other_version = { .api_version = PD_API_VERSION + 1 };
    static const pd_updater empty = { .api_version = PD_API_VERSION, .name = "empty" };
    const double nan = (double)NAN, inf = (double)INFINITY;
    (void)state;
    REFUSED(pd_sgd(1), t.l1 = -1, "l1");
    REFUSED(pd_sgd(1), t.l1 = nan, "l1");
    REFUSED(pd_sgd(1), t.l2 = -1, "l2");
    REFUSED(pd_sgd(1), t.l2 = inf, "l2");
    REFUSED(pd_sgd(1), t.clip_value = -1, "clip_value");
    REFUSED(pd_sgd(1), t.clip_value = nan, "clip_value");
    REFUSED(pd_sgd(1), t.clip_norm = -1, "clip_norm");
    REFUSED(pd_sgd(1), t.clip_norm = nan, "clip_norm");
    REFUSED(pd_sgd(1), t.clip_value = inf, "clip_value and clip_norm must be finite");
    REFUSED(pd_sgd(1), t.clip_norm = inf, "clip_value and clip_norm must be finite");
    REFUSED(pd_sgd(1), t.l2 = PD_ZERO, "l1 and l2");
    REFUSED(pd_sgd(1), t.clip_norm = PD_ZERO, "clip_norm");
    REFUSED(pd_sgd(1), t.average_window = -0.1, "average_window");
    REFUSED(pd_sgd(1), t.average_window = 1.1, "average_window");
    REFUSED(pd_sgd(1), t.average_window = nan, "average_window");
    REFUSED(pd_sgd(1), (t.average_window = 0.5, t.average_max = -1), "average_max");
    REFUSED(pd_sgd(1), t.average_max = 100, "average_max");
    REFUSED(pd_sgd(1), t.updater = (pd_updater *)(uintptr_t)&other_version, "interface version");
    REFUSED(pd_sgd(1), t.updater = (pd_updater *)(uintptr_t)&empty, "lacks");
    REFUSED(pd_sgd(1), s->kind = (pd_schedule_kind)99, "schedule");
    REFUSED(pd_sgd(1), s->kind = (pd_schedule_kind)-1, "schedule");
    REFUSED(pd_sgd(1), s->a = 1, "schedule"); /* but which? */
    REFUSED(pd_sgd(1), s->b = 1, "schedule");
    REFUSED(pd_sgd(1), (s->samples = s->factors = good, s->count = 2), "schedule");
    REFUSED(pd_sgd(1), s->warm_up = -1, "warm_up");
    REFUSED(pd_sgd(1), s->warm_up = nan, "warm_up");
    REFUSED(pd_sgd(1), s->warm_up = inf, "warm_up");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_POLY, s->a = -1, s->b = 1), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_POLY, s->a = 1, s->b = PD_ZERO), "a and b take no PD_ZERO");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_POLY, s->a = 1, s->b = nan), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_LINEAR, s->a = -1), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_LINEAR, s->a = 1, s->b = -1), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_LINEAR, s->a = 1, s->b = nan), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_EXP, s->a = 0.5), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_EXP, s->b = 1), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_STEP, s->a = 0.5, s->b = -1), "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_STEP, s->a = inf, s->b = 1), "schedule");
    REFUSED(pd_sgd(1), s->kind = PD_SCHEDULE_COSINE, "schedule");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_COSINE, s->a = 1, s->b = -0.5), "schedule");
    REFUSED(pd_sgd(1), s->kind = PD_SCHEDULE_TABLE, "table");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = good, s->count = 2), "table");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = s->factors = good, s->count = -1), "table");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = falling, s->factors = good, s->count = 2), "rise");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = equal, s->factors = good, s->count = 2), "rise");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = odd, s->factors = good, s->count = 2), "rise");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = good, s->factors = negative, s->count = 2),
            "factors");
    REFUSED(pd_sgd(1), (s->kind = PD_SCHEDULE_TABLE, s->samples = good, s->factors = odd, s->count = 2), "factors");
}

/* Options of a parameter are refused by the layer that declares it. */
static void test_wrong_parameter_options_are_refused(void **state) {
    static const struct {
        pd_param_opts opts;
        const char *text;
    } cases[] = { { { .rate_factor = -1 }, "rate_factor is -1" },
                  { { .rate_factor = NAN }, "rate_factor is nan" },
                  { { .rate_factor = PD_ZERO }, "rate_factor is 0, expected a positive number; is_static" },
                  { { .rate_factor = INFINITY }, "rate_factor is inf" },
                  { { .prune = PD_ZERO }, "prune" },
                  { { .init = { PD_INIT_NORMAL, PD_ZERO, 1 } }, "wrong initialiser" },
                  { { .l1 = -1 }, "l1" },
                  { { .l2 = NAN }, "l2 is nan" },
                  { { .clip = -1 }, "clip is -1" },
                  { { .clip = INFINITY }, "clip is inf" },
                  { { .prune = 1 }, "prune" },
                  { { .prune = -0.1 }, "prune" },
                  { { .prune = NAN }, "prune" } };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++) {
        known k = known_net(&cases[i].opts);
        assert_null(k.cost);
        check_contains(pd_error(k.net), cases[i].text);
        check_contains(pd_error(k.net), "fc1.weight");
        assert_int_equal(pd_error_status(k.net), PD_E_ARGUMENT);
        assert_null(pd_trainer_new(k.net, k.cost, pd_sgd(1), NULL));
        check_contains(pd_error(k.net), "fc1.weight");
        known_free(&k);
    }
}

/* ---- clipping by norm: what updaters ask for ---- */

static void test_clip_scale(void **state) {
    static const struct {
        double clip_norm;
        bool sum;
        double norm;
        int64_t samples;
        double scale;
    } cases[] = { { 0, false, 1e3, 4, 1 }, { 2, false, 8, 4, 1 }, { 2, false, 10, 4, 0.8 }, { 2, false, 80, 4, 0.1 },
                  { 2, true, 8, 4, 0.25 }, { 2, true, 1, 4, 1 },  { 2, false, 0, 4, 1 },    { 2, false, 0, 0, 1 } };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++) {
        pd_trainer_opts opts;
        known k;
        memset(&opts, 0, sizeof opts);
        opts.clip_norm = cases[i].clip_norm;
        opts.sum_gradients = cases[i].sum;
        k = known_trainer(NULL, pd_sgd(1), &opts);
        assert_true(pd_trainer_clips_norm(k.trainer) == (cases[i].clip_norm > 0));
        check_near(pd_trainer_clip_scale(k.trainer, cases[i].norm, cases[i].samples), cases[i].scale, 1e-14, "scale");
        known_free(&k);
    }
}

/* ---- model averaging ---- */

enum { AVERAGED = 300, ALL = 14 /* numbers in the three parameters */ };

static void get_all(const known *k, double values[ALL]) {
    for (int i = 0, at = 0; i < PARAMS; at += (int)sizes[i++]) get(k->params[i], values + at);
}

/* Is `average` the mean of the latest `count` of `n` values? */
static bool is_mean(double (*history)[ALL], int n, int count, const double *average) {
    for (int j = 0; j < ALL; j++) {
        double sum = 0;
        for (int i = n - count; i < n; i++) sum += history[i][j];
        if (!(fabs(sum / count - average[j]) < 10 * REAL_TOLERANCE)) return false;
    }
    return true;
}

/* After every step the average must be that of the latest updates, as many as one to two windows. */
static void follow_average(double window, int64_t most) {
    static double history[AVERAGED][ALL];
    pd_trainer_opts opts;
    known k;
    memset(&opts, 0, sizeof opts);
    opts.average_window = window;
    opts.average_max = most;
    k = known_trainer(NULL, pd_momentum(0.05, 0.9), &opts);
    for (int n = 1; n <= AVERAGED; n++) {
        double gradients[PARAMS][MOST], average[ALL], after[ALL];
        double wanted = most > 0 && window * n > (double)most ? (double)most : window * n;
        int count = (int)ceil(wanted), longest = (int)fmin((double)n, ceil(2 * wanted));
        known_step(&k, gradients);
        get_all(&k, history[n - 1]);
        assert_int_equal(pd_use_average(k.trainer, true), PD_OK);
        assert_int_equal(pd_use_average(k.trainer, true), PD_OK);
        get_all(&k, average);
        assert_int_equal(pd_use_average(k.trainer, false), PD_OK);
        assert_int_equal(pd_use_average(k.trainer, false), PD_OK);
        get_all(&k, after);
        assert_memory_equal(after, history[n - 1], sizeof after);
        if (window == 1 && most == 0) count = n;
        while (count <= longest && !is_mean(history, n, count, average)) count++;
        if (count > longest)
            fail_msg("window %g, at most %d: after %d updates the average is not that of the latest %g to %d", window,
                     (int)most, n, ceil(wanted), longest);
    }
    known_free(&k);
}

static void test_average_windows(void **state) {
    static const struct {
        double window;
        int64_t most;
    } cases[] = { { 1, 0 }, { 0.5, 0 }, { 0.1, 0 }, { 0.003, 0 }, { 1, 20 }, { 0.5, 1 }, { 0.25, 1000 } };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++) {
        random_seed((uint64_t)i + 100);
        follow_average(cases[i].window, cases[i].most);
    }
}

/* A sum of very many values, which hardly change, stays accurate, also in float. */
static void test_long_average(void **state) {
    enum { UPDATES = 40000 };
    pd_trainer_opts opts;
    double sums[ALL] = { 0 }, values[ALL], gradients[PARAMS][MOST];
    known k;
    (void)state;
    random_seed(200);
    memset(&opts, 0, sizeof opts);
    opts.average_window = 1;
    k = known_trainer(NULL, pd_sgd(1e-6), &opts);
    for (int n = 0; n < UPDATES; n++) {
        known_step(&k, gradients);
        get_all(&k, values);
        for (int j = 0; j < ALL; j++) sums[j] += values[j] / UPDATES;
    }
    pd_use_average(k.trainer, true);
    get_all(&k, values);
    for (int j = 0; j < ALL; j++) check_near(values[j], sums[j], sizeof(pd_real) == 8 ? 1e-14 : 1.5e-7, "long average");
    known_free(&k);
}

/* Statistics are averaged with the weights that they belong to, and swapped with them. */
static void test_averaged_statistics(void **state) {
    enum { STEPS = 12 };
    static const char *const names[] = { "n.running_mean", "n.running_var", "fc.weight", "fixed" };
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 1), *y, *fixed;
    pd_trainer *trainer;
    pd_batch *batch;
    double sums[4] = { 0, 0, 0, 0 };
    pd_real last[4], value;
    (void)state;
    random_seed(400);
    fixed = pd_fc(net, x, 1, &(pd_fc_opts){ .weight = { .name = "fixed", .is_static = true }, .no_bias = true });
    y = pd_batch_norm(net, pd_fc(net, fixed, 1, &(pd_fc_opts){ .name = "fc" }), &(pd_batch_norm_opts){ .name = "n" });
    trainer = pd_trainer_new(net, pd_sum_cost(net, pd_fc(net, y, 1, &(pd_fc_opts){ .act = PD_SQUARE }), NULL),
                             pd_momentum(0.1, 0.9), &(pd_trainer_opts){ .average_window = 1 });
    batch = pd_batch_new(net);
    for (int n = 0; n < STEPS; n++) {
        pd_batch_clear(batch);
        for (int r = 0; r < 5; r++) {
            *pd_batch_add_row(batch, 0) = (pd_real)uniform(n, n + 3);
            assert_int_equal(pd_batch_end_sample(batch), PD_OK);
        }
        assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_OK);
        for (int k = 0; k < 4; k++) {
            assert_int_equal(pd_param_get(pd_param_find(net, names[k]), &last[k], 1), PD_OK);
            sums[k] += (double)last[k] / STEPS;
        }
    }
    for (int on = 1; on >= 0; on--) {
        assert_int_equal(pd_use_average(trainer, on), PD_OK);
        for (int k = 0; k < 4; k++) {
            assert_int_equal(pd_param_get(pd_param_find(net, names[k]), &value, 1), PD_OK);
            if (on && k < 3) check_near((double)value, sums[k], REAL_TOLERANCE, names[k]);
            else assert_true(value == last[k]);
        }
    }
    assert_true(fabs(sums[0] - (double)last[0]) > 1);
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

/* Training on swaps the true values back in first; so does freeing the trainer. */
static void test_average_is_swapped_out(void **state) {
    pd_trainer_opts opts;
    double gradients[PARAMS][MOST], a[ALL], b[ALL];
    known one, two;
    (void)state;
    memset(&opts, 0, sizeof opts);
    opts.average_window = 0.5;
    one = known_trainer(NULL, pd_adam(0.1), &opts);
    two = known_trainer(NULL, pd_adam(0.1), &opts);
    assert_int_equal(pd_use_average(one.trainer, true), PD_OK); /* nothing to average yet */
    get_all(&one, a);
    get_all(&two, b);
    assert_memory_equal(a, b, sizeof a);
    for (int i = 0; i < 20; i++) {
        random_seed(300 + (uint64_t)i);
        known_step(&one, gradients);
        random_seed(300 + (uint64_t)i);
        known_step(&two, gradients);
        pd_use_average(two.trainer, true);
        assert_int_equal(pd_train_batch(two.trainer, two.batch, NULL), PD_OK);
        assert_int_equal(pd_train_batch(one.trainer, one.batch, NULL), PD_OK);
        get_all(&one, a);
        get_all(&two, b);
        assert_memory_equal(a, b, sizeof a);
    }
    pd_use_average(two.trainer, true);
    pd_trainer_free(two.trainer);
    two.trainer = NULL;
    get_all(&two, b);
    assert_memory_equal(a, b, sizeof a);
    assert_int_equal(pd_use_average(NULL, true), PD_E_ARGUMENT);
    known_free(&one);
    known_free(&two);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_methods_and_options),
        cmocka_unit_test(test_usual_constants),
        cmocka_unit_test(test_schedules),
        cmocka_unit_test(test_wrong_optimizers_are_refused),
        cmocka_unit_test(test_wrong_options_are_refused),
        cmocka_unit_test(test_wrong_parameter_options_are_refused),
        cmocka_unit_test(test_clip_scale),
        cmocka_unit_test(test_average_windows),
        cmocka_unit_test(test_long_average),
        cmocka_unit_test(test_averaged_statistics),
        cmocka_unit_test(test_average_is_swapped_out),
    };
    return run_group(tests, NULL, NULL);
}
