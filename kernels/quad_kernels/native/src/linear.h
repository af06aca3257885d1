// A whole linear: quantizes the tokens, multiplies, adds outliers and bias. Few tokens go straight from the packed
// weight; more share weights that are unpacked once.
#pragma once

#include "block.h"

namespace {

using quad::Integers;
using quad::Member;
using quad::ParallelFor;
using quad::Stored;

constexpr int64_t kBatch = 512;  // tokens at a time, at most: memory does not grow with their number
constexpr int64_t kBytesPerThread = 64 * 1024;  // of weights read for one token; a thread less would start in vain

constexpr int64_t kPartInputs = 32;  // whose products a sub-scale multiplies at once, at most

constexpr int64_t kFirst = 4096;  // bytes of weights that are asked for while a token is quantized

struct CallMemory {
    Buffer<int8_t> integers;
    Buffer<float> scale, outlier;
    Buffer<int32_t> sum;
    Buffer<int16_t> part;
    Buffer<uint16_t> outlier16;
    Buffer<float> branch, rows;
    Buffer<uint16_t> branch16;
    PanelMemory down;
    BlockMemory block[2];
    Buffer<uint8_t> panel;
    Buffer<int32_t> total;
    Buffer<float> y;
};

CallMemory& call_memory() {
    thread_local CallMemory memory;
    return memory;
}

int64_t greatest_divisor(int64_t a, int64_t b) { return b ? greatest_divisor(b, a % b) : a; }

// A call, and where its tokens are. Its members are weights that share the input: q, k and v, or gate and up.
struct Call {
    const Input* input;
    const Integers* integers;
    const Member* members;
    int64_t member_count;
    const Weight* weight;  // of the member that is computed
    const Rest* rest;
    const Output* output;
    int64_t selected;      // its number
    int64_t first, count;  // tokens of this batch
    int32_t largest;       // power of two: integers of the inputs are from -largest to largest - 1
    Tokens tokens;
    uint16_t* outlier16;  // [rank / 32][count][32], bfloat16, where AMX multiplies them
    float* branch;        // [members][count][columns], what `up` of a branch multiplies; columns are a multiple of 32
    uint16_t* branch16;   // [members][columns / 32][count][32], likewise, in bfloat16
    int64_t branch_size;  // of a member

