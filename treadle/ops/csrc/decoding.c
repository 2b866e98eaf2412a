/* Products of a few rows with packed weights, and one whole decoding step of a dense transformer (ops/packed_linear.py,
   ops/dense_step.py). */
#include <stdlib.h>

#include "packed.h"
#include "pairs.h"

#define ALONE (1 << 18) /* multiplications, 6 microseconds: less is not worth waking threads for */

/* Whether there are products of pairs of bf16 numbers (pairs.h). */
int has_pairs(void) {
#ifdef PAIRS
    return 1;
#else
    return 0;
#endif
}

/* x as `interleaved` or `rounded_rows` leaves it. */
static void rows_at_once(const struct matrix *m, const void *x, float *y, int64_t rows, int threads) {
    const int64_t panels = (m->outputs + PANEL - 1) / PANEL;
    if (m->outputs * m->inputs * rows < ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
#ifdef PAIRS
        if (m->format >= FIRST_PAIRED) {
            paired_panel(m, p, x, y, rows, m->outputs);
            continue;
        }
#endif
        one_panel(m, p, x, y, rows, m->outputs);
    }
}

/* x [rows, inputs] -> y [rows, outputs]. */
void product(const struct matrix *m, const float *x, float *y, int64_t rows, int threads) {
    int64_t most = NUMBERS / (m->inputs > 0 ? m->inputs : 1) / ROWS * ROWS, count;
    most = most < 2 * ROWS ? 2 * ROWS : most > MOST_ROWS ? MOST_ROWS : most;
#ifdef PAIRS
    if (m->format >= FIRST_PAIRED) {
        uint32_t some[4096]; /* of one row of 8,192 numbers */
        uint32_t *pairs = rows > 1 || m->inputs > 8192 ? malloc(sizeof(uint32_t) * (size_t)((rows < most ? rows : most) * ((m->inputs + 1) / 2))) : some;
        if (pairs == NULL && m->inputs <= 8192) pairs = some, most = 1;
        for (int64_t i = 0; pairs == NULL && i < rows * m->outputs; i++) y[i] = NAN; /* no memory: not numbers that look like some */
        for (int64_t first = 0; pairs != NULL && first < rows; first += count) {
            count = rows - first < most ? rows - first : most;
            rounded_rows(x + first * m->inputs, count, m->inputs, pairs);
            rows_at_once(m, pairs, y + first * m->outputs, count, threads);
        }
        if (pairs != some) free(pairs);
        return;
    }
#endif
    float *own = rows > 1 ? malloc(sizeof(float) * (size_t)(most * m->inputs)) : NULL;
    if (own == NULL) most = 1;
    for (int64_t first = 0; first < rows; first += count) {
        count = rows - first < most ? rows - first : most;
        if (count > 1) interleaved(x + first * m->inputs, count, m->inputs, own);
        rows_at_once(m, count > 1 ? own : x + first * m->inputs, y + first * m->outputs, count, threads);
    }
    free(own);
}

/* Rows [first, last) of W in fp32, [last - first, inputs]; first is a multiple of 64. */
void unpacked(const struct matrix *m, float *out, int64_t first, int64_t last, int threads) {
    const int64_t in = m->inputs, panels = (last - first + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < panels; i++) {
        const int64_t p = first / PANEL + i, n = p * PANEL, count = last - n < PANEL ? last - n : PANEL;
        float values[PANEL], blocked[PANEL][16];
        for (int64_t k = 0; k < in; k++) {
            for (int v = 0; v < VECTORS; v++) {
                vector w;
                if (m->format == 3 || m->format == 6) {
                    const table levels = read_table(m->table);
                    integers both = widened((const uint8_t *)m->codes + (p * (in / 2) + k / 2) * PANEL + v * LANES);
                    w = looked_up(k % 2 ? (integers)(both >> 4) : both, &levels);
                    w *= from_fp16((const uint16_t *)m->scales + (p * (in / GROUP) + k / GROUP) * PANEL + v * LANES);
#ifdef PAIRS
                } else if (m->format >= FIRST_PAIRED) {
                    w = paired_weight(m, p, k, v);
                    if (m->format == 5) w *= loaded((const float *)m->scales + n + v * LANES);
#endif
                } else {
                    const int64_t size = m->format == 0 ? 4 : m->format == 1 ? 2 : 1;
                    w = weight((const uint8_t *)m->codes + p * PANEL * in * size, k, v * LANES, (int)m->format);
                    if (m->format == 2) w *= loaded((const float *)m->scales + n + v * LANES);
                }
                store(values + v * LANES, w);
            }
            /* Sixteen k of an output are written together: one at a time, each would touch a cache line of its own. */
            for (int r = 0; r < PANEL; r++) blocked[r][k % 16] = values[r];
            if (k % 16 == 15 || k == in - 1)
                for (int64_t r = 0; r < count; r++)
                    memcpy(out + (n - first + r) * in + k / 16 * 16, blocked[r], (size_t)(k % 16 + 1) * sizeof(float));
        }
    }
}

