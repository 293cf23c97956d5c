// The product of codes, by AMX tiles or by torch's brgemm, and the trial that decides.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <exception>
#include <vector>

#include "amx.h"

namespace viditq {

constexpr int64_t kPanel = 64;

// u8 [rows, k] x a panel s8 [k / 4, 64, 4] -> int32 [rows, ldc]; one object per thread and call of the operator.
class Product {
 public:
  Product(int64_t k, bool amx) : k_(k), amx_(amx && k % amx::kDepth == 0) {
    if (amx_) amx::configure();
  }
  ~Product() {
    if (amx_)
      amx::release();
    else
      at::native::cpublas::brgemm_release(true);
  }
  void operator()(int64_t rows, int64_t ldc, const uint8_t* a, const int8_t* b, int32_t* c) const {
    if (amx_) return amx::product(rows, k_, ldc, a, b, c);
    at::native::cpublas::brgemm(rows, kPanel, k_, k_, kPanel, ldc, false, a, reinterpret_cast<const signed char*>(b),
                                c);
  }

 private:
  int64_t k_;
  bool amx_;
};

// Whether a product of extreme codes is exact: brgemm refuses some machines, and where it lacks VNNI pairs saturate.
inline bool is_exact(bool amx) {
  constexpr int64_t rows = 37, k = 1152, padded = 64;
  std::vector<uint8_t> a(padded * k);
  std::vector<int8_t> b(k * kPanel);
  std::vector<int32_t> c(padded * kPanel);
  for (int64_t i = 0; i < rows * k; ++i) a[i] = i % 5 ? 255 : i % 251;
  for (int64_t i = 0; i < k * kPanel; ++i) b[i] = i % 7 ? (i / 256 % 2 ? 127 : -128) : i % 127;
  try {
    Product(k, amx)(rows, kPanel, a.data(), b.data(), c.data());
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += a[i * k + j] * b[j / 4 * 256 + n * 4 + j % 4];
      if (sum != c[i * kPanel + n]) return false;
    }
  return true;
}


}  // namespace viditq
