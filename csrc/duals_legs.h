// Sides of the triangles of Gaussians.
#pragma once

#include "duals_common.h"

namespace nt {
namespace NT_LEVEL {

// The triangles with hypotenuses sqrt((1 + var1) (1 + var2)) and opposite sides that are covariances, of `scale` times
// the covariances that there are. It may be negative. See nt_core/activations/arcs.py.
template <class T>
struct Legs {
  using V = Vec<T>;
  enum Number { kVariance = 1, kRoot, kLeg, kNumbers };  // of each sample; before them, half the variance after

  V leg, mean_leg, leg_excess, gap, mean, difference, det;

  static NT_INLINE void prepare(V scale, V var, V* numbers) {
    numbers[kVariance] = var;
    numbers[kRoot] = sqrt(var);
    numbers[kLeg] = sqrt(fma(scale + scale, var, broadcast(T(1))));
  }

  template <class First, class Second>
  NT_INLINE Legs(V scale, V deficit, const First& first, const Second& second) {
    const V half = broadcast(T(0.5)), one = broadcast(T(1));
    const V total = first[kVariance] + second[kVariance], apart = first[kVariance] - second[kVariance];
    mean_leg = half * (first[kLeg] + second[kLeg]);
    mean = half * scale * total;
    difference = scale * apart;  // exact before it is scaled
    const V half_slope = half * difference / mean_leg;
    gap = half_slope * half_slope;
    const Angular<T> a = angular_deficit<T>(deficit, apart, first[kRoot], second[kRoot]);
    det = (scale * a.angular) * (scale * ((a.scale + a.scale) - a.angular));  // var1 var2 - K^2
    leg = sqrt(fma(scale, total, one) + det);
    leg_excess = (det + gap) / (leg + mean_leg);
  }

  // The mean of the inverses of the own legs, less 1/leg.
  template <class First, class Second>
  NT_INLINE V inverse_deficit(const First& first, const Second& second) const {
    return fma(mean_leg, leg_excess, gap) / (leg * (first[kLeg] * second[kLeg]));
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
