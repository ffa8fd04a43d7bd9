/* Every layer and activation: against a straight-line twin written from the definition in double, its gradients against
   central differences, on empty batches, in other numbers of threads, in shared nets; shape rules; dropout and batch
   norm; and what every builder says when it is misused. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "far_device.h"
#include "inside.h"
#include "support.h"

#define IS_DOUBLE (sizeof(pd_real) == 8)

/* ======================================================================================================== */
/* Random problems: a net with one layer under test, its inputs and a batch                                  */

enum { MAX_INPUTS = 4 };

/* Window, steps and so on that take effect, height first. */
typedef struct geometry {
    int64_t size[2], stride[2], pad[2], dilation[2], groups;
} geometry;

typedef struct problem {
    const struct layer_case *c;
    uint64_t seed;
    pd_net *net;
    pd_layer *inputs[MAX_INPUTS], *layer;
    int input_count;
    pd_batch *batch;
    int64_t rows; /* of each input */
    pd_mode mode; /* of the last forward */
    /* wishes */
    bool large;    /* so large that threads are used */
    bool positive; /* parameters and inputs */
    int64_t limit; /* upper bound of sizes; 0: none */
    int threads;
    pd_device *device; /* NULL: the CPU */
    double spread;     /* inputs lie in about +-1.8 spread */
    /* what build chose, for the twin */
    pd_shape shape; /* the output it expects */
    pd_layer_opts plain;
    pd_act act;
    geometry g;
    int64_t n[6];
    double a, b, k, alpha;
    bool flag, sequence;
    bool rough;    /* deep or large: in float, differences bend or drown in rounding, so double decides on gradients */
    bool vanishes; /* the gradient may be 0 everywhere */
} problem;

typedef struct layer_case {
    const char *name;
    pd_layer *(*build)(problem *p);
    void (*twin)(const problem *p, double *y); /* before the activation */
    double spread;                             /* of the inputs */
} layer_case;

#define FAIL_AT(p, format, ...)                                                                                        \
    fail_msg("%s (seed %llu): " format, (p)->c->name, (unsigned long long)(p)->seed, __VA_ARGS__)

static pd_shape shape(int64_t channels, int64_t height, int64_t width) { return (pd_shape){ channels, height, width }; }

/* 1 .. most, 1 rather often; about `large` in large problems. */
static int64_t size(const problem *p, int64_t most, int64_t large) {
    if (p->large) return large + below(3);
    if (p->limit && most > p->limit) most = p->limit;
    return below(4) ? 1 + below(most) : 1;
}

/* An option for a value: 0 half the time when that means the same. */
static int64_t option(int64_t value, int64_t otherwise) { return value == otherwise && below(2) ? 0 : value; }

static int64_t pad_option(int64_t pad_h, int64_t pad) {
    return pad_h == pad && below(2) ? 0 : pad_h == 0 ? PD_ZERO : pad_h;
}

static pd_layer *image(problem *p, pd_shape s) {
    pd_layer *x = pd_image(p->net, NULL, s.channels, s.height, s.width);
    if (p->sequence) pd_sequence(x);
    if (below(4)) pd_want_gradient(x);
    return p->inputs[p->input_count++] = x;
}

static pd_layer *vector(problem *p, int64_t width) { return image(p, shape(width, 1, 1)); }

/* In steps, since compilers call a function's arguments in different orders. */
static pd_shape any_shape(const problem *p, pd_shape most, pd_shape large) {
    int64_t channels = size(p, most.channels, large.channels), height = size(p, most.height, large.height);
    return shape(channels, height, size(p, most.width, large.width));
}

static pd_layer *any_image(problem *p) { return image(p, any_shape(p, shape(3, 6, 6), shape(4, 23, 24))); }

/* Sometimes static, each. */
static void any_params(pd_param_opts *weight, pd_param_opts *bias) {
    weight->is_static = below(6) == 0;
    bias->is_static = below(6) == 0;
}

/* ---- numbers ---- */

static double x_at(const problem *p, int k, int64_t i) { return (double)p->batch->slots[k].data[i]; }

/* The values of "LAYER.suffix". */
static const pd_real *values(const problem *p, const char *suffix) {
    char name[100];
    pd_param *param;
    snprintf(name, sizeof name, "%s.%s", p->layer->name, suffix);
    param = pd_param_find(p->net, name);
    if (!param) FAIL_AT(p, "no parameter \"%s\"", name);
    return param->value;
}

/* Numbers that are at least 0.04 apart within any 61 in a row and 0.02 from 0 (times spread), so that no maximum
   changes hands and no kink is crossed while gradients are checked. */
static void fill_batch(problem *p, int64_t samples) {
    int64_t order[61] = { 0 }, at = 0;
    for (int64_t i = 0; i < 61; i++) {
        int64_t k = below(i + 1);
        order[i] = order[k];
        order[k] = i;
    }
    p->rows = 0;
    for (int64_t s = 0; s < samples; s++) {
        int64_t rows = !p->sequence ? 1 : s + 1 < samples ? below(4) : 1 + below(2);
        for (int k = 0; k < p->input_count; k++)
            for (int64_t r = 0; r < rows; r++) {
                pd_real *row = pd_batch_add_row(p->batch, k);
                for (int64_t i = 0; i < p->inputs[k]->out.width; i++) {
                    double v = (double)(order[at++ % 61] - 30) * 0.06 + 0.03 + uniform(-0.01, 0.01);
                    row[i] = (pd_real)(p->spread * (p->positive ? fabs(v) + 0.2 : v));
                }
            }
        assert_int_equal(pd_batch_end_sample(p->batch), PD_OK);
        p->rows += rows;
    }
}

/* For nets with one plain input. */
static pd_batch *batch_of(pd_net *net, int64_t samples, const pd_real *numbers) {
    pd_batch *batch = pd_batch_new(net);
    int64_t width = batch->slots[0].width;
    for (int64_t s = 0; s < samples; s++) {
        memcpy(pd_batch_add_row(batch, 0), numbers + s * width, (size_t)width * sizeof *numbers);
        assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    }
    return batch;
}

static pd_device *device_of(const problem *p) { return p->device ? p->device : p->layer->device; }

static int params_of(pd_net *net) {
    int count = 0;
    for (pd_param *q = pd_param_first(net); q; q = q->next) count++;
    return count;
}

static void fill_params(problem *p) {
    for (pd_param *q = pd_param_first(p->net); q; q = q->next) {
        bool variance = strstr(q->name, "running_var") != NULL;
        for (int64_t i = 0; i < q->size; i++) {
            double v = uniform(0.3, 1.5) * (p->positive || variance || below(2) ? 1 : -1);
            pd_real value = (pd_real)(v / sqrt((double)q->fan_in));
            device_of(p)->upload(device_of(p), q->value + i, &value, sizeof value);
        }
    }
}

/* ---- the problem of a case and a seed ---- */

static const pd_act smooth_acts[] = { PD_LINEAR, PD_LINEAR, PD_SOFTRELU, PD_GELU,    PD_SIGMOID,
                                      PD_TANH,   PD_STANH,  PD_SQUARE,   PD_SOFTMAX, PD_LINEAR };

static problem wish(const layer_case *c, uint64_t seed) {
    problem p;
    memset(&p, 0, sizeof p);
    p.c = c;
    p.seed = seed;
    p.spread = c->spread;
    random_seed(seed);
    p.act = smooth_acts[below(COUNT(smooth_acts))];
    return p;
}

static void free_problem(problem *p) {
    pd_batch_free(p->batch);
    pd_net_free(p->net);
}

/* Builds net and batch as wished. */
static void make(problem *p) {
    int64_t samples;
    p->net = pd_net_new(&(pd_net_opts){ .seed = p->seed, .threads = p->threads, .device = p->device });
    p->sequence = below(4) == 0;
    p->plain.act = p->act;
    p->plain.name = below(2) ? "it" : NULL;
    p->layer = p->c->build(p);
    if (!p->layer) FAIL_AT(p, "%s", pd_error(p->net));
    if (memcmp(&p->layer->shape, &p->shape, sizeof p->shape) != 0)
        FAIL_AT(p, "shape %s, expected %s", pd_shape_text(p->layer, p->layer->shape),
                pd_shape_text(p->layer, p->shape));
    for (int k = 0; !p->layer->wants_grad && k < p->input_count; k++) pd_want_gradient(p->inputs[k]);
    if (p->act == PD_SOFTMAX && p->layer->out.width == 1) p->vanishes = true;
    fill_params(p);
    p->batch = pd_batch_new(p->net);
    samples = p->large ? 11 + 16384 / p->layer->out.width : p->limit ? 2 : 1 + below(4);
    fill_batch(p, samples);
}

static problem make_problem(const layer_case *c, uint64_t seed) {
    problem p = wish(c, seed);
    make(&p);
    return p;
}

static void forward(problem *p, pd_mode mode) {
    p->mode = mode;
    if (pd_forward(p->net, p->batch, mode, &p->layer, 1) != PD_OK) FAIL_AT(p, "%s", pd_error(p->net));
}

/* A cost for any layer: its numbers, each times another weight, summed in every row. */
static pd_real weight_of(int64_t i) { return (pd_real)((double)(pd_random(71, (uint64_t)i) % 2001) / 1000 - 1); }
static pd_status weighting_setup(pd_layer *l) {
    l->shape = shape(1, 1, 1);
    return PD_OK;
}
static pd_status weighting_forward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    for (int64_t r = 0; r < x->rows; r++) {
        l->out.data[r] = 0;
        for (int64_t i = r * x->width; i < (r + 1) * x->width; i++) l->out.data[r] += weight_of(i) * x->data[i];
    }
    return PD_OK;
}
static pd_status weighting_backward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    for (int64_t i = 0; i < x->rows * x->width; i++) x->grad[i] += l->out.grad[i / x->width] * weight_of(i);
    return PD_OK;
}
static const pd_layer_type weighting = {
    PD_API_VERSION,    "weighting",        1,    1,    0,    0, 0, weighting_setup, NULL,
    weighting_forward, weighting_backward, NULL, NULL, NULL, -1
};

/* Forward and backward. */
static void train(problem *p) {
    pd_layer *cost = pd_layer_add(p->net, &weighting, NULL, &p->layer, 1, NULL);
    p->mode = PD_TRAIN;
    if (!cost || pd_forward(p->net, p->batch, PD_TRAIN, &cost, 1) != PD_OK || pd_backward(p->net, cost) != PD_OK)
        FAIL_AT(p, "%s", pd_error(p->net));
}

/* ======================================================================================================== */
/* The layers: what builds one with random sizes and options, and the definition of its output                */

/* ---- activations ---- */

static double act_of(pd_act act, double alpha, double x) {
    switch (act) {
    case PD_RELU: return x > 0 ? x : 0;
    case PD_BRELU: return fmin(fmax(x, 0), meant(alpha, 24));
    case PD_SOFTRELU: return x > 30 ? x : log(1 + exp(x));
    case PD_LEAKY_RELU: return x < 0 ? meant(alpha, 0.01) * x : x;
    case PD_GELU: return x * (1 + erf(x / sqrt(2))) / 2;
    case PD_SIGMOID: return 1 / (1 + exp(-x));
    case PD_TANH: return tanh(x);
    case PD_STANH: return 1.7159 * tanh(2 * x / 3);
    case PD_EXP: return exp(x);
    case PD_LOG: return log(x);
    case PD_ABS: return fabs(x);
    case PD_SQUARE: return x * x;
    case PD_SQRT: return sqrt(x);
    case PD_RECIPROCAL: return 1 / x;
    case PD_LINEAR:
    case PD_SOFTMAX:
    case PD_ACT_COUNT: break;
    }
    return x;
}

static void twin_act(const problem *p, double *y) {
    int64_t rows = p->layer->out.rows, width = p->layer->out.width;
    for (int64_t i = 0; i < rows * width; i++) y[i] = act_of(p->act, p->alpha, y[i]);
    for (int64_t r = 0; r < rows && p->act == PD_SOFTMAX; r++) {
        double sum = 0, top = -HUGE_VAL;
        for (int64_t i = r * width; i < (r + 1) * width; i++) top = fmax(top, y[i]);
        for (int64_t i = r * width; i < (r + 1) * width; i++) sum += y[i] = exp(y[i] - top);
        for (int64_t i = r * width; i < (r + 1) * width; i++) y[i] /= sum;
    }
}

static pd_layer *build_activation(problem *p) {
    pd_layer *x = any_image(p);
    if (p->act == PD_LEAKY_RELU || p->act == PD_BRELU) p->alpha = below(2) ? 0.7 : 0;
    if (p->act == PD_LEAKY_RELU && below(3) == 0) p->alpha = PD_ZERO;
    p->shape = x->shape;
    return pd_activation(p->net, x, p->act, p->alpha != 0 ? &(pd_activation_opts){ .alpha = p->alpha } : NULL);
}

static void twin_copy(const problem *p, double *y) {
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) y[i] = x_at(p, 0, i);
}

/* ---- fc, bilinear ---- */

static pd_layer *build_fc(problem *p) {
    int64_t units = size(p, 6, 90);
    pd_fc_opts o = { .act = p->act, .no_bias = p->flag = below(3) == 0 };
    int count = (int)below(4);
    any_params(&o.weight, &o.bias);
    p->shape = shape(units, 1, 1);
    if (count == 0) return pd_fc(p->net, any_image(p), units, &o);
    for (int k = 0; k < count; k++) {
        if (below(2)) vector(p, size(p, 7, 80));
        else image(p, any_shape(p, shape(3, 3, 3), shape(4, 3, 5)));
    }
    return pd_fc_sum(p->net, p->inputs, count, units, &o);
}

static void twin_fc(const problem *p, double *y) {
    static const char *const names[] = { "weight", "weight1", "weight2" };
    int64_t units = p->layer->out.width;
    for (int64_t i = 0; i < p->rows * units; i++) y[i] = p->flag ? 0 : (double)values(p, "bias")[i % units];
    for (int k = 0; k < p->input_count; k++) {
        const pd_real *w = values(p, names[k]);
        int64_t n = p->inputs[k]->out.width;
        for (int64_t r = 0; r < p->rows; r++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t u = 0; u < units; u++)
                    y[r * units + u] += x_at(p, k, r * n + i) * (double)w[i * units + u];
    }
}

static pd_layer *build_bilinear(problem *p) {
    int64_t units = size(p, 4, 13);
    pd_fc_opts o = { .act = p->act, .no_bias = p->flag = below(3) == 0 };
    pd_layer *a = vector(p, size(p, 5, 31)), *b = image(p, any_shape(p, shape(2, 2, 2), shape(3, 4, 3)));
    any_params(&o.weight, &o.bias);
    p->shape = shape(units, 1, 1);
    return pd_bilinear(p->net, a, b, units, &o);
}

static void twin_bilinear(const problem *p, double *y) {
    int64_t units = p->layer->out.width, m = p->inputs[0]->out.width, n = p->inputs[1]->out.width;
    const pd_real *w = values(p, "weight");
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t k = 0; k < units; k++) {
            double sum = p->flag ? 0 : (double)values(p, "bias")[k];
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    sum += x_at(p, 0, r * m + i) * (double)w[(k * m + i) * n + j] * x_at(p, 1, r * n + j);
            y[r * units + k] = sum;
        }
}

/* ---- windows ---- */

/* How many windows of `reach` stand in the padded input, counted; with `ceil_size` one more if cells are left over and
   it begins before the padding at the end. */
static int64_t windows(int64_t in, int64_t pad, int64_t reach, int64_t stride, bool ceil_size) {
    int64_t n = 0;
    while (n * stride + reach <= in + 2 * pad) n++;
    return n + (ceil_size && (n - 1) * stride + reach < in + 2 * pad && n * stride < in + pad);
}

/* A window that fits into the padded image; with `narrow` the padding is smaller than the window. */
static geometry any_window(pd_shape in, bool narrow, bool dilated) {
    int64_t sides[2] = { in.height, in.width };
    geometry g;
    memset(&g, 0, sizeof g);
    for (int i = 0; i < 2; i++) {
        g.stride[i] = 1 + below(3);
        do {
            g.size[i] = 1 + below(4);
            g.pad[i] = below(narrow && g.size[i] < 3 ? g.size[i] : 3);
            g.dilation[i] = dilated ? 1 + below(2) : 1;
        } while (g.dilation[i] * (g.size[i] - 1) + 1 > sides[i] + 2 * g.pad[i]);
    }
    if (below(2)) g.stride[0] = g.stride[1];
    g.groups = 1;
    return g;
}

static int64_t reach(const geometry *g, int axis) { return g->dilation[axis] * (g->size[axis] - 1) + 1; }

static pd_shape window_shape(const geometry *g, pd_shape in, int64_t channels, bool ceil_size) {
    return shape(channels, windows(in.height, g->pad[0], reach(g, 0), g->stride[0], ceil_size),
                 windows(in.width, g->pad[1], reach(g, 1), g->stride[1], ceil_size));
}

static pd_conv_opts conv_opts(const problem *p) {
    const geometry *g = &p->g;
    pd_conv_opts o = { .act = p->act, .no_bias = p->flag, .pad = g->pad[1] };
    o.filter_h = option(g->size[0], g->size[1]);
    o.stride = option(g->stride[1], 1);
    o.stride_h = option(g->stride[0], g->stride[1]);
    o.pad_h = pad_option(g->pad[0], g->pad[1]);
    o.dilation = option(g->dilation[1], 1);
    o.dilation_h = option(g->dilation[0], g->dilation[1]);
    o.groups = option(g->groups, 1);
    any_params(&o.weight, &o.bias);
    return o;
}

static pd_layer *build_conv(problem *p) {
    int64_t groups = size(p, 3, 2), filters = groups * size(p, 2, 2);
    pd_shape s = any_shape(p, shape(2, 7, 7), shape(2, 15, 16));
    pd_layer *x = image(p, shape(groups * s.channels, s.height, s.width));
    pd_conv_opts o;
    p->flag = below(3) == 0;
    p->g = any_window(x->shape, false, true);
    p->g.groups = groups;
    p->shape = window_shape(&p->g, x->shape, filters, false);
    o = conv_opts(p);
    p->vanishes = o.no_bias || o.bias.is_static; /* every window may lie in the padding */
    return pd_conv(p->net, x, filters, p->g.size[1], &o);
}

/* Calls `add` for every pair of an image cell and a cell of the convolution's output that a filter cell joins. */
typedef void (*joiner)(const problem *p, double *y, int64_t x, int64_t w, int64_t o);
static void for_conv(const problem *p, pd_shape in, pd_shape out, joiner add, double *y) {
    const geometry *g = &p->g;
    int64_t each = in.channels / g->groups, filters = out.channels / g->groups;
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t f = 0; f < out.channels; f++)
            for (int64_t oh = 0; oh < out.height; oh++)
                for (int64_t ow = 0; ow < out.width; ow++)
                    for (int64_t c = 0; c < each; c++)
                        for (int64_t kh = 0; kh < g->size[0]; kh++)
                            for (int64_t kw = 0; kw < g->size[1]; kw++) {
                                int64_t h = oh * g->stride[0] - g->pad[0] + kh * g->dilation[0];
                                int64_t w = ow * g->stride[1] - g->pad[1] + kw * g->dilation[1];
                                int64_t channel = r * in.channels + f / filters * each + c;
                                if (h < 0 || h >= in.height || w < 0 || w >= in.width) continue;
                                add(p, y, (channel * in.height + h) * in.width + w,
                                    ((f * each + c) * g->size[0] + kh) * g->size[1] + kw,
                                    ((r * out.channels + f) * out.height + oh) * out.width + ow);
                            }
}

