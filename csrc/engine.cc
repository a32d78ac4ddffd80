// The engine. Compiled once per instruction set, with NT_LEVEL the name of the namespace it goes to.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "job.h"
#include "rows.h"

namespace nt {
namespace NT_LEVEL {
namespace {

// First samples that one tile of a program without images takes: they are then what positions are to an image.
constexpr int kRowsPerTile = 64;
// Statistics of more samples than fit into this many bytes are computed block by block. A block is one group of lanes
// (or of kRowsPerTile samples without images) at least.
constexpr int64_t kRecordBytes = int64_t{96} << 20;
// With fewer planes than this, packing ragged pairs together costs more than the empty lanes.
constexpr int64_t kPlanesWorthPacking = 16;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Index3 times(const Index3& a, const Index3& b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2]}; }

int64_t position(const Index3& space, int z, int y, int x) { return (int64_t{z} * space[1] + y) * space[2] + x; }

int64_t position(const Index3& space, const Index3& p) { return position(space, p[0], p[1], p[2]); }

int modulo(int i, int size) { return (i % size + size) % size; }

bool is_inside(int i, int size) { return i >= 0 && i < size; }

// The positions of one axis that a pool's window `window`, of the output offset `delta`, takes from an offset plane.
struct Link {
  int delta, window, begin, end;
};

std::vector<Link> pool_links(const Window& w, int size, int count, int offset) {
  std::vector<Link> links;
  const int low = std::max(0, -offset), high = size - std::max(0, offset);
  for (int window = 0; window < count; ++window) {
    for (int partner = 0; partner < count; ++partner) {
      const int first = window * w.stride - w.low, second = partner * w.stride - w.low - offset;
      const int begin = std::max({first, second, low}), end = std::min({first + w.taps, second + w.taps, high});
      if (begin < end) links.push_back({partner - window, window, begin, end});
    }
  }
  return links;
}

// Where samples are packed into lanes, and what they contribute.
template <class T>
struct Batch {
  T* wide = nullptr;    // [group][record + inputs][lane]
  T* scalar = nullptr;  // [block][record][rows], for first samples
  int64_t begin = 0, end = 0;
};

// A number of pairs: kLanes of them, or that many for each of several first samples.
template <class T>
struct Tile {
  const T* record1 = nullptr;
  const T* record2 = nullptr;
  std::vector<const T*> inputs1, inputs2;  // for every source
  int64_t i[kLanes<T>] = {}, j[kLanes<T>] = {};
  int n_lanes = 0;
  int rows = 1;               // first samples i[.], i[.] + 1, ...
  bool side_by_side = false;  // lanes are consecutive second samples, with one first sample
  bool own = false;           // each sample with itself
  int which = 1;              // own: of this batch
};

template <class T>
class Engine {
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;

 public:
  Engine(const Job<T>& job, const Parallel& parallel)
      : job_(job), prepared_(job.prepared), program_(prepared_.program), parallel_(parallel) {
    one_position_ = std::all_of(program_.values.begin(), program_.values.end(),
                                [](const Value& v) { return n_positions(v.space) == 1 && !has_windows(v); });
    rows_ = one_position_ ? kRowsPerTile : 1;
    for (int s = 0; s < program_.n_sources; ++s) {
      const Value& value = program_.values[s];
      input_start_.push_back(prepared_.record.size() + n_inputs_);
      if (value.op == Op::kInputs) n_inputs_ += n_positions(value.space) * value.channels;
    }
    wide_size_ = (prepared_.record.size() + n_inputs_) * kL;
    for (const Plan* plan : {&prepared_.pairs, &prepared_.own}) {
      for (const Stage& stage : plan->stages) {
        for (const Instance& i : stage.instances) {
          widest_ = std::max<int64_t>(widest_, i.space[2] + stage.pad_low + stage.pad_high);
        }
      }
    }
    widest_ = std::max<int64_t>(widest_, rows_);
  }

  void run() {
    if (program_.n1 == 0 || program_.n2 == 0) return;
    const int64_t per_sample = (wide_size_ / kL + prepared_.record.size()) * static_cast<int64_t>(sizeof(T));
    const int64_t least = one_position_ ? kRowsPerTile : kL;
    const int64_t block = std::max(kRecordBytes / std::max<int64_t>(per_sample, 1) / least, int64_t{1}) * least;
    for (int64_t begin1 = 0; begin1 < program_.n1; begin1 += block) {
      Batch<T> first;
      first.begin = begin1;
      first.end = std::min(program_.n1, begin1 + block);
      const int64_t n1 = first.end - first.begin;
      Buffer<T> scalar(ceil_div(n1, rows_) * rows_ * prepared_.record.size());
      Buffer<T> wide(program_.symmetric ? ceil_div(n1, kL) * wide_size_ : 0);
      first.scalar = scalar.data();
      first.wide = program_.symmetric ? wide.data() : nullptr;
      statistics(first, 1, job_.cov1);
      for (int64_t begin2 = program_.symmetric ? begin1 : 0; begin2 < program_.n2; begin2 += block) {
        if (program_.symmetric && begin2 == begin1) {
          pairs(first, first);
          continue;
        }
        Batch<T> second;
        second.begin = begin2;
        second.end = std::min(program_.n2, begin2 + block);
        Buffer<T> wide2(ceil_div(second.end - second.begin, kL) * wide_size_);
        second.wide = wide2.data();
        statistics(second, program_.symmetric ? 1 : 2, begin1 == 0 && !program_.symmetric ? job_.cov2 : nullptr);
        pairs(first, second);
      }
    }
  }

 private:
  enum RowState : int { kNothing, kDeficitOnly, kBoth };

  // Rows of the input of a convolution, summed along the last axis: which ones are kept where.
  struct Ring {
    int rows0 = 1, rows1 = 1;  // of the first and of the second axis
    std::vector<std::pair<int64_t, RowState>> rows;
  };

  // Everything that one thread needs.
  struct Scratch {
    Buffer<V> planes;  // buffers, ring and tensors: of covariances, then of tangent kernels
    Buffer<V> rows;    // ghost row, two sums and a row of zeros
    std::unique_ptr<Buffer<V>> link_sums;
    size_t n_link_sums = 0;
    std::unique_ptr<Buffer<T>> packed1, packed2;  // records of pairs that share no first sample
    Ring ring;
    std::vector<const V*> d, t;  // rows to be added up
    std::vector<const V*> branches_d, branches_t;

    Scratch(int64_t planes, int64_t rows) : planes(planes), rows(rows), d(3), t(3) {
      std::fill(this->rows.data(), this->rows.data() + rows, V{});
    }
  };

  std::unique_ptr<Scratch> make_scratch() const {
    const int64_t planes = std::max(prepared_.pairs.scratch, prepared_.own.scratch) * rows_ * 2;
    return std::make_unique<Scratch>(planes, 8 * widest_);
  }

  // ---- statistics of single samples

  // Fills the records of a batch, and the covariances of each sample with itself if they are wanted.
  void statistics(const Batch<T>& batch, int which, T* cov) {
    const int64_t n = batch.end - batch.begin;
    parallel_.run(ceil_div(n, kL), [&](const auto& next) {
      auto scratch = make_scratch();
      Buffer<T> own_wide(batch.wide ? 0 : wide_size_);
      for (int64_t group = next(); group >= 0; group = next()) {
        T* wide = batch.wide ? batch.wide + group * wide_size_ : own_wide.data();
        const int64_t begin = batch.begin + group * kL;
        const int lanes = static_cast<int>(std::min<int64_t>(kL, batch.end - begin));
        pack_inputs(wide, begin, lanes, which);
        Tile<T> tile = own_tile(wide, begin, lanes, which);
        fill_record(tile, wide, *scratch);
        if (batch.scalar) scatter(wide, batch.scalar, begin - batch.begin, lanes);
        if (cov) {
          const Plan& plan = prepared_.own;
          execute_stage<true>(plan, plan.stages.back(), tile, *scratch);
        }
      }
    });
  }

  void pack_inputs(T* wide, int64_t begin, int lanes, int which) const {
    for (int s = 0; s < program_.n_sources; ++s) {
      const Value& value = program_.values[s];
      if (value.op != Op::kInputs) continue;
      const int64_t size = n_positions(value.space) * value.channels;
      const T* x = which == 1 ? job_.sources[s].x1 : job_.sources[s].x2;
      T* out = wide + input_start_[s] * kL;
      for (int l = 0; l < kL; ++l) {
        const T* in = x + (begin + std::min(l, lanes - 1)) * size;
        for (int64_t k = 0; k < size; ++k) out[k * kL + l] = in[k];
      }
    }
  }

