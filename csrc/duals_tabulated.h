// Any activation, by its Hermite coefficients, which tables give for a variance.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "duals_common.h"
#include "duals_relu.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

// With a_k and b_k the coefficients at the variances of u and v, w = 1 - c for a correlation c, and e_k = 1 - c^k, the
// deficit after is the sum of (a_k - b_k)^2 / 2 + a_k b_k e_k. What is beyond the terms, of the even and of the odd
// part of the function, is taken for terms that decay like a power of their order. What is of |x| in a function with a
// kink at 0, its cusp, is left out of all sums, and has its closed form: see nt_core/activations/numerical.py.
template <class T>
class Tabulated {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  // Then a_k, of the rest roots and orders, and what is beyond the terms of the products with the cusp.
  enum Number { kHalfAfter, kHalf, kStd, kInverse, kTerms, kValues };
  static constexpr int kNumbers = kValues + 6;

  Tabulated(const T* numbers, const Table& table)
      : numbers_(numbers),
        cusps_(numbers + table.size() - table.terms),
        square_of_cusp_(cusps_[-1]),
        has_cusp_(square_of_cusp_ > 0),
        table_(table) {}

  V prepare(V half, V* numbers) const {
    std::fill(numbers, numbers + kNumbers + table_.terms, V{});
    std::vector<T> scratch(table_.columns());
    for (int l = 0; l < kL; ++l) {
      const auto put = [&](int k, T number) { numbers[k][l] = number; };
      put(kHalf, half[l]);
      prepare(half[l] + half[l], scratch, put);
    }
    return numbers[kHalfAfter];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), zero{};
    for (int k = kHalf; k < kValues + 2; ++k) fetch_ahead(second, k);
    const V difference = first[kHalf] - second[kHalf];
    const Angular<T> a = angular_deficit<T>(deficit, difference + difference, first[kStd], second[kStd]);
    const V inverse = first[kInverse] * second[kInverse];
    // Inputs of variance 0 are uncorrelated.
    const V both_vary = if_positive(first[kHalf], second[kHalf], zero);
    const V w = min(broadcast(T(2)), a.angular * inverse), c = if_positive(both_vary, one - w, zero);
    const V plus = one + c, square_c = c * c;
    const bool by_two = table_.step == 2;
    const V power = by_two ? square_c : c, one_minus_power = by_two ? w * plus : w;
    // With p_m the a_k b_k of the orders k = start + step m, x = c^step and P_j the sum of the p_m for m >= j: the sum
    // R of P_(j + 1) x^j, for which (1 - x) R is the sum of p_m (1 - x^m), and its derivative, from the last term to
    // the first. Each pair has as many terms as its samples need; those that another one needs do not change it.
    const V terms = max(first[kTerms], second[kTerms]);
    const int most = static_cast<int>(largest(terms)), least = -static_cast<int>(largest(-terms));
    V suffix = zero, sum = zero, derivative = zero, square = zero;
    const V std_apart = first[kStd] - second[kStd], square_of_std_apart = std_apart * std_apart;
    const auto add_term = [&](int k, auto is_for_all) {
      fetch_ahead(second, kValues + k);
      V both = first[kValues + k] * second[kValues + k], apart = first[kValues + k] - second[kValues + k];
      if (has_cusp_) both = fma(broadcast(-cusps_[k]), a.scale, both);
      if constexpr (!is_for_all.value) {
        const V is_needed = terms - broadcast(T(k));
        both = if_positive(is_needed, both, zero);
        apart = if_positive(is_needed, apart, zero);
        if (has_cusp_) square = fma(if_positive(is_needed, broadcast(-cusps_[k]), zero), square_of_std_apart, square);
      } else if (has_cusp_) {
        square = fma(broadcast(-cusps_[k]), square_of_std_apart, square);
      }
      square = fma(apart, apart, square);
      suffix += both;
    };
    const auto add = [&](int k, auto is_for_all) {
      add_term(k, is_for_all);
      if constexpr (kNtk) derivative = fma(power, derivative, sum);
      sum = fma(power, sum, suffix);
    };
    int k = most - 1;
    for (; k > 2 && k >= least; --k) add(k, std::false_type{});
    for (; k > 2; --k) add(k, std::true_type{});
    if (most > 2) add_term(2, std::false_type{});
    const V missing = one_minus_power * sum;  // P_0 less the sum of p_m x^m
    const V one_minus_start = table_.start == 2 ? w * plus : w * fma(c, plus, one);
    const V before_start = table_.start == 2 ? c : square_c;  // the power of c that is one less
    V after = fma(before_start * c, missing, suffix * one_minus_start), slope = zero;
    if constexpr (kNtk) {
      const V start = broadcast(T(table_.start)), step = broadcast(T(table_.step));
      const V within = step * power * (sum - one_minus_power * derivative);
      slope = before_start * fma(start, suffix - missing, within);
    }
    const V linear = first[kValues + 1] * second[kValues + 1];
    after = fma(w, linear, after);
    slope += linear;
    for (int low = 0; low < 2; ++low) {
      const V apart = first[kValues + low] - second[kValues + low];
      square = fma(apart, apart, fma(broadcast(-cusps_[low]), square_of_std_apart, square));
    }
    after = fma(half, square, after);
    if (has_cusp_) {
      const V distance = distance_from_parallel<T>(deficit, a.angular, a.angular - a.scale, a.scale, first[kInverse],
                                                   second[kInverse]);
      add_cusp<kNtk>(if_positive(both_vary, distance, one), c, a.scale, square_of_std_apart, after, slope);
    }
    if (most == table_.terms) {  // these were not enough
      add_rest<kNtk>(0, first, second, w, after, slope);
      add_rest<kNtk>(1, first, second, w, after, slope);
    }
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = slope * inverse;
  }

 private:
  // Where the root of what is beyond the terms is, of a parity; two after it, its order.
  int root(int parity) const { return kValues + table_.terms + parity; }
  // Where `beyond` of a cusp is; after it, `beyond_slope`.
  int beyond_cusp() const { return kValues + table_.terms + 4; }

  // The numbers of one sample and position, with the variance `var`.
  template <class Put>
  void prepare(T var, std::vector<T>& at, const Put& put) const {
    const T lowest = std::ldexp(T(1), table_.lowest);
    const int columns = table_.columns(), rows = table_.degree + 1;
    int exponent = 0;
    std::frexp(var, &exponent);
    const int octave = var < lowest ? 0 : exponent - 1 - table_.lowest;
    if (!(octave < table_.octaves)) {  // or NaN
      for (int k = 0; k < kNumbers + table_.terms; ++k) put(k, std::numeric_limits<T>::quiet_NaN());
      put(kTerms, T(1));
      return;
    }
    const T deviation = std::max(std::sqrt(var), kSmallest);
    const T place = var < lowest ? T(-1) : std::ldexp(var, 2 - exponent) - T(3);  // in the octave, from -1 to 1
    std::fill(at.begin(), at.end(), T(0));
    for (int row = rows - 1; row >= 0; --row) {
      const T* of_row = numbers_ + (int64_t{octave} * rows + row) * columns;
      for (int k = 0; k < columns; ++k) at[k] = at[k] * place + of_row[k];
    }
    const T* after_table = numbers_ + int64_t{table_.octaves} * rows * columns;
    T* others = at.data() + table_.terms;
    for (int k = 1; k < 3; ++k) others[k] = std::max(T(0), others[k]);
    if (var < lowest) extend(after_table + table_.octaves, deviation, std::sqrt(lowest), at.data(), others);
    put(kHalfAfter, others[0]);
    put(kStd, deviation);
    put(kInverse, T(1) / deviation);
    const T count = after_table[octave], all = static_cast<T>(table_.terms);
    put(kTerms, count >= T(1) && count <= all ? count : all);
    for (int parity = 0; parity < 2; ++parity) {
      put(root(parity), others[1 + parity]);
      put(root(parity) + 2, std::max(static_cast<T>(table_.order(table_.terms)), others[3 + parity]));
    }
    for (int k = 0; k < 2; ++k) put(beyond_cusp() + k, others[5 + k]);
    for (int k = 0; k < table_.terms; ++k) put(kValues + k, at[k]);
  }

  // From the deviation where the first octave begins to one below it.
  void extend(const T* at_zero_and_exponents, T deviation, T lowest, T* at, T* others) const {
    const T at_zero = at_zero_and_exponents[0], ratio = deviation / lowest, var = deviation * deviation;
    const T* exponents = at_zero_and_exponents + 1;
    T square = square_of_cusp_ * var;
    for (int k = 0; k < table_.terms; ++k) {
      const T constant = k == 0 ? at_zero : T(0);
      at[k] = constant + (at[k] - constant) * std::pow(ratio, exponents[k]);
      square += at[k] * at[k] - cusps_[k] * var;
    }
    for (int k = 1; k < 3; ++k) {
      others[k] *= ratio;  // only kinks at 0 leave a rest there
      square += others[k] * others[k];
    }
    for (int k = 5; k < 7; ++k) others[k] *= ratio * ratio;
    others[0] = T(0.5) * (square + T(2) * deviation * others[5]);
  }

  // Adds the closed form of the cusp, for 1 - |c|.
  template <bool kNtk>
  NT_INLINE void add_cusp(V w, V c, V scale, V square_of_std_apart, V& after, V& slope) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), two = broadcast(T(2)), square = broadcast(square_of_cusp_);
    const V root = sqrt(w), bent = w - two * w * root * horner<T>(ReluPolynomials<T>::q, w);
    after = fma(square, fma(scale, bent, half * square_of_std_apart), after);
    if constexpr (kNtk) {
      const V straight = one - two * root * horner<T>(ReluPolynomials<T>::p, w);
      slope = fma(square * scale, if_positive(-c, -straight, straight), slope);
    }
  }

  // Adds what is beyond the terms: of functions with kinks, or of large variances.
  template <bool kNtk, class First, class Second>
  NT_INLINE void add_rest(int parity, const First& first, const Second& second, V w, V& after, V& slope) const {
    const V one = broadcast(T(1)), two = broadcast(T(2)), half = broadcast(T(0.5));
    const V root1 = first[root(parity)], root2 = second[root(parity)], apart = root1 - root2;
    V both = root1 * root2, slopes = half * both * (first[root(parity) + 2] + second[root(parity) + 2]);
    V square = half * apart * apart;
    if (parity == 0 && has_cusp_) {
      const int beyond = beyond_cusp();
      const auto with_cusp = [&](int k) { return first[kStd] * second[k] + first[k] * second[kStd]; };
      both += with_cusp(beyond);
      slopes += with_cusp(beyond + 1);
      square = fma(first[kStd] - second[kStd], first[beyond] - second[beyond], square);
    } else if (!any_positive(max(root1, root2))) {
      return;
    }
    const V is_negative = w - one;
    const V quotient = slopes / if_positive(max(both, -both), both, one);
    const V mean_order = max(broadcast(static_cast<T>(table_.order(table_.terms))), quotient);
    // Uncorrelated pairs have no rest.
    const V away = min(if_positive(is_negative, two - w, w), broadcast(1 - std::numeric_limits<T>::epsilon()));
    V log;
    for (int l = 0; l < kL; ++l) log[l] = std::log1p(-away[l]);
    // The number of all terms, with those that are zero, is even.
    const V least = broadcast(static_cast<T>(table_.order(table_.terms) / 2 * 2 - 1 + parity));
    const V spread = one - least / mean_order;
    constexpr int kNodes = std::size(kRest);
    V orders[kNodes], mean{};
    for (int k = 0; k < kNodes; ++k) {
      orders[k] = exp_pair<T>(broadcast(static_cast<T>(-kRest[k][0])) * spread).exp;
      mean = fma(broadcast(static_cast<T>(kRest[k][1])), orders[k], mean);
    }
    V complement{}, power{};  // the mean of 1 - |c|^order, and of order |c|^(order - 1)
    for (int k = 0; k < kNodes; ++k) {
      const V order = mean_order / mean * orders[k], share = broadcast(static_cast<T>(kRest[k][1]));
      complement = fma(-share, exp_pair<T>(order * log).expm1, complement);
      if constexpr (kNtk) power = fma(share * order, exp_pair<T>((order - one) * log).exp, power);
    }
    const bool odd = parity == 1;
    const V mirrored = odd ? two - complement : complement;
    after = fma(both, if_positive(is_negative, mirrored, complement), after + square);
    if constexpr (kNtk) slope = fma(slopes / mean_order, odd ? power : if_positive(is_negative, -power, power), slope);
  }

  // As in numerical.py: log v^3 at nodes of Gauss-Legendre quadrature on [0, 1], and 3 v^2 times their weights.
  static constexpr double kRest[][2] = {
      {-10.164969966564319, 0.0002929884291465835}, {-5.3265606065525235, 0.015527955520636258},
      {-2.8973064430179774, 0.10171877096492274},   {-1.4374499430644678, 0.26919863430200541},
      {-0.55680389216500115, 0.37333636308428264},  {-0.1030453635607588, 0.23992528769900631}};

  // In the place of deviations of zero: the factor divides by them.
  static constexpr T kSmallest = sizeof(T) == sizeof(float) ? T(0x1p-55) : T(0x1p-500);

  const T* numbers_;
  const T* cusps_;  // the squares of the coefficients of the cusp, at a variance of 1
  T square_of_cusp_;
  bool has_cusp_;
  Table table_;
};

}  // namespace NT_LEVEL
}  // namespace nt
