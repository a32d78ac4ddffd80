#include "program.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace nt {
namespace {

[[noreturn]] void malformed(const std::string& what) {
  throw std::invalid_argument("Malformed covariance program: " + what + ".");
}

class Reader {
 public:
  Reader(const int64_t* code, int64_t length) : code_(code), length_(length) {}

  int64_t next64() {
    if (at_ >= length_) malformed("it ends too early");
    return code_[at_++];
  }

  int next(int low, int high, const char* what) {
    const int64_t value = next64();
    if (value < low || value > high) {
      malformed(std::string(what) + " is " + std::to_string(value) + ", expected " + std::to_string(low) + " to " +
                std::to_string(high));
    }
    return static_cast<int>(value);
  }

  bool flag(const char* what) { return next(0, 1, what) != 0; }

  bool at_end() const { return at_ == length_; }

 private:
  const int64_t* code_;
  int64_t length_;
  int64_t at_ = 0;
};

// Bounds under which no product of sizes, strides and offsets is more than 64 bits, and none along one axis more
// than 32.
constexpr int kMaxSize = 1 << 20;
constexpr int64_t kMaxPositions = 1 << 24;
constexpr int kMaxDegreeOfTable = 1 << 5, kMaxExponent = 1 << 7;

// The product of what are not negative, which must stay a size of something in memory.
int64_t product(std::initializer_list<int64_t> factors, const char* what) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) malformed(std::string("too many ") + what);
  }
  return product;
}

Index3 read_space(Reader& reader) {
  Index3 space;
  for (int& size : space) size = reader.next(1, kMaxSize, "the size of an axis");
  if (n_positions(space) > kMaxPositions) malformed("an image has more than 2^24 positions");
  return space;
}

void read_windows(Reader& reader, Value& value) {
  int64_t taps = 1;
  for (Window& window : value.window) {
    window.taps = reader.next(1, kMaxSize, "a window");
    window.stride = reader.next(1, kMaxSize, "a stride");
    window.dilation = reader.next(1, kMaxSize, "a dilation");
    window.low = reader.next(-kMaxSize, kMaxSize, "a padding");
    window.high = reader.next(-kMaxSize, kMaxSize, "a padding");
    window.circular = reader.flag("circular");
    if (int64_t{window.taps - 1} * window.dilation >= 2 * kMaxSize) malformed("a window extends too far");
    taps *= window.taps;
  }
  if (taps > kMaxPositions) malformed("a window has more than 2^24 positions");
}

Table read_table(Reader& reader) {
  Table table;
  table.terms = reader.next(2, Table::kMostTerms, "the number of terms");
  table.start = reader.next(2, 3, "the order of the third term");
  table.step = reader.next(1, 2, "the step of orders");
  table.degree = reader.next(0, kMaxDegreeOfTable, "the degree of a table");
  table.lowest = reader.next(-kMaxExponent, kMaxExponent, "the lowest octave");
  table.octaves = reader.next(1, 2 * kMaxExponent, "the number of octaves");
  table.groups = reader.next(0, Table::kMostGroups, "the number of groups");
  table.even_groups = reader.next(0, table.groups, "the number of groups of even orders");
  table.first = reader.next(0, table.octaves - 1, "the first octave with groups");
  table.begin = reader.next(table.first, table.octaves - 1, "the octave from which on groups are wanted");
  return table;
}

int64_t coefficients_of(const Value& value) {
  switch (value.op) {
    case Op::kTied:
      return 4;
    case Op::kDual:
      return info(value.activation).coefficients + value.table.size();
    case Op::kNormalize:
    case Op::kDropout:
      return 1;
    case Op::kSum:
      return static_cast<int>(value.inputs.size());
    case Op::kInputs:
    case Op::kMaterialised:
    case Op::kPool:
    case Op::kGather:
    case Op::kUntie:
    case Op::kFlatten:
    case Op::kScale:
    case Op::kProduct:
      return 0;
  }
  return 0;
}

