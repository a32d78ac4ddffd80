// The way back through a stage: from cotangents of what is after its end to those of what it loads, and of what it
// reads of each sample. Plane by plane: forward again, with the planes that the way back reads kept, then instance by
// instance in reverse. A cotangent is written as what it belongs to with `bar` behind it.
#pragma once

#include "backward_duals.h"
#include "execute.h"

namespace nt {
namespace NT_LEVEL {

// Where the cotangents of a tile's pairs are added up; lanes are pairs. Of rows over first samples each has its own.
template <class T>
struct Bars {
  using V = Vec<T>;
  V* first = nullptr;  // of the records and the inputs of the first samples
  V* second = nullptr;
  V* coefficients = nullptr;
  V* pairs = nullptr;      // of the sources that are materialised, each with those of its tangent kernel behind it
  V* tensors_d = nullptr;  // of all tensors of a plan, one after another
  V* tensors_t = nullptr;
};

// Cotangents of an output: of each pair's covariance and tangent kernel. There is one for each row over first samples.
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
  Buffer<V> inside_d, inside_t;    // and those of its positions that are inside both images
  Buffer<V> coefficients;          // of one plane: a single sum over many planes would add up its rounding errors
  Buffer<V> pairs;                 // see `Bars`
  Buffer<V> unused;                // cotangents that nobody reads
  int64_t n_coefficients, n_tensors = 0;

  explicit BackwardScratch(const Context<T>& c)
      : forward(c),
        tensors(2 * size_of_tensors(c)),
        rows_d(c.widest),
        rows_t(c.widest),
        windows_d(c.widest),
        windows_t(c.widest),
        inside_d(c.widest),
        inside_t(c.widest),
        coefficients(c.program.n_cotangents()),
        pairs(size_of_pairs(c)),
        unused(std::max({c.cotangent_size * c.rows, c.program.n_cotangents(), size_of_pairs(c)})),
        n_coefficients(c.program.n_cotangents()),
        n_tensors(size_of_tensors(c)) {}

  void clear_tensors() const { std::fill(tensors.data(), tensors.data() + 2 * n_tensors, V{}); }

 private:
  static int64_t size_of_pairs(const Context<T>& c) { return int64_t{2} * c.program.n_sources * c.rows; }

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
  std::vector<char> is_written{};  // whether there are any yet

  const Plane<T>& plane(const Instance& instance) const { return planes[&instance - work.stage.instances.data()]; }

  void place_planes() {
    planes = work.planes;
    is_written.assign(planes.size(), false);
    for (size_t i = 0; i < planes.size(); ++i) {
      const Instance& instance = work.stage.instances[i];
      if (instance.cotangent_buffer < 0) continue;
      planes[i].d =
          work.buffers + instance.cotangent_buffer * work.stage.buffer_size * work.c.rows + work.stage.pad_low;
      planes[i].t = instance.has_ntk ? work.tangent(planes[i].d) : nullptr;
    }
  }

  // Makes the cotangents of an instance zero, unless there are some.
  void clear(int instance) {
    if (is_written[instance]) return;
    is_written[instance] = true;
    const Plane<T>& plane = planes[instance];
    const int64_t size = int64_t{plane.r.size[0]} * plane.r.size[1] * plane.stride - (plane.stride - plane.r.size[2]);
    std::fill(plane.d, plane.d + size, V{});
    if (plane.t) std::fill(plane.t, plane.t + size, V{});
  }

  // The cotangents of statistics of the samples, from one position on.
  V* first(Statistic statistic, int value, const Index3& space, const Index3& p) const {
    return bars.first + work.c.prepared.cotangents.find(statistic, value) * work.tile.rows + position(space, p);
  }
  V* second(Statistic statistic, int value, const Index3& space, const Index3& p) const {
    return bars.second + work.c.prepared.cotangents.find(statistic, value) * work.tile.rows + position(space, p);
  }
  V* first(Statistic statistic, int value, const Place& at) const {
    return first(statistic, value, at.geometry.space, at.first);
  }
  V* second(Statistic statistic, int value, const Place& at) const {
    return second(statistic, value, at.geometry.space, at.second);
  }