static void start_with_bias(const problem *p, double *y) {
    int64_t area = p->layer->shape.height * p->layer->shape.width;
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++)
        y[i] = p->flag ? 0 : (double)values(p, "bias")[i / area % p->layer->shape.channels];
}

static void join_conv(const problem *p, double *y, int64_t x, int64_t w, int64_t o) {
    y[o] += x_at(p, 0, x) * (double)p->layer->params[0]->value[w];
}

static void twin_conv(const problem *p, double *y) {
    start_with_bias(p, y);
    for_conv(p, p->inputs[0]->shape, p->layer->shape, join_conv, y);
}

/* The transpose goes from a convolution's output back to its input. */
static pd_layer *build_conv_transpose(problem *p) {
    int64_t groups = size(p, 3, 2), filters = groups * size(p, 2, 2), sides[2];
    pd_shape s = any_shape(p, shape(2, 4, 4), shape(2, 8, 9));
    pd_layer *x = image(p, shape(groups * s.channels, s.height, s.width));
    pd_conv_opts o;
    p->flag = below(3) == 0;
    p->g = any_window(shape(1, 8, 8), false, true);
    p->g.groups = groups;
    for (int i = 0; i < 2; i++) {
        int64_t whole = ((i ? x->shape.width : x->shape.height) - 1) * p->g.stride[i] + reach(&p->g, i);
        while (whole <= 2 * p->g.pad[i]) p->g.pad[i]--;
        sides[i] = whole - 2 * p->g.pad[i];
    }
    p->shape = shape(filters, sides[0], sides[1]);
    o = conv_opts(p);
    p->vanishes = o.no_bias || o.bias.is_static;
    return pd_conv_transpose(p->net, x, filters, p->g.size[1], &o);
}

static void join_conv_transpose(const problem *p, double *y, int64_t x, int64_t w, int64_t o) {
    y[x] += x_at(p, 0, o) * (double)p->layer->params[0]->value[w];
}

static void twin_conv_transpose(const problem *p, double *y) {
    start_with_bias(p, y);
    for_conv(p, p->layer->shape, p->inputs[0]->shape, join_conv_transpose, y);
}

static pd_layer *build_pool(problem *p) {
    pd_layer *x = any_image(p);
    pd_pool_opts o = { .act = p->act };
    o.method = (pd_pool_method)below(4);
    o.ceil = below(2);
    p->g = any_window(x->shape, true, false);
    if (below(4) == 0) memcpy(p->g.stride, p->g.size, sizeof p->g.stride); /* the default */
    o.stride = option(p->g.stride[1], p->g.size[1]);
    o.stride_h = option(p->g.stride[0], o.stride ? o.stride : p->g.size[0]);
    o.size_h = option(p->g.size[0], p->g.size[1]);
    o.pad = p->g.pad[1];
    o.pad_h = pad_option(p->g.pad[0], p->g.pad[1]);
    p->n[0] = (int64_t)o.method;
    p->shape = window_shape(&p->g, x->shape, x->shape.channels, o.ceil);
    return pd_pool(p->net, x, p->g.size[1], &o);
}

static void twin_pool(const problem *p, double *y) {
    pd_shape in = p->inputs[0]->shape, out = p->layer->shape;
    const geometry *g = &p->g;
    for (int64_t i = 0; i < p->rows * out.channels * out.height * out.width; i++) {
        int64_t map = i / (out.height * out.width), cells = 0;
        int64_t top = i / out.width % out.height * g->stride[0] - g->pad[0];
        int64_t left = i % out.width * g->stride[1] - g->pad[1];
        double sum = 0, best = -HUGE_VAL;
        for (int64_t h = top; h < top + g->size[0]; h++)
            for (int64_t w = left; w < left + g->size[1]; w++) {
                if (h < 0 || h >= in.height || w < 0 || w >= in.width) continue;
                sum += x_at(p, 0, (map * in.height + h) * in.width + w);
                best = fmax(best, x_at(p, 0, (map * in.height + h) * in.width + w));
                cells++;
            }
        if (cells == 0) FAIL_AT(p, "window %lld holds no cell", (long long)i);
        y[i] = p->n[0] == PD_MAX       ? best
               : p->n[0] == PD_AVERAGE ? sum / (double)cells
               : p->n[0] == PD_SQRT_N  ? sum / sqrt((double)cells)
                                       : sum;
    }
}

static pd_layer *build_block_expand(problem *p) {
    pd_layer *x;
    pd_block_expand_opts o = { .act = p->act };
    p->sequence = false; /* it makes them */
    x = any_image(p);
    p->g = any_window(x->shape, false, false);
    if (below(4) == 0) memcpy(p->g.stride, p->g.size, sizeof p->g.stride);
    o.stride = option(p->g.stride[1], p->g.size[1]);
    o.stride_h = option(p->g.stride[0], o.stride ? o.stride : p->g.size[0]);
    o.pad = p->g.pad[1];
    o.pad_h = pad_option(p->g.pad[0], p->g.pad[1]);
    p->vanishes = true; /* every block may lie in the padding */
    p->shape = shape(x->shape.channels * p->g.size[0] * p->g.size[1], 1, 1);
    return pd_block_expand(p->net, x, p->g.size[0], p->g.size[1], &o);
}

static void twin_block_expand(const problem *p, double *y) {
    pd_shape in = p->inputs[0]->shape, blocks = window_shape(&p->g, in, 1, false);
    const geometry *g = &p->g;
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t bh = 0; bh < blocks.height; bh++)
            for (int64_t bw = 0; bw < blocks.width; bw++)
                for (int64_t c = 0; c < in.channels; c++)
                    for (int64_t kh = 0; kh < g->size[0]; kh++)
                        for (int64_t kw = 0; kw < g->size[1]; kw++) {
                            int64_t h = bh * g->stride[0] - g->pad[0] + kh, w = bw * g->stride[1] - g->pad[1] + kw;
                            bool inside = h >= 0 && h < in.height && w >= 0 && w < in.width;
                            *y++ = inside ? x_at(p, 0, ((r * in.channels + c) * in.height + h) * in.width + w) : 0;
                        }
}

/* ---- norms ---- */

static pd_layer *build_batch_norm(problem *p) {
    pd_layer *x = any_image(p);
    pd_batch_norm_opts o = { .name = below(2) ? "norm" : NULL, .act = p->act };
    any_params(&o.weight, &o.bias);
    p->flag = o.no_affine = below(3) == 0;
    p->n[0] = o.use_running = below(3) == 0;
    p->a = o.epsilon = below(2) ? 0.01 : 0;
    if (p->a == 0) p->a = 1e-5;
    if (x->shape.height * x->shape.width == 1) p->vanishes = true; /* a single row */
    p->shape = x->shape;
    return pd_batch_norm(p->net, x, &o);
}

static void twin_batch_norm(const problem *p, double *y) {
    int64_t channels = p->layer->shape.channels, area = p->layer->shape.height * p->layer->shape.width;
    bool running = p->mode == PD_PREDICT || p->n[0];
    for (int64_t c = 0; c < channels; c++) {
        double n = (double)(p->rows * area), mean = 0, variance = 0;
        for (int64_t i = 0; i < p->rows * area; i++)
            mean += x_at(p, 0, (i / area * channels + c) * area + i % area) / n;
        for (int64_t i = 0; i < p->rows * area; i++)
            variance += pow(x_at(p, 0, (i / area * channels + c) * area + i % area) - mean, 2) / n;
        if (running) mean = (double)values(p, "running_mean")[c], variance = (double)values(p, "running_var")[c];
        for (int64_t i = 0; i < p->rows * area; i++) {
            int64_t at = (i / area * channels + c) * area + i % area;
            y[at] = (x_at(p, 0, at) - mean) / sqrt(variance + p->a);
            if (!p->flag) y[at] = y[at] * (double)values(p, "weight")[c] + (double)values(p, "bias")[c];
        }
    }
}

static pd_layer *build_layer_norm(problem *p) {
    pd_layer *x = below(2) ? vector(p, size(p, 9, 150)) : any_image(p);
    pd_layer_norm_opts o = { .act = p->act };
    any_params(&o.weight, &o.bias);
    p->flag = o.no_affine = below(3) == 0;
    p->a = o.epsilon = below(2) ? 0.01 : 0;
    if (p->a == 0) p->a = 1e-5;
    if (x->out.width == 1) p->vanishes = true;
    p->shape = x->shape;
    return pd_layer_norm(p->net, x, &o);
}

static void twin_layer_norm(const problem *p, double *y) {
    int64_t n = p->layer->out.width;
    for (int64_t r = 0; r < p->rows; r++) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < n; i++) mean += x_at(p, 0, r * n + i) / (double)n;
        for (int64_t i = 0; i < n; i++) variance += pow(x_at(p, 0, r * n + i) - mean, 2) / (double)n;
        for (int64_t i = 0; i < n; i++) {
            y[r * n + i] = (x_at(p, 0, r * n + i) - mean) / sqrt(variance + p->a);
            if (!p->flag) y[r * n + i] = y[r * n + i] * (double)values(p, "weight")[i] + (double)values(p, "bias")[i];
        }
    }
}

static pd_layer *build_group_norm(problem *p) {
    pd_layer *x = any_image(p);
    pd_group_norm_opts o = { .act = p->act };
    do p->n[0] = 1 + below((int)x->shape.channels); /* groups */
    while (x->shape.channels % p->n[0] != 0);
    any_params(&o.weight, &o.bias);
    p->flag = o.no_affine = below(3) == 0;
    p->a = o.epsilon = below(2) ? 0.01 : 0;
    if (p->a == 0) p->a = 1e-5;
    if (x->out.width == p->n[0]) p->vanishes = true;
    p->shape = x->shape;
    return pd_group_norm(p->net, x, p->n[0], &o);
}

static void twin_group_norm(const problem *p, double *y) {
    int64_t area = p->layer->shape.height * p->layer->shape.width, channels = p->layer->shape.channels;
    int64_t n = p->layer->out.width / p->n[0];
    for (int64_t g = 0; g < p->rows * p->n[0]; g++) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < n; i++) mean += x_at(p, 0, g * n + i) / (double)n;
        for (int64_t i = 0; i < n; i++) variance += pow(x_at(p, 0, g * n + i) - mean, 2) / (double)n;
        for (int64_t i = g * n; i < (g + 1) * n; i++) {
            int64_t c = i / area % channels;
            y[i] = (x_at(p, 0, i) - mean) / sqrt(variance + p->a);
            if (!p->flag) y[i] = y[i] * (double)values(p, "weight")[c] + (double)values(p, "bias")[c];
        }
    }
}

static pd_layer *build_response_norm(problem *p) {
    pd_layer *x = image(p, any_shape(p, shape(7, 3, 3), shape(9, 14, 14)));
    pd_response_norm_opts o = { .act = p->act, .size = below(7) };
    if (below(2)) o.alpha = below(3) ? 0.9 : PD_ZERO;
    if (below(2)) o.beta = below(3) ? 1.3 : PD_ZERO;
    if (below(2)) o.k = 2.5;
    p->n[0] = o.size ? o.size : 5;
    p->a = meant(o.alpha, 1e-4);
    p->b = meant(o.beta, 0.75);
    p->k = o.k != 0 ? o.k : 1;
    p->shape = x->shape;
    return pd_response_norm(p->net, x, &o);
}

static void twin_response_norm(const problem *p, double *y) {
    int64_t channels = p->layer->shape.channels, area = p->layer->shape.height * p->layer->shape.width;
    for (int64_t i = 0; i < p->rows * channels * area; i++) {
        int64_t c = i / area % channels, first = c - p->n[0] / 2;
        double sum = 0;
        for (int64_t j = first; j < first + p->n[0]; j++)
            if (j >= 0 && j < channels) sum += pow(x_at(p, 0, i + (j - c) * area), 2);
        y[i] = x_at(p, 0, i) * pow(p->k + p->a / (double)p->n[0] * sum, -p->b);
    }
}

/* ---- dropout ---- */

static pd_layer *build_dropout(problem *p) {
    pd_layer *x = any_image(p);
    p->a = below(4) ? 0.4 : 0;
    p->vanishes = true; /* all may be dropped */
    p->shape = x->shape;
    return pd_dropout(p->net, x, p->a, &p->plain);
}

static void twin_dropout(const problem *p, double *y) {
    uint64_t key = pd_layer_key(p->layer);
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) {
        double u = (double)(pd_random(key, (uint64_t)i) >> 11) / 9007199254740992.0;
        y[i] = p->mode == PD_PREDICT ? x_at(p, 0, i) : u >= p->a ? x_at(p, 0, i) / (1 - p->a) : 0;
    }
}

/* ---- sums, products ---- */

static pd_layer *build_add(problem *p) {
    pd_layer *x = any_image(p);
    int count = 1 + (int)below(3);
    p->shape = x->shape;
    while (p->input_count < count) image(p, x->shape);
    return pd_add(p->net, p->inputs, count, &p->plain);
}

static void twin_add(const problem *p, double *y) {
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) {
        y[i] = 0;
        for (int k = 0; k < p->input_count; k++) y[i] += x_at(p, k, i);
    }
}

static pd_layer *build_multiply(problem *p) {
    pd_layer *x = any_image(p), *other = image(p, x->shape);
    p->shape = x->shape;
    return pd_multiply(p->net, x, other, &p->plain);
}

static void twin_multiply(const problem *p, double *y) {
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) y[i] = x_at(p, 0, i) * x_at(p, 1, i);
}

static pd_layer *build_interpolate(problem *p) {
    pd_shape s = p->shape = any_shape(p, shape(3, 6, 6), shape(4, 23, 24));
    pd_layer *w = below(2) ? vector(p, 1) : image(p, s), *a = image(p, s), *b = image(p, s);
    return pd_interpolate(p->net, w, a, b, &p->plain);
}

static void twin_interpolate(const problem *p, double *y) {
    int64_t n = p->layer->out.width, each = p->inputs[0]->out.width == n ? 1 : n;
    for (int64_t i = 0; i < p->rows * n; i++)
        y[i] = x_at(p, 0, i / each) * x_at(p, 1, i) + (1 - x_at(p, 0, i / each)) * x_at(p, 2, i);
}

static pd_layer *build_scale(problem *p) {
    pd_layer *w = vector(p, 1), *x = any_image(p);
    p->shape = x->shape;
    return pd_scale(p->net, w, x, &p->plain);
}

static void twin_scale(const problem *p, double *y) {
    int64_t n = p->layer->out.width;
    for (int64_t i = 0; i < p->rows * n; i++) y[i] = x_at(p, 0, i / n) * x_at(p, 1, i);
}

static pd_layer *build_affine(problem *p) {
    pd_layer *x = any_image(p);
    p->a = uniform(-2, 2), p->b = uniform(-2, 2);
    p->shape = x->shape;
    return pd_affine(p->net, x, p->a, p->b, &p->plain);
}

static void twin_affine(const problem *p, double *y) {
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) y[i] = p->a * x_at(p, 0, i) + p->b;
}

static pd_layer *build_outer(problem *p) {
    pd_layer *a = vector(p, size(p, 5, 40)), *b = image(p, any_shape(p, shape(2, 2, 2), shape(3, 4, 5)));
    p->shape = shape(1, a->out.width, b->out.width);
    return pd_outer(p->net, a, b, &p->plain);
}

static void twin_outer(const problem *p, double *y) {
    int64_t m = p->inputs[0]->out.width, n = p->inputs[1]->out.width;
    for (int64_t i = 0; i < p->rows * m * n; i++) y[i] = x_at(p, 0, i / n) * x_at(p, 1, i / (m * n) * n + i % n);
}

static pd_layer *build_cosine(problem *p) {
    int64_t n = size(p, 5, 30), vectors = size(p, 3, 3);
    pd_layer *a = vector(p, n), *b = vector(p, n * vectors);
    p->a = below(2) ? 5 : uniform(-2, 2);
    if (n == 1) p->vanishes = true;
    p->shape = shape(vectors, 1, 1);
    return pd_cosine(p->net, a, b, p->a, &p->plain);
}

static void twin_cosine(const problem *p, double *y) {
    int64_t n = p->inputs[0]->out.width, vectors = p->layer->out.width;
    for (int64_t i = 0; i < p->rows * vectors; i++) {
        double ab = 0, aa = 0, bb = 0;
        for (int64_t k = 0; k < n; k++) {
            double a = x_at(p, 0, i / vectors * n + k), b = x_at(p, 1, i * n + k);
            ab += a * b, aa += a * a, bb += b * b;
        }
        y[i] = p->a * ab / (sqrt(aa) * sqrt(bb));
    }
}

/* ---- numbers that move: y[i] = x[source of i], or 0 ---- */

static pd_layer *build_concat(problem *p) {
    int count = 1 + (int)below(3);
    int64_t height = size(p, 4, 12), width = size(p, 4, 13), channels = 0;
    while (p->input_count < count) channels += image(p, shape(size(p, 3, 4), height, width))->shape.channels;
    p->shape = shape(channels, height, width);
    return pd_concat(p->net, p->inputs, count, &p->plain);
}

static void twin_concat(const problem *p, double *y) {
    for (int64_t r = 0; r < p->rows; r++)
        for (int k = 0; k < p->input_count; k++)
            for (int64_t i = 0; i < p->inputs[k]->out.width; i++) *y++ = x_at(p, k, r * p->inputs[k]->out.width + i);
}

static pd_layer *build_slice(problem *p) {
    pd_layer *x = image(p, any_shape(p, shape(6, 4, 4), shape(7, 12, 13)));
    p->n[0] = below(x->shape.channels);
    p->n[1] = 1 + below(x->shape.channels - p->n[0]);
    p->shape = shape(p->n[1], x->shape.height, x->shape.width);
    return pd_slice(p->net, x, p->n[0], p->n[1], &p->plain);
}

static void twin_slice(const problem *p, double *y) {
    int64_t area = p->shape.height * p->shape.width;
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < p->n[1] * area; i++)
            *y++ = x_at(p, 0, (r * p->inputs[0]->shape.channels + p->n[0]) * area + i);
}

static pd_layer *build_reshape(problem *p) {
    pd_layer *x = any_image(p);
    pd_shape s = x->shape;
    pd_shape shapes[] = { shape(s.height, s.width, s.channels), shape(pd_shape_size(s), 1, 1),
                          shape(1, 1, pd_shape_size(s)), shape(s.width, s.channels * s.height, 1), s };
    p->shape = shapes[below(COUNT(shapes))];
    return pd_reshape(p->net, x, p->shape, &p->plain);
}

static pd_layer *build_transpose(problem *p) {
    static const int orders[6][3] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    pd_layer *x = any_image(p);
    int64_t sides[3] = { x->shape.channels, x->shape.height, x->shape.width };
    const int *order = orders[below(6)];
    for (int i = 0; i < 3; i++) p->n[i] = order[i];
    p->shape = shape(sides[order[0]], sides[order[1]], sides[order[2]]);
    return pd_transpose(p->net, x, order, &p->plain);
}

static void twin_transpose(const problem *p, double *y) {
    pd_shape in = p->inputs[0]->shape;
    int64_t at[3];
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < p->shape.channels; i++)
            for (int64_t j = 0; j < p->shape.height; j++)
                for (int64_t k = 0; k < p->shape.width; k++) {
                    at[p->n[0]] = i, at[p->n[1]] = j, at[p->n[2]] = k;
                    *y++ = x_at(p, 0, ((r * in.channels + at[0]) * in.height + at[1]) * in.width + at[2]);
                }
}