  Tile<T> own_tile(const T* wide, int64_t begin, int lanes, int which) const {
    Tile<T> tile;
    tile.record1 = tile.record2 = wide;
    for (int64_t start : input_start_) tile.inputs1.push_back(wide + start * kL);
    tile.inputs2 = tile.inputs1;
    for (int l = 0; l < kL; ++l) tile.i[l] = tile.j[l] = begin + std::min(l, lanes - 1);
    tile.n_lanes = lanes;
    tile.own = true;
    tile.which = which;
    return tile;
  }

  void scatter(const T* wide, T* scalar, int64_t sample, int lanes) const {
    constexpr int64_t kInCache = 256;  // numbers of each lane at a time: every cache line of `wide` is read once
    const int64_t size = prepared_.record.size();
    for (int64_t begin = 0; begin < size; begin += kInCache) {
      const int64_t end = std::min(size, begin + kInCache);
      for (int l = 0; l < lanes; ++l) {
        T* out = scalar + (sample + l) / rows_ * size * rows_ + (sample + l) % rows_;
        for (int64_t k = begin; k < end; ++k) out[k * rows_] = wide[k * kL + l];
      }
    }
  }

  T* plane(T* wide, Statistic statistic, int value) const {
    const int64_t start = prepared_.record.find(statistic, value);
    return start < 0 ? nullptr : wide + start * kL;
  }

  void fill_record(const Tile<T>& tile, T* wide, Scratch& scratch) {
    for (int i = 0; i < static_cast<int>(program_.values.size()); ++i) {
      const Value& value = program_.values[i];
      const T* coefficient = job_.coefficients + value.coefficient;
      const int64_t n = n_positions(value.space);
      T* half = plane(wide, Statistic::kHalfVariance, i);
      const int input = value.inputs.empty() ? -1 : value.inputs[0];
      const T* half_in = input < 0 ? nullptr : plane(wide, Statistic::kHalfVariance, input);
      switch (value.op) {
        case Op::kInputs:
          if (half) {
            const T* x = tile.inputs1[i];
            for (int64_t p = 0; p < n; ++p) {
              store(half + p * kL, half_mean_square(x + p * value.channels * kL, value.channels));
            }
          }
          break;
        case Op::kMaterialised:
          if (half) {
            const Source<T>& source = job_.sources[i];
            const T* variance = tile.which == 1 ? source.variance1 : source.variance2;
            for (int64_t p = 0; p < n; ++p) {
              for (int l = 0; l < kL; ++l) half[p * kL + l] = T(0.5) * variance[tile.i[l] * n + p];
            }
          }
          break;
        case Op::kLinear:
          if (half) {
            T* average = plane(wide, Statistic::kHalfAverage, i);
            window_sum(value, half_in, program_.values[input].space, average);
            const V scale = broadcast(T(1) / window_size(value));
            for (int64_t p = 0; p < n; ++p) {
              const V mean = load(average + p * kL) * scale;
              store(average + p * kL, mean);
              store(half + p * kL, fma(mean, broadcast(coefficient[0]), broadcast(T(0.5) * coefficient[1])));
            }
          }
          break;
        case Op::kDual:
          with_dual(value.activation, coefficient,
                    [&](const auto& dual) { prepare_dual(dual, half_in, n, plane(wide, Statistic::kDual, i), half); });
          break;
        case Op::kNormalize:
          normalize(value, half_in, coefficient[0], plane(wide, Statistic::kNormalizer, i),
                    plane(wide, Statistic::kNormalizedHalf, i), half);
          break;
        case Op::kCombine:
          if (half) {
            for (int64_t p = 0; p < n; ++p) {
              V sum{};
              for (size_t k = 0; k < value.inputs.size(); ++k) {
                const T* in = plane(wide, Statistic::kHalfVariance, value.inputs[k]);
                sum = fma(load(in + p * kL), broadcast(coefficient[k]), sum);
              }
              store(half + p * kL, sum);
            }
          }
          break;
        case Op::kMultiply:
          if (half) {
            for (int64_t p = 0; p < n; ++p) {
              V product = load(half_in + p * kL);
              for (size_t k = 1; k < value.inputs.size(); ++k) {
                const T* in = plane(wide, Statistic::kHalfVariance, value.inputs[k]);
                product *= load(in + p * kL) * broadcast(T(2));
              }
              store(half + p * kL, product);
            }
          }
          break;
        case Op::kFlatten:
          if (half) {
            const int64_t n_in = n_positions(program_.values[input].space);
            V sum{};
            for (int64_t p = 0; p < n_in; ++p) sum += load(half_in + p * kL);
            store(half, sum * broadcast(T(1) / n_in));
          }
          execute_stage<true>(prepared_.own, own_stage(i), tile, scratch);
          break;
        case Op::kPool:
          if (half) {
            pooled_variance(i, tile, wide, scratch);
          } else {
            execute_stage<true>(prepared_.own, own_stage(i), tile, scratch);
          }
          break;
      }
    }
  }

  const Stage& own_stage(int readout) const {
    return *std::find_if(prepared_.own.stages.begin(), prepared_.own.stages.end(),
                         [&](const Stage& stage) { return stage.readout == readout; });
  }

  // A pool mixes positions: the variance after it is the pooled covariance of the sample with itself.
  void pooled_variance(int number, const Tile<T>& tile, T* wide, Scratch& scratch) {
    const Value& value = program_.values[number];
    const Plan& plan = prepared_.own;
    const int t = plan.tensor_of[number];
    const Tensor& tensor = plan.tensors[t];
    execute_stage<true>(plan, own_stage(number), tile, scratch);
    const V* pooled = tensor_data(plan, scratch, t) + tensor.start[tensor.offsets.index({0, 0, 0})];
    const Index3& space = program_.values[value.inputs[0]].space;
    T* own = plane(wide, Statistic::kOwnDeficit, number);
    T* sums = plane(wide, Statistic::kPooledVariance, number);
    T* half = plane(wide, Statistic::kHalfVariance, number);
    window_sum(value, plane(wide, Statistic::kHalfVariance, value.inputs[0]), space, sums);
    int64_t p = 0;
    const PoolSizes sizes(value, space);
    for (int z = 0; z < value.space[0]; ++z) {
      for (int y = 0; y < value.space[1]; ++y) {
        for (int x = 0; x < value.space[2]; ++x, ++p) {
          const T size = static_cast<T>(sizes.size({z, y, x}));
          const V sum = load(sums + p * kL) * broadcast(T(2));
          store(sums + p * kL, sum);
          store(own + p * kL, pooled[p]);
          store(half + p * kL, (sum * broadcast(static_cast<T>(sizes.count({z, y, x})) / (size * size)) - pooled[p]) *
                                   broadcast(T(0.5)));
        }
      }
    }
    finish_deficit<true>(plan, t, tile, scratch);
  }

  static T window_size(const Value& value) {
    return static_cast<T>(int64_t{value.window[0].taps} * value.window[1].taps * value.window[2].taps);
  }

  // Sums over windows, zero outside: out[p] for every window.
  static void window_sum(const Value& value, const T* in, const Index3& space, T* out) {
    const auto& w = value.window;
    const auto at = [&](int a, int window, int tap) {
      const int q = window * w[a].stride + tap * w[a].dilation - w[a].low;
      return w[a].circular ? modulo(q, space[a]) : q;
    };
    std::vector<const T*> rows;  // those under a window
    for (int z = 0; z < value.space[0]; ++z) {
      for (int y = 0; y < value.space[1]; ++y) {
        rows.clear();
        for (int kz = 0; kz < w[0].taps; ++kz) {
          const int qz = at(0, z, kz);
          for (int ky = 0; ky < w[1].taps; ++ky) {
            const int qy = at(1, y, ky);
            if (is_inside(qz, space[0]) && is_inside(qy, space[1]))
              rows.push_back(in + position(space, qz, qy, 0) * kL);
          }
        }
        for (int x = 0; x < value.space[2]; ++x, out += kL) {
          V sum{};
          for (int kx = 0; kx < w[2].taps; ++kx) {
            const int qx = at(2, x, kx);
            if (!is_inside(qx, space[2])) continue;
            V column{};
            for (const T* row : rows) column += load(row + int64_t{qx} * kL);
            sum += column;
          }
          store(out, sum);
        }
      }
    }
  }

