/* The elementwise work of variational training, each function in one pass over memory. torch_path.py computes the same
   in torch.

   Noise is a pure function of (seed, position): Philox 4x32 with 7 rounds (Salmon et al. 2011, the fewest that pass
   BigCrush) and Box-Muller. The numbers therefore do not depend on the number of threads. Loops run over arrays of LANES
   values so that the compiler vectorises them. Logarithm, exponential, sine and cosine are polynomials (least squares at
   Chebyshev nodes, error below 1e-7), since those of the mathematical library are scalar. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 64, BLOCK = 4 * LANES, CHUNK = 16 * BLOCK };

#define TINY 1e-30f  /* must equal TINY in torch_path.py; smaller variances count as 0, NaN stays NaN */
#define EACH_LANE for (int l = 0; l < LANES; l++)

static inline float polynomial(const float *c, int degree, float x) {
    float y = c[degree];
    for (int i = degree - 1; i >= 0; i--) y = y * x + c[i];
    return y;
}

static const float SIN[] = {3.14159265f, -5.16771276f, 2.55016332f, -0.599252198f, 0.0820504027f, -0.00702838652f};
static const float COS[] = {1.0f, -4.93480214f, 4.05870916f, -1.335212f, 0.234937318f, -0.0243963246f};
static const float LOG[] = {-0.5f, 0.333333226f, -0.249999913f, 0.200014527f, -0.166685825f,
                            0.142330077f, -0.124027303f, 0.117889439f, -0.116567258f, 0.0694206084f};
static const float EXP[] = {1.0f, 1.0f, 0.500000011f, 0.166664154f, 0.0416662182f, 0.00837513188f, 0.00139485846f};

static inline float bits_float(int32_t i) { float f; memcpy(&f, &i, 4); return f; }
static inline int32_t float_bits(float f) { int32_t i; memcpy(&i, &f, 4); return i; }

static inline float exponential(float x) {
    float y = x < -87.0f ? -87.0f : x;  /* fmaxf would not keep NaN */
    y = y > 88.0f ? 88.0f : y;
    float shifted = y * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;  /* rounds to an integer */
    float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
    float e = polynomial(EXP, 6, r) * bits_float((float_bits(shifted) - 0x4b400000 + 127) << 23);
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : e;
}

static inline float logarithm(float u) {  /* u in (0, 1], normal */
    int32_t i = float_bits(u) - 0x3f3504f3;  /* puts the mantissa into [sqrt(1/2), sqrt(2)) */
    float e = (float)(i >> 23), f = bits_float((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
    return e * 0.693147181f + (f + f * f * polynomial(LOG, 9, f));
}

/* Fill z with BLOCK standard normal numbers: those of this seed's stream from position block * BLOCK on. */
static inline void normals(uint64_t seed, uint64_t block, float *z) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    EACH_LANE { c0[l] = l; c1[l] = (uint32_t)block; c2[l] = (uint32_t)(block >> 32); c3[l] = 0; }
    for (int round = 0; round < 7; round++) {
        EACH_LANE {
            uint64_t a = (uint64_t)0xD2511F53u * c0[l], b = (uint64_t)0xCD9E8D57u * c2[l];
            uint32_t n0 = (uint32_t)(b >> 32) ^ c1[l] ^ k0, n2 = (uint32_t)(a >> 32) ^ c3[l] ^ k1;
            c0[l] = n0; c1[l] = (uint32_t)b; c2[l] = n2; c3[l] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    for (int pair = 0; pair < 2; pair++) {
        const uint32_t *p = pair ? c2 : c0, *q = pair ? c3 : c1;
        float *x = z + 2 * pair * LANES, *y = x + LANES;
        EACH_LANE {
            float u = ((float)(int32_t)(p[l] >> 1) + 0.5f) * 0x1p-31f;  /* in (0, 1] */
            float v = (float)(int32_t)q[l] * 0x1p-31f;  /* the angle is pi v, v in [-1, 1] */
            float radius = sqrtf(-2.0f * logarithm(u)), t = fabsf(v) - 0.5f, s = t * t;
            x[l] = radius * -t * polynomial(SIN, 5, s);
            y[l] = copysignf(radius * polynomial(COS, 5, s), v);
        }
    }
}

#define CHUNKS(n) (((n) + CHUNK - 1) / CHUNK)
#define MIN(a, b) ((a) < (b) ? (a) : (b))

void pl_normal(int64_t n, float *out, uint64_t seed) {
    #pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        int64_t from = b * BLOCK, count = MIN(BLOCK, n - from);
        if (count == BLOCK) { normals(seed, b, out + from); continue; }
        float z[BLOCK];
        normals(seed, b, z);
        memcpy(out + from, z, count * sizeof(float));
    }
}

/* kept[i] = loc[i] + exp(log_scale[i]) noise[i], and out[index[i]] the same unless index is NULL. */
void pl_sample(int64_t n, const float *loc, const float *log_scale, const int32_t *index, float *out, float *kept, uint64_t seed) {
    #pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        int64_t from = b * BLOCK, count = MIN(BLOCK, n - from);
        float z[BLOCK];
        normals(seed, b, z);
        const float *m = loc + from, *s = log_scale + from;
        float *w = kept + from;
        for (int64_t i = 0; i < count; i++) w[i] = m[i] + exponential(s[i]) * z[i];
        if (index) for (int64_t i = 0; i < count; i++) out[index[from + i]] = w[i];
    }
}

/* mean[index[i]] = loc[i] and variance[index[i]] = exp(2 log_scale[i]), or element i if index is NULL. */
void pl_moments(int64_t n, const float *loc, const float *log_scale, const int32_t *index, float *mean, float *variance) {
    #pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < CHUNKS(n); c++) {
        int64_t from = c * CHUNK, to = MIN(from + CHUNK, n);
        if (index) for (int64_t i = from; i < to; i++) {
            mean[index[i]] = loc[i];
            variance[index[i]] = exponential(2 * log_scale[i]);
        }
        else for (int64_t i = from; i < to; i++) {
            mean[i] = loc[i];
            variance[i] = exponential(2 * log_scale[i]);
        }
    }
}

