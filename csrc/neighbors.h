// Neighbour search: the checks that its CPU and CUDA kernels share.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "lengths.h"

namespace pointcmt {

inline void check_pair(const char* op, const at::Tensor& points, const at::Tensor& queries) {
  TORCH_CHECK_VALUE(points.dim() == 3 && queries.dim() == 3 && points.size(0) == queries.size(0) &&
                        points.size(2) == queries.size(2) && points.size(2) >= 1,
                    op, ": points [B, N, D] and queries [B, M, D] were expected, got ", points.sizes(), " and ",
                    queries.sizes());
  TORCH_CHECK_VALUE(points.scalar_type() == queries.scalar_type(), op,
                    ": points and queries must have one dtype, got ", points.scalar_type(), " and ",
                    queries.scalar_type());
  TORCH_CHECK_VALUE(points.device() == queries.device(), op, ": points and queries must be on one device");
  TORCH_CHECK_VALUE(points.size(1) >= 1, op, ": there must be at least one point to search");
  TORCH_CHECK_VALUE(points.size(1) < (int64_t{1} << 30) && queries.size(1) < (int64_t{1} << 30), op,
                    ": too many points");
  TORCH_CHECK_VALUE(points.size(2) < (int64_t{1} << 30), op, ": too many dimensions");
}

inline void check_ball_query(double radius, int64_t nsample, const at::Tensor& xyz, const at::Tensor& new_xyz,
                             const std::optional<at::Tensor>& lengths) {
  check_pair("ball_query", xyz, new_xyz);
  TORCH_CHECK_VALUE(xyz.size(2) == 3, "ball_query: xyz must be [B, N, 3], got ", xyz.sizes());
  TORCH_CHECK_VALUE(radius > 0, "ball_query: radius must be positive, got ", radius);
  TORCH_CHECK_VALUE(nsample >= 1 && nsample < (int64_t{1} << 30),
                    "ball_query: nsample must be at least 1 and below 2^30, got ", nsample);
  check_lengths("ball_query", xyz, lengths);
}

inline void check_knn(const at::Tensor& queries, const at::Tensor& points, int64_t k,
                      const std::optional<at::Tensor>& lengths) {
  check_pair("knn", points, queries);
  TORCH_CHECK_VALUE(k >= 1 && k <= points.size(1), "knn: k must be between 1 and N=", points.size(1), ", got ", k);
  check_lengths("knn", points, lengths);
}

inline void check_three_nn(const at::Tensor& unknown, const at::Tensor& known,
                           const std::optional<at::Tensor>& lengths) {
  check_pair("three_nn", known, unknown);
  TORCH_CHECK_VALUE(known.size(2) == 3, "three_nn: known must be [B, m, 3], got ", known.sizes());
  check_lengths("three_nn", known, lengths);
}

}  // namespace pointcmt
