/* The gated linear recurrence h_t = f_t h_{t-1} + i_t over [rows, length, width] floats, and its gradient (ops/scan.py).
   A block of lanes stays in registers while time runs, so that memory is read and written once. */
#include <stdint.h>

#define LANES 64

static int64_t blocks_of(int64_t width) { return (width + LANES - 1) / LANES; }

static int64_t lanes_of(int64_t width, int64_t block) {
    int64_t left = width - block * LANES;
    return left < LANES ? left : LANES;
}

/* start: [rows, width] or NULL (zeros). */
void scan_forward(const float *gate, const float *input, const float *start, float *out, int64_t rows, int64_t length,
                  int64_t width, int threads) {
    int64_t blocks = blocks_of(width);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t lanes = lanes_of(width, block), at = row * length * width + block * LANES;
            const float *restrict f = gate + at, *restrict i = input + at;
            float *restrict h = out + at;
            float state[LANES] = {0};
            if (start)
                for (int64_t k = 0; k < lanes; k++) state[k] = start[row * width + block * LANES + k];
            for (int64_t t = 0; t < length; t++, f += width, i += width, h += width) {
                if (lanes == LANES)
                    for (int k = 0; k < LANES; k++) h[k] = state[k] = f[k] * state[k] + i[k];
                else
                    for (int64_t k = 0; k < lanes; k++) h[k] = state[k] = f[k] * state[k] + i[k];
            }
        }
    }
}

/* grad: of out; gives the gradients of gate, input and (unless NULL) start. */
void scan_backward(const float *gate, const float *start, const float *out, const float *grad, float *grad_gate,
                   float *grad_input, float *grad_start, int64_t rows, int64_t length, int64_t width, int threads) {
    int64_t blocks = blocks_of(width);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t lanes = lanes_of(width, block), corner = row * width + block * LANES;
            int64_t at = row * length * width + block * LANES + (length - 1) * width;
            float carried[LANES] = {0};
            for (int64_t t = length - 1; t >= 0; t--, at -= width) {
                const float *restrict f = gate + at, *restrict g = grad + at;
                float *restrict gf = grad_gate + at, *restrict gi = grad_input + at;
                const float *before = t > 0 ? out + at - width : (start ? start + corner : 0);
                if (lanes == LANES && before)
                    for (int k = 0; k < LANES; k++) {
                        float sum = carried[k] + g[k];
                        gi[k] = sum;
                        gf[k] = sum * before[k];
                        carried[k] = sum * f[k];
                    }
                else
                    for (int64_t k = 0; k < lanes; k++) {
                        float sum = carried[k] + g[k];
                        gi[k] = sum;
                        gf[k] = before ? sum * before[k] : 0.0f;
                        carried[k] = sum * f[k];
                    }
            }
            if (grad_start)
                for (int64_t k = 0; k < lanes; k++) grad_start[corner + k] = carried[k];
        }
    }
}
