#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "stages.h"

namespace nt {

void Tensor::allocate(std::vector<Index3> wanted) {
  offsets = std::move(wanted);
  if (offsets.empty()) return;
  low_ = high_ = offsets[0];
  for (const Index3& d : offsets) {
    for (int a = 0; a < kAxes; ++a) {
      low_[a] = std::min(low_[a], d[a]);
      high_[a] = std::max(high_[a], d[a]);
    }
  }
  int64_t box = 1;
  for (int a = 0; a < kAxes; ++a) box *= high_[a] - low_[a] + 1;
  start_.assign(box, -1);
  for (const Index3& d : offsets) {
    int64_t at = 0;
    for (int a = 0; a < kAxes; ++a) at = at * (high_[a] - low_[a] + 1) + d[a] - low_[a];
    start_[at] = size;
    size += Rectangle(space, d).n_positions();
  }
}

Rectangle::Rectangle(const Index3& s, const Index3& o, const Flags3& w) : space(s), offset(o), wrapped(w) {
  for (int a = 0; a < kAxes; ++a) {
    low[a] = wrapped[a] ? 0 : std::max(0, -o[a]);
    size[a] = space[a] - (wrapped[a] ? 0 : std::abs(o[a]));
    if (size[a] <= 0 || (wrapped[a] && (o[a] < 0 || o[a] >= space[a]))) {
      throw std::invalid_argument("An offset is larger than the image.");
    }
  }
}

std::vector<int> window_counts(const Window& w, int size, int count) {
  std::vector<int> counts(count, 0);
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < w.taps; ++k) {
      const int position = i * w.stride + k * w.dilation - w.low;
      counts[i] += w.circular || (position >= 0 && position < size);
    }
  }
  return counts;
}

