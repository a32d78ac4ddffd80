// Planes and stages, carried through a program.
#pragma once

#include "angular.h"
#include "samples.h"
#include "sources.h"
#include "stage_end.h"
#include "windows.h"

namespace nt {
namespace NT_LEVEL {

// ---- one plane

// Carries the plane of `work.offset` through all passes of a stage. The rows of its root go to `end(rectangle, z, y)`.
template <bool kWide, class T, class End>
void execute_plane(Work<T>& work, const End& end) {
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
          if (is_last) end(r, z, y);
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

// Turns to the plane number k of a stage: what its end needs to know of it.
template <class T>
void turn_to_plane(Work<T>& work, size_t k) {
  const Stage& stage = work.stage;
  work.offset = stage.offsets[k];
  if (stage.end < 0) return;
  const Value& end = work.c.program.values[stage.end];
  if (end.op == Op::kPool) {
    for (int a = 0; a < kAxes; ++a) {
      if (k > 0 && work.offset[a] == stage.offsets[k - 1][a]) continue;
      work.links[a] = pool_links(stage, end, a, work.offset[a]);
    }
  }
  if (is_copy(end.op)) {
    const Rectangle plane(stage.instances[stage.root].space, work.offset, stage.wrapped);
    for (int a = 0; a < kAxes; ++a) work.copies[a] = copies(end.positions[a], plane, a);
  }
}

template <bool kWide, class T>
void execute_stage(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                   Scratch<T>& scratch) {
  using V = Vec<T>;
  Work<T> work(c, plan, stage, tile, scratch);
  const int t = stage.end >= 0 ? plan.tensor_of[stage.end] : -1;
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
    turn_to_plane(work, k);
    execute_plane<kWide>(work, [&](const Rectangle& r, int z, int y) { end_row(work, r, z, y); });
    if (!single) continue;
    const Index3& offset = stage.offsets[k];
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
  if (t >= 0) scale_tensor(c, plan, t, work.tensor(t), has_ntk ? work.tangent(work.tensor(t)) : nullptr);
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

// Stages of samples paired with themselves.
template <class T>
struct OwnStages {
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

}  // namespace NT_LEVEL
}  // namespace nt
