// Derivatives of what is linear between two bounds.
#pragma once

#include "backward_partials.h"
#include "duals_clip.h"
#include "duals_relu.h"

namespace nt {
namespace NT_LEVEL {

template <class T>
NT_INLINE Vec<T> normal_density(Vec<T> x) {
  return broadcast(kDensityAtZero<T>) * exp_pair<T>(broadcast(T(-0.5)) * x * x).exp;
}

// The probability that a normal variable is below x.
template <class T>
Vec<T> normal_below(Vec<T> x) {
  Vec<T> below;
  for (int l = 0; l < kLanes<T>; ++l) below[l] = T(0.5) * std::erfc(T(-0.70710678118654752440) * x[l]);
  return below;
}

// Of f(x) = min(max(x, low), high), with signs of 1 for `low` and -1 for `high` and p the densities of u and of u, v:
//   f'' is the sum of sign delta_bound, so
//   E f''(u) f(v)    is the sum of sign p(bound) E(f(v) | u = bound),
//   E f''(u) f''(v)  is the sum over two bounds of the product of their signs and p at both,
//   E f'''(u) f'(v)  is that of -sign d/dbound (p(bound) P(v is inside | u = bound)),
// and the derivative of the factor in a bound is the sum of p(bound) P(v is inside | u = bound) and the same for v.
// That of the deficit after is an integral over angles, as the deficit itself is: see `Clip`.
template <class T>
class ClipPartials {
  using V = Vec<T>;
  using D = Clip<T>;

  enum Coefficient { kSquare, kMixed, kConstant, kBounds };

 public:
  static constexpr int kCoefficients = 5;

  ClipPartials(const T* c, const Table&)
      : unit_(with_unit<D, kCoefficients>(c, kSquare)), square_(broadcast(c[kSquare])), mixed_(broadcast(c[kMixed])) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V* coefficients) const {
    const V half = broadcast(T(0.5)), std = numbers[kStd];
    V own{}, mean{}, gain{}, turn{};
    for (int b = 0; b < 2; ++b) {
      const V x = numbers[D::of(b, D::kRelative)], density = normal_density<T>(x), side = broadcast(T(b == 0 ? -1 : 1));
      const V beyond = half - numbers[D::of(b, D::kInside)], second_moment = numbers[D::of(b, D::kSecondMoment)];
      gain += second_moment;
      own += fma(x * x, beyond, second_moment);
      mean += side * fma(x, beyond, broadcast(kDensityAtZero<T>) - density);
      turn -= side * density;
      coefficients[kBounds + b] += bar * beyond * fma(square_ * std, x, half * mixed_ * side);
    }
    coefficients[kSquare] = fma(bar * numbers[kHalf], own, coefficients[kSquare]);
    coefficients[kMixed] = fma(half * bar * std, mean, coefficients[kMixed]);
    coefficients[kConstant] = fma(half, bar, coefficients[kConstant]);
    return bar * fma(square_, gain, half * mixed_ * turn * reciprocal<T>(std));
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V bar, V factor_bar,
                                   V* coefficients) const {
    const V inverse1 = reciprocal<T>(first[kStd]), inverse2 = reciprocal<T>(second[kStd]);
    const BoundedPair<T> pair(deficit, first, second);
    const Angle angle(deficit, pair, inverse1, inverse2);
    const Given given1(angle, first, second), given2(angle, second, first);
    Partials<T> p;
    V value, factor;
    unit_.template apply<false, true>(deficit, first, second, value, factor);
    p.value = square_ * value;
    p.factor = p.value_deficit = square_ * factor;
    p.value_half1 = square_ * (gain(first) - factor - given1.mean * inverse1 * second[kStd]);
    p.value_half2 = square_ * (gain(second) - factor - given2.mean * inverse2 * first[kStd]);
    p.factor_deficit = -square_ * inverse1 * inverse2 * given1.bend;
    const V half_gap = first[kHalf] - second[kHalf], total = first[kStd] + second[kStd];
    const V apart = (half_gap + half_gap) * reciprocal<T>(total);  // of the deviations
    p.factor_half1 = factor_half(pair, angle, given1, apart, inverse1, inverse2);
    p.factor_half2 = factor_half(pair, angle, given2, -apart, inverse2, inverse1);
    coefficients[kSquare] += fma(bar, value, factor_bar * factor);
    for (int b = 0; b < 2; ++b) {
      const V of_factor = fma(given1.inside[b], inverse1, given2.inside[b] * inverse2);
      const V of_value = in_bound(b, pair, first, second, inverse1, inverse2);
      coefficients[kBounds + b] += square_ * fma(bar, of_value, factor_bar * of_factor);
    }
    return p;
  }

