// Any activation, by its Hermite coefficients, which tables give for a variance.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "duals_common.h"
#include "duals_groups.h"
#include "duals_relu.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

// With a_k and b_k the coefficients at the variances of u and v, w = 1 - c for a correlation c, and e_k = 1 - c^k, the
// deficit after is the sum of (a_k - b_k)^2 / 2 + a_k b_k e_k. What is beyond the terms, of the even and of the odd
// part of the function, is added up in groups of orders, and beyond these, or at variances without groups, taken for
// terms that decay like a power of their order. What is of |x| in a function with a kink at 0, its cusp, is left out of
// all sums, and has its closed form: see docs/numerics.md.
template <class T>
class Tabulated {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  // Then a_k without the cusp; of the rest the roots, the orders, and what is beyond the terms of the products with the
  // cusp; the derivatives of these in half the variance; and for the last terms what `two_up` is of others.
  enum Number { kHalfAfter, kHalf, kStd, kInverse, kTerms, kGain, kValues };
  static constexpr int kNumbers = kValues + 14;

  Tabulated(const T* numbers, const Table& table)
      : numbers_(numbers),
        cusps_(numbers + table.start_of_cusp() + 1),
        cusp_(cusps_[-1]),
        has_cusp_(cusp_ != 0),
        table_(table),
        groups_(numbers, table),
        lifts_(Lifts::get().of_order) {}

  // What the sums over terms need to know of a pair.
  struct Pair {
    V w, c, scale, inverse;  // 1 - c, the correlation, the product of the deviations, and 1 over it
    V from_parallel;         // 1 - |c|
    V both_vary;             // positive, unless a variance is 0: such inputs are uncorrelated
    V terms;                 // how many its samples need
    int most, least;         // the largest and the smallest such number of the pairs that are side by side
  };

  template <class First, class Second>
  NT_INLINE Pair pair(V deficit, const First& first, const Second& second) const {
    const V two = broadcast(T(2)), difference = first[kHalf] - second[kHalf];
    const Angular<T> a = angular_deficit<T>(deficit, difference + difference, first[kStd], second[kStd]);
    const V inverse = first[kInverse] * second[kInverse], w = min(two, a.angular * inverse);
    V from_parallel = min(w, two - w);
    if (has_cusp_) {
      from_parallel = distance_from_parallel<T>(deficit, a.angular, a.angular - a.scale, a.scale, first[kInverse],
                                                second[kInverse]);
    }
    return pair(w, from_parallel, a.scale, inverse, first, second);
  }

  // The same of an angular deficit, 1 - |c| with the sign of c: see angular.h.
  template <class First, class Second>
  NT_INLINE Pair pair_at_angle(V angular, const First& first, const Second& second) const {
    const V from_parallel = max(angular, -angular);
    const V w = if_positive(-angular, broadcast(T(2)) - from_parallel, from_parallel);
    return pair(w, from_parallel, first[kStd] * second[kStd], first[kInverse] * second[kInverse], first, second);
  }

