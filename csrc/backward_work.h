// What the way back through a stage works with: where cotangents are, and memory. A cotangent is written as what it
// belongs to with `bar` behind it.
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
  bool wants_coefficients = true;  // else nobody reads them, nor
  bool wants_second = true;        // those of the second samples
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
template <bool kWide, class T>
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
template <bool kWide, class T>
struct BackRows {
  using V = Vec<T>;
  const V *d, *t;          // of the input
  const V *bar_d, *bar_t;  // after the instance
  V *in_d, *in_t;          // cotangents of the input

  BackRows(const Back<kWide, T>& back, const Instance& instance, const Place& at, int input = 0) {
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

}  // namespace NT_LEVEL
}  // namespace nt
