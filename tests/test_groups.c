/* Recurrent groups: against the built-in layers, in values and gradients; gradients against central differences in nets
   with statics, attention, dropout, sparse tables, shared parameters; a sequence at once against a step at a time; one
   answer; shared nets; devices without host memory; lack of memory; reports; misuse. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>
#include <cmocka.h>

#include "far_device.h"
#include "inside.h"
#include "support.h"

#define IS_DOUBLE (sizeof(pd_real) == 8)

static void check_built(pd_net *net, const void *made) {
    if (!made) fail_msg("%s", pd_error(net));
}

/* Samples with `lengths` rows in the inputs of sequences, those of the second slot on with `others`; NULL: the same. */
static pd_batch *batch_of(pd_net *net, const int64_t *lengths, const int64_t *others, int count) {
    pd_batch *batch = pd_batch_new(net);
    for (int i = 0; i < count; i++) {
        for (int k = 0; k < batch->slot_count; k++) {
            const pd_slot *s = &batch->slots[k];
            int64_t rows = !s->sequence ? 1 : k > 0 && others ? others[i] : lengths[i];
            for (int64_t r = 0; r < rows; r++) {
                pd_real *row = s->kind == PD_SLOT_DENSE ? pd_batch_add_row(batch, k) : NULL;
                for (int64_t j = 0; row && j < s->width; j++) row[j] = (pd_real)uniform(-1, 1);
                if (!row) assert_int_equal(pd_batch_add_id(batch, k, below(s->width)), PD_OK);
            }
        }
        if (pd_batch_end_sample(batch) != PD_OK) fail_msg("%s", batch->error.text);
    }
    return batch;
}

static const int64_t ragged[] = { 3, 0, 1, 7, 2, 7, 1, 0, 4 };
static const int64_t keys_of[] = { 2, 3, 0, 4, 1, 5, 2, 1, 1 };

static void check_gradients_of(pd_layer *layer, const pd_batch *batch, uint64_t seed) {
    pd_gradcheck r;
    if (pd_check_gradients(layer, batch, &(pd_gradcheck_opts){ .seed = seed }, &r) != PD_OK)
        fail_msg("%s", pd_error(layer->net));
    if (r.error > (IS_DOUBLE ? 1e-6 : 5e-2))
        fail_msg("seed %llu: gradient of %s[%lld] is %g, differences say %g", (unsigned long long)seed, r.worst,
                 (long long)r.worst_index, r.analytic, r.numeric);
    assert_true(r.accumulation < REAL_TOLERANCE);
    assert_false(r.all_zero);
}

/* ======================================================================================================== */
/* Nets of groups                                                                                            */

/* h' = (1 - z) tanh(x W_c + b_c + r (h U_c)) + z h, with the parameters of pd_gru under the name "cell". */
static pd_layer *gru_group(pd_net *net, pd_layer *x, int64_t n, pd_layer *boot, bool reverse) {
    pd_group *g = pd_group_begin(net, &(pd_group_opts){ .reverse = reverse });
    pd_layer *in = pd_group_input(g, x), *h = pd_group_memory(g, n, boot), *pair[2], *z, *r, *c, *y;
    pd_layer *xw = pd_fc(net, in, 3 * n, &(pd_fc_opts){ .weight.name = "cell.weight", .bias.name = "cell.bias" });
    pd_layer *hu = pd_fc(net, h, 3 * n, &(pd_fc_opts){ .weight.name = "cell.recurrent", .no_bias = true });
    pair[0] = pd_slice(net, xw, 0, n, NULL), pair[1] = pd_slice(net, hu, 0, n, NULL);
    z = pd_add(net, pair, 2, &(pd_layer_opts){ .act = PD_SIGMOID });
    pair[0] = pd_slice(net, xw, n, n, NULL), pair[1] = pd_slice(net, hu, n, n, NULL);
    r = pd_add(net, pair, 2, &(pd_layer_opts){ .act = PD_SIGMOID });
    pair[0] = pd_slice(net, xw, 2 * n, n, NULL);
    pair[1] = pd_multiply(net, r, pd_slice(net, hu, 2 * n, n, NULL), NULL);
    c = pd_add(net, pair, 2, &(pd_layer_opts){ .act = PD_TANH });
    y = pd_interpolate(net, z, h, c, NULL);
    pd_group_feed(h, y);
    return pd_group_end(g, y);
}

/* c' = f c + i g, h' = o tanh(c'), with the parameters of pd_lstm under the name "cell". */
static pd_layer *lstm_group(pd_net *net, pd_layer *x, int64_t n, pd_layer *boot, bool reverse) {
    pd_group *g = pd_group_begin(net, &(pd_group_opts){ .reverse = reverse });
    pd_layer *in = pd_group_input(g, x), *h = pd_group_memory(g, n, boot), *c = pd_group_memory(g, n, NULL), *pair[2];
    pd_layer *gates[4], *y, *cell;
    pair[0] = pd_fc(net, in, 4 * n, &(pd_fc_opts){ .weight.name = "cell.weight", .bias.name = "cell.bias" });
    pair[1] = pd_fc(net, h, 4 * n, &(pd_fc_opts){ .weight.name = "cell.recurrent", .no_bias = true });
    y = pd_add(net, pair, 2, NULL);
    for (int k = 0; k < 4; k++)
        gates[k] = pd_slice(net, y, k * n, n, &(pd_layer_opts){ .act = k == 2 ? PD_TANH : PD_SIGMOID });
    pair[0] = pd_multiply(net, gates[1], c, NULL), pair[1] = pd_multiply(net, gates[0], gates[2], NULL);
    cell = pd_add(net, pair, 2, NULL);
    y = pd_multiply(net, gates[3], pd_activation(net, cell, PD_TANH, NULL), NULL);
    pd_group_feed(c, cell);
    pd_group_feed(h, y);
    return pd_group_end(g, y);
}

