/* The kernels, written once. isa.c defines ISA, TARGET, W and macros for an instruction set, and then includes this file.
 *
 * The kernels read memory as uint32 words of two bf16. Shifting the low half up, or masking it off, leaves the float32 of the same
 * value, without a conversion instruction and without flushing subnormals. A vector holds W words. "Even" elements are the low halves,
 * "odd" elements the high halves. Arithmetic works on one half of each word at a time, hash and rounding on both, in 16-bit lanes.
 *
 * SR and RTNE do not test for NaN. They round no NaN to a number, because the low 16 bits of every NaN are zero: it comes from a bf16
 * value, a canonical scalar or the processor. Only a float32 gradient may be another NaN, so it is made canonical when it is read.
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

/* Vector constants of the loop. */
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

/* The random bits for v, m and c, one draw per 16-bit lane. See _random_bits in reference.py. */
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

/* Compute the new moments, with the operations in the order of _moments in reference.py. */
INLINE void NAME(moments)(F g, F m, F v, F *mn, F *vn, const sba_scalars *s, int scaled) {
    if (scaled) g = g * s->grad_scale;
    *mn = s->beta1 * m + s->one_minus_beta1 * g;
    *vn = s->beta2 * v + s->one_minus_beta2 * (g * g);
}

INLINE F NAME(update_of)(F numerator, F root, const sba_scalars *s) {
    return numerator / (root * s->inv_sqrt_bias_correction2 + s->eps);
}

/* One element per lane, between the two stages of NAME(update): old p and c, new moments, numerator and root of the denominator, and
 * after NAME(divide) their quotient upd. */
typedef struct {
    F p, c, m, v, numerator, root, upd;
} NAME(lane);
typedef struct {
    NAME(lane) even, odd;
    NAME(draws) random;
} NAME(lanes);

#define ODD(word) ((word) & 0xffff0000u)

/* Compute the new moments, not yet rounded, and the inputs of the division. */
INLINE void NAME(begin_lane)(F g, F p, F m, F v, F c, NAME(lane) *l, const sba_scalars *s, int scaled) {
    NAME(moments)(g, m, v, &l->m, &l->v, s, scaled);
    l->root = SQRT(l->v);
    l->numerator = s->step_size * l->m;
    l->p = p;
    l->c = c;
}

/* First stage for 2 W elements of a bf16 parameter, without stores and division. */
INLINE NAME(lanes) NAME(load)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int g_is_f32, int scaled) {
    const char *g = r->g + i * (g_is_f32 ? 4 : 2);
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
    U pw = LOAD(r->p + 2 * i), mw = LOAD(r->m + 2 * i), vw = LOAD(r->v + 2 * i), cw = LOAD(r->c + 2 * i);
    NAME(lanes) l;
    NAME(begin_lane)((F)ge, (F)EVEN(pw), (F)EVEN(mw), (F)EVEN(vw), (F)EVEN(cw), &l.even, s, scaled);
    NAME(begin_lane)((F)go, (F)ODD(pw), (F)ODD(mw), (F)ODD(vw), (F)ODD(cw), &l.odd, s, scaled);
    l.random = NAME(random_bits)(gw, pw, mw, vw, cw, k);
    return l;
}

/* First stage for 2 W elements of a bf16 parameter, without the division: store m and v. */
INLINE NAME(lanes) NAME(begin)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int g_is_f32,
                               int scaled) {
    NAME(lanes) l = NAME(load)(r, i, s, k, g_is_f32, scaled);
    STORE(r->m + 2 * i, SR((U)l.even.m, (U)l.odd.m, l.random.m));
    STORE(r->v + 2 * i, SR((U)l.even.v, (U)l.odd.v, l.random.v));
    return l;
}

/* End the first stage with the division. */
INLINE void NAME(divide)(NAME(lanes) *l, const sba_scalars *s) {
    l->even.upd = NAME(update_of)(l->even.numerator, l->even.root, s);
    l->odd.upd = NAME(update_of)(l->odd.numerator, l->odd.root, s);
}

