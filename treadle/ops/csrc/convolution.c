/* A short causal convolution of each channel with the activation after it, and the gradients of both (ops/short_convolution.py):
   y_t = f(sum_k w_k x_{t-k}) over the positions of the same document, f silu or nothing. A block of channels goes through time
   together, so that the positions before are in the nearest cache. */
#include "lanes.h"

#define BLOCK 64 /* channels */
#define VECTORS (BLOCK / TILE)
#define LONGEST 16 /* positions */

INLINE lanes load(const float *a, int64_t left) { return left >= TILE ? each(a) : some(a, left > 0 ? left : 0); }
INLINE void save(float *a, lanes x, int64_t left) {
    if (left >= TILE) put(a, x);
    else if (left > 0) put_some(a, x, left);
}

/* Whether the positions t and t - back, both of a row, are of one document; documents [length] or NULL. */
INLINE int reaches(const int64_t *documents, int64_t t, int64_t back) {
    return t >= back && (!documents || documents[t] == documents[t - back]);
}

static void weights_of(const float *weight, int64_t size, int64_t left, lanes w[LONGEST][VECTORS]) {
    float column[BLOCK];
    for (int64_t k = 0; k < size; k++) {
        for (int64_t c = 0; c < BLOCK; c++) column[c] = c < left ? weight[c * size + k] : 0.0f;
        for (int j = 0; j < VECTORS; j++) w[k][j] = each(column + j * TILE);
    }
}

/* x, y [rows, length, channels], weight [channels, size], documents [rows, length] or NULL. */
void convolution(const float *x, const float *weight, const int64_t *documents, int activate, float *y, int64_t rows, int64_t length,
                 int64_t channels, int64_t size, int threads) {
    int64_t blocks = (channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && rows * length * channels > 32768)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t left = channels - block * BLOCK, at = row * length * channels + block * BLOCK;
            const int64_t *docs = documents ? documents + row * length : 0;
            lanes w[LONGEST][VECTORS];
            weights_of(weight + block * BLOCK * size, size, left, w);
            for (int64_t t = 0; t < length; t++)
                for (int j = 0; j < VECTORS && left > j * TILE; j++) {
                    int64_t rest = left - j * TILE;
                    const float *here = x + at + t * channels + j * TILE;
                    lanes sum = load(here, rest) * w[0][j];
                    for (int64_t k = 1; k < size; k++)
                        if (reaches(docs, t, k)) sum += load(here - k * channels, rest) * w[k][j];
                    save(y + at + t * channels + j * TILE, activate ? sum * sigmoid(sum) : sum, rest);
                }
        }
}

/* grad_weight: [rows, channels, size], for each row. */
void convolution_gradient(const float *x, const float *weight, const int64_t *documents, int activate, const float *grad, float *grad_x,
                         float *grad_weight, int64_t rows, int64_t length, int64_t channels, int64_t size, int threads) {
    int64_t blocks = (channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && rows * length * channels > 32768)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t left = channels - block * BLOCK, at = row * length * channels + block * BLOCK;
            const int64_t *docs = documents ? documents + row * length : 0;
            lanes w[LONGEST][VECTORS], of_w[LONGEST][VECTORS];
            lanes recent[LONGEST][VECTORS]; /* the gradients of the sums at t, t + 1, ..., in a ring */
            weights_of(weight + block * BLOCK * size, size, left, w);
            memset(of_w, 0, sizeof of_w), memset(recent, 0, sizeof recent);
            for (int64_t t = length - 1; t >= 0; t--)
                for (int j = 0; j < VECTORS && left > j * TILE; j++) {
                    int64_t rest = left - j * TILE;
                    const float *here = x + at + t * channels + j * TILE;
                    lanes slope = load(grad + at + t * channels + j * TILE, rest), own = load(here, rest);
                    if (activate) {
                        lanes sum = own * w[0][j];
                        for (int64_t k = 1; k < size; k++)
                            if (reaches(docs, t, k)) sum += load(here - k * channels, rest) * w[k][j];
                        lanes open = sigmoid(sum);
                        slope *= open + sum * open * (wide(1.0f) - open);
                    }
                    recent[t % LONGEST][j] = slope;
                    of_w[0][j] += slope * own;
                    lanes total = slope * w[0][j];
                    for (int64_t k = 1; k < size && t + k < length; k++)
                        if (reaches(docs, t + k, k)) {
                            lanes later = recent[(t + k) % LONGEST][j];
                            total += later * w[k][j];
                            of_w[k][j] += later * own;
                        }
                    save(grad_x + at + t * channels + j * TILE, total, rest);
                }
            for (int64_t k = 0; k < size; k++)
                for (int j = 0; j < VECTORS; j++) {
                    float found[TILE];
                    put(found, of_w[k][j]);
                    for (int64_t c = j * TILE; c < (j + 1) * TILE && c < left; c++)
                        grad_weight[(row * channels + block * BLOCK + c) * size + k] = found[c - j * TILE];
                }
        }
}
