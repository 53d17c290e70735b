// Gather, group and interpolate on the CPU, forward and backward. A task is a few channels of one
// cloud, so that scattering needs no atomics and its order, hence its result, is always the same.
#include "grouping.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <type_traits>
#include <vector>

namespace pointcmt {
namespace {

using namespace simd;

constexpr int64_t kChannels = 8;  // read an index once for so many channels; their rows fit in the cache

// Indices as contiguous int32, checked to be in [0, n).
at::Tensor checked_index(const char* op, const at::Tensor& idx, int64_t n) {
  const at::Tensor source = idx.contiguous();
  at::Tensor out = source.scalar_type() == at::kInt ? source : at::empty(source.sizes(), source.options().dtype(at::kInt));
  std::atomic<int64_t> wrong{-1};
  AT_DISPATCH_INDEX_TYPES(source.scalar_type(), "checked_index", [&] {
    const index_t* from = source.const_data_ptr<index_t>();
    int32_t* to = out.mutable_data_ptr<int32_t>();
    at::parallel_for(0, source.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      using Unsigned = std::make_unsigned_t<index_t>;
      Unsigned highest = 0;
      for (int64_t i = begin; i < end; ++i) {
        highest = std::max(highest, static_cast<Unsigned>(from[i]));  // a negative one is huge here
        to[i] = static_cast<int32_t>(from[i]);
      }
      if (highest < static_cast<Unsigned>(n)) return;
      for (int64_t i = begin; i < end; ++i) {
        if (from[i] < 0 || from[i] >= n) wrong = i;
      }
    });
    if (wrong >= 0) {
      TORCH_CHECK_INDEX(false, op, ": index ", from[wrong.load()], " is out of range for ", n, " points");
    }
  });
  return out;
}

// f(batch, first channel, number of channels) for all channels of all clouds, in parallel.
template <typename F>
void for_channels(int64_t batch, int64_t channels, int64_t work, const F& f) {
  const int64_t groups = (channels + kChannels - 1) / kChannels;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, work * kChannels));
  at::parallel_for(0, batch * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % groups * kChannels;
      f(task / groups, first, std::min(kChannels, channels - first));
    }
  });
}

// Eight rows [8, n] as columns [n, 8], or back.
void turn(const float* in, int64_t n, bool back, float* out) {
  Vec<float> r[8];
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    for (int c = 0; c < 8; ++c) r[c] = load(back ? in + (j + c) * 8 : in + c * n + j);
    transpose(r);
    for (int c = 0; c < 8; ++c) store(back ? out + c * n + j : out + (j + c) * 8, r[c]);
  }
  for (; j < n; ++j) {
    for (int c = 0; c < 8; ++c) (back ? out[c * n + j] : out[j * 8 + c]) = back ? in[j * 8 + c] : in[c * n + j];
  }
}

// What a cache line holds of a row of floats: read or written at a time, so that rows whose addresses
// fall on one set of the cache do not drive each other out half-used.
constexpr int64_t kLine = 16;

// out[c, e] = in[c, at[e]] for eight channels: a point's eight are one vector.
void gather_eight(const float* in, const int32_t* at, int64_t n, int64_t edges, float* out) {
  std::vector<float> columns(n * 8);
  turn(in, n, false, columns.data());
  int64_t e = 0;
  for (; e + kLine <= edges; e += kLine) {
    Vec<float> r[2][8];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) r[half][i] = load(columns.data() + 8 * static_cast<int64_t>(at[e + 8 * half + i]));
      transpose(r[half]);
    }
    for (int c = 0; c < 8; ++c) {
      store(out + c * edges + e, r[0][c]);
      store(out + c * edges + e + 8, r[1][c]);
    }
  }
  for (; e < edges; ++e) {
    for (int c = 0; c < 8; ++c) out[c * edges + e] = columns[8 * static_cast<int64_t>(at[e]) + c];
  }
}

// sum[c, at[e]] += in[c, e] for eight channels, from 0, in the order of e.
void scatter_eight(const float* in, const int32_t* at, int64_t n, int64_t edges, float* sum) {
  std::vector<float> columns(n * 8, 0.0f);
  int64_t e = 0;
  for (; e + kLine <= edges; e += kLine) {
    Vec<float> r[2][8];
    for (int c = 0; c < 8; ++c) {
      r[0][c] = load(in + c * edges + e);
      r[1][c] = load(in + c * edges + e + 8);
    }
    for (int half = 0; half < 2; ++half) {
      transpose(r[half]);
      for (int i = 0; i < 8; ++i) {
        float* column = columns.data() + 8 * static_cast<int64_t>(at[e + 8 * half + i]);
        store(column, load(column) + r[half][i]);
      }
    }
  }
  for (; e < edges; ++e) {
    for (int c = 0; c < 8; ++c) columns[8 * static_cast<int64_t>(at[e]) + c] += in[c * edges + e];
  }
  turn(columns.data(), n, true, sum);
}