static pd_layer *build_pad(problem *p) {
    pd_layer *x = any_image(p);
    for (int i = 0; i < 6; i++) p->n[i] = below(3);
    p->shape = shape(x->shape.channels + p->n[0] + p->n[1], x->shape.height + p->n[2] + p->n[3],
                     x->shape.width + p->n[4] + p->n[5]);
    return pd_pad(p->net, x, p->n, &p->plain);
}

static void twin_pad(const problem *p, double *y) {
    pd_shape in = p->inputs[0]->shape;
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = -p->n[0]; i < in.channels + p->n[1]; i++)
            for (int64_t j = -p->n[2]; j < in.height + p->n[3]; j++)
                for (int64_t k = -p->n[4]; k < in.width + p->n[5]; k++) {
                    bool inside = i >= 0 && i < in.channels && j >= 0 && j < in.height && k >= 0 && k < in.width;
                    *y++ = inside ? x_at(p, 0, ((r * in.channels + i) * in.height + j) * in.width + k) : 0;
                }
}

static pd_layer *build_maxout(problem *p) {
    int64_t groups = size(p, 4, 3);
    pd_layer *x;
    p->n[0] = groups;
    p->shape = any_shape(p, shape(3, 4, 4), shape(3, 12, 13));
    x = image(p, shape(groups * p->shape.channels, p->shape.height, p->shape.width));
    return pd_maxout(p->net, x, groups, &p->plain);
}

static void twin_maxout(const problem *p, double *y) {
    int64_t area = p->shape.height * p->shape.width;
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++) {
        y[i] = -HUGE_VAL;
        for (int64_t g = 0; g < p->n[0]; g++) y[i] = fmax(y[i], x_at(p, 0, (i / area * p->n[0] + g) * area + i % area));
    }
}

static pd_layer *build_resize(problem *p) {
    pd_layer *x = any_image(p);
    p->shape = any_shape(p, shape(1, 9, 9), shape(1, 31, 17));
    p->shape.channels = x->shape.channels;
    return pd_resize(p->net, x, p->shape.height, p->shape.width, &p->plain);
}

/* Where output i of n falls in the input: cell and share of the next one. */
static int64_t resize_source(int64_t i, int64_t n, int64_t in, double *rest) {
    double at = n > 1 ? (double)(i * (in - 1)) / (double)(n - 1) : 0;
    *rest = at - floor(at);
    return (int64_t)floor(at);
}

static void twin_resize(const problem *p, double *y) {
    pd_shape in = p->inputs[0]->shape;
    for (int64_t m = 0; m < p->rows * in.channels; m++)
        for (int64_t i = 0; i < p->shape.height; i++)
            for (int64_t j = 0; j < p->shape.width; j++) {
                double v, u;
                int64_t h = resize_source(i, p->shape.height, in.height, &v);
                int64_t w = resize_source(j, p->shape.width, in.width, &u), at = (m * in.height + h) * in.width + w;
                *y = (1 - v) * (1 - u) * x_at(p, 0, at);
                if (u > 0) *y += (1 - v) * u * x_at(p, 0, at + 1);
                if (v > 0) *y += v * (1 - u) * x_at(p, 0, at + in.width);
                if (u > 0 && v > 0) *y += v * u * x_at(p, 0, at + in.width + 1);
                y++;
            }
}

static pd_layer *build_prelu(problem *p) {
    pd_layer *x = any_image(p);
    p->shape = x->shape;
    p->act = PD_LINEAR;           /* it has no other */
    p->vanishes = !x->wants_grad; /* all may be positive */
    return pd_prelu(p->net, x, below(6) ? NULL : &(pd_prelu_opts){ .weight = { .is_static = true } });
}

static void twin_prelu(const problem *p, double *y) {
    int64_t area = p->shape.height * p->shape.width;
    for (int64_t i = 0; i < p->rows * p->layer->out.width; i++)
        y[i] = x_at(p, 0, i) * (x_at(p, 0, i) < 0 ? (double)values(p, "weight")[i / area % p->shape.channels] : 1);
}

/* ---- the table ---- */

#define NORM_SPREAD (IS_DOUBLE ? 4 : 20) /* so that a step of the gradient check is small beside the deviation */

static const layer_case cases[] = {
    { "fc", build_fc, twin_fc, 1 },
    { "conv", build_conv, twin_conv, 1 },
    { "conv_transpose", build_conv_transpose, twin_conv_transpose, 1 },
    { "pool", build_pool, twin_pool, 1 },
    { "batch_norm", build_batch_norm, twin_batch_norm, NORM_SPREAD },
    { "layer_norm", build_layer_norm, twin_layer_norm, NORM_SPREAD },
    { "group_norm", build_group_norm, twin_group_norm, NORM_SPREAD },
    { "response_norm", build_response_norm, twin_response_norm, 1 },
    { "dropout", build_dropout, twin_dropout, 1 },
    { "add", build_add, twin_add, 1 },
    { "multiply", build_multiply, twin_multiply, 1 },
    { "concat", build_concat, twin_concat, 1 },
    { "slice", build_slice, twin_slice, 1 },
    { "reshape", build_reshape, twin_copy, 1 },
    { "transpose", build_transpose, twin_transpose, 1 },
    { "interpolate", build_interpolate, twin_interpolate, 1 },
    { "scale", build_scale, twin_scale, 1 },
    { "affine", build_affine, twin_affine, 1 },
    { "maxout", build_maxout, twin_maxout, 1 },
    { "pad", build_pad, twin_pad, 1 },
    { "resize", build_resize, twin_resize, 1 },
    { "block_expand", build_block_expand, twin_block_expand, 1 },
    { "cosine", build_cosine, twin_cosine, 3 },
    { "outer", build_outer, twin_outer, 1 },
    { "bilinear", build_bilinear, twin_bilinear, 1 },
    { "activation", build_activation, twin_copy, 1 },
    { "prelu", build_prelu, twin_prelu, 1 },
};

/* For every case, and for `count` seeds of its own, as ROUNDS has it. */
#define FOR_CASES(c, seed, count)                                                                                      \
    for (const layer_case *c = cases; c < cases + COUNT(cases); c++)                                                   \
        for (uint64_t seed = 1000 * (uint64_t)(c - cases), seed##_end = seed + (uint64_t)rounds(count);                \
             seed < seed##_end; seed++)                                                                                \
            if (asked_for(c->name) && chosen())

/* ======================================================================================================== */
/* Forward against the twins                                                                                 */

/* What the layer should put out; to be freed. */
static double *expected_output(const problem *p, bool activated) {
    double *y = (double *)calloc((size_t)(p->layer->out.rows * p->layer->out.width + 1), sizeof *y);
    p->c->twin(p, y);
    if (activated) twin_act(p, y);
    return y;
}

static void check_forward(problem *p, pd_mode mode) {
    int64_t rows = 0, width = 0, numbers;
    const pd_real *actual;
    double *expected;
    forward(p, mode);
    actual = pd_output(p->layer, &rows, &width);
    if (!actual) FAIL_AT(p, "%s", pd_error(p->net));
    assert_int_equal(width, pd_shape_size(p->shape));
    expected = expected_output(p, true);
    numbers = rows * width;
    for (int64_t i = 0; i < numbers; i++)
        if (!(fabs((double)actual[i] - expected[i]) <= REAL_TOLERANCE * (1 + fabs(expected[i]))))
            FAIL_AT(p, "output %lld of %lld, shape %s, act %d, mode %d: got %.17g, expected %.17g", (long long)i,
                    (long long)numbers, pd_shape_text(p->layer, p->shape), (int)p->act, (int)mode, (double)actual[i],
                    expected[i]);
    free(expected);
}

/* Row-wise layers have the rows and the offsets of their input; blocks of an image are a sequence. */
static void check_rows(const problem *p) {
    const pd_tensor *out = &p->layer->out;
    bool expands = p->c->build == build_block_expand;
    pd_shape grid = expands ? window_shape(&p->g, p->inputs[0]->shape, 1, false) : shape(1, 1, 1);
    int64_t blocks = grid.height * grid.width;
    assert_int_equal(out->rows, p->rows * blocks);
    assert_int_equal(out->sequences, expands || p->sequence ? p->batch->samples : 0);
    assert_true(p->layer->is_sequence == (expands || p->sequence));
    for (int64_t s = 0; s <= out->sequences && out->sequences; s++)
        assert_int_equal(out->starts[s], expands ? s * blocks : p->batch->slots[0].starts[s]);
}

static void test_forward(void **state) {
    (void)state;
    FOR_CASES(c, seed, 120) {
        problem p = make_problem(c, seed);
        check_forward(&p, PD_CHECK);
        check_rows(&p);
        check_forward(&p, PD_PREDICT);
        assert_null(p.layer->out.grad);
        free_problem(&p);
    }
}

/* C = alpha op(A) op(B) + beta C with random numbers; rows are longer than they need to be. kind: NN, NT, TN. */
static void check_product(pd_device *d, int kind, int64_t m, int64_t n, int64_t k) {
    bool ta = kind == 2, tb = kind == 1;
    int64_t lda = (ta ? m : k) + below(3), ldb = (tb ? k : n) + below(3), ldc = n + below(3);
    int64_t a_size = (ta ? k : m) * lda, b_size = (tb ? n : k) * ldb;
    pd_real alpha = (pd_real)uniform(-2, 2), beta = below(2) ? 0 : (pd_real)1.5;
    pd_real *a = (pd_real *)malloc((size_t)(a_size + b_size + m * ldc + 1) * sizeof *a);
    pd_real *b = a + a_size, *c = b + b_size;
    double *expected = (double *)calloc((size_t)(m * ldc + 1), sizeof *expected);
    for (int64_t i = 0; i < a_size + b_size; i++) a[i] = (pd_real)uniform(-1, 1);
    for (int64_t i = 0; i < m * ldc; i++) {
        c[i] = beta != 0 || i % ldc >= n ? (pd_real)uniform(-1, 1) : (pd_real)NAN; /* beta 0: not read */
        expected[i] = i % ldc >= n ? (double)c[i] : beta != 0 ? (double)beta * (double)c[i] : 0;
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++)
                expected[i * ldc + j] += (double)alpha * (double)a[ta ? p * lda + i : i * lda + p] *
                                         (double)b[tb ? j * ldb + p : p * ldb + j];
    d->gemm(d, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, NULL);
    for (int64_t i = 0; i < m * ldc; i++)
        if (!(fabs((double)c[i] - expected[i]) <= REAL_TOLERANCE * sqrt((double)k + 1)))
            fail_msg("%lld x %lld x %lld, kind %d: C[%lld][%lld] is %.9g, expected %.9g", (long long)m, (long long)n,
                     (long long)k, kind, (long long)(i / ldc), (long long)(i % ldc), (double)c[i], expected[i]);
    free(expected);
    free(a);
}

/* At and around the sizes of the kernels' blocks. */
static void test_matrix_product(void **state) {
    static const int64_t sizes[] = { 0,  1,  2,  3,  4,  5,   7,   8,   9,   15,  16, 17,
                                     31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 513 };
    (void)state;
    random_seed(11);
    for (int round = 0; round < rounds(200); round++) {
        int64_t m = sizes[below(COUNT(sizes))], n = sizes[below(COUNT(sizes))];
        int64_t k = sizes[below(COUNT(sizes))];
        pd_net *net = pd_net_new(&(pd_net_opts){ .threads = 1 + (int)below(4) });
        if (m * n * k < 2000000) check_product(cpu_of(net), (int)below(3), m, n, k);
        pd_net_free(net);
    }
}

/* ======================================================================================================== */
/* Gradients                                                                                                 */

static void check_gradients(const problem *p, pd_layer *layer) {
    pd_gradcheck_opts o = { .seed = p->seed, .elements = p->large ? 1 : 20 };
    double allowed = IS_DOUBLE ? (p->large ? 1e-5 : 1e-6) : p->rough ? HUGE_VAL : 1e-2;
    pd_gradcheck r;
    if (pd_check_gradients(layer, p->batch, &o, &r) != PD_OK) FAIL_AT(p, "%s", pd_error(p->net));
    if (!(r.error < allowed)) { /* where the third derivative is large; a wrong gradient is wrong with any step */
        o.step = IS_DOUBLE ? 1e-5 / 4 : 1e-2 / 4;
        if (pd_check_gradients(layer, p->batch, &o, &r) != PD_OK) FAIL_AT(p, "%s", pd_error(p->net));
    }
    if (!(r.error < allowed))
        FAIL_AT(p, "gradient of %s[%lld]: got %.10g, expected %.10g, error %g; act %d", r.worst,
                (long long)r.worst_index, r.analytic, r.numeric, r.error, (int)p->act);
    if (!(r.accumulation < (IS_DOUBLE ? 1e-12 : 1e-5)))
        FAIL_AT(p, "does not add to gradients: off by %g", r.accumulation);
    if (r.all_zero && !p->vanishes) FAIL_AT(p, "%s", "all gradients are 0");
    if (r.checked == 0) FAIL_AT(p, "%s", "nothing was checked");
    for (pd_param *q = pd_param_first(p->net); q; q = q->next)
        if (q->opts.is_static && q->grad) FAIL_AT(p, "static \"%s\" has a gradient", q->name);
}

/* ---- backward by windows of rows: what a call works on stands in the tensors and in memory per row ---- */

static void move_tensor(pd_tensor *t, int64_t rows) {
    if (t->data) t->data += rows * t->width;
    if (t->grad) t->grad += rows * t->width;
}

/* All of the layer begins so many rows further on. */
static void move_layer(problem *p, int64_t rows) {
    move_tensor(&p->layer->out, rows);
    for (int k = 0; k < p->input_count; k++) move_tensor(&p->inputs[k]->out, rows);
    inside_move_memory(p->layer, rows);
}

static void set_rows(problem *p, int64_t rows) {
    p->layer->out.rows = rows;
    for (int k = 0; k < p->input_count; k++) p->inputs[k]->out.rows = rows;
}

/* Adds up gradients in windows of 0 to 2 rows, from the last one down. */
static void backward_by_windows(problem *p) {
    int64_t all = p->layer->out.rows;
    for (int64_t end = all; end > 0;) {
        int64_t rows = smaller(below(3), end), first = end - rows;
        move_layer(p, first);
        set_rows(p, rows);
        assert_int_equal(inside_backward(p->layer), PD_OK);
        set_rows(p, all);
        move_layer(p, -first);
        end = first;
    }
}

/* The gradients of all parameters and inputs, one after the other; to be freed. */
static double *all_gradients(const problem *p, int64_t *count) {
    double *all;
    *count = 0;
    for (pd_param *q = pd_param_first(p->net); q; q = q->next) *count += q->grad ? q->size : 0;
    for (int k = 0; k < p->input_count; k++)
        *count += p->inputs[k]->out.grad ? p->inputs[k]->out.rows * p->inputs[k]->out.width : 0;
    all = (double *)calloc((size_t)(*count + 1), sizeof *all);
    *count = 0;
    for (pd_param *q = pd_param_first(p->net); q; q = q->next)
        for (int64_t i = 0; q->grad && i < q->size; i++) all[(*count)++] = (double)q->grad[i];
    for (int k = 0; k < p->input_count; k++)
        for (int64_t i = 0; p->inputs[k]->out.grad && i < p->inputs[k]->out.rows * p->inputs[k]->out.width; i++)
            all[(*count)++] = (double)p->inputs[k]->out.grad[i];
    return all;
}

static void test_backward_by_windows(void **state) {
    (void)state;
    FOR_CASES(c, seed, 40) {
        /* Not by rows: the statistics of a batch; rows that are a picture's blocks; numbers drawn by their place. */
        if (c->build == build_batch_norm || c->build == build_block_expand || c->build == build_dropout) continue;
        problem p = make_problem(c, seed);
        double *whole, *windows;
        int64_t count, again;
        for (int by_windows = 0; by_windows < 2; by_windows++) {
            assert_int_equal(pd_zero_grads(p.net), PD_OK);
            forward(&p, PD_CHECK);
            for (int64_t i = 0; i < p.layer->out.rows * p.layer->out.width; i++) p.layer->out.grad[i] = weight_of(i);
            if (by_windows) backward_by_windows(&p);
            else assert_int_equal(inside_backward(p.layer), PD_OK);
            *(by_windows ? &windows : &whole) = all_gradients(&p, by_windows ? &again : &count);
        }
        assert_int_equal(count, again);
        for (int64_t i = 0; i < count; i++)
            if (!(fabs(whole[i] - windows[i]) <= 30 * REAL_TOLERANCE * (1 + fabs(whole[i]))))
                FAIL_AT(&p, "gradient %lld: %.9g, but %.9g by windows", (long long)i, whole[i], windows[i]);
        free(whole);
        free(windows);
        free_problem(&p);
    }
}

static void test_gradients(void **state) {
    (void)state;
    FOR_CASES(c, seed, 60) {
        problem p = make_problem(c, seed);
        check_gradients(&p, p.layer);
        free_problem(&p);
    }
}

/* Sums longer than the kernels' blocks, and several threads. */
static void test_large(void **state) {
    (void)state;
    FOR_CASES(c, seed, 1) {
        problem p = wish(c, 60000 + seed);
        p.large = p.rough = true;
        make(&p);
        check_forward(&p, PD_CHECK);
        check_gradients(&p, p.layer);
        free_problem(&p);
    }
}

/* Two layers read the one under test, and one of them reads the other; another layer of its kind has the same inputs. */
static void test_gradients_of_a_layer_used_twice(void **state) {
    (void)state;
    FOR_CASES(c, seed, 12) {
        problem p = make_problem(c, seed);
        pd_layer *parts[3] = { p.layer, pd_fc(p.net, p.layer, 2, &(pd_fc_opts){ .act = PD_TANH }) }, *head;
        parts[2] = pd_layer_add(p.net, p.layer->type, NULL, p.inputs, p.input_count, p.layer->opts);
        head = pd_fc_sum(p.net, parts, 3, 3, &(pd_fc_opts){ .act = PD_STANH });
        if (!head) FAIL_AT(&p, "%s", pd_error(p.net));
        fill_params(&p);
        p.rough = true;
        check_gradients(&p, head);
        free_problem(&p);
    }
}

/* ---- every activation, alone and within fc and conv ---- */

static bool needs_positive(pd_act act) { return act == PD_LOG || act == PD_SQRT || act == PD_RECIPROCAL; }

/* No input of the activation is near a kink or a pole, and one is where the slope isn't 0. */
static bool is_smooth_here(const problem *p) {
    double *x = expected_output(p, false), bound = p->alpha != 0 ? p->alpha : 24;
    bool clear = true, alive = false;
    for (int64_t i = 0; i < p->layer->out.rows * p->layer->out.width; i++) {
        switch (p->act) {
        case PD_BRELU:
            if (fabs(x[i] - bound) < 0.1 * p->spread) clear = false; /* fall through */
        case PD_RELU:
        case PD_LEAKY_RELU:
        case PD_ABS:
            if (fabs(x[i]) < 0.1 * p->spread) clear = false;
            break;
        default:
            if (needs_positive(p->act) && x[i] < 0.3) clear = false;
        }
        if (x[i] > 0 && !(p->act == PD_BRELU && x[i] > bound)) alive = true;
    }
    free(x);
    return clear && alive;
}

/* A problem of this activation away from kinks: the first of many seeds that gives one. */
static problem make_act_problem(const layer_case *c, pd_act act, uint64_t seed) {
    for (uint64_t attempt = 0; attempt < 4000; attempt++) {
        problem p = wish(c, 1000000 * seed + attempt);
        p.act = act;
        p.limit = 2;
        p.positive = needs_positive(act);
        if (act == PD_BRELU && c->build != build_activation) p.spread = 20;
        if (act == PD_EXP) p.spread = 0.5;
        make(&p);
        forward(&p, PD_CHECK);
        if (is_smooth_here(&p)) return p;
        free_problem(&p);
    }
    fail_msg("%s: no seed gives a problem away from the kinks of activation %d", c->name, (int)act);
    return wish(c, seed);
}

static const layer_case *find_case(const char *name) {
    const layer_case *c = cases;
    while (strcmp(c->name, name) != 0) c++;
    return c;
}

static void test_activations(void **state) {
    static const char *const names[] = { "activation", "fc", "conv" };
    (void)state;
    for (int act = 0; act < PD_ACT_COUNT; act++)
        for (int k = 0; k < COUNT(names); k++)
            for (uint64_t seed = 0; seed < 12; seed++) {
                problem p = make_act_problem(find_case(names[k]), (pd_act)act, (uint64_t)(act * 40 + k * 13) + seed);
                check_forward(&p, PD_CHECK);
                check_forward(&p, PD_PREDICT);
                check_gradients(&p, p.layer);
                free_problem(&p);
            }
}

/* What far from 0 overflows in the textbook's formulas stays finite, and what isn't a number stays so. */
static void test_activations_far_out(void **state) {
    static const pd_act acts[] = {
        PD_RELU, PD_BRELU, PD_SOFTRELU, PD_LEAKY_RELU, PD_GELU, PD_SIGMOID, PD_TANH, PD_STANH
    };
    static const double low[] = { 0, 0, 0, -1e4 * 0.01, 0, 0, -1, -1.7159 };
    static const double high[] = { 1e4, 24, 1e4, 1e4, 1e4, 1, 1, 1.7159 };
    (void)state;
    for (int k = 0; k < COUNT(acts); k++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 3), *y = pd_activation(net, x, acts[k], NULL);
        pd_real in[3] = { (pd_real)-1e4, (pd_real)1e4, (pd_real)NAN }, inf[3] = { (pd_real)-HUGE_VAL, 0, 0 };
        const pd_real *out = pd_predict(y, in, 1);
        check_near((double)out[0], low[k], REAL_TOLERANCE, "at -1e4");
        check_near((double)out[1], high[k], REAL_TOLERANCE, "at 1e4");
        assert_true(out[2] != out[2]);
        out = pd_predict(y, inf, 1);
        if (low[k] == 0) assert_true(out[0] == 0);
        pd_net_free(net);
    }
}

