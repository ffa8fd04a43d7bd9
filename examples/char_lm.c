/* char_lm.c - MIT-or-Unlicense - learns to write like a text, byte by byte: a language model of two LSTM layers

   Data: any file; default: paddle.h. Its last tenth is held out. The rest is cut into 16 streams, read side by side, 32
   bytes in each step; the states in which the layers end a step are those that they begin the next one with.
   Expect: 1.6 bits for a byte of paddle.h in the third pass, and 2.1 for one of its end, which is held out. What it
   then writes looks like C from afar. It takes a minute or two on two cores.
   The model is saved; where there is one already, training goes on from there. After 0 passes it only writes.
   Usage: char_lm [text [passes [model]]] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

enum { STREAMS = 16, STEPS = 32, LAYERS = 2, SIZE = 128, BYTES = 256, STATE = LAYERS * 2 * SIZE };

typedef struct model {
    pd_net *net;
    pd_layer *lstm[LAYERS], *output, *cost; /* output: how likely each byte is to come next */
    pd_batch *batch;
    pd_real state[STREAMS][STATE]; /* how far each stream has come: h and c of each layer */
} model;

static void build(model *m) {
    pd_net *net = m->net = pd_net_new(NULL);
    pd_layer *bytes = pd_sequence(pd_ids(net, "bytes", BYTES));
    pd_layer *next = pd_sequence(pd_label(net, "next", BYTES));
    pd_layer *state = pd_vector(net, "state", STATE);
    pd_layer *x = pd_embedding(net, bytes, 64, NULL);
    for (int k = 0; k < LAYERS; k++) {
        pd_layer *h = pd_slice(net, state, 2 * k * SIZE, SIZE, NULL);
        pd_layer *c = pd_slice(net, state, (2 * k + 1) * SIZE, SIZE, NULL);
        if (k > 0) x = pd_dropout(net, x, 0.1, NULL);
        m->lstm[k] = pd_lstm(net, x, SIZE, &(pd_lstm_opts){ .first = h, .first_cell = c, .cells = true });
        x = pd_slice(net, m->lstm[k], 0, SIZE, NULL); /* without the cells */
    }
    m->output = pd_fc(net, x, BYTES, &(pd_fc_opts){ .act = PD_SOFTMAX });
    m->cost = pd_cross_entropy(net, m->output, next, NULL);
    m->batch = m->cost ? pd_batch_new(net) : NULL;
}

/* A sample of `steps` bytes, each with the one that follows it, from the stream's state on. */
static pd_status add_sample(model *m, int stream, const unsigned char *text, int64_t steps) {
    pd_real *state = pd_batch_add_row(m->batch, 2);
    if (state) memcpy(state, m->state[stream], sizeof m->state[stream]);
    for (int64_t i = 0; i < steps; i++) {
        pd_batch_add_id(m->batch, 0, text[i]);
        pd_batch_add_id(m->batch, 1, text[i + 1]);
    }
    return pd_batch_end_sample(m->batch); /* tells of any failure before, too */
}

/* Keeps the states in which the run has ended its samples, of `steps` bytes each. */
static pd_status keep_states(model *m, int64_t steps) {
    for (int k = 0; k < LAYERS; k++) {
        const pd_real *rows = pd_output(m->lstm[k], NULL, NULL);
        if (!rows) return pd_error_status(m->net);
        for (int64_t s = 0; s < m->batch->samples; s++)
            memcpy(m->state[s] + 2 * k * SIZE, rows + ((s + 1) * steps - 1) * 2 * SIZE, 2 * SIZE * sizeof *rows);
    }
    return PD_OK;
}

/* Of what the batch holds the output of `layer`, as in use. */
static pd_status predict(model *m, pd_layer *layer) {
    pd_layer *targets[1 + LAYERS] = { layer };
    for (int k = 0; k < LAYERS; k++) targets[1 + k] = m->lstm[k];
    return pd_forward(m->net, m->batch, PD_PREDICT, targets, 1 + LAYERS);
}

/* Adds up the costs of the last run. */
static pd_status add_costs(model *m, double *sum) {
    int64_t rows;
    const pd_real *costs = pd_output(m->cost, &rows, NULL);
    if (!costs) return pd_error_status(m->net);
    for (int64_t i = 0; i < rows; i++) *sum += (double)costs[i];
    return PD_OK;
}

