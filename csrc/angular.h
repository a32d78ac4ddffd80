// Programs without positions: what the primitives do to angular deficits.
//
// Of a pair with the correlation c, the angular deficit is 1 - |c| with the sign of c. Neither inputs on a line nor
// nearly parallel and antiparallel ones cost it digits, whatever their lengths, where (var1 + var2)/2 - K would cancel.
// See docs/cpu-engine.md.
#pragma once

#include "primitives.h"

namespace nt {
namespace NT_LEVEL {

// What stands for 1 - |c| = 0 of antiparallel samples: the sign of a zero would be lost in products.
template <class T>
inline constexpr T kAntiparallel = sizeof(T) == sizeof(float) ? T(1e-30) : T(1e-200);

template <class V>
NT_INLINE V absolute(V x) {
  return max(x, -x);
}

// The angular deficit 1 - |c|, with the sign of c.
template <class T>
NT_INLINE Vec<T> angular(Vec<T> magnitude, Vec<T> is_negative) {
  return if_positive(is_negative, -max(magnitude, broadcast(kAntiparallel<T>)), magnitude);
}

// The same from 1 - c and 1 + c, each of which is accurate where it is small.
template <class T>
NT_INLINE Vec<T> nearer(Vec<T> from_parallel, Vec<T> from_antiparallel) {
  return angular<T>(min(from_parallel, from_antiparallel), from_parallel - from_antiparallel);
}

// 1 - c, and 1 + c.
template <class T>
struct Distances {
  Vec<T> from_parallel, from_antiparallel;

  explicit NT_INLINE Distances(Vec<T> u) {
    const Vec<T> two = broadcast(T(2)), negative = -u;
    from_parallel = if_positive(negative, two + u, u);
    from_antiparallel = if_positive(negative, negative, two - u);
  }
};

template <class T>
NT_INLINE Vec<T> correlation(Vec<T> u) {
  return if_positive(-u, broadcast(T(-1)) - u, broadcast(T(1)) - u);
}

// Products of numbers of both samples of each pair of a row.
template <bool kWide, class T>
class Products {
 public:
  Products(const Work<T>& work, Statistic statistic, int value, const Place& at, int64_t plane = 0)
      : first_(first<kWide>(work, statistic, value, at)), second_(second(work, statistic, value, at)) {
    first_.at += plane * (kWide ? kLanes<T> : work.c.rows);
    second_.at += plane * kLanes<T>;
  }

  NT_INLINE Vec<T> of_first(int x) const { return get<kWide>(first_, x); }
  NT_INLINE Vec<T> of_second(int x) const { return get(second_, x); }
  NT_INLINE Vec<T> operator()(int x) const { return of_first(x) * of_second(x); }
  // Half the squared difference.
  NT_INLINE Vec<T> half_gap(int x) const {
    const Vec<T> difference = of_first(x) - of_second(x);
    return difference * difference * broadcast(T(0.5));
  }

