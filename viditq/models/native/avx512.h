// The two products of attention by AVX512-BF16: scores S = K Q and sums O = alpha O + V P; lanes are queries.
// In dwords of two bf16: Q [pairs, lanes], K [keys, pairs], P [key pairs, lanes], V [D, kKeyBlock / 2]. S, O: float.
#pragma once
#include <immintrin.h>

#include "pack.h"

namespace viditq {

struct Avx512 {
  static constexpr int kVectors = 3;  // 24 sums, 3 operands and a broadcast: 28 of 32 registers
  static constexpr int64_t kKeys = 8;  // what they are padded to

  template <int N>
  static void scores(const uint32_t* K, const uint32_t* Q, int64_t keys, int64_t pairs, float* S) {
    for (int64_t key = 0; key < keys; key += 8) {
      __m512 sum[8][N];
      for (auto& row : sum) std::fill_n(row, N, _mm512_setzero_ps());
      accumulate<N>(sum, K + key * pairs, pairs, Q, pairs);
      for (int i = 0; i < 8; ++i) {
        for (int v = 0; v < N; ++v) _mm512_store_ps(S + ((key + i) * N + v) * kLanes, sum[i][v]);
      }
    }
  }

  template <int N>
  static void values(const uint32_t* V, const uint32_t* P, int64_t key_pairs, int64_t D, const float* alpha, float* O) {
    for (int64_t d = 0; d < D; d += 8) {
      __m512 sum[8][N];
      float* rows = O + d * N * kLanes;
      for (int i = 0; i < 8; ++i) {
        for (int v = 0; v < N; ++v) {
          const __m512 old = _mm512_load_ps(rows + (i * N + v) * kLanes);
          sum[i][v] = _mm512_mul_ps(old, _mm512_load_ps(alpha + v * kLanes));
        }
      }
      accumulate<N>(sum, V + d * (kKeyBlock / 2), kKeyBlock / 2, P, key_pairs);
      for (int i = 0; i < 8; ++i) {
        for (int v = 0; v < N; ++v) _mm512_store_ps(rows + (i * N + v) * kLanes, sum[i][v]);
      }
    }
  }

 private:
  // sum [8, N vectors] += A [8 rows, count pairs] B [count pairs, N vectors]
  template <int N>
  static inline __attribute__((always_inline)) void accumulate(
      __m512 (&sum)[8][N], const uint32_t* A, int64_t stride, const uint32_t* B, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      __m512bh b[N];
      for (int v = 0; v < N; ++v) b[v] = (__m512bh)_mm512_load_si512(B + (p * N + v) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(A[i * stride + p]));
        for (int v = 0; v < N; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], a, b[v]);
      }
    }
  }
};

}  // namespace viditq
