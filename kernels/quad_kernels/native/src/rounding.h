// The rounding of weights, for compression. Columns become integers one after the other, each sending what it did to
// those behind it; sixteen output channels lie side by side in a register: none depends on another.
#pragma once

#include "elementwise.h"

namespace {

using quad::Columns;

constexpr int64_t kMultiplications = 1 << 18;  // that a thread takes at least

// The nearest of all integers from `low` to `high`, or of doubled 4-bit floating-point numbers.
template <bool E2m1>
Vector16 nearest_point(Vector16 x, Vector16 low, Vector16 high) {
    if constexpr (E2m1) return x.between(low, high).nearest_e2m1();
    else return x.nearest().between(low, high);
}

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

template <bool E2m1>
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
        Vector16 q = nearest_point<E2m1>(zero + w / scale, low, high);
        Vector16 error = (w - (q - zero) * scale) / Vector16::all(c.coefficients[i * c.count + i]);
        store_lanes(q, c.integers, c, i, first);
        store_lanes(error, c.change, c, i, first);
        carry(c, i, Vector16::zero() - error, work);
    }
}

template <bool E2m1>
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
        Vector16 best = nearest_point<E2m1>(q - step, low, high);
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

// The weighted squared error of rounding `count` weights with one scale, in an order that does not depend on the
// instruction set.
template <bool E2m1>
float rounding_error(const float* weight, const float* cost, int64_t count, float scale, float zero, float low,
                     float high) {
    Vector16 s = Vector16::all(scale), z = Vector16::all(zero), least = Vector16::all(low), most = Vector16::all(high);
    Vector16 sum = Vector16::zero();
    auto add = [&](Vector16 w, Vector16 c) {
        Vector16 q = nearest_point<E2m1>(z + w / s, least, most);
        Vector16 error = (q - z) * s - w;
        sum = sum.plus_product(error * c, error);
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) add(Vector16::load(weight + i), Vector16::load(cost + i));
    if (i < count) {
        float rest[2][16] = {};
        std::memcpy(rest[0], weight + i, (count - i) * sizeof(float));
        std::memcpy(rest[1], cost + i, (count - i) * sizeof(float));
        add(Vector16::load(rest[0]), Vector16::load(rest[1]));
    }
    return sum_of_lanes(sum);
}

void rounding_errors(const quad::Trials& trials, ParallelFor parallel_for) {
    auto body = [](int64_t begin, int64_t end, void* context) {
        const quad::Trials& t = *static_cast<const quad::Trials*>(context);
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t group = 0; group < t.groups; ++group) {
                int64_t place = row * t.groups + group;
                const float* cost = t.cost + group * t.group_size;
                auto error = t.e2m1 ? rounding_error<true> : rounding_error<false>;
                for (int64_t i = 0; i < t.count; ++i, place += t.rows * t.groups)
                    t.errors[place] = error(t.weight + (row * t.groups + group) * t.group_size, cost,
                                                     t.group_size, t.scale[place], t.zero_point[place], t.low, t.high);
            }
        }
    };
    int64_t grain = larger(1, kMultiplications / (trials.count * trials.groups * trials.group_size + 1));
    parallel_for(0, trials.rows, grain, body, const_cast<quad::Trials*>(&trials));
}

void round_columns(const Columns& columns, ParallelFor parallel_for) {
    if (columns.e2m1) all_lanes<round_lanes<true>>(columns, parallel_for);
    else all_lanes<round_lanes<false>>(columns, parallel_for);
}

void descend_columns(const Columns& columns, ParallelFor parallel_for) {
    if (columns.e2m1) all_lanes<descend_lanes<true>>(columns, parallel_for);
    else all_lanes<descend_lanes<false>>(columns, parallel_for);
}

}  // namespace
