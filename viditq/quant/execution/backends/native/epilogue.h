// What happens to a row of outputs after the product: bias, activation function, gate, residual, storing, in float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "quantize.h"

namespace viditq {

inline void store_row(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// To nearest even; a NaN keeps its sign and becomes quiet.
inline void store_row(const float* from, c10::BFloat16* to, int64_t count) {
  const auto* bits = reinterpret_cast<const uint32_t*>(from);
  auto* out = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? (bits[i] >> 16) | 0x40u : rounded);
  }
}

inline void store_row(const float* from, c10::Half* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    const __m256i half = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(to + i, mask, half);
  }
}

// e^x to 2 units in the last place (Cephes' expf), 0 below -87; written so that compilers vectorize it.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
  const float n = std::rint(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

enum Activation : int64_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kSilu = 3 };

inline void activate_row(float* __restrict y, int64_t count, int64_t activation) {
  if (activation == kGeluTanh) {  // 0.5 y (1 + tanh u) = y / (1 + e^(-2 u))
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      y[i] = y[i] / (1.0f + exponential(-1.5957691216f * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
  } else if (activation == kSilu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = y[i] / (1.0f + exponential(-y[i]));
  } else if (activation == kGelu) {  // erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float z = std::fabs(y[i]) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
      float p = 1.061405429f;
      p = p * t - 1.453152027f;
      p = p * t + 1.421413741f;
      p = p * t - 0.284496736f;
      p = p * t + 0.254829592f;
      const float half = 0.5f * p * t * exponential(-z * z);
      y[i] = y[i] * (y[i] < 0.0f ? half : 1.0f - half);
    }
  }
}

struct Epilogue {
  const float* bias;  // [N]
  int64_t activation;
  const float* gate;  // [M / rows_per_gate, N]
  int64_t rows_per_gate;
};

// From y, bias to store, for outputs n .. n + count of row m; y may be that place itself. buffer: [count].
template <typename T>
void finish_row(float* __restrict y, float* __restrict buffer, const Epilogue& epilogue, int64_t m, int64_t n,
                int64_t count, int64_t N, const T* addend, const T* residual, T* out) {
  if (const float* bias = epilogue.bias)
    for (int64_t i = 0; i < count; ++i) y[i] += bias[n + i];
  if (addend) {
    load_row(addend + m * N + n, buffer, count);
    for (int64_t i = 0; i < count; ++i) y[i] += buffer[i];
  }
  activate_row(y, count, epilogue.activation);
  if (const float* gate = epilogue.gate) {
    gate += m / epilogue.rows_per_gate * N + n;
    for (int64_t i = 0; i < count; ++i) y[i] *= gate[i];
  }
  if (residual) {
    load_row(residual + m * N + n, buffer, count);
    for (int64_t i = 0; i < count; ++i) y[i] += buffer[i];
  }
  if constexpr (std::is_same_v<T, float>)
    if (y == out + m * N + n) return;
  store_row(y, out + m * N + n, count);
}

}  // namespace viditq
