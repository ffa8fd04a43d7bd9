/* Every evaluator against a reference that looks at all rows, classes and pairs, on random batches with and without
   weights; sums merged from two halves equal those of the whole; degenerate and wrong inputs; a user's evaluator. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "inside.h"
#include "support.h"

/* ---- a net of inputs only, and rows for it ---- */

enum { MAX_ROWS = 60, MAX_WIDTH = 6 };

typedef struct rows {
    int64_t count, width, classes;
    bool label_numbers, sequences;
    double out[MAX_ROWS][MAX_WIDTH], target[MAX_ROWS][MAX_WIDTH], weight[MAX_ROWS];
    int64_t label[MAX_ROWS], query[MAX_ROWS]; /* rows of one query stand together */
} rows;

typedef struct bench {
    pd_net *net;
    pd_layer *out, *label, *target, *weight, *query;
} bench;

static bench make_net(const rows *r) {
    bench b;
    b.net = pd_net_new(NULL);
    b.out = pd_vector(b.net, "out", r->width);
    if (r->sequences) pd_sequence(b.out);
    b.label = r->label_numbers ? pd_vector(b.net, "label", 1) : pd_label(b.net, "label", r->classes);
    if (r->sequences) pd_sequence(b.label);
    b.target = pd_vector(b.net, "target", r->width);
    if (r->sequences) pd_sequence(b.target);
    b.weight = pd_vector(b.net, "weight", 1);
    if (r->sequences) pd_sequence(b.weight);
    b.query = pd_ids(b.net, "query", MAX_ROWS);
    if (r->sequences) pd_sequence(b.query);
    return b;
}

static double real(double low, double high) { return (double)(pd_real)uniform(low, high); }

/* Scores on a coarse grid, so that ties happen. */
static void random_rows(rows *r, int64_t width, int64_t classes) {
    int64_t query = 0;
    memset(r, 0, sizeof *r);
    r->count = below(MAX_ROWS + 1);
    r->width = width;
    r->classes = classes;
    for (int64_t i = 0; i < r->count; i++) {
        for (int64_t j = 0; j < width; j++) {
            r->out[i][j] = (double)below(33) / 32;
            r->target[i][j] = real(-2, 2);
        }
        r->label[i] = below(classes);
        r->weight[i] = below(5) ? real(0, 3) : 0;
        r->query[i] = query += below(4) == 0;
    }
}

