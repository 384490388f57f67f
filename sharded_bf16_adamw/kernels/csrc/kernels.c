/* Includes the kernel body once for each instruction set that the compiler's target may have, and says which of them run here. */
#include <math.h>
#include <string.h>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(ISA, x)
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(type, a, b, ...) ((type)__builtin_shufflevector(a, b, __VA_ARGS__))
#else
#define SHUFFLE(type, a, b, ...) ((type)__builtin_shuffle(a, b, (type){__VA_ARGS__}))
#endif
#define EVENS_2 0, 2
#define ODDS_2 1, 3
#define EVENS_4 0, 2, 4, 6
#define ODDS_4 1, 3, 5, 7
#define ZIP_LOW_4 0, 4, 1, 5
#define ZIP_HIGH_4 2, 6, 3, 7
#define EVENS_8 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS_8 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_LOW_8 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH_8 4, 12, 5, 13, 6, 14, 7, 15
#define EVENS_16 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS_16 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_LOW_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define SHUFFLED(order, a, b) SHUFFLE(NAME(u), a, b, order)
#define SHUFFLED_HALF(order, a, b) SHUFFLE(NAME(half_u), a, b, order)
#define EVENS(a, b) SHUFFLED(JOIN(EVENS, W), a, b)
#define ODDS(a, b) SHUFFLED(JOIN(ODDS, W), a, b)
#define ZIP_LOW(a, b) SHUFFLED(JOIN(ZIP_LOW, W), a, b)
#define ZIP_HIGH(a, b) SHUFFLED(JOIN(ZIP_HIGH, W), a, b)
#define HALF_EVENS(a, b) SHUFFLED_HALF(JOIN(EVENS, HALF_W), a, b)
#define HALF_ODDS(a, b) SHUFFLED_HALF(JOIN(ODDS, HALF_W), a, b)

#ifndef AHEAD
#define AHEAD 1024 /* bytes: hardware prefetchers alone, which stop at each page, leave 20 % of the memory's speed unused */
#endif
#define PREFETCH(r, i) \
    do { \
        __builtin_prefetch((r)->p + 2 * (i) + AHEAD, 1); \
        __builtin_prefetch((r)->m + 2 * (i) + AHEAD, 1); \
        __builtin_prefetch((r)->v + 2 * (i) + AHEAD, 1); \
        __builtin_prefetch((r)->c + 2 * (i) + AHEAD, 1); \
        __builtin_prefetch((r)->g + 2 * (i) + AHEAD); \
    } while (0)

/* Baseline: what every processor of the target has. EVEN: the low halves of words, shifted up. HIGH, MIDDLE: the high and the middle
 * 16 bits. PACK: words of the high halves of two vectors. WIDEN: float to double. ADD_SQUARE: add x * x. */
#define ISA baseline
#define TARGET
#define W 4
#define HALF_W 2
#define EVEN(x) ((x) << 16)
#define HIGH(x) ((x) >> 16)
#define MIDDLE(x) ((x) >> 8 & 0xffffu)
#define PACK(even, odd) ((even) >> 16 | ((odd) & 0xffff0000u))
#define WIDEN(x) __builtin_convertvector(x, NAME(d))
#define ADD_SQUARE(sum, x) ((sum) + (x) * (x))
#if defined(__x86_64__)
#define SQRT(x) ((baseline_f)_mm_sqrt_ps((__m128)(x)))
#elif defined(__aarch64__)
#define SQRT(x) ((baseline_f)vsqrtq_f32((float32x4_t)(x)))
#else
#define SQRT(x) ((baseline_f){sqrtf((x)[0]), sqrtf((x)[1]), sqrtf((x)[2]), sqrtf((x)[3])})
#endif
#include "body.h"

#if defined(__x86_64__)
#undef ISA
#undef TARGET
#undef W
#undef HALF_W
#undef SQRT
#undef PACK
#undef WIDEN
#undef ADD_SQUARE
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define W 8
#define HALF_W 4
#define SQRT(x) ((avx2_f)_mm256_sqrt_ps((__m256)(x)))
#define PACK(even, odd) ((avx2_u)_mm256_blend_epi16((__m256i)((even) >> 16), (__m256i)(odd), 0xaa))
#define WIDEN(x) ((avx2_d)_mm256_cvtps_pd((__m128)(x)))
#define ADD_SQUARE(sum, x) ((avx2_d)_mm256_fmadd_pd((__m256d)(x), (__m256d)(x), (__m256d)(sum)))
#include "body.h"

/* On 512 bits only two ports compute, and shifts may use but one of them: byte shuffles, which use the other, share the load. */
#undef ISA
#undef TARGET
#undef W
#undef HALF_W
#undef SQRT
#undef EVEN
#undef HIGH
#undef MIDDLE
#undef PACK
#undef WIDEN
#undef ADD_SQUARE
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define W 16
#define HALF_W 8
#define SQRT(x) ((avx512_f)_mm512_sqrt_ps((__m512)(x)))
#define LANES(a, b, c, d) \
    _mm512_broadcast_i32x4( \
        _mm_setr_epi8(a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12))
#define BYTES(x, lanes) ((avx512_u)_mm512_shuffle_epi8((__m512i)(x), lanes))
#define NONE -128 /* plus any lane's offset: a byte of zeros */
#define EVEN(x) BYTES(x, LANES(NONE, NONE, 0, 1))
#define HIGH(x) BYTES(x, LANES(2, 3, NONE, NONE))
#define MIDDLE(x) BYTES(x, LANES(1, 2, NONE, NONE))
#define PACK(even, odd) \
    ((avx512_u)_mm512_mask_shuffle_epi8((__m512i)(odd), 0x3333333333333333u, (__m512i)(even), LANES(2, 3, NONE, NONE)))
#define WIDEN(x) ((avx512_d)_mm512_cvtps_pd((__m256)(x)))
#define ADD_SQUARE(sum, x) ((avx512_d)_mm512_fmadd_pd((__m512d)(x), (__m512d)(x), (__m512d)(sum)))
#include "body.h"
#endif

const sba_kernels *sba_kernels_of(int isa) {
    if (isa == SBA_BASELINE) return &baseline_kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == SBA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels;
    if (isa == SBA_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512_kernels;
#endif
    return 0;
}
