// Batch normalisation, activation and maximum over edges on the GPU, forward and backward.
//
// As on the CPU, gathered rows are never written, the maximum is taken before the normalisation, and
// the normalisation's backward pass is folded into the scatter. A warp holds 32 neighbouring channels
// of one group, so that it reads rows in whole lines. Sums over all rows go through one partial sum per
// block, in double, added up in order. Scattering uses atomics, or, when PyTorch is asked for
// deterministic algorithms, sums along the sorted list of each point's edges.
#include "edges.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <tuple>

#include "cuda.cuh"
#include "grouping.h"
#include "indexed.cuh"

namespace pointcmt {
namespace {

constexpr int kLanes = 32;       // channels of a block
constexpr int kGroups = 8;       // groups of a block at a time
constexpr int kPartials = 1024;  // blocks over all rows where these are summed: fixed, so that results are too

dim3 block() { return dim3(kLanes, kGroups); }

dim3 grid(int64_t channels, int64_t groups, int64_t most = 65535) {
  return dim3(static_cast<unsigned>((channels + kLanes - 1) / kLanes),
              static_cast<unsigned>(std::clamp<int64_t>((groups + kGroups - 1) / kGroups, 1, most)));
}

__device__ __forceinline__ int64_t own_channel() { return static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x; }

// Calls f(group) for this warp's groups.
template <typename F>
__device__ __forceinline__ void for_groups(int64_t groups, const F& f) {
  for (int64_t g = static_cast<int64_t>(blockIdx.y) * kGroups + threadIdx.y; g < groups;
       g += static_cast<int64_t>(gridDim.y) * kGroups) {
    f(g);
  }
}

// One channel of the rows of one group.
template <typename T, Kind KIND>
struct Column {
  const T* base;
  const int32_t* idx;
  int64_t channels, n;
  T centre;

