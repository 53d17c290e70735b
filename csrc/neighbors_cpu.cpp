// Neighbour search on the CPU. Every distance is computed with the operations of the twin in
// pointcmt/ops/neighbors.py, in its order and without contraction, so results are equal bit by bit.
#include "neighbors.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "neighbors_tree.h"
#include "simd.h"

namespace pointcmt {
namespace {

using namespace simd;

// From here on a tree is faster. Making it costs some 30 ns for each point and a search some 0.3 µs, against 0.2 ns for
// each pair of a query and a point, and 0.6 ns where k neighbours are listed.
struct TreeSizes {
  int64_t points, queries, pairs;
};
constexpr TreeSizes kBallTree{2048, 128, 800'000}, kThreeTree{1024, 768, 800'000}, kListTree{1024, 64, 200'000};

// Every cloud's tree and the order of its queries, where the cloud is large and in reach.
template <typename T>
std::vector<SearchedCloud<T>> make_trees(const TreeSizes& least, const T* points, const T* queries,
                                         const std::vector<int64_t>& sizes, int64_t n, int64_t m, int64_t k) {
  std::vector<SearchedCloud<T>> clouds(sizes.size());
  if (m < least.queries) return clouds;
  at::parallel_for(0, static_cast<int64_t>(sizes.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (sizes[b] < std::max(least.points, 8 * k) || sizes[b] * m < least.pairs) continue;
      clouds[b] = SearchedCloud<T>(points + b * n * 3, sizes[b], queries + b * m * 3, m, k);
    }
  });
  return clouds;
}

// ---------------------------------------------------------------------------------- ball query

// One query: the points come as three arrays, padded with infinity, which is inside no ball. What was found on
// the walk through them; where that is less than nsample, the rest of out is filled up.
struct Walk {
  int64_t points, hits;
};
template <typename T>
Walk query_ball(const T* x, const T* y, const T* z, int64_t padded, const T* centre, T radius2, int64_t nsample,
                int64_t* out) {
  constexpr int64_t W = width<T>;
  const Vec<T> cx = splat(centre[0]), cy = splat(centre[1]), cz = splat(centre[2]), limit = splat(radius2);
  int64_t count = 0, j = 0;
  for (; j < padded && count < nsample; j += 2 * W) {
    const Vec<T> ax = cx - load(x + j), ay = cy - load(y + j), az = cz - load(z + j);
    const Vec<T> bx = cx - load(x + j + W), by = cy - load(y + j + W), bz = cz - load(z + j + W);
    unsigned hit = bits(ax * ax + ay * ay + az * az < limit) | bits(bx * bx + by * by + bz * bz < limit) << W;
    for (; hit && count < nsample; hit &= hit - 1) out[count++] = j + __builtin_ctz(hit);
  }
  std::fill(out + count, out + nsample, count ? out[0] : 0);
  return {j, count};
}

// Whether walks through a cloud end so soon that a tree is not worth its making, judged by a few of the queries.
template <typename Query>
bool walks_are_short(int64_t n, int64_t m, const Query& walk) {
  constexpr int64_t kTried = 8;
  Walk all{0, 0};
  for (int64_t i = 0; i < kTried; ++i) {
    const Walk one = walk(i * m / kTried);
    all.points += one.points, all.hits += one.hits;
  }
  // nanoseconds: a walk's point, a tree's point in the making, a search with the points that a ball holds
  const double queries = static_cast<double>(m), points = static_cast<double>(all.points);
  const double inside = static_cast<double>(n) * static_cast<double>(all.hits) / points;
  return queries * points / kTried * 0.17 < 30 * static_cast<double>(n) + queries * (150 + 5 * inside);
}

at::Tensor ball_query(double radius, int64_t nsample, const at::Tensor& xyz, const at::Tensor& new_xyz,
                      const std::optional<at::Tensor>& lengths) {
  check_ball_query(radius, nsample, xyz, new_xyz, lengths);
  const at::Tensor points = xyz.contiguous(), centres = new_xyz.contiguous();
  const int64_t batch = points.size(0), n = points.size(1), m = centres.size(1);
  const std::vector<int64_t> sizes = cloud_sizes("ball_query", lengths, batch, n);
  at::Tensor idx = at::empty({batch, m, nsample}, points.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "ball_query", [&] {
    constexpr int64_t W = width<scalar_t>;
    const int64_t padded = round_up(n, 2 * W);
    const at::Tensor planes = at::empty({batch, 3, padded}, points.options());
    const scalar_t *in = points.const_data_ptr<scalar_t>(), *centre = centres.const_data_ptr<scalar_t>();
    scalar_t* plane = planes.mutable_data_ptr<scalar_t>();
    int64_t* out = idx.mutable_data_ptr<int64_t>();
    const scalar_t r = static_cast<scalar_t>(radius), radius2 = r * r;
    at::parallel_for(0, batch * 3, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* source = in + row / 3 * n * 3 + row % 3;
        scalar_t* target = plane + row * padded;
        const int64_t size = sizes[row / 3];
        for (int64_t j = 0; j < size; ++j) target[j] = source[3 * j];
        std::fill(target + size, target + padded, std::numeric_limits<scalar_t>::infinity());
      }
    });
    const auto walk = [&](int64_t b, int64_t q, int64_t limit) {
      const scalar_t* x = plane + b * 3 * padded;
      return query_ball(x, x + padded, x + 2 * padded, std::min(padded, round_up(limit, 2 * W)),
                        centre + (b * m + q) * 3, radius2, nsample, out + (b * m + q) * nsample);
    };
    prefer_large_pages(out, idx.nbytes());
    std::vector<int64_t> searched(batch, 0);
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (sizes[b] < kBallTree.points || m < kBallTree.queries || sizes[b] * m < kBallTree.pairs) continue;
        if (!walks_are_short(sizes[b], m, [&](int64_t q) { return walk(b, q, sizes[b]); })) searched[b] = sizes[b];
      }
    });
    const std::vector<SearchedCloud<scalar_t>> clouds = make_trees(kBallTree, in, centre, searched, n, m, 1);
    at::parallel_for(0, batch * m, 64, [&](int64_t begin, int64_t end) {
      TreeSearch<scalar_t> search;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / m, i = task % m;
        const int64_t q = clouds[b].usable ? clouds[b].query[i] : i;
        if (!clouds[b].usable || i >= clouds[b].reachable) {
          walk(b, q, sizes[b]);
        } else {
          search.ball(clouds[b].tree, sizes[b], centre + (b * m + q) * 3, radius2, nsample,
                      out + (b * m + q) * nsample, [&](int64_t limit) { return walk(b, q, std::min(limit, sizes[b])).hits == nsample; });
        }
      }
    });
  });
  return idx;
}

