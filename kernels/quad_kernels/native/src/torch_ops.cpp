// The kernels as PyTorch operators of the stable ABI: one library serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "choose.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void parallel_for(int64_t begin, int64_t end, int64_t grain, quad::Body body, void* context) {
    if (begin < end) torch_parallel_for(begin, end, grain, body, context);
}

quad::Dtype dtype_of(const Tensor& tensor, const char* what) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return quad::Dtype::float32;
        case ScalarType::BFloat16: return quad::Dtype::bfloat16;
        case ScalarType::Half: return quad::Dtype::float16;
        default: STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16");
    }
}

int32_t torch_dtype(quad::Dtype dtype) {
    switch (dtype) {
        case quad::Dtype::float32: return aoti_torch_dtype_float32();
        case quad::Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
        default: return aoti_torch_dtype_float16();
    }
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= sizes[i];
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// The sizes of `x` with another last one.
std::vector<int64_t> sizes_with(const Tensor& x, int64_t last) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = last;
    return sizes;
}

Tensor dense(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

MaybeTensor dense(const MaybeTensor& tensor) {
    return tensor ? MaybeTensor(dense(*tensor)) : std::nullopt;
}

const quad::Kernels& kernels() {
    const quad::Kernels* found = quad::chosen();
    STD_TORCH_CHECK(found, "this processor has no AVX2");
    return *found;
}

// Hadamard plans, made by Python when a size is met for the first time.
struct Plan {
    quad::Hadamard plan{};
    std::deque<std::vector<uint8_t>> signs;
};

std::mutex plans_mutex;
std::unordered_map<int64_t, Plan> plans;
void (*planner)(int64_t) = nullptr;

const quad::Hadamard* find_plan(int64_t size) {
    std::lock_guard<std::mutex> lock(plans_mutex);
    auto found = plans.find(size);
    return found == plans.end() ? nullptr : &found->second.plan;
}

const quad::Hadamard& plan_for(int64_t size) {
    const quad::Hadamard* plan = find_plan(size);
    if (!plan && planner) {
        planner(size);
        plan = find_plan(size);
    }
    STD_TORCH_CHECK(plan, "there is no Hadamard plan for ", size, " coordinates");
    return *plan;
}

// How an input is split and quantized, as the operators get it: see `settings` in lines.py.
struct Settings {
    int64_t bits;
    double clip_ratio;
    int64_t groups, largest_sub_scale;
    bool symmetric;
    int64_t number_format, outliers, block;
    bool keep_width, hadamard;
};

// Without data.
quad::Input input_of(quad::Dtype dtype, int64_t width, const Settings& settings) {
    const auto& [bits, clip_ratio, groups, largest_sub_scale, symmetric, number_format, outliers, block, keep_width,
                 hadamard] = settings;
    quad::Input input{};
    input.dtype = dtype;
    input.width = width;
    input.outliers = outliers;
    input.block = block;
    input.keep_width = keep_width;
    input.bits = int32_t(bits);
    input.clip_ratio = float(clip_ratio);
    input.groups = groups;
    input.largest_sub_scale = int32_t(largest_sub_scale);
    input.symmetric = symmetric;
    STD_TORCH_CHECK(number_format >= 0 && number_format <= 3, "there is no such number format");
    input.number_format = static_cast<quad::NumberFormat>(number_format);
    STD_TORCH_CHECK(number_format == 0 || (symmetric && !largest_sub_scale),
                    "floating-point numbers have neither zero points nor sub-scales");
    STD_TORCH_CHECK(block > 0 && width % block == 0 && outliers >= 0 && outliers < block, "the split does not fit x");
    STD_TORCH_CHECK(groups > 0 && input.residual() % groups == 0, "the groups do not divide the residual");
    STD_TORCH_CHECK(bits >= 2 && bits <= 8, "the input must be quantized to 2 to 8 bits");
    STD_TORCH_CHECK(largest_sub_scale >= 0 && (largest_sub_scale << (bits - 1)) < 128,
                    "the input's integers times their sub-scales must fit into 8 bits");
    STD_TORCH_CHECK(symmetric || (bits < 8 && !largest_sub_scale),
                    "the input's integers less their zero points must fit into 8 bits, without sub-scales");
    STD_TORCH_CHECK(number_format == 0 || input.residual() / groups % 16 == 0,
                    "groups of floating-point numbers are of 16 or 32");
    if (hadamard) input.hadamard = &plan_for(input.residual());
    return input;
}

quad::Input input_of(const Tensor& x, const Settings& settings) {
    quad::Input input = input_of(dtype_of(x, "x"), x.size(x.dim() - 1), settings);
    input.data = x.const_data_ptr();
    input.tokens = input.width ? x.numel() / input.width : 0;
    return input;
}

quad::Weight weight_of(const Tensor& lines, const Tensor& scale, const MaybeTensor& zero_point,
                       const MaybeTensor& sub_scale, int64_t in_features, int64_t out_features, int64_t stored) {
    STD_TORCH_CHECK(stored >= 0 && stored <= 2, "there are no such lines");
    int64_t per_line = stored == 1 ? 4 : 8, count = (in_features + 63) / 64 * (64 / per_line);
    STD_TORCH_CHECK(lines.is_contiguous() && lines.scalar_type() == ScalarType::Byte &&
                        lines.numel() == (out_features + 15) / 16 * count * 64,
                    "the weight is not in lines");
    STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == out_features && in_features % scale.size(1) == 0,
                    "the weight scales do not fit");
    quad::Weight weight{};
    weight.lines = static_cast<const uint8_t*>(lines.const_data_ptr());
    weight.scale = scale.const_data_ptr();
    weight.scale_dtype = dtype_of(scale, "the weight scale");
    weight.in_features = in_features;
    weight.out_features = out_features;
    weight.groups = scale.size(1);
    weight.stored = static_cast<quad::Stored>(stored);
    if (zero_point) {
        STD_TORCH_CHECK(zero_point->numel() == scale.numel() && zero_point->scalar_type() == ScalarType::Char,
                        "the zero points do not fit");
        weight.zero_point = static_cast<const int8_t*>(zero_point->const_data_ptr());
    }
    if (sub_scale) {
        weight.sub_groups = sub_scale->size(0);
        STD_TORCH_CHECK(sub_scale->scalar_type() == ScalarType::Char && sub_scale->is_contiguous() &&
                            sub_scale->numel() == weight.sub_groups * out_features && weight.sub_groups > 0 &&
                            in_features % (8 * weight.sub_groups) == 0 && scale.size(1) == 1 && stored == 0 && !zero_point,
                        "the sub-scales do not fit");
        weight.sub_scale = static_cast<const int8_t*>(sub_scale->const_data_ptr());
    }
    return weight;
}

