// How a program is carried out: stages, passes over planes, buffers, and statistics of single samples.
//
// Every offset plane - all pairs of positions (p, p + d) of two images - runs through the layers on its own, up to what
// mixes pairs (pools, Flatten, copies) or to the output. A stage is the part of the program that leads to one such
// end. It is carried out once for every offset d that its end needs, pass after pass, each pass row by row.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace nt {

// What one sample contributes to pairs: `kHalfVariance` etc. have one number for each position of a value.
enum class Statistic {
  kHalfVariance,    // var / 2
  kHalfAverage,     // of a tied map: half the average of its input's variances over each window
  kDual,            // of a dual: its numbers, those of a position side by side
  kStd,             // without positions: the root of the variance
  kShares,          // without positions: the roots of the shares of a sum's branches, or of w K and b, in the variance
  kScale,           // of a rescaling: what the activations are multiplied by
  kScaledHalf,      // of a rescaling: var / 2 times the scale
  kUnscaled,        // of a rescaling by numbers: 1 if all of them are 1, as where nothing is masked
  kOwnDeficit,      // of a pool: the pooled deficit of each window with itself
  kPooledVariance,  // of a pool: sum of the variances over each window
  kCount
};

// Where a sample's statistics are, in positions from the start of its record.
class Record {
 public:
  explicit Record(std::size_t n_values = 0) : starts_(n_values, none()) {}

  void add(Statistic statistic, int value, int64_t n_positions) {
    int64_t& start = starts_[value][static_cast<int>(statistic)];
    if (start >= 0) return;
    start = size_;
    size_ += n_positions;
  }
  // Returns where a statistic starts, or -1 where there is none.
  int64_t find(Statistic statistic, int value) const { return starts_[value][static_cast<int>(statistic)]; }
  int64_t size() const { return size_; }

 private:
  using Starts = std::array<int64_t, static_cast<int>(Statistic::kCount)>;
  static Starts none() {
    Starts starts;
    starts.fill(-1);
    return starts;
  }
  std::vector<Starts> starts_;
  int64_t size_ = 0;
};

// A set of offsets d with |d| < space on every axis. What is added may be there already.
class Offsets {
 public:
  void add(const Index3& d) { all_.push_back(d); }
  // In lexicographic order, each once.
  const std::vector<Index3>& list() {
    std::sort(all_.begin(), all_.end());
    all_.erase(std::unique(all_.begin(), all_.end()), all_.end());
    return all_;
  }

 private:
  std::vector<Index3> all_;
};

using Flags3 = std::array<bool, kAxes>;

// The positions p of one image whose partners p + offset are inside the other. Along a wrapped axis those are all
// positions: partners are counted modulo the size, and offsets are not negative.
struct Rectangle {
  Index3 space, offset, low, size;
  Flags3 wrapped;

  Rectangle(const Index3& space, const Index3& offset, const Flags3& wrapped = {});
  int64_t n_positions() const { return nt::n_positions(size); }
  int partner(int axis, int p) const {
    const int q = p + offset[axis];
    const bool turns = wrapped[axis] && p < space[axis] && q >= space[axis];  // padding has no partners inside
    return turns ? q - space[axis] : q;
  }
};

// A value in the geometry in which a stage needs it: at `scale` times the offset of the stage.
enum class Kind { kLoad, kTied, kDual, kRescale, kDropout, kSum, kProduct, kAsCovariance };
struct Instance {
  Kind kind;
  int value;
  Index3 space, scale;
  std::vector<int> inputs;  // instances
  bool deficit = false;
  bool has_ntk = false;
  int buffer = -1;
  int row_shift = 0;  // by how many rows of its buffer it starts before others, whose rows it overwrites
  int sums_for = -1;  // a fused kDual: the kTied that reads its rows as sums of three neighbours, and nothing else does
  // In plans that keep planes, for the way back:
  bool kept = false;              // its plane is read there
  bool feeds_dual_alone = false;  // a kTied: the covariance added to its tangent kernel is carried back by that dual
  bool feeds_tied_alone = false;  // a kDual: that tied map carries it back, row by row
  int cotangent_buffer = -1;      // none if `feeds_tied_alone`
};

struct Pass {
  int head = -1;             // a kLoad, or a kTied with windows, that produces rows; or none
  int fused_dual = -1;       // a kDual that is applied to the head's rows at once
  int unmasked_dual = -1;    // a kDual that is applied at once where the mask before it leaves all: the second row op
  std::vector<int> row_ops;  // instances, evaluated on every row in turn
  int geometry = -1;         // an instance of the geometry that all of them share
};