  // Adds to the cotangent of a coefficient of a value.
  void add_coefficient(const Value& value, int k, V bar) const {
    scratch.coefficients.data()[value.cotangent + k] += bar;
  }
};

// Whether the tangent kernel after an instance is the sum of another one and of the covariance there.
template <class T>
bool has_own_covariance(const Work<T>& work, const Instance& instance) {
  return instance.kind == Kind::kTied && instance.has_ntk && instance.deficit &&
         work.value(instance).bias_follows_weights;
}

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

// The way back through a dual, row by row: to the cotangents of what is before it.
template <class T>
class DualBack {
  using V = Vec<T>;

 public:
  // `is_first`: nothing was added to the cotangents before the dual yet.
  DualBack(const Back<T>& back, const Instance& instance, bool is_first)
      : back_(back),
        instance_(instance),
        value_(back.work.value(instance)),
        before_(back.work.input(instance)),
        is_first_(is_first) {
    own_share_ = broadcast(has_own_covariance(back.work, before_) && before_.feeds_dual_alone ? T(1) : T(0));
  }

  // Sums of products of cotangents of a row and what they are of.
  struct Products {
    V d{}, t{};  // of what is added up of the row, and of what is added to tangent kernels of its deficits
  };

  // With rows `d` and `t` of numbers whose products with `weight`, and of `t` with `own_weight`, are the cotangents of
  // what is after the dual.
  Products row(const Place& at, const V* d, const V* t, V weight, V own_weight) {
    Products products;
    const T* numbers = back_.work.coefficients(value_);
    with_dual_back<T>(value_.activation, numbers, value_.table, [&](const auto& dual) {
      dispatch(instance_.has_ntk, !instance_.deficit, [&](auto ntk, auto covariance) {
        products = this->template row<ntk.value, covariance.value>(dual, at, d, t, weight, own_weight);
      });
    });
    return products;
  }

 private:
  template <bool kNtk, bool kCovariance, class Dual>
  Products row(const Dual& shared, const Place& at, const V* after_d, const V* after_t, V weight, V own_weight) {
    const Plane<T>& in = back_.work.plane(before_);
    const Plane<T>& in_bar = back_.plane(before_);
    const V* d = in.row_d(at.z, at.y, at.x);
    const V* t = in.row_t(at.z, at.y, at.x);
    V* bar_d = is_first_ ? in_bar.row_d(at.z, at.y, at.x) : back_.scratch.rows_d.data();
    V* bar_t = is_first_ ? in_bar.row_t(at.z, at.y, at.x) : back_.scratch.rows_t.data();
    V* bar1 = back_.first(Statistic::kHalfVariance, value_.inputs[0], at);
    V* bar2 = back_.second(Statistic::kHalfVariance, value_.inputs[0], at);
    const auto numbers = dual_rows<true>(back_.work, instance_.value, at);
    const Dual dual = shared;
    const V own_share = own_share_;
    const int width = at.geometry.space[2];  // cotangents are asked for one row ahead
    CoefficientBars<T, Dual> coefficients{};
    Products products;
    for (int x = 0; x < at.n; ++x) {
      __builtin_prefetch(bar1 + x + width, 1);
      __builtin_prefetch(bar2 + x + width, 1);
      const V value_bar = fma(own_weight, after_t[x], weight * after_d[x]);
      const V tangent_bar = kNtk ? weight * after_t[x] : V{}, tangent = kNtk ? t[x] : V{};
      auto in = dual.template apply<kCovariance, kNtk>(d[x], tangent, numbers.template first<true>(x),
                                                       numbers.second(x), value_bar, tangent_bar, coefficients.data());
      products.d = fma(after_d[x], in.value, products.d);
      products.t = fma(after_t[x], in.value, products.t);
      if constexpr (kNtk) {
        products.d = fma(after_t[x], in.tangent_after, products.d);
        const V own = own_share * in.tangent;
        in.deficit -= own;
        in.half1 += own;
        in.half2 += own;
        bar_t[x] = in.tangent;
      }
      bar_d[x] = in.deficit;
      bar1[x] += in.half1;
      bar2[x] += in.half2;
    }
    if (!is_first_) {
      add(bar_d, at.n, in_bar.row_d(at.z, at.y, at.x));
      if (kNtk) add(bar_t, at.n, in_bar.row_t(at.z, at.y, at.x));
    }
    for (int k = 0; k < Dual::kCoefficients; ++k) back_.add_coefficient(value_, k, coefficients[k]);
    return products;
  }

