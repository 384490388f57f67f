/* Shared declarations of the native CPU library. api.c exports a plain C ABI that cpu.py loads with ctypes.
 *
 * block:  consecutive elements of one tensor, at most SBA_BLOCK. Sums are computed per block and added in the order of the blocks.
 * chunk:  consecutive blocks, the unit of work that threads claim. Small tensors share a chunk; a large tensor spans many.
 * plan:   the blocks and chunks of a list of tensors.
 */
#ifndef SBA_NATIVE_H
#define SBA_NATIVE_H

#include <float.h>
#include <stdint.h>

#if FLT_EVAL_METHOD != 0
#error "float and double expressions must be evaluated in their own precision (SSE2 or later)"
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian machine is needed"
#endif

#define SBA_BLOCK 32768
#define SBA_EXPORT __attribute__((visibility("default")))

/* Multipliers of the hash; reference.py explains them. */
#define SBA_SPREAD_M 0x1643
#define SBA_SPREAD_V 0x6771
#define SBA_SPREAD_C 0xc09d
#define SBA_MIX 0x365b
#define SBA_DRAW_M 0x2851
#define SBA_DRAW_C 0xfaed
#define SBA_LOWBIAS_FIRST 0x7feb352du
#define SBA_LOWBIAS_SECOND 0x846ca68bu

/* Scalars of one step. Every field but step_key is rounded once from double. */
typedef struct {
    uint32_t step_key; /* the hash of the step */
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, inv_sqrt_bias_correction2, eps, lr_weight_decay;
    float grad_scale; /* the clip coefficient, negated to ascend */
} sba_scalars;

/* Hyper-parameters of one group in one step, as cpu.py passes them. */
typedef struct {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
} sba_hyper;

/* Consecutive elements of one parameter. c is NULL for a float32 parameter. Pointers need only the alignment of an element. */
typedef struct {
    char *p, *g, *m, *v, *c;
    int64_t count;
} sba_run;

/* The sums of precision_stats; PRECISION_SUMS in backend.py describes each. */
enum {
    SBA_ELEMENTS,
    SBA_CORRECTED,
    SBA_UPDATES,
    SBA_LOST,
    SBA_CARRIED,
    SBA_WEIGHT_SQ,
    SBA_UPDATE_SQ,
    SBA_DESCENT,
    SBA_PLAIN_DESCENT,
    SBA_CORRECTION_SQ,
    SBA_FIRST_SQ,
    SBA_SECOND_SQ,
    SBA_SUMS
};

/* The kernels of one instruction set. */
typedef struct {
    /* [parameter is float32][gradient is float32][gradient is multiplied by grad_scale] */
    void (*update[2][2][2])(const sba_run *, const sba_scalars *);
    void (*precision[2][2][2])(const sba_run *, const sba_scalars *, double *sums); /* at most SBA_BLOCK elements */
    double (*sum_sq[2])(const char *, int64_t); /* [float32]; at most SBA_BLOCK elements */
} sba_kernels;

enum { SBA_BASELINE, SBA_AVX2, SBA_AVX512, SBA_ISAS };

/* Return the kernels of an instruction set, or NULL if this processor lacks it. */
const sba_kernels *sba_kernels_of(int isa);

typedef struct {
    int64_t tensor, begin, count;
} sba_block;

typedef struct {
    int64_t blocks, chunks;
    sba_block *block;
    int64_t *chunk; /* first block of each chunk, then the number of blocks */
} sba_plan;

/* Cut tensors of `numel` elements into blocks and chunks. Return 0, or -1 if memory is short. Release with sba_plan_free. */
int sba_plan_make(sba_plan *plan, const int64_t *numel, int64_t tensors);
void sba_plan_free(sba_plan *plan);

/* Call task(context, i) once for each i in [0, chunks) on up to `threads` threads, including the caller. */
typedef void (*sba_task)(void *context, int64_t chunk);
void sba_parallel(sba_task task, void *context, int64_t chunks, int threads);

#endif
