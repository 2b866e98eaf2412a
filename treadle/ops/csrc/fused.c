/* What a dense block does between its matrix products, one pass over memory each: RMS norms, rotations, gated activations,
   softmax and cross-entropy rows (ops/fused.py). Numbers are fp32 or bf16 in memory and fp32 in registers; a row is
   widened into a buffer that stays in the first cache. Sums run over a fixed number of lanes and over blocks of fixed size,
   so that no result depends on the number of threads. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 64 /* rows whose weight gradients are summed together */

enum kind { FP32 = 0, BF16 = 1 };
enum failure { NO_MEMORY = 1, NO_SUCH_LABEL = 2 }; /* flags of what the functions that return a number return */

static inline int64_t size_of(int kind) { return kind == BF16 ? 2 : 4; }
static inline char *at(const void *base, int kind, int64_t index) { return (char *)base + index * size_of(kind); }

static inline float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t narrowed(float value) { /* round half to even, NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* The row in fp32: where it lies, or widened into `buffer`. */
static inline const float *loaded(const void *row, int kind, float *restrict buffer, int64_t width) {
    if (kind == FP32) return (const float *)row;
    const uint16_t *restrict from = (const uint16_t *)row;
    for (int64_t k = 0; k < width; k++) buffer[k] = widened(from[k]);
    return buffer;
}

static inline void store(void *row, int kind, const float *restrict from, int64_t width) {
    if (kind == FP32) {
        if (row != (const void *)from) memcpy(row, from, width * 4);
        return;
    }
    uint16_t *restrict to = (uint16_t *)row;
    for (int64_t k = 0; k < width; k++) to[k] = narrowed(from[k]);
}

/* Where results of this kind are computed: in place for fp32, in `buffer` for bf16 (then `store`). */
static inline float *target(void *row, int kind, float *buffer) { return kind == FP32 ? (float *)row : buffer; }

static inline float total(const float *lanes) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

static inline float dot(const float *restrict a, const float *restrict b, int64_t width) {
    float lanes[LANES] = {0}, rest = 0;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += a[k + j] * b[k + j];
    for (; k < width; k++) rest += a[k] * b[k];
    return total(lanes) + rest;
}

/* a b + c, rounded once where the processor does it at no cost. */
static inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* e^x to 2 units in the last place on [-87.3, 88.3], held there outside; NaN gives NaN. (Cody and Waite 1980: e^x = 2^n e^r,
   n = round(x / ln 2), ln 2 in two parts; e^r by its Taylor series of degree 7, |r| <= ln 2 / 2.) */
static inline float exponential(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    float n = multiply_add(x, 1.44269504f, magic) - magic;
    float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
    float p = 1.0f / 5040;
    p = multiply_add(p, r, 1.0f / 720);
    p = multiply_add(p, r, 1.0f / 120);
    p = multiply_add(p, r, 1.0f / 24);
    p = multiply_add(p, r, 1.0f / 6);
    p = multiply_add(p, r, 0.5f);
    p = multiply_add(p * r, r, r) + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* ---- RMS norm ---- */

/* s = x + added (added may be NULL, then s is x and `sum` is not written), scale = 1 / sqrt(mean(s^2) + eps), out = s scale weight. */
int norm_forward(const void *x, int x_kind, const void *added, int added_kind, const float *weight, double eps, void *sum,
                 void *out, int out_kind, float *scales, int64_t rows, int64_t width, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *first = malloc(4 * width * sizeof(float)), *second = first + width, *third = second + width, *last = third + width;
        failed |= first == NULL ? NO_MEMORY : 0;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (first == NULL) continue;
            const float *s = loaded(at(x, x_kind, row * width), x_kind, first, width);
            if (added) {
                const float *more = loaded(at(added, added_kind, row * width), added_kind, second, width);
                float *both = target(at(sum, x_kind, row * width), x_kind, last);
                for (int64_t k = 0; k < width; k++) both[k] = s[k] + more[k];
                store(at(sum, x_kind, row * width), x_kind, both, width);
                s = both;
            }
            float scale = (float)(1.0 / sqrt((double)dot(s, s, width) / (double)width + eps));
            scales[row] = scale;
            float *to = target(at(out, out_kind, row * width), out_kind, third);
            for (int64_t k = 0; k < width; k++) to[k] = s[k] * scale * weight[k];
            store(at(out, out_kind, row * width), out_kind, to, width);
        }
        free(first);
    }
    return failed;
}