// ------------------------------------------------------------------------------------ three_nn

// W queries at once, one per lane; known points pass by one after the other.
template <typename T>
__attribute__((noinline)) void three_nearest(const T* query, int64_t lanes, const T* known, int64_t m, T* distance, int64_t* idx) {
  constexpr int64_t W = width<T>;
  Vec<T> qx{}, qy{}, qz{};
  for (int64_t l = 0; l < W; ++l) {
    const int64_t from = 3 * std::min(l, lanes - 1);
    qx[l] = query[from], qy[l] = query[from + 1], qz[l] = query[from + 2];
  }
  const Vec<T> infinity = splat(std::numeric_limits<T>::infinity());
  Vec<T> d1 = infinity, d2 = infinity, d3 = infinity;
  Mask<T> i1{}, i2{}, i3{};
  for (int64_t k = 0; k < m; ++k) {
    const Vec<T> dx = qx - known[3 * k], dy = qy - known[3 * k + 1], dz = qz - known[3 * k + 2];
    const Vec<T> d = dx * dx + dy * dy + dz * dz;
    const Mask<T> below3 = d < d3;
    if (!bits(below3)) continue;
    const Mask<T> below1 = d < d1, below2 = d < d2;
    const Mask<T> here = Mask<T>{} + static_cast<typename Types<T>::Int>(k);
    d3 = below2 ? d2 : (below3 ? d : d3);
    i3 = below2 ? i2 : (below3 ? here : i3);
    d2 = below1 ? d1 : (below2 ? d : d2);
    i2 = below1 ? i1 : (below2 ? here : i2);
    d1 = below1 ? d : d1;
    i1 = below1 ? here : i1;
  }
  for (int64_t l = 0; l < lanes; ++l) {
    distance[3 * l] = std::sqrt(d1[l]), distance[3 * l + 1] = std::sqrt(d2[l]);
    distance[3 * l + 2] = std::sqrt(d3[l]);
    idx[3 * l] = i1[l], idx[3 * l + 1] = i2[l], idx[3 * l + 2] = i3[l];
  }
}

