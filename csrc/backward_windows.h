// The way back through convolutions.
#pragma once

#include "backward_dual_rows.h"
#include "backward_rows.h"

namespace nt {
namespace NT_LEVEL {

// Which windows of a plane's axis each position before the convolution is in: from `begin` on, also beside the image.
class WindowsOf {
 public:
  struct Few {
    const int* first;
    const int* last;
    const int* begin() const { return first; }
    const int* end() const { return last; }
  };

  // `low` and `n` are of the plane after it; the plane before it holds [inside, inside + n_inside).
  WindowsOf(const Window& w, int low, int n, int space, int inside, int n_inside) {
    const int reach = low * w.stride - w.low;
    begin_ = w.circular ? 0 : std::min(reach, inside);
    end_ = w.circular ? space : std::max(reach + (n - 1) * w.stride + w.extent(), inside + n_inside);
    counts_.resize(end_ - begin_);
    room_ = w.circular ? w.taps * ((n - 1) * w.stride / space + 1) : w.taps;
    windows_.resize(counts_.size() * room_);
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < w.taps; ++k) {
        const int q = (low + i) * w.stride + k * w.dilation - w.low;
        const int at = (w.circular ? modulo(q, space) : q) - begin_;
        windows_[at * room_ + counts_[at]++] = i;
      }
    }
  }

  int begin() const { return begin_; }
  int end() const { return end_; }
  Few of(int position) const {
    const int* first = windows_.data() + (position - begin_) * room_;
    return {first, first + counts_[position - begin_]};
  }

 private:
  int begin_, end_;
  int64_t room_;  // windows that a position may be in
  std::vector<int> counts_, windows_;
};

// out[q] = the sum over the windows along a row that q is in, of rows that are added up.
template <class V>
void sum_of_windows(const std::vector<const V*>& rows, V* sums, V* out, int n, const Window& w) {
  const auto sum = [&](int x) {
    V total{};
    for (const V* row : rows) total += row[x];
    return total;
  };
  const auto sum_of_three = [&](const auto& at) {
    ThreeInTurn<V> three{out + 1};
    for (int x = 0; x < n; ++x) three.put(x, at(x));
    three.end(n);
  };
  if (w.is_three_in_turn()) {
    if (rows.size() != 3) return sum_of_three(sum);
    const V *row0 = rows[0], *row1 = rows[1], *row2 = rows[2];
    return sum_of_three([&](int x) { return (row0[x] + row1[x]) + row2[x]; });
  }
  for (int x = 0; x < n; ++x) sums[x] = sum(x);
  std::fill(out, out + (n - 1) * w.stride + w.extent(), V{});
  for (int k = 0; k < w.taps; ++k) {
    for (int x = 0; x < n; ++x) out[x * w.stride + k * w.dilation] += sums[x];
  }
}

// The same where positions are counted modulo the size of the image.
template <class V>
void sum_of_circular_windows(const std::vector<const V*>& rows, V* out, int n, int size, const Window& w) {
  std::fill(out, out + size, V{});
  for (int x = 0; x < n; ++x) {
    V total{};
    for (const V* row : rows) total += row[x];
    for (int k = 0; k < w.taps; ++k) out[modulo(x * w.stride + k * w.dilation - w.low, size)] += total;
  }
}

// A tied map: its cotangents, summed over the windows that each position is in, go to that position, and through the
// dual before it if nothing else reads that; where a position is beside one of the two images, and has a deficit that
// is half the variance in the other, to that variance.
template <bool kWide, class T>
class TiedBack {
  using V = Vec<T>;

 public:
  TiedBack(Back<kWide, T>& back, const Instance& tied)
      : back_(back),
        tied_(tied),
        value_(back.work.value(tied)),
        input_(back.work.input(tied)),
        r_(back.work.plane(input_).r),
        out_bar_(back.plane(tied)),
        has_ntk_(out_bar_.t != nullptr),
        has_own_(has_ntk_ && !has_own_covariance(back.work, tied)),
        sums_ntk_(has_own_ || input_.has_ntk) {
    const T* c = back.work.coefficients(value_);
    mean_ = broadcast(T(1) / window_size<T>(value_));
    weight_ = mean_ * c[0];
    own_weight_ = !has_own_ ? V{} : mean_ * (tied.deficit ? -c[2] : c[2]);
    const Window& w = value_.window[2];
    if (tied.deficit) {
      const Statistic half = Statistic::kHalfVariance;
      half1_ = first<kWide>(back.work, half, input_.value, input_.space, {0, 0, 0});
      half2_ = second(back.work, half, input_.value, input_.space, {0, 0, 0});
      half_bar1_ = back.first(half, input_.value, input_.space, {0, 0, 0});
      half_bar2_ = back.second(half, input_.value, input_.space, {0, 0, 0});
    }
    begin_ = w.circular ? 0 : out_bar_.r.low[2] * w.stride - w.low;
    end_ = w.circular ? input_.space[2] : begin_ + (out_bar_.r.size[2] - 1) * w.stride + w.extent();
  }

