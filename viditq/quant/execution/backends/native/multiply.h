// Codes times packed weights, scaled: the loops over blocks of rows and panels of outputs. Legend: linear.cpp.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "activations.h"
#include "epilogue.h"
#include "product.h"

namespace viditq {

constexpr int64_t kRows = 96, kPanelsPerChunk = 8, kChunkBytes = 512 * 1024;

struct Weight {
  const uint8_t* data;
  bool nibbles;
  const float* scale;        // [P, S, 64], as the next; null: in `half_scale`
  const c10::Half* half_scale;
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

// What the rows of a panel and segment are scaled by, in registers.
struct Columns {
  __m512i colsum[4], zero_point[4];
  __m512 scale[4];
  bool zero_points;

  Columns(const int32_t* sums, const Weight& weight, int64_t offset) : zero_points(weight.zero_point) {
    for (int64_t j = 0; j < 4; ++j) {
      colsum[j] = _mm512_loadu_si512(sums + 16 * j);
      const int64_t at = offset + 16 * j;
      scale[j] = weight.scale ? load(weight.scale + at, kAll) : load(weight.half_scale + at, kAll);
      if (!zero_points) continue;
      const auto* counts = reinterpret_cast<const __m128i*>(weight.zero_point + offset + 16 * j);
      zero_point[j] = _mm512_cvtepi8_epi32(_mm_loadu_si128(counts));
    }
  }
  // acc - zx colsum - zw rest
  __m512 exact(int64_t j, const int32_t* acc, int32_t zx, int32_t rest) const {
    __m512i sum = _mm512_loadu_si512(acc + 16 * j);
    sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(colsum[j], _mm512_set1_epi32(zx)));
    if (zero_points) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero_point[j], _mm512_set1_epi32(rest)));
    return _mm512_cvtepi32_ps(sum);
  }
};

// Rows of codes that are multiplied together, and where their grids and sums lie: those of row i and segment s at
// i * S + s.
struct Rows {
  const uint8_t* codes;
  const Grid* grids;
  const int32_t* sums;
  int64_t first, count;
};

// The outputs of `rows` in a panel of a weight without segments. whole: all 64 are there.
template <Ending ending, bool whole, typename T>
void finish_panel(const int32_t* acc, const Columns& columns, const Rows& rows, int32_t size, int64_t n,
                  const Epilogue<T>& epilogue) {
  for (int64_t i = 0; i < rows.count; ++i, acc += kPanel) {
    const Grid grid = rows.grids[i];
    const int32_t rest = rows.sums[i] - size * grid.zero_point;
    const float* gates = epilogue.gate_of(rows.first + i);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __mmask16 lanes = whole ? kAll : lanes_of(epilogue.N - n - 16 * j);
      if (!whole && !lanes) break;
      const __m512 y = rounded(columns.exact(j, acc, grid.zero_point, rest) * (columns.scale[j] * grid.scale));
      epilogue.template finish<ending>(y, rows.first + i, n + 16 * j, lanes, gates);
    }
  }
}

// y += sx sw (acc - zx colsum - zw rest) for the rows of a panel and segment.
inline void accumulate_panel(const int32_t* acc, const Columns& columns, const Rows& rows, int64_t S, int32_t size,
                             float* y) {
  for (int64_t i = 0; i < rows.count; ++i, acc += kPanel, y += kPanel) {
    const Grid grid = rows.grids[i * S];
    const int32_t rest = rows.sums[i * S] - size * grid.zero_point;
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 scale = columns.scale[j] * grid.scale, before = _mm512_load_ps(y + 16 * j);
      const __m512 sum = columns.exact(j, acc, grid.zero_point, rest);
      _mm512_store_ps(y + 16 * j, _mm512_fmadd_ps(sum, scale, before));
    }
  }
}

template <typename T>
void finish_sums(const float* y, const Rows& rows, int64_t n, const Epilogue<T>& epilogue) {
  for (int64_t i = 0; i < rows.count; ++i, y += kPanel) {
    const float* gates = epilogue.gate_of(rows.first + i);
    for (int64_t j = 0; j < 4; ++j)
      if (const __mmask16 lanes = lanes_of(epilogue.N - n - 16 * j))
        epilogue.template finish<Ending::kAny>(_mm512_load_ps(y + 16 * j), rows.first + i, n + 16 * j, lanes, gates);
  }
}

