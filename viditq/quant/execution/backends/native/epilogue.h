// What happens to outputs after the product: bias, activation function, gate, residual, storing, in float32.
#pragma once

#include <type_traits>

#include "vectors.h"

namespace viditq {

enum Activation : int64_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kSilu = 3 };

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

// y / (1 + 2^z) to some units in the last place, or to 2^-14 where `coarse`, as for outputs of 8 bits. Division would
// occupy a CPU for as long as all the rest of an output: the reciprocal is an estimate, and a step of Newton's.
template <bool coarse>
__attribute__((always_inline)) inline Four gated(Four y, Four z) {
  constexpr int kSmallerOfMagnitudes = 2;  // with the sign of z: below 2^-126 a CPU computes a hundred times as long
  z = each([&](int j) { return _mm512_range_ps(z[j], _mm512_set1_ps(100.0f), kSmallerOfMagnitudes); });
  const Four r = each([&](int j) { return _mm512_reduce_ps(z[j], _MM_FROUND_TO_NEAREST_INT); }), n = z - r;
  Four p = r * 1.53533619e-4f + 1.33988744e-3f;  // 2^r on [-1/2, 1/2] to 2^-26
  p = p * r + 9.61843684e-3f;
  p = p * r + 5.55033022e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147203e-1f;
  p = p * r + 1.0f;
  const Four d = each([&](int j) { return _mm512_scalef_ps(p[j], n[j]); }) + 1.0f;
  const Four estimate = each([&](int j) { return _mm512_rcp14_ps(d[j]); });
  if (coarse) return y * estimate;
  return y * (estimate - estimate * (d * estimate - 1.0f));
}

// y Phi(y), erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline __m512 gelu(__m512 y) {
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

template <bool coarse>
__attribute__((always_inline)) inline Four activated(Four y, int64_t activation) {
  constexpr float kLog2E = 1.44269504f;
  if (activation == kGeluTanh)  // 0.5 y (1 + tanh u) = y / (1 + e^(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3)
    return gated<coarse>(y, y * (y * y * (-1.5957691216f * 0.044715f * kLog2E) + -1.5957691216f * kLog2E));
  if (activation == kSilu) return gated<coarse>(y, y * -kLog2E);
  if (activation == kGelu) return each([&](int j) { return gelu(y[j]); });
  return y;
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

  static constexpr bool kCoarse = std::is_same_v<T, c10::BFloat16>;

  const float* gate_of(int64_t m) const { return gate ? gate + m / rows_per_gate * N : nullptr; }

  // Asks for the memory of 64 outputs of a row, and of what is added to them.
  void fetch(int64_t m, int64_t n) const {
    for (int64_t i = 0; i < 64; i += 64 / sizeof(T)) {
      __builtin_prefetch(out + m * N + n + i, 1);
      if (residual) __builtin_prefetch(residual + m * N + n + i);
    }
  }

  // What is done, so that the usual ways are compiled without asking at every vector.
  Ending ending() const {
    if (addend || activation > kGeluTanh) return Ending::kAny;
    if (activation == kGeluTanh) return gate || residual ? Ending::kAny : Ending::kGelu;
    return !gate && !residual ? Ending::kPlain : gate && residual ? Ending::kGated : Ending::kAny;
  }

  // The outputs n .. n + 64 of row m, whose line of gates is `gates`, from sums y. whole: all are there.
  template <Ending ending, bool whole>
  __attribute__((always_inline)) void finish(Four y, int64_t m, int64_t n, const float* gates) const {
    constexpr bool any = ending == Ending::kAny, gated = ending == Ending::kGated;
    const int64_t at = m * N + n;
    const auto lanes = [&](int j) __attribute__((always_inline)) { return whole ? kAll : lanes_of(N - n - kLanes * j); };
    const auto of = [&](const auto* from) __attribute__((always_inline)) {
      return each([&](int j) __attribute__((always_inline)) { return load(from + kLanes * j, lanes(j)); });
    };
    if (bias) y = y + of(bias + n);
    if constexpr (any)
      if (addend) y = y + of(addend + at);
    if constexpr (ending == Ending::kGelu) y = activated<kCoarse>(y, kGeluTanh);
    if constexpr (any)
      if (activation != kNone) y = rounded(activated<kCoarse>(y, activation));
    if constexpr (any || gated)
      if (gated || gates) y = rounded(y * of(gates + n));
    if constexpr (any || gated)
      if (gated || residual) y = y + of(residual + at);
    for (int j = 0; j < 4; j += 2) {
      T* to = out + at + kLanes * j;
      if (whole) {
        store(to, y[j], y[j + 1]);
        continue;
      }
      if (lanes(j)) store(to, lanes(j), y[j]);
      if (lanes(j + 1)) store(to + kLanes, lanes(j + 1), y[j + 1]);
    }
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