// Adds the low-rank branch of a linear whose input has `width` coordinates, if it has one.
void add_branch(quad::Rest& rest, const MaybeTensor& down, const MaybeTensor& up, int64_t width, int64_t out_features) {
    STD_TORCH_CHECK(down.has_value() == up.has_value(), "a low-rank branch has two parts");
    if (!down) return;
    STD_TORCH_CHECK(down->dim() == 2 && up->dim() == 2 && down->size(1) == width && up->size(0) == out_features &&
                        up->size(1) == down->size(0) && up->scalar_type() == down->scalar_type(),
                    "the low-rank branch does not fit");
    rest.down = down->const_data_ptr();
    rest.up = up->const_data_ptr();
    rest.branch_dtype = dtype_of(*down, "the low-rank branch");
    rest.branch_rank = down->size(0);
}

quad::Rest rest_of(const MaybeTensor& outlier_weight, const MaybeTensor& bias, int64_t rank, int64_t out_features) {
    quad::Rest rest{};
    STD_TORCH_CHECK(outlier_weight || !rank, "the outlier coordinates have no weight");
    if (rank) {
        STD_TORCH_CHECK(outlier_weight->numel() == out_features * rank, "the outlier weight does not fit");
        rest.outlier_weight = outlier_weight->const_data_ptr();
        rest.outlier_weight_dtype = dtype_of(*outlier_weight, "the outlier weight");
        rest.rank = rank;
    }
    if (bias) {
        STD_TORCH_CHECK(bias->numel() == out_features, "the bias does not fit");
        rest.bias = bias->const_data_ptr();
        rest.bias_dtype = dtype_of(*bias, "the bias");
    }
    return rest;
}

// A tensor whose data somebody may exchange (`parameter.data = ...`) while a pointer to it is kept. Other data may lie at
// the same address: another view of it, or what came after it was freed.
struct Held {
    Tensor tensor;
    void* data;
    ScalarType dtype;
    int64_t count;

    explicit Held(const Tensor& t) : tensor(t), data(current()), dtype(t.scalar_type()), count(t.numel()) {}
    bool stays() const {
        return current() == data && tensor.scalar_type() == dtype && tensor.numel() == count && tensor.is_contiguous();
    }

  private:
    void* current() const {
        void* found = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &found));
        return found;
    }
};

// What a linear is made of, as the operators get it: see `linear` in lines.py.
struct LinearParts {
    Settings settings;
    Tensor lines, scale;
    MaybeTensor zero_point, sub_scale;
    int64_t in_features, out_features, stored;
    MaybeTensor outlier_weight, bias, down, up;
};

// The parts of a linear with pointers to their tensors.
struct ResolvedLinear {
    quad::Weight weight;
    quad::Rest rest;
    int64_t width;  // of the input
    std::vector<Held> held;

    bool stays() const {
        for (const Held& each : held)
            if (!each.stays()) return false;
        return true;
    }
};

// The tensors must be contiguous.
ResolvedLinear resolve(const LinearParts& parts, const quad::Input& input) {
    STD_TORCH_CHECK(input.residual() == parts.in_features, "the weight does not fit the residual");
    quad::Weight weight = weight_of(parts.lines, parts.scale, parts.zero_point, parts.sub_scale, parts.in_features,
                                    parts.out_features, parts.stored);
    quad::Rest rest = rest_of(parts.outlier_weight, parts.bias, input.rank(), parts.out_features);
    add_branch(rest, parts.down, parts.up, input.width, parts.out_features);
    return {weight, rest, input.width, {}};
}

Tensor apply(const Tensor& x, const quad::Input& input, const ResolvedLinear& linear) {
    Tensor y = empty(sizes_with(x, linear.weight.out_features), torch_dtype(input.dtype));
    quad::Member member{linear.weight, linear.rest, {y.mutable_data_ptr(), input.dtype}};
    kernels().linear(&input, nullptr, &member, 1, parallel_for);
    return y;
}

Tensor apply(const Tensor& x, const quad::Input& input, const LinearParts& parts) {
    LinearParts whole = parts;
    whole.scale = dense(parts.scale);
    for (MaybeTensor LinearParts::*part : {&LinearParts::zero_point, &LinearParts::sub_scale, &LinearParts::outlier_weight,
                                           &LinearParts::bias, &LinearParts::down, &LinearParts::up})
        whole.*part = dense(parts.*part);
    return apply(x, input, resolve(whole, input));
}

Tensor linear(const Tensor& x_, int64_t bits, double clip_ratio, int64_t groups, int64_t largest_sub_scale,
              bool symmetric, int64_t number_format, int64_t outliers, int64_t block, bool keep_width, bool hadamard,
              const Tensor& lines, const Tensor& scale, const MaybeTensor& zero_point, const MaybeTensor& sub_scale,
              int64_t in_features, int64_t out_features, int64_t stored, const MaybeTensor& outlier_weight,
              const MaybeTensor& bias, const MaybeTensor& down, const MaybeTensor& up) {
    Tensor x = dense(x_);
    LinearParts parts{{bits, clip_ratio, groups, largest_sub_scale, symmetric, number_format, outliers, block,
                       keep_width, hadamard},
                      lines, scale, zero_point, sub_scale, in_features, out_features, stored, outlier_weight, bias,
                      down, up};
    return apply(x, input_of(x, parts.settings), parts);
}

// A linear whose parts are kept here: to hand them over at each call took longer than some of the products.
struct LinearPlan {
    LinearParts parts;
    std::shared_ptr<const ResolvedLinear> resolved;  // for the width of the last input

    // Returns the parts with pointers, null where a tensor is not contiguous; tensors may have got other data since.
    std::shared_ptr<const ResolvedLinear> for_input(const quad::Input& input) {
        if (resolved && resolved->width == input.width && resolved->stays()) return resolved;
        resolved = nullptr;
        std::vector<Held> held;
        held.emplace_back(parts.scale);
        for (const MaybeTensor* part : {&parts.zero_point, &parts.sub_scale, &parts.outlier_weight, &parts.bias,
                                        &parts.down, &parts.up})
            if (*part) held.emplace_back(**part);
        for (const Held& each : held)
            if (!each.tensor.is_contiguous()) return nullptr;
        auto made = std::make_shared<ResolvedLinear>(resolve(parts, input));
        made->held = std::move(held);
        return resolved = made;
    }
};