  void run() {
    const Rectangle& r = out_bar_.r;
    for (int z = 0; z < r.size[0]; ++z) {
      for (int y = 0; y < r.size[1]; ++y) {
        each_part(tied_, r, z, y, [&](const Place& at) { biases(at); });
      }
    }
    if (input_.feeds_tied_alone) {
      const int before = input_.inputs[0];
      Dual dual(back_, input_, !back_.is_written[before]);
      back_.is_written[before] = true;
      dual_ = dual.sums() ? &dual : nullptr;
      takes_three_ = out_bar_.is_summed && dual_;
      each_row([&](int z, int y) {
        each_part(input_, r_, z, y, [&](const Place& at) { add(dual.row(at, inside_, weight_, own_weight_)); });
      });
    } else {
      each_row([&](int z, int y) { inner(z, y); });
    }
    const V own_weight_bar = own_weight_bar_ * mean_;
    back_.add_coefficient(value_, 0, weight_bar_ * mean_);
    if (has_own_) back_.add_coefficient(value_, 2, tied_.deficit ? -own_weight_bar : own_weight_bar);
  }

 private:
  using Dual = DualBack<kWide, T>;
  using Products = typename Dual::Products;

  using First = std::true_type;  // of the first sample; else of the second ones

  void add(const Products& products) {
    weight_bar_ += products.d;
    own_weight_bar_ += products.t;
  }

  // What is added to each position after the windows.
  void biases(const Place& at) {
    V* d = out_bar_.row_d(at.z, at.y, at.x);
    const V* t = out_bar_.row_t(at.z, at.y, at.x);
    V bias{}, own_bias{}, own_weight{};
    if (!tied_.deficit) {
      for (int x = 0; x < at.n; ++x) bias += d[x];
      back_.add_coefficient(value_, 1, bias);
    }
    if (!t) return;
    if (!has_own_) {
      if (!tied_.feeds_dual_alone) own_covariance(at);
      return;
    }
    for (int x = 0; x < at.n; ++x) own_bias += t[x];
    back_.add_coefficient(value_, 3, own_bias);
    if (!tied_.deficit) return;
    const auto half1 = first<kWide>(back_.work, Statistic::kHalfAverage, tied_.value, at);
    const auto half2 = second(back_.work, Statistic::kHalfAverage, tied_.value, at);
    const V average_weight = broadcast(back_.work.coefficients(value_)[2]);
    V* bar1 = back_.first(Statistic::kHalfAverage, tied_.value, at);
    V* bar2 = back_.second(Statistic::kHalfAverage, tied_.value, at);
    for (int x = 0; x < at.n; ++x) {
      own_weight += t[x] * (get<kWide>(half1, x) + get(half2, x));
      const V bar = average_weight * t[x];
      bar1[x] += bar;
      bar2[x] += bar;
    }
    back_.add_coefficient(value_, 2, own_weight);
  }

  // The tangent kernel gets the covariance after the map.
  void own_covariance(const Place& at) const {
    V* d = out_bar_.row_d(at.z, at.y, at.x);
    const V* t = out_bar_.row_t(at.z, at.y, at.x);
    V* bar1 = back_.first(Statistic::kHalfVariance, tied_.value, at);
    V* bar2 = back_.second(Statistic::kHalfVariance, tied_.value, at);
    for (int x = 0; x < at.n; ++x) {
      d[x] -= t[x];
      bar1[x] += t[x];
      bar2[x] += t[x];
    }
  }