std::tuple<at::Tensor, at::Tensor> three_nn(const at::Tensor& unknown, const at::Tensor& known,
                                            const std::optional<at::Tensor>& lengths) {
  check_three_nn(unknown, known, lengths);
  const at::Tensor queries = unknown.contiguous(), points = known.contiguous();
  const int64_t batch = queries.size(0), n = queries.size(1), m = points.size(1);
  const std::vector<int64_t> sizes = cloud_sizes("three_nn", lengths, batch, m);
  at::Tensor distance = at::empty({batch, n, 3}, queries.options());
  at::Tensor idx = at::empty({batch, n, 3}, queries.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(queries.scalar_type(), "three_nn", [&] {
    constexpr int64_t W = width<scalar_t>;
    const int64_t blocks = (n + W - 1) / W;
    const scalar_t *query = queries.const_data_ptr<scalar_t>(), *point = points.const_data_ptr<scalar_t>();
    scalar_t* d = distance.mutable_data_ptr<scalar_t>();
    int64_t* i = idx.mutable_data_ptr<int64_t>();
    prefer_large_pages(d, distance.nbytes()), prefer_large_pages(i, idx.nbytes());
    const std::vector<SearchedCloud<scalar_t>> clouds = make_trees(kThreeTree, point, query, sizes, m, n, 3);
    at::parallel_for(0, batch * blocks, 8, [&](int64_t begin, int64_t end) {
      TreeSearch<scalar_t> search;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * W, row = 3 * (b * n + first);
        const scalar_t* cloud = point + b * m * 3;
        if (!clouds[b].usable) {
          three_nearest(query + row, std::min(W, n - first), cloud, sizes[b], d + row, i + row);
          continue;
        }
        for (int64_t place = first; place < std::min(first + W, n); ++place) {
          const int64_t at = 3 * (b * n + clouds[b].query[place]);
          if (place >= clouds[b].reachable) {
            three_nearest(query + at, 1, cloud, sizes[b], d + at, i + at);
            continue;
          }
          search.nearest(clouds[b], place, query + at, 3, d + at, i + at);
          for (int64_t j = 0; j < 3; ++j) d[at + j] = std::sqrt(d[at + j]);
        }
      }
    });
  });
  return {distance, idx};
}

// ----------------------------------------------------------------------------------------- knn
//
// Two steps per block of queries. First every point gets a score, which is its squared distance
// minus |q|², up to an error that is known: a small matrix product over tiles of points (exact
// differences where there are at most 4 dimensions). Then, row by row, the minima of a few groups of
// scores give a bound on the k-th smallest; only points below it (a handful more than k) are looked
// at again, with exact distances, and sorted. The M × N matrix is never held: a block of rows is.

constexpr int64_t kDirectDims = 4;  // up to here differences cost no more than a product
constexpr int64_t kTileVectors = 3;  // 4 queries × 3 vectors of accumulators fill 16 registers
constexpr int64_t kTileQueries = 4;
constexpr int64_t kRowBytes = 128 << 10;  // of scores per block of queries: they stay in the L2 cache

