// The way back through a stage: from cotangents of what is after its end to those of what it loads, and of what it
// reads of each sample. Plane by plane: forward again, with the planes of all instances kept, then instance by instance
// in reverse. A cotangent is written as what it belongs to with `bar` behind it.
#pragma once

#include "backward_duals.h"
#include "execute.h"

namespace nt {
namespace NT_LEVEL {

// Where the cotangents of a tile's pairs are added up; lanes are pairs.
template <class T>
struct Bars {
  using V = Vec<T>;
  V* first = nullptr;  // of the records and the inputs of the first samples
  V* second = nullptr;
  V* coefficients = nullptr;
  V* tensors_d = nullptr;  // of all tensors of a plan, one after another
  V* tensors_t = nullptr;
};

// Cotangents of an output: of each pair's covariance and tangent kernel.
template <class T>
struct Seed {
  Vec<T> nngp{}, ntk{};
};

// What a thread needs for the way back, beside the scratch memory of the way forward.
template <class T>
struct BackwardScratch {
  using V = Vec<T>;

  Scratch<T> forward;
  Buffer<V> tensors;               // of cotangents
  Buffer<V> rows_d, rows_t;        // sums of rows
  Buffer<V> windows_d, windows_t;  // a row before a convolution, with what lies beside it
  Buffer<V> coefficients;          // of one plane: a single sum over many planes would add up its rounding errors
  Buffer<V> unused;                // cotangents that nobody reads
  int64_t n_coefficients, n_tensors = 0;

  explicit BackwardScratch(const Context<T>& c)
      : forward(c),
        tensors(2 * size_of_tensors(c)),
        rows_d(c.widest),
        rows_t(c.widest),
        windows_d(c.widest),
        windows_t(c.widest),
        coefficients(c.program.n_coefficients),
        unused(std::max<int64_t>(c.cotangent_size, c.program.n_coefficients)),
        n_coefficients(c.program.n_coefficients),
        n_tensors(size_of_tensors(c)) {}

  void clear_tensors() const { std::fill(tensors.data(), tensors.data() + 2 * n_tensors, V{}); }

 private:
  static int64_t size_of_tensors(const Context<T>& c) {
    int64_t most = 0;
    for (const Plan* plan : c.prepared.plans()) {
      int64_t size = 0;
      for (const Tensor& tensor : plan->tensors) size += tensor.size;
      most = std::max(most, size);
    }
    return most;
  }
};

inline int64_t start_of_tensor(const Plan& plan, int number) {
  int64_t start = 0;
  for (int t = 0; t < number; ++t) start += plan.tensors[t].size;
  return start;
}

// A stage of a tile on the way back.
template <class T>
struct Back {
  using V = Vec<T>;

  Work<T>& work;
  const Bars<T>& bars;
  const BackwardScratch<T>& scratch;
  std::vector<Plane<T>> planes{};  // of cotangents, of every instance

  const Plane<T>& plane(const Instance& instance) const { return planes[&instance - work.stage.instances.data()]; }

  void place_planes() {
    planes = work.planes;
    for (size_t i = 0; i < planes.size(); ++i) {
      const Instance& instance = work.stage.instances[i];
      planes[i].d = work.buffers + instance.cotangent_buffer * work.stage.buffer_size + work.stage.pad_low;
      planes[i].t = instance.has_ntk ? work.tangent(planes[i].d) : nullptr;
    }
  }

  // The cotangents of statistics of the samples, from one position on.
  V* first(Statistic statistic, int value, const Index3& space, const Index3& p) const {
    return bars.first + work.c.prepared.cotangents.find(statistic, value) + position(space, p);
  }
  V* second(Statistic statistic, int value, const Index3& space, const Index3& p) const {
    return bars.second + work.c.prepared.cotangents.find(statistic, value) + position(space, p);
  }
  V* first(Statistic statistic, int value, const Place& at) const {
    return first(statistic, value, at.geometry.space, at.first);
  }
  V* second(Statistic statistic, int value, const Place& at) const {
    return second(statistic, value, at.geometry.space, at.second);
  }

