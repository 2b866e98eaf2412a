/* What INL dynamics (ops/dynamics.py) do between the products of their controller, forward and backward: from [a, b, g], h, v and mu
   to h' and v', and from their gradients to those of [a, b, g], h, v and mu. fp32 inside; each tensor may come in bf16 (half). */
#include "lanes.h"
#include <stdlib.h>

#define PART 64 /* rows whose gradients of mu and of [a, b, g] are added before they are written */

struct dynamics {
    int64_t count, width; /* N, D */
    float step, beta_max, velocity_max, mu_min, mu_max;
    int32_t half_logits, half_h, half_v, half_out;
    const void *logits, *h, *v; /* [N, 3 D], [N, D], [N, D] */
    const float *mu;            /* [D] */
};

INLINE lanes smaller(lanes a, lanes b) { return -larger(-a, -b); }
/* log(1 + e^x): the larger of x and 0, and 2 artanh(e / (2 + e)) of e = e^-|x| in nine terms of its series, right to 1e-8. */
INLINE lanes softplus(lanes x) {
    lanes e = exponential(-larger(x, -x)), z = e / (wide(2.0f) + e), s = z * z, sum = wide(1.0f / 15.0f);
    for (int n = 13; n > 0; n -= 2) sum = sum * s + wide(1.0f / (float)n);
    return larger(x, wide(0.0f)) + wide(2.0f) * z * sum;
}
/* 1 where |x| <= bound, else 0 (NaN: 0). */
INLINE lanes within(lanes x, float low, float high) {
    float a[TILE];
    put(a, x);
    for (int k = 0; k < TILE; k++) a[k] = a[k] >= low && a[k] <= high ? 1.0f : 0.0f;
    return each(a);
}
INLINE lanes bounded(lanes x, float low, float high) { /* NaN stays */
    float a[TILE];
    put(a, x);
    for (int k = 0; k < TILE; k++) a[k] = a[k] < low ? low : a[k] > high ? high : a[k];
    return each(a);
}
static const float *row_of(const void *from, int64_t row, int64_t width, int half, float *own) {
    return as_float((const char *)from + row * width * (half ? 2 : 4), width, half, own);
}
static void give(void *to, int64_t row, int64_t width, const float *from) { /* bf16 */
    for (int64_t k = 0; k < width; k++) ((uint16_t *)to)[row * width + k] = rounded(from[k]);
}

/* 0, or -1 when there is no memory. */
int dynamics_forward(const struct dynamics *d, void *moved, void *velocity, int threads) {
    int64_t width = d->width, parts = (d->count + PART - 1) / PART;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && d->count * width > 32768)
    for (int64_t part = 0; part < parts; part++) {
        float *own = malloc(7 * width * sizeof(float));
        if (!own) {
            failed = 1;
            continue;
        }
        for (int64_t c = part * PART; c < d->count && c < (part + 1) * PART; c++) {
            const float *a = row_of(d->logits, c, 3 * width, d->half_logits, own), *b = a + width, *g = b + width;
            const float *h = row_of(d->h, c, width, d->half_h, own + 3 * width), *v = row_of(d->v, c, width, d->half_v, own + 4 * width);
            float *to_h = d->half_out ? own + 5 * width : (float *)moved + c * width;
            float *to_v = d->half_out ? own + 6 * width : (float *)velocity + c * width;
#define FORWARD(LOAD, STORE)                                                                                      \
    {                                                                                                             \
        lanes x = LOAD(h + at), gap = x - bounded(LOAD(d->mu + at), d->mu_min, d->mu_max);                        \
        lanes beta = smaller(softplus(LOAD(b + at)), wide(d->beta_max));                                          \
        lanes pull = sigmoid(LOAD(a + at)) * LOAD(v + at) - beta * gap;                                           \
        pull = bounded(pull, -d->velocity_max, d->velocity_max);                                                  \
        STORE(to_v + at, pull);                                                                                   \
        STORE(to_h + at, x + sigmoid(LOAD(g + at)) * pull * wide(d->step));                                       \
    }
            ALONG(width, FORWARD)
            if (d->half_out) give(moved, c, width, to_h), give(velocity, c, width, to_v);
        }
        free(own);
    }
    return failed ? -1 : 0;
}