  __device__ __forceinline__ Column(const Rows<T>& rows, int64_t group, int64_t c)
      : idx(nullptr), channels(rows.channels), n(rows.n), centre(T(0)) {
    if constexpr (KIND != Kind::kDense) {
      base = rows.x + group / rows.groups_per_cloud * rows.n * rows.channels + c;
      idx = rows.idx + group * rows.samples;
      centre = rows.centres[group * rows.channels + c];
    } else {
      base = rows.x + group * rows.samples * rows.channels + c;
    }
  }
  __device__ __forceinline__ int64_t point(int64_t s) const { return checked(idx[s], n); }
  __device__ __forceinline__ T operator[](int64_t s) const {
    if constexpr (KIND == Kind::kDense) {
      return base[s * channels];
    } else {
      return base[point(s) * channels] + centre;
    }
  }
};

template <typename T>
__device__ __forceinline__ T activated(T z, T slope) {
  return z > T(0) ? z : z * slope;
}

// partial[blockIdx.y, kind, c] = the block's sum of value over its eight warps.
__device__ __forceinline__ void block_sum(double value, int kind, int64_t c, int64_t channels, double* partial) {
  __shared__ double of_warp[kGroups][kLanes];
  __syncthreads();  // the kind before has been read
  of_warp[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  double sum = 0;
  for (int w = 0; w < kGroups; ++w) sum += of_warp[w][threadIdx.x];
  partial[(static_cast<int64_t>(blockIdx.y) * 2 + kind) * channels + c] = sum;
}

// The sum over all partial sums of a kind, in thread (c, 0) of one block per 32 channels.
__device__ __forceinline__ double whole_sum(const double* partial, int64_t partials, int kind, int64_t c,
                                            int64_t channels) {
  __shared__ double of_warp[kGroups][kLanes];
  double sum = 0;
  if (c < channels) {
    for (int64_t p = threadIdx.y; p < partials; p += kGroups) sum += partial[(p * 2 + kind) * channels + c];
  }
  __syncthreads();
  of_warp[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kGroups; ++w) sum += of_warp[w][threadIdx.x];
  return sum;
}

// The largest row of each group (smallest where weight is negative), the first among equals, and
// the sum of the group's rows where total is given. Where partial is given: sums of all rows' differences
// from the first row and of their squares.
template <typename T, Kind KIND>
__global__ void __launch_bounds__(kLanes* kGroups)
    reduce_kernel(Rows<T> rows, const T* __restrict__ weight, T* __restrict__ chosen, int32_t* __restrict__ which,
                  T* __restrict__ total, double* __restrict__ partial) {
  const int64_t c = own_channel();
  double all = 0, squares = 0;
  if (c < rows.channels) {
    const T origin = Column<T, KIND>(rows, 0, c)[0];
    const T sign = weight[c] < T(0) ? T(-1) : T(1);
    for_groups(rows.groups, [&](int64_t g) {
      const Column<T, KIND> column(rows, g, c);
      T sum = T(0), square = T(0), best = T(0);
      int slot = 0;
#pragma unroll 4
      for (int s = 0; s < static_cast<int>(rows.samples); ++s) {
        const T y = column[s], d = y - origin;
        sum += d;
        square += d * d;
        if (s == 0 || y * sign > best) best = y * sign, slot = s;
      }
      all += static_cast<double>(sum);
      squares += static_cast<double>(square);
      const int64_t at = g * rows.channels + c;
      chosen[at] = best * sign;
      which[at] = slot;
      if (total) total[at] = sum + static_cast<T>(rows.samples) * origin;
    });
  }
  if (partial == nullptr) return;
  block_sum(all, 0, c, rows.channels, partial);
  block_sum(squares, 1, c, rows.channels, partial);
}

// Mean and variance from the sums, where there are any, and y · scale + shift, the normalisation.
template <typename T, Kind KIND>
__global__ void __launch_bounds__(kLanes* kGroups)
    statistics_kernel(Rows<T> rows, const double* __restrict__ partial, int64_t partials, const T* __restrict__ weight,
                      const T* __restrict__ bias, T eps, T* __restrict__ mean, T* __restrict__ var,
                      T* __restrict__ scale, T* __restrict__ shift) {
  const int64_t c = own_channel();
  double sum = 0, squares = 0;
  if (partial) {
    sum = whole_sum(partial, partials, 0, c, rows.channels);
    squares = whole_sum(partial, partials, 1, c, rows.channels);
  }
  if (threadIdx.y != 0 || c >= rows.channels) return;
  if (partial) {
    const double count = static_cast<double>(rows.groups * rows.samples), from_origin = sum / count;
    const double spread = squares / count - from_origin * from_origin;
    mean[c] = static_cast<T>(static_cast<double>(Column<T, KIND>(rows, 0, c)[0]) + from_origin);
    var[c] = static_cast<T>(spread < 0 ? 0 : spread);
  }
  scale[c] = weight[c] / sqrt(var[c] + eps);
  shift[c] = bias[c] - mean[c] * scale[c];
}

// out = act(y · scale + shift) of the chosen rows y [groups, C].
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    normalise_kernel(const T* __restrict__ chosen, int64_t groups, int64_t channels, const T* __restrict__ scale,
                     const T* __restrict__ shift, T slope, T* __restrict__ out) {
  const int64_t c = own_channel();
  if (c >= channels) return;
  const T a = scale[c], b = shift[c];
  for_groups(groups, [&](int64_t g) { out[g * channels + c] = activated(chosen[g * channels + c] * a + b, slope); });
}

// Sums of g', the slope behind the activation, and of g' (y − mean) of the chosen rows; g' · scale to slopes.
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    slope_sums_kernel(const T* __restrict__ chosen, int64_t groups, int64_t channels, const T* __restrict__ grad,
                      const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, T slope,
                      T* __restrict__ slopes, double* __restrict__ partial) {
  const int64_t c = own_channel();
  double all = 0, moments = 0;
  if (c < channels) {
    const T a = scale[c], b = shift[c], m = mean[c];
    for_groups(groups, [&](int64_t g) {
      const int64_t at = g * channels + c;
      const T y = chosen[at], behind = y * a + b > T(0) ? grad[at] : grad[at] * slope;
      all += static_cast<double>(behind);
      moments += static_cast<double>(behind * (y - m));
      slopes[at] = behind * a;
    });
  }
  block_sum(all, 0, c, channels, partial);
  block_sum(moments, 1, c, channels, partial);
}

// The gradients of weight and bias, and the normalisation's share in every row's slope: k0 + k1 · y.
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    shares_kernel(const double* __restrict__ partial, int64_t partials, int64_t channels, const T* __restrict__ scale,
                  const T* __restrict__ mean, const T* __restrict__ var, T eps, double count, bool training,
                  T* __restrict__ k0, T* __restrict__ k1, T* __restrict__ grad_weight, T* __restrict__ grad_bias) {
  const int64_t c = own_channel();
  const double sum = whole_sum(partial, partials, 0, c, channels);
  const double moment = whole_sum(partial, partials, 1, c, channels);
  if (threadIdx.y != 0 || c >= channels) return;
  const double a = static_cast<double>(scale[c]), spread = static_cast<double>(var[c]) + static_cast<double>(eps);
  const double factor = training ? -a * moment / spread / count : 0.0;
  k1[c] = static_cast<T>(factor);
  k0[c] = training ? static_cast<T>(-a * sum / count - factor * static_cast<double>(mean[c])) : T(0);
  grad_weight[c] = static_cast<T>(moment / sqrt(spread));
  grad_bias[c] = static_cast<T>(sum);
}

// A row's slope: the normalisation's share k0 + k1 · y, and the chosen rows' own.
template <typename T>
struct Slopes {
  const T* chosen;       // the chosen rows' own slopes [groups, C]
  const int32_t* which;  // and which row of its group each is
  const T *k0, *k1;
  int64_t samples;

  __device__ __forceinline__ int64_t slot(int64_t group) const { return checked(which[group], samples); }
  // of sample s of the group; group: where its choice is
  __device__ __forceinline__ T operator()(T share, int s, int64_t group) const {
    return slot(group) == s ? share + chosen[group] : share;
  }
};

// Of every dense row, to grad_x.
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    dense_backward_kernel(Rows<T> rows, Slopes<T> slopes, T* __restrict__ grad_x) {
  const int64_t c = own_channel();
  if (c >= rows.channels) return;
  const T base = slopes.k0[c], factor = slopes.k1[c];
  for_groups(rows.groups, [&](int64_t g) {
    const int64_t first = g * rows.samples * rows.channels + c, group = g * rows.channels + c;
#pragma unroll 4
    for (int s = 0; s < static_cast<int>(rows.samples); ++s) {
      const int64_t row = first + s * rows.channels;
      grad_x[row] = slopes(base + factor * rows.x[row], s, group);
    }
  });
}

// Of every gathered row: their sums to grad_centres and, where it is given, added to grad_points.
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    gathered_backward_kernel(Rows<T> rows, Slopes<T> slopes, bool training, T* __restrict__ grad_points,
                             T* __restrict__ grad_centres) {
  const int64_t c = own_channel();
  if (c >= rows.channels) return;
  const T base = slopes.k0[c], factor = slopes.k1[c];
  for_groups(rows.groups, [&](int64_t g) {
    const Column<T, Kind::kGathered> column(rows, g, c);
    const int64_t group = g * rows.channels + c;
    T* target = grad_points ? grad_points + g / rows.groups_per_cloud * rows.n * rows.channels + c : nullptr;
    if (!training) {  // nothing but the chosen row's own slope
      const T own = slopes.chosen[group];
      if (target) gpuAtomicAddNoReturn(target + column.point(slopes.slot(group)) * rows.channels, own);
      grad_centres[group] = own;
      return;
    }
    T sum = T(0);
#pragma unroll 4
    for (int s = 0; s < static_cast<int>(rows.samples); ++s) {
      const T of_row = slopes(base + factor * column[s], s, group);
      if (target) gpuAtomicAddNoReturn(target + column.point(s) * rows.channels, of_row);
      sum += of_row;
    }
    grad_centres[group] = sum;
  });
}

// grad_points without atomics: each point adds up its edges, order[start[p] … start[p + 1]), in their order.
template <typename T>
__global__ void __launch_bounds__(kLanes* kGroups)
    segment_kernel(Rows<T> rows, Slopes<T> slopes, const int64_t* __restrict__ order,
                   const int64_t* __restrict__ start, int64_t points, T* __restrict__ grad_points) {
  const int64_t c = own_channel();
  if (c >= rows.channels) return;
  const T base = slopes.k0[c], factor = slopes.k1[c];
  for_groups(points, [&](int64_t p) {
    const T x = rows.x[p * rows.channels + c];
    T sum = T(0);
    for (int64_t at = start[p]; at < start[p + 1]; ++at) {
      const int64_t edge = order[at], group = edge / rows.samples * rows.channels + c;
      sum += slopes(base + factor * (x + rows.centres[group]), static_cast<int>(edge % rows.samples), group);
    }
    grad_points[p * rows.channels + c] = sum;
  });
}

// ------------------------------------------------------------------------------------ the operators

// Calls f with the rows' kind, as a type.
template <typename T, typename F>
void specialise(const Rows<T>& rows, const F& f) {
  if (rows.idx) {
    f(std::integral_constant<Kind, Kind::kGathered>{});
  } else {
    f(std::integral_constant<Kind, Kind::kDense>{});
  }
}

at::Tensor partial_sums(const at::Tensor& x, int64_t partials) {
  return at::empty({partials, 2, x.size(-1)}, x.options().dtype(at::kDouble));
}

// mean, var, scale and shift [4, C]: the first two from partial where it is defined, else as given.
template <typename T>
at::Tensor normalisation(const Rows<T>& rows, const at::Tensor& partial, const at::Tensor& weight,
                         const at::Tensor& bias, const OptionalTensor& mean, const OptionalTensor& var, double eps) {
  const at::Tensor out = at::empty({4, rows.channels}, weight.options());
  if (!partial.defined()) {
    out.select(0, 0).copy_(*mean);
    out.select(0, 1).copy_(*var);
  }
  const at::Tensor w = weight.contiguous(), b = bias.contiguous();
  T* to = out.mutable_data_ptr<T>();
  specialise(rows, [&](auto kind) {
    launch(statistics_kernel<T, kind.value>, grid(rows.channels, 1), block(), 0, rows,
           partial.defined() ? partial.const_data_ptr<double>() : nullptr, partial.defined() ? partial.size(0) : 0,
           w.const_data_ptr<T>(), b.const_data_ptr<T>(), static_cast<T>(eps), to, to + rows.channels,
           to + 2 * rows.channels, to + 3 * rows.channels);
  });
  return out;
}

// k0 and k1 [2, C], and the gradients of weight and bias, [2, C].
template <typename T>
std::tuple<at::Tensor, at::Tensor> shares(const at::Tensor& partial, const at::Tensor& affine, double eps,
                                          int64_t count, bool training) {
  const int64_t channels = affine.size(1);
  const at::Tensor share = at::empty({2, channels}, affine.options()), of_affine = at::empty_like(share);
  const T* from = affine.const_data_ptr<T>();
  T *k = share.mutable_data_ptr<T>(), *out = of_affine.mutable_data_ptr<T>();
  launch(shares_kernel<T>, grid(channels, 1), block(), 0, partial.const_data_ptr<double>(), partial.size(0), channels,
         from + 2 * channels, from, from + channels, static_cast<T>(eps), static_cast<double>(count), training, k,
         k + channels, out, out + channels);
  return {share, of_affine};
}

template <typename T>
void backward(const Inputs& in, const Rows<T>& rows, const Slopes<T>& slopes, bool training, at::Tensor& grad_x,
              at::Tensor& grad_centres) {
  const dim3 all = grid(rows.channels, rows.groups);
  if (!rows.idx) {
    grad_x = at::empty(in.x.sizes(), in.x.options());
    launch(dense_backward_kernel<T>, all, block(), 0, rows, slopes, grad_x.mutable_data_ptr<T>());
    return;
  }
  grad_centres = at::empty(in.centres.sizes(), in.x.options());
  const bool ordered = at::globalContext().deterministicAlgorithms();
  grad_x = ordered ? at::empty(in.x.sizes(), in.x.options()) : at::zeros(in.x.sizes(), in.x.options());
  T* const target = grad_x.mutable_data_ptr<T>();
  launch(gathered_backward_kernel<T>, all, block(), 0, rows, slopes, training, ordered ? nullptr : target,
         grad_centres.mutable_data_ptr<T>());
  if (!ordered) return;
  const int64_t batch = in.x.size(0), points = batch * rows.n;
  const std::tuple<at::Tensor, at::Tensor> sorted = edges_by_point(in.idx, batch, rows.n);
  launch(segment_kernel<T>, grid(rows.channels, points), block(), 0, rows, slopes,
         std::get<0>(sorted).template const_data_ptr<int64_t>(), std::get<1>(sorted).template const_data_ptr<int64_t>(),
         points, target);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_max(
    const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
    const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double eps, double slope) {
  const Inputs in("norm_act_max", x, centres, idx, weight, bias, running_mean, running_var);
  const c10::cuda::CUDAGuard guard(x.device());
  const bool training = !running_mean;
  at::Tensor out = at::empty(in.shape, x.options()), chosen = at::empty_like(out), affine;
  at::Tensor which = at::empty(in.shape, x.options().dtype(at::kInt));
  at::Tensor total = training && in.idx.defined() ? at::empty_like(chosen) : at::empty({0}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_act_max", [&] {
    const auto rows = in.rows<scalar_t>();
    const dim3 blocks = grid(rows.channels, rows.groups, training ? kPartials : 65535);
    const at::Tensor partial = training ? partial_sums(x, blocks.y) : at::Tensor(), w = weight.contiguous();
    specialise(rows, [&](auto kind) {
      launch(reduce_kernel<scalar_t, kind.value>, blocks, block(), 0, rows, w.const_data_ptr<scalar_t>(),
             chosen.mutable_data_ptr<scalar_t>(), which.mutable_data_ptr<int32_t>(),
             total.numel() ? total.mutable_data_ptr<scalar_t>() : nullptr,
             training ? partial.mutable_data_ptr<double>() : nullptr);
    });
    affine = normalisation(rows, partial, weight, bias, running_mean, running_var, eps);
    const scalar_t* scale = affine.const_data_ptr<scalar_t>() + 2 * rows.channels;
    launch(normalise_kernel<scalar_t>, grid(rows.channels, rows.groups), block(), 0,
           chosen.const_data_ptr<scalar_t>(), rows.groups, rows.channels, scale, scale + rows.channels,
           static_cast<scalar_t>(slope), out.mutable_data_ptr<scalar_t>());
  });
  return {out, chosen, which, total, affine.select(0, 0).clone(), affine.select(0, 1).clone()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_max_backward(
    const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
    const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& chosen_,
    const at::Tensor& which_, const at::Tensor& total_, const at::Tensor& mean, const at::Tensor& var, double eps,
    double slope, bool training) {
  const Inputs in("norm_act_max_backward", x, centres, idx, weight, bias, mean, var);
  const c10::cuda::CUDAGuard guard(x.device());
  in.check_backward("norm_act_max_backward", grad, chosen_, which_, total_, training);
  const at::Tensor chosen = chosen_.contiguous(), which = which_.contiguous();
  const at::Tensor in_grad = grad.contiguous();
  at::Tensor grad_x, grad_centres = at::empty({0}, x.options());
  at::Tensor own = at::empty_like(chosen), of_affine;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_act_max_backward", [&] {
    const auto rows = in.rows<scalar_t>();
    const at::Tensor affine = normalisation(rows, {}, weight, bias, mean, var, eps);
    const scalar_t *centre = affine.const_data_ptr<scalar_t>(), *scale = centre + 2 * rows.channels;
    const dim3 blocks = grid(rows.channels, rows.groups, kPartials);
    const at::Tensor partial = partial_sums(x, blocks.y);
    launch(slope_sums_kernel<scalar_t>, blocks, block(), 0, chosen.const_data_ptr<scalar_t>(), rows.groups,
           rows.channels, in_grad.const_data_ptr<scalar_t>(), scale, scale + rows.channels, centre,
           static_cast<scalar_t>(slope), own.mutable_data_ptr<scalar_t>(), partial.mutable_data_ptr<double>());
    const std::tuple<at::Tensor, at::Tensor> both =
        shares<scalar_t>(partial, affine, eps, rows.groups * rows.samples, training);
    of_affine = std::get<1>(both);
    const scalar_t* k0 = std::get<0>(both).template const_data_ptr<scalar_t>();
    const Slopes<scalar_t> slopes{own.const_data_ptr<scalar_t>(), which.const_data_ptr<int32_t>(), k0,
                                  k0 + rows.channels, rows.samples};
    backward(in, rows, slopes, training, grad_x, grad_centres);
  });
  return {grad_x, grad_centres, of_affine.select(0, 0).clone(), of_affine.select(0, 1).clone()};
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) {
  m.impl("norm_act_max", &norm_act_max);
  m.impl("norm_act_max_backward", &norm_act_max_backward);
}

}  // namespace pointcmt
