// Gather, group and interpolate on the GPU, forward and backward. Scattering uses atomics, or, when
// PyTorch is asked for deterministic algorithms, sums along the sorted list of each point's edges.
#include "grouping.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda.cuh"
#include "exact.cuh"
#include "indexed.cuh"

namespace pointcmt {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 4;  // read an index once for so many channels
constexpr int kMaxGrid = 65535;

// x covers columns, y groups of channels, z clouds; kernels stride where a grid ends.
dim3 grid(int64_t columns, int64_t channels, int64_t batch) {
  const int64_t x = (columns + kThreads - 1) / kThreads, y = (channels + kChannels - 1) / kChannels;
  return dim3(static_cast<unsigned>(std::min<int64_t>(x, 1 << 30)), static_cast<unsigned>(std::min<int64_t>(y, kMaxGrid)),
              static_cast<unsigned>(std::min<int64_t>(batch, kMaxGrid)));
}

// Calls f(b, c, e) for the block's share of batch × channels × columns: e outermost, so that what
// depends on (b, e) alone can be prepared once by g(b, e), whose result f receives.
template <typename G, typename F>
__device__ __forceinline__ void for_all(int64_t batch, int64_t channels, int64_t columns, const G& g, const F& f) {
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < columns;
         e += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const auto prepared = g(b, e);
      for (int64_t first = static_cast<int64_t>(blockIdx.y) * kChannels; first < channels;
           first += static_cast<int64_t>(gridDim.y) * kChannels) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          if (first + i < channels) f(b, first + i, e, prepared);
        }
      }
    }
  }
}

template <typename T, typename index_t>
__global__ void gather_kernel(const T* __restrict__ features, const index_t* __restrict__ idx, int64_t batch,
                              int64_t channels, int64_t n, int64_t edges, T* __restrict__ out) {
  for_all(
      batch, channels, edges, [&](int64_t b, int64_t e) { return checked(idx[b * edges + e], n); },
      [&](int64_t b, int64_t c, int64_t e, int64_t at) {
        out[(b * channels + c) * edges + e] = features[(b * channels + c) * n + at];
      });
}

// Coordinates relative to their centre, then the features.
template <typename T, typename index_t>
__global__ void group_relative_kernel(const T* __restrict__ xyz, const T* __restrict__ new_xyz,
                                      const index_t* __restrict__ idx, const T* __restrict__ features, int64_t batch,
                                      int64_t channels, int64_t n, int64_t m, int64_t samples, T* __restrict__ out) {
  const int64_t edges = m * samples;
  for_all(
      batch, 3 + channels, edges, [&](int64_t b, int64_t e) { return checked(idx[b * edges + e], n); },
      [&](int64_t b, int64_t c, int64_t e, int64_t at) {
        out[(b * (3 + channels) + c) * edges + e] =
            c < 3 ? static_cast<T>(xyz[(b * n + at) * 3 + c] - new_xyz[(b * m + e / samples) * 3 + c])
                  : features[(b * channels + c - 3) * n + at];
      });
}

// grad has `wide` channels, of which those from `first` on are added up.
template <typename T, typename S, typename index_t>
__global__ void scatter_kernel(const T* __restrict__ grad, const index_t* __restrict__ idx, int64_t batch,
                               int64_t channels, int64_t wide, int64_t first, int64_t n, int64_t edges,
                               S* __restrict__ out) {
  for_all(
      batch, channels, edges, [&](int64_t b, int64_t e) { return checked(idx[b * edges + e], n); },
      [&](int64_t b, int64_t c, int64_t e, int64_t at) {
        gpuAtomicAddNoReturn(out + (b * channels + c) * n + at, static_cast<S>(grad[(b * wide + first + c) * edges + e]));
      });
}