/* ---- one decoding step of a dense transformer ---- */

struct layer {
    struct matrix qkv, out, gate_up, down; /* rows of qkv: queries, keys, values; of gate_up: gates, then ups */
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm; /* the last two [head_width], or NULL */
};

struct decoder {
    const struct layer *layers;
    struct matrix head;
    const float *embedding, *norm, *cosines, *sines; /* angles [places, turned / 2] */
    int64_t count, width, inner, heads, groups, head_width, turned, slots; /* slots of a row in a cache */
    float eps, scale;
};

/* e^x with an error of 2 units in the last place: 2^n by shifting the exponent, e^r for |r| <= log(2) / 2 by its series to
   r^7 / 7!. */
INLINE vector exponential(vector x) {
    x = lower(higher(x, all(-87.0f)), all(88.0f));
    vector shift = all(12582912.0f), turns = multiply_add(x, all(1.44269504f), shift);
    integers n = (integers)turns - (integers)shift;
    turns = turns - shift;
    vector r = multiply_add(turns, all(-0.693359375f), x);
    r = multiply_add(turns, all(2.12194440e-4f), r);
    vector y = all(1.0f / 5040);
    y = multiply_add(y, r, all(1.0f / 720));
    y = multiply_add(y, r, all(1.0f / 120));
    y = multiply_add(y, r, all(1.0f / 24));
    y = multiply_add(y, r, all(1.0f / 6));
    y = multiply_add(y, r, all(0.5f));
    y = multiply_add(y, r, all(1.0f));
    y = multiply_add(y, r, all(1.0f));
    return (vector)((integers)y + (n << 23));
}

/* x / rms(x) * gain; width a multiple of 16. */
INLINE void normed(const float *x, const float *gain, float eps, float *y, int64_t width) {
    vector squares = zero();
    for (int64_t i = 0; i < width; i += LANES) squares = multiply_add(loaded(x + i), loaded(x + i), squares);
    vector factor = all(1.0f / sqrtf(total(squares) / (float)width + eps));
    for (int64_t i = 0; i < width; i += LANES) store(y + i, loaded(x + i) * factor * loaded(gain + i));
}

INLINE void turn(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cosine[i] - second * sine[i];
        x[half + i] = second * cosine[i] + first * sine[i];
    }
}

/* `vectors` vectors from column i on of the sum of values [used, width], each times its score; even and odd ones apart. */
INLINE void weighted(const float *values, const float *scores, int64_t used, int64_t width, int64_t i, float factor, float *y, const int vectors) {
    vector even[4], odd[4];
    for (int v = 0; v < vectors; v++) even[v] = odd[v] = zero();
    int64_t s = 0;
    for (; s + 2 <= used; s += 2) {
        const float *at = values + s * width + i;
        const vector one = all(scores[s]), other = all(scores[s + 1]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            even[v] = multiply_add(one, loaded(at + v * LANES), even[v]);
            odd[v] = multiply_add(other, loaded(at + width + v * LANES), odd[v]);
        }
    }
    for (int v = 0; v < vectors; v++) {
        if (s < used) even[v] = multiply_add(all(scores[s]), loaded(values + s * width + i + v * LANES), even[v]);
        store(y + i + v * LANES, (even[v] + odd[v]) * factor);
    }
}

