/* The LibSVM reader. The first byte chooses the net's inputs and the options, the rest is the file. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    pd_net *net = pd_net_new(NULL);
    unsigned choice = fuzz_byte(&data, &size);
    pd_layer *x = choice & 4 ? pd_sparse_vector(net, "x", 5) : pd_vector(net, "x", 5), *y;
    pd_reader_opts opts = {
        .scale = choice & 16 ? 0.5 : 0,
        .first = choice & 32 ? 1 : 0,
        .folds = choice & 64 ? 2 : 0,
        .not_fold = choice & 128,
    };
    if (choice & 2) pd_sequence(x);
    y = choice & 1 ? pd_vector(net, "y", 1) : pd_label(net, "y", 3);
    if (choice & 2) pd_sequence(y);
    if (pd_error_status(net) != PD_OK) abort();
    fuzz_reader(net, pd_libsvm_reader(net, fuzz_file(0, data, size), &opts));
    pd_net_free(net);
    return 0;
}