  V prepare(V half, V* numbers) const {
    std::fill(numbers, numbers + kNumbers + table_.terms, V{});
    std::vector<T> scratch(2 * table_.columns());
    for (int l = 0; l < kL; ++l) {
      const auto put = [&](int k, T number) { numbers[k][l] = number; };
      put(kHalf, half[l]);
      prepare(half[l] + half[l], scratch, put);
    }
    return numbers[kHalfAfter];
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(V deficit, const First& first, const Second& second, V& value, V& factor) const {
    for (int k = kHalf; k < kValues + 2; ++k) fetch_ahead(second, k);
    apply<kCovariance, kNtk>(pair(deficit, first, second), first, second, value, factor);
  }

  template <bool kCovariance, bool kNtk, class First, class Second>
  NT_INLINE void apply(const Pair& p, const First& first, const Second& second, V& value, V& factor) const {
    const V one = broadcast(T(1)), half = broadcast(T(0.5)), zero{};
    const V w = p.w, c = p.c;
    const V plus = one + c, square_c = c * c;
    const bool by_two = table_.step == 2;
    const V power = by_two ? square_c : c, one_minus_power = by_two ? w * plus : w;
    // With p_m the a_k b_k of the orders k = start + step m, x = c^step and P_j the sum of the p_m for m >= j: the sum
    // R of P_(j + 1) x^j, for which (1 - x) R is the sum of p_m (1 - x^m), and its derivative, from the last term to
    // the first. Each pair has as many terms as its samples need; those that another one needs do not change it.
    V suffix = zero, sum = zero, derivative = zero, square = zero;
    const V std_apart = first[kStd] - second[kStd];
    const auto add_term = [&](int k, auto is_for_all) {
      fetch_ahead(second, kValues + k);
      V both = first[kValues + k] * second[kValues + k], apart = first[kValues + k] - second[kValues + k];
      if (has_cusp_) both = fma(broadcast(cusps_[k]), mixed(first, second, k), both);
      if constexpr (!is_for_all.value) {
        const V is_needed = p.terms - broadcast(T(k));
        both = if_positive(is_needed, both, zero);
        apart = if_positive(is_needed, apart, zero);
      }
      if (has_cusp_) square = fma(broadcast(2 * cusps_[k]) * std_apart, apart, square);
      square = fma(apart, apart, square);
      suffix += both;
    };
    const auto add = [&](int k, auto is_for_all) {
      add_term(k, is_for_all);
      if constexpr (kNtk) derivative = fma(power, derivative, sum);
      sum = fma(power, sum, suffix);
    };
    int k = p.most - 1;
    for (; k > 2 && k >= p.least; --k) add(k, std::false_type{});
    for (; k > 2; --k) add(k, std::true_type{});
    if (p.most > 2) add_term(2, std::false_type{});
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
      square = fma(apart, apart, fma(broadcast(2 * cusps_[low]) * std_apart, apart, square));
    }
    after = fma(half, square, after);
    if (has_cusp_) add_cusp<kNtk>(p, std_apart, after, slope);
    if (p.most == table_.terms) {  // these were not enough
      for_each_share<false>(first, second, p, [&](const Share& share) {
        after += fma(share.both, share.missing, share.apart);
        if constexpr (kNtk) slope = fma(share.slopes, share.power, slope);
      });
    }
    value = deficit_or_covariance<kCovariance>(after, first, second);
    if constexpr (kNtk) factor = slope * p.inverse;
  }

  // For derivatives:

  // For a term of order k, sqrt((k + 1) (k + 2)) a_(k+2) without the cusp is `lift` times the number of that place
  // among the values. What the cusp has there is -(k - 1) times what it has at k.
  struct TwoUp {
    int place;
    T lift;
  };
  TwoUp two_up(int term) const {
    const bool is_low = term < 2 && table_.step == 2;
    if (is_low && table_.start != term + 2) return {term, T(0)};  // zero at every variance
    const int up = is_low ? 2 : term + 2 / table_.step;
    if (up >= table_.terms) return {kLast - kValues + up, T(1)};
    return {up, lifts_[table_.order(term)]};
  }

  // The slope of the cusp times the deviations.
  NT_INLINE V slope_of_cusp(const Pair& pair) const {
    const V w = pair.from_parallel, root = sqrt(w);
    const V straight = fma(broadcast(T(-2)) * root, horner<T>(ReluPolynomials<T>::p, w), broadcast(T(1)));
    return broadcast(cusp_ * cusp_) * pair.scale * if_positive(-pair.c, -straight, straight);
  }

  const Table& table() const { return table_; }
  T cusp() const { return cusp_; }

  // A coefficient of the cusp at a variance of 1.
  T cusp(int term) const { return cusps_[term]; }

  // The products of a coefficient of either sample with the deviation of the other.
  template <class First, class Second>
  static NT_INLINE V mixed(const First& first, const Second& second, int k) {
    return fma(first[kValues + k], second[kStd], first[kStd] * second[kValues + k]);
  }

  // A part of what is beyond the terms of a pair: the sums of (a_k - b_k)^2 / 2, a_k b_k and k a_k b_k; the means of
  // 1 - c^k, and of the derivatives of c^k over the mean order. And the derivatives of the second and third sum in
  // either half variance.
  struct Share {
    V apart, both, slopes, missing, power, bend;
    V both_half1{}, both_half2{}, slopes_half1{}, slopes_half2{};
  };

