/* The header without its implementation: it stands alone, twice is no harm, and it brings in little of libc. */
#include "paddle.h"
#include "paddle.h"

#ifndef __CUDACC__ /* nvcc includes much by itself */
#if defined(EOF) || defined(HUGE_VAL) || defined(RAND_MAX) || defined(CLOCKS_PER_SEC)
#error the declarations include more than stddef.h, stdint.h and stdbool.h
#endif
#endif

int main(void) {
    pd_net *net = pd_net_new(NULL);
    const char *message = pd_error(net);
    pd_net_free(net);
    return message == NULL;
}
