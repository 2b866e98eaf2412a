/* Products of a few rows with packed weights, and one whole decoding step of a dense transformer (ops/packed_linear.py,
   ops/dense_step.py).

   y = x W^T for x [R, K] in fp32. W [N, K] lies in panels of 64 outputs, k by k, so that one step over k reads one stretch of
   memory and needs no sum across a vector. A row's sum has one order (even k, odd k, then both together; in 4 bits by groups of
   32) whatever else is computed beside it: a row has the same bits alone and among others, on one thread or many.

   Formats: 0 fp32, 1 bf16, 2 int8 with a scale an output, 3 four bits: codes of a table of 16 values, low nibble k even, high
   nibble k odd, with an fp16 scale for each output and 32 k. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PANEL 64
#define LANES 16
#define VECTORS 4 /* of a panel */
#define GROUP 32
#define ALONE (1 << 18) /* multiplications, 6 microseconds: less is not worth waking threads for */
#if defined(__AVX512F__)
#define ROWS 8 /* that share a weight's conversion: 16 sums, or 24 in 4 bits, of 32 registers */
#else
#define ROWS 2 /* of 16 registers of half the width; more take four times as long to compile too */
#endif

typedef float vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1)));
typedef uint8_t codes16 __attribute__((vector_size(16), aligned(1)));

struct matrix {
    const void *codes;
    const void *scales;  /* int8: float [panels * 64]; 4 bits: fp16 [panels, K / 32, 64] */
    const float *table;  /* 4 bits: 16 values */
    const float *bias;   /* [N] or NULL */
    int64_t outputs, inputs, format;
};

