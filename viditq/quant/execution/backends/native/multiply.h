// Codes times packed weights, scaled: the loops over blocks of rows and panels of outputs. Legend: linear.cpp.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "activations.h"
#include "epilogue.h"
#include "product.h"

namespace viditq {

constexpr int64_t kPanelsPerChunk = 8;

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

// What the rows of a panel and segment are scaled by; sums and zero points as `Row` has them, the other way round.
struct Columns {
  __m512i colsum[4], zero_point[4];
  __m512 scale[4];
  bool splittable, zero_points;

  Columns(const int32_t* sums, const Weight& weight, int64_t offset, int64_t size)
      : splittable(size < Row::kSplittable), zero_points(weight.zero_point) {
    for (int64_t j = 0; j < 4; ++j) {
      alignas(64) int32_t sum[kLanes], count[kLanes] = {};
      const int64_t at = offset + kLanes * j;
      for (int64_t i = 0; i < kLanes; ++i) {
        sum[i] = splittable ? Row::split(-sums[kLanes * j + i]) : -sums[kLanes * j + i];
        if (zero_points) count[i] = splittable ? Row::factor(weight.zero_point[at + i]) : weight.zero_point[at + i];
      }
      colsum[j] = _mm512_load_si512(sum);
      zero_point[j] = _mm512_load_si512(count);
      scale[j] = weight.scale ? load(weight.scale + at, kAll) : load(weight.half_scale + at, kAll);
    }
  }
  // acc - zx colsum - zw rest, of 64 outputs of a row. usual: `splittable`.
  template <bool usual, bool zero_points>
  __attribute__((always_inline)) Four exact(const int32_t* acc, const Row& row) const {
    const __m512i zx = _mm512_set1_epi32(row.zero_point), rest = _mm512_set1_epi32(row.rest);
    const auto minus = [](__m512i sum, __m512i a, __m512i b) __attribute__((always_inline)) {
      return usual ? _mm512_dpwssd_epi32(sum, a, b) : _mm512_add_epi32(sum, _mm512_mullo_epi32(a, b));
    };
    return each([&](int j) __attribute__((always_inline)) {
      __m512i sum = minus(_mm512_loadu_si512(acc + kLanes * j), colsum[j], zx);
      if (zero_points) sum = minus(sum, zero_point[j], rest);
      return _mm512_cvtepi32_ps(sum);
    });
  }
};

// Calls use(integral constants of `splittable` and `zero_points`).
template <typename F>
__attribute__((always_inline)) inline void with_kind(const Columns& columns, F&& use) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (!columns.splittable) return use(no, yes);
  columns.zero_points ? use(yes, yes) : use(yes, no);
}

// The product of some rows and a panel of a segment, of which outputs, or their parts, are to be made.
template <typename T>
struct Computed {
  const Columns* columns;
  const int32_t* acc;
  const Row* rows;  // of row i at i * S
  int64_t S, first, n;
  float* sums;  // [rows, 64] of the segments so far
  bool begins;  // the first segment
  const Epilogue<T>* epilogue;

  // Of row i sx sw (acc - zx colsum - zw rest), added to what segments before gave.
  template <bool usual, bool zero_points>
  __attribute__((always_inline)) Four of(const Columns& columns, int64_t i) const {
    const Row row = rows[i * S];
    const Four sum = columns.template exact<usual, zero_points>(acc + i * kPanel, row);
    const Four scale = each([&](int j) __attribute__((always_inline)) { return columns.scale[j] * row.scale; });
    if (begins) return rounded(sum * scale);
    return each([&](int j) __attribute__((always_inline)) {
      return _mm512_fmadd_ps(sum[j], scale[j], _mm512_load_ps(sums + i * kPanel + kLanes * j));
    });
  }
};

// For rows begin .. end, the sums.
template <typename T>
void accumulate(const void* what, int64_t begin, int64_t end) {
  const Computed<T> made = *static_cast<const Computed<T>*>(what);
  const Columns columns = *made.columns;
  with_kind(columns, [&](auto usual, auto zero_points) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const Four sum = made.template of<usual, zero_points>(columns, i);
      for (int j = 0; j < 4; ++j) _mm512_store_ps(made.sums + i * kPanel + kLanes * j, sum[j]);
    }
  });
}

// The outputs. whole: all 64 are there.
template <Ending ending, bool whole, typename T>
void finish(const void* what, int64_t begin, int64_t end) {
  const auto& made = *static_cast<const Computed<T>*>(what);
  with_kind(*made.columns, [&](auto usual, auto zero_points) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = made.first + i;
      const Four y = made.template of<usual, zero_points>(*made.columns, i);
      made.epilogue->template finish<ending, whole>(y, m, made.n, made.epilogue->gate_of(m));
      made.epilogue->fetch(m, made.n + kPanel);
    }
  });
}