// The twin's sum of squared differences: eight interleaved partial sums, then a fixed tree.
template <typename T>
inline T exact_distance(const T* a, const T* b, int64_t dims) {
  constexpr int64_t W = width<T>;
  T lane[8];
  if constexpr (W == 8) {
    Vec<T> total{};
    int64_t d = 0;
    for (; d + 8 <= dims; d += 8) {
      const Vec<T> difference = load(a + d) - load(b + d);
      total += difference * difference;
    }
    store(lane, total);
    for (; d < dims; ++d) lane[d & 7] += (a[d] - b[d]) * (a[d] - b[d]);
  } else {
    Vec<T> low{}, high{};
    int64_t d = 0;
    for (; d + 8 <= dims; d += 8) {
      const Vec<T> first = load(a + d) - load(b + d), second = load(a + d + 4) - load(b + d + 4);
      low += first * first;
      high += second * second;
    }
    store(lane, low);
    store(lane + 4, high);
    for (; d < dims; ++d) lane[d & 7] += (a[d] - b[d]) * (a[d] - b[d]);
  }
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// A cloud in tiles: [tile][dimension][kTileVectors · W], as the product reads it.
template <typename T>
struct Tiles {
  static constexpr int64_t points = kTileVectors * width<T>;
  int64_t n, dims, count;
  const T* value;
  const T* norm;    // |p − centre|², infinity in the padding
  const T* centre;  // of the cloud: taking it off keeps the products' rounding error small
  T radius;         // max |p − centre|
};

template <typename T>
void make_tiles(const T* cloud, int64_t n, int64_t dims, bool direct, int64_t count, T* value, T* norm, T* centre,
                T* radius) {
  constexpr int64_t P = Tiles<T>::points;
  std::vector<double> mean(dims, 0.0);
  if (!direct) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t d = 0; d < dims; ++d) mean[d] += static_cast<double>(cloud[j * dims + d]);
  }
  for (int64_t d = 0; d < dims; ++d) {
    const double m = mean[d] / static_cast<double>(n);
    centre[d] = std::isfinite(m) ? static_cast<T>(m) : T(0);
  }
  T largest = 0;
  const T filling = direct ? std::numeric_limits<T>::infinity() : T(0);
  for (int64_t tile = 0; tile < count; ++tile) {
    T* out = value + tile * dims * P;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t j = tile * P + p;
      T sum = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const T v = j < n ? cloud[j * dims + d] - centre[d] : filling;
        out[d * P + p] = v;
        sum += v * v;
      }
      norm[j] = j < n ? sum : std::numeric_limits<T>::infinity();
      if (j < n && !(sum <= largest)) largest = sum;  // a NaN stays, and makes every bound useless
    }
  }
  *radius = std::sqrt(largest);
}

// Scores of kTileQueries queries against one tile, by differences.
template <typename T, int64_t D>
inline void scores_direct(const T* tile, const T* query, T* out, int64_t stride) {
  constexpr int64_t W = width<T>, P = Tiles<T>::points;
  for (int64_t v = 0; v < kTileVectors; ++v) {
    Vec<T> p[D];
    for (int64_t d = 0; d < D; ++d) p[d] = load(tile + d * P + v * W);
    for (int64_t q = 0; q < kTileQueries; ++q) {
      Vec<T> term[4] = {};
      for (int64_t d = 0; d < D; ++d) {
        const Vec<T> difference = query[q * D + d] - p[d];
        term[d] = difference * difference;
      }
      Vec<T> sum = term[0];
      if constexpr (D > 1) sum = sum + term[1];
      if constexpr (D == 3) sum = sum + term[2];
      if constexpr (D == 4) sum = sum + (term[2] + term[3]);
      store(out + q * stride + v * W, sum);
    }
  }
}