 private:
  // Of a pair: its correlation and the sine, with 0 for its inverse where rounding does not tell the pair from
  // parallel.
  struct Angle {
    V cosine, versine, sine, per_sine;

    NT_INLINE Angle(V deficit, const BoundedPair<T>& pair, V inverse1, V inverse2) {
      const V one = broadcast(T(1)), angular = pair.scale * pair.w;
      const V nearest =
          distance_from_parallel<T>(deficit, angular, angular - pair.scale, pair.scale, inverse1, inverse2);
      const V is_obtuse = pair.w - one;
      cosine = if_positive(is_obtuse, nearest - one, one - nearest);
      versine = if_positive(is_obtuse, (one + one) - nearest, nearest);
      sine = sqrt(nearest * (one + one - nearest));
      per_sine = if_positive(sine, one / if_positive(sine, sine, one), V{});
    }
  };

  // The sums above for u at a bound, without the deviations: E f''(u) f(v), E f''(u) f''(v), and E f'''(u) f'(v) but
  // for -cosine times the second; and of each bound p(bound) P(v is inside | u = bound).
  struct Given {
    V mean{}, turn{}, bend{}, inside[2];

    template <class First, class Second>
    NT_INLINE Given(const Angle& angle, const First& first, const Second& second) {
      const V one = broadcast(T(1)),
              narrow = max(angle.sine, broadcast(std::is_same_v<T, float> ? T(1e-18) : T(1e-150)));
      for (int b = 0; b < 2; ++b) {
        const V x = signed_bound(first, b), at = angle.cosine * x, density = normal_density<T>(x);
        const V sign = b == 0 ? density : -density;
        const V low = signed_bound(second, 0), high = signed_bound(second, 1);
        const V z_low = (low - at) / narrow, z_high = (high - at) / narrow;
        const V below = normal_below<T>(z_low), above = normal_below<T>(-z_high), within = one - below - above;
        const V rise = normal_density<T>(z_low) - normal_density<T>(z_high);
        const V jump = sign * rise * angle.per_sine;
        mean += sign * fma(low, below, fma(high, above, fma(at, within, angle.sine * rise)));
        turn = fma(sign * x, within, turn);
        bend += jump;
        inside[b] = density * within;
      }
    }
  };

  // E f'''(u) f'(v) / var_u + E f''(u) f''(v), with `apart` the difference of the deviations of u and v. For nearly
  // parallel pairs the second is as large as 1 / sine and nearly all of it cancels, so what is left is formed first.
  NT_INLINE V factor_half(const BoundedPair<T>& pair, const Angle& angle, const Given& given, V apart, V inverse,
                          V inverse_of_other) const {
    const V remaining = inverse * fma(apart, inverse_of_other, angle.versine);  // 1 / std_v - cosine / std_u
    return square_ * inverse * fma(inverse, given.turn, if_positive(pair.scale, remaining, V{}) * given.bend);
  }

  template <class Numbers>
  static NT_INLINE V signed_bound(const Numbers& numbers, int b) {
    const V x = numbers[D::of(b, D::kRelative)];
    return b == 0 ? -x : x;
  }

