// Nonlinearities: what they do to a deficit, to the tangent kernel and to a variance. See docs/numerics.md.
//
// Each is a class with
//   kPlanes          how many numbers it wants to have of each sample and position,
//   prepare          computes these from half the variance, and returns half the variance after it,
//   apply            maps a deficit and the numbers of both samples to the deficit after it (the covariance if
//                    `kCovariance`) and to the factor of the tangent kernel.
#pragma once

#include "functions.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

template <class T>
inline constexpr T kPi = T(3.14159265358979323846);

// The ReLU family, see docs/cpu-engine.md. `slope` is the mean square slope (a^2 + b^2)/2, `kink` is (a - b)^2/2.
template <class T>
class AbRelu {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = 2;  // root of half the variance, and reciprocal standard deviation

  explicit AbRelu(const T* c) : slope_(broadcast(c[0])), kink_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* planes) const {
    planes[0] = sqrt(half);
    planes[1] = if_positive(half, broadcast(T(1)) / sqrt(half + half), V{});
    return half * slope_;
  }

  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    V before;
    apply<kCovariance, kNtk>(deficit, first, second, value, factor, before);
  }

  // And the covariance before it.
  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor, V& before) const {
    const V zero{}, one = broadcast(T(1));
    const V scale = (first[0] + first[0]) * second[0];  // product of the standard deviations
    const V difference = first[0] - second[0];
    const V angular = fma(-difference, difference, deficit);  // scale (1 - c)
    V u = (angular * first[1]) * second[1];
    u = if_positive(scale, u, one);
    const V w = max(zero, min(u, broadcast(T(2)) - u));  // 1 - |c|; NaN stays NaN
    const V root = sqrt(w);
    const V negative = angular - scale;
    before = -negative;
    const V opposed = fma(scale * w, root * horner<T>(ReluPolynomials<T>::q, w), max(zero, negative));
    if constexpr (kCovariance) {
      value = fma(kink_, opposed, slope_ * before);
    } else {
      value = fma(-kink_, opposed, slope_ * deficit);
    }
    if constexpr (kNtk) {
      V angle = root * horner<T>(ReluPolynomials<T>::p, w);  // arccos |c| / pi
      angle = if_positive(negative, one - angle, angle);
      factor = fma(-kink_, angle, slope_);
    }
  }

 private:
  V slope_, kink_;
};

// What follows derives the covariance from the variances: the first plane is half the variance after.
template <bool kCovariance, class V>
NT_INLINE V deficit_or_covariance(V deficit, const V* first, const V* second) {
  if constexpr (kCovariance) return (first[0] + second[0]) - deficit;
  return deficit;
}

// The triangles with hypotenuses sqrt((1 + var1) (1 + var2)) and opposite sides that are covariances: see `_arcs` in
// nt_core/activations/erf.py.
template <class T>
struct Arcs {
  using V = Vec<T>;
  enum Plane {
    kVariance = 1,
    kRoot,
    kLeg,
    kNormRoot,
    kPlanes
  };  // of each sample; before them, half the variance after

  V leg, mean_leg, leg_excess, gap, sin, cos, skew, mean, difference;

  static NT_INLINE void prepare(V var, V* planes) {
    const V one = broadcast(T(1));
    planes[kVariance] = var;
    planes[kRoot] = sqrt(var);
    planes[kLeg] = sqrt(one + (var + var));
    planes[kNormRoot] = sqrt(one + var);
  }

  // asin(var / (1 + var))
  static NT_INLINE V own_arcsine(const V* planes) { return angle<T>(planes[kVariance], planes[kLeg]); }

