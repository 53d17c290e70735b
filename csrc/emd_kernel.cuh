// EMD on a GPU: what one thread block does for one pair of clouds.
//
// The algorithm is emd_auction.h's, but for the bids: in every round those points of x that have waited longest
// bid at once, one by a warp or by several, and every point of y goes to its highest bidder. Rounds, sweeps,
// phases and the certificate all happen inside the block, so a batch is one launch and the host never waits.
// All of it is float32: where that does not resolve the tolerance, the bound that is returned says so.
//
// The code needs nothing of CUDA but blocks, warps and their intrinsics; tests/cuda_on_cpu/ supplies these on
// a CPU, so that the logic is tested on machines without a GPU.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "emd_constants.h"

namespace pointcmt::emd::device {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kNoObject = 0x7fffffff;
// After this many rounds of "nearest free point", leftovers are matched by index: a crowd of equal
// points agrees on one nearest point in each round, which would make the completion cubic in N.
constexpr int kCompletionRounds = 32;

using Key = unsigned long long;

struct Candidate {
  float best, second;
  int object;
};

// The arrays of one pair, in shared memory or, where it is too small, in a workspace.
struct Arrays {
  float4* objects;  // points of y and their price
  float4* bidders;  // points of x
  Key* key;         // highest bid so far: price bits above, complement of the bidder below
  int* owner;       // by object: its bidder, or -1
  int* holds;       // by bidder: its object, or -1; only after find_holds()
  int* choice;      // by bidder: the object that a path goes on to; by place in a list: the object bid for
  int* queue;       // unmatched bidders, a ring
  int* order;       // a second list of bidders
};

constexpr size_t kObjectBytes = sizeof(float4);
constexpr size_t kOtherBytes = sizeof(float4) + sizeof(Key) + 5 * sizeof(int);

__host__ __device__ inline Arrays carve(char* objects, char* others, int n) {
  Arrays a;
  a.objects = reinterpret_cast<float4*>(objects);
  a.bidders = reinterpret_cast<float4*>(others);
  a.key = reinterpret_cast<Key*>(a.bidders + n);
  a.owner = reinterpret_cast<int*>(a.key + n);
  a.holds = a.owner + n;
  a.choice = a.holds + n;
  a.queue = a.choice + n;
  a.order = a.queue + n;
  return a;
}

// Fixed-size shared memory of a block.
struct Scratch {
  double reduced[kMaxWarps];
  Candidate partial[kMaxWarps];
  Key least[2][kMaxWarps];
  int waiting[2];  // bidders in the queue in round r at [r % 2]
  int won[2];      // how many of the bids of the round before were the highest
};

template <typename scalar_t>
struct Problem {
  const scalar_t *x, *y;    // [N, 3]
  scalar_t* distance;       // one
  scalar_t* bound;          // one
  int64_t* assignment;      // [N]
  int64_t* statistics;      // [kStatistics]
  int n;
  double tolerance;
  int64_t most;             // rows
};

__device__ __forceinline__ float root(float v) {
#ifdef __CUDA_ARCH__
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return std::sqrt(v);
#endif
}

__device__ __forceinline__ float between(const float4& a, const float4& b) {
  const float u = a.x - b.x, v = a.y - b.y, w = a.z - b.z;
  return root(u * u + v * v + w * w);
}

__device__ __forceinline__ unsigned warp_min(unsigned v) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAllLanes, v);
#else
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, v, offset);
    v = other < v ? other : v;
  }
  return v;
#endif
}

// Cheapest and second cheapest of objects start, start + step, ... for a bidder. Objects are counted
// from the bidder's own number on, and so is c.object: among equally cheap ones each bidder prefers
// another one, where the lowest number would send a crowd of equal points to the same object.
__device__ __forceinline__ Candidate scan(const float4* objects, int n, const float4& from, int bidder,
                                          int start, int step) {
  Candidate c{INFINITY, INFINITY, kNoObject};
#pragma unroll 4
  for (int k = start; k < n; k += step) {
    const int j = k + bidder;
    const float4 to = objects[j < n ? j : j - n];
    const float value = between(from, to) + to.w;
    c.second = fminf(c.second, fmaxf(c.best, value));
    c.object = value < c.best ? k : c.object;
    c.best = fminf(c.best, value);
  }
  return c;
}

