// What a stage ends in: pools, Flatten, and the output.
#pragma once

#include <cstring>

#include "planes.h"

namespace nt {
namespace NT_LEVEL {

inline std::vector<Link> pool_links(const Window& w, int size, int count, int offset) {
  std::vector<Link> links;
  const int low = std::max(0, -offset), high = size - std::max(0, offset);
  // A circular window is one at every distance of whole images.
  const int turns = w.circular ? ((count - 1) * w.stride + w.extent() + std::abs(w.low)) / size + 2 : 0;
  for (int window = 0; window < count; ++window) {
    for (int turn1 = -turns; turn1 <= turns; ++turn1) {
      const int first = window * w.stride - w.low + turn1 * size;
      if (first >= high || first + w.extent() <= low) continue;
      for (int partner = 0; partner < count; ++partner) {
        for (int turn2 = -turns; turn2 <= turns; ++turn2) {
          const int second = partner * w.stride - w.low - offset + turn2 * size;
          int begin = std::max(first, second);
          const int end = std::min(std::min(first, second) + w.extent(), high);
          if (std::max(begin, low) >= end || (second - first) % w.dilation != 0) continue;
          if (begin < low) begin += (low - begin + w.dilation - 1) / w.dilation * w.dilation;
          if (begin < end) links.push_back({partner - window, window, begin, end, w.dilation});
        }
      }
    }
  }
  return links;
}

// The links of a plane, which holds the offset on the other side as well where it is wrapped.
inline std::vector<Link> pool_links(const Stage& stage, const Value& pool, int axis, int offset) {
  const int size = stage.instances[stage.root].space[axis];
  auto links = pool_links(pool.window[axis], size, pool.space[axis], offset);
  if (stage.wrapped[axis] && offset > 0) {
    const auto others = pool_links(pool.window[axis], size, pool.space[axis], offset - size);
    links.insert(links.end(), others.begin(), others.end());
  }
  return links;
}

// The sum of one in `step` of the `n` numbers of a row.
template <class V>
NT_INLINE V row_sum(const V* row, int n, int step = 1) {
  V sum[4] = {};
  int x = 0;
  for (; x + 3 * step < n; x += 4 * step) {
    for (int k = 0; k < 4; ++k) sum[k] += row[x + k * step];
  }
  for (; x < n; x += step) sum[0] += row[x];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Visits the windows that the row (z, y) is in, of each link along it: visit(number of the link, entry of the tensor).
template <class T, class Visit>
NT_INLINE void each_link(const Work<T>& work, const Tensor& tensor, int z, int y, const Visit& visit) {
  const auto& along = work.links[2];
  for (const Link& lz : work.links[0]) {
    if (!lz.holds(z)) continue;
    for (const Link& ly : work.links[1]) {
      if (!ly.holds(y)) continue;
      for (size_t k = 0; k < along.size(); ++k) {
        const Link& lx = along[k];
        const int64_t entry = tensor.entry({lz.delta, ly.delta, lx.delta}, {lz.window, ly.window, lx.window});
        if (entry >= 0) visit(k, entry);
      }
    }
  }
}

// Adds a row to the windows that it is in.
template <class T>
void pool_row(const Work<T>& work, const Rectangle& plane, int row_z, int row_y, const Vec<T>* d, const Vec<T>* t) {
  const Tensor& tensor = work.plan.tensors[work.plan.tensor_of[work.stage.end]];
  const int z = plane.low[0] + row_z, y = plane.low[1] + row_y, low = plane.low[2];
  const auto& along = work.links[2];
  const size_t n = along.size();
  Vec<T>* sums = work.scratch.sums_of_links(2 * n);
  for (size_t k = 0; k < n; ++k) {
    const auto sum = [&, link = along[k]](const Vec<T>* row) {
      row += link.begin - low;
      const int length = link.end - link.begin;
      return link.step == 1 ? row_sum(row, length) : row_sum(row, length, link.step);  // the former is faster
    };
    sums[k] = sum(d);
    if (t) sums[n + k] = sum(t);
  }
  each_link(work, tensor, z, y, [&](size_t k, int64_t entry) {
    work.sum_d[entry] += sums[k];
    if (t) work.sum_t[entry] += sums[n + k];
  });
}

// The copies that are made of a plane, along one axis.
inline std::vector<Copy> copies(const std::vector<int>& positions, const Rectangle& plane, int axis) {
  std::vector<Copy> copies;
  for (size_t i = 0; i < positions.size(); ++i) {
    const int position = positions[i];
    if (position < plane.low[axis] || position >= plane.low[axis] + plane.size[axis]) continue;
    for (size_t j = 0; j < positions.size(); ++j) {
      if (positions[j] != plane.partner(axis, position)) continue;
      copies.push_back({position, static_cast<int>(j) - static_cast<int>(i), static_cast<int>(i)});
    }
  }
  return copies;
}

// Visits the positions of a row that are copied, and the entries of the tensor where they go: visit(x, entry).
template <class T, class Visit>
void each_copy(const Work<T>& work, const Tensor& tensor, const Rectangle& plane, int row_z, int row_y,
               const Visit& visit) {
  const Index3& order = work.c.program.values[work.stage.end].order;
  const int z = plane.low[0] + row_z, y = plane.low[1] + row_y;
  for (const Copy& cz : work.copies[0]) {
    if (cz.position != z) continue;
    for (const Copy& cy : work.copies[1]) {
      if (cy.position != y) continue;
      for (const Copy& cx : work.copies[2]) {
        const int64_t entry = tensor.entry(reordered({cz.delta, cy.delta, cx.delta}, order),
                                           reordered({cz.place, cy.place, cx.place}, order));
        if (entry >= 0) visit(cx.position - plane.low[2], entry);
      }
    }
  }
}

// Copies the positions of a row to their places.
template <class T>
void copy_row(const Work<T>& work, const Rectangle& plane, int row_z, int row_y, const Vec<T>* d, const Vec<T>* t) {
  const Tensor& tensor = work.plan.tensors[work.plan.tensor_of[work.stage.end]];
  each_copy(work, tensor, plane, row_z, row_y, [&](int x, int64_t entry) {
    work.sum_d[entry] = d[x];
    if (t) work.sum_t[entry] = t[x];
  });
}

// One position (and its partner) of every pair; of a symmetric block the upper triangle, and its mirror image.
template <class T>
void write_entries(const Work<T>& work, const Place& at, int x, Vec<T> d, Vec<T> t) {
  const Tile<T>& tile = work.tile;
  const Program& program = work.c.program;
  const Output& output = program.outputs[work.stage.output];
  const Result<T>& result = work.c.job.results[work.stage.output];
  const Index3& space = at.geometry.space;
  const int64_t size = n_positions(space), per_pair = n_position_pairs(space, !output.all_pairs);
  const int64_t n2 = program.n2;
  const int row = work.c.one_position ? x : 0;
  const int64_t p = position(space, at.first) + x - row, partner = position(space, at.second) + x - row;
  const int64_t entry = output.all_pairs ? p * size + partner : p;
  const int64_t mirrored = output.all_pairs ? partner * size + p : p;
  for (int l = 0; l < tile.n_lanes; ++l) {
    const int64_t i = tile.i[l] + row, j = tile.j[l];
    if (tile.own) {
      T* cov = (tile.which == 1 ? result.cov1 : result.cov2) + i * per_pair;
      if (p <= partner) cov[entry] = cov[mirrored] = d[l];
      continue;
    }
    if (program.symmetric && (i > j || (i == j && p > partner))) continue;
    result.nngp[(i * n2 + j) * per_pair + entry] = d[l];
    if (result.ntk) result.ntk[(i * n2 + j) * per_pair + entry] = t[l];
    if (!program.symmetric) continue;
    result.nngp[(j * n2 + i) * per_pair + mirrored] = d[l];
    if (result.ntk) result.ntk[(j * n2 + i) * per_pair + mirrored] = t[l];
  }
}

// One entry for each pair, of pairs that lie side by side in the kernel.
template <class T>
void write_lanes(const Work<T>& work, int64_t i, Vec<T> d, Vec<T> t) {
  const Tile<T>& tile = work.tile;
  const Program& program = work.c.program;
  const Result<T>& result = work.c.job.results[work.stage.output];
  const int64_t n2 = program.n2, begin = i * n2 + tile.j[0];
  const auto write = [&](T* out, Vec<T> values) {
    if (tile.n_lanes == kLanes<T>) {
      std::memcpy(out + begin, &values, sizeof(values));
    } else {
      std::memcpy(out + begin, &values, tile.n_lanes * sizeof(T));
    }
    if (!program.symmetric) return;
    for (int l = 0; l < tile.n_lanes; ++l) out[tile.j[l] * n2 + i] = values[l];
  };
  write(result.nngp, d);
  if (result.ntk) write(result.ntk, t);
}

template <class T>
void write_out(const Work<T>& work, const Place& at, const Vec<T>* d, const Vec<T>* t) {
  const Tile<T>& tile = work.tile;
  const bool one_entry = tile.side_by_side && n_positions(at.geometry.space) == 1;
  for (int x = 0; x < at.n; ++x) {
    const int64_t i = tile.i[0] + (work.c.one_position ? x : 0);
    const Vec<T> tangent = t ? t[x] : Vec<T>{};
    if (one_entry && (!work.c.program.symmetric || i <= tile.j[0])) {
      write_lanes(work, i, d[x], tangent);
    } else {
      write_entries(work, at, x, d[x], tangent);
    }
  }
}

// One row of the root of a stage goes to its end.
template <class T>
void end_row(const Work<T>& work, const Rectangle& r, int z, int y) {
  const Instance& root = work.stage.instances[work.stage.root];
  const Plane<T>& plane = work.plane(root);
  const Vec<T>* d = plane.row_d(z, y);
  const Vec<T>* t = plane.row_t(z, y);
  if (work.stage.output >= 0) {
    each_part(root, r, z, y, [&](const Place& at) { write_out(work, at, d + at.x, t ? t + at.x : nullptr); });
  } else if (is_copy(work.c.program.values[work.stage.end].op)) {
    copy_row(work, r, z, y, d, t);
  } else if (work.c.program.values[work.stage.end].op == Op::kFlatten) {
    *work.sum_d += row_sum(d, r.size[2]);
    if (t) *work.sum_t += row_sum(t, r.size[2]);
  } else {
    pool_row(work, r, z, y, d, t);
  }
}

// Visits the entries of a tensor: visit(where, position, its partner).
template <class Visit>
void each_pair(const Tensor& tensor, const Visit& visit) {
  for (const Index3& delta : tensor.offsets) {
    int64_t at = tensor.find(delta);
    const Rectangle r(tensor.space, delta);
    for (int z = r.low[0]; z < r.low[0] + r.size[0]; ++z) {
      for (int y = r.low[1]; y < r.low[1] + r.size[1]; ++y) {
        for (int x = r.low[2]; x < r.low[2] + r.size[2]; ++x) {
          visit(at++, Index3{z, y, x}, Index3{z + delta[0], y + delta[1], x + delta[2]});
        }
      }
    }
  }
}

// Divides sums over windows by what a mean is divided by.
template <class T>
void scale_tensor(const Context<T>& c, const Plan& plan, int number, Vec<T>* d, Vec<T>* ntk) {
  const Tensor& tensor = plan.tensors[number];
  const Value& value = c.program.values[tensor.value];
  const Index3& space = c.program.values[value.inputs[0]].space;
  if (value.op == Op::kFlatten) {
    const Vec<T> scale = broadcast(T(1) / static_cast<T>(n_positions(space)));
    d[0] *= scale;
    if (ntk) ntk[0] *= scale;
    return;
  }
  if (!value.mean) return;
  const PoolSizes<T> sizes(value, space);
  each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
    const Vec<T> scale = broadcast(static_cast<T>(1 / (sizes.size(p) * sizes.size(partner))));
    d[at] *= scale;
    if (ntk) ntk[at] *= scale;
  });
}

// Whether a pair of positions after a copy, or an Untie, is one before it.
inline bool is_copied(const Value& value, const Index3& p, const Index3& partner) {
  bool copied = value.op == Op::kGather || p == partner;
  for (int a = 0; a < kAxes; ++a) {
    const std::vector<int>& positions = value.positions[value.order[a]];
    copied &= positions[p[a]] >= 0 && positions[partner[a]] >= 0;
  }
  return copied;
}

// The deficit of what is not copied: its covariance is 0.
template <bool kWide, class T>
void finish_copies(const Context<T>& c, const Plan& plan, const Tile<T>& tile, int number, Vec<T>* d) {
  const Tensor& tensor = plan.tensors[number];
  const Value& value = c.program.values[tensor.value];
  const int64_t half = c.prepared.record.find(Statistic::kHalfVariance, tensor.value);
  each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
    if (is_copied(value, p, partner)) return;
    const Row1<T> first{at1<kWide>(c, tile, half + position(value.space, p))};
    d[at] = get<kWide>(first, 0) + load(tile.record2 + (half + position(value.space, partner)) * kLanes<T>);
  });
}

