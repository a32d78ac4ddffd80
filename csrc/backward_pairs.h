// What derivatives in both directions share: blocks of samples, and which pairs of them there are.
#pragma once

#include "backward_tiles.h"

namespace nt {
namespace NT_LEVEL {

// Cotangents of samples are added up apart by at most so many tasks, in at most so many bytes. Both are independent of
// the number of threads, and so are sums.
constexpr int64_t kMaxTasks = 32;
constexpr int64_t kBytesOfBars = int64_t{128} << 20;

template <class T>
bool are_zeros(const T* x, int64_t n) {
  return !x || std::all_of(x, x + n, [](T number) { return number == T(0); });
}

// Visits arrays like operands, and how many numbers they have: visit(array, size).
template <class T, class Visit>
void each_array(const Program& program, const LikeOperands<T>& arrays, const Visit& visit) {
  const auto batches = [&](const auto& both, int64_t per_sample) {
    if (both.first) visit(both.first, program.n1 * per_sample);
    if (both.second) visit(both.second, program.n2 * per_sample);
  };
  if (arrays.coefficients) visit(arrays.coefficients, program.n_coefficients);
  for (int s = 0; s < program.n_sources; ++s) {
    batches(arrays.sources[s], numbers_of_source(program.values[s]));
    for (auto* pairs : {arrays.pairs[s].nngp, arrays.pairs[s].ntk}) {
      if (pairs) visit(pairs, program.n1 * program.n2);
    }
  }
  for (size_t i = 0; i < program.values.size(); ++i) {
    batches(arrays.numbers[i], n_positions(program.values[i].space));
  }
}

// What both directions share: the records of samples, and which pairs of them there are.
template <class T>
class Derivative {
 protected:
  static constexpr int kL = kLanes<T>;
  using V = Vec<T>;

  Derivative(const Job<T>& job, const Parallel& parallel) : c_(job), program_(c_.program), parallel_(parallel) {}

  // Samples that are worked on together: as many as have room for their cotangents, in every task.
  int64_t block() const {
    const int64_t group = (c_.wide_size + c_.cotangent_size * kL) * static_cast<int64_t>(sizeof(T));
    return std::max<int64_t>(kBytesOfBars / std::max<int64_t>(group * kMaxTasks, 1), 1) * kL;
  }

  void fill_records(const Samples<T>& samples) const {
    parallel_.run(samples.n_groups(), [&](const auto& next) {
      Scratch<T> scratch(c_);
      for (int64_t group = next(); group >= 0; group = next()) {
        T* wide = samples.wide.data() + group * c_.wide_size;
        const int64_t begin = samples.begin + group * kL;
        pack_inputs(c_, wide, begin, samples.lanes_of(group), samples.which);
        const Tile<T> tile = own_tile(c_, wide, begin, samples.lanes_of(group), samples.which);
        RecordWriter<T, OwnStages<T>>(c_, tile, wide, OwnStages<T>{c_, tile, scratch}).write();
      }
    });
  }

  // The pairs of a range of first samples with second ones, each once.
  std::vector<Pair> pairs(int64_t begin1, int64_t end1, const Samples<T>& second) const {
    std::vector<Pair> pairs;
    for (int64_t i = begin1; i < end1; ++i) {
      for (int64_t j = second.begin; j < second.end; ++j) {
        if (!program_.symmetric || i <= j) pairs.push_back({i, j});
      }
    }
    return pairs;
  }

  // Calls visit(first samples, second ones) for all blocks, of a symmetric program those that have pairs; and
  // finish(first samples) when all second ones were there.
  template <class Visit, class Finish>
  void each_block(const Visit& visit, const Finish& finish) const {
    if (program_.n1 == 0 || program_.n2 == 0) return;
    const int64_t size = block();
    for (int64_t begin1 = 0; begin1 < program_.n1; begin1 += size) {
      Samples<T> first(c_, 1, begin1, std::min(program_.n1, begin1 + size));
      fill_records(first);
      for (int64_t begin2 = program_.symmetric ? begin1 : 0; begin2 < program_.n2; begin2 += size) {
        Samples<T> second(c_, program_.symmetric ? 1 : 2, begin2, std::min(program_.n2, begin2 + size));
        fill_records(second);
        visit(first, second);
      }
      finish(first);
    }
  }

  const Context<T> c_;
  const Program& program_;
  const Parallel& parallel_;
};

}  // namespace NT_LEVEL
}  // namespace nt
