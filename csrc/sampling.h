// Furthest point sampling: what its CPU and CUDA kernels share.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "lengths.h"

namespace pointcmt {

// pointnet2_ops' constants. The first is a double there and compared as one.
constexpr double kMinSquaredNorm = 1e-3;
constexpr double kMaxSquaredDistance = 1e10;
constexpr int64_t kReferenceThreads = 512;

inline void check_furthest_point_sample(const at::Tensor& xyz, int64_t npoint,
                                        const std::optional<at::Tensor>& lengths) {
  TORCH_CHECK_VALUE(xyz.dim() == 3 && xyz.size(2) == 3, "furthest_point_sample: xyz must be [B, N, 3], got ",
                    xyz.sizes());
  TORCH_CHECK_VALUE(npoint >= 1 && npoint <= xyz.size(1),
                    "furthest_point_sample: npoint must be between 1 and N=", xyz.size(1), ", got ", npoint);
  TORCH_CHECK_VALUE(xyz.size(1) < (int64_t{1} << 31), "furthest_point_sample: too many points");
  check_lengths("furthest_point_sample", xyz, lengths);
}

constexpr double kMaxVoxel = 4611686018427387904.0;  // 2^62: cells are numbered in int64

inline void check_voxel_subsample(const at::Tensor& points, double size) {
  TORCH_CHECK_VALUE(points.dim() == 2 && points.size(1) == 3, "voxel_subsample: points must be [N, 3], got ",
                    points.sizes());
  TORCH_CHECK_VALUE(size > 0 && size <= std::numeric_limits<double>::max(),
                    "voxel_subsample: size must be positive and finite, got ", size);
  TORCH_CHECK_VALUE(points.size(0) < (int64_t{1} << 30), "voxel_subsample: too many points");
}

inline void check_voxels(bool in_range, double size) {
  TORCH_CHECK_VALUE(in_range, "voxel_subsample: every coordinate must be finite and within 2^62 voxels of size ", size,
                    " from the origin; filter the points or take larger voxels");
}

// The order in which pointnet2_ops prefers equally far points: by the bit-reversed number of the
// thread that holds the point in its tree reduction, then by index (see pointcmt/ops/sampling.py).
// In this order the first of the maxima is the one to take.
class TieOrder {
 public:
  explicit TieOrder(int64_t n) {
    while (int64_t{2} << bits_ <= std::min(n, kReferenceThreads)) ++bits_;
    for (int64_t thread = 0; thread < int64_t{1} << bits_; ++thread) {
      for (int64_t b = 0; b < bits_; ++b) reversed_[thread] |= ((thread >> b) & 1) << (bits_ - 1 - b);
    }
  }
  // A number for each point that rises in this order and gives the point back.
  int32_t rank(int64_t k) const {
    return reversed_[k & ((1 << bits_) - 1)] << kTurnBits | static_cast<int32_t>(k >> bits_);
  }
  int64_t point(int32_t rank) const {
    return static_cast<int64_t>(rank & ((1 << kTurnBits) - 1)) << bits_ | reversed_[rank >> kTurnBits];
  }
  // All n points in this order.
  std::vector<int32_t> points(int64_t n) const {
    std::vector<int32_t> order;
    order.reserve(n);
    for (int64_t place = 0; place < int64_t{1} << bits_; ++place) {
      for (int64_t k = reversed_[place]; k < n; k += int64_t{1} << bits_) order.push_back(static_cast<int32_t>(k));
    }
    return order;
  }

 private:
  static constexpr int kTurnBits = 22;  // of the point's turn in its thread: 2^31 points
  int bits_ = 0;
  int32_t reversed_[kReferenceThreads] = {};
};

}  // namespace pointcmt
