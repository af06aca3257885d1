// Integer products with AVX512-VNNI: 16 output channels a register, vpdpbusd of unsigned weights and signed inputs.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "form.h"
#include "memory.h"

namespace {

struct Product {
    static constexpr int kDirect = 8;   // tokens up to which weights are unpacked in registers
    static constexpr int kTile = 12;    // tokens that share an unpacked weight
    static constexpr int64_t kPanel = 2048;  // inputs unpacked at a time
    // Integers of tokens that go through at a time: each thread reads them again for each block of channels.
    static constexpr int64_t kBatchBytes = 1 << 20;
    static constexpr int32_t kProductsOffset = 128;  // a panel holds integers times sub-scales, as lines of bytes do
    static constexpr bool kFetches = false;
    static constexpr int kPlanes = 1;

    // The two halves of the bytes of a line, without what is added to them.
    template <Form F>
    struct Halves {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kE2m1)));
        __m512i value(__m512i code) const { return F == Form::e2m1 ? _mm512_shuffle_epi8(table, code) : code; }
        __m512i low(__m512i w) const { return value(_mm512_and_si512(w, nibble)); }
        __m512i high(__m512i w) const { return value(_mm512_and_si512(_mm512_srli_epi16(w, 4), nibble)); }
    };

    static __m512i broadcast(const int8_t* a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm512_set1_epi32(four);
    }

    // Sums [T][16] over lines [begin, end) of 16 channels, for T tokens 64 bytes apart in each chunk.
    template <int T, Form F>
    static void direct(const uint8_t* lines, int64_t begin, int64_t end, const int8_t* a, int64_t chunk, int32_t,
                       const Ahead&, int32_t* total) {
        constexpr bool Wide = F == Form::bytes;
        constexpr int kPer = Wide ? 16 : 8;  // lines in a chunk of inputs
        constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
        __m512i sum[T][kChains][2];
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < kChains; ++c) sum[t][c][0] = sum[t][c][1] = _mm512_setzero_si512();
        const Halves<F> halves;
        auto step = [&](int64_t l, int c) {
            __m512i w = _mm512_loadu_si512(lines + l * kLine);
            const int8_t* x = a + l / kPer * chunk + l % kPer * (64 / kPer);
            if constexpr (Wide) {
                for (int t = 0; t < T; ++t)
                    sum[t][c][0] = _mm512_dpbusd_epi32(sum[t][c][0], w, broadcast(x + t * kLine));
            } else {
                __m512i low = halves.low(w), high = halves.high(w);
                for (int t = 0; t < T; ++t) {
                    sum[t][c][0] = _mm512_dpbusd_epi32(sum[t][c][0], low, broadcast(x + t * kLine));
                    sum[t][c][1] = _mm512_dpbusd_epi32(sum[t][c][1], high, broadcast(x + t * kLine + 4));
                }
            }
        };
        int64_t l = begin;
        for (; l + 4 <= end; l += 4) {
            for (int i = 0; i < 4; ++i)
                _mm_prefetch(reinterpret_cast<const char*>(lines + (l + i) * kLine + 4096), _MM_HINT_T0);
            step(l, 0);
            step(l + 1, 1 % kChains);
            step(l + 2, 2 % kChains);
            step(l + 3, 3 % kChains);
        }
        for (; l < end; ++l) step(l, 0);
        for (int t = 0; t < T; ++t) {
            __m512i all = _mm512_setzero_si512();
            for (int c = 0; c < kChains; ++c)
                all = _mm512_add_epi32(all, _mm512_add_epi32(sum[t][c][0], sum[t][c][1]));
            _mm512_storeu_si512(total + 16 * t, all);
        }
    }

    static __m512i factors(const int8_t* sixteen) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
    }

    // All lines of 16 channels, whose sums of parts are multiplied by sub-scales.
    template <int T>
    static void direct_products(const uint8_t* lines, const int8_t* a, int64_t chunk, const SubScales& sub_scales,
                                int32_t* total) {
        const __m512i nibble = _mm512_set1_epi8(15);
        __m512i all[T];
        for (int t = 0; t < T; ++t) all[t] = _mm512_setzero_si512();
        PartCursor parts(sub_scales, 0);
        const int64_t step = sub_scales.part / 8, end = step * sub_scales.parts;
        for (int64_t start = 0; start < end; start += step, parts.next()) {
            parts.fetch_ahead();
            __m512i sum[T][2];
            for (int t = 0; t < T; ++t) {
                sum[t][0] = _mm512_set1_epi32(2 * parts.start(t));
                sum[t][1] = _mm512_setzero_si512();
            }
            for (int64_t l = start; l < start + step; ++l) {
                _mm_prefetch(reinterpret_cast<const char*>(lines + l * kLine + 4096), _MM_HINT_T0);
                const int8_t* x = a + l / 8 * chunk + l % 8 * 8;
                __m512i w = _mm512_loadu_si512(lines + l * kLine);
                __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
                for (int t = 0; t < T; ++t) {
                    sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], low, broadcast(x + t * kLine));
                    sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], high, broadcast(x + t * kLine + 4));
                }
            }
            __m512i sub_scale = factors(parts.values());
            for (int t = 0; t < T; ++t)
                all[t] = _mm512_add_epi32(
                    all[t], _mm512_mullo_epi32(_mm512_add_epi32(sum[t][0], sum[t][1]), sub_scale));
        }
        for (int t = 0; t < T; ++t) _mm512_storeu_si512(total + 16 * t, all[t]);
    }

    // Unpacks lines, of which the first is that of a part, to rows as below, of integers times sub-scales plus 128.
    static const uint8_t* unpack_products(const uint8_t* lines, int64_t begin, int64_t end, uint8_t* panel,
                                          const SubScales& sub_scales) {
        const __m512i nibble = _mm512_set1_epi8(15);
        PartCursor parts(sub_scales, begin * 8);
        const int64_t step = sub_scales.part / 8, last = smaller(end, step * sub_scales.parts);
        uint8_t* row = panel;
        for (int64_t start = begin; start < last; start += step, parts.next()) {
            __m512i wide = factors(parts.values());
            __m512i factor = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
            // 128 - 8 times the sub-scale, in each byte of its channel
            __m512i offset = _mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_slli_epi32(wide, 3));
            offset = _mm512_mullo_epi32(offset, _mm512_set1_epi32(0x01010101));
            for (int64_t l = start; l < start + step; ++l, row += 2 * kLine) {
                __m512i w = _mm512_loadu_si512(lines + l * kLine);
                __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
                // Two bytes at once: their products are below 226, so the lower carries nothing into the upper.
                _mm512_store_si512(row, _mm512_add_epi8(_mm512_mullo_epi16(low, factor), offset));
                _mm512_store_si512(row + kLine, _mm512_add_epi8(_mm512_mullo_epi16(high, factor), offset));
            }
        }
        std::memset(row, 128, panel + (end - begin) * 2 * kLine - row);  // what fills the inputs up is 0
        return panel;
    }

    template <int T>
    static void tile_products(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first,
                              const SubScales&, bool add, int32_t* total) {
        tile<T, Form::bytes>(panel, rows, a, chunk, first, 0, add, total);
    }

    // Unpacks lines to rows of 16 channels x 4 inputs and returns the panel; lines of whole bytes are such rows.
    template <Form F>
    static const uint8_t* unpack(const uint8_t* lines, int64_t begin, int64_t end, uint8_t* panel) {
        if (F == Form::bytes) return lines + begin * kLine;
        const Halves<F> halves;
        for (int64_t l = begin; l < end; ++l, panel += 2 * kLine) {
            __m512i w = _mm512_loadu_si512(lines + l * kLine);
            _mm512_store_si512(panel, halves.low(w));
            _mm512_store_si512(panel + kLine, halves.high(w));
        }
        return panel - (end - begin) * 2 * kLine;
    }

    // Writes the sums [T][16] over rows [0, rows) of an unpacked panel to `total`, or adds them to it; input `first` is
    // the first row's.
    template <int T, Form F>
    static void tile(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first, int32_t, bool add,
                     int32_t* total) {
        __m512i sum[T];
        for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_si512();
        for (int64_t k = first, end = first + 4 * rows; k < end;) {
            const int8_t* x = a + k / 64 * chunk + k % 64;
            int64_t stop = smaller(end, k / 64 * 64 + 64);
            for (; k < stop; k += 4, x += 4, panel += kLine) {
                __m512i w = _mm512_loadu_si512(panel);
                for (int t = 0; t < T; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w, broadcast(x + t * kLine));
            }
        }
        for (int t = 0; t < T; ++t)
            _mm512_storeu_si512(total + 16 * t,
                                add ? _mm512_add_epi32(sum[t], _mm512_loadu_si512(total + 16 * t)) : sum[t]);
    }
};

}  // namespace
