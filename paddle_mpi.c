/* paddle_mpi.c - v0.1.0 - paddle.h on a cluster: a synchronous sharded parameter server over MPI - MIT-or-Unlicense

   Include it after paddle.h. In the ONE file that defines PADDLE_IMPLEMENTATION it is the implementation too, in other
   files declarations only. Build with mpicc, start with mpiexec:

       mpicc -O2 -fopenmp train.c -o train -lm
       mpiexec -n 4 ./train

   Or compile it by itself, and link it: mpicc -O2 -c paddle_mpi.c. It uses only what paddle.h makes public.

   A WHOLE PROGRAM

   Every rank runs the same program, which reads its shard of the samples:

   ```c
   #define PADDLE_IMPLEMENTATION
   #include "paddle.h"
   #include "paddle_mpi.c"

   int main(void) {
       char why[256];
       pd_updater *mpi = pd_mpi_new(NULL, why, sizeof why);
       if (!mpi) return fprintf(stderr, "%s\n", why), 1;
       pd_net *net = pd_net_new(NULL);
       .. layers, up to cost ..
       pd_reader *reader = pd_csv_reader(net, "train.csv", NULL);
       pd_reader_shard(reader, pd_mpi_rank(mpi), pd_mpi_ranks(mpi));
       pd_trainer *trainer = pd_trainer_new(net, cost, pd_adam(0.001), &(pd_trainer_opts){ .updater = mpi });
       pd_status status = pd_train(trainer, reader, 10, &(pd_train_opts){ .batch_size = 32 });
       if (status != PD_OK) fprintf(stderr, "rank %d: %s\n", pd_mpi_rank(mpi), pd_error(net));
       if (status == PD_OK && pd_mpi_rank(mpi) == 0) pd_save(net, "model.safetensors");
       pd_reader_free(reader);
       pd_trainer_free(trainer);
       pd_net_free(net);
       pd_mpi_exit(mpi, status != PD_OK);
   }
   ```

   WHAT IT COMPUTES

   The same as one process with the ranks' batches put together: gradients are added up in the order of the ranks, and
   divided by the samples of all. batch_size is that of a rank. Two runs with as many ranks give the same bits; other
   numbers of ranks round differently. Layers that look at the whole batch (batch norm) see that of their rank. When a
   rank's reader ends before the others' it goes on with empty batches.

   All ranks start from rank 0's values, so it is enough that rank 0 loads a model before pd_trainer_new, and ranks may
   have different seeds (with the same one, dropout drops the same places of every rank's batch). pd_sync makes
   statistics, such as running means, the mean over the ranks.

   All ranks must make the same calls of pd_train, pd_train_batch, pd_sync, pd_test and of whatever makes values current
   by itself (pd_save, pd_predict .. after pd_train_batch, but not after pd_train). That is checked.

   HOW

   Each rank owns a shard of every parameter and keeps the optimizer's state for that. Owners get the gradients of their
   shard from all ranks as soon as they are final, step as soon as the last one has come, and send the new values, for
   which the next forward waits layer by layer. Per step a rank sends, of S numbers in dense parameters of which it owns
   O, S - O gradients and (ranks - 1) O values: together, over all ranks, 2 (ranks - 1) S, which is the least there is.
   A rank without samples sends no gradients. Of a sparse parameter only the rows in the batch travel: their ids to the
   owners, values back, gradients to the owners. Beside that each rank sends each other its number of samples, that of
   the rows of each sparse parameter, and with clip_norm a norm: 8 bytes each.

   One thread does all this inside the updater's calls, between layers and while it waits: no service thread, no
   collective operation, no one-sided one. MPI_THREAD_FUNNELED is enough.

   Memory beside the net's: the optimizer's state of the shard and, for gradients, (ranks - 1) times the shard.

   WHEN A RANK FAILS

   A rank that fails tells the others when its trainer is freed; their calls then fail with its message. Ranks that wait
   tell each other every second that they are alive. One from which nothing has been heard for heartbeat_seconds, when
   something is due from it, fails the call that waits. Only calls of the updater can tell, so heartbeat_seconds must be
   longer than what a rank does without one: its longest layer, reading a batch, saving a model between batches. After
   any such failure the training is over; start again from the last model saved.

   End the process by pd_mpi_exit, in place of MPI_Finalize. It waits for the other ranks, so that each can say what it
   knows, and aborts the job if one is lost. On several hosts it does without MPI_Finalize: that of MPICH, up to 4.1 at
   least, may wait for ever over TCP, as ranks close their connections while others already wait for the process
   manager. There, and after failures, a word to the process manager and _exit end the process.

   Tested with MPICH 4.0.2. Ranks must have the same byte order and the same pd_real.

   Licence: at the end of this file. */

#ifndef PADDLE_H
#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* for nanosleep under -std=c99 */
#endif
#include "paddle.h" /* this file is compiled by itself */
#define PD__MPI_ALONE 1
#endif

#ifndef PADDLE_MPI_H
#define PADDLE_MPI_H

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pd_mpi_opts {
    double heartbeat_seconds; /* a rank that others wait for may be silent for so long, at least 2; default 10 */
    pd_allocator allocator;   /* of what lives as long as the updater; the rest comes from the net's */
} pd_mpi_opts;

/* An updater for one trainer at a time, and for one after the other; for more at a time make more. Starts MPI if the
   program has not; all ranks of MPI_COMM_WORLD call it. NULL: the message, cut to `size` bytes, says why. */
PD_API pd_updater *pd_mpi_new(const pd_mpi_opts *opts, char *message, size_t size);

/* For programs that go on with MPI, or have more than one updater: waits for the other ranks and frees the updater,
   after the trainer is freed. False when a rank has failed or did not come: then MPI is of no more use, and MPI_Abort
   the only good end. */
PD_API bool pd_mpi_free(pd_updater *updater);

/* For all others: frees the updater (after the trainer is freed), ends MPI and then the process with `code`; does not
   return. NULL, as from a failed pd_mpi_new, is fine. */
PD_API void pd_mpi_exit(pd_updater *updater, int code);

PD_API int pd_mpi_rank(const pd_updater *updater);
PD_API int pd_mpi_ranks(const pd_updater *updater);

/* Bytes sent by this rank so far: gradients, values and ids of rows; and all else, such as heartbeats and the sums that
   pd_test adds up. Each may be NULL. */
PD_API void pd_mpi_sent(const pd_updater *updater, int64_t *payload, int64_t *control);

#ifdef __cplusplus
}
#endif

#endif /* PADDLE_MPI_H */

/* ======================================================================================================== */
/*                                            I M P L E M E N T A T I O N                                    */
/* ======================================================================================================== */

#if (defined(PADDLE_IMPLEMENTATION) || defined(PD__MPI_ALONE)) && !defined(PADDLE_MPI_IMPLEMENTED)
#define PADDLE_MPI_IMPLEMENTED

#include <ctype.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <mpi.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <windows.h>
#elif defined(__unix__) || defined(__APPLE__)
#define PD__MPI_POSIX 1
#include <sched.h>
#include <time.h>
#include <unistd.h>
#endif

#ifdef PADDLE_STATIC
#define PD__MPI_DEF PD_API
#else
#define PD__MPI_DEF
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================================== */
/* >>data: what an updater keeps                                                                            */

/* Tags of messages. Parameter i has those from PD__MPI_PARAMS + 3 i on. */
enum {
    PD__MPI_CONTROL,  /* pd__mpi_message */
    PD__MPI_ANNOUNCE, /* at the beginning of a batch: samples, and rows wanted of each sparse parameter */
    PD__MPI_NORM,     /* the norm of a shard, with clip_norm */
    PD__MPI_SUMS,     /* pd_updater.all_reduce */
    PD__MPI_BULK,     /* first values, and what sync sends */
    PD__MPI_PARAMS
};
enum { PD__MPI_GRADS, PD__MPI_VALUES, PD__MPI_IDS };

/* What is to be done when a transfer is complete, and with it all that `pending` counts. */
typedef enum pd__mpi_kind {
    PD__MPI_SEND,
    PD__MPI_RECEIVE,
    PD__MPI_HEAR,      /* a control message: act on it and listen for the next */
    PD__MPI_IDS_IN,    /* ids that a rank wants: answer */
    PD__MPI_ROWS_OUT,  /* the answer: expect their gradients */
    PD__MPI_ROWS_IN,   /* the rows wanted: put them in their places */
    PD__MPI_VALUES_IN, /* new values of a dense parameter */
    PD__MPI_GRADS_IN   /* gradients of rows */
} pd__mpi_kind;

typedef struct pd__mpi_transfer {
    pd__mpi_kind kind;
    int peer, slot; /* rank and parameter, -1 where there is none */
    int bytes;
    int *pending; /* counts the pieces under way .. */
    bool last;    /* .. of which this was the last, when it is complete */
} pd__mpi_transfer;

typedef enum pd__mpi_call { PD__MPI_NO_CALL, PD__MPI_START, PD__MPI_BATCH, PD__MPI_SYNC, PD__MPI_REDUCE } pd__mpi_call;
static const char *const pd__mpi_call_names[] = { "nothing", "pd_trainer_new", "a training step", "pd_sync", "a sum" };

/* A control message: a heartbeat, or, with a text, the last of a trainer or of the updater. */
typedef struct pd__mpi_message {
    int32_t rank, status;
    int32_t lost;    /* rank that has not been heard from, or -1 */
    int32_t call;    /* the call that the rank is in .. */
    int64_t turn;    /* .. and how many there were */
    int64_t trainer; /* the how manyeth; INT64_MAX: after all of them */
    char text[480];  /* why the rank has left; heartbeats end before this */
} pd__mpi_message;

/* Another rank. */
typedef struct pd__mpi_peer {
    double heard, sent; /* when anything came from there and went there last */
    bool present;       /* has been heard from since this trainer started */
    bool lost;          /* has been silent too long */
    double left_at;
    pd__mpi_message left; /* its last message of this sort; trainer 0: none */
    pd__mpi_message beat; /* to that rank */
    int beats;            /* .. under way */
} pd__mpi_peer;

