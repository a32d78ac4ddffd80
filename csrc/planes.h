// The planes of one stage: where they are, and what a row of them knows of its samples.
#pragma once

#include <memory>

#include "rows.h"
#include "tiles.h"

namespace nt {
namespace NT_LEVEL {

enum RowState : int { kNothing, kDeficitOnly, kBoth };

// Rows of the input of a convolution, summed along the last axis: which ones are kept where.
struct Ring {
  int rows0 = 1, rows1 = 1;  // of the first and of the second axis
  std::vector<std::pair<int64_t, RowState>> rows;
};

// Everything that one thread needs for a plane; and, of one plane beside it, what cannot be shared.
template <class T>
struct Scratch {
  using V = Vec<T>;

  Buffer<V> planes;            // tensors, buffers and ring: of covariances, then of tangent kernels
  V* tensors = planes.data();  // those of the first plane
  Buffer<V> halo;              // a row outside of its plane
  Buffer<V> total_d, total_t;  // sums of more than three rows
  Buffer<V> zeros;
  std::unique_ptr<Buffer<V>> link_sums;  // of a row, over the windows of a pool along it
  size_t n_link_sums = 0;
  std::unique_ptr<Buffer<T>> packed1, packed2;  // records of pairs that share no first sample
  Ring ring;
  std::vector<const V*> d, t;  // rows to be added up
  std::vector<const V*> branches_d, branches_t;
  std::unique_ptr<Scratch> beside;

  explicit Scratch(const Context<T>& c)
      : planes(c.scratch_size * 2), halo(c.widest), total_d(c.widest), total_t(c.widest), zeros(c.widest), d(3), t(3) {
    std::fill(zeros.data(), zeros.data() + c.widest, V{});
  }

  // What is after the end of a stage; after the last one come the buffers.
  V* tensor(const Context<T>& c, const Plan& plan, int number) const {
    V* at = tensors;
    for (int t = 0; t < number; ++t) at += plan.tensors[t].size * c.rows;
    return at;
  }

  // For another plane of the same stage. Of its memory the part of the tensors is never touched.
  Scratch& for_plane_beside(const Context<T>& c) {
    if (!beside) {
      beside = std::make_unique<Scratch>(c);
      beside->tensors = tensors;
    }
    return *beside;
  }

  V* sums_of_links(size_t n) {
    if (!link_sums || n_link_sums < n) {
      link_sums = std::make_unique<Buffer<V>>(n);
      n_link_sums = n;
    }
    return link_sums->data();
  }
};

// The positions of one axis that a pool's window `window`, of the output offset `delta`, takes from an offset plane:
// one in `step` from `begin` on.
struct Link {
  int delta, window, begin, end, step;

  bool holds(int position) const {
    return position >= begin && position < end && (step == 1 || (position - begin) % step == 0);
  }
};

// A position of one axis, in an offset plane, that is copied to the place `place`, and its partner to `place + delta`.
struct Copy {
  int position, delta, place;
};

// An instance's part of a plane, and where its rows are.
template <class T>
struct Plane {
  using V = Vec<T>;

  Rectangle r;
  V* d = nullptr;
  V* t = nullptr;
  int64_t stride = 0;
  bool is_summed = false;  // each position holds the sum of three in turn along the last axis, with it in the middle

  V* row_d(int z, int y, int x = 0) const { return d + (int64_t{z} * r.size[1] + y) * stride + x; }
  V* row_t(int z, int y, int x = 0) const { return t ? row_d(z, y, x) + (t - d) : nullptr; }
};

// What is under way: a stage of a tile, and one offset of it.
template <class T>
struct Work {
  using V = Vec<T>;

  const Context<T>& c;
  const Plan& plan;
  const Stage& stage;
  const Tile<T>& tile;
  Scratch<T>& scratch;
  V* buffers;
  V* ring;
  Index3 offset{0, 0, 0};
  // Where the end of the stage adds to.
  V* sum_d = nullptr;
  V* sum_t = nullptr;
  std::array<std::vector<Link>, kAxes> links{};
  std::array<std::vector<Copy>, kAxes> copies{};
  std::vector<Plane<T>> planes{};  // of every instance

