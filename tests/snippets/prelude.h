/* What the code blocks of README.md and paddle.h may use without declaring it. See extract.awk. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "paddle.h"

extern pd_net *net;
extern pd_layer *input, *image, *label, *target, *hidden, *output, *cost, *layer;
extern pd_param *param;
extern pd_reader *reader, *test_reader;
extern pd_trainer *trainer;
extern pd_batch *batch;
extern pd_device *device;
extern pd_status status;
extern const pd_real *pixels;
extern int64_t rows, width, samples;
