/* One answer: what a net predicts of a sample on the CPU are the same bits alone, in any batch, at any place in it, beside
   any other samples, frozen or not, and for any number of threads. Nets of every type of layer are made of random sizes, at
   every level of instructions; that no type and no builder has been forgotten is looked up in the text of paddle.h. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "inside.h"
#include "support.h"

enum { SAMPLES = 8, MOST_INPUTS = 4, MOST_LAYERS = 12, TYPES = 100 };

/* What a sample's numbers are like. All but the first kind are strangers that a neighbour's sum must not meet. */
typedef enum kind { USUAL, HUGE_NUMBERS, TINY, ZEROS, NOT_FINITE, KINDS } kind;

/* What a case's inputs may hold; else anything. */
typedef enum range { ANY, SHARES /* 0 to 1 */ } range;

typedef struct problem {
    pd_net *net;
    pd_layer *inputs[MOST_INPUTS];
    range ranges[MOST_INPUTS];
    int input_count, number; /* of this net among those of its case */
    bool sequence;           /* the inputs carry sequences */
    bool large;              /* enough for several threads */
    pd_batch *all;           /* every sample, from which batches are made */
} problem;

typedef struct layer_case {
    const char *type; /* the variable in paddle.h */
    pd_layer *(*build)(problem *p);
    int weight; /* so many nets of each round */
} layer_case;

static char where[200]; /* what is being done, for messages */

/* ---- sizes ---- */

static int64_t one_of(const int64_t *sizes, int count) { return sizes[below(count)]; }
#define ONE_OF(sizes) one_of(sizes, COUNT(sizes))

/* Around vectors and tiles of all levels. */
static int64_t any_width(const problem *p) {
    static const int64_t sizes[] = { 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 65, 97 };
    return p->large ? 60 + below(70) : ONE_OF(sizes);
}

/* Around the blocks that products are cut into: 320 or 512 deep. */
static int64_t any_depth(const problem *p) {
    static const int64_t sizes[] = { 1,   2,   3,   4,   5,   17,  64,   319,  320, 321,
                                     322, 511, 512, 513, 640, 641, 1024, 1025, 5000 };
    return p->large ? 700 + below(400) : ONE_OF(sizes);
}

static pd_shape shape(int64_t channels, int64_t height, int64_t width) { return (pd_shape){ channels, height, width }; }

static pd_shape any_shape(const problem *p) {
    int64_t channels = 1 + below(p->large ? 24 : 7), height = 1 + below(p->large ? 30 : 9);
    return shape(channels, height, 1 + below(p->large ? 40 : 18));
}

static pd_act any_act(void) {
    static const pd_act acts[] = { PD_LINEAR, PD_LINEAR, PD_RELU,    PD_BRELU, PD_SOFTRELU, PD_LEAKY_RELU,
                                   PD_GELU,   PD_TANH,   PD_SIGMOID, PD_STANH, PD_SOFTMAX };
    return acts[below(COUNT(acts))];
}

/* ---- inputs ---- */

static pd_layer *add_input(problem *p, pd_layer *x) {
    if (p->sequence) pd_sequence(x);
    return p->inputs[p->input_count++] = x;
}
static pd_layer *image(problem *p, pd_shape s) {
    return add_input(p, pd_image(p->net, NULL, s.channels, s.height, s.width));
}
static pd_layer *vector(problem *p, int64_t width) { return add_input(p, pd_vector(p->net, NULL, width)); }
static pd_layer *shares(problem *p, int64_t width) {
    p->ranges[p->input_count] = SHARES;
    return vector(p, width);
}
static pd_layer *label(problem *p, int64_t classes) { return add_input(p, pd_label(p->net, NULL, classes)); }

/* A layer that puts out such rows, often one whose last step is a product. */
static pd_layer *rows_of(problem *p, int64_t width) {
    return below(2) ? vector(p, width) : pd_fc(p->net, vector(p, any_depth(p)), width, NULL);
}

/* ---- the layers ---- */

static pd_layer *with_norm(problem *p, pd_layer *x) {
    return pd_batch_norm(p->net, x, &(pd_batch_norm_opts){ .act = any_act(), .no_affine = below(4) == 0 });
}

static pd_layer *build_input(problem *p) { return image(p, any_shape(p)); }

static pd_layer *build_fc(problem *p) {
    pd_fc_opts o = { .act = any_act(), .no_bias = below(4) == 0 };
    int64_t width = below(6) ? any_width(p) : 1 + below(300);
    pd_layer *inputs[3];
    int count = below(3) ? 1 : 2 + (int)below(2);
    if (below(3) == 0) o.act = PD_LINEAR;
    for (int k = 0; k < count; k++) inputs[k] = vector(p, any_depth(p));
    inputs[0] = count == 1 ? pd_fc(p->net, inputs[0], width, &o) : pd_fc_sum(p->net, inputs, count, width, &o);
    return o.act == PD_LINEAR ? with_norm(p, inputs[0]) : inputs[0];
}