/* What is kept about a sparse parameter. Offsets and blocks are by rank. */
typedef struct pd__mpi_table {
    int place;                /* of its number of rows in announcements */
    int64_t width;            /* numbers in a row */
    int64_t *out, *in;        /* ranks + 1 offsets: rows wanted from each rank, and rows that each wants from here */
    int64_t *wanted, *places; /* ids, and their places in param->rows; with this rank's own */
    int64_t *asked;           /* ids; without this rank's own */
    pd_real *mine;            /* of the rows wanted first the values, as they come, then the gradients, as they go */
    pd_real *theirs;          /* of the rows asked for, likewise */
    int *busy;                /* per rank: transfers of ids, then of values, then of gradients */
    int awaited;              /* ranks whose gradients have not come */
    int64_t count, *rows;     /* the rows with a gradient from any rank .. */
    int64_t *where;           /* .. and for each row of the shard its place there, if there it stands */
    pd_real *sums;            /* their gradients .. */
    pd_real *device_sums;     /* .. and where the device reads them, if it can't there */
    pd_real *device_rows;     /* rows on their way from there, likewise */
    int64_t wanted_capacity, places_capacity, asked_capacity, mine_capacity, theirs_capacity, rows_capacity,
        sums_capacity, device_capacity, device_rows_capacity;
} pd__mpi_table;

/* What is kept about a trained parameter. */
typedef struct pd__mpi_slot {
    pd_param *param;
    int64_t first, count;                           /* dense: the shard of this rank */
    int grads_in, grads_out, values_in, values_out; /* transfers under way */
    bool final, expecting, summed, applied;         /* in this step: its gradient is here; new values may come; .. */
    pd_real *inbox;                                 /* dense: gradients of the shard, from the other ranks in order */
    pd_real *grads, *values;                        /* dense: copies on the host; NULL when the device is there */
    pd__mpi_table *table;                           /* NULL: dense */
} pd__mpi_slot;

/* Sizes, which tests make smaller. */
#ifndef PD__MPI_PIECE
#define PD__MPI_PIECE (1 << 26) /* bytes of a transfer; MPI counts in int, and each piece is a sign of life */
#define PD__MPI_BOX 65536       /* numbers of a block in an exchange */
#endif

typedef struct pd__mpi {
    pd_updater updater;
    pd_allocator allocator;
    MPI_Comm comm;
    int rank, ranks;
    bool several_hosts;
    double limit;       /* seconds */
    pd_failure failure; /* the first one, which stays */
    bool told;          /* its text is another rank's, or about one */
    int lost;           /* the rank that it is about, or -1 */
    bool dropping;      /* transfers are being cancelled */
    bool stuck;         /* .. and could not be */
    int64_t payload, control;
    pd__mpi_peer *peers;
    pd__mpi_message incoming, farewell;
    int listening, farewells;

    MPI_Request *requests; /* under way; .. */
    pd__mpi_transfer *transfers, *finished;
    int *indices;
    MPI_Status *statuses;
    int live;
    int64_t request_capacity, transfer_capacity, finished_capacity, index_capacity, status_capacity;

    pd_trainer *trainer; /* NULL: none */
    pd_net *net;
    pd_device *device;
    int64_t trainers; /* so far */
    int64_t turn;
    pd__mpi_call call;
    double next_look;
    pd__mpi_slot *slots;
    int slot_count, table_count;

    /* of the step in progress */
    bool stepping, announced, dirty; /* dirty: pd__mpi_advance may find something to do */
    int64_t samples, job_samples;    /* of this rank's batch, of all */
    int64_t *out, *in;               /* announcements: for each rank 1 + table_count numbers */
    int leaving;                     /* announcements and ids on their way out */
    int unannounced, unsummed, unapplied;
    double *norms; /* per rank */
    int norms_due; /* transfers */
    bool norm_sent;

    /* of exchanges */
    char *box; /* a block per rank */
    int64_t box_capacity, *sizes;
    int exchanging;
} pd__mpi;

static int64_t pd__mpi_min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t pd__mpi_max(int64_t a, int64_t b) { return a > b ? a : b; }

static pd__mpi *pd__mpi_of(const pd_updater *u) { return (pd__mpi *)u->self; }

/* What rank r announced: samples, then rows of each sparse parameter. */
static int64_t *pd__mpi_announced(const pd__mpi *m, int r) { return m->in + r * (1 + m->table_count); }

static int64_t pd__mpi_reals(int64_t count) { return count * (int64_t)sizeof(pd_real); }

/* ======================================================================================================== */
/* >>failures                                                                                               */

/* The failure that has ended the job for this rank, as that of the call in progress. */
static pd_status pd__mpi_failed(pd__mpi *m) {
    if (m->trainer) pd_trainer_fail(m->trainer, m->failure.status, "%s", m->failure.text);
    return m->failure.status;
}

PD_PRINTF(3, 4) static pd_status pd__mpi_fail(pd__mpi *m, pd_status status, const char *format, ...) {
    va_list args;
    if (m->failure.status != PD_OK) return pd__mpi_failed(m);
    va_start(args, format);
    m->failure.status = status;
    vsnprintf(m->failure.text, sizeof m->failure.text, format, args);
    va_end(args);
    return pd__mpi_failed(m);
}

/* What a call of MPI returned. */
static pd_status pd__mpi_check(pd__mpi *m, int code, const char *call) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (code == MPI_SUCCESS) return PD_OK;
    MPI_Error_string(code, text, &length);
    for (char *c = text; *c; c++)
        if (*c == '\n') *c = ' ';
    return pd__mpi_fail(m, PD_E_DEVICE, "%s: %.400s", call, text);
}

static pd_status pd__mpi_no_memory(pd__mpi *m) {
    return pd__mpi_fail(m, PD_E_MEMORY, "out of memory for training with MPI");
}

/* A failure of the trainer in one of our calls of it, which has left its message in the net. */
static pd_status pd__mpi_trainer_failed(pd__mpi *m, pd_status status) {
    if (m->failure.status == PD_OK && status != PD_OK) {
        m->failure.status = status;
        snprintf(m->failure.text, sizeof m->failure.text, "%s", pd_error(m->net));
    }
    return status;
}

static bool pd__mpi_left(const pd__mpi *m, const pd__mpi_peer *p) {
    return p->left.trainer >= m->trainers && p->left.trainer;
}

/* ======================================================================================================== */
/* >>transfers                                                                                              */

static pd_status pd__mpi_wait(pd__mpi *m, const int *pending);

static bool pd__mpi_receives(pd__mpi_kind kind) { return kind != PD__MPI_SEND && kind != PD__MPI_ROWS_OUT; }

/* Room for so many transfers at a time. */
static bool pd__mpi_reserve(pd__mpi *m, int64_t count) {
    const pd_allocator *a = &m->allocator;
    return pd_grow(a, (void **)&m->requests, &m->request_capacity, count, sizeof *m->requests) &&
           pd_grow(a, (void **)&m->transfers, &m->transfer_capacity, count, sizeof *m->transfers) &&
           pd_grow(a, (void **)&m->finished, &m->finished_capacity, count, sizeof *m->finished) &&
           pd_grow(a, (void **)&m->indices, &m->index_capacity, count, sizeof *m->indices) &&
           pd_grow(a, (void **)&m->statuses, &m->status_capacity, count, sizeof *m->statuses);
}

/* Starts a transfer; nothing when there are no bytes. Of a control message the receiver does not know the size: it goes
   in one piece. */
static pd_status pd__mpi_post(pd__mpi *m, pd__mpi_kind kind, int slot, int peer, int tag, void *memory, int64_t bytes,
                              int *pending) {
    const int64_t piece = tag == PD__MPI_CONTROL ? bytes : PD__MPI_PIECE;
    bool send = !pd__mpi_receives(kind);
    pd__mpi_transfer t;
    t.kind = kind;
    t.peer = peer;
    t.slot = slot;
    t.pending = pending;
    t.last = false;
    for (int64_t first = 0; first < bytes; first += piece) {
        char *at = (char *)memory + first;
        int n = (int)pd__mpi_min(bytes - first, piece), code;
        if (!pd__mpi_reserve(m, (int64_t)m->live + 1)) return pd__mpi_no_memory(m);
        code = send ? MPI_Isend(at, n, MPI_BYTE, peer, tag, m->comm, &m->requests[m->live])
                    : MPI_Irecv(at, n, MPI_BYTE, peer < 0 ? MPI_ANY_SOURCE : peer, tag, m->comm, &m->requests[m->live]);
        if (code != MPI_SUCCESS) return pd__mpi_check(m, code, send ? "MPI_Isend" : "MPI_Irecv");
        t.bytes = n;
        m->transfers[m->live++] = t;
        ++*pending;
        if (send) {
            m->peers[peer].sent = pd_seconds();
            *(tag < PD__MPI_BULK ? &m->control : &m->payload) += n;
        }
    }
    return PD_OK;
}

static int pd__mpi_tag(int slot, int what) { return PD__MPI_PARAMS + 3 * slot + what; }

/* Waits for the next control message, from any rank. */
static pd_status pd__mpi_listen(pd__mpi *m) {
    return pd__mpi_post(m, PD__MPI_HEAR, -1, -1, PD__MPI_CONTROL, &m->incoming, sizeof m->incoming, &m->listening);
}

/* Moves what is complete to m->finished. */
static pd_status pd__mpi_collect(pd__mpi *m, int *count) {
    int done = 0, kept = 0, code;
    *count = 0;
    if (m->live == 0) return PD_OK;
    code = MPI_Testsome(m->live, m->requests, &done, m->indices, m->statuses);
    if (done == MPI_UNDEFINED) done = 0;
    for (int i = 0; i < done; i++) {
        m->finished[i] = m->transfers[m->indices[i]];
        if (code == MPI_ERR_IN_STATUS && m->statuses[i].MPI_ERROR != MPI_SUCCESS) code = m->statuses[i].MPI_ERROR;
    }
    for (int i = 0; i < m->live; i++) /* those done have become MPI_REQUEST_NULL */
        if (m->requests[i] != MPI_REQUEST_NULL) {
            m->requests[kept] = m->requests[i];
            m->transfers[kept++] = m->transfers[i];
        }
    m->live = kept;
    *count = done;
    return m->dropping ? PD_OK : pd__mpi_check(m, code, "MPI_Testsome");
}

