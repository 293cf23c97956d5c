// Attention on AMX tiles as a stream of units, 64 keys x 16 queries each. A stage turns one unit's scores into
// probabilities between the tile instructions that compute the next one's scores and sum the values of the one before.
// The stream goes on from head to head: a sequence of 16 tokens is one unit.
#pragma once
#include "amx.h"
#include "work.h"

namespace viditq {

struct Unit {
  const uint32_t *K, *V, *Q;  // packed
  float *O, *maxima;          // [D + 1, 16]: sums and, last, totals; [16]
  int64_t keys = 0;           // 0 = nothing to do
  int64_t key, query;         // the first ones
  bool first, last;           // of all keys
  Mask mask;
  void* out;
  int64_t rows, stride;  // of out
};

// Scores [keys, 16] of a unit and their probabilities 2^(score - maximum), rounded to bf16.
template <bool Masked>
struct Scores {
  const Unit& unit;
  const int64_t queries;
  const __m512 scale;
  const float* const S;

  // In units of log2, less `shift`.
  inline __attribute__((always_inline)) __m512 less(__m512 shift, int64_t key) const {
    const __m512 s = _mm512_load_ps(S + key * kLanes);
    if constexpr (!Masked) return _mm512_fmsub_ps(s, scale, shift);
    const __m512 more = added(unit.mask, unit.key + key, unit.query, queries);
    return _mm512_fmadd_ps(s, scale, _mm512_sub_ps(more, shift));
  }

  __m512 greatest() const {
    __m512 top = _mm512_set1_ps(-kInfinity);
    for (int64_t key = 0; key < unit.keys; ++key) top = _mm512_max_ps(top, less(_mm512_setzero_ps(), key));
    return top;
  }

  // Nothing seen but masked keys: subtract 0, as -inf - -inf would be NaN.
  __mmask16 none() const {
    return _mm512_cmp_ps_mask(_mm512_load_ps(unit.maxima), _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
  }
  __m512 shift() const { return _mm512_maskz_load_ps(_mm512_knot(none()), unit.maxima); }

  // Two keys from `key` on as pairs; zero for those past the last.
  inline __attribute__((always_inline)) __m512i pair(__m512 shift, int64_t key) const {
    return cut_pair(exp2_to_cut(less(shift, key)), exp2_to_cut(less(shift, key + 1)));
  }
  __m512i pair_at_end(__m512 shift, int64_t key) const {
    if (key + 1 < unit.keys) return pair(shift, key);
    const __m512 zero = _mm512_setzero_ps();
    return cut_pair(key < unit.keys ? exp2_to_cut(less(shift, key)) : zero, zero);
  }

  __attribute__((noinline)) void begin() const { _mm512_store_ps(unit.maxima, greatest()); }

  // With the maxima brought up and O [D + 1, 16], the sums of the keys before, scaled to them.
  __attribute__((noinline)) void again(int64_t D, uint32_t* P) const {
    const __m512 before = _mm512_load_ps(unit.maxima);
    _mm512_store_ps(unit.maxima, _mm512_max_ps(before, greatest()));
    const __m512 now = shift(), alpha = exp2(_mm512_sub_ps(before, now));
    for (float* row = unit.O; row <= unit.O + D * kLanes; row += kLanes) {
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), alpha));
    }
    for (int64_t key = 0; key < unit.keys; key += 2, P += kLanes) _mm512_store_si512(P, pair_at_end(now, key));
  }
};

template <typename T, typename U>
class Stream {
 public:
  static constexpr int64_t kQueries = kLanes;  // of a block

  explicit Stream(const Sizes& sizes)
      : n_(sizes),
        steps_((n_.D / 2 + kLanes - 1) / kLanes),
        spread_((kKeyBlock / 2 - 1) / (kKeyBlock / kLanes * steps_ + n_.D / kLanes * 2) + 1),
        values_(round_up(n_.Lk, kKeyBlock) / 2 * (n_.D + 1)),
        fetches_(n_.Lq <= 512 && n_.Lk <= 512 && n_.B * n_.H * n_.Lq * n_.D * sizeof(T) > (1 << 20)),
        K_(round_up(n_.Lk, kLanes) * pairs()),
        V_(values_ * heads()),
        Q_(pairs() * kLanes),
        units_memory_(4736),
        O_((n_.D + 1) * kLanes),
        maxima_(kLanes) {
    for (int64_t block = 0; block < values_ * heads(); block += (n_.D + 1) * kKeyBlock / 2) {
      std::fill_n(V_ + block + n_.D * kKeyBlock / 2, kKeyBlock / 2, 0x3f803f80u);  // ones: their sums are the totals
    }
    Amx::enter(n_.D);
  }
  ~Stream() { Amx::leave(); }
  Stream(const Stream&) = delete;

