// EMD on the CPU: Gauss-Seidel auction with eps scaling, one cloud pair per task.
//
// Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem",
// Annals of Operations Research 14 (1988). Each point of x bids for the point of y that is cheapest
// (distance + price); its bid raises the price to where the second cheapest is as good, plus eps.
// When everyone holds a point, the total is within N eps of the optimum.
#include "emd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

namespace pointcmt::emd {
namespace {

constexpr int kLanes = 8;  // one AVX register of float; other machines split or pair it
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Costs of this many bytes are cached per thread; larger problems recompute each row.
constexpr size_t kCacheBytes = size_t{64} << 20;

class Aligned {
 public:
  explicit Aligned(size_t n) : p_(static_cast<float*>(::operator new(n * sizeof(float), kAlign))) {}
  ~Aligned() { ::operator delete(p_, kAlign); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  float* get() { return p_; }
  float& operator[](size_t i) { return p_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  float* p_;
};

struct Bid {
  float best, second;
  int32_t object;
};

// The cheapest and the second cheapest of cost + price; n is a multiple of kLanes.
inline Bid cheapest(const float* cost, const float* price, int32_t n) {
  Floats best, second;
  Ints at, index;
  for (int k = 0; k < kLanes; ++k) {
    best[k] = second[k] = kInfinity;
    at[k] = 0;
    index[k] = k;
  }
  for (int32_t j = 0; j < n; j += kLanes) {
    const Floats value =
        *reinterpret_cast<const Floats*>(cost + j) + *reinterpret_cast<const Floats*>(price + j);
    const Floats larger = value > best ? value : best;
    second = larger < second ? larger : second;
    at = value < best ? index : at;
    best = value < best ? value : best;
    index += kLanes;
  }
  Bid bid{best[0], second[0], at[0]};
  for (int k = 1; k < kLanes; ++k) {
    if (best[k] < bid.best) {
      bid = {best[k], std::min(bid.best, second[k]), at[k]};
    } else {
      bid.second = std::min(bid.second, best[k]);
    }
  }
  return bid;
}

// Who is unmatched, first in first out: at most n at a time.
class Queue {
 public:
  explicit Queue(int32_t n) : ring_(n) {}
  int32_t size() const { return size_; }
  void clear() { head_ = size_ = 0; }
  void push(int32_t i) {
    const int32_t at = head_ + size_++;
    ring_[at < int32_t(ring_.size()) ? at : at - int32_t(ring_.size())] = i;
  }
  int32_t pop() {
    const int32_t i = ring_[head_];
    if (++head_ == int32_t(ring_.size())) head_ = 0;
    --size_;
    return i;
  }

 private:
  std::vector<int32_t> ring_;
  int32_t head_ = 0, size_ = 0;
};

struct Outcome {
  double distance = 0;
  int64_t rounds = 0, bids = 0, completed = 0;
  bool bound_met = false;
};

template <typename scalar_t>
class Pair {
 public:
  Pair(const scalar_t* x, const scalar_t* y, int32_t n)
      : x_(x), y_(y), n_(n), padded_((n + kLanes - 1) / kLanes * kLanes), points_(3 * size_t(padded_)),
        bidders_(3 * size_t(padded_)), price_(padded_),
        cached_(size_t(n) * padded_ * sizeof(float) <= kCacheBytes),
        cost_(cached_ ? size_t(n) * padded_ : padded_), owner_(n) {}

  // False where a coordinate is not finite. Otherwise brings both clouds to one frame in which
  // float32 serves any input: centred on the common box, the larger of the two boxes of side 1.
  bool normalise() {
    double low[3], high[3], side = 0;
    for (const scalar_t* cloud : {x_, y_}) {
      for (int d = 0; d < 3; ++d) {
        double lo = cloud[d], hi = cloud[d], sum = 0;
        for (int32_t i = 0; i < n_; ++i) {
          const double v = cloud[3 * size_t(i) + d];
          lo = std::min(lo, v);
          hi = std::max(hi, v);
          sum += v * 0.0;  // NaN as soon as one coordinate is NaN or infinite
        }
        if (!(sum == 0.0)) return false;
        side = std::max(side, hi / 2 - lo / 2);  // halves: hi - lo may overflow
        low[d] = cloud == x_ ? lo : std::min(low[d], lo);
        high[d] = cloud == x_ ? hi : std::max(high[d], hi);
      }
    }
    double reach = 0;
    for (int d = 0; d < 3; ++d) reach = std::max(reach, high[d] / 2 - low[d] / 2);
    // Two clouds far apart for their size: what float32 cannot tell apart at that distance is no scale.
    scale_ = std::max({2 * side, 2 * reach * kLeastScale, std::numeric_limits<double>::min()});
    if (!std::isfinite(scale_)) scale_ = std::numeric_limits<double>::max();
    const double inverse = 1 / scale_;
    for (int d = 0; d < 3; ++d) {
      const double centre = low[d] / 2 + high[d] / 2;
      for (int32_t i = 0; i < n_; ++i) {
        bidders_[d * size_t(padded_) + i] = float((x_[3 * size_t(i) + d] - centre) * inverse);
        points_[d * size_t(padded_) + i] = float((y_[3 * size_t(i) + d] - centre) * inverse);
      }
      for (int32_t i = n_; i < padded_; ++i) points_[d * size_t(padded_) + i] = 0;
    }
    return true;
  }

  Outcome solve(double eps, int64_t max_rounds, const int64_t* initial, int64_t* assignment) {
    Outcome outcome;
    for (int32_t j = 0; j < padded_; ++j) price_[j] = j < n_ ? 0 : kInfinity;
    if (cached_) {
      for (int32_t i = 0; i < n_; ++i) distances(i, cost_.get() + size_t(i) * padded_);
    }
    const int64_t most = max_rounds > std::numeric_limits<int64_t>::max() / n_
                             ? std::numeric_limits<int64_t>::max()
                             : max_rounds * n_;
    Queue waiting(n_);
    const float last = float(std::max(eps, 1e-7));
    float now = std::max(last, kFirstEps);
    std::vector<float> slack;
    if (initial) {
      slack = slacks(initial);
      now = warm_eps(slack, last);
    }
    for (bool first = true;; first = false) {
      std::fill(owner_.begin(), owner_.end(), -1);
      waiting.clear();
      for (int32_t i = 0; i < n_; ++i) {
        if (first && initial && slack[i] <= now) {
          owner_[initial[i]] = i;
        } else {
          waiting.push(i);
        }
      }
      // a coarse phase only sets prices: its last few bidders, who take many of its bids, can wait
      const int32_t enough = now > last ? n_ / kUnmatchedFraction : 0;
      while (waiting.size() > enough && outcome.bids < most) {
        const int32_t i = waiting.pop();
        Bid bid = cheapest(row(i), price_.get(), padded_);
        if (bid.second == kInfinity) bid.second = bid.best;
        const float raised = price_[bid.object] + (bid.second - bid.best + now);
        // rounding must not stop a price from rising, or two bidders could alternate for ever
        price_[bid.object] =
            raised > price_[bid.object] ? raised : std::nextafter(price_[bid.object], kInfinity);
        if (owner_[bid.object] >= 0) waiting.push(owner_[bid.object]);
        owner_[bid.object] = i;
        ++outcome.bids;
      }
      outcome.bound_met = outcome.bids >= most && (now > last || waiting.size() > 0);
      if (outcome.bound_met || now <= last) break;
      now = std::max(last, now / kEpsFactor);
    }
    outcome.rounds = (outcome.bids + n_ - 1) / n_;
    outcome.completed = waiting.size();
    while (waiting.size() > 0) complete(waiting.pop());
    for (int32_t j = 0; j < n_; ++j) assignment[owner_[j]] = j;
    outcome.distance = mean_distance(assignment);
    if (initial && std::find(initial, initial + n_, -1) == initial + n_) {
      const double before = mean_distance(initial);  // a warm start never makes the result worse
      if (before < outcome.distance) {
        std::copy(initial, initial + n_, assignment);
        outcome.distance = before;
      }
    }
    return outcome;
  }

 private:
  void distances(int32_t i, float* out) const {
    Aligned& points = const_cast<Aligned&>(points_);
    Aligned& bidders = const_cast<Aligned&>(bidders_);
    const float *px = points.get(), *py = px + padded_, *pz = py + padded_;
    const float a = bidders[i], b = bidders[size_t(padded_) + i], c = bidders[2 * size_t(padded_) + i];
    for (int32_t j = 0; j < padded_; ++j) {
      const float u = px[j] - a, v = py[j] - b, w = pz[j] - c;
      out[j] = std::sqrt(u * u + v * v + w * w);
    }
  }

  const float* row(int32_t i) {
    if (cached_) return cost_.get() + size_t(i) * padded_;
    distances(i, cost_.get());
    return cost_.get();
  }

  // By how much each point of x would, at price 0, rather have another point than its initial one.
  std::vector<float> slacks(const int64_t* initial) {
    std::vector<float> slack(n_, kInfinity);
    for (int32_t i = 0; i < n_; ++i) {
      if (initial[i] < 0) continue;
      const float* cost = row(i);
      slack[i] = cost[initial[i]] - cheapest(cost, price_.get(), padded_).best;
    }
    return slack;
  }

  // The finest phase's eps at which all but a few initial pairs satisfy eps complementary slackness.
  float warm_eps(const std::vector<float>& slack, float last) const {
    float eps = last;
    for (; eps < kFirstEps; eps *= kEpsFactor) {
      const auto ill = std::count_if(slack.begin(), slack.end(), [&](float s) { return !(s <= eps); });
      if (ill * kWarmFraction <= n_) return eps;
    }
    return std::max(last, kFirstEps);
  }

  // The bound on bids was met: a point left takes the nearest point of y that is still free.
  void complete(int32_t i) {
    for (int32_t j = 0; j < n_; ++j) price_[j] = owner_[j] < 0 ? 0 : kInfinity;
    owner_[cheapest(row(i), price_.get(), padded_).object] = i;
  }

  double mean_distance(const int64_t* assignment) const {
    double sum = 0;
    for (int32_t i = 0; i < n_; ++i) {
      double square = 0;
      for (int d = 0; d < 3; ++d) {
        const double e = (double(x_[3 * size_t(i) + d]) - double(y_[3 * size_t(assignment[i]) + d])) / scale_;
        square += e * e;
      }
      sum += std::sqrt(square);
    }
    return sum / n_ * scale_;
  }

  const scalar_t *x_, *y_;
  int32_t n_, padded_;
  Aligned points_, bidders_, price_;
  bool cached_;
  Aligned cost_;
  std::vector<int32_t> owner_;
  double scale_ = 1;
};

void check_initial(const at::Tensor& initial) {
  const int64_t clouds = initial.size(0), n = initial.size(1);
  const int64_t* row = initial.const_data_ptr<int64_t>();
  std::vector<char> taken(n);
  for (int64_t b = 0; b < clouds; ++b, row += n) {
    std::fill(taken.begin(), taken.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      if (row[i] == -1) continue;
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < n && !taken[row[i]], "emd: initial[", b, ", ", i, "] = ",
                        row[i], " is out of range or taken twice; each row must be a permutation of 0..N-1, "
                        "with -1 where nothing is known");
      taken[row[i]] = 1;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> emd_cpu(const at::Tensor& x, const at::Tensor& y, double eps,
                                                       int64_t max_rounds,
                                                       const std::optional<at::Tensor>& initial) {
  check(x, y, eps, max_rounds, initial);
  const int64_t clouds = x.size(0), n = x.size(1);
  const at::Tensor xs = x.contiguous(), ys = y.contiguous();
  at::Tensor start;
  if (initial.has_value()) {
    start = initial->contiguous();
    check_initial(start);
  }
  at::Tensor distance = at::empty({clouds}, x.options());
  at::Tensor assignment = at::empty({clouds, n}, x.options().dtype(at::kLong));
  at::Tensor statistics = at::empty({clouds, kStatistics}, x.options().dtype(at::kLong));
  std::atomic<int64_t> broken{-1};
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t *px = xs.const_data_ptr<scalar_t>(), *py = ys.const_data_ptr<scalar_t>();
    const int64_t* ps = initial.has_value() ? start.const_data_ptr<int64_t>() : nullptr;
    scalar_t* pd = distance.mutable_data_ptr<scalar_t>();
    int64_t* pa = assignment.mutable_data_ptr<int64_t>();
    int64_t* pt = statistics.mutable_data_ptr<int64_t>();
    at::parallel_for(0, clouds, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        Pair<scalar_t> pair(px + b * n * 3, py + b * n * 3, int32_t(n));
        if (!pair.normalise()) {
          broken = b;
          return;
        }
        const Outcome outcome = pair.solve(eps, max_rounds, ps ? ps + b * n : nullptr, pa + b * n);
        pd[b] = scalar_t(outcome.distance);
        pt[b * kStatistics + kRounds] = outcome.rounds;
        pt[b * kStatistics + kBids] = outcome.bids;
        pt[b * kStatistics + kCompleted] = outcome.completed;
        pt[b * kStatistics + kBoundMet] = outcome.bound_met;
      }
    });
  };
  if (x.scalar_type() == at::kDouble) {
    run(double{});
  } else {
    run(float{});
  }
  TORCH_CHECK_VALUE(broken < 0, "emd: cloud ", broken.load(),
                    " holds NaN or infinite coordinates; EMD needs finite points");
  return {distance, assignment, statistics};
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) { m.impl("emd", &emd_cpu); }

}  // namespace pointcmt::emd
