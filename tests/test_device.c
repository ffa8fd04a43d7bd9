/* Training and using whole nets on a device without host memory: the same bits as on the CPU, whether the device has
   all operations, some, or next to none. On one with host memory that has products only. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>
#include <cmocka.h>

#include "far_device.h"
#include "inside.h"
#include "support.h"

enum { SAMPLES = 37, SIDE = 6, CLASSES = 3 };

static pd_real images[SAMPLES * SIDE * SIDE], targets[SAMPLES * CLASSES];
static int64_t labels[SAMPLES];

static void make_data(void) {
    random_seed(7);
    for (int64_t i = 0; i < SAMPLES * SIDE * SIDE; i++) images[i] = (pd_real)uniform(-1, 1);
    for (int64_t i = 0; i < SAMPLES * CLASSES; i++) targets[i] = (pd_real)uniform(0.1, 0.9);
    for (int64_t i = 0; i < SAMPLES; i++) labels[i] = below(CLASSES);
}

/* ---- a layer of one's own: y = b x, written for the host ---- */

static pd_status scale_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    return pd_layer_param(l, "b", 1, &l->shape.channels, 1, 1, pd_constant(1.5), NULL) ? PD_OK : PD_E_MEMORY;
}
static pd_status scale_forward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    int64_t area = l->shape.height * l->shape.width;
    for (int64_t i = 0; i < x->rows * x->width; i++)
        l->out.data[i] = x->data[i] * l->params[0]->value[i / area % l->shape.channels];
    return PD_OK;
}
static pd_status scale_backward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    pd_param *b = l->params[0];
    int64_t area = l->shape.height * l->shape.width;
    for (int64_t i = 0; i < x->rows * x->width; i++) {
        int64_t c = i / area % l->shape.channels;
        if (x->grad) x->grad[i] += l->out.grad[i] * b->value[c];
        if (b->grad) b->grad[c] += l->out.grad[i] * x->data[i];
    }
    return PD_OK;
}
static const pd_layer_type scale_type = { PD_API_VERSION, "scale_by",     1,    1,    0,    0, 0, scale_setup, NULL,
                                          scale_forward,  scale_backward, NULL, NULL, NULL, -1 };

/* ---- a net with something of everything ---- */

typedef struct model {
    pd_net *net;
    pd_layer *output, *cost;
    pd_reader *reader;
    pd_trainer *trainer;
} model;

