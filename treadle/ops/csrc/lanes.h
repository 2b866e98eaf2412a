/* Sixteen floats at a time, for the kernels that include this: a row's last few numbers, sums in one order, exp, and bf16. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 16 /* floats of a vector */

typedef float lanes __attribute__((vector_size(64), aligned(4)));

INLINE lanes wide(float x) { return (lanes){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE float sum_of(lanes x) {
    float a[TILE];
    memcpy(a, &x, sizeof a);
    for (int half = 8; half; half /= 2)
        for (int k = 0; k < half; k++) a[k] += a[k + half];
    return a[0];
}
INLINE lanes each(const float *a) {
    lanes x;
    memcpy(&x, a, sizeof x);
    return x;
}
INLINE void put(float *a, lanes x) { memcpy(a, &x, sizeof x); }
INLINE lanes some(const float *a, int64_t count) { /* the first `count` of 16, zeros behind them */
    float b[TILE] = {0};
    for (int64_t k = 0; k < count; k++) b[k] = a[k];
    return each(b);
}
INLINE void put_some(float *a, lanes x, int64_t count) {
    float b[TILE];
    put(b, x);
    for (int64_t k = 0; k < count; k++) a[k] = b[k];
}
/* BODY for each 16 numbers of a row, with LOAD and STORE that end where it ends. */
#define ALONG(WIDTH, BODY)                                                  \
    {                                                                       \
        int64_t at = 0;                                                     \
        for (; at + TILE <= (WIDTH); at += TILE) {                          \
            BODY(each, put)                                                 \
        }                                                                   \
        if (at < (WIDTH)) {                                                 \
            int64_t count = (WIDTH) - at;                                   \
            BODY(SOME, PUT_SOME)                                            \
        }                                                                   \
    }
#define SOME(a) some(a, count)
#define PUT_SOME(a, x) put_some(a, x, count)

/* exp to 3e-7: 2^n times a polynomial of |r| <= ln 2 / 2. */
INLINE lanes exponential(lanes x) {
    float a[TILE], out[TILE];
    put(a, x);
    for (int k = 0; k < TILE; k++) {
        float v = a[k] < -87.0f ? -87.0f : a[k] > 88.0f ? 88.0f : a[k];
        float shifted = v * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 2^23: rounds to an integer */
        float r = (v - n * 0.693359375f) + n * 2.12194440e-4f, y = 1.0f / 5040.0f;
        y = y * r + 1.0f / 720.0f;
        y = y * r + 1.0f / 120.0f;
        y = y * r + 1.0f / 24.0f;
        y = y * r + 1.0f / 6.0f;
        y = y * r + 0.5f;
        y = y * r + 1.0f;
        y = y * r + 1.0f;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        bits = (int32_t)((uint32_t)(bits + 127) << 23);
        float power;
        memcpy(&power, &bits, 4);
        out[k] = y * power;
        out[k] = a[k] == a[k] ? out[k] : a[k]; /* NaN stays */
    }
    return each(out);
}
INLINE lanes sigmoid(lanes x) { return wide(1.0f) / (wide(1.0f) + exponential(-x)); }
INLINE lanes larger(lanes a, lanes b) {
    float x[TILE], y[TILE];
    put(x, a), put(y, b);
    for (int k = 0; k < TILE; k++) x[k] = x[k] > y[k] ? x[k] : y[k];
    return each(x);
}

INLINE const float *as_float(const void *y, int64_t width, int half, float *own) { /* a row in fp32; half: it comes in bf16 */
    if (!half) return y;
    const uint16_t *short_ = y;
    for (int64_t k = 0; k < width; k++) {
        uint32_t bits = (uint32_t)short_[k] << 16;
        memcpy(own + k, &bits, 4);
    }
    return own;
}

INLINE uint16_t rounded(float x) { /* to bf16, half to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}
