// Runs the engine under sanitizers. What it computes is tested from Python; here it is enough that memory is in order,
// that all numbers of threads give the same bits, that all instruction sets agree, and that malformed programs throw.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "job.h"

namespace {

struct Network {
  const char* name;
  std::vector<std::vector<int64_t>> values;
  bool all_pairs;
  std::vector<int> outputs = {};  // besides the last value
  bool covariances = true;        // has those of each sample with itself
};

constexpr nt::Table kTable{4, 2, 1, 1, -4, 12, 2, 1, 3, 5};
constexpr int kTableAt = 5, kCoefficients = kTableAt + static_cast<int>(kTable.size());

const std::vector<int64_t> kNoWindow = {1, 1, 1, 0, 0, 0};

std::vector<int64_t> join(std::vector<std::vector<int64_t>> parts) {
  std::vector<int64_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Coefficients: 0 whether batches are the same, 1-4 of every linear step, from 5 on of every dual, 7-8 weights of a
// sum.
std::vector<int64_t> value(nt::Op op, bool needs, int coefficient, nt::Index3 s, std::vector<int64_t> inputs) {
  std::vector<int64_t> code = {static_cast<int64_t>(op), needs, coefficient, s[0], s[1], s[2]};
  if (!inputs.empty()) code.push_back(static_cast<int64_t>(inputs.size()));
  code.insert(code.end(), inputs.begin(), inputs.end());
  return code;
}
std::vector<int64_t> inputs(bool needs, nt::Index3 s, int channels) {
  return join({value(nt::Op::kInputs, needs, 0, s, {}), {channels}});
}
std::vector<int64_t> pairs(bool needs, bool has_ntk, bool has_deficits) {
  return join({value(nt::Op::kMaterialised, needs, 0, {1, 1, 1}, {}), {has_ntk, 0, 1, has_deficits}});
}
std::vector<int64_t> linear(bool needs, nt::Index3 s, int input, std::vector<int64_t> y, std::vector<int64_t> x) {
  return join({value(nt::Op::kTied, needs, 1, s, {input}), {1}, kNoWindow, y, x});
}
std::vector<int64_t> dual(nt::Activation activation, bool needs, nt::Index3 s, int input) {
  return join({value(nt::Op::kDual, needs, 5, s, {input}), {static_cast<int64_t>(activation)}});
}
// With 4 terms in polynomials of degree 1, for 12 octaves.
// Of the orders 0, 1, start, start + step.
std::vector<int64_t> tabulated(bool needs, nt::Index3 s, int input, int64_t start, int64_t step) {
  return join({dual(nt::Activation::kTabulated, needs, s, input),
               {kTable.terms, start, step, kTable.degree, kTable.lowest, kTable.octaves, kTable.groups,
                kTable.even_groups, kTable.first, kTable.begin}});
}
std::vector<int64_t> relu(bool needs, nt::Index3 s, int input) {
  return dual(nt::Activation::kAbRelu, needs, s, input);
}
std::vector<int64_t> pool(bool needs, nt::Index3 s, int input, std::vector<int64_t> y, std::vector<int64_t> x) {
  return join({value(nt::Op::kPool, needs, 0, s, {input}), {1, 0}, kNoWindow, y, x});
}
// Copies of positions along the last two axes, which come in either order.
std::vector<int64_t> gather(bool needs, nt::Index3 s, int input, std::vector<int64_t> y, std::vector<int64_t> x,
                            bool transposed = false) {
  const std::vector<int64_t> order = {0, transposed ? 2 : 1, transposed ? 1 : 2};
  return join({value(nt::Op::kGather, needs, 0, s, {input}), order, {0}, y, x});
}
std::vector<int64_t> untie(bool needs, nt::Index3 s, int input) { return value(nt::Op::kUntie, needs, 0, s, {input}); }
std::vector<int64_t> rescale(nt::Op op, bool needs, nt::Index3 s, int input) {
  return join({value(op, needs, 2, s, {input}),
               op == nt::Op::kNormalize ? std::vector<int64_t>{1, 0, 1, 1} : std::vector<int64_t>{}});
}
std::vector<int64_t> sum(bool needs, nt::Index3 s, int a, int b) { return value(nt::Op::kSum, needs, 7, s, {a, b}); }
std::vector<int64_t> product(bool needs, nt::Index3 s, int a, int b) {
  return value(nt::Op::kProduct, needs, 0, s, {a, b});
}

const std::vector<int64_t> kThree = {3, 1, 1, 1, 1, 0}, kStrided = {3, 2, 1, 1, 1, 0}, kDilated = {2, 1, 2, 1, 1, 0};
const std::vector<int64_t> kRound = {3, 1, 1, 1, 1, 1}, kRoundStrided = {3, 2, 1, 1, 1, 1};

std::vector<Network> networks() {
  const nt::Index3 one{1, 1, 1}, image{1, 6, 5}, half{1, 3, 3}, small{1, 3, 2}, strided{1, 3, 3}, even{1, 4, 6},
      quarter{1, 2, 3}, turned{1, 2, 3};
  return {
      {"fully connected",
       {inputs(true, one, 7), linear(true, one, 0, kNoWindow, kNoWindow), relu(false, one, 1)},
       false},
      {"without positions",
       {inputs(true, one, 7), linear(true, one, 0, kNoWindow, kNoWindow), relu(true, one, 1),
        rescale(nt::Op::kNormalize, true, one, 2), sum(true, one, 1, 3), dual(nt::Activation::kErf, true, one, 4),
        rescale(nt::Op::kScale, true, one, 5), rescale(nt::Op::kDropout, true, one, 6), product(true, one, 7, 3),
        linear(true, one, 8, kNoWindow, kNoWindow), relu(false, one, 9)},
       false},
      {"deficits of pairs",
       {pairs(true, false, true), linear(true, one, 0, kNoWindow, kNoWindow), relu(true, one, 1),
        rescale(nt::Op::kNormalize, true, one, 2), sum(true, one, 1, 3), dual(nt::Activation::kErf, true, one, 4),
        rescale(nt::Op::kScale, true, one, 5), rescale(nt::Op::kDropout, true, one, 6),
        linear(true, one, 7, kNoWindow, kNoWindow), tabulated(false, one, 8, 2, 1)},
       false,
       {7},
       false},
      {"covariances of pairs",
       {pairs(true, true, false), relu(true, one, 0), linear(false, one, 1, kNoWindow, kNoWindow)},
       false,
       {},
       false},
      {"two pools",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kDilated), relu(true, image, 1),
        pool(true, small, 2, {2, 2, 1, 0, 0, 0}, {2, 2, 1, 0, 0, 0}), linear(true, small, 3, kThree, kThree),
        relu(false, small, 4), pool(false, one, 5, {3, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0})},
       false},
      {"overlapping pool, full output",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        pool(true, half, 2, {3, 2, 1, 1, 1, 0}, {3, 2, 1, 1, 1, 0}), linear(true, half, 3, kThree, kThree),
        relu(false, half, 4)},
       true},
      {"circular, a product, a pool",
       {inputs(true, strided, 3), linear(true, strided, 0, kRound, kRound), relu(true, strided, 1),
        linear(true, strided, 2, kRound, kRound), dual(nt::Activation::kGelu, true, strided, 3),
        product(true, strided, 2, 4), linear(true, strided, 5, kRound, kRound), relu(false, strided, 6),
        pool(false, one, 7, {3, 1, 1, 0, 0, 0}, {3, 1, 1, 0, 0, 0})},
       false},
      {"neighbours",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree), relu(true, small, 1),
        linear(true, small, 2, {5, 1, 1, 2, 2, 0}, kThree), relu(true, small, 3),
        linear(true, small, 4, {2, 1, 1, 0, 1, 0}, kThree), dual(nt::Activation::kGelu, true, small, 5),
        linear(true, small, 6, kThree, kThree), relu(false, small, 7),
        pool(false, one, 8, {3, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0})},
       false},
      {"residual",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        linear(true, strided, 2, kStrided, kStrided), linear(true, strided, 1, kStrided, kStrided),
        sum(true, strided, 3, 4), relu(false, strided, 5), pool(false, one, 6, {3, 1, 1, 0, 0, 0}, {3, 1, 1, 0, 0, 0})},
       false},
      {"circular, a product",
       {inputs(true, even, 2), linear(true, even, 0, kRound, kRound), relu(true, even, 1),
        linear(true, quarter, 2, kRoundStrided, kRoundStrided), relu(true, quarter, 3), product(true, quarter, 3, 4),
        pool(true, quarter, 5, kThree, kThree), linear(false, quarter, 6, kRound, kRound)},
       true},
      {"a circular pool",
       {inputs(true, image, 2), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        pool(true, half, 2, {3, 2, 1, 1, 1, 1}, {3, 2, 1, 1, 1, 1}), linear(true, half, 3, kThree, kThree),
        relu(false, half, 4)},
       true},
      {"dilated pools",
       {inputs(true, image, 2), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        pool(true, half, 2, {2, 2, 3, 1, 1, 0}, {3, 2, 2, 2, 2, 1}), linear(true, half, 3, kThree, kThree),
        relu(false, half, 4)},
       true},
      {"copies of positions",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree), relu(true, small, 1),
        gather(true, half, 2, {0, -1, 2}, {1, -1, 1}), linear(true, half, 3, kThree, kRound), relu(true, half, 4),
        untie(true, half, 5), relu(true, half, 6), gather(false, small, 7, {-1, 0, 2}, {0, 1})},
       true},
      {"transposed branches",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree), relu(true, small, 1),
        gather(true, turned, 2, {1, 0}, {-1, 2, 1}, true), linear(true, turned, 3, kThree, kRound),
        gather(true, small, 4, {2, 0, 1}, {0, 1}, true), sum(true, small, 2, 5), relu(false, small, 6)},
       true},
      {"masks and dropout",
       {inputs(true, small, 3), rescale(nt::Op::kScale, true, small, 0), linear(true, small, 1, kThree, kThree),
        rescale(nt::Op::kNormalize, true, small, 2), relu(true, small, 3), rescale(nt::Op::kDropout, true, small, 4),
        linear(true, small, 5, kThree, kThree), relu(false, small, 6), rescale(nt::Op::kDropout, false, small, 7),
        rescale(nt::Op::kScale, false, small, 8)},
       true},
      {"several outputs",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        pool(true, one, 2, {6, 1, 1, 0, 0, 0}, {5, 1, 1, 0, 0, 0}), relu(false, one, 3), relu(false, image, 1)},
       true,
       {0, 3, 4}},
      {"a derivative",
       {inputs(true, small, 3), rescale(nt::Op::kScale, true, small, 0), linear(true, small, 1, kThree, kThree),
        relu(true, small, 2), gather(true, half, 3, {0, -1, 2}, {1, -1, 1}), linear(true, half, 4, kThree, kRound),
        rescale(nt::Op::kNormalize, true, half, 5), relu(true, half, 6),
        pool(true, half, 7, {2, 1, 1, 1, 0, 0}, {2, 1, 1, 0, 1, 0}), linear(true, half, 8, kThree, kThree),
        relu(false, half, 9), rescale(nt::Op::kDropout, false, half, 10),
        pool(false, one, 11, {3, 1, 1, 0, 0, 0}, {3, 1, 1, 0, 0, 0})},
       false},
      {"smooth nonlinearities",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree), dual(nt::Activation::kErf, true, small, 1),
        linear(true, small, 2, kThree, kThree), dual(nt::Activation::kGelu, true, small, 3),
        linear(true, small, 4, kThree, kThree), dual(nt::Activation::kSin, true, small, 5),
        linear(true, small, 6, kThree, kThree), dual(nt::Activation::kRbf, true, small, 7),
        linear(true, small, 8, kThree, kThree), dual(nt::Activation::kExp, false, small, 9),
        pool(false, one, 10, {3, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0})},
       false},
      {"more nonlinearities",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree),
        dual(nt::Activation::kPolynomial, true, small, 1), linear(true, small, 2, kThree, kThree),
        dual(nt::Activation::kGaussian, true, small, 3), linear(true, small, 4, kThree, kThree),
        dual(nt::Activation::kRectifiedMonomial, true, small, 5), linear(true, small, 6, kThree, kThree),
        dual(nt::Activation::kGabor, true, small, 7), linear(true, small, 8, kThree, kThree),
        dual(nt::Activation::kExpNormalized, true, small, 9), linear(true, small, 10, kThree, kThree),
        dual(nt::Activation::kStep, false, small, 11)},
       false},
      {"tables",
       {inputs(true, small, 3), linear(true, small, 0, kThree, kThree), tabulated(true, small, 1, 2, 1),
        linear(true, small, 2, kThree, kThree), tabulated(false, small, 3, 3, 2),
        pool(false, one, 4, {3, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0})},
       false},
      {"tables without positions",
       {inputs(true, one, 7), linear(true, one, 0, kNoWindow, kNoWindow), tabulated(true, one, 1, 2, 2),
        linear(true, one, 2, kNoWindow, kNoWindow), tabulated(false, one, 3, 3, 2)},
       false},
  };
}