// One candidate from a warp's 32; all values are non-negative, so their bits compare as they do.
__device__ __forceinline__ Candidate merge_warp(const Candidate& c) {
  const unsigned best = warp_min(__float_as_uint(c.best));
  const unsigned object = warp_min(__float_as_uint(c.best) == best ? unsigned(c.object) : 0xffffffffu);
  const float second = unsigned(c.object) == object ? c.second : c.best;
  return {__uint_as_float(best), __uint_as_float(warp_min(__float_as_uint(second))), int(object)};
}

__device__ __forceinline__ Candidate merge_two(const Candidate& a, const Candidate& b) {
  const bool first = a.best < b.best || (a.best == b.best && a.object < b.object);
  const Candidate &low = first ? a : b, &high = first ? b : a;
  return {low.best, fminf(low.second, high.best), low.object};
}

__device__ __forceinline__ Key pack(unsigned rank, int bidder) {
  return (Key(rank) << 32) | Key(~unsigned(bidder));  // among equal bids the lowest bidder is highest
}

__device__ __forceinline__ bool won(Key key, int bidder) { return unsigned(key) == ~unsigned(bidder); }

// The price a bidder offers: where the second cheapest would be as good, plus eps. Always a rise:
// rounding must not let two bidders alternate for ever, and keys rely on prices that only rise.
__device__ __forceinline__ unsigned offer(const Candidate& c, float price, float eps) {
  const float second = c.second < INFINITY ? c.second : c.best;
  const unsigned raised = __float_as_uint(price + (second - c.best + eps));
  const unsigned current = __float_as_uint(price);
  return raised > current ? raised : current + 1;
}

struct Plus {
  __device__ double operator()(double u, double v) const { return u + v; }
};
struct Least {
  __device__ double operator()(double u, double v) const { return u < v ? u : v; }
};
struct Most {
  __device__ double operator()(double u, double v) const { return u > v ? u : v; }
};

template <typename Op>
__device__ double reduce(double v, Scratch& s, Op op) {
  for (int offset = 16; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(kAllLanes, v, offset));
  if (threadIdx.x % 32 == 0) s.reduced[threadIdx.x / 32] = v;
  __syncthreads();
  v = s.reduced[0];
  for (int w = 1; w < int(blockDim.x) / 32; ++w) v = op(v, s.reduced[w]);
  __syncthreads();
  return v;
}

template <typename scalar_t>
class Block {
 public:
  __device__ Block(const Problem<scalar_t>& problem, const Arrays& arrays, Scratch& scratch)
      : p(problem), a(arrays), s(scratch), n(problem.n), thread(threadIdx.x), threads(blockDim.x),
        lane(threadIdx.x % 32), warp(threadIdx.x / 32), warps(blockDim.x / 32) {}

  __device__ void run() {
    if (!normalise()) {
      for (int i = thread; i < n; i += threads) p.assignment[i] = i;
      if (thread == 0) {
        *p.distance = *p.bound = scalar_t(NAN);
        for (int k = 0; k < kStatistics; ++k) p.statistics[k] = 0;
      }
      return;
    }
    double bound = 0;
    const bool done = solve(bound);
    const int completed = waiting();
    if (completed > 0) complete();
    __syncthreads();
    finish(bound, completed, !done && rows >= p.most);
  }

