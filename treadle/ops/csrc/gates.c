/* Gates around recurrences and products (ops/gates.py), forward and backward, in fp32.

   A recurrence's lanes stay in registers while time runs, and its gates are computed where they are used. */
#include "lanes.h"
#include <stdlib.h>

#define BLOCK 64 /* lanes of a recurrence that run through time together */
#define VECTORS (BLOCK / TILE)
#define PART 64 /* rows whose gradients of a weight are added before they are written */

INLINE lanes load(const float *a, int64_t left) { return left >= TILE ? each(a) : some(a, left > 0 ? left : 0); }
INLINE void save(float *a, lanes x, int64_t left) {
    if (left >= TILE) put(a, x);
    else if (left > 0) put_some(a, x, left);
}

/* h_t = f h_{t-1} + silu(v) (1 - f), f = bound + (1 - bound) sigmoid(g); where starts [rows, length] says so h_{t-1} is left out.
   gate, value, out: [rows, length, width], the first two `stride` floats from one position to the next; bound [width] or NULL. */
INLINE void run(const float *g, const float *v, int64_t stride, const float *bound, const uint8_t *starts, float *out, int64_t length,
                int64_t width, const int count, int64_t left) {
    lanes state[VECTORS], low[VECTORS];
    for (int j = 0; j < count; j++) state[j] = wide(0.0f), low[j] = bound ? load(bound + j * TILE, left - j * TILE) : wide(0.0f);
    for (int64_t t = 0; t < length; t++, g += stride, v += stride, out += width) {
        lanes goes_on = wide(starts && starts[t] ? 0.0f : 1.0f);
        for (int j = 0; j < count; j++) {
            int64_t rest = left - j * TILE;
            lanes f = sigmoid(load(g + j * TILE, rest)), x = load(v + j * TILE, rest);
            f = low[j] + (wide(1.0f) - low[j]) * f;
            state[j] = f * goes_on * state[j] + x * sigmoid(x) * (wide(1.0f) - f);
            save(out + j * TILE, state[j], rest);
        }
    }
}

void gated_scan(const float *gate, const float *value, int64_t stride, const float *bound, const uint8_t *starts, float *out,
                int64_t rows, int64_t length, int64_t width, int threads) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && rows * length * width > 32768)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t at = block * BLOCK, left = width - at, from = row * length * stride + at;
            const float *low = bound ? bound + at : 0;
            const uint8_t *begins = starts ? starts + row * length : 0;
            float *h = out + row * length * width + at;
            if (left >= BLOCK) run(gate + from, value + from, stride, low, begins, h, length, width, VECTORS, BLOCK);
            else run(gate + from, value + from, stride, low, begins, h, length, width, (int)((left + TILE - 1) / TILE), left);
        }
}

INLINE void run_back(const float *g, const float *v, int64_t stride, const float *bound, const uint8_t *starts, const float *h,
                     const float *grad, float *grad_g, float *grad_v, int64_t grad_stride, float *grad_bound, int64_t length, int64_t width,
                     const int count, int64_t left) {
    lanes carried[VECTORS], low[VECTORS], of_low[VECTORS], one = wide(1.0f);
    for (int j = 0; j < count; j++) {
        carried[j] = of_low[j] = wide(0.0f);
        low[j] = bound ? load(bound + j * TILE, left - j * TILE) : wide(0.0f);
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        int begins = t == 0 || (starts && starts[t]);
        for (int j = 0; j < count; j++) {
            int64_t rest = left - j * TILE;
            lanes share = sigmoid(load(g + t * stride + j * TILE, rest)), x = load(v + t * stride + j * TILE, rest);
            lanes f = low[j] + (one - low[j]) * share, open = sigmoid(x), input = x * open;
            lanes sum = carried[j] + load(grad + t * width + j * TILE, rest), of_f = -(sum * input);
            if (!begins) of_f += sum * load(h + (t - 1) * width + j * TILE, rest);
            carried[j] = begins ? wide(0.0f) : sum * f;
            of_low[j] += of_f * (one - share);
            save(grad_g + t * grad_stride + j * TILE, of_f * (one - low[j]) * share * (one - share), rest);
            save(grad_v + t * grad_stride + j * TILE, sum * (one - f) * (open + input * (one - open)), rest);
        }
    }
    for (int j = 0; j < count && grad_bound; j++) save(grad_bound + j * TILE, of_low[j], left - j * TILE);
}

