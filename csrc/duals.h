// Nonlinearities: what they do to a deficit, to the tangent kernel and to a variance. See docs/numerics.md.
//
// Each is a class with
//   kNumbers         how many numbers it wants to have of each sample and position (those with a table, beside its
//                    terms),
//   prepare          computes these from half the variance, and returns half the variance after it,
//   apply            maps a deficit and the numbers of both samples to the deficit after it (the covariance if
//                    `kCovariance`) and to the factor of the tangent kernel; of those that are fused with the map
//                    before them, also to the covariance before.
#pragma once

#include <type_traits>

#include "duals_clip.h"
#include "duals_clip_gate.h"
#include "duals_erf.h"
#include "duals_exponential.h"
#include "duals_gaussian.h"
#include "duals_hermite.h"
#include "duals_rectified.h"
#include "duals_relu.h"
#include "duals_tabulated.h"
#include "program.h"

namespace nt {
namespace NT_LEVEL {

// The table says how many numbers each wants to have.
#define NT_ACTIVATION(name, coefficients, numbers) \
  static_assert(name<float>::kNumbers == numbers && name<double>::kNumbers == numbers);
#include "table.def"

template <class Dual, class T>
Dual make_dual(const T* coefficients, const Table& table) {
  if constexpr (std::is_constructible_v<Dual, const T*, const Table&>) {
    return Dual(coefficients, table);
  } else {
    return Dual(coefficients);
  }
}

// Calls a function with a nonlinearity.
template <class T, class Call>
void with_dual(Activation activation, const T* coefficients, const Table& table, const Call& call) {
  switch (activation) {
#define NT_ACTIVATION(name, n_coefficients, numbers) \
  case Activation::k##name:                          \
    return call(make_dual<name<T>>(coefficients, table));
#include "table.def"
  }
}

// Calls a function with a nonlinearity that is fused with the map before it.
template <class T, class Call>
void with_fused_dual(Activation activation, const T* coefficients, const Call& call) {
  switch (activation) {
#define NT_FUSED(name)      \
  case Activation::k##name: \
    return call(name<T>(coefficients));
#include "table.def"
    default:  // never: see `is_fused`
      break;
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