  // Adds to the cotangent of a coefficient of a value.
  void add_coefficient(const Value& value, int k, V bar) const {
    scratch.coefficients.data()[value.coefficient + k] += bar;
  }
};

// Rows of an instance and of its first input, and of their cotangents.
template <class T>
struct BackRows {
  using V = Vec<T>;
  const V *d, *t;          // of the input
  const V *bar_d, *bar_t;  // after the instance
  V *in_d, *in_t;          // cotangents of the input

  BackRows(const Back<T>& back, const Instance& instance, const Place& at, int input = 0) {
    const Instance& from = back.work.input(instance, input);
    const Plane<T>& in = back.work.plane(from);
    const Plane<T>& bar = back.plane(instance);
    const Plane<T>& bar_in = back.plane(from);
    d = in.row_d(at.z, at.y, at.x);
    t = in.row_t(at.z, at.y, at.x);
    bar_d = bar.row_d(at.z, at.y, at.x);
    bar_t = bar.row_t(at.z, at.y, at.x);
    in_d = bar_in.row_d(at.z, at.y, at.x);
    in_t = bar_in.row_t(at.z, at.y, at.x);
  }
};

// ---- instances of one position each

template <class T>
void dual_back(const Back<T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const Value& value = work.value(instance);
  const int before = value.inputs[0];
  const BackRows<T> rows(back, instance, at);
  const auto numbers = dual_rows<true>(work, instance.value, at);
  V* bar1 = back.first(Statistic::kHalfVariance, before, at);
  V* bar2 = back.second(Statistic::kHalfVariance, before, at);
  V coefficients[2] = {};
  const AbReluBack<T> dual(work.coefficients(value));
  dispatch(rows.bar_t != nullptr, !instance.deficit, [&](auto ntk, auto covariance) {
    for (int x = 0; x < at.n; ++x) {
      const V tangent = ntk.value ? rows.t[x] : V{}, tangent_bar = ntk.value ? rows.bar_t[x] : V{};
      const auto in =
          dual.template apply<covariance.value, ntk.value>(rows.d[x], tangent, numbers.template first<true>(x),
                                                           numbers.second(x), rows.bar_d[x], tangent_bar, coefficients);
      rows.in_d[x] += in.deficit;
      if constexpr (ntk.value) rows.in_t[x] += in.tangent;
      bar1[x] += in.half1;
      bar2[x] += in.half2;
    }
  });
  for (int k = 0; k < 2; ++k) back.add_coefficient(value, k, coefficients[k]);
}

template <class T>
void rescale_back(const Back<T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const BackRows<T> rows(back, instance, at);
  const auto scale1 = first<true>(work, Statistic::kScale, instance.value, at);
  const auto scale2 = second(work, Statistic::kScale, instance.value, at);
  V* bar1 = back.first(Statistic::kScale, instance.value, at);
  V* bar2 = back.second(Statistic::kScale, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V a = get<true>(scale1, x), b = get(scale2, x), bar = rows.bar_d[x];
    rows.in_d[x] += bar * a * b;
    V product_bar = bar * rows.d[x];
    if (rows.bar_t) {
      product_bar += rows.bar_t[x] * rows.t[x];
      rows.in_t[x] += rows.bar_t[x] * a * b;
    }
    bar1[x] += product_bar * b;
    bar2[x] += product_bar * a;
  }
  if (!instance.deficit) return;
  const auto half1 = first<true>(work, Statistic::kScaledHalf, instance.value, at);
  const auto half2 = second(work, Statistic::kScaledHalf, instance.value, at);
  V* half_bar1 = back.first(Statistic::kScaledHalf, instance.value, at);
  V* half_bar2 = back.second(Statistic::kScaledHalf, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V of_scale = rows.bar_d[x] * (get<true>(half1, x) - get(half2, x));
    const V of_half = rows.bar_d[x] * (get<true>(scale1, x) - get(scale2, x));
    bar1[x] += of_scale;
    bar2[x] -= of_scale;
    half_bar1[x] += of_half;
    half_bar2[x] -= of_half;
  }
}

template <class T>
void dropout_back(const Back<T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const Value& value = work.value(instance);
  const int before = value.inputs[0];
  const BackRows<T> rows(back, instance, at);
  const V larger = broadcast(1 / work.coefficients(value)[0]), gain = larger - broadcast(T(1));
  V of_larger{};
  const bool deficit = instance.deficit;
  const auto half1 = deficit ? first<true>(work, Statistic::kHalfVariance, before, at) : Row1<T>{};
  const auto half2 = deficit ? second(work, Statistic::kHalfVariance, before, at) : Row2<T>{};
  V* bar1 = deficit ? back.first(Statistic::kHalfVariance, before, at) : nullptr;
  V* bar2 = deficit ? back.second(Statistic::kHalfVariance, before, at) : nullptr;
  for (int x = 0; x < at.n; ++x) {
    const V same = at.first == at.second ? same_samples(work.c, work.tile, x, kSame) : V{};
    const V bar = rows.bar_d[x], factor = if_positive(same, larger, broadcast(T(1)));
    rows.in_d[x] += bar * factor;
    of_larger += same * bar * rows.d[x];
    if (rows.bar_t) {
      rows.in_t[x] += rows.bar_t[x] * factor;
      of_larger += same * rows.bar_t[x] * rows.t[x];
    }
    if (!deficit) continue;
    const V other = bar - same * bar;
    of_larger += other * (get<true>(half1, x) + get(half2, x));
    bar1[x] += other * gain;
    bar2[x] += other * gain;
  }
  back.add_coefficient(value, 0, -of_larger * larger * larger);
}

// The weights of sums are no numbers that could be traced: they have no cotangents.
template <class T>
void sum_back(const Back<T>& back, const Instance& instance, const Place& at) {
  const T* weights = back.work.coefficients(back.work.value(instance));
  for (int k = 0; k < static_cast<int>(instance.inputs.size()); ++k) {
    const BackRows<T> rows(back, instance, at, k);
    const Vec<T> weight = broadcast(weights[k]);
    for (int x = 0; x < at.n; ++x) {
      rows.in_d[x] += weight * rows.bar_d[x];
      if (rows.in_t) rows.in_t[x] += weight * rows.bar_t[x];
    }
  }
}

template <class T>
void as_covariance_back(const Back<T>& back, const Instance& instance, const Place& at) {
  const BackRows<T> rows(back, instance, at);
  Vec<T>* bar1 = back.first(Statistic::kHalfVariance, instance.value, at);
  Vec<T>* bar2 = back.second(Statistic::kHalfVariance, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    rows.in_d[x] -= rows.bar_d[x];
    bar1[x] += rows.bar_d[x];
    bar2[x] += rows.bar_d[x];
    if (rows.in_t) rows.in_t[x] += rows.bar_t[x];
  }
}

template <class T>
void load_inputs_back(const Back<T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  const Work<T>& work = back.work;
  const int channels = work.value(instance).channels;
  const int64_t p1 = position(instance.space, at.first), p2 = position(instance.space, at.second);
  const T* x1 = work.tile.inputs1[instance.value] + p1 * channels * kL;
  const T* x2 = work.tile.inputs2[instance.value] + p2 * channels * kL;
  const int64_t start = work.c.cotangent_start[instance.value];
  V* bar1 = back.bars.first + start + p1 * channels;
  V* bar2 = back.bars.second + start + p2 * channels;
  const V* bar = back.plane(instance).row_d(at.z, at.y, at.x);
  for (int x = 0; x < at.n; ++x) {
    const V scaled = bar[x] * broadcast(T(1) / channels);
    for (int64_t k = int64_t{x} * channels; k < (int64_t{x} + 1) * channels; ++k) {
      const V a = load(x1 + k * kL), b = load(x2 + k * kL);
      if (instance.deficit) {
        const V difference = scaled * (a - b);
        bar1[k] += difference;
        bar2[k] -= difference;
      } else {
        bar1[k] += scaled * b;
        bar2[k] += scaled * a;
      }
    }
  }
}

template <class T>
void load_tensor_back(const Back<T>& back, const Instance& instance, const Place& at) {
  const Plan& plan = back.work.plan;
  const int number = plan.tensor_of[instance.value];
  const int64_t to = start_of_tensor(plan, number) + place_in_tensor(plan.tensors[number], at);
  const Plane<T>& bar = back.plane(instance);
  const Vec<T>* d = bar.row_d(at.z, at.y, at.x);
  const Vec<T>* t = bar.row_t(at.z, at.y, at.x);
  for (int x = 0; x < at.n; ++x) {
    back.bars.tensors_d[to + x] += d[x];
    if (t) back.bars.tensors_t[to + x] += t[x];
  }
}

// ---- convolutions

// Which windows of a plane's axis each position before the convolution is in: from `begin` on, also beside the image.
struct WindowsOf {
  int begin = 0;
  std::vector<std::vector<int>> windows;

