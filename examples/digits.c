/* digits.c - MIT-or-Unlicense - learns handwritten digits, saves the model, loads it again and predicts

   Data: examples/data/digits.csv, 1797 real digits of 8x8 pixels; every fifth is held out for the test.
   Expect: at least 98 % of the held-out digits right, after a few seconds.
   Build: cc -O2 -fopenmp digits.c -o digits -lm */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

/* The net is described in one place, for training and for using it. Returns the layer of the ten probabilities. */
static pd_layer *build(pd_net *net) {
    pd_layer *image = pd_image(net, "image", 1, 8, 8);
    pd_layer *conv1 = pd_conv(net, image, 16, 3, &(pd_conv_opts){ .name = "conv1", .pad = 1, .act = PD_RELU });
    pd_layer *conv2 = pd_conv(net, conv1, 32, 3, &(pd_conv_opts){ .name = "conv2", .pad = 1, .act = PD_RELU });
    pd_layer *pool = pd_pool(net, conv2, 2, &(pd_pool_opts){ .name = "pool" });
    pd_layer *drop = pd_dropout(net, pool, 0.25, NULL);
    return pd_fc(net, drop, 10, &(pd_fc_opts){ .name = "fc", .act = PD_SOFTMAX });
}

static int fail(pd_net *net) {
    fprintf(stderr, "%s\n", pd_error(net));
    pd_net_free(net);
    return 1;
}

static int guess(const pd_real *probabilities) {
    int best = 0;
    for (int i = 1; i < 10; i++)
        if (probabilities[i] > probabilities[best]) best = i;
    return best;
}

/* A digit as text, and what the net says. */
static void show(const pd_real *pixels, int64_t label, const pd_real *probabilities) {
    for (int y = 0; y < 8; y++) {
        for (int x = 0; x < 8; x++) {
            char ink = " .:-=+*#%@"[(int)(pixels[8 * y + x] * 9)];
            printf("%c%c", ink, ink);
        }
        if (y == 3)
            printf("   this is a %d, predicted %d (%.1f %%)", (int)label, guess(probabilities),
                   100 * (double)probabilities[guess(probabilities)]);
        printf("\n");
    }
    printf("\n");
}

int main(int argc, char **argv) {
    const char *data = argc > 1 ? argv[1] : "examples/data/digits.csv", *file = "digits.safetensors";
    double start = pd_seconds();

    pd_net *net = pd_net_new(NULL);
    pd_layer *output = build(net);
    pd_layer *label = pd_label(net, "label", 10);
    pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
    pd_eval_error(net, output, label, NULL);

    pd_reader_opts training = { .scale = 1.0 / 16, .fold = 0, .folds = 5, .not_fold = true };
    pd_reader_opts held_out = { .scale = 1.0 / 16, .fold = 0, .folds = 5 };
    pd_reader *train = pd_shuffle(net, pd_csv_reader(net, data, &training), 2000, 1);
    pd_reader *test = pd_csv_reader(net, data, &held_out);

    int64_t passes = 16;
    pd_schedule fall = { .kind = PD_SCHEDULE_COSINE, .a = (double)passes * 1437 };
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_adam(0.003), &(pd_trainer_opts){ .schedule = fall });
    if (!trainer) return fail(net);
    if (pd_train(trainer, train, passes, &(pd_train_opts){ .test = test, .progress = true }) != PD_OK ||
        pd_save(net, file) != PD_OK)
        return fail(net);

    /* As another program would: the same description, the saved numbers, all held-out digits. */
    pd_net *loaded = pd_net_new(NULL);
    pd_layer *probabilities = build(loaded);
    if (pd_load(loaded, file, NULL) != PD_OK) return fail(loaded);
    pd_batch *batch = pd_batch_new(net);
    test->reset(test, 0);
    test->next(test, batch, 1000);
    const pd_real *pixels = batch->slots[0].data, *p = pd_predict(probabilities, pixels, batch->samples);
    int64_t right = 0, images = p ? batch->samples : 0;
    for (int64_t i = 0; i < images; i++) {
        right += guess(p + 10 * i) == batch->slots[1].ids[i];
        if (i < 3) show(pixels + 64 * i, batch->slots[1].ids[i], p + 10 * i);
    }
    printf("digits: accuracy %.1f%% (%d held-out images), %.1f s\n", 100.0 * (double)right / (double)images,
           (int)images, pd_seconds() - start);

    pd_batch_free(batch);
    pd_net_free(loaded);
    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return 0;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
