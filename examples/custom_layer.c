/* custom_layer.c - MIT-or-Unlicense - a layer of one's own: written, checked, trained

   The layer is swish: y = x sigmoid(b x), with a learned b per channel (Ramachandran et al. 2017).
   Data: examples/data/digits.csv. Expect: "gradients ok", then about 97 % of the held-out digits, in a few seconds.
   Usage: custom_layer [digits.csv]. With -DPADDLE_DOUBLE the gradients are checked to 1e-6. */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

/* ---- the layer ---- */

static pd_status swish_setup(pd_layer *l) {
    l->shape = l->inputs[0]->shape;
    if (l->inputs[0]->is_ids) return pd_layer_fail(l, PD_E_SHAPE, "needs numbers, not ids");
    return pd_layer_param(l, "b", 1, &l->shape.channels, 1, 1, pd_constant(1), NULL) ? PD_OK : pd_error_status(l->net);
}

static pd_status swish_forward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    int64_t area = l->shape.height * l->shape.width;
    for (int64_t i = 0; i < x->rows * x->width; i++) {
        pd_real b = l->params[0]->value[i / area % l->shape.channels], v = x->data[i];
        l->out.data[i] = v / (1 + (pd_real)exp((double)(-b * v)));
    }
    return PD_OK;
}

static pd_status swish_backward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out;
    int64_t area = l->shape.height * l->shape.width;
    for (int64_t i = 0; i < x->rows * x->width; i++) {
        int64_t c = i / area % l->shape.channels;
        pd_real b = l->params[0]->value[c], v = x->data[i], s = 1 / (1 + (pd_real)exp((double)(-b * v)));
        if (x->grad) x->grad[i] += l->out.grad[i] * (s + b * v * s * (1 - s));
        if (l->params[0]->grad) l->params[0]->grad[c] += l->out.grad[i] * v * v * s * (1 - s);
    }
    return PD_OK;
}

static const pd_layer_type swish_type = { PD_API_VERSION, "swish",        1,    1,    0,    0, 0, swish_setup, NULL,
                                          swish_forward,  swish_backward, NULL, NULL, NULL, -1 };

static pd_layer *swish(pd_net *net, pd_layer *input) { return pd_layer_add(net, &swish_type, NULL, &input, 1, NULL); }

/* ---- its use ---- */

int main(int argc, char **argv) {
    const char *data = argc > 1 ? argv[1] : "examples/data/digits.csv";
    pd_net *net = pd_net_new(NULL);
    pd_layer *image = pd_image(net, "image", 1, 8, 8);
    pd_layer *label = pd_label(net, "label", 10);
    pd_layer *conv = swish(net, pd_conv(net, image, 16, 3, NULL));
    pd_layer *hidden = swish(net, pd_fc(net, conv, 64, NULL));
    pd_layer *output = pd_fc(net, hidden, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
    pd_layer *cost = pd_cross_entropy(net, output, label, NULL);
    pd_evaluator *error = pd_eval_error(net, output, label, NULL);

    pd_reader_opts most = { .scale = 1.0 / 16, .folds = 5, .not_fold = true }, rest = { .scale = 1.0 / 16, .folds = 5 };
    pd_reader *train = pd_shuffle(net, pd_csv_reader(net, data, &most), 2000, 1);
    pd_reader *test = pd_csv_reader(net, data, &rest);
    pd_trainer *trainer = pd_trainer_new(net, cost, pd_adam(0.002), NULL);
    pd_batch *batch = pd_batch_new(net);
    pd_gradcheck check = { .error = 1 };
    pd_want_gradient(image); /* else that of a layer that stands on it is left out, and not checked */
    double bound = sizeof(pd_real) == 8 ? 1e-6 : 1e-2;

    if (trainer && train && test && batch && test->next(test, batch, 8) == PD_OK)
        pd_check_gradients(cost, batch, NULL, &check);
    printf("gradients %s: largest relative error %.1e, at %s\n", check.error < bound ? "ok" : "WRONG", check.error,
           check.worst ? check.worst : "?");
    if (pd_train(trainer, train, 10, &(pd_train_opts){ .test = test }) == PD_OK)
        printf("accuracy %.1f%%\n", 100 * (1 - pd_evaluator_value(error, 0)));
    else fprintf(stderr, "%s\n", pd_error(net));

    pd_batch_free(batch);
    pd_reader_free(train);
    pd_reader_free(test);
    pd_trainer_free(trainer);
    pd_net_free(net);
    return !(check.error < bound) || pd_error_status(net) != PD_OK;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
