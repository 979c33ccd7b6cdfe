// Kernels of a decoder layer for processors that multiply bfloat16 numbers (AVX512-BF16), for JAX.
//
// Custom calls of XLA's CPU client by its typed foreign function interface. ``jax_native.py`` calls
// them and says what they compute, ``native_build.py`` compiles them. Sums are single precision. Each
// number of a result is added up in an order of its own, whatever the neighbours and the number of
// threads, so rows do not depend on each other, not by a bit.
//
// Work is shared out to the threads of XLA's own pool and to the calling one. What is padding, which
// is behind the ``real`` rows, is not computed: there results are 0.

#include <atomic>
#include <memory>
#include <thread>

#include "native_attention.h"
#include "native_layers.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Numbers = ffi::Buffer<ffi::DataType::BF16>;
using Integers = ffi::Buffer<ffi::DataType::S32>;
using Bits = ffi::Buffer<ffi::DataType::U16>;

constexpr int patience = 2000;  // looks at what others are doing before the processor is offered

constexpr long crew_max = 64;  // threads that one call is shared out to

// Numbers that are to be worked off, cut into ranges, one for each thread. Whoever is done with its
// own takes from the others', so a thread that comes too late finds nothing, and none is waited for
// in vain.
template <typename Work>
struct Crew {
    struct alignas(64) Range {
        std::atomic<long> next;
        long end;
    };

    const Work* work;
    long size;
    long threads;
    std::atomic<long> come{0};
    alignas(64) std::atomic<long> left;
    Range ranges[crew_max];

    Crew(const Work& work, long size, long threads)
        : work(&work), size(size), threads(threads), left(size) {
        for (long each = 0; each < threads; ++each) {
            ranges[each].next.store(size * each / threads, std::memory_order_relaxed);
            ranges[each].end = size * (each + 1) / threads;
        }
    }

    void take() {
        const long me = come.fetch_add(1, std::memory_order_relaxed);
        for (long turn = 0; turn < threads; ++turn) {
            Range& range = ranges[(me + turn) % threads];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const long number = range.next.fetch_add(1, std::memory_order_relaxed);
                if (number >= range.end) break;
                (*work)(number);  // the caller waits for it, so it is still there
                left.fetch_sub(1, std::memory_order_release);
            }
        }
    }
};

// Calls ``work`` with each number below ``size``, and returns when all calls have.
template <typename Work>
void share_out(ffi::ThreadPool& pool, long size, const Work& work) {
    const long threads = std::clamp(std::min<long>(pool.num_threads(), size), 1L, crew_max);
    const auto crew = std::make_shared<Crew<Work>>(work, size, threads);
    for (long helper = 1; helper < threads; ++helper) pool.Schedule([crew] { crew->take(); });
    crew->take();
    for (long looks = 0; crew->left.load(std::memory_order_acquire) > 0; ++looks)
        if (looks < patience)
            _mm_pause();
        else
            std::this_thread::yield();
}

// Calls ``work`` as ``Shares`` does.
template <typename Work>
void share_blocks(ffi::ThreadPool& pool, long blocks, long rows, const Work& work) {
    if (rows == 0) return;
    const Shares shares{blocks, rows, std::clamp<long>(pool.num_threads(), 1, crew_max)};
    share_out(pool, shares.size() * shares.threads, [&](long part) { shares.compute(part, work); });
}

template <typename Out>
void clear(Out* out, long real, long rows, long width) {
    std::fill(out + real * width, out + rows * width, Out(0));
}

template <ffi::DataType type>
ffi::Error product(
    ffi::ThreadPool pool, Numbers x, Numbers weight, Integers real,
    ffi::Result<ffi::Buffer<type>> out) {
    const long rows = x.dimensions()[0], in = x.dimensions()[1], outs = out->dimensions()[1];
    const long count = std::min<long>(rows, real.typed_data()[0]);
    auto* to = out->typed_data();
    using Out = std::remove_reference_t<decltype(*to)>;
    const Product<Out> all{x.typed_data(), weight.typed_data(), nullptr, to, in, outs};
    share_blocks(pool, all.blocks(), count, [&](long place, long first, long end) {
        all.compute(place, first, end);
    });
    clear(to, count, rows, outs);
    return ffi::Error::Success();
}

ffi::Error added(
    ffi::ThreadPool pool, Numbers x, Numbers weight, Integers real, Numbers rest,
    ffi::Result<Numbers> out) {
    const long rows = x.dimensions()[0], in = x.dimensions()[1], outs = out->dimensions()[1];
    const long count = std::min<long>(rows, real.typed_data()[0]);
    const Product<bf16> all{
        x.typed_data(), weight.typed_data(), nullptr, out->typed_data(), in, outs,
        rest.typed_data()};
    share_blocks(pool, all.blocks(), count, [&](long place, long first, long end) {
        all.compute(place, first, end);
    });
    clear(out->typed_data(), count, rows, outs);
    return ffi::Error::Success();
}