    int64_t stretch() const { return weight->in_features / tokens.sums; }
    int64_t lines() const { return round_up(weight->in_features, kChunk) / per_line(); }
    int64_t per_line() const { return weight->stored == Stored::bytes ? 4 : 8; }
    Form form() const {
        if (weight->stored == Stored::nibbles) return weight->sub_scale ? Form::products : Form::nibbles;
        return weight->stored == Stored::bytes ? Form::bytes : Form::e2m1;
    }
    const uint8_t* block_lines(int64_t index) const { return weight->lines + index * lines() * kLine; }
    float* own_branch() const { return branch + selected * branch_size; }
    uint16_t* own_branch16() const { return branch16 ? branch16 + selected * branch_size : nullptr; }
    void select(const Member& member, int64_t number) {
        selected = number;
        weight = &member.weight;
        rest = &member.rest;
        output = &member.output;
    }
};

Tokens make_room(CallMemory& memory, const Call& call, int64_t count) {
    int64_t rank = call.rest->outlier_weight ? round_up(call.rest->rank, kRank) : 0;
    int64_t scales = call.input ? call.input->scales() : call.integers->groups;
    int64_t sums = scales / greatest_divisor(scales, call.weight->groups) * call.weight->groups;
    const Weight& weight = *call.weight;
    int64_t parts =
        weight.sub_scale ? weight.in_features / greatest_divisor(kPartInputs, weight.in_features / weight.sub_groups) : 0;
    Tokens tokens{};
    tokens.integers = memory.integers.at_least(round_up(call.weight->in_features, kChunk) * count);
    tokens.scale = memory.scale.at_least(scales * count);
    tokens.sum = memory.sum.at_least(sums * count);
    tokens.part = memory.part.at_least(larger(1, parts * count));
    tokens.outlier = memory.outlier.at_least(larger(1, rank * count));
    tokens.count = count;
    tokens.scales = scales;
    tokens.sums = sums;
    tokens.parts = parts;
    tokens.rank = rank;
    return tokens;
}

// Brings token i of the batch to its place.
void place(const Call& call, int64_t i) {
    const Tokens& tokens = call.tokens;
    if (call.input) {
        quantize_into(*call.input, call.first + i, tokens, i);
        return;
    }
    const Integers& x = *call.integers;
    int64_t t = call.first + i;
    std::memcpy(tokens.scale + i * tokens.scales, x.scale + t * tokens.scales, tokens.scales * sizeof(float));
    place_token(tokens, i, x.data + t * call.weight->in_features, call.weight->in_features);
    if (tokens.rank) {
        float* outlier = tokens.outlier + i * tokens.rank;
        load_row(element(call.rest->outlier, call.rest->outlier_dtype, t * call.rest->rank), call.rest->outlier_dtype,
                 call.rest->rank, outlier);
        std::memset(outlier + call.rest->rank, 0, (tokens.rank - call.rest->rank) * sizeof(float));
    }
}

// Makes room for what the branches of all members multiply.
void make_branch_room(CallMemory& memory, Call& call) {
    int64_t most = 0;
    for (int64_t m = 0; m < call.member_count; ++m) most = larger(most, call.members[m].rest.branch_rank);
    call.branch_size = round_up(most, kRank) * call.tokens.count;
    if (most) call.branch = memory.branch.at_least(call.branch_size * call.member_count);
}

// Multiplies tokens [begin, end) of the batch by `down` of the member that is computed, if it has a branch. The products
// add up in the order of block.h, and are rounded to the dtype of the input, as a layer of its own would leave them.
void place_branch(const Call& call, int64_t begin, int64_t end, CallMemory& memory) {
    const Rest& rest = *call.rest;
    if (!rest.branch_rank) return;
    const Input& input = *call.input;
    const int64_t width = round_up(input.width, kRank), columns = width_of(rest.branch_rank).all;
    float* rows = memory.rows.at_least(kPanelTile * width);
    float* results = call.own_branch();
    for (int64_t c = 0; c < columns; c += kChannels) {
        int64_t count = larger(0, smaller(kChannels, rest.branch_rank - c));
        Panel panel{nullptr, nullptr};
        if (count)
            panel = memory.down.of(element(rest.down, rest.branch_dtype, c * input.width), rest.branch_dtype, count,
                                   input.width, width);
        for (int64_t t = begin; t < end; t += kPanelTile) {
            int64_t tokens = smaller(kPanelTile, end - t);
            alignas(64) float y[kPanelTile * kChannels] = {};
            for (int64_t i = 0; i < tokens && count; ++i) {
                load_row(element(input.data, input.dtype, (call.first + t + i) * input.width), input.dtype, input.width,
                         rows + i * width);
                std::memset(rows + i * width + input.width, 0, (width - input.width) * sizeof(float));
            }
            if (count) add_products(panel, rows, width_of(input.width), tokens, y);
            round_row(y, input.dtype, tokens * kChannels);
            for (int64_t i = 0; i < tokens; ++i)
                std::memcpy(results + (t + i) * columns + c, y + i * kChannels, kChannels * sizeof(float));
        }
    }
}

void add_outliers(const Call& call, const Block& block, int64_t t, int64_t count, float* y) {
    Width columns = width_of(call.rest->rank);
    if (columns.used) add_products(block.outlier, call.tokens.outlier + t * columns.all, columns, count, y);
}

void add_branch(const Call& call, const Block& block, int64_t t, int64_t count, float* y) {
    Width columns = width_of(call.rest->branch_rank);
    if (columns.used) add_products(block.branch, call.own_branch() + t * columns.all, columns, count, y);
}

void end_block(const Call& call, const Block& block, int64_t t, int64_t count, float* y) {
    add_outliers(call, block, t, count, y);
    add_branch(call, block, t, count, y);
    finish(block, *call.output, call.weight->out_features, call.first + t, count, y);
}

// Asks for memory that will be read soon.
void fetch(const void* data, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += kLine) _mm_prefetch(static_cast<const char*>(data) + b, _MM_HINT_T0);
}