  NT_INLINE Arcs(V deficit, const V* first, const V* second) {
    const V zero{}, half = broadcast(T(0.5)), one = broadcast(T(1));
    const V var1 = first[kVariance], var2 = second[kVariance];
    const V leg_product = first[kLeg] * second[kLeg];
    mean_leg = half * (first[kLeg] + second[kLeg]);
    mean = half * (var1 + var2);
    difference = var1 - var2;
    const V half_slope = half * difference / mean_leg;
    gap = half_slope * half_slope;
    const V det = determinant(deficit, first[kRoot], second[kRoot]);
    leg = sqrt(one + var1 + var2 + det);
    leg_excess = (det + gap) / (leg + mean_leg);
    const V norm_root = first[kNormRoot] * second[kNormRoot];
    const V scale = one / ((one + mean) * norm_root);
    sin = fma(mean, leg_excess, mean_leg * deficit) * scale;
    cos = fma(mean_leg, leg, mean * (mean - deficit)) * scale;
    const V tan_half = half_slope * (one + leg_product) / (fma(norm_root, norm_root, leg_product) + var1 * var2);
    skew = angle<T>(half * difference * tan_half / (one + mean), one + zero);
  }

 private:
  // var1 var2 - K^2. The difference of the roots is that of the variances, which has more digits, over their sum.
  NT_INLINE V determinant(V deficit, V root1, V root2) const {
    const V zero{};
    const V total = root1 + root2, twice_scale = (root1 + root1) * root2;
    const V apart = if_positive(total, difference / if_positive(total, total, broadcast(T(1))), zero);
    const V angular = min(twice_scale, max(zero, fma(broadcast(T(-0.5)) * apart, apart, deficit)));
    return angular * (twice_scale - angular);
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
    Arcs<T>::prepare(scale_ * (half + half), planes);
    planes[0] = broadcast(T(0.5)) * fma(amplitude_, Arcs<T>::own_arcsine(planes), shift_);
    return planes[0];
  }

  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    const Arcs<T> arcs(scale_ * deficit, first, second);
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
    Arcs<T>::prepare(var, planes);
    planes[kInverse] = one / (one + var);
    const V angular =
        fma(broadcast(T(0.5)), Arcs<T>::own_arcsine(planes), var * planes[kInverse] / planes[Arcs<T>::kLeg]);
    planes[0] = half * fma(angular, broadcast(1 / kPi<T>), broadcast(T(0.25)));
    return planes[0];
  }

  // Each term of the covariance is subtracted from its mean over (u, u) and (v, v).
  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    using A = Arcs<T>;
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), quarter = broadcast(T(0.25));
    const A arcs(deficit, first, second);
    const V var1 = first[A::kVariance], var2 = second[A::kVariance];
    const V leg_product = first[A::kLeg] * second[A::kLeg];
    const V inverse1 = first[kInverse], inverse2 = second[kInverse];
    const V inverses = inverse1 * inverse2, difference = arcs.difference;
    const V covariance = arcs.mean - deficit;
    const V arcsine = angle<T>(covariance, arcs.leg);
    const V own_arcsine_difference = angle<T>(half * difference * (one + leg_product) / arcs.mean_leg * inverses,
                                              fma(var1, var2, leg_product) * inverses);
    const V of_inverse = fma(arcs.mean_leg, arcs.leg_excess, arcs.gap) / (arcs.leg * leg_product);
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

// a sin(b x + c)
template <class T>
class Sin {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = 2;  // half the variance after, b^2 var

  explicit Sin(const T* c)
      : amplitude_(broadcast(c[0])),
        square_(broadcast(c[1])),
        cos2_(broadcast(c[2])),
        one_plus_cos2_(broadcast(c[3])),
        sin_square_(broadcast(c[4])) {}

  NT_INLINE V prepare(V half, V* planes) const {
    planes[1] = square_ * (half + half);
    const V minus_one = exp_pair<T>(-(planes[1] + planes[1])).expm1;
    planes[0] = amplitude_ * fma(broadcast(T(-0.5)) * cos2_, minus_one, sin_square_);
    return planes[0];
  }