  // Calls visit(z, y) for the rows before the map, when `inside_` holds cotangents whose sums are those over the
  // windows that their positions are in, undivided.
  template <class Visit>
  void each_row(const Visit& visit) {
    const V* const zeros = back_.scratch.forward.zeros.data();
    inside_ = windows_ = {{zeros, zeros, zeros}, {zeros, zeros, zeros}};
    if (back_.work.c.one_position) {  // windows of one position: no sums
      inside_.d[0] = out_bar_.d;
      if (sums_ntk_) inside_.t[0] = out_bar_.t;
      return visit(0, 0);
    }
    const Rectangle& r = out_bar_.r;
    const auto along = [&](int a) {
      return WindowsOf(value_.window[a], r.low[a], r.size[a], input_.space[a], r_.low[a], r_.size[a]);
    };
    const WindowsOf z = along(0), y = along(1);
    for (int qz = z.begin(); qz < z.end(); ++qz) {
      // The first one, which may lie beside the plane, comes last: what is read there has been asked for then.
      const int n = y.end() - y.begin();
      for (int k = 1; k <= n; ++k) {
        const int qy = y.begin() + k % n;
        if (k < n && !dual_) prefetch(row_at(qz, y.begin() + (k + 1) % n));
        visit_row(row_at(qz, qy), z.of(qz), y.of(qy), visit);
      }
    }
  }

  RowUnder row_at(int qz, int qy) const { return {r_, input_.space, qz, qy, end_}; }

  // From the rows of the windows that it is in.
  template <class Visit>
  void visit_row(const RowUnder& row, WindowsOf::Few windows_z, WindowsOf::Few windows_y, const Visit& visit) {
    if (row.is_outside() || (!row.inside_plane && !tied_.deficit)) return;
    const BackwardScratch<T>& s = back_.scratch;
    sum_rows(windows_z, windows_y, out_bar_.d, s.rows_d.data(), s.windows_d.data(), windows_.d);
    if (sums_ntk_) sum_rows(windows_z, windows_y, out_bar_.t, s.rows_t.data(), s.windows_t.data(), windows_.t);
    if (row.inside_plane) {
      for (int k = 0; k < 3; ++k) {
        inside_.d[k] = inside(windows_.d[k], s.inside_d.data());
        inside_.t[k] = inside(windows_.t[k], s.inside_t.data());
      }
      visit(row.z - r_.low[0], row.y - r_.low[1]);
    }
    dual_ ? add_outer_before_dual(row) : add_outer(row);
  }

  // Up to three rows whose sum is that of cotangents over the windows, from `begin_` on.
  void sum_rows(WindowsOf::Few windows_z, WindowsOf::Few windows_y, const V* plane, V* sums, V* windows,
                const V** result) {
    const int n = out_bar_.r.size[2];
    rows_.clear();
    for (int z : windows_z) {
      for (int y : windows_y) rows_.push_back(plane + (int64_t{z} * out_bar_.r.size[1] + y) * out_bar_.stride);
    }
    const Window& w = value_.window[2];
    if (takes_three_ && rows_.size() <= 3) {
      for (size_t k = 0; k < 3; ++k) {
        result[k] = k < rows_.size() ? rows_[k] - 1 : back_.scratch.forward.zeros.data();
      }
      return;
    }
    result[0] = windows;
    result[1] = result[2] = back_.scratch.forward.zeros.data();
    if (out_bar_.is_summed) {
      for (int x = 0; x < n + 2; ++x) {
        windows[x] = V{};
        for (const V* row : rows_) windows[x] += row[x - 1];
      }
    } else if (w.circular) {
      sum_of_circular_windows(rows_, windows, n, input_.space[2], w);
    } else {
      sum_of_windows(rows_, sums, windows, n, w);
    }
  }

  // The part of a row inside both images, zero where no window is.
  const V* inside(const V* windows, V* copy) const {
    const int low = r_.low[2], high = low + r_.size[2];
    if (begin_ <= low && high <= end_) return windows + (low - begin_);
    if (windows == back_.scratch.forward.zeros.data()) return windows;
    for (int q = low; q < high; ++q) copy[q - low] = q >= begin_ && q < end_ ? windows[q - begin_] : V{};
    return copy;
  }

  // A row of positions inside both images.
  void inner(int z, int y) {
    const Plane<T>& in = back_.work.plane(input_);
    const Plane<T>& in_bar = back_.plane(input_);
    const V* d = in.row_d(z, y);
    const V* t = in.row_t(z, y);
    V* bar_d = in_bar.row_d(z, y);
    V* bar_t = in_bar.row_t(z, y);
    const V *inside_d = inside_.d[0], *inside_t = inside_.t[0];
    Products products;
    for (int x = 0; x < r_.size[2]; ++x) {
      bar_d[x] += fma(own_weight_, inside_t[x], weight_ * inside_d[x]);
      products.d = fma(inside_d[x], d[x], products.d);
      products.t = fma(inside_t[x], d[x], products.t);
    }
    for (int x = 0; t && x < r_.size[2]; ++x) {
      bar_t[x] = fma(weight_, inside_t[x], bar_t[x]);
      products.d = fma(inside_t[x], t[x], products.d);
    }
    add(products);
  }

