/* What tests look at inside paddle.h. They link the implementation, so that it is compiled once for all of them: it is
   tests/inside.c, which has these functions behind it. Most call the private function of the same
   name (pd__NAME); the first few show private members. */
#ifndef PADDLE_TESTS_INSIDE_H
#define PADDLE_TESTS_INSIDE_H

#include <stdio.h>

#include "../paddle.h"

pd_device *inside_device(pd_net *net);
bool inside_is_folded(const pd_layer *layer);  /* into the layer below, by the last prediction */
bool inside_is_in_time(const pd_layer *layer); /* its rows lie in the order of a group's steps, so it is no target */
pd_real **inside_best(pd_trainer *trainer);
pd_updater *inside_local(pd_trainer *trainer);

int inside_orders(pd_net *net);      /* time orders that the last run used, */
int inside_kept_orders(pd_net *net); /* and all that the net has memory for */

/* ---- a layer by itself, after pd_forward: tests move its tensors to windows of larger arrays before that ---- */

pd_status inside_forward(pd_layer *layer); /* with its activation, and on the host if it must */
pd_status inside_backward(pd_layer *layer);
void inside_move_memory(pd_layer *layer, int64_t rows); /* what it keeps per row begins so many rows further on */

/* ---- how many threads a device goes on with ---- */

int inside_team(pd_device *cpu);
void inside_set_team(pd_device *cpu, int team); /* at most all that it has: one without OpenMP */
void inside_loop(pd_device *cpu, double now, double spent, int team, double least); /* as if it had been run */

typedef struct inside_pace inside_pace; /* freed by free() */
inside_pace *inside_pace_new(int threads);
int inside_pace_note(inside_pace *p, double now, double spent, int team, double least); /* the threads to go on with */

bool inside_winograd_fits(const pd_conv_shape *shape);
pd_status inside_evaluators_update(pd_net *net);
void inside_remove_samples(pd_batch *batch, const unsigned char *marks);
pd_status inside_parse_number(const char *text, const char *end, double *value);

/* ---- files that are open already, so that a test can make them fail ---- */

pd_status inside_load_file(pd_net *net, FILE *file, const char *path, const pd_load_opts *opts);
pd_status inside_checkpoint_load_file(pd_trainer *trainer, FILE *file, const char *path);
int inside_save_file(pd_net *net, FILE *file); /* 0, or the first errno of writing and syncing */
void inside_put_double(FILE *file, const char *name, double value);

/* ---- a .safetensors file's header ---- */

typedef struct inside_tensors inside_tensors;
typedef struct inside_tensor {
    const char *name; /* of a file that is still open */
    bool is_mask;     /* U8 */
    int dim_count;    /* may be larger than what dims holds */
    int64_t dims[2], size;
} inside_tensor;

inside_tensors *inside_tensors_open(pd_net *net, FILE *file, const char *path); /* NULL: the net has the message */
void inside_tensors_close(inside_tensors *t);
int64_t inside_tensors_count(const inside_tensors *t);
inside_tensor inside_tensors_at(const inside_tensors *t, int64_t i);
const char *inside_tensors_text(const inside_tensors *t, const char *prefix, const char *name);
bool inside_tensors_find(const inside_tensors *t, const char *prefix, const char *name, inside_tensor *tensor);

/* ---- TensorBoard's event files ---- */

typedef struct pd__events inside_events;
inside_events *inside_events_open(pd_net *net, const char *directory); /* NULL: the net has the message */
void inside_events_close(inside_events *e);
pd_status inside_events_scalar(inside_events *e, const char *tag, int64_t step, double value);
bool inside_events_redirect(inside_events *e, const char *path); /* closes its file; false: `path` can't be written */

#endif
