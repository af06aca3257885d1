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

// What inputs are rounded to; see float4.py. The numbers are those of InputQuantization.kernel_format.
enum class NumberFormat : int32_t { integers, nvfp4, mxfp4, four_over_six };

// How a weight's integers lie in memory: half a byte each, a byte each, or half a byte with the code of a doubled 4-bit
// floating-point number.
enum class Stored : int32_t { nibbles, bytes, e2m1 };

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
    int64_t groups;             // per token
    int32_t largest_sub_scale;  // of a group, where a token has one scale; 0 where a group has
    bool symmetric;             // false: the integers are those of an unsigned grid less its zero point
    NumberFormat number_format;

    // Inlined everywhere: a copy that the linker shares would be compiled for one instruction set.
    __attribute__((always_inline)) int64_t rank() const { return outliers * (width / block); }
    __attribute__((always_inline)) int64_t residual() const { return keep_width ? width : width - rank(); }
    __attribute__((always_inline)) int64_t scales() const { return largest_sub_scale ? 1 : groups; }
};

// A weight in layout lines4, lines8 or lines_e2m1 with its scales; see lines.py.
struct Weight {
    const uint8_t* lines;
    const void* scale;  // [out, groups]
    Dtype scale_dtype;
    const int8_t* zero_point;  // [out, groups], or null
    int64_t in_features;
    int64_t out_features;
    int64_t groups;  // of scales
    Stored stored;
    const int8_t* sub_scale;  // [sub_groups, out], or null
    int64_t sub_groups;
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
    // The low-rank branch: `up` times (`down` times the input as it comes, rounded to its dtype); null for none.
    const void* down;  // [branch_rank, width]
    const void* up;    // [out, branch_rank]
    Dtype branch_dtype;
    int64_t branch_rank;
};

struct Output {
    void* data;  // [tokens, out]
    Dtype dtype;
};

// One weight of several that share an input, and where its output goes.
struct Member {
    Weight weight;
    Rest rest;
    Output output;
};

using Body = void (*)(int64_t begin, int64_t end, void* context);
// Runs `body` on parts of [begin, end), each of at least `grain` items, on the threads of PyTorch.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// The rows of a head: 8-bit integers with an offset of 128 and one scale per row, or bfloat16 without scales.
struct Table {
    const uint8_t* rows_data;  // [rows, stride], bytes
    int64_t stride;
    bool bytes;         // false for bfloat16
    const void* scale;  // [rows], or null
    Dtype scale_dtype;
    int64_t rows;
    int64_t columns;
};

// One new token of each sequence, which looks at the positions of a cache.
struct Attention {
    const void* query;  // [batch, heads, head_dim]
    void* output;       // likewise
    Dtype dtype;        // of everything here
    int64_t batch;
    int64_t heads;
    int64_t head_dim;
    const void* keys;    // [batch, cached_heads, capacity, head_dim]
    const void* values;  // likewise
    int64_t cached_heads;
    int64_t capacity;
    int64_t positions;    // those that are filled
    const uint8_t* mask;  // [batch, positions], 0 where nobody may look; or null
    float scale;
};

// Heads of some positions; how far apart in elements their sequences, heads and positions lie.
struct Heads {
    const void* data;
    int64_t sequence;
    int64_t head;
    int64_t position;
};

// Which positions of the keys those of the queries see: bytes, 0 for no.
struct Mask {
    const uint8_t* data;         // null where query i sees the keys up to i
    int64_t sequence, position;  // bytes from one sequence, and one query, to the next
};

// The attention of several positions of each sequence.
struct Prompt {
    Heads query, keys, values;  // keys and values of `cached_heads`
    Mask mask;
    void* output;  // [batch, positions, heads, head_dim]
    Dtype dtype;   // of everything here
    int64_t batch;
    int64_t positions;  // of the queries
    int64_t key_count;  // positions of the keys
    int64_t heads;
    int64_t cached_heads;
    int64_t head_dim;
    float scale;
};

// Linears that share an input, which is where the call says: `input` has no data, the members no output.
struct Group {
    Input input;
    const Member* members;
    int64_t count;

    __attribute__((always_inline)) int64_t width(int64_t member) const { return members[member].weight.out_features; }
};

// A decoder block for new tokens. Weights of norms are of the dtype of the hidden states, as is everything in a cache.
struct DecodeBlock {
    const void* norm_in;   // [width], before the attention
    const void* norm_out;  // [width], before the MLP
    const void* head_norms[2];  // [head_dim] of queries and keys, or null
    Group qkv, output, gate_up, down;
    void* keys;    // [tokens, cached_heads, capacity, head_dim]
    void* values;  // likewise
    int64_t capacity;
};

