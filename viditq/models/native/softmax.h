// A block of scores becomes probabilities against the running maximum (flash attention); lanes are queries.
#pragma once
#include <immintrin.h>

#include <limits>

#include "pack.h"

namespace viditq {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x, relative error below 3e-6 (minimax polynomial of 2^fraction); 0 at -inf, NaN at NaN.
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 y = _mm512_set1_ps(1.35341679e-2f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.20114606e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.41442757e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93003834e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000259f));
  return _mm512_scalef_ps(y, x);
}

// 2^x and half a unit of the last place of its bf16, which cut off after that is rounded to the nearest; 2^0 becomes 1.
inline __m512 exp2_to_cut(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 y = _mm512_set1_ps(7.80230090e-2f);  // relative error below 8e-5, of bf16 2e-3
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.26069391e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.95832849e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.99925256e-1f + 1.f / 256));
  return _mm512_scalef_ps(y, x);
}

// Two rows of probabilities as pairs of bf16.
inline __m512i cut_pair(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
}

// Additive mask in units of log2, [keys, lanes] by strides; a stride of 0 stands for a broadcast axis.
struct Mask {
  const float* data = nullptr;
  int64_t key_stride = 0, query_stride = 0;
};

struct Softmax {
  float *maxima, *totals, *alpha;  // [lanes]
};

// What a mask adds to the scores of one key and a vector of queries.
inline __m512 added(const Mask& mask, int64_t key, int64_t query, int64_t queries) {
  const float* row = mask.data + key * mask.key_stride;
  if (mask.query_stride == 0) return _mm512_set1_ps(*row);
  return _mm512_maskz_loadu_ps(first(queries - query), row + query);
}

// S = scale S + mask
template <int N>
void add_mask(const Mask& mask, int64_t query, int64_t queries, int64_t key, int64_t keys, float scale, float* S) {
  const __m512 c = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < keys; ++k) {
    for (int v = 0; v < N; ++v) {
      const bool none = mask.data == nullptr;
      const __m512 more = none ? _mm512_setzero_ps() : added(mask, key + k, query + v * kLanes, queries);
      float* s = S + (k * N + v) * kLanes;
      _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_load_ps(s), c, more));
    }
  }
}

// Scores [keys, lanes] -> probabilities [key pairs, lanes] against the running maximum; alpha rescales earlier sums.
template <int N>
void softmax_block(const float* S, int64_t keys, int64_t padded, float scale, const Softmax& state, uint32_t* P) {
  const __m512 c = _mm512_set1_ps(scale);
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  for (int v = 0; v < N; ++v) {
    const float* column = S + v * kLanes;
    __m512 top = _mm512_set1_ps(-kInfinity);
    for (int64_t k = 0; k < keys; ++k) top = _mm512_max_ps(top, _mm512_load_ps(column + k * N * kLanes));
    const __m512 before = _mm512_load_ps(state.maxima + v * kLanes);
    const __m512 maximum = _mm512_max_ps(before, _mm512_mul_ps(top, c));
    _mm512_store_ps(state.maxima + v * kLanes, maximum);
    // nothing seen but masked keys: subtract 0, as -inf - -inf would be NaN
    const __mmask16 none = _mm512_cmp_ps_mask(maximum, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    const __m512 shift = _mm512_mask_mov_ps(maximum, none, _mm512_setzero_ps());
    const __m512 alpha = exp2(_mm512_sub_ps(before, shift));
    __m512 total = _mm512_mul_ps(_mm512_load_ps(state.totals + v * kLanes), alpha);
    uint32_t* p = P + v * kLanes;
    for (int64_t k = 0; k < padded; k += 2, p += N * kLanes) {
      const auto probability = [&](int64_t key) {
        if (key >= keys) return _mm512_setzero_ps();
        return exp2_to_cut(_mm512_fmsub_ps(_mm512_load_ps(column + key * N * kLanes), c, shift));
      };
      const __m512i pair = cut_pair(probability(k), probability(k + 1));
      total = _mm512_dpbf16_ps(total, (__m512bh)pair, ones);  // of the rounded ones, as the values' product sums them
      _mm512_store_si512(p, pair);
    }
    _mm512_store_ps(state.alpha + v * kLanes, alpha);
    _mm512_store_ps(state.totals + v * kLanes, total);
  }
}

}  // namespace viditq
