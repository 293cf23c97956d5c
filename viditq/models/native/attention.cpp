// Flash attention on a CPU: products in bf16, sums and softmax in float.
// Transposed (lanes are queries), so that maxima and sums run down columns and never across a vector.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "pack.h"
#include "products.h"

namespace viditq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

// 2^x, relative error below 5e-6 (a polynomial of 2^fraction); 0 at -inf, NaN at NaN.
inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 y = _mm512_set1_ps(1.36769763e-2f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.16963015e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.41638340e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.92992970e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000369f));
  return _mm512_scalef_ps(y, x);
}

// Two rows of probabilities as pairs of bf16, rounded to the nearest.
inline __m512i pair_up(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
  const __m512i high = _mm512_add_epi32((__m512i)odd, half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}

// Additive mask in units of log2, [keys, lanes] by strides; a stride of 0 stands for a broadcast axis.
struct Mask {
  const float* data = nullptr;
  int64_t key_stride = 0, query_stride = 0;
};

struct Softmax {
  float *maxima, *totals, *alpha;  // [lanes]
};

template <int N>
void add_mask(const Mask& mask, int64_t query, int64_t queries, int64_t key, int64_t keys, float scale, float* S) {
  const __m512 c = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < keys; ++k) {
    const float* row = mask.data == nullptr ? nullptr : mask.data + (key + k) * mask.key_stride;
    for (int v = 0; v < N; ++v) {
      __m512 added = _mm512_setzero_ps();
      if (row != nullptr && mask.query_stride == 0) {
        added = _mm512_set1_ps(*row);
      } else if (row != nullptr) {
        added = _mm512_maskz_loadu_ps(first(queries - query - v * kLanes), row + query + v * kLanes);
      }
      float* s = S + (k * N + v) * kLanes;
      _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_load_ps(s), c, added));
    }
  }
}

// Scores [keys, lanes] -> probabilities [key pairs, lanes] against the running maximum; `alpha` rescales what was before.
template <int N>
void softmax_block(const float* S, int64_t keys, int64_t padded, float scale, const Softmax& state, uint32_t* P) {
  const __m512 c = _mm512_set1_ps(scale);
  for (int v = 0; v < N; ++v) {
    const float* column = S + v * kLanes;
    __m512 top = _mm512_set1_ps(-kInfinity);
    for (int64_t k = 0; k < keys; ++k) top = _mm512_max_ps(top, _mm512_load_ps(column + k * N * kLanes));
    const __m512 before = _mm512_load_ps(state.maxima + v * kLanes);
    const __m512 maximum = _mm512_max_ps(before, _mm512_mul_ps(top, c));
    _mm512_store_ps(state.maxima + v * kLanes, maximum);
    // nothing seen but masked keys: subtract 0, as -inf - -inf would be NaN
    const __mmask16 none = _mm512_cmp_ps_mask(maximum, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    const __m512 shift = _mm512_mask_mov_ps(maximum, none, _mm512_setzero_ps());
    const __m512 alpha = exp2(_mm512_sub_ps(before, shift));
    __m512 total = _mm512_mul_ps(_mm512_load_ps(state.totals + v * kLanes), alpha);
    uint32_t* p = P + v * kLanes;
    for (int64_t k = 0; k < padded; k += 2, p += N * kLanes) {
      const auto probability = [&](int64_t key) {
        if (key >= keys) return _mm512_setzero_ps();
        return exp2(_mm512_fmsub_ps(_mm512_load_ps(column + key * N * kLanes), c, shift));
      };
      const __m512 even = probability(k), odd = probability(k + 1);
      total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
      _mm512_store_si512(p, pair_up(even, odd));
    }
    _mm512_store_ps(state.alpha + v * kLanes, alpha);
    _mm512_store_ps(state.totals + v * kLanes, total);
  }
}

struct Sizes {
  int64_t B, H, Lq, Lk, D, kv_heads, pairs, padded_D, padded_Lk;
  float scale;  // in units of log2
};

struct Scratch {
  uint32_t *K, *V, *Q, *P;
  float *S, *O;
  Softmax state;
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};

  Scratch(const Sizes& n, int64_t lanes) {
    const int64_t sizes[] = {n.padded_Lk * n.pairs, n.padded_Lk / 2 * n.padded_D, n.pairs * lanes, kKeyBlock / 2 * lanes,
                             kKeyBlock * lanes, n.padded_D * lanes, lanes, lanes, lanes};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, kLanes);
    memory.reset(std::aligned_alloc(64, total * 4));
    TORCH_CHECK(memory, "viditq::attention: no memory for ", total * 4, " bytes");
    void* parts[9];
    char* next = static_cast<char*>(memory.get());
    for (int i = 0; i < 9; next += round_up(sizes[i++], kLanes) * 4) parts[i] = next;
    K = static_cast<uint32_t*>(parts[0]), V = static_cast<uint32_t*>(parts[1]);
    Q = static_cast<uint32_t*>(parts[2]), P = static_cast<uint32_t*>(parts[3]);
    S = static_cast<float*>(parts[4]), O = static_cast<float*>(parts[5]);
    state = {static_cast<float*>(parts[6]), static_cast<float*>(parts[7]), static_cast<float*>(parts[8])};
  }
};

