/* What a test may ask of CUDA on the CPU (cuda_on_cpu.h): orders, faults and counts. C and C++. */
#ifndef CUDA_ON_CPU_CONTROL_H
#define CUDA_ON_CPU_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The order of threads between two barriers, of blocks, and of the work in streams. FORWARD: lowest first, work done
   when it is enqueued. REVERSE: highest first, work done as late as is allowed. RANDOM, the default: by the seed. */
typedef enum { CUDA_ON_CPU_RANDOM, CUDA_ON_CPU_FORWARD, CUDA_ON_CPU_REVERSE } cuda_on_cpu_order;
void cuda_on_cpu_set_order(cuda_on_cpu_order order); /* environment: CUDA_ON_CPU_ORDER=random, forward or reverse */
void cuda_on_cpu_set_seed(uint64_t seed);            /* environment: CUDA_ON_CPU_SEED, by default 1 */

/* The n-th call from now (1: the next) of this kind fails, once. MALLOC is out of memory and counts cudaMalloc,
   cudaMallocAsync and pinned host memory; COPY counts the memcpys; CUBLAS all calls that compute; SYNC those that wait
   (stream, device, event). A sticky fault is an illegal address: the call itself still succeeds if it is a launch or
   asynchronous copy, and whatever comes after it fails with cudaErrorIllegalAddress.
   environment: CUDA_ON_CPU_FAIL=malloc:3,launch:5:sticky */
typedef enum {
    CUDA_ON_CPU_MALLOC,
    CUDA_ON_CPU_LAUNCH,
    CUDA_ON_CPU_COPY,
    CUDA_ON_CPU_CUBLAS,
    CUDA_ON_CPU_SYNC,
    CUDA_ON_CPU_KINDS
} cuda_on_cpu_kind;
void cuda_on_cpu_fail(cuda_on_cpu_kind kind, int64_t n, int sticky);

/* Counts since the start or the last reset; `live` ones are of what exists now. */
typedef struct {
    int64_t calls[CUDA_ON_CPU_KINDS]; /* by kind, those that failed too */
    int64_t bytes_to_device, bytes_to_host, bytes_on_device, bytes_between_devices;
    int64_t pageable_copies;                          /* of those between host and device: not pinned, so slow */
    int64_t live_allocations, live_bytes, peak_bytes; /* of device memory; peak since the last reset */
    int64_t live_host_allocations, live_streams, live_events, live_handles;
} cuda_on_cpu_counts;
cuda_on_cpu_counts cuda_on_cpu_count(void);

/* Prints what was not freed to stderr and gives the number of such things (allocations, streams, events, handles). */
int64_t cuda_on_cpu_leaks(void);

/* As the program started: all memory, streams, events, errors, faults and counts are gone; order, seed and devices are
   taken from the environment again. */
void cuda_on_cpu_reset(void);

/* Devices 0..n-1, each with this much memory (0: as it is); call it when nothing is allocated.
   environment: CUDA_ON_CPU_DEVICES, by default 1; CUDA_ON_CPU_BYTES, by default 1 GiB */
void cuda_on_cpu_set_devices(int n, size_t bytes_of_each);

#ifdef __cplusplus
}
#endif
#endif
