// Rows of float32, bfloat16 and float16 as float32 and back, and sixteen float32 numbers as one value.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "call.h"
#include "memory.h"

namespace {

using quad::Dtype;

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const void* element(const void* data, Dtype dtype, int64_t index) {
    return static_cast<const char*>(data) + index * size_of(dtype);
}

float from_bfloat16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// To nearest, ties to even; any NaN becomes the quiet one that PyTorch makes.
uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Sixteen float32 numbers: one AVX-512 register, or two of AVX2. Products and sums are rounded alike in both.
#ifdef __AVX512F__
struct Vector16 {
    __m512 v;
    static Vector16 zero() { return {_mm512_setzero_ps()}; }
    static Vector16 all(float value) { return {_mm512_set1_ps(value)}; }
    static Vector16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vector16 of(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
    static Vector16 of_bfloat16(const uint16_t* p) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_bfloat16(uint16_t* p) const {
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        bits = _mm512_srli_epi32(bits, 16);
        bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
    }
    Vector16 operator+(Vector16 o) const { return {_mm512_add_ps(v, o.v)}; }
    Vector16 operator-(Vector16 o) const { return {_mm512_sub_ps(v, o.v)}; }
    Vector16 operator*(Vector16 o) const { return {_mm512_mul_ps(v, o.v)}; }
    Vector16 operator/(Vector16 o) const { return {_mm512_div_ps(v, o.v)}; }
    Vector16 nearest() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT)}; }
    // The nearest doubled 4-bit floating-point number of one that lies between -12 and 12.
    Vector16 nearest_e2m1() const {
        __m512 magnitude = _mm512_abs_ps(v), one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
        __mmask16 from4 = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(4.0f), _CMP_GE_OQ);
        __mmask16 from8 = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(8.0f), _CMP_GE_OQ);
        __m512 unit = _mm512_mask_mov_ps(_mm512_mask_mov_ps(one, from4, two), from8, _mm512_set1_ps(4.0f));
        return Vector16{_mm512_mul_ps(_mm512_roundscale_ps(_mm512_div_ps(v, unit), _MM_FROUND_TO_NEAREST_INT), unit)};
    }
    Vector16 between(Vector16 low, Vector16 high) const { return {_mm512_min_ps(_mm512_max_ps(v, low.v), high.v)}; }
    // The greater of each two, this where the other is NaN.
    Vector16 or_greater(Vector16 o) const { return {_mm512_max_ps(o.v, v)}; }
    // Zeros where `o` is `value`, also where this is NaN there.
    Vector16 zero_where(Vector16 o, float value) const {
        return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(o.v, _mm512_set1_ps(value), _CMP_NEQ_UQ), v)};
    }
    // Between two numbers; NaN stays what it is.
    Vector16 clamped(float low, float high) const {
        return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), v))};
    }
    // 2^n for the integer n of a number that is 1.5 * 2^23 + n.
    Vector16 power_of_two() const {
        __m512i n = _mm512_sub_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x4B400000 - 127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
    }
    Vector16 plus_product(Vector16 a, Vector16 b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }
    float total() const { return _mm512_reduce_add_ps(v); }
    float greatest() const { return _mm512_reduce_max_ps(v); }
};
#else
struct Vector16 {
    __m256 a, b;
    static Vector16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Vector16 all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Vector16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Vector16 of(const int32_t* p) {
        auto q = reinterpret_cast<const __m256i*>(p);
        return {_mm256_cvtepi32_ps(_mm256_loadu_si256(q)), _mm256_cvtepi32_ps(_mm256_loadu_si256(q + 1))};
    }
    static __m256 half_of_bfloat16(const uint16_t* p) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static Vector16 of_bfloat16(const uint16_t* p) { return {half_of_bfloat16(p), half_of_bfloat16(p + 8)}; }
    void store(float* p) const {
        _mm256_storeu_ps(p, a);
        _mm256_storeu_ps(p + 8, b);
    }
    static __m256i rounded(__m256 v) {
        __m256i bits = _mm256_castps_si256(v);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        bits = _mm256_srli_epi32(bits, 16);
        __m256i none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7FC0), none);
    }
    void store_bfloat16(uint16_t* p) const {
        __m256i both = _mm256_packus_epi32(rounded(a), rounded(b));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xD8));
    }
    Vector16 operator+(Vector16 o) const { return {_mm256_add_ps(a, o.a), _mm256_add_ps(b, o.b)}; }
    Vector16 operator-(Vector16 o) const { return {_mm256_sub_ps(a, o.a), _mm256_sub_ps(b, o.b)}; }
    Vector16 operator*(Vector16 o) const { return {_mm256_mul_ps(a, o.a), _mm256_mul_ps(b, o.b)}; }
    Vector16 operator/(Vector16 o) const { return {_mm256_div_ps(a, o.a), _mm256_div_ps(b, o.b)}; }
    Vector16 nearest() const {
        constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a, kEven), _mm256_round_ps(b, kEven)};
    }
    static __m256 half_e2m1(__m256 v) {
        __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), one = _mm256_set1_ps(1.0f);
        __m256 from4 = _mm256_cmp_ps(magnitude, _mm256_set1_ps(4.0f), _CMP_GE_OQ);
        __m256 from8 = _mm256_cmp_ps(magnitude, _mm256_set1_ps(8.0f), _CMP_GE_OQ);
        __m256 unit = _mm256_add_ps(one, _mm256_and_ps(from4, one));
        unit = _mm256_add_ps(unit, _mm256_and_ps(from8, _mm256_set1_ps(2.0f)));
        __m256 inverse = _mm256_sub_ps(one, _mm256_and_ps(from4, _mm256_set1_ps(0.5f)));
        inverse = _mm256_sub_ps(inverse, _mm256_and_ps(from8, _mm256_set1_ps(0.25f)));
        constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return _mm256_mul_ps(_mm256_round_ps(_mm256_mul_ps(v, inverse), kEven), unit);
    }
    // The nearest doubled 4-bit floating-point number of one that lies between -12 and 12.
    Vector16 nearest_e2m1() const { return {half_e2m1(a), half_e2m1(b)}; }
    Vector16 between(Vector16 low, Vector16 high) const {
        return {_mm256_min_ps(_mm256_max_ps(a, low.a), high.a), _mm256_min_ps(_mm256_max_ps(b, low.b), high.b)};
    }
    // The greater of each two, this where the other is NaN.
    Vector16 or_greater(Vector16 o) const { return {_mm256_max_ps(o.a, a), _mm256_max_ps(o.b, b)}; }
    // Zeros where `o` is `value`, also where this is NaN there.
    Vector16 zero_where(Vector16 o, float value) const {
        __m256 all = _mm256_set1_ps(value);
        return {_mm256_and_ps(a, _mm256_cmp_ps(o.a, all, _CMP_NEQ_UQ)),
                _mm256_and_ps(b, _mm256_cmp_ps(o.b, all, _CMP_NEQ_UQ))};
    }
    // Between two numbers; NaN stays what it is.
    Vector16 clamped(float low, float high) const {
        __m256 least = _mm256_set1_ps(low), most = _mm256_set1_ps(high);
        return {_mm256_min_ps(most, _mm256_max_ps(least, a)), _mm256_min_ps(most, _mm256_max_ps(least, b))};
    }
    static __m256 half_power(__m256 v) {
        __m256i n = _mm256_sub_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(0x4B400000 - 127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
    }
    // 2^n for the integer n of a number that is 1.5 * 2^23 + n.
    Vector16 power_of_two() const { return {half_power(a), half_power(b)}; }
    Vector16 plus_product(Vector16 x, Vector16 y) const {
        return {_mm256_fmadd_ps(x.a, y.a, a), _mm256_fmadd_ps(x.b, y.b, b)};
    }
    float total() const {
        __m256 sum = _mm256_add_ps(a, b);
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    float greatest() const {
        __m256 top = _mm256_max_ps(a, b);
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
};
#endif

float load_one(const void* data, Dtype dtype, int64_t index) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[index];
    uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return dtype == Dtype::bfloat16 ? from_bfloat16(bits) : _cvtsh_ss(bits);
}

void store_one(void* data, Dtype dtype, int64_t index, float value) {
    if (dtype == Dtype::float32) static_cast<float*>(data)[index] = value;
    else if (dtype == Dtype::bfloat16) static_cast<uint16_t*>(data)[index] = to_bfloat16(value);
    else static_cast<uint16_t*>(data)[index] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

void load_row(const void* data, Dtype dtype, int64_t count, float* row) {
    if (dtype == Dtype::float32) {
        std::memcpy(row, data, count * 4);
    } else if (dtype == Dtype::bfloat16) {
        auto source = static_cast<const uint16_t*>(data);
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) Vector16::of_bfloat16(source + i).store(row + i);
        for (; i < count; ++i) row[i] = from_bfloat16(source[i]);
    } else {
        auto source = static_cast<const uint16_t*>(data);
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(row + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
        for (; i < count; ++i) row[i] = _cvtsh_ss(source[i]);
    }
}

void store_row(void* data, Dtype dtype, int64_t count, const float* row) {
    if (dtype == Dtype::float32) {
        std::memcpy(data, row, count * 4);
    } else if (dtype == Dtype::bfloat16) {
        auto target = static_cast<uint16_t*>(data);
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) Vector16::load(row + i).store_bfloat16(target + i);
        for (; i < count; ++i) target[i] = to_bfloat16(row[i]);
    } else {
        auto target = static_cast<uint16_t*>(data);
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < count; ++i) target[i] = _cvtss_sh(row[i], _MM_FROUND_TO_NEAREST_INT);
    }
}

// Rounds float32 numbers to the values of a narrower dtype.
void round_row(float* row, Dtype dtype, int64_t count) {
    if (dtype == Dtype::bfloat16) {
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) {
            uint16_t narrow[16];
            Vector16::load(row + i).store_bfloat16(narrow);
            Vector16::of_bfloat16(narrow).store(row + i);
        }
        for (; i < count; ++i) row[i] = from_bfloat16(to_bfloat16(row[i]));
    } else if (dtype == Dtype::float16) {
        for (int64_t i = 0; i < count; ++i) row[i] = _cvtsh_ss(_cvtss_sh(row[i], _MM_FROUND_TO_NEAREST_INT));
    }
}

}  // namespace