static void test_softmax_far_out(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *y = pd_activation(net, pd_vector(net, "x", 3), PD_SOFTMAX, NULL);
    pd_real in[6] = { (pd_real)-1e4, (pd_real)1e4, (pd_real)1e4, (pd_real)-1e4, (pd_real)-1e4, (pd_real)-1e4 };
    const pd_real *out = pd_predict(y, in, 2);
    const double expected[6] = { 0, 0.5, 0.5, 1. / 3, 1. / 3, 1. / 3 };
    (void)state;
    for (int i = 0; i < 6; i++) check_near((double)out[i], expected[i], REAL_TOLERANCE, "softmax");
    pd_net_free(net);
}

/* ---- where a formula cancels ---- */

/* At w = 1 and 0 the ends themselves, however far apart; and the slope by w of what lies close together. */
/* Memory of a layer's own: per row, for doubles and integers, and what is wrong with asking. */

typedef struct asking {
    int what;
} asking;

static pd_status asking_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    return PD_OK;
}

static pd_status asking_forward(pd_layer *l) {
    pd_real *a, *b;
    double *sums;
    int64_t rows = l->out.rows;
    switch (((const asking *)l->opts)->what) {
    case 0:
        a = pd_layer_row_memory(l, 0, 3), b = pd_layer_memory(l, 7, 5), sums = pd_layer_doubles(l, 3, 2 * rows);
        if (!a || !b || !sums) return PD_E_MEMORY;
        for (int64_t i = 0; i < 3 * rows; i++) a[i] = (pd_real)i;
        for (int64_t i = 0; i < 5; i++) b[i] = -1;
        for (int64_t i = 0; i < 2 * rows; i++) sums[i] = 1 + 1e-15;
        assert_true(sums != pd_layer_doubles(l, 0, 1));
        assert_true(a == pd_layer_row_memory(l, 0, 3) && sums == pd_layer_doubles(l, 3, 1) && sums[0] > 1);
        return PD_OK;
    case 1: return pd_layer_row_memory(l, 0, 3) && pd_layer_row_memory(l, 0, 2) ? PD_OK : PD_E_ARGUMENT;
    case 2: return pd_layer_row_memory(l, 0, 3) && pd_layer_memory(l, 0, 3) ? PD_OK : PD_E_ARGUMENT;
    case 3: return pd_layer_memory(l, 8, 3) ? PD_OK : PD_E_ARGUMENT;
    case 4: return pd_layer_row_memory(l, 0, INT64_MAX / 2) ? PD_OK : PD_E_MEMORY;
    case 5: return pd_layer_row_memory(l, 0, 0) ? PD_OK : PD_E_ARGUMENT;
    default: return pd_layer_doubles(l, 4, 1) ? PD_OK : PD_E_ARGUMENT;
    }
}

static void test_memory_of_a_layer(void **state) {
    static const pd_layer_type type = { PD_API_VERSION, "asking", 1,    1,    sizeof(asking), 0, 0, asking_setup, NULL,
                                        asking_forward, NULL,     NULL, NULL, NULL,           -1 };
    static const char *const texts[] = { "",
                                         "asking1: memory slot 0 is in use for 3 numbers per row",
                                         "asking1: memory slot 0 is in use for 3 numbers per row",
                                         "asking1: memory slot 8 is not one of 0 .. 7",
                                         "asking1: out of memory for 4 rows of 4611686018427387903 numbers",
                                         "asking1: memory for 0 numbers per row",
                                         "asking1: memory slot 4 is not one of 0 .. 3" };
    static const pd_real numbers[4] = { 1, 2, 3, 4 };
    (void)state;
    for (int k = 0; k < COUNT(texts); k++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 1), *y = pd_layer_add(net, &type, NULL, &x, 1, &(asking){ k });
        pd_batch *batch = batch_of(net, 4, numbers), *more = batch_of(net, 4, numbers);
        pd_status status = pd_forward(net, batch, PD_TRAIN, &y, 1);
        assert_true((status == PD_OK) == (k == 0));
        check_contains(pd_error(net), texts[k]);
        if (k == 0) {
            size_t bytes = pd_net_bytes(net);
            for (int i = 0; i < 4; i++) assert_int_equal(pd_batch_copy_sample(more, batch, i), PD_OK);
            assert_int_equal(pd_forward(net, more, PD_TRAIN, &y, 1), PD_OK);
            assert_int_equal(pd_net_bytes(net) - bytes, 4 * (3 + 1) * sizeof(pd_real) + 4 * 2 * sizeof(double));
        }
        pd_batch_free(batch);
        pd_batch_free(more);
        pd_net_free(net);
    }
}

static void test_interpolated_ends(void **state) {
    const double far = sizeof(pd_real) == 8 ? 3e16 : 3e7, largest = sizeof(pd_real) == 8 ? 1.7e308 : 3.4e38;
    const double cases[][3] = { { 1, 1, far },      { 1, 0.1, 1000 },   { 1, 1, largest },
                                { 0, 1, far },      { 0, largest, 1 },  { 1, largest, -largest },
                                { 0, 0.1, 1000 },   { 0.5, far, far },  { 0.5, largest, largest },
                                { 0.25, far, far }, { 1, far + 4, far } };
    (void)state;
    for (int each = 0; each < 2;
         each++) { /* all of them as rows, then in one row, each number with a weight of its own */
        int64_t width = each ? COUNT(cases) : 1;
        pd_net *net = pd_net_new(NULL);
        pd_layer *w = pd_vector(net, "w", width), *a = pd_vector(net, "a", width), *b = pd_vector(net, "b", width), *y;
        pd_batch *batch = pd_batch_new(net);
        pd_want_gradient(w);
        y = pd_interpolate(net, w, a, b, NULL);
        for (int64_t i = 0; i < COUNT(cases); i += width) {
            for (int k = 0; k < 3; k++) {
                pd_real *row = pd_batch_add_row(batch, k);
                for (int64_t j = 0; j < width; j++) row[j] = (pd_real)cases[i + j][k];
            }
            assert_int_equal(pd_batch_end_sample(batch), PD_OK);
        }
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &y, 1), PD_OK);
        assert_int_equal(y->out.rows * y->out.width, COUNT(cases));
        assert_int_equal(pd_backward(net, y), PD_OK);
        for (int i = 0; i < COUNT(cases); i++) {
            assert_true(y->out.data[i] == (pd_real)(cases[i][0] >= 0.5 ? cases[i][1] : cases[i][2]));
            assert_true(w->out.grad[i] == (pd_real)cases[i][1] - (pd_real)cases[i][2]);
        }
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* Batch and layer norm of numbers that are 10^4 deviations from 0, against double; the prediction too, by the layer and
   folded into the one below. */
static void test_norms_far_from_0(void **state) {
    enum { ROWS = 64 };
    const double far = 1e4, tolerance = sizeof(pd_real) == 8 ? 1e-10 : 2e-5;
    (void)state;
    random_seed(5);
    for (int k = 0; k < 2; k++) { /* batch norm, and layer norm of the transpose */
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", k ? ROWS : 1), *g, *y, *product;
        pd_batch *batch = NULL;
        double mean = 0, squares = 0, sum = 0, dot = 0, deviation;
        pd_want_gradient(x);
        g = pd_vector(net, "g", k ? ROWS : 1);
        y = k ? pd_layer_norm(net, x, &(pd_layer_norm_opts){ .name = "n" })
              : pd_batch_norm(net, x, &(pd_batch_norm_opts){ .name = "n" });
        product = pd_multiply(net, y, g, NULL); /* so that gradients differ */
        batch = pd_batch_new(net);
        for (int r = 0; r < (k ? 1 : ROWS); r++) {
            pd_real *row = pd_batch_add_row(batch, 0), *weights = pd_batch_add_row(batch, 1);
            for (int i = 0; i < (k ? ROWS : 1); i++)
                row[i] = (pd_real)(far + uniform(-1.7, 1.7)), weights[i] = (pd_real)uniform(-1, 1);
            pd_batch_end_sample(batch);
        }
        for (int i = 0; i < ROWS; i++) mean += ((double)batch->slots[0].data[i] - far) / ROWS;
        mean += far;
        for (int i = 0; i < ROWS; i++) squares += pow((double)batch->slots[0].data[i] - mean, 2) / ROWS;
        deviation = sqrt(squares + 1e-5);
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &product, 1), PD_OK);
        for (int i = 0; i < ROWS; i++) {
            double xhat = ((double)batch->slots[0].data[i] - mean) / deviation, dy = (double)batch->slots[1].data[i];
            check_near((double)y->out.data[i], xhat, tolerance, "normalised");
            sum += dy / ROWS, dot += dy * xhat / ROWS;
        }
        assert_int_equal(pd_backward(net, product), PD_OK);
        for (int i = 0; i < ROWS; i++) {
            double xhat = ((double)batch->slots[0].data[i] - mean) / deviation, dy = (double)batch->slots[1].data[i];
            check_near((double)x->out.grad[i], (dy - sum - xhat * dot) / deviation, tolerance, "gradient");
        }
        if (k == 0)
            check_near((double)pd_param_find(net, "n.weight")->grad[0], dot * ROWS, ROWS * tolerance, "d weight");
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

static void test_fold_far_from_0(void **state) {
    const double far = 1e4;
    (void)state;
    for (int k = 0; k < 4; k++) {
        pd_net *net = pd_net_new(NULL);
        pd_act act = k / 2 ? PD_LEAKY_RELU : PD_LINEAR;
        pd_layer *x = pd_image(net, "x", 1, 1, 1), *low, *y;
        const pd_real mean = (pd_real)(far + 0.5), one = 1, bias = (pd_real)0.25, three = 3, shift = (pd_real)0.125;
        pd_real in[8];
        const pd_real *out;
        low = k % 2 ? pd_conv(net, x, 1, 1, &(pd_conv_opts){ .name = "low" })
                    : pd_fc(net, x, 1, &(pd_fc_opts){ .name = "low" });
        y = pd_batch_norm(net, low, &(pd_batch_norm_opts){ .name = "n", .act = act });
        pd_param_set(pd_param_find(net, "low.weight"), &one, 1), pd_param_set(pd_param_find(net, "low.bias"), &bias, 1);
        pd_param_set(pd_param_find(net, "n.running_mean"), &mean, 1);
        pd_param_set(pd_param_find(net, "n.weight"), &three, 1), pd_param_set(pd_param_find(net, "n.bias"), &shift, 1);
        for (int i = 0; i < 8; i++) in[i] = (pd_real)(far + i * 0.5);
        out = pd_predict(y, in, 8);
        assert_non_null(out);
        assert_true(inside_is_folded(low));
        for (int i = 0; i < 8; i++) {
            double want = ((double)in[i] + 0.25 - (double)mean) * 3 / sqrt(1 + 1e-5) + 0.125;
            check_near((double)out[i], want < 0 && k / 2 ? 0.01 * want : want, REAL_TOLERANCE / 10, "folded");
        }
        pd_net_free(net);
    }
}

/* Vectors whose squares are beyond the range: the angle between them is not. */
static void test_cosine_far_out(void **state) {
    static const double sizes[] = { 1, 1e30, 1e-30, 1e160, 1e-160, 1e300, 1e-300 };
    (void)state;
    for (int i = 0; i < (sizeof(pd_real) == 8 ? 7 : 3); i++)
        for (int k = 0; k < (sizeof(pd_real) == 8 ? 7 : 3); k++) {
            pd_net *net = pd_net_new(NULL);
            pd_layer *a = pd_vector(net, "a", 2), *b = pd_vector(net, "b", 2), *y;
            pd_batch *batch;
            pd_want_gradient(a);
            y = pd_cosine(net, a, b, 1, NULL);
            batch = pd_batch_new(net);
            for (int slot = 0; slot < 2; slot++) {
                pd_real *row = pd_batch_add_row(batch, slot);
                double size = sizes[slot ? k : i];
                row[0] = (pd_real)(3 * size), row[1] = (pd_real)((slot ? -4 : 4) * size);
            }
            pd_batch_end_sample(batch);
            assert_int_equal(pd_forward(net, batch, PD_CHECK, &y, 1), PD_OK);
            check_near((double)y->out.data[0], -7. / 25, REAL_TOLERANCE, "cosine");
            assert_int_equal(pd_backward(net, y), PD_OK);
            check_near((double)a->out.grad[0] * sizes[i], (3 + 7. / 25 * 3) / 25, REAL_TOLERANCE, "gradient");
            pd_batch_free(batch);
            pd_net_free(net);
        }
}

/* exp, log, root and reciprocal where a slope is infinite and nothing comes back: 0, not NaN. */
static void test_infinite_slopes(void **state) {
    static const pd_act chains[][3] = { { PD_SQUARE, PD_SQRT, PD_LINEAR },    /* |x|, at 0 */
                                        { PD_EXP, PD_RECIPROCAL, PD_LINEAR }, /* e^-x, where e^x overflows */
                                        { PD_LOG, PD_EXP, PD_LINEAR },        /* x, at 0 */
                                        { PD_RECIPROCAL, PD_RECIPROCAL, PD_LINEAR },
                                        { PD_EXP, PD_SQUARE, PD_RECIPROCAL },
                                        { PD_SQRT, PD_SQUARE, PD_LINEAR } };
    (void)state;
    for (int i = 0; i < COUNT(chains); i++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 1), *y = x;
        pd_batch *batch;
        pd_want_gradient(x);
        for (int k = 0; k < 3; k++) y = pd_activation(net, y, chains[i][k], NULL);
        batch = batch_of(net, 1, (const pd_real[]){ chains[i][0] == PD_EXP ? 1000 : 0 });
        assert_int_equal(pd_forward(net, batch, PD_CHECK, &y, 1), PD_OK);
        assert_true(y->out.data[0] == 0);
        assert_int_equal(pd_backward(net, y), PD_OK);
        if (x->out.grad[0] != 0) fail_msg("chain %d: %g", i, (double)x->out.grad[0]);
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* A maximum that isn't a number came from the first such cell, and there its gradient goes. */
static void test_maximum_of_nan(void **state) {
    const pd_real nan_value = (pd_real)NAN;
    const pd_real in[3][4] = { { 1, nan_value, 5, nan_value }, { nan_value, 1, 2, 3 }, { 1, 2, 3, nan_value } };
    (void)state;
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 3; k++) {
            pd_net *net = pd_net_new(NULL);
            pd_layer *x = k == 1 ? pd_image(net, "x", 4, 1, 1) : pd_image(net, "x", 1, 2, 2), *y;
            pd_batch *batch;
            pd_want_gradient(x);
            y = k == 0   ? pd_pool(net, x, 2, NULL)
                : k == 1 ? pd_maxout(net, x, 4, NULL)
                         : pd_pool(net, x, 2, &(pd_pool_opts){ .act = PD_TANH });
            batch = batch_of(net, 1, in[i]);
            assert_int_equal(pd_forward(net, batch, PD_CHECK, &y, 1), PD_OK);
            assert_true(y->out.data[0] != y->out.data[0]);
            assert_int_equal(pd_backward(net, y), PD_OK);
            for (int c = 0; c < 4; c++) {
                bool here = c == (i == 0 ? 1 : i == 1 ? 0 : 3);
                if (k == 2 && here) assert_true(x->out.grad[c] != x->out.grad[c]); /* tanh has made it NaN */
                else assert_true(x->out.grad[c] == here);
            }
            pd_batch_free(batch);
            pd_net_free(net);
        }
}

/* ---- ties, zeros ---- */

/* A maximum's gradient goes to its first occurrence; vectors of length 0 have cosine 0 and no gradient. */
static void test_ties_and_zeros(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_image(net, "x", 4, 1, 2), *pool, *maxout, *cosine, *outputs[3], *zero;
    pd_batch *batch;
    (void)state;
    pd_want_gradient(x);
    zero = pd_affine(net, x, 0, 0, NULL);
    pool = pd_pool(net, x, 2, &(pd_pool_opts){ .size_h = 1, .act = PD_SQUARE });
    maxout = pd_maxout(net, x, 4, NULL);
    cosine = pd_cosine(net, x, zero, 3, NULL);
    outputs[0] = pd_reshape(net, pool, shape(4, 1, 1), NULL);
    outputs[1] = pd_reshape(net, maxout, shape(2, 1, 1), NULL);
    outputs[2] = cosine;
    pool = pd_concat(net, outputs, 3, NULL);
    batch = batch_of(net, 1, (const pd_real[]){ 2, 2, 2, 2, 2, 2, 2, 2 });
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &pool, 1), PD_OK);
    assert_int_equal(pd_backward(net, pool), PD_OK);
    for (int i = 0; i < 7; i++) assert_true(pool->out.data[i] == (i < 4 ? 4 : i < 6 ? 2 : 0));
    for (int i = 0; i < 8; i++) assert_true(x->out.grad[i] == (i % 2 ? 0 : 4) + (i < 2 ? 1 : 0));
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ---- shared and static parameters ---- */

