// Planes and stages, carried through a program.
#pragma once

#include <optional>
#include <utility>

#include "angular.h"
#include "samples.h"
#include "sources.h"
#include "stage_end.h"
#include "windows.h"

namespace nt {
namespace NT_LEVEL {

// ---- planes

// The rows of one plane, in one pass of a stage.
template <bool kWide, class T>
class PassRows {
 public:
  PassRows(Work<T>& work, const Pass& pass)
      : work_(work),
        pass_(pass),
        geometry_(work.stage.instances[pass.geometry]),
        unmasked_(pass.unmasked_dual >= 0 && leaves_all<kWide>(work, work.stage.instances[pass.row_ops[0]])) {
    if (pass.head >= 0 && geometry_.kind == Kind::kTied) sums_.emplace(work, geometry_);
    const int fused = unmasked_ ? pass.unmasked_dual : pass.fused_dual;
    if (fused < 0) return;
    fused_.instance = &work.stage.instances[fused];
    fused_.numbers = dual_rows<kWide>(work, fused_.instance->value);
    if (fused_.instance->sums_for < 0 || work.stage.wrapped[2]) return;
    beside_.emplace(work, work.stage.instances[fused_.instance->sums_for]);
    fused_.sums = work.planes[fused].is_summed = true;
  }

  const Rectangle& rectangle() const { return work_.plane(geometry_).r; }

  void carry(int z, int y) const {
    if (pass_.head < 0) {
      carry_parts(z, y, [](const Place&) {});
    } else if (sums_) {
      const WindowRows<T> rows = sums_->row(z, y);  // which may write to the ends of what is overwritten
      if (beside_) beside_->fill_ends(z, y, work_.plane(*fused_.instance).row_d(z, y));
      carry_parts(z, y,
                  [this, &rows](const Place& at) { finish_convolution<kWide>(work_, geometry_, fused_, at, rows); });
    } else {
      carry_parts(z, y, [this](const Place& at) { load_row<kWide>(work_, geometry_, at); });
    }
  }

 private:
  template <class Head>
  void carry_parts(int z, int y, const Head& head) const {
    each_part(geometry_, rectangle(), z, y, [&](const Place& at) {
      head(at);
      for (size_t k = unmasked_ ? 2 : 0; k < pass_.row_ops.size(); ++k) {
        const Instance& op = work_.stage.instances[pass_.row_ops[k]];
        if (work_.c.prepared.angular) {
          apply_angular_row<kWide>(work_, op, at);
        } else {
          apply_row<kWide>(work_, op, at);
        }
      }
    });
  }

  Work<T>& work_;
  const Pass& pass_;
  const Instance& geometry_;
  const bool unmasked_;
  std::optional<WindowSums<kWide, T>> sums_;
  FusedDual<T> fused_{};
  std::optional<Beside<kWide, T>> beside_;  // rows whose neighbours are added up
};

// Carries planes of a stage, whose offsets differ along the last axis alone, through all of its passes: rows in turn,
// for they read the same samples. The rows of their root go to `end(work, rectangle, z, y)`.
template <bool kWide, class T, class End>
void execute_planes(Work<T>* const* works, int n, const End& end) {
  const Stage& stage = works[0]->stage;
  for (int i = 0; i < n; ++i) works[i]->place_planes();
  for (const Pass& pass : stage.passes) {
    std::optional<PassRows<kWide, T>> rows[kMostPlanes];
    for (int i = 0; i < n; ++i) rows[i].emplace(*works[i], pass);
    const bool is_last = &pass == &stage.passes.back();
    const Index3 size = rows[0]->rectangle().size;
    for (int z = 0; z < size[0]; ++z) {
      for (int y = 0; y < size[1]; ++y) {
        for (int i = 0; i < n; ++i) {
          rows[i]->carry(z, y);
          if (is_last) end(*works[i], rows[i]->rectangle(), z, y);
        }
      }
    }
  }
}

// ---- one stage

// Turns to the plane number k of a stage: what its end needs to know of it.
template <class T>
void turn_to_plane(Work<T>& work, size_t k) {
  const Stage& stage = work.stage;
  const Index3 before = std::exchange(work.offset, stage.offsets[k]);
  if (stage.end < 0) return;
  const Value& end = work.c.program.values[stage.end];
  if (end.op == Op::kPool) {
    for (int a = 0; a < kAxes; ++a) {
      if (!work.links[a].empty() && work.offset[a] == before[a]) continue;  // those of the plane before
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
    work_.sum_d = single() ? &planes_d_ : total_d_;
    work_.sum_t = !has_ntk_ ? nullptr : single() ? &planes_t_ : total_t_;
  }

  // Adds the planes since the last time, those before number `end`. A single sum over very many planes is formed in
  // three levels (planes that go together, lines of them, all), or its rounding errors would add up.
  void add_planes(size_t end) {
    if (!single()) return;
    const std::vector<Index3>& offsets = work_.stage.offsets;
    line_d_ += planes_d_;
    line_t_ += planes_t_;
    planes_d_ = planes_t_ = V{};
    const bool line_ends = end == offsets.size() || offsets[end][1] != offsets[end - 1][1];
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
  V planes_d_{}, planes_t_{}, line_d_{}, line_t_{};
};

// Works for planes that go through the passes of a stage together, and end in the same sums.
template <class T>
class PlanesAtOnce {
 public:
  PlanesAtOnce(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile, Scratch<T>& scratch)
      : stage_(stage) {
    owned_.reserve(stage.planes_at_once);
    Scratch<T>* at = &scratch;
    for (int i = 0; i < stage.planes_at_once; ++i) {
      if (i > 0) at = &at->for_plane_beside(c);
      owned_.emplace_back(c, plan, stage, tile, *at);
      works_[i] = &owned_.back();
    }
  }

  Work<T>& first() { return owned_.front(); }
  Work<T>* const* works() const { return works_; }

  // Turns to the planes from number k on, and returns how many they are: their offsets differ along the last axis
  // alone.
  int turn_to(size_t k) {
    int n = 0;
    for (; n < stage_.planes_at_once && k + n < stage_.offsets.size(); ++n) {
      if (!go_together(stage_.offsets[k], stage_.offsets[k + n])) break;
      turn_to_plane(owned_[n], k + n);
      owned_[n].sum_d = first().sum_d;
      owned_[n].sum_t = first().sum_t;
    }
    return n;
  }

 private:
  const Stage& stage_;
  std::vector<Work<T>> owned_;
  Work<T>* works_[kMostPlanes] = {};
};

template <bool kWide, class T>
void execute_stage(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                   Scratch<T>& scratch) {
  PlanesAtOnce<T> planes(c, plan, stage, tile, scratch);
  TensorSums<T> sums(planes.first());
  sums.begin();
  if (stage.offsets.empty()) return;  // nothing is read; after copies of no position there are zeros
  for (size_t k = 0; k < stage.offsets.size();) {
    const int n = planes.turn_to(k);
    execute_planes<kWide>(planes.works(), n, [](Work<T>& w, const Rectangle& r, int z, int y) { end_row(w, r, z, y); });
    k += n;
    sums.add_planes(k);
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
