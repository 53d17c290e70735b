// EMD on a GPU: what one thread block does for one pair of clouds.
//
// A Jacobi auction (Bertsekas 1988): in every round all unmatched points of x bid at once, and every
// point of y goes to its highest bidder. Rounds, phases of eps scaling and the early exit all happen
// inside the block, so a batch is one launch and the host never waits.
//
// The code needs nothing of CUDA but blocks, warps and their intrinsics; tests/ops/cuda_on_cpu.h
// supplies these on a CPU, so that the logic is tested on machines without a GPU.
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
  int* choice;      // by place in the queue: the object bid for
  int* queue[2];    // unmatched bidders of this round and of the next
};

constexpr size_t kObjectBytes = sizeof(float4);
constexpr size_t kOtherBytes = sizeof(float4) + sizeof(Key) + 4 * sizeof(int);

__host__ __device__ inline Arrays carve(char* objects, char* others, int n) {
  Arrays a;
  a.objects = reinterpret_cast<float4*>(objects);
  a.bidders = reinterpret_cast<float4*>(others);
  a.key = reinterpret_cast<Key*>(a.bidders + n);
  a.owner = reinterpret_cast<int*>(a.key + n);
  a.choice = a.owner + n;
  a.queue[0] = a.choice + n;
  a.queue[1] = a.queue[0] + n;
  return a;
}

// Fixed-size shared memory of a block.
struct Scratch {
  double reduced[kMaxWarps];
  Candidate partial[kMaxWarps];
  int waiting[3];  // bidders in the queue of round r at [r % 3]; r + 1 is filled while r + 2 is cleared
};

