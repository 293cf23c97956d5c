// Codes times packed weights, scaled: the loops over blocks of rows and panels of outputs. Legend: linear.cpp.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "epilogue.h"
#include "product.h"

namespace viditq {

constexpr int64_t kRows = 128, kPanelsPerChunk = 8, kChunkBytes = 512 * 1024;

struct Weight {
  const uint8_t* data;
  bool nibbles;
  const float* scale;        // [P, S, 64], as the next
  const int8_t* zero_point;  // null: all 0
  int64_t N, P, S, h;
  int64_t panel_bytes() const { return S * h * kPanel; }  // as int8
};

inline void unpack_nibbles(const uint8_t* __restrict from, int64_t bytes, int8_t* __restrict to) {
  for (int64_t i = 0; i < bytes; i += 256)
    for (int64_t j = 0; j < 256; ++j) {
      to[2 * i + j] = static_cast<int8_t>(from[i + j] & 15);
      to[2 * i + 256 + j] = static_cast<int8_t>(from[i + j] >> 4);
    }
}

// Sums over k of a panel [h / 4, 64, 4]; they cost less to compute for each chunk than memory to keep.
inline void sum_columns(const int8_t* panel, int64_t h, int32_t* colsum) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums[4] = {};
  for (int64_t k = 0; k < h; k += 4, panel += 4 * kPanel)
    for (int64_t j = 0; j < 4; ++j)
      sums[j] = _mm512_dpbusd_epi32(sums[j], ones, _mm512_loadu_si512(panel + 64 * j));
  for (int64_t j = 0; j < 4; ++j) _mm512_storeu_si512(colsum + 16 * j, sums[j]);
}

// y = sx sw (acc - zx colsum - zw rest) for one row of the only segment.
inline void dequantize_row(const int32_t* __restrict acc, const int32_t* __restrict colsum, const Weight& weight,
                           int64_t n, int64_t count, Grid grid, int32_t rest, float* __restrict y) {
  const float* __restrict scale = weight.scale + n;
  const auto exact = [&](int64_t i) { return acc[i] - grid.zero_point * colsum[i]; };
  if (const int8_t* __restrict zero_point = weight.zero_point ? weight.zero_point + n : nullptr)
    for (int64_t i = 0; i < count; ++i) y[i] = (exact(i) - zero_point[i] * rest) * (grid.scale * scale[i]);
  else
    for (int64_t i = 0; i < count; ++i) y[i] = exact(i) * (grid.scale * scale[i]);
}

using Ints = int32_t __attribute__((vector_size(64), aligned(4)));
using Floats = float __attribute__((vector_size(64), aligned(4)));

// y += sx sw (acc - zx colsum - zw rest) for `rows` rows of a panel and segment, whose scales stay in registers.
inline void accumulate_panel(const int32_t* acc, const int32_t* columns, const Weight& weight, int64_t offset,
                             int64_t rows, const Grid* grids, const int32_t* sums, int64_t step, int32_t size,
                             float* y) {
  Ints colsum[4], zero_point[4] = {};
  Floats scale[4];
  for (int64_t j = 0; j < 4; ++j) {
    colsum[j] = *reinterpret_cast<const Ints*>(columns + 16 * j);
    scale[j] = *reinterpret_cast<const Floats*>(weight.scale + offset + 16 * j);
    if (weight.zero_point)
      for (int64_t i = 0; i < 16; ++i) zero_point[j][i] = weight.zero_point[offset + 16 * j + i];
  }
  for (int64_t i = 0; i < rows; ++i, acc += kPanel, y += kPanel, grids += step, sums += step) {
    const int32_t zx = grids->zero_point, rest = *sums - size * zx;
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Ints exact = reinterpret_cast<const Ints*>(acc)[j] - colsum[j] * zx - zero_point[j] * rest;
      reinterpret_cast<Floats*>(y)[j] += __builtin_convertvector(exact, Floats) * (scale[j] * grids->scale);
    }
  }
}

