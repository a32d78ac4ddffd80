// Derivatives of trigonometric and exponential functions.
#pragma once

#include "backward_partials.h"
#include "duals_exponential.h"

namespace nt {
namespace NT_LEVEL {

// With A = a^2/2, S = b^2, D the deficit of u and v, F that of u and -v, E = exp(-S D) and G = exp(-S F):
//   E f(u) f(v) = A (E - cos(2 c) G), and the factor is A S (E + cos(2 c) G).
// All but A depends on products of S and the covariances. The coefficients 1 + cos 2c and sin^2 c are functions of
// cos 2c, whose cotangent holds theirs.
template <class T>
class SinPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = 5;

  SinPartials(const T* c, const Table&)
      : unit_(with_unit<Sin<T>, kCoefficients>(c, 0)),
        amplitude_(broadcast(c[0])),
        square_(broadcast(c[1])),
        cos2_(broadcast(c[2])),
        one_plus_cos2_(broadcast(c[3])),
        sin_square_(broadcast(c[4])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    const V half = broadcast(T(0.5)), var = numbers[1];
    const ExpPair<T> decay = exp_pair<T>(-square_ * (var + var));
    const V of_amplitude = amplitude_ * bar, of_product = of_amplitude * cos2_ * decay.exp;
    coefficients[0] = fma(bar, fma(-half * cos2_, decay.expm1, sin_square_), coefficients[0]);
    coefficients[1] = fma(of_product, var, coefficients[1]);
    coefficients[2] = fma(-half * of_amplitude, decay.exp, coefficients[2]);
    return (square_ + square_) * of_product;
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V half = broadcast(T(0.5)), var1 = first[1], var2 = second[1];
    const V d = square_ * deficit, opposite = square_ * (var1 + var2) - d, difference = square_ * (var1 - var2);
    const V near = exp_pair<T>(-d).exp, far = exp_pair<T>(-opposite).exp;
    const V apart = difference_of_exponentials<T>(near, far, opposite - d);
    const V sum = fma(-cos2_, apart, one_plus_cos2_ * near);                         // E + cos(2 c) G
    const V bend = square_ * fma(cos2_, apart, (sin_square_ + sin_square_) * near);  // S (E - cos(2 c) G)
    const V own1 = exp_pair<T>(-square_ * (var1 + var1)).exp, own2 = exp_pair<T>(-square_ * (var2 + var2)).exp;
    const V two_cos2 = cos2_ + cos2_, unit = amplitude_ * square_;
    const V half1 = two_cos2 * difference_of_exponentials<T>(own1, far, -difference - d);
    const V half2 = two_cos2 * difference_of_exponentials<T>(own2, far, difference - d);
    const V of_far = square_ * two_cos2 * far;
    Partials<T> p;
    V value;
    unit_.template apply<false, false>(deficit, first, second, value, p.factor);
    p.value = amplitude_ * value;
    p.factor = p.value_deficit = unit * sum;
    p.value_half1 = unit * half1;
    p.value_half2 = unit * half2;
    p.factor_deficit = -unit * bend;
    p.factor_half1 = p.factor_half2 = -unit * of_far;
    const V of_value = fma(half, fma(var1, half1, var2 * half2), deficit * sum);
    const V of_factor = sum - fma(half * (var1 + var2), of_far, deficit * bend);
    coefficients[0] += fma(bar, value, factor_bar * square_ * sum);
    coefficients[1] += amplitude_ * fma(bar, of_value, factor_bar * of_factor);
    coefficients[2] += amplitude_ * fma(bar, far - half * (own1 + own2), factor_bar * square_ * far);
    return p;
  }

 private:
  Sin<T> unit_;  // with the amplitude 1
  V amplitude_, square_, cos2_, one_plus_cos2_, sin_square_;
};

template <class T>
class RbfPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = 1;

  RbfPartials(const T* c, const Table&) : rate_(broadcast(c[0])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers&, V, V*) const {
    return V{};  // it is 1/2
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First&, const Second&, V bar, V factor_bar, V* coefficients) const {
    const V scaled = rate_ * deficit;
    const ExpPair<T> near = exp_pair<T>(-scaled);
    Partials<T> p{};
    p.value = -near.expm1;
    p.factor = p.value_deficit = rate_ * near.exp;
    p.factor_deficit = -rate_ * p.factor;
    coefficients[0] += near.exp * fma(bar, deficit, factor_bar * (broadcast(T(1)) - scaled));
    return p;
  }

 private:
  V rate_;
};

