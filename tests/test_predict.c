/* Predicting: folded batch norms, outputs that share memory, frozen nets. Every prediction is compared with that of the
   same net in which nothing can fold or be lent, because all layers are targets. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "far_device.h"
#include "inside.h"
#include "support.h"

enum { SIDE = 9, MOST = 24 };

static failing_allocator memory = { 0, -1, 0 }; /* counts only, but for one test */

static pd_net_opts options(pd_device *device) {
    pd_net_opts o = { .seed = 5, .threads = 2, .device = device };
    o.allocator.alloc = failing_alloc;
    o.allocator.free = failing_free;
    o.allocator.user = &memory;
    return o;
}

/* ---- nets ---- */

static pd_layer *norm(pd_net *net, pd_layer *x, pd_act act, bool no_affine) {
    return pd_batch_norm(net, x, &(pd_batch_norm_opts){ .act = act, .no_affine = no_affine });
}

/* Folds of every kind, a residual sum, a dropout, layers that must not fold, and two outputs. */
static pd_net *build(pd_device *device) {
    pd_net_opts o = options(device);
    pd_net *net = pd_net_new(&o);
    pd_layer *x = pd_image(net, "image", 3, SIDE, SIDE), *sum[2];
    x = norm(net, pd_conv(net, x, 8, 3, &(pd_conv_opts){ .pad = 1 }), PD_RELU, false);
    x = pd_dropout(net, x, 0.3, NULL);
    sum[0] = norm(net, pd_conv(net, x, 8, 3, &(pd_conv_opts){ .pad = 1, .no_bias = true }), PD_LINEAR, true);
    sum[1] = norm(net, pd_conv(net, sum[0], 8, 1, &(pd_conv_opts){ .act = PD_TANH }), PD_SIGMOID, false); /* no fold */
    x = pd_add(net, sum, 2, &(pd_layer_opts){ .name = "sum", .act = PD_RELU });
    x = norm(net, pd_conv_transpose(net, x, 4, 2, NULL), PD_TANH, false); /* no fold either */
    x = pd_pool(net, x, 2, NULL);
    x = norm(net, pd_fc(net, x, 12, NULL), PD_BRELU, false);
    x = norm(net, pd_fc(net, x, 7, &(pd_fc_opts){ .name = "fc", .no_bias = true }), PD_SOFTMAX, false);
    pd_layer *cost = pd_cross_entropy(net, x, pd_label(net, "label", 7), &(pd_cost_opts){ .name = "cost" });
    if (pd_error_status(net) != PD_OK) fail_msg("%s", pd_error(net));
    assert_non_null(cost);
    return net;
}

static pd_layer *output_of(pd_net *net) { return pd_layer_find(net, "cost")->inputs[0]; }

/* Values of all kinds in the parameters and in what batch norm tracks. */
static void shake(pd_net *net) {
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        pd_real *values = (pd_real *)malloc((size_t)p->size * sizeof *values);
        bool positive = strstr(p->name, "running_var") != NULL;
        for (int64_t i = 0; i < p->size; i++) values[i] = (pd_real)(positive ? uniform(0.3, 2) : uniform(-0.7, 0.7));
        assert_int_equal(pd_param_set(p, values, p->size), PD_OK);
        free(values);
    }
}