 private:
  // As Auction::run on the CPU, this being the last resort.
  __device__ bool solve(double& bound) {
    double eps = fmax(kFirstEps * spread, kLeastEps);
    double aim = start_near(eps);
    bool certified = false;  // bidders' w is what is cheapest to them, and all have an object
    for (bool least = false; !least;) {
      if (const double floor = kFloorFloat * level(); eps < floor) {
        least = true;
        eps = aim = floor;
      }
      begin_phase(float(eps), certified);
      const bool last = eps <= aim;
      bid(float(eps), last || sweeps > 0 ? 0 : n / kUnmatchedFraction);
      if (rows >= p.most) return false;
      const double sum = total();
      if (sum == 0) return true;
      certified = last;
      if (last) {
        bound = fmax(bound, certify());
        if (sum - bound <= p.tolerance * sum) return true;
        if (rows >= p.most) return false;
        eps *= fmin(fmax(kCaution * p.tolerance * sum / (sum - bound), 1 / (2 * kEpsFactor)), 0.5);
        aim = eps;
      } else {
        const int left = waiting();
        aim = kTightness * p.tolerance * sum / (left < n ? n - left : 1);
        eps = fmax(eps / kEpsFactor, fmin(aim, eps / 1.5));
      }
    }
    return false;
  }

  __device__ double framed(double v, double centre) const { return (v / 2 - centre / 2) / (scale / 2); }

  // Both clouds in one frame in which float32 serves any input; see Pair::normalise in emd_auction.h.
  __device__ bool normalise() {
    bool finite = true;
    double centre[3], means[2][3], reach = 0;
    for (int d = 0; d < 3; ++d) {
      double low = DBL_MAX, high = -DBL_MAX;
      for (int cloud = 0; cloud < 2; ++cloud) {
        const scalar_t* points = cloud == 0 ? p.x : p.y;
        double mean = 0;
        for (int i = thread; i < n; i += threads) {
          const double v = points[3 * size_t(i) + d];
          finite = finite && v - v == 0;
          mean += v / n;
          low = fmin(low, v);
          high = fmax(high, v);
        }
        means[cloud][d] = reduce(mean, s, Plus());
      }
      low = reduce(low, s, Least());
      high = reduce(high, s, Most());
      centre[d] = fmin(fmax(means[0][d] / 2 + means[1][d] / 2, low), high);  // rounding may have left the box
      reach = fmax(reach, high / 2 - low / 2);  // halves: high - low may overflow
    }
    if (__syncthreads_or(!finite)) return false;
    scale = fmax(2 * reach, DBL_MIN);
    if (!(scale <= DBL_MAX)) scale = DBL_MAX;
    for (int cloud = 0; cloud < 2; ++cloud) {
      const scalar_t* points = cloud == 0 ? p.x : p.y;
      float4* placed = cloud == 0 ? a.bidders : a.objects;
      double sum = 0;
      for (int i = thread; i < n; i += threads) {
        float to[3];
        double square = 0;
        for (int d = 0; d < 3; ++d) {
          const double v = framed(points[3 * size_t(i) + d], centre[d]);
          const double e = v - framed(means[cloud][d], centre[d]);
          to[d] = float(v);
          square += e * e;
        }
        placed[i] = make_float4(to[0], to[1], to[2], 0.f);
        sum += sqrt(square);
      }
      spread = fmax(spread, reduce(sum, s, Plus()) / n);
    }
    if (thread == 0) s.waiting[0] = n;
    __syncthreads();
    return true;
  }

  __device__ int waiting() const { return s.waiting[round % 2]; }
  __device__ int* queued(int slot) const { return a.queue + (head + slot) % n; }

  __device__ int number(int from_bidder, int bidder) const {
    const int j = from_bidder + bidder;
    return j < n ? j : j - n;
  }

  // How much rounding may have raised what is cheapest; see Auction::margin.
  __device__ double margin(int bidder, double best) const {
    const float4& from = a.bidders[bidder];
    return FLT_EPSILON * (8 * best + 2 * (fabs(double(from.x)) + fabs(double(from.y)) + fabs(double(from.z))));
  }

