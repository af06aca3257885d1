// One token becomes outliers and integers: split, Hadamard, absolute maximum, rounding, in memory that fits the cache.
#pragma once

#include "hadamard.h"

namespace {

using quad::Input;
using quad::NumberFormat;

// Quantized tokens as the products read them. Inputs come in chunks of 64, each with all its tokens one after the other:
// a chunk of 16 tokens is a tile of AMX, and no two tokens lie a power of two apart in memory. Padding holds zeros.
struct Tokens {
    int8_t* integers;   // [chunks][count][64]
    float* scale;       // [count][scales]
    int32_t* sum;       // [count][sums], of the integers of a stretch that has one scale on either side
    int16_t* part;      // [count][parts], -4 times the sum of the integers of a part that a sub-scale multiplies
    float* outlier;     // [count][rank]
    int64_t count;      // with padding
    int64_t scales;
    int64_t sums;
    int64_t parts;      // 0 without sub-scales
    int64_t rank;       // with padding: a multiple of 32
};

constexpr int64_t kChunk = 64;
constexpr int64_t kRank = 32;  // outlier columns at a time

struct QuantizeMemory {
    Buffer<float> row;
    Buffer<float> tables;
    Buffer<float> steps;
    Buffer<int8_t> integers;
};

QuantizeMemory& quantize_memory() {
    thread_local QuantizeMemory memory;
    return memory;
}

// The largest magnitude. As integers: a NaN is larger than every number and is not lost.
float largest_magnitude(const float* x, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    float value;
    std::memcpy(&value, &largest, 4);
    return value;
}

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even

// What a group is rounded to: multiples of `scale` from `low` to `high`.
struct Grid {
    float scale;
    float low;
    float high;
};

constexpr float kLargestE2m1 = 12;  // doubled

// Sixteen numbers over `scale`, and the nearest doubled 4-bit floating-point numbers.
struct E2m1 {
    Vector16 quotient;
    Vector16 number;

