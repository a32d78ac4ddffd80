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
// with gain1 of half the variance after. Of what is beyond the terms the sums are known and their derivatives.
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
    const Pair pair = dual_.pair(deficit, first, second);
    dual_.template apply<false, true>(pair, first, second, p.value, p.factor);
    p.value_deficit = p.factor;
    Sums sums = of_terms(pair, first, second);
    if (dual_.cusp() != 0) add_cusp(pair, sums);
    const V inverse = pair.inverse, inverse1 = first[D::kInverse], inverse2 = second[D::kInverse];
    const V per_bend = sums.bend * inverse * inverse;
    p.factor_deficit = -per_bend;
    p.factor_half1 = fma(sums.slope_up1 * inverse1 * inverse1, inverse, per_bend);
    p.factor_half2 = fma(sums.slope_up2 * inverse2 * inverse2, inverse, per_bend);
    p.value_half1 = first[D::kGain] - sums.slope * inverse - sums.up1 * inverse1 * inverse1;
    p.value_half2 = second[D::kGain] - sums.slope * inverse - sums.up2 * inverse2 * inverse2;
    if (pair.most == dual_.table().terms) {
      dual_.template for_each_share<true>(
          first, second, pair, [&](const typename D::Share& share) { add_share(share, pair, first, second, p); });
    }
    // There are none in variances of 0, where some are infinite.
    for (V* of_first : {&p.value_half1, &p.factor_half1}) *of_first = if_positive(first[D::kHalf], *of_first, V{});
    for (V* of_second : {&p.value_half2, &p.factor_half2}) *of_second = if_positive(second[D::kHalf], *of_second, V{});
    return p;
  }

 private:
  using Pair = typename D::Pair;

  // S, X1, X2 and their derivatives in c, of the terms.
  struct Sums {
    V slope{}, bend{}, up1{}, up2{}, slope_up1{}, slope_up2{};
  };

  // Of a pair and one term: a_k b_k and the products with sqrt((k + 1) (k + 2)) a_(k+2) and b_(k+2), less those of the
  // cusp.
  struct Products {
    V both, up1, up2;
  };

  template <class First, class Second>
  NT_INLINE Products products(const First& first, const Second& second, int term) const {
    const auto up = dual_.two_up(term);
    const V a = first[D::kValues + term], b = second[D::kValues + term], lift = broadcast(up.lift);
    const V up1 = lift * first[D::kValues + up.place], up2 = lift * second[D::kValues + up.place];
    Products p{a * b, up1 * b, up2 * a};
    if (dual_.cusp() == 0) return p;
    const V cusp = broadcast(dual_.cusp(term)), less = broadcast(static_cast<T>(dual_.table().order(term) - 1));
    // What grows with a deviation has no derivative at 0.
    const V cusp1 = cusp * if_positive(first[D::kHalf], first[D::kStd], V{});
    const V cusp2 = cusp * if_positive(second[D::kHalf], second[D::kStd], V{});
    p.both += fma(a, cusp2, cusp1 * b);
    p.up1 += fma(up1, cusp2, -less * cusp1 * b);
    p.up2 += fma(up2, cusp1, -less * cusp2 * a);
    return p;
  }

  template <class First, class Second>
  NT_INLINE Sums of_terms(const Pair& pair, const First& first, const Second& second) const {
    const Table& table = dual_.table();
    const V c = pair.c, square_c = c * c, step = table.step == 1 ? c : square_c;
    V power = table.start == 2 ? broadcast(T(1)) : c;  // c^(k - 2)
    Sums sums;                                         // of orders from 2 on, with this power in the place of others
    for (int term = 2; term < pair.most; ++term) {
      const int k = table.order(term);
      const V order = broadcast(static_cast<T>(k)) * power, less = broadcast(static_cast<T>(k - 1));
      const Products p = products(first, second, term);
      const V slope = p.both * order;
      sums.slope += slope;
      sums.bend = fma(slope, less, sums.bend);
      sums.up1 = fma(p.up1, power, sums.up1);
      sums.up2 = fma(p.up2, power, sums.up2);
      sums.slope_up1 = fma(p.up1, order, sums.slope_up1);
      sums.slope_up2 = fma(p.up2, order, sums.slope_up2);
      power *= step;
    }
    const Products constant = products(first, second, 0), linear = products(first, second, 1);
    sums.slope = fma(sums.slope, c, linear.both);
    sums.slope_up1 = fma(sums.slope_up1, c, linear.up1);
    sums.slope_up2 = fma(sums.slope_up2, c, linear.up2);
    sums.up1 = fma(sums.up1, square_c, fma(c, linear.up1, constant.up1));
    sums.up2 = fma(sums.up2, square_c, fma(c, linear.up2, constant.up2));
    return sums;
  }

  // With h |x| the cusp: E f'(u) f'(v) = h^2 2 asin(c) / pi, and var1 E f''(u) f(v) = h^2 2 s1 s2 sin / pi. At zero
  // variance these have no derivatives, nor has the first where the variables are parallel.
  NT_INLINE void add_cusp(const Pair& pair, Sums& sums) const {
    const V zero{}, one = broadcast(T(1)), w = pair.from_parallel, sine = sqrt(w * (broadcast(T(2)) - w));
    const T size = dual_.cusp() * dual_.cusp() * T(2) / kPi<T>;
    const V scale = broadcast(size) * if_positive(pair.both_vary, pair.scale, zero);
    const V regular = sine - broadcast(kSmallestSine<T>);
    const V per_sine = if_positive(regular, one / if_positive(regular, sine, one), zero);
    sums.slope += dual_.slope_of_cusp(pair);
    sums.bend = fma(scale, per_sine, sums.bend);
    sums.up1 = fma(scale, sine, sums.up1);
    sums.up2 = fma(scale, sine, sums.up2);
    const V slope_up = -scale * pair.c * per_sine;
    sums.slope_up1 += slope_up;
    sums.slope_up2 += slope_up;
  }

  // What is beyond the terms, with its derivative in the correlation, which half1 changes by 1/(s1 s2) - c/var1 where
  // the deficit stays; and those of its sums in the variances. Of how a rest is spread over orders there are none.
  template <class First, class Second>
  NT_INLINE void add_share(const typename D::Share& share, const Pair& pair, const First& first, const Second& second,
                           Partials<T>& p) const {
    const V zero{}, one = broadcast(T(1)), inverse = pair.inverse;
    const V sum_of_slopes = if_positive(pair.both_vary, share.slopes, zero);
    const V slope = sum_of_slopes * share.power, bend = sum_of_slopes * share.bend;
    const auto add = [&](V one_over_std, V both_half, V slopes_half, V& value_half, V& factor_half) {
      const V own_inverse = if_positive(pair.both_vary, one_over_std, zero);
      const V per_variance = own_inverse * own_inverse, turn = inverse - pair.c * per_variance;
      value_half -= fma(slope, turn, both_half * (one - share.missing));
      factor_half += inverse * (fma(bend, turn, slopes_half * share.power) - slope * per_variance);
    };
    add(first[D::kInverse], share.both_half1, share.slopes_half1, p.value_half1, p.factor_half1);
    add(second[D::kInverse], share.both_half2, share.slopes_half2, p.value_half2, p.factor_half2);
    p.factor_deficit = fma(-bend * inverse, inverse, p.factor_deficit);
  }

  D dual_;
};

}  // namespace NT_LEVEL
}  // namespace nt
