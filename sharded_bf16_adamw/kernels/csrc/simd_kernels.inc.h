/* The kernels, written once. isa.c includes this file once for each instruction set, and defines ISA, TARGET, W and macros of
 * instructions before.
 *
 * The kernels read memory as uint32 words of two bf16. Shift the low half up, or mask it off, and what remains *is* the float32 of
 * the same value: no conversion instruction, and no flushing of subnormals. A vector holds W words. "Even" elements are the low
 * halves, "odd" ones the high halves. Arithmetic takes one half of each word at a time; hash and rounding take both, in 16-bit lanes.
 *
 * SR and RTNE do not guard NaN. Every NaN in these kernels has zeros in the low 16 bits of its payload, because it comes from a bf16
 * value, a canonical scalar or the processor. So neither can round a NaN up and out of the mantissa. A float32 gradient is the only
 * exception: it is made canonical when it is read.
 */
typedef uint32_t NAME(u) __attribute__((vector_size(4 * W)));
typedef uint16_t NAME(h) __attribute__((vector_size(4 * W)));
typedef int32_t NAME(i) __attribute__((vector_size(4 * W)));
typedef float NAME(f) __attribute__((vector_size(4 * W)));
typedef uint32_t NAME(u_memory) __attribute__((vector_size(4 * W), aligned(1), may_alias));
typedef uint32_t NAME(half_u) __attribute__((vector_size(2 * W)));
typedef float NAME(half_f) __attribute__((vector_size(2 * W)));
typedef uint32_t NAME(half_u_memory) __attribute__((vector_size(2 * W), aligned(1), may_alias));
typedef double NAME(d) __attribute__((vector_size(4 * W)));
#define U NAME(u)
#define F NAME(f)
#define H NAME(h)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define LOAD(address) ((U) * (const NAME(u_memory) *)(address))
#define STORE(address, x) (*(NAME(u_memory) *)(address) = (NAME(u_memory))(x))

/* Constants of the loop over 2 W elements, besides the scalars. */
typedef struct {
    H spread_m, spread_v, spread_c, mix, draw_m, draw_c, key_low, key_high; /* of the hash */
    NAME(shuffles) shuffles;
} NAME(constants);

INLINE H NAME(splat)(uint32_t x) {
    H all = (H){0} + (uint16_t)x;
    KEEP(all);
    return all;
}

INLINE NAME(constants) NAME(constants_of)(const sba_scalars *s) {
    return (NAME(constants)){
        .spread_m = NAME(splat)(SBA_SPREAD_M),
        .spread_v = NAME(splat)(SBA_SPREAD_V),
        .spread_c = NAME(splat)(SBA_SPREAD_C),
        .mix = NAME(splat)(SBA_MIX),
        .draw_m = NAME(splat)(SBA_DRAW_M),
        .draw_c = NAME(splat)(SBA_DRAW_C),
        .key_low = NAME(splat)(s->step_key),
        .key_high = NAME(splat)(s->step_key >> 16),
        .shuffles = NAME(shuffles_of)(),
    };
}

/* The random bits for v, m and c: 16 bits a 16-bit lane, for both elements of a word at once. See _random_bits in reference.py. */
typedef struct {
    U v, m, c;
} NAME(draws);

INLINE NAME(draws) NAME(random_bits)(U g, U p, U m, U v, U c, const NAME(constants) *k) {
    H x = (H)g ^ (H)m * k->spread_m ^ (H)c * k->spread_c ^ k->key_low;
    H w = (H)p ^ (H)v * k->spread_v ^ k->key_high;
    H y = x * w ^ MULTIPLY_HIGH(x, w) ^ x;
    y = (y ^ HIGH_BYTES(y) ^ k->key_high) * k->mix;
    return (NAME(draws)){(U)y, (U)(y * k->draw_m), (U)(y * k->draw_c)};
}

INLINE U NAME(canonical)(U g) {
    U nan = (U)((F)g != (F)g);
    return (g & ~nan) | (nan & 0x7fc00000u);
}

