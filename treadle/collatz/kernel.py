"""The compiled path of the verifier (numba, extra `collatz`): the tree, the bit-vectors, and candidates followed in bulk.

Candidates are followed in batches, pass after pass over arrays, in rounds of 48 steps. A round works on y mod 2^48 alone,
which decides the next 48 parities: three jumps of 16 steps through a table, T^16(r + a 2^16) = T^16(r) + 3^o a. The height E
says after a jump who has come below its start, so no values are compared. Then T^48(y) = T^48(y mod 2^48) + 3^o (y >> 48),
exactly, in 128 bits, and the next round begins. What does not fit is returned, to be followed in integers.

The largest number met is exact, yet few are looked at: 16 steps from height E reach at most n 2^((E + 16 * 179 + 306) / 306),
so a candidate is followed value by value only where that could beat the largest so far.

Measured near 2^68, one thread of a fourth-generation EPYC, ns a candidate: a loop for each candidate, with its branches, 33;
passes without branches 28; the words read in a pass of their own, so that their cache misses overlap, 23; height, odd steps
and name of a candidate in one integer, a jump and a look in one pass 18; jumps of 16 steps (a table of 256 kB, in L2) where
12 (16 kB, in L1) need four a round 15. Not kept: AVX-512 in C for two jumps and a look, 7.5 with gathers and 7.4 without a
table, step by step, where the compiled loop takes 5.2.
"""

from __future__ import annotations

import numpy as np

from treadle.collatz.kernel_base import U, compiled, high_product, trailing_zeros

JUMP = 16
VALUES = 26  # bits of a table entry that hold T^16(r) < 3^16 < 2^26; the odd steps stand above
BATCH = 512  # leaves; their 4,000 candidates stay in L2. 1,024: 15 % slower
ROUNDS = 400  # of 48 steps; who is still above its start then is followed in integers, up to their own limit
POWERS = 64
SEEDS = 64  # candidates of a unit looked at first, so that the next can be compared with something
WITHIN = JUMP * 179 + 306 + 8  # what a height can rise between two looks, 3 y + 1 counted, and 8 for rounding
MOST_ODD = (30, 40)  # of 32 and of 48 steps: 3^30 2^16 and 3^40 are below 2^64
WIDEST = 104  # bits of n: y at the end of the tree then has less than 128

# A candidate's record: height << 40 | odd steps of this round << 24 | leaf << 6 | bit; what o odd steps of a jump add to it.
RECORD_UP, RECORD_DOWN, ALIVE = 485 << 40 | 1 << 24, 306 * JUMP << 40, 1 << 40
NAME, ODD = (1 << 24) - 1, 0xFFFF << 24


@compiled
def descend(stack, low, top, prefix, prefix_bits, end, scores, window, powers, residue, x_at, f_at, e_at):
    """The next leaves of the tree, as many as the arrays hold; what is left of the tree stays on the stack."""
    full, mask, lead = 2 << window, (1 << window) - 1, 1 << window
    found, room = 0, f_at.shape[0]
    while top and found < room:
        top -= 1
        k, f, e, h = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
        r, x = low[top, 0], low[top, 1]
        while True:
            if k == end:
                residue[found], x_at[found], f_at[found], e_at[found] = r, x, f, e
                found += 1
                break
            raised, with_bit = x + powers[f], r | U(1) << U(k)
            is_odd = x & U(1) == U(1)
            odd_x, even_x = (x, raised) if is_odd else (raised, x)
            odd_r, even_r = (r, with_bit) if is_odd else (with_bit, r)
            odd_h, even_h = h << 1 | 1, h << 1
            if even_h >= full:
                odd_h, even_h = odd_h & mask | lead, even_h & mask | lead
            odd, even = e + 179 >= scores[odd_h], e - 306 >= scores[even_h]
            if k < prefix_bits:
                wanted = prefix >> U(k) & U(1) == U(0)  # the child without the bit
                odd, even = odd and wanted == is_odd, even and wanted != is_odd
            k += 1
            if odd and even:
                stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = k, f, e - 306, even_h
                low[top, 0], low[top, 1] = even_r, even_x >> U(1)
                top += 1
            if odd:
                r, x, f, e, h = odd_r, odd_x + (odd_x >> U(1)) + U(1), f + 1, e + 179, odd_h
            elif even:
                r, x, e, h = even_r, even_x >> U(1), e - 306, even_h
            else:
                break
    return top, found


