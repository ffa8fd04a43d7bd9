/* The implementation, as the tests link it, and the functions of inside.h. */
#define PADDLE_IMPLEMENTATION
#include "paddle.h"

#include "inside.h"

pd_device *inside_device(pd_net *net) { return net->device; }
bool inside_is_folded(const pd_layer *layer) { return layer->own->above_done; }
bool inside_is_in_time(const pd_layer *layer) { return pd__is_in_time(layer); }
pd_real **inside_best(pd_trainer *trainer) { return trainer->has_best ? trainer->best : NULL; }
pd_updater *inside_local(pd_trainer *trainer) { return &trainer->local; }

pd_status inside_forward(pd_layer *layer) { return pd__on_host(layer, false, pd__forward_layer); }
pd_status inside_backward(pd_layer *layer) { return pd__on_host(layer, true, pd__differentiate); }
void inside_move_memory(pd_layer *layer, int64_t rows) {
    pd_tensor *before = &layer->own->before;
    for (int i = 0; i < PD__COUNT(layer->own->memory); i++) {
        pd__memory *m = &layer->own->memory[i];
        if (m->data) m->data += rows * m->per_row, m->capacity -= rows * m->per_row;
    }
    if (before->data) before->data += rows * layer->out.width;
    if (before->grad) before->grad += rows * layer->out.width;
}

int inside_orders(pd_net *net) {
    int count = 0;
    for (pd__order *o = net->orders; o; o = o->next) count += o->used;
    return count;
}
int inside_kept_orders(pd_net *net) {
    int count = 0;
    for (pd__order *o = net->orders; o; o = o->next) count++;
    return count;
}

/* ---- how many threads a device goes on with ---- */

static pd__pace *inside_pace_of(pd_device *cpu) { return &((pd__cpu *)cpu->self)->pace; }
int inside_team(pd_device *cpu) { return inside_pace_of(cpu)->team; }
void inside_set_team(pd_device *cpu, int team) {
    inside_pace_of(cpu)->team = (int)pd__min(team, inside_pace_of(cpu)->threads);
}
void inside_loop(pd_device *cpu, double now, double spent, int team, double least) {
    pd__pace_note(inside_pace_of(cpu), now, spent, team, least);
}

struct inside_pace {
    pd__pace pace;
};
inside_pace *inside_pace_new(int threads) {
    inside_pace *p = (inside_pace *)calloc(1, sizeof *p);
    if (p) p->pace.threads = p->pace.team = threads;
    return p;
}
int inside_pace_note(inside_pace *p, double now, double spent, int team, double least) {
    pd__pace_note(&p->pace, now, spent, team, least);
    return p->pace.team;
}

bool inside_winograd_fits(const pd_conv_shape *shape) { return pd__winograd_fits(shape); }
pd_status inside_evaluators_update(pd_net *net) { return pd__evaluators_update(net); }
void inside_remove_samples(pd_batch *batch, const unsigned char *marks) { pd__remove_samples(batch, marks); }
pd_status inside_parse_number(const char *text, const char *end, double *value) {
    return pd__parse_number(text, end, value);
}

/* ---- files ---- */

pd_status inside_load_file(pd_net *net, FILE *file, const char *path, const pd_load_opts *opts) {
    return pd__load_file(net, file, path, opts);
}
pd_status inside_checkpoint_load_file(pd_trainer *trainer, FILE *file, const char *path) {
    return pd__checkpoint_load_file(trainer, file, path);
}

int inside_save_file(pd_net *net, FILE *file) {
    unsigned char chunk[PD__FILE_CHUNK];
    pd__items items = PD__ZERO;
    int error = ENOMEM;
    if (pd__items_of_net(&items, net) == PD_OK) error = pd__write_tensors(file, &items, NULL, chunk);
    if (!error) error = pd__sync_file(file);
    pd__items_free(&items);
    return error;
}

void inside_put_double(FILE *file, const char *name, double value) {
    pd__writer w = PD__ZERO;
    w.file = file;
    pd__put_double(&w, name, value);
}

struct inside_tensors {
    pd__tensors index;
};

static inside_tensor inside_tensor_of(const pd__tensor *tensor) {
    inside_tensor t = PD__ZERO;
    t.name = tensor->name;
    t.is_mask = tensor->element == PD__U8;
    t.dim_count = tensor->dim_count;
    t.dims[0] = tensor->dims[0];
    t.dims[1] = tensor->dims[1];
    t.size = tensor->size;
    return t;
}

inside_tensors *inside_tensors_open(pd_net *net, FILE *file, const char *path) {
    inside_tensors *t = (inside_tensors *)calloc(1, sizeof *t);
    if (!t || pd__tensors_open(net, file, path, &t->index) == PD_OK) return t;
    free(t);
    return NULL;
}
void inside_tensors_close(inside_tensors *t) {
    pd__tensors_close(&t->index);
    free(t);
}
int64_t inside_tensors_count(const inside_tensors *t) { return t->index.count; }
inside_tensor inside_tensors_at(const inside_tensors *t, int64_t i) { return inside_tensor_of(&t->index.list[i]); }
const char *inside_tensors_text(const inside_tensors *t, const char *prefix, const char *name) {
    return pd__tensors_text(&t->index, prefix, name);
}
bool inside_tensors_find(const inside_tensors *t, const char *prefix, const char *name, inside_tensor *tensor) {
    const pd__tensor *found = pd__tensors_find(&t->index, prefix, name);
    if (found) *tensor = inside_tensor_of(found);
    return found != NULL;
}

inside_events *inside_events_open(pd_net *net, const char *directory) { return pd__events_open(net, directory); }
void inside_events_close(inside_events *e) { pd__events_close(e); }
pd_status inside_events_scalar(inside_events *e, const char *tag, int64_t step, double value) {
    return pd__events_scalar(e, tag, step, value);
}
bool inside_events_redirect(inside_events *e, const char *path) {
    fclose(e->file);
    e->file = fopen(path, "wb");
    return e->file != NULL;
}
