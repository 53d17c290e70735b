// Stands in for CUDA's runtime and PyTorch's part for it: see csrc/cuda.cuh. Tensors are on the CPU.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <stdexcept>
#include <tuple>

#include "cuda_on_cpu/device.h"

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) cuda_on_cpu::trap();
#define POINTCMT_DYNAMIC_SHARED(name) char* const name = cuda_on_cpu::shared_memory()
#define POINTCMT_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(pointcmt_cuda_on_cpu, CPU, m)

namespace cuda_on_cpu {

inline unsigned seed = 0;                            // of the order of threads
inline size_t shared_memory_per_block = 227 << 10;   // of an H100
inline std::vector<std::max_align_t> dynamic_shared;

inline char* shared_memory() { return reinterpret_cast<char*>(dynamic_shared.data()); }

}  // namespace cuda_on_cpu

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(const at::Device&) {}
};

}  // namespace c10::cuda

namespace at::cuda {

struct Properties {
  size_t sharedMemPerBlockOptin = cuda_on_cpu::shared_memory_per_block;
  int multiProcessorCount = 3;
};
inline const Properties* getCurrentDeviceProperties() {
  static Properties properties;
  properties = Properties{};
  return &properties;
}

}  // namespace at::cuda

template <typename T>
void gpuAtomicAddNoReturn(T* address, T value) {
  *address += value;
}

namespace pointcmt {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16,
              "not a grid: ", grid.x, ", ", grid.y, ", ", grid.z);
  TORCH_CHECK(shared <= cuda_on_cpu::shared_memory_per_block, "so much shared memory no block has: ", shared);
  cuda_on_cpu::dynamic_shared.assign(shared / sizeof(std::max_align_t) + 1, std::max_align_t{});
  cuda_on_cpu::trapped = false;
  gridDim = grid;
  const std::tuple<Parameters...> converted(static_cast<Parameters>(arguments)...);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        std::memset(cuda_on_cpu::shared_memory(), 0xcd, shared);
        cuda_on_cpu::run_block(block, cuda_on_cpu::seed++, [&] { std::apply(kernel, converted); });
        if (cuda_on_cpu::trapped) throw std::runtime_error("device-side assertion");
      }
    }
  }
}

}  // namespace pointcmt
