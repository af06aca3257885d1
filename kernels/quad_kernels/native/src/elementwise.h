// What a decoder block does between its linears, rounded where PyTorch rounds: norms, rotary embedding, gate, residual.
#pragma once

#include "linear.h"

namespace {

constexpr int64_t kElements = 16384;  // that a thread takes at least

void* place_of(void* data, Dtype dtype, int64_t index) { return const_cast<void*>(element(data, dtype, index)); }

// The sum of squares, in an order that does not depend on the instruction set.
float sum_of_squares(const float* x, int64_t count) {
    Float16 sum = Float16::zero();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        Float16 v = Float16::load(x + i);
        sum = sum.plus_product(v, v);
    }
    float lanes[16], total = 0;
    sum.store(lanes);
    for (; i < count; ++i) lanes[i % 16] = std::fma(x[i], x[i], lanes[i % 16]);
    for (int width = 8; width; width /= 2)
        for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    total = lanes[0];
    return total;
}

struct Rows {
    const void *x, *other, *third;
    void* y;
    Dtype dtype;
    float eps;
    int64_t width, heads, angles;
};

void norm(const void* x, const void* weight, void* y, Dtype dtype, float eps, int64_t rows, int64_t width,
          ParallelFor parallel_for) {
    Rows rows_{x, weight, nullptr, y, dtype, eps, width, 0, 0};
    parallel_for(
        0, rows, larger(1, kElements / width),
        [](int64_t begin, int64_t end, void* context) {
            const Rows& r = *static_cast<const Rows*>(context);
            float* row = call_memory().y.at_least(2 * r.width);
            float* weight = row + r.width;
            load_row(r.other, r.dtype, r.width, weight);
            for (int64_t i = begin; i < end; ++i) {
                load_row(element(r.x, r.dtype, i * r.width), r.dtype, r.width, row);
                float factor = 1.0f / std::sqrt(sum_of_squares(row, r.width) / float(r.width) + r.eps);
                for (int64_t k = 0; k < r.width; ++k) row[k] *= factor;
                round_row(row, r.dtype, r.width);
                for (int64_t k = 0; k < r.width; ++k) row[k] *= weight[k];
                store_row(place_of(r.y, r.dtype, i * r.width), r.dtype, r.width, row);
            }
        },
        &rows_);
}

void rotate(void* x, Dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim, const void* cosine, const void* sine,
            int64_t angles, ParallelFor parallel_for) {
    Rows rows{nullptr, cosine, sine, x, dtype, 0, head_dim, heads, angles};
    parallel_for(
        0, tokens, larger(1, kElements / (heads * head_dim)),
        [](int64_t begin, int64_t end, void* context) {
            const Rows& r = *static_cast<const Rows*>(context);
            int64_t n = r.width, half = n / 2;
            float* cosine = call_memory().y.at_least(5 * n);
            float *sine = cosine + n, *head = sine + n, *turned = head + n, *product = turned + n;
            for (int64_t t = begin; t < end; ++t) {
                load_row(element(r.other, r.dtype, t % r.angles * n), r.dtype, n, cosine);
                load_row(element(r.third, r.dtype, t % r.angles * n), r.dtype, n, sine);
                for (int64_t h = 0; h < r.heads; ++h) {
                    void* place = place_of(r.y, r.dtype, (t * r.heads + h) * n);
                    load_row(place, r.dtype, n, head);
                    for (int64_t k = 0; k < half; ++k) {
                        turned[k] = -head[half + k] * sine[k];
                        turned[half + k] = head[k] * sine[half + k];
                    }
                    for (int64_t k = 0; k < n; ++k) product[k] = head[k] * cosine[k];
                    round_row(turned, r.dtype, n);
                    round_row(product, r.dtype, n);
                    for (int64_t k = 0; k < n; ++k) product[k] += turned[k];
                    store_row(place, r.dtype, n, product);
                }
            }
        },
        &rows);
}

// e^x to about 1e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f;  // rounded to an integer, in the low bits
    int32_t bits;
    std::memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t power = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

constexpr int64_t kPiece = 1024;  // elements at a time

void gated(void* gate, const void* up, Dtype dtype, int64_t count, ParallelFor parallel_for) {
    Rows rows{nullptr, up, nullptr, gate, dtype, 0, count, 0, 0};
    parallel_for(
        0, ceil_div(count, kPiece), kElements / kPiece,
        [](int64_t begin, int64_t end, void* context) {
            const Rows& r = *static_cast<const Rows*>(context);
            float gate[kPiece], up[kPiece];
            for (int64_t i = begin * kPiece; i < smaller(r.width, end * kPiece); i += kPiece) {
                int64_t n = smaller(kPiece, r.width - i);
                load_row(place_of(r.y, r.dtype, i), r.dtype, n, gate);
                for (int64_t k = 0; k < n; ++k) gate[k] = gate[k] / (1.0f + exponential(-gate[k]));
                if (r.other) {
                    round_row(gate, r.dtype, n);
                    load_row(element(r.other, r.dtype, i), r.dtype, n, up);
                    for (int64_t k = 0; k < n; ++k) gate[k] *= up[k];
                }
                store_row(place_of(r.y, r.dtype, i), r.dtype, n, gate);
            }
        },
        &rows);
}

void add(void* y, const void* x, Dtype dtype, int64_t count, ParallelFor parallel_for) {
    Rows rows{nullptr, x, nullptr, y, dtype, 0, count, 0, 0};
    parallel_for(
        0, ceil_div(count, kPiece), kElements / kPiece,
        [](int64_t begin, int64_t end, void* context) {
            const Rows& r = *static_cast<const Rows*>(context);
            float one[kPiece], other[kPiece];
            for (int64_t i = begin * kPiece; i < smaller(r.width, end * kPiece); i += kPiece) {
                int64_t n = smaller(kPiece, r.width - i);
                load_row(place_of(r.y, r.dtype, i), r.dtype, n, one);
                load_row(element(r.other, r.dtype, i), r.dtype, n, other);
                for (int64_t k = 0; k < n; ++k) one[k] += other[k];
                store_row(place_of(r.y, r.dtype, i), r.dtype, n, one);
            }
        },
        &rows);
}

}  // namespace
