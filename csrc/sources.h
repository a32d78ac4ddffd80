// Rows of planes from what a program starts from.
#pragma once

#include "angular.h"

namespace nt {
namespace NT_LEVEL {

// Sums over this many channels are added up, so that rounding errors do not grow with all of them.
constexpr int kChannelBlock = 128;

// The mean over the channels of what `add(x1, x2, sum)` adds up.
template <bool kWide, class T, class Add>
NT_INLINE Vec<T> channel_mean(const T* x1, const T* x2, int channels, const Add& add) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum{};
  for (int begin = 0; begin < channels; begin += kChannelBlock) {
    const int end = std::min(channels, begin + kChannelBlock);
    V part{};
    for (int c = begin; c < end; ++c) {
      const V a = kWide ? load(x1 + int64_t{c} * (kWide ? kL : 0)) : broadcast(x1[c]);
      part = add(a, load(x2 + int64_t{c} * kL), part);
    }
    sum += part;
  }
  return sum * broadcast(T(1) / channels);
}

template <bool kWide, class T>
NT_INLINE Vec<T> mean_product(const T* x1, const T* x2, int channels) {
  using V = Vec<T>;
  return channel_mean<kWide>(x1, x2, channels, [](V a, V b, V sum) { return fma(a, b, sum); });
}

// Half the mean square difference, from x2 times a sign.
template <bool kWide, class T>
NT_INLINE Vec<T> half_mean_square_difference(const T* x1, const T* x2, int channels, Vec<T> sign) {
  using V = Vec<T>;
  return broadcast(T(0.5)) * channel_mean<kWide>(x1, x2, channels, [sign](V a, V b, V sum) {
           const V difference = a - sign * b;
           return fma(difference, difference, sum);
         });
}

// First samples whose products with the second ones share the loads of the latter: one register for each.
constexpr int kSamplesTogether = NT_VECTOR_BYTES == 64 ? 16 : 8;

// Mean products with several first samples, in the order of operations of `mean_product`.
template <class T>
void mean_products(const T* x1, int64_t stride, const T* x2, int channels, Vec<T>* out) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum[kSamplesTogether] = {};
  for (int begin = 0; begin < channels; begin += kChannelBlock) {
    const int end = std::min(channels, begin + kChannelBlock);
    V part[kSamplesTogether] = {};
    for (int c = begin; c < end; ++c) {
      const V b = load(x2 + int64_t{c} * kL);
      for (int s = 0; s < kSamplesTogether; ++s) part[s] = fma(broadcast(x1[s * stride + c]), b, part[s]);
    }
    for (int s = 0; s < kSamplesTogether; ++s) sum[s] += part[s];
  }
  for (int s = 0; s < kSamplesTogether; ++s) out[s] = sum[s] * broadcast(T(1) / channels);
}

// Correlations beyond this are computed from differences: 1 - |c| would lose three bits and more.
constexpr float kClose = 0.875f;

// The angular deficit of inputs of mean square 1, from their mean product.
template <bool kWide, class T>
NT_INLINE Vec<T> angular_of_inputs(const T* x1, const T* x2, int channels, Vec<T> product) {
  using V = Vec<T>;
  const V one = broadcast(T(1)), magnitude = absolute(product), beyond = magnitude - broadcast(T(kClose));
  V rest = one - magnitude;
  if (any_positive(beyond)) {
    const V sign = if_positive(-product, -one, one);
    rest = if_positive(beyond, half_mean_square_difference<kWide>(x1, x2, channels, sign), rest);
  }
  return angular<T>(rest, -product);
}

// Without positions: a row runs over first samples.
template <bool kWide, class T>
void load_input_samples(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d) {
  const int channels = work.value(instance).channels;
  const int64_t stride = work.c.n_inputs;
  const T* x1 = work.tile.inputs1[instance.value];
  const T* x2 = work.tile.inputs2[instance.value];
  int x = 0;
  if (!kWide) {
    for (; x + kSamplesTogether <= at.n; x += kSamplesTogether) {
      mean_products(x1 + x * stride, stride, x2, channels, d + x);
    }
  }
  for (; x < at.n; ++x) d[x] = mean_product<kWide>(x1 + x * stride, x2, channels);
  if (!instance.deficit) return;
  for (x = 0; x < at.n; ++x) d[x] = angular_of_inputs<kWide>(x1 + x * stride, x2, channels, d[x]);
}

