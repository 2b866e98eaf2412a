/* Reading several residual streams through a router, writing to them, and the gradients of both (ops/stream_kernels.py).

   Tokens go in tiles of 16. What a router decides about a tile lies with its tokens side by side (a lane each), and the streams of
   a token stay in the nearest cache between the router's product and what is done with its answer: each pass over X [N, n, D]
   is made once. Sums over tokens are made in parts of PART tokens and these added in order, so that threads change no bit. */
#include "lanes.h"
#include <stdlib.h>

#define PART 128 /* tokens whose gradients of weights are added before they are written */
#define STREAMS 8
#define MIXED (STREAMS * STREAMS)
#define MOST 160 /* outputs of a router: 8 + 8 + 120 permutations of 5 */
#define STEPS 20 /* of Sinkhorn */

enum { LIE, MIXTURE, SINKHORN };

struct router {
    int64_t streams, width, components, outputs, entries; /* n, D, k (n n for Sinkhorn), 2 n + k, columns of the table */
    int64_t kind, mean;                                   /* mean: sees the streams' mean */
    double eps;
    const float *weight, *bias, *gain, *table; /* [outputs, W], [outputs], [3], [k, entries] */
};

/* What is kept of N tokens, tile by tile: [tiles, numbers, 16]. */
struct kept {
    float *z, *scale, *pre, *shares; /* outputs, 1, n, k numbers */
};

/* ---- what a router makes of its outputs ---- */

/* M = (I + A)^-1 of the 4 x 4 skew A with the numbers p above its diagonal, in closed form (ops/rotations.py). */
INLINE void inverse_of(const lanes *p, lanes *m) {
    lanes s = p[0] * p[0] + p[1] * p[1] + p[2] * p[2] + p[3] * p[3] + p[4] * p[4] + p[5] * p[5];
    lanes pf = p[0] * p[5] - p[1] * p[4] + p[2] * p[3], zero = wide(0.0f), one = wide(1.0f);
    const lanes dual[6] = {p[5], -p[4], p[3], p[2], -p[1], p[0]};
    const lanes a[4][4] = {{zero, p[0], p[1], p[2]}, {-p[0], zero, p[3], p[4]}, {-p[1], -p[3], zero, p[5]}, {-p[2], -p[4], -p[5], zero}};
    lanes q[6], under = one / (one + s + pf * pf);
    for (int e = 0; e < 6; e++) q[e] = p[e] + pf * dual[e];
    const lanes b[4][4] = {{zero, q[0], q[1], q[2]}, {-q[0], zero, q[3], q[4]}, {-q[1], -q[3], zero, q[5]}, {-q[2], -q[4], -q[5], zero}};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            lanes sum = -b[i][j];
            for (int k = 0; k < 4; k++) sum += a[i][k] * a[k][j];
            m[4 * i + j] = (i == j ? sum + one + s : sum) * under;
        }
}

/* Rows, then columns, sum to 1; `tables` [2 STEPS + 1, n n] takes the table before each step and after the last. */
static void sinkhorn(const lanes *logits, int64_t n, lanes *tables) {
    lanes most = logits[0];
    for (int64_t e = 1; e < n * n; e++) most = larger(most, logits[e]);
    for (int64_t e = 0; e < n * n; e++) tables[e] = exponential(logits[e] - most);
    for (int step = 0; step < 2 * STEPS; step++, tables += n * n) {
        int64_t along = step % 2 ? n : 1, across = step % 2 ? 1 : n;
        for (int64_t i = 0; i < n; i++) {
            lanes sum = tables[i * across];
            for (int64_t j = 1; j < n; j++) sum += tables[i * across + j * along];
            sum = wide(1.0f) / sum;
            for (int64_t j = 0; j < n; j++) tables[n * n + i * across + j * along] = tables[i * across + j * along] * sum;
        }
    }
}

/* grad: of the last table, becomes that of the logits. */
static void sinkhorn_gradient(const lanes *tables, int64_t n, lanes *grad) {
    for (int step = 2 * STEPS - 1; step >= 0; step--) {
        const lanes *before = tables + step * n * n, *after = before + n * n;
        int64_t along = step % 2 ? n : 1, across = step % 2 ? 1 : n;
        for (int64_t i = 0; i < n; i++) {
            lanes sum = before[i * across], inner = grad[i * across] * after[i * across];
            for (int64_t j = 1; j < n; j++) {
                int64_t e = i * across + j * along;
                sum += before[e], inner += grad[e] * after[e];
            }
            sum = wide(1.0f) / sum;
            for (int64_t j = 0; j < n; j++) grad[i * across + j * along] = (grad[i * across + j * along] - inner) * sum;
        }
    }
    for (int64_t e = 0; e < n * n; e++) grad[e] *= tables[e];
}

