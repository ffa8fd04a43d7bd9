/* Lack of memory at every point: allocation number 0, 1, 2, .. fails, until a run needs fewer. The run builds a net
   with every kind of layer, trains it from shuffled and prefetched data, tests, saves, loads, goes on from checkpoints,
   shares it, predicts, and checks gradients. Each failure must be reported as such, must not leak, and must leave
   everything in a state in which the same call works. */
#define _POSIX_C_SOURCE 200809L
#include "../paddle.h"

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "support.h"

typedef struct run {
    failing_allocator memory;
    bool failed; /* a call has reported it */
    pd_net *net;
    pd_layer *features; /* depends on the first input alone */
    pd_layer *score, *total, *blocks, *ranking;
    pd_trainer *trainer;
    pd_reader *train, *test;
    pd_batch *batch;
} run;

/* ---- what may come of a call ---- */

/* After a failure: it must be the one that was arranged, and be told on one line. */
static void check_failure(run *r, pd_status status, const char *text, const char *call) {
    if (failing_calls(&r->memory) <= r->memory.fail_at || r->failed)
        fail_msg("%s failed although allocation %d was not due: %s: %s", call, (int)r->memory.fail_at,
                 pd_status_text(status), text);
    if (status != PD_E_MEMORY || !strstr(text, "memory") || strchr(text, '\n'))
        fail_msg("%s, allocation %d: expected a message about memory, got %s: %s", call, (int)r->memory.fail_at,
                 pd_status_text(status), text);
    r->failed = true;
}