/* A message that is too short. (MPI itself finds those that are too long.) */
static pd_status pd__mpi_check_size(pd__mpi *m, const pd__mpi_transfer *t, const MPI_Status *status) {
    int bytes = t->bytes;
    if (pd__mpi_receives(t->kind) && t->kind != PD__MPI_HEAR) MPI_Get_count(status, MPI_BYTE, &bytes);
    if (bytes == t->bytes || m->dropping) return PD_OK;
    m->told = true;
    return pd__mpi_fail(m, PD_E_STATE,
                        "rank %d has sent %d bytes, but rank %d expected %d: all must make the same calls", t->peer,
                        bytes, m->rank, t->bytes);
}

/* Acts on a control message. */
static pd_status pd__mpi_hear(pd__mpi *m) {
    const pd__mpi_message in = m->incoming;
    pd__mpi_peer *p = &m->peers[in.rank]; /* the same program sent it */
    pd_status status = pd__mpi_listen(m);
    p->heard = pd_seconds();
    p->present = p->present || in.trainer == m->trainers;
    if (in.text[0] && pd__mpi_left(m, p)) { /* what it said first says more */
        p->left.trainer = in.trainer;
        if (p->left.status == PD_OK) p->left.status = in.status;
    } else if (in.text[0]) {
        p->left = in;
        p->left_at = p->heard;
    } else if (status == PD_OK && m->failure.status == PD_OK && m->trainer && in.trainer == m->trainers &&
               in.turn == m->turn && in.call != (int)m->call) {
        m->told = true;
        return pd__mpi_fail(m, PD_E_STATE, "rank %d is in %s, but rank %d in %s: all must make the same calls", m->rank,
                            pd__mpi_call_names[m->call], (int)in.rank, pd__mpi_call_names[in.call]);
    }
    return status;
}

/* One look at all transfers, without acting on any but control messages. Goes through them all even if one has failed,
   or nobody would listen any more. */
static pd_status pd__mpi_receive(pd__mpi *m, int *count) {
    pd_status status = pd__mpi_collect(m, count), next;
    for (int i = 0; i < *count; i++) {
        const pd__mpi_transfer t = m->finished[i];
        m->finished[i].last = --*t.pending == 0;
        if (t.kind == PD__MPI_HEAR) {
            next = pd__mpi_hear(m);
        } else {
            next = status == PD_OK ? pd__mpi_check_size(m, &t, &m->statuses[i]) : status;
            if (pd__mpi_receives(t.kind)) {
                m->peers[t.peer].heard = pd_seconds();
                m->peers[t.peer].present = true;
            }
        }
        if (status == PD_OK) status = next;
    }
    return status;
}

/* ---- being alive ---- */

static pd_status pd__mpi_tell(pd__mpi *m, int peer, pd__mpi_message *message, int *pending) {
    size_t size = offsetof(pd__mpi_message, text) + strlen(message->text) + 1;
    return pd__mpi_post(m, PD__MPI_SEND, -1, peer, PD__MPI_CONTROL, message, (int64_t)size, pending);
}

static void pd__mpi_address(const pd__mpi *m, pd__mpi_message *message) {
    message->rank = m->rank;
    message->status = (int32_t)m->failure.status;
    message->lost = m->lost;
    message->call = (int32_t)m->call;
    message->turn = m->turn;
    message->trainer = m->trainers;
    message->text[0] = 0;
}

/* A heartbeat to every rank that has got nothing for a second. */
static pd_status pd__mpi_beat(pd__mpi *m, double now) {
    pd_status status = PD_OK;
    for (int r = 0; status == PD_OK && r < m->ranks; r++) {
        pd__mpi_peer *p = &m->peers[r];
        if (r == m->rank || p->beats > 0 || now - p->sent < 1 || pd__mpi_left(m, p)) continue;
        pd__mpi_address(m, &p->beat);
        status = pd__mpi_tell(m, r, &p->beat, &p->beats);
    }
    return status;
}

/* Fails when something is due from, or to, a rank that has left or fallen silent. `since`: this rank has not looked
   before. Looks and beats ten times a second. A rank that has left may still be heard for a second, so that what it
   sent before is not lost. */
static pd_status pd__mpi_look(pd__mpi *m, double since) {
    double now = pd_seconds();
    pd_status status;
    if (now < m->next_look) return PD_OK;
    m->next_look = now + 0.1;
    status = pd__mpi_beat(m, now);
    for (int i = 0; status == PD_OK && i < m->live; i++) {
        const pd__mpi_transfer *t = &m->transfers[i];
        pd__mpi_peer *p = t->peer < 0 ? NULL : &m->peers[t->peer];
        if (!p || t->pending == &p->beats) continue;
        if (pd__mpi_left(m, p) && now - fmax(p->left_at, since) > 1) {
            m->told = true;
            m->lost = p->left.lost;
            if (m->lost >= 0 && m->lost < m->ranks) m->peers[m->lost].lost = true;
            return pd__mpi_fail(m, p->left.status ? (pd_status)p->left.status : PD_E_STATE, "%s", p->left.text);
        }
        if (p->present && now - fmax(p->heard, since) > m->limit) {
            m->told = p->lost = true;
            m->lost = t->peer;
            return pd__mpi_fail(m, PD_E_STATE, "rank %d has not been heard from for %g s (heartbeat_seconds)", t->peer,
                                m->limit);
        }
    }
    return status;
}

static void pd__mpi_yield(void) {
#if defined(_WIN32)
    SwitchToThread();
#elif defined(PD__MPI_POSIX)
    sched_yield();
#endif
}

static void pd__mpi_sleep(void) {
#if defined(_WIN32)
    Sleep(1);
#elif defined(PD__MPI_POSIX)
    const struct timespec millisecond = { 0, 1000000 };
    nanosleep(&millisecond, NULL);
#endif
}

/* ---- blocks for all ---- */

static bool pd__mpi_need_box(pd__mpi *m, int64_t size) {
    return pd_grow(pd_net_allocator(m->net), (void **)&m->box, &m->box_capacity, m->ranks * size, 1);
}

/* Block r of m->box (blocks of `size` bytes, of which m->sizes[r] are used) comes from rank r, on all ranks. */
static pd_status pd__mpi_exchange(pd__mpi *m, int tag, int64_t size) {
    pd_status status = PD_OK;
    for (int r = 0; status == PD_OK && r < m->ranks; r++) {
        if (r == m->rank) continue;
        status = pd__mpi_post(m, PD__MPI_RECEIVE, -1, r, tag, m->box + r * size, m->sizes[r], &m->exchanging);
        if (status == PD_OK)
            status =
                pd__mpi_post(m, PD__MPI_SEND, -1, r, tag, m->box + m->rank * size, m->sizes[m->rank], &m->exchanging);
    }
    return status == PD_OK ? pd__mpi_wait(m, &m->exchanging) : status;
}

/* From rank 0 to all, along a binomial tree: a rank's parent is itself without its lowest bit. */
static pd_status pd__mpi_broadcast(pd__mpi *m, void *memory, int64_t bytes) {
    int bit = 1;
    pd_status status = PD_OK;
    while (bit < m->ranks && !(m->rank & bit)) bit *= 2;
    if (m->rank > 0)
        status = pd__mpi_post(m, PD__MPI_RECEIVE, -1, m->rank - bit, PD__MPI_BULK, memory, bytes, &m->exchanging);
    if (status == PD_OK) status = pd__mpi_wait(m, &m->exchanging);
    while (bit /= 2, status == PD_OK && bit > 0)
        if (m->rank + bit < m->ranks)
            status = pd__mpi_post(m, PD__MPI_SEND, -1, m->rank + bit, PD__MPI_BULK, memory, bytes, &m->exchanging);
    return status == PD_OK ? pd__mpi_wait(m, &m->exchanging) : status;
}

static pd_status pd__mpi_add_up(pd__mpi *m, double *sums, int64_t count) {
    enum { AT_ONCE = 1024 };
    const int64_t size = AT_ONCE * sizeof *sums;
    if (m->ranks == 1) return PD_OK;
    if (!pd__mpi_need_box(m, size)) return pd__mpi_no_memory(m);
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        int64_t n = pd__mpi_min(count - first, AT_ONCE);
        pd_status status;
        for (int r = 0; r < m->ranks; r++) m->sizes[r] = n * (int64_t)sizeof *sums;
        memcpy(m->box + m->rank * size, sums + first, (size_t)n * sizeof *sums);
        status = pd__mpi_exchange(m, PD__MPI_SUMS, size);
        if (status != PD_OK) return status;
        memset(sums + first, 0, (size_t)n * sizeof *sums);
        for (int r = 0; r < m->ranks; r++) {
            const double *from = (const double *)(const void *)(m->box + r * size);
            for (int64_t i = 0; i < n; i++) sums[first + i] += from[i];
        }
    }
    return PD_OK;
}

/* ======================================================================================================== */
/* >>steps: what an owner does, as far as what has come allows                                              */

/* The shard's gradients of all ranks with samples, in the order of the ranks; `own` is this rank's, and the sum. */
static void pd__mpi_sum_shard(const pd__mpi *m, const pd__mpi_slot *s, pd_real *own) {
    enum { AT_ONCE = 256 };
    double sums[AT_ONCE];
    for (int64_t first = 0; first < s->count; first += AT_ONCE) {
        int64_t n = pd__mpi_min(s->count - first, AT_ONCE);
        memset(sums, 0, sizeof sums);
        for (int r = 0; r < m->ranks; r++) {
            const pd_real *from = r == m->rank ? own : s->inbox + (r - (r > m->rank)) * s->count;
            if (pd__mpi_announced(m, r)[0] == 0) continue;
            for (int64_t i = 0; i < n; i++) sums[i] += (double)from[first + i];
        }
        for (int64_t i = 0; i < n; i++) own[first + i] = (pd_real)sums[i];
    }
}

static void pd__mpi_sum_dense(pd__mpi *m, pd__mpi_slot *s) {
    pd_real *grad = s->param->grad + s->first;
    pd__mpi_sum_shard(m, s, s->grads ? s->grads + s->first : grad);
    if (s->grads && s->count > 0)
        m->device->upload(m->device, grad, s->grads + s->first, (size_t)pd__mpi_reals(s->count));
}

