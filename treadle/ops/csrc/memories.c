/* Recurrences with a matrix H [N, P] for a memory, forward and backward (ops/memories.py):

       SUM    H_t = w_t H_{t-1} + k_t (x) v_t                                    y_t = q_t . H_t
       BONUS  H_t = w_t H_{t-1} + k_t (x) v_t                                    y_t = q_t . (H_{t-1} + b k_t (x) v_t)
       DELTA  H_t = w_t H_{t-1} + k_t (x) u_t, u_t = beta_t (v_t - w_t k_t . H_{t-1})   y_t = q_t . H_t

   with w_t = exp(decay_t), one for all channels or one for each of the N, and H_{t-1} = 0 where a document starts. One position after the
   other: the memory stays in the nearest cache, and the products of a form in chunks are no fewer (3 N P against 64 (N + P) + 2 N P a
   position), while there is no difference of sums of decays to round. Backward knows nothing but the inputs: it runs forward
   again for the gradient of q, and for that of the decay in stretches of CHUNK from memories it left on that way.

   A sum over P has its vectors along N and a sum over N along P, so that none crosses a vector: the memory and its gradient are
   each kept both ways round. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* products and sums in one instruction: nothing else has to give these bits */
#endif
#include "lanes.h"
#include <stdlib.h>

#define CHUNK 16
#define BLOCK 4 /* vectors that are worked on together */

enum { SUM, BONUS, DELTA };

struct span { /* of a tensor [rows, heads, length, numbers] whose last dimension is contiguous; floats from one to the next */
    float *at;
    int64_t row, head, step;
};

struct memory {
    int64_t rows, heads, length, inner, width; /* B, H, T, N, P */
    int64_t kind, channels, slopes;            /* channels: decays of each; slopes: the decay's gradient is wanted */
    struct span q, k, v, decay, beta, y, error; /* error: v - w k . H, of DELTA */
    const float *bonus;                         /* [heads, N] */
    const float *initial;                       /* [rows, heads, N, P] or NULL */
    const uint8_t *starts;                      /* [rows, length] or NULL */
    float *last;                                /* [rows, heads, N, P] */
};

struct slopes {
    struct span y, q, k, v, decay, beta;
    const float *last;         /* or NULL */
    float *initial, *bonus;    /* [rows, heads, N, P] or NULL; [rows, heads, N] */
};

INLINE float *of(struct span s, int64_t row, int64_t head, int64_t t) { return s.at + row * s.row + head * s.head + t * s.step; }
static int64_t padded(int64_t n) { return (n + TILE - 1) / TILE * TILE; }
static const float *filled(const float *from, int64_t n, float *buffer) { /* with zeros up to a whole vector */
    if (n % TILE == 0) return from;
    memcpy(buffer, from, n * sizeof(float));
    return buffer;
}

/* What is left of each channel's memory at t: in `buffer` with one for each of N, else the number that is given back. */
static float left_of(const struct memory *m, int64_t row, int64_t head, int64_t t, float *buffer) {
    const float *decay = of(m->decay, row, head, t);
    if (!m->channels) {
        float left = expf(*decay);
        for (int64_t n = 0; n < padded(m->inner); n++) buffer[n] = left;
        return left;
    }
#define LEFT(LOAD, STORE) STORE(buffer + at, exponential(LOAD(decay + at)));
    ALONG(m->inner, LEFT)
    return 0.0f;
}

static int begins(const struct memory *m, int64_t row, int64_t t) { return m->starts && m->starts[row * m->length + t]; }

/* ---- vectors along P ---- */

INLINE void forward_block(int kind, float *h, int64_t stride, const float *q, const float *k, const float *w, float left, float beta,
                          const float *v, float *y, float *error, int64_t inner, const int count) {
    lanes in[BLOCK], out[BLOCK];
    for (int j = 0; j < count; j++) in[j] = each(v + j * TILE), out[j] = wide(0.0f);
    if (kind == DELTA) {
        lanes known[BLOCK];
        for (int j = 0; j < count; j++) known[j] = wide(0.0f);
        for (int64_t n = 0; n < inner; n++)
            for (int j = 0; j < count; j++) known[j] += wide(k[n]) * each(h + n * stride + j * TILE);
        for (int j = 0; j < count; j++) {
            in[j] -= wide(left) * known[j];
            put(error + j * TILE, in[j]);
            in[j] *= wide(beta);
        }
    }
    for (int64_t n = 0; n < inner; n++) {
        lanes by = wide(w[n]), key = wide(k[n]), query = wide(q[n]);
        for (int j = 0; j < count; j++) {
            lanes before = each(h + n * stride + j * TILE), now = before * by + key * in[j];
            put(h + n * stride + j * TILE, now);
            out[j] += query * (kind == BONUS ? before : now);
        }
    }
    for (int j = 0; j < count; j++) put(y + j * TILE, out[j]);
}

