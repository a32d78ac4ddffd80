// Rows of planes from what a program starts from.
#pragma once

#include "primitives.h"

namespace nt {
namespace NT_LEVEL {

// Sums over this many channels are added up, so that rounding errors do not grow with all of them.
constexpr int kChannelBlock = 128;

// Half the mean square difference over the channels, or the mean product.
template <bool kWide, class T>
NT_INLINE void pair_positions(bool deficit, const T* x1, const T* x2, int channels, Vec<T>& out) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum{};
  for (int begin = 0; begin < channels; begin += kChannelBlock) {
    const int end = std::min(channels, begin + kChannelBlock);
    V part{};
    for (int c = begin; c < end; ++c) {
      const V a = kWide ? load(x1 + int64_t{c} * (kWide ? kL : 0)) : broadcast(x1[c]);
      const V b = load(x2 + int64_t{c} * kL);
      part = deficit ? fma(a - b, a - b, part) : fma(a, b, part);
    }
    sum += part;
  }
  out = sum * broadcast((deficit ? T(0.5) : T(1)) / channels);
}

// The same for several first samples at once, which share the loads of the second ones.
template <int kSamples, class T>
void pair_samples(bool deficit, const T* x1, const T* x2, int channels, Vec<T>* out) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V sum[kSamples] = {};
  for (int begin = 0; begin < channels; begin += kChannelBlock) {
    const int end = std::min(channels, begin + kChannelBlock);
    V part[kSamples] = {};
    if (deficit) {
      for (int c = begin; c < end; ++c) {
        const V b = load(x2 + int64_t{c} * kL);
        for (int s = 0; s < kSamples; ++s) {
          const V difference = broadcast(x1[int64_t{s} * channels + c]) - b;
          part[s] = fma(difference, difference, part[s]);
        }
      }
    } else {
      for (int c = begin; c < end; ++c) {
        const V b = load(x2 + int64_t{c} * kL);
        for (int s = 0; s < kSamples; ++s) part[s] = fma(broadcast(x1[int64_t{s} * channels + c]), b, part[s]);
      }
    }
    for (int s = 0; s < kSamples; ++s) sum[s] += part[s];
  }
  for (int s = 0; s < kSamples; ++s) out[s] = sum[s] * broadcast((deficit ? T(0.5) : T(1)) / channels);
}

template <bool kWide, class T>
void load_inputs(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d) {
  constexpr int kL = kLanes<T>;
  const int channels = work.value(instance).channels, n = at.n;
  const T* x1 = work.tile.inputs1[instance.value];
  const T* x2 = work.tile.inputs2[instance.value];
  if (work.c.one_position) {
    int x = 0;
    const int64_t size = channels;
    for (; x + 8 <= n && !kWide; x += 8) pair_samples<8>(instance.deficit, x1 + x * size, x2, channels, d + x);
    for (; x < n; ++x) pair_positions<kWide>(instance.deficit, x1 + x * size, x2, channels, d[x]);
    return;
  }
  const int64_t p1 = position(instance.space, at.first), p2 = position(instance.space, at.second);
  for (int x = 0; x < n; ++x) {
    const T* from1 = x1 + (p1 + x) * channels * (kWide ? kL : 1);
    pair_positions<kWide>(instance.deficit, from1, x2 + (p2 + x) * channels * kL, channels, d[x]);
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
  to_other<kWide>(work, instance.value, at, d, d);
  if (first != second) return;
  for (int x = 0; x < at.n; ++x) d[x] = if_positive(same_samples(c, tile, x, kIdentical), Vec<T>{}, d[x]);
}

// What an earlier stage has pooled.
template <class T>
void load_tensor(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d, Vec<T>* t) {
  const int number = work.plan.tensor_of[instance.value];
  const Tensor& tensor = work.plan.tensors[number];
  const Index3& p = at.first;
  const Rectangle r(instance.space, {at.second[0] - p[0], at.second[1] - p[1], at.second[2] - p[2]});
  Vec<T>* from = work.tensor(number) + tensor.find(r.offset) +
                 ((p[0] - r.low[0]) * int64_t{r.size[1]} + p[1] - r.low[1]) * r.size[2] + p[2] - r.low[2];
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
    load_inputs<kWide>(work, instance, at, d);
  } else if (op == Op::kMaterialised) {
    load_materialised<kWide>(work, instance, at, d, t);
  } else {
    load_tensor(work, instance, at, d, t);
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