std::mutex linears_mutex;
auto& linear_plans = *new std::unordered_map<int64_t, std::shared_ptr<LinearPlan>>;  // never destroyed, like blocks'
int64_t next_linear_plan = 1;

int64_t plan_linear(int64_t bits, double clip_ratio, int64_t groups, int64_t largest_sub_scale, bool symmetric,
                    int64_t number_format, int64_t outliers, int64_t block, bool keep_width, bool hadamard,
                    const Tensor& lines, const Tensor& scale, const MaybeTensor& zero_point,
                    const MaybeTensor& sub_scale, int64_t in_features, int64_t out_features, int64_t stored,
                    const MaybeTensor& outlier_weight, const MaybeTensor& bias, const MaybeTensor& down,
                    const MaybeTensor& up) {
    LinearParts parts{{bits, clip_ratio, groups, largest_sub_scale, symmetric, number_format, outliers, block,
                       keep_width, hadamard},
                      lines, scale, zero_point, sub_scale, in_features, out_features, stored, outlier_weight, bias,
                      down, up};
    std::lock_guard<std::mutex> lock(linears_mutex);
    linear_plans.emplace(next_linear_plan, std::make_shared<LinearPlan>(LinearPlan{parts, nullptr}));
    return next_linear_plan++;
}

std::shared_ptr<LinearPlan> linear_plan(int64_t number) {
    std::lock_guard<std::mutex> lock(linears_mutex);
    auto found = linear_plans.find(number);
    STD_TORCH_CHECK(found != linear_plans.end(), "there is no plan ", number);
    return found->second;
}

// A linear of `plan_linear`.
Tensor planned_linear(const Tensor& x_, int64_t number) {
    Tensor x = dense(x_);
    std::shared_ptr<LinearPlan> plan = linear_plan(number);
    quad::Input input = input_of(x, plan->parts.settings);  // may call Python, so without the lock
    std::shared_ptr<const ResolvedLinear> resolved;
    {
        std::lock_guard<std::mutex> lock(linears_mutex);
        resolved = plan->for_input(input);
    }
    return resolved ? apply(x, input, *resolved) : apply(x, input, plan->parts);
}

Tensor integer_linear(const Tensor& x_, const Tensor& x_scale_, const Tensor& lines, const Tensor& scale_,
                      const MaybeTensor& zero_point_, const MaybeTensor& sub_scale_, int64_t in_features,
                      int64_t out_features, int64_t stored, const MaybeTensor& outlier_, const MaybeTensor& outlier_weight_,
                      const MaybeTensor& bias_, int64_t out_dtype) {
    Tensor x = dense(x_), x_scale = dense(x_scale_), scale = dense(scale_);
    MaybeTensor zero_point = dense(zero_point_), outlier = dense(outlier_), bias = dense(bias_);
    MaybeTensor outlier_weight = dense(outlier_weight_), sub_scale = dense(sub_scale_);
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == in_features && x.scalar_type() == ScalarType::Char, "x does not fit");
    STD_TORCH_CHECK(x_scale.dim() == 2 && x_scale.size(0) == x.size(0) && x_scale.scalar_type() == ScalarType::Float,
                    "the scales of x do not fit");
    quad::Integers integers{static_cast<const int8_t*>(x.const_data_ptr()),
                            static_cast<const float*>(x_scale.const_data_ptr()), x.size(0), x_scale.size(1)};
    quad::Weight weight = weight_of(lines, scale, zero_point, sub_scale, in_features, out_features, stored);
    quad::Rest rest = rest_of(outlier_weight, bias, outlier ? outlier->size(1) : 0, out_features);
    if (outlier) {
        STD_TORCH_CHECK(outlier->size(0) == x.size(0), "the outliers do not fit x");
        rest.outlier = outlier->const_data_ptr();
        rest.outlier_dtype = dtype_of(*outlier, "the outlier");
    }
    auto dtype = static_cast<quad::Dtype>(out_dtype);
    Tensor y = empty({x.size(0), out_features}, torch_dtype(dtype));
    quad::Member member{weight, rest, {y.mutable_data_ptr(), dtype}};
    kernels().linear(nullptr, &integers, &member, 1, parallel_for);
    return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x_, int64_t bits, double clip_ratio, int64_t groups,
                                            int64_t largest_sub_scale, bool symmetric, int64_t number_format,
                                            int64_t outliers, int64_t block, bool keep_width, bool hadamard) {
    Tensor x = dense(x_);
    quad::Input input = input_of(x, {bits, clip_ratio, groups, largest_sub_scale, symmetric, number_format, outliers,
                                     block, keep_width, hadamard});
    Tensor outlier = empty(sizes_with(x, input.rank()), torch_dtype(input.dtype));
    Tensor integers = empty(sizes_with(x, input.residual()), aoti_torch_dtype_int8());
    Tensor scale = empty(sizes_with(x, input.scales()), aoti_torch_dtype_float32());
    kernels().quantize(input, outlier.mutable_data_ptr(), static_cast<int8_t*>(integers.mutable_data_ptr()),
                       static_cast<float*>(scale.mutable_data_ptr()), parallel_for);
    return {outlier, integers, scale};
}

Tensor hadamard(const Tensor& x_) {
    Tensor x = dense(x_);
    quad::Dtype dtype = dtype_of(x, "x");
    int64_t size = x.size(x.dim() - 1);
    Tensor y = empty(sizes_with(x, size), torch_dtype(dtype));
    kernels().hadamard(x.const_data_ptr(), y.mutable_data_ptr(), dtype, x.numel() / size, plan_for(size), parallel_for);
    return y;
}

Tensor head(const Tensor& x_, const Tensor& words, const Tensor& scale_) {
    Tensor x = dense(x_), scale = dense(scale_);
    int64_t rows = words.size(0), columns = x.size(x.dim() - 1);
    STD_TORCH_CHECK(words.dim() == 2 && words.is_contiguous() && words.scalar_type() == ScalarType::Int &&
                        words.size(1) == (columns + 3) / 4,
                    "the table does not fit x");
    STD_TORCH_CHECK(scale.numel() == rows, "the scales do not fit the table");
    quad::Table table{static_cast<const uint8_t*>(words.const_data_ptr()), words.size(1) * 4, true,
                      scale.const_data_ptr(), dtype_of(scale, "the scale"), rows, columns};
    quad::Dtype dtype = dtype_of(x, "x");
    Tensor y = empty(sizes_with(x, rows), torch_dtype(dtype));
    kernels().head(x.const_data_ptr(), y.mutable_data_ptr(), dtype, columns ? x.numel() / columns : 0, table,
                   parallel_for);
    return y;
}