static void add_batch(const bench *b, const rows *r, int64_t first, int64_t end) {
    pd_layer *targets[5];
    pd_batch *batch = pd_batch_new(b->net);
    for (int64_t i = first; i < end; i++) {
        pd_real *out = pd_batch_add_row(batch, 0), *target;
        if (r->label_numbers) *pd_batch_add_row(batch, 1) = (pd_real)r->label[i];
        else pd_batch_add_id(batch, 1, r->label[i]);
        target = pd_batch_add_row(batch, 2);
        for (int64_t j = 0; j < r->width; j++) out[j] = (pd_real)r->out[i][j], target[j] = (pd_real)r->target[i][j];
        *pd_batch_add_row(batch, 3) = (pd_real)r->weight[i];
        pd_batch_add_id(batch, 4, r->query[i]);
        if (!r->sequences || i + 1 == end || r->query[i + 1] != r->query[i])
            assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    targets[0] = b->out, targets[1] = b->label, targets[2] = b->target, targets[3] = b->weight, targets[4] = b->query;
    assert_int_equal(pd_forward(b->net, batch, PD_PREDICT, targets, 5), PD_OK);
    if (inside_evaluators_update(b->net) != PD_OK)
        fail_msg("%s (seed %llu)", pd_error(b->net), (unsigned long long)random_key);
    pd_batch_free(batch);
}

static void check_values(const pd_evaluator *e, const double *expected) {
    for (int k = 0; k < e->type->value_count; k++) {
        double value = pd_evaluator_value(e, k);
        bool near = isnan(value) ? isnan(expected[k]) : fabs(value - expected[k]) <= 1e-6 * (1 + fabs(value));
        if (!near)
            fail_msg("%s of %s: got %.12g, expected %.12g (seed %llu)", e->type->value_names[k], e->type->name, value,
                     expected[k], (unsigned long long)random_key);
    }
}

/* ---- references ---- */

static double weight_of(const rows *r, int64_t i, bool weighted) { return weighted ? r->weight[i] : 1; }

/* Precision and recall take the first of equal maxima. */
static int64_t said(const rows *r, int64_t i, double threshold) {
    int64_t best = 0;
    if (r->width == 1) return r->out[i][0] > threshold;
    for (int64_t j = 1; j < r->width; j++)
        if (r->out[i][j] > r->out[i][best]) best = j;
    return best;
}

static void naive_error(const rows *r, bool weighted, int64_t top_k, double threshold, double *values) {
    double wrong = 0, all = 0;
    for (int64_t i = 0; i < r->count; i++) {
        bool taken[MAX_WIDTH] = { false }, found = false;
        for (int64_t k = 0; k < top_k; k++) { /* takes the largest k times */
            int64_t best = -1;
            for (int64_t j = 0; j < r->width; j++)
                if (!taken[j] && (best < 0 || r->out[i][j] > r->out[i][best])) best = j;
            taken[best] = true;
            found |= best == r->label[i];
        }
        if (r->width == 1) found = said(r, i, threshold) == r->label[i];
        wrong += found ? 0 : weight_of(r, i, weighted);
        all += weight_of(r, i, weighted);
    }
    values[0] = wrong / all;
}

static void naive_precision_recall(const rows *r, bool weighted, double threshold, double *values) {
    double right = 0, all = 0, count = 0;
    values[0] = values[1] = values[2] = 0;
    for (int64_t c = r->width == 1 ? 1 : 0; c < r->classes; c++) {
        double tp = 0, fp = 0, fn = 0, precision, recall;
        for (int64_t i = 0; i < r->count; i++) {
            bool yes = said(r, i, threshold) == c, is = r->label[i] == c;
            double w = weight_of(r, i, weighted);
            tp += yes && is ? w : 0, fp += yes && !is ? w : 0, fn += !yes && is ? w : 0;
        }
        if (tp + fp + fn == 0 && r->width > 1) continue;
        precision = tp > 0 ? tp / (tp + fp) : 0, recall = tp > 0 ? tp / (tp + fn) : 0;
        values[0] += precision, values[1] += recall;
        values[2] += tp > 0 ? 2 * precision * recall / (precision + recall) : 0;
        count++;
    }
    for (int64_t i = 0; i < r->count; i++) {
        right += said(r, i, threshold) == r->label[i] ? weight_of(r, i, weighted) : 0;
        all += weight_of(r, i, weighted);
    }
    for (int k = 0; k < 3; k++) values[k] = all > 0 ? values[k] / count : (double)NAN;
    values[3] = right / all;
}

static void naive_auc(const rows *r, bool weighted, double *values) {
    double right = 0, all = 0;
    for (int64_t i = 0; i < r->count; i++)
        for (int64_t j = 0; j < r->count; j++) {
            double w = weight_of(r, i, weighted) * weight_of(r, j, weighted);
            double a = r->out[i][r->width - 1], b = r->out[j][r->width - 1];
            if (r->label[i] != 1 || r->label[j] != 0) continue;
            right += a > b ? w : a == b ? w / 2 : 0;
            all += w;
        }
    values[0] = right / all;
}

static void naive_pnpair(const rows *r, bool weighted, bool by_query, double *values) {
    memset(values, 0, 4 * sizeof *values);
    for (int64_t i = 0; i < r->count; i++)
        for (int64_t j = 0; j < r->count; j++) {
            double w = weight_of(r, i, weighted) * weight_of(r, j, weighted);
            if (r->label[i] <= r->label[j] || (by_query && r->query[i] != r->query[j])) continue;
            values[r->out[i][0] > r->out[j][0] ? 0 : r->out[i][0] < r->out[j][0] ? 1 : 2] += w;
        }
    values[3] = values[1] > 0 ? values[0] / values[1] : 0;
}

static void naive_mean_error(const rows *r, bool weighted, double *values) {
    double absolute = 0, squared = 0, all = 0;
    for (int64_t i = 0; i < r->count; i++)
        for (int64_t j = 0; j < r->width; j++) {
            double d = fabs(r->out[i][j] - r->target[i][j]);
            absolute += weight_of(r, i, weighted) * d, squared += weight_of(r, i, weighted) * d * d;
            all += weight_of(r, i, weighted);
        }
    values[0] = absolute / all;
    values[1] = sqrt(squared / all);
}

/* ---- one random net, all evaluators that fit ---- */

typedef struct expectation {
    pd_evaluator *e;
    double values[4];
} expectation;

/* Creates evaluators on `b` and fills in what they should find in `r`. Their number is returned. */
static int expect(const bench *b, const rows *r, expectation *x) {
    static const double thresholds[] = { 0, 0.25, PD_ZERO, -0.25, 0.75 };
    int n = 0;
    for (int weighted = 0; weighted < 2; weighted++) {
        pd_evaluator_opts o;
        memset(&o, 0, sizeof o);
        o.weight = weighted ? b->weight : NULL;
        x[n].e = pd_eval_mean_error(b->net, b->out, b->target, &o);
        naive_mean_error(r, weighted, x[n++].values);
        if (r->width <= 2) {
            x[n].e = pd_eval_auc(b->net, b->out, b->label, &o);
            naive_auc(r, weighted, x[n++].values);
        }
        if (r->width == 1) {
            x[n].e = pd_eval_pnpair(b->net, b->out, b->label, &o);
            naive_pnpair(r, weighted, r->sequences, x[n++].values);
            o.query = b->query;
            x[n].e = pd_eval_pnpair(b->net, b->out, b->label, &o);
            naive_pnpair(r, weighted, true, x[n++].values);
            o.query = NULL;
            o.threshold = thresholds[(r->count + weighted) % COUNT(thresholds)];
        }
        x[n].e = pd_eval_precision_recall(b->net, b->out, b->label, &o);
        naive_precision_recall(r, weighted, meant(o.threshold, 0.5), x[n++].values);
        x[n].e = pd_eval_error(b->net, b->out, b->label, &o);
        naive_error(r, weighted, 1, meant(o.threshold, 0.5), x[n++].values);
        if (r->width > 1) {
            o.top_k = 2;
            x[n].e = pd_eval_error(b->net, b->out, b->label, &o);
            naive_error(r, weighted, 2, 0, x[n++].values);
        }
    }
    if (pd_error_status(b->net) != PD_OK) fail_msg("%s", pd_error(b->net));
    return n;
}

/* Seed by seed: the whole in one batch, then in two batches, then in two nets merged. */
static void test_references(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 60; seed++) {
        rows r;
        bench b, half;
        expectation whole[16], part[16];
        int64_t width, cut = 0;
        int n;
        random_seed(seed);
        width = 1 + below(MAX_WIDTH);
        random_rows(&r, width, width == 1 ? 2 : width);
        r.sequences = seed % 2;
        r.label_numbers = width == 1 && seed % 3 == 0;
        b = make_net(&r);
        n = expect(&b, &r, whole);
        add_batch(&b, &r, 0, r.count);
        for (int k = 0; k < n; k++) check_values(whole[k].e, whole[k].values);
        for (int64_t i = 1; i < r.count; i++)
            if (r.query[i] != r.query[i - 1] && (cut == 0 || below(2))) cut = i; /* pairs stay in one batch */
        half = make_net(&r);
        expect(&half, &r, part);
        for (int k = 0; k < n; k++) pd_evaluator_reset(whole[k].e);
        add_batch(&b, &r, 0, cut);
        add_batch(&half, &r, cut, r.count);
        for (int k = 0; k < n; k++) {
            assert_int_equal(pd_evaluator_merge(whole[k].e, part[k].e), PD_OK);
            if (strcmp(whole[k].e->type->name, "pnpair") == 0 && !whole[k].e->opts.query && !r.sequences) continue;
            check_values(whole[k].e, whole[k].values);
        }
        pd_net_free(b.net);
        pd_net_free(half.net);
    }
}

