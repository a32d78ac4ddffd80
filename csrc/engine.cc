// The engine. Compiled once per instruction set, with NT_LEVEL the name of the namespace it goes to.
#include "backward.h"
#include "execute.h"
#include "pages.h"
#include "products.h"
#include "samples.h"

namespace nt {
namespace NT_LEVEL {
namespace {

// Statistics of more samples than fit into this many bytes are computed block by block. A block is one group of lanes
// (or of kRowsPerTile samples without images) at least.
constexpr int64_t kRecordBytes = int64_t{96} << 20;
// Beyond, a processor no longer finds all small pages of them at once.
constexpr std::size_t kManyPages = std::size_t{1} << 24;

// ---- all of a call

template <class T>
class Engine {
  static constexpr int kL = kLanes<T>;

 public:
  Engine(const Job<T>& job, const Parallel& parallel) : c_(job), program_(c_.program), parallel_(parallel) {}

  void run() {
    if (program_.n1 == 0 || program_.n2 == 0) return;
    const int64_t record = c_.prepared.record.size();
    const int64_t per_sample = (c_.wide_size / kL + record) * static_cast<int64_t>(sizeof(T));
    const int64_t least = c_.one_position ? kRowsPerTile : kL;
    const int64_t block = std::max(kRecordBytes / std::max<int64_t>(per_sample, 1) / least, int64_t{1}) * least;
    for (int64_t begin1 = 0; begin1 < program_.n1; begin1 += block) {
      Batch<T> first;
      first.begin = begin1;
      first.end = std::min(program_.n1, begin1 + block);
      const int64_t n1 = first.end - first.begin;
      Buffer<T> scalar(ceil_div(n1, c_.rows) * c_.rows * record);
      Records wide(program_.symmetric ? ceil_div(n1, kL) * c_.wide_size : 0);
      Buffer<T> inputs(c_.one_position ? n1 * c_.n_inputs : 0);
      first.scalar = scalar.data();
      first.inputs = c_.one_position ? inputs.data() : nullptr;
      first.wide = program_.symmetric ? wide.data() : nullptr;
      statistics(first, 1, program_.covariances);
      for (int64_t begin2 = program_.symmetric ? begin1 : 0; begin2 < program_.n2; begin2 += block) {
        if (program_.symmetric && begin2 == begin1) {
          pairs(first, first);
          continue;
        }
        Batch<T> second;
        second.begin = begin2;
        second.end = std::min(program_.n2, begin2 + block);
        Records wide2(ceil_div(second.end - second.begin, kL) * c_.wide_size);
        second.wide = wide2.data();
        const bool covariances = program_.covariances && begin1 == 0 && !program_.symmetric;
        statistics(second, program_.symmetric ? 1 : 2, covariances);
        pairs(first, second);
      }
    }
  }

 private:
  // Those of many layers with tables are read from all over, at every plane.
  struct Records : Buffer<T> {
    explicit Records(int64_t size) : Buffer<T>(size) {
      const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
      if (bytes >= kManyPages) ask_for_large_pages(this->data(), bytes);
    }
  };

  // Fills the records of a batch, and the covariances of each sample with itself if they are wanted.
  void statistics(const Batch<T>& batch, int which, bool covariances) {
    parallel_.run(ceil_div(batch.end - batch.begin, kL), [&](const auto& next) {
      Scratch<T> scratch(c_);
      Buffer<T> own_wide(batch.wide ? 0 : c_.wide_size);
      for (int64_t group = next(); group >= 0; group = next()) {
        T* wide = batch.wide ? batch.wide + group * c_.wide_size : own_wide.data();
        const int64_t begin = batch.begin + group * kL;
        const int lanes = static_cast<int>(std::min<int64_t>(kL, batch.end - begin));
        pack_inputs(c_, wide, begin, lanes, which);
        const Tile<T> tile = own_tile(c_, wide, begin, lanes, which);
        RecordWriter<T, OwnStages<T>>(c_, tile, wide, OwnStages<T>{c_, tile, scratch}).write();
        if (batch.scalar) scatter(c_, wide, batch.scalar, begin - batch.begin, lanes);
        if (batch.inputs) scatter_inputs(c_, wide, batch.inputs, begin - batch.begin, lanes);
        if (!covariances) continue;
        for (const Stage& stage : c_.prepared.own.stages) {
          if (stage.output >= 0) execute_stage<true>(c_, c_.prepared.own, stage, tile, scratch);
        }
      }
    });
  }

