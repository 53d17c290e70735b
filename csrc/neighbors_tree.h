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

// A cloud's tree, and the order in which its queries are answered: by the leaf that they are in or near, so that what
// one of them has read is there for the next.
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
    query = Buffer<int32_t>(m);
    leaf = Buffer<int32_t>(m);
    usable = true;
    if (queries == xyz && m == n && count == n) {  // the cloud's own points
      for (int64_t i = 0; i < m; ++i) query[i] = tree.index[i], leaf[i] = static_cast<int32_t>(i / kLeafPoints);
      return;
    }
    const Buffer<int32_t> home(m);
    std::vector<int32_t> begin(tree.leaf_count + 2);
    const int32_t nowhere = static_cast<int32_t>(tree.leaf_count);
    for (int64_t i = 0; i < m; ++i) {
      home[i] = in_reach(queries + 3 * i) ? static_cast<int32_t>(tree.home(queries + 3 * i)) : nowhere;
      ++begin[home[i] + 1];
    }
    for (int32_t j = 0; j < nowhere; ++j) begin[j + 1] += begin[j];
    for (int64_t i = 0; i < m; ++i) {
      const int32_t place = begin[home[i]]++;
      query[place] = static_cast<int32_t>(i);
      leaf[place] = home[i] == nowhere ? -1 : home[i];
    }
  }

  Tree<T> tree;
  Buffer<int32_t> query, leaf;  // leaf −1: the query is out of reach; these come last
  bool usable = false;
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
  // The k nearest points: squared distances and indices, nearest first, ties to the lower index.
  void nearest(const Tree<T>& tree, const T* q, int64_t leaf, int64_t k, T* out, int64_t* idx) {
    using namespace simd;
    constexpr int64_t W = width<T>;
    // a bound on the k-th distance, from leaves in a row about the query's own that hold k points or more
    const int64_t full = tree.count / kLeafPoints, some = (3 * k / 2 + kLeafPoints - 1) / kLeafPoints;
    T bound;
    score_.resize(std::max<int64_t>(some, 64) * kLeafPoints);
    if (some <= full) {
      const int64_t first = std::clamp<int64_t>(leaf - some / 2, 0, full - some);
      for (int64_t j = 0; j < some; ++j) measure(tree.leaves[first + j], q, score_.data() + j * kLeafPoints);
      bound = kth_smallest(score_.data(), some * kLeafPoints / W, k);
    } else {
      bound = std::numeric_limits<T>::max();
    }
    leaves_.clear();
    tree.template search<false>(q, bound, [&](int64_t j) { leaves_.push_back(static_cast<int32_t>(j)); });
    const int64_t scores = static_cast<int64_t>(leaves_.size()) * kLeafPoints;
    if (static_cast<int64_t>(score_.size()) < scores) score_.resize(scores);
    for (size_t i = 0; i < leaves_.size(); ++i) measure(tree.leaves[leaves_[i]], q, score_.data() + i * kLeafPoints);
    bound = std::min(bound, kth_bound(score_.data(), scores, k, minima_));
    if (static_cast<int64_t>(distance_.size()) < scores + W) distance_.resize(scores + W), index_.resize(scores + W);
    int64_t count = 0;
    const Vec<T> limit = splat(bound);
    for (size_t i = 0; i < leaves_.size(); ++i) {
      const T* score = score_.data() + i * kLeafPoints;
      const int32_t* index = tree.index.data() + static_cast<int64_t>(leaves_[i]) * kLeafPoints;
      for (int64_t j = 0; j < kLeafPoints; j += W) {
        for (unsigned hit = bits(load(score + j) <= limit); hit; hit &= hit - 1) {
          const int64_t at = j + __builtin_ctz(hit);
          distance_[count] = score[at], index_[count++] = index[at];
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
    const int64_t points = static_cast<int64_t>(leaves_.size()) * kLeafPoints / 2;
    if (points > 4 * nsample && n / points * nsample < 4 * points && scan(4 * (n / points * nsample) + 64)) return;
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
  std::vector<T> score_, distance_, minima_;
  std::vector<Int> index_;
  std::vector<int32_t> leaves_, hits_;
  std::vector<std::pair<T, Int>> pairs_;
};

}  // namespace pointcmt
