// The online Hadamard transform of one token, in place: butterflies for powers of two, tables of signed sums for the
// other factors. Every instruction set adds the same numbers in the same order.
#pragma once

#include <cmath>

#include "convert.h"

namespace {

using quad::Hadamard;

constexpr int64_t kLanes = 16;  // numbers in a Vector16

// Sums and differences of neighbours 1, 2, 4 and 8 apart, in sixteen numbers: Sylvester's transform of them.
#ifdef __AVX512F__
Vector16 sylvester16(Vector16 x) {
    const __m512 plus = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
    __m512 v = x.v;
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xAAAA, plus, minus), _mm512_shuffle_ps(v, v, 0xB1));
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xCCCC, plus, minus), _mm512_shuffle_ps(v, v, 0x4E));
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xF0F0, plus, minus), _mm512_shuffle_f32x4(v, v, 0xB1));
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xFF00, plus, minus), _mm512_shuffle_f32x4(v, v, 0x4E));
    return {v};
}
constexpr int kRadix = 16;  // vectors that are transformed in registers
#else
__m256 sylvester8(__m256 v) {
    const __m256 one = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), two = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 four = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    v = _mm256_fmadd_ps(v, one, _mm256_permute_ps(v, 0xB1));
    v = _mm256_fmadd_ps(v, two, _mm256_permute_ps(v, 0x4E));
    return _mm256_fmadd_ps(v, four, _mm256_permute2f128_ps(v, v, 1));
}
Vector16 sylvester16(Vector16 x) {
    __m256 a = sylvester8(x.a), b = sylvester8(x.b);
    return {_mm256_add_ps(a, b), _mm256_sub_ps(a, b)};
}
constexpr int kRadix = 4;
#endif

// Butterflies among R vectors `stride` numbers apart, from the closest to the farthest.
template <int R>
void butterflies(float* p, int64_t stride) {
    Vector16 v[R];
    for (int i = 0; i < R; ++i) v[i] = Vector16::load(p + i * stride);
#pragma GCC unroll 4
    for (int pass = 0; (1 << pass) < R; ++pass) {
#pragma GCC unroll 8
        for (int i = 0; i < R / 2; ++i) {
            int apart = 1 << pass, k = i / apart * 2 * apart + i % apart;
            Vector16 a = v[k], b = v[k + apart];
            v[k] = a + b;
            v[k + apart] = a - b;
        }
    }
    for (int i = 0; i < R; ++i) v[i].store(p + i * stride);
}

// All passes of radix R that fit into `order` numbers `stride` apart, then those of smaller radices.
template <int R>
void passes(float* row, int64_t count, int64_t stride, int64_t end) {
    if constexpr (R > 1) {
        for (; stride * R <= end; stride *= R)
            for (int64_t i = 0; i < count; i += R * stride)
                for (int64_t k = 0; k < stride; k += kLanes) butterflies<R>(row + i + k, stride);
        if (stride < end) passes<R / 2>(row, count, stride, end);
    }
}

// A power of two along an axis of `order` numbers `inner` apart.
void sylvester(float* row, int64_t count, int64_t order, int64_t inner) {
    int64_t stride = inner, end = inner * order;
    if (inner == 1 && order >= kLanes) {
        for (int64_t i = 0; i < count; i += kLanes) sylvester16(Vector16::load(row + i)).store(row + i);
        stride = kLanes;
    }
    if (stride % kLanes == 0) return passes<kRadix>(row, count, stride, end);
    for (; stride < end; stride *= 2)
        for (int64_t i = 0; i < count; i += 2 * stride)
            for (int64_t k = i; k < i + stride; ++k) {
                float a = row[k], b = row[k + stride];
                row[k] = a + b;
                row[k + stride] = a - b;
            }
}

// The sixteen signed sums of four vectors: bit k of the index is set where vector k is subtracted.
void signed_sums(const Vector16* r, float* sums, int64_t distance) {
    Vector16 plus = r[0] + r[1], minus = r[0] - r[1], above = r[2] + r[3], below = r[2] - r[3];
    Vector16 half[8] = {plus + above, minus + above, plus - below, minus - below,
                       plus + below, minus + below, plus - above, minus - above};
    for (int i = 0; i < 8; ++i) {  // the first vector is added: even indices; the others are their negatives
        half[i].store(sums + 2 * i * distance);
        (Vector16::zero() - half[i]).store(sums + (15 - 2 * i) * distance);
    }
}

// Transforms N x 16 columns, which lie `inner` apart from row to row.
template <int N>
void paley_columns(float* block, int64_t order, int64_t inner, const uint8_t* signs, float* table) {
    constexpr int64_t kWidth = N * kLanes;
    int64_t quarters = order / 4;
    for (int64_t i = 0; i < quarters; ++i)
        for (int n = 0; n < N; ++n) {
            Vector16 rows[4];
            for (int k = 0; k < 4; ++k) rows[k] = Vector16::load(block + (4 * i + k) * inner + n * kLanes);
            signed_sums(rows, table + i * 16 * kWidth + n * kLanes, kWidth);
        }
    for (int64_t j = 0; j < order; ++j) {
        Vector16 sum[N];
        for (int n = 0; n < N; ++n) sum[n] = Vector16::zero();
        const uint8_t* chosen = signs + j * quarters;
        for (int64_t i = 0; i < quarters; ++i) {
            const float* picked = table + (i * 16 + chosen[i]) * kWidth;
            for (int n = 0; n < N; ++n) sum[n] = sum[n] + Vector16::load(picked + n * kLanes);
        }
        for (int n = 0; n < N; ++n) sum[n].store(block + j * inner + n * kLanes);
    }
}

// Another order: for four rows each of the sixteen signed sums is made once, and every column picks one of them. That is
// a quarter of the additions ("the method of the four Russians").
void paley(float* row, int64_t count, int64_t order, int64_t inner, const uint8_t* signs, Buffer<float>& tables) {
    float* table = tables.at_least((order / 4 * 16 * 4 + order) * kLanes);
    float* narrow = table + order / 4 * 16 * 4 * kLanes;
    for (int64_t start = 0; start < count; start += order * inner) {
        float* block = row + start;
        int64_t column = 0;
        for (; column + 4 * kLanes <= inner; column += 4 * kLanes)
            paley_columns<4>(block + column, order, inner, signs, table);
        for (; column + kLanes <= inner; column += kLanes)
            paley_columns<1>(block + column, order, inner, signs, table);
        if (column == inner) continue;
        int64_t width = inner - column;  // fewer than 16: with zeros beside them
        std::memset(narrow, 0, order * kLanes * sizeof(float));
        for (int64_t i = 0; i < order; ++i)
            std::memcpy(narrow + i * kLanes, block + i * inner + column, width * sizeof(float));
        paley_columns<1>(narrow, order, kLanes, signs, table);
        for (int64_t i = 0; i < order; ++i)
            std::memcpy(block + i * inner + column, narrow + i * kLanes, width * sizeof(float));
    }
}

void transform(float* row, const Hadamard& plan, Buffer<float>& tables) {
    int64_t inner = 1;
    for (int i = plan.factor_count - 1; i >= 0; --i) {
        if (plan.signs[i]) paley(row, plan.size, plan.order[i], inner, plan.signs[i], tables);
        else sylvester(row, plan.size, plan.order[i], inner);
        inner *= plan.order[i];
    }
    float factor = float(1.0 / std::sqrt(double(plan.block)));
    for (int64_t i = 0; i < plan.size; ++i) row[i] *= factor;
}

}  // namespace
