// Neighbour search on the GPU, with the twins' arithmetic: results are equal bit by bit.
#include "neighbors.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <climits>
#include <limits>
#include <tuple>

#include "cuda.cuh"
#include "exact.cuh"
#include "lengths.cuh"

namespace pointcmt {
namespace {

template <typename T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(__int_as_float(0x7f800000));
}

// ---------------------------------------------------------------------------------- ball query

// One warp per ball: 32 points at a time, hits written in index order, an early end once it is full.
template <typename T>
__global__ void ball_query_kernel(const T* __restrict__ xyz, const T* __restrict__ new_xyz,
                                  const int64_t* __restrict__ lengths, int most, int m,
                                  int64_t balls, int nsample, T radius2, int64_t* __restrict__ idx) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x >> 5);
  for (int64_t ball = static_cast<int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5); ball < balls;
       ball += warps) {
    const int n = cloud_size(lengths, ball / m, most);
    const T* cloud = xyz + ball / m * most * 3;
    const T cx = new_xyz[3 * ball], cy = new_xyz[3 * ball + 1], cz = new_xyz[3 * ball + 2];
    int64_t* out = idx + ball * nsample;
    int count = 0;
    int64_t first = 0;
    for (int start = 0; start < n && count < nsample; start += 32) {
      const int k = start + lane;
      bool hit = false;
      if (k < n) {
        const int64_t at = 3 * static_cast<int64_t>(k);
        hit = squared_norm(cx - cloud[at], cy - cloud[at + 1], cz - cloud[at + 2]) < radius2;
      }
      const unsigned hits = __ballot_sync(kAllLanes, hit);
      if (hits == 0) continue;
      if (count == 0) first = start + __ffs(hits) - 1;
      const int place = count + __popc(hits & ((1u << lane) - 1u));
      if (hit && place < nsample) out[place] = k;
      count += __popc(hits);
    }
    for (int place = count + lane; place < nsample; place += 32) out[place] = first;
  }
}

at::Tensor ball_query(double radius, int64_t nsample, const at::Tensor& xyz, const at::Tensor& new_xyz,
                      const std::optional<at::Tensor>& lengths) {
  check_ball_query(radius, nsample, xyz, new_xyz, lengths);
  const c10::cuda::CUDAGuard guard(xyz.device());
  const at::Tensor points = xyz.contiguous(), centres = new_xyz.contiguous(), sizes = sizes_on_device(lengths);
  const int64_t batch = points.size(0), n = points.size(1), m = centres.size(1), balls = batch * m;
  at::Tensor idx = at::empty({batch, m, nsample}, points.options().dtype(at::kLong));
  if (idx.numel() == 0) return idx;
  constexpr int kWarps = 8;
  const int blocks = static_cast<int>(std::min<int64_t>((balls + kWarps - 1) / kWarps, 1 << 20));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "ball_query", [&] {
    const scalar_t r = static_cast<scalar_t>(radius);
    launch(ball_query_kernel<scalar_t>, blocks, kWarps * 32, 0, points.const_data_ptr<scalar_t>(),
           centres.const_data_ptr<scalar_t>(), size_data(sizes), static_cast<int>(n), static_cast<int>(m), balls,
           static_cast<int>(nsample), r * r, idx.mutable_data_ptr<int64_t>());
  });
  return idx;
}

// ------------------------------------------------------------------------------------ three_nn

constexpr int kThreeThreads = 128;

// One thread per query; a block's queries are of one cloud, whose known points pass through shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreeThreads)
    three_nn_kernel(const T* __restrict__ unknown, const T* __restrict__ known, const int64_t* __restrict__ lengths,
                    int n, int most, int blocks_per_cloud, T* __restrict__ distance, int64_t* __restrict__ idx) {
  __shared__ T tile[3 * kThreeThreads];
  const int64_t b = blockIdx.x / blocks_per_cloud;
  const int q = static_cast<int>(blockIdx.x % blocks_per_cloud) * kThreeThreads + threadIdx.x;
  const T* query = unknown + (b * n + min(q, n - 1)) * 3;
  const T qx = query[0], qy = query[1], qz = query[2];
  const int m = cloud_size(lengths, b, most);
  const T* cloud = known + b * most * 3;
  T d1 = infinity<T>(), d2 = d1, d3 = d1;
  int i1 = 0, i2 = 0, i3 = 0;
  for (int start = 0; start < m; start += kThreeThreads) {
    const int count = min(kThreeThreads, m - start);
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * count; i += kThreeThreads) tile[i] = cloud[3 * static_cast<int64_t>(start) + i];
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      const T d = squared_norm(qx - tile[3 * k], qy - tile[3 * k + 1], qz - tile[3 * k + 2]);
      if (d < d3) {
        if (d < d2) {
          d3 = d2, i3 = i2;
          if (d < d1) {
            d2 = d1, i2 = i1;
            d1 = d, i1 = start + k;
          } else {
            d2 = d, i2 = start + k;
          }
        } else {
          d3 = d, i3 = start + k;
        }
      }
    }
  }
  if (q >= n) return;
  const int64_t row = 3 * (b * n + q);
  distance[row] = sqrt(d1), distance[row + 1] = sqrt(d2), distance[row + 2] = sqrt(d3);
  idx[row] = i1, idx[row + 1] = i2, idx[row + 2] = i3;
}

