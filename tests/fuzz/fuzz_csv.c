/* The CSV reader. The first byte chooses the options, the rest is the file. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    pd_net *net = pd_net_new(NULL);
    unsigned choice = fuzz_byte(&data, &size);
    pd_reader_opts opts = {
        .order = choice & 2 ? "label,-,x" : NULL,
        .delimiter = choice & 4 ? ';' : 0,
        .skip_lines = choice & 8 ? 1 : 0,
        .scale = choice & 16 ? 0.5 : 0,
        .first = choice & 32 ? 1 : 0,
        .count = choice & 32 ? 3 : 0,
        .folds = choice & 64 ? 2 : 0,
        .not_fold = choice & 128,
    };
    pd_vector(net, "x", choice & 1 ? 1 : 3);
    pd_label(net, "label", 4);
    if (pd_error_status(net) != PD_OK) abort();
    fuzz_reader(net, pd_csv_reader(net, fuzz_file(0, data, size), &opts));
    pd_net_free(net);
    return 0;
}
