// Derivatives of any activation, by its Hermite coefficients.
#pragma once

#include "backward_partials.h"
#include "duals_tabulated.h"

namespace nt {
namespace NT_LEVEL {

// With a_k and b_k the coefficients at the variances s1^2 and s2^2, whose derivatives are
//   da_k / dvar1 = (k a_k + sqrt((k + 1) (k + 2)) a_(k+2)) / (2 var1),
// and with s1 s2 E f'(u) f'(v) = S, the sum of k a_k b_k c^(k-1), and X1 = var1 E f''(u) f(v), that of
// sqrt((k + 1) (k + 2)) a_(k+2) b_k c^k:
//   d/dhalf1 of the deficit after   gain1 - S / (s1 s2) - X1 / var1,
//   d/dhalf1 of the factor          (dX1/dc / var1 + dS/dc / (s1 s2)) / (s1 s2),
//   d/ddeficit of the factor        -dS/dc / (s1 s2)^2,
// with gain1 of half the variance after. What is beyond the terms changes with the deficit alone: in the others a_(k+2)
// takes away what a_k adds, and the last a_k, for which it is not there, are left out.
template <class T>
class TabulatedPartials {
  using V = Vec<T>;
  using D = Tabulated<T>;

 public:
  static constexpr int kCoefficients = 0;

  TabulatedPartials(const T* numbers, const Table& table) : dual_(numbers, table) {}

  template <class Numbers>
  NT_INLINE V half_back(const Numbers& numbers, V bar, V*) const {
    return bar * numbers[D::kGain];
  }

  template <class First, class Second>
  NT_INLINE Partials<T> operator()(V deficit, const First& first, const Second& second, V, V, V*) const {
    Partials<T> p;
    dual_.template apply<false, true>(deficit, first, second, p.value, p.factor);
    const Pair pair = dual_.pair(deficit, first, second);
    Sums sums = of_terms(pair, first, second);
    V bend = sums.bend + sums.last_bend;
    dual_.add_bend_of_rest(pair, first, second, bend);
    if (dual_.cusp() != 0) add_cusp(pair, sums, bend);
    const V inverse1 = first[D::kInverse], inverse2 = second[D::kInverse];
    const V per_bend = sums.bend * pair.inverse * pair.inverse;
    p.factor_deficit = -bend * pair.inverse * pair.inverse;
    p.factor_half1 = fma(sums.slope_up1 * inverse1 * inverse1, pair.inverse, per_bend);
    p.factor_half2 = fma(sums.slope_up2 * inverse2 * inverse2, pair.inverse, per_bend);
    p.value_half1 = first[D::kGain] - sums.slope * pair.inverse - sums.up1 * inverse1 * inverse1;
    p.value_half2 = second[D::kGain] - sums.slope * pair.inverse - sums.up2 * inverse2 * inverse2;
    return p;
  }

 private:
  using Pair = typename D::Pair;

  // S, X1, X2 and their derivatives in c. Of those of S, what the last terms add if there are others beyond.
  struct Sums {
    V slope{}, bend{}, last_bend{}, up1{}, up2{}, slope_up1{}, slope_up2{};
  };

  // Of a pair and one term: a_k b_k and the products with sqrt((k + 1) (k + 2)) a_(k+2) and b_(k+2), less those of the
  // cusp.
  struct Products {
    V both, up1, up2;
  };

  template <class First, class Second>
  NT_INLINE Products products(const Pair& pair, const First& first, const Second& second, int term,
                              const typename D::TwoUp& up) const {
    const V a = first[D::kValues + term], b = second[D::kValues + term], lift = broadcast(up.lift);
    Products p{a * b, lift * first[D::kValues + up.term] * b, lift * second[D::kValues + up.term] * a};
    if (dual_.cusp() == 0) return p;
    const V cusp = broadcast(dual_.square_of_cusp(term)) * pair.scale, of_cusp = broadcast(up.of_cusp);
    const V less = broadcast(static_cast<T>(dual_.table().order(term) - 1));
    p.both -= cusp;
    p.up1 += fma(of_cusp * first[D::kStd], b, less * cusp);
    p.up2 += fma(of_cusp * second[D::kStd], a, less * cusp);
    return p;
  }

  template <class First, class Second>
  NT_INLINE Sums of_terms(const Pair& pair, const First& first, const Second& second) const {
    const Table& table = dual_.table();
    const V zero{}, c = pair.c, square_c = c * c, step = table.step == 1 ? c : square_c;
    const V rest = dual_.has_rest(first, second);
    V power = table.start == 2 ? broadcast(T(1)) : c;  // c^(k - 2)
    Sums sums;                                         // of orders from 2 on, with this power in the place of others
    for (int term = 2; term < pair.most; ++term) {
      const auto up = dual_.two_up(term);
      const int k = table.order(term);
      const V order = broadcast(static_cast<T>(k)) * power, less = broadcast(static_cast<T>(k - 1));
      const Products p = products(pair, first, second, term, up);
      const V inner = up.is_beyond ? if_positive(rest, zero, p.both) : p.both;
      if (up.is_beyond) {
        sums.last_bend = fma(p.both - inner, order * less, sums.last_bend);
      } else {
        sums.up1 = fma(p.up1, power, sums.up1);
        sums.up2 = fma(p.up2, power, sums.up2);
        sums.slope_up1 = fma(p.up1, order, sums.slope_up1);
        sums.slope_up2 = fma(p.up2, order, sums.slope_up2);
      }
      const V slope = inner * order;
      sums.slope += slope;
      sums.bend = fma(slope, less, sums.bend);
      power *= step;
    }
    sums.slope *= c;
    sums.slope_up1 *= c;
    sums.slope_up2 *= c;
    sums.up1 *= square_c;
    sums.up2 *= square_c;
    const Products constant = products(pair, first, second, 0, dual_.two_up(0));
    const Products linear = products(pair, first, second, 1, dual_.two_up(1));
    sums.slope += dual_.two_up(1).is_beyond ? if_positive(rest, zero, linear.both) : linear.both;
    sums.slope_up1 += linear.up1;
    sums.slope_up2 += linear.up2;
    sums.up1 += fma(c, linear.up1, constant.up1);
    sums.up2 += fma(c, linear.up2, constant.up2);
    return sums;
  }

  // With h |x| the cusp: E f'(u) f'(v) = h^2 2 asin(c) / pi, and var1 E f''(u) f(v) = h^2 2 s1 s2 sin / pi. At zero
  // variance these have no derivatives, nor has the first where the variables are parallel.
  NT_INLINE void add_cusp(const Pair& pair, Sums& sums, V& bend) const {
    const V zero{}, one = broadcast(T(1)), w = pair.from_parallel, sine = sqrt(w * (broadcast(T(2)) - w));
    const T size = dual_.cusp() * dual_.cusp() * T(2) / kPi<T>;
    const V scale = broadcast(size) * if_positive(pair.both_vary, pair.scale, zero);
    const V regular = sine - broadcast(kSmallestSine<T>);
    const V per_sine = if_positive(regular, one / if_positive(regular, sine, one), zero);
    sums.slope += dual_.slope_of_cusp(pair);
    sums.bend = fma(scale, per_sine, sums.bend);
    bend = fma(scale, per_sine, bend);
    sums.up1 = fma(scale, sine, sums.up1);
    sums.up2 = fma(scale, sine, sums.up2);
    const V slope_up = -scale * pair.c * per_sine;
    sums.slope_up1 += slope_up;
    sums.slope_up2 += slope_up;
  }

  D dual_;
};

}  // namespace NT_LEVEL
}  // namespace nt
