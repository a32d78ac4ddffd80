// The way back through steps that treat each position on its own, row by row.
#pragma once

#include "backward_work.h"

namespace nt {
namespace NT_LEVEL {

template <bool kWide, class T>
void rescale_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const BackRows<kWide, T> rows(back, instance, at);
  const auto scale1 = first<kWide>(work, Statistic::kScale, instance.value, at);
  const auto scale2 = second(work, Statistic::kScale, instance.value, at);
  V* bar1 = back.first(Statistic::kScale, instance.value, at);
  V* bar2 = back.second(Statistic::kScale, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V a = get<kWide>(scale1, x), b = get(scale2, x), bar = rows.bar_d[x];
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
  const auto half1 = first<kWide>(work, Statistic::kScaledHalf, instance.value, at);
  const auto half2 = second(work, Statistic::kScaledHalf, instance.value, at);
  V* half_bar1 = back.first(Statistic::kScaledHalf, instance.value, at);
  V* half_bar2 = back.second(Statistic::kScaledHalf, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V of_scale = rows.bar_d[x] * (get<kWide>(half1, x) - get(half2, x));
    const V of_half = rows.bar_d[x] * (get<kWide>(scale1, x) - get(scale2, x));
    bar1[x] += of_scale;
    bar2[x] -= of_scale;
    half_bar1[x] += of_half;
    half_bar2[x] -= of_half;
  }
}

template <bool kWide, class T>
void dropout_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  const Work<T>& work = back.work;
  const Value& value = work.value(instance);
  const int before = value.inputs[0];
  const BackRows<kWide, T> rows(back, instance, at);
  const V larger = broadcast(1 / work.coefficients(value)[0]), gain = larger - broadcast(T(1));
  V of_larger{};
  const bool deficit = instance.deficit;
  const auto half1 = deficit ? first<kWide>(work, Statistic::kHalfVariance, before, at) : Row1<T>{};
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
    of_larger += other * (get<kWide>(half1, x) + get(half2, x));
    bar1[x] += other * gain;
    bar2[x] += other * gain;
  }
  back.add_coefficient(value, 0, -of_larger * larger * larger);
}

// The weights of sums are no numbers that could be traced: they have no cotangents.
template <bool kWide, class T>
void sum_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  const T* weights = back.work.coefficients(back.work.value(instance));
  for (int k = 0; k < static_cast<int>(instance.inputs.size()); ++k) {
    const BackRows<kWide, T> rows(back, instance, at, k);
    const Vec<T> weight = broadcast(weights[k]);
    for (int x = 0; x < at.n; ++x) {
      rows.in_d[x] += weight * rows.bar_d[x];
      if (rows.in_t) rows.in_t[x] += weight * rows.bar_t[x];
    }
  }
}

// A product, branch by branch. With k and t the covariance and the tangent kernel of the product of all others:
//   K' = K k,   T' = T k + K t,   and half the variance after is that of the branch times the variance of the others.
template <bool kWide, class T>
class ProductBack {
  using V = Vec<T>;

 public:
  ProductBack(const Back<kWide, T>& back, const Instance& instance, const Place& at)
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
        const V half1 = get<kWide>(first<kWide>(back_.work, Statistic::kHalfVariance, inputs_[k], at_), x);
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
    const BackRows<kWide, T> rows(back_, instance_, at_, branch);
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
    const BackRows<kWide, T> rows(back_, instance_, at_, branch);
    for (int x = 0; x < at_.n; ++x) {
      const Others other = others(branch, x);
      rows.in_d[x] += fma(rows.bar_d[x], other.covariance, tangent_back(rows, other, x));
    }
  }

  // From the cotangent of a tangent kernel to that of the branch's; returns what its covariance has of it.
  static V tangent_back(const BackRows<kWide, T>& rows, const Others& other, int x) {
    if (!rows.bar_t) return V{};
    if (rows.in_t) rows.in_t[x] += rows.bar_t[x] * other.covariance;
    return rows.bar_t[x] * other.tangent;
  }

  const Back<kWide, T>& back_;
  const Instance& instance_;
  const Place& at_;
  const std::vector<int>& inputs_;
  const Scratch<T>& scratch_;
};

template <bool kWide, class T>
void product_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  ProductBack<kWide, T>(back, instance, at).run();
}

template <bool kWide, class T>
void as_covariance_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  const BackRows<kWide, T> rows(back, instance, at);
  Vec<T>* bar1 = back.first(Statistic::kHalfVariance, instance.value, at);
  Vec<T>* bar2 = back.second(Statistic::kHalfVariance, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    rows.in_d[x] -= rows.bar_d[x];
    bar1[x] += rows.bar_d[x];
    bar2[x] += rows.bar_d[x];
    if (rows.in_t) rows.in_t[x] += rows.bar_t[x];
  }
}

template <bool kWide, class T>
void load_inputs_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  const Work<T>& work = back.work;
  const int channels = work.value(instance).channels;
  const int64_t p1 = position(instance.space, at.first), p2 = position(instance.space, at.second);
  const Row1<T> x1{work.tile.inputs1[instance.value] + p1 * channels * (kWide ? kL : 1)};
  const Row2<T> x2{work.tile.inputs2[instance.value] + p2 * channels * kL, kL};
  const int64_t start = work.c.cotangent_start[instance.value];
  V* bar1 = back.bars.first + start + p1 * channels;
  V* bar2 = back.bars.second + start + p2 * channels;
  const V* bar = back.plane(instance).row_d(at.z, at.y, at.x);
  for (int x = 0; x < at.n; ++x) {
    const V scaled = bar[x] * broadcast(T(1) / channels);
    for (int k = x * channels; k < (x + 1) * channels; ++k) {
      const V a = get<kWide>(x1, k), b = get(x2, k);
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

template <bool kWide, class T>
void load_materialised_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
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

template <bool kWide, class T>
void load_tensor_back(const Back<kWide, T>& back, const Instance& instance, const Place& at) {
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

}  // namespace NT_LEVEL
}  // namespace nt
