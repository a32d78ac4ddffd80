// What derivatives of a nonlinearity are made of: partial derivatives in what it reads of a pair.
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "duals_common.h"

namespace nt {
namespace NT_LEVEL {

// Cotangents of the coefficients of a nonlinearity.
template <class T, class Dual>
using CoefficientBars = std::array<Vec<T>, Dual::kCoefficients>;

// Of a pair: what is after a nonlinearity, and the cotangents of what that reads.
template <class T>
struct DualBars {
  Vec<T> value, tangent_after;
  Vec<T> deficit, tangent, half1, half2;
};

// Of a pair: the deficit after a nonlinearity and the factor of the tangent kernel, and their derivatives in the
// deficit before (that of the deficit after is the factor, but for steps and at zero variance) and, at a fixed deficit,
// in half the variances.
template <class T>
struct Partials {
  Vec<T> value, factor;
  Vec<T> value_deficit, factor_deficit;
  Vec<T> value_half1, value_half2, factor_half1, factor_half2;
};

// As in nt_core/activations/relu.py, for sines nearer to 0 derivatives in angles are taken for 0: the cube root of the
// smallest normal number.
template <class T>
inline constexpr T kSmallestSine = sizeof(T) == sizeof(float) ? T(2.2737368e-13) : T(2.8126442852362996e-103);

// 1/x, and 0 where x is no positive number that has an inverse.
template <class T>
NT_INLINE Vec<T> reciprocal(Vec<T> x) {
  const Vec<T> one = broadcast(T(1)), regular = x - broadcast(std::numeric_limits<T>::min());
  return if_positive(regular, one / if_positive(regular, x, one), Vec<T>{});
}

// exp(x) - exp(y) of both exponentials and x - y: by the larger one.
template <class T>
NT_INLINE Vec<T> difference_of_exponentials(Vec<T> exp_x, Vec<T> exp_y, Vec<T> excess) {
  const Vec<T> decay = exp_pair<T>(-max(excess, -excess)).expm1;
  return if_positive(excess, -exp_x * decay, exp_y * decay);
}

// A nonlinearity with these coefficients, but for one that is 1: what a result is in proportion to may be 0.
template <class Dual, int kCoefficients, class T>
Dual with_unit(const T* coefficients, int unit) {
  std::array<T, kCoefficients> numbers;
  std::copy(coefficients, coefficients + kCoefficients, numbers.begin());
  numbers[unit] = T(1);
  return Dual(numbers.data());
}

// The way back through a nonlinearity by its partial derivatives. `Dual` is a class with
//   kCoefficients  how many numbers have cotangents,
//   half_back      maps numbers of a sample and the cotangent of half the variance after to that of the one before,
//   operator()     returns the partial derivatives, for the cotangents of the deficit and of the factor;
// the last two add to the cotangents of coefficients.
template <class T, class Dual>
class ByPartials : public Dual {
  using V = Vec<T>;

 public:
  using Dual::Dual;

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE DualBars<T> apply(V deficit, V tangent, const First& first, const Second& second, V value_bar,
                              V tangent_bar, V* coefficients) const {
    const V bar = kCovariance ? -value_bar : value_bar, factor_bar = kNtk ? tangent_bar * tangent : V{};
    const Partials<T> p = (*this)(deficit, first, second, bar, factor_bar, coefficients);
    DualBars<T> bars;
    bars.value = deficit_or_covariance<kCovariance>(p.value, first, second);
    bars.tangent_after = kNtk ? tangent * p.factor : V{};
    bars.tangent = kNtk ? tangent_bar * p.factor : V{};
    bars.deficit = fma(factor_bar, p.factor_deficit, bar * p.value_deficit);
    bars.half1 = fma(factor_bar, p.factor_half1, bar * p.value_half1);
    bars.half2 = fma(factor_bar, p.factor_half2, bar * p.value_half2);
    if constexpr (kCovariance) {  // the sum of half the variances less the deficit
      bars.half1 += this->half_back(first, value_bar, coefficients);
      bars.half2 += this->half_back(second, value_bar, coefficients);
    }
    return bars;
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
