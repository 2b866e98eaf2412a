/* Ternary layers and a whole recurrent block of them for a few rows at a time (ops/ternary.py, ops/recurrent_block.py).

   T holds -1, 0, 1 in 2 bits each: four planes of a quarter of the columns share a byte, bits 0-1 of byte k hold column k,
   bits 2-3 column K/4 + k, and so on. Codes are T + 1 (0, 1, 2), so that T q = codes q - sum(q), exact in int32.

   Norms, exponentials and roundings are computed in double and rounded to float once, as torch does it elsewhere in
   evaluation: the two then give the same bits although they add in another order. Built with -ffp-contract=off. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define TOGETHER 4 /* rows at a time, which layers are padded to */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SIXTEEN /* rows at a time are worth it: there are registers for their sums */

/* Bits 2p and 2p+1 of every byte as 0 to 3; one instruction instead of two is a third of the time (213 -> 290 GMAC/s, Zen 5). */
#if defined(__GFNI__)
#define PLANE(packed, p) _mm512_gf2p8affine_epi64_epi8(packed, _mm512_set1_epi64(((uint64_t)(1u << (2 * (p))) << 56) | ((uint64_t)(2u << (2 * (p))) << 48)), 0)
#else
#define PLANE(packed, p) _mm512_and_si512(_mm512_srli_epi16(packed, 2 * (p)), _mm512_set1_epi8(3))
#endif

/* The sums of codes q over the columns of `rows` rows, each in 16 parts. */
INLINE void columns(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter, __m512i *parts, const int rows) {
    for (int r = 0; r < rows; r++) parts[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < quarter; k += 64) {
        __mmask64 here = quarter - k < 64 ? ((__mmask64)1 << (quarter - k)) - 1 : ~(__mmask64)0;
        __m512i plane[4];
        for (int p = 0; p < 4; p++) plane[p] = _mm512_maskz_loadu_epi8(here, q + p * quarter + k);
        for (int r = 0; r < rows; r++) {
            __m512i packed = _mm512_maskz_loadu_epi8(here, codes + r * quarter + k);
            parts[r] = _mm512_dpbusd_epi32(parts[r], _mm512_and_si512(packed, _mm512_set1_epi8(3)), plane[0]);
            parts[r] = _mm512_dpbusd_epi32(parts[r], PLANE(packed, 1), plane[1]);
            parts[r] = _mm512_dpbusd_epi32(parts[r], PLANE(packed, 2), plane[2]);
            parts[r] = _mm512_dpbusd_epi32(parts[r], PLANE(packed, 3), plane[3]);
        }
    }
}

INLINE __m512i added_32(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
INLINE __m512i added_64(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); }
INLINE __m512i added_128(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd)); }
/* Four rows' sums, in four parts that lie 128 bits apart. */
INLINE __m512i four_sums(const __m512i *parts) { return added_64(added_32(parts[0], parts[1]), added_32(parts[2], parts[3])); }

/* out = (codes q - total) factor for four rows. */
INLINE void four_rows(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter, int32_t total, float factor,
                      float *restrict out) {
    __m512i parts[4];
    columns(codes, q, quarter, parts, 4);
    __m512i four = four_sums(parts);
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_ps(out, _mm_mul_ps(_mm_cvtepi32_ps(_mm_sub_epi32(sums, _mm_set1_epi32(total))), _mm_set1_ps(factor)));
}

/* The same for 16 rows: they share the loads of q and one reduction, 9% faster than four at a time. */
INLINE void sixteen_rows(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter, int32_t total, float factor,
                         float *restrict out) {
    __m512i parts[16];
    columns(codes, q, quarter, parts, 16);
    __m512i sums = added_128(added_128(four_sums(parts), four_sums(parts + 4)), added_128(four_sums(parts + 8), four_sums(parts + 12)));
    sums = _mm512_sub_epi32(sums, _mm512_set1_epi32(total));
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(factor)));
}

#elif defined(__AVX2__)