std::tuple<at::Tensor, at::Tensor> three_nn(const at::Tensor& unknown, const at::Tensor& known,
                                            const std::optional<at::Tensor>& lengths) {
  check_three_nn(unknown, known, lengths);
  const c10::cuda::CUDAGuard guard(unknown.device());
  const at::Tensor queries = unknown.contiguous(), points = known.contiguous(), sizes = sizes_on_device(lengths);
  const int64_t batch = queries.size(0), n = queries.size(1), m = points.size(1);
  at::Tensor distance = at::empty({batch, n, 3}, queries.options());
  at::Tensor idx = at::empty({batch, n, 3}, queries.options().dtype(at::kLong));
  if (idx.numel() == 0) return {distance, idx};
  const int64_t per_cloud = (n + kThreeThreads - 1) / kThreeThreads;
  TORCH_CHECK_VALUE(batch * per_cloud <= INT_MAX, "three_nn: too many points");
  AT_DISPATCH_FLOATING_TYPES(queries.scalar_type(), "three_nn", [&] {
    launch(three_nn_kernel<scalar_t>, static_cast<int>(batch * per_cloud), kThreeThreads, 0,
           queries.const_data_ptr<scalar_t>(), points.const_data_ptr<scalar_t>(), size_data(sizes), static_cast<int>(n),
           static_cast<int>(m), static_cast<int>(per_cloud), distance.mutable_data_ptr<scalar_t>(),
           idx.mutable_data_ptr<int64_t>());
  });
  return {distance, idx};
}

// ----------------------------------------------------------------------------------------- knn
//
// A warp holds four queries, and for each the sorted list of its k nearest so far, one entry (k ≤ 32)
// or two (k ≤ 64) per lane. Points pass by in tiles of 32, one per lane, through shared memory that
// the block's four warps share. Neither distances nor an N × N matrix are ever written.

constexpr int kKnnWarps = 4;
constexpr int kWarpQueries = 4;
constexpr int kBlockQueries = kKnnWarps * kWarpQueries;
constexpr int kMaxListed = 64;

// The eight partial sums of the twin, and its tree.
template <typename T>
__device__ __forceinline__ T tree(const T (&lane)[8]) {
  return add(add(add(lane[0], lane[4]), add(lane[1], lane[5])), add(add(lane[2], lane[6]), add(lane[3], lane[7])));
}

template <typename T>
__device__ __forceinline__ bool nearer(T d, int i, T other_d, int other_i) {
  return d < other_d || (d == other_d && i < other_i);
}