 private:
  Row1<T> first_;
  Row2<T> second_;
};

// The angular deficits of covariances; uncorrelated where a variance is 0.
template <bool kWide, class T>
void from_covariance_angular(const Work<T>& work, int value, const Place& at, Vec<T>* d) {
  using V = Vec<T>;
  const V one = broadcast(T(1));
  const Products<kWide, T> scales(work, Statistic::kStd, value, at);
  for (int x = 0; x < at.n; ++x) {
    const V scale = scales(x), rest = max(V{}, scale - absolute(d[x])) / if_positive(scale, scale, one);
    d[x] = angular<T>(if_positive(scale, rest, one), -d[x]);
  }
}

template <bool kWide, class T>
void as_covariance_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u,
                           const Vec<T>* t, Vec<T>* k_out, Vec<T>* t_out) {
  const Products<kWide, T> scale(work, Statistic::kStd, instance.value, at);
  for (int x = 0; x < at.n; ++x) k_out[x] = scale(x) * correlation<T>(u[x]);
  if (t_out && t_out != t) std::copy(t, t + at.n, t_out);
}

// A bias is a branch that is the same for all samples: see `sum_angular`.
template <bool kWide, class T>
void tied_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u, const Vec<T>* t,
                  Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  const T* c = work.coefficients(value);
  if (t_out) {
    const V w = broadcast(c[0]), own_w = broadcast(c[2]), own_b = broadcast(c[3]);
    const Products<kWide, T> scale(work, Statistic::kStd, value.inputs[0], at);
    for (int x = 0; x < at.n; ++x) {
      const V own = fma(scale(x) * own_w, correlation<T>(u[x]), own_b);
      t_out[x] = t ? fma(t[x], w, own) : own;
    }
  }
  if (c[1] == T(0)) {
    if (u_out != u) std::copy(u, u + at.n, u_out);
    return;
  }
  const Products<kWide, T> weights(work, Statistic::kShares, instance.value, at, 0);
  const Products<kWide, T> biases(work, Statistic::kShares, instance.value, at, 1);
  for (int x = 0; x < at.n; ++x) {
    const Distances<T> from(u[x]);
    const V gaps = weights.half_gap(x) + biases.half_gap(x), share = weights(x);
    const V far = fma(broadcast(T(2)), biases(x), gaps);
    u_out[x] = nearer<T>(fma(share, from.from_parallel, gaps), fma(share, from.from_antiparallel, far));
  }
}

// The ReLU family: a function of the correlation alone, and of the lengths what they are.
template <bool kWide, bool kNtk, bool kCovariance, class T>
void ab_relu_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u, const Vec<T>* t,
                     Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  const T* c = work.coefficients(value);
  const V slope = broadcast(c[0]), kink = broadcast(c[1]), zero{}, one = broadcast(T(1)), two = broadcast(T(2));
  // For slopes a and b: (a - b)^2 / (a^2 + b^2).
  const V ratio = broadcast(c[0] > T(0) ? c[1] / c[0] : T(0));
  const Products<kWide, T> scale(work, Statistic::kStd, value.inputs[0], at);
  for (int x = 0; x < at.n; ++x) {
    const V lengths = scale(x), before = if_positive(lengths, u[x], one), negative = -before;
    const V w = absolute(before), root = sqrt(w);
    const V kappa1 = w * (root * horner<T>(ReluPolynomials<T>::q, w));
    if constexpr (kNtk) {
      const V kappa0 = root * horner<T>(ReluPolynomials<T>::p, w);
      t_out[x] = t[x] * fma(-kink, if_positive(negative, one - kappa0, kappa0), slope);
    }
    if constexpr (kCovariance) {
      const V opposed = kappa1 + if_positive(negative, one - w, zero);
      u_out[x] = lengths * fma(kink, opposed, slope * correlation<T>(before));
    } else {
      const V bent = ratio * kappa1;
      const V near = if_positive(negative, fma(ratio - one, w, two - ratio), w) - bent;
      const V far = if_positive(negative, fma(ratio, one - w, w), two - w) + bent;
      u_out[x] = nearer<T>(near, far);
    }
  }
}

