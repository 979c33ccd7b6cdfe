// Numbers of 16 bits in registers, and the products that both layers and attention are made of.
//
// Nothing here knows of threads, nor of the engine that computes: who includes it shares work out.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr long lanes = 16;          // single precision numbers of a register
constexpr long block = 4 * lanes;   // outputs of a product, or keys, that are computed at once
constexpr long rows_max = 6;        // rows of a product that are: 6 * 4 of 32 registers hold sums
constexpr long queries_wanted = 48; // queries of a sequence that read its keys together
constexpr long queries_max = 64;    // the same, if a group of heads alone has more
constexpr long dim_max = 256;       // of a head
constexpr long serial_max = 1 << 14;  // numbers for which a second thread is not worth waking

inline __m512 widened(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

inline __m256i narrowed(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }

inline __m512 rounded(__m512 numbers) { return widened(narrowed(numbers)); }

inline __m512 read(const bf16* from) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void write(bf16* to, __m512 numbers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(numbers));
}

// e to the power of numbers of at most 0. Undefined numbers (NaN) stay such: of the two that are
// compared here the second is taken then.
inline __m512 exponential(__m512 x) {
    const __m512 power = _mm512_mul_ps(
        _mm512_max_ps(_mm512_set1_ps(-87.0f), x), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
    const __m512 rest = _mm512_sub_ps(power, whole);
    __m512 sum = _mm512_set1_ps(0.00133335581f);  // Taylor's series of 2^rest
    for (const float factor : {0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, whole);
}

// A part of a product: adds to ``sums`` those of ``rows`` rows of x, ``pairs`` pairs of numbers
// long and ``x_step`` numbers apart, with 64 columns of w. There the two numbers of a pair lie side
// by side, column after column, and pairs are ``w_step`` numbers apart.
template <int rows>
[[gnu::always_inline]] inline void multiply(
    __m512 (&sums)[rows][4], const bf16* x, long x_step, const bf16* w, long w_step, long pairs,
    const char* soon = nullptr, long soon_lines = 0) {
    for (long pair = 0; pair < pairs; ++pair) {
        __m512bh columns[4];
        for (int part = 0; part < 4; ++part)
            columns[part] = (__m512bh)_mm512_loadu_si512(w + pair * w_step + part * 2 * lanes);
        if (pair < soon_lines) _mm_prefetch(soon + pair * 64, _MM_HINT_T1);
        for (int row = 0; row < rows; ++row) {
            int32_t both;
            std::memcpy(&both, x + row * x_step + 2 * pair, sizeof both);
            const __m512bh numbers = (__m512bh)_mm512_set1_epi32(both);
            for (int part = 0; part < 4; ++part)
                sums[row][part] = _mm512_dpbf16_ps(sums[row][part], numbers, columns[part]);
        }
    }
}

// Calls ``work`` with each number of rows as a constant: ``rows`` of them, ``rows_max`` at a time.
template <typename Work>
inline void in_tiles(long rows, Work work) {
    for (long row = 0; row < rows;) {
        const long left = rows - row;
        // Of seven and eight rows the last would be computed alone, which takes as long as four.
        const long size = left > 8 ? rows_max : left > 6 ? 4 : left;
        switch (size) {
            case 6: work(row, std::integral_constant<int, 6>()); break;
            case 5: work(row, std::integral_constant<int, 5>()); break;
            case 4: work(row, std::integral_constant<int, 4>()); break;
            case 3: work(row, std::integral_constant<int, 3>()); break;
            case 2: work(row, std::integral_constant<int, 2>()); break;
            default: work(row, std::integral_constant<int, 1>());
        }
        row += size;
    }
}

}  // namespace