// The same by products: |p|² − 2 q·p.
template <typename T>
inline void scores_product(const T* tile, const T* norm, const T* query, int64_t dims, T* out, int64_t stride) {
  constexpr int64_t W = width<T>, P = Tiles<T>::points;
  Vec<T> dot[kTileQueries][kTileVectors] = {};
  for (int64_t d = 0; d < dims; ++d) {
    Vec<T> p[kTileVectors];
    for (int64_t v = 0; v < kTileVectors; ++v) {
      p[v] = load(tile + d * P + v * W);
#if defined(__AVX__)
      // Kept in a register: GCC would fold the load into all four products, and loads would be the limit.
      asm("" : "+x"(p[v]));
#endif
    }
    for (int64_t q = 0; q < kTileQueries; ++q) {
      const Vec<T> x = splat(query[q * dims + d]);
      for (int64_t v = 0; v < kTileVectors; ++v) dot[q][v] = fma(x, p[v], dot[q][v]);
    }
  }
  for (int64_t q = 0; q < kTileQueries; ++q)
    for (int64_t v = 0; v < kTileVectors; ++v)
      store(out + q * stride + v * W, load(norm + v * W) - T(2) * dot[q][v]);
}

// Writes the k smallest of the candidates (listed by ascending index), ties to the lower index.
template <typename T>
void write_sorted(std::vector<T>& distance, const std::vector<int32_t>& candidate, int64_t count, int64_t k,
                  std::vector<std::pair<T, int32_t>>& pairs, T* out, int64_t* idx) {
  constexpr int64_t W = width<T>;
  using Int = typename Types<T>::Int;
  if (count <= 96) {
    // each candidate's place is the number of those before it: c²/W comparisons and no branch
    const int64_t padded = round_up(count, W);
    for (int64_t i = count; i < padded; ++i) distance[i] = std::numeric_limits<T>::infinity();
    Mask<T> lanes;
    for (int64_t l = 0; l < W; ++l) lanes[l] = static_cast<Int>(l);
    for (int64_t i = 0; i < count; i += W) {
      const Vec<T> mine = load(distance.data() + i);
      const Mask<T> here = lanes + static_cast<Int>(i);
      Mask<T> rank{};
      int64_t j = 0;
      for (; j < i; ++j) rank -= splat(distance[j]) <= mine;
      for (; j < std::min(i + W, count); ++j) {
        const Vec<T> other = splat(distance[j]);
        rank -= (other < mine) | ((other == mine) & (Mask<T>{} + static_cast<Int>(j) < here));
      }
      for (; j < count; ++j) rank -= splat(distance[j]) < mine;
      for (int64_t l = 0; l < std::min(W, count - i); ++l) {
        if (rank[l] < k) out[rank[l]] = mine[l], idx[rank[l]] = candidate[i + l];
      }
    }
    return;
  }
  pairs.resize(count);
  for (int64_t i = 0; i < count; ++i) pairs[i] = {distance[i], candidate[i]};
  std::nth_element(pairs.begin(), pairs.begin() + (k - 1), pairs.end());
  std::sort(pairs.begin(), pairs.begin() + k);
  for (int64_t i = 0; i < k; ++i) out[i] = pairs[i].first, idx[i] = pairs[i].second;
}

template <typename T>
class BlockSearch {
 public:
  BlockSearch(int64_t n, int64_t dims, int64_t k, int64_t rows)
      : dims_(dims), k_(k), padded_(round_up(n, Tiles<T>::points)), scores_(rows * padded_),
        centred_(rows * dims), distance_(padded_ + width<T>), candidate_(padded_) {}

