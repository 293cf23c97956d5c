// The product of the linears' amx.h on tiles in plain C++, against a plain sum.
#include "tiles.h"
//
#include <random>
#include <vector>

#include "amx.h"

int main() {
  std::mt19937 random(0);
  for (const int64_t rows : {1, 23, 32, 33, 70})
    for (const int64_t k : {64, 192, 1152})
      for (const int64_t ldc : {64, 80})
        for (const bool extreme : {false, true}) {
          const int64_t beside = random() % 70;  // pieces of other work, more and fewer than there are steps
          const int64_t padded = (rows + viditq::amx::kBlock - 1) / viditq::amx::kBlock * viditq::amx::kBlock;
          std::vector<uint8_t> a(padded * k);
          std::vector<int8_t> b(k * 64);
          std::vector<int32_t> c(padded * ldc, 7);
          for (auto& x : a) x = extreme ? (random() % 2 ? 255 : 0) : random();
          for (auto& x : b) x = extreme ? (random() % 2 ? 127 : -128) : random();
          viditq::amx::configure();
          int64_t pieces = 0;
          const auto piece = [](const void* what, int64_t begin, int64_t end) {
            auto& done = **static_cast<int64_t* const*>(what);
            done = done == begin ? end : -1;
          };
          int64_t* counter = &pieces;
          viditq::amx::product(rows, k, ldc, a.data(), b.data(), c.data(), {piece, &counter, beside});
          viditq::amx::release();
          if (pieces != beside) {
            std::printf("of %ld pieces of other work %ld were done in turn\n", beside, pieces);
            return 1;
          }
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t n = 0; n < ldc; ++n) {
              int32_t sum = n < 64 ? 0 : 7;  // what lies between the rows of c is left alone
              if (n < 64)
                for (int64_t j = 0; j < k; ++j) sum += a[i * k + j] * b[j / 4 * 256 + n * 4 + j % 4];
              if (sum == c[i * ldc + n]) continue;
              std::printf("rows %ld k %ld ldc %ld: c[%ld, %ld] = %d, not %d\n", rows, k, ldc, i, n, c[i * ldc + n], sum);
              return 1;
            }
        }
  std::puts("exact");
}
