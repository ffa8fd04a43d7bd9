/* The AVX-512 kernels on a machine that has only AVX2: a 64-byte vector is two of 32 bytes. gcc splits its own vectors by
   itself; here are the few intrinsics. The Makefile includes this in front and takes avx512f out of the header's target,
   and of what it asks of the processor, so that everything but the instructions themselves is tested. */
#ifndef PADDLE_TESTS_WIDE_H
#define PADDLE_TESTS_WIDE_H

#include <immintrin.h>

#define WIDE static inline __attribute__((always_inline, target("avx2,fma")))
typedef union wide_ps {
    __m512 whole;
    __m256 half[2];
} wide_ps;
typedef union wide_pd {
    __m512d whole;
    __m256d half[2];
} wide_pd;

WIDE __m512 wide_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    wide_ps x = { a }, y = { b }, z = { c };
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
}
WIDE __m512d wide_fmadd_pd(__m512d a, __m512d b, __m512d c) {
    wide_pd x = { a }, y = { b }, z = { c };
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_pd(x.half[i], y.half[i], z.half[i]);
    return z.whole;
}
WIDE __m512d wide_cvtps_pd(__m256 a) {
    wide_pd z;
    z.half[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    z.half[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    return z.whole;
}
WIDE __m512d wide_sqrt_pd(__m512d a) {
    wide_pd z = { a };
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_sqrt_pd(z.half[i]);
    return z.whole;
}
#undef WIDE
/* The library's masks take all lanes. */
#define _mm512_fmadd_ps wide_fmadd_ps
#define _mm512_fmadd_pd wide_fmadd_pd
#define _mm512_maskz_cvtps_pd(mask, a) wide_cvtps_pd(a)
#define _mm512_maskz_sqrt_pd(mask, a) wide_sqrt_pd(a)

#endif
