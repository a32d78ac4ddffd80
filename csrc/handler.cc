#include "handler.h"

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "job.h"
#include "pages.h"
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
    T* data = checked(**buffer, size, what);
    ask_for_large_pages(data, size * sizeof(T));
    return data;
  }

  // Cotangents that nobody wants have no elements.
  T* wanted_result(int64_t size, const char* what) {
    auto buffer = rets_.get<ffi::AnyBuffer>(n_rets_);
    const bool is_unwanted = buffer.has_value() && (**buffer).element_count() == 0;
    T* data = result(is_unwanted ? 0 : size, what);
    return is_unwanted ? nullptr : data;
  }

  auto arguments() {
    return [this](int64_t size, const char* what) { return argument(size, what); };
  }
  auto results() {
    return [this](int64_t size, const char* what) { return result(size, what); };
  }
  auto wanted_results() {
    return [this](int64_t size, const char* what) { return wanted_result(size, what); };
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

Parallel on_threads(ffi::ThreadPool& pool) {
  return Parallel([&pool](std::function<void()> f) { pool.Schedule(std::move(f)); }, pool.num_threads());
}

struct Propagate {
  static constexpr const char* kName = "nt_propagate";
  static constexpr Direction kDirection = Direction::kForward;

  template <class T>
  static void run(const Prepared& prepared, Buffers<T>& buffers, const Parallel& parallel) {
    const Job<T> job = make_job<T>(prepared, buffers.arguments(), buffers.results());
    buffers.check_all_used();
    if constexpr (sizeof(T) == 4) {
      level().run_float(job, parallel);
    } else {
      level().run_double(job, parallel);
    }
  }
};

// Operands: those of the program, then cotangents of its results. Results: cotangents of its operands.
struct Backward {
  static constexpr const char* kName = "nt_backward";
  static constexpr Direction kDirection = Direction::kBackward;

  template <class T>
  static void run(const Prepared& prepared, Buffers<T>& buffers, const Parallel& parallel) {
    BackwardJob<T> job{make_job<T>(prepared, buffers.arguments())};
    job.cotangents = take_results<const T>(prepared.program, buffers.arguments());
    job.results = take_like_operands<T>(prepared.program, buffers.wanted_results());
    buffers.check_all_used();
    if constexpr (sizeof(T) == 4) {
      level().backward_float(job, parallel);
    } else {
      level().backward_double(job, parallel);
    }
  }
};

// Operands: those of the program, then their tangents. Results: tangents of its results.
struct Tangents {
  static constexpr const char* kName = "nt_tangents";
  static constexpr Direction kDirection = Direction::kBackward;

  template <class T>
  static void run(const Prepared& prepared, Buffers<T>& buffers, const Parallel& parallel) {
    TangentJob<T> job{make_job<T>(prepared, buffers.arguments())};
    job.tangents = take_like_operands<const T>(prepared.program, buffers.arguments());
    job.job.results = take_results<T>(prepared.program, buffers.results());
    buffers.check_all_used();
    if constexpr (sizeof(T) == 4) {
      level().tangents_float(job, parallel);
    } else {
      level().tangents_double(job, parallel);
    }
  }
};

// Runs `work`, whose exceptions become errors of XLA.
template <class F>
ffi::Error guarded(const char* name, const F& work) {
  try {
    work();
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(name) + ": not enough memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string(name) + ": " + error.what());
  }
}

template <class Target>
ffi::Error handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> code) {
  return guarded(Target::kName, [&] {
    const auto program = prepared(code.begin(), static_cast<int64_t>(code.size()), Target::kDirection);
    const auto run = [&](auto buffers) { Target::run(*program, buffers, on_threads(pool)); };
    const auto first = args.get<ffi::AnyBuffer>(0);
    if (!first.has_value()) throw std::invalid_argument("there are no operands");
    switch (first->element_type()) {
      case ffi::DataType::F32:
        run(Buffers<float>(args, rets));
        break;
      case ffi::DataType::F64:
        run(Buffers<double>(args, rets));
        break;
      default:
        throw std::invalid_argument("it computes in float32 and float64 only");
    }
  });
}

using Doubles = ffi::BufferR2<ffi::DataType::F64>;

template <class T>
ProductsJob<T> products_job(ffi::AnyBuffer matrix, Doubles right, Doubles left, ffi::Result<Doubles> direct,
                            ffi::Result<Doubles> transposed) {
  const auto shape = matrix.dimensions();
  return {shape[0],           shape[1],          right.dimensions()[1], static_cast<const T*>(matrix.untyped_data()),
          right.typed_data(), left.typed_data(), direct->typed_data(),  transposed->typed_data()};
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer matrix, Doubles right, Doubles left,
                    ffi::Result<Doubles> direct, ffi::Result<Doubles> transposed) {
  return guarded("nt_products", [&] {
    const auto shape = matrix.dimensions();
    const auto is = [](const Doubles& vectors, int64_t rows, int64_t columns) {
      return vectors.dimensions()[0] == rows && vectors.dimensions()[1] == columns;
    };
    const int64_t n_vectors = right.dimensions()[1];
    if (shape.size() != 2 || !is(right, shape[1], n_vectors) || !is(left, shape[0], n_vectors) ||
        !is(*direct, shape[0], n_vectors) || !is(*transposed, shape[1], n_vectors)) {
      throw std::invalid_argument("sizes of a matrix and of vectors do not match");
    }
    switch (matrix.element_type()) {
      case ffi::DataType::F32:
        level().products_float(products_job<float>(matrix, right, left, direct, transposed), on_threads(pool));
        break;
      case ffi::DataType::F64:
        level().products_double(products_job<double>(matrix, right, left, direct, transposed), on_threads(pool));
        break;
      default:
        throw std::invalid_argument("it takes matrices in float32 and float64 only");
    }
  });
}

}  // namespace
}  // namespace nt

#define NT_DEFINE_HANDLER(symbol, Target) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(          \
      symbol, nt::handle<nt::Target>,     \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("code"))
NT_DEFINE_HANDLER(nt_propagate, Propagate);
NT_DEFINE_HANDLER(nt_backward, Backward);
NT_DEFINE_HANDLER(nt_tangents, Tangents);
#undef NT_DEFINE_HANDLER

XLA_FFI_DEFINE_HANDLER_SYMBOL(nt_products, nt::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<nt::Doubles>()
                                  .Arg<nt::Doubles>()
                                  .Ret<nt::Doubles>()
                                  .Ret<nt::Doubles>());
