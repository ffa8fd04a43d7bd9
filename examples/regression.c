/* regression.c - MIT-or-Unlicense - fits numbers in a CSV file

   Data: a CSV file, each line some numbers and, last, the one to be predicted. Without an argument the program writes
   regression.csv: 4000 points of y = sin(3 a) + b c with a, b, c in -1 .. 1, and a little noise.
   Expect: a root mean squared error below 0.08 on the held-out tenth (the noise alone is 0.05), in a few seconds.
   Usage: regression [file.csv number-of-inputs] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

static double uniform(uint64_t i) { return (double)(pd_random(7, i) >> 11) / 4503599627370496.0 - 1; } /* -1 .. 1 */

static void write_data(const char *path) {
    FILE *f = fopen(path, "w");
    for (uint64_t i = 0; f && i < 4000; i++) {
        double a = uniform(4 * i), b = uniform(4 * i + 1), c = uniform(4 * i + 2), noise = 0.0866 * uniform(4 * i + 3);
        fprintf(f, "%.6f,%.6f,%.6f,%.6f\n", a, b, c, sin(3 * a) + b * c + noise);
    }
    if (f) fclose(f);
}

int main(int argc, char **argv) {
    const char *path = argc > 2 ? argv[1] : "regression.csv";
    if (argc <= 2) write_data(path);

    pd_net *net = pd_net_new(NULL);
    pd_layer *input = pd_vector(net, "input", argc > 2 ? atoll(argv[2]) : 3);
    pd_layer *target = pd_vector(net, "target", 1);
    pd_layer *hidden1 = pd_fc(net, input, 32, &(pd_fc_opts){ .act = PD_TANH });
    pd_layer *hidden2 = pd_fc(net, hidden1, 32, &(pd_fc_opts){ .act = PD_TANH });
    pd_layer *output = pd_fc(net, hidden2, 1, NULL);
    pd_layer *cost = pd_squared_error(net, output, target, NULL);
    pd_evaluator *error = pd_eval_mean_error(net, output, target, NULL);

    pd_reader_opts most = { .folds = 10, .not_fold = true }, rest = { .folds = 10 };
    pd_reader *train = pd_shuffle(net, pd_csv_reader(net, path, &most), 10000, 1);
    pd_reader *test = pd_csv_reader(net, path, &rest);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_adam(0.005), NULL);
    pd_status status = pd_train(trainer, train, 60, &(pd_train_opts){ .batch_size = 64, .test = test, .patience = 10 });
    if (status == PD_OK) status = pd_test(trainer, test, 64, NULL);
    if (status == PD_OK) printf("regression: root mean squared error %.4f\n", pd_evaluator_value(error, 1));
    else fprintf(stderr, "%s\n", pd_error(net));

    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return status != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
