// Rows of activations: ranges, grids, codes. Codes equal those of viditq's `fake` backend in float32 arithmetic:
// true divisions and rounding half to even, in the order of numerics/affine.py.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace viditq {

// A grid as the product sees it: value = (code - zero_point) * scale with codes 0 .. levels.
struct Grid {
  float scale;
  int32_t zero_point;
};

struct Format {
  int64_t bits;
  bool symmetric;
  float levels() const { return static_cast<float>((1 << bits) - 1); }
  int32_t middle() const { return 1 << (bits - 1); }
};

// affine.usable_scale: a range of zeros, or one so small that its scale underflows, becomes all zeros; NaN stays.
inline float usable(float scale) { return scale <= 0.0f ? 1e-6f : scale; }

// NaN in a range, or an infinite range, makes the scale NaN, and with it the whole row of the output, as in `fake`.
inline Grid grid_of_range(float lo, float hi, const Format& format) {
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

// Smallest and largest of a row; both NaN where the row holds one.
inline void range_of(const float* row, int64_t count, float& lo, float& hi) {
  __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity()), most = _mm512_sub_ps(_mm512_setzero_ps(), least);
  unsigned unordered = 0;
  each_vector(count, [&](int64_t i, __mmask16 lanes) __attribute__((always_inline)) {
    const __m512 x = load(row + i, lanes);
    unordered |= _mm512_mask_cmp_ps_mask(lanes, x, x, _CMP_UNORD_Q);
    least = _mm512_mask_min_ps(least, lanes, x, least);  // of a NaN and a number the second
    most = _mm512_mask_max_ps(most, lanes, x, most);
  });
  lo = unordered ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_min_ps(least);
  hi = unordered ? lo : _mm512_reduce_max_ps(most);
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
inline int32_t quantize_row(const float* row, int64_t count, Grid& grid, float levels, uint8_t* codes) {
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
// adding a half is right but beside a tie, where the vector is quantized as above.
inline int32_t quantize_own_row(const float* row, int64_t count, Grid& grid, float levels, uint8_t* codes) {
  const bool usual = count % 64 == 0 && grid.scale > 0x1p-100f && grid.scale < 0x1p100f;
  if (!usual) return quantize_row(row, count, grid, levels, codes);
  const __m512 inverse = _mm512_set1_ps(0x1p16f / grid.scale);
  const __m512i offset = _mm512_set1_epi32((grid.zero_point << 16) + 0x8000 + 4), near = _mm512_set1_epi32(0xfff8);
  const __m512i top = _mm512_set1_epi32((static_cast<int32_t>(levels) << 16) | 0xffff);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    __m512i part[4];
    unsigned ties = 0;
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const __m512 counts = _mm512_mul_ps(_mm512_loadu_ps(row + i + 16 * j), inverse);
      part[j] = _mm512_add_epi32(_mm512_cvtps_epi32(counts), offset);
      ties |= _mm512_testn_epi32_mask(part[j], near);
      part[j] = _mm512_srli_epi32(_mm512_min_epi32(part[j], top), 16);
    }
    __m512i packed;
    if (__builtin_expect(ties == 0, true)) {
      const __m512i pairs = _mm512_packus_epi32(part[0], part[1]), rest = _mm512_packus_epi32(part[2], part[3]);
      packed = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(pairs, rest));
      _mm512_storeu_si512(codes + i, packed);
    } else {
      quantize_row(row + i, 64, grid, levels, codes + i);
      packed = _mm512_loadu_si512(codes + i);
    }
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8(packed, _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(sum));
}

}  // namespace viditq
