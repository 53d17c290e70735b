// A tree of boxes over a cloud of points in space, in which the searches of sampling and neighbours
// leave out what is too far. Points are sorted along a Hilbert curve; every kLeafPoints of them in
// turn are a leaf, every kFan leaves or nodes in turn a node, and each has its bounding box. So leaves
// are full whatever the density is, and the tree needs no pointers.
//
// What is left out is exact: the squared distance to a box is computed with the operations of a
// point's and in their order, and rounding is monotone, so that it is never above a point's inside.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace pointcmt {

constexpr int64_t kLeafPoints = 16;
constexpr int64_t kFan = 8;

constexpr size_t kLargePage = size_t{2} << 20;

// Asks Linux for pages of 2 MiB where memory is large and not yet used. A search jumps about in it, and with pages of
// 4 KiB it would wait for the page table more than for the data.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = simd::round_up(reinterpret_cast<uintptr_t>(data), kLargePage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  // a wish: no matter if it fails
  if (begin + kLargePage < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An array that is not filled when it is made.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    const size_t bytes = std::max<size_t>(sizeof(T) * size, 1);
    align_ = bytes < 2 * kLargePage ? 64 : kLargePage;
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t{align_}));
    prefer_large_pages(data_, bytes);
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_) ::operator delete(data_, std::align_val_t{align_});
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static_assert(std::is_trivially_copyable_v<T>);
  void swap(Buffer& other) {
    std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(align_, other.align_);
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
  size_t align_ = 0;
};

namespace hilbert {

constexpr int kBits = 10;  // per axis, of a cell's number: a million points on surfaces get cells of their own
constexpr int kLanes = 8;
using Lanes = simd::Mask<float>;  // eight int32

inline Lanes spread(Lanes v) {  // bit i goes to bit 3 i
  v = (v | v << 16) & 0x030000ff;
  v = (v | v << 8) & 0x0300f00f;
  v = (v | v << 4) & 0x030c30c3;
  return (v | v << 2) & 0x09249249;
}

// The place of eight cells on the curve. J. Skilling, Programming the Hilbert curve (AIP 707, 2004).
inline Lanes place(Lanes x, Lanes y, Lanes z) {
  const auto turn = [](Lanes& first, Lanes& axis, int32_t bit) {
    const Lanes set = (axis & bit) != 0, low = Lanes{} + (bit - 1);
    const Lanes swap = (first ^ axis) & low & ~set;
    axis ^= swap;
    first ^= swap | (low & set);
  };
  for (int32_t bit = 1 << (kBits - 1); bit > 1; bit >>= 1) {
    x ^= ((x & bit) != 0) & (bit - 1);
    turn(x, y, bit);
    turn(x, z, bit);
  }
  y ^= x;
  z ^= y;
  Lanes t{};
  for (int32_t bit = 1 << (kBits - 1); bit > 1; bit >>= 1) t ^= ((z & bit) != 0) & (bit - 1);
  return spread(x ^ t) << 2 | spread(y ^ t) << 1 | spread(z ^ t);
}

// Sorts index, which says where in xyz the points are, along the curve through the points' box. Where many
// points share a cell (one point is far off, the density is uneven), they are sorted again in their own box.
// a and b are scratch of the length of index.
template <typename T>
void sort(const T* xyz, int32_t* index, int64_t count, uint64_t* a, uint64_t* b) {
  T low[3], high[3];
  for (int d = 0; d < 3; ++d) low[d] = high[d] = xyz[3 * static_cast<int64_t>(index[0]) + d];
  for (int64_t i = 1; i < count; ++i) {
    const T* p = xyz + 3 * static_cast<int64_t>(index[i]);
    for (int d = 0; d < 3; ++d) low[d] = p[d] < low[d] ? p[d] : low[d], high[d] = p[d] > high[d] ? p[d] : high[d];
  }
  const T extent = std::max({high[0] - low[0], high[1] - low[1], high[2] - low[2]});
  const T scale = T(1 << kBits) / extent;
  if (!(scale > 0) || !std::isfinite(scale)) return;  // one place, or too far apart for the type
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes cell[3] = {};
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    for (int64_t l = 0; l < here; ++l) {
      const T* p = xyz + 3 * static_cast<int64_t>(index[i + l]);
      for (int d = 0; d < 3; ++d) {
        cell[d][l] = std::min(static_cast<int32_t>((p[d] - low[d]) * scale), (1 << kBits) - 1);
      }
    }
    const Lanes key = place(cell[0], cell[1], cell[2]);
    for (int64_t l = 0; l < here; ++l) {
      a[i + l] = static_cast<uint64_t>(static_cast<uint32_t>(key[l])) << 32 | static_cast<uint32_t>(index[i + l]);
    }
  }
  if (count < 512) {
    std::sort(a, a + count);
    std::copy(a, a + count, b);
  } else {
    int32_t begin[3][1 << kBits] = {};
    constexpr uint64_t kDigit = (1 << kBits) - 1;
    for (int64_t i = 0; i < count; ++i) {
      for (int digit = 0; digit < 3; ++digit) ++begin[digit][a[i] >> (32 + digit * kBits) & kDigit];
    }
    for (auto& counts : begin) {
      int32_t sum = 0;
      for (int32_t& c : counts) sum += std::exchange(c, sum);
    }
    uint64_t *from = a, *to = b;
    for (int digit = 0; digit < 3; ++digit, std::swap(from, to)) {
      for (int64_t i = 0; i < count; ++i) to[begin[digit][from[i] >> (32 + digit * kBits) & kDigit]++] = from[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) index[i] = static_cast<int32_t>(b[i]);
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count && b[last] >> 32 == b[first] >> 32;) ++last;
    if (last - first > kLeafPoints) sort(xyz, index + first, last - first, a + first, b + first);
  }
}

}  // namespace hilbert

