// All blocks of a decoder for a token of each sequence, in one parallel region. Every thread does what is short (norms,
// rotation, quantization, residuals) for itself, and its part of what is long (channels of the linears, heads of the
// attention); then all wait for each other. That is quicker than to begin a region for each linear, and to let the other
// threads wait while one does the rest.
//
// The functions are those of the operators on one block or one linear, so the bits are the same.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"

namespace {

using quad::Decode;
using quad::DecodeBlock;
using quad::Group;

constexpr uint64_t kSpin = 200000;  // cycles that a thread waits awake, 80 us at 2.5 GHz

// The threads of one call. `expected` is what was asked for; `members` is how many came.
struct Team {
    int32_t expected;
    int32_t announced = 0;
    int32_t members = 0;
    int32_t waiting = 0;
    int32_t phase = 0;
    int32_t asleep = 0;
    int32_t failed = 0;

    // Returns when `word` is no longer `value`. On a busy machine the others may not be running: a thread that went on
    // looking would only use up its own share of the processor, and be taken off it when it has work.
    void wait_for_change(int32_t* word, int32_t value) {
        for (uint64_t start = __rdtsc(); __atomic_load_n(word, __ATOMIC_ACQUIRE) == value;) {
            if (__atomic_load_n(&failed, __ATOMIC_RELAXED)) throw std::bad_alloc();
            if (__rdtsc() - start < kSpin) {
                _mm_pause();
                continue;
            }
            __atomic_add_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
            __atomic_sub_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
        }
    }

    void wake(int32_t* word) {
        if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }

    void fail() {
        __atomic_store_n(&failed, 1, __ATOMIC_SEQ_CST);
        // Whoever is about to sleep looks at the word once more.
        __atomic_add_fetch(&phase, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&announced, expected, __ATOMIC_SEQ_CST);
        wake(&phase);
        wake(&announced);
    }
};

// A thread's place in its team.
struct Seat {
    Team* team;
    int64_t index;
    int64_t size;

    // A thread may be given the places of several: how many there are is known when all places are taken.
    void take(int64_t places) {
        index = __atomic_fetch_add(&team->members, 1, __ATOMIC_SEQ_CST);
        int32_t found = __atomic_add_fetch(&team->announced, int32_t(places), __ATOMIC_SEQ_CST);
        team->wake(&team->announced);
        for (; found < team->expected; found = __atomic_load_n(&team->announced, __ATOMIC_SEQ_CST))
            team->wait_for_change(&team->announced, found);
        size = __atomic_load_n(&team->members, __ATOMIC_SEQ_CST);
    }

    // Returns when every thread of the team has come here; all that they wrote before can be read then.
    void wait() const {
        if (size == 1) return;
        int32_t phase = __atomic_load_n(&team->phase, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&team->waiting, 1, __ATOMIC_ACQ_REL) < size)
            return team->wait_for_change(&team->phase, phase);
        __atomic_store_n(&team->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->phase, phase + 1, __ATOMIC_SEQ_CST);
        team->wake(&team->phase);
    }

    // This thread's part of `count` items.
    void part(int64_t count, int64_t* begin, int64_t* end) const {
        *begin = count * index / size;
        *end = count * (index + 1) / size;
    }
};

thread_local const Seat* own_seat = nullptr;

// A `ParallelFor` that all threads of a team call at the same place.
void share(int64_t begin, int64_t end, int64_t, quad::Body body, void* context) {
    int64_t from, to;
    own_seat->part(end - begin, &from, &to);
    if (from < to) body(begin + from, begin + to, context);
    own_seat->wait();
}

// One for what every thread does itself.
void alone(int64_t begin, int64_t end, int64_t, quad::Body body, void* context) { body(begin, end, context); }

struct DecodeMemory {
    Buffer<char> shared, own;
    Buffer<float> attention;
};

DecodeMemory& decode_memory() {
    thread_local DecodeMemory memory;
    return memory;
}

// Hands out parts of some memory, as wide as a token's numbers; of none it counts the bytes.
struct Places {
    const Decode& call;
    char* memory;
    int64_t used = 0;

    void* take(int64_t width) {
        void* place = memory ? memory + used : nullptr;
        used += round_up(call.tokens * width * size_of(call.dtype), kLine);
        return place;
    }
};

// Where outputs of linears lie, which every thread reads. Blocks are of one size.
struct SharedPlaces {
    void *queries, *keys, *values, *output, *gate, *up, *down;

