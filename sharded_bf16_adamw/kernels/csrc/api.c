/* The exported functions: a step of many tensors, the sums of precision_stats, and the sum of squares of many tensors. See cpu.py. */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BLOCKS_AHEAD 4        /* prefetch distance of blocks */
#define STEPS_AHEAD 16        /* prefetch distance of step counts */
#define SMALL (2 * SBA_BLOCK) /* below this many elements, waking a helper costs more than it saves */

/* The update rule needs plain IEEE arithmetic. torch.set_flush_denormal and other code change a thread's mode, so every thread that
 * computes sets the default mode first and restores the old mode afterwards. */
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

/* ---- step ---- */

typedef struct {
    int64_t tensors, numel;
    sba_plan plan;
    /* Per tensor: */
    sba_run *run; /* each step sets g, the other fields are fixed */
    float **step; /* 0-dim step count */
    unsigned char *p_is_f32;
    int64_t *group; /* index into the hyper-parameters of a step */
    /* Of the current step: */
    sba_scalars *scalars; /* shared by consecutive tensors of one group with equal step counts */
    int64_t *scalars_of;  /* per tensor: index into scalars */
    const sba_kernels *kernels;
    const unsigned char *g_is_f32;
    double *sums; /* SBA_SUMS per block; NULL to take the step */
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

/* Return a new table, or NULL if memory is short. `address` has five rows of `tensors` addresses: p, m, v, c (0 for a float32
 * parameter) and step. Release with sba_table_free. */
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

/* Power by repeated squaring, like power() of reference.py. */
static double power(double base, uint64_t exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

/* Round to float32. Every NaN becomes the canonical one, whose payload cannot carry when it is rounded (see simd_kernels.inc.h). */
static float f32(double x) { return x == x ? (float)x : NAN; }

/* Hash a step count, like lowbias32() of reference.py. */
static uint32_t lowbias32(uint32_t x) {
    x ^= x >> 16;
    x *= SBA_LOWBIAS_FIRST;
    x ^= x >> 15;
    x *= SBA_LOWBIAS_SECOND;
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

/* Set each tensor's gradient and the scalars of its next step, and increment its step count if that step is `taken`. */
static __attribute__((noinline)) void begin_step(sba_table *t, const int64_t *grads, const sba_hyper *hypers, int taken) {
    int64_t used = 0, last_group = 0;
    float last = 0;
    for (int64_t i = 0; i < t->tensors; i++) {
        if (i + STEPS_AHEAD < t->tensors) __builtin_prefetch(t->step[i + STEPS_AHEAD], 1);
        float step = *t->step[i] + 1.0f;
        if (taken) *t->step[i] = step;
        if (!used || step != last || t->group[i] != last_group) t->scalars[used++] = scalars_of_step(step, &hypers[t->group[i]]);
        last = step;
        last_group = t->group[i];
        t->scalars_of[i] = used - 1;
        t->run[i].g = (char *)grads[i];
    }
}

/* Prefetch the start of a block: the hardware cannot predict the addresses of small tensors. */
static void prefetch_block(const sba_table *t, const sba_block *block) {
    const sba_run *run = &t->run[block->tensor];
    int p_is_f32 = t->p_is_f32[block->tensor];
    int64_t at = block->begin * (p_is_f32 ? 4 : 2);
    __builtin_prefetch(run->p + at, 1);
    __builtin_prefetch(run->m + at, 1);
    __builtin_prefetch(run->v + at, 1);
    if (!p_is_f32) __builtin_prefetch(run->c + at, 1);
    __builtin_prefetch(run->g + block->begin * (t->g_is_f32[block->tensor] ? 4 : 2));
}

static void step_chunk(void *context, int64_t chunk) {
    const sba_table *t = context;
    fp_mode old = enter_ieee();
    int64_t end = t->plan.chunk[chunk + 1];
    for (int64_t k = t->plan.chunk[chunk]; k < end; k++) {
        if (k + BLOCKS_AHEAD < end) prefetch_block(t, &t->plan.block[k + BLOCKS_AHEAD]);
        const sba_block *block = &t->plan.block[k];
        const sba_run *tensor = &t->run[block->tensor];
        int p_is_f32 = t->p_is_f32[block->tensor], g_is_f32 = t->g_is_f32[block->tensor];
        int64_t at = block->begin * (p_is_f32 ? 4 : 2);
        char *g = tensor->g + block->begin * (g_is_f32 ? 4 : 2);
        sba_run run = {tensor->p + at, g, tensor->m + at, tensor->v + at, p_is_f32 ? NULL : tensor->c + at, block->count};
        const sba_scalars *s = &t->scalars[t->scalars_of[block->tensor]];
        if (t->sums)
            t->kernels->precision[p_is_f32][g_is_f32][s->grad_scale != 1.0f](&run, s, t->sums + k * SBA_SUMS);
        else
            t->kernels->update[p_is_f32][g_is_f32][s->grad_scale != 1.0f](&run, s);
    }
    leave_ieee(old);
}

static __attribute__((noinline)) void add_blocks(const sba_table *t, const double *block_sums, double *sums) {
    for (int64_t k = 0; k < t->plan.blocks; k++)
        for (int i = 0; i < SBA_SUMS; i++) sums[t->group[t->plan.block[k].tensor] * SBA_SUMS + i] += block_sums[k * SBA_SUMS + i];
}

static void run_step(sba_table *t, const int64_t *grads, const unsigned char *g_is_f32, const sba_hyper *hypers, int threads, int isa,
                     double *sums) {
    fp_mode old = enter_ieee();
    begin_step(t, grads, hypers, !sums);
    leave_ieee(old);
    t->kernels = sba_kernels_of(isa);
    t->g_is_f32 = g_is_f32;
    t->sums = sums;
    sba_parallel(step_chunk, t, t->plan.chunks, t->numel < SMALL ? 1 : threads);
}

/* Take one step; one call at a time per table. `grads` (addresses) and `g_is_f32` have one entry per tensor, `hypers` one per group. */
SBA_EXPORT void sba_table_update(sba_table *t, const int64_t *grads, const unsigned char *g_is_f32, const sba_hyper *hypers,
                                 int threads, int isa) {
    run_step(t, grads, g_is_f32, hypers, threads, isa, NULL);
}

/* Add the sums of that step to `sums`, SBA_SUMS per group, without taking it. Any number of threads gives the same bits. Return 0, or
 * -1 if memory is short. */
SBA_EXPORT int sba_table_precision_sums(sba_table *t, const int64_t *grads, const unsigned char *g_is_f32, const sba_hyper *hypers,
                                        int threads, int isa, double *sums) {
    double *block_sums = malloc((t->plan.blocks + 1) * SBA_SUMS * sizeof *block_sums);
    if (!block_sums) return -1;
    run_step(t, grads, g_is_f32, hypers, threads, isa, block_sums);
    fp_mode old = enter_ieee();
    add_blocks(t, block_sums, sums);
    leave_ieee(old);
    free(block_sums);
    return 0;
}

/* ---- sum of squares ---- */

typedef struct {
    sba_plan plan;
    const sba_kernels *kernels;
    const int64_t *address;
    const unsigned char *is_f32;
    double *sum; /* one per block */
} sum_sq;

static void sum_sq_chunk(void *context, int64_t chunk) {
    const sum_sq *s = context;
    fp_mode old = enter_ieee();
    for (int64_t k = s->plan.chunk[chunk]; k < s->plan.chunk[chunk + 1]; k++) {
        const sba_block *block = &s->plan.block[k];
        int is_f32 = s->is_f32[block->tensor];
        const char *x = (const char *)s->address[block->tensor] + block->begin * (is_f32 ? 4 : 2);
        s->sum[k] = s->kernels->sum_sq[is_f32](x, block->count);
    }
    leave_ieee(old);
}

static __attribute__((noinline)) double sum_in_order(const double *x, int64_t count) {
    double total = 0;
    for (int64_t k = 0; k < count; k++) total += x[k];
    return total;
}

/* Return the sum of squares of all tensors, or -1 if memory is short. Any number of threads and any instruction set give the same
 * bits. */
SBA_EXPORT double sba_sum_sq(int64_t tensors, const int64_t *address, const int64_t *numel, const unsigned char *is_f32, int threads,
                             int isa) {
    sum_sq s = {.kernels = sba_kernels_of(isa), .address = address, .is_f32 = is_f32};
    if (sba_plan_make(&s.plan, numel, tensors)) return -1;
    double total = -1;
    s.sum = malloc((s.plan.blocks + 1) * sizeof *s.sum);
    if (s.sum) {
        int64_t elements = 0;
        for (int64_t i = 0; i < tensors; i++) elements += numel[i];
        sba_parallel(sum_sq_chunk, &s, s.plan.chunks, elements < 4 * SMALL ? 1 : threads);
        fp_mode old = enter_ieee();
        total = sum_in_order(s.sum, s.plan.blocks);
        leave_ieee(old);
    }
    free(s.sum);
    sba_plan_free(&s.plan);
    return total;
}

SBA_EXPORT int sba_isa_supported(int isa) { return sba_kernels_of(isa) != 0; }

/* Increment this and ABI_VERSION in cpu.py whenever the update rule or an exported function changes: cpu.py requires equal versions. */
SBA_EXPORT int sba_abi_version(void) { return 5; }