// out[c, e] = in[c, at[e]] for count channels.
template <typename T>
void gather_rows(const T* in, const int32_t* at, int64_t count, int64_t n, int64_t edges, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == 8 && edges >= n) return gather_eight(in, at, n, edges, out);
  }
  int64_t c = 0;
  for (; c + 4 <= count; c += 4, in += 4 * n, out += 4 * edges) {
    for (int64_t e = 0; e < edges; ++e) {
      const int64_t j = at[e];
      out[e] = in[j];
      out[edges + e] = in[n + j];
      out[2 * edges + e] = in[2 * n + j];
      out[3 * edges + e] = in[3 * n + j];
    }
  }
  for (; c < count; ++c, in += n, out += edges)
    for (int64_t e = 0; e < edges; ++e) out[e] = in[at[e]];
}

// sum[c, at[e]] += in[c, e] for count channels, from 0, in the order of e.
template <typename T, typename S>
void scatter_rows(const T* in, const int32_t* at, int64_t count, int64_t n, int64_t edges, S* sum) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == 8 && edges >= n) return scatter_eight(in, at, n, edges, sum);
  }
  std::fill_n(sum, count * n, S(0));
  int64_t c = 0;
  for (; c + 4 <= count; c += 4, in += 4 * edges, sum += 4 * n) {
    for (int64_t e = 0; e < edges; ++e) {
      const int64_t j = at[e];
      sum[j] += in[e];
      sum[n + j] += in[edges + e];
      sum[2 * n + j] += in[2 * edges + e];
      sum[3 * n + j] += in[3 * edges + e];
    }
  }
  for (; c < count; ++c, in += edges, sum += n)
    for (int64_t e = 0; e < edges; ++e) sum[at[e]] += in[e];
}

// To the channels of out [B, C', edges…] from `first` on.
template <typename T>
void gather_all(const at::Tensor& values, const at::Tensor& index, int64_t edges, at::Tensor& out, int64_t first = 0) {
  const int64_t batch = values.size(0), channels = values.size(1), n = values.size(2), wide = out.size(1);
  const T* in = values.const_data_ptr<T>();
  const int32_t* at = index.const_data_ptr<int32_t>();
  T* target = out.mutable_data_ptr<T>();
  for_channels(batch, channels, edges, [&](int64_t b, int64_t c, int64_t count) {
    gather_rows(in + (b * channels + c) * n, at + b * edges, count, n, edges, target + (b * wide + first + c) * edges);
  });
}

// From the channels of slopes [B, C', edges…] from `first` on, as many as out has.
template <typename T>
void scatter_all(const at::Tensor& slopes, const at::Tensor& index, int64_t edges, at::Tensor& out, int64_t first = 0) {
  using S = at::opmath_type<T>;
  const int64_t batch = out.size(0), channels = out.size(1), n = out.size(2), wide = slopes.size(1);
  const T* in = slopes.const_data_ptr<T>();
  const int32_t* at = index.const_data_ptr<int32_t>();
  T* target = out.mutable_data_ptr<T>();
  for_channels(batch, channels, edges, [&](int64_t b, int64_t c, int64_t count) {
    const T* from = in + (b * wide + first + c) * edges;
    const int64_t row = b * channels + c;
    if constexpr (std::is_same_v<S, T>) {
      scatter_rows(from, at + b * edges, count, n, edges, target + row * n);
    } else {  // half precision: summed in float32, rounded once
      std::vector<S> sum(count * n);
      scatter_rows(from, at + b * edges, count, n, edges, sum.data());
      std::copy(sum.begin(), sum.end(), target + row * n);
    }
  });
}

at::Tensor gather(const char* op, const at::Tensor& features, const at::Tensor& idx) {
  const at::Tensor values = features.contiguous(), index = checked_index(op, idx, values.size(2));
  std::vector<int64_t> shape{values.size(0), values.size(1)};
  for (int64_t d = 1; d < idx.dim(); ++d) shape.push_back(idx.size(d));
  at::Tensor out = at::empty(shape, values.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "gather_points", [&] {
    gather_all<scalar_t>(values, index, index.numel() / values.size(0), out);
  });
  return out;
}