static void test_list_and_names(void **state) {
    rows r;
    bench b;
    pd_evaluator *first, *second, *third;
    pd_evaluator_opts o;
    (void)state;
    random_seed(1);
    random_rows(&r, 3, 3);
    b = make_net(&r);
    memset(&o, 0, sizeof o);
    o.name = "mine";
    assert_null(pd_evaluator_first(b.net));
    assert_null(pd_evaluator_first(NULL));
    first = pd_eval_error(b.net, b.out, b.label, NULL);
    second = pd_eval_mean_error(b.net, b.out, b.target, &o);
    third = pd_eval_error(b.net, b.out, b.label, NULL);
    assert_ptr_equal(pd_evaluator_first(b.net), first);
    assert_ptr_equal(first->next, second);
    assert_ptr_equal(second->next, third);
    assert_null(third->next);
    assert_string_equal(first->name, "error1");
    assert_string_equal(second->name, "mine");
    assert_string_equal(third->name, "error2");
    assert_true(isnan(pd_evaluator_value(first, 0))); /* nothing seen yet */
    assert_true(isnan(pd_evaluator_value(first, 1)));
    assert_true(isnan(pd_evaluator_value(first, -1)));
    assert_true(isnan(pd_evaluator_value(NULL, 0)));
    assert_int_equal(pd_evaluator_merge(first, second), PD_E_ARGUMENT);
    check_contains(pd_error(b.net), "error1: expected error with 2 sums to merge, got mean_error with 3");
    assert_int_equal(pd_evaluator_merge(first, NULL), PD_E_ARGUMENT);
    assert_int_equal(pd_evaluator_merge(NULL, first), PD_E_ARGUMENT);
    pd_evaluator_reset(NULL);
    pd_net_free(b.net);
}

/* ---- degenerate and wrong values ---- */

