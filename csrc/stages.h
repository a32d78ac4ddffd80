// How the stages of a plan are made.
#pragma once

#include "plan.h"

namespace nt {

inline bool is_source(Op op) { return op == Op::kInputs || op == Op::kMaterialised; }

// The stage that leads to value `root`, as a deficit or as a covariance. The plan has the tensors of all stages
// before, and says whether planes are kept.
Stage build_stage(const Program& program, const Plan& plan, int root, bool deficit);

}  // namespace nt