INLINE vector zero(void) { return (vector){0}; }
#if defined(__AVX512F__)
INLINE vector all(float value) { return (vector)_mm512_set1_ps(value); }
INLINE vector multiply_add(vector a, vector b, vector c) { return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE float total(vector v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float largest(vector v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE vector higher(vector a, vector b) { return (vector)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vector lower(vector a, vector b) { return (vector)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vector looked_up(integers index, const vector *table) {
    return (vector)_mm512_permutexvar_ps((__m512i)index, (__m512)*table);
}
INLINE integers widened(const void *at) { return (integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); }
INLINE vector from_int8(const void *at) {
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
}
INLINE vector from_bf16(const void *at) {
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}
INLINE vector from_fp16(const void *at) { return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
#else
INLINE vector all(float value) { return value - (vector){0}; }
INLINE vector multiply_add(vector a, vector b, vector c) { return a * b + c; }
INLINE float total(vector v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}
INLINE float largest(vector v) {
    float most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
}
INLINE vector higher(vector a, vector b) {
    return (vector)(((integers)a & (a > b)) | ((integers)b & ~(a > b)));
}
INLINE vector lower(vector a, vector b) {
    return (vector)(((integers)a & (a < b)) | ((integers)b & ~(a < b)));
}
INLINE vector looked_up(integers index, const vector *table) {
    vector out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = (*table)[index[lane] & 15];
    return out;
}
INLINE integers widened(const void *at) { return __builtin_convertvector(*(const codes16 *)at, integers); }
INLINE vector from_int8(const void *at) { return __builtin_convertvector(*(const bytes *)at, vector); }
INLINE vector from_bf16(const void *at) { return (vector)(__builtin_convertvector(*(const halves *)at, integers) << 16); }
INLINE vector from_fp16(const void *at) {
    const uint16_t *half = at;
    vector out;
    for (int lane = 0; lane < LANES; lane++) {
#if defined(__F16C__)
        out[lane] = _cvtsh_ss(half[lane]);
#else
        int exponent = half[lane] >> 10 & 31, mantissa = half[lane] & 1023; /* scales are finite */
        float size = exponent ? ldexpf((float)(mantissa | 1024), exponent - 25) : ldexpf((float)mantissa, -24);
        out[lane] = half[lane] >> 15 ? -size : size;
#endif
    }
    return out;
}
#endif
INLINE vector loaded(const float *at) { return *(const vector *)at; }
INLINE void store(float *at, vector value) { *(vector *)at = value; }
/* ---- one panel, or one vector of it, times some rows ---- */

INLINE vector weight(const uint8_t *panel, int64_t k, int lane, const int format) {
    if (format == 0) return loaded((const float *)panel + k * PANEL + lane);
    if (format == 1) return from_bf16((const uint16_t *)panel + k * PANEL + lane);
    return from_int8((const int8_t *)panel + k * PANEL + lane);
}

/* `count` vectors from number `first` on of a panel, times `rows` rows of x, `stride` numbers apart. */
INLINE void simple(const uint8_t *panel, const float *x, int64_t stride, int64_t inputs, vector *sums, int first,
                   const int rows, const int count, const int format) {
    vector even[rows * count], odd[rows * count];
    for (int i = 0; i < rows * count; i++) even[i] = odd[i] = zero();
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2) {
        for (int v = 0; v < count; v++) {
            vector w = weight(panel, k, (first + v) * LANES, format), u = weight(panel, k + 1, (first + v) * LANES, format);
            for (int r = 0; r < rows; r++) {
                even[r * count + v] = multiply_add(all(x[r * stride + k]), w, even[r * count + v]);
                odd[r * count + v] = multiply_add(all(x[r * stride + k + 1]), u, odd[r * count + v]);
            }
        }
    }
    if (k < inputs)
        for (int v = 0; v < count; v++) {
            vector w = weight(panel, k, (first + v) * LANES, format);
            for (int r = 0; r < rows; r++) even[r * count + v] = multiply_add(all(x[r * stride + k]), w, even[r * count + v]);
        }
    for (int i = 0; i < rows * count; i++) sums[i] = even[i] + odd[i];
}

INLINE void grouped(const uint8_t *panel, const uint16_t *scales, const vector *table, const float *x, int64_t stride,
                    int64_t inputs, vector *sums, int first, const int rows, const int count) {
    vector whole[rows * count], values = *table;
    for (int i = 0; i < rows * count; i++) whole[i] = zero();
    for (int64_t g = 0; g < inputs / GROUP; g++) {
        vector even[rows * count], odd[rows * count];
        for (int i = 0; i < rows * count; i++) even[i] = odd[i] = zero();
        for (int64_t pair = g * GROUP / 2; pair < (g + 1) * GROUP / 2; pair++) {
            for (int v = 0; v < count; v++) {
                integers both = widened(panel + pair * PANEL + (first + v) * LANES);
                vector w = looked_up(both, &values), u = looked_up((integers)(both >> 4), &values);
                for (int r = 0; r < rows; r++) {
                    even[r * count + v] = multiply_add(all(x[r * stride + 2 * pair]), w, even[r * count + v]);
                    odd[r * count + v] = multiply_add(all(x[r * stride + 2 * pair + 1]), u, odd[r * count + v]);
                }
            }
        }
        for (int v = 0; v < count; v++) {
            vector scale = from_fp16(scales + g * PANEL + (first + v) * LANES);
            for (int r = 0; r < rows; r++)
                whole[r * count + v] = multiply_add(even[r * count + v] + odd[r * count + v], scale, whole[r * count + v]);
        }
    }
    for (int i = 0; i < rows * count; i++) sums[i] = whole[i];
}

INLINE void some(const struct matrix *m, int64_t p, const float *x, float *y, int64_t out_stride, int first, const int rows,
                 const int count, const int format) {
    vector sums[rows * count];
    const int64_t inputs = m->inputs;
    if (format == 3) {
        vector table = loaded(m->table);
        grouped((const uint8_t *)m->codes + p * PANEL * (inputs / 2), (const uint16_t *)m->scales + p * PANEL * (inputs / GROUP),
                &table, x, inputs, inputs, sums, first, rows, count);
    } else {
        const int64_t size = format == 0 ? 4 : format == 1 ? 2 : 1;
        simple((const uint8_t *)m->codes + p * PANEL * inputs * size, x, inputs, inputs, sums, first, rows, count, format);
    }
    for (int v = 0; v < count; v++) {
        const int64_t n = p * PANEL + (first + v) * LANES, left = m->outputs - n;
        for (int r = 0; r < rows; r++) {
            vector value = sums[r * count + v];
            if (format == 2) value *= loaded((const float *)m->scales + n);
            float *at = y + r * out_stride + n, lanes[LANES];
            if (left >= LANES) {
                store(at, m->bias ? value + loaded(m->bias + n) : value);
            } else {
                store(lanes, value);
                for (int64_t i = 0; i < left; i++) at[i] = m->bias ? lanes[i] + m->bias[n + i] : lanes[i];
            }
        }
    }
}

INLINE void panel_of_format(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride,
                            const int format) {
    int64_t r = 0, in = m->inputs;
    for (; r + ROWS <= rows; r += ROWS)
        for (int v = 0; v < VECTORS; v++) some(m, p, x + r * in, y + r * out_stride, out_stride, v, ROWS, 1, format);
#if ROWS > 4
    for (; r + 4 <= rows; r += 4)
        for (int v = 0; v < VECTORS; v++) some(m, p, x + r * in, y + r * out_stride, out_stride, v, 4, 1, format);
#endif
    for (; r + 2 <= rows; r += 2)
        for (int v = 0; v < VECTORS; v += 2) some(m, p, x + r * in, y + r * out_stride, out_stride, v, 2, 2, format);
    if (r < rows) some(m, p, x + r * in, y + r * out_stride, out_stride, 0, 1, VECTORS, format);
}

static void one_panel(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride) {
    if (m->format == 0) panel_of_format(m, p, x, y, rows, out_stride, 0);
    else if (m->format == 1) panel_of_format(m, p, x, y, rows, out_stride, 1);
    else if (m->format == 2) panel_of_format(m, p, x, y, rows, out_stride, 2);
    else panel_of_format(m, p, x, y, rows, out_stride, 3);
}

/* x [rows, inputs] -> y [rows, outputs]. */
void product(const struct matrix *m, const float *x, float *y, int64_t rows, int threads) {
    const int64_t panels = (m->outputs + PANEL - 1) / PANEL;
    if (m->outputs * m->inputs * rows < ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < panels; p++) one_panel(m, p, x, y, rows, m->outputs);
}

/* Rows [first, last) of W in fp32, [last - first, inputs]; first is a multiple of 64. */
void unpacked(const struct matrix *m, float *out, int64_t first, int64_t last, int threads) {
    const int64_t in = m->inputs, panels = (last - first + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < panels; i++) {
        const int64_t p = first / PANEL + i, n = p * PANEL, count = last - n < PANEL ? last - n : PANEL;
        float values[PANEL], blocked[PANEL][LANES];
        for (int64_t k = 0; k < in; k++) {
            for (int v = 0; v < VECTORS; v++) {
                vector w;
                if (m->format == 3) {
                    vector table = loaded(m->table);
                    integers both = widened((const uint8_t *)m->codes + (p * (in / 2) + k / 2) * PANEL + v * LANES);
                    w = looked_up(k % 2 ? (integers)(both >> 4) : both, &table);
                    w *= from_fp16((const uint16_t *)m->scales + (p * (in / GROUP) + k / GROUP) * PANEL + v * LANES);
                } else {
                    const int64_t size = m->format == 0 ? 4 : m->format == 1 ? 2 : 1;
                    w = weight((const uint8_t *)m->codes + p * PANEL * in * size, k, v * LANES, (int)m->format);
                    if (m->format == 2) w *= loaded((const float *)m->scales + n + v * LANES);
                }
                store(values + v * LANES, w);
            }
            /* Sixteen k of an output are written together: one at a time, each would touch a cache line of its own. */
            for (int r = 0; r < PANEL; r++) blocked[r][k % LANES] = values[r];
            if (k % LANES == LANES - 1 || k == in - 1)
                for (int64_t r = 0; r < count; r++)
                    memcpy(out + (n - first + r) * in + k / LANES * LANES, blocked[r], (size_t)(k % LANES + 1) * sizeof(float));
        }
    }
}

/* ---- one decoding step of a dense transformer ---- */

struct layer {
    struct matrix qkv, out, gate_up, down; /* rows of qkv: queries, keys, values; of gate_up: gates, then ups */
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm; /* the last two [head_width], or NULL */
};

struct decoder {
    const struct layer *layers;
    struct matrix head;
    const float *embedding, *norm, *cosines, *sines; /* angles [places, turned / 2] */
    int64_t count, width, inner, heads, groups, head_width, turned, slots; /* slots of a row in a cache */
    float eps, scale;
};

/* e^x with an error of 2 units in the last place: 2^n by shifting the exponent, e^r for |r| <= log(2) / 2 by its series to
   r^7 / 7!. */
INLINE vector exponential(vector x) {
    x = lower(higher(x, all(-87.0f)), all(88.0f));
    vector shift = all(12582912.0f), turns = multiply_add(x, all(1.44269504f), shift);
    integers n = (integers)turns - (integers)shift;
    turns = turns - shift;
    vector r = multiply_add(turns, all(-0.693359375f), x);
    r = multiply_add(turns, all(2.12194440e-4f), r);
    vector y = all(1.0f / 5040);
    y = multiply_add(y, r, all(1.0f / 720));
    y = multiply_add(y, r, all(1.0f / 120));
    y = multiply_add(y, r, all(1.0f / 24));
    y = multiply_add(y, r, all(1.0f / 6));
    y = multiply_add(y, r, all(0.5f));
    y = multiply_add(y, r, all(1.0f));
    y = multiply_add(y, r, all(1.0f));
    return (vector)((integers)y + (n << 23));
}

/* x / rms(x) * gain; width a multiple of 16. */
INLINE void normed(const float *x, const float *gain, float eps, float *y, int64_t width) {
    vector squares = zero();
    for (int64_t i = 0; i < width; i += LANES) squares = multiply_add(loaded(x + i), loaded(x + i), squares);
    vector factor = all(1.0f / sqrtf(total(squares) / (float)width + eps));
    for (int64_t i = 0; i < width; i += LANES) store(y + i, loaded(x + i) * factor * loaded(gain + i));
}

INLINE void turn(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cosine[i] - second * sine[i];
        x[half + i] = second * cosine[i] + first * sine[i];
    }
}

/* Softmax over the first `used` keys; scores has room for used + 15 numbers. */
static void attend(const float *q, const float *keys, const float *values, int64_t used, int64_t width, float scale,
                   float *scores, float *y) {
    const int64_t padded = (used + LANES - 1) / LANES * LANES;
    for (int64_t s = 0; s < used; s++) {
        vector sum = zero();
        for (int64_t i = 0; i < width; i += LANES) sum = multiply_add(loaded(q + i), loaded(keys + s * width + i), sum);
        scores[s] = total(sum) * scale;
    }
    for (int64_t s = used; s < padded; s++) scores[s] = -INFINITY;
    vector most = all(-INFINITY), sum = zero();
    for (int64_t s = 0; s < padded; s += LANES) most = higher(most, loaded(scores + s));
    most = all(largest(most));
    for (int64_t s = 0; s < padded; s += LANES) {
        vector share = exponential(loaded(scores + s) - most);
        store(scores + s, share);
        if (s + LANES > used)
            for (int64_t i = used; i < padded; i++) scores[i] = 0;
        sum += loaded(scores + s);
    }
    const float factor = 1.0f / total(sum);
    for (int64_t i = 0; i < width; i += LANES) {
        vector even = zero(), odd = zero();
        int64_t s = 0;
        for (; s + 2 <= used; s += 2) {
            even = multiply_add(all(scores[s]), loaded(values + s * width + i), even);
            odd = multiply_add(all(scores[s + 1]), loaded(values + (s + 1) * width + i), odd);
        }
        if (s < used) even = multiply_add(all(scores[s]), loaded(values + s * width + i), even);
        store(y + i, (even + odd) * factor);
    }
}

#define QUERIES 32 /* of a prompt that read a panel of 64 keys together */

/* x [ROWS, inputs], rows `stride` apart, times 16 columns of a panel [inputs, width], added to y [ROWS, width]. */
INLINE void block_of_rows(const float *x, int64_t stride, const float *panel, int64_t inputs, int64_t width, float *y) {
    vector even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; r++) even[r] = loaded(y + r * width), odd[r] = zero();
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2) {
        vector w = loaded(panel + k * width), u = loaded(panel + (k + 1) * width);
        for (int r = 0; r < ROWS; r++) {
            even[r] = multiply_add(all(x[r * stride + k]), w, even[r]);
            odd[r] = multiply_add(all(x[r * stride + k + 1]), u, odd[r]);
        }
    }
    if (k < inputs)
        for (int r = 0; r < ROWS; r++) even[r] = multiply_add(all(x[r * stride + k]), loaded(panel + k * width), even[r]);
    for (int r = 0; r < ROWS; r++) store(y + r * width, even[r] + odd[r]);
}

/* Softmax over earlier positions and their own for `count` <= QUERIES queries from position `start` on, key panel by key panel
   (Milakov & Gimelshein 2018, arXiv 1805.02867): the sums so far shrink when a larger score is met. panels: keys [S / 64,
   width, 64]; scratch: QUERIES * (2 width + 64) numbers. */
static void attend_together(const float *q, int64_t stride, const float *panels, const float *values, int64_t start, int64_t count,
                            int64_t width, float scale, float *y, int64_t out_stride, float *scratch) {
    float *own = scratch, *sums = own + QUERIES * width, *scores = sums + QUERIES * width, most[QUERIES], whole[QUERIES];
    for (int64_t r = 0; r < QUERIES; r++) {
        most[r] = -INFINITY, whole[r] = 0;
        for (int64_t i = 0; i < width; i++) own[r * width + i] = r < count ? q[r * stride + i] * scale : 0;
    }
    memset(sums, 0, sizeof(float) * (size_t)(QUERIES * width));
    const int64_t rows = (count + ROWS - 1) / ROWS * ROWS, keys = start + count;
    for (int64_t first = 0; first < keys; first += PANEL) {
        const float *panel = panels + first * width;
        const int64_t here = keys - first < PANEL ? keys - first : PANEL;
        memset(scores, 0, sizeof(float) * (size_t)(rows * PANEL));
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int v = 0; v < VECTORS; v++) block_of_rows(own + r * width, width, panel + v * LANES, width, PANEL, scores + r * PANEL + v * LANES);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * PANEL;
            for (int64_t s = start + r - first + 1 > 0 ? start + r - first + 1 : 0; s < PANEL; s++) row[s] = -INFINITY;
            vector high = loaded(row);
            for (int v = 1; v < VECTORS; v++) high = higher(high, loaded(row + v * LANES));
            const float top = largest(high), now = top > most[r] ? top : most[r];
            vector added = zero(), shift = all(now);
            for (int v = 0; v < VECTORS; v++) {
                vector score = loaded(row + v * LANES), share = exponential(score - shift);
                share = (vector)((integers)share & (integers)(score > all(-INFINITY)));
                store(row + v * LANES, share);
                added += share;
            }
            if (now > most[r]) {
                const vector factor = exponential(all(most[r] - now));
                whole[r] *= factor[0];
                for (int64_t i = 0; i < width; i += LANES) store(sums + r * width + i, loaded(sums + r * width + i) * factor);
                most[r] = now;
            }
            whole[r] += total(added);
        }
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t i = 0; i < width; i += LANES)
                block_of_rows(scores + r * PANEL, PANEL, values + first * width + i, here, width, sums + r * width + i);
    }
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < width; i += LANES) store(y + r * out_stride + i, loaded(sums + r * width + i) * all(1.0f / whole[r]));
}

