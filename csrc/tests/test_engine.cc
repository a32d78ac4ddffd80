// Runs the engine under sanitizers. What it computes is tested from Python; here it is enough that memory is in order,
// that all numbers of threads give the same bits, that all instruction sets agree, and that malformed programs throw.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
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
  int n_coefficients;
  nt::Index3 space;
  int channels;
  bool all_pairs;
};

constexpr int kCoefficients = 10;

const std::vector<int64_t> kNoWindow = {1, 1, 1, 0, 0, 0};

std::vector<int64_t> join(std::vector<std::vector<int64_t>> parts) {
  std::vector<int64_t> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Coefficients: 0 whether batches are the same, 1-4 of every linear step, 5-9 of every dual, 7-8 weights of a sum.
std::vector<int64_t> inputs(bool needs, nt::Index3 s, int channels) {
  return {0, needs, 0, s[0], s[1], s[2], channels};
}
std::vector<int64_t> linear(bool needs, nt::Index3 s, int input, std::vector<int64_t> y, std::vector<int64_t> x) {
  return join({{2, needs, 1, s[0], s[1], s[2], 1, input, 1}, kNoWindow, y, x});
}
std::vector<int64_t> dual(nt::Activation activation, bool needs, nt::Index3 s, int input) {
  return {3, needs, 5, s[0], s[1], s[2], 1, input, static_cast<int64_t>(activation)};
}
std::vector<int64_t> relu(bool needs, nt::Index3 s, int input) {
  return dual(nt::Activation::kAbRelu, needs, s, input);
}
std::vector<int64_t> pool(bool needs, nt::Index3 s, int input, std::vector<int64_t> y, std::vector<int64_t> x) {
  return join({{4, needs, 0, s[0], s[1], s[2], 1, input, 1, 0}, kNoWindow, y, x});
}
std::vector<int64_t> sum(bool needs, nt::Index3 s, int a, int b) { return {7, needs, 7, s[0], s[1], s[2], 2, a, b}; }
std::vector<int64_t> product(bool needs, nt::Index3 s, int a, int b) {
  return {8, needs, 0, s[0], s[1], s[2], 2, a, b};
}

const std::vector<int64_t> kThree = {3, 1, 1, 1, 1, 0}, kStrided = {3, 2, 1, 1, 1, 0}, kDilated = {2, 1, 2, 1, 1, 0};
const std::vector<int64_t> kRound = {3, 1, 1, 1, 1, 1}, kRoundStrided = {3, 2, 1, 1, 1, 1};

std::vector<Network> networks() {
  const nt::Index3 one{1, 1, 1}, image{1, 6, 5}, half{1, 3, 3}, small{1, 3, 2}, strided{1, 3, 3}, even{1, 4, 6}, quarter{1, 2, 3};
  return {
      {"fully connected",
       {inputs(true, one, 7), linear(true, one, 0, kNoWindow, kNoWindow), relu(false, one, 1)},
       kCoefficients, one, 7, false},
      {"two pools",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kDilated), relu(true, image, 1),
        pool(true, small, 2, {2, 2, 1, 0, 0, 0}, {2, 2, 1, 0, 0, 0}), linear(true, small, 3, kThree, kThree),
        relu(false, small, 4), pool(false, one, 5, {3, 1, 1, 0, 0, 0}, {2, 1, 1, 0, 0, 0})},
       kCoefficients, image, 3, false},
      {"overlapping pool, full output",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        pool(true, half, 2, {3, 2, 1, 1, 1, 0}, {3, 2, 1, 1, 1, 0}), linear(true, half, 3, kThree, kThree),
        relu(false, half, 4)},
       kCoefficients, image, 3, true},
      {"residual",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), relu(true, image, 1),
        linear(true, strided, 2, kStrided, kStrided), linear(true, strided, 1, kStrided, kStrided),
        sum(true, strided, 3, 4), relu(false, strided, 5),
        pool(false, one, 6, {3, 1, 1, 0, 0, 0}, {3, 1, 1, 0, 0, 0})},
       kCoefficients, image, 3, false},
      {"circular, a product",
       {inputs(true, even, 2), linear(true, even, 0, kRound, kRound), relu(true, even, 1),
        linear(true, quarter, 2, kRoundStrided, kRoundStrided), relu(true, quarter, 3),
        product(true, quarter, 3, 4), pool(true, quarter, 5, kThree, kThree), linear(false, quarter, 6, kRound, kRound)},
       kCoefficients, even, 2, true},
      {"smooth nonlinearities",
       {inputs(true, image, 3), linear(true, image, 0, kThree, kThree), dual(nt::Activation::kErf, true, image, 1),
        linear(true, image, 2, kThree, kThree), dual(nt::Activation::kGelu, true, image, 3),
        linear(true, image, 4, kThree, kThree), dual(nt::Activation::kSin, true, image, 5),
        linear(true, image, 6, kThree, kThree), dual(nt::Activation::kRbf, true, image, 7),
        linear(true, image, 8, kThree, kThree), dual(nt::Activation::kExp, false, image, 9),
        pool(false, one, 10, {6, 1, 1, 0, 0, 0}, {5, 1, 1, 0, 0, 0})},
       kCoefficients, image, 3, false},
  };
}

