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

// Rows that are transformed side by side: a sum waits at each step for the step before, sums of several rows do not
// wait for each other.
constexpr int kTogether = 4;

struct Norm {
  __m512 mean, inverse;
};

// Of R rows, which are copied to `rows` on the way.
template <int R, typename T>
void norms_of(const T* from, int64_t K, float eps, float* rows, Norm* norms) {
  __m512 sums[R], squares[R];
  for (int r = 0; r < R; ++r) sums[r] = squares[r] = _mm512_setzero_ps();
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 x = load(from + r * K + k, lanes);
      store(rows + r * K + k, lanes, x);
      sums[r] = _mm512_add_ps(sums[r], x);
    }
  });
  for (int r = 0; r < R; ++r) norms[r].mean = _mm512_set1_ps(sum_of(sums[r]) / K);
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 distance = _mm512_maskz_sub_ps(lanes, load(rows + r * K + k, lanes), norms[r].mean);
      squares[r] = _mm512_fmadd_ps(distance, distance, squares[r]);
    }
  });
  for (int r = 0; r < R; ++r) norms[r].inverse = _mm512_set1_ps(1.0f / std::sqrt(sum_of(squares[r]) / K + eps));
}

// The R rows from m of x behind norm and modulation, float [R, K], and their ranges.
template <int R, typename T>
void transform_rows(const T* from, const Prologue& prologue, int64_t m, float* rows, Range* ranges) {
  const int64_t K = prologue.K;
  Extent extents[R];
  const auto modulate = [&](int r, int64_t k, __mmask16 lanes, __m512 x) __attribute__((always_inline)) {
    const int64_t offset = (m + r) / prologue.rows_per_mul * K + k;
    if (prologue.mul) x = rounded(x * load(prologue.mul + offset, lanes));
    if (prologue.add) x = x + load(prologue.add + offset, lanes);
    store(rows + r * K + k, lanes, x);
    extents[r].add(_mm512_maskz_mov_ps(lanes, x));
  };
  Norm norms[R];
  if (prologue.layernorm) norms_of<R>(from, K, prologue.eps, rows, norms);
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      if (prologue.layernorm)
        modulate(r, k, lanes, (load(rows + r * K + k, lanes) - norms[r].mean) * norms[r].inverse);
      else
        modulate(r, k, lanes, load(from + r * K + k, lanes));
  });
  for (int r = 0; r < R; ++r) ranges[r] = extents[r].range();
}

// row / div, or the row itself where there is no div, in `out`.
template <typename T>
void smooth(const T* row, const float* div, int64_t K, float* out) {
  each_vector(K, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
    const __m512 x = load(row + k, lanes);
    store(out + k, lanes, div ? _mm512_div_ps(x, load(div + k, lanes)) : x);
  });
}

// The same and its range.
template <typename T>
Range smoothed(const T* row, const float* div, int64_t K, float* out) {
  smooth(row, div, K, out);
  return range_of(out, K);
}

struct Activations {
  Format format;
  int64_t rows_per_range;  // 1: tokens; M / L: dynamic per tensor
  int64_t ranges;          // per row: 1, or the groups of a row
};

