// What a decoder block does between its linears, rounded where PyTorch rounds: norms, rotary embedding, gate, residual.
#pragma once

#include "linear.h"

namespace {

constexpr int64_t kElements = 16384;  // that a thread takes at least

void* place_of(void* data, Dtype dtype, int64_t index) { return const_cast<void*>(element(data, dtype, index)); }

float sum_of_lanes(Vector16 sum) {
    float lanes[16];
    sum.store(lanes);
    for (int width = 8; width; width /= 2)
        for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return lanes[0];
}

// The sum of squares, in an order that does not depend on the instruction set.
float sum_of_squares(const float* x, int64_t count) {
    Vector16 sum = Vector16::zero();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        Vector16 v = Vector16::load(x + i);
        sum = sum.plus_product(v, v);
    }
    if (i < count) {
        float rest[16] = {};
        std::memcpy(rest, x + i, (count - i) * sizeof(float));
        Vector16 v = Vector16::load(rest);
        sum = sum.plus_product(v, v);
    }
    return sum_of_lanes(sum);
}

void norm(const void* x, const void* weight, void* y, Dtype dtype, float eps, int64_t rows, int64_t width,
          ParallelFor parallel_for) {
    struct Context {
        const void *x, *weight;
        void* y;
        Dtype dtype;
        float eps;
        int64_t width;
    } context{x, weight, y, dtype, eps, width};
    parallel_for(
        0, rows, larger(1, kElements / width),
        [](int64_t begin, int64_t end, void* pointer) {
            const Context& c = *static_cast<const Context*>(pointer);
            float* row = call_memory().y.at_least(2 * c.width);
            float* weight = row + c.width;
            load_row(c.weight, c.dtype, c.width, weight);
            for (int64_t i = begin; i < end; ++i) {
                load_row(element(c.x, c.dtype, i * c.width), c.dtype, c.width, row);
                float factor = 1.0f / std::sqrt(sum_of_squares(row, c.width) / float(c.width) + c.eps);
                for (int64_t k = 0; k < c.width; ++k) row[k] *= factor;
                round_row(row, c.dtype, c.width);
                for (int64_t k = 0; k < c.width; ++k) row[k] *= weight[k];
                store_row(place_of(c.y, c.dtype, i * c.width), c.dtype, c.width, row);
            }
        },
        &context);
}

void rotate(void* x, Dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim, const void* cosine, const void* sine,
            int64_t angles, ParallelFor parallel_for) {
    struct Context {
        void* x;
        Dtype dtype;
        int64_t heads, head_dim;
        const void *cosine, *sine;
        int64_t angles;
    } context{x, dtype, heads, head_dim, cosine, sine, angles};
    parallel_for(
        0, tokens, larger(1, kElements / (heads * head_dim)),
        [](int64_t begin, int64_t end, void* pointer) {
            const Context& c = *static_cast<const Context*>(pointer);
            int64_t n = c.head_dim, half = n / 2;
            float* cosine = call_memory().y.at_least(5 * n);
            float *sine = cosine + n, *head = sine + n, *turned = head + n, *product = turned + n;
            for (int64_t t = begin; t < end; ++t) {
                load_row(element(c.cosine, c.dtype, t % c.angles * n), c.dtype, n, cosine);
                load_row(element(c.sine, c.dtype, t % c.angles * n), c.dtype, n, sine);
                for (int64_t h = 0; h < c.heads; ++h) {
                    void* place = place_of(c.x, c.dtype, (t * c.heads + h) * n);
                    load_row(place, c.dtype, n, head);
                    for (int64_t k = 0; k < half; ++k) {
                        turned[k] = -head[half + k] * sine[k];
                        turned[half + k] = head[k] * sine[half + k];
                    }
                    for (int64_t k = 0; k < n; ++k) product[k] = head[k] * cosine[k];
                    round_row(turned, c.dtype, n);
                    round_row(product, c.dtype, n);
                    for (int64_t k = 0; k < n; ++k) product[k] += turned[k];
                    store_row(place, c.dtype, n, product);
                }
            }
        },
        &context);
}

// e^x to about 1e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
__attribute__((always_inline)) inline Vector16 exponential(Vector16 x) {
    auto all = [](float value) { return Vector16::all(value); };
    x = x.clamped(-87.0f, 88.0f);
    Vector16 n = x * all(1.44269504f) + all(12582912.0f);  // rounded to an integer, in the low bits
    Vector16 power = n.power_of_two();
    n = n - all(12582912.0f);
    Vector16 r = x - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    Vector16 p = all(1.0f / 5040);
    constexpr float kNext[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float next : kNext) p = p * r + all(next);
    return p * power;
}

float exponential(float x) {
    float lanes[16];
    exponential(Vector16::all(x)).store(lanes);
    return lanes[0];
}

constexpr int64_t kPiece = 1024;  // elements at a time, a multiple of 16

// Changes `y` in place, piece by piece: `compute(y, x, n)` gets n numbers of `y` and of `other`, if there is one.
template <class Compute>
void for_pieces(void* y, const void* other, Dtype dtype, int64_t count, ParallelFor parallel_for,
                const Compute& compute) {
    struct Context {
        void* y;
        const void* other;
        Dtype dtype;
        int64_t count;
        const Compute& compute;
    } context{y, other, dtype, count, compute};
    parallel_for(
        0, ceil_div(count, kPiece), kElements / kPiece,
        [](int64_t begin, int64_t end, void* pointer) {
            const Context& c = *static_cast<const Context*>(pointer);
            float own[kPiece], other[kPiece];
            for (int64_t i = begin * kPiece; i < smaller(c.count, end * kPiece); i += kPiece) {
                int64_t n = smaller(kPiece, c.count - i);
                load_row(place_of(c.y, c.dtype, i), c.dtype, n, own);
                if (c.other) load_row(element(c.other, c.dtype, i), c.dtype, n, other);
                c.compute(own, other, n);
                store_row(place_of(c.y, c.dtype, i), c.dtype, n, own);
            }
        },
        &context);
}

void gated(void* gate, const void* up, Dtype dtype, int64_t count, ParallelFor parallel_for) {
    for_pieces(gate, up, dtype, count, parallel_for, [=](float* x, const float* factor, int64_t n) {
        std::memset(x + n, 0, (round_up(n, 16) - n) * sizeof(float));  // there is room
        for (int64_t k = 0; k < n; k += 16) {
            Vector16 v = Vector16::load(x + k);
            (v / (Vector16::all(1.0f) + exponential(Vector16::zero() - v))).store(x + k);
        }
        if (!up) return;
        round_row(x, dtype, n);
        for (int64_t k = 0; k < n; ++k) x[k] *= factor[k];
    });
}

void add(void* y, const void* x, Dtype dtype, int64_t count, ParallelFor parallel_for) {
    for_pieces(y, x, dtype, count, parallel_for, [](float* sum, const float* part, int64_t n) {
        for (int64_t k = 0; k < n; ++k) sum[k] += part[k];
    });
}

}  // namespace