static pd_layer *build_sparse_fc(problem *p) {
    pd_layer *inputs[2];
    inputs[0] = add_input(p, pd_sparse_vector(p->net, NULL, any_depth(p)));
    if (below(2)) return pd_fc(p->net, inputs[0], any_width(p), &(pd_fc_opts){ .act = any_act() });
    inputs[1] = vector(p, any_depth(p));
    if (below(2)) inputs[1] = inputs[0], inputs[0] = p->inputs[1];
    return pd_fc_sum(p->net, inputs, 2, any_width(p), &(pd_fc_opts){ .act = any_act() });
}

/* Of four kinds: images so small that Winograd's way pays for several rows only, those where it does for one, filters of any
   size, and depthwise. */
static pd_layer *any_conv(problem *p, bool transposed) {
    const int kind = p->number % 4;
    const bool three = kind<2, more = p->number % 8> 4;
    pd_conv_opts o = { .act = any_act(), .no_bias = below(4) == 0 };
    int64_t least = kind == 0 ? 3 : kind == 1 ? 11 : more ? 9 : 1, most = kind == 0 ? 8 : kind == 1 ? 12 : least + 7;
    int64_t h = least + below(most - least + 1), w = least + below(most - least + 1);
    int64_t in = three ? 26 + below(12) : 1 + below(17), out = three ? 26 + below(12) : 1 + below(17);
    int64_t filter = three ? 3 : 1 + below(5);
    o.pad = three ? 1 : below(filter);
    if (kind == 1) o.pad = below(3);
    if (kind == 2) o.stride = 1 + below(3), o.groups = 1 + below(3), o.dilation = 1 + below(2);
    if (kind == 2) in *= o.groups, out *= o.groups;
    if (kind == 3) o.groups = out = in, o.stride = 1 + below(2);
    if (below(3) == 0) o.act = PD_LINEAR;
    least = filter + (filter - 1) * (o.dilation == 2); /* what a filter reaches */
    if (!transposed) h = h + 2 * o.pad < least ? least : h, w = w + 2 * o.pad < least ? least : w;
    else if (2 * o.pad >= least) o.pad = 0;
    pd_layer *x = image(p, shape(in, h, w));
    x = transposed ? pd_conv_transpose(p->net, x, out, filter, &o) : pd_conv(p->net, x, out, filter, &o);
    return o.act == PD_LINEAR ? with_norm(p, x) : x;
}
static pd_layer *build_conv(problem *p) { return any_conv(p, false); }
static pd_layer *build_conv_transpose(problem *p) { return any_conv(p, true); }

static pd_layer *build_pool(problem *p) {
    static const int64_t even[] = { 2, 4, 8, 16, 32, 64 };
    pd_pool_opts o = { .method = (pd_pool_method)below(4), .act = any_act() };
    if (below(2)) { /* images that 2 x 2 windows cover */
        int64_t channels = 1 + below(5), height = 2 * (1 + below(5));
        return pd_pool(p->net, image(p, shape(channels, height, ONE_OF(even))), 2, &o);
    }
    pd_shape s = any_shape(p);
    int64_t size = 1 + below(smaller(4, smaller(s.height, s.width)));
    o.stride = 1 + below(3), o.pad = below(size), o.ceil = below(2);
    return pd_pool(p->net, image(p, s), size, &o);
}

static pd_layer *build_batch_norm(problem *p) { return with_norm(p, image(p, any_shape(p))); }
static pd_layer *build_layer_norm(problem *p) {
    return pd_layer_norm(p->net, image(p, any_shape(p)), &(pd_layer_norm_opts){ .act = any_act() });
}
static pd_layer *build_group_norm(problem *p) {
    pd_layer *x = image(p, any_shape(p));
    return pd_group_norm(p->net, x, below(2) ? 1 : x->shape.channels, &(pd_group_norm_opts){ .act = any_act() });
}
static pd_layer *build_response_norm(problem *p) {
    return pd_response_norm(p->net, image(p, any_shape(p)),
                            &(pd_response_norm_opts){ .size = 1 + below(6), .alpha = 0.1 });
}
static pd_layer *build_dropout(problem *p) { return pd_dropout(p->net, rows_of(p, any_width(p)), 0.5, NULL); }