static int32_t one_row(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter) {
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i parts = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 32 <= quarter; k += 32) {
        __m256i packed = _mm256_loadu_si256((const __m256i *)(codes + k));
        for (int plane = 0; plane < 4; plane++) {
            __m256i bits = _mm256_and_si256(packed, low);
            __m256i pairs = _mm256_maddubs_epi16(bits, _mm256_loadu_si256((const __m256i *)(q + plane * quarter + k)));
            parts = _mm256_add_epi32(parts, _mm256_madd_epi16(pairs, ones));
            packed = _mm256_srli_epi16(packed, 2);
        }
    }
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, parts);
    for (int lane = 0; lane < 8; lane++) sum += lanes[lane];
    for (; k < quarter; k++)
        for (int plane = 0; plane < 4; plane++) sum += ((codes[k] >> (2 * plane)) & 3) * q[plane * quarter + k];
    return sum;
}

/* out = (codes q - total) factor for four rows. */
INLINE void four_rows(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter, int32_t total, float factor,
                      float *restrict out) {
    for (int r = 0; r < TOGETHER; r++) out[r] = (float)(one_row(codes + r * quarter, q, quarter) - total) * factor;
}

#else

/* out = (codes q - total) factor for four rows. */
INLINE void four_rows(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter, int32_t total, float factor,
                      float *restrict out) {
    for (int r = 0; r < TOGETHER; r++) {
        int32_t sum = 0;
        for (int plane = 0; plane < 4; plane++)
            for (int64_t k = 0; k < quarter; k++) sum += ((codes[r * quarter + k] >> (2 * plane)) & 3) * q[plane * quarter + k];
        out[r] = (float)(sum - total) * factor;
    }
}

#endif

INLINE void some_rows(const uint8_t *codes, const int8_t *q, int64_t quarter, int32_t total, float factor, float *out, int64_t rows) {
    int64_t r = 0;
#ifdef SIXTEEN
    for (; r + 16 <= rows; r += 16) sixteen_rows(codes + r * quarter, q, quarter, total, factor, out + r);
#endif
    for (; r + TOGETHER <= rows; r += TOGETHER) four_rows(codes + r * quarter, q, quarter, total, factor, out + r);
    if (r == rows) return;
    float last[TOGETHER];
    four_rows(codes + r * quarter, q, quarter, total, factor, last);
    memcpy(out + r, last, (rows - r) * sizeof(float));
}

/* codes [rows padded to fours, quarter], q [4 quarter] -> out [rows] = T q factor. */
static __attribute__((noinline)) void product(const uint8_t *codes, const int8_t *q, float factor, float *out, int64_t rows,
                                              int64_t quarter, int threads) {
    int32_t total = 0;
    for (int64_t k = 0; k < 4 * quarter; k++) total += q[k];
    if (threads > 1 && rows * quarter > 65536) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t r = 0; r < rows; r += 64)
            some_rows(codes + r * quarter, q, quarter, total, factor, out + r, rows - r < 64 ? rows - r : 64);
    } else if (quarter == 128) { /* a width of 512: with the length known q stays in registers, 7% faster */
        some_rows(codes, q, 128, total, factor, out, rows);
    } else {
        some_rows(codes, q, quarter, total, factor, out, rows);
    }
}

/* ---- what lies between products ---- */

#define LANES 16
/* Adding it rounds a double of less than 2^51 to an integer, half to even, which then stands in the low bits. */
#define ROUNDING 6755399441055744.0 /* 1.5 * 2^52 */

static double root_mean_square(const float *restrict x, int64_t width, double eps) { /* its inverse */
    double squares[LANES] = {0}, sum = 0.0;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int j = 0; j < LANES; j++) squares[j] += (double)x[k + j] * x[k + j];
    for (; k < width; k++) squares[0] += (double)x[k] * x[k];
    for (int j = 0; j < LANES; j++) sum += squares[j];
    return 1.0 / sqrt(sum / (double)width + eps);
}