// Blocks of kRows rows by a chunk of panels; a chunk of weights stays in the second-level cache (and unpacked).
template <typename T>
void multiply(const Quantized& x, const Weight& weight, const Epilogue& epilogue, int64_t M, int64_t K, bool use_amx,
              const T* addend, const T* residual, T* out) {
  const int64_t S = weight.S, h = weight.h, N = weight.N, threads = at::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(kChunkBytes / weight.panel_bytes(), 1, kPanelsPerChunk);
  const int64_t blocks = (M + kRows - 1) / kRows;
  const int64_t wanted = std::max<int64_t>(1, weight.P * blocks / (2 * threads));
  const int64_t panels = std::min(fitting, threads > 1 ? wanted : fitting);
  const int64_t chunks = (weight.P + panels - 1) / panels, width = panels * kPanel;
  // rows of a power of two would share few lines of the first-level cache
  const int64_t ldc = S > 1 ? kPanel : width + 16;
  at::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> acc(kRows * ldc);
    std::vector<float> y(S > 1 ? kRows * kPanel : width), buffer(width);
    std::vector<int8_t> unpacked(weight.nibbles ? panels * weight.panel_bytes() : 0);
    std::vector<int32_t> colsum(width * S);  // of the chunk, [panels, S, 64]
    const Product product(h, use_amx);
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, m0 = task % blocks * kRows, rows = std::min(kRows, M - m0);
      const int64_t p0 = chunk * panels, p1 = std::min(p0 + panels, weight.P), n0 = p0 * kPanel;
      const int8_t* b = reinterpret_cast<const int8_t*>(weight.data) + p0 * weight.panel_bytes();
      if (weight.nibbles) {
        const int64_t bytes = weight.panel_bytes() / 2;
        if (held != chunk) unpack_nibbles(weight.data + p0 * bytes, (p1 - p0) * bytes, unpacked.data());
        b = unpacked.data();
      }
      if (held != chunk)
        for (int64_t i = 0; i < (p1 - p0) * S; ++i) sum_columns(b + i * h * kPanel, h, colsum.data() + i * kPanel);
      held = chunk;
      const uint8_t* a = x.codes + m0 * h;
      const Grid* grids = x.grids.data() + m0 * S;
      const int32_t* sums = x.sums.data() + m0 * S;
      const int32_t size = static_cast<int32_t>(K / S);
      if (S == 1) {
        const int64_t count = std::min(p1 * kPanel, N) - n0;
        for (int64_t p = p0; p < p1; ++p, b += h * kPanel)
          product(rows, ldc, a, b, acc.data() + (p - p0) * kPanel);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = y.data();
          if constexpr (std::is_same_v<T, float>) row = out + (m0 + i) * N + n0;
          const int32_t rest = sums[i] - size * grids[i].zero_point;
          dequantize_row(acc.data() + i * ldc, colsum.data(), weight, n0, count, grids[i], rest, row);
          finish_row(row, buffer.data(), epilogue, m0 + i, n0, count, N, addend, residual, out);
        }
        continue;
      }
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t n = p * kPanel, count = std::min(kPanel, N - n);
        std::fill_n(y.data(), rows * kPanel, 0.0f);
        for (int64_t s = 0; s < S; ++s, b += h * kPanel) {
          product(rows, ldc, a + s * M * h, b, acc.data());
          const int64_t offset = ((p - p0) * S + s) * kPanel;
          accumulate_panel(acc.data(), colsum.data() + offset, weight, n0 * S + offset, rows, grids + s, sums + s, S,
                           size, y.data());
        }
        for (int64_t i = 0; i < rows; ++i)
          finish_row(y.data() + i * kPanel, buffer.data(), epilogue, m0 + i, n, count, N, addend, residual, out);
      }
    }
  });
}

}  // namespace viditq