static pd_layer *build_add(problem *p) {
    pd_shape s = any_shape(p);
    pd_layer *x[3];
    for (int k = 0; k < 3; k++) x[k] = image(p, s);
    return pd_add(p->net, x, 3, &(pd_layer_opts){ .act = any_act() });
}
static pd_layer *build_multiply(problem *p) {
    pd_shape s = any_shape(p);
    pd_layer *a = image(p, s);
    return pd_multiply(p->net, a, image(p, s), NULL);
}
static pd_layer *build_concat(problem *p) {
    pd_shape s = any_shape(p);
    pd_layer *x[2];
    for (int k = 0; k < 2; k++) s.channels = 1 + below(4), x[k] = image(p, s);
    return pd_concat(p->net, x, 2, NULL);
}
static pd_layer *build_slice(problem *p) {
    pd_layer *x = image(p, any_shape(p));
    int64_t first = below(x->shape.channels);
    return pd_slice(p->net, x, first, 1 + below(x->shape.channels - first), NULL);
}
static pd_layer *build_reshape(problem *p) {
    pd_layer *x = image(p, any_shape(p));
    return pd_reshape(p->net, x, shape(1, x->shape.channels, x->shape.height * x->shape.width), NULL);
}
static pd_layer *build_transpose(problem *p) {
    return pd_transpose(p->net, image(p, any_shape(p)), (const int[]){ 2, 0, 1 }, NULL);
}
static pd_layer *build_pad(problem *p) {
    return pd_pad(p->net, image(p, any_shape(p)), (const int64_t[]){ 1, 0, 2, 1, 0, 3 }, NULL);
}
static pd_layer *build_interpolate(problem *p) {
    pd_shape s = any_shape(p);
    pd_layer *w = shares(p, 1), *a = image(p, s);
    return pd_interpolate(p->net, w, a, image(p, s), NULL);
}
static pd_layer *build_scale(problem *p) {
    pd_layer *w = rows_of(p, 1);
    return pd_scale(p->net, w, image(p, any_shape(p)), NULL);
}
static pd_layer *build_affine(problem *p) {
    return pd_affine(p->net, image(p, any_shape(p)), 1.3, 0.7, &(pd_layer_opts){ .act = any_act() });
}
static pd_layer *build_maxout(problem *p) {
    pd_shape s = any_shape(p);
    s.channels *= 3;
    return pd_maxout(p->net, image(p, s), 3, NULL);
}
static pd_layer *build_resize(problem *p) {
    int64_t height = 1 + below(12);
    return pd_resize(p->net, image(p, any_shape(p)), height, 1 + below(20), NULL);
}

/* The blocks of an image are a sequence, with which recurrent layers go on. */
static pd_layer *build_block_expand(problem *p) {
    p->sequence = false;
    pd_layer *x = image(p, shape(1 + below(3), 6, 7));
    x = pd_block_expand(p->net, x, 2, 3, &(pd_block_expand_opts){ .stride = 1 + below(3), .pad = below(2) });
    return below(2) ? x : pd_gru(p->net, x, any_width(p), NULL);
}

static pd_layer *build_cosine(problem *p) {
    int64_t width = any_width(p);
    pd_layer *a = rows_of(p, width);
    return pd_cosine(p->net, a, vector(p, width * (1 + below(4))), 1.5, NULL);
}
static pd_layer *build_outer(problem *p) {
    pd_layer *a = vector(p, 1 + below(9));
    return pd_outer(p->net, a, vector(p, 1 + below(40)), &(pd_layer_opts){ .act = any_act() });
}
static pd_layer *build_bilinear(problem *p) {
    pd_layer *a = vector(p, below(2) ? any_width(p) : 321 + below(5));
    return pd_bilinear(p->net, a, vector(p, any_width(p)), 1 + below(4), &(pd_fc_opts){ .act = any_act() });
}

/* All kinds, one after the other. */
static pd_layer *build_activation(problem *p) {
    return pd_activation(p->net, rows_of(p, any_width(p)), (pd_act)(p->number % PD_ACT_COUNT), NULL);
}
static pd_layer *build_prelu(problem *p) { return pd_prelu(p->net, image(p, any_shape(p)), NULL); }

static pd_layer *build_embedding(problem *p) {
    return pd_embedding(p->net, add_input(p, pd_ids(p->net, NULL, 50)), any_width(p),
                        &(pd_embedding_opts){ .act = any_act(), .weight.sparse = below(2) });
}

static pd_layer *words(problem *p) {
    p->sequence = true;
    return below(2) ? vector(p, any_depth(p)) : build_embedding(p);
}
/* What a recurrent layer begins with, or nothing. */
static pd_layer *any_first(problem *p, int64_t size) {
    pd_layer *first = NULL;
    if (below(2)) {
        p->sequence = false;
        first = vector(p, size);
        p->sequence = true;
    }
    return first;
}
static pd_layer *build_gru(problem *p) {
    static const int64_t sizes[] = { 1, 3, 8, 11, 16, 17, 33, 107 };
    pd_layer *x = words(p);
    const int64_t size = !p->large && below(3) ? ONE_OF(sizes) : p->large ? 70 : 321; /* deeper than a block */
    return pd_gru(p->net, x, size, &(pd_gru_opts){ .reverse = below(2), .first = any_first(p, size) });
}
static pd_layer *build_lstm(problem *p) {
    static const int64_t sizes[] = { 1, 3, 8, 11, 16, 17, 33, 107 };
    pd_layer *x = words(p);
    const int64_t size = !p->large && below(3) ? ONE_OF(sizes) : p->large ? 70 : 321; /* deeper than a block */
    pd_lstm_opts o = { .reverse = below(2), .peepholes = below(2), .cells = below(2), .first = any_first(p, size) };
    o.first_cell = any_first(p, size);
    return pd_lstm(p->net, x, size, &o);
}

