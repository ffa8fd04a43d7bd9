/* paddle.h and paddle_mpi.c, compiled once for all programs of the tests that run on ranks. */
#define PADDLE_IMPLEMENTATION
#include "paddle.h"
#include "paddle_mpi.c"

#include "library.h"

int64_t heartbeat_bytes(void) { return (int64_t)(offsetof(pd__mpi_message, text) + 1); }
