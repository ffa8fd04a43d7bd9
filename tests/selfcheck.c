/* What `make portability` runs under every toolchain: a small net checks its gradients, learns, and gives the same
   answers after it was saved and loaded. Takes the name of a file to write. C99 and C++11; no test framework. */
#define PADDLE_IMPLEMENTATION
#include "paddle.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SAMPLES = 96, SIDE = 6, PIXELS = SIDE * SIDE };
static pd_real images[SAMPLES * PIXELS];
static int64_t labels[SAMPLES];

/* Two kinds of image with noise: a bright row or a bright column. */
static void make_data(void) {
    for (int i = 0; i < SAMPLES; i++) {
        int where = (int)(pd_random(1, (uint64_t)i) % SIDE);
        labels[i] = i % 2;
        for (int p = 0; p < PIXELS; p++) {
            pd_real noise = (pd_real)((double)(pd_random(2, (uint64_t)(i * PIXELS + p)) % 1000) / 2000);
            images[i * PIXELS + p] = noise + (pd_real)((labels[i] ? p / SIDE : p % SIDE) == where);
        }
    }
}

typedef struct model {
    pd_net *net;
    pd_layer *output, *cost;
} model;

static model make_model(uint64_t seed) {
    model m;
    pd_net_opts net_opts;
    pd_conv_opts conv_opts;
    pd_pool_opts pool_opts;
    pd_fc_opts fc_opts;
    pd_layer *image, *label, *layer;
    memset(&net_opts, 0, sizeof net_opts);
    memset(&conv_opts, 0, sizeof conv_opts);
    memset(&pool_opts, 0, sizeof pool_opts);
    memset(&fc_opts, 0, sizeof fc_opts);
    net_opts.seed = seed;
    conv_opts.pad = 1;
    conv_opts.act = PD_TANH;
    pool_opts.method = PD_AVERAGE; /* a maximum has kinks, where differences in float are of no use */
    fc_opts.act = PD_SOFTMAX;
    m.net = pd_net_new(&net_opts);
    image = pd_image(m.net, "image", 1, SIDE, SIDE);
    label = pd_label(m.net, "label", 2);
    layer = pd_conv(m.net, image, 4, 3, &conv_opts);
    layer = pd_pool(m.net, layer, 2, &pool_opts);
    layer = pd_batch_norm(m.net, layer, NULL);
    m.output = pd_fc(m.net, layer, 2, &fc_opts);
    m.cost = pd_cross_entropy(m.net, m.output, label, NULL);
    pd_eval_error(m.net, m.output, label, NULL);
    return m;
}

static int fail(const char *what, pd_net *net) {
    printf("self-check failed: %s: %s\n", what, pd_error(net));
    return 1;
}

static int check_gradients(model m, pd_reader *reader) {
    pd_gradcheck result;
    pd_batch *batch = pd_batch_new(m.net);
    double bound = sizeof(pd_real) == sizeof(double) ? 1e-6 : 5e-3; /* differences in float are that coarse */
    int wrong = 0;
    if (!batch || reader->next(reader, batch, 8) != PD_OK) return fail("batch", m.net);
    if (pd_check_gradients(m.cost, batch, NULL, &result) != PD_OK) return fail("gradient check", m.net);
    if (result.all_zero || !(result.error < bound)) {
        printf("self-check failed: gradient of %s[%ld]: %g, by differences %g\n", result.worst,
               (long)result.worst_index, result.analytic, result.numeric);
        wrong = 1;
    }
    pd_batch_free(batch);
    return wrong;
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "selfcheck.safetensors";
    static pd_real before[SAMPLES * 2];
    char info[256];
    pd_array arrays[2];
    model a = make_model(1), b = make_model(2);
    pd_reader *reader;
    pd_trainer *trainer;
    double cost = -1, error;
    const pd_real *after;

    make_data();
    memset(arrays, 0, sizeof arrays);
    arrays[0].data = images;
    arrays[1].ids = labels;
    pd_info(a.net, info, sizeof info);
    printf("%s\n", info);

    reader = pd_array_reader(a.net, SAMPLES, arrays, 2);
    if (!reader) return fail("reader", a.net);
    if (check_gradients(a, reader)) return 1;
    reader = pd_prefetch(a.net, pd_shuffle(a.net, reader, SAMPLES, 3), 2);
    trainer = pd_trainer_new(a.net, a.cost, pd_adam(0.02), NULL);
    if (pd_train(trainer, reader, 20, NULL) != PD_OK) return fail("training", a.net);
    if (pd_test(trainer, reader, 32, &cost) != PD_OK) return fail("test", a.net);
    error = pd_evaluator_value(pd_evaluator_first(a.net), 0);
    printf("cost %.4f, error %.4f\n", cost, error);
    if (!(cost < 0.1) || !(error < 0.05)) return fail("it has not learned", a.net);

    if (pd_save(a.net, path) != PD_OK) return fail("saving", a.net);
    if (pd_load(b.net, path, NULL) != PD_OK) return fail("loading", b.net);
    after = pd_predict(a.output, images, SAMPLES);
    if (!after) return fail("predicting", a.net);
    memcpy(before, after, sizeof before);
    after = pd_predict(b.output, images, SAMPLES);
    if (!after) return fail("predicting", b.net);
    if (memcmp(before, after, sizeof before) != 0) return fail("other answers after loading", b.net);

    pd_trainer_free(trainer);
    pd_reader_free(reader);
    pd_net_free(a.net);
    pd_net_free(b.net);
    remove(path);
    printf("self-check ok\n");
    return 0;
}
