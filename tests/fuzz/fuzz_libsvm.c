/* The LibSVM reader. The first byte chooses the net's inputs and the options, the rest is the file. */
#include "fuzz.h"

static pd_net *make_net(unsigned kind) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *x = pd_vector(net, "x", 5);
    pd_layer *y = kind & 1 ? pd_vector(net, "y", 1) : pd_label(net, "y", 3);
    if (kind & 2) {
        pd_sequence(x);
        pd_sequence(y);
    }
    return net;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static pd_net *nets[4];
    unsigned choice = fuzz_byte(&data, &size), kind = choice & 3;
    pd_reader_opts opts = {
        .scale = choice & 16 ? 0.5 : 0,
        .first = choice & 32 ? 1 : 0,
        .folds = choice & 64 ? 2 : 0,
        .not_fold = choice & 128,
    };
    if (!nets[kind]) nets[kind] = make_net(kind);
    fuzz_reader(nets[kind], pd_libsvm_reader(nets[kind], fuzz_file(0, data, size), &opts));
    return 0;
}