  __device__ float length(int bidder, int object) const { return between(a.bidders[bidder], a.objects[object]); }

  __device__ double lowest_price() {
    double lowest = DBL_MAX;
    for (int j = thread; j < n; j += threads) lowest = fmin(lowest, double(a.objects[j].w));
    return reduce(lowest, s, Least());
  }

  // The mean price above the lowest one.
  __device__ double level() {
    double sum = 0;
    for (int j = thread; j < n; j += threads) sum += double(a.objects[j].w);
    return reduce(sum, s, Plus()) / n - lowest_price();
  }

  // At least what the matching costs, rounding considered; 0 where all points are matched to their like.
  __device__ double total() {
    double sum = 0, rounding = 0;
    for (int j = thread; j < n; j += threads) {
      if (a.owner[j] < 0) continue;
      const double cost = length(a.owner[j], j);
      sum += cost;
      rounding += margin(a.owner[j], cost);
    }
    sum = reduce(sum, s, Plus());
    rounding = reduce(rounding, s, Plus());
    return sum > 0 || waiting() > 0 ? sum + rounding : 0;
  }

  // A lower bound of the sum over all matchings; leaves in bidders' w what is cheapest to them.
  __device__ double certify() {
    double paid = 0, prices = 0;
    for (int i = warp; i < n; i += warps) {
      const Candidate c = merge_warp(scan(a.objects, n, a.bidders[i], i, lane, 32));
      __syncwarp();  // every lane has read the bidder
      if (lane == 0) {
        a.bidders[i].w = c.best;
        paid += double(c.best) - margin(i, c.best);
      }
    }
    for (int j = thread; j < n; j += threads) prices += double(a.objects[j].w);
    rows += n;
    return reduce(paid, s, Plus()) - reduce(prices, s, Plus());
  }

  // See Auction::start_near.
  __device__ double start_near(double& eps) {
    const int step = n / kSample > 1 ? n / kSample : 1, count = (n + step - 1) / step;
    double nearest = 0, apart = 0, mutual = 0;
    for (int k = warp; k < count; k += warps) {
      const int i = k * step;
      const Candidate c = merge_warp(scan(a.objects, n, a.bidders[i], i, lane, 32));
      const int object = number(c.object, i);
      const float own = length(i, object);
      bool closest = 2 * c.best < c.second;
      for (int other = lane; other < n; other += 32) {
        closest = closest && (other == i || length(other, object) > 2 * own);
      }
      closest = __ballot_sync(kAllLanes, !closest) == 0;
      if (lane == 0) {
        nearest += double(c.best);
        apart += c.second < INFINITY ? double(c.second) - double(c.best) : 0;
        mutual += closest;
      }
    }
    rows += 2 * count;
    nearest = reduce(nearest, s, Plus());
    apart = reduce(apart, s, Plus());
    mutual = reduce(mutual, s, Plus());
    if (16 * mutual < 15 * count) return 0;
    eps = fmin(eps, fmax(kTightness * p.tolerance * nearest, apart / 4) / count);
    return eps;
  }

  __device__ void find_holds() {
    __syncthreads();
    for (int i = thread; i < n; i += threads) a.holds[i] = -1;
    __syncthreads();
    for (int j = thread; j < n; j += threads) {
      if (a.owner[j] >= 0) a.holds[a.owner[j]] = j;
    }
    __syncthreads();
  }

  __device__ void keys_from_prices() {
    for (int j = thread; j < n; j += threads) a.key[j] = Key(__float_as_uint(a.objects[j].w)) << 32;
    __syncthreads();
  }