static pd_layer *build_attention(problem *p) {
    const int64_t width = below(2) ? any_width(p) : any_depth(p);
    p->sequence = below(2);
    pd_layer *query = vector(p, width);
    p->sequence = true;
    pd_layer *keys = vector(p, width), *values = below(3) ? vector(p, any_width(p)) : keys;
    return pd_attention(p->net, query, keys, values, NULL);
}
static pd_layer *build_sequence_max(problem *p) { return pd_sequence_pool(p->net, words(p), PD_MAX, NULL); }
static pd_layer *build_sequence_pool(problem *p) {
    static const pd_pool_method methods[] = { PD_AVERAGE, PD_SUM, PD_SQRT_N, PD_FIRST, PD_LAST };
    pd_layer *x = words(p);
    x = pd_sequence_pool(p->net, x, methods[below(COUNT(methods))], NULL);
    return pd_fc(p->net, x, any_width(p), NULL);
}

/* One row per sample, for each row of a sequence. */
static pd_layer *build_expand(problem *p) {
    p->sequence = false;
    pd_layer *x = rows_of(p, any_width(p));
    p->sequence = true;
    return pd_expand(p->net, x, vector(p, 1), NULL);
}

/* A recurrent group: its memory begins with a row of the sample, or 0; it may look at a sequence; and what reads it stands
   in the group, or behind it. */
static pd_layer *build_group(problem *p) {
    const int64_t size = any_width(p);
    pd_layer *list[4], *boot, *still, *h, *y;
    int count = 2;
    p->sequence = false;
    boot = vector(p, size), still = vector(p, any_width(p));
    list[0] = words(p);
    pd_group *g = pd_group_begin(p->net, &(pd_group_opts){ .reverse = below(2) });
    pd_group_input(g, list[0]);
    pd_group_static(g, still);
    list[1] = h = pd_group_memory(g, size, below(3) ? pd_group_static(g, boot) : NULL);
    if (below(2)) list[count++] = still;
    if (below(2)) {
        pd_layer *keys = pd_group_static(g, vector(p, any_width(p)));
        list[count++] = pd_attention(p->net, pd_fc(p->net, h, keys->out.width, NULL), keys, keys, NULL);
    }
    y = pd_fc_sum(p->net, list, count, size, &(pd_fc_opts){ .act = any_act() });
    pd_group_feed(h, y);
    if (below(2)) return pd_fc(p->net, pd_group_end(g, y), any_width(p), NULL);
    list[0] = y, list[1] = below(2) ? still : h;
    y = pd_fc_sum(p->net, list, 2, any_width(p), NULL);
    pd_group_end(g, y);
    return pd_group_output(g, y);
}

/* ---- costs; sometimes with weights ---- */

static pd_cost_opts cost_opts(problem *p) { return (pd_cost_opts){ .weight = below(3) ? NULL : shares(p, 1) }; }

