/* Products of rows with packed weights where both are in bf16, two k at a time (AVX512-BF16), for decoding.c.

   y = x W^T as in packed.h, but x is rounded to bf16 first, and two k of an output are multiplied and added by one instruction. Sums are
   in fp32, over pairs of k in their order (in 4 bits by groups of 32, each times its scale): a row has the same bits alone and among
   others. W's numbers are exact in bf16: codes of 8 and 4 bits are whole numbers up to 127, their scales are applied to sums.

   Formats: 4 bf16, 5 int8 with a scale an output, both [panels, (K + 1) / 2, 64, 2]; 6 four bits as format 3 has them. */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PAIRS 1
#define FIRST_PAIRED 4

typedef struct { __m512i numbers; } levels; /* 16 bf16 numbers, twice */

INLINE levels read_levels(const float *table) {
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(table));
    return (levels){_mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1)};
}

/* Two k of 16 outputs; codes: of the panel's outputs from there on. */
INLINE __m512bh pair_of(const uint8_t *codes, const levels *table, const int format) {
    if (format == 4) return (__m512bh)_mm512_loadu_si512(codes);
    if (format == 5) {
        const __m128i *at = (const __m128i *)codes;
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
        return _mm512_cvtne2ps_pbh(high, low);
    }
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_or_si512(_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_slli_epi32(_mm512_srli_epi32(both, 4), 16)),
                                              table->numbers);
}

INLINE int64_t pair_bytes(const int format) { return format == 4 ? 4 : format == 5 ? 2 : 1; } /* of two k of an output */
INLINE int64_t pairs_of(const struct matrix *m) { return (m->inputs + 1) / 2; }

INLINE const uint8_t *paired_codes(const struct matrix *m, int64_t p, const int format) {
    return (const uint8_t *)m->codes + p * PANEL * pairs_of(m) * pair_bytes(format);
}

/* Rows x [rows, inputs] in bf16, two k in a number, so that rows multiplied together lie pair by pair. */
static void rounded_rows(const float *x, int64_t rows, int64_t inputs, uint32_t *out) {
    const int64_t pairs = (inputs + 1) / 2;
    for (int64_t r = 0, count; r < rows; r += count) {
        count = together(rows - r);
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < inputs; k += 16) {
                uint16_t some[16];
                const __mmask16 there = inputs - k < 16 ? (__mmask16)((1 << (inputs - k)) - 1) : 0xffff;
                _mm256_storeu_si256((__m256i *)some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + (r + i) * inputs + k)));
                for (int64_t j = 0; j < 8 && k / 2 + j < pairs; j++) memcpy(out + r * pairs + (k / 2 + j) * count + i, some + 2 * j, 4);
            }
    }
}

/* `vectors` vectors of a block of `pairs` pairs [pairs, 64, 2] in bf16 times `rows` interleaved rows, added to sums [rows, 4]. lines: cache
   lines from `later` on that are asked for at each pair. */
INLINE void by_pairs(const uint8_t *block, const uint32_t *x, int64_t pairs, __m512 *sums, const uint8_t *later, const int rows, const int vectors,
                     const int lines) {
    __m512 sum[16];
    __m512bh w[4];
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++) sum[i] = sums[i / vectors * VECTORS + i % vectors];
    for (int64_t j = 0; j < pairs; j++) {
#pragma GCC unroll 4
        for (int line = 0; line < lines; line++) __builtin_prefetch(later + (j * lines + line) * 64, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) w[v] = (__m512bh)_mm512_loadu_si512(block + (j * VECTORS + v) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m512bh one = (__m512bh)_mm512_set1_epi32((int)x[j * rows + r]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r * vectors + v] = _mm512_dpbf16_ps(sum[r * vectors + v], w[v], one);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * vectors; i++) sums[i / vectors * VECTORS + i % vectors] = sum[i];
}

/* A block of `pairs` from number `first` on times all rows; lines: asked for by the first group, at each pair of each of its passes. */
INLINE void pairs_times_rows(const uint8_t *block, const uint32_t *x, int64_t in, int64_t first, int64_t pairs, __m512 *sums, int64_t rows,
                             const uint8_t *later, const int lines) {
    int64_t r = 0;
#define PASSES(N, V, LINES)                                                                                                            \
    for (int v = 0; v < VECTORS; v += (V))                                                                                             \
        by_pairs(block + v * 64, x + r * in + first * (N), pairs, sums + r * VECTORS + v, later + v / (V) * (LINES) * pairs * 64, (N), (V), (LINES));
#define GROUPS(N, V)                                      \
    for (; r + (N) <= rows; r += (N))                     \
        if (r == 0) { PASSES(N, V, lines * (V) / VECTORS) } \
        else { PASSES(N, V, 0) }
    GROUPS(ROWS, 2)
    GROUPS(4, 4)
    GROUPS(2, 4)
    GROUPS(1, 4)
#undef GROUPS
#undef PASSES
}

