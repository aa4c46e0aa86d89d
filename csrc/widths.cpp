#include <Python.h>

#include "widths.h"

#include <sys/mman.h>

#include <fstream>
#include <string>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>

namespace esper {

Runs active_runs(const at::Tensor& control, const at::Tensor& slots, int64_t axis) {
  const int32_t* values = control.const_data_ptr<int32_t>();
  const int32_t* row = slots.const_data_ptr<int32_t>();
  Runs runs;
  for (int64_t count = slots.size(0); count > 0; --count, row += 4) {
    if (row[0] != axis) continue;
    const int64_t length = static_cast<int64_t>(values[row[1]]) * row[3];
    if (!runs.empty() && runs.back().start + runs.back().length == row[2]) {
      runs.back().length += length;
    } else {
      runs.push_back({row[2], length});
    }
  }
  return runs;
}

bool switched_on(const at::Tensor& control, const at::Tensor& slots) {
  const int32_t* values = control.const_data_ptr<int32_t>();
  const int32_t* row = slots.const_data_ptr<int32_t>();
  for (int64_t count = slots.size(0); count > 0; --count, row += 4) {
    if (row[0] == -1 && values[row[1]] == 0) return false;
  }
  return true;
}

int64_t total(const Runs& runs) {
  int64_t sum = 0;
  for (const Run& run : runs) sum += run.length;
  return sum;
}

Runs placed(const Runs& runs, bool compact) {
  if (!compact) return runs;
  Runs packed;
  int64_t offset = 0;
  for (const Run& run : runs) {
    packed.push_back({offset, run.length});
    offset += run.length;
  }
  return packed;
}

at::Tensor slice(const at::Tensor& tensor, int64_t axis, const Runs& runs) {
  if (runs.size() == 1) {
    const bool whole = runs[0].start == 0 && runs[0].length == tensor.size(axis);
    return whole ? tensor : tensor.narrow(axis, runs[0].start, runs[0].length);
  }
  if (runs.empty()) return tensor.narrow(axis, 0, 0);
  std::vector<at::Tensor> parts;
  for (const Run& run : runs) parts.push_back(tensor.narrow(axis, run.start, run.length));
  return at::cat(parts, axis);
}

std::optional<at::Tensor> sliced(const std::optional<at::Tensor>& tensor, const Runs& runs) {
  return tensor ? given(slice(*tensor, 0, runs)) : std::nullopt;
}

std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

void write(at::Tensor& storage, const at::Tensor& part, int64_t axis, const Runs& runs) {
  int64_t offset = 0;
  for (const Run& run : runs) {
    storage.narrow(axis, run.start, run.length).copy_(part.narrow(axis, offset, run.length));
    offset += run.length;
  }
}

at::Tensor embed(const at::Tensor& part, int64_t axis, const Runs& runs, int64_t size) {
  if (total(runs) == size) return part;
  std::vector<at::Tensor> parts;
  std::vector<int64_t> gap(part.sizes().begin(), part.sizes().end());
  auto fill = [&](int64_t length) {
    if (length == 0) return;
    gap[axis] = length;
    parts.push_back(at::zeros(gap, part.options()));
  };
  int64_t end = 0, offset = 0;
  for (const Run& run : runs) {
    fill(run.start - end);
    parts.push_back(part.narrow(axis, offset, run.length));
    offset += run.length;
    end = run.start + run.length;
  }
  fill(size - end);
  return at::cat(parts, axis);
}

namespace {

constexpr size_t kHugePage = size_t{1} << 21;

bool huge_pages_on_demand() {
  static const bool offered = [] {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string modes;
    std::getline(file, modes);
    return modes.find("[always]") != std::string::npos || modes.find("[madvise]") != std::string::npos;
  }();
  return offered;
}

// Zeroed memory as huge pages, or nullptr.
void* map_huge_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  madvise(pages, bytes, MADV_HUGEPAGE);
  return pages;
}

}  // namespace

at::Tensor zeros_outside(
    at::IntArrayRef sizes, const at::TensorOptions& options, int64_t axis, const Runs& runs, at::MemoryFormat format) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  const bool whole = total(runs) == sizes[axis];
  if (!whole && options.device().is_cpu() && bytes >= 2 * kHugePage && huge_pages_on_demand()) {
    if (void* pages = map_huge_pages(bytes)) {
      const at::DimVector strides(
          format == at::MemoryFormat::ChannelsLast         ? at::DimVector(c10::get_channels_last_strides_2d(sizes))
              : format == at::MemoryFormat::ChannelsLast3d ? at::DimVector(c10::get_channels_last_strides_3d(sizes))
                                                           : c10::contiguous_strides(sizes));
      return at::from_blob(pages, sizes, strides, [bytes](void* begin) { munmap(begin, bytes); }, options);
    }
  }
  at::Tensor tensor = at::empty(sizes, options.memory_format(format));
  zero_dormant(tensor, axis, runs);
  return tensor;
}

void zero_dormant(at::Tensor& tensor, int64_t axis, const Runs& runs) {
  int64_t end = 0;
  for (const Run& run : runs) {
    if (run.start > end) tensor.narrow(axis, end, run.start - end).zero_();
    end = run.start + run.length;
  }
  if (end < tensor.size(axis)) tensor.narrow(axis, end, tensor.size(axis) - end).zero_();
}

namespace {

// Becomes esper_elastic.errors.GenerationError when it crosses into Python.
struct GenerationError : torch::PyTorchError {
  using PyTorchError::PyTorchError;
  PyObject* python_type() override {
    PyObject* errors = PyImport_ImportModule("esper_elastic.errors");
    PyObject* type = errors != nullptr ? PyObject_GetAttrString(errors, "GenerationError") : nullptr;
    Py_XDECREF(errors);
    return type != nullptr ? type : PyExc_RuntimeError;
  }
};

struct Fence : torch::autograd::Function<Fence> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& tensor, const at::Tensor& control, std::string op) {
    ctx->saved_data["control"] = control;
    ctx->saved_data["version"] = static_cast<int64_t>(control._version());
    ctx->saved_data["op"] = op;
    return tensor.view_as(tensor);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const at::Tensor control = ctx->saved_data["control"].toTensor();
    const std::string op = ctx->saved_data["op"].toStringRef();
    check_generation(control, ctx->saved_data["version"].toInt(), op.c_str());
    return {fence(grads[0], control, op.c_str()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor fence(const at::Tensor& gradient, const at::Tensor& control, const char* op) {
  const bool tracked = gradient.defined() && gradient.requires_grad() && at::GradMode::is_enabled();
  return tracked ? Fence::apply(gradient, control, std::string(op)) : gradient;
}

void check_generation(const at::Tensor& control, int64_t version, const char* op) {
  const int64_t now = control._version();
  if (now == version) return;
  throw GenerationError(c10::str(
      op, ": cannot run this backward: widths or switches changed after the forward that built the graph (",
      now - version, " commit", now - version == 1 ? "" : "s", " since). Run the forward again, or change widths between steps."));
}

}  // namespace esper
