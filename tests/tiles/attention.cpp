// The two products of attention's amx.h on tiles in plain C++, against plain sums.
#include "tiles.h"
//
#include <random>
#include <vector>

#include "amx.h"

using viditq::Amx;

struct Numbers {
  std::vector<uint32_t> pairs;
  explicit Numbers(int64_t count, std::mt19937& random) : pairs(count) {
    std::normal_distribution<float> normal;
    for (auto& pair : pairs) pair = bits(normal(random)) | bits(normal(random)) << 16;
  }
  static uint32_t bits(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    return wide >> 16;
  }
  double times(int64_t i, const Numbers& other, int64_t j) const {
    double sum = 0;
    for (const int half : {0, 16})
      sum += double(tiles::of_bf16(pairs[i] >> half)) * tiles::of_bf16(other.pairs[j] >> half);
    return sum;
  }
};

bool near(const char* what, double found, double wanted) {
  if (std::abs(found - wanted) <= 1e-4) return true;
  std::printf("%s: %g, not %g\n", what, found, wanted);
  return false;
}

template <int N>
bool scores(std::mt19937& random) {
  constexpr int64_t lanes = N * 16;
  for (const int64_t keys : {32, 64})
    for (const int64_t pairs : {16, 48}) {
      const Numbers K(keys * pairs, random), Q(pairs * lanes, random);
      std::vector<float> S(keys * lanes, 9.f);
      Amx::scores<N>(K.pairs.data(), Q.pairs.data(), keys, pairs, S.data());
      for (int64_t i = 0; i < keys * lanes; ++i) {
        double sum = 0;
        for (int64_t p = 0; p < pairs; ++p) sum += K.times(i / lanes * pairs + p, Q, p * lanes + i % lanes);
        if (!near("score", S[i], sum)) return false;
      }
    }
  return true;
}

template <int N>
bool values(std::mt19937& random) {
  constexpr int64_t lanes = N * 16, row = viditq::kKeyBlock / 2;
  for (const int64_t D : {16, 32, 80})
    for (const int64_t key_pairs : {16, 32})
      for (const bool scaled : {false, true}) {
        const Numbers V(D * row, random), P(key_pairs * lanes, random);
        alignas(64) float alpha[lanes];
        for (int64_t lane = 0; lane < lanes; ++lane) alpha[lane] = scaled ? 0.5f + lane : 1.f;
        auto* O = static_cast<float*>(std::aligned_alloc(64, D * lanes * sizeof(float)));
        for (int64_t i = 0; i < D * lanes; ++i) O[i] = i % 7;
        Amx::values<N>(V.pairs.data(), P.pairs.data(), key_pairs, D, alpha, O);
        for (int64_t i = 0; i < D * lanes; ++i) {
          double sum = double(alpha[i % lanes]) * (i % 7);
          for (int64_t p = 0; p < key_pairs; ++p) sum += V.times(i / lanes * row + p, P, p * lanes + i % lanes);
          if (!near("sum of values", O[i], sum)) return false;
        }
        std::free(O);
      }
  return true;
}

int main() {
  std::mt19937 random(0);
  Amx::enter();
  const bool right = scores<1>(random) && scores<2>(random) && values<1>(random) && values<2>(random);
  Amx::leave();
  if (right) std::puts("right");
  return !right;
}
