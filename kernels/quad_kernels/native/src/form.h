// The forms in which weights come, and what a weight of two levels brings besides its integers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Integers of half a byte, of a byte, of half a byte that are multiplied by the sub-scale of their group, or codes of
// half a byte for doubled 4-bit floating-point numbers.
enum class Form { nibbles, bytes, products, e2m1 };

// What the codes stand for, plus 12.
alignas(16) constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// The sub-scales of 16 channels, and the inputs they meet. A weight is stored with an offset of 8, so the products of a
// part of the inputs begin at -8 times its sum; sub-scales multiply what a part adds up to.
struct SubScales {
    const int8_t* values;  // [groups][16], `stride` apart
    int64_t stride;
    int64_t group;         // inputs of one sub-scale
    int64_t part;          // inputs of a part: a divisor of `group` and of 32, a multiple of 8
    int64_t parts;
    const int16_t* starts;  // [tokens][parts], half of what a part begins at: it fits into 16 bits

    SubScales from_token(int64_t t) const {
        SubScales moved = *this;
        moved.starts += t * parts;
        return moved;
    }
};

// What is read behind the lines of 16 channels. Asked for all at once it would wait for the lines, and they for it: line
// l asks for what is at `data + l step`.
struct Ahead {
    const char* data;
    int64_t step;
};

constexpr int64_t kAhead = 16;  // groups whose sub-scales are asked for: those of 16 channels lie apart in memory

// Goes through the parts of some inputs in order.
class PartCursor {
  public:
    // `first` is the input that they begin with, the first of a part.
    PartCursor(const SubScales& sub_scales, int64_t first)
        : sub_scales_(sub_scales),
          values_(sub_scales.values + first / sub_scales.group * sub_scales.stride),
          inside_(first % sub_scales.group),
          index_(first / sub_scales.part) {}

    const int8_t* values() const { return values_; }
    int16_t start(int t) const { return sub_scales_.starts[t * sub_scales_.parts + index_]; }
    void next() {
        ++index_;
        inside_ += sub_scales_.part;
        if (inside_ < sub_scales_.group) return;
        inside_ = 0;
        values_ += sub_scales_.stride;
    }
    // For a first pass over them.
    void fetch_ahead() const {
        _mm_prefetch(reinterpret_cast<const char*>(values_ + kAhead * sub_scales_.stride), _MM_HINT_T0);
    }

  private:
    const SubScales& sub_scales_;
    const int8_t* values_;
    int64_t inside_, index_;
};

}  // namespace
