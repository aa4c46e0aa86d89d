// output[:, c] = (input[:, c] - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c], for the active features c; mean and var are those of the
// batch in `batch_norm`, the running ones in `batch_norm_eval`.
//
// ATen normalises a contiguous tensor of active features, which in compact layout is the activation itself; in static layout they are gathered
// first and put in place afterwards (measured: for flat and channels_last input that is four times as fast as its kernels for strided input,
// for other images 1.3 times). The
// statistics that backward needs lie as the activation does, packed or at capacity offsets.

#include "widths.h"

#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace esper {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::variable_list;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

struct Plan {
  // While a switch above is off, a layer in static layout has no active features: the output is zero and nothing is counted.
  Plan(const Tensor& control, const Tensor& slots, bool compact)
      : features(compact || switched_on(control, slots) ? active_runs(control, slots, 0) : Runs()), place(placed(features, compact)) {}

  Runs features;  // in parameters and running statistics
  Runs place;     // in the activation
};

bool covers(const Runs& place, const Tensor& input) { return total(place) == input.size(1); }

Tensor gather(const Tensor& input, const Runs& place) {
  return covers(place, input) ? input : slice(input, 1, place).contiguous(input.suggest_memory_format());
}

// `part` at its place in an activation like `input`.
Tensor spread_over(const Tensor& part, const Tensor& input, const Runs& place) {
  if (covers(place, input)) return part;
  Tensor whole = zeros_outside(input.sizes(), input.options(), 1, place, input.suggest_memory_format());
  write(whole, part, 1, place);
  return whole;
}

// The type in which ATen saves a batch's statistics.
at::ScalarType statistics_type(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& running_mean) {
  if (!input.is_cpu()) return at::toOpMathType(input.scalar_type());
  return weight ? weight->scalar_type() : running_mean ? running_mean->scalar_type() : input.scalar_type();
}

// The running statistics of active features during a forward. With `momentum` ATen updates them; without, they are the mean over all
// batches, of which this is the last: no number is fetched from the device to say so.
class Running {
 public:
  Running(
      const optional<Tensor>& mean, const optional<Tensor>& var, const optional<Tensor>& batches, optional<double> momentum,
      const Runs& features)
      : momentum(momentum.value_or(1.0)), features(features) {
    if (!mean || !var) return;
    storage = {*mean, *var};
    for (int i = 0; i < 2; ++i) active[i] = slice(storage[i], 0, features);
    target = active;
    if (momentum) return;
    share = batches->to(at::kDouble).reciprocal();
    for (int i = 0; i < 2; ++i) target[i] = at::zeros_like(active[i]);
  }

  optional<Tensor> mean() const { return target[0].defined() ? optional<Tensor>(target[0]) : std::nullopt; }
  optional<Tensor> var() const { return target[1].defined() ? optional<Tensor>(target[1]) : std::nullopt; }

  void finish() {
    for (int i = 0; i < 2 && storage[i].defined(); ++i) {
      if (share.defined()) active[i].copy_(active[i].to(at::kDouble).lerp(target[i].to(at::kDouble), share));
      if (features.size() > 1) write(storage[i], active[i], 0, features);  // a copy, not a view
    }
  }

  const double momentum;

 private:
  const Runs features;
  std::array<Tensor, 2> storage, active, target;
  Tensor share;
};

Three batch_norm_native(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& running_mean,
    const optional<Tensor>& running_var, const optional<Tensor>& num_batches_tracked, const Tensor& control, const Tensor& slots,
    bool compact, optional<double> momentum, double eps) {
  const Plan plan(control, slots, compact);
  Three result;
  auto& [output, mean, invstd] = result;
  const bool empty = plan.features.empty() || input.numel() == 0;  // ATen's kernels divide by the size of a batch
  const bool whole = !empty && covers(plan.place, input);
  if (!whole) {
    mean = at::zeros({input.size(1)}, input.options().dtype(statistics_type(input, weight, running_mean)));
    invstd = at::zeros_like(mean);
  }
  if (num_batches_tracked && !plan.features.empty()) num_batches_tracked->add_(1);
  if (empty) {
    output = at::empty_like(input, input.suggest_memory_format()).zero_();
    return result;
  }
  Running running(running_mean, running_var, num_batches_tracked, momentum, plan.features);
  auto active = at::native_batch_norm(
      gather(input, plan.place), sliced(weight, plan.features), sliced(bias, plan.features), running.mean(), running.var(), true,
      running.momentum, eps);
  running.finish();
  if (whole) return active;
  output = spread_over(std::get<0>(active), input, plan.place);
  write(mean, std::get<1>(active), 0, plan.place);
  write(invstd, std::get<2>(active), 0, plan.place);
  return result;
}

