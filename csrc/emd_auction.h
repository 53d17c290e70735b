// One pair of clouds, matched on a CPU: Gauss-Seidel auction with eps scaling, sweeps of shortest augmenting
// paths where bidding alone would take long, and a certificate from the prices.
//
// Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem", Annals of
// Operations Research 14 (1988). Each point of x bids for the point of y that is cheapest (distance + price);
// its bid raises the price to where the second cheapest is as good, plus eps. Sweeps: Goldberg & Kennedy, "An
// efficient cost scaling algorithm for the assignment problem", Mathematical Programming 71 (1995), whose
// global price updates they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "emd_constants.h"
#include "simd.h"

namespace pointcmt::emd {

template <typename T>
class Aligned {
 public:
  explicit Aligned(size_t n)
      : p_(static_cast<T*>(::operator new(std::max<size_t>(n, 1) * sizeof(T), kAlign))) {}
  ~Aligned() { ::operator delete(p_, kAlign); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() { return p_; }
  const T* get() const { return p_; }
  T& operator[](size_t i) { return p_[i]; }
  const T& operator[](size_t i) const { return p_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* p_;
};

inline simd::Vec<float> root(simd::Vec<float> v) {
#if defined(__AVX__)
  return (simd::Vec<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int k = 0; k < 8; ++k) v[k] = std::sqrt(v[k]);
  return v;
#endif
}
inline simd::Vec<double> root(simd::Vec<double> v) {
#if defined(__AVX__)
  return (simd::Vec<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int k = 0; k < 4; ++k) v[k] = std::sqrt(v[k]);
  return v;
#endif
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

// What is counted over all stages of a pair.
struct Work {
  int64_t rows = 0, most = 0, sweeps = 0;
  bool over() const { return rows >= most; }
};

template <typename real>
class Auction {
  using V = simd::Vec<real>;
  using I = simd::Mask<real>;
  using Int = typename simd::Types<real>::Int;
  static constexpr int32_t kLanes = int32_t(simd::width<real>);
  static constexpr real kInfinity = std::numeric_limits<real>::infinity();
  static constexpr double kFloor = sizeof(real) == 4 ? kFloorFloat : kFloorDouble;
  // Distances are kept where they fit; larger clouds compute each row anew, in memory that grows with N.
  static constexpr size_t kCacheBytes = size_t{4} << 20;

 public:
  // Coordinates [N, 3] in one frame whose longest side is about 1.
  Auction(int32_t n, Work& work)
      : n_(n), padded_(int32_t(simd::round_up(n, kLanes))), points_(3 * size_t(padded_)),
        bidders_(3 * size_t(padded_)), price_(padded_), best_(n, -kInfinity),
        cached_(sizeof(real) == 4 && size_t(n) * padded_ * sizeof(real) <= kCacheBytes),
        cost_(cached_ ? size_t(n) * padded_ : 0), owner_(n, -1), holds_(n, -1), waiting_(n), work_(work) {
    std::fill(points_.get(), points_.get() + 3 * size_t(padded_), real(0));
    std::fill(bidders_.get(), bidders_.get() + 3 * size_t(padded_), real(0));
    for (int32_t j = 0; j < padded_; ++j) price_[j] = j < n ? 0 : kInfinity;
  }

  void set(int32_t i, int d, double from, double to) {
    bidders_[d * size_t(padded_) + i] = real(from);
    points_[d * size_t(padded_) + i] = real(to);
  }
  const std::vector<int32_t>& holds() const { return holds_; }
  real price(int32_t j) const { return price_[j]; }
  void set_price(int32_t j, double p) { price_[j] = real(p); }
  int32_t waiting() const { return waiting_.size(); }

  // Matches every point such that sum - bound <= tolerance * sum, from increment eps on. False where the bound on
  // work is met, or where the next increment would be lost in the prices' rounding; eps is then that increment. All
  // points are matched then if this is the last resort, which tries the least increment that is not lost.
  bool run(double& eps, double tolerance, bool last_resort, double& bound) {
    if (cached_) {
      for (int32_t i = 0; i < n_; ++i) distances(i, cost_.get() + size_t(i) * padded_);
    }
    double aim = start_near(eps, tolerance);  // where the certificate is expected to hold; 0: not known yet
    for (bool least = false; !least;) {
      if (const double floor = kFloor * level(); eps < floor) {
        if (!last_resort) return false;
        least = true;
        eps = aim = floor;
      }
      begin_phase(real(eps));
      const bool last = eps <= aim;
      // a coarse phase only sets prices: its last few bidders, who take many of its bids, can wait, unless there is
      // a war of bids, which finer increments only make longer
      bid(real(eps), last || work_.sweeps > 0 ? 0 : n_ / kUnmatchedFraction);
      if (work_.over()) return false;
      const double sum = total();
      if (sum == 0) return sizeof(real) == 8;  // nothing is nearer; float32 may have rounded a distance to 0
      if (last) {
        bound = std::max(bound, certify());
        if (sum - bound <= tolerance * sum) return true;
        if (work_.over()) return false;
        eps *= std::clamp(kCaution * tolerance * sum / (sum - bound), 1 / (2 * kEpsFactor), 0.5);
        aim = eps;
      } else {
        aim = kTightness * tolerance * sum / std::max(n_ - waiting_.size(), 1);
        eps = std::max(eps / kEpsFactor, std::min(aim, eps / 1.5));
      }
    }
    return false;
  }

  // The bound on work was met: each point left takes the nearest point of y that is still free.
  int32_t complete() {
    const int32_t left = waiting_.size();
    while (waiting_.size() > 0) {
      const int32_t i = waiting_.pop();
      for (int32_t j = 0; j < n_; ++j) price_[j] = owner_[j] < 0 ? 0 : kInfinity;
      match(i, cheapest(i).object);
    }
    return left;
  }

  // A lower bound of the sum over all matchings, from the prices: whatever they are, each point pays at least its
  // cheapest distance + price, and the prices are paid once each.
  double certify() {
    double paid = 0, prices = 0;
    for (int32_t i = 0; i < n_; ++i) {
      best_[i] = cheapest(i).best;
      paid += double(best_[i]) - margin(i, best_[i]);
    }
    for (int32_t j = 0; j < n_; ++j) prices += price_[j];
    work_.rows += n_;
    return paid - prices;
  }

 private:
  struct Bid {
    real best, second;
    int32_t object;
  };

  // How much rounding may have raised what is cheapest: the coordinates' and that of some ten operations.
  double margin(int32_t i, double best) const {
    constexpr double unit = std::numeric_limits<real>::epsilon();
    double reach = 0;
    for (int d = 0; d < 3; ++d) reach += std::abs(double(bidders_[d * size_t(padded_) + i]));
    return unit * (8 * best + 2 * reach);
  }

  V distance(V px, V py, V pz, V a, V b, V c) const {
    const V u = px - a, v = py - b, w = pz - c;
    return root(u * u + v * v + w * w);
  }

  void distances(int32_t i, real* out) const {
    const real *px = points_.get(), *py = px + padded_, *pz = py + padded_;
    const V a = simd::splat(bidders_[i]), b = simd::splat(bidders_[size_t(padded_) + i]),
            c = simd::splat(bidders_[2 * size_t(padded_) + i]);
    for (int32_t j = 0; j < padded_; j += kLanes) {
      simd::store(out + j, distance(simd::load(px + j), simd::load(py + j), simd::load(pz + j), a, b, c));
    }
  }

  real apart(int32_t i, int32_t j) const {
    real square = 0;
    for (int d = 0; d < 3; ++d) {
      const real e = bidders_[d * size_t(padded_) + i] - points_[d * size_t(padded_) + j];
      square += e * e;
    }
    return std::sqrt(square);
  }

  // The cheapest and the second cheapest of distance + price.
  template <typename Cost>
  Bid cheapest_of(Cost cost) const {
    V best = simd::splat(kInfinity), second = best;
    I at = {}, index;
    for (int k = 0; k < kLanes; ++k) index[k] = k;
    const real* price = price_.get();
    for (int32_t j = 0; j < padded_; j += kLanes) {
      const V value = cost(j) + simd::load(price + j);
      const V larger = simd::max(best, value);
      second = simd::min(second, larger);
      at = value < best ? index : at;
      best = simd::min(value, best);
      index += kLanes;
    }
    Bid bid{best[0], second[0], int32_t(at[0])};
    for (int k = 1; k < kLanes; ++k) {
      if (best[k] < bid.best) {
        bid = {best[k], std::min(bid.best, second[k]), int32_t(at[k])};
      } else {
        bid.second = std::min(bid.second, best[k]);
      }
    }
    return bid;
  }

  Bid cheapest(int32_t i) const {
    if (cached_) {
      const real* row = cost_.get() + size_t(i) * padded_;
      return cheapest_of([=](int32_t j) { return simd::load(row + j); });
    }
    const real *px = points_.get(), *py = px + padded_, *pz = py + padded_;
    const V a = simd::splat(bidders_[i]), b = simd::splat(bidders_[size_t(padded_) + i]),
            c = simd::splat(bidders_[2 * size_t(padded_) + i]);
    return cheapest_of(
        [=, this](int32_t j) { return distance(simd::load(px + j), simd::load(py + j), simd::load(pz + j), a, b, c); });
  }

  void match(int32_t i, int32_t j) {
    owner_[j] = i;
    holds_[i] = j;
  }

  // At least what the matching costs, rounding considered; 0 where all points are matched to their like.
  double total() const {
    double sum = 0, rounding = 0;
    for (int32_t i = 0; i < n_; ++i) {
      if (holds_[i] < 0) continue;
      const double length = apart(i, holds_[i]);
      sum += length;
      rounding += margin(i, length);
    }
    return sum > 0 || waiting_.size() > 0 ? sum + rounding : 0;
  }

  // Where nearly all points of a sample are by far each other's nearest, coarse phases have nothing to find: starts
  // with an eps below what sets the nearest apart from the second, and returns it. Otherwise 0.
  double start_near(double& eps, double tolerance) {
    const int32_t step = std::max(1, n_ / kSample);
    int32_t mutual = 0, count = 0;
    double nearest = 0, margin = 0;
    for (int32_t i = 0; i < n_; i += step, ++count) {
      const Bid found = cheapest(i);
      const real own = apart(i, found.object);
      nearest += found.best;
      margin += (found.second < kInfinity ? found.second : found.best) - found.best;
      bool closest = 2 * found.best < found.second;
      for (int32_t k = 0; k < n_ && closest; ++k) closest = k == i || apart(k, found.object) > 2 * own;
      mutual += closest;
      work_.rows += 2;
    }
    if (16 * mutual < 15 * count) return 0;
    eps = std::min(eps, std::max(kTightness * tolerance * nearest, margin / 4) / count);
    return eps;
  }

  // The mean price above the lowest one.
  double level() const {
    double sum = 0, lowest = kInfinity;
    for (int32_t j = 0; j < n_; ++j) {
      sum += double(price_[j]);
      lowest = std::min(lowest, double(price_[j]));
    }
    return sum / n_ - lowest;
  }

  // Prices from 0 on, which lose the least to rounding. Kept are the pairs that are known to be within eps of their
  // point's cheapest.
  void begin_phase(real eps) {
    const real lowest = *std::min_element(price_.get(), price_.get() + n_);
    for (int32_t j = 0; j < n_; ++j) price_[j] -= lowest;
    std::fill(owner_.begin(), owner_.end(), -1);
    waiting_.clear();
    for (int32_t i = 0; i < n_; ++i) {
      const int32_t j = holds_[i];
      if (j >= 0 && apart(i, j) + price_[j] <= best_[i] - lowest + eps) {
        owner_[j] = i;
      } else {
        holds_[i] = -1;
        waiting_.push(i);
      }
    }
    std::fill(best_.begin(), best_.end(), -kInfinity);
  }

  void bid(real eps, int32_t enough) {
    int64_t since = 0;
    while (waiting_.size() > enough && !work_.over()) {
      if (since >= (work_.sweeps ? kBidsLater : kBidsFirst) * n_) {
        sweep(eps);
        since = 0;
        continue;
      }
      const int32_t i = waiting_.pop();
      Bid found = cheapest(i);
      if (found.second == kInfinity) found.second = found.best;
      real& price = price_[found.object];
      const real raised = price + (found.second - found.best + eps);
      // rounding must not stop a price from rising, or two bidders could alternate for ever
      price = raised > price ? raised : std::nextafter(price, kInfinity);
      const int32_t previous = owner_[found.object];
      if (previous >= 0) {
        holds_[previous] = -1;
        waiting_.push(previous);
      }
      match(i, found.object);
      ++since;
      ++work_.rows;
    }
  }

  // Raises prices by the lengths of the shortest paths from free points of y back to all points of x that wait,
  // where a step's length is how far it is from being a bid: what a war of bids would come to. Afterwards the steps
  // of these paths are bids, and those paths that do not meet are matched along.
  void sweep(real eps) {
    ++work_.sweeps;
    std::vector<int32_t> hop(padded_, 0), order;
    Aligned<real> key(padded_), need(padded_);
    std::vector<real> rise(n_, -1);
    for (int32_t i = 0; i < padded_; ++i) {
      key[i] = kInfinity;
      if (i >= n_) {
        need[i] = -kInfinity;
      } else if (holds_[i] >= 0) {
        need[i] = apart(i, holds_[i]) + price_[holds_[i]] - eps;
      } else {
        need[i] = cheapest(i).best;
        ++work_.rows;
      }
    }
    for (int32_t j = 0; j < n_; ++j) {
      if (owner_[j] < 0) {
        rise[j] = 0;
        relax(j, price_[j], need, key, hop);
      }
    }
    int32_t left = waiting_.size();
    real reached = 0;
    while (left > 0) {
      const int32_t i = nearest(key);
      reached = std::max(reached, key[i]);
      key[i] = kInfinity;
      need[i] = -kInfinity;
      const int32_t j = holds_[i];
      if (j < 0) {
        order.push_back(i);
        --left;
      } else {
        rise[j] = reached;
        relax(j, price_[j] + reached, need, key, hop);
      }
    }
    for (int32_t j = 0; j < n_; ++j) price_[j] += rise[j] >= 0 ? rise[j] : reached;
    std::vector<char> used(n_, 0);
    std::vector<int32_t> path;
    for (const int32_t first : order) {
      path.clear();
      bool free = false;
      for (int32_t i = first; !used[hop[i]];) {
        path.push_back(i);
        const int32_t owner = owner_[hop[i]];
        if (owner < 0) {
          free = true;
          break;
        }
        i = owner;
      }
      if (!free) continue;
      for (const int32_t i : path) {
        used[hop[i]] = 1;
        match(i, hop[i]);
      }
    }
    waiting_.clear();
    for (const int32_t i : order) {
      if (holds_[i] < 0) waiting_.push(i);
    }
  }

  // Paths that go on to object j, whose price is given.
  void relax(int32_t j, real price, const Aligned<real>& need, Aligned<real>& key, std::vector<int32_t>& hop) {
    const real *bx = bidders_.get(), *by = bx + padded_, *bz = by + padded_;
    const V a = simd::splat(points_[j]), b = simd::splat(points_[size_t(padded_) + j]),
            c = simd::splat(points_[2 * size_t(padded_) + j]), p = simd::splat(price);
    for (int32_t i = 0; i < padded_; i += kLanes) {
      const V length = distance(simd::load(bx + i), simd::load(by + i), simd::load(bz + i), a, b, c) + p -
                       simd::load(need.get() + i);
      const V old = simd::load(key.get() + i);
      unsigned closer = simd::bits(I(length < old));
      if (!closer) continue;
      simd::store(key.get() + i, simd::min(length, old));
      for (; closer; closer &= closer - 1) hop[i + __builtin_ctz(closer)] = j;
    }
    ++work_.rows;
  }

  int32_t nearest(const Aligned<real>& key) const {
    V best = simd::splat(kInfinity);
    I at = {}, index;
    for (int k = 0; k < kLanes; ++k) index[k] = k;
    for (int32_t i = 0; i < padded_; i += kLanes) {
      const V value = simd::load(key.get() + i);
      at = value < best ? index : at;
      best = simd::min(value, best);
      index += kLanes;
    }
    int lane = 0;
    for (int k = 1; k < kLanes; ++k) {
      if (best[k] < best[lane]) lane = k;
    }
    return int32_t(at[lane]);
  }

  int32_t n_, padded_;
  Aligned<real> points_, bidders_, price_;
  std::vector<real> best_;  // by point of x: its cheapest distance + price, where certify() has found it
  bool cached_;
  Aligned<real> cost_;
  std::vector<int32_t> owner_, holds_;
  Queue waiting_;
  Work& work_;
};

struct Outcome {
  double distance = 0, bound = 0;  // means over the points, in their unit
  int64_t completed = 0;
  bool bound_met = false;
  Work work;
};

template <typename scalar_t>
class Pair {
 public:
  Pair(const scalar_t* x, const scalar_t* y, int32_t n) : x_(x), y_(y), n_(n) {}

  // False where a coordinate is not finite. Otherwise finds a frame in which float32 serves any input: about the mean
  // of all points, near which it resolves the most, and of the clouds' size.
  bool normalise() {
    double reach = 0;
    for (int d = 0; d < 3; ++d) {
      double means[2], low[2], high[2];
      for (int cloud = 0; cloud < 2; ++cloud) {
        const scalar_t* points = (cloud ? y_ : x_) + d;
        double mean = 0, lo = points[0], hi = points[0];
        for (int32_t i = 0; i < n_; ++i) {
          const double v = points[3 * size_t(i)];
          mean += v / n_;
          lo = std::min(lo, v);
          hi = std::max(hi, v);
        }
        if (!(mean - mean == 0)) return false;
        means[cloud] = mean, low[cloud] = lo, high[cloud] = hi;
      }
      const double least = std::min(low[0], low[1]), most = std::max(high[0], high[1]);
      centre_[d] = std::clamp(means[0] / 2 + means[1] / 2, least, most);  // rounding may have left the box
      reach = std::max(reach, most / 2 - least / 2);  // halves: most - least may overflow
    }
    scale_ = std::max(2 * reach, std::numeric_limits<double>::min());
    if (!std::isfinite(scale_)) scale_ = std::numeric_limits<double>::max();
    // how far points lie from the centre of their cloud: one far point changes it little
    spread_ = 0;
    for (const scalar_t* cloud : {x_, y_}) {
      double mean[3] = {}, sum = 0;
      for (int32_t i = 0; i < n_; ++i) {
        for (int d = 0; d < 3; ++d) mean[d] += framed(cloud, i, d) / n_;
      }
      for (int32_t i = 0; i < n_; ++i) {
        double square = 0;
        for (int d = 0; d < 3; ++d) {
          const double e = framed(cloud, i, d) - mean[d];
          square += e * e;
        }
        sum += std::sqrt(square);
      }
      spread_ = std::max(spread_, sum / n_);
    }
    return true;
  }

  Outcome solve(double tolerance, int64_t most_rows, int64_t* assignment) {
    Outcome outcome;
    Work& work = outcome.work;
    work.most = most_rows;
    double eps = std::max(kFirstEps * spread_, kLeastEps), bound = 0;
    Auction<float> fast(n_, work);
    place(fast);
    bool done = fast.run(eps, tolerance, false, bound);
    if (!done && fast.waiting() == 0) {  // nothing is better than points that are all matched to their like
      finish(fast, assignment);
      done = mean_distance(assignment) == 0;
    }
    if (done || work.over()) {
      outcome.completed = finish(fast, assignment);
    } else {  // points so near for their clouds' size that float32 does not tell: on from the prices that it found
      Auction<double> fine(n_, work);
      place(fine);
      for (int32_t j = 0; j < n_; ++j) fine.set_price(j, fast.price(j));
      done = fine.run(eps, tolerance, true, bound);
      outcome.completed = finish(fine, assignment);
    }
    outcome.bound_met = !done && work.over();
    outcome.distance = mean_distance(assignment);
    outcome.bound = std::clamp(bound / n_ * scale_, 0.0, outcome.distance);
    return outcome;
  }

 private:
  double framed(const scalar_t* cloud, int32_t i, int d) const {
    return (double(cloud[3 * size_t(i) + d]) / 2 - centre_[d] / 2) / (scale_ / 2);
  }

  template <typename real>
  void place(Auction<real>& auction) const {
    for (int32_t i = 0; i < n_; ++i) {
      for (int d = 0; d < 3; ++d) {
        auction.set(i, d, framed(x_, i, d), framed(y_, i, d));
      }
    }
  }

  template <typename real>
  int32_t finish(Auction<real>& auction, int64_t* assignment) const {
    const int32_t completed = auction.complete();
    for (int32_t i = 0; i < n_; ++i) assignment[i] = auction.holds()[i];
    return completed;
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
  int32_t n_;
  double centre_[3] = {}, scale_ = 1, spread_ = 0;
};

}  // namespace pointcmt::emd
