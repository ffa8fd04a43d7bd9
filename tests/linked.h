/* Put in front of a program that has the implementation in it (-include), this leaves that out, so that the program links
   one that is there already; and includes what the implementation would have included for it. */
#ifndef PADDLE_TESTS_LINKED_H
#define PADDLE_TESTS_LINKED_H

#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#define PADDLE_IMPLEMENTED
#define PADDLE_MPI_IMPLEMENTED

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#endif
