/* nets.c - MIT-or-Unlicense - makes training steps or predictions of well-known nets when told to, and says how long

   nets NAME BATCH THREADS train|predict builds a net and prints a line on it and one with the number of its
   parameters. Then, for each line `N` on standard input, it makes N steps (forward, backward and momentum update, or
   predictions) on one made-up batch, and answers with the seconds of one and the bytes of pd_net_bytes. bench/nets.py and
   bench/inference.py talk to it, and have the same nets of the other side do the same by turns. */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pd_layer *conv(pd_net *net, pd_layer *x, int64_t filters, int64_t size, int64_t stride, int64_t pad,
                      int64_t groups) {
    return pd_conv(net, x, filters, size,
                   &(pd_conv_opts){ .stride = stride, .pad = pad, .groups = groups, .act = PD_RELU });
}

static pd_layer *pool(pd_net *net, pd_layer *x, int64_t size, int64_t stride, int64_t pad) {
    return pd_pool(net, x, size, &(pd_pool_opts){ .stride = stride, .pad = pad });
}

static pd_layer *fc(pd_net *net, pd_layer *x, int64_t size, pd_act act) {
    return pd_fc(net, x, size, &(pd_fc_opts){ .act = act });
}

/* Krizhevsky et al. 2012: in 2 groups as there; in 1, as it was in the benchmarks of 2016. */
static pd_layer *alexnet(pd_net *net, int64_t groups) {
    pd_layer *x = conv(net, pd_image(net, "image", 3, 227, 227), 96, 11, 4, 0, 1);
    x = pool(net, pd_response_norm(net, x, NULL), 3, 2, 0);
    x = conv(net, x, 256, 5, 1, 2, groups);
    x = pool(net, pd_response_norm(net, x, NULL), 3, 2, 0);
    x = conv(net, x, 384, 3, 1, 1, 1);
    x = conv(net, x, 384, 3, 1, 1, groups);
    x = pool(net, conv(net, x, 256, 3, 1, 1, groups), 3, 2, 0);
    x = pd_dropout(net, fc(net, x, 4096, PD_RELU), 0.5, NULL);
    x = pd_dropout(net, fc(net, x, 4096, PD_RELU), 0.5, NULL);
    return fc(net, x, 1000, PD_SOFTMAX);
}

static pd_layer *conv_norm(pd_net *net, pd_layer *x, int64_t filters, int64_t size, int64_t stride, int64_t pad,
                           pd_act act) {
    x = pd_conv(net, x, filters, size, &(pd_conv_opts){ .stride = stride, .pad = pad, .no_bias = true });
    return pd_batch_norm(net, x, &(pd_batch_norm_opts){ .act = act });
}

/* He et al. 2016. */
static pd_layer *resnet18(pd_net *net) {
    pd_layer *x = conv_norm(net, pd_image(net, "image", 3, 224, 224), 64, 7, 2, 3, PD_RELU);
    x = pool(net, x, 3, 2, 1);
    for (int i = 0; i < 8; i++) {
        int64_t filters = 64 << (i / 2), stride = i > 0 && i % 2 == 0 ? 2 : 1;
        pd_layer *sum[2] = { x, x };
        if (stride > 1) sum[0] = conv_norm(net, x, filters, 1, stride, 0, PD_LINEAR);
        sum[1] = conv_norm(net, x, filters, 3, stride, 1, PD_RELU);
        sum[1] = conv_norm(net, sum[1], filters, 3, 1, 1, PD_LINEAR);
        x = pd_add(net, sum, 2, &(pd_layer_opts){ .act = PD_RELU });
    }
    x = pd_pool(net, x, 7, &(pd_pool_opts){ .method = PD_AVERAGE });
    return fc(net, x, 1000, PD_SOFTMAX);
}

/* Six 3x3 convolutions in the manner of Simonyan and Zisserman 2015. */
static pd_layer *vgg(pd_net *net) {
    pd_layer *x = pd_image(net, "image", 3, 64, 64);
    for (int64_t filters = 64; filters <= 256; filters *= 2) {
        x = conv(net, x, filters, 3, 1, 1, 1);
        x = pool(net, conv(net, x, filters, 3, 1, 1, 1), 2, 2, 0);
    }
    return fc(net, x, 10, PD_SOFTMAX);
}

static pd_layer *mlp(pd_net *net) {
    pd_layer *x = fc(net, pd_vector(net, "input", 784), 512, PD_RELU);
    return fc(net, fc(net, x, 512, PD_RELU), 10, PD_SOFTMAX);
}