  // See Auction::begin_phase; `certified` where certify() came before, else nobody keeps anything.
  __device__ void begin_phase(float eps, bool certified) {
    if (certified) find_holds();
    const float lowest = float(lowest_price());
    for (int j = thread; j < n; j += threads) {
      a.objects[j].w -= lowest;
      if (!certified) a.owner[j] = -1;
    }
    __syncthreads();
    head = 0;
    if (warp == 0) {  // in order, for who bids together must not depend on the order of threads
      int listed = 0;
      for (int first = 0; first < n; first += 32) {
        const int i = first + lane;
        bool free = i < n;
        if (free && certified) {
          const int held = a.holds[i];
          free = !(length(i, held) + a.objects[held].w <= a.bidders[i].w - lowest + eps);
          if (free) a.owner[held] = -1;
        }
        const unsigned ballot = __ballot_sync(kAllLanes, free);
        if (free) a.queue[listed + __popc(ballot & ((1u << lane) - 1))] = i;
        listed += __popc(ballot);
      }
      if (lane == 0) s.waiting[round % 2] = listed;
    }
    keys_from_prices();
  }

  __device__ void bid(float eps, int enough) {
    int64_t since = 0;
    while (waiting() > enough && rows < p.most) {
      if (since >= (sweeps > 0 ? kBidsLater : kBidsFirst) * n) {
        sweep(eps);
        since = 0;
        continue;
      }
      const int won = bid_round(eps);  // bids that lost took no time of their own
      since += won;
      rows += won;
    }
  }

  __device__ Key least_of_block(Key mine, int step) {
    for (int offset = 16; offset > 0; offset /= 2) {
      const Key other = __shfl_xor_sync(kAllLanes, mine, offset);
      mine = other < mine ? other : mine;
    }
    Key* least = s.least[step & 1];  // in turns: one barrier a step is enough
    if (lane == 0) least[warp] = mine;
    __syncthreads();
    mine = least[0];
    for (int w = 1; w < warps; ++w) mine = least[w] < mine ? least[w] : mine;
    return mine;
  }

  // See Auction::sweep. The keys' place holds, until it is over, the lengths of paths; bidders' w what a step's
  // length counts from.
  struct Way {
    float length;  // by bidder: of the path to a free object that is the shortest so far
    float rise;    // by object: by how much its price will rise; -1 where it is not reached yet
  };
  static_assert(sizeof(Way) == sizeof(Key));

  __device__ void sweep(float eps) {
    ++sweeps;
    const int count = waiting();
    find_holds();
    Way* way = reinterpret_cast<Way*>(a.key);
    for (int slot = warp; slot < count; slot += warps) {
      const int bidder = *queued(slot);
      const Candidate c = merge_warp(scan(a.objects, n, a.bidders[bidder], bidder, lane, 32));
      __syncwarp();
      if (lane == 0) a.bidders[bidder].w = c.best;
    }
    for (int i = thread; i < n; i += threads) {
      const int held = a.holds[i];
      if (held >= 0) a.bidders[i].w = length(i, held) + a.objects[held].w - eps;
      way[i].rise = a.owner[i] < 0 ? 0.f : -1.f;
    }
    __syncthreads();
    Key mine = ~Key(0);
    for (int i = thread; i < n; i += threads) {
      float shortest = INFINITY;
      for (int j = 0; j < n; ++j) {
        if (a.owner[j] >= 0) continue;
        const float found = fmaxf(length(i, j) + a.objects[j].w - a.bidders[i].w, 0.f);
        if (found < shortest) {
          shortest = found;
          a.choice[i] = j;
        }
      }
      way[i].length = shortest;
      mine = nearer(mine, shortest, i);
    }
    rows += 2 * count;
    int left = count, settled = 0;
    float reached = 0;
    for (int step = 0; left > 0; ++step) {
      const Key least = least_of_block(mine, step);
      const int bidder = int(unsigned(least)), held = a.holds[bidder];
      reached = fmaxf(reached, __uint_as_float(unsigned(least >> 32)));
      if (thread == bidder % threads) {
        way[bidder].length = INFINITY;
        a.bidders[bidder].w = -INFINITY;
      }
      if (held < 0) {
        if (thread == 0) a.order[settled] = bidder;
        ++settled;
        --left;
      } else {
        if (thread == 0) way[held].rise = reached;
        ++rows;
      }
      mine = ~Key(0);
      for (int i = thread; i < n; i += threads) {
        float shortest = way[i].length;
        if (held >= 0) {
          const float found = fmaxf(length(i, held) + (a.objects[held].w + reached) - a.bidders[i].w, 0.f);
          if (found < shortest) {
            way[i].length = shortest = found;
            a.choice[i] = held;
          }
        }
        mine = nearer(mine, shortest, i);
      }
    }
    __syncthreads();
    for (int j = thread; j < n; j += threads) {
      const float rise = way[j].rise;
      a.objects[j].w += rise >= 0 ? rise : reached;
      way[j].length = 0;  // from here on: 1 where an object lies on a path that is taken
    }
    __syncthreads();
    if (thread == 0) {
      int still = 0;
      for (int k = 0; k < count; ++k) {
        const int first = a.order[k];
        if (!take_path(first, way)) a.queue[still++] = first;
      }
      s.waiting[round % 2] = still;
    }
    head = 0;
    __syncthreads();
    keys_from_prices();
  }

