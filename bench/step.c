/* step.c - MIT-or-Unlicense - milliseconds per training step (forward, backward, update) of small nets on made-up data

   Prints, for one thread and for all, lines `bench NAME threads N ours V ms`: the median over steps. */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Trains on one random batch and prints the median step. `cost` has a dense input in slot 0 and a label in slot 1. */
static void measure(const char *name, pd_net *net, pd_layer *cost, int threads, int64_t samples) {
    enum { STEPS = 31 };
    double times[STEPS];
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_momentum(0.01, 0.9), NULL);
    pd_batch *batch = pd_batch_new(net);
    for (int64_t i = 0; batch && i < samples; i++) {
        pd_real *row = pd_batch_add_row(batch, 0);
        for (int64_t k = 0; row && k < batch->slots[0].width; k++)
            row[k] = (pd_real)(pd_random((uint64_t)i, (uint64_t)k) >> 40) / (1 << 24);
        pd_batch_add_id(batch, 1, i % 10);
        pd_batch_end_sample(batch);
    }
    for (int i = 0; trainer && batch && i < STEPS; i++) {
        double start = pd_seconds();
        if (pd_train_batch(trainer, batch, NULL) != PD_OK) break;
        times[i] = 1e3 * (pd_seconds() - start);
    }
    if (pd_error_status(net) != PD_OK) {
        fprintf(stderr, "%s: %s\n", name, pd_error(net));
    } else {
        qsort(times, STEPS, sizeof *times, compare);
        printf("bench %s threads %d ours %.3f ms\n", name, threads, times[STEPS / 2]);
    }
    pd_batch_free(batch);
    pd_trainer_free(trainer);
}

static void digits(int threads) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *image = pd_image(net, "image", 1, 8, 8);
    pd_layer *conv1 = pd_conv(net, image, 16, 3, &(pd_conv_opts){ .pad = 1, .act = PD_RELU });
    pd_layer *conv2 = pd_conv(net, conv1, 32, 3, &(pd_conv_opts){ .pad = 1, .act = PD_RELU });
    pd_layer *fc = pd_fc(net, pd_pool(net, conv2, 2, NULL), 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    measure("digits-b32", net, pd_cross_entropy(net, fc, pd_label(net, "label", 10), NULL), threads, 32);
    pd_net_free(net);
}

static void mlp(int threads) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *hidden = pd_fc(net, pd_vector(net, "input", 784), 512, &(pd_fc_opts){ .act = PD_RELU });
    hidden = pd_fc(net, hidden, 512, &(pd_fc_opts){ .act = PD_RELU });
    hidden = pd_fc(net, hidden, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    measure("mlp-784-512-512-10-b128", net, pd_cross_entropy(net, hidden, pd_label(net, "label", 10), NULL), threads,
            128);
    pd_net_free(net);
}

int main(void) {
    char info[256];
    pd_net *net = pd_net_new(NULL);
    pd_info(net, info, sizeof info);
    pd_net_free(net);
    printf("%s\n", info);
    for (int threads = 1; threads <= 2; threads++) {
        digits(threads);
        mlp(threads);
    }
    return 0;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
