// What 16 output channels bring besides their integers, in the order in which the products meet it; and the arithmetic
// that turns exact integer sums into outputs. Every path and every instruction set does it in this order:
//   y = sum over groups g, in order, of fma((sum_g - offset_g) * x_scale_g, weight_scale_g, y)
//   y = y + outlier product + product of the low-rank branch + bias, rounded once to the dtype of the output
// where these products add, for each 32 columns in order, (sum over even columns) + (sum over odd columns), each by fma
// in order. That is how AMX multiplies bfloat16, so a token's output never depends on the batch it is in.
#pragma once

#include "quantize.h"

namespace {

using quad::Output;
using quad::Rest;
using quad::Weight;

constexpr int64_t kChannels = 16;

// Writes 16 rows of 4 numbers of 32 bits, `stride` bytes apart, column by column: [4][16].
void transpose4(const char* rows, int64_t stride, uint32_t* columns) {
    auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride)); };
#ifdef __AVX512F__
    __m512i part[4];  // part i is rows i, i + 4, i + 8 and i + 12
    for (int i = 0; i < 4; ++i) {
        part[i] = _mm512_castsi128_si512(piece(i));
        part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x00F0, piece(i + 4));
        part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x0F00, piece(i + 8));
        part[i] = _mm512_mask_broadcast_i32x4(part[i], 0xF000, piece(i + 12));
    }
    __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpackhi_epi32(part[0], part[1]);
    __m512i c = _mm512_unpacklo_epi32(part[2], part[3]), d = _mm512_unpackhi_epi32(part[2], part[3]);
    _mm512_storeu_si512(columns, _mm512_unpacklo_epi64(a, c));
    _mm512_storeu_si512(columns + 16, _mm512_unpackhi_epi64(a, c));
    _mm512_storeu_si512(columns + 32, _mm512_unpacklo_epi64(b, d));
    _mm512_storeu_si512(columns + 48, _mm512_unpackhi_epi64(b, d));
#else
    for (int first = 0; first < 16; first += 8) {
        __m256i part[4];  // part i is rows i and i + 4 of eight
        for (int i = 0; i < 4; ++i)
            part[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(first + i)), piece(first + i + 4), 1);
        __m256i a = _mm256_unpacklo_epi32(part[0], part[1]), b = _mm256_unpackhi_epi32(part[0], part[1]);
        __m256i c = _mm256_unpacklo_epi32(part[2], part[3]), d = _mm256_unpackhi_epi32(part[2], part[3]);
        auto store = [&](int i, __m256i column) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + 16 * i + first), column);
        };
        store(0, _mm256_unpacklo_epi64(a, c));
        store(1, _mm256_unpackhi_epi64(a, c));
        store(2, _mm256_unpacklo_epi64(b, d));
        store(3, _mm256_unpackhi_epi64(b, d));
    }
#endif
}

// Tokens that share what is read of a panel, as many as there are registers for; and whether a panel that many tokens
// meet is taken apart for them.
#ifdef __AVX512F__
constexpr int kPanelTile = 6, kWideTile = 6;
constexpr bool kWide = false;
#else
constexpr int kPanelTile = 2, kWideTile = 3;
constexpr bool kWide = true;
#endif

// Sixteen rows, column by column, such as the outlier weights of 16 channels: pairs of bfloat16 as they are,
// [columns / 2][16][2], or float32, [columns][16].
struct Panel {
    const uint32_t* pairs;
    const float* values;

    // The weights of columns 2 j and 2 j + 1.
    template <bool Pairs>
    void columns(int64_t j, Vector16& even, Vector16& odd) const {
        if constexpr (Pairs) {
            const uint32_t* p = pairs + j * kChannels;
#ifdef __AVX512F__
            __m512i both = _mm512_loadu_si512(p);
            even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))));
#else
            const __m256i mask = _mm256_set1_epi32(int(0xFFFF0000));
            __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8));
            even = {_mm256_castsi256_ps(_mm256_slli_epi32(left, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(right, 16))};
            odd = {_mm256_castsi256_ps(_mm256_and_si256(left, mask)), _mm256_castsi256_ps(_mm256_and_si256(right, mask))};
#endif
        } else {
            even = Vector16::load(values + 2 * j * kChannels);
            odd = Vector16::load(values + (2 * j + 1) * kChannels);
        }
    }
};

struct PanelMemory {
    // Returns the panel of `count` <= 16 rows of `width` columns, filled up with zeros to 16 rows of `padded`.
    Panel of(const void* rows, Dtype dtype, int64_t count, int64_t width, int64_t padded) {
        if (dtype == Dtype::bfloat16) return {of_bfloat16(static_cast<const uint16_t*>(rows), count, width, padded), nullptr};
        return {nullptr, of_others(rows, dtype, count, width, padded)};
    }