template <bool kWide, class T>
void load_inputs(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d) {
  constexpr int kL = kLanes<T>;
  const int channels = work.value(instance).channels;
  const T* x1 = work.tile.inputs1[instance.value];
  const T* x2 = work.tile.inputs2[instance.value];
  const int64_t p1 = position(instance.space, at.first), p2 = position(instance.space, at.second);
  for (int x = 0; x < at.n; ++x) {
    const T* from1 = x1 + (p1 + x) * channels * (kWide ? kL : 1);
    const T* from2 = x2 + (p2 + x) * channels * kL;
    d[x] = instance.deficit ? half_mean_square_difference<kWide>(from1, from2, channels, broadcast(T(1)))
                            : mean_product<kWide>(from1, from2, channels);
  }
}

template <bool kWide, class T>
void load_materialised(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d, Vec<T>* t) {
  constexpr int kL = kLanes<T>;
  const Context<T>& c = work.c;
  const Value& value = work.value(instance);
  const Source<T>& source = c.job.sources[instance.value];
  const Tile<T>& tile = work.tile;
  const int64_t size = n_positions(value.space);
  const int64_t per_pair = n_position_pairs(value.space, value.same_position);
  const T* k = !tile.own ? source.nngp : tile.which == 1 ? source.own1 : source.own2;
  const int64_t first = position(value.space, at.first), second = position(value.space, at.second);
  for (int x = 0; x < at.n; ++x) {
    const int row = c.one_position ? x : 0;
    const int64_t p = first + x - row, partner = second + x - row;
    const int64_t entry = value.same_position ? p : p * size + partner;
    for (int l = 0; l < kL; ++l) {
      const int64_t pair = tile.own ? tile.i[l] : (tile.i[l] + row) * c.program.n2 + tile.j[l];
      d[x][l] = k[pair * per_pair + entry];
      if (t) t[x][l] = source.ntk[pair * per_pair + entry];
    }
  }
  if (!instance.deficit) return;
  if (c.prepared.angular) {
    if (value.has_deficits) to_other<kWide>(work, instance.value, at, d, d);
    from_covariance_angular<kWide>(work, instance.value, at, d);
  } else if (!value.has_deficits) {
    to_other<kWide>(work, instance.value, at, d, d);
  }
  if (first != second) return;
  for (int x = 0; x < at.n; ++x) d[x] = if_positive(same_samples(c, tile, x, kIdentical), Vec<T>{}, d[x]);
}

// Where a row starts in a tensor.
inline int64_t place_in_tensor(const Tensor& tensor, const Place& at) {
  const Index3 &p = at.first, &partner = at.second;
  return tensor.entry({partner[0] - p[0], partner[1] - p[1], partner[2] - p[2]}, p);
}

// What an earlier stage has pooled.
template <class T>
void load_tensor(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d, Vec<T>* t) {
  const int number = work.plan.tensor_of[instance.value];
  Vec<T>* from = work.tensor(number) + place_in_tensor(work.plan.tensors[number], at);
  std::copy(from, from + at.n, d);
  if (t) std::copy(work.tangent(from), work.tangent(from) + at.n, t);
}

template <bool kWide, class T>
void load_row(const Work<T>& work, const Instance& instance, const Place& at) {
  const Plane<T>& out = work.plane(instance);
  Vec<T>* d = out.row_d(at.z, at.y, at.x);
  Vec<T>* t = out.row_t(at.z, at.y, at.x);
  const Op op = work.value(instance).op;
  if (op == Op::kInputs) {
    if (work.c.one_position) {
      load_input_samples<kWide>(work, instance, at, d);
    } else {
      load_inputs<kWide>(work, instance, at, d);
    }
  } else if (op == Op::kMaterialised) {
    load_materialised<kWide>(work, instance, at, d, t);
  } else {
    load_tensor(work, instance, at, d, t);
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
