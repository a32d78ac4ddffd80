// Polynomials, by their expansions in Hermite polynomials.
#pragma once

#include "duals_common.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

// A polynomial, or anything else with E f(u) f(v) the sum of p_l(var1) p_l(var2) K^l, for polynomials p_l: see
// nt_core/activations/hermite.py.
template <class T>
class Series {
  using V = Vec<T>;

 public:
  static constexpr int kDegree = kMaxDegree, kTerms = kDegree / 2 + 1;
  static constexpr int kCoefficients = (kDegree + 1) * kTerms;

  // The coefficient of q^i in p_l is c[l * kTerms + i]; l + 2 i is at most the degree.
  explicit Series(const T* c) {
    for (int l = 0; l <= kDegree; ++l) {
      for (int i = 0; l + 2 * i <= kDegree; ++i) {
        const T number = c[l * kTerms + i];
        coefficients_[l][i] = broadcast(number);
        if (number == T(0)) continue;
        terms_[l] = i + 1;
        if (l + i > degree_) degree_ = l + i;
      }
    }
  }

  NT_INLINE int degree() const { return degree_; }

  NT_INLINE V variance(V var) const {
    V powers[kDegree + 1];
    set_powers(var, degree_, powers);
    V total{};
    for (int l = 0; l <= degree_; ++l) {
      if (terms_[l] == 0) continue;
      const V p = evaluate(l, powers);
      total = fma(p * p, powers[l], total);
    }
    return total;
  }

  // The covariance after, or the deficit, and the factor. A covariance that is small beside the variances keeps its
  // digits only where it is summed by itself: it is not their mean less the deficit.
  template <bool kCovariance, bool kNtk>
  NT_INLINE void dual(V deficit, V var1, V var2, V& value, V& factor) const {
    const V mean = broadcast(T(0.5)) * (var1 + var2), covariance = mean - deficit;
    V powers1[kDegree + 1], powers2[kDegree + 1], powers[kDegree + 1];
    set_powers(var1, degree_, powers1);
    set_powers(var2, degree_, powers2);
    set_powers(covariance, degree_, powers);
    [[maybe_unused]] Differences apart;
    if constexpr (!kCovariance) {
      set_differences(mean, broadcast(T(0.5)) * (var1 - var2), deficit, degree_, powers, apart);
    }
    value = factor = V{};
    for (int l = 0; l <= degree_; ++l) {
      if (terms_[l] == 0) continue;
      const V both = evaluate(l, powers1) * evaluate(l, powers2);
      if constexpr (kCovariance) {
        value = fma(both, powers[l], value);
      } else {
        const V slopes = evaluate(l, apart.quotients) * evaluate(l, apart.quotients + l);
        value = fma(both, apart.own[l], fma(apart.two_squares, slopes, value));
      }
      if constexpr (kNtk) {
        if (l > 0) factor = fma(broadcast(T(l)) * both, powers[l - 1], factor);
      }
    }
  }

 protected:
  // What tells the powers of two variances and of a covariance apart: (var1^k - var2^k) / (var1 - var2), the mean of
  // var1^k and var2^k less K^k, and twice the square of half the difference of the variances.
  struct Differences {
    V quotients[kDegree + 1], own[kDegree + 1], two_squares;
  };

  static NT_INLINE void set_differences(V mean, V half_difference, V deficit, int degree, const V* powers,
                                        Differences& apart) {
    const V zero{}, square = half_difference * half_difference, mean_square = mean * mean;
    const V of_squares = deficit * (mean + (mean - deficit));  // mean^2 - K^2
    apart.two_squares = square + square;
    apart.quotients[0] = apart.own[0] = zero;
    V mean_of_powers = broadcast(T(1)), excess = zero, missing[2] = {zero, deficit};
    for (int k = 1; k <= degree; ++k) {
      excess = fma(mean, excess, square * apart.quotients[k - 1]);
      apart.quotients[k] = fma(mean, apart.quotients[k - 1], mean_of_powers);
      mean_of_powers = fma(mean, mean_of_powers, square * apart.quotients[k - 1]);
      if (k > 1) {
        const V next = fma(mean_square, missing[0], powers[k - 2] * of_squares);
        missing[0] = missing[1];
        missing[1] = next;
      }
      apart.own[k] = excess + missing[1];
    }
  }

  static NT_INLINE void set_powers(V x, int degree, V* powers) {
    powers[0] = broadcast(T(1));
    for (int k = 1; k <= degree; ++k) powers[k] = powers[k - 1] * x;
  }

  // p_l, of the powers of its argument
  NT_INLINE V evaluate(int l, const V* powers) const {
    V total = coefficients_[l][0] * powers[0];
    for (int i = 1; i < terms_[l]; ++i) total = fma(coefficients_[l][i], powers[i], total);
    return total;
  }

  int degree_ = 0, terms_[kDegree + 1] = {};
  V coefficients_[kDegree + 1][kTerms];
};

template <class T>
class Polynomial {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 2;  // half the variance after, the variance

  explicit Polynomial(const T* c) : series_(c) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[1] = half + half;
    numbers[0] = broadcast(T(0.5)) * series_.variance(numbers[1]);
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    series_.template dual<kCovariance, kNtk>(deficit, first[1], second[1], value, factor);
  }

 private:
  Series<T> series_;
};

}  // namespace NT_LEVEL
}  // namespace nt
