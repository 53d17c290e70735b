// Vectors of 32 bytes in GCC's and clang's vector extension: portable to every target (the compiler
// splits them where registers are smaller), with intrinsics only where the extension has no word.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace pointcmt::simd {

template <typename T>
struct Types;
template <>
struct Types<float> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t M __attribute__((vector_size(32)));
  using Int = int32_t;
};
template <>
struct Types<double> {
  typedef double V __attribute__((vector_size(32)));
  typedef int64_t M __attribute__((vector_size(32)));
  using Int = int64_t;
};

template <typename T>
using Vec = typename Types<T>::V;
template <typename T>
using Mask = typename Types<T>::M;  // also the vector of integers that is as wide as T
template <typename T>
constexpr int64_t width = 32 / sizeof(T);

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// a < b ? a : b, so that a NaN in a gives b: one instruction on x86.
inline Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<double> min(Vec<double> a, Vec<double> b) {
#if defined(__AVX__)
  return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(__AVX__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// a·b + c in one rounding where the machine has it; only for results that are bounds, never for
// those that must equal the twin's, because elsewhere it is two roundings.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Eight rows of eight, turned: lane i of row j becomes lane j of row i.
inline void transpose(Vec<float> (&r)[8]) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define POINTCMT_SHUFFLES 1
#endif
#endif
#if defined(POINTCMT_SHUFFLES)
  Vec<float> a[8], b[8];
  for (int i = 0; i < 8; i += 2) {  // pairs of rows, lane by lane
    a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {  // fours of rows
    for (int k = 0; k < 2; ++k) {
      b[i + 2 * k] = __builtin_shufflevector(a[i + k], a[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * k + 1] = __builtin_shufflevector(a[i + k], a[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {  // halves
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  Vec<float> out[8];
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[i][j] = r[j][i];
  for (int i = 0; i < 8; ++i) r[i] = out[i];
#endif
}

// One bit per lane of a comparison's result.
inline unsigned bits(Mask<float> m) {
#if defined(__AVX__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)m));
#else
  unsigned out = 0;
  for (int i = 0; i < 8; ++i) out |= static_cast<unsigned>(m[i] < 0) << i;
  return out;
#endif
}
inline unsigned bits(Mask<double> m) {
#if defined(__AVX__)
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)m));
#else
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(m[i] < 0) << i;
  return out;
#endif
}

// The halves' maximum, lane by lane, until one lane is left.
inline float horizontal_max(Vec<float> v) {
#if defined(POINTCMT_SHUFFLES)
  v = max(__builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3), v);
  v = max(__builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5), v);
  v = max(__builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6), v);
  return v[0];
#else
  float best = v[0];
  for (int i = 1; i < 8; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}
inline double horizontal_max(Vec<double> v) {
  const double a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
template <typename T>
inline T horizontal_min(Vec<T> v) {
  T out = v[0];
  for (int64_t i = 1; i < width<T>; ++i) out = v[i] < out ? v[i] : out;
  return out;
}

template <typename T>
inline typename Types<T>::Int least(Mask<T> v) {
  typename Types<T>::Int out = v[0];
  for (int64_t i = 1; i < width<T>; ++i) out = v[i] < out ? v[i] : out;
  return out;
}

template <typename Int>
inline Int round_up(Int n, std::type_identity_t<Int> multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace pointcmt::simd