static model build(pd_device *device, pd_optimizer optimizer, const pd_trainer_opts *opts) {
    static const double weights[CLASSES] = { 1, 2, 0.5 };
    model m;
    pd_array arrays[3] = { { .data = images }, { .ids = labels }, { .data = targets } };
    m.net = pd_net_new(&(pd_net_opts){ .seed = 3, .device = device });
    pd_layer *image = pd_image(m.net, "image", 1, SIDE, SIDE), *label = pd_label(m.net, "label", CLASSES);
    pd_layer *target = pd_vector(m.net, "target", CLASSES);
    pd_layer *conv = pd_conv(m.net, image, 4, 3, &(pd_conv_opts){ .pad = 1, .act = PD_GELU });
    pd_layer *norm = pd_batch_norm(m.net, conv, &(pd_batch_norm_opts){ .act = PD_RELU });
    pd_layer *own = pd_layer_add(m.net, &scale_type, NULL, &norm, 1, NULL);
    pd_layer *pool = pd_dropout(m.net, pd_pool(m.net, own, 2, NULL), 0.2, NULL);
    pd_layer *square = pd_multiply(m.net, pool, pool, NULL);
    m.output = pd_fc(m.net, square, CLASSES, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_layer *costs[5];
    costs[0] = pd_cross_entropy(m.net, m.output, label, &(pd_cost_opts){ .class_weights = weights });
    costs[1] = pd_squared_error(m.net, m.output, target, NULL);
    costs[2] =
        pd_binary_cross_entropy(m.net, pd_fc(m.net, pool, CLASSES, &(pd_fc_opts){ .act = PD_SIGMOID }), target, NULL);
    costs[3] = pd_hinge(m.net, pd_fc(m.net, pool, CLASSES, NULL), label, NULL);
    costs[4] = pd_cross_entropy(m.net, pd_fc(m.net, pool, CLASSES, NULL), target, NULL);
    m.cost = pd_add(m.net, costs, 5, NULL);
    pd_eval_error(m.net, m.output, label, NULL);
    pd_eval_auc(m.net, pd_slice(m.net, m.output, 0, 1, NULL), pd_slice(m.net, target, 0, 1, NULL), NULL);
    m.reader = pd_array_reader(m.net, SAMPLES, arrays, 3);
    m.trainer = pd_trainer_new(m.net, m.cost, optimizer, opts);
    if (!m.trainer || !m.reader) fail_msg("%s", pd_error(m.net));
    return m;
}

static void free_model(model *m) {
    pd_reader_free(m->reader);
    pd_trainer_free(m->trainer);
    pd_net_free(m->net);
}

static void train(model *m, int64_t passes, const pd_train_opts *opts) {
    if (pd_train(m->trainer, m->reader, passes, opts) != PD_OK) fail_msg("%s", pd_error(m->net));
}

/* Parameters, predictions, test cost and evaluators. */
static void check_equal(model *a, model *b, const char *what) {
    double cost_a = 0, cost_b = 0;
    for (pd_param *p = pd_param_first(a->net), *q = pd_param_first(b->net); p; p = p->next, q = q->next) {
        pd_real *x = (pd_real *)calloc((size_t)p->size, sizeof *x), *y = (pd_real *)calloc((size_t)p->size, sizeof *y);
        assert_int_equal(pd_param_get(p, x, p->size), PD_OK);
        assert_int_equal(pd_param_get(q, y, q->size), PD_OK);
        if (memcmp(x, y, (size_t)p->size * sizeof *x) != 0) fail_msg("%s: parameter %s differs", what, p->name);
        free(x);
        free(y);
    }
    assert_int_equal(pd_test(a->trainer, a->reader, 10, &cost_a), PD_OK);
    assert_int_equal(pd_test(b->trainer, b->reader, 10, &cost_b), PD_OK);
    assert_true(cost_a == cost_b && cost_a > 0);
    for (pd_evaluator *e = pd_evaluator_first(a->net), *f = pd_evaluator_first(b->net); e; e = e->next, f = f->next)
        assert_true(pd_evaluator_value(e, 0) == pd_evaluator_value(f, 0));
    const pd_real *p = pd_predict(a->output, images, SAMPLES), *q = pd_predict(b->output, images, SAMPLES);
    assert_memory_equal(p, q, SAMPLES * CLASSES * sizeof *p);
}

static const uint64_t kinds[] = { ~(uint64_t)0, 0,
                                  PD_OP(conv) | PD_OP(conv_backward_data) | PD_OP(conv_backward_filter) |
                                      PD_OP(cross_entropy) | PD_OP(cross_entropy_backward),
                                  PD_OP(pool) | PD_OP(pool_backward) | PD_OP(channel_moments) | PD_OP(batch_norm) |
                                      PD_OP(batch_norm_backward) };

static void test_training(void **state) {
    pd_optimizer optimizers[] = { pd_momentum(0.05, 0.9), pd_adam(0.01) };
    pd_net *host = pd_net_new(NULL);
    (void)state;
    for (int o = 0; o < 2; o++) {
        pd_trainer_opts opts = { .l2 = 0.01, .clip_norm = o ? 1 : 0, .average_window = o ? 0.5 : 0 };
        model cpu = build(NULL, optimizers[o], &opts);
        train(&cpu, 3, &(pd_train_opts){ .batch_size = 8 });
        for (int k = 0; k < COUNT(kinds); k++) {
            far_device far = make_far(cpu_of(host), kinds[k]);
            far.device.self = &far;
            model m = build(&far.device, optimizers[o], &opts);
            train(&m, 3, &(pd_train_opts){ .batch_size = 8 });
            check_equal(&cpu, &m, "after training");
            free_model(&m);
        }
        free_model(&cpu);
    }
    pd_net_free(host);
}

/* A checkpoint of one device goes on on the other. */
static void test_checkpoint(void **state) {
    char path[] = "/tmp/paddle-device-XXXXXX";
    pd_net *host = pd_net_new(NULL);
    far_device far = make_far(cpu_of(host), PD_OP(conv) | PD_OP(conv_backward_data) | PD_OP(conv_backward_filter) |
                                                PD_OP(pool) | PD_OP(pool_backward));
    model cpu = build(NULL, pd_adam(0.01), NULL), m, other;
    int file = mkstemp(path);
    (void)state;
    assert_true(file >= 0);
    close(file);
    far.device.self = &far;
    m = build(&far.device, pd_adam(0.01), NULL);
    other = build(&far.device, pd_adam(0.01), NULL);
    train(&cpu, 2, NULL);
    train(&m, 1, &(pd_train_opts){ .checkpoint = path, .test = m.reader, .patience = 2 });
    assert_int_equal(pd_checkpoint_load(other.trainer, path), PD_OK);
    train(&other, 2, NULL);
    check_equal(&cpu, &other, "after a checkpoint");
    assert_int_equal(pd_save(other.net, path), PD_OK);
    assert_int_equal(pd_load(m.net, path, NULL), PD_OK);
    check_equal(&cpu, &m, "after a load");
    free_model(&cpu);
    free_model(&m);
    free_model(&other);
    pd_net_free(host);
    remove(path);
}

static void test_gradient_check(void **state) {
    pd_net *host = pd_net_new(NULL);
    far_device far = make_far(cpu_of(host), PD_OP(conv) | PD_OP(conv_backward_data) | PD_OP(conv_backward_filter));
    pd_gradcheck check;
    pd_batch *batch;
    model m;
    (void)state;
    far.device.self = &far;
    m = build(&far.device, pd_sgd(0.01), NULL);
    batch = pd_batch_new(m.net);
    m.reader->reset(m.reader, 0);
    assert_int_equal(m.reader->next(m.reader, batch, 4), PD_OK);
    assert_int_equal(pd_check_gradients(m.cost, batch, NULL, &check), PD_OK);
    if (sizeof(pd_real) == 8 && !(check.error < 1e-5)) fail_msg("%s: %g", check.worst, check.error);
    assert_false(check.all_zero);
    pd_batch_free(batch);
    free_model(&m);
    pd_net_free(host);
}

/* After the largest batch a step takes no memory, on the host and on the device. */
static void test_steady_state(void **state) {
    failing_allocator f = { 0, -1, 0 };
    pd_net *host = pd_net_new(&(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f } });
    (void)state;
    for (int k = 0; k < COUNT(kinds); k++) {
        far_device far = make_far(cpu_of(host), kinds[k]);
        pd_net_opts opts = { .device = &far.device, .allocator = { failing_alloc, failing_free, &f } };
        pd_net *net;
        pd_layer *x, *y;
        pd_trainer *trainer;
        pd_batch *batch;
        int64_t calls;
        far.device.self = &far;
        net = pd_net_new(&opts);
        x = pd_vector(net, "x", 4);
        y = pd_layer_add(net, &scale_type, NULL, &x, 1, NULL);
        y = pd_fc(net, y, 3, &(pd_fc_opts){ .act = PD_GELU });
        trainer = pd_trainer_new(net, pd_sum_cost(net, y, NULL), pd_momentum(0.1, 0.9), NULL);
        batch = pd_batch_new(net);
        for (int i = 0; i < 20; i++) {
            memcpy(pd_batch_add_row(batch, 0), images + 4 * i, 4 * sizeof *images);
            assert_int_equal(pd_batch_end_sample(batch), PD_OK);
        }
        assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_OK);
        calls = failing_calls(&f);
        for (int i = 0; i < 5; i++) assert_int_equal(pd_train_batch(trainer, batch, NULL), PD_OK);
        assert_int_equal(failing_calls(&f), calls);
        pd_batch_free(batch);
        pd_trainer_free(trainer);
        pd_net_free(net);
    }
    pd_net_free(host);
    assert_int_equal(f.in_use, 0);
}

