// The records of samples: what each one contributes to the pairs that it is in.
#pragma once

#include "planes.h"

namespace nt {
namespace NT_LEVEL {

// Sums over windows, zero outside: out[p] for every window.
template <class T>
void window_sum(const Value& value, const T* in, const Index3& space, T* out) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  const auto& w = value.window;
  const auto at = [&](int a, int window, int tap) {
    const int q = window * w[a].stride + tap * w[a].dilation - w[a].low;
    return w[a].circular ? modulo(q, space[a]) : q;
  };
  std::vector<const T*> rows;  // those under a window
  for (int z = 0; z < value.space[0]; ++z) {
    for (int y = 0; y < value.space[1]; ++y) {
      rows.clear();
      for (int kz = 0; kz < w[0].taps; ++kz) {
        const int qz = at(0, z, kz);
        for (int ky = 0; ky < w[1].taps; ++ky) {
          const int qy = at(1, y, ky);
          if (is_inside(qz, space[0]) && is_inside(qy, space[1])) rows.push_back(in + position(space, qz, qy, 0) * kL);
        }
      }
      for (int x = 0; x < value.space[2]; ++x, out += kL) {
        V sum{};
        for (int kx = 0; kx < w[2].taps; ++kx) {
          const int qx = at(2, x, kx);
          if (!is_inside(qx, space[2])) continue;
          V column{};
          for (const T* row : rows) column += load(row + int64_t{qx} * kL);
          sum += column;
        }
        store(out, sum);
      }
    }
  }
}

// Half the mean square over the channels.
template <class T>
Vec<T> half_mean_square(const T* x, int channels) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum{};
  for (int c = 0; c < channels; ++c) sum = fma(load(x + int64_t{c} * kL), load(x + int64_t{c} * kL), sum);
  return sum * broadcast(T(0.5) / channels);
}

template <class Dual, class T>
void prepare_dual(const Dual& dual, int n_numbers, const T* half_in, int64_t n, T* numbers, T* half) {
  constexpr int kL = kLanes<T>;
  const Buffer<Vec<T>> of_sample(n_numbers);
  for (int64_t p = 0; p < n; ++p) {
    const Vec<T> after = dual.prepare(load(half_in + p * kL), of_sample.data());
    for (int k = 0; k < n_numbers; ++k) store(numbers + (p * n_numbers + k) * kL, of_sample.data()[k]);
    if (half) store(half + p * kL, after);
  }
}

// Visits what layer normalisation averages over: visit(number of positions, each), and each(visit position).
template <class Visit>
void each_normalized(const Value& value, const Visit& visit) {
  const Index3& space = value.space;
  Index3 kept = space;  // one mean for each of these
  for (int a = 0; a < kAxes; ++a) {
    if (value.normalized[a]) kept[a] = 1;
  }
  const Index3 averaged{space[0] / kept[0], space[1] / kept[1], space[2] / kept[2]};
  for (int z = 0; z < kept[0]; ++z) {
    for (int y = 0; y < kept[1]; ++y) {
      for (int x = 0; x < kept[2]; ++x) {
        visit(n_positions(averaged), [&](const auto& visit_position) {
          for (int az = 0; az < averaged[0]; ++az) {
            for (int ay = 0; ay < averaged[1]; ++ay) {
              for (int ax = 0; ax < averaged[2]; ++ax) visit_position(position(space, z + az, y + ay, x + ax));
            }
          }
        });
      }
    }
  }
}

// The scale of layer normalisation: the mean of the variances over some axes, to the power of -1/2. They are weighted
// by what is in `scale_out`, where there are weights.
template <class T>
void normalizing_scale(const Value& value, const T* half_in, T eps, T* scale_out) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  each_normalized(value, [&](int64_t n, const auto& each) {
    V sum{};
    each([&](int64_t p) {
      const V half = load(half_in + p * kL);
      sum += value.weighted ? half * load(scale_out + p * kL) : half;
    });
    const V total = fma(sum * broadcast(T(1) / static_cast<T>(n)), broadcast(T(2)), broadcast(eps));
    const V r = if_positive(total, broadcast(T(1)) / sqrt(total), V{});  // zeros stay zeros
    each([&](int64_t p) { store(scale_out + p * kL, r); });
  });
}

// Numbers of the samples of a tile's batch.
template <class T>
void copy_numbers(const Value& value, const Tile<T>& tile, const Numbers<T>& numbers, T* out) {
  constexpr int kL = kLanes<T>;
  const int64_t n = n_positions(value.space);
  const T* of_batch = tile.which == 1 ? numbers.first : numbers.second;
  for (int64_t p = 0; p < n; ++p) {
    for (int l = 0; l < kL; ++l) out[p * kL + l] = of_batch[tile.i[l] * n + p];
  }
}

