/* The whole library in one file. */
#define PADDLE_IMPLEMENTATION
#include "paddle.h"

int main(void) {
    pd_net *net = pd_net_new(NULL);
    pd_net_free(net);
    return net == NULL;
}