/* Every allocation fails once, while a layer is carried to the host. */
static void test_no_memory(void **state) {
    pd_net *host = pd_net_new(NULL);
    far_device far = make_far(cpu_of(host), 0);
    (void)state;
    far.device.self = &far;
    for (int64_t fail_at = 0;; fail_at++) {
        failing_allocator f = { 0, fail_at, 0 };
        pd_net *net =
            pd_net_new(&(pd_net_opts){ .device = &far.device, .allocator = { failing_alloc, failing_free, &f } });
        pd_layer *x = net ? pd_vector(net, "x", 4) : NULL;
        pd_layer *y = net ? pd_layer_add(net, &scale_type, NULL, &x, 1, NULL) : NULL;
        pd_trainer *trainer = net ? pd_trainer_new(net, pd_sum_cost(net, y, NULL), pd_momentum(0.1, 0.9), NULL) : NULL;
        pd_batch *batch = trainer ? pd_batch_new(net) : NULL;
        pd_real *row = batch ? pd_batch_add_row(batch, 0) : NULL;
        bool ok;
        if (row) memcpy(row, images, 4 * sizeof *row);
        ok = row && pd_batch_end_sample(batch) == PD_OK && pd_train_batch(trainer, batch, NULL) == PD_OK;
        if (net && !ok && !batch) assert_int_equal(pd_error_status(net), PD_E_MEMORY);
        pd_batch_free(batch);
        pd_trainer_free(trainer);
        pd_net_free(net);
        assert_int_equal(f.in_use, 0);
        if (f.calls <= fail_at) {
            assert_true(ok);
            break;
        }
        assert_false(ok);
    }
    pd_net_free(host);
}