// Any other nonlinearity, by its dual of deficits (var1 + var2)/2 - K, or of the angle itself.
template <bool kWide, bool kNtk, bool kCovariance, class Dual, class T>
void other_dual_angular(const Work<T>& work, const Instance& instance, const Dual& dual, const Place& at,
                        const Vec<T>* u, const Vec<T>* t, Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const auto rows = dual_rows<kWide>(work, instance.value, at);
  const Products<kWide, T> before(work, Statistic::kStd, work.value(instance).inputs[0], at);
  for (int x = 0; x < at.n; ++x) {
    V value, factor;
    const auto first = rows.template first<kWide>(x);
    const auto second = rows.second(x);
    if constexpr (std::is_same_v<Dual, Tabulated<T>>) {
      dual.template apply<kCovariance, kNtk>(dual.pair_at_angle(u[x], first, second), first, second, value, factor);
    } else {
      const V deficit = fma(before(x), Distances<T>(u[x]).from_parallel, before.half_gap(x));
      dual.template apply<kCovariance, kNtk>(deficit, first, second, value, factor);
    }
    if constexpr (kCovariance) {
      u_out[x] = value;
    } else {
      const Products<kWide, T> after(work, Statistic::kStd, instance.value, at);
      const V scale = after(x), one = broadcast(T(1));
      const V apart = max(V{}, value - after.half_gap(x)) / if_positive(scale, scale, one);
      const V near = if_positive(scale, apart, one);
      u_out[x] = nearer<T>(near, broadcast(T(2)) - near);
    }
    if constexpr (kNtk) t_out[x] = t[x] * factor;
  }
}

template <bool kWide, class T>
void dual_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u, const Vec<T>* t,
                  Vec<T>* u_out, Vec<T>* t_out) {
  const Value& value = work.value(instance);
  dispatch(t_out != nullptr, !instance.deficit, [&](auto ntk, auto covariance) {
    with_dual(value.activation, work.coefficients(value), value.table, [&](const auto& dual) {
      if constexpr (std::is_same_v<std::decay_t<decltype(dual)>, AbRelu<T>>) {
        ab_relu_angular<kWide, ntk.value, covariance.value>(work, instance, at, u, t, u_out, t_out);
      } else {
        other_dual_angular<kWide, ntk.value, covariance.value>(work, instance, dual, at, u, t, u_out, t_out);
      }
    });
  });
}

// Scales may be negative.
template <bool kWide, class T>
void rescale_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u, const Vec<T>* t,
                     Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Products<kWide, T> scale(work, Statistic::kScale, instance.value, at);
  for (int x = 0; x < at.n; ++x) {
    const V both = scale(x), before = u[x];
    if (t_out) t_out[x] = t[x] * both;
    u_out[x] = if_positive(-both, angular<T>(absolute(before), correlation<T>(before)), before);
  }
}

template <class T>
void dropout_angular(const Work<T>& work, const Instance& instance, const Place& at, const Vec<T>* u, const Vec<T>* t,
                     Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const T kept = work.coefficients(work.value(instance))[0];
  for (int x = 0; x < at.n; ++x) {
    const V same = same_samples(work.c, work.tile, x, kSame), before = u[x];
    const V other = angular<T>(fma(broadcast(kept), absolute(before), broadcast(T(1) - kept)), -before);
    if (t_out) t_out[x] = if_positive(same, t[x] * broadcast(T(1) / kept), t[x]);
    u_out[x] = if_positive(same, before, other);
  }
}

// With s_i the root of a branch's share of the variance of the sum, (s_1, s_2, ...) is a unit vector for either sample,
// and 1 - sum_i s_i s'_i c_i = sum_i s_i s'_i (1 - c_i) + (s_i - s'_i)^2 / 2.
template <bool kWide, class T>
void sum_angular(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const T* weights = work.coefficients(work.value(instance));
  gather_branches(work, instance, at);
  const auto& rows = work.scratch.branches_d;
  const auto& rows_t = work.scratch.branches_t;
  for (int x = 0; x < at.n; ++x) {
    V near{}, far{}, sum_t{};
    for (size_t k = 0; k < rows.size(); ++k) {
      const Products<kWide, T> shares(work, Statistic::kShares, instance.value, at, static_cast<int64_t>(k));
      const Distances<T> from(rows[k][x]);
      const V share = shares(x), gap = shares.half_gap(x);
      near += fma(share, from.from_parallel, gap);
      far += fma(share, from.from_antiparallel, gap);
      if (t_out && rows_t[k]) sum_t = fma(rows_t[k][x], broadcast(weights[k]), sum_t);
    }
    u_out[x] = nearer<T>(near, far);
    if (t_out) t_out[x] = sum_t;
  }
}