/* Softmax over the first `used` keys; scores has room for used + 15 numbers. */
static void attend(const float *q, const float *keys, const float *values, int64_t used, int64_t width, float scale,
                   float *scores, float *y) {
    const int64_t padded = (used + LANES - 1) / LANES * LANES;
    for (int64_t s = 0; s < used; s += LANES) {
        const int64_t count = used - s < LANES ? used - s : LANES;
        vector sums[LANES];
        for (int64_t k = 0; k < count; k++) {
            vector sum = zero();
            for (int64_t i = 0; i < width; i += LANES) {
                sum = multiply_add(loaded(q + i), loaded(keys + (s + k) * width + i), sum);
                __builtin_prefetch(values + (s + k) * width + i, 0, 3);
            }
            sums[k] = sum;
        }
        for (int64_t k = count; k < LANES; k++) sums[k] = zero();
        store(scores + s, totals(sums) * scale);
    }
    for (int64_t s = used; s < padded; s++) scores[s] = -INFINITY;
    vector most = all(-INFINITY), sum = zero();
    for (int64_t s = 0; s < padded; s += LANES) most = higher(most, loaded(scores + s));
    most = all(largest(most));
    for (int64_t s = 0; s < padded; s += LANES) {
        vector share = exponential(loaded(scores + s) - most);
        store(scores + s, share);
        if (s + LANES > used)
            for (int64_t i = used; i < padded; i++) scores[i] = 0;
        sum += loaded(scores + s);
    }
    const float factor = 1.0f / total(sum);
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) weighted(values, scores, used, width, i, factor, y, 4);
    for (; i < width; i += LANES) weighted(values, scores, used, width, i, factor, y, 1);
}

#define QUERIES 32 /* of a prompt that read a panel of 64 keys together */

/* x [ROWS, inputs], rows `stride` apart, times 16 columns of a panel [inputs, width], added to y [ROWS, width]. */
INLINE void block_of_rows(const float *x, int64_t stride, const float *panel, int64_t inputs, int64_t width, float *y) {
    vector even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; r++) even[r] = loaded(y + r * width), odd[r] = zero();
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2) {
        vector w = loaded(panel + k * width), u = loaded(panel + (k + 1) * width);
        for (int r = 0; r < ROWS; r++) {
            even[r] = multiply_add(all(x[r * stride + k]), w, even[r]);
            odd[r] = multiply_add(all(x[r * stride + k + 1]), u, odd[r]);
        }
    }
    if (k < inputs)
        for (int r = 0; r < ROWS; r++) even[r] = multiply_add(all(x[r * stride + k]), loaded(panel + k * width), even[r]);
    for (int r = 0; r < ROWS; r++) store(y + r * width, even[r] + odd[r]);
}

/* Softmax over earlier positions and their own for `count` <= QUERIES queries from position `start` on, key panel by key panel
   (Milakov & Gimelshein 2018, arXiv 1805.02867): the sums so far shrink when a larger score is met. panels: keys [S / 64,
   width, 64]; scratch: QUERIES * (2 width + 64) numbers. */