static void test_one_class_only(void **state) {
    rows r;
    bench b;
    pd_evaluator *auc, *pairs, *precision;
    (void)state;
    random_seed(2);
    do random_rows(&r, 1, 2);
    while (r.count == 0);
    for (int64_t i = 0; i < r.count; i++) r.label[i] = 0, r.out[i][0] = 0.25;
    b = make_net(&r);
    auc = pd_eval_auc(b.net, b.out, b.label, NULL);
    pairs = pd_eval_pnpair(b.net, b.out, b.label, NULL);
    precision = pd_eval_precision_recall(b.net, b.out, b.label, NULL);
    add_batch(&b, &r, 0, r.count);
    assert_true(isnan(pd_evaluator_value(auc, 0)));
    for (int k = 0; k < 4; k++) assert_true(pd_evaluator_value(pairs, k) == 0);
    for (int k = 0; k < 3; k++) assert_true(pd_evaluator_value(precision, k) == 0);
    assert_true(pd_evaluator_value(precision, 3) == 1);
    pd_net_free(b.net);
}

/* Each kind of wrong number is refused by name, and nothing of the batch is counted. */
static void test_wrong_numbers(void **state) {
    static const struct {
        int slot;
        double value;
        const char *text;
    } wrong[] = { { 0, NAN, "row 1 of \"out\": expected numbers, got" },
                  { 2, NAN, "row 1 of \"target\": expected numbers, got" },
                  { 3, NAN, "row 1 of \"weight\": expected a weight >= 0, got" },
                  { 3, -1, "row 1 of \"weight\": expected a weight >= 0, got -1" },
                  { 3, INFINITY, "row 1 of \"weight\": expected a weight >= 0, got inf" } };
    (void)state;
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        rows r;
        bench b;
        pd_evaluator *auc;
        pd_evaluator_opts o;
        pd_layer *targets[5];
        pd_batch *batch;
        random_seed(3);
        random_rows(&r, 1, 2);
        b = make_net(&r);
        memset(&o, 0, sizeof o);
        o.weight = b.weight;
        auc = pd_eval_auc(b.net, b.out, b.label, &o);
        assert_non_null(pd_eval_mean_error(b.net, b.out, b.target, NULL));
        batch = pd_batch_new(b.net);
        for (int i = 0; i < 2; i++) {
            for (int slot = 0; slot < 4; slot++)
                if (slot == 1) pd_batch_add_id(batch, 1, i);
                else *pd_batch_add_row(batch, slot) = (pd_real)(i == 1 && slot == wrong[k].slot ? wrong[k].value : 0.5);
            pd_batch_add_id(batch, 4, 0);
            pd_batch_end_sample(batch);
        }
        targets[0] = b.out, targets[1] = b.label, targets[2] = b.target, targets[3] = b.weight, targets[4] = b.query;
        assert_int_equal(pd_forward(b.net, batch, PD_PREDICT, targets, 5), PD_OK);
        assert_int_equal(inside_evaluators_update(b.net), PD_E_NUMERIC);
        check_contains(pd_error(b.net), wrong[k].text);
        if (wrong[k].slot != 2)
            for (int64_t i = 0; i < auc->sum_count; i++) assert_true(auc->sums[i] == 0);
        pd_batch_free(batch);
        pd_net_free(b.net);
    }
}

/* ---- area under the curve: by the order of scores alone, exact or nearly so however many there are ---- */

typedef struct scored {
    pd_net *net;
    pd_layer *score, *label;
    pd_evaluator *auc[2];
} scored;

static scored make_scored(void) {
    scored s;
    s.net = pd_net_new(NULL);
    s.score = pd_vector(s.net, "score", 1), s.label = pd_label(s.net, "label", 2);
    for (int i = 0; i < 2; i++) s.auc[i] = pd_eval_auc(s.net, s.score, s.label, NULL);
    assert_non_null(s.auc[1]);
    return s;
}

static void add_scores(pd_evaluator *e, const pd_real *scores, const int64_t *labels, int64_t count) {
    pd_tensor score, label;
    const pd_tensor *inputs[4] = { &score, &label, NULL, NULL };
    memset(&score, 0, sizeof score), memset(&label, 0, sizeof label);
    score.rows = label.rows = count, score.width = label.width = 1;
    score.data = (pd_real *)(uintptr_t)scores, label.ids = labels;
    assert_int_equal(e->type->update(e, inputs), PD_OK);
}

