// The head of a model for a few tokens, which is a matter of reading its rows once: 8-bit integers with a scale per row, or
// bfloat16. To widen bytes to float32 takes longer than to read them, so they meet inputs as two integers of 15 bits, of
// which the second continues the first: exact sums, and inputs as exact as float32 relative to the largest of the token.
// Sums of bfloat16 rows are float32, over 32 columns at a time in one order for every instruction set and number of tokens.
#pragma once

#include "linear.h"

namespace {

using quad::Table;

#ifdef __AVX512F__
constexpr int kHeadTile = 4;  // tokens that share a widened row
#else
constexpr int kHeadTile = 2;
#endif

struct HeadCall {
    const void* x;
    void* y;
    Dtype dtype;
    int64_t tokens;
    const Table& table;
};

constexpr int64_t kStep = 32;  // columns at a time

Vector16 row_at(const uint8_t* row, int64_t k) {
    return Vector16::of_bfloat16(reinterpret_cast<const uint16_t*>(row) + k);
}

// The products of one row, whose last columns are in `tail`, with T tokens of `x`, [T][padded].
template <int T>
void row_products(const uint8_t* row, const uint8_t* tail, int64_t columns, const float* x, int64_t padded, float* sum) {
    Vector16 even[T], odd[T];
    for (int t = 0; t < T; ++t) even[t] = odd[t] = Vector16::zero();
    for (int64_t k = 0; k < columns; k += kStep) {
        bool whole = k + kStep <= columns;
        Vector16 first = whole ? row_at(row, k) : row_at(tail, 0);
        Vector16 second = whole ? row_at(row, k + 16) : row_at(tail, 16);
        for (int t = 0; t < T; ++t) {
            even[t] = even[t].plus_product(first, Vector16::load(x + t * padded + k));
            odd[t] = odd[t].plus_product(second, Vector16::load(x + t * padded + k + 16));
        }
    }
    for (int t = 0; t < T; ++t) sum[t] = (even[t] + odd[t]).total();
}

template <int T>
void head_rows(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const float* x, int64_t padded) {
    const Table& table = call.table;
    int64_t whole = table.columns / kStep * kStep;
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* row = table.rows_data + r * table.stride;
        uint8_t tail[kStep * 2] = {};
        std::memcpy(tail, row + whole * 2, (table.columns - whole) * 2);
        for (int64_t ahead = 0; ahead < table.stride; ahead += kLine)
            _mm_prefetch(reinterpret_cast<const char*>(row + 4096 + ahead), _MM_HINT_T0);
        float sum[T], scale = table.scale ? load_one(table.scale, table.scale_dtype, r) : 1.0f;
        row_products<T>(row, tail, table.columns, x + t * padded, padded, sum);
        for (int i = 0; i < T; ++i) store_one(call.y, call.dtype, (t + i) * table.rows + r, sum[i] * scale);
    }
}

template <int T = kHeadTile>
void head_tokens(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const float* x, int64_t padded) {
    if constexpr (T > 0) {
        for (; t + T <= call.tokens; t += T) head_rows<T>(call, begin, end, t, x, padded);
        if (t < call.tokens) head_tokens<T - 1>(call, begin, end, t, x, padded);
    }
}

constexpr float kLargest = 16383.0f;      // of the integers of an input
constexpr float kFiner = 16384.0f;       // what the second integers are multiples of, in the first ones' unit, inverted
constexpr int64_t kExact = 4096;          // columns whose products add up to less than 2^31 in each lane of 32 bits

// The integers of a token, [2][count], and what the first of each two are multiples of.
float to_integers(const float* x, int64_t count, int16_t* integers) {
    float step = largest_magnitude(x, count) / kLargest;
    if (!usable(step)) {
        std::memset(integers, 0, 2 * count * sizeof(int16_t));
        return step;
    }
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t k = 0; k < count; ++k) {
        float steps = x[k] / step, whole = (steps + magic) - magic;
        integers[k] = int16_t(int32_t(whole));
        integers[count + k] = int16_t(int32_t(((steps - whole) * kFiner + magic) - magic));
    }
    return step;
}