// Without covariances of each sample with itself, of which there is no derivative.
std::vector<int64_t> encode(const Network& network, int n1, int n2, bool symmetric, bool covariances = true) {
  const int64_t n_values = static_cast<int64_t>(network.values.size());
  const bool has_covariances = covariances && network.covariances;
  std::vector<int64_t> code = {nt::kEncoding, n1, n2, symmetric, has_covariances, kCoefficients, 1, n_values};
  code.push_back(static_cast<int64_t>(network.outputs.size()) + 1);
  for (int output : network.outputs) code.insert(code.end(), {output, 0, 1});
  code.insert(code.end(), {n_values - 1, network.all_pairs, 1});
  for (const auto& value : network.values) code.insert(code.end(), value.begin(), value.end());
  return code;
}

// Threads that live until all functions are done, some of which start late.
class Pool {
 public:
  nt::Schedule schedule() {
    return [this](std::function<void()> f) {
      std::lock_guard<std::mutex> lock(mutex_);
      threads_.emplace_back(std::move(f));
    };
  }
  ~Pool() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

// Arrays of exactly the sizes that a program asks for, so that a sanitizer sees what is read or written beyond them.
template <class T>
class Arrays {
 public:
  explicit Arrays(bool symmetric) : symmetric_(symmetric) {}