// All blocks of a decoder for one new token of each sequence.
struct Decode {
    const DecodeBlock* blocks;
    int64_t block_count;
    const void* x;  // [tokens, width]
    void* y;        // likewise
    Dtype dtype;
    int64_t tokens;
    int64_t width;
    int64_t heads;
    int64_t cached_heads;
    int64_t head_dim;
    int64_t position;     // of the new tokens in the caches
    const uint8_t* mask;  // [tokens, position + 1], 0 where nobody may look; or null
    const void* cosine;   // [angles, head_dim]; token t has row t % angles
    const void* sine;
    int64_t angles;
    float eps;
    float scale;
    int64_t threads;
};

// Columns of a weight, [count, channels], that become integers in their order; see `quad_kernels.round_columns` and
// `quad_kernels.descend_columns`.
struct Columns {
    const float* values;        // the weights, or the gradient
    const float* coefficients;  // [count, count], what a column does to those behind it
    const float* scale;
    const float* second;  // zero points, or inverse steps
    const float* start;   // integers to start from, or null
    float* integers;      // results
    float* change;        // errors, or changes of the values
    int64_t count;
    int64_t channels;
    float low;
    float high;
    bool e2m1;  // rounded to doubled 4-bit floating-point numbers
};

// A weight, [rows, groups * group_size], and scales to round it with, [count, rows, groups]; see
// `quad_kernels.rounding_errors`.
struct Trials {
    const float* weight;
    const float* cost;  // [groups * group_size]
    const float* scale;
    const float* zero_point;
    float* errors;  // results, [count, rows, groups]
    int64_t count;
    int64_t rows;
    int64_t groups;
    int64_t group_size;
    float low;
    float high;
    bool e2m1;
};

struct Kernels {
    const char* name;
    // y = residual of x, quantized, times the weight, plus the rest, for each member. Either `input` or `integers` is
    // given. Members have the same input width, groups, rank and dtype of outlier weights; branches need an `input`.
    void (*linear)(const Input* input, const Integers* integers, const Member* members, int64_t count,
                   ParallelFor parallel_for);
    // Writes outliers [tokens, rank] in the dtype of the input, integers [tokens, residual] and scales [tokens, scales].
    void (*quantize)(const Input& input, void* outlier, int8_t* integers, float* scale, ParallelFor parallel_for);
    // Transforms rows [tokens, plan.size] of `data` into `output`, both of `dtype`.
    void (*hadamard)(const void* data, void* output, Dtype dtype, int64_t tokens, const Hadamard& plan,
                     ParallelFor parallel_for);
    // y = x table^T, the sum over columns times the row's scale; x and y are [tokens, ...] of `dtype`.
    void (*head)(const void* x, void* y, Dtype dtype, int64_t tokens, const Table& table, ParallelFor parallel_for);
    // y = cast(x / sqrt(mean(x^2) + eps)) * weight for rows [rows, width].
    void (*norm)(const void* x, const void* weight, void* y, Dtype dtype, float eps, int64_t rows, int64_t width,
                 ParallelFor parallel_for);
    // Rotates heads [tokens, heads, head_dim] in place by cosines and sines [angles, head_dim], of which token t has row
    // t % angles; each product and the sum are rounded to `dtype`.
    void (*rotate)(void* x, Dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim, const void* cosine,
                   const void* sine, int64_t angles, ParallelFor parallel_for);
    // gate = cast(silu(gate)) * up, in place, rounded to `dtype` twice; without the product where `up` is null.
    void (*gated)(void* gate, const void* up, Dtype dtype, int64_t count, ParallelFor parallel_for);
    // y = y + x, in place.
    void (*add)(void* y, const void* x, Dtype dtype, int64_t count, ParallelFor parallel_for);
    // output = softmax(scale query keys^T) values, in float32, rounded once.
    void (*attend)(const Attention& attention, ParallelFor parallel_for);
    // The same for each position of a prompt over itself and those before it.
    void (*attend_prompt)(const Prompt& prompt, ParallelFor parallel_for);
    // y = x behind all blocks; keys and values of the new tokens go into the caches.
    void (*decode)(const Decode& call, ParallelFor parallel_for);
    // Rounds columns and carries their errors; moves integers to where the loss is least.
    void (*round_columns)(const Columns& columns, ParallelFor parallel_for);
    void (*descend_columns)(const Columns& columns, ParallelFor parallel_for);
    // The error of rounding with each of several scales.
    void (*rounding_errors)(const Trials& trials, ParallelFor parallel_for);
};

const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();

}  // namespace quad
