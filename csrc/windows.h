// Sums over the windows of convolutions: rows are summed horizontally once, kept in a ring, and added up vertically for
// each row of the output. Beyond the ends of a row, and outside of a plane, stands its halo.
#pragma once

#include "primitives.h"

namespace nt {
namespace NT_LEVEL {

// A row before a convolution: which of its positions are in the plane, of those before `end`, where windows end.
struct RowUnder {
  int z, y;
  bool inside1, inside2;  // of the first image, and its partners of the second
  bool inside_plane;
  int inner_begin, inner_end;

  RowUnder(const Rectangle& plane, const Index3& space, int qz, int qy, int end)
      : z(qz),
        y(qy),
        inside1(is_inside(qz, space[0]) && is_inside(qy, space[1])),
        inside2(is_inside(plane.partner(0, qz), space[0]) && is_inside(plane.partner(1, qy), space[1])),
        inside_plane(is_inside(qz - plane.low[0], plane.size[0]) && is_inside(qy - plane.low[1], plane.size[1])),
        inner_begin(inside_plane ? plane.low[2] : end),
        inner_end(inside_plane ? plane.low[2] + plane.size[2] : end) {}

  bool is_outside() const { return !inside_plane && !inside1 && !inside2; }

  // Visits the parts of [begin, end) beside the plane: visit(from, to).
  template <class Visit>
  void each_part_beside(int begin, int end, const Visit& visit) const {
    visit(begin, std::min(inner_begin, end));
    visit(std::max(inner_end, begin), end);
  }
};

// What stands beside a plane of deficits before a convolution: half the variance of positions that are inside one image
// only, elsewhere 0.
template <bool kWide, class T>
class Beside {
  using V = Vec<T>;

 public:
  Beside(const Work<T>& work, const Instance& tied)
      : windows_(work.value(tied).window),
        wraps_(windows_[2].circular || work.stage.wrapped[2]),
        plane_(work.plane(work.input(tied)).r),
        space_(plane_.space) {
    if (!tied.deficit) return;
    const int value = work.input(tied).value;
    half1_ = first<kWide>(work, Statistic::kHalfVariance, value, space_, {0, 0, 0});
    half2_ = second(work, Statistic::kHalfVariance, value, space_, {0, 0, 0});
  }

  // The positions before and behind a row of the plane, of images that do not wrap.
  void fill_ends(int z, int y, V* row) const {
    const Index3 p{plane_.low[0] + z, plane_.low[1] + y, plane_.low[2]};
    const int offset = plane_.offset[2], n = plane_.size[2];
    const int first = static_cast<int>(position(space_, p));
    const Index3 partner{plane_.partner(0, p[0]), plane_.partner(1, p[1]), p[2] + offset};
    const int second = static_cast<int>(position(space_, partner));
    for (int x : {-1, n}) {
      V half{};
      if (is_inside(p[2] + x, space_[2])) half += get<kWide>(half1_, first + x);
      if (is_inside(p[2] + x + offset, space_[2])) {
        __builtin_prefetch(half2_.at + int64_t{second + x + space_[2]} * half2_.stride);  // of the next row
        half += get(half2_, second + x);
      }
      row[x] = half;
    }
  }

  // The part [from, to) of a row. Positions are `int`: programs have at most 2^24 of them.
  void fill(const RowUnder& row, int from, int to, V* out) const {
    std::fill(out, out + (to - from), V{});
    if (row.inside1) {
      const int at = static_cast<int>(position(space_, row.z, row.y, 0));
      each_inside(from, to, 0, [&](int q, int x) { out[q - from] += get<kWide>(half1_, at + x); });
    }
    if (row.inside2) {
      const int at = static_cast<int>(position(space_, plane_.partner(0, row.z), plane_.partner(1, row.y), 0));
      each_inside(from, to, plane_.offset[2], [&](int q, int x) {
        __builtin_prefetch(half2_.at + int64_t{at + x + space_[2]} * half2_.stride);  // of the next row
        out[q - from] += get(half2_, at + x);
      });
    }
  }