/* The new moments, with the operations in the order of _moments in reference.py. */
INLINE void NAME(moments)(F g, F m, F v, F *mn, F *vn, const sba_scalars *s, int scaled) {
    if (scaled) g = g * s->grad_scale;
    *mn = s->beta1 * m + s->one_minus_beta1 * g;
    *vn = s->beta2 * v + s->one_minus_beta2 * (g * g);
}

INLINE F NAME(update_of)(F numerator, F root, const sba_scalars *s) {
    return numerator / (root * s->inv_sqrt_bias_correction2 + s->eps);
}

/* Elements between the two stages of NAME(update): numerator and root of the denominator, then the quotient. */
typedef struct {
    F p, c, numerator, root, upd;
} NAME(lane);
typedef struct {
    NAME(lane) even, odd;
    U random; /* for the correction */
} NAME(lanes);

#define ODD(word) ((word) & 0xffff0000u)

/* Compute the new moments of one element per lane, unrounded, and the inputs of the second stage. */
INLINE void NAME(begin_lane)(F g, F p, F m, F v, F c, F *mn, F *vn, NAME(lane) *l, const sba_scalars *s, int scaled) {
    NAME(moments)(g, m, v, mn, vn, s, scaled);
    l->root = SQRT(*vn);
    l->numerator = s->step_size * *mn;
    l->p = p;
    l->c = c;
}

/* First stage for 2 W elements of a bf16 parameter: store m and v. */
INLINE NAME(lanes) NAME(begin)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int g_is_f32,
                               int scaled) {
    char *g = r->g + i * (g_is_f32 ? 4 : 2), *m = r->m + 2 * i, *v = r->v + 2 * i;
    U ge, go, gw;
    if (g_is_f32) {
        U first = LOAD(g), second = LOAD(g + 4 * W);
        U even = EVENS(first, second), odd = ODDS(first, second);
        ge = NAME(canonical)(even);
        go = NAME(canonical)(odd);
        gw = ((even >> 16 ^ even) & 0xffffu) | ODD(odd ^ odd << 16);
    } else {
        gw = LOAD(g);
        ge = EVEN(gw);
        go = ODD(gw);
    }
    U pw = LOAD(r->p + 2 * i), mw = LOAD(m), vw = LOAD(v), cw = LOAD(r->c + 2 * i);
    NAME(lanes) l;
    F me, ve, mo, vo;
    NAME(begin_lane)((F)ge, (F)EVEN(pw), (F)EVEN(mw), (F)EVEN(vw), (F)EVEN(cw), &me, &ve, &l.even, s, scaled);
    NAME(begin_lane)((F)go, (F)ODD(pw), (F)ODD(mw), (F)ODD(vw), (F)ODD(cw), &mo, &vo, &l.odd, s, scaled);
    NAME(draws) random = NAME(random_bits)(gw, pw, mw, vw, cw, k);
    l.random = random.c;
    STORE(m, SR((U)me, (U)mo, random.m));
    STORE(v, SR((U)ve, (U)vo, random.v));
    return l;
}

/* End the first stage with the division. */
INLINE void NAME(divide)(NAME(lanes) *l, const sba_scalars *s) {
    l->even.upd = NAME(update_of)(l->even.numerator, l->even.root, s);
    l->odd.upd = NAME(update_of)(l->odd.numerator, l->odd.root, s);
}

INLINE F NAME(delta)(const NAME(lane) *l, const sba_scalars *s) { return l->c - (s->lr_weight_decay * (l->p + l->c) + l->upd); }

/* Second stage: store p and c. */
INLINE void NAME(finish)(const NAME(lanes) *l, const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k) {
    (void)k; /* only the macros of some instruction sets use it */
    F even = NAME(delta)(&l->even, s), odd = NAME(delta)(&l->odd, s);
    U pn = RTNE((U)(l->even.p + even), (U)(l->odd.p + odd));
    F ce = (l->even.p - (F)EVEN(pn)) + even, co = (l->odd.p - (F)ODD(pn)) + odd;
    STORE(r->p + 2 * i, pn);
    STORE(r->c + 2 * i, SR((U)ce, (U)co, l->random));
}

