/* embed.c - MIT-or-Unlicense - a host program with a trained model inside

   Data: digits.safetensors, which examples/digits.c saves. Expect: "this is a 3". Takes a millisecond.
   Usage: embed [digits.safetensors] */
#define PADDLE_IMPLEMENTATION
#include "../paddle.h"

static const pd_real picture[64] = { 0, 0,  7, 15, 13, 1,  0,  0, 0, 8,  13, 6, 15, 4, 0,  0,  0,  2, 1, 13, 13, 0,
                                     0, 0,  0, 0,  2,  15, 11, 1, 0, 0,  0,  0, 0,  1, 12, 12, 1,  0, 0, 0,  0,  0,
                                     1, 10, 8, 0,  0,  0,  8,  4, 5, 14, 9,  0, 0,  0, 7,  13, 13, 9, 0, 0 };

int main(int argc, char **argv) {
    pd_net *net = pd_net_new(NULL);
    pd_layer *image = pd_affine(net, pd_image(net, "image", 1, 8, 8), 1.0 / 16, 0, NULL); /* pixels are 0 .. 16 */
    pd_layer *conv1 = pd_conv(net, image, 16, 3, &(pd_conv_opts){ .name = "conv1", .pad = 1, .act = PD_RELU });
    pd_layer *conv2 = pd_conv(net, conv1, 32, 3, &(pd_conv_opts){ .name = "conv2", .pad = 1, .act = PD_RELU });
    pd_layer *pool = pd_pool(net, conv2, 2, NULL);
    pd_layer *output = pd_fc(net, pool, 10, &(pd_fc_opts){ .name = "fc", .act = PD_SOFTMAX });
    pd_load(net, argc > 1 ? argv[1] : "digits.safetensors", NULL);

    const pd_real *p = pd_error_status(net) == PD_OK ? pd_predict(output, picture, 1) : NULL;
    int best = 0;
    for (int i = 1; p && i < 10; i++)
        if (p[i] > p[best]) best = i;
    if (p) printf("this is a %d (%.1f %%)\n", best, 100 * (double)p[best]);
    else fprintf(stderr, "%s\n", pd_error(net));
    pd_net_free(net);
    return p == NULL;
}

/* MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h. */