/* Attention of positions start.. of one row: q and y [count, heads * width], rows `stride` and `out_stride` numbers apart; keys and
   values [groups, slots, width] of the row. Nonzero: no memory. */
int prompt_attention(const float *q, int64_t stride, const float *keys, const float *values, int64_t slots, int64_t start, int64_t count,
                     int64_t heads, int64_t groups, int64_t width, float scale, float *y, int64_t out_stride, int threads) {
    const int64_t panels = (start + count + PANEL - 1) / PANEL, blocks = (count + QUERIES - 1) / QUERIES, crew = threads > 1 ? threads : 1;
    const int64_t room = QUERIES * (2 * width + PANEL);
    float *turned = malloc(sizeof(float) * (size_t)(groups * panels * PANEL * width + crew * room));
    if (turned == NULL) return 1;
    float *scratch = turned + groups * panels * PANEL * width;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t job = 0; job < groups * panels; job++) {
        const int64_t g = job / panels, first = job % panels * PANEL;
        float *panel = turned + job * PANEL * width;
        for (int64_t s = 0; s < PANEL; s++)
            for (int64_t i = 0; i < width; i++)
                panel[i * PANEL + s] = first + s < start + count ? keys[(g * slots + first + s) * width + i] : 0;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t thread = 0; thread < crew; thread++)
        for (int64_t job = thread; job < heads * blocks; job += crew) {
            const int64_t h = job / blocks, from = job % blocks * QUERIES, g = h / (heads / groups);
            const int64_t some = count - from < QUERIES ? count - from : QUERIES;
            attend_together(q + from * stride + h * width, stride, turned + g * panels * PANEL * width, values + g * slots * width,
                            start + from, some, width, scale, y + from * out_stride + h * width, out_stride, scratch + thread * room);
        }
    free(turned);
    return 0;
}