/* Goes through a text once, learning if there is a trainer. *bits: of a byte, in the mean. */
static pd_status go_through(model *m, pd_trainer *trainer, const unsigned char *text, int64_t length, double *bits) {
    int64_t each = (length - 1) / STREAMS;
    double sum = 0;
    memset(m->state, 0, sizeof m->state);
    for (int64_t at = 0; at < each; at += STEPS) {
        int64_t steps = each - at < STEPS ? each - at : STEPS;
        pd_status status = PD_OK;
        pd_batch_clear(m->batch);
        for (int s = 0; s < STREAMS && status == PD_OK; s++) status = add_sample(m, s, text + s * each + at, steps);
        if (status == PD_OK) status = trainer ? pd_train_batch(trainer, m->batch, NULL) : predict(m, m->cost);
        if (status == PD_OK) status = add_costs(m, &sum);
        if (status == PD_OK) status = keep_states(m, steps);
        if (status != PD_OK) return status;
    }
    *bits = sum / log(2) / (double)(each * STREAMS);
    return PD_OK;
}

/* A byte at random, likely ones more often: the lower the temperature, the more so. */
static unsigned char draw(const pd_real *chances, double temperature, double random) {
    double weights[BYTES], sum = 0;
    int byte = 0;
    for (int i = 0; i < BYTES; i++) sum += weights[i] = pow((double)chances[i], 1 / temperature);
    for (random *= sum; byte < BYTES - 1 && random >= weights[byte]; byte++) random -= weights[byte];
    return (unsigned char)byte;
}

/* Writes on from the beginning of a line, each byte being the next one's input. */
static pd_status write_text(model *m, int count, double temperature) {
    unsigned char bytes[2] = { '\n', 0 };
    memset(m->state[0], 0, sizeof m->state[0]);
    for (int i = 0; i < count; i++) {
        const pd_real *chances = NULL;
        pd_status status;
        pd_batch_clear(m->batch);
        status = add_sample(m, 0, bytes, 1);
        if (status == PD_OK) status = predict(m, m->output);
        if (status == PD_OK) status = keep_states(m, 1);
        if (status == PD_OK) chances = pd_output(m->output, NULL, NULL);
        if (!chances) return status == PD_OK ? pd_error_status(m->net) : status;
        bytes[0] = draw(chances, temperature, (double)(pd_random(1, (uint64_t)i) >> 11) / 9007199254740992.0);
        putchar(bytes[0] == '\n' || (bytes[0] >= 32 && bytes[0] < 127) ? bytes[0] : '?');
    }
    printf("\n\n");
    return PD_OK;
}

/* The whole file, to be freed; NULL when it can't be read. */
static unsigned char *read_file(const char *path, int64_t *length) {
    FILE *file = fopen(path, "rb");
    unsigned char *text = NULL;
    long size = -1;
    if (file && fseek(file, 0, SEEK_END) == 0) size = ftell(file);
    if (size >= 0 && fseek(file, 0, SEEK_SET) == 0) text = (unsigned char *)malloc((size_t)size + 1);
    if (text && fread(text, 1, (size_t)size, file) != (size_t)size) {
        free(text);
        text = NULL;
    }
    if (file) fclose(file);
    *length = size;
    return text;
}

static pd_status load_if_there(pd_net *net, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return PD_OK;
    fclose(file);
    printf("going on from %s\n", path);
    return pd_load(net, path, NULL);
}

int main(int argc, char **argv) {
    static model m;
    const char *path = argc > 1 ? argv[1] : "paddle.h", *file = argc > 3 ? argv[3] : "char_lm.safetensors";
    int64_t passes = argc > 2 ? atoll(argv[2]) : 3, length, seen;
    double bits = 0, start = pd_seconds();
    unsigned char *text = read_file(path, &length);
    if (!text || length < 20 * STREAMS) {
        fprintf(stderr, "%s: %s\n", path, text ? "is too short, expected 320 bytes or more" : "can't be read");
        free(text);
        return 1;
    }
    seen = length - length / 10;

    build(&m);
    pd_trainer *trainer = pd_trainer_new(m.net, m.cost, pd_adam(0.003), &(pd_trainer_opts){ .clip_norm = 5 });
    pd_status status = m.batch && trainer ? load_if_there(m.net, file) : pd_error_status(m.net);
    for (int64_t pass = 0; status == PD_OK && pass <= passes; pass++) {
        double learned;
        if (pass > 0) status = go_through(&m, trainer, text, seen, &learned);
        if (pass > 0 && status == PD_OK) printf("pass %d: %.3f bits a byte, ", (int)pass, learned);
        if (status == PD_OK) status = go_through(&m, NULL, text + seen, length - seen, &bits);
        if (status == PD_OK) printf("%.3f held out\n", bits);
        if (status == PD_OK) status = write_text(&m, 300, 0.8);
    }
    if (status == PD_OK && passes > 0) status = pd_save(m.net, file);
    if (status == PD_OK) printf("char_lm: %.3f bits a held-out byte, %.1f s\n", bits, pd_seconds() - start);
    else fprintf(stderr, "%s\n", pd_error(m.net));

    free(text);
    pd_batch_free(m.batch);
    pd_trainer_free(trainer);
    pd_net_free(m.net);
    return status != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
