// Error functions.
#pragma once

#include "arc_polynomials.h"
#include "duals_common.h"
#include "relu_polynomials.h"

namespace nt {
namespace NT_LEVEL {

// The angles whose sines are |K| / sqrt((1 + var1) (1 + var2)), of `scale` times the covariances: one for each pair,
// and for each sample its own. See docs/numerics.md.
template <class T>
struct Arcs {
  using V = Vec<T>;
  enum Number { kHalf = 1, kLeg, kArc, kInverse, kNumbers };  // of each sample; before them, half the variance after

  V covariance;
  V mean_leg, leg_product, gap;                 // of both samples alone
  V deficit, leg_excess, inverse_leg;           // of |K|: from the triangle between the samples' own to its own
  V inverse, mean_share;                        // of the hypotenuse of either; `mean_leg` in units of it
  V own_arc, turn, turn_excess, one_minus_cos;  // the angle between them is `turn`

  static NT_INLINE void prepare(V scale, V half, V* numbers) {
    const V one = broadcast(T(1)), var = scale * (half + half), plus = one + var;
    numbers[kHalf] = half;
    numbers[kLeg] = sqrt(fma(broadcast(T(2)), var, one));
    numbers[kInverse] = one / sqrt(plus);
    const V root = var * numbers[kInverse] / sqrt(plus + numbers[kLeg]);  // of 1 less the cosine of the own angle
    numbers[kArc] = broadcast(kPi<T> / 2) * root * horner<T>(ReluPolynomials<T>::p, root * root);
  }

  template <class First, class Second>
  NT_INLINE Arcs(V scale, V unscaled, const First& first, const Second& second) {
    const V zero{}, half = broadcast(T(0.5)), one = broadcast(T(1));
    const V mean = first[kHalf] + second[kHalf];
    covariance = mean - unscaled;
    mean_leg = half * (first[kLeg] + second[kLeg]);
    leg_product = first[kLeg] * second[kLeg];
    const V half_difference = scale * (first[kHalf] - second[kHalf]) / mean_leg;  // of the legs
    gap = half_difference * half_difference;
    const V twice_opposite = leg_product - one, opposite = half * twice_opposite;
    // Where the variances differ much, most of the deficit is the gap; the other difference has more digits.
    const V near = fma(scale, min(mean + covariance, unscaled), -gap);
    const V far = fma(-scale, max(covariance, -covariance), opposite);
    deficit = max(zero, if_positive(gap - opposite, far, near));
    const V leg_square_excess = deficit * (twice_opposite - deficit);
    const V leg = sqrt(fma(mean_leg, mean_leg, leg_square_excess)), legs = leg + mean_leg;
    const V inverses = one / (leg * legs);
    inverse_leg = legs * inverses;
    leg_excess = leg_square_excess * (leg * inverses);
    inverse = first[kInverse] * second[kInverse];
    mean_share = mean_leg * inverse;
    const V excess_share = leg_excess * inverse, deficit_share = deficit * inverse;
    const V sin = fma(excess_share, opposite * inverse, deficit_share * mean_share);
    one_minus_cos = half * fma(excess_share, excess_share, deficit_share * deficit_share);
    turn_excess = sin * one_minus_cos * horner<T>(ArcPolynomials<T>::turn, one_minus_cos);
    turn = sin + turn_excess;
    own_arc = first[kArc] + second[kArc];
  }
};

// a erf(b x) + c
template <class T>
class Erf {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = Arcs<T>::kNumbers;

  explicit Erf(const T* c) : amplitude_(broadcast(c[0])), scale_(broadcast(c[1])), shift_(broadcast(c[2])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    Arcs<T>::prepare(scale_, half, numbers);
    numbers[0] = fma(amplitude_, numbers[Arcs<T>::kArc], broadcast(T(0.5)) * shift_);
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const Arcs<T> arcs(scale_, deficit, first, second);
    const V beyond = (arcs.own_arc + arcs.own_arc) - arcs.turn;
    const V after = amplitude_ * if_positive(-arcs.covariance, beyond, arcs.turn);
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = amplitude_ * scale_ * arcs.inverse_leg;
  }

 private:
  V amplitude_, scale_, shift_;  // a^2 2/pi, 2 b^2, c^2
};

// x Phi(x), with Phi the normal distribution function.
template <class T>
class Gelu {
  using V = Vec<T>;
  using A = Arcs<T>;

 public:
  static constexpr int kNumbers = A::kNumbers;

  explicit Gelu(const T*) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    const V var = half + half, one = broadcast(T(1));
    A::prepare(one, half, numbers);
    const V angular = numbers[A::kArc] + var / ((one + var) * numbers[A::kLeg]);
    numbers[0] = half * fma(angular, broadcast(1 / kPi<T>), broadcast(T(0.25)));
    return numbers[0];
  }

  // Of x/2 a quarter of the deficit, and of the even part terms that are positive.
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    V before;
    apply<kCovariance, kNtk>(deficit, first, second, value, factor, before);
  }

  // And the covariance before it.
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor, V& before) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), quarter = broadcast(T(0.25));
    const V share = broadcast(T(0.5) / kPi<T>);
    const A arcs(one, deficit, first, second);
    before = arcs.covariance;
    const V arc = arcs.own_arc - arcs.turn;
    const V inverses = fma(first[A::kInverse], first[A::kInverse], second[A::kInverse] * second[A::kInverse]);
    const V per_legs = arcs.inverse_leg / arcs.leg_product;
    // The sine of half the difference of the own angles has the square gap * inverse^2.
    const V own_arcs = horner<T>(ArcPolynomials<T>::arcsine, (arcs.gap * arcs.inverse) * arcs.inverse);
    const V of_gap = fma(arcs.mean_share, (arcs.inverse + arcs.inverse) + own_arcs, arcs.own_arc + per_legs);
    const V of_leg = fma(arcs.mean_leg, per_legs, inverses);
    V sum = arcs.mean_leg * arcs.one_minus_cos;
    sum = fma(fma(half, arcs.leg_product, -half), arcs.turn_excess, sum);
    sum = fma(arcs.deficit, arc, sum);
    sum = fma(arcs.leg_excess, of_leg, sum);
    sum = fma(arcs.gap, of_gap, sum);
    value = deficit_or_covariance<kCovariance>(fma(share, sum, quarter * deficit), first, second);
    if constexpr (kNtk) {
      const V of_inverses = fma(arcs.inverse_leg, arcs.inverse_leg, inverses);
      const V signed_arc = if_positive(arcs.covariance, arc, -arc);
      factor = fma(share, fma(arcs.covariance * arcs.inverse_leg, of_inverses, signed_arc), quarter);
    }
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