Tensor dense_head(const Tensor& x_, const Tensor& weight) {
    Tensor x = dense(x_);
    int64_t rows = weight.size(0), columns = weight.size(1);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16 &&
                        x.size(x.dim() - 1) == columns,
                    "the weight must be bfloat16 and fit x");
    quad::Table table{static_cast<const uint8_t*>(weight.const_data_ptr()), columns * 2, false, nullptr,
                      quad::Dtype::float32, rows, columns};
    quad::Dtype dtype = dtype_of(x, "x");
    Tensor y = empty(sizes_with(x, rows), torch_dtype(dtype));
    kernels().head(x.const_data_ptr(), y.mutable_data_ptr(), dtype, columns ? x.numel() / columns : 0, table,
                   parallel_for);
    return y;
}

// Linears that share an input, as the operators of a block get them: eight tensors for each (lines, scale, zero point,
// sub-scales, outlier weight, bias, and the two of a branch; what is absent is empty), and numbers: those of `Settings`
// without the clip ratio, in order, then inputs, outputs and `stored` of each.
constexpr size_t kParts = 8;

class Parts {
  public:
    Parts(const std::vector<Tensor>& tensors, const std::vector<int64_t>& numbers)
        : tensors_(tensors), numbers_(numbers) {}

    // Returns how the input of the next `count` linears, of `width` coordinates, is quantized, and adds them to `members`.
    quad::Input group(quad::Dtype dtype, int64_t width, double clip_ratio, int64_t count,
                      std::vector<quad::Member>& members) {
        int64_t bits = number(), groups = number(), largest_sub_scale = number();
        bool symmetric = number();
        int64_t number_format = number(), outliers = number(), block = number();
        bool keep_width = number(), hadamard = number();
        quad::Input input = input_of(
            dtype, width, {bits, clip_ratio, groups, largest_sub_scale, symmetric, number_format, outliers, block,
                           keep_width, hadamard});
        size_t first = members.size();
        for (int64_t i = 0; i < count; ++i) {
            int64_t in_features = number(), out_features = number();
            int64_t stored = number();
            const Tensor &lines = tensor(), &scale = tensor();
            MaybeTensor zero_point = maybe(), sub_scale = maybe(), outlier_weight = maybe(), bias = maybe();
            MaybeTensor down = maybe(), up = maybe();
            STD_TORCH_CHECK(input.residual() == in_features && scale.is_contiguous(), "the weight does not fit");
            members.push_back({weight_of(lines, scale, zero_point, sub_scale, in_features, out_features, stored),
                               rest_of(outlier_weight, bias, input.rank(), out_features),
                               {nullptr, dtype}});
            add_branch(members.back().rest, down, up, width, out_features);
            const quad::Member &one = members[first], &other = members.back();
            STD_TORCH_CHECK(one.weight.groups == other.weight.groups &&
                                one.weight.sub_groups == other.weight.sub_groups &&
                                one.rest.outlier_weight_dtype == other.rest.outlier_weight_dtype &&
                                one.rest.rank == other.rest.rank,
                            "linears that share an input must have the same format");
        }
        return input;
    }

    // Applies the next `count` linears to `x`.
    std::vector<Tensor> linears(const Tensor& x, double clip_ratio, int64_t count) {
        std::vector<quad::Member> members;
        int64_t width = x.size(x.dim() - 1);
        quad::Input input = group(dtype_of(x, "x"), width, clip_ratio, count, members);
        input.data = x.const_data_ptr();
        input.tokens = width ? x.numel() / width : 0;
        std::vector<Tensor> results;
        for (quad::Member& member : members) {
            results.push_back(empty(sizes_with(x, member.weight.out_features), torch_dtype(input.dtype)));
            member.output.data = results.back().mutable_data_ptr();
        }
        kernels().linear(&input, nullptr, members.data(), count, parallel_for);
        return results;
    }

  private:
    int64_t number() { return numbers_.at(next_number_++); }
    const Tensor& tensor() { return tensors_.at(next_tensor_++); }
    MaybeTensor maybe() {
        const Tensor& found = tensor();
        STD_TORCH_CHECK(found.is_contiguous(), "the parts of a linear must be contiguous");
        return found.numel() ? MaybeTensor(found) : std::nullopt;
    }

    const std::vector<Tensor>& tensors_;
    const std::vector<int64_t>& numbers_;
    size_t next_number_ = 0, next_tensor_ = 0;
};

Tensor normed(const Tensor& x, const Tensor& weight, double eps) {
    quad::Dtype dtype = dtype_of(x, "the hidden states");
    int64_t width = weight.numel(), rows = width ? x.numel() / width : 0;
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.is_contiguous(), "the norm does not fit");
    Tensor y = empty(sizes_with(x, x.size(x.dim() - 1)), torch_dtype(dtype));
    kernels().norm(x.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(), dtype, float(eps), rows, width,
                   parallel_for);
    return y;
}

Tensor norm(const Tensor& x, const Tensor& weight, double eps) { return normed(dense(x), weight, eps); }

Tensor silu(const Tensor& x_) {
    Tensor y = torch::stable::clone(dense(x_));
    kernels().gated(y.mutable_data_ptr(), nullptr, dtype_of(y, "x"), y.numel(), parallel_for);
    return y;
}

// Cosines and sines of the angles of rotary embedding, [angles, head_dim]; token t has row t % angles.
struct Rotary {
    Tensor cosine, sine;
    int64_t head_dim, angles;

    Rotary(const Tensor& cosine_, const Tensor& sine_, const Tensor& x)
        : cosine(dense(cosine_)), sine(dense(sine_)), head_dim(cosine.size(cosine.dim() - 1)) {
        STD_TORCH_CHECK(cosine.scalar_type() == x.scalar_type() && sine.scalar_type() == x.scalar_type() &&
                            cosine.numel() == sine.numel() && head_dim,
                        "the rotary embedding does not fit");
        angles = cosine.numel() / head_dim;
    }
};

// Queries, keys and values of a block. `head_norms` are two weights, or none.
std::vector<Tensor> queries_keys_values(const Tensor& x, const Tensor& norm, double eps, const Rotary& rotary,
                                        const Tensor* head_norms, Parts& reader, double clip_ratio) {
    std::vector<Tensor> results = reader.linears(normed(x, norm, eps), clip_ratio, 3);
    int64_t tokens = x.numel() / x.size(x.dim() - 1);
    for (int i = 0; i < 2; ++i) {
        if (head_norms) results[i] = normed(results[i], head_norms[i], eps);
        int64_t heads = results[i].size(results[i].dim() - 1) / rotary.head_dim;
        kernels().rotate(results[i].mutable_data_ptr(), dtype_of(x, "the hidden states"), tokens, heads,
                         rotary.head_dim, rotary.cosine.const_data_ptr(), rotary.sine.const_data_ptr(), rotary.angles,
                         parallel_for);
    }
    return results;
}