/* The rows of all ranks, each once, in the order of the ranks and of their batches. */
static pd_status pd__mpi_sum_rows(pd__mpi *m, pd__mpi_slot *s) {
    pd__mpi_table *t = s->table;
    const pd_allocator *a = pd_net_allocator(m->net);
    int64_t most = t->in[m->ranks] + t->out[m->rank + 1] - t->out[m->rank], numbers = most * t->width;
    if (!pd_grow(a, (void **)&t->rows, &t->rows_capacity, most, sizeof *t->rows) ||
        !pd_grow(a, (void **)&t->sums, &t->sums_capacity, numbers, sizeof *t->sums) ||
        (!m->device->host_memory && !pd_device_grow(m->device, &t->device_sums, &t->device_capacity, numbers)))
        return pd__mpi_no_memory(m);
    t->count = 0;
    for (int r = 0; r < m->ranks; r++) {
        bool own = r == m->rank;
        const int64_t *offset = own ? t->out : t->in, *ids = own ? t->wanted : t->asked;
        const pd_real *grads = own ? t->mine : t->theirs;
        for (int64_t k = offset[r]; k < offset[r + 1]; k++) {
            int64_t local = ids[k] / m->ranks, at = t->where[local];
            const pd_real *from = grads + k * t->width;
            pd_real *to;
            if (at >= t->count || t->rows[at] != ids[k]) {
                at = t->where[local] = t->count++;
                t->rows[at] = ids[k];
                memcpy(t->sums + at * t->width, from, (size_t)pd__mpi_reals(t->width));
                continue;
            }
            to = t->sums + at * t->width;
            for (int64_t i = 0; i < t->width; i++) to[i] += from[i];
        }
    }
    if (!m->device->host_memory && t->count > 0)
        m->device->upload(m->device, t->device_sums, t->sums, (size_t)pd__mpi_reals(t->count * t->width));
    return PD_OK;
}

static const pd_real *pd__mpi_row_sums(const pd__mpi *m, const pd__mpi_table *t) {
    return m->device->host_memory ? t->sums : t->device_sums;
}

static double pd__mpi_norm(const pd__mpi *m, const pd__mpi_slot *s) {
    pd_device *d = m->device;
    if (s->table) return d->norm(d, s->table->count * s->table->width, pd__mpi_row_sums(m, s->table));
    return d->norm(d, s->count, s->param->grad + s->first);
}

/* A step on the shard. The values sent before have arrived everywhere (the gradients that this step was made of were
   computed from them), and pd__mpi_advance has seen to it that MPI has done with them too. */
static pd_status pd__mpi_apply(pd__mpi *m, int slot, double clip_scale) {
    pd__mpi_slot *s = &m->slots[slot];
    pd__mpi_table *t = s->table;
    pd_param *p = s->param;
    pd_real *values = s->values ? s->values + s->first : p->value + s->first;
    pd_status status =
        t ? pd_trainer_apply_rows(m->trainer, p, t->count, t->rows, pd__mpi_row_sums(m, t), m->job_samples, clip_scale)
          : pd_trainer_apply(m->trainer, p, m->job_samples, clip_scale);
    if (status != PD_OK) return pd__mpi_trainer_failed(m, status);
    s->applied = true;
    m->unapplied--;
    if (t || m->ranks == 1) return PD_OK;
    if (s->values && s->count > 0)
        m->device->download(m->device, values, p->value + s->first, (size_t)pd__mpi_reals(s->count));
    for (int r = 0; status == PD_OK && r < m->ranks; r++)
        if (r != m->rank)
            status = pd__mpi_post(m, PD__MPI_SEND, slot, r, pd__mpi_tag(slot, PD__MPI_VALUES), values,
                                  pd__mpi_reals(s->count), &s->values_out);
    return status;
}

/* The new values of the other shares. This rank has done with the old ones. */
static pd_status pd__mpi_expect_values(pd__mpi *m, int slot) {
    pd__mpi_slot *s = &m->slots[slot];
    pd_status status = PD_OK;
    s->expecting = true;
    for (int r = 0; status == PD_OK && !s->table && r < m->ranks; r++) {
        int64_t first, count;
        pd_param_shard(s->param, r, m->ranks, &first, &count);
        if (r != m->rank)
            status =
                pd__mpi_post(m, PD__MPI_VALUES_IN, slot, r, pd__mpi_tag(slot, PD__MPI_VALUES),
                             (s->values ? s->values : s->param->value) + first, pd__mpi_reals(count), &s->values_in);
    }
    return status;
}

/* All ranks' samples are known, and how many rows each wants: makes room for what will come. */
static pd_status pd__mpi_expect_grads(pd__mpi *m) {
    pd_status status = PD_OK;
    m->announced = true;
    m->job_samples = 0;
    for (int r = 0; r < m->ranks; r++) m->job_samples += pd__mpi_announced(m, r)[0];
    for (int i = 0; status == PD_OK && i < m->slot_count; i++) {
        pd__mpi_slot *s = &m->slots[i];
        pd__mpi_table *t = s->table;
        for (int r = 0; t && r < m->ranks; r++)
            t->in[r + 1] = t->in[r] + (r == m->rank ? 0 : pd__mpi_announced(m, r)[t->place]);
        if (t && (!pd_grow(pd_net_allocator(m->net), (void **)&t->asked, &t->asked_capacity, t->in[m->ranks],
                           sizeof *t->asked) ||
                  !pd_grow(pd_net_allocator(m->net), (void **)&t->theirs, &t->theirs_capacity,
                           t->in[m->ranks] * t->width, sizeof *t->theirs)))
            return pd__mpi_no_memory(m);
        for (int r = 0; status == PD_OK && r < m->ranks; r++) {
            if (r == m->rank || pd__mpi_announced(m, r)[0] == 0) continue;
            if (!t) {
                status = pd__mpi_post(m, PD__MPI_RECEIVE, i, r, pd__mpi_tag(i, PD__MPI_GRADS),
                                      s->inbox + (r - (r > m->rank)) * s->count, pd__mpi_reals(s->count), &s->grads_in);
                continue;
            }
            t->awaited += t->in[r + 1] > t->in[r];
            status = pd__mpi_post(m, PD__MPI_IDS_IN, i, r, pd__mpi_tag(i, PD__MPI_IDS), t->asked + t->in[r],
                                  (t->in[r + 1] - t->in[r]) * (int64_t)sizeof *t->asked, &t->busy[r]);
        }
    }
    return status;
}

/* With clip_norm: the norm of this rank's shares goes to all; when all have come, the steps. */
static pd_status pd__mpi_advance_norm(pd__mpi *m) {
    double all = 0, scale;
    pd_status status = PD_OK;
    if (!m->norm_sent) {
        m->norm_sent = true;
        m->norms[m->rank] = 0;
        for (int i = 0; i < m->slot_count; i++) { /* one that isn't finite is found below */
            const double norm = hypot(m->norms[m->rank], pd__mpi_norm(m, &m->slots[i]));
            m->norms[m->rank] = isfinite(norm) || !isfinite(pd__mpi_norm(m, &m->slots[i])) ? norm : DBL_MAX;
        }
        for (int r = 0; status == PD_OK && r < m->ranks; r++) {
            if (r == m->rank) continue;
            status =
                pd__mpi_post(m, PD__MPI_RECEIVE, -1, r, PD__MPI_NORM, &m->norms[r], sizeof *m->norms, &m->norms_due);
            if (status == PD_OK)
                status = pd__mpi_post(m, PD__MPI_SEND, -1, r, PD__MPI_NORM, &m->norms[m->rank], sizeof *m->norms,
                                      &m->norms_due);
        }
    }
    if (status != PD_OK || m->norms_due > 0) return status;
    for (int i = 0; i < m->slot_count && !isfinite(m->norms[m->rank]); i++) /* ours; the step says which */
        if (!isfinite(pd__mpi_norm(m, &m->slots[i]))) return pd__mpi_apply(m, i, 1);
    for (int r = 0; r < m->ranks; r++) {
        if (!isfinite(m->norms[r])) {
            m->told = true;
            return pd__mpi_fail(m, PD_E_NUMERIC, "rank %d: a gradient is not finite", r);
        }
        all = fmin(hypot(all, m->norms[r]), DBL_MAX);
    }
    scale = pd_trainer_clip_scale(m->trainer, all, m->job_samples);
    for (int i = 0; status == PD_OK && i < m->slot_count; i++) status = pd__mpi_apply(m, i, scale);
    return status;
}

/* Whatever has become possible. */
static pd_status pd__mpi_advance(pd__mpi *m) {
    bool clips = m->trainer && pd_trainer_clips_norm(m->trainer);
    pd_status status = PD_OK;
    m->dirty = false;
    if (!m->stepping || m->unannounced > 0) return PD_OK;
    if (!m->announced) status = pd__mpi_expect_grads(m);
    for (int i = 0; status == PD_OK && i < m->slot_count; i++) {
        pd__mpi_slot *s = &m->slots[i];
        if (!s->final || s->applied) continue;
        if (m->job_samples == 0) { /* nothing to learn, and nothing has been sent */
            s->applied = true;
            m->unapplied--;
            continue;
        }
        if (!s->expecting) status = pd__mpi_expect_values(m, i);
        if (status != PD_OK || s->summed || s->grads_in > 0 || s->grads_out > 0 || s->values_out > 0 ||
            (s->table && s->table->awaited > 0))
            continue;
        if (s->table) status = pd__mpi_sum_rows(m, s);
        else pd__mpi_sum_dense(m, s);
        s->summed = true;
        m->unsummed--;
        if (status == PD_OK && !clips) status = pd__mpi_apply(m, i, 1);
    }
    if (status == PD_OK && clips && m->job_samples > 0 && m->unsummed == 0 && m->unapplied > 0)
        status = pd__mpi_advance_norm(m);
    return status;
}

/* ---- rows ---- */

/* Rows of the shard as they are now, to host memory. */
static pd_status pd__mpi_read_rows(pd__mpi *m, const pd__mpi_slot *s, int64_t count, const int64_t *rows, pd_real *to) {
    pd__mpi_table *t = s->table;
    pd_device *d = m->device;
    pd_real *rows_there = to;
    pd_status status;
    if (!d->host_memory) {
        if (!pd_device_grow(d, &t->device_rows, &t->device_rows_capacity, count * t->width))
            return pd__mpi_no_memory(m);
        rows_there = t->device_rows;
    }
    status = pd__mpi_trainer_failed(m, pd_trainer_read_rows(m->trainer, s->param, count, rows, rows_there));
    if (status == PD_OK && rows_there != to && count > 0)
        d->download(d, to, rows_there, (size_t)pd__mpi_reals(count * t->width));
    return status;
}

