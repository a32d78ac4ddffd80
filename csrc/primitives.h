// The primitives: what each does to a row of a plane, of deficits (or covariances) and of tangent kernels. Those of
// tied maps get sums over windows, see windows.h; the loops that take most of the time are in rows.h.
#pragma once

#include "planes.h"

namespace nt {
namespace NT_LEVEL {

template <class Call>
void dispatch(bool ntk, bool covariance, const Call& call) {
  if (ntk) {
    covariance ? call(std::true_type{}, std::true_type{}) : call(std::true_type{}, std::false_type{});
  } else {
    covariance ? call(std::false_type{}, std::true_type{}) : call(std::false_type{}, std::false_type{});
  }
}

// Deficits to covariances, or back.
template <bool kWide, class T>
void to_other(const Work<T>& work, int value, const Place& at, const Vec<T>* in, Vec<T>* out) {
  const auto half1 = first<kWide>(work, Statistic::kHalfVariance, value, at);
  const auto half2 = second(work, Statistic::kHalfVariance, value, at);
  for (int x = 0; x < at.n; ++x) out[x] = get<kWide>(half1, x) + get(half2, x) - in[x];
}

template <bool kWide, class T>
void as_covariance(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* d, const Vec<T>* t,
                   Vec<T>* d_out, Vec<T>* t_out) {
  to_other<kWide>(work, instance.value, at, d, d_out);
  if (t_out && t_out != t) std::copy(t, t + at.n, t_out);
}

// The numbers of a dual, from the first position on.
template <bool kWide, class T>
DualRows<T> dual_rows(const Work<T>& work, int value) {
  const int numbers = n_numbers(work.c.program.values[value]);
  const int64_t start = work.c.prepared.record.find(Statistic::kDual, value);
  const T* numbers1 = at1<kWide>(work.c, work.tile, start);
  const T* numbers2 = work.tile.record2 + start * kLanes<T>;
  // Rows over first samples have one second sample for all.
  if (work.c.one_position) return {numbers1, numbers2, kWide ? work.c.wide_size : 1, 0, work.c.rows};
  return {numbers1, numbers2, numbers * (kWide ? kLanes<T> : 1), numbers * kLanes<T>, 1};
}

// Those of a row.
template <class T>
DualRows<T> dual_rows(const DualRows<T>& all, const Place& at) {
  return all.from(position(at.geometry.space, at.first), position(at.geometry.space, at.second));
}
template <bool kWide, class T>
DualRows<T> dual_rows(const Work<T>& work, int value, const Place& at) {
  return dual_rows(dual_rows<kWide>(work, value), at);
}

// A dual that is fused with the map before it, or none, and its numbers from the first position on.
template <class T>
struct FusedDual {
  const Instance* instance = nullptr;
  DualRows<T> numbers{};
  bool sums = false;  // neighbours are added up, see `Instance::sums_for`
};

template <bool kWide, class T>
void dual(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* d, const Vec<T>* t,
          Vec<T>* d_out, Vec<T>* t_out) {
  const Value& value = work.value(instance);
  with_dual(value.activation, work.coefficients(value), value.table, [&](const auto& dual) {
    using Dual = std::decay_t<decltype(dual)>;
    const auto rows = dual_rows<kWide>(work, instance.value, at);
    dispatch(t_out != nullptr, !instance.deficit, [&](auto ntk, auto covariance) {
      dual_row<T, Dual, kWide, ntk.value, covariance.value>(at.n, d, t, dual, rows, d_out, t_out);
    });
  });
}

// Rows of a plane whose sum over the taps beside this axis is the sum over a window. Without tangent kernels, `t` is
// null or zeros.
template <class T>
struct WindowRows {
  int n = 0;  // 1 to 3
  bool has_ntk = false;
  const Vec<T>* d[3] = {};
  const Vec<T>* t[3] = {};
};

// K' = w mean K + b, T' = w mean T + (its own tangent kernel), see docs/cpu-engine.md.
template <bool kWide, int kRows, class T>
void tied(const Work<T>& work, const Instance& instance, const Place& at, const WindowRows<T>& rows, Vec<T>* d_out,
          Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  const T* c = work.coefficients(value);
  const T mean = T(1) / window_size<T>(value);
  const V* const* d = rows.d;
  const V* const* t = rows.t;
  if (!instance.deficit) {
    const V w = broadcast(c[0] * mean), b = broadcast(c[1]), own_w = broadcast(c[2] * mean), own_b = broadcast(c[3]);
    for (int x = 0; x < at.n; ++x) {
      const V k = sum_across<kRows>(d, at.x + x);
      if (t_out) {
        const V own = fma(k, own_w, own_b);
        t_out[x] = rows.has_ntk ? fma(sum_across<kRows>(t, at.x + x), w, own) : own;
      }
      d_out[x] = fma(k, w, b);
    }
    return;
  }
  // What its own parameters add to the tangent kernel is the covariance after it, or follows from that of averages.
  const bool follows = value.bias_follows_weights;
  const Statistic half = t_out && !follows ? Statistic::kHalfAverage : Statistic::kHalfVariance;
  const auto half1 = first<kWide>(work, half, instance.value, at);
  const auto half2 = second(work, half, instance.value, at);
  const V m = broadcast(mean), w = broadcast(c[0]), own_w = broadcast(c[2]), own_b = broadcast(c[3]);
  for (int x = 0; x < at.n; ++x) {
    const V deficit = sum_across<kRows>(d, at.x + x) * m, after = deficit * w;
    if (t_out) {
      const V halves = get<kWide>(half1, x) + get(half2, x);
      const V own = follows ? halves - after : fma(halves - deficit, own_w, own_b);
      t_out[x] = rows.has_ntk ? fma(sum_across<kRows>(t, at.x + x), w * m, own) : own;
    }
    d_out[x] = after;
  }
}

// A tied map in the 'ntk' parameterization and the dual that is fused with it.
template <bool kWide, int kRows, class T>
void tied_and_dual(const Work<T>& work, const Instance& instance, const FusedDual<T>& fused, const Place& at,
                   const WindowRows<T>& rows, Vec<T>* d_out, Vec<T>* t_out) {
  const Instance& after = *fused.instance;
  const Value& value = work.value(instance);
  const Value& activation = work.value(after);
  const Vec<T>* const zeros = work.scratch.zeros.data();
  const Vec<T>* const no_tangents[3] = {zeros, zeros, zeros};
  const Plane<T>& between = work.plane(instance);
  dispatch(t_out != nullptr, !after.deficit, [&](auto ntk, auto covariance) {
    with_fused_dual(activation.activation, work.coefficients(activation), [&](const auto& dual) {
      using Dual = std::decay_t<decltype(dual)>;
      const auto run = [&](auto keep, auto sums) {
        tied_dual<T, Dual, kWide, ntk.value, covariance.value, keep.value, sums.value, kRows>(
            at.x, at.n, rows.d, rows.has_ntk ? rows.t : no_tangents,
            work.coefficients(value)[0] * (T(1) / window_size<T>(value)), dual, dual_rows(fused.numbers, at), d_out,
            t_out, between.row_d(at.z, at.y, at.x), between.row_t(at.z, at.y, at.x));
      };
      const auto run_or_keep = [&](auto sums) {
        work.plan.keeps_planes ? run(std::true_type{}, sums) : run(std::false_type{}, sums);
      };
      if constexpr (kRows == 3 && !covariance.value) {
        if (fused.sums) return run_or_keep(std::true_type{});
      }
      run_or_keep(std::false_type{});
    });
  });
}

// From sums over windows to what is after a tied map, or after the dual that is fused with it.
template <bool kWide, int kRows, class T>
void finish_tied(const Work<T>& work, const Instance& instance, const FusedDual<T>& fused, const Place& at,
                 const WindowRows<T>& rows) {
  const Instance& target = fused.instance ? *fused.instance : instance;
  const Plane<T>& out = work.plane(target);
  Vec<T>* d = out.row_d(at.z, at.y, at.x);
  Vec<T>* t = out.row_t(at.z, at.y, at.x);
  if (fused.instance) {
    tied_and_dual<kWide, kRows>(work, instance, fused, at, rows, d, t);
  } else {
    tied<kWide, kRows>(work, instance, at, rows, d, t);
  }
}

// Whether none of the samples of a tile is changed by a rescaling.
template <bool kWide, class T>
bool leaves_all(const Work<T>& work, const Instance& instance) {
  if (work.value(instance).op != Op::kScale || work.c.one_position) return false;
  const Vec<T> first_ones = get<kWide>(first<kWide>(work, Statistic::kUnscaled, instance.value, kOne, kOrigin), 0);
  const Vec<T> second_ones = get(second(work, Statistic::kUnscaled, instance.value, kOne, kOrigin), 0);
  return !any_positive(broadcast(T(1)) - first_ones * second_ones);
}

// K' = s1 s2 K with a scale of each sample and position.
template <bool kWide, class T>
void rescale(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* d, const Vec<T>* t,
             Vec<T>* d_out, Vec<T>* t_out) {
  using V = Vec<T>;
  if (leaves_all<kWide>(work, instance)) {
    if (d_out != d) std::copy(d, d + at.n, d_out);
    if (t_out && t_out != t) std::copy(t, t + at.n, t_out);
    return;
  }
  const auto scale1 = first<kWide>(work, Statistic::kScale, instance.value, at);
  const auto scale2 = second(work, Statistic::kScale, instance.value, at);
  const Statistic scaled = instance.deficit ? Statistic::kScaledHalf : Statistic::kScale;  // or not there, nor read
  const auto half1 = first<kWide>(work, scaled, instance.value, at);
  const auto half2 = second(work, scaled, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V a = get<kWide>(scale1, x), b = get(scale2, x);
    V k = (d[x] * a) * b;
    if (instance.deficit) k = fma(a - b, get<kWide>(half1, x) - get(half2, x), k);
    if (t_out) t_out[x] = (t[x] * a) * b;
    d_out[x] = k;
  }
}

// What is of one sample and position with itself shares the choice of what is kept, and becomes larger.
template <bool kWide, class T>
void dropout(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* d, const Vec<T>* t,
             Vec<T>* d_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  const V larger = broadcast(1 / work.coefficients(value)[0]), gain = larger - broadcast(T(1));
  const int before = value.inputs[0];
  const bool deficit = instance.deficit;
  const auto half1 = deficit ? first<kWide>(work, Statistic::kHalfVariance, before, at) : Row1<T>{};
  const auto half2 = deficit ? second(work, Statistic::kHalfVariance, before, at) : Row2<T>{};
  for (int x = 0; x < at.n; ++x) {
    const V same = at.first == at.second ? same_samples(work.c, work.tile, x, kSame) : V{};
    V other = d[x];
    if (deficit) other = fma(gain, get<kWide>(half1, x) + get(half2, x), other);
    if (t_out) t_out[x] = if_positive(same, t[x] * larger, t[x]);
    d_out[x] = if_positive(same, d[x] * larger, other);
  }
}

// Rows of all inputs, in scratch.branches_d and scratch.branches_t.
template <class T>
void gather_branches(const Work<T>& work, const Instance& instance, const Place& at) {
  auto& rows = work.scratch.branches_d;
  auto& rows_t = work.scratch.branches_t;
  rows.clear();
  rows_t.clear();
  for (size_t k = 0; k < instance.inputs.size(); ++k) {
    const Plane<T>& in = work.plane(work.input(instance, static_cast<int>(k)));
    rows.push_back(in.row_d(at.z, at.y, at.x));
    rows_t.push_back(in.row_t(at.z, at.y, at.x));
  }
}

// A weighted sum.
template <class T>
void sum(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const T* weights = work.coefficients(work.value(instance));
  gather_branches(work, instance, at);
  const auto& rows = work.scratch.branches_d;
  const auto& rows_t = work.scratch.branches_t;
  for (int x = 0; x < at.n; ++x) {
    V sum{}, sum_t{};
    for (size_t k = 0; k < rows.size(); ++k) {
      sum = fma(rows[k][x], broadcast(weights[k]), sum);
      if (t_out && rows_t[k]) sum_t = fma(rows_t[k][x], broadcast(weights[k]), sum_t);
    }
    d_out[x] = sum;
    if (t_out) t_out[x] = sum_t;
  }
}

// Branch by branch, see docs/cpu-engine.md.
template <bool kWide, class T>
void product(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* d_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  gather_branches(work, instance, at);
  const auto& rows = work.scratch.branches_d;
  const auto& rows_t = work.scratch.branches_t;
  const auto half1 = [&](size_t k, int x) {
    return get<kWide>(first<kWide>(work, Statistic::kHalfVariance, value.inputs[k], at), x);
  };
  const auto half2 = [&](size_t k, int x) {
    return get(second(work, Statistic::kHalfVariance, value.inputs[k], at), x);
  };
  for (int x = 0; x < at.n; ++x) {
    V d = rows[0][x], t = rows_t[0] ? rows_t[0][x] : V{};
    V h1{}, h2{}, k = d;  // halves of the variances, and the covariance, of the product so far
    if (instance.deficit) {
      h1 = half1(0, x);
      h2 = half2(0, x);
      k = h1 + h2 - d;
    }
    for (size_t i = 1; i < rows.size(); ++i) {
      V other = rows[i][x];
      if (instance.deficit) {
        const V g1 = half1(i, x), g2 = half2(i, x), deficit = other;
        other = g1 + g2 - deficit;
        d = fma(h1 - h2, g1 - g2, fma(h1 + h2, deficit, d * other));
        h1 *= g1 + g1;
        h2 *= g2 + g2;
      } else {
        d *= other;
      }
      t *= other;
      if (rows_t[i]) t = fma(rows_t[i][x], k, t);
      k *= other;
    }
    d_out[x] = d;
    if (t_out) t_out[x] = t;
  }
}

// Steps that treat each position on its own.
template <bool kWide, class T>
void apply_row(const Work<T>& work, const Instance& instance, const Place& at) {
  const Plane<T>& out = work.plane(instance);
  Vec<T>* d_out = out.row_d(at.z, at.y, at.x);
  Vec<T>* t_out = out.row_t(at.z, at.y, at.x);
  const Instance& input = work.input(instance);
  const Plane<T>& in = work.plane(input);
  const Vec<T>* d = in.row_d(at.z, at.y, at.x);
  const Vec<T>* t = in.row_t(at.z, at.y, at.x);
  switch (instance.kind) {
    case Kind::kTied:
      return finish_tied<kWide, 1>(work, instance, FusedDual<T>{}, at,
                                   WindowRows<T>{1, input.has_ntk, {d - at.x}, {t ? t - at.x : t}});
    case Kind::kDual:
      return dual<kWide>(work, instance, at, d, t, d_out, t_out);
    case Kind::kRescale:
      return rescale<kWide>(work, instance, at, d, t, d_out, t_out);
    case Kind::kDropout:
      return dropout<kWide>(work, instance, at, d, t, d_out, t_out);
    case Kind::kSum:
      return sum(work, instance, at, d_out, t_out);
    case Kind::kProduct:
      return product<kWide>(work, instance, at, d_out, t_out);
    case Kind::kAsCovariance:
      return as_covariance<kWide>(work, instance, at, d, t, d_out, t_out);
    case Kind::kLoad:
      return;  // the head of a pass, never one of its row operations
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
