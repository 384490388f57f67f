/* The exported functions: one multi-tensor step, one multi-tensor sum of squares and the memory traffic of both. See cpu.py. */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PIECES_AHEAD 4 /* to prefetch */
#define STEPS_AHEAD 16 /* likewise */
#define SMALL (2 * SBA_PIECE) /* elements below which waking a helper costs more than it gains */

/* The rule knows IEEE arithmetic only. torch.set_flush_denormal and others change a thread's mode, so each thread that computes sets
 * the default mode first and gives the old one back. */
#if defined(__x86_64__)
typedef unsigned fp_mode;
static fp_mode enter_ieee(void) {
    fp_mode old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}
static void leave_ieee(fp_mode old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t fp_mode;
static fp_mode enter_ieee(void) {
    fp_mode old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" ::"r"((fp_mode)0) : "memory");
    return old;
}
static void leave_ieee(fp_mode old) { __asm__ volatile("msr fpcr, %0" ::"r"(old) : "memory"); }
#else
typedef int fp_mode;
static fp_mode enter_ieee(void) { return 0; }
static void leave_ieee(fp_mode old) { (void)old; }
#endif

int sba_plan_make(sba_plan *plan, const int64_t *numel, int64_t tensors) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < tensors; i++) pieces += (numel[i] + SBA_PIECE - 1) / SBA_PIECE;
    plan->pieces = plan->chunks = 0;
    plan->piece = malloc((pieces + 1) * sizeof *plan->piece);
    plan->chunk = malloc((pieces + 1) * sizeof *plan->chunk);
    if (!plan->piece || !plan->chunk) {
        sba_plan_free(plan);
        return -1;
    }
    int64_t room = 0;
    for (int64_t i = 0; i < tensors; i++)
        for (int64_t begin = 0; begin < numel[i]; begin += SBA_PIECE) {
            int64_t count = numel[i] - begin < SBA_PIECE ? numel[i] - begin : SBA_PIECE;
            if (room <= 0) {
                plan->chunk[plan->chunks++] = plan->pieces;
                room = SBA_PIECE;
            }
            room -= count;
            plan->piece[plan->pieces++] = (sba_piece){i, begin, count};
        }
    plan->chunk[plan->chunks] = plan->pieces;
    return 0;
}

void sba_plan_free(sba_plan *plan) {
    free(plan->piece);
    free(plan->chunk);
}

/* ---- step ---- */

typedef struct {
    int64_t tensors, numel;
    sba_plan plan;
    sba_run *run;             /* per tensor; g is set by each step */
    float **step;             /* per tensor: its 0-dim step count */
    unsigned char *p_is_f32;  /* per tensor */
    int64_t *group;           /* per tensor: index into the hyper-parameters of a step */
    sba_scalars *scalars;     /* of one step: one for each run of tensors of one group with equal step counts */
    int64_t *scalars_of;      /* per tensor: index into scalars */
    const sba_kernels *kernels; /* of one step, like the rest */
    const unsigned char *g_is_f32;
    int zero;
} sba_table;

SBA_EXPORT void sba_table_free(sba_table *t) {
    if (!t) return;
    sba_plan_free(&t->plan);
    free(t->run);
    free(t->step);
    free(t->p_is_f32);
    free(t->group);
    free(t->scalars);
    free(t->scalars_of);
    free(t);
}

/* Keep the addresses of p, m, v, c (0 for a float32 parameter) and step (`address`: five rows of `tensors`), sizes, dtypes and groups.
 * Returns NULL where memory is short. Inverse of sba_table_free. */
SBA_EXPORT sba_table *sba_table_new(int64_t tensors, const int64_t *address, const int64_t *numel, const unsigned char *p_is_f32,
                                    const int64_t *group) {
    sba_table *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->tensors = tensors;
    t->run = malloc((tensors + 1) * sizeof *t->run);
    t->step = malloc((tensors + 1) * sizeof *t->step);
    t->p_is_f32 = malloc(tensors + 1);
    t->group = malloc((tensors + 1) * sizeof *t->group);
    t->scalars = malloc((tensors + 1) * sizeof *t->scalars);
    t->scalars_of = malloc((tensors + 1) * sizeof *t->scalars_of);
    if (!t->run || !t->step || !t->p_is_f32 || !t->group || !t->scalars || !t->scalars_of || sba_plan_make(&t->plan, numel, tensors)) {
        t->plan = (sba_plan){0};
        sba_table_free(t);
        return NULL;
    }
    for (int64_t i = 0; i < tensors; i++) {
        char *p = (char *)address[i], *m = (char *)address[tensors + i], *v = (char *)address[2 * tensors + i];
        t->run[i] = (sba_run){p, NULL, m, v, (char *)address[3 * tensors + i], numel[i]};
        t->step[i] = (float *)address[4 * tensors + i];
        t->p_is_f32[i] = p_is_f32[i];
        t->group[i] = group[i];
        t->numel += numel[i];
    }
    return t;
}

