// Clouds of different sizes in a batch: of cloud b only the first lengths[b] points count.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace pointcmt {

inline void check_lengths(const char* op, const at::Tensor& points, const std::optional<at::Tensor>& lengths) {
  if (!lengths) return;
  TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == points.size(0) && lengths->scalar_type() == at::kLong,
                    op, ": lengths must be int64 [B] for points of shape ", points.sizes(), ", got ",
                    lengths->scalar_type(), " of shape ", lengths->sizes());
  TORCH_CHECK_VALUE(lengths->device() == points.device(), op, ": lengths are on ", lengths->device(),
                    " and the points on ", points.device(), "; move them together");
}

// Every cloud's number of points, for tensors on the CPU.
inline std::vector<int64_t> cloud_sizes(const char* op, const std::optional<at::Tensor>& lengths, int64_t batch,
                                        int64_t n) {
  if (!lengths) return std::vector<int64_t>(batch, n);
  const at::Tensor given = lengths->contiguous();
  const int64_t* value = given.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(value[b] >= 1 && value[b] <= n, op, ": lengths[", b, "] is ", value[b],
                      ", expected 1 to N=", n);
  }
  return {value, value + batch};
}

}  // namespace pointcmt
