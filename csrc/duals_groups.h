// Orders beyond the terms of a table, in groups: see nt_core/activations/groups.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "duals_common.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

// Of two samples, what is beyond the terms: of the even and of the odd part of the function the roots and the orders,
// and of the products with the cusp `beyond` and `beyond_slope`. After each the derivative in half the variance.
template <class T>
struct Beyond {
  static constexpr int kNumbers = 6, kOrders = 2, kCusp = 4;

  Vec<T> at[kNumbers], slopes[kNumbers];
};

template <class T>
class Groups {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  // One group of a pair: its order, and whether it is of odd ones; the coefficients of both, times the root of the
  // weight, and what the cusp has; and their derivatives in half the variance, if they are wanted.
  struct Group {
    T order, cusp;
    bool is_odd;
    V a, b, slope_a, slope_b;
  };

  Groups(const T* numbers, const Table& table)
      : orders_(numbers + table.start_of_groups() + 1),
        table_(table),
        below_first_(below(table.lowest + table.first)),
        below_begin_(below(table.lowest + table.begin)) {}

  // Positive where both of a pair have groups, and one of them wants these.
  V are_there(V half1, V half2) const {
    if (table_.groups == 0) return V{};
    const V one = broadcast(T(1)), zero{}, below_first = broadcast(below_first_), below_begin = broadcast(below_begin_);
    const V wanted = if_positive(half1 - below_begin, one, if_positive(half2 - below_begin, one, zero));
    // What is beyond the table is NaN.
    return if_positive(half1 - below_first, if_positive(half2 - below_first, wanted, zero), zero);
  }

  // Adds up groups, where there are some: `add` takes a `Group`. What is beyond the terms becomes what is beyond these.
  template <bool kSlopes, class Add>
  void add_up(V are_there, V half1, V half2, Beyond<T>& beyond1, Beyond<T>& beyond2, const Add& add) const {
    V values1[kMost], values2[kMost], slopes1[kSlopes ? kMost : 1], slopes2[kSlopes ? kMost : 1];
    coefficients<kSlopes>(are_there, half1, values1, slopes1);
    coefficients<kSlopes>(are_there, half2, values2, slopes2);
    const T* cusps = orders_ + table_.groups;
    for (int k = 0; k < table_.groups; ++k) {
      Group group{orders_[k], cusps[k], k >= table_.even_groups, values1[k], values2[k], V{}, V{}};
      if constexpr (kSlopes) group.slope_a = slopes1[k], group.slope_b = slopes2[k];
      add(group);
    }
    for (int k = 0; k < Beyond<T>::kNumbers; ++k) {
      const int at = table_.groups + k;
      beyond1.at[k] = if_positive(are_there, values1[at], beyond1.at[k]);
      beyond2.at[k] = if_positive(are_there, values2[at], beyond2.at[k]);
      if constexpr (kSlopes) {
        beyond1.slopes[k] = if_positive(are_there, slopes1[at], beyond1.slopes[k]);
        beyond2.slopes[k] = if_positive(are_there, slopes2[at], beyond2.slopes[k]);
      }
    }
  }

  // The first order beyond all groups.
  T end() const { return orders_[-1]; }

 private:
  static constexpr int kMost = Table::kMostGroups + Beyond<T>::kNumbers;

  static T below(int octave) { return std::nextafter(std::ldexp(T(0.5), octave), T(0)); }

  template <bool kSlopes>
  void coefficients(V are_there, V half, V* values, V* slopes) const {
    T at[kMost], slopes_at[kSlopes ? kMost : 1];
    const int n = table_.groups + Beyond<T>::kNumbers;
    for (int l = 0; l < kL; ++l) {
      if (!(are_there[l] > T(0))) {
        std::fill(at, at + n, T(0));
        if constexpr (kSlopes) std::fill(slopes_at, slopes_at + n, T(0));
      } else if (l == 0 || half[l] != half[l - 1] || !(are_there[l - 1] > T(0))) {
        columns<kSlopes>(half[l], at, slopes_at);
      }
      for (int k = 0; k < n; ++k) values[k][l] = at[k];
      if constexpr (kSlopes) {
        for (int k = 0; k < n; ++k) slopes[k][l] = slopes_at[k];
      }
    }
  }

  // The groups, and what is beyond them, of a sample with half the variance.
  template <bool kSlopes>
  void columns(T half, T* at, T* slopes) const {
    const T var = half + half;
    int exponent = 0;
    std::frexp(var, &exponent);
    const T place = std::ldexp(var, 2 - exponent) - T(3);  // in the octave, from -1 to 1
    const int rows = table_.degree + 1, last = table_.octaves - table_.first - 1;
    const int octave = std::clamp(exponent - 1 - table_.lowest - table_.first, 0, last);
    const int n = table_.groups + Beyond<T>::kNumbers;
    std::fill(at, at + n, T(0));
    if constexpr (kSlopes) std::fill(slopes, slopes + n, T(0));
    for (int row = rows - 1; row >= 0; --row) {
      const T* of_row = orders_ + 2 * table_.groups + (int64_t{octave} * rows + row) * n;
      if constexpr (kSlopes) {
        for (int k = 0; k < n; ++k) slopes[k] = slopes[k] * place + at[k];
      }
      for (int k = 0; k < n; ++k) at[k] = at[k] * place + of_row[k];
    }
    if constexpr (kSlopes) {
      for (int k = 0; k < n; ++k) slopes[k] *= std::ldexp(T(1), 3 - exponent);
    }
  }

  const T* orders_;  // before them the end; then what the cusp has of each group, then the polynomials
  Table table_;
  T below_first_, below_begin_;  // halves of variances, above which those of these octaves are
};

}  // namespace NT_LEVEL
}  // namespace nt
