// The way back through all stages of a tile of pairs, and how samples come into its lanes.
#pragma once

#include "backward_samples.h"

namespace nt {
namespace NT_LEVEL {

// Some consecutive samples of a batch, in groups of lanes: their records and inputs, and the cotangents of these.
template <class T>
struct Samples {
  static constexpr int kL = kLanes<T>;

  int which;
  int64_t begin, end;
  Buffer<T> wide;
  Buffer<Vec<T>> bars;

  Samples(const Context<T>& c, int of_batch, int64_t from, int64_t to)
      : which(of_batch),
        begin(from),
        end(to),
        wide(ceil_div(to - from, kL) * c.wide_size),
        bars(ceil_div(to - from, kL) * c.cotangent_size) {
    std::fill(bars.data(), bars.data() + n_groups() * c.cotangent_size, Vec<T>{});
  }

  int64_t n_groups() const { return ceil_div(end - begin, kL); }
  // Where the numbers of a sample start, and its cotangents in `bars` like `this->bars`: one in kL.
  const T* record(const Context<T>& c, int64_t number) const {
    const int64_t at = number - begin;
    return wide.data() + at / kL * c.wide_size + at % kL;
  }
  T* cotangents(const Context<T>& c, int64_t number, Vec<T>* of_all) const {
    const int64_t at = number - begin;
    return reinterpret_cast<T*>(of_all + at / kL * c.cotangent_size) + at % kL;
  }
  int lanes_of(int64_t group) const { return static_cast<int>(std::min<int64_t>(kL, end - begin - group * kL)); }
};

struct Pair {
  int64_t i, j;  // in their batches
};

// Whether cotangents are carried back through a stage without numbers that it reads.
inline bool is_linear(const Stage& stage) {
  return std::all_of(stage.instances.begin(), stage.instances.end(), [](const Instance& instance) {
    return instance.kind == Kind::kLoad || instance.kind == Kind::kTied || instance.kind == Kind::kSum ||
           instance.kind == Kind::kAsCovariance;
  });
}

// A tile's pairs, forward and back.
//
// Behind the last stage that is not linear, nothing but the cotangents of coefficients needs what is computed. So that
// stage goes both ways at once, plane by plane, when cotangents have been carried back to its end; those of the
// coefficients behind it come last.
template <bool kWide, class T>
class TileBack {
 public:
  // `seeds`: of each output, one for each row.
  TileBack(const Context<T>& c, const Tile<T>& tile, BackwardScratch<T>& scratch, const std::vector<Seed<T>>& seeds,
           Bars<T> bars)
      : c_(c), plan_(c.prepared.kept_pairs), tile_(tile), scratch_(scratch), seeds_(seeds), bars_(bars) {
    bars_.pairs = scratch.pairs.data();
    bars_.tensors_d = scratch.tensors.data();
    bars_.tensors_t = bars_.tensors_d + scratch.n_tensors;
  }

  void run() {
    const int n = static_cast<int>(plan_.stages.size());
    int turn = n - 1;
    while (turn > 0 && is_linear(plan_.stages[turn])) --turn;
    for (int k = 0; k < turn; ++k) forward(k);
    scratch_.clear_tensors();
    std::fill(bars_.pairs, bars_.pairs + int64_t{2} * c_.program.n_sources * tile_.rows, Vec<T>{});
    Bars<T> without_coefficients = bars_;
    without_coefficients.coefficients = scratch_.unused.data();
    for (int k = n - 1; k > turn; --k) back(k, without_coefficients);
    for (int k = turn; k >= 0; --k) back(k, bars_, k == turn);
    if (turn == n - 1 || !bars_.wants_coefficients) return;
    finish(turn);
    for (int k = turn + 1; k < n; ++k) forward(k);
    scratch_.clear_tensors();
    Bars<T> coefficients_alone = bars_;
    coefficients_alone.first = coefficients_alone.second = coefficients_alone.pairs = scratch_.unused.data();
    for (int k = n - 1; k > turn; --k) back(k, coefficients_alone);
  }

 private:
  void forward(int k) {
    const Stage& stage = c_.prepared.pairs.stages[k];
    if (stage.end < 0) return;  // an output, which nobody reads
    execute_stage<kWide>(c_, c_.prepared.pairs, stage, tile_, scratch_.forward);
    finish(k);
  }