@compiled
def look_up(count, residue, x_at, f_at, e_at, word_at, offset, steps, vectors, least, highest, inverses, ternary):
    """For each leaf the word of its 64 numbers that are not excluded."""
    mask = (U(1) << U(steps)) - U(1)
    for leaf in range(count):
        word = ternary[residue[leaf] % U(729)]
        f = U(f_at[leaf])
        if e_at[leaf] <= highest:
            index = x_at[leaf] * inverses[f] + offset & mask
            at, turn, vector = index >> U(6), index & U(63), f - U(least)
            word &= vectors[vector, at] >> turn | vectors[vector, at + U(1)] << U(1) << (U(63) - turn)
        word_at[leaf] = word


@compiled
def spread(count, x_at, f_at, e_at, word_at, offset, powers, low, record, bar, marked):
    """The candidates of the words: y mod 2^48 at the leaf's depth, and their records."""
    mask, found, marks = (U(1) << U(48)) - U(1), U(0), U(0)
    for leaf in range(count):
        word, power = word_at[leaf], powers[U(f_at[leaf])]
        y, common = x_at[leaf] + power * offset, e_at[leaf] << 40 | leaf << 6
        if 179 * f_at[leaf] + 306 - WITHIN >= bar >> 40:  # the tree may have passed a new maximum
            rest = word
            while rest:
                marked[marks] = leaf << 6 | np.int64(trailing_zeros(rest))
                marks += U(1)
                rest &= rest - U(1)
        while word:
            bit = trailing_zeros(word)
            word &= word - U(1)
            low[found] = y + power * bit & mask
            record[found] = common | np.int64(bit)
            found += U(1)
    return found, marks


@compiled
def first_jumps(count, low, record, table, powers, bar, marked):
    """Two jumps of all candidates: few die in the first, most of which the bit-vectors have seen."""
    lower, values, marks = U((1 << JUMP) - 1), U((1 << VALUES) - 1), U(0)
    for i in range(count):
        y, before = low[i], record[i]
        entry = U(table[y & lower])
        odd = entry >> U(VALUES)
        y = (y >> U(JUMP)) * powers[odd] + (entry & values)
        between = before + np.int64(odd) * RECORD_UP - RECORD_DOWN
        entry = U(table[y & lower])
        odd = entry >> U(VALUES)
        low[i] = (y >> U(JUMP)) * powers[odd] + (entry & values)
        record[i] = between + np.int64(odd) * RECORD_UP - RECORD_DOWN
        if max(before, between) >= bar:
            marked[marks] = before & NAME
            marks += U(1)
    return marks


@compiled
def look(count, low, record, bar, marked, lost, losses):
    """The first look: moves those who live on together. Returns how many, and the sum of the heights of the others."""
    kept, heights, marks = U(0), 0, U(0)
    for i in range(count):
        now, y = record[i], low[i]
        dead = np.int64(now < ALIVE)
        low[kept], record[kept] = y, now
        kept += U(1 - dead)
        heights += now >> 40 & -dead
        if (now >= bar) | (now & ODD > MOST_ODD[0] << 24):
            if now >= bar:
                marked[marks] = now & NAME
                marks += U(1)
            if now & ODD > MOST_ODD[0] << 24 and now >= ALIVE:  # more than 64 bits hold
                kept -= U(1)
                lost[losses] = now & NAME
                losses += U(1)
    return kept, heights, marks, losses


