// EMD on CUDA: one launch for a batch, one thread block per pair; see emd_kernel.cuh.
#include "emd.h"
#include "cuda.cuh"
#include "emd_kernel.cuh"

#include <ATen/ops/empty.h>

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
    emd_kernel(const scalar_t* x, const scalar_t* y, scalar_t* distance, scalar_t* bound, int64_t* assignment,
               int64_t* statistics, char* workspace, size_t stride, int n, double tolerance, int64_t most) {
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
                                          distance + pair,
                                          bound + pair,
                                          assignment + pair * n,
                                          statistics + pair * kStatistics,
                                          n,
                                          tolerance,
                                          most};
  device::Block<scalar_t>(problem, arrays, scratch).run();
}

template <typename scalar_t, Place place>
void run(const at::Tensor& x, const at::Tensor& y, const Result& result, size_t shared, size_t stride,
         double tolerance, int64_t max_rounds) {
  const auto& [distance, bound, assignment, statistics] = result;
  const int clouds = int(x.size(0)), n = int(x.size(1));
  at::Tensor workspace = at::empty({int64_t(stride) * clouds}, x.options().dtype(at::kByte));
  int threads = 64;  // a power of two, which narrow rounds rely on
  while (threads < 1024 && threads < n) threads *= 2;
  launch(emd_kernel<scalar_t, place>, clouds, threads, shared, x.const_data_ptr<scalar_t>(),
         y.const_data_ptr<scalar_t>(), distance.mutable_data_ptr<scalar_t>(), bound.mutable_data_ptr<scalar_t>(),
         assignment.mutable_data_ptr<int64_t>(), statistics.mutable_data_ptr<int64_t>(),
         reinterpret_cast<char*>(workspace.mutable_data_ptr()), stride, n, tolerance, most_rows(max_rounds, n));
}

template <typename scalar_t>
void run_where_it_fits(const at::Tensor& x, const at::Tensor& y, const Result& result, double tolerance,
                       int64_t max_rounds) {
  const size_t n = size_t(x.size(1)), objects = n * kObjectBytes, others = (n * kOtherBytes + 15) / 16 * 16;
  const size_t most = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin - sizeof(device::Scratch) -
                      64;  // 64: alignment of the fixed part
  if (objects + others <= most) {
    run<scalar_t, Place::kShared>(x, y, result, objects + others, 0, tolerance, max_rounds);
  } else if (objects <= most) {
    run<scalar_t, Place::kObjects>(x, y, result, objects, others, tolerance, max_rounds);
  } else {
    run<scalar_t, Place::kWorkspace>(x, y, result, 0, objects + others, tolerance, max_rounds);
  }
}

Result emd_cuda(const at::Tensor& x, const at::Tensor& y, double tolerance, int64_t max_rounds) {
  check(x, y, tolerance, max_rounds);
  TORCH_CHECK_VALUE(x.size(0) <= std::numeric_limits<int>::max(), "emd: too many clouds: ", x.size(0));
  const c10::cuda::CUDAGuard guard(x.device());
  Result result = empty_result(x);
  if (x.size(0) == 0) return result;
  const at::Tensor xs = x.contiguous(), ys = y.contiguous();
  if (x.scalar_type() == at::kDouble) {
    run_where_it_fits<double>(xs, ys, result, tolerance, max_rounds);
  } else {
    run_where_it_fits<float>(xs, ys, result, tolerance, max_rounds);
  }
  return result;
}

}  // namespace

POINTCMT_CUDA_LIBRARY(m) { m.impl("emd", &emd_cuda); }

}  // namespace pointcmt::emd