  template <class Dual>
  static void prepare_dual(const Dual& dual, const T* half_in, int64_t n, T* planes, T* half) {
    for (int64_t p = 0; p < n; ++p) {
      V of_sample[Dual::kPlanes];
      const V after = dual.prepare(load(half_in + p * kL), of_sample);
      for (int k = 0; k < Dual::kPlanes; ++k) store(planes + (k * n + p) * kL, of_sample[k]);
      if (half) store(half + p * kL, after);
    }
  }

  static void normalize(const Value& value, const T* half_in, T eps, T* normalizer, T* normalized_half, T* half) {
    const Index3& space = value.space;
    Index3 kept = space;  // one mean for each of these
    for (int a = 0; a < kAxes; ++a) {
      if (value.normalized[a]) kept[a] = 1;
    }
    const Index3 averaged{space[0] / kept[0], space[1] / kept[1], space[2] / kept[2]};
    const V scale = broadcast(T(1) / static_cast<T>(n_positions(averaged)));
    for (int z = 0; z < kept[0]; ++z) {
      for (int y = 0; y < kept[1]; ++y) {
        for (int x = 0; x < kept[2]; ++x) {
          const auto each = [&](const auto& visit) {
            for (int az = 0; az < averaged[0]; ++az) {
              for (int ay = 0; ay < averaged[1]; ++ay) {
                for (int ax = 0; ax < averaged[2]; ++ax) visit(position(space, z + az, y + ay, x + ax) * kL);
              }
            }
          };
          V sum{};
          each([&](int64_t p) { sum += load(half_in + p); });
          const V total = fma(sum * scale, broadcast(T(2)), broadcast(eps));
          const V r = if_positive(total, broadcast(T(1)) / sqrt(total), V{});  // zeros stay zeros
          each([&](int64_t p) {
            store(normalizer + p, r);
            store(normalized_half + p, load(half_in + p) * r);
            if (half) store(half + p, load(half_in + p) * r * r);
          });
        }
      }
    }
  }

  static V half_mean_square(const T* x, int channels) {
    V sum{};
    for (int c = 0; c < channels; ++c) sum = fma(load(x + int64_t{c} * kL), load(x + int64_t{c} * kL), sum);
    return sum * broadcast(T(0.5) / channels);
  }

  // How many positions of each window of a pool are inside, and what its sum is divided by.
  class PoolSizes {
   public:
    PoolSizes(const Value& pool, const Index3& space) : pool_(pool) {
      for (int a = 0; a < kAxes; ++a) counts_[a] = window_counts(pool.window[a], space[a], pool.space[a]);
    }
    double count(const Index3& p) const { return double(counts_[0][p[0]]) * counts_[1][p[1]] * counts_[2][p[2]]; }
    double size(const Index3& p) const {
      if (!pool_.mean) return 1;
      return pool_.normalize_edges ? count(p) : window_size(pool_);
    }

   private:
    const Value& pool_;
    std::array<std::vector<int>, kAxes> counts_;
  };

  // ---- pairs