// What a block does behind its attention. `clip_ratios` are those of o_proj, of gate and up, and of down_proj.
Tensor behind_attention(const Tensor& attention, const Tensor& residual, const Tensor& norm, double eps, Parts& reader,
                        const double* clip_ratios) {
    quad::Dtype dtype = dtype_of(residual, "the hidden states");
    Tensor hidden = reader.linears(attention, clip_ratios[0], 1)[0];
    kernels().add(hidden.mutable_data_ptr(), residual.const_data_ptr(), dtype, hidden.numel(), parallel_for);
    std::vector<Tensor> pair = reader.linears(normed(hidden, norm, eps), clip_ratios[1], 2);
    kernels().gated(pair[0].mutable_data_ptr(), pair[1].const_data_ptr(), dtype, pair[0].numel(), parallel_for);
    Tensor y = reader.linears(pair[0], clip_ratios[2], 1)[0];
    kernels().add(y.mutable_data_ptr(), hidden.const_data_ptr(), dtype, y.numel(), parallel_for);
    return y;
}

std::vector<Tensor> block_in(const Tensor& x_, const Tensor& norm, double eps, const Tensor& cosine,
                             const Tensor& sine, const std::vector<Tensor>& head_norms,
                             const std::vector<Tensor>& parts, const std::vector<int64_t>& numbers, double clip_ratio) {
    Tensor x = dense(x_);
    Parts reader(parts, numbers);
    STD_TORCH_CHECK(head_norms.empty() || head_norms.size() == 2, "queries and keys have a norm each, or none");
    return queries_keys_values(x, norm, eps, Rotary(cosine, sine, x), head_norms.empty() ? nullptr : head_norms.data(),
                               reader, clip_ratio);
}

Tensor block_out(const Tensor& attention_, const Tensor& residual_, const Tensor& norm, double eps,
                 const std::vector<Tensor>& parts, const std::vector<int64_t>& numbers,
                 const std::vector<double>& clip_ratios) {
    Tensor attention = dense(attention_), residual = dense(residual_);
    STD_TORCH_CHECK(attention.scalar_type() == residual.scalar_type(), "the attention has another dtype");
    STD_TORCH_CHECK(clip_ratios.size() == 3, "three inputs have a clip ratio");
    Parts reader(parts, numbers);
    return behind_attention(attention, residual, norm, eps, reader, clip_ratios.data());
}

// The attention of one token per sequence, [batch, heads * head_dim], over the first `positions` of a cache.
Tensor attend(const Tensor& query_, const Tensor& keys, const Tensor& values, int64_t positions, const MaybeTensor& mask_,
              double scale) {
    Tensor query = dense(query_);
    MaybeTensor mask = dense(mask_);
    STD_TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && keys.is_contiguous() && values.is_contiguous() &&
                        keys.numel() == values.numel() && keys.scalar_type() == query.scalar_type() &&
                        values.scalar_type() == query.scalar_type(),
                    "the cache does not fit");
    quad::Attention call{};
    call.dtype = dtype_of(query, "the queries");
    call.batch = keys.size(0);
    call.cached_heads = keys.size(1);
    call.capacity = keys.size(2);
    call.head_dim = keys.size(3);
    int64_t row = call.batch * call.head_dim;
    STD_TORCH_CHECK(row && query.numel() % row == 0 && positions > 0 && positions <= call.capacity &&
                        values.size(1) == call.cached_heads && values.size(3) == call.head_dim,
                    "the cache does not fit the queries");
    call.heads = query.numel() / row;
    STD_TORCH_CHECK(call.cached_heads && call.heads % call.cached_heads == 0, "the cache does not fit the heads");
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == call.batch * positions,
                        "the mask must be bool, [batch, positions]");
        call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    Tensor y = empty({query.sizes().begin(), query.sizes().end()}, torch_dtype(call.dtype));
    call.query = query.const_data_ptr();
    call.output = y.mutable_data_ptr();
    call.keys = keys.const_data_ptr();
    call.values = values.const_data_ptr();
    call.positions = positions;
    call.scale = float(scale);
    kernels().attend(call, parallel_for);
    return y;
}

// Heads of a tensor [batch, heads, positions, head_dim] whose rows are dense.
quad::Heads heads_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The attention of several positions of each sequence, [batch, positions, heads * head_dim]: without a mask over themselves
// and those before them, with one, [batch or 1, 1, positions, positions of the keys], over those that it lets them see.
Tensor attend_prompt(const Tensor& query_, const Tensor& keys_, const Tensor& values_, double scale,
                     const MaybeTensor& mask_) {
    auto dense_rows = [](const Tensor& t) { return t.dim() == 4 && t.stride(3) != 1 ? dense(t) : t; };
    Tensor query = dense_rows(query_), keys = dense_rows(keys_), values = dense_rows(values_);
    STD_TORCH_CHECK(query.dim() == 4 && keys.dim() == 4 && values.dim() == 4 &&
                        keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(),
                    "queries, keys and values must be [batch, heads, positions, head_dim] of one dtype");
    quad::Prompt call{};
    call.dtype = dtype_of(query, "the queries");
    call.batch = query.size(0);
    call.heads = query.size(1);
    call.positions = query.size(2);
    call.head_dim = query.size(3);
    call.cached_heads = keys.size(1);
    call.key_count = keys.size(2);
    bool fits = call.cached_heads > 0 && call.heads % call.cached_heads == 0;
    for (const Tensor* each : {&keys, &values})
        fits = fits && each->size(0) == call.batch && each->size(1) == call.cached_heads &&
               each->size(2) == call.key_count && each->size(3) == call.head_dim;
    STD_TORCH_CHECK(fits && (mask_ || call.key_count == call.positions), "the keys and values do not fit the queries");
    MaybeTensor mask = mask_;
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 &&
                            (mask->size(0) == call.batch || mask->size(0) == 1) && mask->size(1) == 1 &&
                            mask->size(2) == call.positions && mask->size(3) == call.key_count,
                        "the mask must be bool, [batch or 1, 1, positions, positions of the keys]");
        mask = dense_rows(*mask);
        call.mask = {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->size(0) == 1 ? 0 : mask->stride(0),
                     mask->stride(2)};
    }
    Tensor y = empty({call.batch, call.positions, call.heads * call.head_dim}, torch_dtype(call.dtype));
    call.query = heads_of(query);
    call.keys = heads_of(keys);
    call.values = heads_of(values);
    call.output = y.mutable_data_ptr();
    call.scale = float(scale);
    kernels().attend_prompt(call, parallel_for);
    return y;
}