  void finish(int k) {
    const int end = plan_.stages[k].end;
    if (end >= 0) finish_deficits<kWide>(c_, plan_, tile_, end, scratch_.forward);
  }

  void back(int k, const Bars<T>& bars, bool fills = false) {
    const Stage& stage = plan_.stages[k];
    if (stage.end >= 0) finish_back(c_, plan_, tile_, stage.end, bars);
    const Seed<T>* seeds = stage.output >= 0 ? seeds_.data() + int64_t{stage.output} * tile_.rows : nullptr;
    stage_back<kWide>(c_, plan_, stage, tile_, scratch_, seeds, bars, fills && stage.end >= 0);
  }

  const Context<T>& c_;
  const Plan& plan_;
  const Tile<T>& tile_;
  BackwardScratch<T>& scratch_;
  const std::vector<Seed<T>>& seeds_;
  Bars<T> bars_;
};

// The samples on one side of a tile's pairs: in lanes, several of them in all lanes, or one number for all lanes of one
// sample; and their cotangents, which always have lanes.
template <class T>
class Lanes {
  static constexpr int kL = kLanes<T>;

 public:
  explicit Lanes(const Context<T>& c, int64_t rows = 1)
      : c_(c), rows_(rows), records_(rows * c.wide_size), bars_(rows * c.cotangent_size) {}

  T* record() const { return records_.data(); }
  Vec<T>* bars() const { return bars_.data(); }
  void clear_bars() const { std::fill(bars(), bars() + rows_ * c_.cotangent_size, Vec<T>{}); }

  // A sample goes to one lane, or to all.
  void load(const Samples<T>& samples, int64_t number, int lane) const {
    const T* from = samples.record(c_, number);
    for (int64_t k = 0; k < c_.wide_size; k += kL) record()[k + lane] = from[k];
  }
  void fill(const Samples<T>& samples, int64_t number, int row = 0) const {
    const T* from = samples.record(c_, number);
    for (int64_t k = 0; k < c_.wide_size; k += kL) store(record() + row * c_.wide_size + k, broadcast(from[k]));
  }
  void narrow(const Samples<T>& samples, int64_t number) const {
    const T* from = samples.record(c_, number);
    for (int64_t k = 0; k < c_.wide_size / kL; ++k) record()[k] = from[k * kL];
  }

  // Adds the cotangents of one lane, or of all, to those of a sample.
  void add_to(T* sample, int lane) const {
    for (int64_t k = 0; k < c_.cotangent_size; ++k) sample[k * kL] += bars()[k][lane];
  }
  void add_all_to(T* sample, int row = 0, int rows = 1) const {
    for (int64_t k = 0; k < c_.cotangent_size; ++k) {
      T sum = 0;
      for (int l = 0; l < kL; ++l) sum += bars()[k * rows + row][l];
      sample[k * kL] += sum;
    }
  }

 private:
  const Context<T>& c_;
  int64_t rows_;
  Buffer<T> records_;
  Buffer<Vec<T>> bars_;
};

template <bool kWide, class T>
Tile<T> tile_of(const Context<T>& c, const T* record1, const T* wide2, const Pair* pairs, int lanes) {
  constexpr int kL = kLanes<T>;
  Tile<T> tile;
  tile.record1 = record1;
  tile.record2 = wide2;
  tile.n_lanes = lanes;
  for (int l = 0; l < kL; ++l) {  // lanes beyond the last pair repeat it
    tile.i[l] = pairs[std::min(l, lanes - 1)].i;
    tile.j[l] = pairs[std::min(l, lanes - 1)].j;
  }
  for (int64_t start : c.input_start) {
    tile.inputs1.push_back(record1 + start * (kWide ? kL : 1));
    tile.inputs2.push_back(wide2 + start * kL);
  }
  return tile;
}

// Pairs that share no sample.
template <class T>
Tile<T> pack(const Context<T>& c, const Samples<T>& first, const Samples<T>& second, const Pair* pairs, int lanes,
             const Lanes<T>& lanes1, const Lanes<T>& lanes2) {
  const Tile<T> tile = tile_of<true>(c, lanes1.record(), lanes2.record(), pairs, lanes);
  for (int l = 0; l < kLanes<T>; ++l) {
    lanes1.load(first, tile.i[l], l);
    lanes2.load(second, tile.j[l], l);
  }
  return tile;
}

}  // namespace NT_LEVEL
}  // namespace nt