    // The same panel in float32, where many tokens are multiplied by it and pairs would be taken apart for each few.
    Panel wide(const Panel& panel, int64_t columns) {
        if (!panel.pairs || !kWide) return panel;
        float* values = values_.at_least(columns * kChannels);
        for (int64_t j = 0; j < columns / 2; ++j) {
            Vector16 even, odd;
            panel.columns<true>(j, even, odd);
            even.store(values + 2 * j * kChannels);
            odd.store(values + (2 * j + 1) * kChannels);
        }
        return {nullptr, values};
    }

  private:
    const uint32_t* of_bfloat16(const uint16_t* rows, int64_t count, int64_t width, int64_t padded) {
        uint32_t* p = pairs_.at_least(padded / 2 * kChannels);
        int64_t whole = count == kChannels ? width / 8 * 8 : 0;
        for (int64_t k = 0; k < whole; k += 8)
            transpose4(reinterpret_cast<const char*>(rows + k), width * 2, p + k / 2 * kChannels);
        std::memset(p + whole / 2 * kChannels, 0, (padded - whole) / 2 * kChannels * sizeof(uint32_t));
        for (int64_t k = whole; k < width; ++k)
            for (int64_t c = 0; c < count; ++c)
                p[k / 2 * kChannels + c] |= uint32_t(rows[c * width + k]) << (k % 2 * 16);
        return p;
    }

    const float* of_others(const void* rows, Dtype dtype, int64_t count, int64_t width, int64_t padded) {
        float* values = values_.at_least(padded * kChannels);
        float* row = row_.at_least(padded);
        for (int64_t c = 0; c < kChannels; ++c) {
            std::memset(row, 0, padded * sizeof(float));
            if (c < count) load_row(element(rows, dtype, c * width), dtype, width, row);
            for (int64_t k = 0; k < padded; ++k) values[k * kChannels + c] = row[k];
        }
        return values;
    }

    Buffer<uint32_t> pairs_;
    Buffer<float> values_, row_;
};

struct Block {
    int64_t first;      // channel
    int64_t channels;   // 16, fewer in the last block
    SubScales sub_scales;   // unless that of the weight is null
    const float* scale;     // [groups][16]
    const int32_t* offset;  // [groups][16]: what was added to the integers, to be taken off as often as the inputs' sum
    Panel outlier;
    Panel branch;       // of A
    const float* bias;  // [16]
};

struct BlockMemory {
    Buffer<float> scale, bias;
    Buffer<int32_t> offset;
    Buffer<int8_t> sub_scale;
    PanelMemory outlier, branch;

    // `added` is what the products find added to the weight's integers.
    Block prepare(const Weight& weight, const Rest& rest, int64_t index, const Tokens& tokens, int32_t added) {
        Block block;  // a few fields for a few lines: to clear it first would be noticed
        block.first = index * kChannels;
        block.channels = smaller(kChannels, weight.out_features - block.first);
        block.scale = scales(weight, block);
        block.offset = offsets(weight, block, added);
        block.outlier = {nullptr, nullptr};
        if (weight.sub_scale) block.sub_scales = sub_scales(weight, block, tokens);
        if (rest.outlier_weight) {
            Dtype dtype = rest.outlier_weight_dtype;
            const void* rows = element(rest.outlier_weight, dtype, block.first * rest.rank);
            block.outlier = outlier.of(rows, dtype, block.channels, rest.rank, tokens.rank);
        }
        if (rest.branch_rank) {
            const void* rows = element(rest.up, rest.branch_dtype, block.first * rest.branch_rank);
            block.branch = branch.of(rows, rest.branch_dtype, block.channels, rest.branch_rank,
                                     round_up(rest.branch_rank, kRank));
        }
        float* b = bias.at_least(kChannels);
        std::memset(b, 0, kChannels * sizeof(float));
        if (rest.bias)
            load_row(element(rest.bias, rest.bias_dtype, block.first), rest.bias_dtype, block.channels, b);
        block.bias = b;
        return block;
    }

  private:
    const float* scales(const Weight& weight, const Block& block) {
        float* s = scale.at_least(weight.groups * kChannels);
        if (weight.groups == 1 && block.channels == kChannels) {
            load_row(element(weight.scale, weight.scale_dtype, block.first), weight.scale_dtype, kChannels, s);
            return s;
        }
        for (int64_t g = 0; g < weight.groups; ++g)
            for (int64_t c = 0; c < kChannels; ++c)
                s[g * kChannels + c] =
                    c < block.channels
                        ? load_one(weight.scale, weight.scale_dtype, (block.first + c) * weight.groups + g)
                        : 0.0f;
        return s;
    }

    // The last block may have fewer channels: its sub-scales are copied to a place where 16 may be read.
    SubScales sub_scales(const Weight& weight, const Block& block, const Tokens& tokens) {
        const int8_t* values = weight.sub_scale + block.first;
        int64_t stride = weight.out_features;
        if (block.channels < kChannels) {
            int8_t* copy = sub_scale.at_least(weight.sub_groups * kChannels);
            std::memset(copy, 0, weight.sub_groups * kChannels);
            for (int64_t g = 0; g < weight.sub_groups; ++g)
                std::memcpy(copy + g * kChannels, values + g * stride, block.channels);
            values = copy;
            stride = kChannels;
        }
        return {values, stride, weight.in_features / weight.sub_groups, weight.in_features / tokens.parts,
                tokens.parts, tokens.part};
    }