static void normed(const float *restrict x, const float *restrict weight, double eps, float *restrict out, int64_t width) {
    double r = root_mean_square(x, width, eps);
    for (int64_t k = 0; k < width; k++) out[k] = (float)(x[k] * r * weight[k]);
}

void rms_normed(const float *x, const float *weight, double eps, float *out, int64_t count, int64_t width) {
    for (int64_t c = 0; c < count; c++) normed(x + c * width, weight, eps, out + c * width, width);
}

/* exp to about 1e-15: 2^n times a polynomial of |r| <= ln 2 / 2; written so that compilers vectorise loops over it. */
static inline double exponential(double x) {
    x = x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x;
    double shifted = x * 1.4426950408889634 + ROUNDING; /* the low bits become round(x / ln 2) */
    int64_t bits;
    memcpy(&bits, &shifted, 8);
    double n = shifted - ROUNDING, r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    double y = 1.0 / 6227020800.0;
    y = y * r + 1.0 / 479001600.0;
    y = y * r + 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    bits = (int64_t)((uint64_t)(bits + 1023) << 52);
    double scale;
    memcpy(&scale, &bits, 8);
    return y * scale;
}

static inline float sigmoid(float x) { return (float)(1.0 / (1.0 + exponential(-(double)x))); }
static inline float silu(float x) { return (float)((double)x / (1.0 + exponential(-(double)x))); }

/* q = round(x r gain s), s = 127 / max|x r gain|, for a row of width floats; q has 4 quarter columns. Gives s, which is NaN
   where x is not finite: the products then are NaN too, as torch's are. |q| <= 127 without a clamp, as x r gain s exceeds 127
   by its roundings at most. */
static double quantized(const float *restrict x, double r, const float *restrict gain, double smallest, int8_t *restrict q, int64_t width, int64_t padded) {
    double largest = smallest;
#pragma omp simd reduction(max : largest)
    for (int64_t k = 0; k < width; k++) {
        double n = fabs(x[k] * r * gain[k]);
        largest = n > largest ? n : largest;
    }
    double s = r > 0.0 ? 127.0 / largest : NAN; /* r is 0 for an infinite x */
    for (int64_t k = 0; k < width; k++) {
        double n = x[k] * r * gain[k] * s + ROUNDING;
        int64_t bits;
        memcpy(&bits, &n, 8);
        q[k] = (int8_t)bits; /* three times as fast as rint and two comparisons */
    }
    for (int64_t k = width; k < padded; k++) q[k] = 0;
    return s;
}

struct layer {
    const uint8_t *codes; /* [rows padded to fours, quarter] */
    const float *gain;    /* [width] */
    int64_t width, rows, quarter;
    float scale; /* a = mean|W| */
};

struct setting {
    double eps;      /* of a layer's own norm */
    double smallest; /* of max|n| */
    int threads;
};

/* n of `size` bytes begin 64 bytes apart in a buffer, so that loads cross no cache lines. */
static int64_t lines(int64_t n, int64_t size) { return (n * size + 63) / 64 * 64; }

/* y [rows] = T q a / s for one row x; r: the inverse root mean square of x. */
static void layer_of(const struct layer *l, const float *x, double r, float *y, const struct setting *how, int8_t *q) {
    double s = quantized(x, r, l->gain, how->smallest, q, l->width, 4 * l->quarter);
    product(l->codes, q, (float)(l->scale / s), y, l->rows, l->quarter, how->threads);
}

/* x [count, width] -> y [count, rows]; -1 when there is no memory. */
int ternary_layer(const struct layer *l, const struct setting *how, const float *x, float *y, int64_t count) {
    int8_t few[4096] __attribute__((aligned(64))), *q = few;
    int64_t size = lines(4 * l->quarter, 1);
    if (size > (int64_t)sizeof(few) && !(q = aligned_alloc(64, size))) return -1;
    for (int64_t c = 0; c < count; c++, x += l->width, y += l->rows)
        layer_of(l, x, root_mean_square(x, l->width, how->eps), y, how, q);
    if (q != few) free(q);
    return 0;
}