static void test_auc_of_any_scores(void **state) {
    static const double values[] = { 0.4, 0.1, 0.35, 0.8, 0.35, 0.9 };
    const int64_t labels[] = { 0, 0, 1, 1, 0, 1 };
    scored s = make_scored();
    (void)state;
    for (int k = 0; k < 6; k++) {
        pd_real scores[6];
        for (int i = 0; i < 6; i++)
            scores[i] = (pd_real)(k == 0   ? values[i]
                                  : k == 1 ? 1e-6 * values[i]
                                  : k == 2 ? 1e-30 * values[i]
                                  : k == 3 ? values[i] - 0.4
                                  : k == 4 ? 1000 * values[i]
                                           : 1 - 1e-6 * (1 - values[i]));
        if (k == 4) scores[1] = -(pd_real)INFINITY, scores[5] = (pd_real)INFINITY;
        pd_evaluator_reset(s.auc[0]);
        add_scores(s.auc[0], scores, labels, 6);
        check_near(pd_evaluator_value(s.auc[0], 0), 7.5 / 9, 1e-15, "auc");
        check_near(pd_evaluator_value(s.auc[0], 0), 7.5 / 9, 1e-15, "auc, read again");
        add_scores(s.auc[0], scores, labels, 6);
        check_near(pd_evaluator_value(s.auc[0], 0), 7.5 / 9, 1e-15, "auc of all twice");
    }
    pd_net_free(s.net);
}

typedef struct ranked {
    pd_real score;
    int64_t label;
} ranked;

static int by_score(const void *a, const void *b) {
    pd_real x = ((const ranked *)a)->score, y = ((const ranked *)b)->score;
    return (x > y) - (x < y);
}

/* So many that they don't all have a bin, in one evaluator and merged from two. */
static void test_auc_of_many_scores(void **state) {
    enum { MANY = 500000 };
    ranked *all = (ranked *)calloc(MANY, sizeof *all);
    pd_real *scores = (pd_real *)calloc(MANY, sizeof *scores);
    int64_t *labels = (int64_t *)calloc(MANY, sizeof *labels);
    (void)state;
    for (int k = 0; k < 3; k++) {
        double negatives = 0, positives = 0, area = 0;
        scored s = make_scored();
        random_seed((uint64_t)(40 + k));
        for (int i = 0; i < MANY; i++) {
            double x = uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1);
            labels[i] = below(20) == 0;
            x += labels[i] ? 0.7 : 0;
            scores[i] = (pd_real)(k == 0 ? x : k == 1 ? 1 / (1 + exp(17 - 2 * x)) : 1 / (1 + exp(-12 - 2 * x)));
            all[i].score = scores[i], all[i].label = labels[i];
        }
        qsort(all, MANY, sizeof *all, by_score);
        for (int i = 0, j; i < MANY; i = j) {
            double n[2] = { 0, 0 };
            for (j = i; j < MANY && all[j].score == all[i].score; j++) n[all[j].label]++;
            area += n[1] * (negatives + n[0] / 2);
            negatives += n[0], positives += n[1];
        }
        area /= negatives * positives;
        add_scores(s.auc[0], scores, labels, MANY);
        check_near(pd_evaluator_value(s.auc[0], 0), area, 1e-7, "auc of many");
        pd_evaluator_reset(s.auc[0]);
        for (int i = 0; i < MANY; i += 1000) add_scores(s.auc[i / 1000 % 2], scores + i, labels + i, 1000);
        assert_int_equal(pd_evaluator_merge(s.auc[0], s.auc[1]), PD_OK);
        check_near(pd_evaluator_value(s.auc[0], 0), area, 1e-6, "auc of many, merged");
        pd_net_free(s.net);
    }
    free(all), free(scores), free(labels);
}

static void test_auc_merged(void **state) {
    scored s = make_scored(), whole = make_scored();
    (void)state;
    random_seed(50);
    for (int i = 0; i < 300; i++) {
        pd_real score = (pd_real)below(40);
        int64_t label = below(3) == 0;
        add_scores(s.auc[i % 2], &score, &label, 1);
        add_scores(whole.auc[0], &score, &label, 1);
    }
    assert_int_equal(pd_evaluator_merge(s.auc[1], s.auc[0]), PD_OK);
    check_near(pd_evaluator_value(s.auc[1], 0), pd_evaluator_value(whole.auc[0], 0), 1e-15, "merged auc");
    pd_net_free(s.net), pd_net_free(whole.net);
}

/* ---- misuse ---- */

#define REFUSED(wanted, text, expression)                                                                              \
    do {                                                                                                               \
        pd_net *net = pd_net_new(NULL), *other = pd_net_new(NULL);                                                     \
        pd_layer *x1 = pd_vector(net, "x1", 1), *x3 = pd_vector(net, "x3", 3), *l2 = pd_label(net, "l2", 2);           \
        pd_layer *l3 = pd_label(net, "l3", 3), *foreign = pd_vector(other, "foreign", 1);                              \
        pd_evaluator_opts o;                                                                                           \
        memset(&o, 0, sizeof o);                                                                                       \
        o.name = "it";                                                                                                 \
        (void)x1, (void)x3, (void)l2, (void)l3, (void)foreign;                                                         \
        assert_null(expression);                                                                                       \
        check_contains(pd_error(net), text);                                                                           \
        assert_int_equal(pd_error_status(net), wanted);                                                                \
        assert_null(pd_eval_error(net, x1, l2, NULL));                                                                 \
        check_contains(pd_error(net), text);                                                                           \
        pd_net_free(net);                                                                                              \
        pd_net_free(other);                                                                                            \
    } while (0)

