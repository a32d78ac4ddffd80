// A covariance program, as the Python side encodes it: structure only, no numbers that could be traced.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace nt {

inline constexpr int kAxes = 3;  // spatial axes; programs with fewer have leading ones of size 1
using Index3 = std::array<int, kAxes>;

// Windows along one axis.
struct Window {
  int taps = 1, stride = 1, dilation = 1, low = 0, high = 0;
  bool circular = false;

  bool trivial() const { return taps == 1 && stride == 1 && low == 0 && high == 0; }
  int extent() const { return (taps - 1) * dilation + 1; }  // the decoder bounds it
};

enum class Op { kInputs, kMaterialised, kLinear, kDual, kPool, kFlatten, kNormalize, kCombine, kMultiply };

enum class Activation { kAbRelu, kErf, kGelu, kSin, kRbf, kExp };

// How many coefficients it has, and how many numbers it wants to have of each sample and position.
struct ActivationSizes {
  int coefficients, planes;
};
inline constexpr ActivationSizes kActivationSizes[] = {{2, 2}, {3, 5}, {0, 6}, {5, 2}, {1, 1}, {2, 2}};

inline constexpr ActivationSizes sizes_of(Activation activation) {
  return kActivationSizes[static_cast<int>(activation)];
}

// A value of the program: a source, or a step and the values that it reads.
struct Value {
  Op op = Op::kInputs;
  bool needs = false;       // variances are read here or later: carried as a deficit
  std::vector<int> inputs;  // numbers of earlier values
  int coefficient = 0;      // where its coefficients start
  Index3 space{1, 1, 1};
  std::array<Window, kAxes> window;   // kLinear, kPool
  bool bias_follows_weights = false;  // kLinear: its own tangent kernel is its covariance
  bool mean = false;                  // kPool
  bool normalize_edges = false;       // kPool
  Activation activation = Activation::kAbRelu;
  std::array<bool, kAxes> normalized{};  // kNormalize: axes averaged over
  int channels = 1;                      // kInputs
  bool has_ntk = false;                  // kMaterialised
  bool has_own = false;                  // kMaterialised: so are covariances of each sample with itself
  bool same_position = false;            // kMaterialised: only pairs of equal positions are stored
};

inline bool has_windows(const Value& value) {
  return std::any_of(value.window.begin(), value.window.end(), [](const Window& w) { return !w.trivial(); });
}

struct Program {
  int64_t n1 = 0, n2 = 0;
  bool symmetric = false;    // the second batch is the first
  bool ntk = false;          // the tangent kernel is wanted
  bool covariances = false;  // so are the covariances of each sample with itself
  bool all_pairs = false;    // the output holds all pairs of positions, not just equal ones
  int n_sources = 0;
  int n_coefficients = 0;
  std::vector<Value> values;  // sources first; each reads only values before it
  int output = 0;
};

inline int64_t n_positions(const Index3& space) {
  int64_t n = 1;
  for (int size : space) n *= size;
  return n;
}

// Number of covariances of a pair of samples: those of equal positions, or all.
inline int64_t n_position_pairs(const Index3& space, bool only_equal) {
  return only_equal ? n_positions(space) : n_positions(space) * n_positions(space);
}

// Decodes and checks a program. Throws std::invalid_argument.
Program decode_program(const int64_t* code, int64_t length);

}  // namespace nt