// What the deficit of two windows of a pool gets of the difference of their variances, because they do not hold equally
// many positions.
template <class T>
class Unevenness {
 public:
  Unevenness(const Value& pool, const Index3& space) : pool_(pool), sizes_(pool, space) {}

  T operator()(const Index3& p, const Index3& partner) const {
    if (pool_.mean && pool_.normalize_edges) return 0;
    const double norm = pool_.mean ? 2.0 * window_size<T>(pool_) * window_size<T>(pool_) : 2.0;
    return static_cast<T>((sizes_.count(p) - sizes_.count(partner)) / norm);
  }

 private:
  const Value& pool_;
  PoolSizes<T> sizes_;
};

// Turns a pooled deficit into the deficit of the pooled covariance, see docs/cpu-engine.md.
template <bool kWide, class T>
void finish_deficit(const Context<T>& c, const Plan& plan, const Tile<T>& tile, int number, Vec<T>* d) {
  using V = Vec<T>;
  const Tensor& tensor = plan.tensors[number];
  const Value& value = c.program.values[tensor.value];
  const int64_t own = c.prepared.record.find(Statistic::kOwnDeficit, tensor.value);
  const int64_t sums = c.prepared.record.find(Statistic::kPooledVariance, tensor.value);
  const Unevenness<T> unevenness(value, c.program.values[value.inputs[0]].space);
  const V distinct = broadcast(T(1)) - same_samples(c, tile, 0, kIdentical);
  each_pair(tensor, [&](int64_t at, const Index3& p, const Index3& partner) {
    const int64_t p1 = position(value.space, p), p2 = position(value.space, partner);
    const auto first = [&](int64_t start) { return get<kWide>(Row1<T>{at1<kWide>(c, tile, start + p1)}, 0); };
    const auto second = [&](int64_t start) { return load(tile.record2 + (start + p2) * kLanes<T>); };
    V deficit = d[at] - (first(own) + second(own)) * broadcast(T(0.5));
    const T uneven = unevenness(p, partner);
    if (uneven != 0) deficit = fma(first(sums) - second(sums), broadcast(uneven), deficit);
    d[at] = p1 == p2 ? deficit * distinct : deficit;
  });
}

}  // namespace NT_LEVEL
}  // namespace nt
