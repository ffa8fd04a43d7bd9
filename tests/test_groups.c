/* Recurrent groups: against the built-in layers, in values and gradients; gradients against central differences in nets
   with statics, attention, dropout, sparse tables, shared parameters; a sequence at once against a step at a time; one
   answer; shared nets; misuse. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

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

typedef struct wishes {
    bool reverse, sparse, dropout, soft, feedback, share, twice;
} wishes;

/* An encoder, and a decoder that looks at it: the words before, attention, and what else is wished. */
static pd_layer *decoder(pd_net *net, wishes w, pd_layer **attention) {
    pd_layer *words = pd_sequence(pd_ids(net, "words", 9)), *source = pd_sequence(pd_vector(net, "source", 4));
    pd_layer *encoder, *boot, *keys, *x, *h, *m = NULL, *query, *context, *list[4], *y, *out, *scores;
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
    query = pd_fc(net, h, 4, &(pd_fc_opts){ .weight.name = w.share ? "shared" : NULL });
    context = pd_attention(net, query, keys, encoder, NULL);
    if (attention) *attention = context;
    list[0] = x, list[1] = h, list[2] = context, list[3] = boot;
    y = pd_fc_sum(net, list, 4, 6, &(pd_fc_opts){ .act = w.soft ? PD_SOFTMAX : PD_TANH });
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
    list[0] = y, list[1] = h, list[2] = x;
    scores = pd_fc_sum(net, list, 3, 9, NULL);
    out = pd_group_end(g, scores);
    if (w.twice) {
        list[0] = out;
        list[1] = pd_fc(net, pd_group_output(g, y), 9, NULL);
        list[2] = pd_fc(net, pd_group_output(g, h), 9, NULL);
        list[3] = pd_fc(net, encoder, 4, &(pd_fc_opts){ .weight.name = w.share ? NULL : NULL });
        out = pd_add(net, list, 3, NULL);
    }
    check_built(net, out);
    return out;
}

static const wishes kinds[] = { { 0 },
                                { .reverse = true, .sparse = true },
                                { .dropout = true, .twice = true },
                                { .soft = true, .twice = true },
                                { .feedback = true },
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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gru_is_the_built_in_one),
        cmocka_unit_test(test_gradients),
    };
    return run_group(tests, NULL, NULL);
}