 private:
  // Calls visit(q, x) for the q of a range for which the position x = q + offset is inside of the image.
  template <class Visit>
  NT_INLINE void each_inside(int from, int to, int offset, const Visit& visit) const {
    const int size = space_[2];
    if (wraps_) {
      const int begin = windows_[2].circular ? from : std::max(from, 0);
      const int end = windows_[2].circular ? to : std::min(to, size);
      for (int q = begin; q < end; ++q) visit(q, modulo(q + offset, size));
      return;
    }
    const int end = std::min(to, size - offset);
    for (int q = std::max(from, -offset); q < end; ++q) visit(q, q + offset);
  }

  const std::array<Window, kAxes>& windows_;
  const bool wraps_;
  const Rectangle& plane_;
  const Index3& space_;
  Row1<T> half1_{};
  Row2<T> half2_{};
};

// The sums of one convolution over one plane.
template <bool kWide, class T>
class WindowSums {
  using V = Vec<T>;

 public:
  WindowSums(const Work<T>& work, const Instance& tied)
      : work_(work),
        tied_(tied),
        input_(work.input(tied)),
        windows_(work.value(tied).window),
        in_(work.plane(input_)),
        out_(work.plane(tied).r),
        begin_(out_.low[2] * windows_[2].stride - windows_[2].low),
        end_(begin_ + (out_.size[2] - 1) * windows_[2].stride + windows_[2].extent()),
        row_size_(work.value(tied).space[2]),
        beside_(work, tied),
        ring_(work.scratch.ring) {
    const auto& w = windows_;
    ring_.rows0 = w[0].trivial() ? 1 : w[0].extent();
    ring_.rows1 = w[1].extent();
    if (ring_.rows0 > 1) {  // whole planes are kept
      ring_.rows1 = (out_.size[1] - 1) * w[1].stride + w[1].extent();
    }
    ring_.rows.assign(int64_t{ring_.rows0} * ring_.rows1, {-1, kNothing});
    work.scratch.d.resize(std::max<size_t>(3, size_t(w[0].taps) * w[1].taps));
    work.scratch.t.resize(work.scratch.d.size());
  }

  // For the row (z, y) of the output.
  WindowRows<T> row(int z, int y) const {
    const auto& w = windows_;
    const V** rows_d = work_.scratch.d.data();
    const V** rows_t = work_.scratch.t.data();
    const V* no_tangents = work_.scratch.zeros.data();
    int n_rows = 0;
    // Rows of the input are numbered from the first one under the first window.
    const int first0 = z * w[0].stride, first1 = y * w[1].stride;
    const int slot0 = first0 % ring_.rows0, slot1 = ring_.rows0 == 1 ? first1 % ring_.rows1 : first1;
    for (int kz = 0; kz < w[0].taps; ++kz) {
      for (int ky = 0; ky < w[1].taps; ++ky) {
        const int row0 = first0 + kz * w[0].dilation, row1 = first1 + ky * w[1].dilation;
        const int y_in = row1 - w[1].low;  // of planes that are summed: input and output have one geometry
        if (in_.is_summed && is_inside(y_in, in_.r.size[1])) {
          rows_d[n_rows] = in_.row_d(row0, y_in);
          rows_t[n_rows++] = input_.has_ntk ? in_.row_t(row0, y_in) : no_tangents;
          continue;
        }
        const int s0 = slot0 + kz * w[0].dilation, s1 = slot1 + ky * w[1].dilation;
        const int64_t slot = int64_t{s0 < ring_.rows0 ? s0 : s0 - ring_.rows0} * ring_.rows1 +
                             (s1 < ring_.rows1 ? s1 : s1 - ring_.rows1);
        V* sum_d = work_.ring + slot * row_size_;
        V* sum_t = input_.has_ntk ? work_.tangent(sum_d) : nullptr;
        auto& [known, state] = ring_.rows[slot];
        const int64_t row = int64_t{row0} << 32 | row1;
        if (known != row) {
          known = row;
          state = sum_along_row(row0 + out_.low[0] * w[0].stride - w[0].low,
                                row1 + out_.low[1] * w[1].stride - w[1].low, sum_d, sum_t);
        }
        if (state == kNothing) continue;
        rows_d[n_rows] = sum_d;
        rows_t[n_rows++] = state == kBoth ? sum_t : no_tangents;
      }
    }
    if (n_rows == 0) {
      rows_d[0] = rows_t[0] = no_tangents;
      n_rows = 1;
    }
    if (n_rows > 3) n_rows = add_up(n_rows);
    WindowRows<T> rows{
        n_rows, input_.has_ntk, {no_tangents, no_tangents, no_tangents}, {no_tangents, no_tangents, no_tangents}};
    std::copy(rows_d, rows_d + n_rows, rows.d);
    std::copy(rows_t, rows_t + n_rows, rows.t);
    return rows;
  }