template <typename T>
inline void prefetch(const T& data) {
  for (size_t at = 0; at < sizeof(T); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(&data) + at);
}

// The boxes of kFan children, a lane each.
template <typename T>
struct Boxes {
  T low[3][kFan], high[3][kFan];
};

// A leaf's points.
template <typename T>
struct Leaf {
  T at[3][kLeafPoints];
};

template <typename T>
class Tree {
 public:
  Tree() = default;
  // A tree over the first `points` of places, which it sorts: they say where in xyz [., 3] the points are. Every
  // coordinate must be finite. The last leaf is filled up with points at infinity; places has room for it.
  Tree(const T* xyz, Buffer<int32_t> places, int64_t points) : count(points) {
    leaf_count = (count + kLeafPoints - 1) / kLeafPoints;
    {
      const Buffer<uint64_t> scratch(2 * count);
      if (count) hilbert::sort(xyz, places.data(), count, scratch.data(), scratch.data() + count);
    }
    index = std::move(places);
    std::fill(index.data() + count, index.data() + leaf_count * kLeafPoints, 0);
    leaves = Buffer<Leaf<T>>(leaf_count);
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (int64_t nodes = leaf_count;;) {
      const int64_t groups = (nodes + kFan - 1) / kFan;
      levels.emplace_back(Buffer<Boxes<T>>(groups));
      constexpr std::array<T, 3> nowhere = {infinity, infinity, infinity};
      for (int64_t c = nodes; c < groups * kFan; ++c) set_box(levels.back(), c, nowhere, {-infinity, -infinity, -infinity});
      if (groups <= 1) break;
      nodes = groups;
    }
    for (int64_t j = 0; j < leaf_count; ++j) {
      Leaf<T>& leaf = leaves[j];
      const int64_t here = std::min(kLeafPoints, count - j * kLeafPoints);
      for (int64_t i = 0; i < here; ++i) {
        const T* p = xyz + 3 * static_cast<int64_t>(index[j * kLeafPoints + i]);
        for (int d = 0; d < 3; ++d) leaf.at[d][i] = p[d];
      }
      std::array<T, 3> low, high;
      for (int d = 0; d < 3; ++d) {
        std::fill(leaf.at[d] + here, leaf.at[d] + kLeafPoints, leaf.at[d][0]);
        simd::Vec<T> least = simd::load(leaf.at[d]), most = least;
        for (int64_t i = simd::width<T>; i < kLeafPoints; i += simd::width<T>) {
          const simd::Vec<T> v = simd::load(leaf.at[d] + i);
          least = simd::min(v, least), most = simd::max(v, most);
        }
        low[d] = simd::horizontal_min<T>(least), high[d] = simd::horizontal_max(most);
        std::fill(leaf.at[d] + here, leaf.at[d] + kLeafPoints, infinity);
      }
      set_box(levels[0], j, low, high);
    }
    for (size_t level = 1; level < levels.size(); ++level) {
      for (int64_t g = 0; g < levels[level - 1].size(); ++g) {
        const Boxes<T>& boxes = levels[level - 1][g];
        std::array<T, 3> low, high;
        for (int d = 0; d < 3; ++d) {
          low[d] = *std::min_element(boxes.low[d], boxes.low[d] + kFan);
          high[d] = *std::max_element(boxes.high[d], boxes.high[d] + kFan);
        }
        set_box(levels[level], g, low, high);
      }
    }
  }

