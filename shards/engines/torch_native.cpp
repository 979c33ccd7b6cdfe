// Kernels of a decoder layer for processors that multiply bfloat16 numbers (AVX512-BF16), for torch.
//
// Called through ``torch_native.py``, which says what they compute, and compiled by
// ``native_build.py``. All numbers are bfloat16 unless said otherwise; sums are single
// precision. Each number of a result is added up in an order of its own, whatever the neighbours
// and the number of threads, so rows do not depend on each other, not by a bit.
//
// Loops are OpenMP's, with the threads of the calling program (torch), and with as many as that set.

#include <omp.h>

#include "native_attention.h"
#include "native_layers.h"

extern "C" {

void product(
    const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t rows, int64_t in,
    int64_t outs) {
    if (rows == 0) return;
    const Product<bf16> product{x, weight, bias, out, in, outs};
#pragma omp parallel
    {
        const long threads = omp_get_num_threads(), me = omp_get_thread_num();
        const Shares shares{product.blocks(), rows, threads};
        for (long part = me * shares.size(); part < (me + 1) * shares.size(); ++part)
            shares.compute(part, [&](long place, long first, long end) {
                product.compute(place, first, end);
            });
    }
}

void attend(
    const Layer* layer, const Step* step, const Heads* query, const Heads* key, const Heads* value,
    const float* sinks, bf16* out) {
    write_cells(*key, layer->keys, *step, *layer, layer->key_dim);
    write_cells(*value, layer->values, *step, *layer, layer->value_dim);
    const std::vector<Tile> tiles = tiles_of(*step, *layer);
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
    for (long row = 0; row < rows; ++row)
        norm_row(x + row * width, weight, out + row * width, width, epsilon);
}

void gated(const bf16* x, bf16* out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > serial_max)
    for (long row = 0; row < rows; ++row) gate_row(x + 2 * row * width, out + row * width, width);
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