static void copy_params(pd_net *to, pd_net *from) {
    for (pd_param *p = pd_param_first(to); p; p = p->next) {
        pd_param *q = pd_param_find(from, p->name);
        pd_real *numbers = (pd_real *)malloc((size_t)p->size * sizeof *numbers);
        assert_non_null(q);
        assert_int_equal(pd_param_get(q, numbers, p->size), PD_OK);
        assert_int_equal(pd_param_set(p, numbers, p->size), PD_OK);
        free(numbers);
    }
}

static double largest_difference(const pd_real *a, const pd_real *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs((double)a[i] - (double)b[i]));
    return most;
}

/* Forward and backward of both nets: the same costs and gradients. */
static void check_alike(pd_net *const nets[2], pd_layer *const costs[2], pd_layer *const inputs[2],
                        pd_batch *const batches[2]) {
    const double tolerance = IS_DOUBLE ? 1e-10 : 2e-4;
    const pd_real *y[2];
    int64_t rows[2];
    copy_params(nets[1], nets[0]);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pd_zero_grads(nets[i]), PD_OK);
        if (pd_forward(nets[i], batches[i], PD_TRAIN, &costs[i], 1) != PD_OK) fail_msg("%s", pd_error(nets[i]));
        y[i] = pd_output(costs[i], &rows[i], NULL);
        if (pd_backward(nets[i], costs[i]) != PD_OK) fail_msg("%s", pd_error(nets[i]));
    }
    assert_int_equal(rows[0], rows[1]);
    check_near(largest_difference(y[0], y[1], rows[0]), 0, tolerance, "cost");
    check_near(largest_difference(inputs[0]->out.grad, inputs[1]->out.grad, rows[0] * inputs[0]->out.width), 0,
               tolerance, "input's gradient");
    for (pd_param *p = pd_param_first(nets[1]); p; p = p->next) {
        pd_param *q = pd_param_find(nets[0], p->name);
        if (!q->grad || !p->grad) continue;
        check_near(largest_difference(p->grad, q->grad, p->size), 0, tolerance, p->name);
    }
}

static pd_layer *squares(pd_net *net, pd_layer *x) { return pd_sum_cost(net, pd_multiply(net, x, x, NULL), NULL); }

static void test_gru_is_the_built_in_one(void **state) {
    (void)state;
    for (int reverse = 0; reverse < 2; reverse++) {
        pd_net *nets[2];
        pd_layer *costs[2], *inputs[2];
        pd_batch *batches[2];
        for (int i = 0; i < 2; i++) {
            pd_gru_opts o = { .name = "cell", .reverse = reverse != 0, .recurrent_bias.is_static = true };
            pd_layer *x;
            nets[i] = pd_net_new(&(pd_net_opts){ .seed = 3 });
            x = inputs[i] = pd_sequence(pd_vector(nets[i], "x", 5));
            pd_want_gradient(x);
            costs[i] = squares(nets[i], i ? gru_group(nets[i], x, 6, NULL, o.reverse) : pd_gru(nets[i], x, 6, &o));
            check_built(nets[i], costs[i]);
            random_seed(17);
            batches[i] = batch_of(nets[i], ragged, NULL, COUNT(ragged));
        }
        check_alike(nets, costs, inputs, batches);
        check_gradients_of(costs[1], batches[1], 5);
        for (int i = 0; i < 2; i++) pd_batch_free(batches[i]), pd_net_free(nets[i]);
    }
}

static void test_lstm_is_the_built_in_one(void **state) {
    (void)state;
    for (int reverse = 0; reverse < 2; reverse++) {
        pd_net *nets[2];
        pd_layer *costs[2], *inputs[2];
        pd_batch *batches[2];
        for (int i = 0; i < 2; i++) {
            pd_layer *x, *first;
            pd_lstm_opts o = { .name = "cell", .reverse = reverse != 0 };
            nets[i] = pd_net_new(&(pd_net_opts){ .seed = 3 });
            x = inputs[i] = pd_sequence(pd_vector(nets[i], "x", 5));
            pd_want_gradient(x);
            o.first = first = pd_fc(nets[i], pd_vector(nets[i], "side", 2), 6, &(pd_fc_opts){ .name = "first" });
            costs[i] = squares(nets[i], i ? lstm_group(nets[i], x, 6, first, o.reverse) : pd_lstm(nets[i], x, 6, &o));
            check_built(nets[i], costs[i]);
            random_seed(18);
            batches[i] = batch_of(nets[i], ragged, NULL, COUNT(ragged));
        }
        check_alike(nets, costs, inputs, batches);
        for (int i = 0; i < 2; i++) pd_batch_free(batches[i]), pd_net_free(nets[i]);
    }
}

typedef struct wishes {
    bool reverse, sparse, dropout, soft, feedback, share, twice, two;
} wishes;

