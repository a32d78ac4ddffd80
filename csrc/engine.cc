// The engine. Compiled once per instruction set, with NT_LEVEL the name of the namespace it goes to.
#include "angular.h"
#include "products.h"
#include "samples.h"
#include "sources.h"
#include "stage_end.h"
#include "windows.h"

namespace nt {
namespace NT_LEVEL {
namespace {

// Statistics of more samples than fit into this many bytes are computed block by block. A block is one group of lanes
// (or of kRowsPerTile samples without images) at least.
constexpr int64_t kRecordBytes = int64_t{96} << 20;

// ---- one plane

template <bool kWide, class T>
void execute_plane(Work<T>& work) {
  const Stage& stage = work.stage;
  work.place_planes();
  for (const Pass& pass : stage.passes) {
    const Instance& geometry = stage.instances[pass.geometry];
    const Rectangle& r = work.plane(geometry).r;
    const bool is_last = &pass == &stage.passes.back();
    const bool unmasked = pass.unmasked_dual >= 0 && leaves_all<kWide>(work, stage.instances[pass.row_ops[0]]);
    const size_t first_op = unmasked ? 2 : 0;
    const int fused_dual = unmasked ? pass.unmasked_dual : pass.fused_dual;
    const auto each_row = [&](const auto& head) {
      for (int z = 0; z < r.size[0]; ++z) {
        for (int y = 0; y < r.size[1]; ++y) {
          const auto head_of_row = head(z, y);
          each_part(geometry, r, z, y, [&](const Place& at) {
            head_of_row(at);
            for (size_t k = first_op; k < pass.row_ops.size(); ++k) {
              const Instance& op = stage.instances[pass.row_ops[k]];
              if (work.c.one_position) {
                apply_angular_row<kWide>(work, op, at);
              } else {
                apply_row<kWide>(work, op, at);
              }
            }
          });
          if (is_last) end_row(work, r, z, y);
        }
      }
    };
    if (pass.head < 0) {
      each_row([](int, int) { return [](const Place&) {}; });
    } else if (geometry.kind == Kind::kTied) {
      const WindowSums<kWide, T> sums(work, geometry);
      each_row([&](int z, int y) {
        return [&work, &geometry, fused_dual, rows = sums.row(z, y)](const Place& at) {
          finish_convolution<kWide>(work, geometry, fused_dual, at, rows);
        };
      });
    } else {
      each_row([&](int, int) { return [&](const Place& at) { load_row<kWide>(work, geometry, at); }; });
    }
  }
}

// ---- one stage

template <bool kWide, class T>
void execute_stage(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                   Scratch<T>& scratch) {
  using V = Vec<T>;
  Work<T> work(c, plan, stage, tile, scratch);
  const Value* end = stage.end >= 0 ? &c.program.values[stage.end] : nullptr;
  const int t = end ? plan.tensor_of[stage.end] : -1;
  const bool has_ntk = stage.instances[stage.root].has_ntk;
  const int64_t n_out = t >= 0 ? plan.tensors[t].size : 0;
  if (t >= 0) {
    work.sum_d = work.tensor(t);
    work.sum_t = has_ntk ? work.tangent(work.sum_d) : nullptr;
    std::fill(work.sum_d, work.sum_d + n_out, V{});
    if (has_ntk) std::fill(work.sum_t, work.sum_t + n_out, V{});
  }
  if (stage.offsets.empty()) return;  // nothing is read; after copies of no position there are zeros
  // A single sum over very many planes is formed in three levels, or its rounding errors would add up.
  V plane_d{}, plane_t{}, line_d{}, line_t{};
  const bool single = n_out == 1;
  V* total_d = work.sum_d;
  V* total_t = work.sum_t;
  if (single) {
    work.sum_d = &plane_d;
    work.sum_t = has_ntk ? &plane_t : nullptr;
  }
  for (size_t k = 0; k < stage.offsets.size(); ++k) {
    const Index3& offset = stage.offsets[k];
    work.offset = offset;
    if (end && end->op == Op::kPool) {
      for (int a = 0; a < kAxes; ++a) {
        if (k > 0 && offset[a] == stage.offsets[k - 1][a]) continue;
        work.links[a] = pool_links(stage, *end, a, offset[a]);
      }
    }
    if (end && is_copy(end->op)) {
      const Rectangle plane(stage.instances[stage.root].space, offset, stage.wrapped);
      for (int a = 0; a < kAxes; ++a) work.copies[a] = copies(end->positions[a], plane, a);
    }
    execute_plane<kWide>(work);
    if (!single) continue;
    line_d += plane_d;
    line_t += plane_t;
    plane_d = plane_t = V{};
    const bool line_ends = k + 1 == stage.offsets.size() || stage.offsets[k + 1][1] != offset[1];
    if (line_ends) {
      total_d[0] += line_d;
      if (has_ntk) total_t[0] += line_t;
      line_d = line_t = V{};
    }
  }
  if (t >= 0) scale_tensor(work, t, has_ntk);
}

// Makes what is after the end of a stage deficits, where it is carried as such.
template <bool kWide, class T>
void finish_deficits(const Context<T>& c, const Plan& plan, const Tile<T>& tile, int end, Scratch<T>& scratch) {
  const Value& value = c.program.values[end];
  if (!value.needs) return;
  const int number = plan.tensor_of[end];
  Vec<T>* data = scratch.tensor(c, plan, number);
  if (value.op == Op::kPool) finish_deficit<kWide>(c, plan, tile, number, data);
  if (is_copy(value.op)) finish_copies<kWide>(c, plan, tile, number, data);
}

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
      Buffer<T> wide(program_.symmetric ? ceil_div(n1, kL) * c_.wide_size : 0);
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
        Buffer<T> wide2(ceil_div(second.end - second.begin, kL) * c_.wide_size);
        second.wide = wide2.data();
        const bool covariances = program_.covariances && begin1 == 0 && !program_.symmetric;
        statistics(second, program_.symmetric ? 1 : 2, covariances);
        pairs(first, second);
      }
    }
  }

 private:
  // Stages of samples paired with themselves.
  struct Own {
    const Context<T>& c;
    const Tile<T>& tile;
    Scratch<T>& scratch;

    const Vec<T>* run(int end) const {
      const Plan& plan = c.prepared.own;
      const auto stage =
          std::find_if(plan.stages.begin(), plan.stages.end(), [&](const Stage& stage) { return stage.end == end; });
      execute_stage<true>(c, plan, *stage, tile, scratch);
      const Tensor& tensor = plan.tensors[plan.tensor_of[end]];
      const Vec<T>* data = scratch.tensor(c, plan, plan.tensor_of[end]);
      return tensor.offsets.empty() ? nullptr : data + tensor.find({0, 0, 0});
    }

    void finish(int end) const { finish_deficits<true>(c, c.prepared.own, tile, end, scratch); }
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
        RecordWriter<T, Own>(c_, tile, wide, Own{c_, tile, scratch}).write();
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
  const int n_planes = info(job.activation).planes + job.table.terms;
  const Buffer<V> first(n_planes), second(n_planes);
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

extern const Level kLevel;
const Level kLevel{NT_LEVEL_NAME,    run_float,           run_double,          run_dual<float>,
                   run_dual<double>, run_products<float>, run_products<double>};

}  // namespace NT_LEVEL
}  // namespace nt