Tensor batch_norm_eval_native(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& running_mean,
    const Tensor& running_var, const Tensor& control, const Tensor& slots, bool compact, double eps) {
  const Plan plan(control, slots, compact);
  if (plan.features.empty() || input.numel() == 0) return at::empty_like(input, input.suggest_memory_format()).zero_();
  const auto active = at::native_batch_norm(
      gather(input, plan.place), sliced(weight, plan.features), sliced(bias, plan.features), slice(running_mean, 0, plan.features),
      slice(running_var, 0, plan.features), false, 0.0, eps);
  return spread_over(std::get<0>(active), input, plan.place);
}

// `mean` and `spread` are what forward saved (training: mean and 1/sqrt(var + eps), placed as the activation) or the running mean and
// variance (evaluation, at capacity).
Three aten_backward(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const Tensor& mean, const Tensor& spread, bool training,
    double eps, Mask mask) {
  const auto none = optional<Tensor>(), m = optional<Tensor>(mean), s = optional<Tensor>(spread);
  return at::native_batch_norm_backward(
      grad, input, weight, training ? none : m, training ? none : s, training ? m : none, training ? s : none, training, eps, mask);
}

Three batch_norm_backward_native(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& spread, const Tensor& control, const Tensor& slots, bool compact, bool training, double eps, Mask mask) {
  const Plan plan(control, slots, compact);
  auto unused = [&] { return at::empty({0}, grad.options()); };  // a new one each, since outputs of an op may not alias
  Three result{unused(), mask[1] ? at::zeros_like(*weight) : unused(), mask[2] ? at::zeros_like(*bias) : unused()};
  auto& [gx, gw, gb] = result;
  if (plan.features.empty() || input.numel() == 0) {
    if (mask[0]) gx = at::empty_like(input, input.suggest_memory_format()).zero_();
    return result;
  }
  const Runs& kept = training ? plan.place : plan.features;
  const auto [px, pw, pb] = aten_backward(
      gather(grad, plan.place), gather(input, plan.place), sliced(weight, plan.features), slice(mean, 0, kept), slice(spread, 0, kept),
      training, eps, mask);
  if (mask[0]) gx = spread_over(px, input, plan.place);
  if (mask[1]) write(gw, pw, 0, plan.features);
  if (mask[2]) write(gb, pb, 0, plan.features);
  return result;
}

// Differentiable gradients, for double backward: the same in ATen ops that have derivatives themselves.
variable_list differentiable_backward(
    const Tensor& grad, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& mean,
    const Tensor& spread, const Tensor& control, const Tensor& slots, bool compact, bool training, double eps, Mask mask) {
  const Plan plan(control, slots, compact);
  variable_list result(3);
  if (plan.features.empty() || input.numel() == 0) {
    if (mask[0]) result[0] = at::zeros_like(input);
    if (mask[1]) result[1] = at::zeros_like(*weight);
    if (mask[2]) result[2] = at::zeros_like(*bias);
    return result;
  }
  const Runs& kept = training ? plan.place : plan.features;
  const auto [gx, gw, gb] = aten_backward(
      gather(grad, plan.place), gather(input, plan.place), sliced(weight, plan.features), slice(mean, 0, kept), slice(spread, 0, kept),
      training, eps, mask);
  if (mask[0]) result[0] = embed(gx, 1, plan.place, input.size(1));
  if (mask[1]) result[1] = embed(gw, 0, plan.features, weight->size(0));
  if (mask[2]) result[2] = embed(gb, 0, plan.features, bias->size(0));
  for (Tensor& gradient : result) gradient = fence(gradient, control, "ElasticBatchNorm");
  return result;
}

Three call_batch_norm(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& running_mean,
    const optional<Tensor>& running_var, const optional<Tensor>& num_batches_tracked, const Tensor& control, const Tensor& slots,
    bool compact, optional<double> momentum, double eps) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::batch_norm", "").typed<decltype(batch_norm_native)>();
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, momentum, eps);
}

