// What all units of the engine share: the call, and sizes that follow from it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "job.h"
#include "simd.h"

namespace nt {
namespace NT_LEVEL {

// First samples that one tile of a program without images takes: they are then what positions are to an image.
constexpr int kRowsPerTile = 64;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int modulo(int i, int size) { return (i % size + size) % size; }
inline bool is_inside(int i, int size) { return i >= 0 && i < size; }
inline Index3 times(const Index3& a, const Index3& b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2]}; }
inline int64_t position(const Index3& space, int z, int y, int x) { return (int64_t{z} * space[1] + y) * space[2] + x; }
inline int64_t position(const Index3& space, const Index3& p) { return position(space, p[0], p[1], p[2]); }

template <class T>
T window_size(const Value& value) {
  return static_cast<T>(int64_t{value.window[0].taps} * value.window[1].taps * value.window[2].taps);
}

// How many positions of each window of a pool are inside, and what its sum is divided by.
template <class T>
class PoolSizes {
 public:
  PoolSizes(const Value& pool, const Index3& space) : pool_(pool) {
    for (int a = 0; a < kAxes; ++a) counts_[a] = window_counts(pool.window[a], space[a], pool.space[a]);
  }
  double count(const Index3& p) const { return double(counts_[0][p[0]]) * counts_[1][p[1]] * counts_[2][p[2]]; }
  double size(const Index3& p) const {
    if (!pool_.mean) return 1;
    return pool_.normalize_edges ? count(p) : window_size<T>(pool_);
  }

 private:
  const Value& pool_;
  std::array<std::vector<int>, kAxes> counts_;
};

template <class T>
struct Context {
  const Job<T>& job;
  const Prepared& prepared;
  const Program& program;
  bool one_position;                 // of `prepared`
  int rows;                          // first samples of a tile
  std::vector<int64_t> input_start;  // of every source in a wide record
  int64_t n_inputs = 0;
  std::vector<int64_t> cotangent_start;  // of every source in the cotangents of a record: of inputs, or variances
  int64_t cotangent_size;                // of a sample: of its record and inputs
  int64_t wide_size;                     // of a group of samples: numbers of its record and inputs, all lanes
  int64_t widest;                        // positions of the longest row
  int64_t scratch_size = 0;              // positions of one kernel that a thread needs

  explicit Context(const Job<T>& of) : job(of), prepared(of.prepared), program(prepared.program) {
    one_position = prepared.one_position;
    rows = one_position ? kRowsPerTile : 1;
    for (int s = 0; s < program.n_sources; ++s) {
      const Value& value = program.values[s];
      input_start.push_back(prepared.record.size() + n_inputs);
      if (value.op == Op::kInputs) {
        cotangent_start.push_back(prepared.cotangents.size() + n_inputs);
        n_inputs += numbers_of_source(value);
      } else {
        cotangent_start.push_back(std::max<int64_t>(prepared.cotangents.find(Statistic::kHalfVariance, s), 0));
      }
    }
    cotangent_size = prepared.cotangents.size() + n_inputs;
    wide_size = (prepared.record.size() + n_inputs) * kLanes<T>;
    widest = rows;
    for (const Plan* plan : prepared.plans()) {
      scratch_size = std::max(scratch_size, plan->scratch * rows);
      for (const Stage& stage : plan->stages) {
        for (const Instance& i : stage.instances) {
          widest = std::max<int64_t>(widest, i.space[2] + stage.pad_low + stage.pad_high);
        }
      }
    }
  }
};

}  // namespace NT_LEVEL
}  // namespace nt
