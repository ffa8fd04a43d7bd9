/* Vocabularies, and the reader of text. The first byte chooses; the rest is a file, which the vocabulary is counted from
   or, with bit 0 set, which is that vocabulary's text, and which is read. */
#include "fuzz.h"

/* Its own text gives the same vocabulary again. */
static void check_vocab(pd_net *net, const pd_vocab *v, const pd_vocab_opts *opts) {
    pd_vocab_opts again = { .characters = opts->characters, .unknown = opts->unknown };
    pd_vocab *w = pd_vocab_parse(net, pd_vocab_text(v), &again);
    if (!w || strcmp(pd_vocab_text(v), pd_vocab_text(w)) != 0) abort();
    for (int64_t i = 0; i < pd_vocab_size(v); i++)
        if (pd_vocab_id(w, pd_vocab_word(v, i)) != i) abort();
    pd_vocab_free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char text[4097];
    pd_net *net = pd_net_new(NULL);
    unsigned choice = fuzz_byte(&data, &size);
    bool parse = choice & 1;
    pd_vocab_opts opts = { .characters = choice & 2,
                           .column = choice & 4 && !parse ? 2 : 0,
                           .min_count = choice & 8 && !parse ? 2 : 0,
                           .max_size = choice & 16 && !parse ? 5 : 0,
                           .unknown = choice & 32 ? "" : NULL };
    const char *path = fuzz_file(0, data, size);
    pd_vocab *v;
    if (size < sizeof text) memcpy(text, data, size);
    text[size < sizeof text ? size : 0] = 0;
    v = parse ? pd_vocab_parse(net, text, &opts) : pd_vocab_build(net, path, &opts);
    if (v) {
        bool special = pd_vocab_begin(v) >= 0 && pd_vocab_end(v) >= 0;
        pd_text_field fields[] = { { .vocab = v, .column = 1, .begin = special },
                                   { .vocab = v, .column = choice & 64 ? 2 : 1, .end = special } };
        check_vocab(net, v, &opts);
        if (pd_net_set_text(net, "words", pd_vocab_text(v)) != PD_OK) abort();
        pd_sequence(pd_ids(net, "x", pd_vocab_size(v)));
        if (choice & 128) pd_ids(net, "y", pd_vocab_size(v));
        else pd_sequence(pd_ids(net, "y", pd_vocab_size(v)));
        if (pd_error_status(net) != PD_OK) abort();
        fields[1].end = special && !(choice & 128);
        fuzz_reader(net, pd_text_reader(net, path, fields, 2, NULL));
        pd_vocab_free(v);
    } else if (pd_error(net)[0] == 0) abort();
    pd_net_free(net);
    return 0;
}
