// output[r] = sum_c input[c] weight[r, c]^T + bias[r], for the active runs r of the rows and c of the columns of `weight`.
//
// The operands are strided slices: gemm takes the leading dimension, so no copy of the weight is made unless autocast asks for one, which
// then has the active size.

#include "gradient.h"
#include "widths.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace esper {
namespace {

using at::Tensor;
using c10::SymInt;
using std::optional;
using torch::autograd::variable_list;

Tensor flat(const Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

Tensor narrow(const Tensor& tensor, int64_t axis, const Run& run) {
  return run.start == 0 && run.length == tensor.size(axis) ? tensor : tensor.narrow(axis, run.start, run.length);
}

Tensor operand(const Tensor& weight, const Run& row, const Run& column, at::ScalarType dtype) {
  return narrow(narrow(weight, 0, row), 1, column).to(dtype);
}

// Adding the products of several runs up in the output rounds at each. In a narrow type that is worth a copy of the active operands.
bool rounds_too_often(const Runs& summed, at::ScalarType dtype) { return summed.size() > 1 && at::isReducedFloatingType(dtype); }

Tensor empty_like_with_width(const Tensor& input, int64_t width) {
  auto sizes = input.sizes().vec();
  sizes.back() = width;
  return at::empty(sizes, input.options());
}

// The forward with whatever ATen makes differentiable; also what single runs in compact layout use, since it is what nn.Linear calls.
Tensor linear_native(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    optional<int64_t> width, optional<at::ScalarType> dtype) {
  const Plan plan(control, slots, width.has_value());
  const auto type = dtype.value_or(weight.scalar_type());
  auto bias_at = [&](const Run& row) { return bias ? optional<Tensor>(narrow(*bias, 0, row).to(type)) : std::nullopt; };
  if (width && plan.single()) {
    return at::linear(input, operand(weight, plan.rows[0], plan.columns[0], type), bias_at(plan.rows[0]));
  }
  Tensor output = empty_like_with_width(input, width.value_or(weight.size(0)));
  Tensor y = output.view({-1, output.size(-1)});
  if (rounds_too_often(plan.columns, type)) {
    const Tensor x = width ? flat(input) : slice(flat(input), 1, plan.in);
    for (size_t r = 0; r < plan.rows.size(); ++r) {
      const Tensor w = slice(narrow(weight, 0, plan.rows[r]), 1, plan.columns).to(type);
      narrow(y, 1, plan.out[r]).copy_(at::linear(x, w, bias_at(plan.rows[r])));
    }
    zero_dormant(y, 1, plan.out);
    return output;
  }
  const Tensor x = flat(input);
  for (size_t r = 0; r < plan.rows.size(); ++r) {
    Tensor part = narrow(y, 1, plan.out[r]);
    for (size_t c = 0; c < plan.columns.size(); ++c) {
      const Tensor w = operand(weight, plan.rows[r], plan.columns[c], type).t();
      const Tensor xc = narrow(x, 1, plan.in[c]);
      if (c > 0) {
        part.addmm_(xc, w);
      } else if (bias) {
        at::addmm_out(part, *bias_at(plan.rows[r]), xc, w);
      } else {
        at::mm_out(part, xc, w);
      }
    }
  }
  zero_dormant(y, 1, plan.out);
  return output;
}

Tensor linear_grad_input_native(
    const Tensor& grad, const Tensor& weight, const Tensor& control, const Tensor& slots, optional<int64_t> width, int64_t in_width) {
  const Plan plan(control, slots, width.has_value());
  Tensor output = empty_like_with_width(grad, in_width);
  Tensor gx = output.view({-1, output.size(-1)});
  const Tensor gy = flat(grad);
  if (plan.rows.empty()) return output.zero_();
  if (rounds_too_often(plan.rows, grad.scalar_type())) {
    const Tensor gr = width ? gy : slice(gy, 1, plan.out);
    for (size_t c = 0; c < plan.columns.size(); ++c) {
      const Tensor w = slice(narrow(weight, 1, plan.columns[c]), 0, plan.rows).to(grad.scalar_type());
      narrow(gx, 1, plan.in[c]).copy_(at::mm(gr, w));
    }
    zero_dormant(gx, 1, plan.in);
    return output;
  }
  for (size_t c = 0; c < plan.columns.size(); ++c) {
    Tensor part = narrow(gx, 1, plan.in[c]);
    for (size_t r = 0; r < plan.rows.size(); ++r) {
      const Tensor w = operand(weight, plan.rows[r], plan.columns[c], grad.scalar_type()).conj();
      const Tensor gr = narrow(gy, 1, plan.out[r]);
      if (r > 0) {
        part.addmm_(gr, w);
      } else {
        at::mm_out(part, gr, w);
      }
    }
  }
  zero_dormant(gx, 1, plan.in);
  return output;
}

Tensor linear_grad_weight_native(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& control, const Tensor& slots, optional<int64_t> width) {
  const Plan plan(control, slots, width.has_value());
  Tensor gw = zeros_for_gradient(weight, plan.rows, plan.columns);
  const Tensor gy = flat(grad), x = flat(input);
  for (size_t r = 0; r < plan.rows.size(); ++r) {
    for (size_t c = 0; c < plan.columns.size(); ++c) {
      Tensor part = narrow(narrow(gw, 0, plan.rows[r]), 1, plan.columns[c]);
      const Tensor gr = narrow(gy, 1, plan.out[r]).t(), xc = narrow(x, 1, plan.in[c]).conj();
      if (gr.scalar_type() == part.scalar_type()) {
        at::mm_out(part, gr, xc);
      } else {
        part.copy_(at::mm(gr, xc));
      }
    }
  }
  return gw;
}

Tensor linear_grad_bias_native(
    const Tensor& grad, const Tensor& bias, const Tensor& control, const Tensor& slots, optional<int64_t> width) {
  const Plan plan(control, slots, width.has_value());
  Tensor gb = at::zeros_like(bias);
  const Tensor gy = flat(grad);
  for (size_t r = 0; r < plan.rows.size(); ++r) narrow(gb, 0, plan.rows[r]).copy_(narrow(gy, 1, plan.out[r]).sum(0));
  return gb;
}

// Differentiable gradients, for double backward: the same equations in ATen ops.
variable_list differentiable_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t in_width, std::array<bool, 3> needed) {
  const Plan plan(control, slots, compact);
  variable_list result(3);
  const Tensor gy = slice(flat(grad), 1, plan.out);
  if (needed[0]) {
    const Tensor w = slice(slice(weight, 0, plan.rows), 1, plan.columns).to(gy.scalar_type()).conj();
    auto sizes = grad.sizes().vec();
    sizes.back() = in_width;
    result[0] = embed(gy.mm(w), 1, plan.in, in_width).view(sizes);
  }
  if (needed[1]) {
    const Tensor gw = gy.t().mm(slice(flat(input), 1, plan.in).conj()).to(weight.scalar_type());
    result[1] = embed(embed(gw, 1, plan.columns, weight.size(1)), 0, plan.rows, weight.size(0));
  }
  if (needed[2]) result[2] = embed(gy.sum(0).to(bias.scalar_type()), 0, plan.rows, bias.size(0));
  for (Tensor& gradient : result) gradient = fence(gradient, control, "ElasticLinear");
  return result;
}

Tensor call_linear(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    const optional<SymInt>& width, optional<at::ScalarType> dtype) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("esper_elastic::linear", "")
                       .typed<Tensor(
                           const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, optional<SymInt>,
                           optional<at::ScalarType>)>();
  return op.call(input, weight, bias, control, slots, width, dtype);
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
      const Tensor& control, const Tensor& slots, const optional<SymInt>& width, optional<at::ScalarType> dtype) {
    // Values are saved where a gradient needs them, as nn does; for the other gradients the shape of a parameter is enough.
    ctx->save_for_backward({weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor(), slots});
    ctx->saved_data["weight"] = weight;
    ctx->saved_data["bias"] = bias.value_or(Tensor());
    ctx->saved_data["in_width"] = input.sym_size(-1);
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["width"] = width ? c10::IValue(*width) : c10::IValue();
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_linear(input, weight, bias, control, slots, width, dtype);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticLinear");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &slots = saved[2], &grad = grads[0];
    const Tensor weight = saved[1].defined() ? saved[1] : ctx->saved_data["weight"].toTensor();
    const Tensor bias = ctx->saved_data["bias"].toTensor();
    variable_list result(7);
    if (!grad.defined()) return result;
    const auto& stored = ctx->saved_data["width"];
    optional<SymInt> width;
    if (!stored.isNone()) width.emplace(stored.toSymInt());
    const SymInt in_width = ctx->saved_data["in_width"].toSymInt();
    const std::array<bool, 3> needed{
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias.defined() && ctx->needs_input_grad(2)};
    if (at::GradMode::is_enabled()) {
      auto gradients = differentiable_backward(grad, input, weight, bias, control, slots, width.has_value(), in_width.expect_int(), needed);
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const KeepGradients keep;
    static auto& dispatcher = c10::Dispatcher::singleton();
    if (needed[0]) {
      static auto op =
          dispatcher.findSchemaOrThrow("esper_elastic::linear_grad_input", "")
              .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, optional<SymInt>, SymInt)>();
      result[0] = op.call(grad, weight, control, slots, width, in_width);
    }
    if (needed[1]) {
      static auto op =
          dispatcher.findSchemaOrThrow("esper_elastic::linear_grad_weight", "")
              .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, optional<SymInt>)>();
      result[1] = op.call(grad, input, weight, control, slots, width);
    }
    if (needed[2]) {
      static auto op =
          dispatcher.findSchemaOrThrow("esper_elastic::linear_grad_bias", "")
              .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, optional<SymInt>)>();
      result[2] = op.call(grad, bias, control, slots, width);
    }
    return result;
  }
};

Tensor linear_autograd(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    optional<SymInt> width, optional<at::ScalarType> dtype) {
  const bool tracked = at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
  if (tracked) return Linear::apply(input, weight, bias, control, slots, width, dtype);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(input, weight, bias, control, slots, width, dtype);
}

// Casts the input as autocast does, and leaves the cast of the weight's active slice to the kernel.
template <at::DeviceType device, c10::DispatchKey key>
Tensor linear_autocast(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    optional<SymInt> width, optional<at::ScalarType>) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const Tensor x = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), input, device);
  return call_linear(x, weight, bias, control, slots, width, x.scalar_type());
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("linear", linear_native);
  m.impl("linear_grad_input", linear_grad_input_native);
  m.impl("linear_grad_weight", linear_grad_weight_native);
  m.impl("linear_grad_bias", linear_grad_bias_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("linear", linear_native);
  m.impl("linear_grad_input", linear_grad_input_native);
  m.impl("linear_grad_weight", linear_grad_weight_native);
  m.impl("linear_grad_bias", linear_grad_bias_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("linear", linear_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCPU, m) {
  m.impl("linear", linear_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace
}  // namespace esper