// All keys for one block of N vectors of queries; leaves sums in O and totals in the state.
template <typename Product, int N>
void attend(const Sizes& n, const Mask& mask, int64_t query, const Scratch& scratch) {
  const Softmax& state = scratch.state;
  constexpr int64_t lanes = N * kLanes;
  std::fill_n(state.maxima, lanes, -kInfinity);
  std::fill_n(state.totals, lanes, 0.f);
  std::fill_n(scratch.O, n.padded_D * lanes, 0.f);
  const bool scale_first = mask.data != nullptr || n.scale < 0;  // a maximum of scores is one of scaled scores if scale >= 0
  for (int64_t key = 0; key < n.Lk; key += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, n.Lk - key), padded = round_up(keys, Product::kKeys);
    Product::template scores<N>(scratch.K + key * n.pairs, scratch.Q, padded, n.pairs, scratch.S);
    if (scale_first) add_mask<N>(mask, query, n.Lq, key, keys, n.scale, scratch.S);
    softmax_block<N>(scratch.S, keys, padded, scale_first ? 1.f : n.scale, state, scratch.P);
    Product::template values<N>(scratch.V + key / 2 * n.padded_D, scratch.P, padded / 2, n.padded_D, state.alpha, scratch.O);
  }
}

template <typename Product, typename T>
void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask, float scale, at::Tensor& out) {
  Sizes n{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), k.size(2)};
  n.pairs = round_up(n.D / 2, Product::kPairs), n.padded_D = round_up(n.D, Product::kD);
  n.padded_Lk = round_up(n.Lk, kKeyBlock), n.scale = scale * kLog2E;
  constexpr int64_t block = Product::kVectors * kLanes;
  const int64_t blocks = (n.Lq + block - 1) / block, heads = n.B * n.H;
  // Each item packs the keys of its head: split a head's queries only where there are too few heads for the threads.
  const int64_t wanted = heads >= 2 * at::get_num_threads() ? 1 : (4 * at::get_num_threads() + heads - 1) / heads;
  const int64_t parts = std::min(wanted, std::max<int64_t>(blocks / 4, 1)), per_part = (blocks + parts - 1) / parts;
  const T *Q = q.const_data_ptr<T>(), *K = k.const_data_ptr<T>(), *V = v.const_data_ptr<T>();
  T* O = out.mutable_data_ptr<T>();
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(n, block);
    Product::enter();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / parts / n.H, h = item / parts % n.H, kv = h / (n.H / n.kv_heads);
      pack_keys(K + b * k.stride(0) + kv * k.stride(2), k.stride(1), n.Lk, n.padded_Lk, n.D, n.pairs, scratch.K);
      pack_values(V + b * v.stride(0) + kv * v.stride(2), v.stride(1), n.Lk, n.D, n.padded_D, scratch.V);
      Mask part;
      if (mask.defined()) part = {mask.const_data_ptr<float>() + b * mask.stride(0) + h * mask.stride(1), mask.stride(2), mask.stride(3)};
      const int64_t stop = std::min(n.Lq, (item % parts + 1) * per_part * block);
      for (int64_t query = item % parts * per_part * block; query < stop; query += block) {
        const int64_t rows = std::min(block, stop - query), vectors = (rows + kLanes - 1) / kLanes;
        pack_queries(Q + b * q.stride(0) + query * q.stride(1) + h * q.stride(2), q.stride(1), rows, n.D, vectors * kLanes, n.pairs, scratch.Q);
        if (vectors == 1) attend<Product, 1>(n, part, query, scratch);
        if (vectors == 2) attend<Product, 2>(n, part, query, scratch);
        if (vectors == 3) attend<Product, 3>(n, part, query, scratch);
        store_output(scratch.O, scratch.state.totals, vectors * kLanes, rows, n.D, out.stride(1), O + b * out.stride(0) + query * out.stride(1) + h * out.stride(2));
      }
    }
    Product::leave();
  });
}

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask, double scale) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.options());
  at::Tensor m;
  if (q.scalar_type() == at::kBFloat16) attention<Avx512, at::BFloat16>(q, k, v, m, scale, out);
  return out;
}

}  // namespace
}  // namespace viditq

TORCH_LIBRARY_FRAGMENT(viditq, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(viditq, CPU, m) { m.impl("attention", &viditq::attention_cpu); }
