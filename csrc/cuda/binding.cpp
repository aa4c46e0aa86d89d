// `_C.commit(target, source, begin, end)`: `target[begin:end] = source[begin:end]` for a CUDA target and a CPU source, on the current stream.
#include <Python.h>

#include "commit.h"
#include "python.h"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace esper {

PyObject* commit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 4 && THPVariable_Check(args[0]) && THPVariable_Check(args[1]),
      "commit: expected a CUDA tensor, a CPU tensor, and the first and last index to write");
  const at::Tensor &target = THPVariable_Unpack(args[0]), &source = THPVariable_Unpack(args[1]);
  const int64_t begin = PyLong_AsLongLong(args[2]), end = PyLong_AsLongLong(args[3]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  TORCH_CHECK_VALUE(
      target.is_cuda() && source.is_cpu() && target.scalar_type() == at::kInt && source.scalar_type() == at::kInt && 0 <= begin &&
          begin <= end && end <= target.numel() && end <= source.numel(),
      "commit: expected int32 tensors that hold the indices ", begin, " to ", end);
  const c10::cuda::CUDAGuard guard(target.device());
  C10_CUDA_CHECK(commit_values(
      target.mutable_data_ptr<int32_t>() + begin, source.const_data_ptr<int32_t>() + begin, end - begin,
      c10::cuda::getCurrentCUDAStream()));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace esper