  static void add(const V* row, int n, V* to) {
    for (int x = 0; x < n; ++x) to[x] += row[x];
  }

  const Back<T>& back_;
  const Instance& instance_;
  const Value& value_;
  const Instance& before_;
  const bool is_first_;
  V own_share_;  // 1 if tangent kernels before it got the covariance there, else 0
};

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

// A product, branch by branch. With k and t the covariance and the tangent kernel of the product of all others:
//   K' = K k,   T' = T k + K t,   and half the variance after is that of the branch times the variance of the others.
template <class T>
class ProductBack {
  using V = Vec<T>;

 public:
  ProductBack(const Back<T>& back, const Instance& instance, const Place& at)
      : back_(back),
        instance_(instance),
        at_(at),
        inputs_(back.work.value(instance).inputs),
        scratch_(back.work.scratch) {
    gather_branches(back.work, instance, at);
  }

  void run() const {
    for (int branch = 0; branch < static_cast<int>(inputs_.size()); ++branch) {
      if (instance_.deficit) {
        of_deficits(branch);
      } else {
        of_covariances(branch);
      }
    }
  }

 private:
  struct Others {
    V covariance = broadcast(T(1)), tangent{}, var1 = broadcast(T(1)), var2 = broadcast(T(1));
  };

  Others others(int branch, int x) const {
    Others product;
    for (int k = 0; k < static_cast<int>(inputs_.size()); ++k) {
      if (k == branch) continue;
      V covariance = scratch_.branches_d[k][x];
      if (instance_.deficit) {
        const V half1 = get<true>(first<true>(back_.work, Statistic::kHalfVariance, inputs_[k], at_), x);
        const V half2 = get(second(back_.work, Statistic::kHalfVariance, inputs_[k], at_), x);
        covariance = half1 + half2 - covariance;
        product.var1 *= half1 + half1;
        product.var2 *= half2 + half2;
      }
      const V* tangents = scratch_.branches_t[k];
      product.tangent *= covariance;
      if (tangents) product.tangent = fma(tangents[x], product.covariance, product.tangent);
      product.covariance *= covariance;
    }
    return product;
  }

  void of_deficits(int branch) const {
    const BackRows<T> rows(back_, instance_, at_, branch);
    V* bar1 = back_.first(Statistic::kHalfVariance, inputs_[branch], at_);
    V* bar2 = back_.second(Statistic::kHalfVariance, inputs_[branch], at_);
    for (int x = 0; x < at_.n; ++x) {
      const Others other = others(branch, x);
      const V covariance_bar = tangent_back(rows, other, x) - rows.bar_d[x] * other.covariance;
      rows.in_d[x] -= covariance_bar;
      bar1[x] += fma(rows.bar_d[x], other.var1, covariance_bar);
      bar2[x] += fma(rows.bar_d[x], other.var2, covariance_bar);
    }
  }

  void of_covariances(int branch) const {
    const BackRows<T> rows(back_, instance_, at_, branch);
    for (int x = 0; x < at_.n; ++x) {
      const Others other = others(branch, x);
      rows.in_d[x] += fma(rows.bar_d[x], other.covariance, tangent_back(rows, other, x));
    }
  }

  // From the cotangent of a tangent kernel to that of the branch's; returns what its covariance has of it.
  static V tangent_back(const BackRows<T>& rows, const Others& other, int x) {
    if (!rows.bar_t) return V{};
    if (rows.in_t) rows.in_t[x] += rows.bar_t[x] * other.covariance;
    return rows.bar_t[x] * other.tangent;
  }

