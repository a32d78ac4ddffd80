// One native vector of floats or doubles, for the instruction set that this translation unit is compiled for.
//
// Arithmetic is that of the GCC and Clang vector extensions. Only what they cannot say (fused multiply-add, square
// root, minimum, maximum, selection) is spelled in intrinsics where that pays; elsewhere loops over the lanes do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define NT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define NT_VECTOR_BYTES 32
#else
#define NT_VECTOR_BYTES 16
#endif

#define NT_INLINE inline __attribute__((always_inline))

namespace nt {
namespace NT_LEVEL {

typedef float VFloat __attribute__((vector_size(NT_VECTOR_BYTES)));
typedef double VDouble __attribute__((vector_size(NT_VECTOR_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VFloat;
};
template <>
struct VectorOf<double> {
  using type = VDouble;
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
inline constexpr int kLanes = NT_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
NT_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// The address must be aligned to the size of a vector.
template <class T>
NT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
NT_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}

#if defined(__AVX512F__)

NT_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) { return (VFloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
NT_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
NT_INLINE VFloat sqrt(VFloat a) { return (VFloat)_mm512_sqrt_ps((__m512)a); }
NT_INLINE VDouble sqrt(VDouble a) { return (VDouble)_mm512_sqrt_pd((__m512d)a); }
NT_INLINE VFloat min(VFloat a, VFloat b) { return (VFloat)_mm512_min_ps((__m512)a, (__m512)b); }
NT_INLINE VDouble min(VDouble a, VDouble b) { return (VDouble)_mm512_min_pd((__m512d)a, (__m512d)b); }
NT_INLINE VFloat max(VFloat a, VFloat b) { return (VFloat)_mm512_max_ps((__m512)a, (__m512)b); }
NT_INLINE VDouble max(VDouble a, VDouble b) { return (VDouble)_mm512_max_pd((__m512d)a, (__m512d)b); }
// x > 0 ? yes : no
NT_INLINE VFloat if_positive(VFloat x, VFloat yes, VFloat no) {
  return (VFloat)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)no,
                                      (__m512)yes);
}
NT_INLINE VDouble if_positive(VDouble x, VDouble yes, VDouble no) {
  return (VDouble)_mm512_mask_blend_pd(_mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_GT_OQ), (__m512d)no,
                                       (__m512d)yes);
}

NT_INLINE bool any_positive(VFloat x) { return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ) != 0; }
NT_INLINE bool any_positive(VDouble x) { return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_GT_OQ) != 0; }

#else

#if defined(__AVX2__) && defined(__FMA__)
NT_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) { return (VFloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
NT_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
NT_INLINE VFloat sqrt(VFloat a) { return (VFloat)_mm256_sqrt_ps((__m256)a); }
NT_INLINE VDouble sqrt(VDouble a) { return (VDouble)_mm256_sqrt_pd((__m256d)a); }
NT_INLINE VFloat min(VFloat a, VFloat b) { return (VFloat)_mm256_min_ps((__m256)a, (__m256)b); }
NT_INLINE VDouble min(VDouble a, VDouble b) { return (VDouble)_mm256_min_pd((__m256d)a, (__m256d)b); }
NT_INLINE VFloat max(VFloat a, VFloat b) { return (VFloat)_mm256_max_ps((__m256)a, (__m256)b); }
NT_INLINE VDouble max(VDouble a, VDouble b) { return (VDouble)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__SSE2__)
NT_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) { return a * b + c; }
NT_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) { return a * b + c; }
NT_INLINE VFloat sqrt(VFloat a) { return (VFloat)_mm_sqrt_ps((__m128)a); }
NT_INLINE VDouble sqrt(VDouble a) { return (VDouble)_mm_sqrt_pd((__m128d)a); }
NT_INLINE VFloat min(VFloat a, VFloat b) { return (VFloat)_mm_min_ps((__m128)a, (__m128)b); }
NT_INLINE VDouble min(VDouble a, VDouble b) { return (VDouble)_mm_min_pd((__m128d)a, (__m128d)b); }
NT_INLINE VFloat max(VFloat a, VFloat b) { return (VFloat)_mm_max_ps((__m128)a, (__m128)b); }
NT_INLINE VDouble max(VDouble a, VDouble b) { return (VDouble)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
template <class V>
NT_INLINE V fma(V a, V b, V c) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::fma(a[i], b[i], c[i]);
  return r;
}
template <class V>
NT_INLINE V sqrt(V a) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::sqrt(a[i]);
  return r;
}
template <class V>
NT_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
NT_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
#endif

template <class V>
NT_INLINE V if_positive(V x, V yes, V no) {
  return x > V{} ? yes : no;
}

template <class V>
NT_INLINE bool any_positive(V x) {
  const auto positive = x > V{};
  bool any = false;
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) any |= positive[i] != 0;
  return any;
}

#endif

// The largest of the lanes.
template <class V>
NT_INLINE auto largest(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == sizeof(float)) {
    return _mm512_reduce_max_ps((__m512)x);
  } else {
    return _mm512_reduce_max_pd((__m512d)x);
  }
#else
  auto most = x[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(x[0]); ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

}  // namespace NT_LEVEL
}  // namespace nt
