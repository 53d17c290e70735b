// Batch normalisation, activation and maximum over the edges of a neighbour graph.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "grouping.h"

namespace pointcmt {

// x is dense, [..., S, C]; or points [B, N, C] with centres [B, M, C] and idx [B, M, S], which stand
// for the rows x[b, idx[b, m, s]] + centres[b, m], or these times factors [B, M, S, C].
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

// What rows are.
enum class Kind { kDense, kGathered, kScaled };

// The rows of one call: groups of `samples` rows with `channels` numbers each.
template <typename T>
struct Rows {
  const T* x;
  const T* centres = nullptr;    // null: dense, row r of x is row r
  const int32_t* idx = nullptr;  // else row r is x[idx[r]] of its cloud plus its group's centre
  const T* factors = nullptr;    // then times its own factors, where there are any
  int64_t groups, samples, channels;
  int64_t n = 0, groups_per_cloud = 1;

  int64_t count() const { return groups * samples; }
  const T* cloud(int64_t group) const { return x + group / groups_per_cloud * n * channels; }
};

// The checked, contiguous inputs of a call, and the rows that they stand for.
struct Inputs {
  at::Tensor x, centres, idx, factors;
  std::vector<int64_t> groups;  // the shape before S and C

  Inputs(const char* op, const at::Tensor& x_, const OptionalTensor& centres_, const OptionalTensor& idx_,
         const at::Tensor& weight, const at::Tensor& bias, bool grouped, const OptionalTensor& factors_ = {}) {
    check_edges(op, x_, centres_, idx_, weight, bias);
    x = x_.contiguous();
    if (idx_) {
      centres = centres_->contiguous();
      const at::Tensor wide = idx_->contiguous();
      if (wide.is_cpu() && wide.numel() > 0) {  // elsewhere the kernels assert it: nobody waits for the device
        const bool inside = wide.min().item<int64_t>() >= 0 && wide.max().item<int64_t>() < x.size(1);
        TORCH_CHECK_INDEX(inside, op, ": an index is out of range for ", x.size(1), " points");
      }
      idx = wide.to(at::kInt);
      groups = {idx.size(0), idx.size(1)};
      if (factors_) {
        factors = factors_->contiguous();
        TORCH_CHECK_VALUE(factors.dim() == 4 && factors.sizes().slice(0, 3) == idx.sizes() &&
                              factors.size(3) == x.size(2) && factors.scalar_type() == x.scalar_type(),
                          op, ": factors [B, M, S, C] of x's dtype were expected, got ", factors.sizes());
      }
    } else {
      TORCH_CHECK_VALUE(!factors_, op, ": factors come with centres and idx");
      TORCH_CHECK_VALUE(!grouped || x.dim() >= 3, op, ": x must be [..., S, C], got ", x.sizes());
      groups = x.sizes().slice(0, x.dim() - (grouped ? 2 : 1)).vec();
    }
    TORCH_CHECK_VALUE(x.numel() > 0 && (!idx_ || idx.numel() > 0), op, ": there must be at least one row");
  }

  template <typename T>
  Rows<T> rows(bool grouped) const {
    const int64_t channels = x.size(-1);
    Rows<T> out{x.const_data_ptr<T>()};
    out.channels = channels;
    if (idx.defined()) {
      out.centres = centres.const_data_ptr<T>();
      out.idx = idx.const_data_ptr<int32_t>();
      if (factors.defined()) out.factors = factors.const_data_ptr<T>();
      out.n = x.size(1), out.groups_per_cloud = idx.size(1);
      out.groups = idx.size(0) * idx.size(1), out.samples = idx.size(2);
    } else {
      out.samples = grouped ? x.size(-2) : 1;
      out.groups = x.numel() / channels / out.samples;
    }
    return out;
  }

  std::vector<int64_t> shape(bool rows_too) const {
    std::vector<int64_t> out = groups;
    if (rows_too && idx.defined()) out.push_back(idx.size(2));
    out.push_back(x.size(-1));
    return out;
  }
};

}  // namespace pointcmt
