// Rows of activations: load, transform, quantize. Codes equal those of viditq's `fake` backend in float32 arithmetic:
// true divisions and rounding half to even, in the order of numerics/affine.py.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace viditq {

inline void load_row(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline void load_row(const c10::BFloat16* from, float* to, int64_t count) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* out = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint32_t>(bits[i]) << 16;
}

inline void load_row(const c10::Half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
  }
}

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
inline void range_of(const float* __restrict row, int64_t count, float& lo, float& hi) {
  float least = std::numeric_limits<float>::infinity(), most = -least;
  int32_t unordered = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : unordered)
  for (int64_t i = 0; i < count; ++i) {
    const float value = row[i];
    least = value < least ? value : least;
    most = value > most ? value : most;
    unordered += value != value;
  }
  lo = unordered ? std::numeric_limits<float>::quiet_NaN() : least;
  hi = unordered ? lo : most;
}

// Codes of a row and their sum; `grid.scale` becomes NaN where the row holds a NaN or the scale is infinite.
inline int32_t quantize_row(const float* __restrict row, int64_t count, Grid& grid, float levels,
                            uint8_t* __restrict codes) {
  const float scale = grid.scale, zero_point = static_cast<float>(grid.zero_point);
  int32_t sum = 0, unordered = 0;
#pragma omp simd reduction(+ : sum) reduction(+ : unordered)
  for (int64_t i = 0; i < count; ++i) {
    unordered += row[i] != row[i];
    float value = std::rint(row[i] / scale) + zero_point;
    value = value > 0.0f ? value : 0.0f;
    value = value < levels ? value : levels;
    const int32_t code = static_cast<int32_t>(value);
    codes[i] = static_cast<uint8_t>(code);
    sum += code;
  }
  if (unordered || !std::isfinite(scale)) grid.scale = std::numeric_limits<float>::quiet_NaN();
  return sum;
}

}  // namespace viditq
