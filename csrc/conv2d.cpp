// output[r] = sum_c weight[r, c] * input[c] + bias[r], `*` the two-dimensional cross-correlation of nn.Conv2d, for the active runs r of the
// rows and c of the columns of `weight`.
//
// With `grouped`, the weight has one width per group on its second axis, and the groups are what is elastic: as many are active as their
// input channels say.
//
// The convolutions are ATen's. They want dense operands, so the active slice of the weight is copied below capacity, and in static layout
// the active channels of the activations are.
#include "gradient.h"
#include "widths.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace esper {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using std::optional;
using torch::autograd::variable_list;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

using Forward = Tensor(
    const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool,
    optional<SymInt>, optional<at::ScalarType>);
using Backward = Gradients(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool,
    optional<SymInt>, std::array<bool, 3>);

// What ATen would give its output, for operands of the active size.
at::MemoryFormat format_of(const Tensor& input, const Tensor& weight) {
  const auto last = at::MemoryFormat::ChannelsLast;
  const bool wanted = input.suggest_memory_format() == last || weight.suggest_memory_format() == last;
  return wanted && input.scalar_type() != at::kDouble ? last : at::MemoryFormat::Contiguous;
}

Tensor operand(const Tensor& weight, const Plan& plan, bool grouped, at::ScalarType dtype) {
  const Tensor rows = slice(weight, 0, plan.rows);
  return (grouped ? rows : slice(rows, 1, plan.columns)).to(dtype);
}

int64_t groups_of(const Tensor& weight, const Plan& plan, bool grouped) { return grouped ? total(plan.columns) / weight.size(1) : 1; }

int64_t output_size(int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (input + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// `part` at its channels in an activation of `channels`, zero elsewhere.
Tensor place(const Tensor& part, const Runs& runs, int64_t channels, at::MemoryFormat format) {
  if (total(runs) == channels) return part.contiguous(format);
  auto sizes = part.sizes().vec();
  sizes[1] = channels;
  Tensor whole = zeros_outside(sizes, part.options(), 1, runs, format);
  write(whole, part, 1, runs);
  return whole;
}

Tensor conv2d_native(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool grouped, optional<int64_t> width,
    optional<at::ScalarType> dtype) {
  const Plan plan(control, slots, width.has_value());
  const auto type = dtype.value_or(weight.scalar_type());
  const auto format = format_of(input, weight);
  if (plan.rows.empty()) {
    std::vector<int64_t> sizes{input.size(0), weight.size(0)};
    for (int i = 0; i < 2; ++i) sizes.push_back(output_size(input.size(2 + i), weight.size(2 + i), stride[i], padding[i], dilation[i]));
    return at::empty(sizes, input.options().memory_format(format)).zero_();
  }
  const Tensor x = width ? input : slice(input, 1, plan.in);
  const auto b = bias ? optional<Tensor>(slice(*bias, 0, plan.rows).to(type)) : std::nullopt;
  const Tensor w = operand(weight, plan, grouped, type);
  const Tensor y = at::convolution(x, w, b, stride, padding, dilation, false, {0, 0}, groups_of(weight, plan, grouped));
  return place(y, plan.out, width.value_or(weight.size(0)), format);
}

// `part` at the active rows and columns of a gradient of the weight's shape and memory format, zero elsewhere.
Tensor scatter_weight(const Tensor& part, const Tensor& weight, const Plan& plan, bool grouped) {
  const auto format = weight.suggest_memory_format();
  if (part.numel() == weight.numel()) return part.to(weight.scalar_type()).contiguous(format);
  const Runs columns = grouped ? Runs{{0, weight.size(1)}} : plan.columns;
  Tensor whole = zeros_for_gradient(weight, plan.rows, columns, format);
  int64_t row = 0;
  for (const Run& r : plan.rows) {
    int64_t column = 0;
    for (const Run& c : columns) {
      whole.narrow(0, r.start, r.length).narrow(1, c.start, c.length).copy_(
          part.narrow(0, row, r.length).narrow(1, column, c.length));
      column += c.length;
    }
    row += r.length;
  }
  return whole;
}

// What `mask` does not ask for comes back with no elements.
Gradients conv2d_backward_native(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& control, const Tensor& slots, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool grouped, optional<int64_t> width, std::array<bool, 3> mask) {
  const Plan plan(control, slots, width.has_value());
  const auto format = format_of(input, weight);
  Tensor gx, gw, gb;
  if (!plan.rows.empty()) {
    const Tensor gy = slice(grad, 1, plan.out), x = slice(input, 1, plan.in);
    const Tensor w = operand(weight, plan, grouped, grad.scalar_type());
    std::tie(gx, gw, gb) = at::convolution_backward(
        gy, x, w, IntArrayRef{w.size(0)}, stride, padding, dilation, false, {0, 0}, groups_of(weight, plan, grouped), mask);
  }
  if (!mask[0]) {
    gx = at::empty({0}, input.options());
  } else if (gx.defined()) {
    gx = place(gx, plan.in, input.size(1), format);
  } else {
    gx = at::zeros_like(input, format);
  }
  if (!mask[1]) {
    gw = at::empty({0}, weight.options());
  } else if (gw.defined()) {
    gw = scatter_weight(gw, weight, plan, grouped);
  } else {
    gw = at::zeros_like(weight, weight.suggest_memory_format());
  }
  const Tensor part = gb;
  gb = at::zeros({mask[2] ? weight.size(0) : 0}, weight.options());
  if (mask[2] && part.defined()) {
    int64_t offset = 0;
    for (const Run& run : plan.rows) {
      gb.narrow(0, run.start, run.length).copy_(part.narrow(0, offset, run.length));
      offset += run.length;
    }
  }
  return {gx, gw, gb};
}

// Differentiable gradients, for double backward: the same equations in ATen ops.
Gradients differentiable_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& control, const Tensor& slots, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool grouped, bool compact, std::array<bool, 3> mask) {
  const Plan plan(control, slots, compact);
  if (plan.rows.empty()) return {at::zeros_like(input), at::zeros_like(weight), at::zeros({weight.size(0)}, weight.options())};
  const Tensor gy = slice(grad, 1, plan.out), x = slice(input, 1, plan.in);
  const Tensor w = operand(weight, plan, grouped, grad.scalar_type());
  auto [gx, gw, gb] = at::convolution_backward(
      gy, x, w, IntArrayRef{w.size(0)}, stride, padding, dilation, false, {0, 0}, groups_of(weight, plan, grouped), mask);
  if (mask[0]) gx = embed(gx, 1, plan.in, input.size(1));
  if (mask[1]) {
    gw = gw.to(weight.scalar_type());
    if (!grouped) gw = embed(gw, 1, plan.columns, weight.size(1));
    gw = embed(gw, 0, plan.rows, weight.size(0));
  }
  if (mask[2]) gb = embed(gb.to(weight.scalar_type()), 0, plan.rows, weight.size(0));
  return {fence(gx, control, "ElasticConv2d"), fence(gw, control, "ElasticConv2d"), fence(gb, control, "ElasticConv2d")};
}

Tensor call_conv2d(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool grouped, const optional<SymInt>& width,
    optional<at::ScalarType> dtype) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::conv2d", "").typed<Forward>();
  return op.call(input, weight, bias, control, slots, stride, padding, dilation, grouped, width, dtype);
}

