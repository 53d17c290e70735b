// Earth mover's distance as an optimal one-to-one matching: what its CPU and CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "emd_constants.h"

namespace pointcmt::emd {

inline void check(const at::Tensor& x, const at::Tensor& y, double eps, int64_t max_rounds,
                  const std::optional<at::Tensor>& initial) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == 3, "emd: x must be [B, N, 3], got ", x.sizes());
  TORCH_CHECK_VALUE(y.sizes() == x.sizes(), "emd: x and y must have one shape, got ", x.sizes(), " and ",
                    y.sizes());
  TORCH_CHECK_VALUE(x.size(1) >= 1, "emd: clouds need at least one point, got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= (int64_t{1} << 24), "emd: at most 2^24 points per cloud, got ", x.size(1));
  TORCH_CHECK_VALUE(x.scalar_type() == y.scalar_type() &&
                        (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "emd: the kernel takes float32 or float64 clouds of one dtype, got ", x.scalar_type(),
                    " and ", y.scalar_type());
  TORCH_CHECK_VALUE(x.device() == y.device(), "emd: x is on ", x.device(), ", y is on ", y.device());
  TORCH_CHECK_VALUE(eps > 0 && eps < 1e30, "emd: eps must be a positive number, got ", eps);
  TORCH_CHECK_VALUE(max_rounds >= 0, "emd: max_rounds must not be negative, got ", max_rounds);
  if (initial.has_value()) {
    TORCH_CHECK_VALUE(initial->dim() == 2 && initial->size(0) == x.size(0) && initial->size(1) == x.size(1),
                      "emd: initial must be [B, N] = [", x.size(0), ", ", x.size(1), "], got ",
                      initial->sizes());
    TORCH_CHECK_VALUE(initial->scalar_type() == at::kLong, "emd: initial must be int64, got ",
                      initial->scalar_type());
    TORCH_CHECK_VALUE(initial->device() == x.device(), "emd: x is on ", x.device(), ", initial is on ",
                      initial->device());
  }
}

}  // namespace pointcmt::emd
