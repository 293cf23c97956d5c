// Sixteen numbers at a time: loads and stores that convert, masks for the last ones of a row, memory for a thread.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace viditq {

constexpr int64_t kLanes = 16;
constexpr __mmask16 kAll = 0xffff;

// The lanes of a vector that begins `left` elements before the end of its row.
inline __mmask16 lanes_of(int64_t left) {
  return left >= kLanes ? kAll : static_cast<__mmask16>((1u << std::max<int64_t>(left, 0)) - 1u);
}

inline __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

inline __m512 load(const c10::BFloat16* from, __mmask16 lanes) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16);
}

inline __m512 load(const c10::Half* from, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
}

// Whole vectors without a mask, with which stores are slow on some CPUs.
inline void store(float* to, __mmask16 lanes, __m512 x) {
  if (lanes == kAll) return _mm512_storeu_ps(to, x);
  _mm512_mask_storeu_ps(to, lanes, x);
}

inline void store_halves(void* to, __mmask16 lanes, __m256i x) {
  if (lanes == kAll) return _mm256_storeu_si256(static_cast<__m256i*>(to), x);
  _mm256_mask_storeu_epi16(to, lanes, x);
}

// To nearest even; a NaN keeps its sign and becomes quiet.
inline void store(c10::BFloat16* to, __mmask16 lanes, __m512 x) {
  const __m512i bits = (__m512i)x, high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, quiet);
  store_halves(to, lanes, _mm512_cvtepi32_epi16(out));
}

inline void store(c10::Half* to, __mmask16 lanes, __m512 x) {
  store_halves(to, lanes, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <typename T>
void store(T* to, __m512 x, __m512 y) {
  store(to, kAll, x);
  store(to + kLanes, kAll, y);
}

#ifdef __AVX512BF16__
// The same numbers, but that those below the smallest normal one (2^-126) become 0.
inline void store(c10::BFloat16* to, __m512 x, __m512 y) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y, x));
}
#endif

// Calls use(i, lanes) for all of a row, sixteen at a time; whole vectors are compiled without masks.
template <typename F>
__attribute__((always_inline)) inline void each_vector(int64_t count, F&& use) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) use(i, kAll);
  if (i < count) use(i, lanes_of(count - i));
}

// x itself, rounded: a compiler would fuse a product with the sum that follows, and emulation rounds between the two.
inline __m512 rounded(__m512 x) {
  asm("" : "+v"(x));
  return x;
}

// Sixty-four numbers. What is done to them is done to one vector after another: a CPU looks no further ahead than two or
// three dozen instructions that wait for each other, and would finish one vector before it begins the next.
struct Four {
  __m512 part[4];
  __m512 operator[](int j) const { return part[j]; }
};

template <typename F>
__attribute__((always_inline)) inline Four each(F&& of) {
  return {{of(0), of(1), of(2), of(3)}};
}
__attribute__((always_inline)) inline Four operator+(Four a, Four b) {
  return each([&](int j) { return a[j] + b[j]; });
}
__attribute__((always_inline)) inline Four operator-(Four a, Four b) {
  return each([&](int j) { return a[j] - b[j]; });
}
__attribute__((always_inline)) inline Four operator*(Four a, Four b) {
  return each([&](int j) { return a[j] * b[j]; });
}
__attribute__((always_inline)) inline Four operator+(Four a, float b) {
  return each([&](int j) { return a[j] + b; });
}
__attribute__((always_inline)) inline Four operator-(Four a, float b) {
  return each([&](int j) { return a[j] - b; });
}
__attribute__((always_inline)) inline Four operator*(Four a, float b) {
  return each([&](int j) { return a[j] * b; });
}
__attribute__((always_inline)) inline Four rounded(Four x) {
  return each([&](int j) { return rounded(x[j]); });
}

// Memory in whole cache lines, not initialized.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) / 64 + 1) * 64)), &std::free) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T, decltype(&std::free)> data_;
};

}  // namespace viditq