at::Tensor gather_backward(const char* op, const at::Tensor& grad, const at::Tensor& idx, int64_t n) {
  const at::Tensor slopes = grad.contiguous(), index = checked_index(op, idx, n);
  at::Tensor out = at::empty({slopes.size(0), slopes.size(1), n}, slopes.options());
  if (slopes.numel() == 0 || n == 0) return out.zero_();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "gather_points_backward", [&] {
    scatter_all<scalar_t>(slopes, index, index.numel() / slopes.size(0), out);
  });
  return out;
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
  return gather_backward("gather_points_backward", grad, idx, n);
}

at::Tensor group_points_backward(const at::Tensor& grad, const at::Tensor& idx, int64_t n) {
  check_gather_backward("group_points_backward", grad, idx, n, 3);
  return gather_backward("group_points_backward", grad, idx, n);
}

// Coordinates relative to their centre, then the features: out [B, 3 + C, M, S].
at::Tensor group_relative(const at::Tensor& xyz, const at::Tensor& new_xyz, const at::Tensor& idx,
                          const OptionalTensor& features) {
  check_group_relative(xyz, new_xyz, idx, features);
  const int64_t batch = xyz.size(0), n = xyz.size(1), m = idx.size(1), samples = idx.size(2), edges = m * samples;
  const int64_t channels = features ? features->size(1) : 0;
  const at::Tensor index = checked_index("group_relative", idx, n);
  at::Tensor out = at::empty({batch, 3 + channels, m, samples}, xyz.options());
  if (out.numel() == 0) return out;
  const at::Tensor points = xyz.contiguous(), centres = new_xyz.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xyz.scalar_type(), "group_relative", [&] {
    if (features) gather_all<scalar_t>(features->contiguous(), index, edges, out, 3);
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* cloud = points.const_data_ptr<scalar_t>() + b * n * 3;
        const scalar_t* centre = centres.const_data_ptr<scalar_t>() + b * m * 3;
        const int32_t* at = index.const_data_ptr<int32_t>() + b * edges;
        scalar_t* target = out.mutable_data_ptr<scalar_t>() + b * (3 + channels) * edges;
        for (int64_t g = 0; g < m; ++g) {
          const scalar_t x = centre[3 * g], y = centre[3 * g + 1], z = centre[3 * g + 2];
          for (int64_t e = g * samples; e < (g + 1) * samples; ++e) {
            const scalar_t* point = cloud + 3 * static_cast<int64_t>(at[e]);
            target[e] = point[0] - x;
            target[edges + e] = point[1] - y;
            target[2 * edges + e] = point[2] - z;
          }
        }
      }
    });
  });
  return out;
}

// The gradients of xyz [B, n, 3], new_xyz [B, M, 3] and features [B, C, n]; the first two empty unless wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_relative_backward(const at::Tensor& grad, const at::Tensor& idx,
                                                                       int64_t n, bool coordinates) {
  check_group_relative_backward(grad, idx, n);
  const at::Tensor slopes = grad.contiguous(), index = checked_index("group_relative_backward", idx, n);
  const int64_t batch = grad.size(0), channels = grad.size(1) - 3, edges = idx.size(1) * idx.size(2);
  const bool some = slopes.numel() > 0 && n > 0;
  const auto empty = [&](int64_t c) {
    return some ? at::empty({batch, c, n}, grad.options()) : at::zeros({batch, c, n}, grad.options());
  };
  at::Tensor of_features = empty(channels), of_xyz = coordinates ? empty(3) : at::empty({0}, grad.options());
  if (some) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "group_relative_backward", [&] {
      scatter_all<scalar_t>(slopes, index, edges, of_features, 3);
      if (coordinates) scatter_all<scalar_t>(slopes, index, edges, of_xyz);
    });
  }
  if (!coordinates) return {of_xyz, at::empty({0}, grad.options()), of_features};
  const at::Tensor of_centres = slopes.narrow(1, 0, 3).sum(3).neg_();
  return {of_xyz.transpose(1, 2).contiguous(), of_centres.transpose(1, 2).contiguous(), of_features};
}

template <typename T>
void interpolate_all(const at::Tensor& values, const at::Tensor& index, const at::Tensor& weights, at::Tensor& out) {
  using S = at::opmath_type<T>;
  const int64_t batch = values.size(0), channels = values.size(1), m = values.size(2), n = out.size(2);
  const T* in = values.const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  for_channels(batch, channels, n * 3, [&](int64_t b, int64_t first, int64_t count) {
    const int32_t* at = index.const_data_ptr<int32_t>() + b * n * 3;
    const S* by = weights.const_data_ptr<S>() + b * n * 3;
    for (int64_t e = 0; e < n; ++e, at += 3, by += 3) {
      for (int64_t c = first; c < first + count; ++c) {
        const T* row = in + (b * channels + c) * m;
        const S sum = static_cast<S>(row[at[0]]) * by[0] + static_cast<S>(row[at[1]]) * by[1] +
                      static_cast<S>(row[at[2]]) * by[2];
        target[(b * channels + c) * n + e] = static_cast<T>(sum);
      }
    }
  });
}