/* An encoder, and a decoder that looks at it: the words before, attention, and what else is wished. */
static pd_layer *unchecked_decoder(pd_net *net, wishes w, pd_layer **attention) {
    pd_layer *words = pd_sequence(pd_ids(net, "words", 9)), *source = pd_sequence(pd_vector(net, "source", 4));
    pd_layer *encoder, *boot, *keys, *x, *h, *m, *also = NULL, *query, *context, *list[5], *y, *out, *scores;
    pd_group *g;
    pd_want_gradient(source);
    encoder = pd_gru(net, source, 5, NULL);
    boot = pd_fc(net, pd_sequence_pool(net, encoder, PD_LAST, NULL), 6, &(pd_fc_opts){ .act = PD_TANH });
    g = pd_group_begin(net, &(pd_group_opts){ .name = "decoder", .reverse = w.reverse });
    pd_group_input(g, words);
    pd_group_static(g, encoder);
    pd_group_static(g, boot);
    keys = pd_fc(net, encoder, 4, &(pd_fc_opts){ .no_bias = true });
    x = pd_embedding(net, words, 3, &(pd_embedding_opts){ .name = "table", .weight.sparse = w.sparse });
    h = pd_group_memory(g, 6, boot);
    query = pd_fc(net, h, 4, NULL);
    context = pd_attention(net, query, keys, encoder, NULL);
    if (attention) *attention = context;
    list[0] = x, list[1] = h, list[2] = context, list[3] = boot;
    if (w.two) list[4] = also = pd_group_memory(g, 6, boot); /* another that begins and goes on as h does */
    y = pd_fc_sum(net, list, w.two ? 5 : 4, 6, &(pd_fc_opts){ .act = w.soft ? PD_SOFTMAX : PD_TANH });
    if (w.feedback) { /* two memories, one of them of what depends on no memory, and one of another memory */
        pd_layer *pair[2];
        m = pd_group_memory(g, 3, NULL);
        pd_group_feed(m, x);
        pair[0] = y;
        pair[1] = pd_fc(net, m, 6, NULL);
        y = pd_add(net, pair, 2, NULL);
        m = pd_group_memory(g, 6, NULL);
        pd_group_feed(m, h);
        pair[0] = y, pair[1] = m;
        y = pd_add(net, pair, 2, NULL);
    }
    if (w.dropout) y = pd_dropout(net, y, 0.3, NULL);
    pd_group_feed(h, y);
    if (w.two) pd_group_feed(also, y);
    list[0] = y, list[1] = h, list[2] = x;
    scores = pd_fc_sum(net, list, 3, 9, &(pd_fc_opts){ .name = "scores" });
    if (w.share) { /* a parameter of the loop, of the group's rest, and of a layer outside */
        list[0] = scores, list[1] = pd_fc(net, h, 9, &(pd_fc_opts){ .weight.name = "shared" });
        scores = pd_add(net, list, 2, &(pd_layer_opts){ .name = "sums" });
    }
    out = pd_group_end(g, scores);
    if (w.twice) {
        list[0] = out;
        list[1] = pd_fc(net, pd_group_output(g, y), 9, NULL);
        list[2] = pd_fc(net, pd_group_output(g, h), 9, NULL);
        out = pd_add(net, list, 3, NULL);
    }
    if (w.share) {
        list[0] = out;
        list[1] = pd_expand(net, pd_fc(net, boot, 9, &(pd_fc_opts){ .weight.name = "shared" }), out, NULL);
        out = pd_add(net, list, 2, NULL);
    }
    return out;
}

static pd_layer *decoder(pd_net *net, wishes w, pd_layer **attention) {
    pd_layer *out = unchecked_decoder(net, w, attention);
    check_built(net, out);
    return out;
}

static const wishes kinds[] = { { 0 },
                                { .reverse = true, .sparse = true },
                                { .dropout = true, .twice = true },
                                { .soft = true, .twice = true },
                                { .feedback = true },
                                { .two = true, .twice = true },
                                { .two = true, .soft = true },
                                { .feedback = true, .twice = true, .reverse = true },
                                { .share = true, .sparse = true, .soft = true, .dropout = true } };

