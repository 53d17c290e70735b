// pointcmt._C: the schemas that every operator belongs to, the CUDA kernels where they were compiled (<family>_cuda.cu
// register theirs), and what the CPU at hand can do. Compiled for the least CPU there is, so that it loads on every
// one; pointcmt/ops/_extension.py then loads one of the libraries of CPU kernels (see cpu_module.cpp).
#include <Python.h>
#include <torch/library.h>

#include "schemas.h"

namespace {

// The CPU's extensions by the names of GCC's and clang's __builtin_cpu_supports, which asks the operating system too.
PyObject* cpu_features(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto add = [names](int there, const char* name) {
    if (!there || names == nullptr) return;
    PyObject* text = PyUnicode_FromString(name);
    if (text != nullptr) PyList_Append(names, text);
    Py_XDECREF(text);
  };
#define POINTCMT_FEATURE(name) add(__builtin_cpu_supports(name), name)
  POINTCMT_FEATURE("sse4.2");
  POINTCMT_FEATURE("popcnt");
  POINTCMT_FEATURE("avx");
  POINTCMT_FEATURE("avx2");
  POINTCMT_FEATURE("fma");
  POINTCMT_FEATURE("bmi");
  POINTCMT_FEATURE("bmi2");
  POINTCMT_FEATURE("avx512f");
  POINTCMT_FEATURE("avx512vl");
  POINTCMT_FEATURE("avx512bw");
  POINTCMT_FEATURE("avx512dq");
  POINTCMT_FEATURE("avx512cd");
  POINTCMT_FEATURE("avx512ifma");
  POINTCMT_FEATURE("avx512vbmi");
  POINTCMT_FEATURE("avx512vbmi2");
  POINTCMT_FEATURE("avx512vnni");
  POINTCMT_FEATURE("avx512bitalg");
  POINTCMT_FEATURE("avx512vpopcntdq");
#undef POINTCMT_FEATURE
#endif
  return names;
}

PyMethodDef kMethods[] = {{"cpu_features", cpu_features, METH_NOARGS, "What this CPU can do, as a list of names."},
                          {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods};
  PyObject* made = PyModule_Create(&module);
#if defined(POINTCMT_NATIVE)  // the extensions that the CPU kernels need, compiled for one CPU by choice
  if (made != nullptr) PyModule_AddStringConstant(made, "native", POINTCMT_NATIVE);
#endif
  return made;
}

TORCH_LIBRARY(pointcmt, m) { pointcmt::define_schemas(m); }