  // Calls `add` with every `Share` of a pair: those of groups of orders, for variances that have them, and of the rest.
  template <bool kDerivatives, class First, class Second, class Add>
  void for_each_share(const First& first, const Second& second, const Pair& pair, const Add& add) const {
    Beyond<T> beyond1 = numbers_beyond<kDerivatives>(first), beyond2 = numbers_beyond<kDerivatives>(second);
    const Correlation correlation(pair);
    V end = broadcast(static_cast<T>(table_.order(table_.terms) / 2 * 2));  // the number of all terms is even
    const V in_groups = groups_.are_there(first[kHalf], second[kHalf]);
    if (any_positive(in_groups)) {
      end = if_positive(in_groups, broadcast(groups_.end()), end);
      const auto add_group = [&](const auto& group) { add(share_of<kDerivatives>(group, correlation, first, second)); };
      groups_.template add_up<kDerivatives>(in_groups, first[kHalf], second[kHalf], beyond1, beyond2, add_group);
    }
    for (int parity = 0; parity < 2; ++parity) {
      const V largest_root = max(beyond1.at[parity], beyond2.at[parity]);
      if (!any_positive(largest_root) && !(parity == 0 && has_cusp_)) continue;
      add(share_of<kDerivatives>(beyond1, beyond2, parity, end, correlation, first, second));
    }
  }

 private:
  template <class First, class Second>
  NT_INLINE Pair pair(V w, V from_parallel, V scale, V inverse, const First& first, const Second& second) const {
    const V one = broadcast(T(1)), zero{};
    Pair p;
    p.both_vary = if_positive(first[kHalf], second[kHalf], zero);
    p.w = if_positive(p.both_vary, w, one);
    p.c = if_positive(p.both_vary, one - w, zero);
    p.from_parallel = if_positive(p.both_vary, from_parallel, one);
    p.scale = scale;
    p.inverse = inverse;
    p.terms = max(first[kTerms], second[kTerms]);
    p.most = static_cast<int>(largest(p.terms));
    p.least = -static_cast<int>(largest(-p.terms));
    return p;
  }

  static constexpr int kBeyond = Beyond<T>::kNumbers;
  static constexpr int kLast = kValues + 2 * kBeyond;  // and the terms: where `two_up` of the last ones begins

  // A correlation, |c| at most 1 - epsilon from parallel inputs: what is uncorrelated has nothing beyond the terms.
  struct Correlation {
    V is_negative, log, inverse;  // log |c| and 1 / |c|

    explicit Correlation(const Pair& pair) : is_negative(pair.w - broadcast(T(1))) {
      const V one = broadcast(T(1)), away = min(pair.from_parallel, broadcast(1 - std::numeric_limits<T>::epsilon()));
      for (int l = 0; l < kL; ++l) log[l] = std::log1p(-away[l]);
      inverse = one / (one - away);
    }
  };

  template <bool kDerivatives, class Numbers>
  Beyond<T> numbers_beyond(const Numbers& of_sample) const {
    const int start = kValues + table_.terms;
    Beyond<T> b;
    for (int k = 0; k < kBeyond; ++k) b.at[k] = of_sample[start + k];
    for (int k = 0; k < kBeyond && kDerivatives; ++k) b.slopes[k] = of_sample[start + kBeyond + k];
    return b;
  }

  // From powers of |c| to those of c.
  static NT_INLINE void turn(bool is_odd, const Correlation& correlation, Share& share) {
    const V is_negative = correlation.is_negative;
    if (is_odd) {
      share.missing = if_positive(is_negative, broadcast(T(2)) - share.missing, share.missing);
      share.bend = if_positive(is_negative, -share.bend, share.bend);
    } else {
      share.power = if_positive(is_negative, -share.power, share.power);
    }
  }

