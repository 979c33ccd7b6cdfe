// Kernels of a decoder layer for processors that multiply bfloat16 numbers (AVX512-BF16).
//
// Called through ``torch_native.py``, which says what they compute, and compiled by
// ``torch_native_build.py``. All numbers are bfloat16 unless said otherwise; sums are single
// precision. Each number of a result is added up in an order of its own, whatever the neighbours
// and the number of threads, so rows do not depend on each other, not by a bit.
//
// Loops are OpenMP's, with the threads of the calling program (torch), and with as many as that set.

#include "torch_native_attention.h"
#include "torch_native_numbers.h"

namespace {

struct Product {
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    bf16* out;
    long in;
    long outs;

    // Rows ``first`` to ``end`` of one block of outputs, while the next block is fetched.
    void compute(long place, long first, long end, bool last) const {
        const bf16* columns = weight + place * block * in;
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
            for (int each = 0; each < size; ++each)
                store(out + (first + row + each) * outs + place * block, sums[each], kept);
        });
    }

    __m512 start(long output) const {
        if (bias == nullptr || output >= outs) return _mm512_setzero_ps();
        if (output + lanes <= outs) return read(bias + output);
        bf16 some[lanes] = {};
        std::copy(bias + output, bias + outs, some);
        return read(some);
    }

    static void store(bf16* to, const __m512 (&sums)[4], long kept) {
        if (kept == block) {
            for (int part = 0; part < 4; ++part) write(to + part * lanes, sums[part]);
            return;
        }
        bf16 all[block];
        for (int part = 0; part < 4; ++part) write(all + part * lanes, sums[part]);
        std::copy(all, all + kept, to);
    }
};

}  // namespace

extern "C" {

void product(
    const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t rows, int64_t in,
    int64_t outs) {
    if (rows == 0) return;
    const Product product{x, weight, bias, out, in, outs};
    const long blocks = (outs + block - 1) / block;
#pragma omp parallel
    {
        // Blocks are shared out, and the rows of those that are left over.
        const long threads = omp_get_num_threads(), me = omp_get_thread_num();
        const long each = blocks / threads;
        for (long place = me * each; place < (me + 1) * each; ++place)
            product.compute(place, 0, rows, place + 1 == blocks);
        const long first = rows * me / threads, end = rows * (me + 1) / threads;
        for (long place = threads * each; place < blocks && first < end; ++place)
            product.compute(place, first, end, place + 1 == blocks);
    }
}

void attend(
    const Layer* layer, const Step* step, const Heads* query, const Heads* key, const Heads* value,
    const float* sinks, bf16* out) {
    write_cells(*key, layer->keys, *step, layer->kv_heads, layer->key_dim);
    write_cells(*value, layer->values, *step, layer->kv_heads, layer->value_dim);
    const long size = std::max(1L, queries_wanted / (layer->heads / layer->kv_heads));
    std::vector<Tile> tiles;
    for (long sequence = 0; sequence < step->sequences; ++sequence) {
        const long count = step->starts[sequence + 1] - step->starts[sequence];
        for (long first = 0; first < count; first += size)
            tiles.push_back({sequence, first, std::min(size, count - first)});
    }
    const long tasks = tiles.size() * layer->kv_heads;
    // A thread takes all heads of a tile, unless there are too few tiles: their keys lie together.
    const long share = tiles.size() < 8 ? 1 : layer->kv_heads;
#pragma omp parallel for schedule(dynamic, share)
    for (long task = 0; task < tasks; ++task) {
        Attention one(*layer, *step, tiles[task / layer->kv_heads], task % layer->kv_heads);
        one.compute(*query, sinks, out);
    }
}

void norm(
    const bf16* x, const bf16* weight, bf16* out, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows * width > serial_max)
    for (long row = 0; row < rows; ++row) {
        const bf16* from = x + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (long at = 0; at < width; at += lanes) {
            const __m512 numbers = read(from + at);
            squares = _mm512_fmadd_ps(numbers, numbers, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
        const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
        for (long at = 0; at < width; at += lanes) {
            const __m512 normed = rounded(_mm512_mul_ps(read(from + at), factor));
            write(out + row * width + at, _mm512_mul_ps(normed, read(weight + at)));
        }
    }
}

void gated(const bf16* x, bf16* out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > serial_max)
    for (long row = 0; row < rows; ++row) {
        const bf16 *gate = x + 2 * row * width, *up = gate + width;
        for (long at = 0; at < width; at += lanes) {
            const __m512 numbers = read(gate + at), one = _mm512_set1_ps(1.0f);
            const __m512 sign = _mm512_set1_ps(-0.0f);
            // 1 / (1 + e^-x) by the exponential of a number that is not positive.
            const __m512 small = exponential(_mm512_or_ps(sign, numbers));
            const __mmask16 positive = _mm512_cmp_ps_mask(numbers, _mm512_setzero_ps(), _CMP_GE_OQ);
            const __m512 above = _mm512_mask_mov_ps(small, positive, one);
            const __m512 share = _mm512_div_ps(above, _mm512_add_ps(one, small));
            const __m512 activated = rounded(_mm512_mul_ps(numbers, share));
            write(out + row * width + at, _mm512_mul_ps(activated, read(up + at)));
        }
    }
}

void rotate(
    const Heads* query, const Heads* key, const bf16* cosines, const bf16* sines, bf16* query_out,
    bf16* key_out, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > serial_max)
    for (long token = 0; token < tokens; ++token) {
        const bf16 *cosine = cosines + token * dim, *sine = sines + token * dim;
        rotate_heads(*query, token, cosine, sine, query_out, heads, dim);
        rotate_heads(*key, token, cosine, sine, key_out, kv_heads, dim);
    }
}

}  // extern "C"
