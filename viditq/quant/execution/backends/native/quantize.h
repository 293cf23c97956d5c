// Rows of activations: ranges, grids, codes. Codes equal those of viditq's `fake` backend in float32 arithmetic:
// true divisions and rounding half to even, in the order of numerics/affine.py.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace viditq {

constexpr int64_t kAhead = 2048;  // bytes: CPUs do not look beyond the page that they read or write

// A grid as the product sees it: value = (code - zero_point) * scale with codes 0 .. levels.
struct Grid {
  float scale;
  int32_t zero_point;
};

// What outputs of a row and segment take of its grid and codes: acc - zx colsum - zw rest, times sx. Each of the two
// products is, where possible, a sum of two products of 16 bits, which one instruction adds to acc: a b with a of 8 bits
// and b of 22 is (a << 7) (b >> 7) + a (b & 127).
struct Row {
  float scale;
  int32_t zero_point, rest;  // negated: as factor and as split number, or as they are

  static constexpr int64_t kSplittable = (1 << 22) / 256;  // sums of the codes of larger segments need more bits
  static int32_t factor(int32_t a) { return static_cast<int32_t>(static_cast<uint32_t>(a) << 23 | (a & 0xffff)); }
  static int32_t split(int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(b >> 7) << 16 | (b & 127)); }

  // size: of the segment; sum: of its codes
  static Row of(const Grid& grid, int32_t sum, int64_t size) {
    const int32_t zero_point = grid.zero_point, rest = static_cast<int32_t>(size) * zero_point - sum;
    if (size >= kSplittable) return {grid.scale, zero_point, rest};
    return {grid.scale, factor(zero_point), split(rest)};
  }
};

struct Format {
  int64_t bits;
  bool symmetric;
  float levels() const { return static_cast<float>((1 << bits) - 1); }
  int32_t middle() const { return 1 << (bits - 1); }
};

// Smallest and largest of some values and 0; both NaN where one of them is NaN or infinite.
struct Range {
  float lo, hi;
};

// affine.usable_scale: a range of zeros, or one so small that its scale underflows, becomes all zeros; NaN stays.
inline float usable(float scale) { return scale <= 0.0f ? 1e-6f : scale; }

// NaN in a range makes the scale NaN, and with it the whole row of the output, as in `fake`.
inline Grid grid_of_range(Range range, const Format& format) {
  auto [lo, hi] = range;
  if (format.symmetric) {
    const float largest = -lo > hi ? -lo : hi;
    return {usable(largest / static_cast<float>(format.middle() - 1)), format.middle()};
  }
  lo = lo > 0 ? 0 : lo;
  hi = hi < 0 ? 0 : hi;
  // halves: hi - lo may overflow where the scale does not
  const float scale = usable((0.5f * hi - 0.5f * lo) / (0.5f * format.levels()));
  const float zero_point = std::nearbyint(-lo / scale);
  return {scale, std::isfinite(zero_point) ? static_cast<int32_t>(zero_point) : 0};
}

// A range as it grows. What it does at a vector waits for the vector before: several rows, or parts of one, are best
// taken in turn.
struct Extent {
  __m512 least = _mm512_setzero_ps(), most = least, odd = least;

  void add(__m512 x) {
    least = _mm512_min_ps(x, least);  // of a NaN and a number the second
    most = _mm512_max_ps(x, most);
    odd = _mm512_fmadd_ps(x, _mm512_setzero_ps(), odd);  // stays 0 but for NaN and infinity
  }
  Range range() const {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    if (_mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q)) return {kNaN, kNaN};
    return {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most)};
  }
};

template <typename T>
Range range_of(const T* row, int64_t count) {
  Extent parts[4];
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      __builtin_prefetch(row + i + kLanes * j + kAhead / sizeof(T));
      parts[j].add(load(row + i + kLanes * j, kAll));
    }
  each_vector(count - i, [&](int64_t k, __mmask16 lanes) __attribute__((always_inline)) {
    parts[0].add(load(row + i + k, lanes));
  });
  for (int64_t j = 1; j < 4; ++j) {
    parts[0].least = _mm512_min_ps(parts[0].least, parts[j].least);
    parts[0].most = _mm512_max_ps(parts[0].most, parts[j].most);
    parts[0].odd = parts[0].odd + parts[j].odd;
  }
  return parts[0].range();
}

// Of bfloat16 as integers that have the same order, twice as many at a time.
inline Range range_of(const c10::BFloat16* row, int64_t count) {
  constexpr int kInfinity = 0x7f80, kMagnitude = 0x7fff;
  __m512i least = _mm512_setzero_si512(), most = least;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 lanes = count - i < 32 ? (1u << (count - i)) - 1u : ~0u;
    __builtin_prefetch(row + i + kAhead / 2);
    const __m512i bits = _mm512_maskz_loadu_epi16(lanes, row + i), sign = _mm512_srai_epi16(bits, 15);
    const __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(sign, _mm512_set1_epi16(kMagnitude)));
    least = _mm512_min_epi16(least, key);
    most = _mm512_max_epi16(most, key);
  }
  const auto halves = [](__m512i x, auto of) {
    return of(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(x)), _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(x, 1)));
  };
  const int lo = _mm512_reduce_min_epi32(halves(least, [](__m512i a, __m512i b) { return _mm512_min_epi32(a, b); }));
  const int hi = _mm512_reduce_max_epi32(halves(most, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }));
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  if (hi >= kInfinity || lo <= ~kInfinity) return {kNaN, kNaN};
  const auto number = [](int key) {
    const auto bits = static_cast<uint16_t>(key < 0 ? key ^ kMagnitude : key);
    return static_cast<float>(c10::BFloat16(bits, c10::BFloat16::from_bits()));
  };
  return {number(lo), number(hi)};
}

