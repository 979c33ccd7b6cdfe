// Attention over pages, and the rotation of heads that goes before it.

#pragma once

#include "native_numbers.h"

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

// Keys or values [pages, page_tokens, kv_heads, dim], in whichever order they lie in memory; the
// numbers of one head lie side by side. Steps are in numbers.
struct Cache {
    bf16* at;
    int64_t page_step;
    int64_t token_step;
    int64_t head_step;
};

// Sizes of a layer, and its cache.
struct Layer {
    Cache keys;
    Cache values;
    int64_t heads;
    int64_t kv_heads;
    int64_t key_dim;
    int64_t value_dim;
    int64_t page_tokens;
    int64_t window;
    float scale;
    float softcap;
};

// Some tokens that read keys together: of one sequence, or the only ones of several that have their
// first keys in common.
struct Tile {
    long sequence;  // the first one
    long first;     // of a sequence's tokens in the step
    long count;
    long common;  // keys that several sequences have in common, whole blocks; 0: it is one sequence
};

void write_cells(
    const Heads& from, const Cache& cache, const Step& step, const Layer& layer, long dim) {
    for (long token = 0; token < step.tokens; ++token) {
        const long cell = step.cells[token];
        bf16* to = cache.at + cell / layer.page_tokens * cache.page_step +
                   cell % layer.page_tokens * cache.token_step;
        for (long head = 0; head < layer.kv_heads; ++head)
            std::memcpy(
                to + head * cache.head_step,
                from.at + token * from.token_step + head * from.head_step, dim * sizeof(bf16));
    }
}

