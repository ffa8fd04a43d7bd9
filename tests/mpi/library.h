/* What the worker asks of the inside of paddle_mpi.c, which is in tests/mpi/library.c. */
#ifndef PADDLE_TESTS_MPI_LIBRARY_H
#define PADDLE_TESTS_MPI_LIBRARY_H

#include <stdint.h>

int64_t heartbeat_bytes(void); /* the length of a message that says nothing but that its sender lives */

#endif
