// Integer products with 256-bit registers: AVX-VNNI where the file is compiled for it, else pairs of 16-bit sums.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "form.h"
#include "memory.h"

namespace {

struct Product {
    static constexpr int kDirect = 4;
    static constexpr int kTile = 5;
    static constexpr int64_t kPanel = 1024;
    static constexpr int64_t kBatchBytes = 1 << 16;
    static constexpr int32_t kProductsOffset = 0;  // sub-scales multiply sums, which begin at what takes the 8 off
    static constexpr bool kFetches = true;  // `direct` asks for what comes behind the lines, a piece with each line
    static constexpr int kPlanes = 2;  // a panel of whole bytes is two of nibbles: 255 x 127 x 2 overflows 16 bits

    // The two halves of the bytes of a line, without what is added to them.
    template <Form F>
    struct Halves {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1)));
        __m256i value(__m256i code) const { return F == Form::e2m1 ? _mm256_shuffle_epi8(table, code) : code; }
        __m256i low(__m256i w) const { return value(_mm256_and_si256(w, nibble)); }
        __m256i high(__m256i w) const { return value(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble)); }
    };

    static __m256i broadcast(const int8_t* a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm256_set1_epi32(four);
    }

    // 8 channels: sums of products. With 16 bits a product of four inputs adds at most 2 x 15 x 128 to each half.
    struct Sum {
#ifdef __AVXVNNI__
        __m256i wide = _mm256_setzero_si256();
        void add(__m256i weights, __m256i inputs) { wide = _mm256_dpbusd_avx_epi32(wide, weights, inputs); }
        __m256i take() { return wide; }
        // Begins at twice `half`.
        static Sum from(int16_t half) { return {_mm256_set1_epi32(2 * half)}; }
        __m256i times(__m256i factors) { return _mm256_mullo_epi32(wide, factors); }
        static __m256i factors(const int8_t* eight) { return as_32_bits(eight); }
#else
        __m256i narrow = _mm256_setzero_si256();
        void add(__m256i weights, __m256i inputs) {
            narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(weights, inputs));
            asm("" : "+x"(narrow));  // in this order: a compiler that adds products first runs out of registers
        }
        __m256i take() { return times(_mm256_set1_epi16(1)); }
        // Begins at twice `half`, one in each 16 bits. Behind a part of up to 32 inputs, less than 2^15 are left in
        // each: at most 16 x 15 x 127 + 4 x 16; on the way sums wrap.
        static Sum from(int16_t half) { return {_mm256_set1_epi16(half)}; }
        __m256i times(__m256i factors) { return _mm256_madd_epi16(narrow, factors); }
        static __m256i factors(const int8_t* eight) {
            __m256i wide = as_32_bits(eight);
            return _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
        }