  template <bool kDerivatives, class First, class Second>
  NT_INLINE Share share_of(const typename Groups<T>::Group& group, const Correlation& correlation, const First& first,
                           const Second& second) const {
    const V std1 = first[kStd], std2 = second[kStd], order = broadcast(group.order), cusp = broadcast(group.cusp);
    const V apart = group.a - group.b, mixed = fma(group.a, std2, std1 * group.b);
    Share share;
    share.both = fma(cusp, mixed, group.a * group.b);
    share.slopes = order * share.both;
    share.apart = apart * fma(broadcast(T(0.5)), apart, cusp * (std1 - std2));
    const auto power = exp_pair<T>(order * correlation.log);
    share.missing = -power.expm1;
    share.power = power.exp * correlation.inverse;
    if constexpr (kDerivatives) {
      share.bend = (order - broadcast(T(1))) * share.power * correlation.inverse;
      share.both_half1 = fma(group.slope_a, fma(cusp, std2, group.b), cusp * group.b * first[kInverse]);
      share.both_half2 = fma(group.slope_b, fma(cusp, std1, group.a), cusp * group.a * second[kInverse]);
      share.slopes_half1 = order * share.both_half1;
      share.slopes_half2 = order * share.both_half2;
    }
    turn(group.is_odd, correlation, share);
    return share;
  }

  // What is beyond all terms, or all groups, is taken for terms from the order `end` on.
  template <bool kDerivatives, class First, class Second>
  NT_INLINE Share share_of(const Beyond<T>& beyond1, const Beyond<T>& beyond2, int parity, V end,
                           const Correlation& correlation, const First& first, const Second& second) const {
    using B = Beyond<T>;
    const V one = broadcast(T(1)), half = broadcast(T(0.5));
    const V root1 = beyond1.at[parity], root2 = beyond2.at[parity], apart = root1 - root2;
    const V orders = beyond1.at[B::kOrders + parity] + beyond2.at[B::kOrders + parity];
    Share share;
    share.both = root1 * root2;
    share.slopes = half * share.both * orders;
    share.apart = half * apart * apart;
    if constexpr (kDerivatives) {
      const auto slopes = [&](V both, V order_slope, V both_half) {
        return half * fma(both, order_slope, both_half * orders);
      };
      share.both_half1 = beyond1.slopes[parity] * root2;
      share.both_half2 = beyond2.slopes[parity] * root1;
      share.slopes_half1 = slopes(share.both, beyond1.slopes[B::kOrders + parity], share.both_half1);
      share.slopes_half2 = slopes(share.both, beyond2.slopes[B::kOrders + parity], share.both_half2);
    }
    if (parity == 0 && has_cusp_) add_mixed<kDerivatives>(beyond1, beyond2, first, second, share);
    const V quotient = share.slopes / if_positive(max(share.both, -share.both), share.both, one);
    const V mean_order = max(end, quotient);
    const V spread = one - (end + broadcast(static_cast<T>(parity - 1))) / mean_order;
    constexpr int kNodes = std::size(kRest);
    V relative_orders[kNodes], mean{};
    for (int k = 0; k < kNodes; ++k) {
      relative_orders[k] = exp_pair<T>(broadcast(static_cast<T>(-kRest[k][0])) * spread).exp;
      mean = fma(broadcast(static_cast<T>(kRest[k][1])), relative_orders[k], mean);
    }
    share.missing = share.power = share.bend = V{};
    for (int k = 0; k < kNodes; ++k) {
      const V relative = relative_orders[k] / mean, order = mean_order * relative, less = order - one;
      const V weight = broadcast(static_cast<T>(kRest[k][1]));
      share.missing = fma(-weight, exp_pair<T>(order * correlation.log).expm1, share.missing);
      share.power = fma(weight * relative, exp_pair<T>(less * correlation.log).exp, share.power);
      if constexpr (kDerivatives) {
        const V bend = exp_pair<T>(max(less - one, V{}) * correlation.log).exp;
        share.bend = fma(weight * relative * less, bend, share.bend);
      }
    }
    turn(parity == 1, correlation, share);
    return share;
  }

