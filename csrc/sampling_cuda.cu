// Furthest point sampling on the GPU: one block per cloud, one barrier per chosen point.
#include "sampling.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <climits>
#include <tuple>
#include <type_traits>

#include "cuda.cuh"
#include "exact.cuh"
#include "lengths.cuh"

namespace pointcmt {
namespace {

constexpr int kMaxThreads = 1024;

// TieOrder of sampling.h, for a thread: bit-reversed thread of pointnet2_ops' reduction above, turn below.
constexpr int kTurnBits = 22;

struct DeviceTieOrder {
  int bits;  // of the number of threads there, a power of two
  __device__ __forceinline__ explicit DeviceTieOrder(int n) : bits(0) {
    while ((2 << bits) <= n && (2 << bits) <= kReferenceThreads) ++bits;
  }
  __device__ __forceinline__ int reverse(int v) const {
    return bits ? static_cast<int>(__brev(static_cast<unsigned>(v)) >> (32 - bits)) : 0;
  }
  __device__ __forceinline__ int rank(int k) const {
    return reverse(k & ((1 << bits) - 1)) << kTurnBits | k >> bits;
  }
  __device__ __forceinline__ int index(int rank) const {
    return (rank & ((1 << kTurnBits) - 1)) << bits | reverse(rank >> kTurnBits);
  }
};

// A candidate: how far, and its rank among equals. Further wins, then the lower rank.
template <typename T>
struct Best {
  T distance;
  int rank;
  __device__ __forceinline__ bool beaten_by(const Best& other) const {
    return other.distance > distance || (other.distance == distance && other.rank < rank);
  }
};

template <typename T>
__device__ __forceinline__ Best<T> warp_best(Best<T> mine) {
#if defined(POINTCMT_CUDA_ON_CPU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
  constexpr bool kReduces = std::is_same_v<T, float>;
#else
  constexpr bool kReduces = false;
#endif
  if constexpr (kReduces) {
    // two warp reductions: distances are −1 (none) or not negative, so their bits are ordered
    const unsigned key = mine.distance < 0 ? 0u : __float_as_uint(mine.distance) + 1u;
    const unsigned top = __reduce_max_sync(kAllLanes, key);
    const unsigned first = __reduce_min_sync(kAllLanes, key == top ? static_cast<unsigned>(mine.rank) : UINT_MAX);
    return {top == 0u ? -1.0f : __uint_as_float(top - 1u), static_cast<int>(first)};
  } else {
    for (int step = 16; step > 0; step >>= 1) {
      const Best<T> other{__shfl_xor_sync(kAllLanes, mine.distance, step), __shfl_xor_sync(kAllLanes, mine.rank, step)};
      if (mine.beaten_by(other)) mine = other;
    }
    return mine;
  }
}

// PER > 0: every thread keeps PER points in registers. PER == 0: any n, distances in global memory.
// Where cached is true, shared memory holds the cloud.
template <typename T, int PER>
__global__ void __launch_bounds__(kMaxThreads)
    sample_kernel(const T* __restrict__ clouds, const int64_t* __restrict__ lengths, int most, int npoint, bool cached,
                  T* __restrict__ scratch, int64_t* __restrict__ chosen_all) {
  POINTCMT_DYNAMIC_SHARED(raw);
  T* cache = reinterpret_cast<T*>(raw);
  __shared__ T distance_of_warp[2][32];
  __shared__ int rank_of_warp[2][32];
  const int n = cloud_size(lengths, blockIdx.x, most);
  const DeviceTieOrder order(n);
  const T* cloud = clouds + static_cast<int64_t>(blockIdx.x) * most * 3;
  int64_t* chosen = chosen_all + static_cast<int64_t>(blockIdx.x) * npoint;
  T* state = scratch + static_cast<int64_t>(blockIdx.x) * most;
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = tid >> 5, warps = threads >> 5;

  constexpr int HELD = PER > 0 ? PER : 1;
  T x[HELD], y[HELD], z[HELD], nearest[HELD];
  const auto at_first = [](T px, T py, T pz) {
    const bool padding = static_cast<double>(squared_norm(px, py, pz)) <= kMinSquaredNorm;
    return padding ? T(-1) : static_cast<T>(kMaxSquaredDistance);  // −1 stays the least for ever
  };
  if constexpr (PER > 0) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int64_t k = tid + i * threads;
      x[i] = y[i] = z[i] = T(0);
      nearest[i] = T(-1);
      if (k < n) {
        x[i] = cloud[3 * k], y[i] = cloud[3 * k + 1], z[i] = cloud[3 * k + 2];
        nearest[i] = at_first(x[i], y[i], z[i]);
      }
    }
  } else {
    for (int64_t k = tid; k < n; k += threads) {
      state[k] = at_first(cloud[3 * k], cloud[3 * k + 1], cloud[3 * k + 2]);
    }
  }
  if (cached) {
    for (int i = tid; i < 3 * n; i += threads) cache[i] = cloud[i];
  }
  __syncthreads();

