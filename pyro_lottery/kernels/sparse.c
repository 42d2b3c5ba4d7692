/* Convolutions whose cost is proportional to the weights that survive. The batch is innermost in memory, [channel][row]
   [column][example], so that each weight multiplies contiguous numbers.

   A pattern lists the weights by row (output channel, or input channel for the gradient of the input) and by tap (position
   in the filter): those of row r and tap t are ptr[r taps + t] to ptr[r taps + t + 1] - 1; col is each weight's channel, pos its
   place among the values. A tile is a run of outputs in a plane whose inputs are contiguous for every tap: tile[0] is its
   place, tile[1] its length, tile[2 + t] the place of its inputs for tap t, or -1 for padding. A tile's sums stay in registers
   while all weights of a row pass. Each output is summed by one thread in a fixed order, so the number of threads does not
   change a bit. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { VECTOR = 16, MOST = 16 };
#else
enum { VECTOR = 8, MOST = 8 };
#endif

typedef float vector __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float)), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define AT(p, v) (*(const vector *)((p) + (v) * VECTOR))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

int64_t pl_sparse_most(void) { return MOST * VECTOR; }  /* numbers in the largest tile */
int64_t pl_sparse_vector(void) { return VECTOR; }  /* numbers in a vector */

typedef struct { const int32_t *ptr, *col, *pos; const float *values; int64_t taps, plane; } Pattern;

/* y = bias + the sum over the weights of a row, for a tile of `count` vectors, or of `rest` numbers if count is 0. */
INLINE void tile_forward(int count, int rest, const Pattern *p, const int32_t *ptr, const int32_t *from, const float *x, float *y, float bias) {
    vector sum[MOST];
    float few[VECTOR];
    for (int v = 0; v < count; v++) sum[v] = (vector){0} + bias;
    for (int l = 0; l < rest; l++) few[l] = bias;
    for (int64_t t = 0; t < p->taps; t++) {
        if (from[t] < 0) continue;
        for (int32_t k = ptr[t]; k < ptr[t + 1]; k++) {
            const float *in = x + p->col[k] * p->plane + from[t], w = p->values[p->pos[k]];
            #pragma GCC unroll 16
            for (int v = 0; v < count; v++) sum[v] += w * AT(in, v);
            for (int l = 0; l < rest; l++) few[l] += w * in[l];
        }
    }
    for (int v = 0; v < count; v++) *(vector *)(y + v * VECTOR) = sum[v];
    for (int l = 0; l < rest; l++) y[l] = few[l];
}

/* sums[k] += the product of a tile of gradients g with the inputs of weight k, for all weights of a row. */
INLINE void tile_grad(int count, int rest, const Pattern *p, const int32_t *ptr, const int32_t *from, const float *x, const float *g, vector *sums) {
    vector each[MOST];
    for (int v = 0; v < count; v++) each[v] = AT(g, v);
    for (int64_t t = 0; t < p->taps; t++) {
        if (from[t] < 0) continue;
        for (int32_t k = ptr[t]; k < ptr[t + 1]; k++) {
            const float *in = x + p->col[k] * p->plane + from[t];
            vector even = sums[k], odd = {0};
            #pragma GCC unroll 16
            for (int v = 0; v < count; v++) if (v & 1) odd += each[v] * AT(in, v); else even += each[v] * AT(in, v);
            for (int l = 0; l < rest; l++) even[l] += g[l] * in[l];
            sums[k] = even + odd;
        }
    }
}

#if defined(__AVX512F__)
#define BY_SIZE(length, of) switch (length) { \
    case 16 * VECTOR: of(16, 0); break; case 8 * VECTOR: of(8, 0); break; case 4 * VECTOR: of(4, 0); break; \
    case 2 * VECTOR: of(2, 0); break; case VECTOR: of(1, 0); break; default: of(0, (length)); }
#else
#define BY_SIZE(length, of) switch (length) { \
    case 8 * VECTOR: of(8, 0); break; case 4 * VECTOR: of(4, 0); break; case 2 * VECTOR: of(2, 0); break; \
    case VECTOR: of(1, 0); break; default: of(0, (length)); }
#endif

/* y[r] = bias[r] + sum of values over x, for planes of `in` and `out` numbers; bias may be NULL. Blocks of rows are one task. */
void pl_sparse_forward(const float *x, float *y, int64_t rows, int64_t taps, const int32_t *ptr, const int32_t *col,
                       const int32_t *pos, const float *values, const float *bias, int64_t tiles, const int32_t *tile,
                       int64_t in, int64_t out, int64_t block) {
    const Pattern p = {ptr, col, pos, values, taps, in};
    #pragma omp parallel for schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += block)
        for (int64_t j = 0; j < tiles; j++) {
            const int32_t *at = tile + j * (taps + 2);
            for (int64_t r = first; r < MIN(first + block, rows); r++) {
                #define OF(count, rest) tile_forward(count, rest, &p, ptr + r * taps, at + 2, x, y + r * out + at[0], bias ? bias[r] : 0)
                BY_SIZE(at[1], OF)
                #undef OF
            }
        }
}

/* grad[k] = the gradient of each weight, given x and the gradients g of the outputs; `sums` holds a vector per weight. */
void pl_sparse_grad(const float *x, const float *g, int64_t rows, int64_t taps, const int32_t *ptr, const int32_t *col,
                    float *grad, float *scratch, int64_t tiles, const int32_t *tile, int64_t in, int64_t out, int64_t block) {
    const Pattern p = {ptr, col, 0, 0, taps, in};
    vector *sums = (vector *)scratch;
    #pragma omp parallel for schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += block) {
        int64_t end = MIN(first + block, rows);
        memset(sums + ptr[first * taps], 0, (ptr[end * taps] - ptr[first * taps]) * sizeof(vector));
        for (int64_t j = 0; j < tiles; j++) {
            const int32_t *at = tile + j * (taps + 2);
            for (int64_t r = first; r < end; r++) {
                #define OF(count, rest) tile_grad(count, rest, &p, ptr + r * taps, at + 2, x, g + r * out + at[0], sums)
                BY_SIZE(at[1], OF)
                #undef OF
            }
        }
        for (int32_t k = ptr[first * taps]; k < ptr[end * taps]; k++) {
            float total = 0;
            for (int l = 0; l < VECTOR; l++) total += sums[k][l];
            grad[k] = total;
        }
    }
}

/* out [columns][middle][rows] = in [rows][middle][columns], in squares that fit into the cache. */
void pl_turn(int64_t rows, int64_t middle, int64_t columns, const float *in, float *out) {
    enum { SIDE = 32 };
    const int64_t to = middle * rows, from = middle * columns;
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t m = 0; m < middle; m++)
        for (int64_t c = 0; c < columns; c += SIDE) {
            const float *a = in + m * columns;
            float *b = out + m * rows;
            for (int64_t r = 0; r < rows; r += SIDE)
                if (r + SIDE <= rows && c + SIDE <= columns)
                    for (int64_t j = c; j < c + SIDE; j++)
                        for (int i = 0; i < SIDE; i++) b[j * to + r + i] = a[(r + i) * from + j];
                else
                    for (int64_t j = c; j < MIN(c + SIDE, columns); j++)
                        for (int64_t i = r; i < MIN(r + SIDE, rows); i++) b[j * to + i] = a[i * from + j];
        }
}