    const int32_t* offsets(const Weight& weight, const Block& block, int32_t added) {
        int32_t* o = offset.at_least(weight.groups * kChannels);
        for (int64_t i = 0; i < weight.groups * kChannels; ++i) o[i] = added;
        if (weight.zero_point)
            for (int64_t g = 0; g < weight.groups; ++g)
                for (int64_t c = 0; c < block.channels; ++c)
                    o[g * kChannels + c] += weight.zero_point[(block.first + c) * weight.groups + g];
        return o;
    }
};

// Columns in memory, a multiple of 32, and those that are not all padding: the zeros behind them would change no sum.
struct Width {
    int64_t all;
    int64_t used;
};

Width width_of(int64_t rank) { return {round_up(rank, kRank), rank}; }

// Adds the products of T tokens `x`, [T][columns], and a panel's rows to `y`, [T][16].
template <int T, bool Pairs>
void add_tile(const Panel& panel, const float* x, Width columns, float* y) {
    Vector16 sum[T];
    for (int t = 0; t < T; ++t) sum[t] = Vector16::zero();
    for (int64_t start = 0; start < columns.used; start += kRank) {
        Vector16 even[T], odd[T];
        for (int t = 0; t < T; ++t) even[t] = odd[t] = Vector16::zero();
        int64_t end = smaller(start + kRank, round_up(columns.used, 2));
        for (int64_t j = start / 2; j < end / 2; ++j) {
            Vector16 first, second;
            panel.columns<Pairs>(j, first, second);
            for (int t = 0; t < T; ++t) {
                even[t] = even[t].plus_product(Vector16::all(x[t * columns.all + 2 * j]), first);
                odd[t] = odd[t].plus_product(Vector16::all(x[t * columns.all + 2 * j + 1]), second);
            }
        }
        for (int t = 0; t < T; ++t) sum[t] = sum[t] + (even[t] + odd[t]);
    }
    for (int t = 0; t < T; ++t) (Vector16::load(y + 16 * t) + sum[t]).store(y + 16 * t);
}

template <bool Pairs, int T = Pairs ? kPanelTile : kWideTile>
void add_tiles(const Panel& panel, const float* x, Width columns, int64_t count, float* y) {
    if constexpr (T > 0) {
        for (; count >= T; count -= T, x += T * columns.all, y += 16 * T) add_tile<T, Pairs>(panel, x, columns, y);
        if (count) add_tiles<Pairs, T - 1>(panel, x, columns, count, y);
    }
}

// Adds the products of `count` tokens `x`, [count][columns], and a panel's rows to `y`, [count][16].
void add_products(const Panel& panel, const float* x, Width columns, int64_t count, float* y) {
    if (panel.pairs) add_tiles<true>(panel, x, columns, count, y);
    else add_tiles<false>(panel, x, columns, count, y);
}

// Adds the exact sums [count][16] of stretch g, scaled, to y [count][16]; the tokens begin at `t`.
void add_stretch(const Block& block, int64_t weight_groups, const Tokens& tokens, int64_t t, int64_t count, int64_t g,
                 const int32_t* total, float* y) {
    int64_t weight_g = g * weight_groups / tokens.sums, x_g = g * tokens.scales / tokens.sums;
    const int32_t* offset = block.offset + weight_g * kChannels;
    Vector16 scale = Vector16::load(block.scale + weight_g * kChannels);
    for (int64_t i = 0; i < count; ++i) {
        uint32_t sum = uint32_t(tokens.sum[(t + i) * tokens.sums + g]);
        int32_t exact[kChannels];
        for (int64_t c = 0; c < kChannels; ++c)
            exact[c] = int32_t(uint32_t(total[i * kChannels + c]) - uint32_t(offset[c]) * sum);
        Vector16 x_scale = Vector16::all(tokens.scale[(t + i) * tokens.scales + x_g]);
        Vector16::load(y + i * kChannels).plus_product(Vector16::of(exact) * x_scale, scale).store(y + i * kChannels);
    }
}

// Adds the bias and stores y [count][16] as the block's columns of the output, from token `t` on.
void finish(const Block& block, const Output& output, int64_t width, int64_t t, int64_t count, float* y) {
    Vector16 bias = Vector16::load(block.bias);
    bool whole = block.channels == kChannels;
    for (int64_t i = 0; i < count; ++i) {
        Vector16 sum = Vector16::load(y + i * kChannels) + bias;
        void* target = const_cast<void*>(element(output.data, output.dtype, (t + i) * width + block.first));
        if (whole && output.dtype == Dtype::bfloat16) {
            sum.store_bfloat16(static_cast<uint16_t*>(target));
        } else if (whole && output.dtype == Dtype::float32) {
            sum.store(static_cast<float*>(target));
        } else {
            float row[kChannels];
            sum.store(row);
            store_row(target, output.dtype, block.channels, row);
        }
    }
}

}  // namespace