/* With n = s scale and i = grad weight: grad_x = kept + scale (i - n mean(i n)), also written as `copy` in its own kind;
   kept (the gradient that s has from elsewhere) and copy may be NULL. Where `inverse` (1 / weight) is given, s holds what
   norm_forward wrote as `out`, and n = s inverse. parts: [rows / BLOCK, width], sums of grad n. */
int norm_backward(const void *grad, int grad_kind, const void *s, int s_kind, const float *weight, const float *inverse,
                  const float *scales, const void *kept, void *grad_x, int x_kind, void *copy, int copy_kind, float *parts,
                  float *grad_weight, int64_t rows, int64_t width, int threads) {
    int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *first = malloc(5 * width * sizeof(float)), *second = first + width, *third = second + width;
        float *normed = third + width, *inner = normed + width;
        failed |= first == NULL ? NO_MEMORY : 0;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            if (first == NULL) continue;
            float *restrict part = parts + block * width;
            memset(part, 0, width * sizeof(float));
            int64_t stop = (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;
            for (int64_t row = block * BLOCK; row < stop; row++) {
                const float *restrict g = loaded(at(grad, grad_kind, row * width), grad_kind, first, width);
                const float *restrict from = loaded(at(s, s_kind, row * width), s_kind, second, width);
                float scale = scales[row];
                if (inverse)
                    for (int64_t k = 0; k < width; k++) normed[k] = from[k] * inverse[k];
                else
                    for (int64_t k = 0; k < width; k++) normed[k] = from[k] * scale;
                for (int64_t k = 0; k < width; k++) {
                    inner[k] = g[k] * weight[k];
                    part[k] += g[k] * normed[k];
                }
                float along = dot(inner, normed, width) / (float)width;
                float *to = target(at(grad_x, x_kind, row * width), x_kind, second);
                if (kept) {
                    const float *restrict more = loaded(at(kept, x_kind, row * width), x_kind, third, width);
                    for (int64_t k = 0; k < width; k++) to[k] = more[k] + scale * (inner[k] - normed[k] * along);
                } else
                    for (int64_t k = 0; k < width; k++) to[k] = scale * (inner[k] - normed[k] * along);
                store(at(grad_x, x_kind, row * width), x_kind, to, width);
                if (copy) store(at(copy, copy_kind, row * width), copy_kind, to, width);
            }
        }
        free(first);
    }
    if (failed) return failed;
    memset(grad_weight, 0, width * sizeof(float));
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t k = 0; k < width; k++) grad_weight[k] += parts[block * width + k];
    return 0;
}

/* ---- rotary positions ---- */

/* x, out: [rows, heads, length, 2 half + rest], the last dimension dense and the strides in numbers; pairs (k, k + half) are
   turned by the angles of cos, sin [angle_rows (rows or 1), length, half], the opposite way with sign -1; the rest is copied. */
int rotate(const void *x, const int64_t *x_strides, void *out, const int64_t *out_strides, int kind, const float *cos,
           const float *sin, int64_t angle_rows, float sign, int64_t rows, int64_t heads, int64_t length, int64_t half,
           int64_t rest, int threads) {
    int64_t width = 2 * half + rest;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *buffer = malloc(2 * width * sizeof(float)), *turned = buffer + width;
        failed |= buffer == NULL ? NO_MEMORY : 0;
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t t = 0; t < length; t++) {
                if (buffer == NULL) continue;
                const float *restrict c = cos + ((angle_rows > 1 ? row : 0) * length + t) * half;
                const float *restrict s = sin + ((angle_rows > 1 ? row : 0) * length + t) * half;
                for (int64_t head = 0; head < heads; head++) {
                    const void *from = at(x, kind, row * x_strides[0] + head * x_strides[1] + t * x_strides[2]);
                    void *to = at(out, kind, row * out_strides[0] + head * out_strides[1] + t * out_strides[2]);
                    if (half == 0) {
                        memcpy(to, from, width * size_of(kind));
                        continue;
                    }
                    const float *restrict a = loaded(from, kind, buffer, width);
                    float *restrict b = turned;
                    for (int64_t k = 0; k < half; k++) {
                        b[k] = a[k] * c[k] - a[k + half] * (sign * s[k]);
                        b[k + half] = a[k + half] * c[k] + a[k] * (sign * s[k]);
                    }
                    for (int64_t k = 2 * half; k < width; k++) b[k] = a[k];
                    store(to, kind, b, width);
                }
            }
        free(buffer);
    }
    return failed;
}

