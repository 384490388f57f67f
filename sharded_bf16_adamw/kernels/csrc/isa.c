/* The kernels of every instruction set that the target may support. simd_kernels.inc.h is included once for each. */
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

#define AHEAD 2048 /* prefetch distance in bytes. Hardware prefetchers stop at each page, which costs 20 % of the memory bandwidth */
#define STREAMS 8  /* parts that a sum of squares reads in parallel: 40 % faster than one for gradients that are not in a cache */
#define PREFETCH(r, i, write) \
    do { \
        __builtin_prefetch((r)->p + 2 * (i) + AHEAD, write); \
        __builtin_prefetch((r)->m + 2 * (i) + AHEAD, write); \
        __builtin_prefetch((r)->v + 2 * (i) + AHEAD, write); \
        __builtin_prefetch((r)->c + 2 * (i) + AHEAD, write); \
        __builtin_prefetch((r)->g + 2 * (i) + AHEAD); \
    } while (0)

/* The values of an element for precision_stats. The sum of value i has the index SBA_WEIGHT_SQ + i. */
enum { WEIGHT, UPDATE, EFFECTIVE, PLAIN, CORRECTION, FIRST, SECOND, VALUES };
#define SBA_VALUES 256 /* elements in a buffer */
typedef struct {
    float value[VALUES][SBA_VALUES] __attribute__((aligned(64)));
} sba_values;

/* Baseline: instructions that every processor of the target supports. The macros of an instruction set:
 *
 * EVEN           low halves of words, shifted up
 * PACK           words from the high halves of two vectors
 * MULTIPLY_HIGH  high half of the product of 16-bit lanes
 * HIGH_BYTES     high byte of each 16-bit lane, shifted down
 * RTNE, SR       words of bf16, rounded from two vectors of float32 bits. SR rounds up where the low half exceeds the 16 random bits.
 *                Adding their complement carries exactly there
 * WIDEN          float to double
 * ADD_PRODUCT    sum + x * y
 * KEEP           keep a vector in a register, since compilers may rebuild it from immediates in every iteration */
#define ISA baseline
#define TARGET
#define W 4
#define HALF_W 2
#define EVEN(x) ((x) << 16)
#define HIGH_BYTES(x) ((x) >> 8)
#define PACK(even, odd) ((even) >> 16 | ((odd) & 0xffff0000u))
#define NEAREST(x) (((x) | ((x) >> 16 & 1u)) + 0x7fffu) /* the last kept bit as a sticky bit breaks ties to even */
#define RTNE(even, odd) PACK(NEAREST(even), NEAREST(odd))
#define SR(even, odd, random) PACK((even) + (~(random) & 0xffffu), (odd) + (~(random) >> 16))
#define WIDEN(x) __builtin_convertvector(x, NAME(d))
#define ADD_PRODUCT(sum, x, y) ((sum) + (x) * (y))
#define KEEP(x)
typedef struct {
    char unused;
} no_shuffles;
static inline no_shuffles no_shuffles_of(void) { return (no_shuffles){0}; }
#define baseline_shuffles no_shuffles
#define baseline_shuffles_of no_shuffles_of
#if defined(__x86_64__)
#define SQRT(x) ((baseline_f)_mm_sqrt_ps((__m128)(x)))
#define MULTIPLY_HIGH(x, y) ((baseline_h)_mm_mulhi_epu16((__m128i)(x), (__m128i)(y)))
#elif defined(__aarch64__)
#define SQRT(x) ((baseline_f)vsqrtq_f32((float32x4_t)(x)))
#define MULTIPLY_HIGH(x, y) \
    ((baseline_h)vuzp2q_u16((uint16x8_t)vmull_u16(vget_low_u16((uint16x8_t)(x)), vget_low_u16((uint16x8_t)(y))), \
                            (uint16x8_t)vmull_high_u16((uint16x8_t)(x), (uint16x8_t)(y))))
#else
#define SQRT(x) ((baseline_f){sqrtf((x)[0]), sqrtf((x)[1]), sqrtf((x)[2]), sqrtf((x)[3])})
#define HIGH_OF(x, y, i) ((uint32_t)(x)[i] * (y)[i] >> 16)
#define MULTIPLY_HIGH(x, y) \
    ((baseline_h){HIGH_OF(x, y, 0), HIGH_OF(x, y, 1), HIGH_OF(x, y, 2), HIGH_OF(x, y, 3), HIGH_OF(x, y, 4), HIGH_OF(x, y, 5), \
                  HIGH_OF(x, y, 6), HIGH_OF(x, y, 7)})
#endif
#include "simd_kernels.inc.h"

#if defined(__x86_64__)
#undef ISA
#undef TARGET
#undef W
#undef HALF_W
#undef SQRT
#undef MULTIPLY_HIGH
#undef PACK
#undef WIDEN
#undef ADD_PRODUCT
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define W 8
#define HALF_W 4
#define avx2_shuffles no_shuffles
#define avx2_shuffles_of no_shuffles_of
#define SQRT(x) ((avx2_f)_mm256_sqrt_ps((__m256)(x)))
#define MULTIPLY_HIGH(x, y) ((avx2_h)_mm256_mulhi_epu16((__m256i)(x), (__m256i)(y)))
#define PACK(even, odd) ((avx2_u)_mm256_blend_epi16((__m256i)((even) >> 16), (__m256i)(odd), 0xaa))
#define WIDEN(x) ((avx2_d)_mm256_cvtps_pd((__m128)(x)))
#define ADD_PRODUCT(sum, x, y) ((avx2_d)_mm256_fmadd_pd((__m256d)(x), (__m256d)(y), (__m256d)(sum)))
#include "simd_kernels.inc.h"

