// Columns of a weight that become integers one after the other, each sending what it did to those behind it. Sixteen
// output channels lie side by side in a register: none depends on another.
#pragma once

#include "linear.h"

namespace {

using quad::Columns;

constexpr int64_t kMultiplications = 1 << 18;  // that a thread takes at least

// Sixteen channels of all columns, channels past the last one filled with `filling`.
void load_lanes(const float* rows, const Columns& c, int64_t first, float filling, float* lanes) {
    int64_t count = smaller(kChannels, c.channels - first);
    for (int64_t i = 0; i < c.count; ++i, lanes += kChannels) {
        const float* row = rows + i * c.channels + first;
        for (int64_t k = 0; k < kChannels; ++k) lanes[k] = k < count ? row[k] : filling;
    }
}

void store_lanes(Vector16 value, float* rows, const Columns& c, int64_t column, int64_t first) {
    float lanes[kChannels];
    value.store(lanes);
    std::memcpy(rows + column * c.channels + first, lanes, smaller(kChannels, c.channels - first) * sizeof(float));
}

// The columns behind `column` get `factor` times their coefficient of it.
void carry(const Columns& c, int64_t column, Vector16 factor, float* work) {
    const float* coefficients = c.coefficients + column * c.count;
    for (int64_t j = column + 1; j < c.count; ++j) {
        float* target = work + j * kChannels;
        Vector16::load(target).plus_product(Vector16::all(coefficients[j]), factor).store(target);
    }
}

void round_lanes(const Columns& c, int64_t first, float* work) {
    float* scales = work + c.count * kChannels;
    float* zeros = scales + c.count * kChannels;
    load_lanes(c.values, c, first, 0.0f, work);
    load_lanes(c.scale, c, first, 1.0f, scales);
    load_lanes(c.second, c, first, 0.0f, zeros);
    Vector16 low = Vector16::all(c.low), high = Vector16::all(c.high);
    for (int64_t i = 0; i < c.count; ++i) {
        Vector16 w = Vector16::load(work + i * kChannels);
        Vector16 scale = Vector16::load(scales + i * kChannels), zero = Vector16::load(zeros + i * kChannels);
        Vector16 q = (zero + w / scale).nearest().between(low, high);
        Vector16 error = (w - (q - zero) * scale) / Vector16::all(c.coefficients[i * c.count + i]);
        store_lanes(q, c.integers, c, i, first);
        store_lanes(error, c.change, c, i, first);
        carry(c, i, Vector16::zero() - error, work);
    }
}

void descend_lanes(const Columns& c, int64_t first, float* work) {
    float* scales = work + c.count * kChannels;
    float* steps = scales + c.count * kChannels;
    float* integers = steps + c.count * kChannels;
    load_lanes(c.values, c, first, 0.0f, work);
    load_lanes(c.scale, c, first, 0.0f, scales);
    load_lanes(c.second, c, first, 0.0f, steps);
    load_lanes(c.start, c, first, 0.0f, integers);
    Vector16 low = Vector16::all(c.low), high = Vector16::all(c.high);
    for (int64_t i = 0; i < c.count; ++i) {
        Vector16 q = Vector16::load(integers + i * kChannels);
        Vector16 step = Vector16::load(work + i * kChannels) * Vector16::load(steps + i * kChannels);
        Vector16 best = (q - step).nearest().between(low, high);
        Vector16 change = (best - q) * Vector16::load(scales + i * kChannels);
        store_lanes(best, c.integers, c, i, first);
        store_lanes(change, c.change, c, i, first);
        carry(c, i, change, work);
    }
}

template <void (*Lanes)(const Columns&, int64_t, float*)>
void all_lanes(const Columns& columns, ParallelFor parallel_for) {
    auto body = [](int64_t begin, int64_t end, void* context) {
        const Columns& c = *static_cast<const Columns*>(context);
        float* work = call_memory().y.at_least(4 * c.count * kChannels);
        for (int64_t i = begin; i < end; ++i) Lanes(c, i * kChannels, work);
    };
    int64_t grain = larger(1, kMultiplications / (columns.count * columns.count * kChannels / 2 + 1));
    parallel_for(0, ceil_div(columns.channels, kChannels), grain, body, const_cast<Columns*>(&columns));
}

void round_columns(const Columns& columns, ParallelFor parallel_for) { all_lanes<round_lanes>(columns, parallel_for); }

void descend_columns(const Columns& columns, ParallelFor parallel_for) {
    all_lanes<descend_lanes>(columns, parallel_for);
}

}  // namespace
