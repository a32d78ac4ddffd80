// Derivatives of error functions.
#pragma once

#include "backward_partials.h"
#include "duals_erf.h"

namespace nt {
namespace NT_LEVEL {

// With s the `scale`, K the covariance, h = 1 + s var, A the amplitude and L the leg: the factor is A s / L, where
//   L^2 = h1 h2 - s^2 K^2,
// and the deficit after is A times the sum of what either sample has for itself, less A asin(s K / sqrt(h1 h2)).
template <class T>
class ErfPartials {
  using V = Vec<T>;
  using A = Arcs<T>;

 public:
  static constexpr int kCoefficients = 3;

  ErfPartials(const T* c, const Table&) : amplitude_(broadcast(c[0])), scale_(broadcast(c[1])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    const V gain = amplitude_ * scale_ * gain_of_arc(numbers);
    coefficients[0] = fma(bar, numbers[A::kArc], coefficients[0]);
    coefficients[1] = fma(bar, numbers[A::kHalf] * amplitude_ * gain_of_arc(numbers), coefficients[1]);
    coefficients[2] = fma(broadcast(T(0.5)), bar, coefficients[2]);
    return bar * gain;
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V one = broadcast(T(1));
    const A arcs(scale_, deficit, first, second);
    const V turn = if_positive(-arcs.covariance, (arcs.own_arc + arcs.own_arc) - arcs.turn, arcs.turn);
    const V per_leg = arcs.inverse_leg, per_square = per_leg * per_leg, unit = amplitude_ * scale_;
    const V scaled = scale_ * arcs.covariance, difference = first[A::kHalf] - second[A::kHalf];
    // h less s K: they nearly agree.
    const V apart1 = fma(scale_, deficit + difference, one), apart2 = fma(scale_, deficit - difference, one);
    Partials<T> p;
    p.value = amplitude_ * turn;
    p.factor = p.value_deficit = unit * per_leg;
    const V slope = scale_ * per_square * p.factor;
    p.factor_deficit = -slope * scaled;
    p.factor_half1 = -slope * apart2;
    p.factor_half2 = -slope * apart1;
    const V of_arc1 = gain_of_arc(first) - apart1 * per_leg * square(first[A::kInverse]);
    const V of_arc2 = gain_of_arc(second) - apart2 * per_leg * square(second[A::kInverse]);
    p.value_half1 = unit * of_arc1;
    p.value_half2 = unit * of_arc2;
    // All depends on products of the scale and the covariances.
    coefficients[0] += bar * turn + factor_bar * scale_ * per_leg;
    const V of_value = fma(first[A::kHalf], of_arc1, fma(second[A::kHalf], of_arc2, deficit * per_leg));
    const V of_factor = -(first[A::kHalf] * apart2 + second[A::kHalf] * apart1 + deficit * scaled);
    coefficients[1] += amplitude_ * (bar * of_value + factor_bar * per_leg * fma(scale_ * per_square, of_factor, one));
    return p;
  }

 private:
  static NT_INLINE V square(V x) { return x * x; }

  // Of the arc of a sample with itself, in `scale` times half the variance.
  template <class Numbers>
  static NT_INLINE V gain_of_arc(const Numbers& numbers) {
    return square(numbers[A::kInverse]) / numbers[A::kLeg];
  }

  V amplitude_, scale_;  // a^2 2/pi, 2 b^2
};

// With h = 1 + var and L as above: E f'(u) f'(v) is 1/4 + (asin(K / sqrt(h1 h2)) + K S / L) / (2 pi), where
//   S = 1/L^2 + 1/h1 + 1/h2,
// and with V = var2 - K^2 / h1 twice the derivative of E f(u) f(v) in var1 is
//   E f''(u) f(v) = (V (1 + 1/h1) - (K / h1)^2 (1 + h1 / L^2)) / (2 pi L).
template <class T>
class GeluPartials {
  using V = Vec<T>;
  using A = Arcs<T>;

 public:
  static constexpr int kCoefficients = 0;

  GeluPartials(const T* c, const Table&) : dual_(c) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V*) const {
    return bar * gain(numbers);
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V, V, V*) const {
    const V two = broadcast(T(2)), share = broadcast(T(0.5) / kPi<T>), half = broadcast(T(0.5));
    Partials<T> p;
    dual_.template apply<false, true>(deficit, first, second, p.value, p.factor);
    p.value_deficit = p.factor;
    const A arcs(broadcast(T(1)), deficit, first, second);
    const V k = arcs.covariance, per_leg = arcs.inverse_leg, per_square = per_leg * per_leg;
    const V i1 = first[A::kInverse] * first[A::kInverse], i2 = second[A::kInverse] * second[A::kInverse];
    const V sum = per_square + i1 + i2;                                      // S
    const V h1h2 = broadcast(T(1)) / (i1 * i2), growth = h1h2 * per_square;  // of K / L, times L
    const V of_covariance = share * per_leg * (broadcast(T(1)) + growth * sum + two * k * k * per_square * per_square);
    // The derivatives in the variances at a fixed covariance.
    const auto of_variance = [&](V inverse) {
      return -share * k * per_leg * inverse * (half + half * growth * sum + growth * per_square + inverse);
    };
    p.factor_deficit = -of_covariance;
    p.factor_half1 = fma(two, of_variance(i1), of_covariance);
    p.factor_half2 = fma(two, of_variance(i2), of_covariance);
    p.value_half1 = gain(first) - p.factor - bent(k, two * second[A::kHalf], i1, per_leg);
    p.value_half2 = gain(second) - p.factor - bent(k, two * first[A::kHalf], i2, per_leg);
    return p;
  }

 private:
  // E f''(u) f(v).
  static NT_INLINE V bent(V k, V other_variance, V inverse, V per_leg) {
    const V one = broadcast(T(1)), regression = k * inverse;
    const V rest = fma(-k, regression, other_variance);
    const V bend = regression * (regression + k * per_leg * per_leg);
    return broadcast(T(0.5) / kPi<T>) * per_leg * fma(rest, one + inverse, -bend);
  }

  // Of half the variance after, in half the variance: both halves of what they are of a pair of equals.
  template <class Numbers>
  static NT_INLINE V gain(const Numbers& numbers) {
    const V share = broadcast(T(0.5) / kPi<T>), var = numbers[A::kHalf] + numbers[A::kHalf];
    const V inverse = numbers[A::kInverse] * numbers[A::kInverse], per_leg = broadcast(T(1)) / numbers[A::kLeg];
    const V arc = numbers[A::kArc] + numbers[A::kArc];
    const V factor = fma(share, fma(var * per_leg, fma(per_leg, per_leg, inverse + inverse), arc), broadcast(T(0.25)));
    return factor + bent(var, var, inverse, per_leg);
  }

  Gelu<T> dual_;
};

}  // namespace NT_LEVEL
}  // namespace nt