  void pairs(const Batch<T>& first, const Batch<T>& second) {
    const Tiling tiling = NT_LEVEL::tiling(c_, first, second);
    const int64_t n_tiles = tiling.tiles.size(), n_pairs = tiling.ragged.size();
    parallel_.run(n_tiles + ceil_div(n_pairs, kL), [&](const auto& next) {
      Scratch<T> scratch(c_);
      for (int64_t k = next(); k >= 0; k = next()) {
        if (k < n_tiles) {
          const auto& [block, group] = tiling.tiles[k];
          execute<false>(row_tile(c_, first, second, block, group), scratch);
        } else {
          const int64_t begin = (k - n_tiles) * kL;
          const int lanes = static_cast<int>(std::min<int64_t>(kL, n_pairs - begin));
          for (auto* packed : {&scratch.packed1, &scratch.packed2}) {
            if (!*packed) *packed = std::make_unique<Buffer<T>>(c_.wide_size);
          }
          execute<true>(packed_tile(c_, first, second, tiling.ragged.data() + begin, lanes, scratch.packed1->data(),
                                    scratch.packed2->data()),
                        scratch);
        }
      }
    });
  }

  template <bool kWide>
  void execute(const Tile<T>& tile, Scratch<T>& scratch) {
    const Plan& plan = c_.prepared.pairs;
    for (const Stage& stage : plan.stages) {
      execute_stage<kWide>(c_, plan, stage, tile, scratch);
      if (stage.end >= 0) finish_deficits<kWide>(c_, plan, tile, stage.end, scratch);
    }
  }

  const Context<T> c_;
  const Program& program_;
  const Parallel& parallel_;
};

template <class T>
void run_dual(const DualJob<T>& job) {
  constexpr int kL = kLanes<T>;
  using V = Vec<T>;
  const int n_numbers = info(job.activation).numbers + job.table.terms;
  const Buffer<V> first(n_numbers), second(n_numbers);
  with_dual(job.activation, job.coefficients, job.table, [&](const auto& dual) {
    for (int64_t begin = 0; begin < job.n; begin += kL) {
      V in[3]{}, value, factor;
      const int lanes = static_cast<int>(std::min<int64_t>(kL, job.n - begin));
      for (int l = 0; l < lanes; ++l) {
        in[0][l] = T(0.5) * job.variance1[begin + l];
        in[1][l] = T(0.5) * job.variance2[begin + l];
        in[2][l] = job.deficit[begin + l];
      }
      const V half = dual.prepare(in[0], first.data());
      dual.prepare(in[1], second.data());
      dual.template apply<false, true>(in[2], first.data(), second.data(), value, factor);
      for (int l = 0; l < lanes; ++l) {
        job.variance_out[begin + l] = 2 * half[l];
        job.deficit_out[begin + l] = value[l];
        job.factor[begin + l] = factor[l];
      }
    }
  });
}

void run_float(const Job<float>& job, const Parallel& parallel) { Engine<float>(job, parallel).run(); }
void run_double(const Job<double>& job, const Parallel& parallel) { Engine<double>(job, parallel).run(); }

}  // namespace

NT_ALL_DUALS()

extern const Level kLevel;
const Level kLevel{NT_LEVEL_NAME,    run_float,           run_double,          backward<float>,
                   backward<double>, tangents<float>,     tangents<double>,    run_dual<float>,
                   run_dual<double>, run_products<float>, run_products<double>};

}  // namespace NT_LEVEL
}  // namespace nt
