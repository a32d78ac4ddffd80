// What is linear between two bounds, and constant beyond.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "duals_common.h"
#include "functions.h"

namespace nt {
namespace NT_LEVEL {

// Gauss-Legendre quadrature on [0, 1] for a power of the variable: nodes and weights.
template <class T>
class PowerQuadrature {
 public:
  static constexpr int kNodes = 160, kPower = 10;

  PowerQuadrature() {
    constexpr double kPi = 3.14159265358979323846;
    for (int k = 0; k < kNodes; ++k) {
      double x = std::cos(kPi * (k + 0.75) / (kNodes + 0.5)), slope = 0;
      for (int step = 0; step < 8; ++step) {  // Newton's method for the zeros of the Legendre polynomial
        double before = 1, value = x;
        for (int n = 2; n <= kNodes; ++n) {
          const double next = ((2 * n - 1) * x * value - (n - 1) * before) / n;
          before = value;
          value = next;
        }
        slope = kNodes * (x * value - before) / (x * x - 1);
        x -= value / slope;
      }
      const double at = 0.5 * (x + 1), weight = 1 / ((1 - x * x) * slope * slope);
      nodes_[k] = static_cast<T>(std::pow(at, kPower));
      weights_[k] = static_cast<T>(kPower * std::pow(at, kPower - 1) * weight);
    }
  }

  static const PowerQuadrature& get() {
    static const PowerQuadrature quadrature;
    return quadrature;
  }

  T node(int k) const { return nodes_[k]; }
  T weight(int k) const { return weights_[k]; }

 private:
  T nodes_[kNodes], weights_[kNodes];
};

// a min(max(x, low), high) + c, for low <= 0 <= high. See nt_core/activations/clip.py, whose names these are.
template <class T>
class Clip {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

  enum Number { kHalfAfter, kHalf, kStd, kOwn, kOfBounds };
  // The last is the density, less that at 0: of large deviations the differences matter.
  enum OfBound { kRelative, kInside, kBeyond, kSecondMoment, kDrop, kNumbersOfBound };

 public:
  static constexpr int kNumbers = kOfBounds + 2 * kNumbersOfBound;
  static constexpr T kDensityAtZero = T(0.39894228040143267794);

  explicit Clip(const T* c) : square_(c[0]), mixed_(c[1]), constant_(c[2]), bounds_{c[3], c[4]} {}

  V prepare(V half, V* numbers) const {
    for (int l = 0; l < kL; ++l) {
      T of_lane[kNumbers];
      prepare(half[l], of_lane);
      for (int k = 0; k < kNumbers; ++k) numbers[k][l] = of_lane[k];
    }
    return numbers[kHalfAfter];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V zero{}, one = broadcast(T(1)), two = broadcast(T(2));
    const V half_difference = first[kHalf] - second[kHalf], scale = first[kStd] * second[kStd];
    const Angular<T> a = angular_deficit<T>(deficit, half_difference + half_difference, first[kStd], second[kStd]);
    const V w = if_positive(scale, min(two, max(zero, a.angular / if_positive(scale, scale, one))), one);
    V coincident = zero;
    for (int bound = 0; bound < 2; ++bound) {
      coincident += min(first[of(bound, kInside)], second[of(bound, kInside)]);
    }
    V probability = zero, moment = zero;
    add_crossings(1, zero, root_of_half(w), w, first, second, probability, moment);
    const V is_beyond = w - one;
    if (any_positive(is_beyond)) {
      const V remaining = root_of_half(two - w);
      add_crossings(-1, remaining, if_positive(is_beyond, one - remaining, zero), w, first, second, probability,
                    moment);
    }
    const V after = square() * (parallel(half_difference, first, second) + scale * (w * coincident - moment));
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = square() * (coincident - probability);
  }

 private:
  static int of(int bound, int number) { return kOfBounds + bound * kNumbersOfBound + number; }
  V square() const { return broadcast(square_); }

  // The tangent of half the angle whose cosine is 1 - w, up to a right one.
  static V root_of_half(V w) {
    const V near = min(w, broadcast(T(1)));
    return sqrt(near / (broadcast(T(2)) - near));
  }

  void prepare(T half, T* numbers) const {
    const T std = std::sqrt(half + half);
    T own = 0, mean = 0;
    for (int bound = 0; bound < 2; ++bound) {
      const T far = 40, at = std::min(bounds_[bound], far * std);
      const T x = std > 0 ? at / std : bounds_[bound] > 0 ? far : T(0);
      T* of_bound = numbers + of(bound, 0);
      of_bound[kRelative] = x;
      of_bound[kInside] = T(0.5) * std::erf(T(0.70710678118654752440) * x);
      of_bound[kBeyond] = T(0.5) * std::erfc(T(0.70710678118654752440) * x);
      of_bound[kDrop] = kDensityAtZero * std::expm1(T(-0.5) * x * x);
      of_bound[kSecondMoment] = second_moment(x, of_bound[kInside], kDensityAtZero + of_bound[kDrop]);
      own += std * std * of_bound[kSecondMoment] + at * at * of_bound[kBeyond];
      const T positive = at * of_bound[kBeyond] - std * of_bound[kDrop];
      mean += bound == 0 ? -positive : positive;
    }
    numbers[kHalf] = half;
    numbers[kStd] = std;
    numbers[kOwn] = own;
    numbers[kHalfAfter] = T(0.5) * (square_ * own + mixed_ * mean + constant_);
  }