  WindowsOf(const Window& w, int low, int n, int space) {
    begin = w.circular ? 0 : low * w.stride - w.low;
    windows.resize(w.circular ? space : (n - 1) * w.stride + w.extent());
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < w.taps; ++k) {
        const int q = (low + i) * w.stride + k * w.dilation - w.low;
        windows[w.circular ? modulo(q, space) : q - begin].push_back(i);
      }
    }
  }
};

// out[q] = the sum over the windows along a row that q is in.
template <class V>
void sum_of_windows(const V* in, V* out, int n, int extended, const Window& w) {
  if (w.taps == 3 && w.stride == 1 && w.dilation == 1) {
    V a{}, b{};
    for (int q = 0; q < n; ++q) {
      const V c = in[q];
      out[q] = (a + b) + c;
      a = b;
      b = c;
    }
    out[n] = a + b;
    out[n + 1] = b;
    return;
  }
  std::fill(out, out + extended, V{});
  for (int k = 0; k < w.taps; ++k) {
    for (int x = 0; x < n; ++x) out[x * w.stride + k * w.dilation] += in[x];
  }
}

// A tied map: its cotangents, summed over the windows that each position is in, go to that position; and where it is
// beside one of the two images, and has a deficit that is half the variance in the other, to that variance.
template <class T>
class TiedBack {
  using V = Vec<T>;

