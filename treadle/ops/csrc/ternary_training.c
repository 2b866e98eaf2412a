/* What lies around the integer product of a ternary layer while it trains (ops/ternary_training.py): the norm and the rounding of
   its input, the rounding of its weights, the scales of its output, and the gradients. fp32; rows may come in bf16 (half). */
#include "lanes.h"
#include <stdlib.h>

#define PART 64 /* rows whose gradients of the gain are added before they are written */
#define ROUND_TO 12582912.0f /* 1.5 2^23: adding it rounds |x| < 2^22 to an integer, half to even */

typedef int8_t bytes __attribute__((vector_size(16), aligned(1)));
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));

INLINE lanes rounded_lanes(lanes x) { return (x + wide(ROUND_TO)) - wide(ROUND_TO); }
INLINE void put_bytes(int8_t *to, lanes x, int64_t count) {
    bytes b = __builtin_convertvector(__builtin_convertvector(x, integers), bytes);
    memcpy(to, &b, count);
}
INLINE lanes get_bytes(const int8_t *from, int64_t count) {
    bytes b = {0};
    memcpy(&b, from, count);
    return __builtin_convertvector(__builtin_convertvector(b, integers), lanes);
}
INLINE lanes size_of(lanes x) { return larger(x, -x); }
INLINE float most_of(lanes x) {
    float a[TILE], most;
    put(a, x);
    most = a[0];
    for (int k = 1; k < TILE; k++) most = a[k] > most ? a[k] : most;
    return most;
}

/* n = x / rms(x) gain, q = round(127 n / max|n|), unit = max|n| / 127 (NaN where x is not finite), inverse = 1 / rms(x). */
int ternary_quantize(const void *x, int half, const float *gain, double eps, float smallest, int8_t *q, float *unit, float *inverse,
                     int64_t count, int64_t width, int threads) {
    int failed = 0;
    int64_t parts = (count + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 65536)
    for (int64_t part = 0; part < parts; part++) {
        float *own = malloc(width * sizeof(float));
        if (!own) {
            failed = 1;
            continue;
        }
        for (int64_t c = part * PART; c < count && c < (part + 1) * PART; c++) {
            const float *row = as_float((const char *)x + c * width * (half ? 2 : 4), width, half, own);
            lanes square = wide(0.0f), most = wide(0.0f), probe = wide(0.0f); /* maxima pass over NaN, sums do not */
#define LARGEST(LOAD, STORE)                                                                               \
    {                                                                                                      \
        lanes v = LOAD(row + at), n = v * LOAD(gain + at);                                                 \
        square += v * v, most = larger(most, size_of(n)), probe += n * wide(0.0f);                         \
    }
            ALONG(width, LARGEST)
            float sum = sum_of(square) / (float)width + (float)eps, r = 1.0f / sqrtf(sum), largest = most_of(most) * r;
            largest = largest > smallest ? largest : smallest;
            if (!(sum <= 3.4e38f) || sum_of(probe) != 0.0f) largest = NAN;
            unit[c] = largest / 127.0f, inverse[c] = r;
            float scale = largest == largest ? r * (127.0f / largest) : 0.0f;
            int8_t *out = q + c * width;
            int64_t k = 0;
            for (; k + TILE <= width; k += TILE) put_bytes(out + k, rounded_lanes(each(row + k) * each(gain + k) * wide(scale)), TILE);
            if (k < width) put_bytes(out + k, rounded_lanes(some(row + k, width - k) * some(gain + k, width - k) * wide(scale)), width - k);
        }
        free(own);
    }
    return failed ? -1 : 0;
}

#define STRETCH 4096 /* numbers of a weight whose sizes are added together */

/* T = round(W / a) in -1, 0, 1 with a = mean|W|; gives a. */
float ternary_weights(const float *w, float smallest, int8_t *t, int64_t count, int threads) {
    int64_t parts = (count + STRETCH - 1) / STRETCH;
    double total = 0.0;
    double *sums = malloc(parts * sizeof(double));
    if (!sums) return -1.0f;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 65536)
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part * STRETCH, here = count - first < STRETCH ? count - first : STRETCH;
        lanes sum = wide(0.0f);
        const float *row = w + first;
