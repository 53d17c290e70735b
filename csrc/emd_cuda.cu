// EMD on CUDA: one launch for a batch, one thread block per pair; see emd_kernel.cuh.
#include "emd.h"
#include "cuda.cuh"
#include "emd_kernel.cuh"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>

namespace pointcmt::emd {
namespace {

using device::kObjectBytes;
using device::kOtherBytes;

// Where a pair's arrays are.
enum class Place {
  kShared,     // all in shared memory
  kObjects,    // the points bid for, which every bid reads, in shared memory; the rest in the workspace
  kWorkspace,  // all in the workspace
};

template <typename scalar_t, Place place>
__global__ void __launch_bounds__(1024)
    emd_kernel(const scalar_t* x, const scalar_t* y, const int64_t* initial, scalar_t* distance,
               int64_t* assignment, int64_t* statistics, char* workspace, size_t stride, int n, float eps,
               int64_t max_rounds) {
  POINTCMT_DYNAMIC_SHARED(shared);
  __shared__ device::Scratch scratch;
  const size_t pair = blockIdx.x;
  char* own = workspace + pair * stride;
  char* objects = place == Place::kWorkspace ? own : shared;
  char* others = place == Place::kShared    ? shared + n * kObjectBytes
                 : place == Place::kObjects ? own
                                            : own + n * kObjectBytes;
  const device::Arrays arrays = device::carve(objects, others, n);
  const device::Problem<scalar_t> problem{x + pair * n * 3,
                                          y + pair * n * 3,
                                          initial ? initial + pair * n : nullptr,
                                          distance + pair,
                                          assignment + pair * n,
                                          statistics + pair * kStatistics,
                                          n,
                                          eps,
                                          max_rounds};
  device::Block<scalar_t>(problem, arrays, scratch).run();
}

template <typename scalar_t, Place place>
void run(const at::Tensor& x, const at::Tensor& y, const int64_t* initial, at::Tensor& distance,
         at::Tensor& assignment, at::Tensor& statistics, size_t shared, size_t stride, double eps, int64_t max_rounds) {
  const int clouds = int(x.size(0)), n = int(x.size(1));
  at::Tensor workspace = at::empty({int64_t(stride) * clouds}, x.options().dtype(at::kByte));
  int threads = 64;  // a power of two, which narrow rounds rely on
  while (threads < 1024 && threads < n) threads *= 2;
  launch(emd_kernel<scalar_t, place>, clouds, threads, shared, x.const_data_ptr<scalar_t>(),
         y.const_data_ptr<scalar_t>(), initial, distance.mutable_data_ptr<scalar_t>(),
         assignment.mutable_data_ptr<int64_t>(), statistics.mutable_data_ptr<int64_t>(),
         reinterpret_cast<char*>(workspace.mutable_data_ptr()), stride, n, float(eps), max_rounds);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> emd_cuda(const at::Tensor& x, const at::Tensor& y, double eps,
                                                        int64_t max_rounds,
                                                        const std::optional<at::Tensor>& initial) {
  check(x, y, eps, max_rounds, initial);
  TORCH_CHECK_VALUE(x.size(0) <= std::numeric_limits<int>::max(), "emd: too many clouds: ", x.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t clouds = x.size(0), n = x.size(1);
  at::Tensor distance = at::empty({clouds}, x.options());
  at::Tensor assignment = at::empty({clouds, n}, x.options().dtype(at::kLong));
  at::Tensor statistics = at::empty({clouds, kStatistics}, x.options().dtype(at::kLong));
  if (clouds == 0) return {distance, assignment, statistics};
  const at::Tensor xs = x.contiguous(), ys = y.contiguous();
  at::Tensor start;
  if (initial.has_value()) start = initial->contiguous();
  const int64_t* first = initial.has_value() ? start.const_data_ptr<int64_t>() : nullptr;

  const size_t objects = n * kObjectBytes, others = (n * kOtherBytes + 15) / 16 * 16;
  const size_t most = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin -
                      sizeof(device::Scratch) - 64;  // 64: alignment of the fixed part
  const auto run_as = [&](auto zero) {
    using scalar_t = decltype(zero);
    if (objects + others <= most) {
      run<scalar_t, Place::kShared>(xs, ys, first, distance, assignment, statistics, objects + others, 0, eps,
                                    max_rounds);
    } else if (objects <= most) {
      run<scalar_t, Place::kObjects>(xs, ys, first, distance, assignment, statistics, objects, others, eps,
                                     max_rounds);
    } else {
      run<scalar_t, Place::kWorkspace>(xs, ys, first, distance, assignment, statistics, 0, objects + others, eps,
                                       max_rounds);
    }
  };
  if (x.scalar_type() == at::kDouble) {
    run_as(double{});
  } else {
    run_as(float{});
  }
  return {distance, assignment, statistics};
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) { m.impl("emd", &emd_cuda); }

}  // namespace pointcmt::emd
