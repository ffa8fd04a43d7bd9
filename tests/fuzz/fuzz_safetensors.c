/* Model files and checkpoints: loads one into a small net, walks every tensor, runs one forward, saves, and loads that.
   The first byte chooses; with its bit 0 set, the rest is a header's text for a file with as many bytes of data as the
   second byte says, so that mutations need not guess the lengths. */
#include "fuzz.h"

static pd_net *net;
static pd_layer *output;
static pd_trainer *trainer;

/* With `sparse` a table beside it, whose rows lag behind. */
static void make_net(bool sparse) {
    pd_layer *x, *label, *pair[2];
    net = pd_net_new(NULL);
    x = pd_vector(net, "x", 3);
    label = pd_label(net, "label", 2);
    output = pd_fc(net, x, 2, &(pd_fc_opts){ .name = "w", .no_bias = true, .weight.prune = 0.4 });
    if (sparse) {
        pair[0] = output;
        pair[1] =
            pd_embedding(net, pd_ids(net, "id", 3), 2, &(pd_embedding_opts){ .name = "t", .weight.sparse = true });
        output = pd_add(net, pair, 2, NULL);
    }
    trainer = pd_trainer_new(net, pd_cross_entropy(net, output, label, NULL), pd_momentum(0.1, 0.9),
                             &(pd_trainer_opts){ .average_window = sparse ? 0 : 0.5, .l2 = sparse ? 0.1 : 0 });
    if (!trainer) abort();
}

/* One prediction, and, for a table, steps. */
static void run(bool sparse) {
    static const pd_real x[3] = { 1, 2, 3 };
    pd_batch *batch = pd_batch_new(net);
    if (!sparse) pd_predict(output, x, 1);
    for (int i = 0; sparse && i < 3; i++) {
        memcpy(pd_batch_add_row(batch, 0), x, sizeof x);
        if (pd_batch_add_id(batch, 1, 1) != PD_OK || pd_batch_add_id(batch, 2, i) != PD_OK ||
            pd_batch_end_sample(batch) != PD_OK)
            abort();
        pd_forward(net, batch, PD_PREDICT, &output, 1);
        pd_train_batch(trainer, batch, NULL);
        pd_batch_clear(batch);
    }
    pd_batch_free(batch);
}

/* Reads all bytes and numbers. */
static double walk(FILE *file) {
    static unsigned char bytes[8192];
    static pd_real numbers[8192];
    pd__tensors t;
    double sum = 0;
    if (pd__tensors_open(net, file, "fuzz", &t) != PD_OK) return 0;
    for (int64_t i = 0; i < t.count; i++) {
        const pd__tensor *tensor = &t.list[i];
        int64_t n = tensor->end - tensor->begin;
        if (pd__tensors_find(&t, "", tensor->name) != tensor) abort();
        if (pd__utf8_prefix(tensor->name, strlen(tensor->name)) != strlen(tensor->name)) abort();
        if (n > (int64_t)sizeof bytes || !pd__seek(file, t.data_start + tensor->begin)) abort();
        if (pd__read_bytes(&t, bytes, n) != PD_OK) abort();
        for (int64_t k = 0; k < n; k++) sum += bytes[k];
        pd__load_reals(tensor->element, bytes, tensor->element < PD__U8 ? tensor->size : 0, numbers);
        for (int64_t k = 0; k < tensor->size && tensor->element < PD__U8; k++) sum += (double)numbers[k];
        for (int64_t k = 0; k < tensor->dim_count && k < PD__FILE_DIMS; k++) sum += (double)tensor->dims[k];
    }
    for (int64_t i = 0; i < t.text_count; i++)
        if (pd__tensors_text(&t, "", t.texts[i].name) != t.texts[i].text) abort();
    pd__tensors_close(&t);
    return sum;
}

/* What could be loaded can be used, saved, and loaded again, unless numbers have become too large. */
static void use(bool checkpoint, bool sparse) {
    static unsigned char chunk[PD__FILE_CHUNK], saved[32768];
    long size;
    bool finite = true;
    pd__items items = PD__ZERO;
    FILE *file = fmemopen(saved, sizeof saved, "wb");
    run(sparse);
    for (const pd_param *p = net->first_param; p; p = p->next)
        finite = finite && pd__finite(net->device->norm(net->device, p->size, p->value));
    for (int i = 0; i < trainer->trained_count; i++)
        finite = finite && pd__finite(net->device->norm(net->device, trainer->trained[i].param->size,
                                                        trainer->trained[i].states[0]));
    if (pd__items_of_trainer(&items, trainer, pd__best_of(trainer), NULL) != PD_OK) abort();
    if (!file || pd__write_tensors(file, &items, trainer, chunk) != 0 || fseek(file, 0, SEEK_END) != 0 ||
        (size = ftell(file)) <= 0 || fclose(file) != 0)
        abort();
    pd__items_free(&items);
    if (sparse && !finite) return;
    file = fmemopen(saved, (size_t)size, "rb");
    if (!file) abort();
    if (checkpoint && pd__checkpoint_load_file(trainer, file, "saved") != PD_OK) abort();
    if (!checkpoint && pd__load_file(net, file, "saved", NULL) != PD_OK) abort();
    fclose(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const pd_load_map map[] = { { "w.weight", "w.weight", true, NULL, false },
                                       { "x", "w.weight", false, "abc->c-", true } };
    static unsigned char bytes[8192];
    unsigned choice = fuzz_byte(&data, &size);
    pd_load_opts opts = { .map = map, .map_count = choice & 4 ? choice & 32 ? 2 : 1 : 0, .partial = choice & 8 };
    bool checkpoint = choice & 2, sparse = choice & 16;
    pd_status status;
    FILE *file;
    if (choice & 1) {
        unsigned zeros = fuzz_byte(&data, &size);
        if (size + zeros + 8 > sizeof bytes) return 0;
        memset(bytes, 0, sizeof bytes);
        pd__store_le(bytes, size, 8);
        memcpy(bytes + 8, data, size);
        data = bytes;
        size += 8 + zeros;
    }
    if (size == 0) return 0;
    make_net(sparse);
    file = fmemopen((void *)(uintptr_t)data, size, "rb");
    if (!file) abort();
    walk(file);
    net->failure.status = PD_OK;
    net->failure.text[0] = 0;
    status = checkpoint ? pd__checkpoint_load_file(trainer, file, "fuzz") : pd__load_file(net, file, "fuzz", &opts);
    fclose(file);
    if (status == PD_OK) use(checkpoint, sparse);
    else if (pd_error_status(net) != status || pd_error(net)[0] == 0 || strchr(pd_error(net), '\n')) abort();
    pd_trainer_free(trainer);
    pd_net_free(net);
    return 0;
}