#define SIZES(LOAD, STORE) sum += size_of(LOAD(row + at));
        ALONG(here, SIZES)
        sums[part] = sum_of(sum);
    }
    for (int64_t part = 0; part < parts; part++) total += sums[part];
    free(sums);
    float a = (float)(total / (double)count);
    if (a != a) return a;
    a = a > smallest ? a : smallest;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 65536)
    for (int64_t part = 0; part < parts; part++) {
        int64_t end = (part + 1) * STRETCH < count ? (part + 1) * STRETCH : count;
        for (int64_t k = part * STRETCH; k < end; k++) { /* |w / a| > 1/2 as division rounds it; a tie goes to 0 */
            float ratio = w[k] / a;
            t[k] = (int8_t)((ratio > 0.5f) - (ratio < -0.5f));
        }
    }
    return a;
}

/* Integer sums [count, width] become floats, times a unit, in place. */
void ternary_scale(void *sums, float a, const float *unit, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 65536)
    for (int64_t c = 0; c < count; c++) {
        char *row = (char *)sums + c * width * 4;
        float factor = a * unit[c];
        for (int64_t k = 0; k < width; k++) {
            int32_t sum;
            memcpy(&sum, row + 4 * k, 4);
            float y = (float)sum * factor;
            memcpy(row + 4 * k, &y, 4);
        }
    }
}

/* q [count, width] times unit [count] (NULL: 1), in fp32 or (half) bf16. */
void ternary_values(const int8_t *q, const float *unit, int half, void *out, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 65536)
    for (int64_t c = 0; c < count; c++) {
        const int8_t *row = q + c * width;
        float factor = unit ? unit[c] : 1.0f;
        if (half) {
            uint16_t *to = (uint16_t *)out + c * width;
            for (int64_t k = 0; k < width; k++) to[k] = rounded((float)row[k] * factor);
        } else {
            float *to = (float *)out + c * width;
            for (int64_t k = 0; k < width; k++) to[k] = (float)row[k] * factor;
        }
    }
}

/* dn [count, width], to be multiplied by a -> dx in x's type, and the gradient of the gain.
   With n = x r: dx = r (dn gain - n mean(dn gain n)), d gain = sum dn n. */
int ternary_norm_gradient(const void *grad, int grad_half, float a, const void *x, int half, const float *gain, const float *inverse,
                          void *grad_x, float *grad_gain, int64_t count, int64_t width, int threads) {
    int64_t parts = (count + PART - 1) / PART;
    float *found = calloc(parts * width + 1, sizeof(float));
    int failed = !found;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 65536 && found)
    for (int64_t part = 0; part < parts; part++) {
        float *own = found ? malloc(3 * width * sizeof(float)) : 0, *sums = found + part * width;
        if (!own) {
            failed = 1;
            continue;
        }
        for (int64_t c = part * PART; c < count && c < (part + 1) * PART; c++) {
            const float *row = as_float((const char *)x + c * width * (half ? 2 : 4), width, half, own);
            const float *g = as_float((const char *)grad + c * width * (grad_half ? 2 : 4), width, grad_half, own + width);
            lanes inner = wide(0.0f), r = wide(inverse[c]), by = wide(a);
#define ALIGNED(LOAD, STORE)                                                   \
    {                                                                          \
        lanes n = LOAD(row + at) * r, d = LOAD(g + at) * by, dn = d * n;       \
        STORE(sums + at, LOAD(sums + at) + dn);                                \
        inner += dn * LOAD(gain + at);                                         \
    }
            ALONG(width, ALIGNED)
            lanes mean = wide(sum_of(inner) / (float)width);
            float *out = half ? own + 2 * width : (float *)grad_x + c * width;
#define OUT(LOAD, STORE) STORE(out + at, r * (LOAD(g + at) * by * LOAD(gain + at) - LOAD(row + at) * r * mean));
            ALONG(width, OUT)
            if (half)
                for (int64_t k = 0; k < width; k++) ((uint16_t *)grad_x)[c * width + k] = rounded(out[k]);
        }
        free(own);
    }
    for (int64_t k = 0; k < width; k++) grad_gain[k] = 0.0f;
    for (int64_t part = 0; found && part < parts; part++)
        for (int64_t k = 0; k < width; k++) grad_gain[k] += found[part * width + k];
    free(found);
    return failed ? -1 : 0;
}
