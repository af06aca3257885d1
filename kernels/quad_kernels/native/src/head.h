// The head of a model for a few tokens, which is a matter of reading its rows once: 8-bit integers with a scale per row, or
// bfloat16. Sums are float32, over 32 columns at a time in one order for every instruction set and number of tokens.
#pragma once

#include "linear.h"

namespace {

using quad::Table;

#ifdef __AVX512F__
constexpr int kHeadTile = 4;  // tokens that share a widened row
Vector16 widened(const uint8_t* p) {
    __m128i bytes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
#else
constexpr int kHeadTile = 2;
Vector16 widened(const uint8_t* p) {
    __m128i bytes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-128));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
#endif

struct HeadCall {
    const void* x;
    void* y;
    Dtype dtype;
    int64_t tokens;
    const Table& table;
};

constexpr int64_t kStep = 32;  // columns at a time

struct Bytes {
    static constexpr int64_t kSize = 1;
    static Vector16 load(const uint8_t* row, int64_t k) { return widened(row + k); }
};

struct Bfloat16s {
    static constexpr int64_t kSize = 2;
    static Vector16 load(const uint8_t* row, int64_t k) {
        return Vector16::of_bfloat16(reinterpret_cast<const uint16_t*>(row) + k);
    }
};

// The products of one row, whose last columns are in `tail`, with T tokens of `x`, [T][padded].
template <class Row, int T>
void row_products(const uint8_t* row, const uint8_t* tail, int64_t columns, const float* x, int64_t padded, float* sum) {
    Vector16 even[T], odd[T];
    for (int t = 0; t < T; ++t) even[t] = odd[t] = Vector16::zero();
    for (int64_t k = 0; k < columns; k += kStep) {
        bool whole = k + kStep <= columns;
        Vector16 first = whole ? Row::load(row, k) : Row::load(tail, 0);
        Vector16 second = whole ? Row::load(row, k + 16) : Row::load(tail, 16);
        for (int t = 0; t < T; ++t) {
            even[t] = even[t].plus_product(first, Vector16::load(x + t * padded + k));
            odd[t] = odd[t].plus_product(second, Vector16::load(x + t * padded + k + 16));
        }
    }
    for (int t = 0; t < T; ++t) sum[t] = (even[t] + odd[t]).total();
}

template <class Row, int T>
void head_rows(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const float* x, int64_t padded) {
    const Table& table = call.table;
    int64_t whole = table.columns / kStep * kStep;
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* row = table.rows_data + r * table.stride;
        uint8_t tail[kStep * Row::kSize] = {};
        std::memcpy(tail, row + whole * Row::kSize, (table.columns - whole) * Row::kSize);
        for (int64_t ahead = 0; ahead < table.stride; ahead += kLine)
            _mm_prefetch(reinterpret_cast<const char*>(row + 4096 + ahead), _MM_HINT_T0);
        float sum[T], scale = table.scale ? load_one(table.scale, table.scale_dtype, r) : 1.0f;
        row_products<Row, T>(row, tail, table.columns, x + t * padded, padded, sum);
        for (int i = 0; i < T; ++i) store_one(call.y, call.dtype, (t + i) * table.rows + r, sum[i] * scale);
    }
}

template <class Row, int T = kHeadTile>
void head_tokens(const HeadCall& call, int64_t begin, int64_t end, int64_t t, const float* x, int64_t padded) {
    if constexpr (T > 0) {
        for (; t + T <= call.tokens; t += T) head_rows<Row, T>(call, begin, end, t, x, padded);
        if (t < call.tokens) head_tokens<Row, T - 1>(call, begin, end, t, x, padded);
    }
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
            if (call.table.bytes) head_tokens<Bytes>(call, begin, end, 0, x, padded);
            else head_tokens<Bfloat16s>(call, begin, end, 0, x, padded);
        },
        &call);
}

}  // namespace
