/* The declarations alone, in C and in C++: what a file sees that leaves the implementation to another. */
#include "paddle.h"
#include "paddle_mpi.c"

int ranks_of(const pd_updater *updater);
int ranks_of(const pd_updater *updater) { return pd_mpi_ranks(updater); }
