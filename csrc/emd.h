// Earth mover's distance as an optimal one-to-one matching: what its CPU and CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <tuple>

#include "emd_constants.h"

namespace pointcmt::emd {

constexpr int64_t kMostPoints = int64_t{1} << 24;

inline void check(const at::Tensor& x, const at::Tensor& y, double tolerance, int64_t max_rounds) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == 3, "emd: x must be [B, N, 3], got ", x.sizes());
  TORCH_CHECK_VALUE(y.sizes() == x.sizes(), "emd: x and y must have one shape, got ", x.sizes(), " and ",
                    y.sizes());
  TORCH_CHECK_VALUE(x.size(1) >= 1, "emd: clouds need at least one point, got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= kMostPoints, "emd: at most 2^24 points per cloud, got ", x.size(1));
  TORCH_CHECK_VALUE(x.scalar_type() == y.scalar_type() &&
                        (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "emd: the kernel takes float32 or float64 clouds of one dtype, got ", x.scalar_type(),
                    " and ", y.scalar_type());
  TORCH_CHECK_VALUE(x.device() == y.device(), "emd: x is on ", x.device(), ", y is on ", y.device());
  TORCH_CHECK_VALUE(tolerance > 0 && tolerance <= 1, "emd: tolerance must be in (0, 1], got ", tolerance);
  TORCH_CHECK_VALUE(max_rounds >= 0, "emd: max_rounds must not be negative, got ", max_rounds);
}

// Distance [B], bound [B], assignment [B, N], statistics [B, kStatistics].
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline Result empty_result(const at::Tensor& x) {
  const int64_t clouds = x.size(0), n = x.size(1);
  return {at::empty({clouds}, x.options()), at::empty({clouds}, x.options()),
          at::empty({clouds, n}, x.options().dtype(at::kLong)),
          at::empty({clouds, kStatistics}, x.options().dtype(at::kLong))};
}

// The most rows that a pair may take.
inline int64_t most_rows(int64_t max_rounds, int64_t n) {
  return max_rounds > INT64_MAX / n ? INT64_MAX : max_rounds * n;
}

}  // namespace pointcmt::emd
