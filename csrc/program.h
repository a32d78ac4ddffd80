// A covariance program, as the Python side encodes it: structure only, no numbers that could be traced.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace nt {

inline constexpr int kMaxDegree = 8;  // of polynomials, as nonlinearities
inline constexpr int kAxes = 3;       // spatial axes; programs with fewer have leading ones of size 1
using Index3 = std::array<int, kAxes>;

// Windows along one axis.
struct Window {
  int taps = 1, stride = 1, dilation = 1, low = 0, high = 0;
  bool circular = false;

  bool trivial() const { return taps == 1 && stride == 1 && low == 0 && high == 0; }
  int extent() const { return (taps - 1) * dilation + 1; }  // the decoder bounds it
  bool is_three_in_turn() const { return taps == 3 && stride == 1 && dilation == 1 && !circular; }
};

// clang-format off
enum class Op {
#define NT_OP(name) k##name,
#include "table.def"
};

enum class Activation {
#define NT_ACTIVATION(name, coefficients, numbers) k##name,
#include "table.def"
};
// clang-format on

struct OpInfo {
  const char* name;
};
inline constexpr OpInfo kOps[] = {
#define NT_OP(name) {#name},
#include "table.def"
};
inline constexpr int kNOps = sizeof(kOps) / sizeof(kOps[0]);

struct ActivationInfo {
  const char* name;
  int coefficients;
  int numbers;  // numbers that it wants to have of each sample and position
};
inline constexpr ActivationInfo kActivations[] = {
#define NT_ACTIVATION(name, coefficients, numbers) {#name, coefficients, numbers},
#include "table.def"
};
inline constexpr int kNActivations = sizeof(kActivations) / sizeof(kActivations[0]);

inline constexpr const ActivationInfo& info(Activation activation) {
  return kActivations[static_cast<int>(activation)];
}

// Whether a nonlinearity is one loop with the tied map before it.
inline constexpr bool is_fused(Activation activation) {
  bool found = false;
#define NT_FUSED(name) found |= activation == Activation::k##name;
#include "table.def"
  return found;
}

// Whether a nonlinearity has derivatives.
inline constexpr bool is_differentiable(Activation activation) {
  bool found = false;
#define NT_DIFFERENTIABLE(name) found |= activation == Activation::k##name;
#include "table.def"
  return found;
}

// The Hermite coefficients of a function as polynomials of the variance, one for each octave of it. In memory: for each
// octave and power, the columns; then for each octave, how many terms count; then the value of the function at 0, and
// for each term the power of the deviation that it is in proportion to below the first octave; then the cusp
// and, for each term, its coefficient at a variance of 1. If there are groups of orders beyond the terms: their end;
// the orders; the coefficients of the cusp; and, from the first octave that has groups on, polynomials of them and of
// six numbers of what is beyond them.
struct Table {
  static constexpr int kMostTerms = 1 << 10, kMostGroups = 1 << 8;

  int terms = 0, start = 2, step = 1;       // of the orders 0, 1, start, start + step, ...
  int degree = 0, lowest = 0, octaves = 0;  // octaves from 2^lowest on
  int groups = 0, even_groups = 0;          // these come first
  int first = 0, begin = 0;                 // octaves from which on samples have groups, and one of a pair wants them

  int order(int term) const { return term < 2 ? term : start + step * (term - 2); }

  // The terms, half the variance after, of the rest of the even and of the odd part the roots and the orders, and what
  // is beyond the terms of the products with the cusp.
  constexpr int columns() const { return terms + 7; }
  constexpr int64_t start_of_cusp() const {
    return int64_t{octaves} * (int64_t{degree + 1} * columns() + 1) + terms + 1;
  }
  constexpr int64_t start_of_groups() const { return start_of_cusp() + 1 + terms; }
  constexpr int64_t size() const {
    if (terms == 0) return 0;
    if (groups == 0) return start_of_groups();
    return start_of_groups() + 1 + 2 * int64_t{groups} + int64_t{octaves - first} * (degree + 1) * (groups + 6);
  }
};

inline constexpr int64_t kEncoding = 10;  // changes with the layout of the code

// A value of the program: a source, or a step and the values that it reads.
struct Value {
  Op op = Op::kInputs;
  bool needs = false;       // variances are read here or later: carried as a deficit
  std::vector<int> inputs;  // numbers of earlier values
  int coefficient = 0;      // where its coefficients start
  int cotangent = 0;        // where their cotangents start
  Index3 space{1, 1, 1};
  std::array<Window, kAxes> window;   // kTied, kPool
  bool bias_follows_weights = false;  // kTied: its own tangent kernel is its covariance
  bool mean = false;                  // kPool
  bool normalize_edges = false;       // kPool
  // kGather, kUntie: along each axis of the input, the position that is copied to each place; -1 for zero. And which of
  // these axes stands at each axis of the output.
  std::array<std::vector<int>, kAxes> positions;
  Index3 order{0, 1, 2};
  Activation activation = Activation::kAbRelu;
  Table table;                           // kDual, of kTabulated
  std::array<bool, kAxes> normalized{};  // kNormalize: axes averaged over
  bool weighted = false;                 // kNormalize: by numbers of each sample and position
  int channels = 1;                      // kInputs
  bool has_ntk = false;                  // kMaterialised
  bool has_own = false;                  // kMaterialised: so are covariances of each sample with itself
  bool same_position = false;            // kMaterialised: only pairs of equal positions are stored
  bool has_deficits = false;             // kMaterialised: deficits are stored, not covariances
};

// How many numbers the nonlinearity wants to have of each sample and position.
inline int n_numbers(const Value& value) { return info(value.activation).numbers + value.table.terms; }

// Whether numbers of each sample and position come with it.
inline bool has_numbers(const Value& value) {
  return value.op == Op::kScale || (value.op == Op::kNormalize && value.weighted);
}

inline bool is_copy(Op op) { return op == Op::kGather || op == Op::kUntie; }
// Whether pairs of positions after it come from pairs that lie differently far apart: it ends a stage.
inline bool mixes_pairs(Op op) { return op == Op::kPool || op == Op::kFlatten || is_copy(op); }

inline bool has_windows(const Value& value) {
  return std::any_of(value.window.begin(), value.window.end(), [](const Window& w) { return !w.trivial(); });
}

// A value that is returned.
struct Output {
  int value = 0;
  bool all_pairs = false;  // of positions, not just equal ones
  bool ntk = false;        // and its tangent kernel
};

struct Program {
  int64_t n1 = 0, n2 = 0;
  bool symmetric = false;    // the second batch is the first
  bool covariances = false;  // those of each sample with itself are wanted
  int n_sources = 0;
  int n_coefficients = 0;
  std::vector<Value> values;  // sources first; each reads only values before it
  // The coefficients that have cotangents, value by value: tables have none, which are many numbers.
  std::vector<int> with_cotangents;
  std::vector<Output> outputs;

  int64_t n_cotangents() const { return static_cast<int64_t>(with_cotangents.size()); }

  bool ntk() const {
    return std::any_of(outputs.begin(), outputs.end(), [](const Output& output) { return output.ntk; });
  }
};

// An index along the axes of the input of a copy, along those of the output.
inline Index3 reordered(const Index3& i, const Index3& order) { return {i[order[0]], i[order[1]], i[order[2]]}; }

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
