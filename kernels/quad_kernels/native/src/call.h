// What the kernels are called with: plain data, no PyTorch. Every instruction set implements the same `Kernels` table.
#pragma once

#include <cstdint>

namespace quad {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// A transform of `size` coordinates in blocks of `block`, as `quad_kernels.hadamard.construct` plans it.
struct Hadamard {
    int64_t size;
    int64_t block;
    int32_t factor_count;
    int32_t order[8];
    // Of a factor that is no power of two: byte [column][i] holds the signs of the rows 4 i to 4 i + 3 (bit 0 first, set
    // for -1); null for a power of two.
    const uint8_t* signs[8];
};

// How the tokens of an input become outliers and integers; see InputSplit and InputQuantization in formats.py.
struct Input {
    const void* data;  // [tokens, width]
    Dtype dtype;
    int64_t tokens;
    int64_t width;
    int64_t outliers;  // per block of coordinates
    int64_t block;
    bool keep_width;
    const Hadamard* hadamard;  // null for none
    int32_t bits;
    float clip_ratio;
    int64_t groups;  // scales per token

    int64_t rank() const { return outliers * (width / block); }
    int64_t residual() const { return keep_width ? width : width - rank(); }
};

// A weight in layout "lines" with its scales; see layout.py.
struct Weight {
    const uint8_t* lines;
    const void* scale;  // [out, groups]
    Dtype scale_dtype;
    const int8_t* zero_point;  // [out, groups], or null
    int64_t in_features;
    int64_t out_features;
    int64_t groups;
    bool wide;  // one byte per integer instead of half a byte
};

// Inputs that are integers already, [tokens, in], with scales [tokens, groups].
struct Integers {
    const int8_t* data;
    const float* scale;
    int64_t tokens;
    int64_t groups;
};

// What is added to the integer product.
struct Rest {
    const void* outlier;  // [tokens, rank], or null: then they come from the input
    Dtype outlier_dtype;
    const void* outlier_weight;  // [out, rank], or null
    Dtype outlier_weight_dtype;
    int64_t rank;
    const void* bias;  // [out], or null
    Dtype bias_dtype;
};

struct Output {
    void* data;  // [tokens, out]
    Dtype dtype;
};

using Body = void (*)(int64_t begin, int64_t end, void* context);
// Runs `body` on parts of [begin, end), each of at least `grain` items, on the threads of PyTorch.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// An 8-bit table: rows of integers with an offset of 128, four to a word, and one scale per row.
struct Table {
    const uint8_t* integers;  // [rows, stride]
    int64_t stride;
    const void* scale;  // [rows]
    Dtype scale_dtype;
    int64_t rows;
    int64_t columns;
};

struct Kernels {
    const char* name;
    // y = residual of x, quantized, times the weight, plus the rest. Either `input` or `integers` is given.
    void (*linear)(const Input* input, const Integers* integers, const Weight& weight, const Rest& rest,
                   const Output& output, ParallelFor parallel_for);
    // Writes outliers [tokens, rank] in the dtype of the input, integers [tokens, residual] and scales [tokens, groups].
    void (*quantize)(const Input& input, void* outlier, int8_t* integers, float* scale, ParallelFor parallel_for);
    // Transforms rows [tokens, plan.size] of `data` into `output`, both of `dtype`.
    void (*hadamard)(const void* data, void* output, Dtype dtype, int64_t tokens, const Hadamard& plan,
                     ParallelFor parallel_for);
    // y = x table^T, the sum over columns scaled by the row's scale; x and y are [tokens, ...] of `dtype`.
    void (*head)(const void* x, void* y, Dtype dtype, int64_t tokens, const Table& table, ParallelFor parallel_for);
};

const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();

}  // namespace quad