  const Back<T>& back_;
  const Instance& instance_;
  const Place& at_;
  const std::vector<int>& inputs_;
  const Scratch<T>& scratch_;
};

template <class T>
void product_back(const Back<T>& back, const Instance& instance, const Place& at) {
  ProductBack<T>(back, instance, at).run();
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
void load_materialised_back(const Back<T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const Value& value = work.value(instance);
  const Plane<T>& bar = back.plane(instance);
  const V* d = bar.row_d(at.z, at.y, at.x);
  const V* t = bar.row_t(at.z, at.y, at.x);
  V* pair_d = back.bars.pairs + int64_t{2} * instance.value * work.tile.rows;
  V* pair_t = pair_d + work.tile.rows;
  V* bar1 = instance.deficit ? back.first(Statistic::kHalfVariance, instance.value, at) : nullptr;
  V* bar2 = instance.deficit ? back.second(Statistic::kHalfVariance, instance.value, at) : nullptr;
  for (int x = 0; x < at.n; ++x) {
    if (t) pair_t[x] += t[x];
    // The deficits of equal samples are 0, whatever is stored.
    const V own = instance.deficit ? if_positive(same_samples(work.c, work.tile, x, kIdentical), V{}, d[x]) : d[x];
    if (!instance.deficit || value.has_deficits) {
      pair_d[x] += own;
      continue;
    }
    pair_d[x] -= own;
    bar1[x] += own;
    bar2[x] += own;
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
void sum_of_windows(const std::vector<const V*>& rows, V mean, V* sums, V* out, int n, const Window& w) {
  const auto sum = [&](int x) {
    V total{};
    for (const V* row : rows) total += row[x];
    return total * mean;
  };
  const auto sum_of_three = [&](const auto& at) {
    V a{}, b{};
    for (int q = 0; q < n; ++q) {
      const V c = at(q);
      out[q] = (a + b) + c;
      a = b;
      b = c;
    }
    out[n] = a + b;
    out[n + 1] = b;
  };
  if (w.taps == 3 && w.stride == 1 && w.dilation == 1) {
    if (rows.size() != 3) return sum_of_three(sum);
    const V *row0 = rows[0], *row1 = rows[1], *row2 = rows[2];
    return sum_of_three([&](int x) { return ((row0[x] + row1[x]) + row2[x]) * mean; });
  }
  for (int x = 0; x < n; ++x) sums[x] = sum(x);
  std::fill(out, out + (n - 1) * w.stride + w.extent(), V{});
  for (int k = 0; k < w.taps; ++k) {
    for (int x = 0; x < n; ++x) out[x * w.stride + k * w.dilation] += sums[x];
  }
}

// The same where positions are counted modulo the size of the image.
template <class V>
void sum_of_circular_windows(const std::vector<const V*>& rows, V mean, V* out, int n, int size, const Window& w) {
  std::fill(out, out + size, V{});
  for (int x = 0; x < n; ++x) {
    V total{};
    for (const V* row : rows) total += row[x];
    for (int k = 0; k < w.taps; ++k) out[modulo(x * w.stride + k * w.dilation - w.low, size)] += total * mean;
  }
}

// A tied map: its cotangents, summed over the windows that each position is in, go to that position, and through the
// dual before it if nothing else reads that; where a position is beside one of the two images, and has a deficit that
// is half the variance in the other, to that variance.
template <class T>
class TiedBack {
  using V = Vec<T>;

 public:
  TiedBack(Back<T>& back, const Instance& tied)
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
    const T mean = T(1) / window_size<T>(value_);
    weight_ = broadcast(c[0]);
    own_weight_ = broadcast(!has_own_ ? T(0) : tied.deficit ? -c[2] : c[2]);
    mean_ = broadcast(mean);
    const Window& w = value_.window[2];
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
      DualBack<T> dual(back_, input_, !back_.is_written[before]);
      back_.is_written[before] = true;
      each_row([&](int z, int y) {
        each_part(input_, r_, z, y, [&](const Place& at) {
          add(dual.row(at, inside_d_ + at.x, inside_t_ + at.x, weight_, own_weight_));
        });
      });
    } else {
      each_row([&](int z, int y) { inner(z, y); });
    }
    back_.add_coefficient(value_, 0, weight_bar_);
    if (has_own_) back_.add_coefficient(value_, 2, tied_.deficit ? -own_weight_bar_ : own_weight_bar_);
  }

 private:
  using Products = typename DualBack<T>::Products;

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

  // Calls visit(z, y) for the rows before the map, when `inside_d_` and `inside_t_` are sums of cotangents over the
  // windows that their positions are in.
  template <class Visit>
  void each_row(const Visit& visit) {
    if (back_.work.c.one_position) {  // windows of one position: no sums
      inside_d_ = out_bar_.d;
      inside_t_ = sums_ntk_ ? out_bar_.t : back_.scratch.forward.zeros.data();
      return visit(0, 0);
    }
    const Rectangle& r = out_bar_.r;
    const auto along = [&](int a) {
      return WindowsOf(value_.window[a], r.low[a], r.size[a], input_.space[a], r_.low[a], r_.size[a]);
    };
    const WindowsOf z = along(0), y = along(1);
    for (int qz = z.begin(); qz < z.end(); ++qz) {
      for (int qy = y.begin(); qy < y.end(); ++qy) {
        if (qy + 1 < y.end()) prefetch(row_at(qz, qy + 1));
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
    sum_rows(windows_z, windows_y, out_bar_.d, s.rows_d.data(), s.windows_d.data());
    if (sums_ntk_) sum_rows(windows_z, windows_y, out_bar_.t, s.rows_t.data(), s.windows_t.data());
    if (row.inside_plane) {
      inside_d_ = inside(s.windows_d.data(), s.inside_d.data());
      inside_t_ = sums_ntk_ ? inside(s.windows_t.data(), s.inside_t.data()) : s.forward.zeros.data();
      visit(row.z - r_.low[0], row.y - r_.low[1]);
    }
    each_outer(row, [&](const auto&... at) { outer(at...); });
  }

  // Sums of cotangents over the windows, divided by their size.
  void sum_rows(WindowsOf::Few windows_z, WindowsOf::Few windows_y, const V* plane, V* sums, V* windows) {
    rows_.clear();
    for (int z : windows_z) {
      for (int y : windows_y) rows_.push_back(plane + (int64_t{z} * out_bar_.r.size[1] + y) * out_bar_.stride);
    }
    const Window& w = value_.window[2];
    if (w.circular) {
      sum_of_circular_windows(rows_, mean_, windows, out_bar_.r.size[2], input_.space[2], w);
    } else {
      sum_of_windows(rows_, mean_, sums, windows, out_bar_.r.size[2], w);
    }
  }

  // The part of a row inside both images, zero where no window is.
  const V* inside(const V* windows, V* copy) const {
    const int low = r_.low[2], high = low + r_.size[2];
    if (begin_ <= low && high <= end_) return windows + (low - begin_);
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
    Products products;
    for (int x = 0; x < r_.size[2]; ++x) {
      bar_d[x] += fma(own_weight_, inside_t_[x], weight_ * inside_d_[x]);
      products.d = fma(inside_d_[x], d[x], products.d);
      products.t = fma(inside_t_[x], d[x], products.t);
    }
    for (int x = 0; t && x < r_.size[2]; ++x) {
      bar_t[x] = fma(weight_, inside_t_[x], bar_t[x]);
      products.d = fma(inside_t_[x], t[x], products.d);
    }
    add(products);
  }

  // Visits the positions of a row that are inside one image only: visit(q, half variance, its cotangent).
  template <class Visit>
  void each_outer(const RowUnder& row, const Visit& visit) const {
    if (!tied_.deficit || row.is_outside()) return;
    const Index3& space = input_.space;
    const Index3 p{row.z, row.y, 0}, partner{r_.partner(0, row.z), r_.partner(1, row.y), 0};
    const Statistic half = Statistic::kHalfVariance;
    const T* half1 = first<true>(back_.work, half, input_.value, space, p).at;
    const T* half2 = second(back_.work, half, input_.value, space, partner).at;
    V* bar1 = back_.first(half, input_.value, space, p);
    V* bar2 = back_.second(half, input_.value, space, partner);
    row.each_part_beside(begin_, end_, [&](int from, int to) {
      for (int q = from; q < to; ++q) {
        const int other = r_.partner(2, q);
        const bool first_there = row.inside1 && is_inside(q, space[2]);
        const bool second_there = row.inside2 && is_inside(other, space[2]);
        if (first_there && !second_there) visit(q, half1 + int64_t{q} * kLanes<T>, bar1 + q);
        if (second_there && !first_there) visit(q, half2 + int64_t{other} * kLanes<T>, bar2 + other);
      }
    });
  }

  void prefetch(const RowUnder& row) const {
    each_outer(row, [](int, const T* half, const V* bar) {
      __builtin_prefetch(half);
      __builtin_prefetch(bar, 1);
    });
  }

  void outer(int q, const T* half, V* bar) {
    const V d = back_.scratch.windows_d.data()[q - begin_];
    const V t = sums_ntk_ ? back_.scratch.windows_t.data()[q - begin_] : V{};
    *bar += fma(own_weight_, t, weight_ * d);
    weight_bar_ = fma(d, load(half), weight_bar_);
    own_weight_bar_ = fma(t, load(half), own_weight_bar_);
  }

  Back<T>& back_;
  const Instance& tied_;
  const Value& value_;
  const Instance& input_;
  const Rectangle& r_;  // of the input
  const Plane<T>& out_bar_;
  const bool has_ntk_;
  const bool has_own_;            // the sums over windows add to the tangent kernel
  const bool sums_ntk_;           // cotangents of tangent kernels are read in sums over windows
  V weight_, own_weight_, mean_;  // `own_weight_` is that of deficits, where these are carried: less than 0
  int begin_, end_;               // the positions of a row that windows reach
  const V *inside_d_ = nullptr, *inside_t_ = nullptr;
  std::vector<const V*> rows_{};
  V weight_bar_{}, own_weight_bar_{};
};

// ---- the end of a stage

// Adds to a row before a pool the cotangents of the windows that it is in, see `pool_row`.
template <class T>
void pool_row_back(const Back<T>& back, const Tensor& tensor, const Vec<T>* bars_d, const Vec<T>* bars_t,
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

template <class T>
void end_row_back(const Back<T>& back, const Seed<T>* seeds, const Rectangle& r, int z, int y) {
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

template <class T>
void dual_back(Back<T>& back, const Instance& instance) {
  const int before = instance.inputs[0];
  DualBack<T> dual(back, instance, !back.is_written[before]);
  back.is_written[before] = true;
  const Plane<T>& bar = back.plane(instance);
  const Vec<T> zero{}, one = broadcast(T(1));
  for (int z = 0; z < bar.r.size[0]; ++z) {
    for (int y = 0; y < bar.r.size[1]; ++y) {
      const Vec<T>* t = bar.t ? bar.row_t(z, y) : back.scratch.forward.zeros.data();
      each_part(instance, bar.r, z, y,
                [&](const Place& at) { dual.row(at, bar.row_d(z, y, at.x), t + at.x, one, zero); });
    }
  }
}

template <class T>
void instance_back(Back<T>& back, const Instance& instance) {
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
      return dual_back(back, instance);
    case Kind::kRescale:
      return each_row(rescale_back<T>);
    case Kind::kDropout:
      return each_row(dropout_back<T>);
    case Kind::kSum:
      return each_row(sum_back<T>);
    case Kind::kProduct:
      return each_row(product_back<T>);
    case Kind::kAsCovariance:
      return each_row(as_covariance_back<T>);
    case Kind::kLoad:
      switch (back.work.value(instance).op) {
        case Op::kInputs:
          return each_row(load_inputs_back<T>);
        case Op::kMaterialised:
          return each_row(load_materialised_back<T>);
        default:
          return each_row(load_tensor_back<T>);
      }
  }
}

template <class T, class End>
void plane_back(Work<T>& work, const BackwardScratch<T>& scratch, const Seed<T>* seeds, const Bars<T>& bars,
                const End& end) {
  using V = Vec<T>;
  Work<T>* const works[] = {&work};
  execute_planes<true>(works, 1, end);
  Back<T> back{work, bars, scratch};
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
template <class T>
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
    if (fills) {
      plane_back(work, scratch, seeds, bars, [](Work<T>& w, const Rectangle& r, int z, int y) { end_row(w, r, z, y); });
      sums.add_planes(k + 1);
    } else {
      plane_back(work, scratch, seeds, bars, [](Work<T>&, const Rectangle&, int, int) {});
    }
  }
  if (fills) sums.finish();
}

}  // namespace NT_LEVEL
}  // namespace nt
