// One call of the engine: a program, its plans, and where its numbers are.
#pragma once

#include <cstdint>
#include <string>
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

// Numbers of the samples of both batches that come with a step, (n, positions).
template <class T>
struct Numbers {
  const T* first = nullptr;
  const T* second = nullptr;
};

// The first coefficients: whether both batches hold equal samples, so that their deficits are 0, and whether they hold
// the same ones to dropout.
inline constexpr int kIdentical = 0, kSame = 1;

// Numbers of an output.
template <class T>
struct Result {
  T* nngp = nullptr;  // (n1, n2[, positions[, positions]])
  T* ntk = nullptr;   // or null
  T* cov1 = nullptr;  // (n1[, positions[, positions]]), or null
  T* cov2 = nullptr;  // or null
};

template <class T>
struct Job {
  const Prepared& prepared;
  const T* coefficients = nullptr;
  std::vector<Source<T>> sources{};
  std::vector<Numbers<T>> numbers{};  // of every value
  std::vector<Result<T>> results{};   // of every output
};

template <class T, class Argument>
Source<T> source_of(const Program& program, const Value& value, const Argument& argument) {
  Source<T> source;
  const int64_t n1 = program.n1, n2 = program.n2, positions = n_positions(value.space);
  if (value.op == Op::kInputs) {
    source.x1 = argument(n1 * positions * value.channels, "x1");
    source.x2 = program.symmetric ? source.x1 : argument(n2 * positions * value.channels, "x2");
    return source;
  }
  const int64_t per_pair = n_position_pairs(value.space, value.same_position);
  source.nngp = argument(n1 * n2 * per_pair, "nngp");
  if (value.has_ntk) source.ntk = argument(n1 * n2 * per_pair, "ntk");
  if (value.needs) {
    source.variance1 = argument(n1 * positions, "variance1");
    source.variance2 = program.symmetric ? source.variance1 : argument(n2 * positions, "variance2");
  }
  if (value.has_own) {
    source.own1 = argument(n1 * per_pair, "cov1");
    source.own2 = program.symmetric ? source.own1 : argument(n2 * per_pair, "cov2");
  }
  return source;
}

// A job whose arrays come, one after another, from `argument(size, name)` and `result(size, name)`.
template <class T, class Argument, class TakeResult>
Job<T> make_job(const Prepared& prepared, const Argument& argument, const TakeResult& result) {
  const Program& program = prepared.program;
  Job<T> job{prepared};
  job.coefficients = argument(program.n_coefficients, "coefficients");
  for (int s = 0; s < program.n_sources; ++s) {
    job.sources.push_back(source_of<T>(program, program.values[s], argument));
  }
  for (const Value& value : program.values) {
    Numbers<T> numbers;
    if (has_numbers(value)) {
      const int64_t positions = n_positions(value.space);
      numbers.first = argument(program.n1 * positions, "numbers");
      numbers.second = program.symmetric ? numbers.first : argument(program.n2 * positions, "numbers");
    }
    job.numbers.push_back(numbers);
  }
  for (const Output& output : program.outputs) {
    const int64_t per_pair = n_position_pairs(program.values[output.value].space, !output.all_pairs);
    Result<T> numbers;
    numbers.nngp = result(program.n1 * program.n2 * per_pair, "nngp");
    if (output.ntk) numbers.ntk = result(program.n1 * program.n2 * per_pair, "ntk");
    if (program.covariances) {
      numbers.cov1 = result(program.n1 * per_pair, "cov1");
      if (!program.symmetric) numbers.cov2 = result(program.n2 * per_pair, "cov2");
    }
    job.results.push_back(numbers);
  }
  return job;
}

// One nonlinearity on `n` numbers, for tests of its accuracy.
template <class T>
struct DualJob {
  Activation activation;
  Table table;
  const T* coefficients;
  int64_t n;
  const T* variance1;
  const T* variance2;
  const T* deficit;
  T* variance_out;  // after it, of the first
  T* deficit_out;
  T* factor;
};

// A matrix and its transpose times vectors: direct = matrix right, transposed = matrix^T left.
template <class T>
struct ProductsJob {
  int64_t n_rows, n_columns, n_vectors;
  const T* matrix;
  const double* right;  // (n_columns, n_vectors)
  const double* left;   // (n_rows, n_vectors)
  double* direct;       // (n_rows, n_vectors)
  double* transposed;   // (n_columns, n_vectors)
};

// The engine, compiled for one instruction set.
struct Level {
  const char* name;
  void (*run_float)(const Job<float>&, const Parallel&);
  void (*run_double)(const Job<double>&, const Parallel&);
  void (*dual_float)(const DualJob<float>&);
  void (*dual_double)(const DualJob<double>&);
  void (*products_float)(const ProductsJob<float>&, const Parallel&);
  void (*products_double)(const ProductsJob<double>&, const Parallel&);
};

// The level in use: at first the best one that this machine has.
const Level& level();

// Chooses the best level that this machine has and that is not above `name` (baseline, avx2 or avx512; "" for the
// best). Throws std::invalid_argument for other names.
void choose_level(const std::string& name);

}  // namespace nt
