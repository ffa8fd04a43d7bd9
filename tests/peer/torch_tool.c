/* torch_tool NET IN OUT rows=N [NAME=VALUE ..]                   outputs and gradients of a net or a single layer
   torch_tool NET IN OUT rows=N optimizer=KIND [NAME=VALUE ..]    losses and parameters of `steps` steps on `batches`
   batches. For test_torch.py, which knows the nets as well and names their options. Files are raw numbers of type
   pd_real. IN holds the parameters in order of creation, then the batches, each sample by sample, with the inputs side
   by side (ids as numbers; of a sequence as many rows as `lengths` says); with load=FILE, of an nn.GRU, no parameters.
   OUT, without an optimizer: the output y; then, for the cost sum(c y) with c the last input, the gradients of the
   inputs but targets ("t") and of the parameters. With one: the loss before each step, the parameters after the last,
   and the outputs when predicting for the first batch. */
#include "paddle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char **options;

/* What follows `NAME=` among the arguments, or NULL. */
static const char *option_text(const char *name) {
    size_t n = strlen(name);
    for (char **o = options; *o; o++)
        if (strncmp(*o, name, n) == 0 && (*o)[n] == '=') return *o + n + 1;
    return NULL;
}

/* 0, which is the library's word for the default, when not given. */
static double option(const char *name) {
    const char *text = option_text(name);
    return text ? atof(text) : 0;
}
static int64_t count(const char *name) { return (int64_t)option(name); }

/* ---- nets ---- */

