// What the norms over one elastic axis share: where its active units lie, and their way out of an activation and back.
#pragma once

#include "widths.h"

namespace esper {

struct NormPlan {
  // While a switch above is off, a layer in static layout has no active units.
  NormPlan(const at::Tensor& control, const at::Tensor& slots, bool compact, int64_t axis)
      : axis(axis),
        units(compact || switched_on(control, slots) ? active_runs(control, slots, 0) : Runs()),
        place(placed(units, compact)) {}

  // The active units of an activation.
  at::Tensor gather(const at::Tensor& activation) const { return slice(activation, axis, place); }

  // `part` at its place in an activation like `whole`.
  at::Tensor spread(
      const at::Tensor& part, const at::Tensor& whole, at::MemoryFormat format = at::MemoryFormat::Contiguous) const {
    if (total(place) == whole.size(axis)) return part;
    at::Tensor result = zeros_outside(whole.sizes(), whole.options(), axis, place, format);
    write(result, part, axis, place);
    return result;
  }

  int64_t axis;  // the elastic axis of the activation
  Runs units;    // in the parameters
  Runs place;    // in the activation
};

}  // namespace esper