// Visits the positions after a copy: visit(position, the one before it, or -1 for zero).
template <class Visit>
void each_copy(const Value& value, const Index3& space, const Visit& visit) {
  const Index3& order = value.order;
  int64_t to = 0;
  Index3 p;  // in the input
  for (int z : value.positions[order[0]]) {
    for (int y : value.positions[order[1]]) {
      for (int x : value.positions[order[2]]) {
        p[order[0]] = z;
        p[order[1]] = y;
        p[order[2]] = x;
        visit(to++, z < 0 || y < 0 || x < 0 ? -1 : position(space, p));
      }
    }
  }
}

// Fills the record of a group of samples. `own.run(end)` carries each of them, paired with itself, through the stage
// that has this end, and returns what is after it; `own.finish(end)` makes that a deficit, once the record says which
// variances are there.
template <class T, class Own>
class RecordWriter {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  RecordWriter(const Context<T>& c, const Tile<T>& tile, T* wide, Own own)
      : c_(c), tile_(tile), wide_(wide), own_(own) {}

  void write() {
    for (int i = 0; i < static_cast<int>(c_.program.values.size()); ++i) {
      write_value(i);
      if (plane(Statistic::kStd, i)) write_angular(i);
    }
  }

 private:
  T* plane(Statistic statistic, int value) const {
    const int64_t start = c_.prepared.record.find(statistic, value);
    return start < 0 ? nullptr : wide_ + start * kL;
  }

  void write_value(int i) {
    const Value& value = c_.program.values[i];
    const T* coefficient = c_.job.coefficients + value.coefficient;
    T* half = plane(Statistic::kHalfVariance, i);
    const int input = value.inputs.empty() ? -1 : value.inputs[0];
    const T* half_in = input < 0 ? nullptr : plane(Statistic::kHalfVariance, input);
    switch (value.op) {
      case Op::kInputs:
        if (half) inputs(value, tile_.inputs1[i], half);
        return;
      case Op::kMaterialised:
        if (half) materialised(value, c_.job.sources[i], half);
        return;
      case Op::kTied:
        if (half) tied(value, coefficient, half_in, plane(Statistic::kHalfAverage, i), half);
        return;
      case Op::kDual:
        with_dual(value.activation, coefficient, value.table, [&](const auto& dual) {
          prepare_dual(dual, n_numbers(value), half_in, n_positions(value.space), plane(Statistic::kDual, i), half);
        });
        return;
      case Op::kScale:
        copy_numbers(value, tile_, c_.job.numbers[i], plane(Statistic::kScale, i));
        store(plane(Statistic::kUnscaled, i), are_ones(plane(Statistic::kScale, i), n_positions(value.space)));
        rescale(value, half_in, plane(Statistic::kScale, i), plane(Statistic::kScaledHalf, i), half);
        return;
      case Op::kDropout:
        if (half) dropout(value, coefficient[0], half_in, half);
        return;
      case Op::kNormalize:
        if (value.weighted) copy_numbers(value, tile_, c_.job.numbers[i], plane(Statistic::kScale, i));
        normalizing_scale(value, half_in, coefficient[0], plane(Statistic::kScale, i));
        rescale(value, half_in, plane(Statistic::kScale, i), plane(Statistic::kScaledHalf, i), half);
        return;
      case Op::kSum:
        if (half) sum(value, coefficient, half);
        return;
      case Op::kProduct:
        if (half) product(value, half);
        return;
      case Op::kGather:
      case Op::kUntie:
        if (half) copy(value, half_in, half);
        own_.run(i);
        own_.finish(i);
        return;
      case Op::kFlatten:
        if (half) flatten(value, half_in, half);
        own_.run(i);
        return;
      case Op::kPool:
        if (half) {
          pool(i, half_in, half);
        } else {
          own_.run(i);
        }
        return;
    }
  }

  // What angular deficits need besides; of inputs, to have mean square 1.
  void write_angular(int i) const {
    const Value& value = c_.program.values[i];
    const V two = broadcast(T(2)), variance = load(plane(Statistic::kHalfVariance, i)) * two, std = sqrt(variance);
    store(plane(Statistic::kStd, i), std);
    const auto inverse = [](V x) { return if_positive(x, broadcast(T(1)) / x, V{}); };
    if (value.op == Op::kInputs) {
      T* x = wide_ + c_.input_start[i] * kL;
      const V to_unit = inverse(std);
      for (int64_t k = 0; k < value.channels; ++k) store(x + k * kL, load(x + k * kL) * to_unit);
      return;
    }
    T* shares = plane(Statistic::kShares, i);
    if (!shares) return;
    const T* coefficient = c_.job.coefficients + value.coefficient;
    const V per_variance = inverse(variance);
    for (size_t k = 0; k < value.inputs.size(); ++k) {
      const V of_branch = load(plane(Statistic::kHalfVariance, value.inputs[k])) * two * broadcast(coefficient[k]);
      store(shares + k * kL, sqrt(of_branch * per_variance));
    }
    if (value.op == Op::kTied) store(shares + kL, sqrt(broadcast(coefficient[1]) * per_variance));
  }