// Asks for the outlier weights of block `index`, which is read from its beginning to its end at once.
void fetch_outliers(const Call& call, int64_t index) {
    if (!call.tokens.rank) return;
    int64_t count = kChannels * call.rest->rank;
    Dtype dtype = call.rest->outlier_weight_dtype;
    fetch(element(call.rest->outlier_weight, dtype, index * count), count * size_of(dtype));
}

// Likewise for `up` of a branch.
void fetch_branch(const Call& call, int64_t index) {
    int64_t count = kChannels * call.rest->branch_rank;
    Dtype dtype = call.rest->branch_dtype;
    if (count) fetch(element(call.rest->up, dtype, index * count), count * size_of(dtype));
}

// Has the outlier weights of block `index` asked for while `lines` lines of the block before it are read: by the products,
// where they do that, else here.
Ahead outliers_ahead(const Call& call, int64_t index, int64_t lines) {
    Ahead ahead{reinterpret_cast<const char*>(call.weight->lines), 0};
    if (!call.tokens.rank) return ahead;
    Dtype dtype = call.rest->outlier_weight_dtype;
    int64_t count = kChannels * call.rest->rank, step = ceil_div(count * size_of(dtype), lines);
    if (!Product::kFetches || step > kLine) {
        fetch_outliers(call, index);
        return ahead;
    }
    return {static_cast<const char*>(element(call.rest->outlier_weight, dtype, index * count)), step};
}

// What is added to the integers of a weight that is read as it is stored; products begin at the sum that takes it off.
constexpr int32_t offset_of(Form form) {
    return form == Form::bytes ? 128 : form == Form::nibbles ? 8 : form == Form::e2m1 ? kE2m1[0] : 0;
}

template <int T, Form F>
void direct_block(const Call& call, int64_t index, CallMemory& memory) {
    const Tokens& tokens = call.tokens;
    Block block = memory.block[0].prepare(*call.weight, *call.rest, index, tokens, offset_of(F));
    alignas(64) int32_t total[T * kChannels];
    alignas(64) float y[T * kChannels] = {};
    int64_t end = ceil_div(call.weight->in_features, call.per_line()), step = call.stretch() / call.per_line();
    Ahead ahead{};
    fetch_branch(call, index + 1);
    if constexpr (F == Form::products) fetch_outliers(call, index + 1);
    else ahead = outliers_ahead(call, index + 1, end);
    for (int64_t s = 0; s < tokens.sums; ++s) {
        int64_t begin = s * step, stop = s + 1 == tokens.sums ? end : begin + step;
        if constexpr (F == Form::products)
            Product::direct_products<T>(call.block_lines(index), tokens.integers, tokens.count * kChunk,
                                        block.sub_scales, total);
        else
            Product::direct<T, F>(call.block_lines(index), begin, stop, tokens.integers, tokens.count * kChunk,
                                  call.largest, ahead, total);
        add_stretch(block, call.weight->groups, tokens, 0, T, s, total, y);
    }
    end_block(call, block, 0, T, y);
}

template <Form F, int T = Product::kDirect>
void direct_blocks(const Call& call, int64_t begin, int64_t end, CallMemory& memory) {
    if constexpr (T > 0) {
        if (call.count != T) return direct_blocks<F, T - 1>(call, begin, end, memory);
        for (int64_t b = begin; b < end; ++b) direct_block<T, F>(call, b, memory);
    }
}

