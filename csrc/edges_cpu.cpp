// Batch normalisation, activation and maximum over edges on the CPU, forward and backward.
//
// A network over neighbours spends its time moving edges through memory: gather, normalise, activate,
// reduce, each a pass over N·S rows. Here a pass that can be saved is: gathered rows are never
// written, the maximum is taken before the normalisation (which is monotone in every channel), and
// the backward pass of the normalisation, an affine function of each row, is folded into the scatter.
#include "edges.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "grouping.h"
#include "simd.h"

namespace pointcmt {
namespace {

using namespace simd;

constexpr int64_t kBlocks = 64;  // of partial sums: fixed, so that results do not depend on the threads

// Reads the NV vectors of sample s of a group, from one channel on.
template <typename T, Kind KIND, int NV>
struct Reader {
  const T* base;
  const int32_t* idx;
  int64_t channels;
  Vec<T> centre[NV];

  Reader(const Rows<T>& rows, int64_t group, int64_t c) : channels(rows.channels) {
    if constexpr (KIND != Kind::kDense) {
      base = rows.cloud(group) + c;
      idx = rows.idx + group * rows.samples;
      for (int v = 0; v < NV; ++v) centre[v] = load(rows.centres + group * channels + c + v * width<T>);
    } else {
      base = rows.x + group * rows.samples * channels + c;
      idx = nullptr;
    }
  }
  inline void read(int64_t s, Vec<T> (&y)[NV]) const {
    if constexpr (KIND != Kind::kDense) {
      const T* from = base + idx[s] * channels;
      for (int v = 0; v < NV; ++v) y[v] = load(from + v * width<T>) + centre[v];
    } else {
      const T* from = base + s * channels;
      for (int v = 0; v < NV; ++v) y[v] = load(from + v * width<T>);
    }
  }
};

// f.template operator()<KIND, NV>() for the rows at hand: pairs of vectors where channels allow.
template <typename T, typename F>
void specialise(const Rows<T>& rows, const F& f) {
  const bool pairs = rows.channels % (2 * width<T>) == 0;
  if (rows.idx) {
    pairs ? f.template operator()<Kind::kGathered, 2>() : f.template operator()<Kind::kGathered, 1>();
  } else {
    pairs ? f.template operator()<Kind::kDense, 2>() : f.template operator()<Kind::kDense, 1>();
  }
}

// Partial sums of two vectors of channels per block of groups, in double, added up in order.
template <typename T, typename F>
std::vector<double> block_sums(const Rows<T>& rows, const F& f) {
  const int64_t size = 2 * rows.channels, per_block = (rows.groups + kBlocks - 1) / kBlocks;
  std::vector<double> partial(kBlocks * size, 0.0);
  at::parallel_for(0, kBlocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = std::min(block * per_block, rows.groups), last = std::min(first + per_block, rows.groups);
      f(first, last, partial.data() + block * size);
    }
  });
  std::vector<double> total(size, 0.0);
  for (int64_t block = 0; block < kBlocks; ++block)
    for (int64_t i = 0; i < size; ++i) total[i] += partial[block * size + i];
  return total;
}

template <typename T, int NV>
inline void add_to(double* sum, const Vec<T> (&v)[NV]) {
  for (int k = 0; k < NV; ++k)
    for (int64_t l = 0; l < width<T>; ++l) sum[k * width<T> + l] += static_cast<double>(v[k][l]);
}

// Sums are taken of differences from the first row, so that a mean far from zero costs no digits.
template <typename T>
std::vector<T> first_row(const Rows<T>& rows) {
  std::vector<T> out(rows.channels);
  for (int64_t c = 0; c < rows.channels; ++c) {
    out[c] = rows.idx ? rows.x[rows.idx[0] * rows.channels + c] + rows.centres[c] : rows.x[c];
  }
  return out;
}