template <typename T>
void interpolate_backward_all(const at::Tensor& slopes, const at::Tensor& index, const at::Tensor& weights,
                              at::Tensor& out) {
  using S = at::opmath_type<T>;
  const int64_t batch = slopes.size(0), channels = slopes.size(1), n = slopes.size(2), m = out.size(2);
  const T* in = slopes.const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  for_channels(batch, channels, n * 3 + m, [&](int64_t b, int64_t first, int64_t count) {
    const int32_t* at = index.const_data_ptr<int32_t>() + b * n * 3;
    const S* by = weights.const_data_ptr<S>() + b * n * 3;
    std::vector<S> sum(count * m, S(0));
    for (int64_t e = 0; e < n; ++e, at += 3, by += 3) {
      for (int64_t c = 0; c < count; ++c) {
        const S slope = in[(b * channels + first + c) * n + e];
        for (int64_t j = 0; j < 3; ++j) sum[c * m + at[j]] += slope * by[j];
      }
    }
    std::copy(sum.begin(), sum.end(), target + (b * channels + first) * m);
  });
}

template <typename T>
void weight_backward_all(const at::Tensor& slopes, const at::Tensor& values, const at::Tensor& index,
                         at::Tensor& out) {
  using S = at::opmath_type<T>;
  const int64_t batch = slopes.size(0), channels = slopes.size(1), n = slopes.size(2), m = values.size(2);
  const int64_t block = 256, blocks = (n + block - 1) / block;
  const T *slope = slopes.const_data_ptr<T>(), *value = values.const_data_ptr<T>();
  const int32_t* at = index.const_data_ptr<int32_t>();
  S* target = out.mutable_data_ptr<S>();
  at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, from = task % blocks * block, to = std::min(n, from + block);
      for (int64_t row = b * channels; row < (b + 1) * channels; ++row) {
        for (int64_t e = from; e < to; ++e) {
          for (int64_t j = 3 * (b * n + e); j < 3 * (b * n + e) + 3; ++j) {
            target[j] += static_cast<S>(slope[row * n + e]) * static_cast<S>(value[row * m + at[j]]);
          }
        }
      }
    }
  });
}

at::Tensor three_interpolate(const at::Tensor& features, const at::Tensor& idx, const at::Tensor& weight) {
  check_three("three_interpolate", features, idx, weight, features.dim() == 3 ? features.size(2) : 0);
  const at::Tensor values = features.contiguous(), weights = weight.contiguous();
  const at::Tensor index = checked_index("three_interpolate", idx, values.size(2));
  at::Tensor out = at::empty({values.size(0), values.size(1), idx.size(1)}, values.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "three_interpolate",
                                  [&] { interpolate_all<scalar_t>(values, index, weights, out); });
  return out;
}

at::Tensor three_interpolate_backward(const at::Tensor& grad, const at::Tensor& idx, const at::Tensor& weight,
                                      int64_t m) {
  check_three("three_interpolate_backward", grad, idx, weight, m);
  TORCH_CHECK_VALUE(grad.size(2) == idx.size(1), "three_interpolate_backward: grad must be [B, C, n], got ",
                    grad.sizes());
  const at::Tensor slopes = grad.contiguous(), weights = weight.contiguous();
  const at::Tensor index = checked_index("three_interpolate_backward", idx, m);
  at::Tensor out = at::empty({slopes.size(0), slopes.size(1), m}, slopes.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "three_interpolate_backward",
                                  [&] { interpolate_backward_all<scalar_t>(slopes, index, weights, out); });
  return out;
}

at::Tensor three_interpolate_weight_backward(const at::Tensor& grad, const at::Tensor& features,
                                             const at::Tensor& idx) {
  check_three_weight(grad, features, idx);
  const at::Tensor slopes = grad.contiguous(), values = features.contiguous();
  const at::Tensor index = checked_index("three_interpolate_weight_backward", idx, values.size(2));
  at::Tensor out = at::zeros(idx.sizes(), slopes.options().dtype(sum_dtype(slopes)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, slopes.scalar_type(), "three_interpolate_weight_backward",
                                  [&] { weight_backward_all<scalar_t>(slopes, values, index, out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) {
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
