// output[n, c] = (input[n, c] - mean[n, g]) / sqrt(var[n, g] + eps) * weight[c] + bias[c] for the active channels c, each in a group g of
// `group_width` channels; zero stands for one group of all active channels. Mean and variance are those of the group in image n.
//
// ATen normalises contiguous images of active channels, which in compact layout are the activation itself; in static layout they are
// gathered first and put in place afterwards. The statistics that backward needs are (N, groups of the activation).

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

// The format of output and gradients: that of the input where ATen's kernels keep it.
at::MemoryFormat format_of(const Tensor& input) {
  return input.is_cpu() ? input.suggest_memory_format() : at::MemoryFormat::Contiguous;
}

struct Plan : NormPlan {
  Plan(const Tensor& control, const Tensor& slots, bool compact, int64_t group_width)
      : NormPlan(control, slots, compact, 1), channels(total(place)), group_width(group_width == 0 ? channels : group_width) {
    if (group_width == 0) {
      groups = {{0, 1}};
    } else {
      for (const Run& run : place) groups.push_back({run.start / group_width, run.length / group_width});
    }
  }

  Tensor gather(const Tensor& activation, at::MemoryFormat format) const { return NormPlan::gather(activation).contiguous(format); }

  int64_t num_groups() const { return channels / group_width; }

  int64_t channels;
  int64_t group_width;
  Runs groups;  // where the active ones lie in the statistics
};

int64_t image_size(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(2)); }

Three group_norm_native(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t group_width, double eps) {
  const Plan plan(control, slots, compact, group_width);
  const auto format = format_of(input);
  const bool empty = plan.units.empty() || input.numel() == 0;
  const bool whole = !empty && (group_width == 0 || plan.channels == input.size(1));
  Three result;
  auto& [output, mean, rstd] = result;
  if (!whole) {
    const auto type = weight ? weight->scalar_type() : input.scalar_type();
    mean = at::zeros({input.size(0), group_width == 0 ? 1 : input.size(1) / group_width}, input.options().dtype(type));
    rstd = at::zeros_like(mean);
  }
  if (empty) {
    output = at::empty_like(input, format).zero_();
    return result;
  }
  const Tensor x = plan.gather(input, format);
  const auto [y, m, r] = at::native_group_norm(
      x, sliced(weight, plan.units), sliced(bias, plan.units), x.size(0), plan.channels, image_size(x), plan.num_groups(), eps);
  output = plan.spread(y, input, format);
  if (whole) {
    mean = m, rstd = r;
  } else {
    write(mean, m, 1, plan.groups);
    write(rstd, r, 1, plan.groups);
  }
  return result;
}

Three group_norm_backward_native(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& rstd, const Tensor& control, const Tensor& slots, bool compact, int64_t group_width, Mask mask) {
  const Plan plan(control, slots, compact, group_width);
  const auto format = format_of(input);
  auto unused = [&] { return at::empty({0}, grad.options()); };  // a new one each, since outputs of an op may not alias
  Three result{unused(), mask[1] ? at::zeros_like(*weight) : unused(), mask[2] ? at::zeros_like(*bias) : unused()};
  auto& [gx, gw, gb] = result;
  if (plan.units.empty() || input.numel() == 0) {
    if (mask[0]) gx = at::empty_like(input, format).zero_();
    return result;
  }
  const Tensor x = plan.gather(input, format);
  const auto [px, pw, pb] = at::native_group_norm_backward(
      plan.gather(grad, format), x, slice(mean, 1, plan.groups).contiguous(), slice(rstd, 1, plan.groups).contiguous(),
      sliced(weight, plan.units), x.size(0), plan.channels, image_size(x), plan.num_groups(), mask);
  if (mask[0]) gx = plan.spread(px, input, format);
  if (mask[1]) write(gw, pw, 0, plan.units);
  if (mask[2]) write(gb, pb, 0, plan.units);
  return result;
}

