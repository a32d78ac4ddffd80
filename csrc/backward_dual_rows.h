// The way back through duals, row by row.
#pragma once

#include "backward_work.h"

namespace nt {
namespace NT_LEVEL {

// Rows of cotangents after a dual: of deficits or covariances, and of tangent kernels.
template <class T>
struct RowsAfter {
  const Vec<T>* d[3];
  const Vec<T>* t[3];
};

// The way back through a dual, row by row: to the cotangents of what is before it.
template <bool kWide, class T>
class DualBack {
  using V = Vec<T>;

 public:
  // `is_first`: nothing was added to the cotangents before the dual yet.
  DualBack(Back<kWide, T>& back, const Instance& instance, bool is_first)
      : back_(back),
        instance_(instance),
        value_(back.work.value(instance)),
        before_(back.work.input(instance)),
        in_(back.work.plane(before_)),
        in_bar_(back.plane(before_)),
        numbers_(dual_rows<kWide>(back.work, instance.value)),
        half_bar1_(back.first(Statistic::kHalfVariance, before_.value, before_.space, {0, 0, 0})),
        half_bar2_(back.second(Statistic::kHalfVariance, before_.value, before_.space, {0, 0, 0})),
        is_first_(is_first) {
    sums_ = instance.deficit && can_sum();
    back.planes[instance.inputs[0]].is_summed = sums_;
    own_share_ = broadcast(has_own_covariance(back.work, before_) && before_.feeds_dual_alone ? T(1) : T(0));
  }

  // Whether cotangents before the dual are written as sums of neighbours, and those after it come as three rows.
  bool sums() const { return sums_; }

  // Of the ReLU family, of the first sample or of the second ones: the factor of variances; the root of half the
  // variance before at a position, and the cotangents of these halves.
  V slope() const { return broadcast(back_.work.coefficients(value_)[0]); }
  V root(std::true_type, int p) const { return numbers_.template first<kWide>(p)[0]; }
  V root(std::false_type, int p) const { return numbers_.second(p)[0]; }
  V* half_bar(bool of_first) const { return of_first ? half_bar1_ : half_bar2_; }

  // Sums of products of cotangents of a row and what they are of.
  struct Products {
    V d{}, t{};  // of what is added up of the row, and of what is added to tangent kernels of its deficits
  };

  // With rows of numbers whose products with `weight`, and of `t` with `own_weight`, are the cotangents of what is
  // after the dual: sums of three rows, or the first ones.
  Products row(const Place& at, const RowsAfter<T>& after, V weight, V own_weight) {
    Products products;
    const T* numbers = back_.work.coefficients(value_);
    with_dual_back<kWide, T>(value_.activation, numbers, value_.table, [&](const auto& dual) {
      dispatch(instance_.has_ntk, !instance_.deficit, [&](auto ntk, auto covariance) {
        const auto run = [&](auto sums, auto coefficients, auto second) {
          products = this->template row<sums.value, coefficients.value, second.value, ntk.value, covariance.value>(
              dual, at, after, weight, own_weight);
        };
        using Yes = std::true_type;
        using No = std::false_type;
        if constexpr (!covariance.value && std::is_same_v<std::decay_t<decltype(dual)>, AbReluBack<T>>) {
          if constexpr (ntk.value) {
            if (sums_ && !back_.bars.wants_coefficients) {
              return back_.bars.wants_second ? run(Yes{}, No{}, Yes{}) : run(Yes{}, No{}, No{});
            }
          }
          if (sums_) return run(Yes{}, Yes{}, Yes{});
        }
        run(No{}, Yes{}, Yes{});
      });
    });
    return products;
  }

 private:
  bool can_sum() const {
    const Stage& stage = back_.work.stage;
    if (back_.work.c.one_position || stage.wrapped[2] || stage.pad_low < 1 || stage.pad_high < 1) return false;
    if (value_.activation != Activation::kAbRelu || !before_.feeds_dual_alone || !before_.deficit) return false;
    return back_.work.value(before_).window[2].is_three_in_turn() &&
           (!before_.has_ntk || has_own_covariance(back_.work, before_));
  }

