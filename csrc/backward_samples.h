// From the cotangents of the records of samples to those of what a program starts from.
#pragma once

#include "backward_planes.h"

namespace nt {
namespace NT_LEVEL {

// A sum of many terms, in blocks: one sum of all would add up its rounding errors.
template <class V>
class Sum {
 public:
  void add(V term) {
    block_ += term;
    if (++n_ < 256) return;
    blocks_ += block_;
    block_ = V{};
    n_ = 0;
  }
  V total() const { return blocks_ + block_; }

 private:
  V blocks_{}, block_{};
  int n_ = 0;
};

// Carries the cotangents of the records of a group of samples back, value by value in reverse: to the inputs, behind
// them, and to coefficients. Goes forward once more for that, whereupon the scratch memory holds what the pools of each
// sample with itself are.
template <class T>
class RecordBack {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  RecordBack(const Context<T>& c, const Tile<T>& tile, T* wide, V* bars, V* coefficients, BackwardScratch<T>& scratch)
      : c_(c), tile_(tile), wide_(wide), scratch_(scratch) {
    bars_.first = bars_.second = bars;
    bars_.coefficients = coefficients;
    bars_.tensors_d = scratch.tensors.data();
    bars_.tensors_t = bars_.tensors_d + scratch.n_tensors;
  }

  void run() {
    RecordWriter<T, OwnStages<T>>(c_, tile_, wide_, OwnStages<T>{c_, tile_, scratch_.forward}).write();
    scratch_.clear_tensors();
    for (int i = static_cast<int>(c_.program.values.size()) - 1; i >= 0; --i) value(i);
  }

 private:
  const T* plane(Statistic statistic, int value) const {
    const int64_t start = c_.prepared.record.find(statistic, value);
    return start < 0 ? nullptr : wide_ + start * kL;
  }
  V* bar(Statistic statistic, int value) const {
    const int64_t start = c_.prepared.cotangents.find(statistic, value);
    return start < 0 ? nullptr : bars_.first + start;
  }
  void add_coefficient(const Value& value, int k, V sum) const { bars_.coefficients[value.cotangent + k] += sum; }

  void value(int i) {
    const Value& value = c_.program.values[i];
    const T* coefficient = c_.job.coefficients + value.coefficient;
    const V* half_bar = bar(Statistic::kHalfVariance, i);
    const int input = value.inputs.empty() ? -1 : value.inputs[0];
    const T* half_in = input < 0 ? nullptr : plane(Statistic::kHalfVariance, input);
    V* in_bar = input < 0 ? nullptr : bar(Statistic::kHalfVariance, input);
    const int64_t n = n_positions(value.space);
    switch (value.op) {
      case Op::kInputs:
        if (half_bar) inputs(value, tile_.inputs1[i], half_bar, bars_.first + c_.cotangent_start[i]);
        return;
      case Op::kTied:
        if (half_bar) tied(value, coefficient[0], half_in, half_bar, bar(Statistic::kHalfAverage, i), in_bar);
        return;
      case Op::kDual:
        if (half_bar) dual(value, coefficient, plane(Statistic::kDual, i), half_bar, in_bar);
        return;
      case Op::kScale:
        if (half_bar) rescale(i, half_in, half_bar, in_bar);
        return;
      case Op::kNormalize:
        if (half_bar) rescale(i, half_in, half_bar, in_bar);
        normalizing_scale(i, half_in, in_bar);
        return;
      case Op::kDropout:
        if (half_bar) dropout(value, coefficient[0], half_in, half_bar, in_bar);
        return;
      case Op::kSum:
        for (size_t k = 0; half_bar && k < value.inputs.size(); ++k) {
          V* to = bar(Statistic::kHalfVariance, value.inputs[k]);
          for (int64_t p = 0; p < n; ++p) to[p] += broadcast(coefficient[k]) * half_bar[p];
        }
        return;
      case Op::kGather:
      case Op::kUntie:
        finish_own(i);
        own_stage(i);
        if (half_bar) copy(value, half_bar, in_bar);
        return;
      case Op::kFlatten:
        own_stage(i);
        if (half_bar) flatten(value, half_bar, in_bar);
        return;
      case Op::kPool:
        finish_own(i);
        if (half_bar) pool(i, half_bar, in_bar);
        own_stage(i);
        return;
      case Op::kMaterialised:
        for (int64_t p = 0; half_bar && p < n; ++p) bars_.first[c_.cotangent_start[i] + p] *= broadcast(T(0.5));
        return;
      case Op::kProduct:
        if (half_bar) product(value, half_bar);
        return;
    }
  }