// |c| = |c_1| |c_2| ...
template <bool kWide, class T>
void product_angular(const Work<T>& work, const Instance& instance, const Place& at, Vec<T>* u_out, Vec<T>* t_out) {
  using V = Vec<T>;
  const Value& value = work.value(instance);
  gather_branches(work, instance, at);
  const auto& rows = work.scratch.branches_d;
  const auto& rows_t = work.scratch.branches_t;
  const auto scale = [&](size_t k, int x) { return Products<kWide, T>(work, Statistic::kStd, value.inputs[k], at)(x); };
  for (int x = 0; x < at.n; ++x) {
    V u = rows[0][x], t = rows_t[0] ? rows_t[0][x] : V{}, k = scale(0, x) * correlation<T>(u);
    for (size_t i = 1; i < rows.size(); ++i) {
      const V other = rows[i][x], covariance = scale(i, x) * correlation<T>(other);
      const V a = absolute(u), b = absolute(other);
      u = angular<T>(fma(a, broadcast(T(1)) - b, b), -(correlation<T>(u) * correlation<T>(other)));
      t *= covariance;
      if (rows_t[i]) t = fma(rows_t[i][x], k, t);
      k *= covariance;
    }
    u_out[x] = u;
    if (t_out) t_out[x] = t;
  }
}

// Steps of a program without positions; covariances are what they are elsewhere.
template <bool kWide, class T>
void apply_angular_row(const Work<T>& work, const Instance& instance, const Place& at) {
  const Instance& input = work.input(instance);
  if (!input.deficit) return apply_row<kWide>(work, instance, at);
  const Plane<T>& out = work.plane(instance);
  Vec<T>* u_out = out.row_d(at.z, at.y, at.x);
  Vec<T>* t_out = out.row_t(at.z, at.y, at.x);
  const Plane<T>& in = work.plane(input);
  const Vec<T>* u = in.row_d(at.z, at.y, at.x);
  const Vec<T>* t = in.row_t(at.z, at.y, at.x);
  switch (instance.kind) {
    case Kind::kTied:
      return tied_angular<kWide>(work, instance, at, u, t, u_out, t_out);
    case Kind::kDual:
      return dual_angular<kWide>(work, instance, at, u, t, u_out, t_out);
    case Kind::kRescale:
      return rescale_angular<kWide>(work, instance, at, u, t, u_out, t_out);
    case Kind::kDropout:
      return dropout_angular(work, instance, at, u, t, u_out, t_out);
    case Kind::kSum:
      return sum_angular<kWide>(work, instance, at, u_out, t_out);
    case Kind::kProduct:
      return product_angular<kWide>(work, instance, at, u_out, t_out);
    case Kind::kAsCovariance:
      return as_covariance_angular<kWide>(work, instance, at, u, t, u_out, t_out);
    case Kind::kLoad:
      return;  // the head of a pass, never one of its row operations
  }
}

// Rows of all nonlinearities, which take long to compile, are compiled with engine.cc alone.
#define NT_DUALS(prefix, name, kWide, T)                                                                        \
  prefix template void name<kWide>(const Work<T>&, const Instance&, const Place&, const Vec<T>*, const Vec<T>*, \
                                   Vec<T>*, Vec<T>*);
#define NT_ALL_DUALS(prefix)                    \
  NT_DUALS(prefix, dual, false, float)          \
  NT_DUALS(prefix, dual, false, double)         \
  NT_DUALS(prefix, dual, true, float)           \
  NT_DUALS(prefix, dual, true, double)          \
  NT_DUALS(prefix, dual_angular, false, float)  \
  NT_DUALS(prefix, dual_angular, false, double) \
  NT_DUALS(prefix, dual_angular, true, float)   \
  NT_DUALS(prefix, dual_angular, true, double)
NT_ALL_DUALS(extern)

}  // namespace NT_LEVEL
}  // namespace nt