INLINE void paired_rows(const struct matrix *m, int64_t p, const uint32_t *x, float *y, int64_t rows, int64_t out_stride, const int format) {
    const int64_t in = pairs_of(m), size = format == 6 ? GROUP / 2 : BLOCK / 2;
    const uint8_t *codes = paired_codes(m, p, format);
    __m512 sums[MOST_ROWS * VECTORS], whole[format == 6 ? MOST_ROWS * VECTORS : 1];
    uint8_t converted[BLOCK / 2 * PANEL * 4] __attribute__((aligned(64)));
    const levels table = format == 6 ? read_levels(m->table) : (levels){_mm512_setzero_si512()};
    for (int64_t i = 0; i < rows * VECTORS; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t i = 0; format == 6 && i < rows * VECTORS; i++) whole[i] = _mm512_setzero_ps();
    for (int64_t first = 0; first < in; first += size) {
        const int64_t pairs = in - first < size ? in - first : size;
        const uint8_t *block = codes + first * PANEL * pair_bytes(format);
        if (rows == 1) { /* converted as they are multiplied */
            __m512 own[VECTORS];
            for (int v = 0; v < VECTORS; v++) own[v] = sums[v];
            for (int64_t j = 0; j < pairs; j++) {
                const __m512bh one = (__m512bh)_mm512_set1_epi32((int)x[first + j]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    own[v] = _mm512_dpbf16_ps(own[v], pair_of(block + (j * PANEL + v * LANES) * pair_bytes(format), &table, format), one);
            }
            for (int v = 0; v < VECTORS; v++) sums[v] = own[v];
        } else {
            for (int64_t i = 0; format != 4 && i < pairs * VECTORS; i++)
                _mm512_store_si512(converted + i * 64, (__m512i)pair_of(block + i * LANES * pair_bytes(format), &table, format));
            pairs_times_rows(format == 4 ? block : converted, x, in, first, pairs, sums, rows, block + AHEAD, format == 4 ? 4 : 0);
        }
        for (int64_t i = 0; format == 6 && i < rows * VECTORS; i++) {
            const vector scale = from_fp16(scales_of(m, p) + first / (GROUP / 2) * PANEL + i % VECTORS * LANES);
            whole[i] = (__m512)multiply_add((vector)sums[i], scale, (vector)whole[i]);
            sums[i] = _mm512_setzero_ps();
        }
    }
    for (int64_t i = 0; i < rows * VECTORS; i++)
        finished(m, p, (int)(i % VECTORS), (vector)(format == 6 ? whole[i] : sums[i]), y + i / VECTORS * out_stride, format == 5 ? 2 : format);
}

/* y [rows, outputs] of one panel: x of `rounded_rows`. */
static void paired_panel(const struct matrix *m, int64_t p, const uint32_t *x, float *y, int64_t rows, int64_t out_stride) {
    if (m->format == 4) paired_rows(m, p, x, y, rows, out_stride, 4);
    else if (m->format == 5) paired_rows(m, p, x, y, rows, out_stride, 5);
    else paired_rows(m, p, x, y, rows, out_stride, 6);
}

/* Number k of 16 outputs in fp32, without their scale: formats 4 and 5. */
INLINE vector paired_weight(const struct matrix *m, int64_t p, int64_t k, int v) {
    const uint8_t *codes = paired_codes(m, p, (int)m->format) + (k / 2 * PANEL + v * LANES) * pair_bytes((int)m->format);
    if (m->format == 4) {
        const __m512i both = _mm512_loadu_si512(codes);
        return (vector)(k % 2 ? _mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u)) : _mm512_slli_epi32(both, 16));
    }
    const __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    return (vector)_mm512_cvtepi32_ps(_mm512_srai_epi32(k % 2 ? _mm512_slli_epi32(both, 16) : _mm512_slli_epi32(both, 24), 24));
}
#endif