// Calls `compute` with each member and those of its units, of `size` channels, that lie in [begin, end) of all members'.
template <class Compute>
void for_members(Call& call, int64_t size, int64_t begin, int64_t end, const Compute& compute) {
    int64_t start = 0;
    for (int64_t m = 0; m < call.member_count; ++m) {
        call.select(call.members[m], m);
        int64_t units = ceil_div(call.weight->out_features, size);
        int64_t from = larger(begin - start, 0), to = smaller(end - start, units);
        if (from < to) compute(from, to);
        start += units;
    }
}

int64_t count_units(const Call& call, int64_t size) {
    int64_t count = 0;
    for (int64_t m = 0; m < call.member_count; ++m) count += ceil_div(call.members[m].weight.out_features, size);
    return count;
}

void direct_blocks(const Call& call, int64_t begin, int64_t end, CallMemory& memory) {
    switch (call.form()) {
        case Form::bytes: return direct_blocks<Form::bytes>(call, begin, end, memory);
        case Form::products: return direct_blocks<Form::products>(call, begin, end, memory);
        case Form::e2m1: return direct_blocks<Form::e2m1>(call, begin, end, memory);
        default: return direct_blocks<Form::nibbles>(call, begin, end, memory);
    }
}

// Quantizes few tokens into memory of this thread; meanwhile the first weights come, those of block `first` of `call`.
void place_all(Call& call, int64_t first, CallMemory& memory) {
    call.tokens = make_room(memory, call, call.count);
    make_branch_room(memory, call);
    fetch(call.block_lines(first), kFirst);
    fetch_outliers(call, first);
    for (int64_t i = 0; i < call.count; ++i) place(call, i);
}

// Few tokens: every thread quantizes them for itself, which is quicker than to wait for another.
void direct(Call& whole, int64_t grain, ParallelFor parallel_for) {
    auto body = [](int64_t begin, int64_t end, void* context) {
        CallMemory& memory = call_memory();
        Call call = *static_cast<const Call*>(context);
        for_members(call, kChannels, begin, begin + 1, [&](int64_t first, int64_t) { place_all(call, first, memory); });
        for_members(call, kChannels, begin, end,
                    [&](int64_t from, int64_t to) {
                        place_branch(call, 0, call.count, memory);
                        direct_blocks(call, from, to, memory);
                    });
    };
    parallel_for(0, count_units(whole, kChannels), grain, body, &whole);
}

constexpr int64_t kRun = 48;  // tokens whose sums stay in the first cache until they are outputs

// Sums of tokens [t, end) over the inputs of a panel, from `first` on, to their places in `total`, [count][16].
template <Form F, int T = Product::kTile>
void tiles(const Call& call, const Block& block, const uint8_t* panel, int64_t rows, int64_t first, bool add, int64_t t,
           int64_t end, int32_t* total) {
    if constexpr (T > 0) {
        const Tokens& tokens = call.tokens;
        for (; t + T <= end; t += T) {
            const int8_t* x = tokens.integers + t * kChunk;
            int32_t* sums = total + t * kChannels;
            if constexpr (F == Form::products)
                Product::tile_products<T>(panel, rows, x, tokens.count * kChunk, first, block.sub_scales.from_token(t),
                                          add, sums);
            else
                Product::tile<T, F>(panel, rows, x, tokens.count * kChunk, first, call.largest, add, sums);
        }
        if (t < end) tiles<F, T - 1>(call, block, panel, rows, first, add, t, end, total);
    }
}

// What is added to the integers of an unpacked panel.
constexpr int32_t panel_offset_of(Form form) {
    return form == Form::products ? Product::kProductsOffset : offset_of(form);
}

template <Form F>
const uint8_t* unpacked(const Call& call, const Block& block, int64_t index, int64_t begin, int64_t end, uint8_t* panel) {
    const uint8_t* lines = call.block_lines(index);
    if constexpr (F == Form::products) return Product::unpack_products(lines, begin, end, panel, block.sub_scales);
    else return Product::unpack<F>(lines, begin, end, panel);
}