/* By repeated squaring, as reference.py's power. */
static double power(double base, uint64_t exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

/* Round to float32. One NaN for all, so that no payload bit can carry in the roundings (see body.h). */
static float f32(double x) { return x == x ? (float)x : NAN; }

/* As reference.py's. */
static uint32_t lowbias32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

static sba_scalars scalars_of_step(double step, const sba_hyper *h) {
    uint64_t t = step > 0 && step < 0x1p63 ? (uint64_t)step : 0;
    return (sba_scalars){
        .step_key = lowbias32((uint32_t)t),
        .beta1 = f32(h->beta1),
        .one_minus_beta1 = f32(1.0 - h->beta1),
        .beta2 = f32(h->beta2),
        .one_minus_beta2 = f32(1.0 - h->beta2),
        .step_size = f32(h->lr / (1.0 - power(h->beta1, t))),
        .inv_sqrt_bias_correction2 = f32(1.0 / sqrt(1.0 - power(h->beta2, t))),
        .eps = f32(h->eps),
        .lr_weight_decay = f32(h->lr * h->weight_decay),
        .grad_scale = f32(h->grad_scale),
    };
}

/* Count every tensor's step up and work out its scalars; most tensors of a group share them. */
static __attribute__((noinline)) void begin_step(sba_table *t, const int64_t *grads, const sba_hyper *hypers) {
    int64_t used = 0, last_group = 0;
    float last = 0;
    for (int64_t i = 0; i < t->tensors; i++) {
        if (i + STEPS_AHEAD < t->tensors) __builtin_prefetch(t->step[i + STEPS_AHEAD], 1);
        float step = *t->step[i] += 1.0f;
        if (!used || step != last || t->group[i] != last_group) t->scalars[used++] = scalars_of_step(step, &hypers[t->group[i]]);
        last = step;
        last_group = t->group[i];
        t->scalars_of[i] = used - 1;
        t->run[i].g = (char *)grads[i];
    }
}

/* Ask for the beginning of a piece: small tensors lie where the processor does not expect them. */
static void prefetch_piece(const sba_table *t, const sba_piece *piece) {
    const sba_run *run = &t->run[piece->tensor];
    int p_is_f32 = t->p_is_f32[piece->tensor];
    int64_t at = piece->begin * (p_is_f32 ? 4 : 2);
    __builtin_prefetch(run->p + at, 1);
    __builtin_prefetch(run->m + at, 1);
    __builtin_prefetch(run->v + at, 1);
    if (!p_is_f32) __builtin_prefetch(run->c + at, 1);
    __builtin_prefetch(run->g + piece->begin * (t->g_is_f32[piece->tensor] ? 4 : 2));
}

static void update_chunk(void *context, int64_t chunk) {
    const sba_table *t = context;
    fp_mode old = enter_ieee();
    int64_t end = t->plan.chunk[chunk + 1];
    for (int64_t k = t->plan.chunk[chunk]; k < end; k++) {
        if (k + PIECES_AHEAD < end) prefetch_piece(t, &t->plan.piece[k + PIECES_AHEAD]);
        const sba_piece *piece = &t->plan.piece[k];
        const sba_run *whole = &t->run[piece->tensor];
        int p_is_f32 = t->p_is_f32[piece->tensor], g_is_f32 = t->g_is_f32[piece->tensor];
        int64_t at = piece->begin * (p_is_f32 ? 4 : 2);
        char *g = whole->g + piece->begin * (g_is_f32 ? 4 : 2);
        sba_run run = {whole->p + at, g, whole->m + at, whole->v + at, p_is_f32 ? NULL : whole->c + at, piece->count};
        const sba_scalars *s = &t->scalars[t->scalars_of[piece->tensor]];
        t->kernels->update[p_is_f32][g_is_f32][t->zero][s->grad_scale != 1.0f](&run, s);
    }
    leave_ieee(old);
}

/* Take one step. `grads`: addresses, `g_is_f32`: their dtypes, per tensor; `hypers`: per group. One call at a time for each table. */
SBA_EXPORT void sba_table_update(sba_table *t, const int64_t *grads, const unsigned char *g_is_f32, const sba_hyper *hypers,
                                 int zero, int threads, int isa) {
    fp_mode old = enter_ieee();
    begin_step(t, grads, hypers);
    leave_ieee(old);
    t->kernels = sba_kernels_of(isa);
    t->g_is_f32 = g_is_f32;
    t->zero = zero;
    sba_parallel(update_chunk, t, t->plan.chunks, t->numel < SMALL ? 1 : threads);
}

/* ---- sum of squares ---- */

typedef struct {
    sba_plan plan;
    const sba_kernels *kernels;
    const int64_t *address;
    const unsigned char *is_f32;
    double *sum; /* per piece */
} sum_sq;

static void sum_sq_chunk(void *context, int64_t chunk) {
    const sum_sq *s = context;
    fp_mode old = enter_ieee();
    for (int64_t k = s->plan.chunk[chunk]; k < s->plan.chunk[chunk + 1]; k++) {
        const sba_piece *piece = &s->plan.piece[k];
        int is_f32 = s->is_f32[piece->tensor];
        const char *x = (const char *)s->address[piece->tensor] + piece->begin * (is_f32 ? 4 : 2);
        s->sum[k] = s->kernels->sum_sq[is_f32](x, piece->count);
    }
    leave_ieee(old);
}

static __attribute__((noinline)) double sum_in_order(const double *x, int64_t count) {
    double total = 0;
    for (int64_t k = 0; k < count; k++) total += x[k];
    return total;
}

/* The sum of squares of all tensors, the same bits for any number of threads and any instruction set. -1 where memory is short. */
SBA_EXPORT double sba_sum_sq(int64_t tensors, const int64_t *address, const int64_t *numel, const unsigned char *is_f32, int threads,
                             int isa) {
    sum_sq s = {.kernels = sba_kernels_of(isa), .address = address, .is_f32 = is_f32};
    if (sba_plan_make(&s.plan, numel, tensors)) return -1;
    double total = -1;
    s.sum = malloc((s.plan.pieces + 1) * sizeof *s.sum);
    if (s.sum) {
        int64_t elements = 0;
        for (int64_t i = 0; i < tensors; i++) elements += numel[i];
        sba_parallel(sum_sq_chunk, &s, s.plan.chunks, elements < 4 * SMALL ? 1 : threads);
        fp_mode old = enter_ieee();
        total = sum_in_order(s.sum, s.plan.pieces);
        leave_ieee(old);
    }
    free(s.sum);
    sba_plan_free(&s.plan);
    return total;
}

/* ---- memory traffic ---- */

typedef struct {
    const sba_kernels *kernels;
    char *array[5];
    int64_t bytes;
    uint32_t none; /* 0 */
} stream;

static void stream_chunk(void *context, int64_t chunk) {
    const stream *s = context;
    int64_t begin = chunk * 2 * SBA_PIECE, bytes = s->bytes - begin < 2 * SBA_PIECE ? s->bytes - begin : 2 * SBA_PIECE;
    char *array[5];
    for (int a = 0; a < 5; a++) array[a] = s->array[a] + begin;
    s->kernels->stream(array, bytes, s->none);
}

/* Walk five arrays of 2 * `elements` bytes as a step does, reading all and writing all but the first (g, p, m, v, c) as they were, with
 * next to no arithmetic. For benchmarks: what a plain loop makes of this machine's memory. */
SBA_EXPORT void sba_stream_ceiling(const int64_t *address, int64_t elements, int threads, int isa) {
    static volatile uint32_t none;
    stream s = {.kernels = sba_kernels_of(isa), .bytes = 2 * elements, .none = none};
    for (int a = 0; a < 5; a++) s.array[a] = (char *)address[a];
    sba_parallel(stream_chunk, &s, (s.bytes + 2 * SBA_PIECE - 1) / (2 * SBA_PIECE), threads);
}

typedef struct {
    sba_plan plan;
    const sba_kernels *kernels;
    const int64_t *address;
    _Atomic uint32_t all;
} reading;

static void read_chunk(void *context, int64_t chunk) {
    reading *r = context;
    for (int64_t k = r->plan.chunk[chunk]; k < r->plan.chunk[chunk + 1]; k++) {
        const sba_piece *piece = &r->plan.piece[k];
        r->all ^= r->kernels->read((const char *)r->address[piece->tensor] + 2 * piece->begin, 2 * piece->count);
    }
}

/* Read tensors of bf16 as sba_sum_sq does, with next to no arithmetic. For benchmarks. Returns the exclusive or of all whole 64-byte
 * blocks of each piece, or 0 where memory is short. */
SBA_EXPORT uint32_t sba_read_ceiling(int64_t tensors, const int64_t *address, const int64_t *numel, int threads, int isa) {
    reading r = {.kernels = sba_kernels_of(isa), .address = address};
    if (sba_plan_make(&r.plan, numel, tensors)) return 0;
    sba_parallel(read_chunk, &r, r.plan.chunks, threads);
    sba_plan_free(&r.plan);
    return r.all;
}

SBA_EXPORT int sba_isa_supported(int isa) { return sba_kernels_of(isa) != 0; }

/* Counts up whenever the rule, or the meaning or arguments of an exported function, changes: cpu.py refuses a library left from another
 * version. */
SBA_EXPORT int sba_abi_version(void) { return 3; }
