/* Shared declarations of the native CPU library. The exported functions form a plain C ABI that cpu.py loads with ctypes.
 *
 * piece:  a run of elements of one tensor, at most SBA_PIECE long; the unit whose squares are summed in a fixed order.
 * chunk:  consecutive pieces that one thread claims at once; small tensors share a chunk, a large one spans many.
 * plan:   pieces and chunks of a list of tensors.
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

#define SBA_PIECE 32768
#define SBA_EXPORT __attribute__((visibility("default")))

/* What one element's update needs besides its tensors; each field but the first is rounded once from double. */
typedef struct {
    uint32_t step_key; /* the hash of the step */
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, inv_sqrt_bias_correction2, eps, lr_weight_decay;
    float grad_scale; /* the clip scale, negated to ascend */
} sba_scalars;

/* The hyper-parameters of one group in one call, as cpu.py passes them. */
typedef struct {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
} sba_hyper;

/* One run of elements. Pointers need the alignment of an element only; c is NULL for a float32 parameter. */
typedef struct {
    char *p, *g, *m, *v, *c;
    int64_t count;
} sba_run;

/* The kernels of one instruction set. */
typedef struct {
    /* [parameter is float32][gradient is float32][zero it][scale it] */
    void (*update[2][2][2][2])(const sba_run *, const sba_scalars *);
    double (*sum_sq[2])(const char *, int64_t);                    /* [float32]; at most SBA_PIECE elements */
    void (*stream)(char *const arrays[5], int64_t bytes, uint32_t none);
    uint32_t (*read)(const char *, int64_t bytes);
} sba_kernels;

enum { SBA_BASELINE, SBA_AVX2, SBA_AVX512, SBA_ISAS };

const sba_kernels *sba_kernels_of(int isa);

typedef struct {
    int64_t tensor, begin, count;
} sba_piece;

typedef struct {
    int64_t pieces, chunks;
    sba_piece *piece;
    int64_t *chunk; /* first piece of each chunk, and one past the last */
} sba_plan;

/* Cut tensors of `numel` elements into pieces and chunks. Returns 0, or -1 where memory is short. Inverse of sba_plan_free. */
int sba_plan_make(sba_plan *plan, const int64_t *numel, int64_t tensors);
void sba_plan_free(sba_plan *plan);

/* Call task(context, i) once for each i in [0, chunks) on up to `threads` threads, of which the caller is one. */
typedef void (*sba_task)(void *context, int64_t chunk);
void sba_parallel(sba_task task, void *context, int64_t chunks, int threads);

#endif