/* grad_bound [rows, width] or NULL: for each row. */
void gated_scan_gradient(const float *gate, const float *value, int64_t stride, const float *bound, const uint8_t *starts, const float *h,
                         const float *grad, float *grad_gate, float *grad_value, int64_t grad_stride, float *grad_bound, int64_t rows,
                         int64_t length, int64_t width, int threads) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && rows * length * width > 32768)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t at = block * BLOCK, left = width - at, from = row * length * stride + at, to = row * length * width + at;
            int64_t into = row * length * grad_stride + at;
            const float *low = bound ? bound + at : 0;
            const uint8_t *begins = starts ? starts + row * length : 0;
            float *of_low = grad_bound ? grad_bound + row * width + at : 0;
            if (left >= BLOCK)
                run_back(gate + from, value + from, stride, low, begins, h + to, grad + to, grad_gate + into, grad_value + into, grad_stride,
                         of_low, length, width, VECTORS, BLOCK);
            else
                run_back(gate + from, value + from, stride, low, begins, h + to, grad + to, grad_gate + into, grad_value + into, grad_stride,
                         of_low, length, width, (int)((left + TILE - 1) / TILE), left);
        }
}

/* Over each of `count` pieces of `width` floats, piece c with the weight and bias [c % heads]:
       INSIDE  o = norm(x) weight silu(gate)       AFTER  o = norm(x silu(gate)) weight       CENTRED  o = (norm(x) weight + bias) silu(gate)
   norm(x) = (x - mean) / root mean square of that, the mean being 0 but for CENTRED. kept: [count, 2], the mean and the inverse root. */
enum { INSIDE, AFTER, CENTRED };
static const float ONES[TILE] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}; /* zeros behind a row's end */

INLINE void norm_piece(const int mode, const float *x, const float *gate, const float *w, const float *bias, float eps, float *kept, float *out,
                       int64_t width) {
    lanes sum = wide(0.0f), square = sum;
    if (mode == CENTRED) {
#define ADDED(LOAD, STORE) sum += LOAD(x + at);
        ALONG(width, ADDED)
        sum = wide(sum_of(sum) / (float)width);
    }
    float mean = sum_of(sum) / TILE;
#define SQUARE(LOAD, STORE)                                                           \
    {                                                                                 \
        lanes g = LOAD(gate + at), v = LOAD(x + at) - wide(mean) * LOAD(ONES);        \
        if (mode == AFTER) v *= g * sigmoid(g);                                       \
        square += v * v;                                                              \
    }
    ALONG(width, SQUARE)
    float r = 1.0f / sqrtf(sum_of(square) / (float)width + eps);
    kept[0] = mean, kept[1] = r;
#define NORMED(LOAD, STORE)                                                           \
    {                                                                                 \
        lanes g = LOAD(gate + at), open = g * sigmoid(g), n = (LOAD(x + at) - wide(mean)) * wide(r) * LOAD(w + at); \
        if (mode == CENTRED) n += LOAD(bias + at);                                    \
        STORE(out + at, n * open);                                                    \
    }
    ALONG(width, NORMED)
}

void gated_norm(const float *x, const float *gate, const float *weight, const float *bias, double eps, float *kept, float *out, int64_t mode,
                int64_t count, int64_t heads, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 32768)
    for (int64_t c = 0; c < count; c++) {
        const float *a = x + c * width, *b = gate + c * width, *w = weight + c % heads * width, *low = bias ? bias + c % heads * width : 0;
        if (mode == INSIDE) norm_piece(INSIDE, a, b, w, low, (float)eps, kept + 2 * c, out + c * width, width);
        else if (mode == AFTER) norm_piece(AFTER, a, b, w, low, (float)eps, kept + 2 * c, out + c * width, width);
        else norm_piece(CENTRED, a, b, w, low, (float)eps, kept + 2 * c, out + c * width, width);
    }
}

