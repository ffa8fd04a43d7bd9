/* translate.c - MIT-or-Unlicense - translation: an encoder, attention, and a decoder written as a step of a graph

   `translate` learns to say numbers from 0 to 999,999 in English words, from 60,000 of them.
   `translate en de` learns from the catalogues of messages (.mo files) that are installed in /usr/share/locale/de:
   short sentences of programs, some 40,000 pairs where many programs are installed.
   A part of the pairs, chosen by a hash of the source, is held out and shows what was learned.
   Expect: over 99 % of the held-out numbers exactly right, in less than a minute.
   Writes translate.tsv and translate.safetensors into the directory where it runs.
   Build: cc -O2 -fopenmp translate.c -o translate -lm (wants a POSIX system, to list catalogues) */
#define _POSIX_C_SOURCE 200809L
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

#include <dirent.h>

enum { LONGEST = 40, WIDTH = 64, EMBEDDING = 32, SHOWN = 5 };

#define PAIRS "translate.tsv"
#define MODEL "translate.safetensors"

/* ---- pairs ---- */

typedef struct pair {
    char *source, *target;
} pair;

typedef struct corpus {
    pair *held; /* out of the training */
    int64_t held_count, held_capacity, trained;
    FILE *file; /* of the others */
} corpus;

static uint64_t hash_of(const char *text) {
    uint64_t key = 1;
    for (; *text; text++) key = pd_random(key, (unsigned char)*text);
    return key;
}

