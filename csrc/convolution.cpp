// output[r] = sum_c weight[r, c] * input[c] + bias[r], `*` the two-dimensional cross-correlation of nn.Conv2d, for the active runs r of the
// rows (output channels) and c of the columns (input channels). If `transposed`, `*` is that of nn.ConvTranspose2d, and the columns are on
// the weight's first axis: weight[c, r].
//
// With `grouped`, the weight has one width per group on its second axis, and the groups are what is elastic: as many are active as the
// channels on the other side of that width say.
//
// The convolutions are ATen's. They want dense operands, so the active slice of the weight is copied below capacity (once for a forward and
// its backward), and in static layout the active channels of the activations are. `channels` are those of the output.
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

constexpr const char* kName = "elastic convolution";

using Forward = Tensor(
    const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool,
    IntArrayRef, bool, SymInt, bool, optional<at::ScalarType>);
using Backward = Gradients(
    const Tensor&, const Tensor&, const Tensor&, SymInt, const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, bool,
    IntArrayRef, bool, bool, std::array<bool, 3>);

// All that is known of a convolution before it runs; two numbers of each list, of the vertical and of the horizontal axis.
struct Geometry {
  IntArrayRef stride, padding, dilation;
  bool transposed;
  IntArrayRef output_padding;
  bool grouped;

  std::vector<int64_t> saved() const {
    std::vector<int64_t> numbers{transposed, grouped};
    for (const IntArrayRef part : {stride, padding, dilation, output_padding}) numbers.insert(numbers.end(), part.begin(), part.end());
    return numbers;
  }

  // Refers to `numbers`.
  static Geometry of(IntArrayRef numbers) {
    return {numbers.slice(2, 2), numbers.slice(4, 2), numbers.slice(6, 2), numbers[0] != 0, numbers.slice(8, 2), numbers[1] != 0};
  }

  int64_t output_size(int64_t input, int64_t kernel, int axis) const {
    const int64_t s = stride[axis], p = padding[axis], reach = dilation[axis] * (kernel - 1) + 1;
    return transposed ? (input - 1) * s - 2 * p + reach + output_padding[axis] : (input + 2 * p - reach) / s + 1;
  }
};

// Where the active rows and columns lie in the weight, and the groups that they make.
struct Placement {
  Placement(const Tensor& weight, const Plan& plan, const Geometry& g) {
    first = g.transposed ? plan.columns : plan.rows;
    second = g.transposed ? plan.rows : plan.columns;
    if (!g.grouped) return;
    groups = total(second) / weight.size(1);
    second = Runs{{0, weight.size(1)}};
  }

  Tensor operand(const Tensor& weight, at::ScalarType dtype) const { return slice(slice(weight, 0, first), 1, second).to(dtype); }

  Runs first, second;  // of the weight's axes
  int64_t groups = 1;
};

