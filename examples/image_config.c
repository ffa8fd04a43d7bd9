/* image_config.c - MIT-or-Unlicense - the image configuration of Baidu's talk at Spark Summit 2016, as C

   3x224x224 -> conv 8 filters 7x7 stride 2, relu -> max pool 16 stride 8 -> fc 1000, softmax; gradients summed over the
   batch of 128 as at the time: learning rate 0.02/128, decay 0.0005*128, momentum 0.9.
   Data: made up as it goes (the talk used ImageNet): noise with a coloured square whose place and colour give the class.
   Expect: the cost of a batch begins near 6.91 = log 1000, and a table of where the time went; some seconds per batch.
   Usage: image_config [batches, default 5] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

/* One image and its class, 0 .. 999: ten by ten places, ten colours. */
static pd_status next_image(void *user, pd_batch *batch) {
    uint64_t *count = (uint64_t *)user;
    uint64_t key = pd_random(2016, (*count)++);
    int64_t label = (int64_t)(key % 1000), left = label % 10 * 22, top = label / 10 % 10 * 22, colour = label / 100;
    pd_real *pixel = pd_batch_add_row(batch, 0);
    if (!pixel) return batch->error.status;
    for (int64_t c = 0; c < 3; c++)
        for (int64_t y = 0; y < 224; y++)
            for (int64_t x = 0; x < 224; x++) {
                bool inside = x >= left && x < left + 26 && y >= top && y < top + 26;
                double noise = (double)(pd_random(key, (uint64_t)((c * 224 + y) * 224 + x)) >> 40) / (1 << 24);
                *pixel++ = (pd_real)(0.2 * noise + (inside ? (double)((colour + 1) >> c & 1) - 0.5 : 0));
            }
    return pd_batch_add_id(batch, 1, label);
}

static int on_event(void *user, const pd_event *event) {
    const int64_t *batches = (const int64_t *)user;
    if (event->kind != PD_END_BATCH) return 0;
    printf("batch %lld: cost %.3f\n", (long long)event->batch, event->cost);
    return event->batch + 1 >= *batches;
}

int main(int argc, char **argv) {
    int64_t batches = argc > 1 ? atoll(argv[1]) : 5;
    uint64_t count = 0;
    static char table[8192];

    pd_net *net = pd_net_new(NULL);
    pd_layer *image = pd_image(net, "image", 3, 224, 224);
    pd_layer *label = pd_label(net, "label", 1000);
    pd_layer *conv =
        pd_conv(net, image, 8, 7,
                &(pd_conv_opts){ .name = "conv", .stride = 2, .act = PD_RELU, .weight.init = pd_normal(0, 0.059) });
    pd_layer *pool = pd_pool(net, conv, 16, &(pd_pool_opts){ .name = "pool", .method = PD_MAX, .stride = 8 });
    pd_layer *fc =
        pd_fc(net, pool, 1000, &(pd_fc_opts){ .name = "fc", .act = PD_SOFTMAX, .weight.init = pd_normal(0, 0.001) });
    pd_layer *cost = pd_cross_entropy(net, fc, label, NULL);

    pd_trainer_opts options = { .l2 = 0.0005 * 128, .sum_gradients = true };
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_momentum(0.02 / 128, 0.9), &options);
    pd_reader *reader = pd_stream_reader(net, next_image, NULL, &count);
    pd_status status =
        pd_train(trainer, reader, 1, &(pd_train_opts){ .batch_size = 128, .on_event = on_event, .user = &batches });
    if (status != PD_OK && status != PD_STOPPED) fprintf(stderr, "%s\n", pd_error(net));
    pd_profile(trainer, table, sizeof table);
    printf("%s", table);

    pd_reader_free(reader);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return status != PD_OK && status != PD_STOPPED;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
