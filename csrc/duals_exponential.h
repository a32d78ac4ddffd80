// Trigonometric and exponential functions.
#pragma once

#include "duals_common.h"

namespace nt {
namespace NT_LEVEL {

// a sin(b x + c)
template <class T>
class Sin {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 2;  // half the variance after, the variance

  explicit Sin(const T* c)
      : amplitude_(broadcast(c[0])),
        square_(broadcast(c[1])),
        cos2_(broadcast(c[2])),
        one_plus_cos2_(broadcast(c[3])),
        sin_square_(broadcast(c[4])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[1] = half + half;
    const V minus_one = exp_pair<T>(-square_ * (numbers[1] + numbers[1])).expm1;
    numbers[0] = amplitude_ * fma(broadcast(T(-0.5)) * cos2_, minus_one, sin_square_);
    return numbers[0];
  }

  // With D the deficit of u and v and F that of u and -v, times b^2: 2/a^2 E f(u) f(v) = exp(-D) - cos(2 c) exp(-F).
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V d = square_ * deficit, total = square_ * (first[1] + second[1]);
    const V difference = square_ * (first[1] - second[1]);  // exact before it is scaled
    const V opposite = total - d;
    const ExpPair<T> near = exp_pair<T>(-d), far = exp_pair<T>(-opposite);
    const V by_deficit = -near.expm1 * fma(cos2_, far.expm1, one_plus_cos2_);
    // exp(-var1) - exp(-var2), but for its sign
    const V larger = exp_pair<T>(-square_ * min(first[1], second[1])).exp;
    const V by_difference = larger * exp_pair<T>(-max(difference, -difference)).expm1;
    const V sum = fma(broadcast(T(-0.5)) * cos2_ * by_difference, by_difference, by_deficit);
    value = deficit_or_covariance<kCovariance>(amplitude_ * sum, first, second);
    if constexpr (kNtk) {
      // exp(-D) - exp(-F), by the larger one
      const V twice_covariance = opposite - d;
      const V smaller = exp_pair<T>(-max(twice_covariance, -twice_covariance)).expm1;
      const V apart = if_positive(twice_covariance, -near.exp * smaller, far.exp * smaller);
      factor = amplitude_ * square_ * fma(-cos2_, apart, one_plus_cos2_ * near.exp);
    }
  }

 private:
  V amplitude_, square_, cos2_, one_plus_cos2_, sin_square_;  // a^2/2, b^2, cos 2c, 1 + cos 2c, sin^2 c
};

// The function whose covariance is the RBF kernel exp(-gamma E (u - v)^2).
template <class T>
class Rbf {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 1;

  explicit Rbf(const T* c) : rate_(broadcast(c[0])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[0] = fma(half, V{}, broadcast(T(0.5)));  // NaN stays NaN
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const ExpPair<T> near = exp_pair<T>(-rate_ * deficit);
    value = deficit_or_covariance<kCovariance>(-near.expm1, first, second);
    if constexpr (kNtk) factor = rate_ * near.exp;
  }

 private:
  V rate_;  // 2 gamma
};

// a exp(b x)
template <class T>
class Exp {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 2;  // half the variance after, the variance

  explicit Exp(const T* c) : amplitude_(broadcast(c[0])), square_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[1] = half + half;
    numbers[0] = broadcast(T(0.5)) * amplitude_ * exp_pair<T>(square_ * (numbers[1] + numbers[1])).exp;
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V d = square_ * deficit, total = square_ * (first[1] + second[1]);
    const V difference = square_ * (first[1] - second[1]);  // exact before it is scaled
    // exp(var1) - exp(var2), but for its sign
    const V apart =
        exp_pair<T>(square_ * max(first[1], second[1])).exp * exp_pair<T>(-max(difference, -difference)).expm1;
    const V by_deficit = exp_pair<T>(total).exp * exp_pair<T>(-d).expm1;
    const V sum = fma(broadcast(T(0.5)) * apart, apart, -by_deficit);
    value = deficit_or_covariance<kCovariance>(amplitude_ * sum, first, second);
    if constexpr (kNtk) factor = amplitude_ * square_ * exp_pair<T>(total - d).exp;
  }

 private:
  V amplitude_, square_;  // a^2, b^2
};

// E f(u) f(v) = s exp(gamma (c + shift)), with s the product of the standard deviations and c the correlation.
template <class T>
class ExpNormalized {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 3;  // half the variance after, the variance, its root

  explicit ExpNormalized(const T* c) : gamma_(broadcast(c[0])), amplitude_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[0] = amplitude_ * half;
    numbers[1] = half + half;
    numbers[2] = sqrt(numbers[1]);
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V one = broadcast(T(1));
    const Angular<T> a = angular_deficit<T>(deficit, first[1] - second[1], first[2], second[2]);
    const V w = if_positive(a.scale, a.angular / if_positive(a.scale, a.scale, one), one);  // 1 - c
    const ExpPair<T> decay = exp_pair<T>(-gamma_ * w);
    value = deficit_or_covariance<kCovariance>(amplitude_ * fma(-a.scale, decay.expm1, a.parallel), first, second);
    if constexpr (kNtk) factor = gamma_ * amplitude_ * decay.exp;
  }

 private:
  V gamma_, amplitude_;  // and exp(gamma (1 + shift))
};

}  // namespace NT_LEVEL
}  // namespace nt