  const T* argument(int64_t size, const std::string& what) {
    arguments_.emplace_back(size);
    const bool coefficients = what == "coefficients";
    for (T& x : arguments_.back()) x = coefficients ? T(0.7) : normal_(random_);
    // Of variances of 1 these may be covariances and deficits.
    if (what == "nngp") {
      for (T& x : arguments_.back()) x = T(0.4) + T(0.2) * std::sin(x);
    }
    if (what.substr(0, 8) == "variance") std::fill(arguments_.back().begin(), arguments_.back().end(), T(1));
    if (coefficients && !symmetric_) arguments_.back()[0] = 0;
    // Groups of orders begin beyond the terms.
    for (int k = 0; k <= kTable.groups && coefficients; ++k) {
      arguments_.back()[kTableAt + kTable.start_of_groups() + k] = T(8 + k);
    }
    return arguments_.back().data();
  }
  T* result(int64_t size) {
    results_.emplace_back(size);
    return results_.back().data();
  }
  std::vector<T> results() const { return join(results_); }

 private:
  static std::vector<T> join(const std::list<std::vector<T>>& parts) {
    std::vector<T> all;
    for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  bool symmetric_;
  std::mt19937 random_{0};
  std::normal_distribution<T> normal_;
  std::list<std::vector<T>> arguments_, results_;
};

// The results; on the way back the cotangents of operands, and tangents of the results.
template <class T>
std::vector<T> run(const nt::Prepared& prepared, const nt::Parallel& parallel, nt::Direction direction) {
  const nt::Program& program = prepared.program;
  Arrays<T> arrays(program.symmetric);
  const auto argument = [&](int64_t size, const char* what) { return arrays.argument(size, what); };
  const auto result = [&](int64_t size, const char*) { return arrays.result(size); };
  constexpr bool kFloat = sizeof(T) == 4;
  if (direction == nt::Direction::kForward) {
    const nt::Job<T> job = nt::make_job<T>(prepared, argument, result);
    if constexpr (kFloat) nt::level().run_float(job, parallel);
    if constexpr (!kFloat) nt::level().run_double(job, parallel);
    return arrays.results();
  }
  nt::BackwardJob<T> back{nt::make_job<T>(prepared, argument)};
  back.cotangents = nt::take_results<const T>(program, argument);
  back.results = nt::take_like_operands<T>(program, result);
  nt::TangentJob<T> tangents{back.job};
  tangents.tangents = nt::take_like_operands<const T>(program, argument);
  tangents.job.results = nt::take_results<T>(program, result);
  if constexpr (kFloat) {
    nt::level().backward_float(back, parallel);
    nt::level().tangents_float(tangents, parallel);
  } else {
    nt::level().backward_double(back, parallel);
    nt::level().tangents_double(tangents, parallel);
  }
  return arrays.results();
}

nt::Prepared prepare(const std::vector<int64_t>& code, nt::Direction direction = nt::Direction::kForward) {
  return nt::prepare(nt::decode_program(code.data(), static_cast<int64_t>(code.size())), direction);
}

bool has_derivative(const Network& network) {
  try {
    prepare(encode(network, 1, 1, false, false), nt::Direction::kBackward);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

template <class T>
bool check(const Network& network, int n1, int n2, bool symmetric, T tolerance,
           nt::Direction direction = nt::Direction::kForward) {
  const auto run = [&](int n_threads) {
    Pool pool;
    const bool forward = direction == nt::Direction::kForward;
    return ::run<T>(prepare(encode(network, n1, n2, symmetric, forward), direction),
                    nt::Parallel(n_threads > 1 ? pool.schedule() : nt::Schedule(), n_threads), direction);
  };
  std::vector<T> reference;
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    nt::choose_level(level);
    const auto expected = run(1);
    if (reference.empty()) reference = expected;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!(std::abs(expected[i] - reference[i]) <= tolerance * std::max(T(1), std::abs(reference[i])))) {
        std::printf("%s at level %s: entry %zu is %g, not %g\n", network.name, level, i, double(expected[i]),
                    double(reference[i]));
        return false;
      }
    }
    if (run(3) != expected) {
      std::printf("%s at level %s depends on the number of threads\n", network.name, level);
      return false;
    }
  }
  return true;
}

bool is_small(const nt::Program& program) {
  int64_t size = program.n1 * program.n2 + program.n_coefficients;
  for (const nt::Value& value : program.values) {
    const int64_t positions = nt::n_positions(value.space);
    int64_t taps = value.channels;
    for (const nt::Window& w : value.window) taps += w.extent();
    size += positions * positions * taps;
  }
  return size < 21000;
}

// Runs a program if it is accepted, and small enough.
void try_to_run(const std::vector<int64_t>& code, int& n_run) {
  try {
    const nt::Program program = nt::decode_program(code.data(), static_cast<int64_t>(code.size()));
    if (!is_small(program)) return;
    const nt::Parallel alone(nt::Schedule(), 1);
    run<float>(nt::prepare(program), alone, nt::Direction::kForward);
    // Derivatives take several times longer.
    if (++n_run % 16 == 0) run<float>(nt::prepare(program, nt::Direction::kBackward), alone, nt::Direction::kBackward);
  } catch (const std::invalid_argument&) {
  } catch (const std::bad_alloc&) {
  }
}

// Every program that differs in some numbers from a good one is refused or runs.
bool fuzz(const Network& network) {
  const auto good = encode(network, 2, 2, false, !has_derivative(network));
  for (size_t length = 0; length < good.size(); ++length) {
    try {
      nt::decode_program(good.data(), static_cast<int64_t>(length));
      std::printf("%s: a program cut at %zu was taken\n", network.name, length);
      return false;
    } catch (const std::invalid_argument&) {
    }
  }
  const std::vector<int64_t> values = {-1, 0, 1, 2, 3, 5, 65536, 65537, int64_t{1} << 20, int64_t{1} << 40};
  int n_run = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int64_t value : values) {
      auto code = good;
      code[at] = value;
      try_to_run(code, n_run);
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1500; ++i) {
    auto code = good;
    for (unsigned n = 2 + random() % 4; n > 0; --n) code[random() % code.size()] = values[random() % values.size()];
    try_to_run(code, n_run);
  }
  std::printf("%s: %d changed programs ran\n", network.name, n_run);
  return n_run > 0;
}

