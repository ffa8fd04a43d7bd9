/* Two nets, 50 steps, on whatever this program was built for: the CPU, with SEAMS_CUDA a GPU or its stand-in, with
   SEAMS_MPI the ranks of mpiexec. Writes the cost of every step and the final parameters to a file, which
   `seams compare` holds against another; tests/seams/run makes a table of that.

   Usage: seams digits|words OUT [THREADS] [early]      early: see below
          seams compare A B                             prints the two largest relative differences */
#define main custom_layer_main /* the layer of the foundation's example, as it stands there */
#include "../../examples/custom_layer.c"
#undef main
#ifdef SEAMS_CUDA
#include "../../paddle_cuda.cu"
#endif
#ifdef SEAMS_MPI
#include <mpi.h>

#include "../../paddle_mpi.c"
#endif

enum { STEPS = 50, BATCH = 30, SAMPLES = STEPS * BATCH, EARLY = 3, EARLY_STEPS = 30, WORDS = 50000, LONGEST = 40 };

/* "early": rank 2 of 3 has samples for the first 30 steps only. Without ranks that is a third of each later batch less. */
typedef struct plan {
    int rank, ranks;
    bool early;
} plan;

/* ---- the nets ---- */

/* Convolution, the example's layer, pooling. No dropout: its bits follow the row in the batch, which ranks share out. */
static pd_layer *build_digits(pd_net *net) {
    pd_layer *image = pd_image(net, "image", 1, 8, 8), *label = pd_label(net, "label", 10);
    pd_layer *conv = swish(net, pd_conv(net, image, 8, 3, &(pd_conv_opts){ .name = "conv", .pad = 1 }));
    pd_layer *pool = pd_pool(net, conv, 2, &(pd_pool_opts){ .name = "pool" });
    pd_layer *fc = pd_fc(net, pool, 32, &(pd_fc_opts){ .name = "fc", .act = PD_TANH });
    pd_layer *output = pd_fc(net, fc, 10, &(pd_fc_opts){ .name = "output", .act = PD_SOFTMAX });
    return pd_cross_entropy(net, output, label, NULL);
}

static pd_layer *build_words(pd_net *net) {
    pd_layer *words = pd_sequence(pd_ids(net, "words", WORDS)), *label = pd_label(net, "label", 2);
    pd_layer *rows = pd_embedding(net, words, 16, &(pd_embedding_opts){ .name = "table", .weight.sparse = true });
    pd_layer *gru = pd_gru(net, rows, 24, &(pd_gru_opts){ .name = "gru" });
    pd_layer *last = pd_sequence_pool(net, gru, PD_LAST, &(pd_layer_opts){ .name = "last" });
    pd_layer *output = pd_fc(net, last, 2, &(pd_fc_opts){ .name = "output", .act = PD_SOFTMAX });
    return pd_cross_entropy(net, output, label, NULL);
}

/* ---- the data ---- */

static int64_t word_ids[SAMPLES * LONGEST], word_starts[SAMPLES + 1], word_labels[SAMPLES];

/* Sentences of 0 to 40 words, small ids far more frequent; the class is whether the last is one
   of the 200 most frequent. */
static void make_words(void) {
    uint64_t count = 0;
    for (int64_t s = 0; s < SAMPLES; s++) {
        int64_t length = (int64_t)(pd_random(11, count++) % (LONGEST + 1)), first = word_starts[s];
        for (int64_t i = 0; i < length; i++) {
            double u = (double)(pd_random(11, count++) >> 11) / 9007199254740992.0;
            word_ids[first + i] = (int64_t)pow((double)WORDS, u) - 1; /* density 1/x */
        }
        word_starts[s + 1] = first + length;
        word_labels[s] = length > 1 && word_ids[first + length - 1] < 200;
    }
}