struct Conv2d : torch::autograd::Function<Conv2d> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
      const Tensor& control, const Tensor& slots, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool grouped,
      const optional<SymInt>& width, optional<at::ScalarType> dtype) {
    ctx->save_for_backward({input, weight, slots});
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["grouped"] = grouped;
    ctx->saved_data["width"] = width ? c10::IValue(*width) : c10::IValue();
    ctx->saved_data["bias"] = bias.has_value();
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_conv2d(input, weight, bias, control, slots, stride, padding, dilation, grouped, width, dtype);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    const Tensor control = data["control"].toTensor();
    check_generation(control, data["version"].toInt(), "ElasticConv2d");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &slots = saved[2], &grad = grads[0];
    variable_list result(11);
    if (!grad.defined()) return result;
    const auto stride = data["stride"].toIntVector(), padding = data["padding"].toIntVector(), dilation = data["dilation"].toIntVector();
    const bool grouped = data["grouped"].toBool();
    const optional<SymInt> width = data["width"].isNone() ? std::nullopt : optional<SymInt>(data["width"].toSymInt());
    const std::array<bool, 3> mask{
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), data["bias"].toBool() && ctx->needs_input_grad(2)};
    Gradients gradients;
    if (at::GradMode::is_enabled()) {
      gradients = differentiable_backward(
          grad, input, weight, control, slots, stride, padding, dilation, grouped, width.has_value(), mask);
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const KeepGradients keep;
      static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::conv2d_backward", "").typed<Backward>();
      gradients = op.call(grad, input, weight, control, slots, stride, padding, dilation, grouped, width, mask);
    }
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    if (mask[2]) result[2] = std::get<2>(gradients);
    return result;
  }
};

Tensor conv2d_autograd(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool grouped, optional<SymInt> width, optional<at::ScalarType> dtype) {
  const bool tracked = at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
  if (tracked) return Conv2d::apply(input, weight, bias, control, slots, stride, padding, dilation, grouped, width, dtype);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_conv2d(input, weight, bias, control, slots, stride, padding, dilation, grouped, width, dtype);
}

// Casts the input as autocast does, and leaves the cast of the weight's active slice to the kernel.
template <at::DeviceType device, c10::DispatchKey key>
Tensor conv2d_autocast(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool grouped, optional<SymInt> width, optional<at::ScalarType>) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const Tensor x = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), input, device);
  return call_conv2d(x, weight, bias, control, slots, stride, padding, dilation, grouped, width, x.scalar_type());
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("conv2d", conv2d_native);
  m.impl("conv2d_backward", conv2d_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("conv2d", conv2d_native);
  m.impl("conv2d_backward", conv2d_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("conv2d", conv2d_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCPU, m) {
  m.impl("conv2d", conv2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) {
  m.impl("conv2d", conv2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace esper