  // With D the deficit of u and v and F that of u and -v, times b^2: 2/a^2 E f(u) f(v) = exp(-D) - cos(2 c) exp(-F).
  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    const V d = square_ * deficit, total = first[1] + second[1], difference = first[1] - second[1];
    const V opposite = total - d;
    const ExpPair<T> near = exp_pair<T>(-d), far = exp_pair<T>(-opposite);
    const V by_deficit = -near.expm1 * fma(cos2_, far.expm1, one_plus_cos2_);
    // exp(-var1) - exp(-var2), but for its sign
    const V larger = exp_pair<T>(-min(first[1], second[1])).exp;
    const V by_difference = larger * exp_pair<T>(-max(difference, -difference)).expm1;
    const V sum = fma(broadcast(T(-0.5)) * cos2_ * by_difference, by_difference, by_deficit);
    value = deficit_or_covariance<kCovariance>(amplitude_ * sum, first, second);
    if constexpr (kNtk) {
      // exp(-D) - exp(-F), by the larger one
      const V twice_covariance = opposite - d;
      const V smaller = exp_pair<T>(-max(twice_covariance, -twice_covariance)).expm1;
      const V apart = if_positive(twice_covariance, -near.exp * smaller, far.exp * smaller);
      factor = amplitude_ * square_ * fma(-cos2_, apart, one_plus_cos2_ * near.exp);
    }
  }

 private:
  V amplitude_, square_, cos2_, one_plus_cos2_, sin_square_;  // a^2/2, b^2, cos 2c, 1 + cos 2c, sin^2 c
};

// The function whose covariance is the RBF kernel exp(-gamma E (u - v)^2).
template <class T>
class Rbf {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = 1;

  explicit Rbf(const T* c) : rate_(broadcast(c[0])) {}

  NT_INLINE V prepare(V half, V* planes) const {
    planes[0] = fma(half, V{}, broadcast(T(0.5)));  // NaN stays NaN
    return planes[0];
  }

  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    const ExpPair<T> near = exp_pair<T>(-rate_ * deficit);
    value = deficit_or_covariance<kCovariance>(-near.expm1, first, second);
    if constexpr (kNtk) factor = rate_ * near.exp;
  }

 private:
  V rate_;  // 2 gamma
};

// a exp(b x)
template <class T>
class Exp {
  using V = Vec<T>;

 public:
  static constexpr int kPlanes = 2;  // half the variance after, b^2 var

  explicit Exp(const T* c) : amplitude_(broadcast(c[0])), square_(broadcast(c[1])) {}

  NT_INLINE V prepare(V half, V* planes) const {
    planes[1] = square_ * (half + half);
    planes[0] = broadcast(T(0.5)) * amplitude_ * exp_pair<T>(planes[1] + planes[1]).exp;
    return planes[0];
  }

  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(V deficit, const V* first, const V* second, V& value, V& factor) const {
    const V d = square_ * deficit, total = first[1] + second[1], difference = first[1] - second[1];
    // exp(var1) - exp(var2), but for its sign
    const V apart = exp_pair<T>(max(first[1], second[1])).exp * exp_pair<T>(-max(difference, -difference)).expm1;
    const V by_deficit = exp_pair<T>(total).exp * exp_pair<T>(-d).expm1;
    const V sum = fma(broadcast(T(0.5)) * apart, apart, -by_deficit);
    value = deficit_or_covariance<kCovariance>(amplitude_ * sum, first, second);
    if constexpr (kNtk) factor = amplitude_ * square_ * exp_pair<T>(total - d).exp;
  }

 private:
  V amplitude_, square_;  // a^2, b^2
};

// The table says how many numbers each wants to have.
#define NT_ACTIVATION(name, coefficients, planes) \
  static_assert(name<float>::kPlanes == planes && name<double>::kPlanes == planes);
#include "table.def"

// Calls a function with a nonlinearity.
template <class T, class Call>
void with_dual(Activation activation, const T* coefficients, const Call& call) {
  switch (activation) {
#define NT_ACTIVATION(name, n_coefficients, planes) \
  case Activation::k##name:                         \
    return call(name<T>(coefficients));
#include "table.def"
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
