// One call of the engine: a program, its plans, and where its numbers are.
#pragma once

#include <vector>

#include "parallel.h"
#include "plan.h"
#include "program.h"

namespace nt {

// Numbers of a source; the arrays of the second batch are null where the batches are the same.
//
// kInputs: x1 and x2 are (n, positions, channels). kMaterialised: nngp and ntk are (n1, n2, positions[, positions]);
// variance1 and own1 are (n1, positions) and (n1, positions[, positions]), null where the program does not need them.
template <class T>
struct Source {
  const T* x1 = nullptr;
  const T* x2 = nullptr;
  const T* nngp = nullptr;
  const T* ntk = nullptr;
  const T* variance1 = nullptr;
  const T* variance2 = nullptr;
  const T* own1 = nullptr;
  const T* own2 = nullptr;
};

template <class T>
struct Job {
  Program program;
  Plan pairs;
  Plan own;
  Record record;
  const T* coefficients = nullptr;  // the first one says whether both batches are the same samples
  std::vector<Source<T>> sources;
  T* nngp = nullptr;  // (n1, n2[, positions[, positions]])
  T* ntk = nullptr;   // or null
  T* cov1 = nullptr;  // (n1[, positions[, positions]]), or null
  T* cov2 = nullptr;  // or null
};

// One nonlinearity on `n` numbers, for tests of its accuracy.
template <class T>
struct DualJob {
  Activation activation;
  const T* coefficients;
  int64_t n;
  const T* variance1;
  const T* variance2;
  const T* deficit;
  T* variance_out;  // after it, of the first
  T* deficit_out;
  T* factor;
};

// The engine, compiled for one instruction set.
struct Level {
  const char* name;
  void (*run_float)(const Job<float>&, const Parallel&);
  void (*run_double)(const Job<double>&, const Parallel&);
  void (*dual_float)(const DualJob<float>&);
  void (*dual_double)(const DualJob<double>&);
};

// The best level that this machine has. The environment variable NT_CPU_LEVEL (baseline, avx2 or avx512) lowers it.
// Throws std::invalid_argument for other names.
const Level& choose_level();

}  // namespace nt