template <Form F>
void tiled_block(const Call& call, int64_t index, CallMemory& memory) {
    const Tokens& tokens = call.tokens;
    Block block = memory.block[0].prepare(*call.weight, *call.rest, index, tokens, panel_offset_of(F));
    block.outlier = memory.block[0].outlier.wide(block.outlier, tokens.rank);
    if (call.rest->branch_rank)
        block.branch = memory.block[0].branch.wide(block.branch, width_of(call.rest->branch_rank).all);
    uint8_t* panel = memory.panel.at_least(Product::kPanel * kChannels);
    int32_t* total = memory.total.at_least(call.count * kChannels);
    float* y = memory.y.at_least(call.count * kChannels);
    const int64_t per = call.per_line(), most = Product::kPanel / (F == Form::bytes ? Product::kPlanes : 1) / per;
    int64_t all = ceil_div(call.weight->in_features, per), step = call.stretch() / per;
    for (int64_t s = 0; s < tokens.sums; ++s) {
        int64_t begin = s * step, stop = s + 1 == tokens.sums ? all : begin + step;
        // Panels of one size: a short one would cost as much besides its products as a whole one.
        int64_t lines = round_up(ceil_div(stop - begin, ceil_div(stop - begin, most)), kChunk / per);
        for (int64_t l = begin; l < stop; l += lines) {
            int64_t end = smaller(stop, l + lines);
            const uint8_t* rows = unpacked<F>(call, block, index, l, end, panel);
            for (int64_t t = 0; t < call.count; t += kRun) {
                int64_t count = smaller(kRun, call.count - t);
                tiles<F>(call, block, rows, (end - l) * per / 4, l * per, l > begin, t, t + count, total);
                if (end < stop) continue;
                float* own = y + t * kChannels;
                if (s == 0) std::memset(own, 0, count * kChannels * sizeof(float));
                add_stretch(block, call.weight->groups, tokens, t, count, s, total + t * kChannels, own);
                if (s + 1 == tokens.sums) end_block(call, block, t, count, own);
            }
        }
    }
}
#ifdef QUAD_AMX
#include "product_amx.h"
#else
constexpr int64_t kUnit = 1;    // blocks of channels that a thread takes at once
constexpr int64_t kTokens = 1;  // the number of tokens is padded to a multiple of this
uint16_t* room_for_outlier16(CallMemory&, const Call&) { return nullptr; }
uint16_t* room_for_branch16(CallMemory&, const Call&) { return nullptr; }
void place_outlier16(const Call&, int64_t) {}
void place_branch16(const Call&, int64_t, int64_t) {}
#endif

template <Form F>
void units(const Call& call, int64_t begin, int64_t end) {
    CallMemory& memory = call_memory();
#ifdef QUAD_AMX
    if (takes_amx(call)) {
        TileSession session;
        for (int64_t u = begin; u < end; ++u) amx_unit<F>(call, u, memory);
        return;
    }
#endif
    int64_t blocks = ceil_div(call.weight->out_features, kChannels);
    for (int64_t b = begin * kUnit; b < smaller(blocks, end * kUnit); ++b) tiled_block<F>(call, b, memory);
}

// Many tokens: they are quantized first, on all threads; then each thread takes channels.
void blocked(Call& call, ParallelFor parallel_for) {
    parallel_for(
        0, call.count, larger(1, 16384 / call.weight->in_features),
        [](int64_t begin, int64_t end, void* context) {
            Call call = *static_cast<const Call*>(context);
            for (int64_t i = begin; i < end; ++i) {
                place(call, i);
                if (call.outlier16) place_outlier16(call, i);
            }
            for (int64_t m = 0; m < call.member_count && call.branch; ++m) {
                call.select(call.members[m], m);
                place_branch(call, begin, end, call_memory());
                if (call.branch16) place_branch16(call, begin, end);
            }
        },
        &call);
    parallel_for(
        0, count_units(call, kUnit * kChannels), 1,
        [](int64_t begin, int64_t end, void* context) {
            Call call = *static_cast<const Call*>(context);
            for_members(call, kUnit * kChannels, begin, end, [&](int64_t from, int64_t to) {
                switch (call.form()) {
                    case Form::bytes: return units<Form::bytes>(call, from, to);
                    case Form::products: return units<Form::products>(call, from, to);
                    case Form::e2m1: return units<Form::e2m1>(call, from, to);
                    default: return units<Form::nibbles>(call, from, to);
                }
            });
        },
        &call);
}

