/* wordorder.c - MIT-or-Unlicense - tells sentences apart by the order of two words: sequences, embedding, gru

   Data: made up here. A sentence has 0 to 40 words of a vocabulary of 50,000, rare and frequent as in a language
   (Zipf). Class 1: a word of group A comes before one of group B. Class 2: B before A. Class 0: neither; then a word
   of either group may still stand alone. So the words without their order tell class 0 from the others, and no more
   than that.
   Expect: over 99 % of 5,000 sentences never seen before right, after some seconds.
   Build: cc -O2 -fopenmp wordorder.c -o wordorder -lm */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

enum { WORDS = 50000, GROUP = 10, LONGEST = 40, CLASSES = 3 }; /* A: words 0 to 9, B: 10 to 19 */

/* A stream of sentences, other ones in each pass of `per_pass`. */
typedef struct source {
    uint64_t key, drawn;
    int64_t per_pass, left;
} source;

/* Both for pd_stream_reader: this begins a pass .. */
static pd_status begin_pass(void *user, int64_t pass) {
    source *s = (source *)user;
    s->drawn = (uint64_t)pass << 32;
    s->left = s->per_pass;
    return PD_OK;
}

static double uniform(source *s) { return (double)(pd_random(s->key, s->drawn++) >> 11) / 9007199254740992.0; }
static int64_t below(source *s, int64_t n) { return (int64_t)(uniform(s) * (double)n); }

/* A word of no group, the r-th of them with a frequency of about 1 / r. */
static int64_t any_word(source *s) {
    int64_t r = (int64_t)exp(uniform(s) * log(WORDS - 2 * GROUP));
    return 2 * GROUP + r - 1;
}

/* .. and this gives one sentence and its class. */
static pd_status next_sentence(void *user, pd_batch *batch) {
    source *s = (source *)user;
    int64_t words[LONGEST], length = below(s, LONGEST + 1), label = length < 2 ? 0 : below(s, CLASSES);
    if (s->left-- == 0) return PD_END;
    for (int64_t i = 0; i < length; i++) words[i] = any_word(s);
    if (label > 0) {
        int64_t first = below(s, length - 1), second = first + 1 + below(s, length - 1 - first);
        words[first] = below(s, GROUP) + (label == 1 ? 0 : GROUP);
        words[second] = below(s, GROUP) + (label == 1 ? GROUP : 0);
    } else if (length > 0) {
        words[below(s, length)] = below(s, 2 * GROUP);
    }
    pd_status status = pd_batch_add_id(batch, 1, label);
    for (int64_t i = 0; i < length && status == PD_OK; i++) status = pd_batch_add_id(batch, 0, words[i]);
    return status;
}

int main(void) {
    source seen = { 1, 0, 20000, 0 }, unseen = { 2, 0, 5000, 0 };
    double start = pd_seconds(), cost_unseen;

    pd_net *net = pd_net_new(NULL);
    pd_layer *sentence = pd_sequence(pd_ids(net, "sentence", WORDS));
    pd_layer *label = pd_label(net, "label", CLASSES);
    pd_layer *words = pd_embedding(net, sentence, 32, &(pd_embedding_opts){ .weight.sparse = true });
    pd_layer *gru = pd_gru(net, words, 32, NULL);
    pd_layer *last = pd_sequence_pool(net, gru, PD_LAST, NULL);
    pd_layer *output = pd_fc(net, last, CLASSES, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
    pd_evaluator *error = pd_eval_error(net, output, label, NULL);

    pd_reader *train = pd_stream_reader(net, next_sentence, begin_pass, &seen);
    pd_reader *test = pd_stream_reader(net, next_sentence, begin_pass, &unseen);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_momentum(0.1, 0.9), &(pd_trainer_opts){ .clip_norm = 5 });
    pd_status status = pd_train(trainer, train, 3, &(pd_train_opts){ .batch_size = 64, .progress = true });
    if (status == PD_OK) status = pd_test(trainer, test, 64, &cost_unseen);
    if (status == PD_OK)
        printf("wordorder: accuracy %.2f%% (%d unseen sentences), %.1f s\n", 100 - 100 * pd_evaluator_value(error, 0),
               (int)unseen.per_pass, pd_seconds() - start);
    else fprintf(stderr, "%s\n", pd_error(net));

    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return status != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
