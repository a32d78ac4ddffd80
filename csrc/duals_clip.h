// What is linear between two bounds, and constant beyond.
#pragma once

#include "duals_bounds.h"

namespace nt {
namespace NT_LEVEL {

// a min(max(x, low), high) + c, for low <= 0 <= high. See nt_core/activations/clip.py, whose names these are.
template <class T>
class Clip {
  using V = Vec<T>;

 public:
  enum OfBound { kRelative, kInside, kSecondMoment, kNumbersOfBound };
  static constexpr int kNumbers = kOfBounds + 2 * kNumbersOfBound;

  static int of(int bound, int number) { return kOfBounds + bound * kNumbersOfBound + number; }

  explicit Clip(const T* c) : square_(c[0]), mixed_(c[1]), constant_(c[2]), bounds_{c[3], c[4]} {}

  V prepare(V half, V* numbers) const {
    return prepare_lanes<T, kNumbers>(half, numbers, [&](T lane, T* of_lane) { prepare(lane, of_lane); });
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V zero{}, one = broadcast(T(1)), two = broadcast(T(2)), half = broadcast(T(0.5));
    const BoundedPair<T> pair(deficit, first, second);
    V coincident = zero, parallel = zero;
    for (int bound = 0; bound < 2; ++bound) {
      const auto of_larger = [&](int k) { return min(first[of(bound, k)], second[of(bound, k)]); };  // all grow
      coincident += of_larger(kInside);
      const V within = pair.difference * pair.difference * of_larger(kSecondMoment);
      parallel += half * (within + mean_between<T>(of_larger(kRelative), pair, [](V, V missing) { return missing; }));
    }
    V probability = zero, moment = zero;
    add_crossings(1, zero, tangent_of_half<T>(pair.w), pair.w, first, second, probability, moment);
    const V is_obtuse = pair.w - one;
    if (any_positive(is_obtuse)) {
      const V remaining = tangent_of_half<T>(two - pair.w);
      add_crossings(-1, remaining, if_positive(is_obtuse, one - remaining, zero), pair.w, first, second, probability,
                    moment);
    }
    const V after = square() * (parallel + pair.scale * (pair.w * coincident - moment));
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = square() * (coincident - probability);
  }

 private:
  V square() const { return broadcast(square_); }

  void prepare(T half, T* numbers) const {
    const T std = std::sqrt(half + half);
    T own = 0, mean = 0;
    for (int bound = 0; bound < 2; ++bound) {
      const AtBound<T> at(bounds_[bound], std);
      numbers[of(bound, kRelative)] = at.relative;
      numbers[of(bound, kInside)] = at.inside;
      numbers[of(bound, kSecondMoment)] = at.second_moment;
      own += at.second_moment + at.relative * at.relative * at.beyond;
      const T positive = std * (at.relative * at.beyond - at.drop);
      mean += bound == 0 ? -positive : positive;
    }
    numbers[kHalf] = half;
    numbers[kStd] = std;
    numbers[kHalfAfter] = square_ * half * own + T(0.5) * (mixed_ * mean + constant_);
  }

  // Adds the integrals over angles whose tangents of the half begin at `start`; with `sign` -1 they are the angles that
  // remain to opposite variables.
  template <class First, class Second>
  void add_crossings(int sign, V start, V length, V w, const First& first, const Second& second, V& probability,
                     V& moment) const {
    const V begin = sign > 0 ? w : w - broadcast(T(2)), direction = broadcast(T(-sign));
    const AngleQuadrature<T>& quadrature = AngleQuadrature<T>::get();
    for (int k = 0; k < AngleQuadrature<T>::kNodes; ++k) {
      const AngleAt<T> at(fma(length, quadrature.node(k), start), length * quadrature.weight(k));
      const V density = at.angle * difference_of_densities(sign, first, second, at);
      probability += density;
      moment = fma(density, fma(direction, at.chord, begin), moment);
    }
  }

  // Per angle: the joint density at like bounds less that at unlike ones.
  template <class First, class Second>
  NT_INLINE V difference_of_densities(int sign, const First& first, const Second& second, const AngleAt<T>& at) const {
    V density{};
    for (int i = 0; i < 2; ++i) {
      const V x = first[of(i, kRelative)], alike = second[of(i, kRelative)], unlike = second[of(1 - i, kRelative)];
      const V near = sign > 0 ? alike : unlike, far = sign > 0 ? unlike : alike;  // on one side of 0 with x, or not
      const Exponents<T> of(x, near, far, at);
      // For large deviations both nearly agree.
      const V size = if_positive(of.excess, of.excess, -of.excess);
      const V least = if_positive(of.excess, of.exponent, of.other);
      const V difference = -exp_pair<T>(-least).exp * exp_pair<T>(-size).expm1;
      density += if_positive(of.excess, difference, -difference);
    }
    return broadcast(T(sign) / (2 * kPi<T>)) * density;  // with `sign` -1 unlike bounds are near each other
  }

  T square_, mixed_, constant_, bounds_[2];  // a^2, 2 a c, c^2, -low and high
};

}  // namespace NT_LEVEL
}  // namespace nt