// What once crashed, or gave numbers from memory that was never written.
bool known_faults() {
  Network wide{"a window whose extent overflows 32 bits",
               {inputs(false, {1, 1, 3}, 2), linear(false, {1, 1, 3}, 0, kNoWindow, {65537, 1, 65536, 0, 0, 0})},
               false};
  try {
    prepare(encode(wide, 1, 1, false));
    std::printf("%s was taken\n", wide.name);
    return false;
  } catch (const std::invalid_argument&) {
  }
  // A circular axis beside a padded one.
  const nt::Index3 image{1, 4, 5};
  const Network mixed{
      "circular beside padded",
      {inputs(true, image, 2), linear(true, image, 0, {3, 1, 1, 1, 1, 0}, {3, 1, 1, 1, 1, 1}), relu(false, image, 1)},
      true};
  return check<double>(mixed, 2, 2, false, 1e-12);
}

// Programs are prepared once, and only so many are kept.
bool prepared_once() {
  const Network network = networks()[0];
  const auto get = [&](int n1) {
    const auto code = encode(network, n1, 1, false);
    return nt::prepared(code.data(), static_cast<int64_t>(code.size()), nt::Direction::kForward);
  };
  const auto first = get(1);
  if (get(1) != first) {
    std::printf("a program was prepared twice\n");
    return false;
  }
  for (int n1 = 2; n1 < 1000; ++n1) get(n1);
  const bool kept = first.use_count() > 1;
  if (kept) std::printf("a program is kept for ever\n");
  return !kept;
}