// What ATen would give its output, for operands of the active size.
at::MemoryFormat format_of(const Tensor& input, const Tensor& weight, const Geometry& g) {
  const auto last = at::MemoryFormat::ChannelsLast;
  const bool wanted = input.suggest_memory_format() == last || weight.suggest_memory_format() == last;
  return wanted && (g.transposed || input.scalar_type() != at::kDouble) ? last : at::MemoryFormat::Contiguous;
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

// The dense copy of a weight's active slice, from a forward to its backward. The ops say nothing of it: to them it is the slice as it was in
// forward. While one lives, the kernel of that weight on its thread fills it or, once it is filled, reads it.
class DenseSlice {
 public:
  explicit DenseSlice(const Tensor& weight, Tensor filled = {})
      : tensor(std::move(filled)), weight_(weight.unsafeGetTensorImpl()), outer_(current) {
    current = this;
  }
  ~DenseSlice() { current = outer_; }
  DenseSlice(const DenseSlice&) = delete;
  DenseSlice& operator=(const DenseSlice&) = delete;

  static Tensor of(const Tensor& weight, const Placement& placement, at::ScalarType dtype, at::MemoryFormat format) {
    DenseSlice* const asked = current != nullptr && current->weight_ == weight.unsafeGetTensorImpl() ? current : nullptr;
    if (asked != nullptr && asked->tensor.defined()) return asked->tensor;
    const Tensor operand = placement.operand(weight, dtype).contiguous(format);
    if (asked != nullptr && !operand.is_alias_of(weight)) asked->tensor = operand;
    return operand;
  }

  Tensor tensor;

 private:
  const c10::TensorImpl* weight_;
  DenseSlice* outer_;
  static thread_local DenseSlice* current;
};

thread_local DenseSlice* DenseSlice::current = nullptr;

Tensor convolution_native(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, bool grouped,
    int64_t channels, bool compact, optional<at::ScalarType> dtype) {
  const Geometry g{stride, padding, dilation, transposed, output_padding, grouped};
  const Plan plan(control, slots, compact);
  const auto type = dtype.value_or(weight.scalar_type());
  const auto format = format_of(input, weight, g);
  if (plan.rows.empty()) {
    std::vector<int64_t> sizes{input.size(0), channels};
    for (int i = 0; i < 2; ++i) sizes.push_back(g.output_size(input.size(2 + i), weight.size(2 + i), i));
    return at::empty(sizes, input.options().memory_format(format)).zero_();
  }
  const Tensor x = slice(input, 1, plan.in);
  const auto b = bias ? optional<Tensor>(slice(*bias, 0, plan.rows).to(type)) : std::nullopt;
  const Placement placement(weight, plan, g);
  const Tensor w = DenseSlice::of(weight, placement, type, format);
  return place(
      at::convolution(x, w, b, stride, padding, dilation, transposed, output_padding, placement.groups), plan.out, channels, format);
}

// `part` at its place in a gradient of the weight's shape and memory format, zero elsewhere.
Tensor scatter_weight(const Tensor& part, const Tensor& weight, const Placement& placement) {
  const auto format = weight.suggest_memory_format();
  if (part.numel() == weight.numel()) return part.to(weight.scalar_type()).contiguous(format);
  Tensor whole = zeros_for_gradient(weight, placement.first, placement.second, format);
  int64_t row = 0;
  for (const Run& r : placement.first) {
    Tensor rows = whole.narrow(0, r.start, r.length);
    write(rows, part.narrow(0, row, r.length), 1, placement.second);
    row += r.length;
  }
  return whole;
}

Gradients gradients_of_active(
    const Tensor& grad, const Tensor& input, const Tensor& operand, int64_t groups, const Plan& plan, const Geometry& g,
    std::array<bool, 3> mask) {
  return at::convolution_backward(
      slice(grad, 1, plan.out), slice(input, 1, plan.in), operand, IntArrayRef(total(plan.rows)), g.stride, g.padding, g.dilation,
      g.transposed, g.output_padding, groups, mask);
}

// What `mask` does not ask for comes back with no elements.
Gradients convolution_backward_native(
    const Tensor& grad, const Tensor& input, const Tensor& weight, int64_t bias_size, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, bool grouped, bool compact,
    std::array<bool, 3> mask) {
  const Geometry g{stride, padding, dilation, transposed, output_padding, grouped};
  const Plan plan(control, slots, compact);
  const Placement placement(weight, plan, g);
  const auto format = format_of(input, weight, g);
  Tensor gx, gw, gb;
  if (!plan.rows.empty()) {
    const Tensor operand = DenseSlice::of(weight, placement, grad.scalar_type(), format);
    std::tie(gx, gw, gb) = gradients_of_active(grad, input, operand, placement.groups, plan, g, mask);
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
    gw = scatter_weight(gw, weight, placement);
  } else {
    gw = at::zeros_like(weight, weight.suggest_memory_format());
  }
  const Tensor part = gb;
  gb = at::zeros({mask[2] ? bias_size : 0}, weight.options());
  if (mask[2] && part.defined()) write(gb, part, 0, plan.rows);
  return {gx, gw, gb};
}

// Differentiable gradients, for double backward: the same equations in ATen ops.
Gradients differentiable_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, int64_t bias_size, const Tensor& control, const Tensor& slots,
    const Geometry& g, bool compact, std::array<bool, 3> mask) {
  const Plan plan(control, slots, compact);
  if (plan.rows.empty()) return {at::zeros_like(input), at::zeros_like(weight), at::zeros({bias_size}, weight.options())};
  const Placement placement(weight, plan, g);
  const Tensor operand = placement.operand(weight, grad.scalar_type());
  auto [gx, gw, gb] = gradients_of_active(grad, input, operand, placement.groups, plan, g, mask);
  if (mask[0]) gx = embed(gx, 1, plan.in, input.size(1));
  if (mask[1]) {
    gw = embed(gw.to(weight.scalar_type()), 1, placement.second, weight.size(1));
    gw = embed(gw, 0, placement.first, weight.size(0));
  }
  if (mask[2]) gb = embed(gb.to(weight.scalar_type()), 0, plan.rows, bias_size);
  return {fence(gx, control, kName), fence(gw, control, kName), fence(gb, control, kName)};
}

