// Kernels of a decoder layer for processors that multiply bfloat16 numbers (AVX512-BF16).
//
// Called through ``torch_native.py``, which says what they compute, and compiled by
// ``torch_native_build.py``. All numbers are bfloat16 unless said otherwise; sums are single
// precision. Each number of a result is added up in an order of its own, whatever the neighbours
// and the number of threads, so rows do not depend on each other, not by a bit.
//
// Loops are OpenMP's, with the threads of the calling program (torch), and with as many as that set.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
