// Just enough of CUDA's device language to run thread blocks on a CPU, for tests without a GPU.
//
// Every CUDA thread is a fiber that runs until it reaches a barrier or a warp intrinsic; which fiber
// goes on next is drawn from a seeded generator, so that code which relies on an order that CUDA does
// not promise fails here too. Blocks run one after the other. It checks logic, not the memory model,
// and says nothing about speed.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

using std::max;
using std::min;

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockDim, blockIdx, gridDim;

namespace cuda_on_cpu {

// Switching by _setjmp and _longjmp, which make no system call; ucontext only makes the stacks.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  bool started = false;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline ucontext_t unused;
inline unsigned current;
inline std::vector<unsigned> ready;
inline std::function<void()> body;

struct Barrier {
  size_t members = 0;
  std::vector<unsigned> waiting;

  void wait() {
    if (waiting.size() + 1 == members) {
      ready.insert(ready.end(), waiting.begin(), waiting.end());
      waiting.clear();
    } else {
      waiting.push_back(current);
      if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
    }
  }
};

inline Barrier block;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> slots;  // one per thread, to hand values across a warp
inline int any;
inline bool trapped;  // by a device-side assertion

inline void enter() {
  body();
  _longjmp(scheduler, 1);
}

inline void trap() {
  trapped = true;
  _longjmp(scheduler, 1);
}

// Runs `function` as one block of threads, a multiple of 32 in number.
inline void run_block(dim3 shape, unsigned seed, std::function<void()> function) {
  constexpr size_t kStack = 64 << 10;
  const unsigned threads = shape.x * shape.y * shape.z;
  if (threads == 0 || threads % 32 || threads > 1024) std::abort();
  body = std::move(function);
  blockDim = shape;
  if (fibers.size() < threads) fibers.resize(threads);
  slots.assign(threads, 0);
  block = Barrier{threads, {}};
  warps.assign(threads / 32, Barrier{32, {}});
  ready.clear();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.started = false;
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    ready.push_back(t);
  }
  static std::mt19937 random;
  random.seed(seed);
  _setjmp(scheduler);  // every fiber that waits or ends comes back here
  if (ready.empty()) return;
  const size_t pick = random() % ready.size();
  current = ready[pick];
  threadIdx = {current % shape.x, current / shape.x % shape.y, current / (shape.x * shape.y)};
  ready[pick] = ready.back();
  ready.pop_back();
  Fiber& fiber = fibers[current];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  swapcontext(&unused, &fiber.context);
}

template <typename T, typename F>
auto across_warp(T value, F read) {
  const unsigned self = current, first = self / 32 * 32;
  std::memcpy(&slots[self], &value, sizeof(T));
  warps[self / 32].wait();
  const auto get = [&](unsigned lane) {
    T v;
    std::memcpy(&v, &slots[first + lane], sizeof(T));
    return v;
  };
  const auto result = read(get, self - first);
  warps[self / 32].wait();
  return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block.wait(); }
inline void __syncwarp() { cuda_on_cpu::warps[cuda_on_cpu::current / 32].wait(); }
inline int __syncthreads_or(int predicate) {
  if (predicate) cuda_on_cpu::any = 1;
  __syncthreads();
  const int result = cuda_on_cpu::any;
  __syncthreads();
  cuda_on_cpu::any = 0;
  __syncthreads();
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_on_cpu::across_warp(value, [&](auto get, unsigned) { return get(unsigned(source) % 32); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return cuda_on_cpu::across_warp(value, [&](auto get, unsigned lane) { return get(lane < delta ? lane : lane - delta); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::across_warp(value, [&](auto get, unsigned lane) { return get(lane ^ unsigned(mask)); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return cuda_on_cpu::across_warp(value, [](auto get, unsigned) {
    unsigned most = get(0);
    for (unsigned lane = 1; lane < 32; ++lane) most = std::max(most, get(lane));
    return most;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return cuda_on_cpu::across_warp(value, [](auto get, unsigned) {
    unsigned least = get(0);
    for (unsigned lane = 1; lane < 32; ++lane) least = std::min(least, get(lane));
    return least;
  });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  return cuda_on_cpu::across_warp(predicate, [](auto get, unsigned) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) ballot |= unsigned(get(lane)) << lane;
    return ballot;
  });
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = value > old ? value : old;
  return old;
}
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}
inline unsigned __float_as_uint(float v) {
  unsigned u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (v >> bit & 1u) << (31 - bit);
  return reversed;
}
inline float __int_as_float(int v) { return __uint_as_float(static_cast<unsigned>(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }  // compiled without contraction
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
