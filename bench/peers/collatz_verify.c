/* The verifier that one would write in an afternoon: a table of the residues mod 2^K that do not come below their start
   within K steps, and for each of their numbers 128-bit integers, trailing zeros and a table of powers of three.
   usage: verify BITS  proves [2^68, 2^68 + 2^BITS), prints seconds, numbers followed, sum of odd steps, largest number and
   its offset (of shortcut steps, as by hand), each on a line. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef unsigned __int128 wide;
enum { K = 20 };

static int zeros(wide n) { return (uint64_t)n ? __builtin_ctzll((uint64_t)n) : 64 + __builtin_ctzll((uint64_t)(n >> 64)); }

int main(int count, char **words) {
    int bits = count > 1 ? atoi(words[1]) : 30;
    if (bits < K || bits > 60) return 2;
    wide start = (wide)1 << 68, most = 0, most_of = 0, power[65];
    uint64_t followed = 0, odd_steps = 0;
    power[0] = 1;
    for (int i = 1; i < 65; i++) power[i] = 3 * power[i - 1];
    struct timespec begun, ended;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begun);
    for (uint64_t residue = 3; residue < 1u << K; residue += 4) {
        uint64_t x = residue;
        int odd = 0, below = 0;
        for (int step = 1; step <= K && !below; step++) {
            if (x & 1) { x = x + (x >> 1) + 1; odd++; } else x >>= 1;
            below = 485 * odd <= 306 * step;
        }
        if (below) continue;
        for (uint64_t block = 0; block < (uint64_t)1 << (bits - K); block++) {
            wide n = start + ((wide)block << K) + residue, y = x + power[odd] * ((start >> K) + block);
            uint64_t steps = odd;
            followed++;
            while (y >= n) {
                if (y & 1) {
                    int ups = zeros(y + 1);
                    if (ups > 40 || y >> (126 - 2 * ups)) { puts("overflow"); return 1; }
                    y = ((y + 1) >> ups) * power[ups] - 1;
                    steps += ups;
                    if (y > most) { most = y; most_of = n; }
                }
                y >>= zeros(y);
            }
            odd_steps += steps;
        }
    }
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ended);
    char digits[48];
    int place = 47;
    digits[place] = 0;
    for (wide rest = most; rest; rest /= 10) digits[--place] = '0' + (int)(rest % 10);
    printf("%.6f\n%llu\n%llu\n%s\n%llu\n", (ended.tv_sec - begun.tv_sec) + (ended.tv_nsec - begun.tv_nsec) * 1e-9,
           (unsigned long long)followed, (unsigned long long)odd_steps, digits + place, (unsigned long long)(most_of - start));
    return 0;
}