// The blocks of a decoder, with pointers to their tensors.
struct ResolvedBlocks {
    std::vector<quad::DecodeBlock> blocks;
    std::deque<std::vector<quad::Member>> members;  // addresses stay
    std::vector<Held> held;
    quad::Dtype dtype;
    float eps = 0;
    int64_t width = 0, queries = 0, keys = 0, inner = 0;  // of every block
    int64_t head_norm_width = 0;                          // 0 without
    int64_t block_bytes = 0;                              // of integers of a block, on average

    bool stays() const {
        for (const Held& each : held)
            if (!each.stays()) return false;
        return true;
    }
};

// The blocks of a decoder as `Blocks` in block.py puts them together. Kept here, because their tensors are so many that
// to hand them over for each token took longer than some of the linears.
struct BlockPlan {
    std::vector<Tensor> norms, head_norms, parts;
    std::vector<int64_t> numbers;
    std::vector<double> clip_ratios;
    double eps;
    std::shared_ptr<const ResolvedBlocks> resolved;

    std::shared_ptr<const ResolvedBlocks> resolve() const {
        auto made = std::make_shared<ResolvedBlocks>();
        size_t count = norms.size() / 2;
        STD_TORCH_CHECK(count && clip_ratios.size() == 4 * count &&
                            (head_norms.empty() || head_norms.size() == 2 * count),
                        "the blocks have parts of different numbers");
        made->dtype = dtype_of(norms[0], "the norms");
        made->eps = float(eps);
        made->width = norms[0].numel();
        Parts reader(parts, numbers);
        for (size_t i = 0; i < count; ++i) {
            quad::DecodeBlock block{};
            block.norm_in = weight_of_norm(*made, norms[2 * i], made->width);
            block.norm_out = weight_of_norm(*made, norms[2 * i + 1], made->width);
            block.qkv = group(*made, reader, made->width, clip_ratios[4 * i], 3);
            int64_t queries = block.qkv.width(0), keys = block.qkv.width(1);
            block.output = group(*made, reader, queries, clip_ratios[4 * i + 1], 1);
            block.gate_up = group(*made, reader, made->width, clip_ratios[4 * i + 2], 2);
            int64_t inner = block.gate_up.width(0);
            block.down = group(*made, reader, inner, clip_ratios[4 * i + 3], 1);
            if (i == 0) made->queries = queries, made->keys = keys, made->inner = inner;
            STD_TORCH_CHECK(queries == made->queries && keys == made->keys && inner == made->inner &&
                                block.qkv.width(2) == keys && block.gate_up.width(1) == inner &&
                                block.output.width(0) == made->width && block.down.width(0) == made->width,
                            "the linears of the blocks do not fit each other");
            if (!head_norms.empty()) made->head_norm_width = head_norms[0].numel();
            for (size_t h = 0; h < 2 && !head_norms.empty(); ++h)
                block.head_norms[h] = weight_of_norm(*made, head_norms[2 * i + h], made->head_norm_width);
            made->blocks.push_back(block);
        }
        for (const std::vector<quad::Member>& group : made->members)
            for (const quad::Member& member : group)
                made->block_bytes += member.weight.out_features * member.weight.in_features / (member.weight.stored == quad::Stored::bytes ? 1 : 2);
        made->block_bytes /= count;
        for (size_t i = 0; i < parts.size(); ++i)  // all but the lines and what goes with them, which nobody else has
            if (parts[i].numel() && (i % kParts == 1 || i % kParts >= 4)) made->held.emplace_back(parts[i]);
        return made;
    }

  private:
    static const void* weight_of_norm(ResolvedBlocks& made, const Tensor& weight, int64_t width) {
        STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == width &&
                            dtype_of(weight, "the norms") == made.dtype,
                        "the norms of the blocks do not fit each other");
        made.held.emplace_back(weight);
        return weight.const_data_ptr();
    }

    static quad::Group group(ResolvedBlocks& made, Parts& reader, int64_t width, double clip_ratio, int64_t count) {
        std::vector<quad::Member>& members = made.members.emplace_back();
        quad::Input input = reader.group(made.dtype, width, clip_ratio, count, members);
        return {input, members.data(), count};
    }
};

std::mutex blocks_mutex;
auto& block_plans = *new std::unordered_map<int64_t, BlockPlan>;  // never destroyed: PyTorch may be gone by then
int64_t next_block_plan = 1;

// `norms` are two of each block, `head_norms` two or none, `clip_ratios` four.
int64_t plan_blocks(const std::vector<Tensor>& norms, double eps, const std::vector<Tensor>& head_norms,
                    const std::vector<Tensor>& parts, const std::vector<int64_t>& numbers,
                    const std::vector<double>& clip_ratios) {
    BlockPlan plan{norms, head_norms, parts, numbers, clip_ratios, eps, nullptr};
    plan.resolved = plan.resolve();
    std::lock_guard<std::mutex> lock(blocks_mutex);
    block_plans.emplace(next_block_plan, std::move(plan));
    return next_block_plan++;
}

// Returns the blocks of a plan; tensors may have got other data since.
std::shared_ptr<const ResolvedBlocks> blocks_of(int64_t number) {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto found = block_plans.find(number);
    STD_TORCH_CHECK(found != block_plans.end(), "there is no plan ", number);
    BlockPlan& plan = found->second;
    if (!plan.resolved->stays()) plan.resolved = plan.resolve();
    return plan.resolved;
}

// A cache of a block, [batch, heads, capacity, head_dim].
void* cache_of(Tensor& cache, const Tensor& like, int64_t batch, int64_t width, int64_t position) {
    STD_TORCH_CHECK(cache.dim() == 4 && cache.is_contiguous() && cache.scalar_type() == like.scalar_type() &&
                        cache.size(0) == batch && cache.size(1) * cache.size(3) == width && position >= 0 &&
                        position < cache.size(2),
                    "the cache does not fit");
    return cache.mutable_data_ptr();
}

constexpr int64_t kBytesPerSeat = 256 * 1024;  // of the integers of a block that a thread should have to read at least