// Covariances after the end of a stage: the planes of the offsets that later stages want, one after another.
struct Tensor {
  int value = -1;
  bool deficit = false;
  bool has_ntk = false;
  Index3 space{1, 1, 1};
  std::vector<Index3> offsets;  // in lexicographic order
  int64_t size = 0;             // of all planes, in positions

  // Lays the planes of these offsets out.
  void allocate(std::vector<Index3> wanted);
  // Returns where the plane of an offset starts, or -1.
  int64_t find(const Index3& d) const {
    int64_t at = 0;
    for (int a = 0; a < kAxes; ++a) {
      if (d[a] < low_[a] || d[a] > high_[a]) return -1;
      at = at * (high_[a] - low_[a] + 1) + d[a] - low_[a];
    }
    return start_[at];
  }
  // Returns where the pair of a position and its partner at the offset d is, or -1.
  int64_t entry(const Index3& d, const Index3& p) const {
    const int64_t start = find(d);
    if (start < 0) return -1;
    const Rectangle r(space, d);
    return start + ((p[0] - r.low[0]) * int64_t{r.size[1]} + p[1] - r.low[1]) * r.size[2] + p[2] - r.low[2];
  }

 private:
  Index3 low_{0, 0, 0}, high_{-1, -1, -1};  // the box of all offsets
  std::vector<int64_t> start_;              // for each offset of the box
};

// Planes that may go through the passes of a stage together: those with offsets that differ along the last axis alone.
constexpr int kMostPlanes = 8;

inline bool go_together(const Index3& offset1, const Index3& offset2) {
  return offset1[0] == offset2[0] && offset1[1] == offset2[1];
}

struct Stage {
  int end = -1;                     // value number of what mixes pairs; or -1 and
  int output = -1;                  // number of an output
  int root = -1;                    // instance that the end reads
  std::vector<Instance> instances;  // in an order of evaluation
  std::vector<Pass> passes;
  std::vector<Index3> offsets;
  Flags3 wrapped{};  // axes along which convolutions are circular
  int n_buffers = 0;
  int64_t buffer_size = 0;  // in positions
  int most_row_shift = 0;
  int pad_low = 0, pad_high = 0;  // room beside each row for what is read beyond its ends
  int64_t ring_size = 0;          // in positions: rows summed horizontally, that later rows will need again
  int planes_at_once = 1;         // that go through the passes row by row in turn, and read the same samples
};

// The instances to whose cotangents one adds: its inputs, or those of the dual that it carries back.
inline const std::vector<int>& inputs_back(const Stage& stage, const Instance& instance) {
  const bool takes_dual = instance.kind == Kind::kTied && stage.instances[instance.inputs[0]].feeds_tied_alone;
  return takes_dual ? stage.instances[instance.inputs[0]].inputs : instance.inputs;
}

struct Plan {
  bool ntk = false;
  bool keeps_planes = false;  // for the way back: what that reads is not overwritten
  std::vector<Stage> stages;
  std::vector<int> tensor_of;  // for every value, the number of its tensor, or -1
  std::vector<Tensor> tensors;
  int64_t scratch = 0;   // positions that one thread needs, of one kernel
  int64_t n_planes = 0;  // planes carried through all stages
};

// All of a program that does not depend on numbers.
struct Prepared {
  Program program;
  Plan pairs;         // for pairs of samples
  Plan own;           // for each sample with itself
  Record record;      // what both read of each sample
  bool one_position;  // no images: rows of planes run over first samples instead
  bool angular;       // and deficits are angular (angular.h): on the way forward alone
  // For derivatives: both plans with planes that are kept, and where the cotangents of each sample's statistics are.
  Plan kept_pairs, kept_own;
  Record cotangents;

  std::vector<const Plan*> plans() const { return {&pairs, &own, &kept_pairs, &kept_own}; }
};

enum class Direction { kForward, kBackward };

// Throws std::invalid_argument where the program reads what its sources do not hold, and where cotangents are not
// carried back through it.
Prepared prepare(Program program, Direction direction = Direction::kForward);

// Decodes and prepares a program, or finds it among those that were prepared last.
std::shared_ptr<const Prepared> prepared(const int64_t* code, int64_t length, Direction direction);

// Number of positions inside each window of an axis of the given size.
std::vector<int> window_counts(const Window& window, int size, int count);

}  // namespace nt
