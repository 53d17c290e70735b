// Arithmetic that rounds as the twins do: the compiler may not fuse these into multiply-adds.
#pragma once

namespace pointcmt {

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }

template <typename T>
__device__ __forceinline__ T squared_norm(T x, T y, T z) {
  return add(add(mul(x, x), mul(y, y)), mul(z, z));
}

}  // namespace pointcmt
