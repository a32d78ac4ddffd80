// Functions with a jump or a kink at zero: steps, and rectified powers (arc-cosine kernels of any degree).
#pragma once

#include "duals_hermite.h"
#include "relu_polynomials.h"

namespace nt {
namespace NT_LEVEL {

// 2 E max(u, 0)^n max(v, 0)^n for variances of 1 and the correlation w - 1, and the same for n - 1: see
// nt_core/activations/rectified.py.
template <class T>
struct ArcCosine {
  Vec<T> kernel, before;

  // For n = 1.
  explicit NT_INLINE ArcCosine(Vec<T> w) {
    const Vec<T> root = sqrt(w);
    before = root * horner<T>(ReluPolynomials<T>::p, w);
    kernel = w * root * horner<T>(ReluPolynomials<T>::q, w);
  }

  // From n to n + 1.
  NT_INLINE void raise(int n, Vec<T> w) {
    const Vec<T> one = broadcast(T(1));
    const Vec<T> sin_square = w * (one + one - w), cos = broadcast(T(2 * n + 1)) * (one - w);
    const Vec<T> next = fma(broadcast(T(n * n)) * sin_square, before, -cos * kernel);
    before = kernel;
    kernel = next;
  }
};

// One number below zero, another one above it, and a third at zero.
template <class T>
class Step {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 4;  // half the variance after, the variance, its root, the mean after

  explicit Step(const T* c)
      : jump_(broadcast(c[0])),
        half_(broadcast(c[1])),
        half_at_zero_(broadcast(c[2])),
        mean_(broadcast(c[3])),
        at_zero_(broadcast(c[4])) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[1] = half + half;
    numbers[2] = sqrt(numbers[1]);
    numbers[0] = fma(half, V{}, if_positive(half, half_, half_at_zero_));  // NaN stays NaN
    numbers[3] = if_positive(half, mean_, at_zero_);
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V one = broadcast(T(1));
    const Angular<T> a = angular_deficit<T>(deficit, first[1] - second[1], first[2], second[2]);
    const V w = a.angular / a.scale, opposite = one + one - w;
    const V turn = ArcCosine<T>(min(opposite, w)).before;  // arccos |c| / pi; NaN stays NaN
    const V after = jump_ * if_positive(w - one, one - turn, turn);
    const V of_zero = fma(-first[3], second[3], first[0] + second[0]);
    value = deficit_or_covariance<kCovariance>(if_positive(a.scale, after, of_zero), first, second);
    if constexpr (kNtk) factor = V{};
  }

 private:
  V jump_, half_, half_at_zero_, mean_, at_zero_;  // with a, b and c: (a-b)^2/2, (a^2+b^2)/4, c^2/2, (a+b)/2, c
};

// max(x, 0)^n, for n > 1
template <class T>
class RectifiedMonomial {
  using V = Vec<T>;

 public:
  static constexpr int kNumbers = 3;  // half the variance after, the variance, its root

  explicit RectifiedMonomial(const T* c) : series_(c) {}

  NT_INLINE V prepare(V half, V* numbers) const {
    numbers[1] = half + half;
    numbers[2] = sqrt(numbers[1]);
    numbers[0] = broadcast(T(0.25)) * series_.variance(numbers[1]);
    return numbers[0];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V zero{}, one = broadcast(T(1)), half = broadcast(T(0.5));
    const int n = series_.degree();
    const V sign = broadcast(T(n % 2 ? -1 : 1));
    const Angular<T> a = angular_deficit<T>(deficit, first[1] - second[1], first[2], second[2]);
    const V w = if_positive(a.scale, a.angular / if_positive(a.scale, a.scale, one), one);  // 1 - c
    const V is_negative = w - one, nearest = min(one + one - w, w);
    ArcCosine<T> arc(nearest);
    V power = half;  // and the product of the standard deviations to the power n - 1
    for (int k = 1; k < n; ++k) {
      arc.raise(k, nearest);
      power = power * a.scale;
    }
    const V opposed = power * a.scale * arc.kernel;
    V after, slope = zero;
    series_.template dual<false, kNtk>(deficit, first[1], second[1], after, slope);
    const V of_negative = (first[0] + second[0]) - opposed;
    after = if_positive(is_negative, of_negative, fma(half, after, sign * opposed));
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) {
      const V opposed_slope = broadcast(T(n * n)) * power * arc.before;
      factor = if_positive(is_negative, opposed_slope, fma(half, slope, sign * opposed_slope));
    }
  }

 private:
  Series<T> series_;
};

}  // namespace NT_LEVEL
}  // namespace nt
