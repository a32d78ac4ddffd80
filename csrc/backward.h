// Derivatives of programs, see docs/cpu-engine.md.
#pragma once

#include "job.h"

namespace nt {
namespace NT_LEVEL {

// Cotangents of results, to those of operands.
template <class T>
void backward(const BackwardJob<T>& job, const Parallel& parallel);

// Tangents of operands, to those of results.
template <class T>
void tangents(const TangentJob<T>& job, const Parallel& parallel);

}  // namespace NT_LEVEL
}  // namespace nt
