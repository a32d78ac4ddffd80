// Derivatives in forward mode.
#pragma once

#include "backward_pairs.h"

namespace nt {
namespace NT_LEVEL {

// Each pair of samples is carried back on its own, from the cotangent 1 of one of its results, and its cotangents are
// multiplied by the tangents.
template <class T>
class Tangents : Derivative<T> {
  using Base = Derivative<T>;
  using Base::c_;
  using Base::kL;
  using Base::parallel_;
  using Base::program_;
  using typename Base::V;

 public:
  Tangents(const TangentJob<T>& job, const Parallel& parallel) : Base(job.job, parallel), job_(job) {}

  void run() {
    bool nothing = true;
    each_array(program_, job_.tangents, [&](const T* array, int64_t size) { nothing &= are_zeros(array, size); });
    if (nothing) {
      const int64_t n = program_.n1 * program_.n2;
      for (const Result<T>& result : job_.job.results) {
        std::fill(result.nngp, result.nngp + n, T(0));
        if (result.ntk) std::fill(result.ntk, result.ntk + n, T(0));
      }
      return;
    }
    const auto visit = [&](const Samples<T>& first, const Samples<T>& second) {
      const auto pairs = this->pairs(first.begin, first.end, second);
      parallel_.run(ceil_div(pairs.size(), kL), [&](const auto& next) {
        BackwardScratch<T> scratch(c_);
        const Lanes<T> lanes1(c_), lanes2(c_);
        const Buffer<V> coefficients(program_.n_cotangents());
        const auto product = [&](const Tile<T>& tile, const std::vector<Seed<T>>& seeds) {
          return this->product(tile, seeds, lanes1, lanes2, coefficients.data(), scratch);
        };
        for (int64_t k = next(); k >= 0; k = next()) {
          const int lanes = static_cast<int>(std::min<int64_t>(kL, pairs.size() - k * kL));
          const Tile<T> tile = pack(c_, first, second, pairs.data() + k * kL, lanes, lanes1, lanes2);
          for (size_t output = 0; output < job_.job.results.size(); ++output) {
            const Result<T>& result = job_.job.results[output];
            std::vector<Seed<T>> seeds(job_.job.results.size());
            seeds[output].nngp = broadcast(T(1));
            write(tile, product(tile, seeds), result.nngp);
            if (!result.ntk) continue;
            seeds[output] = {V{}, broadcast(T(1))};
            write(tile, product(tile, seeds), result.ntk);
          }
        }
      });
    };
    this->each_block(visit, [](const Samples<T>&) {});
  }

 private:
  V product(const Tile<T>& tile, const std::vector<Seed<T>>& seeds, const Lanes<T>& lanes1, const Lanes<T>& lanes2,
            V* coefficients, BackwardScratch<T>& scratch) const {
    lanes1.clear_bars();
    lanes2.clear_bars();
    std::fill(coefficients, coefficients + program_.n_cotangents(), V{});
    TileBack<true, T>(c_, tile, scratch, seeds, {lanes1.bars(), lanes2.bars(), coefficients}).run();
    V sum = of_pairs(tile, scratch.pairs.data());
    sum += of_samples(tile, 1, lanes1, coefficients, scratch);
    sum += of_samples(tile, 2, lanes2, coefficients, scratch);
    for (int64_t k = 0; k < program_.n_cotangents(); ++k) {
      const T tangent = job_.tangents.coefficients[program_.with_cotangents[k]];
      // The cotangents of what a polynomial does not have, powers that may be infinite, are not asked for.
      if (tangent != 0) sum += coefficients[k] * broadcast(tangent);
    }
    return sum;
  }

  // Of the sources that are materialised.
  V of_pairs(const Tile<T>& tile, const V* bars) const {
    V sum{};
    for (const auto& pairs : job_.tangents.pairs) {
      for (const T* tangents : {pairs.nngp, pairs.ntk}) {
        for (int l = 0; tangents && l < kL; ++l) sum[l] += (*bars)[l] * tangents[tile.i[l] * program_.n2 + tile.j[l]];
        ++bars;
      }
    }
    return sum;
  }

  // Of the samples on one side of all pairs.
  V of_samples(const Tile<T>& pairs, int side, const Lanes<T>& lanes, V* coefficients,
               BackwardScratch<T>& scratch) const {
    V* bars = lanes.bars();
    const int which = program_.symmetric ? 1 : side;
    Tile<T> tile = own_tile(c_, lanes.record(), 0, kL, which);
    std::copy(side == 1 ? pairs.i : pairs.j, (side == 1 ? pairs.i : pairs.j) + kL, tile.i);
    std::copy(tile.i, tile.i + kL, tile.j);
    RecordBack<T>(c_, tile, lanes.record(), bars, coefficients, scratch).run();
    V sum{};
    const auto add = [&](const auto& both, const V* from, int64_t n) {
      const T* tangents = which == 1 ? both.first : both.second;
      for (int l = 0; tangents && l < kL; ++l) {
        for (int64_t k = 0; k < n; ++k) sum[l] += from[k][l] * tangents[tile.i[l] * n + k];
      }
    };
    for (int s = 0; s < program_.n_sources; ++s) {
      add(job_.tangents.sources[s], bars + c_.cotangent_start[s], numbers_of_source(program_.values[s]));
    }
    for (int i = 0; i < static_cast<int>(program_.values.size()); ++i) {
      const int64_t start = c_.prepared.cotangents.find(Statistic::kScale, i);
      if (start >= 0) add(job_.tangents.numbers[i], bars + start, n_positions(program_.values[i].space));
    }
    return sum;
  }

  void write(const Tile<T>& tile, V tangents, T* result) const {
    for (int l = 0; l < tile.n_lanes; ++l) {
      result[tile.i[l] * program_.n2 + tile.j[l]] = tangents[l];
      if (program_.symmetric) result[tile.j[l] * program_.n2 + tile.i[l]] = tangents[l];
    }
  }

  const TangentJob<T>& job_;
};

}  // namespace NT_LEVEL
}  // namespace nt