  Work(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile, Scratch<T>& scratch)
      : c(c), plan(plan), stage(stage), tile(tile), scratch(scratch) {
    buffers = scratch.planes.data() + (tensor(static_cast<int>(plan.tensors.size())) - scratch.tensors);
    ring = buffers + stage.n_buffers * stage.buffer_size * c.rows;
  }

  const Value& value(const Instance& instance) const { return c.program.values[instance.value]; }
  const T* coefficients(const Value& value) const { return c.job.coefficients + value.coefficient; }
  const Instance& input(const Instance& instance, int k = 0) const { return stage.instances[instance.inputs[k]]; }
  const Plane<T>& plane(const Instance& instance) const { return planes[&instance - stage.instances.data()]; }

  // The tangent kernels that belong to covariances.
  V* tangent(V* covariance) const { return plan.ntk ? covariance + c.scratch_size : nullptr; }

  V* tensor(int number) const { return scratch.tensor(c, plan, number); }

  void place_planes() {
    planes.clear();
    for (const Instance& instance : stage.instances) {
      Plane<T> plane{Rectangle(instance.space, times(offset, instance.scale), stage.wrapped)};
      if (c.one_position) plane.r.size[2] = tile.rows;
      plane.stride = plane.r.size[2] + stage.pad_low + stage.pad_high;
      if (instance.buffer >= 0) {
        plane.d = buffers + instance.buffer * stage.buffer_size * c.rows + stage.pad_low;
        plane.d += (stage.most_row_shift - instance.row_shift) * plane.stride;
        if (instance.has_ntk) plane.t = tangent(plane.d);
      }
      planes.push_back(plane);
    }
  }
};

// A row of a plane, or that part of it whose partners are side by side, as the steps see it.
struct Place {
  const Instance& geometry;
  const Rectangle& r;
  int z, y;       // within the rectangle
  int x, n;       // where it begins, and its length
  Index3 first;   // its first position
  Index3 second;  // and the partner of that
};

template <class Visit>
void each_part(const Instance& geometry, const Rectangle& r, int z, int y, const Visit& visit) {
  const int n = r.size[2];
  const int end = r.wrapped[2] ? std::min(n, r.space[2] - r.offset[2]) : n;
  for (int x = 0; x < n; x = x < end ? end : n) {
    const Index3 p{r.low[0] + z, r.low[1] + y, r.low[2] + x};
    const Index3 partner{r.partner(0, p[0]), r.partner(1, p[1]), r.partner(2, p[2])};
    visit(Place{geometry, r, z, y, x, (x < end ? end : n) - x, p, partner});
  }
}

// For what is one number of each sample.
inline constexpr Index3 kOne{1, 1, 1}, kOrigin{0, 0, 0};

template <bool kWide, class T>
const T* at1(const Context<T>& c, const Tile<T>& tile, int64_t at) {
  return tile.record1 + at * (kWide ? kLanes<T> : c.rows);
}

// The statistics of a row that starts at a position of the first image, and those of its partners.
template <bool kWide, class T>
Row1<T> first(const Work<T>& work, Statistic statistic, int value, const Index3& space, const Index3& p) {
  const int64_t at = work.c.prepared.record.find(statistic, value) + position(space, p);
  return {at1<kWide>(work.c, work.tile, at), work.c.one_position ? work.c.wide_size : kLanes<T>};
}
template <class T>
Row2<T> second(const Work<T>& work, Statistic statistic, int value, const Index3& space, const Index3& p) {
  const int64_t at = work.c.prepared.record.find(statistic, value) + position(space, p);
  return {work.tile.record2 + at * kLanes<T>, work.c.one_position ? 0 : kLanes<T>};
}
template <bool kWide, class T>
Row1<T> first(const Work<T>& work, Statistic statistic, int value, const Place& at) {
  return first<kWide>(work, statistic, value, at.geometry.space, at.first);
}
template <class T>
Row2<T> second(const Work<T>& work, Statistic statistic, int value, const Place& at) {
  return second(work, statistic, value, at.geometry.space, at.second);
}

}  // namespace NT_LEVEL
}  // namespace nt
