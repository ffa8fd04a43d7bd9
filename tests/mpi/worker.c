/* One rank of the tests of paddle_mpi.c; tests/test_mpi.sh starts them.

     worker compare WORD..    trains on all ranks, then on rank 0 alone with the batches together, and compares
     worker bits WORD..       trains, and rank 0 prints a hash of the values
     worker bytes WORD..      compares what was sent with the formula, as counted in MPI_Isend
     worker steady WORD..     looks for memory taken after the first steps
     worker again WORD..      three trainers, one after the other
     worker memory WORD..     memory runs out everywhere; for one rank
     worker leak              loses a batch, which the address sanitizer must say
     worker reduce            tests on shares of the samples, and compares with a test of all
     worker NAME WORD..       some way to fail: see `failures`; exit code 3 where the others were told

   Words: a net (mlp, conv, rows, words, norm, wide, broad), an optimizer (sgd, momentum, ..), clip, l2, uneven, far,
   schedule. */
#define _POSIX_C_SOURCE 200809L
#include "../../paddle.h"
#include "../../paddle_mpi.c"

#include <math.h>
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../far_device.h"
#include "library.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

/* ---- what MPI is asked to send: the profiling interface puts this in front of MPI ---- */

static int64_t bytes_sent, messages_sent;
int MPI_Isend(const void *buffer, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request *request) {
    int size = 0;
    MPI_Type_size(type, &size);
    bytes_sent += (int64_t)count * size;
    messages_sent++;
    return PMPI_Isend(buffer, count, type, to, tag, comm, request);
}

/* ---- memory, counted ---- */

static int64_t allocations, fail_at = -1;
static void *count_alloc(void *user, size_t size, size_t align) {
    void *memory = NULL;
    (void)user;
    if (allocations++ == fail_at) return NULL;
    return posix_memalign(&memory, align, size) == 0 ? memory : NULL;
}
static void count_free(void *user, void *memory, size_t size) {
    (void)user;
    (void)size;
    free(memory);
}

/* ---- settings ---- */

static int argument_count;
static char **arguments;
static bool has(const char *word) {
    for (int i = 2; i < argument_count; i++)
        if (strcmp(arguments[i], word) == 0) return true;
    return false;
}

static pd_updater *mpi;
static int rank, ranks;

static void complain(const char *text) { fprintf(stderr, "rank %d: %s\n", rank, text); }

static pd_optimizer optimizer(void) {
    if (has("momentum")) return pd_momentum(0.02, 0.9);
    if (has("nesterov")) return pd_nesterov(0.02, 0.9);
    if (has("adagrad")) return pd_adagrad(0.02);
    if (has("adadelta")) return pd_adadelta(1);
    if (has("rmsprop")) return pd_rmsprop(0.002);
    if (has("decayed_adagrad")) return pd_decayed_adagrad(0.002);
    if (has("adam")) return pd_adam(0.002);
    if (has("adamw")) return pd_adamw(0.002);
    if (has("adamax")) return pd_adamax(0.002);
    return pd_sgd(0.05);
}

static pd_trainer_opts options(bool alone) {
    pd_trainer_opts o;
    memset(&o, 0, sizeof o);
    if (has("l2")) o.l2 = 0.01;
    if (has("clip")) o.clip_norm = 0.05;
    if (has("schedule")) {
        o.schedule.kind = PD_SCHEDULE_LINEAR;
        o.schedule.a = 0.002;
        o.schedule.b = 0.1;
    }
    if (!alone) o.updater = mpi;
    return o;
}

/* ---- nets ---- */

enum { VECTOR = 19, SIDE = 6, WORDS = 203, CLASSES = 7 };

typedef struct job {
    pd_net *net;
    pd_layer *cost;
    pd_trainer *trainer;
    pd_evaluator *error;
    pd_net *host; /* whose device is behind the far one */
    far_device far;
} job;

