// From activations to codes: LayerNorm and modulation of each row, and of each Linear that reads it smoothing, grid, codes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "quantize.h"

namespace viditq {

struct Prologue {
  int64_t K;
  bool layernorm;
  float eps;
  const float *mul, *add;  // [M / rows_per_mul, K]
  int64_t rows_per_mul;
  bool empty() const { return !layernorm && !mul && !add; }
};

// The lanes one after another, as a plain loop would add them up.
inline float sum_of(__m512 x) {
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, x);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

struct Norm {
  __m512 mean, inverse;
};

// Copies the row to `row` on the way.
template <typename T>
Norm norm_of(const T* from, int64_t K, float eps, float* row) {
  __m512 sum = _mm512_setzero_ps(), square = sum;
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
    const __m512 x = load(from + k, lanes);
    store(row + k, lanes, x);
    sum = _mm512_add_ps(sum, x);
  });
  const __m512 mean = _mm512_set1_ps(sum_of(sum) / K);
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
    const __m512 distance = _mm512_maskz_sub_ps(lanes, load(row + k, lanes), mean);
    square = _mm512_fmadd_ps(distance, distance, square);
  });
  return {mean, _mm512_set1_ps(1.0f / std::sqrt(sum_of(square) / K + eps))};
}

// The row m of x behind norm and modulation, float [K].
template <typename T>
void transform_row(const T* from, const Prologue& prologue, int64_t m, float* row) {
  const int64_t K = prologue.K, offset = m / prologue.rows_per_mul * K;
  const float* mul = prologue.mul ? prologue.mul + offset : nullptr;
  const float* add = prologue.add ? prologue.add + offset : nullptr;
  const auto modulate = [&](int64_t k, __mmask16 lanes, __m512 x) __attribute__((always_inline)) {
    if (mul) x = rounded(x * load(mul + k, lanes));
    if (add) x = x + load(add + k, lanes);
    store(row + k, lanes, x);
  };
  if (prologue.layernorm) {
    const Norm norm = norm_of(from, K, prologue.eps, row);
    each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
      modulate(k, lanes, (load(row + k, lanes) - norm.mean) * norm.inverse);
    });
  } else {
    each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
      modulate(k, lanes, load(from + k, lanes));
    });
  }
}

// row / div, in `buffer`, which may be the row; the row itself where there is no div.
inline const float* smoothed(const float* row, const float* div, int64_t K, float* buffer) {
  if (!div) return row;
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
    store(buffer + k, lanes, _mm512_div_ps(load(row + k, lanes), load(div + k, lanes)));
  });
  return buffer;
}

// The transformed row m: in x itself where there is nothing to do to it, else in `buffer`.
template <typename T>
const float* row_of(const T* x, const Prologue& prologue, int64_t m, float* buffer) {
  const T* from = x + m * prologue.K;
  if constexpr (std::is_same_v<T, float>)
    if (prologue.empty()) return from;
  transform_row(from, prologue, m, buffer);
  return buffer;
}

struct Activations {
  Format format;
  int64_t rows_per_range;  // 1: tokens; M / L: dynamic per tensor
  int64_t ranges;          // per row: 1, or the groups of a row
};

struct Quantized {  // codes [S, M, h], so that a product's rows lie close together; grids and sums [M, S]
  std::vector<Grid> grids;
  std::vector<int32_t> sums;
  uint8_t* codes;
};

// One of the Linears that read the rows.
struct Reader {
  const float *div, *scale, *zero_point;  // smoothing [K] or null; static grids [ranges] or null: dynamic ones
  int64_t S, h;
  at::Tensor codes;
  Quantized quantized;
  std::vector<Grid> shared;  // static grids, or one of each `rows_per_range` rows; empty: each row has its own
};

inline void quantize_segments(const float* row, int64_t m, int64_t M, int64_t K, const Activations& activations,
                              Reader& reader) {
  const int64_t S = reader.S, g = K / S, per_range = S / activations.ranges, range = K / activations.ranges;
  const Grid* shared = reader.shared.data() + (reader.scale ? 0 : m / activations.rows_per_range);
  Grid grid;
  for (int64_t s = 0; s < S; ++s) {
    uint8_t* codes = reader.quantized.codes + (s * M + m) * reader.h;
    if (!reader.shared.empty()) {
      grid = shared[s / per_range];
    } else if (s % per_range == 0) {
      float lo, hi;
      range_of(row + s * g, range, lo, hi);
      grid = grid_of_range(lo, hi, activations.format);
    }
    const auto quantize = reader.shared.empty() ? quantize_own_row : quantize_row;
    reader.quantized.sums[m * S + s] = quantize(row + s * g, g, grid, activations.format.levels(), codes);
    reader.quantized.grids[m * S + s] = grid;
    std::fill(codes + g, codes + reader.h, 0);
  }
}

// Calls use(m, row, buffer) with every row behind the prologue.
template <typename T, typename F>
void for_rows(const T* x, int64_t M, const Prologue& prologue, F&& use) {
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    const Scratch<float> transformed(prologue.K), buffer(prologue.K);
    for (int64_t m = begin; m < end; ++m) use(m, row_of(x, prologue, m, transformed.get()), buffer.get());
  });
}

inline Grid grid_of_rows(const float* lo, const float* hi, int64_t count, const Format& format) {
  float least = lo[0], most = hi[0];
  for (int64_t i = 0; i < count; ++i) {
    least = lo[i] < least || lo[i] != lo[i] ? lo[i] : least;
    most = hi[i] > most || hi[i] != hi[i] ? hi[i] : most;
  }
  return grid_of_range(least, most, format);
}

// The grids that are known before the rows are.
template <typename T>
void share_grids(const T* x, int64_t M, const Prologue& prologue, const Activations& activations, Reader& reader) {
  const int64_t K = prologue.K, span = activations.rows_per_range;
  if (reader.scale) {
    const int32_t middle = activations.format.symmetric ? activations.format.middle() : 0;
    for (int64_t i = 0; i < activations.ranges; ++i)
      reader.shared.push_back({reader.scale[i], static_cast<int32_t>(reader.zero_point[i]) + middle});
  } else if (span > 1) {
    std::vector<float> lo(M), hi(M);
    for_rows(x, M, prologue, [&](int64_t m, const float* row, float* buffer) {
      range_of(smoothed(row, reader.div, K, buffer), K, lo[m], hi[m]);
    });
    for (int64_t m = 0; m < M; m += span)
      reader.shared.push_back(grid_of_rows(lo.data() + m, hi.data() + m, span, activations.format));
  }
}

// The codes of all readers, each row loaded and transformed once.
template <typename T>
void quantize(const T* x, int64_t M, const Prologue& prologue, const Activations& activations,
              std::vector<Reader>& readers) {
  for (Reader& reader : readers) share_grids(x, M, prologue, activations, reader);
  for_rows(x, M, prologue, [&](int64_t m, const float* row, float* buffer) {
    for (Reader& reader : readers)
      quantize_segments(smoothed(row, reader.div, prologue.K, buffer), m, M, prologue.K, activations, reader);
  });
}

}  // namespace viditq
