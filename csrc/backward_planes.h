// The way back through a stage: from cotangents of what is after its end to those of what it loads, and of what it
// reads of each sample. Plane by plane: forward again, with the planes that the way back reads kept, then instance by
// instance in reverse.
#pragma once

#include "backward_windows.h"

namespace nt {
namespace NT_LEVEL {

// ---- the end of a stage

// Adds to a row before a pool the cotangents of the windows that it is in, see `pool_row`.
template <bool kWide, class T>
void pool_row_back(const Back<kWide, T>& back, const Tensor& tensor, const Vec<T>* bars_d, const Vec<T>* bars_t,
                   const Rectangle& plane, int row_z, int row_y, Vec<T>* d, Vec<T>* t) {
  const Work<T>& work = back.work;
  const int z = plane.low[0] + row_z, y = plane.low[1] + row_y, low = plane.low[2];
  const auto& along = work.links[2];
  const size_t n = along.size();
  Vec<T>* sums = work.scratch.sums_of_links(2 * n);
  std::fill(sums, sums + 2 * n, Vec<T>{});
  each_link(work, tensor, z, y, [&](size_t k, int64_t entry) {
    sums[k] += bars_d[entry];
    if (t) sums[n + k] += bars_t[entry];
  });
  for (size_t k = 0; k < n; ++k) {
    for (int x = along[k].begin - low; x < along[k].end - low; x += along[k].step) {
      d[x] += sums[k];
      if (t) t[x] += sums[n + k];
    }
  }
}

template <bool kWide, class T>
void end_row_back(const Back<kWide, T>& back, const Seed<T>* seeds, const Rectangle& r, int z, int y) {
  const Work<T>& work = back.work;
  const Plane<T>& root = back.plane(work.stage.instances[work.stage.root]);
  Vec<T>* d = root.row_d(z, y);
  Vec<T>* t = root.row_t(z, y);
  if (work.stage.output >= 0) {  // of one position: rows run over samples, if at all
    for (int x = 0; x < work.tile.rows; ++x) {
      d[x] += seeds[x].nngp;
      if (t) t[x] += seeds[x].ntk;
    }
    return;
  }
  const int number = work.plan.tensor_of[work.stage.end];
  const Tensor& tensor = work.plan.tensors[number];
  const int64_t start = start_of_tensor(work.plan, number);
  const Vec<T>* bars_d = back.bars.tensors_d + start;
  const Vec<T>* bars_t = back.bars.tensors_t + start;
  const Op op = work.c.program.values[work.stage.end].op;
  if (op == Op::kFlatten) {
    for (int x = 0; x < r.size[2]; ++x) {
      d[x] += bars_d[0];
      if (t) t[x] += bars_t[0];
    }
  } else if (op == Op::kPool) {
    pool_row_back(back, tensor, bars_d, bars_t, r, z, y, d, t);
  } else {
    each_copy(work, tensor, r, z, y, [&](int x, int64_t entry) {
      d[x] += bars_d[entry];
      if (t) t[x] += bars_t[entry];
    });
  }
}

// The deficit of what is not copied is that of its variances.
template <class T>
void finish_copies_back(const Context<T>& c, const Plan& plan, int number, const Bars<T>& bars) {
  const Tensor& tensor = plan.tensors[number];
  const Value& value = c.program.values[tensor.value];
  const int64_t half = c.prepared.cotangents.find(Statistic::kHalfVariance, tensor.value);
  const Vec<T>* bar = bars.tensors_d + start_of_tensor(plan, number);
  each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
    if (is_copied(value, p, partner)) return;
    bars.first[half + position(value.space, p)] += bar[at];
    bars.second[half + position(value.space, partner)] += bar[at];
  });
}

template <class T>
void finish_deficit_back(const Context<T>& c, const Plan& plan, const Tile<T>& tile, int number, const Bars<T>& bars) {
  using V = Vec<T>;
  const Tensor& tensor = plan.tensors[number];
  const Value& value = c.program.values[tensor.value];
  const int64_t own = c.prepared.cotangents.find(Statistic::kOwnDeficit, tensor.value);
  const int64_t sums = c.prepared.cotangents.find(Statistic::kPooledVariance, tensor.value);
  const Unevenness<T> unevenness(value, c.program.values[value.inputs[0]].space);
  const V distinct = broadcast(T(1)) - same_samples(c, tile, 0, kIdentical);
  V* d = bars.tensors_d + start_of_tensor(plan, number);
  each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
    const int64_t p1 = position(value.space, p), p2 = position(value.space, partner);
    if (p1 == p2) d[at] *= distinct;
    const V half = broadcast(T(0.5)) * d[at];
    bars.first[own + p1] -= half;
    bars.second[own + p2] -= half;
    const V uneven = broadcast(unevenness(p, partner)) * d[at];
    bars.first[sums + p1] += uneven;
    bars.second[sums + p2] -= uneven;
  });
}

// Carries the cotangents of what is after the end of a stage back to where it is read, undivided.
template <class T>
void finish_back(const Context<T>& c, const Plan& plan, const Tile<T>& tile, int end, const Bars<T>& bars) {
  const Value& value = c.program.values[end];
  const int number = plan.tensor_of[end];
  if (value.needs && value.op == Op::kPool) finish_deficit_back(c, plan, tile, number, bars);
  if (value.needs && is_copy(value.op)) finish_copies_back(c, plan, number, bars);
}