/* Scores about 0, as a hinge leaves them. */
static void test_threshold_of_zero(void **state) {
    static const struct {
        double threshold, error, recall;
    } cases[] = { { 0, 0.4, 0 }, { PD_ZERO, 0, 1 }, { -0.3, 0.4, 1 }, { 0.25, 0.2, 0.5 } };
    static const double scores[] = { 0.3, -0.25, 0.2, -2, 0 };
    (void)state;
    for (int i = 0; i < COUNT(cases); i++) {
        rows r;
        bench b;
        pd_evaluator *error, *recall;
        memset(&r, 0, sizeof r);
        r.count = COUNT(scores), r.width = 1, r.classes = 2;
        for (int k = 0; k < COUNT(scores); k++) r.out[k][0] = scores[k], r.label[k] = scores[k] > 0;
        b = make_net(&r);
        error = pd_eval_error(b.net, b.out, b.label, &(pd_evaluator_opts){ .threshold = cases[i].threshold });
        recall =
            pd_eval_precision_recall(b.net, b.out, b.label, &(pd_evaluator_opts){ .threshold = cases[i].threshold });
        add_batch(&b, &r, 0, r.count);
        check_near(pd_evaluator_value(error, 0), cases[i].error, 1e-12, "error");
        check_near(pd_evaluator_value(recall, 1), cases[i].recall, 1e-12, "recall");
        pd_net_free(b.net);
    }
}