static pd_layer *build(pd_net *net, pd_evaluator **error) {
    pd_fc_opts soft, hidden, rows;
    pd_layer *label, *top;
    memset(&soft, 0, sizeof soft);
    soft.act = PD_SOFTMAX;
    hidden = rows = soft;
    hidden.act = PD_TANH;
    rows.act = PD_TANH;
    rows.weight.sparse = true;
    if (has("conv")) {
        pd_conv_opts conv;
        memset(&conv, 0, sizeof conv);
        conv.act = PD_RELU;
        conv.pad = 1;
        top = pd_pool(net, pd_conv(net, pd_image(net, "x", 1, SIDE, SIDE), 3, 3, &conv), 2, NULL);
    } else if (has("rows")) {
        top = pd_fc(net, pd_sparse_vector(net, "x", WORDS), 5, &rows);
    } else if (has("words")) {
        pd_embedding_opts table;
        memset(&table, 0, sizeof table);
        table.weight.sparse = true;
        top = pd_embedding(net, pd_ids(net, "x", WORDS), 5, &table);
    } else {
        top = pd_fc(net, pd_vector(net, "x", VECTOR),
                    has("wide")                 ? 20001
                    : has("broad")              ? 1001
                    : has("wrong") && rank == 1 ? 12
                                                : 11,
                    &hidden);
        if (has("norm")) top = pd_batch_norm(net, top, NULL);
        top = pd_fc(net, top, 1, &hidden); /* fewer numbers than ranks */
    }
    label = pd_label(net, "label", CLASSES);
    top = pd_fc(net, top, CLASSES, &soft);
    *error = pd_eval_error(net, top, label, NULL);
    return pd_cross_entropy(net, top, label, NULL);
}

static bool begin(job *j, bool alone) {
    pd_net_opts o;
    pd_trainer_opts t = options(alone);
    memset(&o, 0, sizeof o);
    memset(j, 0, sizeof *j);
    o.seed = alone ? 0 : (uint64_t)rank; /* values come from rank 0 */
    o.threads = 1;
    o.allocator.alloc = count_alloc;
    o.allocator.free = count_free;
    if (has("far") && !alone) {
        j->host = pd_net_new(NULL);
        j->far = make_far(cpu_of(j->host), ~0u);
        j->far.device.self = &j->far;
        o.device = &j->far.device;
    }
    j->net = pd_net_new(&o);
    j->cost = build(j->net, &j->error);
    j->trainer = pd_trainer_new(j->net, j->cost, optimizer(), &t);
    if (!j->trainer && fail_at < 0) complain(pd_error(j->net));
    return j->trainer != NULL;
}

static void end(job *j) {
    pd_trainer_free(j->trainer);
    pd_net_free(j->net);
    pd_net_free(j->host);
}

/* ---- samples: sample i is the same for all ranks ---- */

static double number(int64_t i, int64_t k) {
    return (double)(pd_random(77, (uint64_t)(1000 * i + k)) >> 11) / 9007199254740992.0;
}

static pd_status add_sample(pd_batch *b, int64_t i) {
    int64_t label = (int64_t)(number(i, 999) * CLASSES);
    if (b->slots[0].kind == PD_SLOT_IDS) {
        int64_t word = (int64_t)(number(i, 0) * number(i, 1) * WORDS); /* some come often */
        if (pd_batch_add_id(b, 0, word) != PD_OK) return PD_E_MEMORY;
    } else if (b->slots[0].kind == PD_SLOT_SPARSE) {
        int64_t columns[3], count = (int64_t)(number(i, 0) * 3.99);
        pd_real values[3];
        for (int64_t k = 0; k < count; k++) {
            columns[k] = 67 * k + (int64_t)(number(i, 1 + k) * 67);
            values[k] = (pd_real)(number(i, 10 + k) + 0.5);
        }
        if (pd_batch_add_sparse(b, 0, columns, values, count) != PD_OK) return PD_E_MEMORY;
    } else {
        pd_real *x = pd_batch_add_row(b, 0);
        if (!x) return PD_E_MEMORY;
        for (int64_t k = 0; k < b->slots[0].width; k++)
            x[k] = (pd_real)(number(i, k) + (k % CLASSES == label ? 1 : 0)) - (pd_real)0.5;
        if (has("nan") && i == 37) x[0] = (pd_real)NAN;
    }
    if (pd_batch_add_id(b, 1, label) != PD_OK) return PD_E_MEMORY;
    return pd_batch_end_sample(b);
}

