// pointcmt._cpu_<capability>: the CPU kernels, <family>_cpu.cpp, compiled for CPUs of that capability. Importing it loads
// the library, and with it their registrations against the schemas. Each is a library of its own, so that the linker
// cannot take a template that several of them instantiate from the one whose instructions this CPU lacks.
#include <Python.h>

#define POINTCMT_JOIN(a, b) a##b
#define POINTCMT_INIT(name) POINTCMT_JOIN(PyInit_, name)
#define POINTCMT_TEXT(name) #name
#define POINTCMT_NAME(name) POINTCMT_TEXT(name)

PyMODINIT_FUNC POINTCMT_INIT(TORCH_EXTENSION_NAME)(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, POINTCMT_NAME(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
