/* What the fuzz targets share: bytes as a file, and reading one to its end. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create */
#endif
#include <stdio.h>
#include <sys/mman.h>

#define PADDLE_IMPLEMENTATION
#include "paddle.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The path of a file in memory that holds these bytes; `which` 0 .. 3 are different files, each used again. */
static inline const char *fuzz_file(int which, const uint8_t *data, size_t size) {
    static int files[4];
    static char paths[4][64];
    if (!files[which]) {
        files[which] = memfd_create("fuzz", 0);
        if (files[which] < 0) abort();
        snprintf(paths[which], sizeof paths[which], "/proc/self/fd/%d", files[which]);
    }
    if (ftruncate(files[which], 0) != 0 || pwrite(files[which], data, size, 0) != (ssize_t)size) abort();
    return paths[which];
}

/* Takes one byte of choices off the input; 0 when there is none left. */
static inline unsigned fuzz_byte(const uint8_t **data, size_t *size) {
    if (*size == 0) return 0;
    --*size;
    return *(*data)++;
}

/* Touches every number and id, so that the sanitizers see memory that is not there. The ids' range is checked. */
static inline double fuzz_walk(const pd_batch *batch) {
    double sum = 0;
    for (int k = 0; k < batch->slot_count; k++) {
        const pd_slot *slot = &batch->slots[k];
        if (!slot->sequence && slot->rows != batch->samples) abort();
        if (slot->sequence && slot->starts && slot->starts[batch->samples] != slot->rows) abort();
        for (int64_t i = 0; slot->kind == PD_SLOT_DENSE && i < slot->rows * slot->width; i++)
            sum += (double)slot->data[i];
        int64_t ids = slot->kind == PD_SLOT_SPARSE ? slot->row_starts[slot->rows] : slot->rows;
        for (int64_t i = 0; slot->kind == PD_SLOT_SPARSE && i < ids; i++) sum += (double)slot->values[i];
        for (int64_t i = 0; slot->kind != PD_SLOT_DENSE && i < ids; i++) {
            if (slot->ids[i] < 0 || slot->ids[i] >= slot->width) abort();
            sum += (double)slot->ids[i];
        }
    }
    return sum;
}

/* Reads one pass in batches of `count`, goes on after up to 50 bad samples, and returns the number of good ones. A
   status that goes with no message is a bug. */
static inline int64_t fuzz_pass(pd_net *net, pd_reader *reader, int64_t pass, int64_t count) {
    pd_batch *batch = pd_batch_new(net);
    int64_t samples = 0;
    pd_status status = reader->reset(reader, pass);
    if (!batch) abort();
    for (int bad = 0; bad < 50 && status != PD_END;) {
        pd_batch_clear(batch);
        status = reader->next(reader, batch, count);
        samples += batch->samples;
        fuzz_walk(batch);
        if (batch->samples > count || (status == PD_OK && batch->samples != count)) abort();
        if (status != PD_OK && status != PD_END) {
            bad++;
            if (reader->error.text[0] == 0 || reader->error.status != status) abort();
        }
    }
    pd_batch_free(batch);
    return samples;
}

/* The whole life of a reader: two passes with other batch sizes must give the same number of samples. Frees it. */
static inline void fuzz_reader(pd_net *net, pd_reader *reader) {
    if (!reader) {
        if (pd_error(net)[0] == 0) abort();
        return;
    }
    int64_t first = fuzz_pass(net, reader, 0, 3), second = fuzz_pass(net, reader, 1, 3);
    if (first != second) abort();
    if (reader->size && reader->size(reader) < -1) abort();
    pd_reader_free(reader);
}