/* Sends the rows that a rank has asked for. All steps before this batch have been made. */
static pd_status pd__mpi_answer(pd__mpi *m, int slot, int peer) {
    const pd_param *p = m->slots[slot].param;
    pd__mpi_table *t = m->slots[slot].table;
    int64_t first = t->in[peer], n = t->in[peer + 1] - first;
    pd_status status;
    for (int64_t k = first; k < first + n; k++)
        if (t->asked[k] < 0 || t->asked[k] >= p->dims[0] || t->asked[k] % m->ranks != m->rank)
            return pd__mpi_fail(m, PD_E_STATE, "rank %d asks rank %d for row %lld of \"%.100s\"", peer, m->rank,
                                (long long)t->asked[k], p->name);
    status = pd__mpi_read_rows(m, &m->slots[slot], n, t->asked + first, t->theirs + first * t->width);
    if (status != PD_OK) return status;
    return pd__mpi_post(m, PD__MPI_ROWS_OUT, slot, peer, pd__mpi_tag(slot, PD__MPI_VALUES),
                        t->theirs + first * t->width, pd__mpi_reals(n * t->width), &t->busy[peer]);
}

/* The rows wanted have come from all owners. */
static void pd__mpi_take_rows(pd__mpi *m, const pd__mpi_slot *s) {
    pd_device *d = m->device;
    const pd__mpi_table *t = s->table;
    for (int64_t k = 0; k < t->out[m->ranks]; k++)
        if (k < t->out[m->rank] || k >= t->out[m->rank + 1])
            d->upload(d, s->param->row_values + t->places[k] * t->width, t->mine + k * t->width,
                      (size_t)pd__mpi_reals(t->width));
}

/* The other ranks' shares have come to the host. */
static void pd__mpi_take_values(pd__mpi *m, const pd__mpi_slot *s) {
    pd_device *d = m->device;
    int64_t end = s->first + s->count, rest = s->param->size - end;
    if (!s->values) return;
    if (s->first > 0) d->upload(d, s->param->value, s->values, (size_t)pd__mpi_reals(s->first));
    if (rest > 0) d->upload(d, s->param->value + end, s->values + end, (size_t)pd__mpi_reals(rest));
}

/* What follows from a complete transfer, of which the last piece has come. */
static pd_status pd__mpi_complete(pd__mpi *m, pd__mpi_transfer t) {
    pd__mpi_slot *s = t.slot >= 0 ? &m->slots[t.slot] : NULL;
    pd__mpi_table *table = s ? s->table : NULL;
    switch (t.kind) {
    case PD__MPI_SEND:
    case PD__MPI_RECEIVE:
    case PD__MPI_HEAR: break;
    case PD__MPI_IDS_IN: return pd__mpi_answer(m, t.slot, t.peer);
    case PD__MPI_ROWS_OUT:
        return pd__mpi_post(m, PD__MPI_GRADS_IN, t.slot, t.peer, pd__mpi_tag(t.slot, PD__MPI_GRADS),
                            table->theirs + table->in[t.peer] * table->width,
                            pd__mpi_reals((table->in[t.peer + 1] - table->in[t.peer]) * table->width),
                            &table->busy[t.peer]);
    case PD__MPI_GRADS_IN: table->awaited--; break;
    case PD__MPI_ROWS_IN: pd__mpi_take_rows(m, s); break;
    case PD__MPI_VALUES_IN: pd__mpi_take_values(m, s); break;
    }
    return PD_OK;
}

/* One look at all transfers, and what follows from them. */
static pd_status pd__mpi_serve(pd__mpi *m) {
    int count;
    pd_status status;
    if (m->failure.status != PD_OK) return pd__mpi_failed(m);
    status = pd__mpi_receive(m, &count);
    for (int i = 0; status == PD_OK && i < count; i++)
        if (m->finished[i].last) status = pd__mpi_complete(m, m->finished[i]);
    if (status == PD_OK && (count > 0 || m->dirty)) status = pd__mpi_advance(m);
    return status;
}

/* Serves until *pending is 0. */
static pd_status pd__mpi_wait(pd__mpi *m, const int *pending) {
    double since = pd_seconds();
    pd_status status = m->failure.status != PD_OK ? pd__mpi_failed(m) : PD_OK;
    while (status == PD_OK && *pending > 0) {
        status = pd__mpi_serve(m);
        if (status != PD_OK || *pending == 0) break;
        status = pd__mpi_look(m, since);
        pd__mpi_yield();
    }
    return status;
}

/* ======================================================================================================== */
/* >>training: the updater's calls                                                                          */

/* A call that all ranks make: with its number, so that ranks in different calls are found. */
static pd_status pd__mpi_enter(pd__mpi *m, pd__mpi_call call) {
    m->turn++;
    m->call = call;
    if (m->failure.status != PD_OK) return pd__mpi_failed(m);
    if (m->stepping) return pd__mpi_fail(m, PD_E_STATE, "the last training step was not finished");
    return PD_OK;
}

static int pd__mpi_slot_of(const pd__mpi *m, const pd_param *p) { return pd_trainer_index(m->trainer, p); }

/* Sorts the rows that the batch names by their owners, and asks for them. */
static pd_status pd__mpi_want_rows(pd__mpi *m, int slot) {
    const pd_allocator *a = pd_net_allocator(m->net);
    pd__mpi_slot *s = &m->slots[slot];
    pd__mpi_table *t = s->table;
    pd_param *p = s->param;
    int64_t n = m->samples > 0 ? p->rows.count : 0;
    pd_status status;
    if (!pd_grow(a, (void **)&t->wanted, &t->wanted_capacity, n, sizeof *t->wanted) ||
        !pd_grow(a, (void **)&t->places, &t->places_capacity, n, sizeof *t->places) ||
        !pd_grow(a, (void **)&t->mine, &t->mine_capacity, n * t->width, sizeof *t->mine))
        return pd__mpi_no_memory(m);
    t->awaited = 0;
    memset(t->out, 0, (size_t)(m->ranks + 1) * sizeof *t->out);
    for (int64_t i = 0; i < n; i++) t->out[p->rows.ids[i] % m->ranks + 1]++;
    for (int r = 0; r < m->ranks; r++) t->out[r + 1] += t->out[r];
    for (int64_t i = 0; i < n; i++) { /* out[r] is where rank r's next goes, .. */
        int64_t at = t->out[p->rows.ids[i] % m->ranks]++;
        t->wanted[at] = p->rows.ids[i];
        t->places[at] = i;
    }
    for (int r = m->ranks; r > 0; r--) t->out[r] = t->out[r - 1]; /* .. and has become where rank r + 1 begins */
    t->out[0] = 0;
    status = pd_trainer_read_rows(m->trainer, p, n, p->rows.ids, p->row_values); /* the others' come over these */
    if (status != PD_OK) return pd__mpi_trainer_failed(m, status);
    for (int r = 0; r < m->ranks; r++) m->out[r * (1 + m->table_count) + t->place] = t->out[r + 1] - t->out[r];
    for (int r = 0; status == PD_OK && r < m->ranks; r++) {
        int64_t first = t->out[r], count = t->out[r + 1] - first;
        if (r == m->rank) continue;
        status = pd__mpi_post(m, PD__MPI_SEND, slot, r, pd__mpi_tag(slot, PD__MPI_IDS), t->wanted + first,
                              count * (int64_t)sizeof *t->wanted, &m->leaving);
        if (status == PD_OK)
            status = pd__mpi_post(m, PD__MPI_ROWS_IN, slot, r, pd__mpi_tag(slot, PD__MPI_VALUES),
                                  t->mine + first * t->width, pd__mpi_reals(count * t->width), &s->values_in);
    }
    return status;
}

static pd_status pd__mpi_begin_batch(pd_updater *u, int64_t samples) {
    pd__mpi *m = pd__mpi_of(u);
    const int64_t numbers = 1 + m->table_count, bytes = numbers * (int64_t)sizeof *m->out;
    pd_status status = pd__mpi_enter(m, PD__MPI_BATCH);
    if (status == PD_OK) status = pd__mpi_wait(m, &m->leaving); /* of the last batch: have come, but MPI may not know */
    if (status != PD_OK) return status;
    m->stepping = m->dirty = true;
    m->announced = m->norm_sent = false;
    m->samples = samples;
    m->unsummed = m->unapplied = m->slot_count;
    for (int i = 0; status == PD_OK && i < m->slot_count; i++) {
        pd__mpi_slot *s = &m->slots[i];
        s->final = s->expecting = s->summed = s->applied = false;
        if (s->table) status = pd__mpi_want_rows(m, i);
    }
    for (int r = 0; status == PD_OK && r < m->ranks; r++) {
        m->out[r * numbers] = samples;
        if (r == m->rank) {
            memcpy(pd__mpi_announced(m, r), m->out + r * numbers, (size_t)bytes);
            continue;
        }
        status = pd__mpi_post(m, PD__MPI_SEND, -1, r, PD__MPI_ANNOUNCE, m->out + r * numbers, bytes, &m->leaving);
        if (status == PD_OK)
            status = pd__mpi_post(m, PD__MPI_RECEIVE, -1, r, PD__MPI_ANNOUNCE, pd__mpi_announced(m, r), bytes,
                                  &m->unannounced);
    }
    return status == PD_OK ? pd__mpi_serve(m) : status;
}

static pd_status pd__mpi_param_needed(pd_updater *u, pd_param *param) {
    pd__mpi *m = pd__mpi_of(u);
    int slot = pd__mpi_slot_of(m, param);
    return slot >= 0 ? pd__mpi_wait(m, &m->slots[slot].values_in) : PD_OK;
}

