// One call of the engine: a program, its plans, and where its numbers are.
#pragma once

#include <algorithm>
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

// The arrays of results, or of their cotangents, as they come one after another from `take(size, name)`.
template <class T, class Take>
std::vector<Result<T>> take_results(const Program& program, const Take& take) {
  std::vector<Result<T>> results;
  for (const Output& output : program.outputs) {
    const int64_t per_pair = n_position_pairs(program.values[output.value].space, !output.all_pairs);
    Result<T> numbers;
    numbers.nngp = take(program.n1 * program.n2 * per_pair, "nngp");
    if (output.ntk) numbers.ntk = take(program.n1 * program.n2 * per_pair, "ntk");
    if (program.covariances) {
      numbers.cov1 = take(program.n1 * per_pair, "cov1");
      if (!program.symmetric) numbers.cov2 = take(program.n2 * per_pair, "cov2");
    }
    results.push_back(numbers);
  }
  return results;
}

// A job whose operands come, one after another, from `argument(size, name)`.
template <class T, class Argument>
Job<T> make_job(const Prepared& prepared, const Argument& argument) {
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
  return job;
}

// And its results from `result(size, name)`.
template <class T, class Argument, class TakeResult>
Job<T> make_job(const Prepared& prepared, const Argument& argument, const TakeResult& result) {
  Job<T> job = make_job<T>(prepared, argument);
  job.results = take_results<T>(prepared.program, result);
  return job;
}

// Arrays like the operands of a job: their tangents (of const numbers), or cotangents. Those of the second batch are
// null where it is the first; cotangents are too where nobody wants them.
template <class T>
struct LikeOperands {
  struct Batches {
    T* first = nullptr;
    T* second = nullptr;
  };
  struct Pairs {
    T* nngp = nullptr;
    T* ntk = nullptr;
  };
  T* coefficients = nullptr;
  std::vector<Batches> sources;  // inputs, or the variances of what is materialised
  std::vector<Pairs> pairs;      // of sources that are materialised
  std::vector<Batches> numbers;  // of every value

  bool any_of_second() const {
    const auto has = [](const std::vector<Batches>& all) {
      return std::any_of(all.begin(), all.end(), [](const Batches& both) { return both.second != nullptr; });
    };
    return has(sources) || has(numbers);
  }
};

// How many numbers of each sample there are of a source: of inputs, or its variances.
inline int64_t numbers_of_source(const Value& value) { return n_positions(value.space) * value.channels; }

template <class T, class Take>
LikeOperands<T> take_like_operands(const Program& program, const Take& take) {
  LikeOperands<T> arrays;
  const auto batches = [&](int64_t per_sample, const char* name) {
    typename LikeOperands<T>::Batches both;
    both.first = take(program.n1 * per_sample, name);
    if (!program.symmetric) both.second = take(program.n2 * per_sample, name);
    return both;
  };
  arrays.coefficients = take(program.n_coefficients, "coefficients");
  for (int s = 0; s < program.n_sources; ++s) {
    const Value& value = program.values[s];
    const bool is_materialised = value.op == Op::kMaterialised;
    typename LikeOperands<T>::Pairs pairs;
    if (is_materialised) pairs.nngp = take(program.n1 * program.n2, "nngp");
    if (is_materialised && value.has_ntk) pairs.ntk = take(program.n1 * program.n2, "ntk");
    arrays.pairs.push_back(pairs);
    arrays.sources.emplace_back();
    if (is_materialised && !value.needs) continue;
    arrays.sources.back() = batches(numbers_of_source(value), is_materialised ? "variances" : "inputs");
  }
  for (const Value& value : program.values) {
    arrays.numbers.emplace_back();
    if (has_numbers(value)) arrays.numbers.back() = batches(n_positions(value.space), "numbers");
  }
  return arrays;
}

// Cotangents of results, carried back to those of the operands of `job`.
template <class T>
struct BackwardJob {
  Job<T> job;
  std::vector<Result<const T>> cotangents{};
  LikeOperands<T> results{};
};

// Tangents of operands, carried to those of the results of `job`.
template <class T>
struct TangentJob {
  Job<T> job;
  LikeOperands<const T> tangents{};
};

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
  void (*backward_float)(const BackwardJob<float>&, const Parallel&);
  void (*backward_double)(const BackwardJob<double>&, const Parallel&);
  void (*tangents_float)(const TangentJob<float>&, const Parallel&);
  void (*tangents_double)(const TangentJob<double>&, const Parallel&);
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