/* Update W elements of a float32 parameter; the gradient is float32 bits. */
INLINE void NAME(step_f32)(char *p, U g, char *m, char *v, const sba_scalars *s, int scaled) {
    F mn, vn, p32 = (F)LOAD(p);
    NAME(moments)((F)g, (F)LOAD(m), (F)LOAD(v), &mn, &vn, s, scaled);
    F upd = NAME(update_of)(s->step_size * mn, SQRT(vn), s);
    STORE(p, (U)(p32 - (s->lr_weight_decay * p32 + upd)));
    STORE(v, (U)vn);
    STORE(m, (U)mn);
}

/* Update 2 W elements of a float32 parameter, so that every kernel advances by 2 W. */
INLINE void NAME(steps_f32)(char *p, char *g, char *m, char *v, const sba_scalars *s, int g_is_f32, int scaled) {
    U first, second;
    if (g_is_f32) {
        first = LOAD(g);
        second = LOAD(g + 4 * W);
    } else {
        U word = LOAD(g), even = word << 16, odd = ODD(word);
        first = ZIP_LOW(even, odd);
        second = ZIP_HIGH(even, odd);
    }
    NAME(step_f32)(p, first, m, v, s, scaled);
    NAME(step_f32)(p + 4 * W, second, m + 4 * W, v + 4 * W, s, scaled);
}

/* Update 2 W elements of any parameter, both stages. */
INLINE void NAME(steps)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int p_is_f32, int g_is_f32,
                        int scaled) {
    if (p_is_f32) {
        NAME(steps_f32)(r->p + 4 * i, r->g + i * (g_is_f32 ? 4 : 2), r->m + 4 * i, r->v + 4 * i, s, g_is_f32, scaled);
        return;
    }
    NAME(lanes) l = NAME(begin)(r, i, s, k, g_is_f32, scaled);
    NAME(divide)(&l, s);
    NAME(finish)(&l, r, i, s, k);
}

/* Update the last elements of a run in padded copies: the same code, no masks. */
INLINE void NAME(update_tail)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int p_is_f32, int g_is_f32,
                              int scaled) {
    char buffer[5][8 * W] __attribute__((aligned(64))) = {{0}};
    char *end[5] = {r->p, r->g, r->m, r->v, r->c};
    int64_t size[5];
    for (int a = 0; a < (p_is_f32 ? 4 : 5); a++) {
        int64_t element = (a == 1 ? g_is_f32 : p_is_f32) ? 4 : 2;
        end[a] += i * element;
        size[a] = (r->count - i) * element;
        memcpy(buffer[a], end[a], size[a]);
    }
    sba_run padded = {buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], 2 * W};
    NAME(steps)(&padded, 0, s, k, p_is_f32, g_is_f32, scaled);
    for (int a = 0; a < (p_is_f32 ? 4 : 5); a++)
        if (a != 1) memcpy(end[a], buffer[a], size[a]); /* the gradient is only read */
}

/* The second stage of one vector runs between the two parts of the first stage of the next. This fills the long latency of a root and
 * a quotient with work that needs neither, and the processor's window reaches the next loads (85 % -> 90 % of the memory bandwidth). */
INLINE void NAME(update)(const sba_run *shared_run, const sba_scalars *shared, int p_is_f32, int g_is_f32, int scaled) {
    const sba_run run = *shared_run, *r = &run; /* local copies cannot alias the stores, so they stay in registers */
    const sba_scalars scalars = *shared, *s = &scalars;
    const NAME(constants) constants = NAME(constants_of)(s), *k = &constants;
    int64_t i = 0, whole = r->count - r->count % (2 * W);
    if (!p_is_f32 && whole) {
        NAME(lanes) l = NAME(begin)(r, 0, s, k, g_is_f32, scaled);
        NAME(divide)(&l, s);
        for (i = 2 * W; i < whole; i += 2 * W) {
            PREFETCH(r, i);
            NAME(lanes) next = NAME(begin)(r, i, s, k, g_is_f32, scaled);
            NAME(finish)(&l, r, i - 2 * W, s, k);
            NAME(divide)(&next, s);
            l = next;
        }
        NAME(finish)(&l, r, i - 2 * W, s, k);
    }
    for (; i < whole; i += 2 * W) NAME(steps)(r, i, s, k, p_is_f32, g_is_f32, scaled);
    if (i < r->count) NAME(update_tail)(r, i, s, k, p_is_f32, g_is_f32, scaled);
}