/* KL(N(loc, exp(x)^2) || N(m, s^2)) of one element, minus log(s) - 1/2; rate = 1 / s^2. */
static inline float kl_term(float loc, float x, float m, float rate) {
    float d = loc - m;
    return 0.5f * rate * (exponential(2 * x) + d * d) - x;
}

/* The sum of the KL of the elements in [from, to). */
static double kl_sum(int64_t from, int64_t to, const float *loc, const float *log_scale, float m, float s) {
    float rate = 1 / (s * s), sum[LANES] = {0};
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) EACH_LANE sum[l] += kl_term(loc[i + l], log_scale[i + l], m, rate);
    for (int l = 0; i < to; i++, l++) sum[l] += kl_term(loc[i], log_scale[i], m, rate);
    double total = 0;
    EACH_LANE total += sum[l];
    return total + (double)(to - from) * (log((double)s) - 0.5);
}

/* For every site k: out[k] = the KL of elements offsets[k] to offsets[k + 1] - 1 from the prior N(m[k], s[k]^2).
   partial holds one double per CHUNK of a site, so that the order of summation does not depend on the threads. */
void pl_kl(int64_t sites, const int64_t *offsets, const float *loc, const float *log_scale, const float *m,
           const float *s, double *partial, float *out) {
    #pragma omp parallel
    {
        int64_t first = 0;
        for (int64_t k = 0; k < sites; k++) {
            int64_t chunks = CHUNKS(offsets[k + 1] - offsets[k]);
            #pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < chunks; c++) {
                int64_t from = offsets[k] + c * CHUNK;
                partial[first + c] = kl_sum(from, MIN(from + CHUNK, offsets[k + 1]), loc, log_scale, m[k], s[k]);
            }
            first += chunks;
        }
    }
    for (int64_t k = 0, first = 0; k < sites; k++) {
        double total = 0;
        int64_t chunks = CHUNKS(offsets[k + 1] - offsets[k]);
        for (int64_t c = 0; c < chunks; c++) total += partial[first + c];
        first += chunks;
        out[k] = (float)total;
    }
}

/* Gradients of loc and log_scale, given the gradient g[k] of each site's sample (NULL if there is none) and weight[k], that
   of each site's KL (weight is NULL without a KL):
   d/dloc = g + weight (loc - m) / s^2,  d/dlog_scale = g (w - loc) + weight (scale^2 / s^2 - 1).
   The noise need not be stored, since scale * noise = w - loc. */