  void pairs(const Batch<T>& first, const Batch<T>& second) {
    const bool diagonal = program_.symmetric && first.begin == second.begin;
    const int64_t n1 = first.end - first.begin, n2 = second.end - second.begin;
    const bool pack = !one_position_ && prepared_.pairs.n_planes >= kPlanesWorthPacking;
    const int64_t blocks = ceil_div(n1, rows_), groups = ceil_div(n2, kL);
    std::vector<std::pair<int32_t, int32_t>> tiles;   // of a block of first samples with a group of second ones
    std::vector<std::pair<int32_t, int32_t>> ragged;  // single pairs
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t b = 0; b < blocks; ++b) {
        const bool below = diagonal && b * rows_ >= (g + 1) * kL;
        const bool cut = diagonal && (b + 1) * rows_ > g * kL + 1;
        if (below) continue;
        if (pack && (cut || (g + 1) * kL > n2)) {
          for (int64_t j = g * kL; j < std::min(n2, (g + 1) * kL); ++j) {
            if (!diagonal || b <= j) ragged.emplace_back(b, j);
          }
        } else {
          tiles.emplace_back(b, g);
        }
      }
    }
    const int64_t n_tiles = tiles.size(), n_packs = ceil_div(ragged.size(), kL);
    parallel_.run(n_tiles + n_packs, [&](const auto& next) {
      auto scratch = make_scratch();
      for (int64_t k = next(); k >= 0; k = next()) {
        if (k < n_tiles) {
          execute<false>(row_tile(first, second, tiles[k].first, tiles[k].second), *scratch);
        } else {
          const int64_t begin = (k - n_tiles) * kL;
          const int lanes = static_cast<int>(std::min<int64_t>(kL, static_cast<int64_t>(ragged.size()) - begin));
          execute<true>(packed_tile(first, second, ragged.data() + begin, lanes, *scratch), *scratch);
        }
      }
    });
  }

  Tile<T> row_tile(const Batch<T>& first, const Batch<T>& second, int64_t block, int64_t group) const {
    Tile<T> tile;
    tile.record1 = first.scalar + block * prepared_.record.size() * rows_;
    tile.record2 = second.wide + group * wide_size_;
    const int64_t i = first.begin + block * rows_, j = second.begin + group * kL;
    tile.n_lanes = static_cast<int>(std::min<int64_t>(kL, second.end - j));
    tile.rows = static_cast<int>(std::min<int64_t>(rows_, first.end - i));
    tile.side_by_side = true;
    for (int l = 0; l < kL; ++l) {
      tile.i[l] = i;
      tile.j[l] = j + std::min(l, tile.n_lanes - 1);
    }
    for (int s = 0; s < program_.n_sources; ++s) {
      const Value& value = program_.values[s];
      const int64_t size = n_positions(value.space) * value.channels;
      tile.inputs1.push_back(value.op == Op::kInputs ? job_.sources[s].x1 + i * size : nullptr);
      tile.inputs2.push_back(tile.record2 + input_start_[s] * kL);
    }
    return tile;
  }

  Tile<T> packed_tile(const Batch<T>& first, const Batch<T>& second, const std::pair<int32_t, int32_t>* pairs,
                      int lanes, Scratch& scratch) const {
    Tile<T> tile;
    const int64_t size = prepared_.record.size();
    for (auto* packed : {&scratch.packed1, &scratch.packed2}) {
      if (!*packed) *packed = std::make_unique<Buffer<T>>(wide_size_);
    }
    T* wide1 = scratch.packed1->data();
    T* wide2 = scratch.packed2->data();
    tile.record1 = wide1;
    tile.record2 = wide2;
    tile.n_lanes = lanes;
    for (int l = 0; l < kL; ++l) {
      const auto [i, j] = pairs[std::min(l, lanes - 1)];
      tile.i[l] = first.begin + i;
      tile.j[l] = second.begin + j;
      const T* from1 = first.scalar + i * size;
      for (int64_t k = 0; k < size; ++k) wide1[k * kL + l] = from1[k];
      const T* from2 = second.wide + j / kL * wide_size_ + j % kL;
      for (int64_t k = 0; k < size + n_inputs_; ++k) wide2[k * kL + l] = from2[k * kL];
      for (int s = 0; s < program_.n_sources; ++s) {
        const Value& value = program_.values[s];
        if (value.op != Op::kInputs) continue;
        const int64_t n = n_positions(value.space) * value.channels;
        const T* x1 = job_.sources[s].x1 + tile.i[l] * n;
        T* out = wide1 + input_start_[s] * kL + l;
        for (int64_t k = 0; k < n; ++k) out[k * kL] = x1[k];
      }
    }
    for (int64_t start : input_start_) {
      tile.inputs1.push_back(wide1 + start * kL);
      tile.inputs2.push_back(wide2 + start * kL);
    }
    return tile;
  }

  template <bool kWide>
  void execute(const Tile<T>& tile, Scratch& scratch) {
    const Plan& plan = prepared_.pairs;
    for (const Stage& stage : plan.stages) {
      execute_stage<kWide>(plan, stage, tile, scratch);
      if (stage.readout < 0) continue;
      const Value& readout = program_.values[stage.readout];
      if (readout.op == Op::kPool && readout.needs) {
        finish_deficit<kWide>(plan, plan.tensor_of[stage.readout], tile, scratch);
      }
    }
  }

  // ---- one stage

  V* tangent(const Plan& plan, V* covariance) const { return plan.ntk ? covariance + scratch_size() : nullptr; }
  int64_t scratch_size() const { return std::max(prepared_.pairs.scratch, prepared_.own.scratch) * rows_; }

  V* tensor_data(const Plan& plan, Scratch& scratch, int number) const {
    V* at = scratch.planes.data();
    for (int t = 0; t < number; ++t) at += plan.tensors[t].size * rows_;
    return at;
  }

  // An instance's part of a plane, and where its rows are.
  struct Plane {
    Rectangle r;
    V* d = nullptr;
    V* t = nullptr;
    int64_t stride = 0;

    V* row_d(int z, int y, int x = 0) const { return d + (int64_t{z} * r.size[1] + y) * stride + x; }
    V* row_t(int z, int y, int x = 0) const { return t ? row_d(z, y, x) + (t - d) : nullptr; }
  };

  // What is under way.
  struct Work {
    const Plan& plan;
    const Stage& stage;
    const Tile<T>& tile;
    Scratch& scratch;
    V* buffers;
    V* ring;
    Index3 offset{0, 0, 0};
    // sinks
    V* sum_d = nullptr;
    V* sum_t = nullptr;
    std::array<std::vector<Link>, kAxes> links{};
    std::vector<Plane> planes{};  // of every instance
  };

  template <bool kWide>
  void execute_stage(const Plan& plan, const Stage& stage, const Tile<T>& tile, Scratch& scratch) {
    if (stage.offsets.empty()) return;
    V* buffers = tensor_data(plan, scratch, static_cast<int>(plan.tensors.size()));
    Work work{plan, stage, tile, scratch, buffers, buffers + stage.n_buffers * stage.buffer_size * rows_};
    const int readout = stage.readout;
    const Value* pool = readout >= 0 ? &program_.values[readout] : nullptr;
    const int t = readout >= 0 ? plan.tensor_of[readout] : -1;
    const bool has_ntk = stage.instances[stage.root].has_ntk;
    const int64_t n_out = t >= 0 ? plan.tensors[t].size : 0;
    // A single sum over very many planes is formed in three levels, or its rounding errors would add up.
    V plane_d{}, plane_t{}, line_d{}, line_t{};
    if (t >= 0) {
      work.sum_d = tensor_data(plan, scratch, t);
      work.sum_t = has_ntk ? tangent(plan, work.sum_d) : nullptr;
      std::fill(work.sum_d, work.sum_d + n_out, V{});
      if (has_ntk) std::fill(work.sum_t, work.sum_t + n_out, V{});
    }
    const bool single = n_out == 1;
    V* total_d = work.sum_d;
    V* total_t = work.sum_t;
    if (single) {
      work.sum_d = &plane_d;
      work.sum_t = has_ntk ? &plane_t : nullptr;
    }
    const Index3& space = stage.instances[stage.root].space;
    for (size_t k = 0; k < stage.offsets.size(); ++k) {
      const Index3& offset = stage.offsets[k];
      work.offset = offset;
      if (pool && pool->op == Op::kPool) {
        for (int a = 0; a < kAxes; ++a) {
          if (k == 0 || offset[a] != stage.offsets[k - 1][a]) {
            work.links[a] = pool_links(pool->window[a], space[a], pool->space[a], offset[a]);
            if (stage.wrapped[a] && offset[a] > 0) {
              const auto others = pool_links(pool->window[a], space[a], pool->space[a], offset[a] - space[a]);
              work.links[a].insert(work.links[a].end(), others.begin(), others.end());
            }
          }
        }
      }
      execute_plane<kWide>(work);
      if (single) {
        line_d += plane_d;
        line_t += plane_t;
        plane_d = plane_t = V{};
        const bool line_ends = k + 1 == stage.offsets.size() || stage.offsets[k + 1][1] != offset[1];
        if (line_ends) {
          total_d[0] += line_d;
          if (has_ntk) total_t[0] += line_t;
          line_d = line_t = V{};
        }
      }
    }
    if (t >= 0) scale_tensor(plan, t, has_ntk, scratch);
  }

  // Divides sums over windows by what a mean is divided by.
  void scale_tensor(const Plan& plan, int t, bool has_ntk, Scratch& scratch) const {
    const Tensor& tensor = plan.tensors[t];
    const Value& value = program_.values[tensor.value];
    const Index3& space = program_.values[value.inputs[0]].space;
    V* d = tensor_data(plan, scratch, t);
    V* ntk = has_ntk ? tangent(plan, d) : nullptr;
    if (value.op == Op::kFlatten) {
      const V scale = broadcast(T(1) / static_cast<T>(n_positions(space)));
      d[0] *= scale;
      if (ntk) ntk[0] *= scale;
      return;
    }
    if (!value.mean) return;
    const PoolSizes sizes(value, space);
    each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
      const V scale = broadcast(static_cast<T>(1 / (sizes.size(p) * sizes.size(partner))));
      d[at] *= scale;
      if (ntk) ntk[at] *= scale;
    });
  }

  // Turns a pooled deficit into the deficit of the pooled covariance, see docs/cpu-engine.md.
  template <bool kWide>
  void finish_deficit(const Plan& plan, int t, const Tile<T>& tile, Scratch& scratch) const {
    const Tensor& tensor = plan.tensors[t];
    const Value& value = program_.values[tensor.value];
    const int64_t own = prepared_.record.find(Statistic::kOwnDeficit, tensor.value);
    const int64_t sums = prepared_.record.find(Statistic::kPooledVariance, tensor.value);
    const PoolSizes sizes(value, program_.values[value.inputs[0]].space);
    const double norm = value.mean ? 2.0 * window_size(value) * window_size(value) : 2.0;
    const V distinct = distinct_samples(tile);
    V* d = tensor_data(plan, scratch, t);
    each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
      const int64_t p1 = position(value.space, p[0], p[1], p[2]);
      const int64_t p2 = position(value.space, partner[0], partner[1], partner[2]);
      const auto first = [&](int64_t start) { return get<kWide>(Row1<T>{at1<kWide>(tile, start + p1)}, 0); };
      const auto second = [&](int64_t start) { return load(tile.record2 + (start + p2) * kL); };
      V deficit = d[at] - (first(own) + second(own)) * broadcast(T(0.5));
      const double uneven = value.mean && value.normalize_edges ? 0 : sizes.count(p) - sizes.count(partner);
      if (uneven != 0) deficit = fma(first(sums) - second(sums), broadcast(static_cast<T>(uneven / norm)), deficit);
      d[at] = p1 == p2 ? deficit * distinct : deficit;
    });
  }

  // 0 in the lanes that pair a sample with itself, 1 elsewhere.
  V distinct_samples(const Tile<T>& tile) const {
    V distinct;
    const bool same = job_.coefficients[0] != T(0);
    for (int l = 0; l < kL; ++l) distinct[l] = (tile.own || same) && tile.i[l] == tile.j[l] ? T(0) : T(1);
    return distinct;
  }

  template <class Visit>
  static void each_pair(const Tensor& tensor, const Visit& visit) {
    const Index3& space = tensor.offsets.space();
    for (const Index3& delta : tensor.offsets.list()) {
      int64_t at = tensor.start[tensor.offsets.index(delta)];
      const Rectangle r(space, delta);
      for (int z = r.low[0]; z < r.low[0] + r.size[0]; ++z) {
        for (int y = r.low[1]; y < r.low[1] + r.size[1]; ++y) {
          for (int x = r.low[2]; x < r.low[2] + r.size[2]; ++x) {
            visit(at++, {z, y, x}, {z + delta[0], y + delta[1], x + delta[2]});
          }
        }
      }
    }
  }

  // ---- one plane

  static const Plane& plane_of(const Work& work, const Instance& instance) {
    return work.planes[&instance - work.stage.instances.data()];
  }

  void place_planes(Work& work) const {
    work.planes.clear();
    for (const Instance& instance : work.stage.instances) {
      Plane plane{Rectangle(instance.space, times(work.offset, instance.scale), work.stage.wrapped)};
      if (one_position_) plane.r.size[2] = work.tile.rows;
      plane.stride = plane.r.size[2] + work.stage.pad_low + work.stage.pad_high;
      if (instance.buffer >= 0) {
        plane.d = work.buffers + instance.buffer * work.stage.buffer_size * rows_ + work.stage.pad_low;
        if (instance.has_ntk) plane.t = tangent(work.plan, plane.d);
      }
      work.planes.push_back(plane);
    }
  }

  template <bool kWide>
  const T* at1(const Tile<T>& tile, int64_t at) const {
    return tile.record1 + at * (kWide ? kL : rows_);
  }

  // The statistics of a row that starts at position (z, y, x) of the first image.
  template <bool kWide>
  Row1<T> first(const Work& work, Statistic statistic, int value, const Index3& space, int z, int y, int x) const {
    return {at1<kWide>(work.tile, prepared_.record.find(statistic, value) + position(space, z, y, x))};
  }
  Row2<T> second(const Work& work, Statistic statistic, int value, const Index3& space, int z, int y, int x) const {
    return {work.tile.record2 + (prepared_.record.find(statistic, value) + position(space, z, y, x)) * kL,
            one_position_ ? 0 : kL};
  }

  // A row of a plane, or that part of it whose partners are side by side, as the steps see it.
  struct Place {
    const Instance& geometry;
    const Rectangle& r;
    int z, y;       // within the rectangle
    int x, n;       // where it begins, and its length
    Index3 first;   // its first position
    Index3 second;  // and the partner of that
  };

  template <class Visit>
  void each_part(const Instance& geometry, const Rectangle& r, int z, int y, const Visit& visit) const {
    const int n = r.size[2];
    const int end = r.wrapped[2] ? std::min(n, r.space[2] - r.offset[2]) : n;
    for (int x = 0; x < n; x = x < end ? end : n) {
      const Index3 p{r.low[0] + z, r.low[1] + y, r.low[2] + x};
      const Index3 partner{r.partner(0, p[0]), r.partner(1, p[1]), r.partner(2, p[2])};
      visit(Place{geometry, r, z, y, x, (x < end ? end : n) - x, p, partner});
    }
  }

  template <bool kWide>
  Row1<T> first(const Work& work, Statistic statistic, int value, const Place& at) const {
    return first<kWide>(work, statistic, value, at.geometry.space, at.first[0], at.first[1], at.first[2]);
  }
  Row2<T> second(const Work& work, Statistic statistic, int value, const Place& at) const {
    return second(work, statistic, value, at.geometry.space, at.second[0], at.second[1], at.second[2]);
  }

  template <bool kWide>
  void execute_plane(Work& work) {
    const Stage& stage = work.stage;
    place_planes(work);
    for (const Pass& pass : stage.passes) {
      const Instance& geometry = stage.instances[pass.geometry];
      const Rectangle& r = plane_of(work, geometry).r;
      const bool is_last = &pass == &stage.passes.back();
      const bool convolves = pass.head >= 0 && geometry.kind == Kind::kLinear;
      if (convolves) start_ring(work, pass);
      for (int z = 0; z < r.size[0]; ++z) {
        for (int y = 0; y < r.size[1]; ++y) {
          SummedRows rows;
          if (convolves) rows = sum_rows<kWide>(work, pass, r, z, y);
          each_part(geometry, r, z, y, [&](const Place& place) {
            if (convolves) {
              finish_linear<kWide>(work, stage.instances[pass.head], pass.fused_dual, place, rows);
            } else if (pass.head >= 0) {
              load_row<kWide>(work, geometry, place);
            }
            for (int op : pass.row_ops) apply_row<kWide>(work, stage.instances[op], place);
          });
          if (is_last) read_out(work, r, z, y);
        }
      }
    }
  }

  // Sources

  template <bool kWide>
  void load_row(Work& work, const Instance& instance, const Place& at) {
    const Plane& out = plane_of(work, instance);
    V* d = out.row_d(at.z, at.y, at.x);
    V* t = out.row_t(at.z, at.y, at.x);
    const Value& value = program_.values[instance.value];
    switch (value.op) {
      case Op::kInputs:
        load_inputs<kWide>(work, instance, at, d);
        break;
      case Op::kMaterialised:
        load_materialised<kWide>(work, instance, at, d, t);
        break;
      default: {
        const int number = work.plan.tensor_of[instance.value];
        const Tensor& tensor = work.plan.tensors[number];
        const Index3& p = at.first;
        const Rectangle r(instance.space, {at.second[0] - p[0], at.second[1] - p[1], at.second[2] - p[2]});
        V* from = tensor_data(work.plan, work.scratch, number) + tensor.start[tensor.offsets.index(r.offset)] +
                  ((p[0] - r.low[0]) * int64_t{r.size[1]} + p[1] - r.low[1]) * r.size[2] + p[2] - r.low[2];
        std::copy(from, from + at.n, d);
        if (t) std::copy(tangent(work.plan, from), tangent(work.plan, from) + at.n, t);
      }
    }
  }

  template <bool kWide>
  void load_inputs(Work& work, const Instance& instance, const Place& at, V* d) const {
    const int channels = program_.values[instance.value].channels, n = at.n;
    const T* x1 = work.tile.inputs1[instance.value];
    const T* x2 = work.tile.inputs2[instance.value];
    if (one_position_) {
      int x = 0;
      const int64_t size = channels;
      for (; x + 8 <= n && !kWide; x += 8) pair_samples<8>(instance.deficit, x1 + x * size, x2, channels, d + x);
      for (; x < n; ++x) pair_positions<kWide>(instance.deficit, x1 + x * size, x2, channels, d[x]);
      return;
    }
    const int64_t p1 = position(instance.space, at.first), p2 = position(instance.space, at.second);
    for (int x = 0; x < n; ++x) {
      const T* from1 = x1 + (p1 + x) * channels * (kWide ? kL : 1);
      pair_positions<kWide>(instance.deficit, from1, x2 + (p2 + x) * channels * kL, channels, d[x]);
    }
  }

  // Half the mean square difference over the channels, or the mean product.
  template <bool kWide>
  static NT_INLINE void pair_positions(bool deficit, const T* x1, const T* x2, int channels, V& out) {
    V sum{};
    for (int begin = 0; begin < channels; begin += kChannelBlock) {
      const int end = std::min(channels, begin + kChannelBlock);
      V part{};
      for (int c = begin; c < end; ++c) {
        const V a = kWide ? load(x1 + int64_t{c} * (kWide ? kL : 0)) : broadcast(x1[c]);
        const V b = load(x2 + int64_t{c} * kL);
        part = deficit ? fma(a - b, a - b, part) : fma(a, b, part);
      }
      sum += part;
    }
    out = sum * broadcast((deficit ? T(0.5) : T(1)) / channels);
  }

  // The same for several first samples at once, which share the loads of the second ones.
  template <int kSamples>
  static void pair_samples(bool deficit, const T* x1, const T* x2, int channels, V* out) {
    V sum[kSamples] = {};
    for (int begin = 0; begin < channels; begin += kChannelBlock) {
      const int end = std::min(channels, begin + kChannelBlock);
      V part[kSamples] = {};
      if (deficit) {
        for (int c = begin; c < end; ++c) {
          const V b = load(x2 + int64_t{c} * kL);
          for (int s = 0; s < kSamples; ++s) {
            const V difference = broadcast(x1[int64_t{s} * channels + c]) - b;
            part[s] = fma(difference, difference, part[s]);
          }
        }
      } else {
        for (int c = begin; c < end; ++c) {
          const V b = load(x2 + int64_t{c} * kL);
          for (int s = 0; s < kSamples; ++s) part[s] = fma(broadcast(x1[int64_t{s} * channels + c]), b, part[s]);
        }
      }
      for (int s = 0; s < kSamples; ++s) sum[s] += part[s];
    }
    for (int s = 0; s < kSamples; ++s) out[s] = sum[s] * broadcast((deficit ? T(0.5) : T(1)) / channels);
  }

  // Sums over this many channels are added up, so that rounding errors do not grow with all of them.
  static constexpr int kChannelBlock = 128;

  template <bool kWide>
  void load_materialised(Work& work, const Instance& instance, const Place& at, V* d, V* t) const {
    const Value& value = program_.values[instance.value];
    const Source<T>& source = job_.sources[instance.value];
    const Tile<T>& tile = work.tile;
    const int64_t size = n_positions(value.space);
    const int64_t per_pair = value.same_position ? size : size * size;
    const T* k = !tile.own ? source.nngp : tile.which == 1 ? source.own1 : source.own2;
    const int64_t first = position(value.space, at.first), second = position(value.space, at.second);
    for (int x = 0; x < at.n; ++x) {
      const int row = one_position_ ? x : 0;
      const int64_t p = first + x - row, partner = second + x - row;
      const int64_t entry = value.same_position ? p : p * size + partner;
      for (int l = 0; l < kL; ++l) {
        const int64_t pair = tile.own ? tile.i[l] : (tile.i[l] + row) * program_.n2 + tile.j[l];
        d[x][l] = k[pair * per_pair + entry];
        if (t) t[x][l] = source.ntk[pair * per_pair + entry];
      }
    }
    if (!instance.deficit) return;
    to_other<kWide>(work, instance.value, at, d, d);
    if (first != second) return;
    const bool same = tile.own || job_.coefficients[0] != T(0);
    for (int x = 0; x < at.n; ++x) {
      for (int l = 0; l < kL; ++l) {
        if (same && tile.i[l] + (one_position_ ? x : 0) == tile.j[l]) d[x][l] = 0;
      }
    }
  }

  // Deficits to covariances, or back.
  template <bool kWide>
  void to_other(const Work& work, int value, const Place& at, const V* in, V* out) const {
    const auto half1 = first<kWide>(work, Statistic::kHalfVariance, value, at);
    const auto half2 = second(work, Statistic::kHalfVariance, value, at);
    for (int x = 0; x < at.n; ++x) out[x] = get<kWide>(half1, x) + get(half2, x) - in[x];
  }

  // Convolutions: rows are summed horizontally once, kept in a ring, and added up vertically for each output row.

  // Prepares for the rows of one plane.
  void start_ring(Work& work, const Pass& pass) const {
    const Instance& linear = work.stage.instances[pass.head];
    const Value& value = program_.values[linear.value];
    const auto& w = value.window;
    Ring& ring = work.scratch.ring;
    ring.rows0 = w[0].trivial() ? 1 : w[0].extent();
    ring.rows1 = w[1].extent();
    if (ring.rows0 > 1) {  // whole planes are kept
      const Rectangle& r = plane_of(work, linear).r;
      ring.rows1 = (r.size[1] - 1) * w[1].stride + w[1].extent();
    }
    ring.rows.assign(int64_t{ring.rows0} * ring.rows1, {-1, kNothing});
    work.scratch.d.resize(std::max<size_t>(3, size_t(w[0].taps) * w[1].taps));
    work.scratch.t.resize(work.scratch.d.size());
  }

  // How many of the rows in scratch.d and scratch.t add up to a row of the output.
  struct SummedRows {
    int n = 0;
    bool has_ntk = false;
  };

  template <bool kWide>
  SummedRows sum_rows(Work& work, const Pass& pass, const Rectangle& r, int z, int y) {
    const Instance& linear = work.stage.instances[pass.head];
    const Instance& input = work.stage.instances[linear.inputs[0]];
    const Value& value = program_.values[linear.value];
    Ring& ring = work.scratch.ring;
    const auto& w = value.window;
    const V** rows_d = work.scratch.d.data();
    const V** rows_t = work.scratch.t.data();
    int n_rows = 0;
    const V* no_tangents = zeros(work);
    // Rows of the input are numbered from the first one under the first window.
    const int first0 = z * w[0].stride, first1 = y * w[1].stride;
    const int slot0 = first0 % ring.rows0, slot1 = ring.rows0 == 1 ? first1 % ring.rows1 : first1;
    for (int kz = 0; kz < w[0].taps; ++kz) {
      for (int ky = 0; ky < w[1].taps; ++ky) {
        const int row0 = first0 + kz * w[0].dilation, row1 = first1 + ky * w[1].dilation;
        const int s0 = slot0 + kz * w[0].dilation, s1 = slot1 + ky * w[1].dilation;
        const int64_t slot =
            int64_t{s0 < ring.rows0 ? s0 : s0 - ring.rows0} * ring.rows1 + (s1 < ring.rows1 ? s1 : s1 - ring.rows1);
        V* sum_d = work.ring + slot * value.space[2];
        V* sum_t = input.has_ntk ? tangent(work.plan, sum_d) : nullptr;
        auto& [known, state] = ring.rows[slot];
        const int64_t row = int64_t{row0} << 32 | row1;
        if (known != row) {
          known = row;
          state = sum_row<kWide>(work, linear, r, row0 + r.low[0] * w[0].stride - w[0].low,
                                 row1 + r.low[1] * w[1].stride - w[1].low, sum_d, sum_t);
        }
        if (state == kNothing) continue;
        rows_d[n_rows] = sum_d;
        rows_t[n_rows++] = state == kBoth ? sum_t : no_tangents;
      }
    }
    if (n_rows == 0) {
      rows_d[0] = rows_t[0] = no_tangents;
      n_rows = 1;
    }
    if (n_rows > 3) n_rows = add_up(work, n_rows, r.size[2], input.has_ntk);
    return {n_rows, input.has_ntk};
  }

  // Replaces rows by their sum, which is one row.
  int add_up(Work& work, int n_rows, int n, bool has_ntk) const {
    const auto reduce = [&](std::vector<const V*>& rows, V* into) {
      for (int x = 0; x < n; ++x) {
        V total = rows[0][x];
        for (int k = 1; k < n_rows; ++k) total += rows[k][x];
        into[x] = total;
      }
      rows[0] = into;
    };
    V* sum = work.scratch.rows.data() + 2 * widest_;
    reduce(work.scratch.d, sum);
    if (has_ntk) reduce(work.scratch.t, sum + widest_);
    return 1;
  }

  // Sums one row of the input, inside or (for deficits) outside of the rectangle, over the windows along it.
  template <bool kWide>
  RowState sum_row(Work& work, const Instance& linear, const Rectangle& out, int qz, int qy, V* sum_d, V* sum_t) const {
    const Instance& input = work.stage.instances[linear.inputs[0]];
    const Plane& in = plane_of(work, input);
    const auto& w = program_.values[linear.value].window;
    const Index3& space = input.space;
    const int n = out.size[2];
    if (w[0].circular) qz = modulo(qz, space[0]);
    if (w[1].circular) qy = modulo(qy, space[1]);
    const int z = qz - in.r.low[0], y = qy - in.r.low[1];
    const bool inside1 = is_inside(qz, space[0]) && is_inside(qy, space[1]);
    const bool inside2 = is_inside(in.r.partner(0, qz), space[0]) && is_inside(in.r.partner(1, qy), space[1]);
    if (!inside1 && !inside2) return kNothing;
    const bool both = is_inside(z, in.r.size[0]) && is_inside(y, in.r.size[1]);
    if (!both && !linear.deficit) return kNothing;
    const int begin = out.low[2] * w[2].stride - w[2].low;  // the first position under a window
    const int end = (out.low[2] + n - 1) * w[2].stride + w[2].extent() - w[2].low;
    V* row_d = work.scratch.rows.data() - begin;  // outside
    V* row_t = nullptr;
    int filled_begin = end, filled_end = end;  // what is there already
    if (both) {
      row_d = in.row_d(z, y) - in.r.low[2];
      row_t = input.has_ntk ? in.row_t(z, y) - in.r.low[2] : nullptr;
      filled_begin = in.r.low[2];
      filled_end = in.r.low[2] + in.r.size[2];
    }
    const auto fill = [&](int from, int to) {
      if (from >= to) return;
      if (row_t) std::fill(row_t + from, row_t + to, V{});
      if (w[2].circular && both) {
        for (int q = from; q < to; ++q) {
          const int wrapped = modulo(q, space[2]);
          row_d[q] = row_d[wrapped];
          if (row_t) row_t[q] = row_t[wrapped];
        }
      } else if (!linear.deficit) {
        std::fill(row_d + from, row_d + to, V{});
      } else {
        ghost_fill<kWide>(work, input, in, qz, qy, inside1, inside2, from, to, w[2].circular, row_d);
      }
    };
    fill(begin, std::min(filled_begin, end));
    fill(std::max(filled_end, begin), end);
    sum_along(row_d + begin, sum_d, n, w[2].taps, w[2].stride, w[2].dilation);
    if (!row_t) return kDeficitOnly;
    sum_along(row_t + begin, sum_t, n, w[2].taps, w[2].stride, w[2].dilation);
    return kBoth;
  }

  // Deficits of positions that are inside one image only: half the variance there. Elsewhere 0.
  template <bool kWide>
  void ghost_fill(const Work& work, const Instance& input, const Plane& in, int qz, int qy, bool inside1, bool inside2,
                  int from, int to, bool circular, V* row) const {
    const Index3& space = input.space;
    const int pz = in.r.partner(0, qz), py = in.r.partner(1, qy);
    for (int at = from; at < to; ++at) {
      const int q = circular ? modulo(at, space[2]) : at;
      const int px = in.r.partner(2, q);
      V value{};
      if (inside1 && is_inside(q, space[2])) {
        value = get<kWide>(first<kWide>(work, Statistic::kHalfVariance, input.value, space, qz, qy, q), 0);
      }
      if (inside2 && is_inside(px, space[2])) {
        value += get(second(work, Statistic::kHalfVariance, input.value, space, pz, py, px), 0);
      }
      row[at] = value;
    }
  }

  // From the sums over the windows (rows of scratch.d and scratch.t) to the output of a linear step, or of the dual
  // after it.
  template <bool kWide>
  void finish_linear(Work& work, const Instance& linear, int fused, const Place& at, SummedRows rows) {
    const V* d[3];
    const V* t[3];
    for (int k = 0; k < rows.n; ++k) {
      d[k] = work.scratch.d[k] + at.x;
      t[k] = work.scratch.t[k] + at.x;
    }
    switch (rows.n) {
      case 1:
        return finish_linear_rows<kWide, 1>(work, linear, fused, at, rows.has_ntk, d, t);
      case 2:
        return finish_linear_rows<kWide, 2>(work, linear, fused, at, rows.has_ntk, d, t);
      default:
        return finish_linear_rows<kWide, 3>(work, linear, fused, at, rows.has_ntk, d, t);
    }
  }

  template <bool kWide, int kRows>
  void finish_linear_rows(Work& work, const Instance& linear, int fused, const Place& at, bool has_ntk,
                          const V* const* d, const V* const* t) {
    const int n = at.n;
    const Value& value = program_.values[linear.value];
    const T* c = job_.coefficients + value.coefficient;
    const T mean = T(1) / window_size(value);
    const Instance& target = fused >= 0 ? work.stage.instances[fused] : linear;
    const Plane& out = plane_of(work, target);
    V* d_out = out.row_d(at.z, at.y, at.x);
    V* t_out = out.row_t(at.z, at.y, at.x);
    if (fused >= 0) {
      const V* const no_tangents[3] = {zeros(work), zeros(work), zeros(work)};
      const auto call = [&](auto ntk, auto covariance) {
        linear_relu<T, kWide, ntk.value, covariance.value, kRows>(
            n, d, has_ntk ? t : no_tangents, c[0] * mean,
            AbRelu<T>(job_.coefficients + program_.values[target.value].coefficient),
            dual_rows<AbRelu<T>, kWide>(work, target.value, at), d_out, t_out);
      };
      return dispatch(t_out != nullptr, !target.deficit, call);
    }
    if (!linear.deficit) {
      const V w = broadcast(c[0] * mean), b = broadcast(c[1]), own_w = broadcast(c[2] * mean), own_b = broadcast(c[3]);
      for (int x = 0; x < n; ++x) {
        const V k = sum_across<kRows>(d, x);
        if (t_out) {
          const V own = fma(k, own_w, own_b);
          t_out[x] = has_ntk ? fma(sum_across<kRows>(t, x), w, own) : own;
        }
        d_out[x] = fma(k, w, b);
      }
      return;
    }
    const auto half1 = first<kWide>(work, Statistic::kHalfAverage, linear.value, at);
    const auto half2 = second(work, Statistic::kHalfAverage, linear.value, at);
    const V m = broadcast(mean), w = broadcast(c[0]), own_w = broadcast(c[2]), own_b = broadcast(c[3]);
    for (int x = 0; x < n; ++x) {
      const V deficit = sum_across<kRows>(d, x) * m;
      if (t_out) {
        const V own = fma(get<kWide>(half1, x) + get(half2, x) - deficit, own_w, own_b);
        t_out[x] = has_ntk ? fma(sum_across<kRows>(t, x), w * m, own) : own;
      }
      d_out[x] = deficit * w;
    }
  }

  const V* zeros(const Work& work) const {
    V* at = work.scratch.rows.data() + 4 * widest_;
    return at;
  }

  template <class Dual, bool kWide>
  DualRows<T, Dual::kPlanes> dual_rows(const Work& work, int value, const Place& at) const {
    DualRows<T, Dual::kPlanes> rows;
    const int64_t n = n_positions(at.geometry.space);
    rows.first[0] = first<kWide>(work, Statistic::kDual, value, at);
    rows.second[0] = second(work, Statistic::kDual, value, at);
    for (int k = 1; k < Dual::kPlanes; ++k) {
      rows.first[k] = {rows.first[0].at + k * n * (kWide ? kL : rows_)};
      rows.second[k] = {rows.second[0].at + k * n * kL, rows.second[0].stride};
    }
    return rows;
  }

  template <class Call>
  static void dispatch(bool ntk, bool covariance, const Call& call) {
    if (ntk) {
      covariance ? call(std::true_type{}, std::true_type{}) : call(std::true_type{}, std::false_type{});
    } else {
      covariance ? call(std::false_type{}, std::true_type{}) : call(std::false_type{}, std::false_type{});
    }
  }

  // Steps that treat each position on its own

  template <bool kWide>
  void apply_row(Work& work, const Instance& instance, const Place& at) {
    const Plane& out = plane_of(work, instance);
    V* d_out = out.row_d(at.z, at.y, at.x);
    V* t_out = out.row_t(at.z, at.y, at.x);
    const int n = at.n;
    const Instance& input = work.stage.instances[instance.inputs[0]];
    const Plane& in = plane_of(work, input);
    const V* d = in.row_d(at.z, at.y, at.x);
    const V* t = in.row_t(at.z, at.y, at.x);
    const Value& value = program_.values[instance.value];
    switch (instance.kind) {
      case Kind::kLinear:
        return finish_linear_rows<kWide, 1>(work, instance, -1, at, input.has_ntk, &d, &t);
      case Kind::kDual:
        return with_dual(value.activation, job_.coefficients + value.coefficient, [&](const auto& dual) {
          using Dual = std::decay_t<decltype(dual)>;
          const auto rows = dual_rows<Dual, kWide>(work, instance.value, at);
          dispatch(t_out != nullptr, !instance.deficit, [&](auto ntk, auto covariance) {
            dual_row<T, Dual, kWide, ntk.value, covariance.value>(n, d, t, dual, rows, d_out, t_out);
          });
        });
      case Kind::kNormalize: {
        const auto r1 = first<kWide>(work, Statistic::kNormalizer, instance.value, at);
        const auto r2 = second(work, Statistic::kNormalizer, instance.value, at);
        const auto half1 = first<kWide>(work, Statistic::kNormalizedHalf, instance.value, at);
        const auto half2 = second(work, Statistic::kNormalizedHalf, instance.value, at);
        for (int x = 0; x < n; ++x) {
          const V a = get<kWide>(r1, x), b = get(r2, x);
          V k = (d[x] * a) * b;
          if (instance.deficit) k = fma(a - b, get<kWide>(half1, x) - get(half2, x), k);
          if (t_out) t_out[x] = (t[x] * a) * b;
          d_out[x] = k;
        }
        return;
      }
      case Kind::kToCovariance:
        to_other<kWide>(work, instance.value, at, d, d_out);
        if (t_out && t_out != t) std::copy(t, t + n, t_out);
        return;
      case Kind::kMultiply:
        return multiply<kWide>(work, instance, value, at, d_out, t_out);
      default:
        combine(work, instance, value, at, d_out, t_out);
    }
  }

  void gather_branches(Work& work, const Instance& instance, const Place& at) const {
    auto& rows = work.scratch.branches_d;
    auto& rows_t = work.scratch.branches_t;
    rows.clear();
    rows_t.clear();
    for (int input : instance.inputs) {
      const Plane& in = plane_of(work, work.stage.instances[input]);
      rows.push_back(in.row_d(at.z, at.y, at.x));
      rows_t.push_back(in.row_t(at.z, at.y, at.x));
    }
  }

  void combine(Work& work, const Instance& instance, const Value& value, const Place& at, V* d_out, V* t_out) const {
    const T* weights = job_.coefficients + value.coefficient;
    gather_branches(work, instance, at);
    const auto& rows = work.scratch.branches_d;
    const auto& rows_t = work.scratch.branches_t;
    for (int x = 0; x < at.n; ++x) {
      V sum{}, sum_t{};
      for (size_t k = 0; k < rows.size(); ++k) {
        sum = fma(rows[k][x], broadcast(weights[k]), sum);
        if (t_out && rows_t[k]) sum_t = fma(rows_t[k][x], broadcast(weights[k]), sum_t);
      }
      d_out[x] = sum;
      if (t_out) t_out[x] = sum_t;
    }
  }

  // Branch by branch, as `Product` in nt_core/lowering/primitives.py.
  template <bool kWide>
  void multiply(Work& work, const Instance& instance, const Value& value, const Place& at, V* d_out, V* t_out) const {
    gather_branches(work, instance, at);
    const auto& rows = work.scratch.branches_d;
    const auto& rows_t = work.scratch.branches_t;
    const auto half1 = [&](size_t k, int x) {
      return get<kWide>(first<kWide>(work, Statistic::kHalfVariance, value.inputs[k], at), x);
    };
    const auto half2 = [&](size_t k, int x) {
      return get(second(work, Statistic::kHalfVariance, value.inputs[k], at), x);
    };
    for (int x = 0; x < at.n; ++x) {
      V d = rows[0][x], t = rows_t[0] ? rows_t[0][x] : V{};
      V h1{}, h2{}, k = d;  // halves of the variances, and the covariance, of the product so far
      if (instance.deficit) {
        h1 = half1(0, x);
        h2 = half2(0, x);
        k = h1 + h2 - d;
      }
      for (size_t i = 1; i < rows.size(); ++i) {
        V other = rows[i][x];
        if (instance.deficit) {
          const V g1 = half1(i, x), g2 = half2(i, x), deficit = other;
          other = g1 + g2 - deficit;
          d = fma(h1 - h2, g1 - g2, fma(h1 + h2, deficit, d * other));
          h1 *= g1 + g1;
          h2 *= g2 + g2;
        } else {
          d *= other;
        }
        t *= other;
        if (rows_t[i]) t = fma(rows_t[i][x], k, t);
        k *= other;
      }
      d_out[x] = d;
      if (t_out) t_out[x] = t;
    }
  }

  // Readouts

  void read_out(Work& work, const Rectangle& r, int z, int y) const {
    const Instance& root = work.stage.instances[work.stage.root];
    const Plane& plane = plane_of(work, root);
    const V* d = plane.row_d(z, y);
    const V* t = plane.row_t(z, y);
    if (work.stage.readout < 0) {
      each_part(root, r, z, y, [&](const Place& at) { write_out(work, at, d + at.x, t ? t + at.x : nullptr); });
    } else if (program_.values[work.stage.readout].op == Op::kFlatten) {
      *work.sum_d += row_sum(d, r.size[2]);
      if (t) *work.sum_t += row_sum(t, r.size[2]);
    } else {
      pool_row(work, r, z, y, d, t);
    }
  }

  static V row_sum(const V* row, int n) {
    V sum[4] = {};
    int x = 0;
    for (; x + 4 <= n; x += 4) {
      for (int k = 0; k < 4; ++k) sum[k] += row[x + k];
    }
    for (; x < n; ++x) sum[0] += row[x];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  void pool_row(Work& work, const Rectangle& plane, int row_z, int row_y, const V* d, const V* t) const {
    const Tensor& tensor = work.plan.tensors[work.plan.tensor_of[work.stage.readout]];
    const Index3& space = tensor.offsets.space();
    const int z = plane.low[0] + row_z, y = plane.low[1] + row_y, low = plane.low[2];
    const auto& along = work.links[2];
    const size_t n = along.size();
    if (work.scratch.n_link_sums < 2 * n) {
      work.scratch.link_sums = std::make_unique<Buffer<V>>(2 * n);
      work.scratch.n_link_sums = 2 * n;
    }
    V* sums = work.scratch.link_sums->data();
    for (size_t k = 0; k < n; ++k) {
      const int length = along[k].end - along[k].begin;
      sums[k] = row_sum(d + along[k].begin - low, length);
      if (t) sums[n + k] = row_sum(t + along[k].begin - low, length);
    }
    for (const Link& lz : work.links[0]) {
      if (z < lz.begin || z >= lz.end) continue;
      for (const Link& ly : work.links[1]) {
        if (y < ly.begin || y >= ly.end) continue;
        for (size_t k = 0; k < n; ++k) {
          const Link& lx = along[k];
          const Index3 delta{lz.delta, ly.delta, lx.delta};
          const int64_t start = tensor.start[tensor.offsets.index(delta)];
          if (start < 0) continue;
          const Rectangle r(space, delta);
          const int64_t line = (lz.window - r.low[0]) * int64_t{r.size[1]} + ly.window - r.low[1];
          const int64_t entry = start + line * r.size[2] + lx.window - r.low[2];
          work.sum_d[entry] += sums[k];
          if (t) work.sum_t[entry] += sums[n + k];
        }
      }
    }
  }

  void write_out(const Work& work, const Place& at, const V* d, const V* t) const {
    const Tile<T>& tile = work.tile;
    const Index3& space = at.geometry.space;
    const int64_t size = n_positions(space);
    const int64_t per_pair = program_.all_pairs ? size * size : size;
    const int64_t n2 = program_.n2;
    const int64_t first = position(space, at.first), second = position(space, at.second);
    for (int x = 0; x < at.n; ++x) {
      const int row = one_position_ ? x : 0;
      const int64_t p = first + x - row, partner = second + x - row;
      const int64_t entry = program_.all_pairs ? p * size + partner : p;
      const int64_t mirrored = program_.all_pairs ? partner * size + p : p;
      if (tile.side_by_side && per_pair == 1 && (!program_.symmetric || tile.i[0] + row <= tile.j[0])) {
        write_lanes(tile, tile.i[0] + row, d[x], t ? t[x] : V{});
        continue;
      }
      for (int l = 0; l < tile.n_lanes; ++l) {
        const int64_t i = tile.i[l] + row, j = tile.j[l];
        if (tile.own) {
          T* cov = (tile.which == 1 ? job_.cov1 : job_.cov2) + i * per_pair;
          if (p <= partner) cov[entry] = cov[mirrored] = d[x][l];
          continue;
        }
        if (program_.symmetric && (i > j || (i == j && p > partner))) continue;
        job_.nngp[(i * n2 + j) * per_pair + entry] = d[x][l];
        if (job_.ntk) job_.ntk[(i * n2 + j) * per_pair + entry] = t ? t[x][l] : T(0);
        if (!program_.symmetric) continue;
        job_.nngp[(j * n2 + i) * per_pair + mirrored] = d[x][l];
        if (job_.ntk) job_.ntk[(j * n2 + i) * per_pair + mirrored] = t ? t[x][l] : T(0);
      }
    }
  }

  // One entry for each pair, of pairs that lie side by side in the kernel.
  void write_lanes(const Tile<T>& tile, int64_t i, V d, V t) const {
    const int64_t n2 = program_.n2, begin = i * n2 + tile.j[0];
    const auto write = [&](T* out, V values) {
      if (tile.n_lanes == kL) {
        std::memcpy(out + begin, &values, sizeof(V));
      } else {
        std::memcpy(out + begin, &values, tile.n_lanes * sizeof(T));
      }
      if (!program_.symmetric) return;
      for (int l = 0; l < tile.n_lanes; ++l) out[tile.j[l] * n2 + i] = values[l];
    };
    write(job_.nngp, d);
    if (job_.ntk) write(job_.ntk, t);
  }

  const Job<T>& job_;
  const Prepared& prepared_;
  const Program& program_;
  const Parallel& parallel_;
  bool one_position_ = false;  // no images: rows of planes run over first samples instead
  int rows_ = 1;
  std::vector<int64_t> input_start_;  // of every source in a wide record
  int64_t n_inputs_ = 0;
  int64_t wide_size_ = 0;  // of a group of samples
  int64_t widest_ = 1;     // positions of the longest row
};