/* s: the gradient of H_t but for y_t's, becomes that of H_{t-1}; gives that of v (of u for DELTA) in `grad`. */
INLINE void backward_block(int kind, float *s, int64_t stride, const float *q, const float *k, const float *w, float left, float beta,
                           const float *slope, float *grad, int64_t inner, const int count) {
    lanes dy[BLOCK], sum[BLOCK];
    for (int j = 0; j < count; j++) dy[j] = each(slope + j * TILE), sum[j] = wide(0.0f);
    for (int64_t n = 0; n < inner; n++) {
        lanes by = wide(w[n]), key = wide(k[n]), query = wide(q[n]);
        for (int j = 0; j < count; j++) {
            lanes now = each(s + n * stride + j * TILE);
            if (kind == BONUS) {
                sum[j] += key * now;
                now = now * by + query * dy[j];
            } else {
                now += query * dy[j];
                sum[j] += key * now;
                if (kind == SUM) now *= by;
            }
            put(s + n * stride + j * TILE, now);
        }
    }
    for (int j = 0; j < count; j++) put(grad + j * TILE, sum[j]);
    if (kind != DELTA) return;
    for (int64_t n = 0; n < inner; n++) {
        lanes key = wide(k[n] * beta);
        for (int j = 0; j < count; j++) {
            float *at = s + n * stride + j * TILE;
            put(at, wide(left) * (each(at) - key * sum[j]));
        }
    }
}

/* ---- vectors along N ---- */

/* One position onward: h [width, stride] becomes H_t. Unless NULL, `kept` takes H_{t-1} and dq the sum of slope_p H_p. */
INLINE void onward_block(int kind, float *h, int64_t stride, const float *k, const float *w, const float *u, const float *slope, float *kept,
                         float *dq, int64_t width, const int count) {
    lanes key[BLOCK], by[BLOCK], sum[BLOCK];
    for (int j = 0; j < count; j++) key[j] = each(k + j * TILE), by[j] = each(w + j * TILE), sum[j] = wide(0.0f);
    for (int64_t p = 0; p < width; p++)
        for (int j = 0; j < count; j++) {
            lanes before = each(h + p * stride + j * TILE), now = before * by[j] + key[j] * wide(u[p]);
            put(h + p * stride + j * TILE, now);
            if (kept) put(kept + p * stride + j * TILE, before);
            if (dq) sum[j] += wide(slope[p]) * (kind == BONUS ? before : now);
        }
    for (int j = 0; dq && j < count; j++) put(dq + j * TILE, sum[j]);
}

/* One position back: the gradients of k and (with `kept`, H_{t-1}) of w. */
INLINE void back_block(int kind, float *s, int64_t stride, const float *q, const float *k, const float *w, const float *u, const float *slope,
                       const float *kept, const float *du, float beta, float *dk, float *dw, int64_t width, const int count) {
    lanes key[BLOCK], query[BLOCK], by[BLOCK], of_k[BLOCK], of_w[BLOCK], known[BLOCK];
    for (int j = 0; j < count; j++) {
        key[j] = each(k + j * TILE), query[j] = each(q + j * TILE), by[j] = each(w + j * TILE);
        of_k[j] = of_w[j] = known[j] = wide(0.0f);
    }
    for (int64_t p = 0; p < width; p++)
        for (int j = 0; j < count; j++) {
            lanes now = each(s + p * stride + j * TILE), dy = wide(slope[p]);
            if (kind != BONUS) now += query[j] * dy;
            of_k[j] += wide(u[p]) * now;
            if (kept) {
                lanes before = each(kept + p * stride + j * TILE);
                of_w[j] += now * before;
                if (kind == DELTA) known[j] += wide(du[p]) * before;
            }
            if (kind == DELTA) now -= key[j] * wide(beta * du[p]);
            now *= by[j];
            if (kind == BONUS) now += query[j] * dy;
            put(s + p * stride + j * TILE, now);
        }
    for (int j = 0; j < count; j++) {
        if (kind == DELTA) of_k[j] -= wide(beta) * by[j] * known[j];
        put(dk + j * TILE, of_k[j]);
        put(dw + j * TILE, of_w[j] * by[j]);
    }
}