static char *copy_of(const char *text) {
    char *copy = (char *)malloc(strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

/* Holds one of `share` pairs out, at most 1,000, and writes the others to the file. */
static bool add_pair(corpus *c, const char *source, const char *target, uint64_t share) {
    bool held = hash_of(source) % share == 0;
    if (!held) {
        c->trained++;
        return fprintf(c->file, "%s\t%s\n", source, target) > 0;
    }
    if (c->held_count == 1000) return true;
    if (c->held_count == c->held_capacity) {
        int64_t capacity = 2 * c->held_capacity + 100;
        pair *more = (pair *)realloc(c->held, (size_t)capacity * sizeof *more);
        if (!more) return false;
        c->held = more;
        c->held_capacity = capacity;
    }
    c->held[c->held_count].source = copy_of(source);
    c->held[c->held_count].target = copy_of(target);
    return c->held[c->held_count].source && c->held[c->held_count++].target;
}

static void say(char *text, int64_t number) {
    static const char *const small[] = { "zero",    "one",     "two",       "three",    "four",
                                         "five",    "six",     "seven",     "eight",    "nine",
                                         "ten",     "eleven",  "twelve",    "thirteen", "fourteen",
                                         "fifteen", "sixteen", "seventeen", "eighteen", "nineteen" };
    static const char *const tens[] = { "",      "",      "twenty",  "thirty", "forty",
                                        "fifty", "sixty", "seventy", "eighty", "ninety" };
    text += strlen(text);
    if (number >= 1000) {
        say(text, number / 1000);
        strcat(text, " thousand");
        if (number % 1000) say(strcat(text, " "), number % 1000);
    } else if (number >= 100) {
        sprintf(text, "%s hundred", small[number / 100]);
        if (number % 100) say(strcat(text, " "), number % 100);
    } else if (number >= 20) {
        sprintf(text, "%s%s%s", tens[number / 10], number % 10 ? " " : "", number % 10 ? small[number % 10] : "");
    } else strcpy(text, small[number]);
}

static bool add_numbers(corpus *c) {
    for (uint64_t i = 0; i < 60000; i++) {
        const int64_t number = (int64_t)(i < 1000 ? i : pd_random(7, i) % 1000000);
        char source[16], target[200] = "";
        snprintf(source, sizeof source, "%lld", (long long)number);
        say(target, number);
        if (!add_pair(c, source, target, 50)) return false;
    }
    return true;
}

/* Number k of the table at `at`: a length and an offset of a text that ends with a 0. NULL: not within the file. */
static const char *mo_text(const unsigned char *file, size_t size, uint32_t at, uint32_t k, bool swap) {
    uint32_t entry[2];
    if ((uint64_t)at + 8 * ((uint64_t)k + 1) > size) return NULL;
    memcpy(entry, file + at + 8 * k, 8);
    for (int i = 0; i < 2 && swap; i++)
        entry[i] = entry[i] >> 24 | (entry[i] >> 8 & 0xff00) | (entry[i] << 8 & 0xff0000) | entry[i] << 24;
    if ((uint64_t)entry[1] + entry[0] >= size || file[entry[1] + entry[0]] != 0) return NULL;
    return (const char *)file + entry[1];
}

/* One line of words, without tabs, and not too many. */
static bool is_sentence(const char *text) {
    int words = 1;
    if (!*text) return false;
    for (; *text; text++) {
        if ((unsigned char)*text < ' ') return false;
        words += *text == ' ';
    }
    return words <= LONGEST / 2;
}

/* The pairs of a catalogue of GNU gettext, whose first text is a header; what is no such file, or not in UTF-8, is left
   out. */
static bool add_catalogue(corpus *c, const char *path, bool back) {
    FILE *f = fopen(path, "rb");
    unsigned char *file = NULL;
    uint32_t head[5] = { 0 };
    long size = f && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    bool fine = true, swap;
    if (size > 20 && fseek(f, 0, SEEK_SET) == 0) file = (unsigned char *)malloc((size_t)size);
    if (file && fread(file, 1, (size_t)size, f) == (size_t)size) memcpy(head, file, sizeof head);
    if (f) fclose(f);
    swap = head[0] == 0xde120495;
    for (int i = 2; i < 5 && swap; i++)
        head[i] = head[i] >> 24 | (head[i] >> 8 & 0xff00) | (head[i] << 8 & 0xff0000) | head[i] << 24;
    for (uint32_t k = 0; fine && (swap || head[0] == 0x950412de) && k < head[2]; k++) {
        const char *source = mo_text(file, (size_t)size, head[3], k, swap);
        const char *target = mo_text(file, (size_t)size, head[4], k, swap);
        if (!source || !target) break;
        if (k == 0 && (*source || (!strstr(target, "charset=UTF-8") && !strstr(target, "charset=utf-8")))) break;
        if (is_sentence(source) && is_sentence(target))
            fine = add_pair(c, back ? target : source, back ? source : target, 50);
    }
    free(file);
    return fine;
}

static bool add_catalogues(corpus *c, const char *from, const char *to) {
    const bool back = strcmp(to, "en") == 0;
    char directory[300], path[700];
    struct dirent *entry;
    bool fine = true;
    DIR *d;
    snprintf(directory, sizeof directory, "/usr/share/locale/%.100s/LC_MESSAGES", back ? from : to);
    d = opendir(directory);
    while (fine && d && (entry = readdir(d)) != NULL) {
        size_t length = strlen(entry->d_name);
        snprintf(path, sizeof path, "%s/%.255s", directory, entry->d_name);
        if (length > 3 && strcmp(entry->d_name + length - 3, ".mo") == 0) fine = add_catalogue(c, path, back);
    }
    if (d) closedir(d);
    return fine;
}

/* ---- the net ---- */

typedef struct model {
    pd_net *net;
    pd_vocab *from, *to;
    pd_layer *cost, *scores, *attention;
} model;

/* h' = (1 - z) c + z h with z, r = sigmoid(W x + U h), c = tanh(V x + r (T h)): what a GRU does with the word before and
   what attention has looked up. */
static pd_layer *cell(pd_net *net, pd_layer *word, pd_layer *context, pd_layer *h) {
    const int64_t n = h->out.width;
    pd_layer *all[] = { word, context, h }, *sum[2];
    pd_layer *gates = pd_fc_sum(net, all, 3, 2 * n, &(pd_fc_opts){ .act = PD_SIGMOID });
    pd_layer *z = pd_slice(net, gates, 0, n, NULL), *r = pd_slice(net, gates, n, n, NULL);
    sum[0] = pd_fc_sum(net, all, 2, n, NULL);
    sum[1] = pd_multiply(net, r, pd_fc(net, h, n, NULL), NULL);
    return pd_interpolate(net, z, h, pd_add(net, sum, 2, &(pd_layer_opts){ .act = PD_TANH }), NULL);
}

static void build(model *m) {
    pd_net *net = m->net;
    pd_layer *from = pd_sequence(pd_ids(net, "from", pd_vocab_size(m->from)));
    pd_layer *so_far = pd_sequence(pd_ids(net, "so far", pd_vocab_size(m->to)));
    pd_layer *next = pd_sequence(pd_label(net, "next", pd_vocab_size(m->to)));
    pd_layer *read = pd_embedding(net, from, EMBEDDING, NULL);
    pd_layer *ways[2], *encoder, *boot, *keys, *word, *h, *query;
    pd_group *decoder;
    ways[0] = pd_gru(net, read, WIDTH, NULL);
    ways[1] = pd_gru(net, read, WIDTH, &(pd_gru_opts){ .reverse = true });
    encoder = pd_concat(net, ways, 2, NULL);
    boot = pd_fc(net, pd_sequence_pool(net, ways[1], PD_FIRST, NULL), 2 * WIDTH, &(pd_fc_opts){ .act = PD_TANH });

    decoder = pd_group_begin(net, &(pd_group_opts){ .name = "decoder" });
    pd_group_input(decoder, so_far);
    pd_group_static(decoder, encoder);
    h = pd_group_memory(decoder, 2 * WIDTH, boot);
    word = pd_embedding(net, so_far, EMBEDDING, NULL);
    keys = pd_fc(net, encoder, WIDTH, NULL);
    query = pd_fc(net, h, WIDTH, &(pd_fc_opts){ .no_bias = true });
    m->attention = pd_attention(net, query, keys, encoder, NULL);
    h = h ? (pd_group_feed(h, ways[0] = cell(net, word, m->attention, h)), ways[0]) : NULL;
    m->scores = pd_fc(net, h, pd_vocab_size(m->to), &(pd_fc_opts){ .act = PD_SOFTMAX });
    m->cost = pd_cross_entropy(net, pd_group_end(decoder, m->scores), next, NULL);
}

static bool failed(const model *m) {
    fprintf(stderr, "translate: %s\n", m->net ? pd_error(m->net) : "out of memory");
    return false;
}

/* ---- training and translating ---- */

static bool train(model *m, bool characters, int64_t passes) {
    pd_net *net = m->net;
    pd_reader *reader;
    pd_trainer *trainer;
    pd_status status;
    m->from = pd_vocab_build(net, PAIRS, &(pd_vocab_opts){ .column = 1, .characters = characters, .max_size = 8000 });
    m->to = pd_vocab_build(net, PAIRS, &(pd_vocab_opts){ .column = 2, .max_size = 8000 });
    build(m);
    const pd_text_field fields[] = { { .vocab = m->from, .column = 1, .end = true },
                                     { .vocab = m->to, .column = 2, .begin = true },
                                     { .vocab = m->to, .column = 2, .end = true } };
    reader = pd_shuffle(net, pd_text_reader(net, PAIRS, fields, 3, NULL), 100000, 1);
    trainer = pd_trainer_new(net, m->cost, pd_adam(0.004), &(pd_trainer_opts){ .clip_norm = 5 });
    status = pd_train(trainer, reader, passes, &(pd_train_opts){ .batch_size = 64, .progress = true });
    pd_reader_free(reader);
    pd_trainer_free(trainer);
    if (status == PD_OK) status = pd_net_set_text(net, "from", pd_vocab_text(m->from));
    if (status == PD_OK) status = pd_net_set_text(net, "to", pd_vocab_text(m->to));
    if (status == PD_OK) status = pd_save(net, MODEL);
    return status == PD_OK || failed(m);
}

/* As another program would: what it must know to build the net is in the file. */
static bool load(model *m, bool characters) {
    pd_net *net = m->net;
    if (pd_load(net, MODEL, NULL) != PD_OK) return failed(m);
    m->from = pd_vocab_parse(net, pd_net_text(net, "from"), &(pd_vocab_opts){ .characters = characters });
    m->to = pd_vocab_parse(net, pd_net_text(net, "to"), NULL);
    build(m);
    return pd_load(net, MODEL, NULL) == PD_OK || failed(m);
}

static pd_status add_source(const model *m, pd_batch *batch, const pair *p) {
    pd_status status = pd_batch_add_text(batch, 0, m->from, p->source);
    return status == PD_OK ? pd_batch_add_id(batch, 0, pd_vocab_end(m->from)) : status;
}

/* Translates into the results' targets. Sentences may come in any company: each gets the same translation. */
static bool translate(const model *m, const pair *pairs, int64_t count, pair *results) {
    const pd_generate_opts o = { .begin = pd_vocab_begin(m->to), .end = pd_vocab_end(m->to), .max_rows = LONGEST };
    pd_batch *batch = pd_batch_new(m->net);
    pd_status status = batch ? PD_OK : PD_E_MEMORY;
    for (int64_t first = 0; status == PD_OK && first < count; first += 100) {
        pd_generated words;
        pd_batch_clear(batch);
        for (int64_t i = first; status == PD_OK && i < count && i < first + 100; i++) {
            status = add_source(m, batch, &pairs[i]);
            if (status == PD_OK) status = pd_batch_end_sample(batch);
        }
        if (status == PD_OK) status = pd_generate(m->scores, batch, &o, &words);
        for (int64_t q = 0; status == PD_OK && q < words.sequences; q++) {
            size_t size = 1;
            char *text;
            for (int64_t k = words.starts[q]; k < words.starts[q + 1]; k++)
                size += strlen(pd_vocab_word(m->to, words.ids[k])) + 1;
            text = results[first + q].target = (char *)calloc(size, 1);
            if (!text) status = PD_E_MEMORY;
            for (int64_t k = words.starts[q]; text && k < words.starts[q + 1]; k++)
                strcat(strcat(text, *text ? " " : ""), pd_vocab_word(m->to, words.ids[k]));
        }
    }
    if (status != PD_OK)
        fprintf(stderr, "translate: %s\n", batch && batch->error.status ? batch->error.text : pd_error(m->net));
    pd_batch_free(batch);
    return status == PD_OK;
}

/* Prints a translation, and beside each word how much of the attention was on each word of the source, in tenths. */
static bool show(const model *m, const pair *source, const pair *result) {
    pd_batch *batch = pd_batch_new(m->net);
    pd_layer *scores = m->scores;
    pd_status status = batch ? add_source(m, batch, source) : PD_E_MEMORY;
    if (status == PD_OK) status = pd_batch_add_id(batch, 1, pd_vocab_begin(m->to));
    if (status == PD_OK) status = pd_batch_add_text(batch, 1, m->to, result->target);
    if (status == PD_OK) status = pd_batch_end_sample(batch);
    if (status == PD_OK) status = pd_forward(m->net, batch, PD_PREDICT, &scores, 1);
    if (status == PD_OK) printf("%s\n", source->source);
    for (int64_t row = 0; status == PD_OK && row < batch->slots[1].rows; row++) {
        int64_t count = 0;
        const pd_real *weights = pd_attention_weights(m->attention, 0, row, &count);
        const char *word = row + 1 < batch->slots[1].rows ? pd_vocab_word(m->to, batch->slots[1].ids[row + 1]) : "";
        if (!weights) status = PD_E_STATE;
        printf("    %-12s ", word);
        for (int64_t i = 0; weights && i < count; i++) {
            int tenths = (int)((double)weights[i] * 10 + 0.5);
            if (tenths) printf(" %s:%d", pd_vocab_word(m->from, batch->slots[0].ids[i]), tenths);
        }
        printf("\n");
    }
    if (status != PD_OK) fprintf(stderr, "translate: %s\n", pd_error(m->net));
    pd_batch_free(batch);
    return status == PD_OK;
}

static void free_model(model *m) {
    pd_vocab_free(m->from);
    pd_vocab_free(m->to);
    pd_net_free(m->net);
}

int main(int argc, char **argv) {
    const bool numbers = argc < 3;
    corpus c = { 0 };
    model learned = { 0 }, loaded = { 0 };
    pair *results[2] = { NULL, NULL };
    int64_t exact = 0;
    double start = pd_seconds();
    bool fine;
    if (argc == 2 || argc > 3 || (argc == 3 && strcmp(argv[1], "en") != 0 && strcmp(argv[2], "en") != 0)) {
        fprintf(stderr, "usage: translate, or translate en LANGUAGE, or translate LANGUAGE en\n");
        return 2;
    }
    c.file = fopen(PAIRS, "w");
    fine = c.file && (numbers ? add_numbers(&c) : add_catalogues(&c, argv[1], argv[2]));
    if (c.file && fclose(c.file) != 0) fine = false;
    if (!fine) fprintf(stderr, "translate: %s can't be written\n", PAIRS);
    if (fine && (c.trained == 0 || c.held_count == 0)) {
        fprintf(stderr, "translate: no catalogues of %s in /usr/share/locale\n",
                strcmp(argv[2], "en") ? argv[2] : argv[1]);
        fine = false;
    }
    if (fine) {
        learned.net = pd_net_new(NULL);
        loaded.net = pd_net_new(NULL);
        for (int i = 0; i < 2; i++) results[i] = (pair *)calloc((size_t)c.held_count, sizeof(pair));
        fine = results[0] && results[1];
    }
    fine = fine && train(&learned, numbers, numbers ? 2 : 6);
    fine = fine && translate(&learned, c.held, c.held_count, results[0]);
    fine = fine && load(&loaded, numbers) && translate(&loaded, c.held, c.held_count, results[1]);
    for (int64_t i = 0; fine && i < c.held_count; i++) {
        exact += strcmp(c.held[i].target, results[0][i].target) == 0;
        if (strcmp(results[0][i].target, results[1][i].target) != 0) {
            fprintf(stderr, "translate: %s is translated otherwise by the saved model\n", c.held[i].source);
            fine = false;
        }
    }
    for (int64_t i = 0; fine && i < c.held_count && i < (numbers ? SHOWN : 2 * SHOWN); i++)
        fine = show(&loaded, &c.held[i], &results[1][i]);
    if (fine)
        printf("translate: %.1f%% exact (%lld held-out %s), %.0f s\n", 100 * (double)exact / (double)c.held_count,
               (long long)c.held_count, numbers ? "numbers" : "sentences", pd_seconds() - start);

    for (int64_t i = 0; i < c.held_count; i++) {
        free(c.held[i].source), free(c.held[i].target);
        for (int k = 0; k < 2; k++)
            if (results[k]) free(results[k][i].target);
    }
    free(c.held), free(results[0]), free(results[1]);
    free_model(&learned), free_model(&loaded);
    return !fine;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