void pl_sample_grad(int64_t sites, const int64_t *offsets, const float *const *g, const float *w, const float *loc,
                    const float *log_scale, const float *m, const float *s, const float *weight, float *g_loc,
                    float *g_log_scale) {
    #pragma omp parallel
    for (int64_t k = 0; k < sites; k++) {
        float b = weight ? weight[k] : 0, a = b / (s[k] * s[k]), centre = m[k];
        #pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < CHUNKS(offsets[k + 1] - offsets[k]); c++) {
            int64_t from = offsets[k] + c * CHUNK, to = MIN(from + CHUNK, offsets[k + 1]);
            if (weight) for (int64_t i = from; i < to; i++) {
                g_loc[i] = a * (loc[i] - centre);
                g_log_scale[i] = a * exponential(2 * log_scale[i]) - b;
            } else {
                memset(g_loc + from, 0, (to - from) * sizeof(float));
                memset(g_log_scale + from, 0, (to - from) * sizeof(float));
            }
            const float *gk = g[k] ? g[k] - offsets[k] : NULL;
            if (gk) for (int64_t i = from; i < to; i++) {
                g_loc[i] += gk[i];
                g_log_scale[i] += gk[i] * (w[i] - loc[i]);
            }
        }
    }
}

/* Gradients of loc and log_scale, given those of each site's mean, variance and KL:
   d/dloc = g_mean + weight (loc - m) / s^2,  d/dlog_scale = 2 scale^2 g_variance + weight (scale^2 / s^2 - 1). */
void pl_moments_grad(int64_t sites, const int64_t *offsets, const float *const *g_mean, const float *const *g_variance,
                     const float *loc, const float *log_scale, const float *m, const float *s, const float *weight,
                     float *g_loc, float *g_log_scale) {
    #pragma omp parallel
    for (int64_t k = 0; k < sites; k++) {
        float b = weight ? weight[k] : 0, a = b / (s[k] * s[k]), centre = m[k];
        const float *gm = g_mean[k] ? g_mean[k] - offsets[k] : NULL, *gv = g_variance[k] ? g_variance[k] - offsets[k] : NULL;
        #pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < CHUNKS(offsets[k + 1] - offsets[k]); c++) {
            int64_t from = offsets[k] + c * CHUNK, to = MIN(from + CHUNK, offsets[k + 1]);
            for (int64_t i = from; i < to; i++) g_loc[i] = weight ? a * (loc[i] - centre) : 0;
            if (gm) for (int64_t i = from; i < to; i++) g_loc[i] += gm[i];
            for (int64_t i = from; i < to; i++)
                g_log_scale[i] = exponential(2 * log_scale[i]) * (gv ? a + 2 * gv[i] : a) - b;
        }
    }
}

/* The last step of local reparameterization, in place: mean becomes mean + sqrt(variance) noise, and variance becomes the
   derivative of that by the variance, noise / (2 sqrt(variance)). Where the variance is 0, both terms are exactly 0. */
void pl_perturb(int64_t n, float *mean, float *variance, uint64_t seed) {
    #pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        int64_t from = b * BLOCK, count = MIN(BLOCK, n - from);
        float z[BLOCK], *x = mean + from, *v = variance + from;
        normals(seed, b, z);
        for (int64_t i = 0; i < count; i++) {
            float root = sqrtf(v[i] < TINY ? 0.0f : v[i]), inverse = v[i] < TINY ? 0.0f : 0.5f / root;
            x[i] += root * z[i];
            v[i] = inverse * z[i];
        }
    }
}

static inline float from_bf16(uint16_t x) { return bits_float((int32_t)((uint32_t)x << 16)); }
static inline uint16_t to_bf16(float x) {  /* to nearest, ties to even */
    uint32_t i = (uint32_t)float_bits(x), rounded = (i + 0x7fff + ((i >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

/* pl_perturb for bf16 tensors; noise and arithmetic are fp32. */
void pl_perturb_bf16(int64_t n, uint16_t *mean, uint16_t *variance, uint64_t seed) {
    #pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
        int64_t from = b * BLOCK, count = MIN(BLOCK, n - from);
        float z[BLOCK];
        uint16_t *x = mean + from, *y = variance + from;
        normals(seed, b, z);
        for (int64_t i = 0; i < count; i++) {
            float v = from_bf16(y[i]);
            float root = sqrtf(v < TINY ? 0.0f : v), inverse = v < TINY ? 0.0f : 0.5f / root;
            x[i] = to_bf16(from_bf16(x[i]) + root * z[i]);
            y[i] = to_bf16(inverse * z[i]);
        }
    }
}