/* z [outputs] -> pre, post [n], shares [k], mixing [n n]. */
static void decide(const struct router *r, const lanes *z, lanes *pre, lanes *post, lanes *shares, lanes *mixing) {
    int64_t n = r->streams, k = r->components;
    for (int64_t j = 0; j < n; j++) pre[j] = sigmoid(wide(r->gain[0]) * z[j] + wide(r->bias[j]));
    for (int64_t j = 0; j < n; j++) post[j] = wide(2.0f) * sigmoid(wide(r->gain[1]) * z[n + j] + wide(r->bias[n + j]));
    lanes most = wide(-INFINITY), sum = wide(0.0f);
    for (int64_t c = 0; c < k; c++) {
        shares[c] = wide(r->gain[2]) * z[2 * n + c] + wide(r->bias[2 * n + c]);
        most = larger(most, shares[c]);
    }
    if (r->kind == SINKHORN) {
        lanes tables[(2 * STEPS + 1) * MIXED];
        sinkhorn(shares, n, tables);
        memcpy(mixing, tables + 2 * STEPS * n * n, n * n * sizeof(lanes));
        return;
    }
    for (int64_t c = 0; c < k; c++) sum += shares[c] = exponential(shares[c] - most);
    for (int64_t c = 0; c < k; c++) shares[c] /= sum;
    lanes mixed[MIXED];
    for (int64_t e = 0; e < r->entries; e++) {
        mixed[e] = wide(0.0f);
        for (int64_t c = 0; c < k; c++) mixed[e] += shares[c] * wide(r->table[c * r->entries + e]);
    }
    if (r->kind == LIE) {
        inverse_of(mixed, mixing);
        for (int e = 0; e < 16; e++) mixing[e] = wide(2.0f) * mixing[e] - wide(e % 5 ? 0.0f : 1.0f);
    } else
        memcpy(mixing, mixed, n * n * sizeof(lanes));
}

/* The gradients of pre, post and mixing -> of z; those of bias, gain and table are added to sums [..., 16 lanes]. */
static void undecide(const struct router *r, const lanes *z, const lanes *pre, const lanes *shares, const lanes *grad_pre,
                     const lanes *grad_post, lanes *grad_mixing, lanes *grad_z, lanes *bias, lanes *gain, lanes *table) {
    int64_t n = r->streams, k = r->components;
    for (int64_t j = 0; j < n; j++) {
        lanes half = sigmoid(wide(r->gain[1]) * z[n + j] + wide(r->bias[n + j]));
        grad_z[j] = grad_pre[j] * pre[j] * (wide(1.0f) - pre[j]);
        grad_z[n + j] = wide(2.0f) * grad_post[j] * half * (wide(1.0f) - half);
    }
    lanes *logits = grad_z + 2 * n;
    if (r->kind == SINKHORN) {
        lanes tables[(2 * STEPS + 1) * MIXED];
        for (int64_t c = 0; c < k; c++) logits[c] = wide(r->gain[2]) * z[2 * n + c] + wide(r->bias[2 * n + c]);
        sinkhorn(logits, n, tables);
        sinkhorn_gradient(tables, n, grad_mixing);
        memcpy(logits, grad_mixing, k * sizeof(lanes));
    } else {
        lanes mixed[MIXED];
        if (r->kind == LIE) { /* dM = -M dA M */
            lanes m[16], left[16], both[16];
            for (int e = 0; e < 6; e++) {
                mixed[e] = wide(0.0f);
                for (int64_t c = 0; c < k; c++) mixed[e] += shares[c] * wide(r->table[c * 6 + e]);
            }
            inverse_of(mixed, m);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    left[4 * i + j] = m[i] * grad_mixing[j];
                    for (int l = 1; l < 4; l++) left[4 * i + j] += m[4 * l + i] * grad_mixing[4 * l + j];
                }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    both[4 * i + j] = left[4 * i] * m[4 * j];
                    for (int l = 1; l < 4; l++) both[4 * i + j] += left[4 * i + l] * m[4 * j + l];
                }
            int e = 0;
            for (int i = 0; i < 4; i++)
                for (int j = i + 1; j < 4; j++) mixed[e++] = wide(-2.0f) * (both[4 * i + j] - both[4 * j + i]);
        } else
            memcpy(mixed, grad_mixing, n * n * sizeof(lanes));
        lanes inner = wide(0.0f);
        for (int64_t c = 0; c < k; c++) {
            logits[c] = wide(0.0f);
            for (int64_t e = 0; e < r->entries; e++) {
                logits[c] += mixed[e] * wide(r->table[c * r->entries + e]);
                table[c * r->entries + e] += mixed[e] * shares[c];
            }
            inner += logits[c] * shares[c];
        }
        for (int64_t c = 0; c < k; c++) logits[c] = (logits[c] - inner) * shares[c];
    }
    for (int64_t o = 0; o < r->outputs; o++) {
        int part = o < n ? 0 : o < 2 * n ? 1 : 2;
        bias[o] += grad_z[o];
        gain[part] += grad_z[o] * z[o];
        grad_z[o] *= wide(r->gain[part]);
    }
}

