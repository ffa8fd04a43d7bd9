/* lenet.c - MIT-or-Unlicense - LeNet on MNIST, or Fashion-MNIST, in their original IDX files

   Data: the four files, unpacked; the argument is the directory they are in (default: here). Debian's package
   dataset-fashion-mnist has those of Fashion-MNIST.
   Expect: of Fashion-MNIST 90.9 % of the 10,000 test images right after five passes, which took 49 s on two cores with
   AVX-512. MNIST's 60,000 digits have not been tried.
   Usage: lenet [directory [passes]] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

/* A reader of DIRECTORY/KIND-images-idx3-ubyte and its labels. */
static pd_reader *digits(pd_net *net, const char *directory, const char *kind) {
    char images[1024], labels[1024];
    const char *files[2] = { images, labels };
    snprintf(images, sizeof images, "%s/%s-images-idx3-ubyte", directory, kind);
    snprintf(labels, sizeof labels, "%s/%s-labels-idx1-ubyte", directory, kind);
    return pd_idx_reader(net, files, 2, &(pd_reader_opts){ .scale = 1 / 255.0 });
}

int main(int argc, char **argv) {
    const char *directory = argc > 1 ? argv[1] : ".";
    int64_t passes = argc > 2 ? atoll(argv[2]) : 3;

    pd_net *net = pd_net_new(NULL);
    pd_layer *image = pd_image(net, "image", 1, 28, 28);
    pd_layer *label = pd_label(net, "label", 10);
    pd_layer *conv1 = pd_conv(net, image, 20, 5, &(pd_conv_opts){ .name = "conv1", .act = PD_RELU });
    pd_layer *pool1 = pd_pool(net, conv1, 2, NULL);
    pd_layer *conv2 = pd_conv(net, pool1, 50, 5, &(pd_conv_opts){ .name = "conv2", .act = PD_RELU });
    pd_layer *pool2 = pd_pool(net, conv2, 2, NULL);
    pd_layer *fc1 = pd_fc(net, pool2, 500, &(pd_fc_opts){ .name = "fc1", .act = PD_RELU });
    pd_layer *fc2 = pd_fc(net, fc1, 10, &(pd_fc_opts){ .name = "fc2", .act = PD_SOFTMAX });
    pd_layer *cost = pd_cross_entropy(net, fc2, label, NULL);
    pd_evaluator *error = pd_eval_error(net, fc2, label, NULL);

    pd_reader *train = pd_prefetch(net, pd_shuffle(net, digits(net, directory, "train"), 60000, 1), 2);
    pd_reader *test = digits(net, directory, "t10k");
    pd_schedule fall = { .kind = PD_SCHEDULE_COSINE, .a = (double)passes * 60000 };
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_adam(0.001), &(pd_trainer_opts){ .schedule = fall });
    pd_status status =
        pd_train(trainer, train, passes, &(pd_train_opts){ .batch_size = 64, .test = test, .progress = true });
    if (status == PD_OK) status = pd_save(net, "lenet.safetensors");
    if (status == PD_OK) printf("lenet: accuracy %.2f%%\n", 100 * (1 - pd_evaluator_value(error, 0)));
    else fprintf(stderr, "%s\n", pd_error(net));

    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return status != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
