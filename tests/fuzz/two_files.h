/* For the readers of one binary file per input: a net with an image and a label reads two. The first byte chooses the
   options; the second says where the second file begins: 128 and more: 128 bytes less, else in sixteenths of the rest. */
#include "fuzz.h"

typedef pd_reader *(*open_files)(pd_net *net, const char *const *paths, int count, const pd_reader_opts *opts);

static inline void fuzz_two_files(const uint8_t *data, size_t size, open_files open) {
    pd_net *net = pd_net_new(NULL);
    unsigned choice = fuzz_byte(&data, &size), share = fuzz_byte(&data, &size);
    size_t first = share >= 128 ? (size < share - 128u ? size : share - 128u) : size * (share & 15) / 16;
    pd_reader_opts opts = {
        .scale = choice & 16 ? 0.5 : 0,
        .first = choice & 32 ? 1 : 0,
        .count = choice & 32 ? 2 : 0,
        .folds = choice & 64 ? 2 : 0,
        .not_fold = choice & 128,
    };
    const char *paths[2];
    pd_image(net, "image", 1, 2, 3);
    pd_label(net, "label", 10);
    if (pd_error_status(net) != PD_OK) abort();
    paths[0] = fuzz_file(0, data, first);
    paths[1] = fuzz_file(1, data + first, size - first);
    fuzz_reader(net, open(net, paths, 2, &opts));
    pd_net_free(net);
}
