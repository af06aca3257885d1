// The attention of the positions of a prompt: each sees itself and those before it, or what a mask lets it see. Keys are
// taken 64 at a time; a row keeps the greatest score so far, the sum of its weights and the weighted values, and is
// scaled anew when a greater one comes (online softmax). Everything is float32 between the inputs and the rounded output.
// A row's numbers depend on nothing but its query and the keys it sees, and on which 64 they lie in: not on batch,
// threads or instruction set, and not on whether a mask says what goes without one.
#pragma once

#include "attention.h"

namespace {

using quad::Prompt;

constexpr int64_t kQueries = 48;  // positions of a unit of work, for all heads that share a cached one
constexpr int64_t kKeys = 64;     // positions that are seen at a time
#ifdef __AVX512F__
constexpr int kRows = 8;  // queries that share what is read of keys and values, as many as there are registers for
#else
constexpr int kRows = 6;
#endif

// Of 64 keys those that a position sees: [begin, end), and, where `torn`, not all between.
struct Seen {
    int64_t begin, end;
    bool torn;

    int64_t count() const { return end - begin; }
};

struct PromptMemory {
    Buffer<float> query, output, greatest, sum, keys, values, rows, score;
    Seen seen[kQueries];
};

PromptMemory& prompt_memory() {
    thread_local PromptMemory memory;
    return memory;
}

struct PromptCall {
    const Prompt& p;
    int64_t shared;     // heads that share a cached one
    int64_t padded;     // head_dim, filled up to whole vectors
    int64_t stretches;  // of queries
};

// The queries of a unit, and what their rows have gathered: [shared][count] rows.
struct PromptRows {
    float* query;     // [rows][padded], multiplied by the scale
    float* output;    // [rows][padded]
    float* greatest;  // [rows]
    float* sum;       // [rows]
    int64_t first, count;  // positions
};

// Keys [begin, begin + 64) of a head.
struct PromptKeys {
    const float* panels;  // [64 / 16][head_dim][16]
    const float* values;  // [64][padded]
    const Seen* seen;     // of each position of the unit
    const uint8_t* mask;  // of the unit's first position and the first key, or null
};

// score[t][k] = query[t] . key[k] for T rows and the 64 keys of `panels`.
template <int T>
void score_rows(const float* query, const float* panels, int64_t head_dim, int64_t padded, float* score) {
    for (int64_t k = 0; k < kKeys; k += kChannels, panels += head_dim * kChannels) {
        Vector16 sum[T];
        for (int t = 0; t < T; ++t) sum[t] = Vector16::zero();
        for (int64_t d = 0; d < head_dim; ++d) {
            Vector16 key = Vector16::load(panels + d * kChannels);
            for (int t = 0; t < T; ++t) sum[t] = sum[t].plus_product(Vector16::all(query[t * padded + d]), key);
        }
        for (int t = 0; t < T; ++t) sum[t].store(score + t * kKeys + k);
    }
}

// Turns the scores of a row into weights and takes them into its greatest and sum; `mask` is that of these keys, or null.
// Returns by what the row has to be multiplied that was gathered before.
float weigh_row(float* score, const Seen& seen, const uint8_t* mask, float* greatest, float* sum) {
    if (!seen.count()) return 1.0f;
    for (int64_t k = 0; k < seen.begin; ++k) score[k] = -INFINITY;
    for (int64_t k = seen.end; k < kKeys; ++k) score[k] = -INFINITY;
    for (int64_t k = seen.begin; seen.torn && k < seen.end; ++k)
        if (!mask[k]) score[k] = -INFINITY;
    const float before = *greatest;
    *greatest = greatest_of(score, kKeys, before);
    const float factor = before == *greatest ? 1.0f : exponential(before - *greatest);
    *sum = *sum * factor + weigh(score, kKeys, *greatest);
    return factor;
}

// output[t] = output[t] * factor[t] + weights[t] values, for T rows; the values of `count` keys, [keys][padded].
template <int T>
void value_rows(const float* weight, int64_t count, const float* values, const float* factor, int64_t padded,
                float* output) {
    for (int64_t d = 0; d < padded; d += kChannels) {
        Vector16 sum[T];
        for (int t = 0; t < T; ++t) sum[t] = Vector16::load(output + t * padded + d) * Vector16::all(factor[t]);
        for (int64_t k = 0; k < count; ++k) {
            Vector16 value = Vector16::load(values + k * padded + d);
            for (int t = 0; t < T; ++t) sum[t] = sum[t].plus_product(Vector16::all(weight[t * kKeys + k]), value);
        }
        for (int t = 0; t < T; ++t) sum[t].store(output + t * padded + d);
    }
}

// Adds the values of the keys that one row sees, in order; what it does not see may be no number.
void value_row(const PromptCall& call, const float* weight, const Seen& seen, const uint8_t* mask, const float* values,
               float factor, float* output) {
    for (int64_t begin = seen.begin, end; begin < seen.end; begin = end) {
        while (seen.torn && !mask[begin]) ++begin;  // the last key that it sees lies before the end
        for (end = begin + 1; end < seen.end && !(seen.torn && !mask[end]);) ++end;
        value_rows<1>(weight + begin, end - begin, values + begin * call.padded, &factor, call.padded, output);
        factor = 1.0f;
    }
}

// Rows [row, row + T) of a head meet keys, of which at least one of them sees one. `position` is that of the first.
template <int T>
void meet_tile(const PromptCall& call, const PromptRows& rows, const PromptKeys& keys, int64_t row, int64_t position) {
    float *score = prompt_memory().score.at_least(kRows * kKeys), factor[T];
    score_rows<T>(rows.query + row * call.padded, keys.panels, call.p.head_dim, call.padded, score);
    const Seen* seen = keys.seen + position;
    const uint8_t* mask[T] = {};
    int64_t begin = 0, end = kKeys;  // what all of them see
    for (int t = 0; t < T; ++t) {
        if (keys.mask) mask[t] = keys.mask + (position + t) * call.p.mask.position;
        begin = larger(begin, seen[t].begin);
        end = seen[t].torn ? 0 : smaller(end, seen[t].end);
        factor[t] = weigh_row(score + t * kKeys, seen[t], mask[t], rows.greatest + row + t, rows.sum + row + t);
    }
    float* output = rows.output + row * call.padded;
    auto add = [&](int t, const Seen& part) {
        value_row(call, score + t * kKeys, part, mask[t], keys.values, factor[t], output + t * call.padded);
    };
    if (begin >= end) {
        for (int t = 0; t < T; ++t) add(t, seen[t]);
        return;
    }
    for (int t = 0; t < T; ++t) {
        if (seen[t].begin == begin) continue;
        add(t, {seen[t].begin, begin, false});
        factor[t] = 1.0f;
    }
    value_rows<T>(score + begin, end - begin, keys.values + begin * call.padded, factor, call.padded, output);
    for (int t = 0; t < T; ++t) {
        factor[t] = 1.0f;
        add(t, {end, seen[t].end, false});
    }
}

// Rows [row, end) of one head, positions from `position` on.
template <int T = kRows>
void meet_keys(const PromptCall& call, const PromptRows& rows, const PromptKeys& keys, int64_t row, int64_t end,
               int64_t position) {
    if constexpr (T > 0) {
        for (; row + T <= end; row += T, position += T) {
            int64_t most = 0;
            for (int t = 0; t < T; ++t) most = larger(most, keys.seen[position + t].count());
            if (most) meet_tile<T>(call, rows, keys, row, position);
        }
        if (row < end) meet_keys<T - 1>(call, rows, keys, row, end, position);
    }
}

constexpr uint8_t kNone[kKeys] = {};  // a mask that shows nothing

// Finds out what the positions of a unit see of the keys [begin, begin + 64). Returns whether any sees one of them.
bool look(const PromptRows& rows, const uint8_t* mask, const Prompt& p, int64_t begin, Seen* seen) {
    const int64_t count = smaller(kKeys, p.key_count - begin);
    bool any = false;
    for (int64_t i = 0; i < rows.count; ++i) {
        Seen own{0, larger(0, smaller(count, rows.first + i + 1 - begin)), false};
        if (mask) {
            const uint8_t* row = mask + i * p.mask.position;
            own.end = std::memcmp(row, kNone, count) == 0 ? 0 : count;
            while (own.begin < own.end && !row[own.begin]) ++own.begin;
            while (own.begin < own.end && !row[own.end - 1]) --own.end;
            own.torn = std::memchr(row + own.begin, 0, own.count()) != nullptr;
        }
        seen[i] = own;
        any = any || own.count();
    }
    return any;
}

// Brings keys to panels and their values to rows; zeros behind the last position.
void bring_keys(const PromptCall& call, int64_t sequence, int64_t cached, int64_t begin, PromptKeys& brought) {
    const Prompt& p = call.p;
    PromptMemory& memory = prompt_memory();
    float* panels = memory.keys.at_least(kKeys * call.padded);
    float* values = memory.values.at_least(kKeys * call.padded);
    float* rows = memory.rows.at_least(kChannels * call.padded);
    const int64_t count = smaller(kKeys, p.key_count - begin);
    auto load = [&](const quad::Heads& heads, int64_t k, float* row) {
        int64_t index = sequence * heads.sequence + cached * heads.head + (begin + k) * heads.position;
        load_row(element(heads.data, p.dtype, index), p.dtype, p.head_dim, row);
    };
    if (p.head_dim < call.padded || count < kKeys) {
        std::memset(values, 0, kKeys * call.padded * sizeof(float));
        std::memset(rows, 0, kChannels * call.padded * sizeof(float));
    }
    for (int64_t k = 0; k < count; ++k) load(p.values, k, values + k * call.padded);
    float* panel = panels;
    for (int64_t first = 0; first < kKeys; first += kChannels, panel += p.head_dim * kChannels) {
        for (int64_t k = 0; k < kChannels; ++k) {
            if (first + k < count) load(p.keys, first + k, rows + k * call.padded);
            else std::memset(rows + k * call.padded, 0, p.head_dim * sizeof(float));
        }
        const int64_t whole = p.head_dim / 4 * 4;
        for (int64_t d = 0; d < whole; d += 4)
            transpose4(reinterpret_cast<const char*>(rows + d), call.padded * sizeof(float),
                       reinterpret_cast<uint32_t*>(panel + d * kChannels));
        for (int64_t d = whole; d < p.head_dim; ++d)
            for (int64_t k = 0; k < kChannels; ++k) panel[d * kChannels + k] = rows[k * call.padded + d];
    }
    brought.panels = panels;
    brought.values = values;
}

// A stretch of queries of the heads that share a cached one.
void attend_stretch(const PromptCall& call, int64_t unit) {
    const Prompt& p = call.p;
    int64_t stretch = unit % call.stretches, cached = unit / call.stretches % p.cached_heads;
    const int64_t sequence = unit / call.stretches / p.cached_heads;
    // First and last in turns: later ones see more, and each thread takes neighbours.
    stretch = stretch % 2 ? call.stretches - 1 - stretch / 2 : stretch / 2;
    PromptMemory& memory = prompt_memory();
    PromptRows rows{};
    rows.first = stretch * kQueries;
    rows.count = smaller(kQueries, p.positions - rows.first);
    const int64_t all = call.shared * rows.count;
    rows.query = memory.query.at_least(all * call.padded);
    rows.output = memory.output.at_least(all * call.padded);
    rows.greatest = memory.greatest.at_least(all);
    rows.sum = memory.sum.at_least(all);
    std::memset(rows.output, 0, all * call.padded * sizeof(float));
    for (int64_t row = 0; row < all; ++row) {
        rows.greatest[row] = -INFINITY;
        rows.sum[row] = 0.0f;
        int64_t head = cached * call.shared + row / rows.count, position = rows.first + row % rows.count;
        float* query = rows.query + row * call.padded;
        load_row(element(p.query.data, p.dtype,
                         sequence * p.query.sequence + head * p.query.head + position * p.query.position),
                 p.dtype, p.head_dim, query);
        for (int64_t d = 0; d < p.head_dim; ++d) query[d] *= p.scale;
    }
    const int64_t end = p.mask.data ? p.key_count : rows.first + rows.count;
    for (int64_t begin = 0; begin < end; begin += kKeys) {
        PromptKeys keys{};
        if (p.mask.data) keys.mask = p.mask.data + sequence * p.mask.sequence + rows.first * p.mask.position + begin;
        keys.seen = memory.seen;
        if (!look(rows, keys.mask, p, begin, memory.seen)) continue;
        bring_keys(call, sequence, cached, begin, keys);
        for (int64_t h = 0; h < call.shared; ++h)
            meet_keys(call, rows, keys, h * rows.count, (h + 1) * rows.count, 0);
    }
    for (int64_t row = 0; row < all; ++row) {
        float* output = rows.output + row * call.padded;
        int64_t head = cached * call.shared + row / rows.count, position = rows.first + row % rows.count;
        if (rows.sum[row] != 0.0f)  // it is where nothing is seen: zeros, as in PyTorch
            for (int64_t d = 0; d < p.head_dim; ++d) output[d] /= rows.sum[row];
        int64_t index = ((sequence * p.positions + position) * p.heads + head) * p.head_dim;
        store_row(place_of(p.output, p.dtype, index), p.dtype, p.head_dim, output);
    }
}

void attend_prompt(const Prompt& prompt, ParallelFor parallel_for) {
    PromptCall call{prompt, prompt.heads / prompt.cached_heads, round_up(prompt.head_dim, kChannels),
                    ceil_div(prompt.positions, kQueries)};
    parallel_for(
        0, prompt.batch * prompt.cached_heads * call.stretches, 1,
        [](int64_t begin, int64_t end, void* context) {
            for (int64_t unit = begin; unit < end; ++unit)
                attend_stretch(*static_cast<const PromptCall*>(context), unit);
        },
        &call);
}

}  // namespace