  // Without `kCoefficients` and `kSecond` those cotangents are left out.
  template <bool kSums, bool kCoefficients, bool kSecond, bool kNtk, bool kCovariance, class Dual>
  Products row(const Dual& shared, const Place& at, const RowsAfter<T>& after, V weight, V own_weight) {
    const V* d = in_.row_d(at.z, at.y, at.x);
    const V* t = in_.row_t(at.z, at.y, at.x);
    V* bar_d = is_first_ ? in_bar_.row_d(at.z, at.y, at.x) : back_.scratch.rows_d.data();
    V* bar_t = is_first_ ? in_bar_.row_t(at.z, at.y, at.x) : back_.scratch.rows_t.data();
    const int64_t p1 = position(at.geometry.space, at.first), p2 = position(at.geometry.space, at.second);
    V *bar1 = half_bar1_ + p1, *bar2 = half_bar2_ + p2;
    const auto numbers = numbers_.from(p1, p2);
    const Dual dual = shared;
    const V own_share = own_share_;
    const int width = at.geometry.space[2];  // cotangents are asked for one row ahead
    CoefficientBars<T, Dual> coefficients{};
    V products_d{}, products_t{};  // in registers
    constexpr int kRows = kSums ? 3 : 1;
    const V* const rows_d[3] = {after.d[0] + at.x, after.d[1] + at.x, after.d[2] + at.x};
    const V* const rows_t[3] = {after.t[0] + at.x, after.t[1] + at.x, after.t[2] + at.x};
    ThreeInTurn<V> three_d{bar_d}, three_t{bar_t};
    for (int x = 0; x < at.n; ++x) {
      const V after_d = sum_across<kRows>(rows_d, x), after_t = sum_across<kRows>(rows_t, x);
      __builtin_prefetch(bar1 + x + width, 1);
      if constexpr (kSecond) __builtin_prefetch(bar2 + x + width, 1);
      const V value_bar = fma(own_weight, after_t, weight * after_d);
      const V tangent_bar = kNtk ? weight * after_t : V{}, tangent = kNtk ? t[x] : V{};
      auto in = dual.template apply<kCovariance, kNtk>(d[x], tangent, numbers.template first<kWide>(x),
                                                       numbers.second(x), value_bar, tangent_bar, coefficients.data());
      products_d = fma(after_d, in.value, products_d);
      products_t = fma(after_t, in.value, products_t);
      if constexpr (kNtk) {
        products_d = fma(after_t, in.tangent_after, products_d);
        const V own = own_share * in.tangent;
        in.deficit -= own;
        in.half1 += own;
        in.half2 += own;
        kSums ? three_t.put(x, in.tangent) : void(bar_t[x] = in.tangent);
      }
      kSums ? three_d.put(x, in.deficit) : void(bar_d[x] = in.deficit);
      bar1[x] += in.half1;
      if constexpr (kSecond) bar2[x] += in.half2;
    }
    if constexpr (kSums) {
      three_d.end(at.n);
      if (kNtk) three_t.end(at.n);
    } else if (!is_first_) {
      add(bar_d, at.n, in_bar_.row_d(at.z, at.y, at.x));
      if (kNtk) add(bar_t, at.n, in_bar_.row_t(at.z, at.y, at.x));
    }
    if constexpr (!kCoefficients) return {};
    for (int k = 0; k < Dual::kCoefficients; ++k) back_.add_coefficient(value_, k, coefficients[k]);
    return {products_d, products_t};
  }

  static void add(const V* row, int n, V* to) {
    for (int x = 0; x < n; ++x) to[x] += row[x];
  }

  const Back<kWide, T>& back_;
  const Instance& instance_;
  const Value& value_;
  const Instance& before_;
  const Plane<T>& in_;
  const Plane<T>& in_bar_;
  // From the first position on: numbers of the dual, and cotangents of half the variances before it.
  const DualRows<T> numbers_;
  V *const half_bar1_, *const half_bar2_;
  const bool is_first_;
  bool sums_;
  V own_share_;  // 1 if tangent kernels before it got the covariance there, else 0
};

}  // namespace NT_LEVEL
}  // namespace nt
