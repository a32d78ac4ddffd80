#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace nt {

std::vector<Index3> Offsets::list() const {
  std::vector<Index3> found;
  for (int z = 1 - space_[0]; z < space_[0]; ++z) {
    for (int y = 1 - space_[1]; y < space_[1]; ++y) {
      for (int x = 1 - space_[2]; x < space_[2]; ++x) {
        if (contains({z, y, x})) found.push_back({z, y, x});
      }
    }
  }
  return found;
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

bool is_readout(Op op) { return op == Op::kPool || op == Op::kFlatten; }
bool is_source(Op op) { return op == Op::kInputs || op == Op::kMaterialised; }

// Builds the instances of one stage, the readout's input last.
class StageBuilder {
 public:
  StageBuilder(const Program& program, const Plan& plan, Stage& stage)
      : program_(program), plan_(plan), stage_(stage) {}

  int build(int value, const Index3& scale, bool deficit) {
    const int found = instance(value, scale);
    if (!stage_.instances[found].deficit || deficit) return found;
    return to_covariance(found);
  }

 private:
  using Key = std::tuple<int, Index3, bool>;

  int to_covariance(int from) {
    const Key key{stage_.instances[from].value, stage_.instances[from].scale, false};
    const auto known = made_.find(key);
    if (known != made_.end()) return known->second;
    Instance made = stage_.instances[from];
    made.kind = Kind::kToCovariance;
    made.inputs = {from};
    made.deficit = false;
    return add(key, std::move(made));
  }

  int instance(int number, const Index3& scale) {
    const Value& value = program_.values[number];
    const Key key{number, scale, value.needs};
    const auto known = made_.find(key);
    if (known != made_.end()) return known->second;
    Instance made;
    made.value = number;
    made.space = value.space;
    made.scale = scale;
    made.deficit = value.needs;
    if (is_source(value.op)) {
      made.kind = Kind::kLoad;
      made.has_ntk = plan_.ntk && value.has_ntk;
      return add(key, std::move(made));
    }
    if (is_readout(value.op)) {
      made.kind = Kind::kLoad;
      made.has_ntk = plan_.tensors[plan_.tensor_of[number]].has_ntk;
      return add(key, std::move(made));
    }
    Index3 before = scale;
    // A dual and a normalization read deficits whatever they return; the others read what they return.
    bool reads_deficit = value.needs;
    switch (value.op) {
      case Op::kLinear:
        made.kind = Kind::kLinear;
        for (int a = 0; a < kAxes; ++a) {
          // One position has the offset 0 alone, whatever the scale: so products of strides stay below sizes of images.
          before[a] = value.space[a] == 1 ? 1 : before[a] * value.window[a].stride;
        }
        break;
      case Op::kDual:
        made.kind = Kind::kDual;
        reads_deficit = true;
        break;
      case Op::kNormalize:
        made.kind = Kind::kNormalize;
        break;
      case Op::kMultiply:
        made.kind = Kind::kMultiply;
        break;
      default:
        made.kind = Kind::kCombine;
    }
    made.has_ntk = plan_.ntk && value.op == Op::kLinear;
    for (int input : value.inputs) {
      made.inputs.push_back(build(input, before, reads_deficit));
      made.has_ntk |= stage_.instances[made.inputs.back()].has_ntk;
    }
    return add(key, std::move(made));
  }

  int add(const Key& key, Instance made) {
    stage_.instances.push_back(std::move(made));
    const int number = static_cast<int>(stage_.instances.size()) - 1;
    made_[key] = number;
    return number;
  }

  const Program& program_;
  const Plan& plan_;
  Stage& stage_;
  std::map<Key, int> made_;
};

bool is_head(const Program& program, const Instance& instance) {
  return instance.kind == Kind::kLoad ||
         (instance.kind == Kind::kLinear && has_windows(program.values[instance.value]));
}

bool same_geometry(const Instance& a, const Instance& b) { return a.space == b.space && a.scale == b.scale; }

int count_uses(const Stage& stage, int instance) {
  int uses = instance == stage.root;
  for (const Instance& other : stage.instances) {
    uses += static_cast<int>(std::count(other.inputs.begin(), other.inputs.end(), instance));
  }
  return uses;
}

// A linear step and the dual of the ReLU family after it are one loop, if nothing else reads what is between them.
bool can_fuse(const Program& program, const Stage& stage, int linear, int dual) {
  const Instance& a = stage.instances[linear];
  const Instance& b = stage.instances[dual];
  return a.kind == Kind::kLinear && b.kind == Kind::kDual && b.inputs[0] == linear && a.deficit &&
         (!a.has_ntk || program.values[a.value].bias_follows_weights) && count_uses(stage, linear) == 1 &&
         program.values[b.value].activation == Activation::kAbRelu;
}

void schedule(const Program& program, Stage& stage) {
  for (int i = 0; i < static_cast<int>(stage.instances.size()); ++i) {
    const Instance& instance = stage.instances[i];
    const bool head = is_head(program, instance);
    if (!head && !stage.passes.empty() && same_geometry(stage.instances[stage.passes.back().geometry], instance)) {
      Pass& pass = stage.passes.back();
      if (pass.head >= 0 && pass.row_ops.empty() && pass.fused_dual < 0 && can_fuse(program, stage, pass.head, i)) {
        pass.fused_dual = i;
      } else {
        pass.row_ops.push_back(i);
      }
      continue;
    }
    Pass pass;
    pass.geometry = i;
    if (head) {
      pass.head = i;
    } else {
      pass.row_ops.push_back(i);
    }
    stage.passes.push_back(pass);
  }
}

// Whether rows of the output may overwrite those of the input: each is read by the time it is written, since a window
// without gaps reads at its own position at the latest.
bool can_overwrite(const Value& linear, const Index3& space_in) {
  if (linear.space != space_in) return false;
  return std::all_of(linear.window.begin(), linear.window.end(), [](const Window& w) {
    return w.stride == 1 && w.dilation == 1 && w.low >= 0 && w.taps - 1 - w.low >= 0 && !w.circular;
  });
}

class BufferAllocator {
 public:
  BufferAllocator(const Program& program, Stage& stage) : program_(program), stage_(stage) {
    for (size_t i = 0; i < stage.instances.size(); ++i) uses_.push_back(count_uses(stage, static_cast<int>(i)));
  }

  void run() {
    for (const Pass& pass : stage_.passes) {
      int kept = -1;  // read by the head until the pass is over, unless rows may be overwritten
      if (pass.head >= 0) {
        Instance& head = stage_.instances[pass.head];
        const int target = pass.fused_dual >= 0 ? pass.fused_dual : pass.head;
        if (head.kind == Kind::kLinear) {
          const int input = head.inputs[0];
          --uses_[input];
          if (can_overwrite(program_.values[head.value], stage_.instances[input].space)) {
            if (uses_[input] == 0) {
              stage_.instances[target].buffer = stage_.instances[input].buffer;
            }
          } else {
            kept = input;
            ++uses_[input];
          }
        }
        if (stage_.instances[target].buffer < 0) stage_.instances[target].buffer = take();
      }
      for (int op : pass.row_ops) {
        Instance& instance = stage_.instances[op];
        for (int input : instance.inputs) {
          if (--uses_[input] > 0) continue;
          const int buffer = stage_.instances[input].buffer;
          if (instance.buffer < 0) {
            instance.buffer = buffer;
          } else {
            free_.push_back(buffer);
          }
        }
        if (instance.buffer < 0) instance.buffer = take();
      }
      if (kept >= 0 && --uses_[kept] == 0) free_.push_back(stage_.instances[kept].buffer);
    }
  }

 private:
  int take() {
    if (free_.empty()) return stage_.n_buffers++;
    const int buffer = free_.back();
    free_.pop_back();
    return buffer;
  }

  const Program& program_;
  Stage& stage_;
  std::vector<int> uses_;
  std::vector<int> free_;
};

void measure(const Program& program, Stage& stage) {
  for (const Instance& instance : stage.instances) {
    if (instance.kind != Kind::kLinear) continue;
    const Value& value = program.values[instance.value];
    const Index3& space = stage.instances[instance.inputs[0]].space;
    const Window& w = value.window[2];
    stage.pad_low = std::max(stage.pad_low, w.low);
    stage.pad_high = std::max(stage.pad_high, (value.space[2] - 1) * w.stride + w.extent() - w.low - space[2]);
  }
  for (const Instance& instance : stage.instances) {
    const int64_t row = instance.space[2] + stage.pad_low + stage.pad_high;
    stage.buffer_size = std::max(stage.buffer_size, instance.space[0] * int64_t{instance.space[1]} * row);
    if (instance.kind != Kind::kLinear) continue;
    const Value& value = program.values[instance.value];
    int64_t rows = value.window[1].extent();
    if (!value.window[0].trivial()) {
      rows = int64_t{value.window[0].extent()} *
             ((value.space[1] - 1) * int64_t{value.window[1].stride} + value.window[1].extent());
    }
    stage.ring_size = std::max(stage.ring_size, rows * value.space[2]);
  }
}

// Offsets of a readout's input that contribute to the offsets wanted of its output.
Offsets offsets_before(const Value& readout, const Index3& space, const Tensor& tensor) {
  Offsets offsets(space);
  for (const Index3& wanted : tensor.offsets.list()) {
    if (readout.op == Op::kFlatten) {
      offsets.add({0, 0, 0});
      continue;
    }
    std::array<std::vector<int>, kAxes> along;
    for (int a = 0; a < kAxes; ++a) {
      const Window& w = readout.window[a];
      for (int k = 1 - w.taps; k < w.taps; ++k) {
        const int d = wanted[a] * w.stride + k;
        if (std::abs(d) < space[a]) along[a].push_back(d);
      }
    }
    for (int z : along[0]) {
      for (int y : along[1]) {
        for (int x : along[2]) offsets.add({z, y, x});
      }
    }
  }
  return offsets;
}

void allocate(Tensor& tensor) {
  tensor.start.assign(tensor.offsets.capacity(), -1);
  for (const Index3& d : tensor.offsets.list()) {
    tensor.start[tensor.offsets.index(d)] = tensor.size;
    tensor.size += Rectangle(tensor.offsets.space(), d).n_positions();
  }
}

// Along which axes positions wrap around.
//
// A circular convolution maps pairs of positions at the offset d and at d minus the size of the image to each other:
// both are one plane then, which only circular convolutions keep apart from others.
Flags3 wrapped_axes(const Program& program, const Stage& stage) {
  Flags3 circular{}, padded{};
  for (const Instance& instance : stage.instances) {
    if (instance.kind != Kind::kLinear) continue;
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

void wrap(Stage& stage, const Index3& space, Offsets& offsets) {
  Offsets wrapped(space);
  for (Index3 d : offsets.list()) {
    for (int a = 0; a < kAxes; ++a) {
      if (stage.wrapped[a] && d[a] < 0) d[a] += space[a];
    }
    wrapped.add(d);
  }
  offsets = wrapped;
}

// Adds an offset of a stage as a tensor knows it: those on both sides of a wrapped axis.
void add_unwrapped(const Stage& stage, const Index3& d, Offsets& offsets, int axis = 0) {
  if (axis == kAxes) {
    offsets.add(d);
    return;
  }
  add_unwrapped(stage, d, offsets, axis + 1);
  if (!stage.wrapped[axis] || d[axis] == 0) return;
  Index3 other = d;
  other[axis] -= offsets.space()[axis];
  add_unwrapped(stage, other, offsets, axis + 1);
}

Index3 scaled(const Index3& d, const Index3& scale) { return {d[0] * scale[0], d[1] * scale[1], d[2] * scale[2]}; }

// What a plan is for.
enum class Purpose {
  kPairs,      // the output, for pairs of samples
  kOwn,        // for each sample with itself: what the statistics need of the pools
  kOwnOutput,  // and the output
};

Plan make_plan(const Program& program, Purpose purpose) {
  Plan plan;
  plan.ntk = program.ntk && purpose == Purpose::kPairs;
  plan.tensor_of.assign(program.values.size(), -1);
  const Index3 ones{1, 1, 1};
  const auto add_stage = [&](int readout, int root, bool deficit) {
    Stage stage;
    stage.readout = readout;
    stage.root = StageBuilder(program, plan, stage).build(root, ones, deficit);
    schedule(program, stage);
    BufferAllocator(program, stage).run();
    measure(program, stage);
    plan.stages.push_back(std::move(stage));
  };
  for (int i = program.n_sources; i < static_cast<int>(program.values.size()); ++i) {
    const Value& value = program.values[i];
    if (!is_readout(value.op)) continue;
    Tensor tensor;
    tensor.value = i;
    tensor.deficit = value.needs;
    tensor.offsets = Offsets(value.space);
    if (purpose != Purpose::kPairs && value.op == Op::kPool && value.needs) tensor.offsets.add({0, 0, 0});
    plan.tensor_of[i] = static_cast<int>(plan.tensors.size());
    add_stage(i, value.inputs[0], value.needs);
    tensor.has_ntk = plan.stages.back().instances[plan.stages.back().root].has_ntk;
    plan.tensors.push_back(std::move(tensor));
  }
  if (purpose != Purpose::kOwn) add_stage(-1, program.output, false);

  // From the output back: which offsets each stage is asked for.
  for (auto stage = plan.stages.rbegin(); stage != plan.stages.rend(); ++stage) {
    const Instance& root = stage->instances[stage->root];
    Offsets offsets(root.space);
    if (stage->readout >= 0) {
      const Tensor& tensor = plan.tensors[plan.tensor_of[stage->readout]];
      offsets = offsets_before(program.values[stage->readout], root.space, tensor);
    } else if (program.all_pairs) {
      for (int z = 1 - root.space[0]; z < root.space[0]; ++z) {
        for (int y = 1 - root.space[1]; y < root.space[1]; ++y) {
          for (int x = 1 - root.space[2]; x < root.space[2]; ++x) offsets.add({z, y, x});
        }
      }
    } else {
      offsets.add({0, 0, 0});
    }
    const std::vector<Index3> all = offsets.list();
    if (all.size() > 1 || (all.size() == 1 && all[0] != Index3{0, 0, 0})) {
      stage->wrapped = wrapped_axes(program, *stage);
      wrap(*stage, root.space, offsets);
    }
    stage->offsets = offsets.list();
    plan.n_planes += static_cast<int64_t>(stage->offsets.size());
    for (const Instance& instance : stage->instances) {
      const int tensor = plan.tensor_of[instance.value];
      if (instance.kind != Kind::kLoad || tensor < 0) continue;
      for (const Index3& d : stage->offsets) {
        add_unwrapped(*stage, scaled(d, instance.scale), plan.tensors[tensor].offsets);
      }
    }
  }
  for (Tensor& tensor : plan.tensors) {
    allocate(tensor);
    plan.scratch += tensor.size;
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

// Statistics that the plans for pairs and for samples with themselves read.
Record make_record(const Program& program) {
  Record record(program.values.size());
  for (int i = 0; i < static_cast<int>(program.values.size()); ++i) {
    const Value& value = program.values[i];
    const int64_t n = n_positions(value.space);
    if (value.needs) record.add(Statistic::kHalfVariance, i, n);
    if (value.op == Op::kLinear && value.needs) record.add(Statistic::kHalfAverage, i, n);
    if (value.op == Op::kDual) record.add(Statistic::kDual, i, n * sizes_of(value.activation).planes);
    if (value.op == Op::kNormalize) {
      record.add(Statistic::kNormalizer, i, n);
      record.add(Statistic::kNormalizedHalf, i, n);
    }
    if (value.op == Op::kPool && value.needs) {
      record.add(Statistic::kOwnDeficit, i, n);
      record.add(Statistic::kPooledVariance, i, n);
    }
  }
  return record;
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

}  // namespace

Prepared prepare(Program program) {
  Prepared prepared;
  prepared.pairs = make_plan(program, Purpose::kPairs);
  prepared.own = make_plan(program, program.covariances ? Purpose::kOwnOutput : Purpose::kOwn);
  check_loads(program, prepared.pairs, false);
  check_loads(program, prepared.own, true);
  prepared.record = make_record(program);
  prepared.program = std::move(program);
  return prepared;
}

}  // namespace nt
