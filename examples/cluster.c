/* cluster.c - MIT-or-Unlicense - learns the digits of digits.c on several processes or hosts, then predicts in one

   Data: examples/data/digits.csv, 1797 real digits of 8x8 pixels; every fifth is held out for the test.
   Expect: at least 98 % of the held-out digits right, with up to 4 processes or so: a step takes 8 samples of each, and
   larger steps need other learning rates.
   Build: mpicc -O2 -fopenmp cluster.c -o cluster -lm
   Run: mpiexec -n 4 ./cluster; on hosts: mpiexec -f hosts -n 4 ./cluster */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"
#include "../paddle_mpi.c"

static pd_layer *build(pd_net *net) {
    pd_layer *image = pd_image(net, "image", 1, 8, 8);
    pd_layer *conv1 = pd_conv(net, image, 16, 3, &(pd_conv_opts){ .name = "conv1", .pad = 1, .act = PD_RELU });
    pd_layer *conv2 = pd_conv(net, conv1, 32, 3, &(pd_conv_opts){ .name = "conv2", .pad = 1, .act = PD_RELU });
    pd_layer *pool = pd_pool(net, conv2, 2, &(pd_pool_opts){ .name = "pool" });
    pd_layer *drop = pd_dropout(net, pool, 0.25, NULL);
    return pd_fc(net, drop, 10, &(pd_fc_opts){ .name = "fc", .act = PD_SOFTMAX });
}

/* As another program would: a net without a trainer, the saved numbers, all held-out digits. */
static pd_status predict(const char *data, const char *file) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *probabilities = build(net);
    pd_label(net, "label", 10);
    pd_reader *held_out = pd_csv_reader(net, data, &(pd_reader_opts){ .scale = 1.0 / 16, .fold = 0, .folds = 5 });
    pd_batch *batch = pd_batch_new(net);
    pd_status status = pd_load(net, file, NULL);
    if (status == PD_OK && held_out && batch) {
        held_out->next(held_out, batch, 1000);
        const pd_real *p = pd_predict(probabilities, batch->slots[0].data, batch->samples);
        int64_t right = 0, images = p ? batch->samples : 0;
        for (int64_t i = 0; i < images; i++) {
            int best = 0;
            for (int k = 1; k < 10; k++)
                if (p[10 * i + k] > p[10 * i + best]) best = k;
            right += best == batch->slots[1].ids[i];
        }
        printf("cluster: accuracy %.1f%% (%d held-out images)\n", 100.0 * (double)right / (double)images, (int)images);
    }
    if (pd_error(net)[0]) fprintf(stderr, "%s\n", pd_error(net));
    pd_batch_free(batch);
    pd_reader_free(held_out);
    pd_net_free(net);
    return status;
}

int main(int argc, char **argv) {
    const char *data = argc > 1 ? argv[1] : "examples/data/digits.csv", *file = "cluster.safetensors";
    char why[256];
    pd_updater *mpi = pd_mpi_new(NULL, why, sizeof why);
    if (!mpi) return fprintf(stderr, "%s\n", why), 1;
    int rank = pd_mpi_rank(mpi), ranks = pd_mpi_ranks(mpi);

    /* Each rank drops out other places, so it has a seed of its own; first values come from rank 0. */
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = (uint64_t)rank });
    pd_layer *output = build(net);
    pd_layer *label = pd_label(net, "label", 10);
    pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
    pd_eval_error(net, output, label, NULL);

    /* Every rank takes its share of the samples, of those for the test too. The shuffle has the same seed on all. */
    pd_reader_opts training = { .scale = 1.0 / 16, .fold = 0, .folds = 5, .not_fold = true };
    pd_reader_opts held_out = { .scale = 1.0 / 16, .fold = 0, .folds = 5 };
    pd_reader *train = pd_shuffle(net, pd_csv_reader(net, data, &training), 2000, 1);
    pd_reader *test = pd_csv_reader(net, data, &held_out);
    if (train) pd_reader_shard(train, rank, ranks);
    if (test) pd_reader_shard(test, rank, ranks);

    int64_t passes = 16;
    pd_schedule fall = { .kind = PD_SCHEDULE_COSINE, .a = (double)passes * 1437 };
    pd_trainer *trainer =
        pd_trainer_new(net, cost, pd_adam(0.003), &(pd_trainer_opts){ .schedule = fall, .updater = mpi });
    pd_status status = trainer ? PD_OK : pd_error_status(net);
    if (status == PD_OK)
        status =
            pd_train(trainer, train, passes, &(pd_train_opts){ .batch_size = 8, .test = test, .progress = rank == 0 });
    if (status == PD_OK && rank == 0) status = pd_save(net, file);
    if (status != PD_OK) fprintf(stderr, "rank %d: %s\n", rank, pd_error(net));

    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    if (status == PD_OK && rank == 0) status = predict(data, file);
    pd_mpi_exit(mpi, status != PD_OK);
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