  void inputs(const Value& value, const T* x, const V* half_bar, V* x_bar) const {
    const int64_t n = n_positions(value.space);
    for (int64_t p = 0; p < n; ++p) {
      const V scaled = half_bar[p] * broadcast(T(1) / value.channels);
      for (int64_t k = p * value.channels; k < (p + 1) * value.channels; ++k) x_bar[k] += scaled * load(x + k * kL);
    }
  }

  void tied(const Value& value, T weight, const T* half_in, const V* half_bar, const V* average_bar, V* in_bar) const {
    const V w = broadcast(weight), mean = broadcast(T(1) / window_size<T>(value));
    Sum<V> bias_bar, weight_bar;
    each_tap(value, [&](int64_t window, int64_t q) {
      V bar = w * half_bar[window];
      if (average_bar) bar += average_bar[window];
      in_bar[q] += bar * mean;
      weight_bar.add(half_bar[window] * mean * load(half_in + q * kL));
    });
    for (int64_t p = 0; p < n_positions(value.space); ++p) bias_bar.add(half_bar[p]);
    add_coefficient(value, 0, weight_bar.total());
    add_coefficient(value, 1, broadcast(T(0.5)) * bias_bar.total());
  }

  // Visits the windows of a step and the positions in them: visit(window, position).
  template <class Visit>
  void each_tap(const Value& value, const Visit& visit) const {
    const Index3& space = c_.program.values[value.inputs[0]].space;
    const auto& w = value.window;
    const auto along = [&](int a, int window, const auto& next) {
      for (int k = 0; k < w[a].taps; ++k) {
        const int q = window * w[a].stride + k * w[a].dilation - w[a].low;
        if (w[a].circular) {
          next(modulo(q, space[a]));
        } else if (is_inside(q, space[a])) {
          next(q);
        }
      }
    };
    for (int z = 0; z < value.space[0]; ++z) {
      for (int y = 0; y < value.space[1]; ++y) {
        along(0, z, [&](int qz) {
          along(1, y, [&](int qy) {
            for (int x = 0; x < value.space[2]; ++x) {
              const int64_t window = position(value.space, z, y, x);
              along(2, x, [&](int qx) { visit(window, position(space, qz, qy, qx)); });
            }
          });
        });
      }
    }
  }

  void dual(const Value& value, const T* coefficient, const T* numbers, const V* half_bar, V* in_bar) const {
    with_dual_back<true, T>(value.activation, coefficient, value.table, [&](const auto& dual) {
      using Bars = CoefficientBars<T, std::decay_t<decltype(dual)>>;
      std::array<Sum<V>, std::tuple_size_v<Bars>> sums;
      for (int64_t p = 0; p < n_positions(value.space); ++p) {
        Bars coefficients{};
        const Numbers1<true, T> of_sample{numbers + p * n_numbers(value) * kL, 0};
        in_bar[p] += dual.half_back(of_sample, half_bar[p], coefficients.data());
        for (size_t k = 0; k < sums.size(); ++k) sums[k].add(coefficients[k]);
      }
      for (size_t k = 0; k < sums.size(); ++k) add_coefficient(value, static_cast<int>(k), sums[k].total());
    });
  }

  void product(const Value& value, const V* half_bar) const {
    const size_t n_branches = value.inputs.size();
    for (int64_t p = 0; p < n_positions(value.space); ++p) {
      for (size_t branch = 0; branch < n_branches; ++branch) {
        V var_of_others = broadcast(T(1));
        for (size_t k = 0; k < n_branches; ++k) {
          const T* half = plane(Statistic::kHalfVariance, value.inputs[k]) + p * kL;
          if (k != branch) var_of_others *= broadcast(T(2)) * load(half);
        }
        bar(Statistic::kHalfVariance, value.inputs[branch])[p] += half_bar[p] * var_of_others;
      }
    }
  }

  void rescale(int i, const T* half_in, const V* half_bar, V* in_bar) const {
    const T* scale = plane(Statistic::kScale, i);
    const V* scaled_bar = bar(Statistic::kScaledHalf, i);
    V* scale_bar = bar(Statistic::kScale, i);
    const V two = broadcast(T(2));
    for (int64_t p = 0; p < n_positions(c_.program.values[i].space); ++p) {
      const V half = load(half_in + p * kL), r = load(scale + p * kL);
      in_bar[p] += (scaled_bar[p] + half_bar[p] * r) * r;
      scale_bar[p] += (scaled_bar[p] + two * half_bar[p] * r) * half;
    }
  }