namespace {

constexpr int64_t kMaxScratch = int64_t{1} << 40;  // positions: no memory holds more

// Offsets along one axis of a pool's input that contribute to the offset `wanted` of its output.
std::vector<int> offsets_along(const Window& w, int size, int wanted) {
  std::vector<int> along;
  for (int k = 1 - w.taps; k < w.taps; ++k) {
    int d = wanted * w.stride + k * w.dilation;
    if (w.circular) d = d % size - size;  // and those that differ by multiples of the size
    const int step = w.circular ? size : 2 * size;
    for (; d < size; d += step) {
      if (d > -size) along.push_back(d);
      if (!w.circular) break;
    }
  }
  std::sort(along.begin(), along.end());
  along.erase(std::unique(along.begin(), along.end()), along.end());
  return along;
}

// Offsets along one axis between the positions that are copied to places which lie `wanted` apart.
std::vector<int> offsets_along(const std::vector<int>& positions, int wanted) {
  std::vector<int> along;
  const int n = static_cast<int>(positions.size());
  for (int i = std::max(0, -wanted); i < std::min(n, n - wanted); ++i) {
    if (positions[i] >= 0 && positions[i + wanted] >= 0) along.push_back(positions[i + wanted] - positions[i]);
  }
  std::sort(along.begin(), along.end());
  along.erase(std::unique(along.begin(), along.end()), along.end());
  return along;
}

// Offsets before the end of a stage that contribute to the offsets wanted after it.
Offsets offsets_before(const Value& end, const Index3& space, const std::vector<Index3>& wanted) {
  Offsets offsets;
  if (end.op == Op::kFlatten || end.op == Op::kUntie) {
    if (!wanted.empty()) offsets.add({0, 0, 0});
    return offsets;
  }
  for (const Index3& d : wanted) {
    std::array<std::vector<int>, kAxes> along;
    for (int a = 0; a < kAxes; ++a) {
      const int from = end.order[a];
      along[from] = end.op == Op::kGather ? offsets_along(end.positions[from], d[a])
                                          : offsets_along(end.window[a], space[a], d[a]);
    }
    for (int z : along[0]) {
      for (int y : along[1]) {
        for (int x : along[2]) offsets.add({z, y, x});
      }
    }
  }
  return offsets;
}

Offsets offsets_of_output(const Output& output, const Index3& space) {
  Offsets offsets;
  if (!output.all_pairs) {
    offsets.add({0, 0, 0});
    return offsets;
  }
  for (int z = 1 - space[0]; z < space[0]; ++z) {
    for (int y = 1 - space[1]; y < space[1]; ++y) {
      for (int x = 1 - space[2]; x < space[2]; ++x) offsets.add({z, y, x});
    }
  }
  return offsets;
}

// Along which axes positions wrap around.
//
// A circular convolution maps pairs of positions at the offset d and at d minus the size of the image to each other:
// both are one plane then, which only circular convolutions keep apart from others.
Flags3 wrapped_axes(const Program& program, const Stage& stage) {
  Flags3 circular{}, padded{};
  for (const Instance& instance : stage.instances) {
    if (instance.kind != Kind::kTied) continue;
    const Value& value = program.values[instance.value];
    const Index3& before = stage.instances[instance.inputs[0]].space;
    for (int a = 0; a < kAxes; ++a) {
      const Window& w = value.window[a];
      if (w.trivial() || before[a] == 1) continue;
      const bool closes = w.circular && w.stride * value.space[a] == before[a];
      (closes ? circular : padded)[a] = true;
      if (w.circular && !closes) circular[a] = true;
    }
  }
  for (int a = 0; a < kAxes; ++a) {
    if (circular[a] && padded[a]) {
      throw std::invalid_argument("Circular convolutions and others share a plane, or a stride divides no circle.");
    }
  }
  return circular;
}

// The planes that stand for these offsets.
Offsets wrap(const Stage& stage, const Index3& space, const std::vector<Index3>& offsets) {
  Offsets wrapped;
  for (Index3 d : offsets) {
    for (int a = 0; a < kAxes; ++a) {
      if (stage.wrapped[a] && d[a] < 0) d[a] += space[a];
    }
    wrapped.add(d);
  }
  return wrapped;
}

// Adds an offset of a stage as a tensor knows it: those on both sides of a wrapped axis.
void add_unwrapped(const Stage& stage, const Index3& space, const Index3& d, Offsets& offsets, int axis = 0) {
  if (axis == kAxes) {
    offsets.add(d);
    return;
  }
  add_unwrapped(stage, space, d, offsets, axis + 1);
  if (!stage.wrapped[axis] || d[axis] == 0) return;
  Index3 other = d;
  other[axis] -= space[axis];
  add_unwrapped(stage, space, other, offsets, axis + 1);
}

Index3 scaled(const Index3& d, const Index3& scale) { return {d[0] * scale[0], d[1] * scale[1], d[2] * scale[2]}; }

// What a plan is of.
enum class Purpose {
  kPairs,      // the output, for pairs of samples
  kOwn,        // for each sample with itself: what the statistics need of the pools
  kOwnOutput,  // and the output
};

Plan make_plan(const Program& program, Purpose purpose, bool keeps_planes = false) {
  Plan plan;
  plan.keeps_planes = keeps_planes;
  plan.ntk = program.ntk() && purpose == Purpose::kPairs;
  plan.tensor_of.assign(program.values.size(), -1);
  const auto add_stage = [&](int end, int output, int root, bool deficit) {
    Stage stage = build_stage(program, plan, root, deficit);
    stage.end = end;
    stage.output = output;
    plan.stages.push_back(std::move(stage));
  };
  std::vector<Offsets> wanted;  // of every tensor
  for (int i = program.n_sources; i < static_cast<int>(program.values.size()); ++i) {
    const Value& value = program.values[i];
    if (!mixes_pairs(value.op)) continue;
    Tensor tensor;
    tensor.value = i;
    tensor.deficit = value.needs;
    tensor.space = value.space;
    wanted.emplace_back();
    if (purpose != Purpose::kPairs && value.op == Op::kPool && value.needs) wanted.back().add({0, 0, 0});
    plan.tensor_of[i] = static_cast<int>(plan.tensors.size());
    add_stage(i, -1, value.inputs[0], value.needs);
    tensor.has_ntk = plan.stages.back().instances[plan.stages.back().root].has_ntk;
    plan.tensors.push_back(std::move(tensor));
  }
  if (purpose != Purpose::kOwn) {
    for (size_t k = 0; k < program.outputs.size(); ++k) {
      add_stage(-1, static_cast<int>(k), program.outputs[k].value, false);
    }
  }
  // From the outputs back: which offsets each stage is asked for.
  for (auto stage = plan.stages.rbegin(); stage != plan.stages.rend(); ++stage) {
    const Index3& space = stage->instances[stage->root].space;
    Offsets offsets;
    if (stage->output >= 0) {
      offsets = offsets_of_output(program.outputs[stage->output], space);
    } else {
      const int tensor = plan.tensor_of[stage->end];
      offsets = offsets_before(program.values[stage->end], space, wanted[tensor].list());
    }
    stage->offsets = offsets.list();
    if (stage->offsets.size() > 1 || (stage->offsets.size() == 1 && stage->offsets[0] != Index3{0, 0, 0})) {
      stage->wrapped = wrapped_axes(program, *stage);
      stage->offsets = wrap(*stage, space, stage->offsets).list();
    }
    if (!plan.keeps_planes) stage->planes_at_once = planes_at_once(program, *stage);
    plan.n_planes += static_cast<int64_t>(stage->offsets.size());
    for (const Instance& instance : stage->instances) {
      const int tensor = plan.tensor_of[instance.value];
      if (instance.kind != Kind::kLoad || tensor < 0) continue;
      for (const Index3& d : stage->offsets) {
        add_unwrapped(*stage, instance.space, scaled(d, instance.scale), wanted[tensor]);
      }
    }
  }
  for (size_t t = 0; t < plan.tensors.size(); ++t) {
    plan.tensors[t].allocate(wanted[t].list());
    plan.scratch += plan.tensors[t].size;
  }
  int64_t largest = 0;
  for (const Stage& stage : plan.stages) {
    if (stage.buffer_size > kMaxScratch / std::max(stage.n_buffers, 1)) throw std::bad_alloc();
    largest = std::max(largest, stage.n_buffers * stage.buffer_size + stage.ring_size);
  }
  if (plan.scratch > kMaxScratch) throw std::bad_alloc();
  plan.scratch += largest;
  return plan;
}

// Whether a tied map's own tangent kernel is formed from the averages of variances.
bool reads_average(const Program& program, const Value& value) {
  return program.ntk() && value.op == Op::kTied && value.needs && !value.bias_follows_weights;
}

// Statistics that the plans for pairs and for samples with themselves read.
Record make_record(const Program& program, bool angular) {
  Record record(program.values.size());
  for (int i = 0; i < static_cast<int>(program.values.size()); ++i) {
    const Value& value = program.values[i];
    const int64_t n = n_positions(value.space);
    if (value.needs) record.add(Statistic::kHalfVariance, i, n);
    if (reads_average(program, value) && !angular) record.add(Statistic::kHalfAverage, i, n);
    if (value.op == Op::kDual) record.add(Statistic::kDual, i, n * n_numbers(value));
    if (value.op == Op::kNormalize || value.op == Op::kScale) {
      record.add(Statistic::kScale, i, n);
      if (value.op == Op::kScale) record.add(Statistic::kUnscaled, i, 1);
      if (value.needs) record.add(Statistic::kScaledHalf, i, n);
    }
    if (value.op == Op::kPool && value.needs) {
      record.add(Statistic::kOwnDeficit, i, n);
      record.add(Statistic::kPooledVariance, i, n);
    }
    if (!angular || !value.needs) continue;
    record.add(Statistic::kStd, i, 1);
    if (value.op == Op::kTied) record.add(Statistic::kShares, i, 2);
    if (value.op == Op::kSum) record.add(Statistic::kShares, i, static_cast<int64_t>(value.inputs.size()));
  }
  return record;
}

// Where the cotangents of what pairs read of each sample are; of duals, those of the variances that they read.
Record make_cotangent_record(const Program& program, const Record& record) {
  Record cotangents(program.values.size());
  for (int i = 0; i < static_cast<int>(program.values.size()); ++i) {
    for (const Statistic statistic : {Statistic::kHalfVariance, Statistic::kHalfAverage, Statistic::kScale,
                                      Statistic::kScaledHalf, Statistic::kOwnDeficit, Statistic::kPooledVariance}) {
      if (record.find(statistic, i) >= 0) cotangents.add(statistic, i, n_positions(program.values[i].space));
    }
  }
  return cotangents;
}

bool has_one_position(const Program& program) {
  return std::none_of(program.values.begin(), program.values.end(), [](const Value& value) {
    return n_positions(value.space) > 1 || has_windows(value) || mixes_pairs(value.op);
  });
}

// Covariances of samples with themselves are read only where they were given, and only stored pairs of positions are.
void check_loads(const Program& program, const Plan& plan, bool own) {
  for (const Stage& stage : plan.stages) {
    for (const Instance& instance : stage.instances) {
      const Value& value = program.values[instance.value];
      if (instance.kind != Kind::kLoad || value.op != Op::kMaterialised || stage.offsets.empty()) continue;
      if (own && !value.has_own) throw std::invalid_argument("Covariances of samples with themselves are missing.");
      const bool only_equal = stage.offsets.size() == 1 && stage.offsets[0] == Index3{0, 0, 0};
      if (value.same_position && !only_equal) {
        throw std::invalid_argument("Covariances between different positions are missing.");
      }
    }
  }
}

// Refuses what no cotangents are carried back through.
void check_way_back(const Program& program) {
  const auto refuse = [](const char* what) {
    throw std::invalid_argument(std::string("There is no native derivative of ") + what + ".");
  };
  if (program.covariances) refuse("covariances of each sample with itself");
  for (const Output& output : program.outputs) {
    if (n_positions(program.values[output.value].space) > 1) refuse("outputs with positions");
  }
  for (const Value& value : program.values) {
    if (value.op == Op::kMaterialised && !has_one_position(program)) refuse("materialised kernels with positions");
    if (value.op == Op::kInputs && has_one_position(program)) refuse("inputs without positions, but of their pairs");
    if (value.has_own) refuse("covariances of each sample with itself");
    if (value.op == Op::kDual && !is_differentiable(value.activation)) refuse("this nonlinearity");
  }
}

}  // namespace

