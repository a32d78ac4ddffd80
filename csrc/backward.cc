// Derivatives of programs. Compiled once per instruction set, as engine.cc is.
#include "backward.h"

#include "backward_samples.h"

namespace nt {
namespace NT_LEVEL {
namespace {

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
  visit(arrays.coefficients, program.n_coefficients);
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
template <class T>
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
    if (turn == n - 1) return;
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
    execute_stage<true>(c_, c_.prepared.pairs, stage, tile_, scratch_.forward);
    finish(k);
  }

  void finish(int k) {
    const int end = plan_.stages[k].end;
    if (end >= 0) finish_deficits<true>(c_, plan_, tile_, end, scratch_.forward);
  }

  void back(int k, const Bars<T>& bars, bool fills = false) {
    const Stage& stage = plan_.stages[k];
    if (stage.end >= 0) finish_back(c_, plan_, tile_, stage.end, bars);
    const Seed<T>* seeds = stage.output >= 0 ? seeds_.data() + int64_t{stage.output} * tile_.rows : nullptr;
    stage_back(c_, plan_, stage, tile_, scratch_, seeds, bars, fills && stage.end >= 0);
  }

  const Context<T>& c_;
  const Plan& plan_;
  const Tile<T>& tile_;
  BackwardScratch<T>& scratch_;
  const std::vector<Seed<T>>& seeds_;
  Bars<T> bars_;
};

// The samples on one side of a tile's pairs, in lanes, or several of them in all lanes; and their cotangents.
template <class T>
class Lanes {
  static constexpr int kL = kLanes<T>;

 public:
  explicit Lanes(const Context<T>& c, int64_t rows = 1)
      : c_(c), rows_(rows), wide_(rows * c.wide_size), bars_(rows * c.cotangent_size) {}

  T* wide() const { return wide_.data(); }
  Vec<T>* bars() const { return bars_.data(); }
  void clear_bars() const { std::fill(bars(), bars() + rows_ * c_.cotangent_size, Vec<T>{}); }