/* ---- devices with host memory ---- */

/* Products by OpenBLAS where it is installed, else by a plain loop; all else is left to the CPU. */
typedef void blas_gemm(int order, int ta, int tb, int m, int n, int k, pd_real alpha, const pd_real *a, int lda,
                       const pd_real *b, int ldb, pd_real beta, pd_real *c, int ldc);
typedef struct blas {
    blas_gemm *gemm; /* NULL: the loop */
    int64_t calls;
} blas;

static void loop_gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha, const pd_real *a, int64_t lda,
                      const pd_real *b, int64_t ldb, pd_real beta, pd_real *c, int64_t ldc) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            pd_real sum = 0, *to = c + i * ldc + j;
            for (int64_t l = 0; l < k; l++)
                sum += a[ta ? l * lda + i : i * lda + l] * b[tb ? j * ldb + l : l * ldb + j];
            *to = alpha * sum + (beta != 0 ? beta * *to : 0);
        }
}

static void wrapped_gemm(pd_device *d, bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha,
                         const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *c,
                         int64_t ldc, const pd_epilogue *after) {
    enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
    blas *self = (blas *)d->self;
    self->calls++;
    if (self->gemm && m > 0 && n > 0)
        self->gemm(ROW_MAJOR, ta ? TRANSPOSED : PLAIN, tb ? TRANSPOSED : PLAIN, (int)m, (int)n, (int)k, alpha, a,
                   (int)lda, b, (int)ldb, beta, c, (int)ldc);
    else loop_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    if (after) pd_epilogue_apply(d, after, m, n, c, ldc);
}

static blas find_blas(void) {
    const char *name = sizeof(pd_real) == 8 ? "cblas_dgemm" : "cblas_sgemm";
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    blas found = { NULL, 0 };
    void *symbol = library ? dlsym(library, name) : NULL;
    memcpy(&found.gemm, &symbol, sizeof symbol);
    printf("products: %s\n", symbol ? "OpenBLAS" : "a loop");
    return found;
}

