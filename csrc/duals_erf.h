// Error functions.
#pragma once

#include "duals_legs.h"

namespace nt {
namespace NT_LEVEL {

// And the angles of these triangles: see `_arcs` in nt_core/activations/erf.py.
template <class T>
struct Arcs : Legs<T> {
  using V = Vec<T>;
  using L = Legs<T>;
  enum Plane { kNormRoot = L::kPlanes, kPlanes };  // and those of Legs

  V sin, cos, skew;

  static NT_INLINE void prepare(V scale, V var, V* planes) {
    L::prepare(scale, var, planes);
    planes[kNormRoot] = sqrt(fma(scale, var, broadcast(T(1))));
  }

  // asin(var / (1 + var)), of the scaled variance
  static NT_INLINE V own_arcsine(V scale, const V* planes) {
    return angle<T>(scale * planes[L::kVariance], planes[L::kLeg]);
  }

  template <class First, class Second>
  NT_INLINE Arcs(V scale, V unscaled, const First& first, const Second& second) : L(scale, unscaled, first, second) {
    const V zero{}, half = broadcast(T(0.5)), one = broadcast(T(1));
    const V var1 = scale * first[L::kVariance], var2 = scale * second[L::kVariance], deficit = scale * unscaled;
    const V mean = L::mean, mean_leg = L::mean_leg;
    const V leg_product = first[L::kLeg] * second[L::kLeg];
    const V norm_root = first[kNormRoot] * second[kNormRoot];
    const V norm = one / ((one + mean) * norm_root);
    sin = fma(mean, L::leg_excess, mean_leg * deficit) * norm;
    cos = fma(mean_leg, L::leg, mean * (mean - deficit)) * norm;
    const V half_slope = half * L::difference / mean_leg;
    const V tan_half = half_slope * (one + leg_product) / (fma(norm_root, norm_root, leg_product) + var1 * var2);
    skew = angle<T>(half * L::difference * tan_half / (one + mean), one + zero);
  }
};

// a erf(b x) + c
template <class T>
class Erf {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = Arcs<T>::kPlanes;

  explicit Erf(const T* c) : amplitude_(broadcast(c[0])), scale_(broadcast(c[1])), shift_(broadcast(c[2])) {}

  NT_INLINE V prepare(V half, V* planes) const {
    Arcs<T>::prepare(scale_, half + half, planes);
    planes[0] = broadcast(T(0.5)) * fma(amplitude_, Arcs<T>::own_arcsine(scale_, planes), shift_);
    return planes[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const Arcs<T> arcs(scale_, deficit, first, second);
    const V after = amplitude_ * (angle<T>(arcs.sin, arcs.cos) - arcs.skew);
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = amplitude_ * scale_ / arcs.leg;
  }

 private:
  V amplitude_, scale_, shift_;  // a^2 2/pi, 2 b^2, c^2
};

// x Phi(x), with Phi the normal distribution function.
template <class T>
class Gelu {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = Arcs<T>::kPlanes + 1;
  static constexpr int kInverse = Arcs<T>::kPlanes;  // 1 / (1 + var)

  explicit Gelu(const T*) {}

  NT_INLINE V prepare(V half, V* planes) const {
    const V var = half + half, one = broadcast(T(1));
    Arcs<T>::prepare(one, var, planes);
    planes[kInverse] = one / (one + var);
    const V angular =
        fma(broadcast(T(0.5)), Arcs<T>::own_arcsine(one, planes), var * planes[kInverse] / planes[Arcs<T>::kLeg]);
    planes[0] = half * fma(angular, broadcast(1 / kPi<T>), broadcast(T(0.25)));
    return planes[0];
  }

  // Each term of the covariance is subtracted from its mean over (u, u) and (v, v).
  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    using A = Arcs<T>;
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), quarter = broadcast(T(0.25));
    const A arcs(one, deficit, first, second);
    const V var1 = first[A::kVariance], var2 = second[A::kVariance];
    const V leg_product = first[A::kLeg] * second[A::kLeg];
    const V inverse1 = first[kInverse], inverse2 = second[kInverse];
    const V inverses = inverse1 * inverse2, difference = arcs.difference;
    const V covariance = arcs.mean - deficit;
    const V arcsine = angle<T>(covariance, arcs.leg);
    const V own_arcsine_difference = angle<T>(half * difference * (one + leg_product) / arcs.mean_leg * inverses,
                                              fma(var1, var2, leg_product) * inverses);
    const V of_inverse = arcs.inverse_deficit(first, second);
    const V of_leg =
        fma(half * difference * difference, inverses / arcs.mean_leg, arcs.leg_excess * (inverse1 + inverse2));
    const V of_arcsine =
        fma(deficit, arcsine, fma(quarter * difference, own_arcsine_difference, -arcs.mean * arcs.skew));
    // mean * turn - leg_excess
    const AngleAndExcess<T> turn = angle_and_excess<T>(arcs.sin, arcs.cos);
    const V hypotenuse = sqrt(fma(one + arcs.mean, one + arcs.mean, -arcs.gap));
    const V scale = first[A::kNormRoot] * second[A::kNormRoot];
    const V lengthening = fma(quarter * difference, difference, -arcs.gap) / (hypotenuse + scale);
    const V along = arcs.mean * lengthening * (turn.angle - turn.excess);
    const V across = arcs.mean_leg * fma(scale, one_minus_cos<T>(arcs.sin, arcs.cos), lengthening);
    const V of_both = fma(arcs.mean, turn.excess, (along + across) / hypotenuse);
    const V sum = (of_inverse + of_leg) + (of_arcsine + of_both);
    const V after = fma(broadcast(T(0.5) / kPi<T>), sum, quarter * deficit);
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) {
      const V slope = covariance / arcs.leg * (one / (arcs.leg * arcs.leg) + inverse1 + inverse2);
      factor = fma(arcsine + slope, broadcast(T(0.5) / kPi<T>), quarter);
    }
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