 public:
  TiedBack(const Back<T>& back, const Instance& tied)
      : back_(back),
        tied_(tied),
        value_(back.work.value(tied)),
        input_(back.work.input(tied)),
        in_(back.work.plane(input_)),
        in_bar_(back.plane(input_)),
        out_bar_(back.plane(tied)),
        has_ntk_(out_bar_.t != nullptr),
        has_own_(has_ntk_ && !(tied.deficit && value_.bias_follows_weights)),
        sums_ntk_(has_own_ || in_.t != nullptr) {
    const T* c = back.work.coefficients(value_);
    const T mean = T(1) / window_size<T>(value_);
    weight_ = broadcast(c[0]);
    own_weight_ = broadcast(!tied.deficit ? c[2] : value_.bias_follows_weights ? T(0) : -c[2]);
    mean_ = broadcast(mean);
  }

  void run() {
    const Rectangle& r = out_bar_.r;
    for (int z = 0; z < r.size[0]; ++z) {
      for (int y = 0; y < r.size[1]; ++y) {
        each_part(tied_, r, z, y, [&](const Place& at) { biases(at); });
      }
    }
    const auto along = [&](int a) { return WindowsOf(value_.window[a], r.low[a], r.size[a], input_.space[a]); };
    const WindowsOf z = along(0), y = along(1);
    for (size_t i = 0; i < z.windows.size(); ++i) {
      for (size_t k = 0; k < y.windows.size(); ++k) {
        const int qz = z.begin + static_cast<int>(i), qy = y.begin + static_cast<int>(k);
        if (!z.windows[i].empty() && !y.windows[k].empty()) row(qz, qy, z.windows[i], y.windows[k]);
      }
    }
    back_.add_coefficient(value_, 0, weight_bar_);
    if (has_own_) back_.add_coefficient(value_, 2, tied_.deficit ? -own_weight_bar_ : own_weight_bar_);
  }