// Differentiable gradients, for double backward: in ATen ops that have derivatives themselves, from statistics that are functions of the
// input.
variable_list differentiable_backward(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control,
    const Tensor& slots, bool compact, int64_t group_width, double eps, Mask mask) {
  const Plan plan(control, slots, compact, group_width);
  variable_list result(3);
  if (plan.units.empty() || input.numel() == 0) {
    if (mask[0]) result[0] = at::zeros_like(input);
    if (mask[1]) result[1] = at::zeros_like(*weight);
    if (mask[2]) result[2] = at::zeros_like(*bias);
    return result;
  }
  const auto type = at::toOpMathType(input.scalar_type());
  const Tensor x = plan.NormPlan::gather(input).to(type), g = plan.NormPlan::gather(grad).to(type);
  auto grouped = [&](const Tensor& t) { return t.reshape({x.size(0), plan.num_groups(), -1}); };
  const Tensor centred = grouped(x) - grouped(x).mean({2}, true);
  const Tensor rstd = (centred.square().mean({2}, true) + eps).rsqrt(), xhat = centred * rstd;
  auto per_channel = [&](const Tensor& t) { return t.reshape({x.size(0), plan.channels, -1}).sum(at::IntArrayRef{0, 2}); };
  if (mask[0]) {
    Tensor gw = g.reshape({x.size(0), plan.channels, -1});
    if (weight) gw = gw * slice(*weight, 0, plan.units).unsqueeze(1);
    gw = grouped(gw);
    const Tensor gx = (gw - gw.mean({2}, true) - xhat * (gw * xhat).mean({2}, true)) * rstd;
    result[0] = embed(gx.reshape(x.sizes()).to(input.scalar_type()), 1, plan.place, input.size(1));
  }
  if (mask[1]) result[1] = embed(per_channel(g.reshape(xhat.sizes()) * xhat).to(weight->scalar_type()), 0, plan.units, weight->size(0));
  if (mask[2]) result[2] = embed(per_channel(g).to(bias->scalar_type()), 0, plan.units, bias->size(0));
  for (Tensor& gradient : result) gradient = fence(gradient, control, "ElasticGroupNorm");
  return result;
}

Three call_group_norm(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t group_width, double eps) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::group_norm", "").typed<decltype(group_norm_native)>();
  return op.call(input, weight, bias, control, slots, compact, group_width, eps);
}

struct GroupNorm : torch::autograd::Function<GroupNorm> {
  static variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
      const Tensor& control, const Tensor& slots, bool compact, int64_t group_width, double eps) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["compact"] = compact;
    ctx->saved_data["group_width"] = group_width;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["bias"] = bias.value_or(Tensor());  // for its shape alone
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = call_group_norm(input, weight, bias, control, slots, compact, group_width, eps);
    ctx->mark_non_differentiable({mean, rstd});
    ctx->save_for_backward({input, weight.value_or(Tensor()), mean, rstd, slots});
    return {output, mean, rstd};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticGroupNorm");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &mean = saved[2], &rstd = saved[3], &slots = saved[4], &grad = grads[0];
    const auto weight = given(saved[1]), bias = given(ctx->saved_data["bias"].toTensor());
    variable_list result(8);
    if (!grad.defined()) return result;
    const bool compact = ctx->saved_data["compact"].toBool();
    const int64_t group_width = ctx->saved_data["group_width"].toInt();
    const size_t bias_edge = weight ? 2 : 1;  // edges count the tensors that were given
    const Mask mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1), bias && ctx->needs_input_grad(bias_edge)};
    if (at::GradMode::is_enabled()) {
      const double eps = ctx->saved_data["eps"].toDouble();
      auto gradients = differentiable_backward(grad, input, weight, bias, control, slots, compact, group_width, eps, mask);
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("esper_elastic::group_norm_backward", "")
                         .typed<decltype(group_norm_backward_native)>();
    const auto gradients = op.call(grad, input, weight, bias, mean, rstd, control, slots, compact, group_width, mask);
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    if (mask[2]) result[2] = std::get<2>(gradients);
    return result;
  }
};

Three group_norm_autograd(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t group_width, double eps) {
  const bool tracked = at::GradMode::is_enabled() &&
      (input.requires_grad() || (weight && weight->requires_grad()) || (bias && bias->requires_grad()));
  if (!tracked) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_group_norm(input, weight, bias, control, slots, compact, group_width, eps);
  }
  const auto result = GroupNorm::apply(input, weight, bias, control, slots, compact, group_width, eps);
  return {result[0], result[1], result[2]};
}

// Autocast on CUDA computes group norms in float32, as it does those of torch; on the CPU it leaves them alone.
Three group_norm_autocast(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& control, const Tensor& slots,
    bool compact, int64_t group_width, double eps) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  auto cast = [](const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA); };
  auto cast_optional = [&](const optional<Tensor>& tensor) { return tensor ? optional<Tensor>(cast(*tensor)) : std::nullopt; };
  return call_group_norm(cast(input), cast_optional(weight), cast_optional(bias), control, slots, compact, group_width, eps);
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("group_norm", group_norm_native);
  m.impl("group_norm_backward", group_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("group_norm", group_norm_native);
  m.impl("group_norm_backward", group_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("group_norm", group_norm_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, AutocastCUDA, m) { m.impl("group_norm", group_norm_autocast); }

}  // namespace
}  // namespace esper
