// Furthest point sampling on the CPU: one cloud per task, vectorised over its points.
#include "sampling.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "simd.h"

namespace pointcmt {
namespace {

using namespace simd;

// work holds 4 arrays of round_up(n, W): x, y, z and the squared distance to the nearest choice.
template <typename T>
void sample_cloud(const T* xyz, int64_t n, int64_t npoint, const std::vector<int32_t>& order, T* work,
                  int32_t* index, int64_t* chosen) {
  constexpr int64_t W = width<T>;
  const int64_t stride = round_up(n, 2 * W);
  T *x = work, *y = x + stride, *z = y + stride, *nearest = z + stride;
  int64_t usable = 0;
  for (const int32_t k : order) {
    const T px = xyz[3 * k], py = xyz[3 * k + 1], pz = xyz[3 * k + 2];
    if (static_cast<double>(px * px + py * py + pz * pz) <= kMinSquaredNorm) continue;
    x[usable] = px, y[usable] = py, z[usable] = pz;
    nearest[usable] = static_cast<T>(kMaxSquaredDistance);
    index[usable++] = k;
  }
  const int64_t padded = round_up(usable, 2 * W);
  for (int64_t i = usable; i < padded; ++i) x[i] = y[i] = z[i] = 0, nearest[i] = -1;

  int64_t last = 0;  // point 0 comes first, whether usable or not
  chosen[0] = 0;
  for (int64_t i = 1; i < npoint; ++i) {
    if (usable == 0) {
      chosen[i] = 0;
      continue;
    }
    const Vec<T> lx = splat(xyz[3 * last]), ly = splat(xyz[3 * last + 1]), lz = splat(xyz[3 * last + 2]);
    Vec<T> best0 = splat(T(-1)), best1 = best0;  // two chains, to hide the latency of max
    for (int64_t j = 0; j < padded; j += 2 * W) {
      const Vec<T> ax = load(x + j) - lx, ay = load(y + j) - ly, az = load(z + j) - lz;
      const Vec<T> bx = load(x + j + W) - lx, by = load(y + j + W) - ly, bz = load(z + j + W) - lz;
      const Vec<T> a = min(ax * ax + ay * ay + az * az, load(nearest + j));
      const Vec<T> b = min(bx * bx + by * by + bz * bz, load(nearest + j + W));
      store(nearest + j, a);
      store(nearest + j + W, b);
      best0 = max(a, best0);
      best1 = max(b, best1);
    }
    const Vec<T> best = splat(horizontal_max<T>(max(best0, best1)));
    int64_t at = 0;  // the first maximum, in tie order
    for (;; at += W) {
      const unsigned hit = bits(load(nearest + at) == best);
      if (hit) {
        at += __builtin_ctz(hit);
        break;
      }
    }
    last = index[at];
    chosen[i] = last;
  }
}

at::Tensor furthest_point_sample(const at::Tensor& xyz, int64_t npoint) {
  check_furthest_point_sample(xyz, npoint);
  const at::Tensor points = xyz.contiguous();
  const int64_t batch = points.size(0), n = points.size(1);
  at::Tensor chosen = at::empty({batch, npoint}, points.options().dtype(at::kLong));
  const std::vector<int32_t> order = tie_order(n);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "furthest_point_sample", [&] {
    const scalar_t* in = points.const_data_ptr<scalar_t>();
    int64_t* out = chosen.mutable_data_ptr<int64_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> work(4 * round_up(n, 2 * width<scalar_t>));
      std::vector<int32_t> index(n);
      for (int64_t b = begin; b < end; ++b) {
        sample_cloud(in + b * n * 3, n, npoint, order, work.data(), index.data(), out + b * npoint);
      }
    });
  });
  return chosen;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) { m.impl("furthest_point_sample", &furthest_point_sample); }

}  // namespace pointcmt