 private:
  // Replaces rows by their sum, which is one row.
  int add_up(int n_rows) const {
    const auto reduce = [&](std::vector<const V*>& rows, V* into) {
      for (int x = 0; x < out_.size[2]; ++x) {
        V total = rows[0][x];
        for (int k = 1; k < n_rows; ++k) total += rows[k][x];
        into[x] = total;
      }
      rows[0] = into;
    };
    reduce(work_.scratch.d, work_.scratch.total_d.data());
    if (input_.has_ntk) reduce(work_.scratch.t, work_.scratch.total_t.data());
    return 1;
  }

  // Sums one row of the input, inside or (for deficits) outside of the rectangle, over the windows along it.
  RowState sum_along_row(int qz, int qy, V* sum_d, V* sum_t) const {
    const Index3& space = input_.space;
    const Window& w = windows_[2];
    const int n = out_.size[2];
    if (windows_[0].circular) qz = modulo(qz, space[0]);
    if (windows_[1].circular) qy = modulo(qy, space[1]);
    const RowUnder row(in_.r, space, qz, qy, end_);
    if (row.is_outside() || (!row.inside_plane && !tied_.deficit)) return kNothing;
    // Pointers to what stands at `begin_`.
    V* row_d = work_.scratch.halo.data();
    V* row_t = nullptr;
    if (row.inside_plane) {
      const int z = qz - in_.r.low[0], y = qy - in_.r.low[1];
      row_d = in_.row_d(z, y) + (begin_ - in_.r.low[2]);
      row_t = input_.has_ntk ? in_.row_t(z, y) + (begin_ - in_.r.low[2]) : nullptr;
    }
    row.each_part_beside(begin_, end_, [&](int from, int to) {
      if (from >= to) return;
      if (row_t) std::fill(row_t + (from - begin_), row_t + (to - begin_), V{});
      if (w.circular && row.inside_plane) {
        for (int q = from; q < to; ++q) {
          row_d[q - begin_] = row_d[modulo(q, space[2]) - begin_];
          if (row_t) row_t[q - begin_] = row_t[modulo(q, space[2]) - begin_];
        }
      } else if (!tied_.deficit) {
        std::fill(row_d + (from - begin_), row_d + (to - begin_), V{});
      } else {
        beside_.fill(row, from, to, row_d + (from - begin_));
      }
    });
    sum_along(row_d, sum_d, n, w.taps, w.stride, w.dilation);
    if (!row_t) return kDeficitOnly;
    sum_along(row_t, sum_t, n, w.taps, w.stride, w.dilation);
    return kBoth;
  }

  const Work<T>& work_;
  const Instance& tied_;
  const Instance& input_;
  const std::array<Window, kAxes>& windows_;
  const Plane<T>& in_;
  const Rectangle& out_;
  const int begin_, end_;  // the positions of a row that windows reach
  const int row_size_;
  const Beside<kWide, T> beside_;
  Ring& ring_;
};

// A part of a row after a convolution.
template <bool kWide, class T>
void finish_convolution(const Work<T>& work, const Instance& tied, const FusedDual<T>& fused, const Place& at,
                        const WindowRows<T>& rows) {
  switch (fused.sums ? 3 : rows.n) {
    case 1:
      return finish_tied<kWide, 1>(work, tied, fused, at, rows);
    case 2:
      return finish_tied<kWide, 2>(work, tied, fused, at, rows);
    default:
      return finish_tied<kWide, 3>(work, tied, fused, at, rows);
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