/* The real digits, by every kind of layer that they need; every fifth is held out. */
static void test_wrapped_blas(void **state) {
    blas self = find_blas();
    pd_device device = { .api_version = PD_API_VERSION, .name = "blas", .self = &self, .host_memory = true };
    pd_net *net;
    pd_layer *x, *y;
    pd_reader *train, *held_out;
    pd_evaluator *wrong;
    pd_trainer *trainer;
    (void)state;
    device.gemm = wrapped_gemm;
    net = pd_net_new(&(pd_net_opts){ .device = &device });
    x = pd_image(net, "image", 1, 8, 8);
    x = pd_conv(net, x, 8, 3, &(pd_conv_opts){ .pad = 1 });
    x = pd_prelu(net, pd_pool(net, pd_batch_norm(net, x, NULL), 2, NULL), NULL);
    x = pd_fc(net, x, 32, &(pd_fc_opts){ .act = PD_TANH });
    x = pd_fc(net, pd_dropout(net, x, 0.1, NULL), 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    y = pd_label(net, "label", 10);
    wrong = pd_eval_error(net, x, y, NULL);
    trainer = pd_trainer_new(net, pd_cross_entropy(net, x, y, NULL), pd_adam(0.005), NULL);
    train = pd_csv_reader(net, "examples/data/digits.csv",
                          &(pd_reader_opts){ .scale = 1.0 / 16, .folds = 5, .not_fold = true });
    held_out = pd_csv_reader(net, "examples/data/digits.csv", &(pd_reader_opts){ .scale = 1.0 / 16, .folds = 5 });
    if (pd_train(trainer, train, 4, &(pd_train_opts){ .batch_size = 32 }) != PD_OK ||
        pd_test(trainer, held_out, 64, NULL) != PD_OK)
        fail_msg("%s", pd_error(net));
    assert_true(self.calls > 4 * 45 * 2 * 2); /* both fully connected layers, forward and backward, in every batch */
    if (!(pd_evaluator_value(wrong, 0) < 0.1)) fail_msg("error of %g", pd_evaluator_value(wrong, 0));
    pd_reader_free(train);
    pd_reader_free(held_out);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

/* ---- what a device lacks or refuses ---- */

static void test_lacks_a_basic_operation(void **state) {
    pd_net *host = pd_net_new(NULL), *net;
    far_device far = make_far(cpu_of(host), 0);
    (void)state;
    far.device.self = &far;
    far.device.update = NULL;
    net = pd_net_new(&(pd_net_opts){ .device = &far.device });
    assert_int_equal(pd_error_status(net), PD_E_ARGUMENT);
    assert_string_equal(pd_error(net), "pd_net_new: device far has no host memory, and lacks update");
    pd_net_free(net);
    far = make_far(cpu_of(host), 0);
    far.device.self = &far;
    far.device.wait = NULL; /* a net calls that as well */
    net = pd_net_new(&(pd_net_opts){ .device = &far.device });
    assert_int_equal(pd_error_status(net), PD_E_ARGUMENT);
    assert_string_equal(pd_error(net), "pd_net_new: device far has no host memory, and lacks wait");
    pd_net_free(net);
    pd_net_free(host);
}

static bool no_wide_inputs(pd_device *d, const pd_layer *l) {
    (void)d;
    return l->inputs[0]->out.width != 3 && l->inputs[0]->out.width < 10;
}

/* The costs of some rows, and the names of the layers that the CPU runs for the device; setup of the cost takes memory. */
static void some_costs(pd_device *device, pd_real costs[5], char *info, size_t size) {
    const double weights[CLASSES] = { 1, 2, 0.5 };
    pd_net *net = pd_net_new(&(pd_net_opts){ .device = device });
    pd_layer *x = pd_vector(net, "x", 12), *y = pd_label(net, "y", CLASSES), *cost;
    pd_batch *batch;
    const pd_real *out;
    x = pd_fc(net, x, 4, &(pd_fc_opts){ .name = "wide" });
    x = pd_fc(net, x, CLASSES, &(pd_fc_opts){ .name = "narrow", .act = PD_SOFTMAX });
    cost = pd_cross_entropy(net, x, y, &(pd_cost_opts){ .name = "cost", .class_weights = weights });
    batch = pd_batch_new(net);
    for (int i = 0; i < 5; i++) {
        memcpy(pd_batch_add_row(batch, 0), images + 12 * i, 12 * sizeof *images);
        assert_int_equal(pd_batch_add_id(batch, 1, labels[i]), PD_OK);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    if (pd_forward(net, batch, PD_CHECK, &cost, 1) != PD_OK || !(out = pd_output(cost, NULL, NULL)))
        fail_msg("%s", pd_error(net));
    memcpy(costs, out, 5 * sizeof *out);
    pd_info(net, info, size);
    pd_batch_free(batch);
    pd_net_free(net);
}

/* Without host memory and with it: a layer that is refused runs on the CPU, and gives the same. */
static void test_refuses_a_shape(void **state) {
    pd_net *host = pd_net_new(NULL);
    blas self = { NULL, 0 };
    pd_device near = { .api_version = PD_API_VERSION, .name = "near", .self = &self, .host_memory = true };
    far_device far = make_far(cpu_of(host), ~(uint64_t)0);
    pd_real want[5], costs[5];
    char info[300];
    (void)state;
    far.device.self = &far;
    near.gemm = wrapped_gemm;
    near.alloc = far.cpu->alloc; /* its own, beside the CPU's */
    near.free = far.cpu->free;
    some_costs(NULL, want, info, sizeof info);
    assert_null(strstr(info, "of which"));
    for (int k = 0; k < 2; k++) {
        pd_device *device = k ? &near : &far.device;
        device->accepts = no_wide_inputs;
        some_costs(device, costs, info, sizeof info);
        for (int i = 0; i < 5; i++)
            if (!(fabs((double)costs[i] - (double)want[i]) < 1e-6)) fail_msg("%g, %g", costs[i], want[i]);
        check_contains(info, ", of which the CPU runs wide (fc), cost (cross_entropy)");
        assert_null(strstr(info, "narrow"));
    }
    assert_int_equal(self.calls, 1);
    pd_net_free(host);
}

/* A parameter that stands twice in a layer on the host gets both gradients. */
static void test_parameter_twice(void **state) {
    pd_net *host = pd_net_new(NULL);
    far_device far = make_far(cpu_of(host), 0);
    pd_real values[2][3 * 9];
    (void)state;
    far.device.self = &far;
    for (int k = 0; k < 2; k++) {
        pd_net *net = pd_net_new(&(pd_net_opts){ .device = k ? &far.device : NULL });
        pd_layer *x = pd_sequence(pd_vector(net, "x", 3));
        pd_layer *y = pd_gru(net, x, 3, &(pd_gru_opts){ .weight.name = "both", .recurrent.name = "both" });
        pd_trainer *trainer = pd_trainer_new(net, pd_sum_cost(net, y, NULL), pd_sgd(0.1), NULL);
        pd_batch *batch = pd_batch_new(net);
        for (int r = 0; r < 4; r++) memcpy(pd_batch_add_row(batch, 0), images + 3 * r, 3 * sizeof *images);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
        for (int i = 0; i < 3; i++)
            if (pd_train_batch(trainer, batch, NULL) != PD_OK) fail_msg("%s", pd_error(net));
        assert_int_equal(pd_param_get(pd_param_find(net, "both"), values[k], 27), PD_OK);
        pd_batch_free(batch);
        pd_trainer_free(trainer);
        pd_net_free(net);
    }
    assert_memory_equal(values[1], values[0], sizeof values[0]);
    pd_net_free(host);
}

/* A layer on the host whose tensors are windows of larger arrays finds its numbers there, wherever they are moved between
   two calls, leaves what is around them, and has its pointers back afterwards. */
static void test_windows(void **state) {
    enum { ROWS = 2, WIDTH = 4, ALL = 6 * WIDTH };
    enum { X, DX, Y, DY, ARRAYS };
    static const int64_t firsts[] = { 3, 3, 1, 0, 4 }, rows[] = { 1, 2, 2, 1, 2 }; /* one grows where it stands */
    pd_net *host = pd_net_new(NULL), *net;
    far_device far = make_far(cpu_of(host), 0);
    pd_real *far_arrays[ARRAYS], start[ARRAYS][ALL], now[ARRAYS][ALL], *kept[ARRAYS], db[WIDTH];
    pd_layer *x, *y;
    pd_batch *batch;
    double sums[WIDTH] = { 0 };
    (void)state;
    random_seed(9);
    far.device.self = &far;
    net = pd_net_new(&(pd_net_opts){ .device = &far.device });
    x = pd_vector(net, "x", WIDTH);
    y = pd_layer_add(net, &scale_type, NULL, &x, 1, NULL);
    assert_int_equal(pd_want_gradient(x), PD_OK);
    assert_int_equal(pd_zero_grads(net), PD_OK);
    batch = pd_batch_new(net);
    for (int r = 0; r < ROWS; r++) {
        memcpy(pd_batch_add_row(batch, 0), images + r, WIDTH * sizeof *images);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    assert_int_equal(pd_forward(net, batch, PD_CHECK, &y, 1), PD_OK);
    kept[X] = x->out.data, kept[DX] = x->out.grad, kept[Y] = y->out.data, kept[DY] = y->out.grad;
    for (int k = 0; k < ARRAYS; k++) {
        far_arrays[k] = (pd_real *)far_alloc(&far.device, sizeof start[k]);
        for (int i = 0; i < ALL; i++) start[k][i] = (pd_real)uniform(-1, 1);
    }
    for (int w = 0; w < COUNT(firsts); w++) {
        const int64_t at = firsts[w] * WIDTH;
        pd_real *moved[ARRAYS];
        for (int k = 0; k < ARRAYS; k++) {
            far_upload(&far.device, far_arrays[k], start[k], sizeof start[k]);
            moved[k] = far_arrays[k] + at;
        }
        x->out.rows = y->out.rows = rows[w];
        x->out.data = moved[X], x->out.grad = moved[DX], y->out.data = moved[Y], y->out.grad = moved[DY];
        assert_int_equal(inside_forward(y), PD_OK);
        assert_int_equal(inside_backward(y), PD_OK);
        assert_true(x->out.data == moved[X] && x->out.grad == moved[DX] && y->out.data == moved[Y] &&
                    y->out.grad == moved[DY]);
        for (int k = 0; k < ARRAYS; k++) far_download(&far.device, now[k], far_arrays[k], sizeof now[k]);
        for (int i = 0; i < ALL; i++) {
            bool in = i >= at && i < at + rows[w] * WIDTH;
            pd_real b = (pd_real)1.5;
            assert_true(now[X][i] == start[X][i] && now[DY][i] == start[DY][i]);
            assert_true(now[Y][i] == (in ? b * start[X][i] : start[Y][i]));
            check_near((double)now[DX][i], (double)(start[DX][i] + (in ? b * start[DY][i] : 0)), REAL_TOLERANCE, "dx");
            if (in) sums[i % WIDTH] += (double)start[DY][i] * (double)start[X][i];
        }
    }
    assert_int_equal(pd_param_get_grad(pd_param_first(net), db, WIDTH), PD_OK);
    for (int i = 0; i < WIDTH; i++) check_near((double)db[i], sums[i], REAL_TOLERANCE, "db");
    x->out.data = kept[X], x->out.grad = kept[DX], y->out.data = kept[Y], y->out.grad = kept[DY];
    for (int k = 0; k < ARRAYS; k++) far_free(&far.device, far_arrays[k]);
    pd_batch_free(batch);
    pd_net_free(net);
    pd_net_free(host);
}

enum { LOOKS = 4, LOOK_WIDTH = 5, LOOK_NUMBERS = LOOKS * (LOOKS + 1) / 2 + LOOK_WIDTH };

/* The weights that an attention gave, and the gradient of its v, wherever it ran. */
static void look(pd_device *device, pd_real *numbers) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 4, .device = device });
    pd_layer *query = pd_vector(net, NULL, LOOK_WIDTH), *keys = pd_sequence(pd_vector(net, NULL, LOOK_WIDTH));
    pd_layer *y = pd_attention(net, query, keys, keys, NULL),
             *cost = pd_sum_cost(net, pd_multiply(net, y, y, NULL), NULL);
    pd_batch *batch = pd_batch_new(net);
    const pd_real *first = NULL;
    if (!cost) fail_msg("%s", pd_error(net));
    for (int64_t q = 0; q < LOOKS; q++) {
        memcpy(pd_batch_add_row(batch, 0), images + q, LOOK_WIDTH * sizeof *images);
        for (int64_t k = 0; k <= q; k++)
            memcpy(pd_batch_add_row(batch, 1), images + 7 * q + k, LOOK_WIDTH * sizeof *images);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &cost, 1), PD_OK);
    assert_int_equal(pd_backward(net, cost), PD_OK);
    for (int64_t q = 0; q < LOOKS; q++) {
        int64_t count;
        const pd_real *weights = pd_attention_weights(y, q, 0, &count);
        assert_non_null(weights);
        assert_int_equal(count, q + 1);
        if (q == 0) first = weights;
        memcpy(numbers, weights, (size_t)count * sizeof *numbers);
        numbers += count;
    }
    assert_true(*first == 1); /* what was given first is still there */
    assert_int_equal(pd_param_get_grad(pd_param_first(net), numbers, LOOK_WIDTH), PD_OK);
    pd_batch_free(batch);
    pd_net_free(net);
}

static void test_attention_far_away(void **state) {
    pd_real want[LOOK_NUMBERS] = { 0 };
    (void)state;
    make_data();
    look(NULL, want);
    for (int has = 0; has < 2; has++) {
        pd_real got[LOOK_NUMBERS] = { 0 };
        pd_net *host = pd_net_new(NULL);
        far_device far = make_far(cpu_of(host), has ? ~(uint64_t)0 : 0);
        far.device.self = &far;
        look(&far.device, got);
        assert_memory_equal(got, want, sizeof want);
        pd_net_free(host);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_training),
        cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_gradient_check),
        cmocka_unit_test(test_steady_state),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_wrapped_blas),
        cmocka_unit_test(test_lacks_a_basic_operation),
        cmocka_unit_test(test_refuses_a_shape),
        cmocka_unit_test(test_parameter_twice),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_attention_far_away),
    };
    make_data();
    return run_group(tests, NULL, NULL);
}
