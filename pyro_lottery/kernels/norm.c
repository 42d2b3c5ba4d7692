/* Batch normalisation of batch_last activations: `channels` planes of n contiguous numbers. A plane is read several times
   while it is in the cache, and from memory once. Sums are of blocks of CHUNK numbers in fp32, and of blocks in fp64. */

#include <math.h>
#include <stdint.h>

enum { LANES = 64, CHUNK = 4096 };

#define EACH_LANE for (int l = 0; l < LANES; l++)
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* The sum over x - m, or over its square. */
#define SUM(name, term) static double name(const float *x, int64_t n, float m) { \
    double total = 0; \
    for (int64_t from = 0; from < n; from += CHUNK) { \
        int64_t to = MIN(from + CHUNK, n), i = from; \
        float sum[LANES] = {0}; \
        for (; i + LANES <= to; i += LANES) EACH_LANE { float d = x[i + l] - m; sum[l] += term; } \
        for (int l = 0; i < to; i++, l++) { float d = x[i] - m; sum[l] += term; } \
        EACH_LANE total += sum[l]; \
    } \
    return total; \
}
SUM(sum, d)
SUM(squares, d * d)

/* y = (x - mean) rate weight + bias, with the mean, the biased variance and rate = 1 / sqrt(variance + epsilon) of each plane.
   weight and bias may be NULL. */
void pl_norm(int64_t channels, int64_t n, const float *x, float *y, const float *weight, const float *bias, double epsilon,
             float *mean, float *variance, float *rate) {
    #pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const float *in = x + c * n;
        float *out = y + c * n;
        double m = sum(in, n, 0) / (double)n, rest = m - (double)(float)m;
        double v = squares(in, n, (float)m) / (double)n - rest * rest;
        float at = mean[c] = (float)m, r = rate[c] = (float)(1 / sqrt(v + epsilon));
        variance[c] = (float)v;
        float a = weight ? weight[c] * r : r, b = bias ? bias[c] : 0;
        for (int64_t i = 0; i < n; i++) out[i] = (in[i] - at) * a + b;
    }
}

/* The gradients of x, weight and bias, given g, that of y. */
void pl_norm_grad(int64_t channels, int64_t n, const float *g, const float *x, float *of_x, const float *weight,
                  const float *mean, const float *rate, float *of_weight, float *of_bias) {
    #pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const float *in = x + c * n, *up = g + c * n;
        float *out = of_x + c * n, m = mean[c], r = rate[c], a = weight ? weight[c] * r : r;
        double plain = 0, centred = 0;
        for (int64_t from = 0; from < n; from += CHUNK) {
            int64_t to = MIN(from + CHUNK, n), i = from;
            float s[LANES] = {0}, t[LANES] = {0};
            for (; i + LANES <= to; i += LANES) EACH_LANE { s[l] += up[i + l]; t[l] += up[i + l] * (in[i + l] - m); }
            for (int l = 0; i < to; i++, l++) { s[l] += up[i]; t[l] += up[i] * (in[i] - m); }
            EACH_LANE { plain += s[l]; centred += t[l]; }
        }
        of_bias[c] = (float)plain;
        of_weight[c] = (float)(centred * r);
        float level = (float)(plain / (double)n), slope = (float)(centred * r * r / (double)n);
        for (int64_t i = 0; i < n; i++) out[i] = a * (up[i] - level - (in[i] - m) * slope);
    }
}
