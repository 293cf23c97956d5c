// What happens to outputs after the product: bias, activation function, gate, residual, storing, in float32.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace viditq {

// e^x to 2 units in the last place (Cephes' expf), 0 below -87.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));  // of a NaN and a number the second
  const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT);
  __m512 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
  return p * (__m512)_mm512_slli_epi32(exponent, 23);
}

enum Activation : int64_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kSilu = 3 };

inline __m512 activated(__m512 y, int64_t activation) {
  if (activation == kGeluTanh)  // 0.5 y (1 + tanh u) = y / (1 + e^(-2 u))
    return y / (1.0f + exponential(-1.5957691216f * (y + 0.044715f * y * y * y)));
  if (activation == kSilu) return y / (1.0f + exponential(-y));
  if (activation != kGelu) return y;
  // erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7
  const __m512 z = _mm512_abs_ps(y) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const __m512 half = 0.5f * p * t * exponential(-z * z);
  const __mmask16 negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
  return y * _mm512_mask_mov_ps(1.0f - half, negative, half);
}

// After the bias: nothing, GELU, gate and residual, or whatever there is.
enum class Ending { kPlain, kGelu, kGated, kAny };

// T: of addend, residual and output, all [M, N].
template <typename T>
struct Epilogue {
  const float* bias;  // [N]
  const T* addend;
  int64_t activation;
  const float* gate;  // [M / rows_per_gate, N]
  int64_t rows_per_gate;
  const T* residual;
  T* out;
  int64_t N;

  const float* gate_of(int64_t m) const { return gate ? gate + m / rows_per_gate * N : nullptr; }

  // What is done, so that the usual ways are compiled without asking at every vector.
  Ending ending() const {
    if (addend || activation > kGeluTanh) return Ending::kAny;
    if (activation == kGeluTanh) return gate || residual ? Ending::kAny : Ending::kGelu;
    return !gate && !residual ? Ending::kPlain : gate && residual ? Ending::kGated : Ending::kAny;
  }

  // From y to the outputs n .. n + 16 of row m, whose line of gates is `gates`.
  template <Ending ending>
  __attribute__((always_inline)) void finish(__m512 y, int64_t m, int64_t n, __mmask16 lanes, const float* gates) const {
    constexpr bool any = ending == Ending::kAny, gated = ending == Ending::kGated;
    const int64_t at = m * N + n;
    if (bias) y = y + load(bias + n, lanes);
    if constexpr (any)
      if (addend) y = y + load(addend + at, lanes);
    if constexpr (ending == Ending::kGelu) y = activated(y, kGeluTanh);
    if constexpr (any)
      if (activation != kNone) y = rounded(activated(y, activation));
    if constexpr (any || gated)
      if (gated || gates) y = rounded(y * load(gates + n, lanes));
    if constexpr (any || gated)
      if (gated || residual) y = y + load(residual + at, lanes);
    store(out + at, lanes, y);
  }
};

// Calls use(integral constant of the ending).
template <typename F>
void with_ending(Ending ending, F&& use) {
  if (ending == Ending::kPlain) return use(std::integral_constant<Ending, Ending::kPlain>{});
  if (ending == Ending::kGelu) return use(std::integral_constant<Ending, Ending::kGelu>{});
  if (ending == Ending::kGated) return use(std::integral_constant<Ending, Ending::kGated>{});
  use(std::integral_constant<Ending, Ending::kAny>{});
}

}  // namespace viditq
