// Codes times packed weights, scaled: the loops over blocks of rows and panels of outputs. Legend: linear.cpp.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "activations.h"
#include "epilogue.h"
#include "product.h"

namespace viditq {

constexpr int64_t kPanelsPerChunk = 8, kChunkBytes = 1280 * 1024;

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
  // acc - zx colsum - zw rest
  __m512 exact(int64_t j, const int32_t* acc, const Row& row) const {
    const __m512i zx = _mm512_set1_epi32(row.zero_point), rest = _mm512_set1_epi32(row.rest);
    __m512i sum = _mm512_loadu_si512(acc + kLanes * j);
    if (__builtin_expect(splittable, true)) {
      sum = _mm512_dpwssd_epi32(sum, colsum[j], zx);
      if (zero_points) sum = _mm512_dpwssd_epi32(sum, zero_point[j], rest);
    } else {
      sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(colsum[j], zx));
      if (zero_points) sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(zero_point[j], rest));
    }
    return _mm512_cvtepi32_ps(sum);
  }
};

// Rows of codes that are multiplied together; what outputs take of row i and segment s lies at i * S + s.
struct Rows {
  const uint8_t* codes;
  const Row* of;
  int64_t first, count;
};

// A product of some rows and a panel of a weight without segments, of which outputs are to be made.
template <typename T>
struct Unfinished {
  const Columns* columns;
  Rows rows;
  const int32_t* acc;
  int64_t n;
  const Epilogue<T>* epilogue;
};

// The outputs of rows begin .. end. whole: all 64 are there.
template <Ending ending, bool whole, typename T>
void finish(const void* what, int64_t begin, int64_t end) {
  const auto& made = *static_cast<const Unfinished<T>*>(what);
  const Columns& columns = *made.columns;
  const Epilogue<T>& epilogue = *made.epilogue;
  for (int64_t i = begin; i < end; ++i) {
    const Row row = made.rows.of[i];
    const int64_t m = made.rows.first + i;
    const float* gates = epilogue.gate_of(m);
    const Four y = each([&](int j) __attribute__((always_inline)) {
      return rounded(columns.exact(j, made.acc + i * kPanel, row) * (columns.scale[j] * row.scale));
    });
    epilogue.template finish<ending, whole>(y, m, made.n, gates);
    epilogue.fetch(m, made.n + kPanel);
  }
}

// y += sx sw (acc - zx colsum - zw rest) for the rows of a panel and segment.
inline void accumulate_panel(const int32_t* acc, const Columns& columns, const Rows& rows, int64_t S, float* y) {
  for (int64_t i = 0; i < rows.count; ++i, acc += kPanel, y += kPanel) {
    const Row row = rows.of[i * S];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 scale = columns.scale[j] * row.scale, before = _mm512_load_ps(y + 16 * j);
      const __m512 sum = columns.exact(j, acc, row);
      _mm512_store_ps(y + 16 * j, _mm512_fmadd_ps(sum, scale, before));
    }
  }
}

template <typename T>
void finish_sums(const float* y, const Rows& rows, int64_t n, const Epilogue<T>& epilogue) {
  for (int64_t i = 0; i < rows.count; ++i, y += kPanel) {
    const float* gates = epilogue.gate_of(rows.first + i);
    const Four sums = each([&](int j) { return _mm512_load_ps(y + kLanes * j); });
    epilogue.template finish<Ending::kAny, false>(sums, rows.first + i, n, gates);
  }
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

// Blocks of kRows rows by a chunk of panels; a chunk of weights stays in the second-level cache (and unpacked).
template <typename T>
void multiply(const Quantized& x, const Weight& weight, const Epilogue<T>& epilogue, int64_t M, int64_t K,
              bool use_amx) {
  const int64_t S = weight.S, h = weight.h, threads = at::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(kChunkBytes / weight.panel_bytes(), 1, kPanelsPerChunk);
  const int64_t height = Product::rows(h, use_amx), blocks = (M + height - 1) / height;
  const int64_t wanted = std::max<int64_t>(1, weight.P * blocks / (2 * threads));
  const int64_t panels = std::min(fitting, threads > 1 ? wanted : fitting);
  const int64_t chunks = (weight.P + panels - 1) / panels;
  const int64_t size = K / S;
  decltype(amx::Beside::run) finish_whole = nullptr;
  with_ending(epilogue.ending(), [&](auto kind) { finish_whole = finish<kind, true, T>; });
  at::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<int32_t> acc(2 * Product::kMost * kPanel);
    const Scratch<float> y(S > 1 ? Product::kMost * kPanel : 0);
    const Product product(h, use_amx);
    Chunk chunk(weight, panels, size);
    int64_t held = -1;
    Unfinished<T> made[2];  // in turn: while one is finished, the next is multiplied
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
        for (int64_t m = first; m < last; m += product.block()) {
          const Rows rows{x.codes + m * h, x.rows.data() + m * S, m, std::min(product.block(), last - m)};
          const int64_t panel = (p - p0) * S;
          if (S == 1) {
            int32_t* sums = acc.get() + turn * Product::kMost * kPanel;
            product(rows.count, rows.codes, chunk.codes + panel * h * kPanel, sums, waiting);
            made[turn] = {chunk.columns + panel, rows, sums, p * kPanel, &epilogue};
            const bool whole = p * kPanel + kPanel <= weight.N;
            waiting = {whole ? finish_whole : finish<Ending::kAny, false, T>, &made[turn], rows.count};
            turn = 1 - turn;
            if (!product.overlaps()) waiting.finish();
            continue;
          }
          std::fill_n(y.get(), rows.count * kPanel, 0.0f);
          for (int64_t s = 0; s < S; ++s) {
            product(rows.count, rows.codes + s * M * h, chunk.codes + (panel + s) * h * kPanel, acc.get());
            const Columns& columns = chunk.columns[panel + s];
            accumulate_panel(acc.get(), columns, {nullptr, rows.of + s, m, rows.count}, S, y.get());
          }
          finish_sums(y.get(), rows, p * kPanel, epilogue);
        }
      }
    }
    waiting.finish();
  });
}

}  // namespace viditq
