/* Loops with the memory traffic of a step and of a gradient norm, and next to no arithmetic. See bandwidth.py.
 *
 * They read memory as the kernels of csrc/ do, with the same vectors, streams, prefetches, chunks and threads.
 */
#include <string.h>

#include "native.h"

#define AHEAD 2048 /* as in isa.c */
#define STREAMS 8
#define CHUNK (2 * SBA_BLOCK) /* bytes of one array */

/* The loops of one instruction set with vectors of W words.
 *
 * copy: read five arrays and write all but the first. `zero` is 0, but the compiler does not know: so all five are read, and each word is
 *       written with its old value.
 * read: return the exclusive or of all whole 64-byte blocks. */
#define LOOPS(isa, W, TARGET) \
    typedef uint32_t isa##_u __attribute__((vector_size(4 * W))); \
    typedef uint32_t isa##_memory __attribute__((vector_size(4 * W), aligned(1), may_alias)); \
    static TARGET void copy_##isa(char *const array[5], int64_t bytes, uint32_t zero) { \
        for (int64_t i = 0; i + 4 * W <= bytes; i += 4 * W) { \
            isa##_u x = (isa##_u) * (const isa##_memory *)(array[0] + i) & zero; \
            for (int a = 1; a < 5; a++) *(isa##_memory *)(array[a] + i) ^= (isa##_memory)x; \
        } \
    } \
    static TARGET uint32_t read_##isa(const char *x, int64_t bytes) { \
        isa##_u all = {0}; \
        const int64_t part = bytes / (64 * STREAMS) * 64; \
        for (int64_t i = 0; i < part; i += 64) { \
            int64_t next_run = i + AHEAD < part ? 0 : (STREAMS - 1) * part; \
            for (int k = 0; k < STREAMS; k++) { \
                const char *at = x + k * part + i; \
                __builtin_prefetch(at + AHEAD + next_run); \
                for (int j = 0; j < 64; j += 4 * W) all ^= (isa##_u) * (const isa##_memory *)(at + j); \
            } \
        } \
        for (int64_t i = STREAMS * part; i + 64 <= bytes; i += 64) \
            for (int j = 0; j < 64; j += 4 * W) all ^= (isa##_u) * (const isa##_memory *)(x + i + j); \
        uint32_t words[W], folded = 0; \
        memcpy(words, &all, sizeof words); \
        for (int k = 0; k < W; k++) folded ^= words[k]; \
        return folded; \
    }

typedef void copy_loop(char *const array[5], int64_t bytes, uint32_t zero);
typedef uint32_t read_loop(const char *, int64_t bytes);

LOOPS(baseline, 4, )
#if defined(__x86_64__)
LOOPS(avx2, 8, __attribute__((target("avx2,fma"))))
LOOPS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
static copy_loop *const copy_loops[SBA_ISAS] = {copy_baseline, copy_avx2, copy_avx512};
static read_loop *const read_loops[SBA_ISAS] = {read_baseline, read_avx2, read_avx512};
#else
static copy_loop *const copy_loops[SBA_ISAS] = {copy_baseline};
static read_loop *const read_loops[SBA_ISAS] = {read_baseline};
#endif

typedef struct {
    copy_loop *loop;
    char *array[5];
    int64_t bytes;
    uint32_t zero;
} copying;

static void copy_chunk(void *context, int64_t chunk) {
    const copying *c = context;
    int64_t begin = chunk * CHUNK, bytes = c->bytes - begin < CHUNK ? c->bytes - begin : CHUNK;
    char *array[5];
    for (int a = 0; a < 5; a++) array[a] = c->array[a] + begin;
    c->loop(array, bytes, c->zero);
}

SBA_EXPORT void copy_bandwidth(const int64_t *address, int64_t bytes, int threads, int isa) {
    static volatile uint32_t zero;
    copying c = {.loop = copy_loops[isa], .bytes = bytes, .zero = zero};
    for (int a = 0; a < 5; a++) c.array[a] = (char *)address[a];
    sba_parallel(copy_chunk, &c, (bytes + CHUNK - 1) / CHUNK, threads);
}

typedef struct {
    sba_plan plan;
    read_loop *loop;
    const int64_t *address;
    _Atomic uint32_t all;
} reading;

static void read_chunk(void *context, int64_t chunk) {
    reading *r = context;
    for (int64_t k = r->plan.chunk[chunk]; k < r->plan.chunk[chunk + 1]; k++) {
        const sba_block *block = &r->plan.block[k];
        r->all ^= r->loop((const char *)r->address[block->tensor] + 2 * block->begin, 2 * block->count);
    }
}

/* Return the exclusive or of all whole 64-byte blocks of each block of elements, or 0 if memory is short. */
SBA_EXPORT uint32_t read_bandwidth(int64_t tensors, const int64_t *address, const int64_t *numel, int threads, int isa) {
    reading r = {.loop = read_loops[isa], .address = address};
    if (sba_plan_make(&r.plan, numel, tensors)) return 0;
    sba_parallel(read_chunk, &r, r.plan.chunks, threads);
    sba_plan_free(&r.plan);
    return r.all;
}