static pd_status pd__mpi_grad_final(pd_updater *u, pd_param *param) {
    pd__mpi *m = pd__mpi_of(u);
    pd_device *d = m->device;
    int slot = pd__mpi_slot_of(m, param), tag = pd__mpi_tag(slot, PD__MPI_GRADS);
    pd__mpi_slot *s;
    pd__mpi_table *t;
    pd_status status = PD_OK;
    if (slot < 0) return PD_OK; /* part of the net, but not of this training */
    s = &m->slots[slot];
    t = s->table;
    s->final = m->dirty = true;
    if (s->grads) d->download(d, s->grads, param->grad, (size_t)pd__mpi_reals(param->size));
    for (int64_t k = 0; t && k < t->out[m->ranks]; k++)
        d->download(d, t->mine + k * t->width, param->grad + t->places[k] * t->width, (size_t)pd__mpi_reals(t->width));
    for (int r = 0; status == PD_OK && m->samples > 0 && r < m->ranks; r++) {
        pd_real *from = s->grads ? s->grads : param->grad;
        int64_t first, count;
        if (r == m->rank) continue;
        pd_param_shard(param, r, m->ranks, &first, &count);
        status = t ? pd__mpi_post(m, PD__MPI_SEND, slot, r, tag, t->mine + t->out[r] * t->width,
                                  pd__mpi_reals((t->out[r + 1] - t->out[r]) * t->width), &s->grads_out)
                   : pd__mpi_post(m, PD__MPI_SEND, slot, r, tag, from + first, pd__mpi_reals(count), &s->grads_out);
    }
    return status == PD_OK ? pd__mpi_serve(m) : status;
}

static pd_status pd__mpi_poll(pd_updater *u) {
    pd__mpi *m = pd__mpi_of(u);
    pd_status status = pd__mpi_serve(m);
    double now = pd_seconds();
    if (status != PD_OK || now < m->next_look) return status;
    m->next_look = now + 0.1;
    return pd__mpi_beat(m, now);
}

/* Waits for the gradients of all ranks, so that this rank's steps are made within the batch that they belong to (the
   trainer counts on that); but not for values. */
static pd_status pd__mpi_end_batch(pd_updater *u, int64_t *samples) {
    pd__mpi *m = pd__mpi_of(u);
    pd_status status = pd__mpi_wait(m, &m->unapplied);
    if (status != PD_OK) return status;
    m->stepping = false;
    *samples = m->job_samples;
    return PD_OK;
}

/* ---- sync ---- */

/* The rows of every rank's shard, as they are now, go to all others, a box at a time. */
static pd_status pd__mpi_gather(pd__mpi *m, const pd__mpi_slot *s) {
    pd_device *d = m->device;
    pd_param *p = s->param;
    const int64_t width = p->dims[1], each = pd__mpi_max(1, PD__MPI_BOX / pd__mpi_max(width, 1)),
                  size = pd__mpi_reals(each * width);
    const size_t bytes = (size_t)pd__mpi_reals(width);
    int64_t *ids;
    if (!pd__mpi_need_box(m, size)) return pd__mpi_no_memory(m);
    if (!pd_grow(pd_net_allocator(m->net), (void **)&s->table->wanted, &s->table->wanted_capacity, each, sizeof *ids))
        return pd__mpi_no_memory(m);
    ids = s->table->wanted; /* free between batches */
    for (int64_t first = 0; first * m->ranks < p->dims[0]; first += each) {
        pd_status status;
        for (int r = 0; r < m->ranks; r++) {
            int64_t rows = (p->dims[0] - r + m->ranks - 1) / m->ranks; /* of its shard; may be 0 */
            m->sizes[r] = pd__mpi_reals(pd__mpi_max(0, pd__mpi_min(each, rows - first)) * width);
        }
        for (int64_t i = 0; i < each; i++) ids[i] = (first + i) * m->ranks + m->rank;
        status = pd__mpi_read_rows(m, s, m->sizes[m->rank] / (int64_t)bytes, ids,
                                   (pd_real *)(void *)(m->box + m->rank * size));
        if (status == PD_OK) status = pd__mpi_exchange(m, PD__MPI_BULK, size);
        if (status != PD_OK) return status;
        for (int r = 0; r < m->ranks; r++)
            for (int64_t i = 0; r != m->rank && i < m->sizes[r] / (int64_t)bytes; i++)
                d->upload(d, p->value + ((first + i) * m->ranks + r) * width, m->box + r * size + i * (int64_t)bytes,
                          bytes);
    }
    return PD_OK;
}

/* Statistics become their mean over the ranks. */
static pd_status pd__mpi_average(pd__mpi *m, pd_param *p) {
    enum { AT_ONCE = 256 };
    pd_device *d = m->device;
    for (int64_t first = 0; first < p->size; first += AT_ONCE) {
        int64_t n = pd__mpi_min(p->size - first, AT_ONCE);
        pd_real values[AT_ONCE];
        double sums[AT_ONCE];
        pd_status status;
        d->download(d, values, p->value + first, (size_t)pd__mpi_reals(n));
        for (int64_t i = 0; i < n; i++) sums[i] = (double)values[i];
        status = pd__mpi_add_up(m, sums, n);
        if (status != PD_OK) return status;
        for (int64_t i = 0; i < n; i++) values[i] = (pd_real)(sums[i] / m->ranks);
        d->upload(d, p->value + first, values, (size_t)pd__mpi_reals(n));
    }
    return PD_OK;
}

static pd_status pd__mpi_finish_values(pd__mpi *m) {
    pd_status status = PD_OK;
    for (int i = 0; status == PD_OK && i < m->slot_count; i++) {
        status = pd__mpi_wait(m, &m->slots[i].values_in);
        if (status == PD_OK) status = pd__mpi_wait(m, &m->slots[i].values_out);
    }
    return status;
}

static pd_status pd__mpi_sync(pd_updater *u) {
    pd__mpi *m = pd__mpi_of(u);
    pd_status status = pd__mpi_enter(m, PD__MPI_SYNC);
    if (status == PD_OK) status = pd__mpi_finish_values(m);
    for (int i = 0; status == PD_OK && i < m->slot_count; i++)
        if (m->slots[i].table && m->ranks > 1) status = pd__mpi_gather(m, &m->slots[i]);
    for (pd_param *p = pd_param_first(m->net); status == PD_OK && p; p = p->next)
        if (p->is_buffer && m->ranks > 1) status = pd__mpi_average(m, p);
    return status;
}

static pd_status pd__mpi_all_reduce(pd_updater *u, double *sums, int64_t count) {
    pd__mpi *m = pd__mpi_of(u);
    pd_status status = pd__mpi_enter(m, PD__MPI_REDUCE);
    return status == PD_OK ? pd__mpi_add_up(m, sums, count) : status;
}

/* ======================================================================================================== */
/* >>beginning and end                                                                                      */

/* snprintf behind `length` characters, of which all may not fit; counts them. */
PD_PRINTF(4, 5) static void pd__mpi_append(char *text, size_t size, size_t *length, const char *format, ...) {
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(*length < size ? text + *length : NULL, *length < size ? size - *length : 0, format, args);
    va_end(args);
    if (n > 0) *length += (size_t)n;
}

/* What must be the same on all ranks, one thing per line. Like snprintf. */
static size_t pd__mpi_describe(const pd__mpi *m, char *text, size_t size) {
    const pd_optimizer *o = pd_trainer_optimizer(m->trainer);
    const pd_trainer_opts *opts = pd_trainer_options(m->trainer);
    const pd_schedule *s = &opts->schedule;
    size_t length = 0;
    pd__mpi_append(text, size, &length, "numbers of %d bytes\n", (int)sizeof(pd_real));
    pd__mpi_append(text, size, &length,
                   "optimizer %d, rate %.17g, momentum %.17g%s%s, rho %.17g, beta %.17g %.17g, epsilon %.17g\n",
                   (int)o->kind, o->rate, o->momentum, o->nesterov ? " nesterov" : "", o->centered ? " centered" : "",
                   o->rho, o->beta1, o->beta2, o->epsilon);
    pd__mpi_append(text, size, &length, "l1 %.17g, l2 %.17g, clip_value %.17g, clip_norm %.17g%s\n", opts->l1, opts->l2,
                   opts->clip_value, opts->clip_norm, opts->sum_gradients ? ", sum_gradients" : "");
    pd__mpi_append(text, size, &length, "schedule %d, a %.17g, b %.17g, warm_up %.17g", (int)s->kind, s->a, s->b,
                   s->warm_up);
    for (int i = 0; i < s->count; i++)
        pd__mpi_append(text, size, &length, ", %.17g from %.17g", s->factors[i], i > 0 ? s->samples[i - 1] : 0.0);
    pd__mpi_append(text, size, &length, "\n");
    for (int i = 0; pd_layer_at(m->net, i); i++) {
        const pd_layer *l = pd_layer_at(m->net, i);
        pd__mpi_append(text, size, &length, "layer \"%.100s\" (%.50s) of width %lld, activation %s\n", l->name,
                       l->type->name, (long long)l->out.width, pd_act_text(l->act));
    }
    for (const pd_param *p = pd_param_first(m->net); p; p = p->next) {
        const pd_param_opts *po = &p->opts;
        pd__mpi_append(text, size, &length, "parameter \"%.100s\"", p->name);
        for (int i = 0; i < p->dim_count; i++)
            pd__mpi_append(text, size, &length, "%s%lld", i ? "x" : " ", (long long)p->dims[i]);
        pd__mpi_append(text, size, &length, "%s%s%s, rate %.17g, l1 %.17g, l2 %.17g, clip %.17g, prune %.17g\n",
                       p->is_buffer                 ? " buffer"
                       : pd__mpi_slot_of(m, p) >= 0 ? " trained"
                                                    : " fixed",
                       p->opts.sparse ? " sparse" : "", p->mask ? " pruned" : "", po->rate_factor, po->l1, po->l2,
                       po->clip, po->prune);
    }
    return length;
}

/* Fails on a rank whose model or options are not rank 0's; the others then learn it from that rank. */
static pd_status pd__mpi_compare(pd__mpi *m, const char *mine, const char *theirs) {
    int a, b;
    while (*mine && *mine == *theirs) mine++, theirs++;
    if (*mine == *theirs) return PD_OK;
    while (mine[-1] != '\n' && mine[-1]) mine--, theirs--; /* back to the beginning of the line, or of all */
    a = (int)strcspn(mine, "\n");
    b = (int)strcspn(theirs, "\n");
    m->told = true;
    return pd__mpi_fail(m, PD_E_ARGUMENT, "rank %d has %.*s, but rank 0 %.*s", m->rank, a < 180 ? a : 180,
                        a ? mine : "less", b < 180 ? b : 180, b ? theirs : "ends there");
}