template <typename T>
void finish_statistics(const std::vector<double>& sums, const std::vector<T>& origin, int64_t count, T* mean, T* var) {
  const int64_t channels = static_cast<int64_t>(origin.size());
  for (int64_t c = 0; c < channels; ++c) {
    const double shift = sums[c] / static_cast<double>(count);
    mean[c] = static_cast<T>(static_cast<double>(origin[c]) + shift);
    const double v = sums[channels + c] / static_cast<double>(count) - shift * shift;
    var[c] = static_cast<T>(v < 0 ? 0 : v);
  }
}

// The largest (smallest where sign is negative) row of each group, by channel; the first among equals.
template <typename T>
void select_rows(const Rows<T>& rows, const T* sign, bool with_statistics, T* chosen, int32_t* which, T* total, T* mean,
                 T* var) {
  const std::vector<T> origin = first_row(rows);
  std::vector<double> sums;
  specialise(rows, [&]<Kind KIND, int NV>() {
    sums = block_sums(rows, [&](int64_t first, int64_t last, double* out) {
      for (int64_t g = first; g < last; ++g) {
        for (int64_t c = 0; c < rows.channels; c += NV * width<T>) {
          const Reader<T, KIND, NV> reader(rows, g, c);
          Vec<T> sum[NV] = {}, square[NV] = {}, y[NV], best[NV], shift[NV], direction[NV];
          Mask<T> slot[NV] = {};
          reader.read(0, y);
          for (int v = 0; v < NV; ++v) {
            shift[v] = load(origin.data() + c + v * width<T>);
            direction[v] = load(sign + c + v * width<T>);
            best[v] = y[v] * direction[v];
            const Vec<T> d = y[v] - shift[v];
            sum[v] = d;
            square[v] = d * d;
          }
          for (int64_t s = 1; s < rows.samples; ++s) {
            reader.read(s, y);
            const Mask<T> here = Mask<T>{} + static_cast<typename Types<T>::Int>(s);
            for (int v = 0; v < NV; ++v) {
              const Vec<T> key = y[v] * direction[v], d = y[v] - shift[v];
              const Mask<T> better = key > best[v];
              best[v] = better ? key : best[v];
              slot[v] = better ? here : slot[v];
              sum[v] += d;
              square[v] = fma(d, d, square[v]);
            }
          }
          for (int v = 0; v < NV; ++v) {
            const int64_t at = g * rows.channels + c + v * width<T>;
            store(chosen + at, best[v] * direction[v]);
            for (int64_t l = 0; l < width<T>; ++l) which[at + l] = static_cast<int32_t>(slot[v][l]);
            if (total) store(total + at, sum[v] + static_cast<T>(rows.samples) * shift[v]);
          }
          if (with_statistics) {
            add_to<T, NV>(out + c, sum);
            add_to<T, NV>(out + rows.channels + c, square);
          }
        }
      }
    });
  });
  if (with_statistics) finish_statistics(sums, origin, rows.count(), mean, var);
}

// Gathered rows: f(group, first, size, sum) adds the group's gradients to sum [n, size], the
// part of one cloud's points that belongs to channels first … first + size. A task is such a part.
constexpr int64_t kScatterBytes = 192 << 10;  // what sum may take of the L2 cache

template <typename T, typename F>
void scatter(const Rows<T>& rows, T* grad_points, const F& f) {
  constexpr int64_t W = width<T>;
  const int64_t fitting = kScatterBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, rows.n) / W * W;
  const int64_t size = std::min(std::max(fitting, 2 * W), round_up(rows.channels, W));
  const int64_t parts = (rows.channels + size - 1) / size, clouds = rows.groups / rows.groups_per_cloud;
  at::parallel_for(0, clouds * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sum;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, first = task % parts * size, part = std::min(size, rows.channels - first);
      sum.assign(rows.n * part, T(0));
      for (int64_t g = b * rows.groups_per_cloud; g < (b + 1) * rows.groups_per_cloud; ++g) f(g, first, part, sum.data());
      for (int64_t j = 0; j < rows.n; ++j) {
        std::copy_n(sum.data() + j * part, part, grad_points + (b * rows.n + j) * rows.channels + first);
      }
    }
  });
}