static void test_gradients(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(kinds); i++) {
        pd_net *net = pd_net_new(&(pd_net_opts){ .seed = (uint64_t)i });
        pd_layer *out = decoder(net, kinds[i], NULL);
        pd_batch *batch;
        random_seed((uint64_t)i);
        batch = batch_of(net, ragged, keys_of, COUNT(ragged));
        check_gradients_of(out, batch, (uint64_t)i);
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* ======================================================================================================== */
/* Running                                                                                                   */

static void predict(pd_net *net, const pd_batch *batch, pd_layer *target) {
    if (pd_forward(net, batch, PD_PREDICT, &target, 1) != PD_OK) fail_msg("%s", pd_error(net));
}

/* A sequence at once, and its rows one after the other, each as a sequence that begins where the last one ended. */
static void test_a_step_at_a_time(void **state) {
    enum { STEPS = 7, IN = 5, OUT = 6 };
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", IN)), *before = pd_vector(net, "before", OUT);
    pd_layer *y = gru_group(net, x, OUT, before, false);
    const int64_t length = STEPS;
    pd_real whole[STEPS * OUT];
    pd_batch *all, *one;
    (void)state;
    check_built(net, y);
    random_seed(1);
    all = batch_of(net, &length, NULL, 1);
    predict(net, all, y);
    memcpy(whole, pd_output(y, NULL, NULL), sizeof whole);
    one = pd_batch_new(net);
    for (int t = 0; t < STEPS; t++) {
        pd_batch_clear(one);
        memcpy(pd_batch_add_row(one, 0), all->slots[0].data + t * IN, IN * sizeof(pd_real));
        memcpy(pd_batch_add_row(one, 1), t ? whole + (t - 1) * OUT : all->slots[1].data, OUT * sizeof(pd_real));
        assert_int_equal(pd_batch_end_sample(one), PD_OK);
        predict(net, one, y);
        assert_memory_equal(pd_output(y, NULL, NULL), whole + t * OUT, OUT * sizeof(pd_real));
    }
    pd_batch_free(all), pd_batch_free(one);
    pd_net_free(net);
}

/* Costs and gradients for any number of threads: the same bits. */
static void test_threads(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(kinds); i++) {
        pd_real *first = NULL;
        for (int threads = 1; threads <= 4; threads++) {
            pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
            pd_layer *cost = pd_sum_cost(net, decoder(net, kinds[i], NULL), NULL);
            int64_t lengths[40], others[40], count = 0, at = 0;
            pd_real *all;
            pd_batch *batch;
            check_built(net, cost);
            random_seed(2);
            for (int k = 0; k < 40; k++) lengths[k] = below(30), others[k] = below(20);
            batch = batch_of(net, lengths, others, 40);
            assert_int_equal(pd_zero_grads(net), PD_OK);
            if (pd_forward(net, batch, PD_CHECK, &cost, 1) != PD_OK || pd_backward(net, cost) != PD_OK)
                fail_msg("%s", pd_error(net));
            for (pd_param *p = pd_param_first(net); p; p = p->next)
                count += p->opts.sparse ? p->rows.count * p->dims[1] : p->size;
            all = (pd_real *)malloc((size_t)count * sizeof *all);
            for (pd_param *p = pd_param_first(net); p; p = p->next) {
                const int64_t n = p->opts.sparse ? p->rows.count * p->dims[1] : p->size;
                memcpy(all + at, p->grad, (size_t)n * sizeof *all);
                at += n;
            }
            if (first) assert_memory_equal(first, all, (size_t)count * sizeof *all);
            if (first) free(all);
            else first = all;
            pd_batch_free(batch);
            pd_net_free(net);
        }
        free(first);
    }
}

/* The scores of sentences, alone, in any batch, in a shared net: the same bits. */
static void test_one_answer_and_shared_nets(void **state) {
    (void)state;
    for (int i = 0; i < COUNT(kinds); i++) {
        pd_net *net = pd_net_new(NULL), *shared;
        pd_layer *out = decoder(net, kinds[i], NULL), *twin;
        pd_batch *batch, *one = pd_batch_new(net), *other;
        pd_real *all;
        int64_t width;
        random_seed(3);
        batch = batch_of(net, ragged, keys_of, COUNT(ragged));
        predict(net, batch, out);
        all = (pd_real *)malloc(100 * 9 * sizeof *all);
        memcpy(all, pd_output(out, NULL, &width), (size_t)(out->out.rows * 9) * sizeof *all);
        assert_int_equal(width, 9);
        for (int64_t q = 0; q < COUNT(ragged); q++) {
            pd_batch_clear(one);
            assert_int_equal(pd_batch_copy_sample(one, batch, q), PD_OK);
            predict(net, one, out);
            assert_int_equal(out->out.rows, ragged[q]);
            if (ragged[q])
                assert_memory_equal(pd_output(out, NULL, NULL), all + batch->slots[0].starts[q] * 9,
                                    (size_t)(ragged[q] * 9) * sizeof *all);
        }
        shared = pd_net_share(net);
        check_built(net, shared);
        twin = pd_layer_find(shared, out->name);
        other = pd_batch_new(shared);
        for (int64_t q = 0; q < COUNT(ragged); q++) assert_int_equal(pd_batch_copy_sample(other, batch, q), PD_OK);
        predict(shared, other, twin);
        assert_memory_equal(pd_output(twin, NULL, NULL), all, (size_t)(twin->out.rows * 9) * sizeof *all);
        pd_batch_free(other);
        pd_net_free(shared);
        free(all);
        pd_batch_free(batch), pd_batch_free(one);
        pd_net_free(net);
    }
}

/* ---- generating ---- */

enum { BEGIN = 7, END = 8, MOST = 12 };

static pd_generated generate(pd_layer *scores, const pd_batch *batch) {
    pd_generated words;
    const pd_generate_opts o = { .begin = BEGIN, .end = END, .max_rows = MOST };
    if (pd_generate(scores, batch, &o, &words) != PD_OK) fail_msg("%s", pd_error(scores->net));
    return words;
}

