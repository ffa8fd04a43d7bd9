/* sparse.c - MIT-or-Unlicense - milliseconds per training step with sparse tables of 10^4 to 10^8 rows of 8 numbers

   256 sentences of 20 words; the mean of their rows goes to a softmax of 10 classes; momentum and l2, so that every row
   would move in every step. Prints, for one thread and for two, lines `bench sparse-IDS-ROWS threads N ours V ms`: the
   median over steps. IDS says what the words are. `same`: one batch, of the first 10,000 rows, again and again, so that
   what differs is the table's size alone. `spread`: one batch, of 10,000 rows at equal distances, so that each is in a
   page of memory of its own. `fresh`: other ones in every step, frequent ones first (density 1/x, as words have); of a
   larger table that is more rows in a batch, and the rare ones come from memory, not from a cache. The largest table
   takes 7 GB; an argument sets another largest number of rows. */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

enum { SAMPLES = 256, WORDS = 20, FEW = 10000, WARM_UP = 50, STEPS = 401 };

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef enum kind { SAME, SPREAD, FRESH, KINDS } kind;
static const char *const names[KINDS] = { "same", "spread", "fresh" };

static void fill(pd_batch *batch, int64_t rows, kind ids, uint64_t key) {
    uint64_t count = 0;
    pd_batch_clear(batch);
    for (int64_t i = 0; i < SAMPLES; i++) {
        for (int k = 0; k < WORDS; k++) {
            double u = (double)(pd_random(key, count++) >> 11) / 9007199254740992.0;
            int64_t one = (int64_t)(u * FEW);
            pd_batch_add_id(batch, 0,
                            ids == FRESH    ? (int64_t)pow((double)rows, u) - 1
                            : ids == SPREAD ? one * (rows / FEW)
                                            : one);
        }
        pd_batch_add_id(batch, 1, i % 10);
        pd_batch_end_sample(batch);
    }
}

static void measure(pd_net *net, pd_trainer *trainer, pd_batch *batch, int64_t rows, kind ids, int threads) {
    double times[STEPS];
    fill(batch, rows, ids, 1);
    for (int i = 0; i < WARM_UP + STEPS; i++) {
        double start;
        if (ids == FRESH) fill(batch, rows, ids, (uint64_t)i);
        start = pd_seconds();
        if (pd_train_batch(trainer, batch, NULL) != PD_OK) {
            fprintf(stderr, "%s\n", pd_error(net));
            return;
        }
        if (i >= WARM_UP) times[i - WARM_UP] = 1e3 * (pd_seconds() - start);
    }
    qsort(times, STEPS, sizeof *times, compare);
    printf("bench sparse-%s-%lld threads %d ours %.3f ms\n", names[ids], (long long)rows, threads, times[STEPS / 2]);
    fflush(stdout);
}

static void bench(int64_t rows, int threads) {
    pd_net *net = pd_net_new(&(pd_net_opts){ .threads = threads });
    pd_layer *words = pd_sequence(pd_ids(net, "words", rows)), *label = pd_label(net, "label", 10);
    pd_embedding_opts opts = { .weight = { .sparse = true, .init = pd_constant(0.1) } };
    pd_layer *mean = pd_sequence_pool(net, pd_embedding(net, words, 8, &opts), PD_AVERAGE, NULL);
    pd_layer *output = pd_fc(net, mean, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_trainer *trainer = pd_trainer_new(net, pd_cross_entropy(net, output, label, NULL), pd_momentum(0.01, 0.9),
                                         &(pd_trainer_opts){ .l2 = 1e-5 });
    pd_batch *batch = trainer ? pd_batch_new(net) : NULL;
    if (!batch) fprintf(stderr, "%lld rows: %s\n", (long long)rows, pd_error(net));
    for (int ids = 0; batch && ids < KINDS; ids++) measure(net, trainer, batch, rows, (kind)ids, threads);
    pd_batch_free(batch);
    pd_trainer_free(trainer);
    pd_net_free(net);
}

int main(int argc, char **argv) {
    int64_t largest = argc > 1 ? (int64_t)atof(argv[1]) : 100000000;
    for (int64_t rows = FEW; rows <= largest; rows *= 100)
        for (int threads = 1; threads <= 2; threads++) bench(rows, threads);
    return 0;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