  // E z^2 for z from 0 to x.
  static T second_moment(T x, T inside, T normal) {
    const T square = x * x;
    if (square >= T(0.25)) return inside - x * normal;
    T term = kDensityAtZero * square * x, sum = 0;  // a Taylor series
    for (int k = 0; k <= 10; ++k) {
      sum += term / T(2 * k + 3);
      term *= T(-0.5) * square / T(k + 1);
    }
    return sum;
  }

  // The deficit after, of parallel variables, for a = 1.
  template <class First, class Second>
  NT_INLINE V parallel(V half_difference, const First& first, const Second& second) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), two = broadcast(T(2));
    const auto of_larger = [&](int k) { return if_positive(half_difference, first[k], second[k]); };
    const auto of_smaller = [&](int k) { return if_positive(half_difference, second[k], first[k]); };
    const V smaller = of_smaller(kStd), larger = of_larger(kStd), total = smaller + larger;
    const V apart = if_positive(half_difference, half_difference, -half_difference);
    const V difference = if_positive(total, two * apart / if_positive(total, total, one), apart);
    const V is_near = broadcast(std::is_same_v<T, float> ? T(0x1p-3) : T(0x1p-8)) * larger - difference;
    V sum{}, direct = half * (first[kOwn] + second[kOwn]);
    for (int k = 0; k < 2; ++k) {
      const V bound = min(broadcast(bounds_[k]), broadcast(T(40)) * larger);
      const V between = bound * smaller * (of_larger(of(k, kDrop)) - of_smaller(of(k, kDrop)));
      const V product = smaller * larger * of_larger(of(k, kSecondMoment)) + between;
      direct -= fma(bound * bound, of_smaller(of(k, kBeyond)), product);
      const auto weighted = [&](const auto& number, V std, T value, T slope, T bend) {
        const V x = number(of(k, kRelative)), step = difference / if_positive(std, std, one);
        const V cube = x * x * x * (broadcast(kDensityAtZero) + number(of(k, kDrop))), four = broadcast(T(4));
        const V bending = broadcast(bend) * (four - x * x) * step - broadcast(slope);
        return fma(broadcast(value), number(of(k, kSecondMoment)), bending * cube * step);
      };
      sum += weighted(of_smaller, smaller, T(1) / 7, T(4) / 105, T(1) / 280);
      sum += weighted(of_larger, larger, T(5) / 14, T(-13) / 210, T(1) / 210);
    }
    return if_positive(is_near, difference * difference * sum, direct);
  }

  // Adds the integrals over angles whose tangents of the half begin at `start`; with `sign` -1 they are the angles that
  // remain to opposite variables.
  template <class First, class Second>
  void add_crossings(int sign, V start, V length, V w, const First& first, const Second& second, V& probability,
                     V& moment) const {
    using Quadrature = PowerQuadrature<T>;
    const Quadrature& quadrature = Quadrature::get();
    const V zero{}, one = broadcast(T(1)), half = broadcast(T(0.5)), two = broadcast(T(2));
    const V least = broadcast(std::is_same_v<T, float> ? T(0x1p-40) : T(0x1p-91));
    const V begin = sign > 0 ? w : w - two, direction = broadcast(T(-sign));
    for (int k = 0; k < Quadrature::kNodes; ++k) {
      const V tangent = fma(length, broadcast(quadrature.node(k)), start), square = tangent * tangent;
      const V half_sum = half * (one + square), half_inverse = half * half_sum * half_sum / max(square, least);
      // Of densities at one bound of the first variable, the difference: for large deviations they nearly agree.
      V density = zero;
      for (int i = 0; i < 2; ++i) {
        const V x = first[of(i, kRelative)], alike = second[of(i, kRelative)], unlike = second[of(1 - i, kRelative)];
        const V near = sign > 0 ? alike : unlike, far = sign > 0 ? unlike : alike;  // on one side of 0 with x, or not
        const V apart = x - near, sum = x + far;
        const V exponent = fma(apart * apart, half_inverse, x * near * half_sum);
        const V other = fma(sum * sum, half_inverse, -(x * far * half_sum));
        // The difference of both, in which their squares cancel.
        const V excess = (near + far) * fma(half_inverse, x + x + far - near, -(x * half_sum));
        const V least_exponent = if_positive(excess, exponent, other);
        const V size = if_positive(excess, excess, -excess);
        const V difference = -exp_pair<T>(-least_exponent).exp * exp_pair<T>(-size).expm1;
        density += if_positive(excess, difference, -difference);
      }
      if (sign < 0) density = -density;  // unlike bounds are near each other there
      const V angle = length * broadcast(quadrature.weight(k) * T(0.15915494309189533577)) / half_sum;
      const V chord = square / half_sum;
      probability = fma(angle, density, probability);
      moment = fma(angle * density, fma(direction, chord, begin), moment);
    }
  }

  T square_, mixed_, constant_, bounds_[2];  // a^2, 2 a c, c^2, -low and high
};

}  // namespace NT_LEVEL
}  // namespace nt