struct Quantized {  // codes [S, M, h], so that a product's rows lie close together; rows [M, S]
  std::vector<Row> rows;
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

// whole: the range of the row, where it is known already.
template <typename T>
void quantize_segments(const T* row, const Range* whole, int64_t m, int64_t M, int64_t K,
                       const Activations& activations, Reader& reader) {
  const int64_t S = reader.S, g = K / S, per_range = S / activations.ranges, range = K / activations.ranges;
  const Grid* shared = reader.shared.data() + (reader.scale ? 0 : m / activations.rows_per_range);
  Grid grid;
  for (int64_t s = 0; s < S; ++s) {
    uint8_t* codes = reader.quantized.codes + (s * M + m) * reader.h;
    if (!reader.shared.empty()) {
      grid = shared[s / per_range];
    } else if (s % per_range == 0) {
      grid = grid_of_range(whole && activations.ranges == 1 ? *whole : range_of(row + s * g, range), activations.format);
    }
    const auto quantize = reader.shared.empty() ? quantize_own_row<T> : quantize_row<T>;
    const int32_t sum = quantize(row + s * g, g, grid, activations.format.levels(), codes);
    reader.quantized.rows[m * S + s] = Row::of(grid, sum, g);
    std::fill(codes + g, codes + reader.h, 0);
  }
}

// Calls use(m, row, its range or null, buffer) with every row behind the prologue, as float or, where nothing is to be
// done to it, as it is.
template <typename T, typename F>
void for_rows(const T* x, int64_t M, const Prologue& prologue, F&& use) {
  const int64_t K = prologue.K;
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    const Scratch<float> transformed(kTogether * K), buffer(K);
    Range ranges[kTogether];
    for (int64_t m = begin; m < end;) {
      if (prologue.empty()) {
        use(m, x + m * K, static_cast<const Range*>(nullptr), buffer.get());
        ++m;
        continue;
      }
      const int64_t count = m + kTogether <= end ? kTogether : 1;
      const auto transform = count > 1 ? transform_rows<kTogether, T> : transform_rows<1, T>;
      transform(x + m * K, prologue, m, transformed.get(), ranges);
      for (int64_t r = 0; r < count; ++r, ++m) use(m, transformed.get() + r * K, &ranges[r], buffer.get());
    }
  });
}

inline Grid grid_of_rows(const Range* ranges, int64_t count, const Format& format) {
  Range all = ranges[0];
  for (int64_t i = 0; i < count; ++i) {
    all.lo = ranges[i].lo < all.lo || ranges[i].lo != ranges[i].lo ? ranges[i].lo : all.lo;
    all.hi = ranges[i].hi > all.hi || ranges[i].hi != ranges[i].hi ? ranges[i].hi : all.hi;
  }
  return grid_of_range(all, format);
}

// The grids that are known before the rows are.
template <typename T>
void share_grids(const T* x, int64_t M, const Prologue& prologue, const Activations& activations, Reader& reader) {
  const int64_t K = prologue.K, span = activations.rows_per_range;
  if (reader.scale) {
    const int32_t middle = activations.format.symmetric ? activations.format.middle() : 0;
    for (int64_t i = 0; i < activations.ranges; ++i) {
      reader.shared.push_back({reader.scale[i], static_cast<int32_t>(reader.zero_point[i]) + middle});
      TORCH_CHECK(reader.shared.back().zero_point >> 8 == 0, "viditq::linear: the input's zero point ",
                  reader.zero_point[i], " is no code of 8 bits");
    }
  } else if (span > 1) {
    std::vector<Range> ranges(M);
    for_rows(x, M, prologue, [&](int64_t m, const auto* row, const Range* range, float* buffer) {
      ranges[m] = reader.div ? smoothed(row, reader.div, K, buffer) : range ? *range : range_of(row, K);
    });
    for (int64_t m = 0; m < M; m += span)
      reader.shared.push_back(grid_of_rows(ranges.data() + m, span, activations.format));
  }
}

// The codes of all readers, each row loaded and transformed once.
template <typename T>
void quantize(const T* x, int64_t M, const Prologue& prologue, const Activations& activations,
              std::vector<Reader>& readers) {
  const int64_t K = prologue.K;
  for (Reader& reader : readers) share_grids(x, M, prologue, activations, reader);
  for_rows(x, M, prologue, [&](int64_t m, const auto* row, const Range* range, float* buffer) {
    for (Reader& reader : readers) {
      if (!reader.div) {
        quantize_segments(row, range, m, M, K, activations, reader);
        continue;
      }
      const Range of_smoothed = smoothed(row, reader.div, K, buffer);
      quantize_segments(buffer, &of_smoothed, m, M, K, activations, reader);
    }
  });
}

}  // namespace viditq
