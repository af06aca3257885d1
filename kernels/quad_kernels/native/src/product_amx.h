// Products of many tokens with AMX: tiles of 16 tokens x 64 inputs times 64 inputs x 16 channels. Belongs into linear.h.

constexpr int64_t kUnit = 2;     // blocks of channels that a thread takes at once: two tiles wide
constexpr int64_t kTokens = 32;  // two tiles high

// Shapes the tile registers for as long as a thread multiplies; oneDNN shapes them for itself.
class TileSession {
  public:
    TileSession() {
        alignas(64) struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~TileSession() { _tile_release(); }
};

// A stretch of inputs with one scale must be whole tiles.
bool takes_amx(const Call& call) { return call.tokens.sums == 1 || call.stretch() % kChunk == 0; }

// Outliers in bfloat16, where the weights have that too: the products are exact then, as with float32.
uint16_t* room_for_outlier16(CallMemory& memory, const Call& call) {
    Dtype dtype = call.input ? call.input->dtype : call.rest->outlier_dtype;
    bool fits = call.tokens.rank && call.rest->outlier_weight_dtype == Dtype::bfloat16 && dtype == Dtype::bfloat16;
    return fits && takes_amx(call) ? memory.outlier16.at_least(call.tokens.rank * call.tokens.count) : nullptr;
}

void place_outlier16(const Call& call, int64_t i) {
    const Tokens& tokens = call.tokens;
    for (int64_t k = 0; k < tokens.rank; k += kRank)
        store_row(call.outlier16 + (k * tokens.count + i * kRank), Dtype::bfloat16, kRank,
                  tokens.outlier + i * tokens.rank + k);
}

// Likewise what branches multiply, which is rounded to the dtype of the input: where all of them have bfloat16.
uint16_t* room_for_branch16(CallMemory& memory, const Call& call) {
    bool fits = call.branch && call.input->dtype == Dtype::bfloat16 && takes_amx(call);
    for (int64_t m = 0; m < call.member_count; ++m) {
        const Rest& rest = call.members[m].rest;
        fits = fits && (!rest.branch_rank || rest.branch_dtype == Dtype::bfloat16);
    }
    return fits ? memory.branch16.at_least(call.branch_size * call.member_count) : nullptr;
}

void place_branch16(const Call& call, int64_t begin, int64_t end) {
    const int64_t columns = width_of(call.rest->branch_rank).all;
    for (int64_t k = 0; k < columns; k += kRank)
        for (int64_t i = begin; i < end; ++i)
            store_row(call.own_branch16() + (k * call.tokens.count + i * kRank), Dtype::bfloat16, kRank,
                      call.own_branch() + i * columns + k);
}

constexpr int64_t kAtOnce = 16;  // chunks of inputs whose unpacked weights stay in the first cache

// The tiles 0 to 3, [2 channel blocks][32 tokens][16], 32 bits each; the second 16 tokens may be missing. The blocks lie
// `distance` bytes apart.
void load_tiles(const void* source, int64_t distance, bool second) {
    auto p = static_cast<const char*>(source);
    _tile_loadd(0, p, 64);
    _tile_loadd(1, p + distance, 64);
    if (!second) return;
    _tile_loadd(2, p + 1024, 64);
    _tile_loadd(3, p + distance + 1024, 64);
}

void store_tiles(void* target, int64_t distance, bool second) {
    auto p = static_cast<char*>(target);
    _tile_stored(0, p, 64);
    _tile_stored(1, p + distance, 64);
    if (!second) return;
    _tile_stored(2, p + 1024, 64);
    _tile_stored(3, p + distance + 1024, 64);
}

void clear_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Adds the products of some chunks of inputs, from `x` on, with two unpacked panels.
void multiply_integers(const int8_t* x, int64_t distance, const uint8_t* const* panel, int64_t chunks, bool second) {
    const uint8_t *left = panel[0], *right = panel[1];
    if (second) {
        for (int64_t c = 0; c < chunks; ++c, x += distance, left += 1024, right += 1024) {
            _tile_loadd(6, left, 64);
            _tile_loadd(4, x, 64);
            _tile_loadd(7, right, 64);
            _tile_loadd(5, x + 16 * kChunk, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    } else {
        for (int64_t c = 0; c < chunks; ++c, x += distance, left += 1024, right += 1024) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, left, 64);
            _tile_loadd(7, right, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
        }
    }
}

// Adds the products of `columns` of the tokens, [columns / 32][count][32], and two panels of bfloat16 to y.
void add_columns16(const Call& call, const uint16_t* data, int64_t columns, const Panel& left, const Panel& right,
                   int blocks, int64_t t, int64_t count, float* const* y) {
    alignas(64) float sum[2][32 * kChannels];
    bool second = count > 16;
    clear_tiles();
    for (int64_t k = 0; k < columns; k += kRank) {
        const uint16_t* x = data + k * call.tokens.count + t * kRank;
        _tile_loadd(4, x, 64);
        _tile_loadd(6, left.pairs + k / 2 * kChannels, 64);
        _tile_loadd(7, right.pairs + k / 2 * kChannels, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, x + 16 * kRank, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_tiles(sum[0], 2048, second);
    for (int h = 0; h < blocks; ++h)
        for (int64_t i = 0; i < count * kChannels; i += kChannels)
            (Vector16::load(y[h] + i) + Vector16::load(sum[h] + i)).store(y[h] + i);
}

void end_unit(const Call& call, const Block* block, int blocks, int64_t t, int64_t count, float* const* y) {
    if (call.outlier16)
        add_columns16(call, call.outlier16, call.tokens.rank, block[0].outlier, block[1].outlier, blocks, t, count, y);
    const int64_t columns = width_of(call.rest->branch_rank).all;
    if (columns && call.branch16)
        add_columns16(call, call.own_branch16(), columns, block[0].branch, block[1].branch, blocks, t, count, y);
    for (int h = 0; h < blocks; ++h) {
        if (!call.outlier16) add_outliers(call, block[h], t, count, y[h]);
        if (!call.branch16) add_branch(call, block[h], t, count, y[h]);
        finish(block[h], *call.output, call.weight->out_features, call.first + t, count, y[h]);
    }
}

template <Form F>
void amx_unit(const Call& call, int64_t index, CallMemory& memory) {
    const Tokens& tokens = call.tokens;
    const int blocks = (2 * index + 1) * kChannels < call.weight->out_features ? 2 : 1;
    const int64_t per = kChunk / call.per_line();  // lines in a chunk
    Block block[2];
    for (int h = 0; h < blocks; ++h)
        block[h] = memory.block[h].prepare(*call.weight, *call.rest, 2 * index + h, tokens, panel_offset_of(F));
    if (blocks == 1) block[1] = block[0];
    uint8_t* room = memory.panel.at_least(2 * kAtOnce * 1024);
    int32_t* total = memory.total.at_least(2 * tokens.count * kChannels);
    float* sums = memory.y.at_least(2 * tokens.count * kChannels);
    int64_t all = call.lines() / per, step = tokens.sums == 1 ? all : call.stretch() / kChunk;
    int64_t distance = tokens.count * kChannels;
    for (int64_t s = 0; s < tokens.sums; ++s)
        for (int64_t begin = s * step; begin < (s + 1) * step; begin += kAtOnce) {
            int64_t end = smaller((s + 1) * step, begin + kAtOnce);
            bool first = begin == s * step, last = end == (s + 1) * step;
            const uint8_t* panel[2];
            for (int h = 0; h < 2; ++h)
                panel[h] = h < blocks ? unpacked<F>(call, block[h], 2 * index + h, begin * per, end * per,
                                                    room + h * kAtOnce * 1024)
                                      : panel[0];
            for (int64_t t = 0; t < call.count; t += kTokens) {
                int64_t count = smaller(kTokens, call.count - t);
                int32_t* target = total + t * kChannels;
                if (first) clear_tiles();
                else load_tiles(target, 4 * distance, count > 16);
                multiply_integers(tokens.integers + (begin * tokens.count + t) * kChunk, tokens.count * kChunk, panel,
                                  end - begin, count > 16);
                store_tiles(target, 4 * distance, count > 16);
                if (!last) continue;
                float* y[2] = {sums + t * kChannels, sums + distance + t * kChannels};
                for (int h = 0; h < blocks; ++h) {
                    if (s == 0) std::memset(y[h], 0, count * kChannels * sizeof(float));
                    add_stretch(block[h], call.weight->groups, tokens, t, count, s, target + h * distance, y[h]);
                }
                if (s + 1 == tokens.sums) end_unit(call, block, blocks, t, count, y);
            }
        }
}
