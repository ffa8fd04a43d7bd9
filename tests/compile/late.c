/* The implementation after other headers and after the declarations, as it comes about in a program of many files.
   Compiled as gnu99: under -std=c99 only the first include can ask libc for more than C99. */
#include <stdio.h>
#include <string.h>

#include "paddle.h"

#define PADDLE_IMPLEMENTATION
#include "paddle.h"

int main(void) {
    pd_net *net = pd_net_new(NULL);
    pd_net_free(net);
    return net == NULL;
}
