// Attention by AVX512-BF16: blocks of 64 keys x up to 48 queries, products and softmax one after the other.
#pragma once
#include "avx512.h"
#include "work.h"

namespace viditq {

template <typename T, typename U>
class Blocks {
 public:
  static constexpr int64_t kQueries = Avx512::kVectors * kLanes;  // of a block

  explicit Blocks(const Sizes& sizes)
      : n_(sizes),
        K_(round_up(n_.Lk, kKeyBlock) * n_.D / 2),
        V_(round_up(n_.Lk, kKeyBlock) * n_.D / 2),
        Q_(n_.D / 2 * kQueries),
        P_(kKeyBlock / 2 * kQueries),
        S_(kKeyBlock * kQueries),
        O_(n_.D * kQueries),
        maxima_(kQueries),
        totals_(kQueries),
        alpha_(kQueries) {}

  // The queries from `query` to `stop`.
  void run(const Head<T, U>& head, int64_t query, int64_t stop, const Head<T, U>& /*next*/) {
    pack_keys(head.K.data, head.K.stride, n_.Lk, round_up(n_.Lk, Avx512::kKeys), n_.D, n_.D / 2, K_);
    pack_values(head.V.data, head.V.stride, n_.Lk, n_.D, n_.D, V_);
    for (; query < stop; query += kQueries) {
      const int64_t rows = std::min(kQueries, stop - query), lanes = round_up(rows, kLanes);
      pack_queries(head.Q.data + query * head.Q.stride, head.Q.stride, rows, n_.D, lanes, n_.D / 2, Q_);
      if (lanes == kLanes) attend<1>(head.mask, query);
      if (lanes == 2 * kLanes) attend<2>(head.mask, query);
      if (lanes == 3 * kLanes) attend<3>(head.mask, query);
      store_output<U>(O_, totals_, lanes, rows, n_.D, head.O.stride, head.O.data + query * head.O.stride);
    }
  }

  void finish() {}

 private:
  // All keys for one block of N vectors of queries; leaves sums in O_ and totals in totals_.
  template <int N>
  void attend(const Mask& mask, int64_t query) {
    constexpr int64_t lanes = N * kLanes;
    std::fill_n(static_cast<float*>(maxima_), lanes, -kInfinity);
    std::fill_n(static_cast<float*>(totals_), lanes, 0.f);
    std::fill_n(static_cast<float*>(O_), n_.D * lanes, 0.f);
    // The greatest score is the greatest scaled one only without a mask, and where the scale is not negative.
    const bool scale_first = mask.data != nullptr || n_.scale < 0;
    for (int64_t key = 0; key < n_.Lk; key += kKeyBlock) {
      const int64_t keys = std::min(kKeyBlock, n_.Lk - key), padded = round_up(keys, Avx512::kKeys);
      Avx512::scores<N>(K_ + key * n_.D / 2, Q_, padded, n_.D / 2, S_);
      if (scale_first) add_mask<N>(mask, query, n_.Lq, key, keys, n_.scale, S_);
      softmax_block<N>(S_, keys, padded, scale_first ? 1.f : n_.scale, {maxima_, totals_, alpha_}, P_);
      Avx512::values<N>(V_ + key / 2 * n_.D, P_, padded / 2, n_.D, alpha_, O_);
    }
  }

  Sizes n_;
  Array<uint32_t> K_, V_, Q_, P_;
  Array<float> S_, O_, maxima_, totals_, alpha_;
};

}  // namespace viditq
