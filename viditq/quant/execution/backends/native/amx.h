// The product of `linear.cpp` with AMX tiles, from the same layouts. Used where the CPU has AMX, the kernel grants it and
// a trial product is right; elsewhere, and for segments that are no multiple of 64, VNNI multiplies.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxint8intrin.h>)
#define VIDITQ_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace viditq::amx {

constexpr int64_t kDepth = 64;  // bytes of a tile's row: the k of one instruction
constexpr int64_t kBlock = 32;  // rows that are computed at once: a and c need that many, whatever is in the last ones

// Work that does not depend on a product: `count` pieces, of which run(what, begin, end) does some.
struct Beside {
  void (*run)(const void* what, int64_t begin, int64_t end) = nullptr;
  const void* what = nullptr;
  int64_t count = 0;

  void finish() {
    if (count) run(what, 0, count);
    count = 0;
  }
};

#ifdef VIDITQ_AMX

inline bool granted() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Of the calling thread: eight tiles of 16 rows of 64 bytes. `release` gives them back.
__attribute__((target("amx-tile"))) inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" ::: "memory");  // gcc's intrinsic does not say that it reads the struct
  _tile_loadconfig(&config);
}

__attribute__((target("amx-tile"))) inline void release() { _tile_release(); }

// c[i, n] = sum_k a[i, k] b[k, n] for `rows` rows, rounded up to 32, and the 64 outputs of a panel; k % 64 == 0.
// a [rows, k]; b [k / 4, 64, 4]: 16 columns of 16 quadruples of k are a tile with rows 256 bytes apart.
// A tile's product takes 16 cycles in which the rest of the core is idle: it does `beside`, some of it at each step.
__attribute__((target("amx-tile,amx-int8"))) inline void product(int64_t rows, int64_t k, int64_t ldc,
                                                                 const uint8_t* a, const int8_t* b, int32_t* c,
                                                                 const Beside& beside) {
  const int64_t steps = (rows + kBlock - 1) / kBlock * 2 * (k / kDepth), share = (beside.count + steps - 1) / steps;
  int64_t done = 0;
  asm volatile("" ::: "memory");  // nor do the loads say that they read: what was stored before must be in memory
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t n = 0; n < 64; n += 32) {
      const uint8_t* upper = a + i * k;
      const uint8_t* lower = upper + 16 * k;
      const int8_t* left = b + n * 4;
      int32_t* to = c + i * ldc + n;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t depth = 0; depth < k; depth += kDepth, left += kDepth * 64) {
        _tile_loadd(4, upper + depth, k);
        _tile_loadd(6, left, 256);
        _tile_loadd(7, left + 64, 256);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(5, lower + depth, k);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        if (done == beside.count) continue;
        const int64_t end = std::min(done + share, beside.count);
        beside.run(beside.what, done, end);
        done = end;
      }
      _tile_stored(0, to, ldc * 4);
      _tile_stored(1, to + 16, ldc * 4);
      _tile_stored(2, to + 16 * ldc, ldc * 4);
      _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
    }
  asm volatile("" ::: "memory");
}

#else

inline bool granted() { return false; }
inline void configure() {}
inline void release() {}
inline void product(int64_t, int64_t, int64_t, const uint8_t*, const int8_t*, int32_t*, const Beside&) {}

#endif

}  // namespace viditq::amx