static pd_batch *fill_batch(pd_net *net, int64_t rows) {
    pd_batch *batch = pd_batch_new(net);
    for (int64_t i = 0; i < rows; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        for (int k = 0; k < 3 * SIDE * SIDE; k++) row[k] = (pd_real)uniform(-1, 1);
        pd_batch_add_id(batch, 1, i % 7);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

/* What the last layer says; all: with every layer a target. The caller frees it. */
static pd_real *predict(pd_net *net, const pd_batch *batch, bool all) {
    pd_layer *targets[MOST];
    int count = 0;
    int64_t rows, width;
    targets[count++] = output_of(net);
    for (int i = 0; all && pd_layer_at(net, i); i++)
        if (!pd_layer_at(net, i)->is_ids) targets[count++] = pd_layer_at(net, i);
    assert_true(count <= MOST);
    if (pd_forward(net, batch, PD_PREDICT, targets, count) != PD_OK) fail_msg("%s", pd_error(net));
    const pd_real *y = pd_output(targets[0], &rows, &width);
    assert_non_null(y);
    pd_real *copy = (pd_real *)malloc((size_t)(rows * width + 1) * sizeof *copy);
    memcpy(copy, y, (size_t)(rows * width) * sizeof *copy);
    return copy;
}

static void compare(const pd_real *got, const pd_real *want, int64_t rows) {
    for (int64_t i = 0; i < rows * 7; i++)
        check_near((double)got[i], (double)want[i], 20 * REAL_TOLERANCE, "prediction");
}

static int64_t folded(pd_net *net) {
    int64_t count = 0;
    for (int i = 0; pd_layer_at(net, i); i++) count += inside_is_folded(pd_layer_at(net, i));
    return count;
}

/* Any number of rows, none too; on the CPU, and where memory is not the host's. */
static void test_folding(void **state) {
    static const int64_t sizes[] = { 3, 1, 0, 5, 2 };
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        pd_net *host = build(NULL);
        far_device far = make_far(inside_device(host), kind == 1 ? ~(uint64_t)0
                                                                 : PD_OP(gemm) | PD_OP(channel_moments) |
                                                                       PD_OP(batch_norm) | PD_OP(batch_norm_backward));
        pd_net *net = host;
        far.device.self = &far;
        if (kind) net = build(&far.device);
        random_seed(31);
        shake(net);
        for (int i = 0; i < COUNT(sizes); i++) {
            pd_batch *batch = fill_batch(net, sizes[i]);
            pd_real *want = predict(net, batch, true), *got;
            assert_int_equal(folded(net), 0);
            got = predict(net, batch, false);
            assert_int_equal(folded(net), kind < 2 ? 4 : 2); /* a layer on the host does not take part */
            compare(got, want, sizes[i]);
            free(got);
            free(want);
            pd_batch_free(batch);
        }
        if (kind) pd_net_free(net);
        pd_net_free(host);
    }
}

/* Layers that take over the numbers of the one below put out those of the last run, where these are carried to the
   host, too; and a layer that runs there takes over nothing. */
static void test_taken_over(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++) { /* folded; passed on; on the host */
        pd_net *host = pd_net_new(NULL), *net;
        far_device far = make_far(inside_device(host), kind < 2 ? ~(uint64_t)0 : PD_OP(gemm));
        pd_layer *target;
        far.device.self = &far;
        net = pd_net_new(&(pd_net_opts){ .device = &far.device });
        target = pd_fc(net, pd_vector(net, "x", 1), 2, &(pd_fc_opts){ .weight.init = pd_constant(1) });
        target = kind ? pd_dropout(net, target, 0.5, NULL) : pd_batch_norm(net, target, NULL);
        for (int run = 1; run < 4; run++) {
            const pd_real x = (pd_real)run, *y = pd_predict(target, &x, 1);
            assert_int_equal(folded(net), kind == 0);
            check_near((double)y[1], kind ? run : run / sqrt(1 + 1e-5), REAL_TOLERANCE, "what was taken over");
        }
        pd_net_free(net);
        pd_net_free(host);
    }
}

/* Only targets have outputs, and one that is read below a fold has its own. */
static void test_outputs(void **state) {
    pd_net *net = build(NULL);
    pd_batch *batch = fill_batch(net, 2);
    pd_layer *targets[] = { pd_layer_find(net, "fc"), pd_layer_find(net, "sum") };
    (void)state;
    free(predict(net, batch, false));
    assert_null(pd_output(targets[0], NULL, NULL));
    assert_string_equal(pd_error(net),
                        "fc: pd_output: it put out no numbers in the last run, of which it was no target");
    assert_null(pd_output(targets[1], NULL, NULL));
    assert_int_equal(pd_forward(net, batch, PD_PREDICT, targets, 2), PD_OK);
    assert_non_null(pd_output(targets[0], NULL, NULL));
    assert_non_null(pd_output(targets[1], NULL, NULL));
    pd_batch_free(batch);
    pd_net_free(net);
}