  // Adds the products with the cusp.
  template <bool kDerivatives, class First, class Second>
  NT_INLINE void add_mixed(const Beyond<T>& beyond1, const Beyond<T>& beyond2, const First& first, const Second& second,
                           Share& share) const {
    constexpr int kCusp = Beyond<T>::kCusp;
    const V std1 = first[kStd], std2 = second[kStd];
    const auto mixed = [&](int k) { return std1 * beyond2.at[k] + beyond1.at[k] * std2; };
    share.both += mixed(kCusp);
    share.slopes += mixed(kCusp + 1);
    share.apart = fma(std1 - std2, beyond1.at[kCusp] - beyond2.at[kCusp], share.apart);
    if constexpr (kDerivatives) {
      share.both_half1 += fma(first[kInverse], beyond2.at[kCusp], beyond1.slopes[kCusp] * std2);
      share.both_half2 += fma(second[kInverse], beyond1.at[kCusp], beyond2.slopes[kCusp] * std1);
      share.slopes_half1 += fma(first[kInverse], beyond2.at[kCusp + 1], beyond1.slopes[kCusp + 1] * std2);
      share.slopes_half2 += fma(second[kInverse], beyond1.at[kCusp + 1], beyond2.slopes[kCusp + 1] * std1);
    }
  }

  // The numbers of one sample and position, with the variance `var`.
  template <class Put>
  void prepare(T var, std::vector<T>& scratch, const Put& put) const {
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
    T *at = scratch.data(), *slopes = at + columns;  // the latter of the last terms and of what is after them
    std::fill(at, slopes + columns, T(0));
    for (int row = rows - 1; row >= 0; --row) {
      const T* of_row = numbers_ + (int64_t{octave} * rows + row) * columns;
      for (int k = table_.terms - 2; k < columns; ++k) slopes[k] = slopes[k] * place + at[k];
      for (int k = 0; k < columns; ++k) at[k] = at[k] * place + of_row[k];
    }
    for (int k = table_.terms - 2; k < columns; ++k) slopes[k] *= std::ldexp(T(1), 3 - exponent);
    const T* after_table = numbers_ + int64_t{table_.octaves} * rows * columns;
    if (var < lowest) extend(after_table + table_.octaves, deviation, std::sqrt(lowest), at, slopes);
    const T* half_after = at + table_.terms;
    put(kHalfAfter, *half_after);
    put(kStd, deviation);
    put(kInverse, T(1) / deviation);
    const T count = after_table[octave], all = static_cast<T>(table_.terms);
    put(kTerms, count >= T(1) && count <= all ? count : all);
    for (int k = 0; k < table_.terms; ++k) put(kValues + k, at[k]);
    T rest[kBeyond], rest_slopes[kBeyond];
    for (int k = 0; k < kBeyond; ++k) {
      const T least = k < 2 ? T(0) : k < 4 ? static_cast<T>(table_.order(table_.terms)) : half_after[1 + k];
      const bool is_less = half_after[1 + k] < least;
      rest[k] = is_less ? least : half_after[1 + k];
      rest_slopes[k] = is_less ? T(0) : slopes[table_.terms + 1 + k];
      put(kValues + table_.terms + k, rest[k]);
      put(kValues + table_.terms + kBeyond + k, rest_slopes[k]);
    }
    // The derivatives of coefficients say what is two orders up.
    const T variance = deviation * deviation;
    T last[2];
    for (int k = 0; k < 2 / table_.step; ++k) {
      const int term = table_.terms - 2 / table_.step + k;
      const T own = static_cast<T>(table_.order(term)) * at[term], up = variance * slopes[term] - own;
      const T noise = kNoiseOfSlopes * (std::abs(at[term]) + std::abs(own));
      last[k] = std::abs(up) > noise ? up : T(0);
      put(kLast + table_.terms + k, last[k]);
    }
    T of_rest = rest[4] / deviation + deviation * rest_slopes[4];
    for (int parity = 0; parity < 2; ++parity) of_rest += rest[parity] * rest_slopes[parity];
    put(kGain, gain(at, last, deviation) + of_rest);
  }