@compiled
def jump_and_look(count, low, record, upper, later, most, table, powers, bar, marked, lost, losses):
    """One jump and a look. later: not in the first round, so y >> 48 goes along."""
    lower, values = U((1 << JUMP) - 1), U((1 << VALUES) - 1)
    kept, heights, marks = U(0), 0, U(0)
    for i in range(count):
        y = low[i]
        entry = U(table[y & lower])
        odd = entry >> U(VALUES)
        now = record[i] + np.int64(odd) * RECORD_UP - RECORD_DOWN
        dead = np.int64(now < ALIVE)
        low[kept], record[kept] = (y >> U(JUMP)) * powers[odd] + (entry & values), now
        if later:
            upper[kept] = upper[i]
        kept += U(1 - dead)
        heights += now >> 40 & -dead
        if (now >= bar) | (now & ODD > most << 24):
            if now >= bar:
                marked[marks] = now & NAME
                marks += U(1)
            if now & ODD > most << 24 and now >= ALIVE:  # more than 64 bits hold
                kept -= U(1)
                lost[losses] = now & NAME
                losses += U(1)
    return kept, heights, marks, losses


@compiled
def value(name, x_at, f_at, offset, offset_high, powers):
    """y of a candidate at its leaf's depth, as (upper, lower) 64 bits."""
    leaf = name >> 6
    power = powers[U(f_at[leaf])]
    lower = power * offset
    upper = high_product(power, offset) + power * offset_high
    add = x_at[leaf] + power * U(name & 63)
    lower += add
    return upper + (U(1) if lower < add else U(0)), lower


@compiled
def renew(count, low, record, upper, later, x_at, f_at, offset, offset_high, powers, lost, losses):
    """The next round's y mod 2^48 and y >> 48, from T^48(y) = T^48(y mod 2^48) + 3^o (y >> 48)."""
    mask, kept = (U(1) << U(48)) - U(1), U(0)
    for i in range(count):
        now, fits = record[i], True
        if later:
            q = upper[i]
        else:
            top, bottom = value(now & NAME, x_at, f_at, offset, offset_high, powers)
            q, fits = top << U(16) | bottom >> U(48), top >> U(48) == U(0)
        power = powers[U((now & ODD) >> 24)]
        bottom = power * q
        top = high_product(power, q)
        bottom += low[i]
        top += U(1) if bottom < low[i] else U(0)
        low[kept], upper[kept], record[kept] = bottom & mask, top << U(16) | bottom >> U(48), now & ~ODD
        if fits and top >> U(48) == U(0):
            kept += U(1)
        else:
            lost[losses] = now & NAME
            losses += U(1)
    return kept, losses


@compiled
def finish(count, low, record, upper, looks, steps, table, powers, bar, marked, lost, losses):
    """The last 4 % one by one, each to its end. Returns (jumps, odd steps, marks, losses); those lost are not in the sums."""
    lower, values, mask = U((1 << JUMP) - 1), U((1 << VALUES) - 1), (U(1) << U(48)) - U(1)
    jumps, odd_steps, marks = 0, 0, U(0)
    for i in range(count):
        y, now, q, done, mark, fits = low[i], record[i], upper[i], 0, False, True
        for _ in range(ROUNDS):
            odds = U(0)
            for turn in range(3):
                entry = U(table[y & lower])
                odd = entry >> U(VALUES)
                y = (y >> U(JUMP)) * powers[odd] + (entry & values)
                odds += odd
                now += np.int64(odd) * RECORD_UP - RECORD_DOWN
                done += 1
                mark |= now >= bar
                fits = turn == 0 or bool(odds <= U(MOST_ODD[turn - 1]))
                if now < ALIVE or not fits:
                    break
            if now < ALIVE or not fits:
                break
            power = powers[odds]
            bottom = power * q
            top = high_product(power, q)
            bottom += y
            top += U(1) if bottom < y else U(0)
            if top >> U(48):
                break
            y, q = bottom & mask, top << U(16) | bottom >> U(48)
        if now < ALIVE:
            jumps += done
            odd_steps += ((now >> 40) + 306 * (steps + JUMP * done)) // 485
        else:
            jumps -= looks
            lost[losses] = now & NAME
            losses += U(1)
        if mark:
            marked[marks] = now & NAME
            marks += U(1)
    return jumps, odd_steps, marks, losses