// The order of the axes, and along each axis of the output the position that is copied to each place.
void read_positions(Reader& reader, Value& value) {
  for (int& axis : value.order) axis = reader.next(0, kAxes - 1, "an axis");
  Index3 sorted = value.order;
  std::sort(sorted.begin(), sorted.end());
  if (sorted != Index3{0, 1, 2}) malformed("an axis is copied twice");
  for (int a = 0; a < kAxes; ++a) {
    std::vector<int>& positions = value.positions[value.order[a]];
    for (int i = 0; i < value.space[a]; ++i) positions.push_back(reader.next(-1, kMaxSize, "a position"));
  }
}

void check_positions(const Value& value, const Index3& space) {
  for (int a = 0; a < kAxes; ++a) {
    for (int position : value.positions[a]) {
      if (position >= space[a]) malformed("a position is copied that is not there");
    }
  }
}

// Checks that the windows fit, so that no position outside of a plane and its padding is ever read.
void check_windows(const Value& value, const Index3& space) {
  for (int a = 0; a < kAxes; ++a) {
    const Window& w = value.window[a];
    const int64_t room = int64_t{space[a]} + w.low + w.high - w.extent();
    if (room < 0 || room / w.stride + 1 != value.space[a]) malformed("a window and the size of its output disagree");
    // Or offsets of the output would be larger than the image before.
    if (value.op == Op::kTied && int64_t{value.space[a] - 1} * w.stride >= space[a]) malformed("too much padding");
  }
}

// Checks that all arrays can be counted.
void check_sizes(const Program& program) {
  for (int i = 0; i < program.n_sources; ++i) {
    const Value& value = program.values[i];
    const int64_t n = std::max(program.n1, program.n2);
    if (value.op == Op::kInputs) {
      product({n, n_positions(value.space), value.channels, int64_t{sizeof(double)}}, "inputs");
    } else {
      const int64_t per_pair = n_position_pairs(value.space, value.same_position);
      product({program.n1, program.n2, per_pair, int64_t{sizeof(double)}}, "covariances");
    }
  }
  for (const Output& output : program.outputs) {
    const int64_t per_pair = n_position_pairs(program.values[output.value].space, !output.all_pairs);
    product({program.n1, program.n2, per_pair, int64_t{sizeof(double)}}, "covariances");
  }
}

void check(const Program& program) {
  check_sizes(program);
  for (size_t i = 0; i < program.values.size(); ++i) {
    const Value& value = program.values[i];
    if (static_cast<int64_t>(value.coefficient) + coefficients_of(value) > program.n_coefficients) {
      malformed("coefficients are missing");
    }
    if (static_cast<int>(i) < program.n_sources) continue;
    const Index3& space = program.values[value.inputs[0]].space;
    switch (value.op) {
      case Op::kTied:
      case Op::kPool:
        check_windows(value, space);
        break;
      case Op::kGather:
        check_positions(value, space);
        break;
      case Op::kFlatten:
        if (n_positions(value.space) != 1) malformed("positions are left after Flatten");
        break;
      case Op::kInputs:
      case Op::kMaterialised:
      case Op::kDual:
      case Op::kUntie:
      case Op::kNormalize:
      case Op::kScale:
      case Op::kDropout:
      case Op::kSum:
      case Op::kProduct:
        for (int input : value.inputs) {
          if (program.values[input].space != value.space) malformed("sizes of images disagree");
        }
    }
    const bool joins = value.op == Op::kSum || value.op == Op::kProduct;
    if (!joins && value.inputs.size() != 1) malformed("a step reads more than one value");
    for (int input : value.inputs) {
      const bool reads_variance = value.needs || value.op == Op::kDual || value.op == Op::kNormalize;
      if (reads_variance && !program.values[input].needs) malformed("variances are missing");
    }
  }
}