  // Visits the positions of a row that are inside one image only: visit(q, whose, position in that image).
  template <class Visit>
  void each_outer(const RowUnder& row, const Visit& visit) const {
    if (!tied_.deficit || row.is_outside()) return;
    const Index3& space = input_.space;
    // Programs have at most 2^24 positions.
    const int p1 = static_cast<int>(position(space, row.z, row.y, 0));
    const int p2 = static_cast<int>(position(space, r_.partner(0, row.z), r_.partner(1, row.y), 0));
    row.each_part_beside(begin_, end_, [&](int from, int to) {
      for (int q = from; q < to; ++q) {
        const int other = r_.partner(2, q);
        const bool first_there = row.inside1 && is_inside(q, space[2]);
        const bool second_there = row.inside2 && is_inside(other, space[2]);
        if (first_there && !second_there) visit(q, First{}, p1 + q);
        if (second_there && !first_there) visit(q, std::false_type{}, p2 + other);
      }
    });
  }

  void prefetch(const RowUnder& row) const {
    each_outer(row, [this](int, auto whose, int p) {
      if constexpr (whose) {
        __builtin_prefetch(half1_.at + p * (kWide ? half1_.stride : 1));
        __builtin_prefetch(half_bar1_ + p, 1);
      } else {
        __builtin_prefetch(half2_.at + int64_t{p} * half2_.stride);
        __builtin_prefetch(half_bar2_ + p, 1);
      }
    });
  }

  void add_outer(const RowUnder& row) {
    V weight_bar{}, own_weight_bar{};  // in registers
    each_outer(row, [&](int q, auto whose, int p) {
      const V d = sum_across<3>(windows_.d, q - begin_), t = sum_across<3>(windows_.t, q - begin_);
      V half;
      if constexpr (whose) {
        half = get<kWide>(half1_, p);
      } else {
        half = get(half2_, p);
      }
      *(whose ? half_bar1_ + p : half_bar2_ + p) += fma(own_weight_, t, weight_ * d);
      weight_bar = fma(d, half, weight_bar);
      own_weight_bar = fma(t, half, own_weight_bar);
    });
    weight_bar_ += weight_bar;
    own_weight_bar_ += own_weight_bar;
  }

  // The same where the variance is proportional to that before the dual: what is read of that, and its cotangents, lie
  // beside those of the row, and are in cache.
  void add_outer_before_dual(const RowUnder& row) {
    V weight_bar{}, own_weight_bar{}, slope_bar{};
    const V slope = dual_->slope();
    each_outer(row, [&](int q, auto whose, int p) {
      const V d = sum_across<3>(windows_.d, q - begin_), t = sum_across<3>(windows_.t, q - begin_);
      const V root = dual_->root(whose, p), before = root * root, half = slope * before;
      const V bar = fma(own_weight_, t, weight_ * d);
      V* to = dual_->half_bar(whose) + p;
      *to = fma(slope, bar, *to);
      slope_bar = fma(bar, before, slope_bar);
      weight_bar = fma(d, half, weight_bar);
      own_weight_bar = fma(t, half, own_weight_bar);
    });
    weight_bar_ += weight_bar;
    own_weight_bar_ += own_weight_bar;
    back_.add_coefficient(back_.work.value(input_), 0, slope_bar);
  }

  Back<kWide, T>& back_;
  const Instance& tied_;
  const Value& value_;
  const Instance& input_;
  const Rectangle& r_;  // of the input
  const Plane<T>& out_bar_;
  const bool has_ntk_;
  const bool has_own_;            // the sums over windows add to the tangent kernel
  const bool sums_ntk_;           // cotangents of tangent kernels are read in sums over windows
  V weight_, own_weight_, mean_;  // `own_weight_` is that of deficits, where these are carried: less than 0
  // Of deficits, from the first position on: half the variances before the map, and their cotangents.
  Row1<T> half1_{};
  Row2<T> half2_{};
  V *half_bar1_ = nullptr, *half_bar2_ = nullptr;
  int begin_, end_;                // the positions of a row that windows reach
  const Dual* dual_ = nullptr;     // that is carried back together with the map, and writes sums
  bool takes_three_ = false;       // rows are summed along already, and added up where they are read
  RowsAfter<T> windows_, inside_;  // of a row before the map: from `begin_` on, and inside both images
  std::vector<const V*> rows_{};
  V weight_bar_{}, own_weight_bar_{};
};

}  // namespace NT_LEVEL
}  // namespace nt