static pd_layer *cnn(pd_net *net) {
    pd_layer *x = pd_image(net, "x", 4, 11, 9), *label = pd_label(net, "label", 10);
    x = pd_conv(net, x, 8, 3, &(pd_conv_opts){ .stride = 2, .pad = 1, .no_bias = true });
    x = pd_batch_norm(net, x, &(pd_batch_norm_opts){ .act = PD_RELU });
    x = pd_conv(net, x, 12, 3, &(pd_conv_opts){ .pad = 1, .groups = 4, .act = PD_RELU });
    x = pd_pool(net, x, 3, &(pd_pool_opts){ .stride = 2, .ceil = true });
    x = pd_conv_transpose(net, x, 6, 3, &(pd_conv_opts){ .stride = 2, .pad = 1, .groups = 2, .act = PD_TANH });
    x = pd_pool(net, x, 2, &(pd_pool_opts){ .method = PD_AVERAGE, .pad = 1 });
    x = pd_fc(net, x, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    return pd_cross_entropy(net, x, label, NULL);
}

/* The costs that compare numbers with numbers are options of one builder. */
static pd_layer *number_cost(pd_net *net, pd_layer *x, pd_layer *t) {
    const char *kind = option_text("cost") ? option_text("cost") : "";
    pd_cost_opts o = { .delta = option("delta") };
    if (strcmp(kind, "squared_error") == 0) return pd_squared_error(net, x, t, &o);
    if (strcmp(kind, "huber") == 0) return pd_huber(net, x, t, &o);
    if (strcmp(kind, "smooth_l1") == 0) return pd_smooth_l1(net, x, t, &o);
    if (strcmp(kind, "binary_cross_entropy") == 0) return pd_binary_cross_entropy(net, x, t, &o);
    return NULL;
}

static pd_layer *mlp(pd_net *net) {
    pd_layer *x = pd_vector(net, "x", 20), *t = pd_vector(net, "t", 5);
    x = pd_fc(net, x, 16, &(pd_fc_opts){ .act = PD_GELU });
    x = pd_layer_norm(net, x, NULL);
    x = pd_fc(net, x, 12, &(pd_fc_opts){ .act = PD_TANH });
    x = pd_fc(net, x, 10, &(pd_fc_opts){ .act = PD_SIGMOID });
    x = pd_fc(net, x, 8, &(pd_fc_opts){ .act = PD_LEAKY_RELU });
    x = pd_fc(net, x, 6, &(pd_fc_opts){ .act = PD_SOFTRELU });
    x = pd_fc(net, x, 5, &(pd_fc_opts){ .act = count("sigmoid") ? PD_SIGMOID : PD_LINEAR });
    return number_cost(net, x, t);
}

/* ---- sequences ---- */

static const int64_t lengths[] = { 4, 1, 7, 3, 7, 2 };

static pd_layer *embedding(pd_net *net) {
    pd_layer *ids = pd_sequence(pd_ids(net, "words", 40));
    return pd_embedding(net, ids, 5, &(pd_embedding_opts){ .weight.sparse = count("sparse") != 0 });
}
static pd_layer *gru(pd_net *net) {
    pd_layer *x = pd_sequence(pd_vector(net, "sequence", 5));
    return pd_gru(net, x, 4, &(pd_gru_opts){ .name = "gru", .reverse = count("reverse") != 0 });
}
/* `layers` on top of each other, of `ways` each: there, or there and back. What they begin with stands side by side. */
static pd_layer *lstm(pd_net *net) {
    pd_layer *x = pd_sequence(pd_vector(net, "sequence", 5));
    int64_t ways = count("ways"), states = 4 * ways * count("layers"), at = 0;
    pd_layer *h = pd_vector(net, "first", states), *c = pd_vector(net, "first_cell", states);
    while (at < states) {
        pd_layer *both[2];
        for (int way = 0; way < ways; way++, at += 4)
            both[way] = pd_lstm(net, x, 4,
                                &(pd_lstm_opts){ .reverse = way == 1,
                                                 .first = pd_slice(net, h, at, 4, NULL),
                                                 .first_cell = pd_slice(net, c, at, 4, NULL) });
        x = ways == 2 ? pd_concat(net, both, 2, NULL) : both[0];
    }
    return x;
}
static pd_layer *sequence_pool(pd_net *net) {
    pd_layer *x = pd_sequence(pd_vector(net, "sequence", 5));
    return pd_sequence_pool(net, x, (pd_pool_method)count("method"), NULL);
}

/* There and back over words, for a class of each sentence. */
static pd_layer *rnn(pd_net *net) {
    pd_layer *x = embedding(net), *label = pd_label(net, "label", 3), *ends[2];
    ends[0] = pd_sequence_pool(net, pd_gru(net, x, 4, NULL), PD_LAST, NULL);
    ends[1] = pd_sequence_pool(net, pd_gru(net, x, 4, &(pd_gru_opts){ .reverse = true }), PD_FIRST, NULL);
    return pd_cross_entropy(net, pd_fc_sum(net, ends, 2, 3, NULL), label, NULL);
}

/* ---- single layers: images are 4x9x7, vectors 6 ---- */

static pd_layer *image(pd_net *net) { return pd_image(net, "x", 4, 9, 7); }

static pd_conv_opts conv_options(void) {
    return (pd_conv_opts){ .filter_h = count("filter_h"),
                           .stride = count("stride"),
                           .stride_h = count("stride_h"),
                           .pad = count("pad"),
                           .pad_h = count("pad_h"),
                           .dilation = count("dilation"),
                           .dilation_h = count("dilation_h"),
                           .groups = count("groups") };
}
static pd_layer *conv(pd_net *net) {
    pd_conv_opts o = conv_options();
    return pd_conv(net, image(net), count("filters"), count("filter"), &o);
}
static pd_layer *conv_transpose(pd_net *net) {
    pd_conv_opts o = conv_options();
    return pd_conv_transpose(net, image(net), count("filters"), count("filter"), &o);
}
static pd_layer *pool(pd_net *net) {
    pd_pool_opts o = { .method = count("average") ? PD_AVERAGE : PD_MAX,
                       .size_h = count("size_h"),
                       .stride = count("stride"),
                       .pad = count("pad"),
                       .ceil = count("ceil") != 0 };
    return pd_pool(net, image(net), count("size"), &o);
}
static pd_layer *batch_norm(pd_net *net) {
    pd_batch_norm_opts o = { .use_running = count("use_running") != 0, .epsilon = option("epsilon") };
    return pd_batch_norm(net, image(net), &o);
}
static pd_layer *layer_norm(pd_net *net) { return pd_layer_norm(net, pd_vector(net, "x", 6), NULL); }
static pd_layer *group_norm(pd_net *net) { return pd_group_norm(net, image(net), count("groups"), NULL); }
static pd_layer *response_norm(pd_net *net) {
    pd_response_norm_opts o = {
        .size = count("size"), .alpha = option("alpha"), .beta = option("beta"), .k = option("k")
    };
    return pd_response_norm(net, image(net), &o);
}
static pd_layer *resize(pd_net *net) { return pd_resize(net, image(net), count("height"), count("width"), NULL); }
static pd_layer *prelu(pd_net *net) { return pd_prelu(net, image(net), NULL); }
static pd_layer *cosine(pd_net *net) {
    pd_layer *a = pd_vector(net, "a", 6), *b = pd_vector(net, "b", 6 * count("vectors"));
    return pd_cosine(net, a, b, 1, NULL);
}
static pd_layer *bilinear(pd_net *net) {
    pd_layer *a = pd_vector(net, "a", 6), *b = pd_vector(net, "b", 5);
    return pd_bilinear(net, a, b, 3, NULL);
}

/* ---- single costs ---- */

static pd_layer *cost(pd_net *net) {
    pd_layer *x = pd_vector(net, "x", 6), *t = pd_vector(net, "t", 6);
    return number_cost(net, count("sigmoid") ? pd_activation(net, x, PD_SIGMOID, NULL) : x, t);
}
static pd_layer *cross_entropy(pd_net *net) {
    static const double weights[6] = { 0.5, 2, 1, 3, 0.25, 1.5 };
    pd_layer *x = pd_vector(net, "x", 6), *label = pd_label(net, "label", 6);
    return pd_cross_entropy(net, x, label, &(pd_cost_opts){ .class_weights = count("weighted") ? weights : NULL });
}
static pd_layer *soft_cross_entropy(pd_net *net) {
    pd_layer *x = pd_vector(net, "x", 6), *t = pd_vector(net, "t", 6);
    return pd_cross_entropy(net, x, t, NULL);
}
static pd_layer *hinge(pd_net *net) {
    pd_layer *x = pd_vector(net, "x", 6), *label = pd_label(net, "label", 6);
    return pd_hinge(net, x, label, NULL);
}
static pd_layer *rank_cost(pd_net *net) {
    pd_layer *left = pd_vector(net, "left", 1), *right = pd_vector(net, "right", 1), *t = pd_vector(net, "t", 1);
    return pd_rank_cost(net, left, right, t, NULL);
}

static const struct {
    const char *name;
    pd_layer *(*build)(pd_net *net);
} nets[] = {
    { "cnn", cnn },
    { "mlp", mlp },
    { "conv", conv },
    { "conv_transpose", conv_transpose },
    { "pool", pool },
    { "batch_norm", batch_norm },
    { "layer_norm", layer_norm },
    { "group_norm", group_norm },
    { "response_norm", response_norm },
    { "resize", resize },
    { "prelu", prelu },
    { "cosine", cosine },
    { "bilinear", bilinear },
    { "cost", cost },
    { "cross_entropy", cross_entropy },
    { "soft_cross_entropy", soft_cross_entropy },
    { "hinge", hinge },
    { "rank_cost", rank_cost },
    { "embedding", embedding },
    { "gru", gru },
    { "lstm", lstm },
    { "sequence_pool", sequence_pool },
    { "rnn", rnn },
};

/* One of the above, or an activation by its name; NULL when it is neither. */
static pd_layer *build(pd_net *net, const char *name) {
#define TEXT(id, text, needs) text,
    static const char *const activations[] = { PD_ACTIVATIONS(TEXT) };
    for (size_t i = 0; i < sizeof nets / sizeof *nets; i++)
        if (strcmp(nets[i].name, name) == 0) return nets[i].build(net);
    for (int i = 0; i < PD_ACT_COUNT; i++)
        if (strcmp(activations[i], name) == 0)
            return pd_activation(net, pd_vector(net, "x", 6), (pd_act)i,
                                 &(pd_activation_opts){ .alpha = option("alpha") });
    return NULL;
}

/* ---- files ---- */

static FILE *in, *out;
static pd_real numbers[1 << 16];

static void fail(const char *text) {
    fprintf(stderr, "%s\n", text);
    exit(1);
}

static const pd_real *read_numbers(int64_t n) {
    if (n > (int64_t)(sizeof numbers / sizeof *numbers) || fread(numbers, sizeof *numbers, (size_t)n, in) != (size_t)n)
        fail("the input file is too short");
    return numbers;
}

static void write_numbers(const pd_real *x, int64_t n) {
    if (!x || fwrite(x, sizeof *x, (size_t)n, out) != (size_t)n) fail("numbers could not be had or written");
}

/* Of a net that is one recurrent unit, from a file of PyTorch's: see FILES in paddle.h. */
static void load_gru(pd_net *net, const char *path) {
    static const pd_load_map map[] = { { "weight_ih_l0", "gru.weight", true, "rzn->zrn", false },
                                       { "weight_hh_l0", "gru.recurrent", true, "rzn->zrn", false },
                                       { "bias_ih_l0", "gru.bias", false, "rzn->zrn", false },
                                       { "bias_hh_l0", "gru.bias", false, "rzn->zr-", true },
                                       { "bias_hh_l0", "gru.recurrent_bias", false, "rzn->n", false } };
    if (pd_load(net, path, &(pd_load_opts){ .map = map, .map_count = 5 }) != PD_OK) fail(pd_error(net));
}

static void read_params(pd_net *net) {
    if (option_text("load")) {
        load_gru(net, option_text("load"));
        return;
    }
    for (pd_param *p = pd_param_first(net); p; p = p->next) pd_param_set(p, read_numbers(p->size), p->size);
}

static void write_params(pd_net *net) {
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        pd_param_get(p, numbers, p->size);
        write_numbers(numbers, p->size);
    }
}

