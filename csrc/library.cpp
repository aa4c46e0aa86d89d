// Every op's schema, and the module that Python imports to load them. The kernels register themselves, each in its own file.
//
// All ops take the control tensor and their slots in it (see widths.h). `width` is the active output width in compact layout and None in
// static layout, where activations have capacity size and kernels alone read how much of it is active.
#include <Python.h>

#include <torch/library.h>

TORCH_LIBRARY(esper_elastic, m) {
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias, Tensor control, Tensor slots, SymInt? width, ScalarType? dtype=None) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor weight, Tensor control, Tensor slots, SymInt? width, SymInt in_width) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor input, Tensor weight, Tensor control, Tensor slots, SymInt? width) -> Tensor");
  m.def("linear_grad_bias(Tensor grad, Tensor bias, Tensor control, Tensor slots, SymInt? width) -> Tensor");
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor control, Tensor slots, int[2] stride, int[2] padding, int[2] dilation, "
      "bool grouped, SymInt? width, ScalarType? dtype=None) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor control, Tensor slots, int[2] stride, int[2] padding, "
      "int[2] dilation, bool grouped, SymInt? width, bool[3] mask) -> (Tensor, Tensor, Tensor)");
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The compiled ops of esper_elastic; importing it registers them.", -1, nullptr};
  return PyModule_Create(&module);
}