/* Sources without words before. */
static pd_batch *sources(pd_net *net, const pd_batch *from) {
    pd_batch *batch = pd_batch_new(net);
    const pd_slot *s = &from->slots[1];
    for (int64_t q = 0; q < from->samples; q++) {
        for (int64_t r = s->starts[q]; r < s->starts[q + 1]; r++)
            memcpy(pd_batch_add_row(batch, 1), s->data + r * s->width, (size_t)s->width * sizeof *s->data);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

/* So that not all words are the same. */
static void fill_params(pd_net *net, uint64_t seed) {
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        pd_real *v = (pd_real *)malloc((size_t)p->size * sizeof *v);
        random_seed(seed * 100 + (uint64_t)p->size);
        for (int64_t k = 0; k < p->size; k++) v[k] = (pd_real)uniform(-1.5, 1.5);
        assert_int_equal(pd_param_set(p, v, p->size), PD_OK);
        free(v);
    }
}

static int64_t best_of(const pd_real *row, int64_t width) {
    int64_t best = 0;
    for (int64_t i = 1; i < width; i++)
        if (row[i] > row[best]) best = i;
    return best;
}

/* What is generated is what the group says of these words when it is given them; and no sentence minds the others. */
static void test_generation(void **state) {
    int ended = 0, cut = 0;
    (void)state;
    for (int i = 0; i < COUNT(kinds); i++)
        for (uint64_t seed = 0; seed < 8; seed++) {
            pd_net *net = pd_net_new(&(pd_net_opts){ .seed = seed });
            pd_layer *scores, *out;
            pd_batch *any, *batch, *forced, *one;
            pd_generated words;
            int64_t ids[COUNT(ragged)][MOST], counts[COUNT(ragged)], width;
            const pd_real *y;
            if (kinds[i].reverse) {
                pd_net_free(net);
                continue;
            }
            decoder(net,
                    (wishes){ .feedback = kinds[i].feedback,
                              .sparse = kinds[i].sparse,
                              .soft = kinds[i].soft,
                              .dropout = kinds[i].dropout,
                              .share = kinds[i].share,
                              .two = kinds[i].two },
                    NULL);
            out = scores = pd_layer_find(net, kinds[i].share ? "sums" : "scores");
            fill_params(net, seed);
            random_seed(seed);
            any = batch_of(net, ragged, keys_of, COUNT(ragged));
            batch = sources(net, any);
            words = generate(scores, batch);
            assert_int_equal(words.sequences, COUNT(ragged));
            forced = pd_batch_new(net);
            for (int64_t q = 0; q < words.sequences; q++) {
                const pd_slot *s = &any->slots[1];
                counts[q] = words.starts[q + 1] - words.starts[q];
                memcpy(ids[q], words.ids + words.starts[q], (size_t)counts[q] * sizeof **ids);
                for (int64_t t = 0; t <= counts[q] && t < MOST; t++)
                    assert_int_equal(pd_batch_add_id(forced, 0, t ? ids[q][t - 1] : BEGIN), PD_OK);
                for (int64_t r = s->starts[q]; r < s->starts[q + 1]; r++)
                    memcpy(pd_batch_add_row(forced, 1), s->data + r * s->width, (size_t)s->width * sizeof *s->data);
                assert_int_equal(pd_batch_end_sample(forced), PD_OK);
            }
            predict(net, forced, out);
            y = pd_output(out, NULL, &width);
            for (int64_t q = 0; q < COUNT(ragged); q++)
                for (int64_t t = 0; t <= counts[q] && t < MOST; t++, y += width)
                    assert_int_equal(best_of(y, width), t < counts[q] ? ids[q][t] : END);
            one = pd_batch_new(net);
            for (int64_t q = 0; q < COUNT(ragged); q++) {
                pd_batch_clear(one);
                assert_int_equal(pd_batch_copy_sample(one, batch, q), PD_OK);
                words = generate(scores, one);
                assert_int_equal(words.starts[1], counts[q]);
                assert_memory_equal(words.ids, ids[q], (size_t)counts[q] * sizeof **ids);
                ended += counts[q] < MOST && counts[q] > 0;
                cut += counts[q] == MOST;
            }
            pd_batch_free(any), pd_batch_free(batch), pd_batch_free(forced), pd_batch_free(one);
            pd_net_free(net);
        }
    assert_true(ended > 20 && cut > 20); /* both ways of leaving */
}

/* ---- devices without host memory ---- */

typedef struct record {
    pd_real numbers[20000];
    int64_t count;
} record;

/* Numbers of a net's device, or, if `net` is NULL, of the host. */
static void append(record *r, pd_net *net, const pd_real *x, int64_t n) {
    assert_true(r->count + n <= COUNT(r->numbers));
    if (net) inside_device(net)->download(inside_device(net), r->numbers + r->count, x, (size_t)n * sizeof *x);
    else if (n > 0) memcpy(r->numbers + r->count, x, (size_t)n * sizeof *x);
    r->count += n;
}

static void append_output(record *r, pd_layer *l) {
    int64_t rows, width;
    const pd_real *y = pd_output(l, &rows, &width);
    if (!y) fail_msg("%s", pd_error(l->net));
    append(r, NULL, y, rows * width);
}

static void append_weights(record *r, pd_layer *attention) {
    for (int64_t q = 0; q < COUNT(ragged); q++)
        for (int64_t t = 0; t < ragged[q]; t++) {
            int64_t count;
            const pd_real *weights = pd_attention_weights(attention, q, t, &count);
            if (!weights) fail_msg("%s", pd_error(attention->net));
            assert_int_equal(count, keys_of[q]);
            append(r, NULL, weights, count);
        }
}

/* A step of training. */
static void append_step(record *r, pd_layer *cost, const pd_batch *batch) {
    pd_net *net = cost->net;
    assert_int_equal(pd_zero_grads(net), PD_OK);
    if (pd_forward(net, batch, PD_TRAIN, &cost, 1) != PD_OK) fail_msg("%s", pd_error(net));
    append_output(r, cost);
    if (pd_backward(net, cost) != PD_OK) fail_msg("%s", pd_error(net));
    for (pd_param *p = pd_param_first(net); p; p = p->next)
        append(r, net, p->grad, p->opts.sparse ? p->rows.count * p->dims[1] : p->size);
}

/* All that a net of groups says on a device: sentences, predictions, costs, gradients, attention. */
static record *run_on(pd_device *device, const wishes *w) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .device = device, .seed = 5 });
    record *r = (record *)calloc(1, sizeof *r);
    pd_layer *attention = NULL, *x = NULL, *out, *cost, *scores;
    pd_batch *batch;
    if (!w) x = pd_sequence(pd_vector(net, "x", 5));
    if (x) pd_want_gradient(x);
    out = w ? decoder(net, *w, &attention) : gru_group(net, x, 6, NULL, true);
    cost = squares(net, out);
    check_built(net, cost);
    fill_params(net, 1);
    random_seed(6);
    batch = batch_of(net, ragged, keys_of, COUNT(ragged));
    scores = pd_layer_find(net, w && w->share ? "sums" : "scores");
    if (w && !w->reverse && !w->twice) {
        pd_generated words = generate(scores, batch);
        for (int64_t i = 0; i < words.starts[words.sequences]; i++)
            append(r, NULL, &(pd_real){ (pd_real)words.ids[i] }, 1);
        assert_true(r->count > 0);
    }
    predict(net, batch, out);
    append_output(r, out);
    if (w) append_weights(r, attention);
    for (int i = 0; i < 2; i++) append_step(r, cost, batch);
    append(r, net, (x ? x : pd_layer_find(net, "source"))->out.grad, 20);
    pd_batch_free(batch);
    pd_net_free(net);
    return r;
}