  __device__ static Key nearer(Key key, float length, int bidder) {
    const Key other = length < INFINITY ? (Key(__float_as_uint(length)) << 32) | unsigned(bidder) : ~Key(0);
    return other < key ? other : key;
  }

  // Matches along a bidder's path, unless it meets one that is taken.
  __device__ bool take_path(int first, Way* way) {
    for (int i = first;;) {
      const int object = a.choice[i];
      if (way[object].length > 0) return false;
      if (a.owner[object] < 0) break;
      i = a.owner[object];
    }
    for (int i = first; i >= 0;) {
      const int object = a.choice[i], previous = a.owner[object];
      way[object].length = 1;
      a.owner[object] = i;
      i = previous;
    }
    return true;
  }

  // Who won holds the object; who lost, or was outbid, waits for the next round.
  __device__ int settle(int bidder, int object, bool completing) {
    const Key key = a.key[object];
    if (!won(key, bidder)) return bidder;
    const int previous = a.owner[object];
    a.owner[object] = bidder;
    a.objects[object].w = completing ? INFINITY : __uint_as_float(unsigned(key >> 32));
    return previous;
  }

  // Those who have waited longest bid, one by each warp, or by several where only a few wait: their latency is the
  // run time. Returns how many won. That not all bid at once, who may all want the same, saves most of the bids.
  __device__ int bid_round(float eps) {
    const int count = waiting(), bidding = count < warps ? count : warps;
    int group = 1;  // warps per bidder, a power of two
    while (2 * group * bidding <= warps) group *= 2;
    const int slot = warp / group;
    if (slot < bidding) {
      const int bidder = *queued(slot);
      const Candidate c = merge_warp(
          scan(a.objects, n, a.bidders[bidder], bidder, (warp % group) * 32 + lane, 32 * group));
      if (lane == 0) s.partial[warp] = c;
    }
    __syncthreads();
    if (warp == 0) {
      const int mine = lane / group;
      Candidate c = lane < warps && mine < bidding ? s.partial[lane] : Candidate{INFINITY, INFINITY, kNoObject};
      for (int offset = 1; offset < group; offset *= 2) {
        const Candidate other{__shfl_xor_sync(kAllLanes, c.best, offset),
                              __shfl_xor_sync(kAllLanes, c.second, offset),
                              __shfl_xor_sync(kAllLanes, c.object, offset)};
        c = merge_two(c, other);
      }
      const bool leader = lane % group == 0 && mine < bidding;
      const int bidder = leader ? *queued(mine) : 0;
      c.object = number(c.object, bidder);
      if (leader) atomicMax(&a.key[c.object], pack(offer(c, a.objects[c.object].w, eps), bidder));
      __syncwarp();
      const int left = leader ? settle(bidder, c.object, false) : -1;
      const unsigned ballot = __ballot_sync(kAllLanes, left >= 0);
      const unsigned winners = __ballot_sync(kAllLanes, leader && left != bidder);
      if (left >= 0) *queued(count + __popc(ballot & ((1u << lane) - 1))) = left;
      if (lane == 0) {
        s.waiting[(round + 1) % 2] = count - bidding + __popc(ballot);
        s.won[(round + 1) % 2] = __popc(winners);
      }
    }
    __syncthreads();
    head = (head + bidding) % n;
    ++round;
    return s.won[round % 2];
  }

