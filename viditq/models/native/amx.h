// The two products of attention on AMX tiles, 16 queries at a time, with a callback between tile instructions, which
// leave most of the processor idle. In dwords of two bf16: Q [pairs, 16], K [keys, pairs], P [key pairs, 16],
// V [D + 1, kKeyBlock / 2]. S, O: float. One chain of products at a time, stored as soon as it is done: with four chains
// side by side, which would hide the latency of a product, the stores wait for each other.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pack.h"

namespace viditq {

struct Amx {
  static constexpr int64_t kKeys = 32;       // what they are padded to
  static constexpr int64_t kChannels = 128;  // of a head, at most: the tiles of a query's four parts

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

  // D: channels of a head. Tiles 6 and 7 hold the rows of O and V past the last whole tile: of channels and of totals.
  static void enter(int64_t D) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } config;
    config.rows[6] = config.rows[7] = static_cast<uint8_t>(D % 16 + 1);
    _tile_loadconfig(&config);
  }

  static void leave() { _tile_release(); }

  // GCC's tile loads and stores do not say that they touch memory.
  static void fence() { asm volatile("" ::: "memory"); }

  // S [keys, 16] = K [keys, Steps x 16 pairs] Q [Steps x 16 pairs, 16]; `between` is called after each product.
  template <int Steps, typename Between>
  static inline __attribute__((always_inline)) void scores(const uint32_t* K, const uint32_t* Q, int64_t keys, float* S,
                                                           Between&& between) {
    _tile_loadd(4, Q, 64);
    if constexpr (Steps > 1) _tile_loadd(5, Q + 256, 64);
    if constexpr (Steps > 2) _tile_loadd(1, Q + 512, 64);
    if constexpr (Steps > 3) _tile_loadd(3, Q + 768, 64);
    for (int64_t key = 0; key < keys; key += 16, K += 256 * Steps, S += 256) {
      _tile_zero(0);
      _tile_loadd(2, K, 64 * Steps);
      _tile_dpbf16ps(0, 2, 4);
      between();
      if constexpr (Steps > 1) {
        _tile_loadd(2, K + 16, 64 * Steps);
        _tile_dpbf16ps(0, 2, 5);
        between();
      }
      if constexpr (Steps > 2) {
        _tile_loadd(2, K + 32, 64 * Steps);
        _tile_dpbf16ps(0, 2, 1);
        between();
      }
      if constexpr (Steps > 3) {
        _tile_loadd(2, K + 48, 64 * Steps);
        _tile_dpbf16ps(0, 2, 3);
        between();
      }
      _tile_stored(0, S, 64);
    }
  }

  // O [D + 1, 16] += V [D + 1, key_pairs] P [key_pairs, 16], or = where `fresh`; the last row of V is ones and sums P.
  // key_pairs: 16 or 32. `between` is called after most products.
  template <typename Between>
  static inline __attribute__((always_inline)) void values(const uint32_t* V, const uint32_t* P, int64_t key_pairs,
                                                           int64_t D, bool fresh, float* O, Between&& between) {
    constexpr int64_t stride = kKeyBlock / 2;
    const bool both = key_pairs > 16;
    _tile_loadd(4, P, 64);
    if (both) _tile_loadd(5, P + 256, 64);
    for (; D >= 16; D -= 16, V += 16 * stride, O += 256) {
      if (fresh) {
        _tile_zero(0);
      } else {
        _tile_loadd(0, O, 64);
      }
      _tile_loadd(2, V, 4 * stride);
      _tile_dpbf16ps(0, 2, 4);
      between();
      if (both) {
        _tile_loadd(3, V + 16, 4 * stride);
        _tile_dpbf16ps(0, 3, 5);
        between();
      }
      _tile_stored(0, O, 64);
    }
    if (fresh) {
      _tile_zero(6);
    } else {
      _tile_loadd(6, O, 64);
    }
    _tile_loadd(7, V, 4 * stride);
    _tile_dpbf16ps(6, 7, 4);
    between();
    if (both) {
      _tile_loadd(7, V + 16, 4 * stride);
      _tile_dpbf16ps(6, 7, 5);
      between();
    }
    _tile_stored(6, O, 64);
  }
};

}  // namespace viditq
