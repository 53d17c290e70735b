// EMD on the CPU: one pair of clouds per task; see emd_auction.h.
#include "emd.h"
#include "emd_auction.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

namespace pointcmt::emd {
namespace {

template <typename scalar_t>
void run(const at::Tensor& x, const at::Tensor& y, double tolerance, int64_t max_rounds, const Result& result) {
  const auto& [distance, bound, assignment, statistics] = result;
  const int64_t clouds = x.size(0), n = x.size(1);
  const scalar_t *px = x.const_data_ptr<scalar_t>(), *py = y.const_data_ptr<scalar_t>();
  scalar_t *pd = distance.mutable_data_ptr<scalar_t>(), *pb = bound.mutable_data_ptr<scalar_t>();
  int64_t *pa = assignment.mutable_data_ptr<int64_t>(), *ps = statistics.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> broken{-1};
  at::parallel_for(0, clouds, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Pair<scalar_t> pair(px + b * n * 3, py + b * n * 3, int32_t(n));
      if (!pair.normalise()) {
        broken = b;
        return;
      }
      const Outcome outcome = pair.solve(tolerance, most_rows(max_rounds, n), pa + b * n);
      pd[b] = scalar_t(outcome.distance);
      pb[b] = scalar_t(outcome.bound);
      if (pb[b] > outcome.bound) pb[b] = std::nextafter(pb[b], scalar_t(0));  // still a lower bound
      int64_t* own = ps + b * kStatistics;
      own[kRounds] = (outcome.work.rows + n - 1) / n;
      own[kRows] = outcome.work.rows;
      own[kCompleted] = outcome.completed;
      own[kBoundMet] = outcome.bound_met;
      own[kSweeps] = outcome.work.sweeps;
    }
  });
  TORCH_CHECK_VALUE(broken < 0, "emd: cloud ", broken.load(),
                    " holds NaN or infinite coordinates; EMD needs finite points");
}

Result emd_cpu(const at::Tensor& x, const at::Tensor& y, double tolerance, int64_t max_rounds) {
  check(x, y, tolerance, max_rounds);
  const at::Tensor xs = x.contiguous(), ys = y.contiguous();
  Result result = empty_result(x);
  if (x.scalar_type() == at::kDouble) {
    run<double>(xs, ys, tolerance, max_rounds, result);
  } else {
    run<float>(xs, ys, tolerance, max_rounds, result);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) { m.impl("emd", &emd_cpu); }

}  // namespace pointcmt::emd
