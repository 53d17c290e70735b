// Gather, group and interpolate: the checks that their CPU and CUDA kernels share.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace pointcmt {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_index(const char* op, const at::Tensor& values, const at::Tensor& idx, int64_t rank) {
  TORCH_CHECK_VALUE(values.is_floating_point(), op, ": a floating-point tensor was expected, got ",
                    values.scalar_type());
  TORCH_CHECK_VALUE(idx.scalar_type() == at::kLong || idx.scalar_type() == at::kInt, op,
                    ": idx must be int32 or int64, got ", idx.scalar_type());
  TORCH_CHECK_VALUE(idx.dim() == rank && idx.size(0) == values.size(0), op, ": idx must have ", rank,
                    " dimensions and batch size ", values.size(0), ", got ", idx.sizes());
  TORCH_CHECK_VALUE(values.device() == idx.device(), op, ": both tensors must be on one device");
}

inline void check_gather(const char* op, const at::Tensor& features, const at::Tensor& idx, int64_t rank) {
  TORCH_CHECK_VALUE(features.dim() == 3, op, ": features must be [B, C, N], got ", features.sizes());
  TORCH_CHECK_VALUE(features.size(2) < (int64_t{1} << 31), op, ": too many points");
  check_index(op, features, idx, rank);
}

// grad is [B, C, *idx.shape[1:]]
inline void check_gather_backward(const char* op, const at::Tensor& grad, const at::Tensor& idx, int64_t n,
                                  int64_t rank) {
  TORCH_CHECK_VALUE(grad.dim() == rank + 1, op, ": grad must have ", rank + 1, " dimensions, got ", grad.sizes());
  check_index(op, grad, idx, rank);
  TORCH_CHECK_VALUE(grad.sizes().slice(2) == idx.sizes().slice(1), op, ": grad ", grad.sizes(),
                    " does not fit idx ", idx.sizes());
  TORCH_CHECK_VALUE(n >= 0 && n < (int64_t{1} << 31), op, ": n is out of range: ", n);
}

inline void check_group_relative(const at::Tensor& xyz, const at::Tensor& new_xyz, const at::Tensor& idx,
                                 const OptionalTensor& features) {
  const char* op = "group_relative";
  check_index(op, xyz, idx, 3);
  TORCH_CHECK_VALUE(xyz.dim() == 3 && xyz.size(2) == 3 && new_xyz.dim() == 3 && new_xyz.size(2) == 3 &&
                        new_xyz.size(0) == xyz.size(0) && new_xyz.size(1) == idx.size(1) &&
                        new_xyz.scalar_type() == xyz.scalar_type() && new_xyz.device() == xyz.device(),
                    op, ": xyz [B, N, 3], new_xyz [B, M, 3] and idx [B, M, S] were expected, got ", xyz.sizes(), ", ",
                    new_xyz.sizes(), " and ", idx.sizes());
  TORCH_CHECK_VALUE(xyz.size(1) < (int64_t{1} << 31), op, ": too many points");
  if (!features) return;
  check_gather(op, *features, idx, 3);
  TORCH_CHECK_VALUE(features->size(2) == xyz.size(1) && features->scalar_type() == xyz.scalar_type(), op,
                    ": features [B, C, N] of xyz's dtype were expected, got ", features->scalar_type(), " ",
                    features->sizes());
}

inline void check_group_relative_backward(const at::Tensor& grad, const at::Tensor& idx, int64_t n) {
  check_gather_backward("group_relative_backward", grad, idx, n, 3);
  TORCH_CHECK_VALUE(grad.size(1) >= 3, "group_relative_backward: grad must be [B, 3 + C, M, S], got ", grad.sizes());
}

// The dtype that sums are taken in: float32 for half precision.
inline at::ScalarType sum_dtype(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// values: the features [B, C, m] or the gradient [B, C, n]; m: of the features.
inline void check_three(const char* op, const at::Tensor& values, const at::Tensor& idx, const at::Tensor& weight,
                        int64_t m) {
  check_index(op, values, idx, 3);
  TORCH_CHECK_VALUE(values.dim() == 3 && idx.size(2) == 3 && weight.sizes() == idx.sizes(), op,
                    ": [B, C, m], idx [B, n, 3] and weight [B, n, 3] were expected, got ", values.sizes(), ", ",
                    idx.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(weight.scalar_type() == sum_dtype(values), op, ": weight must be ", sum_dtype(values), ", got ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == idx.device(), op, ": all tensors must be on one device");
  TORCH_CHECK_VALUE(m >= 0 && m < (int64_t{1} << 31), op, ": m must be between 0 and 2^31 - 1, got ", m);
}

inline void check_three_weight(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& idx) {
  check_index("three_interpolate_weight_backward", features, idx, 3);
  TORCH_CHECK_VALUE(grad.dim() == 3 && features.dim() == 3 && grad.size(0) == features.size(0) &&
                        grad.size(1) == features.size(1) && grad.size(2) == idx.size(1) && idx.size(2) == 3 &&
                        grad.scalar_type() == features.scalar_type() && grad.device() == features.device(),
                    "three_interpolate_weight_backward: grad ", grad.sizes(), ", features ", features.sizes(),
                    " and idx ", idx.sizes(), " do not fit");
  TORCH_CHECK_VALUE(features.size(2) < (int64_t{1} << 31), "three_interpolate_weight_backward: too many points");
}

}  // namespace pointcmt
