// Gaussian bells, and a wave within one.
#pragma once

#include "duals_legs.h"

namespace nt {
namespace NT_LEVEL {

// a exp(b x^2)
template <class T>
class Gaussian {
  using V = Vec<T>;
  using L = Legs<T>;

 public:
  static constexpr int kNumbers = L::kNumbers;

  explicit Gaussian(const T* c) : amplitude_(broadcast(c[0])), scale_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    L::prepare(scale_, half + half, numbers);
    numbers[0] = broadcast(T(0.5)) * amplitude_ / numbers[L::kLeg];
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const L legs(scale_, deficit, first, second);
    const V after = amplitude_ * legs.inverse_deficit(first, second);
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) {
      const V covariance = fma(-scale_, deficit, legs.mean);
      factor = amplitude_ * scale_ * covariance / (legs.leg * legs.leg * legs.leg);
    }
  }

 private:
  V amplitude_, scale_;  // a^2, -2 b
};

// exp(-x^2) sin x
template <class T>
class Gabor {
  using V = Vec<T>;
  using L = Legs<T>;

 public:
  static constexpr int kNumbers = L::kNumbers;

  explicit Gabor(const T*) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    const V var = half + half;
    L::prepare(broadcast(T(2)), var, numbers);
    const V leg = numbers[L::kLeg];
    numbers[0] =
        broadcast(T(-0.25)) * exp_pair<T>(-(var + var) / fma(broadcast(T(4)), var, broadcast(T(1)))).expm1 / leg;
    return numbers[0];
  }

  // See nt_core/activations/gaussian.py.
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V half = broadcast(T(0.5)), one = broadcast(T(1)), two = broadcast(T(2));
    const L legs(two, deficit, first, second);
    const V i = one / legs.leg, i1 = one / first[L::kLeg], i2 = one / second[L::kLeg];
    const V square = i * i, mean = half * (i1 + i2);
    const V apart = -half * legs.difference / legs.mean_leg * i1 * i2;  // half the difference of i1 and i2
    const V shortening = legs.inverse_deficit(first, second);
    const V near = exp_pair<T>(-fma(half, legs.det, deficit) * square).expm1;
    const V growth = exp_pair<T>(deficit * square).expm1;
    const V to_mean = exp_pair<T>(half * shortening * (mean + i)).expm1;
    const V e = exp_pair<T>(half * mean * apart).expm1;
    const V sinh_half = half * (e + e / (one + e));
    const V cosh_excess = two * sinh_half * sinh_half;
    const V sinh = two * sinh_half * sqrt(fma(sinh_half, sinh_half, one));
    const V spread = exp_pair<T>(half * apart * apart).expm1;
    const V convexity = fma(mean, fma(spread, one + cosh_excess, cosh_excess), (one + spread) * apart * sinh);
    const V bell_deficit = fma(i, to_mean, (shortening + convexity) * (one + to_mean));
    const V at_i = exp_pair<T>(half * (square - one)).exp;
    const V after = half * (fma(-i, near, shortening) + at_i * fma(i, growth, -bell_deficit));
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) {
      // with twice the variances and the covariance
      const V covariance = fma(-two, deficit, legs.mean), total = legs.mean + legs.mean;
      const V product = two * first[L::kVariance] * (two * second[L::kVariance]);
      const V even = one + total + fma(covariance, covariance, product);
      const V odd = two * covariance * (fma(broadcast(T(1.5)), total, legs.det) + two);
      const V far = at_i * (one + growth);
      factor = half * i * square * square * fma(far, even - odd, (one + near) * (even + odd));
    }
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