Tensor call_convolution(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots, const Geometry& g,
    const SymInt& channels, bool compact, optional<at::ScalarType> dtype) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::convolution", "").typed<Forward>();
  return op.call(
      input, weight, bias, control, slots, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.grouped, channels, compact,
      dtype);
}

struct Convolution : torch::autograd::Function<Convolution> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
      const Tensor& control, const Tensor& slots, const Geometry& g, const SymInt& channels, bool compact,
      optional<at::ScalarType> dtype) {
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["geometry"] = g.saved();
    ctx->saved_data["compact"] = compact;
    ctx->saved_data["bias_size"] = bias ? bias->sym_size(0) : SymInt(0);
    const at::AutoDispatchBelowADInplaceOrView guard;
    const DenseSlice dense(weight);
    const Tensor output = call_convolution(input, weight, bias, control, slots, g, channels, compact, dtype);
    ctx->save_for_backward({input, weight, slots, dense.tensor});
    return output;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    const Tensor control = data["control"].toTensor();
    check_generation(control, data["version"].toInt(), kName);
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &slots = saved[2], &grad = grads[0];
    variable_list result(9);
    if (!grad.defined()) return result;
    const auto numbers = data["geometry"].toIntVector();
    const Geometry g = Geometry::of(numbers);
    const bool compact = data["compact"].toBool();
    const SymInt bias_size = data["bias_size"].toSymInt();
    const std::array<bool, 3> mask{
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias_size != 0 && ctx->needs_input_grad(2)};
    Gradients gradients;
    if (at::GradMode::is_enabled()) {
      gradients =
          differentiable_backward(grad, input, weight, bias_size.expect_int(), control, slots, g, compact, mask);
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const KeepGradients keep;
      const DenseSlice dense(weight, saved[3]);
      static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::convolution_backward", "").typed<Backward>();
      gradients = op.call(
          grad, input, weight, bias_size, control, slots, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.grouped,
          compact, mask);
    }
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    if (mask[2]) result[2] = std::get<2>(gradients);
    return result;
  }
};

Tensor convolution_autograd(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, bool grouped,
    SymInt channels, bool compact, optional<at::ScalarType> dtype) {
  const Geometry g{stride, padding, dilation, transposed, output_padding, grouped};
  const bool tracked = at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
  if (tracked) return Convolution::apply(input, weight, bias, control, slots, g, channels, compact, dtype);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_convolution(input, weight, bias, control, slots, g, channels, compact, dtype);
}

// Casts the input as autocast does, and leaves the cast of the weight's active slice to the kernel.
template <at::DeviceType device, c10::DispatchKey key>
Tensor convolution_autocast(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, bool grouped,
    SymInt channels, bool compact, optional<at::ScalarType>) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const Geometry g{stride, padding, dilation, transposed, output_padding, grouped};
  const Tensor x = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), input, device);
  return call_convolution(x, weight, bias, control, slots, g, channels, compact, x.scalar_type());
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("convolution", convolution_native);
  m.impl("convolution_backward", convolution_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("convolution", convolution_native);
  m.impl("convolution_backward", convolution_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("convolution", convolution_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCPU, m) {
  m.impl("convolution", convolution_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) {
  m.impl("convolution", convolution_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace esper