/* 512-bit instructions execute on two ports, and shifts, roots and quotients all need the same one. Byte shuffles use the other port, so
 * they replace shifts. Both roundings compare 16-bit lanes, and subtract -1 where they round up. */
#undef ISA
#undef TARGET
#undef W
#undef HALF_W
#undef SQRT
#undef MULTIPLY_HIGH
#undef EVEN
#undef HIGH_BYTES
#undef PACK
#undef NEAREST
#undef RTNE
#undef SR
#undef WIDEN
#undef ADD_PRODUCT
#undef KEEP
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define W 16
#define HALF_W 8
#define KEEP(x) __asm__("" : "+v"(x))
typedef struct {
    __m512i up, down, bytes_down; /* shuffles that move halves of words up or down, or high bytes of halves down, and fill with zeros */
    __m512i one, half, minus_one; /* in 16-bit lanes: 1, 0x8000, -1 */
    __mmask64 low, high;          /* the bytes of the low halves, of the high halves */
} avx512_shuffles;
static inline __attribute__((always_inline)) TARGET avx512_shuffles avx512_shuffles_of(void) {
    const __m512i word = _mm512_broadcast_i32x4(_mm_setr_epi32(0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c));
    avx512_shuffles s = {
        .up = _mm512_or_si512(word, _mm512_set1_epi32(0x01008080)), /* 0x80 gives a zero byte */
        .down = _mm512_or_si512(word, _mm512_set1_epi32((int)0x80800302)),
        .bytes_down = _mm512_or_si512(word, _mm512_set1_epi32((int)0x80038001)),
        .one = _mm512_set1_epi16(1),
        .half = _mm512_set1_epi16(-0x8000),
        .minus_one = _mm512_set1_epi16(-1),
        .low = 0x3333333333333333u,
        .high = 0xccccccccccccccccu,
    };
    KEEP(s.up);
    KEEP(s.down);
    KEEP(s.bytes_down);
    KEEP(s.one);
    KEEP(s.half);
    KEEP(s.minus_one);
    __asm__("" : "+k"(s.low), "+k"(s.high));
    return s;
}
#define SQRT(x) ((avx512_f)_mm512_sqrt_ps((__m512)(x)))
#define MULTIPLY_HIGH(x, y) ((avx512_h)_mm512_mulhi_epu16((__m512i)(x), (__m512i)(y)))
#define EVEN(x) ((avx512_u)_mm512_shuffle_epi8((__m512i)(x), k->shuffles.up))
#define HIGH_BYTES(x) ((avx512_h)_mm512_shuffle_epi8((__m512i)(x), k->shuffles.bytes_down))
static inline __attribute__((always_inline)) TARGET __m512i avx512_kept(__m512i even, __m512i odd, const avx512_shuffles *s) {
    return _mm512_mask_shuffle_epi8(odd, s->low, even, s->down);
}
static inline __attribute__((always_inline)) TARGET __m512i avx512_discarded(__m512i even, __m512i odd, const avx512_shuffles *s) {
    return _mm512_mask_shuffle_epi8(even, s->high, odd, s->up);
}
static inline __attribute__((always_inline)) TARGET __m512i avx512_sr(__m512i even, __m512i odd, __m512i random,
                                                                     const avx512_shuffles *s) {
    __m512i kept = avx512_kept(even, odd, s);
    __mmask32 up = _mm512_cmpgt_epu16_mask(avx512_discarded(even, odd, s), random);
    return _mm512_mask_sub_epi16(kept, up, kept, s->minus_one);
}
static inline __attribute__((always_inline)) TARGET __m512i avx512_rtne(__m512i even, __m512i odd, const avx512_shuffles *s) {
    __m512i kept = avx512_kept(even, odd, s);
    __m512i least = _mm512_ternarylogic_epi32(kept, s->one, s->half, 0xae); /* ~kept & 1 | 0x8000: a tie rounds up only if kept is odd */
    __mmask32 up = _mm512_cmpge_epu16_mask(avx512_discarded(even, odd, s), least);
    return _mm512_mask_sub_epi16(kept, up, kept, s->minus_one);
}
#define SR(even, odd, random) ((avx512_u)avx512_sr((__m512i)(even), (__m512i)(odd), (__m512i)(random), &k->shuffles))
#define RTNE(even, odd) ((avx512_u)avx512_rtne((__m512i)(even), (__m512i)(odd), &k->shuffles))
#define WIDEN(x) ((avx512_d)_mm512_cvtps_pd((__m256)(x)))
#define ADD_PRODUCT(sum, x, y) ((avx512_d)_mm512_fmadd_pd((__m512d)(x), (__m512d)(y), (__m512d)(sum)))
#include "simd_kernels.inc.h"
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