/* CALL(offset, count) for each block of vectors of `length` floats; count is known to the compiler. */
#define BLOCKS(LENGTH, CALL)                                              \
    {                                                                     \
        int64_t o = 0, vectors = (LENGTH) / TILE;                         \
        for (; o + BLOCK <= vectors; o += BLOCK) CALL(o * TILE, BLOCK);   \
        if (vectors - o == 3) CALL(o * TILE, 3);                          \
        if (vectors - o == 2) CALL(o * TILE, 2);                          \
        if (vectors - o == 1) CALL(o * TILE, 1);                          \
    }
static float bonus_of(const struct memory *m, int64_t head, const float *q, const float *k) {
    float sum = 0.0f;
    for (int64_t n = 0; n < m->inner; n++) sum += q[n] * m->bonus[head * m->inner + n] * k[n];
    return sum;
}

static int forward(const struct memory *m, int64_t row, int64_t head) {
    int64_t inner = m->inner, width = m->width, wide_ = padded(width), place = (row * m->heads + head) * inner * width;
    float *h = calloc(inner * wide_ + 3 * wide_ + padded(inner), sizeof(float));
    if (!h) return -1;
    float *y = h + inner * wide_, *v_buffer = y + wide_, *error = v_buffer + wide_, *w = error + wide_;
    for (int64_t n = 0; m->initial && n < inner; n++) memcpy(h + n * wide_, m->initial + place + n * width, width * sizeof(float));
    for (int64_t t = 0; t < m->length; t++) {
        const float *q = of(m->q, row, head, t), *k = of(m->k, row, head, t), *own = of(m->v, row, head, t);
        const float *v = filled(own, width, v_buffer);
        float left = left_of(m, row, head, t, w), beta = m->kind == DELTA ? *of(m->beta, row, head, t) : 0.0f;
        if (begins(m, row, t)) memset(h, 0, inner * wide_ * sizeof(float));
#define FORWARD_SUM(O, C) forward_block(SUM, h + (O), wide_, q, k, w, left, beta, v + (O), y + (O), error + (O), inner, C)
#define FORWARD_BONUS(O, C) forward_block(BONUS, h + (O), wide_, q, k, w, left, beta, v + (O), y + (O), error + (O), inner, C)
#define FORWARD_DELTA(O, C) forward_block(DELTA, h + (O), wide_, q, k, w, left, beta, v + (O), y + (O), error + (O), inner, C)
        if (m->kind == SUM) BLOCKS(wide_, FORWARD_SUM)
        else if (m->kind == BONUS) BLOCKS(wide_, FORWARD_BONUS)
        else BLOCKS(wide_, FORWARD_DELTA)
        float *out = of(m->y, row, head, t), added = m->kind == BONUS ? bonus_of(m, head, q, k) : 0.0f;
        for (int64_t p = 0; p < width; p++) out[p] = y[p] + added * own[p];
        if (m->kind == DELTA) memcpy(of(m->error, row, head, t), error, width * sizeof(float));
    }
    for (int64_t n = 0; n < inner; n++) memcpy(m->last + place + n * width, h + n * wide_, width * sizeof(float));
    free(h);
    return 0;
}