/* A chain of equal layers needs two outputs; training needs all. */
static void test_memory(void **state) {
    enum { DEPTH = 20, WIDE = 1000, ROWS = 50 };
    size_t predicting, one = (size_t)WIDE * ROWS * sizeof(pd_real);
    (void)state;
    for (int mode = 0; mode < 2; mode++) {
        pd_net_opts o = options(NULL);
        pd_net *net = pd_net_new(&o);
        pd_layer *x = pd_vector(net, "x", WIDE), *y = x, *cost;
        pd_batch *batch;
        for (int i = 0; i < DEPTH; i++)
            y = pd_fc(net, y, WIDE, &(pd_fc_opts){ .weight.init = pd_constant(0.001), .no_bias = true });
        cost = pd_sum_cost(net, y, NULL);
        batch = pd_batch_new(net);
        for (int i = 0; i < ROWS; i++) {
            assert_non_null(pd_batch_add_row(batch, 0));
            assert_int_equal(pd_batch_end_sample(batch), PD_OK);
        }
        assert_int_equal(pd_net_bytes(net), 0);
        assert_int_equal(pd_forward(net, batch, mode ? PD_TRAIN : PD_PREDICT, mode ? &cost : &y, 1), PD_OK);
        predicting = pd_net_bytes(net);
        assert_in_range(predicting, mode ? DEPTH * one : 2 * one, mode ? 3 * DEPTH * one : 2 * one + 100);
        pd_batch_free(batch);
        pd_net_free(net);
    }
    assert_int_equal(pd_net_bytes(NULL), 0);
}

/* The same bits as before, whatever the batch before; nothing is allocated in the long run. */
static void test_frozen(void **state) {
    static const int64_t sizes[] = { 1, 4, 1, 3, 4 };
    pd_net *net = build(NULL), *shared;
    pd_batch *batches[COUNT(sizes)];
    pd_real *want[COUNT(sizes)];
    (void)state;
    random_seed(32);
    shake(net);
    for (int i = 0; i < COUNT(sizes); i++) {
        batches[i] = fill_batch(net, sizes[i]);
        want[i] = predict(net, batches[i], false);
    }
    assert_int_equal(pd_freeze(net), PD_OK);
    assert_int_equal(pd_freeze(net), PD_OK);
    shared = pd_net_share(net);
    assert_non_null(shared);
    for (int round = 0; round < 4; round++) {
        int64_t before = memory.calls;
        for (int i = 0; i < COUNT(sizes); i++)
            for (int twin = 0; twin < 2; twin++) {
                pd_real *got = predict(twin ? shared : net, batches[i], false);
                assert_memory_equal(got, want[i], (size_t)(sizes[i] * 7) * sizeof *got);
                free(got);
            }
        if (round == 3) assert_int_equal(memory.calls, before);
    }
    for (int i = 0; i < COUNT(sizes); i++) {
        free(want[i]);
        pd_batch_free(batches[i]);
    }
    pd_net_free(shared);
    pd_net_free(net);
}