/* ---- passes over the streams ---- */

/* What the router sees of a token: all streams, or their mean in `own` [D]. */
INLINE const float *seen_of(const struct router *r, const float *x, float *own) {
    int64_t n = r->streams, width = r->width;
    if (!r->mean) return x;
    for (int64_t k = 0; k < width; k++) {
        float sum = x[k];
        for (int64_t i = 1; i < n; i++) sum += x[i * width + k];
        own[k] = sum / (float)n;
    }
    return own;
}

/* z = W seen / rms(seen) of one token; gives the scale. */
static float product(const struct router *r, const float *seen, int64_t length, float *z) {
    lanes square = wide(0.0f);
#define SQUARE(LOAD, STORE) { lanes v = LOAD(seen + at); square += v * v; }
    ALONG(length, SQUARE)
    float scale = 1.0f / sqrtf(sum_of(square) / (float)length + (float)r->eps);
    int64_t o = 0;
    for (; o + 5 <= r->outputs; o += 5) {
        const float *w = r->weight + o * length;
        lanes a = wide(0.0f), b = a, c = a, d = a, e = a;
#define FIVE(LOAD, STORE)                                                                              \
    {                                                                                                  \
        lanes v = LOAD(seen + at);                                                                     \
        a += v * LOAD(w + at), b += v * LOAD(w + length + at), c += v * LOAD(w + 2 * length + at);     \
        d += v * LOAD(w + 3 * length + at), e += v * LOAD(w + 4 * length + at);                        \
    }
        ALONG(length, FIVE)
        z[o] = sum_of(a) * scale, z[o + 1] = sum_of(b) * scale, z[o + 2] = sum_of(c) * scale;
        z[o + 3] = sum_of(d) * scale, z[o + 4] = sum_of(e) * scale;
    }
    for (; o < r->outputs; o++) {
        const float *w = r->weight + o * length;
        lanes a = wide(0.0f);
#define ONE(LOAD, STORE) a += LOAD(seen + at) * LOAD(w + at);
        ALONG(length, ONE)
        z[o] = sum_of(a) * scale;
    }
    return scale;
}

INLINE void read_token(const float *x, const float *pre, int64_t n, int64_t width, float *u) {
#define READ(LOAD, STORE)                                                                      \
    {                                                                                          \
        lanes sum = wide(pre[0]) * LOAD(x + at);                                               \
        for (int64_t j = 1; j < n; j++) sum += wide(pre[j]) * LOAD(x + j * width + at);        \
        STORE(u + at, sum);                                                                    \
    }
    ALONG(width, READ)
}

