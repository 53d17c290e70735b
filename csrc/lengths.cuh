// Clouds of different sizes in a batch, on the GPU: see lengths.h.
#pragma once

#include <optional>

#include "cuda.cuh"
#include "lengths.h"

namespace pointcmt {

inline at::Tensor sizes_on_device(const std::optional<at::Tensor>& lengths) {
  return lengths ? lengths->contiguous() : at::Tensor();
}

inline const int64_t* size_data(const at::Tensor& sizes) {
  return sizes.defined() ? sizes.const_data_ptr<int64_t>() : nullptr;
}

// The number of points of cloud b, n where no lengths are given.
__device__ __forceinline__ int cloud_size(const int64_t* lengths, int64_t b, int n) {
  if (lengths == nullptr) return n;
  CUDA_KERNEL_ASSERT(lengths[b] >= 1 && lengths[b] <= n && "pointcmt: lengths out of range");
  return static_cast<int>(lengths[b]);
}

}  // namespace pointcmt
