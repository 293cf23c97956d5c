// AMX tiles in plain C++, by the operation sections of Intel's manual (volume 2): what the tile instructions compute, on
// any CPU. Included before a header of kernels, it takes the place of the compiler's intrinsics. Anything that a CPU would
// refuse ends the program.
#pragma once
#include <cpuid.h>
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};

inline Tile all[8];
inline bool configured = false;

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::printf("tiles: %s\n", what);
  std::exit(1);
}

inline void loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  demand(bytes[0] == 1, "palette 1 is the only one");
  for (int i = 1; i < 64; ++i)
    demand(!(i < 16 || (i >= 32 && i < 48) || i >= 56) || bytes[i] == 0, "reserved bytes of the configuration are not 0");
  for (int t = 0; t < 8; ++t) {
    uint16_t columns;
    std::memcpy(&columns, bytes + 16 + 2 * t, 2);
    demand(columns <= 64 && bytes[48 + t] <= 16 && (columns == 0) == (bytes[48 + t] == 0), "no such tile");
    all[t] = Tile{bytes[48 + t], columns};
  }
  configured = true;
}

inline Tile& named(int t) {
  demand(configured, "used without a configuration");
  demand(t >= 0 && t < 8 && all[t].rows > 0 && all[t].bytes % 4 == 0, "no such tile");
  return all[t];
}

inline void release() {
  for (Tile& tile : all) tile = Tile{};
  configured = false;
}

inline void zero(int t) {
  std::memset(named(t).data, 0, sizeof(Tile::data));
}

inline void loadd(int t, const void* base, int64_t stride) {
  Tile& tile = named(t);
  zero(t);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.data[row], static_cast<const uint8_t*>(base) + row * stride, tile.bytes);
}

inline void stored(int t, void* base, int64_t stride) {
  const Tile& tile = named(t);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, tile.data[row], tile.bytes);
}

inline void check_product(const Tile& c, const Tile& a, const Tile& b) {
  demand(&c != &a && &c != &b && &a != &b, "a product needs three tiles");
  demand(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, "shapes of a product do not fit");
}

template <typename T>
T at(const Tile& tile, int row, int column) {
  T value;
  std::memcpy(&value, tile.data[row] + column * sizeof(T), sizeof(T));
  return value;
}

inline void dpbusd(int to, int left, int right) {
  Tile &c = named(to), &a = named(left), &b = named(right);
  check_product(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      uint32_t sum = at<uint32_t>(c, m, n);
      for (int k = 0; k < 4 * b.rows; ++k)
        sum += static_cast<uint32_t>(at<uint8_t>(a, m, k) * at<int8_t>(b, k / 4, 4 * n + k % 4));
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

inline float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void dpbf16ps(int to, int left, int right) {
  Tile &c = named(to), &a = named(left), &b = named(right);
  check_product(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      float sum[2] = {0.f, 0.f};  // of even and of odd k, which the instruction sums apart
      for (int k = 0; k < 2 * b.rows; ++k)
        sum[k % 2] = std::fma(of_bf16(at<uint16_t>(a, m, k)), of_bf16(at<uint16_t>(b, k / 2, 2 * n + k % 2)), sum[k % 2]);
      const float value = at<float>(c, m, n) + (sum[0] + sum[1]);
      std::memcpy(c.data[m] + 4 * n, &value, 4);
    }
}

}  // namespace tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles::loadconfig
#define _tile_release tiles::release
#define _tile_zero tiles::zero
#define _tile_loadd tiles::loadd
#define _tile_stored tiles::stored
#define _tile_dpbusd tiles::dpbusd
#define _tile_dpbf16ps tiles::dpbf16ps