/* Rank r's reader: the samples i with i % ranks == r, or, uneven, few for the last ranks. */
enum { BATCH = 4, SAMPLES = 90 };
static int64_t share_size(int r) {
    if (has("uneven")) return 23 / (r + 1);
    return (SAMPLES - r + ranks - 1) / ranks;
}
static int64_t share_sample(int r, int64_t k) { return k * ranks + r; }

static int64_t at;
static int64_t stop_at = -1; /* the sample at which something happens to this rank */
static int stop_signal;

static pd_status read_next(pd_reader *r, pd_batch *batch, int64_t count) {
    for (int64_t i = 0; i < count; i++, at++) {
        if (at >= share_size(rank)) return PD_END;
        if (at == stop_at) raise(stop_signal);
        if (add_sample(batch, share_sample(rank, at)) != PD_OK) {
            pd_batch_drop_sample(batch);
            return pd_reader_fail(r, PD_E_MEMORY, "no memory");
        }
    }
    return PD_OK;
}
static pd_status read_reset(pd_reader *r, int64_t pass) {
    (void)r;
    (void)pass;
    at = 0;
    return PD_OK;
}
static pd_status read_bad(pd_reader *r, pd_batch *batch, int64_t count) {
    if (at >= 12) return pd_reader_fail(r, PD_E_FORMAT, "line 13: this is not a number");
    return read_next(r, batch, count);
}
static pd_reader reader;
static void make_reader(void) {
    memset(&reader, 0, sizeof reader);
    reader.api_version = PD_API_VERSION;
    reader.name = "test";
    reader.next = read_next;
    reader.reset = read_reset;
}

static int (*after_batch)(void *user, const pd_event *event);

static pd_status train(job *j, int64_t passes) {
    pd_train_opts o;
    pd_status status;
    memset(&o, 0, sizeof o);
    o.batch_size = BATCH;
    o.on_event = after_batch;
    o.user = j;
    make_reader();
    status = pd_train(j->trainer, &reader, passes, &o);
    if (status != PD_OK && fail_at < 0) complain(pd_error(j->net));
    return status;
}

/* The same on one process. */
static pd_status train_alone(job *j, int64_t passes) {
    pd_batch *b = pd_batch_new(j->net);
    pd_status status = PD_OK;
    for (int64_t pass = 0; pass < passes; pass++)
        for (int64_t step = 0; status == PD_OK; step++) {
            pd_batch_clear(b);
            for (int r = 0; r < ranks; r++)
                for (int64_t k = step * BATCH; k < (step + 1) * BATCH && k < share_size(r); k++)
                    add_sample(b, share_sample(r, k));
            if (b->samples == 0) break;
            status = pd_train_batch(j->trainer, b, NULL);
        }
    if (status != PD_OK) complain(pd_error(j->net));
    pd_batch_free(b);
    if (status == PD_OK) status = pd_sync(j->trainer);
    return status;
}

/* ---- comparisons ---- */

static double worst_difference(job *a, job *b) {
    double worst = 0;
    pd_param *q = pd_param_first(b->net);
    for (pd_param *p = pd_param_first(a->net); p; p = p->next, q = q->next) {
        pd_real *x = (pd_real *)malloc(2 * (size_t)p->size * sizeof *x), *y = x + p->size;
        double greatest = 0;
        pd_param_get(p, x, p->size);
        pd_param_get(q, y, q->size);
        for (int64_t i = 0; i < p->size; i++) greatest = fmax(greatest, fabs((double)y[i]));
        for (int64_t i = 0; i < p->size; i++) {
            double d = fabs((double)x[i] - (double)y[i]) / fmax(greatest, 1e-3);
            if (!(d <= worst)) worst = d;
        }
        free(x);
    }
    return worst;
}

