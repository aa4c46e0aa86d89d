// What is called from Python without the dispatcher, beside `linear`, and only where the library was built for CUDA.
#pragma once

#include <Python.h>

namespace esper {

PyObject* commit(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace esper
