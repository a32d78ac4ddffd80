// Elementary functions of vectors, from multiplications, additions, square roots and selections.
#pragma once

#include <limits>

#include "simd.h"

namespace nt {
namespace NT_LEVEL {

// Evaluates a polynomial, constant coefficient first.
template <class T, int kCoefficients>
NT_INLINE Vec<T> horner(const T (&c)[kCoefficients], Vec<T> x) {
  Vec<T> value = broadcast(c[kCoefficients - 1]);
  for (int k = kCoefficients - 2; k >= 0; --k) value = fma(value, x, broadcast(c[k]));
  return value;
}

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  typedef Bits VBits __attribute__((vector_size(NT_VECTOR_BYTES)));
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.0f, kHighest = 88.37f;  // 2^n is a normal number
  // 1/k! from k = 2
  static constexpr float c[] = {0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040, 1.f / 40320};
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  typedef Bits VBits __attribute__((vector_size(NT_VECTOR_BYTES)));
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2High = 6.93147180369123816490e-01, kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -708.0, kHighest = 709.4;
  static constexpr double c[] = {1. / 2,         1. / 6,           1. / 24,          1. / 120,     1. / 720,
                                 1. / 5040,      1. / 40320,       1. / 362880,      1. / 3628800, 1. / 39916800,
                                 1. / 479001600, 1. / 6227020800., 1. / 87178291200.};
};

template <class T>
struct ExpPair {
  Vec<T> exp, expm1;
};

// exp(x) and exp(x) - 1, both to relative accuracy. Below `kLowest` they are those of `kLowest`, above `kHighest`
// infinite.
template <class T>
NT_INLINE ExpPair<T> exp_pair(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  using VBits = typename C::VBits;
  const V low = max(broadcast(C::kLowest), x);  // NaN stays NaN
  const V y = min(broadcast(C::kHighest), low);
  const V rounded = fma(y, broadcast(T(1.4426950408889634)), broadcast(C::kRound));
  const V n = rounded - broadcast(C::kRound);
  V r = fma(n, broadcast(-C::kLog2High), y);
  r = fma(n, broadcast(-C::kLog2Low), r);
  const V minus_one = fma(r * r, horner<T>(C::c, r), r);  // exp(r) - 1
  VBits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << C::kMantissa) + (C::kBias << C::kMantissa);  // 2^n: what is above the exponent is shifted out
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const V infinite = broadcast(std::numeric_limits<T>::infinity());
  const V excess = x - broadcast(C::kHighest);
  const V one = broadcast(T(1));
  return {if_positive(excess, infinite, fma(scale, minus_one, scale)),
          if_positive(excess, infinite, fma(scale, minus_one, scale - one))};
}

}  // namespace NT_LEVEL
}  // namespace nt