// The edges of point j of cloud b are order[start[b n + j] … start[b n + j + 1]), counted over all
// clouds and in their own order. Three edges share a column of grad where weight is given.
template <typename T, typename S>
__global__ void segment_kernel(const T* __restrict__ grad, const S* __restrict__ weight,
                               const int64_t* __restrict__ order, const int64_t* __restrict__ start, int64_t batch,
                               int64_t channels, int64_t wide, int64_t first, int64_t n, int64_t edges,
                               T* __restrict__ out) {
  const int64_t columns = weight ? edges / 3 : edges;
  for_all(
      batch, channels, n, [&](int64_t b, int64_t j) { return b * n + j; },
      [&](int64_t b, int64_t c, int64_t j, int64_t point) {
        S sum = S(0);
        for (int64_t s = start[point]; s < start[point + 1]; ++s) {
          const int64_t e = order[s] - b * edges, column = weight ? e / 3 : e;
          const S slope = static_cast<S>(grad[(b * wide + first + c) * columns + column]);
          sum += weight ? slope * weight[order[s]] : slope;
        }
        out[(b * channels + c) * n + j] = static_cast<T>(sum);
      });
}

template <typename T, typename S, typename index_t>
__global__ void interpolate_kernel(const T* __restrict__ features, const index_t* __restrict__ idx,
                                   const S* __restrict__ weight, int64_t batch, int64_t channels, int64_t m,
                                   int64_t n, T* __restrict__ out) {
  for_all(
      batch, channels, n, [&](int64_t b, int64_t e) { return 3 * (b * n + e); },
      [&](int64_t b, int64_t c, int64_t e, int64_t at) {
        const T* row = features + (b * channels + c) * m;
        S sum = mul(static_cast<S>(row[checked(idx[at], m)]), weight[at]);
        sum = add(sum, mul(static_cast<S>(row[checked(idx[at + 1], m)]), weight[at + 1]));
        sum = add(sum, mul(static_cast<S>(row[checked(idx[at + 2], m)]), weight[at + 2]));
        out[(b * channels + c) * n + e] = static_cast<T>(sum);
      });
}

template <typename T, typename S, typename index_t>
__global__ void interpolate_scatter_kernel(const T* __restrict__ grad, const index_t* __restrict__ idx,
                                           const S* __restrict__ weight, int64_t batch, int64_t channels, int64_t m,
                                           int64_t n, S* __restrict__ out) {
  for_all(
      batch, channels, n, [&](int64_t b, int64_t e) { return 3 * (b * n + e); },
      [&](int64_t b, int64_t c, int64_t e, int64_t at) {
        const S slope = static_cast<S>(grad[(b * channels + c) * n + e]);
        S* row = out + (b * channels + c) * m;
#pragma unroll
        for (int j = 0; j < 3; ++j) gpuAtomicAddNoReturn(row + checked(idx[at + j], m), slope * weight[at + j]);
      });
}

template <typename T, typename S, typename index_t>
__global__ void weight_kernel(const T* __restrict__ grad, const T* __restrict__ features,
                              const index_t* __restrict__ idx, int64_t batch, int64_t channels, int64_t m, int64_t n,
                              S* __restrict__ out) {
  const int64_t total = batch * n, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t b = i / n, e = i % n;
    const int64_t at[3] = {checked(idx[3 * i], m), checked(idx[3 * i + 1], m), checked(idx[3 * i + 2], m)};
    S sum[3] = {};
    for (int64_t c = b * channels; c < (b + 1) * channels; ++c) {
      const S slope = static_cast<S>(grad[c * n + e]);
#pragma unroll
      for (int j = 0; j < 3; ++j) sum[j] += slope * static_cast<S>(features[c * m + at[j]]);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) out[3 * i + j] = sum[j];
  }
}