  // Squared distances of a point to the boxes of a group: W of them, from child first on.
  static simd::Vec<T> distances(const Boxes<T>& boxes, const T* q, int64_t first) {
    const auto axis = [&](int d) {
      const simd::Vec<T> below = simd::load(boxes.low[d] + first) - q[d], above = q[d] - simd::load(boxes.high[d] + first);
      const simd::Vec<T> gap = simd::max(simd::max(below, above), simd::Vec<T>{});
      return gap * gap;
    };
    return axis(0) + axis(1) + axis(2);
  }

  // One bit for each child of a group whose box is at most (or, where strict, less than) bound from q.
  template <bool strict>
  static unsigned near(const Boxes<T>& boxes, const T* q, T bound) {
    const simd::Vec<T> limit = simd::splat(bound);
    unsigned out = 0;
    for (int64_t first = 0; first < kFan; first += simd::width<T>) {
      const simd::Vec<T> d = distances(boxes, q, first);
      out |= simd::bits(strict ? d < limit : d <= limit) << first;
    }
    return out;
  }

  // Calls visit(leaf) for every leaf whose box is at most (less than) bound from q, in order; bound must be finite.
  template <bool strict, typename Visit>
  void search(const T* q, T bound, const Visit& visit) const {
    search_node<strict>(q, bound, levels.size() - 1, 0, visit);
  }

  // At most this far, squared, is any point in the box of a group's child.
  static T reach(const Boxes<T>& boxes, const T* q, int64_t child) {
    T sum = 0;
    for (int d = 0; d < 3; ++d) {
      const T gap = std::max(q[d] - boxes.low[d][child], boxes.high[d][child] - q[d]);
      sum += gap * gap;
    }
    return sum;
  }

  // A leaf near q, as a first guess: from the root, always the child whose box is nearest.
  int64_t home(const T* q) const {
    int64_t node = 0;
    for (size_t level = levels.size(); level-- > 0;) {
      T d[kFan];
      for (int64_t first = 0; first < kFan; first += simd::width<T>) {
        simd::store(d + first, distances(levels[level][node], q, first));
      }
      node = node * kFan + (std::min_element(d, d + kFan) - d);
    }
    return node;
  }

  int64_t count = 0, leaf_count = 0;
  Buffer<Leaf<T>> leaves;
  Buffer<int32_t> index;  // of the leaves' points in xyz
  std::vector<Buffer<Boxes<T>>> levels;  // [0]: boxes of leaves; the last: one group, the root's children

 private:
  static void set_box(const Buffer<Boxes<T>>& level, int64_t child, const std::array<T, 3>& low, const std::array<T, 3>& high) {
    Boxes<T>& boxes = level[child / kFan];
    for (int d = 0; d < 3; ++d) boxes.low[d][child % kFan] = low[d], boxes.high[d][child % kFan] = high[d];
  }

  template <bool strict, typename Visit>
  void search_node(const T* q, T bound, size_t level, int64_t group, const Visit& visit) const {
    for (unsigned hit = near<strict>(levels[level][group], q, bound); hit; hit &= hit - 1) {
      const int64_t child = group * kFan + __builtin_ctz(hit);
      if (level == 0) {
        visit(child);
      } else {
        search_node<strict>(q, bound, level - 1, child, visit);
      }
    }
  }
};

}  // namespace pointcmt