/* This rank's samples: every ranks-th, so that the batches of all ranks together are those of one. */
static pd_reader *open_reader(pd_net *net, bool words, const plan *p) {
    int64_t samples = p->early && p->ranks == EARLY && p->rank == EARLY - 1 ? EARLY_STEPS * BATCH : SAMPLES;
    pd_array arrays[2] = { { .ids = word_ids, .starts = word_starts }, { .ids = word_labels } };
    pd_reader *reader;
    if (words) reader = pd_array_reader(net, samples, arrays, 2);
    else
        reader =
            pd_csv_reader(net, "examples/data/digits.csv", &(pd_reader_opts){ .scale = 1.0 / 16, .count = samples });
    if (reader && p->ranks > 1 && pd_reader_shard(reader, p->rank, p->ranks) != PD_OK) {
        fprintf(stderr, "%s\n", reader->error.text);
        return NULL;
    }
    return reader;
}

/* ---- a run ---- */

typedef struct record {
    double sums[STEPS], samples[STEPS];
} record;

static int note_cost(void *user, const pd_event *event) {
    record *r = (record *)user;
    int64_t step = event->batch;
    if (event->kind == PD_END_BATCH && step < STEPS) r->sums[step] = event->cost;
    return 0;
}

static int fail(pd_net *net) {
    fprintf(stderr, "seams: %s\n", pd_error(net));
    return 1;
}

/* One process, and the batches that three ranks have when the third runs out. */
static pd_status train_early(pd_trainer *t, pd_reader *reader, record *r) {
    pd_net *net = pd_trainer_net(t);
    pd_batch *all = pd_batch_new(net), *part = pd_batch_new(net);
    pd_status status = reader->reset(reader, 0);
    for (int step = 0; status == PD_OK && step < STEPS; step++) {
        pd_batch_clear(all);
        pd_batch_clear(part);
        status = reader->next(reader, all, BATCH);
        if (status == PD_END) status = PD_OK;
        for (int64_t i = 0; status == PD_OK && i < all->samples; i++)
            if (step < EARLY_STEPS || i % EARLY != EARLY - 1) status = pd_batch_copy_sample(part, all, i);
        if (status == PD_OK) status = pd_train_batch(t, part, &r->sums[step]);
    }
    pd_batch_free(all);
    pd_batch_free(part);
    return status;
}

/* Costs become those of all ranks' batches. */
static void merge(record *r, const plan *p) {
    for (int step = 0; step < STEPS; step++) {
        bool out = p->early && p->ranks == EARLY && p->rank == EARLY - 1 && step >= EARLY_STEPS;
        r->samples[step] = out ? 0 : BATCH / p->ranks;
        r->sums[step] *= r->samples[step];
    }
#ifdef SEAMS_MPI
    MPI_Allreduce(MPI_IN_PLACE, r->sums, STEPS, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    MPI_Allreduce(MPI_IN_PLACE, r->samples, STEPS, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
#endif
    for (int step = 0; step < STEPS; step++) r->sums[step] /= r->samples[step];
}

static int save(pd_net *net, const record *r, const char *path) {
    FILE *f = fopen(path, "wb");
    bool ok = f && fwrite(r->sums, sizeof *r->sums, STEPS, f) == STEPS;
    for (pd_param *p = pd_param_first(net); ok && p; p = p->next) {
        pd_real *values = (pd_real *)calloc((size_t)p->size, sizeof *values);
        ok = values && pd_param_get(p, values, p->size) == PD_OK && fwrite(&p->size, sizeof p->size, 1, f) == 1 &&
             fwrite(values, sizeof *values, (size_t)p->size, f) == (size_t)p->size;
        free(values);
    }
    if (!f || fclose(f) != 0) ok = false;
    if (!ok) fprintf(stderr, "seams: %s can't be written\n", path);
    return ok ? 0 : 1;
}

static int run(const char *name, const char *path, int threads, const plan *p, pd_updater *updater, pd_device *device) {
    bool words = strcmp(name, "words") == 0;
    pd_net *net = pd_net_new(&(pd_net_opts){ .seed = 5, .threads = threads, .device = device });
    pd_layer *cost = words ? build_words(net) : build_digits(net);
    pd_trainer *t = pd_trainer_new(net, cost, pd_momentum(words ? 0.3 : 0.02, 0.9),
                                   &(pd_trainer_opts){ .l2 = 1e-4, .updater = updater });
    pd_reader *reader = open_reader(net, words, p);
    static record r;
    pd_train_opts opts = { .batch_size = BATCH / p->ranks, .on_event = note_cost, .user = &r };
    int code;
    if (!t || !reader) return fail(net);
    if (p->early && p->ranks == 1 ? train_early(t, reader, &r) != PD_OK : pd_train(t, reader, 1, &opts) != PD_OK)
        return fail(net);
    if (p->early && p->ranks == 1 && pd_sync(t) != PD_OK) return fail(net);
    merge(&r, p);
    code = p->rank == 0 ? save(net, &r, path) : 0;
    pd_reader_free(reader);
    pd_trainer_free(t);
    pd_net_free(net);
    return code;
}

/* ---- comparing ---- */

/* Largest |a - b| of n numbers, over the largest |b|. */
static double difference(const pd_real *a, const pd_real *b, int64_t n) {
    double most = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= most)) most = d;
        if (fabs((double)b[i]) > size) size = fabs((double)b[i]);
    }
    return size > 0 ? most / size : most;
}