// A schedule that fails after the first helper: run() throws when no helper is at work any more.
bool throwing_schedule() {
  std::atomic<bool> gone{false}, late{false};
  bool thrown = false;
  std::vector<std::thread> threads;
  const nt::Parallel parallel(
      [&](std::function<void()> f) {
        if (!threads.empty()) throw std::runtime_error("no more threads");
        threads.emplace_back(std::move(f));
      },
      4);
  try {
    parallel.run(1000, [&](const auto& next) {
      while (next() >= 0) {
        if (gone) late = true;
        std::this_thread::sleep_for(std::chrono::microseconds(10));
      }
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  gone = true;
  for (std::thread& thread : threads) thread.join();
  if (!thrown || late) std::printf("a schedule that throws: %s\n", late ? "a helper outlives the call" : "not thrown");
  return thrown && !late;
}

// Products of a matrix with vectors, of sizes that fill nothing.
template <class T>
bool check_products(int64_t n_rows, int64_t n_columns, int64_t n_vectors) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> integer(-4, 4);  // sums of products are exact
  const auto numbers = [&](int64_t size, auto zero) {
    std::vector<decltype(zero)> numbers(size);
    for (auto& x : numbers) x = integer(random);
    return numbers;
  };
  const auto matrix = numbers(n_rows * n_columns, T{});
  const auto right = numbers(n_columns * n_vectors, 0.), left = numbers(n_rows * n_vectors, 0.);
  std::vector<double> direct(left.size()), transposed(right.size());
  std::vector<double> expected_direct(left.size()), expected_transposed(right.size());
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t j = 0; j < n_columns; ++j) {
      for (int64_t v = 0; v < n_vectors; ++v) {
        expected_direct[i * n_vectors + v] += matrix[i * n_columns + j] * right[j * n_vectors + v];
        expected_transposed[j * n_vectors + v] += matrix[i * n_columns + j] * left[i * n_vectors + v];
      }
    }
  }
  const nt::ProductsJob<T> job{n_rows,       n_columns,   n_vectors,     matrix.data(),
                               right.data(), left.data(), direct.data(), transposed.data()};
  Pool pool;
  const nt::Parallel parallel(pool.schedule(), 3);
  if constexpr (sizeof(T) == 4) {
    nt::level().products_float(job, parallel);
  } else {
    nt::level().products_double(job, parallel);
  }
  const bool ok = direct == expected_direct && transposed == expected_transposed;
  if (!ok) std::printf("products of %d x %d: wrong\n", static_cast<int>(n_rows), static_cast<int>(n_columns));
  return ok;
}

