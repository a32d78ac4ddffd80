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

// The sums that the planes of a stage end in, in `work.sum_d` and `work.sum_t`; of an output there are none.
template <class T>
class TensorSums {
  using V = Vec<T>;

 public:
  explicit TensorSums(Work<T>& work) : work_(work) {
    const Stage& stage = work.stage;
    number_ = stage.end >= 0 ? work.plan.tensor_of[stage.end] : -1;
    if (number_ < 0) return;
    has_ntk_ = stage.instances[stage.root].has_ntk;
    size_ = work.plan.tensors[number_].size;
  }

  void begin() {
    if (number_ < 0) return;
    total_d_ = work_.tensor(number_);
    total_t_ = has_ntk_ ? work_.tangent(total_d_) : nullptr;
    std::fill(total_d_, total_d_ + size_, V{});
    if (has_ntk_) std::fill(total_t_, total_t_ + size_, V{});
    work_.sum_d = single() ? &plane_d_ : total_d_;
    work_.sum_t = !has_ntk_ ? nullptr : single() ? &plane_t_ : total_t_;
  }

  // A single sum over very many planes is formed in three levels, or its rounding errors would add up.
  void add_plane(size_t k) {
    if (!single()) return;
    const std::vector<Index3>& offsets = work_.stage.offsets;
    line_d_ += plane_d_;
    line_t_ += plane_t_;
    plane_d_ = plane_t_ = V{};
    const bool line_ends = k + 1 == offsets.size() || offsets[k + 1][1] != offsets[k][1];
    if (!line_ends) return;
    total_d_[0] += line_d_;
    if (has_ntk_) total_t_[0] += line_t_;
    line_d_ = line_t_ = V{};
  }

  void finish() {
    if (number_ >= 0) scale_tensor(work_.c, work_.plan, number_, total_d_, total_t_);
  }

 private:
  bool single() const { return size_ == 1; }

  Work<T>& work_;
  int number_ = -1;
  bool has_ntk_ = false;
  int64_t size_ = 0;
  V* total_d_ = nullptr;
  V* total_t_ = nullptr;
  V plane_d_{}, plane_t_{}, line_d_{}, line_t_{};
};

template <bool kWide, class T>
void execute_stage(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                   Scratch<T>& scratch) {
  Work<T> work(c, plan, stage, tile, scratch);
  TensorSums<T> sums(work);
  sums.begin();
  if (stage.offsets.empty()) return;  // nothing is read; after copies of no position there are zeros
  for (size_t k = 0; k < stage.offsets.size(); ++k) {
    turn_to_plane(work, k);
    execute_plane<kWide>(work, [&](const Rectangle& r, int z, int y) { end_row(work, r, z, y); });
    sums.add_plane(k);
  }
  sums.finish();
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