// All blocks of a decoder for one token of each sequence, x [batch, 1, width], behind `position` tokens in the caches.
// `number` is that of a plan; `keys` and `values` are one of each block.
Tensor decode(const Tensor& x_, int64_t number, const Tensor& cosine, const Tensor& sine, std::vector<Tensor> keys,
              std::vector<Tensor> values, int64_t position, const MaybeTensor& mask_, double scale) {
    Tensor x = dense(x_);
    MaybeTensor mask = dense(mask_);
    std::shared_ptr<const ResolvedBlocks> resolved = blocks_of(number);
    std::vector<quad::DecodeBlock> blocks = resolved->blocks;
    STD_TORCH_CHECK(keys.size() == blocks.size() && values.size() == blocks.size() && !keys.empty() &&
                        dtype_of(x, "the hidden states") == resolved->dtype &&
                        x.size(x.dim() - 1) == resolved->width && keys[0].dim() == 4,
                    "the hidden states and caches do not fit the blocks");
    Rotary rotary(cosine, sine, x);
    quad::Decode call{};
    call.dtype = resolved->dtype;
    call.width = resolved->width;
    call.tokens = x.numel() / call.width;
    call.head_dim = rotary.head_dim;
    call.heads = resolved->queries / call.head_dim;
    call.cached_heads = resolved->keys / call.head_dim;
    STD_TORCH_CHECK(call.heads * call.head_dim == resolved->queries && call.cached_heads > 0 &&
                        call.cached_heads * call.head_dim == resolved->keys && call.heads % call.cached_heads == 0 &&
                        keys[0].size(3) == call.head_dim &&
                        (!resolved->head_norm_width || resolved->head_norm_width == call.head_dim),
                    "the cache does not fit the heads");
    for (size_t i = 0; i < blocks.size(); ++i) {
        blocks[i].keys = cache_of(keys[i], x, call.tokens, resolved->keys, position);
        blocks[i].values = cache_of(values[i], x, call.tokens, resolved->keys, position);
        blocks[i].capacity = keys[i].size(2);
        STD_TORCH_CHECK(values[i].size(2) == blocks[i].capacity, "keys and values have different room");
    }
    if (mask) {
        STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == call.tokens * (position + 1),
                        "the mask must be bool, [batch, positions]");
        call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    }
    Tensor y = empty({x.sizes().begin(), x.sizes().end()}, torch_dtype(call.dtype));
    call.x = x.const_data_ptr();
    call.y = y.mutable_data_ptr();
    call.blocks = blocks.data();
    call.block_count = int64_t(blocks.size());
    call.position = position;
    call.cosine = rotary.cosine.const_data_ptr();
    call.sine = rotary.sine.const_data_ptr();
    call.angles = rotary.angles;
    call.eps = resolved->eps;
    call.scale = float(scale);
    int64_t most = (resolved->block_bytes + kBytesPerSeat - 1) / kBytesPerSeat;
    call.threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), most));
    kernels().decode(call, parallel_for);
    return y;
}

const float* floats(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "what is rounded must be float32");
    return static_cast<const float*>(tensor.const_data_ptr());
}

// What both operators on columns check and return.
struct ColumnTensors {
    Tensor values, coefficients, scale, second, integers, change;
    quad::Columns columns{};

    ColumnTensors(const Tensor& values_, const Tensor& coefficients_, const Tensor& scale_, const Tensor& second_,
                  int64_t low, int64_t high, bool e2m1)
        : values(dense(values_)), coefficients(dense(coefficients_)), scale(dense(scale_)), second(dense(second_)),
          integers(empty({values.size(0), values.size(1)}, aoti_torch_dtype_float32())),
          change(empty({values.size(0), values.size(1)}, aoti_torch_dtype_float32())) {
        columns.count = values.size(0);
        columns.channels = values.size(1);
        STD_TORCH_CHECK(coefficients.numel() == columns.count * columns.count && same_size(scale) && same_size(second),
                        "the columns do not fit each other");
        columns.values = floats(values);
        columns.coefficients = floats(coefficients);
        columns.scale = floats(scale);
        columns.second = floats(second);
        columns.integers = static_cast<float*>(integers.mutable_data_ptr());
        columns.change = static_cast<float*>(change.mutable_data_ptr());
        columns.low = float(low);
        columns.high = float(high);
        columns.e2m1 = e2m1;
    }

    bool same_size(const Tensor& tensor) const { return tensor.numel() == values.numel(); }
};

std::tuple<Tensor, Tensor> round_columns(const Tensor& values, const Tensor& factor, const Tensor& scale,
                                         const Tensor& zero_point, int64_t low, int64_t high, bool e2m1) {
    ColumnTensors tensors(values, factor, scale, zero_point, low, high, e2m1);
    kernels().round_columns(tensors.columns, parallel_for);
    return {tensors.integers, tensors.change};
}

std::tuple<Tensor, Tensor> descend_columns(const Tensor& integers, const Tensor& gradient, const Tensor& hessian,
                                           const Tensor& scale, const Tensor& inverse_step, int64_t low,
                                           int64_t high, bool e2m1) {
    ColumnTensors tensors(gradient, hessian, scale, inverse_step, low, high, e2m1);
    Tensor start = dense(integers);
    STD_TORCH_CHECK(tensors.same_size(start), "the integers do not fit the gradient");
    tensors.columns.start = floats(start);
    kernels().descend_columns(tensors.columns, parallel_for);
    return {tensors.integers, tensors.change};
}

Tensor rounding_errors(const Tensor& weight_, const Tensor& scale_, const Tensor& zero_point_, const Tensor& cost_,
                       int64_t low, int64_t high, bool e2m1) {
    Tensor weight = dense(weight_), scale = dense(scale_), zero_point = dense(zero_point_), cost = dense(cost_);
    STD_TORCH_CHECK(weight.dim() == 2 && scale.dim() == 3 && scale.size(1) == weight.size(0) &&
                        zero_point.numel() == scale.numel() && cost.numel() == weight.size(1) && scale.size(2) > 0 &&
                        weight.size(1) % scale.size(2) == 0,
                    "weight, scales and costs do not fit each other");
    Tensor errors = empty({scale.size(0), scale.size(1), scale.size(2)}, aoti_torch_dtype_float32());
    quad::Trials trials{floats(weight),
                        floats(cost),
                        floats(scale),
                        floats(zero_point),
                        static_cast<float*>(errors.mutable_data_ptr()),
                        scale.size(0),
                        scale.size(1),
                        scale.size(2),
                        weight.size(1) / scale.size(2),
                        float(low),
                        float(high),
                        e2m1};
    kernels().rounding_errors(trials, parallel_for);
    return errors;
}

}  // namespace