template <typename scalar_t>
struct Problem {
  const scalar_t *x, *y;    // [N, 3]
  const int64_t* initial;   // [N] or null
  scalar_t* distance;       // one
  int64_t* assignment;      // [N]
  int64_t* statistics;      // [kStatistics]
  int n;
  float eps;                // relative to the pair's scale
  int64_t max_rounds;
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
        *p.distance = scalar_t(NAN);
        p.statistics[kRounds] = p.statistics[kBids] = p.statistics[kCompleted] = 0;
        p.statistics[kBoundMet] = 0;
      }
      return;
    }
    const float last = fmaxf(p.eps, 1e-7f);
    float eps = fmaxf(last, kFirstEps);
    everyone_waits();
    if (p.initial) eps = keep_initial(last);
    bool met = false;
    for (;;) {
      // a coarse phase only sets prices: its last few bidders, who take most of its rounds, can wait
      const int enough = eps > last ? n / kUnmatchedFraction : 0;
      while (waiting() > enough && rounds < p.max_rounds) {
        if (2 * waiting() <= warps) {
          narrow_round(eps);
        } else {
          wide_round<false>(eps);
        }
        ++rounds;
      }
      met = rounds >= p.max_rounds && (eps > last || waiting() > 0);
      if (met || eps <= last) break;
      eps = fmaxf(last, eps / kEpsFactor);
      everyone_waits();
    }
    const int completed = waiting();
    if (completed > 0) complete();
    __syncthreads();
    finish(completed, met);
  }

 private:
  // Both clouds in one frame in which float32 serves any input; see emd_cpu.cpp.
  __device__ bool normalise() {
    bool finite = true;
    double low[3], high[3], side = 0;
    const auto least = [](double u, double v) { return u < v ? u : v; };
    const auto most = [](double u, double v) { return u > v ? u : v; };
    for (int cloud = 0; cloud < 2; ++cloud) {
      const scalar_t* points = cloud == 0 ? p.x : p.y;
      for (int d = 0; d < 3; ++d) {
        double lo = DBL_MAX, hi = -DBL_MAX;
        for (int i = thread; i < n; i += threads) {
          const double v = points[3 * size_t(i) + d];
          finite = finite && v - v == 0;
          lo = least(lo, v);
          hi = most(hi, v);
        }
        lo = reduce(lo, s, least);
        hi = reduce(hi, s, most);
        side = most(side, hi / 2 - lo / 2);
        low[d] = cloud == 0 ? lo : least(low[d], lo);
        high[d] = cloud == 0 ? hi : most(high[d], hi);
      }
    }
    if (__syncthreads_or(!finite)) return false;
    double reach = 0;
    for (int d = 0; d < 3; ++d) reach = most(reach, high[d] / 2 - low[d] / 2);
    scale = most(most(2 * side, 2 * reach * kLeastScale), DBL_MIN);
    if (!(scale <= DBL_MAX)) scale = DBL_MAX;
    const double inverse = 1 / scale;
    for (int i = thread; i < n; i += threads) {
      float from[3], to[3];
      for (int d = 0; d < 3; ++d) {
        const double centre = low[d] / 2 + high[d] / 2;
        from[d] = float((double(p.x[3 * size_t(i) + d]) - centre) * inverse);
        to[d] = float((double(p.y[3 * size_t(i) + d]) - centre) * inverse);
      }
      a.bidders[i] = make_float4(from[0], from[1], from[2], 0.f);
      a.objects[i] = make_float4(to[0], to[1], to[2], 0.f);
      a.key[i] = 0;
    }
    __syncthreads();
    return true;
  }

  __device__ int waiting() const { return s.waiting[round % 3]; }
  __device__ int* now() const { return a.queue[round & 1]; }
  __device__ int* next() const { return a.queue[(round + 1) & 1]; }

  __device__ int number(int from_bidder, int bidder) const {
    const int j = from_bidder + bidder;
    return j < n ? j : j - n;
  }

  // Nobody holds anything. Prices stay, and so do the keys: they are prices too.
  __device__ void everyone_waits() {
    __syncthreads();  // all threads have read waiting()
    for (int i = thread; i < n; i += threads) {
      a.owner[i] = -1;
      now()[i] = i;
    }
    if (thread < 3) s.waiting[thread] = thread == round % 3 ? n : 0;
    __syncthreads();
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

  __device__ void settle_all(int count, bool completing) {
    __syncthreads();
    for (int slot = thread; slot < count; slot += threads) {
      const int bidder = now()[slot], object = a.choice[slot];
      const int left = object < 0 ? bidder : settle(bidder, object, completing);
      if (left >= 0) next()[atomicAdd(&s.waiting[(round + 1) % 3], 1)] = left;
    }
    __syncthreads();
    ++round;
  }

  // A warp per bidder.
  template <bool completing>
  __device__ void wide_round(float eps) {
    const int count = waiting();
    if (thread == 0) s.waiting[(round + 2) % 3] = 0;
    for (int slot = warp; slot < count; slot += warps) {
      const int bidder = now()[slot];
      Candidate c = merge_warp(scan(a.objects, n, a.bidders[bidder], bidder, lane, 32));
      c.object = number(c.object, bidder);
      if (lane == 0) {
        const unsigned rank = completing ? ~__float_as_uint(c.best)  // nearest first
                                         : offer(c, a.objects[c.object].w, eps);
        a.choice[slot] = c.object;
        atomicMax(&a.key[c.object], pack(rank, bidder));
      }
    }
    bids += count;
    settle_all(count, completing);
  }

  // Several warps per bidder: most rounds have only a few, and their latency is the run time.
  __device__ void narrow_round(float eps) {
    const int count = waiting();
    if (thread == 0) s.waiting[(round + 2) % 3] = 0;
    int group = 1;  // warps per bidder, a power of two
    while (2 * group * count <= warps) group *= 2;
    const int slot = warp / group;
    if (slot < count) {
      const int bidder = now()[slot];
      const Candidate c = merge_warp(
          scan(a.objects, n, a.bidders[bidder], bidder, (warp % group) * 32 + lane, 32 * group));
      if (lane == 0) s.partial[warp] = c;
    }
    __syncthreads();
    if (warp == 0) {
      const int mine = lane / group;
      Candidate c = lane < warps && mine < count ? s.partial[lane] : Candidate{INFINITY, INFINITY, kNoObject};
      for (int offset = 1; offset < group; offset *= 2) {
        const Candidate other{__shfl_xor_sync(kAllLanes, c.best, offset),
                              __shfl_xor_sync(kAllLanes, c.second, offset),
                              __shfl_xor_sync(kAllLanes, c.object, offset)};
        c = merge_two(c, other);
      }
      const bool leader = lane % group == 0 && mine < count;
      const int bidder = leader ? now()[mine] : 0;
      c.object = number(c.object, bidder);
      if (leader) atomicMax(&a.key[c.object], pack(offer(c, a.objects[c.object].w, eps), bidder));
      __syncwarp();
      const int left = leader ? settle(bidder, c.object, false) : -1;
      const unsigned ballot = __ballot_sync(kAllLanes, left >= 0);
      if (left >= 0) next()[__popc(ballot & ((1u << lane) - 1))] = left;
      if (lane == 0) s.waiting[(round + 1) % 3] = __popc(ballot);
    }
    __syncthreads();
    bids += count;
    ++round;
  }

  // Keeps the pairs of the initial assignment that satisfy eps complementary slackness at price 0, for
  // the finest phase's eps at which all but a few do; returns that eps. A slack is by how much a bidder
  // would rather have another object; it stands in the place that a bidder's float4 has left.
  __device__ float keep_initial(float last) {
    if (thread == 0) s.waiting[(round + 2) % 3] = 0;
    for (int slot = warp; slot < n; slot += warps) {
      const int64_t object = p.initial[slot];
      const bool known = object >= 0 && object < n;
      const Candidate c = merge_warp(scan(a.objects, n, a.bidders[slot], slot, lane, 32));
      __syncwarp();  // every lane has read the bidder
      if (lane == 0) {
        a.bidders[slot].w = known ? between(a.bidders[slot], a.objects[object]) - c.best : INFINITY;
      }
    }
    __syncthreads();
    float eps = last;
    for (; eps < kFirstEps; eps *= kEpsFactor) {
      double ill = 0;
      for (int i = thread; i < n; i += threads) ill += a.bidders[i].w <= eps ? 0 : 1;
      ill = reduce(ill, s, [](double u, double v) { return u + v; });
      if (ill * kWarmFraction <= n) break;
    }
    if (eps >= kFirstEps) eps = fmaxf(last, kFirstEps);
    for (int i = thread; i < n; i += threads) {
      const bool keep = a.bidders[i].w <= eps;
      a.choice[i] = keep ? int(p.initial[i]) : -1;
      if (keep) atomicMax(&a.key[p.initial[i]], pack(0, i));  // a bid at price 0: below all others
    }
    settle_all(n, false);
    return eps;
  }

  // The bound on rounds was met: each point left takes the nearest point that is free.
  __device__ void complete() {
    __syncthreads();
    for (int j = thread; j < n; j += threads) {
      a.objects[j].w = a.owner[j] < 0 ? 0.f : INFINITY;
      a.key[j] = 0;
    }
    __syncthreads();
    const int64_t counted = bids;
    for (int k = 0; k < kCompletionRounds && waiting() > 0; ++k) wide_round<true>(0.f);
    bids = counted;
    const int left = waiting();
    __syncthreads();
    if (left == 0) return;
    for (int i = thread; i < n; i += threads) a.choice[i] = 0;
    __syncthreads();
    for (int j = thread; j < n; j += threads) {
      if (a.owner[j] >= 0) a.choice[a.owner[j]] = 1;
    }
    __syncthreads();
    if (thread == 0) {
      for (int i = 0, j = 0; i < n; ++i) {
        if (a.choice[i]) continue;
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

  __device__ void finish(int completed, bool met) {
    const auto plus = [](double u, double v) { return u + v; };
    double sum = 0;
    for (int j = thread; j < n; j += threads) {
      p.assignment[a.owner[j]] = j;
      sum += apart(a.owner[j], j);
    }
    sum = reduce(sum, s, plus);
    if (p.initial) {  // a warm start never makes the result worse
      for (int i = thread; i < n; i += threads) a.choice[i] = 0;
      __syncthreads();
      double before = 0;
      bool permutation = true;
      for (int i = thread; i < n; i += threads) {
        const int64_t j = p.initial[i];
        if (j >= 0 && j < n && atomicAdd(&a.choice[j], 1) == 0) {
          before += apart(i, j);
        } else {
          permutation = false;
        }
      }
      permutation = !__syncthreads_or(!permutation);
      before = reduce(before, s, plus);
      if (permutation && before < sum) {
        for (int i = thread; i < n; i += threads) p.assignment[i] = p.initial[i];
        sum = before;
      }
    }
    if (thread == 0) {
      *p.distance = scalar_t(sum / n * scale);
      p.statistics[kRounds] = rounds;
      p.statistics[kBids] = bids;
      p.statistics[kCompleted] = completed;
      p.statistics[kBoundMet] = met;
    }
  }

  const Problem<scalar_t>& p;
  const Arrays& a;
  Scratch& s;
  const int n, thread, threads, lane, warp, warps;
  double scale = 1;
  int round = 0;
  int64_t rounds = 0, bids = 0;
};

}  // namespace pointcmt::emd::device