/* fc, conv, prelu and norms whose parameters have one name; a norm whose scale and shift are one parameter. */
static void test_shared_parameters(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        static const layer_case none = { "shared parameters", NULL, NULL, NORM_SPREAD };
        problem p = wish(&none, 700000 + seed);
        pd_param_opts w = { .name = "w" }, f = { .name = "filter" }, s = { .name = "slope" }, n = { .name = "both" };
        int64_t c = 1 + below(3), side = 1 + below(3);
        pd_layer *x, *y, *two[2];
        p.net = pd_net_new(NULL);
        x = image(&p, shape(c, side, side));
        y = pd_conv(p.net, x, c, 3, &(pd_conv_opts){ .pad = 1, .act = PD_TANH, .weight = f });
        y = pd_conv(p.net, y, c, 3, &(pd_conv_opts){ .pad = 1, .act = PD_TANH, .weight = f });
        y = pd_batch_norm(p.net, y, &(pd_batch_norm_opts){ .epsilon = 0.1, .weight = n, .bias = n });
        y = pd_layer_norm(p.net, y, &(pd_layer_norm_opts){ .epsilon = 0.1, .weight = { .name = "ln" } });
        y = pd_layer_norm(p.net, y,
                          &(pd_layer_norm_opts){ .epsilon = 0.1, .bias = { .name = "ln" }, .act = PD_SIGMOID });
        two[0] = pd_fc(p.net, y, c * side * side, &(pd_fc_opts){ .act = PD_TANH, .weight = w });
        two[1] = pd_fc(p.net, two[0], c * side * side, &(pd_fc_opts){ .act = PD_SOFTRELU, .weight = w });
        two[0] = pd_prelu(p.net, two[1], &(pd_prelu_opts){ .weight = s });
        two[1] = pd_prelu(p.net, x, &(pd_prelu_opts){ .weight = { .name = "slope2" } });
        two[1] = pd_reshape(p.net, two[1], two[0]->shape, NULL);
        p.layer = pd_add(p.net, two, 2, NULL);
        if (!p.layer) FAIL_AT(&p, "%s", pd_error(p.net));
        assert_int_equal(params_of(p.net), 14); /* filter, 2 biases; both, 2 running; ln, 2; w, 2 biases; 2 slopes */
        fill_params(&p);
        p.batch = pd_batch_new(p.net);
        fill_batch(&p, 3);
        p.rough = true;
        check_gradients(&p, p.layer);
        free_problem(&p);
    }
}

/* A parameter used in three places has three times the gradient of one used once. */
static void test_shared_gradient_is_a_sum(void **state) {
    pd_real grads[2];
    (void)state;
    for (int k = 0; k < 2; k++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 1), *y[3];
        pd_batch *batch = batch_of(net, 1, (const pd_real[]){ 2 });
        pd_fc_opts o = { .no_bias = true, .weight = { .name = "w" } };
        for (int i = 0; i < 3; i++) y[i] = pd_fc(net, x, 1, &o);
        y[0] = pd_add(net, y, k ? 3 : 1, NULL);
        assert_int_equal(pd_forward(net, batch, PD_TRAIN, y, 1), PD_OK);
        assert_int_equal(pd_backward(net, y[0]), PD_OK);
        assert_int_equal(pd_param_get_grad(pd_param_find(net, "w"), &grads[k], 1), PD_OK);
        pd_batch_free(batch);
        pd_net_free(net);
    }
    assert_true(grads[0] == 2 && grads[1] == 6);
}

/* A name given to the weight of several inputs is the first one's. */
static void test_names_of_several_weights(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x[2] = { pd_vector(net, "x", 2), pd_vector(net, "y", 2) };
    (void)state;
    assert_non_null(
        pd_fc_sum(net, x, 2, 3, &(pd_fc_opts){ .name = "sum", .weight = { .name = "mine" }, .bias = { .name = "b" } }));
    assert_int_equal(params_of(net), 3);
    assert_true(pd_param_find(net, "mine") && pd_param_find(net, "sum.weight1") && pd_param_find(net, "b"));
    pd_net_free(net);
}

/* ---- does the checker catch what is wrong? A layer y = 3 x with a fault in its backward ---- */

typedef enum fault { NONE, ZERO, FACTOR, OVERWRITES, NOT_A_NUMBER, ONE_ELEMENT, FAULTS } fault;

static pd_status faulty_setup(pd_layer *l) {
    int64_t width = l->inputs[0]->out.width;
    l->shape = l->inputs[0]->shape;
    return pd_layer_param(l, "weight", 1, &width, 1, 1, pd_constant(1), NULL) ? PD_OK : pd_error_status(l->net);
}
static pd_status faulty_forward(pd_layer *l) {
    for (int64_t i = 0; i < l->out.rows * l->out.width; i++)
        l->out.data[i] = l->params[0]->value[i % l->out.width] * l->inputs[0]->out.data[i];
    return PD_OK;
}
static pd_status faulty_backward(pd_layer *l) {
    fault kind = *(const fault *)l->opts;
    pd_real *dw = l->params[0]->grad;
    for (int64_t i = 0; i < l->out.width && kind == OVERWRITES; i++) dw[i] = 0;
    for (int64_t i = 0; i < l->out.rows * l->out.width && kind != ZERO; i++)
        dw[i % l->out.width] += (kind == FACTOR ? (pd_real)1.05 : 1) * l->out.grad[i] * l->inputs[0]->out.data[i];
    if (kind == NOT_A_NUMBER) dw[0] = (pd_real)NAN;
    if (kind == ONE_ELEMENT) dw[l->out.width - 1] = -dw[l->out.width - 1];
    return PD_OK;
}

static void test_checker_finds_faults(void **state) {
    static const pd_layer_type type = {
        PD_API_VERSION, "faulty",        1,    1,    sizeof(fault), 0, 0, faulty_setup, NULL,
        faulty_forward, faulty_backward, NULL, NULL, NULL,          -1
    };
    (void)state;
    for (fault kind = NONE; kind < FAULTS; kind++) {
        pd_net *net = pd_net_new(NULL);
        pd_layer *x = pd_vector(net, "x", 5), *y = pd_layer_add(net, &type, NULL, &x, 1, &kind);
        pd_batch *batch = batch_of(net, 1, (const pd_real[]){ 1, 2, 3, 4, 5 });
        pd_gradcheck r;
        assert_int_equal(pd_check_gradients(y, batch, NULL, &r), PD_OK);
        assert_int_equal(r.checked, kind == NOT_A_NUMBER ? 0 : 5);
        assert_true(r.all_zero == (kind == ZERO));
        if (kind == NONE) assert_true(r.error < (IS_DOUBLE ? 1e-8 : 1e-3) && r.accumulation == 0);
        if (kind == ZERO || kind == FACTOR || kind == ONE_ELEMENT) assert_true(r.error > 0.04 && r.directional > 0.04);
        if (kind == NOT_A_NUMBER) assert_true(r.error > 1e30);
        if (kind == OVERWRITES) assert_true(r.accumulation > 0.4);
        if (kind != NONE && kind != OVERWRITES) assert_string_equal(r.worst, "faulty1.weight");
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* Without a parameter only the input's gradient can be checked, if it is wanted and there are rows. */
static void test_checker_has_something_to_check(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_sequence(pd_vector(net, "x", 5)), *y = pd_activation(net, x, PD_TANH, NULL);
    pd_batch *batch = pd_batch_new(net);
    pd_gradcheck r;
    (void)state;
    assert_int_equal(pd_batch_end_sample(batch), PD_OK); /* without rows */
    for (int wanted = 0; wanted < 2; wanted++) {
        assert_int_equal(pd_check_gradients(y, batch, NULL, &r), PD_E_ARGUMENT);
        check_contains(pd_error(net), "activation1: pd_check_gradients: nothing to check");
        assert_int_equal(pd_want_gradient(x), PD_OK);
    }
    assert_non_null(pd_batch_add_row(batch, 0));
    assert_int_equal(pd_batch_end_sample(batch), PD_OK);
    assert_int_equal(pd_check_gradients(y, batch, NULL, &r), PD_OK);
    assert_int_equal(r.checked, 5);
    assert_int_equal(pd_check_gradients(y, batch, &(pd_gradcheck_opts){ .elements = PD_ZERO }, &r), PD_OK);
    assert_true(r.checked == 0 && r.directional > 0 && r.directional == r.error);
    assert_int_equal(pd_check_gradients(y, batch, &(pd_gradcheck_opts){ .elements = -1 }, &r), PD_E_ARGUMENT);
    check_contains(pd_error(net), "elements -1, expected at least 0");
    assert_int_equal(pd_check_gradients(y, batch, &(pd_gradcheck_opts){ .step = PD_ZERO }, &r), PD_E_ARGUMENT);
    check_contains(pd_error(net), "step is 0, expected above 0");
    pd_batch_free(batch);
    pd_net_free(net);
}

/* ======================================================================================================== */
/* Empty batches, threads, shared nets                                                                       */

static void run_empty(problem *p, pd_batch *empty) {
    if (pd_forward(p->net, empty, PD_PREDICT, &p->layer, 1) != PD_OK || pd_zero_grads(p->net) != PD_OK ||
        pd_forward(p->net, empty, PD_TRAIN, &p->layer, 1) != PD_OK || pd_backward(p->net, p->layer) != PD_OK)
        FAIL_AT(p, "%s", pd_error(p->net));
    assert_int_equal(p->layer->out.rows, 0);
    for (pd_param *q = pd_param_first(p->net); q; q = q->next)
        for (int64_t i = 0; q->grad && i < q->size; i++) assert_true(q->grad[i] == 0);
}

/* No samples, before and after a batch with some: nothing happens, and nothing is spoilt. */
static void test_empty_batch(void **state) {
    (void)state;
    FOR_CASES(c, seed, 12) {
        problem p = make_problem(c, seed);
        pd_batch *empty = pd_batch_new(p.net);
        run_empty(&p, empty);
        check_forward(&p, PD_PREDICT);
        run_empty(&p, empty);
        check_forward(&p, PD_PREDICT);
        check_gradients(&p, p.layer);
        pd_batch_free(empty);
        free_problem(&p);
    }
}

/* Output, statistics and all gradients of one run, appended to `to` from *count on; NULL only counts. */
static void append(pd_device *d, pd_real *to, int64_t *count, const pd_real *from, int64_t n) {
    if (to && n) d->download(d, to + *count, from, (size_t)n * sizeof *from);
    *count += n;
}

static int64_t collect(const problem *p, pd_real *to) {
    int64_t count = 0;
    pd_device *d = device_of(p);
    append(d, to, &count, p->layer->out.data, p->layer->out.rows * p->layer->out.width);
    for (pd_param *q = pd_param_first(p->net); q; q = q->next) {
        append(d, to, &count, q->value, q->size);
        if (q->grad) append(d, to, &count, q->grad, q->size);
    }
    for (int k = 0; k < p->input_count; k++)
        if (p->inputs[k]->out.grad) append(d, to, &count, p->inputs[k]->out.grad, p->rows * p->inputs[k]->out.width);
    return count;
}

/* The numbers of a large problem run with so many threads; to be freed. */
static pd_real *run_large(const layer_case *c, uint64_t seed, pd_act act, int threads, int64_t *count) {
    problem p = wish(c, seed);
    pd_real *numbers;
    int64_t n;
    p.large = true;
    p.threads = threads;
    p.act = act == PD_ACT_COUNT ? p.act : act;
    p.positive = act == PD_ACT_COUNT ? false : needs_positive(act);
    make(&p);
    train(&p);
    n = p.layer->out.rows * p.layer->out.width;
    if (n < 16384) FAIL_AT(&p, "%lld numbers are too few for threads", (long long)n);
    *count = collect(&p, NULL);
    numbers = (pd_real *)malloc((size_t)*count * sizeof *numbers);
    collect(&p, numbers);
    free_problem(&p);
    return numbers;
}

static void check_threads(const layer_case *c, uint64_t seed, pd_act act) {
    int64_t count, again;
    pd_real *one = run_large(c, seed, act, 1, &count);
    for (int threads = 2; threads <= 4; threads++) {
        pd_real *more = run_large(c, seed, act, threads, &again);
        assert_int_equal(count, again);
        for (int64_t i = 0; i < count; i++)
            if (memcmp(one + i, more + i, sizeof *one) != 0)
                fail_msg("%s (seed %llu): number %lld of %lld is %.9g with %d threads, %.9g with one", c->name,
                         (unsigned long long)seed, (long long)i, (long long)count, (double)more[i], threads,
                         (double)one[i]);
        free(more);
    }
    free(one);
}

static void test_threads(void **state) {
    (void)state;
    FOR_CASES(c, seed, 2) check_threads(c, seed, PD_ACT_COUNT);
    for (int act = 0; act < PD_ACT_COUNT; act++)
        if (chosen()) check_threads(find_case("activation"), 50000, (pd_act)act);
}

/* ---- devices without host memory ---- */

/* The numbers of a small problem run on a device; to be freed. */
static pd_real *run_on(const layer_case *c, uint64_t seed, pd_device *device, int64_t *count) {
    problem p = wish(c, seed);
    pd_real *numbers;
    int64_t n;
    p.device = device;
    make(&p);
    train(&p);
    n = p.layer->out.rows * p.layer->out.width;
    *count = collect(&p, NULL);
    numbers = (pd_real *)malloc((size_t)*count * sizeof *numbers);
    collect(&p, numbers);
    assert_memory_equal(pd_output(p.layer, NULL, NULL), numbers, (size_t)n * sizeof *numbers);
    free_problem(&p);
    return numbers;
}

static void lend_gemm(pd_device *d, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, pd_real alpha,
                      const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *c,
                      int64_t ldc, const pd_epilogue *after) {
    pd_device *cpu = (pd_device *)d->self;
    cpu->gemm(cpu, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, after);
}

/* On a device that has all operations, on one that has just what the type says it needs (with a call of another the test
   ends in a crash), and on one that has none, so that all is carried to the host; and with host memory, on one that has
   products only. The arithmetic is the CPU's in each, and so are the bits. */
static void test_other_devices(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_device lent = { .api_version = PD_API_VERSION, .name = "lent", .self = cpu_of(net), .host_memory = true };
    lent.gemm = lend_gemm;
    lent.upload = cpu_of(net)->upload; /* for this file, which calls them */
    lent.download = cpu_of(net)->download;
    (void)state;
    FOR_CASES(c, seed, 6) {
        problem p = make_problem(c, seed);
        const uint64_t needs[] = { ~(uint64_t)0, p.layer->type->needs, 0 };
        far_device far[COUNT(needs)];
        int64_t count, again;
        pd_real *cpu = run_on(c, seed, NULL, &count);
        free_problem(&p);
        for (int k = 0; k <= COUNT(needs); k++) {
            pd_real *other;
            if (k < COUNT(needs)) {
                far[k] = make_far(cpu_of(net), needs[k]);
                far[k].device.self = &far[k];
            }
            other = run_on(c, seed, k < COUNT(needs) ? &far[k].device : &lent, &again);
            assert_int_equal(count, again);
            if (memcmp(cpu, other, (size_t)count * sizeof *cpu) != 0)
                fail_msg("%s (seed %llu): other numbers on device %d", c->name, (unsigned long long)seed, k);
            free(other);
        }
        free(cpu);
    }
    pd_net_free(net);
}

/* ---- shared nets ---- */

static void test_share_predicts_the_same(void **state) {
    (void)state;
    FOR_CASES(c, seed, 6) {
        problem p = make_problem(c, seed);
        pd_net *shared = pd_net_share(p.net);
        pd_layer *twin = pd_layer_find(shared, p.layer->name);
        if (!twin) FAIL_AT(&p, "%s", pd_error(p.net));
        forward(&p, PD_PREDICT);
        assert_int_equal(pd_forward(shared, p.batch, PD_PREDICT, &twin, 1), PD_OK);
        assert_int_equal(twin->out.rows, p.layer->out.rows);
        assert_memory_equal(twin->out.data, p.layer->out.data,
                            (size_t)(twin->out.rows * twin->out.width) * sizeof(pd_real));
        assert_true(twin->is_sequence == p.layer->is_sequence && twin->out.sequences == p.layer->out.sequences);
        assert_ptr_equal(pd_param_first(shared), pd_param_first(p.net));
        pd_net_free(shared);
        free_problem(&p);
    }
}

typedef struct predictor {
    pd_layer *output;
    const pd_real *inputs, *expected; /* ROWS rows */
    int wrong;
} predictor;

enum { ROWS = 9, SIDE = 12, CLASSES = 5, ROUNDS = 40 };

static void *predict_often(void *argument) {
    predictor *p = (predictor *)argument;
    for (int i = 0; i < ROUNDS; i++) {
        int64_t first = i % ROWS;
        const pd_real *y = pd_predict(p->output, p->inputs + first * SIDE * SIDE, ROWS - first);
        size_t size = (size_t)((ROWS - first) * CLASSES) * sizeof *y;
        p->wrong += !y || memcmp(y, p->expected + first * CLASSES, size) != 0;
    }
    return NULL;
}

/* A net and two shared ones predict at once, each in its thread. */
static void test_share_in_threads(void **state) {
    pd_net *nets[3] = { pd_net_new(&(pd_net_opts){ .seed = 3, .threads = 2 }) };
    pd_layer *x = pd_image(nets[0], "x", 1, SIDE, SIDE), *y;
    pd_real inputs[ROWS * SIDE * SIDE], expected[ROWS * CLASSES];
    predictor predictors[3];
    pthread_t threads[3];
    (void)state;
    random_seed(1);
    for (int i = 0; i < ROWS * SIDE * SIDE; i++) inputs[i] = (pd_real)uniform(-1, 1);
    y = pd_conv(nets[0], x, 6, 3, &(pd_conv_opts){ .pad = 1 });
    y = pd_batch_norm(nets[0], y, &(pd_batch_norm_opts){ .act = PD_RELU });
    y = pd_response_norm(nets[0], pd_pool(nets[0], y, 2, NULL), NULL);
    y = pd_layer_norm(nets[0], pd_fc(nets[0], y, 30, &(pd_fc_opts){ .act = PD_GELU }), NULL);
    y = pd_fc(nets[0], pd_dropout(nets[0], y, 0.5, NULL), CLASSES, &(pd_fc_opts){ .name = "y", .act = PD_SOFTMAX });
    memcpy(expected, pd_predict(y, inputs, ROWS), sizeof expected);
    for (int i = 0; i < 3; i++) {
        if (i) nets[i] = pd_net_share(nets[0]);
        predictors[i] = (predictor){ pd_layer_find(nets[i], "y"), inputs, expected, 0 };
    }
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&threads[i], NULL, predict_often, &predictors[i]), 0);
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_join(threads[i], NULL), 0);
    for (int i = 0; i < 3; i++) assert_int_equal(predictors[i].wrong, 0);
    for (int i = 2; i >= 0; i--) pd_net_free(nets[i]);
}