// Sums of products of 16-bit integers.
struct Sum16 {
#ifdef __AVX512F__
    __m512i v = _mm512_setzero_si512();
    static __m512i widened(const uint8_t* p) {
        __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_cvtepi8_epi16(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
    }
    void add(__m512i row, const int16_t* x) { v = _mm512_add_epi32(v, _mm512_madd_epi16(row, _mm512_loadu_si512(x))); }
    int64_t total() const {
        __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
        return _mm512_reduce_add_epi64(wide);
    }
#else
    __m256i v = _mm256_setzero_si256();
    struct Pair {
        __m256i low, high;
    };
    static Pair widened(const uint8_t* p) {
        __m256i bytes = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi8(-128));
        return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
                _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
    }
    void add(Pair row, const int16_t* x) {
        auto p = reinterpret_cast<const __m256i*>(x);
        v = _mm256_add_epi32(v, _mm256_madd_epi16(row.low, _mm256_loadu_si256(p)));
        v = _mm256_add_epi32(v, _mm256_madd_epi16(row.high, _mm256_loadu_si256(p + 1)));
    }
    int64_t total() const {
        __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
    }
#endif
};

struct IntegerInputs {
    const int16_t* integers;  // [tokens][2][padded]
    const float* step;        // [tokens]
    int64_t padded;
};

template <int T>
void integer_rows(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const IntegerInputs& inputs) {
    const Table& table = call.table;
    int64_t whole = table.columns / kStep * kStep;
    const int16_t* x = inputs.integers + t * 2 * inputs.padded;
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* row = table.rows_data + r * table.stride;
        uint8_t tail[kStep];
        std::memset(tail, 128, kStep);
        std::memcpy(tail, row + whole, table.columns - whole);
        for (int64_t ahead = 0; ahead < table.stride; ahead += kLine)
            _mm_prefetch(reinterpret_cast<const char*>(row + 4096 + ahead), _MM_HINT_T0);
        int64_t sum[T][2] = {};
        for (int64_t start = 0; start < table.columns; start += kExact) {
            Sum16 part[T][2];
            for (int64_t k = start; k < smaller(table.columns, start + kExact); k += kStep) {
                auto wide = Sum16::widened(k < whole ? row + k : tail);
                for (int i = 0; i < T; ++i)
                    for (int p = 0; p < 2; ++p) part[i][p].add(wide, x + (2 * i + p) * inputs.padded + k);
            }
            for (int i = 0; i < T; ++i)
                for (int p = 0; p < 2; ++p) sum[i][p] += part[i][p].total();
        }
        float scale = load_one(table.scale, table.scale_dtype, r);
        for (int i = 0; i < T; ++i) {
            float value = float(double(sum[i][0]) + double(sum[i][1]) / kFiner);
            store_one(call.y, call.dtype, (t + i) * table.rows + r, value * inputs.step[t + i] * scale);
        }
    }
}

template <int T = kHeadTile>
void integer_tokens(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const IntegerInputs& inputs) {
    if constexpr (T > 0) {
        for (; t + T <= call.tokens; t += T) integer_rows<T>(call, begin, end, t, inputs);
        if (t < call.tokens) integer_tokens<T - 1>(call, begin, end, t, inputs);
    }
}

struct HeadMemory {
    Buffer<int16_t> integers;
    Buffer<float> step;
};

HeadMemory& head_memory() {
    thread_local HeadMemory memory;
    return memory;
}

// `x` is [tokens][padded], filled up with zeros.
void integer_head(const HeadCall& call, int64_t begin, int64_t end, const float* x, int64_t padded) {
    HeadMemory& memory = head_memory();
    int16_t* integers = memory.integers.at_least(call.tokens * 2 * padded);
    float* step = memory.step.at_least(call.tokens);
    for (int64_t t = 0; t < call.tokens; ++t) step[t] = to_integers(x + t * padded, padded, integers + t * 2 * padded);
    integer_tokens(call, begin, end, 0, {integers, step, padded});
}

void head(const void* x, void* y, Dtype dtype, int64_t tokens, const Table& table, ParallelFor parallel_for) {
    HeadCall call{x, y, dtype, tokens, table};
    parallel_for(
        0, table.rows, larger(1, kBytesPerThread / table.stride),
        [](int64_t begin, int64_t end, void* context) {
            const HeadCall& call = *static_cast<const HeadCall*>(context);
            int64_t columns = call.table.columns, padded = round_up(columns, kStep);
            float* x = call_memory().y.at_least(call.tokens * padded);
            for (int64_t t = 0; t < call.tokens; ++t) {
                load_row(element(call.x, call.dtype, t * columns), call.dtype, columns, x + t * padded);
                std::memset(x + t * padded + columns, 0, (padded - columns) * sizeof(float));
            }
            if (call.table.bytes) integer_head(call, begin, end, x, padded);
            else head_tokens(call, begin, end, 0, x, padded);
        },
        &call);
}

}  // namespace