    SharedPlaces(Places& places, const DecodeBlock& block) {
        queries = places.take(block.qkv.width(0));
        keys = places.take(block.qkv.width(1));
        values = places.take(block.qkv.width(2));
        output = places.take(places.call.width);
        gate = places.take(block.gate_up.width(0));
        up = places.take(block.gate_up.width(1));
        down = places.take(places.call.width);
    }
};

// Where a thread keeps what it computes for itself.
struct OwnPlaces {
    void *x, *normed, *hidden, *queries, *keys, *attended;

    OwnPlaces(Places& places, const DecodeBlock& block) {
        x = places.take(places.call.width);
        normed = places.take(places.call.width);
        hidden = places.take(places.call.width);
        queries = places.take(block.qkv.width(0));
        keys = places.take(block.qkv.width(1));
        attended = places.take(block.qkv.width(0));
    }
};

// Places of either kind, in memory that is made for them.
template <class Kind>
Kind places_in(Buffer<char>& memory, const Decode& call) {
    Places counted{call, nullptr};
    Kind(counted, call.blocks[0]);
    Places places{call, memory.at_least(counted.used)};
    return Kind(places, call.blocks[0]);
}

// What one thread knows.
struct DecodeThread {
    const Decode& call;
    const Seat& seat;
    ParallelFor parallel_for;  // `share`; that of PyTorch for a thread without a team
    SharedPlaces shared;
    OwnPlaces own;
    float* attention_results;

    Input input_of(const Group& group, const void* x) const {
        Input input = group.input;
        input.data = x;
        input.tokens = call.tokens;
        return input;
    }

    // Applies linears that share an input; member i writes to outputs[i].
    void linears(const Group& group, const void* x, void* const* outputs) const {
        Input input = input_of(group, x);
        Member members[3];
        for (int64_t i = 0; i < group.count; ++i) {
            members[i] = group.members[i];
            members[i].output = {outputs[i], call.dtype};
        }
        linear(&input, nullptr, members, group.count, parallel_for);
    }

    // gate = silu(gate) * up. A thread of a team takes the same channels of both, so that it need not wait in between.
    void gate_and_up(const Group& group, const void* x, void* gate, void* up) const {
        int64_t width = group.width(0);
        if (parallel_for != share) {
            void* outputs[] = {gate, up};
            linears(group, x, outputs);
            return gated(gate, up, call.dtype, call.tokens * width, parallel_for);
        }
        int64_t begin, end;
        seat.part(ceil_div(width, kChannels), &begin, &end);
        if (begin < end) {
            Input input = input_of(group, x);
            Member members[2] = {group.members[0], group.members[1]};
            members[0].output = {gate, call.dtype};
            members[1].output = {up, call.dtype};
            Call whole{};
            whole.input = &input;
            whole.members = members;
            whole.member_count = 2;
            whole.select(members[0], 0);
            whole.count = call.tokens;
            whole.largest = largest_of(input);
            CallMemory& memory = call_memory();
            place_all(whole, begin, memory);
            for (int64_t i = 0; i < 2; ++i) {
                whole.select(members[i], i);
                place_branch(whole, 0, whole.count, memory);
                direct_blocks(whole, begin, end, memory);
            }
            int64_t first = begin * kChannels, count = smaller(width, end * kChannels) - first;
            for (int64_t t = 0; t < call.tokens; ++t)
                gated(place_of(gate, call.dtype, t * width + first), element(up, call.dtype, t * width + first),
                      call.dtype, count, alone);
        }
        seat.wait();
    }

    void rotated(const DecodeBlock& block, void* const* states) const {
        for (int i = 0; i < 2; ++i) {
            int64_t heads = i ? call.cached_heads : call.heads;
            if (block.head_norms[i])
                norm(states[i], block.head_norms[i], states[i], call.dtype, call.eps, call.tokens * heads,
                     call.head_dim, alone);
            rotate(states[i], call.dtype, call.tokens, heads, call.head_dim, call.cosine, call.sine, call.angles, alone);
        }
    }