static void test_share_misused(void **state) {
    pd_net *net = pd_net_new(NULL), *shared;
    pd_layer *x = pd_vector(net, "x", 3), *cost, *twin;
    pd_batch *batch;
    (void)state;
    assert_null(pd_net_share(NULL));
    cost = pd_sum_cost(net, pd_fc(net, x, 2, NULL), NULL);
    shared = pd_net_share(net);
    twin = pd_layer_at(shared, 2);
    assert_non_null(twin);
    batch = batch_of(shared, 1, (const pd_real[]){ 1, 2, 3 });
    assert_int_equal(pd_forward(shared, batch, PD_TRAIN, &twin, 1), PD_E_STATE);
    check_contains(pd_error(shared), "a shared net only predicts");
    assert_int_equal(pd_backward(shared, twin), PD_E_STATE);
    assert_int_equal(pd_zero_grads(shared), PD_E_STATE);
    assert_null(pd_net_share(shared));
    check_contains(pd_error(shared), "is itself shared");
    assert_int_equal(pd_forward(shared, batch, PD_PREDICT, &cost, 1), PD_E_ARGUMENT);
    check_contains(pd_error(shared), "target 0 is a layer of another net");
    assert_int_equal(pd_forward(shared, batch, PD_PREDICT, &twin, 1), PD_OK);
    assert_null(pd_trainer_new(shared, twin, pd_sgd(0.1), NULL));
    check_contains(pd_error(shared), "a shared net can't be trained");
    pd_batch_free(batch);
    pd_net_free(shared);

    shared = pd_net_share(net);
    pd_fc(net, x, 9, &(pd_fc_opts){ .no_bias = true }); /* what comes later isn't shared */
    assert_null(pd_layer_at(shared, 3));
    assert_null(pd_fc(shared, pd_layer_at(shared, 0), 4, NULL));
    check_contains(pd_error(shared), "a shared net takes no more layers");
    pd_net_free(shared);

    pd_fc(net, x, -1, NULL);
    assert_null(pd_net_share(net));
    check_contains(pd_error(net), "size is -1");
    pd_net_free(net);
}

/* ======================================================================================================== */
/* Dropout, batch norm                                                                                       */

enum { MANY = 200, WIDE = 500 };

typedef struct dropout_net {
    pd_net *net;
    pd_layer *x, *first, *second, *sum;
    pd_trainer *trainer;
    pd_batch *batch;
} dropout_net;

static dropout_net make_dropout(uint64_t seed, double rate) {
    dropout_net d;
    pd_layer *both[2];
    pd_real *numbers = (pd_real *)malloc(MANY * WIDE * sizeof *numbers);
    for (int i = 0; i < MANY * WIDE; i++) numbers[i] = 2;
    d.net = pd_net_new(&(pd_net_opts){ .seed = seed });
    d.x = pd_vector(d.net, "x", WIDE);
    pd_want_gradient(d.x);
    both[0] = d.first = pd_dropout(d.net, d.x, rate, NULL);
    both[1] = d.second = pd_dropout(d.net, d.x, rate, NULL);
    d.sum = pd_add(d.net, both, 2, NULL);
    d.trainer = pd_trainer_new(d.net, pd_fc(d.net, d.sum, 1, NULL), pd_sgd(1e-3), NULL);
    d.batch = batch_of(d.net, MANY, numbers);
    free(numbers);
    return d;
}

static void free_dropout(dropout_net *d) {
    pd_trainer_free(d->trainer);
    pd_batch_free(d->batch);
    pd_net_free(d->net);
}

/* How many of the numbers of two runs are equal; `a` stays in the caller's copy. */
static int64_t equal_numbers(const pd_real *a, const pd_real *b) {
    int64_t equal = 0;
    for (int i = 0; i < MANY * WIDE; i++) equal += a[i] == b[i];
    return equal;
}

/* The output of one layer in one mode, copied. */
static void run_dropout(dropout_net *d, pd_layer *layer, pd_mode mode, pd_real *copy) {
    assert_int_equal(pd_forward(d->net, d->batch, mode, &layer, 1), PD_OK);
    memcpy(copy, layer->out.data, MANY * WIDE * sizeof *copy);
}

static void test_dropout(void **state) {
    static pd_real masks[2][MANY * WIDE];
    const pd_real kept = (pd_real)2 * (pd_real)(1 / (1 - 0.3));
    dropout_net d = make_dropout(5, 0.3), other = make_dropout(6, 0.3), none = make_dropout(5, 0);
    int64_t zeros = 0, n = MANY * WIDE;
    (void)state;
    run_dropout(&d, d.first, PD_TRAIN, masks[0]);
    for (int i = 0; i < n; i++) {
        assert_true(masks[0][i] == 0 || masks[0][i] == kept);
        zeros += masks[0][i] == 0;
    }
    check_near((double)zeros / (double)n, 0.3, 0.01, "share of zeros");
    assert_int_equal(pd_backward(d.net, d.first), PD_OK);
    for (int i = 0; i < n; i++) assert_true(d.x->out.grad[i] == masks[0][i] / 2);

    run_dropout(&d, d.first, PD_CHECK, masks[1]);
    assert_int_equal(equal_numbers(masks[0], masks[1]), n); /* the same step, the same mask */
    run_dropout(&d, d.second, PD_TRAIN, masks[1]);
    check_near((double)equal_numbers(masks[0], masks[1]) / (double)n, 0.58, 0.01, "another layer");
    run_dropout(&other, other.first, PD_TRAIN, masks[1]);
    check_near((double)equal_numbers(masks[0], masks[1]) / (double)n, 0.58, 0.01, "another seed");
    assert_int_equal(pd_train_batch(d.trainer, d.batch, NULL), PD_OK);
    run_dropout(&d, d.first, PD_TRAIN, masks[1]);
    check_near((double)equal_numbers(masks[0], masks[1]) / (double)n, 0.58, 0.01, "the next step");

    run_dropout(&d, d.first, PD_PREDICT, masks[1]);
    assert_memory_equal(masks[1], d.batch->slots[0].data, sizeof masks[1]);
    run_dropout(&none, none.first, PD_TRAIN, masks[1]);
    assert_memory_equal(masks[1], none.batch->slots[0].data, sizeof masks[1]);
    free_dropout(&d);
    free_dropout(&other);
    free_dropout(&none);
}

static double statistic(pd_net *net, const char *name) { return (double)pd_param_find(net, name)->value[0]; }

static void check_statistics(pd_net *net, double mean, double variance) {
    check_near(statistic(net, "bn.running_mean"), mean, REAL_TOLERANCE, "running mean");
    check_near(statistic(net, "bn.running_var"), variance, REAL_TOLERANCE, "running variance");
}

