// From activations to codes: LayerNorm, modulation and smoothing of each row, its grid, its codes.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "quantize.h"

namespace viditq {

struct Prologue {
  int64_t K;
  bool layernorm;
  float eps;
  const float *mul, *add, *div;  // [M / rows_per_mul, K] twice, [K]
  int64_t rows_per_mul;
  bool empty() const { return !layernorm && !mul && !add && !div; }
};

inline void transform_row(const Prologue& prologue, int64_t m, float* __restrict row) {
  const int64_t K = prologue.K;
  if (prologue.layernorm) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; ++k) sum += row[k];
    const float mean = sum / K;
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < K; ++k) square += (row[k] - mean) * (row[k] - mean);
    const float inverse = 1.0f / std::sqrt(square / K + prologue.eps);
    for (int64_t k = 0; k < K; ++k) row[k] = (row[k] - mean) * inverse;
  }
  const int64_t offset = m / prologue.rows_per_mul * K;
  if (const float* mul = prologue.mul)
    for (int64_t k = 0; k < K; ++k) row[k] *= mul[offset + k];
  if (const float* add = prologue.add)
    for (int64_t k = 0; k < K; ++k) row[k] += add[offset + k];
  if (const float* div = prologue.div)
    for (int64_t k = 0; k < K; ++k) row[k] /= div[k];
}

// The transformed row m: in x itself where there is nothing to do to it, else in `buffer`.
template <typename T>
const float* row_of(const T* x, const Prologue& prologue, int64_t m, float* buffer) {
  const T* from = x + m * prologue.K;
  if constexpr (std::is_same_v<T, float>)
    if (prologue.empty()) return from;
  load_row(from, buffer, prologue.K);
  transform_row(prologue, m, buffer);
  return buffer;
}

struct Quantized {  // codes [S, M, h], so that a product's rows lie close together; grids and sums [M, S]
  std::vector<Grid> grids;
  std::vector<int32_t> sums;
  uint8_t* codes;
};

struct Activations {
  Format format;
  int64_t rows_per_range;    // 1: tokens; M / L: dynamic per tensor
  int64_t ranges;            // per row: 1, or the groups of a row
  const float *scale, *zero_point;  // static: [1] or [ranges]
};

inline void quantize_segments(const float* row, int64_t m, int64_t M, const Prologue& prologue,
                              const Activations& activations, const Grid* grids, int64_t S, int64_t h,
                              Quantized& out) {
  const int64_t g = prologue.K / S, per_range = S / activations.ranges;
  for (int64_t s = 0; s < S; ++s) {
    uint8_t* codes = out.codes + (s * M + m) * h;
    Grid grid = grids[s / per_range];
    out.sums[m * S + s] = quantize_row(row + s * g, g, grid, activations.format.levels(), codes);
    out.grids[m * S + s] = grid;
    std::fill(codes + g, codes + h, 0);
  }
}

template <typename T>
void quantize(const T* x, int64_t M, const Prologue& prologue, const Activations& activations, int64_t S, int64_t h,
              Quantized& out) {
  const int64_t K = prologue.K, ranges = activations.ranges, span = activations.rows_per_range;
  std::vector<Grid> shared;  // grids known before the rows are: static, or of many rows
  if (activations.scale) {
    const int32_t middle = activations.format.symmetric ? activations.format.middle() : 0;
    for (int64_t i = 0; i < ranges; ++i)
      shared.push_back({activations.scale[i], static_cast<int32_t>(activations.zero_point[i]) + middle});
  } else if (span > 1) {
    std::vector<float> lo(M), hi(M);
    at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(K);
      for (int64_t m = begin; m < end; ++m)
        range_of(row_of(x, prologue, m, buffer.data()), K, lo[m], hi[m]);
    });
    for (int64_t m = 0; m < M; m += span) {
      float least = lo[m], most = hi[m];
      for (int64_t i = m; i < m + span; ++i) {
        least = lo[i] < least || lo[i] != lo[i] ? lo[i] : least;
        most = hi[i] > most || hi[i] != hi[i] ? hi[i] : most;
      }
      shared.push_back(grid_of_range(least, most, activations.format));
    }
  }
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(K);
    std::vector<Grid> own(ranges);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = row_of(x, prologue, m, buffer.data());
      const Grid* grids = own.data();
      if (activations.scale) {
        grids = shared.data();
      } else if (span > 1) {
        grids = shared.data() + m / span;
      } else {
        for (int64_t i = 0; i < ranges; ++i) {
          float lo, hi;
          range_of(row + i * (K / ranges), K / ranges, lo, hi);
          own[i] = grid_of_range(lo, hi, activations.format);
        }
      }
      quantize_segments(row, m, M, prologue, activations, grids, S, h, out);
    }
  });
}

}  // namespace viditq