Prepared prepare(Program program, Direction direction) {
  Prepared prepared;
  prepared.pairs = make_plan(program, Purpose::kPairs);
  prepared.own = make_plan(program, program.covariances ? Purpose::kOwnOutput : Purpose::kOwn);
  check_loads(program, prepared.pairs, false);
  check_loads(program, prepared.own, true);
  prepared.one_position = has_one_position(program);
  prepared.angular = prepared.one_position && direction == Direction::kForward;
  if (direction == Direction::kBackward) {
    check_way_back(program);
    prepared.kept_pairs = make_plan(program, Purpose::kPairs, true);
    prepared.kept_own = make_plan(program, Purpose::kOwn, true);
  }
  prepared.record = make_record(program, prepared.angular);
  prepared.cotangents = make_cotangent_record(program, prepared.record);
  prepared.program = std::move(program);
  return prepared;
}

std::shared_ptr<const Prepared> prepared(const int64_t* code, int64_t length, Direction direction) {
  struct Entry {
    Direction direction;
    std::vector<int64_t> code;
    std::shared_ptr<const Prepared> made;
  };
  constexpr size_t kMaxEntries = 64;
  static std::mutex mutex;
  static std::list<Entry> entries;  // the last one that was used first
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto entry = entries.begin(); entry != entries.end(); ++entry) {
      if (entry->direction != direction) continue;
      if (!std::equal(entry->code.begin(), entry->code.end(), code, code + length)) continue;
      entries.splice(entries.begin(), entries, entry);
      return entry->made;
    }
  }
  auto made = std::make_shared<const Prepared>(prepare(decode_program(code, length), direction));
  std::lock_guard<std::mutex> lock(mutex);
  entries.push_front({direction, std::vector<int64_t>(code, code + length), made});
  if (entries.size() > kMaxEntries) entries.pop_back();
  return made;
}

}  // namespace nt
