/* Convolutions whose cost is proportional to the weights that survive. The batch is innermost in memory, [channel][row]
   [column][example], so that each weight multiplies contiguous numbers.

   A pattern lists the weights by row (output channel, or input channel for the gradient of the input), by block of
   channels and by tap (position in the filter): those of row r, block b and tap t are ptr[(r blocks + b) taps + t] to
   ptr[(r blocks + b) taps + t + 1] - 1; off is where each weight's inputs lie from the tile's base. A tile is a run of outputs
   in a plane whose inputs are contiguous for every tap: {its place, its length, its base, the number of its runs, the first
   tap and the end of each run}; taps outside the runs meet padding. A tile's sums stay in registers while the weights of
   a row and a block pass, and the inputs of a block stay in the first cache while all rows pass. Each output is summed by one
   thread in an order that the pattern and the sizes give, so the number of threads does not change a bit. */

#include <omp.h>
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

/* Go over the weights k of a row and a block that do not meet padding. */
#define EACH_WEIGHT(k) \
    for (int i = 0; i < tile[3]; i++) \
        for (int32_t k = ptr[tile[4 + 2 * i]]; k < ptr[tile[5 + 2 * i]]; k++)
#define INPUTS(k) (x + tile[2] + off[k])

/* y = bias, or y itself if it is not the first block, + the sum over the weights of a row and a block, for a tile of `count`
   vectors, or of `rest` numbers if count is 0. */
INLINE void tile_forward(int count, int rest, const int32_t *tile, const int32_t *ptr, const int32_t *off, const float *values,
                         const float *x, float *y, int first, float bias) {
    vector sum[MOST];
    float few[VECTOR];
    for (int v = 0; v < count; v++) if (first) sum[v] = (vector){0} + bias; else sum[v] = AT(y, v);
    for (int l = 0; l < rest; l++) few[l] = first ? bias : y[l];
    EACH_WEIGHT(k) {
        const float *in = INPUTS(k), w = values[k];
        #pragma GCC unroll 16
        for (int v = 0; v < count; v++) sum[v] += w * AT(in, v);
        for (int l = 0; l < rest; l++) few[l] += w * in[l];
    }
    for (int v = 0; v < count; v++) *(vector *)(y + v * VECTOR) = sum[v];
    for (int l = 0; l < rest; l++) y[l] = few[l];
}

/* As tile_forward, where each vector of the planes holds one place for VECTOR draws of the weights: values is [weight][draw], and
   bias [draw] or NULL. */
INLINE void tile_draws(int count, const int32_t *tile, const int32_t *ptr, const int32_t *off, const float *values, const float *x,
                       float *y, int first, const float *bias) {
    vector sum[MOST];
    for (int v = 0; v < count; v++) if (!first) sum[v] = AT(y, v); else if (bias) sum[v] = AT(bias, 0); else sum[v] = (vector){0};
    EACH_WEIGHT(k) {
        const float *in = INPUTS(k);
        const vector w = AT(values, (int64_t)k);
        #pragma GCC unroll 16
        for (int v = 0; v < count; v++) sum[v] += w * AT(in, v);
    }
    for (int v = 0; v < count; v++) *(vector *)(y + v * VECTOR) = sum[v];
}