  // The derivative of half the variance after in that before, without what is beyond the terms.
  T gain(const T* at, const T* last, T std) const {
    const T var = std * std;
    T sum = cusp_ * cusp_ * var;
    for (int k = 0; k < table_.terms; ++k) {
      const TwoUp up = two_up(k);
      const T order = static_cast<T>(table_.order(k)), of_cusp = cusps_[k] * std;
      const T raised = up.place < table_.terms ? at[up.place] : last[up.place - (kLast - kValues + table_.terms)];
      sum += order * at[k] * (at[k] + 2 * of_cusp) - (order - T(1)) * of_cusp * at[k];
      sum += up.lift * raised * (at[k] + of_cusp);
    }
    return sum / var;
  }

  // From the deviation where the first octave begins to one below it: all are powers of it, but for the function at 0.
  void extend(const T* at_zero_and_exponents, T deviation, T lowest, T* at, T* slopes) const {
    const T at_zero = at_zero_and_exponents[0], ratio = deviation / lowest, var = deviation * deviation;
    T square = cusp_ * cusp_ * var;
    const auto extend_one = [&](int k, T constant, T exponent) {
      const T grows = (at[k] - constant) * std::pow(ratio, exponent);
      at[k] = constant + grows;
      slopes[k] = grows * exponent / var;
    };
    for (int k = 0; k < table_.terms; ++k) {
      extend_one(k, k == 0 ? at_zero : T(0), at_zero_and_exponents[1 + k]);
      square += at[k] * (at[k] + 2 * cusps_[k] * deviation);
    }
    T* rest = at + table_.terms + 1;
    for (int k = 0; k < kBeyond; ++k) {  // only kinks at 0 leave a rest there; orders stay
      extend_one(table_.terms + 1 + k, T(0), k < 2 ? T(1) : k < 4 ? T(0) : T(2));
    }
    for (int k = 0; k < 2; ++k) square += std::max(rest[k], T(0)) * rest[k];
    at[table_.terms] = T(0.5) * (square + T(2) * deviation * rest[4]);
  }

  // Adds the closed form of the cusp.
  template <bool kNtk>
  NT_INLINE void add_cusp(const Pair& pair, V std_apart, V& after, V& slope) const {
    const V half = broadcast(T(0.5)), two = broadcast(T(2)), square = broadcast(cusp_ * cusp_), w = pair.from_parallel;
    const V bent = w - two * w * sqrt(w) * horner<T>(ReluPolynomials<T>::q, w);
    after = fma(square, fma(pair.scale, bent, half * std_apart * std_apart), after);
    if constexpr (kNtk) slope += slope_of_cusp(pair);
  }

  // As in numerical.py: log v^3 at nodes of Gauss-Legendre quadrature on [0, 1], and 3 v^2 times their weights.
  static constexpr double kRest[][2] = {
      {-10.164969966564319, 0.0002929884291465835}, {-5.3265606065525235, 0.015527955520636258},
      {-2.8973064430179774, 0.10171877096492274},   {-1.4374499430644678, 0.26919863430200541},
      {-0.55680389216500115, 0.37333636308428264},  {-0.1030453635607588, 0.23992528769900631}};

  // sqrt((k + 1) (k + 2)) for all orders k.
  struct Lifts {
    T of_order[2 * Table::kMostTerms + 2];

    Lifts() {
      for (int k = 0; k < static_cast<int>(std::size(of_order)); ++k) of_order[k] = std::sqrt(T(k + 1) * T(k + 2));
    }
    static const Lifts& get() {
      static const Lifts lifts;
      return lifts;
    }
  };

  // What rounding leaves of the derivatives of polynomials, relative to their values.
  static constexpr T kNoiseOfSlopes = sizeof(T) == sizeof(float) ? T(4e-6) : T(1e-10);

  // In the place of deviations of zero: the factor divides by them.
  static constexpr T kSmallest = sizeof(T) == sizeof(float) ? T(0x1p-55) : T(0x1p-500);

  const T* numbers_;
  const T* cusps_;  // the coefficients of the cusp, at a variance of 1
  T cusp_;
  bool has_cusp_;
  Table table_;
  Groups<T> groups_;
  const T* lifts_;
};

}  // namespace NT_LEVEL
}  // namespace nt
