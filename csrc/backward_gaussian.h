// Derivatives of Gaussian bells, and of a wave within one.
#pragma once

#include "backward_partials.h"
#include "duals_gaussian.h"

namespace nt {
namespace NT_LEVEL {

// With A the amplitude, S the `scale`, K the covariance and L the leg, L^2 = (1 + S var1) (1 + S var2) - S^2 K^2:
// E f(u) f(v) = A / L, the factor is A S^2 K / L^3, and all but A depends on products of S and the covariances.
template <class T>
class GaussianPartials {
  using V = Vec<T>;
  using L = Legs<T>;

 public:
  static constexpr int kCoefficients = 2;

  GaussianPartials(const T* c, const Table&) : amplitude_(broadcast(c[0])), scale_(broadcast(c[1])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    const V half = broadcast(T(0.5)), inverse = broadcast(T(1)) / numbers[L::kLeg];
    const V of_product = amplitude_ * bar * cube(inverse);
    coefficients[0] = fma(half * bar, inverse, coefficients[0]);
    coefficients[1] = fma(-half * of_product, numbers[L::kVariance], coefficients[1]);
    return -scale_ * of_product;
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V half = broadcast(T(0.5)), one = broadcast(T(1)), three = broadcast(T(3));
    const L legs(scale_, deficit, first, second);
    const V i = one / legs.leg, i1 = one / first[L::kLeg], i2 = one / second[L::kLeg];
    const V scaled = fma(-scale_, deficit, legs.mean), per_cube = cube(i), unit = amplitude_ * scale_;
    // 1 + S (var2 - K), and of the other variance
    const V apart2 = fma(scale_, deficit, fma(-half, legs.difference, one));
    const V apart1 = fma(scale_, deficit, fma(half, legs.difference, one));
    const V half1 = fma(apart2, per_cube, -cube(i1)), half2 = fma(apart1, per_cube, -cube(i2));
    const V slope = scaled * per_cube, steepness = three * scaled * i * i, bend = scale_ * per_cube;
    const V slope_deficit = -bend * fma(steepness, scaled, one);
    const V slope_half1 = bend * fma(-steepness, apart2, one), slope_half2 = bend * fma(-steepness, apart1, one);
    const V shortening = legs.inverse_deficit(first, second);
    Partials<T> p;
    p.value = amplitude_ * shortening;
    p.factor = p.value_deficit = unit * slope;
    p.value_half1 = unit * half1;
    p.value_half2 = unit * half2;
    p.factor_deficit = unit * slope_deficit;
    p.factor_half1 = unit * slope_half1;
    p.factor_half2 = unit * slope_half2;
    const V by1 = half * first[L::kVariance], by2 = half * second[L::kVariance];
    const V of_value = fma(by1, half1, fma(by2, half2, deficit * slope));
    const V of_factor = slope + fma(by1, slope_half1, fma(by2, slope_half2, deficit * slope_deficit));
    coefficients[0] += fma(bar, shortening, factor_bar * scale_ * slope);
    coefficients[1] += amplitude_ * fma(bar, of_value, factor_bar * of_factor);
    return p;
  }

 private:
  static NT_INLINE V cube(V x) { return x * x * x; }

  V amplitude_, scale_;
};

// With P1, P2 and k twice the variances and the covariance, and u the square of the leg:
//   E f(u) f(v) = (N - M) / (2 sqrt(u)),   the factor is (M (E - O) + N (E + O)) / (2 u^(5/2)), where
//   N = exp(-a / u),           a = D + (P1 P2 - k^2) / 2,   E = u + 2 k^2,
//   M = exp(m / u - 1/2),      m = 1/2 + D,                 O = 2 k (u + 1 + (P1 + P2) / 2).
template <class T>
class GaborPartials {
  using V = Vec<T>;
  using L = Legs<T>;

 public:
  static constexpr int kCoefficients = 0;

  GaborPartials(const T* c, const Table&) : dual_(c) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V*) const {
    return bar * gain(numbers);
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V, V, V*) const {
    const V zero{}, one = broadcast(T(1)), two = broadcast(T(2)), four = broadcast(T(4));
    const Waves waves(deficit, first, second);
    const V k = waves.k, twice1 = two * first[L::kVariance], twice2 = two * second[L::kVariance];
    const V apart1 = twice1 - k, apart2 = twice2 - k;
    const Changes of_deficit = waves.changes({-two, zero, four * k, fma(two, k, one), one});
    const Changes of_half1 = waves.changes({two, four, four * (one + apart2), two * apart2, zero});
    const Changes of_half2 = waves.changes({two, four, four * (one + apart1), two * apart1, zero});
    Partials<T> p;
    dual_.template apply<false, true>(deficit, first, second, p.value, p.factor);
    p.value_deficit = p.factor;
    p.factor_deficit = of_deficit.factor;
    p.value_half1 = gain(first) - of_half1.covariance;
    p.value_half2 = gain(second) - of_half2.covariance;
    p.factor_half1 = of_half1.factor;
    p.factor_half2 = of_half2.factor;
    return p;
  }

 private:
  // Derivatives of what the formulas above are made of, and of what they give.
  struct Motion {
    V k, variances, u, a, m;
  };
  struct Changes {
    V covariance, factor;
  };

  struct Waves {
    V k, even, odd, total, inverse, root, a, m, n, of_m;  // total = u + 1 + (P1 + P2) / 2

    template <class First, class Second>
    NT_INLINE Waves(V deficit, const First& first, const Second& second) {
      const V half = broadcast(T(0.5)), one = broadcast(T(1)), two = broadcast(T(2));
      const L legs(two, deficit, first, second);
      const V u = legs.leg * legs.leg;
      k = fma(-two, deficit, legs.mean);
      root = one / legs.leg;
      inverse = root * root;
      total = u + one + legs.mean;
      even = fma(two * k, k, u);
      odd = two * k * total;
      a = fma(half, legs.det, deficit);
      m = half + deficit;
      n = exp_pair<T>(-a * inverse).exp;
      of_m = exp_pair<T>(fma(m, inverse, -half)).exp;
    }

    NT_INLINE Changes changes(const Motion& d) const {
      const V half = broadcast(T(0.5)), two = broadcast(T(2)), relative = d.u * inverse;
      const V dn = -n * inverse * fma(-a, relative, d.a), dm = of_m * inverse * fma(-m, relative, d.m);
      const V deven = fma(broadcast(T(4)) * k, d.k, d.u);
      const V dodd = two * fma(d.k, total, k * fma(half, d.variances, d.u));
      const V sum = fma(of_m, even - odd, n * (even + odd));
      const V dsum = fma(dm, even - odd, dn * (even + odd)) + fma(of_m, deven - dodd, n * (deven + dodd));
      const V of_covariance = fma(-half * relative, n - of_m, dn - dm);
      return {half * root * of_covariance,
              half * root * inverse * inverse * fma(broadcast(T(-2.5)) * relative, sum, dsum)};
    }
  };

  // Of half the variance after, in half the variance.
  template <class Numbers>
  static NT_INLINE V gain(const Numbers& numbers) {
    const V var = numbers[L::kVariance], i = broadcast(T(1)) / numbers[L::kLeg], square = i * i;
    const ExpPair<T> decay = exp_pair<T>(-(var + var) * square);
    return i * square * fma(decay.exp, square, decay.expm1);
  }

  Gabor<T> dual_;
};

}  // namespace NT_LEVEL
}  // namespace nt
