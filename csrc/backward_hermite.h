// Derivatives of polynomials.
#pragma once

#include "backward_partials.h"
#include "duals_hermite.h"

namespace nt {
namespace NT_LEVEL {

// Of E f(u) f(v), the sum of p_l(var1) p_l(var2) K^l. What is of the coefficients is of all that there may be: one that
// is 0 has a derivative, too.
template <class T>
class SeriesPartials : public Series<T> {
  using V = Vec<T>;
  using S = Series<T>;
  using S::coefficients_;
  using S::degree_;
  using S::evaluate;
  using S::kDegree;
  using S::kTerms;
  using S::set_differences;
  using S::set_powers;
  using S::terms_;
  using typename S::Differences;

 public:
  using S::S;

  // Of the variance after, in the variance.
  NT_INLINE V gain(V var) const {
    V powers[kDegree + 1], total{};
    set_powers(var, degree_, powers);
    for (int l = 0; l <= degree_; ++l) {
      if (terms_[l] == 0) continue;
      const V p = evaluate(l, powers);
      total = fma((p + p) * slope(l, powers), powers[l], total);
      if (l > 0) total = fma(broadcast(T(l)) * p * p, powers[l - 1], total);
    }
    return total;
  }

  // The derivative of the factor in the covariance.
  NT_INLINE V bend(V deficit, V var1, V var2) const {
    const Powers at(deficit, var1, var2, degree_);
    V total{};
    for (int l = 2; l <= degree_; ++l) {
      if (terms_[l] == 0) continue;
      total = fma(broadcast(T(l * (l - 1))) * evaluate(l, at.of1) * evaluate(l, at.of2), at.mixed[l - 2], total);
    }
    return total;
  }

  // Of E f(u) f(v) and of the factor in a variance of u, at a fixed covariance.
  struct InVariance {
    V covariance{}, factor{};
  };
  NT_INLINE InVariance in_variance(V deficit, V var, V other) const {
    const Powers at(deficit, var, other, degree_);
    InVariance of;
    for (int l = 0; l <= degree_; ++l) {
      if (terms_[l] == 0) continue;
      const V both = slope(l, at.of1) * evaluate(l, at.of2);
      of.covariance = fma(both, at.mixed[l], of.covariance);
      if (l > 0) of.factor = fma(broadcast(T(l)) * both, at.mixed[l - 1], of.factor);
    }
    return of;
  }

  // Adds what the coefficients have of the cotangents of the deficit after and of the factor.
  NT_INLINE void add_coefficients(V deficit, V var1, V var2, V bar, V factor_bar, V* coefficients) const {
    const V half = broadcast(T(0.5));
    const Powers at(deficit, var1, var2, kDegree);
    Differences apart;
    set_differences(half * (var1 + var2), half * (var1 - var2), deficit, kDegree, at.mixed, apart);
    for (int l = 0; l <= kDegree; ++l) {
      const V p1 = value(l, at.of1), p2 = value(l, at.of2);
      const V low = value(l, apart.quotients), high = value(l, apart.quotients + l);
      const V by_slopes = bar * apart.two_squares;
      V by_values = bar * apart.own[l];
      if (l > 0) by_values = fma(factor_bar * broadcast(T(l)), at.mixed[l - 1], by_values);
      for (int i = 0; l + 2 * i <= kDegree; ++i) {
        const V of_values = fma(at.of1[i], p2, at.of2[i] * p1);
        const V of_slopes = fma(apart.quotients[i], high, apart.quotients[i + l] * low);
        coefficients[l * kTerms + i] += fma(by_values, of_values, by_slopes * of_slopes);
      }
    }
  }

  // And of half the variance after.
  NT_INLINE void add_coefficients(V var, V bar, V* coefficients) const {
    V powers[kDegree + 1];
    set_powers(var, kDegree, powers);
    for (int l = 0; l <= kDegree; ++l) {
      const V p = bar * value(l, powers);
      for (int i = 0; l + 2 * i <= kDegree; ++i) {
        coefficients[l * kTerms + i] = fma(p, powers[l + i], coefficients[l * kTerms + i]);
      }
    }
  }

 private:
  struct Powers {
    V of1[kDegree + 1], of2[kDegree + 1], mixed[kDegree + 1];

    NT_INLINE Powers(V deficit, V var1, V var2, int degree) {
      set_powers(var1, degree, of1);
      set_powers(var2, degree, of2);
      set_powers(broadcast(T(0.5)) * (var1 + var2) - deficit, degree, mixed);
    }
  };

  // p_l, which may be 0
  NT_INLINE V value(int l, const V* powers) const { return terms_[l] == 0 ? V{} : evaluate(l, powers); }

  // The derivative of p_l.
  NT_INLINE V slope(int l, const V* powers) const {
    V total{};
    for (int i = 1; i < terms_[l]; ++i) total = fma(broadcast(T(i)) * coefficients_[l][i], powers[i - 1], total);
    return total;
  }
};

template <class T>
class PolynomialPartials {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = Series<T>::kCoefficients;

  PolynomialPartials(const T* c, const Table&) : series_(c) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    series_.add_coefficients(numbers[1], bar, coefficients);
    return bar * series_.gain(numbers[1]);
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V two = broadcast(T(2)), var1 = first[1], var2 = second[1];
    const auto in_variance1 = series_.in_variance(deficit, var1, var2);
    const auto in_variance2 = series_.in_variance(deficit, var2, var1);
    const V bend = series_.bend(deficit, var1, var2);
    Partials<T> p;
    series_.template dual<false, true>(deficit, var1, var2, p.value, p.factor);
    p.value_deficit = p.factor;
    p.value_half1 = fma(-two, in_variance1.covariance, series_.gain(var1)) - p.factor;
    p.value_half2 = fma(-two, in_variance2.covariance, series_.gain(var2)) - p.factor;
    p.factor_deficit = -bend;
    p.factor_half1 = fma(two, in_variance1.factor, bend);
    p.factor_half2 = fma(two, in_variance2.factor, bend);
    series_.add_coefficients(deficit, var1, var2, bar, factor_bar, coefficients);
    return p;
  }

 private:
  SeriesPartials<T> series_;
};

}  // namespace NT_LEVEL
}  // namespace nt
