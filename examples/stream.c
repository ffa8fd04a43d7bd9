/* stream.c - MIT-or-Unlicense - learns from standard input for as long as that lasts, and keeps a snapshot

   Data: lines of numbers with a class last, e.g. from another program, or: cat examples/data/digits.csv | stream 64 10
   Expect: a line per 256 samples; the cost is that of samples never seen before, since each is used once. After every
   such line the model is saved, whole, to stream.safetensors, so the program may be killed at any time. If that file is
   there at the start, learning goes on from it.
   Usage: stream inputs classes [snapshot.safetensors] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

typedef struct progress {
    const char *file;
    double cost;
    int64_t batches;
} progress;

static int on_event(void *user, const pd_event *event) {
    progress *p = (progress *)user;
    pd_net *net = pd_trainer_net(event->trainer);
    if (event->kind != PD_END_BATCH) return 0;
    p->cost += event->cost;
    if (++p->batches < 16) return 0;
    printf("%lld samples, cost %.4f\n", (long long)event->samples, p->cost / 16);
    fflush(stdout);
    p->cost = 0;
    p->batches = 0;
    return pd_save(net, p->file) != PD_OK;
}

int main(int argc, char **argv) {
    progress p = { argc > 3 ? argv[3] : "stream.safetensors", 0, 0 };
    if (argc < 3) {
        fprintf(stderr, "usage: stream inputs classes [snapshot.safetensors]\n");
        return 2;
    }
    pd_net *net = pd_net_new(NULL);
    pd_layer *input = pd_vector(net, "input", atoll(argv[1]));
    pd_layer *label = pd_label(net, "label", atoll(argv[2]));
    pd_layer *norm = pd_batch_norm(net, input, NULL);
    pd_layer *hidden = pd_fc(net, norm, 128, &(pd_fc_opts){ .act = PD_RELU });
    pd_layer *output = pd_fc(net, hidden, atoll(argv[2]), &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_adagrad(0.02), NULL);
    pd_reader *reader = pd_csv_reader(net, "-", NULL);
    FILE *snapshot = fopen(p.file, "rb");
    pd_status status = PD_OK;

    if (snapshot) {
        fclose(snapshot);
        status = pd_load(net, p.file, NULL);
    }
    if (status == PD_OK)
        status = pd_train(trainer, reader, 1, &(pd_train_opts){ .batch_size = 16, .on_event = on_event, .user = &p });
    if (status == PD_OK) status = pd_save(net, p.file);
    if (status != PD_OK) fprintf(stderr, "%s\n", pd_error(net));

    pd_reader_free(reader);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return status != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
