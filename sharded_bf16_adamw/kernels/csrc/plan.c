/* Plans; see native.h. */
#include <stdlib.h>

#include "native.h"

int sba_plan_make(sba_plan *plan, const int64_t *numel, int64_t tensors) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < tensors; i++) blocks += (numel[i] + SBA_BLOCK - 1) / SBA_BLOCK;
    plan->blocks = plan->chunks = 0;
    plan->block = malloc((blocks + 1) * sizeof *plan->block);
    plan->chunk = malloc((blocks + 1) * sizeof *plan->chunk);
    if (!plan->block || !plan->chunk) {
        sba_plan_free(plan);
        return -1;
    }
    int64_t room = 0; /* the last chunk takes further blocks while this is positive */
    for (int64_t i = 0; i < tensors; i++)
        for (int64_t begin = 0; begin < numel[i]; begin += SBA_BLOCK) {
            int64_t count = numel[i] - begin < SBA_BLOCK ? numel[i] - begin : SBA_BLOCK;
            if (room <= 0) {
                plan->chunk[plan->chunks++] = plan->blocks;
                room = SBA_BLOCK;
            }
            room -= count;
            plan->block[plan->blocks++] = (sba_block){i, begin, count};
        }
    plan->chunk[plan->chunks] = plan->blocks;
    return 0;
}

void sba_plan_free(sba_plan *plan) {
    free(plan->block);
    free(plan->chunk);
}
