// Derivatives of functions with a jump or a kink at zero.
#pragma once

#include "backward_hermite.h"
#include "duals_rectified.h"
#include "duals_relu.h"

namespace nt {
namespace NT_LEVEL {

// With J the coefficient of the jump, s the product of the standard deviations and w = 1 - c: the deficit after is
// J arccos(c) / pi, and
//   s dw = dD - (var1 - K) dhalf1 / var1 - (var2 - K) dhalf2 / var2.
// There are no derivatives where rounding does not tell the angle from 0 or pi, nor at zero variance. The factor is 0,
// which the derivative in the deficit is not.
template <class T>
class StepPartials {
  using V = Vec<T>;

  enum Coefficient { kJump, kHalf, kHalfAtZero, kMean, kAtZero };

 public:
  static constexpr int kCoefficients = 5;

  StepPartials(const T* c, const Table&) : unit_(with_unit<Step<T>, kCoefficients>(c, kJump)), jump_(broadcast(c[0])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    add_half(numbers, bar, coefficients);
    return V{};
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V,
                                   V* coefficients) const {
    const V zero{}, one = broadcast(T(1)), half = broadcast(T(0.5)), difference = first[1] - second[1];
    const Angular<T> a = angular_deficit<T>(deficit, difference, first[2], second[2]);
    const V per_scale = reciprocal<T>(a.scale), negative = a.angular - a.scale;
    const V w = distance_from_parallel<T>(deficit, a.angular, negative, a.scale, reciprocal<T>(first[2]),
                                          reciprocal<T>(second[2]));
    const V sine = sqrt(w * (one + one - w)), pi = broadcast(kPi<T>);
    const V regular = sine - broadcast(kPi<T> * kSmallestSine<T>);
    const V per_sine = if_positive(regular, per_scale / if_positive(regular, pi * sine, one), zero);
    Partials<T> p{};
    V value;
    unit_.template apply<false, false>(deficit, first, second, value, p.factor);
    p.value = if_positive(a.scale, jump_ * value, value);
    p.value_deficit = jump_ * per_sine;
    p.value_half1 = -p.value_deficit * fma(half, difference, deficit) * reciprocal<T>(first[1]);
    p.value_half2 = -p.value_deficit * fma(-half, difference, deficit) * reciprocal<T>(second[1]);
    coefficients[kJump] += if_positive(a.scale, bar * value, zero);
    const V bar_of_zero = if_positive(a.scale, zero, bar);
    add_half(first, bar_of_zero, coefficients);
    add_half(second, bar_of_zero, coefficients);
    add_mean(first, -bar_of_zero * second[3], coefficients);
    add_mean(second, -bar_of_zero * first[3], coefficients);
    return p;
  }

 private:
  // Half the variance after, and the mean, are coefficients.
  template <class Numbers>
  static NT_INLINE void add_half(const Numbers& numbers, V bar, V* coefficients) {
    coefficients[kHalf] += if_positive(numbers[1], bar, V{});
    coefficients[kHalfAtZero] += if_positive(numbers[1], V{}, bar);
  }
  template <class Numbers>
  static NT_INLINE void add_mean(const Numbers& numbers, V bar, V* coefficients) {
    coefficients[kMean] += if_positive(numbers[1], bar, V{});
    coefficients[kAtZero] += if_positive(numbers[1], V{}, bar);
  }

  Step<T> unit_;  // with the jump 1
  V jump_;
};

// With k_n = E max(u, 0)^n max(v, 0)^n, whose derivative in the covariance K is n^2 k_(n-1): it is homogeneous, so
//   dk_n / dvar1 = (n k_n - K n^2 k_(n-1)) / (2 var1).
// At zero variance there are no derivatives but that for n = 2. The coefficients are no numbers that could be traced.
template <class T>
class RectifiedMonomialPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = Series<T>::kCoefficients;

  RectifiedMonomialPartials(const T* c, const Table&) : dual_(c), series_(c) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V*) const {
    return bar * gain(numbers);
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V, V, V*) const {
    const V n = broadcast(T(series_.degree())), half = broadcast(T(0.5)), one = broadcast(T(1));
    Partials<T> p;
    dual_.template apply<false, true>(deficit, first, second, p.value, p.factor);
    p.value_deficit = p.factor;
    const V after = (first[0] + second[0]) - p.value, covariance = half * (first[1] + second[1]) - deficit;
    const V bend = this->bend(deficit, first, second);
    p.factor_deficit = -bend;
    const V homogeneous = fma(n, after, -covariance * p.factor);
    const V homogeneous_factor = fma(n - one, p.factor, -covariance * bend);
    p.value_half1 = gain(first) - p.factor - per_half(homogeneous, first[1], second[1]);
    p.value_half2 = gain(second) - p.factor - per_half(homogeneous, second[1], first[1]);
    p.factor_half1 = fma(homogeneous_factor, reciprocal<T>(first[1]), bend);
    p.factor_half2 = fma(homogeneous_factor, reciprocal<T>(second[1]), bend);
    return p;
  }

 private:
  // n^2 (n - 1)^2 k_(n-2)
  template <class First, class Second>
  NT_INLINE V bend(V deficit, const First& first, const Second& second) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5));
    const int n = series_.degree();
    const Angular<T> a = angular_deficit<T>(deficit, first[1] - second[1], first[2], second[2]);
    const V w = if_positive(a.scale, a.angular * reciprocal<T>(a.scale), one);
    const V nearest = min(one + one - w, w);
    ArcCosine<T> arc(nearest);
    V power = half;
    for (int k = 1; k + 1 < n; ++k) {
      arc.raise(k, nearest);
      power = power * a.scale;
    }
    const V opposed = broadcast(T(n * n * (n - 1) * (n - 1))) * power * arc.before;
    const V of_positive = fma(half, series_.bend(deficit, first[1], second[1]), n % 2 ? opposed : -opposed);
    return if_positive(w - one, opposed, of_positive);
  }

  // Of E f(u) f(v), in half the variance of u.
  NT_INLINE V per_half(V homogeneous, V var, V other) const {
    const V at_zero = broadcast(T(series_.degree() == 2 ? 0.5 : 0)) * other;
    return if_positive(var, homogeneous * reciprocal<T>(var), at_zero);
  }

  // Of half the variance after, in half the variance.
  template <class Numbers>
  NT_INLINE V gain(const Numbers& numbers) const {
    return broadcast(T(2 * series_.degree())) * numbers[0] * reciprocal<T>(numbers[1]);
  }

  RectifiedMonomial<T> dual_;
  SeriesPartials<T> series_;
};

}  // namespace NT_LEVEL
}  // namespace nt
