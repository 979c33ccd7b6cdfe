// Attention over pages for ``torch_native.cpp``, and the rotation of heads that goes before it.

#pragma once

#include "torch_native_numbers.h"

namespace {

// Numbers of tokens' heads [tokens, heads, dim]; those of one head lie side by side.
struct Heads {
    const bf16* at;
    int64_t token_step;
    int64_t head_step;
};

// One token's heads by its angles; each product and each sum is rounded, as the library does.
void rotate_heads(
    const Heads& from, long token, const bf16* cosine, const bf16* sine, bf16* out, long heads,
    long dim) {
    const long half = dim / 2;
    for (long head = 0; head < heads; ++head) {
        const bf16* x = from.at + token * from.token_step + head * from.head_step;
        bf16* to = out + (token * heads + head) * dim;
        for (long at = 0; at < half; at += lanes) {
            const __m512 first = read(x + at), second = read(x + half + at);
            const __m512 a = rounded(_mm512_mul_ps(first, read(cosine + at)));
            const __m512 b = rounded(_mm512_mul_ps(second, read(sine + at)));
            const __m512 c = rounded(_mm512_mul_ps(second, read(cosine + half + at)));
            const __m512 d = rounded(_mm512_mul_ps(first, read(sine + half + at)));
            write(to + at, _mm512_sub_ps(a, b));
            write(to + half + at, _mm512_add_ps(c, d));
        }
    }
}

// Attention ---------------------------------------------------------------------------------------

// One step, for all layers: see ``StepLayout`` in ``shards/kv.py``.
struct Step {
    const int32_t* cells;
    const int32_t* starts;
    const int32_t* lengths;
    const int32_t* tables;
    int64_t tokens;
    int64_t sequences;
    int64_t table_width;
};

// Sizes of a layer, and its cache [pages, page_tokens, kv_heads, dim].
struct Layer {
    bf16* keys;
    bf16* values;
    int64_t heads;
    int64_t kv_heads;
    int64_t key_dim;
    int64_t value_dim;
    int64_t page_tokens;
    int64_t window;
    float scale;
    float softcap;
};

// Some tokens of one sequence that read its keys together.
struct Tile {
    long sequence;
    long first;  // among the sequence's tokens in the step
    long count;
};

void write_cells(const Heads& from, bf16* cache, const Step& step, long heads, long dim) {
    for (long token = 0; token < step.tokens; ++token)
        for (long head = 0; head < heads; ++head)
            std::memcpy(
                cache + (step.cells[token] * heads + head) * dim,
                from.at + token * from.token_step + head * from.head_step, dim * sizeof(bf16));
}

// 16 rows of 16 pairs of numbers to 16 rows of one pair each.
inline void transpose(const bf16* from, long from_step, bf16* to, long to_step) {
    __m512i a[lanes], b[lanes];
    for (int row = 0; row < lanes; ++row) a[row] = _mm512_loadu_si512(from + row * from_step);
    for (int row = 0; row < lanes; row += 2) {
        b[row] = _mm512_unpacklo_epi32(a[row], a[row + 1]);
        b[row + 1] = _mm512_unpackhi_epi32(a[row], a[row + 1]);
    }
    for (int row = 0; row < lanes; row += 4)
        for (int half = 0; half < 2; ++half) {
            a[row + 2 * half] = _mm512_unpacklo_epi64(b[row + half], b[row + half + 2]);
            a[row + 2 * half + 1] = _mm512_unpackhi_epi64(b[row + half], b[row + half + 2]);
        }
    for (int row = 0; row < 4; ++row)
        for (int half = 0; half < 2; ++half) {
            const __m512i upper = a[row + 8 * half], lower = a[row + 8 * half + 4];
            b[row + 8 * half] = _mm512_shuffle_i32x4(upper, lower, 0x88);
            b[row + 8 * half + 4] = _mm512_shuffle_i32x4(upper, lower, 0xdd);
        }
    for (int row = 0; row < 8; ++row) {
        const __m512i even = _mm512_shuffle_i32x4(b[row], b[row + 8], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(b[row], b[row + 8], 0xdd);
        _mm512_storeu_si512(to + row * to_step, even);
        _mm512_storeu_si512(to + (row + 8) * to_step, odd);
    }
}

// Two rows of numbers as one of pairs.
inline void pair_up(const bf16* first, const bf16* second, bf16* to, long dim) {
    alignas(64) static constexpr uint16_t low[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_load_si512(low);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (long at = 0; at < dim; at += 2 * lanes) {
        const __m512i a = _mm512_loadu_si512(first + at), b = _mm512_loadu_si512(second + at);
        _mm512_storeu_si512(to + 2 * at, _mm512_permutex2var_epi16(a, lower, b));
        _mm512_storeu_si512(to + 2 * at + 2 * lanes, _mm512_permutex2var_epi16(a, upper, b));
    }
}

// The queries of one tile that share a KV head, and what they have seen so far: a running softmax
// over blocks of 64 keys (arXiv:2205.14135).
struct Attention {
    const Layer& layer;
    const Step& step;
    const Tile tile;
    const long kv_head;
    const long group;
    long before;  // tokens of the sequence before the tile

    alignas(64) bf16 keys[dim_max * block];    // pairs of numbers, by key
    alignas(64) bf16 values[block * dim_max];  // pairs of keys, by number
    alignas(64) bf16 query[queries_max][dim_max];
    alignas(64) float sum[queries_max][dim_max];
    float peak[queries_max];
    float total[queries_max];

    Attention(const Layer& layer, const Step& step, Tile tile, long kv_head)
        : layer(layer), step(step), tile(tile), kv_head(kv_head),
          group(layer.heads / layer.kv_heads) {
        const long mine = step.starts[tile.sequence + 1] - step.starts[tile.sequence];
        before = step.lengths[tile.sequence] - mine + tile.first;
    }

    void compute(const Heads& from, const float* sinks, bf16* out) {
        const long token = step.starts[tile.sequence] + tile.first, rows = tile.count * group;
        for (long row = 0; row < rows; ++row) {
            const long head = kv_head * group + row % group;
            std::memcpy(
                query[row], from.at + (token + row / group) * from.token_step + head * from.head_step,
                layer.key_dim * sizeof(bf16));
            std::fill(sum[row], sum[row] + layer.value_dim, 0.0f);
            peak[row] = sinks ? sinks[head] : -1e30f;  // finite, so that differences are defined
            total[row] = sinks ? 1.0f : 0.0f;
        }
        const long end = before + tile.count;
        const long begin = layer.window ? std::max(0L, before + 1 - layer.window) : 0;
        for (long at = begin / block * block; at < end; at += block) {
            const long cells = gather(at, end);
            in_tiles(rows, [&](long row, auto size) { look<size>(row, at, cells); });
        }
        for (long row = 0; row < rows; ++row) {
            const long head = kv_head * group + row % group;
            const __m512 share = _mm512_set1_ps(1.0f / total[row]);
            bf16* to = out + ((token + row / group) * layer.heads + head) * layer.value_dim;
            for (long at = 0; at < layer.value_dim; at += lanes)
                write(to + at, _mm512_mul_ps(_mm512_loadu_ps(sum[row] + at), share));
        }
    }

    // Has what the next KV head reads fetched meanwhile; behind the last one nothing is lost by it.
    static void fetch(const bf16* from, long step, long dim) {
        for (long each = 0; each < lanes; ++each)
            for (long at = 0; at < dim; at += 2 * lanes)
                _mm_prefetch(reinterpret_cast<const char*>(from + each * step + at), _MM_HINT_T0);
    }

    // Brings keys and values from their pages, in whole registers of keys; says how many keys.
    long gather(long at, long end) {
        const int32_t* table = step.tables + tile.sequence * step.table_width;
        const long key_step = layer.kv_heads * layer.key_dim;
        const long value_step = layer.kv_heads * layer.value_dim;
        long done = 0;
        for (; done < block && at + done < end; done += lanes) {
            const long cell = at + done;
            const long place = table[cell / layer.page_tokens] * layer.page_tokens +
                               cell % layer.page_tokens;
            const bf16* key = layer.keys + place * key_step + kv_head * layer.key_dim;
            fetch(key + layer.key_dim, key_step, layer.key_dim);
            for (long dim = 0; dim < layer.key_dim; dim += 2 * lanes)
                transpose(key + dim, key_step, keys + dim * block + 2 * done, 2 * block);
            const bf16* value = layer.values + place * value_step + kv_head * layer.value_dim;
            fetch(value + layer.value_dim, value_step, layer.value_dim);
            for (long each = 0; each < lanes; each += 2)
                pair_up(
                    value + each * value_step, value + (each + 1) * value_step,
                    values + (done + each) * layer.value_dim, layer.value_dim);
        }
        return done;
    }

    template <int rows>
    void look(long row, long at, long cells) {
        __m512 scores[rows][4] = {};
        multiply<rows>(scores, query[row], dim_max, keys, 2 * block, layer.key_dim / 2);
        alignas(64) bf16 weights[rows][block];
        float faded[rows];
        for (int each = 0; each < rows; ++each)
            faded[each] = weigh(row + each, at, scores[each], weights[each]);
        for (long dim = 0; dim < layer.value_dim; dim += block) {
            __m512 sums[rows][4];
            for (int each = 0; each < rows; ++each)
                for (int part = 0; part < 4; ++part)
                    sums[each][part] = _mm512_mul_ps(
                        _mm512_load_ps(sum[row + each] + dim + part * lanes),
                        _mm512_set1_ps(faded[each]));
            multiply<rows>(
                sums, weights[0], block, values + 2 * dim, 2 * layer.value_dim, cells / 2);
            for (int each = 0; each < rows; ++each)
                for (int part = 0; part < 4; ++part)
                    _mm512_store_ps(sum[row + each] + dim + part * lanes, sums[each][part]);
        }
    }

    // Scores of one query to weights, relative to the largest score so far. Returns by what the
    // weights before have to be multiplied.
    float weigh(long row, long at, __m512 (&scores)[4], bf16* weights) {
        const uint64_t seen = visible(before + row / group + 1, at);
        const __m512 none = _mm512_set1_ps(-1e30f);
        __m512 largest = none;
        for (int part = 0; part < 4; ++part) {
            scores[part] = scaled(scores[part]);
            const __mmask16 mask = seen >> (part * lanes);
            largest = _mm512_mask_max_ps(largest, mask, largest, scores[part]);
        }
        const float last = peak[row];
        peak[row] = std::max(last, _mm512_reduce_max_ps(largest));
        __m512 added = _mm512_setzero_ps();
        for (int part = 0; part < 4; ++part) {
            const __mmask16 mask = seen >> (part * lanes);
            const __m512 less = _mm512_sub_ps(scores[part], _mm512_set1_ps(peak[row]));
            const __m512 weight = rounded(_mm512_maskz_mov_ps(mask, exponential(less)));
            added = _mm512_add_ps(added, weight);
            write(weights + part * lanes, weight);
        }
        const float fading = _mm512_cvtss_f32(exponential(_mm512_set1_ps(last - peak[row])));
        total[row] = total[row] * fading + _mm512_reduce_add_ps(added);
        return fading;
    }

    __m512 scaled(__m512 scores) const {
        scores = _mm512_mul_ps(scores, _mm512_set1_ps(layer.scale));
        if (layer.softcap == 0.0f) return scores;
        const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
        const __m512 size = _mm512_andnot_ps(sign, scores);
        const __m512 small = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f / layer.softcap)));
        const __m512 tangent = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
        const __m512 capped = _mm512_mul_ps(tangent, _mm512_set1_ps(layer.softcap));
        return _mm512_or_ps(capped, _mm512_and_ps(sign, scores));
    }

    // Which of the 64 keys from ``at`` on a token sees behind which the sequence has ``end``.
    uint64_t visible(long end, long at) const {
        const long first = layer.window ? std::clamp(end - layer.window - at, 0L, block) : 0;
        const long behind = std::clamp(end - at, 0L, block);
        const uint64_t below = behind == block ? ~0ull : (1ull << behind) - 1;
        return first == block ? 0 : below >> first << first;
    }
};

}  // namespace