/* Return the update: minus the change of p + c. */
INLINE F NAME(change)(const NAME(lane) *l, const sba_scalars *s) { return s->lr_weight_decay * (l->p + l->c) + l->upd; }

/* Compute the new p and c as they are stored. */
INLINE void NAME(weights)(const NAME(lanes) *l, U *p, U *c, const sba_scalars *s, const NAME(constants) *k) {
    (void)k; /* only the macros of some instruction sets use it */
    F even = l->even.c - NAME(change)(&l->even, s), odd = l->odd.c - NAME(change)(&l->odd, s);
    U pn = RTNE((U)(l->even.p + even), (U)(l->odd.p + odd));
    F ce = (l->even.p - (F)EVEN(pn)) + even, co = (l->odd.p - (F)ODD(pn)) + odd;
    *p = pn;
    *c = SR((U)ce, (U)co, l->random.c);
}

/* Second stage: store p and c. */
INLINE void NAME(finish)(const NAME(lanes) *l, const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k) {
    U p, c;
    NAME(weights)(l, &p, &c, s, k);
    STORE(r->p + 2 * i, p);
    STORE(r->c + 2 * i, c);
}

/* W elements of a float32 parameter: the old p, the new moments and the update (minus the change of p). */
typedef struct {
    F p, m, v, change;
} NAME(lane_f32);

INLINE NAME(lane_f32) NAME(load_f32)(const char *p, U g, const char *m, const char *v, const sba_scalars *s, int scaled) {
    NAME(lane_f32) l = {.p = (F)LOAD(p)};
    NAME(moments)((F)g, (F)LOAD(m), (F)LOAD(v), &l.m, &l.v, s, scaled);
    l.change = s->lr_weight_decay * l.p + NAME(update_of)(s->step_size * l.m, SQRT(l.v), s);
    return l;
}

/* Read 2 W gradients of a float32 parameter as float32 bits. */
INLINE void NAME(gradients_f32)(const char *g, U *first, U *second, int g_is_f32) {
    if (g_is_f32) {
        *first = LOAD(g);
        *second = LOAD(g + 4 * W);
    } else {
        U word = LOAD(g), even = word << 16, odd = ODD(word);
        *first = ZIP_LOW(even, odd);
        *second = ZIP_HIGH(even, odd);
    }
}

/* Update W elements of a float32 parameter; the gradient is float32 bits. */
INLINE void NAME(step_f32)(char *p, U g, char *m, char *v, const sba_scalars *s, int scaled) {
    NAME(lane_f32) l = NAME(load_f32)(p, g, m, v, s, scaled);
    STORE(p, (U)(l.p - l.change));
    STORE(v, (U)l.v);
    STORE(m, (U)l.m);
}

/* Update 2 W elements of a float32 parameter, so that every kernel advances by 2 W. */
INLINE void NAME(steps_f32)(char *p, char *g, char *m, char *v, const sba_scalars *s, int g_is_f32, int scaled) {
    U first, second;
    NAME(gradients_f32)(g, &first, &second, g_is_f32);
    NAME(step_f32)(p, first, m, v, s, scaled);
    NAME(step_f32)(p + 4 * W, second, m + 4 * W, v + 4 * W, s, scaled);
}

/* Update 2 W elements of any parameter. */
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

/* The last elements of a run, padded with zeros to 2 W. */
typedef struct {
    char array[5][8 * W];
    sba_run run; /* points to the arrays */
} __attribute__((aligned(64))) NAME(tail);