  // r = (eps + mean (weight var))^(-1/2), or 0. The cotangents of weights replace those of r.
  void normalizing_scale(int i, const T* half_in, V* in_bar) const {
    const Value& value = c_.program.values[i];
    const T* scale = plane(Statistic::kScale, i);
    V* scale_bar = bar(Statistic::kScale, i);
    const int64_t n = n_positions(value.space);
    const Buffer<V> weights(n);
    if (value.weighted) copy_numbers(value, tile_, c_.job.numbers[i], reinterpret_cast<T*>(weights.data()));
    Sum<V> eps_bar;
    each_normalized(value, [&](int64_t n_averaged, const auto& each) {
      V bar{};
      each([&](int64_t p) {
        const V r = load(scale + p * kL);
        bar -= broadcast(T(0.5)) * r * r * r * scale_bar[p];
      });
      eps_bar.add(bar);
      bar *= broadcast(T(2) / static_cast<T>(n_averaged));  // the mean is of variances
      each([&](int64_t p) {
        scale_bar[p] = bar * load(half_in + p * kL);
        in_bar[p] += value.weighted ? bar * weights.data()[p] : bar;
      });
    });
    add_coefficient(value, 0, eps_bar.total());
  }

  void dropout(const Value& value, T rate, const T* half_in, const V* half_bar, V* in_bar) const {
    Sum<V> rate_bar;
    const V larger = broadcast(1 / rate);
    for (int64_t p = 0; p < n_positions(value.space); ++p) {
      in_bar[p] += half_bar[p] * larger;
      rate_bar.add(-half_bar[p] * larger * larger * load(half_in + p * kL));
    }
    add_coefficient(value, 0, rate_bar.total());
  }

  void copy(const Value& value, const V* half_bar, V* in_bar) const {
    each_copy(value, c_.program.values[value.inputs[0]].space, [&](int64_t to, int64_t from) {
      if (from >= 0) in_bar[from] += half_bar[to];
    });
  }

  void flatten(const Value& value, const V* half_bar, V* in_bar) const {
    const int64_t n = n_positions(c_.program.values[value.inputs[0]].space);
    for (int64_t p = 0; p < n; ++p) in_bar[p] += half_bar[0] * broadcast(T(1) / static_cast<T>(n));
  }

  // See `RecordWriter::pool`. What was pooled of each sample with itself is at the offset 0 of the pool's tensor.
  void pool(int i, const V* half_bar, V* in_bar) const {
    const Value& value = c_.program.values[i];
    const Plan& plan = c_.prepared.own;
    const int number = plan.tensor_of[i];
    V* pooled_bar = bars_.tensors_d + start_of_tensor(plan, number) + plan.tensors[number].find({0, 0, 0});
    const V* own_bar = bar(Statistic::kOwnDeficit, i);
    V* sums_bar = bar(Statistic::kPooledVariance, i);
    const PoolSizes<T> sizes(value, c_.program.values[value.inputs[0]].space);
    const V half = broadcast(T(0.5)), two = broadcast(T(2));
    int64_t p = 0;
    for (int z = 0; z < value.space[0]; ++z) {
      for (int y = 0; y < value.space[1]; ++y) {
        for (int x = 0; x < value.space[2]; ++x, ++p) {
          const double size = sizes.size({z, y, x});
          pooled_bar[p] += own_bar[p] - half * half_bar[p];
          sums_bar[p] += half * half_bar[p] * broadcast(static_cast<T>(sizes.count({z, y, x}) / (size * size)));
        }
      }
    }
    each_tap(value, [&](int64_t window, int64_t q) { in_bar[q] += two * sums_bar[window]; });
  }

  // Stages of samples paired with themselves.
  void finish_own(int end) const { finish_back(c_, c_.prepared.kept_own, tile_, end, bars_); }

  void own_stage(int end) const {
    const Plan& plan = c_.prepared.kept_own;
    const auto stage =
        std::find_if(plan.stages.begin(), plan.stages.end(), [&](const Stage& stage) { return stage.end == end; });
    if (!stage->offsets.empty()) stage_back<true, T>(c_, plan, *stage, tile_, scratch_, nullptr, bars_);
  }

  const Context<T>& c_;
  const Tile<T>& tile_;
  T* wide_;
  BackwardScratch<T>& scratch_;
  Bars<T> bars_;
};

}  // namespace NT_LEVEL
}  // namespace nt