/* With all operations, without one, so that some layers of the loop are carried to the host in each step, and with
   none. The arithmetic is the CPU's in each, and so are the bits. */
static void test_other_devices(void **state) {
    const uint64_t ops[] = { ~(uint64_t)0, ~PD_OP(sparse_product), ~PD_OP(attention), ~PD_OP(gemm), 0 };
    pd_net *net = pd_net_new(NULL);
    (void)state;
    for (int i = -1; i < COUNT(kinds); i++) {
        const wishes *w = i < 0 ? NULL : &kinds[i];
        record *cpu = run_on(NULL, w);
        for (int k = 0; k < COUNT(ops); k++) {
            far_device far = make_far(cpu_of(net), ops[k]);
            record *other;
            far.device.self = &far;
            other = run_on(&far.device, w);
            assert_int_equal(cpu->count, other->count);
            for (int64_t j = 0; j < cpu->count; j++)
                if (memcmp(cpu->numbers + j, other->numbers + j, sizeof *cpu->numbers) != 0)
                    fail_msg("kind %d, device %d: number %lld of %lld is %.9g, on the CPU %.9g", i, k, (long long)j,
                             (long long)cpu->count, (double)other->numbers[j], (double)cpu->numbers[j]);
            free(other);
        }
        free(cpu);
    }
    pd_net_free(net);
}

/* Each step drops others. */
static void test_dropout_in_the_loop(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", 40)), *h, *y, *out, *pair[2];
    const int64_t length = 6;
    const pd_real *rows;
    pd_batch *batch;
    pd_group *g = pd_group_begin(net, NULL);
    (void)state;
    pair[0] = pd_group_input(g, x);
    h = pair[1] = pd_group_memory(g, 40, NULL);
    y = pd_dropout(net, pd_affine(net, pd_add(net, pair, 2, NULL), 0, 1, NULL), 0.5, NULL);
    pd_group_feed(h, y);
    out = pd_group_end(g, y);
    check_built(net, out);
    random_seed(4);
    batch = batch_of(net, &length, NULL, 1);
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &out, 1), PD_OK);
    rows = pd_output(out, NULL, NULL);
    for (int t = 0; t < 6; t++)
        for (int u = 0; u < t; u++) assert_memory_not_equal(rows + t * 40, rows + u * 40, 40 * sizeof *rows);
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- lack of memory ---- */

/* Builds, trains, generates, and predicts in a shared net; what failed with which message, or PD_OK. */
static pd_status use_all(pd_net *net, pd_failure *failure) {
    const wishes all = { false, true, true, true, true, true, true, true };
    const pd_generate_opts o = { .begin = BEGIN, .end = END, .max_rows = 4 };
    pd_layer *attention = NULL, *out = unchecked_decoder(net, all, &attention), *cost = pd_sum_cost(net, out, NULL);
    pd_layer *scores = pd_layer_find(net, "sums"), *twin;
    pd_batch *batch = pd_batch_new(net);
    pd_net *shared = NULL;
    pd_status status = cost && batch ? PD_OK : pd_error_status(net);
    pd_generated words;
    for (int i = 0; i < 6 && status == PD_OK; i++) {
        for (int t = 0; t < i && status == PD_OK; t++) status = pd_batch_add_id(batch, 0, (i + t) % 9);
        for (int t = 0; t < 6 - i && status == PD_OK; t++) {
            pd_real *row = pd_batch_add_row(batch, 1);
            for (int k = 0; row && k < 4; k++) row[k] = (pd_real)(k - t);
            if (!row) status = batch->error.status;
        }
        if (status == PD_OK) status = pd_batch_end_sample(batch);
        if (status == PD_OK && i % 3 == 2) status = pd_forward(net, batch, PD_TRAIN, &cost, 1);
        if (status == PD_OK && i % 3 == 2 && !pd_attention_weights(attention, i, 0, NULL))
            status = pd_error_status(net);
        if (status == PD_OK && i % 3 == 2) status = pd_backward(net, cost);
    }
    if (status == PD_OK) status = pd_generate(scores, batch, &o, &words);
    if (status == PD_OK && !(shared = pd_net_share(net))) status = pd_error_status(net);
    twin = pd_layer_find(shared, out ? out->name : NULL);
    if (status == PD_OK) status = pd_forward(shared, batch, PD_PREDICT, &twin, 1);
    snprintf(failure->text, sizeof failure->text, "%s",
             batch && batch->error.status ? batch->error.text
                                          : pd_error(shared && pd_error_status(shared) ? shared : net));
    pd_net_free(shared);
    pd_batch_free(batch);
    return status;
}

