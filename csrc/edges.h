// Batch normalisation, activation and maximum over the edges of a neighbour graph.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "grouping.h"

namespace pointcmt {

// x is dense, [..., S, C]; or points [B, N, C] with centres [B, M, C] and idx [B, M, S], which stand
// for the rows x[b, idx[b, m, s]] + centres[b, m].
inline void check_edges(const char* op, const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
                        const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& mean,
                        const OptionalTensor& var) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.is_floating_point(), op, ": x must be floating [..., S, C], got ",
                    x.scalar_type(), " ", x.sizes());
  const int64_t channels = x.size(-1);
  TORCH_CHECK_VALUE(centres.has_value() == idx.has_value(), op, ": centres and idx come together");
  const int64_t samples = idx && idx->dim() > 0 ? idx->size(-1) : x.size(-2);  // places among them are int32
  TORCH_CHECK_VALUE(samples < (int64_t{1} << 31), op, ": too many samples in a group: ", samples);
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), op, ": mean and variance come together");
  const auto of_channels = [&](const char* name, const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == x.scalar_type() &&
                          t.device() == x.device(),
                      op, ": ", name, " must be [", channels, "] of x's dtype ", x.scalar_type(), " on x's device ",
                      x.device(), ", got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
  };
  of_channels("weight", weight);
  of_channels("bias", bias);
  if (mean) of_channels("mean", *mean), of_channels("variance", *var);
  if (!idx) return;
  TORCH_CHECK_VALUE(x.dim() == 3 && centres->dim() == 3 && idx->dim() == 3 && centres->size(2) == channels &&
                        centres->size(0) == x.size(0) && idx->size(0) == x.size(0) &&
                        idx->size(1) == centres->size(1) && centres->scalar_type() == x.scalar_type(),
                    op, ": points [B, N, C], centres [B, M, C] and idx [B, M, S] were expected, got ", x.sizes(), ", ",
                    centres->sizes(), " and ", idx->sizes());
  TORCH_CHECK_VALUE(idx->scalar_type() == at::kLong || idx->scalar_type() == at::kInt, op,
                    ": idx must be int32 or int64, got ", idx->scalar_type());
  TORCH_CHECK_VALUE(centres->device() == x.device() && idx->device() == x.device(), op,
                    ": centres and idx must be on x's device ", x.device(), ", got ", centres->device(), " and ",
                    idx->device());
  TORCH_CHECK_VALUE(x.size(1) < (int64_t{1} << 31), op, ": too many points");
}

// What rows are.
enum class Kind { kDense, kGathered };

// The rows of one call: groups of `samples` rows with `channels` numbers each.
template <typename T>
struct Rows {
  const T* x;
  const T* centres = nullptr;    // null: dense, row r of x is row r
  const int32_t* idx = nullptr;  // else row r is x[idx[r]] of its cloud plus its group's centre
  int64_t groups, samples, channels;
  int64_t n = 0, groups_per_cloud = 1;

  int64_t count() const { return groups * samples; }
  const T* cloud(int64_t group) const { return x + group / groups_per_cloud * n * channels; }
};

// The checked, contiguous inputs of a call, and the rows that they stand for.
struct Inputs {
  at::Tensor x, centres, idx;
  std::vector<int64_t> shape;  // of the result: without S

  Inputs(const char* op, const at::Tensor& x_, const OptionalTensor& centres_, const OptionalTensor& idx_,
         const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& mean, const OptionalTensor& var) {
    check_edges(op, x_, centres_, idx_, weight, bias, mean, var);
    x = x_.contiguous();
    if (idx_) {
      centres = centres_->contiguous();
      const at::Tensor wide = idx_->contiguous();
      if (wide.is_cpu() && wide.numel() > 0) {  // elsewhere the kernels assert it: nobody waits for the device
        const bool inside = wide.min().item<int64_t>() >= 0 && wide.max().item<int64_t>() < x.size(1);
        TORCH_CHECK_INDEX(inside, op, ": an index is out of range for ", x.size(1), " points");
      }
      idx = wide.to(at::kInt);
      shape = centres.sizes().vec();
    } else {
      shape = x.sizes().slice(0, x.dim() - 2).vec();
      shape.push_back(x.size(-1));
    }
    TORCH_CHECK_VALUE(x.numel() > 0 && (!idx_ || idx.numel() > 0), op, ": there must be at least one row");
  }

  int64_t samples() const { return idx.defined() ? idx.size(2) : x.size(-2); }

  // What the forward pass handed to the backward pass, which anybody can call with anything.
  void check_backward(const char* op, const at::Tensor& grad, const at::Tensor& chosen, const at::Tensor& which,
                      const at::Tensor& total, bool training) const {
    const auto of_groups = [&](const char* name, const at::Tensor& t, at::ScalarType dtype) {
      TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape) && t.scalar_type() == dtype && t.device() == x.device(), op,
                        ": ", name, " must be ", dtype, " ", at::IntArrayRef(shape), " on ", x.device(), ", got ",
                        t.scalar_type(), " ", t.sizes(), " on ", t.device());
    };
    of_groups("grad", grad, x.scalar_type());
    of_groups("chosen", chosen, x.scalar_type());
    of_groups("which", which, at::kInt);
    if (training && idx.defined()) of_groups("total", total, x.scalar_type());
    if (!which.is_cpu()) return;  // elsewhere the kernels assert it
    const bool inside = which.min().item<int32_t>() >= 0 && which.max().item<int32_t>() < samples();
    TORCH_CHECK_INDEX(inside, op, ": which is out of range for ", samples(), " samples");
  }

  template <typename T>
  Rows<T> rows() const {
    Rows<T> out{x.const_data_ptr<T>()};
    out.channels = x.size(-1), out.samples = samples();
    if (idx.defined()) {
      out.centres = centres.const_data_ptr<T>();
      out.idx = idx.const_data_ptr<int32_t>();
      out.n = x.size(1), out.groups_per_cloud = idx.size(1);
      out.groups = idx.size(0) * idx.size(1);
    } else {
      out.groups = x.numel() / out.channels / out.samples;
    }
    return out;
  }
};

}  // namespace pointcmt
