/* sequences.c - MIT-or-Unlicense - makes training steps of recurrent nets when told to, and says how long they take

   sequences NET HIDDEN SHORTEST LONGEST THREADS builds a net and a made-up batch of 64 samples, whose lengths are spread
   evenly from SHORTEST to LONGEST, at random, and prints six lines: one on the net, the number of its parameters that are
   matrices, the words it is to predict in a batch, the operations of the products in a step in units of 10^9, the lengths
   of the sources and of the targets. Then, for each line `N` on standard input, it makes N steps (forward, backward and
   momentum update), and answers with the seconds of one and the bytes of pd_net_bytes; to `0` with the GFLOP/s of a square
   product instead. With CPU_TIME in the environment, and one thread, seconds are the processor's, for machines that do
   other work; with PROFILE it ends with pd_profile on standard error. bench/sequences.py talks to it, and has PyTorch do
   the same by turns. NET is

   translation  Bahdanau et al. 2015 with gated recurrent units, the net of 2016: words of 10,000, embeddings and states of
                HIDDEN numbers, an encoder that reads both ways, a decoder of the word before, of additive attention and
                of its state, each state to a softmax over 10,000 words
   gru          pd_gru over HIDDEN numbers a word, of 1,000 words; each state to a softmax of 10 classes
   gru-group    the same with the unit written as a group */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SAMPLES = 64, WORDS = 10000, FEW_WORDS = 1000, CLASSES = 10, SQUARE = 512 };

/* The unit of pd_gru: `x` is 3 n numbers, what it adds to update, reset and candidate; returns h'. */
static pd_layer *unit(pd_net *net, pd_layer *x, pd_layer *h, int64_t n) {
    pd_layer *u = pd_fc(net, h, 3 * n, NULL), *pair[2], *gates[2], *candidate;
    for (int i = 0; i < 2; i++) {
        pair[0] = pd_slice(net, x, i * n, n, NULL);
        pair[1] = pd_slice(net, u, i * n, n, NULL);
        gates[i] = pd_add(net, pair, 2, &(pd_layer_opts){ .act = PD_SIGMOID });
    }
    pair[0] = pd_slice(net, x, 2 * n, n, NULL);
    pair[1] = pd_multiply(net, gates[1], pd_slice(net, u, 2 * n, n, NULL), NULL);
    candidate = pd_add(net, pair, 2, &(pd_layer_opts){ .act = PD_TANH });
    return pd_interpolate(net, gates[0], h, candidate, NULL);
}

static pd_layer *cost_of(pd_net *net, pd_layer *states, int64_t classes) {
    pd_layer *output = pd_fc(net, states, classes, &(pd_fc_opts){ .act = PD_SOFTMAX });
    return pd_cross_entropy(net, output, pd_sequence(pd_label(net, "next", classes)), NULL);
}

static pd_layer *translation(pd_net *net, int64_t n) {
    pd_layer *source = pd_sequence(pd_ids(net, "source", WORDS)), *before = pd_sequence(pd_ids(net, "before", WORDS));
    pd_layer *words = pd_embedding(net, source, n, NULL), *both[2], *encoder, *boot, *keys, *h, *pair[2], *y;
    pd_group *group;
    both[0] = pd_gru(net, words, n, NULL);
    both[1] = pd_gru(net, words, n, &(pd_gru_opts){ .reverse = true });
    encoder = pd_concat(net, both, 2, NULL);
    keys = pd_fc(net, encoder, n, NULL);
    boot = pd_fc(net, pd_sequence_pool(net, both[1], PD_FIRST, NULL), n, &(pd_fc_opts){ .act = PD_TANH });

    group = pd_group_begin(net, &(pd_group_opts){ .name = "decoder" });
    pd_group_input(group, before);
    pd_group_static(group, encoder);
    pd_group_static(group, keys);
    h = pd_group_memory(group, n, boot);
    pair[0] = pd_embedding(net, before, n, NULL);
    pair[1] = pd_attention(net, pd_fc(net, h, n, &(pd_fc_opts){ .no_bias = true }), keys, encoder, NULL);
    y = unit(net, pd_fc_sum(net, pair, 2, 3 * n, NULL), h, n);
    pd_group_feed(h, y);
    return cost_of(net, pd_group_end(group, y), WORDS);
}

static pd_layer *gru(pd_net *net, int64_t n) {
    pd_layer *words = pd_embedding(net, pd_sequence(pd_ids(net, "source", FEW_WORDS)), n, NULL);
    return cost_of(net, pd_gru(net, words, n, NULL), CLASSES);
}

static pd_layer *gru_group(pd_net *net, int64_t n) {
    pd_layer *words = pd_embedding(net, pd_sequence(pd_ids(net, "source", FEW_WORDS)), n, NULL), *h, *y;
    pd_group *group = pd_group_begin(net, NULL);
    pd_group_input(group, words);
    h = pd_group_memory(group, n, NULL);
    y = unit(net, pd_fc(net, words, 3 * n, NULL), h, n);
    pd_group_feed(h, y);
    return cost_of(net, pd_group_end(group, y), CLASSES);
}