static void attend_together(const float *q, int64_t stride, const float *panels, const float *values, int64_t start, int64_t count,
                            int64_t width, float scale, float *y, int64_t out_stride, float *scratch) {
    float *own = scratch, *sums = own + QUERIES * width, *scores = sums + QUERIES * width, most[QUERIES], whole[QUERIES];
    for (int64_t r = 0; r < QUERIES; r++) {
        most[r] = -INFINITY, whole[r] = 0;
        for (int64_t i = 0; i < width; i++) own[r * width + i] = r < count ? q[r * stride + i] * scale : 0;
    }
    memset(sums, 0, sizeof(float) * (size_t)(QUERIES * width));
    const int64_t rows = (count + ROWS - 1) / ROWS * ROWS, keys = start + count;
    for (int64_t first = 0; first < keys; first += PANEL) {
        const float *panel = panels + first * width;
        const int64_t here = keys - first < PANEL ? keys - first : PANEL;
        memset(scores, 0, sizeof(float) * (size_t)(rows * PANEL));
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int v = 0; v < VECTORS; v++) block_of_rows(own + r * width, width, panel + v * LANES, width, PANEL, scores + r * PANEL + v * LANES);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores + r * PANEL;
            for (int64_t s = start + r - first + 1 > 0 ? start + r - first + 1 : 0; s < PANEL; s++) row[s] = -INFINITY;
            vector high = loaded(row);
            for (int v = 1; v < VECTORS; v++) high = higher(high, loaded(row + v * LANES));
            const float top = largest(high), now = top > most[r] ? top : most[r];
            vector added = zero(), shift = all(now);
            for (int v = 0; v < VECTORS; v++) {
                vector score = loaded(row + v * LANES), share = exponential(score - shift);
                share = (vector)((integers)share & (integers)(score > all(-INFINITY)));
                store(row + v * LANES, share);
                added += share;
            }
            if (now > most[r]) {
                const vector factor = exponential(all(most[r] - now));
                whole[r] *= factor[0];
                for (int64_t i = 0; i < width; i += LANES) store(sums + r * width + i, loaded(sums + r * width + i) * factor);
                most[r] = now;
            }
            whole[r] += total(added);
        }
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t i = 0; i < width; i += LANES)
                block_of_rows(scores + r * PANEL, PANEL, values + first * width + i, here, width, sums + r * width + i);
    }
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < width; i += LANES) store(y + r * out_stride + i, loaded(sums + r * width + i) * all(1.0f / whole[r]));
}

/* Attention of positions start.. of one row: q and y [count, heads * width], rows `stride` and `out_stride` numbers apart; keys and
   values [groups, slots, width] of the row. Nonzero: no memory. */
int prompt_attention(const float *q, int64_t stride, const float *keys, const float *values, int64_t slots, int64_t start, int64_t count,
                     int64_t heads, int64_t groups, int64_t width, float scale, float *y, int64_t out_stride, int threads) {
    const int64_t panels = (start + count + PANEL - 1) / PANEL, blocks = (count + QUERIES - 1) / QUERIES, crew = threads > 1 ? threads : 1;
    const int64_t room = QUERIES * (2 * width + PANEL);
    float *turned = malloc(sizeof(float) * (size_t)(groups * panels * PANEL * width + crew * room));
    if (turned == NULL) return 1;
    float *scratch = turned + groups * panels * PANEL * width;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t job = 0; job < groups * panels; job++) {
        const int64_t g = job / panels, first = job % panels * PANEL;
        float *panel = turned + job * PANEL * width;
        for (int64_t s = 0; s < PANEL; s++)
            for (int64_t i = 0; i < width; i++)
                panel[i * PANEL + s] = first + s < start + count ? keys[(g * slots + first + s) * width + i] : 0;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t thread = 0; thread < crew; thread++)
        for (int64_t job = thread; job < heads * blocks; job += crew) {
            const int64_t h = job / blocks, from = job % blocks * QUERIES, g = h / (heads / groups);
            const int64_t some = count - from < QUERIES ? count - from : QUERIES;
            attend_together(q + from * stride + h * width, stride, turned + g * panels * PANEL * width, values + g * slots * width,
                            start + from, some, width, scale, y + from * out_stride + h * width, out_stride, scratch + thread * room);
        }
    free(turned);
    return 0;
}

/* Tokens ids [count], each of row rows[i] at position positions[i]; the earlier ones of a row are in its cache, or before it
   here. keys, values: for each layer [batch, groups, slots, head_width]. -> hidden [count, width] after the last norm and, unless
   NULL, logits [count, vocabulary]. prompt: they are consecutive tokens of one row, which attend together (with other last bits
   than one by one), and the outcome is that of the last one alone. Nonzero: no memory. */