static pd_layer *build_cross_entropy(problem *p) {
    int64_t width = any_width(p);
    pd_layer *x = below(2) ? rows_of(p, width)
                           : pd_fc(p->net, vector(p, any_depth(p)), width, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_layer *t = below(2) ? label(p, width) : shares(p, width);
    pd_cost_opts o = cost_opts(p);
    double weights[200];
    for (int i = 0; i < COUNT(weights); i++) weights[i] = uniform(0.5, 2);
    if (below(2)) o.class_weights = weights;
    return pd_cross_entropy(p->net, x, t, &o);
}

typedef pd_layer *(*element_cost)(pd_net *, pd_layer *, pd_layer *, const pd_cost_opts *);
static pd_layer *element(problem *p, element_cost cost) {
    int64_t width = any_width(p);
    pd_layer *x = rows_of(p, width), *t = shares(p, width);
    pd_cost_opts o = cost_opts(p);
    return cost(p->net, x, t, &o);
}
static pd_layer *build_binary_cross_entropy(problem *p) { return element(p, pd_binary_cross_entropy); }
static pd_layer *build_squared_error(problem *p) { return element(p, pd_squared_error); }
static pd_layer *build_huber(problem *p) { return element(p, pd_huber); }
static pd_layer *build_smooth_l1(problem *p) { return element(p, pd_smooth_l1); }

static pd_layer *two_class(problem *p, element_cost cost, int64_t width) {
    pd_layer *x = rows_of(p, width), *t = label(p, width == 1 ? 2 : width);
    pd_cost_opts o = cost_opts(p);
    return cost(p->net, x, t, &o);
}
static pd_layer *build_huber_two_class(problem *p) { return two_class(p, pd_huber_two_class, 1); }
static pd_layer *build_hinge(problem *p) { return two_class(p, pd_hinge, any_width(p)); }

static pd_layer *build_rank_cost(problem *p) {
    pd_layer *left = rows_of(p, 1), *right = rows_of(p, 1), *first = shares(p, 1);
    return pd_rank_cost(p->net, left, right, first, NULL);
}

/* With sequences: without them the batch is one query, and its cost no sample's own. */
static pd_layer *build_lambda_rank(problem *p) {
    p->sequence = true;
    pd_layer *score = rows_of(p, 1);
    return pd_lambda_rank(p->net, score, label(p, 5), &(pd_cost_opts){ .top = 1 + below(4) });
}
static pd_layer *build_sum_cost(problem *p) { return pd_sum_cost(p->net, rows_of(p, any_width(p)), NULL); }

static const layer_case cases[] = {
    { "pd__input_type", build_input, 1 },
    { "pd__fc_type", build_fc, 12 },
    { "pd__sparse_fc_type", build_sparse_fc, 3 },
    { "pd__conv_type", build_conv, 15 },
    { "pd__conv_transpose_type", build_conv_transpose, 7 },
    { "pd__pool_type", build_pool, 4 },
    { "pd__batch_norm_type", build_batch_norm, 2 },
    { "pd__layer_norm_type", build_layer_norm, 2 },
    { "pd__group_norm_type", build_group_norm, 2 },
    { "pd__response_norm_type", build_response_norm, 2 },
    { "pd__dropout_type", build_dropout, 1 },
    { "pd__add_type", build_add, 1 },
    { "pd__multiply_type", build_multiply, 1 },
    { "pd__concat_type", build_concat, 1 },
    { "pd__slice_type", build_slice, 1 },
    { "pd__reshape_type", build_reshape, 1 },
    { "pd__transpose_type", build_transpose, 1 },
    { "pd__pad_type", build_pad, 1 },
    { "pd__interpolate_type", build_interpolate, 1 },
    { "pd__scale_type", build_scale, 1 },
    { "pd__affine_type", build_affine, 1 },
    { "pd__maxout_type", build_maxout, 1 },
    { "pd__resize_type", build_resize, 1 },
    { "pd__block_expand_type", build_block_expand, 2 },
    { "pd__cosine_type", build_cosine, 1 },
    { "pd__outer_type", build_outer, 1 },
    { "pd__bilinear_type", build_bilinear, 3 },
    { "pd__activation_type", build_activation, PD_ACT_COUNT },
    { "pd__prelu_type", build_prelu, 1 },
    { "pd__embedding_type", build_embedding, 1 },
    { "pd__gru_type", build_gru, 6 },
    { "pd__lstm_type", build_lstm, 4 },
    { "pd__attention_type", build_attention, 4 },
    { "pd__sequence_pool_type", build_sequence_pool, 3 },
    { "pd__sequence_max_type", build_sequence_max, 2 },
    { "pd__expand_type", build_expand, 1 },
    { "pd__memory_type", build_group, 4 },
    { "pd__move_type", build_group, 4 },
    { "pd__cross_entropy_type", build_cross_entropy, 3 },
    { "pd__binary_cross_entropy_type", build_binary_cross_entropy, 1 },
    { "pd__squared_error_type", build_squared_error, 1 },
    { "pd__huber_type", build_huber, 1 },
    { "pd__smooth_l1_type", build_smooth_l1, 1 },
    { "pd__huber_two_class_type", build_huber_two_class, 1 },
    { "pd__hinge_type", build_hinge, 1 },
    { "pd__rank_cost_type", build_rank_cost, 1 },
    { "pd__lambda_rank_type", build_lambda_rank, 2 },
    { "pd__sum_cost_type", build_sum_cost, 1 },
};

/* ---- samples ---- */

static double any_number(kind k, range r) {
    const double most = sizeof(pd_real) == 8 ? 1e300 : 1e36, least = sizeof(pd_real) == 8 ? 1e-310 : 1e-41;
    if (r == SHARES) return k == ZEROS ? 0 : uniform(0, 1);
    switch (k) {
    case HUGE_NUMBERS: return uniform(-most, most);
    case TINY: return uniform(-least, least);
    case ZEROS: return below(2) ? 0.0 : -0.0;
    case NOT_FINITE: return below(3) == 0 ? HUGE_VAL : below(2) ? -HUGE_VAL : (double)NAN;
    case USUAL:
    case KINDS: break;
    }
    return uniform(-1, 1);
}

static void add_row(problem *p, int input, kind k) {
    const pd_layer *x = p->inputs[input];
    const int64_t width = x->out.width;
    pd_status status = PD_OK;
    if (x->is_sparse) {
        int64_t columns[6], count = below(7);
        pd_real values[6];
        for (int64_t i = 0; i < count; i++) columns[i] = below(width), values[i] = (pd_real)uniform(-1, 1);
        status = pd_batch_add_sparse(p->all, input, columns, below(4) ? values : NULL, count);
    } else if (x->is_ids) {
        status = pd_batch_add_id(p->all, input, below(width));
    } else {
        pd_real *row = pd_batch_add_row(p->all, input);
        assert_non_null(row);
        for (int64_t i = 0; i < width; i++) row[i] = (pd_real)any_number(k, p->ranges[input]);
    }
    assert_int_equal(status, PD_OK);
}

/* The length of a sequence: none, one, some or many rows. */
static int64_t any_length(void) {
    int64_t which = below(6);
    return which == 0 ? 0 : which == 1 ? 1 : which == 2 ? 1 + below(20) : 1 + below(5);
}

static void add_samples(problem *p) {
    p->all = pd_batch_new(p->net);
    for (int s = 0; s < SAMPLES; s++) {
        const kind k = s < SAMPLES - KINDS + 1 ? USUAL : (kind)(s - (SAMPLES - KINDS));
        const int64_t rows = !p->sequence ? 1 : s == 0 ? 1 + below(3) : any_length();
        for (int i = 0; i < p->input_count; i++)
            for (int64_t r = 0; r < (p->inputs[i]->is_sequence ? rows : 1); r++) add_row(p, i, k);
        if (pd_batch_end_sample(p->all) != PD_OK) fail_msg("%s: %s", where, pd_error(p->net));
    }
}

/* Of all kinds, and such that sums cancel. */
static void fill_params(pd_net *net) {
    for (pd_param *q = pd_param_first(net); q; q = q->next) {
        pd_real *values = (pd_real *)malloc((size_t)q->size * sizeof *values);
        const bool variance = strstr(q->name, "running_var") != NULL;
        for (int64_t i = 0; i < q->size; i++)
            values[i] = (pd_real)(variance ? uniform(0.3, 2)
                                           : uniform(-1, 1) * (q->fan_in > 4 ? 3 / sqrt((double)q->fan_in) : 1));
        assert_int_equal(pd_param_set(q, values, q->size), PD_OK);
        free(values);
    }
}

/* ---- predictions, sample by sample ---- */

/* A sample's numbers in one layer. */
typedef struct answer {
    int64_t count;
    pd_real *numbers;
} answer;

static void free_answers(answer answers[SAMPLES][MOST_LAYERS]) {
    for (int s = 0; s < SAMPLES; s++)
        for (int k = 0; k < MOST_LAYERS; k++) {
            free(answers[s][k].numbers);
            answers[s][k].numbers = NULL;
        }
}

/* NaNs have more bits than are promised. */
static bool same_bits(const pd_real *a, const pd_real *b, int64_t count) {
    if (count == 0 || memcmp(a, b, (size_t)count * sizeof *a) == 0) return true;
    for (int64_t i = 0; i < count; i++)
        if (memcmp(a + i, b + i, sizeof *a) != 0 && (a[i] == a[i] || b[i] == b[i])) return false;
    return true;
}

static void compare(const answer *want, const pd_real *got, int64_t count, const pd_layer *l, int64_t sample,
                    const char *how) {
    if (count != want->count)
        fail_msg("%s, %s: \"%s\" has %lld numbers of sample %lld, expected %lld", where, how, l->name, (long long)count,
                 (long long)sample, (long long)want->count);
    if (same_bits(want->numbers, got, count)) return;
    for (int64_t i = 0; i < count; i++)
        if (!same_bits(want->numbers + i, got + i, 1))
            fail_msg("%s, %s: number %lld of %lld of \"%s\" (%s) of sample %lld is %.17g, alone it was %.17g", where,
                     how, (long long)i, (long long)count, l->name, l->type->name, (long long)sample, (double)got[i],
                     (double)want->numbers[i]);
}

/* The net's layers of numbers: the last one, or all, so that none folds. */
static int targets_of(pd_net *net, pd_layer *last, bool all, pd_layer *targets[MOST_LAYERS]) {
    int count = 0;
    targets[count++] = last;
    for (int i = 0; all && pd_layer_at(net, i); i++) {
        pd_layer *l = pd_layer_at(net, i);
        if (l == last || l->is_ids || inside_is_in_time(l)) continue;
        assert_true(count < MOST_LAYERS);
        targets[count++] = l;
    }
    return count;
}

/* Predicts these samples as one batch, and compares each one's answers, or keeps them if there are none yet. */
static void predict(problem *p, pd_layer *last, bool all, const int64_t *samples, int64_t count,
                    answer answers[SAMPLES][MOST_LAYERS], const char *how) {
    pd_layer *targets[MOST_LAYERS];
    int target_count = targets_of(p->net, last, all, targets);
    pd_batch *batch = pd_batch_new(p->net);
    for (int64_t i = 0; i < count; i++) assert_int_equal(pd_batch_copy_sample(batch, p->all, samples[i]), PD_OK);
    if (pd_forward(p->net, batch, PD_PREDICT, targets, target_count) != PD_OK)
        fail_msg("%s: %s", where, pd_error(p->net));
    for (int k = 0; k < target_count; k++) {
        int64_t rows, width;
        const pd_real *y = pd_output(targets[k], &rows, &width);
        const int64_t *starts = targets[k]->is_sequence ? targets[k]->out.starts : NULL;
        if (!y && count > 0) y = targets[k]->out.data; /* of no rows */
        for (int64_t i = 0; i < count; i++) {
            int64_t first = starts ? starts[i] : i, n = (starts ? starts[i + 1] - first : 1) * width;
            answer *a = &answers[samples[i]][k];
            if (a->numbers) {
                compare(a, y + first * width, n, targets[k], samples[i], how);
            } else {
                a->count = n;
                a->numbers = (pd_real *)malloc((size_t)(n + 1) * sizeof *a->numbers);
                if (n) memcpy(a->numbers, y + first * width, (size_t)n * sizeof *a->numbers);
            }
        }
    }
    pd_batch_free(batch);
}

static void shuffle(int64_t *order, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        int64_t k = below(i + 1);
        order[i] = order[k];
        order[k] = i;
    }
}

