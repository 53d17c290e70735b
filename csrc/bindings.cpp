// The Python module, and the library that every operator belongs to: <family>_cpu.cpp and
// <family>_cuda.cu register their kernels against the schemas with TORCH_LIBRARY_IMPL.
#include <Python.h>
#include <torch/library.h>

#include "schemas.h"

// An empty module: importing pointcmt._C loads this library, and with it the registrations below.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(pointcmt, m) { pointcmt::define_schemas(m); }