static void write_output(pd_layer *layer) {
    int64_t rows, width;
    const pd_real *y = pd_output(layer, &rows, &width);
    write_numbers(y, y ? rows * width : 0);
}

static pd_batch *read_batch(pd_net *net) {
    pd_batch *batch = pd_batch_new(net);
    if (!batch) fail(pd_error(net));
    for (int64_t r = 0; r < count("rows"); r++) {
        for (int k = 0; k < batch->slot_count; k++)
            for (int64_t left = batch->slots[k].sequence ? lengths[r] : 1; left > 0; left--) {
                const pd_slot *slot = &batch->slots[k];
                bool ids = slot->kind == PD_SLOT_IDS;
                const pd_real *x = read_numbers(ids ? 1 : slot->width);
                pd_real *row = ids ? NULL : pd_batch_add_row(batch, k);
                if (row) memcpy(row, x, (size_t)slot->width * sizeof *x);
                if (ids) pd_batch_add_id(batch, k, (int64_t)*x);
            }
        if (pd_batch_end_sample(batch) != PD_OK) fail(batch->error.text);
    }
    return batch;
}

/* ---- the two commands ---- */

static bool is_input(const pd_layer *layer) { return layer->input_count == 0 && !layer->is_ids; }

static pd_status gradients(pd_net *net, pd_layer *y) {
    pd_layer *c = pd_image(net, "c", y->shape.channels, y->shape.height, y->shape.width), *layer;
    pd_layer *total = pd_sum_cost(net, pd_multiply(net, y, y->is_sequence ? pd_sequence(c) : c, NULL), NULL);
    pd_batch *batch;
    pd_status status;
    for (int i = 0; (layer = pd_layer_at(net, i)); i++)
        if (is_input(layer) && layer != c && strcmp(layer->name, "t") != 0) pd_want_gradient(layer);
    read_params(net);
    batch = read_batch(net);
    status = pd_zero_grads(net);
    if (status == PD_OK) status = pd_forward(net, batch, PD_TRAIN, &total, 1);
    if (status == PD_OK) write_output(y);
    if (status == PD_OK) status = pd_backward(net, total);
    for (int i = 0; status == PD_OK && (layer = pd_layer_at(net, i)); i++)
        if (is_input(layer) && layer->out.grad) write_numbers(layer->out.grad, layer->out.rows * layer->out.width);
    for (pd_param *p = pd_param_first(net); status == PD_OK && p; p = p->next) {
        if (p->is_buffer) continue;
        status = pd_param_get_grad(p, numbers, p->size);
        if (status == PD_OK) write_numbers(numbers, p->size);
    }
    pd_batch_free(batch);
    return status;
}