// The weights of some panels as int8 [panels, S, h / 4, 64, 4], and what their outputs are scaled by [panels, S].
class Chunk {
 public:
  Chunk(const Weight& weight, int64_t panels, int64_t size)
      : weight_(weight), size_(size), unpacked_(weight.nibbles ? panels * weight.panel_bytes() : 0),
        columns_(panels * weight.S) {}

  void hold(int64_t first, int64_t end) {
    const int64_t bytes = weight_.panel_bytes() / (weight_.nibbles ? 2 : 1), S = weight_.S;
    codes = reinterpret_cast<const int8_t*>(weight_.data + first * bytes);
    if (weight_.nibbles) {
      unpack_nibbles(weight_.data + first * bytes, (end - first) * bytes, unpacked_.get());
      codes = unpacked_.get();
    }
    alignas(64) int32_t colsum[kPanel];
    for (int64_t i = 0; i < (end - first) * S; ++i) {
      sum_columns(codes + i * weight_.h * kPanel, weight_.h, colsum);
      new (columns_.get() + i) Columns(colsum, weight_, (first * S + i) * kPanel, size_);
    }
    columns = columns_.get();
  }
  const int8_t* codes = nullptr;
  const Columns* columns = nullptr;

 private:
  const Weight& weight_;
  const int64_t size_;
  Scratch<int8_t> unpacked_;
  Scratch<Columns> columns_;
};

// Blocks of rows by a chunk of panels; a chunk of weights stays in the second-level cache (and unpacked).
template <typename T>
void multiply(const Quantized& x, const Weight& weight, const Epilogue<T>& epilogue, int64_t M, int64_t K,
              bool use_amx) {
  const int64_t S = weight.S, h = weight.h, threads = at::get_num_threads();
  const int64_t bytes = Product::chunk_bytes(h, use_amx);
  const int64_t fitting = std::clamp<int64_t>(bytes / weight.panel_bytes(), 1, kPanelsPerChunk);
  const int64_t height = Product::rows(h, use_amx), blocks = (M + height - 1) / height;
  const int64_t wanted = std::max<int64_t>(1, weight.P * blocks / (2 * threads));
  const int64_t most = std::min(fitting, threads > 1 ? wanted : fitting);
  const int64_t chunks = (weight.P + most - 1) / most;
  const int64_t panels = (weight.P + chunks - 1) / chunks;  // of one size, as threads share them by number
  decltype(amx::Beside::run) finish_whole = nullptr;
  with_ending(epilogue.ending(), [&](auto kind) { finish_whole = finish<kind, true, T>; });
  at::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    const Product product(h, use_amx);
    const int64_t sums = product.block() * kPanel;
    const Scratch<int32_t> acc(2 * sums);
    const Scratch<float> parts(S > 1 ? sums : 0);
    Chunk chunk(weight, panels, K / S);
    int64_t held = -1;
    Computed<T> made[2];  // in turn: while of one outputs are made, the next is computed
    amx::Beside waiting;
    int turn = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p0 = task / blocks * panels, p1 = std::min(p0 + panels, weight.P);
      if (held != p0) {
        waiting.finish();  // what it needs of the chunk goes
        chunk.hold(p0, p1);
      }
      held = p0;
      const int64_t first = task % blocks * height, last = std::min(first + height, M);
      for (int64_t p = p0; p < p1; ++p) {
        const bool whole = p * kPanel + kPanel <= weight.N;
        for (int64_t m = first; m < last; m += product.block()) {
          const int64_t rows = std::min(product.block(), last - m);
          for (int64_t s = 0; s < S; ++s, turn = 1 - turn) {
            const int64_t part = (p - p0) * S + s;
            int32_t* to = acc.get() + turn * sums;
            product(rows, x.codes + (s * M + m) * h, chunk.codes + part * h * kPanel, to, waiting);
            const Row* of_rows = x.rows.data() + m * S + s;
            made[turn] = {chunk.columns + part, to, of_rows, S, m, p * kPanel, parts.get(), s == 0, &epilogue};
            const auto finished = whole ? finish_whole : finish<Ending::kAny, false, T>;
            waiting = {s + 1 < S ? accumulate<T> : finished, &made[turn], rows};
            if (!product.overlaps()) waiting.finish();
          }
        }
      }
    }
    waiting.finish();
  });
}

}  // namespace viditq
