// What is active: reads an op's slots in the control block, slices operands and embeds gradients by it.
//
// `slots` is an int32 table with one row per segment: [axis, slot, start, inner]. Axis 0 and 1 are those of the weight; axis -1 is a
// switch that governs the layer. `width` is the active output width in compact layout and absent in static layout.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

namespace esper {

struct Run {
  int64_t start;
  int64_t length;
};
using Runs = c10::SmallVector<Run, 2>;

// The active indices of one axis of the weight, as runs in ascending order; adjacent segments are joined.
Runs active_runs(const at::Tensor& control, const at::Tensor& slots, int64_t axis);

// Whether every switch that governs the layer is on.
bool switched_on(const at::Tensor& control, const at::Tensor& slots);

int64_t total(const Runs& runs);

// Where the runs lie in an activation: at capacity offsets in static layout, packed in compact layout.
Runs placed(const Runs& runs, bool compact);

// The active runs of a weight with two elastic axes, and where they lie in the activations.
struct Plan {
  // While a switch above is off, a layer in static layout has no active rows: outputs and gradients are zero and nothing is computed.
  Plan(const at::Tensor& control, const at::Tensor& slots, bool compact)
      : rows(compact || switched_on(control, slots) ? active_runs(control, slots, 0) : Runs()),
        columns(active_runs(control, slots, 1)),
        out(placed(rows, compact)),
        in(placed(columns, compact)) {}

  bool single() const { return rows.size() == 1 && columns.size() == 1; }

  Runs rows, columns, out, in;
};

// The active part of `tensor` along `axis`: a view for a single run, a copy of the active part otherwise.
at::Tensor slice(const at::Tensor& tensor, int64_t axis, const Runs& runs);

// The active part of a vector that may be absent.
std::optional<at::Tensor> sliced(const std::optional<at::Tensor>& tensor, const Runs& runs);

// A saved tensor as the optional argument that it was.
std::optional<at::Tensor> given(const at::Tensor& tensor);

// Write `part` into the runs of `storage` along `axis`.
void write(at::Tensor& storage, const at::Tensor& part, int64_t axis, const Runs& runs);

// The inverse of `slice`: `part` at its runs in an axis of `size`, zero elsewhere. Differentiable.
at::Tensor embed(const at::Tensor& part, int64_t axis, const Runs& runs, int64_t size);

// A tensor that is zero outside `runs` of `axis`; what is inside is undefined and must be written by the caller. Large ones on the CPU come
// as fresh huge pages, which the kernel hands out zeroed: faulted in as small pages they held a convolution at 1/4 back by a third of its exact-size time.
at::Tensor zeros_outside(
    at::IntArrayRef sizes, const at::TensorOptions& options, int64_t axis, const Runs& runs,
    at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Set the indices of `axis` outside `runs` to zero.
void zero_dormant(at::Tensor& tensor, int64_t axis, const Runs& runs);

// Raise esper_elastic.errors.GenerationError unless the control block is as it was when the graph was built.
void check_generation(const at::Tensor& control, int64_t version, const char* op);

// The identity, for each gradient of a differentiable backward: all derivatives of it raise as well if the control block has changed.
at::Tensor fence(const at::Tensor& gradient, const at::Tensor& control, const char* op);

}  // namespace esper