// After a maximum only the chosen rows carry a slope of their own, `slopes`; all rows carry k0 + k1 · y.
template <typename T>
void dense_select_backward(const Rows<T>& rows, const T* slopes, const int32_t* which, const T* k0, const T* k1,
                           T* grad_x) {
  constexpr int64_t W = width<T>;
  at::parallel_for(0, rows.groups, std::max<int64_t>(1, 256 / rows.samples), [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      T* out = grad_x + g * rows.samples * rows.channels;
      const T* in = rows.x + g * rows.samples * rows.channels;
      for (int64_t s = 0; s < rows.samples; ++s) {
        for (int64_t c = 0; c < rows.channels; c += W) {
          store(out + s * rows.channels + c, fma(load(k1 + c), load(in + s * rows.channels + c), load(k0 + c)));
        }
      }
      for (int64_t c = 0; c < rows.channels; ++c) {
        const int64_t at = g * rows.channels + c;
        out[which[at] * rows.channels + c] += slopes[at];
      }
    }
  });
}

template <typename T>
void gathered_select_backward(const Rows<T>& rows, const T* slopes, const int32_t* which, const T* total, bool training,
                              const T* k0, const T* k1, T* grad_points, T* grad_centres) {
  constexpr int64_t W = width<T>;
  const T samples = static_cast<T>(rows.samples);
  scatter(rows, grad_points, [&](int64_t g, int64_t first, int64_t part, T* sum) {
    const int32_t* idx = rows.idx + g * rows.samples;
    const T* cloud = rows.cloud(g) + first;
    for (int64_t c = 0; c < part; c += W) {
      const int64_t at = first + c, row = g * rows.channels + at;
      Vec<T> of_centre = load(slopes + row);
      if (training) {
        const Vec<T> base = load(k0 + at), factor = load(k1 + at), centre = load(rows.centres + row);
        of_centre += samples * base + factor * load(total + row);
        for (int64_t s = 0; s < rows.samples; ++s) {
          T* target = sum + idx[s] * part + c;
          const Vec<T> y = load(cloud + idx[s] * rows.channels + c) + centre;
          store(target, load(target) + fma(factor, y, base));
        }
      }
      store(grad_centres + row, of_centre);
    }
    for (int64_t c = 0; c < part; ++c) {
      const int64_t row = g * rows.channels + first + c;
      sum[idx[which[row]] * part + c] += slopes[row];
    }
  });
}

// ------------------------------------------------------------------------------------ the operators

void check_vectors(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(-1) % 8 == 0, op, ": the number of channels must be a multiple of 8, got ", x.size(-1));
}

// y · scale + shift is the normalisation, from statistics [C].
std::tuple<at::Tensor, at::Tensor> affine(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
                                          const at::Tensor& var, double eps) {
  const at::Tensor scale = weight * at::rsqrt(var + eps);
  return {scale.contiguous(), (bias - mean * scale).contiguous()};
}