std::vector<int64_t> encode(const Network& network, int n1, int n2, bool symmetric) {
  std::vector<int64_t> code = {2, n1, n2, symmetric, 1, 1, network.all_pairs, network.n_coefficients, 1,
                               static_cast<int64_t>(network.values.size()),
                               static_cast<int64_t>(network.values.size()) - 1};
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

template <class T>
std::vector<T> run(const Network& network, int n1, int n2, bool symmetric, int n_threads) {
  const auto code = encode(network, n1, n2, symmetric);
  nt::Job<T> job;
  job.program = nt::decode_program(code.data(), static_cast<int64_t>(code.size()));
  job.pairs = nt::make_plan(job.program, nt::Purpose::kPairs);
  job.own = nt::make_plan(job.program, nt::Purpose::kOwnOutput);
  job.record = nt::make_record(job.program);
  const std::vector<T> coefficients = {0, T(1.7), T(0.1), T(1.7), T(0.1), T(0.5), T(0.5), T(1), T(0.5), T(0.25)};
  job.coefficients = coefficients.data();
  std::mt19937 random(0);
  std::normal_distribution<T> normal;
  const int64_t size = nt::n_positions(network.space) * network.channels;
  std::vector<T> x1(n1 * size), x2(n2 * size);
  for (T& x : x1) x = normal(random);
  for (T& x : x2) x = normal(random);
  nt::Source<T> source;
  source.x1 = x1.data();
  source.x2 = symmetric ? x1.data() : x2.data();
  job.sources.push_back(source);
  const int64_t positions = nt::n_positions(job.program.values.back().space);
  const int64_t per_pair = network.all_pairs ? positions * positions : positions;
  std::vector<T> nngp(n1 * n2 * per_pair), ntk(nngp.size()), cov1(n1 * per_pair), cov2(n2 * per_pair);
  job.nngp = nngp.data();
  job.ntk = ntk.data();
  job.cov1 = cov1.data();
  if (!symmetric) job.cov2 = cov2.data();
  {
    Pool pool;
    const nt::Parallel parallel(n_threads > 1 ? pool.schedule() : nt::Schedule(), n_threads);
    const nt::Level& level = nt::choose_level();
    if constexpr (sizeof(T) == 4) {
      level.run_float(job, parallel);
    } else {
      level.run_double(job, parallel);
    }
  }
  for (const auto* part : {&ntk, &cov1, &cov2}) nngp.insert(nngp.end(), part->begin(), part->end());
  return nngp;
}

template <class T>
bool check(const Network& network, int n1, int n2, bool symmetric, T tolerance) {
  std::vector<T> reference;
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    setenv("NT_CPU_LEVEL", level, 1);
    const auto expected = run<T>(network, n1, n2, symmetric, 1);
    if (reference.empty()) reference = expected;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!(std::abs(expected[i] - reference[i]) <= tolerance)) {
        std::printf("%s at level %s: entry %zu is %g, not %g\n", network.name, level, i, double(expected[i]),
                    double(reference[i]));
        return false;
      }
    }
    if (run<T>(network, n1, n2, symmetric, 3) != expected) {
      std::printf("%s at level %s depends on the number of threads\n", network.name, level);
      return false;
    }
  }
  return true;
}

// Every program that differs in one number from a good one is refused or runs.
bool fuzz(const Network& network) {
  const auto good = encode(network, 2, 2, false);
  for (size_t length = 0; length < good.size(); ++length) {
    try {
      nt::decode_program(good.data(), static_cast<int64_t>(length));
      std::printf("%s: a program cut at %zu was taken\n", network.name, length);
      return false;
    } catch (const std::invalid_argument&) {
    }
  }
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int64_t value : {int64_t{-1}, int64_t{0}, int64_t{2}, int64_t{5}, int64_t{1} << 40}) {
      auto code = good;
      code[at] = value;
      try {
        const nt::Program program = nt::decode_program(code.data(), static_cast<int64_t>(code.size()));
        if (nt::n_positions(program.values[0].space) > 100) continue;
        nt::make_plan(program, nt::Purpose::kPairs);
        nt::make_plan(program, nt::Purpose::kOwn);
        nt::make_record(program);
      } catch (const std::invalid_argument&) {
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  bool ok = true;
  for (const Network& network : networks()) {
    for (const auto& [n1, n2, symmetric] : {std::tuple{3, 2, false}, {2, 19, false}, {18, 18, true}, {1, 1, true}}) {
      ok = check<float>(network, n1, n2, symmetric, 2e-5f) && ok;
      ok = check<double>(network, n1, n2, symmetric, 1e-12) && ok;
    }
    ok = fuzz(network) && ok;
  }
  std::printf(ok ? "ok\n" : "failed\n");
  return ok ? 0 : 1;
}
