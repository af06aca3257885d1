// The attention of one new token per sequence over the positions of a cache. Everything is float32 between the inputs
// and the rounded output. Positions are taken in parts of a fixed size, each with a maximum of its own, and the parts are
// put together in order, so that the result does not depend on the number of threads.
#pragma once

#include "elementwise.h"

namespace {

using quad::Attention;

constexpr int64_t kPart = 256;  // positions at a time

// What the heads of one part found: for each head its greatest score, the sum of its weights, and the weighted values.
struct PartResult {
    float* greatest;  // [heads]
    float* sum;       // [heads]
    float* output;    // [heads][padded head_dim]

    static int64_t size(int64_t heads, int64_t padded) { return heads * (2 + padded); }
    static PartResult at(float* memory, int64_t heads) { return {memory, memory + heads, memory + 2 * heads}; }
};

struct AttentionMemory {
    PanelMemory panel;
    Buffer<float> query, score, rows, parts;
};

AttentionMemory& attention_memory() {
    thread_local AttentionMemory memory;
    return memory;
}

struct AttentionCall {
    const Attention& a;
    int64_t shared;  // heads that share a cached one
    int64_t padded;  // head_dim, filled up
    int64_t parts;
    float* results;

    int64_t unit_size() const { return PartResult::size(shared, padded); }
};

// score[h][i] = scale * query[h] . key[i], minus infinity behind the mask and the last position; [shared][kPart].
void scores(const AttentionCall& call, int64_t sequence, int64_t cached, int64_t begin, int64_t end, float* score) {
    const Attention& a = call.a;
    AttentionMemory& memory = attention_memory();
    float* query = memory.query.at_least(call.shared * call.padded);
    for (int64_t h = 0; h < call.shared; ++h) {
        int64_t row = (sequence * a.heads + cached * call.shared + h) * a.head_dim;
        load_row(element(a.query, a.dtype, row), a.dtype, a.head_dim, query + h * call.padded);
        std::memset(query + h * call.padded + a.head_dim, 0, (call.padded - a.head_dim) * sizeof(float));
    }
    float* block = memory.rows.at_least(call.shared * kChannels);
    for (int64_t i = begin; i < end; i += kChannels) {
        int64_t row = ((sequence * a.cached_heads + cached) * a.capacity + i) * a.head_dim, count = end - i;
        // Whole panels are quicker: what lies behind the last position is multiplied, and not looked at.
        Panel panel = memory.panel.of(element(a.keys, a.dtype, row), a.dtype, smaller(kChannels, a.capacity - i),
                                      a.head_dim, call.padded);
        std::memset(block, 0, call.shared * kChannels * sizeof(float));
        add_products(panel, query, {call.padded, a.head_dim}, call.shared, block);
        const uint8_t* mask = a.mask ? a.mask + sequence * a.positions + i : nullptr;
        for (int64_t h = 0; h < call.shared; ++h)
            for (int64_t k = 0; k < kChannels; ++k) {
                bool seen = k < count && (!mask || mask[k]);
                score[h * kPart + i - begin + k] = seen ? block[h * kChannels + k] * a.scale : -INFINITY;
            }
    }
}

// The greatest of `count` scores, a multiple of 16, and `least`; NaN is passed over.
float greatest_of(const float* score, int64_t count, float least) {
    Vector16 top = Vector16::all(least);
    for (int64_t i = 0; i < count; i += kChannels) top = top.or_greater(Vector16::load(score + i));
    return top.greatest();
}

// Turns `count` scores, a multiple of 16, into weights: e^(score - greatest), 0 where nobody looks. Returns their sum.
float weigh(float* score, int64_t count, float greatest) {
    Vector16 sum = Vector16::zero();
    for (int64_t i = 0; i < count; i += kChannels) {
        Vector16 own = Vector16::load(score + i);
        Vector16 weight = exponential(own - Vector16::all(greatest)).zero_where(own, -INFINITY);
        weight.store(score + i);
        sum = sum + weight;
    }
    return sum.total();
}

// output[h] += sum over positions, in order, of weight[h][i] * value[i].
void add_values(const AttentionCall& call, int64_t sequence, int64_t cached, int64_t begin, int64_t end,
                const float* weight, float* output) {
    const Attention& a = call.a;
    float* rows = attention_memory().rows.at_least(kChannels * call.padded);
    std::memset(rows, 0, kChannels * call.padded * sizeof(float));
    for (int64_t i = begin; i < end; i += kChannels) {
        int64_t count = smaller(kChannels, end - i);
        int64_t row = ((sequence * a.cached_heads + cached) * a.capacity + i) * a.head_dim;
        for (int64_t k = 0; k < count; ++k)
            load_row(element(a.values, a.dtype, row + k * a.head_dim), a.dtype, a.head_dim, rows + k * call.padded);
        for (int64_t h = 0; h < call.shared; ++h)
            for (int64_t d = 0; d < call.padded; d += kChannels) {
                float* place = output + h * call.padded + d;
                Vector16 sum = Vector16::load(place);
                for (int64_t k = 0; k < count; ++k)
                    sum = sum.plus_product(Vector16::all(weight[h * kPart + i - begin + k]),
                                           Vector16::load(rows + k * call.padded + d));
                sum.store(place);
            }
    }
}

// One part of the positions, for the heads that share a cached one.
void attend_part(const AttentionCall& call, int64_t unit) {
    int64_t part = unit % call.parts, cached = unit / call.parts % call.a.cached_heads;
    int64_t sequence = unit / call.parts / call.a.cached_heads;
    int64_t begin = part * kPart, end = smaller(call.a.positions, begin + kPart);
    PartResult result = PartResult::at(call.results + unit * call.unit_size(), call.shared);
    float* score = attention_memory().score.at_least(call.shared * kPart);
    scores(call, sequence, cached, begin, end, score);
    const int64_t count = round_up(end - begin, kChannels);
    for (int64_t h = 0; h < call.shared; ++h) {
        result.greatest[h] = greatest_of(score + h * kPart, count, -INFINITY);
        result.sum[h] = weigh(score + h * kPart, count, result.greatest[h]);
    }
    std::memset(result.output, 0, call.shared * call.padded * sizeof(float));
    add_values(call, sequence, cached, begin, end, score, result.output);
}

// Puts the parts of one head together.
void join_parts(const AttentionCall& call, int64_t sequence, int64_t head) {
    const Attention& a = call.a;
    float* units = call.results + (sequence * a.cached_heads + head / call.shared) * call.parts * call.unit_size();
    int64_t h = head % call.shared;
    float most = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < call.parts; ++p) {
        float greatest = PartResult::at(units + p * call.unit_size(), call.shared).greatest[h];
        most = greatest > most ? greatest : most;
    }
    float* output = attention_memory().rows.at_least(call.padded);
    std::memset(output, 0, call.padded * sizeof(float));
    for (int64_t p = 0; p < call.parts; ++p) {
        PartResult result = PartResult::at(units + p * call.unit_size(), call.shared);
        if (result.greatest[h] == -INFINITY && result.sum[h] == 0.0f) continue;  // nothing to see there
        float factor = exponential(result.greatest[h] - most);
        total += factor * result.sum[h];
        for (int64_t d = 0; d < a.head_dim; ++d) output[d] += factor * result.output[h * call.padded + d];
    }
    for (int64_t d = 0; d < a.head_dim; ++d) output[d] = total == 0.0f ? 0.0f : output[d] / total;
    store_row(place_of(a.output, a.dtype, (sequence * a.heads + head) * a.head_dim), a.dtype, a.head_dim, output);
}

AttentionCall attention_call(const Attention& attention) {
    return {attention, attention.heads / attention.cached_heads, round_up(attention.head_dim, kRank),
            ceil_div(attention.positions, kPart), nullptr};
}

int64_t unit_count(const AttentionCall& call) { return call.a.batch * call.a.cached_heads * call.parts; }

void join_heads(const AttentionCall& call) {
    for (int64_t s = 0; s < call.a.batch; ++s)
        for (int64_t h = 0; h < call.a.heads; ++h) join_parts(call, s, h);
}

void attend(const Attention& attention, ParallelFor parallel_for) {
    AttentionCall call = attention_call(attention);
    int64_t units = unit_count(call);
    call.results = attention_memory().parts.at_least(units * call.unit_size());
    int64_t work = call.shared * call.padded * smaller(attention.positions, kPart);
    parallel_for(
        0, units, larger(1, kElements / work),
        [](int64_t begin, int64_t end, void* context) {
            for (int64_t unit = begin; unit < end; ++unit)
                attend_part(*static_cast<const AttentionCall*>(context), unit);
        },
        &call);
    join_heads(call);
}

}  // namespace