static int backward(const struct memory *m, const struct slopes *d, int64_t row, int64_t head) {
    int64_t inner = m->inner, width = m->width, length = m->length, long_ = padded(inner), wide_ = padded(width), size = width * long_;
    int64_t chunks = (length + CHUNK - 1) / CHUNK, place = (row * m->heads + head) * inner * width;
    int trail = m->slopes || m->kind == DELTA; /* H_{t-1} is wanted on the way back */
    int64_t need = inner * wide_ + 2 * size + chunks * size + CHUNK * size + length * width + 2 * wide_ + 6 * long_ + wide_;
    float *work = calloc(need, sizeof(float));
    if (!work) return -1;
    float *s = work, *h = s + inner * wide_, *across = h + size, *ways = across + size, *kept = ways + chunks * size;
    float *du = kept + CHUNK * size, *dy_buffer = du + length * width, *dv = dy_buffer + wide_, *k_buffer = dv + wide_;
    float *q_buffer = k_buffer + long_, *w = q_buffer + long_, *dq = w + long_, *dk = dq + long_, *dw = dk + long_;
    float *u = dw + long_;

    /* Onward: the gradient of q. */
    for (int64_t p = 0; m->initial && p < width; p++)
        for (int64_t n = 0; n < inner; n++) h[p * long_ + n] = m->initial[place + n * width + p];
#define AT(T)                                                                                                            \
    const float *k = filled(of(m->k, row, head, T), inner, k_buffer), *q = filled(of(m->q, row, head, T), inner, q_buffer); \
    const float *slope = of(d->y, row, head, T), *v = of(m->v, row, head, T);                                            \
    float left = left_of(m, row, head, T, w), beta = 0.0f;                                                               \
    if (m->kind == DELTA) {                                                                                              \
        const float *error = of(m->error, row, head, T);                                                                 \
        beta = *of(m->beta, row, head, T);                                                                               \
        for (int64_t p = 0; p < width; p++) u[p] = beta * error[p];                                                      \
        v = u;                                                                                                           \
    }                                                                                                                    \
    (void)left, (void)q, (void)slope, (void)v;
    for (int64_t t = 0; t < length; t++) {
        AT(t)
        if (begins(m, row, t)) memset(h, 0, size * sizeof(float));
        if (trail && t % CHUNK == 0) memcpy(ways + t / CHUNK * size, h, size * sizeof(float));
#define ONWARD_BONUS(O, C) onward_block(BONUS, h + (O), long_, k + (O), w + (O), v, slope, 0, dq + (O), width, C)
#define ONWARD(O, C) onward_block(SUM, h + (O), long_, k + (O), w + (O), v, slope, 0, dq + (O), width, C)
        if (m->kind == BONUS) BLOCKS(long_, ONWARD_BONUS)
        else BLOCKS(long_, ONWARD)
        memcpy(of(d->q, row, head, t), dq, inner * sizeof(float));
    }

    /* Back, vectors along P: the gradient of v. */
    for (int64_t n = 0; d->last && n < inner; n++) memcpy(s + n * wide_, d->last + place + n * width, width * sizeof(float));
    for (int64_t t = length - 1; t >= 0; t--) {
        AT(t)
        const float *dy = filled(slope, width, dy_buffer);
#define BACKWARD_SUM(O, C) backward_block(SUM, s + (O), wide_, q, k, w, left, beta, dy + (O), dv + (O), inner, C)
#define BACKWARD_BONUS(O, C) backward_block(BONUS, s + (O), wide_, q, k, w, left, beta, dy + (O), dv + (O), inner, C)
#define BACKWARD_DELTA(O, C) backward_block(DELTA, s + (O), wide_, q, k, w, left, beta, dy + (O), dv + (O), inner, C)
        if (m->kind == SUM) BLOCKS(wide_, BACKWARD_SUM)
        else if (m->kind == BONUS) BLOCKS(wide_, BACKWARD_BONUS)
        else BLOCKS(wide_, BACKWARD_DELTA)
        if (begins(m, row, t)) memset(s, 0, inner * wide_ * sizeof(float));
        float *out = of(d->v, row, head, t), factor = m->kind == DELTA ? beta : 1.0f;
        for (int64_t p = 0; p < width; p++) out[p] = factor * dv[p];
        if (m->kind == DELTA) memcpy(du + t * width, dv, width * sizeof(float));
    }
    for (int64_t n = 0; d->initial && n < inner; n++) memcpy(d->initial + place + n * width, s + n * wide_, width * sizeof(float));

    /* Back, vectors along N: the gradients of k and the decay. */
    for (int64_t p = 0; d->last && p < width; p++)
        for (int64_t n = 0; n < inner; n++) across[p * long_ + n] = d->last[place + n * width + p];
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        int64_t first = chunk * CHUNK, end = first + CHUNK < length ? first + CHUNK : length;
        if (trail) memcpy(h, ways + chunk * size, size * sizeof(float));
        for (int64_t t = first; trail && t < end; t++) {
            AT(t)
            if (begins(m, row, t)) memset(h, 0, size * sizeof(float));
            float *place_ = kept + (t - first) * size;
#define REPEAT(O, C) onward_block(SUM, h + (O), long_, k + (O), w + (O), v, slope, place_ + (O), 0, width, C)
            BLOCKS(long_, REPEAT)
        }
        for (int64_t t = end - 1; t >= first; t--) {
            AT(t)
            const float *before = trail ? kept + (t - first) * size : 0, *du_t = du + t * width;
#define BACK_SUM(O, C) back_block(SUM, across + (O), long_, q + (O), k + (O), w + (O), v, slope, before + (O), du_t, beta, dk + (O), dw + (O), width, C)
#define BACK_PLAIN(O, C) back_block(SUM, across + (O), long_, q + (O), k + (O), w + (O), v, slope, 0, du_t, beta, dk + (O), dw + (O), width, C)
#define BACK_BONUS(O, C) back_block(BONUS, across + (O), long_, q + (O), k + (O), w + (O), v, slope, before ? before + (O) : 0, du_t, beta, dk + (O), dw + (O), width, C)
#define BACK_DELTA(O, C) back_block(DELTA, across + (O), long_, q + (O), k + (O), w + (O), v, slope, before + (O), du_t, beta, dk + (O), dw + (O), width, C)
            if (m->kind == SUM && !trail) BLOCKS(long_, BACK_PLAIN)
            else if (m->kind == SUM) BLOCKS(long_, BACK_SUM)
            else if (m->kind == BONUS) BLOCKS(long_, BACK_BONUS)
            else BLOCKS(long_, BACK_DELTA)
            if (begins(m, row, t)) memset(across, 0, size * sizeof(float));
            memcpy(of(d->k, row, head, t), dk, inner * sizeof(float));
            if (m->channels) {
                memcpy(of(d->decay, row, head, t), dw, inner * sizeof(float));
                continue;
            }
            float sum = 0.0f, of_beta = 0.0f;
            for (int64_t n = 0; n < inner; n++) sum += dw[n];
            if (m->kind == DELTA) {
                const float *error = of(m->error, row, head, t), *given = of(m->v, row, head, t);
                for (int64_t p = 0; p < width; p++) {
                    sum -= beta * du_t[p] * (given[p] - error[p]);
                    of_beta += du_t[p] * error[p];
                }
                *of(d->beta, row, head, t) = of_beta;
            }
            if (m->slopes) *of(d->decay, row, head, t) = sum;
        }
    }

    for (int64_t t = 0; m->kind == BONUS && t < length; t++) { /* y_t's (sum_n q_n b_n k_n) v_t */
        const float *q = of(m->q, row, head, t), *k = of(m->k, row, head, t), *v = of(m->v, row, head, t), *b = m->bonus + head * inner;
        const float *slope = of(d->y, row, head, t);
        float *of_q = of(d->q, row, head, t), *of_k = of(d->k, row, head, t), *of_v = of(d->v, row, head, t);
        float *of_bonus = d->bonus + (row * m->heads + head) * inner, share = bonus_of(m, head, q, k), along = 0.0f;
        for (int64_t p = 0; p < width; p++) along += slope[p] * v[p], of_v[p] += share * slope[p];
        for (int64_t n = 0; n < inner; n++) {
            of_q[n] += along * b[n] * k[n], of_k[n] += along * b[n] * q[n];
            of_bonus[n] = (t ? of_bonus[n] : 0.0f) + along * q[n] * k[n];
        }
    }
    free(work);
    return 0;
}

int memory_forward(const struct memory *m, int threads) {
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && m->rows * m->heads > 1)
    for (int64_t row = 0; row < m->rows; row++)
        for (int64_t head = 0; head < m->heads; head++)
            if (forward(m, row, head)) failed = 1;
    return failed ? -1 : 0;
}

int memory_backward(const struct memory *m, const struct slopes *d, int threads) {
    int failed = 0;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && m->rows * m->heads > 1)
    for (int64_t row = 0; row < m->rows; row++)
        for (int64_t head = 0; head < m->heads; head++)
            if (backward(m, d, row, head)) failed = 1;
    return failed ? -1 : 0;
}
