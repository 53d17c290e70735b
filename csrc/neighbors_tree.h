// Neighbour search in large clouds: the points near a query are found in a tree instead of among all.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "tree.h"

namespace pointcmt {

// Coordinates up to here have squared distances that are finite.
template <typename T>
inline const T kLargestCoordinate = std::sqrt(std::numeric_limits<T>::max()) / 4;

template <typename T>
bool in_reach(const T* p) {
  const T largest = kLargestCoordinate<T>;
  return std::abs(p[0]) <= largest && std::abs(p[1]) <= largest && std::abs(p[2]) <= largest;
}

// A cloud's tree, and the order in which its queries are answered: along a Hilbert curve, so that what one of them has
// read is there for the next, and where it ended is where the next begins.
//
// Points that are infinite or not a number are at a finite distance of nothing: the tree leaves them out. It is not
// usable where that leaves fewer than k, or where a squared distance may overflow.
template <typename T>
struct SearchedCloud {
  SearchedCloud() = default;
  SearchedCloud(const T* xyz, int64_t n, const T* queries, int64_t m, int64_t k) {
    Buffer<int32_t> places(simd::round_up(n, kLeafPoints));
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* p = xyz + 3 * i;
      places[count] = static_cast<int32_t>(i);
      if (in_reach(p)) {
        ++count;
      } else if (std::isfinite(p[0]) && std::isfinite(p[1]) && std::isfinite(p[2])) {
        return;
      }
    }
    if (count < k) return;
    tree = Tree<T>(xyz, std::move(places), count);
    usable = true;
    own = queries == xyz && m == n && count == n;
    query = Buffer<int32_t>(m);
    if (own) {
      std::copy_n(tree.index.data(), m, query.data());
      reachable = m;
      return;
    }
    for (int64_t i = 0, last = m; i < m; ++i) {
      query[in_reach(queries + 3 * i) ? reachable++ : --last] = static_cast<int32_t>(i);
    }
    if (reachable == 0) return;
    const Buffer<uint64_t> scratch(2 * reachable);
    hilbert::sort(queries, query.data(), reachable, scratch.data(), scratch.data() + reachable);
  }

  Tree<T> tree;
  Buffer<int32_t> query;  // in the order of answering; those that are out of reach come last
  int64_t reachable = 0;
  bool usable = false, own = false;  // own: the queries are the cloud's points, in the order of the leaves
};

// A value that at least k of the scores do not exceed: of groups * W of them the k-th smallest, exactly.
template <typename T>
T kth_smallest(T* score, int64_t groups, int64_t k) {
  using namespace simd;
  constexpr int64_t W = width<T>;
  if (groups > 8) {
    std::nth_element(score, score + (k - 1), score + groups * W);
    return score[k - 1];
  }
  // the smallest that k or more do not exceed, counted without branches
  Vec<T> bound = splat(std::numeric_limits<T>::infinity());
  for (int64_t g = 0; g < groups; ++g) {
    const Vec<T> mine = load(score + g * W);
    Mask<T> rank{};
    for (int64_t j = 0; j < groups * W; ++j) rank -= splat(score[j]) <= mine;
    bound = min(rank >= static_cast<typename Types<T>::Int>(k) ? mine : bound, bound);
  }
  return horizontal_min<T>(bound);
}

// A value that at least k scores do not exceed: the k-th smallest minimum of groups of scores.
template <typename T>
T kth_bound(const T* score, int64_t padded, int64_t k, std::vector<T>& minima) {
  using namespace simd;
  constexpr int64_t W = width<T>;
  const int64_t vectors = padded / W, groups = (3 * k / 2 + W - 1) / W;  // of 3k/2 minima or a few more
  if (groups * 2 > vectors) return std::numeric_limits<T>::infinity();
  minima.resize(groups * W);
  for (int64_t g = 0; g < groups; ++g) {
    Vec<T> low = splat(std::numeric_limits<T>::infinity());
    for (int64_t v = g; v < vectors; v += groups) low = min(load(score + v * W), low);
    store(minima.data() + g * W, low);
  }
  return kth_smallest(minima.data(), groups, k);
}