at::Tensor gather(const char* op, const at::Tensor& features, const at::Tensor& idx) {
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor values = features.contiguous(), index = idx.contiguous();
  const int64_t batch = values.size(0), channels = values.size(1), n = values.size(2);
  std::vector<int64_t> shape{batch, channels};
  for (int64_t d = 1; d < idx.dim(); ++d) shape.push_back(idx.size(d));
  at::Tensor out = at::empty(shape, values.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_INDEX(n > 0, op, ": there is no point to index");
  const int64_t edges = index.numel() / batch;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "gather_points", [&] {
    AT_DISPATCH_INDEX_TYPES(index.scalar_type(), "gather_points", [&] {
      launch(gather_kernel<scalar_t, index_t>, grid(edges, channels, batch), kThreads, 0,
             values.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(), batch, channels, n, edges,
             out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

// Sums of grad by index; with weight also the backward pass of three_interpolate. Half precision is
// summed in float32 and rounded once. Of grad's channels those in [first, first + channels).
at::Tensor scatter(const at::Tensor& grad, const at::Tensor& idx, const at::Tensor& weight, int64_t n, int64_t first,
                   int64_t channels) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor slopes = grad.contiguous(), index = idx.contiguous();
  const int64_t batch = slopes.size(0), wide = slopes.size(1);
  if (slopes.numel() == 0 || n == 0 || channels == 0) return at::zeros({batch, channels, n}, slopes.options());
  const int64_t edges = index.numel() / batch;
  if (at::globalContext().deterministicAlgorithms()) {
    const std::tuple<at::Tensor, at::Tensor> sorted = edges_by_point(index, batch, n);
    const at::Tensor &order = std::get<0>(sorted), &start = std::get<1>(sorted);
    at::Tensor out = at::empty({batch, channels, n}, slopes.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "gather_points_backward", [&] {
      using S = at::opmath_type<scalar_t>;
      launch(segment_kernel<scalar_t, S>, grid(n, channels, batch), kThreads, 0, slopes.const_data_ptr<scalar_t>(),
             weight.defined() ? weight.const_data_ptr<S>() : nullptr, order.const_data_ptr<int64_t>(),
             start.const_data_ptr<int64_t>(), batch, channels, wide, first, n, edges,
             out.mutable_data_ptr<scalar_t>());
    });
    return out;
  }
  at::Tensor sum = at::zeros({batch, channels, n}, slopes.options().dtype(sum_dtype(slopes)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "gather_points_backward", [&] {
    using S = at::opmath_type<scalar_t>;
    AT_DISPATCH_INDEX_TYPES(index.scalar_type(), "gather_points_backward", [&] {
      if (weight.defined()) {
        launch(interpolate_scatter_kernel<scalar_t, S, index_t>, grid(edges / 3, channels, batch), kThreads, 0,
               slopes.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(), weight.const_data_ptr<S>(), batch,
               channels, n, edges / 3, sum.mutable_data_ptr<S>());
      } else {
        launch(scatter_kernel<scalar_t, S, index_t>, grid(edges, channels, batch), kThreads, 0,
               slopes.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(), batch, channels, wide, first, n,
               edges, sum.mutable_data_ptr<S>());
      }
    });
  });
  return sum.to(slopes.scalar_type());
}

at::Tensor gather_points(const at::Tensor& features, const at::Tensor& idx) {
  check_gather("gather_points", features, idx, 2);
  return gather("gather_points", features, idx);
}

at::Tensor group_points(const at::Tensor& features, const at::Tensor& idx) {
  check_gather("group_points", features, idx, 3);
  return gather("group_points", features, idx);
}

at::Tensor gather_points_backward(const at::Tensor& grad, const at::Tensor& idx, int64_t n) {
  check_gather_backward("gather_points_backward", grad, idx, n, 2);
  return scatter(grad, idx, {}, n, 0, grad.size(1));
}

at::Tensor group_points_backward(const at::Tensor& grad, const at::Tensor& idx, int64_t n) {
  check_gather_backward("group_points_backward", grad, idx, n, 3);
  return scatter(grad, idx, {}, n, 0, grad.size(1));
}

at::Tensor group_relative(const at::Tensor& xyz, const at::Tensor& new_xyz, const at::Tensor& idx,
                          const OptionalTensor& features) {
  check_group_relative(xyz, new_xyz, idx, features);
  const c10::cuda::CUDAGuard guard(xyz.device());
  const int64_t batch = xyz.size(0), n = xyz.size(1), m = idx.size(1), samples = idx.size(2);
  const int64_t channels = features ? features->size(1) : 0;
  at::Tensor out = at::empty({batch, 3 + channels, m, samples}, xyz.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_INDEX(n > 0, "group_relative: there is no point to index");
  const at::Tensor points = xyz.contiguous(), centres = new_xyz.contiguous(), index = idx.contiguous();
  const at::Tensor values = features ? features->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xyz.scalar_type(), "group_relative", [&] {
    AT_DISPATCH_INDEX_TYPES(index.scalar_type(), "group_relative", [&] {
      launch(group_relative_kernel<scalar_t, index_t>, grid(m * samples, 3 + channels, batch), kThreads, 0,
             points.const_data_ptr<scalar_t>(), centres.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(),
             features ? values.const_data_ptr<scalar_t>() : nullptr, batch, channels, n, m, samples,
             out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_relative_backward(const at::Tensor& grad, const at::Tensor& idx,
                                                                       int64_t n, bool coordinates) {
  check_group_relative_backward(grad, idx, n);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor slopes = grad.contiguous(), of_features = scatter(slopes, idx, {}, n, 3, grad.size(1) - 3);
  if (!coordinates) return {at::empty({0}, grad.options()), at::empty({0}, grad.options()), of_features};
  const at::Tensor of_xyz = scatter(slopes, idx, {}, n, 0, 3), of_centres = slopes.narrow(1, 0, 3).sum(3).neg_();
  return {of_xyz.transpose(1, 2).contiguous(), of_centres.transpose(1, 2).contiguous(), of_features};
}

at::Tensor three_interpolate(const at::Tensor& features, const at::Tensor& idx, const at::Tensor& weight) {
  check_three("three_interpolate", features, idx, weight, features.dim() == 3 ? features.size(2) : 0);
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor values = features.contiguous(), index = idx.contiguous(), weights = weight.contiguous();
  const int64_t batch = values.size(0), channels = values.size(1), m = values.size(2), n = index.size(1);
  at::Tensor out = at::empty({batch, channels, n}, values.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_INDEX(m > 0, "three_interpolate: there is no point to index");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "three_interpolate", [&] {
    using S = at::opmath_type<scalar_t>;
    AT_DISPATCH_INDEX_TYPES(index.scalar_type(), "three_interpolate", [&] {
      launch(interpolate_kernel<scalar_t, S, index_t>, grid(n, channels, batch), kThreads, 0,
             values.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(), weights.const_data_ptr<S>(), batch,
             channels, m, n, out.mutable_data_ptr<scalar_t>());
    });
  });
  return out;
}

at::Tensor three_interpolate_backward(const at::Tensor& grad, const at::Tensor& idx, const at::Tensor& weight,
                                      int64_t m) {
  check_three("three_interpolate_backward", grad, idx, weight, m);
  TORCH_CHECK_VALUE(grad.size(2) == idx.size(1), "three_interpolate_backward: grad must be [B, C, n], got ",
                    grad.sizes());
  return scatter(grad, idx, weight.contiguous(), m, 0, grad.size(1));
}

at::Tensor three_interpolate_weight_backward(const at::Tensor& grad, const at::Tensor& features,
                                             const at::Tensor& idx) {
  check_three_weight(grad, features, idx);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor slopes = grad.contiguous(), values = features.contiguous(), index = idx.contiguous();
  const int64_t batch = slopes.size(0), channels = slopes.size(1), n = slopes.size(2), m = values.size(2);
  at::Tensor out = at::zeros(idx.sizes(), slopes.options().dtype(sum_dtype(slopes)));
  if (slopes.numel() == 0) return out;
  const int blocks = static_cast<int>(std::min<int64_t>((batch * n + kThreads - 1) / kThreads, 1 << 20));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "three_interpolate_weight", [&] {
    using S = at::opmath_type<scalar_t>;
    AT_DISPATCH_INDEX_TYPES(index.scalar_type(), "three_interpolate_weight", [&] {
      launch(weight_kernel<scalar_t, S, index_t>, blocks, kThreads, 0, slopes.const_data_ptr<scalar_t>(),
             values.const_data_ptr<scalar_t>(), index.const_data_ptr<index_t>(), batch, channels, m, n,
             out.mutable_data_ptr<S>());
    });
  });
  return out;
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) {
  m.impl("gather_points", &gather_points);
  m.impl("gather_points_backward", &gather_points_backward);
  m.impl("group_points", &group_points);
  m.impl("group_points_backward", &group_points_backward);
  m.impl("group_relative", &group_relative);
  m.impl("group_relative_backward", &group_relative_backward);
  m.impl("three_interpolate", &three_interpolate);
  m.impl("three_interpolate_backward", &three_interpolate_backward);
  m.impl("three_interpolate_weight_backward", &three_interpolate_weight_backward);
}

}  // namespace pointcmt