  // queries: rows × dims, as given; cloud: n × dims, as given.
  void run(const Tiles<T>& tiles, const T* cloud, const T* queries, int64_t rows, T* out, int64_t* idx) {
    const bool direct = dims_ <= kDirectDims;
    const int64_t padded_rows = round_up(rows, kTileQueries);
    for (int64_t r = 0; r < padded_rows; ++r) {
      const T* query = queries + std::min(r, rows - 1) * dims_;
      for (int64_t d = 0; d < dims_; ++d) centred_[r * dims_ + d] = direct ? query[d] : query[d] - tiles.centre[d];
    }
    for (int64_t t = 0; t < tiles.count; ++t) {
      const T* tile = tiles.value + t * dims_ * Tiles<T>::points;
      for (int64_t r = 0; r < padded_rows; r += kTileQueries) {
        T* target = scores_.data() + r * padded_ + t * Tiles<T>::points;
        const T* query = centred_.data() + r * dims_;
        switch (direct ? dims_ : 0) {
          case 1: scores_direct<T, 1>(tile, query, target, padded_); break;
          case 2: scores_direct<T, 2>(tile, query, target, padded_); break;
          case 3: scores_direct<T, 3>(tile, query, target, padded_); break;
          case 4: scores_direct<T, 4>(tile, query, target, padded_); break;
          default:
            scores_product(tile, tiles.norm + t * Tiles<T>::points, query, dims_, target, padded_);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      select(tiles, cloud, queries + r * dims_, centred_.data() + r * dims_, scores_.data() + r * padded_,
             out + r * k_, idx + r * k_);
    }
  }

 private:
  void select(const Tiles<T>& tiles, const T* cloud, const T* query, const T* centred, const T* score, T* out,
              int64_t* idx) {
    constexpr int64_t W = width<T>;
    const bool direct = dims_ <= kDirectDims;
    const int64_t k = std::min(k_, tiles.n);
    T limit = kth_bound(score, padded_, k, minima_);
    if (!direct) {
      // A score's error is at most e = (1.125 D + 14) u (|q| + max |p|)², u half the epsilon: D terms
      // in |p|² and in q·p, the rounding of the centred coordinates, of the sum and of the exact
      // distance; 1.5 D + 24 leaves room for second order. Two points are told apart beyond 2 e.
      T norm = 0;
      for (int64_t d = 0; d < dims_; ++d) norm += centred[d] * centred[d];
      const T reach = std::sqrt(norm) + tiles.radius;
      const T unit = std::numeric_limits<T>::epsilon() / 2;
      limit += 2 * unit * (T(1.5) * static_cast<T>(dims_) + 24) * reach * reach + std::numeric_limits<T>::min();
    }
    int64_t count = 0;
    const Vec<T> bound = splat(limit);
    int64_t j = 0;
    for (; j + 2 * W <= padded_; j += 2 * W) {  // negated: a NaN is looked at again
      unsigned hit = bits(~(load(score + j) > bound)) | bits(~(load(score + j + W) > bound)) << W;
      for (; hit; hit &= hit - 1) candidate_[count++] = static_cast<int32_t>(j + __builtin_ctz(hit));
    }
    for (; j < padded_; j += W) {
      unsigned hit = bits(~(load(score + j) > bound));
      for (; hit; hit &= hit - 1) candidate_[count++] = static_cast<int32_t>(j + __builtin_ctz(hit));
    }
    while (count && candidate_[count - 1] >= tiles.n) --count;  // the padding stands last
    for (int64_t c = 0; c < count; ++c) {
      const T d = direct ? score[candidate_[c]] : exact_distance(query, cloud + candidate_[c] * dims_, dims_);
      distance_[c] = d == d ? d : std::numeric_limits<T>::infinity();
    }
    write_sorted(distance_, candidate_, count, k, pairs_, out, idx);
    if (k < k_) {
      std::fill(out + k, out + k_, std::numeric_limits<T>::infinity());
      std::fill(idx + k, idx + k_, 0);
    }
  }

  int64_t dims_, k_, padded_;
  std::vector<T> scores_, centred_, distance_, minima_;
  std::vector<int32_t> candidate_;
  std::vector<std::pair<T, int32_t>> pairs_;
};

std::tuple<at::Tensor, at::Tensor> knn(const at::Tensor& queries, const at::Tensor& points, int64_t k,
                                       const std::optional<at::Tensor>& lengths) {
  check_knn(queries, points, k, lengths);
  const at::Tensor rows = queries.contiguous(), clouds = points.contiguous();
  const int64_t batch = clouds.size(0), n = clouds.size(1), dims = clouds.size(2), m = rows.size(1);
  const std::vector<int64_t> sizes = cloud_sizes("knn", lengths, batch, n);
  at::Tensor distance = at::empty({batch, m, k}, rows.options());
  at::Tensor idx = at::empty({batch, m, k}, rows.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "knn", [&] {
    constexpr int64_t P = Tiles<scalar_t>::points;
    const scalar_t *query = rows.const_data_ptr<scalar_t>(), *cloud = clouds.const_data_ptr<scalar_t>();
    scalar_t* d = distance.mutable_data_ptr<scalar_t>();
    int64_t* i = idx.mutable_data_ptr<int64_t>();
    prefer_large_pages(d, distance.nbytes()), prefer_large_pages(i, idx.nbytes());
    std::vector<SearchedCloud<scalar_t>> trees(batch);
    if (dims == 3) trees = make_trees(kListTree, cloud, query, sizes, n, m, k);
    // tiles for the clouds without a tree, and for queries that are out of its reach
    std::vector<int64_t> tiled_at(batch, -1);
    int64_t tiled_count = 0;
    for (int64_t b = 0; b < batch; ++b) {
      if (!trees[b].usable || trees[b].reachable < m) tiled_at[b] = tiled_count++;
    }
    const int64_t padded = round_up(n, P);
    const at::Tensor tiled = at::empty({tiled_count, padded, dims}, rows.options());
    const at::Tensor norms = at::empty({tiled_count, padded}, rows.options());
    const at::Tensor centres = at::empty({tiled_count, dims}, rows.options());
    std::vector<Tiles<scalar_t>> tiles(batch);
    scalar_t *value = tiled.mutable_data_ptr<scalar_t>(), *norm = norms.mutable_data_ptr<scalar_t>();
    scalar_t* centre = centres.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = tiled_at[b];
        if (at < 0) continue;
        tiles[b] = {sizes[b], dims, padded / P, value + at * padded * dims, norm + at * padded, centre + at * dims, 0};
        make_tiles(cloud + b * n * dims, sizes[b], dims, dims <= kDirectDims, padded / P, value + at * padded * dims,
                   norm + at * padded, centre + at * dims, &tiles[b].radius);
      }
    });
    const int64_t fitting = kRowBytes / static_cast<int64_t>(sizeof(scalar_t)) / padded;
    const int64_t block = std::clamp(fitting / kTileQueries * kTileQueries, kTileQueries, int64_t{64});
    const int64_t blocks = (m + block - 1) / block;
    at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      std::optional<BlockSearch<scalar_t>> all;
      TreeSearch<scalar_t> near;
      const auto search_all = [&](int64_t b, int64_t first, int64_t count) {
        if (!all) all.emplace(n, dims, k, block);
        const int64_t row = b * m + first;
        all->run(tiles[b], cloud + b * n * dims, query + row * dims, count, d + row * k, i + row * k);
      };
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * block, last = std::min(first + block, m);
        if (!trees[b].usable) {
          search_all(b, first, last - first);
          continue;
        }
        for (int64_t place = first; place < last; ++place) {
          const int64_t q = trees[b].query[place], row = b * m + q;
          if (place >= trees[b].reachable) {
            search_all(b, q, 1);
          } else {
            near.nearest(trees[b], place, query + row * 3, k, d + row * k, i + row * k);
          }
        }
      }
    });
  });
  return {distance, idx};
}

}  // namespace

TORCH_LIBRARY_IMPL(pointcmt, CPU, m) {
  m.impl("ball_query", &ball_query);
  m.impl("three_nn", &three_nn);
  m.impl("knn", &knn);
}

}  // namespace pointcmt
