// A matrix, and its transpose, times vectors: both in one pass over a matrix that is one of many tiles, for as many
// vectors at a time as registers hold.
//
// Everything is added in double precision, whatever the matrix is in: conjugate gradients want that, and a general
// product of matrices is made for more vectors than the few outputs of a network.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "context.h"

namespace nt {
namespace NT_LEVEL {

// Columns that a task takes: its parts of the vectors stay in the first cache.
constexpr int kStrip = 256;
// Rows and vectors at a time: their sums stay in registers.
constexpr int kRowsAtOnce = 4;
constexpr int kVectorsAtOnce = NT_VECTOR_BYTES == 64 ? 5 : 2;

// The first `n` of the elements at `p`, and zeros, in double precision.
template <class T>
NT_INLINE VDouble load_as_double(const T* p, int n = kLanes<double>) {
  typedef T Some __attribute__((vector_size(kLanes<double> * sizeof(T))));
  Some some{};
  std::memcpy(&some, p, n == kLanes<double> ? sizeof(some) : n * sizeof(T));
  return __builtin_convertvector(some, VDouble);
}

NT_INLINE double sum(VDouble x) {
  double sum = 0;
  for (int l = 0; l < kLanes<double>; ++l) sum += x[l];
  return sum;
}

// Some columns of the matrix, and what belongs to them.
template <class T>
struct Strip {
  const T* matrix;  // its first row
  int64_t stride;   // from row to row
  int columns;
  const double* right;  // (vectors at a time, kStrip), padded with zeros
  double* transposed;   // the sums of the transpose, likewise
  const double* left;   // (rows, vectors)
  int64_t left_stride;
  double* direct;  // (rows, vectors)
  int64_t direct_stride;
};

template <int kRows, int kVectors, class T>
NT_INLINE void multiply_rows(const Strip<T>& s, int64_t row) {
  constexpr int kL = kLanes<double>;
  VDouble left[kRows][kVectors], direct[kRows][kVectors]{};
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) left[r][v] = broadcast(s.left[(row + r) * s.left_stride + v]);
  }
  const auto add = [&](int column, const VDouble(&matrix)[kRows]) {
    for (int v = 0; v < kVectors; ++v) {
      double* transposed = s.transposed + v * kStrip + column;
      VDouble sum = load(transposed);
      for (int r = 0; r < kRows; ++r) sum = fma(matrix[r], left[r][v], sum);
      store(transposed, sum);
    }
    for (int v = 0; v < kVectors; ++v) {
      const VDouble right = load(s.right + v * kStrip + column);
      for (int r = 0; r < kRows; ++r) direct[r][v] = fma(matrix[r], right, direct[r][v]);
    }
  };
  const T* begin = s.matrix + row * s.stride;
  int column = 0;
  for (VDouble matrix[kRows]; column + kL <= s.columns; column += kL) {
    for (int r = 0; r < kRows; ++r) matrix[r] = load_as_double(begin + r * s.stride + column);
    add(column, matrix);
  }
  if (column < s.columns) {
    VDouble matrix[kRows];
    for (int r = 0; r < kRows; ++r) {
      matrix[r] = load_as_double(begin + r * s.stride + column, s.columns - column);
    }
    add(column, matrix);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) s.direct[(row + r) * s.direct_stride + v] = sum(direct[r][v]);
  }
}

template <int kVectors, class T>
void multiply_strip(const Strip<T>& s, int64_t n_rows) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= n_rows; row += kRowsAtOnce) multiply_rows<kRowsAtOnce, kVectors>(s, row);
  for (; row < n_rows; ++row) multiply_rows<1, kVectors>(s, row);
}

// Calls `f` with a constant: the number of vectors, at most `kMost`.
template <int kMost, class F>
void with_vectors(int64_t n, const F& f) {
  if (n >= kMost) {
    f(std::integral_constant<int, kMost>{});
  } else if constexpr (kMost > 1) {
    with_vectors<kMost - 1>(n, f);
  }
}

// The products with vectors from `first` on.
template <class T>
void multiply_some(const ProductsJob<T>& job, int64_t first, int64_t n_some, const Parallel& parallel) {
  const int64_t n_rows = job.n_rows, n_vectors = job.n_vectors, n_strips = ceil_div(job.n_columns, kStrip);
  const Buffer<double> parts(n_strips * n_rows * n_some);
  parallel.run(n_strips, [&](const auto& next) {
    const Buffer<double> right(kVectorsAtOnce * kStrip), transposed(kVectorsAtOnce * kStrip);
    for (int64_t k = next(); k >= 0; k = next()) {
      const int64_t begin = k * kStrip;
      const int columns = static_cast<int>(std::min<int64_t>(kStrip, job.n_columns - begin));
      for (int64_t done = 0; done < n_some; done += kVectorsAtOnce) {
        const int64_t vector = first + done;
        with_vectors<kVectorsAtOnce>(n_some - done, [&](auto vectors) {
          std::fill_n(right.data(), kVectorsAtOnce * kStrip, 0.);
          std::fill_n(transposed.data(), kVectorsAtOnce * kStrip, 0.);
          for (int v = 0; v < vectors; ++v) {
            for (int c = 0; c < columns; ++c) {
              right.data()[v * kStrip + c] = job.right[(begin + c) * n_vectors + vector + v];
            }
          }
          const Strip<T> strip{job.matrix + begin,
                               job.n_columns,
                               columns,
                               right.data(),
                               transposed.data(),
                               job.left + vector,
                               n_vectors,
                               parts.data() + k * n_rows * n_some + done,
                               n_some};
          multiply_strip<vectors()>(strip, n_rows);
          for (int v = 0; v < vectors; ++v) {
            for (int c = 0; c < columns; ++c) {
              job.transposed[(begin + c) * n_vectors + vector + v] = transposed.data()[v * kStrip + c];
            }
          }
        });
      }
    }
  });
  // One strip after the other, whichever thread it was on: the bits do not depend on it.
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t v = 0; v < n_some; ++v) {
      double sum = 0;
      for (int64_t k = 0; k < n_strips; ++k) sum += parts.data()[(k * n_rows + i) * n_some + v];
      job.direct[i * n_vectors + first + v] = sum;
    }
  }
}

template <class T>
void run_products(const ProductsJob<T>& job, const Parallel& parallel) {
  constexpr int64_t kSome = 4 * kVectorsAtOnce;  // vectors whose parts are in memory
  for (int64_t first = 0; first < job.n_vectors; first += kSome) {
    multiply_some(job, first, std::min(kSome, job.n_vectors - first), parallel);
  }
}

}  // namespace NT_LEVEL
}  // namespace nt
