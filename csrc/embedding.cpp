// output[i] = weight[indices[i], c] for the active columns c; an index must be that of an active row.
//
// ATen looks up in the active slice of the weight, so that it refuses the index of a dormant row as any that is out of range.
// The first axis of the layer is that of the weight's columns, the second that of its rows.

#include "gradient.h"
#include "widths.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace esper {
namespace {

using at::Tensor;
using c10::SymInt;
using std::optional;
using torch::autograd::variable_list;

Tensor active_part(const Tensor& weight, const Plan& plan) { return slice(slice(weight, 0, plan.columns), 1, plan.rows); }

Tensor embedding_native(
    const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, int64_t, bool, optional<int64_t> width) {
  const Plan plan(control, slots, width.has_value());
  auto sizes = indices.sizes().vec();
  sizes.push_back(width.value_or(weight.size(1)));
  if (plan.rows.empty()) return at::zeros(sizes, weight.options());
  const Tensor found = at::embedding(active_part(weight, plan), indices);
  if (found.size(-1) == sizes.back()) return found;
  Tensor output = zeros_outside(sizes, weight.options(), indices.dim(), plan.out);
  write(output, found, indices.dim(), plan.out);
  return output;
}

Tensor gradient_of_part(
    const Tensor& grad, const Tensor& indices, const Plan& plan, int64_t padding_idx, bool scale_grad_by_freq) {
  return at::embedding_dense_backward(slice(grad, -1, plan.out), indices, total(plan.columns), padding_idx, scale_grad_by_freq);
}

// The gradient in memory that is zero already: ATen's would clear the whole table for each batch. The rows are those of one run from zero.
Tensor sum_of_lookups(const Tensor& grad, const Tensor& weight, const Tensor& indices, const Plan& plan, int64_t padding_idx) {
  Tensor rows = indices.reshape({-1}).to(at::kLong);
  Tensor gy = slice(grad, -1, plan.out).reshape({rows.size(0), total(plan.out)});
  if (padding_idx >= 0) {
    const Tensor counted = rows.ne(padding_idx).nonzero().view({-1});
    rows = rows.index_select(0, counted);
    gy = gy.index_select(0, counted);
  }
  const Tensor whole = zeros_for_lookups(weight, plan.columns, plan.rows, rows);
  int64_t offset = 0;
  for (const Run& run : plan.rows) {
    whole.narrow(1, run.start, run.length).index_add_(0, rows, gy.narrow(1, offset, run.length));
    offset += run.length;
  }
  return whole;
}

Tensor embedding_backward_native(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, int64_t padding_idx,
    bool scale_grad_by_freq, bool compact) {
  const Plan plan(control, slots, compact);
  if (plan.rows.empty()) return at::zeros_like(weight);
  if (weight.is_cpu() && !scale_grad_by_freq) return sum_of_lookups(grad, weight, indices, plan, padding_idx);
  const Tensor part = gradient_of_part(grad, indices, plan, padding_idx, scale_grad_by_freq);
  if (part.sizes() == weight.sizes()) return part;
  Tensor whole = zeros_for_gradient(weight, plan.columns, plan.rows);
  for (const Run& run : plan.columns) {  // one, since what follows it would change its numbers
    Tensor rows = whole.narrow(0, run.start, run.length);
    write(rows, part, 1, plan.rows);
  }
  return whole;
}

// The same for double backward, in ATen ops that have derivatives themselves.
Tensor differentiable_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, int64_t padding_idx,
    bool scale_grad_by_freq, bool compact) {
  const Plan plan(control, slots, compact);
  if (plan.rows.empty()) return at::zeros_like(weight);
  const Tensor part = gradient_of_part(grad, indices, plan, padding_idx, scale_grad_by_freq);
  const Tensor whole = embed(embed(part, 1, plan.rows, weight.size(1)), 0, plan.columns, weight.size(0));
  return fence(whole, control, "ElasticEmbedding");
}