  // A sample goes to one lane, or to all.
  void load(const Samples<T>& samples, int64_t number, int lane) const {
    const T* from = samples.record(c_, number);
    for (int64_t k = 0; k < c_.wide_size; k += kL) wide()[k + lane] = from[k];
  }
  void fill(const Samples<T>& samples, int64_t number, int row = 0) const {
    const T* from = samples.record(c_, number);
    for (int64_t k = 0; k < c_.wide_size; k += kL) store(wide() + row * c_.wide_size + k, broadcast(from[k]));
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
  Buffer<T> wide_;
  Buffer<Vec<T>> bars_;
};

template <class T>
Tile<T> tile_of(const Context<T>& c, const T* wide1, const T* wide2, const Pair* pairs, int lanes) {
  constexpr int kL = kLanes<T>;
  Tile<T> tile;
  tile.record1 = wide1;
  tile.record2 = wide2;
  tile.n_lanes = lanes;
  for (int l = 0; l < kL; ++l) {  // lanes beyond the last pair repeat it
    tile.i[l] = pairs[std::min(l, lanes - 1)].i;
    tile.j[l] = pairs[std::min(l, lanes - 1)].j;
  }
  for (int64_t start : c.input_start) {
    tile.inputs1.push_back(wide1 + start * kL);
    tile.inputs2.push_back(wide2 + start * kL);
  }
  return tile;
}

// Pairs that share no sample.
template <class T>
Tile<T> pack(const Context<T>& c, const Samples<T>& first, const Samples<T>& second, const Pair* pairs, int lanes,
             const Lanes<T>& lanes1, const Lanes<T>& lanes2) {
  const Tile<T> tile = tile_of(c, lanes1.wide(), lanes2.wide(), pairs, lanes);
  for (int l = 0; l < kLanes<T>; ++l) {
    lanes1.load(first, tile.i[l], l);
    lanes2.load(second, tile.j[l], l);
  }
  return tile;
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

template <class T>
class Backward : Derivative<T> {
  using Base = Derivative<T>;
  using Base::c_;
  using Base::kL;
  using Base::parallel_;
  using Base::program_;
  using typename Base::V;

 public:
  Backward(const BackwardJob<T>& job, const Parallel& parallel)
      : Base(job.job, parallel), job_(job), coefficients_(program_.n_cotangents(), 0) {}

  void run() {
    each_array(program_, job_.results, [](T* array, int64_t size) { std::fill(array, array + size, T(0)); });
    const int64_t n = program_.n1 * program_.n2;
    const bool nothing = std::all_of(job_.cotangents.begin(), job_.cotangents.end(), [n](const Result<const T>& bars) {
      return are_zeros(bars.nngp, n) && are_zeros(bars.ntk, n);
    });
    if (nothing) return;
    this->each_block(
        [&](const Samples<T>& first, const Samples<T>& second) {
          pairs_back(first, second);
          samples_back(second);
        },
        [&](const Samples<T>& first) { samples_back(first); });
    for (int64_t k = 0; k < program_.n_cotangents(); ++k) {
      job_.results.coefficients[program_.with_cotangents[k]] += static_cast<T>(coefficients_[k]);
    }
  }

 private:
  using Batches = typename LikeOperands<T>::Batches;

  // What a thread needs.
  struct Worker {
    BackwardScratch<T> scratch;
    Lanes<T> first, second;
    Buffer<V> coefficients;              // cotangents, of one tile
    double* coefficient_sums = nullptr;  // and of one task

    explicit Worker(const Context<T>& c)
        : scratch(c), first(c, rows_at_once(c)), second(c, rows_at_once(c)), coefficients(c.program.n_cotangents()) {}
  };

  // Samples that a tile takes of a program without positions: as many as leave their numbers in the second cache.
  static int rows_at_once(const Context<T>& c) {
    constexpr int64_t kInCache = int64_t{1} << 18;
    const int64_t room = kInCache / (std::max<int64_t>(c.wide_size, 1) * static_cast<int64_t>(sizeof(T)));
    return static_cast<int>(std::clamp<int64_t>(room, 1, c.rows));
  }

  void carry_back(const Tile<T>& tile, V* bars1, V* bars2, Worker& worker) const {
    std::fill(worker.coefficients.data(), worker.coefficients.data() + program_.n_cotangents(), V{});
    const auto seeds = this->seeds(tile);
    TileBack<T>(c_, tile, worker.scratch, seeds, {bars1, bars2, worker.coefficients.data()}).run();
    add_lanes(worker.coefficients.data(), worker.coefficient_sums);
    for (int s = 0; s < program_.n_sources; ++s) {
      const V* bars = worker.scratch.pairs.data() + int64_t{2} * s * tile.rows;
      write_pairs(tile, bars, job_.results.pairs[s].nngp);
      write_pairs(tile, bars + tile.rows, job_.results.pairs[s].ntk);
    }
  }

  void write_pairs(const Tile<T>& tile, const V* bars, T* result) const {
    for (int x = 0; result && x < tile.rows; ++x) {
      for (int l = 0; l < tile.n_lanes; ++l) {
        const int64_t i = tile.i[l] + x, j = tile.j[l];
        if (!program_.symmetric || i <= j) result[i * program_.n2 + j] = bars[x][l];
      }
    }
  }

  // Cotangents of the outputs of a tile's pairs: a symmetric result holds those above the diagonal twice.
  std::vector<Seed<T>> seeds(const Tile<T>& tile) const {
    std::vector<Seed<T>> seeds;
    for (const Result<const T>& cotangents : job_.cotangents) {
      for (int x = 0; x < tile.rows; ++x) {
        const auto read = [&](const T* array) {
          V lanes{};
          for (int l = 0; array && l < tile.n_lanes; ++l) {
            const int64_t i = tile.i[l] + x, j = tile.j[l];
            if (program_.symmetric && i > j) continue;
            lanes[l] = array[i * program_.n2 + j];
            if (program_.symmetric && i != j) lanes[l] += array[j * program_.n2 + i];
          }
          return lanes;
        };
        seeds.push_back({read(cotangents.nngp), read(cotangents.ntk)});
      }
    }
    return seeds;
  }

  void pairs_back(const Samples<T>& first, const Samples<T>& second) {
    const int64_t n1 = first.end - first.begin, n2 = second.end - second.begin;
    // A task takes some first samples, such that lanes are full, and adds up cotangents of all the second ones.
    const int64_t n_coefficients = program_.n_cotangents(), n_bars = second.n_groups() * c_.cotangent_size;
    const int64_t size = std::max<int64_t>(n_bars, 1) * static_cast<int64_t>(sizeof(V));
    const int64_t room = std::max<int64_t>(kBytesOfBars / size, 1);
    const int64_t rows = std::max(ceil_div(kL, n2), ceil_div(n1, std::min(room, kMaxTasks)));
    const int64_t n_tasks = ceil_div(n1, rows);
    std::vector<double> coefficients(n_tasks * n_coefficients, 0);
    Buffer<V> bars(n_tasks * n_bars);
    parallel_.run(n_tasks, [&](const auto& next) {
      Worker worker(c_);
      for (int64_t task = next(); task >= 0; task = next()) {
        V* bars2 = bars.data() + task * n_bars;
        std::fill(bars2, bars2 + n_bars, V{});
        worker.coefficient_sums = coefficients.data() + task * n_coefficients;
        const int64_t begin = first.begin + task * rows, end = std::min(first.end, begin + rows);
        if (c_.one_position) {
          rows_back(first, second, begin, end, bars2, worker);
        } else if (packs(begin, end, second)) {
          packed_back(first, second, begin, end, bars2, worker);
        } else {
          for (int64_t i = begin; i < end; ++i) row_back(first, second, i, bars2, worker);
        }
      }
    });
    for (int64_t task = 0; task < n_tasks; ++task) {
      for (int64_t k = 0; k < n_bars; ++k) second.bars.data()[k] += bars.data()[task * n_bars + k];
      for (int64_t k = 0; k < n_coefficients; ++k) coefficients_[k] += coefficients[task * n_coefficients + k];
    }
  }

  // Whether pairs of these first samples with all second ones are packed. That takes time: it is worth it only where a
  // pair has many planes, and fewer vectors are left since lanes would be empty.
  bool packs(int64_t begin, int64_t end, const Samples<T>& second) const {
    if (c_.prepared.pairs.n_planes < kPlanesWorthPacking) return false;
    int64_t n_pairs = 0, by_row = 0;
    for (int64_t i = begin; i < end; ++i) {
      n_pairs += second.end - (program_.symmetric ? std::max(i, second.begin) : second.begin);
      by_row += second.n_groups() - first_group(i, second);
    }
    return ceil_div(n_pairs, kL) < by_row;
  }

  // Where the pairs of a first sample begin.
  int64_t first_group(int64_t i, const Samples<T>& second) const {
    return program_.symmetric ? std::max<int64_t>(i - second.begin, 0) / kL : 0;
  }

  // Some first samples with all second ones: pairs fill lanes.
  void packed_back(const Samples<T>& first, const Samples<T>& second, int64_t begin, int64_t end, V* bars2,
                   Worker& worker) const {
    const auto pairs = this->pairs(begin, end, second);
    for (size_t k = 0; k < pairs.size(); k += kL) {
      const int lanes = static_cast<int>(std::min<int64_t>(kL, pairs.size() - k));
      const Tile<T> tile = pack(c_, first, second, pairs.data() + k, lanes, worker.first, worker.second);
      worker.first.clear_bars();
      worker.second.clear_bars();
      carry_back(tile, worker.first.bars(), worker.second.bars(), worker);
      for (int l = 0; l < lanes; ++l) {
        worker.first.add_to(first.cotangents(c_, tile.i[l], first.bars.data()), l);
        worker.second.add_to(second.cotangents(c_, tile.j[l], bars2), l);
      }
    }
  }

  // One first sample with all second ones, which are in lanes already.
  void row_back(const Samples<T>& first, const Samples<T>& second, int64_t i, V* bars2, Worker& worker) const {
    worker.first.fill(first, i);
    worker.first.clear_bars();
    for (int64_t group = first_group(i, second); group < second.n_groups(); ++group) {
      const Tile<T> tile = tile_of_row(worker, second, i, group);
      carry_back(tile, worker.first.bars(), bars2 + group * c_.cotangent_size, worker);
    }
    worker.first.add_all_to(first.cotangents(c_, i, first.bars.data()));
  }

  // Some first samples with all second ones, of a program without positions: rows of planes run over the former. The
  // second ones then have cotangents of each row, which `row_back`, for images with many numbers, adds up at once.
  void rows_back(const Samples<T>& first, const Samples<T>& second, int64_t begin, int64_t end, V* bars2,
                 Worker& worker) const {
    const int64_t most = rows_at_once(c_);
    for (int64_t i = begin; i < end; i += most) {
      const int rows = static_cast<int>(std::min(most, end - i));
      for (int x = 0; x < rows; ++x) worker.first.fill(first, i + x, x);
      worker.first.clear_bars();
      for (int64_t group = first_group(i, second); group < second.n_groups(); ++group) {
        worker.second.clear_bars();
        Tile<T> tile = tile_of_row(worker, second, i, group);
        tile.rows = rows;
        carry_back(tile, worker.first.bars(), worker.second.bars(), worker);
        V* to = bars2 + group * c_.cotangent_size;
        const V* from = worker.second.bars();
        for (int64_t k = 0; k < c_.cotangent_size; ++k) {
          for (int x = 0; x < rows; ++x) to[k] += *from++;
        }
      }
      for (int x = 0; x < rows; ++x) worker.first.add_all_to(first.cotangents(c_, i + x, first.bars.data()), x, rows);
    }
  }

  // A first sample, which fills the lanes of the worker, with a group of second ones.
  Tile<T> tile_of_row(const Worker& worker, const Samples<T>& second, int64_t i, int64_t group) const {
    const int64_t begin = second.begin + group * kL;
    const int lanes = second.lanes_of(group);
    Pair pairs[kL];
    for (int l = 0; l < lanes; ++l) pairs[l] = {i, begin + l};
    return tile_of(c_, worker.first.wide(), second.wide.data() + group * c_.wide_size, pairs, lanes);
  }

  void add_lanes(const V* lanes, double* sums) const {
    for (int64_t k = 0; k < program_.n_cotangents(); ++k) {
      for (int l = 0; l < kL; ++l) sums[k] += lanes[k][l];
    }
  }

  void samples_back(const Samples<T>& samples) {
    const int64_t n_coefficients = program_.n_cotangents();
    std::vector<double> coefficients(samples.n_groups() * n_coefficients, 0);
    parallel_.run(samples.n_groups(), [&](const auto& next) {
      BackwardScratch<T> scratch(c_);
      Buffer<V> lanes(n_coefficients);
      for (int64_t group = next(); group >= 0; group = next()) {
        T* wide = samples.wide.data() + group * c_.wide_size;
        V* bars = samples.bars.data() + group * c_.cotangent_size;
        const int64_t begin = samples.begin + group * kL;
        const Tile<T> tile = own_tile(c_, wide, begin, samples.lanes_of(group), samples.which);
        std::fill(lanes.data(), lanes.data() + n_coefficients, V{});
        RecordBack<T>(c_, tile, wide, bars, lanes.data(), scratch).run();
        add_lanes(lanes.data(), coefficients.data() + group * n_coefficients);
        write(tile, begin, bars);
      }
    });
    for (size_t k = 0; k < coefficients.size(); ++k) coefficients_[k % n_coefficients] += coefficients[k];
  }

  // Adds the cotangents of inputs and of numbers to the results.
  void write(const Tile<T>& tile, int64_t begin, const V* bars) const {
    const auto add = [&](const Batches& both, const V* from, int64_t n) {
      T* to = tile.which == 1 ? both.first : both.second;
      for (int l = 0; to && l < tile.n_lanes; ++l) {
        for (int64_t k = 0; k < n; ++k) to[(begin + l) * n + k] += from[k][l];
      }
    };
    for (int s = 0; s < program_.n_sources; ++s) {
      add(job_.results.sources[s], bars + c_.cotangent_start[s], numbers_of_source(program_.values[s]));
    }
    for (int i = 0; i < static_cast<int>(program_.values.size()); ++i) {
      const int64_t start = c_.prepared.cotangents.find(Statistic::kScale, i);
      if (start >= 0) add(job_.results.numbers[i], bars + start, n_positions(program_.values[i].space));
    }
  }

  const BackwardJob<T>& job_;
  std::vector<double> coefficients_;
};

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
    TileBack<T>(c_, tile, scratch, seeds, {lanes1.bars(), lanes2.bars(), coefficients}).run();
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
    Tile<T> tile = own_tile(c_, lanes.wide(), 0, kL, which);
    std::copy(side == 1 ? pairs.i : pairs.j, (side == 1 ? pairs.i : pairs.j) + kL, tile.i);
    std::copy(tile.i, tile.i + kL, tile.j);
    RecordBack<T>(c_, tile, lanes.wide(), bars, coefficients, scratch).run();
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

}  // namespace

template <class T>
void backward(const BackwardJob<T>& job, const Parallel& parallel) {
  Backward<T>(job, parallel).run();
}
template <class T>
void tangents(const TangentJob<T>& job, const Parallel& parallel) {
  Tangents<T>(job, parallel).run();
}

template void backward(const BackwardJob<float>&, const Parallel&);
template void backward(const BackwardJob<double>&, const Parallel&);
template void tangents(const TangentJob<float>&, const Parallel&);
template void tangents(const TangentJob<double>&, const Parallel&);

}  // namespace NT_LEVEL
}  // namespace nt