  const T* lookup = cached ? cache : cloud;
  int64_t last = 0;
  if (tid == 0) chosen[0] = 0;
  for (int i = 1; i < npoint; ++i) {
    const T lx = lookup[3 * last], ly = lookup[3 * last + 1], lz = lookup[3 * last + 2];
    Best<T> best{T(-1), INT_MAX};
    if constexpr (PER > 0) {
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const T d = squared_norm(x[j] - lx, y[j] - ly, z[j] - lz);
        nearest[j] = d < nearest[j] ? d : nearest[j];
        const Best<T> candidate{nearest[j], order.rank(tid + j * threads)};
        if (best.beaten_by(candidate)) best = candidate;
      }
    } else {
      for (int64_t k = tid; k < n; k += threads) {
        const T d = squared_norm(cloud[3 * k] - lx, cloud[3 * k + 1] - ly, cloud[3 * k + 2] - lz);
        const T now = d < state[k] ? d : state[k];
        state[k] = now;
        const Best<T> candidate{now, order.rank(static_cast<int>(k))};
        if (best.beaten_by(candidate)) best = candidate;
      }
    }
    best = warp_best(best);
    // Two buffers in turn, so that one barrier suffices: a warp that is a step ahead writes the other.
    if (lane == 0) distance_of_warp[i & 1][warp] = best.distance, rank_of_warp[i & 1][warp] = best.rank;
    __syncthreads();
    best = {T(-1), INT_MAX};
    if (lane < warps) best = {distance_of_warp[i & 1][lane], rank_of_warp[i & 1][lane]};
    best = warp_best(best);
    last = best.distance < 0 ? 0 : order.index(best.rank);  // nothing but padding: point 0 again
    if (tid == 0) chosen[i] = last;
  }
}

template <typename T>
void run(const at::Tensor& points, const int64_t* lengths, int64_t npoint, at::Tensor& chosen) {
  const int batch = static_cast<int>(points.size(0)), n = static_cast<int>(points.size(1));
  // four points per thread: few warps, hence cheap barriers, and independent work to hide latency
  int threads = 32;
  while (threads < kMaxThreads && threads * 4 < n) threads *= 2;
  const int per = (n - 1) / threads + 1;  // n may be the largest int
  const int64_t bytes = 3 * static_cast<int64_t>(n) * static_cast<int64_t>(sizeof(T));
  const bool cached = bytes <= 40 * 1024;  // of the 48 KiB that every device gives without asking
  const size_t shared = cached ? bytes : 0;
  const bool held = per <= (sizeof(T) == 4 ? 8 : 4);
  const at::Tensor scratch = at::empty({held ? 0 : static_cast<int64_t>(batch) * n}, points.options());
  const T* in = points.const_data_ptr<T>();
  int64_t* out = chosen.mutable_data_ptr<int64_t>();
  T* state = scratch.mutable_data_ptr<T>();
  const int m = static_cast<int>(npoint);
  if (!held) {
    launch(sample_kernel<T, 0>, batch, threads, shared, in, lengths, n, m, cached, state, out);
  } else if (per <= 1) {
    launch(sample_kernel<T, 1>, batch, threads, shared, in, lengths, n, m, cached, state, out);
  } else if (per <= 2) {
    launch(sample_kernel<T, 2>, batch, threads, shared, in, lengths, n, m, cached, state, out);
  } else if (per <= 4) {
    launch(sample_kernel<T, 4>, batch, threads, shared, in, lengths, n, m, cached, state, out);
  } else {
    launch(sample_kernel<T, 8>, batch, threads, shared, in, lengths, n, m, cached, state, out);
  }
}

at::Tensor furthest_point_sample(const at::Tensor& xyz, int64_t npoint, const std::optional<at::Tensor>& lengths) {
  check_furthest_point_sample(xyz, npoint, lengths);
  const c10::cuda::CUDAGuard guard(xyz.device());
  const at::Tensor points = xyz.contiguous(), sizes = sizes_on_device(lengths);
  at::Tensor chosen = at::empty({points.size(0), npoint}, points.options().dtype(at::kLong));
  if (chosen.numel() == 0) return chosen;
  TORCH_CHECK_VALUE(points.size(0) < (int64_t{1} << 31), "furthest_point_sample: too many clouds: ", points.size(0));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "furthest_point_sample",
                             [&] { run<scalar_t>(points, size_data(sizes), npoint, chosen); });
  return chosen;
}

// The twin's steps: its sorting is what a GPU is good at.
std::tuple<at::Tensor, at::Tensor> voxel_subsample(const at::Tensor& points, double size) {
  check_voxel_subsample(points, size);
  const c10::cuda::CUDAGuard guard(points.device());
  const at::Tensor cells = at::floor(points / at::full({}, size, points.options()));
  check_voxels((cells.abs() < kMaxVoxel).all().item<bool>(), size);
  const int64_t count = points.size(0);
  const at::Tensor inverse = std::get<1>(at::unique_dim(cells.to(at::kLong), 0, /*sorted=*/true, /*return_inverse=*/true));
  const at::Tensor index = at::arange(count, inverse.options());
  const at::Tensor first = at::full({count}, count, inverse.options()).scatter_reduce(0, inverse, index, "amin");
  const auto [kept, order] = first.sort();
  const at::Tensor place = at::empty_like(order).scatter_(0, order, index);
  return {kept.masked_select(kept < count), place.index_select(0, inverse)};
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) {
  m.impl("furthest_point_sample", &furthest_point_sample);
  m.impl("voxel_subsample", &voxel_subsample);
}

}  // namespace pointcmt
