// The same two products on AMX tiles: 32 keys (or channels) x 32 queries of accumulators, 16 pairs a step.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pack.h"

namespace viditq {

struct Amx {
  static constexpr int kVectors = 2;
  static constexpr int64_t kKeys = 32, kPairs = 16, kD = 16;

  // Whether the processor has bf16 tiles and Linux lets this process use them.
  static bool available() {
    static const bool usable = [] {
      unsigned a = 0, b = 0, c = 0, d = 0;
      constexpr unsigned bf16_and_tiles = 1u << 22 | 1u << 24;
      constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
      return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16_and_tiles) == bf16_and_tiles &&
             syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return usable;
  }

  static void enter() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }

  static void leave() { _tile_release(); }

  template <int N>
  static void scores(const uint32_t* K, const uint32_t* Q, int64_t keys, int64_t pairs, float* S) {
    constexpr int64_t lanes = N * kLanes;
    fence();
    for (int64_t key = 0; key < keys; key += 32) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      accumulate<N, 2>(K + key * pairs, pairs, Q, pairs);
      store<N, 2>(S + key * lanes);
    }
    fence();
  }

  template <int N>
  static void values(const uint32_t* V, const uint32_t* P, int64_t key_pairs, int64_t D, const float* alpha, float* O) {
    constexpr int64_t lanes = N * kLanes;
    for (int v = 0; v < N; ++v) {
      const __m512 factor = _mm512_load_ps(alpha + v * kLanes);
      if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.f), _CMP_NEQ_UQ) == 0) continue;  // the maxima are the old ones
      for (int64_t d = 0; d < D; ++d) {
        float* row = O + d * lanes + v * kLanes;
        _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), factor));
      }
    }
    fence();
    for (int64_t d = 0; d < D; d += 32) {
      D - d > 16 ? add<N, 2>(V, P, key_pairs, d, O) : add<N, 1>(V, P, key_pairs, d, O);
    }
    fence();
  }

 private:
  // GCC's tile loads and stores do not say that they touch memory.
  static void fence() { asm volatile("" ::: "memory"); }

  template <int N, int R>
  static void add(const uint32_t* V, const uint32_t* P, int64_t key_pairs, int64_t d, float* O) {
    constexpr int64_t lanes = N * kLanes;
    float* rows = O + d * lanes;
    _tile_loadd(0, rows, lanes * 4);
    if constexpr (N == 2) _tile_loadd(1, rows + 16, lanes * 4);
    if constexpr (R == 2) _tile_loadd(2, rows + 16 * lanes, lanes * 4);
    if constexpr (N == 2 && R == 2) _tile_loadd(3, rows + 16 * lanes + 16, lanes * 4);
    accumulate<N, R>(V + d * (kKeyBlock / 2), kKeyBlock / 2, P, key_pairs);
    store<N, R>(rows);
  }

  // Tiles 0 to 3 += A [R x 16 rows, count pairs] B [count pairs, N x 16 lanes]
  template <int N, int R>
  static void accumulate(const uint32_t* A, int64_t stride, const uint32_t* B, int64_t count) {
    constexpr int64_t lanes = N * kLanes;
    for (int64_t p = 0; p < count; p += 16) {
      _tile_loadd(4, A + p, stride * 4);
      _tile_loadd(6, B + p * lanes, lanes * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, B + p * lanes + 16, lanes * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (R == 2) {
        _tile_loadd(5, A + 16 * stride + p, stride * 4);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (N == 2 && R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }

  template <int N, int R>
  static void store(float* C) {
    constexpr int64_t lanes = N * kLanes;
    _tile_stored(0, C, lanes * 4);
    if constexpr (N == 2) _tile_stored(1, C + 16, lanes * 4);
    if constexpr (R == 2) _tile_stored(2, C + 16 * lanes, lanes * 4);
    if constexpr (N == 2 && R == 2) _tile_stored(3, C + 16 * lanes + 16, lanes * 4);
  }
};

}  // namespace viditq