  // The bound on work was met: each point left takes the nearest point that is free.
  __device__ void complete() {
    find_holds();
    for (int j = thread; j < n; j += threads) {
      a.objects[j].w = a.owner[j] < 0 ? 0.f : INFINITY;
      a.key[j] = 0;
    }
    if (thread == 0) s.waiting[0] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += threads) {
      if (a.holds[i] < 0) a.queue[atomicAdd(&s.waiting[0], 1)] = i;
    }
    __syncthreads();
    for (int k = 0; k < kCompletionRounds && s.waiting[k % 2] > 0; ++k) {
      const int count = s.waiting[k % 2];
      const int* now = k % 2 ? a.order : a.queue;
      int* next = k % 2 ? a.queue : a.order;
      for (int slot = warp; slot < count; slot += warps) {
        const int bidder = now[slot];
        Candidate c = merge_warp(scan(a.objects, n, a.bidders[bidder], bidder, lane, 32));
        c.object = number(c.object, bidder);
        if (lane == 0) {
          a.choice[slot] = c.object;
          atomicMax(&a.key[c.object], pack(~__float_as_uint(c.best), bidder));  // the nearest is highest
        }
      }
      if (thread == 0) s.waiting[(k + 1) % 2] = 0;
      __syncthreads();
      for (int slot = thread; slot < count; slot += threads) {
        const int left = settle(now[slot], a.choice[slot], true);
        if (left >= 0) next[atomicAdd(&s.waiting[(k + 1) % 2], 1)] = left;
      }
      __syncthreads();
    }
    find_holds();
    if (thread == 0) {
      for (int i = 0, j = 0; i < n; ++i) {
        if (a.holds[i] >= 0) continue;
        while (a.owner[j] >= 0) ++j;
        a.owner[j++] = i;
      }
    }
    __syncthreads();
  }

  __device__ double apart(int i, int64_t j) const {
    double square = 0;
    for (int d = 0; d < 3; ++d) {
      const double e = (double(p.x[3 * size_t(i) + d]) - double(p.y[3 * size_t(j) + d])) / scale;
      square += e * e;
    }
    return sqrt(square);
  }

  __device__ void finish(double bound, int completed, bool met) {
    double sum = 0;
    for (int j = thread; j < n; j += threads) {
      p.assignment[a.owner[j]] = j;
      sum += apart(a.owner[j], j);
    }
    const double mean = reduce(sum, s, Plus()) / n * scale;
    if (thread == 0) {
      *p.distance = scalar_t(mean);
      const double least = fmin(bound / n * scale, mean);
      scalar_t below = scalar_t(least);
      if (below > least) below = nextafter(below, scalar_t(0));  // still a lower bound
      *p.bound = below > 0 ? below : scalar_t(0);
      p.statistics[kRounds] = (rows + n - 1) / n;
      p.statistics[kRows] = rows;
      p.statistics[kCompleted] = completed;
      p.statistics[kBoundMet] = met;
      p.statistics[kSweeps] = sweeps;
    }
  }

  const Problem<scalar_t>& p;
  const Arrays& a;
  Scratch& s;
  const int n, thread, threads, lane, warp, warps;
  double scale = 1, spread = 0;
  int round = 0, head = 0;
  int64_t rows = 0, sweeps = 0;
};

}  // namespace pointcmt::emd::device