static pd_status pd__mpi_agree(pd__mpi *m) {
    const pd_allocator *a = pd_net_allocator(m->net);
    size_t length = pd__mpi_describe(m, NULL, 0);
    int64_t theirs_length = (int64_t)length;
    char *mine = (char *)pd_alloc(a, (int64_t)length + 2, 1), *theirs = NULL;
    double zero = 0;
    pd_status status = mine ? PD_OK : pd__mpi_no_memory(m);
    if (mine) pd__mpi_describe(m, mine + 1, length + 1); /* with a 0 in front */
    if (status == PD_OK) status = pd__mpi_broadcast(m, &theirs_length, sizeof theirs_length);
    if (status == PD_OK) theirs = (char *)pd_alloc(a, theirs_length + 2, 1);
    if (status == PD_OK && !theirs) status = pd__mpi_no_memory(m);
    if (status == PD_OK && m->rank == 0) memcpy(theirs + 1, mine + 1, length);
    if (status == PD_OK) status = pd__mpi_broadcast(m, theirs + 1, theirs_length);
    if (status == PD_OK) status = pd__mpi_compare(m, mine + 1, theirs + 1);
    if (m->failure.status == PD_OK || !m->exchanging) { /* else MPI may still write there */
        pd_free(a, mine);
        pd_free(a, theirs);
    }
    return status == PD_OK ? pd__mpi_add_up(m, &zero, 1) : status; /* nobody goes on before all have agreed */
}

/* Rank 0's values and pruning masks, through the host's memory. */
static pd_status pd__mpi_spread(pd__mpi *m) {
    const pd_allocator *a = pd_net_allocator(m->net);
    pd_device *d = m->device;
    pd_real *copy = NULL;
    int64_t capacity = 0;
    pd_status status = PD_OK;
    for (pd_param *p = pd_param_first(m->net); status == PD_OK && p; p = p->next) {
        const size_t bytes = (size_t)pd__mpi_reals(p->size);
        if (!d->host_memory && !pd_grow(a, (void **)&copy, &capacity, p->size, sizeof *copy)) {
            status = pd__mpi_no_memory(m);
            break;
        }
        if (copy && m->rank == 0) d->download(d, copy, p->value, bytes);
        status = pd__mpi_broadcast(m, copy ? copy : p->value, (int64_t)bytes);
        if (copy && status == PD_OK && m->rank > 0) d->upload(d, p->value, copy, bytes);
        if (status == PD_OK && p->mask) status = pd__mpi_broadcast(m, p->mask, p->size);
    }
    if (status == PD_OK || !m->exchanging) pd_free(a, copy);
    return status;
}

static bool pd__mpi_new_slot(pd__mpi *m, pd__mpi_slot *s, pd_param *p) {
    const pd_allocator *a = pd_net_allocator(m->net);
    pd__mpi_table *t;
    s->param = p;
    if (!p->opts.sparse) {
        pd_param_shard(p, m->rank, m->ranks, &s->first, &s->count);
        s->inbox = (pd_real *)pd_alloc(a, (m->ranks - 1) * s->count, sizeof *s->inbox);
        if (m->device->host_memory) return s->inbox != NULL;
        s->grads = (pd_real *)pd_alloc(a, p->size, sizeof *s->grads);
        s->values = (pd_real *)pd_alloc(a, p->size, sizeof *s->values);
        return s->inbox && s->grads && s->values;
    }
    t = s->table = (pd__mpi_table *)pd_alloc(a, 1, sizeof *s->table);
    if (!t) return false;
    t->place = ++m->table_count;
    t->width = p->dims[1];
    t->out = (int64_t *)pd_alloc(a, m->ranks + 1, sizeof *t->out);
    t->in = (int64_t *)pd_alloc(a, m->ranks + 1, sizeof *t->in);
    t->busy = (int *)pd_alloc(a, m->ranks, sizeof *t->busy);
    t->where = (int64_t *)pd_alloc(a, p->dims[0] / m->ranks + 1, sizeof *t->where);
    return t->out && t->in && t->busy && t->where;
}

static bool pd__mpi_new_slots(pd__mpi *m) {
    const pd_allocator *a = pd_net_allocator(m->net);
    int count = 0;
    while (pd_trainer_param(m->trainer, count)) count++;
    m->slots = (pd__mpi_slot *)pd_alloc(a, count, sizeof *m->slots);
    if (!m->slots) return false;
    for (m->slot_count = 0; m->slot_count < count; m->slot_count++)
        if (!pd__mpi_new_slot(m, &m->slots[m->slot_count], pd_trainer_param(m->trainer, m->slot_count))) {
            m->slot_count++;
            return false;
        }
    m->out = (int64_t *)pd_alloc(a, m->ranks, (size_t)(1 + m->table_count) * sizeof *m->out);
    m->in = (int64_t *)pd_alloc(a, m->ranks, (size_t)(1 + m->table_count) * sizeof *m->in);
    m->norms = (double *)pd_alloc(a, m->ranks, sizeof *m->norms);
    return m->out && m->in && m->norms;
}

static void pd__mpi_free_table(const pd__mpi *m, pd__mpi_table *t) {
    const pd_allocator *a = pd_net_allocator(m->net);
    pd_free(a, t->out);
    pd_free(a, t->in);
    pd_free(a, t->wanted);
    pd_free(a, t->places);
    pd_free(a, t->asked);
    pd_free(a, t->mine);
    pd_free(a, t->theirs);
    pd_free(a, t->busy);
    pd_free(a, t->rows);
    pd_free(a, t->where);
    pd_free(a, t->sums);
    if (t->device_sums) m->device->free(m->device, t->device_sums);
    if (t->device_rows) m->device->free(m->device, t->device_rows);
    pd_free(a, t);
}

static void pd__mpi_free_slots(pd__mpi *m) {
    const pd_allocator *a = pd_net_allocator(m->net);
    for (int i = 0; i < m->slot_count; i++) {
        pd__mpi_slot *s = &m->slots[i];
        pd_free(a, s->inbox);
        pd_free(a, s->grads);
        pd_free(a, s->values);
        if (s->table) pd__mpi_free_table(m, s->table);
    }
    pd_free(a, m->slots);
    pd_free(a, m->out);
    pd_free(a, m->in);
    pd_free(a, m->norms);
    pd_free(a, m->box);
}

/* Forgets a trainer: what was its is gone, or, if MPI would not let go of it, left where it is. */
static void pd__mpi_forget(pd__mpi *m) {
    if (!m->stuck) pd__mpi_free_slots(m);
    m->slots = NULL;
    m->out = m->in = NULL;
    m->norms = NULL;
    m->box = NULL;
    m->box_capacity = 0;
    m->slot_count = m->table_count = 0;
    m->stepping = false;
    m->trainer = NULL;
    m->net = NULL;
    m->device = NULL;
}

/* Tells all ranks that this one has left its trainer, or, if `for_good`, the updater, and why. */
static void pd__mpi_leave(pd__mpi *m, bool for_good, int code) {
    pd__mpi_message *f = &m->farewell;
    const char *why = m->failure.status != PD_OK ? m->failure.text : m->net ? pd_error(m->net) : "";
    pd__mpi_address(m, f);
    if (m->failure.status == PD_OK && m->net) f->status = (int32_t)pd_error_status(m->net);
    if (for_good) f->trainer = INT64_MAX;
    if (code != 0 && f->status == PD_OK) f->status = PD_E_STATE;
    if (m->told) snprintf(f->text, sizeof f->text, "%.470s", why);
    else if (why[0]) snprintf(f->text, sizeof f->text, "rank %d: %.440s", m->rank, why);
    else if (for_good) snprintf(f->text, sizeof f->text, "rank %d has ended with exit code %d", m->rank, code);
    else snprintf(f->text, sizeof f->text, "rank %d has ended its training", m->rank);
    for (int r = 0; r < m->ranks; r++)
        if (r != m->rank) pd__mpi_tell(m, r, f, &m->farewells);
}

/* Ends all transfers but listening, with a second for those that are half done. Those that remain then belong to a rank
   that is gone, or stopped: their memory can't be freed. */
static void pd__mpi_drop(pd__mpi *m) {
    double until = pd_seconds() + 1;
    int count, kept = 0;
    m->dropping = true;
    for (int i = 0; i < m->live; i++) {
        pd__mpi_kind kind = m->transfers[i].kind;
        if (pd__mpi_receives(kind) && kind != PD__MPI_HEAR) MPI_Cancel(&m->requests[i]);
    }
    while (m->live > m->listening && pd_seconds() < until && pd__mpi_receive(m, &count) == PD_OK) pd__mpi_yield();
    for (int i = 0; i < m->live; i++)
        if (m->transfers[i].kind == PD__MPI_HEAR) {
            m->requests[kept] = m->requests[i];
            m->transfers[kept++] = m->transfers[i];
        }
    m->dropping = false;
    m->stuck = m->stuck || m->live > kept;
    m->live = kept;
    m->farewells = 0;
    for (int r = 0; r < m->ranks; r++) m->peers[r].beats = 0;
}

/* The end of a trainer. */
static void pd__mpi_part(pd__mpi *m) {
    if (m->failure.status == PD_OK && !m->stepping) pd__mpi_finish_values(m); /* a failure is kept, and told */
    pd__mpi_leave(m, false, 0);
    pd__mpi_drop(m);
    pd__mpi_forget(m);
}