// CHUNK dimensions are staged at a time; a CHUNK of 4 serves up to 4 dimensions.
template <typename T, int CHUNK, int ENTRIES>
__global__ void __launch_bounds__(kKnnWarps * 32)
    knn_kernel(const T* __restrict__ queries, const T* __restrict__ points, const int64_t* __restrict__ lengths,
               int most, int m, int dims, int k, int blocks_per_cloud, T* __restrict__ distance, int64_t* __restrict__ idx) {
  __shared__ T point_tile[32][CHUNK + 1];  // one column more: lanes read a column without bank conflicts
  __shared__ T query_tile[CHUNK][kBlockQueries];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int64_t b = blockIdx.x / blocks_per_cloud;
  const int first = static_cast<int>(blockIdx.x % blocks_per_cloud) * kBlockQueries;
  const int n = cloud_size(lengths, b, most);
  const T* cloud = points + b * most * dims;
  const T* rows = queries + b * m * dims;

  T list_d[kWarpQueries][ENTRIES];
  int list_i[kWarpQueries][ENTRIES];
#pragma unroll
  for (int q = 0; q < kWarpQueries; ++q) {
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) list_d[q][e] = infinity<T>(), list_i[q][e] = INT_MAX;
  }

  for (int start = 0; start < n; start += 32) {
    T sum[kWarpQueries][8];
#pragma unroll
    for (int q = 0; q < kWarpQueries; ++q) {
#pragma unroll
      for (int l = 0; l < 8; ++l) sum[q][l] = T(0);
    }
    for (int from = 0; from < dims; from += CHUNK) {
      __syncthreads();
      for (int i = tid; i < 32 * CHUNK; i += kKnnWarps * 32) {
        const int p = i / CHUNK, d = i % CHUNK;
        const bool there = start + p < n && from + d < dims;
        point_tile[p][d] = there ? cloud[static_cast<int64_t>(start + p) * dims + from + d] : T(0);
      }
      if (start == 0 || dims > CHUNK) {  // one chunk only: the queries stay where they are
        for (int i = tid; i < kBlockQueries * CHUNK; i += kKnnWarps * 32) {
          const int q = i / CHUNK, d = i % CHUNK;
          const bool there = first + q < m && from + d < dims;
          query_tile[d][q] = there ? rows[static_cast<int64_t>(first + q) * dims + from + d] : T(0);
        }
      }
      __syncthreads();
      const int count = min(CHUNK, (dims - from + 7) / 8 * 8);
#pragma unroll 1
      for (int base = 0; base < count; base += 8) {
#pragma unroll
        for (int l = 0; l < (CHUNK < 8 ? CHUNK : 8); ++l) {
          const T p = point_tile[lane][base + l];  // zeros beyond dims add nothing
#pragma unroll
          for (int q = 0; q < kWarpQueries; ++q) {
            const T difference = query_tile[base + l][warp * kWarpQueries + q] - p;
            sum[q][l] = add(sum[q][l], mul(difference, difference));
          }
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kWarpQueries; ++q) {
      T mine = tree(sum[q]);
      if (!(mine == mine)) mine = infinity<T>();
      const int my_index = start + lane;
      T worst_d = __shfl_sync(kAllLanes, list_d[q][ENTRIES - 1], (k - 1) & 31);
      int worst_i = __shfl_sync(kAllLanes, list_i[q][ENTRIES - 1], (k - 1) & 31);
      unsigned waiting = __ballot_sync(kAllLanes, my_index < n && nearer(mine, my_index, worst_d, worst_i));
      while (waiting) {
        const int source = __ffs(waiting) - 1;
        waiting &= waiting - 1;
        const T d = __shfl_sync(kAllLanes, mine, source);
        const int i = start + source;
        if (!nearer(d, i, worst_d, worst_i)) continue;  // the list has moved on; the same in all lanes
        // its place is the number of entries before it; those behind move up by one
        int place = 0;
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
          place += __popc(__ballot_sync(kAllLanes, nearer(list_d[q][e], list_i[q][e], d, i)));
        }
        T carried_d = T(0);
        int carried_i = 0;
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
          const T last_d = __shfl_sync(kAllLanes, list_d[q][e], 31);
          const int last_i = __shfl_sync(kAllLanes, list_i[q][e], 31);
          T up_d = __shfl_up_sync(kAllLanes, list_d[q][e], 1);
          int up_i = __shfl_up_sync(kAllLanes, list_i[q][e], 1);
          if (lane == 0) up_d = carried_d, up_i = carried_i;
          const int here = e * 32 + lane;
          if (here == place) {
            list_d[q][e] = d, list_i[q][e] = i;
          } else if (here > place) {
            list_d[q][e] = up_d, list_i[q][e] = up_i;
          }
          carried_d = last_d, carried_i = last_i;
        }
        worst_d = __shfl_sync(kAllLanes, list_d[q][ENTRIES - 1], (k - 1) & 31);
        worst_i = __shfl_sync(kAllLanes, list_i[q][ENTRIES - 1], (k - 1) & 31);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kWarpQueries; ++q) {
    const int row = first + warp * kWarpQueries + q;
    if (row >= m) continue;
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      const int place = e * 32 + lane;
      if (place < k) {
        distance[(b * m + row) * k + place] = list_d[q][e];
        idx[(b * m + row) * k + place] = list_i[q][e] == INT_MAX ? 0 : list_i[q][e];  // fewer than k points
      }
    }
  }
}

// For k > 64: the distances of some rows, to be sorted by PyTorch.
template <typename T>
__global__ void distance_kernel(const T* __restrict__ queries, const T* __restrict__ cloud, int64_t rows, int n,
                                int dims, T* __restrict__ out) {
  const int64_t total = rows * n, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const T *q = queries + i / n * dims, *p = cloud + i % n * dims;
    T lane[8] = {};
    for (int from = 0; from < dims; from += 8) {
#pragma unroll
      for (int l = 0; l < 8; ++l) {
        if (from + l < dims) {
          const T difference = q[from + l] - p[from + l];
          lane[l] = add(lane[l], mul(difference, difference));
        }
      }
    }
    const T d = tree(lane);
    out[i] = d == d ? d : infinity<T>();
  }
}