/* grad_h, grad_v [N, D] in h's and v's joint type (half_out) -> of logits in their type, of h and v in fp32, and of mu [D] and the
   sum over tokens of those of logits [3 D] in `sums`. */
int dynamics_backward(const struct dynamics *d, const void *grad_h, const void *grad_v, void *of_logits, float *of_h, float *of_v, float *sums,
                      int threads) {
    int64_t width = d->width, parts = (d->count + PART - 1) / PART;
    float *found = calloc(parts * 4 * width + 1, sizeof(float));
    int failed = !found;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && d->count * width > 32768 && found)
    for (int64_t part = 0; part < parts; part++) {
        float *own = found ? malloc(10 * width * sizeof(float)) : 0, *of_mu = found + part * 4 * width, *total = of_mu + width;
        if (!own) {
            failed = 1;
            continue;
        }
        for (int64_t c = part * PART; c < d->count && c < (part + 1) * PART; c++) {
            const float *a = row_of(d->logits, c, 3 * width, d->half_logits, own), *b = a + width, *g = b + width;
            const float *h = row_of(d->h, c, width, d->half_h, own + 3 * width), *v = row_of(d->v, c, width, d->half_v, own + 4 * width);
            const float *dh = row_of(grad_h, c, width, d->half_out, own + 5 * width), *dv = row_of(grad_v, c, width, d->half_out, own + 6 * width);
            float *to = d->half_logits ? own + 7 * width : (float *)of_logits + c * 3 * width;
#define BACKWARD(LOAD, STORE)                                                                                     \
    {                                                                                                             \
        lanes mu = LOAD(d->mu + at), gap = LOAD(h + at) - bounded(mu, d->mu_min, d->mu_max), one = wide(1.0f);    \
        lanes alpha = sigmoid(LOAD(a + at)), slope = sigmoid(LOAD(b + at)), gate = sigmoid(LOAD(g + at));         \
        lanes soft = softplus(LOAD(b + at)), beta = smaller(soft, wide(d->beta_max)), speed = LOAD(v + at);       \
        lanes pull = alpha * speed - beta * gap, of_moved = LOAD(dh + at);                                        \
        lanes of_pull = (LOAD(dv + at) + of_moved * gate * wide(d->step)) * within(pull, -d->velocity_max, d->velocity_max); \
        pull = bounded(pull, -d->velocity_max, d->velocity_max);                                                  \
        lanes of_a = of_pull * speed * alpha * (one - alpha);                                                     \
        lanes of_b = -(slope * gap * of_pull * within(soft, -1.0f, d->beta_max));                                 \
        lanes of_g = pull * of_moved * wide(d->step) * gate * (one - gate), pulled = of_pull * beta;              \
        STORE(to + at, of_a);                                                                                     \
        STORE(to + width + at, of_b);                                                                             \
        STORE(to + 2 * width + at, of_g);                                                                         \
        STORE(total + at, LOAD(total + at) + of_a);                                                               \
        STORE(total + width + at, LOAD(total + width + at) + of_b);                                               \
        STORE(total + 2 * width + at, LOAD(total + 2 * width + at) + of_g);                                       \
        STORE(of_mu + at, LOAD(of_mu + at) + pulled * within(mu, d->mu_min, d->mu_max));                          \
        STORE(of_h + c * width + at, of_moved - pulled);                                                          \
        STORE(of_v + c * width + at, of_pull * alpha);                                                            \
    }
            ALONG(width, BACKWARD)
            if (d->half_logits) give(of_logits, c, 3 * width, to);
        }
        free(own);
    }
    for (int64_t k = 0; k < 4 * width; k++) sums[k] = 0.0f;
    for (int64_t part = 0; found && part < parts; part++)
        for (int64_t k = 0; k < 4 * width; k++) sums[k] += found[part * 4 * width + k];
    free(found);
    return failed ? -1 : 0;
}