  // The queries from `query` to `stop`; `next` is the head to come.
  void run(const Head<T, U>& head, int64_t query, int64_t stop, const Head<T, U>& next) {
    pack_keys(head.K.data, head.K.stride, n_.Lk, round_up(n_.Lk, kLanes), n_.D, pairs(), K_);
    if (heads() == 1) finish();
    head_ = (head_ + 1) % heads();
    uint32_t* const V = V_ + head_ * values_;
    pack_values(head.V.data, head.V.stride, n_.Lk, n_.D, n_.D + 1, V);
    if (fetches_) {
      fetch<0>(next.K, n_.Lk), fetch<0>(next.V, n_.Lk);
      fetch<0>(next.Q, n_.Lq), fetch<1>(next.O, n_.Lq);
    }
    for (; query < stop; query += kQueries) {
      const int64_t rows = std::min(kQueries, stop - query);
      pack_queries(head.Q.data + query * head.Q.stride, head.Q.stride, rows, n_.D, kLanes, pairs(), Q_);
      for (int64_t key = 0; key < n_.Lk; key += kKeyBlock) {
        Unit& unit = units_[count_ % 3];
        unit.K = K_ + key * pairs(), unit.V = V + key / 2 * (n_.D + 1), unit.Q = Q_, unit.O = O_;
        unit.maxima = maxima_, unit.mask = head.mask;
        unit.keys = std::min(kKeyBlock, n_.Lk - key), unit.key = key, unit.query = query;
        unit.first = key == 0, unit.last = key + kKeyBlock >= n_.Lk;
        unit.out = head.O.data + query * head.O.stride, unit.rows = rows, unit.stride = head.O.stride;
        push();
      }
    }
  }

  void finish() {
    for (int i = 0; i < 2; ++i) units_[count_ % 3].keys = 0, push();
  }

 private:
  int64_t pairs() const { return steps_ * kLanes; }

  // How many heads' values are kept: three units are in work at a time, of short sequences each of another head.
  int64_t heads() const { return n_.Lk <= 512 ? 3 : 1; }

  // A head's rows lie far apart, which the processor does not foresee. Write: 1 or 0.
  template <int Write, typename X>
  void fetch(const Rows<X>& rows, int64_t count) const {
    const int64_t bytes = n_.D * sizeof(X);
    for (int64_t row = 0; row < count; ++row) {
      const char* const start = reinterpret_cast<const char*>(rows.data + row * rows.stride);
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(start + byte, Write, 2);
      __builtin_prefetch(start + bytes - 1, Write, 2);
    }
  }

  // A stage with the unit that was set last.
  void push() {
    const Unit &next = units_[count_ % 3], &now = units_[(count_ + 2) % 3], &before = units_[(count_ + 1) % 3];
    n_.masked ? stage<true>(next, now, before) : stage<false>(next, now, before);
    ++count_;
    if (before.keys == 0 || !before.last) return;
    const float* totals = before.O + n_.D * kLanes;
    store_output(before.O, totals, kLanes, before.rows, n_.D, before.stride, static_cast<U*>(before.out));
  }

  template <bool Masked>
  void stage(const Unit& next, const Unit& now, const Unit& before) {
    if (steps_ == 1) stage<Masked, 1>(next, now, before);
    if (steps_ == 2) stage<Masked, 2>(next, now, before);
    if (steps_ == 3) stage<Masked, 3>(next, now, before);
    if (steps_ == 4) stage<Masked, 4>(next, now, before);
  }

  template <bool Masked, int Steps>
  void stage(const Unit& next, const Unit& now, const Unit& before) {
    // Scores [64, 16] and probabilities [32, 16] of the units by turns, where no load has the low 12 bits of a store's
    // address shortly before: the processor would wait for it.
    float* const S[] = {units_memory_, units_memory_ + 2560};
    uint32_t* const P[] = {reinterpret_cast<uint32_t*>(S[0] + 1664), reinterpret_cast<uint32_t*>(S[1] + 1664)};
    const bool odd = count_ % 2;
    Amx::fence();
    const Scores<Masked> scores{now, n_.Lq, _mm512_set1_ps(n_.scale), S[odd]};
    if (now.keys > 0 && now.first) scores.begin();
    // What runs on is in variables of this function, for the compiler to keep in registers.
    const __m512 shift = now.keys > 0 ? scores.shift() : _mm512_setzero_ps();
    __m512i top = _mm512_setzero_si512();
    uint32_t* p = P[odd];
    int64_t key = 0;
    const auto pairs = [&](int64_t stop) __attribute__((always_inline)) {
      for (stop = std::min(stop, now.keys - 1); key < stop; key += 2, p += kLanes) {
        const __m512i pair = scores.pair(shift, key);
        top = _mm512_max_epu16(top, pair);
        _mm512_store_si512(p, pair);
      }
    };
    const auto some = [&]() __attribute__((always_inline)) { pairs(key + 2 * spread_); };
    if (next.keys > 0) Amx::scores<Steps>(next.K, next.Q, next.keys, S[!odd], some);
    if (before.keys > 0) {
      Amx::values(before.V, P[!odd], round_up(before.keys, Amx::kKeys) / 2, n_.D, before.first, before.O, some);
    }
    Amx::fence();
    pairs(now.keys);
    for (; key < round_up(now.keys, Amx::kKeys); key += 2, p += kLanes) {
      const __m512i pair = scores.pair_at_end(shift, key);
      top = _mm512_max_epu16(top, pair);
      _mm512_store_si512(p, pair);
    }
    // A maximum of earlier keys will do, as floats are as precise at any size. Not for long, though: the probability of
    // the maximum itself is 1, the only one that bf16 does not round, which tells where few keys count.
    constexpr int16_t four = 0x4080;
    const bool stale = now.keys > 0 && (_mm512_cmpgt_epu16_mask(top, _mm512_set1_epi16(four)) | scores.none()) != 0;
    if (stale && !now.first) scores.again(n_.D, P[odd]);
  }

  const Sizes n_;
  const int64_t steps_;   // of 16 pairs
  const int64_t spread_;  // how many pairs of keys become probabilities beside a product
  const int64_t values_;  // size of a head's
  const bool fetches_;
  Array<uint32_t> K_, V_, Q_;
  Array<float> units_memory_, O_, maxima_;
  Unit units_[3];
  int64_t count_ = 0, head_ = 0;
};

}  // namespace viditq
