/* Products of rows with packed weights (ops/packed_linear.py), for decoding.c.

   y = x W^T for x [R, K] in fp32. W [N, K] lies in panels of 64 outputs, k by k, so that one step over k reads one stretch of
   memory and needs no sum across a vector. A row's sum has one order (even k, odd k, then both together; in 4 bits by groups of
   32) whatever else is computed beside it: a row has the same bits alone and among others, on one thread or many.

   Formats: 0 fp32, 1 bf16, 2 int8 with a scale an output, 3 four bits: codes of a table of 16 values, low nibble k even, high
   nibble k odd, with an fp16 scale for each output and 32 k. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PANEL 64
#define LANES 16
#define VECTORS 4 /* of a panel */
#define GROUP 32
#define BLOCK 64      /* k of a panel that several rows read together: 16 KB in fp32 */
#define FEW_ROWS 31   /* that do so; more take so long to compute that weights arrive in time anyway */
#define AHEAD 32768   /* bytes before the weights are needed, they are asked for */
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

/* Stores what the sums of vector v of panel p are in the end: y [outputs] of one row. */
INLINE void finished(const struct matrix *m, int64_t p, int v, vector value, float *y, const int format) {
    const int64_t n = p * PANEL + v * LANES, left = m->outputs - n;
    float *at = y + n, lanes[LANES];
    if (format == 2) value *= loaded((const float *)m->scales + n);
    if (left >= LANES) {
        store(at, m->bias ? value + loaded(m->bias + n) : value);
    } else {
        store(lanes, value);
        for (int64_t i = 0; i < left; i++) at[i] = m->bias ? lanes[i] + m->bias[n + i] : lanes[i];
    }
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
    for (int v = 0; v < count; v++)
        for (int r = 0; r < rows; r++) finished(m, p, first + v, sums[r * count + v], y + r * out_stride, format);
}

/* ---- fp32 and bf16, which come from memory, times a few rows: block by block, while later blocks are on their way ---- */

/* One vector of a block times `rows` rows of x: added to their sums of even and of odd k, [rows, VECTORS, 2]. */
INLINE void tile(const uint8_t *block, const float *x, int64_t stride, int64_t count, int lane, vector *sums, const int rows,
                 const int format) {
    vector even[rows], odd[rows];
    for (int r = 0; r < rows; r++) even[r] = sums[r * 2 * VECTORS], odd[r] = sums[r * 2 * VECTORS + 1];
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
        vector w = weight(block, k, lane, format), u = weight(block, k + 1, lane, format);
        for (int r = 0; r < rows; r++) {
            even[r] = multiply_add(all(x[r * stride + k]), w, even[r]);
            odd[r] = multiply_add(all(x[r * stride + k + 1]), u, odd[r]);
        }
    }
    if (k < count)
        for (int r = 0; r < rows; r++) even[r] = multiply_add(all(x[r * stride + k]), weight(block, k, lane, format), even[r]);
    for (int r = 0; r < rows; r++) sums[r * 2 * VECTORS] = even[r], sums[r * 2 * VECTORS + 1] = odd[r];
}

INLINE void by_blocks(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride, const int format) {
    const int64_t in = m->inputs, size = format == 0 ? 4 : 2, lines = BLOCK * PANEL * size / 64;
    vector sums[FEW_ROWS * VECTORS * 2] __attribute__((aligned(64)));
    for (int64_t i = 0; i < rows * 2 * VECTORS; i++) sums[i] = zero();
    for (int64_t first = 0; first < in; first += BLOCK) {
        const int64_t count = in - first < BLOCK ? in - first : BLOCK;
        const uint8_t *block = (const uint8_t *)m->codes + (p * in + first) * PANEL * size;
        for (int v = 0; v < VECTORS; v++) {
            int64_t r = 0;
            for (int64_t line = v * lines / VECTORS; line < (v + 1) * lines / VECTORS; line++)
                __builtin_prefetch(block + AHEAD + line * 64, 0, 2); /* of this panel, or of a later one */
#define TILES(N)                     \
    for (; r + (N) <= rows; r += (N)) \
        tile(block, x + r * in + first, in, count, v * LANES, sums + (r * VECTORS + v) * 2, (N), format)
            TILES(ROWS);
#if ROWS > 4
            TILES(4);
            TILES(2);
#endif
            TILES(1);
#undef TILES
        }
    }
    for (int64_t i = 0; i < rows * VECTORS; i++)
        finished(m, p, (int)(i % VECTORS), sums[2 * i] + sums[2 * i + 1], y + i / VECTORS * out_stride, format);
}

INLINE void panel_of_format(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride,
                            const int format) {
    int64_t r = 0, in = m->inputs;
    if (format <= 1 && rows > 1 && rows <= FEW_ROWS) {
        by_blocks(m, p, x, y, rows, out_stride, format);
        return;
    }
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
