// Derivatives of programs. Compiled once per instruction set, as engine.cc is.
#include "backward.h"

#include "tangents.h"

namespace nt {
namespace NT_LEVEL {
namespace {

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
      : Base(job.job, parallel),
        job_(job),
        duals_are_fused_(duals_are_fused(program_)),
        wants_second_(program_.symmetric || job.results.coefficients || job.results.any_of_second()),
        coefficients_(program_.n_cotangents(), 0) {}

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
          if (wants_second_) samples_back(second);
        },
        [&](const Samples<T>& first) { samples_back(first); });
    for (int64_t k = 0; job_.results.coefficients && k < program_.n_cotangents(); ++k) {
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

  template <bool kWide>
  void carry_back(const Tile<T>& tile, V* bars1, V* bars2, Worker& worker) const {
    std::fill(worker.coefficients.data(), worker.coefficients.data() + program_.n_cotangents(), V{});
    const auto seeds = this->seeds(tile);
    Bars<T> bars{bars1, bars2, worker.coefficients.data()};
    bars.wants_coefficients = job_.results.coefficients != nullptr;
    bars.wants_second = wants_second_;
    TileBack<kWide, T>(c_, tile, worker.scratch, seeds, bars).run();
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
          for (int64_t i = begin; i < end; ++i) {
            duals_are_fused_ ? row_back<false>(first, second, i, bars2, worker)
                             : row_back<true>(first, second, i, bars2, worker);
          }
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
      carry_back<true>(tile, worker.first.bars(), worker.second.bars(), worker);
      for (int l = 0; l < lanes; ++l) {
        worker.first.add_to(first.cotangents(c_, tile.i[l], first.bars.data()), l);
        worker.second.add_to(second.cotangents(c_, tile.j[l], bars2), l);
      }
    }
  }

  // One first sample with all second ones, which are in lanes already.
  template <bool kWide>
  void row_back(const Samples<T>& first, const Samples<T>& second, int64_t i, V* bars2, Worker& worker) const {
    kWide ? worker.first.fill(first, i) : worker.first.narrow(first, i);
    worker.first.clear_bars();
    for (int64_t group = first_group(i, second); group < second.n_groups(); ++group) {
      const Tile<T> tile = tile_of_row<kWide>(worker, second, i, group);
      carry_back<kWide>(tile, worker.first.bars(), bars2 + group * c_.cotangent_size, worker);
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
        Tile<T> tile = tile_of_row<true>(worker, second, i, group);
        tile.rows = rows;
        carry_back<true>(tile, worker.first.bars(), worker.second.bars(), worker);
        V* to = bars2 + group * c_.cotangent_size;
        const V* from = worker.second.bars();
        for (int64_t k = 0; k < c_.cotangent_size; ++k) {
          for (int x = 0; x < rows; ++x) to[k] += *from++;
        }
      }
      for (int x = 0; x < rows; ++x) worker.first.add_all_to(first.cotangents(c_, i + x, first.bars.data()), x, rows);
    }
  }

  // A first sample, which the worker has, with a group of second ones.
  template <bool kWide>
  Tile<T> tile_of_row(const Worker& worker, const Samples<T>& second, int64_t i, int64_t group) const {
    const int64_t begin = second.begin + group * kL;
    const int lanes = second.lanes_of(group);
    Pair pairs[kL];
    for (int l = 0; l < lanes; ++l) pairs[l] = {i, begin + l};
    return tile_of<kWide>(c_, worker.first.record(), second.wide.data() + group * c_.wide_size, pairs, lanes);
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

  // Whether first samples may have one number for all lanes, see `with_dual_back`.
  static bool duals_are_fused(const Program& program) {
    return std::all_of(program.values.begin(), program.values.end(),
                       [](const Value& value) { return value.op != Op::kDual || is_fused(value.activation); });
  }

  const BackwardJob<T>& job_;
  const bool duals_are_fused_, wants_second_;
  std::vector<double> coefficients_;
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
