#include "handler.h"

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "job.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace nt {
namespace {

// Hands out buffers in order, each checked for its type and size.
template <class T>
class Buffers {
 public:
  Buffers(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  const T* argument(int64_t size, const char* what) {
    const auto buffer = args_.get<ffi::AnyBuffer>(n_args_++);
    if (!buffer.has_value()) throw std::invalid_argument(std::string("an operand is missing: ") + what);
    return checked(*buffer, size, what);
  }

  T* result(int64_t size, const char* what) {
    auto buffer = rets_.get<ffi::AnyBuffer>(n_rets_++);
    if (!buffer.has_value()) throw std::invalid_argument(std::string("a result is missing: ") + what);
    return checked(**buffer, size, what);
  }

  void check_all_used() const {
    if (n_args_ != args_.size() || n_rets_ != rets_.size()) throw std::invalid_argument("too many operands or results");
  }

 private:
  T* checked(const ffi::AnyBuffer& buffer, int64_t size, const char* what) const {
    constexpr auto kType = sizeof(T) == 4 ? ffi::DataType::F32 : ffi::DataType::F64;
    if (buffer.element_type() != kType || static_cast<int64_t>(buffer.element_count()) != size) {
      throw std::invalid_argument(std::string(what) + " has " + std::to_string(buffer.element_count()) +
                                  " elements (or the wrong type), expected " + std::to_string(size));
    }
    return static_cast<T*>(buffer.untyped_data());
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t n_args_ = 0, n_rets_ = 0;
};

template <class T>
Source<T> source_of(const Program& program, const Value& value, Buffers<T>& buffers) {
  Source<T> source;
  const int64_t n1 = program.n1, n2 = program.n2, positions = n_positions(value.space);
  if (value.op == Op::kInputs) {
    source.x1 = buffers.argument(n1 * positions * value.channels, "x1");
    source.x2 = program.symmetric ? source.x1 : buffers.argument(n2 * positions * value.channels, "x2");
    return source;
  }
  const int64_t per_pair = value.same_position ? positions : positions * positions;
  source.nngp = buffers.argument(n1 * n2 * per_pair, "nngp");
  if (value.has_ntk) source.ntk = buffers.argument(n1 * n2 * per_pair, "ntk");
  if (value.needs) {
    source.variance1 = buffers.argument(n1 * positions, "variance1");
    source.variance2 = program.symmetric ? source.variance1 : buffers.argument(n2 * positions, "variance2");
  }
  if (value.has_own) {
    source.own1 = buffers.argument(n1 * per_pair, "cov1");
    source.own2 = program.symmetric ? source.own1 : buffers.argument(n2 * per_pair, "cov2");
  }
  return source;
}

// Covariances of samples with themselves are read only where they were given, and only stored pairs of positions are.
void check_loads(const Program& program, const Plan& plan, bool own) {
  for (const Stage& stage : plan.stages) {
    for (const Instance& instance : stage.instances) {
      const Value& value = program.values[instance.value];
      if (instance.kind != Kind::kLoad || value.op != Op::kMaterialised || stage.offsets.empty()) continue;
      if (own && !value.has_own) throw std::invalid_argument("covariances of samples with themselves are missing");
      const bool only_equal = stage.offsets.size() == 1 && stage.offsets[0] == Index3{0, 0, 0};
      if (value.same_position && !only_equal) {
        throw std::invalid_argument("covariances between different positions are missing");
      }
    }
  }
}

template <class T>
void propagate(ffi::ThreadPool& pool, ffi::RemainingArgs args, ffi::RemainingRets rets, Program program) {
  Buffers<T> buffers(args, rets);
  Job<T> job;
  job.coefficients = buffers.argument(program.n_coefficients, "coefficients");
  for (int s = 0; s < program.n_sources; ++s) job.sources.push_back(source_of(program, program.values[s], buffers));
  const int64_t positions = n_positions(program.values[program.output].space);
  const int64_t per_pair = program.all_pairs ? positions * positions : positions;
  job.nngp = buffers.result(program.n1 * program.n2 * per_pair, "nngp");
  if (program.ntk) job.ntk = buffers.result(program.n1 * program.n2 * per_pair, "ntk");
  if (program.covariances) {
    job.cov1 = buffers.result(program.n1 * per_pair, "cov1");
    if (!program.symmetric) job.cov2 = buffers.result(program.n2 * per_pair, "cov2");
  }
  buffers.check_all_used();
  job.pairs = make_plan(program, Purpose::kPairs);
  job.own = make_plan(program, program.covariances ? Purpose::kOwnOutput : Purpose::kOwn);
  check_loads(program, job.pairs, false);
  check_loads(program, job.own, true);
  job.record = make_record(program);
  job.program = std::move(program);
  const Parallel parallel([&pool](std::function<void()> f) { pool.Schedule(std::move(f)); }, pool.num_threads());
  const Level& level = choose_level();
  if constexpr (sizeof(T) == 4) {
    level.run_float(job, parallel);
  } else {
    level.run_double(job, parallel);
  }
}

ffi::Error handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> code) {
  try {
    Program program = decode_program(code.begin(), static_cast<int64_t>(code.size()));
    const auto first = args.get<ffi::AnyBuffer>(0);
    if (!first.has_value()) throw std::invalid_argument("there are no operands");
    switch (first->element_type()) {
      case ffi::DataType::F32:
        propagate<float>(pool, args, rets, std::move(program));
        break;
      case ffi::DataType::F64:
        propagate<double>(pool, args, rets, std::move(program));
        break;
      default:
        throw std::invalid_argument("it computes in float32 and float64 only");
    }
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "nt_propagate: not enough memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("nt_propagate: ") + error.what());
  }
}

}  // namespace
}  // namespace nt

XLA_FFI_DEFINE_HANDLER_SYMBOL(nt_propagate, nt::handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("code"));
