/* safetensors_tool save FILE      writes a net's parameters, filled with known numbers
   safetensors_tool load FILE      loads FILE into the same net (`kernel` is mapped and transposed) and prints every
                                   parameter: a line with its name and numbers as hexadecimal floats
   For test_safetensors.py, which knows the net as well. */
#include "paddle.h"

#include <stdio.h>
#include <string.h>

static pd_net *make_net(void) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *image = pd_image(net, "image", 2, 5, 5);
    pd_conv_opts conv;
    pd_fc_opts fc;
    pd_batch_norm_opts norm;
    memset(&conv, 0, sizeof conv);
    memset(&fc, 0, sizeof fc);
    memset(&norm, 0, sizeof norm);
    conv.name = "conv";
    norm.name = "norm";
    fc.name = "fc";
    fc.weight.name = "w\xc3\xb6rter / 100%";
    pd_fc(net, pd_batch_norm(net, pd_conv(net, image, 3, 2, &conv), &norm), 7, &fc);
    return net;
}

/* Thirds do not end in binary; with both signs and many sizes. */
static double number(int k, int64_t i) { return ((double)i - 3.5) / 3 * (k % 2 ? 1e-3 : 1e3); }

static pd_status fill(pd_net *net) {
    pd_real values[1024];
    int k = 0;
    for (pd_param *p = pd_param_first(net); p; p = p->next, k++) {
        if (p->size > 1024) return PD_E_SHAPE;
        for (int64_t i = 0; i < p->size; i++) values[i] = (pd_real)number(k, i);
        pd_param_set(p, values, p->size);
    }
    return PD_OK;
}

static void print(pd_net *net) {
    pd_real values[1024];
    for (pd_param *p = pd_param_first(net); p; p = p->next) {
        pd_param_get(p, values, p->size);
        printf("%s\t", p->name);
        for (int64_t i = 0; i < p->size; i++) printf("%s%a", i ? " " : "", (double)values[i]);
        printf("\n");
    }
}

int main(int argc, char **argv) {
    static const pd_load_map map = { .from = "kernel", .to = "w\xc3\xb6rter / 100%", .transpose = true };
    pd_load_opts opts;
    pd_net *net = make_net();
    pd_status status = PD_E_ARGUMENT;
    memset(&opts, 0, sizeof opts);
    opts.map = &map;
    opts.map_count = 1;
    if (argc == 3 && strcmp(argv[1], "save") == 0) {
        status = fill(net);
        if (status == PD_OK) status = pd_save(net, argv[2]);
    } else if (argc == 3 && strcmp(argv[1], "load") == 0) {
        status = pd_load(net, argv[2], &opts);
        if (status == PD_OK) print(net);
    }
    if (status != PD_OK) fprintf(stderr, "%s\n", pd_error(net));
    pd_net_free(net);
    return status != PD_OK;
}