static uint64_t hash_values(const job *j) {
    uint64_t h = 0;
    for (pd_param *p = pd_param_first(j->net); p; p = p->next) {
        pd_real *x = (pd_real *)malloc((size_t)p->size * sizeof *x);
        pd_param_get(p, x, p->size);
        for (int64_t i = 0; i < p->size; i++) {
            uint64_t bits = 0;
            memcpy(&bits, &x[i], sizeof x[i]);
            h = pd_random(h, bits);
        }
        free(x);
    }
    return h;
}

/* All ranks must hold the same bits: two halves of the hash, so that a double can carry each. */
static bool all_equal(job *j) {
    uint64_t h = hash_values(j);
    double own[2], sums[2];
    own[0] = sums[0] = (double)(h >> 32);
    own[1] = sums[1] = (double)(h & 0xffffffffu);
    if (mpi->all_reduce(mpi, sums, 2) != PD_OK) return false;
    return sums[0] == own[0] * ranks && sums[1] == own[1] * ranks;
}

static int compare(void) {
    job j, alone;
    double worst, limit = sizeof(pd_real) == 8 ? 1e-11 : 1e-5;
    int code = 0;
    if (!begin(&j, false)) return 1;
    if (train(&j, 2) != PD_OK) return 1;
    if (!all_equal(&j)) {
        complain("the ranks' values differ");
        code = 1;
    }
    if (rank == 0) {
        if (!begin(&alone, true) || train_alone(&alone, 2) != PD_OK) return 1;
        worst = worst_difference(&j, &alone);
        printf("worst relative difference %.3g\n", worst);
        if (!(worst <= limit)) code = 1;
        if (pd_trainer_samples(j.trainer) != pd_trainer_samples(alone.trainer)) {
            complain("another number of samples");
            code = 1;
        }
        end(&alone);
    }
    end(&j);
    return code;
}

static int bits(void) {
    job j;
    int code;
    if (!begin(&j, false) || train(&j, 2) != PD_OK) return 1;
    code = !all_equal(&j);
    if (rank == 0) printf("%016llx\n", (unsigned long long)hash_values(&j));
    end(&j);
    return code;
}

/* All values are read, here and there, after every batch: that must not change a bit. */
static int read_all(void *user, const pd_event *event) {
    job *j = (job *)user;
    if (event->kind != PD_END_BATCH) return 0;
    if (pd_sync(j->trainer) != PD_OK) return 1;
    return rank % 2 == 0 && hash_values(j) == 0;
}

static int reads(void) {
    uint64_t hash[2];
    int code = 0;
    for (int k = 0; k < 2; k++) {
        job j;
        after_batch = k ? read_all : NULL;
        if (!begin(&j, false) || train(&j, 2) != PD_OK) return 1;
        if (!all_equal(&j)) code = 1;
        hash[k] = hash_values(&j);
        end(&j);
    }
    if (hash[0] != hash[1]) complain("reading has changed bits");
    return code || hash[0] != hash[1];
}

/* Bytes of the payload of one step with this batch: see HOW in paddle_mpi.c. Of sparse parameters all row counts are
   worked out from the samples of all ranks. */
