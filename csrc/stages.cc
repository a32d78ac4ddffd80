// Stages: the instances that lead to their end, in passes over rows, and the buffers that their planes go to.
#include "stages.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace nt {
namespace {

// Builds the instances of one stage, the input of its end last.
class StageBuilder {
 public:
  StageBuilder(const Program& program, const Plan& plan, Stage& stage)
      : program_(program), plan_(plan), stage_(stage) {}

  int build(int value, const Index3& scale, bool deficit) {
    const int found = instance(value, scale);
    if (!stage_.instances[found].deficit || deficit) return found;
    return as_covariance(found);
  }

 private:
  using Key = std::tuple<int, Index3, bool>;

  int as_covariance(int from) {
    const Key key{stage_.instances[from].value, stage_.instances[from].scale, false};
    const auto known = made_.find(key);
    if (known != made_.end()) return known->second;
    Instance made = stage_.instances[from];
    made.kind = Kind::kAsCovariance;
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
    if (mixes_pairs(value.op)) {
      made.kind = Kind::kLoad;
      made.has_ntk = plan_.tensors[plan_.tensor_of[number]].has_ntk;
      return add(key, std::move(made));
    }
    Index3 before = scale;
    // A dual reads deficits whatever it returns; the others read what they return.
    bool reads_deficit = value.needs;
    switch (value.op) {
      case Op::kTied:
        made.kind = Kind::kTied;
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
      case Op::kScale:
        made.kind = Kind::kRescale;
        break;
      case Op::kDropout:
        made.kind = Kind::kDropout;
        break;
      case Op::kSum:
        made.kind = Kind::kSum;
        break;
      case Op::kProduct:
        made.kind = Kind::kProduct;
        break;
      case Op::kInputs:
      case Op::kMaterialised:
      case Op::kPool:
      case Op::kGather:
      case Op::kUntie:
      case Op::kFlatten:
        break;  // loads, see above
    }
    made.has_ntk = plan_.ntk && value.op == Op::kTied;
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
  return instance.kind == Kind::kLoad || (instance.kind == Kind::kTied && has_windows(program.values[instance.value]));
}

bool same_geometry(const Instance& a, const Instance& b) { return a.space == b.space && a.scale == b.scale; }

int count_uses(const Stage& stage, int instance) {
  int uses = instance == stage.root;
  for (const Instance& other : stage.instances) {
    uses += static_cast<int>(std::count(other.inputs.begin(), other.inputs.end(), instance));
  }
  return uses;
}

// A tied map and the dual after it may be one loop, if nothing else reads what is between them: nothing, or a mask.
bool can_fuse(const Program& program, const Stage& stage, int tied, int dual, int mask = -1) {
  const Instance& a = stage.instances[tied];
  const Instance& b = stage.instances[dual];
  if (mask >= 0) {
    const Instance& m = stage.instances[mask];
    if (program.values[m.value].op != Op::kScale || m.inputs[0] != tied || count_uses(stage, mask) != 1) return false;
  }
  return a.kind == Kind::kTied && b.kind == Kind::kDual && b.inputs[0] == (mask < 0 ? tied : mask) && a.deficit &&
         (!a.has_ntk || program.values[a.value].bias_follows_weights) && count_uses(stage, tied) == 1 &&
         is_fused(program.values[b.value].activation);
}

void schedule(const Program& program, Stage& stage, bool keeps_planes) {
  for (int i = 0; i < static_cast<int>(stage.instances.size()); ++i) {
    const Instance& instance = stage.instances[i];
    const bool head = is_head(program, instance);
    if (!head && !stage.passes.empty() && same_geometry(stage.instances[stage.passes.back().geometry], instance)) {
      Pass& pass = stage.passes.back();
      const bool after_head = pass.head >= 0 && pass.row_ops.empty() && pass.fused_dual < 0;
      if (after_head && can_fuse(program, stage, pass.head, i)) {
        pass.fused_dual = i;
      } else {
        const bool after_mask = !keeps_planes && pass.head >= 0 && pass.fused_dual < 0 && pass.row_ops.size() == 1;
        if (after_mask && can_fuse(program, stage, pass.head, i, pass.row_ops[0])) pass.unmasked_dual = i;
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
bool can_overwrite(const Value& tied, const Index3& space_in) {
  if (tied.space != space_in) return false;
  return std::all_of(tied.window.begin(), tied.window.end(), [](const Window& w) {
    return w.stride == 1 && w.dilation == 1 && w.low >= 0 && w.taps - 1 - w.low >= 0 && !w.circular;
  });
}

// Where a dual is fused with the map before it and read by a convolution alone, that loop adds neighbours up for it.
void find_sums(const Program& program, Stage& stage) {
  for (const Pass& pass : stage.passes) {
    const int dual = pass.fused_dual >= 0 ? pass.fused_dual : pass.unmasked_dual;
    if (dual < 0 || count_uses(stage, dual) != 1 || dual == stage.root) continue;
    const auto reads = [&](const Instance& i) { return i.kind == Kind::kTied && i.inputs[0] == dual; };
    const auto reader = std::find_if(stage.instances.begin(), stage.instances.end(), reads);
    if (reader == stage.instances.end()) continue;
    const Value& value = program.values[reader->value];
    const auto& w = value.window;
    Instance& before = stage.instances[dual];
    const bool of_neighbours = w[2].is_three_in_turn() && w[2].low == 1 && w[0].trivial();
    if (!before.deficit || !of_neighbours || !can_overwrite(value, before.space)) continue;
    before.sums_for = static_cast<int>(reader - stage.instances.begin());
  }
}

class BufferAllocator {
 public:
  BufferAllocator(const Program& program, Stage& stage) : program_(program), stage_(stage) {
    for (size_t i = 0; i < stage.instances.size(); ++i) {
      uses_.push_back(count_uses(stage, static_cast<int>(i)) + (stage.instances[i].kept ? 1 : 0));
    }
  }

  void run() {
    for (const Pass& pass : stage_.passes) {
      for (Room& room : free_) room.row_shift = 0;
      int kept = -1;  // read by the head until the pass is over, unless rows may be overwritten
      if (pass.head >= 0) {
        Instance& head = stage_.instances[pass.head];
        const int target = pass.fused_dual >= 0 ? pass.fused_dual : pass.head;
        if (head.kind == Kind::kTied) {
          const int input = head.inputs[0];
          --uses_[input];
          if (can_overwrite(program_.values[head.value], stage_.instances[input].space)) {
            if (uses_[input] == 0) overwrite(pass.head, input, target);
          } else {
            kept = input;
            ++uses_[input];
          }
        }
        if (stage_.instances[target].buffer < 0) take(stage_.instances[target]);
        if (head.kept && head.buffer < 0) take(head);  // what is before the fused dual
      }
      for (int op : pass.row_ops) {
        Instance& instance = stage_.instances[op];
        for (int input : instance.inputs) {
          if (--uses_[input] > 0) continue;
          free_.push_back(room_of(input));
          if (instance.buffer < 0) take(instance);
        }
        if (instance.buffer < 0) take(instance);
      }
      if (kept >= 0 && --uses_[kept] == 0) free_.push_back(room_of(kept));
    }
  }

 private:
  // Sums of neighbours are read again for rows further down: so each row is written over one that is not.
  void overwrite(int tied, int input, int target) {
    const Instance& from = stage_.instances[input];
    Instance& to = stage_.instances[target];
    to.buffer = from.buffer;
    to.row_shift = from.row_shift;
    if (from.sums_for == tied) to.row_shift += program_.values[stage_.instances[tied].value].window[1].low;
    stage_.most_row_shift = std::max(stage_.most_row_shift, to.row_shift);
  }

  // A buffer, and the shift of the rows that were there last: in the same pass those further down are still read.
  struct Room {
    int buffer, row_shift;
  };
  Room room_of(int instance) const { return {stage_.instances[instance].buffer, stage_.instances[instance].row_shift}; }

  void take(Instance& instance) {
    if (free_.empty()) free_.push_back({stage_.n_buffers++, 0});
    instance.buffer = free_.back().buffer;
    instance.row_shift = free_.back().row_shift;
    free_.pop_back();
  }

  const Program& program_;
  Stage& stage_;
  std::vector<int> uses_;
  std::vector<Room> free_;
};

// Which planes the way back reads, and what it carries back together. A dual that one tied map alone reads needs no
// plane: from its rows it computes what was after it.
void plan_way_back(Stage& stage) {
  auto& instances = stage.instances;
  for (Instance& instance : instances) {
    for (int input : instance.inputs) {
      Instance& before = instances[input];
      const bool alone = count_uses(stage, input) == 1;
      before.feeds_dual_alone = alone && before.kind == Kind::kTied && instance.kind == Kind::kDual;
      before.feeds_tied_alone = alone && before.kind == Kind::kDual && instance.kind == Kind::kTied;
      before.kept |= instance.kind == Kind::kDual || instance.kind == Kind::kRescale ||
                     instance.kind == Kind::kDropout || instance.kind == Kind::kProduct ||
                     (instance.kind == Kind::kTied && !before.feeds_tied_alone);
    }
  }
}

// Planes of cotangents are taken from the root back, and given back; first where nothing is kept.
void place_cotangents(Stage& stage) {
  auto& instances = stage.instances;
  std::vector<char> is_kept(stage.n_buffers, false);
  for (const Instance& instance : instances) {
    if (instance.kept) is_kept[instance.buffer] = true;
  }
  std::vector<int> free;
  for (int buffer = 0; buffer < stage.n_buffers; ++buffer) {
    if (!is_kept[buffer]) free.push_back(buffer);
  }
  const auto take = [&](int& buffer) {
    if (buffer >= 0) return;
    if (free.empty()) free.push_back(stage.n_buffers++);
    buffer = free.back();
    free.pop_back();
  };
  take(instances[stage.root].cotangent_buffer);
  for (int i = static_cast<int>(instances.size()) - 1; i >= 0; --i) {
    if (instances[i].feeds_tied_alone) continue;
    for (int input : inputs_back(stage, instances[i])) take(instances[input].cotangent_buffer);
    free.push_back(instances[i].cotangent_buffer);
  }
}

void measure(const Program& program, Stage& stage) {
  for (const Instance& instance : stage.instances) {
    if (instance.kind != Kind::kTied) continue;
    const Value& value = program.values[instance.value];
    const Index3& space = stage.instances[instance.inputs[0]].space;
    const Window& w = value.window[2];
    stage.pad_low = std::max(stage.pad_low, w.low);
    stage.pad_high = std::max(stage.pad_high, (value.space[2] - 1) * w.stride + w.extent() - w.low - space[2]);
  }
  for (const Instance& instance : stage.instances) {
    const int64_t row = instance.space[2] + stage.pad_low + stage.pad_high;
    const int64_t n_rows = instance.space[0] * int64_t{instance.space[1]} + stage.most_row_shift;
    stage.buffer_size = std::max(stage.buffer_size, n_rows * row);
    if (instance.kind != Kind::kTied) continue;
    const Value& value = program.values[instance.value];
    int64_t rows = value.window[1].extent();
    if (!value.window[0].trivial()) {
      rows = int64_t{value.window[0].extent()} *
             ((value.space[1] - 1) * int64_t{value.window[1].stride} + value.window[1].extent());
    }
    stage.ring_size = std::max(stage.ring_size, rows * value.space[2]);
  }
}

}  // namespace

Stage build_stage(const Program& program, const Plan& plan, int root, bool deficit) {
  Stage stage;
  stage.root = StageBuilder(program, plan, stage).build(root, {1, 1, 1}, deficit);
  schedule(program, stage, plan.keeps_planes);
  find_sums(program, stage);
  if (plan.keeps_planes) plan_way_back(stage);
  BufferAllocator(program, stage).run();
  if (plan.keeps_planes) place_cotangents(stage);
  measure(program, stage);
  return stage;
}

// Samples have so many numbers for a table that caches do not keep them from one plane to the next: planes that take
// each row in turn read them once. Other duals have few.
int planes_at_once(const Program& program, const Stage& stage) {
  constexpr int64_t kMostPositions = 1 << 18;  // of all planes: 32 MB of each thread
  const bool has_tables = std::any_of(stage.instances.begin(), stage.instances.end(), [&](const Instance& i) {
    return i.kind == Kind::kDual && program.values[i.value].table.terms > 0;
  });
  if (!has_tables) return 1;
  int64_t most = 1, run = 1;
  for (size_t k = 1; k < stage.offsets.size(); ++k) {
    run = go_together(stage.offsets[k - 1], stage.offsets[k]) ? run + 1 : 1;
    most = std::max(most, run);
  }
  const int64_t of_plane = std::max<int64_t>(stage.n_buffers * stage.buffer_size + stage.ring_size, 1);
  return static_cast<int>(std::clamp<int64_t>(kMostPositions / of_plane, 1, std::min<int64_t>(most, kMostPlanes)));
}

}  // namespace nt