@compiled
def number(name, residue, end, high, high_upper, bits):
    """n of a candidate, as (upper, lower) 64 bits."""
    add = residue[name >> 6] + (U(name & 63) << U(end))
    lower = high << U(bits)
    return high_upper << U(bits) | high >> U(64 - bits), lower | add


@compiled
def climb(upper, lower):
    """(fits, upper, lower, odd steps): the largest number before n first comes below itself, standard steps."""
    top, bottom, most_top, most, odd = upper, lower, upper, lower, 0
    for _ in range(ROUNDS * 48):
        if bottom & U(1):
            if top >> U(62):
                return False, most_top, most, odd
            carry = high_product(bottom, U(3))
            bottom = U(3) * bottom
            top = U(3) * top + carry
            bottom += U(1)
            top += U(1) if bottom == U(0) else U(0)
            odd += 1
            if top > most_top or (top == most_top and bottom > most):
                most_top, most = top, bottom
        shift = trailing_zeros(bottom) if bottom else U(63)
        if shift:
            bottom = bottom >> shift | top << (U(64) - shift)
            top = top >> shift
        if top < upper or (top == upper and bottom < lower):
            return True, most_top, most, odd
    return False, most_top, most, odd


@compiled
def bar_of(best, end_log):
    """A record from which on a candidate might meet a larger number than the best, or one of more than 128 bits."""
    if best[0] == U(0) and best[1] == U(0):
        return np.int64(-1 << 62)
    log = np.log2(np.float64(best[0]) * 2.0**64 + np.float64(best[1]))
    return (np.int64(306.0 * (min(log, 128.0) - end_log)) - WITHIN) << 40


@compiled
def measure(marks, marked, residue, end, high, high_upper, bits, best, huge, hugest):
    """Looks at every number that the marked candidates meet. `best` is (upper, lower) of the maximum and of its n."""
    for i in range(marks):
        upper, lower = number(marked[i], residue, end, high, high_upper, bits)
        fits, top, bottom, _ = climb(upper, lower)
        if not fits:
            huge[hugest, 0], huge[hugest, 1] = upper, lower
            hugest += U(1)
        elif top > best[0] or (top == best[0] and bottom > best[1]):
            best[0], best[1], best[2], best[3] = top, bottom, upper, lower
        elif top == best[0] and bottom == best[1] and (upper < best[2] or (upper == best[2] and lower < best[3])):
            best[2], best[3] = upper, lower
    return hugest


@compiled
def drop_small(count, residue, word_at, end, floor):
    """For a block that begins below the floor: takes the numbers below it out of the words."""
    for leaf in range(count):
        for bit in range(64):
            if residue[leaf] + (U(bit) << U(end)) < floor:
                word_at[leaf] &= ~(U(1) << U(bit))


