// Every op's schema, and the module that Python imports to load them. The kernels register themselves, each in its own file.
//
// All ops take the control tensor and their slots in it (see widths.h). `width` is the active output width in compact layout and None in
// static layout, where activations have capacity size and kernels alone read how much of it is active.
#include <Python.h>

#include "python.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

TORCH_LIBRARY(esper_elastic, m) {
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, Tensor control, Tensor slots, SymInt? width, ScalarType? dtype=None) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor weight, Tensor control, Tensor slots, SymInt? width, SymInt in_width) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor control, Tensor slots, SymInt? width) -> Tensor");
  m.def("linear_grad_bias(Tensor grad, Tensor bias, Tensor control, Tensor slots, SymInt? width) -> Tensor");

  // In training mode; the second and third result are what backward needs. A gradient that `mask` leaves out comes back with no elements.
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor control, Tensor slots, bool compact, float? momentum, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor control, Tensor slots, "
      "bool compact, float eps) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor spread, Tensor control, "
      "Tensor slots, bool compact, bool training, float eps, bool[3] mask) -> (Tensor, Tensor, Tensor)");

  m.def(
      "layer_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor control, Tensor slots, bool compact, int normalized_dims, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor control, "
      "Tensor slots, bool compact, int normalized_dims, bool[3] mask) -> (Tensor, Tensor, Tensor)");

  m.def(
      "rms_norm(Tensor input, Tensor? weight, Tensor control, Tensor slots, bool compact, int normalized_dims, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor rstd, Tensor control, Tensor slots, bool compact, "
      "int normalized_dims, bool[2] mask) -> (Tensor, Tensor)");

  // With `group_width` zero all active channels are one group.
  m.def(
      "group_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor control, Tensor slots, bool compact, int group_width, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor control, "
      "Tensor slots, bool compact, int group_width, bool[3] mask) -> (Tensor, Tensor, Tensor)");

  m.def(
      "embedding(Tensor weight, Tensor indices, Tensor control, Tensor slots, int padding_idx, bool scale_grad_by_freq, SymInt? width) "
      "-> Tensor");
  m.def(
      "embedding_backward(Tensor grad, Tensor weight, Tensor indices, Tensor control, Tensor slots, int padding_idx, "
      "bool scale_grad_by_freq, bool compact) -> Tensor");
  m.def(
      "embedding_renorm_(Tensor(a!) weight, Tensor indices, Tensor control, Tensor slots, bool compact, float max_norm, float norm_type) "
      "-> ()");

  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, Tensor control, Tensor slots, int[2] stride, int[2] padding, "
      "int[2] dilation, bool transposed, int[2] output_padding, bool grouped, SymInt channels, bool compact, ScalarType? dtype=None) "
      "-> Tensor");
  m.def(
      "convolution_backward(Tensor grad, Tensor input, Tensor weight, SymInt bias_size, Tensor control, Tensor slots, int[2] stride, "
      "int[2] padding, int[2] dilation, bool transposed, int[2] output_padding, bool grouped, bool compact, bool[3] mask) "
      "-> (Tensor, Tensor, Tensor)");
  // Optimizer steps on active elements; see optim.cpp for counts and plans.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
      "Tensor(e!)[] counts, Tensor[] plans, float lr, float beta1, float beta2, float weight_decay, float eps, bool maximize) -> ()");
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor(c!)[] counts, Tensor[] plans, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
}

namespace {

// `torch.ops.esper_elastic.linear` for plain tensors, without what the generic way from Python costs: a small layer is called so often that
// parsing its arguments by schema would be a fifth of its time. Dispatch, autograd and modes are those of the op.
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "linear: expected input, weight, bias, control, slots and width, got ", count, " arguments");
  for (const int index : {0, 1, 3, 4}) TORCH_CHECK_TYPE(THPVariable_Check(args[index]), "linear: argument ", index, ": expected a tensor");
  using Op = at::Tensor(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&,
      std::optional<c10::SymInt>, std::optional<at::ScalarType>);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("esper_elastic::linear", "").typed<Op>();
  std::optional<at::Tensor> bias;
  if (args[2] != Py_None) bias = THPVariable_Unpack(args[2]);
  std::optional<c10::SymInt> width;
  if (args[5] != Py_None) {
    const long long value = PyLong_AsLongLong(args[5]);
    if (value == -1 && PyErr_Occurred() != nullptr) return nullptr;
    width = c10::SymInt(static_cast<int64_t>(value));
  }
  const at::Tensor &input = THPVariable_Unpack(args[0]), &weight = THPVariable_Unpack(args[1]);
  const at::Tensor &control = THPVariable_Unpack(args[3]), &slots = THPVariable_Unpack(args[4]);
  at::Tensor output;
  {
    const pybind11::gil_scoped_release no_gil;
    output = op.call(input, weight, bias, control, slots, width, std::nullopt);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
     "linear(input, weight, bias, control, slots, width): the op of that name, called directly"},
#ifdef ESPER_ELASTIC_WITH_CUDA
    {"commit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(esper::commit)), METH_FASTCALL,
     "commit(target, source, begin, end): write a part of a CPU tensor to its place in a CUDA tensor, on the current stream"},
#endif
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The compiled ops of esper_elastic; importing it registers them.", -1, methods};
  return PyModule_Create(&module);
}