// The normalisation's share in every row's slope, k0 + k1 · y, from Σ g' and Σ g' (y − mean).
std::tuple<at::Tensor, at::Tensor> shares(const at::Tensor& sum, const at::Tensor& moment, const at::Tensor& scale,
                                          const at::Tensor& mean, const at::Tensor& var, double eps, int64_t count) {
  const at::Tensor k1 = -scale * moment / (var + eps) / count;
  return {(-scale * sum / count - k1 * mean).contiguous(), k1.contiguous()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_max(
    const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
    const at::Tensor& weight, const at::Tensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double eps, double slope) {
  const Inputs in("norm_act_max", x, centres, idx, weight, bias, running_mean, running_var);
  check_vectors("norm_act_max", x);
  const bool training = !running_mean;
  at::Tensor chosen = at::empty(in.shape, x.options());
  at::Tensor which = at::empty(in.shape, x.options().dtype(at::kInt));
  at::Tensor total = training && in.idx.defined() ? at::empty_like(chosen) : at::empty({0}, x.options());
  at::Tensor mean = running_mean ? running_mean->clone() : at::empty({x.size(-1)}, x.options());
  at::Tensor var = running_var ? running_var->clone() : at::empty({x.size(-1)}, x.options());
  // a normalisation with a negative weight turns the order round: its maximum is of the smallest
  const at::Tensor sign = at::where(weight < 0, -at::ones_like(weight), at::ones_like(weight));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_act_max", [&] {
    select_rows(in.rows<scalar_t>(), sign.const_data_ptr<scalar_t>(), training, chosen.mutable_data_ptr<scalar_t>(),
                which.mutable_data_ptr<int32_t>(), total.numel() ? total.mutable_data_ptr<scalar_t>() : nullptr,
                mean.mutable_data_ptr<scalar_t>(), var.mutable_data_ptr<scalar_t>());
  });
  const auto [scale, shift] = affine(weight, bias, mean, var, eps);
  return {at::leaky_relu(at::addcmul(shift, chosen, scale), slope), chosen, which, total, mean, var};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_act_max_backward(
    const at::Tensor& grad, const at::Tensor& x, const OptionalTensor& centres, const OptionalTensor& idx,
    const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& chosen_,
    const at::Tensor& which_, const at::Tensor& total_, const at::Tensor& mean, const at::Tensor& var, double eps,
    double slope, bool training) {
  const Inputs in("norm_act_max_backward", x, centres, idx, weight, bias, mean, var);
  check_vectors("norm_act_max_backward", x);
  in.check_backward("norm_act_max_backward", grad, chosen_, which_, total_, training);
  const at::Tensor chosen = chosen_.contiguous(), which = which_.contiguous(), total = total_.contiguous();
  at::Tensor grad_x = at::empty(in.x.sizes(), x.options()), grad_centres = at::empty({0}, x.options());
  if (in.idx.defined()) grad_centres = at::empty(in.centres.sizes(), x.options());
  const auto [scale, shift] = affine(weight, bias, mean, var, eps);
  const at::Tensor behind = at::where(at::addcmul(shift, chosen, scale) > 0, grad, grad * slope);
  const int64_t channels = x.size(-1);
  const at::Tensor sum = behind.reshape({-1, channels}).sum(0);
  const at::Tensor moment = (behind * (chosen - mean)).reshape({-1, channels}).sum(0);
  const at::Tensor slopes = (behind * scale).contiguous();
  const at::Tensor& scale_ = scale;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_act_max_backward", [&] {
    const auto rows = in.rows<scalar_t>();
    auto [k0, k1] = shares(sum, moment, scale_, mean, var, eps, rows.count());
    if (!training) k0.zero_(), k1.zero_();
    const scalar_t *base = k0.template const_data_ptr<scalar_t>(), *factor = k1.template const_data_ptr<scalar_t>();
    const scalar_t* own = slopes.const_data_ptr<scalar_t>();
    if (in.idx.defined()) {
      gathered_select_backward(rows, own, which.const_data_ptr<int32_t>(),
                               training ? total.const_data_ptr<scalar_t>() : nullptr, training, base, factor,
                               grad_x.mutable_data_ptr<scalar_t>(), grad_centres.mutable_data_ptr<scalar_t>());
    } else {
      dense_select_backward(rows, own, which.const_data_ptr<int32_t>(), base, factor,
                            grad_x.mutable_data_ptr<scalar_t>());
    }
  });
  return {grad_x, grad_centres, moment * at::rsqrt(var + eps), sum};
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) {
  m.impl("norm_act_max", &norm_act_max);
  m.impl("norm_act_max_backward", &norm_act_max_backward);
}

}  // namespace pointcmt