/* All samples in another order, in two parts, some of them several times in a larger batch, and one alone. */
static void predict_variously(problem *p, pd_layer *last, bool all, answer answers[SAMPLES][MOST_LAYERS]) {
    int64_t order[SAMPLES], many[3 * SAMPLES], cut = 1 + below(SAMPLES - 1), count = SAMPLES + below(2 * SAMPLES + 1);
    shuffle(order, SAMPLES);
    predict(p, last, all, order, SAMPLES, answers, "all");
    shuffle(order, SAMPLES);
    predict(p, last, all, order, cut, answers, "a part");
    predict(p, last, all, order + cut, SAMPLES - cut, answers, "the other part");
    for (int64_t i = 0; i < count; i++) many[i] = below(SAMPLES);
    predict(p, last, all, many, count, answers, "a larger batch");
    predict(p, last, all, many, 1, answers, "one sample");
}

static const pd_layer_type *types_met[TYPES];
static int types_met_count;

static void meet_types(pd_net *net) {
    for (int i = 0; pd_layer_at(net, i); i++) {
        const pd_layer_type *type = pd_layer_at(net, i)->type;
        int k = 0;
        while (k < types_met_count && types_met[k] != type) k++;
        assert_true(k < TYPES);
        types_met[k] = type;
        types_met_count += k == types_met_count;
    }
}