bool products() {
  bool ok = true;
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    nt::choose_level(level);
    for (const auto& [rows, columns, vectors] : {std::tuple{1, 1, 1}, {7, 13, 3}, {9, 600, 11}, {64, 512, 5}}) {
      ok = check_products<float>(rows, columns, vectors) && ok;
      ok = check_products<double>(rows, columns, vectors) && ok;
    }
  }
  nt::choose_level("");
  return ok;
}

}  // namespace

#ifdef __SANITIZE_THREAD__
constexpr bool kIsWhole = false;  // what one thread does, and one program at several sizes, tells nothing of races
#else
constexpr bool kIsWhole = true;
#endif

int main() {
  bool ok = true;
  for (const Network& network : networks()) {
    for (const auto& [n1, n2, symmetric] : {std::tuple{3, 2, false}, {2, 19, false}, {18, 18, true}, {1, 1, true}}) {
      if (!kIsWhole && n2 != 19) continue;
      ok = check<float>(network, n1, n2, symmetric, 2e-5f) && ok;
      ok = (!kIsWhole || check<double>(network, n1, n2, symmetric, 1e-12)) && ok;
    }
    if (has_derivative(network)) {
      constexpr auto kBackward = nt::Direction::kBackward;
      for (const auto& [n1, n2, symmetric] : {std::tuple{2, 19, false}, {18, 18, true}}) {
        if (!kIsWhole && n2 != 19) continue;
        ok = check<float>(network, n1, n2, symmetric, 1e-3f, kBackward) && ok;
        ok = (!kIsWhole || check<double>(network, n1, n2, symmetric, 1e-10, kBackward)) && ok;
      }
    }
    ok = (!kIsWhole || fuzz(network)) && ok;
  }
  ok = known_faults() && ok;
  ok = prepared_once() && ok;
  ok = throwing_schedule() && ok;
  ok = products() && ok;
  std::printf(ok ? "ok\n" : "failed\n");
  return ok ? 0 : 1;
}