void number_cotangents(Program& program) {
  for (Value& value : program.values) {
    value.cotangent = static_cast<int>(program.with_cotangents.size());
    if (value.table.terms) continue;
    for (int k = 0; k < coefficients_of(value); ++k) program.with_cotangents.push_back(value.coefficient + k);
  }
}

}  // namespace

Program decode_program(const int64_t* code, int64_t length) {
  Reader reader(code, length);
  if (reader.next64() != kEncoding) malformed("unknown encoding");
  Program program;
  program.n1 = reader.next(0, std::numeric_limits<int>::max(), "the size of a batch");
  program.n2 = reader.next(0, std::numeric_limits<int>::max(), "the size of a batch");
  program.symmetric = reader.flag("symmetric");
  program.covariances = reader.flag("covariances");
  program.n_coefficients = reader.next(2, kMaxSize, "the number of coefficients");
  program.n_sources = reader.next(1, kMaxSize, "the number of sources");
  const int n_values = reader.next(program.n_sources, kMaxSize, "the number of values");
  const int n_outputs = reader.next(1, kMaxSize, "the number of outputs");
  for (int k = 0; k < n_outputs; ++k) {
    Output output;
    output.value = reader.next(0, n_values - 1, "an output");
    output.all_pairs = reader.flag("all_pairs");
    output.ntk = reader.flag("ntk");
    program.outputs.push_back(output);
  }
  for (int i = 0; i < n_values; ++i) {
    Value value;
    value.op = static_cast<Op>(reader.next(0, kNOps - 1, "a step"));
    const bool is_source = value.op == Op::kInputs || value.op == Op::kMaterialised;
    if (is_source != (i < program.n_sources)) malformed("sources come first");
    value.needs = reader.flag("needs");
    value.coefficient = reader.next(0, kMaxSize, "a coefficient");
    value.space = read_space(reader);
    if (!is_source) {
      const int n_inputs = reader.next(1, kMaxSize, "the number of inputs");
      for (int k = 0; k < n_inputs; ++k) value.inputs.push_back(reader.next(0, i - 1, "an input"));
    }
    switch (value.op) {
      case Op::kInputs:
        value.channels = reader.next(1, std::numeric_limits<int>::max(), "the number of channels");
        break;
      case Op::kMaterialised:
        value.has_ntk = reader.flag("has_ntk");
        value.has_own = reader.flag("has_own");
        value.same_position = reader.flag("same_position");
        value.has_deficits = reader.flag("has_deficits");
        if (value.has_deficits && (!value.needs || value.has_own)) malformed("deficits without variances");
        break;
      case Op::kTied:
        value.bias_follows_weights = reader.flag("bias_follows_weights");
        read_windows(reader, value);
        break;
      case Op::kDual:
        value.activation = static_cast<Activation>(reader.next(0, kNActivations - 1, "an activation"));
        if (value.activation == Activation::kTabulated) value.table = read_table(reader);
        break;
      case Op::kPool:
        value.mean = reader.flag("mean");
        value.normalize_edges = reader.flag("normalize_edges");
        read_windows(reader, value);
        break;
      case Op::kGather:
        read_positions(reader, value);
        break;
      case Op::kUntie:
        for (int a = 0; a < kAxes; ++a) {
          value.positions[a].resize(value.space[a]);
          std::iota(value.positions[a].begin(), value.positions[a].end(), 0);
        }
        break;
      case Op::kNormalize:
        value.weighted = reader.flag("weighted");
        for (bool& axis : value.normalized) axis = reader.flag("a normalized axis");
        break;
      case Op::kFlatten:
      case Op::kScale:
      case Op::kDropout:
      case Op::kSum:
      case Op::kProduct:
        break;
    }
    program.values.push_back(std::move(value));
  }
  number_cotangents(program);
  if (!reader.at_end()) malformed("it does not end where it should");
  if (program.symmetric && program.n1 != program.n2) malformed("symmetric batches of different sizes");
  check(program);
  return program;
}

}  // namespace nt
