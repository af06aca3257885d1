// Integer products with AVX512-VNNI: 16 output channels a register, vpdpbusd of unsigned weights and signed inputs.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "memory.h"

namespace {

struct Product {
    static constexpr int kDirect = 8;   // tokens up to which weights are unpacked in registers
    static constexpr int kTile = 12;    // tokens that share an unpacked weight
    static constexpr int64_t kPanel = 2048;  // inputs unpacked at a time
    static constexpr int kPlanes = 1;

    static __m512i broadcast(const int8_t* a) {
        int32_t four;
        std::memcpy(&four, a, 4);
        return _mm512_set1_epi32(four);
    }

    // Sums [T][16] over lines [begin, end) of 16 channels, for T tokens 64 bytes apart in each chunk.
    template <int T, bool Wide>
    static void direct(const uint8_t* lines, int64_t begin, int64_t end, const int8_t* a, int64_t chunk, bool,
                       int32_t* total) {
        constexpr int kPer = Wide ? 16 : 8;  // lines in a chunk of inputs
        constexpr int kChains = T == 1 ? 4 : T == 2 ? 2 : 1;
        __m512i sum[T][kChains][2];
        for (int t = 0; t < T; ++t)
            for (int c = 0; c < kChains; ++c) sum[t][c][0] = sum[t][c][1] = _mm512_setzero_si512();
        const __m512i nibble = _mm512_set1_epi8(15);
        auto step = [&](int64_t l, int c) {
            __m512i w = _mm512_loadu_si512(lines + l * kLine);
            const int8_t* x = a + l / kPer * chunk + l % kPer * (64 / kPer);
            if constexpr (Wide) {
                for (int t = 0; t < T; ++t)
                    sum[t][c][0] = _mm512_dpbusd_epi32(sum[t][c][0], w, broadcast(x + t * kLine));
            } else {
                __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
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

    // Unpacks lines to rows of 16 channels x 4 inputs and returns the panel; lines of whole bytes are such rows.
    template <bool Wide>
    static const uint8_t* unpack(const uint8_t* lines, int64_t begin, int64_t end, uint8_t* panel) {
        if (Wide) return lines + begin * kLine;
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int64_t l = begin; l < end; ++l, panel += 2 * kLine) {
            __m512i w = _mm512_loadu_si512(lines + l * kLine);
            _mm512_store_si512(panel, _mm512_and_si512(w, nibble));
            _mm512_store_si512(panel + kLine, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
        }
        return panel - (end - begin) * 2 * kLine;
    }

    // Sums [T][16] over rows [0, rows) of an unpacked panel; input `first` is the first row's.
    template <int T, bool Wide>
    static void tile(const uint8_t* panel, int64_t rows, const int8_t* a, int64_t chunk, int64_t first, bool,
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
        for (int t = 0; t < T; ++t) _mm512_storeu_si512(total + 16 * t, sum[t]);
    }
};

}  // namespace
