/* Products of rows with packed weights (ops/packed_linear.py), for decoding.c.

   y = x W^T for x [R, K] in fp32. W [N, K] lies in panels of 64 outputs, k by k, so that one step over k reads one stretch of
   memory and needs no sum across a vector. A row's sum has one order (even k, odd k, then both together; in 4 bits by groups of
   32) whatever else is computed beside it: a row has the same bits alone and among others, on one thread or many.

   Formats: 0 fp32, 1 bf16, 2 int8 with a scale an output, 3 four bits: codes of a table of 16 values, low nibble k even, high
   nibble k odd, with an fp16 scale for each output and 32 k. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PANEL 64
#if defined(__AVX512F__)
#define LANES 16 /* floats in a register */
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define VECTORS (PANEL / LANES)
#define GROUP 32
#define BLOCK 64      /* k of a panel that rows read together: 16 KB in fp32 */
#define AHEAD 16384   /* bytes before the weights are needed, they are asked for */
#define MOST_ROWS 128 /* that are multiplied at once */
#define NUMBERS 65536 /* of them, so that they stay in a cache of the second level: 256 KB */
#if defined(__AVX512F__)
#define ROWS 8 /* times two vectors of weights: 16 sums of 32 registers */
#else
#define ROWS 4 /* of 16 registers, with what they are multiplied by */
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef uint8_t codes __attribute__((vector_size(LANES), aligned(1)));

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
INLINE vector totals(const vector *v) { /* of sixteen vectors, each in one order: a third of the work of one after the other */
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512 first = (__m512)v[2 * i], second = (__m512)v[2 * i + 1];
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(first, second), _mm512_unpackhi_ps(first, second));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d first = (__m512d)a[2 * i], second = (__m512d)a[2 * i + 1];
        b[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(first, second), (__m512)_mm512_unpackhi_pd(first, second));
    }
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return (vector)_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
INLINE float largest(vector v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE vector higher(vector a, vector b) { return (vector)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vector lower(vector a, vector b) { return (vector)_mm512_min_ps((__m512)a, (__m512)b); }
typedef vector table; /* of 16 numbers */
INLINE table read_table(const float *at) { return *(const vector *)at; }
INLINE vector looked_up(integers index, const table *numbers) { /* by the low four bits of each */
    return (vector)_mm512_permutexvar_ps((__m512i)index, (__m512)*numbers);
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
#if defined(__FMA__)
INLINE vector multiply_add(vector a, vector b, vector c) { return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE vector multiply_add(vector a, vector b, vector c) { return a * b + c; }
#endif
INLINE float total(vector v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}
INLINE vector totals(const vector *v) {
    vector out;
    for (int i = 0; i < LANES; i++) out[i] = total(v[i]);
    return out;
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
#if defined(__AVX2__)
typedef struct { __m256 low, high; } table; /* of 16 numbers */
INLINE table read_table(const float *at) { return (table){_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
INLINE vector looked_up(integers index, const table *numbers) { /* by the low four bits of each: three of them, and the sign of the blend */
    const __m256 low = _mm256_permutevar8x32_ps(numbers->low, (__m256i)index), high = _mm256_permutevar8x32_ps(numbers->high, (__m256i)index);
    return (vector)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
INLINE integers widened(const void *at) { return (integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)); }
INLINE vector from_int8(const void *at) { return (vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at))); }
INLINE vector from_bf16(const void *at) {
    return (vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
}
#else
typedef const float *table;
INLINE table read_table(const float *at) { return at; }
INLINE vector looked_up(integers index, const table *numbers) {
    vector out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = (*numbers)[index[lane] & 15];
    return out;
}
INLINE integers widened(const void *at) { return __builtin_convertvector(*(const codes *)at, integers); }
INLINE vector from_int8(const void *at) { return __builtin_convertvector(*(const bytes *)at, vector); }
INLINE vector from_bf16(const void *at) { return (vector)(__builtin_convertvector(*(const halves *)at, integers) << 16); }
#endif
#if defined(__F16C__) && defined(__AVX__)
INLINE vector from_fp16(const void *at) { return (vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
#else
INLINE vector from_fp16(const void *at) {
    const uint16_t *half = at;
    vector out;
    for (int lane = 0; lane < LANES; lane++) {
        int exponent = half[lane] >> 10 & 31, mantissa = half[lane] & 1023; /* scales are finite */
        float size = exponent ? ldexpf((float)(mantissa | 1024), exponent - 25) : ldexpf((float)mantissa, -24);
        out[lane] = half[lane] >> 15 ? -size : size;
    }
    return out;
}
#endif
#endif
INLINE vector loaded(const float *at) { return *(const vector *)at; }
INLINE void store(float *at, vector value) { *(vector *)at = value; }
/* ---- a panel times one row ---- */

INLINE vector weight(const uint8_t *panel, int64_t k, int lane, const int format) {
    if (format == 0) return loaded((const float *)panel + k * PANEL + lane);
    if (format == 1) return from_bf16((const uint16_t *)panel + k * PANEL + lane);
    return from_int8((const int8_t *)panel + k * PANEL + lane);
}

/* A panel times one row of x, a weight read once: memory is what takes time. */
INLINE void simple(const uint8_t *panel, const float *x, int64_t inputs, vector *sums, const int format) {
    vector even[VECTORS], odd[VECTORS];
    for (int v = 0; v < VECTORS; v++) even[v] = odd[v] = zero();
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2)
        for (int v = 0; v < VECTORS; v++) {
            even[v] = multiply_add(all(x[k]), weight(panel, k, v * LANES, format), even[v]);
            odd[v] = multiply_add(all(x[k + 1]), weight(panel, k + 1, v * LANES, format), odd[v]);
        }
    if (k < inputs)
        for (int v = 0; v < VECTORS; v++) even[v] = multiply_add(all(x[k]), weight(panel, k, v * LANES, format), even[v]);
    for (int v = 0; v < VECTORS; v++) sums[v] = even[v] + odd[v];
}

INLINE void grouped(const uint8_t *panel, const uint16_t *scales, const table *levels, const float *x, int64_t inputs, vector *sums) {
    const table values = *levels;
    for (int v = 0; v < VECTORS; v++) sums[v] = zero();
    for (int64_t g = 0; g < inputs / GROUP; g++) {
        vector even[VECTORS], odd[VECTORS];
        for (int v = 0; v < VECTORS; v++) even[v] = odd[v] = zero();
        for (int64_t pair = g * GROUP / 2; pair < (g + 1) * GROUP / 2; pair++)
            for (int v = 0; v < VECTORS; v++) {
                integers both = widened(panel + pair * PANEL + v * LANES);
                even[v] = multiply_add(all(x[2 * pair]), looked_up(both, &values), even[v]);
                odd[v] = multiply_add(all(x[2 * pair + 1]), looked_up((integers)(both >> 4), &values), odd[v]);
            }
        for (int v = 0; v < VECTORS; v++)
            sums[v] = multiply_add(even[v] + odd[v], from_fp16(scales + g * PANEL + v * LANES), sums[v]);
    }
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

INLINE const uint8_t *codes_of(const struct matrix *m, int64_t p, const int format) {
    const int64_t halves_a_code = format == 0 ? 8 : format == 1 ? 4 : format == 2 ? 2 : 1;
    return (const uint8_t *)m->codes + p * PANEL * m->inputs * halves_a_code / 2;
}

INLINE const uint16_t *scales_of(const struct matrix *m, int64_t p) { return (const uint16_t *)m->scales + p * PANEL * (m->inputs / GROUP); }

INLINE void one_row(const struct matrix *m, int64_t p, const float *x, float *y, const int format) {
    vector sums[VECTORS];
    if (format == 3) {
        const table levels = read_table(m->table);
        grouped(codes_of(m, p, format), scales_of(m, p), &levels, x, m->inputs, sums);
    } else {
        simple(codes_of(m, p, format), x, m->inputs, sums, format);
    }
    for (int v = 0; v < VECTORS; v++) finished(m, p, v, sums[v], y, format);
}

/* ---- a panel times several rows: block by block, each converted to fp32 once, while later blocks are on their way ---- */

/* Rows that are multiplied together: their sums by two vectors of weights, or by four, stay in registers. */
INLINE int64_t together(int64_t left) { return left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Rows x [rows, inputs] so that those multiplied together lie k by k: one of them is broadcast from one stretch of memory. */
static void interleaved(const float *x, int64_t rows, int64_t inputs, float *out) {
    for (int64_t r = 0, count; r < rows; r += count) {
        count = together(rows - r);
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < inputs; k++) out[r * inputs + k * count + i] = x[(r + i) * inputs + k];
    }
}

/* Every second k of a block [count, 64] in fp32, `vectors` vectors of it, times `rows` interleaved rows of x: added to sums [rows, 4, 2],
   of which the first half is of even k and the second of odd k. One half after the other, as there are registers for one. */
INLINE void half(const float *block, const float *x, int64_t count, vector *sums, const uint8_t *later, const int rows, const int vectors,
                 const int lines) {
    vector sum[16], w[4];
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++) sum[i] = sums[(i / vectors * VECTORS + i % vectors) * 2];
    for (int64_t k = 0; k < count; k += 2) {
#pragma GCC unroll 4
        for (int line = 0; line < lines; line++) __builtin_prefetch(later + k / 2 * 64 * lines + line * 64, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) w[v] = loaded(block + k * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vector one = all(x[k * rows + r]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r * vectors + v] = multiply_add(one, w[v], sum[r * vectors + v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++) sums[(i / vectors * VECTORS + i % vectors) * 2] = sum[i];
}

INLINE void both_halves(const float *block, const float *x, int64_t count, vector *sums, const uint8_t *later, const int rows,
                        const int vectors, const int lines) {
    for (int v = 0; v < VECTORS; v += vectors) {
        const uint8_t *own = later + v * lines * BLOCK / vectors * 64;
        half(block + v * LANES, x, count, sums + 2 * v, own, rows, vectors, lines);
        half(block + v * LANES + PANEL, x + rows, count - 1, sums + 2 * v + 1, own + lines * BLOCK / 2 * 64, rows, vectors, lines);
    }
}

/* A block of `count` k from number `first` on times all rows x, interleaved. lines: cache lines from `later` on that are asked for
   meanwhile, some at each step of the first group, or of the first two. */
INLINE void times_rows(const float *block, const float *x, int64_t inputs, int64_t first, int64_t count, vector *sums, int64_t rows,
                       const uint8_t *later, const int lines) {
    int64_t r = 0;
    const int steps = BLOCK * VECTORS / 2; /* of a group by two vectors */
    if (lines > steps && rows >= 2 * ROWS)
        for (; r < 2 * ROWS; r += ROWS)
            both_halves(block, x + r * inputs + first * ROWS, count, sums + r * VECTORS * 2, later + r / ROWS * steps * 64, ROWS, 2,
                        lines / steps / 2);
#define GROUPS(N, V)                                                                                             \
    for (; r + (N) <= rows; r += (N))                                                                            \
        if (r == 0) both_halves(block, x + first * (N), count, sums, later, (N), (V), lines * (V) / (2 * steps)); \
        else both_halves(block, x + r * inputs + first * (N), count, sums + r * VECTORS * 2, later, (N), (V), 0);
    GROUPS(ROWS, 2)
#if ROWS > 4
    GROUPS(4, 2)
#endif
    GROUPS(2, 4)
    GROUPS(1, 4)
#undef GROUPS
}

/* x interleaved; rows <= MOST_ROWS. What comes from memory (fp32 and bf16) is asked for between multiplications: asked for a block at
   once, it kept 16 rows of fp32 waiting for a third of their time. */
INLINE void several_rows(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride, const int format) {
    const int64_t in = m->inputs, size = format == 3 ? GROUP : BLOCK;
    const uint8_t *codes = codes_of(m, p, format);
    vector sums[MOST_ROWS * VECTORS * 2], whole[format == 3 ? MOST_ROWS * VECTORS : 1];
    float converted[BLOCK * PANEL] __attribute__((aligned(64)));
    const table levels = read_table(m->table);
    for (int64_t i = 0; i < rows * VECTORS * 2; i++) sums[i] = zero();
    for (int64_t i = 0; format == 3 && i < rows * VECTORS; i++) whole[i] = zero();
    for (int64_t first = 0; first < in; first += size) {
        const int64_t count = in - first < size ? in - first : size;
        const float *block = converted;
        if (format == 0) {
            block = (const float *)codes + first * PANEL;
        } else if (format < 3) {
            for (int64_t i = 0; i < count * PANEL; i += LANES) store(converted + i, weight(codes + first * PANEL * (3 - format), 0, (int)i, format));
        } else {
            for (int64_t i = 0; i < count / 2 * PANEL; i += LANES) {
                const integers both = widened(codes + first / 2 * PANEL + i);
                float *at = converted + i / PANEL * 2 * PANEL + i % PANEL;
                store(at, looked_up(both, &levels));
                store(at + PANEL, looked_up((integers)(both >> 4), &levels));
            }
        }
        const uint8_t *later = format == 0 ? (const uint8_t *)block + AHEAD : codes + first * PANEL * 2 + AHEAD;
        times_rows(block, x, in, first, count, sums, rows, later, format == 0 ? BLOCK * PANEL / 16 : format == 1 ? BLOCK * PANEL / 32 : 0);
        for (int64_t i = 0; format == 3 && i < rows * VECTORS; i++) {
            const vector scale = from_fp16(scales_of(m, p) + first / GROUP * PANEL + i % VECTORS * LANES);
            whole[i] = multiply_add(sums[2 * i] + sums[2 * i + 1], scale, whole[i]);
            sums[2 * i] = sums[2 * i + 1] = zero();
        }
    }
    for (int64_t i = 0; i < rows * VECTORS; i++)
        finished(m, p, (int)(i % VECTORS), format == 3 ? whole[i] : sums[2 * i] + sums[2 * i + 1], y + i / VECTORS * out_stride, format);
}

INLINE void panel_of_format(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride, const int format) {
    if (rows == 1) one_row(m, p, x, y, format);
    else several_rows(m, p, x, y, rows, out_stride, format);
}

/* y [rows, outputs] of one panel: x interleaved. */
static void one_panel(const struct matrix *m, int64_t p, const float *x, float *y, int64_t rows, int64_t out_stride) {
    if (m->format == 0) panel_of_format(m, p, x, y, rows, out_stride, 0);
    else if (m->format == 1) panel_of_format(m, p, x, y, rows, out_stride, 1);
    else if (m->format == 2) panel_of_format(m, p, x, y, rows, out_stride, 2);
    else panel_of_format(m, p, x, y, rows, out_stride, 3);
}
