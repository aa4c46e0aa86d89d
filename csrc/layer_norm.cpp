// output[r] = (input[r] - mean(input[r])) / sqrt(var(input[r]) + eps) * weight + bias over the active units of each row r: the last
// `normalized_dims` axes of the activation, of which the first is elastic.
//
// In static layout the rows' active parts are gathered, normalised by ATen and put in place: its kernels take contiguous rows.

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
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

Three layer_norm_native(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t normalized_dims, double eps) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  if (plan.units.empty()) {
    auto rows = input.sizes().vec();
    std::fill(rows.begin() + plan.axis, rows.end(), 1);
    const auto type = !input.is_cpu() ? at::toOpMathType(input.scalar_type()) : weight ? weight->scalar_type() : input.scalar_type();
    const Tensor mean = at::zeros(rows, input.options().dtype(type));
    return {at::zeros(input.sizes(), input.options()), mean, at::zeros_like(mean)};
  }
  const Tensor x = plan.gather(input);
  auto [output, mean, rstd] =
      at::native_layer_norm(x, x.sizes().slice(plan.axis), sliced(weight, plan.units), sliced(bias, plan.units), eps);
  return {plan.spread(output, input), mean, rstd};
}

Three layer_norm_backward_native(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& rstd, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims, Mask mask) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  auto unused = [&] { return at::empty({0}, grad.options()); };  // a new one each, since outputs of an op may not alias
  Three result{unused(), mask[1] ? at::zeros_like(*weight) : unused(), mask[2] ? at::zeros_like(*bias) : unused()};
  auto& [gx, gw, gb] = result;
  if (plan.units.empty()) {
    if (mask[0]) gx = at::zeros(input.sizes(), input.options());
    return result;
  }
  const Tensor x = plan.gather(input);
  auto [px, pw, pb] = at::native_layer_norm_backward(
      plan.gather(grad), x, x.sizes().slice(plan.axis), mean, rstd, sliced(weight, plan.units),
      sliced(bias, plan.units), mask);
  if (mask[0]) gx = plan.spread(px, input);
  if (mask[1]) write(gw, pw, 0, plan.units);
  if (mask[2]) write(gb, pb, 0, plan.units);
  return result;
}

// Differentiable gradients, for double backward: the same in ATen ops that have derivatives themselves.
variable_list differentiable_backward(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& rstd, const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims, Mask mask) {
  const NormPlan plan(control, slots, compact, input.dim() - normalized_dims);
  variable_list result(3);
  if (plan.units.empty()) {
    if (mask[0]) result[0] = at::zeros_like(input);
    if (mask[1]) result[1] = at::zeros_like(*weight);
    if (mask[2]) result[2] = at::zeros_like(*bias);
    return result;
  }
  const Tensor x = plan.gather(input);
  auto [gx, gw, gb] = at::native_layer_norm_backward(
      plan.gather(grad), x, x.sizes().slice(plan.axis), mean, rstd, sliced(weight, plan.units),
      sliced(bias, plan.units), mask);
  if (mask[0]) result[0] = embed(gx, plan.axis, plan.place, input.size(plan.axis));
  if (mask[1]) result[1] = embed(gw, 0, plan.units, weight->size(0));
  if (mask[2]) result[2] = embed(gb, 0, plan.units, bias->size(0));
  for (Tensor& gradient : result) gradient = fence(gradient, control, "ElasticLayerNorm");
  return result;
}

Three call_layer_norm(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t normalized_dims, double eps) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::layer_norm", "").typed<decltype(layer_norm_native)>();
  return op.call(input, weight, bias, control, slots, compact, normalized_dims, eps);
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
      const Tensor& control, const Tensor& slots, bool compact, int64_t normalized_dims, double eps) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["compact"] = compact;
    ctx->saved_data["normalized_dims"] = normalized_dims;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = call_layer_norm(input, weight, bias, control, slots, compact, normalized_dims, eps);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->save_for_backward({input, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, rstd, slots});
    return {output, mean, rstd};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticLayerNorm");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &mean = saved[3], &rstd = saved[4], &slots = saved[5], &grad = grads[0];
    const auto weight = given(saved[1]), bias = given(saved[2]);
    variable_list result(8);
    if (!grad.defined()) return result;
    const bool compact = ctx->saved_data["compact"].toBool();
    const int64_t normalized_dims = ctx->saved_data["normalized_dims"].toInt();
    const size_t bias_edge = weight ? 2 : 1;  // edges count the tensors that were given
    const Mask mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1), bias && ctx->needs_input_grad(bias_edge)};
    if (at::GradMode::is_enabled()) {
      auto gradients =
          differentiable_backward(grad, input, weight, bias, mean, rstd, control, slots, compact, normalized_dims, mask);
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("esper_elastic::layer_norm_backward", "")
                         .typed<decltype(layer_norm_backward_native)>();
    const auto gradients = op.call(grad, input, weight, bias, mean, rstd, control, slots, compact, normalized_dims, mask);
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    if (mask[2]) result[2] = std::get<2>(gradients);
    return result;
  }
};

Three layer_norm_autograd(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t normalized_dims, double eps) {
  const bool tracked = at::GradMode::is_enabled() &&
      (input.requires_grad() || (weight && weight->requires_grad()) || (bias && bias->requires_grad()));
  if (!tracked) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_layer_norm(input, weight, bias, control, slots, compact, normalized_dims, eps);
  }
  const auto result = LayerNorm::apply(input, weight, bias, control, slots, compact, normalized_dims, eps);
  return {result[0], result[1], result[2]};
}

// Autocast on CUDA computes layer norms in float32, as it does those of torch; on the CPU it leaves them alone.
Three layer_norm_autocast(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t normalized_dims, double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  auto cast = [](const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA); };
  auto cast_optional = [&](const optional<Tensor>& tensor) { return tensor ? optional<Tensor>(cast(*tensor)) : std::nullopt; };
  return call_layer_norm(cast(input), cast_optional(weight), cast_optional(bias), control, slots, compact, normalized_dims, eps);
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("layer_norm", layer_norm_native);
  m.impl("layer_norm_backward", layer_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("layer_norm", layer_norm_native);
  m.impl("layer_norm_backward", layer_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("layer_norm", layer_norm_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) { m.impl("layer_norm", layer_norm_autocast); }

}  // namespace
}  // namespace esper