/* sums[k] += the product of a tile of gradients g with the inputs of weight k, for all weights of a row and a block. */
INLINE void tile_grad(int count, int rest, const int32_t *tile, const int32_t *ptr, const int32_t *off, const float *x, const float *g,
                      vector *sums) {
    vector each[MOST];
    for (int v = 0; v < count; v++) each[v] = AT(g, v);
    EACH_WEIGHT(k) {
        const float *in = INPUTS(k);
        vector even = sums[k - *ptr], odd = {0};
        #pragma GCC unroll 16
        for (int v = 0; v < count; v++) if (v & 1) odd += each[v] * AT(in, v); else even += each[v] * AT(in, v);
        for (int l = 0; l < rest; l++) even[l] += g[l] * in[l];
        sums[k - *ptr] = even + odd;
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

/* y[r] = bias[r] + sum of values over x, for planes of `out` numbers; bias may be NULL. Some rows and a group of tiles, each of
   `wide` numbers, are one task. */
#define FORWARD(name, of) void name( \
        const float *x, float *y, int64_t rows, int64_t blocks, int64_t taps, const int32_t *ptr, const int32_t *off, const float *values, \
        const float *bias, int64_t tiles, int64_t wide, const int32_t *table, int64_t out, int64_t some, int64_t group) { \
    _Pragma("omp parallel for collapse(2) schedule(dynamic, 1)") \
    for (int64_t first = 0; first < rows; first += some) \
        for (int64_t begin = 0; begin < tiles; begin += group) \
            for (int64_t j = begin; j < MIN(begin + group, tiles); j++) \
                for (int64_t b = 0; b < blocks; b++) \
                    for (int64_t r = first; r < MIN(first + some, rows); r++) { \
                        const int32_t *tile = table + j * wide, *own = ptr + (r * blocks + b) * taps; \
                        if (b > 0 && own[0] == own[taps]) continue; \
                        BY_SIZE(tile[1], of) \
                    } \
}
#define OF_ONE(count, rest) tile_forward(count, rest, tile, own, off, values, x, y + r * out + tile[0], b == 0, bias ? bias[r] : 0)
#define OF_DRAWS(count, rest) tile_draws(count, tile, own, off, values, x, y + r * out + tile[0], b == 0, bias ? bias + r * VECTOR : bias)
FORWARD(pl_sparse_forward, OF_ONE)
FORWARD(pl_sparse_draws, OF_DRAWS)  /* of planes that hold VECTOR draws at each place; bias is [row][draw] */

/* y = x scale + shift, for planes of `places` vectors and [channel][draw]. */
void pl_draws_affine(int64_t channels, int64_t places, const float *x, float *y, const float *scale, const float *shift) {
    #pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const float *in = x + c * places * VECTOR;
        float *out = y + c * places * VECTOR;
        const vector a = AT(scale, c), b = AT(shift, c);
        for (int64_t i = 0; i < places; i++) *(vector *)(out + i * VECTOR) = AT(in, i) * a + b;
    }
}

/* grad[pos[k]] = the gradient of each weight, given x and the gradients g of the outputs. Some rows and a block of channels are
   one task, which has at most `most` weights; `scratch` holds as many vectors for each of
   the threads. */
void pl_sparse_grad(const float *x, const float *g, int64_t rows, int64_t blocks, int64_t taps, const int32_t *ptr, const int32_t *off,
                    const int64_t *pos, float *grad, float *scratch, int64_t most, int64_t tiles, int64_t wide, const int32_t *table,
                    int64_t out, int64_t some, int64_t threads) {
    #pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < rows; first += some)
        for (int64_t b = 0; b < blocks; b++) {
            vector *const all = (vector *)scratch + omp_get_thread_num() * most, *sums;
            memset(all, 0, most * sizeof(vector));
            for (int64_t j = 0; j < tiles; j++) {
                sums = all;
                for (int64_t r = first; r < MIN(first + some, rows); r++) {
                    const int32_t *tile = table + j * wide, *own = ptr + (r * blocks + b) * taps;
                    #define OF(count, rest) tile_grad(count, rest, tile, own, off, x, g + r * out + tile[0], sums)
                    BY_SIZE(tile[1], OF)
                    #undef OF
                    sums += own[taps] - own[0];
                }
            }
            sums = all;
            for (int64_t r = first; r < MIN(first + some, rows); r++) {
                const int32_t *own = ptr + (r * blocks + b) * taps;
                for (int32_t k = own[0]; k < own[taps]; k++, sums++) {
                    float total = 0;
                    for (int l = 0; l < VECTOR; l++) total += (*sums)[l];
                    grad[pos[k]] = total;
                }
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