static pd_status pd__mpi_start(pd_updater *u, pd_trainer *trainer) {
    pd__mpi *m = pd__mpi_of(u);
    void *most = NULL;
    int found = 0;
    pd_status status = PD_OK;
    if (m->failure.status != PD_OK) return pd_trainer_fail(trainer, m->failure.status, "%s", m->failure.text);
    if (m->trainer)
        return pd_trainer_fail(trainer, PD_E_STATE,
                               "pd_trainer_new: the updater is another trainer's; make one for each");
    m->trainer = trainer;
    m->net = pd_trainer_net(trainer);
    m->device = pd_net_device(m->net);
    m->trainers++;
    m->turn++;
    m->call = PD__MPI_START;
    m->leaving = m->unannounced = m->norms_due = m->exchanging = 0;
    for (int r = 0; r < m->ranks; r++) m->peers[r].present = false;
    status = pd__mpi_trainer_failed(m, pd_trainer_shard(trainer, m->rank, m->ranks));
    if (status == PD_OK && !pd__mpi_new_slots(m)) status = pd__mpi_no_memory(m);
    if (status == PD_OK && !pd__mpi_reserve(m, 1 + (m->ranks - 1) * (8 + 4 * (int64_t)m->slot_count)))
        status = pd__mpi_no_memory(m); /* that is enough for any step whose transfers are one piece each */
    if (status == PD_OK) status = pd__mpi_check(m, MPI_Comm_get_attr(m->comm, MPI_TAG_UB, &most, &found), "MPI_TAG_UB");
    if (status == PD_OK && found && pd__mpi_tag(m->slot_count, 0) > *(int *)most)
        status =
            pd__mpi_fail(m, PD_E_UNSUPPORTED, "%d parameters are too many for the tags of this MPI", m->slot_count);
    if (status == PD_OK) status = pd__mpi_agree(m);
    if (status == PD_OK) status = pd__mpi_spread(m);
    if (status != PD_OK) pd__mpi_part(m);
    return status;
}

static void pd__mpi_stop(pd_updater *u) {
    pd__mpi *m = pd__mpi_of(u);
    if (m->trainer) pd__mpi_part(m);
}

/* ---- the updater ---- */

/* Are there ranks on other hosts? False also when MPI can't tell. */
static bool pd__mpi_is_several_hosts(MPI_Comm comm, int ranks) {
    MPI_Comm here;
    int count = ranks;
    if (MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here) != MPI_SUCCESS) return false;
    MPI_Comm_size(here, &count);
    MPI_Comm_free(&here);
    return count < ranks;
}

static void pd__mpi_delete(pd__mpi *m) {
    const pd_allocator a = m->allocator;
    pd_free(&a, m->requests);
    pd_free(&a, m->transfers);
    pd_free(&a, m->finished);
    pd_free(&a, m->indices);
    pd_free(&a, m->statuses);
    pd_free(&a, m->peers);
    pd_free(&a, m->sizes);
    pd_free(&a, m);
}

static pd_updater *pd__mpi_refuse(char *message, size_t size, const char *why) {
    if (message && size > 0) snprintf(message, size, "pd_mpi_new: %s", why);
    return NULL;
}

PD__MPI_DEF pd_updater *pd_mpi_new(const pd_mpi_opts *opts, char *message, size_t size) {
    static const pd_mpi_opts defaults = { 0, { NULL, NULL, NULL } };
    const pd_mpi_opts *o = opts ? opts : &defaults;
    pd_allocator a = o->allocator;
    pd__mpi *m;
    int running = 0, granted;
    if (!(o->heartbeat_seconds == 0 || o->heartbeat_seconds >= 2))
        return pd__mpi_refuse(message, size, "heartbeat_seconds must be 0 (10) or at least 2");
    if (!a.alloc != !a.free) return pd__mpi_refuse(message, size, "the allocator lacks alloc or free");
    if (MPI_Initialized(&running) != MPI_SUCCESS ||
        (!running && MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &granted) != MPI_SUCCESS))
        return pd__mpi_refuse(message, size, "MPI can't be started");
    if (!running) { /* ours, then: MPI_Testsome's errors may come by way of these two */
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
    }
    m = (pd__mpi *)pd_alloc(&a, 1, sizeof *m);
    if (!m) return pd__mpi_refuse(message, size, "out of memory");
    m->allocator = a;
    m->lost = -1;
    m->limit = o->heartbeat_seconds > 0 ? o->heartbeat_seconds : 10;
    MPI_Comm_rank(MPI_COMM_WORLD, &m->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &m->ranks);
    m->peers = (pd__mpi_peer *)pd_alloc(&a, m->ranks, sizeof *m->peers);
    m->sizes = (int64_t *)pd_alloc(&a, m->ranks, sizeof *m->sizes);
    if (!m->peers || !m->sizes || MPI_Comm_dup(MPI_COMM_WORLD, &m->comm) != MPI_SUCCESS) {
        pd__mpi_delete(m);
        return pd__mpi_refuse(message, size, "out of memory");
    }
    MPI_Comm_set_errhandler(m->comm, MPI_ERRORS_RETURN);
    m->several_hosts = pd__mpi_is_several_hosts(m->comm, m->ranks);
    if (m->ranks > 1 && pd__mpi_listen(m) != PD_OK) { /* out of memory: the communicator stays */
        pd__mpi_delete(m);
        return pd__mpi_refuse(message, size, "out of memory");
    }
    m->updater.api_version = PD_API_VERSION;
    m->updater.name = "mpi";
    m->updater.self = m;
    m->updater.start = pd__mpi_start;
    m->updater.begin_batch = pd__mpi_begin_batch;
    m->updater.param_needed = pd__mpi_param_needed;
    m->updater.grad_final = pd__mpi_grad_final;
    m->updater.poll = pd__mpi_poll;
    m->updater.end_batch = pd__mpi_end_batch;
    m->updater.sync = pd__mpi_sync;
    m->updater.all_reduce = pd__mpi_all_reduce;
    m->updater.stop = pd__mpi_stop;
    return &m->updater;
}

PD__MPI_DEF int pd_mpi_rank(const pd_updater *updater) { return updater ? pd__mpi_of(updater)->rank : 0; }
PD__MPI_DEF int pd_mpi_ranks(const pd_updater *updater) { return updater ? pd__mpi_of(updater)->ranks : 1; }

PD__MPI_DEF void pd_mpi_sent(const pd_updater *updater, int64_t *payload, int64_t *control) {
    if (payload) *payload = updater ? pd__mpi_of(updater)->payload : 0;
    if (control) *control = updater ? pd__mpi_of(updater)->control : 0;
}

/* Waits until all ranks have come here. A rank may be long in coming, unless something has gone wrong: then it gets
   heartbeat_seconds. False when not all came; *trouble: something has gone wrong. */
static bool pd__mpi_meet(pd__mpi *m, int code, bool *trouble) {
    double since = pd_seconds();
    int count, missing = 1, lost = 0;
    *trouble = m->failure.status != PD_OK || m->stuck || code != 0;
    pd__mpi_leave(m, true, code);
    while (missing > 0 || (m->farewells > 0 && lost == 0)) {
        if (pd__mpi_receive(m, &count) != PD_OK) return false;
        missing = lost = 0;
        for (int r = 0; r < m->ranks; r++) {
            pd__mpi_peer *p = &m->peers[r];
            *trouble = *trouble || p->left.status != PD_OK;
            if (r == m->rank || p->left.trainer == INT64_MAX) continue;
            p->lost = p->lost || (*trouble && pd_seconds() - fmax(p->heard, since) > m->limit);
            lost += p->lost;
            missing += !p->lost;
        }
        if (count == 0 && missing > 0) pd__mpi_sleep();
    }
    return lost == 0 && !m->stuck;
}

/* Ends the updater. False: MPI can't be ended in good order, and nothing is freed, as MPI may have its hands on it. */
static bool pd__mpi_end(pd__mpi *m, int code, bool *trouble) {
    if (m->trainer) pd__mpi_part(m);
    if (!pd__mpi_meet(m, code, trouble)) return false;
    for (int i = 0; i < m->live; i++) { /* listening */
        MPI_Cancel(&m->requests[i]);
        MPI_Wait(&m->requests[i], MPI_STATUS_IGNORE);
    }
    return true;
}

PD__MPI_DEF bool pd_mpi_free(pd_updater *updater) {
    pd__mpi *m = updater ? pd__mpi_of(updater) : NULL;
    bool trouble;
    if (!m) return true;
    if (!pd__mpi_end(m, 0, &trouble)) return false;
    if (!trouble || m->ranks == 1) MPI_Comm_free(&m->comm); /* else there may be messages in it still */
    pd__mpi_delete(m);
    return !trouble;
}

#ifdef PD__MPI_POSIX
/* Tells the process manager, over its version 1 protocol, that this rank ends well. False if it speaks another. */
static bool pd__mpi_tell_manager(void) {
    const char *fd = getenv("PMI_FD"), *line = "cmd=finalize\n";
    char c = 0;
    int manager;
    if (!fd || !isdigit((unsigned char)*fd)) return false;
    manager = atoi(fd);
    if (write(manager, line, strlen(line)) != (ssize_t)strlen(line)) return false;
    while (c != '\n' && read(manager, &c, 1) == 1) continue;
    return true;
}
#endif

PD__MPI_DEF void pd_mpi_exit(pd_updater *updater, int code) {
    pd__mpi *m = updater ? pd__mpi_of(updater) : NULL;
    bool trouble = true, met = m && pd__mpi_end(m, code, &trouble);
    int running = 0;
    fflush(NULL);
    MPI_Initialized(&running);
    if (!running) exit(code);
    if (!met) {
        double until = pd_seconds() + 0.2; /* the process manager has still to pass on what the ranks have printed */
        while (pd_seconds() < until) pd__mpi_sleep();
        MPI_Abort(MPI_COMM_WORLD, code ? code : 1);
    }
#ifdef PD__MPI_POSIX
    if (m->several_hosts || trouble) { /* or MPI would complain of messages that nobody has received */
        double until = pd_seconds() + 0.05;
        int found;
        while (pd_seconds() < until) /* for what MPI has still to send for the others */
            MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, m->comm, &found, MPI_STATUS_IGNORE);
        if (pd__mpi_tell_manager()) _exit(code);
    }
#endif
    MPI_Comm_free(&m->comm);
    pd__mpi_delete(m);
    MPI_Finalize();
    exit(code);
}

#ifdef __cplusplus
}
#endif

#endif /* PADDLE_IMPLEMENTATION */

/*
   This software is available under two licences; choose the one you like.
   -----------------------------------------------------------------------------
   Licence A - MIT

   Copyright (c) 2026 the paddle.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
   of the Software, and to permit persons to whom the Software is furnished to do
   so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all
   copies or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
   SOFTWARE.
   -----------------------------------------------------------------------------
   Licence B - Public Domain (Unlicense, www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
   ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
   WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
