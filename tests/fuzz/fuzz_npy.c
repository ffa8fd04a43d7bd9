/* The NumPy reader. */
#include "two_files.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_two_files(data, size, pd_npy_reader);
    return 0;
}
