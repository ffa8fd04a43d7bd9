/* The CSV reader. The first byte chooses the options, the rest is the file. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static pd_net *nets[2];
    unsigned choice = fuzz_byte(&data, &size);
    int sequence = choice & 1;
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
    if (!nets[sequence]) {
        nets[sequence] = pd_net_new(NULL);
        pd_vector(nets[sequence], "x", sequence ? 1 : 3);
        pd_label(nets[sequence], "label", 4);
    }
    fuzz_reader(nets[sequence], pd_csv_reader(nets[sequence], fuzz_file(0, data, size), &opts));
    return 0;
}
