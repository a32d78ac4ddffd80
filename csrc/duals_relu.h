// Piecewise linear functions with one kink, at zero.
#pragma once

#include "functions.h"
#include "relu_polynomials.h"

namespace nt {
namespace NT_LEVEL {

// 1 - |c|, with `angular` = scale (1 - c) and `negative` = -scale c: exactly 0 where it is no more than rounding of the
// deficit leaves for parallel variables (nearly always: docs/numerics.md), and 1 at zero variance. NaN stays NaN.
template <class T>
NT_INLINE Vec<T> distance_from_parallel(Vec<T> deficit, Vec<T> angular, Vec<T> negative, Vec<T> scale, Vec<T> inverse1,
                                        Vec<T> inverse2) {
  constexpr T kRounding = 4 * std::numeric_limits<T>::epsilon();
  const Vec<T> nearest = min(angular, scale - negative);
  const Vec<T> beyond_rounding = fma(broadcast(-kRounding), deficit, nearest);
  const Vec<T> w = if_positive(-beyond_rounding, Vec<T>{}, (nearest * inverse1) * inverse2);
  return if_positive(scale, w, broadcast(T(1)));
}

// The ReLU family, see docs/cpu-engine.md. `slope` is the mean square slope (a^2 + b^2)/2, `kink` is (a - b)^2/2.
template <class T>
class AbRelu {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 2;  // root of half the variance, and reciprocal standard deviation

  explicit AbRelu(const T* c) : slope_(broadcast(c[0])), kink_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[0] = sqrt(half);
    numbers[1] = if_positive(half, broadcast(T(1)) / sqrt(half + half), V{});
    return half * slope_;
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    V before;
    apply<kCovariance, kNtk>(deficit, first, second, value, factor, before);
  }

  // And the covariance before it.
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor, V& before) const {
    const V zero{}, one = broadcast(T(1));
    const V scale = (first[0] + first[0]) * second[0];  // product of the standard deviations
    const V difference = first[0] - second[0];
    const V angular = fma(-difference, difference, deficit);  // scale (1 - c)
    const V negative = angular - scale;
    const V w = distance_from_parallel<T>(deficit, angular, negative, scale, first[1], second[1]);
    const V root = sqrt(w);
    before = -negative;
    const V opposed = fma(scale * w, root * horner<T>(ReluPolynomials<T>::q, w), max(zero, negative));
    if constexpr (kCovariance) {
      value = fma(kink_, opposed, slope_ * before);
    } else {
      value = fma(-kink_, opposed, slope_ * deficit);
    }
    if constexpr (kNtk) {
      V angle = root * horner<T>(ReluPolynomials<T>::p, w);  // arccos |c| / pi
      angle = if_positive(negative, one - angle, angle);
      factor = fma(-kink_, angle, slope_);
    }
  }

 private:
  V slope_, kink_;
};

}  // namespace NT_LEVEL
}  // namespace nt
