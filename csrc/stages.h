// How the stages of a plan are made.
#pragma once

#include "plan.h"

namespace nt {

inline bool is_source(Op op) { return op == Op::kInputs || op == Op::kMaterialised; }

// The stage that leads to value `root`, as a deficit or as a covariance. The plan has the tensors of all stages
// before, and says whether planes are kept.
Stage build_stage(const Program& program, const Plan& plan, int root, bool deficit);

// How many planes go through the passes of a stage together, given its offsets.
int planes_at_once(const Program& program, const Stage& stage);

}  // namespace nt
