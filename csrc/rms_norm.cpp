// output[r] = input[r] / sqrt(mean(input[r]^2) + eps) * weight over the active units of each row r: the last `normalized_dims` axes of the
// activation, of which the first is elastic.
//
// On CUDA ATen has a kernel for it, which takes contiguous rows; on the CPU it has none, and the formula is spelled out here as it is there.

#include "norm.h"

#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace esper {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;
using Mask = std::array<bool, 2>;

at::ScalarType computed_in(const Tensor& x) { return at::toOpMathType(x.scalar_type()); }

bool served_by_aten(const Tensor& x, const optional<Tensor>& weight) {
  return x.is_cuda() && (!weight || weight->scalar_type() == x.scalar_type());
}

at::DimVector axes_from(const Tensor& x, int64_t first) {
  at::DimVector axes(x.dim() - first);
  std::iota(axes.begin(), axes.end(), first);
  return axes;
}

Tensor reciprocal_root(const Tensor& x, int64_t axis, double eps) {
  return x.square().mean(axes_from(x, axis), true).add(eps).rsqrt();
}

// The gradients of `x` and `weight`, in ATen ops that have derivatives themselves. Where active units are few, the two terms of that of `x`
// all but cancel; so each is rounded as autograd rounds it in nn's own backward.
Two gradients(
    const Tensor& grad, const Tensor& x, const optional<Tensor>& weight, const Tensor& rstd, int64_t axis, Mask mask) {
  Two result;
  const Tensor g = grad.to(rstd.scalar_type()), wide = x.to(rstd.scalar_type());
  if (mask[1]) {
    const Tensor products = g * (wide * rstd);
    at::DimVector rows(axis);
    std::iota(rows.begin(), rows.end(), 0);
    std::get<1>(result) = (rows.empty() ? products : products.sum(rows)).to(weight->scalar_type());
  }
  if (mask[0]) {
    const auto units = axes_from(x, axis);
    const Tensor gw = weight ? g * *weight : g;
    const Tensor along = (gw * wide).sum(units, true) * -0.5 * rstd.pow(3) / c10::multiply_integers(x.sizes().slice(axis));
    std::get<0>(result) = (gw * rstd + along * 2 * wide).to(x.scalar_type());
  }
  return result;
}

Two rms_norm_native(
    const Tensor& input, const optional<Tensor>& weight, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims,
    double eps) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  if (plan.units.empty()) {
    auto rows = input.sizes().vec();
    std::fill(rows.begin() + plan.axis, rows.end(), 1);
    return {at::zeros(input.sizes(), input.options()), at::zeros(rows, input.options().dtype(computed_in(input)))};
  }
  const Tensor x = plan.gather(input);
  const auto w = sliced(weight, plan.units);
  if (served_by_aten(x, w)) {
    auto [output, rstd] = at::_fused_rms_norm(x, x.sizes().slice(plan.axis), w, eps);
    return {plan.spread(output, input), rstd};
  }
  const Tensor wide = x.to(computed_in(x));
  const Tensor rstd = reciprocal_root(wide, plan.axis, eps);
  Tensor output = wide * rstd;
  if (w) output.mul_(*w);
  return {plan.spread(output.to(x.scalar_type()).contiguous(), input), rstd};
}

Two rms_norm_backward_native(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const Tensor& rstd, const Tensor& control, const Tensor& slots,
    bool compact, int64_t normalized_dims, Mask mask) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  auto unused = [&] { return at::empty({0}, grad.options()); };  // a new one each, since outputs of an op may not alias
  Two result{unused(), mask[1] ? at::zeros_like(*weight) : unused()};
  auto& [gx, gw] = result;
  if (plan.units.empty()) {
    if (mask[0]) gx = at::zeros(input.sizes(), input.options());
    return result;
  }
  const Tensor x = plan.gather(input), g = plan.gather(grad);
  const auto w = sliced(weight, plan.units);
  const auto [px, pw] = served_by_aten(x, w) ? at::_fused_rms_norm_backward(g, x, x.sizes().slice(plan.axis), rstd, w, mask)
                                             : gradients(g, x, w, rstd, plan.axis, mask);
  if (mask[0]) gx = plan.spread(px.contiguous(), input);
  if (mask[1]) write(gw, pw, 0, plan.units);
  return result;
}