ffi::Error norm(
    ffi::ThreadPool pool, Numbers x, Numbers weight, Integers real, float epsilon,
    ffi::Result<Numbers> out) {
    const long rows = x.dimensions()[0], width = x.dimensions()[1];
    const long count = std::min<long>(rows, real.typed_data()[0]);
    const auto one = [&](long row) {
        norm_row(
            x.typed_data() + row * width, weight.typed_data(), out->typed_data() + row * width,
            width, epsilon);
    };
    if (count * width > serial_max)
        share_out(pool, count, one);
    else
        for (long row = 0; row < count; ++row) one(row);
    clear(out->typed_data(), count, rows, width);
    return ffi::Error::Success();
}

ffi::Error gated(
    ffi::ThreadPool pool, Numbers x, Numbers weight, Integers real, ffi::Result<Numbers> out) {
    const long rows = x.dimensions()[0], in = x.dimensions()[1], width = out->dimensions()[1];
    const long count = std::min<long>(rows, real.typed_data()[0]);
    const Gated all{x.typed_data(), weight.typed_data(), out->typed_data(), in, width};
    share_blocks(pool, width / block, count, [&](long place, long first, long end) {
        all.compute(place, first, end);
    });
    clear(out->typed_data(), count, rows, width);
    return ffi::Error::Success();
}

// The cache is [pages, heads of keys and then of values, page_tokens, dim]; it is updated in place.
// ``counts``: see ``jax_buckets.Bucket``.
ffi::Error attend(
    ffi::ThreadPool pool, Numbers query, Numbers key, Numbers value, Bits, Integers cells,
    Integers starts, Integers lengths, Integers tables, Integers counts, float scale,
    int64_t window, ffi::Result<Numbers> out, ffi::Result<Bits> cache) {
    const long tokens = query.dimensions()[0], heads = query.dimensions()[1];
    const long kv_heads = key.dimensions()[1], dim = query.dimensions()[2];
    const long page_tokens = cache->dimensions()[2], head_step = page_tokens * dim;
    const long sequences = counts.typed_data()[3], real = starts.typed_data()[sequences];
    const Cache keys{cache->typed_data(), 2 * kv_heads * head_step, dim, head_step};
    const Cache values{keys.at + kv_heads * head_step, keys.page_step, dim, head_step};
    const Layer layer{keys, values, heads, kv_heads, dim, dim, page_tokens, window, scale, 0.0f};
    const Step step{
        cells.typed_data(), starts.typed_data(), lengths.typed_data(), tables.typed_data(),
        real, sequences, tables.dimensions()[1]};
    write_cells({key.typed_data(), kv_heads * dim, dim}, keys, step, layer, dim);
    write_cells({value.typed_data(), kv_heads * dim, dim}, values, step, layer, dim);
    // Two tasks for each thread at least, so that none waits for long.
    const long wanted = (2 * pool.num_threads() + kv_heads - 1) / kv_heads;
    const long rows = counts.typed_data()[0], common = counts.typed_data()[2] * page_tokens;
    const std::vector<Tile> tiles = tiles_of(step, layer, rows, common, wanted);
    const Heads from{query.typed_data(), heads * dim, dim};
    bf16* to = out->typed_data();
    share_out(pool, tiles.size() * kv_heads, [&](long task) {
        Attention one(layer, step, tiles[task / kv_heads], task % kv_heads);
        one.compute(from, nullptr, to);
    });
    clear(to, real, tokens, heads * dim);
    return ffi::Error::Success();
}

constexpr auto in_pool = [] { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); };

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_f32, product<ffi::DataType::F32>,
    in_pool().Arg<Numbers>().Arg<Numbers>().Arg<Integers>().Ret<ffi::Buffer<ffi::DataType::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    product_bf16, product<ffi::DataType::BF16>,
    in_pool().Arg<Numbers>().Arg<Numbers>().Arg<Integers>().Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    added_bf16, added,
    in_pool().Arg<Numbers>().Arg<Numbers>().Arg<Integers>().Arg<Numbers>().Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    norm_bf16, norm,
    in_pool()
        .Arg<Numbers>()
        .Arg<Numbers>()
        .Arg<Integers>()
        .Attr<float>("epsilon")
        .Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gated_bf16, gated, in_pool().Arg<Numbers>().Arg<Numbers>().Arg<Integers>().Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    attend_bf16, attend,
    in_pool()
        .Arg<Numbers>()
        .Arg<Numbers>()
        .Arg<Numbers>()
        .Arg<Bits>()
        .Arg<Integers>()
        .Arg<Integers>()
        .Arg<Integers>()
        .Arg<Integers>()
        .Arg<Integers>()
        .Attr<float>("scale")
        .Attr<int64_t>("window")
        .Ret<Numbers>()
        .Ret<Bits>());