/* Net number so and so of a case, for so many threads; NULL if there is no such level here. */
static pd_layer *make(problem *p, const layer_case *c, int number, pd_simd level, int threads) {
    const uint64_t seed = (uint64_t)(1000 * (c - cases + 1) + number);
    pd_layer *last;
    memset(p, 0, sizeof *p);
    p->net = pd_net_new(&(pd_net_opts){ .seed = seed, .simd = level, .threads = threads });
    if (pd_error_status(p->net) != PD_OK && level > PD_SIMD_SCALAR) {
        pd_net_free(p->net);
        return NULL;
    }
    snprintf(where, sizeof where, "%s, seed %llu, level %d, %d threads", c->type, (unsigned long long)seed, (int)level,
             threads);
    random_seed(seed);
    p->number = number;
    p->large = number % 4 == 1;
    p->sequence = below(4) == 0;
    last = c->build(p);
    if (!last) fail_msg("%s: %s", where, pd_error(p->net));
    meet_types(p->net);
    fill_params(p->net);
    add_samples(p);
    return last;
}

/* Answers of each sample alone, by one thread, not frozen; compared with all other ways. What folds rounds otherwise than
   what does not, so there are two answers: all[1] with every layer a target. */
static void check(const layer_case *c, int number, pd_simd level) {
    answer answers[2][SAMPLES][MOST_LAYERS];
    const int several = 2 + number % 3;
    memset(answers, 0, sizeof answers);
    for (int threads = 1; threads <= several; threads += several - 1) {
        problem p;
        pd_layer *last = make(&p, c, number, level, threads);
        if (!last) return;
        for (int all = 0; all < 2 && threads == 1; all++)
            for (int64_t s = 0; s < SAMPLES; s++) predict(&p, last, all, &s, 1, answers[all], "alone");
        for (int frozen = 0; frozen < 2; frozen++) {
            if (frozen && pd_freeze(p.net) != PD_OK) fail_msg("%s: %s", where, pd_error(p.net));
            for (int all = 0; all < 2; all++)
                if (threads == 1 || (all + frozen + number / 4) % 2 == 0)
                    predict_variously(&p, last, all, answers[all]);
        }
        pd_batch_free(p.all);
        pd_net_free(p.net);
    }
    free_answers(answers[0]);
    free_answers(answers[1]);
}

static void test_every_layer(void **state) {
    const bool half = sizeof(pd_real) == 8; /* of the many: doubles take twice as long */
    (void)state;
    for (int i = 0; i < COUNT(cases); i++)
        for (int k = 0; k < rounds(cases[i].weight + 1); k++)
            for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++)
                if (asked_for(cases[i].type) && chosen() && !(half && (k / 4 + level) % 2 && k >= 4))
                    check(&cases[i], k, (pd_simd)level);
}

/* ---- products, with more than layers ask of them ---- */

static pd_real *any_numbers(int64_t count) {
    pd_real *x = (pd_real *)malloc((size_t)(count + 1) * sizeof *x);
    const kind k = below(4) ? USUAL : (kind)below(NOT_FINITE);
    for (int64_t i = 0; i < count; i++) x[i] = (pd_real)any_number(k, ANY);
    return x;
}

/* A product of m rows, and each of them as a product of its own. Factors are powers of two, as those of layers are (1, 0):
   others may be fused with one sum or the other, as the compiler likes, where it is allowed to. */