// Differentiable gradients, for double backward; so rstd is computed once more, as a function of the input.
variable_list differentiable_backward(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const Tensor& control, const Tensor& slots, bool compact,
    int64_t normalized_dims, double eps, Mask mask) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  variable_list result(2);
  if (plan.units.empty()) {
    if (mask[0]) result[0] = at::zeros_like(input);
    if (mask[1]) result[1] = at::zeros_like(*weight);
    return result;
  }
  const Tensor x = plan.gather(input);
  const Tensor rstd = reciprocal_root(x.to(computed_in(x)), plan.axis, eps);
  const auto [gx, gw] = gradients(plan.gather(grad), x, sliced(weight, plan.units), rstd, plan.axis, mask);
  if (mask[0]) result[0] = embed(gx, plan.axis, plan.place, input.size(plan.axis));
  if (mask[1]) result[1] = embed(gw, 0, plan.units, weight->size(0));
  for (Tensor& gradient : result) gradient = fence(gradient, control, "ElasticRMSNorm");
  return result;
}

Two call_rms_norm(
    const Tensor& input, const optional<Tensor>& weight, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims,
    double eps) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::rms_norm", "").typed<decltype(rms_norm_native)>();
  return op.call(input, weight, control, slots, compact, normalized_dims, eps);
}

struct RMSNorm : torch::autograd::Function<RMSNorm> {
  static variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight, const Tensor& control,
      const Tensor& slots, bool compact, int64_t normalized_dims, double eps) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["compact"] = compact;
    ctx->saved_data["normalized_dims"] = normalized_dims;
    ctx->saved_data["eps"] = eps;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, rstd] = call_rms_norm(input, weight, control, slots, compact, normalized_dims, eps);
    ctx->mark_non_differentiable({rstd});
    ctx->saved_data["weight"] = weight.value_or(Tensor());  // its values are saved where a gradient needs them, as nn does
    ctx->save_for_backward({input, input.requires_grad() ? weight.value_or(Tensor()) : Tensor(), rstd, slots});
    return {output, rstd};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticRMSNorm");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &rstd = saved[2], &slots = saved[3], &grad = grads[0];
    const auto weight = given(saved[1].defined() ? saved[1] : ctx->saved_data["weight"].toTensor());
    variable_list result(7);
    if (!grad.defined()) return result;
    const bool compact = ctx->saved_data["compact"].toBool();
    const int64_t normalized_dims = ctx->saved_data["normalized_dims"].toInt();
    const Mask mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1)};
    if (at::GradMode::is_enabled()) {
      const double eps = ctx->saved_data["eps"].toDouble();
      auto gradients = differentiable_backward(grad, input, weight, control, slots, compact, normalized_dims, eps, mask);
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("esper_elastic::rms_norm_backward", "")
                         .typed<decltype(rms_norm_backward_native)>();
    const auto gradients = op.call(grad, input, weight, rstd, control, slots, compact, normalized_dims, mask);
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    return result;
  }
};

Two rms_norm_autograd(
    const Tensor& input, const optional<Tensor>& weight, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims,
    double eps) {
  if (!at::GradMode::is_enabled() || !(input.requires_grad() || (weight && weight->requires_grad()))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_rms_norm(input, weight, control, slots, compact, normalized_dims, eps);
  }
  const auto result = RMSNorm::apply(input, weight, control, slots, compact, normalized_dims, eps);
  return {result[0], result[1]};
}

// Autocast on CUDA computes RMS norms in float32, as it does those of torch; on the CPU it leaves them alone.
Two rms_norm_autocast(
    const Tensor& input, const optional<Tensor>& weight, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims,
    double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  auto cast = [](const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA); };
  return call_rms_norm(
      cast(input), weight ? optional<Tensor>(cast(*weight)) : std::nullopt, control, slots, compact, normalized_dims, eps);
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("rms_norm", rms_norm_native);
  m.impl("rms_norm_backward", rms_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("rms_norm", rms_norm_native);
  m.impl("rms_norm_backward", rms_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("rms_norm", rms_norm_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) { m.impl("rms_norm", rms_norm_autocast); }

}  // namespace
}  // namespace esper
