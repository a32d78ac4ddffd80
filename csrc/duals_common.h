// What several nonlinearities need.
#pragma once

#include "functions.h"

namespace nt {
namespace NT_LEVEL {

template <class T>
inline constexpr T kPi = T(3.14159265358979323846);

// Most derive the covariance from the variances: the first number is half the variance after.
template <bool kCovariance, class V, class First, class Second>
NT_INLINE V deficit_or_covariance(V deficit, const First& first, const Second& second) {
  if constexpr (kCovariance) return (first[0] + second[0]) - deficit;
  return deficit;
}

// Says that a number of a sample further on will be wanted soon; rows.h knows where it is.
template <class Numbers>
NT_INLINE void fetch_ahead(const Numbers&, int) {}

template <class T>
struct Angular {
  Vec<T> parallel, angular, scale;
};

// With s, the `scale`, the product of the standard deviations and c the correlation: the deficit of parallel u and v,
// and what the deficit is beyond it, s (1 - c), in [0, 2 s]. The difference of the roots is that of the variances,
// which has more digits, over their sum.
template <class T>
NT_INLINE Angular<T> angular_deficit(Vec<T> deficit, Vec<T> difference, Vec<T> root1, Vec<T> root2) {
  const Vec<T> zero{}, total = root1 + root2, scale = root1 * root2;
  const Vec<T> apart = if_positive(total, difference / if_positive(total, total, broadcast(T(1))), zero);
  const Vec<T> parallel = broadcast(T(0.5)) * apart * apart;
  return {parallel, min(scale + scale, max(zero, fma(broadcast(T(-0.5)) * apart, apart, deficit))), scale};
}

}  // namespace NT_LEVEL
}  // namespace nt