static int64_t expected_bytes(const job *j, int64_t step) {
    int64_t bytes = 0;
    bool wanted[WORDS], own = false;
    for (const pd_param *p = pd_param_first(j->net); p; p = p->next) {
        int64_t first, count, width = p->dims[1];
        if (p->is_buffer) continue;
        if (!p->opts.sparse) {
            pd_param_shard(p, rank, ranks, &first, &count);
            bytes += (p->size - count + (ranks - 1) * count) * (int64_t)sizeof(pd_real);
            continue;
        }
        for (int r = 0; r < ranks; r++) {
            pd_batch *b = pd_batch_new(j->net);
            memset(wanted, 0, sizeof wanted);
            for (int64_t k = step * BATCH; k < (step + 1) * BATCH; k++) add_sample(b, share_sample(r, k));
            for (int64_t i = 0; i < (b->slots[0].row_starts ? b->slots[0].row_starts[BATCH] : BATCH); i++)
                wanted[b->slots[0].ids[i]] = true;
            own = r == rank;
            for (int64_t i = 0; i < WORDS; i++) {
                if (!wanted[i]) continue;
                if (own && i % ranks != rank) bytes += 8 + width * (int64_t)sizeof(pd_real); /* id, gradient */
                if (!own && i % ranks == rank) bytes += width * (int64_t)sizeof(pd_real);    /* answer */
            }
            pd_batch_free(b);
        }
    }
    return bytes;
}

static int bytes(void) {
    job j;
    int code = 0, tables = has("rows") || has("words");
    if (!begin(&j, false)) return 1;
    pd_batch *b = pd_batch_new(j.net);
    for (int64_t step = 0; step < 4; step++) {
        int64_t before[3], after[3], payload, control;
        pd_batch_clear(b);
        for (int64_t k = step * BATCH; k < (step + 1) * BATCH; k++) add_sample(b, share_sample(rank, k));
        pd_mpi_sent(mpi, &before[0], &before[1]);
        before[2] = bytes_sent;
        if (pd_train_batch(j.trainer, b, NULL) != PD_OK) return complain(pd_error(j.net)), 1;
        pd_mpi_sent(mpi, &after[0], &after[1]);
        after[2] = bytes_sent;
        payload = after[0] - before[0];
        control = after[1] - before[1];
        if (after[2] - before[2] != payload + control) complain("the counters are wrong"), code = 1;
        /* Rows that others ask for may be answered late in the step, but are needed by its end. */
        if (payload != expected_bytes(&j, step)) {
            fprintf(stderr, "rank %d: step %d: %lld bytes, expected %lld\n", rank, (int)step, (long long)payload,
                    (long long)expected_bytes(&j, step));
            code = 1;
        }
        control -= (ranks - 1) * (8 * (1 + tables) + (has("clip") ? 8 : 0));
        if (control % heartbeat_bytes() != 0) /* heartbeats, on a busy machine */
            complain("other bytes than expected"), code = 1;
    }
    if (rank == 0 && !code) printf("bytes as expected, %lld messages in all\n", (long long)messages_sent);
    pd_batch_free(b);
    if (pd_sync(j.trainer) != PD_OK) code = 1;
    end(&j);
    return code;
}

static int steady(void) {
    job j;
    int64_t before;
    int code = 0;
    if (!begin(&j, false)) return 1;
    pd_batch *b = pd_batch_new(j.net);
    for (int64_t k = 0; k < BATCH; k++) add_sample(b, share_sample(rank, k));
    for (int step = 0; step < 3; step++) code |= pd_train_batch(j.trainer, b, NULL) != PD_OK;
    before = allocations;
    for (int step = 0; step < 20; step++) code |= pd_train_batch(j.trainer, b, NULL) != PD_OK;
    if (allocations != before) {
        fprintf(stderr, "rank %d: %lld allocations in 20 steps\n", rank, (long long)(allocations - before));
        code = 1;
    }
    pd_batch_free(b);
    end(&j);
    return code;
}

static int leak(void) {
    job j;
    if (!begin(&j, false) || train(&j, 1) != PD_OK || !pd_batch_new(j.net)) return 1;
    end(&j);
    return 0;
}

/* ---- pd_test, whose sums go through reduce ---- */

