// What nonlinearities with bounds share. See nt_core/activations/bounds.py, whose names these are.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "duals_common.h"
#include "functions.h"

namespace nt {
namespace NT_LEVEL {

// Gauss-Legendre quadrature on [0, 1] for a power of the variable: nodes and weights.
template <class T, int kNodeCount, int kPower>
class PowerQuadrature {
 public:
  static constexpr int kNodes = kNodeCount;

  PowerQuadrature() {
    for (int k = 0; k < kNodes; ++k) {
      double x = std::cos(kPi<double> * (k + 0.75) / (kNodes + 0.5)), slope = 0;
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

  Vec<T> node(int k) const { return broadcast(nodes_[k]); }
  Vec<T> weight(int k) const { return broadcast(weights_[k]); }

 private:
  T nodes_[kNodes], weights_[kNodes];
};

// On the way from coincident to orthogonal variables: the density may change abruptly at small angles.
template <class T>
using AngleQuadrature = PowerQuadrature<T, 160, 10>;

template <class T>
inline constexpr T kDensityAtZero = T(0.39894228040143267794);

// Beyond so many standard deviations there is nothing.
template <class T>
inline constexpr T kFar = T(40);

// Of a bound, and a normal variable: the bound in standard deviations, the probabilities of what is between 0 and it
// and beyond it, the density there less that at 0, and the moments up to it.
template <class T>
struct AtBound {
  T relative, inside, beyond, drop, second_moment, fourth_moment;

  AtBound(T bound, T std) {
    const T x = std > 0 ? std::min(bound / std, kFar<T>) : bound > 0 ? kFar<T> : T(0), square = x * x;
    relative = x;
    inside = T(0.5) * std::erf(T(0.70710678118654752440) * x);
    beyond = T(0.5) * std::erfc(T(0.70710678118654752440) * x);
    drop = kDensityAtZero<T> * std::expm1(T(-0.5) * square);
    const T leaving = x * (kDensityAtZero<T> + drop);
    second_moment = x < T(0.5) ? series(2, x) : inside - leaving;
    fourth_moment = x < T(0.5) ? series(4, x) : 3 * second_moment - square * leaving;
  }

 private:
  // A moment, by its Taylor series.
  static T series(int order, T x) {
    const T square = x * x;
    T term = kDensityAtZero<T> * (order == 2 ? square : square * square) * x, sum = 0;
    for (int k = 0; k <= 10; ++k) {
      sum += term / T(2 * k + order + 1);
      term *= T(-0.5) * square / T(k + 1);
    }
    return sum;
  }
};

// What these nonlinearities know of a sample begins with this; numbers of bounds follow.
enum NumberOfSample { kHalfAfter, kHalf, kStd, kOfBounds };

// Calls `prepare` with half the variance of each lane, and the place of its numbers.
template <class T, int kNumbers, class Prepare>
NT_INLINE Vec<T> prepare_lanes(Vec<T> half, Vec<T>* numbers, const Prepare& prepare) {
  for (int l = 0; l < kLanes<T>; ++l) {
    T of_lane[kNumbers];
    prepare(half[l], of_lane);
    for (int k = 0; k < kNumbers; ++k) numbers[k][l] = of_lane[k];
  }
  return numbers[kHalfAfter];
}

// Of two variables: their standard deviations, the absolute difference of these, their product, and 1 - correlation.
template <class T>
struct BoundedPair {
  Vec<T> smaller, larger, difference, scale, w;

  template <class First, class Second>
  NT_INLINE BoundedPair(Vec<T> deficit, const First& first, const Second& second) {
    const Vec<T> zero{}, one = broadcast(T(1)), two = broadcast(T(2));
    const Vec<T> apart = two * (first[kHalf] - second[kHalf]), total = first[kStd] + second[kStd];
    smaller = min(first[kStd], second[kStd]);
    larger = max(first[kStd], second[kStd]);
    difference = if_positive(apart, apart, -apart) / if_positive(total, total, one);
    const Angular<T> a = angular_deficit<T>(deficit, apart, first[kStd], second[kStd]);
    scale = a.scale;
    w = if_positive(scale, min(two, max(zero, a.angular / if_positive(scale, scale, one))), one);
  }
};

// The tangent of half the angle whose cosine is 1 - w, up to a right one.
template <class T>
NT_INLINE Vec<T> tangent_of_half(Vec<T> w) {
  const Vec<T> near = min(w, broadcast(T(1)));
  return sqrt(near / (broadcast(T(2)) - near));
}

// For the tangent of half an angle: 1 / (1 + cos), 1 / sin, the angle that goes with a weight, and 1 - cos.
template <class T>
struct AngleAt {
  Vec<T> half_sum, inverse, angle, chord;

  NT_INLINE AngleAt(Vec<T> tangent, Vec<T> weight) {
    const Vec<T> square = tangent * tangent;
    half_sum = broadcast(T(0.5)) * (broadcast(T(1)) + square);
    const Vec<T> sum = broadcast(T(1)) / half_sum;
    inverse = half_sum / max(tangent, broadcast(std::is_same_v<T, float> ? T(0x1p-27) : T(0x1p-200)));
    angle = sum * weight;
    chord = sum * square;
  }
};

// Minus the logarithms of the joint densities, per angle, at (x, near) and at (x, -far), and the second less the first,
// in which their squares cancel.
template <class T>
struct Exponents {
  Vec<T> exponent, other, excess;

  NT_INLINE Exponents(Vec<T> x, Vec<T> near, Vec<T> far, const AngleAt<T>& at) {
    const Vec<T> half_inverse = broadcast(T(0.5)) * at.inverse * at.inverse, apart = x - near, sum = x + far;
    exponent = fma(apart * apart, half_inverse, x * near * at.half_sum);
    other = fma(sum * sum, half_inverse, -(x * far * at.half_sum));
    excess = (near + far) * fma(half_inverse, x + x + far - near, -(x * at.half_sum));
  }
};

// The mean of apart(z, bound - s z)^2 where s z is within a bound and t z beyond, with s and t the smaller and the
// larger deviation, and the bound at `inner` times t.
template <class T, class Apart>
NT_INLINE Vec<T> mean_between(Vec<T> inner, const BoundedPair<T>& pair, const Apart& apart) {
  const Vec<T> width = broadcast(T(9)), one = broadcast(T(1)), gap = inner * pair.difference;
  const Vec<T> length =
      min(width, if_positive(pair.smaller, gap / if_positive(pair.smaller, pair.smaller, one), width));
  Vec<T> sum{};
  using Quadrature = PowerQuadrature<T, 24, 1>;
  const Quadrature& quadrature = Quadrature::get();
  for (int k = 0; k < Quadrature::kNodes; ++k) {
    const Vec<T> step = length * quadrature.node(k), z = inner + step;
    const Vec<T> distance = apart(z, fma(-step, pair.smaller, gap));
    sum = fma(quadrature.weight(k) * distance * distance, exp_pair<T>(broadcast(T(-0.5)) * z * z).exp, sum);
  }
  return broadcast(kDensityAtZero<T>) * length * sum;
}

}  // namespace NT_LEVEL
}  // namespace nt
