// The inner loops: what a step does to one row of a plane.
//
// A row is an array of vectors, one per position, whose lanes are different pairs of samples. `n` is its length. The
// statistics of the second sample of each pair differ from lane to lane; those of the first do if `kWide`, else one
// number serves all lanes.
#pragma once

#include "duals.h"

namespace nt {
namespace NT_LEVEL {

// Where the statistics of a row start.
template <class T>
struct Row1 {
  const T* at;
  int64_t stride = kLanes<T>;  // from one position to the next, of wide ones
};
template <class T>
struct Row2 {
  const T* at;
  int stride;  // from one position to the next; 0 if the row runs over samples, not positions
};

template <bool kWide, class T>
NT_INLINE Vec<T> get(const Row1<T>& row, int x) {
  if constexpr (kWide) {
    return load(row.at + x * row.stride);
  } else {
    return broadcast(row.at[x]);
  }
}

template <class T>
NT_INLINE Vec<T> get(const Row2<T>& row, int x) {
  return load(row.at + int64_t{x} * row.stride);
}

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

// Adds each three neighbours of a row up while it is written: what is at x becomes the sum of x - 1, x and x + 1.
template <class V>
struct ThreeInTurn {
  V* out;
  V before{}, last{};  // at x - 2 and at x - 1

  NT_INLINE void put(int x, V next) {
    out[x - 1] = (before + last) + next;
    before = last;
    last = next;
  }

  // Beside a row of `n` there is nothing, and sums of which it is the middle are wanted too.
  NT_INLINE void end(int n) {
    put(n, V{});
    put(n + 1, V{});
  }
};

// Sum of up to three rows.
template <int kRows, class V>
NT_INLINE V sum_across(const V* const* rows, int x) {
  V sum = rows[0][x];
  if constexpr (kRows > 1) sum += rows[1][x];
  if constexpr (kRows > 2) sum += rows[2][x];
  return sum;
}

// What a dual wants to know of one sample at one position: its numbers.
template <bool kWide, class T>
struct Numbers1 {
  const T* at;
  int step;

  NT_INLINE Vec<T> operator[](int k) const {
    if constexpr (kWide) return load(at + k * kLanes<T>);
    return broadcast(at[k * step]);
  }
};
template <class T>
struct Numbers2 {
  const T* at;
  int64_t ahead;  // to those that are wanted soon

  NT_INLINE Vec<T> operator[](int k) const { return load(at + k * kLanes<T>); }
};

// Tables have more numbers of each position than what fetches from memory by itself would guess.
template <class T>
NT_INLINE void fetch_ahead(const Numbers2<T>& numbers, int k) {
  __builtin_prefetch(numbers.at + numbers.ahead + k * kLanes<T>);
}

// The same along a row. The numbers of a position lie side by side: in planes, those of large images would compete for
// the same few places of a cache.
template <class T>
struct DualRows {
  const T* at1;
  const T* at2;
  int64_t stride1, stride2;  // from one position to the next
  int step1;                 // from one number of the first sample to the next, unless it is wide

  template <bool kWide>
  NT_INLINE Numbers1<kWide, T> first(int x) const {
    return {at1 + x * stride1, step1};
  }
  NT_INLINE Numbers2<T> second(int x) const { return {at2 + x * stride2, 2 * stride2}; }

  // Those from other positions on.
  DualRows from(int64_t first, int64_t second) const {
    return {at1 + first * stride1, at2 + second * stride2, stride1, stride2, step1};
  }
};

// A tied map in the 'ntk' parameterization and the dual after it. `d` and `t` are rows whose sum over the window is
// wanted, from `begin` on, `weight` is w_var divided by the size of the window. With `kKeep`, what is between both goes
// to `d_between` and `t_between`. With `kSums` neighbours are added up; what is beside the row stands at its ends.
template <class T, class Dual, bool kWide, bool kNtk, bool kCovariance, bool kKeep, bool kSums, int kRows>
void tied_dual(int begin, int n, const Vec<T>* const* d, const Vec<T>* const* t, T weight, Dual dual, DualRows<T> rows,
               Vec<T>* d_out, Vec<T>* t_out, Vec<T>* d_between, Vec<T>* t_between) {
  using V = Vec<T>;
  const V w = broadcast(weight);
  const V* const rows_d[3] = {d[0] + begin, kRows > 1 ? d[1] + begin : nullptr, kRows > 2 ? d[2] + begin : nullptr};
  const V* const rows_t[3] = {kNtk ? t[0] + begin : nullptr, kNtk && kRows > 1 ? t[1] + begin : nullptr,
                              kNtk && kRows > 2 ? t[2] + begin : nullptr};
  ThreeInTurn<V> three_d{d_out, V{}, kSums ? d_out[-1] : V{}}, three_t{t_out};
  for (int x = 0; x < n; ++x) {
    V value, factor, before;
    const V deficit = sum_across<kRows>(rows_d, x) * w;
    dual.template apply<kCovariance, kNtk>(deficit, rows.template first<kWide>(x), rows.second(x), value, factor,
                                           before);
    if constexpr (kNtk) {
      const V tangent = fma(sum_across<kRows>(rows_t, x), w, before);
      if constexpr (kKeep) t_between[x] = tangent;
      kSums ? three_t.put(x, tangent * factor) : void(t_out[x] = tangent * factor);
    }
    if constexpr (kKeep) d_between[x] = deficit;
    kSums ? three_d.put(x, value) : void(d_out[x] = value);
  }
  if constexpr (kSums) three_d.put(n, d_out[n]);
  if constexpr (kSums && kNtk) three_t.put(n, V{});
}

// A dual alone.
template <class T, class Dual, bool kWide, bool kNtk, bool kCovariance>
void dual_row(int n, const Vec<T>* d, const Vec<T>* t, Dual dual, DualRows<T> rows, Vec<T>* d_out, Vec<T>* t_out) {
  for (int x = 0; x < n; ++x) {
    Vec<T> value, factor;
    dual.template apply<kCovariance, kNtk>(d[x], rows.template first<kWide>(x), rows.second(x), value, factor);
    if constexpr (kNtk) t_out[x] = t[x] * factor;
    d_out[x] = value;
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