/* Every allocation fails once, on the CPU, and where layers of the loop are carried to the host. */
static void test_no_memory(void **state) {
    pd_net *lender = pd_net_new(&(pd_net_opts){ .threads = 1 });
    far_device far = make_far(cpu_of(lender), ~(PD_OP(gemm) | PD_OP(attention)));
    (void)state;
    far.device.self = &far;
    for (int is_far = 0; is_far < 2; is_far++) {
        bool failed = true;
        for (int64_t fail_at = 0; failed; fail_at++) {
            failing_allocator f = { 0, fail_at, 0 };
            pd_net *net = pd_net_new(&(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f },
                                                     .threads = 1,
                                                     .device = is_far ? &far.device : NULL });
            pd_failure failure = { PD_OK, "out of memory" };
            pd_status status = net ? use_all(net, &failure) : PD_E_MEMORY;
            failed = f.calls > fail_at;
            if (failed ? status != PD_E_MEMORY || !strstr(failure.text, "out of memory") : status != PD_OK)
                fail_msg("far %d: status %d, message \"%s\" without allocation %lld", is_far, (int)status, failure.text,
                         (long long)fail_at);
            pd_net_free(net);
            assert_int_equal(f.in_use, 0);
        }
    }
    pd_net_free(lender);
}

/* ---- reports ---- */

typedef struct squarer {
    pd_net *net;
    pd_layer *h, *v, *cost;
    pd_batch *batch;
    pd_trainer *trainer;
} squarer;

/* h = start at first, u = h * h, v = weight * u is h in the next step; in sentences of 2 and 5 steps. */
static squarer open_squarer(double start, double weight) {
    squarer s;
    pd_group *g;
    pd_layer *x, *boot, *u;
    s.net = pd_net_new(NULL);
    x = pd_sequence(pd_vector(s.net, "x", 1)), boot = pd_vector(s.net, "start", 1);
    g = pd_group_begin(s.net, &(pd_group_opts){ .name = "squares" });
    pd_group_input(g, x), pd_group_static(g, boot);
    s.h = pd_group_memory(g, 1, boot);
    u = pd_multiply(s.net, s.h, s.h, &(pd_layer_opts){ .name = "u" });
    s.v = pd_fc(s.net, u, 1, &(pd_fc_opts){ .name = "v", .no_bias = true });
    pd_group_feed(s.h, s.v);
    s.cost = pd_sum_cost(s.net, pd_group_end(g, s.v), NULL);
    check_built(s.net, s.cost);
    pd_param_find(s.net, "v.weight")->value[0] = (pd_real)weight; /* pd_param_set refuses NaN */
    s.batch = pd_batch_new(s.net);
    for (int q = 0; q < 2; q++) {
        for (int t = 0; t < (q ? 5 : 2); t++) *pd_batch_add_row(s.batch, 0) = 1;
        *pd_batch_add_row(s.batch, 1) = (pd_real)(q ? start : 1);
        assert_int_equal(pd_batch_end_sample(s.batch), PD_OK);
    }
    s.trainer = pd_trainer_new(s.net, s.cost, pd_sgd(1e-9), NULL);
    check_built(s.net, s.trainer);
    return s;
}

static void close_squarer(squarer *s) {
    pd_trainer_free(s->trainer);
    pd_batch_free(s->batch);
    pd_net_free(s->net);
}

/* The report says where it began: in which step, whichever layer stands first, and a parameter before a row. */
static void test_not_finite(void **state) {
    static const char *const texts[] = { "u: the output is not finite in step 3 of sentence 1 of batch 0 of pass 0",
                                         "v: the output is not finite in step 0 of sentence 1 of batch 0 of pass 0",
                                         "v: parameter \"v.weight\" is not finite before batch 0 of pass 0",
                                         "start: the input is not finite in row 1 of batch 0 of pass 0" };
    const double large = IS_DOUBLE ? 1e308 : 1e38, root = IS_DOUBLE ? 1e20 : 1e3; /* root^16 is too large, root^8 not */
    const double starts[] = { root, root, 1, HUGE_VAL }, weights[] = { 1, large, (double)NAN, 1 };
    (void)state;
    for (int i = 0; i < COUNT(texts); i++) {
        squarer s = open_squarer(starts[i], weights[i]);
        assert_int_equal(pd_train_batch(s.trainer, s.batch, NULL), PD_E_NUMERIC);
        assert_string_equal(pd_error(s.net), texts[i]);
        close_squarer(&s);
    }
}

