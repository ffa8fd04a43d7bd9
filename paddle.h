/* paddle.h - v0.1.0 - deep learning in one C header - MIT-or-Unlicense

   Trains and runs neural networks: layer graphs, sequences without padding, costs and evaluators, optimizers, readers
   for files larger than memory, checkpoints. Needs the C library and libm; uses OpenMP when the compiler does.

   In ONE file of your program:

       #define PADDLE_IMPLEMENTATION
       #include "paddle.h"

   before other headers, and `cc -O2 -fopenmp app.c -lm` (or without -fopenmp). Other files just include it.

   paddle.h DOES NOT: record arbitrary programs and differentiate them (a net is a graph of layers, built once); store
   the graph in its files (the program that uses a model builds the same graph); run on a GPU or a cluster by itself
   (paddle_cuda.cu and paddle_mpi.c do); use float16 in computation.

   CONTENTS, with line numbers by `make format`. Search for >>layer:fc, >>net.h, and the like.

     TOPICS            A WHOLE PROGRAM 50, ERRORS 84, ROWS AND SHAPES 96, SEQUENCES AND SPARSE ROWS 105,
                       PARAMETERS 131, GRADIENTS AND OPTIMIZERS 142, HOW A TRAINING ENDS 153, READERS 178, FILES 217,
                       WRITING A LAYER 277, DEVICES AND UPDATERS 315, ON ADDING AN OPERATION 341,
                       THREADS AND DETERMINISM 352, ONE ANSWER 364, INSTRUCTION SETS 383, MEMORY 398,
                       OPTIONS AT COMPILE TIME 409
     >>NAME.h          status 484, hooks 541, tensors 567, net 598, parameters 652, inputs 733, activations 748,
                       layers 779, costs 989, batches 1033, running 1083, groups 1112, evaluators 1173,
                       optimizers 1238, device 1315, layer_types 1523, updater 1646, readers 1707, text 1791,
                       trainer 1837, files 1916, gradient_check 1959
     >>NAME.c          core 2109, threads 2549, net 2809, parameters 3102, inputs 3616, activations 3707,
                       layers 3727, costs 6108, batches 6762, running 7046, groups 7726, evaluators 8772,
                       optimizers 9318, device 9509, layer_types 11092, updater 11400, averaging 11871,
                       readers 11954, text 14124, tensorboard 14635, trainer 14819, profile 15841, files 15913,
                       gradient_check 18082, kernels 18343
     >>layer:NAME      fc 3932, conv 4038, conv_transpose 4038, pool 4218, batch_norm 4307, layer_norm 4443,
                       group_norm 4482, response_norm 4535, dropout 4579, add 4631, multiply 4631, concat 4689,
                       slice 4735, reshape 4735, transpose 4735, pad 4735, scale 4873, interpolate 4873, affine 4960,
                       maxout 4989, resize 5035, block_expand 5102, cosine 5201, outer 5279, bilinear 5325,
                       activation 5394, prelu 5394, embedding 5456, gru 5673, attention 5835, sequence_pool 6002,
                       expand 7735
     >>cost:NAME       cross_entropy 6206, binary_cross_entropy 6385, squared_error 6406, huber 6417, smooth_l1 6435,
                       sum_cost 6464, huber_two_class 6495, hinge 6506, rank_cost 6579, lambda_rank 6632
     >>evaluator:NAME  error 8817, precision_recall 8860, auc 8928, pnpair 9029, mean_error 9076
     >>op:NAME         kernels 9510, contract 9596, gemm 9651, conv 9784, winograd 10036, update 10351,
                       activate 10427, pool 10456, cross_entropy 10574, dropout 10615, norm 10626,
                       sparse_product 10767, gru 10783, attention 10802, levels 10865
     >>reader:NAME     array 12418, csv 12733, libsvm 12940, idx 13190, npy 13190, stream 13603, shuffle 13718,
                       prefetch 13856, text 14504
     >>kernel:NAME     gemm 18448, winograd 18768, elementwise 19117, update 19365, activate 19538, norm 19704,
                       gru 19951, attention 19994, pool 20081

   A WHOLE PROGRAM

   ```c
   #define PADDLE_IMPLEMENTATION
   #include "paddle.h"

   int main(void) {
       pd_net *net = pd_net_new(NULL);
       pd_layer *image = pd_image(net, "image", 1, 28, 28);
       pd_layer *label = pd_label(net, "label", 10);
       pd_layer *conv = pd_conv(net, image, 8, 5, &(pd_conv_opts){ .name = "conv", .act = PD_RELU });
       pd_layer *pool = pd_pool(net, conv, 2, NULL);
       pd_layer *fc = pd_fc(net, pool, 10, &(pd_fc_opts){ .act = PD_SOFTMAX, .weight.init = pd_normal(0, 0.01) });
       pd_layer *cost = pd_cross_entropy(net, fc, label, NULL);

       const char *files[] = { "train-images-idx3-ubyte", "train-labels-idx1-ubyte" };
       pd_reader *reader = pd_idx_reader(net, files, 2, &(pd_reader_opts){ .scale = 1 / 255.0 });
       pd_trainer *trainer = pd_trainer_new(net, cost, pd_momentum(0.02, 0.9), &(pd_trainer_opts){ .l2 = 0.0005 });
       if (pd_train(trainer, reader, 10, &(pd_train_opts){ .batch_size = 128, .progress = true }) != PD_OK ||
           pd_save(net, "model.safetensors") != PD_OK)
           fprintf(stderr, "%s\n", pd_error(net));
       pd_reader_free(reader);
       pd_trainer_free(trainer);
       pd_net_free(net);
   }
   ```

   What a call needs are parameters; what it can do without are fields of an options struct, in which zero is the
   default and NULL stands for all defaults. In C++ declare the struct, set its fields and pass its address.

   Where a number's default is another than 0, and 0 would be of use, the field's comment names PD_ZERO, which stands
   for that 0: `.threshold = PD_ZERO`. Other fields refuse it: in them 0 is the default, or of no use. The parameters
   of calls mean what they say, so pd_momentum(0.1, 0) has a momentum of 0.

   ERRORS

   The library never exits, aborts or prints unasked (`progress` is asking). A builder (anything that adds to a net)
   that is given something wrong returns NULL, and the net keeps the message; later builders see that, or the NULL, and
   return NULL as well, so one check at the end is enough. Other calls return a pd_status. In both cases pd_error(net)
   is one line that names the layer or the file, what was expected and what came:

       conv2: filter 7x7 does not fit the padded input 5x5 coming from "pool1" (16x5x5)
       train.csv:812: column 3 (pixels): "n/a" is not a number

   A failed training step changes no further parameter: what was learned can still be saved (see HOW A TRAINING ENDS).

   ROWS AND SHAPES

   A batch is a stack of rows. Each layer turns rows into rows; the shape of one row (channels x height x width, or a
   plain number of values) is settled when the layer is built, the number of rows by each batch. A sample is one row,
   or, for inputs marked by pd_sequence, any number of rows: sequences lie end to end with a list of offsets, nothing is
   padded, and layers that work row by row need not know. What combines several inputs (layers, costs, evaluators) does
   so row by row: all of them carry sequences, and then of the same lengths, or none does. Labels and words are ids,
   64-bit integers.

   SEQUENCES AND SPARSE ROWS

   A sentence is a sequence of ids. This reads sentences, looks the words up, runs a recurrent layer over them, and
   takes its last row:

   ```c
   pd_layer *words = pd_sequence(pd_ids(net, "words", 50000));
   pd_layer *rows = pd_embedding(net, words, 32, &(pd_embedding_opts){ .weight.sparse = true });
   pd_layer *last = pd_sequence_pool(net, pd_gru(net, rows, 64, NULL), PD_LAST, NULL);
   pd_layer *output = pd_fc(net, last, 10, &(pd_fc_opts){ .act = PD_SOFTMAX });
   ```

   To tag every word give the labels sequences too, `pd_sequence(pd_label(net, "tags", 9))`, and the cost is one of
   rows. A gradient is a mean over samples, so long sentences count more.

   Recurrent layers run the sequences of a batch side by side, the longest first, and go on with fewer when the short
   ones have ended. Vectors of which few numbers are not zero (pd_sparse_vector) hold pairs of column and number, and
   go to pd_fc. A parameter marked `sparse` has a gradient for the rows that the batch named, and a step costs what
   these rows cost, not what the table does. What the others would have moved, by momentum and l2, is made up for in
   copies when they are read, and in the table when they next have a gradient (and for a few rows of the table in each
   step, in turn, so that none falls too far behind): the result is that of dense training, up to rounding. Reading
   leaves no trace: saving, testing and predicting between steps change no bit of what is learned. Optimizers that
   would have to touch every row are refused.

   Layers see these rows by their place in the batch, not in the table: see pd_param_touch and row_values.

   PARAMETERS

   A layer's learned numbers are named after it ("conv.weight", "conv.bias"). Give two layers the same parameter name
   in their options and they share it. Each parameter may have its own initialiser, learning-rate factor, decay,
   clipping, pruning, or be static:

   ```c
   pd_fc(net, input, 100, &(pd_fc_opts){ .name = "fc", .weight = { .init = pd_xavier(), .rate_factor = 2, .l2 = 1e-4 },
                                         .bias.l2 = PD_ZERO });
   ```

   GRADIENTS AND OPTIMIZERS

   Costs are per row. A gradient is summed over the batch and divided by the number of samples before the optimizer sees
   it (not with `sum_gradients`, which is how the Paddle of 2016 did it; there, rates were divided by the batch size by
   hand). Order: scale, clip the norm of all (clip_norm; with it no parameter changes before the whole backward pass is
   done), clip each element (clip_value), add l2 times the value (AdamW instead shrinks the value by rate times l2),
   step, and shrink towards zero by rate times l1. This holds for every optimizer; what one can't do is refused, not
   ignored. Schedules are functions of the samples seen, so they survive a change of batch size. Where batches are
   filled by tokens (`batch_tokens`), a sample is still a sentence: it is by the number of sentences that gradients are
   divided, and in sentences that schedules and logs count.

   HOW A TRAINING ENDS

   pd_train returns PD_OK when all passes are done or patience has run out, PD_STOPPED when on_event wanted it, and else
   what failed, with the message in the net: a reader (the samples before a bad one have been used), a test (its pass is
   done), a number that is not finite (PD_E_NUMERIC: the step is not made, but for parameters that had made it before;
   with clip_norm none has), a file that can't be written, a worker that is lost. However it ends, parameters have the
   values of the last step, or, with `patience`, those of the best test so far, if there was one; averaged values are
   swapped out, gradients are 0, and what the optimizer keeps, the samples seen and the place in the pass are those of
   the last step. So the net can be used and saved, and pd_train can be called again: it goes on from these values (with
   patience: the best), in the pass where it was, with the sample or batch that failed. A checkpoint, on the other hand,
   is that of the last step, best values or not: continuing from it is as if nothing had stopped.

   With patience each call judges anew. If the net has been trained before, by whom ever, or has loaded values, it is
   tested first, so that the best values may be those that it came with. Only a training that comes from a checkpoint
   goes on with the tests in there. If it had run out of patience, it has all of it again: a program that begins by
   loading its checkpoint trains for some passes more each time that it is started.

   When a worker in another process is lost, the others have the best values as well. Without patience each has its own
   shard as of the last step, the rest as of that or of the one before; but the rows of sparse parameters that the lost
   one held are lost, and then pd_save fails.

   Every step begins with gradients of 0. While pd_train is at work, its trainer can't be trained by another call, nor
   load a checkpoint, and its reader can't be tested in the midst of a pass: PD_E_STATE. A test without samples is an
   error, and so is one whose cost is not finite.

   READERS

   A reader gives samples to the inputs of the net in the order in which these were created. Readers can be stacked:

   ```c
   reader = pd_prefetch(net, pd_shuffle(net, pd_csv_reader(net, "@train.list", NULL), 100000, 1), 4);
   ```

   reads ahead in a thread, shuffles with 100,000 samples in memory, from the files listed in train.list. What a
   reader delivers depends on its seed and the number of the pass alone, so a training that continues from a checkpoint
   sees the same samples. Bad input gives the file, line or offset, and what was expected. Paths, those in a list too,
   are as fopen takes them. To hold every fifth sample out for a test, read the file twice:

   ```c
   pd_reader_opts most = { .folds = 5, .not_fold = true }, rest = { .folds = 5 };
   reader = pd_csv_reader(net, "data.csv", &most);
   test_reader = pd_csv_reader(net, "data.csv", &rest);
   ```

   Text becomes ids by vocabularies (>>text.h), which are counted from the training text and kept in the model's file.
   This reads lines of a sentence, a tab, and its translation, which one input gets behind the begin of a sentence, and
   another, the labels, in front of its end:

   ```c
   pd_vocab *english = pd_vocab_build(net, "train.tsv", &(pd_vocab_opts){ .column = 1, .max_size = 30000 });
   pd_vocab *french = pd_vocab_build(net, "train.tsv", &(pd_vocab_opts){ .column = 2, .max_size = 30000 });
   pd_layer *from = pd_sequence(pd_ids(net, "from", pd_vocab_size(english)));
   pd_layer *so_far = pd_sequence(pd_ids(net, "so far", pd_vocab_size(french)));
   pd_layer *next = pd_sequence(pd_label(net, "next", pd_vocab_size(french)));
   pd_text_field fields[] = { { .vocab = english, .column = 1, .end = true },
                              { .vocab = french, .column = 2, .begin = true },
                              { .vocab = french, .column = 2, .end = true } };
   reader = pd_shuffle(net, pd_text_reader(net, "train.tsv", fields, 3, NULL), 100000, 1);
   pd_net_set_text(net, "english", pd_vocab_text(english));
   ```

   The program that translates loads the file, makes `english` from pd_net_text(net, "english") by pd_vocab_parse, builds
   the net, and loads the file again.

   FILES

   Values are saved as .safetensors, which Python reads too; checkpoints are such files with more in them. A save writes
   a file of its own beside the old one, PATH.tmp- and 16 hexadecimal digits, syncs it, and renames it: whoever reads
   PATH, or saves to it at the same time, finds the file of one save, whole. Links are followed, and a file keeps its
   mode. What killed savers have left is removed by the next save to the path; it knows them by their locks (flock), so
   savers on several machines want a file system whose locks reach all of them.

   The metadata have a checksum of each tensor, "checksum/NAME", and in checkpoints and with texts one of themselves,
   "checksum": a bit that flipped on the way is an error. Files without them load too; a program that changes numbers or
   metadata leaves them out.

   Beside its numbers a net keeps texts, under names ("text/NAME" in the metadata). So a program can ask the file what
   it must know to build the net; loaded before there are parameters, a file gives its texts alone:

   ```c
   pd_net *net = pd_net_new(NULL);
   pd_status status = pd_load(net, "model.safetensors", NULL);
   const char *classes = pd_net_text(net, "classes");
   ```

   To make a training one that can be stopped and started again, load the checkpoint if there is one; `passes` counts
   what was trained before:

   ```c
   FILE *earlier = fopen("run.checkpoint", "rb");
   if (earlier) fclose(earlier);
   if (!earlier || pd_checkpoint_load(trainer, "run.checkpoint") == PD_OK)
       pd_train(trainer, reader, 10, &(pd_train_opts){ .checkpoint = "run.checkpoint" });
   ```

   For weights trained elsewhere, names and layout are mapped:

   ```c
   pd_load_map map[] = { { .from = "features.0.weight", .to = "conv.weight" },
                         { .from = "classifier.weight", .to = "fc.weight", .transpose = true } };
   pd_load(net, "theirs.safetensors", &(pd_load_opts){ .map = map, .map_count = 2, .partial = true });
   ```

   Loading compares names and shapes, and can't know what the numbers mean. PyTorch's nn.GRU has its gates in another
   order (reset r, update z, new n) and biases of both products, which are added up but for that of h in the new gate:

   ```c
   pd_load_map map[] = { { "rnn.weight_ih_l0", "gru.weight", true, "rzn->zrn", false },
                         { "rnn.weight_hh_l0", "gru.recurrent", true, "rzn->zrn", false },
                         { "rnn.bias_ih_l0", "gru.bias", false, "rzn->zrn", false },
                         { "rnn.bias_hh_l0", "gru.bias", false, "rzn->zr-", true },
                         { "rnn.bias_hh_l0", "gru.recurrent_bias", false, "rzn->n", false } };
   ```

   Names end in _reverse for the layer with `reverse`. nn.LSTM has its gates in the order of ours (input, forget,
   candidate, output): weights are transposed, and the two biases added:

   ```c
   pd_load_map map[] = { { "rnn.weight_ih_l0", "lstm.weight", true, NULL, false },
                         { "rnn.weight_hh_l0", "lstm.recurrent", true, NULL, false },
                         { "rnn.bias_ih_l0", "lstm.bias", false, NULL, false },
                         { "rnn.bias_hh_l0", "lstm.bias", false, NULL, true } };
   ```

   WRITING A LAYER

   A layer is a constant pd_layer_type. The built-in ones are written in the same way. This one computes
   x * sigmoid(b x) with one learned b; its activation, memory, saving and training come from the net:

   ```c
   static pd_status swish_setup(pd_layer *l) {
       int64_t one = 1;
       l->shape = l->inputs[0]->shape;
       if (l->inputs[0]->is_ids) return pd_layer_fail(l, PD_E_SHAPE, "needs numbers, not ids");
       return pd_layer_param(l, "b", 1, &one, 1, 1, pd_constant(1), NULL) ? PD_OK : pd_error_status(l->net);
   }
   static pd_status swish_forward(pd_layer *l) {
       const pd_tensor *x = &l->inputs[0]->out;
       for (int64_t i = 0; i < x->rows * x->width; i++)
           l->out.data[i] = x->data[i] / (1 + (pd_real)exp(-l->params[0]->value[0] * x->data[i]));
       return PD_OK;
   }
   static pd_status swish_backward(pd_layer *l) {
       const pd_tensor *x = &l->inputs[0]->out;
       pd_param *b = l->params[0];
       for (int64_t i = 0; i < x->rows * x->width; i++) {
           pd_real v = x->data[i], s = 1 / (1 + (pd_real)exp(-b->value[0] * v)), slope = v * s * (1 - s);
           if (x->grad) x->grad[i] += l->out.grad[i] * (s + b->value[0] * slope);
           if (b->grad) b->grad[0] += l->out.grad[i] * v * slope;
       }
       return PD_OK;
   }
   static const pd_layer_type swish = { PD_API_VERSION, "swish", 1, 1, 0, 0, 0,
                                        swish_setup, NULL, swish_forward, swish_backward, NULL, NULL, NULL, -1 };
   ```

   It is added with pd_layer_add(net, &swish, "name", &input, 1, NULL). pd_check_gradients says whether backward is the
   derivative of forward; build with PADDLE_DOUBLE for a sharp answer. Backward adds to gradients, never overwrites.
   Types that are written in the device's operations name them in `needs`; one that ends in a product or a convolution
   may give that its bias and activation too (pd_layer_epilogue), and one that only scales and shifts channels when
   predicting may leave that to the layer below (`fold`).

   DEVICES AND UPDATERS

   A device (pd_device) is memory and the operations layers are written in; an updater (pd_updater) is what becomes of
   gradients. Both are tables of functions, so that a GPU or a cluster can be plugged in without a change to layers or
   programs. The CPU device and the local updater are built in. On a device without host memory a layer that it can't
   run runs on the CPU, and its numbers are carried there and back; pd_info names these layers. A device with host
   memory may have as few operations as it likes. This one has products only, and leaves all else to the CPU:

   ```c
   static void my_gemm(pd_device *d, bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha, const pd_real *a,
                       int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *c, int64_t ldc,
                       const pd_epilogue *after) {
       for (int64_t i = 0; i < m; i++)
           for (int64_t j = 0; j < n; j++) {
               pd_real sum = 0, *to = c + i * ldc + j;
               for (int64_t l = 0; l < k; l++)
                   sum += a[ta ? l * lda + i : i * lda + l] * b[tb ? j * ldb + l : l * ldb + j];
               *to = alpha * sum + (beta != 0 ? beta * *to : 0);
           }
       if (after) pd_epilogue_apply(d, after, m, n, c, ldc);
   }
   static pd_device mine = { .api_version = PD_API_VERSION, .name = "mine", .host_memory = true, .gemm = my_gemm };
   ```

   and goes into `.device` of pd_net_opts.

   ON ADDING AN OPERATION

   An operation has a declaration, a text for the CPU, one for the GPU, a test and, where users meet it, documentation.
   1. Under >>device.h: its type pd_op_NAME, with what it means, and NAME in PD_OPERATIONS.
   2. pd__cpu_NAME under >>device.c. Work that wants vectors is a kernel: pd__kernel_KERNEL, and KERNEL in PD__KERNELS,
      at the head of the same section; its text under >>kernels.c.
   3. pd__cuda_NAME in paddle_cuda.cu: a function, or a NULL; then layers that need it run on the CPU.
   4. far_NAME in tests/far_device.h, gradients in tests/test_layers.c, the GPU beside the CPU in tests/test_cuda.c.
   Tables are filled by these names: what is forgotten does not compile. Layer types say PD_OP(NAME) in `needs`. The
   table is for algebra, and for what must be one pass over memory to be fast.

   THREADS AND DETERMINISM

   One thread at a time uses a net; different nets may be used in different threads; nothing is global. pd_net_share
   makes further nets that read the same parameters. Within a net OpenMP divides the work. Same seed, same program,
   same build and machine: the same bits, whatever the number of threads. Another compiler, instruction set or C
   library may round differently.

   Where other programs have the processors, threads that wait for each other are slower than one. A net notices and
   goes on with half of them, down to one, and tries again with more after 20 ms, or after up to a second where that
   was in vain: beside a busy loop on every processor it takes about as long as with one thread. pd_profile says how
   much of the time that was.

   ONE ANSWER

   Predicting on the CPU, a net says the same bits of a sample alone as in any batch, at any place in it, beside any
   other samples (of infinities and NaN, too), frozen or not: no product, convolution or sum chooses its method or the
   order of its terms by the number of rows. That is for one build, instruction set and machine, and for the same
   targets, since a batch norm that is folded into the layer below rounds otherwise than one that is not. Of a NaN only
   that it is one is promised. Costs are layers like others, but for pd_lambda_rank without sequences, whose query is
   the batch.

   Not so in training, where batch norm looks at all samples, and convolutions choose by rows; on other devices, unless
   they say so; and with layer types of your own only if they treat each row alike.

   It costs time where images are small, since a 3 x 3 convolution may no longer take Winograd's method for many of them
   and the plain one for one. With outputs of about 6 x 6 to 8 x 8 and dozens of channels, one sample takes 1.7
   to 2.2 times as long as it could by AVX-512, by AVX2 about as long (2.8 and 1.7 times in nets that are not frozen),
   and batches as long; with smaller ones, or fewer channels, one takes as long, and batches of 16 twice as long.
   ResNet-18 (224 x 224, frozen, AVX-512) takes a quarter longer for one image, and as long for more. Larger images are
   free, and products of one row take 2 % longer at most.

   INSTRUCTION SETS

   Products, convolutions, pooling, optimizers, most activations, batch and response normalisation, GRU steps and
   attention are compiled for several instruction sets (on x86-64: none, SSE2, AVX2 with FMA, AVX-512; elsewhere: none
   and 16-byte vectors), and each net takes the best that the processor and the system have: `cc -O2` is enough. pd_info says which.
   `simd` in pd_net_opts, or PADDLE_SIMD in the environment, asks for another; one that can't be had is refused.
   Compilers other than gcc and clang get plain code.

   Bias and activation of fc and conv, and when predicting the batch norm that follows, are applied to the results of a
   product while these are in registers or the nearest cache.

   Convolutions with filters of 3 x 3 at stride 1 and enough channels (in training also: enough rows) go by Winograd's
   F(4 x 4, 3 x 3) (Lavin and Gray 2016). Their rounding errors are about three times those of a plain sum, and a number
   that is not finite makes the other numbers of its tile so.

   MEMORY

   Shapes are settled when layers are built, memory is taken with the first batch, and after batches of the largest size
   have been seen a training step allocates nothing (but for sparse parameters of more than 4,096 rows, with momentum or
   l2, now and then: what is kept of the last steps doubles until it has 16 MB). Everything comes from the allocator in
   pd_net_opts.

   When predicting, layers lend each other memory: where the last reader of an output has run, a later layer writes its
   own, and only the targets' outputs are there in the end. pd_net_bytes says what a net holds. A program that only
   predicts calls pd_freeze once the weights are loaded: the device then keeps them as its products read them.

   OPTIONS AT COMPILE TIME

     PADDLE_DOUBLE       pd_real is double. Define it in every file of the program, or in none (a mix doesn't link).
     PADDLE_STATIC       all functions are static. Define it beside PADDLE_IMPLEMENTATION; then only that file can call.
     PADDLE_FILE         this file's name in quotes, if it is not "paddle.h": the implementation includes itself, once
                         for each instruction set. Beside PADDLE_IMPLEMENTATION.
     PADDLE_NO_AVX       no kernels for AVX2 and AVX-512: less to compile, a smaller program. Beside
                         PADDLE_IMPLEMENTATION.
     PADDLE_NO_THREADS   no thread for pd_prefetch. Beside PADDLE_IMPLEMENTATION. (OpenMP is the compiler's option.)

   The implementation is not for -ffast-math and what belongs to it: gcc and clang refuse, or go without. Other files of
   the program may have it; linking with it is fine too, but then numbers below 1.2e-38 (2.3e-308 in double) are 0.
   On 32-bit x86 add -msse2 -mfpmath=sse: the older unit rounds sums as registers happen to be free.

   Licence: at the end of this file. */

#if defined(PADDLE_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* for fsync, fileno, clock_gettime and threads under -std=c99 */
#endif
#if defined(PADDLE_IMPLEMENTATION) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1 /* for madvise */
#endif
#if defined(PADDLE_IMPLEMENTATION) && !defined(_FILE_OFFSET_BITS)
#define _FILE_OFFSET_BITS 64 /* files beyond 2 GiB on 32-bit systems */
#endif

#ifndef PADDLE_FILE
#define PADDLE_FILE "paddle.h" /* this file's name: the implementation includes it again */
#endif

#ifndef PADDLE_H
#define PADDLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PD_VERSION "0.1.0"
#define PD_API_VERSION 1 /* of the four seams: pd_layer_type, pd_device, pd_updater, pd_reader */

#ifndef PD_API
#ifdef PADDLE_STATIC
#if defined(__GNUC__)
#define PD_API static __attribute__((unused))
#else
#define PD_API static
#endif
#else
#define PD_API extern
#endif
#endif

#if defined(__GNUC__)
#define PD_PRINTF(text, args) __attribute__((format(printf, text, args)))
#else
#define PD_PRINTF(text, args)
#endif

/* The number type of values and gradients. PADDLE_DOUBLE must be the same in every file of a program; since it
   renames the one function that every program calls, a mix does not link. Options are double in both builds. */
#ifdef PADDLE_DOUBLE
typedef double pd_real;
#define pd_net_new pd_net_new_of_double
#else
typedef float pd_real;
#endif

/* 0 where zero is a default of another value: for the fields whose comments name it. Fits every number's type. */
#define PD_ZERO (-2147483647 - 1)

#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================================== */
/* >>status.h                                                                                              */

#define PD_STATUSES(X)                                                                                                 \
    X(PD_OK, "ok")                                                                                                     \
    X(PD_END, "end of data")                                                                                           \
    X(PD_STOPPED, "stopped by the callback")                                                                           \
    X(PD_E_ARGUMENT, "wrong argument")                                                                                 \
    X(PD_E_SHAPE, "shapes do not match")                                                                               \
    X(PD_E_MEMORY, "out of memory")                                                                                    \
    X(PD_E_IO, "file could not be read or written")                                                                    \
    X(PD_E_FORMAT, "malformed data")                                                                                   \
    X(PD_E_NUMERIC, "not a finite number")                                                                             \
    X(PD_E_UNSUPPORTED, "not supported")                                                                               \
    X(PD_E_STATE, "called in the wrong state")                                                                         \
    X(PD_E_DEVICE, "device failed")

typedef enum pd_status {
#define PD__ENUM(name, text) name,
    PD_STATUSES(PD__ENUM)
#undef PD__ENUM
        PD_STATUS_COUNT
} pd_status;

/* A status and its message, as nets, readers and batches keep one. */
typedef struct pd_failure {
    pd_status status;
    char text[512];
} pd_failure;

typedef struct pd_net pd_net;
typedef struct pd_layer pd_layer;
typedef struct pd_layer_type pd_layer_type;
typedef struct pd_param pd_param;
typedef struct pd_device pd_device;
typedef struct pd_batch pd_batch;
typedef struct pd_reader pd_reader;
typedef struct pd_vocab pd_vocab;
typedef struct pd_updater pd_updater;
typedef struct pd_trainer pd_trainer;
typedef struct pd_group pd_group;
typedef struct pd_evaluator pd_evaluator;

/* The constant one-line text of a status; never NULL. */
PD_API const char *pd_status_text(pd_status status);

/* The message of the net's failure: of the builder that failed first, which stays, else of the call that failed last,
   which stays until a run (pd_forward, pd_predict, pd_train, pd_test ..) or pd_clear_error; "" when there is none.
   Valid until the next call on this net. NULL net: the text for "out of memory". */
PD_API const char *pd_error(const pd_net *net);

/* Forgets a failure that was not a builder's. */
PD_API void pd_clear_error(pd_net *net);

/* The status that goes with pd_error. */
PD_API pd_status pd_error_status(const pd_net *net);

/* ======================================================================================================== */
/* >>hooks.h                                                                                               */

/* Every byte the library takes comes from here. alloc returns memory aligned to `align` (a power of two) or NULL;
   free gets back what alloc gave and the same size. Both must be callable from several threads when a prefetching
   reader is used. All NULL: the C library's allocator. */
typedef struct pd_allocator {
    void *(*alloc)(void *user, size_t size, size_t align);
    void (*free)(void *user, void *memory, size_t size);
    void *user;
} pd_allocator;

/* Memory from an allocator, for companions, layer types and readers of your own: `count` times `size` bytes, zeroed and
   aligned to 64; NULL when there are none. To be freed by pd_free with the same allocator; NULL is fine there. */
PD_API void *pd_alloc(const pd_allocator *allocator, int64_t count, size_t size);
PD_API void pd_free(const pd_allocator *allocator, void *memory);
/* Makes *array, of pd_alloc or NULL, hold at least `need` elements of `size` bytes, keeping its contents; grows by
   half, so that filling one by one is linear. False when out of memory: then nothing has changed. */
PD_API bool pd_grow(const pd_allocator *allocator, void **array, int64_t *capacity, int64_t need, size_t size);

/* Receives the message of every failure. NULL: silence. The text is only valid in the call. */
typedef struct pd_logger {
    void (*log)(void *user, pd_status status, const char *text);
    void *user;
} pd_logger;

/* ======================================================================================================== */
/* >>tensors.h                                                                                             */

/* The shape of one row. A vector of n is {n, 1, 1}; an image is stored channel by channel, row by row (CHW). */
typedef struct pd_shape {
    int64_t channels, height, width;
} pd_shape;

/* What one layer puts out for one batch: a stack of rows, in the memory of the net's device. */
typedef struct pd_tensor {
    int64_t rows;          /* of this batch */
    int64_t width;         /* numbers per row: channels * height * width of the layer's shape */
    pd_real *data;         /* rows x width; NULL when the rows are ids */
    pd_real *grad;         /* rows x width, d(cost)/d(data); NULL when nobody wants it. Backward ADDS into it. */
    const int64_t *ids;    /* rows ids (labels, words); NULL when the rows are numbers. Always host memory. */
    int64_t sequences;     /* number of sequences; 0 when the rows are independent */
    const int64_t *starts; /* sequences + 1 row offsets, first 0, last rows; NULL when independent. Host memory. */
    /* Sparse rows, in host memory: row r has the entries row_starts[r] .. row_starts[r + 1] - 1; entry k is the number
       values[k] in column ids[k]. NULL row_starts: one id per row. NULL values: all 1. */
    const int64_t *row_starts;
    const pd_real *values;
} pd_tensor;

/* A sparse matrix by rows (CSR), in host memory, as pd_tensor describes sparse rows. */
typedef struct pd_csr {
    int64_t rows;
    const int64_t *starts;  /* rows + 1; NULL: one entry per row */
    const int64_t *columns; /* one per entry */
    const pd_real *values;  /* one per entry; NULL: all 1 */
} pd_csr;

/* ======================================================================================================== */
/* >>net.h                                                                                                 */

/* Instruction sets. The baseline is what every processor of the kind has: SSE2, NEON. */
typedef enum pd_simd {
    PD_SIMD_BEST, /* that the processor and the compiler have */
    PD_SIMD_SCALAR,
    PD_SIMD_BASELINE,
    PD_SIMD_AVX2, /* and FMA */
    PD_SIMD_AVX512,
    PD_SIMD_COUNT
} pd_simd;

typedef struct pd_net_opts {
    uint64_t seed; /* of everything random in this net */
    int threads;   /* OpenMP threads, up to 1024; default all. Results do not depend on it. */
    pd_simd simd;  /* instruction set of the CPU's heavy operations; default: what PADDLE_SIMD in the environment says
                          (scalar, baseline, avx2 or avx512), else the best. Results depend on it by rounding. */
    pd_device *device; /* default: the CPU. Not owned; must outlive the net. */
    pd_allocator allocator;
    pd_logger logger;
} pd_net_opts;

/* A new empty net, or NULL when out of memory. Free with pd_net_free. A net is used by one thread at a time. */
PD_API pd_net *pd_net_new(const pd_net_opts *opts);
PD_API void pd_net_free(pd_net *net);

/* A second net with the same layers that reads the same parameters, for predicting in another thread at the same
   time. It can't be trained, must be freed before `net`, and `net` must not be trained while it is in use. (Where
   `net` is trained between two uses, with workers in other processes, call pd_sync. On a device given in pd_net_opts
   both nets use that one, so in turn.)
   NULL, with the message in `net`, when it can't be made. */
PD_API pd_net *pd_net_share(pd_net *net);

/* Says that the net's parameters are final: it only predicts from now on, and so do its shared nets, and the device may
   keep weights in the form that its products read, in memory of its own. Trainers must be freed before; training and
   pd_load fail after it. */
PD_API pd_status pd_freeze(pd_net *net);

/* For companions: what the net takes memory from, and where it computes. */
PD_API const pd_allocator *pd_net_allocator(const pd_net *net);
PD_API pd_device *pd_net_device(const pd_net *net);

PD_API pd_layer *pd_layer_find(pd_net *net, const char *name); /* NULL when there is none; no error */
PD_API pd_layer *pd_layer_at(pd_net *net, int index);          /* in order of creation; NULL past the end */

/* One line: version, number type, device, instruction set in use, threads. Like snprintf: returns the length it
   wants. */
PD_API size_t pd_info(const pd_net *net, char *text, size_t size);

/* Bytes of the layers' outputs, gradients and working memory, which last until the net is freed: so, the peak. (Not:
   parameters and their gradients, batches, and what a device takes for itself.) */
PD_API size_t pd_net_bytes(const pd_net *net);

/* ======================================================================================================== */
/* >>parameters.h                                                                                          */

typedef enum pd_init_kind {
    PD_INIT_DEFAULT,  /* what the layer documents; for weights normal with standard deviation 1/sqrt(fan-in) */
    PD_INIT_CONSTANT, /* a */
    PD_INIT_NORMAL,   /* mean a, standard deviation b */
    PD_INIT_UNIFORM,  /* from a to b */
    PD_INIT_XAVIER,   /* uniform in +-sqrt(6 / (fan-in + fan-out)); Glorot and Bengio 2010 */
    PD_INIT_HE        /* normal, standard deviation sqrt(2 / fan-in); He et al. 2015 */
} pd_init_kind;

typedef struct pd_init {
    pd_init_kind kind;
    double a, b;
} pd_init;

PD_API pd_init pd_constant(double value);
PD_API pd_init pd_normal(double mean, double deviation);
PD_API pd_init pd_uniform(double low, double high);
PD_API pd_init pd_xavier(void);
PD_API pd_init pd_he(void);

/* Options of one parameter, a field of many layers' options. All zero: the defaults. */
typedef struct pd_param_opts {
    const char *name;   /* default "LAYER.weight" and the like; a name already in use shares that parameter, and the
                            other options must then be zero or the same */
    pd_init init;       /* default: the layer's */
    double rate_factor; /* of the learning rate, > 0; default 1 */
    double l1, l2;      /* default: the trainer's; PD_ZERO: none, whatever the trainer's */
    bool is_static;     /* never updated, no gradient is computed */
    double clip;        /* bound on each element of the gradient; default: the trainer's clip_value; PD_ZERO: none */
    double prune;       /* 0 <= prune < 1: this fraction of the smallest magnitudes, rounded to a whole number, but not
                            all, is set to zero when training starts and held there (a pruning mask); default 0 */
    bool sparse;        /* for tables read by ids (pd_embedding) or sparse inputs (pd_fc): a step costs little more
                            than the rows in the batch; see SEQUENCES AND SPARSE ROWS. With sgd, momentum
                            and nesterov only; not with l1, prune and model averaging */
} pd_param_opts;

#define PD_MAX_DIMS 4

/* Rows of a sparse parameter. Host memory. A row's place here is its place in all that is kept for these rows. */
typedef struct pd_rows {
    int64_t count;
    const int64_t *ids; /* each once, in the order in which they were first named */
} pd_rows;

/* One named array of learned numbers. Read-only for users; value and grad are in the device's memory. */
struct pd_param {
    const char *name;
    int dim_count;
    int64_t dims[PD_MAX_DIMS];
    int64_t size;   /* product of dims */
    pd_real *value; /* of a sparse parameter what is stored, which layers don't read: its rows may have steps to make
                       up for. pd_param_get has all of them as they would be */
    pd_real *grad;  /* SUM over the samples of the batch; NULL when static or not training. Backward adds. Of a sparse
                       parameter: rows.count x dims[1], row i being that of row rows.ids[i] of the table */
    pd_rows rows;   /* of a sparse parameter: those that the batch names, and those named since its gradient was last
                       zeroed */
    pd_real *row_values; /* of a sparse parameter: rows.count x dims[1], these rows as they are now; what layers read */
    pd_param_opts opts;
    bool is_buffer;      /* statistics kept by a layer, such as a running mean: saved, never given a gradient */
    unsigned char *mask; /* size bytes, 0 = held at zero; NULL = no pruning. Host memory. */
    pd_net *net;         /* the net that owns it */
    int64_t fan_in, fan_out;
    int users;                   /* the net's: layers of this step that have not yet added their gradient */
    int trained;                 /* the trainer's: 1 + its place among the trained ones, 0 = not trained */
    bool announced;              /* the net's: param_needed was called in this step */
    struct pd__touched *touched; /* the net's: how rows are found; NULL unless sparse */
    pd_param *next;              /* in order of creation */
};

PD_API pd_param *pd_param_find(pd_net *net, const char *name); /* NULL when there is none; no error */
PD_API pd_param *pd_param_first(pd_net *net);                  /* then ->next, in order of creation */
/* Copies all `count` numbers in or out (host memory); count must be the parameter's size. What is put in must be
   finite, else PD_E_NUMERIC, and nothing changes. */
PD_API pd_status pd_param_set(pd_param *param, const pd_real *values, int64_t count);
PD_API pd_status pd_param_get(const pd_param *param, pd_real *values, int64_t count);
/* The gradient summed over the last batch; PD_E_STATE when there is none. */
PD_API pd_status pd_param_get_grad(const pd_param *param, pd_real *values, int64_t count);

/* ======================================================================================================== */
/* >>inputs.h                                                                                              */

/* Inputs are fed by the batch's slots in the order in which they are created here. */
PD_API pd_layer *pd_image(pd_net *net, const char *name, int64_t channels, int64_t height, int64_t width);
PD_API pd_layer *pd_vector(pd_net *net, const char *name, int64_t size);
PD_API pd_layer *pd_label(pd_net *net, const char *name, int64_t classes); /* ids 0 .. classes - 1 */
/* The same, for words, queries and the like. `count` may be up to INT64_MAX, for ids that are only compared. */
PD_API pd_layer *pd_ids(pd_net *net, const char *name, int64_t count);
/* Vectors of `size` numbers, up to INT64_MAX, of which few are not zero, given as pairs of column and number; for
   pd_fc. */
PD_API pd_layer *pd_sparse_vector(pd_net *net, const char *name, int64_t size);
/* Makes an input carry sequences: each sample is any number of rows. Returns `input`. */
PD_API pd_layer *pd_sequence(pd_layer *input);

/* ======================================================================================================== */
/* >>activations.h                                                                                         */

/* X(name, text, needs): needs says what the derivative reads: the output y, or the input x kept beside it. Where a
   slope is infinite, a gradient of 0 stays 0. */
#define PD_ACTIVATIONS(X)                                                                                              \
    X(PD_LINEAR, "linear", PD__FROM_Y)         /* x */                                                                 \
    X(PD_RELU, "relu", PD__FROM_Y)             /* max(x, 0) */                                                         \
    X(PD_BRELU, "brelu", PD__FROM_Y)           /* min(max(x, 0), 24) */                                                \
    X(PD_SOFTRELU, "softrelu", PD__FROM_Y)     /* log(1 + exp(x)) */                                                   \
    X(PD_LEAKY_RELU, "leaky_relu", PD__FROM_Y) /* x < 0 ? 0.01 x : x */                                                \
    X(PD_GELU, "gelu", PD__FROM_X)             /* x (1 + erf(x / sqrt 2)) / 2 */                                       \
    X(PD_SIGMOID, "sigmoid", PD__FROM_Y)       /* 1 / (1 + exp(-x)) */                                                 \
    X(PD_TANH, "tanh", PD__FROM_Y)                                                                                     \
    X(PD_STANH, "stanh", PD__FROM_Y) /* 1.7159 tanh(2/3 x); LeCun et al. 1998 */                                       \
    X(PD_EXP, "exp", PD__FROM_Y)                                                                                       \
    X(PD_LOG, "log", PD__FROM_X)                                                                                       \
    X(PD_ABS, "abs", PD__FROM_X)                                                                                       \
    X(PD_SQUARE, "square", PD__FROM_X)                                                                                 \
    X(PD_SQRT, "sqrt", PD__FROM_Y)             /* its slope at 0 counts as 0 */                                        \
    X(PD_RECIPROCAL, "reciprocal", PD__FROM_Y) /* 1 / x */                                                             \
    X(PD_SOFTMAX, "softmax", PD__FROM_Y)       /* over the whole row */

typedef enum pd_act {
#define PD__ENUM(name, text, needs) name,
    PD_ACTIVATIONS(PD__ENUM)
#undef PD__ENUM
        PD_ACT_COUNT
} pd_act;
PD_API const char *pd_act_text(pd_act act); /* "relu" */

/* ======================================================================================================== */
/* >>layers.h                                                                                              */

/* Every function here adds a layer and returns it, owned by the net, or NULL: then pd_error(net) says why. A NULL
   input (from an earlier failure) gives NULL again and leaves the first message. opts may be NULL. "name" in the
   options is the layer's name, default its kind and a number; "act" is applied to the output. */

typedef struct pd_fc_opts {
    const char *name;
    pd_act act;
    bool no_bias;
    pd_param_opts weight; /* in x size; "LAYER.weight", and "LAYER.weight1" .. for further inputs. `sparse` only if
                             all inputs are sparse */
    pd_param_opts bias;   /* size; starts at 0 */
} pd_fc_opts;
/* Fully connected: y = act(x W + b). Row-wise; images are taken as vectors; the cost of sparse inputs is that of their
   entries. */
PD_API pd_layer *pd_fc(pd_net *net, pd_layer *input, int64_t size, const pd_fc_opts *opts);
/* The same over several inputs with equal rows: y = act(sum_k x_k W_k + b). */
PD_API pd_layer *pd_fc_sum(pd_net *net, pd_layer *const *inputs, int count, int64_t size, const pd_fc_opts *opts);

typedef struct pd_conv_opts {
    const char *name;
    pd_act act;
    bool no_bias;
    int64_t filter_h;             /* default: the `filter` argument, which is the width */
    int64_t stride, stride_h;     /* default 1; stride_h default: stride */
    int64_t pad, pad_h;           /* zeros on each side; pad_h default: pad. PD_ZERO as pad_h: none */
    int64_t dilation, dilation_h; /* default 1; dilation_h default: dilation */
    int64_t groups;               /* default 1 */
    pd_param_opts weight;         /* filters x in/groups x filter_h x filter (OIHW) */
    pd_param_opts bias;           /* filters; starts at 0 */
} pd_conv_opts;
/* 2-D convolution (cross-correlation): out = floor((in + 2 pad - dilation (filter - 1) - 1) / stride) + 1. */
PD_API pd_layer *pd_conv(pd_net *net, pd_layer *input, int64_t filters, int64_t filter, const pd_conv_opts *opts);
/* Transposed convolution: out = (in - 1) stride - 2 pad + dilation (filter - 1) + 1. Its weight is
   in x filters/groups x filter_h x filter (IOHW). */
PD_API pd_layer *pd_conv_transpose(pd_net *net, pd_layer *input, int64_t filters, int64_t filter,
                                   const pd_conv_opts *opts);

typedef enum pd_pool_method {
    PD_MAX,
    PD_AVERAGE, /* over the cells of the window that lie inside the image */
    PD_SUM,
    PD_SQRT_N, /* sum / sqrt(cells inside the image) */
    PD_FIRST,  /* pd_sequence_pool only */
    PD_LAST    /* the same */
} pd_pool_method;
typedef struct pd_pool_opts {
    const char *name;
    pd_act act;
    pd_pool_method method;    /* default PD_MAX */
    int64_t size_h;           /* default: the `size` argument, which is the width */
    int64_t stride, stride_h; /* default: size and size_h; stride_h default: stride if given */
    int64_t pad, pad_h;       /* < size; pad_h default: pad. PD_ZERO as pad_h: none */
    bool ceil;                /* round the output size up instead of down: windows may stick out at the end */
} pd_pool_opts;
PD_API pd_layer *pd_pool(pd_net *net, pd_layer *input, int64_t size, const pd_pool_opts *opts);

typedef struct pd_batch_norm_opts {
    const char *name;
    pd_act act;
    double epsilon;       /* > 0; default 1e-5 */
    double momentum;      /* running = (1 - momentum) * running + momentum * batch; 0 (PD_ZERO) to 1; default 0.1 */
    bool use_running;     /* normalise with the running statistics in training too */
    bool no_affine;       /* neither scale nor shift */
    pd_param_opts weight; /* channels, starts at 1 */
    pd_param_opts bias;   /* channels, starts at 0 */
} pd_batch_norm_opts;
/* Per channel over rows and positions; Ioffe and Szegedy 2015. Prediction uses the running mean and (unbiased)
   variance, kept in the buffers LAYER.running_mean and LAYER.running_var. A batch of one number per channel has no
   variance: only its mean enters. */
PD_API pd_layer *pd_batch_norm(pd_net *net, pd_layer *input, const pd_batch_norm_opts *opts);

typedef struct pd_layer_norm_opts {
    const char *name;
    pd_act act;
    double epsilon; /* > 0; default 1e-5 */
    bool no_affine;
    pd_param_opts weight, bias; /* width of the row; start at 1 and 0 */
} pd_layer_norm_opts;
/* Each row to mean 0 and variance 1; Ba et al. 2016. */
PD_API pd_layer *pd_layer_norm(pd_net *net, pd_layer *input, const pd_layer_norm_opts *opts);

typedef struct pd_group_norm_opts {
    const char *name;
    pd_act act;
    double epsilon; /* > 0; default 1e-5 */
    bool no_affine;
    pd_param_opts weight, bias; /* channels; start at 1 and 0 */
} pd_group_norm_opts;
/* The channels of each row in `groups` runs of equal size, each over its channels and positions to mean 0 and variance 1;
   Wu and He 2018. groups 1 to channels (each by itself: instance normalisation, Ulyanov et al. 2016). */
PD_API pd_layer *pd_group_norm(pd_net *net, pd_layer *input, int64_t groups, const pd_group_norm_opts *opts);

typedef struct pd_response_norm_opts {
    const char *name;
    pd_act act;
    int64_t size; /* channels in the window; default 5 */
    double alpha; /* >= 0; default 1e-4, divided by size inside; PD_ZERO: 0 */
    double beta;  /* default 0.75; PD_ZERO: 0 */
    double k;     /* > 0; default 1 */
} pd_response_norm_opts;
/* Across feature maps: y_c = x_c (k + alpha/size sum x_j^2)^-beta, j from c - size/2; Krizhevsky et al. 2012. */
PD_API pd_layer *pd_response_norm(pd_net *net, pd_layer *input, const pd_response_norm_opts *opts);

/* Options of layers that have no more than a name and an activation. */
typedef struct pd_layer_opts {
    const char *name;
    pd_act act;
} pd_layer_opts;

/* Training: each number is zero with probability p (0 <= p < 1), else divided by 1 - p. Otherwise: x. */
PD_API pd_layer *pd_dropout(pd_net *net, pd_layer *input, double p, const pd_layer_opts *opts);
/* y = sum_k x_k, and y = product of two; equal shapes. */
PD_API pd_layer *pd_add(pd_net *net, pd_layer *const *inputs, int count, const pd_layer_opts *opts);
PD_API pd_layer *pd_multiply(pd_net *net, pd_layer *a, pd_layer *b, const pd_layer_opts *opts);
/* Joined along the channels: heights and widths must be equal. */
PD_API pd_layer *pd_concat(pd_net *net, pd_layer *const *inputs, int count, const pd_layer_opts *opts);
/* Channels first .. first + count - 1. */
PD_API pd_layer *pd_slice(pd_net *net, pd_layer *input, int64_t first, int64_t count, const pd_layer_opts *opts);
/* The same numbers under another shape; channels * height * width must not change. */
PD_API pd_layer *pd_reshape(pd_net *net, pd_layer *input, pd_shape shape, const pd_layer_opts *opts);
/* Permutes the axes of each row: axis i of the output is axis order[i] of the input (0 channels, 1 height, 2 width). */
PD_API pd_layer *pd_transpose(pd_net *net, pd_layer *input, const int order[3], const pd_layer_opts *opts);
/* y = w a + (1 - w) b, with one number w per row, or w of the same shape as a and b: one for each number. Where w is 0
   or 1, y is exactly b or a, if both are finite. */
PD_API pd_layer *pd_interpolate(pd_net *net, pd_layer *w, pd_layer *a, pd_layer *b, const pd_layer_opts *opts);
/* y = w x, with one number w per row. */
PD_API pd_layer *pd_scale(pd_net *net, pd_layer *w, pd_layer *x, const pd_layer_opts *opts);
/* y = slope x + intercept, constants. */
PD_API pd_layer *pd_affine(pd_net *net, pd_layer *input, double slope, double intercept, const pd_layer_opts *opts);
/* The largest of each `groups` consecutive channels; Goodfellow et al. 2013. channels / groups remain. */
PD_API pd_layer *pd_maxout(pd_net *net, pd_layer *input, int64_t groups, const pd_layer_opts *opts);
/* Zeros around the image: {channels before, after, rows before, after, columns before, after}. */
PD_API pd_layer *pd_pad(pd_net *net, pd_layer *input, const int64_t pad[6], const pd_layer_opts *opts);
/* Bilinear resize of each map; corners are aligned: source = out_index (in - 1) / (out - 1), and 0 where out is 1: the
   first row or column. */
PD_API pd_layer *pd_resize(pd_net *net, pd_layer *input, int64_t height, int64_t width, const pd_layer_opts *opts);
typedef struct pd_block_expand_opts {
    const char *name;
    pd_act act;
    int64_t stride, stride_h; /* default: the block's sides; stride_h default: stride if given */
    int64_t pad, pad_h;       /* pad_h default: pad. PD_ZERO as pad_h: none */
} pd_block_expand_opts;
/* Each image becomes a sequence of its blocks, left to right, then down; one row of channels*height*width per block. */
PD_API pd_layer *pd_block_expand(pd_net *net, pd_layer *input, int64_t height, int64_t width,
                                 const pd_block_expand_opts *opts);
/* scale a.b / (|a| |b|) per row; b may hold n vectors of a's width: then n numbers per row. 0 where a norm is 0. */
PD_API pd_layer *pd_cosine(pd_net *net, pd_layer *a, pd_layer *b, double scale, const pd_layer_opts *opts);
/* y = a b^T, shape {1, |a|, |b|}. */
PD_API pd_layer *pd_outer(pd_net *net, pd_layer *a, pd_layer *b, const pd_layer_opts *opts);
/* Bilinear: y_k = a W_k b^T + bias_k; weight size x |a| x |b|. */
PD_API pd_layer *pd_bilinear(pd_net *net, pd_layer *a, pd_layer *b, int64_t size, const pd_fc_opts *opts);
/* An activation standing alone. alpha: leaky_relu's slope, >= 0 (default 0.01; PD_ZERO: 0, which is relu), or brelu's
   bound, > 0 (default 24). */
typedef struct pd_activation_opts {
    const char *name;
    double alpha;
} pd_activation_opts;
PD_API pd_layer *pd_activation(pd_net *net, pd_layer *input, pd_act act, const pd_activation_opts *opts);
/* x < 0 ? slope x : x, the slope learned per channel (weight; starts at 0.25); He et al. 2015. */
typedef struct pd_prelu_opts {
    const char *name;
    pd_param_opts weight;
} pd_prelu_opts;
PD_API pd_layer *pd_prelu(pd_net *net, pd_layer *input, const pd_prelu_opts *opts);

typedef struct pd_embedding_opts {
    const char *name;
    pd_act act;
    pd_param_opts weight; /* ids x size; starts normal with deviation 1/sqrt(size) */
} pd_embedding_opts;
/* Row-wise: the row of a table that the id names. Of ids (pd_ids, pd_label) only; sparse inputs go to pd_fc. */
PD_API pd_layer *pd_embedding(pd_net *net, pd_layer *ids, int64_t size, const pd_embedding_opts *opts);

typedef struct pd_gru_opts {
    const char *name;
    bool reverse;                 /* from the last row of each sequence to the first */
    pd_layer *first;              /* h_0: a layer with one row of `size` numbers for each sequence; default: 0 */
    pd_param_opts weight;         /* in x 3 size: update, reset, candidate */
    pd_param_opts recurrent;      /* size x 3 size */
    pd_param_opts bias;           /* 3 size; starts at 0 */
    pd_param_opts recurrent_bias; /* size: b_u below; starts at 0 */
} pd_gru_opts;
/* Gated recurrent units over sequences (Cho et al. 2014, with the reset gate behind the product as in cuDNN):
   z = sigmoid(x W_z + h U_z + b_z); r = sigmoid(x W_r + h U_r + b_r); c = tanh(x W_c + b_c + r (h U_c + b_u));
   h' = (1 - z) c + z h. Every row's h' is put out. Sequences run side by side without padding. */
PD_API pd_layer *pd_gru(pd_net *net, pd_layer *input, int64_t size, const pd_gru_opts *opts);

typedef struct pd_attention_opts {
    const char *name;
    pd_param_opts weight; /* v below, as many numbers as a query has; starts normal with deviation 1/sqrt of that */
} pd_attention_opts;
/* Additive attention (Bahdanau et al. 2015). Each row of `query` looks at the keys of the sequence of its sample:
   e_j = v . tanh(query + keys_j); a = softmax(e); y = sum_j a_j values_j, or 0 where there are no keys. keys and values:
   sequences of the same lengths; query: as wide as the keys, sequences of lengths of their own or one row per sample; y
   has its rows. What is usual, projections in front, is pd_fc's work: query = s W, keys = h U, values = h. */
PD_API pd_layer *pd_attention(pd_net *net, pd_layer *query, pd_layer *keys, pd_layer *values,
                              const pd_attention_opts *opts);
/* After a run, in any mode: the weights a that row `row` of sample `sample`'s queries gave the *count keys of the
   sample, in host memory, the net's until the next run. NULL: there are none, and pd_error says why. */
PD_API const pd_real *pd_attention_weights(pd_layer *attention, int64_t sample, int64_t row, int64_t *count);

/* One row per sequence: its first or last row, or the largest, mean, sum, or sum / sqrt(rows) of each column. An empty
   sequence gives zeros. */
PD_API pd_layer *pd_sequence_pool(pd_net *net, pd_layer *input, pd_pool_method method, const pd_layer_opts *opts);
/* The reverse of pooling: the input's row of each sequence, for every row that the sequence has in `like`. */
PD_API pd_layer *pd_expand(pd_net *net, pd_layer *input, pd_layer *like, const pd_layer_opts *opts);

/* ======================================================================================================== */
/* >>costs.h                                                                                               */

/* A cost is a layer of width 1: the cost of each row. The gradient is that of the SUM over rows; updaters divide it
   by the number of samples. Costs can be added with pd_add and weighed with pd_affine. */
typedef struct pd_cost_opts {
    const char *name;
    pd_layer *weight;            /* sample weights, a layer of width 1 (no gradient flows there); default all 1; 0: the
                                    row has no part in cost and gradient, whatever it holds */
    const double *class_weights; /* cross_entropy: one per class, > 0, copied; default all 1 */
    bool probabilities;          /* cross_entropy: the input holds probabilities although it isn't a softmax layer; of
                                    those below the least normal number the cost, 87 (in double 708), and the slope
                                    are that number's */
    double delta;                /* huber, smooth_l1: where the square ends, > 0; default 1. smooth_l1 with PD_ZERO: the
                                    sum of |d| */
    int64_t top;                 /* lambda_rank: NDCG truncation; default 5 */
} pd_cost_opts;
/* -sum_c w_c t_c log p_c. `label` is a label, or a layer of soft labels t as wide as the input that does not learn. If
   the input's activation is softmax, it is p; else p = softmax(input). Both are computed from what is before the
   softmax, x: the cost is log(sum_j e^x_j) - x_c for label c, exact where p_c is too small for a number, and so is its
   gradient, whoever else reads the softmax. */
PD_API pd_layer *pd_cross_entropy(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts);
/* -sum_j t_j log p_j + (1 - t_j) log(1 - p_j), t_j in [0, 1]. Input with sigmoid activation: it is p; else
   p = sigmoid(input). Both are computed from what is before the sigmoid, as for cross_entropy. */
PD_API pd_layer *pd_binary_cross_entropy(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts);
/* sum_j (x_j - t_j)^2: no factor 1/2, no mean over j. */
PD_API pd_layer *pd_squared_error(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts);
/* sum_j of d^2/2 if |d| <= delta, else delta (|d| - delta/2); d = x_j - t_j. */
PD_API pd_layer *pd_huber(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts);
/* sum_j of d^2/(2 delta) if |d| < delta, else |d| - delta/2. */
PD_API pd_layer *pd_smooth_l1(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts);
/* Two classes, y = 2 label - 1: 0 if y x >= 1; (1 - y x)^2 if >= -1; else -4 y x; Zhang 2004. */
PD_API pd_layer *pd_huber_two_class(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts);
/* Input of width 1: max(0, 1 - y x), y = 2 label - 1. Wider: sum_{j != label} max(0, 1 - x_label + x_j). */
PD_API pd_layer *pd_hinge(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts);
/* RankNet, Burges et al. 2005: o = left - right; log(1 + e^o) - P o; P, width 1, is 1 if left should rank first. */
PD_API pd_layer *pd_rank_cost(pd_net *net, pd_layer *left, pd_layer *right, pd_layer *p, const pd_cost_opts *opts);
/* LambdaRank, Burges 2010: scores and relevances (width 1, sequences: one per query; else the batch is one query).
   Relevances are numbers from 0 to 1000 or a label. The cost of every row is 1 - NDCG@top of its query divided by its
   rows, 0 if none is relevant; the gradient is the lambdas, not the derivative of that cost. */
PD_API pd_layer *pd_lambda_rank(pd_net *net, pd_layer *score, pd_layer *relevance, const pd_cost_opts *opts);
/* The sum of the row. */
PD_API pd_layer *pd_sum_cost(pd_net *net, pd_layer *input, const pd_cost_opts *opts);

/* ======================================================================================================== */
/* >>batches.h                                                                                             */

typedef enum pd_slot_kind { PD_SLOT_DENSE, PD_SLOT_IDS, PD_SLOT_SPARSE } pd_slot_kind;

/* One input's part of a batch. Host memory, grown as needed and kept. */
typedef struct pd_slot {
    pd_slot_kind kind;
    bool sequence;
    int64_t width; /* numbers per row; the number of ids for PD_SLOT_IDS */
    int64_t rows;
    pd_real *data;       /* rows x width, or NULL */
    int64_t *ids;        /* rows, or entries of sparse rows, or NULL */
    int64_t *row_starts; /* rows + 1 entry offsets of sparse rows, else NULL */
    pd_real *values;     /* one per entry of sparse rows, else NULL */
    int64_t *starts;     /* samples + 1 row offsets when `sequence`, else NULL */
    int64_t row_capacity, entry_capacity, value_capacity, start_capacity;
    const char *name; /* of the input layer; owned by the net */
} pd_slot;

struct pd_batch {
    int64_t samples;
    int slot_count;
    pd_slot *slots;
    pd_failure error; /* of the last pd_batch_ call that failed on it */
    bool refused;     /* .. which was about the sample that has not ended */
    pd_net *net;      /* gives the allocator */
};

/* An empty batch with one slot per input of the net; NULL, with the message in the net, when out of memory. */
PD_API pd_batch *pd_batch_new(pd_net *net);
PD_API void pd_batch_free(pd_batch *batch);
PD_API void pd_batch_clear(pd_batch *batch); /* no samples; keeps the memory */
/* Adds a row to a dense slot and returns its `width` numbers, to be filled; NULL (batch->error) on failure. */
PD_API pd_real *pd_batch_add_row(pd_batch *batch, int slot);
/* Adds an id; it must lie in 0 .. width - 1. */
PD_API pd_status pd_batch_add_id(pd_batch *batch, int slot, int64_t id);
/* Adds a sparse row: `count` pairs of a column in 0 .. width - 1 and a finite number (equal columns add up). values
   NULL: all 1. */
PD_API pd_status pd_batch_add_sparse(pd_batch *batch, int slot, const int64_t *columns, const pd_real *values,
                                     int64_t count);
/* Ends a sample, with what the last call that failed since its beginning returned, if one did. Otherwise: every slot
   must have got one row, or any number if it carries sequences; inputs that the run won't
   need may be left out of the whole batch; else PD_E_SHAPE. When it fails, the sample's rows are taken away. */
PD_API pd_status pd_batch_end_sample(pd_batch *batch);
/* Takes away the rows added since the last pd_batch_end_sample. */
PD_API void pd_batch_drop_sample(pd_batch *batch);
/* Appends sample `index` of `from` (same net). */
PD_API pd_status pd_batch_copy_sample(pd_batch *batch, const pd_batch *from, int64_t index);

/* ======================================================================================================== */
/* >>running.h                                                                                             */

typedef enum pd_mode {
    PD_PREDICT, /* dropout off, batch norm by running statistics, no gradients kept */
    PD_TRAIN,
    PD_CHECK /* as PD_TRAIN, but the random numbers and running statistics stand still: for gradient checks */
} pd_mode;

/* Computes the outputs of `targets` and of all they depend on; only the inputs they need must be in the batch. The
   batch must stay as it is until the matching pd_backward. In PD_PREDICT only the targets' outputs stay: layers lend
   each other memory, and a batch norm may be computed by the convolution or fc below it. */
PD_API pd_status pd_forward(pd_net *net, const pd_batch *batch, pd_mode mode, pd_layer *const *targets, int count);
/* After pd_forward of `cost`, as its only target, in PD_TRAIN or PD_CHECK: adds d(sum of cost)/d(parameter) to every
   parameter's grad. Once for each pd_forward; PD_E_STATE otherwise. */
PD_API pd_status pd_backward(pd_net *net, pd_layer *cost);
/* Makes gradients exist (a trainer does it too), sets them to zero. */
PD_API pd_status pd_zero_grads(pd_net *net);
/* Asks for d(cost)/d(input) of a dense input in `input->out.grad` (a trainer has no use for it). */
PD_API pd_status pd_want_gradient(pd_layer *input);

/* A layer's last output, in host memory: rows x width, owned by the net, valid until the next run. NULL on failure, and
   for layers that the last run did not compute, or, in PD_PREDICT, not as a target; if that run failed, its message
   stays. */
PD_API const pd_real *pd_output(pd_layer *layer, int64_t *rows, int64_t *width);
/* Predicts `rows` rows of the net's first input, a plain vector or image, from an array; the other inputs must not be
   needed. For sequences, ids and sparse rows: pd_batch_new, pd_forward, pd_output. */
PD_API const pd_real *pd_predict(pd_layer *output, const pd_real *rows_of_input, int64_t rows);

/* ======================================================================================================== */
/* >>groups.h: recurrent groups: a step written as a graph                                                 */

/* The layers added between pd_group_begin and pd_group_end are one step of a recurrent network, of which the rows of a
   sequence are computed one after the other. This is Elman's network, with 64 units:

   ```c
   pd_group *g = pd_group_begin(net, NULL);
   pd_layer *x = pd_group_input(g, words);
   pd_layer *h = pd_group_memory(g, 64, NULL);
   pd_layer *xh[] = { x, h };
   pd_layer *y = pd_fc_sum(net, xh, 2, 64, &(pd_fc_opts){ .act = PD_TANH });
   pd_group_feed(h, y);
   pd_layer *out = pd_group_end(g, y);
   ```

   Inside, layers read what pd_group_input, pd_group_static and pd_group_memory return, and each other; they must work
   row by row (pd_layer_type.row_inputs). Only what depends on a memory, and has a memory depend on it, really runs step
   by step, all sequences that are still going on in one call; the rest of the group is computed before and after, for
   all rows at once. */
typedef struct pd_group_opts {
    const char *name; /* of the group, in messages; default "group" and a number */
    bool reverse;     /* from the last row of each sequence to the first */
} pd_group_opts;
/* Begins a group, which belongs to the net. One group is open at a time. NULL as for every builder. */
PD_API pd_group *pd_group_begin(pd_net *net, const pd_group_opts *opts);
/* A step of the group reads one row of each sequence of `layer`, which carries sequences, and stands outside. All
   inputs of a group have the same lengths; it has one at least. Returns `layer`. */
PD_API pd_layer *pd_group_input(pd_group *group, pd_layer *layer);
/* Every step reads the same of `layer`, which stands outside: its row for each sequence, or, if it carries sequences,
   as many as the group's inputs, of which layers like pd_attention read one whole. Returns `layer`. */
PD_API pd_layer *pd_group_static(pd_group *group, pd_layer *layer);
/* A vector of `size` numbers that the step before has left. In the first step it is the row that `boot` has for the
   sequence, or, if that is NULL, 0. `boot` stands outside, or depends on statics only. */
PD_API pd_layer *pd_group_memory(pd_group *group, int64_t size, pd_layer *boot);
/* Says what the memory holds in the next step: the output of `layer`, of the same size. */
PD_API pd_status pd_group_feed(pd_layer *memory, pd_layer *layer);
/* Ends the group, and returns pd_group_output of `output`. */
PD_API pd_layer *pd_group_end(pd_group *group, pd_layer *output);
/* After the group's end: a layer of the group for those outside, with the rows of each sequence in their order. */
PD_API pd_layer *pd_group_output(pd_group *group, pd_layer *layer);
/* The group of that name, in a shared net for example; NULL when there is none; no error. */
PD_API pd_group *pd_group_find(pd_net *net, const char *name);

typedef struct pd_generate_opts {
    int64_t begin;    /* the id that stands before the first word */
    int64_t end;      /* the id that ends a sentence; it is not put out */
    int64_t max_rows; /* words of a sentence; default 100 */
} pd_generate_opts;
/* Sentences: that of sample i is ids[starts[i]] .. ids[starts[i + 1] - 1]. Owned by the group, until it generates again. */
typedef struct pd_generated {
    int64_t sequences;
    const int64_t *starts, *ids;
} pd_generated;
/* Lets a group that was trained on sentences go on from its own words: the ids that are its one input are, in each step,
   those with the largest number in `scores`, a layer of the group (or what pd_group_output made of it), in the step
   before (of equals the first). Needs the inputs that the group's statics and boot layers depend on; the ids may be left
   out of the batch. A sentence that has ended leaves, and no other's bits depend on it. */
PD_API pd_status pd_generate(pd_layer *scores, const pd_batch *batch, const pd_generate_opts *opts,
                             pd_generated *result);

/* ======================================================================================================== */
/* >>evaluators.h                                                                                          */

/* Everything an evaluator knows is in its sums, 0 at first, and those of several workers are merged by adding, or by
   `merge`. `update` gets ids in range and no NaN: batches with such values are refused by name. A mean of nothing is
   NaN. */
typedef struct pd_evaluator_type {
    int api_version;
    const char *name;
    int input_count;
    int value_count; /* at most 16 */
    const char *const *value_names;
    pd_status (*setup)(pd_evaluator *evaluator);                                  /* checks shapes, sets sum_count */
    pd_status (*update)(pd_evaluator *evaluator, const pd_tensor *const *inputs); /* host memory; adds to sums */
    void (*values)(const pd_evaluator *evaluator, double *values);                /* from sums, which it may sort */
    void (*merge)(pd_evaluator *evaluator,
                  const double *sums); /* (optional) takes in another's, never its own; default: adds */
} pd_evaluator_type;

typedef struct pd_evaluator_opts {
    const char *name; /* default: its kind and a number */
    pd_layer *weight; /* sample weights, width 1, >= 0; default all 1 */
    int64_t top_k;    /* error: a label among the top_k largest counts as right; default 1 */
    double threshold; /* error, precision_recall on one output: positive if above; default 0.5; PD_ZERO: 0 */
    pd_layer *query;  /* pnpair: ids; only pairs with equal ids count; default: sequences, else the whole batch */
} pd_evaluator_opts;

struct pd_evaluator {
    const pd_evaluator_type *type;
    const char *name;
    pd_net *net;
    pd_layer *inputs[4]; /* output, label, then weight and query where the type takes them; NULL when not given */
    pd_evaluator_opts opts;
    double *sums;
    int64_t sum_count;
    pd_evaluator *next;
};

/* Fraction of rows whose label isn't among the top_k outputs; of equal ones the first counts as larger. Width 1:
   (output > threshold) != label. There, and for auc, the label has two classes or is a number, 1/2 and more being 1. */
PD_API pd_evaluator *pd_eval_error(pd_net *net, pd_layer *output, pd_layer *label, const pd_evaluator_opts *opts);
/* Per class from the arg-max, averaged over the classes that occur as label or as arg-max (macro): precision, recall,
   f1, each 0 where it would be 0/0, and accuracy (micro). Width 1 with threshold: of the positive class. */
PD_API pd_evaluator *pd_eval_precision_recall(pd_net *net, pd_layer *output, pd_layer *label,
                                              const pd_evaluator_opts *opts);
/* Area under the ROC curve of the score of class 1: the last column of the output (width 1 or 2). Ties count half.
   Exact of up to 65,536 different scores; beyond, scores next to each other are taken together, so that each of at
   least 32,768 bins has about the same weight. NaN if one class is missing. */
PD_API pd_evaluator *pd_eval_auc(pd_net *net, pd_layer *output, pd_layer *label, const pd_evaluator_opts *opts);
/* Pairs of one query with different labels: in order, out of order, ties; ratio = in order / out of order, 0 when none
   is out of order. A pair counts the product of its weights. Labels may be numbers. All of a query must be in one
   batch, and takes time quadratic in its rows; with query ids, in those of the batch. */
PD_API pd_evaluator *pd_eval_pnpair(pd_net *net, pd_layer *score, pd_layer *label, const pd_evaluator_opts *opts);
/* Mean absolute and root mean squared difference per number. */
PD_API pd_evaluator *pd_eval_mean_error(pd_net *net, pd_layer *output, pd_layer *target, const pd_evaluator_opts *opts);
/* A user's own. */
PD_API pd_evaluator *pd_evaluator_add(pd_net *net, const pd_evaluator_type *type, pd_layer *output, pd_layer *label,
                                      const pd_evaluator_opts *opts);
PD_API void pd_evaluator_reset(pd_evaluator *evaluator);
/* Takes in another's sums (same type, same number of sums). */
PD_API pd_status pd_evaluator_merge(pd_evaluator *evaluator, const pd_evaluator *other);
/* The k-th value (type->value_names[k]); NaN when k is out of range. */
PD_API double pd_evaluator_value(const pd_evaluator *evaluator, int k);
PD_API pd_evaluator *pd_evaluator_first(pd_net *net); /* then ->next */

/* ======================================================================================================== */
/* >>optimizers.h                                                                                          */

typedef enum pd_optimizer_kind {
    PD_OPT_SGD,
    PD_OPT_MOMENTUM,
    PD_OPT_ADAGRAD,
    PD_OPT_ADADELTA,
    PD_OPT_RMSPROP,
    PD_OPT_DECAYED_ADAGRAD,
    PD_OPT_ADAM,
    PD_OPT_ADAMW,
    PD_OPT_ADAMAX,
    PD_OPT_COUNT
} pd_optimizer_kind;

/* Made by the functions below, which fill in the usual constants; fields may be changed before use.
   g is the mean gradient plus l2 w (AdamW: without l2), r the scheduled learning rate times the parameter's factor,
   t the number of updates. l1 is, for every method, a soft threshold of r l1 after the step. */
typedef struct pd_optimizer {
    pd_optimizer_kind kind;
    double rate;         /* learning rate, > 0 */
    double momentum;     /* MOMENTUM, RMSPROP: 0 <= momentum < 1 */
    bool nesterov;       /* MOMENTUM */
    bool centered;       /* RMSPROP: subtract the squared mean gradient; Graves 2013 */
    double rho;          /* ADADELTA, RMSPROP, DECAYED_ADAGRAD: decay of the averages */
    double beta1, beta2; /* ADAM, ADAMW, ADAMAX */
    double epsilon;
} pd_optimizer;

/* The velocity v of momentum holds steps, each at the rate of its time. That of PyTorch (buf = momentum buf + g; w -=
   r buf) holds gradients, which the rate of the moment multiplies all: there v = momentum (r / r') v - r g, r' being
   the rate of the step before. The same while the rate stands still; v = -r buf converts one to the other. */
PD_API pd_optimizer pd_sgd(double rate);                       /* w -= r g */
PD_API pd_optimizer pd_momentum(double rate, double momentum); /* v = momentum v - r g; w += v (Polyak 1964) */
PD_API pd_optimizer pd_nesterov(double rate, double momentum); /* same v; w += momentum v - r g (Sutskever 2013) */
PD_API pd_optimizer pd_adagrad(double rate);  /* a += g^2; w -= r g/(sqrt a + e); e 1e-10 (Duchi 2011) */
PD_API pd_optimizer pd_adadelta(double rate); /* Zeiler 2012; rho 0.9, e 1e-6; rate 1 is the paper's */
PD_API pd_optimizer pd_rmsprop(double rate);  /* a = rho a + (1-rho) g^2; w -= r g/(sqrt a + e); rho 0.99, e 1e-8 */
PD_API pd_optimizer pd_decayed_adagrad(double rate); /* as rmsprop with sqrt(a + e); rho 0.95, e 1e-6 */
PD_API pd_optimizer pd_adam(double rate);            /* Kingma and Ba 2015; beta 0.9, 0.999, e 1e-8 */
PD_API pd_optimizer pd_adamw(double rate);           /* Adam, with decoupled w -= r l2 w (Loshchilov and Hutter 2019) */
PD_API pd_optimizer pd_adamax(double rate);          /* Kingma and Ba 2015, 7.1 */

/* The learning rate's factor as a function of s, the samples seen. */
typedef enum pd_schedule_kind {
    PD_SCHEDULE_CONSTANT,
    PD_SCHEDULE_POLY,   /* (1 + a s)^-b */
    PD_SCHEDULE_EXP,    /* a^(s / b) */
    PD_SCHEDULE_STEP,   /* a^floor(s / b) */
    PD_SCHEDULE_LINEAR, /* max(1 - a s, b) */
    PD_SCHEDULE_COSINE, /* b + (1 - b) (1 + cos(pi s / a)) / 2 up to s = a, then b */
    PD_SCHEDULE_TABLE   /* factors[i] while s < samples[i]; the last factor ever after */
} pd_schedule_kind;
typedef struct pd_schedule {
    pd_schedule_kind kind;
    double a, b;
    double warm_up;        /* samples over which the factor also rises linearly from 0; default none */
    const double *samples; /* TABLE: `count` rising bounds; not copied, must outlive the trainer */
    const double *factors; /* TABLE */
    int count;
} pd_schedule;
PD_API double pd_schedule_factor(const pd_schedule *schedule, double samples_seen);

/* What one parameter's update needs; the device's `update` turns it into new values. */
typedef struct pd_update {
    pd_optimizer optimizer;
    double rate;  /* scheduled, times the parameter's factor */
    double scale; /* of the summed gradient: 1 / samples, global-norm clipping included */
    double clip;  /* each element of the scaled gradient is held to +-clip; 0 = none */
    double l1, l2;
    int64_t step; /* t, from 1 */
} pd_update;
/* How many arrays of a parameter's size this optimizer keeps (at most PD_MAX_STATES). */
#define PD_MAX_STATES 3
PD_API int pd_optimizer_states(const pd_optimizer *optimizer);

/* ======================================================================================================== */
/* >>device.h                                                                                              */

typedef struct pd_conv_shape {
    int64_t rows, in_c, in_h, in_w, out_c, out_h, out_w; /* of the convolution, not of its transpose */
    int64_t filter_h, filter_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
    bool one_answer; /* the order of sums, and so how it is computed, must not depend on `rows`; see ONE ANSWER */
} pd_conv_shape;

typedef struct pd_pool_shape {
    int64_t rows, channels, in_h, in_w, out_h, out_w;
    int64_t size_h, size_w, stride_h, stride_w, pad_h, pad_w;
    pd_pool_method method;
} pd_pool_shape;

/* What a product or a convolution makes of its sums as it writes them: y = f(scale[c] (sum - center[c]) + bias[c]), c
   the column of the product, the channel of the convolution. NULL: 1, 0 and 0. act: any but PD_SOFTMAX; alpha: as for
   pd_op_activate. */
typedef struct pd_epilogue {
    const pd_real *scale, *center, *bias;
    pd_act act;
    pd_real alpha;
} pd_epilogue;

/* ---- the operations that layers are written in ----
   All numbers are in the device's memory, except where "host memory" is said; ids and offsets are in the host's, and
   may change as soon as the operation returns. "Adds" means += into the result. See ON ADDING AN OPERATION. */

/* y[i] = value */
typedef void pd_op_fill(pd_device *d, int64_t n, pd_real value, pd_real *y);
/* y[i.ys] += alpha a[i.as] b[i.bs] over all indices i of a 4-D box. A stride of 0 repeats in a and b, sums in y.
   b may be NULL: 1. Copies, slices, transposes, broadcasts, row and column sums are all this. */
typedef void pd_op_contract(pd_device *d, const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                            const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]);
/* The root of the sum of x[i]^2, in double. Not finite if and only if some x[i] isn't. */
typedef double pd_op_norm(pd_device *d, int64_t n, const pd_real *x);
/* One optimizer step on n numbers; see pd_update. mask (host memory, may be NULL): 0 = hold at zero. */
typedef void pd_op_update(pd_device *d, const pd_update *u, int64_t n, pd_real *w, const pd_real *g,
                          const unsigned char *mask, pd_real *const *states);
/* Steps on rows of a table: row rows[i] of w goes with row state_rows[i] of the state and row i of g (count x
   width). First, where carry is not NULL, the steps without a gradient since the row was last touched are made up
   for with the four numbers from carry[4 i] on: (w, state) = (c0 w + c1 state, c2 w + c3 state). Then, where g is
   not NULL, one step as `update` makes it. SGD (state NULL) and MOMENTUM only. No row comes twice. Host memory:
   rows, state_rows, carry. */
typedef void pd_op_update_rows(pd_device *d, const pd_update *u, int64_t count, int64_t width, const int64_t *rows,
                               const int64_t *state_rows, const double *carry, pd_real *w, const pd_real *g,
                               pd_real *state);
/* Copies rows of a table as update_rows would leave them without g, to the bit, and changes neither table nor state:
   row i of y (count x width) = c0 w + c1 state, of row rows[i] of w and row state_rows[i] of the state (NULL: 0).
   carry NULL: row rows[i] as it is. Rows may come twice. Host memory: rows, state_rows, carry. */
typedef void pd_op_gather_rows(pd_device *d, int64_t count, int64_t width, const int64_t *rows,
                               const int64_t *state_rows, const double *carry, const pd_real *w, const pd_real *state,
                               pd_real *y);
/* y = f(x) for rows x width numbers; x may be y. alpha: leaky_relu's slope or brelu's bound, both > 0. */
typedef void pd_op_activate(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width, const pd_real *x,
                            pd_real *y);
/* grad *= f'(x), in place; y is the output, x the input where the activation needs it. */
typedef void pd_op_activate_backward(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width,
                                     const pd_real *x, const pd_real *y, pd_real *grad);

/* C = alpha op(A) op(B) + beta C, row-major: op(A) m x k, op(B) k x n, C m x n. beta 0: C is not read. after: what
   then is made of C; may be NULL. */
typedef void pd_op_gemm(pd_device *d, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
                        pd_real alpha, const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta,
                        pd_real *c, int64_t ldc, const pd_epilogue *after);
/* w: out_c x in_c/groups x filter_h x filter_w. y = x * w + beta y; beta and after as for gemm. The gradients add. */
typedef void pd_op_conv(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *w, pd_real beta,
                        pd_real *y, const pd_epilogue *after);
typedef void pd_op_conv_backward_data(pd_device *d, const pd_conv_shape *s, const pd_real *w, const pd_real *dy,
                                      pd_real *dx);
typedef void pd_op_conv_backward_filter(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *dy,
                                        pd_real *dw);
typedef void pd_op_pool(pd_device *d, const pd_pool_shape *s, const pd_real *x, pd_real *y);
/* Adds; a maximum's gradient goes to its first occurrence. */
typedef void pd_op_pool_backward(pd_device *d, const pd_pool_shape *s, const pd_real *x, const pd_real *y,
                                 const pd_real *dy, pd_real *dx);
/* cost[r] = -v_r sum_c w_c t_c log p_c, t from ids or soft (the other NULL); the weights v of rows and w of classes may
   be NULL; v_r 0: 0. p = softmax(x), and x tells what p is too small for; x NULL: only p is known, and what is below
   the least normal number counts as that. */
typedef void pd_op_cross_entropy(pd_device *d, int64_t rows, int64_t width, const pd_real *x, const pd_real *p,
                                 const int64_t *ids, const pd_real *soft, const pd_real *row_weights,
                                 const pd_real *class_weights, pd_real *cost);
/* Adds dcost[r] times the derivative of cost[r] / v_r by p, or, if `by_x`, by the x in p = softmax(x). dcost[r] 0:
   nothing. */
typedef void pd_op_cross_entropy_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *p,
                                          const int64_t *ids, const pd_real *soft, const pd_real *class_weights,
                                          const pd_real *dcost, bool by_x, pd_real *dx);
/* y[i] += x[i] / (1 - p), or, with probability p, 0, by pd_random's bits of key and i, so that backward needs no
   mask. */
typedef void pd_op_dropout(pd_device *d, int64_t n, uint64_t key, double p, const pd_real *x, pd_real *y);
/* Of each channel over rows and `area` positions: moments (3 x channels) are the mean, the rest that rounding took from
   it, and the (biased) variance. Without the rest, a mean that is 10^4 deviations is off by a thousandth of one. */
typedef void pd_op_channel_moments(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                   pd_real *moments);
/* y = (x - mean - rest) / sqrt(variance + epsilon) * weight + bias; rest, weight and bias may be NULL: 0, 1 and 0. x
   may be y. */
typedef void pd_op_batch_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                              const pd_real *mean, const pd_real *rest, const pd_real *variance, double epsilon,
                              const pd_real *weight, const pd_real *bias, pd_real *y);
/* Adds to dx, dweight, dbias (each may be NULL). batch_moments: mean and variance depend on x. */
typedef void pd_op_batch_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                       const pd_real *mean, const pd_real *rest, const pd_real *variance,
                                       double epsilon, bool batch_moments, const pd_real *weight, const pd_real *dy,
                                       pd_real *dx, pd_real *dweight, pd_real *dbias);
/* moments: rows x 3, the mean, the rest that rounding took from it, and 1 / deviation. */
typedef void pd_op_layer_norm(pd_device *d, int64_t rows, int64_t width, const pd_real *x, double epsilon,
                              const pd_real *weight, const pd_real *bias, pd_real *moments, pd_real *y);
typedef void pd_op_layer_norm_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *x,
                                       const pd_real *moments, const pd_real *weight, const pd_real *dy, pd_real *dx,
                                       pd_real *dweight, pd_real *dbias);
/* The same over the channels and `area` positions of each group of a row; weight and bias: one per channel. moments:
   rows x groups x 3. */
typedef void pd_op_group_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                              const pd_real *x, double epsilon, const pd_real *weight, const pd_real *bias,
                              pd_real *moments, pd_real *y);
typedef void pd_op_group_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                       const pd_real *x, const pd_real *moments, const pd_real *weight,
                                       const pd_real *dy, pd_real *dx, pd_real *dweight, pd_real *dbias);
/* scales: as large as x, receives k + alpha/size sum x^2 */
typedef void pd_op_response_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size, double alpha,
                                 double beta, double k, const pd_real *x, pd_real *scales, pd_real *y);
typedef void pd_op_response_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                          double alpha, double beta, const pd_real *x, const pd_real *scales,
                                          const pd_real *dy, pd_real *dx);
/* y (s.rows x width) += S x: row r of y gets the sum of values[k] times row columns[k] of x. Look-ups, their
   gradients (with the transposed S), permutations of rows and sums over sequences are all this. */
typedef void pd_op_sparse_product(pd_device *d, const pd_csr *s, int64_t width, const pd_real *x, pd_real *y);
/* One step of GRUs. gates: rows x 3 width, in: x W + b, out: z, r, c. recurrent: rows x 3 width, h U with b_u in
   its last third. before: rows x width, h (NULL: 0). after: h'. See pd_gru. */
typedef void pd_op_gru(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *recurrent,
                       const pd_real *before, pd_real *after);
/* From dafter, the gradient of h': gates and recurrent, as `gru` left them, become their own gradients (of x W + b
   and of h U + b_u); adds the part that goes straight to dbefore (NULL: not wanted). */
typedef void pd_op_gru_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, pd_real *recurrent,
                                const pd_real *before, const pd_real *dafter, pd_real *dbefore);
/* Queries, and the keys that each looks at. */
typedef struct pd_attention_shape {
    int64_t rows, width, value_width; /* of queries; numbers of a query, as of a key; of a value */
    const int64_t *spans; /* three for each row: its first key, the one behind its last, and its first weight. Host
                             memory. */
} pd_attention_shape;
/* Of each row: weights = softmax over its keys j of v . tanh(query + keys_j), y = sum_j weights_j values_j. */
typedef void pd_op_attention(pd_device *d, const pd_attention_shape *s, const pd_real *query, const pd_real *keys,
                             const pd_real *values, const pd_real *v, pd_real *weights, pd_real *y);
/* Adds to dquery, dkeys, dvalues (each may be NULL). dv (rows x width, may be NULL): receives what each row adds to the
   gradient of v. Rows that look at the same keys follow each other, or dkeys and dvalues are NULL. */
typedef void pd_op_attention_backward(pd_device *d, const pd_attention_shape *s, const pd_real *query,
                                      const pd_real *keys, const pd_real *values, const pd_real *v,
                                      const pd_real *weights, const pd_real *dy, pd_real *dquery, pd_real *dkeys,
                                      pd_real *dvalues, pd_real *dv);

/* All of them. The basic ones are those that nets and trainers call as well: a device without host memory has
   them; of the others a device may lack any. */
/* clang-format off */
#define PD_BASIC_OPERATIONS(X) \
    X(fill) X(contract) X(norm) X(update) X(update_rows) X(gather_rows) X(activate) X(activate_backward)
#define PD_OPERATIONS(X) PD_BASIC_OPERATIONS(X) \
    X(gemm) X(conv) X(conv_backward_data) X(conv_backward_filter) X(pool) X(pool_backward) \
    X(cross_entropy) X(cross_entropy_backward) X(dropout) X(channel_moments) X(batch_norm) X(batch_norm_backward) \
    X(layer_norm) X(layer_norm_backward) X(group_norm) X(group_norm_backward) X(response_norm) X(response_norm_backward) X(sparse_product) \
    X(gru) X(gru_backward) X(attention) X(attention_backward)
/* clang-format on */

/* PD_OP(conv) is the bit of `conv`, for pd_layer_type.needs. */
#define PD__OPERATION_INDEX(name) PD__OP_##name,
enum { PD_OPERATIONS(PD__OPERATION_INDEX) PD_OPERATION_COUNT };
#define PD_OP(name) ((uint64_t)1 << PD__OP_##name)

/* Where a net lives and computes. Operations may run later, if there is no host memory, but in order; a failure is kept
   and told by `wait`. With host memory every member may be missing but the first four: the CPU does what the
   device doesn't, on the same numbers. A net works with a copy of the table then. */
struct pd_device {
    int api_version; /* PD_API_VERSION */
    const char *name;
    void *self;
    bool host_memory; /* the host can read and write this memory directly */
    void *cpu;        /* the net's: does what the device lacks */

    void *(*alloc)(pd_device *d, size_t size); /* aligned to 64 bytes; NULL when out of memory */
    void (*free)(pd_device *d, void *memory);
    void (*upload)(pd_device *d, void *to, const void *from_host, size_t size);
    void (*download)(pd_device *d, void *to_host, const void *from, size_t size); /* has arrived on return */
    pd_status (*wait)(pd_device *d, char *message, size_t size); /* all done, or the first failure since */
    /* (optional) Will it run this layer, which has inputs? Asked once, when the layer's shape and parameters are
       settled. A layer that is refused runs on the CPU. */
    bool (*accepts)(pd_device *d, const pd_layer *layer);
    /* (optional) The numbers at w will stay as they are (or, not `frozen`, no longer), so other forms of them that
       products read may be kept. */
    void (*freeze)(pd_device *d, const pd_real *w, bool frozen);

    /* The operations that it has; NULL: it has not got this one. */
#define PD__OPERATION_MEMBER(name) pd_op_##name *name;
    PD_OPERATIONS(PD__OPERATION_MEMBER)
};

/* Makes *memory, which is the device's or NULL, hold at least `count` numbers; its contents are lost when it grows.
   False when out of memory: then nothing has changed. */
PD_API bool pd_device_grow(pd_device *d, pd_real **memory, int64_t *capacity, int64_t count);
/* For a device with host memory: makes of the finished sums c (rows x columns, ldc apart) what `after` says. */
PD_API void pd_epilogue_apply(pd_device *d, const pd_epilogue *after, int64_t rows, int64_t columns, pd_real *c,
                              int64_t ldc);

/* 64 random bits from a key and a counter (SplitMix64's finaliser); the same on every device and for any threads. */
PD_API uint64_t pd_random(uint64_t key, uint64_t counter);

/* Seconds of a clock that never goes back, from some moment in the past. */
PD_API double pd_seconds(void);

/* ======================================================================================================== */
/* >>layer_types.h                                                                                         */

/* What a layer is. Every layer above is written on this; see WRITING A LAYER. */
struct pd_layer_type {
    int api_version; /* PD_API_VERSION */
    const char *name;
    int min_inputs, max_inputs; /* max_inputs -1: any number */
    size_t opts_size;           /* of the options struct; the layer gets its own copy */
    size_t state_size;          /* of the layer's own state, zeroed before setup */
    uint64_t needs;             /* the operations it is written in, PD_OP(gemm) | PD_OP(fill); 0: it touches the numbers
                                   itself. Where the net's device has no host memory, a layer that touches numbers, or
                                   needs what the device hasn't, runs on the CPU: what it reads and writes is carried
                                   there and back */
    /* Checks inputs and options, sets layer->shape (and act), declares parameters with pd_layer_param. */
    pd_status (*setup)(pd_layer *layer);
    /* (optional) Sets layer->out.rows and the sequence offsets for this batch. Default: those of the inputs, which the
       net then checks to be the same. */
    pd_status (*resize)(pd_layer *layer);
    /* Fills layer->out.data from the inputs' out.data. */
    pd_status (*forward)(pd_layer *layer);
    /* (optional: then no gradient passes) Adds to the inputs' out.grad and the parameters' grad, where not NULL,
       from layer->out.grad, which has already been taken through the activation. The rows are those of the tensors. */
    pd_status (*backward)(pd_layer *layer);
    /* (optional) Frees what setup took other than through pd_layer_ functions. */
    void (*teardown)(pd_layer *layer);
    /* (optional) Before the batch's first forward, in every mode: names the rows of the layer's sparse parameters that
       it will read or give gradients to, with pd_param_touch, and keeps their places: forward reads row_values by
       place, backward adds to grad by place. Only inputs of the net have been filled by then. A type without prefetch
       has no sparse parameters. */
    pd_status (*prefetch)(pd_layer *layer);
    /* (optional) When predicting, this layer with its one input is y = scale[c] (x - center[c]) + shift[c] of every
       channel, which the layer below may do as it writes its output. Fills all three (device memory). */
    pd_status (*fold)(pd_layer *layer, pd_real *scale, pd_real *center, pd_real *shift);
    /* How many inputs, from the first on, it reads row by row: a row of the output, and of these inputs' gradients,
       depends on the same rows alone, and what forward leaves for backward is in row memory. -1: all. Such layers may
       stand in a recurrent group; the inputs behind these are read whole. There each step is a call for some of the
       rows; and in backward the parameters' gradients may come last, in a call about all rows. */
    int row_inputs;
};

/* A layer in a net. Layer types read it; only setup and resize write, where noted. */
struct pd_layer {
    const pd_layer_type *type;
    const char *name;
    pd_net *net;
    pd_device *device; /* what its operations run on: the net's, or the CPU; after setup */
    pd_layer **inputs;
    int input_count;
    pd_param **params; /* in the order of pd_layer_param */
    int param_count;
    void *opts; /* the layer's copy */
    void *state;
    pd_shape shape;   /* of one row of the output; set by setup */
    pd_act act;       /* applied by the net after forward; set by setup */
    double act_alpha; /* set by setup, as in pd_activation_opts; then the number itself */
    bool is_ids;      /* the output is ids, not numbers */
    bool is_sparse;   /* the output is sparse rows, not numbers; is_ids too is set then */
    bool is_sequence; /* rows come in sequences; default: if the inputs' do. Setup may change it. */
    bool wants_grad;  /* something below it learns */
    pd_tensor out;
    struct pd__layer *own; /* the net's */
};

/* For forward, by layers whose output is written by gemm or conv: what they are to give the last one. That is the
   layer's `bias` (one per channel, may be NULL), its activation, and, when predicting, a layer that folds into it. A
   layer that asks for it has to apply it. */
PD_API pd_status pd_layer_epilogue(pd_layer *layer, const pd_real *bias, pd_epilogue *after);

/* Adds a layer; `name` NULL: type->name and a number. opts: opts_size bytes, NULL: all zero. As for every builder. */
PD_API pd_layer *pd_layer_add(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                              int count, const void *opts);
/* For setup: a parameter "LAYER.suffix" of these dims, in layer->params; NULL when it can't be made. fan_in and
   fan_out give the scale of initialisations; `init` replaces PD_INIT_DEFAULT; opts may be NULL. */
PD_API pd_param *pd_layer_param(pd_layer *layer, const char *suffix, int dim_count, const int64_t *dims, int64_t fan_in,
                                int64_t fan_out, pd_init init, const pd_param_opts *opts);
/* For setup: statistics that are saved with the parameters but not learned. */
PD_API pd_param *pd_layer_buffer(pd_layer *layer, const char *suffix, int64_t size, double value);
/* Device memory of the layer's own that lasts until the net is freed, but not for setup: `per_row` numbers for each of
   out.rows rows, those of row r from r * per_row on. What forward leaves there, backward finds by asking for the same
   again; between calls keep neither the pointer nor the number of rows, and read rows from tensors, since a call may be
   about some of the rows that forward saw. slot 0 .. 7, each for one use and one per_row. NULL (message set) when out
   of memory. Contents are lost when it grows. This divides each row by its length:

   ```c
   static pd_status length_forward(pd_layer *l) {
       const pd_real *x = l->inputs[0]->out.data;
       pd_real *y = l->out.data, *length = pd_layer_row_memory(l, 0, 1);
       if (!length) return PD_E_MEMORY;
       for (int64_t r = 0; r < l->out.rows; r++, x += l->out.width, y += l->out.width) {
           double sum = 0;
           for (int64_t i = 0; i < l->out.width; i++) sum += (double)x[i] * (double)x[i];
           length[r] = (pd_real)sqrt(sum);
           for (int64_t i = 0; i < l->out.width; i++) y[i] = x[i] / length[r];
       }
       return PD_OK;
   }
   ``` */
PD_API pd_real *pd_layer_row_memory(pd_layer *layer, int slot, int64_t per_row);
/* The same for what does not go by rows: `count` numbers, from the same slots. */
PD_API pd_real *pd_layer_memory(pd_layer *layer, int slot, int64_t count);
/* The same in host memory, for offsets: `count` int64_t; slot 0 .. 3. */
PD_API int64_t *pd_layer_integers(pd_layer *layer, int slot, int64_t count);
/* The same in host memory, for sums of layers on the host: `count` doubles; slot 0 .. 3. */
PD_API double *pd_layer_doubles(pd_layer *layer, int slot, int64_t count);
/* The same in host memory, for the values of a pd_csr. */
PD_API pd_real *pd_layer_values(pd_layer *layer, int64_t count);
/* For prefetch: the batch needs these rows (host memory; repeats are fine) of a sparse parameter. places (may be NULL)
   gets the place of each in param->rows, and so in param->row_values and param->grad. Of other parameters: the rows. */
PD_API pd_status pd_param_touch(pd_param *param, const int64_t *rows, int64_t count, int64_t *places);
/* The place of a row that was touched; -1 if it was not. */
PD_API int64_t pd_param_place(const pd_param *param, int64_t row);
/* A copy of `size` bytes that is freed with the layer; for options that point to arrays. */
PD_API void *pd_layer_copy(pd_layer *layer, const void *bytes, size_t size);
/* Fails with a message that begins with the layer's name. Returns `status`. */
PD_API pd_status pd_layer_fail(pd_layer *layer, pd_status status, const char *format, ...) PD_PRINTF(3, 4);
/* "16x5x5" or "10", in a buffer of the net's that the next four calls do not reuse. */
PD_API const char *pd_shape_text(pd_layer *layer, pd_shape shape);
PD_API pd_mode pd_layer_mode(const pd_layer *layer); /* of the run in progress */
/* A key for pd_random: other for every layer, seed and training step. */
PD_API uint64_t pd_layer_key(const pd_layer *layer);
static inline int64_t pd_shape_size(pd_shape s) { return s.channels * s.height * s.width; }

/* ======================================================================================================== */
/* >>updater.h                                                                                             */

/* What happens with gradients: the seam that parameter servers and rings plug into. Called from the one thread that
   trains, in this order: start, then per batch begin_batch, param_needed (before the first layer that reads it, in
   forward), poll (between layers), grad_final (in backward, as soon as the last layer sharing it has added its part;
   the updater may start at once), end_batch; sync before anything reads parameters outside training; stop. */
struct pd_updater {
    int api_version; /* PD_API_VERSION */
    const char *name;
    void *self;
    /* All parameters have their first values. */
    pd_status (*start)(pd_updater *u, pd_trainer *trainer);
    /* The rows that the batch needs of each sparse parameter are in its `rows`; of those that are trained the updater
       puts what they are now, after all steps so far, into row_values. samples may be 0: see end_batch. */
    pd_status (*begin_batch)(pd_updater *u, int64_t samples);
    pd_status (*param_needed)(pd_updater *u, pd_param *param); /* (optional) value (row_values) must be there then */
    pd_status (*grad_final)(pd_updater *u, pd_param *param);
    pd_status (*poll)(pd_updater *u); /* (optional) */
    /* This worker's steps have all been made when it returns; values may come later, until param_needed. *samples,
       those of this worker's batch, becomes those of all workers' batches. A worker whose reader has ended
       goes on with empty batches until that sum is 0, when the pass is over for all; nothing is learned from that. */
    pd_status (*end_batch)(pd_updater *u, int64_t *samples);
    /* (optional) Every value current here, but for rows of this shard, which are read by pd_trainer_read_rows; all
       workers call it. */
    pd_status (*sync)(pd_updater *u);
    /* (optional) Adds up `count` numbers over all workers; all call it. NULL: there is only one worker. */
    pd_status (*all_reduce)(pd_updater *u, double *sums, int64_t count);
    void (*stop)(pd_updater *u); /* (optional) */
};
/* For updaters, in start: this trainer keeps optimizer state for, and steps on, shard `rank` of `ranks` only. */
PD_API pd_status pd_trainer_shard(pd_trainer *trainer, int rank, int ranks);
/* Who has what: a dense parameter is cut into `ranks` runs of numbers, here is the one of `rank`; of a sparse one, row
   r belongs to rank r % ranks (and this gives nothing). */
PD_API void pd_param_shard(const pd_param *param, int rank, int ranks, int64_t *first, int64_t *count);
/* For updaters: one optimizer step on this trainer's shard of the parameter from its grad, summed over `samples`
   samples; then zeroes all of grad. `clip_scale` is 1 or the factor of global-norm clipping. PD_E_NUMERIC, and no step,
   if grad isn't finite. Sparse parameters: on the touched rows (which must all be in the shard). */
PD_API pd_status pd_trainer_apply(pd_trainer *trainer, pd_param *param, int64_t samples, double clip_scale);
/* The same for a sparse parameter, from other rows than those of this worker's batch: `count` rows of the shard, each
   once, and their summed gradients (count x dims[1], device memory, left as they are). To be called once in every
   batch, also without rows: it is what tells the other rows that a step has passed. */
PD_API pd_status pd_trainer_apply_rows(pd_trainer *trainer, pd_param *param, int64_t count, const int64_t *rows,
                                       const pd_real *grad, int64_t samples, double clip_scale);
/* For updaters: rows of a sparse parameter (host memory; repeats are fine), as they are after all steps so far, to `to`
   (count x dims[1], device memory). What is stored does not change. Of the shard; others come as they are stored
   here. */
PD_API pd_status pd_trainer_read_rows(pd_trainer *trainer, pd_param *param, int64_t count, const int64_t *rows,
                                      pd_real *to);
/* For updaters: the trained parameters, in order of creation; NULL past the end. */
PD_API pd_param *pd_trainer_param(const pd_trainer *trainer, int index);
/* For updaters: the place of a parameter in that order; -1 when this trainer does not train it. */
PD_API int pd_trainer_index(const pd_trainer *trainer, const pd_param *param);
/* For updaters: the factor of global-norm clipping from the squared norm of the whole summed gradient. */
PD_API double pd_trainer_clip_scale(const pd_trainer *trainer, double norm, int64_t samples);
/* For updaters: does the trainer clip by global norm, so that no step may be taken before every gradient is final? */
PD_API bool pd_trainer_clips_norm(const pd_trainer *trainer);
/* Fails with a message kept by the trainer's net. Returns `status`. */
PD_API pd_status pd_trainer_fail(pd_trainer *trainer, pd_status status, const char *format, ...) PD_PRINTF(3, 4);
PD_API pd_net *pd_trainer_net(pd_trainer *trainer);

/* ======================================================================================================== */
/* >>readers.h                                                                                             */

/* Where samples come from. Everything random in a reader depends on the seed and the number of the pass only. */
struct pd_reader {
    int api_version; /* PD_API_VERSION */
    const char *name;
    void *self;
    pd_failure error; /* what `next` or `reset` failed with: file, line or offset, what was expected, what came */
    /* Appends up to `count` samples. PD_OK: `count` were added. PD_END: the pass is over, perhaps after some. On any
       other status the batch holds the samples before the bad one, and the next call goes on behind it. */
    pd_status (*next)(pd_reader *r, pd_batch *batch, int64_t count);
    pd_status (*reset)(pd_reader *r, int64_t pass); /* back to the first sample, for pass 0, 1, .. */
    /* (optional) From the first sample again, only samples i with i % count == rank, of those there were before. */
    pd_status (*shard)(pd_reader *r, int rank, int count);
    pd_status (*skip)(pd_reader *r, int64_t samples); /* (optional) passes over samples; else they are read */
    int64_t (*size)(pd_reader *r);                    /* (optional) samples per pass, -1 when unknown */
    void (*free)(pd_reader *r);                       /* frees the reader itself too */
};

/* All constructors return NULL, with the message in the net, when something is wrong; trainers take such a NULL and
   report it, as pd_train does when it has no test reader and some reader has failed since the last pd_clear_error. Free
   with pd_reader_free, before the net. Paths: a file; "-" for stdin (CSV, LibSVM, text); or "@list", a text
   file with one path per line. Files are read piece by piece and may be larger than memory.
   Ids and labels, and LibSVM's indices and queries, are whole numbers and are read as such, never rounded: of up to 64
   bits, also when written as 3.0 or 1e3, or stored as a float that is whole. Others are an error. */
typedef struct pd_reader_opts {
    const char *order;    /* CSV: names of inputs in the order of their columns, "-" for a column to leave out,
                             e.g. "label,-,pixels"; default: the order of the net's inputs */
    char delimiter;       /* CSV: default ',' */
    int64_t skip_lines;   /* CSV, text: lines at the top of each file to leave out */
    int64_t columns;      /* text: of every line; default: the last one that a field reads */
    double scale, shift;  /* numbers of every dense input become x * scale + shift; scale default 1 */
    int64_t first, count; /* only samples first .. first + count - 1 of the pass; count default: to the end; PD_ZERO:
                             none */
    int fold, folds; /* cross-validation: only samples with i % folds == fold; folds 0: all. Lines of the others are
                             counted, but not read: what is wrong in them is seen by who reads those folds */
    bool not_fold;   /* .. or those not in the fold */
} pd_reader_opts;

/* One array per input: samples x width numbers, or ids; sequences: `starts` has samples + 1 row offsets. Not copied. */
typedef struct pd_array {
    const pd_real *data;
    const int64_t *ids;
    const int64_t *starts;
    const int64_t *row_starts; /* sparse: rows + 1 offsets into ids (columns) and values */
    const pd_real *values;     /* sparse: one per entry; NULL: all 1 */
} pd_array;
PD_API pd_reader *pd_array_reader(pd_net *net, int64_t samples, const pd_array *arrays, int count);
/* Numbers, one sample per line; every input takes its width in columns, an id one. Numbers have a decimal point,
   whatever the locale, and may stand in quotes. Blank lines don't count. */
PD_API pd_reader *pd_csv_reader(pd_net *net, const char *path, const pd_reader_opts *opts);
/* One IDX file (the format of MNIST) per input, in order; big-endian, any element type. */
PD_API pd_reader *pd_idx_reader(pd_net *net, const char *const *paths, int count, const pd_reader_opts *opts);
/* "label index:value .. # comment", indices from 1 (which is column 0) and rising; the net's inputs are a vector
   (pd_vector or pd_sparse_vector) and a label, or a vector of width 1 for regression. Of two classes, -1 is read as 0.
   With "label qid:n index:value .." and inputs that carry sequences, lines of one query (they stand together) are one
   sample. */
PD_API pd_reader *pd_libsvm_reader(pd_net *net, const char *path, const pd_reader_opts *opts);
/* One NumPy .npy file (version 1 to 3, C order; float, integer or bool of any size) per input, first axis = samples. */
PD_API pd_reader *pd_npy_reader(pd_net *net, const char *const *paths, int count, const pd_reader_opts *opts);
/* From functions of yours. `next` adds one sample with the pd_batch_ functions, without pd_batch_end_sample, and
   returns PD_OK; or PD_END, which ends the pass: without one pd_train goes on until on_event stops it. `reset` goes
   back to the first sample of pass 0, 1, .. and returns PD_OK, or what ends the training: it is called before that
   sample is read, perhaps more than once. NULL for what can't go back,
   such as a socket: each pass goes on where the last one ended, and so does a training continued within a pass, which
   otherwise passes over the samples that it has seen. Sharded, `next` is called for all samples, and the reader keeps
   its share. Under pd_prefetch a thread calls `next`, and none while `reset` runs. */
PD_API pd_reader *pd_stream_reader(pd_net *net, pd_status (*next)(void *user, pd_batch *batch),
                                   pd_status (*reset)(void *user, int64_t pass), void *user);

/* The following own `reader` and free it; a NULL reader gives NULL. */
/* Shuffles with bounded memory: keeps `pool` samples and hands out a random one. pool >= all: a full shuffle. */
PD_API pd_reader *pd_shuffle(pd_net *net, pd_reader *reader, int64_t pool, uint64_t seed);
/* Reads ahead in a thread, up to `depth` batches (>= 1; samples, where pd_train has batch_tokens). Without threads on
   the platform: reads when asked. Resetting and freeing wait for the read in progress, which may be for ever when it
   waits for stdin. */
PD_API pd_reader *pd_prefetch(pd_net *net, pd_reader *reader, int depth);

PD_API void pd_reader_free(pd_reader *reader); /* NULL is fine */
PD_API pd_status pd_reader_shard(pd_reader *reader, int rank, int count);
/* For readers: keeps the message in reader->error. Returns `status`. */
PD_API pd_status pd_reader_fail(pd_reader *reader, pd_status status, const char *format, ...) PD_PRINTF(3, 4);

/* ======================================================================================================== */
/* >>text.h                                                                                                */

/* The words that a program knows, each with an id from 0. It stays as it was made, so that several threads can read it.
   Constructors that fail return NULL and leave the net as a builder does that fails, since the vocabulary's size builds
   it. Free with pd_vocab_free, after the readers that use it and before the net. */
typedef struct pd_vocab_opts {
    bool characters;   /* each character (code point) is a word, blanks too, but not tabs and ends of lines; default:
                          words stand between white space */
    int column;        /* count the words of this column only, from 1, of lines in which tabs stand between columns;
                          default: of all */
    int64_t min_count; /* words that occur less often are left out; default 1 */
    int64_t max_size;  /* most ids, those of special words included; default: no limit */
    const char *unknown, *begin, *end; /* the special words; default "<unk>", "<s>" and "</s>"; "": there is none */
} pd_vocab_opts;
/* From files of text in UTF-8; paths as for readers. The special words come first, in the order above, then the others
   by falling count, and where counts are equal by their bytes. A word spelled like a special one is that one. */
PD_API pd_vocab *pd_vocab_build(pd_net *net, const char *path, const pd_vocab_opts *opts);
/* From a text with one word per line, the first with id 0, as pd_vocab_text gives it. Special words are the lines of
   these names, where there are such. The options that choose words are refused. */
PD_API pd_vocab *pd_vocab_parse(pd_net *net, const char *text, const pd_vocab_opts *opts);
PD_API void pd_vocab_free(pd_vocab *vocab); /* NULL is fine */

/* All words, one per line; for pd_net_set_text. Of the vocabulary, as long as it lives; NULL of NULL. */
PD_API const char *pd_vocab_text(const pd_vocab *vocab);
PD_API int64_t pd_vocab_size(const pd_vocab *vocab);                 /* number of ids; 0 of NULL */
PD_API int64_t pd_vocab_id(const pd_vocab *vocab, const char *word); /* pd_vocab_unknown if it isn't there */
PD_API const char *pd_vocab_word(const pd_vocab *vocab, int64_t id); /* NULL if there is no such id */
PD_API int64_t pd_vocab_unknown(const pd_vocab *vocab);              /* ids of the special words; -1: there is none */
PD_API int64_t pd_vocab_begin(const pd_vocab *vocab);
PD_API int64_t pd_vocab_end(const pd_vocab *vocab);
/* Adds the ids of a text's words to a slot, as pd_batch_add_id does one. */
PD_API pd_status pd_batch_add_text(pd_batch *batch, int slot, const pd_vocab *vocab, const char *text);

/* What an input gets of each line. */
typedef struct pd_text_field {
    const pd_vocab *vocab; /* not owned; NULL: the column holds ids, white space between them */
    int column;            /* from 1; default: the input's place among the inputs, from 1 */
    bool begin, end;       /* adds the vocabulary's begin in front of the words, or its end behind them */
} pd_text_field;
/* Text in UTF-8, one sample per line, with tabs between its columns, no quotes. There is a field for each input of the
   net (ids; a single one, or sequences), in their order; several may read the same column. A column may be empty for
   sequences. Blank lines don't count. */
PD_API pd_reader *pd_text_reader(pd_net *net, const char *path, const pd_text_field *fields, int count,
                                 const pd_reader_opts *opts);

/* ======================================================================================================== */
/* >>trainer.h                                                                                             */

typedef struct pd_trainer_opts {
    double l1, l2;         /* of every parameter without its own; biases included */
    pd_schedule schedule;  /* of the learning rate; default constant */
    double clip_value;     /* bound on each element of the mean gradient; default none */
    double clip_norm;      /* bound on the norm of the whole mean gradient; default none */
    bool sum_gradients;    /* add over the batch instead of averaging, as the 2016 platform did */
    double average_window; /* model averaging: fraction of all updates to average over, 0 < w <= 1; default none.
                              Statistics (batch norm's) are averaged with the parameters */
    int64_t average_max;   /* .. but at most so many updates; default no limit */
    pd_updater *updater;   /* default: local. Not owned. */
} pd_trainer_opts;
/* For updaters: what the trainer was made with. Both last as long as it does. */
PD_API const pd_optimizer *pd_trainer_optimizer(const pd_trainer *trainer);
PD_API const pd_trainer_opts *pd_trainer_options(const pd_trainer *trainer);

/* A trainer of everything `cost` (width 1) depends on. Free before the net. NULL, with the message in the net, if the
   net has failed or an option is wrong; a net that had not failed can be used as before then. */
PD_API pd_trainer *pd_trainer_new(pd_net *net, pd_layer *cost, pd_optimizer optimizer, const pd_trainer_opts *opts);
PD_API void pd_trainer_free(pd_trainer *trainer); /* not from its own on_event: then nothing is freed (PD_E_STATE) */

typedef enum pd_event_kind { PD_BEGIN_PASS, PD_END_BATCH, PD_END_PASS } pd_event_kind;
typedef struct pd_event {
    pd_event_kind kind;
    pd_trainer *trainer;
    int64_t pass, batch, samples; /* pass and batch from 0 (END_PASS: batch 0); samples seen in all */
    double cost;                  /* mean over the batch, or over the pass so far */
    double test_cost;             /* END_PASS with a test reader: its mean; else NaN */
    double rate;                  /* current learning rate */
} pd_event;

typedef struct pd_train_opts {
    int64_t batch_size;    /* default 32; with batch_tokens: at most so many samples, default no limit */
    int64_t batch_tokens;  /* fill a batch until the rows of one sequence input are so many or more in all: sentences
                              differ in length, and a step costs what its words do. Samples are then asked for one by
                              one, so that pd_prefetch's depth counts samples */
    const char *tokens_of; /* that input's name; default: the first one that carries sequences */
    pd_reader *test;       /* tested after every pass; evaluators then hold the test's values */
    int (*on_event)(void *user, const pd_event *event); /* non-zero stops: pd_train returns PD_STOPPED */
    void *user;
    int patience;             /* stop after so many tests without a lower test cost; at the end, however it comes, go
                                back to the best values: see HOW A TRAINING ENDS */
    bool progress;            /* progress bar on stderr if that is a terminal, else a line per pass */
    const char *csv_log;      /* file to append to: passes finished, samples, seconds of this call, rate, cost (of the
                                 pass, or of the batch), test cost and evaluators (empty where nothing was tested) */
    const char *tensorboard;  /* directory for event files with the same numbers */
    int64_t log_every;        /* a line in the logs after so many batches, beside one per pass; default: per pass */
    const char *checkpoint;   /* file written after every pass .. */
    int64_t checkpoint_every; /* .. and after every so many batches */
} pd_train_opts;

/* Trains until `passes` passes over the reader are finished, counting those of earlier calls and of a loaded
   checkpoint; a pass that was stopped goes on where it was. Returns PD_OK, PD_STOPPED, or what failed, with the message
   in the net; what was learned until then stays: see HOW A TRAINING ENDS. */
PD_API pd_status pd_train(pd_trainer *trainer, pd_reader *reader, int64_t passes, const pd_train_opts *opts);
/* One step on one batch; *cost (may be NULL) gets its mean cost. */
PD_API pd_status pd_train_batch(pd_trainer *trainer, const pd_batch *batch, double *cost);
/* Mean cost over a pass of the reader, which does not depend on the size of batches but in rounding; the net's
   evaluators are reset and then hold its values. Uses averaged
   parameters when averaging is on. PD_E_FORMAT without samples, PD_E_NUMERIC if the cost is not finite; *cost is NaN
   then. */
PD_API pd_status pd_test(pd_trainer *trainer, pd_reader *reader, int64_t batch_size, double *cost);
/* Swaps averaged values in (true) and out (false); what pd_test and pd_checkpoint do by themselves. Does nothing when
   there are none: before the first step, and where pd_train has gone back to the best values. */
PD_API pd_status pd_use_average(pd_trainer *trainer, bool on);
/* Every parameter's value becomes current, where an updater leaves some for later. pd_train does it at
   its end, unless it fails; pd_test, saving, loading and predicting do it by themselves. With workers in several
   processes all call it. */
PD_API pd_status pd_sync(pd_trainer *trainer);
PD_API int64_t pd_trainer_samples(const pd_trainer *trainer); /* seen so far */
/* A table of time and memory by layer, the fraction of time spent waiting for data, and, of the time in loops for
   several threads, the fraction in which some were missing or had to be waited for; where that is much, other work has
   the processors, not the slow layer. Like snprintf. */
PD_API size_t pd_profile(const pd_trainer *trainer, char *text, size_t size);
/* Writes the net as a Graphviz file: `dot -Tsvg net.dot`. */
PD_API pd_status pd_graphviz(pd_net *net, const char *path);

/* ======================================================================================================== */
/* >>files.h                                                                                               */

/* Parameters and buffers as a .safetensors file, replaced atomically: the old or the new file survives a crash. What a
   net learned before a builder failed can be saved still. Numbers that are not finite are not saved (PD_E_NUMERIC): the
   old file stays. */
PD_API pd_status pd_save(pd_net *net, const char *path);

typedef struct pd_load_map {
    const char *from; /* tensor in the file */
    const char *to;   /* parameter of the net */
    bool transpose;   /* the file holds out x in, the net in x out (2-D) */
    /* (optional) Blocks of columns, as they are once transposed: a letter for each in the file, "->", and those of the
       parameter, which may be fewer and in another order; '-' for zeros: "rzn->zr-". All have the same width. */
    const char *blocks;
    bool add; /* to what entries before this one load into the parameter */
} pd_load_map;
typedef struct pd_load_opts {
    const pd_load_map *map; /* `map_count` entries; a parameter without one loads from its own name */
    int map_count;
    bool partial; /* parameters that are not in the file keep their values; false: that is an error. It always is one
                     of a parameter in the map, and if the file has none of the net's */
} pd_load_opts;
/* Loads F32, F64, F16 and BF16, of which every number must be finite, in pd_real too, and the texts of pd_net_set_text;
   a net without parameters gets them alone. Everything is checked first: on failure nothing has changed. */
PD_API pd_status pd_load(pd_net *net, const char *path, const pd_load_opts *opts);

/* Keeps a copy of a text in the net under a name of 1 to 200 characters (no quotes, backslashes and controls): a
   vocabulary, class names, what the program must know to build the net. It goes into all files of the net, and comes
   back from them; what the net had under other names stays. UTF-8; all texts together up to 100 MB, with escapes. NULL:
   forgets it. A shared net has those of the net it came from. */
PD_API pd_status pd_net_set_text(pd_net *net, const char *name, const char *text);
/* Valid until a text is set or loaded; NULL when there is none of that name, which is no error. */
PD_API const char *pd_net_text(const pd_net *net, const char *name);

/* All of a training's state: parameters, optimizer, averages, random numbers, position in the data. Continuing from it
   gives the same bits as not having stopped. The file is a .safetensors file too, in which parameters have their names
   and current values, so that it can be loaded as a model. Numbers that are not finite are refused, as by pd_save and
   pd_load. Where rows of a sparse parameter have steps to make up for, it also holds what is stored ("stored/NAME") and
   what is due; only a trainer of which the parameter is `sparse` too can go on from that. */
PD_API pd_status pd_checkpoint_save(pd_trainer *trainer, const char *path);
PD_API pd_status pd_checkpoint_load(pd_trainer *trainer, const char *path);

/* ======================================================================================================== */
/* >>gradient_check.h                                                                                      */

typedef struct pd_gradcheck_opts {
    double step;      /* of the central difference; default 1e-5 in double, 1e-2 in float */
    int64_t elements; /* checked one by one per parameter, chosen at random; default 20; PD_ZERO: none */
    uint64_t seed;
} pd_gradcheck_opts;
typedef struct pd_gradcheck {
    double error;        /* largest relative difference found, of the directional and the single ones */
    double directional;  /* .. of the directional ones alone */
    double accumulation; /* largest relative difference between twice a gradient and backward run twice */
    const char *worst;   /* parameter or input where `error` was found */
    int64_t worst_index; /* element, or -1 for the directional one */
    double analytic, numeric;
    int64_t checked; /* single elements */
    bool all_zero;   /* every gradient was 0: nothing was really checked */
} pd_gradcheck;
/* Compares backward with central differences of sum(w * cost) for all parameters and all dense inputs that want a
   gradient (pd_want_gradient; of a layer without parameters only that is checked); `layer` may be any layer: its
   outputs are weighted by fixed random numbers. PD_OK means it ran; with nothing to check it is PD_E_ARGUMENT. Below
   1e-6 with PADDLE_DOUBLE the gradient is right; in float differences are rough, some 1e-2, and nets with kinks
   worse. */
PD_API pd_status pd_check_gradients(pd_layer *layer, const pd_batch *batch, const pd_gradcheck_opts *opts,
                                    pd_gradcheck *result);

#ifdef __cplusplus
}
#endif

#endif /* PADDLE_H */
/* ======================================================================================================== */
/* ======================================================================================================== */
/*                                            I M P L E M E N T A T I O N                                    */
/* ======================================================================================================== */
/* ======================================================================================================== */

#if defined(PADDLE_IMPLEMENTATION) && !defined(PADDLE_IMPLEMENTED)
#define PADDLE_IMPLEMENTED

/* What compilers may make of sums, quotients and comparisons under these options is wrong here: NaN passes unseen, e^x
   is off by 40 %. gcc tells of all of them, clang of some; the others are switched off for this file. */
#if defined(__FAST_MATH__) || defined(_M_FP_FAST)
#error "paddle.h: compile PADDLE_IMPLEMENTATION without -ffast-math, -Ofast (take -O3), -ffp-model=fast, /fp:fast"
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0
#error "paddle.h: compile PADDLE_IMPLEMENTATION without -ffinite-math-only, -fno-honor-nans"
#elif defined(__ASSOCIATIVE_MATH__)
#error "paddle.h: compile PADDLE_IMPLEMENTATION without -funsafe-math-optimizations and -fassociative-math"
#elif defined(__RECIPROCAL_MATH__)
#error "paddle.h: compile PADDLE_IMPLEMENTATION without -freciprocal-math"
#elif defined(__x86_64__) && !defined(__clang__) && (__FLT_EVAL_METHOD__ == 2 || __FLT_EVAL_METHOD__ == -1)
#error "paddle.h: compile PADDLE_IMPLEMENTATION without -mfpmath=387, -mfpmath=both"
#endif
typedef char pd__without_fsingle_precision_constant[sizeof 0.1 == sizeof(double) ? 1 : -1];
#if defined(__clang__) && __clang_major__ >= 12
#pragma float_control(precise, on, push)
#endif

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
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__TINYC__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__aarch64__) && !defined(__TINYC__)
#include <arm_neon.h>
#endif
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <direct.h>
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#include <windows.h>
#elif defined(__unix__) || defined(__APPLE__)
#define PD__POSIX 1
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#endif
#if !defined(PADDLE_NO_THREADS) && (defined(_WIN32) || (defined(PD__POSIX) && !defined(__EMSCRIPTEN__)))
#define PD__THREADS 1
#if !defined(_WIN32)
#include <pthread.h>
#endif
#endif

#if defined(PD__POSIX) && !defined(CLOCK_MONOTONIC)
#error "paddle.h: with -std=c99 include it, with PADDLE_IMPLEMENTATION, before other headers, or use -std=gnu99"
#endif

#ifdef __cplusplus
extern "C" {
#endif

#ifdef PADDLE_STATIC
#define PD_DEF PD_API
#else
#define PD_DEF
#endif

#ifdef PADDLE_DOUBLE
#define PD__M(function) function /* the C library's function for pd_real */
#define PD__REAL_MIN DBL_MIN
#define PD__REAL_EPSILON DBL_EPSILON
#else
#define PD__M(function) function##f
#define PD__REAL_MIN FLT_MIN
#define PD__REAL_EPSILON FLT_EPSILON
#endif

#ifdef __cplusplus
#define PD__ZERO                                                                                                       \
    {} /* an all-zero struct, in both languages without a warning */
#else
#define PD__ZERO                                                                                                       \
    { 0 }
#endif

#define PD__COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

static inline int64_t pd__min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pd__max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pd__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline bool pd__finite(double x) { return x - x == 0; }

/* What an option means: 0 is the default, PD_ZERO 0. */
static inline double pd__or(double value, double otherwise) {
    return value == PD_ZERO ? 0 : value != 0 ? value : otherwise;
}
static inline int64_t pd__or_count(int64_t value, int64_t otherwise) {
    return value == PD_ZERO ? 0 : value ? value : otherwise;
}

/* ======================================================================================================== */
/* >>core.c: the net's own data, memory, failures, text, random numbers, time                              */

/* The memory of a tensor: in the net's device's and, on one without host memory, copies in the host's. */
typedef struct pd__store {
    pd_real *data, *grad, *host_data, *host_grad;
    int64_t data_capacity, grad_capacity, host_data_capacity, host_grad_capacity; /* numbers */
    const pd_real *host_of;    /* what host_data is a copy of; NULL: of nothing that is current */
    int64_t host_numbers;      /* .. and how many of it */
    bool at_host;              /* the tensor has the copies for now: a layer on the host is at work .. */
    pd_real *away, *away_grad; /* .. and this is what it gets back */
} pd__store;

/* Working memory of a layer, on its device. */
typedef struct pd__memory {
    pd_real *data;
    int64_t capacity; /* numbers */
    int64_t per_row;  /* numbers per row of the output; 0: it does not go by rows */
} pd__memory;

/* What a net keeps about a layer beside what layer types see. */
struct pd__layer {
    int index;             /* in net->layers; inputs always have a smaller one */
    int slot;              /* of the batch, for inputs; else -1 */
    bool active;           /* takes part in the run in progress .. */
    bool target;           /* .. and was asked for */
    bool wants_input_grad; /* pd_want_gradient */
    int uses;              /* layers of this run that read this one's output and pass gradients to it; */
    int before_uses;       /* of these, costs that read it before its activation */
    bool reads_before;     /* this is such a cost: it reads `before` of input 0, and adds to the gradient of that */
    bool keeps_before;     /* in this run there is such a cost above, or the activation's derivative needs it */
    int consumers;         /* layers of this run that will still read this one's output */
    pd_layer *above;       /* when predicting: the layer that may fold into this one */
    bool above_done;       /* it did: pd_layer_epilogue has been called .. */
    bool act_done;         /* .. and for the activation, of the layer above if there is one */
    bool lent;             /* the output's data comes from the net's spare memory */
    pd_layer *origin;      /* in the net that a shared net was made from */
    pd_tensor before;      /* the output before its activation: data if it is kept, grad if some users add to that */
    pd__store store[2];    /* of out and before */
    struct pd__shadow *shadows; /* of the parameters of a layer on the host; NULL before its first run */
    pd__memory memory[8];
    pd_real *folded; /* scale, center and shift of the layer above */
    int64_t folded_capacity;
    int64_t *integers[4];
    int64_t integer_capacity[4];
    double *doubles[4];
    int64_t double_capacity[4];
    pd_real *values; /* of pd_layer_values */
    int64_t value_capacity;
    int64_t param_capacity;
    struct pd__copy *copies; /* freed with the layer */
    double forward_seconds, backward_seconds;
    int64_t runs;
    pd_group *group;    /* that it belongs to; what follows is about layers in groups: see >>groups.c */
    int goes_by;        /* what its rows are */
    bool follows;       /* it depends on what the group's memories hold, */
    bool precedes;      /* and they on it */
    pd_group *loop;     /* both, so it runs step by step */
    pd_layer *fed;      /* a memory's: the layer whose rows it holds in the next step */
    bool read_outside;  /* a memory's: by layers that do not run in the loop */
    pd_tensor whole[2]; /* out and before for all steps, while they show one */
    int part;           /* of its sum that forward is to compute */
    pd_real **hidden;   /* room for the addresses of its inputs' and parameters' gradients */
};

/* What a layer's rows are in a group. */
enum {
    PD__BY_STEP = 1, /* a row per step: they come in the group's sequences */
    PD__BY_SEQUENCE, /* one row per sequence */
    PD__APART        /* sequences of other lengths, as many as the group's */
};

/* Parts of a layer that is a sum over its inputs. */
enum {
    PD__ALL_PARTS,
    PD__BEFORE_LOOP, /* inputs that depend on no memory, */
    PD__IN_LOOP      /* and the others */
};

typedef struct pd__outer {
    pd_layer *layer;
    int goes_by;
} pd__outer;

struct pd_group {
    pd_net *net;
    char *name;
    bool reverse, ended;
    pd__outer *outers; /* the layers outside that those inside may read */
    int64_t outer_count, outer_capacity;
    int64_t begin, end; /* its layers among the net's, of which those */
    int64_t first_gather, first,
        last;                      /* .. from `first` to `last` run in the loop, and those before gather rows for it */
    const struct pd__order *order; /* of this run; NULL: not asked for yet */
    bool generating;               /* layers see one step, of the sentences that have not ended */
    int64_t *generated, generated_capacity;
    int64_t step; /* that layers in the loop see; -1: all rows */
    pd_group *next;
};

/* Heads a block from pd_layer_copy. As large as the alignment. */
typedef struct pd__copy {
    struct pd__copy *next;
    char fill[64 - sizeof(void *)];
} pd__copy;

/* Texts of pd_net_set_text, by name. `name` must stay in front: see pd__find_named. */
typedef struct pd__note {
    char *name, *text;
} pd__note;
typedef struct pd__notes {
    pd__note *list;
    int64_t count, capacity;
} pd__notes;

/* Memory for a layer's output, when predicting. */
typedef struct pd__spare {
    pd_real *data;
    int64_t capacity;
} pd__spare;

struct pd_net {
    pd_allocator allocator;
    pd_logger logger;
    uint64_t seed;
    uint64_t step; /* training steps so far: the part of random keys that changes */
    pd_device *device;
    pd_device *cpu;      /* the net's own: the device, if none was given, or what does the rest for that one */
    pd_device completed; /* the device that was given, with the CPU's operations where it has none */
    pd_failure failure;
    pd_failure reader_failure; /* of a reader that could not be made, until a trainer has reported it */
    bool broken;               /* a builder failed: nothing runs any more, and the message stays */
    pd_layer **layers;
    int64_t layer_count, layer_capacity;
    int slot_count;
    pd_param *first_param, *last_param;
    int param_count;
    pd_evaluator *evaluators;
    pd_mode mode;
    pd_updater *updater;  /* during a trainer's step .. */
    pd_trainer *stepping; /* .. that trainer */
    pd_trainer *trainers;
    pd_layer *ran;   /* last target of the last forward with gradients */
    bool given;      /* values have come by pd_load or pd_param_set */
    bool leftover;   /* there may be gradients that no trainer asked for */
    bool run_failed; /* the last forward */
    const pd_batch *batch;
    pd_batch *predict_batch;
    pd_net *origin; /* of a shared net */
    bool frozen;
    pd__spare *spares; /* room for as many as there are layers */
    int64_t spare_count, spare_capacity;
    struct pd__order *orders; /* see pd__time_order */
    pd_group *groups;
    pd_group *open_group; /* between pd_group_begin and pd_group_end */
    pd__notes notes;
    char texts[4][64];
    int text_turn;
};

/* ---- memory ---- */

/* In front of every allocation, so that callers need not remember sizes. As large as the alignment. */
typedef struct pd__header {
    uint64_t size;
    char fill[56];
} pd__header;

#define PD__ALIGN 64

static void *pd__default_alloc(void *user, size_t size, size_t align) {
    (void)user;
#if defined(_WIN32)
    return _aligned_malloc(size, align);
#elif defined(PD__POSIX)
    void *memory = NULL;
#if defined(MADV_HUGEPAGE)
    /* Pages of 2 MB, where Linux gives them to those who ask: reading weights once, as a batch of one does, is bound by
       memory, and misses fewer addresses. */
    const size_t page = (size_t)1 << 21;
    if (size >= 2 * page && posix_memalign(&memory, page, size) == 0) {
        madvise(memory, size, MADV_HUGEPAGE);
        return memory;
    }
#endif
    return posix_memalign(&memory, align, size) == 0 ? memory : NULL;
#else
    char *raw = (char *)malloc(size + align + sizeof(void *)), *memory;
    if (!raw) return NULL;
    memory = raw + sizeof(void *);
    memory += (align - (uintptr_t)memory % align) % align;
    memcpy(memory - sizeof(void *), &raw, sizeof(void *));
    return memory;
#endif
}

static void pd__default_free(void *user, void *memory, size_t size) {
    (void)user;
    (void)size;
#if defined(_WIN32)
    _aligned_free(memory);
#elif defined(PD__POSIX)
    free(memory);
#else
    void *raw;
    memcpy(&raw, (char *)memory - sizeof(void *), sizeof(void *));
    free(raw);
#endif
}

/* count * size in *bytes, or false when that overflows or is beyond what a size_t-based platform can hold. */
static bool pd__bytes(int64_t count, size_t size, size_t *bytes) {
    if (count < 0 || (uint64_t)count > (uint64_t)(PTRDIFF_MAX - 4 * PD__ALIGN) / (size ? size : 1)) return false;
    *bytes = (size_t)count * size;
    return true;
}

/* a * b for sizes >= 0; false when the product does not fit. */
static bool pd__multiply_sizes(int64_t a, int64_t b, int64_t *product) {
    if (a < 0 || b < 0 || (b > 0 && a > INT64_MAX / b)) return false;
    *product = a * b;
    return true;
}

static const pd_allocator pd__default_allocator = { pd__default_alloc, pd__default_free, NULL };

PD_DEF void *pd_alloc(const pd_allocator *a, int64_t count, size_t size) {
    size_t bytes;
    pd__header *h;
    if (!pd__bytes(count, size, &bytes)) return NULL;
    if (bytes == 0) bytes = 1; /* so that the pointer is to within the block: leak checkers want that */
    if (!a->alloc) a = &pd__default_allocator;
    h = (pd__header *)a->alloc(a->user, bytes + sizeof *h, PD__ALIGN);
    if (!h) return NULL;
    h->size = bytes + sizeof *h;
    memset(h + 1, 0, bytes);
    return h + 1;
}

PD_DEF void pd_free(const pd_allocator *a, void *memory) {
    if (memory) {
        pd__header *h = (pd__header *)memory - 1;
        if (!a->free) a = &pd__default_allocator;
        a->free(a->user, h, (size_t)h->size);
    }
}

PD_DEF bool pd_grow(const pd_allocator *a, void **array, int64_t *capacity, int64_t need, size_t size) {
    int64_t wanted;
    void *bigger;
    if (need <= *capacity) return true;
    wanted = *capacity > INT64_MAX / 2 ? need : pd__max(need, *capacity + *capacity / 2);
    bigger = pd_alloc(a, wanted, size);
    if (!bigger) return false;
    if (*array) memcpy(bigger, *array, (size_t)*capacity * size);
    pd_free(a, *array);
    *array = bigger;
    *capacity = wanted;
    return true;
}

static char *pd__copy_text(const pd_allocator *a, const char *text) {
    size_t length = strlen(text) + 1;
    char *copy = (char *)pd_alloc(a, (int64_t)length, 1);
    if (copy) memcpy(copy, text, length);
    return copy;
}

/* ---- failures ---- */

static const char *const pd__status_texts[PD_STATUS_COUNT] = {
#define PD__TEXT(name, text) text,
    PD_STATUSES(PD__TEXT)
#undef PD__TEXT
};

PD_DEF const char *pd_status_text(pd_status status) {
    return (unsigned)status < PD_STATUS_COUNT ? pd__status_texts[status] : "unknown status";
}

static void pd__set_failure(pd_failure *f, pd_status status, const char *format, va_list args) {
    f->status = status;
    vsnprintf(f->text, sizeof f->text, format, args);
}

/* Keeps a failure of a call that was not a builder. A failed builder's message stays. */
static pd_status pd__fail_list(pd_net *net, pd_status status, const char *format, va_list args) {
    if (!net || net->broken) return status;
    pd__set_failure(&net->failure, status, format, args);
    if (net->logger.log) net->logger.log(net->logger.user, status, net->failure.text);
    return status;
}

PD_PRINTF(3, 4) static pd_status pd__fail(pd_net *net, pd_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    pd__fail_list(net, status, format, args);
    va_end(args);
    return status;
}

/* The same for builders: the first one sticks. */
PD_PRINTF(3, 4) static pd_status pd__fail_build(pd_net *net, pd_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    pd__fail_list(net, status, format, args);
    va_end(args);
    if (net) net->broken = true;
    return status;
}

static pd_status pd__no_memory(pd_net *net, const char *what) {
    return pd__fail(net, PD_E_MEMORY, "out of memory for %s", what);
}

PD_DEF const char *pd_error(const pd_net *net) { return net ? net->failure.text : pd__status_texts[PD_E_MEMORY]; }

static void pd__clear_failure(pd_net *net) {
    net->failure.status = PD_OK;
    net->failure.text[0] = 0;
}

PD_DEF void pd_clear_error(pd_net *net) {
    if (!net || net->broken) return;
    pd__clear_failure(net);
    net->reader_failure.status = PD_OK;
}

PD_DEF pd_status pd_error_status(const pd_net *net) { return net ? net->failure.status : PD_E_MEMORY; }

/* ---- text ---- */

/* Appends to a text of `size` bytes like snprintf; *length counts what it would have been. */
PD_PRINTF(4, 5) static void pd__append(char *text, size_t size, size_t *length, const char *format, ...) {
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(*length < size ? text + *length : NULL, *length < size ? size - *length : 0, format, args);
    va_end(args);
    if (n > 0) *length += (size_t)n;
}

/* ---- random numbers ---- */

PD_DEF uint64_t pd_random(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* A key for another stream of numbers. */
static uint64_t pd__subkey(uint64_t key, uint64_t name) { return pd_random(pd_random(key, name), name ^ 0x5bd1e995); }

/* Uniform in [0, 1), from the upper 53 bits. */
static inline double pd__uniform(uint64_t key, uint64_t counter) {
    return (double)(pd_random(key, counter) >> 11) * (1.0 / 9007199254740992.0);
}

/* Standard normal by Box and Muller (1958), one number per pair of uniforms. */
static double pd__normal(uint64_t key, uint64_t counter) {
    double u = 1.0 - pd__uniform(key, 2 * counter), v = pd__uniform(key, 2 * counter + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* Uniform in 0 .. n - 1. The bias of the remainder, n / 2^64, is below anything that can be seen. */
static int64_t pd__below(uint64_t key, uint64_t counter, int64_t n) {
    return (int64_t)(pd_random(key, counter) % (uint64_t)n);
}

/* ---- time ---- */

/* Seconds of a clock that never goes back. */
PD_DEF double pd_seconds(void) {
#if defined(_WIN32)
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return (double)now.QuadPart / (double)per_second.QuadPart;
#elif defined(PD__POSIX)
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)clock() / CLOCKS_PER_SEC;
#endif
}

/* ---- threads: one small set of names for POSIX and Windows, used by pd_prefetch alone ---- */

#ifdef PD__THREADS
#if defined(_WIN32)
typedef CRITICAL_SECTION pd__mutex;
typedef CONDITION_VARIABLE pd__condition;
typedef HANDLE pd__thread;
typedef DWORD pd__thread_result;
#define PD__THREAD_CALL WINAPI
static bool pd__mutex_init(pd__mutex *m) {
    InitializeCriticalSection(m);
    return true;
}
static void pd__mutex_free(pd__mutex *m) { DeleteCriticalSection(m); }
static void pd__lock(pd__mutex *m) { EnterCriticalSection(m); }
static void pd__unlock(pd__mutex *m) { LeaveCriticalSection(m); }
static bool pd__condition_init(pd__condition *c) {
    InitializeConditionVariable(c);
    return true;
}
static void pd__condition_free(pd__condition *c) { (void)c; }
static void pd__wait(pd__condition *c, pd__mutex *m) { SleepConditionVariableCS(c, m, INFINITE); }
static void pd__wake(pd__condition *c) { WakeAllConditionVariable(c); }
static bool pd__thread_start(pd__thread *t, pd__thread_result(PD__THREAD_CALL *run)(void *), void *argument) {
    *t = CreateThread(NULL, 0, run, argument, 0, NULL);
    return *t != NULL;
}
static void pd__thread_join(pd__thread t) {
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
#else
typedef pthread_mutex_t pd__mutex;
typedef pthread_cond_t pd__condition;
typedef pthread_t pd__thread;
typedef void *pd__thread_result;
#define PD__THREAD_CALL
static bool pd__mutex_init(pd__mutex *m) { return pthread_mutex_init(m, NULL) == 0; }
static void pd__mutex_free(pd__mutex *m) { pthread_mutex_destroy(m); }
static void pd__lock(pd__mutex *m) { pthread_mutex_lock(m); }
static void pd__unlock(pd__mutex *m) { pthread_mutex_unlock(m); }
static bool pd__condition_init(pd__condition *c) { return pthread_cond_init(c, NULL) == 0; }
static void pd__condition_free(pd__condition *c) { pthread_cond_destroy(c); }
static void pd__wait(pd__condition *c, pd__mutex *m) { pthread_cond_wait(c, m); }
static void pd__wake(pd__condition *c) { pthread_cond_broadcast(c); }
static bool pd__thread_start(pd__thread *t, pd__thread_result (*run)(void *), void *argument) {
    return pthread_create(t, NULL, run, argument) == 0;
}
static void pd__thread_join(pd__thread t) { pthread_join(t, NULL); }
#endif
#endif

/* ======================================================================================================== */
/* >>threads.c: teams of threads, and the CPU as a device                                                  */

/* Results do not depend on the number of threads: work is cut where it writes, never inside a sum, or a sum is cut
   into a fixed number of parts that are added in order. */

typedef struct pd__kernels pd__kernels;

/* Another form of numbers that stay, for products: packed, or transformed. */
typedef struct pd__kept {
    struct pd__kept *next;
    const pd_real *of;
    int64_t form[6]; /* what `numbers` are; [0] 0: nothing yet */
    pd_real *numbers;
    int64_t capacity;
} pd__kept;

/* How many threads a device goes on with. Where other work has the processors, threads that wait for each other several
   thousand times in a second are many times slower than one, and spin away the little time that they get. */
typedef struct pd__pace {
    int threads, team;      /* at most, and at the moment */
    double debt;            /* seconds by which teams have lately been slower than one thread */
    double pause, until;    /* seconds to go on with fewer, and when they are over */
    double since;           /* when the team became what it is */
    double spent, short_of; /* seconds in loops for several, and those where some were missing or waited for */
} pd__pace;

/* What a thread takes for its part of a loop; in a cache line of its own. */
typedef struct pd__busy {
    double seconds;
    char fill[64 - sizeof(double)];
} pd__busy;

typedef struct pd__cpu {
    const pd_allocator *allocator;
    pd__pace pace;
    pd__busy *busy; /* of each thread in the last loop; NULL for one thread */
    pd_simd simd;
    const pd__kernels *kernels; /* of this level */
    void *scratch;              /* of one operation at a time */
    int64_t scratch_capacity;
    bool failed;    /* out of memory for scratch, since the last `wait` */
    pd__kept *kept; /* of all that pd_device.freeze has named */
} pd__cpu;

/* The CPU behind a device: itself, or what does the rest for one with host memory. */
static pd__cpu *pd__cpu_of(const pd_device *d) { return (pd__cpu *)d->cpu; }
static int pd__cpu_threads(const pd_device *d) { return pd__cpu_of(d)->pace.threads; }
static const pd__kernels *pd__cpu_kernels(const pd_device *d) { return pd__cpu_of(d)->kernels; }

/* A loop worth several threads has ended at `now`. It took `spent` seconds in a team of so many, of which even the
   least busy worked for `least`. Parts are about equal, so one thread alone would have taken team * least: a team that
   does not get WORTH of that done makes debts, which better loops pay back, and a little in advance. Where the debt is
   too large half as many threads go on, for a short time at first, and for longer ones if that is so again. */
static void pd__pace_note(pd__pace *p, double now, double spent, int team, double least) {
    const double WORTH = 0.8, MOST = 0.01, SAVED = 0.02, LONGEST = 1, TRIAL = 0.04;
    p->spent += spent;
    if (p->team < p->threads || (team > 1 && team * least < WORTH * spent)) p->short_of += spent;
    if (team > 1) p->debt += spent - team * least / WORTH;
    if (p->debt < -SAVED) p->debt = -SAVED;
    if (p->debt > MOST && p->team > 1) {
        p->pause = now - p->since < 4 * p->pause ? 4 * p->pause : 2 * p->debt;
        if (p->pause > LONGEST) p->pause = LONGEST;
        p->team /= 2;
        p->until = now + p->pause;
    } else if (p->team < p->threads && now >= p->until) {
        p->team = (int)pd__min(2 * p->team, p->threads);
        p->until = now + TRIAL;
    } else {
        return;
    }
    p->debt = 0;
    p->since = now;
}

#define PD__PRAGMA(text) _Pragma(#text)
#if defined(_OPENMP)
#define PD__OMP(text) PD__PRAGMA(omp text)
#define PD__THREAD_INDEX() omp_get_thread_num()
#define PD__TEAM_SIZE() omp_get_num_threads()
#else
#define PD__OMP(text)
#define PD__THREAD_INDEX() 0
#define PD__TEAM_SIZE() 1
#endif

/* Waking a team costs some microseconds, and far more on a busy machine; so many numbers take one thread longer. */
enum { PD__TEAM_WORK = 65536 };

/* Threads for so much work. */
static int pd__team(const pd_device *d, int64_t work) { return work < PD__TEAM_WORK ? 1 : pd__cpu_of(d)->pace.team; }

/* How this thread rounds, and whether it takes the smallest numbers for 0. Threads of a team do as the one that waits
   for them, which may have changed its mind since they were made (gcc's -ffast-math does, where it is only linked
   with). */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__TINYC__)
static inline unsigned pd__rounding(void) { return _mm_getcsr() & ~0x3fu; /* what has happened so far */ }
static inline bool pd__round_as(unsigned rounding) {
    if (pd__rounding() != rounding) _mm_setcsr(rounding);
    return true;
}
#else
static inline unsigned pd__rounding(void) { return 0; }
static inline bool pd__round_as(unsigned rounding) { return rounding == 0; }
#endif

/* A loop of which is measured how it went. */
typedef struct pd__loop {
    pd__cpu *cpu;
    int team; /* asked for; then what there was */
    unsigned rounding;
    bool measured;
    double begin;
} pd__loop;

static inline pd__loop pd__loop_begin(const pd_device *d, int64_t work, int64_t items) {
    pd__loop loop;
    loop.cpu = pd__cpu_of(d);
    loop.team = (int)pd__max(1, pd__min(pd__team(d, work), items));
    loop.measured = work >= PD__TEAM_WORK && loop.cpu->pace.threads > 1;
    loop.begin = loop.measured ? pd_seconds() : 0;
    loop.rounding = pd__rounding();
    return loop;
}

/* Of each thread, before and after its part. */
static inline double pd__busy_begin(pd__loop *loop) {
    if (PD__THREAD_INDEX() == 0) loop->team = PD__TEAM_SIZE();
    pd__round_as(loop->rounding);
    return pd_seconds();
}
static inline void pd__busy_end(const pd__loop *loop, double begin) {
    loop->cpu->busy[PD__THREAD_INDEX()].seconds = pd_seconds() - begin;
}

static void pd__loop_end(const pd__loop *loop) {
    if (loop->measured) {
        double now = pd_seconds(), least = now - loop->begin, second = least;
        for (int i = 0; loop->team > 1 && i < loop->team; i++) {
            double busy = loop->cpu->busy[i].seconds;
            second = busy < least ? least : busy < second ? busy : second;
            least = busy < least ? busy : least;
        }
        /* Of several the last may have had a short rest of the loop. */
        pd__pace_note(&loop->cpu->pace, now, now - loop->begin, loop->team, loop->team > 2 ? second : least);
    }
}

/* In front of a for loop over int64_t whose bodies write to different places; `work` is about the numbers touched. (The
   loops around it are so that something can be done before it: each of their bodies runs once.) */
#define PD__PARALLEL(d, work)                                                                                          \
    for (pd__loop loop_ = pd__loop_begin(d, work, INT64_MAX); loop_.team > 0; loop_.team = 0)                          \
        PD__OMP(parallel num_threads(loop_.team))                                                                      \
    for (bool once_ = pd__round_as(loop_.rounding); once_; once_ = false)                                              \
        PD__OMP(for schedule(static) nowait)

/* The same measured: a loop of calls, i = 0, step, .. below `end`. For one thread OpenMP is left alone: a team of one
   takes longer to make than many a small layer. */
#define PD__TEAM_STEPS(d, work, i, end, step, call)                                                                    \
    do {                                                                                                               \
        pd__loop loop_ = pd__loop_begin(d, work, pd__ceil_div(end, step));                                             \
        if (loop_.team == 1) {                                                                                         \
            for (int64_t i = 0; i < (end); i += (step)) call;                                                          \
        } else {                                                                                                       \
            PD__OMP(parallel num_threads(loop_.team)) {                                                                \
                double begin_ = pd__busy_begin(&loop_);                                                                \
                PD__OMP(for schedule(static) nowait)                                                                   \
                for (int64_t i = 0; i < (end); i += (step)) call;                                                      \
                pd__busy_end(&loop_, begin_);                                                                          \
            }                                                                                                          \
        }                                                                                                              \
        pd__loop_end(&loop_);                                                                                          \
    } while (0)
#define PD__TEAM(d, work, i, end, call) PD__TEAM_STEPS(d, work, i, end, 1, call)

#if defined(__GNUC__) && !defined(__TINYC__)
#define PD__PREFETCH(at) __builtin_prefetch(at)
#else
#define PD__PREFETCH(at) ((void)0)
#endif

/* `size` bytes until the next call, or NULL: then `wait` will say so. */
static void *pd__scratch(pd_device *d, int64_t count, size_t size) {
    pd__cpu *cpu = pd__cpu_of(d);
    size_t bytes;
    if (!pd__bytes(count, size, &bytes)) {
        cpu->failed = true;
        return NULL;
    }
    if ((int64_t)bytes > cpu->scratch_capacity) {
        pd_free(cpu->allocator, cpu->scratch);
        cpu->scratch = pd_alloc(cpu->allocator, (int64_t)bytes, 1);
        cpu->scratch_capacity = cpu->scratch ? (int64_t)bytes : 0;
    }
    if (!cpu->scratch) cpu->failed = true;
    return cpu->scratch;
}

/* Without memory for it nothing is kept: then products take longer. */
static void pd__cpu_freeze(pd_device *d, const pd_real *w, bool frozen) {
    pd__cpu *cpu = pd__cpu_of(d);
    pd__kept **at = &cpu->kept, *k;
    while (*at && (*at)->of != w) at = &(*at)->next;
    k = *at;
    if (frozen && !k) {
        *at = k = (pd__kept *)pd_alloc(cpu->allocator, 1, sizeof *k);
        if (k) k->of = w;
    } else if (!frozen && k) {
        *at = k->next;
        pd_free(cpu->allocator, k->numbers);
        pd_free(cpu->allocator, k);
    }
}

enum { PD__FORM_WINOGRAD = 1, PD__FORM_CONV, PD__FORM_RIGHT };

/* Where `count` numbers are kept, or are to be, in this form of w; *ready: they are there, else the caller puts them
   there and sets kept->form. NULL: nothing is kept of w. */
static pd__kept *pd__kept_form(pd_device *d, const pd_real *w, const int64_t form[6], int64_t count, bool *ready) {
    pd__cpu *cpu = pd__cpu_of(d);
    pd__kept *k = cpu->kept;
    while (k && k->of != w) k = k->next;
    *ready = k && memcmp(k->form, form, sizeof k->form) == 0;
    if (!k || *ready) return k;
    k->form[0] = 0;
    return pd_grow(cpu->allocator, (void **)&k->numbers, &k->capacity, count, sizeof *k->numbers) ? k : NULL;
}

static void *pd__cpu_alloc(pd_device *d, size_t size) { return pd_alloc(pd__cpu_of(d)->allocator, (int64_t)size, 1); }
static void pd__cpu_free_memory(pd_device *d, void *memory) { pd_free(pd__cpu_of(d)->allocator, memory); }
static void pd__cpu_copy(pd_device *d, void *to, const void *from, size_t size) {
    (void)d;
    if (size) memmove(to, from, size);
}
static pd_status pd__cpu_wait(pd_device *d, char *message, size_t size) {
    pd__cpu *cpu = pd__cpu_of(d);
    if (!cpu->failed) return PD_OK;
    cpu->failed = false;
    snprintf(message, size, "out of memory for working space");
    return PD_E_MEMORY;
}

PD_DEF bool pd_device_grow(pd_device *d, pd_real **memory, int64_t *capacity, int64_t count) {
    size_t bytes;
    pd_real *bigger;
    if (count <= *capacity && *memory) return true;
    count = pd__max(count, 1);
    if (!pd__bytes(count, sizeof(pd_real), &bytes)) return false;
    bigger = (pd_real *)d->alloc(d, bytes);
    if (!bigger) return false;
    if (*memory) d->free(d, *memory);
    *memory = bigger;
    *capacity = count;
    return true;
}

static bool pd__grow_numbers(pd_net *net, pd_real **memory, int64_t *capacity, int64_t count) {
    return pd_device_grow(net->device, memory, capacity, count);
}

/* ======================================================================================================== */
/* >>net.c                                                                                                 */

/* Defined in later sections. */
static pd_device *pd__cpu_new(const pd_allocator *allocator, int threads, pd_simd simd);
static void pd__cpu_free(const pd_allocator *allocator, pd_device *d);
static void pd__complete_device(pd_device *d, const pd_device *from);
static const char *pd__simd_name(pd_simd simd);
static pd_simd pd__best_simd(void);
static pd_simd pd__choose_simd(pd_simd wanted, const char **asked);
static pd_layer *pd__add_layer(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                               int count, const void *opts, pd_layer *origin);
static pd_layer *pd__add_to_group(pd_group *g, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                                  int count, const void *opts);
static pd_status pd__check_layer(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                                 int count, bool mixed);
static bool pd__name_ok(const char *name);
static bool pd__row_size(pd_shape s, int64_t *size);
static void pd__find_learners(pd_net *net);
static bool pd__is_carried(const pd_layer *l);
static bool pd__pass_on(pd_layer *l);
static bool pd__rows_fit(const pd_layer *a, const pd_layer *b, char text[400]);
static const pd_real *pd__read_before(const pd_layer *cost, pd_real **grad);

static void pd__evaluators_free(pd_net *net);
static void pd__notes_free(const pd_allocator *a, pd__notes *notes);
static void pd__touched_free(pd_net *net, struct pd__touched *touched);
static void pd__orders_free(pd_net *net);
static void pd__orders_forget(pd_net *net);
static void pd__groups_free(pd_net *net);
static bool pd__share_groups(pd_net *to, const pd_net *from);
static bool pd__is_view(const pd_param *p);

/* The net that owns the parameters: the origin of a shared one. */
static pd_net *pd__owner(pd_net *net) { return net->origin ? net->origin : net; }

/* Says that values are about to be changed, by training or, if `given`, by others: those in the net are then what
   trainers go on from. Defined with >>trainer.c. */
static void pd__begin_anew(pd_net *net, bool given);
/* Makes every value current that trainers' updaters, but for that of `besides`, have left for later. Defined with
   >>trainer.c. */
static pd_status pd__sync_all(pd_net *net, const pd_trainer *besides);
/* Rows of a sparse parameter as they are now: with the steps that a trainer has left for later. Defined with
   >>updater.c. */
static void pd__read_current(pd_net *net, const pd_param *p, int64_t count, const int64_t *rows, pd_real *to);
/* All of them, to host memory. */
static pd_status pd__download_table(pd_net *net, const pd_param *p, pd_real *values);
static bool pd__updater_fills(const pd_net *net, const pd_param *p);

static bool pd__check_net(pd_net *net) { return net && !net->broken; }

/* The same for saving: what was learned before a builder failed is not lost. */
static bool pd__check_learned(pd_net *net) { return net && (!net->broken || pd__owner(net)->step > 0); }

/* Where the net will compute: on `device`, completed by the CPU if it has host memory, or, if NULL, on the CPU. */
static void pd__take_device(pd_net *net, pd_device *device) {
    net->device = device && device->api_version == PD_API_VERSION ? device : net->cpu;
    if (net->device->host_memory && net->device != net->cpu) {
        net->completed = *device;
        net->completed.cpu = net->cpu->cpu;
        pd__complete_device(&net->completed, net->cpu);
        net->device = &net->completed;
    }
#define PD__WANT(operation)                                                                                            \
    if (!net->device->operation)                                                                                       \
        pd__fail_build(net, PD_E_ARGUMENT, "pd_net_new: device %.50s has no host memory, and lacks " #operation,       \
                       net->device->name);
    PD_BASIC_OPERATIONS(PD__WANT)
    PD__WANT(alloc) PD__WANT(free) PD__WANT(upload) PD__WANT(download) PD__WANT(wait)
#undef PD__WANT
}

PD_DEF pd_net *pd_net_new(const pd_net_opts *opts) {
    static const pd_net_opts defaults = PD__ZERO;
    pd_allocator allocator = { NULL, NULL, NULL };
    const pd_net_opts *o = opts ? opts : &defaults;
    const char *asked;
    pd_simd simd;
    pd_net *net;
    if (o->allocator.alloc && o->allocator.free) allocator = o->allocator;
    net = (pd_net *)pd_alloc(&allocator, 1, sizeof *net);
    if (!net) return NULL;
    net->allocator = allocator;
    net->logger = o->logger;
    net->seed = o->seed;
    if (!o->allocator.alloc != !o->allocator.free)
        pd__fail_build(net, PD_E_ARGUMENT, "pd_net_new: the allocator needs both alloc and free");
    else if (o->threads < 0 || o->threads > 1024) /* OpenMP ends the program when it can't have so many */
        pd__fail_build(net, PD_E_ARGUMENT, "pd_net_new: threads is %d, expected 0 (all) to 1024", o->threads);
    else if (o->device && o->device->api_version != PD_API_VERSION)
        pd__fail_build(net, PD_E_ARGUMENT, "pd_net_new: device has interface version %d, expected %d",
                       o->device->api_version, PD_API_VERSION);
    simd = pd__choose_simd(o->simd, &asked);
    if (simd == PD_SIMD_COUNT) {
        simd = pd__best_simd();
        pd__fail_build(
            net, PD_E_ARGUMENT,
            "pd_net_new: the instruction set is %.50s, expected best, scalar, baseline, avx2 or avx512, at most %s here",
            asked, pd__simd_name(simd));
    }
    net->cpu = pd__cpu_new(&net->allocator, o->threads, simd);
    if (!net->cpu) {
        net->device = NULL;
        pd_net_free(net);
        return NULL;
    }
    pd__take_device(net, o->device);
    return net;
}

/* A parameter as a layer on the host sees it: the same, but with its numbers (of a sparse one: those of the rows named)
   in host memory. */
typedef struct pd__shadow {
    pd_param param, *real;
    pd_real *values, *grads;
    int64_t value_capacity, grad_capacity;
} pd__shadow;

static void pd__shadows_free(pd_layer *l) {
    const pd_allocator *a = &l->net->allocator;
    for (int k = 0; l->own->shadows && k < l->param_count; k++) {
        pd_free(a, l->own->shadows[k].values);
        pd_free(a, l->own->shadows[k].grads);
    }
    pd_free(a, l->own->shadows);
}

static void pd__layer_free(pd_layer *l) {
    const pd_allocator *a = &l->net->allocator;
    struct pd__layer *own = l->own;
    pd_device *d = l->net->device;
    if (l->type->teardown && l->state) l->type->teardown(l);
    if (own) {
        pd__copy *c, *next;
        for (int i = 0; i < PD__COUNT(own->store); i++) {
            if (own->store[i].data) d->free(d, own->store[i].data);
            if (own->store[i].grad) d->free(d, own->store[i].grad);
            pd_free(a, own->store[i].host_data);
            pd_free(a, own->store[i].host_grad);
        }
        for (int i = 0; i < PD__COUNT(own->memory); i++)
            if (own->memory[i].data) l->device->free(l->device, own->memory[i].data);
        if (own->folded) l->device->free(l->device, own->folded);
        pd__shadows_free(l);
        for (int i = 0; i < PD__COUNT(own->integers); i++) pd_free(a, own->integers[i]);
        for (int i = 0; i < PD__COUNT(own->doubles); i++) pd_free(a, own->doubles[i]);
        pd_free(a, own->values);
        pd_free(a, own->hidden);
        for (c = own->copies; c; c = next) {
            next = c->next;
            pd_free(a, c);
        }
        pd_free(a, own);
    }
    pd_free(a, (void *)l->name);
    pd_free(a, l->inputs);
    pd_free(a, l->params);
    pd_free(a, l->opts);
    pd_free(a, l->state);
    pd_free(a, l);
}

static void pd__param_free(pd_net *net, pd_param *p) {
    pd_device *d = net->device;
    if (!pd__is_view(p)) {
        if (net->frozen && d->freeze) d->freeze(d, p->value, false);
        if (p->value) d->free(d, p->value);
    }
    if (p->grad) d->free(d, p->grad);
    if (p->row_values) d->free(d, p->row_values);
    pd__touched_free(net, p->touched);
    pd_free(&net->allocator, p->mask);
    pd_free(&net->allocator, (void *)p->name);
    pd_free(&net->allocator, p);
}

PD_DEF void pd_net_free(pd_net *net) {
    pd_allocator a;
    pd_param *p, *next;
    if (!net) return;
    a = net->allocator;
    pd__evaluators_free(net);
    pd_batch_free(net->predict_batch);
    for (int64_t i = net->layer_count; i-- > 0;) pd__layer_free(net->layers[i]);
    pd_free(&a, net->layers);
    while (net->spare_count > 0) net->device->free(net->device, net->spares[--net->spare_count].data);
    pd_free(&a, net->spares);
    pd__orders_free(net);
    pd__groups_free(net);
    pd__notes_free(&a, &net->notes);
    for (p = net->first_param; p; p = next) {
        next = p->next;
        pd__param_free(net, p);
    }
    if (net->cpu) pd__cpu_free(&a, net->cpu);
    pd_free(&a, net);
}

PD_DEF pd_layer *pd_layer_at(pd_net *net, int index) {
    return net && index >= 0 && index < net->layer_count ? net->layers[index] : NULL;
}

PD_DEF pd_layer *pd_layer_find(pd_net *net, const char *name) {
    if (!net || !name) return NULL;
    for (int64_t i = 0; i < net->layer_count; i++)
        if (strcmp(net->layers[i]->name, name) == 0) return net->layers[i];
    return NULL;
}

PD_DEF const pd_allocator *pd_net_allocator(const pd_net *net) { return &net->allocator; }
PD_DEF pd_device *pd_net_device(const pd_net *net) { return net->device; }

PD_DEF size_t pd_info(const pd_net *net, char *text, size_t size) {
    size_t length = 0;
    const char *before = ", of which the CPU runs ";
    if (size) text[0] = 0;
    pd__append(text, size, &length, "paddle.h " PD_VERSION ", %s", sizeof(pd_real) == 8 ? "double" : "float");
    if (!net) return length;
    pd__append(text, size, &length, ", device %s, %s kernels, %d threads", net->device->name,
               pd__simd_name(pd__cpu_of(net->cpu)->simd), pd__cpu_threads(net->cpu));
    for (int64_t i = 0; net->device != net->cpu && i < net->layer_count; i++) {
        const pd_layer *l = net->layers[i];
        if (l->own->slot >= 0 || l->device == net->device) continue;
        pd__append(text, size, &length, "%s%s (%s)", before, l->name, l->type->name);
        before = ", ";
    }
    return length;
}

/* ---- shared nets ---- */

static void pd__keep_params(pd_net *net) {
    pd_device *d = net->device;
    net->frozen = true;
    for (pd_param *p = pd_param_first(net); p && d->freeze; p = p->next) d->freeze(d, p->value, true);
}

PD_DEF pd_status pd_freeze(pd_net *net) {
    if (!pd__check_net(net)) return pd_error_status(net);
    if (net->origin) return pd__fail(net, PD_E_STATE, "pd_freeze: this net is shared; freeze the one it came from");
    if (net->trainers) return pd__fail(net, PD_E_STATE, "pd_freeze: the net has a trainer; free that first");
    if (!net->frozen) pd__keep_params(net);
    return PD_OK;
}

/* For what would change parameters. */
static pd_status pd__want_thawed(pd_net *net, const char *call) {
    if (!net->frozen) return PD_OK;
    return pd__fail(net, PD_E_STATE, "%s: the net was frozen by pd_freeze, so its parameters are final", call);
}

PD_DEF pd_net *pd_net_share(pd_net *net) {
    pd_net_opts opts = PD__ZERO;
    pd_net *copy;
    if (!pd__check_net(net)) return NULL;
    if (net->origin) {
        pd__fail(net, PD_E_STATE, "pd_net_share: this net is itself shared; share the one it came from");
        return NULL;
    }
    if (net->open_group) {
        pd__fail(net, PD_E_STATE, "pd_net_share: group \"%.100s\" has no pd_group_end yet", net->open_group->name);
        return NULL;
    }
    if (pd__sync_all(net, NULL) != PD_OK) return NULL;
    opts.seed = net->seed;
    opts.allocator = net->allocator;
    opts.logger = net->logger;
    opts.threads = pd__cpu_threads(net->cpu);
    opts.simd = pd__cpu_of(net->cpu)->simd;
    opts.device = net->device == net->cpu ? NULL : net->device;
    copy = pd_net_new(&opts);
    if (copy) copy->origin = net;
    if (copy && net->frozen) pd__keep_params(copy);
    for (int64_t i = 0; copy && !copy->broken && i < net->layer_count; i++) {
        pd_layer *from = net->layers[i], *to;
        pd_layer **inputs = (pd_layer **)pd_alloc(&net->allocator, from->input_count, sizeof *inputs);
        for (int k = 0; inputs && k < from->input_count; k++) inputs[k] = copy->layers[from->inputs[k]->own->index];
        if (!inputs) pd__fail_build(copy, PD_E_MEMORY, "out of memory for the shared net");
        to = inputs ? pd__add_layer(copy, from->type, from->name, inputs, from->input_count, from->opts, from) : NULL;
        if (to) to->is_sequence = from->is_sequence;
        pd_free(&net->allocator, inputs);
    }
    if (copy && !copy->broken && !pd__share_groups(copy, net))
        pd__fail_build(copy, PD_E_MEMORY, "out of memory for the groups of the shared net");
    if (!copy || copy->broken) {
        pd__fail(net, copy ? copy->failure.status : PD_E_MEMORY, "pd_net_share: %.400s",
                 copy ? copy->failure.text : "out of memory");
        pd_net_free(copy);
        return NULL;
    }
    return copy;
}

/* ======================================================================================================== */
/* >>parameters.c                                                                                          */

static pd_init pd__init(pd_init_kind kind, double a, double b) {
    pd_init init;
    init.kind = kind;
    init.a = a;
    init.b = b;
    return init;
}
PD_DEF pd_init pd_constant(double value) { return pd__init(PD_INIT_CONSTANT, value, 0); }
PD_DEF pd_init pd_normal(double mean, double deviation) { return pd__init(PD_INIT_NORMAL, mean, deviation); }
PD_DEF pd_init pd_uniform(double low, double high) { return pd__init(PD_INIT_UNIFORM, low, high); }
PD_DEF pd_init pd_xavier(void) { return pd__init(PD_INIT_XAVIER, 0, 0); }
PD_DEF pd_init pd_he(void) { return pd__init(PD_INIT_HE, 0, 0); }

PD_DEF pd_param *pd_param_first(pd_net *net) { return net ? pd__owner(net)->first_param : NULL; }

PD_DEF pd_param *pd_param_find(pd_net *net, const char *name) {
    pd_param *p = name ? pd_param_first(net) : NULL;
    while (p && strcmp(p->name, name) != 0) p = p->next;
    return p;
}

static double pd__init_value(const pd_init *init, const pd_param *p, uint64_t key, int64_t i) {
    double in = (double)pd__max(p->fan_in, 1), out = (double)pd__max(p->fan_out, 1), bound = sqrt(6 / (in + out));
    switch (init->kind) {
    case PD_INIT_CONSTANT: return init->a;
    case PD_INIT_UNIFORM: return init->a + (init->b - init->a) * pd__uniform(key, (uint64_t)i);
    case PD_INIT_NORMAL: return init->a + init->b * pd__normal(key, (uint64_t)i);
    case PD_INIT_XAVIER: return bound * (2 * pd__uniform(key, (uint64_t)i) - 1);
    case PD_INIT_HE: return sqrt(2 / in) * pd__normal(key, (uint64_t)i);
    case PD_INIT_DEFAULT: break;
    }
    return pd__normal(key, (uint64_t)i) / sqrt(in);
}

static void pd__init_param(pd_param *p, const pd_init *init) {
    pd_device *d = p->net->device;
    uint64_t key = pd__subkey(pd__subkey(p->net->seed, 0x706172616d), (uint64_t)p->net->param_count);
    pd_real chunk[512];
    for (int64_t i = 0; i < p->size; i += PD__COUNT(chunk)) {
        int64_t n = pd__min(p->size - i, PD__COUNT(chunk));
        for (int64_t k = 0; k < n; k++) chunk[k] = (pd_real)pd__init_value(init, p, key, i + k);
        d->upload(d, p->value + i, chunk, (size_t)n * sizeof(pd_real));
    }
}

static pd_status pd__check_param_opts(pd_layer *l, const char *name, const pd_param_opts *o) {
    const double numbers[] = { pd__or(o->l1, 0), pd__or(o->l2, 0), pd__or(o->clip, 0) };
    static const char *const names[] = { "l1", "l2", "clip" };
    for (int i = 0; i < PD__COUNT(numbers); i++)
        if (!(numbers[i] >= 0 && numbers[i] <= DBL_MAX))
            return pd_layer_fail(l, PD_E_ARGUMENT,
                                 "parameter \"%.100s\": %s is %g, expected a finite number, not below 0", name,
                                 names[i], numbers[i]);
    if (!(pd__or(o->rate_factor, 1) > 0 && o->rate_factor <= DBL_MAX))
        return pd_layer_fail(
            l, PD_E_ARGUMENT,
            "parameter \"%.100s\": rate_factor is %g, expected a positive number; is_static makes one stay as it is",
            name, pd__or(o->rate_factor, 1));
    if (!(o->prune >= 0 && o->prune < 1))
        return pd_layer_fail(l, PD_E_ARGUMENT, "parameter \"%.100s\": prune is %g, expected 0 <= prune < 1", name,
                             o->prune);
    if ((unsigned)o->init.kind > PD_INIT_HE || !pd__finite((double)(pd_real)o->init.a) ||
        !pd__finite((double)(pd_real)o->init.b) || o->init.a == PD_ZERO || o->init.b == PD_ZERO)
        return pd_layer_fail(l, PD_E_ARGUMENT, "parameter \"%.100s\": wrong initialiser", name);
    if (!pd__name_ok(name))
        return pd_layer_fail(l, PD_E_ARGUMENT,
                             "a parameter's name has 1 to 200 characters, no quotes, backslashes or controls");
    return PD_OK;
}

static pd_status pd__check_sparse(pd_layer *l, const char *name, int dim_count, const pd_param_opts *o) {
    if (!o->sparse) return PD_OK;
    if (!l->type->prefetch || dim_count != 2)
        return pd_layer_fail(l, PD_E_ARGUMENT,
                             "parameter \"%.100s\" can't be sparse: that is for tables read by ids or sparse inputs",
                             name);
    if (o->l1 > 0 || o->prune > 0)
        return pd_layer_fail(l, PD_E_ARGUMENT, "parameter \"%.100s\" is sparse, which goes with neither l1 nor prune",
                             name);
    return PD_OK;
}

static bool pd__same_dims(const pd_param *p, int dim_count, const int64_t *dims) {
    bool same = p->dim_count == dim_count;
    for (int i = 0; same && i < dim_count; i++) same = p->dims[i] == dims[i];
    return same;
}

/* "64x3x7x7", in one of the net's text buffers. */
static const char *pd__dims_text(pd_net *net, int dim_count, const int64_t *dims) {
    char *text = net->texts[net->text_turn = (net->text_turn + 1) % PD__COUNT(net->texts)];
    size_t length = 0;
    text[0] = 0;
    for (int i = 0; i < dim_count; i++)
        pd__append(text, sizeof net->texts[0], &length, i ? "x%lld" : "%lld", (long long)dims[i]);
    return text;
}

static bool pd__layer_takes(pd_layer *l, pd_param *p) {
    if (!pd_grow(&l->net->allocator, (void **)&l->params, &l->own->param_capacity, l->param_count + 1,
                 sizeof *l->params)) {
        pd_layer_fail(l, PD_E_MEMORY, "out of memory for parameters");
        return false;
    }
    l->params[l->param_count++] = p;
    return true;
}

/* ---- rows of sparse parameters ---- */

/* A set of rows, as a hash table with linear probing. A slot is in use if the place in it is below the count and that
   place has the slot (as in Briggs and Torczon 1993), so that the set is emptied by setting the count to 0, and cut to
   the first few rows by setting it to their number: no row was put where it is because of a later one. Gradient memory
   behind the last row is always zero. */
struct pd__touched {
    pd_param *of;                    /* in a shared net: the parameter that has the values; else NULL */
    bool plain;                      /* what is stored is not to be made up for: see >>gradient_check.c */
    int64_t *ids;                    /* by place */
    int64_t *slots;                  /* by place: where it stands .. */
    int64_t *places;                 /* .. by slot */
    int64_t slot_count;              /* a power of two; 0 at first */
    int64_t capacity, slot_capacity; /* of ids and slots */
    int64_t graded;                  /* the first so many rows may have a gradient, the others are a prediction's */
    int64_t grad_capacity, value_capacity; /* rows of param->grad and param->row_values */
};

static void pd__touched_free(pd_net *net, struct pd__touched *touched) {
    if (!touched) return;
    pd_free(&net->allocator, touched->ids);
    pd_free(&net->allocator, touched->slots);
    pd_free(&net->allocator, touched->places);
    pd_free(&net->allocator, touched);
}

static bool pd__touched_new(pd_param *p) {
    p->touched = (struct pd__touched *)pd_alloc(&p->net->allocator, 1, sizeof *p->touched);
    return p->touched != NULL;
}

static bool pd__is_view(const pd_param *p) { return p->touched && p->touched->of; }

/* The parameter that has the values, and that trainers know. */
static const pd_param *pd__origin_of(const pd_param *p) { return pd__is_view(p) ? p->touched->of : p; }

/* The slot of a row in the set, or, if it isn't there, the free one that it would get. */
static int64_t pd__slot_of(const pd_param *p, int64_t row) {
    const struct pd__touched *t = p->touched;
    uint64_t hash = (uint64_t)row * 0x9e3779b97f4a7c15u, mask = (uint64_t)t->slot_count - 1;
    for (hash ^= hash >> 32;; hash++) {
        int64_t slot = (int64_t)(hash & mask), place = t->places[slot];
        if (place >= p->rows.count || t->slots[place] != slot || t->ids[place] == row) return slot;
    }
}

/* The place in a slot, or -1. */
static int64_t pd__place_in(const pd_param *p, int64_t slot) {
    int64_t place = p->touched->places[slot];
    return place < p->rows.count && p->touched->slots[place] == slot ? place : -1;
}

PD_DEF int64_t pd_param_place(const pd_param *param, int64_t row) {
    if (!param->touched || param->touched->slot_count == 0) return -1;
    return pd__place_in(param, pd__slot_of(param, row));
}

/* Room for one more row, with at most half of the slots in use. */
static bool pd__grow_touched(pd_param *p) {
    const pd_allocator *a = &p->net->allocator;
    struct pd__touched *t = p->touched;
    int64_t count = p->rows.count, wanted = pd__max(64, 2 * t->slot_count), *places;
    if (!pd_grow(a, (void **)&t->ids, &t->capacity, count + 1, sizeof *t->ids)) return false;
    p->rows.ids = t->ids;
    if (!pd_grow(a, (void **)&t->slots, &t->slot_capacity, count + 1, sizeof *t->slots)) return false;
    if (2 * (count + 1) <= t->slot_count) return true;
    places = (int64_t *)pd_alloc(a, wanted, sizeof *places);
    if (!places) return false;
    pd_free(a, t->places);
    t->places = places;
    t->slot_count = wanted;
    for (p->rows.count = 0; p->rows.count < count; p->rows.count++) { /* in the order in which they came */
        int64_t slot = pd__slot_of(p, t->ids[p->rows.count]);
        t->places[slot] = p->rows.count;
        t->slots[p->rows.count] = slot;
    }
    return true;
}

/* The place of a row, which it gets if it has none; -1 when out of memory. */
static int64_t pd__touch_row(pd_param *p, int64_t row) {
    struct pd__touched *t = p->touched;
    int64_t slots = t->slot_count, slot = slots > 0 ? pd__slot_of(p, row) : 0;
    int64_t place = slots > 0 ? pd__place_in(p, slot) : -1;
    if (place >= 0) return place;
    if (!pd__grow_touched(p)) return -1;
    if (t->slot_count != slots) slot = pd__slot_of(p, row);
    place = p->rows.count;
    t->places[slot] = place;
    t->slots[place] = slot;
    t->ids[place] = row;
    p->rows.count++;
    return place;
}

PD_DEF pd_status pd_param_touch(pd_param *param, const int64_t *rows, int64_t count, int64_t *places) {
    for (int64_t i = 0; i < count; i++) {
        int64_t place = rows[i];
        if (rows[i] < 0 || rows[i] >= param->dims[0])
            return pd__fail(param->net, PD_E_FORMAT, "parameter \"%.100s\": row %lld, expected 0 to %lld", param->name,
                            (long long)rows[i], (long long)param->dims[0] - 1);
        if (param->touched) place = pd__touch_row(param, rows[i]);
        if (place < 0)
            return pd__fail(param->net, PD_E_MEMORY, "out of memory for the rows of \"%.100s\"", param->name);
        if (places) places[i] = place;
    }
    return PD_OK;
}

/* Rows of a sparse parameter that have a gradient: all touched ones, unless memory for them ran out. */
static int64_t pd__grad_rows(const pd_param *p) { return pd__min(p->rows.count, p->touched->grad_capacity); }

/* Numbers that grad holds now. */
static int64_t pd__grad_size(const pd_param *p) { return p->touched ? pd__grad_rows(p) * p->dims[1] : p->size; }

static void pd__zero_grad(pd_param *p) {
    if (p->grad) p->net->device->fill(p->net->device, pd__grad_size(p), 0, p->grad);
    p->rows.count = 0;
    if (p->touched) p->touched->graded = 0;
}

/* The numbers that layers read of a parameter in the run in progress, *count of them. */
static const pd_real *pd__read_numbers(const pd_param *p, int64_t *count) {
    *count = p->touched ? p->rows.count * p->dims[1] : p->size;
    return p->touched ? p->row_values : p->value;
}

/* Memory for the values of the rows named; what was there is lost. */
static bool pd__grow_row_values(pd_param *p) {
    struct pd__touched *t = p->touched;
    int64_t rows = pd__max(p->rows.count, pd__min(p->dims[0], 1 + t->value_capacity + t->value_capacity / 2)), had = 0;
    if (p->row_values && p->rows.count <= t->value_capacity) return true;
    if (p->row_values) p->net->device->free(p->net->device, p->row_values);
    p->row_values = NULL;
    t->value_capacity = 0;
    if (!pd_device_grow(p->net->device, &p->row_values, &had, rows * p->dims[1]))
        return false; /* no more than the table */
    t->value_capacity = rows;
    return true;
}

/* Rows that were named in a prediction are forgotten. */
static void pd__forget_rows(pd_net *net) {
    for (pd_param *p = net->first_param; p; p = p->next)
        if (p->touched) p->rows.count = p->touched->graded;
}

/* What follows when all layers have named theirs: they have gradients if this is no prediction, and values, which come
   from the updater or, if that has not been asked for them, from here. */
static pd_status pd__ready_rows(pd_net *net) {
    for (pd_param *p = net->first_param; p; p = p->next) {
        if (!p->touched) continue;
        if (net->mode != PD_PREDICT && p->grad) p->touched->graded = p->rows.count;
        if (!pd__grow_row_values(p))
            return pd__fail(net, PD_E_MEMORY, "out of memory for the rows of \"%.100s\"", p->name);
        if (!pd__updater_fills(net, p)) pd__read_current(net, p, p->rows.count, p->rows.ids, p->row_values);
    }
    return PD_OK;
}

/* A shared net's own view of a sparse parameter, since in its thread other rows are named at the same time. The value
   is that of `of`. */
static pd_param *pd__view_of(pd_layer *l, pd_param *of) {
    pd_net *net = l->net;
    pd_param *p = net->first_param;
    while (p && p->touched->of != of) p = p->next;
    if (p) return p;
    p = (pd_param *)pd_alloc(&net->allocator, 1, sizeof *p);
    if (p) {
        p->net = net;
        p->name = pd__copy_text(&net->allocator, of->name);
        p->dim_count = of->dim_count;
        memcpy(p->dims, of->dims, sizeof p->dims);
        p->size = of->size;
        p->opts = of->opts;
        p->opts.name = p->name;
        p->fan_in = of->fan_in;
        p->fan_out = of->fan_out;
        if (p->name && pd__touched_new(p)) {
            p->touched->of = of;
            p->value = of->value;
            p->next = net->first_param;
            return net->first_param = p;
        }
        pd__param_free(net, p);
    }
    pd_layer_fail(l, PD_E_MEMORY, "out of memory for the rows of parameter \"%.100s\"", of->name);
    return NULL;
}

/* A parameter with memory for its value, at the end of the net's list; NULL (message set) when out of memory. */
static pd_param *pd__new_param(pd_layer *l, const char *name, int dim_count, const int64_t *dims, int64_t size) {
    pd_net *net = l->net;
    pd_param *p = (pd_param *)pd_alloc(&net->allocator, 1, sizeof *p);
    int64_t capacity = 0;
    if (p) {
        p->net = net;
        p->size = size;
        p->dim_count = dim_count;
        memcpy(p->dims, dims, (size_t)dim_count * sizeof *dims);
        p->name = pd__copy_text(&net->allocator, name);
        if (p->name && pd__grow_numbers(net, &p->value, &capacity, size)) {
            if (net->last_param) net->last_param->next = p;
            else net->first_param = p;
            net->last_param = p;
            net->param_count++;
            return p;
        }
        pd__param_free(net, p);
    }
    pd_layer_fail(l, PD_E_MEMORY, "out of memory for parameter \"%.100s\" (%s)", name,
                  pd__dims_text(net, dim_count, dims));
    return NULL;
}

/* A layer that shares a parameter either says nothing more about it, or the same as the one that created it. */
static bool pd__may_share(const pd_param_opts *o, const pd_param_opts *created) {
    bool silent = o->init.kind == PD_INIT_DEFAULT && o->rate_factor == 0 && o->l1 == 0 && o->l2 == 0 && !o->is_static &&
                  o->clip == 0 && o->prune == 0 && !o->sparse;
    return silent || (o->init.kind == created->init.kind && o->init.a == created->init.a &&
                      o->init.b == created->init.b && o->rate_factor == created->rate_factor && o->l1 == created->l1 &&
                      o->l2 == created->l2 && o->is_static == created->is_static && o->clip == created->clip &&
                      o->prune == created->prune && o->sparse == created->sparse);
}

PD_DEF pd_param *pd_layer_param(pd_layer *layer, const char *suffix, int dim_count, const int64_t *dims, int64_t fan_in,
                                int64_t fan_out, pd_init init, const pd_param_opts *opts) {
    static const pd_param_opts defaults = PD__ZERO;
    const pd_param_opts *o = opts ? opts : &defaults;
    pd_net *net = layer->net;
    char own_name[416];
    const char *name = o->name ? o->name : own_name;
    int64_t size = 1;
    pd_param *p;
    if (layer->own->origin) { /* a shared net's layer takes its twin's */
        p = layer->own->origin->params[layer->param_count];
        if (p->touched) p = pd__view_of(layer, p);
        return p && pd__layer_takes(layer, p) ? p : NULL;
    }
    snprintf(own_name, sizeof own_name, "%s.%s", layer->name, suffix);
    if (pd__check_param_opts(layer, name, o) != PD_OK) return NULL;
    for (int i = 0; i < dim_count; i++)
        if (dim_count > PD_MAX_DIMS || dims[i] < 1 || !pd__multiply_sizes(size, dims[i], &size)) {
            pd_layer_fail(layer, PD_E_SHAPE, "parameter \"%.100s\" would have impossible dimensions", name);
            return NULL;
        }
    p = pd_param_find(net, name);
    if (p && !pd__same_dims(p, dim_count, dims)) {
        pd_layer_fail(layer, PD_E_SHAPE, "parameter \"%.100s\" is %s, but %s is needed here", name,
                      pd__dims_text(net, p->dim_count, p->dims), pd__dims_text(net, dim_count, dims));
        return NULL;
    }
    if (pd__check_sparse(layer, name, dim_count, p ? &p->opts : o) != PD_OK) return NULL;
    if (p && (p->is_buffer || !pd__may_share(o, &p->opts))) {
        pd_layer_fail(layer, PD_E_ARGUMENT,
                      p->is_buffer ? "parameter \"%.100s\" is another layer's statistics"
                                   : "parameter \"%.100s\" is shared, but was created with other options",
                      name);
        return NULL;
    }
    if (!p) {
        p = pd__new_param(layer, name, dim_count, dims, size);
        if (!p) return NULL;
        p->opts = *o;
        p->opts.name = p->name;
        p->fan_in = fan_in;
        p->fan_out = fan_out;
        pd__init_param(p, o->init.kind == PD_INIT_DEFAULT ? &init : &o->init);
        if (o->sparse && !pd__touched_new(p)) {
            pd_layer_fail(layer, PD_E_MEMORY, "out of memory for the rows of parameter \"%.100s\"", name);
            return NULL;
        }
    }
    return pd__layer_takes(layer, p) ? p : NULL;
}

PD_DEF pd_param *pd_layer_buffer(pd_layer *layer, const char *suffix, int64_t size, double value) {
    pd_param_opts opts = PD__ZERO;
    pd_param *p;
    char name[416];
    opts.is_static = true;
    snprintf(name, sizeof name, "%s.%s", layer->name, suffix);
    if (!layer->own->origin && pd_param_find(layer->net, name)) {
        pd_layer_fail(layer, PD_E_ARGUMENT, "\"%.100s\", its own statistics, is a parameter of another layer", name);
        return NULL;
    }
    p = pd_layer_param(layer, suffix, 1, &size, 1, 1, pd_constant(value), &opts);
    if (p) p->is_buffer = true;
    return p;
}

static pd_status pd__check_count(const pd_param *p, const void *values, int64_t count, const char *call) {
    if (!p || !values) return PD_E_ARGUMENT;
    if (count == p->size) return PD_OK;
    return pd__fail(p->net, PD_E_SHAPE, "%s: parameter \"%.100s\" has %lld numbers, not %lld", call, p->name,
                    (long long)p->size, (long long)count);
}

static pd_status pd__wait_for_device(pd_net *net) {
    char message[256] = "";
    const pd_device *d = net->device;
    pd_status status = d->wait(net->device, message, sizeof message);
    if (status == PD_OK && d != net->cpu) {
        d = net->cpu;
        status = d->wait(net->cpu, message, sizeof message);
    }
    if (status != PD_OK) pd__fail(net, status, "device %s: %s", d->name, message);
    return status;
}

/* `count` numbers to host memory. A failure of the device, of this or of what came before, is told: what has arrived
   may not be what was computed. */
static pd_status pd__download(pd_net *net, void *to_host, const pd_real *from, int64_t count) {
    if (count > 0) net->device->download(net->device, to_host, from, (size_t)count * sizeof *from);
    return pd__wait_for_device(net);
}

PD_DEF pd_status pd_param_set(pd_param *param, const pd_real *values, int64_t count) {
    pd_status status = pd__check_count(param, values, count, "pd_param_set");
    if (status == PD_OK && pd__is_view(param)) param = param->touched->of;
    if (status == PD_OK) status = pd__want_thawed(param->net, "pd_param_set");
    for (int64_t i = 0; status == PD_OK && i < count; i++)
        if (!pd__finite((double)values[i]))
            status = pd__fail(param->net, PD_E_NUMERIC, "pd_param_set: parameter \"%.100s\": number %lld is %g",
                              param->name, (long long)i, (double)values[i]);
    if (status == PD_OK) status = pd__sync_all(param->net, NULL);
    if (status != PD_OK) return status;
    pd__begin_anew(param->net, true);
    param->net->device->upload(param->net->device, param->value, values, (size_t)count * sizeof *values);
    return PD_OK;
}

PD_DEF pd_status pd_param_get(const pd_param *param, pd_real *values, int64_t count) {
    pd_status status = pd__check_count(param, values, count, "pd_param_get");
    if (status == PD_OK) status = pd__sync_all(param->net, NULL);
    if (status == PD_OK && param->touched) return pd__download_table(param->net, param, values);
    return status == PD_OK ? pd__download(param->net, values, param->value, count) : status;
}

/* The rows of a gradient, in the places that they have in the table. */
static pd_status pd__get_sparse_grad(const pd_param *p, pd_real *values) {
    int64_t width = p->dims[1];
    pd_status status = PD_OK;
    for (int64_t i = 0; i < p->size; i++) values[i] = 0;
    for (int64_t i = 0; status == PD_OK && i < pd__grad_rows(p); i++)
        status = pd__download(p->net, values + p->rows.ids[i] * width, p->grad + i * width, width);
    return status;
}

PD_DEF pd_status pd_param_get_grad(const pd_param *param, pd_real *values, int64_t count) {
    pd_status status = pd__check_count(param, values, count, "pd_param_get_grad");
    if (status != PD_OK) return status;
    if (!param->grad)
        return pd__fail(param->net, PD_E_STATE, "pd_param_get_grad: parameter \"%.100s\" has no gradient", param->name);
    if (param->touched) return pd__get_sparse_grad(param, values);
    return pd__download(param->net, values, param->grad, count);
}

/* Memory, all zero, for the gradient of the rows touched so far; what is there is kept. */
static bool pd__grow_sparse_grad(pd_param *p) {
    struct pd__touched *t = p->touched;
    pd_device *d = p->net->device;
    int64_t kept = t->grad_capacity * p->dims[1], capacity = 0;
    int64_t rows = pd__max(p->rows.count, pd__min(p->dims[0], 1 + t->grad_capacity + t->grad_capacity / 2));
    int64_t size[4] = { 1, 1, 1, 0 }, line[4] = { 0, 0, 0, 1 };
    pd_real *grad = NULL;
    if (p->grad && p->rows.count <= t->grad_capacity) return true;
    if (!pd__grow_numbers(p->net, &grad, &capacity, rows * p->dims[1])) return false; /* no more than the table: fits */
    d->fill(d, capacity, 0, grad);
    size[3] = kept;
    if (kept > 0) d->contract(d, size, 1, p->grad, line, NULL, line, grad, line);
    if (p->grad) d->free(d, p->grad);
    p->grad = grad;
    t->grad_capacity = rows;
    return true;
}

/* Memory for the gradient of a parameter that learns. */
static pd_status pd__need_grad(pd_param *p) {
    int64_t capacity = 0;
    bool made;
    if (p->opts.is_static || (p->grad && !p->touched)) return PD_OK;
    made = p->touched ? pd__grow_sparse_grad(p) : pd__grow_numbers(p->net, &p->grad, &capacity, p->size);
    if (!made) return pd__fail(p->net, PD_E_MEMORY, "out of memory for the gradient of \"%.100s\"", p->name);
    if (!p->touched) p->net->device->fill(p->net->device, p->size, 0, p->grad);
    return PD_OK;
}

PD_DEF pd_status pd_zero_grads(pd_net *net) {
    if (!pd__check_net(net)) return pd_error_status(net);
    if (net->origin) return pd__fail(net, PD_E_STATE, "pd_zero_grads: a shared net has no gradients");
    for (pd_param *p = net->first_param; p; p = p->next) {
        int64_t rows = p->rows.count;
        pd_status status;
        pd__zero_grad(p);
        if (net->ran) p->rows.count = rows; /* a backward is still to come */
        if (net->ran && p->touched) p->touched->graded = rows;
        status = pd__need_grad(p);
        if (status != PD_OK) return status;
    }
    return PD_OK;
}

/* ======================================================================================================== */
/* >>inputs.c                                                                                              */

static const char *const pd__rows_of[] = { "has one row per sample", "carries sequences" };

typedef struct pd__input_opts {
    pd_shape shape; /* ids: {count, 1, 1} */
    pd_slot_kind kind;
} pd__input_opts;

static pd_status pd__input_setup(pd_layer *l) {
    const pd__input_opts *o = (const pd__input_opts *)l->opts;
    l->own->slot = l->net->slot_count++;
    l->shape = o->shape;
    l->is_ids = o->kind != PD_SLOT_DENSE;
    l->is_sparse = o->kind == PD_SLOT_SPARSE;
    if (o->kind == PD_SLOT_IDS && o->shape.channels < 1)
        return pd_layer_fail(l, PD_E_SHAPE, "number of ids is %lld, expected at least 1", (long long)o->shape.channels);
    return PD_OK;
}

/* Inputs are bound to the batch's slots by pd__bind_input; nothing is computed. */
static pd_status pd__input_forward(pd_layer *l) {
    (void)l;
    return PD_OK;
}

static const pd_layer_type pd__input_type = { PD_API_VERSION,
                                              "input",
                                              0,
                                              0,
                                              sizeof(pd__input_opts),
                                              0,
                                              PD_OP(fill),
                                              pd__input_setup,
                                              NULL,
                                              pd__input_forward,
                                              NULL,
                                              NULL,
                                              NULL,
                                              NULL,
                                              -1 };

static pd_layer *pd__add_input(pd_net *net, const char *name, int64_t c, int64_t h, int64_t w, pd_slot_kind kind) {
    pd__input_opts o;
    memset(&o, 0, sizeof o);
    o.shape.channels = c;
    o.shape.height = h;
    o.shape.width = w;
    o.kind = kind;
    return pd_layer_add(net, &pd__input_type, name, NULL, 0, &o);
}

PD_DEF pd_layer *pd_image(pd_net *net, const char *name, int64_t channels, int64_t height, int64_t width) {
    return pd__add_input(net, name, channels, height, width, PD_SLOT_DENSE);
}
PD_DEF pd_layer *pd_vector(pd_net *net, const char *name, int64_t size) {
    return pd__add_input(net, name, size, 1, 1, PD_SLOT_DENSE);
}
PD_DEF pd_layer *pd_label(pd_net *net, const char *name, int64_t classes) {
    return pd__add_input(net, name, classes, 1, 1, PD_SLOT_IDS);
}
PD_DEF pd_layer *pd_ids(pd_net *net, const char *name, int64_t count) {
    return pd__add_input(net, name, count, 1, 1, PD_SLOT_IDS);
}
PD_DEF pd_layer *pd_sparse_vector(pd_net *net, const char *name, int64_t size) {
    return pd__add_input(net, name, size, 1, 1, PD_SLOT_SPARSE);
}

PD_DEF pd_layer *pd_sequence(pd_layer *input) {
    if (!input || input->net->broken) return NULL;
    if (input->own->slot < 0 || input->own->index + 1 != input->net->layer_count) {
        pd__fail_build(input->net, PD_E_ARGUMENT, "%s: pd_sequence takes an input that has just been created",
                       input->name);
        return NULL;
    }
    input->is_sequence = true;
    return input;
}

PD_DEF pd_status pd_want_gradient(pd_layer *input) {
    pd_net *net;
    if (!input) return PD_E_ARGUMENT;
    net = input->net;
    if (input->own->slot < 0 || input->is_ids)
        return pd_layer_fail(input, PD_E_ARGUMENT, "pd_want_gradient takes a dense input");
    input->own->wants_input_grad = true;
    pd__find_learners(net);
    return PD_OK;
}

/* ======================================================================================================== */
/* >>activations.c                                                                                         */

#define PD__FROM_Y false
#define PD__FROM_X true
static const bool pd__act_needs_x[PD_ACT_COUNT] = {
#define PD__NEEDS(name, text, needs) needs,
    PD_ACTIVATIONS(PD__NEEDS)
#undef PD__NEEDS
};

static const char *const pd__act_names[PD_ACT_COUNT] = {
#define PD__TEXT(name, text, needs) text,
    PD_ACTIVATIONS(PD__TEXT)
#undef PD__TEXT
};
PD_DEF const char *pd_act_text(pd_act act) {
    return (unsigned)act < PD_ACT_COUNT ? pd__act_names[act] : "unknown activation";
}

/* ======================================================================================================== */
/* >>layers.c                                                                                              */

/* Each layer: what its builder hands over, shape rule, forward, backward, type, builder. */

#define PD__TYPE(variable, name, min, max, spec, state, needs, setup, resize, forward, backward)                       \
    PD__ANY_TYPE(variable, name, min, max, spec, state, needs, setup, resize, forward, backward, NULL, 0)
/* .. that works row by row */
#define PD__ROW_TYPE(variable, name, min, max, spec, state, needs, setup, forward, backward)                           \
    PD__ANY_TYPE(variable, name, min, max, spec, state, needs, setup, NULL, forward, backward, NULL, -1)
/* .. and whose parameters may be sparse */
#define PD__TABLE_TYPE(variable, name, min, max, spec, state, needs, setup, forward, backward, prefetch)               \
    PD__ANY_TYPE(variable, name, min, max, spec, state, needs, setup, NULL, forward, backward, prefetch, -1)
#define PD__ANY_TYPE(variable, name, min, max, spec, state, needs, setup, resize, forward, backward, prefetch, rows)   \
    static const pd_layer_type variable = {                                                                            \
        PD_API_VERSION, name,    min,      max,  sizeof(spec), state, needs, setup,                                    \
        resize,         forward, backward, NULL, prefetch,     NULL,  rows                                             \
    }

/* Declares a zeroed spec `s` whose first member `o` is the user's options. */
#define PD__SPEC(type)                                                                                                 \
    type s;                                                                                                            \
    memset(&s, 0, sizeof s);                                                                                           \
    if (opts) s.o = *opts

static pd_shape pd__shape(int64_t channels, int64_t height, int64_t width) {
    pd_shape s;
    s.channels = channels;
    s.height = height;
    s.width = width;
    return s;
}

static bool pd__same_shape(pd_shape a, pd_shape b) {
    return a.channels == b.channels && a.height == b.height && a.width == b.width;
}

static const pd_tensor *pd__in(const pd_layer *l, int k) { return &l->inputs[k]->out; }

/* For setup: inputs must hold numbers, not ids. */
static pd_status pd__want_numbers(pd_layer *l) {
    for (int k = 0; k < l->input_count; k++)
        if (l->inputs[k]->is_ids)
            return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" holds ids, expected numbers", l->inputs[k]->name);
    return PD_OK;
}

/* For setup: input k has this shape. */
static pd_status pd__want_shape(pd_layer *l, int k, pd_shape shape) {
    if (pd__same_shape(l->inputs[k]->shape, shape)) return PD_OK;
    return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" is %s, expected %s", l->inputs[k]->name,
                         pd_shape_text(l, l->inputs[k]->shape), pd_shape_text(l, shape));
}

/* For setup: the option must be at least `least`. */
static pd_status pd__want_least(pd_layer *l, const char *what, int64_t value, int64_t least) {
    if (value >= least) return PD_OK;
    return pd_layer_fail(l, PD_E_ARGUMENT, "%s is %lld, expected at least %lld", what, (long long)value,
                         (long long)least);
}

/* For setup: both sides of a window, a step or a border are at least `least`, and so small that the product of two
   fits an int64_t. */
static pd_status pd__want_sides(pd_layer *l, const char *what, int64_t h, int64_t w, int64_t least) {
    if (pd__max(h, w) > INT32_MAX)
        return pd_layer_fail(l, PD_E_ARGUMENT, "%s is %lld, expected below 2^31", what, (long long)pd__max(h, w));
    return pd__want_least(l, what, pd__min(h, w), least);
}

/* For setup: the option is neither infinite nor NaN. */
static pd_status pd__want_finite(pd_layer *l, const char *what, double value) {
    if (pd__finite(value)) return PD_OK;
    return pd_layer_fail(l, PD_E_ARGUMENT, "%s is %g, expected a finite number", what, value);
}

/* y += alpha a [b] for a 2-D box rows x columns: the usual case of contract. Each pointer with its two strides. */
static void pd__contract2(pd_layer *l, int64_t rows, int64_t columns, double alpha, const pd_real *a, int64_t ar,
                          int64_t ac, const pd_real *b, int64_t br, int64_t bc, pd_real *y, int64_t yr, int64_t yc) {
    int64_t size[4] = { 1, 1, 0, 0 }, as[4] = { 0, 0, 0, 0 }, bs[4] = { 0, 0, 0, 0 }, ys[4] = { 0, 0, 0, 0 };
    size[2] = rows, size[3] = columns;
    as[2] = ar, as[3] = ac;
    bs[2] = br, bs[3] = bc;
    ys[2] = yr, ys[3] = yc;
    l->device->contract(l->device, size, (pd_real)alpha, a, as, b, bs, y, ys);
}

/* y += alpha a [b] for n numbers in a line. */
static void pd__contract1(pd_layer *l, int64_t n, double alpha, const pd_real *a, const pd_real *b, pd_real *y) {
    pd__contract2(l, 1, n, alpha, a, 0, 1, b, 0, 1, y, 0, 1);
}

static int64_t pd__numbers(const pd_layer *l) { return l->out.rows * l->out.width; }

static void pd__clear_output(pd_layer *l) { l->device->fill(l->device, pd__numbers(l), 0, l->out.data); }

/* Adds the layer's bias (one per column) to its output, and its gradient to the bias'. */
static void pd__add_bias(pd_layer *l, const pd_param *bias) {
    pd__contract2(l, l->out.rows, l->out.width, 1, bias->value, 0, 1, NULL, 0, 0, l->out.data, l->out.width, 1);
}
static void pd__add_bias_grad(pd_layer *l, pd_param *bias) {
    if (bias->grad)
        pd__contract2(l, l->out.rows, l->out.width, 1, l->out.grad, l->out.width, 1, NULL, 0, 0, bias->grad, 0, 1);
}

/* ---- tables: parameters of which ids or sparse rows pick rows; for fc and embedding ---- */

/* The first row whose id is out of range, or -1: a user's layer may have made them. */
static int64_t pd__bad_id(const pd_layer *input) {
    int64_t count = pd_shape_size(input->shape);
    for (int64_t r = 0; input->is_ids && r < input->out.rows; r++)
        if (input->out.ids[r] < 0 || input->out.ids[r] >= count) return r;
    return -1;
}

/* For forward: input k's ids, if it has ids, are in range. */
static pd_status pd__check_ids(pd_layer *l, int k) {
    const pd_layer *input = l->inputs[k];
    int64_t r = pd__bad_id(input);
    if (r < 0) return PD_OK;
    return pd_layer_fail(l, PD_E_FORMAT, "row %lld of \"%.100s\": expected an id below %lld, got %lld", (long long)r,
                         input->name, (long long)pd_shape_size(input->shape), (long long)input->out.ids[r]);
}

static int64_t pd__entries(const pd_tensor *x) { return x->row_starts ? x->row_starts[x->rows] : x->rows; }

/* The matrix that the ids or sparse rows of a layer are: row by row, a number for each row of the table. */
static pd_csr pd__picked(const pd_tensor *x) {
    pd_csr s;
    s.rows = x->rows;
    s.starts = x->row_starts;
    s.columns = x->ids;
    s.values = x->values;
    return s;
}

/* For setup: a sparse parameter is read by input k's ids, which must be known before the first layer runs. */
static pd_status pd__want_picked(pd_layer *l, int k, const pd_param *table) {
    if (!table->opts.sparse || (l->inputs[k]->is_ids && l->inputs[k]->own->slot >= 0)) return PD_OK;
    return pd_layer_fail(l, PD_E_ARGUMENT,
                         "parameter \"%.100s\" is sparse, but \"%.100s\" is not an input of ids or sparse rows",
                         table->name, l->inputs[k]->name);
}

/* Where the rows that input k picks of the parameter k stand, by entry. */
static const int64_t *pd__places(const pd_layer *l, int k) {
    const int64_t *places = l->own->integers[3];
    if (!l->params[k]->opts.sparse) return pd__in(l, k)->ids;
    for (int i = 0; i < k; i++)
        if (l->params[i]->opts.sparse) places += pd__entries(pd__in(l, i));
    return places;
}

/* For prefetch: input k reads the table in the parameter k. */
static pd_status pd__touch_tables(pd_layer *l) {
    int64_t entries = 0, *places;
    pd_status status = PD_OK;
    for (int k = 0; k < l->input_count; k++)
        if (l->params[k]->opts.sparse) entries += pd__entries(pd__in(l, k));
    places = pd_layer_integers(l, 3, entries);
    if (!places) return PD_E_MEMORY;
    for (int k = 0; status == PD_OK && k < l->input_count; k++)
        if (l->params[k]->opts.sparse) {
            const pd_tensor *x = pd__in(l, k);
            status = pd_param_touch(l->params[k], x->ids, pd__entries(x), places);
            places += pd__entries(x);
        }
    return status;
}

/* y += S W for input k and the parameter k */
static void pd__add_picked(pd_layer *l, int k) {
    const pd_param *table = l->params[k];
    pd_csr s = pd__picked(pd__in(l, k));
    s.columns = pd__places(l, k);
    l->device->sparse_product(l->device, &s, l->out.width, table->opts.sparse ? table->row_values : table->value,
                              l->out.data);
}

/* dW += S^T dy, S transposed by counting: starts[r + 1] is where the next entry of the gradient's row r goes, at first
   the start of row r, at last that of row r + 1. */
static pd_status pd__add_picked_grad(pd_layer *l, int k) {
    const pd_tensor *x = pd__in(l, k);
    const pd_param *table = l->params[k];
    const int64_t *places = pd__places(l, k);
    int64_t entries = pd__entries(x), rows = table->opts.sparse ? table->rows.count : table->dims[0];
    int64_t *starts = pd_layer_integers(l, 0, rows + 2), *columns = pd_layer_integers(l, 1, entries);
    pd_real *values = x->values ? pd_layer_values(l, entries) : NULL;
    pd_csr t;
    if (!starts || !columns || (x->values && !values)) return PD_E_MEMORY;
    memset(starts, 0, (size_t)(rows + 2) * sizeof *starts);
    for (int64_t e = 0; e < entries; e++) starts[places[e] + 2]++;
    for (int64_t r = 0; r < rows; r++) starts[r + 2] += starts[r + 1];
    for (int64_t r = 0, e = 0; r < x->rows; r++)
        for (int64_t end = x->row_starts ? x->row_starts[r + 1] : r + 1; e < end; e++) {
            int64_t to = starts[places[e] + 1]++;
            columns[to] = r;
            if (values) values[to] = x->values[e];
        }
    t.rows = rows;
    t.starts = starts;
    t.columns = columns;
    t.values = values;
    l->device->sparse_product(l->device, &t, l->out.width, l->out.grad, table->grad);
    return PD_OK;
}

/* ---- >>layer:fc ---- */

typedef struct pd__fc_spec {
    pd_fc_opts o;
    int64_t size;
} pd__fc_spec;

static pd_status pd__fc_setup(pd_layer *l) {
    const pd__fc_spec *s = (const pd__fc_spec *)l->opts;
    if (pd__want_least(l, "size", s->size, 1) != PD_OK) return PD_E_ARGUMENT;
    for (int k = 0; k < l->input_count; k++) {
        pd_param *w;
        pd_param_opts o = s->o.weight;
        int64_t dims[2] = { l->inputs[k]->out.width, 0 };
        char suffix[32];
        dims[1] = s->size;
        snprintf(suffix, sizeof suffix, k ? "weight%d" : "weight", k);
        if (k) o.name = NULL;
        if (l->inputs[k]->is_ids && !l->inputs[k]->is_sparse)
            return pd_layer_fail(l, PD_E_SHAPE,
                                 "input \"%.100s\" holds ids, expected numbers; pd_embedding makes them of ids",
                                 l->inputs[k]->name);
        w = pd_layer_param(l, suffix, 2, dims, dims[0], dims[1], pd_normal(0, 1 / sqrt((double)dims[0])), &o);
        if (!w || pd__want_picked(l, k, w) != PD_OK) return pd_error_status(l->net);
    }
    if (!s->o.no_bias && !pd_layer_param(l, "bias", 1, &s->size, 1, 1, pd_constant(0), &s->o.bias))
        return pd_error_status(l->net);
    l->shape = pd__shape(s->size, 1, 1);
    l->act = s->o.act;
    return PD_OK;
}

/* Is input k's product to be computed in this call? In a group's loop those of the others have been, for all steps. */
static bool pd__in_part(const pd_layer *l, int k) {
    return l->own->part == PD__ALL_PARTS || (l->own->part == PD__IN_LOOP) == (l->inputs[k]->own->loop != NULL);
}

/* The last product adds the bias and applies the activation, if there is one. */
static pd_status pd__fc_forward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_param *bias = l->param_count > l->input_count ? l->params[l->input_count] : NULL;
    int last = -1;
    bool begun = false, whole = l->own->part != PD__BEFORE_LOOP;
    pd_epilogue after;
    for (int k = 0; k < l->input_count; k++)
        if (pd__in_part(l, k)) last = k;
        else begun = begun || whole;
    if (whole && !l->inputs[last]->is_sparse && pd_layer_epilogue(l, bias ? bias->value : NULL, &after) != PD_OK)
        return pd_error_status(l->net);
    for (int k = 0; k <= last; k++) {
        const pd_tensor *x = pd__in(l, k);
        if (!pd__in_part(l, k)) continue;
        if (l->inputs[k]->is_sparse) {
            if (!begun) pd__clear_output(l);
            pd__add_picked(l, k);
        } else {
            d->gemm(d, false, false, x->rows, l->out.width, x->width, 1, x->data, x->width, l->params[k]->value,
                    l->out.width, begun, l->out.data, l->out.width, whole && k == last ? &after : NULL);
        }
        begun = true;
    }
    if (bias && l->inputs[last]->is_sparse) pd__add_bias(l, bias);
    return PD_OK;
}

/* dx += dy W^T, dW += x^T dy, db += column sums of dy */
static pd_status pd__fc_backward(pd_layer *l) {
    pd_device *d = l->device;
    int64_t size = l->out.width;
    for (int k = 0; k < l->input_count; k++) {
        const pd_tensor *x = pd__in(l, k);
        pd_param *w = l->params[k];
        if (l->inputs[k]->is_sparse) {
            if (w->grad && pd__add_picked_grad(l, k) != PD_OK) return PD_E_MEMORY;
            continue;
        }
        if (w->grad)
            d->gemm(d, true, false, x->width, size, x->rows, 1, x->data, x->width, l->out.grad, size, 1, w->grad, size,
                    NULL);
        if (x->grad)
            d->gemm(d, false, true, x->rows, x->width, size, 1, l->out.grad, size, w->value, size, 1, x->grad, x->width,
                    NULL);
    }
    if (l->param_count > l->input_count) pd__add_bias_grad(l, l->params[l->input_count]);
    return PD_OK;
}

PD__ROW_TYPE(pd__fc_type, "fc", 1, -1, pd__fc_spec, 0, PD_OP(gemm) | PD_OP(contract), pd__fc_setup, pd__fc_forward,
             pd__fc_backward);

/* The same with sparse inputs among others, which asks more of the device. */
PD__TABLE_TYPE(pd__sparse_fc_type, "fc", 1, -1, pd__fc_spec, 0,
               PD_OP(gemm) | PD_OP(contract) | PD_OP(fill) | PD_OP(sparse_product), pd__fc_setup, pd__fc_forward,
               pd__fc_backward, pd__touch_tables);

PD_DEF pd_layer *pd_fc_sum(pd_net *net, pd_layer *const *inputs, int count, int64_t size, const pd_fc_opts *opts) {
    bool sparse = false;
    PD__SPEC(pd__fc_spec);
    s.size = size;
    for (int k = 0; inputs && k < count; k++) sparse = sparse || (inputs[k] && inputs[k]->is_sparse);
    return pd_layer_add(net, sparse ? &pd__sparse_fc_type : &pd__fc_type, s.o.name, inputs, count, &s);
}
PD_DEF pd_layer *pd_fc(pd_net *net, pd_layer *input, int64_t size, const pd_fc_opts *opts) {
    return pd_fc_sum(net, &input, 1, size, opts);
}

/* ---- >>layer:conv, >>layer:conv_transpose ---- */

typedef struct pd__conv_spec {
    pd_conv_opts o;
    int64_t filters, filter;
} pd__conv_spec;

/* Defaults of the options, and what both kinds must satisfy. */
static pd_status pd__conv_options(pd_layer *l, pd_conv_shape *s) {
    const pd__conv_spec *spec = (const pd__conv_spec *)l->opts;
    const pd_conv_opts *o = &spec->o;
    memset(s, 0, sizeof *s);
    s->filter_w = spec->filter;
    s->filter_h = o->filter_h ? o->filter_h : spec->filter;
    s->stride_w = o->stride ? o->stride : 1;
    s->stride_h = o->stride_h ? o->stride_h : s->stride_w;
    s->pad_w = o->pad;
    s->pad_h = pd__or_count(o->pad_h, o->pad);
    s->dilation_w = o->dilation ? o->dilation : 1;
    s->dilation_h = o->dilation_h ? o->dilation_h : s->dilation_w;
    s->groups = o->groups ? o->groups : 1;
    if (pd__want_numbers(l) != PD_OK || pd__want_least(l, "number of filters", spec->filters, 1) != PD_OK ||
        pd__want_sides(l, "filter", s->filter_h, s->filter_w, 1) != PD_OK ||
        pd__want_sides(l, "stride", s->stride_h, s->stride_w, 1) != PD_OK ||
        pd__want_sides(l, "pad", s->pad_h, s->pad_w, 0) != PD_OK ||
        pd__want_sides(l, "dilation", s->dilation_h, s->dilation_w, 1) != PD_OK ||
        pd__want_least(l, "groups", s->groups, 1) != PD_OK)
        return pd_error_status(l->net);
    if (l->inputs[0]->shape.channels % s->groups || spec->filters % s->groups)
        return pd_layer_fail(l, PD_E_SHAPE,
                             "%lld groups do not divide the %lld channels of \"%.100s\" and the %lld filters",
                             (long long)s->groups, (long long)l->inputs[0]->shape.channels, l->inputs[0]->name,
                             (long long)spec->filters);
    l->act = o->act;
    return PD_OK;
}

/* The weight, out_c x in_c/groups x filter_h x filter_w of the convolution, and a bias per channel of the output. */
static pd_status pd__conv_params(pd_layer *l, const pd_conv_shape *s) {
    const pd_conv_opts *o = &((const pd__conv_spec *)l->opts)->o;
    int64_t cells = s->filter_h * s->filter_w, in, out, dims[4];
    if (!pd__multiply_sizes(pd__max(s->in_c, s->out_c), cells, &in))
        return pd_layer_fail(l, PD_E_SHAPE, "%lldx%lld filters for %lld and %lld channels are too large",
                             (long long)s->filter_h, (long long)s->filter_w, (long long)s->in_c, (long long)s->out_c);
    in = l->inputs[0]->shape.channels / s->groups * cells;
    out = l->shape.channels / s->groups * cells;
    dims[0] = s->out_c, dims[1] = s->in_c / s->groups, dims[2] = s->filter_h, dims[3] = s->filter_w;
    if (!pd_layer_param(l, "weight", 4, dims, in, out, pd_normal(0, 1 / sqrt((double)in)), &o->weight) ||
        (!o->no_bias && !pd_layer_param(l, "bias", 1, &l->shape.channels, 1, 1, pd_constant(0), &o->bias)))
        return pd_error_status(l->net);
    return PD_OK;
}

/* The state, for the rows at hand. */
static pd_conv_shape pd__conv_of(const pd_layer *l) {
    pd_conv_shape s = *(const pd_conv_shape *)l->state;
    s.rows = l->out.rows;
    s.one_answer = pd_layer_mode(l) == PD_PREDICT;
    return s;
}

static pd_status pd__conv_setup(pd_layer *l) {
    pd_conv_shape *s = (pd_conv_shape *)l->state;
    pd_shape in = l->inputs[0]->shape;
    int64_t reach_h, reach_w, padded_h, padded_w;
    if (pd__conv_options(l, s) != PD_OK) return pd_error_status(l->net);
    reach_h = s->dilation_h * (s->filter_h - 1) + 1, reach_w = s->dilation_w * (s->filter_w - 1) + 1;
    padded_h = in.height + 2 * s->pad_h, padded_w = in.width + 2 * s->pad_w;
    if (reach_h > padded_h || reach_w > padded_w)
        return pd_layer_fail(l, PD_E_SHAPE,
                             "filter %lldx%lld does not fit the padded input %lldx%lld coming from "
                             "\"%.100s\" (%s)",
                             (long long)reach_h, (long long)reach_w, (long long)padded_h, (long long)padded_w,
                             l->inputs[0]->name, pd_shape_text(l, in));
    s->in_c = in.channels, s->in_h = in.height, s->in_w = in.width;
    s->out_c = ((const pd__conv_spec *)l->opts)->filters;
    s->out_h = (padded_h - reach_h) / s->stride_h + 1;
    s->out_w = (padded_w - reach_w) / s->stride_w + 1;
    l->shape = pd__shape(s->out_c, s->out_h, s->out_w);
    return pd__conv_params(l, s);
}

/* For the transpose: sets each channel of the output to its bias, or to 0. */
static void pd__channel_bias(pd_layer *l) {
    int64_t c = l->shape.channels, area = l->shape.height * l->shape.width;
    int64_t size[4], as[4] = { 0, 0, 1, 0 }, bs[4] = { 0, 0, 0, 0 }, ys[4];
    size[0] = 1, size[1] = l->out.rows, size[2] = c, size[3] = area;
    ys[0] = 0, ys[1] = c * area, ys[2] = area, ys[3] = 1;
    pd__clear_output(l);
    if (l->param_count > 1) l->device->contract(l->device, size, 1, l->params[1]->value, as, NULL, bs, l->out.data, ys);
}

static void pd__channel_bias_grad(pd_layer *l) {
    int64_t c = l->shape.channels, area = l->shape.height * l->shape.width;
    int64_t size[4], as[4], bs[4] = { 0, 0, 0, 0 }, ys[4] = { 0, 1, 0, 0 };
    size[0] = 1, size[1] = c, size[2] = l->out.rows, size[3] = area;
    as[0] = 0, as[1] = area, as[2] = c * area, as[3] = 1;
    if (l->param_count > 1 && l->params[1]->grad)
        l->device->contract(l->device, size, 1, l->out.grad, as, NULL, bs, l->params[1]->grad, ys);
}

static pd_status pd__conv_forward(pd_layer *l) {
    pd_conv_shape s = pd__conv_of(l);
    pd_epilogue after;
    if (pd_layer_epilogue(l, l->param_count > 1 ? l->params[1]->value : NULL, &after) != PD_OK)
        return pd_error_status(l->net);
    l->device->conv(l->device, &s, pd__in(l, 0)->data, l->params[0]->value, 0, l->out.data, &after);
    return PD_OK;
}

static pd_status pd__conv_backward(pd_layer *l) {
    pd_conv_shape s = pd__conv_of(l);
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    if (l->params[0]->grad) d->conv_backward_filter(d, &s, x->data, l->out.grad, l->params[0]->grad);
    if (x->grad) d->conv_backward_data(d, &s, l->params[0]->value, l->out.grad, x->grad);
    pd__channel_bias_grad(l);
    return PD_OK;
}

PD__ROW_TYPE(pd__conv_type, "conv", 1, 1, pd__conv_spec, sizeof(pd_conv_shape),
             PD_OP(conv) | PD_OP(conv_backward_data) | PD_OP(conv_backward_filter) | PD_OP(contract), pd__conv_setup,
             pd__conv_forward, pd__conv_backward);

/* The state describes the convolution whose data gradient this is: its input is our output. */
static pd_status pd__conv_transpose_setup(pd_layer *l) {
    pd_conv_shape *s = (pd_conv_shape *)l->state;
    pd_shape in = l->inputs[0]->shape;
    if (pd__conv_options(l, s) != PD_OK) return pd_error_status(l->net);
    s->out_c = in.channels, s->out_h = in.height, s->out_w = in.width;
    s->in_c = ((const pd__conv_spec *)l->opts)->filters;
    if (!pd__multiply_sizes(in.height - 1, s->stride_h, &s->in_h) || s->in_h > INT64_MAX / 4 ||
        !pd__multiply_sizes(in.width - 1, s->stride_w, &s->in_w) || s->in_w > INT64_MAX / 4)
        return pd_layer_fail(l, PD_E_SHAPE, "stride %lldx%lld makes the output of \"%.100s\" (%s) too large",
                             (long long)s->stride_h, (long long)s->stride_w, l->inputs[0]->name, pd_shape_text(l, in));
    s->in_h += s->dilation_h * (s->filter_h - 1) + 1 - 2 * s->pad_h;
    s->in_w += s->dilation_w * (s->filter_w - 1) + 1 - 2 * s->pad_w;
    l->shape = pd__shape(s->in_c, s->in_h, s->in_w);
    if (s->in_h < 1 || s->in_w < 1)
        return pd_layer_fail(l, PD_E_SHAPE, "padding %lldx%lld leaves nothing of the output %s", (long long)s->pad_h,
                             (long long)s->pad_w, pd_shape_text(l, l->shape));
    return pd__conv_params(l, s);
}

static pd_status pd__conv_transpose_forward(pd_layer *l) {
    pd_conv_shape s = pd__conv_of(l);
    pd__channel_bias(l);
    l->device->conv_backward_data(l->device, &s, l->params[0]->value, pd__in(l, 0)->data, l->out.data);
    return PD_OK;
}

static pd_status pd__conv_transpose_backward(pd_layer *l) {
    pd_conv_shape s = pd__conv_of(l);
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    if (l->params[0]->grad) d->conv_backward_filter(d, &s, l->out.grad, x->data, l->params[0]->grad);
    if (x->grad) d->conv(d, &s, l->out.grad, l->params[0]->value, 1, x->grad, NULL);
    pd__channel_bias_grad(l);
    return PD_OK;
}

PD__ROW_TYPE(pd__conv_transpose_type, "conv_transpose", 1, 1, pd__conv_spec, sizeof(pd_conv_shape),
             PD_OP(conv) | PD_OP(conv_backward_data) | PD_OP(conv_backward_filter) | PD_OP(contract),
             pd__conv_transpose_setup, pd__conv_transpose_forward, pd__conv_transpose_backward);

static pd_layer *pd__add_conv(pd_net *net, const pd_layer_type *type, pd_layer *input, int64_t filters, int64_t filter,
                              const pd_conv_opts *opts) {
    PD__SPEC(pd__conv_spec);
    s.filters = filters;
    s.filter = filter;
    return pd_layer_add(net, type, s.o.name, &input, 1, &s);
}
PD_DEF pd_layer *pd_conv(pd_net *net, pd_layer *input, int64_t filters, int64_t filter, const pd_conv_opts *opts) {
    return pd__add_conv(net, &pd__conv_type, input, filters, filter, opts);
}
PD_DEF pd_layer *pd_conv_transpose(pd_net *net, pd_layer *input, int64_t filters, int64_t filter,
                                   const pd_conv_opts *opts) {
    return pd__add_conv(net, &pd__conv_transpose_type, input, filters, filter, opts);
}

/* ---- >>layer:pool ---- */

typedef struct pd__pool_spec {
    pd_pool_opts o;
    int64_t size;
} pd__pool_spec;

/* With `ceil` a last window that would begin beyond the image and its left padding is left out. */
static int64_t pd__pooled(int64_t in, int64_t size, int64_t stride, int64_t pad, bool ceil_size) {
    int64_t space = in + 2 * pad - size;
    int64_t out = (ceil_size ? pd__ceil_div(space, stride) : space / stride) + 1;
    return ceil_size && (out - 1) * stride >= in + pad ? out - 1 : out;
}

static pd_status pd__pool_setup(pd_layer *l) {
    const pd__pool_spec *spec = (const pd__pool_spec *)l->opts;
    const pd_pool_opts *o = &spec->o;
    pd_pool_shape *s = (pd_pool_shape *)l->state;
    pd_shape in = l->inputs[0]->shape;
    s->size_w = spec->size;
    s->size_h = o->size_h ? o->size_h : spec->size;
    s->stride_w = o->stride ? o->stride : s->size_w;
    s->stride_h = o->stride_h ? o->stride_h : o->stride ? o->stride : s->size_h;
    s->pad_w = o->pad;
    s->pad_h = pd__or_count(o->pad_h, o->pad);
    s->method = o->method;
    s->channels = in.channels, s->in_h = in.height, s->in_w = in.width;
    if (pd__want_numbers(l) != PD_OK || pd__want_sides(l, "size", s->size_h, s->size_w, 1) != PD_OK ||
        pd__want_sides(l, "stride", s->stride_h, s->stride_w, 1) != PD_OK ||
        pd__want_sides(l, "pad", s->pad_h, s->pad_w, 0) != PD_OK)
        return pd_error_status(l->net);
    if (o->method == PD_FIRST || o->method == PD_LAST)
        return pd_layer_fail(l, PD_E_ARGUMENT, "%s is a method of pd_sequence_pool, not of pd_pool",
                             o->method == PD_FIRST ? "PD_FIRST" : "PD_LAST");
    if ((unsigned)o->method > PD_SQRT_N) return pd_layer_fail(l, PD_E_ARGUMENT, "unknown method %d", (int)o->method);
    if (s->pad_h >= s->size_h || s->pad_w >= s->size_w)
        return pd_layer_fail(l, PD_E_ARGUMENT, "padding %lldx%lld must be below the size %lldx%lld",
                             (long long)s->pad_h, (long long)s->pad_w, (long long)s->size_h, (long long)s->size_w);
    if (s->size_h > in.height + 2 * s->pad_h || s->size_w > in.width + 2 * s->pad_w)
        return pd_layer_fail(l, PD_E_SHAPE,
                             "window %lldx%lld does not fit the padded input coming from \"%.100s\" (%s)",
                             (long long)s->size_h, (long long)s->size_w, l->inputs[0]->name, pd_shape_text(l, in));
    s->out_h = pd__pooled(in.height, s->size_h, s->stride_h, s->pad_h, o->ceil);
    s->out_w = pd__pooled(in.width, s->size_w, s->stride_w, s->pad_w, o->ceil);
    l->shape = pd__shape(in.channels, s->out_h, s->out_w);
    l->act = o->act;
    return PD_OK;
}

/* The state, for the rows at hand. */
static pd_pool_shape pd__pool_of(const pd_layer *l) {
    pd_pool_shape s = *(const pd_pool_shape *)l->state;
    s.rows = l->out.rows;
    return s;
}

static pd_status pd__pool_forward(pd_layer *l) {
    pd_pool_shape s = pd__pool_of(l);
    l->device->pool(l->device, &s, pd__in(l, 0)->data, l->out.data);
    return PD_OK;
}

/* A maximum is found again by comparing with the output; after an activation that is no longer the maximum itself, so
   the outputs are pooled anew. */
static pd_status pd__pool_backward(pd_layer *l) {
    pd_pool_shape s = pd__pool_of(l);
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    const pd_real *y = l->out.data;
    if (!x->grad) return PD_OK;
    if (l->act != PD_LINEAR && s.method == PD_MAX) {
        pd_real *again = pd_layer_row_memory(l, 0, l->out.width);
        if (!again) return PD_E_MEMORY;
        d->pool(d, &s, x->data, again);
        y = again;
    }
    d->pool_backward(d, &s, x->data, y, l->out.grad, x->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__pool_type, "pool", 1, 1, pd__pool_spec, sizeof(pd_pool_shape), PD_OP(pool) | PD_OP(pool_backward),
             pd__pool_setup, pd__pool_forward, pd__pool_backward);

PD_DEF pd_layer *pd_pool(pd_net *net, pd_layer *input, int64_t size, const pd_pool_opts *opts) {
    PD__SPEC(pd__pool_spec);
    s.size = size;
    return pd_layer_add(net, &pd__pool_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:batch_norm ---- */

/* weight and bias, if wanted, come first among the parameters. */
static pd_status pd__scale_and_shift(pd_layer *l, int64_t size, bool wanted, const pd_param_opts *weight,
                                     const pd_param_opts *bias) {
    if (wanted && (!pd_layer_param(l, "weight", 1, &size, 1, 1, pd_constant(1), weight) ||
                   !pd_layer_param(l, "bias", 1, &size, 1, 1, pd_constant(0), bias)))
        return pd_error_status(l->net);
    return PD_OK;
}

static pd_status pd__want_epsilon(pd_layer *l, double epsilon) {
    if (epsilon >= 0 && epsilon <= DBL_MAX) return PD_OK; /* 0: the default */
    return pd_layer_fail(l, PD_E_ARGUMENT, "epsilon is %g, expected a positive number", pd__or(epsilon, 1));
}

static pd_status pd__batch_norm_setup(pd_layer *l) {
    const pd_batch_norm_opts *o = (const pd_batch_norm_opts *)l->opts;
    int64_t channels = l->inputs[0]->shape.channels;
    if (pd__want_numbers(l) != PD_OK) return PD_E_SHAPE;
    if (pd__want_epsilon(l, o->epsilon) != PD_OK) return PD_E_ARGUMENT;
    if (!(pd__or(o->momentum, 0.1) >= 0 && o->momentum <= 1))
        return pd_layer_fail(l, PD_E_ARGUMENT, "momentum is %g, expected 0 (PD_ZERO) .. 1", o->momentum);
    l->shape = l->inputs[0]->shape;
    l->act = o->act;
    if (pd__scale_and_shift(l, channels, !o->no_affine, &o->weight, &o->bias) != PD_OK ||
        !pd_layer_buffer(l, "running_mean", channels, 0) || !pd_layer_buffer(l, "running_var", channels, 1))
        return pd_error_status(l->net);
    return PD_OK;
}

static bool pd__batch_norm_by_batch(const pd_layer *l) {
    return !((const pd_batch_norm_opts *)l->opts)->use_running && pd_layer_mode(l) != PD_PREDICT;
}

/* running = (1 - momentum) running + momentum batch; the variance unbiased, as for a sample of n: one number has none,
   and leaves it as it is. A batch that isn't finite, which the trainer will refuse once it sees the cost, must not
   spoil what was learned. */
static void pd__batch_norm_track(pd_layer *l, const pd_real *moments, double n) {
    double momentum = pd__or(((const pd_batch_norm_opts *)l->opts)->momentum, 0.1);
    int64_t channels = l->shape.channels;
    pd_real *mean = l->params[l->param_count - 2]->value, *variance = l->params[l->param_count - 1]->value;
    if (!pd__finite(l->device->norm(l->device, 3 * channels, moments))) return;
    pd__contract1(l, channels, -momentum, mean, NULL, mean);
    pd__contract1(l, channels, momentum, moments, NULL, mean);
    if (n == 1) return;
    pd__contract1(l, channels, -momentum, variance, NULL, variance);
    pd__contract1(l, channels, momentum * n / (n - 1), moments + 2 * channels, NULL, variance);
}

/* What forward and backward hand to the device. */
typedef struct pd__batch_norm_view {
    const pd_real *mean, *rest, *variance; /* rest NULL: of the running mean */
    pd_param *weight, *bias;               /* NULL without */
    double epsilon;
    int64_t area;
} pd__batch_norm_view;

static pd__batch_norm_view pd__batch_norm_see(pd_layer *l, const pd_real *moments) {
    const pd_batch_norm_opts *o = (const pd_batch_norm_opts *)l->opts;
    pd__batch_norm_view v;
    v.mean = moments ? moments : l->params[l->param_count - 2]->value;
    v.rest = moments ? moments + l->shape.channels : NULL;
    v.variance = moments ? moments + 2 * l->shape.channels : l->params[l->param_count - 1]->value;
    v.weight = o->no_affine ? NULL : l->params[0];
    v.bias = o->no_affine ? NULL : l->params[1];
    v.epsilon = pd__or(o->epsilon, 1e-5);
    v.area = l->shape.height * l->shape.width;
    return v;
}

static pd_status pd__batch_norm_forward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    pd_real *moments = NULL;
    pd__batch_norm_view v;
    if (pd__batch_norm_by_batch(l)) {
        moments = pd_layer_memory(l, 0, 3 * l->shape.channels);
        if (!moments) return PD_E_MEMORY;
    }
    v = pd__batch_norm_see(l, moments);
    if (moments) d->channel_moments(d, x->rows, l->shape.channels, v.area, x->data, moments);
    d->batch_norm(d, x->rows, l->shape.channels, v.area, x->data, v.mean, v.rest, v.variance, v.epsilon,
                  v.weight ? v.weight->value : NULL, v.bias ? v.bias->value : NULL, l->out.data);
    if (moments && x->rows > 0 && pd_layer_mode(l) == PD_TRAIN)
        pd__batch_norm_track(l, moments, (double)(x->rows * v.area));
    return PD_OK;
}

static pd_status pd__batch_norm_backward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    bool by_batch = pd__batch_norm_by_batch(l);
    pd__batch_norm_view v = pd__batch_norm_see(l, by_batch ? pd_layer_memory(l, 0, 3 * l->shape.channels) : NULL);
    d->batch_norm_backward(d, x->rows, l->shape.channels, v.area, x->data, v.mean, v.rest, v.variance, v.epsilon,
                           by_batch, v.weight ? v.weight->value : NULL, l->out.grad, x->grad,
                           v.weight ? v.weight->grad : NULL, v.bias ? v.bias->grad : NULL);
    return PD_OK;
}

/* The scale is the norm of 1 with mean 0. */
static pd_status pd__batch_norm_fold(pd_layer *l, pd_real *scale, pd_real *center, pd_real *shift) {
    pd_device *d = l->device;
    int64_t channels = l->shape.channels;
    pd__batch_norm_view v = pd__batch_norm_see(l, NULL);
    d->fill(d, channels, 0, center);
    d->fill(d, channels, 0, shift);
    d->fill(d, channels, 1, scale);
    d->batch_norm(d, 1, channels, 1, scale, center, NULL, v.variance, v.epsilon, v.weight ? v.weight->value : NULL,
                  NULL, scale);
    pd__contract1(l, channels, 1, v.mean, NULL, center);
    if (v.bias) pd__contract1(l, channels, 1, v.bias->value, NULL, shift);
    return PD_OK;
}

static const pd_layer_type pd__batch_norm_type = { PD_API_VERSION,
                                                   "batch_norm",
                                                   1,
                                                   1,
                                                   sizeof(pd_batch_norm_opts),
                                                   0,
                                                   PD_OP(fill) | PD_OP(contract) | PD_OP(channel_moments) |
                                                       PD_OP(batch_norm) | PD_OP(batch_norm_backward),
                                                   pd__batch_norm_setup,
                                                   NULL,
                                                   pd__batch_norm_forward,
                                                   pd__batch_norm_backward,
                                                   NULL,
                                                   NULL,
                                                   pd__batch_norm_fold,
                                                   0 };

PD_DEF pd_layer *pd_batch_norm(pd_net *net, pd_layer *input, const pd_batch_norm_opts *opts) {
    return pd_layer_add(net, &pd__batch_norm_type, opts ? opts->name : NULL, &input, 1, opts);
}

/* ---- >>layer:layer_norm ---- */

static pd_status pd__layer_norm_setup(pd_layer *l) {
    const pd_layer_norm_opts *o = (const pd_layer_norm_opts *)l->opts;
    if (pd__want_numbers(l) != PD_OK) return PD_E_SHAPE;
    if (pd__want_epsilon(l, o->epsilon) != PD_OK) return PD_E_ARGUMENT;
    l->shape = l->inputs[0]->shape;
    l->act = o->act;
    return pd__scale_and_shift(l, l->inputs[0]->out.width, !o->no_affine, &o->weight, &o->bias);
}

static pd_status pd__layer_norm_forward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    pd_real *moments = pd_layer_row_memory(l, 0, 3);
    if (!moments) return PD_E_MEMORY;
    d->layer_norm(d, x->rows, x->width, x->data, pd__or(((const pd_layer_norm_opts *)l->opts)->epsilon, 1e-5),
                  l->param_count ? l->params[0]->value : NULL, l->param_count ? l->params[1]->value : NULL, moments,
                  l->out.data);
    return PD_OK;
}

static pd_status pd__layer_norm_backward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *x = pd__in(l, 0);
    d->layer_norm_backward(d, x->rows, x->width, x->data, pd_layer_row_memory(l, 0, 3),
                           l->param_count ? l->params[0]->value : NULL, l->out.grad, x->grad,
                           l->param_count ? l->params[0]->grad : NULL, l->param_count ? l->params[1]->grad : NULL);
    return PD_OK;
}

PD__ROW_TYPE(pd__layer_norm_type, "layer_norm", 1, 1, pd_layer_norm_opts, 0,
             PD_OP(layer_norm) | PD_OP(layer_norm_backward), pd__layer_norm_setup, pd__layer_norm_forward,
             pd__layer_norm_backward);

PD_DEF pd_layer *pd_layer_norm(pd_net *net, pd_layer *input, const pd_layer_norm_opts *opts) {
    return pd_layer_add(net, &pd__layer_norm_type, opts ? opts->name : NULL, &input, 1, opts);
}

/* ---- >>layer:group_norm ---- */

typedef struct pd__group_norm_spec {
    pd_group_norm_opts o;
    int64_t groups;
} pd__group_norm_spec;

static pd_status pd__group_norm_setup(pd_layer *l) {
    const pd__group_norm_spec *s = (const pd__group_norm_spec *)l->opts;
    int64_t channels = l->inputs[0]->shape.channels;
    if (pd__want_numbers(l) != PD_OK) return PD_E_SHAPE;
    if (s->groups < 1 || channels % s->groups != 0)
        return pd_layer_fail(l, PD_E_ARGUMENT, "%lld groups do not divide the %lld channels of \"%.100s\"",
                             (long long)s->groups, (long long)channels, l->inputs[0]->name);
    if (pd__want_epsilon(l, s->o.epsilon) != PD_OK) return PD_E_ARGUMENT;
    l->shape = l->inputs[0]->shape;
    l->act = s->o.act;
    return pd__scale_and_shift(l, channels, !s->o.no_affine, &s->o.weight, &s->o.bias);
}

static pd_status pd__group_norm_forward(pd_layer *l) {
    pd_device *d = l->device;
    const pd__group_norm_spec *s = (const pd__group_norm_spec *)l->opts;
    const pd_tensor *x = pd__in(l, 0);
    pd_real *moments = pd_layer_row_memory(l, 0, 3 * s->groups);
    if (!moments) return PD_E_MEMORY;
    d->group_norm(d, x->rows, l->shape.channels, l->shape.height * l->shape.width, s->groups, x->data,
                  pd__or(s->o.epsilon, 1e-5), l->param_count ? l->params[0]->value : NULL,
                  l->param_count ? l->params[1]->value : NULL, moments, l->out.data);
    return PD_OK;
}

static pd_status pd__group_norm_backward(pd_layer *l) {
    pd_device *d = l->device;
    const pd__group_norm_spec *s = (const pd__group_norm_spec *)l->opts;
    const pd_tensor *x = pd__in(l, 0);
    d->group_norm_backward(d, x->rows, l->shape.channels, l->shape.height * l->shape.width, s->groups, x->data,
                           pd_layer_row_memory(l, 0, 3 * s->groups), l->param_count ? l->params[0]->value : NULL,
                           l->out.grad, x->grad, l->param_count ? l->params[0]->grad : NULL,
                           l->param_count ? l->params[1]->grad : NULL);
    return PD_OK;
}

PD__ROW_TYPE(pd__group_norm_type, "group_norm", 1, 1, pd__group_norm_spec, 0,
             PD_OP(group_norm) | PD_OP(group_norm_backward), pd__group_norm_setup, pd__group_norm_forward,
             pd__group_norm_backward);

PD_DEF pd_layer *pd_group_norm(pd_net *net, pd_layer *input, int64_t groups, const pd_group_norm_opts *opts) {
    PD__SPEC(pd__group_norm_spec);
    s.groups = groups;
    return pd_layer_add(net, &pd__group_norm_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:response_norm ---- */

static pd_status pd__response_norm_setup(pd_layer *l) {
    const pd_response_norm_opts *o = (const pd_response_norm_opts *)l->opts;
    if (pd__want_numbers(l) != PD_OK || pd__want_least(l, "size", o->size, 0) != PD_OK ||
        pd__want_finite(l, "alpha", o->alpha) != PD_OK || pd__want_finite(l, "beta", o->beta) != PD_OK ||
        pd__want_finite(l, "k", o->k) != PD_OK)
        return pd_error_status(l->net);
    if (!(pd__or(o->k, 1) > 0 && pd__or(o->alpha, 1e-4) >= 0))
        return pd_layer_fail(l, PD_E_ARGUMENT, "k is %g, expected above 0, and alpha %g, expected at least 0",
                             pd__or(o->k, 1), pd__or(o->alpha, 1e-4));
    l->shape = l->inputs[0]->shape;
    l->act = o->act;
    return PD_OK;
}

static pd_status pd__response_norm_forward(pd_layer *l) {
    const pd_response_norm_opts *o = (const pd_response_norm_opts *)l->opts;
    pd_real *scales = pd_layer_row_memory(l, 0, l->out.width);
    if (!scales) return PD_E_MEMORY;
    l->device->response_norm(l->device, l->out.rows, l->shape.channels, l->shape.height * l->shape.width,
                             o->size ? o->size : 5, pd__or(o->alpha, 1e-4), pd__or(o->beta, 0.75), pd__or(o->k, 1),
                             pd__in(l, 0)->data, scales, l->out.data);
    return PD_OK;
}

static pd_status pd__response_norm_backward(pd_layer *l) {
    const pd_response_norm_opts *o = (const pd_response_norm_opts *)l->opts;
    const pd_tensor *x = pd__in(l, 0);
    if (x->grad)
        l->device->response_norm_backward(l->device, l->out.rows, l->shape.channels, l->shape.height * l->shape.width,
                                          o->size ? o->size : 5, pd__or(o->alpha, 1e-4), pd__or(o->beta, 0.75), x->data,
                                          pd_layer_row_memory(l, 0, l->out.width), l->out.grad, x->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__response_norm_type, "response_norm", 1, 1, pd_response_norm_opts, 0,
             PD_OP(response_norm) | PD_OP(response_norm_backward), pd__response_norm_setup, pd__response_norm_forward,
             pd__response_norm_backward);

PD_DEF pd_layer *pd_response_norm(pd_net *net, pd_layer *input, const pd_response_norm_opts *opts) {
    return pd_layer_add(net, &pd__response_norm_type, opts ? opts->name : NULL, &input, 1, opts);
}

/* ---- >>layer:dropout ---- */

/* The spec of layers whose options are a pd_layer_opts and a few numbers. */
typedef struct pd__spec {
    pd_layer_opts o;
    double a, b;
    int64_t n[6];
} pd__spec;

static const pd__spec *pd__spec_of(const pd_layer *l) { return (const pd__spec *)l->opts; }

/* Shape and activation of layers whose output looks like input k. */
static pd_status pd__like_input(pd_layer *l, int k) {
    l->shape = l->inputs[k]->shape;
    l->act = pd__spec_of(l)->o.act;
    return pd__want_numbers(l);
}

static pd_status pd__dropout_setup(pd_layer *l) {
    double p = pd__spec_of(l)->a;
    if (!(p >= 0 && p < 1)) return pd_layer_fail(l, PD_E_ARGUMENT, "p is %g, expected 0 <= p < 1", p);
    return pd__like_input(l, 0);
}

/* Outside training p is 0. */
static void pd__dropout_apply(pd_layer *l, const pd_real *from, pd_real *to) {
    double p = pd_layer_mode(l) == PD_PREDICT ? 0 : pd__spec_of(l)->a;
    if (p > 0) l->device->dropout(l->device, pd__numbers(l), pd_layer_key(l), p, from, to);
    else pd__contract1(l, pd__numbers(l), 1, from, NULL, to);
}

static pd_status pd__dropout_forward(pd_layer *l) {
    if (pd__pass_on(l)) return PD_OK;
    pd__clear_output(l);
    pd__dropout_apply(l, pd__in(l, 0)->data, l->out.data);
    return PD_OK;
}

static pd_status pd__dropout_backward(pd_layer *l) {
    if (pd__in(l, 0)->grad) pd__dropout_apply(l, l->out.grad, pd__in(l, 0)->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__dropout_type, "dropout", 1, 1, pd__spec, 0, PD_OP(fill) | PD_OP(contract) | PD_OP(dropout),
             pd__dropout_setup, pd__dropout_forward, pd__dropout_backward);

PD_DEF pd_layer *pd_dropout(pd_net *net, pd_layer *input, double p, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.a = p;
    return pd_layer_add(net, &pd__dropout_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:add, >>layer:multiply ---- */

static pd_status pd__equal_inputs_setup(pd_layer *l) {
    for (int k = 1; k < l->input_count; k++)
        if (pd__want_shape(l, k, l->inputs[0]->shape) != PD_OK) return PD_E_SHAPE;
    return pd__like_input(l, 0);
}

static pd_status pd__add_forward(pd_layer *l) {
    pd__clear_output(l);
    for (int k = 0; k < l->input_count; k++) pd__contract1(l, pd__numbers(l), 1, pd__in(l, k)->data, NULL, l->out.data);
    return PD_OK;
}

static pd_status pd__add_backward(pd_layer *l) {
    for (int k = 0; k < l->input_count; k++)
        if (pd__in(l, k)->grad) pd__contract1(l, pd__numbers(l), 1, l->out.grad, NULL, pd__in(l, k)->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__add_type, "add", 1, -1, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__equal_inputs_setup,
             pd__add_forward, pd__add_backward);

PD_DEF pd_layer *pd_add(pd_net *net, pd_layer *const *inputs, int count, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    return pd_layer_add(net, &pd__add_type, s.o.name, inputs, count, &s);
}

static pd_status pd__multiply_forward(pd_layer *l) {
    pd__clear_output(l);
    pd__contract1(l, pd__numbers(l), 1, pd__in(l, 0)->data, pd__in(l, 1)->data, l->out.data);
    return PD_OK;
}

static pd_status pd__multiply_backward(pd_layer *l) {
    for (int k = 0; k < 2; k++)
        if (pd__in(l, k)->grad)
            pd__contract1(l, pd__numbers(l), 1, l->out.grad, pd__in(l, 1 - k)->data, pd__in(l, k)->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__multiply_type, "multiply", 2, 2, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__equal_inputs_setup,
             pd__multiply_forward, pd__multiply_backward);

/* The builder's work for layers of two inputs; `number` is the spec's a. */
static pd_layer *pd__add_pair(pd_net *net, const pd_layer_type *type, pd_layer *first, pd_layer *second, double number,
                              const pd_layer_opts *opts) {
    pd_layer *inputs[2];
    PD__SPEC(pd__spec);
    s.a = number;
    inputs[0] = first, inputs[1] = second;
    return pd_layer_add(net, type, s.o.name, inputs, 2, &s);
}

PD_DEF pd_layer *pd_multiply(pd_net *net, pd_layer *a, pd_layer *b, const pd_layer_opts *opts) {
    return pd__add_pair(net, &pd__multiply_type, a, b, 0, opts);
}

/* ---- >>layer:concat ---- */

static pd_status pd__concat_setup(pd_layer *l) {
    pd_shape shape = l->inputs[0]->shape;
    for (int k = 1; k < l->input_count; k++) {
        pd_shape other = l->inputs[k]->shape;
        if (other.height != shape.height || other.width != shape.width)
            return pd_layer_fail(
                l, PD_E_SHAPE, "input \"%.100s\" is %s, \"%.100s\" is %s: heights and widths must be equal",
                l->inputs[k]->name, pd_shape_text(l, other), l->inputs[0]->name, pd_shape_text(l, l->inputs[0]->shape));
        if (other.channels > INT64_MAX - shape.channels)
            return pd_layer_fail(l, PD_E_SHAPE, "its inputs have too many channels");
        shape.channels += other.channels;
    }
    l->act = pd__spec_of(l)->o.act;
    l->shape = shape;
    return pd__want_numbers(l);
}

static pd_status pd__concat_forward(pd_layer *l) {
    pd_real *to = l->out.data;
    pd__clear_output(l);
    for (int k = 0; k < l->input_count; to += pd__in(l, k)->width, k++) {
        const pd_tensor *x = pd__in(l, k);
        pd__contract2(l, x->rows, x->width, 1, x->data, x->width, 1, NULL, 0, 0, to, l->out.width, 1);
    }
    return PD_OK;
}

static pd_status pd__concat_backward(pd_layer *l) {
    const pd_real *from = l->out.grad;
    for (int k = 0; k < l->input_count; from += pd__in(l, k)->width, k++) {
        const pd_tensor *x = pd__in(l, k);
        if (x->grad) pd__contract2(l, x->rows, x->width, 1, from, l->out.width, 1, NULL, 0, 0, x->grad, x->width, 1);
    }
    return PD_OK;
}

PD__ROW_TYPE(pd__concat_type, "concat", 1, -1, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__concat_setup,
             pd__concat_forward, pd__concat_backward);

PD_DEF pd_layer *pd_concat(pd_net *net, pd_layer *const *inputs, int count, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    return pd_layer_add(net, &pd__concat_type, s.o.name, inputs, count, &s);
}

/* ---- >>layer:slice, >>layer:reshape, >>layer:transpose, >>layer:pad: a box of the input moves to a box of the output
   ---- */

typedef struct pd__box {
    int64_t size[4];        /* of three axes; the first stays 0 */
    int64_t x[4], y[4];     /* strides in input and output */
    int64_t x_from, y_from; /* where the box begins in a row */
} pd__box;

/* Strides of a row-major row of this shape, behind that of the rows. */
static void pd__row_strides(pd_shape s, int64_t strides[4]) {
    strides[0] = pd_shape_size(s);
    strides[1] = s.height * s.width;
    strides[2] = s.width;
    strides[3] = 1;
}

/* Moves `box` channels x height x width with plain strides on both sides; setups then change what differs. */
static void pd__plain_box(pd_layer *l, pd_shape box) {
    pd__box *b = (pd__box *)l->state;
    b->size[1] = box.channels, b->size[2] = box.height, b->size[3] = box.width;
    pd__row_strides(l->inputs[0]->shape, b->x);
    pd__row_strides(l->shape, b->y);
    l->act = pd__spec_of(l)->o.act;
}

/* y += x for the box of every row, from the input's side to the output's, or, if `back`, from there. */
static void pd__move_box(pd_layer *l, const pd_real *from, pd_real *to, bool back) {
    const pd__box *b = (const pd__box *)l->state;
    static const int64_t none[4] = { 0, 0, 0, 0 };
    int64_t size[4];
    memcpy(size, b->size, sizeof size);
    size[0] = l->out.rows;
    from += back ? b->y_from : b->x_from;
    to += back ? b->x_from : b->y_from;
    l->device->contract(l->device, size, 1, from, back ? b->y : b->x, NULL, none, to, back ? b->x : b->y);
}

static pd_status pd__box_forward(pd_layer *l) {
    pd__clear_output(l);
    pd__move_box(l, pd__in(l, 0)->data, l->out.data, false);
    return PD_OK;
}

static pd_status pd__box_backward(pd_layer *l) {
    if (pd__in(l, 0)->grad) pd__move_box(l, l->out.grad, pd__in(l, 0)->grad, true);
    return PD_OK;
}

static pd_status pd__slice_setup(pd_layer *l) {
    const int64_t *n = pd__spec_of(l)->n; /* first, count */
    pd_shape in = l->inputs[0]->shape;
    if (n[0] < 0 || n[1] < 1 || n[0] > in.channels || n[1] > in.channels - n[0])
        return pd_layer_fail(l, PD_E_SHAPE, "%lld channels from %lld on are not all in \"%.100s\" (%s)",
                             (long long)n[1], (long long)n[0], l->inputs[0]->name, pd_shape_text(l, in));
    l->shape = pd__shape(n[1], in.height, in.width);
    pd__plain_box(l, l->shape);
    ((pd__box *)l->state)->x_from = n[0] * in.height * in.width;
    return pd__want_numbers(l);
}

static pd_status pd__reshape_setup(pd_layer *l) {
    const int64_t *n = pd__spec_of(l)->n;
    int64_t size = 1;
    l->shape = pd__shape(n[0], n[1], n[2]);
    for (int i = 0; i < 3; i++)
        if (n[i] < 1 || !pd__multiply_sizes(size, n[i], &size)) size = 0;
    if (size != l->inputs[0]->out.width)
        return pd_layer_fail(l, PD_E_SHAPE, "%s is not as many numbers as \"%.100s\" has (%s)",
                             pd_shape_text(l, l->shape), l->inputs[0]->name, pd_shape_text(l, l->inputs[0]->shape));
    pd__plain_box(l, l->shape);
    pd__row_strides(l->shape, ((pd__box *)l->state)->x);
    return pd__want_numbers(l);
}

static pd_status pd__transpose_setup(pd_layer *l) {
    const int64_t *order = pd__spec_of(l)->n;
    pd_shape in = l->inputs[0]->shape;
    int64_t sizes[3], strides[4], *x = ((pd__box *)l->state)->x;
    bool seen[3] = { false, false, false };
    for (int i = 0; i < 3; i++) {
        if (order[i] < 0 || order[i] > 2 || seen[order[i]])
            return pd_layer_fail(l, PD_E_ARGUMENT, "order {%lld, %lld, %lld} is not a permutation of 0, 1, 2",
                                 (long long)order[0], (long long)order[1], (long long)order[2]);
        seen[order[i]] = true;
    }
    sizes[0] = in.channels, sizes[1] = in.height, sizes[2] = in.width;
    pd__row_strides(in, strides);
    l->shape = pd__shape(sizes[order[0]], sizes[order[1]], sizes[order[2]]);
    pd__plain_box(l, l->shape);
    for (int i = 0; i < 3; i++) x[i + 1] = strides[order[i] + 1];
    return pd__want_numbers(l);
}

static pd_status pd__pad_setup(pd_layer *l) {
    const int64_t *pad = pd__spec_of(l)->n;
    pd_shape in = l->inputs[0]->shape;
    int64_t size;
    for (int i = 0; i < 6; i++)
        if (pd__want_sides(l, "pad", pad[i], pad[i], 0) != PD_OK) return PD_E_ARGUMENT;
    l->shape = pd__shape(in.channels + pad[0] + pad[1], in.height + pad[2] + pad[3], in.width + pad[4] + pad[5]);
    if (!pd__row_size(l->shape, &size))
        return pd_layer_fail(l, PD_E_SHAPE, "output %s is too large", pd_shape_text(l, l->shape));
    pd__plain_box(l, in);
    ((pd__box *)l->state)->y_from = (pad[0] * l->shape.height + pad[2]) * l->shape.width + pad[4];
    return pd__want_numbers(l);
}

PD__ROW_TYPE(pd__slice_type, "slice", 1, 1, pd__spec, sizeof(pd__box), PD_OP(fill) | PD_OP(contract), pd__slice_setup,
             pd__box_forward, pd__box_backward);
PD__ROW_TYPE(pd__reshape_type, "reshape", 1, 1, pd__spec, sizeof(pd__box), PD_OP(fill) | PD_OP(contract),
             pd__reshape_setup, pd__box_forward, pd__box_backward);
PD__ROW_TYPE(pd__transpose_type, "transpose", 1, 1, pd__spec, sizeof(pd__box), PD_OP(fill) | PD_OP(contract),
             pd__transpose_setup, pd__box_forward, pd__box_backward);
PD__ROW_TYPE(pd__pad_type, "pad", 1, 1, pd__spec, sizeof(pd__box), PD_OP(fill) | PD_OP(contract), pd__pad_setup,
             pd__box_forward, pd__box_backward);

PD_DEF pd_layer *pd_slice(pd_net *net, pd_layer *input, int64_t first, int64_t count, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.n[0] = first, s.n[1] = count;
    return pd_layer_add(net, &pd__slice_type, s.o.name, &input, 1, &s);
}
PD_DEF pd_layer *pd_reshape(pd_net *net, pd_layer *input, pd_shape shape, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.n[0] = shape.channels, s.n[1] = shape.height, s.n[2] = shape.width;
    return pd_layer_add(net, &pd__reshape_type, s.o.name, &input, 1, &s);
}
PD_DEF pd_layer *pd_transpose(pd_net *net, pd_layer *input, const int order[3], const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    for (int i = 0; i < 3; i++) s.n[i] = order ? order[i] : -1;
    return pd_layer_add(net, &pd__transpose_type, s.o.name, &input, 1, &s);
}
PD_DEF pd_layer *pd_pad(pd_net *net, pd_layer *input, const int64_t pad[6], const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    for (int i = 0; i < 6; i++) s.n[i] = pad ? pad[i] : -1;
    return pd_layer_add(net, &pd__pad_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:scale, >>layer:interpolate: where w is one number per row, its "column stride" is 0 ---- */

static pd_status pd__scale_setup(pd_layer *l) {
    if (pd__want_shape(l, 0, pd__shape(1, 1, 1)) != PD_OK) return PD_E_SHAPE;
    return pd__like_input(l, 1);
}

static pd_status pd__scale_forward(pd_layer *l) {
    int64_t n = l->out.width;
    pd__clear_output(l);
    pd__contract2(l, l->out.rows, n, 1, pd__in(l, 1)->data, n, 1, pd__in(l, 0)->data, 1, 0, l->out.data, n, 1);
    return PD_OK;
}

static pd_status pd__scale_backward(pd_layer *l) {
    int64_t n = l->out.width, rows = l->out.rows;
    const pd_tensor *w = pd__in(l, 0), *x = pd__in(l, 1);
    if (w->grad) pd__contract2(l, rows, n, 1, l->out.grad, n, 1, x->data, n, 1, w->grad, 1, 0);
    if (x->grad) pd__contract2(l, rows, n, 1, l->out.grad, n, 1, w->data, 1, 0, x->grad, n, 1);
    return PD_OK;
}

PD__ROW_TYPE(pd__scale_type, "scale", 2, 2, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__scale_setup,
             pd__scale_forward, pd__scale_backward);

PD_DEF pd_layer *pd_scale(pd_net *net, pd_layer *w, pd_layer *x, const pd_layer_opts *opts) {
    return pd__add_pair(net, &pd__scale_type, w, x, 0, opts);
}

static pd_status pd__interpolate_setup(pd_layer *l) {
    pd_shape w = l->inputs[0]->shape, shape = l->inputs[1]->shape;
    if (!pd__same_shape(w, pd__shape(1, 1, 1)) && !pd__same_shape(w, shape))
        return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" is %s, expected 1 or %s", l->inputs[0]->name,
                             pd_shape_text(l, w), pd_shape_text(l, shape));
    if (pd__want_shape(l, 2, shape) != PD_OK) return PD_E_SHAPE;
    return pd__like_input(l, 1);
}

/* 1 - w: b + w (a - b), or w a + b - w b, would round to the larger of the two. */
static pd_real *pd__interpolate_rest(pd_layer *l) {
    const pd_tensor *w = pd__in(l, 0);
    pd_real *rest = pd_layer_row_memory(l, 0, w->width);
    if (!rest) return NULL;
    l->device->fill(l->device, w->rows * w->width, 1, rest);
    pd__contract1(l, w->rows * w->width, -1, w->data, NULL, rest);
    return rest;
}

static pd_status pd__interpolate_forward(pd_layer *l) {
    const pd_tensor *w = pd__in(l, 0);
    int64_t n = l->out.width, rows = l->out.rows, wr = w->width, wc = w->width > 1;
    const pd_real *rest = pd__interpolate_rest(l);
    if (!rest) return PD_E_MEMORY;
    pd__clear_output(l);
    pd__contract2(l, rows, n, 1, pd__in(l, 1)->data, n, 1, w->data, wr, wc, l->out.data, n, 1);
    pd__contract2(l, rows, n, 1, pd__in(l, 2)->data, n, 1, rest, wr, wc, l->out.data, n, 1);
    return PD_OK;
}

static pd_status pd__interpolate_backward(pd_layer *l) {
    const pd_tensor *w = pd__in(l, 0), *a = pd__in(l, 1), *b = pd__in(l, 2);
    int64_t n = l->out.width, rows = l->out.rows, wr = w->width, wc = w->width > 1;
    const pd_real *dy = l->out.grad, *rest = pd__interpolate_rest(l);
    if (!rest) return PD_E_MEMORY;
    if (w->grad) { /* of a - b, not of each */
        pd_real *difference = pd_layer_row_memory(l, 1, n);
        if (!difference) return PD_E_MEMORY;
        l->device->fill(l->device, rows * n, 0, difference);
        pd__contract1(l, rows * n, 1, a->data, NULL, difference);
        pd__contract1(l, rows * n, -1, b->data, NULL, difference);
        pd__contract2(l, rows, n, 1, dy, n, 1, difference, n, 1, w->grad, wr, wc);
    }
    if (a->grad) pd__contract2(l, rows, n, 1, dy, n, 1, w->data, wr, wc, a->grad, n, 1);
    if (b->grad) pd__contract2(l, rows, n, 1, dy, n, 1, rest, wr, wc, b->grad, n, 1);
    return PD_OK;
}

PD__ROW_TYPE(pd__interpolate_type, "interpolate", 3, 3, pd__spec, 0, PD_OP(fill) | PD_OP(contract),
             pd__interpolate_setup, pd__interpolate_forward, pd__interpolate_backward);

PD_DEF pd_layer *pd_interpolate(pd_net *net, pd_layer *w, pd_layer *a, pd_layer *b, const pd_layer_opts *opts) {
    pd_layer *inputs[3];
    PD__SPEC(pd__spec);
    inputs[0] = w, inputs[1] = a, inputs[2] = b;
    return pd_layer_add(net, &pd__interpolate_type, s.o.name, inputs, 3, &s);
}

/* ---- >>layer:affine ---- */

static pd_status pd__affine_setup(pd_layer *l) {
    if (pd__want_finite(l, "slope", pd__spec_of(l)->a) != PD_OK ||
        pd__want_finite(l, "intercept", pd__spec_of(l)->b) != PD_OK)
        return PD_E_ARGUMENT;
    return pd__like_input(l, 0);
}

static pd_status pd__affine_forward(pd_layer *l) {
    l->device->fill(l->device, pd__numbers(l), (pd_real)pd__spec_of(l)->b, l->out.data);
    pd__contract1(l, pd__numbers(l), pd__spec_of(l)->a, pd__in(l, 0)->data, NULL, l->out.data);
    return PD_OK;
}

static pd_status pd__affine_backward(pd_layer *l) {
    if (pd__in(l, 0)->grad) pd__contract1(l, pd__numbers(l), pd__spec_of(l)->a, l->out.grad, NULL, pd__in(l, 0)->grad);
    return PD_OK;
}

PD__ROW_TYPE(pd__affine_type, "affine", 1, 1, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__affine_setup,
             pd__affine_forward, pd__affine_backward);

PD_DEF pd_layer *pd_affine(pd_net *net, pd_layer *input, double slope, double intercept, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.a = slope, s.b = intercept;
    return pd_layer_add(net, &pd__affine_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:maxout ---- */

static pd_status pd__maxout_setup(pd_layer *l) {
    int64_t groups = pd__spec_of(l)->n[0];
    pd_shape in = l->inputs[0]->shape;
    if (groups < 1 || in.channels % groups)
        return pd_layer_fail(l, PD_E_SHAPE, "%lld groups do not divide the %lld channels of \"%.100s\"",
                             (long long)groups, (long long)in.channels, l->inputs[0]->name);
    l->shape = pd__shape(in.channels / groups, in.height, in.width);
    l->act = pd__spec_of(l)->o.act;
    return pd__want_numbers(l);
}

/* Where in x the number stands that output i takes: the first largest of its group, or the first NaN. */
static int64_t pd__maxout_source(const pd_layer *l, int64_t i) {
    int64_t area = l->shape.height * l->shape.width, groups = pd__spec_of(l)->n[0];
    const pd_real *x = pd__in(l, 0)->data;
    int64_t best = i / area * groups * area + i % area, first = best;
    for (int64_t g = 1; g < groups; g++)
        if (!(x[first + g * area] <= x[best]) && x[best] == x[best]) best = first + g * area;
    return best;
}

static pd_status pd__maxout_forward(pd_layer *l) {
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t i = 0; i < pd__numbers(l); i++) l->out.data[i] = pd__in(l, 0)->data[pd__maxout_source(l, i)];
    return PD_OK;
}

static pd_status pd__maxout_backward(pd_layer *l) {
    pd_real *dx = pd__in(l, 0)->grad;
    if (!dx) return PD_OK;
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t i = 0; i < pd__numbers(l); i++) dx[pd__maxout_source(l, i)] += l->out.grad[i];
    return PD_OK;
}

PD__ROW_TYPE(pd__maxout_type, "maxout", 1, 1, pd__spec, 0, 0, pd__maxout_setup, pd__maxout_forward,
             pd__maxout_backward);

PD_DEF pd_layer *pd_maxout(pd_net *net, pd_layer *input, int64_t groups, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.n[0] = groups;
    return pd_layer_add(net, &pd__maxout_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:resize ---- */

static pd_status pd__resize_setup(pd_layer *l) {
    const int64_t *n = pd__spec_of(l)->n; /* height, width */
    if (pd__want_least(l, "height", n[0], 1) != PD_OK || pd__want_least(l, "width", n[1], 1) != PD_OK)
        return pd_error_status(l->net);
    l->shape = pd__shape(l->inputs[0]->shape.channels, n[0], n[1]);
    l->act = pd__spec_of(l)->o.act;
    return pd__want_numbers(l);
}

/* The four cells that output (h, w) mixes, and their weights. */
static void pd__resize_taps(const pd_layer *l, int64_t h, int64_t w, int64_t cell[4], pd_real weight[4]) {
    pd_shape in = l->inputs[0]->shape, out = l->shape;
    double y = out.height > 1 ? (double)h * (double)(in.height - 1) / (double)(out.height - 1) : 0;
    double x = out.width > 1 ? (double)w * (double)(in.width - 1) / (double)(out.width - 1) : 0;
    int64_t top = (int64_t)y, left = (int64_t)x;
    int64_t bottom = pd__min(top + 1, in.height - 1), right = pd__min(left + 1, in.width - 1);
    double b = y - (double)top, r = x - (double)left;
    cell[0] = top * in.width + left, weight[0] = (pd_real)((1 - b) * (1 - r));
    cell[1] = top * in.width + right, weight[1] = (pd_real)((1 - b) * r);
    cell[2] = bottom * in.width + left, weight[2] = (pd_real)(b * (1 - r));
    cell[3] = bottom * in.width + right, weight[3] = (pd_real)(b * r);
}

/* One map: from x to y, or, if dx isn't NULL, from dy into dx. */
static void pd__resize_map(const pd_layer *l, const pd_real *x, pd_real *y, const pd_real *dy, pd_real *dx) {
    int64_t cell[4];
    pd_real weight[4];
    for (int64_t i = 0; i < l->shape.height * l->shape.width; i++) {
        pd__resize_taps(l, i / l->shape.width, i % l->shape.width, cell, weight);
        if (!dx) y[i] = 0;
        for (int k = 0; k < 4; k++) {
            if (dx) dx[cell[k]] += weight[k] * dy[i];
            else y[i] += weight[k] * x[cell[k]];
        }
    }
}

static pd_status pd__resize_forward(pd_layer *l) {
    pd_shape in = l->inputs[0]->shape;
    int64_t in_area = in.height * in.width, area = l->shape.height * l->shape.width;
    PD__PARALLEL(l->device, pd__numbers(l) * 4)
    for (int64_t m = 0; m < l->out.rows * in.channels; m++)
        pd__resize_map(l, pd__in(l, 0)->data + m * in_area, l->out.data + m * area, NULL, NULL);
    return PD_OK;
}

static pd_status pd__resize_backward(pd_layer *l) {
    pd_shape in = l->inputs[0]->shape;
    int64_t in_area = in.height * in.width, area = l->shape.height * l->shape.width;
    if (!pd__in(l, 0)->grad) return PD_OK;
    PD__PARALLEL(l->device, pd__numbers(l) * 4)
    for (int64_t m = 0; m < l->out.rows * in.channels; m++)
        pd__resize_map(l, NULL, NULL, l->out.grad + m * area, pd__in(l, 0)->grad + m * in_area);
    return PD_OK;
}

PD__ROW_TYPE(pd__resize_type, "resize", 1, 1, pd__spec, 0, 0, pd__resize_setup, pd__resize_forward,
             pd__resize_backward);

PD_DEF pd_layer *pd_resize(pd_net *net, pd_layer *input, int64_t height, int64_t width, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.n[0] = height, s.n[1] = width;
    return pd_layer_add(net, &pd__resize_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:block_expand ---- */

typedef struct pd__block_expand_spec {
    pd_block_expand_opts o;
    int64_t height, width;
} pd__block_expand_spec;

/* The state is the convolution whose patches the blocks are; their number per image is out_h * out_w. */
static pd_status pd__block_expand_setup(pd_layer *l) {
    const pd__block_expand_spec *spec = (const pd__block_expand_spec *)l->opts;
    pd_conv_shape *s = (pd_conv_shape *)l->state;
    pd_shape in = l->inputs[0]->shape;
    int64_t blocks, size;
    s->filter_h = spec->height, s->filter_w = spec->width;
    s->stride_w = spec->o.stride ? spec->o.stride : spec->width;
    s->stride_h = spec->o.stride_h ? spec->o.stride_h : spec->o.stride ? spec->o.stride : spec->height;
    s->pad_w = spec->o.pad;
    s->pad_h = pd__or_count(spec->o.pad_h, spec->o.pad);
    s->dilation_h = s->dilation_w = s->groups = 1;
    s->in_c = in.channels, s->in_h = in.height, s->in_w = in.width;
    if (pd__want_numbers(l) != PD_OK || pd__want_sides(l, "block", s->filter_h, s->filter_w, 1) != PD_OK ||
        pd__want_sides(l, "stride", s->stride_h, s->stride_w, 1) != PD_OK ||
        pd__want_sides(l, "pad", s->pad_h, s->pad_w, 0) != PD_OK)
        return pd_error_status(l->net);
    if (l->inputs[0]->is_sequence)
        return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" already carries sequences", l->inputs[0]->name);
    if (s->filter_h > in.height + 2 * s->pad_h || s->filter_w > in.width + 2 * s->pad_w)
        return pd_layer_fail(l, PD_E_SHAPE, "block %lldx%lld does not fit the padded input coming from \"%.100s\" (%s)",
                             (long long)s->filter_h, (long long)s->filter_w, l->inputs[0]->name, pd_shape_text(l, in));
    s->out_h = (in.height + 2 * s->pad_h - s->filter_h) / s->stride_h + 1;
    s->out_w = (in.width + 2 * s->pad_w - s->filter_w) / s->stride_w + 1;
    if (!pd__multiply_sizes(s->out_h, s->out_w, &blocks) ||
        !pd__multiply_sizes(in.channels, s->filter_h * s->filter_w, &size))
        return pd_layer_fail(l, PD_E_SHAPE, "%lldx%lld blocks of %lldx%lldx%lld are too many or too large",
                             (long long)s->out_h, (long long)s->out_w, (long long)in.channels, (long long)s->filter_h,
                             (long long)s->filter_w);
    l->shape = pd__shape(size, 1, 1);
    l->is_sequence = true;
    l->act = spec->o.act;
    return PD_OK;
}

static pd_status pd__block_expand_resize(pd_layer *l) {
    const pd_conv_shape *s = (const pd_conv_shape *)l->state;
    int64_t images = pd__in(l, 0)->rows, blocks = s->out_h * s->out_w, rows;
    int64_t *starts = pd_layer_integers(l, 0, images + 1);
    if (!starts) return PD_E_MEMORY;
    if (!pd__multiply_sizes(images, blocks, &rows))
        return pd_layer_fail(l, PD_E_MEMORY, "out of memory for %lld blocks of each of %lld images", (long long)blocks,
                             (long long)images);
    for (int64_t i = 0; i <= images; i++) starts[i] = i * blocks;
    l->out.rows = rows;
    l->out.sequences = images;
    l->out.starts = starts;
    return PD_OK;
}

/* Row `row` of the output from its image, or back into the image's gradient. */
static void pd__block_expand_row(const pd_layer *l, int64_t row, bool back) {
    const pd_conv_shape *s = (const pd_conv_shape *)l->state;
    int64_t block = row % (s->out_h * s->out_w), image = row / (s->out_h * s->out_w);
    int64_t top = block / s->out_w * s->stride_h - s->pad_h, left = block % s->out_w * s->stride_w - s->pad_w;
    int64_t from = image * s->in_c * s->in_h * s->in_w, i = row * l->out.width;
    for (int64_t c = 0; c < s->in_c; c++)
        for (int64_t h = top; h < top + s->filter_h; h++)
            for (int64_t w = left; w < left + s->filter_w; w++, i++) {
                bool inside = h >= 0 && h < s->in_h && w >= 0 && w < s->in_w;
                int64_t cell = from + (c * s->in_h + h) * s->in_w + w;
                if (!back) l->out.data[i] = inside ? pd__in(l, 0)->data[cell] : 0;
                else if (inside) pd__in(l, 0)->grad[cell] += l->out.grad[i];
            }
}

static pd_status pd__block_expand_forward(pd_layer *l) {
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t r = 0; r < l->out.rows; r++) pd__block_expand_row(l, r, false);
    return PD_OK;
}

/* Blocks of one image may overlap, so each image is one thread's. */
static pd_status pd__block_expand_backward(pd_layer *l) {
    int64_t images = l->out.sequences;
    if (!pd__in(l, 0)->grad) return PD_OK;
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t i = 0; i < images; i++)
        for (int64_t r = l->out.starts[i]; r < l->out.starts[i + 1]; r++) pd__block_expand_row(l, r, true);
    return PD_OK;
}

PD__TYPE(pd__block_expand_type, "block_expand", 1, 1, pd__block_expand_spec, sizeof(pd_conv_shape), 0,
         pd__block_expand_setup, pd__block_expand_resize, pd__block_expand_forward, pd__block_expand_backward);

PD_DEF pd_layer *pd_block_expand(pd_net *net, pd_layer *input, int64_t height, int64_t width,
                                 const pd_block_expand_opts *opts) {
    PD__SPEC(pd__block_expand_spec);
    s.height = height, s.width = width;
    return pd_layer_add(net, &pd__block_expand_type, s.o.name, &input, 1, &s);
}

/* ---- >>layer:cosine ---- */

static pd_status pd__cosine_setup(pd_layer *l) {
    int64_t a = l->inputs[0]->out.width, b = l->inputs[1]->out.width;
    if (b % a)
        return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" (%s) does not hold whole vectors of \"%.100s\" (%s)",
                             l->inputs[1]->name, pd_shape_text(l, l->inputs[1]->shape), l->inputs[0]->name,
                             pd_shape_text(l, l->inputs[0]->shape));
    if (pd__want_finite(l, "scale", pd__spec_of(l)->a) != PD_OK) return PD_E_ARGUMENT;
    l->shape = pd__shape(b / a, 1, 1);
    l->act = pd__spec_of(l)->o.act;
    return pd__want_numbers(l);
}

/* A vector, and what makes its largest number about 1: then no square is too large or too small for a number. */
typedef struct pd__scaled {
    const pd_real *numbers;
    double scale, square; /* of the scaled vector */
} pd__scaled;

static pd__scaled pd__scale_vector(int64_t n, const pd_real *numbers) {
    pd__scaled v = { numbers, 1, 0 };
    double largest = 0;
    int exponent;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)numbers[i]));
    if (largest > 0 && largest <= DBL_MAX) {
        frexp(largest, &exponent);
        v.scale = ldexp(1, -exponent > 1000 ? 1000 : -exponent);
    }
    for (int64_t i = 0; i < n; i++) v.square += (double)numbers[i] * v.scale * ((double)numbers[i] * v.scale);
    return v;
}

static double pd__scaled_dot(int64_t n, const pd__scaled *a, const pd__scaled *b) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a->numbers[i] * a->scale * ((double)b->numbers[i] * b->scale);
    return sum;
}

static pd_status pd__cosine_forward(pd_layer *l) {
    const pd_tensor *a = pd__in(l, 0), *b = pd__in(l, 1);
    int64_t each = l->out.width;
    PD__PARALLEL(l->device, b->rows * b->width)
    for (int64_t i = 0; i < pd__numbers(l); i++) {
        pd__scaled x = pd__scale_vector(a->width, a->data + i / each * a->width);
        pd__scaled y = pd__scale_vector(a->width, b->data + i * a->width);
        double dot = pd__scaled_dot(a->width, &x, &y), norms = sqrt(x.square) * sqrt(y.square);
        l->out.data[i] = norms == 0 ? 0 : (pd_real)(pd__spec_of(l)->a * dot / norms);
    }
    return PD_OK;
}

/* With c = s a.b / (|a||b|): dc/da = s b / (|a||b|) - c a / |a|^2, and the same for b. */
static pd_status pd__cosine_backward(pd_layer *l) {
    const pd_tensor *a = pd__in(l, 0), *b = pd__in(l, 1);
    int64_t n = a->width, each = l->out.width;
    PD__PARALLEL(l->device, b->rows * b->width)
    for (int64_t r = 0; r < l->out.rows; r++)
        for (int64_t i = r * each; i < (r + 1) * each; i++) {
            pd__scaled x = pd__scale_vector(n, a->data + r * n), y = pd__scale_vector(n, b->data + i * n);
            double dot = pd__scaled_dot(n, &x, &y), norms = sqrt(x.square) * sqrt(y.square);
            double slope = (double)l->out.grad[i] * pd__spec_of(l)->a / norms;
            for (int64_t k = 0; norms != 0 && k < n; k++) {
                double p = (double)x.numbers[k] * x.scale, q = (double)y.numbers[k] * y.scale;
                if (a->grad) a->grad[r * n + k] += (pd_real)(slope * x.scale * (q - dot / x.square * p));
                if (b->grad) b->grad[i * n + k] += (pd_real)(slope * y.scale * (p - dot / y.square * q));
            }
        }
    return PD_OK;
}

PD__ROW_TYPE(pd__cosine_type, "cosine", 2, 2, pd__spec, 0, 0, pd__cosine_setup, pd__cosine_forward,
             pd__cosine_backward);

PD_DEF pd_layer *pd_cosine(pd_net *net, pd_layer *a, pd_layer *b, double scale, const pd_layer_opts *opts) {
    return pd__add_pair(net, &pd__cosine_type, a, b, scale, opts);
}

/* ---- >>layer:outer ---- */

static pd_status pd__outer_setup(pd_layer *l) {
    l->shape = pd__shape(1, l->inputs[0]->out.width, l->inputs[1]->out.width);
    l->act = pd__spec_of(l)->o.act;
    return pd__want_numbers(l);
}

/* The box rows x |a| x |b|, and the strides of a, b and y in it. */
typedef struct pd__outer_box {
    int64_t size[4], a[4], b[4], y[4];
} pd__outer_box;

static pd__outer_box pd__outer_box_of(const pd_layer *l) {
    int64_t m = pd__in(l, 0)->width, n = pd__in(l, 1)->width;
    pd__outer_box o;
    memset(&o, 0, sizeof o);
    o.size[0] = 1, o.size[1] = l->out.rows, o.size[2] = m, o.size[3] = n;
    o.a[1] = m, o.a[2] = 1;
    o.b[1] = n, o.b[3] = 1;
    o.y[1] = m * n, o.y[2] = n, o.y[3] = 1;
    return o;
}

static pd_status pd__outer_forward(pd_layer *l) {
    pd__outer_box o = pd__outer_box_of(l);
    pd__clear_output(l);
    l->device->contract(l->device, o.size, 1, pd__in(l, 1)->data, o.b, pd__in(l, 0)->data, o.a, l->out.data, o.y);
    return PD_OK;
}

static pd_status pd__outer_backward(pd_layer *l) {
    pd__outer_box o = pd__outer_box_of(l);
    const pd_tensor *a = pd__in(l, 0), *b = pd__in(l, 1);
    if (a->grad) l->device->contract(l->device, o.size, 1, l->out.grad, o.y, b->data, o.b, a->grad, o.a);
    if (b->grad) l->device->contract(l->device, o.size, 1, l->out.grad, o.y, a->data, o.a, b->grad, o.b);
    return PD_OK;
}

PD__ROW_TYPE(pd__outer_type, "outer", 2, 2, pd__spec, 0, PD_OP(fill) | PD_OP(contract), pd__outer_setup,
             pd__outer_forward, pd__outer_backward);

PD_DEF pd_layer *pd_outer(pd_net *net, pd_layer *a, pd_layer *b, const pd_layer_opts *opts) {
    return pd__add_pair(net, &pd__outer_type, a, b, 0, opts);
}

/* ---- >>layer:bilinear ---- */

static pd_status pd__bilinear_setup(pd_layer *l) {
    const pd__fc_spec *s = (const pd__fc_spec *)l->opts;
    int64_t dims[3];
    if (pd__want_least(l, "size", s->size, 1) != PD_OK || pd__want_numbers(l) != PD_OK) return pd_error_status(l->net);
    dims[0] = s->size, dims[1] = l->inputs[0]->out.width, dims[2] = l->inputs[1]->out.width;
    if (!pd_layer_param(l, "weight", 3, dims, dims[1], s->size, pd_normal(0, 1 / sqrt((double)dims[1])),
                        &s->o.weight) ||
        (!s->o.no_bias && !pd_layer_param(l, "bias", 1, &s->size, 1, 1, pd_constant(0), &s->o.bias)))
        return pd_error_status(l->net);
    l->shape = pd__shape(s->size, 1, 1);
    l->act = s->o.act;
    return PD_OK;
}

/* For each k: t = a W_k (rows x |b|), then y_k = row sums of t b. */
static pd_status pd__bilinear_forward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *a = pd__in(l, 0), *b = pd__in(l, 1);
    int64_t rows = l->out.rows, m = a->width, n = b->width, size = l->out.width;
    pd_real *t = pd_layer_row_memory(l, 0, pd__max(m, n));
    if (!t) return PD_E_MEMORY;
    pd__clear_output(l);
    for (int64_t k = 0; k < size; k++) {
        d->gemm(d, false, false, rows, n, m, 1, a->data, m, l->params[0]->value + k * m * n, n, 0, t, n, NULL);
        pd__contract2(l, rows, n, 1, t, n, 1, b->data, n, 1, l->out.data + k, size, 0);
    }
    if (l->param_count > 1) pd__add_bias(l, l->params[1]);
    return PD_OK;
}

/* t = dy_k x, row by row */
static void pd__bilinear_weigh(pd_layer *l, int64_t k, const pd_tensor *x, pd_real *t) {
    l->device->fill(l->device, x->rows * x->width, 0, t);
    pd__contract2(l, x->rows, x->width, 1, x->data, x->width, 1, l->out.grad + k, l->out.width, 0, t, x->width, 1);
}

/* With t = dy_k a: dW_k += t^T b and db += t W_k. With t = dy_k b: da += t W_k^T. */
static pd_status pd__bilinear_backward(pd_layer *l) {
    pd_device *d = l->device;
    const pd_tensor *a = pd__in(l, 0), *b = pd__in(l, 1);
    int64_t rows = l->out.rows, m = a->width, n = b->width;
    pd_real *t = pd_layer_row_memory(l, 0, pd__max(m, n));
    for (int64_t k = 0; k < l->out.width; k++) {
        const pd_real *w = l->params[0]->value + k * m * n;
        pd__bilinear_weigh(l, k, a, t);
        if (l->params[0]->grad)
            d->gemm(d, true, false, m, n, rows, 1, t, m, b->data, n, 1, l->params[0]->grad + k * m * n, n, NULL);
        if (b->grad) d->gemm(d, false, false, rows, n, m, 1, t, m, w, n, 1, b->grad, n, NULL);
        if (!a->grad) continue;
        pd__bilinear_weigh(l, k, b, t);
        d->gemm(d, false, true, rows, m, n, 1, t, n, w, n, 1, a->grad, m, NULL);
    }
    if (l->param_count > 1) pd__add_bias_grad(l, l->params[1]);
    return PD_OK;
}

PD__ROW_TYPE(pd__bilinear_type, "bilinear", 2, 2, pd__fc_spec, 0, PD_OP(gemm) | PD_OP(fill) | PD_OP(contract),
             pd__bilinear_setup, pd__bilinear_forward, pd__bilinear_backward);

PD_DEF pd_layer *pd_bilinear(pd_net *net, pd_layer *a, pd_layer *b, int64_t size, const pd_fc_opts *opts) {
    pd_layer *inputs[2];
    PD__SPEC(pd__fc_spec);
    s.size = size;
    inputs[0] = a, inputs[1] = b;
    return pd_layer_add(net, &pd__bilinear_type, s.o.name, inputs, 2, &s);
}

/* ---- >>layer:activation, >>layer:prelu ---- */

/* The output starts as a copy of the input; the net applies the activation, as after any layer. */
static pd_status pd__activation_setup(pd_layer *l) {
    l->act_alpha = pd__spec_of(l)->a;
    return pd__like_input(l, 0);
}

PD__ROW_TYPE(pd__activation_type, "activation", 1, 1, pd__spec, 0,
             PD_OP(fill) | PD_OP(contract) | PD_OP(activate) | PD_OP(activate_backward), pd__activation_setup,
             pd__add_forward, pd__add_backward);

PD_DEF pd_layer *pd_activation(pd_net *net, pd_layer *input, pd_act act, const pd_activation_opts *opts) {
    pd__spec s;
    memset(&s, 0, sizeof s);
    s.o.act = act;
    s.a = opts ? opts->alpha : 0;
    return pd_layer_add(net, &pd__activation_type, opts ? opts->name : NULL, &input, 1, &s);
}

static pd_status pd__prelu_setup(pd_layer *l) {
    const pd_prelu_opts *o = (const pd_prelu_opts *)l->opts;
    l->shape = l->inputs[0]->shape;
    if (pd__want_numbers(l) != PD_OK ||
        !pd_layer_param(l, "weight", 1, &l->shape.channels, 1, 1, pd_constant(0.25), &o->weight))
        return pd_error_status(l->net);
    return PD_OK;
}

static pd_status pd__prelu_forward(pd_layer *l) {
    int64_t area = l->shape.height * l->shape.width;
    const pd_real *x = pd__in(l, 0)->data;
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t i = 0; i < pd__numbers(l); i++)
        l->out.data[i] = x[i] < 0 ? x[i] * l->params[0]->value[i / area % l->shape.channels] : x[i];
    return PD_OK;
}

static pd_status pd__prelu_backward(pd_layer *l) {
    int64_t area = l->shape.height * l->shape.width, channels = l->shape.channels;
    const pd_tensor *x = pd__in(l, 0);
    pd_param *slope = l->params[0];
    PD__PARALLEL(l->device, pd__numbers(l))
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t r = 0; r < l->out.rows; r++)
            for (int64_t i = (r * channels + c) * area; i < (r * channels + c + 1) * area; i++) {
                if (x->data[i] < 0) sum += (double)x->data[i] * (double)l->out.grad[i];
                if (x->grad) x->grad[i] += l->out.grad[i] * (x->data[i] < 0 ? slope->value[c] : 1);
            }
        if (slope->grad) slope->grad[c] += (pd_real)sum;
    }
    return PD_OK;
}

PD__ROW_TYPE(pd__prelu_type, "prelu", 1, 1, pd_prelu_opts, 0, 0, pd__prelu_setup, pd__prelu_forward,
             pd__prelu_backward);

PD_DEF pd_layer *pd_prelu(pd_net *net, pd_layer *input, const pd_prelu_opts *opts) {
    return pd_layer_add(net, &pd__prelu_type, opts ? opts->name : NULL, &input, 1, opts);
}

/* ---- >>layer:embedding ---- */

typedef struct pd__embedding_spec {
    pd_embedding_opts o;
    int64_t size;
} pd__embedding_spec;

static pd_status pd__embedding_setup(pd_layer *l) {
    const pd__embedding_spec *s = (const pd__embedding_spec *)l->opts;
    const pd_layer *ids = l->inputs[0];
    int64_t dims[2];
    pd_param *table;
    if (pd__want_least(l, "size", s->size, 1) != PD_OK) return PD_E_ARGUMENT;
    if (!ids->is_ids || ids->is_sparse)
        return pd_layer_fail(l, PD_E_SHAPE, "input \"%.100s\" holds %s, expected ids; pd_fc takes them", ids->name,
                             ids->is_sparse ? "sparse rows" : "numbers");
    dims[0] = ids->out.width, dims[1] = s->size;
    table = pd_layer_param(l, "weight", 2, dims, 1, s->size, pd_normal(0, 1 / sqrt((double)s->size)), &s->o.weight);
    if (!table || pd__want_picked(l, 0, table) != PD_OK) return pd_error_status(l->net);
    l->shape = pd__shape(s->size, 1, 1);
    l->act = s->o.act;
    return PD_OK;
}

static pd_status pd__embedding_forward(pd_layer *l) {
    pd_status status = pd__check_ids(l, 0);
    if (status != PD_OK) return status;
    pd__clear_output(l);
    pd__add_picked(l, 0);
    return PD_OK;
}

static pd_status pd__embedding_backward(pd_layer *l) { return l->params[0]->grad ? pd__add_picked_grad(l, 0) : PD_OK; }

PD__TABLE_TYPE(pd__embedding_type, "embedding", 1, 1, pd__embedding_spec, 0, PD_OP(fill) | PD_OP(sparse_product),
               pd__embedding_setup, pd__embedding_forward, pd__embedding_backward, pd__touch_tables);

PD_DEF pd_layer *pd_embedding(pd_net *net, pd_layer *ids, int64_t size, const pd_embedding_opts *opts) {
    PD__SPEC(pd__embedding_spec);
    s.size = size;
    return pd_layer_add(net, &pd__embedding_type, s.o.name, &ids, 1, &s);
}

/* ---- time order: for layers that run sequences side by side ----
   Inside, rows lie in order of time: step t has row t (from the end if reversed) of every sequence that is longer than
   t, longer sequences first. So each step's sequences are the first ones of the step before, and what a step needs of
   it stands in one piece. The net keeps the orders of a run, one for each set of offsets and direction, and their memory
   for later runs. */

typedef struct pd__order pd__order;
struct pd__order {
    int64_t sequences, rows, steps;
    bool reverse;
    int64_t *starts;    /* the offsets it was made of, a copy */
    int64_t *begins;    /* steps + 1 offsets of the steps' rows */
    int64_t *order;     /* for each row inside, the one outside, */
    int64_t *places;    /* and the reverse */
    int64_t *before;    /* for each row inside from step 1 on, the one of its sequence in the step before */
    int64_t *sentences; /* the sequences, longest first: row i of every step is of sequence sentences[i], */
    int64_t *ranks;     /* and the reverse */
    int64_t *memory;    /* what all of these stand in */
    int64_t capacity;
    bool used; /* in this run */
    pd__order *next;
};

static void pd__orders_free(pd_net *net) {
    while (net->orders) {
        pd__order *o = net->orders;
        net->orders = o->next;
        pd_free(&net->allocator, o->memory);
        pd_free(&net->allocator, o);
    }
}

/* A run begins. */
static void pd__orders_forget(pd_net *net) {
    for (pd__order *o = net->orders; o; o = o->next) o->used = false;
    for (pd_group *g = net->groups; g; g = g->next) g->order = NULL;
}

static bool pd__order_fits(const pd__order *o, const pd_tensor *x, bool reverse) {
    return o->reverse == reverse && o->rows == x->rows && o->sequences == x->sequences &&
           memcmp(o->starts, x->starts, (size_t)(x->sequences + 1) * sizeof *x->starts) == 0;
}

/* One that this run does not use, with room for x's rows; NULL when out of memory. */
static pd__order *pd__spare_order(pd_net *net, const pd_tensor *x) {
    int64_t sizes[7], *next, total = 0;
    pd__order *o = net->orders;
    while (o && o->used) o = o->next;
    if (!o) {
        o = (pd__order *)pd_alloc(&net->allocator, 1, sizeof *o);
        if (!o) return NULL;
        o->next = net->orders;
        net->orders = o;
    }
    o->sequences = -1; /* should memory be missing, it fits nothing */
    sizes[0] = x->sequences + 1, sizes[1] = sizes[2] = sizes[3] = sizes[4] = x->rows + 1;
    sizes[5] = sizes[6] = x->sequences;
    for (int i = 0; i < PD__COUNT(sizes); i++) total += sizes[i];
    if (!pd_grow(&net->allocator, (void **)&o->memory, &o->capacity, total, sizeof *o->memory)) return NULL;
    next = o->memory;
    o->starts = next, next += sizes[0];
    o->begins = next, next += sizes[1];
    o->order = next, next += sizes[2];
    o->places = next, next += sizes[3];
    o->before = next, next += sizes[4];
    o->sentences = next, next += sizes[5];
    o->ranks = next;
    return o;
}

/* Sorts the sequences by counting their lengths, in `before`, and so finds the ranks and the steps' beginnings. */
static void pd__rank_sequences(pd__order *o) {
    int64_t *next = o->before, longer = 0;
    o->steps = 0;
    for (int64_t q = 0; q < o->sequences; q++) o->steps = pd__max(o->steps, o->starts[q + 1] - o->starts[q]);
    memset(next, 0, (size_t)(o->steps + 1) * sizeof *next);
    for (int64_t q = 0; q < o->sequences; q++) next[o->starts[q + 1] - o->starts[q]]++;
    for (int64_t length = o->steps; length >= 0; length--) { /* next: the sequences longer than that */
        int64_t equal = next[length];
        next[length] = longer;
        longer += equal;
    }
    o->begins[0] = 0;
    for (int64_t t = 0; t < o->steps; t++) o->begins[t + 1] = o->begins[t] + next[t];
    for (int64_t q = 0; q < o->sequences; q++) {
        o->ranks[q] = next[o->starts[q + 1] - o->starts[q]]++;
        o->sentences[o->ranks[q]] = q;
    }
}

static void pd__place_rows(pd__order *o) {
    for (int64_t q = 0; q < o->sequences; q++) {
        int64_t length = o->starts[q + 1] - o->starts[q];
        for (int64_t t = 0; t < length; t++) {
            int64_t row = o->starts[q] + (o->reverse ? length - 1 - t : t);
            o->places[row] = o->begins[t] + o->ranks[q];
            o->order[o->places[row]] = row;
        }
    }
    for (int64_t t = 1; t < o->steps; t++)
        for (int64_t i = o->begins[t]; i < o->begins[t + 1]; i++) o->before[i] = i - o->begins[t] + o->begins[t - 1];
}

/* For resize: the time order of x's rows, valid until the net's next run. NULL (message set) when out of memory. */
static const pd__order *pd__time_order(pd_layer *l, const pd_tensor *x, bool reverse) {
    pd__order *o = l->net->orders;
    while (o && !pd__order_fits(o, x, reverse)) o = o->next;
    if (!o) {
        o = pd__spare_order(l->net, x);
        if (!o) {
            pd_layer_fail(l, PD_E_MEMORY, "out of memory for the order of %lld rows", (long long)x->rows);
            return NULL;
        }
        o->sequences = x->sequences, o->rows = x->rows, o->reverse = reverse;
        memcpy(o->starts, x->starts, (size_t)(x->sequences + 1) * sizeof *x->starts);
        pd__rank_sequences(o);
        pd__place_rows(o);
    }
    o->used = true;
    return o;
}

/* For setup: input 0 carries sequences. */
static pd_status pd__want_sequences(pd_layer *l) {
    if (l->inputs[0]->is_sequence) return PD_OK;
    return pd_layer_fail(l, PD_E_SHAPE,
                         "input \"%.100s\" carries no sequences; pd_sequence makes a net's input carry them",
                         l->inputs[0]->name);
}

/* The order in which the rows of a layer in a group's loop lie; NULL: it is in none. While a group generates all its
   layers are like that. */
static const pd__order *pd__step_order(const pd_layer *l) {
    const pd_group *g = l->own->group;
    return l->own->loop || (g && g->generating) ? g->order : NULL;
}

/* y (rows x width) = rows `columns` of x, or, with `add`, += */
static void pd__take_rows(pd_layer *l, int64_t rows, const int64_t *columns, int64_t width, const pd_real *x,
                          pd_real *y, bool add) {
    pd_csr s;
    s.rows = rows;
    s.starts = NULL;
    s.columns = columns;
    s.values = NULL;
    if (!add) l->device->fill(l->device, rows * width, 0, y);
    l->device->sparse_product(l->device, &s, width, x, y);
}

/* ---- first states: layers with one row per sequence, which recurrent layers have as further inputs ---- */

/* For setup: input k is one, of so many numbers. */
static pd_status pd__want_first(pd_layer *l, int k, int64_t size) {
    const pd_layer *first = l->inputs[k];
    if (first->is_sequence)
        return pd_layer_fail(l, PD_E_SHAPE,
                             "first state \"%.100s\" carries sequences, expected one row for each of \"%.100s\"",
                             first->name, l->inputs[0]->name);
    if (first->out.width == size) return PD_OK;
    return pd_layer_fail(l, PD_E_SHAPE, "first state \"%.100s\" is %s, expected %lld numbers", first->name,
                         pd_shape_text(l, first->shape), (long long)size);
}

/* For resize: all of them have a row for each sequence. */
static pd_status pd__check_first(pd_layer *l) {
    for (int k = 1; k < l->input_count; k++)
        if (pd__in(l, k)->rows != pd__in(l, 0)->sequences)
            return pd_layer_fail(l, PD_E_SHAPE,
                                 "first state \"%.100s\" has %lld rows, but \"%.100s\" has %lld sequences",
                                 l->inputs[k]->name, (long long)pd__in(l, k)->rows, l->inputs[0]->name,
                                 (long long)pd__in(l, 0)->sequences);
    return PD_OK;
}

/* ---- >>layer:gru ---- */

typedef struct pd__gru {
    const pd__order *order;
} pd__gru;

typedef struct pd__gru_spec {
    pd_gru_opts o;
    int64_t size;
} pd__gru_spec;

enum { PD__GRU_WEIGHT, PD__GRU_RECURRENT, PD__GRU_BIAS, PD__GRU_RECURRENT_BIAS }; /* parameters */

static pd_status pd__gru_setup(pd_layer *l) {
    const pd__gru_spec *s = (const pd__gru_spec *)l->opts;
    int64_t in = l->inputs[0]->out.width, dims[2];
    if (pd__want_least(l, "size", s->size, 1) != PD_OK || pd__want_numbers(l) != PD_OK ||
        pd__want_sequences(l) != PD_OK)
        return pd_error_status(l->net);
    if (!pd__multiply_sizes(3, s->size, &dims[1]))
        return pd_layer_fail(l, PD_E_ARGUMENT, "size %lld is too large", (long long)s->size);
    dims[0] = in;
    if (!pd_layer_param(l, "weight", 2, dims, in, s->size, pd_normal(0, 1 / sqrt((double)in)), &s->o.weight))
        return pd_error_status(l->net);
    dims[0] = s->size;
    if (!pd_layer_param(l, "recurrent", 2, dims, s->size, s->size, pd_normal(0, 1 / sqrt((double)s->size)),
                        &s->o.recurrent) ||
        !pd_layer_param(l, "bias", 1, &dims[1], 1, 1, pd_constant(0), &s->o.bias) ||
        !pd_layer_param(l, "recurrent_bias", 1, &s->size, 1, 1, pd_constant(0), &s->o.recurrent_bias))
        return pd_error_status(l->net);
    l->shape = pd__shape(s->size, 1, 1);
    return l->input_count > 1 ? pd__want_first(l, 1, s->size) : PD_OK;
}

static pd_status pd__gru_resize(pd_layer *l) {
    pd__gru *g = (pd__gru *)l->state;
    if (pd__check_first(l) != PD_OK) return PD_E_SHAPE;
    g->order = pd__time_order(l, pd__in(l, 0), ((const pd__gru_spec *)l->opts)->o.reverse);
    return g->order ? PD_OK : PD_E_MEMORY;
}

/* The layer's memory: rows in order of time. gates and recurrent are three times `size` wide; see pd_op_gru. h0: what
   step 0 begins with, by rows of a step, or NULL. */
typedef struct pd__gru_memory {
    pd_real *x, *gates, *recurrent, *h, *h0;
} pd__gru_memory;

static bool pd__gru_remember(pd_layer *l, pd__gru_memory *m) {
    m->x = pd_layer_row_memory(l, 0, pd__in(l, 0)->width);
    m->gates = pd_layer_row_memory(l, 1, 3 * l->out.width);
    m->recurrent = pd_layer_row_memory(l, 2, 3 * l->out.width);
    m->h = pd_layer_row_memory(l, 3, l->out.width);
    m->h0 = l->input_count > 1 ? pd_layer_memory(l, 5, pd__in(l, 0)->sequences * l->out.width) : NULL;
    return m->x && m->gates && m->recurrent && m->h && (m->h0 || l->input_count == 1);
}

static void pd__gru_forward_steps(pd_layer *l, const pd__order *o, const pd__gru_memory *m) {
    pd_device *d = l->device;
    int64_t n = l->out.width;
    for (int64_t t = 0; t < o->steps; t++) {
        int64_t first = o->begins[t], count = o->begins[t + 1] - first;
        const pd_real *before = t ? m->h + o->begins[t - 1] * n : m->h0;
        if (before)
            d->gemm(d, false, false, count, 3 * n, n, 1, before, n, l->params[PD__GRU_RECURRENT]->value, 3 * n, 1,
                    m->recurrent + first * 3 * n, 3 * n, NULL);
        d->gru(d, count, n, m->gates + first * 3 * n, m->recurrent + first * 3 * n, before, m->h + first * n);
    }
}

static pd_status pd__gru_forward(pd_layer *l) {
    const pd__order *o = ((const pd__gru *)l->state)->order;
    pd_device *d = l->device;
    int64_t rows = l->out.rows, in = pd__in(l, 0)->width, n = l->out.width;
    pd_epilogue bias = PD__ZERO;
    pd__gru_memory m;
    if (!pd__gru_remember(l, &m)) return PD_E_MEMORY;
    if (m.h0) pd__take_rows(l, o->sequences, o->sentences, n, pd__in(l, 1)->data, m.h0, false);
    pd__take_rows(l, rows, o->order, in, pd__in(l, 0)->data, m.x, false);
    bias.bias = l->params[PD__GRU_BIAS]->value;
    d->gemm(d, false, false, rows, 3 * n, in, 1, m.x, in, l->params[PD__GRU_WEIGHT]->value, 3 * n, 0, m.gates, 3 * n,
            &bias);
    d->fill(d, rows * 3 * n, 0, m.recurrent);
    pd__contract2(l, rows, n, 1, l->params[PD__GRU_RECURRENT_BIAS]->value, 0, 1, NULL, 0, 0, m.recurrent + 2 * n, 3 * n,
                  1);
    pd__gru_forward_steps(l, o, &m);
    pd__take_rows(l, rows, o->places, n, m.h, l->out.data, false);
    return PD_OK;
}

/* From the last step to the first, gates and recurrent become their own gradients, dh the whole gradient of h, and dh0,
   if it isn't NULL, that of h0. */
static void pd__gru_backward_steps(pd_layer *l, const pd__order *o, const pd__gru_memory *m, pd_real *dh,
                                   pd_real *dh0) {
    pd_device *d = l->device;
    int64_t n = l->out.width;
    for (int64_t t = o->steps; t-- > 0;) {
        int64_t first = o->begins[t], count = o->begins[t + 1] - first, last = t ? o->begins[t - 1] : 0;
        pd_real *drecurrent = m->recurrent + first * 3 * n, *dbefore = t ? dh + last * n : dh0;
        d->gru_backward(d, count, n, m->gates + first * 3 * n, drecurrent, t ? m->h + last * n : m->h0, dh + first * n,
                        dbefore);
        if (dbefore)
            d->gemm(d, false, true, count, n, 3 * n, 1, drecurrent, 3 * n, l->params[PD__GRU_RECURRENT]->value, 3 * n,
                    1, dbefore, n, NULL);
    }
}

/* Adds to the gradients of the parameters, from those of gates and recurrent; `began` is memory for the h that each row
   began with. */
static void pd__gru_learn(pd_layer *l, const pd__order *o, const pd__gru_memory *m, pd_real *began) {
    pd_device *d = l->device;
    int64_t rows = l->out.rows, in = pd__in(l, 0)->width, n = l->out.width;
    int64_t later = o->steps > 1 ? o->begins[1] : rows, from = m->h0 ? 0 : later;
    pd_param *const *p = l->params;
    if (p[PD__GRU_BIAS]->grad)
        pd__contract2(l, rows, 3 * n, 1, m->gates, 3 * n, 1, NULL, 0, 0, p[PD__GRU_BIAS]->grad, 0, 1);
    if (p[PD__GRU_RECURRENT_BIAS]->grad)
        pd__contract2(l, rows, n, 1, m->recurrent + 2 * n, 3 * n, 1, NULL, 0, 0, p[PD__GRU_RECURRENT_BIAS]->grad, 0, 1);
    if (p[PD__GRU_WEIGHT]->grad)
        d->gemm(d, true, false, in, 3 * n, rows, 1, m->x, in, m->gates, 3 * n, 1, p[PD__GRU_WEIGHT]->grad, 3 * n, NULL);
    if (!p[PD__GRU_RECURRENT]->grad) return;
    if (m->h0) pd__take_rows(l, later, o->sentences, n, pd__in(l, 1)->data, began, false);
    pd__take_rows(l, rows - later, o->before + later, n, m->h, began + later * n, false);
    d->gemm(d, true, false, n, 3 * n, rows - from, 1, began + from * n, n, m->recurrent + from * 3 * n, 3 * n, 1,
            p[PD__GRU_RECURRENT]->grad, 3 * n, NULL);
}

/* Once dh and x have done their duty, they are reused: for the h that each row began with, and for dx. */
static pd_status pd__gru_backward(pd_layer *l) {
    const pd__order *o = ((const pd__gru *)l->state)->order;
    int64_t rows = l->out.rows, in = pd__in(l, 0)->width, n = l->out.width;
    pd_real *dh = pd_layer_row_memory(l, 4, n), *dh0 = NULL;
    pd__gru_memory m;
    if (!dh || !pd__gru_remember(l, &m)) return PD_E_MEMORY;
    if (m.h0 && pd__in(l, 1)->grad) {
        dh0 = pd_layer_memory(l, 6, o->sequences * n);
        if (!dh0) return PD_E_MEMORY;
        l->device->fill(l->device, o->sequences * n, 0, dh0); /* empty sequences have none */
    }
    pd__take_rows(l, rows, o->order, n, l->out.grad, dh, false);
    pd__gru_backward_steps(l, o, &m, dh, dh0);
    pd__gru_learn(l, o, &m, dh);
    if (dh0) pd__take_rows(l, o->sequences, o->ranks, n, dh0, pd__in(l, 1)->grad, true);
    if (pd__in(l, 0)->grad) {
        l->device->gemm(l->device, false, true, rows, in, 3 * n, 1, m.gates, 3 * n, l->params[PD__GRU_WEIGHT]->value,
                        3 * n, 0, m.x, in, NULL);
        pd__take_rows(l, rows, o->places, in, m.x, pd__in(l, 0)->grad, true);
    }
    return PD_OK;
}

PD__TYPE(pd__gru_type, "gru", 1, 2, pd__gru_spec, sizeof(pd__gru),
         PD_OP(gemm) | PD_OP(fill) | PD_OP(contract) | PD_OP(sparse_product) | PD_OP(gru) | PD_OP(gru_backward),
         pd__gru_setup, pd__gru_resize, pd__gru_forward, pd__gru_backward);

PD_DEF pd_layer *pd_gru(pd_net *net, pd_layer *input, int64_t size, const pd_gru_opts *opts) {
    pd_layer *inputs[2];
    PD__SPEC(pd__gru_spec);
    s.size = size;
    inputs[0] = input, inputs[1] = s.o.first;
    return pd_layer_add(net, &pd__gru_type, s.o.name, inputs, s.o.first ? 2 : 1, &s);
}

/* ---- >>layer:attention ---- */

typedef struct pd__attention {
    int64_t weights;   /* of all rows */
    bool has_summands; /* of v's gradient, which are still to be summed up: see backward */
} pd__attention;

enum { PD__QUERY, PD__KEYS, PD__VALUES }; /* inputs */

static pd_status pd__attention_setup(pd_layer *l) {
    const pd_attention_opts *o = (const pd_attention_opts *)l->opts;
    const pd_layer *query = l->inputs[PD__QUERY], *keys = l->inputs[PD__KEYS];
    int64_t width = query->out.width;
    if (pd__want_numbers(l) != PD_OK) return PD_E_SHAPE;
    for (int k = PD__KEYS; k <= PD__VALUES; k++)
        if (!l->inputs[k]->is_sequence)
            return pd_layer_fail(l, PD_E_SHAPE, "its %s, \"%.100s\", carry no sequences",
                                 k == PD__KEYS ? "keys" : "values", l->inputs[k]->name);
    if (keys->out.width != width)
        return pd_layer_fail(l, PD_E_SHAPE,
                             "its query, \"%.100s\", has %lld numbers per row, but its keys, \"%.100s\", %lld",
                             query->name, (long long)width, keys->name, (long long)keys->out.width);
    l->shape = l->inputs[PD__VALUES]->shape;
    return pd_layer_param(l, "weight", 1, &width, width, 1, pd_normal(0, 1 / sqrt((double)width)), &o->weight)
               ? PD_OK
               : pd_error_status(l->net);
}

/* The first of all rows of the batch that the layer sees. */
static int64_t pd__first_row(const pd_layer *l) {
    const pd_group *g = l->own->loop;
    return g && g->step > 0 ? g->order->begins[g->step] : 0;
}

/* What the queries of all rows look at; see pd_attention_shape. Keeps their number of weights. */
static pd_status pd__attention_place(pd_layer *l) {
    pd__attention *state = (pd__attention *)l->state;
    const pd_tensor *query = pd__in(l, PD__QUERY), *keys = pd__in(l, PD__KEYS);
    int64_t *spans = pd_layer_integers(l, 0, 3 * query->rows), weights = 0;
    const pd__order *o = pd__step_order(l);
    if (!spans) return PD_E_MEMORY;
    for (int64_t q = 0, r = 0, t = 0; r < query->rows; r++, spans += 3) {
        if (o) { /* in order of time */
            while (r >= o->begins[t + 1]) t++;
            q = o->sentences[r - o->begins[t]];
        } else
            while (r >= (query->starts ? query->starts[q + 1] : q + 1)) q++;
        spans[0] = keys->starts[q], spans[1] = keys->starts[q + 1], spans[2] = weights;
        weights += spans[1] - spans[0];
    }
    state->weights = weights;
    return PD_OK;
}

static pd_status pd__attention_resize(pd_layer *l) {
    const pd_layer *query = l->inputs[PD__QUERY], *keys = l->inputs[PD__KEYS];
    const pd__order *order = pd__step_order(l);
    int64_t queries = order ? order->sequences : query->out.starts ? query->out.sequences : query->out.rows;
    char text[400];
    if (!pd__rows_fit(keys, l->inputs[PD__VALUES], text)) return pd_layer_fail(l, PD_E_SHAPE, "%s", text);
    if (queries != keys->out.sequences)
        return pd_layer_fail(l, PD_E_SHAPE, "\"%.100s\" has %lld %s, but \"%.100s\" has %lld sequences", query->name,
                             (long long)queries, query->is_sequence ? "sequences" : "rows", keys->name,
                             (long long)keys->out.sequences);
    return pd__attention_place(l);
}

static pd_attention_shape pd__attention_shape_of(const pd_layer *l) {
    pd_attention_shape s;
    s.rows = l->out.rows;
    s.width = pd__in(l, PD__QUERY)->width;
    s.value_width = l->out.width;
    s.spans = l->own->integers[0] + 3 * pd__first_row(l);
    return s;
}

static pd_real *pd__attention_memory(pd_layer *l) {
    return pd_layer_memory(l, 0, ((const pd__attention *)l->state)->weights);
}

static pd_status pd__attention_forward(pd_layer *l) {
    pd_attention_shape s = pd__attention_shape_of(l);
    pd_real *weights = pd__attention_memory(l);
    if (!weights) return PD_E_MEMORY;
    ((pd__attention *)l->state)->has_summands = false;
    l->device->attention(l->device, &s, pd__in(l, PD__QUERY)->data, pd__in(l, PD__KEYS)->data,
                         pd__in(l, PD__VALUES)->data, l->params[0]->value, weights, l->out.data);
    return PD_OK;
}

/* The gradient of v is a sum over rows. Its summands come with the gradients of the inputs; if these are asked for alone,
   they stay in memory per row, and the next call that asks for v's alone, over all rows, has only to sum them up. */
static pd_status pd__attention_backward(pd_layer *l) {
    pd__attention *state = (pd__attention *)l->state;
    const pd_tensor *query = pd__in(l, PD__QUERY), *keys = pd__in(l, PD__KEYS), *values = pd__in(l, PD__VALUES);
    pd_param *v = l->params[0];
    bool to_inputs = query->grad || keys->grad || values->grad;
    pd_attention_shape s = pd__attention_shape_of(l);
    pd_real *weights = pd__attention_memory(l), *dv = NULL;
    if (!weights) return PD_E_MEMORY;
    if (!to_inputs && !v->grad) return PD_OK;
    if (!v->opts.is_static && !(dv = pd_layer_row_memory(l, 1, s.width))) return PD_E_MEMORY;
    if (to_inputs || (v->grad && !state->has_summands))
        l->device->attention_backward(l->device, &s, query->data, keys->data, values->data, v->value, weights,
                                      l->out.grad, query->grad, keys->grad, values->grad, dv);
    if (v->grad) pd__contract2(l, s.rows, s.width, 1, dv, s.width, 1, NULL, 0, 0, v->grad, 0, 1);
    state->has_summands = to_inputs && !v->grad;
    return PD_OK;
}

PD__ANY_TYPE(pd__attention_type, "attention", 3, 3, pd_attention_opts, sizeof(pd__attention),
             PD_OP(contract) | PD_OP(attention) | PD_OP(attention_backward), pd__attention_setup, pd__attention_resize,
             pd__attention_forward, pd__attention_backward, NULL, 1);

PD_DEF pd_layer *pd_attention(pd_net *net, pd_layer *query, pd_layer *keys, pd_layer *values,
                              const pd_attention_opts *opts) {
    pd_layer *inputs[3];
    inputs[PD__QUERY] = query, inputs[PD__KEYS] = keys, inputs[PD__VALUES] = values;
    return pd_layer_add(net, &pd__attention_type, opts ? opts->name : NULL, inputs, 3, opts);
}

/* The row of the layer's that is row `row` of the sample; -1: there is none. */
static int64_t pd__attention_row(const pd_layer *l, int64_t sample, int64_t row) {
    const pd_tensor *y = &l->out;
    const pd__order *o = pd__step_order(l);
    const int64_t *starts = o ? o->starts : y->starts;
    int64_t samples = o ? o->sequences : y->starts ? y->sequences : y->rows, first, count;
    if (sample < 0 || sample >= samples) return -1;
    first = starts ? starts[sample] : sample;
    count = starts ? starts[sample + 1] - first : 1;
    if (row < 0 || row >= count) return -1;
    return o ? o->places[first + row] : first + row;
}

PD_DEF const pd_real *pd_attention_weights(pd_layer *attention, int64_t sample, int64_t row, int64_t *count) {
    pd_layer *l = attention;
    const int64_t *span;
    const pd_real *weights;
    pd_real *copy;
    int64_t r;
    if (!l) return NULL;
    if (l->type != &pd__attention_type) {
        pd_layer_fail(l, PD_E_ARGUMENT, "pd_attention_weights: it is of type %s", l->type->name);
        return NULL;
    }
    if (!l->own->active || !l->own->memory[0].data || l->net->run_failed) {
        if (!(l->net->run_failed && l->net->failure.status != PD_OK)) /* else that is the reason */
            pd_layer_fail(l, PD_E_STATE, "pd_attention_weights: it had no part in the last run");
        return NULL;
    }
    r = pd__attention_row(l, sample, row);
    if (r < 0) {
        pd_layer_fail(l, PD_E_ARGUMENT, "pd_attention_weights: there is no row %lld of sample %lld", (long long)row,
                      (long long)sample);
        return NULL;
    }
    span = l->own->integers[0] + 3 * r;
    if (count) *count = span[1] - span[0];
    weights = l->own->memory[0].data + span[2];
    if (l->device->host_memory) return weights;
    copy = pd_layer_values(l, ((const pd__attention *)l->state)->weights);
    if (!copy) return NULL;
    copy += span[2];
    l->device->download(l->device, copy, weights, (size_t)(span[1] - span[0]) * sizeof *copy);
    return copy;
}

/* ---- >>layer:sequence_pool: the method is n[0] ---- */

static pd_status pd__sequence_pool_setup(pd_layer *l) {
    int64_t method = pd__spec_of(l)->n[0];
    if (pd__like_input(l, 0) != PD_OK || pd__want_sequences(l) != PD_OK) return pd_error_status(l->net);
    if (method < 0 || method > PD_LAST) return pd_layer_fail(l, PD_E_ARGUMENT, "unknown method %d", (int)method);
    l->is_sequence = false;
    return PD_OK;
}

static pd_status pd__sequence_pool_resize(pd_layer *l) {
    l->out.rows = pd__in(l, 0)->sequences;
    return PD_OK;
}

/* Pooling as a matrix with a row per sequence and a column per row of the input, or its transpose. */
static pd_status pd__sequence_pool_matrix(pd_layer *l, bool transposed, pd_csr *s) {
    const pd_tensor *x = pd__in(l, 0);
    int64_t method = pd__spec_of(l)->n[0], rows = transposed ? x->rows : x->sequences, entries = 0;
    int64_t *starts = pd_layer_integers(l, 0, rows + 1), *columns = pd_layer_integers(l, 1, x->rows);
    pd_real *values = pd_layer_values(l, x->rows);
    if (!starts || !columns || !values) return PD_E_MEMORY;
    for (int64_t q = 0; q < x->sequences; q++) {
        int64_t first = x->starts[q], end = x->starts[q + 1];
        double n = (double)pd__max(end - first, 1), value = method == PD_AVERAGE  ? 1 / n
                                                            : method == PD_SQRT_N ? 1 / sqrt(n)
                                                                                  : 1;
        if (!transposed) starts[q] = entries;
        for (int64_t r = first; r < end; r++) {
            if (transposed) starts[r] = entries;
            if ((method == PD_FIRST && r > first) || (method == PD_LAST && r < end - 1)) continue;
            columns[entries] = transposed ? q : r;
            values[entries++] = (pd_real)value;
        }
    }
    starts[rows] = entries;
    s->rows = rows;
    s->starts = starts;
    s->columns = columns;
    s->values = values;
    return PD_OK;
}

static pd_status pd__sequence_pool_forward(pd_layer *l) {
    pd_csr s;
    if (pd__sequence_pool_matrix(l, false, &s) != PD_OK) return PD_E_MEMORY;
    pd__clear_output(l);
    l->device->sparse_product(l->device, &s, l->out.width, pd__in(l, 0)->data, l->out.data);
    return PD_OK;
}

static pd_status pd__sequence_pool_backward(pd_layer *l) {
    pd_csr s;
    if (!pd__in(l, 0)->grad) return PD_OK;
    if (pd__sequence_pool_matrix(l, true, &s) != PD_OK) return PD_E_MEMORY;
    l->device->sparse_product(l->device, &s, l->out.width, l->out.grad, pd__in(l, 0)->grad);
    return PD_OK;
}

PD__TYPE(pd__sequence_pool_type, "sequence_pool", 1, 1, pd__spec, 0,
         PD_OP(fill) | PD_OP(contract) | PD_OP(sparse_product), pd__sequence_pool_setup, pd__sequence_pool_resize,
         pd__sequence_pool_forward, pd__sequence_pool_backward);

/* The element of a column that is a sequence's largest, the first of equals or NaNs; -1 in an empty sequence. */
static int64_t pd__sequence_largest(const pd_tensor *x, int64_t sequence, int64_t column) {
    int64_t best = -1;
    for (int64_t r = x->starts[sequence]; r < x->starts[sequence + 1]; r++) {
        int64_t i = r * x->width + column;
        if (best < 0 || x->data[i] > x->data[best] || (x->data[i] != x->data[i] && x->data[best] == x->data[best]))
            best = i;
    }
    return best;
}

static pd_status pd__sequence_max_forward(pd_layer *l) {
    const pd_tensor *x = pd__in(l, 0);
    PD__PARALLEL(l->device, x->rows * x->width)
    for (int64_t i = 0; i < pd__numbers(l); i++) {
        int64_t largest = pd__sequence_largest(x, i / x->width, i % x->width);
        l->out.data[i] = largest >= 0 ? x->data[largest] : 0;
    }
    return PD_OK;
}

static pd_status pd__sequence_max_backward(pd_layer *l) {
    const pd_tensor *x = pd__in(l, 0);
    if (!x->grad) return PD_OK;
    PD__PARALLEL(l->device, x->rows * x->width)
    for (int64_t i = 0; i < pd__numbers(l); i++) {
        int64_t largest = pd__sequence_largest(x, i / x->width, i % x->width);
        if (largest >= 0) x->grad[largest] += l->out.grad[i];
    }
    return PD_OK;
}

PD__TYPE(pd__sequence_max_type, "sequence_pool", 1, 1, pd__spec, 0, 0, pd__sequence_pool_setup,
         pd__sequence_pool_resize, pd__sequence_max_forward, pd__sequence_max_backward);

PD_DEF pd_layer *pd_sequence_pool(pd_net *net, pd_layer *input, pd_pool_method method, const pd_layer_opts *opts) {
    PD__SPEC(pd__spec);
    s.n[0] = (int64_t)method;
    return pd_layer_add(net, method == PD_MAX ? &pd__sequence_max_type : &pd__sequence_pool_type, s.o.name, &input, 1,
                        &s);
}

/* ======================================================================================================== */
/* >>costs.c                                                                                               */

/* Inputs of a cost: the prediction, the target (if the cost has one; rank_cost has two), then the sample weights if
   there are any. Forward hands each row's plain cost to pd__put_cost, and backward gets its scale from pd__cost_scales,
   where the weights come in. What has no weight counts for nothing, even if it is infinite. */

enum { PD__COST_PROBABILITIES = 0, PD__COST_CLASS_WEIGHTS = 1, PD__COST_SCALES = 2 }; /* slots of pd_layer_memory */
enum {
    PD__HAS_CLASS_WEIGHTS = 1,
    PD__HAS_PROBABILITIES = 2,
    PD__HAS_DELTA = 4,
    PD__HAS_ZERO_DELTA = 8, /* 0 will do */
    PD__HAS_TOP = 16
};

/* A builder's one line: min_inputs of a, b, c and the sample weights if given. */
static pd_layer *pd__add_cost(pd_net *net, const pd_layer_type *type, pd_layer *a, pd_layer *b, pd_layer *c,
                              const pd_cost_opts *opts) {
    pd_layer *inputs[4];
    int count = type->min_inputs;
    inputs[0] = a, inputs[1] = b, inputs[2] = c;
    if (opts && opts->weight) inputs[count++] = opts->weight;
    return pd_layer_add(net, type, opts ? opts->name : NULL, inputs, count, opts);
}

/* The layer of sample weights, or NULL. */
static const pd_layer *pd__cost_weight(const pd_layer *l) {
    int index = l->type->min_inputs;
    return l->input_count > index ? l->inputs[index] : NULL;
}

/* Element i of a target of width 1 or of numbers, whichever it is. */
static double pd__number(const pd_tensor *t, int64_t i) { return t->ids ? (double)t->ids[i] : (double)t->data[i]; }

/* True if a layer holds ids (or numbers) as many as `size`; else fills `text` with what was expected and what came. */
static bool pd__holds(pd_layer *input, bool ids, int64_t size, char text[256]) {
    const char *kinds[] = { "numbers of shape", "ids below" };
    if (input->is_ids == ids && pd_shape_size(input->shape) == size) return true;
    snprintf(text, 256, "expected %s %lld, got \"%.100s\" with %s %s", kinds[ids], (long long)size, input->name,
             kinds[input->is_ids], pd_shape_text(input, input->shape));
    return false;
}

static pd_status pd__cost_input(pd_layer *l, int k, bool ids, int64_t size) {
    char text[256];
    if (pd__holds(l->inputs[k], ids, size, text)) return PD_OK;
    return pd_layer_fail(l, PD_E_SHAPE, "input %d: %s", k, text);
}

/* What all costs check: a prediction of numbers, weights of width 1, and no option that this cost does not have. */
static pd_status pd__cost_setup(pd_layer *l, unsigned has) {
    pd_cost_opts *o = (pd_cost_opts *)l->opts;
    const char *stray = o->class_weights && !(has & PD__HAS_CLASS_WEIGHTS)   ? "class_weights"
                        : o->probabilities && !(has & PD__HAS_PROBABILITIES) ? "probabilities"
                        : o->delta != 0 && !(has & PD__HAS_DELTA)            ? "delta"
                        : o->top != 0 && !(has & PD__HAS_TOP)                ? "top"
                                                                             : NULL;
    double delta = pd__or(o->delta, 1);
    pd_status status = pd__cost_input(l, 0, false, pd_shape_size(l->inputs[0]->shape));
    l->shape.channels = l->shape.height = l->shape.width = 1;
    if (status == PD_OK && pd__cost_weight(l)) status = pd__cost_input(l, l->type->min_inputs, false, 1);
    if (status != PD_OK) return status;
    if (stray) return pd_layer_fail(l, PD_E_ARGUMENT, "%s has no option %s", l->type->name, stray);
    if (!(has & PD__HAS_ZERO_DELTA ? delta >= 0 : delta > 0) || delta > DBL_MAX)
        return pd_layer_fail(l, PD_E_ARGUMENT, "expected delta > 0, got %g", delta);
    if (o->top < 0) return pd_layer_fail(l, PD_E_ARGUMENT, "expected top > 0, got %lld", (long long)o->top);
    if (o->top == 0 && (has & PD__HAS_TOP)) o->top = 5;
    return PD_OK;
}

/* The start of every forward. The net has checked that rows fit. */
static pd_status pd__cost_begin(pd_layer *l) {
    pd_status status = PD_OK;
    for (int k = 1; status == PD_OK && k < l->input_count; k++) status = pd__check_ids(l, k);
    return status;
}

/* The cost of row r, for layers on the host. */
static void pd__put_cost(pd_layer *l, int64_t r, double cost) {
    const pd_layer *weight = pd__cost_weight(l);
    pd_real times = weight ? weight->out.data[r] : 1;
    l->out.data[r] = times != 0 ? (pd_real)((double)times * cost) : 0;
}

/* The start of every backward: d(total)/d(plain cost) of each row. */
static pd_status pd__cost_scales(pd_layer *l, pd_real **scales) {
    const pd_layer *weight = pd__cost_weight(l);
    int64_t size[4] = { 1, 1, 1, 0 };
    const int64_t steps[4] = { 0, 0, 0, 1 };
    *scales = pd_layer_row_memory(l, PD__COST_SCALES, 1);
    if (!*scales) return PD_E_MEMORY;
    size[3] = l->out.rows;
    l->device->fill(l->device, l->out.rows, 0, *scales);
    l->device->contract(l->device, size, 1, l->out.grad, steps, weight ? weight->out.data : NULL, steps, *scales,
                        steps);
    return PD_OK;
}

/* ---- >>cost:cross_entropy ---- */

typedef struct pd__cross_entropy_state {
    bool weighted; /* the class weights are in the device's memory */
} pd__cross_entropy_state;

/* Copies the user's class weights, since pd_net_share builds the layer again from its options. */
static pd_status pd__copy_class_weights(pd_layer *l, int64_t classes) {
    pd_cost_opts *o = (pd_cost_opts *)l->opts;
    for (int64_t c = 0; c < classes; c++)
        if (!(o->class_weights[c] > 0 && o->class_weights[c] <= DBL_MAX))
            return pd_layer_fail(l, PD_E_ARGUMENT, "expected class_weights > 0, got %g for class %lld",
                                 o->class_weights[c], (long long)c);
    o->class_weights = (double *)pd_layer_copy(l, o->class_weights, (size_t)classes * sizeof(double));
    return o->class_weights ? PD_OK : PD_E_MEMORY;
}

/* The class weights in the device's memory; *weights NULL: there are none. */
static pd_status pd__class_weights(pd_layer *l, const pd_real **weights) {
    pd__cross_entropy_state *state = (pd__cross_entropy_state *)l->state;
    const double *given = ((const pd_cost_opts *)l->opts)->class_weights;
    int64_t classes = l->inputs[0]->out.width;
    pd_real *memory = given ? pd_layer_memory(l, PD__COST_CLASS_WEIGHTS, classes) : NULL;
    *weights = memory;
    if (given && !memory) return PD_E_MEMORY;
    for (int64_t c = 0; given && !state->weighted && c < classes; c++) {
        pd_real weight = (pd_real)given[c];
        l->device->upload(l->device, memory + c, &weight, sizeof weight);
    }
    state->weighted = true;
    return PD_OK;
}

static pd_status pd__cross_entropy_setup(pd_layer *l) {
    const pd_layer *label = l->inputs[1];
    int64_t classes = pd_shape_size(l->inputs[0]->shape);
    pd_status status = pd__cost_setup(l, PD__HAS_CLASS_WEIGHTS | PD__HAS_PROBABILITIES);
    if (status == PD_OK) status = pd__cost_input(l, 1, label->is_ids, classes);
    if (status != PD_OK) return status;
    l->own->reads_before = l->inputs[0]->act == PD_SOFTMAX;
    if (label->wants_grad)
        return pd_layer_fail(l, PD_E_UNSUPPORTED, "no gradient can flow into the labels, but \"%.100s\" learns",
                             label->name);
    return ((pd_cost_opts *)l->opts)->class_weights ? pd__copy_class_weights(l, classes) : PD_OK;
}

/* What the costs are of: *x, and *p = softmax(x), by the layer below or, by forward, in memory of this one's; or *p
   alone, where that is all that is given (*x NULL). */
static pd_status pd__cross_entropy_see(pd_layer *l, bool forward, const pd_real **x, const pd_real **p,
                                       pd_real **grad) {
    const pd_tensor *t = &l->inputs[0]->out;
    bool softmax = l->own->reads_before, given = !softmax && ((const pd_cost_opts *)l->opts)->probabilities;
    pd_real *own;
    *x = pd__read_before(l, grad);
    *p = t->data;
    if (given) *x = NULL;
    if (given || softmax) return PD_OK;
    *p = own = pd_layer_row_memory(l, PD__COST_PROBABILITIES, t->width);
    if (!own) return PD_E_MEMORY;
    if (forward) l->device->activate(l->device, PD_SOFTMAX, 0, t->rows, t->width, *x, own);
    return PD_OK;
}

static pd_status pd__cross_entropy_forward(pd_layer *l) {
    const pd_tensor *in = &l->inputs[0]->out, *t = &l->inputs[1]->out;
    const pd_layer *weight = pd__cost_weight(l);
    const pd_real *x, *p, *class_weights;
    pd_real *grad;
    pd_status status = pd__cost_begin(l);
    if (status != PD_OK || in->rows == 0) return status;
    status = pd__class_weights(l, &class_weights);
    if (status == PD_OK) status = pd__cross_entropy_see(l, true, &x, &p, &grad);
    if (status != PD_OK) return status;
    l->device->cross_entropy(l->device, in->rows, in->width, x, p, t->ids, t->data, weight ? weight->out.data : NULL,
                             class_weights, l->out.data);
    return PD_OK;
}

/* d/dx of softmax and cost as one, p - t for weights of 1; of given probabilities d/dp. */
static pd_status pd__cross_entropy_backward(pd_layer *l) {
    const pd_tensor *in = &l->inputs[0]->out, *t = &l->inputs[1]->out;
    const pd_real *x, *p, *class_weights;
    pd_real *scales, *grad;
    pd_status status;
    if (!in->grad || in->rows == 0) return PD_OK;
    status = pd__cost_scales(l, &scales);
    if (status == PD_OK) status = pd__class_weights(l, &class_weights);
    if (status == PD_OK) status = pd__cross_entropy_see(l, false, &x, &p, &grad);
    if (status != PD_OK) return status;
    l->device->cross_entropy_backward(l->device, in->rows, in->width, p, t->ids, t->data, class_weights, scales,
                                      x != NULL, grad);
    return PD_OK;
}

static const pd_layer_type pd__cross_entropy_type = { PD_API_VERSION,
                                                      "cross_entropy",
                                                      2,
                                                      3,
                                                      sizeof(pd_cost_opts),
                                                      sizeof(pd__cross_entropy_state),
                                                      PD_OP(activate) | PD_OP(cross_entropy) |
                                                          PD_OP(cross_entropy_backward),
                                                      pd__cross_entropy_setup,
                                                      NULL,
                                                      pd__cross_entropy_forward,
                                                      pd__cross_entropy_backward,
                                                      NULL,
                                                      NULL,
                                                      NULL,
                                                      -1 };

PD_DEF pd_layer *pd_cross_entropy(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__cross_entropy_type, input, label, NULL, opts);
}

/* ---- costs that are a sum over the elements of the row ---- */

/* The cost of one element x with target t, and its derivatives by x and by t. */
typedef double (*pd__element_cost)(double x, double t, double delta, double slopes[2]);

typedef struct pd__element_state {
    pd__element_cost cost;
} pd__element_state;

/* Both directions in one text: puts out costs, or adds the derivatives times `scales` if that is not NULL. */
static void pd__element_rows(pd_layer *l, const pd_real *scales) {
    const pd__element_cost cost = ((pd__element_state *)l->state)->cost;
    const pd_tensor *in = &l->inputs[0]->out, *t = l->type->min_inputs > 1 ? &l->inputs[1]->out : NULL;
    double delta = pd__or(((const pd_cost_opts *)l->opts)->delta, 1);
    pd_real *grad;
    const pd_real *x = pd__read_before(l, &grad);
    for (int64_t r = 0; r < in->rows; r++) {
        double sum = 0, slopes[2] = { 0, 0 };
        if (scales && scales[r] == 0) continue;
        for (int64_t i = r * in->width; i < (r + 1) * in->width; i++) {
            sum += cost((double)x[i], t ? pd__number(t, i) : 0, delta, slopes);
            if (scales && grad) grad[i] += (pd_real)((double)scales[r] * slopes[0]);
            if (scales && t && t->grad) t->grad[i] += (pd_real)((double)scales[r] * slopes[1]);
        }
        if (!scales) pd__put_cost(l, r, sum);
    }
}

static pd_status pd__element_forward(pd_layer *l) {
    pd_status status = pd__cost_begin(l);
    if (status == PD_OK) pd__element_rows(l, NULL);
    return status;
}

static pd_status pd__element_backward(pd_layer *l) {
    pd_real *scales;
    pd_status status = pd__cost_scales(l, &scales);
    if (status == PD_OK) pd__element_rows(l, scales);
    return status;
}

/* Shape rule of the costs that compare numbers with as many numbers. */
static pd_status pd__element_setup(pd_layer *l, unsigned has, pd__element_cost cost) {
    pd_status status = pd__cost_setup(l, has);
    if (status == PD_OK) status = pd__cost_input(l, 1, false, pd_shape_size(l->inputs[0]->shape));
    ((pd__element_state *)l->state)->cost = cost;
    return status;
}

#define PD__ELEMENT_TYPE(name, min_inputs, setup, backward)                                                            \
    {                                                                                                                  \
        PD_API_VERSION, name, min_inputs, min_inputs + 1, sizeof(pd_cost_opts), sizeof(pd__element_state), 0, setup,   \
            NULL, pd__element_forward, backward, NULL, NULL, NULL, -1                                                  \
    }

/* log(1 + e^x) - t x without overflow: binary cross-entropy of sigmoid(x). */
static double pd__logistic_cost(double x, double t, double delta, double slopes[2]) {
    double e = exp(-fabs(x));
    (void)delta;
    slopes[0] = (x >= 0 ? 1 : e) / (1 + e) - t;
    slopes[1] = -x;
    return (x > 0 ? x : 0) - x * t + log1p(e);
}

/* ---- >>cost:binary_cross_entropy ---- */

static pd_status pd__binary_cross_entropy_setup(pd_layer *l) {
    l->own->reads_before = l->inputs[0]->act == PD_SIGMOID;
    return pd__element_setup(l, 0, pd__logistic_cost);
}

static const pd_layer_type pd__binary_cross_entropy_type =
    PD__ELEMENT_TYPE("binary_cross_entropy", 2, pd__binary_cross_entropy_setup, pd__element_backward);

PD_DEF pd_layer *pd_binary_cross_entropy(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__binary_cross_entropy_type, input, target, NULL, opts);
}

static double pd__squared_cost(double x, double t, double delta, double slopes[2]) {
    (void)delta;
    slopes[0] = 2 * (x - t);
    slopes[1] = -slopes[0];
    return (x - t) * (x - t);
}

/* ---- >>cost:squared_error ---- */

static pd_status pd__squared_error_setup(pd_layer *l) { return pd__element_setup(l, 0, pd__squared_cost); }

static const pd_layer_type pd__squared_error_type =
    PD__ELEMENT_TYPE("squared_error", 2, pd__squared_error_setup, pd__element_backward);

PD_DEF pd_layer *pd_squared_error(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__squared_error_type, input, target, NULL, opts);
}

/* ---- >>cost:huber ---- */

/* Huber 1964. */
static double pd__huber_cost(double x, double t, double delta, double slopes[2]) {
    double d = x - t;
    slopes[0] = d > delta ? delta : d < -delta ? -delta : d;
    slopes[1] = -slopes[0];
    return fabs(d) <= delta ? d * d / 2 : delta * (fabs(d) - delta / 2);
}

static pd_status pd__huber_setup(pd_layer *l) { return pd__element_setup(l, PD__HAS_DELTA, pd__huber_cost); }

static const pd_layer_type pd__huber_type = PD__ELEMENT_TYPE("huber", 2, pd__huber_setup, pd__element_backward);

PD_DEF pd_layer *pd_huber(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__huber_type, input, target, NULL, opts);
}

/* ---- >>cost:smooth_l1 ---- */

/* Huber's cost divided by delta, which may be 0; Girshick 2015. */
static double pd__smooth_l1_cost(double x, double t, double delta, double slopes[2]) {
    double d = x - t;
    bool square = fabs(d) < delta;
    slopes[0] = square ? d / delta : (d > 0) - (d < 0);
    slopes[1] = -slopes[0];
    return square ? d * d / (2 * delta) : fabs(d) - delta / 2;
}

static pd_status pd__smooth_l1_setup(pd_layer *l) {
    return pd__element_setup(l, PD__HAS_DELTA | PD__HAS_ZERO_DELTA, pd__smooth_l1_cost);
}

static const pd_layer_type pd__smooth_l1_type =
    PD__ELEMENT_TYPE("smooth_l1", 2, pd__smooth_l1_setup, pd__element_backward);

PD_DEF pd_layer *pd_smooth_l1(pd_net *net, pd_layer *input, pd_layer *target, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__smooth_l1_type, input, target, NULL, opts);
}

static double pd__identity_cost(double x, double t, double delta, double slopes[2]) {
    (void)t;
    (void)delta;
    slopes[0] = 1;
    return x;
}

/* ---- >>cost:sum_cost ---- */

static pd_status pd__sum_cost_setup(pd_layer *l) {
    ((pd__element_state *)l->state)->cost = pd__identity_cost;
    return pd__cost_setup(l, 0);
}

static const pd_layer_type pd__sum_cost_type =
    PD__ELEMENT_TYPE("sum_cost", 1, pd__sum_cost_setup, pd__element_backward);

PD_DEF pd_layer *pd_sum_cost(pd_net *net, pd_layer *input, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__sum_cost_type, input, NULL, NULL, opts);
}

/* ---- costs of a margin: x of width 1, t the label 0 or 1 ---- */

static pd_status pd__two_class_setup(pd_layer *l, pd__element_cost cost) {
    pd_status status = pd__cost_setup(l, 0);
    if (status == PD_OK) status = pd__cost_input(l, 0, false, 1);
    if (status == PD_OK) status = pd__cost_input(l, 1, true, 2);
    ((pd__element_state *)l->state)->cost = cost;
    return status;
}

static double pd__huber_margin_cost(double x, double t, double delta, double slopes[2]) {
    double y = 2 * t - 1, m = y * x;
    (void)delta;
    slopes[0] = m >= 1 ? 0 : m >= -1 ? -2 * y * (1 - m) : -4 * y;
    return m >= 1 ? 0 : m >= -1 ? (1 - m) * (1 - m) : -4 * m;
}

/* ---- >>cost:huber_two_class ---- */

static pd_status pd__huber_two_class_setup(pd_layer *l) { return pd__two_class_setup(l, pd__huber_margin_cost); }

static const pd_layer_type pd__huber_two_class_type =
    PD__ELEMENT_TYPE("huber_two_class", 2, pd__huber_two_class_setup, pd__element_backward);

PD_DEF pd_layer *pd_huber_two_class(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__huber_two_class_type, input, label, NULL, opts);
}

/* ---- >>cost:hinge ---- */

static double pd__hinge_margin_cost(double x, double t, double delta, double slopes[2]) {
    double y = 2 * t - 1, m = y * x;
    (void)delta;
    slopes[0] = m < 1 ? -y : 0;
    return m < 1 ? 1 - m : 0;
}

static pd_status pd__hinge_setup(pd_layer *l) {
    int64_t classes = pd_shape_size(l->inputs[0]->shape);
    pd_status status;
    if (classes == 1) return pd__two_class_setup(l, pd__hinge_margin_cost);
    status = pd__cost_setup(l, 0);
    return status != PD_OK ? status : pd__cost_input(l, 1, true, classes);
}

static pd_status pd__hinge_forward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out, *label = &l->inputs[1]->out;
    pd_status status;
    if (x->width == 1) return pd__element_forward(l);
    status = pd__cost_begin(l);
    if (status != PD_OK) return status;
    for (int64_t r = 0; r < x->rows; r++) {
        const pd_real *row = x->data + r * x->width;
        double sum = 0, base = 1 - (double)row[label->ids[r]];
        for (int64_t j = 0; j < x->width; j++)
            if (j != label->ids[r] && base + (double)row[j] > 0) sum += base + (double)row[j];
        pd__put_cost(l, r, sum);
    }
    return PD_OK;
}

static pd_status pd__hinge_backward(pd_layer *l) {
    const pd_tensor *x = &l->inputs[0]->out, *label = &l->inputs[1]->out;
    pd_real *scales;
    pd_status status;
    if (x->width == 1) return pd__element_backward(l);
    if (!x->grad) return PD_OK;
    status = pd__cost_scales(l, &scales);
    for (int64_t r = 0; status == PD_OK && r < x->rows; r++) {
        const pd_real *row = x->data + r * x->width;
        pd_real *grad = x->grad + r * x->width;
        double base = 1 - (double)row[label->ids[r]];
        for (int64_t j = 0; j < x->width; j++)
            if (j != label->ids[r] && base + (double)row[j] > 0) {
                grad[j] += scales[r];
                grad[label->ids[r]] -= scales[r];
            }
    }
    return status;
}

static const pd_layer_type pd__hinge_type = { PD_API_VERSION,
                                              "hinge",
                                              2,
                                              3,
                                              sizeof(pd_cost_opts),
                                              sizeof(pd__element_state),
                                              0,
                                              pd__hinge_setup,
                                              NULL,
                                              pd__hinge_forward,
                                              pd__hinge_backward,
                                              NULL,
                                              NULL,
                                              NULL,
                                              -1 };

PD_DEF pd_layer *pd_hinge(pd_net *net, pd_layer *input, pd_layer *label, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__hinge_type, input, label, NULL, opts);
}

/* ---- >>cost:rank_cost ---- */

static pd_status pd__rank_cost_setup(pd_layer *l) {
    pd_status status = pd__cost_setup(l, 0);
    for (int k = 0; status == PD_OK && k < 3; k++) status = pd__cost_input(l, k, false, 1);
    return status;
}

static pd_status pd__rank_cost_forward(pd_layer *l) {
    const pd_tensor *left = &l->inputs[0]->out, *right = &l->inputs[1]->out, *p = &l->inputs[2]->out;
    double slopes[2];
    pd_status status = pd__cost_begin(l);
    for (int64_t r = 0; status == PD_OK && r < left->rows; r++)
        pd__put_cost(l, r,
                     pd__logistic_cost((double)left->data[r] - (double)right->data[r], (double)p->data[r], 0, slopes));
    return status;
}

static pd_status pd__rank_cost_backward(pd_layer *l) {
    const pd_tensor *left = &l->inputs[0]->out, *right = &l->inputs[1]->out, *p = &l->inputs[2]->out;
    double slopes[2];
    pd_real *scales;
    pd_status status = pd__cost_scales(l, &scales);
    for (int64_t r = 0; status == PD_OK && r < left->rows; r++) {
        if (scales[r] == 0) continue;
        pd__logistic_cost((double)left->data[r] - (double)right->data[r], (double)p->data[r], 0, slopes);
        if (left->grad) left->grad[r] += (pd_real)((double)scales[r] * slopes[0]);
        if (right->grad) right->grad[r] -= (pd_real)((double)scales[r] * slopes[0]);
        if (p->grad) p->grad[r] += (pd_real)((double)scales[r] * slopes[1]);
    }
    return status;
}

static const pd_layer_type pd__rank_cost_type = { PD_API_VERSION,
                                                  "rank_cost",
                                                  3,
                                                  4,
                                                  sizeof(pd_cost_opts),
                                                  0,
                                                  0,
                                                  pd__rank_cost_setup,
                                                  NULL,
                                                  pd__rank_cost_forward,
                                                  pd__rank_cost_backward,
                                                  NULL,
                                                  NULL,
                                                  NULL,
                                                  -1 };

PD_DEF pd_layer *pd_rank_cost(pd_net *net, pd_layer *left, pd_layer *right, pd_layer *p, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__rank_cost_type, left, right, p, opts);
}

/* ---- >>cost:lambda_rank ---- */

/* Fills order[0 .. n - 1] with the rows first .. first + n - 1 by falling key, equal ones by rising row: a bottom-up
   merge sort, which is stable. `spare` is n more. */
static void pd__sort_rows(const pd_tensor *keys, int64_t first, int64_t n, int64_t *order, int64_t *spare) {
    int64_t *from = order, *to = spare, *swap;
    for (int64_t i = 0; i < n; i++) order[i] = first + i;
    for (int64_t length = 1; length < n; length *= 2) {
        for (int64_t i = 0; i < n; i += 2 * length) {
            int64_t a = i, b = pd__min(i + length, n), a_end = b, b_end = pd__min(i + 2 * length, n);
            for (int64_t k = i; k < b_end; k++) {
                bool second = a == a_end || (b < b_end && pd__number(keys, from[b]) > pd__number(keys, from[a]));
                to[k] = from[second ? b++ : a++];
            }
        }
        swap = from, from = to, to = swap;
    }
    if (from != order) memcpy(order, from, (size_t)n * sizeof *order);
}

/* Rows first .. first + n - 1 are query q. Rows without sequences are one query. */
static int64_t pd__query(const pd_tensor *t, int64_t q, int64_t *first) {
    *first = t->starts ? t->starts[q] : 0;
    return t->starts ? t->starts[q + 1] - *first : t->rows;
}

static int64_t pd__query_count(const pd_tensor *t) { return t->starts ? t->sequences : 1; }

static double pd__gain(double relevance) { return exp2(relevance) - 1; }

static double pd__discount(int64_t rank, int64_t top) { return rank < top ? 1 / log2(2 + (double)rank) : 0; }

/* The discounted gain of the best `top` rows of a query when sorted by `keys`; leaves that order in integers 0. */
static double pd__dcg(pd_layer *l, const pd_tensor *keys, int64_t first, int64_t n) {
    int64_t top = ((const pd_cost_opts *)l->opts)->top;
    int64_t *order = pd_layer_integers(l, 0, l->out.rows);
    double sum = 0;
    pd__sort_rows(keys, first, n, order, pd_layer_integers(l, 1, l->out.rows));
    for (int64_t k = 0; k < n && k < top; k++)
        sum += pd__gain(pd__number(&l->inputs[1]->out, order[k])) * pd__discount(k, top);
    return sum;
}

static pd_status pd__lambda_rank_setup(pd_layer *l) {
    const pd_layer *relevance = l->inputs[1];
    pd_status status = pd__cost_setup(l, PD__HAS_TOP);
    if (status == PD_OK) status = pd__cost_input(l, 0, false, 1);
    if (status == PD_OK && !relevance->is_ids) status = pd__cost_input(l, 1, false, 1);
    return status;
}

/* Checks the relevances, and takes the memory that pd__dcg will use. */
static pd_status pd__lambda_rank_begin(pd_layer *l) {
    const pd_tensor *relevance = &l->inputs[1]->out;
    pd_status status = pd__cost_begin(l);
    for (int64_t r = 0; status == PD_OK && r < relevance->rows; r++) {
        double value = pd__number(relevance, r);
        if (!(value >= 0 && value <= 1000)) /* 2^1000 is within a double's range */
            return pd_layer_fail(l, PD_E_FORMAT, "row %lld of \"%.100s\": expected relevance 0 to 1000, got %g",
                                 (long long)r, l->inputs[1]->name, value);
    }
    if (status != PD_OK || relevance->rows == 0) return status;
    for (int slot = 0; slot < 2; slot++)
        if (!pd_layer_integers(l, slot, relevance->rows)) return PD_E_MEMORY;
    return PD_OK;
}

static pd_status pd__lambda_rank_forward(pd_layer *l) {
    const pd_tensor *score = &l->inputs[0]->out, *relevance = &l->inputs[1]->out;
    int64_t first;
    pd_status status = pd__lambda_rank_begin(l);
    if (status != PD_OK || score->rows == 0) return status;
    for (int64_t q = 0; q < pd__query_count(score); q++) {
        int64_t n = pd__query(score, q, &first);
        double best = pd__dcg(l, relevance, first, n), dcg = pd__dcg(l, score, first, n);
        for (int64_t r = first; r < first + n; r++) pd__put_cost(l, r, best > 0 ? (1 - dcg / best) / (double)n : 0);
    }
    return PD_OK;
}

/* For each pair, with i more relevant than j, lambda = |change of NDCG if i and j traded places| / (1 + e^(s_i - s_j))
   pushes i up and j down. Pairs beyond the first `top` ranks change nothing, which leaves top x n of them. */
static pd_status pd__lambda_rank_backward(pd_layer *l) {
    const pd_tensor *score = &l->inputs[0]->out, *relevance = &l->inputs[1]->out;
    int64_t top = ((const pd_cost_opts *)l->opts)->top, first;
    double *sums = pd_layer_doubles(l, 0, score->rows); /* each of up to as many lambdas as a query has rows */
    pd_real *scales;
    if (!score->grad || score->rows == 0) return PD_OK;
    if (!sums || pd__cost_scales(l, &scales) != PD_OK) return PD_E_MEMORY;
    memset(sums, 0, (size_t)score->rows * sizeof *sums);
    for (int64_t q = 0; q < pd__query_count(score); q++) {
        int64_t n = pd__query(score, q, &first);
        double best = pd__dcg(l, relevance, first, n);
        const int64_t *order = pd_layer_integers(l, 0, score->rows);
        pd__dcg(l, score, first, n);
        for (int64_t a = 0; best > 0 && a < n && a < top; a++)
            for (int64_t b = a + 1; b < n; b++) {
                double gain = pd__gain(pd__number(relevance, order[a])) - pd__gain(pd__number(relevance, order[b]));
                int64_t i = order[gain > 0 ? a : b], j = order[gain > 0 ? b : a];
                double change = fabs(gain) * (pd__discount(a, top) - pd__discount(b, top)) / best;
                double lambda = change / (1 + exp((double)score->data[i] - (double)score->data[j]));
                sums[i] -= lambda;
                sums[j] += lambda;
            }
    }
    for (int64_t r = 0; r < score->rows; r++) score->grad[r] += (pd_real)((double)scales[r] * sums[r]);
    return PD_OK;
}

static const pd_layer_type pd__lambda_rank_type = { PD_API_VERSION,
                                                    "lambda_rank",
                                                    2,
                                                    3,
                                                    sizeof(pd_cost_opts),
                                                    0,
                                                    0,
                                                    pd__lambda_rank_setup,
                                                    NULL,
                                                    pd__lambda_rank_forward,
                                                    pd__lambda_rank_backward,
                                                    NULL,
                                                    NULL,
                                                    NULL,
                                                    0 };

PD_DEF pd_layer *pd_lambda_rank(pd_net *net, pd_layer *score, pd_layer *relevance, const pd_cost_opts *opts) {
    return pd__add_cost(net, &pd__lambda_rank_type, score, relevance, NULL, opts);
}

/* ======================================================================================================== */
/* >>batches.c                                                                                             */

/* Rows of the samples that have ended are 0 .. pd__ended_rows - 1 of each slot; what comes after belongs to the
   unfinished one. A slot without sequences has as many of them as there are samples, or none: then the input was
   left out, which pd_batch_add_row and pd_batch_add_id hold it to until the batch is cleared. */

PD_PRINTF(3, 4) static pd_status pd__batch_fail(pd_batch *batch, pd_status status, const char *format, ...) {
    va_list args;
    batch->refused = true;
    va_start(args, format);
    pd__set_failure(&batch->error, status, format, args);
    va_end(args);
    return status;
}

static bool pd__slot_init(const pd_allocator *a, pd_slot *slot, const pd_layer *input) {
    bool sparse = input->is_sparse;
    slot->kind = sparse ? PD_SLOT_SPARSE : input->is_ids ? PD_SLOT_IDS : PD_SLOT_DENSE;
    slot->sequence = input->is_sequence;
    slot->width = input->out.width;
    slot->name = input->name;
    return (!slot->sequence || pd_grow(a, (void **)&slot->starts, &slot->start_capacity, 1, sizeof *slot->starts)) &&
           (!sparse || pd_grow(a, (void **)&slot->row_starts, &slot->row_capacity, 1, sizeof *slot->row_starts));
}

PD_DEF pd_batch *pd_batch_new(pd_net *net) {
    pd_batch *batch;
    bool ok;
    if (!pd__check_net(net)) return NULL;
    batch = (pd_batch *)pd_alloc(&net->allocator, 1, sizeof *batch);
    if (batch) {
        batch->net = net;
        batch->slots = (pd_slot *)pd_alloc(&net->allocator, net->slot_count, sizeof *batch->slots);
    }
    ok = batch && batch->slots;
    if (ok) batch->slot_count = net->slot_count;
    for (int64_t i = 0; ok && i < net->layer_count; i++)
        if (net->layers[i]->own->slot >= 0)
            ok = pd__slot_init(&net->allocator, &batch->slots[net->layers[i]->own->slot], net->layers[i]);
    if (ok) return batch;
    pd__no_memory(net, "a batch");
    pd_batch_free(batch);
    return NULL;
}

PD_DEF void pd_batch_free(pd_batch *batch) {
    const pd_allocator *a;
    if (!batch) return;
    a = &batch->net->allocator;
    for (int i = 0; i < batch->slot_count; i++) {
        pd_free(a, batch->slots[i].data);
        pd_free(a, batch->slots[i].ids);
        pd_free(a, batch->slots[i].row_starts);
        pd_free(a, batch->slots[i].values);
        pd_free(a, batch->slots[i].starts);
    }
    pd_free(a, batch->slots);
    pd_free(a, batch);
}

PD_DEF void pd_batch_clear(pd_batch *batch) {
    if (!batch) return;
    batch->samples = 0;
    batch->refused = false;
    for (int i = 0; i < batch->slot_count; i++) batch->slots[i].rows = 0;
}

static int64_t pd__ended_rows(const pd_batch *batch, const pd_slot *slot) {
    return slot->sequence ? slot->starts[batch->samples] : pd__min(slot->rows, batch->samples);
}

/* Number of rows of sample `index`, an ended one, and the first of them. */
static int64_t pd__sample_rows(const pd_slot *slot, int64_t index, int64_t *first) {
    *first = slot->sequence ? slot->starts[index] : index;
    return slot->sequence ? slot->starts[index + 1] - *first : slot->rows > 0;
}

static const char *const pd__slot_kinds[] = { "numbers", "ids", "sparse rows" };

/* Makes room for `more` rows (their entries apart); false when there is none. */
static bool pd__slot_grow(const pd_allocator *a, pd_slot *slot, int64_t more) {
    void **memory = slot->kind == PD_SLOT_DENSE ? (void **)&slot->data
                    : slot->kind == PD_SLOT_IDS ? (void **)&slot->ids
                                                : (void **)&slot->row_starts;
    size_t size = sizeof(int64_t);
    int64_t extra = slot->kind == PD_SLOT_SPARSE;
    return (slot->kind != PD_SLOT_DENSE || pd__bytes(slot->width, sizeof(pd_real), &size)) &&
           more < INT64_MAX - slot->rows && pd_grow(a, memory, &slot->row_capacity, slot->rows + more + extra, size);
}

/* The slot, of this kind and with room for `more` rows; NULL (batch->error) when it can't be had. */
static pd_slot *pd__slot_open(pd_batch *batch, int index, pd_slot_kind kind, int64_t more) {
    pd_slot *slot = batch && index >= 0 && index < batch->slot_count ? &batch->slots[index] : NULL;
    if (!batch) return NULL;
    if (!slot || slot->kind != kind) {
        pd__batch_fail(batch, PD_E_ARGUMENT, "slot %d is not an input of %s; the batch has %d slots", index,
                       pd__slot_kinds[kind], batch->slot_count);
        return NULL;
    }
    if (!slot->sequence && slot->rows < batch->samples) {
        pd__batch_fail(batch, PD_E_SHAPE, "input \"%.100s\" was left out of the samples before this one", slot->name);
        return NULL;
    }
    if (!pd__slot_grow(&batch->net->allocator, slot, more)) {
        pd__batch_fail(batch, PD_E_MEMORY, "out of memory for row %lld of input \"%.100s\"", (long long)slot->rows + 1,
                       slot->name);
        return NULL;
    }
    return slot;
}

PD_DEF pd_real *pd_batch_add_row(pd_batch *batch, int slot) {
    pd_slot *s = pd__slot_open(batch, slot, PD_SLOT_DENSE, 1);
    return s ? s->data + s->rows++ * s->width : NULL;
}

PD_DEF pd_status pd_batch_add_id(pd_batch *batch, int slot, int64_t id) {
    pd_slot *s = pd__slot_open(batch, slot, PD_SLOT_IDS, 1);
    if (!s) return batch ? batch->error.status : PD_E_ARGUMENT;
    if (id < 0 || id >= s->width)
        return pd__batch_fail(batch, PD_E_FORMAT, "input \"%.100s\": id %lld, expected 0 to %lld", s->name,
                              (long long)id, (long long)s->width - 1);
    s->ids[s->rows++] = id;
    return PD_OK;
}

/* Room for `more` entries behind those of the last row. */
static bool pd__entries_grow(const pd_allocator *a, pd_slot *slot, int64_t more) {
    int64_t used = slot->row_starts[slot->rows];
    return more <= INT64_MAX / 2 - used &&
           pd_grow(a, (void **)&slot->ids, &slot->entry_capacity, used + more, sizeof *slot->ids) &&
           pd_grow(a, (void **)&slot->values, &slot->value_capacity, used + more, sizeof *slot->values);
}

PD_DEF pd_status pd_batch_add_sparse(pd_batch *batch, int slot, const int64_t *columns, const pd_real *values,
                                     int64_t count) {
    pd_slot *s = pd__slot_open(batch, slot, PD_SLOT_SPARSE, 1);
    int64_t first;
    if (!s) return batch ? batch->error.status : PD_E_ARGUMENT;
    if (count < 0 || (count > 0 && !columns))
        return pd__batch_fail(batch, PD_E_ARGUMENT, "input \"%.100s\": %lld entries%s", s->name, (long long)count,
                              columns ? "" : " at NULL");
    if (!pd__entries_grow(&batch->net->allocator, s, count))
        return pd__batch_fail(batch, PD_E_MEMORY, "out of memory for %lld entries of input \"%.100s\"",
                              (long long)count, s->name);
    first = s->row_starts[s->rows];
    for (int64_t k = 0; k < count; k++) {
        if (columns[k] < 0 || columns[k] >= s->width)
            return pd__batch_fail(batch, PD_E_FORMAT, "input \"%.100s\": column %lld, expected 0 to %lld", s->name,
                                  (long long)columns[k], (long long)s->width - 1);
        if (values && !pd__finite((double)values[k]))
            return pd__batch_fail(batch, PD_E_NUMERIC, "input \"%.100s\": the number in column %lld is not finite",
                                  s->name, (long long)columns[k]);
        s->ids[first + k] = columns[k];
        s->values[first + k] = values ? values[k] : 1;
    }
    s->row_starts[++s->rows] = first + count;
    return PD_OK;
}

PD_DEF void pd_batch_drop_sample(pd_batch *batch) {
    if (batch) batch->refused = false;
    for (int i = 0; batch && i < batch->slot_count; i++) batch->slots[i].rows = pd__ended_rows(batch, &batch->slots[i]);
}

/* Has every input its rows? An input that got none is left out if no sample before had it. */
static pd_status pd__check_sample(pd_batch *batch) {
    bool any = false;
    for (int i = 0; i < batch->slot_count; i++) {
        const pd_slot *slot = &batch->slots[i];
        int64_t rows = slot->rows - pd__ended_rows(batch, slot);
        any = any || slot->sequence || rows > 0;
        if (!slot->sequence && rows != 1 && slot->rows > 0)
            return pd__batch_fail(batch, PD_E_SHAPE,
                                  "sample %lld of the batch: input \"%.100s\" got %lld rows, expected 1",
                                  (long long)batch->samples + 1, slot->name, (long long)rows);
    }
    if (!any)
        return pd__batch_fail(batch, PD_E_SHAPE, "sample %lld of the batch: no input got a row",
                              (long long)batch->samples + 1);
    return PD_OK;
}

static pd_status pd__reserve_starts(pd_batch *batch) {
    for (int i = 0; i < batch->slot_count; i++) {
        pd_slot *slot = &batch->slots[i];
        if (slot->sequence && !pd_grow(&batch->net->allocator, (void **)&slot->starts, &slot->start_capacity,
                                       batch->samples + 2, sizeof *slot->starts))
            return pd__batch_fail(batch, PD_E_MEMORY, "out of memory for sample %lld of the batch",
                                  (long long)batch->samples + 1);
    }
    return PD_OK;
}

PD_DEF pd_status pd_batch_end_sample(pd_batch *batch) {
    pd_status status;
    if (!batch) return PD_E_ARGUMENT;
    status = batch->refused ? batch->error.status : pd__check_sample(batch);
    if (status == PD_OK) status = pd__reserve_starts(batch);
    if (status != PD_OK) {
        pd_batch_drop_sample(batch);
        return status;
    }
    batch->samples++;
    for (int i = 0; i < batch->slot_count; i++)
        if (batch->slots[i].sequence) batch->slots[i].starts[batch->samples] = batch->slots[i].rows;
    return PD_OK;
}

/* Were both made for the same inputs? */
static bool pd__batches_alike(const pd_batch *a, const pd_batch *b) {
    bool alike = a->slot_count == b->slot_count;
    for (int i = 0; alike && i < a->slot_count; i++) {
        const pd_slot *s = &a->slots[i], *t = &b->slots[i];
        alike = s->kind == t->kind && s->sequence == t->sequence && s->width == t->width;
    }
    return alike;
}

/* Copies rows within one kind of slot, also onto themselves or down. Sparse rows need room for their entries. */
static void pd__copy_rows(pd_slot *to, int64_t to_row, const pd_slot *from, int64_t from_row, int64_t rows) {
    if (rows == 0) return;
    if (to->kind == PD_SLOT_SPARSE) {
        int64_t first = from->row_starts[from_row], n = from->row_starts[from_row + rows] - first;
        int64_t at = to->row_starts[to_row];
        if (n > 0) memmove(to->ids + at, from->ids + first, (size_t)n * sizeof *to->ids);
        if (n > 0) memmove(to->values + at, from->values + first, (size_t)n * sizeof *to->values);
        for (int64_t i = 1; i <= rows; i++) to->row_starts[to_row + i] = from->row_starts[from_row + i] - first + at;
    } else if (to->kind == PD_SLOT_IDS) memmove(to->ids + to_row, from->ids + from_row, (size_t)rows * sizeof *to->ids);
    else
        memmove(to->data + to_row * to->width, from->data + from_row * to->width,
                (size_t)(rows * to->width) * sizeof *to->data);
}

PD_DEF pd_status pd_batch_copy_sample(pd_batch *batch, const pd_batch *from, int64_t index) {
    if (!batch || !from) return PD_E_ARGUMENT;
    if (!pd__batches_alike(batch, from))
        return pd__batch_fail(batch, PD_E_SHAPE, "the batches are of nets with different inputs");
    if (index < 0 || index >= from->samples)
        return pd__batch_fail(batch, PD_E_ARGUMENT, "sample %lld does not exist: the batch copied from has %lld",
                              (long long)index, (long long)from->samples);
    for (int i = 0; i < batch->slot_count; i++) {
        int64_t first, rows = pd__sample_rows(&from->slots[i], index, &first);
        const pd_slot *source = &from->slots[i];
        pd_slot *slot = rows == 0 ? NULL : pd__slot_open(batch, i, source->kind, rows);
        if (slot && slot->kind == PD_SLOT_SPARSE &&
            !pd__entries_grow(&batch->net->allocator, slot,
                              source->row_starts[first + rows] - source->row_starts[first])) {
            pd__batch_fail(batch, PD_E_MEMORY, "out of memory for the entries of input \"%.100s\"", slot->name);
            slot = NULL;
        }
        if (rows > 0 && !slot) {
            pd_batch_drop_sample(batch);
            return batch->error.status;
        }
        if (slot) {
            pd__copy_rows(slot, slot->rows, source, first, rows);
            slot->rows += rows;
        }
    }
    return pd_batch_end_sample(batch);
}

/* Takes the samples with a mark out of the batch; the others close up in their order. */
static void pd__remove_samples(pd_batch *batch, const unsigned char *marks) {
    int64_t kept = 0;
    for (int i = 0; i < batch->slot_count; i++) {
        pd_slot *slot = &batch->slots[i];
        int64_t to = 0;
        kept = 0;
        for (int64_t k = 0; k < batch->samples; k++) {
            int64_t first, rows = pd__sample_rows(slot, k, &first);
            if (marks[k]) continue;
            pd__copy_rows(slot, to, slot, first, rows);
            to += rows;
            kept++;
            if (slot->sequence) slot->starts[kept] = to; /* kept <= k + 1: starts not yet read stay as they are */
        }
        slot->rows = to;
    }
    batch->samples = kept;
}

/* ======================================================================================================== */
/* >>running.c                                                                                             */

enum { PD__OUT, PD__BEFORE }; /* a layer's two tensors: its output, after and before its activation */

/* Of >>groups.c. */
static void pd__activate_loop(pd_group *g);
static pd_status pd__run_loop(pd_group *g);
static pd_status pd__backward_loop(pd_group *g);

static pd_tensor *pd__tensor_of(pd_layer *l, int which) { return which == PD__OUT ? &l->out : &l->own->before; }

/* Marks what `targets` depend on. Inputs come before their users, so one walk from the end is enough. */
static pd_status pd__activate_layers(pd_net *net, pd_layer *const *targets, int count) {
    for (int64_t i = 0; i < net->layer_count; i++) {
        struct pd__layer *own = net->layers[i]->own;
        own->active = own->target = own->above_done = own->keeps_before = false;
        own->consumers = 0;
        own->above = NULL;
    }
    for (int i = 0; i < count; i++) {
        if (!targets[i] || targets[i]->net != net)
            return pd__fail(net, PD_E_ARGUMENT, "pd_forward: target %d is %s", i,
                            targets[i] ? "a layer of another net" : "NULL");
        if (targets[i]->own->loop)
            return pd__fail(
                net, PD_E_ARGUMENT,
                "pd_forward: \"%.100s\" runs step by step in group \"%.100s\"; pd_group_output has its rows",
                targets[i]->name, targets[i]->own->loop->name);
        targets[i]->own->active = targets[i]->own->target = true;
    }
    for (int64_t i = net->layer_count; i-- > 0;) {
        pd_layer *l = net->layers[i];
        if (l->own->loop && i == l->own->loop->last) pd__activate_loop(l->own->loop);
        if (!l->own->active) continue;
        for (int k = 0; k < l->input_count; k++) {
            l->inputs[k]->own->active = true;
            l->inputs[k]->own->consumers++;
        }
        if (l->own->reads_before) l->inputs[0]->own->keeps_before = true;
        if (pd__act_needs_x[l->act] && l->wants_grad && net->mode != PD_PREDICT) l->own->keeps_before = true;
    }
    return PD_OK;
}

/* ---- predicting: outputs share memory, and layers fold into those below them ---- */

/* The layer's output will not be read any more. */
static void pd__give_back(pd_layer *l) {
    pd__store *store = &l->own->store[PD__OUT];
    pd_net *net = l->net;
    if (l->own->lent && store->data) {
        net->spares[net->spare_count].data = store->data;
        net->spares[net->spare_count++].capacity = store->data_capacity;
        store->data = NULL;
        store->data_capacity = 0;
    }
    l->own->lent = false;
    if (l->own->slot < 0) l->out.data = NULL;
}

/* Memory for an output: the smallest spare that holds it, else the largest, which grows. */
static bool pd__borrow(pd_layer *l, int64_t numbers) {
    pd_net *net = l->net;
    pd__store *store = &l->own->store[PD__OUT];
    int64_t best = 0;
    for (int64_t i = 1; i < net->spare_count; i++) {
        int64_t a = net->spares[i].capacity, b = net->spares[best].capacity;
        if (b < numbers ? a > b : a >= numbers && a < b) best = i;
    }
    if (net->spare_count > 0) {
        store->data = net->spares[best].data;
        store->data_capacity = net->spares[best].capacity;
        net->spares[best] = net->spares[--net->spare_count];
    }
    l->own->lent = true;
    return pd__grow_numbers(net, &store->data, &store->data_capacity, numbers);
}

/* The numbers below become the layer's output, without a copy. */
static void pd__take_over(pd_layer *l, pd_layer *below) {
    pd__store *store = &l->own->store[PD__OUT], *from = &below->own->store[PD__OUT];
    pd_real *data = store->data;
    int64_t capacity = store->data_capacity;
    bool lent = l->own->lent;
    store->data = from->data, store->data_capacity = from->data_capacity, l->own->lent = below->own->lent;
    from->data = data, from->data_capacity = capacity, below->own->lent = lent;
    l->out.data = store->data;
    store->host_of = from->host_of = NULL;
}

/* For forward: takes input 0, which has as many numbers, over as the output. False if it is needed as it is. */
static bool pd__pass_on(pd_layer *l) {
    const pd_layer *below = l->inputs[0];
    if (l->net->mode != PD_PREDICT || below->own->slot >= 0 || below->own->target || below->own->consumers > 1 ||
        pd__is_carried(l) || l->own->keeps_before || l->own->loop)
        return false;
    pd__take_over(l, l->inputs[0]);
    return true;
}

/* Who may fold into the layer below: its only reader. */
static void pd__plan_folds(pd_net *net) {
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i], *below = l->input_count == 1 ? l->inputs[0] : NULL;
        if (l->own->active && l->type->fold && below && below->own->slot < 0 && below->own->consumers == 1 &&
            !below->own->target && below->act == PD_LINEAR && !l->own->keeps_before && !below->is_ids &&
            !pd__is_carried(below) && !pd__is_carried(l) && !below->own->loop && !l->own->loop &&
            below->shape.channels == l->shape.channels)
            below->own->above = l;
    }
}

PD_DEF pd_status pd_layer_epilogue(pd_layer *layer, const pd_real *bias, pd_epilogue *after) {
    struct pd__layer *own = layer->own;
    pd_layer *top = own->above ? own->above : layer;
    memset(after, 0, sizeof *after);
    after->bias = bias;
    if (own->above) {
        pd_device *d = layer->device;
        int64_t channels = layer->shape.channels, size[4] = { 1, 1, 1, 0 }, strides[4] = { 0, 0, 0, 1 };
        pd_real *center, *shift;
        pd_status status;
        if (!pd_device_grow(d, &own->folded, &own->folded_capacity, 3 * channels))
            return pd_layer_fail(layer, PD_E_MEMORY, "out of memory for %lld numbers", 3 * (long long)channels);
        center = own->folded + channels, shift = center + channels;
        status = top->type->fold(top, own->folded, center, shift);
        if (status != PD_OK) return status;
        size[3] = channels;
        if (bias) d->contract(d, size, -1, bias, strides, NULL, strides, center, strides);
        after->scale = own->folded;
        after->center = center;
        after->bias = shift;
        own->above_done = true;
    }
    if (top->act == PD_SOFTMAX || top->own->keeps_before) return PD_OK;
    after->act = top->act;
    after->alpha = (pd_real)top->act_alpha;
    own->act_done = true;
    return PD_OK;
}

/* Counts who will report gradients: for the updater's grad_final, and for costs that differentiate activations. */
static pd_status pd__count_users(pd_net *net) {
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        l->own->uses = l->own->before_uses = 0;
        for (int k = 0; k < l->param_count; k++) l->params[k]->users = 0;
    }
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        if (!l->own->active || !l->wants_grad) continue;
        for (int k = 0; k < l->input_count; k++) l->inputs[k]->own->uses++;
        if (l->own->fed) l->own->fed->own->uses++;
        if (l->own->reads_before) l->inputs[0]->own->before_uses++;
        for (int k = 0; k < l->param_count; k++) {
            pd_status status = pd__need_grad(l->params[k]);
            if (status != PD_OK) return status;
            l->params[k]->users++;
        }
    }
    return PD_OK;
}

/* Rows of the batch's ended samples in a slot; -1 when pd_predict left a slot of sequences out. */
static int64_t pd__slot_rows(const pd_slot *slot, int64_t samples) {
    if (!slot->sequence) return samples;
    return samples < slot->start_capacity ? slot->starts[samples] : -1;
}

static pd_status pd__bind_input(pd_layer *l, const pd_batch *batch) {
    const pd_slot *s = &batch->slots[l->own->slot];
    pd_device *d = l->net->device;
    int64_t rows = pd__slot_rows(s, batch->samples);
    if (s->width != l->out.width || (s->kind != PD_SLOT_DENSE) != l->is_ids ||
        (s->kind == PD_SLOT_SPARSE) != l->is_sparse || s->sequence != l->is_sequence)
        return pd_layer_fail(l, PD_E_SHAPE, "the batch was made for a net with another input here");
    if (rows < 0 || s->rows < rows || (rows > 0 && s->rows == 0))
        return pd_layer_fail(l, PD_E_SHAPE, "the batch has %lld samples, but %lld rows for this input",
                             (long long)batch->samples, (long long)s->rows);
    l->out.rows = rows;
    l->out.data = l->is_ids ? NULL : s->data;
    l->out.ids = l->is_ids ? s->ids : NULL;
    l->out.row_starts = s->row_starts;
    l->out.values = s->values;
    l->out.sequences = s->sequence ? batch->samples : 0;
    l->out.starts = s->sequence ? s->starts : NULL;
    l->own->store[PD__OUT].host_of = NULL;
    if (!l->is_ids && (!l->out.data || !d->host_memory)) { /* without rows layers may rely on an address to add 0 to */
        pd__store *store = &l->own->store[PD__OUT];
        if (!pd__grow_numbers(l->net, &store->data, &store->data_capacity, rows * l->out.width))
            return pd_layer_fail(l, PD_E_MEMORY, "out of memory for %lld rows", (long long)rows);
        l->out.data = store->data;
        if (rows > 0) d->upload(d, l->out.data, s->data, (size_t)(rows * l->out.width) * sizeof *s->data);
    }
    return PD_OK;
}

/* Do the rows of two layers belong to each other, one to one? If not, `text` says so. */
static bool pd__rows_fit(const pd_layer *a, const pd_layer *b, char text[400]) {
    const pd_tensor *x = &a->out, *y = &b->out;
    int64_t sample = 0;
    if (x->rows == y->rows && x->starts == y->starts) return true;
    if (!x->starts || !y->starts || x->sequences != y->sequences) {
        snprintf(text, 400, "\"%.100s\" has %lld %s, but \"%.100s\" has %lld %s", b->name,
                 (long long)(y->starts ? y->sequences : y->rows), y->starts ? "sequences" : "rows", a->name,
                 (long long)(x->starts ? x->sequences : x->rows), x->starts ? "sequences" : "rows");
        return false;
    }
    if (memcmp(x->starts, y->starts, (size_t)(x->sequences + 1) * sizeof *x->starts) == 0) return true;
    while (x->starts[sample + 1] == y->starts[sample + 1]) sample++;
    snprintf(text, 400, "sample %lld of \"%.100s\" has %lld rows, but that of \"%.100s\" has %lld", (long long)sample,
             b->name, (long long)(y->starts[sample + 1] - y->starts[sample]), a->name,
             (long long)(x->starts[sample + 1] - x->starts[sample]));
    return false;
}

/* Rows and offsets of this batch. */
static pd_status pd__size_output(pd_layer *l) {
    const pd_tensor *first = l->input_count ? &l->inputs[0]->out : NULL;
    char text[400];
    l->own->before.data = l->own->before.grad = NULL;
    if (first) {
        l->out.rows = first->rows;
        l->out.sequences = l->is_sequence ? first->sequences : 0;
        l->out.starts = l->is_sequence ? first->starts : NULL;
    }
    for (int k = 1; k < l->input_count && !l->type->resize; k++)
        if (!pd__rows_fit(l->inputs[0], l->inputs[k], text)) return pd_layer_fail(l, PD_E_SHAPE, "%s", text);
    return l->type->resize ? l->type->resize(l) : PD_OK;
}

static pd_status pd__no_rows(pd_layer *l) {
    return pd_layer_fail(l, PD_E_MEMORY, "out of memory for %lld rows of %lld numbers", (long long)l->out.rows,
                         (long long)l->out.width);
}

/* Memory for them: the layer's own, but one that only predicts borrows it. */
static pd_status pd__ready_output(pd_layer *l) {
    pd__store *store = l->own->store;
    pd_tensor *before = &l->own->before;
    bool borrow = l->net->mode == PD_PREDICT && !store->data;
    int64_t numbers;
    if (!pd__multiply_sizes(l->out.rows, l->out.width, &numbers) ||
        !(borrow ? pd__borrow(l, numbers) : pd__grow_numbers(l->net, &store->data, &store->data_capacity, numbers)))
        return pd__no_rows(l);
    l->out.data = store->data;
    if (l->own->keeps_before) {
        if (!pd__grow_numbers(l->net, &store[PD__BEFORE].data, &store[PD__BEFORE].data_capacity, numbers))
            return pd__no_rows(l);
        before->data = store[PD__BEFORE].data;
    }
    store[PD__OUT].host_of = store[PD__BEFORE].host_of = NULL;
    return PD_OK;
}

static pd_status pd__ready_zeros(pd_layer *l, int which) {
    pd_device *d = l->net->device;
    pd__store *store = &l->own->store[which];
    int64_t numbers = l->out.rows * l->out.width;
    if (!pd__grow_numbers(l->net, &store->grad, &store->grad_capacity, numbers))
        return pd_layer_fail(l, PD_E_MEMORY, "out of memory for the gradient of %lld rows", (long long)l->out.rows);
    d->fill(d, numbers, 0, store->grad);
    pd__tensor_of(l, which)->grad = store->grad;
    return PD_OK;
}

/* Where all users read the layer before its activation, their gradients are added up in out.grad. */
static pd_status pd__ready_grad(pd_layer *l) {
    pd_status status;
    l->out.grad = NULL;
    if (l->net->mode == PD_PREDICT || !l->wants_grad) return PD_OK;
    status = pd__ready_zeros(l, PD__OUT);
    if (status == PD_OK && l->own->before_uses > 0 && l->own->before_uses < l->own->uses)
        status = pd__ready_zeros(l, PD__BEFORE);
    return status;
}

/* For costs that set `reads_before`: what input 0 puts out before its activation, and where its gradient goes (NULL:
   not wanted). For the others: its output. */
static const pd_real *pd__read_before(const pd_layer *cost, pd_real **grad) {
    pd_layer *input = cost->inputs[0];
    *grad = cost->own->reads_before && input->own->before.grad ? input->own->before.grad : input->out.grad;
    return cost->own->reads_before ? input->own->before.data : input->out.data;
}

/* The layer's own forward, then its activation: in place, or, if what comes before it is kept, from there. */
static pd_status pd__forward_layer(pd_layer *l) {
    pd_device *d = l->device;
    pd_real *x = l->own->before.data, *y = l->out.data;
    pd_status status;
    if (x) l->out.data = x;
    l->own->act_done = false;
    status = l->type->forward(l);
    if (x) l->out.data = y;
    if (status != PD_OK) {
        if (l->net->failure.status == PD_OK) pd_layer_fail(l, status, "%s", pd_status_text(status));
        return status;
    }
    if (l->own->part == PD__BEFORE_LOOP) return PD_OK; /* the sum is not there yet */
    if (l->act != PD_LINEAR && !l->own->act_done)
        d->activate(d, l->act, (pd_real)l->act_alpha, l->out.rows, l->out.width, x ? x : l->out.data, l->out.data);
    return PD_OK;
}

/* ---- layers on the host ----
   On a device without host memory, a layer that touches numbers itself, or needs what the device doesn't have, runs on
   the net's CPU: for the time of its forward and backward, what it reads and writes is carried to the host, and the
   tensors and parameters that it sees are those of the copies. */

static pd_status pd__host_memory_fail(pd_net *net) { return pd__no_memory(net, "carrying numbers to the host"); }

/* A layer's numbers in host memory; NULL (message set) when out of memory, or when the device has failed. */
static pd_real *pd__host_numbers(pd_layer *l, int which) {
    pd__store *store = &l->own->store[which];
    pd_real *data = pd__tensor_of(l, which)->data;
    int64_t n = l->out.rows * l->out.width;
    if (l->net->device->host_memory || store->at_host) return data;
    if (store->host_of == data && store->host_numbers == n) return store->host_data;
    if (!pd_grow(&l->net->allocator, (void **)&store->host_data, &store->host_data_capacity, pd__max(n, 1),
                 sizeof(pd_real))) {
        pd__host_memory_fail(l->net);
        return NULL;
    }
    store->host_of = NULL;
    if (pd__download(l->net, store->host_data, data, n) != PD_OK) return NULL;
    store->host_of = data;
    store->host_numbers = n;
    return store->host_data;
}

static pd_real *pd__host_data(pd_layer *l) { return pd__host_numbers(l, PD__OUT); }

/* Puts the copies in the place of a layer's numbers and, if `grad`, their gradient, until pd__tensor_to_device. */
static pd_status pd__tensor_to_host(pd_layer *l, int which, bool grad) {
    pd_device *d = l->net->device;
    pd__store *store = &l->own->store[which];
    pd_tensor *t = pd__tensor_of(l, which);
    int64_t n;
    grad = grad && t->grad;
    if (store->at_host || !t->data) return PD_OK;
    n = l->out.rows * l->out.width; /* ids have a width too, which may be huge */
    if (!pd__host_numbers(l, which)) return l->net->failure.status;
    if (!pd_grow(&l->net->allocator, (void **)&store->host_grad, &store->host_grad_capacity, grad ? pd__max(n, 1) : 0,
                 sizeof(pd_real)))
        return pd__host_memory_fail(l->net);
    if (grad && n > 0) d->download(d, store->host_grad, t->grad, (size_t)n * sizeof(pd_real));
    store->away = t->data;
    store->away_grad = t->grad;
    t->data = store->host_data;
    if (grad) t->grad = store->host_grad;
    store->at_host = true;
    return PD_OK;
}

static void pd__tensor_to_device(pd_layer *l, int which, bool data, bool grad) {
    pd_device *d = l->net->device;
    pd__store *store = &l->own->store[which];
    pd_tensor *t = pd__tensor_of(l, which);
    size_t bytes;
    if (!store->at_host) return;
    bytes = (size_t)(l->out.rows * l->out.width) * sizeof(pd_real);
    store->at_host = false;
    t->data = store->away;
    t->grad = store->away_grad;
    if (data && bytes) d->upload(d, t->data, store->host_data, bytes);
    if (grad && t->grad && bytes) d->upload(d, t->grad, store->host_grad, bytes);
}

/* Both of a layer's tensors. */
static pd_status pd__layer_to_host(pd_layer *l, bool grad) {
    pd_status status = pd__tensor_to_host(l, PD__OUT, grad);
    return status == PD_OK ? pd__tensor_to_host(l, PD__BEFORE, grad) : status;
}
static void pd__layer_to_device(pd_layer *l, bool data, bool grad) {
    pd__tensor_to_device(l, PD__OUT, data, grad);
    pd__tensor_to_device(l, PD__BEFORE, data, grad);
}

/* Puts a shadow, with copies of what the device has, in the place of parameter k. */
static pd_status pd__param_to_host(pd_layer *l, int k) {
    pd_device *d = l->net->device;
    const pd_allocator *a = &l->net->allocator;
    pd__shadow *s = &l->own->shadows[k];
    pd_param *p = s->real = l->params[k];
    int64_t values, grads = p->grad ? pd__grad_size(p) : 0;
    const pd_real *from = pd__read_numbers(p, &values);
    if (!pd_grow(a, (void **)&s->values, &s->value_capacity, pd__max(values, 1), sizeof *s->values) ||
        !pd_grow(a, (void **)&s->grads, &s->grad_capacity, pd__max(grads, p->grad != NULL), sizeof *s->grads))
        return pd__host_memory_fail(l->net);
    s->param = *p;
    s->param.value = p->touched ? NULL : s->values;
    s->param.row_values = p->touched ? s->values : NULL;
    s->param.grad = s->grads; /* without one it stays NULL: nothing was taken */
    if (values > 0) d->download(d, s->values, from, (size_t)values * sizeof *from);
    if (grads > 0) d->download(d, s->grads, p->grad, (size_t)grads * sizeof *from);
    l->params[k] = &s->param;
    for (int i = 0; i < k; i++) /* one that stands there twice has one shadow */
        if (l->own->shadows[i].real == p) l->params[k] = &l->own->shadows[i].param;
    return PD_OK;
}

static void pd__param_to_device(pd_layer *l, int k, bool backward) {
    pd_device *d = l->net->device;
    pd__shadow *s = &l->own->shadows[k];
    const pd_param *p = s->real;
    bool first = l->params[k] == &s->param;
    l->params[k] = s->real;
    if (first && p->is_buffer && !backward) d->upload(d, p->value, s->param.value, (size_t)p->size * sizeof(pd_real));
    if (first && backward && p->grad) d->upload(d, p->grad, s->param.grad, (size_t)pd__grad_size(p) * sizeof(pd_real));
}

/* What the layer will see on the host. *moved: so many parameters are shadows now. */
static pd_status pd__carry(pd_layer *l, bool backward, int *moved) {
    struct pd__layer *own = l->own;
    const pd_allocator *a = &l->net->allocator;
    pd_status status = PD_OK;
    if (!own->shadows) own->shadows = (pd__shadow *)pd_alloc(a, l->param_count, sizeof *own->shadows);
    if (!own->shadows) return pd__host_memory_fail(l->net);
    for (int i = 0; i < PD__COUNT(own->store) && !backward; i++) { /* forward fills them */
        pd__store *store = &own->store[i];
        if (!pd_grow(a, (void **)&store->host_data, &store->host_data_capacity,
                     pd__tensor_of(l, i)->data ? pd__max(l->out.rows * l->out.width, 1) : 0, sizeof(pd_real)))
            return pd__host_memory_fail(l->net);
        store->host_of = pd__tensor_of(l, i)->data;
        store->host_numbers = l->out.rows * l->out.width;
    }
    for (int k = 0; status == PD_OK && k < l->input_count; k++) status = pd__layer_to_host(l->inputs[k], backward);
    if (status == PD_OK) status = pd__layer_to_host(l, backward);
    while (status == PD_OK && *moved < l->param_count) {
        status = pd__param_to_host(l, *moved);
        *moved += status == PD_OK;
    }
    return status;
}

/* Runs `work` of a layer, with its numbers on the host if it must. */
static pd_status pd__on_host(pd_layer *l, bool backward, pd_status (*work)(pd_layer *l)) {
    int moved = 0;
    pd_status status;
    if (!pd__is_carried(l)) return work(l);
    status = pd__carry(l, backward, &moved);
    if (status == PD_OK) status = work(l);
    while (moved > 0) pd__param_to_device(l, --moved, backward);
    pd__layer_to_device(l, !backward, false);
    for (int k = 0; k < l->input_count; k++) pd__layer_to_device(l->inputs[k], false, backward);
    if (status != PD_OK && !backward) l->own->store[PD__OUT].host_of = l->own->store[PD__BEFORE].host_of = NULL;
    return status;
}

/* A call of the updater between two layers, if it has one to make. */
static pd_status pd__poll(pd_net *net) {
    return net->updater && net->updater->poll ? net->updater->poll(net->updater) : PD_OK;
}

static pd_status pd__need_params(pd_layer *l) {
    pd_updater *u = l->net->updater;
    if (!u || !u->param_needed) return PD_OK;
    for (int k = 0; k < l->param_count; k++)
        if (!l->params[k]->announced) {
            pd_status status = u->param_needed(u, l->params[k]);
            if (status != PD_OK) return status;
            l->params[k]->announced = true;
        }
    return PD_OK;
}

/* What comes before the layers: the rows at the inputs, and those of sparse parameters that the batch names. */
static pd_status pd__bind(pd_net *net, const pd_batch *batch) {
    pd_status status = PD_OK;
    for (int64_t i = 0; status == PD_OK && i < net->layer_count; i++)
        if (net->layers[i]->own->active && net->layers[i]->own->slot >= 0)
            status = pd__bind_input(net->layers[i], batch);
    pd__forget_rows(net);
    for (int64_t i = 0; status == PD_OK && i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        if (!l->own->active || !l->type->prefetch) continue;
        status = l->type->prefetch(l);
        if (status != PD_OK && net->failure.status == PD_OK) pd_layer_fail(l, status, "%s", pd_status_text(status));
        for (int k = 0; status == PD_OK && k < l->param_count; k++)
            if (l->params[k]->touched && l->wants_grad && net->mode != PD_PREDICT) status = pd__need_grad(l->params[k]);
    }
    return status == PD_OK ? pd__ready_rows(net) : status;
}

/* A layer that has folded into the one below is there already, but perhaps for its activation. */
static pd_status pd__take_folded(pd_layer *l, pd_layer *below) {
    pd__take_over(l, below);
    if (l->act != PD_LINEAR && !below->own->act_done)
        l->device->activate(l->device, l->act, (pd_real)l->act_alpha, l->out.rows, l->out.width, l->out.data,
                            l->out.data);
    return PD_OK;
}

static pd_status pd__compute(pd_layer *l) {
    pd_layer *below = l->input_count == 1 ? l->inputs[0] : NULL;
    pd_status status = pd__size_output(l);
    if (status == PD_OK && below && below->own->above == l && below->own->above_done) return pd__take_folded(l, below);
    if (status == PD_OK) status = pd__ready_output(l);
    if (status == PD_OK) status = pd__ready_grad(l);
    return status == PD_OK ? pd__on_host(l, false, pd__forward_layer) : status;
}

/* The layer has read its inputs for the last time in this run. */
static void pd__let_inputs_go(pd_layer *l) {
    for (int k = 0; l->net->mode == PD_PREDICT && k < l->input_count; k++)
        if (--l->inputs[k]->own->consumers == 0 && !l->inputs[k]->own->target) pd__give_back(l->inputs[k]);
}

static pd_status pd__run_layer(pd_layer *l) {
    double start = pd_seconds();
    pd_status status = pd__need_params(l);
    if (status == PD_OK) status = l->own->slot < 0 ? pd__compute(l) : pd__ready_grad(l);
    if (status == PD_OK) pd__let_inputs_go(l);
    if (status == PD_OK) status = pd__poll(l->net);
    l->own->forward_seconds += pd_seconds() - start;
    l->own->runs++;
    return status;
}

/* A sample that was begun and not ended would silently be left out. */
static pd_status pd__check_ended(pd_net *net, const pd_batch *batch) {
    for (int i = 0; i < batch->slot_count; i++)
        if (batch->slots[i].rows > pd__max(0, pd__slot_rows(&batch->slots[i], batch->samples)))
            return pd__fail(net, PD_E_STATE,
                            "pd_forward: the last sample of the batch has not been ended (pd_batch_end_sample)");
    return PD_OK;
}

PD_DEF pd_status pd_forward(pd_net *net, const pd_batch *batch, pd_mode mode, pd_layer *const *targets, int count) {
    pd_status status;
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!batch || !targets) return pd__fail(net, PD_E_ARGUMENT, "pd_forward: the batch or the targets are NULL");
    if (net->open_group)
        return pd__fail(net, PD_E_STATE, "pd_forward: group \"%.100s\" has no pd_group_end yet", net->open_group->name);
    if (batch->slot_count != net->slot_count)
        return pd__fail(net, PD_E_SHAPE, "pd_forward: the batch has %d slots, the net %d inputs", batch->slot_count,
                        net->slot_count);
    if (mode != PD_PREDICT && net->origin)
        return pd__fail(net, PD_E_STATE, "pd_forward: a shared net only predicts; train the one it came from");
    if (pd__check_ended(net, batch) != PD_OK || (mode != PD_PREDICT && pd__want_thawed(net, "pd_forward") != PD_OK))
        return PD_E_STATE;
    pd__clear_failure(net);
    if (mode == PD_PREDICT &&
        !pd_grow(&net->allocator, (void **)&net->spares, &net->spare_capacity, net->layer_count, sizeof *net->spares))
        return pd__no_memory(net, "predicting");
    for (int64_t i = 0; i < net->layer_count; i++)
        if (net->layers[i]->own->lent) pd__give_back(net->layers[i]);
    pd__orders_forget(net);
    net->mode = mode;
    net->ran = NULL;
    status = net->updater || net->origin ? PD_OK : pd__sync_all(net, NULL);
    if (status == PD_OK) status = pd__activate_layers(net, targets, count);
    if (status == PD_OK && mode != PD_PREDICT) status = pd__count_users(net);
    else if (status == PD_OK && !net->updater) pd__plan_folds(net);
    if (status == PD_OK) status = pd__bind(net, batch);
    if (status == PD_OK && net->updater) status = net->updater->begin_batch(net->updater, batch->samples);
    for (int64_t i = 0; status == PD_OK && i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        if (!l->own->active) continue;
        status = l->own->loop ? pd__run_loop(l->own->loop) : pd__run_layer(l);
        if (l->own->loop) i = l->own->loop->last;
    }
    if (status == PD_OK) status = pd__wait_for_device(net);
    if (status == PD_OK && mode != PD_PREDICT && count == 1) net->ran = targets[0];
    net->run_failed = status != PD_OK;
    return status;
}

static pd_status pd__report_grads(pd_layer *l) {
    pd_updater *u = l->net->updater;
    for (int k = 0; k < l->param_count; k++)
        if (--l->params[k]->users == 0 && u && l->params[k]->grad) {
            pd_status status = u->grad_final(u, l->params[k]);
            if (status != PD_OK) return status;
        }
    return PD_OK;
}

static pd_status pd__differentiate(pd_layer *l) {
    pd_device *d = l->device;
    struct pd__layer *own = l->own;
    bool is_before = own->before_uses > 0 && own->before_uses == own->uses; /* out.grad is, already */
    if (l->act != PD_LINEAR && !is_before)
        d->activate_backward(d, l->act, (pd_real)l->act_alpha, l->out.rows, l->out.width, own->before.data, l->out.data,
                             l->out.grad);
    if (own->before.grad) {
        int64_t size[4] = { 1, 1, 1, 0 }, steps[4] = { 0, 0, 0, 1 };
        size[3] = l->out.rows * l->out.width;
        d->contract(d, size, 1, own->before.grad, steps, NULL, steps, l->out.grad, steps);
    }
    return l->type->backward ? l->type->backward(l) : PD_OK;
}

static pd_status pd__backward_layer(pd_layer *l) {
    double start = pd_seconds();
    pd_status status = pd__on_host(l, true, pd__differentiate);
    if (status != PD_OK && l->net->failure.status == PD_OK) pd_layer_fail(l, status, "%s", pd_status_text(status));
    if (status == PD_OK) status = pd__report_grads(l);
    if (status == PD_OK) status = pd__poll(l->net);
    l->own->backward_seconds += pd_seconds() - start;
    return status;
}

/* Backward from `layer`, whose gradient is `seed` (host memory, rows x width), or 1 everywhere if that is NULL. */
static pd_status pd__backward_from(pd_net *net, pd_layer *layer, const pd_real *seed) {
    pd_device *d = net->device;
    int64_t numbers = layer->out.rows * layer->out.width;
    pd_status status = PD_OK;
    if (!layer->wants_grad) return pd_layer_fail(layer, PD_E_STATE, "nothing that it depends on learns");
    net->ran = NULL;
    net->leftover = net->leftover || !net->updater;
    if (seed) d->upload(d, layer->out.grad, seed, (size_t)numbers * sizeof *seed);
    else d->fill(d, numbers, 1, layer->out.grad);
    for (int64_t i = layer->own->index; status == PD_OK && i >= 0; i--) {
        pd_layer *l = net->layers[i];
        if (!l->own->active) continue;
        if (l->own->loop) {
            status = pd__backward_loop(l->own->loop);
            i = l->own->loop->first;
        } else if (l->wants_grad) status = pd__backward_layer(l);
    }
    return status == PD_OK ? pd__wait_for_device(net) : status;
}

PD_DEF pd_status pd_backward(pd_net *net, pd_layer *cost) {
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!cost || net->ran != cost)
        return pd__fail(net, PD_E_STATE,
                        "pd_backward: call pd_forward for just this layer, in PD_TRAIN or PD_CHECK, first");
    return pd__backward_from(net, cost, NULL);
}

PD_DEF const pd_real *pd_output(pd_layer *layer, int64_t *rows, int64_t *width) {
    if (layer && layer->own->loop) {
        pd_layer_fail(layer, PD_E_STATE,
                      "pd_output: it runs step by step in group \"%.100s\"; pd_group_output has its rows",
                      layer->own->loop->name);
        return NULL;
    }
    if (!layer || !layer->own->active || !layer->out.data || layer->is_ids) {
        if (layer && !(layer->net->run_failed && layer->net->failure.status != PD_OK)) /* else that is the reason */
            pd_layer_fail(layer, PD_E_STATE, "pd_output: it put out no numbers in the last run%s",
                          layer->net->mode == PD_PREDICT && !layer->own->target ? ", of which it was no target" : "");
        return NULL;
    }
    if (rows) *rows = layer->out.rows;
    if (width) *width = layer->out.width;
    return pd__host_data(layer);
}

PD_DEF const pd_real *pd_predict(pd_layer *output, const pd_real *rows_of_input, int64_t rows) {
    pd_net *net = output ? output->net : NULL;
    pd_real *kept;
    pd_slot *slot;
    pd_status status;
    if (!pd__check_net(net)) return NULL;
    if (net->predict_batch && net->predict_batch->slot_count != net->slot_count) { /* inputs were added since */
        pd_batch_free(net->predict_batch);
        net->predict_batch = NULL;
    }
    if (!net->predict_batch) net->predict_batch = pd_batch_new(net);
    if (!net->predict_batch) return NULL;
    slot = net->predict_batch->slots;
    if (net->slot_count < 1 || slot->kind != PD_SLOT_DENSE || slot->sequence || rows < 0 ||
        (rows > 0 && !rows_of_input)) {
        pd__fail(net, PD_E_ARGUMENT,
                 "pd_predict: needs the rows, and a net whose first input is a plain vector or image (others: see "
                 "pd_forward)");
        return NULL;
    }
    kept = slot->data;
    slot->data = (pd_real *)(uintptr_t)rows_of_input; /* only read */
    slot->rows = net->predict_batch->samples = rows;
    status = pd_forward(net, net->predict_batch, PD_PREDICT, &output, 1);
    slot->data = kept;
    slot->rows = net->predict_batch->samples = 0;
    return status == PD_OK ? pd_output(output, NULL, NULL) : NULL;
}

/* ======================================================================================================== */
/* >>groups.c                                                                                              */

/* A group's layers stand in the net's list like others. At the group's end they are sorted: first those that depend on
   no memory; then layers that gather rows into the order of time (>>layers.c) for the loop; the loop: memories, and what
   depends on them and they on it; layers that put the loop's rows back into the order of the batch; and the rest. So
   only the loop needs anything of its own. Its layers have outputs, gradients and row memory for all steps. They show the
   rows of one step while it is at work, which are next to each other; and the rows that a memory holds are the first ones
   of the layer that feeds it, in the step before: nothing is copied, and the gradient of a memory is in its place. */

/* ---- >>layer:expand, and layers that move rows to and from the loop ---- */

typedef enum pd__move {
    PD__TO_TIME,          /* the rows of the batch in order of time */
    PD__TO_BATCH,         /* and back */
    PD__TO_TIME_REPEATED, /* the sequence's row for each of its rows, in order of time */
    PD__TO_FIRST_STEP,    /* the sequence's row for its first row in order of time */
    PD__TO_BATCH_REPEATED /* the sequence's row for each of its rows: pd_expand */
} pd__move;

typedef struct pd__move_spec {
    pd_layer_opts o;
    pd__move move;
    bool before; /* it moves what input 0 is before its activation, and then applies that: a cost may want both */
} pd__move_spec;

static const pd__move_spec *pd__move_of(const pd_layer *l) { return (const pd__move_spec *)l->opts; }

/* The layer whose sequences the group goes along. */
static pd_layer *pd__group_lead(const pd_group *g) {
    for (int64_t i = 0; i < g->outer_count; i++)
        if (g->outers[i].goes_by == PD__BY_STEP) return g->outers[i].layer;
    return NULL;
}

/* The order of time of this run. NULL (message set) when out of memory. */
static const pd__order *pd__group_order(pd_layer *l) {
    pd_group *g = l->own->group;
    if (!g->order) g->order = pd__time_order(l, &pd__group_lead(g)->out, g->reverse);
    return g->order;
}

static pd_status pd__move_setup(pd_layer *l) {
    const pd__move_spec *s = pd__move_of(l);
    if (l->inputs[0]->is_ids) return pd__want_numbers(l);
    if (s->move == PD__TO_BATCH_REPEATED && (l->inputs[0]->is_sequence || !l->inputs[1]->is_sequence))
        return pd_layer_fail(l, PD_E_SHAPE, "\"%.100s\" %s, expected one row per sample; \"%.100s\" %s",
                             l->inputs[0]->name, pd__rows_of[l->inputs[0]->is_sequence], l->inputs[1]->name,
                             pd__rows_of[l->inputs[1]->is_sequence]);
    l->shape = l->inputs[0]->shape;
    l->act = s->o.act;
    l->is_sequence = s->move != PD__TO_FIRST_STEP;
    if (!s->before) return PD_OK;
    l->own->reads_before = true;
    l->act = l->inputs[0]->act;
    return PD_OK;
}

/* There must be one row per sequence. */
static pd_status pd__check_repeated(pd_layer *l, int64_t sequences, const pd_layer *of) {
    if (pd__in(l, 0)->rows == sequences) return PD_OK;
    return pd_layer_fail(l, PD_E_SHAPE, "\"%.100s\" has %lld rows, but \"%.100s\" has %lld sequences",
                         l->inputs[0]->name, (long long)pd__in(l, 0)->rows, of->name, (long long)sequences);
}

static pd_status pd__move_resize(pd_layer *l) {
    pd__move move = pd__move_of(l)->move;
    const pd_layer *lead = move == PD__TO_BATCH_REPEATED ? l->inputs[1] : pd__group_lead(l->own->group);
    const pd__order *o = move == PD__TO_BATCH_REPEATED ? pd__step_order(l) : pd__group_order(l);
    bool to_batch = move == PD__TO_BATCH || move == PD__TO_BATCH_REPEATED;
    char text[400];
    if (!o && move != PD__TO_BATCH_REPEATED) return PD_E_MEMORY;
    if (move == PD__TO_TIME && !pd__rows_fit(lead, l->inputs[0], text))
        return pd_layer_fail(l, PD_E_SHAPE, "of group \"%.100s\": %.250s", l->own->group->name, text);
    if (move != PD__TO_TIME && move != PD__TO_BATCH &&
        pd__check_repeated(l, o ? o->sequences : lead->out.sequences, lead) != PD_OK)
        return PD_E_SHAPE;
    l->out.rows = move == PD__TO_FIRST_STEP ? (o->steps ? o->begins[1] : 0) : lead->out.rows;
    l->out.sequences = to_batch ? lead->out.sequences : 0;
    l->out.starts = to_batch ? lead->out.starts : NULL;
    return PD_OK;
}

/* For each row of the output, the row of input 0 that it is. NULL when out of memory. */
static const int64_t *pd__moved_from(pd_layer *l) {
    pd__move move = pd__move_of(l)->move;
    const pd__order *o = move == PD__TO_BATCH_REPEATED ? pd__step_order(l) : l->own->group->order;
    int64_t *from;
    if (move == PD__TO_TIME) return o->order;
    if (move == PD__TO_BATCH) return o->places;
    if (move == PD__TO_FIRST_STEP) return o->sentences;
    from = pd_layer_integers(l, 0, l->out.rows);
    if (from && o)
        for (int64_t t = 0; t < o->steps; t++)
            for (int64_t i = o->begins[t]; i < o->begins[t + 1]; i++) from[i] = o->sentences[i - o->begins[t]];
    else if (from)
        for (int64_t q = 0; q < l->out.sequences; q++)
            for (int64_t r = l->out.starts[q]; r < l->out.starts[q + 1]; r++) from[r] = q;
    return from;
}

static pd_status pd__move_forward(pd_layer *l) {
    pd_real *grad;
    const int64_t *from = pd__moved_from(l);
    if (!from) return PD_E_MEMORY;
    l->device->gather_rows(l->device, l->out.rows, l->out.width, from, NULL, NULL, pd__read_before(l, &grad), NULL,
                           l->out.data);
    return PD_OK;
}

/* For each row of input 0, the rows of the output that are it. */
static pd_status pd__moved_to(pd_layer *l, pd_csr *s) {
    pd__move move = pd__move_of(l)->move;
    const pd__order *o = move == PD__TO_BATCH_REPEATED ? NULL : l->own->group->order;
    bool first = move == PD__TO_FIRST_STEP;
    int64_t *starts, *columns, count = 0;
    s->rows = pd__in(l, 0)->rows;
    s->starts = move == PD__TO_TIME_REPEATED ? o->starts : NULL;
    s->columns = move == PD__TO_BATCH ? o->order : o ? o->places : NULL;
    s->values = NULL;
    if (!first && o) return PD_OK;
    starts = pd_layer_integers(l, 1, s->rows + 1);
    columns = pd_layer_integers(l, 2, l->out.rows);
    if (!starts || !columns) return PD_E_MEMORY;
    for (int64_t q = 0; q < s->rows; q++) {
        const int64_t *from = o ? o->starts : l->out.starts;
        int64_t rows = from[q + 1] - from[q];
        starts[q] = count;
        for (int64_t r = 0; r < (first ? rows > 0 : rows); r++) columns[count + r] = first ? o->ranks[q] : count + r;
        count += first ? rows > 0 : rows;
    }
    starts[s->rows] = count;
    s->starts = starts;
    s->columns = columns;
    return PD_OK;
}

static pd_status pd__move_backward(pd_layer *l) {
    pd_real *grad;
    pd_csr s;
    (void)pd__read_before(l, &grad);
    if (!grad) return PD_OK;
    if (pd__moved_to(l, &s) != PD_OK) return PD_E_MEMORY;
    l->device->sparse_product(l->device, &s, l->out.width, l->out.grad, grad);
    return PD_OK;
}

PD__TYPE(pd__expand_type, "expand", 2, 2, pd__move_spec, 0, PD_OP(gather_rows) | PD_OP(sparse_product), pd__move_setup,
         pd__move_resize, pd__move_forward, pd__move_backward);
static const pd_layer_type pd__move_type = { PD_API_VERSION,
                                             "rows",
                                             1,
                                             1,
                                             sizeof(pd__move_spec),
                                             0,
                                             PD_OP(gather_rows) | PD_OP(sparse_product),
                                             pd__move_setup,
                                             pd__move_resize,
                                             pd__move_forward,
                                             pd__move_backward,
                                             NULL,
                                             NULL,
                                             NULL,
                                             0 };

PD_DEF pd_layer *pd_expand(pd_net *net, pd_layer *input, pd_layer *like, const pd_layer_opts *opts) {
    pd_layer *inputs[2];
    PD__SPEC(pd__move_spec);
    s.move = PD__TO_BATCH_REPEATED;
    inputs[0] = input, inputs[1] = like;
    return pd_layer_add(net, &pd__expand_type, s.o.name, inputs, 2, &s);
}

/* ---- memories: their rows are set by pd__show_step ---- */

static pd_status pd__memory_setup(pd_layer *l) {
    int64_t size = *(const int64_t *)l->opts;
    const pd_layer *boot = l->input_count ? l->inputs[0] : NULL;
    if (pd__want_least(l, "size", size, 1) != PD_OK || pd__want_numbers(l) != PD_OK) return pd_error_status(l->net);
    if (boot && boot->is_sequence && boot->type != &pd__move_type)
        return pd_layer_fail(l, PD_E_SHAPE, "\"%.100s\" carries sequences, expected one row per sequence of the group",
                             boot->name);
    if (boot && boot->out.width != size)
        return pd_layer_fail(l, PD_E_SHAPE, "\"%.100s\" has %lld numbers per row, expected %lld, the memory's size",
                             boot->name, (long long)boot->out.width, (long long)size);
    l->shape = pd__shape(size, 1, 1);
    l->is_sequence = true;
    return PD_OK;
}

static pd_status pd__memory_resize(pd_layer *l) {
    const pd__order *o = pd__group_order(l);
    if (!o) return PD_E_MEMORY;
    l->out.rows = o->rows;
    l->out.sequences = 0;
    l->out.starts = NULL;
    return PD_OK;
}

static pd_status pd__memory_forward(pd_layer *l) {
    (void)l;
    return PD_OK;
}

static const pd_layer_type pd__memory_type = { PD_API_VERSION,
                                               "memory",
                                               0,
                                               1,
                                               sizeof(int64_t),
                                               0,
                                               PD_OP(fill),
                                               pd__memory_setup,
                                               pd__memory_resize,
                                               pd__memory_forward,
                                               pd__memory_forward,
                                               NULL,
                                               NULL,
                                               NULL,
                                               0 };

/* ---- building ---- */

static bool pd__group_fail(const pd_group *g, pd_status status, const char *what, const char *name) {
    pd__fail_build(g->net, status, what, g->name, name);
    return false;
}

/* Is the group open, and nothing failed so far? */
static bool pd__check_open(const pd_group *g) {
    if (!g || g->net->broken) return false;
    return !g->ended || pd__group_fail(g, PD_E_STATE, "group \"%.100s\" has been ended%s", "");
}

PD_DEF pd_group *pd_group_begin(pd_net *net, const pd_group_opts *opts) {
    char name[32];
    pd_group *g, **end;
    int number = 1;
    const char *given = opts ? opts->name : NULL;
    if (!pd__check_net(net)) return NULL;
    for (end = &net->groups; *end; end = &(*end)->next) number++;
    snprintf(name, sizeof name, "group%d", number);
    if (net->origin || net->open_group || (given && !pd__name_ok(given))) {
        pd__fail_build(net, PD_E_STATE, "%.100s: %s%.100s", given ? given : name,
                       net->origin ? "a shared net takes no more groups"
                       : net->open_group
                           ? "groups don't nest; it begins before the end of "
                           : "a name has 1 to 200 characters, no quotes, backslashes or control characters",
                       net->open_group ? net->open_group->name : "");
        return NULL;
    }
    g = (pd_group *)pd_alloc(&net->allocator, 1, sizeof *g);
    if (g) g->name = pd__copy_text(&net->allocator, given ? given : name);
    if (!g || !g->name) {
        pd_free(&net->allocator, g);
        pd__fail_build(net, PD_E_MEMORY, "%.100s: out of memory for the group", given ? given : name);
        return NULL;
    }
    g->net = net;
    g->reverse = opts && opts->reverse;
    g->begin = net->layer_count;
    g->step = -1;
    g->last = -1;
    net->open_group = g;
    return *end = g;
}

static void pd__groups_free(pd_net *net) {
    while (net->groups) {
        pd_group *g = net->groups;
        net->groups = g->next;
        pd_free(&net->allocator, g->outers);
        pd_free(&net->allocator, g->generated);
        pd_free(&net->allocator, g->name);
        pd_free(&net->allocator, g);
    }
}

/* What the layer's rows are to the group; 0: it has no business in it. */
static int pd__goes_by(const pd_group *g, const pd_layer *l) {
    if (l->own->group == g) return l->own->goes_by;
    for (int64_t i = 0; i < g->outer_count; i++)
        if (g->outers[i].layer == l) return g->outers[i].goes_by;
    return 0;
}

static pd_layer *pd__admit(pd_group *g, pd_layer *l, int goes_by, const char *what) {
    int earlier;
    if (!l || !pd__check_open(g)) return NULL;
    earlier = pd__goes_by(g, l);
    if (earlier == goes_by && l->own->group != g) return l;
    if (l->net != g->net || l->own->group == g || l->own->loop || earlier ||
        (goes_by == PD__BY_STEP && !l->is_sequence)) {
        pd__fail_build(g->net, PD_E_ARGUMENT, "group \"%.100s\": %s \"%.100s\" %s", g->name, what, l->name,
                       l->net != g->net     ? "belongs to another net"
                       : l->own->group == g ? "stands inside the group"
                       : earlier            ? "is an input as well as a static"
                       : l->own->loop       ? "runs step by step in another group; pd_group_output has its rows"
                                            : "carries no sequences");
        return NULL;
    }
    if (!pd_grow(&g->net->allocator, (void **)&g->outers, &g->outer_capacity, g->outer_count + 1, sizeof *g->outers)) {
        pd__group_fail(g, PD_E_MEMORY, "group \"%.100s\": out of memory for \"%.100s\"", l->name);
        return NULL;
    }
    g->outers[g->outer_count].layer = l;
    g->outers[g->outer_count++].goes_by = goes_by;
    return l;
}

PD_DEF pd_layer *pd_group_input(pd_group *group, pd_layer *layer) {
    return pd__admit(group, layer, PD__BY_STEP, "input");
}

PD_DEF pd_layer *pd_group_static(pd_group *group, pd_layer *layer) {
    return pd__admit(group, layer, layer && layer->is_sequence ? PD__APART : PD__BY_SEQUENCE, "static");
}

/* A layer that has the sequence's row of `of` for each of its rows: found, or made. */
static pd_layer *pd__expanded(pd_group *g, pd_layer *of) {
    pd_layer *inputs[2], *lead = pd__group_lead(g), *l;
    pd__move_spec s;
    for (int64_t i = g->begin; i < g->net->layer_count; i++)
        if (g->net->layers[i]->type == &pd__expand_type && g->net->layers[i]->inputs[0] == of) return g->net->layers[i];
    if (!lead) {
        pd__group_fail(g, PD_E_STATE, "group \"%.100s\": needs an input (pd_group_input) before the static \"%.100s\"",
                       of->name);
        return NULL;
    }
    memset(&s, 0, sizeof s);
    s.move = PD__TO_BATCH_REPEATED;
    inputs[0] = of, inputs[1] = lead;
    l = pd__add_layer(g->net, &pd__expand_type, NULL, inputs, 2, &s, NULL);
    if (!l) return NULL;
    l->own->group = g;
    l->own->goes_by = PD__BY_STEP;
    return l;
}

/* May the layer read this as its input k? *by_step: it goes by step. */
static bool pd__check_inner(pd_group *g, const pd_layer_type *type, const char *who, const pd_layer *input, int k,
                            bool *by_step) {
    int goes_by = pd__goes_by(g, input);
    bool by_rows = type->row_inputs < 0 || k < type->row_inputs;
    if (!goes_by)
        pd__fail_build(
            g->net, PD_E_ARGUMENT,
            "%.100s: \"%.100s\" stands outside group \"%.100s\"; pd_group_input or pd_group_static lets it in", who,
            input->name, g->name);
    else if (goes_by == PD__BY_STEP && !by_rows)
        pd__fail_build(g->net, PD_E_ARGUMENT,
                       "%.100s: %s can't work row by row, as group \"%.100s\" wants it to with \"%.100s\"", who,
                       type->name, g->name, input->name);
    else {
        if (by_rows && goes_by == PD__BY_STEP) *by_step = true;
        return true;
    }
    return false;
}

/* pd_layer_add in an open group. */
static pd_layer *pd__add_to_group(pd_group *g, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                                  int count, const void *opts) {
    const pd_allocator *a = &g->net->allocator;
    const char *who = name ? name : type && type->name ? type->name : "layer";
    pd_layer **taken, *l = NULL;
    bool by_step = false, fine = pd__check_layer(g->net, type, name, inputs, count, true) == PD_OK;
    for (int k = 0; fine && k < count; k++) fine = pd__check_inner(g, type, who, inputs[k], k, &by_step);
    if (!fine) return NULL;
    taken = (pd_layer **)pd_alloc(a, count, sizeof *taken);
    if (!taken) {
        pd__fail_build(g->net, PD_E_MEMORY, "%.100s: out of memory for the layer", who);
        return NULL;
    }
    for (int k = 0; fine && k < count; k++) {
        bool repeat =
            by_step && (type->row_inputs < 0 || k < type->row_inputs) && pd__goes_by(g, inputs[k]) == PD__BY_SEQUENCE;
        taken[k] = repeat ? pd__expanded(g, inputs[k]) : inputs[k];
        fine = taken[k] != NULL;
    }
    if (fine) l = pd__add_layer(g->net, type, name, taken, count, opts, NULL);
    if (l) l->own->group = g;
    if (l) l->own->goes_by = by_step ? PD__BY_STEP : l->is_sequence ? PD__APART : PD__BY_SEQUENCE;
    pd_free(a, taken);
    return l;
}

PD_DEF pd_layer *pd_group_memory(pd_group *group, int64_t size, pd_layer *boot) {
    pd_layer *l;
    if (!pd__check_open(group)) return NULL;
    if (boot && boot->net == group->net && (boot->own->loop || pd__goes_by(group, boot) == PD__BY_STEP)) {
        pd__group_fail(group, PD_E_ARGUMENT,
                       "group \"%.100s\": a memory can't begin with \"%.100s\", which goes by step", boot->name);
        return NULL;
    }
    l = pd__add_layer(group->net, &pd__memory_type, NULL, &boot, boot != NULL, &size, NULL);
    if (!l) return NULL;
    l->own->group = group;
    l->own->goes_by = PD__BY_STEP;
    l->own->follows = true;
    return l;
}

PD_DEF pd_status pd_group_feed(pd_layer *memory, pd_layer *layer) {
    pd_group *g = memory ? memory->own->group : NULL;
    const char *wrong = NULL;
    if (!memory || !layer) return memory ? pd_error_status(memory->net) : PD_E_ARGUMENT;
    if (memory->type != &pd__memory_type)
        return pd__fail_build(memory->net, PD_E_ARGUMENT,
                              "%.100s: pd_group_feed feeds memories, and this is of type %s", memory->name,
                              memory->type->name);
    if (!pd__check_open(g)) return pd_error_status(memory->net);
    if (memory->own->fed) wrong = "but it is fed already";
    else if (layer->net != g->net || pd__goes_by(g, layer) != PD__BY_STEP)
        wrong = "which does not go by the group's steps";
    else if (layer->is_ids) wrong = "which holds ids, not numbers";
    else if (layer->out.width != memory->out.width) wrong = "which has not as many numbers per row";
    if (wrong)
        return pd__fail_build(g->net, PD_E_ARGUMENT, "%.100s: a memory of %lld numbers, fed with \"%.100s\" (%s), %s",
                              memory->name, (long long)memory->out.width, layer->name,
                              pd_shape_text(layer, layer->shape), wrong);
    if (layer->type == &pd__memory_type) layer = pd_add(g->net, &layer, 1, NULL); /* two steps back */
    memory->own->fed = layer;
    return layer ? PD_OK : pd_error_status(g->net);
}

/* A layer that moves rows of `from`: found, or made. */
static pd_layer *pd__mover(pd_group *g, pd__move move, pd_layer *from) {
    pd__move_spec s;
    pd_layer *l;
    memset(&s, 0, sizeof s);
    s.move = move;
    s.before = move == PD__TO_BATCH && (from->act == PD_SOFTMAX || from->act == PD_SIGMOID);
    for (int64_t i = g->begin; i < g->net->layer_count; i++) {
        l = g->net->layers[i];
        if (l->type == &pd__move_type && l->own->group == g && pd__move_of(l)->move == move && l->inputs[0] == from)
            return l;
    }
    if (from->is_ids) {
        pd__group_fail(g, PD_E_SHAPE,
                       "group \"%.100s\": \"%.100s\" holds ids or sparse rows, which can't be read step by step; put "
                       "pd_embedding or pd_fc between",
                       from->name);
        return NULL;
    }
    l = pd__add_layer(g->net, &pd__move_type, NULL, &from, 1, &s, NULL);
    if (!l) return NULL;
    l->own->group = g;
    l->own->goes_by = PD__BY_STEP;
    l->own->follows = move == PD__TO_BATCH;
    if (from->type == &pd__memory_type) from->own->read_outside = true;
    return l;
}

static bool pd__in_loop(const pd_group *g, const pd_layer *l) {
    return l->own->group == g && l->own->follows && l->own->precedes;
}

/* Which layers depend on memories, and which memories depend on. */
static bool pd__find_loop(pd_group *g) {
    pd_net *net = g->net;
    for (int64_t i = g->begin; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        bool memory = l->own->group == g && l->type == &pd__memory_type;
        if (memory && !l->own->fed)
            return pd__group_fail(g, PD_E_STATE, "group \"%.100s\": memory \"%.100s\" is never fed (pd_group_feed)",
                                  l->name);
        if (memory) l->own->precedes = l->own->fed->own->precedes = true;
        for (int k = 0; l->own->group == g && k < l->input_count; k++)
            l->own->follows = l->own->follows || (l->inputs[k]->own->group == g && l->inputs[k]->own->follows);
    }
    for (int64_t i = net->layer_count; i-- > g->begin;)
        for (int k = 0; net->layers[i]->own->precedes && k < net->layers[i]->input_count; k++)
            if (net->layers[i]->inputs[k]->own->group == g) net->layers[i]->inputs[k]->own->precedes = true;
    return true;
}

/* Puts movers between the loop and what is around it. */
static bool pd__cut_out_loop(pd_group *g) {
    int64_t count = g->net->layer_count;
    for (int64_t i = g->begin; i < count; i++) {
        pd_layer *l = g->net->layers[i];
        bool inside = pd__in_loop(g, l), memory = l->type == &pd__memory_type;
        for (int k = 0; l->own->group == g && k < l->input_count; k++) {
            pd_layer *from = l->inputs[k];
            bool whole = !memory && l->type->row_inputs >= 0 && k >= l->type->row_inputs;
            if (inside == pd__in_loop(g, from) || whole) continue;
            if (memory) l->inputs[k] = pd__mover(g, PD__TO_FIRST_STEP, from);
            else if (!inside) l->inputs[k] = pd__mover(g, PD__TO_BATCH, from);
            else if (from->type == &pd__expand_type && from->own->group == g)
                l->inputs[k] = pd__mover(g, PD__TO_TIME_REPEATED, from->inputs[0]);
            else l->inputs[k] = pd__mover(g, PD__TO_TIME, from);
            if (!l->inputs[k]) return false;
        }
        if (memory && l->own->group == g && !pd__in_loop(g, l->own->fed))
            if (!(l->own->fed = pd__mover(g, PD__TO_TIME, l->own->fed))) return false;
    }
    return true;
}

/* Where a layer stands: see above. */
static int pd__rank_in_group(const pd_group *g, const pd_layer *l) {
    if (l->own->group != g) return 0;
    if (pd__in_loop(g, l)) return 2;
    if (l->type == &pd__move_type) return l->own->follows ? 3 : 1;
    return l->own->follows ? 4 : 0;
}

/* Sorts, and says where the loop is. */
static bool pd__sort_group(pd_group *g) {
    pd_net *net = g->net;
    int64_t n = net->layer_count - g->begin, at = 0, begins[6];
    pd_layer **sorted = (pd_layer **)pd_alloc(&net->allocator, n, sizeof *sorted);
    if (!sorted) return pd__group_fail(g, PD_E_MEMORY, "group \"%.100s\": out of memory%s", "");
    for (int rank = 0; rank <= 4; rank++) {
        begins[rank] = g->begin + at;
        for (int64_t i = 0; i < n; i++)
            if (pd__rank_in_group(g, net->layers[g->begin + i]) == rank) sorted[at++] = net->layers[g->begin + i];
    }
    for (int64_t i = 0; i < n; i++) {
        net->layers[g->begin + i] = sorted[i];
        sorted[i]->own->index = (int)(g->begin + i);
    }
    pd_free(&net->allocator, sorted);
    g->first_gather = begins[1], g->first = begins[2], g->last = begins[3] - 1, g->end = net->layer_count;
    return true;
}

/* Makes layers of the loop such, once the group is sorted. */
static bool pd__close_loop(pd_group *g) {
    pd_net *net = g->net;
    for (int64_t i = g->first; i <= g->last; i++) {
        pd_layer *l = net->layers[i];
        l->own->loop = g;
        l->own->hidden = (pd_real **)pd_alloc(&net->allocator, l->input_count + l->param_count, sizeof(pd_real *));
        if (!l->own->hidden) return pd__group_fail(g, PD_E_MEMORY, "group \"%.100s\": out of memory%s", "");
    }
    pd__find_learners(net);
    return true;
}

PD_DEF pd_layer *pd_group_end(pd_group *group, pd_layer *output) {
    if (!pd__check_open(group)) return NULL;
    if (!pd__group_lead(group)) {
        pd__group_fail(group, PD_E_STATE, "group \"%.100s\": has no input (pd_group_input)%s", "");
        return NULL;
    }
    group->net->open_group = NULL;
    group->ended = true;
    if (!pd__find_loop(group) || !pd__cut_out_loop(group) || !pd__sort_group(group) || !pd__close_loop(group))
        return NULL;
    return pd_group_output(group, output);
}

PD_DEF pd_layer *pd_group_output(pd_group *group, pd_layer *layer) {
    if (!group || !layer || group->net->broken) return NULL;
    if (!group->ended || layer->own->group != group) {
        pd__group_fail(group, PD_E_ARGUMENT,
                       group->ended ? "group \"%.100s\": its output \"%.100s\" stands outside"
                                    : "group \"%.100s\": its output \"%.100s\" is there after pd_group_end",
                       layer->name);
        return NULL;
    }
    return layer->own->loop ? pd__mover(group, PD__TO_BATCH, layer) : layer;
}

PD_DEF pd_group *pd_group_find(pd_net *net, const char *name) {
    pd_group *g = net ? net->groups : NULL;
    while (g && name && strcmp(g->name, name) != 0) g = g->next;
    return name ? g : NULL;
}

static bool pd__share_groups(pd_net *to, const pd_net *from) {
    pd_group **end = &to->groups;
    for (const pd_group *g = from->groups; g; g = g->next) {
        pd_group *copy = *end = (pd_group *)pd_alloc(&to->allocator, 1, sizeof *copy);
        if (!copy) return false;
        end = &copy->next;
        *copy = *g;
        copy->net = to;
        copy->next = NULL;
        copy->order = NULL;
        copy->outer_capacity = 0;
        copy->outers = NULL;
        copy->generated = NULL;
        copy->generated_capacity = 0;
        copy->name = pd__copy_text(&to->allocator, g->name);
        if (!copy->name || !pd_grow(&to->allocator, (void **)&copy->outers, &copy->outer_capacity, g->outer_count,
                                    sizeof *copy->outers))
            return false;
        for (int64_t i = 0; i < g->outer_count; i++) {
            copy->outers[i].layer = to->layers[g->outers[i].layer->own->index];
            copy->outers[i].goes_by = g->outers[i].goes_by;
        }
        for (int64_t i = g->begin; i < from->layer_count; i++) {
            const struct pd__layer *a = from->layers[i]->own;
            struct pd__layer *b = to->layers[i]->own;
            if (a->group != g) continue;
            b->group = copy;
            b->goes_by = a->goes_by, b->follows = a->follows, b->precedes = a->precedes;
            b->read_outside = a->read_outside;
            if (a->loop) b->loop = copy;
            if (a->fed) b->fed = to->layers[a->fed->own->index];
        }
    }
    return true;
}

/* ---- running ---- */

/* All of the loop, or nothing: a layer outside may need a part of it, but the memories go on. */
static void pd__activate_loop(pd_group *g) {
    bool active = false;
    for (int64_t i = g->first; i <= g->last; i++) active = active || g->net->layers[i]->own->active;
    for (int64_t i = g->first; active && i <= g->last; i++) {
        struct pd__layer *own = g->net->layers[i]->own;
        own->active = true;
        if (own->fed) own->fed->own->active = true;
    }
}

/* A view of `count` rows, from `first` on. */
static void pd__show_rows(pd_tensor *t, const pd_tensor *whole, int64_t width, int64_t first, int64_t count) {
    t->rows = count;
    t->data = whole->data ? whole->data + first * width : NULL;
    t->grad = whole->grad ? whole->grad + first * width : NULL;
}

/* What a memory holds in step t: the first rows of what fed it in the step before; at first those of the boot layer, or
   zeros. */
static pd_status pd__show_memory(pd_layer *l, const pd__order *o, int64_t t, int64_t count) {
    const pd_layer *fed = l->own->fed;
    if (t > 0) {
        pd__show_rows(&l->out, &fed->own->whole[PD__OUT], l->out.width, o->begins[t - 1], count);
    } else if (l->input_count) {
        pd__show_rows(&l->out, &l->inputs[0]->out, l->out.width, 0, count);
    } else {
        l->out.rows = count;
        l->out.data = pd_layer_memory(l, 0, count * l->out.width);
        l->out.grad = NULL;
        if (!l->out.data) return PD_E_MEMORY;
        l->device->fill(l->device, count * l->out.width, 0, l->out.data);
    }
    return PD_OK;
}

/* Layers of the loop, and what they read by rows, show the rows of step t; or, if that is -1, all. */
static pd_status pd__show_step(pd_group *g, int64_t t) {
    const pd__order *o = g->order;
    int64_t first = t > 0 ? o->begins[t] : 0, count = t >= 0 ? o->begins[t + 1] - first : o->rows;
    pd_status status = PD_OK;
    g->step = t;
    for (int64_t i = g->first_gather; status == PD_OK && i <= g->last; i++) {
        pd_layer *l = g->net->layers[i];
        if (!l->own->active || (l->type == &pd__move_type && pd__move_of(l)->move == PD__TO_FIRST_STEP)) continue;
        for (int which = 0; which < 2; which++) {
            pd__show_rows(pd__tensor_of(l, which), &l->own->whole[which], l->out.width, first, count);
            l->own->store[which].host_of = NULL;
        }
        if (l->own->fed && t >= 0) status = pd__show_memory(l, o, t, count);
    }
    return status;
}

/* Room for all steps. */
static pd_status pd__ready_loop(pd_group *g) {
    for (int64_t i = g->first; i <= g->last; i++) {
        pd_layer *l = g->net->layers[i];
        pd_status status = pd__need_params(l);
        if (status == PD_OK) status = pd__size_output(l);
        if (status == PD_OK) status = pd__ready_output(l);
        if (status == PD_OK) status = pd__ready_grad(l);
        if (status != PD_OK) return status;
        l->own->runs++;
        if (l->own->fed && !l->own->read_outside) l->out.grad = NULL; /* it is in the place of what feeds it */
    }
    for (int64_t i = g->first_gather; i <= g->last; i++) {
        pd_layer *l = g->net->layers[i];
        l->own->whole[PD__OUT] = l->out;
        l->own->whole[PD__BEFORE] = l->own->before;
    }
    return PD_OK;
}

static bool pd__reads_before_loop(const pd_layer *l) {
    bool reads = false;
    for (int k = 0; k < l->input_count; k++) reads = reads || !l->inputs[k]->own->loop;
    return l->type == &pd__fc_type && reads;
}

static pd_status pd__run_member(pd_layer *l, int part) {
    double start = pd_seconds();
    pd_status status;
    l->own->part = part;
    status = pd__on_host(l, false, pd__forward_layer);
    l->own->part = PD__ALL_PARTS;
    l->own->forward_seconds += pd_seconds() - start;
    return status;
}

/* What memories have held, which their readers' parameters and layers outside ask for. */
static void pd__collect_memory(pd_layer *l) {
    const pd__order *o = l->own->group->order;
    const pd_layer *fed = l->own->fed, *boot = l->input_count ? l->inputs[0] : NULL;
    pd_device *d = l->net->device;
    int64_t first = o->steps > 0 ? o->begins[1] : 0, size[4] = { 1, 1, 1, 0 }, steps[4] = { 0, 0, 0, 1 };
    size[3] = first * l->out.width;
    d->fill(d, size[3], 0, l->out.data);
    if (boot) d->contract(d, size, 1, boot->out.data, steps, NULL, steps, l->out.data, steps);
    d->gather_rows(d, o->rows - first, l->out.width, o->before + first, NULL, NULL, fed->own->whole[PD__OUT].data, NULL,
                   l->out.data + size[3]);
    l->own->store[PD__OUT].host_of = NULL;
}

static pd_status pd__run_loop(pd_group *g) {
    pd_layer **layers = g->net->layers;
    pd_status status = pd__ready_loop(g);
    for (int64_t i = g->first; status == PD_OK && i <= g->last; i++)
        if (pd__reads_before_loop(layers[i])) status = pd__run_member(layers[i], PD__BEFORE_LOOP);
    for (int64_t t = 0; status == PD_OK && t < g->order->steps; t++) {
        status = pd__show_step(g, t);
        for (int64_t i = g->first; status == PD_OK && i <= g->last; i++)
            if (!layers[i]->own->fed) status = pd__run_member(layers[i], PD__IN_LOOP);
        if (status == PD_OK) status = pd__poll(g->net);
    }
    g->step = -1;
    if (!g->order || status != PD_OK) return status;
    status = pd__show_step(g, -1);
    for (int64_t i = g->first; i <= g->last; i++) {
        if (layers[i]->own->fed && (g->net->mode != PD_PREDICT || layers[i]->own->read_outside))
            pd__collect_memory(layers[i]);
    }
    for (int64_t i = g->first; i <= g->last; i++) pd__let_inputs_go(layers[i]);
    return status;
}

/* Does backward of the layer add to input k's gradient after the loop, for all rows? */
static bool pd__adds_late(const pd_layer *l, int k) { return l->type == &pd__fc_type && !l->inputs[k]->own->loop; }

/* Backward of a layer in the loop: for the rows of a step (`late` false), what goes to inputs that depend on memories;
   for all rows, what is a product over all of them. The gradients of the others are hidden. */
static pd_status pd__backward_member(pd_layer *l, bool late) {
    double start = pd_seconds();
    pd_real **hidden = l->own->hidden;
    pd_status status;
    for (int k = 0; k < l->input_count; k++) {
        hidden[k] = l->inputs[k]->out.grad;
        if (late != pd__adds_late(l, k)) l->inputs[k]->out.grad = NULL;
    }
    for (int k = 0; k < l->param_count; k++) {
        hidden[l->input_count + k] = l->params[k]->grad;
        if (!late) l->params[k]->grad = NULL;
    }
    status = pd__on_host(l, true, late ? l->type->backward : pd__differentiate);
    for (int k = l->param_count; k-- > 0;) l->params[k]->grad = hidden[l->input_count + k];
    for (int k = l->input_count; k-- > 0;) l->inputs[k]->out.grad = hidden[k];
    if (status != PD_OK && l->net->failure.status == PD_OK) pd_layer_fail(l, status, "%s", pd_status_text(status));
    l->own->backward_seconds += pd_seconds() - start;
    return status;
}

/* Gradients that layers outside the loop have given a memory go to what fed it. */
static void pd__pass_memory_grad(pd_layer *l) {
    const pd__order *o = l->own->group->order;
    pd_device *d = l->net->device;
    pd_tensor *fed = &l->own->fed->own->whole[PD__OUT];
    for (int64_t t = 0; t < o->steps; t++) {
        int64_t width = l->out.width, size[4] = { 1, 1, 1, 0 }, steps[4] = { 0, 0, 0, 1 };
        pd_real *to = t > 0 ? fed->grad : l->input_count ? l->inputs[0]->out.grad : NULL;
        size[3] = (o->begins[t + 1] - o->begins[t]) * width;
        if (to)
            d->contract(d, size, 1, l->own->whole[PD__OUT].grad + o->begins[t] * width, steps, NULL, steps,
                        to + (t > 0 ? o->begins[t - 1] * width : 0), steps);
    }
}

static pd_status pd__backward_loop(pd_group *g) {
    pd_layer **layers = g->net->layers;
    pd_status status = PD_OK;
    for (int64_t i = g->first; i <= g->last; i++)
        if (layers[i]->own->fed && layers[i]->own->whole[PD__OUT].grad) pd__pass_memory_grad(layers[i]);
    for (int64_t t = g->order->steps; status == PD_OK && t-- > 0;) {
        status = pd__show_step(g, t);
        for (int64_t i = g->last; status == PD_OK && i >= g->first; i--)
            if (layers[i]->wants_grad && !layers[i]->own->fed) status = pd__backward_member(layers[i], false);
        if (status == PD_OK) status = pd__poll(g->net);
    }
    pd__show_step(g, -1);
    for (int64_t i = g->last; status == PD_OK && i >= g->first; i--) {
        pd_layer *l = layers[i];
        if (!l->wants_grad || l->own->fed) continue;
        if (l->param_count > 0) status = pd__backward_member(l, true);
        if (status == PD_OK) status = pd__report_grads(l);
        if (status == PD_OK) status = pd__poll(g->net);
    }
    return status;
}

/* ---- generating: the group's layers run step by step, all of them, on the rows of the sentences that go on ---- */

typedef struct pd__generation {
    pd_group *g;
    pd_layer *words, *scores;
    pd_layer **steps, **before; /* the group's layers that take part; what runs once, before them */
    int64_t step_count;
    int before_count;
    pd__order order; /* of one step */
    int64_t begins[2];
    int64_t *same;      /* 0, 1, 2 .. */
    int64_t *sentences; /* that go on */
    int64_t *survivors; /* their rows in the step before */
    int64_t *next;      /* their words */
    int64_t *lengths, *ids;
    int64_t max_rows;
} pd__generation;

PD_PRINTF(3, 4) static pd_status pd__generate_fail(pd_layer *l, pd_status status, const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return pd_layer_fail(l, status, "pd_generate: %s", text);
}

static pd_status pd__check_generation(pd__generation *n, const pd_generate_opts *o) {
    pd_layer *scores = n->scores, *words = n->words;
    int64_t inputs = 0;
    for (int64_t i = 0; i < n->g->outer_count; i++) inputs += n->g->outers[i].goes_by == PD__BY_STEP;
    if (inputs != 1 || !words->is_ids || words->is_sparse || words->own->slot < 0)
        return pd__generate_fail(
            scores, PD_E_ARGUMENT,
            "group \"%.100s\" must have one input (pd_group_input), made by pd_ids, to be fed back", n->g->name);
    if (n->g->reverse) return pd__generate_fail(scores, PD_E_ARGUMENT, "group \"%.100s\" is reversed", n->g->name);
    if (scores->is_ids || scores->out.width > words->out.width)
        return pd__generate_fail(scores, PD_E_SHAPE, "has %lld numbers, but \"%.100s\" has only %lld ids",
                                 (long long)scores->out.width, words->name, (long long)words->out.width);
    if (o->begin < 0 || o->begin >= words->out.width || o->end < 0 || o->end >= scores->out.width)
        return pd__generate_fail(scores, PD_E_ARGUMENT, "begin is %lld, end %lld, expected ids below %lld and %lld",
                                 (long long)o->begin, (long long)o->end, (long long)words->out.width,
                                 (long long)scores->out.width);
    return o->max_rows >= 0 ? PD_OK
                            : pd__generate_fail(scores, PD_E_ARGUMENT, "max_rows is %lld", (long long)o->max_rows);
}

/* What takes part, and what the steps read of the rest. */
static pd_status pd__plan_generation(pd__generation *n) {
    pd_net *net = n->g->net;
    pd_status status = pd__activate_layers(net, &n->scores, 1);
    for (int64_t i = 0; status == PD_OK && i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        if (!l->own->active || l->own->group != n->g || l->own->goes_by != PD__BY_STEP) continue;
        n->steps[n->step_count++] = l;
        for (int k = 0; k < l->input_count; k++) {
            pd_layer *from = l->inputs[k];
            bool met = from == n->words || (from->own->group == n->g && from->own->goes_by == PD__BY_STEP);
            for (int j = 0; j < n->before_count && !met; j++) met = n->before[j] == from;
            if (!met) n->before[n->before_count++] = from;
        }
    }
    return status;
}

/* Memories hold what fed them in the step before, of those that go on; or what they begin with. */
static pd_status pd__move_memories(pd__generation *n, bool begin) {
    int64_t rows = n->order.rows;
    for (int64_t i = 0; i < n->step_count; i++) {
        pd_layer *l = n->steps[i];
        pd__store *store = &l->own->store[PD__OUT];
        pd_device *d = l->net->device;
        const pd_real *from = !begin           ? l->own->fed ? l->own->fed->out.data : NULL
                              : l->input_count ? l->inputs[0]->out.data
                                               : NULL;
        if (!l->own->fed) continue;
        if (!pd__grow_numbers(l->net, &store->data, &store->data_capacity, rows * l->out.width)) return pd__no_rows(l);
        l->out.data = store->data;
        l->out.rows = rows;
        l->out.sequences = 0;
        l->out.starts = NULL;
        store->host_of = NULL;
        if (from)
            d->gather_rows(d, rows, l->out.width, begin ? n->same : n->survivors, NULL, NULL, from, NULL, l->out.data);
        else d->fill(d, rows * l->out.width, 0, l->out.data);
    }
    return PD_OK;
}

static bool pd__is_boot(const pd_layer *l) {
    return l->type == &pd__move_type && pd__move_of(l)->move == PD__TO_FIRST_STEP;
}

/* One layer, for the rows of one step, with sums in the order that the loop has. */
static pd_status pd__generate_layer(pd_layer *l) {
    pd_status status = pd__size_output(l);
    if (status == PD_OK) status = pd__ready_output(l);
    if (status == PD_OK && l->own->loop && pd__reads_before_loop(l)) status = pd__run_member(l, PD__BEFORE_LOOP);
    return status == PD_OK ? pd__run_member(l, l->own->loop ? PD__IN_LOOP : PD__ALL_PARTS) : status;
}

/* Rows of sparse tables for the words of this step. */
static pd_status pd__generate_tables(pd__generation *n) {
    pd_status status = PD_OK;
    bool any = false;
    for (int64_t i = 0; i < n->step_count; i++) any = any || n->steps[i]->type->prefetch;
    if (!any) return PD_OK;
    pd__forget_rows(n->g->net);
    for (int64_t i = 0; status == PD_OK && i < n->step_count; i++)
        if (n->steps[i]->type->prefetch) status = n->steps[i]->type->prefetch(n->steps[i]);
    return status == PD_OK ? pd__ready_rows(n->g->net) : status;
}

static pd_status pd__generate_step(pd__generation *n, bool begin) {
    pd_tensor *words = &n->words->out;
    pd_status status;
    words->rows = words->sequences = n->order.rows;
    words->starts = n->same;
    words->ids = n->next;
    words->row_starts = NULL;
    words->values = NULL;
    n->begins[1] = n->order.rows;
    status = pd__generate_tables(n);
    for (int64_t i = 0; status == PD_OK && begin && i < n->step_count; i++)
        if (pd__is_boot(n->steps[i])) status = pd__generate_layer(n->steps[i]);
    if (status == PD_OK) status = pd__move_memories(n, begin);
    for (int64_t i = 0; status == PD_OK && i < n->step_count; i++)
        if (!n->steps[i]->own->fed && !pd__is_boot(n->steps[i])) status = pd__generate_layer(n->steps[i]);
    return status == PD_OK ? pd__wait_for_device(n->g->net) : status;
}

/* Appends the best words; sentences that end leave. */
static pd_status pd__choose_words(pd__generation *n, int64_t end) {
    const pd_real *scores = pd__host_data(n->scores);
    int64_t rows = 0, width = n->scores->out.width;
    if (!scores) return n->g->net->failure.status;
    for (int64_t r = 0; r < n->order.rows; r++, scores += width) {
        int64_t best = 0, sentence = n->sentences[r];
        for (int64_t i = 1; i < width; i++)
            if (scores[i] > scores[best]) best = i;
        if (scores[best] != scores[best])
            return pd__generate_fail(n->scores, PD_E_NUMERIC, "not a number, in step %lld of sentence %lld",
                                     (long long)n->lengths[sentence], (long long)sentence);
        if (best == end) continue;
        n->ids[sentence * n->max_rows + n->lengths[sentence]++] = best;
        if (n->lengths[sentence] == n->max_rows) continue;
        n->sentences[rows] = sentence;
        n->survivors[rows] = r;
        n->next[rows++] = best;
    }
    n->order.rows = rows;
    return PD_OK;
}

/* The group's memory: all that the generation wants. */
static pd_status pd__ready_generation(pd__generation *n, int64_t samples) {
    pd_group *g = n->g;
    int64_t numbers, *at;
    if (!pd__multiply_sizes(samples, n->max_rows, &numbers) || numbers > INT64_MAX / 2 ||
        !pd_grow(&g->net->allocator, (void **)&g->generated, &g->generated_capacity, numbers + 6 * (samples + 1),
                 sizeof *at))
        return pd__generate_fail(n->scores, PD_E_MEMORY, "out of memory for %lld sentences of %lld words",
                                 (long long)samples, (long long)n->max_rows);
    at = g->generated;
    n->lengths = at, at += samples + 1;
    n->ids = at, at += numbers;
    n->same = at, at += samples + 1;
    n->sentences = at, at += samples + 1;
    n->survivors = at, at += samples + 1;
    n->next = at;
    for (int64_t i = 0; i <= samples; i++) n->same[i] = n->sentences[i] = i, n->lengths[i] = 0;
    n->order.sequences = samples, n->order.rows = samples, n->order.steps = 1;
    n->begins[0] = 0;
    n->order.begins = n->begins, n->order.starts = n->order.order = n->order.places = n->same;
    n->order.sentences = n->sentences;
    return PD_OK;
}

/* Lengths become offsets, and sentences close up. */
static void pd__pack_generated(const pd__generation *n, pd_generated *result) {
    int64_t at = 0, samples = n->order.sequences;
    for (int64_t q = 0; q < samples; q++) {
        int64_t length = n->lengths[q];
        memmove(n->ids + at, n->ids + q * n->max_rows, (size_t)length * sizeof *n->ids);
        n->lengths[q] = at;
        at += length;
    }
    n->lengths[samples] = at;
    result->sequences = samples;
    result->starts = n->lengths;
    result->ids = n->ids;
}

static pd_status pd__generate(pd__generation *n, const pd_batch *batch, const pd_generate_opts *o) {
    pd_net *net = n->g->net;
    pd_status status = pd__plan_generation(n);
    if (status == PD_OK) status = pd_forward(net, batch, PD_PREDICT, n->before, n->before_count);
    if (status == PD_OK) status = pd__ready_generation(n, batch->samples);
    if (status != PD_OK) return status;
    for (int64_t i = 0; i < n->step_count; i++) {
        pd_layer *l = n->steps[i];
        l->own->active = true;
        l->own->consumers = 2; /* it keeps its rows */
        if (l->own->reads_before) l->inputs[0]->own->keeps_before = true;
    }
    for (int64_t r = 0; r < batch->samples; r++) n->next[r] = o->begin;
    n->g->order = &n->order;
    n->g->generating = true;
    for (bool begin = true; status == PD_OK && n->order.rows > 0; begin = false) {
        status = pd__generate_step(n, begin);
        if (status == PD_OK) status = pd__choose_words(n, o->end);
    }
    n->g->order = NULL;
    n->g->generating = false;
    for (int64_t i = 0; i < n->step_count; i++) n->steps[i]->own->active = false;
    net->run_failed = status != PD_OK;
    return status;
}

PD_DEF pd_status pd_generate(pd_layer *scores, const pd_batch *batch, const pd_generate_opts *opts,
                             pd_generated *result) {
    pd__generation n;
    pd_net *net = scores ? scores->net : NULL;
    int64_t inputs = 0;
    pd_status status;
    if (result) memset(result, 0, sizeof *result);
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!batch || !opts || !result) return pd__generate_fail(scores, PD_E_ARGUMENT, "batch, opts or result is NULL");
    memset(&n, 0, sizeof n);
    n.g = scores->own->group;
    n.scores = scores;
    if (!n.g || !n.g->ended || scores->own->goes_by != PD__BY_STEP || scores->own->loop)
        return pd__generate_fail(scores, PD_E_ARGUMENT,
                                 scores->own->loop ? "it runs in the loop; take its pd_group_output"
                                                   : "it is no layer that goes by a group's steps");
    n.words = pd__group_lead(n.g);
    n.max_rows = opts->max_rows ? opts->max_rows : 100;
    status = pd__check_generation(&n, opts);
    if (status != PD_OK) return status;
    for (int64_t i = 0; i < net->layer_count; i++) inputs += net->layers[i]->input_count;
    n.steps = (pd_layer **)pd_alloc(&net->allocator, net->layer_count, sizeof *n.steps);
    n.before = (pd_layer **)pd_alloc(&net->allocator, inputs, sizeof *n.before);
    status = n.steps && n.before ? pd__generate(&n, batch, opts) : pd__no_memory(net, "generating");
    pd_free(&net->allocator, n.steps);
    pd_free(&net->allocator, n.before);
    if (status == PD_OK) pd__pack_generated(&n, result);
    return status;
}

/* ======================================================================================================== */
/* >>evaluators.c                                                                                          */

enum { PD__MAX_VALUES = 16 };

/* ---- all evaluators ---- */

/* Fails with a message that begins with the evaluator's name. Returns `status`. */
PD_PRINTF(3, 4) static pd_status pd__eval_fail(const pd_evaluator *e, pd_status status, const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return pd__fail(e->net, status, "%.100s: %s", e->name, text);
}

static pd_status pd__eval_input(pd_evaluator *e, int k, bool ids, int64_t size) {
    char text[256];
    if (pd__holds(e->inputs[k], ids, size, text)) return PD_OK;
    return pd__eval_fail(e, PD_E_SHAPE, "input %d: %s", k, text);
}

/* Refuses options that the evaluator would ignore. */
static pd_status pd__eval_options(const pd_evaluator *e, bool top_k, bool threshold) {
    const char *stray = e->opts.top_k != 1 && !top_k             ? "top_k"
                        : e->opts.threshold != 0.5 && !threshold ? "threshold"
                                                                 : NULL;
    if (!stray) return PD_OK;
    return pd__eval_fail(e, PD_E_ARGUMENT, "%s on an output of width %lld has no option %s", e->type->name,
                         (long long)pd_shape_size(e->inputs[0]->shape), stray);
}

/* The label of a yes-or-no question: two classes, or a number that means yes from 1/2 on. */
static pd_status pd__eval_binary_label(pd_evaluator *e) {
    return pd__eval_input(e, 1, e->inputs[1]->is_ids, e->inputs[1]->is_ids ? 2 : 1);
}

static bool pd__is_positive(const pd_tensor *label, int64_t r) { return pd__number(label, r) >= 0.5; }

static double pd__row_weight(const pd_tensor *weight, int64_t r) { return weight ? (double)weight->data[r] : 1; }

static double pd__ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

static double pd__mean(double sum, double count) { return count > 0 ? sum / count : (double)NAN; }

/* ---- >>evaluator:error ---- */

static pd_status pd__error_setup(pd_evaluator *e) {
    int64_t width = pd_shape_size(e->inputs[0]->shape);
    pd_status status = pd__eval_options(e, width > 1, width == 1);
    e->sum_count = 2; /* weight of wrong rows, of all rows */
    if (!status && e->opts.top_k > width)
        status = pd__eval_fail(e, PD_E_ARGUMENT, "expected top_k <= %lld, the output's width, got %lld",
                               (long long)width, (long long)e->opts.top_k);
    if (status) return status;
    return width == 1 ? pd__eval_binary_label(e) : pd__eval_input(e, 1, true, width);
}

/* How many numbers of the row come before number `label`: larger ones, and equal ones further left. */
static int64_t pd__rank_of(const pd_real *row, int64_t width, int64_t label) {
    int64_t before = 0;
    for (int64_t j = 0; j < width; j++) before += row[j] > row[label] || (row[j] == row[label] && j < label);
    return before;
}

static pd_status pd__error_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    const pd_tensor *out = inputs[0], *label = inputs[1];
    for (int64_t r = 0; r < out->rows; r++) {
        bool wrong = out->width == 1
                         ? ((double)out->data[r] > e->opts.threshold) != pd__is_positive(label, r)
                         : pd__rank_of(out->data + r * out->width, out->width, label->ids[r]) >= e->opts.top_k;
        if (wrong) e->sums[0] += pd__row_weight(inputs[2], r);
        e->sums[1] += pd__row_weight(inputs[2], r);
    }
    return PD_OK;
}

static void pd__error_values(const pd_evaluator *e, double *values) { values[0] = pd__mean(e->sums[0], e->sums[1]); }

static const char *const pd__error_names[] = { "error" };
static const pd_evaluator_type pd__error_type = {
    PD_API_VERSION, "error", 3, 1, pd__error_names, pd__error_setup, pd__error_update, pd__error_values, NULL
};

PD_DEF pd_evaluator *pd_eval_error(pd_net *net, pd_layer *output, pd_layer *label, const pd_evaluator_opts *opts) {
    return pd_evaluator_add(net, &pd__error_type, output, label, opts);
}

/* ---- >>evaluator:precision_recall ---- */

/* Sums: three per class, the weights of true positives, false positives and false negatives. An output of width 1
   counts as two classes. */
static pd_status pd__precision_recall_setup(pd_evaluator *e) {
    int64_t width = pd_shape_size(e->inputs[0]->shape);
    pd_status status = pd__eval_options(e, false, width == 1);
    e->sum_count = 3 * pd__max(width, 2);
    if (status) return status;
    return width == 1 ? pd__eval_binary_label(e) : pd__eval_input(e, 1, true, width);
}

static int64_t pd__arg_max(const pd_real *row, int64_t width) {
    int64_t best = 0;
    for (int64_t j = 1; j < width; j++)
        if (row[j] > row[best]) best = j;
    return best;
}

static pd_status pd__precision_recall_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    const pd_tensor *out = inputs[0], *label = inputs[1];
    for (int64_t r = 0; r < out->rows; r++) {
        double weight = pd__row_weight(inputs[2], r);
        int64_t said = (double)out->data[r * out->width] > e->opts.threshold, is = pd__is_positive(label, r);
        if (out->width > 1) said = pd__arg_max(out->data + r * out->width, out->width), is = label->ids[r];
        if (said == is) {
            e->sums[3 * is] += weight;
        } else {
            e->sums[3 * said + 1] += weight;
            e->sums[3 * is + 2] += weight;
        }
    }
    return PD_OK;
}

static void pd__precision_recall_values(const pd_evaluator *e, double *values) {
    bool binary = pd_shape_size(e->inputs[0]->shape) == 1;
    double right = 0, all = 0, classes = 0, sums[3] = { 0, 0, 0 };
    for (int64_t c = 0; c < e->sum_count / 3; c++) {
        double hit = e->sums[3 * c], said = hit + e->sums[3 * c + 1], is = hit + e->sums[3 * c + 2];
        right += hit;
        all += is;
        if (binary ? c != 1 : said + is == 0) continue;
        sums[0] += pd__ratio(hit, said);
        sums[1] += pd__ratio(hit, is);
        sums[2] += pd__ratio(2 * hit, said + is);
        classes++;
    }
    for (int k = 0; k < 3; k++) values[k] = all > 0 ? pd__mean(sums[k], classes) : (double)NAN;
    values[3] = pd__mean(right, all);
}

static const char *const pd__precision_recall_names[] = { "precision", "recall", "f1", "accuracy" };
static const pd_evaluator_type pd__precision_recall_type = { PD_API_VERSION,
                                                             "precision_recall",
                                                             3,
                                                             4,
                                                             pd__precision_recall_names,
                                                             pd__precision_recall_setup,
                                                             pd__precision_recall_update,
                                                             pd__precision_recall_values,
                                                             NULL };

PD_DEF pd_evaluator *pd_eval_precision_recall(pd_net *net, pd_layer *output, pd_layer *label,
                                              const pd_evaluator_opts *opts) {
    return pd_evaluator_add(net, &pd__precision_recall_type, output, label, opts);
}

/* ---- >>evaluator:auc ---- */

/* Sums: the number of bins, then for each a score, and the weights of negatives and of positives that have it. New
   rows are added at the end; when there is no more room for them, bins are sorted, and equal scores, or, if these are
   too few, neighbours become one. */
typedef struct pd__auc_bin {
    double score, weight[2];
} pd__auc_bin;

enum { PD__AUC_BINS = 1 << 17 };

static pd__auc_bin *pd__auc_bins(const pd_evaluator *e) { return (pd__auc_bin *)(void *)(e->sums + 1); }

static int pd__compare_bins(const void *a, const void *b) {
    double x = ((const pd__auc_bin *)a)->score, y = ((const pd__auc_bin *)b)->score;
    return (x > y) - (x < y);
}

/* Sorts the bins and joins those with equal scores, and neighbours up to a weight of `most`. */
static int64_t pd__auc_join(pd__auc_bin *bins, int64_t count, double most) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) {
        pd__auc_bin *last = bins + n - 1;
        if (n > 0 && (bins[i].score == last->score ||
                      last->weight[0] + last->weight[1] + bins[i].weight[0] + bins[i].weight[1] <= most)) {
            last->weight[0] += bins[i].weight[0];
            last->weight[1] += bins[i].weight[1];
        } else {
            bins[n++] = bins[i];
        }
    }
    return n;
}

static void pd__auc_sort(const pd_evaluator *e) {
    int64_t n = (int64_t)e->sums[0];
    qsort(pd__auc_bins(e), (size_t)n, sizeof(pd__auc_bin), pd__compare_bins);
    e->sums[0] = (double)pd__auc_join(pd__auc_bins(e), n, 0);
}

static void pd__auc_add(pd_evaluator *e, double score, double negative, double positive) {
    pd__auc_bin *bins = pd__auc_bins(e);
    int64_t n = (int64_t)e->sums[0];
    if (n == PD__AUC_BINS) {
        double all = 0;
        pd__auc_sort(e);
        n = (int64_t)e->sums[0];
        for (int64_t i = 0; i < n; i++) all += bins[i].weight[0] + bins[i].weight[1];
        /* Two neighbours then weigh more than that, so that no more than half of the bins remain. */
        if (n > PD__AUC_BINS / 2) n = pd__auc_join(bins, n, 4 * all / (double)PD__AUC_BINS);
    }
    bins[n].score = score;
    bins[n].weight[0] = negative;
    bins[n].weight[1] = positive;
    e->sums[0] = (double)(n + 1);
}

static pd_status pd__auc_setup(pd_evaluator *e) {
    int64_t width = pd_shape_size(e->inputs[0]->shape);
    pd_status status = pd__eval_options(e, false, false);
    e->sum_count = 1 + 3 * PD__AUC_BINS;
    if (status) return status;
    return width > 2 ? pd__eval_input(e, 0, false, 2) : pd__eval_binary_label(e);
}

static pd_status pd__auc_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    const pd_tensor *out = inputs[0];
    for (int64_t r = 0; r < out->rows; r++) {
        double score = (double)out->data[(r + 1) * out->width - 1], weight = pd__row_weight(inputs[2], r);
        bool positive = pd__is_positive(inputs[1], r);
        if (weight > 0) pd__auc_add(e, score, positive ? 0 : weight, positive ? weight : 0);
    }
    return PD_OK;
}

static void pd__auc_merge(pd_evaluator *e, const double *sums) {
    for (int64_t i = 0; i < (int64_t)sums[0]; i++) pd__auc_add(e, sums[3 * i + 1], sums[3 * i + 2], sums[3 * i + 3]);
}

/* The fraction of pairs (positive, negative) with the positive one's score above; ties, in one bin, count half. */
static void pd__auc_values(const pd_evaluator *e, double *values) {
    const pd__auc_bin *bins = pd__auc_bins(e);
    double negatives = 0, positives = 0, area = 0;
    pd__auc_sort(e);
    for (int64_t i = 0; i < (int64_t)e->sums[0]; i++) {
        area += bins[i].weight[1] * (negatives + bins[i].weight[0] / 2);
        negatives += bins[i].weight[0];
        positives += bins[i].weight[1];
    }
    values[0] = pd__mean(area, positives * negatives);
}

static const char *const pd__auc_names[] = { "auc" };
static const pd_evaluator_type pd__auc_type = {
    PD_API_VERSION, "auc", 3, 1, pd__auc_names, pd__auc_setup, pd__auc_update, pd__auc_values, pd__auc_merge
};

PD_DEF pd_evaluator *pd_eval_auc(pd_net *net, pd_layer *output, pd_layer *label, const pd_evaluator_opts *opts) {
    return pd_evaluator_add(net, &pd__auc_type, output, label, opts);
}

/* ---- >>evaluator:pnpair ---- */

static pd_status pd__pnpair_setup(pd_evaluator *e) {
    pd_status status = pd__eval_options(e, false, false);
    e->sum_count = 3; /* weights of pairs in order, out of order, tied */
    if (!status) status = pd__eval_input(e, 0, false, 1);
    if (!status && !e->inputs[1]->is_ids) status = pd__eval_input(e, 1, false, 1);
    if (!status && e->inputs[3]) status = pd__eval_input(e, 3, true, pd_shape_size(e->inputs[3]->shape));
    return status;
}

/* Adds row i's pairs with the rows before it, from `first` on. */
static void pd__pnpair_row(pd_evaluator *e, const pd_tensor *const *inputs, int64_t first, int64_t i) {
    const pd_tensor *score = inputs[0], *label = inputs[1], *query = inputs[3];
    for (int64_t j = first; j < i; j++) {
        bool above = label->ids ? label->ids[i] > label->ids[j] : label->data[i] > label->data[j];
        bool below = label->ids ? label->ids[i] < label->ids[j] : label->data[i] < label->data[j];
        int kind = score->data[i] == score->data[j] ? 2 : above == (score->data[i] > score->data[j]) ? 0 : 1;
        if (above != below && (!query || query->ids[i] == query->ids[j]))
            e->sums[kind] += pd__row_weight(inputs[2], i) * pd__row_weight(inputs[2], j);
    }
}

static pd_status pd__pnpair_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    const pd_tensor *score = inputs[0];
    int64_t first = 0, count = inputs[3] ? 1 : pd__query_count(score);
    for (int64_t q = 0; q < count && score->rows > 0; q++) {
        int64_t n = inputs[3] ? score->rows : pd__query(score, q, &first);
        for (int64_t i = first; i < first + n; i++) pd__pnpair_row(e, inputs, first, i);
    }
    return PD_OK;
}

static void pd__pnpair_values(const pd_evaluator *e, double *values) {
    memcpy(values, e->sums, 3 * sizeof *values);
    values[3] = pd__ratio(e->sums[0], e->sums[1]);
}

static const char *const pd__pnpair_names[] = { "in_order", "out_of_order", "ties", "ratio" };
static const pd_evaluator_type pd__pnpair_type = {
    PD_API_VERSION, "pnpair", 4, 4, pd__pnpair_names, pd__pnpair_setup, pd__pnpair_update, pd__pnpair_values, NULL
};

PD_DEF pd_evaluator *pd_eval_pnpair(pd_net *net, pd_layer *score, pd_layer *label, const pd_evaluator_opts *opts) {
    return pd_evaluator_add(net, &pd__pnpair_type, score, label, opts);
}

/* ---- >>evaluator:mean_error ---- */

static pd_status pd__mean_error_setup(pd_evaluator *e) {
    pd_status status = pd__eval_options(e, false, false);
    e->sum_count = 3; /* of |d|, of d^2, of weights */
    return status ? status : pd__eval_input(e, 1, false, pd_shape_size(e->inputs[0]->shape));
}

static pd_status pd__mean_error_update(pd_evaluator *e, const pd_tensor *const *inputs) {
    const pd_tensor *out = inputs[0], *target = inputs[1];
    for (int64_t r = 0; r < out->rows; r++) {
        double weight = pd__row_weight(inputs[2], r);
        for (int64_t i = r * out->width; weight > 0 && i < (r + 1) * out->width; i++) {
            double d = (double)out->data[i] - (double)target->data[i];
            e->sums[0] += weight * fabs(d);
            e->sums[1] += weight * d * d;
            e->sums[2] += weight;
        }
    }
    return PD_OK;
}

static void pd__mean_error_values(const pd_evaluator *e, double *values) {
    values[0] = pd__mean(e->sums[0], e->sums[2]);
    values[1] = sqrt(pd__mean(e->sums[1], e->sums[2]));
}

static const char *const pd__mean_error_names[] = { "mean_absolute", "root_mean_squared" };
static const pd_evaluator_type pd__mean_error_type = {
    PD_API_VERSION,        "mean_error",          3,   2, pd__mean_error_names, pd__mean_error_setup,
    pd__mean_error_update, pd__mean_error_values, NULL
};

PD_DEF pd_evaluator *pd_eval_mean_error(pd_net *net, pd_layer *output, pd_layer *target,
                                        const pd_evaluator_opts *opts) {
    return pd_evaluator_add(net, &pd__mean_error_type, output, target, opts);
}

/* ---- adding, updating, reading ---- */

static pd_status pd__check_evaluator_type(pd_net *net, const pd_evaluator_type *type) {
    if (!type || !type->name || !type->setup || !type->update || !type->values)
        return pd__fail_build(net, PD_E_ARGUMENT, "evaluator: its type lacks a name, setup, update or values");
    if (type->api_version != PD_API_VERSION)
        return pd__fail_build(net, PD_E_ARGUMENT, "%.100s: evaluator type has interface version %d, expected %d",
                              type->name, type->api_version, PD_API_VERSION);
    if (type->input_count < 1 || type->input_count > 4)
        return pd__fail_build(net, PD_E_ARGUMENT, "%.100s: expected an evaluator type of 1 to 4 inputs, got %d",
                              type->name, type->input_count);
    if (type->value_count < 1 || type->value_count > PD__MAX_VALUES || !type->value_names)
        return pd__fail_build(net, PD_E_ARGUMENT, "%.100s: expected an evaluator type of 1 to %d named values, got %d",
                              type->name, (int)PD__MAX_VALUES, type->value_count);
    return PD_OK;
}

/* Checks what the caller gave against the number of inputs the type takes. */
static pd_status pd__check_evaluator(pd_evaluator *e) {
    int count = e->type->input_count;
    if (!pd__name_ok(e->name))
        return pd__eval_fail(e, PD_E_ARGUMENT,
                             "a name has 1 to 200 characters, no quotes, backslashes or control characters");
    for (int k = 0; k < 4; k++) {
        static const char *const roles[] = { "output", "label", "weight", "query" };
        if (k < count && k < 2 && !e->inputs[k]) return pd__eval_fail(e, PD_E_ARGUMENT, "its %s is NULL", roles[k]);
        if (k >= count && e->inputs[k])
            return pd__eval_fail(e, PD_E_ARGUMENT, "%s takes no %s", e->type->name, roles[k]);
        if (e->inputs[k] && e->inputs[k]->net != e->net)
            return pd__eval_fail(e, PD_E_ARGUMENT, "its %s, \"%.100s\", belongs to another net", roles[k],
                                 e->inputs[k]->name);
        if (e->inputs[k] && e->inputs[k]->is_sequence != e->inputs[0]->is_sequence)
            return pd__eval_fail(e, PD_E_SHAPE, "its %s, \"%.100s\", %s, but \"%.100s\" %s", roles[k],
                                 e->inputs[k]->name, pd__rows_of[e->inputs[k]->is_sequence], e->inputs[0]->name,
                                 pd__rows_of[e->inputs[0]->is_sequence]);
    }
    if (e->inputs[0]->is_ids)
        return pd__eval_fail(e, PD_E_SHAPE, "expected numbers as output, got \"%.100s\" with ids", e->inputs[0]->name);
    if (e->opts.top_k < 1)
        return pd__eval_fail(e, PD_E_ARGUMENT, "expected top_k > 0, got %lld", (long long)e->opts.top_k);
    if (!(fabs(e->opts.threshold) <= DBL_MAX))
        return pd__eval_fail(e, PD_E_ARGUMENT, "expected a finite threshold, got %g", e->opts.threshold);
    return e->inputs[2] ? pd__eval_input(e, 2, false, 1) : PD_OK;
}

static void pd__evaluator_free(pd_evaluator *e) {
    const pd_allocator *a = &e->net->allocator;
    pd_free(a, (void *)(uintptr_t)e->name);
    pd_free(a, e->sums);
    pd_free(a, e);
}

static void pd__evaluators_free(pd_net *net) {
    while (net->evaluators) {
        pd_evaluator *next = net->evaluators->next;
        pd__evaluator_free(net->evaluators);
        net->evaluators = next;
    }
}

static pd_evaluator *pd__find_evaluator(pd_net *net, const char *name) {
    pd_evaluator *e = net->evaluators;
    while (e && strcmp(e->name, name) != 0) e = e->next;
    return e;
}

/* A copy of the options' name, or "error1" and so on. */
static char *pd__evaluator_name(pd_net *net, const pd_evaluator_type *type, const char *given) {
    char name[128];
    int number = 1;
    if (given) return pd__copy_text(&net->allocator, given);
    do snprintf(name, sizeof name, "%.100s%d", type->name, number++);
    while (pd__find_evaluator(net, name));
    return pd__copy_text(&net->allocator, name);
}

/* With the defaults filled in, but neither checked nor in the net's list. NULL when out of memory. */
static pd_evaluator *pd__new_evaluator(pd_net *net, const pd_evaluator_type *type, pd_layer *output, pd_layer *label,
                                       const pd_evaluator_opts *opts) {
    pd_evaluator *e = (pd_evaluator *)pd_alloc(&net->allocator, 1, sizeof *e);
    if (!e) return NULL;
    e->net = net;
    e->type = type;
    if (opts) e->opts = *opts;
    if (e->opts.top_k == 0) e->opts.top_k = 1;
    e->opts.threshold = pd__or(e->opts.threshold, 0.5);
    e->inputs[0] = output;
    e->inputs[1] = label;
    e->inputs[2] = e->opts.weight;
    e->inputs[3] = e->opts.query;
    e->name = e->opts.name = pd__evaluator_name(net, type, e->opts.name);
    if (e->name) return e;
    pd__evaluator_free(e);
    return NULL;
}

/* Checks, the type's setup, and memory for the sums. */
static pd_status pd__setup_evaluator(pd_evaluator *e) {
    pd_status status = pd__check_evaluator(e);
    for (int k = 0; status == PD_OK && k < PD__COUNT(e->inputs); k++)
        if (e->inputs[k] && e->inputs[k]->own->loop)
            status = pd__eval_fail(e, PD_E_ARGUMENT,
                                   "\"%.100s\" runs step by step in group \"%.100s\"; pd_group_output has its rows",
                                   e->inputs[k]->name, e->inputs[k]->own->loop->name);
        else if (e->inputs[k] && e->inputs[k]->is_sparse)
            status = pd__eval_fail(e, PD_E_SHAPE, "\"%.100s\" holds sparse rows, expected numbers or ids",
                                   e->inputs[k]->name);
    if (status == PD_OK && pd__find_evaluator(e->net, e->name))
        status = pd__eval_fail(e, PD_E_ARGUMENT, "the name is already used by another evaluator");
    if (status == PD_OK) status = e->type->setup(e);
    if (status == PD_OK && e->sum_count < 1)
        status =
            pd__eval_fail(e, PD_E_ARGUMENT, "expected setup to leave sum_count > 0, got %lld", (long long)e->sum_count);
    if (status != PD_OK) return status;
    e->sums = (double *)pd_alloc(&e->net->allocator, e->sum_count, sizeof *e->sums);
    return e->sums ? PD_OK : PD_E_MEMORY;
}

PD_DEF pd_evaluator *pd_evaluator_add(pd_net *net, const pd_evaluator_type *type, pd_layer *output, pd_layer *label,
                                      const pd_evaluator_opts *opts) {
    pd_evaluator *e, **end;
    pd_status status;
    if (!pd__check_net(net) || pd__check_evaluator_type(net, type) != PD_OK) return NULL;
    e = pd__new_evaluator(net, type, output, label, opts);
    if (!e) {
        pd__fail_build(net, PD_E_MEMORY, "%.100s: out of memory for the evaluator", type->name);
        return NULL;
    }
    net->failure.status = PD_OK;
    status = pd__setup_evaluator(e);
    if (status != PD_OK) {
        if (net->failure.status == PD_OK) pd__eval_fail(e, status, "%s", pd_status_text(status));
        net->broken = true;
        pd__evaluator_free(e);
        return NULL;
    }
    for (end = &net->evaluators; *end;) end = &(*end)->next;
    return *end = e;
}

/* Checks an input's values so that no type has to: ids in range, numbers, weights that are not negative. */
static pd_status pd__check_evaluated(pd_evaluator *e, int k, const pd_tensor *t) {
    const pd_layer *input = e->inputs[k];
    int64_t count = pd_shape_size(input->shape), rows = e->inputs[0]->out.rows, bad = pd__bad_id(input);
    char text[400];
    if (!pd__rows_fit(e->inputs[0], input, text)) return pd__eval_fail(e, PD_E_SHAPE, "%s", text);
    if (bad >= 0)
        return pd__eval_fail(e, PD_E_FORMAT, "row %lld of \"%.100s\": expected an id below %lld, got %lld",
                             (long long)bad, input->name, (long long)count, (long long)t->ids[bad]);
    for (int64_t i = 0; !input->is_ids && i < rows * count; i++)
        if (k == 2 ? !(t->data[i] >= 0 && (double)t->data[i] <= DBL_MAX) : t->data[i] != t->data[i])
            return pd__eval_fail(e, PD_E_NUMERIC, "row %lld of \"%.100s\": expected %s, got %g", (long long)(i / count),
                                 input->name, k == 2 ? "a weight >= 0" : "numbers", (double)t->data[i]);
    return PD_OK;
}

/* Adds the last run's outputs to the sums of all evaluators. Those whose inputs hold something wrong add nothing. */
static pd_status pd__evaluators_update(pd_net *net) {
    for (pd_evaluator *e = net->evaluators; e; e = e->next) {
        const pd_tensor *inputs[4] = { NULL, NULL, NULL, NULL };
        pd_tensor at_host[4];
        pd_status status = PD_OK;
        for (int k = 0; status == PD_OK && k < 4; k++)
            if (e->inputs[k]) {
                at_host[k] = e->inputs[k]->out;
                if (at_host[k].data) at_host[k].data = pd__host_data(e->inputs[k]);
                if (at_host[k].data || e->inputs[k]->is_ids) status = pd__check_evaluated(e, k, &at_host[k]);
                else status = net->failure.status;
                inputs[k] = &at_host[k];
            }
        if (status == PD_OK) status = e->type->update(e, inputs);
        if (status != PD_OK && net->failure.status == PD_OK) pd__eval_fail(e, status, "%s", pd_status_text(status));
        if (status != PD_OK) return status;
    }
    return PD_OK;
}

PD_DEF void pd_evaluator_reset(pd_evaluator *evaluator) {
    if (evaluator) memset(evaluator->sums, 0, (size_t)evaluator->sum_count * sizeof *evaluator->sums);
}

PD_DEF pd_status pd_evaluator_merge(pd_evaluator *evaluator, const pd_evaluator *other) {
    if (!evaluator || !other) return PD_E_ARGUMENT;
    if (evaluator->type != other->type || evaluator->sum_count != other->sum_count)
        return pd__fail(evaluator->net, PD_E_ARGUMENT, "%.100s: expected %s with %lld sums to merge, got %s with %lld",
                        evaluator->name, evaluator->type->name, (long long)evaluator->sum_count, other->type->name,
                        (long long)other->sum_count);
    if (evaluator == other)
        return pd__fail(evaluator->net, PD_E_ARGUMENT, "%.100s: can't be merged with itself", evaluator->name);
    if (evaluator->type->merge) evaluator->type->merge(evaluator, other->sums);
    for (int64_t i = 0; !evaluator->type->merge && i < evaluator->sum_count; i++) evaluator->sums[i] += other->sums[i];
    return PD_OK;
}

PD_DEF double pd_evaluator_value(const pd_evaluator *evaluator, int k) {
    double values[PD__MAX_VALUES];
    if (!evaluator || k < 0 || k >= evaluator->type->value_count) return (double)NAN;
    evaluator->type->values(evaluator, values);
    return values[k];
}

PD_DEF pd_evaluator *pd_evaluator_first(pd_net *net) { return net ? net->evaluators : NULL; }

/* ======================================================================================================== */
/* >>optimizers.c                                                                                          */

/* What a trainer keeps for one trained parameter. */
typedef struct pd__trained {
    pd_param *param;
    pd_real *states[PD_MAX_STATES]; /* device memory, as many as pd_optimizer_states says, else NULL */
    int64_t step;                   /* updates so far */
    int64_t stepped;                /* the trainer's attempt at which `step` was last counted up */
    struct pd__lazy *lazy;          /* of a sparse parameter: how far each row is; NULL when no row ever lags */
} pd__trained;

/* .. and, with model averaging, for each of these and for the statistics that go with them. Device memory. */
typedef struct pd__averaged {
    pd_param *param;
    pd_real *sums[3]; /* see pd__average_step */
    pd_real *saved;   /* the current value while the averaged one is swapped in */
} pd__averaged;

struct pd_trainer {
    pd_net *net;
    pd_layer *cost;
    pd_optimizer optimizer;
    pd_trainer_opts opts;
    pd_updater local; /* self = the trainer */
    pd_updater *updater;
    pd__trained *trained; /* one per parameter that is trained, in order of creation */
    int trained_count;
    int64_t samples;      /* seen in all */
    int64_t steps;        /* batches trained */
    int64_t pass;         /* passes finished */
    int64_t pass_samples; /* of the current pass, taken from the reader */
    int64_t pass_batches;
    double pass_cost;       /* summed over pass_samples */
    int64_t batch_samples;  /* of the step in progress */
    pd__averaged *averages; /* in order of creation; none without model averaging */
    int averages_count;
    int64_t average_count, average_old, average_updates; /* updates in sums[0] + sums[1], in sums[2], and in all */
    bool averaged;                                       /* the averaged values are swapped in */
    double best_cost;                                    /* lowest test cost so far; with patience */
    int bad_tests;                                       /* tests since then */
    bool resumed;                                        /* a checkpoint was loaded, and no training has begun since */
    bool went_back;     /* the best values are in the net, and in `best`, for checkpoints, the last */
    bool filling;       /* a reader is putting samples into its batch */
    bool training;      /* pd_train is at work .. */
    pd_reader *reading; /* .. and in the midst of a pass of this reader */
    pd_real **best;     /* one array per parameter of the net in order; NULL before the first test; device memory */
    int best_count;     /* arrays in it: layers may have been added since */
    pd_real *spare;     /* as large as the largest of them; comes with them */
    int64_t spare_capacity;
    bool has_best;                     /* `best` has the values at that test */
    double wait_seconds, step_seconds; /* spent waiting for data, and in steps */
    pd_batch *batch;                   /* reused by pd_train and pd_test */
    pd_layer **targets;                /* reused by pd_test */
    int64_t target_capacity;
    int rank, ranks;  /* the shard of every parameter that is stepped on here; 0, 1: all of it */
    int64_t attempt;  /* steps begun, failed ones too */
    bool started;     /* the updater's start is over */
    bool unsynced;    /* values have been left for later since the last sync */
    pd_trainer *next; /* of the same net */
};

static pd_optimizer pd__optimizer(pd_optimizer_kind kind, double rate, double epsilon) {
    pd_optimizer o;
    memset(&o, 0, sizeof o);
    o.kind = kind;
    o.rate = rate;
    o.epsilon = epsilon;
    o.beta1 = kind >= PD_OPT_ADAM ? 0.9 : 0;
    o.beta2 = kind >= PD_OPT_ADAM ? 0.999 : 0;
    return o;
}

PD_DEF pd_optimizer pd_sgd(double rate) { return pd__optimizer(PD_OPT_SGD, rate, 0); }
PD_DEF pd_optimizer pd_momentum(double rate, double momentum) {
    pd_optimizer o = pd__optimizer(PD_OPT_MOMENTUM, rate, 0);
    o.momentum = momentum;
    return o;
}
PD_DEF pd_optimizer pd_nesterov(double rate, double momentum) {
    pd_optimizer o = pd_momentum(rate, momentum);
    o.nesterov = true;
    return o;
}
PD_DEF pd_optimizer pd_adagrad(double rate) { return pd__optimizer(PD_OPT_ADAGRAD, rate, 1e-10); }
PD_DEF pd_optimizer pd_adadelta(double rate) {
    pd_optimizer o = pd__optimizer(PD_OPT_ADADELTA, rate, 1e-6);
    o.rho = 0.9;
    return o;
}
PD_DEF pd_optimizer pd_rmsprop(double rate) {
    pd_optimizer o = pd__optimizer(PD_OPT_RMSPROP, rate, 1e-8);
    o.rho = 0.99;
    return o;
}
PD_DEF pd_optimizer pd_decayed_adagrad(double rate) {
    pd_optimizer o = pd__optimizer(PD_OPT_DECAYED_ADAGRAD, rate, 1e-6);
    o.rho = 0.95;
    return o;
}
PD_DEF pd_optimizer pd_adam(double rate) { return pd__optimizer(PD_OPT_ADAM, rate, 1e-8); }
PD_DEF pd_optimizer pd_adamw(double rate) { return pd__optimizer(PD_OPT_ADAMW, rate, 1e-8); }
PD_DEF pd_optimizer pd_adamax(double rate) { return pd__optimizer(PD_OPT_ADAMAX, rate, 1e-8); }

PD_DEF int pd_optimizer_states(const pd_optimizer *o) {
    switch (o->kind) {
    case PD_OPT_SGD: return 0;
    case PD_OPT_MOMENTUM:
    case PD_OPT_ADAGRAD:
    case PD_OPT_DECAYED_ADAGRAD: return 1;
    case PD_OPT_ADADELTA:
    case PD_OPT_ADAM:
    case PD_OPT_ADAMW:
    case PD_OPT_ADAMAX: return 2;
    case PD_OPT_RMSPROP: return o->centered ? 3 : o->momentum != 0 ? 2 : 1;
    case PD_OPT_COUNT: break;
    }
    return 0;
}

/* What is wrong with an optimizer, or NULL. Fields that its method has no use for must be 0. */
static const char *pd__optimizer_fault(const pd_optimizer *o) {
    bool uses_momentum = o->kind == PD_OPT_MOMENTUM || o->kind == PD_OPT_RMSPROP;
    bool uses_rho = o->kind == PD_OPT_ADADELTA || o->kind == PD_OPT_RMSPROP || o->kind == PD_OPT_DECAYED_ADAGRAD;
    bool uses_beta = o->kind >= PD_OPT_ADAM, divides = o->kind != PD_OPT_SGD && o->kind != PD_OPT_MOMENTUM;
    if ((unsigned)o->kind >= PD_OPT_COUNT) return "unknown optimizer";
    if (!(o->rate > 0 && o->rate <= DBL_MAX)) return "the learning rate must be a positive number";
    if (!(o->momentum >= 0 && o->momentum < 1)) return "momentum must lie in 0 <= momentum < 1";
    if (o->momentum != 0 && !uses_momentum) return "this optimizer has no momentum";
    if (o->nesterov && o->kind != PD_OPT_MOMENTUM) return "nesterov goes with momentum only";
    if (o->centered && o->kind != PD_OPT_RMSPROP) return "centered goes with rmsprop only";
    if (!(o->rho >= 0 && o->rho < 1)) return "rho must lie in 0 <= rho < 1";
    if (o->rho != 0 && !uses_rho) return "this optimizer has no rho";
    if (!(o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 && o->beta2 < 1)) return "beta must lie in 0 <= beta < 1";
    if ((o->beta1 != 0 || o->beta2 != 0) && !uses_beta) return "this optimizer has no beta1 and beta2";
    if (divides && !(o->epsilon > 0 && o->epsilon <= DBL_MAX)) return "epsilon must be a positive number";
    if (!divides && o->epsilon != 0) return "this optimizer has no epsilon";
    return NULL;
}

/* ---- schedules ---- */

static const char *pd__table_fault(const pd_schedule *s) {
    if (s->count < 1 || !s->samples || !s->factors) return "schedule: the table is empty";
    for (int i = 0; i < s->count; i++) {
        if (i > 0 && !(s->samples[i] > s->samples[i - 1])) return "schedule: the table's samples must rise";
        if (!(s->factors[i] >= 0 && pd__finite(s->factors[i])))
            return "schedule: the table's factors must not be negative";
    }
    return NULL;
}

/* What is wrong with a schedule, or NULL. Fields that its kind has no use for must be 0. */
static const char *pd__schedule_fault(const pd_schedule *s) {
    bool table = s->kind == PD_SCHEDULE_TABLE, curve = !table && s->kind != PD_SCHEDULE_CONSTANT;
    if ((unsigned)s->kind > PD_SCHEDULE_TABLE) return "unknown schedule";
    if (!(s->warm_up >= 0 && pd__finite(s->warm_up))) return "schedule: warm_up must not be negative";
    if (!curve && (s->a != 0 || s->b != 0)) return "schedule: this kind has no a and b";
    if (!table && (s->samples || s->factors || s->count)) return "schedule: this kind has no table";
    if (!pd__finite(s->a) || !pd__finite(s->b)) return "schedule: a and b must be finite";
    if (s->a == PD_ZERO || s->b == PD_ZERO) return "schedule: a and b take no PD_ZERO, since 0 is 0 there";
    if ((s->kind == PD_SCHEDULE_POLY || s->kind == PD_SCHEDULE_LINEAR) && s->a < 0)
        return "schedule: a must not be negative";
    if ((s->kind == PD_SCHEDULE_EXP || s->kind == PD_SCHEDULE_STEP) && !(s->a > 0 && s->b > 0))
        return "schedule: a and b must be positive";
    if (s->kind == PD_SCHEDULE_COSINE && !(s->a > 0)) return "schedule: a must be positive";
    if ((s->kind == PD_SCHEDULE_LINEAR || s->kind == PD_SCHEDULE_COSINE) && s->b < 0)
        return "schedule: b must not be negative";
    return table ? pd__table_fault(s) : NULL;
}

static double pd__table_factor(const pd_schedule *s, double samples) {
    int i = 0;
    while (i + 1 < s->count && samples >= s->samples[i]) i++;
    return s->factors[i];
}

PD_DEF double pd_schedule_factor(const pd_schedule *schedule, double samples_seen) {
    double s = samples_seen, a = schedule->a, b = schedule->b, factor = 1;
    switch (schedule->kind) {
    case PD_SCHEDULE_CONSTANT: break;
    case PD_SCHEDULE_POLY: factor = pow(1 + a * s, -b); break;
    case PD_SCHEDULE_EXP: factor = pow(a, s / b); break;
    case PD_SCHEDULE_STEP: factor = pow(a, floor(s / b)); break;
    case PD_SCHEDULE_LINEAR: factor = 1 - a * s > b ? 1 - a * s : b; break;
    case PD_SCHEDULE_COSINE: factor = s < a ? b + (1 - b) * (1 + cos(3.141592653589793 * s / a)) / 2 : b; break;
    case PD_SCHEDULE_TABLE: factor = pd__table_factor(schedule, s); break;
    }
    return s < schedule->warm_up ? factor * s / schedule->warm_up : factor;
}

/* ======================================================================================================== */
/* >>device.c: the CPU's operations                                                                        */
/* ---- >>op:kernels: what is compiled for each instruction set ---- */

typedef struct pd__block_job pd__block_job;
typedef struct pd__gemm_job pd__gemm_job;
typedef struct pd__winograd pd__winograd;
typedef struct pd__update_job pd__update_job;
typedef struct pd__channel_job pd__channel_job;
typedef struct pd__layer_norm_job pd__layer_norm_job;
typedef struct pd__group_norm_job pd__group_norm_job;
typedef struct pd__response_job pd__response_job;
typedef struct pd__pool_job pd__pool_job;
typedef struct pd__attention_job pd__attention_job;

/* The work of one thread, in the instructions of one level; what each does is said where it is, in >>kernels.c. */
typedef void pd__kernel_fill_piece(int64_t n, pd_real value, pd_real *y);
typedef void pd__kernel_contract_box(const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                                     const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]);
typedef void pd__kernel_contract_line(int64_t n, pd_real alpha, const pd_real *a, int64_t as, const pd_real *b,
                                      int64_t bs, pd_real *y, int64_t ys);
typedef double pd__kernel_dot(int64_t n, const pd_real *a, const pd_real *b);
typedef void pd__kernel_pack_a(const pd_real *a, int64_t rs, int64_t cs, int64_t m, int64_t k, int64_t h, int64_t first,
                               int64_t depth, pd_real *panels);
typedef void pd__kernel_pack_b(const pd_real *b, int64_t rs, int64_t cs, int64_t k, int64_t n, pd_real *panels);
typedef void pd__kernel_pick_b_panel(const pd_real *image, const int64_t *row_at, const int64_t *column_at, int64_t k,
                                     int64_t width, pd_real *to);
typedef void pd__kernel_tile(int mr, int nv, int64_t k, pd_real alpha, const pd_real *a, int64_t ahead,
                             const pd_real *b, int64_t ldb, pd_real beta, pd_real *c, int64_t ldc);
typedef void pd__kernel_multiply(const pd__block_job *k);
typedef void pd__kernel_gemm_row(const pd__gemm_job *g, int64_t part);
typedef void pd__kernel_finish(const pd_epilogue *after, bool by_row, int64_t channel, int64_t rows, int64_t columns,
                               pd_real *c, int64_t ldc);
typedef void pd__kernel_winograd_channel(const pd__winograd *j, bool gradient, int64_t group, int64_t block,
                                         int64_t channel, pd_real *space, pd_real *to, int64_t plane);
typedef void pd__kernel_winograd_panel(const pd__winograd *j, int64_t unit);
typedef void pd__kernel_winograd_put(const pd__winograd *j, int64_t group, int64_t block, int64_t filter,
                                     const pd_real *m, int64_t plane, pd_real *space);
typedef void pd__kernel_winograd_filter_unit(const pd__winograd *j, int64_t filter);
typedef void pd__kernel_update_piece(const pd__update_job *j, int64_t start, int64_t end);
typedef void pd__kernel_update_row(const pd_update *u, int64_t width, const double *c, const pd_real *w,
                                   const pd_real *g, const pd_real *state, pd_real *new_w, pd_real *new_state);
typedef void pd__kernel_activate_piece(pd_act act, pd_real alpha, int64_t n, const pd_real *x, pd_real *y);
typedef void pd__kernel_activate_backward_piece(pd_act act, pd_real alpha, int64_t n, const pd_real *x,
                                                const pd_real *y, pd_real *grad);
typedef void pd__kernel_softmax_row(int64_t n, const pd_real *x, pd_real *y);
typedef double pd__kernel_softmax_cost(int64_t n, const pd_real *x, const pd_real *y, double *top);
typedef void pd__kernel_softmax_backward_row(int64_t n, const pd_real *y, pd_real *grad);
typedef void pd__kernel_moments_of(const pd__channel_job *j, int64_t c);
typedef void pd__kernel_batch_norm_map(const pd__channel_job *j, int64_t m);
typedef void pd__kernel_batch_norm_back(const pd__channel_job *j, int64_t c);
typedef void pd__kernel_layer_norm_row(const pd__layer_norm_job *j, int64_t r);
typedef void pd__kernel_layer_norm_back_row(const pd__layer_norm_job *j, int64_t r);
typedef void pd__kernel_layer_norm_back_columns(const pd__layer_norm_job *j, int64_t unit);
typedef void pd__kernel_group_norm_one(const pd__group_norm_job *j, int64_t group);
typedef void pd__kernel_group_norm_back_one(const pd__group_norm_job *j, int64_t group);
typedef void pd__kernel_group_norm_back_channel(const pd__group_norm_job *j, int64_t channel);
typedef void pd__kernel_response_strip(const pd__response_job *j, int64_t unit);
typedef void pd__kernel_response_strip_back(const pd__response_job *j, int64_t unit);
typedef void pd__kernel_gru_row(int64_t width, pd_real *gates, const pd_real *recurrent, const pd_real *before,
                                pd_real *after);
typedef void pd__kernel_gru_back_row(int64_t width, pd_real *gates, pd_real *recurrent, const pd_real *before,
                                     const pd_real *dafter, pd_real *dbefore);
typedef void pd__kernel_attention_row(const pd__attention_job *j, int64_t r);
typedef void pd__kernel_attention_back_row(const pd__attention_job *j, int64_t r);
typedef void pd__kernel_attention_back_keys(const pd__attention_job *j, int64_t unit);
typedef void pd__kernel_attention_back_values(const pd__attention_job *j, int64_t unit);
typedef void pd__kernel_pool_pairs(const pd__pool_job *j, int64_t map, int64_t maps);
typedef void pd__kernel_pool_map(const pd__pool_job *j, int64_t map);

/* clang-format off */
#define PD__KERNELS(X) \
    X(fill_piece) X(contract_box) X(contract_line) X(dot) X(pack_a) X(pack_b) X(pick_b_panel) X(tile) X(multiply) \
    X(gemm_row) X(finish) X(winograd_channel) X(winograd_panel) X(winograd_put) X(winograd_filter_unit) X(update_piece) \
    X(update_row) X(activate_piece) X(activate_backward_piece) X(softmax_row) X(softmax_cost) \
    X(softmax_backward_row) X(moments_of) X(batch_norm_map) X(batch_norm_back) X(layer_norm_row) \
    X(layer_norm_back_row) X(layer_norm_back_columns) X(group_norm_one) X(group_norm_back_one) X(group_norm_back_channel) X(response_strip) X(response_strip_back) X(gru_row) \
    X(gru_back_row) X(attention_row) X(attention_back_row) X(attention_back_keys) X(attention_back_values) X(pool_pairs) X(pool_map)
/* clang-format on */

struct pd__kernels {
    int64_t lanes;  /* numbers of a vector */
    int64_t mr, nr; /* rows and columns of the tile of a product that stays in registers; nr: whole vectors */
    int64_t kc, mc; /* depth of a product's blocks, and rows of A in one */
#define PD__KERNEL_MEMBER(name) pd__kernel_##name *name;
    PD__KERNELS(PD__KERNEL_MEMBER)
};

/* ---- >>op:contract: basics ---- */

enum { PD__PIECE = 8192 }; /* numbers per piece of an elementwise operation */

static void pd__cpu_fill(pd_device *d, int64_t n, pd_real value, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__TEAM_STEPS(d, n, i, n, PD__PIECE, kernels->fill_piece(pd__min(PD__PIECE, n - i), value, y + i));
}

/* A piece of the box along one axis. */
static void pd__contract_piece(const pd__kernels *kernels, const int64_t size[4], int axis, int64_t start,
                               int64_t piece, pd_real alpha, const pd_real *a, const int64_t as[4], const pd_real *b,
                               const int64_t bs[4], pd_real *y, const int64_t ys[4]) {
    int64_t part[4];
    memcpy(part, size, sizeof part);
    part[axis] = pd__min(piece, size[axis] - start);
    kernels->contract_box(part, alpha, a + start * as[axis], as, b ? b + start * bs[axis] : NULL, bs,
                          y + start * ys[axis], ys);
}

/* Cut along the longest axis that moves in y: no two pieces write the same number, and no sum is cut. Numbers that stand
   side by side in a are not cut finer than some cache lines: sums over rows read these whole. */
static void pd__cpu_contract(pd_device *d, const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                             const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    int axis = -1;
    int64_t work = size[0] * size[1] * size[2] * size[3], piece, pieces, least;
    if (work == 0) return;
    for (int i = 0; i < 4; i++)
        if (ys[i] != 0 && (axis < 0 || size[i] > size[axis])) axis = i;
    if (axis < 0) {
        kernels->contract_box(size, alpha, a, as, b, bs, y, ys);
        return;
    }
    least = as[axis] == 1 ? 64 : 1;
    piece = pd__min(size[axis], pd__max(least, PD__PIECE * size[axis] / work));
    pieces = pd__ceil_div(size[axis], piece);
    PD__TEAM(d, work, p, pieces, pd__contract_piece(kernels, size, axis, p * piece, piece, alpha, a, as, b, bs, y, ys));
}

static double pd__cpu_norm(pd_device *d, int64_t n, const pd_real *x) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    enum { PARTS = 64 };
    double parts[PARTS], sum = 0, large = 0;
    int64_t piece = pd__ceil_div(n, PARTS);
    PD__TEAM(d, n, p, PARTS,
             parts[p] = kernels->dot(pd__max(0, pd__min(piece, n - p * piece)), x + pd__min(n, p * piece),
                                     x + pd__min(n, p * piece)));
    for (int p = 0; p < PARTS; p++) sum += parts[p];
    if (pd__finite(sum)) return sqrt(sum);
    /* Is a number not finite, or is only its square too large? */
    for (int64_t i = 0; i < n; i++) large += ldexp((double)x[i], -600) * ldexp((double)x[i], -600);
    return pd__finite(large) ? fmin(sqrt(large) * ldexp(1, 600), DBL_MAX) : large;
}

/* ---- >>op:gemm: matrix product: both factors packed into tiles that fit the caches, after Goto and van de Geijn 2008
   ---- Every number of C is one sum over k in the order of k, at any place of any tile: cutting C up does not change
   it. */

enum { PD__NC = 1024 }; /* columns of a product's blocks */
/* How many numbers ahead panels of A are fetched that may come from memory. (Beside the 48 KB of first-level cache that
   come with 64-byte vectors it pays for others too.) */
enum { PD__AHEAD = 512 };

/* A product's panels: m x k in panels of h rows, times k x n, to C. */
struct pd__block_job {
    int64_t m, n, k, h;
    const pd_real *a, *b;
    pd_real alpha, beta, *c;
    int64_t ldc;
    const pd_epilogue *after; /* NULL: more is to come, or nothing is to be done */
    int64_t channel;          /* of the first row, if `by_row`, else of the first column */
    bool by_row;
    /* Or, where row_at is not NULL, added to c[row_at[i] + column_at[j]]. */
    const int64_t *row_at, *column_at;
};

struct pd__gemm_job {
    const pd__kernels *kernels;
    bool ta, tb;
    int64_t m, n, k, lda, ldb, ldc;
    pd_real alpha, beta;
    const pd_real *a, *b;
    pd_real *c, *space;
    const pd_epilogue *after;
    int64_t across, down, rows, columns, each; /* parts of so many rows and columns; working space of each */
    pd_real *right;                            /* all of B, packed, if it is kept; `ready`: it is there already */
    bool ready;
};

/* Rows in a panel of A so that all panels of m rows are about as high, at most MR, and as pd__tile wants them. */
static int64_t pd__height(const pd__kernels *kernels, int64_t m) {
    int64_t h = pd__ceil_div(m, pd__ceil_div(pd__max(m, 1), kernels->mr));
    return kernels->mr > 6 ? pd__ceil_div(h, 4) * 4 : h;
}

/* Depth of the packed blocks: k in equal parts of at most KC. */
static int64_t pd__depth(const pd__kernels *kernels, int64_t k) {
    return pd__max(1, pd__ceil_div(k, pd__ceil_div(pd__max(k, 1), kernels->kc)));
}

static void pd__gemm_part(const pd__gemm_job *g, int64_t part) {
    const pd__kernels *kernels = g->kernels;
    int64_t i0 = part / g->across * g->rows, j0 = part % g->across * g->columns;
    int64_t i1 = pd__min(g->m, i0 + g->rows), j1 = pd__min(g->n, j0 + g->columns);
    int64_t ra = g->ta ? 1 : g->lda, ca = g->ta ? g->lda : 1, rb = g->tb ? 1 : g->ldb, cb = g->tb ? g->ldb : 1;
    int64_t depth = pd__depth(kernels, g->k), padded = pd__ceil_div(j1 - j0, kernels->nr) * kernels->nr, h, mc, nc;
    pd_real *packed_a = g->space + part * g->each, *packed_b;
    if (i0 >= i1 || j0 >= j1) return;
    h = pd__height(kernels, i1 - i0);
    mc = pd__min(i1 - i0, kernels->mc / h * h);
    /* B packed for one block of rows only is used at once, so that a few columns, still in the cache, do; of a B that
       is read by rows, more. */
    nc = mc < i1 - i0 ? PD__NC : g->tb ? 64 : 256;
    packed_b = packed_a + pd__ceil_div(mc * depth, 16) * 16;
    for (int64_t wide = j0; wide < j1; wide += PD__NC)
        for (int64_t p = 0; p < g->k || p == 0; p += depth)
            for (int64_t j = wide; j < pd__min(j1, wide + PD__NC); j += nc) {
                pd__block_job b;
                memset(&b, 0, sizeof b);
                b.n = pd__min(pd__min(nc, wide + PD__NC - j), j1 - j), b.k = pd__min(depth, g->k - p), b.h = h;
                b.alpha = g->alpha, b.beta = p ? 1 : g->beta, b.ldc = g->ldc;
                b.after = p + depth >= g->k ? g->after : NULL, b.channel = j;
                b.a = packed_a, b.b = packed_b;
                if (g->right) b.b = packed_b = g->right + j0 * g->k + p * padded + (j - j0) * b.k;
                if (!g->ready) kernels->pack_b(g->b + p * rb + j * cb, rb, cb, b.k, b.n, packed_b);
                for (int64_t i = i0; i < i1; i += mc) {
                    b.m = pd__min(mc, i1 - i);
                    if (j == wide || mc < i1 - i0)
                        kernels->pack_a(g->a + i * ra + p * ca, ra, ca, b.m, b.k, h, 0, b.k, packed_a);
                    b.c = g->c + i * g->ldc + j;
                    kernels->multiply(&b);
                }
            }
}

/* Each part packs its rows of A and its columns of B: chooses the grid of so many parts for which that is least. */
static void pd__gemm_grid(pd__gemm_job *g, int64_t parts) {
    const pd__kernels *kernels = g->kernels;
    g->across = 1, g->down = parts;
    for (int64_t across = 2; across <= parts; across++)
        if (parts % across == 0 && across * g->m + parts / across * g->n < g->across * g->m + g->down * g->n)
            g->across = across, g->down = parts / across;
    g->rows = pd__ceil_div(pd__ceil_div(g->m, g->down), kernels->mr) * kernels->mr;
    g->columns = pd__ceil_div(pd__ceil_div(g->n, g->across), kernels->nr) * kernels->nr;
    g->each = (pd__min(kernels->mc, g->rows) + pd__min(PD__NC, g->columns)) * pd__depth(kernels, g->k) + 32;
    g->each = pd__ceil_div(g->each, 16) * 16; /* whole cache lines */
}

static void pd__cpu_gemm(pd_device *d, bool ta, bool tb, int64_t m, int64_t n, int64_t k, pd_real alpha,
                         const pd_real *a, int64_t lda, const pd_real *b, int64_t ldb, pd_real beta, pd_real *c,
                         int64_t ldc, const pd_epilogue *after) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__gemm_job g;
    int64_t work = m * n * k / 8, parts = pd__team(d, work), form[6] = { PD__FORM_RIGHT, tb, k, n, 0, 0 };
    int64_t most = work < PD__TEAM_WORK ? 1 : pd__cpu_threads(d), space;
    pd__kept *kept = NULL;
    if (m <= 0 || n <= 0) return;
    memset(&g, 0, sizeof g);
    g.kernels = kernels;
    g.ta = ta, g.tb = tb, g.m = m, g.n = n, g.k = k, g.lda = lda, g.ldb = ldb, g.ldc = ldc;
    g.alpha = alpha, g.beta = beta, g.a = a, g.b = b, g.c = c, g.after = after;
    pd__gemm_grid(&g, parts);
    if (m == 1 && !tb) { /* then parts go across */
        PD__TEAM(d, work, part, g.across, kernels->gemm_row(&g, part));
        return;
    }
    form[4] = ldb, form[5] = g.columns;
    if (g.down == 1) kept = pd__kept_form(d, b, form, k * (n + kernels->nr), &g.ready);
    if (kept) g.right = kept->numbers;
    space = parts * g.each;
    if (most > parts) { /* also for when all threads are back, so that steps then take none; either may need more */
        pd__gemm_grid(&g, most);
        space = pd__max(space, most * g.each);
        pd__gemm_grid(&g, parts);
    }
    g.space = (pd_real *)pd__scratch(d, space, sizeof(pd_real));
    if (!g.space) return;
    PD__TEAM(d, work, part, parts, pd__gemm_part(&g, part));
    if (kept) memcpy(kept->form, form, sizeof form);
}

PD_DEF void pd_epilogue_apply(pd_device *d, const pd_epilogue *after, int64_t rows, int64_t columns, pd_real *c,
                              int64_t ldc) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__TEAM(d, rows * columns, i, rows, kernels->finish(after, false, 0, 1, columns, c + i * ldc, ldc));
}

/* ---- >>op:conv: convolution as products of filters and patches, which are picked straight from the image ----
   Element (k, j) of the patches, k = (channel, filter row, filter column) and j = (output row, output column), is at
   image[k_at[k] + j_at[j]], in an image with its padding around it. Where patches are more than one column apart, the
   image's columns are sorted by phase, their remainder modulo the stride: then outputs that are side by side are made
   of numbers that are. Images are independent of each other and filters are packed once, so the forward pass and the
   data gradient are cut by images and, for few of them, by filters, channels or columns; the filter gradient, a sum
   over images, is cut by columns of its matrix. */

/* The work of `count` products of m x n numbers, k deep each. A tile of them takes about as long to begin as 32
   steps. */
static int64_t pd__product_work(int64_t count, int64_t m, int64_t n, int64_t k) { return count * m * n * (k + 32) / 8; }

typedef struct pd__conv_job {
    const pd__kernels *kernels;
    const pd_conv_shape *s;
    int64_t channels, filters;                /* per group */
    int64_t depth, area;                      /* of the patches of a group */
    int64_t in_area, high, wide, padded_area; /* of an image's channel, and with its padding */
    int64_t phases, per_phase;                /* of its columns: column c is at c % phases * per_phase + c / phases */
    const int64_t *k_at, *j_at;
    const pd_real *x, *w, *dy;
    pd_real *out;             /* y, dx or dw */
    pd_real beta;             /* of y .. */
    const pd_epilogue *after; /* .. and what is made of it */
    int64_t parts, per_part;  /* of a group's filters, channels or columns */
    int64_t across, columns;  /* parts of the patches of an image, in the forward pass; columns of each */
    int64_t block_n, block_k; /* columns and depth of the blocks that are packed at a time .. */
    int64_t together;         /* .. and images */
    pd_real *packed;          /* filters */
    pd_real *space;
    int64_t each; /* working space of one thread */
} pd__conv_job;

static void pd__conv_sizes(pd__conv_job *j, const pd__kernels *kernels, const pd_conv_shape *s) {
    memset(j, 0, sizeof *j);
    j->kernels = kernels;
    j->s = s;
    j->channels = s->in_c / s->groups;
    j->filters = s->out_c / s->groups;
    j->depth = j->channels * s->filter_h * s->filter_w;
    j->area = s->out_h * s->out_w;
    j->in_area = s->in_h * s->in_w;
    j->high = pd__max(s->in_h + 2 * s->pad_h, (s->out_h - 1) * s->stride_h + (s->filter_h - 1) * s->dilation_h + 1);
    j->wide = pd__max(s->in_w + 2 * s->pad_w, (s->out_w - 1) * s->stride_w + (s->filter_w - 1) * s->dilation_w + 1);
    j->phases = s->filter_w > 1 ? s->stride_w : 1;
    j->per_phase = pd__ceil_div(j->wide, j->phases);
    j->wide = j->phases * j->per_phase;
    j->padded_area = j->high * j->wide;
    j->together = j->across = 1;
    j->columns = j->area;
}

/* Is a copy made of images? */
static bool pd__is_padded(const pd__conv_job *j) { return j->padded_area != j->in_area || j->phases > 1; }

static int64_t pd__conv_column(const pd__conv_job *j, int64_t column) {
    return column % j->phases * j->per_phase + column / j->phases;
}

/* Fills the offsets, and takes scratch for them, `packed` numbers of filters and, for each thread, a padded image of
   so many channels and `block` numbers. False when out of memory. */
static bool pd__conv_space(pd_device *d, pd__conv_job *j, int64_t packed, int64_t channels, int64_t block) {
    const pd_conv_shape *s = j->s;
    int64_t places = j->together * j->area, offsets = j->depth + places, *at, threads = pd__cpu_threads(d),
            line = 64 / (int64_t)sizeof(pd_real);
    int64_t image = pd__is_padded(j) ? j->channels * j->padded_area : s->in_c * j->in_area;
    int64_t head = pd__ceil_div(offsets * (int64_t)sizeof *at, 64) * line;
    packed = pd__ceil_div(packed, line) * line;
    j->each = pd__ceil_div(channels * j->padded_area, line) * line + pd__ceil_div(block, line) * line;
    at = (int64_t *)pd__scratch(d, head + packed + threads * j->each, sizeof(pd_real));
    if (!at) return false;
    j->k_at = at;
    j->j_at = at + j->depth;
    j->packed = (pd_real *)at + head;
    for (int64_t channel = 0; channel < j->channels; channel++)
        for (int64_t h = 0; h < s->filter_h; h++)
            for (int64_t w = 0; w < s->filter_w; w++)
                *at++ = channel * j->padded_area + h * s->dilation_h * j->wide + pd__conv_column(j, w * s->dilation_w);
    for (int64_t i = 0; i < j->together; i++)
        for (int64_t h = 0; h < s->out_h; h++)
            for (int64_t w = 0; w < s->out_w; w++)
                *at++ = i * image + h * s->stride_h * j->wide + pd__conv_column(j, w * s->stride_w);
    j->space = j->packed + packed;
    return true;
}

/* Copies channels with zeros around them, or, if `back`, adds what is inside to the channels. */
static void pd__pad(const pd__conv_job *j, bool back, int64_t channels, pd_real *image, pd_real *padded) {
    const pd_conv_shape *s = j->s;
    if (!back) memset(padded, 0, (size_t)(channels * j->padded_area) * sizeof *padded);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t h = 0; h < s->in_h; h++) {
            pd_real *line = image + c * j->in_area + h * s->in_w;
            pd_real *to = padded + c * j->padded_area + (h + s->pad_h) * j->wide;
            for (int64_t phase = 0; phase < j->phases; phase++) {
                int64_t w = (phase + j->phases - s->pad_w % j->phases) % j->phases; /* its first column */
                pd_real *inside = to + pd__conv_column(j, w + s->pad_w);
                if (back)
                    for (; w < s->in_w; w += j->phases) line[w] += *inside++;
                else if (j->phases == 1) memcpy(inside, line, (size_t)s->in_w * sizeof *line);
                else
                    for (; w < s->in_w; w += j->phases) *inside++ = line[w];
            }
        }
}

/* Packs rows first .. first + rows - 1 of a group's filter matrix (filters x depth), or of its transpose, block of k by
   block. */
static void pd__pack_filters(const pd__conv_job *j, bool transposed, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    int64_t group = unit / j->parts, m = transposed ? j->depth : j->filters, k = transposed ? j->filters : j->depth;
    int64_t first = unit % j->parts * j->per_part, rows = pd__min(j->per_part, m - first), step = pd__depth(kernels, k);
    int64_t rs = transposed ? 1 : j->depth, cs = transposed ? j->depth : 1;
    const pd_real *w = j->w + group * j->filters * j->depth + first * rs;
    pd_real *to = j->packed + (group * m + first) * k;
    if (rows <= 0) return;
    for (int64_t p = 0; p < k; p += step) {
        int64_t steps = pd__min(step, k - p);
        kernels->pack_a(w + p * cs, rs, cs, rows, steps, pd__height(kernels, rows), 0, steps, to + p * rows);
    }
}

static void pd__pack_filters_forward(const pd__conv_job *j, int64_t unit) { pd__pack_filters(j, false, unit); }
static void pd__pack_filters_back(const pd__conv_job *j, int64_t unit) { pd__pack_filters(j, true, unit); }

/* One part of one group of one image: y = filters * patches + beta y. */
static void pd__conv_unit(const pd__conv_job *j, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    int64_t left = unit % j->across * j->columns, right = pd__min(left + j->columns, j->area);
    int64_t part = unit / j->across % j->parts, image = unit / j->across / j->parts, group = image % j->s->groups;
    int64_t first = part * j->per_part, step = pd__depth(kernels, j->depth);
    pd_real *padded = j->space + PD__THREAD_INDEX() * j->each, *patches = padded;
    const pd_real *x = j->x + image * j->channels * j->in_area;
    pd__block_job b;
    memset(&b, 0, sizeof b);
    b.m = pd__min(j->per_part, j->filters - first);
    if (b.m <= 0) return;
    b.h = pd__height(kernels, b.m);
    b.alpha = 1;
    b.ldc = j->area;
    b.by_row = true;
    b.channel = group * j->filters + first;
    if (pd__is_padded(j)) {
        pd__pad(j, false, j->channels, (pd_real *)(uintptr_t)x, padded); /* only read */
        x = padded;
        patches += j->channels * j->padded_area;
    }
    b.b = patches;
    for (int64_t at = left; at < right; at += j->block_n)
        for (int64_t p = 0; p < j->depth; p += step) {
            b.n = pd__min(j->block_n, right - at);
            b.k = pd__min(step, j->depth - p);
            b.beta = p ? 1 : j->beta;
            b.after = p + step >= j->depth ? j->after : NULL;
            b.a = j->packed + (group * j->filters + first) * j->depth + p * b.m;
            b.c = j->out + (image * j->filters + first) * j->area + at;
            for (int64_t c = 0; c < b.n; c += kernels->nr)
                kernels->pick_b_panel(x, j->k_at + p, j->j_at + at + c, b.k, pd__min(kernels->nr, b.n - c),
                                      patches + c * b.k);
            kernels->multiply(&b);
        }
}

/* One part, a number of whole channels, of one group of one image: dx += scattered (filters^T * dy). */
static void pd__conv_back_unit(const pd__conv_job *j, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    int64_t part = unit % j->parts, image = unit / j->parts, group = image % j->s->groups;
    int64_t window = j->s->filter_h * j->s->filter_w, first = part * j->per_part, step = pd__depth(kernels, j->filters);
    int64_t channels = pd__min(j->per_part, j->depth - first) / window;
    pd_real *padded = j->space + PD__THREAD_INDEX() * j->each, *packed = padded;
    pd_real *dx = j->out + (image * j->channels + first / window) * j->in_area;
    const pd_real *dy = j->dy + image * j->filters * j->area;
    pd__block_job b;
    if (channels <= 0) return;
    memset(&b, 0, sizeof b);
    b.m = channels * window;
    b.h = pd__height(kernels, b.m);
    b.alpha = 1;
    b.c = dx;
    if (pd__is_padded(j)) {
        memset(padded, 0, (size_t)(channels * j->padded_area) * sizeof *padded);
        b.c = padded;
        packed += channels * j->padded_area;
    }
    b.row_at = j->k_at; /* of the part's own channels, the first of which is at 0 */
    b.b = packed;
    for (int64_t at = 0; at < j->area; at += j->block_n)
        for (int64_t p = 0; p < j->filters; p += step) {
            b.n = pd__min(j->block_n, j->area - at);
            b.k = pd__min(step, j->filters - p);
            b.a = j->packed + (group * j->depth + first) * j->filters + p * b.m;
            b.column_at = j->j_at + at;
            kernels->pack_b(dy + p * j->area + at, j->area, 1, b.k, b.n, packed);
            kernels->multiply(&b);
        }
    if (b.c == padded) pd__pad(j, true, channels, dx, padded);
}

/* One part, a number of columns, of one group of dw: dw += dy * patches^T, summed over all images in order. */
static void pd__conv_filter_unit(const pd__conv_job *j, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    int64_t part = unit % j->parts, group = unit / j->parts, window = j->s->filter_h * j->s->filter_w;
    int64_t first = part * j->per_part, columns = pd__min(j->per_part, j->depth - first);
    int64_t channel = first / window, channels = (first + columns - 1) / window - channel + 1;
    int64_t h = pd__height(kernels, j->filters), mc = pd__min(j->filters, kernels->mc / h * h), step = j->block_k;
    pd_real *padded = j->space + PD__THREAD_INDEX() * j->each, *packed_a = padded, *packed_b;
    pd__block_job b;
    if (columns <= 0) return;
    memset(&b, 0, sizeof b);
    b.h = h;
    b.alpha = b.beta = 1;
    b.ldc = j->depth;
    if (pd__is_padded(j)) packed_a += j->together * j->channels * j->padded_area;
    packed_b = packed_a + mc * step;
    b.a = packed_a;
    b.b = packed_b;
    for (int64_t row = 0; row < j->s->rows; row += j->together) {
        int64_t rows = pd__min(j->together, j->s->rows - row), image = row * j->s->groups + group;
        const pd_real *x = j->x + image * j->channels * j->in_area, *dy = j->dy + image * j->filters * j->area;
        int64_t x_row = j->s->in_c * j->in_area, dy_row = j->s->out_c * j->area;
        if (pd__is_padded(j)) {
            for (int64_t r = 0; r < rows; r++)
                pd__pad(j, false, channels, (pd_real *)(uintptr_t)x + r * x_row + channel * j->in_area,
                        padded + (r * j->channels + channel) * j->padded_area);
            x = padded;
        }
        for (int64_t p = 0; p < rows * j->area; p += step)
            for (int64_t n = 0; n < columns; n += j->block_n) {
                b.k = pd__min(step, rows * j->area - p);
                b.n = pd__min(j->block_n, columns - n);
                for (int64_t c = 0; c < b.n; c += kernels->nr)
                    kernels->pick_b_panel(x, j->j_at + p, j->k_at + first + n + c, b.k, pd__min(kernels->nr, b.n - c),
                                          packed_b + c * b.k);
                for (int64_t i = 0; i < j->filters; i += mc) {
                    b.m = pd__min(mc, j->filters - i);
                    for (int64_t r = 0; r < rows; r++) /* of several rows all positions, of one a block of them */
                        kernels->pack_a(dy + r * dy_row + i * j->area + p, j->area, 1, b.m, b.k / rows, h, r * j->area,
                                        b.k, packed_a);
                    b.c = j->out + (group * j->filters + i) * j->depth + first + n;
                    kernels->multiply(&b);
                }
            }
    }
}

/* Cuts `units` things of `size` into parts of whole multiples of `grain`, so that there is work for every thread. */
static void pd__conv_parts(pd_device *d, pd__conv_job *j, int64_t units, int64_t size, int64_t grain) {
    int64_t grains = pd__ceil_div(size, grain);
    j->parts = pd__min(grains, pd__ceil_div(pd__cpu_threads(d), pd__max(units, 1)));
    j->per_part = pd__ceil_div(grains, j->parts) * grain;
}

/* ---- >>op:winograd: convolution with 3 x 3 filters at stride 1, after Winograd: F(4 x 4, 3 x 3) of Lavin and Gray
   2016 ---- A tile of 4 x 4 outputs needs 6 x 6 inputs. With B, G and A of that paper, B^T d B of each tile d of each
   channel and G g G^T of each filter g are made once; their 36 places are multiplied like matrices of filters,
   channels and tiles; and A^T m A of the sums m are the outputs: 36 multiplications instead of 144. The data gradient
   is the same with the filters turned round and the channels as filters; the filter gradient is the transpose, G^T (A
   dy A^T * B^T d B) G. */

/* Are Winograd's convolutions made for this, and worth while? They save multiplications, but transform tiles and
   filters, and read 36 numbers of a filter instead of 9, from memory where there are many filters and few tiles; the
   numbers below are about what that costs, in multiplications, as measured. They round differently, so where one
   answer is asked for it is judged as for three rows: where that is wrong, one row and many lose about equally. */
static bool pd__winograd_fits(const pd_conv_shape *s) {
    const int64_t channels = s->in_c / s->groups, filters = s->out_c / s->groups, outputs = s->out_h * s->out_w;
    const int64_t tiles = pd__ceil_div(s->out_h, 4) * pd__ceil_div(s->out_w, 4), rows = s->one_answer ? 3 : s->rows;
    const int64_t products = channels * filters, transform = 8000 / pd__max(1, pd__min(8, rows * tiles));
    return s->filter_h == 3 && s->filter_w == 3 && s->stride_h == 1 && s->stride_w == 1 && s->dilation_h == 1 &&
           s->dilation_w == 1 && s->pad_h <= 2 && s->pad_w <= 2 &&
           rows * tiles * (36 * products + transform * (channels + filters)) + 400 * products <
               rows * outputs * products * 10;
}

/* Numbers in one of the 36 planes, with a gap: else the planes would often take each other's places in the cache. */
static int64_t pd__winograd_plane(int64_t lines, int64_t length) { return lines * length + 16; }

struct pd__winograd {
    const pd__kernels *kernels;
    int64_t rows, groups, channels, filters; /* of a group */
    int64_t in_h, in_w, out_h, out_w, top, left;
    int64_t high, wide; /* tiles of an image's channel */
    /* A block takes `across` times `lines` of the rows of tiles, which follow each other in all images. Where one row
       would leave vectors empty they are put side by side, the first `lines` in the first column: such a line of a
       block has `width` tiles. Or, of many small images, `by_lane`: the same row of as many images as a vector has
       lanes is a line, with the images of a tile side by side. */
    bool by_lane;
    int64_t across, width, lines, all_lines, blocks;
    int64_t stride; /* columns of tiles in a line that is read, filled up with zeros */
    int64_t places; /* for a block's tiles in one line of a matrix: `width` of each row, and what vectors run over */
    int64_t height, panels;  /* of the filters */
    int64_t parts, per_part; /* of the panels */
    bool back;               /* the filters are those of the data gradient */
    const pd_real *x, *w, *dy;
    pd_real *out;                /* y, dx or dw */
    pd_real beta;                /* of y or dx .. */
    const pd_epilogue *after;    /* .. and what is made of y */
    pd_real *packed;             /* [group][36][panel] of filters, or [36][filters][channels] of sums */
    pd_real *images, *gradients; /* [36][channels or filters][places] */
    pd_real *space;
    int64_t each, group, block; /* working space of a thread; what is done at the moment */
};

/* The rows of tiles side by side in a line: their images, of which the last may not be there, and which rows of
   those. */
typedef struct pd__winograd_rows {
    int64_t image[2 * 64 / sizeof(pd_real)], row[2 * 64 / sizeof(pd_real)]; /* nr of the widest vectors */
} pd__winograd_rows;

/* How many lines a block has. */
static int64_t pd__winograd_lines(const pd__winograd *j, int64_t block) {
    return pd__min(j->lines, j->all_lines - block * j->lines);
}

/* Those of the first line of a block, and of the line after. */
static void pd__winograd_first(const pd__winograd *j, int64_t block, pd__winograd_rows *at) {
    const int64_t lines = pd__winograd_lines(j, block), first = block * j->lines * (j->by_lane ? 1 : j->across);
    const int64_t images = j->by_lane ? 1 : lines / j->high, rows = j->by_lane ? 0 : lines % j->high; /* to the next */
    int64_t image = first / j->high * (j->by_lane ? j->across : 1), row = first % j->high;
    for (int64_t i = 0; i < j->across; i++) {
        at->image[i] = image, at->row[i] = row;
        image += images, row += rows;
        if (row >= j->high) row -= j->high, image++;
    }
}

static void pd__winograd_next(const pd__winograd *j, pd__winograd_rows *at) {
    for (int64_t i = 0; i < j->across; i++)
        if (++at->row[i] == j->high) at->row[i] = 0, at->image[i] += j->by_lane ? j->across : 1;
}

/* Numbers of all channels of an image, and of its output. */
static int64_t pd__winograd_in(const pd__winograd *j) { return j->groups * j->channels * j->in_h * j->in_w; }
static int64_t pd__winograd_out(const pd__winograd *j) { return j->groups * j->filters * j->out_h * j->out_w; }

/* How many tiles a block has. */
static int64_t pd__winograd_tiles(const pd__winograd *j, int64_t block) {
    return pd__winograd_lines(j, block) * j->width;
}

/* One block of tiles and one part of the filters. */
static void pd__winograd_unit(const pd__winograd *j, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    int64_t part = unit % j->parts, group = unit / j->parts % j->groups, block = unit / j->parts / j->groups;
    int64_t first = part * j->per_part, last = pd__min(first + j->per_part, j->panels), filter = first * j->height;
    int64_t count = pd__min(last * j->height, j->filters) - filter, tiles = pd__winograd_tiles(j, block);
    int64_t plane = pd__winograd_plane(j->channels, j->places), sum_plane = pd__winograd_plane(count, j->places);
    int64_t panel = pd__winograd_plane(j->channels, j->height);
    pd_real *images = j->space + PD__THREAD_INDEX() * j->each, *sums = images + 36 * plane;
    if (count <= 0) return;
    for (int64_t c = 0; c < j->channels; c++) /* the sums lie idle yet */
        kernels->winograd_channel(j, false, group, block, c, sums, images + c * j->places, plane);
    for (int64_t i = 0; i < 36; i++)
        for (int64_t t = 0; t < tiles; t += kernels->nr)
            for (int64_t p = first; p < last; p++)
                kernels->tile((int)pd__min(j->height, j->filters - p * j->height),
                              (int)(tiles - t <= kernels->lanes ? 1 : kernels->nr / kernels->lanes), j->channels, 1,
                              j->packed + ((group * 36 + i) * j->panels + p) * panel, PD__AHEAD, images + i * plane + t,
                              j->places, 0, sums + i * sum_plane + (p - first) * j->height * j->places + t, j->places);
    for (int64_t k = 0; k < count; k++)
        kernels->winograd_put(j, group, block, filter + k, sums + k * j->places, sum_plane, images);
}

/* Are images worth a lane each? Their rows must be short, and not many lanes be empty. */
static bool pd__winograd_by_lane(const pd__kernels *kernels, int64_t rows, int64_t wide) {
    return kernels->lanes > 1 && wide * kernels->lanes <= 64 &&
           pd__ceil_div(rows, kernels->lanes) * kernels->lanes * 3 <= rows * 4;
}

/* Sizes, in the direction of the forward pass or of the data gradient; `tiles`: about so many in a block. */
static void pd__winograd_sizes(pd__winograd *j, const pd__kernels *kernels, const pd_conv_shape *s, bool back,
                               int64_t tiles, int64_t threads) {
    memset(j, 0, sizeof *j);
    j->kernels = kernels;
    j->rows = s->rows, j->groups = s->groups, j->back = back;
    j->channels = (back ? s->out_c : s->in_c) / s->groups, j->filters = (back ? s->in_c : s->out_c) / s->groups;
    j->in_h = back ? s->out_h : s->in_h, j->in_w = back ? s->out_w : s->in_w;
    j->out_h = back ? s->in_h : s->out_h, j->out_w = back ? s->in_w : s->out_w;
    j->top = back ? 2 - s->pad_h : s->pad_h, j->left = back ? 2 - s->pad_w : s->pad_w;
    j->high = pd__ceil_div(j->out_h, 4), j->wide = pd__ceil_div(j->out_w, 4);
    j->across = 4 * j->wide < 3 * kernels->lanes ? pd__min(j->rows * j->high, kernels->nr / j->wide) : 1;
    j->all_lines = pd__ceil_div(j->rows * j->high, j->across);
    j->by_lane = pd__winograd_by_lane(kernels, j->rows, j->wide);
    if (j->by_lane) j->across = kernels->lanes, j->all_lines = pd__ceil_div(j->rows, kernels->lanes) * j->high;
    j->width = j->across * j->wide;
    /* A block for each thread, as long as its tiles about fill a panel. */
    j->lines = pd__ceil_div(j->all_lines, pd__ceil_div(threads, s->groups));
    j->lines = pd__min(pd__max(j->lines, kernels->nr / j->width), tiles / j->width);
    j->lines = pd__max(1, pd__min(j->lines, j->all_lines));
    j->blocks = pd__ceil_div(j->all_lines, j->lines);
    j->stride = pd__ceil_div(j->width, kernels->lanes) * kernels->lanes + 4;
    /* One vector more for the last row of tiles, and two tiles more for the columns that tiles have in common; and an
       odd multiple of 16, so that the same places of many lines do not take each other's in the cache. */
    j->places = pd__ceil_div(j->lines * j->width + kernels->lanes + 2 + 16, 32) * 32 - 16;
}

static void pd__winograd_run(pd_device *d, pd__winograd *j) {
    const pd__kernels *kernels = j->kernels;
    int64_t threads = pd__cpu_threads(d), units = j->blocks * j->groups, filters;
    int64_t form[6] = { PD__FORM_WINOGRAD, j->groups, j->filters, j->channels, j->back, 0 };
    pd__kept *kept;
    bool ready;
    int64_t work = j->rows * j->groups * j->out_h * j->out_w * j->filters * j->channels;
    j->height = pd__height(kernels, j->filters);
    j->panels = pd__ceil_div(j->filters, j->height);
    j->parts = pd__min(j->panels, pd__ceil_div(threads, units));
    j->per_part = pd__ceil_div(j->panels, j->parts);
    j->each =
        36 * pd__winograd_plane(j->channels, j->places) + 36 * pd__winograd_plane(j->per_part * j->height, j->places);
    filters = j->groups * j->panels * 36 * pd__winograd_plane(j->channels, j->height);
    filters = pd__ceil_div(filters, 16) * 16;
    kept = pd__kept_form(d, j->w, form, filters, &ready);
    j->packed = (pd_real *)pd__scratch(d, (kept ? 0 : filters) + threads * j->each, sizeof(pd_real));
    if (!j->packed) return;
    j->space = j->packed + (kept ? 0 : filters);
    if (kept) j->packed = kept->numbers;
    PD__TEAM(d, ready ? 0 : j->groups * j->filters * j->channels * 36, unit, ready ? 0 : j->groups * j->panels,
             kernels->winograd_panel(j, unit));
    if (kept) memcpy(kept->form, form, sizeof form);
    PD__TEAM(d, work, unit, units * j->parts, pd__winograd_unit(j, unit));
}

/* The filter gradient: one channel of a block's images, or one filter of its output gradients. */
static void pd__winograd_transform(const pd__winograd *j, int64_t unit) {
    const pd__kernels *kernels = j->kernels;
    const bool gradient = unit >= j->channels;
    const int64_t lines = gradient ? j->filters : j->channels, channel = gradient ? unit - j->channels : unit;
    pd_real *to = (gradient ? j->gradients : j->images) + channel * j->places;
    kernels->winograd_channel(j, gradient, j->group, j->block, channel, j->space + PD__THREAD_INDEX() * j->each, to,
                              pd__winograd_plane(lines, j->places));
}

/* One of the 36 sums over a block's tiles, of filters x channels. */
static void pd__winograd_sum(const pd__winograd *j, int64_t i) {
    pd__gemm_job g;
    memset(&g, 0, sizeof g);
    g.kernels = j->kernels;
    g.tb = true;
    g.m = g.rows = j->filters, g.n = g.columns = j->channels;
    g.k = pd__winograd_tiles(j, j->block);
    g.lda = g.ldb = j->places, g.ldc = j->channels;
    g.alpha = 1, g.beta = j->block == 0 ? 0 : 1;
    g.a = j->gradients + i * pd__winograd_plane(j->filters, j->places);
    g.b = j->images + i * pd__winograd_plane(j->channels, j->places);
    g.c = j->packed + i * pd__winograd_plane(j->filters, j->channels);
    g.space = j->space + PD__THREAD_INDEX() * j->each;
    g.across = 1;
    pd__gemm_part(&g, 0);
}

static void pd__winograd_backward_filter(pd_device *d, pd__winograd *j) {
    const pd__kernels *kernels = j->kernels;
    const int64_t images = 36 * pd__winograd_plane(j->channels, j->places);
    const int64_t gradients = 36 * pd__winograd_plane(j->filters, j->places);
    int64_t sums = 36 * pd__winograd_plane(j->filters, j->channels);
    int64_t tiles = j->lines * j->width, threads = pd__cpu_threads(d);
    int64_t work = tiles * (j->channels + j->filters) * 36;
    /* of a product's packed factors, or of phases */
    j->each = pd__max((pd__min(kernels->mc, j->filters) + pd__min(PD__NC, j->channels + kernels->nr)) *
                          pd__depth(kernels, tiles),
                      46 * j->stride);
    j->each = pd__ceil_div(j->each, 16) * 16 + 32;
    sums = pd__ceil_div(sums, 16) * 16;
    j->packed = (pd_real *)pd__scratch(d, sums + images + gradients + threads * j->each, sizeof(pd_real));
    if (!j->packed) return;
    j->images = j->packed + sums;
    j->gradients = j->images + images;
    j->space = j->gradients + gradients;
    for (j->group = 0; j->group < j->groups; j->group++) {
        for (j->block = 0; j->block < j->blocks; j->block++) {
            PD__TEAM(d, work, unit, j->channels + j->filters, pd__winograd_transform(j, unit));
            PD__TEAM(d, work * 16, unit, 36, pd__winograd_sum(j, unit));
        }
        PD__TEAM(d, sums, unit, j->filters, kernels->winograd_filter_unit(j, unit));
    }
}

/* ---- convolution: one way or the other ---- */

static void pd__cpu_conv(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *w, pd_real beta,
                         pd_real *y, const pd_epilogue *after) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__conv_job j;
    int64_t images = s->rows * s->groups, form[6] = { 0 };
    pd__kept *kept;
    bool ready;
    if (images == 0) return;
    if (pd__winograd_fits(s)) {
        pd__winograd fast;
        pd__winograd_sizes(&fast, kernels, s, false, 64, pd__cpu_threads(d));
        fast.x = x, fast.w = w, fast.out = y, fast.beta = beta, fast.after = after;
        pd__winograd_run(d, &fast);
        return;
    }
    pd__conv_sizes(&j, kernels, s);
    j.x = x, j.w = w, j.out = y, j.beta = beta, j.after = after;
    pd__conv_parts(d, &j, images, j.filters, kernels->mr);
    if (j.parts > 1 && j.filters < j.area) { /* the less is read by all threads */
        j.across = j.parts;
        j.columns = pd__ceil_div(pd__ceil_div(j.area, j.across), kernels->nr) * kernels->nr;
        j.parts = 1;
        j.per_part = j.filters;
    }
    j.block_n = pd__min(PD__NC, pd__ceil_div(j.columns, kernels->nr) * kernels->nr);
    form[0] = PD__FORM_CONV, form[1] = s->groups, form[2] = j.filters, form[3] = j.depth, form[4] = j.per_part;
    kept = pd__kept_form(d, w, form, s->out_c * j.depth, &ready);
    if (!pd__conv_space(d, &j, kept ? 0 : s->out_c * j.depth, pd__is_padded(&j) ? j.channels : 0,
                        pd__depth(kernels, j.depth) * j.block_n))
        return;
    if (kept) j.packed = kept->numbers;
    PD__TEAM(d, ready ? 0 : s->out_c * j.depth, unit, ready ? 0 : s->groups * j.parts,
             pd__pack_filters_forward(&j, unit));
    if (kept) memcpy(kept->form, form, sizeof form);
    PD__TEAM(d, pd__product_work(images, j.filters, j.area, j.depth), unit, images * j.parts * j.across,
             pd__conv_unit(&j, unit));
}

static void pd__cpu_conv_backward_data(pd_device *d, const pd_conv_shape *s, const pd_real *w, const pd_real *dy,
                                       pd_real *dx) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__conv_job j;
    int64_t images = s->rows * s->groups;
    if (images == 0) return;
    if (pd__winograd_fits(s)) {
        pd__winograd fast;
        pd__winograd_sizes(&fast, kernels, s, true, 64, pd__cpu_threads(d));
        fast.x = dy, fast.w = w, fast.out = dx, fast.beta = 1;
        pd__winograd_run(d, &fast);
        return;
    }
    pd__conv_sizes(&j, kernels, s);
    j.w = w, j.dy = dy, j.out = dx;
    pd__conv_parts(d, &j, images, j.depth, s->filter_h * s->filter_w);
    j.block_n = pd__min(PD__NC, pd__ceil_div(j.area, kernels->nr) * kernels->nr);
    if (!pd__conv_space(d, &j, s->out_c * j.depth, pd__is_padded(&j) ? j.channels : 0,
                        pd__depth(kernels, j.filters) * j.block_n))
        return;
    PD__TEAM(d, s->out_c * j.depth, unit, s->groups * j.parts, pd__pack_filters_back(&j, unit));
    PD__TEAM(d, pd__product_work(images, j.depth, j.area, j.filters), unit, images * j.parts,
             pd__conv_back_unit(&j, unit));
}

static void pd__cpu_conv_backward_filter(pd_device *d, const pd_conv_shape *s, const pd_real *x, const pd_real *dy,
                                         pd_real *dw) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__conv_job j;
    if (s->rows == 0) return;
    if (pd__winograd_fits(s)) {
        pd__winograd fast;
        pd__winograd_sizes(&fast, kernels, s, false,
                           pd__max(64, pd__min(512, 2000000 / (36 * (s->in_c + s->out_c) / s->groups))), 1);
        fast.x = x, fast.dy = dy, fast.out = dw;
        pd__winograd_backward_filter(d, &fast);
        return;
    }
    pd__conv_sizes(&j, kernels, s);
    j.x = x, j.dy = dy, j.out = dw;
    pd__conv_parts(d, &j, s->groups, j.depth, kernels->nr);
    j.together = pd__max(1, pd__min(s->rows, kernels->kc / j.area));
    j.block_k = j.together > 1 ? j.together * j.area : pd__depth(kernels, j.area);
    j.block_n = pd__min(PD__NC, j.per_part);
    if (!pd__conv_space(d, &j, 0, pd__is_padded(&j) ? j.together * j.channels : 0,
                        (pd__min(kernels->mc, j.filters) + j.block_n) * j.block_k))
        return;
    PD__TEAM(d, pd__product_work(s->rows * s->groups, j.filters, j.depth, j.area), unit, s->groups * j.parts,
             pd__conv_filter_unit(&j, unit));
}

/* ---- >>op:update: optimizers' arithmetic ---- */

struct pd__update_job {
    const pd_update *u;
    double correct1, correct2, l2;
    pd_real *w;
    const pd_real *g;
    const unsigned char *mask;
    pd_real *const *states;
};

static void pd__cpu_update(pd_device *d, const pd_update *u, int64_t n, pd_real *w, const pd_real *g,
                           const unsigned char *mask, pd_real *const *states) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__update_job j;
    j.u = u;
    j.correct1 = 1 - pow(u->optimizer.beta1, (double)u->step);
    j.correct2 = 1 - pow(u->optimizer.beta2, (double)u->step);
    j.l2 = u->optimizer.kind == PD_OPT_ADAMW ? 0 : u->l2;
    j.w = w, j.g = g, j.mask = mask, j.states = states;
    PD__TEAM_STEPS(d, n * 4, i, n, PD__PIECE, kernels->update_piece(&j, i, pd__min(n, i + PD__PIECE)));
}

/* Arguments of update_rows and gather_rows. */
typedef struct pd__rows_job {
    const pd__kernels *kernels;
    const pd_update *u;
    int64_t count, width;
    const int64_t *rows, *state_rows;
    const double *carry;
    const pd_real *w, *g, *state;
    pd_real *new_w, *new_state; /* the table and its state, or copies of rows in the order of `rows` and NULL */
    bool copy;
} pd__rows_job;

/* Rows of a large table come from memory, so the next ones are sent for. */
static void pd__send_for_row(const pd__rows_job *j, int64_t i) {
    if (i >= j->count) return;
    PD__PREFETCH(j->w + j->rows[i] * j->width);
    PD__PREFETCH(j->w + (j->rows[i] + 1) * j->width - 1);
    if (!j->state) return;
    PD__PREFETCH(j->state + j->state_rows[i] * j->width);
    PD__PREFETCH(j->state + (j->state_rows[i] + 1) * j->width - 1);
}

static void pd__row(const pd__rows_job *j, int64_t i) {
    int64_t at = j->rows[i] * j->width, state_at = j->state ? j->state_rows[i] * j->width : 0;
    pd__send_for_row(j, i + 8);
    j->kernels->update_row(j->u, j->width, j->carry ? j->carry + 4 * i : NULL, j->w + at,
                           j->g ? j->g + i * j->width : NULL, j->state ? j->state + state_at : NULL,
                           j->new_w + (j->copy ? i * j->width : at), j->new_state ? j->new_state + state_at : NULL);
}

static void pd__cpu_update_rows(pd_device *d, const pd_update *u, int64_t count, int64_t width, const int64_t *rows,
                                const int64_t *state_rows, const double *carry, pd_real *w, const pd_real *g,
                                pd_real *state) {
    pd__rows_job j = PD__ZERO;
    j.kernels = pd__cpu_kernels(d);
    j.u = u, j.count = count, j.width = width, j.rows = rows, j.state_rows = state_rows, j.carry = carry, j.g = g;
    j.w = j.new_w = w;
    j.state = j.new_state = state;
    PD__TEAM(d, count * width * 4, i, count, pd__row(&j, i));
}

static void pd__cpu_gather_rows(pd_device *d, int64_t count, int64_t width, const int64_t *rows,
                                const int64_t *state_rows, const double *carry, const pd_real *w, const pd_real *state,
                                pd_real *y) {
    pd__rows_job j = PD__ZERO;
    j.kernels = pd__cpu_kernels(d);
    j.count = count, j.width = width, j.rows = rows, j.state_rows = state_rows, j.carry = carry, j.w = w;
    j.state = carry ? state : NULL;
    j.new_w = y;
    j.copy = true;
    PD__TEAM(d, count * width * 2, i, count, pd__row(&j, i));
}

/* ---- >>op:activate: activations ---- */

static const double pd__stanh_a = 1.7159, pd__stanh_b = 2.0 / 3.0;

static void pd__cpu_activate(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width, const pd_real *x,
                             pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    int64_t n = rows * width;
    if (act == PD_SOFTMAX) {
        PD__TEAM(d, n * 8, r, rows, kernels->softmax_row(width, x + r * width, y + r * width));
        return;
    }
    PD__TEAM_STEPS(d, n * 2, i, n, PD__PIECE,
                   kernels->activate_piece(act, alpha, pd__min(PD__PIECE, n - i), x + i, y + i));
}

static void pd__cpu_activate_backward(pd_device *d, pd_act act, pd_real alpha, int64_t rows, int64_t width,
                                      const pd_real *x, const pd_real *y, pd_real *grad) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    int64_t n = rows * width;
    if (act == PD_SOFTMAX) {
        PD__TEAM(d, n * 2, r, rows, kernels->softmax_backward_row(width, y + r * width, grad + r * width));
        return;
    }
    PD__TEAM_STEPS(
        d, n * 2, i, n, PD__PIECE,
        kernels->activate_backward_piece(act, alpha, pd__min(PD__PIECE, n - i), x ? x + i : x, y + i, grad + i));
}

/* ---- >>op:pool: pooling ---- */

/* The cells of output (oh, ow) that lie inside the image: rows h0 .. h1 - 1, columns w0 .. w1 - 1. */
typedef struct pd__window {
    int64_t h0, h1, w0, w1;
} pd__window;

static pd__window pd__pool_window(const pd_pool_shape *s, int64_t oh, int64_t ow) {
    pd__window v;
    v.h0 = oh * s->stride_h - s->pad_h;
    v.w0 = ow * s->stride_w - s->pad_w;
    v.h1 = pd__min(v.h0 + s->size_h, s->in_h);
    v.w1 = pd__min(v.w0 + s->size_w, s->in_w);
    v.h0 = pd__max(v.h0, 0);
    v.w0 = pd__max(v.w0, 0);
    return v;
}

/* What a sum over the window is multiplied with. */
static pd_real pd__pool_factor(const pd_pool_shape *s, const pd__window *v) {
    double cells = (double)((v->h1 - v->h0) * (v->w1 - v->w0));
    if (s->method == PD_AVERAGE) return (pd_real)(1 / cells);
    return s->method == PD_SQRT_N ? (pd_real)(1 / sqrt(cells)) : 1;
}

struct pd__pool_job {
    const pd__kernels *kernels;
    const pd_pool_shape *s;
    const pd_real *x, *y, *dy;
    pd_real *out, *space; /* for each thread a line of the image, and `lines` of phases */
    int64_t each, line, lines;
    int64_t begin, stop; /* of a window's columns, those that are inside the image for some output */
    /* Column w is number w / stride of phase w % stride. Phases are `wide`, and begin `lead` numbers before column 0;
       there are none beyond `phases`, where nothing of the image is. */
    int64_t stride, phases, lead, wide;
};

static bool pd__pool_space(pd_device *d, pd__pool_job *j) {
    const pd__kernels *kernels = j->kernels;
    const pd_pool_shape *s = j->s;
    j->stride = s->out_w > 1 ? s->stride_w : 1;
    j->phases = pd__min(j->stride, s->in_w + 1);
    j->begin = pd__max(0, s->pad_w - (s->out_w - 1) * j->stride);
    j->stop = pd__min(s->size_w, s->in_w + s->pad_w);
    j->lead = pd__ceil_div(s->pad_w - j->begin, j->stride);
    j->wide = j->lead + kernels->lanes + 1 +
              pd__max(pd__ceil_div(s->in_w, j->stride), s->out_w + pd__ceil_div(j->stop - j->begin, j->stride));
    j->line = pd__ceil_div(s->in_w, 16) * 16 + 16;
    j->lines = pd__min(s->out_h, 8);
    j->each = pd__ceil_div(j->line + j->lines * j->phases * j->wide, 16) * 16;
    j->space = (pd_real *)pd__scratch(d, pd__cpu_threads(d) * j->each, sizeof(pd_real));
    return j->space != NULL;
}

static void pd__cpu_pool(pd_device *d, const pd_pool_shape *s, const pd_real *x, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__pool_job j;
    memset(&j, 0, sizeof j);
    j.kernels = kernels, j.s = s, j.x = x, j.out = y;
    if (kernels->lanes > 1 && s->size_h == 2 && s->size_w == 2 && s->stride_h == 2 && s->stride_w == 2 &&
        s->in_h == 2 * s->out_h && s->in_w == 2 * s->out_w && s->pad_h == 0 && s->pad_w == 0 &&
        (s->in_w % kernels->lanes == 0 || (2 * s->in_w == kernels->lanes && s->out_h % 2 == 0))) {
        const int64_t maps = s->rows * s->channels, area = s->in_h * s->in_w;
        const int64_t together = pd__max(1, PD__PIECE / pd__max(1, area));
        PD__TEAM_STEPS(d, maps * area / 2, map, maps, together,
                       kernels->pool_pairs(&j, map, pd__min(together, maps - map)));
        return;
    }
    if (!pd__pool_space(d, &j)) return;
    PD__TEAM(d, s->rows * s->channels * s->in_h * s->in_w * 2, map, s->rows * s->channels, kernels->pool_map(&j, map));
}

/* Where the gradient of a maximum goes: to the first of the cells that have it, of NaNs too, if one has; without
   branches, because nothing foretells them. */
static int64_t pd__pool_first(const pd_pool_shape *s, const pd__window *v, const pd_real *map, pd_real y) {
    int64_t at = -1;
    for (int64_t h = v->h1 - 1; h >= v->h0; h--)
        for (int64_t w = v->w1 - 1; w >= v->w0; w--) at = map[h * s->in_w + w] == y ? h * s->in_w + w : at;
    if (at >= 0 || y == y) return at;
    for (int64_t h = v->h1 - 1; h >= v->h0; h--)
        for (int64_t w = v->w1 - 1; w >= v->w0; w--)
            at = map[h * s->in_w + w] != map[h * s->in_w + w] ? h * s->in_w + w : at;
    return at;
}

static void pd__pool_map_back(const pd__pool_job *j, int64_t map) {
    const pd__kernels *kernels = j->kernels;
    const pd_pool_shape *s = j->s;
    const pd_real *x = j->x + map * s->in_h * s->in_w, *y = j->y + map * s->out_h * s->out_w;
    const pd_real *dy = j->dy + map * s->out_h * s->out_w;
    pd_real *dx = j->out + map * s->in_h * s->in_w, *line = j->space + PD__THREAD_INDEX() * j->each;
    for (int64_t oh = 0; oh < s->out_h; oh++) {
        pd__window v = pd__pool_window(s, oh, 0);
        memset(line, 0, (size_t)j->line * sizeof *line);
        for (int64_t ow = 0; ow < s->out_w; ow++, y++, dy++) {
            v = pd__pool_window(s, oh, ow);
            if (s->method == PD_MAX) {
                int64_t at = pd__pool_first(s, &v, x, *y);
                if (at >= 0) dx[at] += *dy;
            } else {
                pd_real part = *dy * pd__pool_factor(s, &v);
                for (int64_t w = v.w0; w < v.w1; w++) line[w] += part;
            }
        }
        for (int64_t h = v.h0; s->method != PD_MAX && h < v.h1; h++)
            kernels->contract_line(s->in_w, 1, line, 1, NULL, 0, dx + h * s->in_w, 1);
    }
}

static void pd__cpu_pool_backward(pd_device *d, const pd_pool_shape *s, const pd_real *x, const pd_real *y,
                                  const pd_real *dy, pd_real *dx) {
    pd__pool_job j;
    memset(&j, 0, sizeof j);
    j.kernels = pd__cpu_kernels(d), j.s = s, j.x = x, j.y = y, j.dy = dy, j.out = dx;
    if (!pd__pool_space(d, &j)) return;
    PD__TEAM(d, s->rows * s->channels * s->in_h * s->in_w * 2, map, s->rows * s->channels, pd__pool_map_back(&j, map));
}

/* ---- >>op:cross_entropy: cross-entropy ---- */

/* The smallest probability that a cost sees, so that a logarithm stays finite. */
static inline pd_real pd__at_least_tiny(pd_real p) { return p > PD__REAL_MIN || p != p ? p : PD__REAL_MIN; }

static void pd__cpu_cross_entropy(pd_device *d, int64_t rows, int64_t width, const pd_real *x, const pd_real *p,
                                  const int64_t *ids, const pd_real *soft, const pd_real *row_weights,
                                  const pd_real *class_weights, pd_real *cost) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__PARALLEL(d, rows * (x ? width * 2 : 8) + (soft ? rows * width * 8 : 0))
    for (int64_t r = 0; r < rows; r++) {
        const pd_real *row = x ? x + r * width : NULL;
        double weight = row_weights ? (double)row_weights[r] : 1, sum = 0, top = 0, least = 0;
        if (row) least = kernels->softmax_cost(width, row, p + r * width, &top);
        for (int64_t c = ids ? ids[r] : 0; c < (ids ? ids[r] + 1 : width); c++) {
            double t = (double)(soft ? soft[r * width + c] : 1) * (double)(class_weights ? class_weights[c] : 1);
            if (t != 0)
                sum += t * (row ? top - (double)row[c] + least : -log((double)pd__at_least_tiny(p[r * width + c])));
        }
        cost[r] = weight != 0 ? (pd_real)(weight * sum) : 0;
    }
}

static void pd__cpu_cross_entropy_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *p,
                                           const int64_t *ids, const pd_real *soft, const pd_real *class_weights,
                                           const pd_real *dcost, bool by_x, pd_real *dx) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__PARALLEL(d, rows * width * 2)
    for (int64_t r = 0; r < rows; r++) {
        const pd_real *row = p + r * width;
        pd_real *to = dx + r * width, total = 0;
        if (dcost[r] == 0) continue;
        for (int64_t c = ids ? ids[r] : 0; c < (ids ? ids[r] + 1 : width); c++) {
            pd_real t = (soft ? soft[r * width + c] : 1) * (class_weights ? class_weights[c] : 1);
            to[c] -= dcost[r] * (by_x ? t : t / pd__at_least_tiny(row[c]));
            total += t;
        }
        if (by_x) kernels->contract_line(width, dcost[r] * total, row, 1, NULL, 0, to, 1);
    }
}

/* ---- >>op:dropout: dropout ---- */

static void pd__cpu_dropout(pd_device *d, int64_t n, uint64_t key, double p, const pd_real *x, pd_real *y) {
    pd_real factor = (pd_real)(1 / (1 - p));
    (void)d;
    PD__PARALLEL(d, n * 2)
    for (int64_t start = 0; start < n; start += PD__PIECE)
        for (int64_t i = start; i < pd__min(n, start + PD__PIECE); i++)
            if (pd__uniform(key, (uint64_t)i) >= p) y[i] += factor * x[i];
}

/* ---- >>op:norm: normalisation ---- */

/* What batch norm needs of one channel, over rows and `area` positions. */
struct pd__channel_job {
    int64_t rows, channels, area;
    const pd_real *x, *dy, *mean, *rest, *variance, *weight, *bias;
    double epsilon;
    bool batch_moments;
    pd_real *moments, *y, *dx, *dweight, *dbias;
};

static void pd__cpu_channel_moments(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                    pd_real *moments) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__channel_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.channels = channels, j.area = area, j.x = x, j.moments = moments;
    PD__TEAM(d, rows * channels * area, c, channels, kernels->moments_of(&j, c));
}

static void pd__cpu_batch_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                               const pd_real *mean, const pd_real *rest, const pd_real *variance, double epsilon,
                               const pd_real *weight, const pd_real *bias, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__channel_job j;
    memset(&j, 0, sizeof j);
    j.channels = channels, j.area = area, j.x = x, j.mean = mean, j.rest = rest, j.variance = variance;
    j.epsilon = epsilon;
    j.weight = weight, j.bias = bias, j.y = y;
    PD__TEAM(d, rows * channels * area, m, rows * channels, kernels->batch_norm_map(&j, m));
}

static void pd__cpu_batch_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, const pd_real *x,
                                        const pd_real *mean, const pd_real *rest, const pd_real *variance,
                                        double epsilon, bool batch_moments, const pd_real *weight, const pd_real *dy,
                                        pd_real *dx, pd_real *dweight, pd_real *dbias) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__channel_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.channels = channels, j.area = area, j.x = x, j.mean = mean, j.rest = rest;
    j.variance = variance, j.epsilon = epsilon, j.batch_moments = batch_moments, j.weight = weight, j.dy = dy;
    j.dx = dx, j.dweight = dweight, j.dbias = dbias;
    PD__TEAM(d, rows * channels * area, c, channels, kernels->batch_norm_back(&j, c));
}

/* Response norm runs along the channels of a strip of positions. */
struct pd__response_job {
    int64_t channels, area, size, strip, strips; /* numbers of a strip; strips of each row */
    double alpha, beta, k;
    const pd_real *x, *scale, *dy;
    pd_real *scales, *y, *dx, *space;
};

static void pd__cpu_response_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                  double alpha, double beta, double k, const pd_real *x, pd_real *scales, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__response_job j;
    memset(&j, 0, sizeof j);
    j.channels = channels, j.area = area, j.size = size, j.alpha = alpha, j.beta = beta, j.k = k;
    j.x = x, j.scales = scales, j.y = y;
    j.strip = 8 * kernels->lanes, j.strips = pd__ceil_div(area, j.strip);
    PD__TEAM(d, rows * channels * area * 8, unit, rows * j.strips, kernels->response_strip(&j, unit));
}

static void pd__cpu_response_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t size,
                                           double alpha, double beta, const pd_real *x, const pd_real *scales,
                                           const pd_real *dy, pd_real *dx) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__response_job j;
    memset(&j, 0, sizeof j);
    j.channels = channels, j.area = area, j.size = size, j.alpha = alpha, j.beta = beta;
    j.x = x, j.scale = scales, j.dy = dy, j.dx = dx;
    j.strip = 8 * kernels->lanes, j.strips = pd__ceil_div(area, j.strip);
    j.space = (pd_real *)pd__scratch(d, pd__cpu_threads(d) * channels * j.strip, sizeof(pd_real));
    if (!j.space) return;
    PD__TEAM(d, rows * channels * area * 8, unit, rows * j.strips, kernels->response_strip_back(&j, unit));
}

struct pd__layer_norm_job {
    int64_t rows, width;
    const pd_real *x, *weight, *bias, *means, *dy; /* means, moments: for each row, see pd_op_layer_norm */
    double epsilon;
    pd_real *moments, *y, *dx, *dweight, *dbias;
};
enum { PD__COLUMNS = 64 }; /* that layer norm's sums over rows are made of at a time */

static void pd__cpu_layer_norm(pd_device *d, int64_t rows, int64_t width, const pd_real *x, double epsilon,
                               const pd_real *weight, const pd_real *bias, pd_real *moments, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__layer_norm_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.width = width, j.x = x, j.epsilon = epsilon, j.weight = weight, j.bias = bias;
    j.moments = moments, j.y = y;
    PD__TEAM(d, rows * width, r, rows, kernels->layer_norm_row(&j, r));
}

static void pd__cpu_layer_norm_backward(pd_device *d, int64_t rows, int64_t width, const pd_real *x,
                                        const pd_real *moments, const pd_real *weight, const pd_real *dy, pd_real *dx,
                                        pd_real *dweight, pd_real *dbias) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__layer_norm_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.width = width, j.x = x, j.means = moments, j.weight = weight, j.dy = dy;
    j.dx = dx, j.dweight = dweight, j.dbias = dbias;
    PD__TEAM(d, rows * width, r, dx ? rows : 0, kernels->layer_norm_back_row(&j, r));
    PD__TEAM(d, rows * width, unit, dweight || dbias ? pd__ceil_div(width, PD__COLUMNS) : 0,
             kernels->layer_norm_back_columns(&j, unit));
}

/* A group's numbers stand in one piece, those of one channel after those of another. */
struct pd__group_norm_job {
    int64_t rows, channels, area, groups, members; /* members: channels of a group */
    const pd_real *x, *weight, *bias, *means, *dy; /* means, moments: for each group, see pd_op_group_norm */
    double epsilon;
    pd_real *moments, *y, *dx, *dweight, *dbias;
};

static void pd__cpu_group_norm(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                               const pd_real *x, double epsilon, const pd_real *weight, const pd_real *bias,
                               pd_real *moments, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__group_norm_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.channels = channels, j.area = area, j.groups = groups, j.members = channels / groups;
    j.x = x, j.epsilon = epsilon, j.weight = weight, j.bias = bias, j.moments = moments, j.y = y;
    PD__TEAM(d, rows * channels * area, group, rows * groups, kernels->group_norm_one(&j, group));
}

static void pd__cpu_group_norm_backward(pd_device *d, int64_t rows, int64_t channels, int64_t area, int64_t groups,
                                        const pd_real *x, const pd_real *moments, const pd_real *weight,
                                        const pd_real *dy, pd_real *dx, pd_real *dweight, pd_real *dbias) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__group_norm_job j;
    memset(&j, 0, sizeof j);
    j.rows = rows, j.channels = channels, j.area = area, j.groups = groups, j.members = channels / groups;
    j.x = x, j.means = moments, j.weight = weight, j.dy = dy, j.dx = dx, j.dweight = dweight, j.dbias = dbias;
    PD__TEAM(d, rows * channels * area, group, dx ? rows * groups : 0, kernels->group_norm_back_one(&j, group));
    PD__TEAM(d, rows * channels * area, channel, dweight || dbias ? channels : 0,
             kernels->group_norm_back_channel(&j, channel));
}

/* ---- >>op:sparse_product: sparse rows ---- */

static void pd__sparse_row(const pd__kernels *kernels, const pd_csr *s, int64_t width, const pd_real *x, pd_real *y,
                           int64_t r) {
    int64_t first = s->starts ? s->starts[r] : r, end = s->starts ? s->starts[r + 1] : r + 1;
    for (int64_t k = first; k < end; k++)
        kernels->contract_line(width, s->values ? s->values[k] : 1, x + s->columns[k] * width, 1, NULL, 0,
                               y + r * width, 1);
}

static void pd__cpu_sparse_product(pd_device *d, const pd_csr *s, int64_t width, const pd_real *x, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    int64_t entries = s->starts && s->rows > 0 ? s->starts[s->rows] - s->starts[0] : s->rows;
    PD__TEAM(d, entries * width, r, s->rows, pd__sparse_row(kernels, s, width, x, y, r));
}

/* ---- >>op:gru: recurrent units ---- */

static void pd__cpu_gru(pd_device *d, int64_t rows, int64_t width, pd_real *gates, const pd_real *recurrent,
                        const pd_real *before, pd_real *after) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__TEAM(d, rows * width * 16, r, rows,
             kernels->gru_row(width, gates + r * 3 * width, recurrent + r * 3 * width,
                              before ? before + r * width : NULL, after + r * width));
}

static void pd__cpu_gru_backward(pd_device *d, int64_t rows, int64_t width, pd_real *gates, pd_real *recurrent,
                                 const pd_real *before, const pd_real *dafter, pd_real *dbefore) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    PD__TEAM(d, rows * width * 16, r, rows,
             kernels->gru_back_row(width, gates + r * 3 * width, recurrent + r * 3 * width,
                                   before ? before + r * width : NULL, dafter + r * width,
                                   dbefore ? dbefore + r * width : NULL));
}

/* ---- >>op:attention: attention ---- */

struct pd__attention_job {
    pd_attention_shape s;
    const pd_real *query, *keys, *values, *v, *a, *dy; /* a: the weights */
    pd_real *weights, *y, *dquery, *dkeys, *dvalues, *dv;
    pd_real *space;           /* what backward keeps for each row: see attention_back_row */
    int64_t longest, per_row; /* keys of a row; numbers in `space` */
};
enum { PD__ATTENTION_COLUMNS = 256 }; /* that backward goes through the keys with */

/* Row r looks at the same keys as the row before it. */
static bool pd__same_keys(const pd__attention_job *j, int64_t r) {
    const int64_t *span = j->s.spans + 3 * r;
    return r > 0 && span[0] == span[-3] && span[1] == span[-2];
}

/* Copies the shape, and returns how many pairs of a row and a key there are. */
static int64_t pd__attention_pairs(pd__attention_job *j, const pd_attention_shape *s) {
    int64_t pairs = 0;
    memset(j, 0, sizeof *j);
    j->s = *s;
    for (int64_t r = 0; r < s->rows; r++) {
        int64_t keys = s->spans[3 * r + 1] - s->spans[3 * r];
        j->longest = pd__max(j->longest, keys);
        pairs += keys;
    }
    j->per_row = j->longest + 1;
    return pairs;
}

static void pd__cpu_attention(pd_device *d, const pd_attention_shape *s, const pd_real *query, const pd_real *keys,
                              const pd_real *values, const pd_real *v, pd_real *weights, pd_real *y) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__attention_job j;
    int64_t pairs = pd__attention_pairs(&j, s);
    j.query = query, j.keys = keys, j.values = values, j.v = v, j.weights = weights, j.y = y;
    PD__TEAM(d, (pairs + s->rows) * (8 * s->width + s->value_width), r, s->rows, kernels->attention_row(&j, r));
}

/* Where rows add to the same keys, they do so one after the other: the first of them does the work of all, in some
   columns. */
static void pd__cpu_attention_backward(pd_device *d, const pd_attention_shape *s, const pd_real *query,
                                       const pd_real *keys, const pd_real *values, const pd_real *v,
                                       const pd_real *weights, const pd_real *dy, pd_real *dquery, pd_real *dkeys,
                                       pd_real *dvalues, pd_real *dv) {
    const pd__kernels *kernels = pd__cpu_kernels(d);
    pd__attention_job j;
    int64_t pairs = pd__attention_pairs(&j, s);
    j.query = query, j.keys = keys, j.values = values, j.v = v, j.a = weights, j.dy = dy;
    j.dquery = dquery, j.dkeys = dkeys, j.dvalues = dvalues, j.dv = dv;
    if (s->rows == 0) return;
    j.space = (pd_real *)pd__scratch(d, s->rows * j.per_row, sizeof(pd_real));
    if (!j.space) return;
    PD__TEAM(d, pairs * s->value_width, r, s->rows, kernels->attention_back_row(&j, r));
    if (dquery || dkeys || dv)
        PD__TEAM(d, pairs * s->width * 8, unit, s->rows * pd__ceil_div(s->width, PD__ATTENTION_COLUMNS),
                 kernels->attention_back_keys(&j, unit));
    if (dvalues)
        PD__TEAM(d, pairs * s->value_width, unit, s->rows * pd__ceil_div(s->value_width, PD__ATTENTION_COLUMNS),
                 kernels->attention_back_values(&j, unit));
}

/* ---- >>op:levels: instruction sets: the heavy operations (>>kernels.c) are compiled for several, and chosen when a
   net is made ---- */

#ifdef PADDLE_DOUBLE
#define PD__REAL_BYTES 8
#define PD__INT int64_t
#define PD__X86(function) function##_pd
#define PD__X86_TYPE(type) type##d
#else
#define PD__REAL_BYTES 4
#define PD__INT int32_t
#define PD__X86(function) function##_ps
#define PD__X86_TYPE(type) type
#endif

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 9 && !defined(__TINYC__))
#define PD__VECTORS 1 /* the compiler has them */
#define PD__INLINE inline __attribute__((always_inline))
#define PD__FORGET(pointer) __asm__("" : "+r"(pointer)) /* nothing is known of it any more */
#if defined(__clang__)
#define PD__UNROLL _Pragma("unroll")
#define PD__BEGIN_TARGET(text) PD__PRAGMA(clang attribute push(__attribute__((target(text))), apply_to = function))
#define PD__END_TARGET PD__PRAGMA(clang attribute pop)
#else
#define PD__UNROLL PD__PRAGMA(GCC unroll 16)
#define PD__BEGIN_TARGET(text) PD__PRAGMA(GCC push_options) PD__PRAGMA(GCC target(text))
#define PD__END_TARGET PD__PRAGMA(GCC pop_options)
#endif
#if defined(__x86_64__) && !defined(PADDLE_NO_AVX)
#define PD__AVX 1
#endif
typedef pd_real pd__square_row __attribute__((vector_size(16), aligned(PD__REAL_BYTES), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define PD__SHUFFLE_2(a, b, i, k) __builtin_shufflevector(a, b, i, k)
#define PD__SHUFFLE_4(a, b, i, k, m, n) __builtin_shufflevector(a, b, i, k, m, n)
#else
typedef int64_t pd__shuffle_2 __attribute__((vector_size(16)));
typedef int32_t pd__shuffle_4 __attribute__((vector_size(16)));
#define PD__SHUFFLE_2(a, b, i, k) __builtin_shuffle(a, b, __extension__(pd__shuffle_2){ i, k })
#define PD__SHUFFLE_4(a, b, i, k, m, n) __builtin_shuffle(a, b, __extension__(pd__shuffle_4){ i, k, m, n })
#endif
#else
#define PD__INLINE inline
#define PD__FORGET(pointer) ((void)0)
#define PD__UNROLL
#endif

#define PD__KERNEL_ROW(name) PD__K(pd__##name),
#define PD__JOIN_NAMES(a, b) a##b
#define PD__JOIN(a, b) PD__JOIN_NAMES(a, b)
#define PD__K(name) PD__JOIN(name, PD__LEVEL)
#define PD__TIMES_2(x) x, x
#define PD__TIMES_4(x) PD__TIMES_2(x), PD__TIMES_2(x)
#define PD__TIMES_8(x) PD__TIMES_4(x), PD__TIMES_4(x)
#define PD__TIMES_16(x) PD__TIMES_8(x), PD__TIMES_8(x)
#define PD__TIMES_1(x) x
#define PD__TIMES(n, x) PD__JOIN(PD__TIMES_, n)(x)

/* 1 / i!, for the series of e^x. */
static const double pd__factorial_inverse[] = {
    1,          1,           1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800
};

#define PD__LEVEL _scalar
#define PD__BYTES 0
#include PADDLE_FILE
#undef PD__LEVEL
#undef PD__BYTES

#if defined(PD__VECTORS)
#define PD__LEVEL _baseline
#define PD__BYTES 16
#include PADDLE_FILE
#undef PD__LEVEL
#undef PD__BYTES
#endif

#if defined(PD__AVX)
PD__BEGIN_TARGET("avx2,fma")
#define PD__LEVEL _avx2
#define PD__BYTES 32
#include PADDLE_FILE
#undef PD__LEVEL
#undef PD__BYTES
PD__END_TARGET

PD__BEGIN_TARGET("avx512f,avx2,fma")
#define PD__LEVEL _avx512
#define PD__BYTES 64
#include PADDLE_FILE
#undef PD__LEVEL
#undef PD__BYTES
PD__END_TARGET
#endif

static const struct pd__level {
    const char *name;
    const pd__kernels *kernels; /* NULL: not compiled */
} pd__levels[PD_SIMD_COUNT] = {
    { "best", NULL },
    { "scalar", &pd__kernels_scalar },
#if defined(PD__VECTORS)
    { "baseline", &pd__kernels_baseline },
#else
    { "baseline", NULL },
#endif
#if defined(PD__AVX)
    { "avx2", &pd__kernels_avx2 },
    { "avx512", &pd__kernels_avx512 },
#else
    { "avx2", NULL },     { "avx512", NULL },
#endif
};

static const char *pd__simd_name(pd_simd simd) { return pd__levels[simd].name; }

/* Does the processor have it, and does the system keep its registers? Intel 64 and IA-32 Architectures Software
   Developer's Manual, volume 1, sections 14.3 and 15.2. */
static bool pd__cpu_has(pd_simd level) {
#if defined(PD__AVX)
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX2 = 1 << 5, AVX512F = 1 << 16, YMM = 6, ZMM = 0xe6 };
    unsigned a, b, c = 0, d, kept;
    if (level >= PD_SIMD_AVX2) {
        if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (FMA | OSXSAVE)) != (FMA | OSXSAVE)) return false;
        __asm__ volatile("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2) || (kept & YMM) != YMM) return false;
        if (level == PD_SIMD_AVX512 && (!(b & AVX512F) || (kept & ZMM) != ZMM)) return false;
    }
#endif
    return pd__levels[level].kernels != NULL;
}

static pd_simd pd__best_simd(void) {
    int level = PD_SIMD_COUNT - 1;
    while (level > PD_SIMD_SCALAR && !pd__cpu_has((pd_simd)level)) level--;
    return (pd_simd)level;
}

/* The level for a net: what its options ask for, else PADDLE_SIMD in the environment, else the best. What can't be had
   is an error, not replaced: PD_SIMD_COUNT, and *asked is its name. */
static pd_simd pd__choose_simd(pd_simd wanted, const char **asked) {
    const char *text = getenv("PADDLE_SIMD");
    *asked = "an unknown level";
    if ((unsigned)wanted >= PD_SIMD_COUNT) return PD_SIMD_COUNT;
    if (wanted == PD_SIMD_BEST && text && *text) {
        *asked = text;
        while ((unsigned)wanted < PD_SIMD_COUNT && strcmp(text, pd__levels[wanted].name) != 0)
            wanted = (pd_simd)(wanted + 1);
        if (wanted == PD_SIMD_COUNT) return PD_SIMD_COUNT;
    }
    if (wanted == PD_SIMD_BEST) return pd__best_simd();
    *asked = pd__levels[wanted].name;
    return pd__cpu_has(wanted) ? wanted : PD_SIMD_COUNT;
}

/* ---- the table ---- */

/* Takes every member that `d` lacks from `from`. */
static void pd__complete_device(pd_device *d, const pd_device *from) {
    if (!d->alloc || !d->free) d->alloc = from->alloc, d->free = from->free;
    if (!d->upload) d->upload = from->upload;
    if (!d->download) d->download = from->download;
    if (!d->wait) d->wait = from->wait;
    if (!d->freeze) d->freeze = from->freeze;
#define PD__COMPLETE(name)                                                                                             \
    if (!d->name) d->name = from->name;
    PD_OPERATIONS(PD__COMPLETE)
#undef PD__COMPLETE
}

/* The bits of the operations that a device has. */
static uint64_t pd__operations_of(const pd_device *d) {
    uint64_t has = 0;
#define PD__HAS(name)                                                                                                  \
    if (d->name) has |= PD_OP(name);
    PD_OPERATIONS(PD__HAS)
#undef PD__HAS
    return has;
}

static void pd__cpu_free(const pd_allocator *allocator, pd_device *d) {
    while (pd__cpu_of(d)->kept) pd__cpu_freeze(d, pd__cpu_of(d)->kept->of, false);
    pd_free(allocator, pd__cpu_of(d)->busy);
    pd_free(allocator, pd__cpu_of(d)->scratch);
    pd_free(allocator, d->self);
    pd_free(allocator, d);
}

/* A CPU device for one net; threads 0: all; simd: one that the processor has. NULL when out of memory. */
static pd_device *pd__cpu_new(const pd_allocator *allocator, int threads, pd_simd simd) {
    pd_device *d = (pd_device *)pd_alloc(allocator, 1, sizeof *d);
    pd__cpu *cpu = d ? (pd__cpu *)pd_alloc(allocator, 1, sizeof *cpu) : NULL;
    if (!cpu) {
        pd_free(allocator, d);
        return NULL;
    }
    d->api_version = PD_API_VERSION;
    d->name = "cpu";
    d->self = d->cpu = cpu;
    d->host_memory = true;
    d->alloc = pd__cpu_alloc;
    d->free = pd__cpu_free_memory;
    d->upload = d->download = pd__cpu_copy;
    d->wait = pd__cpu_wait;
    d->freeze = pd__cpu_freeze;
#define PD__CPU_OPERATION(name) d->name = pd__cpu_##name;
    PD_OPERATIONS(PD__CPU_OPERATION)
#undef PD__CPU_OPERATION
    cpu->allocator = allocator;
    cpu->simd = simd;
    cpu->kernels = pd__levels[simd].kernels;
#if defined(_OPENMP)
    if (threads == 0) threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    cpu->pace.threads = cpu->pace.team = threads;
    if (threads > 1) cpu->busy = (pd__busy *)pd_alloc(allocator, threads, sizeof *cpu->busy);
    if (threads > 1 && !cpu->busy) {
        pd__cpu_free(allocator, d);
        return NULL;
    }
    return d;
}

/* ======================================================================================================== */
/* >>layer_types.c                                                                                         */
/* Names stand in files and messages: 1 to 200 printable characters, neither quotes nor backslashes. */
static bool pd__name_ok(const char *name) {
    size_t n = strlen(name);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 32 || name[i] == '"' || name[i] == '\\' || name[i] == 127) return false;
    return n >= 1 && n <= 200;
}

/* "fc1", "fc2", ..: the type's name and the first number that makes a name not used yet. */
static char *pd__default_name(pd_net *net, const pd_layer_type *type) {
    char name[256];
    int number = 1;
    for (int64_t i = 0; i < net->layer_count; i++) number += net->layers[i]->type == type;
    do snprintf(name, sizeof name, "%.200s%d", type->name, number++);
    while (pd_layer_find(net, name));
    return pd__copy_text(&net->allocator, name);
}

/* mixed: inputs with and without sequences will be brought together by a group. */
static pd_status pd__check_layer(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                                 int count, bool mixed) {
    const char *who = name ? name : type && type->name ? type->name : "layer";
    if (!type || !type->name || !type->setup || !type->forward)
        return pd__fail_build(net, PD_E_ARGUMENT, "%s: its type lacks a name, setup or forward", who);
    if (type->api_version != PD_API_VERSION)
        return pd__fail_build(net, PD_E_ARGUMENT, "%s: layer type \"%s\" has interface version %d, expected %d", who,
                              type->name, type->api_version, PD_API_VERSION);
    if (name && !pd__name_ok(name))
        return pd__fail_build(net, PD_E_ARGUMENT,
                              "%s: a name has 1 to 200 characters, no quotes, backslashes or control characters", who);
    if (name && pd_layer_find(net, name))
        return pd__fail_build(net, PD_E_ARGUMENT, "%s: the name is already used by another layer (%s)", who,
                              pd_layer_find(net, name)->type->name);
    if (count < type->min_inputs || (type->max_inputs >= 0 && count > type->max_inputs))
        return pd__fail_build(net, PD_E_ARGUMENT, "%s: %d inputs, but %s takes %s%d", who, count, type->name,
                              type->max_inputs == type->min_inputs ? "" : "at least ", type->min_inputs);
    for (int i = 0; i < count; i++) {
        if (!inputs || !inputs[i]) return pd__fail_build(net, PD_E_ARGUMENT, "%s: input %d is NULL", who, i);
        if (inputs[i]->net != net)
            return pd__fail_build(net, PD_E_ARGUMENT, "%s: input %d, \"%s\", belongs to another net", who, i,
                                  inputs[i]->name);
        if (inputs[i]->is_sparse && !type->prefetch)
            return pd__fail_build(net, PD_E_SHAPE, "%s: %s takes no sparse input such as \"%.100s\"; pd_fc does", who,
                                  type->name, inputs[i]->name);
        if (inputs[i]->is_sequence != inputs[0]->is_sequence && !type->resize && !mixed)
            return pd__fail_build(net, PD_E_SHAPE, "%s: input \"%.100s\" %s, but \"%.100s\" %s", who, inputs[i]->name,
                                  pd__rows_of[inputs[i]->is_sequence], inputs[0]->name,
                                  pd__rows_of[inputs[0]->is_sequence]);
    }
    return PD_OK;
}

/* Gives the net a layer that still has to be set up. NULL when out of memory. */
static pd_layer *pd__new_layer(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                               int count, const void *opts) {
    const pd_allocator *a = &net->allocator;
    pd_layer *l;
    if (!pd_grow(a, (void **)&net->layers, &net->layer_capacity, net->layer_count + 1, sizeof *net->layers))
        return NULL;
    l = (pd_layer *)pd_alloc(a, 1, sizeof *l);
    if (!l) return NULL;
    l->type = type;
    l->net = net;
    l->name = name ? pd__copy_text(a, name) : pd__default_name(net, type);
    l->own = (struct pd__layer *)pd_alloc(a, 1, sizeof *l->own);
    l->inputs = (pd_layer **)pd_alloc(a, count, sizeof *l->inputs);
    l->opts = pd_alloc(a, (int64_t)type->opts_size, 1);
    if (l->name && l->own && l->inputs && l->opts) l->state = pd_alloc(a, (int64_t)type->state_size, 1);
    if (!l->state) {
        pd__layer_free(l);
        return NULL;
    }
    l->own->index = (int)net->layer_count;
    l->own->slot = -1;
    if (opts && type->opts_size) memcpy(l->opts, opts, type->opts_size);
    for (int i = 0; i < count; i++) l->inputs[i] = inputs[i];
    l->input_count = count;
    l->is_sequence = count > 0 && inputs[0]->is_sequence;
    net->layers[net->layer_count++] = l;
    return l;
}

/* Where a layer, which is set up, runs. With host memory the device has everything. */
static pd_device *pd__device_for(const pd_layer *l) {
    pd_device *d = l->net->device;
    bool able = l->type->needs != 0 && (l->type->needs & ~pd__operations_of(d)) == 0;
    bool refused = l->input_count > 0 && d->accepts && !d->accepts(d, l);
    return (d->host_memory || able) && !refused ? d : l->net->cpu;
}

/* Does the layer run on the CPU, and its numbers are not there? */
static bool pd__is_carried(const pd_layer *l) { return !l->net->device->host_memory && l->device != l->net->device; }

/* Something that learns is at or below the layer, and it can pass the gradient on. */
static bool pd__layer_learns(const pd_layer *l) {
    if (l->own->wants_input_grad || (l->own->fed && l->own->fed->wants_grad)) return true;
    if (!l->type->backward) return false;
    for (int i = 0; i < l->input_count; i++)
        if (l->inputs[i]->wants_grad) return true;
    for (int i = 0; i < l->param_count; i++)
        if (!l->params[i]->opts.is_static) return true;
    return false;
}

/* Of all layers, since inputs and groups may change it. A memory learns if what feeds it, which comes later, does. */
static void pd__find_learners(pd_net *net) {
    for (bool more = true; more;) {
        more = false;
        for (int64_t i = 0; i < net->layer_count; i++) {
            bool learns = pd__layer_learns(net->layers[i]);
            more = more || learns != net->layers[i]->wants_grad;
            net->layers[i]->wants_grad = learns;
        }
    }
}

#define PD__ROW_MAX (INT64_MAX / 64) /* numbers in a row */

/* The numbers in a row of this shape; false when they can't be counted. */
static bool pd__row_size(pd_shape s, int64_t *size) {
    return pd__multiply_sizes(s.channels, s.height, size) && pd__multiply_sizes(*size, s.width, size);
}

/* Makes the number of what setup has left as the activation's alpha. */
static pd_status pd__take_alpha(pd_layer *l) {
    bool slope = l->act == PD_LEAKY_RELU, bound = l->act == PD_BRELU;
    double alpha = pd__or(l->act_alpha, slope ? 0.01 : bound ? 24 : 0);
    if (!slope && !bound && l->act_alpha != 0)
        return pd_layer_fail(l, PD_E_ARGUMENT, "alpha is %g, but %s has none", alpha, pd__act_names[l->act]);
    if (!(alpha >= 0 && pd__finite((double)(pd_real)alpha)) || (bound && alpha == 0)) /* a slope < 0: see below */
        return pd_layer_fail(l, PD_E_ARGUMENT, "alpha is %g, expected a finite number %s 0", alpha,
                             bound ? "above" : "of at least");
    if (slope && (pd_real)alpha == 0) l->act = PD_RELU; /* the derivative is told from the output's sign */
    l->act_alpha = alpha;
    return PD_OK;
}

/* What setup must have left behind. */
static pd_status pd__check_setup(pd_layer *l) {
    int64_t width;
    if (l->shape.channels < 1 || l->shape.height < 1 || l->shape.width < 1)
        return pd_layer_fail(l, PD_E_SHAPE, "output would have the empty shape %s", pd_shape_text(l, l->shape));
    if (!pd__row_size(l->shape, &width) || (!l->is_ids && width > PD__ROW_MAX)) /* ids may be any number */
        return pd_layer_fail(l, PD_E_SHAPE, "output %s is too large", pd_shape_text(l, l->shape));
    if ((unsigned)l->act >= PD_ACT_COUNT) return pd_layer_fail(l, PD_E_ARGUMENT, "unknown activation %d", (int)l->act);
    if (l->act != PD_LINEAR && l->is_ids) return pd_layer_fail(l, PD_E_ARGUMENT, "ids take no activation");
    l->out.width = width;
    return pd__take_alpha(l);
}

/* pd_layer_add; `origin` is the layer's twin if the net is becoming a shared one, else NULL. */
static pd_layer *pd__add_layer(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                               int count, const void *opts, pd_layer *origin) {
    pd_layer *l;
    pd_status status;
    pd_failure earlier; /* of some other call: success here doesn't forget it */
    if (!pd__check_net(net) || pd__check_layer(net, type, name, inputs, count, false) != PD_OK) return NULL;
    earlier = net->failure;
    l = pd__new_layer(net, type, name, inputs, count, opts);
    if (!l) {
        pd__fail_build(net, PD_E_MEMORY, "%s: out of memory for the layer", name ? name : type->name);
        return NULL;
    }
    l->own->origin = origin;
    net->failure.status = PD_OK;
    status = type->setup(l);
    if (status == PD_OK) status = pd__check_setup(l);
    if (status != PD_OK) {
        if (net->failure.status == PD_OK) pd_layer_fail(l, status, "%s", pd_status_text(status));
        net->broken = true;
        return NULL;
    }
    net->failure = earlier;
    l->device = pd__device_for(l);
    l->wants_grad = pd__layer_learns(l);
    return l;
}

PD_DEF pd_layer *pd_layer_add(pd_net *net, const pd_layer_type *type, const char *name, pd_layer *const *inputs,
                              int count, const void *opts) {
    if (net && net->origin) {
        pd__fail_build(net, PD_E_STATE, "%.100s: a shared net takes no more layers", name ? name : "layer");
        return NULL;
    }
    if (net && net->open_group && count > 0 && inputs)
        return pd__add_to_group(net->open_group, type, name, inputs, count, opts);
    for (int k = 0; net && inputs && k < count; k++)
        if (inputs[k] && inputs[k]->own->loop) {
            pd__fail_build(net, PD_E_ARGUMENT,
                           "%.100s: \"%.100s\" runs step by step in group \"%.100s\"; pd_group_output has its rows",
                           name ? name : type->name, inputs[k]->name, inputs[k]->own->loop->name);
            return NULL;
        }
    return pd__add_layer(net, type, name, inputs, count, opts, NULL);
}

PD_DEF pd_status pd_layer_fail(pd_layer *layer, pd_status status, const char *format, ...) {
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return pd__fail(layer->net, status, "%.100s: %s", layer->name, text);
}

PD_DEF const char *pd_shape_text(pd_layer *layer, pd_shape shape) {
    pd_net *net = layer->net;
    char *text = net->texts[net->text_turn = (net->text_turn + 1) % PD__COUNT(net->texts)];
    if (shape.height == 1 && shape.width == 1) snprintf(text, sizeof net->texts[0], "%lld", (long long)shape.channels);
    else
        snprintf(text, sizeof net->texts[0], "%lldx%lldx%lld", (long long)shape.channels, (long long)shape.height,
                 (long long)shape.width);
    return text;
}

PD_DEF pd_mode pd_layer_mode(const pd_layer *layer) { return layer->net->mode; }

PD_DEF uint64_t pd_layer_key(const pd_layer *layer) {
    const pd_group *g = layer->own->loop;
    uint64_t key = pd__subkey(pd__subkey(layer->net->seed, (uint64_t)layer->own->index), layer->net->step);
    return g && g->step >= 0 ? pd__subkey(key, (uint64_t)g->step) : key;
}

/* A layer type's mistake else. */
static bool pd__slot_exists(pd_layer *layer, int slot, int slots) {
    if (slot >= 0 && slot < slots) return true;
    pd_layer_fail(layer, PD_E_ARGUMENT, "memory slot %d is not one of 0 .. %d", slot, slots - 1);
    return false;
}

/* `count` numbers in a slot: `per_row` for each row, or, if that is 0, for something else. */
static pd_real *pd__slot_memory(pd_layer *layer, int slot, int64_t count, int64_t per_row) {
    pd__memory *m = layer->own->memory;
    if (!layer->device || !pd__slot_exists(layer, slot, PD__COUNT(layer->own->memory))) return NULL;
    m += slot;
    if (m->data && m->per_row != per_row) {
        pd_layer_fail(layer, PD_E_ARGUMENT, "memory slot %d is in use for %lld numbers per row", slot,
                      (long long)m->per_row);
        return NULL;
    }
    if (!pd_device_grow(layer->device, &m->data, &m->capacity, count)) {
        pd_layer_fail(layer, PD_E_MEMORY, "out of memory for %lld numbers", (long long)count);
        return NULL;
    }
    m->per_row = per_row;
    return m->data;
}

PD_DEF pd_real *pd_layer_row_memory(pd_layer *layer, int slot, int64_t per_row) {
    const pd__order *order = pd__step_order(layer); /* in a loop: of the memory for all steps, that of one */
    int64_t count;
    if (per_row < 1) pd_layer_fail(layer, PD_E_ARGUMENT, "memory for %lld numbers per row", (long long)per_row);
    else if (!pd__multiply_sizes(order ? order->rows : layer->out.rows, per_row, &count))
        pd_layer_fail(layer, PD_E_MEMORY, "out of memory for %lld rows of %lld numbers", (long long)layer->out.rows,
                      (long long)per_row);
    else {
        pd_real *memory = pd__slot_memory(layer, slot, count, per_row);
        return memory ? memory + pd__first_row(layer) * per_row : NULL;
    }
    return NULL;
}

PD_DEF pd_real *pd_layer_memory(pd_layer *layer, int slot, int64_t count) {
    return pd__slot_memory(layer, slot, count, 0);
}

/* The same in host memory, of `count` things of `size` bytes. */
static void *pd__host_memory(pd_layer *layer, void **memory, int64_t *capacity, int64_t count, size_t size) {
    if (pd_grow(&layer->net->allocator, memory, capacity, pd__max(count, 1), size)) return *memory;
    pd_layer_fail(layer, PD_E_MEMORY, "out of memory for %lld numbers", (long long)count);
    return NULL;
}

PD_DEF int64_t *pd_layer_integers(pd_layer *layer, int slot, int64_t count) {
    struct pd__layer *own = layer->own;
    if (!pd__slot_exists(layer, slot, PD__COUNT(own->integers))) return NULL;
    return (int64_t *)pd__host_memory(layer, (void **)&own->integers[slot], &own->integer_capacity[slot], count,
                                      sizeof(int64_t));
}

PD_DEF double *pd_layer_doubles(pd_layer *layer, int slot, int64_t count) {
    struct pd__layer *own = layer->own;
    if (!pd__slot_exists(layer, slot, PD__COUNT(own->doubles))) return NULL;
    return (double *)pd__host_memory(layer, (void **)&own->doubles[slot], &own->double_capacity[slot], count,
                                     sizeof(double));
}

PD_DEF pd_real *pd_layer_values(pd_layer *layer, int64_t count) {
    struct pd__layer *own = layer->own;
    return (pd_real *)pd__host_memory(layer, (void **)&own->values, &own->value_capacity, count, sizeof(pd_real));
}

PD_DEF void *pd_layer_copy(pd_layer *layer, const void *bytes, size_t size) {
    pd__copy *c = size <= (size_t)PTRDIFF_MAX - sizeof(pd__copy)
                      ? (pd__copy *)pd_alloc(&layer->net->allocator, (int64_t)(size + sizeof(pd__copy)), 1)
                      : NULL;
    if (!c) {
        pd_layer_fail(layer, PD_E_MEMORY, "out of memory");
        return NULL;
    }
    c->next = layer->own->copies;
    layer->own->copies = c;
    memcpy(c + 1, bytes, size);
    return c + 1;
}

/* ======================================================================================================== */
/* >>updater.c: steps on parameters, and the local updater                                                 */
/* ---- one step on one parameter ---- */

/* NULL when it isn't trained here. With several trainers of one net p->trained is the place in the newest one. */
static pd__trained *pd__trained_of(const pd_trainer *t, const pd_param *p) {
    if (p->trained > 0 && p->trained <= t->trained_count && t->trained[p->trained - 1].param == p)
        return &t->trained[p->trained - 1];
    for (int i = 0; i < t->trained_count; i++)
        if (t->trained[i].param == p) return &t->trained[i];
    return NULL;
}

static double pd__rate(const pd_trainer *t) {
    return t->optimizer.rate * pd_schedule_factor(&t->opts.schedule, (double)t->samples);
}

/* What the summed gradient is multiplied with; 0 for an empty batch. */
static double pd__gradient_scale(const pd_trainer *t, int64_t samples) {
    return t->opts.sum_gradients ? 1 : samples > 0 ? 1 / (double)samples : 0;
}

static pd_update pd__update_of(const pd_trainer *t, const pd__trained *tr, double scale) {
    const pd_param_opts *o = &tr->param->opts;
    pd_update u;
    u.optimizer = t->optimizer;
    u.rate = pd__rate(t) * pd__or(o->rate_factor, 1);
    u.scale = scale;
    u.clip = pd__or(o->clip, t->opts.clip_value);
    u.l1 = pd__or(o->l1, t->opts.l1);
    u.l2 = pd__or(o->l2, t->opts.l2);
    u.step = tr->step;
    return u;
}

/* The layer that a parameter is first used by, for messages. */
static const char *pd__layer_of(const pd_param *p) {
    for (int64_t i = 0; i < p->net->layer_count; i++)
        for (int k = 0; k < p->net->layers[i]->param_count; k++)
            if (p->net->layers[i]->params[k] == p) return p->net->layers[i]->name;
    return "?";
}

PD_DEF void pd_param_shard(const pd_param *param, int rank, int ranks, int64_t *first, int64_t *count) {
    int64_t each = param->size / ranks, more = param->size % ranks;
    *first = param->touched ? 0 : each * rank + pd__min(rank, more);
    *count = param->touched ? 0 : each + (rank < more);
}

/* Rows of a sparse parameter in this trainer's shard. */
static int64_t pd__shard_rows(const pd_trainer *t, const pd_param *p) {
    return (p->dims[0] - t->rank + t->ranks - 1) / t->ranks;
}

/* Numbers of a parameter in this trainer's shard: what is kept for each by the optimizer. */
static int64_t pd__shard_size(const pd_trainer *t, const pd_param *p) {
    int64_t first, count;
    if (p->touched) return pd__shard_rows(t, p) * p->dims[1];
    pd_param_shard(p, t->rank, t->ranks, &first, &count);
    return count;
}

PD_DEF pd_param *pd_trainer_param(const pd_trainer *trainer, int index) {
    return trainer && index >= 0 && index < trainer->trained_count ? trainer->trained[index].param : NULL;
}

PD_DEF int pd_trainer_index(const pd_trainer *trainer, const pd_param *param) {
    const pd__trained *trained = pd__trained_of(trainer, param);
    return trained ? (int)(trained - trainer->trained) : -1;
}

PD_DEF const pd_optimizer *pd_trainer_optimizer(const pd_trainer *trainer) { return &trainer->optimizer; }
PD_DEF const pd_trainer_opts *pd_trainer_options(const pd_trainer *trainer) { return &trainer->opts; }

static pd_status pd__check_finite(pd_trainer *t, const pd_param *p, int64_t n, const pd_real *grad) {
    pd_device *d = t->net->device;
    if (pd__finite(d->norm(d, n, grad))) return PD_OK;
    return pd_trainer_fail(t, PD_E_NUMERIC,
                           "%.100s: the gradient of parameter \"%.100s\" is not finite in batch %lld of pass %lld",
                           pd__layer_of(p), p->name, (long long)t->pass_batches, (long long)t->pass);
}

/* Counts a parameter's update, once per step of the trainer. Was it the first in this one? */
static bool pd__count_update(pd_trainer *t, pd__trained *tr) {
    bool first = tr->stepped != t->attempt;
    tr->step += first;
    tr->stepped = t->attempt;
    return first;
}

PD_DEF pd_status pd_trainer_apply(pd_trainer *trainer, pd_param *param, int64_t samples, double clip_scale) {
    pd_device *d = trainer->net->device;
    pd__trained *tr = pd__trained_of(trainer, param);
    pd_update u;
    int64_t first, count;
    pd_status status;
    if (!tr || !param->grad) return PD_OK; /* part of the net, but not of this training */
    if (param->touched) {
        status =
            pd_trainer_apply_rows(trainer, param, param->rows.count, param->rows.ids, param->grad, samples, clip_scale);
    } else {
        pd_param_shard(param, trainer->rank, trainer->ranks, &first, &count);
        status = pd__check_finite(trainer, param, count, param->grad + first);
        if (status == PD_OK) {
            pd__count_update(trainer, tr);
            u = pd__update_of(trainer, tr, pd__gradient_scale(trainer, samples) * clip_scale);
            d->update(d, &u, count, param->value + first, param->grad + first, param->mask ? param->mask + first : NULL,
                      tr->states);
        }
    }
    if (status == PD_OK) pd__zero_grad(param);
    return status;
}

/* ---- sparse parameters ----
   A row that no gradient reaches still moves, by its momentum and its l2. Such a step is the same linear map for every
   number, (w, state) -> M (w, state) with M of 2 x 2, and so are several in turn. So rows are left behind: whoever
   reads one gets a copy, multiplied with the product of the matrices that the row has missed, and what is stored is
   made up for when the row gets a gradient. Reading changes nothing, so the bits are the same however often it is
   done. This is the dense method to the last rounding, with any schedule. (The sparse momentum of the 2016 platform
   did it with three running scalars, which had to be restarted before they overflowed.)

   The last steps' matrices are the leaves of a binary tree, in a ring: a node has the product of its block of 2^k
   steps, which begins at a multiple of 2^k. A row that has missed n steps costs at most 2 log2(n) products of 2 x 2,
   of 8 multiplications each, and a step one (on average) to keep the tree. Which blocks make up the steps from one to
   another follows from these two alone, and so do the bits. No row is ever further behind than the tree reaches: each
   step brings the next few rows of the table up to date, in turn, whoever reads them. The tree reaches as many steps
   as a quarter of the table has rows, but PD__STEPS_LEAST at least and PD__STEPS_MOST at most, which is 16 MB. So that
   is 4 rows in a step up to a table of a million rows, and 381 at 100 million. A tree grows to its size as steps
   come. */

#ifndef PD__STEPS_MOST
#define PD__STEPS_MOST 262144 /* powers of two */
#define PD__STEPS_LEAST 1024
#endif
enum { PD__CHUNK_ROWS = 512 };

typedef struct pd__lazy {
    uint32_t *times;       /* for each row of the shard: the step that it is stored as of, modulo 2^32 */
    int64_t count;         /* rows of the shard */
    int64_t settled;       /* the step that all rows are stored as of, if it is the last one */
    int64_t window;        /* steps that a row may miss, a power of two */
    int64_t room;          /* .. that the tree has room for now, likewise */
    double (*products)[4]; /* 2 room: node 1 is the root, 2 i and 2 i + 1 are the earlier and the later half of i */
} pd__lazy;

/* Arguments of the device's update_rows and gather_rows. */
typedef struct pd__chunk {
    int64_t rows[PD__CHUNK_ROWS], state_rows[PD__CHUNK_ROWS];
    double carry[PD__CHUNK_ROWS][4];
} pd__chunk;

/* One compiled copy of what must have the same bits wherever it is called. */
#if defined(__GNUC__)
#define PD__ONE_COPY __attribute__((noinline))
#else
#define PD__ONE_COPY
#endif

/* to = later earlier; `to` may be one of them. */
static void pd__multiply_steps(const double *later, const double *earlier, double *to) {
    double a = earlier[0], b = earlier[1], c = earlier[2], d = earlier[3], l0 = later[0], l1 = later[1], l2 = later[2],
           l3 = later[3];
    to[0] = l0 * a + l1 * c;
    to[1] = l0 * b + l1 * d;
    to[2] = l2 * a + l3 * c;
    to[3] = l2 * b + l3 * d;
}

/* Puts the matrix of a step, counted from 1, into the tree, and the products of the blocks that end with it. */
PD__ONE_COPY static void pd__put_step(pd__lazy *lazy, int64_t step, const double *matrix) {
    int64_t at = lazy->room + (step - 1) % lazy->room;
    memcpy(lazy->products[at], matrix, sizeof lazy->products[at]);
    for (int64_t end = step; end % 2 == 0 && at > 1; end /= 2) {
        at /= 2;
        pd__multiply_steps(lazy->products[2 * at + 1], lazy->products[2 * at], lazy->products[at]);
    }
}

/* The product of the steps after `from`, up to `to`, which are at most as many as there is room for. */
PD__ONE_COPY static void pd__steps_between(const pd__lazy *lazy, int64_t from, int64_t to, double *product) {
    product[0] = product[3] = 1;
    product[1] = product[2] = 0;
    while (from < to) {
        int64_t size = 1, at = lazy->room + (from & (lazy->room - 1));
        for (; (from & size) == 0 && from + 2 * size <= to; size *= 2) at >>= 1;
        pd__multiply_steps(lazy->products[at], product, product);
        from += size;
    }
}

/* Makes room for all that may be needed after so many steps, of which `had` have been put; false when out of memory. */
static bool pd__ready_steps(const pd_allocator *a, pd__lazy *lazy, int64_t had, int64_t steps) {
    pd__lazy bigger = *lazy;
    while (bigger.room < bigger.window && bigger.room < steps) bigger.room *= 2;
    if (lazy->products && bigger.room == lazy->room) return true;
    bigger.products = (double(*)[4])pd_alloc(a, 2 * bigger.room, sizeof *bigger.products);
    if (!bigger.products) return false;
    for (int64_t step = pd__max(had - lazy->room, 0) + 1; lazy->products && step <= had; step++)
        pd__put_step(&bigger, step, lazy->products[lazy->room + (step - 1) % lazy->room]);
    pd_free(a, lazy->products);
    *lazy = bigger;
    return true;
}

static pd_status pd__lazy_new(pd_trainer *t, pd__trained *tr) {
    const pd_allocator *a = &t->net->allocator;
    const pd_update u = pd__update_of(t, tr, 1);
    pd__lazy *lazy;
    if (t->optimizer.kind == PD_OPT_SGD && u.l2 == 0) return PD_OK; /* a row without a gradient stays as it is */
    tr->lazy = lazy = (pd__lazy *)pd_alloc(a, 1, sizeof *lazy);
    if (lazy) {
        lazy->count = pd__shard_rows(t, tr->param);
        lazy->room = lazy->window = PD__STEPS_LEAST;
        while (lazy->window < PD__STEPS_MOST && 4 * lazy->window < lazy->count) lazy->window *= 2;
        lazy->times = (uint32_t *)pd_alloc(a, lazy->count, sizeof *lazy->times);
    }
    if (!lazy || !lazy->times || !pd__ready_steps(a, lazy, 0, 1)) return pd__no_memory(t->net, "sparse parameters");
    return PD_OK;
}

static void pd__lazy_free(const pd_allocator *a, pd__lazy *lazy) {
    if (!lazy) return;
    pd_free(a, lazy->times);
    pd_free(a, lazy->products);
    pd_free(a, lazy);
}

/* What a step does to numbers without a gradient. */
static void pd__step_matrix(const pd_update *u, double *matrix) {
    double m = u->optimizer.kind == PD_OPT_MOMENTUM ? u->optimizer.momentum : 0, decay = u->rate * u->l2;
    double next =
        u->optimizer.nesterov ? m : 1; /* w += next (m state - decay w), minus decay w once more if nesterov */
    matrix[0] = 1 - next * decay - (u->optimizer.nesterov ? decay : 0);
    matrix[1] = next * m;
    matrix[2] = -decay;
    matrix[3] = m;
}

/* Steps that a row of the shard has missed, of the first `step`. None, if it has had a later one. */
static int64_t pd__behind(const pd__lazy *lazy, int64_t step, int64_t local) {
    uint32_t behind = (uint32_t)step - lazy->times[local];
    return behind <= lazy->window ? behind : 0;
}

enum { PD__MISS_AT_ONCE = 32 };

/* For some entries of a chunk, of which the rows are known: the state's row, and what the row has missed. Neighbours
   often have missed the same. */
static void pd__miss_some(const pd_trainer *t, const pd__lazy *lazy, int64_t step, pd__chunk *c, int64_t i,
                          int64_t end) {
    int64_t last = -1;
    end = pd__min(i + PD__MISS_AT_ONCE, end);
    for (int64_t k = i; lazy && k < end; k++) PD__PREFETCH(lazy->times + c->rows[k] / t->ranks);
    for (; i < end; i++) {
        int64_t local = c->rows[i] / t->ranks, behind = 0;
        if (c->rows[i] % t->ranks != t->rank) local = 0; /* another's: as it is */
        else if (lazy) behind = pd__behind(lazy, step, local);
        c->state_rows[i] = local;
        if (behind == last) memcpy(c->carry[i], c->carry[i - 1], sizeof c->carry[i]);
        else if (lazy) pd__steps_between(lazy, step - behind, step, c->carry[i]);
        last = behind;
    }
}

/* The same for n entries; `net` has the threads. */
static void pd__miss(const pd_net *net, const pd_trainer *t, const pd__lazy *lazy, int64_t step, pd__chunk *c,
                     int64_t n) {
    if (net->cpu) {
        PD__TEAM_STEPS(net->cpu, lazy ? n * 256 : 0, i, n, PD__MISS_AT_ONCE, pd__miss_some(t, lazy, step, c, i, n));
    } else {
        for (int64_t i = 0; i < n; i += PD__MISS_AT_ONCE) pd__miss_some(t, lazy, step, c, i, n);
    }
}

/* Brings rows first, first + 1, .. of the shard up to date in `table`, and their state. */
static void pd__catch_up(pd_trainer *t, pd__trained *tr, pd_real *table, int64_t first, int64_t count) {
    pd_device *d = t->net->device;
    pd__lazy *lazy = tr->lazy;
    const pd_update u = pd__update_of(t, tr, 1);
    int64_t n = 0;
    pd__chunk c;
    for (int64_t local = first; local < first + count; local++) {
        if (pd__behind(lazy, tr->step, local) > 0) c.rows[n++] = local * t->ranks + t->rank;
        if (n < PD__CHUNK_ROWS && (n == 0 || local + 1 < first + count)) continue;
        pd__miss(t->net, t, lazy, tr->step, &c, n);
        for (int64_t i = 0; i < n; i++) lazy->times[c.state_rows[i]] = (uint32_t)tr->step;
        d->update_rows(d, &u, n, tr->param->dims[1], c.rows, c.state_rows, c.carry[0], table, NULL, tr->states[0]);
        n = 0;
    }
}

/* Has it left steps for later? */
static bool pd__lags(const pd__trained *tr) { return tr->lazy && tr->lazy->settled != tr->step; }

/* Where the last values of a parameter are: in the net, unless that has gone back to the best. */
static pd_real *pd__last_values(const pd_trainer *t, const pd_param *p) {
    int i = 0;
    for (const pd_param *q = t->net->first_param; t->went_back && q && q != p; q = q->next) i++;
    return t->went_back && i < t->best_count ? t->best[i] : p->value;
}

/* Makes all steps that were left for later: other values are to come, or another trainer. */
static void pd__catch_up_all(pd_trainer *t) {
    for (int i = 0; i < t->trained_count; i++) {
        pd__trained *tr = &t->trained[i];
        if (!pd__lags(tr)) continue;
        pd__catch_up(t, tr, pd__last_values(t, tr->param), 0, tr->lazy->count);
        tr->lazy->settled = tr->step;
    }
}

/* What other trainers have left for later, when this one changes the values. */
static void pd__catch_up_others(const pd_trainer *t) {
    for (pd_trainer *other = t->net->trainers; other; other = other->next)
        if (other != t) pd__catch_up_all(other);
}

/* Copies rows of `table` to `to`, on the device of `net`, with the steps that trainer t (may be NULL) has left for
   later. Those listed, or, if `rows` is NULL, first, first + 1, .. */
static void pd__read_rows(const pd_net *net, const pd_trainer *t, const pd_param *p, const pd_real *table,
                          int64_t first, int64_t count, const int64_t *rows, pd_real *to) {
    pd_device *d = net->device;
    const pd__trained *tr = t ? pd__trained_of(t, p) : NULL;
    const pd__lazy *lazy = tr && pd__lags(tr) && tr->lazy->count > 0 ? tr->lazy : NULL;
    pd__chunk c;
    for (int64_t at = 0; at < count; at += PD__CHUNK_ROWS) {
        int64_t n = pd__min(PD__CHUNK_ROWS, count - at);
        for (int64_t i = 0; i < n; i++) c.rows[i] = rows ? rows[at + i] : first + at + i;
        if (lazy) pd__miss(net, t, lazy, tr->step, &c, n);
        d->gather_rows(d, n, p->dims[1], c.rows, c.state_rows, lazy ? c.carry[0] : NULL, table,
                       lazy ? tr->states[0] : NULL, to + at * p->dims[1]);
    }
}

/* The trainer that has left steps on the net's values of p for later, or NULL: no two have at a time. */
static const pd_trainer *pd__lagging(const pd_param *p) {
    p = pd__origin_of(p);
    for (pd_trainer *t = p->net->trainers; t && !p->touched->plain; t = t->next) {
        const pd__trained *tr = pd__trained_of(t, p);
        if (tr && !t->went_back && pd__lags(tr)) return t;
    }
    return NULL;
}

static void pd__read_current(pd_net *net, const pd_param *p, int64_t count, const int64_t *rows, pd_real *to) {
    pd__read_rows(net, pd__lagging(p), pd__origin_of(p), p->value, 0, count, rows, to);
}

PD_DEF pd_status pd_trainer_read_rows(pd_trainer *trainer, pd_param *param, int64_t count, const int64_t *rows,
                                      pd_real *to) {
    pd__read_rows(trainer->net, trainer, param, param->value, 0, count, rows, to);
    return PD_OK;
}

/* Rows that are copied at a time when all are wanted. */
static int64_t pd__rows_at_once(const pd_param *p) {
    return pd__max(1, pd__min(p->dims[0], PD__CHUNK_ROWS * 128 / p->dims[1]));
}

static pd_status pd__download_table(pd_net *net, const pd_param *p, pd_real *values) {
    const pd_trainer *t = pd__lagging(p);
    const pd_param *of = pd__origin_of(p);
    pd_device *d = net->device;
    int64_t width = p->dims[1], each = pd__rows_at_once(p), capacity = 0;
    pd_real *rows = NULL;
    pd_status status = PD_OK;
    if (!t) return pd__download(net, values, p->value, p->size);
    if (!pd__grow_numbers(net, &rows, &capacity, each * width)) return pd__no_memory(net, "a table's rows");
    for (int64_t first = 0; status == PD_OK && first < p->dims[0]; first += each) {
        int64_t n = pd__min(each, p->dims[0] - first);
        pd__read_rows(net, t, of, of->value, first, n, NULL, rows);
        status = pd__download(net, values + first * width, rows, n * width);
    }
    d->free(d, rows);
    return status;
}

static bool pd__updater_fills(const pd_net *net, const pd_param *p) {
    return net->stepping && pd__trained_of(net->stepping, p);
}

PD_DEF pd_status pd_trainer_apply_rows(pd_trainer *trainer, pd_param *param, int64_t count, const int64_t *rows,
                                       const pd_real *grad, int64_t samples, double clip_scale) {
    pd_device *d = trainer->net->device;
    pd__trained *tr = pd__trained_of(trainer, param);
    pd__lazy *lazy = tr ? tr->lazy : NULL;
    pd_update u;
    pd__chunk c;
    int64_t width = param->dims[1];
    double matrix[4];
    bool first_step;
    pd_status status;
    if (!tr || !param->touched) return PD_OK;
    status = pd__check_finite(trainer, param, count * width, grad);
    if (status == PD_OK && lazy && !pd__ready_steps(&trainer->net->allocator, lazy, tr->step, tr->step + 1))
        status = pd__no_memory(trainer->net, "sparse parameters");
    if (status != PD_OK) return status;
    first_step = pd__count_update(trainer, tr);
    u = pd__update_of(trainer, tr, pd__gradient_scale(trainer, samples) * clip_scale);
    for (int64_t first = 0; first < count; first += PD__CHUNK_ROWS) {
        int64_t n = pd__min(PD__CHUNK_ROWS, count - first);
        memcpy(c.rows, rows + first, (size_t)n * sizeof *rows);
        pd__miss(trainer->net, trainer, lazy, tr->step - 1, &c, n);
        for (int64_t i = 0; lazy && i < n; i++) lazy->times[c.state_rows[i]] = (uint32_t)tr->step;
        d->update_rows(d, &u, n, width, c.rows, c.state_rows, lazy ? c.carry[0] : NULL, param->value,
                       grad + first * width, tr->states[0]);
    }
    if (lazy && first_step) { /* the rows whose turn it is */
        int64_t turn = tr->step % lazy->window, from = turn * lazy->count / lazy->window;
        pd__step_matrix(&u, matrix);
        pd__put_step(lazy, tr->step, matrix);
        pd__catch_up(trainer, tr, param->value, from, (turn + 1) * lazy->count / lazy->window - from);
    }
    return PD_OK;
}

PD_DEF bool pd_trainer_clips_norm(const pd_trainer *trainer) { return trainer->opts.clip_norm > 0; }

PD_DEF double pd_trainer_clip_scale(const pd_trainer *trainer, double norm, int64_t samples) {
    norm *= pd__gradient_scale(trainer, samples);
    return trainer->opts.clip_norm > 0 && norm > trainer->opts.clip_norm ? trainer->opts.clip_norm / norm : 1;
}

/* ---- the local updater: steps as soon as a gradient is final, or at the end if the norm of all must be known ---- */

static pd_status pd__local_start(pd_updater *u, pd_trainer *trainer) {
    u->self = trainer;
    return PD_OK;
}

static pd_status pd__local_begin(pd_updater *u, int64_t samples) {
    pd_trainer *t = (pd_trainer *)u->self;
    pd_status status = PD_OK;
    t->batch_samples = samples;
    for (int i = 0; status == PD_OK && i < t->trained_count; i++) {
        pd_param *p = t->trained[i].param;
        if (p->touched) status = pd_trainer_read_rows(t, p, p->rows.count, p->rows.ids, p->row_values);
    }
    return status;
}

static pd_status pd__local_grad_final(pd_updater *u, pd_param *param) {
    pd_trainer *t = (pd_trainer *)u->self;
    return pd_trainer_clips_norm(t) ? PD_OK : pd_trainer_apply(t, param, t->batch_samples, 1);
}

static pd_status pd__local_end(pd_updater *u, int64_t *samples) {
    pd_trainer *t = (pd_trainer *)u->self;
    pd_device *d = t->net->device;
    double norm = 0, scale;
    pd_status status = PD_OK;
    (void)samples; /* there is no other worker */
    if (!pd_trainer_clips_norm(t)) return PD_OK;
    for (int i = 0; i < t->trained_count; i++) {
        double of_one = d->norm(d, pd__grad_size(t->trained[i].param), t->trained[i].param->grad);
        if (!pd__finite(of_one))
            return pd_trainer_apply(t, t->trained[i].param, t->batch_samples, 1); /* which says so */
        norm = fmin(hypot(norm, of_one), DBL_MAX);
    }
    scale = pd_trainer_clip_scale(t, norm, t->batch_samples);
    for (int i = 0; status == PD_OK && i < t->trained_count; i++)
        status = pd_trainer_apply(t, t->trained[i].param, t->batch_samples, scale);
    return status;
}

static const pd_updater pd__local_updater = {
    PD_API_VERSION, "local", NULL, pd__local_start, pd__local_begin, NULL, pd__local_grad_final, NULL, pd__local_end,
    NULL,           NULL,    NULL
};

/* ======================================================================================================== */
/* >>averaging.c                                                                                           */
/* ---- model averaging ----
   Of the last updates, in three arrays. sums[2] is the average of the last full window (at first: the first value);
   what new values differ from it by goes to sums[0], and now and then from there to sums[1], so that a small number is
   never added to a very large one; once the wanted window is full it is sums[2]. So the average runs over between one
   and two windows, memory does not depend on the window, and a value that stands still is its own average. Statistics
   are averaged with the parameters: those of the last steps belong to other weights. */

enum { PD__AVERAGE_MOVE = 1024 };

static void pd__add_to(pd_device *d, int64_t n, double factor, const pd_real *from, pd_real *to) {
    int64_t size[4] = { 1, 1, 1, 0 }, line[4] = { 0, 0, 0, 1 };
    size[3] = n;
    d->contract(d, size, (pd_real)factor, from, line, NULL, line, to, line);
}

/* to = from */
static void pd__replace(pd_device *d, int64_t n, const pd_real *from, pd_real *to) {
    d->fill(d, n, 0, to);
    pd__add_to(d, n, 1, from, to);
}

static void pd__average_step(pd_trainer *t) {
    pd_device *d = t->net->device;
    double window;
    bool move, full;
    if (!(t->opts.average_window > 0)) return;
    t->average_count++;
    t->average_updates++;
    window = (double)t->average_updates * t->opts.average_window;
    if (t->opts.average_max > 0 && window > (double)t->opts.average_max) window = (double)t->opts.average_max;
    full = (double)t->average_count >= window;
    move = t->average_count % PD__AVERAGE_MOVE == 0;
    for (int i = 0; i < t->averages_count; i++) {
        pd__averaged *av = &t->averages[i];
        int64_t n = av->param->size;
        if (t->average_updates == 1) pd__replace(d, n, av->param->value, av->sums[2]);
        pd__add_to(d, n, 1, av->param->value, av->sums[0]);
        pd__add_to(d, n, -1, av->sums[2], av->sums[0]);
        if (!move && !full) continue;
        pd__add_to(d, n, 1, av->sums[0], av->sums[1]);
        d->fill(d, n, 0, av->sums[0]);
        if (!full) continue;
        pd__add_to(d, n, 1 / (double)t->average_count, av->sums[1], av->sums[2]);
        d->fill(d, n, 0, av->sums[1]);
    }
    if (full) {
        t->average_old = t->average_count;
        t->average_count = 0;
    }
}

/* For values that training did not lead to: averages begin anew. */
static void pd__forget_averages(pd_trainer *t) {
    pd_device *d = t->net->device;
    for (int i = 0; i < t->averages_count; i++)
        for (int k = 0; k < PD__COUNT(t->averages[i].sums); k++)
            d->fill(d, t->averages[i].param->size, 0, t->averages[i].sums[k]);
    t->average_count = t->average_old = t->average_updates = 0;
}

PD_DEF pd_status pd_use_average(pd_trainer *trainer, bool on) {
    pd_device *d = trainer ? trainer->net->device : NULL;
    double count = trainer ? (double)(trainer->average_count + trainer->average_old) : 0;
    if (!trainer) return PD_E_ARGUMENT;
    if (on == trainer->averaged || !(trainer->opts.average_window > 0) || (on && (count == 0 || trainer->went_back)))
        return PD_OK;
    for (int i = 0; i < trainer->averages_count; i++) {
        pd__averaged *av = &trainer->averages[i];
        int64_t n = av->param->size;
        if (on) {
            pd__replace(d, n, av->param->value, av->saved);
            pd__replace(d, n, av->sums[2], av->param->value);
            for (int k = 0; k < 2; k++) pd__add_to(d, n, 1 / count, av->sums[k], av->param->value);
        } else {
            pd__replace(d, n, av->saved, av->param->value);
        }
    }
    trainer->averaged = on;
    return PD_OK;
}

/* ======================================================================================================== */
/* >>readers.c                                                                                             */

/* A built-in reader of data is a pd__source: it knows how to read the sample it stands at, or to step over it. Which
   samples of a pass are wanted (options, shard) is decided for all of them in pd__source_find. Text comes through
   pd__lines. pd_shuffle and pd_prefetch are readers around a reader. */

/* Defined with >>files.c. */
static bool pd__seek(FILE *file, int64_t offset);
static int64_t pd__file_size(FILE *file);
static uint64_t pd__load_le(const unsigned char *from, int size);
static double pd__double_from_bits(uint64_t bits);
static float pd__float_from_bits(uint32_t bits);
static float pd__half_from_bits(uint32_t bits);

/* ---- failures ---- */

/* Texts from files end up in messages: keeps them on one line. */
static void pd__one_line(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < 32 || *text == 127) *text = '?';
}

PD_DEF pd_status pd_reader_fail(pd_reader *reader, pd_status status, const char *format, ...) {
    va_list args;
    if (!reader) return status;
    va_start(args, format);
    pd__set_failure(&reader->error, status, format, args);
    va_end(args);
    pd__one_line(reader->error.text);
    return status;
}

/* Puts a place, such as file:line, in front of the reader's message. Returns the message's status. */
PD_PRINTF(2, 3) static pd_status pd__locate(pd_reader *reader, const char *format, ...) {
    char place[256], text[sizeof reader->error.text];
    va_list args;
    va_start(args, format);
    vsnprintf(place, sizeof place, format, args);
    va_end(args);
    memcpy(text, reader->error.text, sizeof text);
    return pd_reader_fail(reader, reader->error.status, "%.220s: %.280s", place, text);
}

static pd_status pd__reader_no_memory(pd_reader *reader, const char *what) {
    return pd_reader_fail(reader, PD_E_MEMORY, "out of memory for %s", what);
}

static pd_status pd__reader_batch_failed(pd_reader *reader, const pd_batch *batch) {
    return pd_reader_fail(reader, batch->error.status, "%s", batch->error.text);
}

/* For constructors: the reader, or NULL with its message in the net and the reader freed. */
static pd_reader *pd__reader_made(pd_net *net, pd_reader *reader, pd_status status) {
    if (status == PD_OK) return reader;
    pd__fail(net, status, "%s", reader->error.text);
    net->reader_failure = reader->error;
    net->reader_failure.status = status;
    pd_reader_free(reader);
    return NULL;
}

PD_DEF void pd_reader_free(pd_reader *reader) {
    if (reader) reader->free(reader);
}

PD_DEF pd_status pd_reader_shard(pd_reader *reader, int rank, int count) {
    if (!reader) return PD_E_ARGUMENT;
    if (count < 1 || rank < 0 || rank >= count)
        return pd_reader_fail(reader, PD_E_ARGUMENT, "%s reader: shard %d of %d does not exist", reader->name, rank,
                              count);
    if (!reader->shard)
        return pd_reader_fail(reader, PD_E_UNSUPPORTED, "%s reader: it can't be split into shards", reader->name);
    return reader->shard(reader, rank, count);
}

/* What every `next` expects of its caller. */
static pd_status pd__check_next(pd_reader *r, const pd_batch *batch, int64_t count) {
    if (batch && count >= 0) return PD_OK;
    return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: next needs a batch and a count of 0 or more", r->name);
}

/* ---- sources ---- */

typedef struct pd__source pd__source;
struct pd__source {
    pd_reader reader; /* self = the source */
    pd_net *net;
    pd_batch *model; /* an empty one: batches must be like it */
    pd_reader_opts opts;
    int64_t total;  /* samples in the data; -1 when unknown */
    int64_t at;     /* the sample to be read next, counted from the start of the data */
    int64_t chosen; /* samples before `at` that the options leave: these go to the shards in turn */
    int rank, ranks;
    bool ended;
    pd_status (*read)(pd__source *s, pd_batch *batch); /* adds the rows of sample `at`; PD_END: there is none */
    pd_status (*step)(pd__source *s);   /* (optional) over sample `at`; without it, read goes by `at` alone */
    pd_status (*rewind)(pd__source *s); /* (optional) */
    void (*close)(pd__source *s);       /* (optional) frees what is its own */
};

/* Do the options leave sample `at`? */
static bool pd__source_chosen(const pd__source *s) {
    return s->at >= s->opts.first && (!s->opts.folds || (s->at % s->opts.folds == s->opts.fold) != s->opts.not_fold);
}

/* Sample `at`, which the options leave or not, has been read or stepped over with this status. */
static void pd__source_advance(pd__source *s, pd_status status, bool chosen) {
    if (status == PD_END) {
        s->ended = true;
    } else {
        s->at++;
        s->chosen += chosen;
    }
}

/* Goes on to the next sample that the options and the shard leave. */
static pd_status pd__source_find(pd__source *s) {
    if (!s->step) s->at = pd__max(s->at, s->opts.first);
    for (;;) {
        bool chosen = pd__source_chosen(s);
        pd_status status = PD_OK;
        if (s->at >= s->opts.first && s->at - s->opts.first >= s->opts.count) s->ended = true;
        if (s->total >= 0 && s->at >= s->total) s->ended = true;
        if (s->ended) return PD_END;
        if (chosen && s->chosen % s->ranks == s->rank) return PD_OK;
        if (s->step) status = s->step(s);
        pd__source_advance(s, status, chosen);
        if (status != PD_OK) return status;
    }
}

/* Reads the sample it stands at, and is behind it then, whether it was good or not. */
static pd_status pd__source_take(pd__source *s, pd_batch *batch) {
    pd_status status = s->read(s, batch);
    if (status == PD_OK) {
        status = pd_batch_end_sample(batch);
        if (status != PD_OK) pd__reader_batch_failed(&s->reader, batch);
    } else {
        pd_batch_drop_sample(batch);
    }
    pd__source_advance(s, status, true);
    return status;
}

static pd_status pd__source_next(pd_reader *r, pd_batch *batch, int64_t count) {
    pd__source *s = (pd__source *)r->self;
    pd_status status = pd__check_next(r, batch, count);
    if (status == PD_OK && !pd__batches_alike(batch, s->model))
        status = pd_reader_fail(r, PD_E_SHAPE, "%s reader: the batch is of a net with other inputs", r->name);
    for (int64_t i = 0; status == PD_OK && i < count; i++) {
        status = pd__source_find(s);
        if (status == PD_OK) status = pd__source_take(s, batch);
    }
    return status;
}

static pd_status pd__source_reset(pd_reader *r, int64_t pass) {
    pd__source *s = (pd__source *)r->self;
    pd_status status = s->rewind ? s->rewind(s) : PD_OK;
    (void)pass; /* the order is that of the data */
    s->at = s->chosen = 0;
    s->ended = status != PD_OK;
    return status;
}

static pd_status pd__source_shard(pd_reader *r, int rank, int count) {
    pd__source *s = (pd__source *)r->self;
    s->rank = rank;
    s->ranks = count;
    return r->reset(r, 0);
}

/* Samples passed over are not looked into: bad ones count too. */
static pd_status pd__source_skip(pd_reader *r, int64_t samples) {
    pd__source *s = (pd__source *)r->self;
    pd_status status = PD_OK;
    for (int64_t i = 0; status == PD_OK && i < samples; i++) {
        status = pd__source_find(s);
        if (status != PD_OK) break;
        if (s->step) status = s->step(s);
        pd__source_advance(s, status, true);
    }
    return status;
}

/* Numbers below `n` that the fold leaves. */
static int64_t pd__fold_size(const pd_reader_opts *o, int64_t n) {
    int64_t in_fold;
    if (!o->folds) return n;
    in_fold = n / o->folds + (n % o->folds > o->fold);
    return o->not_fold ? n - in_fold : in_fold;
}

static int64_t pd__source_size(pd_reader *r) {
    const pd__source *s = (const pd__source *)r->self;
    int64_t first = s->opts.first, end = s->total, n;
    if (s->total < 0) return -1;
    if (first > end) first = end;
    if (s->opts.count < end - first) end = first + s->opts.count;
    n = pd__fold_size(&s->opts, end) - pd__fold_size(&s->opts, first);
    return n / s->ranks + (n % s->ranks > s->rank);
}

static void pd__source_free(pd_reader *r) {
    pd__source *s = (pd__source *)r->self;
    pd_net *net = s->net;
    if (s->close) s->close(s);
    pd_batch_free(s->model);
    pd_free(&net->allocator, s);
}

/* A source of `size` bytes, which begin with a pd__source; NULL, with the message in the net, on failure. */
static pd__source *pd__source_new(pd_net *net, const char *name, size_t size, const pd_reader_opts *opts) {
    pd__source *s;
    if (!pd__check_net(net)) return NULL;
    s = (pd__source *)pd_alloc(&net->allocator, 1, size);
    if (!s) {
        pd__no_memory(net, "a reader");
        return NULL;
    }
    s->net = net;
    s->model = pd_batch_new(net);
    s->total = -1;
    s->ranks = 1;
    if (opts) s->opts = *opts;
    s->opts.count = pd__or_count(s->opts.count, INT64_MAX);
    if (s->opts.scale == 0) s->opts.scale = 1;
    s->reader.api_version = PD_API_VERSION;
    s->reader.name = name;
    s->reader.self = s;
    s->reader.next = pd__source_next;
    s->reader.reset = pd__source_reset;
    s->reader.shard = pd__source_shard;
    s->reader.skip = pd__source_skip;
    s->reader.size = pd__source_size;
    s->reader.free = pd__source_free;
    if (s->model && s->model->slot_count > 0) return s;
    if (s->model) pd__fail(net, PD_E_STATE, "%s reader: the net has no inputs yet", name);
    pd__source_free(&s->reader);
    return NULL;
}

/* Options of all file readers; those of the CSV reader alone must not be set for others. */
static pd_status pd__check_reader_opts(pd__source *s, bool csv) {
    const pd_reader_opts *o = &s->opts;
    pd_reader *r = &s->reader;
    if (!csv && (o->order || o->delimiter || o->skip_lines))
        return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: order, delimiter and skip_lines are options for CSV",
                              r->name);
    if (o->columns) return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: columns is an option for text", r->name);
    if (o->first < 0 || o->count < 0 || o->skip_lines < 0)
        return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: first, count and skip_lines must be 0 or more", r->name);
    if (o->folds < 0 || o->fold < 0 || (o->folds ? o->fold >= o->folds : o->fold > 0 || o->not_fold))
        return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: fold %d of %d does not exist", r->name, o->fold, o->folds);
    if (!(fabs(o->scale) <= DBL_MAX) || !(fabs(o->shift) <= DBL_MAX))
        return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: scale and shift must be finite", r->name);
    if (o->scale == PD_ZERO || o->shift == PD_ZERO)
        return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: scale and shift take no PD_ZERO", r->name);
    return PD_OK;
}

/* For files that hold one row per sample. */
static pd_status pd__check_no_sequences(pd__source *s) {
    for (int i = 0; i < s->model->slot_count; i++)
        if (s->model->slots[i].sequence)
            return pd_reader_fail(&s->reader, PD_E_UNSUPPORTED,
                                  "%s reader: input \"%.100s\" carries sequences, which such files can't hold",
                                  s->reader.name, s->model->slots[i].name);
    return PD_OK;
}

/* ---- numbers ---- */

#define PD__DIGITS_MAX 800 /* more than a double ever needs to be rounded right */

/* strtod for a decimal number with many digits: `digits`, of which `fraction` stand behind the point, times
   10^exponent. strtod takes the decimal point of the program's locale, so it gets none: all digits, then the exponent.
   Digits beyond the buffer only matter as being more than nothing: one 1 stands for them. */
static double pd__slow_number(const char *digits, const char *end, int64_t exponent) {
    char text[PD__DIGITS_MAX + 32];
    int n = 0;
    bool more = false, point = false;
    for (; digits < end; digits++) {
        if (*digits == '.') {
            point = true;
            continue;
        }
        if (point) exponent--;
        if (n == 0 && *digits == '0') continue;
        if (n < PD__DIGITS_MAX) {
            text[n++] = *digits;
        } else {
            exponent++;
            more = more || *digits != '0';
        }
    }
    if (more) {
        text[n++] = '1';
        exponent--;
    }
    exponent = pd__max(-100000, pd__min(exponent, 100000)); /* infinite or 0 beyond that */
    snprintf(text + n, sizeof text - (size_t)n, "e%d", (int)exponent);
    return strtod(text, NULL);
}

/* The exponent's value behind the 'e', or false when there are no digits. Held where it can be added to. */
static bool pd__exponent(const char *text, const char *end, int64_t *value) {
    bool negative = text < end && *text == '-';
    int64_t x = 0;
    if (text < end && (*text == '-' || *text == '+')) text++;
    if (text == end) return false;
    for (; text < end; text++) {
        if (*text < '0' || *text > '9') return false;
        if (x < INT64_MAX / 100) x = 10 * x + (*text - '0');
    }
    *value = negative ? -x : x;
    return true;
}

/* Does the text spell infinity or not-a-number, in any case? */
static bool pd__is_not_finite(const char *text, const char *end) {
    static const char *const words[] = { "nan", "inf", "infinity" };
    for (int i = 0; i < PD__COUNT(words); i++) {
        size_t n = strlen(words[i]), k = 0;
        if ((size_t)(end - text) != n) continue;
        while (k < n && (text[k] | 32) == words[i][k]) k++;
        if (k == n) return true;
    }
    return false;
}

/* A decimal number as it is written: [+-] digits [. digits] [e [+-] digits]. */
typedef struct pd__decimal {
    const char *first, *end; /* the digits, with the point if there is one */
    bool negative;
    int64_t whole, fraction; /* digits in front of the point and behind it */
    int64_t exponent;
    uint64_t mantissa; /* of all digits; not all of it if that is beyond 2^60 */
} pd__decimal;

/* Takes the decimal number that fills the text to pieces. PD_E_FORMAT: it isn't one; PD_E_NUMERIC: nan or infinity. */
static pd_status pd__scan_decimal(const char *text, const char *end, pd__decimal *d) {
    bool point = false;
    const char *at;
    uint64_t mantissa = 0;
    int64_t fraction = 0, digits = 0;
    d->exponent = 0;
    d->negative = text < end && *text == '-';
    if (text < end && (*text == '-' || *text == '+')) text++;
    for (d->first = at = text; at < end; at++) {
        if (*at == '.' && !point) {
            point = true;
            continue;
        }
        if (*at < '0' || *at > '9') break;
        if (mantissa < UINT64_C(1) << 60) mantissa = 10 * mantissa + (uint64_t)(*at - '0');
        fraction += point;
        digits++;
    }
    d->end = at;
    d->mantissa = mantissa;
    d->fraction = fraction;
    d->whole = digits - fraction;
    if (digits == 0) return pd__is_not_finite(text, end) ? PD_E_NUMERIC : PD_E_FORMAT;
    return at == end || ((*at | 32) == 'e' && pd__exponent(at + 1, end, &d->exponent)) ? PD_OK : PD_E_FORMAT;
}

/* The number that fills the text; PD_E_NUMERIC also when it is beyond a double. One of up to 15 digits or so is one
   exact product or quotient of doubles, hence rounded right (Clinger 1990); the others go through strtod. */
static pd_status pd__parse_number(const char *text, const char *end, double *value) {
    static const double powers[] = { 1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                     1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    pd__decimal d;
    pd_status status = pd__scan_decimal(text, end, &d);
    int64_t exponent = d.exponent - d.fraction;
    if (status != PD_OK) return status;
    if (d.mantissa == 0) *value = 0;
    else if (d.mantissa <= UINT64_C(1) << 53 && exponent <= 0 && exponent >= -22)
        *value = (double)d.mantissa / powers[-exponent];
    else if (d.mantissa <= UINT64_C(1) << 53 && exponent > 0 && exponent <= 22)
        *value = (double)d.mantissa * powers[exponent];
    else *value = pd__slow_number(d.first, d.end, d.exponent);
    if (d.negative) *value = -*value;
    return pd__finite(*value) ? PD_OK : PD_E_NUMERIC;
}

/* A whole number of up to 64 bits beside its sign. Zero has none. */
typedef struct pd__whole {
    uint64_t magnitude;
    bool negative;
} pd__whole;

static bool pd__same_whole(pd__whole a, pd__whole b) { return a.magnitude == b.magnitude && a.negative == b.negative; }

/* 10 x + digit; false when that is beyond 64 bits. */
static bool pd__append_digit(uint64_t *x, unsigned digit) {
    if (*x > (UINT64_MAX - digit) / 10) return false;
    *x = 10 * *x + digit;
    return true;
}

/* The whole number that a decimal number is. PD_E_FORMAT: it is none; PD_E_NUMERIC: it is beyond 64 bits. */
static pd_status pd__decimal_whole(const pd__decimal *d, pd__whole *value) {
    int64_t left = d->whole + d->exponent; /* digits, those that are not written too, in front of the point */
    bool fits = true;
    value->magnitude = 0;
    for (const char *at = d->first; at < d->end; at++) {
        if (*at == '.') continue;
        if (left-- > 0) fits = fits && pd__append_digit(&value->magnitude, (unsigned)(*at - '0'));
        else if (*at != '0') return PD_E_FORMAT;
    }
    while (fits && left-- > 0 && value->magnitude > 0) fits = pd__append_digit(&value->magnitude, 0);
    value->negative = d->negative && value->magnitude > 0;
    return fits ? PD_OK : PD_E_NUMERIC;
}

/* Says what is wrong with a text that is no finite number. */
static pd_status pd__number_failed(pd_reader *r, pd_status status, const char *text, const char *end) {
    int shown = (int)pd__min(end - text, 60);
    if (text == end) return pd_reader_fail(r, PD_E_FORMAT, "empty, expected a number");
    return pd_reader_fail(r, status, "\"%.*s\" is not a %snumber", shown, text, status == PD_E_FORMAT ? "" : "finite ");
}

/* pd__parse_number with a message. */
static pd_status pd__read_number(pd_reader *r, const char *text, const char *end, double *value) {
    pd_status status = pd__parse_number(text, end, value);
    return status == PD_OK ? PD_OK : pd__number_failed(r, status, text, end);
}

/* The same for a whole number. */
static pd_status pd__read_whole(pd_reader *r, const char *text, const char *end, pd__whole *value) {
    int shown = (int)pd__min(end - text, 60);
    pd__decimal d;
    pd_status status = pd__scan_decimal(text, end, &d);
    if (status != PD_OK) return pd__number_failed(r, status, text, end);
    status = pd__decimal_whole(&d, value);
    if (status == PD_OK) return PD_OK;
    return pd_reader_fail(r, PD_E_FORMAT, "\"%.*s\" is %s", shown, text,
                          status == PD_E_FORMAT ? "not a whole number" : "beyond 64 bits");
}

/* What an input gets for the number x of the data. */
static pd_status pd__scale_number(pd__source *s, double x, pd_real *to) {
    double y = x * s->opts.scale + s->opts.shift;
    *to = (pd_real)y; /* what is just above the largest number may still be rounded to it */
    if (pd__finite((double)*to)) return PD_OK;
    return pd_reader_fail(&s->reader, PD_E_NUMERIC, "%g is not a finite number of this build", y);
}

static pd_status pd__add_id(pd__source *s, pd_batch *batch, int slot, pd__whole x) {
    int64_t ids = s->model->slots[slot].width;
    if (x.negative || x.magnitude >= (uint64_t)ids)
        return pd_reader_fail(&s->reader, PD_E_FORMAT, "%s%llu is not an id of 0 to %lld", x.negative ? "-" : "",
                              (unsigned long long)x.magnitude, (long long)ids - 1);
    if (pd_batch_add_id(batch, slot, (int64_t)x.magnitude) != PD_OK) return pd__reader_batch_failed(&s->reader, batch);
    return PD_OK;
}

static pd_real *pd__add_row(pd__source *s, pd_batch *batch, int slot) {
    pd_real *row = pd_batch_add_row(batch, slot);
    if (!row) pd__reader_batch_failed(&s->reader, batch);
    return row;
}

/* ---- >>reader:array: arrays ---- */

typedef struct pd__array_source {
    pd__source source;
    pd_array *arrays;
} pd__array_source;

static pd_status pd__array_read_rows(pd__source *s, pd_batch *batch, int slot, int64_t first, int64_t rows) {
    const pd_array *array = &((pd__array_source *)s)->arrays[slot];
    pd_slot *to = pd__slot_open(batch, slot, s->model->slots[slot].kind, rows);
    if (!to) return pd__reader_batch_failed(&s->reader, batch);
    if (to->kind == PD_SLOT_DENSE && rows > 0) {
        memcpy(to->data + to->rows * to->width, array->data + first * to->width,
               (size_t)(rows * to->width) * sizeof *to->data);
        to->rows += rows;
    }
    for (int64_t i = first; to->kind != PD_SLOT_DENSE && i < first + rows; i++) {
        int64_t at = to->kind == PD_SLOT_SPARSE ? array->row_starts[i] : 0;
        pd_status status =
            to->kind == PD_SLOT_IDS
                ? pd_batch_add_id(batch, slot, array->ids[i])
                : pd_batch_add_sparse(batch, slot, array->ids ? array->ids + at : NULL,
                                      array->values ? array->values + at : NULL, array->row_starts[i + 1] - at);
        if (status != PD_OK) return pd__reader_batch_failed(&s->reader, batch);
    }
    return PD_OK;
}

static pd_status pd__array_read(pd__source *s, pd_batch *batch) {
    const pd_array *arrays = ((pd__array_source *)s)->arrays;
    for (int i = 0; i < s->model->slot_count; i++) {
        const int64_t *starts = arrays[i].starts;
        int64_t first = starts ? starts[s->at] : s->at, rows = starts ? starts[s->at + 1] - first : 1;
        if (pd__array_read_rows(s, batch, i, first, rows) != PD_OK)
            return pd__locate(&s->reader, "array reader: sample %lld", (long long)s->at);
    }
    return PD_OK;
}

static void pd__array_close(pd__source *s) { pd_free(&s->net->allocator, ((pd__array_source *)s)->arrays); }

static pd_status pd__check_array(pd__source *s, int64_t samples, const pd_array *array, const pd_slot *slot) {
    pd_reader *r = &s->reader;
    bool sparse = slot->kind == PD_SLOT_SPARSE, dense = slot->kind == PD_SLOT_DENSE;
    int64_t rows = array->starts && samples > 0 ? array->starts[samples] : samples;
    bool wrong = dense ? array->ids != NULL : array->data != NULL;
    if (wrong || (rows > 0 && (dense ? !array->data : !sparse && !array->ids)) || (array->values && !sparse) ||
        sparse != (array->row_starts != NULL))
        return pd_reader_fail(r, PD_E_ARGUMENT, "array reader: input \"%.100s\" takes %s, and nothing else", slot->name,
                              dense    ? "data"
                              : sparse ? "row_starts, ids and values"
                                       : "ids");
    if (slot->sequence != (array->starts != NULL))
        return pd_reader_fail(r, PD_E_ARGUMENT, "array reader: input \"%.100s\" %s", slot->name,
                              slot->sequence ? "carries sequences and needs starts" : "has starts but no sequences");
    for (int64_t i = 0; array->starts && i <= samples; i++)
        if (i == 0 ? array->starts[0] != 0 : array->starts[i] < array->starts[i - 1])
            return pd_reader_fail(r, PD_E_ARGUMENT,
                                  "array reader: input \"%.100s\": starts[%lld] is %lld; they must rise from 0",
                                  slot->name, (long long)i, (long long)array->starts[i]);
    for (int64_t i = 0; sparse && i <= rows; i++)
        if (array->row_starts[i] < (i == 0 ? 0 : array->row_starts[i - 1]) || (array->row_starts[i] > 0 && !array->ids))
            return pd_reader_fail(
                r, PD_E_ARGUMENT, "array reader: input \"%.100s\": row_starts[%lld] is %lld; they must rise%s",
                slot->name, (long long)i, (long long)array->row_starts[i], array->ids ? "" : ", and there are no ids");
    return PD_OK;
}

static pd_status pd__array_init(pd__array_source *s, int64_t samples, const pd_array *arrays, int count) {
    pd__source *source = &s->source;
    if (samples < 0 || !arrays || count != source->model->slot_count)
        return pd_reader_fail(&source->reader, PD_E_ARGUMENT,
                              "array reader: %lld samples of %d arrays, expected 0 or more of %d, one per input",
                              (long long)samples, arrays ? count : 0, source->model->slot_count);
    for (int i = 0; i < count; i++) {
        pd_status status = pd__check_array(source, samples, &arrays[i], &source->model->slots[i]);
        if (status != PD_OK) return status;
    }
    s->arrays = (pd_array *)pd_alloc(&source->net->allocator, count, sizeof *arrays);
    if (!s->arrays) return pd__reader_no_memory(&source->reader, "a reader");
    memcpy(s->arrays, arrays, (size_t)count * sizeof *arrays);
    return PD_OK;
}

PD_DEF pd_reader *pd_array_reader(pd_net *net, int64_t samples, const pd_array *arrays, int count) {
    pd__array_source *s = (pd__array_source *)pd__source_new(net, "array", sizeof *s, NULL);
    if (!s) return NULL;
    s->source.total = pd__max(samples, 0);
    s->source.read = pd__array_read;
    s->source.close = pd__array_close;
    return pd__reader_made(net, &s->source.reader, pd__array_init(s, samples, arrays, count));
}

/* ---- lines of text ---- */

#define PD__LINES_CAPACITY 65536 /* bytes to begin with; it grows for longer lines */

typedef struct pd__paths {
    char **list;
    int64_t count, capacity;
} pd__paths;

/* The lines of some text files, one after the other. */
typedef struct pd__lines {
    pd_reader *reader; /* gets the messages */
    const pd_allocator *allocator;
    pd__paths paths;
    int64_t path;       /* the open file, or the one to be opened next */
    int64_t skip_lines; /* at the top of each file */
    FILE *file;
    bool stdin_begun;
    int64_t number; /* of the line read last, from 1 */
    char *buffer;
    int64_t capacity, start, end; /* bytes start .. end - 1 are still to come */
    char *line;                   /* in the buffer, until the next one is read */
    int64_t length;
} pd__lines;

static bool pd__lines_init(pd__lines *l, pd_reader *reader, const pd_allocator *allocator) {
    l->reader = reader;
    l->allocator = allocator;
    return pd_grow(allocator, (void **)&l->buffer, &l->capacity, PD__LINES_CAPACITY, 1);
}

/* Closes the file; the next line is the first of the file after it. */
static void pd__lines_close_file(pd__lines *l) {
    if (l->file && l->file != stdin) fclose(l->file);
    l->file = NULL;
    l->path++;
    l->start = l->end = l->number = 0;
}

static void pd__paths_free(const pd_allocator *a, pd__paths *paths) {
    for (int64_t i = 0; i < paths->count; i++) pd_free(a, paths->list[i]);
    pd_free(a, paths->list);
}

/* Adds a path of `length` characters. */
static pd_status pd__paths_add(pd__paths *paths, pd_reader *r, const pd_allocator *a, const char *path,
                               int64_t length) {
    char *copy = NULL;
    if (pd_grow(a, (void **)&paths->list, &paths->capacity, paths->count + 1, sizeof *paths->list))
        copy = (char *)pd_alloc(a, length + 1, 1);
    if (!copy) return pd__reader_no_memory(r, "a path");
    memcpy(copy, path, (size_t)length);
    paths->list[paths->count++] = copy;
    return PD_OK;
}

static void pd__lines_free(pd__lines *l) {
    pd__lines_close_file(l);
    pd__paths_free(l->allocator, &l->paths);
    pd_free(l->allocator, l->buffer);
}

static FILE *pd__open_data(pd_reader *r, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) pd_reader_fail(r, PD_E_IO, "%.200s: %s", path, strerror(errno));
    return file;
}

/* Opens the file that comes next; PD_END when there is none. A file that can't be opened is passed over next time. */
static pd_status pd__lines_open(pd__lines *l) {
    const char *path;
    if (l->path >= l->paths.count) return PD_END;
    path = l->paths.list[l->path];
    if (strcmp(path, "-") == 0) {
        l->file = stdin;
        return PD_OK;
    }
    l->file = pd__open_data(l->reader, path);
    if (l->file) return PD_OK;
    pd__lines_close_file(l);
    return l->reader->error.status;
}

/* Back to the first line of the first file. One that nothing was read of stays as it is: it may be a pipe. */
static pd_status pd__lines_rewind(pd__lines *l) {
    if (l->stdin_begun) return pd_reader_fail(l->reader, PD_E_UNSUPPORTED, "stdin: it can be read only once");
    if (l->file && l->path == 0 && ((l->number == 0 && l->end == 0) || pd__seek(l->file, 0))) {
        clearerr(l->file);
        l->start = l->end = l->number = 0;
        return PD_OK;
    }
    pd__lines_close_file(l);
    l->path = 0;
    return PD_OK;
}

/* Reads more bytes into the buffer. PD_END: there are none. */
static pd_status pd__lines_fill(pd__lines *l) {
    size_t n = feof(l->file) ? 0 : fread(l->buffer + l->end, 1, (size_t)(l->capacity - l->end), l->file);
    l->stdin_begun = l->stdin_begun || l->file == stdin;
    l->end += (int64_t)n;
    if (n > 0) return PD_OK;
    if (!ferror(l->file)) return PD_END;
    return pd_reader_fail(l->reader, PD_E_IO, "%.200s:%lld: %s", l->paths.list[l->path], (long long)l->number + 1,
                          strerror(errno));
}

/* The line at the start of the buffer has `length` bytes, and `past` bytes with its end: takes it, without the \r and
   without the byte order mark that some programs put in front of a file. */
static void pd__lines_take(pd__lines *l, int64_t length, int64_t past) {
    l->line = l->buffer + l->start;
    l->length = length;
    l->start += past;
    l->number++;
    if (l->length > 0 && l->line[l->length - 1] == '\r') l->length--;
    if (l->number == 1 && l->length >= 3 && memcmp(l->line, "\xEF\xBB\xBF", 3) == 0) {
        l->line += 3;
        l->length -= 3;
    }
}

/* Makes room in the buffer, which holds no end of line. Without memory for more, its bytes are given up: false. */
static bool pd__lines_make_room(pd__lines *l) {
    int64_t length = l->end - l->start;
    if (l->start > 0) memmove(l->buffer, l->buffer + l->start, (size_t)length);
    l->start = 0;
    l->end = length;
    if (length < l->capacity || pd_grow(l->allocator, (void **)&l->buffer, &l->capacity, length + 1, 1)) return true;
    l->end = 0;
    return false;
}

/* The next line of the open file; PD_END at its end. A line that there is no memory for is passed over. */
static pd_status pd__lines_read(pd__lines *l) {
    int64_t scanned = l->start; /* bytes before this hold no end of line */
    bool begun = false, too_long = false;
    for (;;) {
        const char *newline = (const char *)memchr(l->buffer + scanned, '\n', (size_t)(l->end - scanned));
        if (!newline) {
            pd_status status;
            begun = begun || l->end > l->start;
            too_long = !pd__lines_make_room(l) || too_long;
            scanned = l->end;
            status = pd__lines_fill(l);
            if (status == PD_OK) continue;
            if (status != PD_END || !begun) return status;
        }
        scanned = newline ? newline - (l->buffer + l->start) : l->end - l->start;
        pd__lines_take(l, scanned, newline ? scanned + 1 : scanned);
        if (!too_long) return PD_OK;
        return pd_reader_fail(l->reader, PD_E_MEMORY, "%.200s:%lld: out of memory for a line", l->paths.list[l->path],
                              (long long)l->number);
    }
}

static bool pd__is_blank(char c) { return c == ' ' || c == '\t'; }

static bool pd__lines_is_blank(const pd__lines *l) {
    int64_t i = 0;
    while (i < l->length && pd__is_blank(l->line[i])) i++;
    return i == l->length;
}

/* The next line that isn't blank, of whichever file; PD_END after the last one. After an I/O error the next file goes
   on. */
static pd_status pd__lines_next(pd__lines *l) {
    for (;;) {
        pd_status status = l->file ? PD_OK : pd__lines_open(l);
        if (status != PD_OK) return status;
        status = pd__lines_read(l);
        if (status == PD_OK && (l->number <= l->skip_lines || pd__lines_is_blank(l))) continue;
        if (status == PD_OK || status == PD_E_MEMORY) return status;
        pd__lines_close_file(l);
        if (status != PD_END) return status;
    }
}

/* Puts the line's place in front of the message. */
static pd_status pd__lines_locate(pd__lines *l) {
    return pd__locate(l->reader, "%.200s:%lld", l->paths.list[l->path], (long long)l->number);
}

/* What is left of a line; `at` is NULL behind the last field. */
typedef struct pd__fields {
    const char *at, *end;
    char delimiter;
} pd__fields;

static pd__fields pd__lines_fields(const pd__lines *l, char delimiter) {
    pd__fields f;
    f.at = l->line;
    f.end = l->line + l->length;
    f.delimiter = delimiter;
    return f;
}

/* Adds one file, or all those that an "@list" names, one per line. */
static pd_status pd__paths_expand(pd__paths *paths, pd_reader *r, const pd_allocator *a, const char *path) {
    pd__lines list = PD__ZERO;
    pd_status status;
    if (!path || !path[0]) return pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: no path", r->name);
    if (path[0] != '@') return pd__paths_add(paths, r, a, path, (int64_t)strlen(path));
    if (!pd__lines_init(&list, r, a)) return pd__reader_no_memory(r, "a list of paths");
    status = pd__paths_add(&list.paths, r, a, path + 1, (int64_t)strlen(path + 1));
    while (status == PD_OK) {
        status = pd__lines_next(&list);
        if (status == PD_OK) status = pd__paths_add(paths, r, a, list.line, list.length);
    }
    pd__lines_free(&list);
    if (status == PD_END && paths->count > 0) return PD_OK;
    return status == PD_END ? pd_reader_fail(r, PD_E_FORMAT, "%.200s: no paths in it", path + 1) : status;
}

/* Names the files and opens the first, to fail early. */
static pd_status pd__lines_start(pd__lines *l, pd__source *s, const char *path) {
    pd_status status;
    if (!pd__lines_init(l, &s->reader, &s->net->allocator)) return pd__reader_no_memory(&s->reader, "a line");
    l->skip_lines = s->opts.skip_lines;
    status = pd__paths_expand(&l->paths, l->reader, l->allocator, path);
    return status == PD_OK ? pd__lines_open(l) : status;
}

/* ---- >>reader:csv: CSV ---- */

/* Columns that stand together: those of one input, or one that is left out. */
typedef struct pd__csv_group {
    int slot; /* -1: left out */
    int64_t columns;
} pd__csv_group;

typedef struct pd__csv {
    pd__source source;
    pd__lines lines;
    pd__csv_group *groups;
    int64_t group_count, group_capacity;
    int64_t columns;
} pd__csv;

/* The quote that closes the one at `text` (RFC 4180: two quotes stand for one), or `end`. */
static const char *pd__closing_quote(const char *text, const char *end) {
    for (text++; text < end; text++) {
        if (*text != '"') continue;
        if (text + 1 == end || text[1] != '"') return text;
        text++;
    }
    return end;
}

static void pd__trim(const char **text, const char **end) {
    while (*text < *end && pd__is_blank(**text)) ++*text;
    while (*text < *end && pd__is_blank((*end)[-1])) --*end;
}

/* Takes a field off the line: what stands in it, without blanks and quotes around it. False when there is none. A
   quote that isn't closed belongs to the text, as does what stands behind a closed one. */
static bool pd__next_field(pd__fields *f, const char **text, const char **text_end) {
    const char *first = f->at, *close, *last;
    if (!first) return false;
    while (first < f->end && pd__is_blank(*first) && *first != f->delimiter) first++;
    close = first < f->end && *first == '"' ? pd__closing_quote(first, f->end) : f->end;
    last = close < f->end ? close : first;
    last = (const char *)memchr(last, f->delimiter, (size_t)(f->end - last));
    f->at = last ? last + 1 : NULL;
    if (!last) last = f->end;
    pd__trim(&first, &last);
    if (last - 1 == close) {
        first++;
        last--;
        pd__trim(&first, &last);
    }
    *text = first;
    *text_end = last;
    return true;
}

static int64_t pd__csv_count(const pd__csv *c) {
    pd__fields f = pd__lines_fields(&c->lines, c->source.opts.delimiter);
    const char *text, *end;
    int64_t n = 0;
    while (pd__next_field(&f, &text, &end)) n++;
    return n;
}

/* Says what is wrong with the line: column `column`, whose message is there, or rather the number of columns. */
static pd_status pd__csv_fail(pd__csv *c, int64_t column, const char *name) {
    pd_reader *r = &c->source.reader;
    int64_t count = pd__csv_count(c);
    bool heading = c->lines.number == 1 && r->error.status == PD_E_FORMAT;
    if (count != c->columns)
        pd_reader_fail(r, PD_E_FORMAT, "%lld columns, expected %lld", (long long)count, (long long)c->columns);
    else
        pd__locate(r, "column %lld (%.100s%s)", (long long)column, name,
                   heading ? "; for headings see skip_lines" : "");
    return pd__lines_locate(&c->lines);
}

/* Takes one number off the line, into *row or, if that is NULL, as an id. */
static pd_status pd__csv_value(pd__csv *c, pd__fields *f, pd_batch *batch, int slot, pd_real *row) {
    const char *text, *end;
    pd_reader *r = &c->source.reader;
    pd__whole id;
    double x;
    pd_status status;
    if (!pd__next_field(f, &text, &end)) return PD_E_FORMAT;
    status = row ? pd__read_number(r, text, end, &x) : pd__read_whole(r, text, end, &id);
    if (status != PD_OK) return status;
    return row ? pd__scale_number(&c->source, x, row) : pd__add_id(&c->source, batch, slot, id);
}

static pd_status pd__csv_read(pd__source *s, pd_batch *batch) {
    pd__csv *c = (pd__csv *)s;
    pd__fields f;
    int64_t column = 0;
    pd_status status = pd__lines_next(&c->lines);
    if (status != PD_OK) return status;
    f = pd__lines_fields(&c->lines, c->source.opts.delimiter);
    for (int64_t g = 0; g < c->group_count; g++) {
        int slot = c->groups[g].slot;
        const pd_slot *input = slot < 0 ? NULL : &s->model->slots[slot];
        bool dense = input && input->kind == PD_SLOT_DENSE;
        pd_real *row = dense ? pd__add_row(s, batch, slot) : NULL;
        if (dense && !row) return pd__lines_locate(&c->lines);
        for (int64_t k = 0; k < c->groups[g].columns; k++) {
            const char *text, *end;
            column++;
            if (!input) {
                if (!pd__next_field(&f, &text, &end)) return pd__csv_fail(c, column, "-");
                continue;
            }
            status = pd__csv_value(c, &f, batch, slot, row ? row + k : NULL);
            if (status != PD_OK) return pd__csv_fail(c, column, input->name);
        }
    }
    return f.at ? pd__csv_fail(c, column, "-") : PD_OK;
}

static pd_status pd__csv_step(pd__source *s) { return pd__lines_next(&((pd__csv *)s)->lines); }
static pd_status pd__csv_rewind(pd__source *s) { return pd__lines_rewind(&((pd__csv *)s)->lines); }

static void pd__csv_close(pd__source *s) {
    pd__lines_free(&((pd__csv *)s)->lines);
    pd_free(&s->net->allocator, ((pd__csv *)s)->groups);
}

/* Adds the columns of a slot, or one to be left out. */
static pd_status pd__csv_add_group(pd__csv *c, int slot) {
    const pd_slot *input = slot < 0 ? NULL : &c->source.model->slots[slot];
    pd_reader *r = &c->source.reader;
    int64_t columns = input && input->kind == PD_SLOT_DENSE ? input->width : 1;
    if (input && input->kind == PD_SLOT_SPARSE)
        return pd_reader_fail(r, PD_E_SHAPE, "csv reader: input \"%.100s\" is sparse; see pd_libsvm_reader",
                              input->name);
    for (int64_t g = 0; input && g < c->group_count; g++)
        if (c->groups[g].slot == slot)
            return pd_reader_fail(r, PD_E_ARGUMENT, "csv reader: order names \"%.100s\" twice", input->name);
    if (columns > INT64_MAX - c->columns)
        return pd_reader_fail(r, PD_E_ARGUMENT, "csv reader: the inputs are too wide for one line");
    if (!pd_grow(&c->source.net->allocator, (void **)&c->groups, &c->group_capacity, c->group_count + 1,
                 sizeof *c->groups))
        return pd__reader_no_memory(r, "a reader");
    c->groups[c->group_count].slot = slot;
    c->groups[c->group_count++].columns = columns;
    c->columns += columns;
    return PD_OK;
}

/* The slot with this name, -1 for a "-", or -2 when there is none. */
static int pd__csv_slot(const pd__csv *c, const char *name, size_t length) {
    const pd_batch *model = c->source.model;
    if (length == 1 && name[0] == '-') return -1;
    for (int i = 0; i < model->slot_count; i++)
        if (strlen(model->slots[i].name) == length && memcmp(model->slots[i].name, name, length) == 0) return i;
    return -2;
}

/* Finds the inputs that `order` names; every one must be there once. */
static pd_status pd__csv_order(pd__csv *c, const char *order) {
    pd_reader *r = &c->source.reader;
    pd__fields f;
    const char *name, *end;
    int named = 0;
    pd_status status = PD_OK;
    f.at = order;
    f.end = order + strlen(order);
    f.delimiter = ',';
    while (status == PD_OK && pd__next_field(&f, &name, &end)) {
        int slot = pd__csv_slot(c, name, (size_t)(end - name));
        if (slot == -2)
            return pd_reader_fail(r, PD_E_ARGUMENT,
                                  "csv reader: order names \"%.*s\", but no input of the net has this name",
                                  (int)pd__min(end - name, 100), name);
        status = pd__csv_add_group(c, slot);
        named += slot >= 0;
    }
    for (int i = 0; status == PD_OK && named < c->source.model->slot_count; i++) {
        int64_t g = 0;
        while (g < c->group_count && c->groups[g].slot != i) g++;
        if (g == c->group_count)
            return pd_reader_fail(r, PD_E_ARGUMENT, "csv reader: order leaves out input \"%.100s\"",
                                  c->source.model->slots[i].name);
    }
    return status;
}

static pd_status pd__csv_init(pd__csv *c, const char *path) {
    pd__source *s = &c->source;
    char *delimiter = &s->opts.delimiter;
    pd_status status = pd__check_reader_opts(s, true);
    if (status == PD_OK) status = pd__check_no_sequences(s);
    if (*delimiter == 0) *delimiter = ',';
    if (status == PD_OK && (isalnum((unsigned char)*delimiter) || strchr("+-.\"\r\n", *delimiter)))
        status = pd_reader_fail(&s->reader, PD_E_ARGUMENT, "csv reader: '%c' can't be the delimiter", *delimiter);
    if (status == PD_OK && s->opts.order) status = pd__csv_order(c, s->opts.order);
    for (int i = 0; status == PD_OK && !s->opts.order && i < s->model->slot_count; i++)
        status = pd__csv_add_group(c, i);
    s->opts.order = NULL; /* the caller's */
    return status == PD_OK ? pd__lines_start(&c->lines, s, path) : status;
}

PD_DEF pd_reader *pd_csv_reader(pd_net *net, const char *path, const pd_reader_opts *opts) {
    pd__csv *c = (pd__csv *)pd__source_new(net, "csv", sizeof *c, opts);
    if (!c) return NULL;
    c->source.read = pd__csv_read;
    c->source.step = pd__csv_step;
    c->source.rewind = pd__csv_rewind;
    c->source.close = pd__csv_close;
    return pd__reader_made(net, &c->source.reader, pd__csv_init(c, path));
}

/* ---- >>reader:libsvm: LibSVM ---- */

typedef struct pd__libsvm {
    pd__source source;
    pd__lines lines;
    int x, y;        /* slots of the vector and of the label */
    bool queries;    /* the inputs carry sequences: lines of one query are a sample */
    pd__whole query; /* of the sample read last */
    bool bad_query;  /* .. of which lines may still have to be passed over */
    bool pending;    /* lines.line has been read, but not used */
} pd__libsvm;

/* Takes what stands up to the next blank; false when the line is over. */
static bool pd__next_token(pd__fields *f, const char **text, const char **text_end) {
    while (f->at < f->end && pd__is_blank(*f->at)) f->at++;
    *text = f->at;
    while (f->at < f->end && !pd__is_blank(*f->at)) f->at++;
    *text_end = f->at;
    return *text < *text_end;
}

/* The next line that has something in front of its comment. */
static pd_status pd__libsvm_line(pd__libsvm *c) {
    pd_status status = PD_OK;
    if (c->pending) {
        c->pending = false;
        return PD_OK;
    }
    do {
        const char *comment;
        status = pd__lines_next(&c->lines);
        if (status != PD_OK) return status;
        comment = (const char *)memchr(c->lines.line, '#', (size_t)c->lines.length);
        if (comment) c->lines.length = comment - c->lines.line;
    } while (pd__lines_is_blank(&c->lines));
    return PD_OK;
}

/* What stands behind "qid:", the line's second word; PD_END when it is another. */
static pd_status pd__libsvm_query(pd__libsvm *c, pd__whole *query) {
    pd__fields f = pd__lines_fields(&c->lines, ' ');
    const char *text, *end;
    pd_status status;
    pd__next_token(&f, &text, &end);
    if (!pd__next_token(&f, &text, &end) || end - text < 4 || memcmp(text, "qid:", 4) != 0) return PD_END;
    status = pd__read_whole(&c->source.reader, text + 4, end, query);
    return status == PD_OK ? PD_OK : pd__locate(&c->source.reader, "qid");
}

static pd_status pd__libsvm_label(pd__libsvm *c, pd_batch *batch, const char *text, const char *end) {
    pd__source *s = &c->source;
    const pd_slot *slot = &s->model->slots[c->y];
    pd_status status;
    if (slot->kind == PD_SLOT_IDS) {
        pd__whole id;
        status = pd__read_whole(&s->reader, text, end, &id);
        if (status == PD_OK && slot->width == 2 && id.negative && id.magnitude == 1) memset(&id, 0, sizeof id);
        if (status == PD_OK) status = pd__add_id(s, batch, c->y, id);
    } else {
        double y;
        pd_real *row;
        status = pd__read_number(&s->reader, text, end, &y);
        row = status == PD_OK ? pd__add_row(s, batch, c->y) : NULL;
        if (status == PD_OK) status = row ? pd__scale_number(s, y, row) : PD_E_MEMORY;
    }
    return status == PD_OK ? PD_OK : pd__locate(&s->reader, "label");
}

/* The row that a line is read into: of a dense input its numbers, of a sparse one the entries so far. */
typedef struct pd__libsvm_row {
    pd_real *numbers; /* NULL: sparse */
    pd_batch *batch;
    pd_slot *slot;
    int64_t entries;
} pd__libsvm_row;

static bool pd__libsvm_open_row(pd__libsvm *c, pd_batch *batch, pd__libsvm_row *row) {
    pd__source *s = &c->source;
    memset(row, 0, sizeof *row);
    row->batch = batch;
    if (s->model->slots[c->x].kind == PD_SLOT_SPARSE) {
        row->slot = pd__slot_open(batch, c->x, PD_SLOT_SPARSE, 1);
        if (!row->slot) pd__reader_batch_failed(&s->reader, batch);
        return row->slot != NULL;
    }
    row->numbers = pd__add_row(s, batch, c->x);
    for (int64_t i = 0; row->numbers && i < s->model->slots[c->x].width; i++)
        row->numbers[i] = (pd_real)s->opts.shift; /* of absent zeros */
    return row->numbers != NULL;
}

/* Where the number of a column goes; NULL when out of memory. */
static pd_real *pd__libsvm_place(pd__libsvm_row *row, int64_t column) {
    int64_t at;
    if (row->numbers) return &row->numbers[column];
    if (!pd__entries_grow(&row->batch->net->allocator, row->slot, row->entries + 1)) return NULL;
    at = row->slot->row_starts[row->slot->rows] + row->entries++;
    row->slot->ids[at] = column;
    return &row->slot->values[at];
}

static void pd__libsvm_close_row(pd__libsvm_row *row) {
    pd_slot *s = row->slot;
    if (!s) return;
    s->row_starts[s->rows + 1] = s->row_starts[s->rows] + row->entries;
    s->rows++;
}

/* Puts one "index:value" into the row; *last is the index before it. */
static pd_status pd__libsvm_pair(pd__libsvm *c, const char *text, const char *end, int64_t *last, pd__libsvm_row *row) {
    pd_real *to;
    pd_reader *r = &c->source.reader;
    int64_t width = c->source.model->slots[c->x].width;
    const char *colon = (const char *)memchr(text, ':', (size_t)(end - text));
    pd__whole index;
    double value;
    pd_status status;
    if (!colon)
        return pd_reader_fail(r, PD_E_FORMAT, "\"%.*s\", expected index:value", (int)pd__min(end - text, 60), text);
    status = pd__read_whole(r, text, colon, &index);
    if (status != PD_OK) return pd__locate(r, "index");
    if (index.negative || index.magnitude <= (uint64_t)*last || index.magnitude > (uint64_t)width)
        return pd_reader_fail(r, PD_E_FORMAT,
                              "index %s%llu, expected %llu to %lld: they rise, and the input has that width",
                              index.negative ? "-" : "", (unsigned long long)index.magnitude,
                              (unsigned long long)*last + 1, (long long)width);
    *last = (int64_t)index.magnitude;
    to = pd__libsvm_place(row, *last - 1);
    if (!to) return pd__reader_no_memory(r, "a row");
    status = pd__read_number(r, colon + 1, end, &value);
    if (status == PD_OK) status = pd__scale_number(&c->source, value, to);
    return status == PD_OK ? PD_OK : pd__locate(r, "value of index %lld", (long long)*last);
}

/* Adds the line's row to both inputs. */
static pd_status pd__libsvm_parse(pd__libsvm *c, pd_batch *batch) {
    pd__source *s = &c->source;
    pd__fields f = pd__lines_fields(&c->lines, ' ');
    const char *text, *end;
    pd__whole query;
    int64_t last = 0;
    pd__libsvm_row row;
    pd_status status = pd__libsvm_query(c, &query);
    bool has_query = status == PD_OK;
    if (status != PD_OK && status != PD_END) return status;
    pd__next_token(&f, &text, &end);
    status = pd__libsvm_label(c, batch, text, end);
    if (has_query) pd__next_token(&f, &text, &end);
    if (status != PD_OK) return status;
    if (!pd__libsvm_open_row(c, batch, &row)) return s->reader.error.status;
    while (status == PD_OK && pd__next_token(&f, &text, &end)) status = pd__libsvm_pair(c, text, end, &last, &row);
    if (status == PD_OK) pd__libsvm_close_row(&row);
    return status;
}

/* Goes to the first line of the next sample, past what is left of a bad query. */
static pd_status pd__libsvm_begin(pd__libsvm *c) {
    for (;;) {
        pd__whole query;
        pd_status status = pd__libsvm_line(c);
        if (status != PD_OK || !c->queries) return status;
        status = pd__libsvm_query(c, &query);
        if (status == PD_END) status = pd_reader_fail(&c->source.reader, PD_E_FORMAT, "no qid behind the label");
        if (status != PD_OK) return pd__lines_locate(&c->lines);
        if (c->bad_query && pd__same_whole(query, c->query)) continue;
        c->bad_query = false;
        c->query = query;
        return PD_OK;
    }
}

/* Goes to the next line of the same query; PD_END when there is none. */
static pd_status pd__libsvm_more(pd__libsvm *c) {
    pd__whole query;
    pd_status status = c->queries ? pd__libsvm_line(c) : PD_END;
    if (status != PD_OK) return status;
    status = pd__libsvm_query(c, &query);
    if (status == PD_OK && pd__same_whole(query, c->query)) return PD_OK;
    c->pending = true;
    return PD_END;
}

/* Reads one sample, or, without a batch, passes over it. When one line of a query is bad, so is all of it. */
static pd_status pd__libsvm_sample(pd__libsvm *c, pd_batch *batch) {
    pd_status status = pd__libsvm_begin(c);
    if (status != PD_OK) return status;
    do {
        status = batch ? pd__libsvm_parse(c, batch) : PD_OK;
        if (status != PD_OK) {
            c->bad_query = c->queries;
            return pd__lines_locate(&c->lines);
        }
        status = pd__libsvm_more(c);
    } while (status == PD_OK);
    if (status == PD_END) return PD_OK;
    c->bad_query = c->queries;
    return status;
}

static pd_status pd__libsvm_read(pd__source *s, pd_batch *batch) { return pd__libsvm_sample((pd__libsvm *)s, batch); }
static pd_status pd__libsvm_step(pd__source *s) { return pd__libsvm_sample((pd__libsvm *)s, NULL); }

static pd_status pd__libsvm_rewind(pd__source *s) {
    pd__libsvm *c = (pd__libsvm *)s;
    c->pending = c->bad_query = false;
    return pd__lines_rewind(&c->lines);
}

static void pd__libsvm_close(pd__source *s) { pd__lines_free(&((pd__libsvm *)s)->lines); }

/* The label is the input of ids, else the second one of width 1, else the first one. */
static pd_status pd__libsvm_inputs(pd__libsvm *c) {
    const pd_slot *slots = c->source.model->slots;
    bool ok = c->source.model->slot_count == 2;
    if (ok)
        c->y = slots[1].kind == PD_SLOT_IDS ||
               (slots[1].kind == PD_SLOT_DENSE && slots[0].kind != PD_SLOT_IDS && slots[1].width == 1);
    c->x = 1 - c->y;
    ok = ok && slots[c->x].kind != PD_SLOT_IDS &&
         (slots[c->y].kind == PD_SLOT_IDS || (slots[c->y].kind == PD_SLOT_DENSE && slots[c->y].width == 1));
    ok = ok && slots[0].sequence == slots[1].sequence;
    if (!ok)
        return pd_reader_fail(
            &c->source.reader, PD_E_SHAPE,
            "libsvm reader: the net must have two inputs, a vector (sparse or not), and a label or a vector of width "
            "1; both or none carry sequences");
    if (slots[c->x].kind == PD_SLOT_SPARSE && c->source.opts.shift != 0)
        return pd_reader_fail(&c->source.reader, PD_E_ARGUMENT,
                              "libsvm reader: shift is %g, but input \"%.100s\" is sparse: absent numbers stay 0",
                              c->source.opts.shift, slots[c->x].name);
    c->queries = slots[0].sequence;
    return PD_OK;
}

static pd_status pd__libsvm_init(pd__libsvm *c, const char *path) {
    pd_status status = pd__check_reader_opts(&c->source, false);
    if (status == PD_OK) status = pd__libsvm_inputs(c);
    return status == PD_OK ? pd__lines_start(&c->lines, &c->source, path) : status;
}

PD_DEF pd_reader *pd_libsvm_reader(pd_net *net, const char *path, const pd_reader_opts *opts) {
    pd__libsvm *c = (pd__libsvm *)pd__source_new(net, "libsvm", sizeof *c, opts);
    if (!c) return NULL;
    c->source.read = pd__libsvm_read;
    c->source.step = pd__libsvm_step;
    c->source.rewind = pd__libsvm_rewind;
    c->source.close = pd__libsvm_close;
    return pd__reader_made(net, &c->source.reader, pd__libsvm_init(c, path));
}

/* ---- >>reader:idx, >>reader:npy: IDX and npy: arrays in binary files ---- */

/* How a file holds one number. */
typedef struct pd__layout {
    char kind; /* f float, i integer, u unsigned, b bool, as npy names them; 0: a kind that can't be read */
    int size;  /* bytes */
    bool big;  /* highest byte first */
} pd__layout;

/* A file: samples first .. first + samples - 1 of an input. */
typedef struct pd__block {
    int64_t first, samples;
    int64_t offset; /* bytes in front of the numbers */
    pd__layout layout;
} pd__block;

/* All files of one input. */
typedef struct pd__column {
    pd__paths paths;
    pd__block *blocks; /* one per path */
    int64_t row;       /* numbers per sample */
    int64_t block;     /* the open one, if `file` */
    FILE *file;
    int64_t position; /* the sample that the file stands at; -1 when unknown */
} pd__column;

typedef struct pd__blocks {
    pd__source source;
    pd__column *columns; /* one per slot */
    /* Reads the header at the start of a file into `block`, and the product of the dims behind the first into *row. */
    pd_status (*header)(pd_reader *r, FILE *file, const char *path, pd__block *block, int64_t *row);
} pd__blocks;

static uint64_t pd__load_bits(pd__layout layout, const unsigned char *from) {
    uint64_t bits = 0;
    if (!layout.big) return pd__load_le(from, layout.size);
    for (int i = 0; i < layout.size; i++) bits = bits << 8 | from[i];
    return bits;
}

/* One number at `from`, of a kind other than 'f'. */
static pd__whole pd__load_whole(pd__layout layout, const unsigned char *from) {
    uint64_t bits = pd__load_bits(layout, from), sign = (uint64_t)1 << (8 * layout.size - 1);
    pd__whole x;
    x.negative = layout.kind == 'i' && (bits & sign);
    x.magnitude = layout.kind == 'b' ? bits != 0 : x.negative ? (~bits & (sign - 1)) + 1 : bits;
    return x;
}

/* One number at `from`, as double. */
static double pd__load_number(pd__layout layout, const unsigned char *from) {
    uint64_t bits;
    pd__whole x;
    if (layout.kind == 'f') {
        bits = pd__load_bits(layout, from);
        if (layout.size == 8) return pd__double_from_bits(bits);
        return layout.size == 4 ? pd__float_from_bits((uint32_t)bits) : pd__half_from_bits((uint32_t)bits);
    }
    x = pd__load_whole(layout, from);
    return x.negative ? -(double)x.magnitude : (double)x.magnitude;
}

/* Adds the number at `from` as an id. */
static pd_status pd__load_id(pd__source *s, pd_batch *batch, int slot, pd__layout layout, const unsigned char *from) {
    pd__whole id;
    double x;
    if (layout.kind != 'f') return pd__add_id(s, batch, slot, pd__load_whole(layout, from));
    x = pd__load_number(layout, from);
    if (x != floor(x) || fabs(x) >= 18446744073709551616.0)
        return pd_reader_fail(&s->reader, PD_E_FORMAT, "%.15g is not an id of 0 to %lld", x,
                              (long long)s->model->slots[slot].width - 1);
    id.negative = x < 0;
    id.magnitude = (uint64_t)fabs(x);
    return pd__add_id(s, batch, slot, id);
}

static const char *pd__column_path(const pd__column *c) { return c->paths.list[c->block]; }

static void pd__column_close(pd__column *c) {
    if (c->file) fclose(c->file);
    c->file = NULL;
}

/* Opens the file that holds sample `at`, and goes there. */
static pd_status pd__column_seek(pd_reader *r, pd__column *c, int64_t at) {
    const pd__block *b = &c->blocks[c->block];
    if (at < b->first || at - b->first >= b->samples) {
        pd__column_close(c);
        while (at < c->blocks[c->block].first) c->block--;
        while (at - c->blocks[c->block].first >= c->blocks[c->block].samples) c->block++;
        b = &c->blocks[c->block];
    }
    if (!c->file) {
        c->file = pd__open_data(r, pd__column_path(c));
        c->position = -1;
    }
    if (!c->file) return PD_E_IO;
    if (c->position == at || pd__seek(c->file, b->offset + (at - b->first) * c->row * b->layout.size)) return PD_OK;
    return pd_reader_fail(r, PD_E_IO, "%.200s: %s", pd__column_path(c), strerror(errno));
}

/* Fails for number `index` of sample `at`, whose message is there. */
static pd_status pd__column_locate(pd_reader *r, const pd__column *c, int64_t at, int64_t index) {
    const pd__block *b = &c->blocks[c->block];
    int64_t offset = b->offset + ((at - b->first) * c->row + index) * b->layout.size;
    return pd__locate(r, "%.200s: offset %lld (sample %lld)", pd__column_path(c), (long long)offset,
                      (long long)(at - b->first));
}

/* Reads the sample that the file stands at into `row`, or, if that is NULL, as an id. */
static pd_status pd__column_read(pd__source *s, pd__column *c, pd_batch *batch, int slot, pd_real *row) {
    pd_reader *r = &s->reader;
    pd__layout layout = c->blocks[c->block].layout;
    unsigned char bytes[8192];
    int64_t most = (int64_t)sizeof bytes / layout.size;
    for (int64_t i = 0; i < c->row; i += most) {
        size_t n = (size_t)pd__min(most, c->row - i);
        if (fread(bytes, (size_t)layout.size, n, c->file) != n) {
            pd_reader_fail(r, PD_E_IO, "%s", ferror(c->file) ? strerror(errno) : "the file has become shorter");
            return pd__column_locate(r, c, s->at, i);
        }
        for (size_t k = 0; k < n; k++) {
            const unsigned char *from = bytes + k * (size_t)layout.size;
            pd_status status = row ? pd__scale_number(s, pd__load_number(layout, from), &row[i + (int64_t)k])
                                   : pd__load_id(s, batch, slot, layout, from);
            if (status != PD_OK) return pd__column_locate(r, c, s->at, i + (int64_t)k);
        }
    }
    return PD_OK;
}

static pd_status pd__blocks_read(pd__source *s, pd_batch *batch) {
    for (int i = 0; i < s->model->slot_count; i++) {
        pd__column *c = &((pd__blocks *)s)->columns[i];
        bool dense = s->model->slots[i].kind == PD_SLOT_DENSE;
        pd_real *row = dense ? pd__add_row(s, batch, i) : NULL;
        pd_status status = dense && !row ? PD_E_MEMORY : pd__column_seek(&s->reader, c, s->at);
        if (status == PD_OK) status = pd__column_read(s, c, batch, i, row);
        c->position = status == PD_OK ? s->at + 1 : -1;
        if (status != PD_OK) return status;
    }
    return PD_OK;
}

static void pd__blocks_close(pd__source *s) {
    const pd_allocator *a = &s->net->allocator;
    pd__column *columns = ((pd__blocks *)s)->columns;
    for (int i = 0; columns && i < s->model->slot_count; i++) {
        pd__column_close(&columns[i]);
        pd__paths_free(a, &columns[i].paths);
        pd_free(a, columns[i].blocks);
    }
    pd_free(a, columns);
}

/* The file must be as long as its header says. */
static pd_status pd__check_block_size(pd_reader *r, FILE *file, const char *path, const pd__block *b, int64_t row) {
    int64_t bytes = 0, expected = 0, actual = pd__file_size(file);
    bool fits = pd__multiply_sizes(row, b->layout.size, &bytes) && pd__multiply_sizes(bytes, b->samples, &expected);
    if (actual < 0) return pd_reader_fail(r, PD_E_IO, "%.200s: %s", path, strerror(errno));
    if (fits && actual >= b->offset && actual - b->offset == expected) return PD_OK;
    return pd_reader_fail(r, PD_E_FORMAT,
                          "%.200s: %lld bytes behind offset %lld, expected %lld samples of %lld numbers of %d bytes",
                          path, (long long)(actual - b->offset), (long long)b->offset, (long long)b->samples,
                          (long long)row, b->layout.size);
}

/* Reads the header of one file and checks it against the input. */
static pd_status pd__block_open(pd__blocks *s, pd__block *b, const char *path, const pd_slot *slot) {
    pd_reader *r = &s->source.reader;
    int64_t row, expected = slot->kind == PD_SLOT_IDS ? 1 : slot->width;
    FILE *file;
    pd_status status = PD_E_IO;
    if (slot->kind == PD_SLOT_SPARSE)
        return pd_reader_fail(r, PD_E_SHAPE, "%.200s: input \"%.100s\" is sparse; see pd_libsvm_reader", path,
                              slot->name);
    file = pd__open_data(r, path);
    if (file) status = s->header(r, file, path, b, &row);
    if (status == PD_OK && row != expected)
        status = pd_reader_fail(r, PD_E_SHAPE, "%.200s: %lld numbers per sample, but input \"%.100s\" takes %lld", path,
                                (long long)row, slot->name, (long long)expected);
    if (status == PD_OK) status = pd__check_block_size(r, file, path, b, row);
    if (file) fclose(file);
    return status;
}

/* Reads the headers of all files of one input; what they hold together is added to *samples. */
static pd_status pd__column_init(pd__blocks *s, pd__column *c, const char *path, const pd_slot *slot,
                                 int64_t *samples) {
    const pd_allocator *a = &s->source.net->allocator;
    pd_status status = pd__paths_expand(&c->paths, &s->source.reader, a, path);
    if (status != PD_OK) return status;
    c->row = slot->kind == PD_SLOT_IDS ? 1 : slot->width;
    c->blocks = (pd__block *)pd_alloc(a, c->paths.count, sizeof *c->blocks);
    if (!c->blocks) return pd__reader_no_memory(&s->source.reader, "a reader");
    for (int64_t i = 0; status == PD_OK && i < c->paths.count; i++) {
        pd__block *b = &c->blocks[i];
        status = pd__block_open(s, b, c->paths.list[i], slot);
        b->first = *samples;
        if (status == PD_OK && b->samples > INT64_MAX - *samples)
            status = pd_reader_fail(&s->source.reader, PD_E_FORMAT, "%.200s: too many samples", c->paths.list[i]);
        if (status == PD_OK) *samples += b->samples;
    }
    return status;
}

static pd_status pd__blocks_init(pd__blocks *s, const char *const *paths, int count) {
    pd__source *source = &s->source;
    const pd_slot *slots = source->model->slots;
    pd_reader *r = &source->reader;
    pd_status status = pd__check_reader_opts(source, false);
    if (status == PD_OK) status = pd__check_no_sequences(source);
    if (status == PD_OK && (!paths || count != source->model->slot_count))
        status = pd_reader_fail(r, PD_E_ARGUMENT, "%s reader: %d paths, expected %d, one per input", r->name,
                                paths ? count : 0, source->model->slot_count);
    if (status != PD_OK) return status;
    s->columns = (pd__column *)pd_alloc(&source->net->allocator, count, sizeof *s->columns);
    if (!s->columns) return pd__reader_no_memory(r, "a reader");
    for (int i = 0; i < count; i++) {
        int64_t samples = 0;
        status = pd__column_init(s, &s->columns[i], paths[i], &slots[i], &samples);
        if (status != PD_OK) return status;
        if (i == 0) source->total = samples;
        if (samples != source->total)
            return pd_reader_fail(r, PD_E_SHAPE,
                                  "%.150s: %lld samples for input \"%.100s\", but input \"%.100s\" has %lld", paths[i],
                                  (long long)samples, slots[i].name, slots[0].name, (long long)source->total);
    }
    return PD_OK;
}

static pd_reader *pd__blocks_new(pd_net *net, const char *name, const char *const *paths, int count,
                                 const pd_reader_opts *opts,
                                 pd_status (*header)(pd_reader *, FILE *, const char *, pd__block *, int64_t *)) {
    pd__blocks *s = (pd__blocks *)pd__source_new(net, name, sizeof *s, opts);
    if (!s) return NULL;
    s->header = header;
    s->source.read = pd__blocks_read;
    s->source.close = pd__blocks_close;
    return pd__reader_made(net, &s->source.reader, pd__blocks_init(s, paths, count));
}

/* Reads `n` bytes of a header, at *offset, which moves on. */
static pd_status pd__header_bytes(pd_reader *r, FILE *file, const char *path, void *to, size_t n, int64_t *offset) {
    if (fread(to, 1, n, file) == n) {
        *offset += (int64_t)n;
        return PD_OK;
    }
    if (ferror(file)) return pd_reader_fail(r, PD_E_IO, "%.200s: %s", path, strerror(errno));
    return pd_reader_fail(r, PD_E_FORMAT, "%.200s: it ends within the %lld bytes of the header at offset %lld", path,
                          (long long)n, (long long)*offset);
}

/* Appends a dim: the first is the number of samples. False when the product does not fit. */
static bool pd__add_dim(pd__block *b, int index, int64_t dim, int64_t *row) {
    if (index == 0) b->samples = dim;
    return index == 0 || pd__multiply_sizes(*row, dim, row);
}

/* IDX: 0, 0, the type, the number of dims, then the dims as 32-bit integers, highest byte first. */
static pd_status pd__idx_header(pd_reader *r, FILE *file, const char *path, pd__block *b, int64_t *row) {
    static const pd__layout layouts[] = { { 'u', 1, true }, { 'i', 1, true }, { 0, 0, true },  { 'i', 2, true },
                                          { 'i', 4, true }, { 'f', 4, true }, { 'f', 8, true } }; /* types 8 to 14 */
    static const pd__layout dim_layout = { 'u', 4, true };
    unsigned char magic[4], dim[4];
    pd_status status = pd__header_bytes(r, file, path, magic, 4, &b->offset);
    if (status != PD_OK) return status;
    if (magic[0] != 0 || magic[1] != 0 || magic[2] < 8 || magic[2] > 14 || !layouts[magic[2] - 8].kind || magic[3] == 0)
        return pd_reader_fail(r, PD_E_FORMAT, "%.200s: it begins with %02x %02x %02x %02x, which is not an IDX file",
                              path, magic[0], magic[1], magic[2], magic[3]);
    b->layout = layouts[magic[2] - 8];
    *row = 1;
    for (int i = 0; i < magic[3]; i++) {
        status = pd__header_bytes(r, file, path, dim, 4, &b->offset);
        if (status != PD_OK) return status;
        if (!pd__add_dim(b, i, (int64_t)pd__load_bits(dim_layout, dim), row))
            return pd_reader_fail(r, PD_E_FORMAT, "%.200s: offset 4: the product of the dims is too large", path);
    }
    return PD_OK;
}

PD_DEF pd_reader *pd_idx_reader(pd_net *net, const char *const *paths, int count, const pd_reader_opts *opts) {
    return pd__blocks_new(net, "idx", paths, count, opts, pd__idx_header);
}

#define PD__NPY_HEADER_MAX 10000 /* bytes; NumPy itself reads no more unless told to */

/* The text of an npy header, a Python dict, read up to `at`. */
typedef struct pd__npy {
    const char *text, *at, *end;
} pd__npy;

/* Passes over white space, then over the character `c`, if it is there. */
static bool pd__npy_take(pd__npy *p, char c) {
    while (p->at < p->end && (*p->at == ' ' || (*p->at >= '\t' && *p->at <= '\r'))) p->at++;
    if (p->at == p->end || *p->at != c) return false;
    p->at++;
    return true;
}

static bool pd__npy_take_word(pd__npy *p, const char *word) {
    size_t n = strlen(word);
    if (!pd__npy_take(p, word[0])) return false;
    p->at--;
    if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n) != 0) return false;
    p->at += n;
    return true;
}

/* A string in either quotes, without escapes, into `text`; false when there is none or it is longer. */
static bool pd__npy_string(pd__npy *p, char *text, size_t size) {
    size_t n = 0;
    char quote = '\'';
    if (!pd__npy_take(p, quote) && !pd__npy_take(p, quote = '"')) return false;
    while (p->at < p->end && *p->at != quote && *p->at != '\\' && n + 1 < size) text[n++] = *p->at++;
    text[n] = 0;
    return pd__npy_take(p, quote);
}

/* '<f4': byte order, kind, size. */
static bool pd__npy_layout(const char *text, pd__layout *layout) {
    static const uint16_t one = 1;
    unsigned char lowest;
    const char *order = strchr("<>|=", text[0]);
    if (!order || strlen(text) != 3 || !strchr("fiub", text[1]) || !strchr("1248", text[2])) return false;
    memcpy(&lowest, &one, 1);
    layout->kind = text[1];
    layout->size = text[2] - '0';
    layout->big = *order == '>' || (*order == '=' && lowest == 0);
    if (*order == '|' && layout->size > 1) return false;
    return text[1] == 'f' ? layout->size > 1 : text[1] != 'b' || layout->size == 1;
}

/* "(3, 4)", "(3,)": at least one dim. *count gets their number. */
static bool pd__npy_shape(pd__npy *p, pd__block *b, int64_t *row, int *count) {
    if (!pd__npy_take(p, '(')) return false;
    for (*count = 0, *row = 1; !pd__npy_take(p, ')'); ++*count) {
        int64_t dim = 0;
        const char *digits;
        if (*count == 64 || (*count > 0 && !pd__npy_take(p, ','))) return false;
        if (pd__npy_take(p, ')')) break;
        for (digits = p->at; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
            if (dim > (INT64_MAX - 9) / 10) return false;
            dim = 10 * dim + (*p->at - '0');
        }
        if (p->at == digits || !pd__add_dim(b, *count, dim, row)) return false;
    }
    return *count > 0;
}

/* {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }: these three keys, in any order. */
static pd_status pd__npy_dict(pd_reader *r, pd__npy *p, const char *path, pd__block *b, int64_t *row) {
    static const char *const keys[] = { "descr", "fortran_order", "shape" };
    char key[16], descr[64] = "";
    bool fortran = false, ok = pd__npy_take(p, '{');
    int found = 0, axes = 0;
    while (ok && !pd__npy_take(p, '}')) {
        int k = 0;
        ok = pd__npy_string(p, key, sizeof key) && pd__npy_take(p, ':');
        while (ok && k < 3 && strcmp(key, keys[k]) != 0) k++;
        ok = ok && k < 3 && !(found & 1 << k);
        found |= 1 << k;
        if (ok && k == 0 && pd__npy_take(p, '['))
            return pd_reader_fail(r, PD_E_UNSUPPORTED, "%.200s: structured elements can't be read", path);
        if (ok && k == 0) ok = pd__npy_string(p, descr, sizeof descr);
        if (ok && k == 1) ok = (fortran = pd__npy_take_word(p, "True")) || pd__npy_take_word(p, "False");
        if (ok && k == 2) ok = pd__npy_shape(p, b, row, &axes);
        if (ok && !pd__npy_take(p, ',')) {
            ok = pd__npy_take(p, '}');
            break;
        }
    }
    if (!ok || found != 7)
        return pd_reader_fail(r, PD_E_FORMAT,
                              "%.200s: malformed near byte %lld of the header, which must have descr, "
                              "fortran_order and shape, of one axis or more",
                              path, (long long)(p->at - p->text));
    if (!pd__npy_layout(descr, &b->layout))
        return pd_reader_fail(r, PD_E_UNSUPPORTED,
                              "%.200s: elements of type \"%s\" can't be read; float, integer and bool can", path,
                              descr);
    if (fortran && axes > 1)
        return pd_reader_fail(r, PD_E_UNSUPPORTED, "%.200s: it is in Fortran order; save numpy.ascontiguousarray of it",
                              path);
    return PD_OK;
}

/* npy: "\x93NUMPY", version, length of the header, little-endian in 2 bytes (from version 2 on: 4), the header. */
static pd_status pd__npy_header(pd_reader *r, FILE *file, const char *path, pd__block *b, int64_t *row) {
    unsigned char magic[8], bytes[4];
    char text[PD__NPY_HEADER_MAX];
    size_t length;
    pd__npy p;
    pd_status status = pd__header_bytes(r, file, path, magic, 8, &b->offset);
    if (status != PD_OK) return status;
    if (memcmp(magic, "\x93NUMPY", 6) != 0 || magic[6] < 1 || magic[6] > 3)
        return pd_reader_fail(r, PD_E_FORMAT, "%.200s: it is not an .npy file of version 1, 2 or 3", path);
    status = pd__header_bytes(r, file, path, bytes, magic[6] == 1 ? 2 : 4, &b->offset);
    if (status != PD_OK) return status;
    length = (size_t)pd__load_le(bytes, magic[6] == 1 ? 2 : 4);
    if (length > sizeof text)
        return pd_reader_fail(r, PD_E_FORMAT, "%.200s: offset 8: the header has %lld bytes, expected %d at most", path,
                              (long long)length, PD__NPY_HEADER_MAX);
    status = pd__header_bytes(r, file, path, text, length, &b->offset);
    p.text = p.at = text;
    p.end = text + length;
    return status == PD_OK ? pd__npy_dict(r, &p, path, b, row) : status;
}

PD_DEF pd_reader *pd_npy_reader(pd_net *net, const char *const *paths, int count, const pd_reader_opts *opts) {
    return pd__blocks_new(net, "npy", paths, count, opts, pd__npy_header);
}

/* ---- >>reader:stream: streams ---- */

typedef struct pd__stream {
    pd__source source;
    pd_status (*next)(void *user, pd_batch *batch);
    pd_status (*reset)(void *user, int64_t pass); /* NULL: it can't go back */
    void *user;
    int64_t pass;
    bool begun; /* that pass */
} pd__stream;

static pd_status pd__stream_reset(pd_reader *r, int64_t pass) {
    pd__stream *stream = (pd__stream *)r->self;
    pd_status status = stream->reset ? stream->reset(stream->user, pass) : PD_OK;
    pd__source_reset(r, pass);
    stream->pass = pass;
    stream->begun = status == PD_OK;
    if (status == PD_OK) return PD_OK;
    return pd_reader_fail(r, status == PD_END ? PD_E_STATE : status, "stream reader: pass %lld could not be begun: %s",
                          (long long)pass, pd_status_text(status));
}

static pd_status pd__stream_read(pd__source *s, pd_batch *batch) {
    pd__stream *stream = (pd__stream *)s;
    int64_t samples = batch->samples;
    pd_status status = stream->begun ? PD_OK : pd__stream_reset(&s->reader, stream->pass);
    if (status != PD_OK) return status;
    batch->error.status = PD_OK;
    status = stream->next(stream->user, batch);
    if (batch->samples != samples) {
        batch->samples = pd__min(batch->samples, samples);
        return pd_reader_fail(&s->reader, PD_E_STATE,
                              "stream reader: sample %lld: the function ended the sample itself", (long long)s->at);
    }
    if (status == PD_OK || status == PD_END) return status;
    if (batch->error.status == status) pd__reader_batch_failed(&s->reader, batch);
    else pd_reader_fail(&s->reader, status, "%s", pd_status_text(status));
    return pd__locate(&s->reader, "stream reader: sample %lld", (long long)s->at);
}

static pd_status pd__stream_step(pd__source *s) {
    pd_status status = pd__stream_read(s, s->model);
    pd_batch_clear(s->model);
    return status;
}

/* A trainer that goes on in the middle of a pass passes over what it has seen. Where a stream can't go back, that is
   gone already. */
static pd_status pd__stream_skip(pd_reader *r, int64_t samples) {
    return ((pd__stream *)r->self)->reset ? pd__source_skip(r, samples) : PD_OK;
}

PD_DEF pd_reader *pd_stream_reader(pd_net *net, pd_status (*next)(void *user, pd_batch *batch),
                                   pd_status (*reset)(void *user, int64_t pass), void *user) {
    pd__stream *s = (pd__stream *)pd__source_new(net, "stream", sizeof *s, NULL);
    pd_status status = PD_OK;
    if (!s) return NULL;
    s->next = next;
    s->reset = reset;
    s->user = user;
    s->source.reader.reset = pd__stream_reset;
    s->source.read = pd__stream_read;
    s->source.step = pd__stream_step;
    s->source.reader.skip = pd__stream_skip;
    if (!next) status = pd_reader_fail(&s->source.reader, PD_E_ARGUMENT, "stream reader: no function given");
    return pd__reader_made(net, &s->source.reader, status);
}

/* ---- readers around a reader ---- */

/* What the inner reader failed with; it may have left no message. */
static void pd__copy_failure(pd_failure *to, const pd_reader *inner, pd_status status) {
    *to = inner->error;
    if (to->status == status) return;
    to->status = status;
    snprintf(to->text, sizeof to->text, "%.100s reader: %s", inner->name, pd_status_text(status));
}

static pd_status pd__reader_take_failure(pd_reader *r, const pd_reader *inner, pd_status status) {
    pd__copy_failure(&r->error, inner, status);
    return status;
}

/* One call of the inner reader's `next`. */
static pd_status pd__inner_next(pd_reader *r, pd_reader *inner, pd_batch *batch, int64_t count) {
    pd_status status = inner->next(inner, batch, count);
    return status == PD_OK || status == PD_END ? status : pd__reader_take_failure(r, inner, status);
}

static pd_status pd__inner_reset(pd_reader *r, pd_reader *inner, int64_t pass) {
    pd_status status = inner->reset(inner, pass);
    return status == PD_OK ? status : pd__reader_take_failure(r, inner, status);
}

static pd_status pd__inner_shard(pd_reader *r, pd_reader *inner, int rank, int count) {
    pd_status status = pd_reader_shard(inner, rank, count);
    return status == PD_OK ? status : pd__reader_take_failure(r, inner, status);
}

static int64_t pd__inner_size(pd_reader *inner) { return inner->size ? inner->size(inner) : -1; }

/* A reader of `size` bytes, which begin with the pd_reader, around `inner`. NULL on failure: then `inner` has been
   freed and the message is in the net. */
static void *pd__around(pd_net *net, pd_reader *inner, size_t size, const pd_reader *functions) {
    pd_reader *r = net ? (pd_reader *)pd_alloc(&net->allocator, 1, size) : NULL;
    if (!r) {
        pd__no_memory(net, "a reader");
        pd_reader_free(inner);
        return NULL;
    }
    *r = *functions;
    r->self = r;
    return r;
}

/* ---- >>reader:shuffle: shuffling ---- */

/* A pool of samples to draw from. What was drawn stays in its batch until that is half as large again as the pool. */
typedef struct pd__shuffle {
    pd_reader reader;
    pd_reader *inner;
    pd_net *net;
    int64_t pool;
    uint64_t seed, key; /* the key is that of the pass */
    uint64_t draws;     /* in this pass */
    pd_batch *batch;
    int64_t known; /* samples of the batch that `left` or `drawn` know of */
    int64_t *left; /* the samples of the batch not yet drawn, in any order */
    int64_t left_count, left_capacity;
    unsigned char *drawn; /* per sample of the batch */
    int64_t drawn_capacity;
    bool ended; /* the inner reader's pass */
} pd__shuffle;

static void pd__shuffle_begin(pd__shuffle *s, int64_t pass) {
    s->key = pd__subkey(s->seed, (uint64_t)pass);
    s->draws = 0;
    s->known = s->left_count = 0;
    s->ended = false;
    pd_batch_clear(s->batch);
}

/* Takes what was drawn out of the batch. */
static void pd__shuffle_tidy(pd__shuffle *s) {
    if (s->batch->samples - s->pool < s->pool / 2 || s->left_count == s->batch->samples) return;
    pd__remove_samples(s->batch, s->drawn);
    s->known = s->left_count = s->batch->samples;
    memset(s->drawn, 0, (size_t)s->known);
    for (int64_t i = 0; i < s->known; i++) s->left[i] = i;
}

/* Makes the samples that the batch has got lately ones that can be drawn. */
static pd_status pd__shuffle_note(pd__shuffle *s) {
    const pd_allocator *a = &s->net->allocator;
    if (!pd_grow(a, (void **)&s->left, &s->left_capacity, s->batch->samples, sizeof *s->left) ||
        !pd_grow(a, (void **)&s->drawn, &s->drawn_capacity, s->batch->samples, 1))
        return pd__reader_no_memory(&s->reader, "the pool of samples");
    for (; s->known < s->batch->samples; s->known++) {
        s->left[s->left_count++] = s->known;
        s->drawn[s->known] = 0;
    }
    return PD_OK;
}

/* Fills the pool up. */
static pd_status pd__shuffle_fill(pd__shuffle *s) {
    pd_status status = pd__shuffle_note(s);
    while (status == PD_OK && !s->ended && s->left_count < s->pool) {
        pd_status noted;
        pd__shuffle_tidy(s);
        status = pd__inner_next(&s->reader, s->inner, s->batch, s->pool - s->left_count);
        noted = pd__shuffle_note(s);
        s->ended = status == PD_END;
        if (status == PD_END) status = PD_OK;
        if (status == PD_OK) status = noted;
    }
    return status;
}

/* Hands out one sample, or, without a batch, forgets it. */
static pd_status pd__shuffle_draw(pd__shuffle *s, pd_batch *batch) {
    int64_t k, sample;
    pd_status status = pd__shuffle_fill(s);
    if (status != PD_OK) return status;
    if (s->left_count == 0) return PD_END;
    k = pd__below(s->key, s->draws, s->left_count);
    sample = s->left[k];
    if (batch && pd_batch_copy_sample(batch, s->batch, sample) != PD_OK)
        return pd__reader_batch_failed(&s->reader, batch);
    s->draws++;
    s->drawn[sample] = 1;
    s->left[k] = s->left[--s->left_count];
    return PD_OK;
}

static pd_status pd__shuffle_next(pd_reader *r, pd_batch *batch, int64_t count) {
    pd_status status = pd__check_next(r, batch, count);
    for (int64_t i = 0; status == PD_OK && i < count; i++) status = pd__shuffle_draw((pd__shuffle *)r->self, batch);
    return status;
}

/* Draws them all the same, so that the order is as if they had been handed out. */
static pd_status pd__shuffle_skip(pd_reader *r, int64_t samples) {
    pd_status status = PD_OK;
    for (int64_t i = 0; status == PD_OK && i < samples; i++) status = pd__shuffle_draw((pd__shuffle *)r->self, NULL);
    return status;
}

static pd_status pd__shuffle_reset(pd_reader *r, int64_t pass) {
    pd__shuffle *s = (pd__shuffle *)r->self;
    pd__shuffle_begin(s, pass);
    return pd__inner_reset(r, s->inner, pass);
}

static pd_status pd__shuffle_shard(pd_reader *r, int rank, int count) {
    pd__shuffle *s = (pd__shuffle *)r->self;
    pd__shuffle_begin(s, 0);
    return pd__inner_shard(r, s->inner, rank, count);
}

static int64_t pd__shuffle_size(pd_reader *r) { return pd__inner_size(((pd__shuffle *)r->self)->inner); }

static void pd__shuffle_free(pd_reader *r) {
    pd__shuffle *s = (pd__shuffle *)r->self;
    const pd_allocator *a = &s->net->allocator;
    pd_reader_free(s->inner);
    pd_batch_free(s->batch);
    pd_free(a, s->left);
    pd_free(a, s->drawn);
    pd_free(a, s);
}

PD_DEF pd_reader *pd_shuffle(pd_net *net, pd_reader *reader, int64_t pool, uint64_t seed) {
    static const pd_reader functions = { PD_API_VERSION,    "shuffle",        NULL,
                                         { PD_OK, "" },     pd__shuffle_next, pd__shuffle_reset,
                                         pd__shuffle_shard, pd__shuffle_skip, pd__shuffle_size,
                                         pd__shuffle_free };
    pd__shuffle *s = reader ? (pd__shuffle *)pd__around(net, reader, sizeof *s, &functions) : NULL;
    pd_status status = PD_OK;
    if (!s) return NULL;
    s->inner = reader;
    s->net = net;
    s->pool = pool;
    s->seed = seed;
    s->batch = pd_batch_new(net);
    if (!s->batch) status = pd__reader_no_memory(&s->reader, "the pool of samples");
    else pd__shuffle_begin(s, 0);
    if (pool < 1)
        status = pd_reader_fail(&s->reader, PD_E_ARGUMENT, "pd_shuffle: the pool is %lld, expected 1 or more",
                                (long long)pool);
    return pd__reader_made(net, &s->reader, status);
}

/* ---- >>reader:prefetch: reading ahead ---- */

/* One batch read ahead, and what `next` returned with it. */
typedef struct pd__ready {
    pd_batch *batch;
    pd_status status;
    pd_failure error;
} pd__ready;

/* A ring of batches: the thread fills them at its end, the caller takes them from its start. The thread owns the inner
   reader while it runs, and the batch behind the last filled one; all else is the caller's, but for what is marked. */
typedef struct pd__prefetch {
    pd_reader reader;
    pd_reader *inner;
    pd_net *net;
    int64_t size;  /* of the inner reader, asked while no thread runs */
    int64_t count; /* samples in each batch: as many as the first call in a pass wanted */
    int64_t taken; /* samples of the first filled batch that have been handed out */
    bool ended;    /* PD_END has been handed out */
    bool running;  /* the thread has been started and not joined */
    pd__ready *ring;
    int depth;
    int first, filled; /* shared, under the mutex */
    bool stop;         /* shared */
    bool over;         /* shared: PD_END is in the ring, or was */
#ifdef PD__THREADS
    bool has_mutex, has_condition;
    pd__mutex mutex;
    pd__condition changed;
    pd__thread thread;
#endif
} pd__prefetch;

#ifdef PD__THREADS

/* Reads the next batch into the ring; called without the mutex. */
static void pd__prefetch_fill(pd__prefetch *p, pd__ready *ready) {
    pd_batch_clear(ready->batch);
    ready->status = p->inner->next(p->inner, ready->batch, p->count);
    if (ready->status != PD_OK && ready->status != PD_END) pd__copy_failure(&ready->error, p->inner, ready->status);
}

static pd__thread_result PD__THREAD_CALL pd__prefetch_run(void *argument) {
    pd__prefetch *p = (pd__prefetch *)argument;
    pd__lock(&p->mutex);
    while (!p->stop && !p->over) {
        pd__ready *ready = &p->ring[(p->first + p->filled) % p->depth];
        if (p->filled == p->depth) {
            pd__wait(&p->changed, &p->mutex);
            continue;
        }
        pd__unlock(&p->mutex);
        pd__prefetch_fill(p, ready);
        pd__lock(&p->mutex);
        p->filled++;
        p->over = ready->status == PD_END;
        pd__wake(&p->changed);
    }
    pd__unlock(&p->mutex);
    return (pd__thread_result)0;
}

static bool pd__prefetch_init_thread(pd__prefetch *p) {
    p->has_mutex = pd__mutex_init(&p->mutex);
    p->has_condition = p->has_mutex && pd__condition_init(&p->changed);
    return p->has_condition;
}

static void pd__prefetch_free_thread(pd__prefetch *p) {
    if (p->has_condition) pd__condition_free(&p->changed);
    if (p->has_mutex) pd__mutex_free(&p->mutex);
}

/* Starts the thread unless it runs or has nothing left to do. Should that fail, samples are read when asked for. */
static void pd__prefetch_start(pd__prefetch *p, int64_t count) {
    if (p->running || p->over || p->ended) return;
    p->count = count;
    p->stop = false;
    p->running = pd__thread_start(&p->thread, pd__prefetch_run, p);
}

/* Waits until the thread is through with the batch that it reads, and has ended. */
static void pd__prefetch_stop(pd__prefetch *p) {
    if (!p->running) return;
    pd__lock(&p->mutex);
    p->stop = true;
    pd__wake(&p->changed);
    pd__unlock(&p->mutex);
    pd__thread_join(p->thread);
    p->running = false;
}

/* The first filled batch; waits for it while the thread runs. NULL when there is none. */
static pd__ready *pd__prefetch_front(pd__prefetch *p) {
    bool filled;
    pd__lock(&p->mutex);
    while (p->running && p->filled == 0 && !p->over) pd__wait(&p->changed, &p->mutex);
    filled = p->filled > 0;
    pd__unlock(&p->mutex);
    return filled ? &p->ring[p->first] : NULL;
}

/* Gives the first batch back to the thread. Returns the status that came with it. */
static pd_status pd__prefetch_release(pd__prefetch *p) {
    const pd__ready *ready = &p->ring[p->first];
    pd_status status = ready->status;
    p->ended = status == PD_END;
    if (status != PD_OK && status != PD_END) p->reader.error = ready->error;
    p->taken = 0;
    pd__lock(&p->mutex);
    p->first = (p->first + 1) % p->depth;
    p->filled--;
    pd__wake(&p->changed);
    pd__unlock(&p->mutex);
    return status;
}

#else /* Nothing is ever read ahead. */

static bool pd__prefetch_init_thread(pd__prefetch *p) { return p != NULL; }
static void pd__prefetch_free_thread(pd__prefetch *p) { (void)p; }
static void pd__prefetch_start(pd__prefetch *p, int64_t count) { p->count = count; }
static void pd__prefetch_stop(pd__prefetch *p) { (void)p; }
static pd__ready *pd__prefetch_front(pd__prefetch *p) { return p->filled > 0 ? p->ring : NULL; }
static pd_status pd__prefetch_release(pd__prefetch *p) { return p->ring->status; }

#endif

/* Gives an empty batch all samples of another by exchanging their memory. */
static void pd__swap_batches(pd_batch *batch, pd_batch *from) {
    for (int i = 0; i < batch->slot_count; i++) {
        pd_slot kept = batch->slots[i];
        batch->slots[i] = from->slots[i];
        from->slots[i] = kept;
    }
    batch->samples = from->samples;
    pd_batch_clear(from);
}

/* Hands out `count` samples of the first batch, or, without `batch`, forgets them. */
static pd_status pd__prefetch_move(pd__prefetch *p, pd_batch *from, pd_batch *batch, int64_t count) {
    if (!batch) {
        p->taken += count;
    } else if (count == from->samples && batch->samples == 0 && batch->net == p->net &&
               pd__batches_alike(batch, from)) {
        pd__swap_batches(batch, from);
    } else {
        for (int64_t i = 0; i < count; i++, p->taken++)
            if (pd_batch_copy_sample(batch, from, p->taken) != PD_OK) return pd__reader_batch_failed(&p->reader, batch);
    }
    return PD_OK;
}

/* Hands out samples that have been read ahead, up to *count, which goes down. A status that came with them is told once
   the samples before it are gone and more are wanted. */
static pd_status pd__prefetch_take(pd__prefetch *p, pd_batch *batch, int64_t *count) {
    pd_status status = p->ended ? PD_END : PD_OK;
    while (status == PD_OK && *count > 0) {
        pd__ready *ready = pd__prefetch_front(p);
        int64_t n = ready ? pd__min(ready->batch->samples - p->taken, *count) : 0;
        if (!ready) break;
        status = pd__prefetch_move(p, ready->batch, batch, n);
        if (status != PD_OK) return status;
        *count -= n;
        if (p->taken == ready->batch->samples && (ready->status == PD_OK || *count > 0))
            status = pd__prefetch_release(p);
    }
    return status;
}

static pd_status pd__prefetch_next(pd_reader *r, pd_batch *batch, int64_t count) {
    pd__prefetch *p = (pd__prefetch *)r->self;
    pd_status status = pd__check_next(r, batch, count);
    if (status != PD_OK || count == 0) return status;
    pd__prefetch_start(p, count);
    status = pd__prefetch_take(p, batch, &count);
    if (status == PD_OK && count > 0) status = pd__inner_next(r, p->inner, batch, count);
    if (status == PD_END) p->ended = true;
    return status;
}

static pd_status pd__inner_skip(pd_reader *r, pd_reader *inner, int64_t samples, pd_batch *scratch) {
    pd_status status = PD_OK;
    if (inner->skip) {
        status = inner->skip(inner, samples);
        return status == PD_OK || status == PD_END ? status : pd__reader_take_failure(r, inner, status);
    }
    for (int64_t n; status == PD_OK && samples > 0; samples -= n) {
        n = pd__min(samples, 256);
        pd_batch_clear(scratch);
        status = pd__inner_next(r, inner, scratch, n);
    }
    return status;
}

static pd_status pd__prefetch_skip(pd_reader *r, int64_t samples) {
    pd__prefetch *p = (pd__prefetch *)r->self;
    pd_status status;
    pd__prefetch_stop(p);
    status = pd__prefetch_take(p, NULL, &samples);
    if (status == PD_OK && samples > 0) status = pd__inner_skip(r, p->inner, samples, p->ring[0].batch);
    if (status == PD_END) p->ended = true;
    return status;
}

/* Forgets all that was read ahead. */
static void pd__prefetch_begin(pd__prefetch *p) {
    pd__prefetch_stop(p);
    p->first = p->filled = 0;
    p->taken = 0;
    p->over = p->ended = false;
}

static pd_status pd__prefetch_reset(pd_reader *r, int64_t pass) {
    pd__prefetch *p = (pd__prefetch *)r->self;
    pd__prefetch_begin(p);
    return pd__inner_reset(r, p->inner, pass);
}

static pd_status pd__prefetch_shard(pd_reader *r, int rank, int count) {
    pd__prefetch *p = (pd__prefetch *)r->self;
    pd_status status;
    pd__prefetch_begin(p);
    status = pd__inner_shard(r, p->inner, rank, count);
    p->size = pd__inner_size(p->inner);
    return status;
}

static int64_t pd__prefetch_size(pd_reader *r) { return ((pd__prefetch *)r->self)->size; }

static void pd__prefetch_free(pd_reader *r) {
    pd__prefetch *p = (pd__prefetch *)r->self;
    pd_net *net = p->net;
    pd__prefetch_stop(p);
    pd__prefetch_free_thread(p);
    for (int i = 0; p->ring && i < p->depth; i++) pd_batch_free(p->ring[i].batch);
    pd_reader_free(p->inner);
    pd_free(&net->allocator, p->ring);
    pd_free(&net->allocator, p);
}

static pd_status pd__prefetch_init(pd__prefetch *p, int depth) {
    if (depth < 1)
        return pd_reader_fail(&p->reader, PD_E_ARGUMENT, "pd_prefetch: depth is %d, expected 1 or more", depth);
    if (!pd__prefetch_init_thread(p)) return pd_reader_fail(&p->reader, PD_E_MEMORY, "pd_prefetch: no mutex to be had");
    p->ring = (pd__ready *)pd_alloc(&p->net->allocator, depth, sizeof *p->ring);
    p->depth = p->ring ? depth : 0;
    for (int i = 0; i < p->depth; i++) {
        p->ring[i].batch = pd_batch_new(p->net);
        if (!p->ring[i].batch) return pd__reader_no_memory(&p->reader, "batches to read ahead");
    }
    return p->ring ? PD_OK : pd__reader_no_memory(&p->reader, "batches to read ahead");
}

PD_DEF pd_reader *pd_prefetch(pd_net *net, pd_reader *reader, int depth) {
    static const pd_reader functions = { PD_API_VERSION,     "prefetch",        NULL,
                                         { PD_OK, "" },      pd__prefetch_next, pd__prefetch_reset,
                                         pd__prefetch_shard, pd__prefetch_skip, pd__prefetch_size,
                                         pd__prefetch_free };
    pd__prefetch *p = reader ? (pd__prefetch *)pd__around(net, reader, sizeof *p, &functions) : NULL;
    if (!p) return NULL;
    p->inner = reader;
    p->net = net;
    p->size = pd__inner_size(reader);
    return pd__reader_made(net, &p->reader, pd__prefetch_init(p, depth));
}

/* ======================================================================================================== */
/* >>text.c                                                                                                */

/* Defined with >>files.c. */
static int pd__utf8_length(const unsigned char *s, size_t n);
static size_t pd__utf8_prefix(const char *text, size_t n);

/* ---- words in a text ---- */

/* White space of ASCII, whatever the locale. */
static bool pd__is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/* Does it stand between words? */
static bool pd__is_gap(bool characters, char c) {
    return characters ? c == '\t' || c == '\n' || c == '\r' : pd__is_space(c);
}

/* Takes the next word, of *length bytes, off a text that is UTF-8; false when there is none. */
static bool pd__next_word(bool characters, const char **at, const char *end, const char **word, int64_t *length) {
    while (*at < end && pd__is_gap(characters, **at)) ++*at;
    *word = *at;
    if (characters && *at < end) *at += pd__utf8_length((const unsigned char *)*at, (size_t)(end - *at));
    while (!characters && *at < end && !pd__is_space(**at)) ++*at;
    *length = *at - *word;
    return *length > 0;
}

/* Narrows a line to its column k, from 0; false when there are fewer. */
static bool pd__find_column(const char **at, const char **end, int k) {
    for (;; k--) {
        const char *tab = (const char *)memchr(*at, '\t', (size_t)(*end - *at));
        if (k == 0 && tab) *end = tab;
        if (k == 0 || !tab) return k == 0;
        *at = tab + 1;
    }
}

static int64_t pd__count_columns(const pd__lines *l) {
    int64_t n = 1;
    for (int64_t i = 0; i < l->length; i++) n += l->line[i] == '\t';
    return n;
}

/* Bytes in front of the first that can't be in a text: a zero, or one that isn't proper UTF-8. */
static int64_t pd__text_prefix(const char *text, int64_t n) {
    const char *zero = (const char *)memchr(text, 0, (size_t)n);
    return (int64_t)pd__utf8_prefix(text, zero ? (size_t)(zero - text) : (size_t)n);
}

static pd_status pd__check_line(const pd__lines *l) {
    int64_t n = pd__text_prefix(l->line, l->length);
    if (n == l->length) return PD_OK;
    return pd_reader_fail(l->reader, PD_E_FORMAT, "byte %lld: 0x%02x, expected text in UTF-8", (long long)n + 1,
                          (unsigned)(unsigned char)l->line[n]);
}

/* ---- sets of words ---- */

/* Words with numbers from 0, as they came. */
typedef struct pd__words {
    char *bytes;     /* the words, a zero behind each */
    int64_t *starts; /* of each in `bytes` */
    int64_t *table;  /* a hash table: 1 + number, or 0; its size is a power of two, and at least twice `count` */
    int64_t count, used, table_size, byte_capacity, start_capacity;
} pd__words;

static void pd__words_free(const pd_allocator *a, pd__words *w) {
    pd_free(a, w->bytes);
    pd_free(a, w->starts);
    pd_free(a, w->table);
}

static const char *pd__words_at(const pd__words *w, int64_t i) { return w->bytes + w->starts[i]; }

/* FNV-1a (Fowler, Noll and Vo), of 64 bits. */
static uint64_t pd__hash(const char *text, int64_t n) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (int64_t i = 0; i < n; i++) hash = (hash ^ (unsigned char)text[i]) * UINT64_C(0x100000001b3);
    return hash;
}

/* Where in the table the word is, or would be. */
static int64_t *pd__words_place(const pd__words *w, const char *word, int64_t n) {
    int64_t last = w->table_size - 1, at = (int64_t)(pd__hash(word, n) & (uint64_t)last);
    for (; w->table[at]; at = (at + 1) & last) {
        const char *here = pd__words_at(w, w->table[at] - 1);
        if (strncmp(here, word, (size_t)n) == 0 && !here[n]) break;
    }
    return &w->table[at];
}

/* The word's number; -1 when it isn't there. */
static int64_t pd__words_find(const pd__words *w, const char *word, int64_t n) {
    return w->count > 0 ? *pd__words_place(w, word, n) - 1 : -1;
}

static bool pd__words_widen(const pd_allocator *a, pd__words *w) {
    int64_t size = w->table_size ? 2 * w->table_size : 64;
    int64_t *table = (int64_t *)pd_alloc(a, size, sizeof *table);
    if (!table) return false;
    pd_free(a, w->table);
    w->table = table;
    w->table_size = size;
    for (int64_t i = 0; i < w->count; i++) {
        const char *word = pd__words_at(w, i);
        *pd__words_place(w, word, (int64_t)strlen(word)) = i + 1;
    }
    return true;
}

/* The word's number; a new one is added. -1 when out of memory. */
static int64_t pd__words_add(const pd_allocator *a, pd__words *w, const char *word, int64_t n) {
    int64_t at = pd__words_find(w, word, n);
    if (at >= 0) return at;
    if (2 * (w->count + 1) > w->table_size && !pd__words_widen(a, w)) return -1;
    if (!pd_grow(a, (void **)&w->starts, &w->start_capacity, w->count + 1, sizeof *w->starts) ||
        !pd_grow(a, (void **)&w->bytes, &w->byte_capacity, w->used + n + 1, 1))
        return -1;
    *pd__words_place(w, word, n) = w->count + 1;
    memcpy(w->bytes + w->used, word, (size_t)n);
    w->bytes[w->used + n] = 0;
    w->starts[w->count] = w->used;
    w->used += n + 1;
    return w->count++;
}

/* ---- vocabularies ---- */

struct pd_vocab {
    pd_net *net;
    pd_vocab_opts opts;
    pd__words words; /* by id */
    int64_t special[3];
    char *text;
};

/* The name of a special word: 0 unknown, 1 begin, 2 end; "" when there is to be none. */
static const char *pd__special_name(const pd_vocab_opts *o, int k) {
    static const char *const defaults[] = { "<unk>", "<s>", "</s>" };
    const char *own = k == 0 ? o->unknown : k == 1 ? o->begin : o->end;
    return own ? own : defaults[k];
}

/* What is wrong with the options, or NULL. */
static const char *pd__vocab_fault(const pd_vocab_opts *o, bool parse) {
    int64_t specials = 0;
    if (o->column < 0 || o->min_count < 0 || o->max_size < 0)
        return "column, min_count and max_size must not be negative";
    if (parse && (o->column || o->min_count || o->max_size))
        return "column, min_count and max_size are options of pd_vocab_build";
    for (int k = 0; k < 3; k++) {
        const char *name = pd__special_name(o, k);
        if (pd__utf8_prefix(name, strlen(name)) < strlen(name) || strpbrk(name, "\t\r\n"))
            return "special words are UTF-8, without tabs and ends of lines";
        for (int j = 0; j < k && name[0]; j++)
            if (strcmp(name, pd__special_name(o, j)) == 0) return "two special words have the same name";
        specials += name[0] != 0;
    }
    return o->max_size > 0 && o->max_size < specials ? "max_size has no room for the special words" : NULL;
}

static pd_vocab *pd__vocab_new(pd_net *net, const pd_vocab_opts *opts, const char *call, bool parse) {
    static const pd_vocab_opts defaults = PD__ZERO;
    const char *fault = pd__vocab_fault(opts ? opts : &defaults, parse);
    pd_vocab *v = NULL;
    if (!pd__check_net(net)) return NULL;
    if (fault) pd__fail_build(net, PD_E_ARGUMENT, "%s: %s", call, fault);
    else v = (pd_vocab *)pd_alloc(&net->allocator, 1, sizeof *v);
    if (!fault && !v) pd__fail_build(net, PD_E_MEMORY, "out of memory for a vocabulary");
    if (!v) return NULL;
    v->net = net;
    v->opts = opts ? *opts : defaults;
    return v;
}

PD_DEF void pd_vocab_free(pd_vocab *vocab) {
    const pd_allocator *a;
    if (!vocab) return;
    a = &vocab->net->allocator;
    pd__words_free(a, &vocab->words);
    pd_free(a, vocab->text);
    pd_free(a, vocab);
}

/* Looks the special words up, and writes all words as a text. */
static bool pd__vocab_finish(pd_vocab *v) {
    const pd__words *w = &v->words;
    for (int k = 0; k < PD__COUNT(v->special); k++) {
        const char *name = pd__special_name(&v->opts, k);
        v->special[k] = pd__words_find(w, name, (int64_t)strlen(name));
    }
    v->opts.unknown = v->opts.begin = v->opts.end = NULL; /* the caller's */
    v->text = (char *)pd_alloc(&v->net->allocator, w->used + 1, 1);
    for (int64_t i = 0; v->text && i < w->used; i++) v->text[i] = w->bytes[i] ? w->bytes[i] : '\n';
    return v->text != NULL;
}

/* For constructors: the vocabulary, or NULL, the vocabulary freed and r's message in the net. */
static pd_vocab *pd__vocab_made(pd_vocab *v, pd_reader *r, pd_status status) {
    if (status == PD_OK && !pd__vocab_finish(v)) status = pd__reader_no_memory(r, "a vocabulary");
    if (status == PD_OK) return v;
    pd__fail_build(v->net, status, "%s", r->error.text);
    pd_vocab_free(v);
    return NULL;
}

/* Words and how often each came. */
typedef struct pd__tally {
    pd__words words;
    int64_t *counts, capacity;
} pd__tally;

/* Counts the words of a line. */
static pd_status pd__tally_line(const pd_vocab *v, const pd__lines *l, pd__tally *t) {
    const pd_allocator *a = &v->net->allocator;
    const char *at = l->line, *end = at + l->length, *word;
    int64_t length;
    pd_status status = pd__check_line(l);
    if (status != PD_OK) return status;
    if (v->opts.column > 0 && !pd__find_column(&at, &end, v->opts.column - 1))
        return pd_reader_fail(l->reader, PD_E_FORMAT, "%lld columns, expected %d or more",
                              (long long)pd__count_columns(l), v->opts.column);
    while (pd__next_word(v->opts.characters, &at, end, &word, &length)) {
        int64_t k = pd__words_add(a, &t->words, word, length);
        if (k < 0 || !pd_grow(a, (void **)&t->counts, &t->capacity, k + 1, sizeof *t->counts))
            return pd__reader_no_memory(l->reader, "a vocabulary");
        t->counts[k]++;
    }
    return PD_OK;
}

static pd_status pd__tally_files(const pd_vocab *v, pd_reader *r, const char *path, pd__tally *t) {
    pd__lines lines = PD__ZERO;
    pd_status status;
    if (!pd__lines_init(&lines, r, &v->net->allocator)) return pd__reader_no_memory(r, "a line");
    status = pd__paths_expand(&lines.paths, r, lines.allocator, path);
    while (status == PD_OK) {
        status = pd__lines_next(&lines);
        if (status == PD_OK && pd__tally_line(v, &lines, t) != PD_OK) status = pd__lines_locate(&lines);
    }
    pd__lines_free(&lines);
    return status == PD_END ? PD_OK : status;
}

typedef struct pd__counted {
    const char *word;
    int64_t count;
} pd__counted;

static int pd__compare_counted(const void *a, const void *b) {
    const pd__counted *x = (const pd__counted *)a, *y = (const pd__counted *)b;
    return x->count != y->count ? (x->count < y->count) - (x->count > y->count) : strcmp(x->word, y->word);
}

/* Adds the special words, and the others in the order of `sorted`. False when out of memory. */
static bool pd__vocab_take(pd_vocab *v, const pd__counted *sorted, int64_t count) {
    const pd_allocator *a = &v->net->allocator;
    bool ok = true;
    for (int k = 0; ok && k < PD__COUNT(v->special); k++) {
        const char *name = pd__special_name(&v->opts, k);
        if (name[0]) ok = pd__words_add(a, &v->words, name, (int64_t)strlen(name)) >= 0;
    }
    for (int64_t i = 0; ok && i < count && sorted[i].count >= v->opts.min_count; i++) {
        if (v->opts.max_size > 0 && v->words.count >= v->opts.max_size) break;
        ok = pd__words_add(a, &v->words, sorted[i].word, (int64_t)strlen(sorted[i].word)) >= 0;
    }
    return ok;
}

static pd_status pd__vocab_choose(pd_vocab *v, pd_reader *r, const char *path, const pd__tally *t) {
    const pd_allocator *a = &v->net->allocator;
    int64_t count = t->words.count, most = 0;
    pd__counted *sorted = (pd__counted *)pd_alloc(a, count, sizeof *sorted);
    bool ok = sorted != NULL;
    for (int64_t i = 0; ok && i < count; i++) {
        sorted[i].word = pd__words_at(&t->words, i);
        sorted[i].count = t->counts[i];
        most = pd__max(most, t->counts[i]);
    }
    if (ok && count > 1) qsort(sorted, (size_t)count, sizeof *sorted, pd__compare_counted);
    ok = ok && pd__vocab_take(v, sorted, count);
    pd_free(a, sorted);
    if (!ok) return pd__reader_no_memory(r, "a vocabulary");
    if (most > 0 && most >= v->opts.min_count) return PD_OK;
    return pd_reader_fail(r, PD_E_FORMAT, "%.200s: no word that occurs %lld times", path,
                          (long long)pd__max(v->opts.min_count, 1));
}

PD_DEF pd_vocab *pd_vocab_build(pd_net *net, const char *path, const pd_vocab_opts *opts) {
    pd_reader r = PD__ZERO; /* only for its message */
    pd__tally tally = PD__ZERO;
    pd_vocab *v = pd__vocab_new(net, opts, "pd_vocab_build", false);
    pd_status status;
    if (!v) return NULL;
    r.name = "vocabulary";
    status = pd__tally_files(v, &r, path, &tally);
    if (status == PD_OK) status = pd__vocab_choose(v, &r, path, &tally);
    pd__words_free(&net->allocator, &tally.words);
    pd_free(&net->allocator, tally.counts);
    return pd__vocab_made(v, &r, status);
}

/* What is wrong with a word of a vocabulary's text, or NULL. */
static const char *pd__word_fault(const pd_vocab *v, const char *word, int64_t n) {
    const char *at = word, *first;
    int64_t length;
    if (n == 0) return "an empty line, expected a word";
    if (pd__text_prefix(word, n) < n) return "not UTF-8";
    if (pd__words_find(&v->words, word, n) >= 0) return "a word that was there before";
    for (int k = 0; k < PD__COUNT(v->special); k++) {
        const char *name = pd__special_name(&v->opts, k);
        if (strlen(name) == (size_t)n && memcmp(name, word, (size_t)n) == 0) return NULL;
    }
    if (pd__next_word(v->opts.characters, &at, word + n, &first, &length) && length == n) return NULL;
    return v->opts.characters ? "expected one character" : "a word with white space in it";
}

static pd_status pd__vocab_read(pd_vocab *v, pd_reader *r, const char *text) {
    for (int64_t line = 1; *text; line++) {
        const char *end = strchr(text, '\n');
        int64_t n = end ? end - text : (int64_t)strlen(text), kept = n > 0 && text[n - 1] == '\r' ? n - 1 : n;
        const char *fault = pd__word_fault(v, text, kept);
        if (fault) return pd_reader_fail(r, PD_E_FORMAT, "pd_vocab_parse: line %lld: %s", (long long)line, fault);
        if (pd__words_add(&v->net->allocator, &v->words, text, kept) < 0)
            return pd__reader_no_memory(r, "a vocabulary");
        text += end ? n + 1 : n;
    }
    return v->words.count > 0 ? PD_OK : pd_reader_fail(r, PD_E_FORMAT, "pd_vocab_parse: there are no words");
}

PD_DEF pd_vocab *pd_vocab_parse(pd_net *net, const char *text, const pd_vocab_opts *opts) {
    pd_reader r = PD__ZERO;
    pd_vocab *v = pd__vocab_new(net, opts, "pd_vocab_parse", true);
    pd_status status;
    if (!v) return NULL;
    if (text) status = pd__vocab_read(v, &r, text);
    else status = pd_reader_fail(&r, PD_E_ARGUMENT, "pd_vocab_parse: no text; does the model's file have it?");
    return pd__vocab_made(v, &r, status);
}

PD_DEF const char *pd_vocab_text(const pd_vocab *vocab) { return vocab ? vocab->text : NULL; }
PD_DEF int64_t pd_vocab_size(const pd_vocab *vocab) { return vocab ? vocab->words.count : 0; }
PD_DEF int64_t pd_vocab_unknown(const pd_vocab *vocab) { return vocab ? vocab->special[0] : -1; }
PD_DEF int64_t pd_vocab_begin(const pd_vocab *vocab) { return vocab ? vocab->special[1] : -1; }
PD_DEF int64_t pd_vocab_end(const pd_vocab *vocab) { return vocab ? vocab->special[2] : -1; }

static int64_t pd__vocab_id(const pd_vocab *v, const char *word, int64_t n) {
    int64_t id = pd__words_find(&v->words, word, n);
    return id >= 0 ? id : v->special[0];
}

PD_DEF int64_t pd_vocab_id(const pd_vocab *vocab, const char *word) {
    return vocab && word ? pd__vocab_id(vocab, word, (int64_t)strlen(word)) : -1;
}

PD_DEF const char *pd_vocab_word(const pd_vocab *vocab, int64_t id) {
    return vocab && id >= 0 && id < vocab->words.count ? pd__words_at(&vocab->words, id) : NULL;
}

PD_DEF pd_status pd_batch_add_text(pd_batch *batch, int slot, const pd_vocab *vocab, const char *text) {
    const char *end, *word;
    int64_t length, good;
    pd_status status = PD_OK;
    if (!batch) return PD_E_ARGUMENT;
    if (!vocab || !text)
        return pd__batch_fail(batch, PD_E_ARGUMENT, "slot %d: no %s", slot, vocab ? "text" : "vocabulary");
    end = text + strlen(text);
    good = pd__text_prefix(text, end - text);
    if (text + good < end)
        return pd__batch_fail(batch, PD_E_FORMAT, "slot %d: byte %lld: 0x%02x, expected text in UTF-8", slot,
                              (long long)good + 1, (unsigned)(unsigned char)text[good]);
    while (status == PD_OK && pd__next_word(vocab->opts.characters, &text, end, &word, &length)) {
        int64_t id = pd__vocab_id(vocab, word, length);
        if (id < 0)
            return pd__batch_fail(batch, PD_E_FORMAT, "slot %d: \"%.*s\" is not in the vocabulary", slot,
                                  (int)pd__min(length, 60), word);
        status = pd_batch_add_id(batch, slot, id);
    }
    return status;
}

/* ---- >>reader:text: text ---- */

typedef struct pd__text {
    pd__source source;
    pd__lines lines;
    pd_text_field *fields; /* one per slot */
    int64_t columns;
} pd__text;

static pd_status pd__text_add(pd__source *s, pd_batch *batch, int slot, int64_t id) {
    return pd_batch_add_id(batch, slot, id) == PD_OK ? PD_OK : pd__reader_batch_failed(&s->reader, batch);
}

static pd_status pd__text_add_word(pd__text *t, pd_batch *batch, int slot, const char *word, int64_t n) {
    pd_reader *r = &t->source.reader;
    const pd_vocab *v = t->fields[slot].vocab;
    int64_t id = v ? pd__vocab_id(v, word, n) : 0;
    pd__whole number;
    if (id < 0)
        return pd_reader_fail(r, PD_E_FORMAT, "\"%.*s\" is not in the vocabulary, which has no unknown word",
                              (int)pd__min(n, 60), word);
    if (v) return pd__text_add(&t->source, batch, slot, id);
    if (pd__read_whole(r, word, word + n, &number) != PD_OK) return r->error.status;
    return pd__add_id(&t->source, batch, slot, number);
}

/* Adds what stands in the column of an input. */
static pd_status pd__text_add_field(pd__text *t, pd_batch *batch, int slot) {
    const pd_text_field *f = &t->fields[slot];
    const pd_slot *input = &t->source.model->slots[slot];
    const char *at = t->lines.line, *end = at + t->lines.length, *word;
    bool characters = f->vocab && f->vocab->opts.characters;
    int64_t length, words = 0;
    pd_status status = PD_OK;
    pd__find_column(&at, &end, f->column - 1);
    if (f->begin) status = pd__text_add(&t->source, batch, slot, pd_vocab_begin(f->vocab));
    for (; status == PD_OK && pd__next_word(characters, &at, end, &word, &length); words++)
        status = pd__text_add_word(t, batch, slot, word, length);
    if (status == PD_OK && f->end) status = pd__text_add(&t->source, batch, slot, pd_vocab_end(f->vocab));
    if (status == PD_OK && !input->sequence && words != 1)
        status = pd_reader_fail(&t->source.reader, PD_E_FORMAT, "%lld words, expected 1", (long long)words);
    return status == PD_OK ? PD_OK : pd__locate(&t->source.reader, "column %d (%.100s)", f->column, input->name);
}

static pd_status pd__text_read(pd__source *s, pd_batch *batch) {
    pd__text *t = (pd__text *)s;
    pd_status status = pd__lines_next(&t->lines);
    if (status != PD_OK) return status;
    status = pd__check_line(&t->lines);
    if (status == PD_OK && pd__count_columns(&t->lines) != t->columns)
        status = pd_reader_fail(&s->reader, PD_E_FORMAT, "%lld columns, expected %lld",
                                (long long)pd__count_columns(&t->lines), (long long)t->columns);
    for (int i = 0; status == PD_OK && i < s->model->slot_count; i++) status = pd__text_add_field(t, batch, i);
    return status == PD_OK ? PD_OK : pd__lines_locate(&t->lines);
}

static pd_status pd__text_step(pd__source *s) { return pd__lines_next(&((pd__text *)s)->lines); }
static pd_status pd__text_rewind(pd__source *s) { return pd__lines_rewind(&((pd__text *)s)->lines); }

static void pd__text_close(pd__source *s) {
    pd__lines_free(&((pd__text *)s)->lines);
    pd_free(&s->net->allocator, ((pd__text *)s)->fields);
}

static pd_status pd__check_text_field(pd__source *s, const pd_text_field *f, const pd_slot *slot) {
    const char *lacks = !f->vocab ? "no vocabulary" : !slot->sequence ? "no sequences" : NULL;
    const char *adds = f->begin ? "begin" : "end";
    if (slot->kind != PD_SLOT_IDS)
        return pd_reader_fail(&s->reader, PD_E_SHAPE, "text reader: input \"%.100s\" takes no ids", slot->name);
    if (f->column < 0)
        return pd_reader_fail(&s->reader, PD_E_ARGUMENT, "text reader: input \"%.100s\": column %d", slot->name,
                              f->column);
    if (pd_vocab_size(f->vocab) > slot->width)
        return pd_reader_fail(&s->reader, PD_E_SHAPE,
                              "text reader: input \"%.100s\" takes %lld ids, but its vocabulary has %lld", slot->name,
                              (long long)slot->width, (long long)pd_vocab_size(f->vocab));
    if (!lacks && f->begin && pd_vocab_begin(f->vocab) < 0) lacks = "a vocabulary without that word";
    if (!lacks && f->end && pd_vocab_end(f->vocab) < 0) adds = "end", lacks = "a vocabulary without that word";
    if ((f->begin || f->end) && lacks)
        return pd_reader_fail(&s->reader, PD_E_ARGUMENT, "text reader: input \"%.100s\" has %s, and can't get the %s",
                              slot->name, lacks, adds);
    return PD_OK;
}

static pd_status pd__check_text_opts(pd__source *s) {
    pd_reader_opts *o = &s->opts;
    if (o->order || o->delimiter || o->scale != 1 || o->shift != 0)
        return pd_reader_fail(&s->reader, PD_E_ARGUMENT,
                              "text reader: order, delimiter, scale and shift are no options for text");
    if (o->columns < 0) return pd_reader_fail(&s->reader, PD_E_ARGUMENT, "text reader: columns must be 0 or more");
    o->columns = 0; /* kept by pd__text_init */
    return pd__check_reader_opts(s, true);
}

static pd_status pd__text_init(pd__text *t, const char *path, const pd_text_field *fields, int count) {
    pd__source *s = &t->source;
    int64_t wanted = s->opts.columns;
    pd_status status = pd__check_text_opts(s);
    if (status != PD_OK) return status;
    if (!fields || count != s->model->slot_count)
        return pd_reader_fail(&s->reader, PD_E_ARGUMENT, "text reader: %d fields, expected %d, one per input",
                              fields ? count : 0, s->model->slot_count);
    t->fields = (pd_text_field *)pd_alloc(&s->net->allocator, count, sizeof *fields);
    if (!t->fields) return pd__reader_no_memory(&s->reader, "a reader");
    for (int i = 0; i < count; i++) {
        status = pd__check_text_field(s, &fields[i], &s->model->slots[i]);
        if (status != PD_OK) return status;
        t->fields[i] = fields[i];
        if (fields[i].column == 0) t->fields[i].column = i + 1;
        t->columns = pd__max(t->columns, t->fields[i].column);
    }
    if (wanted > 0 && wanted < t->columns)
        return pd_reader_fail(&s->reader, PD_E_ARGUMENT,
                              "text reader: lines of %lld columns, but a field reads column %lld", (long long)wanted,
                              (long long)t->columns);
    t->columns = pd__max(t->columns, wanted);
    return pd__lines_start(&t->lines, s, path);
}

PD_DEF pd_reader *pd_text_reader(pd_net *net, const char *path, const pd_text_field *fields, int count,
                                 const pd_reader_opts *opts) {
    pd__text *t = (pd__text *)pd__source_new(net, "text", sizeof *t, opts);
    if (!t) return NULL;
    t->source.read = pd__text_read;
    t->source.step = pd__text_step;
    t->source.rewind = pd__text_rewind;
    t->source.close = pd__text_close;
    return pd__reader_made(net, &t->source.reader, pd__text_init(t, path, fields, count));
}

/* ======================================================================================================== */
/* >>tensorboard.c                                                                                         */

/* A TensorBoard event file is a row of TFRecords:
       8 bytes length, 4 bytes masked CRC of the length, the record, 4 bytes masked CRC of the record
   all little-endian. Each record is a protobuf message Event:
       1 wall_time double; 2 step varint; 3 file_version string;
       5 summary { 1 value { 1 tag string; 2 simple_value float } } */

struct pd__events {
    pd_net *net; /* gets the messages, gives the memory */
    FILE *file;
    char *path;
};

/* The lowest `size` bytes of `bits`, lowest first, whatever the host's own order. */
static void pd__store_le(unsigned char *to, uint64_t bits, int size) {
    for (int i = 0; i < size; i++) to[i] = (unsigned char)((bits >> (8 * i)) & 255);
}

/* CRC-32C (Castagnoli), rotated and shifted as TFRecords want it. Bit by bit: records have some fifty bytes. */
static uint32_t pd__masked_crc(const unsigned char *bytes, size_t n) {
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int k = 0; k < 8; k++) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
    }
    crc = ~crc;
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

/* A protobuf message under construction; callers see to it that everything fits. */
typedef struct pd__message {
    unsigned char bytes[480];
    int size;
} pd__message;

static void pd__put_varint(pd__message *m, uint64_t value) {
    for (; value > 127; value >>= 7) m->bytes[m->size++] = (unsigned char)((value & 127u) | 128u);
    m->bytes[m->size++] = (unsigned char)value;
}

static void pd__put_bytes_field(pd__message *m, int field, const void *bytes, int size) {
    pd__put_varint(m, (uint64_t)field << 3 | 2);
    pd__put_varint(m, (uint64_t)size);
    memcpy(m->bytes + m->size, bytes, (size_t)size);
    m->size += size;
}

static void pd__put_double_field(pd__message *m, int field, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    pd__put_varint(m, (uint64_t)field << 3 | 1);
    pd__store_le(m->bytes + m->size, bits, 8);
    m->size += 8;
}

static void pd__put_float_field(pd__message *m, int field, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    pd__put_varint(m, (uint64_t)field << 3 | 5);
    pd__store_le(m->bytes + m->size, bits, 4);
    m->size += 4;
}

/* Seconds since 1970, for people: it may jump. */
static double pd__wall_time(void) {
#if defined(PD__POSIX)
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)time(NULL);
#endif
}

static long pd__process_id(void) {
#if defined(_WIN32)
    return (long)GetCurrentProcessId();
#elif defined(PD__POSIX)
    return (long)getpid();
#else
    return 0;
#endif
}

/* Writes one record, through to the file: TensorBoard reads it while training goes on. */
static pd_status pd__events_write(struct pd__events *e, const pd__message *m) {
    unsigned char head[12], tail[4];
    pd__store_le(head, (uint64_t)m->size, 8);
    pd__store_le(head + 8, pd__masked_crc(head, 8), 4);
    pd__store_le(tail, pd__masked_crc(m->bytes, (size_t)m->size), 4);
    if (fwrite(head, sizeof head, 1, e->file) != 1 || fwrite(m->bytes, (size_t)m->size, 1, e->file) != 1 ||
        fwrite(tail, sizeof tail, 1, e->file) != 1 || fflush(e->file) != 0)
        return pd__fail(e->net, PD_E_IO, "%.300s: could not be written: %s", e->path, strerror(errno));
    return PD_OK;
}

static bool pd__is_separator(char c) {
#if defined(_WIN32)
    return c == '/' || c == '\\';
#else
    return c == '/';
#endif
}

/* Makes the directory and those above it. Only the last one must work out: some above may exist and be closed to us. */
static pd_status pd__make_directory(pd_net *net, const char *directory) {
    char *path = pd__copy_text(&net->allocator, directory);
    int error = *directory ? 0 : ENOENT;
    if (!path) return pd__no_memory(net, "a path");
    for (char *end = path; *end;) {
        char next;
        while (pd__is_separator(*end)) end++;
        while (*end && !pd__is_separator(*end)) end++;
        next = *end;
        *end = '\0';
#if defined(_WIN32)
        error = _mkdir(path) == 0 || errno == EEXIST ? 0 : errno;
#elif defined(PD__POSIX)
        error = mkdir(path, 0777) == 0 || errno == EEXIST ? 0 : errno;
#endif
        *end = next;
    }
    pd_free(&net->allocator, path);
    if (error) return pd__fail(net, PD_E_IO, "%.300s: the directory could not be made: %s", directory, strerror(error));
    return PD_OK;
}

static void pd__events_close(struct pd__events *e) {
    if (!e) return;
    if (e->file) fclose(e->file); /* every record has been flushed, and checked, when it was written */
    pd_free(&e->net->allocator, e->path);
    pd_free(&e->net->allocator, e);
}

/* A new event file in `directory`, which is made when absent. NULL, with the message in the net, on failure. The name
   holds time, process and a hash of the clock, so that runs at the same time do not meet. */
static struct pd__events *pd__events_open(pd_net *net, const char *directory) {
    static const char version[] = "brain.Event:2";
    pd__message m = PD__ZERO;
    double now = pd__wall_time(), clock_now = pd_seconds();
    struct pd__events *e = NULL;
    size_t size = strlen(directory) + 100;
    uint64_t bits;
    if (pd__make_directory(net, directory) != PD_OK) return NULL;
    e = (struct pd__events *)pd_alloc(&net->allocator, 1, sizeof *e);
    if (e) e->net = net;
    if (e) e->path = (char *)pd_alloc(&net->allocator, (int64_t)size, 1);
    if (!e || !e->path) {
        pd__no_memory(net, "an event file");
        pd__events_close(e);
        return NULL;
    }
    memcpy(&bits, &clock_now, sizeof bits);
    snprintf(e->path, size, "%s/events.out.tfevents.%lld.%ld.%08lx", directory, (long long)now, pd__process_id(),
             (unsigned long)(pd_random(bits, (uint64_t)(uintptr_t)e) >> 32));
    e->file = fopen(e->path, "wb");
    if (!e->file) pd__fail(net, PD_E_IO, "%.300s: could not be opened: %s", e->path, strerror(errno));
    pd__put_double_field(&m, 1, now);
    pd__put_bytes_field(&m, 3, version, (int)sizeof version - 1);
    if (!e->file || pd__events_write(e, &m) != PD_OK) {
        pd__events_close(e);
        return NULL;
    }
    return e;
}

/* Adds one number of one curve. Tags are UTF-8; what goes beyond 250 bytes is cut off. */
static pd_status pd__events_scalar(struct pd__events *e, const char *tag, int64_t step, double value) {
    pd__message point = PD__ZERO, summary = PD__ZERO, event = PD__ZERO;
    size_t n = strlen(tag);
    if (n > 250)
        for (n = 250; n > 0 && ((unsigned char)tag[n] & 0xc0) == 0x80;) n--; /* not inside a character */
    pd__put_bytes_field(&point, 1, tag, (int)n);
    pd__put_float_field(&point, 2, (float)value);
    pd__put_bytes_field(&summary, 1, point.bytes, point.size);
    pd__put_double_field(&event, 1, pd__wall_time());
    pd__put_varint(&event, 2 << 3);
    pd__put_varint(&event, (uint64_t)step);
    pd__put_bytes_field(&event, 5, summary.bytes, summary.size);
    return pd__events_write(e, &event);
}

/* ======================================================================================================== */
/* >>trainer.c                                                                                             */

PD_DEF pd_net *pd_trainer_net(pd_trainer *trainer) { return trainer ? trainer->net : NULL; }
PD_DEF int64_t pd_trainer_samples(const pd_trainer *trainer) { return trainer ? trainer->samples : 0; }

PD_DEF pd_status pd_trainer_fail(pd_trainer *trainer, pd_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    pd__fail_list(trainer->net, status, format, args);
    va_end(args);
    return status;
}

/* What would pull the rug from under pd_train, which has called on_event or a reader. */
static pd_status pd__check_idle(const pd_trainer *t, const char *call) {
    if (!t->training && !t->filling) return PD_OK;
    return pd__fail(t->net, PD_E_STATE, "%s: this trainer is in use, by pd_train%s", call,
                    t->training ? "" : " or pd_test");
}

/* ---- what updaters return ---- */

/* Gives the status a message, if there has come none since pd__clear_failure. */
static pd_status pd__updater_returned(pd_trainer *t, pd_status status) {
    const char *name = t->updater->name ? t->updater->name : "";
    if (status != PD_OK && t->net->failure.status == PD_OK)
        pd__fail(t->net, status, "updater %.100s: %s", name, pd_status_text(status));
    return status;
}

PD_DEF pd_status pd_sync(pd_trainer *trainer) {
    pd_net *net = trainer ? trainer->net : NULL;
    pd_failure earlier; /* success here doesn't forget it */
    pd_status status;
    if (!trainer) return PD_E_ARGUMENT;
    trainer->unsynced = false;
    if (!trainer->updater->sync) return PD_OK;
    earlier = net->failure;
    pd__clear_failure(net);
    status = pd__updater_returned(trainer, trainer->updater->sync(trainer->updater));
    trainer->unsynced = status != PD_OK;
    if (status == PD_OK) net->failure = earlier;
    return status;
}

static pd_status pd__sync_all(pd_net *net, const pd_trainer *besides) {
    pd_status status = PD_OK;
    for (pd_trainer *t = pd__owner(net)->trainers; status == PD_OK && t && !net->updater; t = t->next)
        if (t->unsynced && t != besides) status = pd_sync(t);
    return status;
}

/* The sum over all workers. */
static pd_status pd__reduce(pd_trainer *t, double *sums, int64_t count) {
    if (!t->updater->all_reduce) return PD_OK;
    pd__clear_failure(t->net);
    return pd__updater_returned(t, t->updater->all_reduce(t->updater, sums, count));
}

PD_DEF pd_status pd_trainer_shard(pd_trainer *trainer, int rank, int ranks) {
    if (!trainer || ranks < 1 || rank < 0 || rank >= ranks) return PD_E_ARGUMENT;
    if (trainer->started) return pd_trainer_fail(trainer, PD_E_STATE, "pd_trainer_shard: only in the updater's start");
    if (ranks > 1 && trainer->opts.average_window > 0)
        return pd_trainer_fail(trainer, PD_E_UNSUPPORTED, "pd_trainer_new: no model averaging with %d workers", ranks);
    trainer->rank = rank;
    trainer->ranks = ranks;
    return PD_OK;
}

/* ---- making one ---- */

/* What is wrong with the options, or NULL. */
static const char *pd__trainer_fault(const pd_trainer_opts *o) {
    const pd_updater *u = o->updater;
    if (!(o->l1 >= 0 && o->l2 >= 0)) return "l1 and l2 must not be negative";
    if (!pd__finite(o->l1) || !pd__finite(o->l2)) return "l1 and l2 must be finite";
    if (!(o->clip_value >= 0 && o->clip_norm >= 0)) return "clip_value and clip_norm must not be negative";
    if (!pd__finite(o->clip_value) || !pd__finite(o->clip_norm)) return "clip_value and clip_norm must be finite";
    if (!(o->average_window >= 0 && o->average_window <= 1)) return "average_window must lie in 0 .. 1";
    if (o->average_max < 0) return "average_max must not be negative";
    if (o->average_max > 0 && o->average_window == 0) return "average_max needs an average_window";
    if (u && u->api_version != PD_API_VERSION) return "the updater has another interface version";
    if (u && !(u->start && u->begin_batch && u->grad_final && u->end_batch))
        return "the updater lacks start, begin_batch, grad_final or end_batch";
    return pd__schedule_fault(&o->schedule);
}

static int pd__compare_reals(const void *a, const void *b) {
    pd_real x = *(const pd_real *)a, y = *(const pd_real *)b;
    return (x > y) - (x < y);
}

/* Makes the pruning mask: the smallest magnitudes, ties by position, are held at zero. */
static pd_status pd__prune(pd_param *p) {
    const pd_allocator *a = &p->net->allocator;
    int64_t n = p->size, drop = pd__min((int64_t)floor((double)n * p->opts.prune + 0.5), n - 1), below = 0;
    pd_real *values, *sorted;
    pd_status status;
    if (drop == 0 || p->mask) return PD_OK;
    p->mask = (unsigned char *)pd_alloc(a, n, 1);
    values = (pd_real *)pd_alloc(a, n, 2 * sizeof *values);
    if (!p->mask || !values) {
        pd_free(a, values);
        pd_free(a, p->mask);
        p->mask = NULL;
        return pd__no_memory(p->net, "a pruning mask");
    }
    sorted = values + n;
    status = pd_param_get(p, values, n);
    for (int64_t i = 0; i < n; i++) sorted[i] = PD__M(fabs)(values[i]);
    qsort(sorted, (size_t)n, sizeof *sorted, pd__compare_reals);
    while (below < drop && sorted[below] < sorted[drop - 1]) below++;
    for (int64_t i = 0, ties = drop - below; i < n; i++) {
        pd_real size = PD__M(fabs)(values[i]);
        bool dropped = size < sorted[drop - 1] || (size == sorted[drop - 1] && ties-- > 0);
        p->mask[i] = !dropped;
        if (dropped) values[i] = 0;
    }
    if (status == PD_OK) status = pd_param_set(p, values, n);
    pd_free(a, values);
    return status;
}

/* What an optimizer or option can't do with a sparse parameter, or NULL. */
static const char *pd__sparse_fault(const pd_trainer *t, const pd_param *p) {
    if (t->optimizer.kind != PD_OPT_SGD && t->optimizer.kind != PD_OPT_MOMENTUM)
        return "which goes with sgd and momentum; this optimizer would have to change every row in every step";
    if (pd__or(p->opts.l1, t->opts.l1) > 0) return "which does not go with l1";
    if (t->opts.average_window > 0) return "which does not go with model averaging";
    return NULL;
}

/* What a parameter needs before the updater starts. */
static pd_status pd__start_training(pd_trainer *t, pd__trained *tr, pd_param *p) {
    const char *fault = p->touched ? pd__sparse_fault(t, p) : NULL;
    pd_status status;
    if (fault)
        return pd__fail(t->net, PD_E_UNSUPPORTED, "pd_trainer_new: parameter \"%.100s\" is sparse, %s", p->name, fault);
    status = pd__need_grad(p);
    if (status == PD_OK) status = pd__prune(p);
    tr->param = p;
    p->trained = (int)(tr - t->trained) + 1;
    return status;
}

static pd_status pd__start_numbers(const pd_param *p, int64_t size, pd_real **memory) {
    pd_device *d = p->net->device;
    int64_t capacity = 0;
    if (!pd__grow_numbers(p->net, memory, &capacity, size))
        return pd__fail(p->net, PD_E_MEMORY, "out of memory for training \"%.100s\"", p->name);
    d->fill(d, size, 0, *memory);
    return PD_OK;
}

/* Memory for what is kept about a parameter, or about the shard of it that is stepped on here. */
static pd_status pd__start_states(pd_trainer *t, pd__trained *tr) {
    pd_status status = PD_OK;
    for (int k = 0; status == PD_OK && k < pd_optimizer_states(&t->optimizer); k++)
        status = pd__start_numbers(tr->param, pd__shard_size(t, tr->param), &tr->states[k]);
    return status == PD_OK && tr->param->touched ? pd__lazy_new(t, tr) : status;
}

/* Does training change it? It is trained, or the statistics of a layer that takes part. */
static bool pd__moves(const pd_net *net, const pd_param *p) {
    if (!p->is_buffer) return p->users > 0 && !p->opts.is_static;
    for (int64_t i = 0; i < net->layer_count; i++)
        for (int k = 0; net->layers[i]->own->active && k < net->layers[i]->param_count; k++)
            if (net->layers[i]->params[k] == p) return true;
    return false;
}

/* .. and for averages of all that training changes. */
static pd_status pd__start_averages(pd_trainer *t) {
    pd_net *net = t->net;
    pd_status status = PD_OK;
    if (!(t->opts.average_window > 0)) return PD_OK;
    t->averages = (pd__averaged *)pd_alloc(&net->allocator, net->param_count, sizeof *t->averages);
    if (!t->averages) return pd__no_memory(net, "the trainer");
    for (pd_param *p = net->first_param; status == PD_OK && p; p = p->next) {
        pd__averaged *av = &t->averages[t->averages_count];
        if (!pd__moves(net, p)) continue;
        t->averages_count++;
        av->param = p;
        for (int k = 0; status == PD_OK && k < PD__COUNT(av->sums); k++)
            status = pd__start_numbers(p, p->size, &av->sums[k]);
        if (status == PD_OK) status = pd__start_numbers(p, p->size, &av->saved);
    }
    return status;
}

/* Everything `cost` depends on that learns. */
static pd_status pd__collect_trained(pd_trainer *t) {
    pd_net *net = t->net;
    pd_status status = pd__activate_layers(net, &t->cost, 1);
    if (status == PD_OK) status = pd__count_users(net);
    if (status != PD_OK) return status;
    t->trained = (pd__trained *)pd_alloc(&net->allocator, net->param_count, sizeof *t->trained);
    if (!t->trained) return pd__no_memory(net, "the trainer");
    for (pd_param *p = net->first_param; status == PD_OK && p; p = p->next)
        if (p->users > 0 && !p->opts.is_static) status = pd__start_training(t, &t->trained[t->trained_count++], p);
    return status;
}

static pd_status pd__check_trainer(pd_net *net, pd_layer *cost, const pd_optimizer *optimizer,
                                   const pd_trainer_opts *o) {
    const char *fault = pd__optimizer_fault(optimizer);
    if (!fault) fault = pd__trainer_fault(o);
    if (fault) return pd__fail(net, PD_E_ARGUMENT, "pd_trainer_new: %s", fault);
    if (!cost || cost->net != net)
        return pd__fail(net, PD_E_ARGUMENT, "pd_trainer_new: the cost is %s", cost ? "another net's" : "NULL");
    if (net->origin) return pd__fail(net, PD_E_STATE, "pd_trainer_new: a shared net can't be trained");
    if (net->frozen) return pd__fail(net, PD_E_STATE, "pd_trainer_new: the net was frozen by pd_freeze");
    if (cost->is_ids || cost->out.width != 1)
        return pd__fail(net, PD_E_SHAPE, "%.100s: a cost has one number per row, this is %s", cost->name,
                        pd_shape_text(cost, cost->shape));
    if (!cost->wants_grad) return pd__fail(net, PD_E_STATE, "%.100s: nothing that it depends on learns", cost->name);
    return PD_OK;
}

PD_DEF pd_trainer *pd_trainer_new(pd_net *net, pd_layer *cost, pd_optimizer optimizer, const pd_trainer_opts *opts) {
    static const pd_trainer_opts defaults = PD__ZERO;
    pd_trainer *t;
    pd_status status;
    if (!pd__check_net(net)) return NULL;
    if (pd__check_trainer(net, cost, &optimizer, opts ? opts : &defaults) != PD_OK) return NULL;
    t = (pd_trainer *)pd_alloc(&net->allocator, 1, sizeof *t);
    if (!t) {
        pd__no_memory(net, "the trainer");
        return NULL;
    }
    t->net = net;
    t->cost = cost;
    t->optimizer = optimizer;
    t->opts = opts ? *opts : defaults;
    t->local = pd__local_updater;
    t->updater = t->opts.updater ? t->opts.updater : &t->local;
    t->best_cost = HUGE_VAL;
    t->ranks = 1;
    t->next = net->trainers;
    net->trainers = t;
    status = pd__collect_trained(t);
    if (status == PD_OK) status = pd__start_averages(t);
    if (status == PD_OK) t->batch = pd_batch_new(net);
    if (status != PD_OK || !t->batch) {
        t->updater = &t->local; /* there is nothing to stop */
        pd_trainer_free(t);
        return NULL;
    }
    status = pd__updater_returned(t, t->updater->start(t->updater, t));
    if (status != PD_OK) t->updater = &t->local;
    t->started = true;
    for (int i = 0; status == PD_OK && i < t->trained_count; i++) status = pd__start_states(t, &t->trained[i]);
    if (status == PD_OK) return t;
    pd_trainer_free(t);
    return NULL;
}

static void pd__free_best(pd_net *net, pd_real **best, int count) {
    for (int i = 0; best && i < count; i++)
        if (best[i]) net->device->free(net->device, best[i]);
    pd_free(&net->allocator, best);
}

PD_DEF void pd_trainer_free(pd_trainer *trainer) {
    pd_device *d;
    const pd_allocator *a;
    if (!trainer || pd__check_idle(trainer, "pd_trainer_free") != PD_OK) return;
    d = trainer->net->device;
    a = &trainer->net->allocator;
    if (!trainer->went_back) pd__catch_up_all(trainer); /* nobody else can */
    if (trainer->updater->stop) trainer->updater->stop(trainer->updater);
    pd_use_average(trainer, false);
    for (pd_trainer **at = &trainer->net->trainers; *at; at = *at == trainer ? at : &(*at)->next)
        if (*at == trainer) {
            *at = trainer->next;
            break;
        }
    for (int i = 0; i < trainer->trained_count; i++) {
        pd__trained *tr = &trainer->trained[i];
        for (int k = 0; k < PD_MAX_STATES; k++)
            if (tr->states[k]) d->free(d, tr->states[k]);
        pd__lazy_free(a, tr->lazy);
    }
    for (int i = 0; i < trainer->averages_count; i++) {
        pd__averaged *av = &trainer->averages[i];
        for (int k = 0; k < PD__COUNT(av->sums); k++)
            if (av->sums[k]) d->free(d, av->sums[k]);
        if (av->saved) d->free(d, av->saved);
    }
    pd_free(a, trainer->averages);
    pd__free_best(trainer->net, trainer->best, trainer->best_count);
    if (trainer->spare) d->free(d, trainer->spare);
    pd_free(a, trainer->trained);
    pd_free(a, trainer->targets);
    pd_batch_free(trainer->batch);
    pd_free(a, trainer);
}

/* ---- one step ---- */

/* Adds a cost's rows. */
static pd_status pd__cost_sum(pd_layer *cost, double *sum) {
    int64_t rows = 0, width = 0;
    const pd_real *c = pd_output(cost, &rows, &width);
    for (int64_t i = 0; c && i < rows; i++) *sum += (double)c[i];
    return c ? PD_OK : pd_error_status(cost->net);
}

/* The first row of a layer's output that holds a number that isn't finite. */
static int64_t pd__bad_row(pd_layer *l) {
    int64_t rows = 0, width = 0;
    const pd_real *x = pd_output(l, &rows, &width);
    for (int64_t i = 0; x && i < rows * width; i++)
        if (!pd__finite((double)x[i])) return i / width;
    return 0;
}

/* The batch at hand, in words: of `pass`, or, if that is negative, of a test. */
static const char *pd__where(char text[64], int64_t batch, int64_t pass) {
    if (pass < 0) snprintf(text, 64, "batch %lld of the test", (long long)batch);
    else snprintf(text, 64, "batch %lld of pass %lld", (long long)batch, (long long)pass);
    return text;
}

/* Looks for the first layer of the last forward whose numbers, or parameters, aren't finite. PD_OK: there is none. */
static pd_status pd__blame(pd_trainer *t, const char *where) {
    pd_net *net = t->net;
    pd_device *d = net->device;
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        if (!l->own->active) continue;
        for (int k = 0; k < l->param_count; k++) {
            int64_t count;
            const pd_real *numbers = pd__read_numbers(l->params[k], &count);
            if (!pd__finite(d->norm(d, count, numbers)))
                return pd__fail(net, PD_E_NUMERIC, "%.100s: parameter \"%.100s\" is not finite before %s", l->name,
                                l->params[k]->name, where);
        }
        if (l->out.data && !pd__finite(d->norm(d, l->out.rows * l->out.width, l->out.data)))
            return pd__fail(net, PD_E_NUMERIC, "%.100s: the %s is not finite in row %lld of %s", l->name,
                            l->own->slot >= 0 ? "input" : "output", (long long)pd__bad_row(l), where);
    }
    return PD_OK;
}

/* Adds the cost's rows of the last forward to *sum, which must be finite then. */
static pd_status pd__add_cost_of(pd_trainer *t, int64_t batch, int64_t pass, double *sum) {
    char where[64];
    pd_status status = pd__cost_sum(t->cost, sum);
    if (status != PD_OK || pd__finite(*sum)) return status;
    status = pd__blame(t, pd__where(where, batch, pass));
    if (status != PD_OK) return status;
    return pd__fail(t->net, PD_E_NUMERIC, "%.100s: the cost of %s is too large to be summed", t->cost->name, where);
}

/* Forward, backward and updates; *sum gets the summed cost, *samples the samples of all workers. */
static pd_status pd__step(pd_trainer *t, const pd_batch *batch, double *sum, int64_t *samples) {
    pd_net *net = t->net;
    pd_updater *u = t->updater;
    char where[64];
    pd_status status;
    pd__clear_failure(net);
    for (pd_param *p = net->first_param; p; p = p->next) {
        p->announced = false;
        /* With an updater that steps on other rows a sparse one's may still be there. */
        if (p->touched || (net->leftover && p->grad)) pd__zero_grad(p);
    }
    net->leftover = false;
    status = pd_forward(net, batch, PD_TRAIN, &t->cost, 1);
    if (status != PD_OK) return status;
    status = pd__add_cost_of(t, t->pass_batches, t->pass, sum);
    if (status == PD_OK) status = pd_backward(net, t->cost);
    if (status == PD_OK) status = u->end_batch(u, samples);
    /* A bounded activation may have hidden where it began. */
    if (status == PD_E_NUMERIC) pd__blame(t, pd__where(where, t->pass_batches, t->pass));
    return status;
}

/* A step with the batch, and *samples of all workers; *sum is this worker's summed cost. */
static pd_status pd__train_step(pd_trainer *t, const pd_batch *batch, double *sum, int64_t *samples) {
    pd_net *net = t->net;
    double start = pd_seconds();
    pd_status status;
    *samples = batch->samples;
    if (t->averaged) pd_use_average(t, false);
    pd__begin_anew(net, false);
    status = pd__sync_all(net, t);
    if (status != PD_OK) return status;
    pd__catch_up_others(t);
    net->updater = t->updater;
    net->stepping = t;
    t->attempt++;
    t->unsynced = t->updater != &t->local;
    status = pd__step(t, batch, sum, samples);
    net->updater = NULL;
    net->stepping = NULL;
    t->step_seconds += pd_seconds() - start;
    pd__updater_returned(t, status);
    if (status != PD_OK) { /* leave no half-summed gradients behind */
        for (int i = 0; i < t->trained_count; i++) pd__zero_grad(t->trained[i].param);
        return status;
    }
    if (*samples == 0) return PD_OK; /* nothing was learned */
    pd__average_step(t);
    net->step++;
    t->steps++;
    t->samples += *samples;
    t->pass_batches++;
    return PD_OK;
}

PD_DEF pd_status pd_train_batch(pd_trainer *trainer, const pd_batch *batch, double *cost) {
    pd_net *net = trainer ? trainer->net : NULL;
    double sum = 0;
    int64_t samples;
    pd_status status;
    if (cost) *cost = 0;
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!batch) return pd__fail(net, PD_E_ARGUMENT, "pd_train_batch: the batch is NULL");
    status = pd__check_idle(trainer, "pd_train_batch");
    if (status != PD_OK) return status;
    if (batch->samples == 0 && trainer->updater == &trainer->local) return PD_OK;
    status = pd__train_step(trainer, batch, &sum, &samples);
    if (status == PD_OK && cost) *cost = sum / (double)pd__max(batch->samples, 1);
    return status;
}

/* ---- testing ---- */

/* A reader's message becomes the net's. */
static pd_status pd__reader_failed(pd_trainer *t, const pd_reader *r, pd_status status) {
    return pd__fail(t->net, status, "%.400s", r->error.text[0] ? r->error.text : pd_status_text(status));
}

/* How full a batch is to be. */
typedef struct pd__filling {
    int64_t size;   /* samples */
    int64_t tokens; /* 0, or: no more samples once the slot has so many rows */
    int slot;
} pd__filling;

/* Adds samples to an empty batch. */
static pd_status pd__fill(pd_reader *r, pd_batch *batch, const pd__filling *f) {
    pd_status status = PD_OK;
    int64_t before = -1; /* samples; a reader that gives none must not be asked for ever */
    if (f->tokens == 0) return r->next(r, batch, f->size);
    while (status == PD_OK && batch->samples > before && batch->samples < f->size &&
           batch->slots[f->slot].rows < f->tokens) {
        before = batch->samples;
        status = r->next(r, batch, 1);
    }
    return status;
}

/* Takes the next samples. */
static pd_status pd__next(pd_trainer *t, pd_reader *r, const pd__filling *f) {
    double start = pd_seconds();
    pd_status status;
    pd_batch_clear(t->batch);
    t->filling = true;
    status = pd__fill(r, t->batch, f);
    t->filling = false;
    t->wait_seconds += pd_seconds() - start;
    if (status == PD_OK && t->batch->samples == 0) /* a pass would never end */
        return pd__fail(t->net, PD_E_STATE, "reader %s: gave no sample, and did not say that the pass is over",
                        r->name);
    if (status != PD_OK && status != PD_END) pd__reader_failed(t, r, status);
    return status;
}

static pd_status pd__reset(pd_trainer *t, pd_reader *r, int64_t pass) {
    pd_status status;
    t->filling = true;
    status = r->reset(r, pass);
    t->filling = false;
    if (status == PD_END)
        return pd__fail(t->net, PD_E_STATE, "reader %s: there is no pass %lld", r->name, (long long)pass);
    if (status != PD_OK) pd__reader_failed(t, r, status);
    return status;
}

/* All workers' sums come to each evaluator: at once where they are added, else from one worker after the other. */
static pd_status pd__reduce_evaluator(pd_trainer *t, pd_evaluator *e) {
    const pd_allocator *a = &t->net->allocator;
    size_t bytes = (size_t)e->sum_count * sizeof *e->sums;
    double *own, *sums;
    pd_status status = PD_OK;
    if (!e->type->merge) return pd__reduce(t, e->sums, e->sum_count);
    if (t->ranks == 1) return PD_OK;
    own = (double *)pd_alloc(a, e->sum_count, 2 * sizeof *own);
    if (!own) return pd__no_memory(t->net, "the evaluators of all workers");
    sums = own + e->sum_count;
    memcpy(own, e->sums, bytes);
    pd_evaluator_reset(e);
    for (int r = 0; status == PD_OK && r < t->ranks; r++) {
        if (r == t->rank) memcpy(sums, own, bytes);
        else memset(sums, 0, bytes);
        status = pd__reduce(t, sums, e->sum_count);
        if (status == PD_OK) e->type->merge(e, sums);
    }
    pd_free(a, own);
    return status;
}

/* Makes t->targets the cost and all that evaluators look at. */
static pd_status pd__test_targets(pd_trainer *t, int *count) {
    int64_t n = 1;
    for (pd_evaluator *e = t->net->evaluators; e; e = e->next) n += PD__COUNT(e->inputs);
    *count = 0;
    if (!pd_grow(&t->net->allocator, (void **)&t->targets, &t->target_capacity, n, sizeof *t->targets))
        return pd__no_memory(t->net, "testing");
    t->targets[(*count)++] = t->cost;
    for (pd_evaluator *e = t->net->evaluators; e; e = e->next)
        for (int k = 0; k < PD__COUNT(e->inputs); k++)
            if (e->inputs[k]) t->targets[(*count)++] = e->inputs[k];
    return PD_OK;
}

static pd_status pd__test_pass(pd_trainer *t, pd_reader *r, const pd__filling *f, double *cost) {
    pd_net *net = t->net;
    int count;
    double sum = 0, sums[2];
    int64_t samples = 0, batches = 0;
    pd_status status = pd__test_targets(t, &count), end = PD_OK;
    if (status == PD_OK) status = pd__reset(t, r, 0);
    for (pd_evaluator *e = net->evaluators; e; e = e->next) pd_evaluator_reset(e);
    while (status == PD_OK && end == PD_OK) {
        end = pd__next(t, r, f);
        if (t->batch->samples == 0 || (end != PD_OK && end != PD_END)) continue;
        status = pd_forward(net, t->batch, PD_PREDICT, t->targets, count);
        if (status != PD_OK) break;
        samples += t->batch->samples;
        status = pd__add_cost_of(t, batches++, -1, &sum);
        if (status == PD_OK) status = pd__evaluators_update(net);
    }
    if (status == PD_OK && end != PD_OK && end != PD_END) status = end;
    sums[0] = sum;
    sums[1] = (double)samples;
    if (status == PD_OK) status = pd__reduce(t, sums, 2);
    for (pd_evaluator *e = net->evaluators; status == PD_OK && e; e = e->next) status = pd__reduce_evaluator(t, e);
    if (status == PD_OK && sums[1] == 0)
        return pd__fail(net, PD_E_FORMAT, "reader %s: there are no samples to test", r->name);
    if (status == PD_OK) *cost = sums[0] / sums[1];
    return status;
}

/* A reader that could not be made has left its message in the net; one in the midst of a pass would lose its place. */
static pd_status pd__check_reader(pd_net *net, const char *call, const pd_reader *reader) {
    const pd_failure *failure = &net->reader_failure;
    if (!reader)
        return pd__fail(net, PD_E_ARGUMENT, "%s: the reader is NULL%s%.400s", call, failure->status ? ": " : "",
                        failure->status ? failure->text : "");
    if (reader->api_version != PD_API_VERSION || !reader->next || !reader->reset)
        return pd__fail(net, PD_E_ARGUMENT, "%s: the reader lacks next or reset, or has another interface version",
                        call);
    for (const pd_trainer *t = net->trainers; t; t = t->next)
        if (t->reading == reader)
            return pd__fail(net, PD_E_STATE, "%s: reader %s is in use, by pd_train in the midst of a pass", call,
                            reader->name);
    return PD_OK;
}

static pd_status pd__test(pd_trainer *trainer, pd_reader *reader, const pd__filling *f, double *cost) {
    pd_net *net = trainer ? trainer->net : NULL;
    bool averaged = trainer && trainer->averaged;
    double mean = (double)NAN;
    pd_status status = PD_OK;
    if (cost) *cost = mean;
    if (!pd__check_net(net)) return pd_error_status(net);
    status = pd__check_reader(net, "pd_test", reader);
    if (status == PD_OK && trainer->filling) /* from on_event it may be called */
        status = pd__fail(net, PD_E_STATE, "pd_test: this trainer is in use, by one that waits for a reader");
    if (status != PD_OK) return status;
    if (f->size < 0) return pd__fail(net, PD_E_ARGUMENT, "pd_test: batch size %lld", (long long)f->size);
    status = pd_sync(trainer);
    if (status != PD_OK) return status;
    pd_use_average(trainer, true);
    status = pd__test_pass(trainer, reader, f, &mean);
    if (!averaged) pd_use_average(trainer, false);
    if (cost) *cost = mean;
    return status;
}

PD_DEF pd_status pd_test(pd_trainer *trainer, pd_reader *reader, int64_t batch_size, double *cost) {
    pd__filling f = PD__ZERO;
    f.size = batch_size ? batch_size : 32;
    return pd__test(trainer, reader, &f, cost);
}

/* ---- early stopping ---- */

/* Memory for the best values, one array per parameter; NULL, with a message, when out of memory. */
static pd_real **pd__new_best(pd_net *net) {
    pd_real **best = (pd_real **)pd_alloc(&net->allocator, net->param_count, sizeof *best);
    int i = 0;
    for (pd_param *p = net->first_param; best && p; p = p->next, i++) {
        int64_t capacity = 0;
        if (!pd__grow_numbers(net, &best[i], &capacity, p->size)) {
            pd__free_best(net, best, net->param_count);
            best = NULL;
        }
    }
    if (!best) pd__no_memory(net, "the best values");
    return best;
}

/* Takes them over (NULL: there are none). */
static void pd__set_best(pd_trainer *t, pd_real **best) {
    pd__free_best(t->net, t->best, t->best_count);
    t->best = best;
    t->best_count = best ? t->net->param_count : 0;
}

/* Memory for going back to them. */
static pd_status pd__ready_spare(pd_trainer *t) {
    int64_t largest = 0;
    for (pd_param *p = t->net->first_param; p; p = p->next) largest = pd__max(largest, p->size);
    if (pd__grow_numbers(t->net, &t->spare, &t->spare_capacity, largest)) return PD_OK;
    return pd__no_memory(t->net, "the best values");
}

/* Copies the values of all parameters and statistics to t->best. */
static pd_status pd__copy_best(pd_trainer *t) {
    int i = 0;
    pd_status status = pd__ready_spare(t);
    if (status == PD_OK && t->best_count != t->net->param_count) pd__set_best(t, pd__new_best(t->net));
    if (status != PD_OK || !t->best) return PD_E_MEMORY;
    for (pd_param *p = t->net->first_param; p; p = p->next, i++) {
        if (p->touched) pd__read_rows(t->net, pd__lagging(p), p, p->value, 0, p->dims[0], NULL, t->best[i]);
        else pd__replace(t->net->device, p->size, p->value, t->best[i]);
    }
    t->has_best = true;
    return PD_OK;
}

/* After a test. With averaging on it is the averaged values that were tested and are kept. */
static pd_status pd__judge(pd_trainer *t, double test_cost) {
    pd_status status;
    if (!(test_cost < t->best_cost)) {
        t->bad_tests++;
        return PD_OK;
    }
    t->best_cost = test_cost;
    t->bad_tests = 0;
    pd_use_average(t, true);
    status = pd__copy_best(t);
    pd_use_average(t, false);
    return status;
}

/* Judging begins anew, from what there is, if something has been learned or loaded; with a checkpoint it goes on, but
   for one of a training that had run out of patience. */
static pd_status pd__begin_judging(pd_trainer *t, const pd_train_opts *o, const pd__filling *f) {
    bool goes_on = t->resumed;
    double cost;
    pd_status status;
    t->resumed = false;
    if (o->patience > 0 && t->bad_tests >= o->patience) t->bad_tests = 0;
    if (goes_on) return PD_OK;
    t->has_best = false;
    t->best_cost = HUGE_VAL;
    t->bad_tests = 0;
    if (o->patience == 0 || (t->net->step == 0 && !t->net->given)) return PD_OK;
    status = pd__test(t, o->test, f, &cost);
    return status == PD_OK ? pd__judge(t, cost) : status;
}

/* The values of the best test come into the net. The last ones stay with the trainer, so that a checkpoint is that of
   the training, until something else is trained or loaded. */
static void pd__go_back(pd_trainer *t) {
    pd_device *d = t->net->device;
    int i = 0;
    pd__catch_up_others(t);
    for (pd_param *p = t->net->first_param; p && i < t->best_count; p = p->next, i++) {
        pd__replace(d, p->size, p->value, t->spare);
        pd__replace(d, p->size, t->best[i], p->value);
        pd__replace(d, p->size, t->spare, t->best[i]);
    }
    t->went_back = true;
    t->unsynced = false; /* a test came after a sync */
}

/* Are there parameters of which other workers may hold rows? Of the others every worker has all, of the last step or
   the one before, and need not ask those that may be gone. */
static bool pd__has_tables(const pd_trainer *t) {
    for (int i = 0; i < t->trained_count; i++)
        if (t->trained[i].param->touched) return true;
    return false;
}

static void pd__begin_anew(pd_net *net, bool given) {
    net->given = net->given || given;
    for (pd_trainer *t = net->trainers; t; t = t->next) {
        if (t->went_back || given) {
            pd__catch_up_all(t); /* what was left for later belongs to the values that there were */
            t->has_best = t->resumed = false;
        }
        if (!t->went_back) continue;
        t->went_back = false;
        pd__forget_averages(t);
    }
}

/* ---- what a run shows and writes ---- */

typedef struct pd__run {
    pd_trainer *t;
    const pd_train_opts *o;
    pd_reader *reader;
    pd__filling filling;
    int64_t size; /* samples per pass, -1 when unknown */
    int64_t passes;
    double start, shown;   /* seconds */
    int64_t first_samples; /* of this run */
    bool terminal;
    FILE *csv;
    struct pd__events *events;
} pd__run;

static bool pd__is_terminal(void) {
#if defined(_WIN32)
    return _isatty(_fileno(stderr)) != 0;
#elif defined(PD__POSIX)
    return isatty(fileno(stderr)) != 0;
#else
    return false;
#endif
}

/* "75", "3:20" or "2:03:20" */
static void pd__time_text(double seconds, char *text, size_t size) {
    long long s = seconds > 0 && seconds < 1e12 ? (long long)(seconds + 0.5) : 0;
    if (s < 100) snprintf(text, size, "%lld s", s);
    else if (s < 3600) snprintf(text, size, "%lld:%02lld", s / 60, s % 60);
    else snprintf(text, size, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
}

/* The bar is redrawn at most ten times a second. */
static void pd__show_progress(pd__run *run) {
    enum { CELLS = 24 };
    pd_trainer *t = run->t;
    double now = pd_seconds(), per_second;
    char bar[CELLS + 1], left[32] = "";
    if (!run->terminal || now - run->shown < 0.1) return;
    run->shown = now;
    per_second = (double)(t->samples - run->first_samples) / (now - run->start + 1e-9);
    memset(bar, '.', CELLS);
    bar[CELLS] = 0;
    if (run->size > 0) {
        double all = (double)run->size * (double)run->passes;
        double done = (double)run->size * (double)t->pass + (double)t->pass_samples;
        memset(bar, '#', (size_t)pd__min(CELLS, CELLS * t->pass_samples / run->size));
        pd__time_text((all - done) / per_second, left, sizeof left);
    }
    fprintf(stderr, "\rpass %lld/%lld [%s] cost %.4g, %.0f samples/s, %s left \033[K", (long long)t->pass + 1,
            (long long)run->passes, bar, t->pass_cost / (double)pd__max(t->pass_samples, 1), per_second,
            left[0] ? left : "?");
    fflush(stderr);
}

static void pd__show_pass(pd__run *run, double cost, double test_cost) {
    pd_trainer *t = run->t;
    char spent[32];
    if (!run->o->progress) return;
    pd__time_text(pd_seconds() - run->start, spent, sizeof spent);
    fprintf(stderr, "%spass %lld/%lld: cost %.4g", run->terminal ? "\r\033[K" : "", (long long)t->pass,
            (long long)run->passes, cost);
    if (run->o->test) fprintf(stderr, ", test cost %.4g", test_cost);
    for (pd_evaluator *e = run->o->test ? t->net->evaluators : NULL; e; e = e->next)
        fprintf(stderr, ", %s %.4g", e->type->value_names[0], pd_evaluator_value(e, 0));
    fprintf(stderr, ", %s\n", spent);
    fflush(stderr);
}

static pd_status pd__open_logs(pd__run *run) {
    pd_net *net = run->t->net;
    if (run->o->csv_log) {
        run->csv = fopen(run->o->csv_log, "a");
        if (!run->csv)
            return pd__fail(net, PD_E_IO, "%.300s: can't be opened for writing: %s", run->o->csv_log, strerror(errno));
        fseek(run->csv, 0, SEEK_END);
        if (ftell(run->csv) == 0) {
            fprintf(run->csv, "pass,samples,seconds,rate,cost,test_cost");
            for (pd_evaluator *e = net->evaluators; e; e = e->next)
                for (int k = 0; k < e->type->value_count; k++)
                    fprintf(run->csv, strchr(e->name, ',') ? ",\"%s.%s\"" : ",%s.%s", e->name, e->type->value_names[k]);
            fprintf(run->csv, "\n");
        }
    }
    if (run->o->tensorboard) {
        run->events = pd__events_open(net, run->o->tensorboard);
        if (!run->events) return net->failure.status;
    }
    return PD_OK;
}

/* A field of the CSV log: the number, with a point in any locale, or nothing when it is NaN. */
static void pd__csv_number(FILE *f, double value) {
    char text[40] = "", *point;
    if (value == value) snprintf(text, sizeof text, "%.9g", value);
    point = strchr(text, ',');
    if (point) *point = '.';
    fprintf(f, ",%s", text);
}

/* A point in both logs. test_cost NaN: no test was made, so evaluators have no values either. */
static pd_status pd__log_point(pd__run *run, double cost, double test_cost) {
    pd_trainer *t = run->t;
    pd_status status = PD_OK;
    bool tested = test_cost == test_cost;
    if (run->csv) {
        fprintf(run->csv, "%lld,%lld", (long long)t->pass, (long long)t->samples);
        pd__csv_number(run->csv, floor(1e3 * (pd_seconds() - run->start)) / 1e3);
        pd__csv_number(run->csv, pd__rate(t));
        pd__csv_number(run->csv, cost);
        pd__csv_number(run->csv, test_cost);
    }
    if (run->events) {
        status = pd__events_scalar(run->events, "cost", t->samples, cost);
        if (status == PD_OK) status = pd__events_scalar(run->events, "rate", t->samples, pd__rate(t));
        if (status == PD_OK && tested) status = pd__events_scalar(run->events, "test_cost", t->samples, test_cost);
    }
    for (pd_evaluator *e = t->net->evaluators; e; e = e->next)
        for (int k = 0; k < e->type->value_count; k++) {
            double value = tested ? pd_evaluator_value(e, k) : (double)NAN;
            char tag[512];
            snprintf(tag, sizeof tag, "%.200s.%.200s", e->name, e->type->value_names[k]);
            if (run->csv) pd__csv_number(run->csv, value);
            if (run->events && status == PD_OK && tested)
                status = pd__events_scalar(run->events, tag, t->samples, value);
        }
    if (run->csv && (fputc('\n', run->csv) == EOF || fflush(run->csv) != 0 || ferror(run->csv)))
        status = pd__fail(t->net, PD_E_IO, "%.300s: can't be written: %s", run->o->csv_log, strerror(errno));
    return status;
}

/* Tells the callback; PD_STOPPED if it wants to stop. */
static pd_status pd__tell(pd__run *run, pd_event_kind kind, double cost, double test_cost) {
    pd_trainer *t = run->t;
    pd_event e;
    if (!run->o->on_event) return PD_OK;
    e.kind = kind;
    e.trainer = t;
    e.pass = kind == PD_END_PASS ? t->pass - 1 : t->pass;
    e.batch = kind == PD_END_BATCH ? t->pass_batches - 1 : t->pass_batches;
    e.samples = t->samples;
    e.cost = cost;
    e.test_cost = test_cost;
    e.rate = pd__rate(t);
    return run->o->on_event(run->o->user, &e) ? PD_STOPPED : PD_OK;
}

/* ---- passes ---- */

/* Skips what a stopped pass has already seen. */
static pd_status pd__begin_pass(pd__run *run) {
    pd_trainer *t = run->t;
    pd_reader *r = run->reader;
    int64_t left = t->pass_samples;
    pd_status status = pd__reset(t, r, t->pass);
    if (left == 0) t->pass_batches = 0; /* pd_train_batch has counted them too */
    if (status == PD_OK && left > 0 && r->skip) {
        status = r->skip(r, left);
        left = 0;
        if (status != PD_OK) pd__reader_failed(t, r, status);
    }
    while (status == PD_OK && left > 0) {
        pd__filling some = PD__ZERO;
        some.size = pd__min(left, 256);
        status = pd__next(t, r, &some);
        left -= t->batch->samples;
    }
    if (status == PD_END) status = PD_OK;
    return status == PD_OK ? pd__tell(run, PD_BEGIN_PASS, 0, (double)NAN) : status;
}

static pd_status pd__after_batch(pd__run *run, double cost) {
    pd_trainer *t = run->t;
    const pd_train_opts *o = run->o;
    pd_status status = PD_OK;
    if (o->progress) pd__show_progress(run);
    if (o->log_every > 0 && t->steps % o->log_every == 0) status = pd__log_point(run, cost, (double)NAN);
    if (status == PD_OK && o->checkpoint && o->checkpoint_every > 0 && t->steps % o->checkpoint_every == 0)
        status = pd_checkpoint_save(t, o->checkpoint);
    return status == PD_OK ? pd__tell(run, PD_END_BATCH, cost, (double)NAN) : status;
}

static pd_status pd__end_pass(pd__run *run) {
    pd_trainer *t = run->t;
    double sums[2], cost, test_cost = (double)NAN;
    pd_status status;
    sums[0] = t->pass_cost;
    sums[1] = (double)t->pass_samples;
    status = pd__reduce(t, sums, 2);
    if (status != PD_OK) return status;
    cost = sums[0] / (sums[1] > 0 ? sums[1] : 1);
    if (sums[1] == 0)
        return pd__fail(t->net, PD_E_FORMAT, "reader %s: pass %lld has no samples", run->reader->name,
                        (long long)t->pass);
    t->pass++;
    t->pass_samples = t->pass_batches = 0;
    t->pass_cost = 0;
    if (run->o->test) status = pd__test(t, run->o->test, &run->filling, &test_cost);
    if (status == PD_OK && run->o->patience > 0) status = pd__judge(t, test_cost);
    if (status == PD_OK) status = pd__log_point(run, cost, test_cost);
    if (status == PD_OK) pd__show_pass(run, cost, test_cost);
    if (status == PD_OK && run->o->checkpoint) status = pd_checkpoint_save(t, run->o->checkpoint);
    return status == PD_OK ? pd__tell(run, PD_END_PASS, cost, test_cost) : status;
}

static pd_status pd__run_pass(pd__run *run) {
    pd_trainer *t = run->t;
    int64_t samples = 1;
    bool alone = t->updater->all_reduce == NULL;
    pd_status status, end = PD_OK;
    t->reading = run->reader;
    status = pd__begin_pass(run);
    while (status == PD_OK && samples > 0) {
        double sum = 0;
        if (end == PD_OK) end = pd__next(t, run->reader, &run->filling);
        else pd_batch_clear(t->batch); /* other workers may have more */
        if (end != PD_OK && end != PD_END && t->batch->samples == 0) return end;
        if (t->batch->samples == 0 && alone) break;
        status = pd__train_step(t, t->batch, &sum, &samples);
        if (status != PD_OK) break;
        t->pass_samples += t->batch->samples;
        t->pass_cost += sum;
        if (samples > 0) status = pd__after_batch(run, sum / (double)pd__max(t->batch->samples, 1));
        if (end != PD_OK && (alone || end != PD_END)) break;
    }
    if (status == PD_OK && end != PD_OK && end != PD_END) /* the samples before the bad one have been used */
        return pd__reader_failed(t, run->reader, end);
    t->reading = NULL;
    return status == PD_OK ? pd__end_pass(run) : status;
}

static pd_status pd__check_train(pd_trainer *t, pd_reader *reader, int64_t passes, const pd_train_opts *o) {
    pd_net *net = t->net;
    pd_status status = pd__check_idle(t, "pd_train");
    if (status == PD_OK) status = pd__check_reader(net, "pd_train", reader);
    if (status == PD_OK && o->test) status = pd__check_reader(net, "pd_train: test", o->test);
    if (status != PD_OK) return status;
    if (!o->test && net->reader_failure.status != PD_OK) /* no test wanted, or did its reader fail? */
        return pd__fail(net, PD_E_ARGUMENT, "pd_train: no test reader, and one reader could not be made: %.400s",
                        net->reader_failure.text);
    if (passes < 0 || o->batch_size < 0 || o->batch_tokens < 0 || o->patience < 0 || o->log_every < 0 ||
        o->checkpoint_every < 0)
        return pd__fail(net, PD_E_ARGUMENT,
                        "pd_train: passes, batch_size, batch_tokens, patience, log_every and checkpoint_every "
                        "must not be negative");
    if (o->tokens_of && o->batch_tokens == 0)
        return pd__fail(net, PD_E_ARGUMENT, "pd_train: tokens_of needs batch_tokens");
    if (o->patience > 0 && !o->test) return pd__fail(net, PD_E_ARGUMENT, "pd_train: patience needs a test reader");
    if (o->checkpoint_every > 0 && !o->checkpoint)
        return pd__fail(net, PD_E_ARGUMENT, "pd_train: checkpoint_every needs a checkpoint file");
    if (o->log_every > 0 && !o->csv_log && !o->tensorboard)
        return pd__fail(net, PD_E_ARGUMENT, "pd_train: log_every needs csv_log or tensorboard");
    return PD_OK;
}

/* How full the options want a batch. */
static pd_status pd__choose_filling(const pd_trainer *t, const pd_train_opts *o, pd__filling *f) {
    const pd_batch *b = t->batch;
    f->size = o->batch_size ? o->batch_size : o->batch_tokens ? INT64_MAX : 32;
    f->tokens = o->batch_tokens;
    if (f->tokens == 0) return PD_OK;
    for (f->slot = 0; f->slot < b->slot_count; f->slot++) {
        const pd_slot *slot = &b->slots[f->slot];
        if (o->tokens_of ? strcmp(slot->name, o->tokens_of) != 0 : !slot->sequence) continue;
        if (slot->sequence) return PD_OK;
        return pd__fail(t->net, PD_E_ARGUMENT, "pd_train: tokens_of: input \"%.100s\" carries no sequences",
                        slot->name);
    }
    if (!o->tokens_of) return pd__fail(t->net, PD_E_ARGUMENT, "pd_train: batch_tokens, but no input carries sequences");
    return pd__fail(t->net, PD_E_ARGUMENT, "pd_train: tokens_of: no input \"%.100s\"", o->tokens_of);
}

PD_DEF pd_status pd_train(pd_trainer *trainer, pd_reader *reader, int64_t passes, const pd_train_opts *opts) {
    static const pd_train_opts defaults = PD__ZERO;
    pd_net *net = trainer ? trainer->net : NULL;
    pd__run run;
    pd_status status;
    if (!pd__check_net(net)) return pd_error_status(net);
    memset(&run, 0, sizeof run);
    run.t = trainer;
    run.o = opts ? opts : &defaults;
    run.reader = reader;
    status = pd__check_train(trainer, reader, passes, run.o);
    if (status == PD_OK) status = pd__choose_filling(trainer, run.o, &run.filling);
    if (status != PD_OK) return status;
    trainer->training = true;
    pd_use_average(trainer, false);
    run.size = reader->size ? reader->size(reader) : -1;
    run.passes = passes;
    run.start = pd_seconds();
    run.first_samples = trainer->samples;
    run.terminal = run.o->progress && pd__is_terminal();
    status = pd__open_logs(&run);
    if (status == PD_OK && trainer->pass < passes) {
        pd__begin_anew(net, false);
        status = pd__begin_judging(trainer, run.o, &run.filling);
    }
    while (status == PD_OK && trainer->pass < passes) {
        status = pd__run_pass(&run);
        if (run.o->patience > 0 && trainer->bad_tests >= run.o->patience) break;
    }
    trainer->training = false;
    trainer->reading = NULL;
    pd_use_average(trainer, false); /* on_event may have left them */
    if (run.terminal && status != PD_OK) fputc('\n', stderr);
    if (status == PD_OK || status == PD_STOPPED || trainer->updater == &trainer->local) { /* others may wait for ever */
        pd_status synced = pd_sync(trainer);
        if (status == PD_OK || status == PD_STOPPED) status = synced != PD_OK ? synced : status;
    }
    if (status != PD_OK && status != PD_STOPPED && !pd__has_tables(trainer)) trainer->unsynced = false;
    if (run.o->patience > 0 && trainer->has_best && !trainer->went_back) pd__go_back(trainer);
    if (run.csv) fclose(run.csv);
    if (run.events) pd__events_close(run.events);
    return status;
}

/* ======================================================================================================== */
/* >>profile.c                                                                                             */

/* Bytes that a layer's outputs, gradients and working memory take. */
static double pd__layer_bytes(const pd_layer *l) {
    double numbers = 0, doubles = 0;
    for (int i = 0; i < PD__COUNT(l->own->store); i++)
        numbers += (double)(l->own->store[i].data_capacity + l->own->store[i].grad_capacity);
    for (int i = 0; i < PD__COUNT(l->own->memory); i++) numbers += (double)l->own->memory[i].capacity;
    for (int i = 0; i < PD__COUNT(l->own->doubles); i++) doubles += (double)l->own->double_capacity[i];
    return (numbers + (double)l->own->folded_capacity) * sizeof(pd_real) + doubles * sizeof(double);
}

PD_DEF size_t pd_net_bytes(const pd_net *net) {
    double bytes = 0;
    for (int64_t i = 0; net && i < net->layer_count; i++) bytes += pd__layer_bytes(net->layers[i]);
    for (int64_t i = 0; net && i < net->spare_count; i++) bytes += (double)net->spares[i].capacity * sizeof(pd_real);
    return (size_t)bytes;
}

PD_DEF size_t pd_profile(const pd_trainer *trainer, char *text, size_t size) {
    const pd_net *net = trainer ? trainer->net : NULL;
    size_t length = 0;
    double total = 0, all;
    if (size) text[0] = 0;
    if (!net) return 0;
    for (int64_t i = 0; i < net->layer_count; i++)
        total += net->layers[i]->own->forward_seconds + net->layers[i]->own->backward_seconds;
    pd__append(text, size, &length, "%-20s %-14s %14s %12s %12s %7s %10s\n", "layer", "type", "shape", "forward ms",
               "backward ms", "share", "MiB");
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        double runs = (double)pd__max(l->own->runs, 1), spent = l->own->forward_seconds + l->own->backward_seconds;
        pd__append(text, size, &length, "%-20.20s %-14.14s %14s %12.3f %12.3f %6.1f%% %10.2f\n", l->name, l->type->name,
                   pd_shape_text(l, l->shape), 1e3 * l->own->forward_seconds / runs,
                   1e3 * l->own->backward_seconds / runs, total > 0 ? 100 * spent / total : 0,
                   pd__layer_bytes(l) / 1048576);
    }
    all = trainer->step_seconds + trainer->wait_seconds;
    pd__append(text, size, &length, "waiting for data: %.1f%% of %.2f s\n",
               all > 0 ? 100 * trainer->wait_seconds / all : 0, all);
    if (pd__cpu_threads(net->cpu) > 1) {
        const pd__pace *pace = &pd__cpu_of(net->cpu)->pace;
        pd__append(text, size, &length, "threads: %d, missing or waited for in %.1f%% of %.2f s\n", pace->threads,
                   pace->spent > 0 ? 100 * pace->short_of / pace->spent : 0, pace->spent);
    }
    return length;
}

PD_DEF pd_status pd_graphviz(pd_net *net, const char *path) {
    FILE *f;
    bool bad;
    if (!pd__check_net(net)) return pd_error_status(net);
    f = path ? fopen(path, "w") : NULL;
    if (!f)
        return pd__fail(net, PD_E_IO, "%.300s: can't be opened for writing: %s", path ? path : "(NULL)",
                        strerror(errno));
    fprintf(f, "digraph net {\n    rankdir=BT;\n    node [shape=box, fontname=\"sans-serif\"];\n");
    for (int64_t i = 0; i < net->layer_count; i++) {
        pd_layer *l = net->layers[i];
        fprintf(f, "    n%lld [label=\"%s\\n%s%s%s\\n%s\"];\n", (long long)i, l->name, l->type->name,
                l->act != PD_LINEAR ? " " : "", l->act != PD_LINEAR ? pd__act_names[l->act] : "",
                pd_shape_text(l, l->shape));
        for (int k = 0; k < l->input_count; k++)
            fprintf(f, "    n%d -> n%lld;\n", l->inputs[k]->own->index, (long long)i);
    }
    fprintf(f, "}\n");
    bad = ferror(f) != 0;
    if (fclose(f) != 0 || bad) return pd__fail(net, PD_E_IO, "%.300s: can't be written: %s", path, strerror(errno));
    return PD_OK;
}

/* ======================================================================================================== */
/* >>files.c                                                                                               */

/* A .safetensors file is
       8 bytes: length of the header, little-endian
       the header, JSON in UTF-8, padded with spaces:
           {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..,
            "__metadata__": {"KEY": "TEXT"}}
       the data, little-endian, row-major; each byte belongs to exactly one tensor
   Reading goes open and check everything (pd__tensors_open), look up (pd__tensors_find), stage all numbers in host
   memory (pd__items_stage), and only then change values (pd__items_commit). */

#define PD__HEADER_MAX 100000000 /* bytes; the reference implementation's limit too */
#define PD__FILE_DIMS 8          /* further dims of a tensor are counted, but not kept: no parameter has them */
#define PD__NESTING_MAX 32
#define PD__FILE_CHUNK 65536 /* bytes read or written at a time; a multiple of every element's size */

typedef enum pd__element { PD__F64, PD__F32, PD__F16, PD__BF16, PD__U8, PD__I32, PD__OTHER } pd__element;

/* The first ones in the order of pd__element; the rest are known for their size alone. */
static const struct {
    const char *name;
    int bits;
} pd__dtypes[] = { { "F64", 64 },    { "F32", 32 },    { "F16", 16 },    { "BF16", 16 },   { "U8", 8 },
                   { "I32", 32 },    { "I8", 8 },      { "BOOL", 8 },    { "I16", 16 },    { "U16", 16 },
                   { "U32", 32 },    { "I64", 64 },    { "U64", 64 },    { "C64", 64 },    { "F8_E4M3", 8 },
                   { "F8_E5M2", 8 }, { "F8_E8M0", 8 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "F4", 4 } };

static const pd__element pd__real_element = sizeof(pd_real) == 8 ? PD__F64 : PD__F32;

/* One tensor of a file. `name` must stay in front: see pd__find_named. */
typedef struct pd__tensor {
    const char *name; /* in the header's memory, as `dtype` */
    const char *dtype;
    pd__element element;
    int dim_count; /* may be larger than PD__FILE_DIMS */
    int64_t dims[PD__FILE_DIMS];
    int64_t size;       /* product of all dims */
    int64_t begin, end; /* bytes in the data */
    bool used;
} pd__tensor;

typedef struct pd__text_pair {
    const char *name, *text;
} pd__text_pair;

/* What an open file holds. */
typedef struct pd__tensors {
    pd_net *net;
    FILE *file;
    const char *path; /* for messages */
    char *header;     /* names and texts are decoded in place */
    pd__tensor *list; /* by name */
    int64_t count, capacity;
    pd__text_pair *texts; /* the metadata, by name */
    int64_t text_count, text_capacity;
    int64_t data_start, data_size; /* bytes */
} pd__tensors;

/* A name from a file as messages show it, on one line and not endless; in one of the net's text buffers. */
static const char *pd__show(pd_net *net, const char *name) {
    char *text = net->texts[net->text_turn = (net->text_turn + 1) % PD__COUNT(net->texts)];
    snprintf(text, sizeof net->texts[0], "%s", name);
    pd__one_line(text);
    return text;
}

/* ---- bytes of a file ---- */

static bool pd__seek(FILE *file, int64_t offset) {
#if defined(_WIN32)
    return _fseeki64(file, offset, SEEK_SET) == 0;
#elif defined(PD__POSIX)
    return (off_t)offset == offset && fseeko(file, (off_t)offset, SEEK_SET) == 0;
#else
    return offset <= LONG_MAX && fseek(file, (long)offset, SEEK_SET) == 0;
#endif
}

/* Bytes in the file, or -1 with errno set. */
static int64_t pd__file_size(FILE *file) {
#if defined(_WIN32)
    return _fseeki64(file, 0, SEEK_END) == 0 ? _ftelli64(file) : -1;
#elif defined(PD__POSIX)
    return fseeko(file, 0, SEEK_END) == 0 ? (int64_t)ftello(file) : -1;
#else
    return fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
#endif
}

static uint64_t pd__load_le(const unsigned char *from, int size) {
    uint64_t bits = 0;
    for (int i = 0; i < size; i++) bits |= (uint64_t)from[i] << (8 * i);
    return bits;
}

/* The same for 4 bytes, in a form that compilers turn into one instruction; whole files go through it. */
static inline uint32_t pd__load_le32(const unsigned char *b) {
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static inline void pd__store_le32(unsigned char *to, uint32_t bits) {
    to[0] = (unsigned char)bits;
    to[1] = (unsigned char)(bits >> 8);
    to[2] = (unsigned char)(bits >> 16);
    to[3] = (unsigned char)(bits >> 24);
}

static double pd__double_from_bits(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float pd__float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* IEEE 754 binary16: 1 sign, 5 exponent, 10 fraction bits. */
static float pd__half_from_bits(uint32_t bits) {
    uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
    float size;
    if (exponent == 31) return pd__float_from_bits(sign | 0x7f800000u | (fraction << 13));
    if (exponent > 0) return pd__float_from_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
    size = (float)fraction * (1.0f / 16777216.0f); /* subnormal: a multiple of 2^-24 */
    return sign ? -size : size;
}

/* One number of a file. */
static inline double pd__load_real(pd__element element, const unsigned char *from) {
    switch (element) {
    case PD__F64: return pd__double_from_bits((uint64_t)pd__load_le32(from + 4) << 32 | pd__load_le32(from));
    case PD__F32: return pd__float_from_bits(pd__load_le32(from));
    case PD__F16: return pd__half_from_bits((uint32_t)pd__load_le(from, 2));
    case PD__BF16: return pd__float_from_bits((uint32_t)pd__load_le(from, 2) << 16); /* the upper half of a float */
    case PD__U8:
    case PD__I32:
    case PD__OTHER: break;
    }
    return 0;
}

/* `n` numbers of a file as pd_real: exact, or, from F64 to float, correctly rounded. */
static void pd__load_reals(pd__element element, const unsigned char *from, int64_t n, pd_real *to) {
#define PD__LOAD(element, size)                                                                                        \
    case element:                                                                                                      \
        for (int64_t i = 0; i < n; i++) to[i] = (pd_real)pd__load_real(element, from + size * i);                      \
        break;
    switch (element) {
        PD__LOAD(PD__F64, 8)
        PD__LOAD(PD__F32, 4)
        PD__LOAD(PD__F16, 2)
        PD__LOAD(PD__BF16, 2)
    case PD__U8:
    case PD__I32:
    case PD__OTHER: break;
    }
#undef PD__LOAD
}

/* Turns `n` numbers into the file's bytes, in place. */
static void pd__store_reals(void *numbers, int64_t n) {
    unsigned char *bytes = (unsigned char *)numbers;
    for (int64_t i = 0; i < n; i++, bytes += sizeof(pd_real)) {
#ifdef PADDLE_DOUBLE
        uint64_t bits;
        memcpy(&bits, bytes, sizeof bits);
        pd__store_le32(bytes + 4, (uint32_t)(bits >> 32));
#else
        uint32_t bits;
        memcpy(&bits, bytes, sizeof bits);
#endif
        pd__store_le32(bytes, (uint32_t)bits);
    }
}

/* ---- checksums ---- */

/* Fletcher's (1982), with words of 32 bits and sums of 64: any change within two words shows, and a word costs two
   additions, which is less than reading it from memory. */
typedef struct pd__sum {
    uint64_t words, sums;
} pd__sum;

/* Adds some bytes; at their end fewer than 4 count as a word. */
static void pd__sum_bytes(pd__sum *sum, const void *bytes, int64_t n) {
    const unsigned char *at = (const unsigned char *)bytes;
    unsigned char last[4] = { 0, 0, 0, 0 };
    uint64_t words = sum->words, sums = sum->sums;
    for (; n >= 4; n -= 4, at += 4) sums += words += pd__load_le32(at);
    if (n > 0) {
        memcpy(last, at, (size_t)n);
        sums += words += pd__load_le32(last);
    }
    sum->words = words;
    sum->sums = sums;
}

/* To be gone on with the tensor's data. */
static pd__sum pd__sum_of_shape(const char *dtype, int dim_count, const int64_t *dims) {
    pd__sum sum = { 1, 0 };
    pd__sum_bytes(&sum, dtype, (int64_t)strlen(dtype));
    for (int i = 0; i < dim_count; i++) {
        unsigned char bytes[8];
        pd__store_le(bytes, (uint64_t)dims[i], 8);
        pd__sum_bytes(&sum, bytes, 8);
    }
    return sum;
}

/* Adds a metadata entry. Their order does not matter. */
static void pd__sum_entry(pd__sum *sum, const char *prefix, const char *name, const char *text) {
    const char *parts[3];
    pd__sum entry = { 1, 0 };
    parts[0] = prefix, parts[1] = name, parts[2] = text;
    for (int i = 0; i < 3; i++) { /* byte by byte: where the prefix ends must not matter */
        for (const char *at = parts[i]; *at; at++) pd__sum_bytes(&entry, at, 1);
        if (i > 0) pd__sum_bytes(&entry, "", 1);
    }
    sum->words += entry.words;
    sum->sums += entry.sums;
}

#define PD__SUM_DIGITS 32

static void pd__sum_text(pd__sum sum, char text[PD__SUM_DIGITS + 1]) {
    snprintf(text, PD__SUM_DIGITS + 1, "%016llx%016llx", (unsigned long long)sum.words, (unsigned long long)sum.sums);
}

/* ---- UTF-8 ---- */

/* Bytes of the character at `s`, which has `n` more bytes; 0 when it isn't proper UTF-8 (RFC 3629). */
static int pd__utf8_length(const unsigned char *s, size_t n) {
    int length = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    if ((size_t)length > n) return 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0; /* could be shorter */
    if (s[0] == 0xed && s[1] > 0x9f) return 0; /* half of a UTF-16 pair */
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0; /* beyond U+10FFFF */
    return length;
}

/* Offset of the first byte that isn't proper UTF-8; `n` when all is well. */
static size_t pd__utf8_prefix(const char *text, size_t n) {
    size_t at = 0;
    while (at < n) {
        int length = pd__utf8_length((const unsigned char *)text + at, n - at);
        if (length == 0) break;
        at += (size_t)length;
    }
    return at;
}

static char *pd__utf8_put(char *to, uint32_t code) {
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xc0u | (code >> 6));
        *to++ = (char)(0x80u | (code & 63u));
    } else if (code < 0x10000) {
        *to++ = (char)(0xe0u | (code >> 12));
        *to++ = (char)(0x80u | ((code >> 6) & 63u));
        *to++ = (char)(0x80u | (code & 63u));
    } else {
        *to++ = (char)(0xf0u | (code >> 18));
        *to++ = (char)(0x80u | ((code >> 12) & 63u));
        *to++ = (char)(0x80u | ((code >> 6) & 63u));
        *to++ = (char)(0x80u | (code & 63u));
    }
    return to;
}

/* ---- JSON (RFC 8259), only as much as a header needs ---- */

/* A text being read. The first failure sticks in `status`; then nothing moves any more. */
typedef struct pd__json {
    pd_net *net;
    const char *path;
    char *text;
    int64_t length, at;
    pd_status status;
} pd__json;

static void pd__json_fail(pd__json *j, const char *expected) {
    unsigned char c = j->at < j->length ? (unsigned char)j->text[j->at] : 0;
    char found[16];
    if (j->status != PD_OK) return;
    if (j->at >= j->length) snprintf(found, sizeof found, "its end");
    else snprintf(found, sizeof found, c > 32 && c < 127 ? "'%c'" : "byte 0x%02x", c);
    j->status = pd__fail(j->net, PD_E_FORMAT, "%.300s: header, byte %lld: expected %s, found %s", j->path,
                         (long long)j->at, expected, found);
}

static void pd__json_space(pd__json *j) {
    while (j->at < j->length && j->text[j->at] && strchr(" \t\n\r", j->text[j->at])) j->at++;
}

static bool pd__json_is(const pd__json *j, char c) {
    return j->status == PD_OK && j->at < j->length && j->text[j->at] == c;
}

static bool pd__json_take(pd__json *j, char c) {
    bool is = pd__json_is(j, c);
    j->at += is;
    return is;
}

/* Takes `c`, after white space, or fails saying that `what` was expected. */
static bool pd__json_expect(pd__json *j, char c, const char *what) {
    pd__json_space(j);
    if (pd__json_take(j, c)) return true;
    pd__json_fail(j, what);
    return false;
}

/* Goes to element `n` of an object or array that was entered; false at its closing bracket, which is taken. */
static bool pd__json_more(pd__json *j, char close, int64_t n) {
    pd__json_space(j);
    if (pd__json_take(j, close)) return false;
    if (n > 0) return pd__json_expect(j, ',', close == '}' ? "',' or '}'" : "',' or ']'");
    return j->status == PD_OK;
}

static uint32_t pd__json_hex4(pd__json *j) {
    uint32_t code = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        int c = j->at < j->length ? (unsigned char)j->text[j->at] : 0;
        if (!isxdigit(c)) {
            pd__json_fail(j, "four hexadecimal digits");
            return 0;
        }
        code = code * 16 + (uint32_t)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return code;
}

/* An escape sequence whose backslash was taken, decoded to `to`, which never overtakes what is still to be read. */
static char *pd__json_escape(pd__json *j, char *to) {
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *found = j->at < j->length && j->text[j->at] ? strchr(escapes, j->text[j->at]) : NULL;
    uint32_t code, low;
    if (found) {
        j->at++;
        *to = meanings[found - escapes];
        return to + 1;
    }
    if (!pd__json_take(j, 'u')) {
        pd__json_fail(j, "an escape sequence");
        return to;
    }
    code = pd__json_hex4(j);
    if (code >= 0xd800 && code < 0xdc00) { /* UTF-16: the upper half of a pair */
        if (!pd__json_take(j, '\\') || !pd__json_take(j, 'u')) {
            pd__json_fail(j, "the second half of a UTF-16 pair");
            return to;
        }
        low = pd__json_hex4(j);
        code = low >= 0xdc00 && low < 0xe000 ? 0x10000u + ((code - 0xd800u) << 10) + (low - 0xdc00u) : 0;
    }
    if (code == 0 || (code >= 0xdc00 && code < 0xe000)) { /* zero would end our texts */
        pd__json_fail(j, "before it the code of a character other than zero");
        return to;
    }
    return pd__utf8_put(to, code);
}

/* A string, decoded in place and ended by a zero; NULL on failure. */
static const char *pd__json_string(pd__json *j) {
    char *start, *to;
    if (!pd__json_expect(j, '"', "a string")) return NULL;
    start = to = j->text + j->at;
    while (j->status == PD_OK && !pd__json_is(j, '"')) {
        if (j->at >= j->length || (unsigned char)j->text[j->at] < 32) pd__json_fail(j, "the end of the string");
        else if (pd__json_take(j, '\\')) to = pd__json_escape(j, to);
        else *to++ = j->text[j->at++];
    }
    if (j->status != PD_OK) return NULL;
    j->at++;
    *to = '\0';
    return start;
}

/* The name of an object's member, and the colon; NULL on failure. */
static const char *pd__json_name(pd__json *j) {
    const char *name;
    pd__json_space(j);
    name = pd__json_string(j);
    return name && pd__json_expect(j, ':', "':'") ? name : NULL;
}

static void pd__json_digits(pd__json *j) {
    if (j->at >= j->length || !isdigit((unsigned char)j->text[j->at])) pd__json_fail(j, "a digit");
    while (j->at < j->length && isdigit((unsigned char)j->text[j->at])) j->at++;
}

/* A size: a whole number from 0 to INT64_MAX. */
static int64_t pd__json_size(pd__json *j) {
    int64_t value = 0, start;
    pd__json_space(j);
    start = j->at;
    for (; j->at < j->length && isdigit((unsigned char)j->text[j->at]); j->at++) {
        int digit = j->text[j->at] - '0';
        if (value > (INT64_MAX - digit) / 10) {
            j->at = start;
            pd__json_fail(j, "a number below 2^63");
            return 0;
        }
        value = value * 10 + digit;
    }
    if (j->at == start || (j->at > start + 1 && j->text[start] == '0') || pd__json_is(j, '.') || pd__json_is(j, 'e') ||
        pd__json_is(j, 'E')) {
        j->at = start;
        pd__json_fail(j, "a whole number without sign and leading zeros");
    }
    return value;
}

/* Any value, not looked at: what later versions of the format may say about a tensor. */
static void pd__json_skip(pd__json *j, int depth) {
    static const char *const words[] = { "true", "false", "null" };
    pd__json_space(j);
    if (depth > PD__NESTING_MAX) pd__json_fail(j, "less nesting");
    if (pd__json_is(j, '"')) {
        pd__json_string(j);
    } else if (pd__json_take(j, '{')) {
        for (int64_t n = 0; pd__json_more(j, '}', n); n++)
            if (pd__json_name(j)) pd__json_skip(j, depth + 1);
    } else if (pd__json_take(j, '[')) {
        for (int64_t n = 0; pd__json_more(j, ']', n); n++) pd__json_skip(j, depth + 1);
    } else {
        for (int i = 0; i < PD__COUNT(words); i++) {
            int64_t n = (int64_t)strlen(words[i]);
            if (j->status == PD_OK && n <= j->length - j->at && memcmp(j->text + j->at, words[i], (size_t)n) == 0) {
                j->at += n;
                return;
            }
        }
        if (j->at >= j->length || !j->text[j->at] || !strchr("-0123456789", j->text[j->at]))
            pd__json_fail(j, "a value");
        pd__json_take(j, '-');
        if (!pd__json_take(j, '0')) pd__json_digits(j);
        if (pd__json_take(j, '.')) pd__json_digits(j);
        if (pd__json_take(j, 'e') || pd__json_take(j, 'E')) {
            if (!pd__json_take(j, '+')) pd__json_take(j, '-');
            pd__json_digits(j);
        }
    }
}

/* ---- the header ---- */

static void pd__parse_shape(pd__json *j, pd__tensor *t) {
    if (!pd__json_expect(j, '[', "'['")) return;
    t->size = 1;
    for (t->dim_count = 0; pd__json_more(j, ']', t->dim_count); t->dim_count++) {
        int64_t start = j->at, dim = pd__json_size(j);
        if (t->dim_count < PD__FILE_DIMS) t->dims[t->dim_count] = dim;
        if (!pd__multiply_sizes(t->size, dim, &t->size)) {
            j->at = start;
            pd__json_fail(j, "fewer than 2^63 numbers in all");
            return;
        }
    }
}

static void pd__parse_offsets(pd__json *j, pd__tensor *t) {
    if (!pd__json_expect(j, '[', "'['")) return;
    t->begin = pd__json_size(j);
    pd__json_expect(j, ',', "','");
    t->end = pd__json_size(j);
    pd__json_expect(j, ']', "']'");
}

static void pd__parse_dtype(pd__json *j, pd__tensor *t) {
    t->dtype = pd__json_string(j);
    t->element = PD__OTHER;
    for (int i = 0; t->dtype && i < PD__OTHER; i++)
        if (strcmp(t->dtype, pd__dtypes[i].name) == 0) t->element = (pd__element)i;
}

static void pd__parse_tensor(pd__json *j, pd__tensor *t) {
    static const char *const names[] = { "dtype", "shape", "data_offsets" };
    static void (*const parse[])(pd__json *, pd__tensor *) = { pd__parse_dtype, pd__parse_shape, pd__parse_offsets };
    bool seen[] = { false, false, false };
    if (!pd__json_expect(j, '{', "'{'")) return;
    for (int64_t n = 0; pd__json_more(j, '}', n); n++) {
        const char *name = pd__json_name(j);
        int k = 0;
        while (name && k < PD__COUNT(names) && strcmp(name, names[k]) != 0) k++;
        if (!name) return;
        if (k == PD__COUNT(names)) {
            pd__json_skip(j, 0);
            continue;
        }
        if (seen[k]) pd__json_fail(j, "no second value of the same name");
        seen[k] = true;
        parse[k](j, t);
    }
    for (int k = 0; k < PD__COUNT(names) && j->status == PD_OK; k++)
        if (!seen[k])
            j->status = pd__fail(j->net, PD_E_FORMAT, "%.300s: tensor \"%s\" has no \"%s\"", j->path,
                                 pd__show(j->net, t->name), names[k]);
}

static void pd__parse_texts(pd__json *j, pd__tensors *t) {
    if (!pd__json_expect(j, '{', "'{'")) return;
    for (int64_t n = 0; pd__json_more(j, '}', n); n++) {
        pd__text_pair pair;
        pair.name = pd__json_name(j);
        if (!pair.name) return;
        pair.text = pd__json_string(j);
        if (!pair.text) return;
        if (!pd_grow(&t->net->allocator, (void **)&t->texts, &t->text_capacity, t->text_count + 1, sizeof pair)) {
            j->status = pd__no_memory(t->net, "a file's metadata");
            return;
        }
        t->texts[t->text_count++] = pair;
    }
}

static void pd__parse_header(pd__json *j, pd__tensors *t) {
    bool have_texts = false;
    if (!pd__json_take(j, '{')) pd__json_fail(j, "'{'");
    for (int64_t n = 0; pd__json_more(j, '}', n); n++) {
        pd__tensor tensor = PD__ZERO;
        tensor.name = pd__json_name(j);
        if (!tensor.name) return;
        if (strcmp(tensor.name, "__metadata__") == 0) {
            if (have_texts) pd__json_fail(j, "no second value of the same name");
            have_texts = true;
            pd__parse_texts(j, t);
            continue;
        }
        pd__parse_tensor(j, &tensor);
        if (j->status != PD_OK) return;
        if (!pd_grow(&t->net->allocator, (void **)&t->list, &t->capacity, t->count + 1, sizeof tensor)) {
            j->status = pd__no_memory(t->net, "a file's list of tensors");
            return;
        }
        t->list[t->count++] = tensor;
    }
    pd__json_space(j);
    if (j->status == PD_OK && j->at < j->length) pd__json_fail(j, "nothing but spaces after the last '}'");
}

/* Both begin with a name: pd__tensor and pd__text_pair. */
static int pd__compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int pd__compare_offsets(const void *a, const void *b) {
    const pd__tensor *x = (const pd__tensor *)a, *y = (const pd__tensor *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

/* The element of a list sorted by name whose name is `prefix` followed by `name`; NULL when there is none. */
static void *pd__find_named(void *list, int64_t count, size_t size, const char *prefix, const char *name) {
    size_t length = strlen(prefix);
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        char *element = (char *)list + (size_t)middle * size;
        const char *here = *(const char *const *)(void *)element;
        int order = strncmp(here, prefix, length);
        if (order == 0) order = strcmp(here + length, name);
        if (order == 0) return element;
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* Sorts by name; two of the same name are an error. */
static pd_status pd__sort_names(pd__tensors *t, void *list, int64_t count, size_t size, const char *what) {
    if (count > 1) qsort(list, (size_t)count, size, pd__compare_names);
    for (int64_t i = 1; i < count; i++) {
        const char *name = *(const char *const *)(void *)((char *)list + (size_t)i * size);
        if (strcmp(*(const char *const *)(void *)((char *)list + (size_t)(i - 1) * size), name) == 0)
            return pd__fail(t->net, PD_E_FORMAT, "%.300s: two %s \"%s\"", t->path, what, pd__show(t->net, name));
    }
    return PD_OK;
}

/* Is the space in the data what dtype and shape call for? A dtype that we have never heard of has any size. */
static pd_status pd__check_bytes(const pd__tensors *t, const pd__tensor *tensor) {
    int known = 0;
    int64_t bits;
    while (known < PD__COUNT(pd__dtypes) && strcmp(tensor->dtype, pd__dtypes[known].name) != 0) known++;
    if (known == PD__COUNT(pd__dtypes)) return PD_OK;
    if (!pd__multiply_sizes(tensor->size, pd__dtypes[known].bits, &bits) || bits % 8 != 0 ||
        bits / 8 != tensor->end - tensor->begin)
        return pd__fail(t->net, PD_E_FORMAT,
                        "%.300s: tensor \"%s\" has %lld bytes, which do not make %lld numbers of %s", t->path,
                        pd__show(t->net, tensor->name), (long long)(tensor->end - tensor->begin),
                        (long long)tensor->size, pd__dtypes[known].name);
    return PD_OK;
}

/* The data must be covered by the tensors, without holes and overlaps. Leaves the list sorted by offset. */
static pd_status pd__check_layout(pd__tensors *t) {
    int64_t covered = 0;
    if (t->count > 1) qsort(t->list, (size_t)t->count, sizeof *t->list, pd__compare_offsets);
    for (int64_t i = 0; i < t->count; i++) {
        const pd__tensor *tensor = &t->list[i];
        pd_status status;
        if (tensor->begin != covered || tensor->end < tensor->begin)
            return pd__fail(t->net, PD_E_FORMAT,
                            "%.300s: tensor \"%s\" has data_offsets %lld, %lld, but the next free byte is %lld",
                            t->path, pd__show(t->net, tensor->name), (long long)tensor->begin, (long long)tensor->end,
                            (long long)covered);
        status = pd__check_bytes(t, tensor);
        if (status != PD_OK) return status;
        covered = tensor->end;
    }
    if (covered != t->data_size)
        return pd__fail(t->net, PD_E_FORMAT, "%.300s: the file has %lld bytes of data, but its tensors have %lld%s",
                        t->path, (long long)t->data_size, (long long)covered,
                        covered > t->data_size ? ": it is cut off" : "");
    return PD_OK;
}

static pd_status pd__read_failed(const pd__tensors *t, int error) {
    return pd__fail(t->net, PD_E_IO, "%.300s: could not be read: %s", t->path,
                    error ? strerror(error) : "it became shorter");
}

/* Reads exactly n bytes, or fails. */
static pd_status pd__read_bytes(const pd__tensors *t, void *to, int64_t n) {
    errno = 0;
    if (n == 0 || fread(to, (size_t)n, 1, t->file) == 1) return PD_OK;
    return pd__read_failed(t, errno);
}

/* Reads the header as it is; sets data_start and data_size. *length: its bytes. */
static pd_status pd__read_header(pd__tensors *t, int64_t *length) {
    unsigned char bytes[8];
    int64_t size;
    uint64_t claimed;
    pd_status status;
    errno = 0;
    size = pd__file_size(t->file);
    if (size < 0 || !pd__seek(t->file, 0)) return pd__read_failed(t, errno);
    if (size < 8)
        return pd__fail(t->net, PD_E_FORMAT, "%.300s: %lld bytes are too few for a safetensors file", t->path,
                        (long long)size);
    status = pd__read_bytes(t, bytes, 8);
    if (status != PD_OK) return status;
    claimed = pd__load_le(bytes, 8);
    if (claimed > PD__HEADER_MAX)
        return pd__fail(t->net, PD_E_FORMAT,
                        "%.300s: a header of %llu bytes; at most %d are allowed (not a safetensors file?)", t->path,
                        (unsigned long long)claimed, PD__HEADER_MAX);
    if ((int64_t)claimed > size - 8)
        return pd__fail(t->net, PD_E_FORMAT, "%.300s: a header of %llu bytes does not fit into a file of %lld", t->path,
                        (unsigned long long)claimed, (long long)size);
    t->header = (char *)pd_alloc(&t->net->allocator, (int64_t)claimed, 1);
    if (!t->header) return pd__no_memory(t->net, "a file's header");
    *length = (int64_t)claimed;
    t->data_start = 8 + *length;
    t->data_size = size - t->data_start;
    return pd__read_bytes(t, t->header, *length);
}

/* Frees the index; the file stays open. */
static void pd__tensors_close(pd__tensors *t) {
    const pd_allocator *a = &t->net->allocator;
    pd_free(a, t->header);
    pd_free(a, t->list);
    pd_free(a, t->texts);
    memset(t, 0, sizeof *t);
}

/* The one way in: reads a file's header and checks everything in it, also against the file's size. `path` is for
   messages. To be ended with pd__tensors_close; after a failure, which leaves a message in the net, all is freed. */
static pd_status pd__tensors_open(pd_net *net, FILE *file, const char *path, pd__tensors *t) {
    pd__json j = PD__ZERO;
    pd_status status;
    memset(t, 0, sizeof *t);
    t->net = j.net = net;
    t->path = j.path = path;
    t->file = file;
    status = pd__read_header(t, &j.length);
    j.text = t->header;
    if (status == PD_OK) {
        j.at = (int64_t)pd__utf8_prefix(j.text, (size_t)j.length);
        if (j.at < j.length) pd__json_fail(&j, "UTF-8");
        else j.at = 0;
        if (j.status == PD_OK) pd__parse_header(&j, t);
        status = j.status;
    }
    if (status == PD_OK) status = pd__check_layout(t);
    if (status == PD_OK) status = pd__sort_names(t, t->list, t->count, sizeof *t->list, "tensors");
    if (status == PD_OK) status = pd__sort_names(t, t->texts, t->text_count, sizeof *t->texts, "metadata entries");
    if (status != PD_OK) pd__tensors_close(t);
    return status;
}

/* The tensor named `prefix` and `name`, or NULL. */
static pd__tensor *pd__tensors_find(const pd__tensors *t, const char *prefix, const char *name) {
    return (pd__tensor *)pd__find_named(t->list, t->count, sizeof *t->list, prefix, name);
}

/* The same for the metadata. */
static const char *pd__tensors_text(const pd__tensors *t, const char *prefix, const char *name) {
    const pd__text_pair *pair =
        (const pd__text_pair *)pd__find_named(t->texts, t->text_count, sizeof *t->texts, prefix, name);
    return pair ? pair->text : NULL;
}

/* Are the metadata those that were written, if their checksum is there? */
static pd_status pd__check_texts(const pd__tensors *t) {
    const char *expected = pd__tensors_text(t, "", "checksum");
    pd__sum sum = PD__ZERO;
    char text[PD__SUM_DIGITS + 1];
    for (int64_t i = 0; i < t->text_count; i++)
        if (t->texts[i].text != expected) pd__sum_entry(&sum, "", t->texts[i].name, t->texts[i].text);
    pd__sum_text(sum, text);
    if (!expected || strcmp(text, expected) == 0) return PD_OK;
    return pd__fail(t->net, PD_E_FORMAT, "%.300s: the metadata are damaged: their checksum is %s, not %.40s", t->path,
                    text, pd__show(t->net, expected));
}

/* ---- the net's texts ---- */

#define PD__NOTE_PREFIX "text/"

static void pd__note_free(const pd_allocator *a, pd__note *note) {
    pd_free(a, note->name);
    pd_free(a, note->text);
}

static void pd__notes_free(const pd_allocator *a, pd__notes *notes) {
    for (int64_t i = 0; i < notes->count; i++) pd__note_free(a, &notes->list[i]);
    pd_free(a, notes->list);
    memset(notes, 0, sizeof *notes);
}

static pd__note *pd__notes_find(const pd__notes *notes, const char *name) {
    return (pd__note *)pd__find_named(notes->list, notes->count, sizeof *notes->list, "", name);
}

static void pd__notes_remove(const pd_allocator *a, pd__notes *notes, pd__note *note) {
    pd__note_free(a, note);
    notes->count--;
    memmove(note, note + 1, (size_t)(notes->list + notes->count - note) * sizeof *note);
}

/* Copies a text, in the place of one of the same name. False when out of memory: then nothing has changed. */
static bool pd__notes_put(const pd_allocator *a, pd__notes *notes, const char *name, const char *text) {
    pd__note *old, note;
    int64_t at;
    if (!pd_grow(a, (void **)&notes->list, &notes->capacity, notes->count + 1, sizeof note)) return false;
    note.name = pd__copy_text(a, name);
    note.text = pd__copy_text(a, text);
    if (!note.name || !note.text) {
        pd__note_free(a, &note);
        return false;
    }
    old = pd__notes_find(notes, name);
    if (old) pd__notes_remove(a, notes, old);
    for (at = notes->count++; at > 0 && strcmp(notes->list[at - 1].name, name) > 0; at--)
        notes->list[at] = notes->list[at - 1];
    notes->list[at] = note;
    return true;
}

PD_DEF pd_status pd_net_set_text(pd_net *net, const char *name, const char *text) {
    pd__note *old;
    if (!pd__check_net(net)) return pd_error_status(net);
    if (net->origin)
        return pd__fail(net, PD_E_STATE, "pd_net_set_text: a shared net reads another's texts; set it in that one");
    if (!name || !pd__name_ok(name) || pd__utf8_prefix(name, strlen(name)) < strlen(name))
        return pd__fail(
            net, PD_E_ARGUMENT,
            "pd_net_set_text: a name has 1 to 200 characters of UTF-8, no quotes, backslashes or control characters");
    old = pd__notes_find(&net->notes, name);
    if (!text) {
        if (old) pd__notes_remove(&net->allocator, &net->notes, old);
        return PD_OK;
    }
    if (pd__utf8_prefix(text, strlen(text)) < strlen(text))
        return pd__fail(net, PD_E_FORMAT, "pd_net_set_text: \"%.100s\" is not UTF-8 at byte %lld", name,
                        (long long)pd__utf8_prefix(text, strlen(text)) + 1);
    return pd__notes_put(&net->allocator, &net->notes, name, text) ? PD_OK : pd__no_memory(net, "a text");
}

PD_DEF const char *pd_net_text(const pd_net *net, const char *name) {
    const pd__note *note = NULL;
    if (net && name) note = pd__notes_find(net->origin ? &net->origin->notes : &net->notes, name);
    return note ? note->text : NULL;
}

/* Checks the metadata, and makes `notes` those of the net and those of the file, if it has any. */
static pd_status pd__stage_notes(const pd__tensors *t, pd__notes *notes) {
    const pd_allocator *a = &t->net->allocator;
    const size_t n = strlen(PD__NOTE_PREFIX);
    bool any = false, ok = true;
    pd_status status = pd__check_texts(t);
    for (int64_t i = 0; status == PD_OK && i < t->text_count; i++) {
        const char *name = t->texts[i].name;
        if (strncmp(name, PD__NOTE_PREFIX, n) != 0) continue;
        any = true;
        if (!pd__name_ok(name + n))
            return pd__fail(t->net, PD_E_FORMAT, "%.300s: metadata \"%s\": no name that a text can have", t->path,
                            pd__show(t->net, name));
        ok = ok && pd__notes_put(a, notes, name + n, t->texts[i].text);
    }
    for (int64_t i = 0; any && i < t->net->notes.count; i++) {
        const pd__note *note = &t->net->notes.list[i];
        if (!pd__notes_find(notes, note->name)) ok = ok && pd__notes_put(a, notes, note->name, note->text);
    }
    return status == PD_OK && !ok ? pd__no_memory(t->net, "a file's texts") : status;
}

/* The net's are now these. */
static void pd__commit_notes(pd_net *net, pd__notes *notes) {
    pd__notes old = net->notes;
    if (notes->count == 0) return;
    net->notes = *notes;
    *notes = old;
}

/* ---- items: what of a net or trainer is in a file ---- */

/* The blocks of columns of pd_load_map. Without `blocks` there is one. */
typedef struct pd__column_blocks {
    int count, kept;  /* in the file, in the parameter */
    int8_t place[32]; /* of each in the file: its place in the parameter, -1: left out */
} pd__column_blocks;

static const pd__column_blocks pd__one_block = { 1, 1, { 0 } };

/* Takes `blocks` to pieces. Returns what is wrong with it, or NULL. */
static const char *pd__parse_blocks(const char *text, pd__column_blocks *blocks) {
    const char *arrow = text ? strstr(text, "->") : NULL, *found;
    *blocks = pd__one_block;
    if (!text) return NULL;
    if (!arrow || arrow == text || !arrow[2]) return "expected letters, \"->\" and letters";
    if (arrow - text > PD__COUNT(blocks->place) || strlen(arrow + 2) > (size_t)PD__COUNT(blocks->place))
        return "more than 32 blocks";
    blocks->count = (int)(arrow - text);
    blocks->kept = (int)strlen(arrow + 2);
    for (int i = 0; i < blocks->count; i++) {
        if (text[i] == '-') return "a '-' in front of \"->\"";
        if (memchr(text, text[i], (size_t)i)) return "two blocks with the same letter";
        found = strchr(arrow + 2, text[i]);
        if (found && strchr(found + 1, text[i])) return "a block that is taken twice";
        blocks->place[i] = (int8_t)(found ? found - (arrow + 2) : -1);
    }
    for (const char *at = arrow + 2; *at; at++)
        if (*at != '-' && !memchr(text, *at, (size_t)blocks->count)) return "a block that the file doesn't have";
    return NULL;
}

/* One array to be written or read: a parameter's value, or something that belongs to it. */
typedef struct pd__item {
    pd_param *param;
    char prefix[16]; /* it is called prefix and the parameter's name */
    int dim_count;
    int64_t dims[PD_MAX_DIMS], size;
    pd__element element; /* U8 and no numbers: the parameter's mask; I32, and F64 without numbers: see pd__add_lag */
    pd_real *numbers;    /* device memory */
    const pd_trainer
        *lagging;          /* writing: it has left steps for later on these rows, which are written as they are now */
    struct pd__lazy *lazy; /* of "steps/" and "behind/" */
    int64_t step;          /* .. the step that they are of */
    pd__sum sum;           /* writing: of what has been written */
    bool magnitudes;       /* never negative; infinite where a square was too large, and then steps are 0 */
    pd__tensor *from;      /* reading: where it comes from; NULL: it stays as it is */
    bool transpose;        /* reading: `from` is the other way round */
    pd__column_blocks blocks; /* reading: .. and has its columns in this order */
    int64_t onto;             /* reading: 1 + the item that this is added to, 0: none */
    void *staged;             /* reading: the new contents, host memory */
} pd__item;

typedef struct pd__items {
    pd_net *net;
    pd_device *device; /* where the numbers are */
    pd__item *list;
    int64_t count, capacity;
} pd__items;

static void pd__items_free(pd__items *items) {
    const pd_allocator *a = &items->net->allocator;
    for (int64_t i = 0; i < items->count; i++) pd_free(a, items->list[i].staged);
    pd_free(a, items->list);
}

/* The prefix is KIND/NUMBER/, or KIND as it is if the number is negative. */
static pd_status pd__items_add(pd__items *items, pd_param *param, const char *kind, int number, pd_real *numbers) {
    pd__item *item;
    if (!pd_grow(&items->net->allocator, (void **)&items->list, &items->capacity, items->count + 1,
                 sizeof *items->list))
        return pd__no_memory(items->net, "the list of a file's tensors");
    item = &items->list[items->count++];
    memset(item, 0, sizeof *item);
    item->param = param;
    item->blocks = pd__one_block;
    item->dim_count = param->dim_count;
    memcpy(item->dims, param->dims, sizeof item->dims);
    item->size = param->size;
    item->element = numbers ? pd__real_element : PD__U8;
    item->numbers = numbers;
    if (number >= 0) snprintf(item->prefix, sizeof item->prefix, "%s/%d/", kind, number);
    else snprintf(item->prefix, sizeof item->prefix, "%s", kind);
    return PD_OK;
}

/* Of `n` of an item's numbers: the place of the first that can't be one of them, or -1. */
static int64_t pd__bad_number(const pd__item *item, const pd_real *numbers, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (item->magnitudes ? !(numbers[i] >= 0) : !pd__finite((double)numbers[i])) return i;
    return -1;
}

/* All parameters and buffers of the net, in order of creation. */
static pd_status pd__items_of_net(pd__items *items, pd_net *net) {
    pd_status status = PD_OK;
    items->net = net;
    items->device = pd__owner(net)->device;
    for (pd_param *p = pd_param_first(net); p && status == PD_OK; p = p->next) {
        status = pd__items_add(items, p, "", -1, p->value);
        if (status == PD_OK && p->touched) items->list[items->count - 1].lagging = pd__lagging(p);
    }
    return status;
}

/* ---- reading values ---- */

/* Is `item->from` fit for the item? `elements`: bits of the pd__element that will do. */
static pd_status pd__check_item(const pd__items *items, const pd__item *item, const pd__tensors *t, unsigned elements) {
    const pd__tensor *from = item->from;
    const pd_param *p = item->param;
    int64_t wanted[PD_MAX_DIMS];
    bool fits = from->dim_count == item->dim_count, turned = item->dim_count == 2 && from->dim_count == 2;
    int kept = from->dim_count < PD__FILE_DIMS ? from->dim_count : PD__FILE_DIMS;
    if (!((elements >> from->element) & 1u))
        return pd__fail(items->net, PD_E_UNSUPPORTED, "%.300s: tensor \"%s\" holds %s, which can't be loaded here",
                        t->path, pd__show(items->net, from->name), pd__show(items->net, from->dtype));
    memcpy(wanted, item->dims, sizeof wanted);
    wanted[item->dim_count - 1] = wanted[item->dim_count - 1] / item->blocks.kept * item->blocks.count;
    turned = turned && from->dims[0] == wanted[1] && from->dims[1] == wanted[0];
    for (int i = 0; i < item->dim_count && fits; i++) fits = from->dims[i] == wanted[i];
    if (item->transpose ? turned : fits) return PD_OK;
    return pd__fail(items->net, PD_E_SHAPE, "%.300s: tensor \"%s\": expected %s%s for parameter \"%.100s\", found %s%s",
                    t->path, pd__show(items->net, from->name), pd__dims_text(items->net, item->dim_count, wanted),
                    item->transpose ? " transposed" : "", p->name,
                    from->dim_count ? pd__dims_text(items->net, kept, from->dims) : "a single number",
                    turned ? " (pd_load_map has a `transpose` for this)" : "");
}

static pd__sum pd__sum_of_tensor(const pd__tensor *from) {
    return pd__sum_of_shape(from->dtype, (int)pd__min(from->dim_count, PD__FILE_DIMS), from->dims);
}

/* Is it the sum that the metadata have, if they have one? */
static pd_status pd__check_sum(const pd__tensors *t, const pd__tensor *from, pd__sum sum) {
    const char *expected = pd__tensors_text(t, "checksum/", from->name);
    char text[PD__SUM_DIGITS + 1];
    pd__sum_text(sum, text);
    if (!expected || strcmp(text, expected) == 0) return PD_OK;
    return pd__fail(
        t->net, PD_E_FORMAT,
        "%.250s: tensor \"%s\" is damaged: its checksum is %s, not %.40s (or another program has changed it "
        "and kept the checksum)",
        t->path, pd__show(t->net, from->name), text, pd__show(t->net, expected));
}

/* Where the file's number i goes in the parameter; -1: it is left out. */
static int64_t pd__place_of(const pd__item *item, int64_t i) {
    const pd__column_blocks *b = &item->blocks;
    int64_t columns = item->dims[item->dim_count - 1], rows = item->size / columns;
    int64_t width = columns / b->kept, all = width * b->count; /* of a block, and of all in the file */
    int64_t row = item->transpose ? i % rows : i / all, column = item->transpose ? i / rows : i % all;
    int64_t place = b->place[column / width];
    return place < 0 ? -1 : row * columns + place * width + column % width;
}

/* Reads one tensor's numbers into new host memory, item->staged. */
static pd_status pd__stage_numbers(pd__item *item, const pd__tensors *t, unsigned char *chunk, pd_real *converted) {
    const pd__tensor *from = item->from;
    int64_t bytes = pd__dtypes[from->element].bits / 8, per_chunk = PD__FILE_CHUNK / (int64_t)sizeof(double);
    bool moved = item->transpose || item->blocks.count > 1 || item->blocks.kept > 1;
    pd_real *to = (pd_real *)item->staged;
    pd__sum sum = pd__sum_of_tensor(from);
    for (int64_t at = 0; at < from->size; at += per_chunk) {
        int64_t n = pd__min(per_chunk, from->size - at), bad;
        pd_real *loaded = moved ? converted : to + at;
        pd_status status = pd__read_bytes(t, chunk, n * bytes);
        if (status != PD_OK) return status;
        pd__sum_bytes(&sum, chunk, n * bytes);
        pd__load_reals(from->element, chunk, n, loaded);
        bad = pd__bad_number(item, loaded, n);
        if (bad >= 0)
            return pd__fail(t->net, PD_E_NUMERIC, "%.300s: tensor \"%s\": number %lld, %g, is %s", t->path,
                            pd__show(t->net, from->name), (long long)(at + bad),
                            pd__load_real(from->element, chunk + bad * bytes),
                            pd__finite((double)loaded[bad]) ? "negative" : "not a finite number of this build");
        for (int64_t i = 0; moved && i < n; i++) {
            int64_t place = pd__place_of(item, at + i);
            if (place >= 0) to[place] = converted[i];
        }
    }
    return pd__check_sum(t, from, sum);
}

/* Integers of 4 bytes and doubles from a file's bytes, in place. */
static void pd__load_in_place(pd__element element, void *numbers, int64_t n) {
    unsigned char *bytes = (unsigned char *)numbers;
    for (int64_t i = 0; element == PD__I32 && i < n; i++, bytes += 4) {
        uint32_t bits = pd__load_le32(bytes);
        memcpy(bytes, &bits, sizeof bits);
    }
    for (int64_t i = 0; element == PD__F64 && i < n; i++, bytes += 8) {
        double number = pd__load_real(PD__F64, bytes);
        memcpy(bytes, &number, sizeof number);
    }
}

/* What is not pd_real as it is. */
static pd_status pd__stage_others(pd__item *item, const pd__tensors *t) {
    int64_t bytes = item->size * (pd__dtypes[item->element].bits / 8);
    pd__sum sum = pd__sum_of_tensor(item->from);
    pd_status status = pd__read_bytes(t, item->staged, bytes);
    if (status != PD_OK) return status;
    pd__sum_bytes(&sum, item->staged, bytes);
    pd__load_in_place(item->element, item->staged, item->size);
    return pd__check_sum(t, item->from, sum);
}

static pd_status pd__stage_item(pd__item *item, const pd__tensors *t, unsigned char *chunk, pd_real *converted) {
    size_t bytes = item->numbers ? sizeof(pd_real) : (size_t)pd__dtypes[item->element].bits / 8;
    errno = 0;
    if (!pd__seek(t->file, t->data_start + item->from->begin)) return pd__read_failed(t, errno);
    item->staged = pd_alloc(&t->net->allocator, item->size, bytes);
    if (!item->staged) return pd__no_memory(t->net, "a file's numbers");
    if (item->numbers) return pd__stage_numbers(item, t, chunk, converted);
    return pd__stage_others(item, t);
}

/* Adds what was staged to the item that it goes onto. */
static pd_status pd__add_staged(pd__items *items, pd__item *item, const pd__tensors *t) {
    const pd_real *more = (const pd_real *)item->staged;
    pd_real *to = (pd_real *)items->list[item->onto - 1].staged;
    pd_status status = PD_OK;
    for (int64_t i = 0; status == PD_OK && i < item->size; i++) {
        to[i] += more[i];
        if (!pd__finite((double)to[i]))
            status = pd__fail(t->net, PD_E_NUMERIC,
                              "%.300s: tensor \"%s\": added to parameter \"%.100s\", number %lld is not finite",
                              t->path, pd__show(t->net, item->from->name), item->param->name, (long long)i);
    }
    pd_free(&t->net->allocator, item->staged);
    item->staged = NULL;
    return status;
}

/* Reads everything that has a `from`; changes nothing but the items. */
static pd_status pd__items_stage(pd__items *items, const pd__tensors *t) {
    const pd_allocator *a = &items->net->allocator;
    unsigned char *chunk = (unsigned char *)pd_alloc(a, PD__FILE_CHUNK, 1);
    pd_real *converted = (pd_real *)pd_alloc(a, PD__FILE_CHUNK / (int64_t)sizeof(double), sizeof *converted);
    pd_status status = chunk && converted ? PD_OK : pd__no_memory(items->net, "a file's numbers");
    for (int64_t i = 0; i < items->count && status == PD_OK; i++) {
        pd__item *item = &items->list[i];
        if (item->from) status = pd__stage_item(item, t, chunk, converted);
        if (status == PD_OK && item->onto) status = pd__add_staged(items, item, t);
    }
    pd_free(a, converted);
    pd_free(a, chunk);
    return status;
}

/* Puts what was staged in place. Only a device that breaks down can fail here. */
static pd_status pd__items_commit(pd__items *items) {
    pd_device *d = items->device;
    pd__begin_anew(items->net, true);
    for (int64_t i = 0; i < items->count; i++) {
        pd__item *item = &items->list[i];
        if (!item->staged) continue;
        if (item->numbers) {
            d->upload(d, item->numbers, item->staged, (size_t)item->size * sizeof(pd_real));
        } else if (!item->lazy) {
            pd_free(&items->net->allocator, item->param->mask);
            item->param->mask = (unsigned char *)item->staged;
            item->staged = NULL;
        }
    }
    return pd__wait_for_device(items->net);
}

/* Is an earlier entry for the same parameter there, or not, as it should be? */
static pd_status pd__check_added(pd_net *net, const pd_load_opts *opts, int i) {
    const pd_load_map *m = &opts->map[i];
    int k = 0;
    while (k < i && strcmp(opts->map[k].to, m->to) != 0) k++;
    if (k < i && !m->add)
        return pd__fail(net, PD_E_ARGUMENT,
                        "pd_load: map entries %d and %d both load parameter \"%.100s\", and the latter doesn't add", k,
                        i, m->to);
    if (k == i && m->add)
        return pd__fail(net, PD_E_ARGUMENT,
                        "pd_load: map entry %d adds to parameter \"%.100s\", which no entry before it loads", i, m->to);
    return PD_OK;
}

static pd_status pd__check_blocks(pd_net *net, int i, const pd_load_map *m, const pd_param *p) {
    pd__column_blocks blocks;
    const char *fault = pd__parse_blocks(m->blocks, &blocks);
    if (fault) return pd__fail(net, PD_E_ARGUMENT, "pd_load: map entry %d: blocks \"%.80s\": %s", i, m->blocks, fault);
    if (p->dims[p->dim_count - 1] % blocks.kept != 0)
        return pd__fail(
            net, PD_E_ARGUMENT,
            "pd_load: map entry %d: blocks \"%.80s\": parameter \"%.100s\" is %s; its columns are not %d blocks", i,
            m->blocks, m->to, pd__dims_text(net, p->dim_count, p->dims), blocks.kept);
    return PD_OK;
}

static pd_status pd__check_map(pd_net *net, const pd_load_opts *opts) {
    if (opts->map_count < 0 || (opts->map_count > 0 && !opts->map))
        return pd__fail(net, PD_E_ARGUMENT, "pd_load: %d map entries, but no map", opts->map_count);
    for (int i = 0; i < opts->map_count; i++) {
        const pd_load_map *m = &opts->map[i];
        const pd_param *p = m->from ? pd_param_find(net, m->to) : NULL;
        pd_status status;
        if (!m->from || !m->to) return pd__fail(net, PD_E_ARGUMENT, "pd_load: map entry %d lacks a name", i);
        if (!p)
            return pd__fail(net, PD_E_ARGUMENT, "pd_load: map entry %d: the net has no parameter \"%.100s\"", i, m->to);
        if (m->transpose && p->dim_count != 2)
            return pd__fail(net, PD_E_ARGUMENT,
                            "pd_load: map entry %d: parameter \"%.100s\" is %s; only two dimensions can be transposed",
                            i, m->to, pd__dims_text(net, p->dim_count, p->dims));
        status = pd__check_added(net, opts, i);
        if (status == PD_OK) status = pd__check_blocks(net, i, m, p);
        if (status != PD_OK) return status;
    }
    return PD_OK;
}

/* Finds an item's tensor, by a map's entry or, without one, by its name, and checks it. `optional`: without an entry
   there may be none. */
static pd_status pd__match_tensor(pd__items *items, pd__item *item, const pd__tensors *t, const pd_load_map *entry,
                                  bool optional) {
    const unsigned loadable = 1u << PD__F64 | 1u << PD__F32 | 1u << PD__F16 | 1u << PD__BF16;
    const char *name = entry ? entry->from : item->param->name;
    if (entry) {
        item->transpose = entry->transpose;
        pd__parse_blocks(entry->blocks, &item->blocks); /* has been checked */
    }
    optional = optional && !entry;
    item->from = pd__tensors_find(t, "", name);
    if (!item->from && optional && pd__tensors_text(t, "checksum/", name))
        return pd__fail(items->net, PD_E_FORMAT, "%.300s: no tensor \"%.100s\", of which it has the checksum", t->path,
                        name);
    if (!item->from && optional) return PD_OK;
    if (!item->from)
        return pd__fail(items->net, PD_E_FORMAT, "%.300s: no tensor \"%.100s\" for parameter \"%.100s\" (%s)", t->path,
                        name, item->param->name, pd__dims_text(items->net, item->param->dim_count, item->param->dims));
    return pd__check_item(items, item, t, loadable);
}

/* What the map's entries that add, add to these items: behind them in the list. */
static pd_status pd__match_added(pd__items *items, const pd__tensors *t, const pd_load_opts *opts) {
    pd_status status = PD_OK;
    for (int k = 0; k < opts->map_count && status == PD_OK; k++) {
        pd_param *p = opts->map[k].add ? pd_param_find(items->net, opts->map[k].to) : NULL;
        int64_t onto = 0;
        if (!p) continue;
        while (items->list[onto].param != p) onto++;
        status = pd__items_add(items, p, "", -1, p->value);
        if (status != PD_OK) break;
        items->list[items->count - 1].onto = onto + 1;
        status = pd__match_tensor(items, &items->list[items->count - 1], t, &opts->map[k], false);
    }
    return status;
}

/* Finds each parameter's tensors, by the map or by its name, and checks them. */
static pd_status pd__match_tensors(pd__items *items, const pd__tensors *t, const pd_load_opts *opts) {
    bool any = items->count == 0;
    for (int64_t i = 0; i < items->count; i++) {
        pd__item *item = &items->list[i];
        const pd_load_map *entry = NULL;
        pd_status status;
        for (int k = 0; k < opts->map_count; k++)
            if (!opts->map[k].add && strcmp(opts->map[k].to, item->param->name) == 0) entry = &opts->map[k];
        status = pd__match_tensor(items, item, t, entry, opts->partial);
        if (status != PD_OK) return status;
        any = any || item->from;
    }
    if (any) return pd__match_added(items, t, opts);
    return pd__fail(items->net, PD_E_FORMAT,
                    "%.250s: none of its %lld tensors%s%s%s has the name of a parameter, such as \"%.100s\"; see "
                    "pd_load_map",
                    t->path, (long long)t->count, t->count ? ", such as \"" : "",
                    t->count ? pd__show(items->net, t->list[0].name) : "", t->count ? "\"," : "",
                    items->list[0].param->name);
}

/* pd_load from an open file. */
static pd_status pd__load_file(pd_net *net, FILE *file, const char *path, const pd_load_opts *opts) {
    static const pd_load_opts defaults = PD__ZERO;
    const pd_load_opts *o = opts ? opts : &defaults;
    pd__items items = PD__ZERO;
    pd__notes notes = PD__ZERO;
    pd__tensors t;
    pd_status status = pd__check_map(net, o);
    if (status == PD_OK) status = pd__tensors_open(net, file, path, &t);
    if (status != PD_OK) return status;
    status = pd__items_of_net(&items, net);
    if (status == PD_OK) status = pd__match_tensors(&items, &t, o);
    if (status == PD_OK) status = pd__stage_notes(&t, &notes);
    if (status == PD_OK) status = pd__items_stage(&items, &t);
    if (status == PD_OK) pd__commit_notes(net, &notes);
    if (status == PD_OK && items.count > 0) status = pd__items_commit(&items);
    pd__notes_free(&net->allocator, &notes);
    pd__items_free(&items);
    pd__tensors_close(&t);
    return status;
}

/* Opens for reading, with a message on failure. */
static FILE *pd__open_to_read(pd_net *net, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) pd__fail(net, PD_E_IO, "%.300s: could not be opened: %s", path, strerror(errno));
    return file;
}

PD_DEF pd_status pd_load(pd_net *net, const char *path, const pd_load_opts *opts) {
    FILE *file;
    pd_status status;
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!path) return pd__fail(net, PD_E_ARGUMENT, "pd_load: no path");
    if (pd__want_thawed(net, "pd_load") != PD_OK) return PD_E_STATE;
    if (net->origin)
        return pd__fail(net, PD_E_STATE, "pd_load: a shared net reads another's parameters; load into that one");
    status = pd__sync_all(net, NULL); /* so that nothing left for later comes on top of the new values */
    if (status != PD_OK) return status;
    file = pd__open_to_read(net, path);
    if (!file) return PD_E_IO;
    status = pd__load_file(net, file, path, opts);
    fclose(file);
    return status;
}

/* ---- writing ---- */

/* A file being written. The header is gone through three times: first only to count its bytes, and at last to put the
   checksums in. */
typedef struct pd__writer {
    FILE *file; /* NULL: count */
    int64_t length;
    int error;   /* the first errno */
    char last;   /* character written */
    pd__sum sum; /* of the metadata */
} pd__writer;

static void pd__put(pd__writer *w, const void *bytes, size_t n) {
    if (n > 0) w->last = ((const char *)bytes)[n - 1];
    w->length += (int64_t)n;
    if (!w->file || w->error || n == 0) return;
    errno = 0;
    if (fwrite(bytes, n, 1, w->file) != 1) w->error = errno ? errno : EIO;
}

/* Formatted text, of at most 100 bytes. */
PD_PRINTF(2, 3) static void pd__put_text(pd__writer *w, const char *format, ...) {
    char text[101];
    size_t length = 0;
    va_list args;
    va_start(args, format);
    length = (size_t)vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pd__put(w, text, length);
}

/* "PREFIXNAME": for a comma before all but the first. Names hold nothing that JSON wants escaped: see pd__name_ok. */
static void pd__put_name(pd__writer *w, const char *prefix, const char *name) {
    pd__put_text(w, "%s\"%s", w->last == '{' ? "" : ",", prefix);
    pd__put(w, name, strlen(name));
    pd__put(w, "\":", 2);
}

/* An entry of the metadata, whose text has at most 100 bytes. */
PD_PRINTF(4, 5)
static void pd__put_entry(pd__writer *w, const char *prefix, const char *name, const char *format, ...) {
    char text[101];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pd__sum_entry(&w->sum, prefix, name, text);
    pd__put_name(w, prefix, name);
    pd__put(w, "\"", 1);
    pd__put(w, text, strlen(text));
    pd__put(w, "\"", 1);
}

/* Text inside of a JSON string. */
static void pd__put_escaped(pd__writer *w, const char *text) {
    while (*text) {
        size_t n = 0;
        while ((unsigned char)text[n] >= 32 && text[n] != '"' && text[n] != '\\') n++;
        pd__put(w, text, n);
        text += n;
        if (*text == '\n') pd__put(w, "\\n", 2);
        else if (*text == '"' || *text == '\\') pd__put_text(w, "\\%c", *text);
        else if (*text) pd__put_text(w, "\\u%04x", (unsigned)*text);
        text += *text != 0;
    }
}

/* A text of the net, of any length. */
static void pd__put_note(pd__writer *w, const pd__note *note) {
    pd__sum_entry(&w->sum, PD__NOTE_PREFIX, note->name, note->text);
    pd__put_name(w, PD__NOTE_PREFIX, note->name);
    pd__put(w, "\"", 1);
    pd__put_escaped(w, note->text);
    pd__put(w, "\"", 1);
}

/* Doubles as hexadecimal floats with a whole mantissa: exact, and without a decimal point that locales change. */
static void pd__put_double(pd__writer *w, const char *name, double value) {
    int exponent = 0;
    double mantissa = ldexp(frexp(fabs(value), &exponent), 53);
    const char *sign = copysign(1, value) < 0 ? "-" : "";
    if (value - value == 0)
        pd__put_entry(w, "", name, "%s0x%llxp%d", sign, (unsigned long long)mantissa, exponent - 53);
    else pd__put_entry(w, "", name, "%s%s", sign, value == value ? "inf" : "nan");
}

/* What checkpoints say about a trainer in their metadata, beside a few named below. X(field, type, greatest): counts
   from 0; those from hostile files must not overflow soon. */
#define PD__COUNT_MAX (INT64_MAX / 4)
#define PD__COUNTERS(X)                                                                                                \
    X(samples, int64_t, PD__COUNT_MAX)                                                                                 \
    X(steps, int64_t, PD__COUNT_MAX)                                                                                   \
    X(pass, int64_t, PD__COUNT_MAX)                                                                                    \
    X(pass_samples, int64_t, PD__COUNT_MAX)                                                                            \
    X(pass_batches, int64_t, PD__COUNT_MAX)                                                                            \
    X(average_count, int64_t, PD__COUNT_MAX)                                                                           \
    X(average_old, int64_t, PD__COUNT_MAX)                                                                             \
    X(average_updates, int64_t, PD__COUNT_MAX)                                                                         \
    X(bad_tests, int, INT_MAX / 4)

static const char *const pd__optimizer_names[PD_OPT_COUNT] = { "sgd",      "momentum", "adagrad",
                                                               "adadelta", "rmsprop",  "decayed_adagrad",
                                                               "adam",     "adamw",    "adamax" };

/* What of a checkpoint's metadata, with the tensors, is all that continuing needs. */
static void pd__put_progress(pd__writer *w, const pd_trainer *trainer) {
    pd__put_entry(w, "", "checkpoint", "1");
    pd__put_entry(w, "", "optimizer", "%s", pd__optimizer_names[trainer->optimizer.kind]);
    pd__put_entry(w, "", "seed", "%llu", (unsigned long long)trainer->net->seed);
    pd__put_entry(w, "", "step", "%llu", (unsigned long long)trainer->net->step);
#define PD__PUT(field, type, greatest) pd__put_entry(w, "", #field, "%llu", (unsigned long long)trainer->field);
    PD__COUNTERS(PD__PUT)
#undef PD__PUT
    pd__put_double(w, "pass_cost", trainer->pass_cost);
    pd__put_double(w, "best_cost", trainer->best_cost);
    for (int i = 0; i < trainer->trained_count; i++)
        pd__put_entry(w, "updates/", trainer->trained[i].param->name, "%llu",
                      (unsigned long long)trainer->trained[i].step);
}

static const char *pd__item_dtype(const pd__item *item) { return pd__dtypes[item->element].name; }

/* Progress (of a `trainer`, or NULL), the net's texts, checksums of the tensors and, of a checkpoint and with texts, of
   the entries themselves. */
static void pd__put_metadata(pd__writer *w, const pd__items *items, const pd_trainer *trainer) {
    const pd__notes *notes = &pd__owner(items->net)->notes;
    char text[PD__SUM_DIGITS + 1], prefix[32];
    memset(&w->sum, 0, sizeof w->sum);
    pd__put(w, "\"__metadata__\":{", 16);
    if (trainer) pd__put_progress(w, trainer);
    for (int64_t i = 0; i < notes->count; i++) pd__put_note(w, &notes->list[i]);
    for (int64_t i = 0; i < items->count; i++) {
        const pd__item *item = &items->list[i];
        snprintf(prefix, sizeof prefix, "checksum/%s", item->prefix);
        pd__sum_text(item->sum, text);
        pd__put_entry(w, prefix, item->param->name, "%s", text);
    }
    pd__sum_text(w->sum, text);
    if (trainer || notes->count > 0) pd__put_entry(w, "", "checksum", "%s", text);
    pd__put(w, "}", 1);
}

/* The whole header; `trainer` for checkpoints, or NULL. Keeps the data aligned to 8 bytes. */
static void pd__put_header(pd__writer *w, const pd__items *items, const pd_trainer *trainer) {
    int64_t begin = 0;
    w->length = 0;
    pd__put(w, "{", 1);
    pd__put_metadata(w, items, trainer);
    for (int64_t i = 0; i < items->count; i++) {
        const pd__item *item = &items->list[i];
        int64_t end = begin + item->size * (pd__dtypes[item->element].bits / 8);
        pd__put_name(w, item->prefix, item->param->name);
        pd__put_text(w, "{\"dtype\":\"%s\",\"shape\":[", pd__item_dtype(item));
        for (int k = 0; k < item->dim_count; k++) pd__put_text(w, k ? ",%lld" : "%lld", (long long)item->dims[k]);
        pd__put_text(w, "],\"data_offsets\":[%lld,%lld]}", (long long)begin, (long long)end);
        begin = end;
    }
    pd__put(w, "}", 1);
    while (w->length % 8) pd__put(w, " ", 1);
}

/* In the place of an errno: the numbers can't be had, and the net has the message; the header is too long. */
enum { PD__NOT_READ = -1, PD__TOO_LONG = -2 };

/* What could not be loaded is not saved: the old file is worth more. */
static void pd__check_saved(pd__writer *w, const pd__item *item, const pd_real *numbers, int64_t at, int64_t n) {
    int64_t bad = pd__bad_number(item, numbers, n);
    if (bad < 0) return;
    pd__fail(item->param->net, PD_E_NUMERIC, "\"%s%.200s\" can't be saved: number %lld is %g", item->prefix,
             item->param->name, (long long)(at + bad), (double)numbers[bad]);
    w->error = PD__NOT_READ;
}

/* Some of an item's bytes. */
static void pd__put_data(pd__writer *w, pd__item *item, const void *bytes, int64_t n) {
    pd__sum_bytes(&item->sum, bytes, n);
    pd__put(w, bytes, (size_t)n);
}

/* Numbers of an item, from `at` on, by way of `chunk`, PD__FILE_CHUNK bytes of host memory. */
static void pd__put_numbers(pd__writer *w, pd__item *item, pd_net *net, const pd_real *numbers, int64_t at,
                            int64_t count, unsigned char *chunk) {
    int64_t per_chunk = PD__FILE_CHUNK / (int64_t)sizeof(pd_real);
    for (int64_t first = 0; first < count && !w->error; first += per_chunk) {
        int64_t n = pd__min(per_chunk, count - first);
        if (pd__download(net, chunk, numbers + first, n) != PD_OK) w->error = PD__NOT_READ;
        else pd__check_saved(w, item, (const pd_real *)(const void *)chunk, at + first, n);
        pd__store_reals(chunk, n);
        pd__put_data(w, item, chunk, n * (int64_t)sizeof(pd_real));
    }
}

/* A table of which rows lag, as they are now, some at a time. */
static void pd__put_table(pd__writer *w, pd__item *item, pd_net *net, unsigned char *chunk) {
    const pd_param *p = item->param;
    pd_device *d = net->device;
    int64_t width = p->dims[1], each = pd__rows_at_once(p), capacity = 0;
    pd_real *rows = NULL;
    if (!pd_device_grow(d, &rows, &capacity, each * width)) w->error = ENOMEM;
    for (int64_t first = 0; first < p->dims[0] && !w->error; first += each) {
        int64_t n = pd__min(each, p->dims[0] - first);
        pd__read_rows(net, item->lagging, p, item->numbers, first, n, NULL, rows);
        pd__put_numbers(w, item, net, rows, first * width, n * width, chunk);
    }
    if (rows) d->free(d, rows);
}

/* The matrices of the last steps. */
static void pd__put_steps(pd__writer *w, pd__item *item) {
    for (int64_t step = item->step - item->dims[0] + 1; step <= item->step && !w->error; step++) {
        const double *matrix = item->lazy->products[item->lazy->room + (step - 1) % item->lazy->room];
        unsigned char bytes[4 * 8];
        for (int k = 0; k < 4; k++) {
            uint64_t bits;
            memcpy(&bits, matrix + k, sizeof bits);
            pd__store_le(bytes + 8 * k, bits, 8);
        }
        pd__put_data(w, item, bytes, sizeof bytes);
    }
}

static void pd__put_behind(pd__writer *w, pd__item *item) {
    for (int64_t first = 0; first < item->size && !w->error; first += PD__CHUNK_ROWS) {
        unsigned char bytes[4 * PD__CHUNK_ROWS];
        int64_t n = pd__min(PD__CHUNK_ROWS, item->size - first);
        for (int64_t i = 0; i < n; i++)
            pd__store_le32(bytes + 4 * i, (uint32_t)pd__behind(item->lazy, item->step, first + i));
        pd__put_data(w, item, bytes, 4 * n);
    }
}

/* One item's data. */
static void pd__put_item(pd__writer *w, pd__item *item, pd_net *net, unsigned char *chunk) {
    item->sum = pd__sum_of_shape(pd__item_dtype(item), item->dim_count, item->dims);
    if (item->lagging) pd__put_table(w, item, net, chunk);
    else if (item->numbers) pd__put_numbers(w, item, net, item->numbers, 0, item->size, chunk);
    else if (item->element == PD__F64) pd__put_steps(w, item);
    else if (item->element == PD__I32) pd__put_behind(w, item);
    else pd__put_data(w, item, item->param->mask, item->size);
}

/* Writes a whole file. Returns 0, an errno, PD__NOT_READ or PD__TOO_LONG. */
static int pd__write_tensors(FILE *file, pd__items *items, const pd_trainer *trainer, unsigned char *chunk) {
    pd__writer w = PD__ZERO;
    unsigned char bytes[8];
    pd__put_header(&w, items, trainer);
    if (w.length > PD__HEADER_MAX) return PD__TOO_LONG;
    pd__store_le(bytes, (uint64_t)w.length, 8);
    w.file = file;
    pd__put(&w, bytes, 8);
    pd__put_header(&w, items, trainer);
    for (int64_t i = 0; i < items->count; i++) pd__put_item(&w, &items->list[i], items->net, chunk);
    if (!w.error && !pd__seek(file, 8)) w.error = errno;
    pd__put_header(&w, items, trainer);
    return w.error;
}

/* Brings what was written to the disk itself. 0 or an errno. */
static int pd__sync_file(FILE *file) {
    if (fflush(file) != 0) return errno;
#if defined(_WIN32)
    if (_commit(_fileno(file)) != 0) return errno;
#elif defined(PD__POSIX)
    if (fsync(fileno(file)) != 0) return errno;
#endif
    return 0;
}

/* Puts `temporary` in the place of `path`, in one step. 0 or an errno. */
static int pd__replace_file(const char *temporary, const char *path) {
#if defined(_WIN32)
    if (!MoveFileExA(temporary, path, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH)) return EACCES;
#else
    if (rename(temporary, path) != 0) return errno;
#endif
    return 0;
}

/* Brings the new name to the disk; `path` is cut to its directory. Where directories can't be opened or synced the
   file system does as it likes. 0 or an errno. */
static int pd__sync_directory(char *path) {
    int error = 0;
#if defined(PD__POSIX)
    char *slash = strrchr(path, '/');
    int directory;
    if (!slash) strcpy(path, ".");
    else slash[slash == path] = '\0';
    directory = open(path, O_RDONLY);
    if (directory < 0) return 0;
    if (fsync(directory) != 0 && errno == EIO) error = EIO;
    close(directory);
#else
    (void)path;
#endif
    return error;
}

/* rename would put a file in the place of /dev/null, too. */
static bool pd__is_special_file(const char *path) {
#if defined(PD__POSIX)
    struct stat s;
    return stat(path, &s) == 0 && !S_ISREG(s.st_mode);
#else
    (void)path;
    return false;
#endif
}

/* Bytes of a path up to its last part. */
static size_t pd__directory_length(const char *path) {
    size_t n = strlen(path);
    while (n > 0 && !pd__is_separator(path[n - 1])) n--;
    return n;
}

/* The path that links lead to, which need not exist; NULL and an errno in *error on failure. To be freed. `text`:
   PD__FILE_CHUNK bytes to work with. */
static char *pd__follow_links(const pd_allocator *a, const char *path, char *text, int *error) {
    char *target = pd__copy_text(a, path);
    *error = ENOMEM;
#if defined(PD__POSIX)
    for (int links = 0; target; links++) {
        ssize_t n = readlink(target, text, PD__FILE_CHUNK - 1);
        size_t kept = n > 0 && text[0] != '/' ? pd__directory_length(target) : 0;
        char *next = NULL;
        if (n <= 0) return target; /* no link; what else is wrong will show when it is written */
        if (links == 40) *error = ELOOP;
        else next = (char *)pd_alloc(a, (int64_t)kept + n + 1, 1);
        if (next) {
            memcpy(next, target, kept);
            memcpy(next + kept, text, (size_t)n);
        }
        pd_free(a, target);
        target = next;
    }
#else
    (void)text;
#endif
    return target;
}

/* ---- temporaries: TARGET.tmp- and 16 hexadecimal digits ----
   The writer holds a lock on its file from its beginning until it has its new name, and the system gives up the locks
   of the dead, in whatever container they were. So a sweeper removes only what it gets the lock of. Should it come
   between the creation of a file and its lock, the writer sees that the name is gone, and takes another. */

/* Is `name`, without directory, one of a temporary for `base`? */
static bool pd__is_temporary(const char *name, const char *base) {
    size_t n = strlen(base);
    if (strncmp(name, base, n) != 0 || strncmp(name + n, ".tmp-", 5) != 0) return false;
    return strlen(name + n + 5) == 16 && strspn(name + n + 5, "0123456789abcdef") == 16;
}

#if defined(PD__POSIX)

/* Removes a temporary that nobody holds. */
static void pd__remove_dead(const char *name) {
#if defined(LOCK_EX) && defined(LOCK_NB)
    struct stat s;
    int fd = open(name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) fd = open(name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return;
    if (fstat(fd, &s) == 0 && S_ISREG(s.st_mode) && flock(fd, LOCK_EX | LOCK_NB) == 0) unlink(name);
    close(fd);
#else
    (void)name;
#endif
}

/* Removes what dead savers to `target` have left. `name`: room for a temporary's name. */
static void pd__sweep(const char *target, char *name, size_t size) {
    size_t length = pd__directory_length(target);
    const struct dirent *entry;
    DIR *directory;
    snprintf(name, size, "%.*s", (int)length, target);
    directory = opendir(length ? name : ".");
    while (directory && (entry = readdir(directory)) != NULL)
        if (pd__is_temporary(entry->d_name, target + length)) {
            snprintf(name, size, "%.*s%s", (int)length, target, entry->d_name);
            pd__remove_dead(name);
        }
    if (directory) closedir(directory);
}

/* Takes the lock of a file that was just created; false when a sweeper has got hold of it. Where there are no locks,
   nothing is swept. */
static bool pd__claim(int fd, const char *name) {
#if defined(LOCK_EX) && defined(LOCK_NB)
    struct stat own, there;
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return fstat(fd, &own) == 0 && stat(name, &there) == 0 && own.st_dev == there.st_dev && own.st_ino == there.st_ino;
#else
    (void)fd;
    (void)name;
    return true;
#endif
}

/* A file that was not there before, with the mode of `target` if that exists; NULL with an errno, EEXIST for another
   name to be tried. */
static FILE *pd__create(const char *name, const char *target) {
    struct stat old;
    bool exists = stat(target, &old) == 0;
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, exists ? 0600 : 0666);
    FILE *file = NULL;
    int error = EEXIST;
    if (fd < 0) return NULL;
    if (pd__claim(fd, name)) {
        if (exists) fchmod(fd, old.st_mode & 0777); /* some file systems have no modes */
        file = fdopen(fd, "wb");
        error = errno;
    }
    if (file) return file;
    close(fd);
    unlink(name);
    errno = error;
    return NULL;
}

#elif defined(_WIN32) /* a file that is open can't be removed there */

static void pd__sweep(const char *target, char *name, size_t size) {
    size_t length = pd__directory_length(target);
    WIN32_FIND_DATAA found;
    HANDLE search;
    snprintf(name, size, "%s.tmp-*", target);
    search = FindFirstFileA(name, &found);
    if (search == INVALID_HANDLE_VALUE) return;
    do {
        if (!pd__is_temporary(found.cFileName, target + length)) continue;
        snprintf(name, size, "%.*s%s", (int)length, target, found.cFileName);
        DeleteFileA(name);
    } while (FindNextFileA(search, &found));
    FindClose(search);
}

static FILE *pd__create(const char *name, const char *target) {
    int fd = _open(name, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
    FILE *file = fd < 0 ? NULL : _fdopen(fd, "wb");
    (void)target;
    if (fd >= 0 && !file) _close(fd);
    return file;
}

#else

static void pd__sweep(const char *target, char *name, size_t size) {
    (void)target;
    (void)name;
    (void)size;
}

static FILE *pd__create(const char *name, const char *target) {
    (void)target;
    return fopen(name, "wb");
}

#endif

/* A new temporary, whose name goes to `name`; NULL with an errno on failure. */
static FILE *pd__create_temporary(const char *target, char *name, size_t size) {
    double times[2];
    uint64_t bits[2], key;
    FILE *file = NULL;
    times[0] = pd__wall_time(), times[1] = pd_seconds();
    memcpy(bits, times, sizeof bits);
    key = pd__subkey(pd__subkey(bits[0], bits[1]), (uint64_t)(uintptr_t)&key ^ (uint64_t)pd__process_id() << 40);
    for (uint64_t k = 0; k < 100 && !file; k++) {
        snprintf(name, size, "%s.tmp-%016llx", target, (unsigned long long)pd_random(key, k));
        file = pd__create(name, target);
        if (!file && errno != EEXIST) return NULL;
    }
    return file;
}

/* Writes a temporary, then puts it in the place of `target`. 0, or as pd__write_tensors; then `target` is what it was,
   unless it was only the directory that could not be brought to the disk. `temporary`: room for the name. */
static int pd__write_and_replace(const char *target, char *temporary, size_t size, pd__items *items,
                                 const pd_trainer *trainer, unsigned char *chunk) {
    FILE *file;
    int error;
    pd__sweep(target, temporary, size);
    file = pd__create_temporary(target, temporary, size);
    if (!file) return errno;
    error = pd__write_tensors(file, items, trainer, chunk);
    if (!error) error = pd__sync_file(file);
#if defined(PD__POSIX)
    if (!error) error = pd__replace_file(temporary, target); /* under the lock */
    fclose(file);                                            /* nothing is left to be written */
#else
    if (fclose(file) != 0 && !error) error = errno;
    if (!error) error = pd__replace_file(temporary, target);
#endif
    if (error) remove(temporary);
    return error ? error : pd__sync_directory(temporary);
}

/* What names from the net may not be in a file. */
static pd_status pd__check_names(const pd__items *items, bool checkpoint) {
    static const char *const prefixes[] = {
        "optimizer/", "averages/", "best/", "mask/", "stored/", "steps/", "behind/"
    };
    for (int64_t i = 0; i < items->count; i++) {
        const char *name = items->list[i].param->name;
        bool bad = strcmp(name, "__metadata__") == 0 || pd__utf8_prefix(name, strlen(name)) < strlen(name);
        for (int k = 0; checkpoint && k < PD__COUNT(prefixes); k++)
            bad = bad || strncmp(name, prefixes[k], strlen(prefixes[k])) == 0;
        if (bad)
            return pd__fail(items->net, PD_E_ARGUMENT, "parameter \"%.200s\" can't be saved under this name", name);
    }
    return PD_OK;
}

static pd_status pd__save_items(pd__items *items, const char *path, const pd_trainer *trainer) {
    pd_net *net = items->net;
    const pd_allocator *a = &net->allocator;
    char *target = NULL, *temporary = NULL;
    unsigned char *chunk;
    int error = ENOMEM;
    pd_status status = pd__check_names(items, trainer != NULL);
    if (status != PD_OK) return status;
    if (pd__is_special_file(path)) return pd__fail(net, PD_E_IO, "%.300s: is not a regular file", path);
    chunk = (unsigned char *)pd_alloc(a, PD__FILE_CHUNK, 1);
    if (chunk) target = pd__follow_links(a, path, (char *)chunk, &error);
    if (target) {
        size_t size = strlen(target) + 32;
        temporary = (char *)pd_alloc(a, (int64_t)size, 1);
        if (temporary) error = pd__write_and_replace(target, temporary, size, items, trainer, chunk);
    }
    if (error == PD__NOT_READ) {
        pd_failure why = net->failure;
        status = pd__fail(net, why.status, "%.200s: %.300s", path, why.text);
    } else if (error == ENOMEM) status = pd__no_memory(net, "writing a file");
    else if (error == PD__TOO_LONG)
        status = pd__fail(net, PD_E_ARGUMENT, "%.300s: its header, with the net's texts, would exceed %d bytes", path,
                          PD__HEADER_MAX);
    else if (error) status = pd__fail(net, PD_E_IO, "%.300s: could not be written: %s", path, strerror(error));
    pd_free(a, chunk);
    pd_free(a, temporary);
    pd_free(a, target);
    if (status == PD_OK && net->logger.log) {
        char text[512];
        snprintf(text, sizeof text, "saved %.500s", path);
        net->logger.log(net->logger.user, PD_OK, text);
    }
    return status;
}

PD_DEF pd_status pd_save(pd_net *net, const char *path) {
    pd__items items = PD__ZERO;
    pd_status status;
    if (!pd__check_learned(net)) return pd_error_status(net);
    if (!path) return pd__fail(net, PD_E_ARGUMENT, "pd_save: no path");
    status = pd__sync_all(net, NULL);
    if (status != PD_OK) return status;
    status = pd__items_of_net(&items, net);
    if (status == PD_OK) status = pd__save_items(&items, path, NULL);
    pd__items_free(&items);
    return status;
}

/* ---- checkpoints ---- */

typedef struct pd__progress {
    uint64_t seed, step;
#define PD__FIELD(field, type, greatest) type field;
    PD__COUNTERS(PD__FIELD)
#undef PD__FIELD
    double pass_cost, best_cost;
} pd__progress;

/* Is an optimizer's state k a sum or mean of squares, or in adamax a largest magnitude? */
static bool pd__holds_magnitudes(pd_optimizer_kind kind, int k) {
    if (k == 0) return kind >= PD_OPT_ADAGRAD && kind <= PD_OPT_DECAYED_ADAGRAD;
    return k == 1 && (kind == PD_OPT_ADADELTA || kind >= PD_OPT_ADAM);
}

/* A metadata entry, or a message. */
static pd_status pd__need_text(const pd__tensors *t, const char *prefix, const char *name, const char **text) {
    *text = pd__tensors_text(t, prefix, name);
    if (*text) return PD_OK;
    return pd__fail(t->net, PD_E_FORMAT, "%.300s: the metadata lacks \"%s%.100s\"", t->path, prefix, name);
}

static pd_status pd__read_count(const pd__tensors *t, const char *prefix, const char *name, uint64_t greatest,
                                uint64_t *value) {
    const char *text;
    char *end;
    pd_status status = pd__need_text(t, prefix, name, &text);
    if (status != PD_OK) return status;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (isdigit((unsigned char)*text) && !*end && !errno && *value <= greatest) return PD_OK;
    return pd__fail(t->net, PD_E_FORMAT,
                    "%.300s: metadata \"%s%.100s\": expected a whole number up to %llu, found \"%s\"", t->path, prefix,
                    name, (unsigned long long)greatest, pd__show(t->net, text));
}

static pd_status pd__read_double(const pd__tensors *t, const char *name, double greatest, double *value) {
    const char *text;
    char *end;
    pd_status status = pd__need_text(t, "", name, &text);
    if (status != PD_OK) return status;
    *value = strtod(text, &end);
    if (end != text && !*end && fabs(*value) <= greatest) return PD_OK;
    return pd__fail(t->net, PD_E_FORMAT, "%.300s: metadata \"%s\": expected a number, found \"%s\"", t->path, name,
                    pd__show(t->net, text));
}

/* ---- rows that lag, in checkpoints ----
   A sparse parameter of which rows have missed steps has beside its current values "stored/NAME", what is stored, with
   the optimizer's state; "behind/NAME", by how many steps each row lags (I32); and the matrices of the last steps, as
   many as the row furthest behind needs (steps x 4, F64). A checkpoint without them is one of which no row lags. */

/* The last step at which a row of this group was brought up to date, if not since. */
static int64_t pd__last_turn(const pd__lazy *lazy, int64_t step, int64_t group) {
    return pd__max(0, step - (step % lazy->window - group + lazy->window) % lazy->window);
}

/* Steps missed by the row furthest behind. */
static int64_t pd__most_behind(const pd__trained *tr) {
    int64_t most = 0;
    for (int64_t i = 0; i < tr->lazy->count; i++) most = pd__max(most, pd__behind(tr->lazy, tr->step, i));
    return most;
}

/* The three of one parameter; `steps` of its steps are in the file. */
static pd_status pd__add_lag(pd__items *items, pd__trained *tr, pd_real *stored, int64_t steps) {
    pd_status status = pd__items_add(items, tr->param, "stored/", -1, stored);
    for (int k = 0; k < 2 && status == PD_OK; k++) {
        pd__item *item;
        status = pd__items_add(items, tr->param, k ? "behind/" : "steps/", -1, NULL);
        if (status != PD_OK) break;
        item = &items->list[items->count - 1];
        item->element = k ? PD__I32 : PD__F64;
        item->lazy = tr->lazy;
        item->step = tr->step;
        item->dim_count = k ? 1 : 2;
        item->dims[0] = k ? tr->param->dims[0] : steps;
        item->dims[1] = 4;
        item->size = item->dims[0] * (k ? 1 : 4);
    }
    return status;
}

/* Those of all parameters that lag or, from a file, of which it has something. */
static pd_status pd__items_of_lag(pd__items *items, const pd_trainer *trainer, const pd__tensors *from) {
    pd_status status = PD_OK;
    for (int i = 0; i < trainer->trained_count && status == PD_OK; i++) {
        pd__trained *tr = &trainer->trained[i];
        const char *name = tr->param->name;
        const pd__tensor *steps = from ? pd__tensors_find(from, "steps/", name) : NULL;
        if (!from && pd__lags(tr))
            status = pd__add_lag(items, tr, pd__last_values(trainer, tr->param), pd__most_behind(tr));
        else if (from && tr->lazy && (steps || pd__tensors_find(from, "stored/", name)))
            status = pd__add_lag(items, tr, tr->param->value,
                                 steps && steps->dim_count == 2 && steps->dims[1] == 4 ? steps->dims[0] : 0);
    }
    return status;
}

/* Can the rows of a file have missed so many steps, and are these there? Makes room for them. */
static pd_status pd__check_behind(const pd__item *behind, const pd__item *steps, const pd__tensors *t, int64_t step) {
    pd__lazy *lazy = behind->lazy;
    const int32_t *counts = (const int32_t *)behind->staged;
    const double *matrices = (const double *)steps->staged;
    for (int64_t i = 0; i < steps->size; i++)
        if (!pd__finite(matrices[i]))
            return pd__fail(t->net, PD_E_NUMERIC, "%.300s: tensor \"steps/%.100s\": number %lld is %g", t->path,
                            steps->param->name, (long long)i, matrices[i]);
    for (int64_t group = 0; group < lazy->window; group++) {
        int64_t row = group * lazy->count / lazy->window, end = (group + 1) * lazy->count / lazy->window;
        int64_t most = pd__min(steps->dims[0], step - pd__last_turn(lazy, step, group));
        for (; row < end; row++)
            if (counts[row] < 0 || counts[row] > most)
                return pd__fail(t->net, PD_E_FORMAT,
                                "%.300s: tensor \"behind/%.100s\": row %lld is %d steps behind, expected 0 to %lld",
                                t->path, behind->param->name, (long long)row, (int)counts[row], (long long)most);
    }
    if (steps->dims[0] > pd__min(step, lazy->window))
        return pd__fail(t->net, PD_E_FORMAT, "%.300s: tensor \"steps/%.100s\": %lld steps, expected at most %lld",
                        t->path, steps->param->name, (long long)steps->dims[0], (long long)pd__min(step, lazy->window));
    if (pd__ready_steps(&t->net->allocator, lazy, behind->step, step)) return PD_OK;
    return pd__no_memory(t->net, "sparse parameters");
}

static pd_status pd__check_lag(const pd__items *items, const pd__tensors *t) {
    for (int64_t i = 1; i < items->count; i++) {
        uint64_t step;
        pd_status status;
        if (!items->list[i].lazy || items->list[i].element != PD__I32) continue;
        status = pd__read_count(t, "updates/", items->list[i].param->name, PD__COUNT_MAX, &step);
        if (status == PD_OK) status = pd__check_behind(&items->list[i], &items->list[i - 1], t, (int64_t)step);
        if (status != PD_OK) return status;
    }
    return PD_OK;
}

/* Takes over what was staged, when the parameters' steps are set. */
static void pd__set_lag(const pd_trainer *trainer, const pd__items *items) {
    for (int64_t i = 0; i < items->count; i++) {
        const pd__item *item = &items->list[i];
        const pd__trained *tr = item->lazy ? pd__trained_of(trainer, item->param) : NULL;
        if (!tr) continue;
        for (int64_t k = 0; item->element == PD__F64 && k < item->dims[0]; k++)
            pd__put_step(item->lazy, tr->step - item->dims[0] + 1 + k, (const double *)item->staged + 4 * k);
        for (int64_t k = 0; item->element == PD__I32 && k < item->size; k++)
            item->lazy->times[k] = (uint32_t)(tr->step - ((const int32_t *)item->staged)[k]);
        item->lazy->settled = -1;
    }
}

/* The best values, if there are some, of every parameter. */
static pd_real *const *pd__best_of(const pd_trainer *t) {
    return t->has_best && t->best_count == t->net->param_count ? t->best : NULL;
}

/* A checkpoint is a file of parameters with more tensors in it: "optimizer/K/NAME", "averages/K/NAME", "best/NAME", and
   "mask/NAME", which, being bytes, come last. The same list serves for writing (`from` NULL) and reading. `best`: one
   array per parameter of the net, or NULL. While averaged values are swapped in, the true ones are written, and while
   the best are, the last. Of sparse parameters the current values are written, for whoever reads them, and what is
   stored is beside them: see pd__add_lag. */
static pd_status pd__items_of_trainer(pd__items *items, pd_trainer *trainer, pd_real *const *best,
                                      const pd__tensors *from) {
    const bool writing = !from;
    pd_status status = pd__items_of_net(items, trainer->net);
    int64_t params = items->count;
    for (int64_t i = 0, k = 0; writing && trainer->averaged && i < params && k < trainer->averages_count; i++)
        if (items->list[i].param == trainer->averages[k].param) items->list[i].numbers = trainer->averages[k++].saved;
    for (int64_t i = 0; best && writing && trainer->went_back && i < params; i++) {
        const pd__trained *t = pd__trained_of(trainer, items->list[i].param);
        items->list[i].numbers = best[i];
        items->list[i].lagging = t && pd__lags(t) ? trainer : NULL;
    }
    for (int i = 0; i < trainer->trained_count; i++) {
        const pd__trained *t = &trainer->trained[i];
        for (int k = 0; k < PD__COUNT(t->states) && status == PD_OK; k++) {
            if (!t->states[k]) continue;
            status = pd__items_add(items, t->param, "optimizer", k, t->states[k]);
            if (status == PD_OK)
                items->list[items->count - 1].magnitudes = pd__holds_magnitudes(trainer->optimizer.kind, k);
        }
    }
    for (int i = 0; i < trainer->averages_count; i++) {
        const pd__averaged *av = &trainer->averages[i];
        for (int k = 0; k < PD__COUNT(av->sums) && status == PD_OK; k++)
            status = pd__items_add(items, av->param, "averages", k, av->sums[k]);
    }
    for (int64_t i = 0; best && i < params && status == PD_OK; i++)
        status = pd__items_add(items, items->list[i].param, "best/", -1,
                               writing && trainer->went_back ? items->list[i].param->value : best[i]);
    if (status == PD_OK) status = pd__items_of_lag(items, trainer, from);
    for (int i = 0; i < trainer->trained_count && status == PD_OK; i++)
        if (trainer->trained[i].param->mask)
            status = pd__items_add(items, trainer->trained[i].param, "mask/", -1, NULL);
    return status;
}

PD_DEF pd_status pd_checkpoint_save(pd_trainer *trainer, const char *path) {
    pd__items items = PD__ZERO;
    pd_status status = PD_OK;
    if (!trainer) return PD_E_ARGUMENT;
    if (!pd__check_learned(trainer->net)) return pd_error_status(trainer->net);
    if (!path) return pd__fail(trainer->net, PD_E_ARGUMENT, "pd_checkpoint_save: no path");
    if (trainer->ranks > 1)
        return pd__fail(
            trainer->net, PD_E_UNSUPPORTED,
            "%.300s: no checkpoints yet with %d workers, each of which has a shard of the optimizer's state", path,
            trainer->ranks);
    status = pd__sync_all(trainer->net, trainer);
    if (status == PD_OK) status = pd_sync(trainer);
    if (status != PD_OK) return status;
    status = pd__items_of_trainer(&items, trainer, pd__best_of(trainer), NULL);
    if (status == PD_OK) status = pd__save_items(&items, path, trainer);
    pd__items_free(&items);
    return status;
}

/* Is it a checkpoint, and of this optimizer? */
static pd_status pd__check_kind(const pd__tensors *t, const pd_trainer *trainer) {
    const char *version = pd__tensors_text(t, "", "checkpoint"), *own = pd__optimizer_names[trainer->optimizer.kind];
    const char *optimizer;
    pd_status status;
    if (!version)
        return pd__fail(t->net, PD_E_FORMAT, "%.300s: not a checkpoint; pd_load takes plain parameters", t->path);
    if (strcmp(version, "1") != 0)
        return pd__fail(t->net, PD_E_UNSUPPORTED, "%.300s: a checkpoint of version \"%s\", expected \"1\"", t->path,
                        pd__show(t->net, version));
    status = pd__need_text(t, "", "optimizer", &optimizer);
    if (status == PD_OK && strcmp(optimizer, own) != 0)
        status = pd__fail(t->net, PD_E_ARGUMENT, "%.300s: a checkpoint of %s, but this trainer uses %s", t->path,
                          pd__show(t->net, optimizer), own);
    return status;
}

static pd_status pd__read_progress(const pd__tensors *t, pd__progress *p) {
    uint64_t count = 0;
    pd_status status = pd__read_count(t, "", "seed", UINT64_MAX, &p->seed);
    if (status == PD_OK) status = pd__read_count(t, "", "step", UINT64_MAX, &p->step);
#define PD__READ(field, type, greatest)                                                                                \
    if (status == PD_OK) status = pd__read_count(t, "", #field, (uint64_t)(greatest), &count);                         \
    p->field = (type)count;
    PD__COUNTERS(PD__READ)
#undef PD__READ
    if (status == PD_OK) status = pd__read_double(t, "pass_cost", DBL_MAX, &p->pass_cost);
    if (status == PD_OK) status = pd__read_double(t, "best_cost", HUGE_VAL, &p->best_cost); /* infinite: no test yet */
    return status;
}

/* Each parameter's number of updates: checked, and, if `set`, taken over. */
static pd_status pd__read_updates(const pd__tensors *t, pd_trainer *trainer, bool set) {
    pd_status status = PD_OK;
    for (int i = 0; i < trainer->trained_count && status == PD_OK; i++) {
        pd__trained *trained = &trainer->trained[i];
        uint64_t count;
        status = pd__read_count(t, "updates/", trained->param->name, PD__COUNT_MAX, &count);
        if (status != PD_OK || !set) continue;
        trained->step = (int64_t)count;
        if (trained->lazy) trained->lazy->settled = trained->step;
        for (int64_t k = 0; trained->lazy && k < trained->lazy->count; k++)
            trained->lazy->times[k] = (uint32_t)trained->step;
    }
    return status;
}

/* Every item must be in the file, in the very type of the program's numbers, and every tensor must be an item. */
static pd_status pd__match_checkpoint(pd__items *items, const pd__tensors *t) {
    for (int64_t i = 0; i < items->count; i++) {
        pd__item *item = &items->list[i];
        pd_status status;
        item->from = pd__tensors_find(t, item->prefix, item->param->name);
        if (!item->from)
            return pd__fail(items->net, PD_E_FORMAT, "%.300s: no tensor \"%s%.100s\", which this trainer needs",
                            t->path, item->prefix, item->param->name);
        status = pd__check_item(items, item, t, 1u << item->element);
        if (status != PD_OK) return status;
        item->from->used = true;
    }
    for (int64_t i = 0; i < t->count; i++)
        if (!t->list[i].used)
            return pd__fail(items->net, PD_E_FORMAT, "%.300s: this trainer has no place for tensor \"%s\"", t->path,
                            pd__show(items->net, t->list[i].name));
    return PD_OK;
}

/* Takes everything over, `best` as well; all has been checked. */
static pd_status pd__resume(pd_trainer *trainer, pd__items *items, const pd__tensors *t, const pd__progress *p,
                            pd_real **best) {
    pd_status status = pd__items_commit(items);
#define PD__SET(field, type, greatest) trainer->field = p->field;
    PD__COUNTERS(PD__SET)
#undef PD__SET
    trainer->pass_cost = p->pass_cost;
    trainer->best_cost = p->best_cost;
    trainer->averaged = false; /* the true values have been loaded */
    trainer->went_back = false;
    trainer->resumed = true;
    trainer->net->seed = p->seed;
    trainer->net->step = p->step;
    pd__read_updates(t, trainer, true);
    pd__set_lag(trainer, items);
    pd__set_best(trainer, best);
    trainer->has_best = best != NULL;
    return status;
}

/* pd_checkpoint_load from an open file. */
static pd_status pd__checkpoint_load_file(pd_trainer *trainer, FILE *file, const char *path) {
    pd_net *net = trainer->net;
    pd__items items = PD__ZERO;
    pd__progress progress = PD__ZERO;
    pd__notes notes = PD__ZERO;
    pd__tensors t;
    pd_real **best = NULL;
    pd_status status = pd__tensors_open(net, file, path, &t);
    if (status != PD_OK) return status;
    items.net = net;
    status = pd__check_kind(&t, trainer);
    if (status == PD_OK && pd__tensors_find(&t, "best/", net->first_param->name)) {
        status = pd__ready_spare(trainer);
        if (status == PD_OK) best = pd__new_best(net);
        if (!best) status = PD_E_MEMORY;
    }
    if (status == PD_OK) status = pd__items_of_trainer(&items, trainer, best, &t);
    if (status == PD_OK) status = pd__match_checkpoint(&items, &t);
    if (status == PD_OK) status = pd__read_progress(&t, &progress);
    if (status == PD_OK) status = pd__read_updates(&t, trainer, false);
    if (status == PD_OK) status = pd__stage_notes(&t, &notes);
    if (status == PD_OK) status = pd__items_stage(&items, &t);
    if (status == PD_OK) status = pd__check_lag(&items, &t);
    if (status == PD_OK) pd__commit_notes(net, &notes);
    if (status == PD_OK) status = pd__resume(trainer, &items, &t, &progress, best);
    else pd__free_best(net, best, net->param_count);
    pd__notes_free(&net->allocator, &notes);
    pd__items_free(&items);
    pd__tensors_close(&t);
    return status;
}

PD_DEF pd_status pd_checkpoint_load(pd_trainer *trainer, const char *path) {
    FILE *file;
    pd_status status;
    if (!trainer) return PD_E_ARGUMENT;
    if (!pd__check_net(trainer->net)) return pd_error_status(trainer->net);
    if (!path) return pd__fail(trainer->net, PD_E_ARGUMENT, "pd_checkpoint_load: no path");
    status = pd__check_idle(trainer, "pd_checkpoint_load");
    if (status != PD_OK) return status;
    if (trainer->ranks > 1)
        return pd__fail(trainer->net, PD_E_UNSUPPORTED, "%.300s: no checkpoints yet with %d workers", path,
                        trainer->ranks);
    status = pd__sync_all(trainer->net, NULL);
    if (status != PD_OK) return status;
    file = pd__open_to_read(trainer->net, path);
    if (!file) return PD_E_IO;
    status = pd__checkpoint_load_file(trainer, file, path);
    fclose(file);
    return status;
}

/* ======================================================================================================== */
/* >>gradient_check.c                                                                                      */

/* The scalar J = sum of w_i y_i over all outputs of a layer, with fixed random w, is differentiated numerically. */
typedef struct pd__check {
    pd_net *net;
    pd_layer *layer;
    pd_batch *batch;  /* a copy, whose dense numbers may be moved */
    pd_real *weights; /* rows x width of the layer */
    int64_t outputs;
    double step, scale; /* scale: sum of |w_i y_i|, below whose thousandth differences mean nothing */
    uint64_t key;
    int64_t elements;
    int64_t tensors; /* checked so far */
    pd_gradcheck *result;
} pd__check;

/* A tensor under check: a parameter, or an input of the batch. */
typedef struct pd__subject {
    const char *name;
    pd_param *param; /* or */
    pd_slot *slot;
    int64_t size;
    pd_real *value, *gradient, *direction, *stored; /* host copies, one allocation */
} pd__subject;

static pd_status pd__check_forward(pd__check *c) { return pd_forward(c->net, c->batch, PD_CHECK, &c->layer, 1); }

static pd_status pd__objective(pd__check *c, double *j) {
    pd_status status = pd__check_forward(c);
    const pd_real *y = status == PD_OK ? pd_output(c->layer, NULL, NULL) : NULL;
    *j = 0;
    for (int64_t i = 0; y && i < c->outputs; i++) *j += (double)c->weights[i] * (double)y[i];
    return status;
}

/* value + t * (element < 0 ? direction : unit vector) becomes the subject's value. */
static void pd__check_move(const pd__subject *s, int64_t element, double t) {
    for (int64_t first = 0; first < s->size; first += 512) {
        pd_real moved[512];
        int64_t n = pd__min(512, s->size - first);
        for (int64_t i = 0; i < n; i++) {
            double by = element < 0 ? t * (double)s->direction[first + i] : first + i == element ? t : 0;
            moved[i] = (pd_real)((double)s->value[first + i] + by);
        }
        if (s->slot) memcpy(s->slot->data + first, moved, (size_t)n * sizeof *moved);
        else
            s->param->net->device->upload(s->param->net->device, s->param->value + first, moved,
                                          (size_t)n * sizeof *moved);
    }
}

/* Central difference along the direction or one element. */
static pd_status pd__check_difference(pd__check *c, const pd__subject *s, int64_t element, double t, double *slope) {
    double up = 0, down = 0;
    pd_status status;
    pd__check_move(s, element, t);
    status = pd__objective(c, &up);
    pd__check_move(s, element, -t);
    if (status == PD_OK) status = pd__objective(c, &down);
    pd__check_move(s, element, 0);
    *slope = (up - down) / (2 * t);
    return status;
}

static void pd__check_note(pd__check *c, const pd__subject *s, int64_t element, double analytic, double numeric,
                           double typical) {
    pd_gradcheck *r = c->result;
    double size = fabs(analytic) > fabs(numeric) ? fabs(analytic) : fabs(numeric), error;
    if (typical > size) size = typical;
    if (1e-3 * c->scale > size) size = 1e-3 * c->scale;
    error = size > 0 ? fabs(analytic - numeric) / size : 0;
    if (!(error >= 0)) error = HUGE_VAL; /* NaN somewhere: no larger one may hide it */
    if (element < 0 && !(error <= r->directional)) r->directional = error;
    if (error <= r->error) return;
    r->error = error;
    r->worst = s->name;
    r->worst_index = element;
    r->analytic = analytic;
    r->numeric = numeric;
}

/* Direction: the gradient plus a random vector half as long, so that it has something of every element. */
static pd_status pd__check_subject(pd__check *c, pd__subject *s) {
    double squares = 0, random_squares = 0, largest = 0, along = 0, slope = 0, typical;
    pd_status status;
    for (int64_t i = 0; i < s->size; i++) {
        s->direction[i] = (pd_real)(2 * pd__uniform(c->key, (uint64_t)i) - 1);
        squares += (double)s->gradient[i] * (double)s->gradient[i];
        random_squares += (double)s->direction[i] * (double)s->direction[i];
    }
    for (int64_t i = 0; i < s->size; i++) {
        double factor = squares > 0 ? 0.5 * sqrt(squares / random_squares) : 1;
        s->direction[i] = (pd_real)((double)s->gradient[i] + factor * (double)s->direction[i]);
        along += (double)s->gradient[i] * (double)s->direction[i];
        if (fabs((double)s->direction[i]) > largest) largest = fabs((double)s->direction[i]);
    }
    if (squares != 0) c->result->all_zero = false;
    for (int64_t i = 0; i < s->size && !pd__finite(squares); i++)
        if (!pd__finite((double)s->gradient[i])) {
            pd__check_note(c, s, i, (double)s->gradient[i], 0, 0);
            return PD_OK;
        }
    if (!(largest > 0)) return PD_OK;
    typical = sqrt(squares / (double)s->size);
    status = pd__check_difference(c, s, -1, c->step / largest, &slope);
    if (status == PD_OK) pd__check_note(c, s, -1, along / largest, slope / largest, typical);
    for (int64_t k = 0; status == PD_OK && k < pd__min(c->elements, s->size); k++) {
        int64_t i = s->size <= c->elements ? k : pd__below(c->key + 1, (uint64_t)k, s->size);
        status = pd__check_difference(c, s, i, c->step, &slope);
        if (status == PD_OK) pd__check_note(c, s, i, (double)s->gradient[i], slope, typical);
        c->result->checked++;
    }
    return status;
}

/* One backward run, from zeroed gradients unless `again`. */
static pd_status pd__check_backward(pd__check *c, bool again) {
    pd_status status = again ? PD_OK : pd_zero_grads(c->net);
    if (status == PD_OK) status = pd__check_forward(c);
    return status == PD_OK ? pd__backward_from(c->net, c->layer, c->weights) : status;
}

/* Gradients must be added to, not overwritten: after a second run each is twice the first. */
static pd_status pd__check_accumulation(pd__check *c, pd__subject *s) {
    double most = 0, size = 0;
    pd_status status = s->param ? pd_param_get_grad(s->param, s->direction, s->size) : PD_OK;
    if (!s->param || status != PD_OK) return status;
    for (int64_t i = 0; i < s->size; i++) {
        double off = fabs((double)s->direction[i] - 2 * (double)s->gradient[i]);
        if (off > most) most = off;
        if (2 * fabs((double)s->gradient[i]) > size) size = 2 * fabs((double)s->gradient[i]);
    }
    if (size > 0 && most / size > c->result->accumulation) c->result->accumulation = most / size;
    return PD_OK;
}

/* Of a sparse parameter: while it is under check, current values take the place of what is stored. */
static pd_status pd__check_settle(pd__subject *s) {
    pd_device *d = s->param->net->device;
    pd_status status = pd__download(s->param->net, s->stored, s->param->value, s->size);
    if (status != PD_OK) return status;
    d->upload(d, s->param->value, s->value, (size_t)s->size * sizeof *s->value);
    s->param->touched->plain = true;
    return PD_OK;
}

/* Checks one tensor: takes its value and gradient, then the second run's, then the differences. */
static pd_status pd__check_tensor(pd__check *c, pd_param *p, pd_slot *slot, pd_layer *input) {
    const pd_allocator *a = &c->net->allocator;
    pd__subject s;
    pd_status status;
    memset(&s, 0, sizeof s);
    s.param = p;
    s.slot = slot;
    s.name = p ? p->name : slot->name;
    s.size = p ? p->size : slot->rows * slot->width;
    if (s.size == 0) return PD_OK;
    c->tensors++;
    s.value = (pd_real *)pd_alloc(a, s.size, (p && p->touched ? 4 : 3) * sizeof *s.value);
    if (!s.value) return pd__no_memory(c->net, "the gradient check");
    s.gradient = s.value + s.size;
    s.direction = s.gradient + s.size;
    s.stored = s.direction + s.size;
    status = pd__check_backward(c, false);
    if (status == PD_OK && p) {
        status = pd_param_get(p, s.value, s.size);
        if (status == PD_OK) status = pd_param_get_grad(p, s.gradient, s.size);
        if (status == PD_OK && p->touched) status = pd__check_settle(&s);
    } else if (status == PD_OK) {
        memcpy(s.value, slot->data, (size_t)s.size * sizeof *s.value);
        status = pd__download(c->net, s.gradient, input->out.grad, s.size);
    }
    if (status == PD_OK) status = pd__check_backward(c, true);
    if (status == PD_OK) status = pd__check_accumulation(c, &s);
    if (status == PD_OK) status = pd__check_subject(c, &s);
    if (p && p->touched && p->touched->plain) {
        c->net->device->upload(c->net->device, p->value, s.stored, (size_t)s.size * sizeof *s.stored);
        p->touched->plain = false;
    }
    pd_free(a, s.value);
    return status;
}

static pd_status pd__check_all(pd__check *c) {
    pd_net *net = c->net;
    const pd_real *y;
    pd_status status = pd__check_forward(c);
    if (status != PD_OK) return status;
    c->outputs = c->layer->out.rows * c->layer->out.width;
    c->weights = (pd_real *)pd_alloc(&net->allocator, c->outputs, sizeof *c->weights);
    if (!c->weights) return pd__no_memory(net, "the gradient check");
    y = pd_output(c->layer, NULL, NULL);
    for (int64_t i = 0; y && i < c->outputs; i++) {
        c->weights[i] =
            (pd_real)(0.5 + pd__uniform(c->key + 2, (uint64_t)i)) * (pd_random(c->key + 3, (uint64_t)i) & 1 ? 1 : -1);
        c->scale += fabs((double)c->weights[i] * (double)y[i]);
    }
    if (c->scale < 1) c->scale = 1;
    for (pd_param *p = net->first_param; status == PD_OK && p; p = p->next) {
        bool used = false;
        for (int64_t i = 0; i < net->layer_count; i++)
            for (int k = 0; net->layers[i]->own->active && k < net->layers[i]->param_count; k++)
                used = used || net->layers[i]->params[k] == p;
        if (used && !p->opts.is_static) status = pd__check_tensor(c, p, NULL, NULL);
    }
    for (int64_t i = 0; status == PD_OK && i < net->layer_count; i++)
        if (net->layers[i]->own->active && net->layers[i]->own->wants_input_grad)
            status = pd__check_tensor(c, NULL, &c->batch->slots[net->layers[i]->own->slot], net->layers[i]);
    if (status == PD_OK && c->tensors == 0)
        return pd_layer_fail(c->layer, PD_E_ARGUMENT,
                             "pd_check_gradients: nothing to check: below it no parameter learns, and no input with "
                             "rows wants a gradient (pd_want_gradient)");
    return status;
}

PD_DEF pd_status pd_check_gradients(pd_layer *layer, const pd_batch *batch, const pd_gradcheck_opts *opts,
                                    pd_gradcheck *result) {
    pd_net *net = layer ? layer->net : NULL;
    pd__check c;
    pd_status status = PD_OK;
    if (!pd__check_net(net)) return pd_error_status(net);
    if (!batch || !result) return pd__fail(net, PD_E_ARGUMENT, "pd_check_gradients: the batch or the result is NULL");
    if (batch->samples == 0) return pd__fail(net, PD_E_ARGUMENT, "pd_check_gradients: the batch has no samples");
    memset(result, 0, sizeof *result);
    result->all_zero = true;
    result->worst = "";
    memset(&c, 0, sizeof c);
    c.net = net;
    c.layer = layer;
    c.result = result;
    c.step = pd__or(opts ? opts->step : 0, sizeof(pd_real) == 8 ? 1e-5 : 1e-2);
    c.elements = pd__or_count(opts ? opts->elements : 0, 20);
    if (!(c.step > 0 && c.step <= DBL_MAX) || c.elements < 0)
        return pd__fail(net, PD_E_ARGUMENT,
                        "pd_check_gradients: step is %g, expected above 0, and elements %lld, expected at least 0",
                        c.step, (long long)c.elements);
    c.key = pd__subkey(opts ? opts->seed : 0, 0x636865636b);
    c.batch = pd_batch_new(net);
    if (!c.batch) return PD_E_MEMORY;
    for (int64_t i = 0; status == PD_OK && i < batch->samples; i++) {
        status = pd_batch_copy_sample(c.batch, batch, i);
        if (status != PD_OK) pd__fail(net, status, "pd_check_gradients: %.400s", c.batch->error.text);
    }
    if (status == PD_OK) status = pd__check_all(&c);
    pd_free(&net->allocator, c.weights);
    pd_batch_free(c.batch);
    if (status == PD_OK) status = pd_zero_grads(net);
    return status;
}

#ifdef __cplusplus
}
#endif

#if defined(__clang__) && __clang_major__ >= 12
#pragma float_control(pop)
#endif

#endif /* PADDLE_IMPLEMENTATION */

/* ======================================================================================================== */
/* >>kernels.c: the CPU's heavy operations, once for every instruction set                                 */

/* This part of the file is compiled several times: >>device.c includes the file for each level with PD__LEVEL
   set, and PD__K(name) is the name of a function at that level. Code is written in vectors of PD__LANES numbers. What
   is here is the work of one thread; how it is cut up, and what memory it takes, is decided there, once for all
   levels. */
#if defined(PD__LEVEL)

#if PD__BYTES == 0
#define PD__LANES 1
#elif PD__BYTES / PD__REAL_BYTES == 2
#define PD__LANES 2
#elif PD__BYTES / PD__REAL_BYTES == 4
#define PD__LANES 4
#elif PD__BYTES / PD__REAL_BYTES == 8
#define PD__LANES 8
#else
#define PD__LANES 16
#endif
#if PD__BYTES == 0
typedef pd_real PD__K(pd__vector), PD__K(pd__unaligned);
#define PD__SELECT(mask, a, b) ((mask) ? (a) : (b))
#else
typedef PD__INT PD__K(pd__integers) __attribute__((vector_size(PD__BYTES)));
#define PD__I PD__K(pd__integers)
#define PD__SELECT(mask, a, b) ((PD__V)(((PD__I)(mask) & (PD__I)(a)) | (~(PD__I)(mask) & (PD__I)(b))))
typedef pd_real PD__K(pd__vector) __attribute__((vector_size(PD__BYTES)));
typedef pd_real PD__K(pd__unaligned) __attribute__((vector_size(PD__BYTES), aligned(PD__REAL_BYTES), may_alias));
#endif
#define PD__V PD__K(pd__vector)
#define PD__LOAD(from) (*(const PD__K(pd__unaligned) *)(from))
#define PD__STORE(to, v) (*(PD__K(pd__unaligned) *)(to) = (v))

/* Rows and vectors of the tile of a product that stays in registers. */
#if PD__BYTES == 0
#define PD__MR 4
#define PD__NV 4
#else
#define PD__NV 2
#if PD__BYTES == 64
#define PD__MR 12 /* of 32 registers */
#elif PD__BYTES == 32
#define PD__MR 6 /* of 16 */
#else
#define PD__MR 4
#endif
#endif
#define PD__NR (PD__NV * PD__LANES)

/* Blocks of a product: KC deep, so that a panel of B stays in the first-level cache (32 KB and more), MC rows of A,
   which stay in the second, PD__NC columns of B. */
#define PD__KC (PD__BYTES == 64 ? 320 : 512)
#define PD__MC (PD__BYTES == 64 ? 168 : 96)

static PD__INLINE PD__V PD__K(pd__all)(pd_real x) {
#if PD__LANES == 1
    return x;
#else
    PD__V v = { PD__TIMES(PD__LANES, x) };
    return v;
#endif
}

#if PD__LANES > 1
/* A mask of the first `count` lanes. */
static PD__INLINE PD__I PD__K(pd__first_lanes)(int count) {
    static const PD__INT lanes[] = { PD__TIMES(PD__LANES, -1), PD__TIMES(PD__LANES, 0) };
    PD__I mask;
    memcpy(&mask, lanes + PD__LANES - count, sizeof mask);
    return mask;
}
#endif

/* A vector of which only `left` numbers may be there; the others are 0, and are not stored. */
static PD__INLINE PD__V PD__K(pd__load)(const pd_real *from, int64_t left) {
    pd_real part[PD__LANES];
    if (left >= PD__LANES) return PD__LOAD(from);
    for (int i = 0; i < PD__LANES; i++) part[i] = i < left ? from[i] : 0;
    return PD__LOAD(part);
}
static PD__INLINE void PD__K(pd__store)(pd_real *to, PD__V v, int64_t left) {
    pd_real part[PD__LANES];
    if (left >= PD__LANES) {
        PD__STORE(to, v);
        return;
    }
    PD__STORE(part, v);
    for (int i = 0; i < left; i++) to[i] = part[i];
}

/* a b + c, with one rounding where the level has an instruction for it. */
#if PD__BYTES == 64
#define PD__FMA(a, b, c)                                                                                               \
    ((PD__V)PD__X86(_mm512_fmadd)((PD__X86_TYPE(__m512))(a), (PD__X86_TYPE(__m512))(b), (PD__X86_TYPE(__m512))(c)))
#elif PD__BYTES == 32
#define PD__FMA(a, b, c)                                                                                               \
    ((PD__V)PD__X86(_mm256_fmadd)((PD__X86_TYPE(__m256))(a), (PD__X86_TYPE(__m256))(b), (PD__X86_TYPE(__m256))(c)))
#elif PD__BYTES == 16 && defined(__aarch64__) && defined(PADDLE_DOUBLE)
#define PD__FMA(a, b, c) ((PD__V)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#elif PD__BYTES == 16 && defined(__aarch64__)
#define PD__FMA(a, b, c) ((PD__V)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define PD__FMA(a, b, c) ((a) * (b) + (c))
#endif

/* ---- >>kernel:gemm: matrix product: both factors packed into tiles that fit the caches, after Goto and van de Geijn
   2008 ---- Every number of C is one sum over k in the order of k, at any place of any tile: cutting C up does not
   change it. */

/* One step of k: mr numbers of A times nv vectors of B. */
static PD__INLINE void PD__K(pd__tile_step)(const int mr, const int nv, const pd_real *a, const pd_real *b,
                                            PD__V sum[PD__MR][PD__NV]) {
    PD__V right[PD__NV];
    PD__UNROLL
    for (int j = 0; j < nv; j++) right[j] = PD__LOAD(b + j * PD__LANES);
    PD__UNROLL
    for (int i = 0; i < mr; i++) {
        PD__V left = PD__K(pd__all)(a[i]);
        PD__UNROLL
        for (int j = 0; j < nv; j++) sum[i][j] = PD__FMA(left, right[j], sum[i][j]);
    }
}

/* mr rows x nv vectors of C, alpha A B + beta C (beta 0: C is not read): a (k x mr, lda apart), b (k x nv vectors, ldb
   apart). `ahead`: what lies so many numbers further is fetched with each line of a. */
static PD__INLINE void PD__K(pd__tile_of)(const int mr, const int nv, int64_t k, pd_real alpha, const pd_real *a,
                                          const int64_t lda, int64_t ahead, const pd_real *b, int64_t ldb, pd_real beta,
                                          pd_real *c, int64_t ldc) {
    /* Two steps at a time of the usual tile, where lda is known: a tenth fewer instructions, which counts where two
       threads share a core. */
    const int steps = PD__MR <= 6 && mr == PD__MR && nv == PD__NV ? 2 : 1;
    PD__V sum[PD__MR][PD__NV];
    PD__UNROLL
    for (int i = 0; i < mr; i++) {
        PD__UNROLL
        for (int j = 0; j < nv; j++) sum[i][j] = PD__K(pd__all)(0);
        PD__PREFETCH(c + i * ldc); /* a line that holds its first number, and one that holds its last */
        PD__PREFETCH(c + i * ldc + nv * PD__LANES - 1);
    }
    if (k % steps) {
        PD__K(pd__tile_step)(mr, nv, a, b, sum);
        a += lda, b += ldb;
    }
    for (k /= steps; k > 0; k--, a += steps * lda, b += steps * ldb) {
        PD__PREFETCH(a + ahead);
        PD__UNROLL
        for (int p = 0; p < steps; p++) PD__K(pd__tile_step)(mr, nv, a + p * lda, b + p * ldb, sum);
    }
    PD__FORGET(c); /* else pointers to all rows are kept, and registers of the sums are taken for them */
    PD__UNROLL
    for (int i = 0; i < mr; i++, c += ldc) {
        PD__UNROLL
        for (int j = 0; j < nv; j++) {
            PD__V v = PD__K(pd__all)(alpha) * sum[i][j];
            if (beta != 0) v = PD__FMA(PD__K(pd__all)(beta), PD__LOAD(c + j * PD__LANES), v);
            PD__STORE(c + j * PD__LANES, v);
        }
    }
}

/* The same for 1 or NV vectors and as many rows as there are cases. */
static void PD__K(pd__tile_rows)(int mr, int nv, int64_t k, pd_real alpha, const pd_real *a, int64_t lda, int64_t ahead,
                                 const pd_real *b, int64_t ldb, pd_real beta, pd_real *c, int64_t ldc) {
#define PD__LDA(n) (PD__MR > 6 ? lda : n) /* see pd__tile */
#define PD__ROWS(n)                                                                                                    \
    case n:                                                                                                            \
        if (nv == 1) PD__K(pd__tile_of)(n <= PD__MR ? n : 1, 1, k, alpha, a, PD__LDA(n), ahead, b, ldb, beta, c, ldc); \
        else PD__K(pd__tile_of)(n <= PD__MR ? n : 1, PD__NV, k, alpha, a, PD__LDA(n), ahead, b, ldb, beta, c, ldc);    \
        break;
    switch (mr) {
        PD__ROWS(1)
        PD__ROWS(2)
        PD__ROWS(3)
        PD__ROWS(4)
#if PD__MR == 6
        PD__ROWS(5)
        PD__ROWS(6)
#elif PD__MR > 6
        PD__ROWS(8)
        PD__ROWS(12)
#endif
    }
#undef PD__ROWS
#undef PD__LDA
}

/* And for 1 to MR rows; of many, those beyond a multiple of four go by themselves: less to compile. */
static void PD__K(pd__tile)(int mr, int nv, int64_t k, pd_real alpha, const pd_real *a, int64_t ahead, const pd_real *b,
                            int64_t ldb, pd_real beta, pd_real *c, int64_t ldc) {
    const int few = PD__MR > 6 && mr > 4 ? mr % 4 : 0;
    if (few) PD__K(pd__tile_rows)(few, nv, k, alpha, a, mr, ahead, b, ldb, beta, c, ldc);
    PD__K(pd__tile_rows)(mr - few, nv, k, alpha, a + few, mr, ahead, b, ldb, beta, c + few * ldc, ldc);
}

#if PD__BYTES > 0
/* A square with rows of 16 bytes, which every level has: to[c * ldto + r] = from[r * ld + c]. */
static PD__INLINE void PD__K(pd__transpose_square)(const pd_real *from, int64_t ld, pd_real *to, int64_t ldto) {
#define PD__ROW(at) (*(const pd__square_row *)(at))
    pd__square_row a = PD__ROW(from), b = PD__ROW(from + ld);
#ifdef PADDLE_DOUBLE
    *(pd__square_row *)to = PD__SHUFFLE_2(a, b, 0, 2);
    *(pd__square_row *)(to + ldto) = PD__SHUFFLE_2(a, b, 1, 3);
#else
    pd__square_row c = PD__ROW(from + 2 * ld), d = PD__ROW(from + 3 * ld);
    pd__square_row ab = PD__SHUFFLE_4(a, b, 0, 4, 1, 5), cd = PD__SHUFFLE_4(c, d, 0, 4, 1, 5);
    *(pd__square_row *)to = PD__SHUFFLE_4(ab, cd, 0, 1, 4, 5);
    *(pd__square_row *)(to + ldto) = PD__SHUFFLE_4(ab, cd, 2, 3, 6, 7);
    ab = PD__SHUFFLE_4(a, b, 2, 6, 3, 7), cd = PD__SHUFFLE_4(c, d, 2, 6, 3, 7);
    *(pd__square_row *)(to + 2 * ldto) = PD__SHUFFLE_4(ab, cd, 0, 1, 4, 5);
    *(pd__square_row *)(to + 3 * ldto) = PD__SHUFFLE_4(ab, cd, 2, 3, 6, 7);
#endif
#undef PD__ROW
}
#endif

/* to[c * ldto + r] = from[r * ld + c] */
static void PD__K(pd__transpose)(int64_t rows, int64_t columns, const pd_real *from, int64_t ld, pd_real *to,
                                 int64_t ldto) {
    int64_t r = 0;
#if PD__BYTES > 0
    enum { SIDE = 16 / PD__REAL_BYTES, LINE = 64 / PD__REAL_BYTES };
    for (; r < rows && rows >= SIDE; r += SIDE) {
        int64_t c = 0;
        r = pd__min(r, rows - SIDE); /* the last ones may be the second time */
        for (; c + SIDE <= columns; c += SIDE) {
            if (c % LINE == 0 && columns >= LINE) /* the rows that come next, which are in other places */
                for (int i = 0; i < SIDE; i++) PD__PREFETCH(from + (r + SIDE + i) * ld + c);
            PD__K(pd__transpose_square)(from + r * ld + c, ld, to + c * ldto + r, ldto);
        }
        for (; c < columns; c++)
            for (int64_t i = r; i < r + SIDE; i++) to[c * ldto + i] = from[i * ld + c];
    }
#endif
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * ldto + r] = from[r * ld + c];
}

/* memcpy of a few numbers, 4 at a time, the last ones perhaps twice. */
static PD__INLINE void PD__K(pd__copy_few)(int64_t n, const pd_real *from, pd_real *to) {
    int64_t i = 0;
    for (; i + 4 < n; i += 4) memcpy(to + i, from + i, 4 * sizeof *to);
    if (n >= 4) memcpy(to + n - 4, from + n - 4, 4 * sizeof *to);
    else
        for (; i < n; i++) to[i] = from[i];
}

/* A (m x k, strides rs and cs, one of which is 1) as panels of h rows, the last may have fewer: panel[p * rows + r].
   They are `depth` steps of p long, of which `first` .. first + k - 1 are filled. */
static void PD__K(pd__pack_a)(const pd_real *a, int64_t rs, int64_t cs, int64_t m, int64_t k, int64_t h, int64_t first,
                              int64_t depth, pd_real *panels) {
    const int64_t together = rs == 1 ? 8 : k; /* few steps of all panels, so that A is read as it lies */
    for (int64_t p = 0; p < k; p += together)
        for (int64_t i = 0; i < m; i += h) {
            const int64_t rows = pd__min(h, m - i), end = pd__min(k, p + together);
            pd_real *to = panels + i * depth + first * rows;
            if (rs == 1)
                for (int64_t q = p; q < end; q++) PD__K(pd__copy_few)(rows, a + i + q * cs, to + q * rows);
            else PD__K(pd__transpose)(rows, k, a + i * rs, rs, to, rows);
        }
}

/* How many numbers a panel of B is wide that begins where n columns are left. */
static PD__INLINE int64_t PD__K(pd__panel)(int64_t n) { return n <= PD__LANES ? PD__LANES : PD__NR; }

/* B (k x n, strides rs and cs, one of which is 1) as panels of NR columns, or of one vector where no more are left,
   filled up with zeros. A few rows at a time, so that they are read as streams. */
static void PD__K(pd__pack_b)(const pd_real *b, int64_t rs, int64_t cs, int64_t k, int64_t n, pd_real *panels) {
    enum { ROWS = 8 };
    int64_t full = cs == 1 ? n / PD__NR * PD__NR : 0;
    for (int64_t p = 0; p < k && full; p += ROWS)
        for (int64_t j = 0; j < full; j += PD__NR)
            for (int64_t r = p; r < pd__min(k, p + ROWS); r++) {
                pd_real *to = panels + j * k + r * PD__NR;
                PD__UNROLL
                for (int i = 0; i < PD__NV; i++)
                    PD__STORE(to + i * PD__LANES, PD__LOAD(b + r * rs + j + i * PD__LANES));
            }
    for (int64_t j = full; j < n; j += PD__NR) {
        int64_t width = pd__min(PD__NR, n - j), wide = PD__K(pd__panel)(width);
        pd_real *to = panels + j * k;
        if (cs == 1)
            for (int64_t p = 0; p < k; p++)
                for (int64_t c = 0; c < width; c++) to[p * wide + c] = b[p * rs + j + c];
        else PD__K(pd__transpose)(width, k, b + j * cs, cs, to, wide);
        for (int64_t p = 0; p < k && width < wide; p++)
            for (int64_t c = width; c < wide; c++) to[p * wide + c] = 0;
    }
}

/* One such panel of numbers picked from an image: element (p, c) is at row_at[p] + column_at[c]. */
static void PD__K(pd__pick_b_panel)(const pd_real *image, const int64_t *row_at, const int64_t *column_at, int64_t k,
                                    int64_t width, pd_real *to) {
    int64_t wide = PD__K(pd__panel)(width);
    for (int64_t first = 0; first < wide; first += PD__LANES) { /* a vector's columns at a time */
        const int64_t count = pd__max(0, pd__min(PD__LANES, width - first)), *at = column_at + first;
        pd_real *line = to + first;
#if PD__LANES > 1
        /* Whole vectors are read for columns that lie together, and of each what comes `before` the next is taken. They
           are all between the first and the last column's number if columns rise. */
        enum { MOST = PD__LANES / 2 };
        int64_t runs = 0, from[MOST] = { 0 };
        bool rising = count == PD__LANES;
        PD__I before[MOST] = { PD__K(pd__first_lanes)(0) };
        for (int c = 0; c < count; c++) {
            rising = rising && (c == 0 || at[c] > at[c - 1]);
            if (c > 0 && at[c] == at[c - 1] + 1) continue;
            if (runs < MOST) from[runs] = at[c] - c, before[runs] = PD__K(pd__first_lanes)(c);
            runs++;
        }
        if (rising && runs <= MOST) {
            for (int64_t p = 0; p < k; p++, line += wide) {
                PD__V v = PD__LOAD(image + row_at[p] + from[0]);
                for (int64_t r = 1; r < runs; r++) v = PD__SELECT(before[r], v, PD__LOAD(image + row_at[p] + from[r]));
                PD__STORE(line, v);
            }
            continue;
        }
#endif
        for (int64_t p = 0; p < k; p++, line += wide) {
            for (int64_t c = 0; c < count; c++) line[c] = image[row_at[p] + at[c]];
            for (int64_t c = count; c < PD__LANES; c++) line[c] = 0;
        }
    }
}

/* With >>kernel:activate: applies the epilogue to rows x columns of finished sums. */
static void PD__K(pd__finish)(const pd_epilogue *after, bool by_row, int64_t channel, int64_t rows, int64_t columns,
                              pd_real *c, int64_t ldc);

static void PD__K(pd__scatter)(const pd__block_job *k, const pd_real *tile, int64_t ld, int64_t i, int64_t rows,
                               int64_t j, int64_t width) {
    const int64_t *at = k->column_at + j;
    bool contiguous = width == ld && at[width - 1] - at[0] == width - 1;
    for (int64_t r = 0; r < rows; r++, tile += ld) {
        pd_real *to = k->c + k->row_at[i + r];
        if (contiguous)
            for (int64_t s = 0; s < width; s += PD__LANES)
                PD__STORE(to + at[0] + s, PD__LOAD(to + at[0] + s) + PD__LOAD(tile + s));
        else
            for (int64_t s = 0; s < width; s++) to[at[s]] += tile[s];
    }
}

/* c = alpha sums + beta c (beta 0: c is not read), rounded as pd__tile_of does it; sums: whole vectors. */
static PD__INLINE void PD__K(pd__put_row)(pd_real alpha, const pd_real *sums, pd_real beta, int64_t width, pd_real *c) {
    for (int64_t i = 0; i < width; i += PD__LANES) {
        PD__V v = PD__K(pd__all)(alpha) * PD__LOAD(sums + i);
        if (beta != 0) v = PD__FMA(PD__K(pd__all)(beta), PD__K(pd__load)(c + i, width - i), v);
        PD__K(pd__store)(c + i, v, width - i);
    }
}

/* The tile at row i and column j. */
static void PD__K(pd__multiply_tile)(const pd__block_job *k, int64_t ahead, int64_t i, int64_t j) {
    const int64_t rows = pd__min(k->h, k->m - i), width = pd__min(PD__NR, k->n - j), wide = PD__K(pd__panel)(width);
    const int nv = (int)(wide / PD__LANES);
    const pd_real *a = k->a + i * k->k, *b = k->b + j * k->k;
    pd_real tile[PD__MR * PD__NR], *c = k->c + i * k->ldc + j;
    bool direct = !k->row_at && width == wide;
    if (direct) PD__K(pd__tile)((int)rows, nv, k->k, k->alpha, a, ahead, b, wide, k->beta, c, k->ldc);
    else PD__K(pd__tile)((int)rows, nv, k->k, k->alpha, a, ahead, b, wide, 0, tile, wide);
    if (k->row_at) PD__K(pd__scatter)(k, tile, wide, i, rows, j, width);
    for (int64_t r = 0; !direct && !k->row_at && r < rows; r++)
        PD__K(pd__put_row)(1, tile + r * wide, k->beta, width, c + r * k->ldc);
}

static void PD__K(pd__multiply)(const pd__block_job *k) {
    /* A is not in the second-level cache, B is; and the order in which things are scattered is always the same. */
    if (k->m * k->k > PD__MC * PD__KC && k->n * k->k <= PD__MC * PD__KC && !k->row_at) {
        for (int64_t i = 0; i < k->m; i += k->h)
            for (int64_t j = 0; j < k->n; j += PD__NR) PD__K(pd__multiply_tile)(k, PD__AHEAD, i, j);
        if (k->after) PD__K(pd__finish)(k->after, k->by_row, k->channel, k->m, k->n, k->c, k->ldc);
        return;
    }
    for (int64_t j = 0; j < k->n; j += PD__NR) {
        for (int64_t i = 0; i < k->m; i += k->h) PD__K(pd__multiply_tile)(k, PD__BYTES == 64 ? PD__AHEAD : 0, i, j);
        if (k->after) PD__K(pd__finish)
        (k->after, k->by_row, k->channel + (k->by_row ? 0 : j), k->m, pd__min(PD__NR, k->n - j), k->c + j, k->ldc);
    }
}

/* sums = rows `first` .. `end` - 1 of B from column j on, weighed by the numbers of the one row: some rows at a time,
   in the order of k. */
static PD__INLINE void PD__K(pd__row_sums)(const pd__gemm_job *g, int64_t first, int64_t end, int64_t j, int64_t width,
                                           pd_real *sums) {
    enum { TOGETHER = 4 };
    const int64_t step = g->ta ? g->lda : 1;
    memset(sums, 0, (size_t)(pd__ceil_div(width, PD__LANES) * PD__LANES) * sizeof *sums);
    for (int64_t p = first; p < end; p += TOGETHER) {
        const int64_t rows = pd__min(TOGETHER, end - p);
        const pd_real *b = g->b + p * g->ldb + j, *a = g->a + p * step;
        int64_t i = 0;
        if (rows == TOGETHER) {
            const PD__V a0 = PD__K(pd__all)(a[0]), a1 = PD__K(pd__all)(a[step]);
            const PD__V a2 = PD__K(pd__all)(a[2 * step]), a3 = PD__K(pd__all)(a[3 * step]);
            for (; i + PD__LANES <= width; i += PD__LANES) {
                PD__V v = PD__FMA(a0, PD__LOAD(b + i), PD__LOAD(sums + i));
                v = PD__FMA(a1, PD__LOAD(b + g->ldb + i), v);
                v = PD__FMA(a2, PD__LOAD(b + 2 * g->ldb + i), v);
                PD__STORE(sums + i, PD__FMA(a3, PD__LOAD(b + 3 * g->ldb + i), v));
            }
        }
        for (; i < width; i += PD__LANES)
            for (int64_t r = 0; r < rows; r++)
                PD__STORE(sums + i, PD__FMA(PD__K(pd__all)(a[r * step]), PD__K(pd__load)(b + r * g->ldb + i, width - i),
                                            PD__LOAD(sums + i)));
    }
}

/* A part of one row times a matrix, which is read once, as it lies. Each block of depth has its own sums, which are
   added to C as those of packed blocks are: a row has the same bits alone as among others. */
static void PD__K(pd__gemm_row)(const pd__gemm_job *g, int64_t part) {
    enum { STRIP = 64 * PD__LANES };
    const int64_t depth = pd__depth(g->kernels, g->k), end = pd__min(g->n, (part + 1) * g->columns);
    for (int64_t j = part * g->columns; j < end; j += STRIP) {
        const int64_t width = pd__min(STRIP, end - j);
        pd_real sums[STRIP];
        for (int64_t p = 0; p < g->k || p == 0; p += depth) {
            PD__K(pd__row_sums)(g, p, pd__min(g->k, p + depth), j, width, sums);
            PD__K(pd__put_row)(g->alpha, sums, p ? 1 : g->beta, width, g->c + j);
        }
        if (g->after) PD__K(pd__finish)(g->after, false, j, 1, width, g->c + j, g->ldc);
    }
}

/* ---- >>kernel:winograd: Winograd's convolution: tiles of images, output gradients and filters, transformed, and sums
   back ---- */

/* One dimension of B^T d, A d, G g, A^T m and G^T m, for the points 0, a, -a, b, -b and infinity. With a = 5/8 and b =
   3/2 rounding errors are half those of 1 and 2. */
#define PD__ALL(x) PD__K(pd__all)((pd_real)(x))
#define PD__A PD__ALL(0.625)
#define PD__B PD__ALL(1.5)
#define PD__A2 PD__ALL(0.390625)
#define PD__B2 PD__ALL(2.25)
#define PD__A2B2 0.87890625
#define PD__A_SCALE (1 / (2 * 0.390625 * (0.390625 - 2.25)))
#define PD__B_SCALE (1 / (2 * 2.25 * (2.25 - 0.390625)))
static PD__INLINE void PD__K(pd__winograd_image)(const PD__V *d, PD__V *to) {
    PD__V even_a = d[4] - PD__B2 * d[2], odd_a = PD__A * (d[3] - PD__B2 * d[1]);
    PD__V even_b = d[4] - PD__A2 * d[2], odd_b = PD__B * (d[3] - PD__A2 * d[1]);
    to[0] = PD__FMA(PD__ALL(PD__A2B2), d[0], d[4] - PD__ALL(0.390625 + 2.25) * d[2]);
    to[1] = even_a + odd_a, to[2] = even_a - odd_a, to[3] = even_b + odd_b, to[4] = even_b - odd_b;
    to[5] = PD__FMA(PD__ALL(PD__A2B2), d[1], d[5] - PD__ALL(0.390625 + 2.25) * d[3]);
}
static PD__INLINE void PD__K(pd__winograd_gradient)(const PD__V *d, PD__V *to) {
    PD__V even_a = PD__FMA(PD__A2, d[2], d[0]), odd_a = PD__A * PD__FMA(PD__A2, d[3], d[1]);
    PD__V even_b = PD__FMA(PD__B2, d[2], d[0]), odd_b = PD__B * PD__FMA(PD__B2, d[3], d[1]);
    to[0] = d[0], to[5] = d[3];
    to[1] = even_a + odd_a, to[2] = even_a - odd_a, to[3] = even_b + odd_b, to[4] = even_b - odd_b;
}
static PD__INLINE void PD__K(pd__winograd_filter)(const PD__V *g, PD__V *to) {
    PD__V even_a = PD__ALL(PD__A_SCALE) * PD__FMA(PD__A2, g[2], g[0]), odd_a = PD__ALL(PD__A_SCALE * 0.625) * g[1];
    PD__V even_b = PD__ALL(PD__B_SCALE) * PD__FMA(PD__B2, g[2], g[0]), odd_b = PD__ALL(PD__B_SCALE * 1.5) * g[1];
    to[0] = PD__ALL(1 / PD__A2B2) * g[0], to[5] = g[2];
    to[1] = even_a + odd_a, to[2] = even_a - odd_a, to[3] = even_b + odd_b, to[4] = even_b - odd_b;
}
static PD__INLINE void PD__K(pd__winograd_output)(const PD__V *m, PD__V *to) {
    PD__V even_a = m[1] + m[2], odd_a = PD__A * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = PD__B * (m[3] - m[4]);
    to[0] = m[0] + even_a + even_b;
    to[1] = odd_a + odd_b;
    to[2] = PD__FMA(PD__A2, even_a, PD__B2 * even_b);
    to[3] = PD__FMA(PD__A2, odd_a, PD__FMA(PD__B2, odd_b, m[5]));
}
static PD__INLINE void PD__K(pd__winograd_filter_sum)(const PD__V *m, PD__V *to) {
    PD__V even_a = PD__ALL(PD__A_SCALE) * (m[1] + m[2]), odd_a = PD__ALL(PD__A_SCALE * 0.625) * (m[1] - m[2]);
    PD__V even_b = PD__ALL(PD__B_SCALE) * (m[3] + m[4]), odd_b = PD__ALL(PD__B_SCALE * 1.5) * (m[3] - m[4]);
    to[0] = PD__FMA(PD__ALL(1 / PD__A2B2), m[0], even_a + even_b);
    to[1] = odd_a + odd_b;
    to[2] = PD__FMA(PD__A2, even_a, PD__FMA(PD__B2, even_b, m[5]));
}
#undef PD__ALL
#undef PD__A
#undef PD__B
#undef PD__A2
#undef PD__B2
#undef PD__A2B2
#undef PD__A_SCALE
#undef PD__B_SCALE

/* A small transpose. Of whole squares it is done here: the call would take as long. */
static PD__INLINE void PD__K(pd__winograd_turn)(int64_t rows, int64_t columns, const pd_real *from, int64_t ld,
                                                pd_real *to, int64_t ldto) {
#if PD__BYTES > 0
    enum { SIDE = 16 / PD__REAL_BYTES };
    if (rows % SIDE == 0 && columns % SIDE == 0) {
        for (int64_t r = 0; r < rows; r += SIDE)
            for (int64_t c = 0; c < columns; c += SIDE)
                PD__K(pd__transpose_square)(from + r * ld + c, ld, to + c * ldto + r, ldto);
        return;
    }
#endif
    PD__K(pd__transpose)(rows, columns, from, ld, to, ldto);
}

/* What row r of a line's tiles reads of a channel, from column -left on, transformed for all of them:
   to[c * stride + tile]. `space`: 10 strides. */
static void PD__K(pd__winograd_line)(const pd__winograd *j, bool gradient, const pd_real *x,
                                     const pd__winograd_rows *at, int64_t r, pd_real *space, pd_real *to) {
    const int64_t stride = j->stride, high = gradient ? j->out_h : j->in_h, wide = gradient ? j->out_w : j->in_w;
    const int64_t next = gradient ? pd__winograd_out(j) : pd__winograd_in(j);
    const int64_t left = gradient ? 0 : j->left, columns = 4 * (j->across > 1 ? j->wide : stride);
    const int64_t length = pd__min(wide, columns - left);
    pd_real *phase = space + 4 * stride; /* columns 4 t + p are phase[p * gap + t * step] */
    const pd_real *fourth = phase + 1, *fifth = fourth + stride;
    const pd_real *from[PD__NR]; /* the numbers of each row of tiles, NULL where there are none */
    int64_t gap = stride, step = 1;
    const bool by_lane = PD__LANES > 1 && j->by_lane;
    bool none = true;
    if (!gradient) r -= j->top;
    for (int64_t i = 0; i < (by_lane ? 1 : j->across); i++) {
        const int64_t row = at->row[i] * 4 + r;
        const bool present = at->image[i] < j->rows && row >= 0 && row < high;
        from[i] = present ? x + at->image[i] * next + row * wide : NULL;
        none = none && !present;
    }
    if (none) {
        memset(to, 0, (size_t)(6 * stride) * sizeof *to);
        return;
    }
    if (by_lane) {
        const int64_t lanes = pd__min(PD__LANES, j->rows - at->image[0]);
        memset(space, 0, (size_t)((columns + 2) * PD__LANES) * sizeof *space);
        for (int64_t l = 0; l < lanes; l += 4) /* few at a time: they may take each other's places in the cache */
            PD__K(pd__winograd_turn)
        (pd__min(4, lanes - l), pd__min(wide, columns + 2 - left), from[0] + l * next, next,
         space + left * PD__LANES + l, PD__LANES);
        phase = space, gap = PD__LANES, step = 4;
        fourth = space + 4 * PD__LANES, fifth = fourth + PD__LANES;
    } else if (j->across == 1) {
        int64_t c = 0; /* zeros, the row, and zeros, which may run over to the phases; calls would take longer */
        for (; c < left; c += PD__LANES) PD__STORE(space + c, PD__K(pd__all)(0));
        for (c = 0; c + PD__LANES <= length; c += PD__LANES) PD__STORE(space + left + c, PD__LOAD(from[0] + c));
        PD__K(pd__copy_few)(length - c, from[0] + c, space + left + c);
        for (c = left + length; c < columns; c += PD__LANES) PD__STORE(space + c, PD__K(pd__all)(0));
        PD__K(pd__winograd_turn)(stride, 4, space, 4, phase, stride);
    } else {
        pd_real *last = phase + 4 * stride; /* fourth and fifth: images do not go on in the next one */
        memset(space, 0, (size_t)(4 * stride) * sizeof *space);
        for (int64_t i = 0; i < j->across; i++)
            if (from[i]) PD__K(pd__copy_few)(length, from[i], space + i * columns + left);
        PD__K(pd__winograd_turn)(stride, 4, space, 4, phase, stride);
        for (int64_t t = 0; t < j->width; t += PD__LANES) {
            PD__STORE(last + t, PD__LOAD(fourth + t));
            PD__STORE(last + stride + t, PD__LOAD(fifth + t));
        }
        fourth = last, fifth = last + stride;
        last += j->wide - 1;
        for (int64_t c = columns - left; c < columns - left + 2; c++, last += stride)
            for (int64_t i = 0; i < j->across; i++) last[i * j->wide] = from[i] && c < wide ? from[i][c] : 0;
    }
    for (int64_t t = 0; t < j->width; t += PD__LANES) {
        PD__V column[6], done[6];
        PD__UNROLL
        for (int i = 0; i < 4; i++) column[i] = PD__LOAD(phase + i * gap + t * step);
        column[4] = PD__LOAD(fourth + t * step), column[5] = PD__LOAD(fifth + t * step);
        if (gradient) PD__K(pd__winograd_gradient)(column, done);
        else PD__K(pd__winograd_image)(column, done);
        PD__UNROLL
        for (int i = 0; i < 6; i++) PD__STORE(to + i * stride + t, done[i]);
    }
}

/* One channel of a block's images, or of its output gradients, transformed. `space`: 46 strides. */
static void PD__K(pd__winograd_channel)(const pd__winograd *j, bool gradient, int64_t group, int64_t block,
                                        int64_t channel, pd_real *space, pd_real *to, int64_t plane) {
    const int64_t stride = j->stride, lines = pd__winograd_lines(j, block), rows = gradient ? 4 : 6;
    const pd_real *x = gradient ? j->dy + (group * j->filters + channel) * j->out_h * j->out_w
                                : j->x + (group * j->channels + channel) * j->in_h * j->in_w;
    pd_real *ring = space + 10 * stride; /* the last rows */
    pd__winograd_rows tiles;
    int64_t at = 0;
    pd__winograd_first(j, block, &tiles);
    for (int64_t line = 0; line < lines; line++, at += j->width) {
        pd_real *part[6];
        bool below = !gradient && line > 0; /* then two rows are there already */
        for (int64_t i = 0; i < j->across; i++) below = below && tiles.row[i] > 0;
        for (int64_t r = 0; r < rows; r++) part[r] = ring + (line * 4 + r) % 6 * 6 * stride;
        for (int64_t r = below ? 2 : 0; r < rows; r++)
            PD__K(pd__winograd_line)(j, gradient, x, &tiles, r, space, part[r]);
        pd__winograd_next(j, &tiles);
        for (int64_t t = 0; t < j->width; t += PD__LANES)
            for (int c = 0; c < 6; c++) {
                PD__V column[6], done[6];
                PD__UNROLL
                for (int r = 0; r < 4; r++) column[r] = PD__LOAD(part[r] + c * stride + t);
                if (gradient) PD__K(pd__winograd_gradient)(column, done);
                else {
                    column[4] = PD__LOAD(part[4] + c * stride + t), column[5] = PD__LOAD(part[5] + c * stride + t);
                    PD__K(pd__winograd_image)(column, done);
                }
                PD__UNROLL
                for (int r = 0; r < 6; r++) PD__STORE(to + (r * 6 + c) * plane + at + t, done[r]);
            }
    }
    for (int i = 0; i < 36 && at % PD__NR; i++) /* what is multiplied beside the tiles */
        memset(to + i * plane + at, 0, (size_t)(pd__ceil_div(at, PD__NR) * PD__NR - at) * sizeof *to);
}

/* A panel of filters, transformed: of each of the 36 planes [channels][height of the panel]. */
static void PD__K(pd__winograd_panel)(const pd__winograd *j, int64_t unit) {
    int64_t group = unit / j->panels, first = unit % j->panels * j->height,
            rows = pd__min(j->height, j->filters - first);
    int64_t step = j->back ? j->filters * 9 : 9, next = j->back ? 9 : j->channels * 9; /* to the next channel, filter */
    const pd_real *w = j->w + group * j->filters * j->channels * 9 + first * next;
    const int64_t plane = pd__winograd_plane(j->channels, j->height);
    int64_t c = 0, r = 0;
    for (int64_t at = 0; at < rows * j->channels; at += PD__LANES) {
        pd_real *to = j->packed + (group * 35 * j->panels + unit) * plane + at; /* vectors may reach into the gap */
        PD__V part[18], done[6];                                                /* part: [column][row] */
        pd_real numbers[9 * PD__LANES];
        for (int64_t l = 0; l < PD__LANES; l++) {
            const pd_real *filter = w + r * next + c * step;
            PD__UNROLL
            for (int i = 0; i < 9; i++) numbers[i * PD__LANES + l] = filter[j->back ? 8 - i : i];
            if (++r == rows) r = 0, c += c + 1 < j->channels;
        }
        for (int i = 0; i < 3; i++) {
            PD__V g[3];
            PD__UNROLL
            for (int k = 0; k < 3; k++) g[k] = PD__LOAD(numbers + (i * 3 + k) * PD__LANES);
            PD__K(pd__winograd_filter)(g, done);
            PD__UNROLL
            for (int k = 0; k < 6; k++) part[k * 3 + i] = done[k];
        }
        for (int k = 0; k < 6; k++) {
            PD__K(pd__winograd_filter)(part + k * 3, done);
            PD__UNROLL
            for (int i = 0; i < 6; i++) PD__STORE(to + (i * 6 + k) * j->panels * plane, done[i]);
        }
    }
}

/* Up to `most` outputs that lie together, 4 or a few vectors of them. */
static PD__INLINE void PD__K(pd__winograd_add)(pd_real beta, const pd_real *y, int64_t n, int64_t most, pd_real *line) {
    if (most == 4)
        for (int64_t c = 0; c < n; c++) line[c] += beta * y[c];
    else
        for (int64_t c = 0; c < n; c += PD__LANES)
            PD__STORE(line + c, PD__FMA(PD__K(pd__all)(beta), PD__K(pd__load)(y + c, n - c), PD__LOAD(line + c)));
}
static PD__INLINE void PD__K(pd__winograd_copy)(const pd_real *line, int64_t n, int64_t most, pd_real *y) {
    if (n == 4) memcpy(y, line, 4 * sizeof *y);
    else if (most == 4)
        for (int64_t c = 0; c < n; c++) y[c] = line[c];
    else
        for (int64_t c = 0; c < n; c += PD__LANES) PD__K(pd__store)(y + c, PD__LOAD(line + c), n - c);
}

/* The most frequent epilogues are applied to the vectors while these are in registers: max(least, scale (v - center) +
   bias). */
static PD__INLINE bool PD__K(pd__winograd_early)(const pd__winograd *j, int64_t channel, PD__V *scale, PD__V *center,
                                                 PD__V *bias, PD__V *least) {
    const bool early = j->beta == 0 && (!j->after || j->after->act == PD_LINEAR || j->after->act == PD_RELU);
    *scale = PD__K(pd__all)(early && j->after && j->after->scale ? j->after->scale[channel] : 1);
    *center = PD__K(pd__all)(early && j->after && j->after->center ? j->after->center[channel] : 0);
    *bias = PD__K(pd__all)(early && j->after && j->after->bias ? j->after->bias[channel] : 0);
    *least = PD__K(pd__all)(early && j->after && j->after->act == PD_RELU ? 0 : -(pd_real)INFINITY);
    return early;
}

/* Lines by lane: a channel's numbers of each image, `count` of them, from vectors of all images to where `y` points in
   the first. `space`: as many numbers again, behind the vectors. */
static void PD__K(pd__winograd_put_lanes)(const pd__winograd *j, bool early, int64_t channel, int64_t lanes,
                                          int64_t count, pd_real *space, pd_real *y) {
    const int64_t next = early ? pd__winograd_out(j) : count;
    pd_real *line = early ? y : space + count * PD__LANES;
    for (int64_t l = 0; l < lanes; l += 4) /* as above */
        PD__K(pd__winograd_turn)(count, pd__min(4, lanes - l), space + l, PD__LANES, line + l * next, next);
    for (int64_t l = 0; l < lanes && !early; l++, y += pd__winograd_out(j), line += count) {
        if (j->beta != 0) PD__K(pd__winograd_add)(j->beta, y, count, count, line);
        if (j->after) PD__K(pd__finish)(j->after, true, channel, 1, count, line, 0);
        memcpy(y, line, (size_t)count * sizeof *y);
    }
}

/* A^T m A of a block's tiles of one filter goes to the images; m: [36], `plane` apart. `space`: as of 36 planes. */
static void PD__K(pd__winograd_put)(const pd__winograd *j, int64_t group, int64_t block, int64_t filter,
                                    const pd_real *m, int64_t plane, pd_real *space) {
    const int64_t lines = pd__winograd_lines(j, block), channel = group * j->filters + filter;
    const int64_t area = j->out_h * j->out_w;
    const int64_t most = j->across > 1 ? 4 : 4 * PD__LANES; /* columns that lie together */
    const bool by_lane = PD__LANES > 1 && j->by_lane;
    PD__V scale, center, bias, least;
    const bool early = PD__K(pd__winograd_early)(j, channel, &scale, &center, &bias, &least);
    pd__winograd_rows tiles;
    pd__winograd_first(j, block, &tiles);
    for (int64_t row = 0; row < lines; row++, m += j->width, pd__winograd_next(j, &tiles)) {
        int64_t i = 0, column = 0;
        for (int64_t t = 0; t < j->width; t += PD__LANES) {
            int64_t pieces = 0, at[PD__LANES] = { 0 }, length[PD__LANES] = { 0 }, rows[PD__LANES] = { 0 }, numbers = 0;
            int64_t lowest = 4, highest = 0;     /* of `rows` */
            PD__V part[24], columns[6], done[4]; /* part: [row][column] */
            for (; !by_lane && numbers < 4 * PD__LANES && i < j->across && tiles.image[i] < j->rows;
                 numbers += most, pieces++) {
                const int64_t top = tiles.row[i] * 4;
                length[pieces] = pd__min(most, j->out_w - column);
                rows[pieces] = pd__min(4, j->out_h - top);
                lowest = pd__min(lowest, rows[pieces]), highest = pd__max(highest, rows[pieces]);
                at[pieces] = tiles.image[i] * pd__winograd_out(j) + channel * area + top * j->out_w + column;
                column += most;
                if (column >= j->out_w) column = 0, i++;
            }
            if (j->out_w % 4 != 0 || numbers < 4 * PD__LANES)
                lowest = 0; /* rows of whole pieces only, in all of them */
            for (int c = 0; c < 6; c++) {
                PD__UNROLL
                for (int r = 0; r < 6; r++) columns[r] = PD__LOAD(m + (r * 6 + c) * plane + t);
                PD__K(pd__winograd_output)(columns, done);
                PD__UNROLL
                for (int r = 0; r < 4; r++) part[r * 6 + c] = done[r];
            }
            if (by_lane) highest = pd__min(4, j->out_h - tiles.row[0] * 4);
            const int64_t limit = by_lane ? j->out_w - t / PD__LANES * 4 : 4;
            for (int r = 0; r < highest; r++) {
                pd_real phases[4 * PD__LANES], buffer[4 * PD__LANES], *to = j->out + r * j->out_w, *line = buffer;
                pd_real *vectors = by_lane ? space + (r * j->out_w + t / PD__LANES * 4) * PD__LANES : phases;
                PD__K(pd__winograd_output)(part + r * 6, done);
                PD__UNROLL
                for (int c = 0; c < 4; c++) {
                    PD__V v = PD__FMA(scale, done[c] - center, bias);
                    if (c < limit) PD__STORE(vectors + c * PD__LANES, PD__SELECT(v < least, least, v));
                }
                if (by_lane) continue;
                if (early && length[0] == 4 * PD__LANES) line = to + at[0];
                PD__K(pd__winograd_turn)(4, PD__LANES, phases, PD__LANES, line, 4);
                if (line != buffer) continue;
                if (early && most == 4 && r < lowest) {
                    PD__UNROLL
                    for (int k = 0; k < PD__LANES; k++) memcpy(to + at[k], line + 4 * k, 4 * sizeof *to);
                    continue;
                }
                for (int64_t k = 0; k < pieces && j->beta != 0; k++)
                    if (r < rows[k]) PD__K(pd__winograd_add)(j->beta, to + at[k], length[k], most, line + k * most);
                if (j->after && !early)
                    PD__K(pd__finish)(j->after, true, channel, 1, pieces == 1 ? length[0] : pieces * most, line, 0);
                for (int64_t k = 0; k < pieces; k++)
                    if (r < rows[k]) PD__K(pd__winograd_copy)(line + k * most, length[k], most, to + at[k]);
            }
        }
        if (by_lane) PD__K(pd__winograd_put_lanes)
        (j, early, channel, pd__min(PD__LANES, j->rows - tiles.image[0]),
         pd__min(4, j->out_h - tiles.row[0] * 4) * j->out_w, space,
         j->out + tiles.image[0] * pd__winograd_out(j) + channel * area + tiles.row[0] * 4 * j->out_w);
    }
}

/* dw += G^T m G of one filter. */
static void PD__K(pd__winograd_filter_unit)(const pd__winograd *j, int64_t filter) {
    const int64_t plane = pd__winograd_plane(j->filters, j->channels);
    for (int64_t c = 0; c < j->channels; c += PD__LANES) {
        const pd_real *m = j->packed + filter * j->channels + c;
        pd_real *dw = j->out + ((j->group * j->filters + filter) * j->channels + c) * 9;
        int64_t count = pd__min(PD__LANES, j->channels - c);
        pd_real sums[9 * PD__LANES], turned[9 * PD__LANES];
        PD__V part[18], column[6], done[3]; /* part: [row][column] */
        for (int k = 0; k < 6; k++) {
            PD__UNROLL
            for (int i = 0; i < 6; i++) column[i] = PD__K(pd__load)(m + (i * 6 + k) * plane, count);
            PD__K(pd__winograd_filter_sum)(column, done);
            PD__UNROLL
            for (int i = 0; i < 3; i++) part[i * 6 + k] = done[i];
        }
        for (int i = 0; i < 3; i++) {
            PD__K(pd__winograd_filter_sum)(part + i * 6, done);
            PD__UNROLL
            for (int k = 0; k < 3; k++) PD__STORE(sums + (i * 3 + k) * PD__LANES, done[k]);
        }
        PD__K(pd__transpose)(9, PD__LANES, sums, PD__LANES, turned, 9);
        for (int64_t i = 0; i < count * 9; i += PD__LANES)
            PD__K(pd__store)(dw + i, PD__K(pd__load)(dw + i, count * 9 - i) + PD__LOAD(turned + i), count * 9 - i);
    }
}

/* ---- >>kernel:elementwise: elementwise: vectors of PD__LANES numbers, or of PD__WIDE_LANES doubles made from as many
   numbers ---- */

#if PD__LANES == 1
#define PD__WIDE_LANES 1
typedef double PD__K(pd__doubles);
typedef pd_real PD__K(pd__narrow);
#define PD__SELECT_WIDE(mask, a, b) ((mask) ? (a) : (b))
#define PD__CONVERT(v, type) ((type)(v))
#define PD__LANE(v, i) (v)
#define PD__EVEN(a, b) (a)
#define PD__ODD(a, b) (b)
#else
#if PD__BYTES == 16
#define PD__WIDE_LANES 2
#elif PD__BYTES == 32
#define PD__WIDE_LANES 4
#else
#define PD__WIDE_LANES 8
#endif
typedef double PD__K(pd__doubles) __attribute__((vector_size(PD__BYTES)));
typedef int64_t PD__K(pd__wide_integers) __attribute__((vector_size(PD__BYTES)));
typedef pd_real PD__K(pd__narrow)
    __attribute__((vector_size(PD__WIDE_LANES * PD__REAL_BYTES), aligned(PD__REAL_BYTES), may_alias));
#define PD__WI PD__K(pd__wide_integers)
#define PD__SELECT_WIDE(mask, a, b) ((PD__W)(((PD__WI)(mask) & (PD__WI)(a)) | (~(PD__WI)(mask) & (PD__WI)(b))))
#define PD__CONVERT(v, type) __builtin_convertvector(v, type)
#define PD__LANE(v, i) ((v)[i])
/* Every second number of two vectors, and every second half. */
#if PD__LANES == 2
#define PD__EVERY_SECOND(i) i, i + 2
#define PD__EVERY_HALF(i) i, i + 2
#elif PD__LANES == 4
#define PD__EVERY_SECOND(i) i, i + 2, i + 4, i + 6
#define PD__EVERY_HALF(i) i, i + 1, i + 4, i + 5
#elif PD__LANES == 8
#define PD__EVERY_SECOND(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14
#define PD__EVERY_HALF(i) i, i + 1, i + 2, i + 3, i + 8, i + 9, i + 10, i + 11
#else
#define PD__EVERY_SECOND(i)                                                                                            \
    i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, i + 26, i + 28,     \
        i + 30
#define PD__EVERY_HALF(i)                                                                                              \
    i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7, i + 16, i + 17, i + 18, i + 19, i + 20, i + 21, i + 22, i + 23
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define PD__PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PD__PICK(a, b, ...) __builtin_shuffle(a, b, __extension__(PD__I){ __VA_ARGS__ })
#endif
#define PD__EVEN(a, b) PD__PICK(a, b, PD__EVERY_SECOND(0))
#define PD__ODD(a, b) PD__PICK(a, b, PD__EVERY_SECOND(1))
#define PD__LOWER(a, b) PD__PICK(a, b, PD__EVERY_HALF(0))
#define PD__UPPER(a, b) PD__PICK(a, b, PD__EVERY_HALF(PD__LANES / 2))
#endif
#define PD__W PD__K(pd__doubles)

static PD__INLINE PD__W PD__K(pd__all_wide)(double x) {
    PD__W v = { PD__TIMES(PD__WIDE_LANES, x) };
    return v;
}

static PD__INLINE PD__W PD__K(pd__load_wide)(const pd_real *from, int64_t left) {
    pd_real part[PD__WIDE_LANES];
    if (left < PD__WIDE_LANES) {
        for (int i = 0; i < PD__WIDE_LANES; i++) part[i] = i < left ? from[i] : 0;
        from = part;
    }
#if PD__BYTES == 64 && PD__REAL_BYTES == 4 /* gcc makes two conversions of one that it is not told of */
    return (PD__W)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif PD__BYTES == 32 && PD__REAL_BYTES == 4
    return (PD__W)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    return PD__CONVERT(*(const PD__K(pd__narrow) *)from, PD__W);
#endif
}
static PD__INLINE void PD__K(pd__store_wide)(pd_real *to, PD__W v, int64_t left) {
    pd_real part[PD__WIDE_LANES];
    *(PD__K(pd__narrow) *)(left < PD__WIDE_LANES ? part : to) = PD__CONVERT(v, PD__K(pd__narrow));
    for (int i = 0; left < PD__WIDE_LANES && i < left; i++) to[i] = part[i];
}

static PD__INLINE double PD__K(pd__sum_lanes)(PD__W v) {
    double sum = 0;
    for (int i = 0; i < PD__WIDE_LANES; i++) sum += PD__LANE(v, i);
    return sum;
}

/* Sum of a[i] b[i] in double; b NULL: of a[i]. */
static double PD__K(pd__dot)(int64_t n, const pd_real *a, const pd_real *b) {
    const PD__W one = PD__K(pd__all_wide)(1);
    PD__W sum[4]; /* so that one addition need not wait for the other */
    int64_t i = 0;
    for (int k = 0; k < 4; k++) sum[k] = PD__K(pd__all_wide)(0);
    for (; i + 4 * PD__WIDE_LANES <= n; i += 4 * PD__WIDE_LANES) {
        PD__UNROLL
        for (int k = 0; k < 4; k++) {
            int64_t at = i + k * PD__WIDE_LANES;
            sum[k] +=
                PD__K(pd__load_wide)(a + at, PD__WIDE_LANES) * (b ? PD__K(pd__load_wide)(b + at, PD__WIDE_LANES) : one);
        }
    }
    for (; i < n; i += PD__WIDE_LANES)
        sum[0] += PD__K(pd__load_wide)(a + i, n - i) * (b ? PD__K(pd__load_wide)(b + i, n - i) : one);
    return PD__K(pd__sum_lanes)((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* e^x, e^x - 1 (of x below 80) and log x, without branches, within 2 ulp. x = n log 2 + r, and e^r by its series; log
   by that of atanh. Cody and Waite, Software Manual for the Elementary Functions, 1980. */
#if PD__LANES == 1
static PD__INLINE pd_real PD__K(pd__exp)(pd_real x) { return PD__M(exp)(x); }
static PD__INLINE pd_real PD__K(pd__expm1)(pd_real x) { return PD__M(expm1)(x); }
static PD__INLINE pd_real PD__K(pd__log)(pd_real x) { return PD__M(log)(x); }
#else
#ifdef PADDLE_DOUBLE
#define PD__BIAS 1023
#define PD__MANTISSA 52
#define PD__MAGIC 6755399441055744.0 /* 1.5 2^52: added, it rounds to an integer in the lowest bits */
#define PD__LN2_HIGH 0.693147180369123816490
#define PD__LN2_LOW 1.90821492927058770002e-10
#define PD__EXP_TERMS 13
#define PD__LOG_TERMS 11
#else
#define PD__BIAS 127
#define PD__MANTISSA 23
#define PD__MAGIC 12582912.0f
#define PD__LN2_HIGH 0.693359375f
#define PD__LN2_LOW -2.12194440e-4f
#define PD__EXP_TERMS 7
#define PD__LOG_TERMS 5
#endif
/* x clipped to where e^x is neither 0 nor infinite for certain; e^x = (1 + *q) *scale1 *scale2 */
static PD__INLINE void PD__K(pd__exp_parts)(PD__V x, PD__V *q, PD__V *scale1, PD__V *scale2) {
    const PD__V low = PD__K(pd__all)((pd_real)(-PD__LN2_HIGH * (PD__BIAS + PD__MANTISSA + 2)));
    const PD__V high = PD__K(pd__all)((pd_real)(PD__LN2_HIGH * (PD__BIAS + 2)));
    const PD__V magic = PD__K(pd__all)((pd_real)PD__MAGIC);
    PD__V shifted, n, r, sum;
    PD__I whole, half;
    x = PD__SELECT(x < low, low, x);
    x = PD__SELECT(x > high, high, x);
    shifted = PD__FMA(x, PD__K(pd__all)((pd_real)1.4426950408889634), magic);
    n = shifted - magic;
    r = PD__FMA(n, PD__K(pd__all)((pd_real)-PD__LN2_HIGH), x);
    r = PD__FMA(n, PD__K(pd__all)((pd_real)-PD__LN2_LOW), r);
    sum = PD__K(pd__all)((pd_real)pd__factorial_inverse[PD__EXP_TERMS]);
    PD__UNROLL
    for (int i = PD__EXP_TERMS - 1; i >= 2; i--)
        sum = PD__FMA(sum, r, PD__K(pd__all)((pd_real)pd__factorial_inverse[i]));
    *q = PD__FMA(sum, r * r, r);
    whole = (PD__I)shifted - (PD__I)magic;
    half = whole >> 1;
    *scale1 = (PD__V)((half + PD__BIAS) << PD__MANTISSA);
    *scale2 = (PD__V)((whole - half + PD__BIAS) << PD__MANTISSA);
}
static PD__INLINE PD__V PD__K(pd__exp)(PD__V x) {
    PD__V q, scale1, scale2;
    PD__K(pd__exp_parts)(x, &q, &scale1, &scale2);
    return PD__FMA(q, scale1, scale1) * scale2;
}
static PD__INLINE PD__V PD__K(pd__expm1)(PD__V x) {
    PD__V q, scale1, scale2;
    PD__K(pd__exp_parts)(x, &q, &scale1, &scale2);
    scale1 *= scale2;
    return PD__FMA(q, scale1, scale1 - PD__K(pd__all)(1));
}
static PD__INLINE PD__V PD__K(pd__log)(PD__V x) {
    const PD__V one = PD__K(pd__all)(1);
    const PD__I half = (PD__I)PD__K(pd__all)((pd_real)0.70710678118654752);
    PD__I power = ((PD__I)x - half) >> PD__MANTISSA; /* so that the rest is in [sqrt(1/2), sqrt(2)) */
    PD__V m = (PD__V)((PD__I)x - (power << PD__MANTISSA)), f = (m - one) / (m + one), s = f * f, sum, n, y;
    sum = PD__K(pd__all)((pd_real)(2.0 / (2 * PD__LOG_TERMS + 1)));
    PD__UNROLL
    for (int i = PD__LOG_TERMS - 1; i >= 1; i--) sum = PD__FMA(sum, s, PD__K(pd__all)((pd_real)(2.0 / (2 * i + 1))));
    n = __builtin_convertvector(power, PD__V);
    y = PD__FMA(n, PD__K(pd__all)((pd_real)PD__LN2_LOW), sum * s * f);
    y = PD__FMA(n, PD__K(pd__all)((pd_real)PD__LN2_HIGH), y + f + f);
    y = PD__SELECT(x < PD__K(pd__all)(PD__REAL_MIN), PD__K(pd__all)((pd_real)-HUGE_VAL), y); /* subnormal: as 0 */
    y = PD__SELECT(x < PD__K(pd__all)(0), PD__K(pd__all)((pd_real)NAN), y);
    return PD__SELECT(x - x == PD__K(pd__all)(0), y, x * x * x); /* of infinity and NaN, themselves */
}
#undef PD__BIAS
#undef PD__MANTISSA
#undef PD__MAGIC
#undef PD__LN2_HIGH
#undef PD__LN2_LOW
#undef PD__EXP_TERMS
#undef PD__LOG_TERMS
#endif

static PD__INLINE PD__V PD__K(pd__sigmoid)(PD__V x) {
    const PD__V one = PD__K(pd__all)(1);
    return one / (one + PD__K(pd__exp)(-x));
}
/* By e^2x - 1, which keeps its accuracy about 0. */
static PD__INLINE PD__V PD__K(pd__tanh)(PD__V x) {
    const PD__V two = PD__K(pd__all)(2), most = PD__K(pd__all)(20); /* beyond, tanh is 1 */
    PD__V e;
    x = PD__SELECT(x > most, most, x);
    e = PD__K(pd__expm1)(two * x);
    return e / (e + two);
}

static void PD__K(pd__fill_piece)(int64_t n, pd_real value, pd_real *y) {
    for (int64_t i = 0; i < n; i += PD__LANES) PD__K(pd__store)(y + i, PD__K(pd__all)(value), n - i);
}

/* The innermost axis of contract. Sums run in double. */
static void PD__K(pd__contract_line)(int64_t n, pd_real alpha, const pd_real *a, int64_t as, const pd_real *b,
                                     int64_t bs, pd_real *y, int64_t ys) {
    pd_real factor = b ? alpha * *b : alpha; /* where b is one number */
    if (ys == 0 && as == 1 && b && bs == 1) {
        *y += alpha * (pd_real)PD__K(pd__dot)(n, a, b);
    } else if (ys == 0 && as == 1 && (!b || bs == 0)) {
        *y += factor * (pd_real)PD__K(pd__dot)(n, a, NULL);
    } else if (ys == 0) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (double)a[i * as] * (b ? (double)b[i * bs] : 1.0);
        *y += alpha * (pd_real)sum;
    } else if (ys == 1 && as <= 1 && as >= 0 && (!b || bs == 0)) {
        const PD__V f = PD__K(pd__all)(factor), one = PD__K(pd__all)(*a);
        for (int64_t i = 0; i < n; i += PD__LANES) {
            PD__V from = as ? PD__K(pd__load)(a + i, n - i) : one;
            PD__K(pd__store)(y + i, PD__FMA(f, from, PD__K(pd__load)(y + i, n - i)), n - i);
        }
    } else if (as == 1 && ys == 1 && bs == 1) {
        const PD__V f = PD__K(pd__all)(alpha);
        for (int64_t i = 0; i < n; i += PD__LANES) {
            PD__V from = f * PD__K(pd__load)(a + i, n - i);
            PD__V to = PD__FMA(from, PD__K(pd__load)(b + i, n - i), PD__K(pd__load)(y + i, n - i));
            PD__K(pd__store)(y + i, to, n - i);
        }
    } else {
        for (int64_t i = 0; i < n; i++) y[i * ys] += alpha * a[i * as] * (b ? b[i * bs] : 1);
    }
}

static void PD__K(pd__contract_box)(const int64_t size[4], pd_real alpha, const pd_real *a, const int64_t as[4],
                                    const pd_real *b, const int64_t bs[4], pd_real *y, const int64_t ys[4]) {
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < size[1]; j++)
            for (int64_t k = 0; k < size[2]; k++) {
                const pd_real *left = a + i * as[0] + j * as[1] + k * as[2];
                const pd_real *right = b ? b + i * bs[0] + j * bs[1] + k * bs[2] : NULL;
                pd_real *to = y + i * ys[0] + j * ys[1] + k * ys[2];
                PD__K(pd__contract_line)(size[3], alpha, left, as[3], right, b ? bs[3] : 0, to, ys[3]);
            }
}

/* ---- >>kernel:update: optimizers' arithmetic ---- */

static PD__INLINE PD__W PD__K(pd__square_root)(PD__W v) {
#if PD__BYTES == 64
    return (PD__W)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); /* the plain one warns, in gcc 12's own header */
#elif PD__BYTES == 32
    return (PD__W)_mm256_sqrt_pd((__m256d)v);
#else
    for (int i = 0; i < PD__WIDE_LANES; i++) PD__LANE(v, i) = sqrt(PD__LANE(v, i));
    return v;
#endif
}

/* The gradient that the method sees: scaled, clipped, with coupled L2. */
static PD__INLINE PD__W PD__K(pd__update_gradient)(const pd_update *u, double l2, PD__W w, PD__W g) {
    g *= PD__K(pd__all_wide)(u->scale);
    if (u->clip > 0) {
        PD__W clip = PD__K(pd__all_wide)(u->clip);
        g = PD__SELECT_WIDE(g > clip, clip, g);
        g = PD__SELECT_WIDE(g < -clip, -clip, g);
    }
    return g + PD__K(pd__all_wide)(l2) * w;
}

/* One step of some numbers w with gradient g; s: their states. Returns the new w. First of SGD and momentum only. */
static PD__INLINE PD__W PD__K(pd__update_plainly)(const pd_update *u, PD__W w, PD__W g, PD__W *s) {
    const PD__W r = PD__K(pd__all_wide)(u->rate), mu = PD__K(pd__all_wide)(u->optimizer.momentum);
    if (u->optimizer.kind == PD_OPT_SGD) return w - r * g;
    s[0] = mu * s[0] - r * g;
    return u->optimizer.nesterov ? w + mu * s[0] - r * g : w + s[0];
}
static PD__INLINE PD__W PD__K(pd__update_step)(const pd_update *u, double correct1, double correct2, PD__W w, PD__W g,
                                               PD__W *s) {
#define PD__ALL(x) PD__K(pd__all_wide)(x)
    const pd_optimizer *o = &u->optimizer;
    const PD__W r = PD__ALL(u->rate), mu = PD__ALL(o->momentum), zero = PD__ALL(0);
    PD__W v;
    switch (o->kind) {
    case PD_OPT_SGD:
    case PD_OPT_MOMENTUM: return PD__K(pd__update_plainly)(u, w, g, s);
    case PD_OPT_ADAGRAD: s[0] += g * g; return w - r * g / (PD__K(pd__square_root)(s[0]) + PD__ALL(o->epsilon));
    case PD_OPT_ADADELTA:
        s[0] = PD__ALL(o->rho) * s[0] + PD__ALL(1 - o->rho) * g * g;
        v = PD__K(pd__square_root)((s[1] + PD__ALL(o->epsilon)) / (s[0] + PD__ALL(o->epsilon))) * g;
        s[1] = PD__ALL(o->rho) * s[1] + PD__ALL(1 - o->rho) * v * v;
        return w - r * v;
    case PD_OPT_RMSPROP:
        v = s[0] = PD__ALL(o->rho) * s[0] + PD__ALL(1 - o->rho) * g * g;
        if (o->centered) {
            s[2] = PD__ALL(o->rho) * s[2] + PD__ALL(1 - o->rho) * g;
            v -= s[2] * s[2];
            v = PD__SELECT_WIDE(v < zero, zero, v);
        }
        v = r * g / (PD__K(pd__square_root)(v) + PD__ALL(o->epsilon));
        if (o->momentum == 0) return w - v;
        s[1] = mu * s[1] - v;
        return w + s[1];
    case PD_OPT_DECAYED_ADAGRAD:
        s[0] = PD__ALL(o->rho) * s[0] + PD__ALL(1 - o->rho) * g * g;
        return w - r * g / PD__K(pd__square_root)(s[0] + PD__ALL(o->epsilon));
    case PD_OPT_ADAM:
    case PD_OPT_ADAMW:
        s[0] = PD__ALL(o->beta1) * s[0] + PD__ALL(1 - o->beta1) * g;
        s[1] = PD__ALL(o->beta2) * s[1] + PD__ALL(1 - o->beta2) * g * g;
        if (o->kind == PD_OPT_ADAMW) w -= PD__ALL(u->rate * u->l2) * w;
        v = PD__K(pd__square_root)(s[1] / PD__ALL(correct2)) + PD__ALL(o->epsilon);
        return w - PD__ALL(u->rate / correct1) * s[0] / v;
    case PD_OPT_ADAMAX:
        s[0] = PD__ALL(o->beta1) * s[0] + PD__ALL(1 - o->beta1) * g;
        v = PD__SELECT_WIDE(g < zero, -g, g) + PD__ALL(o->epsilon);
        s[1] *= PD__ALL(o->beta2);
        s[1] = PD__SELECT_WIDE(s[1] > v, s[1], v);
        return w - PD__ALL(u->rate / correct1) * s[0] / s[1];
    case PD_OPT_COUNT: break;
    }
    return w;
#undef PD__ALL
}

/* Whole vectors, for one method with so many states at most. */
static PD__INLINE void PD__K(pd__update_all)(const pd_optimizer_kind kind, const int states, const pd__update_job *job,
                                             int64_t start, int64_t end) {
    const pd__update_job j = *job;
    pd_update update = *j.u; /* copies, which no store below can change */
    const double shrinking = update.rate * update.l1;
    const PD__W shrink = PD__K(pd__all_wide)(shrinking), zero = PD__K(pd__all_wide)(0);
    const bool fewer = kind == PD_OPT_RMSPROP; /* it does without some of them; others have them all */
    pd_real *state[PD_MAX_STATES];
    update.optimizer.kind = kind;
    for (int k = 0; k < states; k++) state[k] = j.states[k];
    for (int64_t i = start; i < end; i += PD__WIDE_LANES) {
        PD__W w = PD__K(pd__load_wide)(j.w + i, PD__WIDE_LANES), s[PD_MAX_STATES];
        PD__W g = PD__K(pd__update_gradient)(&update, j.l2, w, PD__K(pd__load_wide)(j.g + i, PD__WIDE_LANES));
        PD__UNROLL
        for (int k = 0; k < states; k++)
            s[k] = fewer && !state[k] ? zero : PD__K(pd__load_wide)(state[k] + i, PD__WIDE_LANES);
        w = PD__K(pd__update_step)(&update, j.correct1, j.correct2, w, g, s);
        PD__UNROLL
        for (int k = 0; k < states; k++)
            if (!fewer || state[k]) PD__K(pd__store_wide)(state[k] + i, s[k], PD__WIDE_LANES);
        if (shrinking > 0) {
            PD__W less = PD__SELECT_WIDE(w < -shrink, w + shrink, zero);
            w = PD__SELECT_WIDE(w > shrink, w - shrink, less);
        }
        PD__K(pd__store_wide)(j.w + i, w, PD__WIDE_LANES);
    }
}
static void PD__K(pd__update_vectors)(const pd__update_job *j, int64_t start, int64_t end) {
#define PD__EACH(kind, states)                                                                                         \
    case kind: PD__K(pd__update_all)(kind, states, j, start, end); break;
    switch (j->u->optimizer.kind) {
        PD__EACH(PD_OPT_SGD, 0)
        PD__EACH(PD_OPT_MOMENTUM, 1)
        PD__EACH(PD_OPT_ADAGRAD, 1)
        PD__EACH(PD_OPT_ADADELTA, 2)
        PD__EACH(PD_OPT_RMSPROP, 3)
        PD__EACH(PD_OPT_DECAYED_ADAGRAD, 1)
        PD__EACH(PD_OPT_ADAM, 2)
        PD__EACH(PD_OPT_ADAMW, 2)
        PD__EACH(PD_OPT_ADAMAX, 2)
    case PD_OPT_COUNT: break;
    }
#undef PD__EACH
}

static void PD__K(pd__update_piece)(const pd__update_job *j, int64_t start, int64_t end) {
    const int64_t whole = start + (end - start) / PD__WIDE_LANES * PD__WIDE_LANES;
    const size_t rest = (size_t)(end - whole) * sizeof(pd_real);
    PD__K(pd__update_vectors)(j, start, whole);
    if (rest > 0) { /* they have a vector of their own */
        pd_real w[PD__WIDE_LANES] = { 0 }, g[PD__WIDE_LANES] = { 0 }, s[PD_MAX_STATES][PD__WIDE_LANES] = { { 0 } };
        pd_real *states[PD_MAX_STATES];
        pd__update_job last = *j;
        last.w = w, last.g = g, last.states = states;
        memcpy(w, j->w + whole, rest);
        memcpy(g, j->g + whole, rest);
        for (int k = 0; k < PD_MAX_STATES; k++) {
            states[k] = j->states[k] ? s[k] : NULL;
            if (j->states[k]) memcpy(s[k], j->states[k] + whole, rest);
        }
        PD__K(pd__update_vectors)(&last, 0, PD__WIDE_LANES);
        memcpy(j->w + whole, w, rest);
        for (int k = 0; k < PD_MAX_STATES; k++)
            if (j->states[k]) memcpy(j->states[k] + whole, s[k], rest);
    }
    for (int64_t i = start; j->mask && i < end; i++)
        if (!j->mask[i]) j->w[i] = 0;
}

/* One row; SGD and momentum only, which have no bias correction and one state at most. new_w may be w, and new_state
   state; new_state NULL: w alone is wanted. One function for rows that step and copies of them, so that these are the
   same to the bit. */
static void PD__K(pd__update_row)(const pd_update *u, int64_t width, const double *c, const pd_real *w,
                                  const pd_real *g, const pd_real *state, pd_real *new_w, pd_real *new_state) {
    for (int64_t i = 0; i < width; i += PD__WIDE_LANES) {
        const int64_t left = width - i;
        PD__W v = PD__K(pd__load_wide)(w + i, left), s[PD_MAX_STATES];
        s[0] = s[1] = s[2] = state ? PD__K(pd__load_wide)(state + i, left) : PD__K(pd__all_wide)(0);
        if (c) {
            const PD__W before = v;
            v = PD__K(pd__all_wide)(c[0]) * before + PD__K(pd__all_wide)(c[1]) * s[0];
            s[0] = PD__K(pd__all_wide)(c[2]) * before + PD__K(pd__all_wide)(c[3]) * s[0];
            v = PD__CONVERT(PD__CONVERT(v, PD__K(pd__narrow)), PD__W); /* as if they had been stored */
            s[0] = PD__CONVERT(PD__CONVERT(s[0], PD__K(pd__narrow)), PD__W);
        }
        if (g)
            v = PD__K(pd__update_plainly)(
                u, v, PD__K(pd__update_gradient)(u, u->l2, v, PD__K(pd__load_wide)(g + i, left)), s);
        PD__K(pd__store_wide)(new_w + i, v, left);
        if (new_state) PD__K(pd__store_wide)(new_state + i, s[0], left);
    }
}

/* ---- >>kernel:activate: activations ---- */

/* erf cancels in GELU's tail, and beyond 40 there is nothing but 0 or x. NaN stays. */
static PD__INLINE pd_real PD__K(pd__gelu)(pd_real x) {
    return x > 40 ? x : (x < -40 ? -40 : x) / 2 * PD__M(erfc)(x * (pd_real)-0.70710678118654752);
}
static PD__INLINE pd_real PD__K(pd__gelu_slope)(pd_real x) {
    const pd_real v = x > 40 ? 40 : x < -40 ? -40 : x;
    return PD__M(erfc)(v * (pd_real)-0.70710678118654752) / 2 +
           v * PD__M(exp)(-v * v / 2) * (pd_real)0.39894228040143268;
}

/* y[i] for one kind over a piece. */
static void PD__K(pd__activate_piece)(pd_act act, pd_real alpha_, int64_t n, const pd_real *x, pd_real *y) {
    const PD__V zero = PD__K(pd__all)(0), one = PD__K(pd__all)(1), alpha = PD__K(pd__all)(alpha_);
    const PD__V a = PD__K(pd__all)((pd_real)pd__stanh_a), b = PD__K(pd__all)((pd_real)pd__stanh_b);
#define PD__EACH(kind, value)                                                                                          \
    case kind:                                                                                                         \
        for (int64_t i = 0; i < n; i += PD__LANES) {                                                                   \
            PD__V v = PD__K(pd__load)(x + i, n - i);                                                                   \
            PD__K(pd__store)(y + i, (value), n - i);                                                                   \
        }                                                                                                              \
        break;
#define PD__EACH_NUMBER(kind, value)                                                                                   \
    case kind:                                                                                                         \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            pd_real v = x[i];                                                                                          \
            y[i] = (value);                                                                                            \
        }                                                                                                              \
        break;
    switch (act) {
        PD__EACH(PD_RELU, PD__SELECT(v < zero, zero, v)) /* so written, NaN stays */
        PD__EACH(PD_BRELU, PD__SELECT(v < zero, zero, PD__SELECT(v > alpha, alpha, v)))
        PD__EACH_NUMBER(PD_SOFTRELU, (v > 0 ? v : 0) + PD__M(log1p)(PD__M(exp)(-PD__M(fabs)(v))))
        PD__EACH(PD_LEAKY_RELU, PD__SELECT(v < zero, alpha * v, v))
        PD__EACH_NUMBER(PD_GELU, PD__K(pd__gelu)(v))
        PD__EACH(PD_SIGMOID, PD__K(pd__sigmoid)(v))
        PD__EACH(PD_TANH, PD__K(pd__tanh)(v))
        PD__EACH(PD_STANH, a * PD__K(pd__tanh)(b * v))
        PD__EACH(PD_EXP, PD__K(pd__exp)(v))
        PD__EACH_NUMBER(PD_LOG, PD__M(log)(v))
        PD__EACH(PD_ABS, PD__SELECT(v < zero, -v, v))
        PD__EACH(PD_SQUARE, v * v)
        PD__EACH_NUMBER(PD_SQRT, PD__M(sqrt)(v))
        PD__EACH(PD_RECIPROCAL, one / v)
    case PD_LINEAR:
    case PD_SOFTMAX:
    case PD_ACT_COUNT: break;
    }
#undef PD__EACH
#undef PD__EACH_NUMBER
}

static void PD__K(pd__finish)(const pd_epilogue *after, bool by_row, int64_t channel, int64_t rows, int64_t columns,
                              pd_real *c, int64_t ldc) {
    const pd_real *scales = after->scale ? after->scale + channel : NULL;
    const pd_real *centers = after->center ? after->center + channel : NULL;
    const pd_real *biases = after->bias ? after->bias + channel : NULL;
    const pd_real floor = after->act == PD_RELU ? 0 : -(pd_real)INFINITY;
    for (int64_t r = 0; r < rows; r++, c += ldc) {
        PD__V scale = PD__K(pd__all)(scales && by_row ? scales[r] : 1), least = PD__K(pd__all)(floor);
        PD__V center = PD__K(pd__all)(centers && by_row ? centers[r] : 0);
        PD__V bias = PD__K(pd__all)(biases && by_row ? biases[r] : 0);
        int64_t i = 0;
        for (; by_row && i + PD__LANES <= columns; i += PD__LANES) {
            PD__V v = PD__FMA(scale, PD__LOAD(c + i) - center, bias);
            PD__STORE(c + i, PD__SELECT(v < least, least, v));
        }
        for (; i < columns; i += PD__LANES) {
            PD__V v = PD__K(pd__load)(c + i, columns - i);
            if (scales && !by_row) scale = PD__K(pd__load)(scales + i, columns - i);
            if (centers && !by_row) center = PD__K(pd__load)(centers + i, columns - i);
            if (biases && !by_row) bias = PD__K(pd__load)(biases + i, columns - i);
            v = PD__FMA(scale, v - center, bias);
            PD__K(pd__store)(c + i, PD__SELECT(v < least, least, v), columns - i);
        }
        if (after->act != PD_LINEAR && after->act != PD_RELU)
            PD__K(pd__activate_piece)(after->act, after->alpha, columns, c, c);
    }
}

/* grad[i] *= f'. v is x[i] for the kinds that need x, else unused; w is y[i]. A gradient of 0 stays 0 where the slope
   may be infinite (else it would be NaN), and the slope of the root at 0 counts as 0, as that of |x| does. */
static void PD__K(pd__activate_backward_piece)(pd_act act, pd_real alpha_, int64_t n, const pd_real *x,
                                               const pd_real *y, pd_real *grad) {
    const PD__V zero = PD__K(pd__all)(0), one = PD__K(pd__all)(1), alpha = PD__K(pd__all)(alpha_);
    const PD__V ratio = PD__K(pd__all)((pd_real)(pd__stanh_b / pd__stanh_a));
    const PD__V square = PD__K(pd__all)((pd_real)(pd__stanh_a * pd__stanh_a)), half = PD__K(pd__all)((pd_real)0.5);
#define PD__EACH(kind, name, from, value)                                                                              \
    case kind:                                                                                                         \
        for (int64_t i = 0; i < n; i += PD__LANES) {                                                                   \
            PD__V name = PD__K(pd__load)((from) + i, n - i), g = PD__K(pd__load)(grad + i, n - i);                     \
            PD__K(pd__store)(grad + i, (value), n - i);                                                                \
        }                                                                                                              \
        break;
#define PD__EACH_NUMBER(kind, name, from, value)                                                                       \
    case kind:                                                                                                         \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            pd_real name = (from)[i];                                                                                  \
            grad[i] *= (value);                                                                                        \
        }                                                                                                              \
        break;
    switch (act) {
        PD__EACH(PD_RELU, w, y,
                 PD__SELECT(w > zero, one, zero) * g) /* a product, so that a gradient that is NaN stays */
        PD__EACH(PD_BRELU, w, y, PD__SELECT(w > zero, PD__SELECT(w < alpha, one, zero), zero) * g)
        PD__EACH_NUMBER(PD_SOFTRELU, w, y, -PD__M(expm1)(-w))
        PD__EACH(PD_LEAKY_RELU, w, y, PD__SELECT(w < zero, alpha, one) * g)
        PD__EACH_NUMBER(PD_GELU, v, x, PD__K(pd__gelu_slope)(v))
        PD__EACH(PD_SIGMOID, w, y, w * (one - w) * g)
        PD__EACH(PD_TANH, w, y, (one - w * w) * g)
        PD__EACH(PD_STANH, w, y, ratio * (square - w * w) * g)
        PD__EACH(PD_EXP, w, y, PD__SELECT(g == zero, zero, w * g))
        PD__EACH(PD_LOG, v, x, PD__SELECT(g == zero, zero, g / v))
        PD__EACH(PD_ABS, v, x, (PD__SELECT(v > zero, one, zero) - PD__SELECT(v < zero, one, zero)) * g)
        PD__EACH(PD_SQUARE, v, x, PD__SELECT(g == zero, zero, (v + v) * g))
        PD__EACH(PD_SQRT, w, y, PD__SELECT(w == zero, zero, half / w) * g)
        PD__EACH(PD_RECIPROCAL, w, y, PD__SELECT(g == zero, zero, -w * w * g))
    case PD_LINEAR:
    case PD_SOFTMAX:
    case PD_ACT_COUNT: break;
    }
#undef PD__EACH
#undef PD__EACH_NUMBER
}

static pd_real PD__K(pd__largest)(int64_t n, const pd_real *x) {
    pd_real lanes[PD__LANES], top = x[0];
    PD__V tops = PD__K(pd__all)(top);
    int64_t i = 0;
    for (; i + PD__LANES <= n; i += PD__LANES) {
        PD__V v = PD__LOAD(x + i);
        tops = PD__SELECT(v > tops, v, tops);
    }
    PD__STORE(lanes, tops);
    for (int k = 0; k < PD__LANES; k++) top = lanes[k] > top ? lanes[k] : top;
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static void PD__K(pd__softmax_row)(int64_t n, const pd_real *x, pd_real *y) {
    const pd_real top = PD__K(pd__largest)(n, x);
    PD__V factor;
    for (int64_t i = 0; i < n; i += PD__LANES)
        PD__K(pd__store)(y + i, PD__K(pd__exp)(PD__K(pd__load)(x + i, n - i) - PD__K(pd__all)(top)), n - i);
    factor = PD__K(pd__all)((pd_real)(1 / PD__K(pd__dot)(n, y, NULL)));
    for (int64_t i = 0; i < n; i += PD__LANES) PD__K(pd__store)(y + i, factor * PD__K(pd__load)(y + i, n - i), n - i);
}

/* -log of the largest of y = softmax(x), and its x: that of number i is then larger by *top - x[i], whatever has
   become of y[i]. Of one close to 1 the others know more. */
static double PD__K(pd__softmax_cost)(int64_t n, const pd_real *x, const pd_real *y, double *top) {
    double largest = (double)PD__K(pd__largest)(n, y), others = PD__K(pd__dot)(n, y, NULL) - largest;
    *top = (double)PD__K(pd__largest)(n, x);
    return others < 0.5 ? -log1p(-(others > 0 ? others : 0)) : -log(largest);
}

/* dx = y (dy - sum y dy), in place */
static void PD__K(pd__softmax_backward_row)(int64_t n, const pd_real *y, pd_real *grad) {
    const PD__V dot = PD__K(pd__all)((pd_real)PD__K(pd__dot)(n, y, grad));
    for (int64_t i = 0; i < n; i += PD__LANES) {
        PD__V g = PD__K(pd__load)(y + i, n - i) * (PD__K(pd__load)(grad + i, n - i) - dot);
        PD__K(pd__store)(grad + i, g, n - i);
    }
}

/* ---- >>kernel:norm: normalisation ---- */

/* Sum of (x[i] - mean)^2. */
static double PD__K(pd__deviations)(int64_t n, const pd_real *x, double mean_) {
    const PD__W mean = PD__K(pd__all_wide)(mean_);
    PD__W sum[2] = { PD__K(pd__all_wide)(0), PD__K(pd__all_wide)(0) };
    double tail = 0;
    int64_t i = 0;
    for (; i + 2 * PD__WIDE_LANES <= n; i += 2 * PD__WIDE_LANES) {
        PD__UNROLL
        for (int k = 0; k < 2; k++) {
            PD__W v = PD__K(pd__load_wide)(x + i + k * PD__WIDE_LANES, PD__WIDE_LANES) - mean;
            sum[k] += v * v;
        }
    }
    for (; i < n; i++) tail += ((double)x[i] - mean_) * ((double)x[i] - mean_);
    return PD__K(pd__sum_lanes)(sum[0] + sum[1]) + tail;
}

static void PD__K(pd__moments_of)(const pd__channel_job *j, int64_t c) {
    double n = (double)pd__max(j->rows * j->area, 1), sum = 0, squares = 0;
    for (int64_t r = 0; r < j->rows; r++) sum += PD__K(pd__dot)(j->area, j->x + (r * j->channels + c) * j->area, NULL);
    for (int64_t r = 0; r < j->rows; r++)
        squares += PD__K(pd__deviations)(j->area, j->x + (r * j->channels + c) * j->area, sum / n);
    j->moments[c] = (pd_real)(sum / n);
    j->moments[j->channels + c] = (pd_real)(sum / n - (double)j->moments[c]);
    j->moments[2 * j->channels + c] = (pd_real)(squares / n);
}

static void PD__K(pd__batch_norm_map)(const pd__channel_job *j, int64_t m) {
    int64_t c = m % j->channels;
    const pd_real times = (pd_real)(1 / sqrt((double)j->variance[c] + j->epsilon)) * (j->weight ? j->weight[c] : 1);
    const pd_real plus = (j->bias ? j->bias[c] : 0) - (j->rest ? j->rest[c] * times : 0);
    const PD__V mean = PD__K(pd__all)(j->mean[c]), factor = PD__K(pd__all)(times), shift = PD__K(pd__all)(plus);
    for (int64_t i = 0; i < j->area; i += PD__LANES) {
        PD__V x = PD__K(pd__load)(j->x + m * j->area + i, j->area - i);
        PD__K(pd__store)(j->y + m * j->area + i, PD__FMA(x - mean, factor, shift), j->area - i);
    }
}

/* With n = rows * area and xhat = (x - mean) / deviation: dx = weight / deviation (dy - mean(dy) - xhat mean(dy xhat)),
   the two means only if the moments depend on x. */
static void PD__K(pd__batch_norm_back)(const pd__channel_job *j, int64_t c) {
    double n = (double)pd__max(j->rows * j->area, 1), sum = 0, dot = 0;
    double mean = (double)j->mean[c] + (j->rest ? (double)j->rest[c] : 0);
    double inverse = 1 / sqrt((double)j->variance[c] + j->epsilon);
    double factor = inverse * (j->weight ? (double)j->weight[c] : 1);
    for (int64_t r = 0; r < j->rows; r++) {
        int64_t at = (r * j->channels + c) * j->area;
        sum += PD__K(pd__dot)(j->area, j->dy + at, NULL);
        dot += PD__K(pd__dot)(j->area, j->dy + at, j->x + at);
    }
    dot = (dot - sum * mean) * inverse;
    if (j->dweight) j->dweight[c] += (pd_real)dot;
    if (j->dbias) j->dbias[c] += (pd_real)sum;
    for (int64_t r = 0; j->dx && r < j->rows; r++) { /* dx += a dy + b x + constant */
        const PD__W a = PD__K(pd__all_wide)(factor);
        const PD__W b = PD__K(pd__all_wide)(j->batch_moments ? -factor * inverse * dot / n : 0);
        const PD__W shift = PD__K(pd__all_wide)(j->batch_moments ? factor * (mean * inverse * dot - sum) / n : 0);
        int64_t at = (r * j->channels + c) * j->area;
        for (int64_t i = 0; i < j->area; i += PD__WIDE_LANES) {
            const int64_t left = j->area - i;
            PD__W v = a * PD__K(pd__load_wide)(j->dy + at + i, left) + b * PD__K(pd__load_wide)(j->x + at + i, left);
            PD__K(pd__store_wide)(j->dx + at + i, PD__K(pd__load_wide)(j->dx + at + i, left) + v + shift, left);
        }
    }
}

/* Of n numbers: *mean, 1 / deviation, and what backward wants of both; see pd_op_layer_norm. */
static double PD__K(pd__put_moments)(int64_t n, const pd_real *x, double epsilon, pd_real *moments, double *mean) {
    double inverse;
    *mean = PD__K(pd__dot)(n, x, NULL) / (double)n;
    inverse = 1 / sqrt(PD__K(pd__deviations)(n, x, *mean) / (double)n + epsilon);
    moments[0] = (pd_real)*mean;
    moments[1] = (pd_real)(*mean - (double)moments[0]);
    moments[2] = (pd_real)inverse;
    return inverse;
}

/* y = (x - mean) / deviation weight + bias of a row */
static void PD__K(pd__layer_norm_row)(const pd__layer_norm_job *j, int64_t r) {
    const int64_t width = j->width;
    const pd_real *x = j->x + r * width;
    double mean, inverse = PD__K(pd__put_moments)(width, x, j->epsilon, j->moments + 3 * r, &mean);
    const PD__W one = PD__K(pd__all_wide)(1), zero = PD__K(pd__all_wide)(0);
    for (int64_t i = 0; i < width; i += PD__WIDE_LANES) {
        const int64_t left = width - i;
        const PD__W v = (PD__K(pd__load_wide)(x + i, left) - PD__K(pd__all_wide)(mean)) * PD__K(pd__all_wide)(inverse);
        const PD__W weight = j->weight ? PD__K(pd__load_wide)(j->weight + i, left) : one;
        const PD__W bias = j->bias ? PD__K(pd__load_wide)(j->bias + i, left) : zero;
        PD__K(pd__store_wide)(j->y + r * width + i, v * weight + bias, left);
    }
}

/* With xhat = (x - mean) / deviation and g = dy weight: dx += (g - mean(g) - xhat mean(g xhat)) / deviation. */
static void PD__K(pd__layer_norm_back_row)(const pd__layer_norm_job *j, int64_t r) {
    const int64_t width = j->width;
    const pd_real *x = j->x + r * width, *dy = j->dy + r * width;
    const pd_real *means = j->means + 3 * r;
    const PD__W mean = PD__K(pd__all_wide)((double)means[0] + (double)means[1]), one = PD__K(pd__all_wide)(1);
    const PD__W inverse = PD__K(pd__all_wide)((double)means[2]);
    PD__W sum = PD__K(pd__all_wide)(0), dot = sum;
    for (int pass = 0; pass < 2; pass++) { /* the sums, and what is made of them */
        for (int64_t i = 0; i < width; i += PD__WIDE_LANES) {
            const int64_t left = width - i;
            const PD__W xhat = (PD__K(pd__load_wide)(x + i, left) - mean) * inverse;
            const PD__W weight = j->weight ? PD__K(pd__load_wide)(j->weight + i, left) : one;
            const PD__W g = PD__K(pd__load_wide)(dy + i, left) * weight; /* 0 beyond the row */
            pd_real *dx = j->dx + r * width + i;
            if (pass == 0) sum += g, dot += g * xhat;
            else PD__K(pd__store_wide)(dx, PD__K(pd__load_wide)(dx, left) + inverse * (g - sum - xhat * dot), left);
        }
        if (pass == 0) {
            sum = PD__K(pd__all_wide)(PD__K(pd__sum_lanes)(sum) / (double)width);
            dot = PD__K(pd__all_wide)(PD__K(pd__sum_lanes)(dot) / (double)width);
        }
    }
}

/* dweight += sum over rows of dy xhat, dbias += that of dy, in PD__COLUMNS columns */
static void PD__K(pd__layer_norm_back_columns)(const pd__layer_norm_job *j, int64_t unit) {
    enum { VECTORS = PD__COLUMNS / PD__WIDE_LANES };
    const int64_t first = unit * PD__COLUMNS, count = pd__min(PD__COLUMNS, j->width - first);
    PD__W sum[VECTORS], dot[VECTORS];
    for (int k = 0; k < VECTORS; k++) sum[k] = dot[k] = PD__K(pd__all_wide)(0);
    for (int64_t r = 0; r < j->rows; r++) {
        const pd_real *x = j->x + r * j->width + first, *dy = j->dy + r * j->width + first;
        const pd_real *means = j->means + 3 * r;
        const PD__W mean = PD__K(pd__all_wide)((double)means[0] + (double)means[1]);
        const PD__W inverse = PD__K(pd__all_wide)((double)means[2]);
        for (int64_t k = 0, i = 0; i < count; k++, i += PD__WIDE_LANES) {
            const PD__W g = PD__K(pd__load_wide)(dy + i, count - i);
            sum[k] += g;
            dot[k] += g * ((PD__K(pd__load_wide)(x + i, count - i) - mean) * inverse);
        }
    }
    for (int64_t k = 0, i = 0; i < count; k++, i += PD__WIDE_LANES) {
        const int64_t at = first + i, left = count - i;
        if (j->dweight)
            PD__K(pd__store_wide)(j->dweight + at, PD__K(pd__load_wide)(j->dweight + at, left) + dot[k], left);
        if (j->dbias) PD__K(pd__store_wide)(j->dbias + at, PD__K(pd__load_wide)(j->dbias + at, left) + sum[k], left);
    }
}

static void PD__K(pd__group_norm_one)(const pd__group_norm_job *j, int64_t group) {
    const int64_t first = group % j->groups * j->members, size = j->members * j->area;
    const pd_real *x = j->x + group * size;
    double mean, inverse = PD__K(pd__put_moments)(size, x, j->epsilon, j->moments + 3 * group, &mean);
    const PD__W center = PD__K(pd__all_wide)(mean), factor = PD__K(pd__all_wide)(inverse);
    for (int64_t c = 0; c < j->members; c++) {
        const PD__W weight = PD__K(pd__all_wide)(j->weight ? (double)j->weight[first + c] : 1);
        const PD__W bias = PD__K(pd__all_wide)(j->bias ? (double)j->bias[first + c] : 0);
        for (int64_t i = 0, at = c * j->area; i < j->area; i += PD__WIDE_LANES) {
            const PD__W v = (PD__K(pd__load_wide)(x + at + i, j->area - i) - center) * factor;
            PD__K(pd__store_wide)(j->y + group * size + at + i, v * weight + bias, j->area - i);
        }
    }
}

/* As for layer_norm. */
static void PD__K(pd__group_norm_back_one)(const pd__group_norm_job *j, int64_t group) {
    const int64_t first = group % j->groups * j->members, size = j->members * j->area;
    const pd_real *means = j->means + 3 * group;
    const PD__W mean = PD__K(pd__all_wide)((double)means[0] + (double)means[1]);
    const PD__W inverse = PD__K(pd__all_wide)((double)means[2]);
    PD__W sum = PD__K(pd__all_wide)(0), dot = sum;
    for (int64_t unit = 0; unit < 2 * j->members; unit++) { /* the sums over channels, and what is made of them */
        const int64_t c = unit % j->members, at = group * size + c * j->area;
        const PD__W weight = PD__K(pd__all_wide)(j->weight ? (double)j->weight[first + c] : 1);
        if (unit == j->members) {
            sum = PD__K(pd__all_wide)(PD__K(pd__sum_lanes)(sum) / (double)size);
            dot = PD__K(pd__all_wide)(PD__K(pd__sum_lanes)(dot) / (double)size);
        }
        for (int64_t i = 0; i < j->area; i += PD__WIDE_LANES) {
            const int64_t left = j->area - i;
            const PD__W xhat = (PD__K(pd__load_wide)(j->x + at + i, left) - mean) * inverse;
            const PD__W g = PD__K(pd__load_wide)(j->dy + at + i, left) * weight; /* 0 beyond the channel */
            pd_real *dx = j->dx + at + i;
            if (unit < j->members) sum += g, dot += g * xhat;
            else PD__K(pd__store_wide)(dx, PD__K(pd__load_wide)(dx, left) + inverse * (g - sum - xhat * dot), left);
        }
    }
}

static void PD__K(pd__group_norm_back_channel)(const pd__group_norm_job *j, int64_t channel) {
    PD__W sum = PD__K(pd__all_wide)(0), dot = sum;
    for (int64_t r = 0; r < j->rows; r++) {
        const pd_real *means = j->means + 3 * (r * j->groups + channel / j->members);
        const PD__W mean = PD__K(pd__all_wide)((double)means[0] + (double)means[1]);
        const PD__W inverse = PD__K(pd__all_wide)((double)means[2]);
        for (int64_t i = 0, at = (r * j->channels + channel) * j->area; i < j->area; i += PD__WIDE_LANES) {
            const PD__W g = PD__K(pd__load_wide)(j->dy + at + i, j->area - i);
            sum += g;
            dot += g * ((PD__K(pd__load_wide)(j->x + at + i, j->area - i) - mean) * inverse);
        }
    }
    if (j->dweight) j->dweight[channel] += (pd_real)PD__K(pd__sum_lanes)(dot);
    if (j->dbias) j->dbias[channel] += (pd_real)PD__K(pd__sum_lanes)(sum);
}

static PD__INLINE PD__V PD__K(pd__power)(PD__V x, double exponent) {
    return PD__K(pd__exp)(PD__K(pd__all)((pd_real)exponent) * PD__K(pd__log)(x));
}

static void PD__K(pd__response_strip)(const pd__response_job *j, int64_t unit) {
    int64_t at = unit / j->strips * j->channels * j->area, first = unit % j->strips * j->strip;
    int64_t end = pd__min(j->area, first + j->strip);
    const PD__V k = PD__K(pd__all)((pd_real)j->k), factor = PD__K(pd__all)((pd_real)(j->alpha / (double)j->size));
    for (int64_t c = 0; c < j->channels; c++)
        for (int64_t i = first; i < end; i += PD__LANES) {
            int64_t from = pd__max(0, c - j->size / 2), to = pd__min(j->channels, c - j->size / 2 + j->size);
            PD__V sum = PD__K(pd__all)(0), scale;
            for (int64_t o = from; o < to; o++) {
                PD__V x = PD__K(pd__load)(j->x + at + o * j->area + i, end - i);
                sum = PD__FMA(x, x, sum);
            }
            scale = PD__FMA(factor, sum, k);
            PD__K(pd__store)(j->scales + at + c * j->area + i, scale, end - i);
            sum = PD__K(pd__load)(j->x + at + c * j->area + i, end - i) * PD__K(pd__power)(scale, -j->beta);
            PD__K(pd__store)(j->y + at + c * j->area + i, sum, end - i);
        }
}

/* dx_j += dy_j s_j^-beta - 2 alpha beta / size x_j sum over the windows c that hold j of dy_c x_c s_c^(-beta - 1) */
static void PD__K(pd__response_strip_back)(const pd__response_job *j, int64_t unit) {
    int64_t at = unit / j->strips * j->channels * j->area, first = unit % j->strips * j->strip;
    int64_t end = pd__min(j->area, first + j->strip);
    const PD__V factor = PD__K(pd__all)((pd_real)(-2 * j->alpha * j->beta / (double)j->size));
    pd_real *terms = j->space + PD__THREAD_INDEX() * j->channels * j->strip;
    for (int64_t c = 0; c < j->channels; c++)
        for (int64_t i = first; i < end; i += PD__LANES) {
            int64_t place = at + c * j->area + i;
            PD__V s = PD__K(pd__load)(j->scale + place, end - i), dy = PD__K(pd__load)(j->dy + place, end - i);
            PD__V p = PD__K(pd__power)(s, -j->beta - 1), x = PD__K(pd__load)(j->x + place, end - i);
            PD__STORE(terms + c * j->strip + (i - first), dy * x * p);
            PD__K(pd__store)(j->dx + place, PD__FMA(dy, p * s, PD__K(pd__load)(j->dx + place, end - i)), end - i);
        }
    for (int64_t c = 0; c < j->channels; c++)
        for (int64_t i = first; i < end; i += PD__LANES) {
            int64_t place = at + c * j->area + i;
            int64_t from = pd__max(0, c + j->size / 2 - j->size + 1), to = pd__min(j->channels, c + j->size / 2 + 1);
            PD__V sum = PD__K(pd__all)(0), x = PD__K(pd__load)(j->x + place, end - i);
            for (int64_t o = from; o < to; o++) sum += PD__LOAD(terms + o * j->strip + (i - first));
            PD__K(pd__store)(j->dx + place, PD__FMA(factor * x, sum, PD__K(pd__load)(j->dx + place, end - i)), end - i);
        }
}

/* ---- >>kernel:gru: recurrent units ---- */

static void PD__K(pd__gru_row)(int64_t width, pd_real *gates, const pd_real *recurrent, const pd_real *before,
                               pd_real *after) {
    const PD__V one = PD__K(pd__all)(1);
    for (int64_t i = 0; i < width; i += PD__LANES) {
        const int64_t left = width - i;
        PD__V z = PD__K(pd__load)(gates + i, left) + PD__K(pd__load)(recurrent + i, left), h;
        PD__V r = PD__K(pd__load)(gates + width + i, left) + PD__K(pd__load)(recurrent + width + i, left);
        PD__V c = PD__K(pd__load)(gates + 2 * width + i, left), u = PD__K(pd__load)(recurrent + 2 * width + i, left);
        z = PD__K(pd__sigmoid)(z);
        r = PD__K(pd__sigmoid)(r);
        c = PD__K(pd__tanh)(PD__FMA(r, u, c));
        h = (one - z) * c;
        if (before) h = PD__FMA(z, PD__K(pd__load)(before + i, left), h);
        PD__K(pd__store)(gates + i, z, left);
        PD__K(pd__store)(gates + width + i, r, left);
        PD__K(pd__store)(gates + 2 * width + i, c, left);
        PD__K(pd__store)(after + i, h, left);
    }
}

static void PD__K(pd__gru_back_row)(int64_t width, pd_real *gates, pd_real *recurrent, const pd_real *before,
                                    const pd_real *dafter, pd_real *dbefore) {
    const PD__V one = PD__K(pd__all)(1), zero = PD__K(pd__all)(0);
    for (int64_t i = 0; i < width; i += PD__LANES) {
        const int64_t left = width - i;
        pd_real *gate = gates + i, *sum = recurrent + i;
        const PD__V z = PD__K(pd__load)(gate, left), r = PD__K(pd__load)(gate + width, left);
        const PD__V c = PD__K(pd__load)(gate + 2 * width, left), uc = PD__K(pd__load)(sum + 2 * width, left);
        const PD__V dh = PD__K(pd__load)(dafter + i, left), h = before ? PD__K(pd__load)(before + i, left) : zero;
        const PD__V dz = dh * (h - c) * z * (one - z), dc = dh * (one - z) * (one - c * c);
        const PD__V dr = dc * uc * r * (one - r);
        if (dbefore) PD__K(pd__store)(dbefore + i, PD__FMA(dh, z, PD__K(pd__load)(dbefore + i, left)), left);
        PD__K(pd__store)(gate, dz, left);
        PD__K(pd__store)(gate + width, dr, left);
        PD__K(pd__store)(gate + 2 * width, dc, left);
        PD__K(pd__store)(sum, dz, left);
        PD__K(pd__store)(sum + width, dr, left);
        PD__K(pd__store)(sum + 2 * width, dc * r, left);
    }
}

/* ---- >>kernel:attention: attention ---- */

static void PD__K(pd__attention_row)(const pd__attention_job *j, int64_t r) {
    const int64_t width = j->s.width, value_width = j->s.value_width, *span = j->s.spans + 3 * r;
    const int64_t count = span[1] - span[0];
    const pd_real *query = j->query + r * width, *keys = j->keys + span[0] * width;
    const pd_real *values = j->values + span[0] * value_width;
    pd_real *weights = j->weights + span[2];
    for (int64_t k = 0; k < count; k++) {
        PD__V sum = PD__K(pd__all)(0);
        pd_real lanes[PD__LANES];
        for (int64_t i = 0; i < width; i += PD__LANES) {
            const int64_t left = width - i;
            PD__V x = PD__K(pd__load)(query + i, left) + PD__K(pd__load)(keys + k * width + i, left);
            sum = PD__FMA(PD__K(pd__load)(j->v + i, left), PD__K(pd__tanh)(x), sum);
        }
        PD__STORE(lanes, sum);
        weights[k] = (pd_real)PD__K(pd__dot)(PD__LANES, lanes, NULL);
    }
    if (count > 0) PD__K(pd__softmax_row)(count, weights, weights);
    for (int64_t i = 0; i < value_width; i += PD__LANES) {
        PD__V sum = PD__K(pd__all)(0);
        for (int64_t k = 0; k < count; k++)
            sum = PD__FMA(PD__K(pd__all)(weights[k]), PD__K(pd__load)(values + k * value_width + i, value_width - i),
                          sum);
        PD__K(pd__store)(j->y + r * value_width + i, sum, value_width - i);
    }
}

/* The row's part of `space`: 1, or 0 if its dy is 0, and so all that follows from it; then the gradients of the scores.
 */
static void PD__K(pd__attention_back_row)(const pd__attention_job *j, int64_t r) {
    const int64_t width = j->s.value_width, *span = j->s.spans + 3 * r, count = span[1] - span[0];
    const pd_real *dy = j->dy + r * width, *values = j->values + span[0] * width;
    pd_real *space = j->space + r * j->per_row;
    int64_t zeros = 0;
    while (zeros < width && dy[zeros] == 0) zeros++;
    space[0] = zeros < width && count > 0;
    if (space[0] == 0) return;
    for (int64_t k = 0; k < count; k++) space[1 + k] = (pd_real)PD__K(pd__dot)(width, dy, values + k * width);
    PD__K(pd__softmax_backward_row)(count, j->a + span[2], space + 1);
}

/* With t = tanh(query + key): the scores' gradients times t sum up to that of v, and times v (1 - t^2) are those of the
   key and, summed up, of the query. */
static void PD__K(pd__attention_back_keys)(const pd__attention_job *j, int64_t unit) {
    const int64_t width = j->s.width, first = unit / j->s.rows * PD__ATTENTION_COLUMNS;
    const int64_t end = pd__min(width, first + PD__ATTENTION_COLUMNS);
    const PD__V one = PD__K(pd__all)(1);
    int64_t r = unit % j->s.rows;
    if (pd__same_keys(j, r)) return;
    do {
        const int64_t *span = j->s.spans + 3 * r, count = span[1] - span[0];
        const pd_real *space = j->space + r * j->per_row;
        for (int64_t i = first; i < end; i += PD__LANES) {
            const int64_t at = r * width + i, left = width - i;
            const PD__V v = PD__K(pd__load)(j->v + i, left), query = PD__K(pd__load)(j->query + at, left);
            PD__V dquery = PD__K(pd__all)(0), dv = dquery;
            for (int64_t k = 0; k < (space[0] != 0 ? count : 0); k++) {
                const int64_t key = (span[0] + k) * width + i;
                const PD__V t = PD__K(pd__tanh)(query + PD__K(pd__load)(j->keys + key, left));
                const PD__V score = PD__K(pd__all)(space[1 + k]), dkey = score * v * (one - t * t);
                dv = PD__FMA(score, t, dv);
                dquery += dkey;
                if (j->dkeys) PD__K(pd__store)(j->dkeys + key, PD__K(pd__load)(j->dkeys + key, left) + dkey, left);
            }
            if (j->dv) PD__K(pd__store)(j->dv + at, dv, left);
            if (j->dquery && space[0] != 0)
                PD__K(pd__store)(j->dquery + at, PD__K(pd__load)(j->dquery + at, left) + dquery, left);
        }
    } while (++r < j->s.rows && pd__same_keys(j, r));
}

static void PD__K(pd__attention_back_values)(const pd__attention_job *j, int64_t unit) {
    const int64_t width = j->s.value_width, first = unit / j->s.rows * PD__ATTENTION_COLUMNS;
    const int64_t end = pd__min(width, first + PD__ATTENTION_COLUMNS);
    int64_t r = unit % j->s.rows;
    if (pd__same_keys(j, r)) return;
    do {
        const int64_t *span = j->s.spans + 3 * r;
        if (j->space[r * j->per_row] == 0) continue;
        for (int64_t k = span[0]; k < span[1]; k++) PD__K(pd__contract_line)
        (end - first, j->a[span[2] + k - span[0]], j->dy + r * width + first, 1, NULL, 0,
         j->dvalues + k * width + first, 1);
    } while (++r < j->s.rows && pd__same_keys(j, r));
}

/* ---- >>kernel:pool: pooling: rows of a window first, then columns, a vector's outputs at a time ---- */

/* The larger number, or the sum. The maximum of anything and NaN is NaN. */
static PD__INLINE PD__V PD__K(pd__pool_join)(bool largest, PD__V a, PD__V b) {
    return largest ? PD__SELECT((b > a) | (b != b), b, a) : a + b;
}

/* Columns w .. of what the rows from `from` on have in common, `rows` of them; `around` beyond the image. `end`: of all
   images, which is as far as may be read. */
static PD__INLINE PD__V PD__K(pd__pool_rows)(const pd_pool_shape *s, const pd_real *from, const pd_real *end,
                                             int64_t rows, int64_t w, pd_real around) {
    const bool largest = s->method == PD_MAX;
    PD__V sum;
    if (w >= s->in_w) return PD__K(pd__all)(around);
    from += w;
    sum = PD__K(pd__load)(from, end - from);
    for (int64_t h = 1; h < rows; h++) {
        from += s->in_w;
        sum = PD__K(pd__pool_join)(largest, sum, PD__K(pd__load)(from, end - from));
    }
#if PD__LANES > 1
    if (s->in_w - w < PD__LANES)
        sum = PD__SELECT(PD__K(pd__first_lanes)((int)(s->in_w - w)), sum, PD__K(pd__all)(around));
#endif
    return sum;
}

/* Puts them into phases. What lies around the image are numbers that change nothing. */
static void PD__K(pd__pool_line)(const pd__pool_job *j, const pd_real *from, int64_t rows, pd_real around,
                                 pd_real *line, pd_real *phases) {
    const pd_pool_shape *s = j->s;
    const pd_real *end = j->x + s->rows * s->channels * s->in_h * s->in_w;
    pd_real *to = phases + j->lead;
    if (j->stride == 2) {
        for (int64_t w = 0; w < s->in_w; w += 2 * PD__LANES, to += PD__LANES) {
            PD__V a = PD__K(pd__pool_rows)(s, from, end, rows, w, around);
            PD__V b = PD__K(pd__pool_rows)(s, from, end, rows, w + PD__LANES, around);
            PD__STORE(to, PD__EVEN(a, b));
            PD__STORE(to + j->wide, PD__ODD(a, b));
        }
        return;
    }
    if (j->stride > 1) to = line;
    for (int64_t w = 0; w < s->in_w; w += PD__LANES)
        PD__STORE(to + w, PD__K(pd__pool_rows)(s, from, end, rows, w, around));
    for (int64_t p = 0; j->stride > 1 && p < j->phases; p++) {
        to = phases + p * j->wide + j->lead;
        for (int64_t w = p; w < s->in_w; w += j->stride) *to++ = line[w];
    }
}

static void PD__K(pd__pool_map)(const pd__pool_job *j, int64_t map) {
    const pd_pool_shape *s = j->s;
    const bool largest = s->method == PD_MAX;
    const pd_real around = largest ? -(pd_real)INFINITY : 0, *x = j->x + map * s->in_h * s->in_w;
    pd_real *y = j->out + map * s->out_h * s->out_w, *line = j->space + PD__THREAD_INDEX() * j->each;
    pd_real *all = line + j->line;
    /* Column t of a window is column ow * stride - pad + t of the image. */
    const int64_t each = j->phases * j->wide, first = j->begin - s->pad_w + j->lead * j->stride;
    for (int64_t i = 0; i < j->lines * each; i += PD__LANES) PD__STORE(all + i, PD__K(pd__all)(around));
    for (int64_t top = 0; top < s->out_h; top += j->lines) {
        const int64_t bottom = pd__min(s->out_h, top + j->lines);
        for (int64_t oh = top; oh < bottom; oh++) {
            pd__window v = pd__pool_window(s, oh, 0);
            PD__K(pd__pool_line)(j, x + v.h0 * s->in_w, v.h1 - v.h0, around, line, all + (oh - top) * each);
        }
        for (int64_t oh = top; oh < bottom; oh++, y += s->out_w) {
            for (int64_t ow = 0; ow < s->out_w; ow += PD__LANES) {
                const pd_real *from = all + (oh - top) * each + ow;
                PD__V sum = PD__K(pd__all)(around);
                for (int64_t t = j->begin, phase = first; t < j->stop; t++, phase++) {
                    if (phase >= j->phases) t += j->stride - phase, phase = 0, from++;
                    if (t < j->stop) sum = PD__K(pd__pool_join)(largest, sum, PD__LOAD(from + phase * j->wide));
                }
                PD__K(pd__store)(y + ow, sum, s->out_w - ow);
            }
            for (int64_t ow = 0; !largest && ow < s->out_w; ow++) {
                pd__window v = pd__pool_window(s, oh, ow);
                y[ow] *= pd__pool_factor(s, &v);
            }
        }
    }
}

#if PD__LANES > 1
/* Windows of 2 x 2 that cover an image whose rows are whole vectors, or halves of them: two vectors of columns, of this
   row of windows or of this and the next ones, give one of the output. */
static void PD__K(pd__pool_pairs)(const pd__pool_job *j, int64_t map, int64_t maps) {
    const pd_pool_shape *s = j->s;
    const bool largest = s->method == PD_MAX, halves = s->in_w < PD__LANES;
    const int64_t count = maps * s->out_h * s->in_w / PD__LANES; /* one image follows the other, row by row */
    const pd__window whole = { 0, 2, 0, 2 };
    const PD__V factor = PD__K(pd__all)(pd__pool_factor(s, &whole));
    const pd_real *x = j->x + map * s->in_h * s->in_w;
    pd_real *y = j->out + map * s->out_h * s->out_w;
    for (int64_t i = 0, w = 0; i < count; i += 2, y += PD__LANES) {
        PD__V sum[2] = { PD__K(pd__all)(0), PD__K(pd__all)(0) };
        for (int k = 0; k < 2 && i + k < count; k++) {
            PD__V a = PD__LOAD(x + w), b = PD__LOAD(x + w + (halves ? PD__LANES : s->in_w));
            sum[k] = halves ? PD__K(pd__pool_join)(largest, PD__LOWER(a, b), PD__UPPER(a, b))
                            : PD__K(pd__pool_join)(largest, a, b);
            w += PD__LANES;
            if (w >= s->in_w) w = 0, x += 2 * (halves ? PD__LANES : s->in_w);
        }
        sum[0] = PD__K(pd__pool_join)(largest, PD__EVEN(sum[0], sum[1]), PD__ODD(sum[0], sum[1]));
        PD__K(pd__store)(y, largest ? sum[0] : sum[0] * factor, (count - i) * PD__LANES / 2);
    }
}
#else
#define pd__pool_pairs_scalar NULL /* is not called */
#endif

static const pd__kernels
    PD__K(pd__kernels) = { PD__LANES, PD__MR, PD__NR, PD__KC, PD__MC, PD__KERNELS(PD__KERNEL_ROW) };

#undef PD__V
#undef PD__LOAD
#undef PD__STORE
#undef PD__LANES
#undef PD__MR
#undef PD__NV
#undef PD__NR
#undef PD__KC
#undef PD__MC
#undef PD__FMA
#undef PD__I
#undef PD__WI
#undef PD__W
#undef PD__SELECT
#undef PD__SELECT_WIDE
#undef PD__CONVERT
#undef PD__LANE
#undef PD__EVEN
#undef PD__ODD
#undef PD__LOWER
#undef PD__UPPER
#undef PD__PICK
#undef PD__EVERY_HALF
#undef PD__EVERY_SECOND
#undef PD__WIDE_LANES
#endif

/*
   This software is available under two licences; choose the one you like.
   -----------------------------------------------------------------------------
   Licence A - MIT

   Copyright (c) 2026 the paddle.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
   of the Software, and to permit persons to whom the Software is furnished to do
   so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all
   copies or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
   SOFTWARE.
   -----------------------------------------------------------------------------
   Licence B - Public Domain (Unlicense, www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
   ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
   WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