/* Copy the elements of a run from i on into the tail, or `back` from it. */
INLINE void NAME(copy_tail)(NAME(tail) *t, const sba_run *r, int64_t i, int p_is_f32, int g_is_f32, int back) {
    char *end[5] = {r->p, r->g, r->m, r->v, r->c};
    for (int a = 0; a < (p_is_f32 ? 4 : 5); a++) {
        int64_t element = (a == 1 ? g_is_f32 : p_is_f32) ? 4 : 2, size = (r->count - i) * element;
        if (!back)
            memcpy(t->array[a], end[a] + i * element, size);
        else if (a != 1) /* the gradient is only read */
            memcpy(end[a] + i * element, t->array[a], size);
    }
    t->run = (sba_run){t->array[0], t->array[1], t->array[2], t->array[3], t->array[4], 2 * W};
}

/* Update the last elements of a run in padded copies, by the same code without masks. */
INLINE void NAME(update_tail)(const sba_run *r, int64_t i, const sba_scalars *s, const NAME(constants) *k, int p_is_f32, int g_is_f32,
                              int scaled) {
    NAME(tail) padded = {0};
    NAME(copy_tail)(&padded, r, i, p_is_f32, g_is_f32, 0);
    NAME(steps)(&padded.run, 0, s, k, p_is_f32, g_is_f32, scaled);
    NAME(copy_tail)(&padded, r, i, p_is_f32, g_is_f32, 1);
}

/* Update a run. The second stage of one vector runs between the two parts of the first stage of the next vector. Its work does not wait
 * for the slow root and quotient, so the out-of-order window reaches the next loads (85 % -> 90 % of the memory bandwidth). */