/* The roundings alone, for many rows whose product is made elsewhere. */
void normed_quantized(const float *x, const float *gain, const struct setting *how, int8_t *q, double *scale, int64_t count,
                      int64_t width) {
#pragma omp parallel for schedule(static) num_threads(how->threads) if (how->threads > 1 && count * width > 65536)
    for (int64_t c = 0; c < count; c++) {
        const float *row = x + c * width;
        scale[c] = quantized(row, root_mean_square(row, width, how->eps), gain, how->smallest, q + c * width, width, width);
    }
}

/* ---- one position of a recurrent block ---- */

struct block {
    struct layer forget, input, gate, out, gate_up, down;
    const float *norm, *mlp_norm, *inner_norm; /* weights of the two norms before the halves, and of the recurrence's own */
    const float *bound;                        /* [inner], what the gate is at least, or NULL */
    double eps;
    int64_t heads;
    int32_t norm_of_hidden; /* o = norm(h) silu(G x) instead of norm(G x) silu(h) */
};

/* x [count, width] and hidden [count, inner] move one position on where token_mask says so. */
int recurrent_block(const struct block *b, const struct setting *how, float *x, float *hidden, const uint8_t *token_mask, int64_t count) {
    int64_t width = b->forget.width, inner = b->forget.rows, mlp = b->down.width, part = inner / b->heads;
    int64_t stream = lines(width, sizeof(float)), state = lines(inner, sizeof(float)), wide = lines(b->gate_up.rows, sizeof(float));
    int64_t q_size = lines(4 * (b->down.quarter + b->out.quarter + b->forget.quarter), 1);
    char *work = aligned_alloc(64, 2 * stream + 3 * state + wide + q_size);
    if (!work) return -1;
    float *n = (float *)work, *y = (float *)(work + stream), *f = (float *)(work + 2 * stream);
    float *i = (float *)((char *)f + state), *g = (float *)((char *)i + state), *up = (float *)((char *)g + state);
    int8_t *q = (int8_t *)up + wide;
    for (int64_t c = 0; c < count; c++, x += width, hidden += inner) {
        if (!token_mask[c]) continue;
        normed(x, b->norm, b->eps, n, width);
        double r = root_mean_square(n, width, how->eps); /* three layers of one input */
        layer_of(&b->forget, n, r, f, how, q);
        layer_of(&b->input, n, r, i, how, q);
        layer_of(&b->gate, n, r, g, how, q);
        for (int64_t k = 0; k < inner; k++) f[k] = sigmoid(f[k]);
        if (b->bound)
            for (int64_t k = 0; k < inner; k++) f[k] = b->bound[k] + (1.0f - b->bound[k]) * f[k];
        for (int64_t k = 0; k < inner; k++) hidden[k] = f[k] * hidden[k] + silu(i[k]) * (1.0f - f[k]);
        for (int64_t k = 0; k < inner; k++) i[k] = silu(b->norm_of_hidden ? g[k] : hidden[k]);
        const float *from = b->norm_of_hidden ? hidden : g;
        for (int64_t h = 0; h < inner; h += part) normed(from + h, b->inner_norm + h, b->eps, f + h, part);
        for (int64_t k = 0; k < inner; k++) f[k] = f[k] * i[k];
        layer_of(&b->out, f, root_mean_square(f, inner, how->eps), y, how, q);
        for (int64_t k = 0; k < width; k++) x[k] += y[k];
        normed(x, b->mlp_norm, b->eps, n, width);
        layer_of(&b->gate_up, n, root_mean_square(n, width, how->eps), up, how, q);
        for (int64_t k = 0; k < mlp; k++) up[k] = silu(up[k]) * up[mlp + k];
        layer_of(&b->down, up, root_mean_square(up, mlp, how->eps), y, how, q);
        for (int64_t k = 0; k < width; k++) x[k] += y[k];
    }
    free(work);
    return 0;
}