/* ---- gated activation: silu(gate) up ---- */

#define CHUNK 1024

void swiglu_forward(const void *gate, const void *up, void *out, int kind, int64_t count, int threads) {
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float first[CHUNK], second[CHUNK], third[CHUNK];
        int64_t from = chunk * CHUNK, width = count - from < CHUNK ? count - from : CHUNK;
        const float *restrict g = loaded(at(gate, kind, from), kind, first, width);
        const float *restrict u = loaded(at(up, kind, from), kind, second, width);
        for (int64_t k = 0; k < width; k++) third[k] = g[k] / (1.0f + exponential(-g[k])) * u[k];
        store(at(out, kind, from), kind, third, width);
    }
}

/* The gradients of gate and up, and the product itself once more, which forward did not keep. */
void swiglu_backward(const void *grad, const void *gate, const void *up, void *grad_gate, void *grad_up, void *out, int kind,
                     int64_t count, int threads) {
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float first[CHUNK], second[CHUNK], third[CHUNK], of_gate[CHUNK], of_up[CHUNK], product[CHUNK];
        int64_t from = chunk * CHUNK, width = count - from < CHUNK ? count - from : CHUNK;
        const float *restrict g = loaded(at(gate, kind, from), kind, first, width);
        const float *restrict u = loaded(at(up, kind, from), kind, second, width);
        const float *restrict d = loaded(at(grad, kind, from), kind, third, width);
        for (int64_t k = 0; k < width; k++) {
            float share = 1.0f / (1.0f + exponential(-g[k])), active = g[k] * share;
            of_up[k] = d[k] * active;
            of_gate[k] = d[k] * u[k] * (share + active * (1.0f - share));
            product[k] = active * u[k];
        }
        store(at(grad_gate, kind, from), kind, of_gate, width);
        store(at(grad_up, kind, from), kind, of_up, width);
        store(at(out, kind, from), kind, product, width);
    }
}

/* ---- GELU in its tanh form: x sigmoid(2 u), u = sqrt(2 / pi) (x + .044715 x^3), as (1 + tanh u) / 2 = sigmoid(2 u) ---- */

#define TWICE_ROOT 1.5957691216f /* 2 sqrt(2 / pi) */

static inline float gelu_share(float x) { return 1.0f / (1.0f + exponential(-TWICE_ROOT * x * (1.0f + 0.044715f * x * x))); }

#define FLAT -16.0f /* below it nothing is left in fp32, while x^3 would magnify what `exponential` leaves of e^-x */

void gelu_forward(const void *x, void *out, int kind, int64_t count, int threads) {
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float first[CHUNK], second[CHUNK];
        int64_t from = chunk * CHUNK, width = count - from < CHUNK ? count - from : CHUNK;
        const float *restrict in = loaded(at(x, kind, from), kind, first, width);
        for (int64_t k = 0; k < width; k++) second[k] = in[k] < FLAT ? 0.0f : in[k] * gelu_share(in[k]);
        store(at(out, kind, from), kind, second, width);
    }
}