static int reduce(void) {
    job j, alone;
    double cost, error, cost_alone = 0, many[3000];
    int code = 0, all = ranks;
    if (!begin(&j, false) || train(&j, 1) != PD_OK) return 1;
    if (pd_test(j.trainer, &reader, BATCH, &cost) != PD_OK) return complain(pd_error(j.net)), 1;
    error = pd_evaluator_value(j.error, 0);
    for (int i = 0; i < COUNT(many); i++) many[i] = i + rank;
    if (mpi->all_reduce(mpi, many, COUNT(many)) != PD_OK) return 1;
    for (int i = 0; i < COUNT(many); i++)
        if (many[i] != i * all + all * (all - 1) / 2) code = 1;
    if (rank == 0) {
        if (!begin(&alone, true) || train_alone(&alone, 1) != PD_OK) return 1;
        ranks = 1; /* all samples */
        if (pd_test(alone.trainer, &reader, BATCH, &cost_alone) != PD_OK) return 1;
        ranks = all;
        if (fabs(cost - cost_alone) > 1e-5 || fabs(error - pd_evaluator_value(alone.error, 0)) > 1e-12) {
            fprintf(stderr, "cost %g, alone %g; error %g, alone %g\n", cost, cost_alone, error,
                    pd_evaluator_value(alone.error, 0));
            code = 1;
        }
        end(&alone);
    }
    end(&j);
    return code;
}

/* ---- failures; each ends with 3 on ranks that got a message ---- */

static int told(job *j, pd_status status) {
    const int code = status == PD_OK ? 0 : 3;
    end(j);
    return code;
}

typedef struct witness {
    job *j;
    double best_cost;
    uint64_t best;
} witness;

/* Notes what the best test was of; rank 1 leaves in the midst of the fourth pass. */
static int witness_event(void *user, const pd_event *event) {
    witness *w = (witness *)user;
    if (event->kind == PD_END_PASS && event->test_cost < w->best_cost) {
        w->best_cost = event->test_cost;
        w->best = hash_values(w->j);
    }
    return rank == 1 && event->kind == PD_END_BATCH && event->pass == 3 && event->batch == 2;
}

/* A worker is lost in a training, with patience or without: the others say so once, have the best values or the last,
   and can save them. */
static pd_status lost(job *j) {
    witness w;
    pd_train_opts o;
    pd_status status;
    char file[64];
    memset(&o, 0, sizeof o);
    w.j = j, w.best_cost = HUGE_VAL, w.best = 0;
    o.batch_size = BATCH;
    o.test = &reader;
    o.patience = has("impatient") ? 0 : 9;
    o.on_event = witness_event;
    o.user = &w;
    make_reader();
    status = pd_train(j->trainer, &reader, 9, &o);
    if (rank == 1) return PD_E_STATE;
    if (status == PD_OK || status == PD_STOPPED) return PD_OK;
    complain(pd_error(j->net));
    if (o.patience && hash_values(j) != w.best) complain("the best values are not in the net");
    snprintf(file, sizeof file, "/tmp/paddle_lost_%d_%d.safetensors", (int)getpid(), rank);
    if (pd_save(j->net, file) != PD_OK) complain(pd_error(j->net));
    remove(file);
    return status;
}