// With A = a^2, S = b^2, D the deficit and W = exp(S (var1 + var2 - D)): E f(u) f(v) = A W, and the factor is A S W.
template <class T>
class ExpPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = 2;

  ExpPartials(const T* c, const Table&)
      : unit_(with_unit<Exp<T>, kCoefficients>(c, 0)), amplitude_(broadcast(c[0])), square_(broadcast(c[1])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    const V growth = bar * exp_pair<T>(square_ * (numbers[1] + numbers[1])).exp, of_product = amplitude_ * growth;
    coefficients[0] = fma(broadcast(T(0.5)), growth, coefficients[0]);
    coefficients[1] = fma(of_product, numbers[1], coefficients[1]);
    return (square_ + square_) * of_product;
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V var1 = first[1], var2 = second[1], sum = (var1 + var2) - deficit;
    const V d = square_ * deficit, difference = square_ * (var1 - var2);
    const V w = exp_pair<T>(square_ * (var1 + var2) - d).exp;
    const V own1 = exp_pair<T>(square_ * (var1 + var1)).exp, own2 = exp_pair<T>(square_ * (var2 + var2)).exp;
    const V apart1 = difference_of_exponentials<T>(own1, w, d + difference);
    const V apart2 = difference_of_exponentials<T>(own2, w, d - difference);
    const V unit = amplitude_ * square_, two_units = unit + unit;
    Partials<T> p;
    V value;
    unit_.template apply<false, false>(deficit, first, second, value, p.factor);
    p.value = amplitude_ * value;
    p.factor = p.value_deficit = unit * w;
    p.value_half1 = two_units * apart1;
    p.value_half2 = two_units * apart2;
    p.factor_deficit = -square_ * p.factor;
    p.factor_half1 = p.factor_half2 = -(p.factor_deficit + p.factor_deficit);
    const V of_value = fma(var1, apart1, fma(var2, apart2, deficit * w));
    const V of_factor = w * fma(square_, sum, broadcast(T(1)));
    coefficients[0] += fma(bar, value, factor_bar * square_ * w);
    coefficients[1] += amplitude_ * fma(bar, of_value, factor_bar * of_factor);
    return p;
  }

 private:
  Exp<T> unit_;  // with the amplitude 1
  V amplitude_, square_;
};

// With A the amplitude, s the product of the standard deviations, w = 1 - c and E = exp(-gamma w):
//   E f(u) f(v) = A s E, the factor is A gamma E, and
//   s dw = dD - (var1 - K) dhalf1 / var1 - (var2 - K) dhalf2 / var2,   ds = s (dhalf1 / var1 + dhalf2 / var2).
// At zero variance the terms that are divided by it are dropped.
template <class T>
class ExpNormalizedPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = 2;

  ExpNormalizedPartials(const T* c, const Table&)
      : unit_(with_unit<ExpNormalized<T>, kCoefficients>(c, 1)), gamma_(broadcast(c[0])), amplitude_(broadcast(c[1])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    coefficients[1] = fma(broadcast(T(0.5)) * bar, numbers[1], coefficients[1]);
    return amplitude_ * bar;
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V zero{}, half = broadcast(T(0.5)), one = broadcast(T(1)), difference = first[1] - second[1];
    const Angular<T> a = angular_deficit<T>(deficit, difference, first[2], second[2]);
    const V per_scale = reciprocal<T>(a.scale), w = if_positive(a.scale, a.angular * per_scale, one);
    const V decay = exp_pair<T>(-gamma_ * w).exp, slope = gamma_ * decay;
    const V both_vary = if_positive(a.scale, slope, zero), bend = amplitude_ * gamma_ * slope * per_scale;
    // (var - K) / var
    const V turn1 = fma(half, difference, deficit) * reciprocal<T>(first[1]);
    const V turn2 = fma(-half, difference, deficit) * reciprocal<T>(second[1]);
    const V gain1 = decay * a.scale * reciprocal<T>(first[1]), gain2 = decay * a.scale * reciprocal<T>(second[1]);
    Partials<T> p;
    V value;
    unit_.template apply<false, false>(deficit, first, second, value, p.factor);
    p.value = amplitude_ * value;
    p.factor = amplitude_ * slope;
    p.value_deficit = amplitude_ * both_vary;
    p.value_half1 = amplitude_ * ((one - gain1) - both_vary * turn1);
    p.value_half2 = amplitude_ * ((one - gain2) - both_vary * turn2);
    p.factor_deficit = -bend;
    p.factor_half1 = bend * turn1;
    p.factor_half2 = bend * turn2;
    coefficients[0] += amplitude_ * decay * fma(bar, a.angular, factor_bar * fma(-gamma_, w, one));
    coefficients[1] += fma(bar, value, factor_bar * slope);
    return p;
  }

 private:
  ExpNormalized<T> unit_;  // with the amplitude 1
  V gamma_, amplitude_;
};

}  // namespace NT_LEVEL
}  // namespace nt