 private:
  // What is added to each position after the windows.
  void biases(const Place& at) {
    const V* d = out_bar_.row_d(at.z, at.y, at.x);
    const V* t = out_bar_.row_t(at.z, at.y, at.x);
    V bias{}, own_bias{}, own_weight{};
    if (!tied_.deficit) {
      for (int x = 0; x < at.n; ++x) bias += d[x];
      back_.add_coefficient(value_, 1, bias);
    }
    if (!t) return;
    if (tied_.deficit && value_.bias_follows_weights) return own_covariance(at);
    for (int x = 0; x < at.n; ++x) own_bias += t[x];
    back_.add_coefficient(value_, 3, own_bias);
    if (!tied_.deficit) return;
    const auto half1 = first<true>(back_.work, Statistic::kHalfAverage, tied_.value, at);
    const auto half2 = second(back_.work, Statistic::kHalfAverage, tied_.value, at);
    V* bar1 = back_.first(Statistic::kHalfAverage, tied_.value, at);
    V* bar2 = back_.second(Statistic::kHalfAverage, tied_.value, at);
    for (int x = 0; x < at.n; ++x) {
      own_weight += t[x] * (get<true>(half1, x) + get(half2, x));
      const V bar = -own_weight_ * t[x];
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

  // The row (qz, qy) before the convolution, from the rows of the windows that it is in.
  void row(int qz, int qy, const std::vector<int>& windows_z, const std::vector<int>& windows_y) {
    const Index3& space = input_.space;
    const bool inside1 = is_inside(qz, space[0]) && is_inside(qy, space[1]);
    const bool inside2 = is_inside(in_.r.partner(0, qz), space[0]) && is_inside(in_.r.partner(1, qy), space[1]);
    const int z = qz - in_.r.low[0], y = qy - in_.r.low[1];
    const bool both = is_inside(z, in_.r.size[0]) && is_inside(y, in_.r.size[1]);
    if (!both && (!tied_.deficit || (!inside1 && !inside2))) return;
    sum_rows(windows_z, windows_y);
    const Window& w = value_.window[2];
    const int begin = out_bar_.r.low[2] * w.stride - w.low, n = (out_bar_.r.size[2] - 1) * w.stride + w.extent();
    if (w.circular) {
      if (both) {
        for (int q = begin; q < begin + n; ++q) inner(z, y, modulo(q, space[2]), q - begin, 1);
      } else {
        for (int q = begin; q < begin + n; ++q) outer(qz, qy, modulo(q, space[2]), q - begin, inside1, inside2);
      }
      return;
    }
    const int inner_begin = both ? std::max(begin, in_.r.low[2]) : begin + n;
    const int inner_end = both ? std::min(begin + n, in_.r.low[2] + in_.r.size[2]) : begin + n;
    if (inner_end > inner_begin) inner(z, y, inner_begin - in_.r.low[2], inner_begin - begin, inner_end - inner_begin);
    if (!tied_.deficit) return;
    for (int q = begin; q < std::min(inner_begin, begin + n); ++q) outer(qz, qy, q, q - begin, inside1, inside2);
    for (int q = std::max(inner_end, begin); q < begin + n; ++q) outer(qz, qy, q, q - begin, inside1, inside2);
  }

  // Sums of cotangents over the windows, divided by their size, in scratch.windows_d and scratch.windows_t.
  void sum_rows(const std::vector<int>& windows_z, const std::vector<int>& windows_y) {
    const Window& w = value_.window[2];
    const int n = out_bar_.r.size[2], extended = (n - 1) * w.stride + w.extent();
    const auto sum = [&](const auto& row_of, V* rows, V* windows) {
      bool first = true;
      for (int z : windows_z) {
        for (int y : windows_y) {
          const V* row = row_of(z, y);
          for (int x = 0; x < n; ++x) rows[x] = first ? row[x] * mean_ : fma(row[x], mean_, rows[x]);
          first = false;
        }
      }
      sum_of_windows(rows, windows, n, extended, w);
    };
    const BackwardScratch<T>& s = back_.scratch;
    sum([&](int z, int y) { return out_bar_.row_d(z, y); }, s.rows_d.data(), s.windows_d.data());
    if (sums_ntk_) sum([&](int z, int y) { return out_bar_.row_t(z, y); }, s.rows_t.data(), s.windows_t.data());
  }

  // Positions inside both images.
  void inner(int z, int y, int x, int from, int n) {
    const V* windows_d = back_.scratch.windows_d.data() + from;
    const V* windows_t = back_.scratch.windows_t.data() + from;
    const V* d = in_.row_d(z, y, x);
    const V* t = in_.row_t(z, y, x);
    V* bar_d = in_bar_.row_d(z, y, x);
    V* bar_t = in_bar_.row_t(z, y, x);
    V weight_bar{}, own_weight_bar{};
    for (int k = 0; k < n; ++k) {
      V bar = weight_ * windows_d[k];
      weight_bar = fma(windows_d[k], d[k], weight_bar);
      if (has_own_) {
        bar = fma(own_weight_, windows_t[k], bar);
        own_weight_bar = fma(windows_t[k], d[k], own_weight_bar);
      }
      bar_d[k] += bar;
    }
    if (t) {
      for (int k = 0; k < n; ++k) {
        bar_t[k] = fma(weight_, windows_t[k], bar_t[k]);
        weight_bar = fma(windows_t[k], t[k], weight_bar);
      }
    }
    weight_bar_ += weight_bar;
    own_weight_bar_ += own_weight_bar;
  }

  // A position inside one image only.
  void outer(int qz, int qy, int qx, int at, bool inside1, bool inside2) {
    const Index3& space = input_.space;
    const Rectangle& r = in_.r;
    const Index3 p{qz, qy, qx}, partner{r.partner(0, qz), r.partner(1, qy), r.partner(2, qx)};
    const bool first_there = inside1 && is_inside(qx, space[2]);
    const bool second_there = inside2 && is_inside(partner[2], space[2]);
    if (first_there == second_there) return;
    const V d = back_.scratch.windows_d.data()[at], t = has_own_ ? back_.scratch.windows_t.data()[at] : V{};
    const Statistic half = Statistic::kHalfVariance;
    const V deficit = first_there ? get<true>(first<true>(back_.work, half, input_.value, space, p), 0)
                                  : get(second(back_.work, half, input_.value, space, partner), 0);
    V* bar = first_there ? back_.first(half, input_.value, space, p) : back_.second(half, input_.value, space, partner);
    *bar += fma(own_weight_, t, weight_ * d);
    weight_bar_ = fma(d, deficit, weight_bar_);
    own_weight_bar_ = fma(t, deficit, own_weight_bar_);
  }

  const Back<T>& back_;
  const Instance& tied_;
  const Value& value_;
  const Instance& input_;
  const Plane<T>& in_;
  const Plane<T>& in_bar_;
  const Plane<T>& out_bar_;
  const bool has_ntk_;
  const bool has_own_;            // the sums over windows add to the tangent kernel
  const bool sums_ntk_;           // cotangents of tangent kernels are read in sums over windows
  V weight_, own_weight_, mean_;  // `own_weight_` is that of deficits, where these are carried: less than 0
  V weight_bar_{}, own_weight_bar_{};
};

// ---- the end of a stage

// Cotangents of a row before a pool, from those of the windows that it is in.
template <class T>
void pool_row_back(const Back<T>& back, const Tensor& tensor, const Vec<T>* bars, const Rectangle& plane, int row_z,
                   int row_y, Vec<T>* row) {
  const Work<T>& work = back.work;
  const int z = plane.low[0] + row_z, y = plane.low[1] + row_y, low = plane.low[2];
  for (const Link& lx : work.links[2]) {
    Vec<T> bar{};
    for (const Link& lz : work.links[0]) {
      if (!lz.holds(z)) continue;
      for (const Link& ly : work.links[1]) {
        if (!ly.holds(y)) continue;
        const int64_t entry = tensor.entry({lz.delta, ly.delta, lx.delta}, {lz.window, ly.window, lx.window});
        if (entry >= 0) bar += bars[entry];
      }
    }
    for (int x = lx.begin; x < lx.end; x += lx.step) row[x - low] += bar;
  }
}

// Cotangents of a row that is copied.
template <class T>
void copy_row_back(const Back<T>& back, const Tensor& tensor, const Vec<T>* bars, const Rectangle& plane, int row_z,
                   int row_y, Vec<T>* row) {
  each_copy(back.work, tensor, plane, row_z, row_y, [&](int x, int64_t entry) { row[x] += bars[entry]; });
}

template <class T>
void end_row_back(const Back<T>& back, const Seed<T>& seed, const Rectangle& r, int z, int y) {
  const Work<T>& work = back.work;
  const Plane<T>& root = back.plane(work.stage.instances[work.stage.root]);
  Vec<T>* d = root.row_d(z, y);
  Vec<T>* t = root.row_t(z, y);
  if (work.stage.output >= 0) {  // of one position
    *d += seed.nngp;
    if (t) *t += seed.ntk;
    return;
  }
  const int number = work.plan.tensor_of[work.stage.end];
  const Tensor& tensor = work.plan.tensors[number];
  const int64_t start = start_of_tensor(work.plan, number);
  const Op op = work.c.program.values[work.stage.end].op;
  const auto add = [&](const Vec<T>* bars, Vec<T>* row) {
    if (op == Op::kFlatten) {
      for (int x = 0; x < r.size[2]; ++x) row[x] += bars[0];
    } else if (op == Op::kPool) {
      pool_row_back(back, tensor, bars, r, z, y, row);
    } else {
      copy_row_back(back, tensor, bars, r, z, y, row);
    }
  };
  add(back.bars.tensors_d + start, d);
  if (t) add(back.bars.tensors_t + start, t);
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

template <class T>
void instance_back(const Back<T>& back, const Instance& instance) {
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
      return TiedBack<T>(back, instance).run();
    case Kind::kDual:
      return each_row(dual_back<T>);
    case Kind::kRescale:
      return each_row(rescale_back<T>);
    case Kind::kDropout:
      return each_row(dropout_back<T>);
    case Kind::kSum:
      return each_row(sum_back<T>);
    case Kind::kAsCovariance:
      return each_row(as_covariance_back<T>);
    case Kind::kLoad:
      return each_row(back.work.value(instance).op == Op::kInputs ? load_inputs_back<T> : load_tensor_back<T>);
    case Kind::kProduct:
      return;  // refused, see `prepare`
  }
}

template <class T, class End>
void plane_back(Work<T>& work, const BackwardScratch<T>& scratch, const Seed<T>& seed, const Bars<T>& bars,
                const End& end) {
  using V = Vec<T>;
  execute_plane<true>(work, end);
  Back<T> back{work, bars, scratch};
  back.place_planes();
  std::vector<char> cleared(work.stage.instances.size(), false);
  const auto clear = [&](int instance) {
    if (cleared[instance]) return;
    cleared[instance] = true;
    const Plane<T>& plane = back.planes[instance];
    const int64_t size = int64_t{plane.r.size[0]} * plane.r.size[1] * plane.stride - (plane.stride - plane.r.size[2]);
    std::fill(plane.d, plane.d + size, V{});
    if (plane.t) std::fill(plane.t, plane.t + size, V{});
  };
  std::fill(scratch.coefficients.data(), scratch.coefficients.data() + scratch.n_coefficients, V{});
  clear(work.stage.root);
  const Rectangle& r = back.planes[work.stage.root].r;
  for (int z = 0; z < r.size[0]; ++z) {
    for (int y = 0; y < r.size[1]; ++y) end_row_back(back, seed, r, z, y);
  }
  for (int i = static_cast<int>(work.stage.instances.size()) - 1; i >= 0; --i) {
    for (int input : work.stage.instances[i].inputs) clear(input);
    instance_back(back, work.stage.instances[i]);
  }
  for (int64_t k = 0; k < scratch.n_coefficients; ++k) bars.coefficients[k] += scratch.coefficients.data()[k];
}

// Carries the cotangents of what is after a stage back to what it loads. With `fills`, what is after the stage is
// computed by the way.
template <class T>
void stage_back(const Context<T>& c, const Plan& plan, const Stage& stage, const Tile<T>& tile,
                BackwardScratch<T>& scratch, const Seed<T>& seed, const Bars<T>& bars, bool fills = false) {
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
    if (fills) {
      plane_back(work, scratch, seed, bars, [&](const Rectangle& r, int z, int y) { end_row(work, r, z, y); });
      sums.add_plane(k);
    } else {
      plane_back(work, scratch, seed, bars, [](const Rectangle&, int, int) {});
    }
  }
  if (fills) sums.finish();
}

}  // namespace NT_LEVEL
}  // namespace nt
