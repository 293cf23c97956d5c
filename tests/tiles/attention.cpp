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

template <int Steps>
bool scores(std::mt19937& random) {
  constexpr int64_t pairs = Steps * 16;
  for (const int64_t keys : {16, 48, 64}) {
    const Numbers K(keys * pairs, random), Q(pairs * 16, random);
    std::vector<float> S(keys * 16, 9.f);
    int64_t calls = 0;
    Amx::scores<Steps>(K.pairs.data(), Q.pairs.data(), keys, S.data(), [&] { ++calls; });
    if (!near("calls between", calls, keys / 16 * Steps)) return false;
    for (int64_t i = 0; i < keys * 16; ++i) {
      double sum = 0;
      for (int64_t p = 0; p < pairs; ++p) sum += K.times(i / 16 * pairs + p, Q, p * 16 + i % 16);
      if (!near("score", S[i], sum)) return false;
    }
  }
  return true;
}

bool values(std::mt19937& random) {
  constexpr int64_t row = viditq::kKeyBlock / 2;
  for (const int64_t D : {16, 40, 64, 72})
    for (const int64_t key_pairs : {16, 32})
      for (const bool fresh : {false, true}) {
        const Numbers V((D + 1) * row, random), P(key_pairs * 16, random);
        std::vector<float> O((D + 1) * 16);
        for (size_t i = 0; i < O.size(); ++i) O[i] = i % 7;
        Amx::leave();
        Amx::enter(D);
        Amx::values(V.pairs.data(), P.pairs.data(), key_pairs, D, fresh, O.data(), [] {});
        for (size_t i = 0; i < O.size(); ++i) {
          double sum = fresh ? 0 : i % 7;
          for (int64_t p = 0; p < key_pairs; ++p) sum += V.times(i / 16 * row + p, P, p * 16 + i % 16);
          if (!near("sum of values", O[i], sum)) return false;
        }
      }
  return true;
}

int main() {
  std::mt19937 random(0);
  Amx::enter(64);
  const bool right = scores<1>(random) && scores<2>(random) && scores<3>(random) && scores<4>(random) && values(random);
  Amx::leave();
  if (right) std::puts("right");
  return !right;
}