INLINE void NAME(update)(const sba_run *shared_run, const sba_scalars *shared, int p_is_f32, int g_is_f32, int scaled) {
    const sba_run run = *shared_run, *r = &run; /* stores cannot alias local copies, so these stay in registers */
    const sba_scalars scalars = *shared, *s = &scalars;
    const NAME(constants) constants = NAME(constants_of)(s), *k = &constants;
    int64_t i = 0, whole = r->count - r->count % (2 * W);
    if (!p_is_f32 && whole) {
        NAME(lanes) l = NAME(begin)(r, 0, s, k, g_is_f32, scaled);
        NAME(divide)(&l, s);
        for (i = 2 * W; i < whole; i += 2 * W) {
            PREFETCH(r, i, 1);
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

/* p: parameter is float32; g: gradient is float32; c: gradient is multiplied by grad_scale. */
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

/* Store the values of one element per lane. */
INLINE void NAME(store_values)(sba_values *to, int64_t i, const F x[VALUES]) {
    for (int j = 0; j < VALUES; j++) STORE(&to->value[j][i], (U)x[j]);
}

/* Return c in units of 64 ulps of p; one ulp may be subnormal. The factor is a power of two with the biased exponent 255 - p's. */
INLINE F NAME(in_64_ulps)(F p, F c) {
    U exponent = (U)p & 0x7f800000u;
    exponent += (U)(exponent == (U){0}) & 0x00800000u; /* a subnormal p has the ulp of the smallest normal number */
    return c * (F)(0x7f800000u - exponent);
}

INLINE void NAME(lane_values)(sba_values *to, int64_t i, const NAME(lane) *l, F change, F p, F c, F plain) {
    F effective = (p - l->p) + (c - l->c), in_64_ulps = NAME(in_64_ulps)(l->p, l->c);
    NAME(store_values)(to, i, (F[VALUES]){l->p + l->c, change, effective, plain - l->p, in_64_ulps, l->m, l->v});
}

INLINE void NAME(lane_values_f32)(sba_values *to, int64_t i, const NAME(lane_f32) *l) {
    F change = (l->p - l->change) - l->p;
    NAME(store_values)(to, i, (F[VALUES]){l->p, l->change, change, change, (F){0}, l->m, l->v});
}

/* Store the values of 2 W elements of a bf16 parameter, from what NAME(finish) would store. */
INLINE void NAME(finish_values)(sba_values *to, int64_t i, const NAME(lanes) *l, const sba_scalars *s, const NAME(constants) *k) {
    U p, c;
    NAME(weights)(l, &p, &c, s, k);
    F even = NAME(change)(&l->even, s), odd = NAME(change)(&l->odd, s);
    U plain = RTNE((U)(l->even.p - even), (U)(l->odd.p - odd));
    NAME(lane_values)(to, i, &l->even, even, (F)EVEN(p), (F)EVEN(c), (F)EVEN(plain));
    NAME(lane_values)(to, i + W, &l->odd, odd, (F)ODD(p), (F)ODD(c), (F)ODD(plain));
}

/* Store the values of 2 W elements of a float32 parameter. */
INLINE void NAME(values_f32)(sba_values *to, int64_t at, const sba_run *r, int64_t i, const sba_scalars *s, int g_is_f32, int scaled) {
    const char *p = r->p + 4 * i, *m = r->m + 4 * i, *v = r->v + 4 * i;
    U first, second;
    NAME(gradients_f32)(r->g + i * (g_is_f32 ? 4 : 2), &first, &second, g_is_f32);
    NAME(lane_f32) a = NAME(load_f32)(p, first, m, v, s, scaled);
    NAME(lane_f32) b = NAME(load_f32)(p + 4 * W, second, m + 4 * W, v + 4 * W, s, scaled);
    NAME(lane_values_f32)(to, at, &a);
    NAME(lane_values_f32)(to, at + W, &b);
}

/* Store the values of `count` elements from `start` on; `count` is a multiple of 2 W. The stages interleave as in NAME(update). */
INLINE void NAME(values)(sba_values *to, const sba_run *r, int64_t start, int64_t count, const sba_scalars *s, const NAME(constants) *k,
                         int p_is_f32, int g_is_f32, int scaled) {
    if (p_is_f32) {
        for (int64_t i = 0; i < count; i += 2 * W) NAME(values_f32)(to, i, r, start + i, s, g_is_f32, scaled);
        return;
    }
    NAME(lanes) l = NAME(load)(r, start, s, k, g_is_f32, scaled);
    NAME(divide)(&l, s);
    for (int64_t i = 2 * W; i < count; i += 2 * W) {
        PREFETCH(r, start + i, 0);
        NAME(lanes) next = NAME(load)(r, start + i, s, k, g_is_f32, scaled);
        NAME(finish_values)(to, i - 2 * W, &l, s, k);
        NAME(divide)(&next, s);
        l = next;
    }
    NAME(finish_values)(to, count - 2 * W, &l, s, k);
}

/* Sums of values, one per lane. */
typedef struct {
    NAME(d) dot[VALUES]; /* of EFFECTIVE and PLAIN with UPDATE, of the others with themselves */
    U updates, lost, carried;
} NAME(sums);

/* Add `count` values, a multiple of W. */
INLINE void NAME(add_values)(NAME(sums) *shared, const sba_values *from, int64_t count) {
    NAME(sums) t = *shared;
    for (int64_t i = 0; i < count; i += W) {
        F update = (F)LOAD(&from->value[UPDATE][i]), plain = (F)LOAD(&from->value[PLAIN][i]);
        U is_update = (U)(update != (F){0}), is_lost = is_update & (U)(plain == (F){0});
        t.updates -= is_update;
        t.lost -= is_lost;
        t.carried -= is_lost & (U)((F)LOAD(&from->value[EFFECTIVE][i]) != (F){0});
        for (int half = 0; half < W; half += W / 2) {
            NAME(d) x[VALUES];
            for (int j = 0; j < VALUES; j++) x[j] = WIDEN((NAME(half_f))LOAD_HALF(&from->value[j][i + half]));
            for (int j = 0; j < VALUES; j++) t.dot[j] = ADD_PRODUCT(t.dot[j], x[j], x[j == EFFECTIVE || j == PLAIN ? UPDATE : j]);
        }
    }
    *shared = t;
}

/* Store the sums of a run. One loop computes the values of a few hundred elements and a second adds them up, since a single loop would
 * need twice the available registers. The values stay in the first-level cache, and converting them to double is cheapest in a load. */
INLINE void NAME(precision)(const sba_run *r, const sba_scalars *shared, double *sums, int p_is_f32, int g_is_f32, int scaled) {
    const sba_scalars scalars = *shared, *s = &scalars;
    const NAME(constants) constants = NAME(constants_of)(s), *k = &constants;
    sba_values values;
    NAME(sums) t = {{{0}}};
    int64_t whole = r->count - r->count % (2 * W), rest = r->count - whole;
    for (int64_t start = 0; start < whole; start += SBA_VALUES) {
        int64_t count = whole - start < SBA_VALUES ? whole - start : SBA_VALUES;
        NAME(values)(&values, r, start, count, s, k, p_is_f32, g_is_f32, scaled);
        NAME(add_values)(&t, &values, count);
    }
    if (rest) {
        NAME(tail) padded = {0};
        NAME(copy_tail)(&padded, r, whole, p_is_f32, g_is_f32, 0);
        NAME(values)(&values, &padded.run, 0, 2 * W, s, k, p_is_f32, g_is_f32, scaled);
        for (int i = 0; i < 2 * W; i++) { /* clear the padding: with an eps of 0 its values are NaN */
            int element = p_is_f32 ? i : 2 * (i % W) + i / W;
            for (int j = 0; element >= rest && j < VALUES; j++) values.value[j][i] = 0;
        }
        NAME(add_values)(&t, &values, 2 * W);
    }
    memset(sums, 0, SBA_SUMS * sizeof *sums);
    sums[SBA_ELEMENTS] = r->count;
    sums[SBA_CORRECTED] = p_is_f32 ? 0 : r->count;
    for (int i = 0; i < W; i++) {
        sums[SBA_UPDATES] += t.updates[i];
        sums[SBA_LOST] += t.lost[i];
        sums[SBA_CARRIED] += t.carried[i];
    }
    for (int j = 0; j < VALUES; j++) {
        double total = 0;
        for (int i = 0; i < W / 2; i++) total += t.dot[j][i];
        sums[SBA_WEIGHT_SQ + j] = j == EFFECTIVE || j == PLAIN ? -total : j == CORRECTION ? 64 * 64 * total : total;
    }
}

#define PRECISION(p, g, c) \
    static TARGET void NAME(precision_##p##g##c)(const sba_run *r, const sba_scalars *s, double *sums) { \
        NAME(precision)(r, s, sums, p, g, c); \
    }
#define PRECISIONS(p, g) PRECISION(p, g, 0) PRECISION(p, g, 1)
PRECISIONS(0, 0)
PRECISIONS(0, 1)
PRECISIONS(1, 0)
PRECISIONS(1, 1)
#undef PRECISION
#undef PRECISIONS
#define PRECISIONS(p, g) {NAME(precision_##p##g##0), NAME(precision_##p##g##1)}

#define SQUARE_INTO(sum, bits) \
    do { \
        NAME(d) x = WIDEN((NAME(half_f))(bits)); \
        sum = ADD_PRODUCT(sum, x, x); \
    } while (0)

/* Add the squares of 32 elements to 32 fp64 lanes: the same lanes for any W, so that every instruction set sums in the same order. */
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

/* Sum the squares of a run. STREAMS equal parts are read in parallel, because the processor prefetches each of them, whereas a single
 * stream mostly waits for memory. The remainder comes last. */
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
    .precision = {{PRECISIONS(0, 0), PRECISIONS(0, 1)}, {PRECISIONS(1, 0), PRECISIONS(1, 1)}},
    .sum_sq = {NAME(sum_sq_bf16), NAME(sum_sq_f32)},
};

#undef UPDATES
#undef PRECISIONS
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