/* Predicting between training steps: they stay the same, and in the long run nothing is allocated. */
static void test_between_steps(void **state) {
    pd_real *last[2] = { NULL, NULL };
    (void)state;
    for (int between = 0; between < 2; between++) {
        pd_net *net = build(NULL);
        pd_trainer *trainer = pd_trainer_new(net, pd_layer_find(net, "cost"), pd_momentum(0.05, 0.9), NULL);
        pd_batch *batch, *other;
        int64_t before = 0;
        assert_non_null(trainer);
        random_seed(33);
        batch = fill_batch(net, 4);
        other = fill_batch(net, 6); /* more than the training's */
        if (between) free(predict(net, other, false));
        for (int step = 0; step < 8; step++) {
            if (step == 5) before = memory.calls;
            assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_OK);
            if (between) free(predict(net, other, step % 2 == 0));
        }
        assert_int_equal(memory.calls, before);
        last[between] = predict(net, batch, false);
        pd_batch_free(batch);
        pd_batch_free(other);
        pd_trainer_free(trainer);
        pd_net_free(net);
    }
    assert_memory_equal(last[0], last[1], 4 * 7 * sizeof **last);
    free(last[0]);
    free(last[1]);
}

/* Each allocation of a first prediction fails in turn: with a message, or, where only speed is lost, not at all. */
static void test_lack_of_memory(void **state) {
    int64_t failures = 0;
    bool done = false;
    (void)state;
    for (int64_t at = 0; !done; at++) {
        pd_net *net = build(NULL);
        pd_batch *batch = fill_batch(net, 3);
        pd_layer *y = output_of(net);
        assert_int_equal(pd_freeze(net), PD_OK);
        memory.fail_at = memory.calls + at;
        if (pd_forward(net, batch, PD_PREDICT, &y, 1) != PD_OK) {
            assert_int_equal(pd_error_status(net), PD_E_MEMORY);
            check_contains(pd_error(net), "out of memory");
            failures++;
        }
        done = memory.calls <= memory.fail_at;
        memory.fail_at = -1;
        free(predict(net, batch, false));
        pd_batch_free(batch);
        pd_net_free(net);
    }
    assert_true(failures >= 10);
    assert_int_equal(memory.in_use, 0);
}

/* What would change a frozen net fails with a message, and it goes on predicting. */
static void test_misuse(void **state) {
    pd_net *net = build(NULL), *shared = pd_net_share(net);
    pd_layer *cost = pd_layer_find(net, "cost");
    pd_batch *batch = fill_batch(net, 2);
    pd_param *p = pd_param_first(net);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_sgd(0.1), NULL);
    pd_real *want, *got;
    (void)state;
    assert_int_equal(pd_freeze(NULL), pd_error_status(NULL));
    assert_int_equal(pd_freeze(shared), PD_E_STATE);
    assert_string_equal(pd_error(shared), "pd_freeze: this net is shared; freeze the one it came from");
    assert_int_equal(pd_freeze(net), PD_E_STATE);
    assert_string_equal(pd_error(net), "pd_freeze: the net has a trainer; free that first");
    pd_trainer_free(trainer);
    pd_net_free(shared);
    want = predict(net, batch, false);
    assert_int_equal(pd_freeze(net), PD_OK);
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &cost, 1), PD_E_STATE);
    assert_string_equal(pd_error(net), "pd_forward: the net was frozen by pd_freeze, so its parameters are final");
    assert_int_equal(pd_param_set(p, p->value, p->size), PD_E_STATE);
    assert_int_equal(pd_load(net, "build/tmp/no-such-file", NULL), PD_E_STATE);
    got = predict(net, batch, false);
    assert_memory_equal(got, want, 2 * 7 * sizeof *got);
    free(got);
    assert_null(pd_trainer_new(net, cost, pd_sgd(0.1), NULL));
    assert_string_equal(pd_error(net), "pd_trainer_new: the net was frozen by pd_freeze");
    got = predict(net, batch, false); /* which does not hurt the net */
    assert_memory_equal(got, want, 2 * 7 * sizeof *got);
    free(want);
    free(got);
    pd_batch_free(batch);
    pd_net_free(net);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_folding),        cmocka_unit_test(test_taken_over), cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_memory),         cmocka_unit_test(test_frozen),     cmocka_unit_test(test_between_steps),
        cmocka_unit_test(test_lack_of_memory), cmocka_unit_test(test_misuse),
    };
    return run_group(tests, NULL, NULL);
}