static int failures(const char *name) {
    job j;
    pd_status status;
    if (strcmp(name, "early") == 0 && rank == 1) return 3; /* before it has a trainer */
    if (strcmp(name, "lack") == 0 && rank == 1) fail_at = allocations + atoi(arguments[2]); /* of memory */
    if (!begin(&j, false)) {
        if (fail_at >= 0) complain(pd_error(j.net));
        end(&j);
        return 3;
    }
    if (strcmp(name, "early") == 0 || strcmp(name, "mismatch") == 0) return told(&j, PD_OK);
    if (strcmp(name, "signal") == 0) { /* sent to rank 1 by itself, in the middle of the training */
        if (rank == 1) stop_at = 20, stop_signal = has("kill") ? SIGKILL : SIGSTOP;
        return told(&j, train(&j, 1000));
    }
    if (strcmp(name, "reader") == 0) { /* a bad line in rank 1's file */
        pd_train_opts o;
        memset(&o, 0, sizeof o);
        o.batch_size = BATCH;
        make_reader();
        if (rank == 1) reader.next = read_bad;
        status = pd_train(j.trainer, &reader, 3, &o);
        if (status != PD_OK) complain(pd_error(j.net));
        return told(&j, status);
    }
    if (strcmp(name, "calls") == 0) { /* rank 0 wants to synchronise, the others train */
        pd_batch *b = pd_batch_new(j.net);
        add_sample(b, rank);
        status = pd_train_batch(j.trainer, b, NULL);
        if (status == PD_OK) status = rank == 0 ? pd_sync(j.trainer) : pd_train_batch(j.trainer, b, NULL);
        if (status != PD_OK) complain(pd_error(j.net));
        pd_batch_free(b);
        return told(&j, status);
    }
    if (strcmp(name, "sums") == 0) { /* rank 1 adds up more numbers than the others */
        double sums[2] = { 1, 2 };
        status = mpi->all_reduce(mpi, sums, rank == 1 ? 2 : 1);
        if (status != PD_OK) complain(pd_error(j.net));
        return told(&j, status);
    }
    if (strcmp(name, "lost") == 0) return told(&j, lost(&j));
    if (strcmp(name, "leaves") == 0) { /* rank 1 makes one pass less */
        status = train(&j, rank == 1 ? 1 : 2);
        return told(&j, rank == 1 && status == PD_OK ? PD_E_STATE : status);
    }
    status = train(&j, 1); /* "fails", with the word nan; "lack" */
    if (status != PD_OK && fail_at >= 0) complain(pd_error(j.net));
    return told(&j, status);
}

/* Trainers one after the other, with one updater. */
static int again(void) {
    int code = 0;
    for (int i = 0; i < 3; i++) {
        job j;
        if (!begin(&j, false) || train(&j, 1) != PD_OK || !all_equal(&j)) code = 1;
        end(&j);
    }
    return code;
}

/* Memory runs out, at each allocation in turn. For one rank: several would have to end after the first time. */
static int memory(const pd_mpi_opts *o) {
    pd_status status = PD_E_MEMORY;
    int code = 0;
    char why[256];
    for (int64_t k = 0; status != PD_OK; k++) {
        job j;
        pd_updater *first = mpi;
        memset(&j, 0, sizeof j);
        allocations = 0;
        fail_at = k;
        mpi = pd_mpi_new(o, why, sizeof why);
        if (mpi) status = begin(&j, false) ? train(&j, 1) : PD_E_MEMORY;
        else if (!strstr(why, "memory")) complain(why), code = 1;
        fail_at = -1;
        if (status != PD_OK && status != PD_E_MEMORY) complain(pd_error(j.net)), code = 1;
        end(&j);
        pd_mpi_free(mpi);
        mpi = first;
        if (k > 10000) return 1;
    }
    return code;
}

int main(int argc, char **argv) {
    char why[256] = "";
    const char *what = argc > 1 ? argv[1] : "";
    pd_mpi_opts o;
    int code;
    signal(SIGUSR1, SIG_IGN); /* with -disable-auto-cleanup the process manager sends it when a rank has died */
    argument_count = argc;
    arguments = argv;
    memset(&o, 0, sizeof o);
    if (has("quick")) o.heartbeat_seconds = 2;
    o.allocator.alloc = count_alloc;
    o.allocator.free = count_free;
    mpi = pd_mpi_new(&o, why, sizeof why);
    if (!mpi) return fprintf(stderr, "%s\n", why), 1;
    rank = pd_mpi_rank(mpi);
    ranks = pd_mpi_ranks(mpi);
    code = strcmp(what, "compare") == 0  ? compare()
           : strcmp(what, "bits") == 0   ? bits()
           : strcmp(what, "reads") == 0  ? reads()
           : strcmp(what, "bytes") == 0  ? bytes()
           : strcmp(what, "steady") == 0 ? steady()
           : strcmp(what, "reduce") == 0 ? reduce()
           : strcmp(what, "again") == 0  ? again()
           : strcmp(what, "leak") == 0   ? leak()
           : strcmp(what, "memory") == 0 ? memory(&o)
                                         : failures(what);
    pd_mpi_exit(mpi, code);
    return code;
}