int decoding_step(const struct decoder *d, float *const *keys, float *const *values, const int64_t *ids, const int64_t *rows,
                  const int64_t *positions, int64_t count, int prompt, float *hidden, float *logits, int threads) {
    const int64_t width = d->width, e = d->head_width, queries = d->heads * e, shared = d->groups * e, all_three = queries + 2 * shared;
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++) longest = positions[i] > longest ? positions[i] : longest;
    const int64_t room = (longest + 1 + LANES) / LANES * LANES + LANES;
    const int64_t crew = threads > 1 && count * queries * (longest + 1) >= ALONE ? threads : 1;
    const int64_t wide = all_three > 2 * d->inner ? all_three : 2 * d->inner, mixed = queries > d->inner ? queries : d->inner;
    float *memory = malloc(sizeof(float) * (size_t)(count * (2 * width + wide + mixed) + crew * room));
    if (memory == NULL) return 1;
    float *x = memory, *y = x + count * width, *made = y + count * width, *joined = made + count * wide, *scores = joined + count * mixed;
    for (int64_t i = 0; i < count; i++) memcpy(x + i * width, d->embedding + ids[i] * width, sizeof(float) * (size_t)width);
    for (int64_t number = 0; number < d->count; number++) {
        const struct layer *layer = d->layers + number;
        float *all_keys = keys[number], *all_values = values[number];
        for (int64_t i = 0; i < count; i++) normed(x + i * width, layer->attention_norm, d->eps, y + i * width, width);
        product(&layer->qkv, y, made, count, threads);
        for (int64_t i = 0; i < count; i++) {
            float *row = made + i * all_three;
            const float *cosine = d->cosines + positions[i] * (d->turned / 2), *sine = d->sines + positions[i] * (d->turned / 2);
            for (int64_t h = 0; h < d->heads + d->groups; h++) {
                const float *gain = h < d->heads ? layer->query_norm : layer->key_norm;
                if (gain != NULL) normed(row + h * e, gain, d->eps, row + h * e, e);
                turn(row + h * e, cosine, sine, d->turned / 2);
            }
            for (int64_t g = 0; g < d->groups; g++) {
                const int64_t at = ((rows[i] * d->groups + g) * d->slots + positions[i]) * e;
                memcpy(all_keys + at, row + queries + g * e, sizeof(float) * (size_t)e);
                memcpy(all_values + at, row + queries + shared + g * e, sizeof(float) * (size_t)e);
            }
        }
        if (prompt && number + 1 == d->count) { /* what follows the last keys and values matters for the last token alone */
            const int64_t before = count - 1;
            memmove(x, x + before * width, sizeof(float) * (size_t)width);
            memmove(made, made + before * all_three, sizeof(float) * (size_t)all_three);
            rows += before, positions += before, count = 1, prompt = 0;
        }
        const int64_t repeat = d->heads / d->groups, own = rows[0] * d->groups * d->slots * e;
        if (prompt && prompt_attention(made, all_three, all_keys + own, all_values + own, d->slots, positions[0], count, d->heads,
                                       d->groups, e, d->scale, joined, queries, threads))
            return free(memory), 1;
#pragma omp parallel for num_threads((int)crew) if (crew > 1) schedule(static)
        for (int64_t thread = 0; thread < (prompt ? 0 : crew); thread++)
            for (int64_t job = count * d->heads * thread / crew; job < count * d->heads * (thread + 1) / crew; job++) {
                const int64_t i = job / d->heads, h = job % d->heads;
                const int64_t at = (rows[i] * d->groups + h / repeat) * d->slots * e;
                attend(made + i * all_three + h * e, all_keys + at, all_values + at, positions[i] + 1, e, d->scale,
                       scores + thread * room, joined + i * queries + h * e);
            }
        product(&layer->out, joined, y, count, threads);
        for (int64_t i = 0; i < count * width; i += LANES) store(x + i, loaded(x + i) + loaded(y + i));
        for (int64_t i = 0; i < count; i++) normed(x + i * width, layer->mlp_norm, d->eps, y + i * width, width);
        product(&layer->gate_up, y, made, count, threads);
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < d->inner; k += LANES) {
                vector gate = loaded(made + i * 2 * d->inner + k), up = loaded(made + i * 2 * d->inner + d->inner + k);
                store(joined + i * d->inner + k, gate / (all(1.0f) + exponential(-gate)) * up);
            }
        product(&layer->down, joined, y, count, threads);
        for (int64_t i = 0; i < count * width; i += LANES) store(x + i, loaded(x + i) + loaded(y + i));
    }
    for (int64_t i = 0; i < count; i++) normed(x + i * width, d->norm, d->eps, hidden + i * width, width);
    if (logits != NULL) product(&d->head, hidden, logits, count, threads);
    free(memory);
    return 0;
}
