// The product of codes, by AMX tiles or AVX512-VNNI, and the trial that decides.
#pragma once

#include <immintrin.h>

#include <vector>

#include "amx.h"

namespace viditq {

constexpr int64_t kPanel = 64;

namespace vnni {

constexpr int64_t kTile = 6;    // rows: 24 sums, 4 vectors of weights and one of codes are 29 of 32 registers
constexpr int64_t kBlock = 24;  // rows whose sums stay in the first-level cache

// c [R, 64] = a [R, k] x b [k / 4, 64, 4]
template <int R>
void tile(int64_t k, const uint8_t* a, const int8_t* b, int32_t* c) {
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_si512();
  for (int64_t depth = 0; depth < k; depth += 4, b += 4 * kPanel) {
    __m512i weight[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) weight[j] = _mm512_loadu_si512(b + 64 * j);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      int32_t quadruple;
      __builtin_memcpy(&quadruple, a + i * k + depth, 4);
      const __m512i codes = _mm512_set1_epi32(quadruple);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], codes, weight[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(c + i * kPanel + 16 * j, sum[i][j]);
}

inline void product(int64_t rows, int64_t k, const uint8_t* a, const int8_t* b, int32_t* c) {
  for (; rows >= kTile; rows -= kTile, a += kTile * k, c += kTile * kPanel) tile<kTile>(k, a, b, c);
  if (rows == 1) tile<1>(k, a, b, c);
  if (rows == 2) tile<2>(k, a, b, c);
  if (rows == 3) tile<3>(k, a, b, c);
  if (rows == 4) tile<4>(k, a, b, c);
  if (rows == 5) tile<5>(k, a, b, c);
}

}  // namespace vnni

// u8 [rows, k] x a panel s8 [k / 4, 64, 4] -> int32 [rows, 64]; one object per thread and call of the operator.
class Product {
 public:
  static constexpr int64_t kMost = 32;  // rows of `c`; both `block`s divide multiply.h's

  static bool tiled(int64_t k, bool amx) { return amx && k % amx::kDepth == 0; }
  // Rows whose products with all panels of a chunk are computed one after another. With tiles their outputs lie in no
  // more pages than the first TLB of an Intel has room for: of 96 rows writing takes six times as long.
  static int64_t rows(int64_t k, bool amx) { return tiled(k, amx) ? amx::kBlock : 4 * vnni::kBlock; }

  // Of weights that stay in the second-level cache: 2 MB where there are tiles, as little as 1 elsewhere.
  static int64_t chunk_bytes(int64_t k, bool amx) { return (tiled(k, amx) ? 1280 : 512) * 1024; }

  Product(int64_t k, bool amx) : k_(k), amx_(tiled(k, amx)) {
    if (amx_) amx::configure();
  }
  ~Product() {
    if (amx_) amx::release();
  }
  // Rows of one call, at most.
  int64_t block() const { return amx_ ? amx::kBlock : vnni::kBlock; }
  // Whether other work is hidden behind a product.
  bool overlaps() const { return amx_; }
  void operator()(int64_t rows, const uint8_t* a, const int8_t* b, int32_t* c, amx::Beside beside = {}) const {
    if (amx_) return amx::product(rows, k_, kPanel, a, b, c, beside);
    vnni::product(rows, k_, a, b, c);
    beside.finish();
  }

 private:
  int64_t k_;
  bool amx_;
};

// Whether a product of extreme codes is exact.
inline bool is_exact(bool amx) {
  constexpr int64_t rows = 23, k = 1152, padded = Product::kMost;
  std::vector<uint8_t> a(padded * k);
  std::vector<int8_t> b(k * kPanel);
  std::vector<int32_t> c(padded * kPanel);
  for (int64_t i = 0; i < rows * k; ++i) a[i] = i % 5 ? 255 : i % 251;
  for (int64_t i = 0; i < k * kPanel; ++i) b[i] = i % 7 ? (i / 256 % 2 ? 127 : -128) : i % 127;
  Product(k, amx)(rows, a.data(), b.data(), c.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += a[i * k + j] * b[j / 4 * 256 + n * 4 + j % 4];
      if (sum != c[i * kPanel + n]) return false;
    }
  return true;
}

}  // namespace viditq
