// Reading and adding up by index, for the kernels that gather and scatter.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "cuda.cuh"

namespace pointcmt {

template <typename index_t>
__device__ __forceinline__ int64_t checked(index_t i, int64_t n) {
  CUDA_KERNEL_ASSERT(i >= 0 && i < n && "pointcmt: index out of range");
  return i;
}

// Every point's edges in their order: a stable sort of all indices, and where each point's begin.
inline std::tuple<at::Tensor, at::Tensor> edges_by_point(const at::Tensor& idx, int64_t batch, int64_t n) {
  const auto options = idx.options().dtype(at::kLong);
  const at::Tensor offset = at::arange(batch, options).mul_(n).unsqueeze(1);
  const at::Tensor keys = idx.reshape({batch, -1}).to(at::kLong).add(offset).flatten();
  const std::tuple<at::Tensor, at::Tensor> sorted = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  return {std::get<1>(sorted), at::searchsorted(std::get<0>(sorted), at::arange(batch * n + 1, options))};
}

}  // namespace pointcmt
