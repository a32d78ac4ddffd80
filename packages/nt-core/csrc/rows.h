// The inner loops: what a step does to one row of a plane.
//
// A row is an array of vectors, one per position, whose lanes are different pairs of samples. `n` is its length. The
// statistics of the second sample of each pair differ from lane to lane; those of the first do if `kWide`, else one
// number serves all lanes.
#pragma once

#include "relu_polynomials.h"
#include "simd.h"

namespace nt {
namespace NT_LEVEL {

// Where the statistics of a row start.
template <class T>
struct Row1 {
  const T* at;
};
template <class T>
struct Row2 {
  const T* at;
  int stride;  // from one position to the next; 0 if the row runs over samples, not positions
};

template <bool kWide, class T>
NT_INLINE Vec<T> get(const Row1<T>& row, int x) {
  if constexpr (kWide) {
    return load(row.at + int64_t{x} * kLanes<T>);
  } else {
    return broadcast(row.at[x]);
  }
}

template <class T>
NT_INLINE Vec<T> get(const Row2<T>& row, int x) {
  return load(row.at + int64_t{x} * row.stride);
}

// Evaluates a polynomial, constant coefficient first.
template <class T, int kCoefficients>
NT_INLINE Vec<T> horner(const T (&c)[kCoefficients], Vec<T> x) {
  Vec<T> value = broadcast(c[kCoefficients - 1]);
  for (int k = kCoefficients - 2; k >= 0; --k) value = fma(value, x, broadcast(c[k]));
  return value;
}

// The ReLU family, see docs/cpu-engine.md. `slope` is the mean square slope (a^2 + b^2)/2, `kink` is (a - b)^2/2.
template <class T>
struct AbRelu {
  Vec<T> slope, kink;

  // From the deficit, the roots of half the variances and the reciprocal standard deviations: the new deficit (or
  // covariance, if kCovariance), the factor of the tangent kernel, and the covariance before.
  template <bool kCovariance, bool kNtk>
  NT_INLINE void apply(Vec<T> deficit, Vec<T> root1, Vec<T> root2, Vec<T> rec1, Vec<T> rec2, Vec<T>& value,
                       Vec<T>& factor, Vec<T>& before) const {
    using V = Vec<T>;
    const V zero{}, one = broadcast(T(1));
    const V scale = (root1 + root1) * root2;  // product of the standard deviations
    const V difference = root1 - root2;
    const V angular = fma(-difference, difference, deficit);  // scale (1 - c)
    V u = (angular * rec1) * rec2;
    u = if_positive(scale, u, one);
    const V w = max(zero, min(u, broadcast(T(2)) - u));  // 1 - |c|; NaN stays NaN
    const V root = sqrt(w);
    const V negative = angular - scale;
    before = -negative;
    const V opposed = fma(scale * w, root * horner<T>(ReluPolynomials<T>::q, w), max(zero, negative));
    if constexpr (kCovariance) {
      value = fma(kink, opposed, slope * before);
    } else {
      value = fma(-kink, opposed, slope * deficit);
    }
    if constexpr (kNtk) {
      V angle = root * horner<T>(ReluPolynomials<T>::p, w);  // arccos |c| / pi
      angle = if_positive(negative, one - angle, angle);
      factor = fma(-kink, angle, slope);
    }
  }
};

// out[x] = the sum over the taps of in[x * stride + k * dilation].
template <class V>
NT_INLINE void sum_along(const V* in, V* out, int n, int taps, int stride, int dilation) {
  if (taps == 3 && stride == 1 && dilation == 1) {
    V a = in[0], b = in[1];
    for (int x = 0; x < n; ++x) {
      const V c = in[x + 2];
      out[x] = (a + b) + c;
      a = b;
      b = c;
    }
    return;
  }
  for (int x = 0; x < n; ++x) {
    V sum = in[x * stride];
    for (int k = 1; k < taps; ++k) sum += in[x * stride + k * dilation];
    out[x] = sum;
  }
}

// Sum of up to three rows.
template <int kRows, class V>
NT_INLINE V sum_across(const V* const* rows, int x) {
  V sum = rows[0][x];
  if constexpr (kRows > 1) sum += rows[1][x];
  if constexpr (kRows > 2) sum += rows[2][x];
  return sum;
}

// A linear step in the 'ntk' parameterization and the dual of the ReLU family after it. `d` and `t` are rows whose sum
// over the window is wanted, `weight` is w_var divided by the size of the window.
template <class T, bool kWide, bool kNtk, bool kCovariance, int kRows>
void linear_relu(int n, const Vec<T>* const* d, const Vec<T>* const* t, T weight, AbRelu<T> relu, Row1<T> root1,
                 Row1<T> rec1, Row2<T> root2, Row2<T> rec2, Vec<T>* d_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const V w = broadcast(weight);
  const V* const rows_d[3] = {d[0], kRows > 1 ? d[1] : nullptr, kRows > 2 ? d[2] : nullptr};
  const V* const rows_t[3] = {kNtk ? t[0] : nullptr, kNtk && kRows > 1 ? t[1] : nullptr,
                              kNtk && kRows > 2 ? t[2] : nullptr};
  for (int x = 0; x < n; ++x) {
    V value, factor, before;
    const V deficit = sum_across<kRows>(rows_d, x) * w;
    relu.template apply<kCovariance, kNtk>(deficit, get<kWide>(root1, x), get(root2, x), get<kWide>(rec1, x),
                                           get(rec2, x), value, factor, before);
    if constexpr (kNtk) t_out[x] = fma(sum_across<kRows>(rows_t, x), w, before) * factor;
    d_out[x] = value;
  }
}

// The dual of the ReLU family alone.
template <class T, bool kWide, bool kNtk, bool kCovariance>
void relu_row(int n, const Vec<T>* d, const Vec<T>* t, AbRelu<T> relu, Row1<T> root1, Row1<T> rec1, Row2<T> root2,
              Row2<T> rec2, Vec<T>* d_out, Vec<T>* t_out) {
  for (int x = 0; x < n; ++x) {
    Vec<T> value, factor, before;
    relu.template apply<kCovariance, kNtk>(d[x], get<kWide>(root1, x), get(root2, x), get<kWide>(rec1, x), get(rec2, x),
                                           value, factor, before);
    if constexpr (kNtk) t_out[x] = t[x] * factor;
    d_out[x] = value;
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