@compiled
def advance(batches, stack, low, counts, best, block, tree, tables, lost, huge):
    """Works through some batches of leaves. counts: stack's top, leaves, candidates, jumps, odd steps, losses, huge ones."""
    prefix, prefix_bits, bits, high, high_upper, floor, end_log = block
    scores, window, ternary, vectors, least, highest, offset_seen, ahead = tree
    table, powers, inverses = tables
    end, room, size = bits - 6, BATCH, 64 * BATCH
    residue, x_at, word_at = np.empty(room, np.uint64), np.empty(room, np.uint64), np.empty(room, np.uint64)
    f_at, e_at = np.empty(room, np.int64), np.empty(room, np.int64)
    y, upper, record = np.empty(size, np.uint64), np.empty(size, np.uint64), np.empty(size, np.int64)
    marked, gone = np.empty(size, np.int64), np.empty(size, np.int64)
    offset, offset_high = high << U(6), high_upper << U(6) | high >> U(58)
    losses, hugest = U(counts[5]), U(counts[6])
    bar = bar_of(best, end_log)
    for _ in range(batches):
        if counts[0] == 0 or losses + U(size) > U(lost.shape[0]) or hugest + U(8 * size) > U(huge.shape[0]):
            break
        counts[0], leaves = descend(
            stack, low, counts[0], prefix, prefix_bits, end, scores, window, powers, residue, x_at, f_at, e_at
        )
        look_up(
            leaves, residue, x_at, f_at, e_at, word_at, offset_seen, ahead, vectors, least, highest, inverses, ternary
        )
        if floor:
            drop_small(leaves, residue, word_at, end, floor)
        alive, marks = spread(leaves, x_at, f_at, e_at, word_at, offset, powers, y, record, bar, marked)
        if best[0] == U(0) and best[1] == U(0):  # of the first ones only some, to have a bar
            hugest = measure(min(marks, U(SEEDS)), marked, residue, end, high, high_upper, bits, best, huge, hugest)
            bar = bar_of(best, end_log)
            alive, marks = spread(leaves, x_at, f_at, e_at, word_at, offset, powers, y, record, bar, marked)
        counts[1] += leaves
        counts[2] += np.int64(alive)
        hugest = measure(marks, marked, residue, end, high, high_upper, bits, best, huge, hugest)
        marks = first_jumps(alive, y, record, table, powers, bar, marked)
        hugest = measure(marks, marked, residue, end, high, high_upper, bits, best, huge, hugest)
        bar = bar_of(best, end_log)
        removed = U(0)
        for turn in range(1, 6):  # looks; rounds end with the second and the fifth
            before, removed_before = alive, removed
            if turn == 1:
                alive, heights, marks, removed = look(alive, y, record, bar, marked, gone, removed)
            else:
                most = MOST_ODD[0] if turn == 4 else MOST_ODD[1] if turn != 3 else 16
                alive, heights, marks, removed = jump_and_look(
                    alive, y, record, upper, turn > 2, most, table, powers, bar, marked, gone, removed
                )
            dead = np.int64(before - alive - (removed - removed_before))
            counts[3] += np.int64(before)
            counts[4] += (heights + 306 * (end + JUMP * (turn + 1)) * dead) // 485
            if turn == 2 or turn == 5:
                alive, removed = renew(
                    alive, y, record, upper, turn == 5, x_at, f_at, offset, offset_high, powers, gone, removed
                )
            counts[3] -= turn * np.int64(removed - removed_before)
            if marks:
                hugest = measure(marks, marked, residue, end, high, high_upper, bits, best, huge, hugest)
                bar = bar_of(best, end_log)
        jumps, odd_steps, marks, removed = finish(
            alive, y, record, upper, 5, end + 6 * JUMP, table, powers, bar, marked, gone, removed
        )
        counts[3] += jumps
        counts[4] += odd_steps
        hugest = measure(marks, marked, residue, end, high, high_upper, bits, best, huge, hugest)
        bar = bar_of(best, end_log)
        counts[2] -= np.int64(removed)
        for i in range(removed):
            lost[losses, 0], lost[losses, 1] = number(gone[i], residue, end, high, high_upper, bits)
            losses += U(1)
    counts[5], counts[6] = np.int64(losses), np.int64(hugest)


@compiled
def follow_all(upper, lower, step, count, most, lost):
    """Every step-th number from the given one on, value by value: (odd steps, how many did not fit in 128 bits)."""
    odd_steps, losses = 0, 0
    for _ in range(count):
        fits, top, bottom, odd = climb(upper, lower)
        if not fits:
            if losses < lost.shape[0]:
                lost[losses, 0], lost[losses, 1] = upper, lower
            losses += 1
        else:
            odd_steps += odd
            if top > most[0] or (top == most[0] and bottom > most[1]):
                most[0], most[1], most[2], most[3] = top, bottom, upper, lower
        lower += step
        upper += U(1) if lower < step else U(0)
    return odd_steps, losses