static pd_layer *build(pd_net *net, const char *name, int64_t n) {
    if (strcmp(name, "translation") == 0) return translation(net, n);
    if (strcmp(name, "gru") == 0) return gru(net, n);
    if (strcmp(name, "gru-group") == 0) return gru_group(net, n);
    return NULL;
}

/* What the products of forward take, times 3: each has one for either gradient. `from`, `to`: words of a batch. */
static double operations(bool translating, double from, double to, double n) {
    double encode = from * n * 3 * n * 2; /* a unit's input and state */
    double attend = from * 2 * n * n + to * n * n + SAMPLES * n * n;
    double decode = to * (n + 2 * n + n) * 3 * n + to * n * WORDS;
    return 3 * 2 * (translating ? 2 * encode + attend + decode : encode + from * n * CLASSES);
}

static int64_t length_of(int64_t sample, int side, int64_t shortest, int64_t longest) {
    return shortest + (int64_t)(pd_random(1 + (uint64_t)side, (uint64_t)sample) % (uint64_t)(longest - shortest + 1));
}

static void fill(pd_batch *batch, bool translating, int64_t shortest, int64_t longest) {
    uint64_t count = 0;
    for (int64_t i = 0; i < SAMPLES; i++) {
        for (int k = 0; k < batch->slot_count; k++) {
            int64_t rows = length_of(i, translating && k > 0, shortest, longest);
            while (rows--)
                pd_batch_add_id(batch, k, (int64_t)(pd_random(3, count++) % (uint64_t)batch->slots[k].width));
        }
        pd_batch_end_sample(batch);
    }
}

static void print_lengths(const pd_slot *slot) {
    for (int64_t i = 0; i < SAMPLES; i++) printf("%lld ", (long long)(slot->starts[i + 1] - slot->starts[i]));
    printf("\n");
}

static double now(void) { return getenv("CPU_TIME") ? (double)clock() / CLOCKS_PER_SEC : pd_seconds(); }

/* GFLOP/s: the median of some products. */
static double gemm_rate(pd_device *d) {
    enum { TRIES = 31 };
    double rates[TRIES];
    pd_real *numbers = (pd_real *)calloc(3 * SQUARE * SQUARE, sizeof *numbers);
    for (int i = 0; numbers && i < TRIES; i++) {
        double start = now(), rate;
        int k = i;
        d->gemm(d, false, false, SQUARE, SQUARE, SQUARE, 1, numbers, SQUARE, numbers + SQUARE * SQUARE, SQUARE, 0,
                numbers + 2 * SQUARE * SQUARE, SQUARE, NULL);
        rate = 2e-9 * SQUARE * SQUARE * SQUARE / (now() - start);
        for (; k > 0 && rates[k - 1] > rate; k--) rates[k] = rates[k - 1];
        rates[k] = rate;
    }
    if (!numbers) return 0;
    free(numbers);
    return rates[TRIES / 2];
}

static int fail(pd_net *net) {
    fprintf(stderr, "sequences: %s\n", pd_error(net));
    return 1;
}

int main(int argc, char **argv) {
    int64_t n = argc == 6 ? atoi(argv[2]) : 0, shortest = argc == 6 ? atoi(argv[3]) : 0;
    int64_t longest = argc == 6 ? atoi(argv[4]) : 0;
    int threads = argc == 6 ? atoi(argv[5]) : 0;
    bool translating = argc == 6 && strcmp(argv[1], "translation") == 0;
    if (n < 1 || shortest < 1 || longest < shortest || threads < 1)
        return fprintf(stderr, "usage: sequences translation|gru|gru-group HIDDEN SHORTEST LONGEST THREADS\n"), 2;

    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *cost = build(net, argv[1], n);
    if (!cost && pd_error_status(net) == PD_OK) return fprintf(stderr, "sequences: no net %s\n", argv[1]), 2;
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_momentum(0.01, 0.9), NULL);
    pd_batch *batch = trainer ? pd_batch_new(net) : NULL;
    if (!batch) return fail(net);
    fill(batch, translating, shortest, longest);

    char text[4096];
    int64_t matrices = 0, from = batch->slots[0].rows, to = batch->slots[batch->slot_count - 1].rows;
    for (pd_param *p = pd_param_first(net); p; p = p->next) matrices += p->dim_count > 1 ? p->size : 0;
    pd_info(net, text, sizeof text);
    printf("%s\n%lld\n%lld\n%.6f\n", text, (long long)matrices, (long long)to,
           1e-9 * operations(translating, (double)from, (double)to, (double)n));
    print_lengths(&batch->slots[0]);
    print_lengths(&batch->slots[batch->slot_count - 1]);
    fflush(stdout);
    while (fgets(text, sizeof text, stdin)) {
        int steps = atoi(text);
        double start = now();
        for (int i = 0; i < steps; i++)
            if (pd_train_batch(trainer, batch, NULL) != PD_OK) return fail(net);
        printf("%.9f %zu\n", steps ? (now() - start) / steps : gemm_rate(pd_net_device(net)), pd_net_bytes(net));
        fflush(stdout);
    }
    if (getenv("PROFILE") && pd_profile(trainer, text, sizeof text)) fputs(text, stderr);
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return 0;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
