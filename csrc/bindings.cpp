// Every operator's schema stands here; each <family>_cpu.cpp and <family>_cuda.cu registers its
// kernels against them with TORCH_LIBRARY_IMPL. Fake kernels and autograd are in pointcmt/ops/.
#include <Python.h>
#include <torch/library.h>

// An empty module: importing pointcmt._C loads this library, and with it the registrations below.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(pointcmt, m) {
  // emd
  m.def(
      "emd(Tensor x, Tensor y, float eps, int max_rounds, Tensor? initial=None) -> "
      "(Tensor distance, Tensor assignment, Tensor statistics)");
  // sampling
  // neighbors
  // grouping
}