// One thread's searches, with their scratch.
template <typename T>
class TreeSearch {
 public:
  // The k nearest points to query `place` of the order, which is at q: squared distances and indices, nearest first,
  // ties to the lower index.
  void nearest(const SearchedCloud<T>& cloud, int64_t place, const T* q, int64_t k, T* out, int64_t* idx) {
    using namespace simd;
    constexpr int64_t W = width<T>;
    const Tree<T>& tree = cloud.tree;
    int64_t leaf = place / kLeafPoints;
    if (!cloud.own) leaf = &cloud == cloud_ ? nearest_leaf_ : tree.home(q);
    cloud_ = &cloud;
    // a bound on the k-th distance, from leaves in a row about that one which hold k points or more
    const int64_t full = tree.count / kLeafPoints, some = (3 * k / 2 + kLeafPoints - 1) / kLeafPoints;
    T bound = std::numeric_limits<T>::max();
    score_.resize(std::max<int64_t>(some, 64) * kLeafPoints);
    const auto bound_at = [&](int64_t leaf) {
      const int64_t first = std::clamp<int64_t>(leaf - some / 2, 0, full - some);
      for (int64_t j = 0; j < some; ++j) measure(tree.leaves[first + j], q, score_.data() + j * kLeafPoints);
      return kth_smallest(score_.data(), some * kLeafPoints / W, k);
    };
    const auto find = [&] {
      leaves_.clear();
      tree.template search<false>(q, bound, [&](int64_t j) { leaves_.push_back(static_cast<int32_t>(j)); });
    };
    if (some <= full) bound = bound_at(leaf);
    find();
    if (some <= full && static_cast<int64_t>(leaves_.size()) > 8 + 4 * some) {  // a bad guess; the best leaf is among these
      T least = std::numeric_limits<T>::infinity();
      for (const int32_t j : leaves_) {
        const T far = Tree<T>::reach(tree.levels[0][j / kFan], q, j % kFan);
        if (far < least) least = far, leaf = j;
      }
      const T better = bound_at(leaf);
      if (better < bound) {
        bound = better;
        find();
      }
    }
    const int64_t scores = static_cast<int64_t>(leaves_.size()) * kLeafPoints;
    if (static_cast<int64_t>(score_.size()) < scores) score_.resize(scores);
    for (size_t i = 0; i < leaves_.size(); ++i) measure(tree.leaves[leaves_[i]], q, score_.data() + i * kLeafPoints);
    bound = std::min(bound, kth_bound(score_.data(), scores, k, minima_));
    if (static_cast<int64_t>(distance_.size()) < scores + W) distance_.resize(scores + W), index_.resize(scores + W);
    int64_t count = 0;
    const Vec<T> limit = splat(bound);
    T least = std::numeric_limits<T>::infinity();
    for (size_t i = 0; i < leaves_.size(); ++i) {
      const T* score = score_.data() + i * kLeafPoints;
      const int32_t* index = tree.index.data() + static_cast<int64_t>(leaves_[i]) * kLeafPoints;
      for (int64_t j = 0; j < kLeafPoints; j += W) {
        for (unsigned hit = bits(load(score + j) <= limit); hit; hit &= hit - 1) {
          const int64_t at = j + __builtin_ctz(hit);
          distance_[count] = score[at], index_[count++] = index[at];
          if (score[at] < least) least = score[at], nearest_leaf_ = leaves_[i];
        }
      }
    }
    write_sorted(count, k, out, idx);
  }