// rint(x / scale) without most of the divisions, which take as long as all the rest. x * (1 / scale) lies within 2^-12
// of the rounded quotient below 1024, so that both round to one integer unless a tie is as near; there it is divided.
// Codes beyond are clamped whatever they are. Scales whose inverse is not a normal number are divided by, always.
struct Steps {
  __m512 scale, inverse;
  bool divide;
  explicit Steps(float of) : scale(_mm512_set1_ps(of)), inverse(_mm512_set1_ps(1.0f / of)) {
    divide = !(of > 0x1p-100f && of < 0x1p100f);
  }
  __m512 divided(__m512 x) const {
    return _mm512_roundscale_ps(_mm512_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT);
  }
  __m512 operator()(__m512 x) const {
    const __m512 steps = x * inverse, whole = _mm512_roundscale_ps(steps, _MM_FROUND_TO_NEAREST_INT);
    const __m512 beside = _mm512_abs_ps(_mm512_sub_ps(steps, whole));
    const __mmask16 near_tie = _mm512_cmp_ps_mask(beside, _mm512_set1_ps(0.5f - 0x1p-12f), _CMP_GE_OQ);
    return __builtin_expect(!near_tie && !divide, true) ? whole : divided(x);
  }
};

// Codes of a row and their sum; `grid.scale` becomes NaN where the row holds a NaN or the scale is infinite.
template <typename T>
int32_t quantize_row(const T* row, int64_t count, Grid& grid, float levels, uint8_t* codes) {
  const Steps steps(grid.scale);
  const __m512 zero_point = _mm512_set1_ps(static_cast<float>(grid.zero_point)), top = _mm512_set1_ps(levels);
  __m512i sum = _mm512_setzero_si512();
  unsigned unordered = 0;
  each_vector(count, [&](int64_t i, __mmask16 lanes) __attribute__((always_inline)) {
    const __m512 x = load(row + i, lanes);
    unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512 value = _mm512_max_ps(_mm512_add_ps(steps(x), zero_point), _mm512_setzero_ps());  // of a NaN: 0
    const __m512i code = _mm512_maskz_cvttps_epi32(lanes, _mm512_min_ps(value, top));
    sum = _mm512_add_epi32(sum, code);
    if (lanes == kAll)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
    else
      _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, code);
  });
  if (unordered || !std::isfinite(grid.scale)) grid.scale = std::numeric_limits<float>::quiet_NaN();
  return _mm512_reduce_add_epi32(sum);
}

// The same of a row that the grid was made for, 64 values at a time: no code is below 0, none far above the levels,
// and a NaN has made the scale one. Quotients in counts of 2^-16, which are off by less than 4: rounding them down after
// adding a half is right but beside a tie, where there is division: of bfloat16 in one vector of thirty, whose values
// and range are whole numbers of the same small step.
template <typename T>
int32_t quantize_own_row(const T* row, int64_t count, Grid& grid, float levels, uint8_t* codes) {
  const bool usual = count % 64 == 0 && grid.scale > 0x1p-100f && grid.scale < 0x1p100f;
  if (!usual) return quantize_row(row, count, grid, levels, codes);
  const __m512 scale = _mm512_set1_ps(grid.scale), inverse = _mm512_set1_ps(0x1p16f / grid.scale);
  const __m512i zero_point = _mm512_set1_epi32(grid.zero_point);
  const __m512i offset = _mm512_set1_epi32((grid.zero_point << 16) + 0x8000 + 4), near = _mm512_set1_epi32(0xfff8);
  const __m512i top = _mm512_set1_epi32((static_cast<int32_t>(levels) << 16) | 0xffff);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    __builtin_prefetch(codes + i + kAhead, 1);
    __m512i part[4];
    __mmask16 ties[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 counts = _mm512_mul_ps(load(row + i + 16 * j, kAll), inverse);
      part[j] = _mm512_add_epi32(_mm512_cvtps_epi32(counts), offset);
      ties[j] = _mm512_testn_epi32_mask(part[j], near);
    }
    if (__builtin_expect(ties[0] | ties[1] | ties[2] | ties[3], 0))
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j)
        if (ties[j]) {
          const __m512i quotient = _mm512_cvtps_epi32(_mm512_div_ps(load(row + i + 16 * j, kAll), scale));
          part[j] = _mm512_slli_epi32(_mm512_add_epi32(quotient, zero_point), 16);
        }
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) part[j] = _mm512_srli_epi32(_mm512_min_epi32(part[j], top), 16);
    const __m512i pairs = _mm512_packus_epi32(part[0], part[1]), rest = _mm512_packus_epi32(part[2], part[3]);
    const __m512i packed = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(pairs, rest));
    _mm512_storeu_si512(codes + i, packed);
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(packed, _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
}

}  // namespace viditq