// ---- one plane, and one stage

template <bool kWide, class T>
void dual_back(Back<kWide, T>& back, const Instance& instance) {
  const int before = instance.inputs[0];
  DualBack<kWide, T> dual(back, instance, !back.is_written[before]);
  back.is_written[before] = true;
  const Plane<T>& bar = back.plane(instance);
  const Vec<T> zero{}, one = broadcast(T(1));
  const Vec<T>* const zeros = back.scratch.forward.zeros.data();
  for (int z = 0; z < bar.r.size[0]; ++z) {
    for (int y = 0; y < bar.r.size[1]; ++y) {
      const RowsAfter<T> after{{bar.row_d(z, y), zeros, zeros}, {bar.t ? bar.row_t(z, y) : zeros, zeros, zeros}};
      each_part(instance, bar.r, z, y, [&](const Place& at) { dual.row(at, after, one, zero); });
    }
  }
}

template <bool kWide, class T>
void instance_back(Back<kWide, T>& back, const Instance& instance) {
  const auto each_row = [&](const auto& visit) {
    const Rectangle& r = back.plane(instance).r;
    for (int z = 0; z < r.size[0]; ++z) {
      for (int y = 0; y < r.size[1]; ++y) {
        each_part(instance, r, z, y, [&](const Place& at) { visit(back, instance, at); });
      }
    }
  };
  switch (instance.kind) {
    case Kind::kTied:
      return TiedBack<kWide, T>(back, instance).run();
    case Kind::kDual:
      return dual_back(back, instance);
    case Kind::kRescale:
      return each_row(rescale_back<kWide, T>);
    case Kind::kDropout:
      return each_row(dropout_back<kWide, T>);
    case Kind::kSum:
      return each_row(sum_back<kWide, T>);
    case Kind::kProduct:
      return each_row(product_back<kWide, T>);
    case Kind::kAsCovariance:
      return each_row(as_covariance_back<kWide, T>);
    case Kind::kLoad:
      switch (back.work.value(instance).op) {
        case Op::kInputs:
          return each_row(load_inputs_back<kWide, T>);
        case Op::kMaterialised:
          return each_row(load_materialised_back<kWide, T>);
        default:
          return each_row(load_tensor_back<kWide, T>);
      }
  }
}

template <bool kWide, class T>
void plane_back(Work<T>& work, const BackwardScratch<T>& scratch, const Seed<T>* seeds, const Bars<T>& bars,
                bool fills) {
  using V = Vec<T>;
  Work<T>* const works[] = {&work};
  execute_planes<kWide>(works, 1, [fills](Work<T>& w, const Rectangle& r, int z, int y) {
    if (fills) end_row(w, r, z, y);
  });
  Back<kWide, T> back{work, bars, scratch};
  back.place_planes();
  std::fill(scratch.coefficients.data(), scratch.coefficients.data() + scratch.n_coefficients, V{});
  back.clear(work.stage.root);
  const Rectangle& r = back.planes[work.stage.root].r;
  for (int z = 0; z < r.size[0]; ++z) {
    for (int y = 0; y < r.size[1]; ++y) end_row_back(back, seeds, r, z, y);
  }
  for (int i = static_cast<int>(work.stage.instances.size()) - 1; i >= 0; --i) {
    const Instance& instance = work.stage.instances[i];
    if (instance.feeds_tied_alone) continue;  // that carries it back
    const bool overwrites = instance.kind == Kind::kDual || &inputs_back(work.stage, instance) != &instance.inputs;
    if (!overwrites) {
      for (int input : instance.inputs) back.clear(input);
    }
    instance_back(back, instance);
  }
  for (int64_t k = 0; k < scratch.n_coefficients; ++k) bars.coefficients[k] += scratch.coefficients.data()[k];
}

// Carries the cotangents of what is after a stage back to what it loads, those of an output from `seeds`. With `fills`,
// what is after the stage is computed by the way.
template <bool kWide, class T>
void stage_back(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                BackwardScratch<T>& scratch, const Seed<T>* seeds, const Bars<T>& bars, bool fills = false) {
  if (stage.offsets.empty()) return;  // nobody reads its end
  Work<T> work(c, plan, stage, tile, scratch.forward);
  if (stage.end >= 0) {
    const int number = plan.tensor_of[stage.end];
    const int64_t start = start_of_tensor(plan, number);
    const bool has_ntk = stage.instances[stage.root].has_ntk;
    // Its own transpose.
    scale_tensor(c, plan, number, bars.tensors_d + start, has_ntk ? bars.tensors_t + start : nullptr);
  }
  TensorSums<T> sums(work);
  if (fills) sums.begin();
  for (size_t k = 0; k < stage.offsets.size(); ++k) {
    turn_to_plane(work, k);
    plane_back<kWide>(work, scratch, seeds, bars, fills);
    if (fills) sums.add_planes(k + 1);
  }
  if (fills) sums.finish();
}

}  // namespace NT_LEVEL
}  // namespace nt