/* The call's status; after a failure it is made once more and must work. */
#define WORKS(call)                                                                                                    \
    do {                                                                                                               \
        pd_status status_ = call;                                                                                      \
        if (status_ != PD_OK) {                                                                                        \
            check_failure(r, status_, pd_error(r->net), #call);                                                        \
            status_ = call;                                                                                            \
        }                                                                                                              \
        if (status_ != PD_OK) fail_msg("%s again: %s", #call, pd_error(r->net));                                       \
    } while (0)

/* The same for calls that return a pointer. */
#define MAKES(variable, call)                                                                                          \
    do {                                                                                                               \
        variable = call;                                                                                               \
        if (!variable) {                                                                                               \
            check_failure(r, pd_error_status(r->net), pd_error(r->net), #call);                                        \
            variable = call;                                                                                           \
        }                                                                                                              \
        if (!variable) fail_msg("%s again: %s", #call, pd_error(r->net));                                              \
    } while (0)

/* ---- data ---- */

enum { SAMPLES = 6, TEST = 4, WIDE = 72, ROWS = 9 };
static pd_real numbers[SAMPLES * WIDE];
static const int64_t ids[ROWS] = { 0, 1, 1, 0, 0, 1, 0, 1, 1 }, starts[SAMPLES + 1] = { 0, 3, 4, 4, 6, 8, 9 };

static char directory[64], model_path[96], checkpoint_path[96], log_path[96], events_path[96], graph_path[96];

static int make_data(void **state) {
    (void)state;
    random_seed(1);
    for (int i = 0; i < SAMPLES * WIDE; i++) numbers[i] = (pd_real)uniform(0, 1);
    strcpy(directory, access("/dev/shm", W_OK) == 0 ? "/dev/shm/test_memory.XXXXXX" : "/tmp/test_memory.XXXXXX");
    if (!mkdtemp(directory)) return -1;
    snprintf(model_path, sizeof model_path, "%s/model", directory);
    snprintf(checkpoint_path, sizeof checkpoint_path, "%s/checkpoint", directory);
    snprintf(log_path, sizeof log_path, "%s/log.csv", directory);
    snprintf(events_path, sizeof events_path, "%s/events", directory);
    snprintf(graph_path, sizeof graph_path, "%s/net.dot", directory);
    return 0;
}

/* Nothing but these files may be left, also by failures. Those of TensorBoard are taken away by each run. */
static int remove_data(void **state) {
    (void)state;
    remove(model_path);
    remove(checkpoint_path);
    remove(log_path);
    remove(graph_path);
    return rmdir(directory);
}

static void remove_events(void) {
    DIR *dir = opendir(events_path);
    struct dirent *entry;
    while (dir && (entry = readdir(dir)) != NULL) {
        char name[512];
        snprintf(name, sizeof name, "%s/%s", events_path, entry->d_name);
        if (entry->d_name[0] != '.') assert_int_equal(remove(name), 0);
    }
    if (dir) closedir(dir);
    remove(events_path);
}

/* In the order of the net's inputs. */
static pd_reader *array_reader(run *r, int64_t samples) {
    const pd_array arrays[] = { { .data = numbers },
                                { .data = numbers },
                                { .ids = ids },
                                { .ids = ids },
                                { .data = numbers },
                                { .ids = ids },
                                { .data = numbers, .starts = starts },
                                { .ids = ids, .starts = starts } };
    return pd_array_reader(r->net, samples, arrays, COUNT(arrays));
}

static pd_reader *stacked_reader(run *r) {
    return pd_prefetch(r->net, pd_shuffle(r->net, array_reader(r, SAMPLES), 4, 1), 2);
}

/* ---- every kind of layer, cost and evaluator ---- */

static pd_layer *image_layers(run *r, pd_layer *image) {
    static const int64_t pad[6] = { 0, 0, 1, 0, 0, 1 };
    static const int order[3] = { 0, 2, 1 };
    pd_net *net = r->net;
    pd_layer *conv = pd_conv(net, image, 4, 3, &(pd_conv_opts){ .name = "conv", .pad = 1, .weight.prune = 0.3 });
    pd_layer *norm = pd_batch_norm(net, conv, &(pd_batch_norm_opts){ .act = PD_RELU });
    pd_layer *pool =
        pd_pool(net, pd_maxout(net, pd_response_norm(net, norm, NULL), 2, NULL), 2, &(pd_pool_opts){ .act = PD_TANH });
    pd_layer *up = pd_conv_transpose(net, pool, 2, 2, &(pd_conv_opts){ .stride = 2 });
    pd_layer *turned = pd_transpose(net, pd_resize(net, pd_pad(net, up, pad, NULL), 3, 3, NULL), order, NULL);
    r->features = conv;
    r->blocks = pd_sum_cost(net, pd_block_expand(net, conv, 2, 2, NULL), NULL);
    return pd_slice(net, pd_reshape(net, turned, (pd_shape){ 18, 1, 1 }, NULL), 2, 4, NULL);
}

/* From four numbers and four more to three probabilities; *one gets a layer of width 1 in between. */
static pd_layer *vector_layers(pd_net *net, pd_layer *a, pd_layer *b, pd_layer **gate, pd_layer **cosine) {
    pd_layer *pair[2] = { a, b }, *sum, *product, *all, *mixed, *parts[3];
    pair[0] = sum = pd_add(net, pair, 2, NULL);
    pair[1] = product = pd_multiply(net, a, b, NULL);
    all = pd_prelu(net, pd_layer_norm(net, pd_concat(net, pair, 2, NULL), NULL), NULL);
    all = pd_dropout(net, pd_activation(net, all, PD_GELU, NULL), 0.3, NULL);
    *gate = pd_fc(net, all, 1, &(pd_fc_opts){ .act = PD_SIGMOID });
    mixed = pd_affine(net, pd_scale(net, *gate, pd_interpolate(net, *gate, sum, product, NULL), NULL), 2, 0.1, NULL);
    parts[0] = *cosine = pd_cosine(net, mixed, sum, 1, NULL);
    parts[1] = pd_outer(net, mixed, b, NULL);
    parts[2] = pd_bilinear(net, mixed, b, 3, NULL);
    return pd_fc_sum(net, parts, 3, 3, &(pd_fc_opts){ .act = PD_SOFTMAX });
}

static void build_net(run *r) {
    static const double class_weights[3] = { 1, 2, 3 };
    pd_net *net = r->net;
    pd_layer *image = pd_image(net, "image", 2, 6, 6), *vector = pd_vector(net, "vector", 4);
    pd_layer *label = pd_label(net, "label", 3), *yes = pd_label(net, "yes", 2), *number = pd_vector(net, "number", 1);
    pd_layer *query = pd_ids(net, "query", 2), *documents = pd_sequence(pd_vector(net, "documents", 2));
    pd_layer *relevance = pd_sequence(pd_label(net, "relevance", 2));
    pd_layer *one = NULL, *gate = NULL, *out = vector_layers(net, image_layers(r, image), vector, &gate, &one);
    const pd_cost_opts weighted = { .weight = number }, classes = { .class_weights = class_weights };
    pd_layer *costs[] = { pd_cross_entropy(net, out, label, &classes),
                          pd_cross_entropy(net, pd_fc(net, vector, 3, NULL), label, NULL),
                          pd_binary_cross_entropy(net, gate, number, NULL),
                          pd_squared_error(net, one, number, &weighted),
                          pd_huber(net, one, number, NULL),
                          pd_smooth_l1(net, one, number, NULL),
                          pd_huber_two_class(net, one, yes, NULL),
                          pd_hinge(net, out, label, NULL),
                          pd_rank_cost(net, one, gate, number, NULL),
                          pd_sum_cost(net, out, NULL) };
    r->total = pd_add(net, costs, COUNT(costs), NULL);
    r->score = pd_fc(net, documents, 1, NULL);
    r->ranking = pd_lambda_rank(net, r->score, relevance, NULL);
    pd_eval_error(net, out, label, NULL);
    pd_eval_precision_recall(net, out, label, NULL);
    pd_eval_pnpair(net, gate, yes, &(pd_evaluator_opts){ .query = query, .weight = number });
    pd_eval_mean_error(net, one, number, NULL);
}

/* ---- the run ---- */

static uint64_t bits_of(pd_net *net) {
    uint64_t hash = 1;
    for (pd_param *p = pd_param_first(net); p; p = p->next)
        for (int64_t i = 0; i < p->size; i++) {
            pd_real value = p->value[i];
            uint64_t bits = 0;
            memcpy(&bits, &value, sizeof value);
            hash = pd_random(hash + (p->mask ? p->mask[i] : 1), bits);
        }
    return hash;
}

static uint64_t first_bits; /* of the net before training, from the run in which nothing fails */

/* Loading that fails changes nothing. */
static void load(run *r, bool checkpoint) {
    uint64_t before = bits_of(r->net);
    pd_status status = checkpoint ? pd_checkpoint_load(r->trainer, checkpoint_path) : pd_load(r->net, model_path, NULL);
    if (status == PD_OK) return;
    check_failure(r, status, pd_error(r->net), checkpoint ? "pd_checkpoint_load" : "pd_load");
    assert_true(bits_of(r->net) == before);
    load(r, checkpoint);
}

/* Fills r->batch with all samples. */
static pd_status fill_batch(run *r) {
    pd_status status;
    pd_batch_clear(r->batch);
    status = r->test->reset(r->test, 0);
    if (status == PD_OK) status = r->test->next(r->test, r->batch, TEST);
    if (status != PD_OK) pd_layer_fail(r->features, status, "%.400s", r->test->error.text);
    return status;
}

/* Layers that are no part of what the trainer trains. */
static pd_status run_layer(run *r, pd_layer *cost) {
    pd_status status = pd_zero_grads(r->net);
    if (status == PD_OK) status = pd_forward(r->net, r->batch, PD_TRAIN, &cost, 1);
    return status == PD_OK ? pd_backward(r->net, cost) : status;
}

static void train_and_test(run *r) {
    const pd_trainer_opts opts = { .average_window = 0.5, .clip_norm = 1, .l1 = 1e-3 };
    pd_train_opts train = {
        .batch_size = 4, .patience = 3, .csv_log = log_path, .tensorboard = events_path, .log_every = 1
    };
    pd_optimizer optimizer = pd_rmsprop(0.01);
    double cost;
    optimizer.centered = true;
    optimizer.momentum = 0.5;
    MAKES(r->trainer, pd_trainer_new(r->net, r->total, optimizer, &opts));
    if (first_bits == 0) first_bits = bits_of(r->net);
    assert_true(bits_of(r->net) == first_bits);
    MAKES(r->train, stacked_reader(r));
    MAKES(r->test, array_reader(r, TEST));
    train.test = r->test;
    WORKS(pd_train(r->trainer, r->train, 2, &train));
    WORKS(pd_test(r->trainer, r->test, 3, &cost));
    assert_true(isfinite(cost));
}

static void run_branches(run *r) {
    pd_gradcheck checked;
    const pd_gradcheck_opts check = { .elements = 1 };
    MAKES(r->batch, pd_batch_new(r->net));
    WORKS(fill_batch(r));
    WORKS(run_layer(r, r->blocks));
    WORKS(run_layer(r, r->ranking));
    WORKS(pd_check_gradients(r->score, r->batch, &check, &checked));
    assert_false(checked.all_zero);
}

static void predict_shared(run *r) {
    const pd_real *mine, *theirs;
    pd_net *net = r->net, *shared;
    MAKES(shared, pd_net_share(net));
    MAKES(mine, pd_predict(r->features, numbers, SAMPLES));
    r->net = shared; /* whose messages are looked at */
    MAKES(theirs, pd_predict(pd_layer_find(shared, r->features->name), numbers, SAMPLES));
    r->net = net;
    assert_memory_equal(mine, theirs, SAMPLES * 4 * 36 * sizeof *mine);
    pd_net_free(shared);
}

static void save_and_load(run *r) {
    char text[4096];
    assert_true(pd_profile(r->trainer, text, sizeof text) > 0);
    WORKS(pd_graphviz(r->net, graph_path));
    WORKS(pd_save(r->net, model_path));
    load(r, false);
    WORKS(pd_checkpoint_save(r->trainer, checkpoint_path));
    pd_trainer_free(r->trainer);
    r->trainer = NULL;
    MAKES(r->trainer, pd_trainer_new(r->net, r->total, pd_adam(0.01), NULL));
    assert_int_equal(pd_checkpoint_load(r->trainer, checkpoint_path) == PD_OK, 0); /* of another optimizer */
    r->failed = r->failed || pd_error_status(r->net) == PD_E_MEMORY;
    WORKS(pd_checkpoint_save(r->trainer, checkpoint_path));
    load(r, true);
    WORKS(pd_train(r->trainer, r->train, 1, NULL));
}

/* Everything, with allocation `fail_at` failing. Returns whether there were fewer. */
static bool run_without(int64_t fail_at) {
    run state, *r = &state;
    pd_net_opts opts = { .seed = 1, .threads = 1 };
    bool enough;
    memset(r, 0, sizeof *r);
    r->memory.fail_at = fail_at;
    opts.allocator = (pd_allocator){ failing_alloc, failing_free, &r->memory };
    r->net = pd_net_new(&opts);
    if (!r->net) check_failure(r, pd_error_status(NULL), pd_error(NULL), "pd_net_new");
    build_net(r);
    if (r->net && pd_error_status(r->net) != PD_OK) { /* a builder's failure stays: nothing works any more */
        check_failure(r, pd_error_status(r->net), pd_error(r->net), "building");
        assert_null(pd_trainer_new(r->net, r->total, pd_sgd(1), NULL));
        assert_int_equal(pd_save(r->net, model_path), PD_E_MEMORY);
    } else if (r->net) {
        train_and_test(r);
        run_branches(r);
        predict_shared(r);
        if (!r->failed) save_and_load(r); /* files are slow */
    }
    if (r->memory.calls > fail_at && !r->failed) fail_msg("allocation %d failed, and nothing said so", (int)fail_at);
    pd_batch_free(r->batch);
    pd_reader_free(r->train);
    pd_reader_free(r->test);
    pd_trainer_free(r->trainer);
    pd_net_free(r->net);
    if (r->memory.in_use != 0) fail_msg("allocation %d: %d blocks leak", (int)fail_at, (int)r->memory.in_use);
    enough = r->memory.calls <= fail_at;
    remove_events();
    return enough;
}

static void test_lack_of_memory(void **state) {
    int64_t fail_at = 0;
    (void)state;
    assert_true(run_without(INT64_MAX));
    for (; !run_without(fail_at); fail_at++)
        while (!chosen()) fail_at++;
    print_message("           %d allocations\n", (int)fail_at);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_lack_of_memory) };
    return run_group(tests, make_data, remove_data);
}
