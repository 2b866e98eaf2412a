/* y = T q for a matrix T of -1, 0, 1 in 2 bits each and a vector q of int8 (ops/ternary.py). Exact: sums are int32.

   Four planes of a quarter of the columns share a byte: bits 0-1 of byte k hold column k, bits 2-3 column K/4 + k, and so on.
   Codes are T + 1 (0, 1, 2), so that T q = codes q - sum(q). */
#include <math.h>
#include <stdint.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

static int32_t row_product(const uint8_t *restrict codes, const int8_t *restrict q, int64_t quarter) {
    int64_t k = 0;
    int32_t sum = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    const __m512i low = _mm512_set1_epi8(3);
    __m512i parts = _mm512_setzero_si512();
    for (; k + 64 <= quarter; k += 64) {
        __m512i packed = _mm512_loadu_si512(codes + k);
        for (int plane = 0; plane < 4; plane++) {
            __m512i bits = _mm512_and_si512(packed, low);
            parts = _mm512_dpbusd_epi32(parts, bits, _mm512_loadu_si512(q + plane * quarter + k));
            packed = _mm512_srli_epi16(packed, 2);
        }
    }
    sum = _mm512_reduce_add_epi32(parts);
#elif defined(__AVX2__)
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i parts = _mm256_setzero_si256();
    for (; k + 32 <= quarter; k += 32) {
        __m256i packed = _mm256_loadu_si256((const __m256i *)(codes + k));
        for (int plane = 0; plane < 4; plane++) {
            __m256i bits = _mm256_and_si256(packed, low);
            __m256i pairs = _mm256_maddubs_epi16(bits, _mm256_loadu_si256((const __m256i *)(q + plane * quarter + k)));
            parts = _mm256_add_epi32(parts, _mm256_madd_epi16(pairs, ones));
            packed = _mm256_srli_epi16(packed, 2);
        }
    }
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, parts);
    for (int lane = 0; lane < 8; lane++) sum += lanes[lane];
#endif
    for (; k < quarter; k++)
        for (int plane = 0; plane < 4; plane++) sum += ((codes[k] >> (2 * plane)) & 3) * q[plane * quarter + k];
    return sum;
}

/* codes [rows, quarter], q [count, 4 quarter] -> out [count, rows]. */
static void products(const uint8_t *codes, const int8_t *vector, int32_t *out, int64_t rows, int64_t quarter, int threads) {
    int32_t total = 0;
    for (int64_t k = 0; k < 4 * quarter; k++) total += vector[k];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * quarter > 65536)
    for (int64_t r = 0; r < rows; r++) out[r] = row_product(codes + r * quarter, vector, quarter) - total;
}

void ternary_product(const uint8_t *codes, const int8_t *q, int32_t *out, int64_t count, int64_t rows, int64_t quarter,
                     int threads) {
    for (int64_t c = 0; c < count; c++) products(codes, q + c * 4 * quarter, out + c * rows, rows, quarter, threads);
}

#define LANES 16

/* n = x / rms(x) * gain; q = round(n s), s = 127 / max|n|, for each of count rows of width floats; q has `padded` columns. */
void normed_quantized(const float *x, const float *gain, float eps, float smallest, int8_t *q, float *scale, int64_t count,
                      int64_t width, int64_t padded) {
    for (int64_t c = 0; c < count; c++) {
        const float *row = x + c * width;
        float squares[LANES] = {0}, largest = 0.0f, sum = 0.0f;
        int64_t k = 0;
        for (; k + LANES <= width; k += LANES)
            for (int j = 0; j < LANES; j++) squares[j] += row[k + j] * row[k + j];
        for (; k < width; k++) squares[0] += row[k] * row[k];
        for (int j = 0; j < LANES; j++) sum += squares[j];
        float rms = 1.0f / sqrtf(sum / (float)width + eps);
        for (k = 0; k < width; k++) {
            float n = fabsf(row[k] * rms * gain[k]);
            largest = n > largest ? n : largest;
        }
        float s = 127.0f / (largest > smallest ? largest : smallest);
        int8_t *out = q + c * padded;
        for (k = 0; k < width; k++) {
            float n = rintf(row[k] * rms * gain[k] * s); /* half to even */
            out[k] = (int8_t)(n > 127.0f ? 127.0f : n < -128.0f ? -128.0f : n);
        }
        for (; k < padded; k++) out[k] = 0;
        scale[c] = s;
    }
}

/* The whole layer for a few rows: y [count, rows] = (T q) a / s. work: 4 quarter int8 and rows int32. */
void ternary_layer(const float *x, const float *gain, float eps, float smallest, const uint8_t *codes, float a, float *y,
                   int8_t *q, int32_t *sums, int64_t count, int64_t width, int64_t rows, int64_t quarter, int threads) {
    for (int64_t c = 0; c < count; c++) {
        float s;
        normed_quantized(x + c * width, gain, eps, smallest, q, &s, 1, width, 4 * quarter);
        products(codes, q, sums, rows, quarter, threads);
        float factor = a / s;
        for (int64_t r = 0; r < rows; r++) y[c * rows + r] = (float)sums[r] * factor;
    }
}
