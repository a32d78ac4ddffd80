// The product of a variable with itself between two bounds.
#pragma once

#include "duals_bounds.h"
#include "relu_polynomials.h"

namespace nt {
namespace NT_LEVEL {

// x (a min(max(x, -bound), bound) + c). See nt_core/activations/clip_gate.py, whose names these are.
template <class T>
class ClipGate {
  using V = Vec<T>;

  enum OfBound { kRelative = kOfBounds, kInside, kBeyond, kDrop, kSecondMoment, kFourthMoment, kEnd };

 public:
  static constexpr int kNumbers = kEnd;

  explicit ClipGate(const T* c) : linear_(c[0]), square_(c[1]), bound_(c[2]) {}

  V prepare(V half, V* numbers) const {
    return prepare_lanes<T, kNumbers>(half, numbers, [&](T lane, T* of_lane) { prepare(lane, of_lane); });
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V half = broadcast(T(0.5)), two = broadcast(T(2)), linear = broadcast(linear_), square = broadcast(square_);
    const BoundedPair<T> pair(deficit, first, second);
    const V is_obtuse = pair.w - broadcast(T(1));
    const V w = if_positive(is_obtuse, two - pair.w, pair.w);  // the product does not tell v from -v
    const V slope = slope_of_parallel(first, second), bend = bend_of_parallel(first, second);
    V slope_of_crossing{}, crossing{};
    add_crossings(min(first[kRelative], second[kRelative]), max(first[kRelative], second[kRelative]), w,
                  slope_of_crossing, crossing);
    const V angular = fma(w, slope - half * w * bend, crossing);
    const V is_settled = pair.smaller - broadcast(kSettled * bound_), bound_square = broadcast(bound_ * bound_);
    const V root = sqrt(w), straight = broadcast(T(-2)) * root;  // of bound |x|, see `_limit`
    const V of_bend = fma(straight, horner<T>(ReluPolynomials<T>::q, w), broadcast(T(1)));
    const V limit = fma(pair.scale * w, of_bend, half * pair.difference * pair.difference);
    const V product = fma(pair.scale * pair.scale, angular, deficit_of_parallel(pair, first, second));
    const V of_product = if_positive(is_settled, bound_square * limit, product);
    value = deficit_or_covariance<kCovariance>(fma(square, of_product, linear * deficit), first, second);
    if constexpr (kNtk) {
      const V limit_of_slopes = fma(straight, horner<T>(ReluPolynomials<T>::p, w), broadcast(T(1)));
      const V product_of_slopes = pair.scale * (slope - w * bend + slope_of_crossing);
      const V of_slopes = if_positive(is_settled, bound_square * limit_of_slopes, product_of_slopes);
      factor = fma(square, if_positive(is_obtuse, -of_slopes, of_slopes), linear);
    }
  }

 private:
  static constexpr T kSettled = std::is_same_v<T, float> ? T(3e3) : T(1e8);

  void prepare(T half, T* numbers) const {
    const T std = std::sqrt(half + half);
    const AtBound<T> at(bound_, std);
    numbers[kHalf] = half;
    numbers[kStd] = std;
    numbers[kRelative] = at.relative;
    numbers[kInside] = at.inside;
    numbers[kBeyond] = at.beyond;
    numbers[kDrop] = at.drop;
    numbers[kSecondMoment] = at.second_moment;
    numbers[kFourthMoment] = at.fourth_moment;
    const T beyond = at.beyond + at.relative * (kDensityAtZero<T> + at.drop);  // the second moment
    const T own = at.fourth_moment + at.relative * at.relative * beyond;
    numbers[kHalfAfter] = half * (linear_ + 4 * square_ * half * own);
  }

  // What is `inner`, of the larger deviation, is the minimum of what grows with the bound.
  template <class First, class Second>
  NT_INLINE static V slope_of_parallel(const First& first, const Second& second) {
    const V two = broadcast(T(2)), four = broadcast(T(4)), eight = broadcast(T(8));
    const V inner = min(first[kRelative], second[kRelative]), outer = max(first[kRelative], second[kRelative]);
    const V between = inner * (max(first[kDrop], second[kDrop]) - min(first[kDrop], second[kDrop]));
    const V beyond = inner * outer * min(first[kBeyond], second[kBeyond]);
    return fma(eight, min(first[kSecondMoment], second[kSecondMoment]), fma(four, between, two * beyond));
  }

  template <class First, class Second>
  NT_INLINE static V bend_of_parallel(const First& first, const Second& second) {
    const V normal = broadcast(kDensityAtZero<T>) + max(first[kDrop], second[kDrop]);
    const V inner = min(first[kRelative], second[kRelative]);
    return broadcast(T(8)) * min(first[kInside], second[kInside]) - broadcast(T(4)) * inner * normal;
  }

  template <class First, class Second>
  NT_INLINE static V deficit_of_parallel(const BoundedPair<T>& pair, const First& first, const Second& second) {
    const V inner = min(first[kRelative], second[kRelative]), outer = max(first[kRelative], second[kRelative]);
    const V bend = pair.smaller * pair.difference, of_variances = (pair.smaller + pair.larger) * pair.difference;
    const V between =
        mean_between<T>(inner, pair, [&](V z, V missing) { return z * fma(pair.larger, missing, bend * z); });
    const V normal = broadcast(kDensityAtZero<T>) + min(first[kDrop], second[kDrop]);
    const V second_moment_beyond = fma(outer, normal, min(first[kBeyond], second[kBeyond]));
    const V bounded = inner * pair.larger * pair.difference;
    const V within = of_variances * of_variances * min(first[kFourthMoment], second[kFourthMoment]);
    return fma(bounded * bounded, second_moment_beyond, within + between);
  }

  // Adds the integrals over angles up to that whose cosine is 1 - w, which is not obtuse.
  NT_INLINE static void add_crossings(V inner, V outer, V w, V& slope, V& deficit) {
    const V one = broadcast(T(1)), two = broadcast(T(2)), opening = tangent_of_half<T>(w), product = inner * outer;
    const AngleQuadrature<T>& quadrature = AngleQuadrature<T>::get();
    for (int k = 0; k < AngleQuadrature<T>::kNodes; ++k) {
      const AngleAt<T> at(opening * quadrature.node(k), opening * quadrature.weight(k));
      const Exponents<T> of(inner, outer, outer, at);
      const ExpPair<T> ratio = exp_pair<T>(-of.excess);  // of the density at unlike bounds to that at like ones
      const V like = exp_pair<T>(-of.exponent).exp, unlike = like * ratio.exp, until = w - at.chord;
      // (1 + other) unlike - (1 + exponent) like: for large deviations these nearly agree.
      const V difference = fma((one + of.exponent) * like, ratio.expm1, of.excess * unlike);
      const V bend = -two * until * difference, jump = product * (like + unlike);
      const V angle = broadcast(1 / kPi<T>) * at.angle;
      slope = fma(angle, bend + bend - jump, slope);
      deficit = fma(angle * until, bend - jump, deficit);
    }
  }

  T linear_, square_, bound_;  // c^2, a^2 and the bound
};

}  // namespace NT_LEVEL
}  // namespace nt