template <class T>
void run_dual(const DualJob<T>& job) {
  constexpr int kL = kLanes<T>;
  using V = Vec<T>;
  with_dual(job.activation, job.coefficients, [&](const auto& dual) {
    using Dual = std::decay_t<decltype(dual)>;
    for (int64_t begin = 0; begin < job.n; begin += kL) {
      V in[3]{}, first[Dual::kPlanes], second[Dual::kPlanes], value, factor;
      const int lanes = static_cast<int>(std::min<int64_t>(kL, job.n - begin));
      for (int l = 0; l < lanes; ++l) {
        in[0][l] = T(0.5) * job.variance1[begin + l];
        in[1][l] = T(0.5) * job.variance2[begin + l];
        in[2][l] = job.deficit[begin + l];
      }
      const V half = dual.prepare(in[0], first);
      dual.prepare(in[1], second);
      dual.template apply<false, true>(in[2], first, second, value, factor);
      for (int l = 0; l < lanes; ++l) {
        job.variance_out[begin + l] = 2 * half[l];
        job.deficit_out[begin + l] = value[l];
        job.factor[begin + l] = factor[l];
      }
    }
  });
}

void run_float(const Job<float>& job, const Parallel& parallel) { Engine<float>(job, parallel).run(); }
void run_double(const Job<double>& job, const Parallel& parallel) { Engine<double>(job, parallel).run(); }

}  // namespace

extern const Level kLevel;
const Level kLevel{NT_LEVEL_NAME, run_float, run_double, run_dual<float>, run_dual<double>};

}  // namespace NT_LEVEL
}  // namespace nt