INLINE void norm_piece_gradient(const int mode, const float *grad, const float *x, const float *gate, const float *w, const float *bias,
                                const float *kept, float *grad_x, float *grad_gate, float *of_weight, float *of_bias, int64_t width) {
    lanes inner = wide(0.0f), plain = inner, mean = wide(kept[0]), r = wide(kept[1]), one = wide(1.0f);
#define INNER(LOAD, STORE)                                                                              \
    {                                                                                                   \
        lanes g = LOAD(gate + at), share = sigmoid(g), open = g * share, d = LOAD(grad + at), v = LOAD(x + at) - mean; \
        lanes n = (mode == AFTER ? v * open : v) * r, scaled = n * LOAD(w + at);                        \
        if (mode == CENTRED) scaled += LOAD(bias + at);                                                 \
        if (mode != AFTER) STORE(grad_gate + at, d * scaled * (share + open * (one - share)));          \
        if (mode != AFTER) d *= open;                                                                   \
        STORE(of_weight + at, LOAD(of_weight + at) + d * n);                                            \
        if (mode == CENTRED) STORE(of_bias + at, LOAD(of_bias + at) + d);                               \
        d *= LOAD(w + at);                                                                              \
        STORE(grad_x + at, d);                                                                          \
        inner += d * n, plain += d;                                                                     \
    }
    ALONG(width, INNER)
    lanes along = wide(sum_of(inner) / (float)width), level = wide(mode == CENTRED ? sum_of(plain) / (float)width : 0.0f);
#define BACK(LOAD, STORE)                                                                               \
    {                                                                                                   \
        lanes v = LOAD(x + at) - mean, g = LOAD(gate + at), share = sigmoid(g), open = g * share;       \
        lanes d = r * (LOAD(grad_x + at) - (mode == AFTER ? v * open : v) * r * along - level);         \
        if (mode == AFTER) STORE(grad_gate + at, d * v * (share + open * (one - share)));               \
        STORE(grad_x + at, mode == AFTER ? d * open : d);                                               \
    }
    ALONG(width, BACK)
}

/* grad_both: [2, heads width], of the weight and the bias. 0, or -1 when there is no memory. */
int gated_norm_gradient(const float *grad, const float *x, const float *gate, const float *weight, const float *bias, const float *kept,
                        float *grad_x, float *grad_gate, float *grad_both, int64_t mode, int64_t count, int64_t heads, int64_t width,
                        int threads) {
    int64_t together = PART * heads, parts = (count + together - 1) / together, size = heads * width;
    float *found = calloc(2 * parts * size + 1, sizeof(float));
    if (!found) return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 32768)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t c = part * together; c < count && c < (part + 1) * together; c++) {
            const float *a = x + c * width, *b = gate + c * width, *w = weight + c % heads * width, *d = grad + c * width;
            const float *low = bias ? bias + c % heads * width : 0;
            float *to_x = grad_x + c * width, *to_gate = grad_gate + c * width, *sums = found + 2 * part * size + c % heads * width;
            if (mode == INSIDE) norm_piece_gradient(INSIDE, d, a, b, w, low, kept + 2 * c, to_x, to_gate, sums, sums + size, width);
            else if (mode == AFTER) norm_piece_gradient(AFTER, d, a, b, w, low, kept + 2 * c, to_x, to_gate, sums, sums + size, width);
            else norm_piece_gradient(CENTRED, d, a, b, w, low, kept + 2 * c, to_x, to_gate, sums, sums + size, width);
        }
    for (int64_t k = 0; k < 2 * size; k++) grad_both[k] = 0.0f;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t k = 0; k < 2 * size; k++) grad_both[k] += found[2 * part * size + k];
    free(found);
    return 0;
}

/* both [count, 2 width] = gate and up side by side -> silu(gate) up [count, width]. */
void gated_product(const float *both, float *out, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 32768)
    for (int64_t c = 0; c < count; c++) {
        const float *a = both + 2 * c * width, *b = a + width;
        float *o = out + c * width;
#define PRODUCT(LOAD, STORE) { lanes g = LOAD(a + at); STORE(o + at, g * sigmoid(g) * LOAD(b + at)); }
        ALONG(width, PRODUCT)
    }
}

void gated_product_gradient(const float *grad, const float *both, float *grad_both, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count * width > 32768)
    for (int64_t c = 0; c < count; c++) {
        const float *a = both + 2 * c * width, *b = a + width, *d = grad + c * width;
        float *to_a = grad_both + 2 * c * width, *to_b = to_a + width;
#define SLOPES(LOAD, STORE)                                                                                          \
    {                                                                                                                \
        lanes g = LOAD(a + at), open = sigmoid(g), slope = LOAD(d + at), silu = g * open;                            \
        STORE(to_b + at, slope * silu);                                                                              \
        STORE(to_a + at, slope * LOAD(b + at) * (open + silu * (wide(1.0f) - open)));                                \
    }
        ALONG(width, SLOPES)
    }
}