int32_t largest_of(const Integers& x, int64_t width) {
    int8_t low = 0, high = 0;
    for (int64_t i = 0; i < x.tokens * width; ++i) {
        low = x.data[i] < low ? x.data[i] : low;
        high = x.data[i] > high ? x.data[i] : high;
    }
    int32_t largest = 8;
    while (low < -largest || high >= largest) largest *= 2;
    return largest;
}

int32_t largest_of(const Input& input) {
    if (input.largest_sub_scale) return 128;
    if (input.number_format != NumberFormat::integers) return 16;
    return 1 << (input.symmetric ? input.bits - 1 : input.bits);
}

void linear(const Input* input, const Integers* integers, const Member* members, int64_t count,
            ParallelFor parallel_for) {
    int64_t tokens = input ? input->tokens : integers->tokens, width = members->weight.in_features;
    int32_t largest = input ? largest_of(*input) : largest_of(*integers, width);
    int64_t batch = larger(64, smaller(kBatch, Product::kBatchBytes / width / 32 * 32));
    for (int64_t first = 0; first < tokens; first += batch) {
        Call call{};
        call.input = input;
        call.integers = integers;
        call.members = members;
        call.member_count = count;
        call.select(*members, 0);
        call.first = first;
        call.count = smaller(batch, tokens - first);
        call.largest = largest;
        if (call.count <= Product::kDirect) {
            direct(call, larger(1, kBytesPerThread / (call.lines() * kLine * call.count)), parallel_for);
        } else {
            call.tokens = make_room(call_memory(), call, round_up(call.count, kTokens));
            make_branch_room(call_memory(), call);
            call.outlier16 = room_for_outlier16(call_memory(), call);
            call.branch16 = room_for_branch16(call_memory(), call);
            blocked(call, parallel_for);
        }
    }
}

void quantize(const Input& input, void* outlier, int8_t* integers, float* scale, ParallelFor parallel_for) {
    struct Context {
        const Input& input;
        void* outlier;
        int8_t* integers;
        float* scale;
    } context{input, outlier, integers, scale};
    parallel_for(
        0, input.tokens, larger(1, 16384 / input.width),
        [](int64_t begin, int64_t end, void* pointer) {
            const Context& c = *static_cast<const Context*>(pointer);
            int64_t rank = c.input.rank(), width = c.input.residual();
            Buffer<float>& wide = call_memory().outlier;
            for (int64_t t = begin; t < end; ++t) {
                float* row = wide.at_least(larger(1, rank));
                quantize_token(c.input, t, row, c.integers + t * width, c.scale + t * c.input.scales());
                if (rank)
                    store_row(const_cast<void*>(element(c.outlier, c.input.dtype, t * rank)), c.input.dtype, rank, row);
            }
        },
        &context);
}

void hadamard_rows(const void* data, void* output, Dtype dtype, int64_t tokens, const Hadamard& plan,
                   ParallelFor parallel_for) {
    struct Context {
        const void* data;
        void* output;
        Dtype dtype;
        const Hadamard& plan;
    } context{data, output, dtype, plan};
    parallel_for(
        0, tokens, larger(1, 16384 / plan.size),
        [](int64_t begin, int64_t end, void* pointer) {
            const Context& c = *static_cast<const Context*>(pointer);
            QuantizeMemory& memory = quantize_memory();
            int64_t size = c.plan.size;
            float* row = memory.row.at_least(size);
            for (int64_t t = begin; t < end; ++t) {
                load_row(element(c.data, c.dtype, t * size), c.dtype, size, row);
                transform(row, c.plan, memory.tables);
                store_row(const_cast<void*>(element(c.output, c.dtype, t * size)), c.dtype, size, row);
            }
        },
        &context);
}

}  // namespace