static int compare(const char *path_a, const char *path_b) {
    FILE *a = fopen(path_a, "rb"), *b = fopen(path_b, "rb");
    double x[STEPS], y[STEPS], costs = 0, params = 0;
    int64_t n, m;
    if (!a || !b || fread(x, sizeof *x, STEPS, a) != STEPS || fread(y, sizeof *y, STEPS, b) != STEPS) return 1;
    for (int i = 0; i < STEPS; i++) {
        double d = fabs(x[i] - y[i]) / fabs(y[i]);
        if (!(d <= costs)) costs = d;
    }
    while (fread(&n, sizeof n, 1, a) == 1) {
        pd_real *u, *v;
        double d;
        if (fread(&m, sizeof m, 1, b) != 1 || m != n) return 1;
        u = (pd_real *)calloc((size_t)n, 2 * sizeof *u);
        v = u + n;
        if (!u || fread(u, sizeof *u, (size_t)n, a) != (size_t)n || fread(v, sizeof *v, (size_t)n, b) != (size_t)n)
            return 1;
        d = difference(u, v, n);
        if (!(d <= params)) params = d;
        free(u);
    }
    if (fread(&m, 1, 1, b) == 1) return 1;
    printf("%.2e %.2e %.6f %.6f\n", costs, params, x[0], x[STEPS - 1]);
    fclose(a);
    fclose(b);
    return 0;
}

int main(int argc, char **argv) {
    plan p = { 0, 1, false };
    pd_updater *updater = NULL;
    pd_device *device = NULL;
    char message[256] = "";
    int code;
    if (argc == 4 && strcmp(argv[1], "compare") == 0) return compare(argv[2], argv[3]);
    if (argc < 3) return 2;
    p.early = argc > 4 && strcmp(argv[4], "early") == 0;
    make_words();
#ifdef SEAMS_CUDA
    device = pd_cuda_new(0, NULL, message, sizeof message);
    if (!device) return fprintf(stderr, "seams: %s\n", message), 1;
#endif
#ifdef SEAMS_MPI
    updater = pd_mpi_new(NULL, message, sizeof message);
    if (!updater) return fprintf(stderr, "seams: %s\n", message), 1;
    p.rank = pd_mpi_rank(updater);
    p.ranks = pd_mpi_ranks(updater);
#endif
    code = run(argv[1], argv[2], argc > 3 ? atoi(argv[3]) : 1, &p, updater, device);
    (void)message;
#ifdef SEAMS_CUDA
    pd_cuda_free(device);
#endif
#ifdef SEAMS_MPI
    pd_mpi_exit(updater, code);
#endif
    return code;
}
