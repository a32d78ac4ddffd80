// Samples packed into lanes, and the tiles of pairs of them that one thread works on at a time.
#pragma once

#include <utility>

#include "context.h"

namespace nt {
namespace NT_LEVEL {

// With fewer planes than this, packing ragged pairs together costs more than the empty lanes.
constexpr int64_t kPlanesWorthPacking = 16;

// Where samples are packed into lanes, and what they contribute.
template <class T>
struct Batch {
  T* wide = nullptr;    // [group][record + inputs][lane]
  T* scalar = nullptr;  // [block][record][rows], for first samples
  T* inputs = nullptr;  // [sample][inputs], for first samples without positions
  int64_t begin = 0, end = 0;
};

// A number of pairs: kLanes of them, or that many for each of several first samples.
template <class T>
struct Tile {
  const T* record1 = nullptr;
  const T* record2 = nullptr;
  std::vector<const T*> inputs1, inputs2;  // for every source
  int64_t i[kLanes<T>] = {}, j[kLanes<T>] = {};
  int n_lanes = 0;
  int rows = 1;               // first samples i[.], i[.] + 1, ...
  bool side_by_side = false;  // lanes are consecutive second samples, with one first sample
  bool own = false;           // each sample with itself
  int which = 1;              // own: of this batch
};

// 1 in the lanes that pair a sample with itself, at position x of a row if rows run over samples; 0 elsewhere. `flag`
// is the coefficient that says whether the second batch holds the samples of the first.
template <class T>
Vec<T> same_samples(const Context<T>& c, const Tile<T>& tile, int x, int flag) {
  Vec<T> same{};
  if (!tile.own && c.job.coefficients[flag] == T(0)) return same;
  const int row = c.one_position ? x : 0;
  for (int l = 0; l < kLanes<T>; ++l) same[l] = tile.i[l] + row == tile.j[l] ? T(1) : T(0);
  return same;
}

template <class T>
void pack_inputs(const Context<T>& c, T* wide, int64_t begin, int lanes, int which) {
  constexpr int kL = kLanes<T>;
  for (int s = 0; s < c.program.n_sources; ++s) {
    const Value& value = c.program.values[s];
    if (value.op != Op::kInputs) continue;
    const int64_t size = n_positions(value.space) * value.channels;
    const T* x = which == 1 ? c.job.sources[s].x1 : c.job.sources[s].x2;
    T* out = wide + c.input_start[s] * kL;
    for (int l = 0; l < kL; ++l) {
      const T* in = x + (begin + std::min(l, lanes - 1)) * size;
      for (int64_t k = 0; k < size; ++k) out[k * kL + l] = in[k];
    }
  }
}

// Lays the records of a group of samples out one after another, for tiles of which they are the first samples.
template <class T>
void scatter(const Context<T>& c, const T* wide, T* scalar, int64_t sample, int lanes) {
  constexpr int kL = kLanes<T>;
  constexpr int64_t kInCache = 256;  // numbers of each lane at a time: every cache line of `wide` is read once
  const int64_t size = c.prepared.record.size();
  for (int64_t begin = 0; begin < size; begin += kInCache) {
    const int64_t end = std::min(size, begin + kInCache);
    for (int l = 0; l < lanes; ++l) {
      T* out = scalar + (sample + l) / c.rows * size * c.rows + (sample + l) % c.rows;
      for (int64_t k = begin; k < end; ++k) out[k * c.rows] = wide[k * kL + l];
    }
  }
}

// The same for inputs, of programs without positions.
template <class T>
void scatter_inputs(const Context<T>& c, const T* wide, T* inputs, int64_t sample, int lanes) {
  constexpr int kL = kLanes<T>;
  const T* from = wide + c.prepared.record.size() * kL;
  for (int l = 0; l < lanes; ++l) {
    for (int64_t k = 0; k < c.n_inputs; ++k) inputs[(sample + l) * c.n_inputs + k] = from[k * kL + l];
  }
}

// A group of samples, each with itself.
template <class T>
Tile<T> own_tile(const Context<T>& c, const T* wide, int64_t begin, int lanes, int which) {
  Tile<T> tile;
  tile.record1 = tile.record2 = wide;
  for (int64_t start : c.input_start) tile.inputs1.push_back(wide + start * kLanes<T>);
  tile.inputs2 = tile.inputs1;
  for (int l = 0; l < kLanes<T>; ++l) tile.i[l] = tile.j[l] = begin + std::min(l, lanes - 1);
  tile.n_lanes = lanes;
  tile.own = true;
  tile.which = which;
  return tile;
}

// A block of first samples with a group of second ones.
template <class T>
Tile<T> row_tile(const Context<T>& c, const Batch<T>& first, const Batch<T>& second, int64_t block, int64_t group) {
  constexpr int kL = kLanes<T>;
  Tile<T> tile;
  tile.record1 = first.scalar + block * c.prepared.record.size() * c.rows;
  tile.record2 = second.wide + group * c.wide_size;
  const int64_t i = first.begin + block * c.rows, j = second.begin + group * kL;
  tile.n_lanes = static_cast<int>(std::min<int64_t>(kL, second.end - j));
  tile.rows = static_cast<int>(std::min<int64_t>(c.rows, first.end - i));
  tile.side_by_side = true;
  for (int l = 0; l < kL; ++l) {
    tile.i[l] = i;
    tile.j[l] = j + std::min(l, tile.n_lanes - 1);
  }
  for (int s = 0; s < c.program.n_sources; ++s) {
    const Value& value = c.program.values[s];
    const int64_t size = n_positions(value.space) * value.channels;
    const T* x1 = value.op == Op::kInputs ? c.job.sources[s].x1 + i * size : nullptr;
    if (first.inputs) x1 = first.inputs + block * c.rows * c.n_inputs + c.input_start[s] - c.prepared.record.size();
    tile.inputs1.push_back(x1);
    tile.inputs2.push_back(tile.record2 + c.input_start[s] * kL);
  }
  return tile;
}

// Pairs that share no first sample; their records go to `wide1` and `wide2`.
template <class T>
Tile<T> packed_tile(const Context<T>& c, const Batch<T>& first, const Batch<T>& second,
                    const std::pair<int32_t, int32_t>* pairs, int lanes, T* wide1, T* wide2) {
  constexpr int kL = kLanes<T>;
  Tile<T> tile;
  const int64_t size = c.prepared.record.size();
  tile.record1 = wide1;
  tile.record2 = wide2;
  tile.n_lanes = lanes;
  for (int l = 0; l < kL; ++l) {
    const auto [i, j] = pairs[std::min(l, lanes - 1)];
    tile.i[l] = first.begin + i;
    tile.j[l] = second.begin + j;
    const T* from1 = first.scalar + i * size;
    for (int64_t k = 0; k < size; ++k) wide1[k * kL + l] = from1[k];
    const T* from2 = second.wide + j / kL * c.wide_size + j % kL;
    for (int64_t k = 0; k < size + c.n_inputs; ++k) wide2[k * kL + l] = from2[k * kL];
    for (int s = 0; s < c.program.n_sources; ++s) {
      const Value& value = c.program.values[s];
      if (value.op != Op::kInputs) continue;
      const int64_t n = n_positions(value.space) * value.channels;
      const T* x1 = c.job.sources[s].x1 + tile.i[l] * n;
      T* out = wide1 + c.input_start[s] * kL + l;
      for (int64_t k = 0; k < n; ++k) out[k * kL] = x1[k];
    }
  }
  for (int64_t start : c.input_start) {
    tile.inputs1.push_back(wide1 + start * kL);
    tile.inputs2.push_back(wide2 + start * kL);
  }
  return tile;
}

// How the pairs of two batches are cut into tiles.
struct Tiling {
  std::vector<std::pair<int32_t, int32_t>> tiles;   // of a block of first samples with a group of second ones
  std::vector<std::pair<int32_t, int32_t>> ragged;  // single pairs, that would leave lanes of a tile empty
};

template <class T>
Tiling tiling(const Context<T>& c, const Batch<T>& first, const Batch<T>& second) {
  constexpr int kL = kLanes<T>;
  const bool diagonal = c.program.symmetric && first.begin == second.begin;
  const int64_t n1 = first.end - first.begin, n2 = second.end - second.begin;
  const bool pack = !c.one_position && c.prepared.pairs.n_planes >= kPlanesWorthPacking;
  const int64_t blocks = ceil_div(n1, c.rows), groups = ceil_div(n2, kL);
  Tiling tiling;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < blocks; ++b) {
      const bool below = diagonal && b * c.rows >= (g + 1) * kL;
      const bool cut = diagonal && (b + 1) * c.rows > g * kL + 1;
      if (below) continue;
      if (pack && (cut || (g + 1) * kL > n2)) {
        for (int64_t j = g * kL; j < std::min(n2, (g + 1) * kL); ++j) {
          if (!diagonal || b <= j) tiling.ragged.emplace_back(b, j);
        }
      } else {
        tiling.tiles.emplace_back(b, g);
      }
    }
  }
  return tiling;
}

}  // namespace NT_LEVEL
}  // namespace nt