/* p: parameter is float32; g: gradient is float32; c: multiply it by grad_scale. */
#define UPDATE(p, g, c) \
    static TARGET void NAME(update_##p##g##c)(const sba_run *r, const sba_scalars *s) { NAME(update)(r, s, p, g, c); }
#define UPDATES(p, g) UPDATE(p, g, 0) UPDATE(p, g, 1)
UPDATES(0, 0)
UPDATES(0, 1)
UPDATES(1, 0)
UPDATES(1, 1)
#undef UPDATE
#undef UPDATES
#define UPDATES(p, g) {NAME(update_##p##g##0), NAME(update_##p##g##1)}

#define HALF NAME(half_u)
#define LOAD_HALF(address) ((HALF) * (const NAME(half_u_memory) *)(address))
#define SQUARE_INTO(sum, bits) \
    do { \
        NAME(d) x = WIDEN((NAME(half_f))(bits)); \
        sum = ADD_SQUARE(sum, x); \
    } while (0)

/* Add the squares of 32 elements to 32 fp64 lanes, for any W, so that every instruction set sums in the same order. The product of two
 * float32 is exact in double, so a fused multiply-add gives the same bits as a product and a sum. */
INLINE void NAME(squares)(const char *x, NAME(d) lane[2][32 / W], int is_f32) {
    for (int k = 0; k < 32 / W; k++) {
        HALF a, b;
        if (is_f32) {
            HALF first = LOAD_HALF(x + 4 * W * k), second = LOAD_HALF(x + 4 * W * k + 2 * W);
            a = HALF_EVENS(first, second);
            b = HALF_ODDS(first, second);
        } else {
            HALF word = LOAD_HALF(x + 2 * W * k);
            a = word << 16;
            b = word & 0xffff0000u;
        }
        SQUARE_INTO(lane[0][k], a);
        SQUARE_INTO(lane[1][k], b);
    }
}

/* Sum a run as STREAMS equal parts in parallel: the processor prefetches for each, whereas a single stream mostly waits for memory. The
 * remainder comes last. */
INLINE double NAME(sum_sq)(const char *x, int64_t count, int is_f32) {
    NAME(d) lane[2][32 / W] = {{{0}}};
    const int64_t size = is_f32 ? 4 : 2, part = count / (32 * STREAMS) * 32, tail = count % 32;
    for (int64_t i = 0; i < part; i += 32) {
        int64_t next_run = i * size + AHEAD < part * size ? 0 : (STREAMS - 1) * part * size; /* the next run starts after the last part */
        for (int k = 0; k < STREAMS; k++) {
            const char *at = x + (k * part + i) * size;
            __builtin_prefetch(at + AHEAD + next_run);
            NAME(squares)(at, lane, is_f32);
        }
    }
    for (int64_t i = STREAMS * part; i < count - tail; i += 32) NAME(squares)(x + i * size, lane, is_f32);
    if (tail) {
        char buffer[128] __attribute__((aligned(64))) = {0};
        memcpy(buffer, x + (count - tail) * size, tail * size);
        NAME(squares)(buffer, lane, is_f32);
    }
    double sums[32], total = 0;
    memcpy(sums, lane, sizeof sums);
    for (int k = 0; k < 32; k++) total += sums[k];
    return total;
}

static TARGET double NAME(sum_sq_bf16)(const char *x, int64_t count) { return NAME(sum_sq)(x, count, 0); }
static TARGET double NAME(sum_sq_f32)(const char *x, int64_t count) { return NAME(sum_sq)(x, count, 1); }

static const sba_kernels NAME(kernels) = {
    .update = {{UPDATES(0, 0), UPDATES(0, 1)}, {UPDATES(1, 0), UPDATES(1, 1)}},
    .sum_sq = {NAME(sum_sq_bf16), NAME(sum_sq_f32)},
};

#undef UPDATES
#undef U
#undef F
#undef H
#undef INLINE
#undef LOAD
#undef STORE
#undef ODD
#undef HALF
#undef LOAD_HALF
#undef SQUARE_INTO