// How the tokens of a step read keys together. The first ``rows`` sequences have one token each, and
// the keys of their first ``common`` places, if any, are the same. There are at least ``wanted``
// tiles of those that have.
inline std::vector<Tile> tiles_of(
    const Step& step, const Layer& layer, long rows = 0, long common = 0, long wanted = 1) {
    const long size = std::max(1L, queries_wanted / (layer.heads / layer.kv_heads));
    // Blocks begin at the same places for all, so that what is in common changes no bit.
    const long shared = common / block * block;
    std::vector<Tile> tiles;
    long sequence = 0;
    if (shared > 0 && rows > 1) {
        const long count = std::max((rows + size - 1) / size, std::min(rows, wanted));
        for (long tile = 0; tile < count; ++tile) {
            const long first = rows * tile / count, end = rows * (tile + 1) / count;
            tiles.push_back({first, 0, end - first, shared});
        }
        sequence = rows;
    }
    for (; sequence < step.sequences; ++sequence) {
        const long count = step.starts[sequence + 1] - step.starts[sequence];
        for (long first = 0; first < count; first += size)
            tiles.push_back({sequence, first, std::min(size, count - first), 0});
    }
    return tiles;
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
// over blocks of 64 keys (arXiv:2205.14135). A query's sums do not depend on what else is in the tile.
struct Attention {
    const Layer& layer;
    const Step& step;
    const Tile tile;
    const long kv_head;
    const long group;

    alignas(64) bf16 keys[dim_max * block];    // pairs of numbers, by key
    alignas(64) bf16 values[block * dim_max];  // pairs of keys, by number
    alignas(64) bf16 query[queries_max][dim_max];
    alignas(64) float sum[queries_max][dim_max];
    float peak[queries_max];
    float total[queries_max];

    Attention(const Layer& layer, const Step& step, Tile tile, long kv_head)
        : layer(layer), step(step), tile(tile), kv_head(kv_head),
          group(layer.heads / layer.kv_heads) {}

    // The sequence of the tile's i-th token, the token's place in the step, and how many keys of
    // its sequence there are up to it.
    long sequence_of(long i) const { return tile.common ? tile.sequence + i : tile.sequence; }

    long token_of(long i) const {
        const long within = tile.common ? 0 : tile.first + i;
        return step.starts[sequence_of(i)] + within;
    }

    long end_of(long i) const {
        const long sequence = sequence_of(i);
        return step.lengths[sequence] - step.starts[sequence + 1] + token_of(i) + 1;
    }

    void compute(const Heads& from, const float* sinks, bf16* out) {
        const long rows = tile.count * group;
        for (long row = 0; row < rows; ++row) begin(row, from, sinks);
        if (tile.common == 0) {
            see(tile.sequence, {0, rows}, first_seen(end_of(0)), end_of(tile.count - 1));
        } else {
            long lowest = end_of(0);
            for (long i = 1; i < tile.count; ++i) lowest = std::min(lowest, end_of(i));
            see(tile.sequence, {0, rows}, first_seen(lowest), tile.common);
            for (long i = 0; i < tile.count; ++i) {
                const long from_place = std::max(tile.common, first_seen(end_of(i)));
                see(sequence_of(i), {i * group, (i + 1) * group}, from_place, end_of(i));
            }
        }
        for (long row = 0; row < rows; ++row) finish(row, out);
    }

    void begin(long row, const Heads& from, const float* sinks) {
        const long head = kv_head * group + row % group, token = token_of(row / group);
        std::memcpy(
            query[row], from.at + token * from.token_step + head * from.head_step,
            layer.key_dim * sizeof(bf16));
        std::fill(sum[row], sum[row] + layer.value_dim, 0.0f);
        peak[row] = sinks ? sinks[head] : -1e30f;  // finite, so that differences are defined
        total[row] = sinks ? 1.0f : 0.0f;
    }

    void finish(long row, bf16* out) const {
        const long head = kv_head * group + row % group, token = token_of(row / group);
        const __m512 share = _mm512_set1_ps(1.0f / total[row]);
        bf16* to = out + (token * layer.heads + head) * layer.value_dim;
        for (long at = 0; at < layer.value_dim; at += lanes)
            write(to + at, _mm512_mul_ps(_mm512_loadu_ps(sum[row] + at), share));
    }

    long first_seen(long end) const {
        return layer.window ? std::max(0L, end - layer.window) / block * block : 0;
    }

    // Has some rows look at the keys of a sequence from one place, where a block begins, to another.
    void see(long sequence, std::pair<long, long> rows, long begin, long end) {
        for (long at = begin; at < end; at += block) {
            const long cells = gather(sequence, at, end);
            in_tiles(rows.second - rows.first, [&](long row, auto size) {
                look<size>(rows.first + row, at, cells);
            });
        }
    }

    // Has what the next KV head reads fetched meanwhile; behind the last one nothing is lost by it.
    static void fetch(const bf16* from, long step, long dim) {
        for (long each = 0; each < lanes; ++each)
            for (long at = 0; at < dim; at += 2 * lanes)
                _mm_prefetch(reinterpret_cast<const char*>(from + each * step + at), _MM_HINT_T0);
    }

    // Brings keys and values from their pages, in whole registers of keys; says how many keys.
    // Behind the end values are zeros: what lies there may be no number, whatever it is weighed by.
    long gather(long sequence, long at, long end) {
        static const bf16 zeros[dim_max] = {};
        const int32_t* table = step.tables + sequence * step.table_width;
        const Cache &all_keys = layer.keys, &all_values = layer.values;
        long done = 0;
        for (; done < block && at + done < end; done += lanes) {
            const long page = table[(at + done) / layer.page_tokens];
            const long within = (at + done) % layer.page_tokens, left = end - at - done;
            const bf16* key = all_keys.at + page * all_keys.page_step +
                              within * all_keys.token_step + kv_head * all_keys.head_step;
            fetch(key + all_keys.head_step, all_keys.token_step, layer.key_dim);
            for (long dim = 0; dim < layer.key_dim; dim += 2 * lanes)
                transpose(key + dim, all_keys.token_step, keys + dim * block + 2 * done, 2 * block);
            const bf16* value = all_values.at + page * all_values.page_step +
                                within * all_values.token_step + kv_head * all_values.head_step;
            fetch(value + all_values.head_step, all_values.token_step, layer.value_dim);
            for (long each = 0; each < lanes; each += 2) {
                const bf16* first = each < left ? value + each * all_values.token_step : zeros;
                const bf16* second =
                    each + 1 < left ? value + (each + 1) * all_values.token_step : zeros;
                pair_up(first, second, values + (done + each) * layer.value_dim, layer.value_dim);
            }
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
        const uint64_t seen = visible(end_of(row / group), at);
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