/* The gradient of x, and the result itself once more, which forward did not keep; `grad_x` and `out` may be `grad`. */
void gelu_backward(const void *grad, const void *x, void *grad_x, void *out, int kind, int64_t count, int threads) {
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float first[CHUNK], second[CHUNK], of_x[CHUNK], result[CHUNK];
        int64_t from = chunk * CHUNK, width = count - from < CHUNK ? count - from : CHUNK;
        const float *restrict in = loaded(at(x, kind, from), kind, first, width);
        const float *restrict d = loaded(at(grad, kind, from), kind, second, width);
        for (int64_t k = 0; k < width; k++) {
            float share = gelu_share(in[k]), slope = TWICE_ROOT * (1.0f + 3.0f * 0.044715f * in[k] * in[k]);
            float both = in[k] * share, whole = share + both * (1.0f - share) * slope;
            result[k] = in[k] < FLAT ? 0.0f : both;
            of_x[k] = in[k] < FLAT ? 0.0f : d[k] * whole;
        }
        store(at(grad_x, kind, from), kind, of_x, width);
        store(at(out, kind, from), kind, result, width);
    }
}

/* ---- residual sums ---- */

/* out = x + added, x and out of one kind; they may be the same. */
void add(const void *x, int kind, const void *added, int added_kind, void *out, int64_t count, int threads) {
    int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float first[CHUNK], second[CHUNK], to[CHUNK];
        int64_t from = chunk * CHUNK, width = count - from < CHUNK ? count - from : CHUNK;
        const float *a = loaded(at(x, kind, from), kind, first, width);
        const float *b = loaded(at(added, added_kind, from), added_kind, second, width);
        for (int64_t k = 0; k < width; k++) to[k] = a[k] + b[k];
        store(at(out, kind, from), kind, to, width);
    }
}

/* ---- rows of a masked softmax ---- */

static inline float largest(const float *from, int64_t width) {
    float lanes[LANES], most = -INFINITY;
    int64_t k = 0;
    for (int j = 0; j < LANES; j++) lanes[j] = -INFINITY;
    for (; k + LANES <= width; k += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = from[k + j] > lanes[j] ? from[k + j] : lanes[j];
    for (; k < width; k++) most = from[k] > most ? from[k] : most;
    for (int j = 0; j < LANES; j++) most = lanes[j] > most ? lanes[j] : most;
    return most;
}

/* to = e^(factor from - shift), and their sum. */
static inline float exponentials(const float *restrict from, float *restrict to, float factor, float shift, int64_t width) {
    float lanes[LANES] = {0}, rest = 0;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int j = 0; j < LANES; j++) {
            float value = exponential(factor * from[k + j] - shift);
            to[k + j] = value;
            lanes[j] += value;
        }
    for (; k < width; k++) rest += to[k] = exponential(factor * from[k] - shift);
    return total(lanes) + rest;
}

/* scores [heads, queries, keys], in place: softmax of factor * scores over the keys that each query sees, zero elsewhere. Query
   i stands at key offset + i, and sees that one and those before it, `window` at most (0: all). */
int causal_softmax(void *scores, int kind, float factor, int64_t heads, int64_t queries, int64_t keys, int64_t offset,
                   int64_t window, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *buffer = malloc(2 * keys * sizeof(float)), *share = buffer + keys;
        failed |= buffer == NULL ? NO_MEMORY : 0;
#pragma omp for collapse(2) schedule(static)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t query = 0; query < queries; query++) {
                if (buffer == NULL) continue;
                void *row = at(scores, kind, (head * queries + query) * keys);
                int64_t stop = offset + query + 1, first = window > 0 && stop > window ? stop - window : 0, seen = stop - first;
                const float *s = loaded(at(row, kind, first), kind, buffer, seen);
                float sum = exponentials(s, share, factor, factor * largest(s, seen), seen), inverse = 1.0f / sum;
                for (int64_t k = 0; k < seen; k++) share[k] *= inverse;
                memset(row, 0, first * size_of(kind));
                store(at(row, kind, first), kind, share, seen);
                memset(at(row, kind, stop), 0, (keys - stop) * size_of(kind));
            }
        free(buffer);
    }
    return failed;
}