/* examples/digits.c */
static pd_layer *digits(pd_net *net) {
    pd_layer *x = conv(net, pd_image(net, "image", 1, 8, 8), 16, 3, 1, 1, 1);
    x = pool(net, conv(net, x, 32, 3, 1, 1, 1), 2, 2, 0);
    return fc(net, pd_dropout(net, x, 0.25, NULL), 10, PD_SOFTMAX);
}

/* Small ones, in which threads have little to do between two meetings. */
static pd_layer *small(pd_net *net) {
    pd_layer *x = conv_norm(net, pd_image(net, "image", 3, 16, 16), 16, 3, 1, 1, PD_RELU);
    x = pool(net, conv_norm(net, x, 32, 3, 1, 1, PD_RELU), 2, 2, 0);
    return fc(net, conv_norm(net, x, 32, 3, 1, 1, PD_RELU), 10, PD_SOFTMAX);
}

static pd_layer *gru(pd_net *net) {
    pd_layer *x = pd_gru(net, pd_sequence(pd_vector(net, "rows", 64)), 128, NULL);
    return fc(net, pd_sequence_pool(net, x, PD_LAST, NULL), 10, PD_SOFTMAX);
}

static pd_layer *build(pd_net *net, const char *name) {
    if (strcmp(name, "alexnet") == 0) return alexnet(net, 1);
    if (strcmp(name, "alexnet-groups") == 0) return alexnet(net, 2);
    if (strcmp(name, "resnet18") == 0) return resnet18(net);
    if (strcmp(name, "vgg") == 0) return vgg(net);
    if (strcmp(name, "mlp") == 0) return mlp(net);
    if (strcmp(name, "digits") == 0) return digits(net);
    if (strcmp(name, "small") == 0) return small(net);
    if (strcmp(name, "gru") == 0) return gru(net); /* train only */
    return NULL;
}

static int fail(pd_net *net) {
    fprintf(stderr, "nets: %s\n", pd_error(net));
    return 1;
}

int main(int argc, char **argv) {
    int64_t samples = argc == 5 ? atoi(argv[2]) : 0;
    int threads = argc == 5 ? atoi(argv[3]) : 0;
    bool training = argc == 5 && strcmp(argv[4], "train") == 0;
    if (samples < 1 || threads < 1) return fprintf(stderr, "usage: nets NAME BATCH THREADS train|predict\n"), 2;

    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *output = build(net, argv[1]);
    if (!output && pd_error_status(net) == PD_OK) return fprintf(stderr, "nets: no net %s\n", argv[1]), 2;
    pd_layer *label = pd_label(net, "label", output ? output->shape.channels : 1);
    pd_trainer *trainer = NULL;
    if (training) {
        pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
        trainer = pd_trainer_new(net, cost, pd_momentum(0.001, 0.9), NULL);
    }
    pd_batch *batch = pd_batch_new(net);
    for (int64_t i = 0; batch && i < samples; i++) {
        for (uint64_t r = 0; r < (batch->slots[0].sequence ? 20 : 1); r++) {
            pd_real *row = pd_batch_add_row(batch, 0);
            for (int64_t k = 0; row && k < batch->slots[0].width; k++)
                row[k] = (pd_real)(pd_random((uint64_t)i + (r << 32), (uint64_t)k) >> 40) / (1 << 24);
        }
        pd_batch_add_id(batch, 1, i % 10);
        pd_batch_end_sample(batch);
    }
    if (!batch || pd_error_status(net) != PD_OK || (!training && pd_freeze(net) != PD_OK)) return fail(net);

    char text[512];
    int64_t parameters = 0;
    for (pd_param *p = pd_param_first(net); p; p = p->next) parameters += p->is_buffer ? 0 : p->size;
    pd_info(net, text, sizeof text);
    printf("%s\n%lld\n", text, (long long)parameters);
    fflush(stdout);
    while (fgets(text, sizeof text, stdin)) {
        int steps = atoi(text);
        double start = pd_seconds();
        for (int i = 0; i < steps; i++) {
            bool ok = training ? pd_train_batch(trainer, batch, NULL) == PD_OK
                               : pd_predict(output, batch->slots[0].data, samples) != NULL;
            if (!ok) return fail(net);
        }
        printf("%.9f %zu\n", (pd_seconds() - start) / (steps ? steps : 1), pd_net_bytes(net));
        fflush(stdout);
    }
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return 0;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