static void check_product(pd_device *d) {
    const int64_t m = 1 + below(15), n = below(2) ? any_width(&(problem){ 0 }) : 1 + below(400);
    const int64_t k = below(8) ? any_depth(&(problem){ 0 }) : 0;
    const bool ta = below(2), tb = below(2);
    const pd_real alpha = (pd_real)(below(2) ? 1 : -0.5), beta = (pd_real)(below(3) ? below(2) : -2);
    pd_real *a = any_numbers(m * k), *b = any_numbers(k * n), *c = any_numbers(m * n), *bias = any_numbers(n);
    pd_real *scale = any_numbers(n), *alone = any_numbers(m * n);
    const pd_epilogue after = { below(2) ? scale : NULL, NULL, bias, below(2) ? PD_LINEAR : PD_TANH, 0 };
    const pd_epilogue *end = below(3) ? NULL : &after;
    memcpy(alone, c, (size_t)(m * n) * sizeof *c);
    d->gemm(d, ta, tb, m, n, k, alpha, a, ta ? m : k, b, tb ? k : n, beta, c, n, end);
    for (int64_t i = 0; i < m; i++)
        d->gemm(d, ta, tb, 1, n, k, alpha, a + i * (ta ? 1 : k), ta ? m : k, b, tb ? k : n, beta, alone + i * n, n,
                end);
    for (int64_t i = 0; i < m * n; i++)
        if (!same_bits(c + i, alone + i, 1))
            fail_msg("%s: product %lldx%lldx%lld%s%s: number %lld is %.17g, of its row alone %.17g", where,
                     (long long)m, (long long)n, (long long)k, ta ? ", A transposed" : "", tb ? ", B transposed" : "",
                     (long long)i, (double)c[i], (double)alone[i]);
    free(a), free(b), free(c), free(bias), free(scale), free(alone);
}

static void test_products(void **state) {
    (void)state;
    for (int level = PD_SIMD_SCALAR; level < PD_SIMD_COUNT; level++)
        for (int i = 0; i < rounds(100); i++) {
            pd_net *net;
            if (!chosen()) continue;
            net = pd_net_new(&(pd_net_opts){ .simd = (pd_simd)level, .threads = 1 + i % 3 });
            snprintf(where, sizeof where, "seed %d, level %d", i, level);
            random_seed((uint64_t)i);
            if (pd_error_status(net) == PD_OK) check_product(inside_device(net));
            pd_net_free(net);
        }
}

/* ---- nothing is forgotten ---- */

static char *read_text(const char *path) {
    FILE *file = fopen(path, "rb");
    long size;
    char *text;
    if (!file) fail_msg("can't open %s: this runs in the repository's root", path);
    fseek(file, 0, SEEK_END);
    size = ftell(file);
    rewind(file);
    text = (char *)malloc((size_t)size + 1);
    assert_int_equal(fread(text, 1, (size_t)size, file), size);
    text[size] = 0;
    fclose(file);
    return text;
}

static bool in_name(char c) { return c == '_' || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); }

/* The name of a variable or function that stands at `text`; its length, 0 for none. */
static int name_at(const char *text, char name[100]) {
    int length = 0;
    while (in_name(text[length]) && length < 99) length++;
    memcpy(name, text, (size_t)length);
    name[length] = 0;
    return length;
}

static bool has_case(const char *type) {
    for (int i = 0; i < COUNT(cases); i++)
        if (strcmp(cases[i].type, type) == 0) return true;
    return false;
}

/* Does `name` stand in the text, behind `before` and as a whole? */
static bool stands(const char *text, const char *before, const char *name) {
    char whole[200], found[100];
    const size_t skip = strlen(before);
    snprintf(whole, sizeof whole, "%s%s", before, name);
    for (const char *at = strstr(text, whole); at; at = strstr(at + 1, whole))
        if (name_at(at + skip, found) && strcmp(found, name) == 0) return true;
    return false;
}

/* Variables that are types of layers end in _type, as those of evaluators do. Each has a case, and its net has the layer:
   there are as many types in the nets as in the text. */
static void test_no_type_is_forgotten(void **state) {
    char *text = read_text("paddle.h"), name[100];
    int types = 0;
    (void)state;
    for (const char *at = strstr(text, "pd__"); at; at = strstr(at + 4, "pd__")) {
        const int length = name_at(at, name);
        if (length < 5 || strcmp(name + length - 5, "_type") != 0 || at[length] == '(') continue;
        if (!has_case(name) && !stands(text, "pd_evaluator_type ", name))
            fail_msg("%s in paddle.h has no case in this test", name);
    }
    for (int i = 0; i < COUNT(cases); i++) {
        problem p;
        make(&p, &cases[i], 0, PD_SIMD_SCALAR, 1);
        pd_batch_free(p.all);
        pd_net_free(p.net);
        if (stands(text, "", cases[i].type)) types++;
        else fail_msg("%s is no longer in paddle.h", cases[i].type);
    }
    assert_int_equal(types_met_count, types);
    free(text);
}

static void test_no_builder_is_forgotten(void **state) {
    static const char begin[] = "PD_API pd_layer *";
    char *text = read_text("paddle.h"), *here = read_text("tests/test_one_answer.c"), name[100];
    int builders = 0;
    (void)state;
    for (const char *at = strstr(text, begin); at; at = strstr(at + 1, begin)) {
        name_at(at + sizeof begin - 1, name);
        if (strncmp(name, "pd_layer_", 9) == 0) continue; /* they find layers, or add any type */
        if (!stands(here, "", name)) fail_msg("%s of paddle.h is not in this test", name);
        builders++;
    }
    assert_true(builders > 40);
    free(text);
    free(here);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_type_is_forgotten),
        cmocka_unit_test(test_no_builder_is_forgotten),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_every_layer),
    };
    return run_group(tests, NULL, NULL);
}