/* grad, of the shares, in place becomes that of the scores before the factor: factor share (grad - sum(grad share)). */
int causal_softmax_backward(void *grad, const void *shares, int kind, float factor, int64_t heads, int64_t queries,
                            int64_t keys, int64_t offset, int64_t window, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *buffer = malloc(3 * keys * sizeof(float)), *second = buffer + keys, *restrict to = second + keys;
        failed |= buffer == NULL ? NO_MEMORY : 0;
#pragma omp for collapse(2) schedule(static)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t query = 0; query < queries; query++) {
                if (buffer == NULL) continue;
                int64_t stop = offset + query + 1, first = window > 0 && stop > window ? stop - window : 0, seen = stop - first;
                int64_t start = (head * queries + query) * keys;
                void *row = at(grad, kind, start);
                const float *g = loaded(at(row, kind, first), kind, buffer, seen);
                const float *restrict p = loaded(at(shares, kind, start + first), kind, second, seen);
                float mean = dot(g, p, seen);
                for (int64_t k = 0; k < seen; k++) to[k] = factor * p[k] * (g[k] - mean);
                memset(row, 0, first * size_of(kind));
                store(at(row, kind, first), kind, to, seen);
                memset(at(row, kind, stop), 0, (keys - stop) * size_of(kind));
            }
        free(buffer);
    }
    return failed;
}

/* ---- cross-entropy rows ---- */

/* tanh to 5e-7 of its value: a quotient of polynomials (Eigen's), for 1 - 2 / (e^2a + 1) has no digits left where a is small. */
static inline float hyperbolic(float a) {
    float x = a < -7.9f ? -7.9f : a > 7.9f ? 7.9f : a, s = x * x; /* NaN stays; beyond, nothing changes in fp32 */
    float above = -2.76076847742355e-16f, below = 1.19825839466702e-06f;
    above = above * s + 2.00018790482477e-13f;
    above = above * s - 8.60467152213735e-11f;
    above = above * s + 5.12229709037114e-08f;
    above = above * s + 1.48572235717979e-05f;
    above = above * s + 6.37261928875436e-04f;
    above = above * s + 4.89352455891786e-03f;
    below = below * s + 1.18534705686654e-04f;
    below = below * s + 2.26843463243900e-03f;
    below = below * s + 4.89352518554385e-03f;
    return x * above / below;
}

/* logits [rows, width]; nats = -log softmax(z)[label] a row (0 where label is `ignored`), z = logits or cap tanh(logits / cap)
   (cap > 0). With slopes the logits become d nats / d logits in place. A row with a label outside [0, width) has NaN nats and
   keeps its logits. */
int cross_entropy(void *logits, int kind, const int64_t *labels, int64_t ignored, float cap, float *nats, int slopes,
                  int64_t rows, int64_t width, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *buffer = malloc(3 * width * sizeof(float)), *share = buffer + width, *capped = share + width;
        failed |= buffer == NULL ? NO_MEMORY : 0;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (buffer == NULL) continue;
            void *place = at(logits, kind, row * width);
            int64_t label = labels[row];
            if (label == ignored) {
                nats[row] = 0;
                if (slopes) memset(place, 0, width * size_of(kind));
                continue;
            }
            if ((uint64_t)label >= (uint64_t)width) {
                nats[row] = NAN;
                failed |= NO_SUCH_LABEL;
                continue;
            }
            const float *z = loaded(place, kind, buffer, width);
            if (cap > 0) {
                for (int64_t k = 0; k < width; k++) capped[k] = cap * hyperbolic(z[k] / cap);
                z = capped;
            }
            float most = largest(z, width), own = z[label];
            float sum = exponentials(z, share, 1.0f, most, width), inverse = 1.0f / sum;
            nats[row] = logf(sum) + most - own;
            if (!slopes) continue;
            for (int64_t k = 0; k < width; k++) share[k] *= inverse;
            share[label] -= 1.0f;
            if (cap > 0)
                for (int64_t k = 0; k < width; k++) share[k] *= 1.0f - (z[k] / cap) * (z[k] / cap);
            store(place, kind, share, width);
        }
        free(buffer);
    }
    return failed;
}