/* X [N, n, D] -> u [N, D], post [N, n], mixing [N, n, n], and what is kept. 0, or -1 when there is no memory. */
int streams_read(const struct router *r, const struct kept *keep, const float *x, float *u, float *post, float *mixing, int64_t count,
                 int threads) {
    int64_t n = r->streams, width = r->width, length = r->mean ? width : n * width, tiles = (count + TILE - 1) / TILE;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && tiles > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        lanes z[MOST], pre[STREAMS], after[STREAMS], shares[MOST], mixed[MIXED];
        float scale[TILE] = {0}, row[MOST], few[1024], *own = few;
        int64_t here = count - tile * TILE < TILE ? count - tile * TILE : TILE;
        if (r->mean && width > 1024 && !(own = malloc(width * sizeof(float)))) {
            failed = 1;
            continue;
        }
        memset(z, 0, r->outputs * sizeof(lanes));
        for (int64_t t = 0; t < here; t++) {
            const float *token = x + (tile * TILE + t) * n * width;
            scale[t] = product(r, seen_of(r, token, own), length, row);
            for (int64_t o = 0; o < r->outputs; o++) ((float *)(z + o))[t] = row[o];
        }
        memset(shares, 0, r->components * sizeof(lanes));
        decide(r, z, pre, after, shares, mixed);
        for (int64_t t = 0; t < here; t++) {
            int64_t token = tile * TILE + t;
            float reading[STREAMS];
            for (int64_t j = 0; j < n; j++) reading[j] = ((float *)(pre + j))[t], post[token * n + j] = ((float *)(after + j))[t];
            for (int64_t e = 0; e < n * n; e++) mixing[token * n * n + e] = ((float *)(mixed + e))[t];
            if (n == 4) read_token(x + token * 4 * width, reading, 4, width, u + token * width);
            else read_token(x + token * n * width, reading, n, width, u + token * width);
        }
        memcpy(keep->z + tile * TILE * r->outputs, z, r->outputs * sizeof(lanes));
        memcpy(keep->scale + tile * TILE, scale, sizeof scale);
        memcpy(keep->pre + tile * TILE * n, pre, n * sizeof(lanes));
        memcpy(keep->shares + tile * TILE * r->components, shares, r->components * sizeof(lanes));
        if (own != few) free(own);
    }
    return failed ? -1 : 0;
}

INLINE void mix_token(const float *x, const float *h, const float *post, const float *y, int64_t n, int64_t width, float *out) {
#define MIX(LOAD, STORE)                                                                           \
    {                                                                                              \
        lanes v[STREAMS], added = LOAD(y + at);                                                    \
        for (int64_t j = 0; j < n; j++) v[j] = LOAD(x + j * width + at);                           \
        for (int64_t i = 0; i < n; i++) {                                                          \
            lanes sum = wide(h[i * n]) * v[0];                                                     \
            for (int64_t j = 1; j < n; j++) sum += wide(h[i * n + j]) * v[j];                      \
            STORE(out + i * width + at, sum + wide(post[i]) * added);                              \
        }                                                                                          \
    }
    ALONG(width, MIX)
}

/* X [N, n, D], mixing, post, y [N, D] in fp32 or (half) bf16 -> mixing X + post (x) y. */
int streams_write(const float *x, const float *mixing, const float *post, const void *y, int half, float *out, int64_t count, int64_t n,
                  int64_t width, int threads) {
    int failed = 0;
    int64_t parts = (count + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        float *own = half ? malloc(width * sizeof(float)) : 0;
        if (half && !own) {
            failed = 1;
            continue;
        }
        for (int64_t t = part * PART; t < count && t < (part + 1) * PART; t++) {
            const float *row = as_float((const char *)y + t * width * (half ? 2 : 4), width, half, own);
            if (n == 4) mix_token(x + t * 4 * width, mixing + t * 16, post + t * 4, row, 4, width, out + t * 4 * width);
            else mix_token(x + t * n * width, mixing + t * n * n, post + t * n, row, n, width, out + t * n * width);
        }
        free(own);
    }
    return failed ? -1 : 0;
}

INLINE void unwrite_token(const float *grad, const float *post, const float *y, int64_t n, int64_t width, float *grad_y, float *grad_post) {
    lanes sums[STREAMS];
    for (int64_t i = 0; i < n; i++) sums[i] = wide(0.0f);
#define UNWRITE(LOAD, STORE)                                                                       \
    {                                                                                              \
        lanes v = LOAD(y + at), total = wide(0.0f);                                                \
        for (int64_t i = 0; i < n; i++) {                                                          \
            lanes g = LOAD(grad + i * width + at);                                                 \
            total += wide(post[i]) * g, sums[i] += g * v;                                          \
        }                                                                                          \
        STORE(grad_y + at, total);                                                                 \
    }
    ALONG(width, UNWRITE)
    for (int64_t i = 0; i < n; i++) grad_post[i] = sum_of(sums[i]);
}