static void test_texts(void **state) {
    squarer s = open_squarer(1, 0.5);
    char text[4096], path[] = "/tmp/paddle_groups_XXXXXX", arrow[100], graph[4096];
    FILE *file;
    int h = -1, v = -1;
    (void)state;
    pd_profile(s.trainer, text, sizeof text);
    check_contains(text, "group squares: 3 layers in the loop, 0 steps in the last run\n");
    assert_int_equal(pd_train_batch(s.trainer, s.batch, NULL), PD_OK);
    pd_profile(s.trainer, text, sizeof text);
    check_contains(text, "group squares: 3 layers in the loop, 5 steps in the last run\n");
    for (int i = 0; pd_layer_at(s.net, i); i++) {
        if (pd_layer_at(s.net, i) == s.h) h = i;
        if (pd_layer_at(s.net, i) == s.v) v = i;
    }
    close(mkstemp(path));
    assert_int_equal(pd_graphviz(s.net, path), PD_OK);
    file = fopen(path, "r");
    graph[fread(graph, 1, sizeof graph - 1, file)] = 0;
    fclose(file);
    unlink(path);
    snprintf(arrow, sizeof arrow, "    n%d -> n%d [style=dashed];\n", v, h);
    check_contains(graph, arrow);
    assert_null(strstr(strstr(graph, "dashed") + 1, "dashed"));
    close_squarer(&s);
}

/* ---- misuse ---- */

static void test_refused(void **state) {
    static const char *const texts[] = {
        "group \"g\": memory \"memory1\" is never fed (pd_group_feed)",
        "outer_fc: \"side\" stands outside group \"g\"; pd_group_input or pd_group_static lets it in",
        "sequence_pool: sequence_pool can't work row by row, as group \"g\" wants it to with \"x\"",
        "batch_norm: batch_norm can't work row by row, as group \"g\" wants it to with \"x\"",
        "group \"g\": has no input (pd_group_input)",
        "group \"g\": input \"row\" carries no sequences",
        "group \"g\": static \"x\" is an input as well as a static",
        "memory1: a memory of 3 numbers, fed with \"x\" (2), which has not as many numbers per row",
        "late: \"inner\" runs step by step in group \"g\"; pd_group_output has its rows",
        "group2: groups don't nest; it begins before the end of g",
        "can't be read step by step; put pd_embedding or pd_fc between",
        "memory1: \"row\" has 5 numbers per row, expected 3, the memory's size",
    };
    (void)state;
    for (int i = 0; i < COUNT(texts); i++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_sequence(pd_vector(net, "x", 2)), *row = pd_vector(net, "row", 5);
        pd_layer *side = pd_sequence(pd_vector(net, "side", 2)), *ids = pd_sequence(pd_ids(net, "ids", 3));
        pd_group *g = pd_group_begin(net, &(pd_group_opts){ .name = "g" });
        pd_layer *h, *pair[2];
        if (i != 4) pd_group_input(g, x);
        h = pair[1] = pd_group_memory(g, 3, i == 11 ? row : NULL);
        pair[0] = x;
        if (i == 1) pd_fc(net, side, 2, &(pd_fc_opts){ .name = "outer_fc" });
        if (i == 2) pd_sequence_pool(net, x, PD_LAST, NULL);
        if (i == 3) pd_batch_norm(net, x, NULL);
        if (i == 5) pd_group_input(g, row);
        if (i == 6) pd_group_static(g, x);
        if (i == 7) pd_group_feed(h, x);
        if (i == 8) {
            pd_layer *y = pd_fc_sum(net, pair, 2, 3, &(pd_fc_opts){ .name = "inner" });
            pd_group_feed(h, y);
            pd_group_end(g, y);
            pd_fc(net, y, 2, &(pd_fc_opts){ .name = "late" });
        }
        if (i == 9) pd_group_begin(net, NULL);
        if (i == 10) {
            pd_group_input(g, ids);
            pair[0] = h, pair[1] = pd_fc(net, h, 1, NULL);
            pd_group_feed(h, pd_fc(net, pd_cross_entropy(net, h, pd_group_input(g, ids), NULL), 3, NULL));
        }
        if (i != 8) assert_null(pd_group_end(g, i == 4 ? NULL : h));
        check_contains(pd_error(net), texts[i]);
        pd_net_free(net);
    }
}

/* At run time: a group that is open, offsets that differ, layers of the loop as targets. */
static void test_refused_runs(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", 2)), *z = pd_sequence(pd_vector(net, "z", 2)), *list[3], *y, *out;
    const int64_t lengths[] = { 2, 3 }, others[] = { 2, 4 };
    pd_group *g = pd_group_begin(net, &(pd_group_opts){ .name = "g" });
    pd_batch *batch = batch_of(net, lengths, others, 2);
    (void)state;
    list[0] = pd_group_input(g, x), list[1] = pd_group_input(g, z), list[2] = pd_group_memory(g, 3, NULL);
    y = pd_fc_sum(net, list, 3, 3, &(pd_fc_opts){ .name = "y" });
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_E_STATE);
    check_contains(pd_error(net), "group \"g\" has no pd_group_end yet");
    assert_null(pd_net_share(net));
    pd_group_feed(list[2], y);
    out = pd_group_end(g, y);
    check_built(net, out);
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &out, 1), PD_E_SHAPE);
    check_contains(pd_error(net), "of group \"g\": sample 1 of \"z\" has 4 rows, but that of \"x\" has 3");
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, &y, 1), PD_E_ARGUMENT);
    check_contains(pd_error(net), "\"y\" runs step by step in group \"g\"; pd_group_output has its rows");
    pd_batch_free(batch);
    pd_net_free(net);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gru_is_the_built_in_one),
        cmocka_unit_test(test_lstm_is_the_built_in_one),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_a_step_at_a_time),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_one_answer_and_shared_nets),
        cmocka_unit_test(test_generation),
        cmocka_unit_test(test_other_devices),
        cmocka_unit_test(test_dropout_in_the_loop),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_texts),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_refused_runs),
    };
    return run_group(tests, NULL, NULL);
}