static void test_batch_norm_statistics(void **state) {
    static const pd_real numbers[] = { 1, 2, 4, 9 }; /* mean 4, squares about it 38 */
    static const pd_mode modes[] = { PD_CHECK, PD_PREDICT };
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 1);
    pd_layer *y = pd_batch_norm(net, x, &(pd_batch_norm_opts){ .name = "bn", .momentum = 0.2 });
    pd_batch *batch = batch_of(net, 4, numbers), *one = batch_of(net, 1, numbers), *empty = batch_of(net, 0, numbers);
    (void)state;
    assert_true(pd_param_find(net, "bn.running_mean")->is_buffer && !pd_param_find(net, "bn.weight")->is_buffer);
    check_statistics(net, 0, 1);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pd_forward(net, batch, modes[i], &y, 1), PD_OK);
        check_statistics(net, 0, 1);
    }
    check_near((double)y->out.data[3], 9 / sqrt(1 + 1e-5), REAL_TOLERANCE, "prediction");
    assert_int_equal(pd_forward(net, batch, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 0.2 * 4, 0.8 + 0.2 * 38 / 3);
    check_near((double)y->out.data[3], 5 / sqrt(38. / 4 + 1e-5), REAL_TOLERANCE, "training");
    assert_int_equal(pd_forward(net, empty, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 0.2 * 4, 0.8 + 0.2 * 38 / 3);
    assert_int_equal(pd_forward(net, one, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 0.8 * 0.8 + 0.2, 0.8 + 0.2 * 38 / 3); /* one number has no variance */
    assert_true(y->out.data[0] == 0);
    one->slots[0].data[0] = (pd_real)NAN; /* would spoil them for ever */
    assert_int_equal(pd_forward(net, one, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 0.8 * 0.8 + 0.2, 0.8 + 0.2 * 38 / 3);
    pd_batch_free(batch);
    pd_batch_free(one);
    pd_batch_free(empty);
    pd_net_free(net);
}

/* With a momentum of 1 the statistics are those of the last batch, whatever there was before. */
static void test_batch_norm_of_the_last_batch(void **state) {
    static const pd_real numbers[] = { 1, 2, 4, 9 };
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 1);
    pd_layer *y = pd_batch_norm(net, x, &(pd_batch_norm_opts){ .name = "bn", .momentum = 1 });
    pd_batch *first = batch_of(net, 2, (const pd_real[]){ 100, 300 }), *last = batch_of(net, 4, numbers);
    (void)state;
    assert_int_equal(pd_forward(net, first, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 200, 20000);
    assert_int_equal(pd_forward(net, last, PD_TRAIN, &y, 1), PD_OK);
    check_statistics(net, 4, 38. / 3);
    pd_batch_free(first);
    pd_batch_free(last);
    pd_net_free(net);
}

/* use_running, and a momentum of 0, leave the statistics as they are; only the first uses them. */
static void test_batch_norm_frozen(void **state) {
    (void)state;
    for (int k = 0; k < 2; k++) {
        pd_net *net = pd_net_new(NULL);
        pd_batch_norm_opts o = { .name = "bn", .use_running = k == 0, .momentum = k ? PD_ZERO : 0 };
        pd_layer *x = pd_vector(net, "x", 1), *y = pd_batch_norm(net, x, &o);
        pd_batch *batch = batch_of(net, 2, (const pd_real[]){ 3, 5 });
        assert_int_equal(pd_forward(net, batch, PD_TRAIN, &y, 1), PD_OK);
        check_statistics(net, 0, 1);
        check_near((double)y->out.data[1], k ? 1 : 5, 1e-4, "output");
        pd_batch_free(batch);
        pd_net_free(net);
    }
}

/* ======================================================================================================== */
/* Shapes, by hand                                                                                           */

static void test_shapes(void **state) {
    static const struct {
        int64_t in, size, stride, pad;
        bool ceil;
        int64_t out;
    } pools[] = {
        { 5, 2, 0, 0, false, 2 }, { 5, 2, 0, 0, true, 3 }, { 6, 3, 2, 0, false, 2 }, { 6, 3, 2, 0, true, 3 },
        { 4, 2, 2, 1, false, 3 }, { 4, 2, 2, 1, true, 3 }, { 3, 2, 2, 1, false, 2 }, { 3, 2, 2, 1, true, 2 },
        { 2, 2, 3, 1, false, 1 }, { 2, 2, 3, 1, true, 1 }, { 1, 1, 1, 0, false, 1 }, { 7, 3, 2, 1, true, 4 },
        { 8, 3, 2, 1, false, 4 }, { 8, 3, 2, 1, true, 5 }, { 10, 3, 5, 0, true, 2 }, { 11, 3, 5, 0, true, 3 },
    };
    static const struct {
        int64_t in, filter, stride, pad, dilation, out, transposed;
    } convs[] = {
        { 224, 7, 2, 3, 1, 112, 447 }, { 5, 3, 1, 0, 2, 1, 9 },  { 5, 3, 0, 1, 0, 5, 5 },   { 1, 1, 1, 0, 1, 1, 1 },
        { 7, 2, 3, 0, 1, 2, 20 },      { 6, 5, 4, 2, 1, 2, 21 }, { 3, 4, 2, 1, 3, -1, 12 },
    };
    pd_net *net = pd_net_new(NULL);
    (void)state;
    for (int i = 0; i < COUNT(pools); i++) {
        pd_layer *x = pd_image(net, NULL, 1, pools[i].in, 30);
        pd_pool_opts o = { .size_h = pools[i].size, .stride_h = pools[i].stride, .ceil = pools[i].ceil };
        pd_layer *y;
        o.stride = o.stride_h ? 1 : 0;
        o.pad_h = pools[i].pad;
        y = pd_pool(net, x, 1, &o);
        if (!y || y->shape.height != pools[i].out)
            fail_msg("pool %d: %s", i, y ? pd_shape_text(y, y->shape) : pd_error(net));
    }
    for (int i = 0; i < COUNT(convs); i++) {
        pd_layer *x = pd_image(net, NULL, 1, 30, convs[i].in), *y;
        pd_conv_opts o = { .filter_h = 1, .stride_h = 1, .pad_h = PD_ZERO, .dilation_h = 1 };
        o.stride = convs[i].stride;
        o.pad = convs[i].pad;
        o.dilation = convs[i].dilation;
        y = convs[i].out < 0 ? NULL : pd_conv(net, x, 1, convs[i].filter, &o);
        if (y ? y->shape.width != convs[i].out : convs[i].out >= 0) fail_msg("conv %d: %s", i, pd_error(net));
        y = pd_conv_transpose(net, x, 1, convs[i].filter, &o);
        if (!y || y->shape.width != convs[i].transposed) fail_msg("conv_transpose %d: %s", i, pd_error(net));
    }
    pd_net_free(net);
}

/* ======================================================================================================== */
/* Misuse: what builders refuse, and the message                                                             */

/* A net with inputs of all kinds, made anew for each refusal. */
static struct {
    pd_net *net, *other;
    pd_layer *image, *vec, *one, *ids, *foreign; /* 2x5x4, 6, 1, ids below 1, and 1 in the other net */
    pd_batch *batch;
} the;

/* Has no more than 1 GiB to give, on every machine and under every tool. */
static void *limited_alloc(void *user, size_t bytes, size_t align) {
    return bytes >> 30 ? NULL : failing_alloc(user, bytes, align);
}
static failing_allocator never_fails = { 0, -1, 0 };
static const pd_net_opts limited = { .allocator = { limited_alloc, failing_free, &never_fails } };

static void begin(void) {
    the.net = pd_net_new(&limited);
    the.other = pd_net_new(NULL);
    the.image = pd_image(the.net, "image", 2, 5, 4);
    the.vec = pd_vector(the.net, "vec", 6);
    the.one = pd_vector(the.net, "one", 1);
    the.ids = pd_ids(the.net, "ids", 1);
    the.foreign = pd_vector(the.other, "foreign", 1);
    the.batch = pd_batch_new(the.net);
}

static void end(void) {
    pd_batch_free(the.batch);
    pd_net_free(the.net);
    pd_net_free(the.other);
}

/* After a builder has failed, everything else does too, and the message stays. */
static void check_sticks(int line) {
    char first[512];
    pd_status status = pd_error_status(the.net);
    pd_gradcheck check;
    snprintf(first, sizeof first, "%s", pd_error(the.net));
    assert_int_not_equal(status, PD_OK);
    assert_null(pd_dropout(the.net, the.vec, 7, NULL));
    assert_null(pd_fc(the.net, the.vec, 2, NULL));
    assert_null(pd_vector(the.net, "late", 2));
    assert_null(pd_sequence(the.ids));
    assert_null(pd_sum_cost(the.net, the.vec, NULL));
    assert_null(pd_eval_error(the.net, the.one, the.ids, NULL));
    assert_null(pd_net_share(the.net));
    assert_null(pd_batch_new(the.net));
    assert_null(pd_predict(the.vec, NULL, 0));
    assert_null(pd_trainer_new(the.net, the.one, pd_sgd(0.1), NULL));
    assert_null(pd_trainer_new(the.net, NULL, pd_sgd(0.1), NULL));
    assert_int_equal(pd_forward(the.net, the.batch, PD_TRAIN, &the.one, 1), status);
    assert_int_equal(pd_forward(the.net, NULL, PD_TRAIN, NULL, 1), status);
    assert_int_equal(pd_backward(the.net, the.one), status);
    assert_int_equal(pd_zero_grads(the.net), status);
    assert_int_equal(pd_check_gradients(the.one, the.batch, NULL, &check), status);
    if (strcmp(pd_error(the.net), first) != 0) fail_msg("line %d: %s\nbecame %s", line, first, pd_error(the.net));
}

static void check_refused(int line, const pd_layer *layer, const char *message, bool exactly) {
    const char *error = pd_error(the.net);
    if (layer) fail_msg("line %d: was accepted, expected\n  %s", line, message);
    if (exactly ? strcmp(error, message) != 0 : strncmp(error, message, strlen(message)) != 0)
        fail_msg("line %d: expected the message\n  %s\ngot\n  %s", line, message, error);
    assert_null(strchr(error, '\n'));
    check_sticks(line);
    end();
}

/* The expression, built on what `the` holds, gives NULL and a message that begins, or is, like this. */
#define REFUSED(message, ...) (begin(), check_refused(__LINE__, (__VA_ARGS__), message, false))
#define REFUSED_EXACTLY(message, ...) (begin(), check_refused(__LINE__, (__VA_ARGS__), message, true))

/* ---- what all builders refuse. Each is valid for x of width 1; n: name, a: activation. ---- */

#define TWO(x) (pd_layer *[]){ x, x }, 2
#define BUILDERS(X)                                                                                                    \
    X(fc, pd_fc(net, x, 3, &(pd_fc_opts){ .name = n, .act = a }))                                                      \
    X(fc, pd_fc_sum(net, TWO(x), 3, &(pd_fc_opts){ .name = n, .act = a }))                                             \
    X(conv, pd_conv(net, x, 2, 1, &(pd_conv_opts){ .name = n, .act = a }))                                             \
    X(conv_transpose, pd_conv_transpose(net, x, 2, 2, &(pd_conv_opts){ .name = n, .act = a }))                         \
    X(pool, pd_pool(net, x, 1, &(pd_pool_opts){ .name = n, .act = a }))                                                \
    X(batch_norm, pd_batch_norm(net, x, &(pd_batch_norm_opts){ .name = n, .act = a }))                                 \
    X(layer_norm, pd_layer_norm(net, x, &(pd_layer_norm_opts){ .name = n, .act = a }))                                 \
    X(group_norm, pd_group_norm(net, x, 1, &(pd_group_norm_opts){ .name = n, .act = a }))                              \
    X(response_norm, pd_response_norm(net, x, &(pd_response_norm_opts){ .name = n, .act = a }))                        \
    X(dropout, pd_dropout(net, x, 0.5, &(pd_layer_opts){ n, a }))                                                      \
    X(add, pd_add(net, TWO(x), &(pd_layer_opts){ n, a }))                                                              \
    X(multiply, pd_multiply(net, x, x, &(pd_layer_opts){ n, a }))                                                      \
    X(concat, pd_concat(net, TWO(x), &(pd_layer_opts){ n, a }))                                                        \
    X(slice, pd_slice(net, x, 0, 1, &(pd_layer_opts){ n, a }))                                                         \
    X(reshape, pd_reshape(net, x, shape(1, 1, 1), &(pd_layer_opts){ n, a }))                                           \
    X(transpose, pd_transpose(net, x, (const int[3]){ 2, 1, 0 }, &(pd_layer_opts){ n, a }))                            \
    X(interpolate, pd_interpolate(net, x, x, x, &(pd_layer_opts){ n, a }))                                             \
    X(scale, pd_scale(net, x, x, &(pd_layer_opts){ n, a }))                                                            \
    X(affine, pd_affine(net, x, 2, 1, &(pd_layer_opts){ n, a }))                                                       \
    X(maxout, pd_maxout(net, x, 1, &(pd_layer_opts){ n, a }))                                                          \
    X(pad, pd_pad(net, x, (const int64_t[6]){ 1, 1, 1, 1, 1, 1 }, &(pd_layer_opts){ n, a }))                           \
    X(resize, pd_resize(net, x, 2, 2, &(pd_layer_opts){ n, a }))                                                       \
    X(block_expand, pd_block_expand(net, x, 1, 1, &(pd_block_expand_opts){ .name = n, .act = a }))                     \
    X(cosine, pd_cosine(net, x, x, 1, &(pd_layer_opts){ n, a }))                                                       \
    X(outer, pd_outer(net, x, x, &(pd_layer_opts){ n, a }))                                                            \
    X(bilinear, pd_bilinear(net, x, x, 2, &(pd_fc_opts){ .name = n, .act = a }))                                       \
    X(activation, pd_activation(net, x, a, &(pd_activation_opts){ .name = n }))                                        \
    X(prelu, ((void)a, pd_prelu(net, x, &(pd_prelu_opts){ .name = n })))

#define AS_FUNCTION(type, expression)                                                                                  \
    if (turn-- == 0) {                                                                                                 \
        *name = #type;                                                                                                 \
        return expression;                                                                                             \
    }
/* Calls builder number `turn` and says its type's name; *name NULL: there is none. */
static pd_layer *builder(int turn, const char **name, pd_net *net, pd_layer *x, const char *n, pd_act a) {
    BUILDERS(AS_FUNCTION)
    *name = NULL;
    return NULL;
}

static const char *format(const char *text, const char *type) {
    static char message[300];
    snprintf(message, sizeof message, text, type);
    return message;
}

static void test_all_builders_refuse(void **state) {
    char long_name[202];
    (void)state;
    memset(long_name, 'x', 201);
    long_name[201] = 0;
    for (int turn = 0;; turn++) {
        const char *type = NULL;
        pd_layer *y;
        begin();
        y = builder(turn, &type, the.net, the.one, NULL, PD_LINEAR);
        if (!type) break;
        if (!y) fail_msg("%s: %s", type, pd_error(the.net));
        assert_string_equal(y->name, format("%s1", type));
        end();
        assert_null(builder(turn, &type, NULL, NULL, NULL, PD_LINEAR));
        REFUSED_EXACTLY(format("%s: input 0 is NULL", type), builder(turn, &type, the.net, NULL, NULL, PD_LINEAR));
        REFUSED_EXACTLY(format("%s: input 0, \"foreign\", belongs to another net", type),
                        builder(turn, &type, the.net, the.foreign, NULL, PD_LINEAR));
        REFUSED(format("%s1: input \"ids\" holds ids, expected numbers", type),
                builder(turn, &type, the.net, the.ids, NULL, PD_LINEAR));
        REFUSED("vec: the name is already used by ", builder(turn, &type, the.net, the.one, "vec", PD_LINEAR));
        REFUSED(": a name has 1 to 200 characters", builder(turn, &type, the.net, the.one, "", PD_LINEAR));
        REFUSED("a\"b: a name has", builder(turn, &type, the.net, the.one, "a\"b", PD_LINEAR));
        REFUSED("xxxxx", builder(turn, &type, the.net, the.one, long_name, PD_LINEAR));
        if (strcmp(type, "prelu") == 0) continue;
        REFUSED_EXACTLY(format("%s1: unknown activation 99", type),
                        builder(turn, &type, the.net, the.one, NULL, (pd_act)99));
        REFUSED_EXACTLY(format("%s1: unknown activation -1", type),
                        builder(turn, &type, the.net, the.one, NULL, (pd_act)-1));
    }
    end();
}

/* ---- lack of memory ---- */

/* Builds, shares, runs and checks gradients; what failed with which message, or PD_OK. *type NULL: there is no builder
   of this number. */
static pd_status use_builder(int turn, pd_net *net, const char **type, pd_failure *failure) {
    pd_layer *x = pd_vector(net, "x", 1), *y = builder(turn, type, net, x, NULL, PD_GELU);
    pd_status status = y ? pd_want_gradient(x) : pd_error_status(net);
    pd_batch *batch = pd_batch_new(net);
    pd_net *shared = pd_net_share(net);
    pd_gradcheck check;
    if (status == PD_OK && (!batch || !shared)) status = pd_error_status(net);
    for (int i = 0; i < 3 && status == PD_OK; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        if (row) *row = (pd_real)(i + 1);
        status = row ? pd_batch_end_sample(batch) : batch->error.status;
    }
    if (status == PD_OK) status = pd_forward(net, batch, PD_TRAIN, &y, 1);
    if (status == PD_OK) status = pd_backward(net, y);
    if (status == PD_OK) status = pd_check_gradients(y, batch, NULL, &check);
    snprintf(failure->text, sizeof failure->text, "%s",
             batch && batch->error.status ? batch->error.text : pd_error(net));
    pd_net_free(shared);
    pd_batch_free(batch);
    return status;
}

/* Every allocation fails once: PD_E_MEMORY, nothing leaks. */
static void test_no_memory(void **state) {
    const char *type = "";
    (void)state;
    for (int turn = 0; type; turn++)
        for (int64_t fail_at = 0;; fail_at++) {
            failing_allocator f = { 0, fail_at, 0 };
            pd_net *net = pd_net_new(&(pd_net_opts){ .allocator = { failing_alloc, failing_free, &f } });
            pd_failure failure = { PD_OK, "out of memory" };
            pd_status status = net ? use_builder(turn, net, &type, &failure) : PD_E_MEMORY;
            bool failed = f.calls > fail_at;
            if (failed && type && (status != PD_E_MEMORY || !strstr(failure.text, "out of memory")))
                fail_msg("%s: status %d, message \"%s\" without allocation %lld", type, (int)status, failure.text,
                         (long long)fail_at);
            pd_net_free(net);
            assert_int_equal(f.in_use, 0);
            if (!type || !failed) break;
        }
}

/* ---- what each refuses ---- */

static void test_inputs_refuse(void **state) {
    (void)state;
    REFUSED_EXACTLY("i: output would have the empty shape 0x3x3", pd_image(the.net, "i", 0, 3, 3));
    REFUSED_EXACTLY("i: output would have the empty shape 1x-3x3", pd_image(the.net, "i", 1, -3, 3));
    REFUSED("i: output would have the empty shape", pd_image(the.net, "i", 1, 3, INT64_MIN));
    REFUSED("v: output would have the empty shape", pd_vector(the.net, "v", 0));
    REFUSED_EXACTLY("l: number of ids is 0, expected at least 1", pd_label(the.net, "l", 0));
    REFUSED_EXACTLY("w: number of ids is -5, expected at least 1", pd_ids(the.net, "w", -5));
    REFUSED("vec: the name is already used by ", pd_vector(the.net, "vec", 3));
    REFUSED_EXACTLY("vec: pd_sequence takes an input that has just been created", pd_sequence(the.vec));
    REFUSED("fc1: pd_sequence takes an input", pd_sequence(pd_fc(the.net, the.vec, 2, NULL)));
    assert_null(pd_image(NULL, "i", 1, 1, 1));
    assert_null(pd_sequence(NULL));
    assert_int_equal(pd_want_gradient(NULL), PD_E_ARGUMENT);
    begin();
    assert_int_equal(pd_want_gradient(the.ids), PD_E_ARGUMENT);
    assert_int_equal(pd_want_gradient(pd_fc(the.net, the.vec, 2, NULL)), PD_E_ARGUMENT);
    assert_string_equal(pd_error(the.net), "fc1: pd_want_gradient takes a dense input");
    assert_non_null(pd_fc(the.net, the.vec, 2, NULL)); /* that wasn't a builder's failure */
    end();
}

/* A pool of 16x5x5 called pool1, and a convolution too large for it. */
static pd_layer *conv_on_pool(int64_t filter, int64_t dilation) {
    pd_layer *pool = pd_pool(the.net, pd_image(the.net, "x", 16, 10, 10), 2, NULL);
    return pd_conv(the.net, pool, 2, filter, &(pd_conv_opts){ .name = "conv2", .dilation = dilation });
}

static pd_layer *conv(int64_t filters, int64_t filter, pd_conv_opts o) {
    return pd_conv(the.net, the.image, filters, filter, &o);
}
static pd_layer *conv_transpose(int64_t filters, int64_t filter, pd_conv_opts o) {
    return pd_conv_transpose(the.net, the.image, filters, filter, &o);
}
static pd_layer *pool(int64_t length, pd_pool_opts o) { return pd_pool(the.net, the.image, length, &o); }
static pd_layer *blocks(int64_t height, int64_t width, pd_block_expand_opts o) {
    return pd_block_expand(the.net, the.image, height, width, &o);
}

static void test_windows_refuse(void **state) {
    (void)state;
    REFUSED_EXACTLY("conv2: filter 7x7 does not fit the padded input 5x5 coming from \"pool1\" (16x5x5)",
                    conv_on_pool(7, 1));
    REFUSED_EXACTLY("conv2: filter 7x7 does not fit the padded input 5x5 coming from \"pool1\" (16x5x5)",
                    conv_on_pool(4, 2));
    REFUSED_EXACTLY("conv1: number of filters is 0, expected at least 1", conv(0, 3, (pd_conv_opts){ 0 }));
    REFUSED("conv1: number of filters is -2", conv(-2, 3, (pd_conv_opts){ 0 }));
    REFUSED("conv1: filter is 0, expected at least 1", conv(1, 0, (pd_conv_opts){ 0 }));
    REFUSED("conv1: filter is -1", conv(1, 1, (pd_conv_opts){ .filter_h = -1 }));
    REFUSED("conv1: stride is -1", conv(1, 1, (pd_conv_opts){ .stride = -1 }));
    REFUSED("conv1: stride is -7", conv(1, 1, (pd_conv_opts){ .stride_h = -7 }));
    REFUSED("conv1: pad is -1", conv(1, 1, (pd_conv_opts){ .pad = -1 }));
    REFUSED("conv1: pad is -2", conv(1, 1, (pd_conv_opts){ .pad_h = -2 }));
    REFUSED("conv1: pad is -1", conv(1, 1, (pd_conv_opts){ .pad_h = -1 }));
    REFUSED("conv1: dilation is -1", conv(1, 1, (pd_conv_opts){ .dilation = -1 }));
    REFUSED("conv1: dilation is -1", conv(1, 1, (pd_conv_opts){ .dilation_h = -1 }));
    REFUSED("conv1: groups is -2", conv(2, 1, (pd_conv_opts){ .groups = -2 }));
    REFUSED_EXACTLY("conv1: 2 groups do not divide the 2 channels of \"image\" and the 3 filters",
                    conv(3, 1, (pd_conv_opts){ .groups = 2 }));
    REFUSED("conv1: 3 groups do not divide", conv(3, 1, (pd_conv_opts){ .groups = 3 }));
    REFUSED("conv1: filter 6x1 does not fit the padded input 5x4", conv(1, 1, (pd_conv_opts){ .filter_h = 6 }));
    REFUSED("conv1: filter 1x7 does not fit the padded input 5x6",
            conv(1, 7, (pd_conv_opts){ .filter_h = 1, .pad = 1, .pad_h = PD_ZERO }));
    REFUSED_EXACTLY("conv_transpose1: padding 3x3 leaves nothing of the output 1x0x-1",
                    conv_transpose(1, 2, (pd_conv_opts){ .pad = 3 }));
    REFUSED("conv_transpose1: filter is 0", conv_transpose(1, 0, (pd_conv_opts){ 0 }));
    REFUSED("conv_transpose1: stride is -1", conv_transpose(1, 1, (pd_conv_opts){ .stride = -1 }));
    REFUSED("conv_transpose1: 3 groups do not divide", conv_transpose(3, 1, (pd_conv_opts){ .groups = 3 }));

    REFUSED("pool1: size is 0, expected at least 1", pool(0, (pd_pool_opts){ 0 }));
    REFUSED("pool1: size is -1", pool(2, (pd_pool_opts){ .size_h = -1 }));
    REFUSED("pool1: stride is -1", pool(2, (pd_pool_opts){ .stride = -1 }));
    REFUSED("pool1: pad is -1", pool(2, (pd_pool_opts){ .pad = -1 }));
    REFUSED("pool1: pad is -3", pool(2, (pd_pool_opts){ .pad_h = -3 }));
    REFUSED_EXACTLY("pool1: padding 2x2 must be below the size 2x2", pool(2, (pd_pool_opts){ .pad = 2 }));
    REFUSED("pool1: padding 1x1 must be below the size 1x3", pool(3, (pd_pool_opts){ .size_h = 1, .pad = 1 }));
    REFUSED_EXACTLY("pool1: window 6x6 does not fit the padded input coming from \"image\" (2x5x4)",
                    pool(6, (pd_pool_opts){ 0 }));
    REFUSED("pool1: unknown method 6", pool(2, (pd_pool_opts){ .method = (pd_pool_method)6 }));
    REFUSED("pool1: unknown method -1", pool(2, (pd_pool_opts){ .method = (pd_pool_method)-1 }));

    REFUSED("block_expand1: block is 0", blocks(0, 1, (pd_block_expand_opts){ 0 }));
    REFUSED("block_expand1: block is -1", blocks(1, -1, (pd_block_expand_opts){ 0 }));
    REFUSED("block_expand1: stride is -1", blocks(1, 1, (pd_block_expand_opts){ .stride = -1 }));
    REFUSED("block_expand1: pad is -1", blocks(1, 1, (pd_block_expand_opts){ .pad = -1 }));
    REFUSED("block_expand1: block 6x1 does not fit the padded input coming from \"image\" (2x5x4)",
            blocks(6, 1, (pd_block_expand_opts){ 0 }));
    REFUSED("block_expand1: input \"seq\" already carries sequences",
            pd_block_expand(the.net, pd_sequence(pd_image(the.net, "seq", 1, 2, 2)), 1, 1, NULL));
}

static pd_layer *fc_with(pd_param_opts weight) { return pd_fc(the.net, the.vec, 3, &(pd_fc_opts){ .weight = weight }); }

/* Two layers that want one parameter in two shapes. */
static pd_layer *fc_then(pd_layer *(*second)(pd_param_opts w)) {
    pd_param_opts w = { .name = "w" };
    return fc_with(w) ? second(w) : NULL;
}
static pd_layer *wider_fc(pd_param_opts w) { return pd_fc(the.net, the.vec, 4, &(pd_fc_opts){ .weight = w }); }
static pd_layer *conv_instead(pd_param_opts w) { return conv(1, 1, (pd_conv_opts){ .weight = w }); }
static pd_layer *prelu_instead(pd_param_opts w) { return pd_prelu(the.net, the.vec, &(pd_prelu_opts){ .weight = w }); }

static void test_parameters_refuse(void **state) {
    const double nan_value = (double)NAN;
    (void)state;
    REFUSED_EXACTLY("fc1: size is 0, expected at least 1", pd_fc(the.net, the.vec, 0, NULL));
    REFUSED_EXACTLY("fc: 0 inputs, but fc takes at least 1", pd_fc_sum(the.net, &the.vec, 0, 3, NULL));
    REFUSED("fc: -3 inputs", pd_fc_sum(the.net, &the.vec, -3, 3, NULL));
    REFUSED("fc: input 0 is NULL", pd_fc_sum(the.net, NULL, 2, 3, NULL));
    REFUSED("fc: input 1 is NULL", pd_fc_sum(the.net, (pd_layer *[]){ the.vec, NULL }, 2, 3, NULL));
    REFUSED("fc1: input \"ids\" holds ids", pd_fc_sum(the.net, (pd_layer *[]){ the.vec, the.ids }, 2, 3, NULL));
    REFUSED_EXACTLY(
        "fc1: parameter \"fc1.weight\": rate_factor is -1, expected a positive number; is_static makes one stay as it is",
        fc_with((pd_param_opts){ .rate_factor = -1 }));
    REFUSED("fc1: parameter \"fc1.weight\": rate_factor", fc_with((pd_param_opts){ .rate_factor = nan_value }));
    REFUSED("fc1: parameter \"fc1.weight\": l1 is -1", fc_with((pd_param_opts){ .l1 = -1 }));
    REFUSED("fc1: parameter \"fc1.weight\": l2 is -1", fc_with((pd_param_opts){ .l2 = -1 }));
    REFUSED("fc1: parameter \"fc1.weight\": clip is -1", fc_with((pd_param_opts){ .clip = -1 }));
    REFUSED("fc1: parameter \"fc1.weight\": l2 is inf", fc_with((pd_param_opts){ .l2 = (double)INFINITY }));
    REFUSED("fc2: parameter \"w\" is shared, but was created with other options",
            (fc_with((pd_param_opts){ .name = "w" }), fc_with((pd_param_opts){ .name = "w", .rate_factor = 2 })));
    REFUSED("batch_norm1: \"batch_norm1.running_var\", its own statistics, is a parameter of another layer",
            (pd_fc(the.net, the.vec, 4, &(pd_fc_opts){ .bias.name = "batch_norm1.running_var" }),
             pd_batch_norm(the.net, the.vec, NULL)));
    REFUSED("fc1: parameter \"batch_norm1.running_mean\" is another layer's statistics",
            (pd_batch_norm(the.net, the.vec, NULL),
             pd_fc(the.net, the.vec, the.vec->out.width, &(pd_fc_opts){ .bias.name = "batch_norm1.running_mean" })));
    REFUSED_EXACTLY("fc1: parameter \"fc1.weight\": prune is 1, expected 0 <= prune < 1",
                    fc_with((pd_param_opts){ .prune = 1 }));
    REFUSED("fc1: parameter \"fc1.weight\": prune is -0.5", fc_with((pd_param_opts){ .prune = -0.5 }));
    REFUSED("fc1: parameter \"fc1.weight\": wrong initialiser",
            fc_with((pd_param_opts){ .init = { .kind = (pd_init_kind)9 } }));
    REFUSED("fc1: parameter \"fc1.weight\": wrong initialiser",
            fc_with((pd_param_opts){ .init = pd_normal(nan_value, 1) }));
    REFUSED("fc1: parameter \"fc1.weight\": wrong initialiser",
            fc_with((pd_param_opts){ .init = pd_uniform(0, HUGE_VAL) }));
    if (sizeof(pd_real) == 4)
        REFUSED("fc1: parameter \"fc1.weight\": wrong initialiser",
                fc_with((pd_param_opts){ .init = pd_constant(1e39) }));
    REFUSED("fc1: a parameter's name has 1 to 200 characters", fc_with((pd_param_opts){ .name = "" }));
    REFUSED("fc1: a parameter's name has", fc_with((pd_param_opts){ .name = "a\\b" }));
    REFUSED("fc1: parameter \"fc1.bias\": rate_factor",
            pd_fc(the.net, the.vec, 3, &(pd_fc_opts){ .bias = { .rate_factor = -1 } }));
    REFUSED_EXACTLY("fc2: parameter \"w\" is 6x3, but 6x4 is needed here", fc_then(wider_fc));
    REFUSED_EXACTLY("conv1: parameter \"w\" is 6x3, but 1x2x1x1 is needed here", fc_then(conv_instead));
    REFUSED_EXACTLY("prelu1: parameter \"w\" is 6x3, but 6 is needed here", fc_then(prelu_instead));
    REFUSED("conv1: parameter \"conv1.bias\": prune", conv(1, 1, (pd_conv_opts){ .bias = { .prune = 2 } }));
    REFUSED("prelu1: parameter \"prelu1.weight\": l2",
            pd_prelu(the.net, the.vec, &(pd_prelu_opts){ .weight = { .l2 = -1 } }));
    REFUSED("bilinear1: size is 0", pd_bilinear(the.net, the.vec, the.one, 0, NULL));
    REFUSED("bilinear: input 1 is NULL", pd_bilinear(the.net, the.vec, NULL, 3, NULL));
    REFUSED("bilinear1: parameter \"bilinear1.weight\": rate_factor",
            pd_bilinear(the.net, the.vec, the.one, 3, &(pd_fc_opts){ .weight = { .rate_factor = -1 } }));
}

static pd_layer *batch_norm(pd_batch_norm_opts o) { return pd_batch_norm(the.net, the.image, &o); }
static pd_layer *response_norm(pd_response_norm_opts o) { return pd_response_norm(the.net, the.image, &o); }

static void test_norms_refuse(void **state) {
    const double nan_value = (double)NAN;
    (void)state;
    REFUSED_EXACTLY("batch_norm1: epsilon is -1, expected a positive number",
                    batch_norm((pd_batch_norm_opts){ .epsilon = -1 }));
    REFUSED("batch_norm1: epsilon", batch_norm((pd_batch_norm_opts){ .epsilon = nan_value }));
    REFUSED("batch_norm1: epsilon is 0", batch_norm((pd_batch_norm_opts){ .epsilon = PD_ZERO }));
    REFUSED_EXACTLY("batch_norm1: momentum is 1.1, expected 0 (PD_ZERO) .. 1",
                    batch_norm((pd_batch_norm_opts){ .momentum = 1.1 }));
    REFUSED("batch_norm1: momentum is -0.1", batch_norm((pd_batch_norm_opts){ .momentum = -0.1 }));
    REFUSED("batch_norm1: momentum is", batch_norm((pd_batch_norm_opts){ .momentum = nan_value }));
    REFUSED("batch_norm1: parameter \"batch_norm1.weight\": l1",
            batch_norm((pd_batch_norm_opts){ .weight = { .l1 = -1 } }));
    REFUSED("layer_norm1: epsilon is -1", pd_layer_norm(the.net, the.image, &(pd_layer_norm_opts){ .epsilon = -1 }));
    REFUSED("group_norm1: epsilon is -1", pd_group_norm(the.net, the.image, 1, &(pd_group_norm_opts){ .epsilon = -1 }));
    REFUSED("group_norm1: 0 groups do not divide", pd_group_norm(the.net, the.image, 0, NULL));
    REFUSED("group_norm1: 3 groups do not divide the 2 channels of \"image\"",
            pd_group_norm(the.net, the.image, 3, NULL));
    REFUSED("layer_norm1: parameter \"layer_norm1.bias\": l1",
            pd_layer_norm(the.net, the.image, &(pd_layer_norm_opts){ .bias = { .l1 = -1 } }));
    REFUSED("response_norm1: size is -5", response_norm((pd_response_norm_opts){ .size = -5 }));
    REFUSED("response_norm1: k", response_norm((pd_response_norm_opts){ .k = -1 }));
    REFUSED("response_norm1: k is 0", response_norm((pd_response_norm_opts){ .k = PD_ZERO }));
    REFUSED("response_norm1: k is 1, expected above 0, and alpha -1",
            response_norm((pd_response_norm_opts){ .alpha = -1 }));
    REFUSED("response_norm1: beta is", response_norm((pd_response_norm_opts){ .beta = nan_value }));
    REFUSED("response_norm1: k is inf", response_norm((pd_response_norm_opts){ .k = HUGE_VAL }));
}

static void test_others_refuse(void **state) {
    const double nan_value = (double)NAN;
    (void)state;
    REFUSED_EXACTLY("dropout1: p is 1, expected 0 <= p < 1", pd_dropout(the.net, the.vec, 1, NULL));
    REFUSED("dropout1: p is -0.1", pd_dropout(the.net, the.vec, -0.1, NULL));
    REFUSED("dropout1: p is", pd_dropout(the.net, the.vec, nan_value, NULL));
    REFUSED("add: 0 inputs, but add takes at least 1", pd_add(the.net, NULL, 0, NULL));
    REFUSED("add: input 0 is NULL", pd_add(the.net, NULL, 1, NULL));
    REFUSED_EXACTLY("add1: input \"image\" is 2x5x4, expected 6",
                    pd_add(the.net, (pd_layer *[]){ the.vec, the.image }, 2, NULL));
    REFUSED("multiply1: input \"vec\" is 6, expected 2x5x4", pd_multiply(the.net, the.image, the.vec, NULL));
    REFUSED("multiply: input 1 is NULL", pd_multiply(the.net, the.image, NULL, NULL));
    REFUSED_EXACTLY("concat1: input \"vec\" is 6, \"image\" is 2x5x4: heights and widths must be equal",
                    pd_concat(the.net, (pd_layer *[]){ the.image, the.vec }, 2, NULL));
    REFUSED("concat: 0 inputs", pd_concat(the.net, &the.vec, 0, NULL));
    REFUSED_EXACTLY("slice1: 3 channels from 4 on are not all in \"vec\" (6)", pd_slice(the.net, the.vec, 4, 3, NULL));
    REFUSED("slice1: 2 channels from -1 on", pd_slice(the.net, the.vec, -1, 2, NULL));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, 2, 0, NULL));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, 2, -1, NULL));
    REFUSED_EXACTLY("reshape1: 2x5x5 is not as many numbers as \"image\" has (2x5x4)",
                    pd_reshape(the.net, the.image, shape(2, 5, 5), NULL));
    REFUSED("reshape1: -2x-5x4 is not", pd_reshape(the.net, the.image, shape(-2, -5, 4), NULL));
    REFUSED("reshape1: 0x5x4 is not", pd_reshape(the.net, the.image, shape(0, 5, 4), NULL));
    REFUSED_EXACTLY("transpose1: order {0, 1, 1} is not a permutation of 0, 1, 2",
                    pd_transpose(the.net, the.image, (const int[3]){ 0, 1, 1 }, NULL));
    REFUSED("transpose1: order {0, 1, 3}", pd_transpose(the.net, the.image, (const int[3]){ 0, 1, 3 }, NULL));
    REFUSED("transpose1: order {-1, ", pd_transpose(the.net, the.image, (const int[3]){ -1, 1, 2 }, NULL));
    REFUSED("transpose1: order", pd_transpose(the.net, the.image, NULL, NULL));
    REFUSED_EXACTLY("interpolate1: input \"vec\" is 6, expected 1 or 2x5x4",
                    pd_interpolate(the.net, the.vec, the.image, the.image, NULL));
    REFUSED_EXACTLY("interpolate1: input \"image\" is 2x5x4, expected 1 or 6",
                    pd_interpolate(the.net, the.image, the.vec, the.vec, NULL));
    REFUSED("interpolate1: input \"image\" is 2x5x4, expected 6",
            pd_interpolate(the.net, the.vec, the.vec, the.image, NULL));
    REFUSED("interpolate1: input \"ids\" holds ids", pd_interpolate(the.net, the.ids, the.one, the.one, NULL));
    REFUSED("interpolate1: input \"image\" is 2x5x4, expected 6",
            pd_interpolate(the.net, the.one, the.vec, the.image, NULL));
    REFUSED("interpolate: input 2 is NULL", pd_interpolate(the.net, the.one, the.vec, NULL, NULL));
    REFUSED("scale1: input \"vec\" is 6, expected 1", pd_scale(the.net, the.vec, the.one, NULL));
    REFUSED("scale: input 1 is NULL", pd_scale(the.net, the.one, NULL, NULL));
    REFUSED("affine1: slope", pd_affine(the.net, the.vec, nan_value, 0, NULL));
    REFUSED("affine1: intercept is inf", pd_affine(the.net, the.vec, 0, HUGE_VAL, NULL));
    REFUSED_EXACTLY("maxout1: 4 groups do not divide the 6 channels of \"vec\"", pd_maxout(the.net, the.vec, 4, NULL));
    REFUSED("maxout1: 0 groups", pd_maxout(the.net, the.vec, 0, NULL));
    REFUSED("maxout1: -3 groups", pd_maxout(the.net, the.vec, -3, NULL));
    REFUSED("pad1: pad is -1, expected", pd_pad(the.net, the.image, (const int64_t[6]){ 0, 0, 0, -1, 0, 0 }, NULL));
    REFUSED("pad1: pad is -1, expected", pd_pad(the.net, the.image, NULL, NULL));
    REFUSED_EXACTLY("resize1: height is 0, expected at least 1", pd_resize(the.net, the.image, 0, 1, NULL));
    REFUSED("resize1: width is -1", pd_resize(the.net, the.image, 1, -1, NULL));
    REFUSED_EXACTLY("cosine1: input \"image\" (2x5x4) does not hold whole vectors of \"vec\" (6)",
                    pd_cosine(the.net, the.vec, the.image, 1, NULL));
    REFUSED("cosine1: scale", pd_cosine(the.net, the.vec, the.vec, nan_value, NULL));
    REFUSED("cosine: input 1 is NULL", pd_cosine(the.net, the.vec, NULL, 1, NULL));
    REFUSED("outer: input 1 is NULL", pd_outer(the.net, the.vec, NULL, NULL));
    REFUSED("activation1: alpha is -1",
            pd_activation(the.net, the.vec, PD_LEAKY_RELU, &(pd_activation_opts){ .alpha = -1 }));
    REFUSED_EXACTLY("activation1: alpha is 0, expected a finite number above 0",
                    pd_activation(the.net, the.vec, PD_BRELU, &(pd_activation_opts){ .alpha = PD_ZERO }));
    REFUSED_EXACTLY("activation1: alpha is 0.5, but tanh has none",
                    pd_activation(the.net, the.vec, PD_TANH, &(pd_activation_opts){ .alpha = 0.5 }));
    REFUSED("activation1: alpha is ",
            pd_activation(the.net, the.vec, PD_BRELU, &(pd_activation_opts){ .alpha = nan_value }));
}