  // E f'^2 + E f''(u) f(u)
  template <class Numbers>
  static NT_INLINE V gain(const Numbers& numbers) {
    return numbers[D::of(0, D::kSecondMoment)] + numbers[D::of(1, D::kSecondMoment)];
  }

  // The derivative of the deficit after in the distance of a bound.
  template <class First, class Second>
  V in_bound(int b, const BoundedPair<T>& pair, const First& first, const Second& second, V inverse1,
             V inverse2) const {
    const V one = broadcast(T(1)), two = broadcast(T(2)), zero{};
    const V inner = min(first[D::of(b, D::kRelative)], second[D::of(b, D::kRelative)]);
    const V outer = max(first[D::of(b, D::kRelative)], second[D::of(b, D::kRelative)]);
    const V inside1 = first[D::of(b, D::kInside)], inside2 = second[D::of(b, D::kInside)];
    const V density = normal_density<T>(inner);
    const V parallel = inner * pair.larger * (max(inside1, inside2) - min(inside1, inside2)) -
                       pair.smaller * (density - normal_density<T>(outer));
    V moment = in_bound_of_moment(1, b, zero, tangent_of_half<T>(pair.w), pair.w, first, second, inverse1, inverse2);
    const V is_obtuse = pair.w - one;
    if (any_positive(is_obtuse)) {
      const V remaining = tangent_of_half<T>(two - pair.w), length = if_positive(is_obtuse, one - remaining, zero);
      moment += in_bound_of_moment(-1, b, remaining, length, pair.w, first, second, inverse1, inverse2);
    }
    // As a bound goes to 0, half of what tells the inverse deviations apart is at ever smaller angles: at 0 it is
    // missed.
    const V at_zero = broadcast(T(0.5)) * (inverse1 + inverse2);
    const V coincident = density * if_positive(inner, reciprocal<T>(pair.larger), at_zero);
    return fma(pair.scale, fma(pair.w, coincident, -moment), parallel);
  }

  // Of the integral over angles, see `Clip`.
  template <class First, class Second>
  V in_bound_of_moment(int sign, int b, V start, V length, V w, const First& first, const Second& second, V inverse1,
                       V inverse2) const {
    const V begin = sign > 0 ? w : w - broadcast(T(2)), direction = broadcast(T(-sign));
    const AngleQuadrature<T>& quadrature = AngleQuadrature<T>::get();
    const V x = first[D::of(b, D::kRelative)], other_x = first[D::of(1 - b, D::kRelative)];
    const V y = second[D::of(b, D::kRelative)], other_y = second[D::of(1 - b, D::kRelative)];
    V moment{};
    for (int k = 0; k < AngleQuadrature<T>::kNodes; ++k) {
      const AngleAt<T> at(fma(length, quadrature.node(k), start), length * quadrature.weight(k));
      const V alike = slope_of_density(sign, x, y, at) * inverse1 + slope_of_density(sign, y, x, at) * inverse2;
      const V unlike =
          slope_of_density(-sign, x, other_y, at) * inverse1 + slope_of_density(-sign, y, other_x, at) * inverse2;
      moment = fma(at.angle * (alike - unlike), fma(direction, at.chord, begin), moment);
    }
    return broadcast(1 / (2 * kPi<T>)) * moment;
  }

  // Of exp(-exponent) in x, for bounds on one side of 0 or on both: see `Exponents`.
  static NT_INLINE V slope_of_density(int side, V x, V y, const AngleAt<T>& at) {
    const V half_inverse = broadcast(T(0.5)) * at.inverse * at.inverse, z = side > 0 ? y : -y, apart = x - z;
    const V exponent = fma(apart * apart, half_inverse, x * z * at.half_sum);
    return -fma(apart + apart, half_inverse, z * at.half_sum) * exp_pair<T>(-exponent).exp;
  }

  D unit_;  // with the slope 1
  V square_, mixed_;
};

}  // namespace NT_LEVEL
}  // namespace nt