/* The gradient of what was written [N, n, D] -> of y (in y's type) and of post; it is itself that of mixing X. */
int streams_write_gradient(const float *grad, const float *post, const void *y, int half, void *grad_y, float *grad_post, int64_t count,
                           int64_t n, int64_t width, int threads) {
    int failed = 0;
    int64_t parts = (count + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && parts > 1)
    for (int64_t part = 0; part < parts; part++) {
        float *own = half ? malloc(2 * width * sizeof(float)) : 0;
        if (half && !own) {
            failed = 1;
            continue;
        }
        for (int64_t t = part * PART; t < count && t < (part + 1) * PART; t++) {
            const float *row = as_float((const char *)y + t * width * (half ? 2 : 4), width, half, own), *g = grad + t * n * width;
            float *out = half ? own + width : (float *)grad_y + t * width;
            if (n == 4) unwrite_token(g, post + t * 4, row, 4, width, out, grad_post + t * 4);
            else unwrite_token(g, post + t * n, row, n, width, out, grad_post + t * n);
            if (half)
                for (int64_t k = 0; k < width; k++) ((uint16_t *)grad_y)[t * width + k] = rounded(out[k]);
        }
        free(own);
    }
    return failed ? -1 : 0;
}

/* pre_j: x_j . gu; mixing_ij: g_i . x_j. */
INLINE void products(const float *x, const float *grad_u, const float *held, int64_t n, int64_t width, float *pre, float *mixing) {
    lanes first[STREAMS], sums[MIXED];
    for (int64_t j = 0; j < n; j++) first[j] = wide(0.0f);
    for (int64_t e = 0; e < n * n; e++) sums[e] = wide(0.0f);
#define PRODUCTS(LOAD, STORE)                                                                      \
    {                                                                                              \
        lanes v[STREAMS], gu = LOAD(grad_u + at);                                                  \
        for (int64_t j = 0; j < n; j++) v[j] = LOAD(x + j * width + at), first[j] += v[j] * gu;    \
        for (int64_t i = 0; i < n; i++) {                                                          \
            lanes g = LOAD(held + i * width + at);                                                 \
            for (int64_t j = 0; j < n; j++) sums[i * n + j] += g * v[j];                           \
        }                                                                                          \
    }
    ALONG(width, PRODUCTS)
    for (int64_t j = 0; j < n; j++) pre[j] = sum_of(first[j]);
    for (int64_t e = 0; e < n * n; e++) mixing[e] = sum_of(sums[e]);
}

/* grad_x = mixing^T g + pre (x) gu + through the router: W^T c + x pull (c = grad_z scale). */
INLINE void unread_token(const struct router *r, const float *x, const float *seen, const float *grad_u, const float *held, const float *h,
                         const float *pre, const float *c, float pull, int64_t n, float *through, float *out) {
    int64_t width = r->width, length = r->mean ? width : n * width;
#define THROUGH(LOAD, STORE)                                                                                \
    {                                                                                                       \
        lanes sum = wide(pull) * LOAD(seen + at);                                                           \
        for (int64_t o = 0; o < r->outputs; o++) sum += wide(c[o]) * LOAD(r->weight + o * length + at);     \
        STORE(through + at, sum);                                                                           \
    }
    ALONG(length, THROUGH)
    float part = 1.0f / (float)n;
#define UNREAD(LOAD, STORE)                                                                                  \
    {                                                                                                        \
        lanes g[STREAMS], gu = LOAD(grad_u + at);                                                            \
        for (int64_t i = 0; i < n; i++) g[i] = LOAD(held + i * width + at);                                  \
        for (int64_t j = 0; j < n; j++) {                                                                    \
            lanes sum = r->mean ? wide(part) * LOAD(through + at) : LOAD(through + j * width + at);          \
            sum += wide(pre[j]) * gu;                                                                        \
            for (int64_t i = 0; i < n; i++) sum += wide(h[i * n + j]) * g[i];                                \
            STORE(out + j * width + at, sum);                                                                \
        }                                                                                                    \
    }
    ALONG(width, UNREAD)
    (void)x;
}

/* The gradients of u, of mixing X and of post -> of X; and in `sums` those of weight [outputs, W], then of bias [outputs],
   gain [3] and table [k, entries]. 0, or -1 when there is no memory. */