    E2m1(const float* x, float scale)
        : quotient(Vector16::load(x) / Vector16::all(scale)),
          number(quotient.between(Vector16::all(-kLargestE2m1), Vector16::all(kLargestE2m1)).nearest_e2m1()) {}
};

// Groups of such numbers are multiples of 16.
void round_to_e2m1(const float* x, int64_t count, float scale, int8_t* integers) {
    float lanes[16];
    for (int64_t i = 0; i < count; i += 16) {
        E2m1(x + i, scale).number.store(lanes);
        for (int64_t k = 0; k < 16; ++k) integers[i + k] = int8_t(int32_t(lanes[k]));
    }
}

// `rounding_cost` in quantize_activations/reference.py: the sum is exact.
float e2m1_cost(const float* x, int64_t count, float scale) {
    const Vector16 most = Vector16::all(4);
    Vector16 sum = Vector16::zero();
    for (int64_t i = 0; i < count; i += 16) {
        E2m1 rounded(x + i, scale);
        Vector16 error = (rounded.quotient - rounded.number).between(Vector16::zero() - most, most);
        error = (error * Vector16::all(32)).nearest();
        sum = sum.plus_product(error, error);
    }
    return sum.total() * scale * scale;
}

void round_to_grid(const float* x, int64_t count, const Grid& grid, int8_t* integers) {
    const float scale = grid.scale, low = grid.low, high = grid.high;
    for (int64_t i = 0; i < count; ++i) {
        // A division, as in the reference: at clip ratio 1 the largest value is a tie.
        float q = x[i] / scale;
        q = q < low ? low : q;
        q = q > high ? high : q;
        q = (q + kMagic) - kMagic;
        integers[i] = int8_t(int32_t(q));
    }
}

// Moves the outliers to `outlier`, float32, and leaves the residual in `row`.
void split_row(const Input& input, float* row, float* outlier) {
    if (!input.outliers) return;
    int64_t kept = input.block - input.outliers, blocks = input.width / input.block;
    for (int64_t b = 0; b < blocks; ++b) {
        float* block = row + b * input.block;
        std::memcpy(outlier + b * input.outliers, block, input.outliers * sizeof(float));
        if (input.keep_width) std::memset(block, 0, input.outliers * sizeof(float));
        else std::memmove(row + b * kept, block + input.outliers, kept * sizeof(float));
    }
}

float normal(float scale) { return scale < 1.17549435e-38f ? 0.0f : scale; }

// False for a token of zeros, and for one with a NaN or an infinity, whose scale makes the output NaN.
bool usable(float scale) { return scale > 0 && scale <= 3.402823466e38f; }

// The scale of doubled 4-bit floating-point numbers for the largest magnitude of a group: `input_scale` in float4.py.
float e2m1_scale(float largest, NumberFormat format, float top = kLargestE2m1) {
    bool powers = format == NumberFormat::mxfp4;
    float wanted = powers ? largest : largest / top;
    uint32_t bits;
    std::memcpy(&bits, &wanted, 4);
    bits = powers ? (bits + (1u << 21)) & 0x7F800000u : (bits + 0x7FFFFu + ((bits >> 20) & 1)) & ~0xFFFFFu;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return normal(powers ? scale * 0.125f : scale);
}

// The step of a symmetric grid.
float step(const float* x, int64_t count, const Input& input) {
    return normal(largest_magnitude(x, count) * input.clip_ratio / ((float(1 << input.bits) - 1) / 2));
}

Grid symmetric_grid(float scale, int32_t bits) {
    const float half = float(1 << (bits - 1));
    return {scale, -half, half - 1};
}

// From the least number to the largest one, 0 between them; the integers have the zero point taken off.
Grid asymmetric_grid(const float* x, int64_t count, const Input& input) {
    const float levels = float(1 << input.bits) - 1;
    float magnitude = largest_magnitude(x, count), least = 0, most = 0;
    if (!(magnitude <= 3.402823466e38f)) return {magnitude, 0, 0};
    for (int64_t i = 0; i < count; ++i) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
    least *= input.clip_ratio;
    most *= input.clip_ratio;
    float scale = normal(most / levels - least / levels);  // their difference could be infinite
    if (!usable(scale)) return {scale, 0, 0};
    float zero_point = (-least / scale + kMagic) - kMagic;
    zero_point = zero_point > levels ? levels : zero_point;
    return {scale, -zero_point, levels - zero_point};
}

// Quantizes groups of `size` numbers to multiples of one scale, integers times the sub-scale of their group.
void quantize_groups(const Input& input, const float* row, int64_t size, float* steps, int8_t* integers, float* scale) {
    const float most = float(input.largest_sub_scale);
    float common = normal(largest_magnitude(steps, input.groups) / most);
    *scale = common;
    if (!usable(common)) {
        std::memset(integers, 0, size * input.groups);
        return;
    }
    for (int64_t g = 0; g < input.groups; ++g, integers += size) {
        float factor = (steps[g] / common + kMagic) - kMagic;
        factor = factor < 1.0f ? 1.0f : factor;
        factor = factor > most ? most : factor;
        round_to_grid(row + g * size, size, symmetric_grid(common * factor, input.bits), integers);
        int32_t whole = int32_t(factor);
        for (int64_t i = 0; i < size; ++i) integers[i] = int8_t(integers[i] * whole);
    }
}

// Quantizes token `t` of the input: outliers [rank], float32; integers [residual]; scale [scales].
void quantize_token(const Input& input, int64_t t, float* outlier, int8_t* integers, float* scale) {
    QuantizeMemory& memory = quantize_memory();
    float* row = memory.row.at_least(input.width);
    load_row(element(input.data, input.dtype, t * input.width), input.dtype, input.width, row);
    split_row(input, row, outlier);
    int64_t width = input.residual();
    if (input.hadamard) {
        transform(row, *input.hadamard, memory.tables);
        round_row(row, input.dtype, width);
    }
    int64_t size = width / input.groups;
    if (input.largest_sub_scale) {
        float* steps = memory.steps.at_least(input.groups);
        for (int64_t g = 0; g < input.groups; ++g) steps[g] = step(row + g * size, size, input);
        return quantize_groups(input, row, size, steps, integers, scale);
    }
    if (input.number_format != NumberFormat::integers) {
        for (int64_t g = 0; g < input.groups; ++g) {
            const float* group = row + g * size;
            float largest = largest_magnitude(group, size) * input.clip_ratio;
            scale[g] = e2m1_scale(largest, input.number_format);
            if (input.number_format == NumberFormat::four_over_six && usable(scale[g])) {
                float four = e2m1_scale(largest, input.number_format, 8);
                if (usable(four) && e2m1_cost(group, size, four) < e2m1_cost(group, size, scale[g])) scale[g] = four;
            }
            if (usable(scale[g])) round_to_e2m1(group, size, scale[g], integers + g * size);
            else std::memset(integers + g * size, 0, size);
        }
        return;
    }
    for (int64_t g = 0; g < input.groups; ++g) {
        const float* group = row + g * size;
        Grid grid = input.symmetric ? symmetric_grid(step(group, size, input), input.bits)
                                    : asymmetric_grid(group, size, input);
        scale[g] = grid.scale;
        if (usable(grid.scale)) round_to_grid(group, size, grid, integers + g * size);
        else std::memset(integers + g * size, 0, size);
    }
}

// Copies one token's integers to its place in `tokens`, fills up with zeros and adds them up.
void place_token(const Tokens& tokens, int64_t t, const int8_t* integers, int64_t width) {
    for (int64_t k = 0; k < width; k += kChunk) {
        int8_t* line = tokens.integers + k / kChunk * tokens.count * kChunk + t * kChunk;
        int64_t count = smaller(kChunk, width - k);
        std::memcpy(line, integers + k, count);
        std::memset(line + count, 0, kChunk - count);
    }
    int64_t size = width / tokens.sums;
    for (int64_t s = 0; s < tokens.sums; ++s) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += integers[s * size + i];
        tokens.sum[t * tokens.sums + s] = sum;
    }
    if (!tokens.parts) return;
    size = width / tokens.parts;
    for (int64_t p = 0; p < tokens.parts; ++p) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += integers[p * size + i];
        tokens.part[t * tokens.parts + p] = int16_t(-4 * sum);
    }
}

void quantize_into(const Input& input, int64_t t, const Tokens& tokens, int64_t place) {
    int64_t rank = input.rank();
    int8_t* integers = quantize_memory().integers.at_least(input.residual());
    float* outlier = tokens.outlier + place * tokens.rank;
    quantize_token(input, t, outlier, integers, tokens.scale + place * tokens.scales);
    if (rank) std::memset(outlier + rank, 0, (tokens.rank - rank) * sizeof(float));
    place_token(tokens, place, integers, input.residual());
}

}  // namespace