/* Tokens ids [count], each of row rows[i] at position positions[i]; the earlier ones of a row are in its cache, or before it
   here. keys, values: for each layer [batch, groups, slots, head_width]. -> hidden [count, width] after the last norm and, unless
   NULL, logits [count, vocabulary]. prompt: they are consecutive tokens of one row, which attend together (with other last bits
   than one by one), and the outcome is that of the last one alone. Nonzero: no memory. */
int decoding_step(const struct decoder *d, float *const *keys, float *const *values, const int64_t *ids, const int64_t *rows,
                  const int64_t *positions, int64_t count, int prompt, float *hidden, float *logits, int threads) {
    const int64_t width = d->width, e = d->head_width, queries = d->heads * e, shared = d->groups * e, all_three = queries + 2 * shared;
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++) longest = positions[i] > longest ? positions[i] : longest;
    const int64_t room = (longest + 1 + LANES) / LANES * LANES + LANES;
    const int64_t crew = threads > 1 && count * queries * (longest + 1) >= ALONE ? threads : 1;
    const int64_t wide = all_three > 2 * d->inner ? all_three : 2 * d->inner, mixed = queries > d->inner ? queries : d->inner;
    float *memory = malloc(sizeof(float) * (size_t)(count * (2 * width + wide + mixed) + crew * room));
    if (memory == NULL) return 1;
    float *x = memory, *y = x + count * width, *made = y + count * width, *joined = made + count * wide, *scores = joined + count * mixed;
    for (int64_t i = 0; i < count; i++) memcpy(x + i * width, d->embedding + ids[i] * width, sizeof(float) * (size_t)width);
    for (int64_t number = 0; number < d->count; number++) {
        const struct layer *layer = d->layers + number;
        float *all_keys = keys[number], *all_values = values[number];
        for (int64_t i = 0; i < count; i++) normed(x + i * width, layer->attention_norm, d->eps, y + i * width, width);
        product(&layer->qkv, y, made, count, threads);
        for (int64_t i = 0; i < count; i++) {
            float *row = made + i * all_three;
            const float *cosine = d->cosines + positions[i] * (d->turned / 2), *sine = d->sines + positions[i] * (d->turned / 2);
            for (int64_t h = 0; h < d->heads + d->groups; h++) {
                const float *gain = h < d->heads ? layer->query_norm : layer->key_norm;
                if (gain != NULL) normed(row + h * e, gain, d->eps, row + h * e, e);
                turn(row + h * e, cosine, sine, d->turned / 2);
            }
            for (int64_t g = 0; g < d->groups; g++) {
                const int64_t at = ((rows[i] * d->groups + g) * d->slots + positions[i]) * e;
                memcpy(all_keys + at, row + queries + g * e, sizeof(float) * (size_t)e);
                memcpy(all_values + at, row + queries + shared + g * e, sizeof(float) * (size_t)e);
            }
        }
        if (prompt && number + 1 == d->count) { /* what follows the last keys and values matters for the last token alone */
            const int64_t before = count - 1;
            memmove(x, x + before * width, sizeof(float) * (size_t)width);
            memmove(made, made + before * all_three, sizeof(float) * (size_t)all_three);
            rows += before, positions += before, count = 1, prompt = 0;
        }
        const int64_t repeat = d->heads / d->groups, own = rows[0] * d->groups * d->slots * e;
        if (prompt && prompt_attention(made, all_three, all_keys + own, all_values + own, d->slots, positions[0], count, d->heads,
                                       d->groups, e, d->scale, joined, queries, threads))
            return free(memory), 1;
#pragma omp parallel for num_threads((int)crew) if (crew > 1) schedule(static)
        for (int64_t thread = 0; thread < (prompt ? 0 : crew); thread++)
            for (int64_t job = count * d->heads * thread / crew; job < count * d->heads * (thread + 1) / crew; job++) {
                const int64_t i = job / d->heads, h = job % d->heads;
                const int64_t at = (rows[i] * d->groups + h / repeat) * d->slots * e;
                attend(made + i * all_three + h * e, all_keys + at, all_values + at, positions[i] + 1, e, d->scale,
                       scores + thread * room, joined + i * queries + h * e);
            }
        product(&layer->out, joined, y, count, threads);
        for (int64_t i = 0; i < count * width; i += LANES) store(x + i, loaded(x + i) + loaded(y + i));
        for (int64_t i = 0; i < count; i++) normed(x + i * width, layer->mlp_norm, d->eps, y + i * width, width);
        product(&layer->gate_up, y, made, count, threads);
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < d->inner; k += LANES) {
                vector gate = loaded(made + i * 2 * d->inner + k), up = loaded(made + i * 2 * d->inner + d->inner + k);
                store(joined + i * d->inner + k, gate / (all(1.0f) + exponential(-gate)) * up);
            }
        product(&layer->down, joined, y, count, threads);
        for (int64_t i = 0; i < count * width; i += LANES) store(x + i, loaded(x + i) + loaded(y + i));
    }
    for (int64_t i = 0; i < count; i++) normed(x + i * width, d->norm, d->eps, hidden + i * width, width);
    if (logits != NULL) product(&d->head, hidden, logits, count, threads);
    free(memory);
    return 0;
}