#endif
        static __m256i as_32_bits(const int8_t* eight) {
            return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
        }
    };

    // How many products of four inputs are added up before their sum is widened, and what the sum begins at.
    struct Narrow {
        int64_t steps;
        int16_t start;  // in each 16 bits
    };

    // Inputs are from -largest to largest - 1, and meet integers up to 15, or 24. What two products add lies between
    // -most largest and most (largest - 1); beginning in the middle, the sums use 16 bits to their ends.
    template <Form F>
    static Narrow narrow_of(int32_t largest) {
#ifdef __AVXVNNI__
        (void)largest;
        return {int64_t(1) << 40, 0};
#else
        constexpr int32_t most = 2 * (F == Form::e2m1 ? 24 : 15);
        const int32_t steps = 65535 / (most * (2 * largest - 1));
        return {steps, int16_t(steps * most / 2)};
#endif
    }

    // Adds a sum, less what it began at, to 8 totals, or writes it where it is the first.
    static void accumulate(int32_t* total, __m256i sum, int16_t start, int shift, bool first) {
        auto p = reinterpret_cast<__m256i*>(total);
        sum = _mm256_slli_epi32(_mm256_sub_epi32(sum, _mm256_set1_epi32(2 * start)), shift);
        _mm256_storeu_si256(p, first ? sum : _mm256_add_epi32(_mm256_loadu_si256(p), sum));
    }

    template <int T>
    static void begin_at(Sum (*sum)[2], int16_t start) {
        for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = Sum::from(start);
    }

    // Adds the products of a line and T tokens; of whole bytes the high halves go to `high`, else all goes to `low`.
    template <int T, Form F>
    __attribute__((always_inline)) static void add_line(const uint8_t* line, const int8_t* x, Sum (*low)[2], Sum (*high)[2]) {
        const Halves<F> halves;
        _mm_prefetch(reinterpret_cast<const char*>(line + 3072), _MM_HINT_T0);
        for (int h = 0; h < 2; ++h) {
            __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * h));
            __m256i first = halves.low(w), second = halves.high(w);
            for (int t = 0; t < T; ++t) {
                low[t][h].add(first, broadcast(x + t * kLine));
                if constexpr (F == Form::bytes) high[t][h].add(second, broadcast(x + t * kLine));
                else low[t][h].add(second, broadcast(x + t * kLine + 4));
            }
        }
    }

    template <int T, Form F>
    static void direct(const uint8_t* lines, int64_t begin, int64_t end, const int8_t* a, int64_t chunk, int32_t largest,
                       const Ahead& ahead, int32_t* total) {
        constexpr bool Wide = F == Form::bytes;
        constexpr int kPer = Wide ? 16 : 8;
        const Narrow narrow = narrow_of<F>(largest);
        const int64_t lines_at_once = Wide ? narrow.steps : narrow.steps / 2;
        for (int64_t start = begin; start < end; start += lines_at_once) {
            int64_t stop = smaller(end, start + lines_at_once);
            Sum low[T][2], high[T][2];
            begin_at<T>(low, narrow.start);
            if constexpr (Wide) begin_at<T>(high, narrow.start);
            for (int64_t l = start; l < stop;) {
                const int8_t* x = a + l / kPer * chunk + l % kPer * (64 / kPer);
                for (int64_t last = smaller(stop, (l / kPer + 1) * kPer); l < last; ++l, x += 64 / kPer) {
                    _mm_prefetch(ahead.data + l * ahead.step, _MM_HINT_T0);
                    add_line<T, F>(lines + l * kLine, x, low, high);
                }
            }
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < 2; ++h) {
                    accumulate(total + 16 * t + 8 * h, low[t][h].take(), narrow.start, 0, start == begin);
                    if constexpr (Wide) accumulate(total + 16 * t + 8 * h, high[t][h].take(), narrow.start, 4, false);
                }
        }
    }

    // All lines of 16 channels, whose sums of parts are multiplied by sub-scales.
    template <int T>
    static void direct_products(const uint8_t* lines, const int8_t* a, int64_t chunk, const SubScales& sub_scales,
                                int32_t* total) {
        PartCursor parts(sub_scales, 0);
        const int64_t step = sub_scales.part / 8, end = step * sub_scales.parts;
        for (int64_t start = 0; start < end; start += step, parts.next()) {
            parts.fetch_ahead();
            Sum sum[T][2];
            for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = Sum::from(parts.start(t));
            const int8_t* x = a + start / 8 * chunk + start % 8 * 8;  // a part lies in one chunk
            for (int64_t l = start; l < start + step; ++l, x += 8)
                add_line<T, Form::products>(lines + l * kLine, x, sum, nullptr);
            add_times<T>(sum, parts.values(), start == 0, total);
        }
    }

    template <int T>
    __attribute__((always_inline)) static void add_times(Sum (*sum)[2], const int8_t* sub_scales, bool first,
                                                         int32_t* total) {
        for (int h = 0; h < 2; ++h) {
            __m256i factors = Sum::factors(sub_scales + 8 * h);
            for (int t = 0; t < T; ++t) accumulate(total + 16 * t + 8 * h, sum[t][h].times(factors), 0, 0, first);
        }
    }

    // A panel of two levels holds the stored integers: multiplied by sub-scales they would be two planes.
    static const uint8_t* unpack_products(const uint8_t* lines, int64_t begin, int64_t end, uint8_t* panel,
                                          const SubScales&) {
        return unpack<Form::nibbles>(lines, begin, end, panel);
    }

    template <Form F>
    static const uint8_t* unpack(const uint8_t* lines, int64_t begin, int64_t end, uint8_t* panel) {
        constexpr bool Wide = F == Form::bytes;
        const Halves<F> halves;
        int64_t plane = Wide ? (end - begin) * kLine : kLine;  // distance of the two halves
        uint8_t* target = panel;
        for (int64_t l = begin; l < end; ++l, target += Wide ? kLine : 2 * kLine)
            for (int h = 0; h < 2; ++h) {
                __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + l * kLine + 32 * h));
                _mm256_store_si256(reinterpret_cast<__m256i*>(target + 32 * h), halves.low(w));
                _mm256_store_si256(reinterpret_cast<__m256i*>(target + plane + 32 * h), halves.high(w));
            }
        return panel;
    }

    // Adds the products of one row of a panel, four inputs of 16 channels, and T tokens.
    template <int T>
    __attribute__((always_inline)) static void add_row(const __m256i* row, const int8_t* x, Sum (*sum)[2]) {
        __m256i left = _mm256_load_si256(row), right = _mm256_load_si256(row + 1);
        for (int t = 0; t < T; ++t) {
            __m256i inputs = broadcast(x + t * kLine);
            sum[t][0].add(left, inputs);
            sum[t][1].add(right, inputs);
        }
    }

    // Likewise of some rows, which are inputs from `k` to `end`. Four at a time: with a loop for each, a fifth of the
    // instructions would be the loop's.
    template <int T>
    __attribute__((always_inline)) static void add_rows(const uint8_t* rows, int64_t k, int64_t end, const int8_t* a,
                                                        int64_t chunk, Sum (*sum)[2]) {
        auto row = reinterpret_cast<const __m256i*>(rows);
        while (k < end) {
            const int8_t* x = a + k / 64 * chunk + k % 64;
            const int64_t last = smaller(end, k / 64 * 64 + 64);
            for (; k + 16 <= last; k += 16, x += 16, row += 8)
                for (int i = 0; i < 4; ++i) add_row<T>(row + 2 * i, x + 4 * i, sum);
            for (; k < last; k += 4, x += 4, row += 2) add_row<T>(row, x, sum);
        }
    }

    template <int T, Form F>
    static void plane(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first, int32_t largest,
                      int shift, bool add, int32_t* total) {
        const Narrow narrow = narrow_of<F>(largest);
        for (int64_t start = 0; start < rows; start += narrow.steps) {
            int64_t stop = smaller(rows, start + narrow.steps);
            Sum sum[T][2];
            begin_at<T>(sum, narrow.start);
            add_rows<T>(panel + start * kLine, first + 4 * start, first + 4 * stop, a, chunk, sum);
            for (int t = 0; t < T; ++t)
                for (int h = 0; h < 2; ++h)
                    accumulate(total + 16 * t + 8 * h, sum[t][h].take(), narrow.start, shift, !add && start == 0);
        }
    }

    template <int T>
    static void tile_products(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first,
                              const SubScales& sub_scales, bool add, int32_t* total) {
        PartCursor parts(sub_scales, first);
        for (int64_t k = first, end = first + 4 * rows; k < end; k += sub_scales.part, parts.next()) {
            Sum sum[T][2];
            for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = Sum::from(parts.start(t));
            add_rows<T>(panel + (k - first) / 4 * kLine, k, k + sub_scales.part, a, chunk, sum);
            add_times<T>(sum, parts.values(), !add && k == first, total);
        }
    }

    // Writes the sums of T tokens to `total`, or adds them to it.
    template <int T, Form F>
    static void tile(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first, int32_t largest,
                     bool add, int32_t* total) {
        plane<T, F>(panel, rows, a, chunk, first, largest, 0, add, total);
        if constexpr (F == Form::bytes)
            plane<T, F>(panel + rows * kLine, rows, a, chunk, first, largest, 4, true, total);
    }
};

}  // namespace
