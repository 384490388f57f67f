/* Run the native library without Python. Read the tensors of one step, take the step and both kinds of sums on every instruction set of
 * this machine with several concurrent callers, and write all results. test_cpu_driver.py builds this program, also with sanitizers and
 * for other processors, and describes the files.
 *
 *     native_driver INPUT OUTPUT THREADS CALLERS
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
} hyper;

void *sba_table_new(int64_t, const int64_t *, const int64_t *, const unsigned char *, const int64_t *);
void sba_table_free(void *);
void sba_table_update(void *, const int64_t *, const unsigned char *, const hyper *, int, int);
int sba_table_precision_sums(void *, const int64_t *, const unsigned char *, const hyper *, int, int, double *);
double sba_sum_sq(int64_t, const int64_t *, const int64_t *, const unsigned char *, int, int);
int sba_isa_supported(int);

enum { MOST = 256, COLUMNS = 5 /* g, p, m, v, c */, SUMS = 12, GROUPS = 2 };

typedef struct {
    int64_t p_is_f32, g_is_f32, numel, offset; /* offset: elements between an aligned address and the tensor */
    double step;
} shape;

static int64_t tensors;
static hyper arguments;
static shape shapes[MOST];
static char *inputs[MOST][COLUMNS];
static int threads;

static int64_t element(const shape *s, int column) { return (column == 0 ? s->g_is_f32 : s->p_is_f32) ? 4 : 2; }

static int present(const shape *s, int column) { return column < 4 || !s->p_is_f32; }

typedef struct {
    int isa;
    char *memory[MOST][COLUMNS]; /* allocated to the byte, so that a sanitizer detects any overrun */
    float *step;
    double sum_sq, sums[GROUPS * SUMS];
    pthread_t thread;
} caller;

static void *run(void *argument) {
    caller *c = argument;
    int64_t states[COLUMNS * MOST] = {0}, grads[MOST], numel[MOST], group[MOST];
    unsigned char p_is_f32[MOST], g_is_f32[MOST];
    c->step = malloc(tensors * sizeof *c->step);
    for (int i = 0; i < tensors; i++) {
        const shape *s = &shapes[i];
        for (int k = 0; k < COLUMNS; k++) {
            if (!present(s, k)) continue;
            int64_t skip = s->offset * element(s, k), bytes = s->numel * element(s, k);
            c->memory[i][k] = malloc(skip + bytes);
            memcpy(c->memory[i][k] + skip, inputs[i][k], bytes);
            int64_t address = (int64_t)(c->memory[i][k] + skip);
            if (k == 0)
                grads[i] = address;
            else
                states[(k - 1) * tensors + i] = address;
        }
        c->step[i] = (float)s->step;
        states[4 * tensors + i] = (int64_t)&c->step[i];
        numel[i] = s->numel;
        group[i] = i % GROUPS; /* groups with the same hyper-parameters */
        p_is_f32[i] = s->p_is_f32;
        g_is_f32[i] = s->g_is_f32;
    }
    c->sum_sq = sba_sum_sq(tensors, grads, numel, g_is_f32, threads, c->isa);
    void *table = sba_table_new(tensors, states, numel, p_is_f32, group);
    const hyper hypers[GROUPS] = {arguments, arguments};
    if (sba_table_precision_sums(table, grads, g_is_f32, hypers, threads, c->isa, c->sums)) exit(2);
    sba_table_update(table, grads, g_is_f32, hypers, threads, c->isa);
    sba_table_free(table);
    return NULL;
}

static void need(size_t got, size_t wanted) {
    if (got == wanted) return;
    fprintf(stderr, "short file\n");
    exit(2);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    threads = atoi(argv[3]);
    int callers = atoi(argv[4]);
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    if (!in || !out) return 2;
    need(fread(&tensors, sizeof tensors, 1, in), 1);
    need(fread(&arguments, sizeof arguments, 1, in), 1);
    if (tensors > MOST) return 2;
    for (int i = 0; i < tensors; i++) {
        need(fread(&shapes[i], sizeof shapes[i], 1, in), 1);
        for (int k = 0; k < COLUMNS; k++) {
            if (!present(&shapes[i], k)) continue;
            size_t bytes = shapes[i].numel * element(&shapes[i], k);
            inputs[i][k] = malloc(bytes);
            need(fread(inputs[i][k], 1, bytes, in), bytes);
        }
    }
    for (int isa = 0; isa < 3; isa++) {
        if (!sba_isa_supported(isa)) continue;
        caller *all = calloc(callers, sizeof *all);
        for (int j = 0; j < callers; j++) {
            all[j].isa = isa;
            if (pthread_create(&all[j].thread, NULL, run, &all[j])) return 2;
        }
        for (int j = 0; j < callers; j++) {
            caller *c = &all[j];
            pthread_join(c->thread, NULL);
            fwrite(&c->sum_sq, sizeof c->sum_sq, 1, out);
            fwrite(c->sums, sizeof c->sums, 1, out);
            for (int i = 0; i < tensors; i++) {
                fwrite(&c->step[i], sizeof c->step[i], 1, out);
                for (int k = 0; k < COLUMNS; k++) {
                    if (!present(&shapes[i], k)) continue;
                    int64_t size = element(&shapes[i], k);
                    fwrite(c->memory[i][k] + shapes[i].offset * size, size, shapes[i].numel, out);
                    free(c->memory[i][k]);
                }
            }
            free(c->step);
        }
        free(all);
    }
    for (int i = 0; i < tensors; i++)
        for (int k = 0; k < COLUMNS; k++) free(inputs[i][k]);
    fclose(in);
    return fclose(out) ? 2 : 0;
}
