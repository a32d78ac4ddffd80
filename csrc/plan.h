// How a program is carried out: stages, passes over planes, buffers, and statistics of single samples.
//
// Between two readouts (pools, Flatten, the output) every offset plane - all pairs of positions (p, p + d) of two
// images - runs through the layers on its own. A stage is the part of the program that leads to one readout. It is
// carried out once for every offset d that the readout needs, pass after pass, each pass row by row.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "program.h"

namespace nt {

// What one sample contributes to pairs: `kHalfVariance` etc. are planes over the positions of a value.
enum class Statistic {
  kHalfVariance,    // var / 2
  kHalfAverage,     // of a linear step: half the average of its input's variances over each window
  kDual,            // of a dual: what it wants to know, several planes
  kNormalizer,      // of a normalization: 1 / sqrt(mean(var + eps))
  kNormalizedHalf,  // of a normalization: var / 2 times the normalizer
  kOwnDeficit,      // of a pool: the pooled deficit of each window with itself
  kPooledVariance,  // of a pool: sum of the variances over each window
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
  using Starts = std::array<int64_t, 7>;
  static Starts none() {
    Starts starts;
    starts.fill(-1);
    return starts;
  }
  std::vector<Starts> starts_;
  int64_t size_ = 0;
};

// A set of offsets d with |d| < space on every axis.
class Offsets {
 public:
  explicit Offsets(const Index3& space)
      : space_(space), member_((2 * space[0] - 1) * int64_t{2 * space[1] - 1} * (2 * space[2] - 1)) {}

  bool contains(const Index3& d) const {
    for (int a = 0; a < kAxes; ++a) {
      if (d[a] <= -space_[a] || d[a] >= space_[a]) return false;
    }
    return member_[index(d)];
  }
  void add(const Index3& d) { member_[index(d)] = true; }
  int64_t index(const Index3& d) const {
    return ((d[0] + space_[0] - 1) * int64_t{2 * space_[1] - 1} + d[1] + space_[1] - 1) * (2 * space_[2] - 1) + d[2] +
           space_[2] - 1;
  }
  int64_t capacity() const { return static_cast<int64_t>(member_.size()); }
  const Index3& space() const { return space_; }
  // In lexicographic order.
  std::vector<Index3> list() const;

 private:
  Index3 space_;
  std::vector<bool> member_;
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
    return wrapped[axis] && q >= space[axis] ? q - space[axis] : q;
  }
};

// A value in the geometry in which a stage needs it: at `scale` times the offset of the stage.
enum class Kind { kLoad, kLinear, kDual, kNormalize, kCombine, kMultiply, kToCovariance };
struct Instance {
  Kind kind;
  int value;
  Index3 space, scale;
  std::vector<int> inputs;  // instances
  bool deficit = false;
  bool has_ntk = false;
  int buffer = -1;
};

struct Pass {
  int head = -1;             // a kLoad, or a kLinear with windows, that produces rows; or none
  int fused_dual = -1;       // a kDual that is applied to the head's rows at once
  std::vector<int> row_ops;  // instances, evaluated on every row in turn
  int geometry = -1;         // an instance of the geometry that all of them share
};

// Covariances after a readout, for each offset of `offsets` the plane from `start[offsets.index(d)]` on (or -1).
struct Tensor {
  int value = -1;
  bool deficit = false;
  bool has_ntk = false;
  Offsets offsets{Index3{1, 1, 1}};
  std::vector<int64_t> start;
  int64_t size = 0;
};

struct Stage {
  int readout = -1;                 // value number of a pool or Flatten; -1 for the output
  int root = -1;                    // instance that is read out
  std::vector<Instance> instances;  // in an order of evaluation
  std::vector<Pass> passes;
  std::vector<Index3> offsets;
  Flags3 wrapped{};  // axes along which convolutions are circular
  int n_buffers = 0;
  int64_t buffer_size = 0;        // in positions
  int pad_low = 0, pad_high = 0;  // room beside each row for what is read beyond its ends
  int64_t ring_size = 0;          // in positions: rows summed horizontally, that later rows will need again
};

struct Plan {
  bool ntk = false;
  std::vector<Stage> stages;
  std::vector<int> tensor_of;  // for every value, the number of its tensor, or -1
  std::vector<Tensor> tensors;
  int64_t scratch = 0;   // positions that one thread needs, of one kernel
  int64_t n_planes = 0;  // planes carried through all stages
};

// All of a program that does not depend on numbers.
struct Prepared {
  Program program;
  Plan pairs;     // for pairs of samples
  Plan own;       // for each sample with itself
  Record record;  // what both read of each sample
};

// Throws std::invalid_argument where the program reads what its sources do not hold.
Prepared prepare(Program program);

// Number of positions inside each window of an axis of the given size.
std::vector<int> window_counts(const Window& window, int size, int count);

}  // namespace nt
