// Furthest point sampling: what its CPU and CUDA kernels share.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace pointcmt {

// pointnet2_ops' constants. The first is a double there and compared as one.
constexpr double kMinSquaredNorm = 1e-3;
constexpr double kMaxSquaredDistance = 1e10;
constexpr int64_t kReferenceThreads = 512;

inline void check_furthest_point_sample(const at::Tensor& xyz, int64_t npoint) {
  TORCH_CHECK_VALUE(xyz.dim() == 3 && xyz.size(2) == 3, "furthest_point_sample: xyz must be [B, N, 3], got ",
                    xyz.sizes());
  TORCH_CHECK_VALUE(npoint >= 1 && npoint <= xyz.size(1),
                    "furthest_point_sample: npoint must be between 1 and N=", xyz.size(1), ", got ", npoint);
  TORCH_CHECK_VALUE(xyz.size(1) < (int64_t{1} << 31), "furthest_point_sample: too many points");
}

// The order in which pointnet2_ops prefers equally far points: by the bit-reversed number of the
// thread that holds the point in its tree reduction, then by index (see pointcmt/ops/sampling.py).
// In this order the first of the maxima is the one to take.
inline std::vector<int32_t> tie_order(int64_t n) {
  int64_t threads = 1, bits = 0;
  while (threads * 2 <= n && threads < kReferenceThreads) threads *= 2, ++bits;
  std::vector<int32_t> order;
  order.reserve(n);
  for (int64_t rank = 0; rank < threads; ++rank) {
    int64_t thread = 0;
    for (int64_t b = 0; b < bits; ++b) thread |= ((rank >> b) & 1) << (bits - 1 - b);
    for (int64_t k = thread; k < n; k += threads) order.push_back(static_cast<int32_t>(k));
  }
  return order;
}

}  // namespace pointcmt
