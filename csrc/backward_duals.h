// Derivatives of nonlinearities.
#pragma once

#include "backward_bounds.h"
#include "backward_erf.h"
#include "backward_exponential.h"
#include "backward_gaussian.h"
#include "backward_hermite.h"
#include "backward_partials.h"
#include "backward_rectified.h"
#include "backward_tabulated.h"
#include "duals_relu.h"

namespace nt {
namespace NT_LEVEL {

// The ReLU family. With h the angle over pi, o what `AbRelu` calls `opposed`, s the product of the standard deviations
// and dA = -s dc the change of the deficit at fixed variances (c is the correlation),
//   do = h dA + o (dvar1 / (2 var1) + dvar2 / (2 var2)),  dh = dA / (pi s sin),
//   dA = dD - (var1 - K) dvar1 / (2 var1) - (var2 - K) dvar2 / (2 var2).
// At zero variance the terms that are divided by it are dropped; dh is 0 where the angle is 0 or pi.
template <class T>
class AbReluBack {
  using V = Vec<T>;

 public:
  static constexpr int kCoefficients = 2;

  AbReluBack(const T* c, const Table&) : slope_(broadcast(c[0])), kink_(broadcast(c[1])) {}

  // From the cotangent of half the variance after, to that of the one before.
  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    coefficients[0] = fma(bar, numbers[0] * numbers[0], coefficients[0]);
    return slope_ * bar;
  }

  // Adds the cotangents of the two coefficients to `coefficients`.
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE DualBars<T> apply(V deficit, V tangent, const First& first, const Second& second, V value_bar,
                              V tangent_bar, V* coefficients) const {
    const V zero{}, one = broadcast(T(1)), pi = broadcast(kPi<T>);
    const V root1 = first[0], root2 = second[0];  // of half the variances
    const V scale = (root1 + root1) * root2, difference = root1 - root2;
    const V inverse1 = first[1], inverse2 = second[1];  // of the standard deviations
    const V angular = fma(-difference, difference, deficit);
    const V negative = angular - scale;
    const V w = distance_from_parallel<T>(deficit, angular, negative, scale, inverse1, inverse2), root = sqrt(w);
    const V p = horner<T>(ReluPolynomials<T>::p, w), of_q = w * horner<T>(ReluPolynomials<T>::q, w);
    const V opposed = fma(scale * root, of_q, max(zero, negative));
    V angle = root * p;
    angle = if_positive(negative, one - angle, angle);
    // The covariance is the variance after, of both, less the deficit after.
    const V bar = kCovariance ? -value_bar : value_bar;
    V angular_bar = -kink_ * bar * angle;
    coefficients[0] = fma(bar, deficit, coefficients[0]);
    coefficients[1] = fma(-bar, opposed, coefficients[1]);
    DualBars<T> bars;
    bars.value = fma(-kink_, opposed, slope_ * deficit);
    if constexpr (kCovariance) bars.value = fma(kink_, opposed, -slope_ * negative);
    bars.tangent = bars.tangent_after = V{};
    if constexpr (kNtk) {
      const V factor = fma(-kink_, angle, slope_), factor_bar = tangent_bar * tangent;
      bars.tangent_after = tangent * factor;
      coefficients[0] += factor_bar;
      coefficients[1] = fma(-factor_bar, angle, coefficients[1]);
      bars.tangent = tangent_bar * factor;
      const V sine = root * fma(one - w, p, of_q);  // over pi
      const V regular = sine - broadcast(kSmallestSine<T>);
      const V per_sine = inverse1 * inverse2 / if_positive(regular, pi * pi * sine, one);
      angular_bar = fma(-kink_ * factor_bar, if_positive(regular, per_sine, zero), angular_bar);
    }
    const V relative_bar = -kink_ * bar * opposed, gap = difference * (root1 + root2);
    bars.deficit = fma(slope_, bar, angular_bar);
    bars.half1 = fma(-angular_bar, deficit + gap, relative_bar) * (inverse1 * inverse1);
    bars.half2 = fma(-angular_bar, deficit - gap, relative_bar) * (inverse2 * inverse2);
    if constexpr (kCovariance) {
      bars.half1 += half_back(first, value_bar, coefficients);
      bars.half2 += half_back(second, value_bar, coefficients);
    }
    return bars;
  }

 private:
  V slope_, kink_;
};

template <class T>
using ErfBack = ByPartials<T, ErfPartials<T>>;
template <class T>
using GeluBack = ByPartials<T, GeluPartials<T>>;
template <class T>
using SinBack = ByPartials<T, SinPartials<T>>;
template <class T>
using RbfBack = ByPartials<T, RbfPartials<T>>;
template <class T>
using ExpBack = ByPartials<T, ExpPartials<T>>;
template <class T>
using ExpNormalizedBack = ByPartials<T, ExpNormalizedPartials<T>>;
template <class T>
using StepBack = ByPartials<T, StepPartials<T>>;
template <class T>
using GaussianBack = ByPartials<T, GaussianPartials<T>>;
template <class T>
using GaborBack = ByPartials<T, GaborPartials<T>>;
template <class T>
using PolynomialBack = ByPartials<T, PolynomialPartials<T>>;
template <class T>
using RectifiedMonomialBack = ByPartials<T, RectifiedMonomialPartials<T>>;
template <class T>
using ClipBack = ByPartials<T, ClipPartials<T>>;
template <class T>
using TabulatedBack = ByPartials<T, TabulatedPartials<T>>;

// Calls a function with the way back through a nonlinearity. With one number of each first sample for all lanes only
// those that are fused are compiled, and `Backward` asks for no others: those take so long that loads do not matter.
template <bool kWide, class T, class Call>
void with_dual_back(Activation activation, const T* coefficients, const Table& table, const Call& call) {
  switch (activation) {
#define NT_DIFFERENTIABLE(name)                                                                            \
  case Activation::k##name:                                                                                \
    static_assert(name##Back<T>::kCoefficients == info(Activation::k##name).coefficients);                 \
    if constexpr (kWide || is_fused(Activation::k##name)) return call(name##Back<T>(coefficients, table)); \
    break;
#include "table.def"
    default:  // never: see `check_way_back`
      break;
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