static pd_optimizer make_optimizer(const char *kind) {
    double rate = option("rate"), momentum = option("momentum");
    pd_optimizer o = strcmp(kind, "momentum") == 0   ? pd_momentum(rate, momentum)
                     : strcmp(kind, "nesterov") == 0 ? pd_nesterov(rate, momentum)
                     : strcmp(kind, "adagrad") == 0  ? pd_adagrad(rate)
                     : strcmp(kind, "adadelta") == 0 ? pd_adadelta(rate)
                     : strcmp(kind, "rmsprop") == 0  ? pd_rmsprop(rate)
                     : strcmp(kind, "adam") == 0     ? pd_adam(rate)
                     : strcmp(kind, "adamw") == 0    ? pd_adamw(rate)
                     : strcmp(kind, "adamax") == 0   ? pd_adamax(rate)
                     : strcmp(kind, "sgd") == 0      ? pd_sgd(rate)
                                                     : pd_sgd(-1); /* refused by the trainer */
    o.momentum = momentum;
    o.centered = count("centered") != 0;
    if (option("epsilon") > 0) o.epsilon = option("epsilon");
    return o;
}

static pd_status train(pd_net *net, pd_layer *y) {
    enum { MOST = 16 };
    pd_batch *batches[MOST];
    pd_trainer_opts opts = { .l2 = option("l2"), .clip_norm = option("clip_norm"), .clip_value = option("clip_value") };
    pd_trainer *trainer = pd_trainer_new(net, y, make_optimizer(option_text("optimizer")), &opts);
    pd_status status = trainer ? PD_OK : PD_E_ARGUMENT;
    int64_t n = count("batches");
    if (n < 1 || n > MOST) fail("expected 1 to 16 batches");
    read_params(net);
    for (int64_t i = 0; i < n; i++) batches[i] = read_batch(net);
    for (int64_t i = 0; status == PD_OK && i < count("steps"); i++) {
        double mean = 0;
        pd_real loss;
        status = pd_train_batch(trainer, batches[i % n], &mean);
        loss = (pd_real)mean;
        write_numbers(&loss, 1);
    }
    if (status == PD_OK) write_params(net);
    if (status == PD_OK) status = pd_forward(net, batches[0], PD_PREDICT, &y, 1);
    if (status == PD_OK) write_output(y);
    for (int64_t i = 0; i < n; i++) pd_batch_free(batches[i]);
    pd_trainer_free(trainer);
    return status;
}

int main(int argc, char **argv) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *y;
    pd_status status;
    if (argc < 4) fail("torch_tool NET IN OUT [NAME=VALUE ..]");
    options = argv + 4;
    in = fopen(argv[2], "rb");
    out = fopen(argv[3], "wb");
    if (!in || !out) fail("a file could not be opened");
    y = build(net, argv[1]);
    if (!y) fail(*pd_error(net) ? pd_error(net) : "there is no net of that name");
    status = option_text("optimizer") ? train(net, y) : gradients(net, y);
    if (status != PD_OK) fail(pd_error(net));
    if (fgetc(in) != EOF) fail("the input file is too long");
    if (fclose(out) != 0) fail("the output file could not be written");
    fclose(in);
    pd_net_free(net);
    return 0;
}
