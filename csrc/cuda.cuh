// What the .cu files need of CUDA and of PyTorch's part for it, and how they launch and register.
//
// With POINTCMT_CUDA_ON_CPU the tests' stand-in takes CUDA's place: kernels then run on a CPU, thread
// by thread, so that the kernels and the code that launches them are tested without a GPU. Hence
// kernels are launched by launch(), and dynamic shared memory and the library go by a macro.
#pragma once

#ifdef POINTCMT_CUDA_ON_CPU
#include "cuda_on_cpu/host.h"
#else

#include <ATen/cuda/Atomic.cuh>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#define POINTCMT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define POINTCMT_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(pointcmt, CUDA, m)

namespace pointcmt {

// kernel<<<grid, block, shared>>>(arguments...) on the current stream, with its errors checked.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 32 << 10;  // what every device gives is 48 KiB, static shared memory included
  if (shared > kWithoutAsking) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  kernel<<<grid, block, shared, at::cuda::getCurrentCUDAStream()>>>(static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pointcmt

#endif

namespace pointcmt {

constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace pointcmt