  void inputs(const Value& value, const T* x, T* half) const {
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n; ++p) {
      store(half + p * kL, half_mean_square(x + p * value.channels * kL, value.channels));
    }
  }

  void materialised(const Value& value, const Source<T>& source, T* half) const {
    const int64_t n = n_positions(value.space);
    const T* variance = tile_.which == 1 ? source.variance1 : source.variance2;
    for (int64_t p = 0; p < n; ++p) {
      for (int l = 0; l < kL; ++l) half[p * kL + l] = T(0.5) * variance[tile_.i[l] * n + p];
    }
  }

  void tied(const Value& value, const T* coefficient, const T* half_in, T* average, T* half) const {
    T* sums = average ? average : half;
    window_sum(value, half_in, c_.program.values[value.inputs[0]].space, sums);
    const int64_t n = n_positions(value.space);
    const V scale = broadcast(T(1) / window_size<T>(value));
    for (int64_t p = 0; p < n; ++p) {
      const V mean = load(sums + p * kL) * scale;
      if (average) store(average + p * kL, mean);
      store(half + p * kL, fma(mean, broadcast(coefficient[0]), broadcast(T(0.5) * coefficient[1])));
    }
  }

  static V are_ones(const T* scale, int64_t n) {
    const V one = broadcast(T(1));
    V ones = one;
    for (int64_t p = 0; p < n; ++p) {
      const V excess = load(scale + p * kL) - one;
      ones = if_positive(max(excess, -excess), V{}, ones);
    }
    return ones;
  }

  void rescale(const Value& value, const T* half_in, const T* scale, T* scaled_half, T* half) const {
    if (!half) return;
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n * kL; p += kL) {
      const V r = load(scale + p);
      store(scaled_half + p, load(half_in + p) * r);
      store(half + p, load(half_in + p) * r * r);
    }
  }

  void dropout(const Value& value, T rate, const T* half_in, T* half) const {
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n * kL; p += kL) store(half + p, load(half_in + p) * broadcast(1 / rate));
  }

  void sum(const Value& value, const T* weights, T* half) const {
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n; ++p) {
      V sum{};
      for (size_t k = 0; k < value.inputs.size(); ++k) {
        const T* in = plane(Statistic::kHalfVariance, value.inputs[k]);
        sum = fma(load(in + p * kL), broadcast(weights[k]), sum);
      }
      store(half + p * kL, sum);
    }
  }

  void product(const Value& value, T* half) const {
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n; ++p) {
      V product = load(plane(Statistic::kHalfVariance, value.inputs[0]) + p * kL);
      for (size_t k = 1; k < value.inputs.size(); ++k) {
        const T* in = plane(Statistic::kHalfVariance, value.inputs[k]);
        product *= load(in + p * kL) * broadcast(T(2));
      }
      store(half + p * kL, product);
    }
  }

  void copy(const Value& value, const T* half_in, T* half) const {
    each_copy(value, c_.program.values[value.inputs[0]].space,
              [&](int64_t to, int64_t from) { store(half + to * kL, from < 0 ? V{} : load(half_in + from * kL)); });
  }

  void flatten(const Value& value, const T* half_in, T* half) const {
    const int64_t n_in = n_positions(c_.program.values[value.inputs[0]].space);
    V sum{};
    for (int64_t p = 0; p < n_in; ++p) sum += load(half_in + p * kL);
    store(half, sum * broadcast(T(1) / n_in));
  }

  // A pool mixes positions: the variance after it is the pooled covariance of the sample with itself.
  void pool(int number, const T* half_in, T* half) const {
    const Value& value = c_.program.values[number];
    const V* pooled = own_.run(number);
    const Index3& space = c_.program.values[value.inputs[0]].space;
    T* own = plane(Statistic::kOwnDeficit, number);
    T* sums = plane(Statistic::kPooledVariance, number);
    window_sum(value, half_in, space, sums);
    int64_t p = 0;
    const PoolSizes<T> sizes(value, space);
    for (int z = 0; z < value.space[0]; ++z) {
      for (int y = 0; y < value.space[1]; ++y) {
        for (int x = 0; x < value.space[2]; ++x, ++p) {
          const T size = static_cast<T>(sizes.size({z, y, x}));
          const V sum = load(sums + p * kL) * broadcast(T(2));
          const V mean = sum * broadcast(static_cast<T>(sizes.count({z, y, x})) / (size * size));
          store(sums + p * kL, sum);
          store(own + p * kL, pooled[p]);
          store(half + p * kL, (mean - pooled[p]) * broadcast(T(0.5)));
        }
      }
    }
    own_.finish(number);
  }

  const Context<T>& c_;
  const Tile<T>& tile_;
  T* wide_;
  Own own_;
};

}  // namespace NT_LEVEL
}  // namespace nt
