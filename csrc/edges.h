// Batch normalisation, activation and maximum over the edges of a neighbour graph.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace pointcmt {

using OptionalTensor = std::optional<at::Tensor>;

// x is dense, [..., S, C]; or points [B, N, C] with centres [B, M, C] and idx [B, M, S], which stand
// for the rows x[b, idx[b, m, s]] + centres[b, m].
inline void check_edges(const char* op, const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
                        const at::Tensor& weight, const at::Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.is_floating_point(), op, ": x must be floating and [..., C], got ", x.sizes());
  const int64_t channels = x.size(-1);
  TORCH_CHECK_VALUE(centres.has_value() == idx.has_value(), op, ": centres and idx come together");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == channels && bias.sizes() == weight.sizes() &&
                        weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type(),
                    op, ": weight and bias must be [", channels, "] and of x's dtype");
  if (!idx) return;
  TORCH_CHECK_VALUE(x.dim() == 3 && centres->dim() == 3 && idx->dim() == 3 && centres->size(2) == channels &&
                        centres->size(0) == x.size(0) && idx->size(0) == x.size(0) &&
                        idx->size(1) == centres->size(1) && centres->scalar_type() == x.scalar_type(),
                    op, ": points [B, N, C], centres [B, M, C] and idx [B, M, S] were expected, got ", x.sizes(), ", ",
                    centres->sizes(), " and ", idx->sizes());
  TORCH_CHECK_VALUE(idx->scalar_type() == at::kLong || idx->scalar_type() == at::kInt, op,
                    ": idx must be int32 or int64, got ", idx->scalar_type());
}

}  // namespace pointcmt