// The weights of some panels as int8, and the sums of their columns [panels, S, 64].
class Chunk {
 public:
  Chunk(const Weight& weight, int64_t panels)
      : weight_(weight), unpacked_(weight.nibbles ? panels * weight.panel_bytes() : 0),
        colsum_(panels * weight.S * kPanel) {}

  void hold(int64_t first, int64_t end) {
    const int64_t bytes = weight_.panel_bytes() / (weight_.nibbles ? 2 : 1);
    codes = reinterpret_cast<const int8_t*>(weight_.data + first * bytes);
    if (weight_.nibbles) {
      unpack_nibbles(weight_.data + first * bytes, (end - first) * bytes, unpacked_.get());
      codes = unpacked_.get();
    }
    colsum = colsum_.get();
    for (int64_t i = 0; i < (end - first) * weight_.S; ++i)
      sum_columns(codes + i * weight_.h * kPanel, weight_.h, colsum_.get() + i * kPanel);
  }
  const int8_t* codes = nullptr;
  const int32_t* colsum = nullptr;

 private:
  const Weight& weight_;
  Scratch<int8_t> unpacked_;
  Scratch<int32_t> colsum_;
};

// Blocks of kRows rows by a chunk of panels; a chunk of weights stays in the second-level cache (and unpacked).
template <typename T>
void multiply(const Quantized& x, const Weight& weight, const Epilogue<T>& epilogue, int64_t M, int64_t K,
              bool use_amx) {
  const int64_t S = weight.S, h = weight.h, threads = at::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(kChunkBytes / weight.panel_bytes(), 1, kPanelsPerChunk);
  const int64_t blocks = (M + kRows - 1) / kRows;
  const int64_t wanted = std::max<int64_t>(1, weight.P * blocks / (2 * threads));
  const int64_t panels = std::min(fitting, threads > 1 ? wanted : fitting);
  const int64_t chunks = (weight.P + panels - 1) / panels;
  const int32_t size = static_cast<int32_t>(K / S);
  const Ending ending = epilogue.ending();
  at::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<int32_t> acc(Product::kMost * kPanel);
    const Scratch<float> y(S > 1 ? Product::kMost * kPanel : 0);
    const Product product(h, use_amx);
    Chunk chunk(weight, panels);
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p0 = task / blocks * panels, p1 = std::min(p0 + panels, weight.P);
      if (held != p0) chunk.hold(p0, p1);
      held = p0;
      const int64_t first = task % blocks * kRows, last = std::min(first + kRows, M);
      for (int64_t p = p0; p < p1; ++p) {
        for (int64_t m = first; m < last; m += product.block()) {
          const Rows rows{x.codes + m * h, x.grids.data() + m * S, x.sums.data() + m * S, m,
                          std::min(product.block(), last - m)};
          const int64_t panel = (p - p0) * S;
          if (S == 1) {
            product(rows.count, rows.codes, chunk.codes + panel * h * kPanel, acc.get());
            const Columns columns(chunk.colsum + panel * kPanel, weight, p * kPanel);
            with_ending(ending, [&](auto kind) {
              if (p * kPanel + kPanel <= weight.N)
                finish_panel<kind, true>(acc.get(), columns, rows, size, p * kPanel, epilogue);
              else
                finish_panel<Ending::kAny, false>(acc.get(), columns, rows, size, p * kPanel, epilogue);
            });
            continue;
          }
          std::fill_n(y.get(), rows.count * kPanel, 0.0f);
          for (int64_t s = 0; s < S; ++s) {
            product(rows.count, rows.codes + s * M * h, chunk.codes + (panel + s) * h * kPanel, acc.get());
            const Columns columns(chunk.colsum + (panel + s) * kPanel, weight, (p * S + s) * kPanel);
            const Rows of_segment{nullptr, rows.grids + s, rows.sums + s, m, rows.count};
            accumulate_panel(acc.get(), columns, of_segment, S, size, y.get());
          }
          finish_sums(y.get(), rows, p * kPanel, epilogue);
        }
      }
    }
  });
}

}  // namespace viditq