STABLE_TORCH_LIBRARY(quad_native, m) {
    m.def(
        "linear(Tensor x, int bits, float clip_ratio, int groups, int largest_sub_scale, bool symmetric, "
        "int number_format, int outliers, int block, bool keep_width, bool hadamard, Tensor lines, Tensor scale, Tensor? zero_point, "
        "Tensor? sub_scale, int in_features, int out_features, int stored, Tensor? outlier_weight, Tensor? bias, "
        "Tensor? down=None, Tensor? up=None) -> Tensor");
    m.def(
        "plan_linear(int bits, float clip_ratio, int groups, int largest_sub_scale, bool symmetric, int number_format, "
        "int outliers, int block, bool keep_width, bool hadamard, Tensor lines, Tensor scale, Tensor? zero_point, "
        "Tensor? sub_scale, int in_features, int out_features, int stored, Tensor? outlier_weight, Tensor? bias, "
        "Tensor? down=None, Tensor? up=None) -> int");
    m.def("planned_linear(Tensor x, int number) -> Tensor");
    m.def(
        "integer_linear(Tensor x, Tensor x_scale, Tensor lines, Tensor scale, Tensor? zero_point, "
        "Tensor? sub_scale, int in_features, int out_features, int stored, Tensor? outlier, Tensor? outlier_weight, "
        "Tensor? bias, int out_dtype) -> Tensor");
    m.def(
        "quantize(Tensor x, int bits, float clip_ratio, int groups, int largest_sub_scale, bool symmetric, "
        "int number_format, int outliers, int block, bool keep_width, bool hadamard) -> (Tensor, Tensor, Tensor)");
    m.def(
        "block_in(Tensor x, Tensor norm, float eps, Tensor cosine, Tensor sine, Tensor[] head_norms, Tensor[] parts, "
        "int[] numbers, float clip_ratio) -> Tensor[]");
    m.def(
        "block_out(Tensor attention, Tensor residual, Tensor norm, float eps, Tensor[] parts, int[] numbers, "
        "float[] clip_ratios) -> Tensor");
    m.def(
        "attend(Tensor query, Tensor keys, Tensor values, int positions, Tensor? mask, float scale) -> Tensor");
    m.def("attend_prompt(Tensor query, Tensor keys, Tensor values, float scale, Tensor? mask=None) -> Tensor");
    m.def(
        "plan_blocks(Tensor[] norms, float eps, Tensor[] head_norms, Tensor[] parts, int[] numbers, "
        "float[] clip_ratios) -> int");
    m.def(
        "decode(Tensor x, int number, Tensor cosine, Tensor sine, Tensor(a!)[] keys, Tensor(b!)[] values, int position, "
        "Tensor? mask, float scale) -> Tensor");
    m.def("norm(Tensor x, Tensor weight, float eps) -> Tensor");
    m.def("silu(Tensor x) -> Tensor");
    m.def("hadamard(Tensor x) -> Tensor");
    m.def("head(Tensor x, Tensor words, Tensor scale) -> Tensor");
    m.def("dense_head(Tensor x, Tensor weight) -> Tensor");
    m.def(
        "round_columns(Tensor values, Tensor factor, Tensor scale, Tensor zero_point, int low, int high, "
        "bool e2m1) -> (Tensor, Tensor)");
    m.def(
        "descend_columns(Tensor integers, Tensor gradient, Tensor hessian, Tensor scale, Tensor inverse_step, int low, "
        "int high, bool e2m1) -> (Tensor, Tensor)");
    m.def(
        "rounding_errors(Tensor weight, Tensor scale, Tensor zero_point, Tensor cost, int low, int high, "
        "bool e2m1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quad_native, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("plan_linear", TORCH_BOX(&plan_linear));
    m.impl("planned_linear", TORCH_BOX(&planned_linear));
    m.impl("integer_linear", TORCH_BOX(&integer_linear));
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("block_in", TORCH_BOX(&block_in));
    m.impl("block_out", TORCH_BOX(&block_out));
    m.impl("attend", TORCH_BOX(&attend));
    m.impl("attend_prompt", TORCH_BOX(&attend_prompt));
    m.impl("plan_blocks", TORCH_BOX(&plan_blocks));
    m.impl("decode", TORCH_BOX(&decode));
    m.impl("norm", TORCH_BOX(&norm));
    m.impl("silu", TORCH_BOX(&silu));
    m.impl("hadamard", TORCH_BOX(&hadamard));
    m.impl("head", TORCH_BOX(&head));
    m.impl("dense_head", TORCH_BOX(&dense_head));
    m.impl("round_columns", TORCH_BOX(&round_columns));
    m.impl("descend_columns", TORCH_BOX(&descend_columns));
    m.impl("rounding_errors", TORCH_BOX(&rounding_errors));
}

// Takes a plan out of those that are kept. It goes when the lock is free again: a tensor may ask for Python's.
template <class Plans>
void forget(Plans& plans, std::mutex& mutex, int64_t number) {
    typename Plans::node_type dropped;
    std::lock_guard<std::mutex> lock(mutex);
    dropped = plans.extract(number);
}

// For library.py, by ctypes.
extern "C" {

// Changes with the arguments of the operators.
int quad_interface() { return 8; }
const char* quad_supported() { return quad::supported(); }
const char* quad_chosen() { return quad::chosen() ? quad::chosen()->name : ""; }
int quad_choose(const char* name) { return quad::choose(name); }
void quad_set_planner(void (*function)(int64_t)) { planner = function; }

void quad_forget_blocks(int64_t number) { forget(block_plans, blocks_mutex, number); }
void quad_forget_linear(int64_t number) { forget(linear_plans, linears_mutex, number); }
int64_t quad_planned_outputs(int64_t number) {
    std::lock_guard<std::mutex> lock(linears_mutex);
    auto found = linear_plans.find(number);
    return found == linear_plans.end() ? -1 : found->second->parts.out_features;
}

// `signs` holds the tables of the factors that are no powers of two, one after the other.
void quad_add_plan(int64_t size, int64_t block, int32_t count, const int32_t* orders, const uint8_t* signs) {
    std::lock_guard<std::mutex> lock(plans_mutex);
    if (plans.count(size)) return;
    Plan& made = plans[size];
    made.plan.size = size;
    made.plan.block = block;
    made.plan.factor_count = count;
    for (int32_t i = 0; i < count; ++i) {
        int32_t order = made.plan.order[i] = orders[i];
        if ((order & (order - 1)) == 0) continue;
        int64_t length = int64_t(order) * (order / 4);
        made.signs.emplace_back(signs, signs + length);
        made.plan.signs[i] = made.signs.back().data();
        signs += length;
    }
}
}