    // Writes the attention of queries `states[0]`; keys and values `states[1]` and `[2]` go into the cache first, each head's
    // by whoever looks at its last positions.
    void attention(const DecodeBlock& block, void* const* states, void* output) const {
        quad::Attention a{states[0],    output,         call.dtype,         call.tokens,    call.heads,
                          call.head_dim, block.keys,    block.values,       call.cached_heads, block.capacity,
                          call.position + 1, call.mask, call.scale};
        AttentionCall attention = attention_call(a);
        attention.results = attention_results;
        struct Context {
            const AttentionCall& attention;
            const DecodeThread& thread;
            const DecodeBlock& block;
            void* const* states;
        } context{attention, *this, block, states};
        parallel_for(
            0, unit_count(attention), 1,
            [](int64_t begin, int64_t end, void* pointer) {
                const Context& c = *static_cast<const Context*>(pointer);
                for (int64_t unit = begin; unit < end; ++unit) {
                    if (unit % c.attention.parts == c.attention.parts - 1)
                        c.thread.write_position(c.block, unit / c.attention.parts, c.states);
                    attend_part(c.attention, unit);
                }
            },
            &context);
        join_heads(attention);
    }

    // `row` counts the cached heads of all sequences.
    void write_position(const DecodeBlock& block, int64_t row, void* const* states) const {
        int64_t size = call.head_dim * size_of(call.dtype), target = (row * block.capacity + call.position) * size;
        std::memcpy(static_cast<char*>(block.keys) + target, static_cast<char*>(states[1]) + row * size, size);
        std::memcpy(static_cast<char*>(block.values) + target, static_cast<char*>(states[2]) + row * size, size);
    }

    // y = result + x for all tokens, in memory of this thread.
    void residual(void* y, const void* result, const void* x) const {
        std::memcpy(y, result, call.tokens * call.width * size_of(call.dtype));
        add(y, x, call.dtype, call.tokens * call.width, alone);
    }

    void run() const {
        const int64_t size = size_of(call.dtype), all = call.tokens * call.width * size;
        const int64_t queries = call.tokens * call.heads * call.head_dim * size;
        const int64_t keys = call.tokens * call.cached_heads * call.head_dim * size;
        void* const qkv[] = {shared.queries, shared.keys, shared.values};
        void* const turned[] = {own.queries, own.keys, shared.values};
        std::memcpy(own.x, call.x, all);
        for (int64_t i = 0; i < call.block_count; ++i) {
            const DecodeBlock& block = call.blocks[i];
            norm(own.x, block.norm_in, own.normed, call.dtype, call.eps, call.tokens, call.width, alone);
            linears(block.qkv, own.normed, qkv);
            std::memcpy(own.queries, shared.queries, queries);
            std::memcpy(own.keys, shared.keys, keys);
            rotated(block, turned);
            attention(block, turned, own.attended);
            linears(block.output, own.attended, &shared.output);
            residual(own.hidden, shared.output, own.x);
            norm(own.hidden, block.norm_out, own.normed, call.dtype, call.eps, call.tokens, call.width, alone);
            gate_and_up(block.gate_up, own.normed, shared.gate, shared.up);
            linears(block.down, shared.gate, &shared.down);
            residual(own.x, shared.down, own.hidden);
        }
        if (seat.index == 0) std::memcpy(call.y, own.x, all);
    }
};

void decode(const Decode& call, ParallelFor parallel_for) {
    DecodeMemory& memory = decode_memory();
    quad::Attention a{};
    a.heads = call.heads, a.cached_heads = call.cached_heads, a.head_dim = call.head_dim;
    a.batch = call.tokens, a.positions = call.position + 1;
    AttentionCall attention = attention_call(a);
    SharedPlaces shared = places_in<SharedPlaces>(memory.shared, call);
    float* results = memory.attention.at_least(unit_count(attention) * attention.unit_size());
    if (call.tokens > Product::kDirect || call.threads == 1) {
        Seat seat{nullptr, 0, 1};
        ParallelFor inner = call.threads == 1 ? alone : parallel_for;
        DecodeThread{call, seat, inner, shared, places_in<OwnPlaces>(memory.own, call), results}.run();
        return;
    }
    struct Context {
        const Decode& call;
        Team team;
        SharedPlaces shared;
        float* results;
    } context{call, {int32_t(call.threads)}, shared, results};
    parallel_for(
        0, call.threads, 1,
        [](int64_t begin, int64_t end, void* pointer) {
            Context& c = *static_cast<Context*>(pointer);
            Seat seat{&c.team, 0, 1};
            own_seat = &seat;
            try {
                seat.take(end - begin);
                OwnPlaces own = places_in<OwnPlaces>(decode_memory().own, c.call);
                DecodeThread{c.call, seat, share, c.shared, own, c.results}.run();
            } catch (...) {
                c.team.fail();
                own_seat = nullptr;
                throw;
            }
            own_seat = nullptr;
        },
        &context);
}

}  // namespace