static void test_misuse(void **state) {
    (void)state;
    assert_null(pd_eval_error(NULL, NULL, NULL, NULL));
    REFUSED(PD_E_ARGUMENT, "it: its output is NULL", pd_eval_error(net, NULL, l3, &o));
    REFUSED(PD_E_ARGUMENT, "it: its label is NULL", pd_eval_error(net, x3, NULL, &o));
    REFUSED(PD_E_ARGUMENT, "it: its output, \"foreign\", belongs to another net", pd_eval_error(net, foreign, l2, &o));
    REFUSED(PD_E_SHAPE, "it: expected numbers as output, got \"l3\" with ids", pd_eval_error(net, l3, l3, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected ids below 3, got \"l2\" with ids below 2",
            pd_eval_error(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected ids below 2, got \"l3\" with ids below 3",
            pd_eval_error(net, x1, l3, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected numbers of shape 1, got \"x3\"",
            pd_eval_precision_recall(net, x1, x3, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected ids below 3, got \"x3\"", pd_eval_precision_recall(net, x3, x3, &o));
    REFUSED(PD_E_SHAPE, "it: input 0: expected numbers of shape 2, got \"x3\"", pd_eval_auc(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected ids below 2, got \"l3\"", pd_eval_auc(net, x1, l3, &o));
    REFUSED(PD_E_SHAPE, "it: input 0: expected numbers of shape 1, got \"x3\"", pd_eval_pnpair(net, x3, l2, &o));
    REFUSED(PD_E_SHAPE, "it: input 1: expected numbers of shape 1, got \"x3\"", pd_eval_pnpair(net, x1, x3, &o));
    REFUSED(PD_E_SHAPE, "it: input 3: expected ids below 1, got \"x1\" with numbers",
            (o.query = x1, pd_eval_pnpair(net, x1, l3, &o)));
    REFUSED(PD_E_SHAPE, "it: input 1: expected numbers of shape 3, got \"x1\"", pd_eval_mean_error(net, x3, x1, &o));
    REFUSED(PD_E_SHAPE, "it: input 2: expected numbers of shape 1, got \"x3\"",
            (o.weight = x3, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_SHAPE, "it: input 2: expected numbers of shape 1, got \"l2\" with ids below 2",
            (o.weight = l2, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: error takes no query", (o.query = l3, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: expected top_k > 0, got -1", (o.top_k = -1, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: expected top_k <= 3, the output's width, got 4",
            (o.top_k = 4, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: expected a finite threshold, got nan",
            (o.threshold = NAN, pd_eval_error(net, x1, l2, &o)));
    REFUSED(PD_E_ARGUMENT, "it: error on an output of width 3 has no option threshold",
            (o.threshold = 0.25, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: error on an output of width 3 has no option threshold",
            (o.threshold = PD_ZERO, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: expected top_k > 0", (o.top_k = PD_ZERO, pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "it: auc on an output of width 1 has no option top_k",
            (o.top_k = 2, pd_eval_auc(net, x1, l2, &o)));
    REFUSED(PD_E_ARGUMENT, "the name is already used by another evaluator",
            (pd_eval_error(net, x3, l3, &o), pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "a name has 1 to 200 characters", (o.name = "a\n", pd_eval_error(net, x3, l3, &o)));
    REFUSED(PD_E_ARGUMENT, "lacks a name, setup, update or values", pd_evaluator_add(net, NULL, x3, l3, &o));
}

/* ---- a user's own, of one input: the largest number ---- */

static pd_status largest_setup(pd_evaluator *e) {
    e->sum_count = pd_shape_size(e->inputs[0]->shape) > 2 ? 1 : 0;
    return pd_shape_size(e->inputs[0]->shape) == 2 ? PD_E_UNSUPPORTED : PD_OK;
}

static pd_status largest_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    for (int64_t i = 0; i < inputs[0]->rows * inputs[0]->width; i++)
        if ((double)inputs[0]->data[i] > e->sums[0]) e->sums[0] = (double)inputs[0]->data[i];
    return e->sums[0] > 100 ? PD_E_NUMERIC : PD_OK;
}

static void largest_merge(pd_evaluator *e, const double *sums) {
    if (sums[0] > e->sums[0]) e->sums[0] = sums[0];
}

static void largest_values(const pd_evaluator *e, double *values) { values[0] = e->sums[0]; }

static const char *const largest_names[] = { "value" };

static void test_own_evaluator(void **state) {
    pd_evaluator_type largest = { PD_API_VERSION, "largest",    1, 1, largest_names, largest_setup, largest_update,
                                  largest_values, largest_merge };
    pd_evaluator_type bad = largest;
    rows r;
    bench b;
    pd_evaluator *e, *other;
    double expected = 0;
    (void)state;
    random_seed(4);
    random_rows(&r, 3, 3);
    b = make_net(&r);
    e = pd_evaluator_add(b.net, &largest, b.out, NULL, NULL);
    if (!e) fail_msg("%s", pd_error(b.net));
    add_batch(&b, &r, 0, r.count);
    for (int64_t i = 0; i < 3 * r.count; i++) expected = fmax(expected, r.out[i / 3][i % 3]);
    check_values(e, &expected);
    other = pd_evaluator_add(b.net, &largest, b.out, NULL, NULL);
    if (!other) fail_msg("%s", pd_error(b.net));
    other->sums[0] = expected / 2;
    assert_int_equal(pd_evaluator_merge(e, other), PD_OK); /* by its own means */
    check_values(e, &expected);
    other->sums[0] = expected * 2;
    assert_int_equal(pd_evaluator_merge(e, other), PD_OK);
    expected *= 2;
    check_values(e, &expected);
    assert_int_equal(pd_evaluator_merge(e, e), PD_E_ARGUMENT);
    check_contains(pd_error(b.net), "can't be merged with itself");
    expected /= 2;
    pd_evaluator_reset(e);
    add_batch(&b, &r, 0, r.count);
    pd_evaluator_reset(other);
    r.out[0][0] = 1000; /* a failure without a message of its own */
    {
        pd_batch *batch = pd_batch_new(b.net);
        memset(pd_batch_add_row(batch, 0), 0x41, 3 * sizeof(pd_real));
        pd_batch_add_id(batch, 1, 0);
        memset(pd_batch_add_row(batch, 2), 0, 3 * sizeof(pd_real));
        *pd_batch_add_row(batch, 3) = 1;
        pd_batch_add_id(batch, 4, 0);
        pd_batch_end_sample(batch);
        *batch->slots[0].data = 1000;
        assert_int_equal(pd_forward(b.net, batch, PD_PREDICT, &b.out, 1), PD_OK);
        assert_int_equal(inside_evaluators_update(b.net), PD_E_NUMERIC);
        check_contains(pd_error(b.net), "largest1: not a finite number");
        pd_batch_free(batch);
    }
    pd_net_free(b.net);
    REFUSED(PD_E_ARGUMENT, "it: largest takes no label", pd_evaluator_add(net, &largest, x3, l3, &o));
    REFUSED(PD_E_ARGUMENT, "it: expected setup to leave sum_count > 0, got 0",
            pd_evaluator_add(net, &largest, x1, NULL, &o));
    REFUSED(PD_E_UNSUPPORTED, "it: not supported", pd_evaluator_add(net, &largest, pd_vector(net, "x2", 2), NULL, &o));
    bad.api_version = 99;
    REFUSED(PD_E_ARGUMENT, "largest: evaluator type has interface version 99, expected 1",
            pd_evaluator_add(net, &bad, x3, NULL, &o));
    bad = largest;
    bad.value_count = 17;
    REFUSED(PD_E_ARGUMENT, "largest: expected an evaluator type of 1 to 16 named values, got 17",
            pd_evaluator_add(net, &bad, x3, NULL, &o));
    bad = largest;
    bad.input_count = 5;
    REFUSED(PD_E_ARGUMENT, "largest: expected an evaluator type of 1 to 4 inputs, got 5",
            pd_evaluator_add(net, &bad, x3, NULL, &o));
}

/* ---- as users meet them: through pd_test ---- */

/* A reader of the batch that is its `self`. */
typedef struct replay {
    pd_reader reader;
    pd_batch *batch;
    int64_t next;
} replay;

static pd_status replay_next(pd_reader *reader, pd_batch *batch, int64_t count) {
    replay *p = (replay *)reader->self;
    for (; count > 0 && p->next < p->batch->samples; count--) pd_batch_copy_sample(batch, p->batch, p->next++);
    return count > 0 ? PD_END : PD_OK;
}

static pd_status replay_reset(pd_reader *reader, int64_t pass) {
    (void)pass;
    ((replay *)reader->self)->next = 0;
    return PD_OK;
}

static void test_through_pd_test(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 5), *label = pd_label(net, "label", 3);
    pd_layer *fc = pd_fc(net, x, 3, NULL), *cost = pd_cross_entropy(net, fc, label, NULL);
    pd_evaluator *error = pd_eval_error(net, fc, label, NULL), *all = pd_eval_precision_recall(net, fc, label, NULL);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_sgd(0.1), NULL);
    const pd_real *out;
    double wrong = 0, mean;
    replay p;
    (void)state;
    if (!trainer) fail_msg("%s", pd_error(net));
    random_seed(5);
    memset(&p, 0, sizeof p);
    p.reader.api_version = PD_API_VERSION;
    p.reader.name = "replay";
    p.reader.self = &p;
    p.reader.next = replay_next;
    p.reader.reset = replay_reset;
    p.batch = pd_batch_new(net);
    for (int r = 0; r < 50; r++) {
        pd_real *row = pd_batch_add_row(p.batch, 0);
        for (int j = 0; j < 5; j++) row[j] = (pd_real)uniform(-1, 1);
        pd_batch_add_id(p.batch, 1, below(3));
        pd_batch_end_sample(p.batch);
    }
    for (int twice = 0; twice < 2; twice++) /* sums start anew in each test */
        if (pd_test(trainer, &p.reader, 8, &mean) != PD_OK) fail_msg("%s", pd_error(net));
    assert_int_equal(pd_forward(net, p.batch, PD_PREDICT, &fc, 1), PD_OK);
    out = pd_output(fc, NULL, NULL);
    for (int64_t r = 0; r < 50; r++, out += 3) {
        int64_t largest = out[1] > out[0] ? 1 : 0;
        if (out[2] > out[largest]) largest = 2;
        wrong += largest != p.batch->slots[1].ids[r];
    }
    check_near(pd_evaluator_value(error, 0), wrong / 50, 1e-12, "error");
    check_near(pd_evaluator_value(all, 3), 1 - wrong / 50, 1e-12, "accuracy");
    pd_trainer_free(trainer);
    pd_batch_free(p.batch);
    pd_net_free(net);
}

/* ---- lack of memory ---- */

static void test_lack_of_memory(void **state) {
    bool ok = false;
    (void)state;
    for (int64_t n = 0; !ok; n++) {
        failing_allocator f = { 0, 0, 0 };
        pd_net_opts opts;
        pd_net *net;
        memset(&opts, 0, sizeof opts);
        opts.allocator.alloc = failing_alloc, opts.allocator.free = failing_free, opts.allocator.user = &f;
        f.fail_at = n;
        net = pd_net_new(&opts);
        if (net) {
            pd_layer *out = pd_vector(net, "out", 2), *label = pd_label(net, "label", 2);
            ok = pd_eval_error(net, out, label, NULL) && pd_eval_auc(net, out, label, NULL);
            if (!ok) assert_int_equal(pd_error_status(net), PD_E_MEMORY);
            assert_true(ok || pd_error(net)[0]);
        }
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
        assert_true(ok || f.calls > n);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_references),        cmocka_unit_test(test_list_and_names),
        cmocka_unit_test(test_one_class_only),    cmocka_unit_test(test_wrong_numbers),
        cmocka_unit_test(test_threshold_of_zero), cmocka_unit_test(test_misuse),
        cmocka_unit_test(test_auc_of_any_scores), cmocka_unit_test(test_auc_of_many_scores),
        cmocka_unit_test(test_auc_merged),        cmocka_unit_test(test_own_evaluator),
        cmocka_unit_test(test_through_pd_test),   cmocka_unit_test(test_lack_of_memory)
    };
    return run_group(tests, NULL, NULL);
}
