// The parts of a decoder layer but attention: products by packed weights, norms, gates, rotation.
//
// A weight [outs, in] is packed in blocks of 64 outputs, the last one filled up with zeros: pair
// after pair of inputs, for each pair output after output, and of each output the two numbers.
//
// Each number of a result is added up in an order of its own, whatever the neighbours and the
// number of threads, so rows do not depend on each other, not by a bit.

#pragma once

#include "native_numbers.h"

namespace {

inline void write(float* to, __m512 numbers) { _mm512_storeu_ps(to, numbers); }

// x [rows, in] times a weight, plus a bias if there is one, to numbers of the type ``Out``. If there
// is a ``rest`` [rows, outs], that is added to what was rounded, and their sum is rounded.
template <typename Out>
struct Product {
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    Out* out;
    long in;
    long outs;
    const bf16* rest = nullptr;

    long blocks() const { return (outs + block - 1) / block; }

    // Rows ``first`` to ``end`` of one block of outputs, while the next block is fetched.
    void compute(long place, long first, long end) const {
        const bf16* columns = weight + place * block * in;
        const bool last = place + 1 == blocks();
        const long tiles = (end - first + rows_max - 1) / rows_max;
        const long lines = 2 * in, share = (lines + tiles - 1) / tiles;
        const long kept = std::min(block, outs - place * block);
        long fetched = 0;
        in_tiles(end - first, [&](long row, auto size) {
            __m512 sums[size][4];
            for (int part = 0; part < 4; ++part) {
                const __m512 begin = start(place * block + part * lanes);
                for (int each = 0; each < size; ++each) sums[each][part] = begin;
            }
            const char* soon = reinterpret_cast<const char*>(columns + block * in) + fetched * 64;
            const long soon_lines = last ? 0 : std::max(0L, std::min(share, lines - fetched));
            multiply<size>(
                sums, x + (first + row) * in, in, columns, 2 * block, in / 2, soon, soon_lines);
            fetched += share;
            for (int each = 0; each < size; ++each) {
                const long at = (first + row + each) * outs + place * block;
                if (rest != nullptr) add(rest + at, sums[each], kept);
                store(out + at, sums[each], kept);
            }
        });
    }

    __m512 start(long output) const {
        if (bias == nullptr || output >= outs) return _mm512_setzero_ps();
        if (output + lanes <= outs) return read(bias + output);
        bf16 some[lanes] = {};
        std::copy(bias + output, bias + outs, some);
        return read(some);
    }

    static void add(const bf16* from, __m512 (&sums)[4], long kept) {
        bf16 some[block] = {};
        if (kept < block) from = std::copy(from, from + kept, some) - kept;
        for (int part = 0; part < 4; ++part)
            sums[part] = _mm512_add_ps(rounded(sums[part]), read(from + part * lanes));
    }

    static void store(Out* to, const __m512 (&sums)[4], long kept) {
        if (kept == block) {
            for (int part = 0; part < 4; ++part) write(to + part * lanes, sums[part]);
            return;
        }
        Out all[block];
        for (int part = 0; part < 4; ++part) write(all + part * lanes, sums[part]);
        std::copy(all, all + kept, to);
    }
};

// x / (1 + e^-x), by the exponential of a number that is not positive.
inline __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 small = exponential(_mm512_or_ps(_mm512_set1_ps(-0.0f), x));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    const __m512 above = _mm512_mask_mov_ps(small, positive, one);
    return _mm512_mul_ps(x, _mm512_div_ps(above, _mm512_add_ps(one, small)));
}

// silu(x * gate) * (x * up), whose blocks take turns in the weight: one of gate, one of up. There are
// ``outs`` of each, in whole blocks, and what is activated is not rounded.
struct Gated {
    const bf16* x;
    const bf16* weight;
    bf16* out;
    long in;
    long outs;

    // As ``Product::compute``.
    void compute(long place, long first, long end) const {
        const bf16 *gate = weight + 2 * place * block * in, *up = gate + block * in;
        const long tiles = (end - first + rows_max - 1) / rows_max;
        const long lines = 2 * in, share = (lines + tiles - 1) / tiles;
        const bool last = (place + 1) * block == outs;
        long fetched = 0;
        in_tiles(end - first, [&](long row, auto size) {
            const bf16* from = x + (first + row) * in;
            const long soon = last ? 0 : std::max(0L, std::min(share, lines - fetched));
            const char* next = reinterpret_cast<const char*>(up + block * in) + fetched * 64;
            alignas(64) float gates[size][block];
            {
                __m512 sums[size][4] = {};
                multiply<size>(sums, from, in, gate, 2 * block, in / 2, next, soon);
                for (int each = 0; each < size; ++each)
                    for (int part = 0; part < 4; ++part)
                        write(gates[each] + part * lanes, silu(sums[each][part]));
            }
            __m512 sums[size][4] = {};
            multiply<size>(sums, from, in, up, 2 * block, in / 2, next + lines * 64, soon);
            bf16* to = out + (first + row) * outs + place * block;
            for (int each = 0; each < size; ++each)
                for (int part = 0; part < 4; ++part) {
                    const __m512 share_of = _mm512_load_ps(gates[each] + part * lanes);
                    write(to + each * outs + part * lanes, _mm512_mul_ps(sums[each][part], share_of));
                }
            fetched += share;
        });
    }
};

// Blocks are shared out in as many equal shares as there are threads. A share is ``size`` parts: blocks
// that lie side by side, so that the one that is fetched is the next, and then some rows of each of
// those that are left over.
struct Shares {
    long blocks;
    long rows;
    long threads;

    long whole() const { return blocks / threads; }
    long size() const { return whole() + blocks % threads; }

    // Calls ``work`` with a block, its first row and the one behind its last.
    template <typename Work>
    void compute(long part, Work work) const {
        const long share = part / size(), place = part % size();
        if (place < whole()) return work(share * whole() + place, 0L, rows);
        const long first = rows * share / threads, end = rows * (share + 1) / threads;
        if (first < end) work(threads * whole() + place - whole(), first, end);
    }
};

// One row; each product is rounded before it is multiplied by the weight.
inline void norm_row(const bf16* from, const bf16* weight, bf16* to, long width, float epsilon) {
    __m512 squares = _mm512_setzero_ps();
    for (long at = 0; at < width; at += lanes) {
        const __m512 numbers = read(from + at);
        squares = _mm512_fmadd_ps(numbers, numbers, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
    for (long at = 0; at < width; at += lanes) {
        const __m512 normed = rounded(_mm512_mul_ps(read(from + at), factor));
        write(to + at, _mm512_mul_ps(normed, read(weight + at)));
    }
}

// One row [gate and then up] to silu(gate) * up; what is activated is rounded.
inline void gate_row(const bf16* gate, bf16* to, long width) {
    for (long at = 0; at < width; at += lanes)
        write(to + at, _mm512_mul_ps(rounded(silu(read(gate + at))), read(gate + width + at)));
}

}  // namespace
