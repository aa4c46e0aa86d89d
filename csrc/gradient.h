// Capacity-shaped gradients of which only the active part is written, without zeroing the rest each time.
#pragma once

#include "widths.h"

namespace esper {

// A tensor of `weight`'s shape and type that is zero outside `rows` x `columns` (its first two axes; `columns` may be empty for "all").
// What is inside is undefined and must be written by the caller.
//
// On the CPU, inside `KeepGradients`, one buffer per weight (per parameter, where the weight is a view of one, since a view is a new tensor
// in each forward) is kept and handed out again as a fresh alias, whose dormant part is known to be zero: autograd adopts the alias as
// `.grad` without a copy. That is done only while nobody else holds the storage, and only if the version counter that all aliases share
// says that nobody wrote to it since. (Writes that bump no version, through `.grad.data` or NumPy, are the writer's own affair.)
at::Tensor zeros_for_gradient(
    const at::Tensor& weight, const Runs& rows, const Runs& columns, at::MemoryFormat format = at::MemoryFormat::Contiguous);

// The same for a caller that adds to the rows `looked_up` alone (a vector of indices): zero everywhere. A buffer that is handed out again
// is cleared where the last such caller wrote, so that a large table costs what was looked up in it.
at::Tensor zeros_for_lookups(const at::Tensor& weight, const Runs& rows, const Runs& columns, const at::Tensor& looked_up);

// Marks the eager backward of ours, the only caller whose results nobody writes to unseen: compiled code reuses buffers as it likes.
class KeepGradients {
 public:
  KeepGradients();
  ~KeepGradients();
  KeepGradients(const KeepGradients&) = delete;
  KeepGradients& operator=(const KeepGradients&) = delete;
};

}  // namespace esper