/* The first of two wrong calls is the one that is told, even if its result is handed on. */
static void test_first_error_sticks(void **state) {
    pd_layer *y;
    (void)state;
    begin();
    y = pd_fc(the.net, the.vec, 0, NULL);
    y = pd_conv(the.net, y, -3, 0, NULL);
    y = pd_add(the.net, &y, 1, NULL);
    check_refused(__LINE__, y, "fc1: size is 0, expected at least 1", true);
}

/* ---- sizes beyond all bounds: a message, no overflow ---- */

#define HUGE_SIZE INT64_MAX

static pd_layer *huge_vector(int bits) { return pd_vector(the.net, "huge", (INT64_C(1) << bits) - 1); }

/* A layer over seventy times the same huge input. */
static pd_layer *huge_concat(void) {
    pd_layer *inputs[70], *x = huge_vector(57);
    for (int i = 0; i < 70; i++) inputs[i] = x;
    return pd_concat(the.net, inputs, 70, NULL);
}

static void test_huge_sizes(void **state) {
    static const int64_t far = INT32_MAX;
    pd_layer *h;
    (void)state;
    REFUSED("i: output ", pd_image(the.net, "i", HUGE_SIZE, HUGE_SIZE, HUGE_SIZE));
    REFUSED("v: output ", pd_vector(the.net, "v", HUGE_SIZE));
    REFUSED("embedding1: ", pd_embedding(the.net, pd_ids(the.net, "w", HUGE_SIZE), 3, NULL)); /* the ids alone may be */
    REFUSED("fc1: ", pd_fc(the.net, pd_sparse_vector(the.net, "s", HUGE_SIZE), 3, NULL));
    REFUSED("fc1: ", pd_fc(the.net, the.vec, HUGE_SIZE, NULL));
    REFUSED("fc1: ", pd_fc(the.net, the.one, HUGE_SIZE, NULL));
    REFUSED("fc1: ", pd_fc(the.net, huge_vector(57), 3, NULL));
    REFUSED("bilinear1: ", pd_bilinear(the.net, the.vec, the.vec, HUGE_SIZE, NULL));
    REFUSED("bilinear1: ", ((h = huge_vector(57)), pd_bilinear(the.net, h, h, 3, NULL)));
    REFUSED("conv1: ", conv(HUGE_SIZE, 1, (pd_conv_opts){ 0 }));
    REFUSED("conv1: ", conv(1, HUGE_SIZE, (pd_conv_opts){ 0 }));
    REFUSED("conv1: ", conv(1, 1, (pd_conv_opts){ .filter_h = HUGE_SIZE }));
    REFUSED("conv1: ", conv(1, 1, (pd_conv_opts){ .pad = HUGE_SIZE }));
    REFUSED("conv1: ", conv(1, 1, (pd_conv_opts){ .pad = far }));
    REFUSED("conv1: ", conv(1, 3, (pd_conv_opts){ .dilation = HUGE_SIZE }));
    REFUSED("conv1: ", conv(1, 1, (pd_conv_opts){ .stride = HUGE_SIZE }));
    REFUSED("conv1: ", conv(HUGE_SIZE, 1, (pd_conv_opts){ .groups = HUGE_SIZE }));
    REFUSED("conv1: ", pd_conv(the.net, huge_vector(57), 1, far, &(pd_conv_opts){ .pad = far }));
    REFUSED("conv1: ", pd_conv(the.net, the.one, INT64_C(1) << 40, far, &(pd_conv_opts){ .pad = far }));
    REFUSED("conv_transpose1: ", conv_transpose(1, far, (pd_conv_opts){ .stride = far, .dilation = far }));
    REFUSED("conv_transpose1: ", conv_transpose(HUGE_SIZE, far, (pd_conv_opts){ 0 }));
    REFUSED("conv_transpose1: ", pd_conv_transpose(the.net, pd_image(the.net, "i", 1, 1, INT64_C(1) << 56), 1, 2,
                                                   &(pd_conv_opts){ .stride = far }));
    REFUSED("pool1: ", pool(HUGE_SIZE, (pd_pool_opts){ 0 }));
    REFUSED("pool1: ", pool(HUGE_SIZE, (pd_pool_opts){ .pad = HUGE_SIZE - 1 }));
    REFUSED("pool1: ", pool(2, (pd_pool_opts){ .stride = HUGE_SIZE, .ceil = true }));
    REFUSED("block_expand1: ", blocks(HUGE_SIZE, HUGE_SIZE, (pd_block_expand_opts){ 0 }));
    REFUSED("block_expand1: ", blocks(1, 1, (pd_block_expand_opts){ .pad = HUGE_SIZE }));
    REFUSED("block_expand1: ", blocks(1, 1, (pd_block_expand_opts){ .pad = far }));
    REFUSED("block_expand1: ", blocks(far, far, (pd_block_expand_opts){ .pad = far }));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, HUGE_SIZE, HUGE_SIZE, NULL));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, 1, HUGE_SIZE, NULL));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, INT64_MIN, 0, NULL));
    REFUSED("slice1: ", pd_slice(the.net, the.vec, INT64_MIN, INT64_MIN, NULL));
    REFUSED("reshape1: ", pd_reshape(the.net, the.vec, shape(HUGE_SIZE, HUGE_SIZE, 2), NULL));
    REFUSED("reshape1: ", pd_reshape(the.net, the.vec, shape(INT64_MIN, INT64_MIN, INT64_MIN), NULL));
    REFUSED("pad1: ", pd_pad(the.net, the.vec, (const int64_t[6]){ HUGE_SIZE, 0, 0, 0, 0, 0 }, NULL));
    REFUSED("pad1: ", pd_pad(the.net, the.vec, (const int64_t[6]){ far, far, far, far, far, far }, NULL));
    REFUSED("pad1: ", pd_pad(the.net, pd_image(the.net, "i", 1, 1, INT64_C(1) << 56),
                             (const int64_t[6]){ far, far, far, far, far, far }, NULL));
    REFUSED("resize1: ", pd_resize(the.net, the.image, HUGE_SIZE, HUGE_SIZE, NULL));
    REFUSED("maxout1: ", pd_maxout(the.net, the.vec, HUGE_SIZE, NULL));
    REFUSED("outer1: ", ((h = huge_vector(40)), pd_outer(the.net, h, h, NULL)));
    REFUSED("concat1: ", huge_concat());
    REFUSED("layer_norm1: ", pd_layer_norm(the.net, huge_vector(57), NULL));
    REFUSED("batch_norm1: ", pd_batch_norm(the.net, huge_vector(57), NULL));
}

/* Huge layers that can exist, with no samples and with one that there is no memory for. */
static void test_huge_layers_run_empty(void **state) {
    pd_net *net = pd_net_new(&limited);
    pd_layer *x = pd_image(net, "x", 1, 1, 1), *huge[3];
    pd_batch *batch;
    (void)state;
    pd_want_gradient(x);
    huge[0] = pd_conv(net, x, 1, 31, &(pd_conv_opts){ .pad = 1 << 27 });
    huge[1] = pd_resize(net, x, 1 << 28, 1 << 28, NULL);
    huge[2] = pd_block_expand(net, x, 1, 1, &(pd_block_expand_opts){ .pad = 1 << 27 });
    batch = pd_batch_new(net);
    for (int i = 0; i < 3; i++) {
        if (!huge[i]) fail_msg("%s", pd_error(net));
        assert_int_equal(pd_forward(net, batch, PD_TRAIN, &huge[i], 1), PD_OK);
        assert_int_equal(pd_backward(net, huge[i]), PD_OK);
    }
    pd_batch_add_row(batch, 0)[0] = 1;
    pd_batch_end_sample(batch);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(pd_forward(net, batch, PD_TRAIN, &huge[i], 1), PD_E_MEMORY);
        check_contains(pd_error(net), "out of memory for");
    }
    pd_batch_free(batch);
    pd_net_free(net);
}

/* Windows far larger than the image, and more channels in a window than there are. */
static void test_huge_windows(void **state) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_image(net, "x", 2, 1, 2), *y[2];
    pd_batch *batch;
    (void)state;
    pd_want_gradient(x);
    batch = batch_of(net, 3, (const pd_real[]){ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 });
    y[0] = pd_pool(net, x, INT32_MAX, &(pd_pool_opts){ .method = PD_SUM, .pad = INT32_MAX / 2 });
    y[1] = pd_response_norm(net, x, &(pd_response_norm_opts){ .size = HUGE_SIZE });
    for (int i = 0; i < 2; i++) {
        if (!y[i]) fail_msg("%s", pd_error(net));
        assert_int_equal(pd_forward(net, batch, PD_TRAIN, &y[i], 1), PD_OK);
        assert_int_equal(pd_backward(net, y[i]), PD_OK);
        check_near((double)y[i]->out.data[0], i ? 1 : 3, REAL_TOLERANCE, "output");
    }
    pd_batch_free(batch);
    pd_net_free(net);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_matrix_product),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_large),
        cmocka_unit_test(test_gradients_of_a_layer_used_twice),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_activations_far_out),
        cmocka_unit_test(test_softmax_far_out),
        cmocka_unit_test(test_backward_by_windows),
        cmocka_unit_test(test_memory_of_a_layer),
        cmocka_unit_test(test_interpolated_ends),
        cmocka_unit_test(test_norms_far_from_0),
        cmocka_unit_test(test_fold_far_from_0),
        cmocka_unit_test(test_cosine_far_out),
        cmocka_unit_test(test_infinite_slopes),
        cmocka_unit_test(test_maximum_of_nan),
        cmocka_unit_test(test_ties_and_zeros),
        cmocka_unit_test(test_shared_parameters),
        cmocka_unit_test(test_shared_gradient_is_a_sum),
        cmocka_unit_test(test_names_of_several_weights),
        cmocka_unit_test(test_checker_finds_faults),
        cmocka_unit_test(test_checker_has_something_to_check),
        cmocka_unit_test(test_empty_batch),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_other_devices),
        cmocka_unit_test(test_share_predicts_the_same),
        cmocka_unit_test(test_share_in_threads),
        cmocka_unit_test(test_share_misused),
        cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_batch_norm_statistics),
        cmocka_unit_test(test_batch_norm_of_the_last_batch),
        cmocka_unit_test(test_batch_norm_frozen),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_all_builders_refuse),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_inputs_refuse),
        cmocka_unit_test(test_windows_refuse),
        cmocka_unit_test(test_parameters_refuse),
        cmocka_unit_test(test_norms_refuse),
        cmocka_unit_test(test_others_refuse),
        cmocka_unit_test(test_first_error_sticks),
        cmocka_unit_test(test_huge_sizes),
        cmocka_unit_test(test_huge_layers_run_empty),
        cmocka_unit_test(test_huge_windows),
    };
    return run_group(tests, NULL, NULL);
}