template <typename T>
void knn_by_sorting(const at::Tensor& rows, const at::Tensor& clouds, const at::Tensor& sizes, int64_t k,
                    at::Tensor& distance, at::Tensor& idx) {
  const int64_t batch = clouds.size(0), most = clouds.size(1), dims = clouds.size(2), m = rows.size(1);
  const int64_t chunk = std::clamp<int64_t>((int64_t{1} << 24) / most, 1, m);  // 64 MiB of float32 at a time
  const at::Tensor there = sizes.defined() ? sizes.cpu() : at::Tensor();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = there.defined() ? there.const_data_ptr<int64_t>()[b] : most, found = std::min(k, n);
    TORCH_CHECK_VALUE(n >= 1 && n <= most, "knn: lengths[", b, "] is ", n, ", expected 1 to N=", most);
    distance[b].narrow(1, found, k - found).fill_(std::numeric_limits<T>::infinity());
    idx[b].narrow(1, found, k - found).zero_();
    const at::Tensor block = at::empty({chunk, n}, rows.options());
    for (int64_t first = 0; first < m; first += chunk) {
      const int64_t count = std::min(chunk, m - first);
      const int blocks = static_cast<int>(std::min<int64_t>((count * n + 255) / 256, 1 << 16));
      launch(distance_kernel<T>, blocks, 256, 0, rows.const_data_ptr<T>() + (b * m + first) * dims,
             clouds.const_data_ptr<T>() + b * most * dims, count, static_cast<int>(n), static_cast<int>(dims),
             block.mutable_data_ptr<T>());
      const auto [value, index] = at::sort(block.narrow(0, 0, count), /*stable=*/true, /*dim=*/1, /*descending=*/false);
      distance[b].narrow(0, first, count).narrow(1, 0, found).copy_(value.narrow(1, 0, found));
      idx[b].narrow(0, first, count).narrow(1, 0, found).copy_(index.narrow(1, 0, found));
    }
  }
}

template <typename T, int CHUNK, int ENTRIES>
void launch_knn(const at::Tensor& rows, const at::Tensor& clouds, const at::Tensor& sizes, int64_t k, at::Tensor& distance, at::Tensor& idx) {
  const int64_t batch = clouds.size(0), n = clouds.size(1), dims = clouds.size(2), m = rows.size(1);
  const int64_t per_cloud = (m + kBlockQueries - 1) / kBlockQueries;
  TORCH_CHECK_VALUE(batch * per_cloud <= INT_MAX, "knn: too many queries");
  launch(knn_kernel<T, CHUNK, ENTRIES>, static_cast<int>(batch * per_cloud), kKnnWarps * 32, 0,
         rows.const_data_ptr<T>(), clouds.const_data_ptr<T>(), size_data(sizes), static_cast<int>(n), static_cast<int>(m),
         static_cast<int>(dims), static_cast<int>(k), static_cast<int>(per_cloud), distance.mutable_data_ptr<T>(),
         idx.mutable_data_ptr<int64_t>());
}

std::tuple<at::Tensor, at::Tensor> knn(const at::Tensor& queries, const at::Tensor& points, int64_t k,
                                       const std::optional<at::Tensor>& lengths) {
  check_knn(queries, points, k, lengths);
  const c10::cuda::CUDAGuard guard(points.device());
  const at::Tensor rows = queries.contiguous(), clouds = points.contiguous(), sizes = sizes_on_device(lengths);
  at::Tensor distance = at::empty({rows.size(0), rows.size(1), k}, rows.options());
  at::Tensor idx = at::empty({rows.size(0), rows.size(1), k}, rows.options().dtype(at::kLong));
  if (idx.numel() == 0) return {distance, idx};
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "knn", [&] {
    const bool few = clouds.size(2) <= 4;
    if (k > kMaxListed) {
      knn_by_sorting<scalar_t>(rows, clouds, sizes, k, distance, idx);
    } else if (k > 32) {
      few ? launch_knn<scalar_t, 4, 2>(rows, clouds, sizes, k, distance, idx)
          : launch_knn<scalar_t, 32, 2>(rows, clouds, sizes, k, distance, idx);
    } else {
      few ? launch_knn<scalar_t, 4, 1>(rows, clouds, sizes, k, distance, idx)
          : launch_knn<scalar_t, 32, 1>(rows, clouds, sizes, k, distance, idx);
    }
  });
  return {distance, idx};
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) {
  m.impl("ball_query", &ball_query);
  m.impl("three_nn", &three_nn);
  m.impl("knn", &knn);
}

}  // namespace pointcmt