Tensor call_batch_norm_eval(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& running_mean,
    const Tensor& running_var, const Tensor& control, const Tensor& slots, bool compact, double eps) {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::batch_norm_eval", "").typed<decltype(batch_norm_eval_native)>();
  return op.call(input, weight, bias, running_mean, running_var, control, slots, compact, eps);
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
      const optional<Tensor>& running_mean, const optional<Tensor>& running_var, const optional<Tensor>& num_batches_tracked,
      const Tensor& control, const Tensor& slots, bool compact, bool training, optional<double> momentum, double eps) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["compact"] = compact;
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["bias"] = bias.value_or(Tensor());  // for its shape alone
    at::AutoDispatchBelowAutograd guard;
    variable_list result;
    Tensor mean, spread;
    if (training) {
      auto [output, batch_mean, invstd] = call_batch_norm(
          input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, momentum, eps);
      mean = batch_mean, spread = invstd;
      ctx->mark_non_differentiable({mean, spread});
      result = {output, mean, spread};
    } else {
      result = {call_batch_norm_eval(input, weight, bias, *running_mean, *running_var, control, slots, compact, eps)};
      mean = running_mean->clone(), spread = running_var->clone();  // a later batch in training mode may move them before backward
    }
    ctx->save_for_backward({input, weight.value_or(Tensor()), mean, spread, slots});
    return result;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticBatchNorm");
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &mean = saved[2], &spread = saved[3], &slots = saved[4], &grad = grads[0];
    const auto weight = given(saved[1]), bias = given(ctx->saved_data["bias"].toTensor());
    variable_list result(12);
    if (!grad.defined()) return result;
    const bool compact = ctx->saved_data["compact"].toBool(), training = ctx->saved_data["training"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const size_t bias_edge = weight ? 2 : 1;  // edges count the tensors that were given
    const Mask mask{ctx->needs_input_grad(0), weight && ctx->needs_input_grad(1), bias && ctx->needs_input_grad(bias_edge)};
    if (at::GradMode::is_enabled()) {
      auto gradients =
          differentiable_backward(grad, input, weight, bias, mean, spread, control, slots, compact, training, eps, mask);
      std::move(gradients.begin(), gradients.end(), result.begin());
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("esper_elastic::batch_norm_backward", "")
                         .typed<decltype(batch_norm_backward_native)>();
    const auto gradients = op.call(grad, input, weight, bias, mean, spread, control, slots, compact, training, eps, mask);
    if (mask[0]) result[0] = std::get<0>(gradients);
    if (mask[1]) result[1] = std::get<1>(gradients);
    if (mask[2]) result[2] = std::get<2>(gradients);
    return result;
  }
};

bool tracked(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias) {
  return at::GradMode::is_enabled() &&
      (input.requires_grad() || (weight && weight->requires_grad()) || (bias && bias->requires_grad()));
}

Three batch_norm_autograd(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& running_mean,
    const optional<Tensor>& running_var, const optional<Tensor>& num_batches_tracked, const Tensor& control, const Tensor& slots,
    bool compact, optional<double> momentum, double eps) {
  if (!tracked(input, weight, bias)) {
    at::AutoDispatchBelowAutograd guard;
    return call_batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, momentum, eps);
  }
  const auto result = BatchNorm::apply(
      input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, true, momentum, eps);
  return {result[0], result[1], result[2]};
}

Tensor batch_norm_eval_autograd(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const Tensor& running_mean,
    const Tensor& running_var, const Tensor& control, const Tensor& slots, bool compact, double eps) {
  if (!tracked(input, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_batch_norm_eval(input, weight, bias, running_mean, running_var, control, slots, compact, eps);
  }
  return BatchNorm::apply(
      input, weight, bias, optional<Tensor>(running_mean), optional<Tensor>(running_var), optional<Tensor>(), control, slots, compact,
      false, optional<double>(), eps)[0];
}

// Tells whoever saved a running statistic that it has moved, as any in-place op does.
Three batch_norm_in_place(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias, const optional<Tensor>& running_mean,
    const optional<Tensor>& running_var, const optional<Tensor>& num_batches_tracked, const Tensor& control, const Tensor& slots,
    bool compact, optional<double> momentum, double eps) {
  at::AutoDispatchBelowADInplaceOrView guard;
  auto result =
      call_batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, momentum, eps);
  for (const auto* tensor : {&running_mean, &running_var, &num_batches_tracked}) {
    if (*tensor) torch::autograd::impl::bump_version(**tensor);
  }
  return result;
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("batch_norm", batch_norm_native);
  m.impl("batch_norm_eval", batch_norm_eval_native);
  m.impl("batch_norm_backward", batch_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("batch_norm", batch_norm_native);
  m.impl("batch_norm_eval", batch_norm_eval_native);
  m.impl("batch_norm_backward", batch_norm_backward_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) {
  m.impl("batch_norm", batch_norm_autograd);
  m.impl("batch_norm_eval", batch_norm_eval_autograd);
}
TORCH_LIBRARY_IMPL(esper_elastic, ADInplaceOrView, m) { m.impl("batch_norm", batch_norm_in_place); }

}  // namespace
}  // namespace esper