void embedding_renorm_native(
    const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, bool compact, double max_norm,
    double norm_type) {
  const Plan plan(control, slots, compact);
  if (plan.rows.empty()) return;
  Tensor part = active_part(weight, plan);
  at::embedding_renorm_(part, indices.contiguous(), max_norm, norm_type);
  if (plan.rows.size() == 1) return;
  // a copy, not a view
  const Tensor looked_up = std::get<0>(at::_unique(indices));
  int64_t offset = 0;
  for (const Run& run : plan.rows) {
    const Tensor rows = part.narrow(1, offset, run.length).index_select(0, looked_up);
    weight.narrow(1, run.start, run.length).index_copy_(0, looked_up, rows);
    offset += run.length;
  }
}

Tensor call_embedding(
    const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, int64_t padding_idx, bool scale_grad_by_freq,
    const optional<SymInt>& width) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("esper_elastic::embedding", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, bool, optional<SymInt>)>();
  return op.call(weight, indices, control, slots, padding_idx, scale_grad_by_freq, width);
}

struct Embedding : torch::autograd::Function<Embedding> {
  static Tensor forward(
      torch::autograd::AutogradContext* ctx, const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots,
      int64_t padding_idx, bool scale_grad_by_freq, const optional<SymInt>& width) {
    ctx->save_for_backward({indices, slots});
    ctx->saved_data["weight"] = weight;  // for its shape alone
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["padding_idx"] = padding_idx;
    ctx->saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
    ctx->saved_data["compact"] = width.has_value();
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_embedding(weight, indices, control, slots, padding_idx, scale_grad_by_freq, width);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const Tensor control = ctx->saved_data["control"].toTensor();
    check_generation(control, ctx->saved_data["version"].toInt(), "ElasticEmbedding");
    const auto saved = ctx->get_saved_variables();
    const Tensor &indices = saved[0], &slots = saved[1], &grad = grads[0];
    const Tensor weight = ctx->saved_data["weight"].toTensor();
    const int64_t padding_idx = ctx->saved_data["padding_idx"].toInt();
    const bool scale = ctx->saved_data["scale_grad_by_freq"].toBool(), compact = ctx->saved_data["compact"].toBool();
    variable_list result(7);
    if (!grad.defined()) return result;
    if (at::GradMode::is_enabled()) {
      result[0] = differentiable_backward(grad, weight, indices, control, slots, padding_idx, scale, compact);
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const KeepGradients keep;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("esper_elastic::embedding_backward", "")
                         .typed<decltype(embedding_backward_native)>();
    result[0] = op.call(grad, weight, indices, control, slots, padding_idx, scale, compact);
    return result;
  }
};

Tensor embedding_autograd(
    const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, int64_t padding_idx, bool scale_grad_by_freq,
    optional<SymInt> width) {
  if (at::GradMode::is_enabled() && weight.requires_grad()) {
    return Embedding::apply(weight, indices, control, slots, padding_idx, scale_grad_by_freq, width);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_embedding(weight, indices, control, slots, padding_idx, scale_grad_by_freq, width);
}

// Tells whoever saved the weight that it has moved, as any in-place op does.
void embedding_renorm_in_place(
    const Tensor& weight, const Tensor& indices, const Tensor& control, const Tensor& slots, bool compact, double max_norm,
    double norm_type) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("esper_elastic::embedding_renorm_", "")
                       .typed<decltype(embedding_renorm_native)>();
  op.call(weight, indices, control, slots, compact, max_norm, norm_type);
  torch::autograd::impl::bump_version(weight);
}

TORCH_LIBRARY_IMPL(esper_elastic, CPU, m) {
  m.impl("embedding", embedding_native);
  m.impl("embedding_backward", embedding_backward_native);
  m.impl("embedding_renorm_", embedding_renorm_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, CUDA, m) {
  m.impl("embedding", embedding_native);
  m.impl("embedding_backward", embedding_backward_native);
  m.impl("embedding_renorm_", embedding_renorm_native);
}
TORCH_LIBRARY_IMPL(esper_elastic, Autograd, m) { m.impl("embedding", embedding_autograd); }
TORCH_LIBRARY_IMPL(esper_elastic, ADInplaceOrView, m) { m.impl("embedding_renorm_", embedding_renorm_in_place); }

}  // namespace
}  // namespace esper
