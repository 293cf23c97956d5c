// Inputs as the products want them: bf16 in dwords of two, rows of lanes. Needs AVX512 (F, BW, DQ, VL) and AVX512-BF16.
// Words: a lane is a query, a pair two neighbours of the axis that a product sums over (head channels, or keys).
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace viditq {

constexpr int64_t kLanes = 16;     // queries of a vector
constexpr int64_t kKeyBlock = 64;  // keys of one round of the softmax: their scores stay in L1

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t clamp_lanes(int64_t left) { return std::clamp<int64_t>(left, 0, kLanes); }
inline __mmask16 first(int64_t lanes) { return static_cast<__mmask16>((1u << clamp_lanes(lanes)) - 1u); }

// Up to 16 pairs of a row, in bf16; what lies past `pairs` is zero.
inline __m512i load_pairs(const c10::BFloat16* row, int64_t pairs) {
  return _mm512_maskz_loadu_epi32(first(pairs), row);
}

inline __m512i load_pairs(const float* row, int64_t pairs) {
  const __m512 low = _mm512_maskz_loadu_ps(first(2 * pairs), row);
  const __m512 high = _mm512_maskz_loadu_ps(first(2 * pairs - kLanes), row + kLanes);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline __m512i load_pairs(const c10::Half* row, int64_t pairs) {
  const __m512i halves = _mm512_maskz_loadu_epi32(first(pairs), row);
  const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline void store_row(c10::BFloat16* row, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(row, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store_row(float* row, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(row, mask, x); }

inline void store_row(c10::Half* row, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(row, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// 16 x 16 dwords, in place.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Queries [rows, D] -> [pairs, lanes]; pairs past D / 2 and lanes past `rows` are zero.
template <typename T>
void pack_queries(const T* source, int64_t stride, int64_t rows, int64_t D, int64_t lanes, int64_t pairs,
                  uint32_t* out) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t pair = 0; pair < pairs; pair += kLanes) {
      __m512i r[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool there = lane + i < rows;
        r[i] = load_pairs(source + (there ? lane + i : 0) * stride + 2 * pair, there ? D / 2 - pair : 0);
      }
      transpose(r);
      const int64_t count = std::min(kLanes, pairs - pair);
      for (int64_t i = 0; i < count; ++i) _mm512_store_si512(out + (pair + i) * lanes + lane, r[i]);
    }
  }
}

// Keys [rows, D] -> [padded rows, pairs]; what is past them is zero.
template <typename T>
void pack_keys(const T* source, int64_t stride, int64_t rows, int64_t padded, int64_t D, int64_t pairs,
               uint32_t* out) {
  for (int64_t row = 0; row < padded; ++row) {
    for (int64_t pair = 0; pair < pairs; pair += kLanes) {
      const bool there = row < rows;
      const __m512i r = load_pairs(source + (there ? row : 0) * stride + 2 * pair, there ? D / 2 - pair : 0);
      _mm512_mask_storeu_epi32(out + row * pairs + pair, first(pairs - pair), r);
    }
  }
}

// Values [rows, D] -> blocks of keys, each [height >= D, kKeyBlock / 2 pairs of keys]; rows past D are left alone.
template <typename T>
void pack_values(const T* source, int64_t stride, int64_t rows, int64_t D, int64_t height, uint32_t* out) {
  alignas(64) int16_t index[2][32];
  for (int i = 0; i < 32; ++i) {
    for (int half = 0; half < 2; ++half) index[half][i] = static_cast<int16_t>(16 * half + i / 2 + 32 * (i % 2));
  }
  const __m512i low = _mm512_load_si512(index[0]), high = _mm512_load_si512(index[1]);
  constexpr int64_t half_block = kKeyBlock / 2;
  for (int64_t key = 0; key < rows; key += 32) {
    uint32_t* block = out + key / kKeyBlock * height * half_block + key % kKeyBlock / 2;
    for (int64_t d = 0; d < D; d += 32) {
      __m512i r[2][16];
      for (int64_t i = 0; i < kLanes; ++i) {
        __m512i pair[2];
        for (int64_t j = 0; j < 2; ++j) {
          const int64_t row = key + 2 * i + j;
          pair[j] = load_pairs(source + (row < rows ? row : 0) * stride + d, row < rows ? (D - d) / 2 : 0);
        }
        r[0][i] = _mm512_permutex2var_epi16(pair[0], low, pair[1]);
        r[1][i] = _mm512_permutex2var_epi16(pair[0], high, pair[1]);
      }
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t count = clamp_lanes(D - d - kLanes * half);
        if (count > 0) transpose(r[half]);
        for (int64_t i = 0; i < count; ++i) {
          _mm512_store_si512(block + (d + kLanes * half + i) * half_block, r[half][i]);
        }
      }
    }
  }
}

// Sums [D, lanes] / totals [lanes] -> rows [rows, D]; a lane whose total is zero may look at no key: zero, as torch's.
template <typename T>
void store_output(const float* sums, const float* totals, int64_t lanes, int64_t rows, int64_t D, int64_t stride,
                  T* out) {
  for (int64_t lane = 0; lane < rows; lane += kLanes) {
    const __m512 total = _mm512_load_ps(totals + lane);
    const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.f), total);
    for (int64_t d = 0; d < D; d += kLanes) {
      __m512i r[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool there = d + i < D;
        const __m512 x = _mm512_load_ps(sums + (there ? d + i : 0) * lanes + lane);
        r[i] = (__m512i)_mm512_mul_ps(x, inverse);
      }
      transpose(r);
      const int64_t count = std::min(kLanes, rows - lane);
      for (int64_t i = 0; i < count; ++i) store_row(out + (lane + i) * stride + d, (__m512)r[i], first(D - d));
    }
  }
}

}  // namespace viditq