int streams_read_gradient(const struct router *r, const struct kept *keep, const float *x, const float *mixing, const float *grad_u,
                          const float *held, const float *grad_post, float *grad_x, float *sums, int64_t count, int threads) {
    int64_t n = r->streams, width = r->width, length = r->mean ? width : n * width, parts = (count + PART - 1) / PART;
    int64_t outputs = r->outputs, table = r->kind == SINKHORN ? 0 : r->components * r->entries, small = outputs + 3 + table;
    int64_t size = outputs * length + small;
    float *found = calloc(parts * size + 1, sizeof(float));
    int failed = !found;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && parts > 1 && found)
    for (int64_t part = 0; part < parts; part++) {
        float *work = found ? malloc((TILE * width + length) * sizeof(float)) : 0;
        lanes *added = found ? calloc(small, sizeof(lanes)) : 0;
        if (!work || !added) {
            failed = 1;
            free(work), free(added);
            continue;
        }
        float *weight = found + part * size, *means = work, *through = work + TILE * width;
        for (int64_t first = part * PART; first < count && first < (part + 1) * PART; first += TILE) {
            int64_t here = count - first < TILE ? count - first : TILE, tile = first / TILE;
            const lanes *z = (const lanes *)(keep->z + first * outputs), *pre = (const lanes *)(keep->pre + first * n);
            const lanes *shares = (const lanes *)(keep->shares + first * r->components);
            lanes grad_pre[STREAMS], after[STREAMS], mixed[MIXED], grad_z[MOST], scale = each(keep->scale + tile * TILE);
            memset(grad_pre, 0, sizeof grad_pre), memset(after, 0, sizeof after), memset(mixed, 0, sizeof mixed);
            for (int64_t t = 0; t < here; t++) {
                float reading[STREAMS], turned[MIXED];
                const float *token = x + (first + t) * n * width, *g = held + (first + t) * n * width, *gu = grad_u + (first + t) * width;
                if (n == 4) products(token, gu, g, 4, width, reading, turned);
                else products(token, gu, g, n, width, reading, turned);
                for (int64_t j = 0; j < n; j++)
                    ((float *)(grad_pre + j))[t] = reading[j], ((float *)(after + j))[t] = grad_post[(first + t) * n + j];
                for (int64_t e = 0; e < n * n; e++) ((float *)(mixed + e))[t] = turned[e];
            }
            undecide(r, z, pre, shares, grad_pre, after, mixed, grad_z, added, added + outputs, added + outputs + 3);
            lanes pull = wide(0.0f);
            for (int64_t o = 0; o < outputs; o++) pull += grad_z[o] * z[o], grad_z[o] *= scale;
            pull *= scale * scale / wide(-(float)length);
            const float *seen[TILE];
            for (int64_t t = 0; t < here; t++) {
                const float *token = x + (first + t) * n * width, *h = mixing + (first + t) * n * n;
                float c[MOST], reading[STREAMS], *out = grad_x + (first + t) * n * width;
                for (int64_t o = 0; o < outputs; o++) c[o] = ((float *)(grad_z + o))[t];
                for (int64_t j = 0; j < n; j++) reading[j] = ((const float *)(pre + j))[t];
                seen[t] = seen_of(r, token, means + t * width);
                const float *g = held + (first + t) * n * width, *gu = grad_u + (first + t) * width;
                if (n == 4) unread_token(r, token, seen[t], gu, g, h, reading, c, ((float *)&pull)[t], 4, through, out);
                else unread_token(r, token, seen[t], gu, g, h, reading, c, ((float *)&pull)[t], n, through, out);
            }
            for (int64_t o = 0; o < outputs; o++) {
                const float *c = (float *)(grad_z + o);
                float *row = weight + o * length;
#define WEIGHT(LOAD, STORE)                                                                    \
    {                                                                                          \
        lanes sum = LOAD(row + at);                                                            \
        for (int64_t t = 0; t < here; t++) sum += wide(c[t]) * LOAD(seen[t] + at);             \
        STORE(row + at, sum);                                                                  \
    }
                ALONG(length, WEIGHT)
            }
        }
        for (int64_t e = 0; e < small; e++) weight[outputs * length + e] = sum_of(added[e]);
        free(work), free(added);
    }
    for (int64_t e = 0; e < size; e++) sums[e] = 0.0f;
    for (int64_t part = 0; found && part < parts; part++)
        for (int64_t e = 0; e < size; e++) sums[e] += found[part * size + e];
    free(found);
    return failed ? -1 : 0;
}