  // The nsample points of lowest index with a squared distance below radius2, by index; the rest of out is the first
  // of them again, or 0 where there is none. x, y, z: the cloud in its own order, see query_ball.
  template <typename Scan>
  void ball(const Tree<T>& tree, int64_t n, const T* q, T radius2, int64_t nsample, int64_t* out, const Scan& scan) {
    using namespace simd;
    leaves_.clear();
    tree.template search<true>(q, radius2, [&](int64_t j) { leaves_.push_back(static_cast<int32_t>(j)); });
    // Where the ball holds many points, the first nsample are soon met on a walk through the cloud as it is stored,
    // unless its order is a walk through space too: then the walk ends without them.
    const int64_t inside = static_cast<int64_t>(leaves_.size()) * kLeafPoints / 2;
    if (inside > 2 * nsample && n * nsample / inside < 8 * inside && scan(3 * (n * nsample / inside))) return;
    int64_t count = 0;
    const Vec<T> limit = splat(radius2);
    if (hits_.size() < leaves_.size() * kLeafPoints + 8) hits_.resize(leaves_.size() * kLeafPoints + 8);
    for (const int32_t leaf : leaves_) {
      T score[kLeafPoints];
      measure(tree.leaves[leaf], q, score);
      const int32_t* index = tree.index.data() + static_cast<int64_t>(leaf) * kLeafPoints;
      for (int64_t j = 0; j < kLeafPoints; j += width<T>) {
        for (unsigned hit = bits(load(score + j) < limit); hit; hit &= hit - 1) {
          hits_[count++] = index[j + __builtin_ctz(hit)];
        }
      }
    }
    if (count <= kCounted) {
      const int64_t padded = round_up(count, 8);
      std::fill(hits_.begin() + count, hits_.begin() + padded, std::numeric_limits<int32_t>::max());
      for (int64_t i = 0; i < count; i += 8) {  // an index' place is the number of lower ones
        Mask<float> mine, rank{};
        std::memcpy(&mine, hits_.data() + i, sizeof(mine));
        for (int64_t j = 0; j < count; ++j) rank -= Mask<float>{} + hits_[j] < mine;
        for (int64_t l = 0; l < std::min<int64_t>(8, count - i); ++l) {
          if (rank[l] < nsample) out[rank[l]] = mine[l];
        }
      }
    } else {
      const int64_t kept = std::min(count, nsample);
      if (kept < count) std::nth_element(hits_.begin(), hits_.begin() + kept, hits_.begin() + count);
      std::sort(hits_.begin(), hits_.begin() + kept);
      std::copy_n(hits_.begin(), kept, out);
    }
    if (count < nsample) std::fill(out + count, out + nsample, count ? out[0] : 0);
  }

 private:
  static constexpr int64_t kCounted = 96;  // up to here places are counted, above it is sorted

  static void measure(const Leaf<T>& leaf, const T* q, T* out) {
    using namespace simd;
    for (int64_t i = 0; i < kLeafPoints; i += width<T>) {
      const Vec<T> dx = q[0] - load(leaf.at[0] + i), dy = q[1] - load(leaf.at[1] + i), dz = q[2] - load(leaf.at[2] + i);
      store(out + i, dx * dx + dy * dy + dz * dz);
    }
  }

  // Writes the k smallest of the candidates, ties to the lower index.
  void write_sorted(int64_t count, int64_t k, T* out, int64_t* idx) {
    using namespace simd;
    constexpr int64_t W = width<T>;
    if (count <= kCounted) {
      const int64_t padded = round_up(count, W);
      for (int64_t i = count; i < padded; ++i) distance_[i] = std::numeric_limits<T>::infinity(), index_[i] = 0;
      for (int64_t i = 0; i < count; i += W) {
        const Vec<T> mine = load(distance_.data() + i);
        Mask<T> index, rank{};
        std::memcpy(&index, index_.data() + i, sizeof(index));
        for (int64_t j = 0; j < count; ++j) {
          const Vec<T> other = splat(distance_[j]);
          rank -= (other < mine) | ((other == mine) & (Mask<T>{} + index_[j] < index));
        }
        for (int64_t l = 0; l < std::min(W, count - i); ++l) {
          if (rank[l] < k) out[rank[l]] = mine[l], idx[rank[l]] = index[l];
        }
      }
      return;
    }
    pairs_.resize(count);
    for (int64_t i = 0; i < count; ++i) pairs_[i] = {distance_[i], index_[i]};
    if (k < count) std::nth_element(pairs_.begin(), pairs_.begin() + (k - 1), pairs_.end());
    std::sort(pairs_.begin(), pairs_.begin() + k);
    for (int64_t i = 0; i < k; ++i) out[i] = pairs_[i].first, idx[i] = pairs_[i].second;
  }

  using Int = typename simd::Types<T>::Int;
  const SearchedCloud<T>* cloud_ = nullptr;  // of the last query, and the leaf that held its nearest point
  int64_t nearest_leaf_ = 0;
  std::vector<T> score_, distance_, minima_;
  std::vector<Int> index_;
  std::vector<int32_t> leaves_, hits_;
  std::vector<std::pair<T, Int>> pairs_;
};

}  // namespace pointcmt
