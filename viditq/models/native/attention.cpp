// Flash attention on a CPU: products in bf16, sums and softmax in float.
// Transposed (lanes are queries), so that maxima and sums run down columns and never across a vector.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <memory>

#include "amx.h"
#include "avx512.h"
#include "pack.h"
#include "softmax.h"

namespace viditq {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

struct Sizes {
  int64_t B, H, Lq, Lk, D, kv_heads;
  int64_t pairs = 0, padded_D = 0, padded_Lk = 0;
  float scale = 0.f;  // in units of log2
};

// What one thread works on: the packed keys and values of a head, and everything of one block of queries.
struct Scratch {
  uint32_t *K, *V, *Q, *P;
  float *S, *O;
  Softmax state;
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};

  Scratch(const Sizes& n, int64_t lanes) {
    const int64_t keys = n.padded_Lk * n.pairs, values = n.padded_Lk / 2 * n.padded_D;
    const int64_t queries = n.pairs * lanes, scores = kKeyBlock * lanes, sums = n.padded_D * lanes;
    const int64_t sizes[] = {keys, values, queries, scores / 2, scores, sums, lanes, lanes, lanes};
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
  // The greatest score is the greatest scaled one only without a mask, and where the scale is not negative.
  const bool scale_first = mask.data != nullptr || n.scale < 0;
  for (int64_t key = 0; key < n.Lk; key += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, n.Lk - key), padded = round_up(keys, Product::kKeys);
    Product::template scores<N>(scratch.K + key * n.pairs, scratch.Q, padded, n.pairs, scratch.S);
    if (scale_first) add_mask<N>(mask, query, n.Lq, key, keys, n.scale, scratch.S);
    softmax_block<N>(scratch.S, keys, padded, scale_first ? 1.f : n.scale, state, scratch.P);
    const uint32_t* V = scratch.V + key / 2 * n.padded_D;
    Product::template values<N>(V, scratch.P, padded / 2, n.padded_D, state.alpha, scratch.O);
  }
}

template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

template <typename T>
Rows<T> rows_of(T* data, const at::Tensor& x_BLHD, int64_t b, int64_t h) {
  return {data + b * x_BLHD.stride(0) + h * x_BLHD.stride(2), x_BLHD.stride(1)};
}

Mask mask_of(const at::Tensor& mask_BHKQ, int64_t b, int64_t h) {
  if (!mask_BHKQ.defined()) return {};
  const auto stride = [&](int axis) { return mask_BHKQ.size(axis) == 1 ? 0 : mask_BHKQ.stride(axis); };
  return {mask_BHKQ.const_data_ptr<float>() + b * stride(0) + h * stride(1), stride(2), stride(3)};
}

// One head's queries from `query` to `stop`, in blocks; keys and values are packed in the scratch.
template <typename Product, typename T, typename U>
void attend_range(const Sizes& n, const Mask& mask, const Rows<const T>& Q, const Rows<U>& O, int64_t query,
                  int64_t stop, const Scratch& scratch) {
  constexpr int64_t block = Product::kVectors * kLanes;
  for (; query < stop; query += block) {
    const int64_t rows = std::min(block, stop - query), lanes = round_up(rows, kLanes);
    pack_queries(Q.data + query * Q.stride, Q.stride, rows, n.D, lanes, n.pairs, scratch.Q);
    if (lanes == kLanes) attend<Product, 1>(n, mask, query, scratch);
    if (lanes == 2 * kLanes) attend<Product, 2>(n, mask, query, scratch);
    if constexpr (Product::kVectors == 3) {
      if (lanes == 3 * kLanes) attend<Product, 3>(n, mask, query, scratch);
    }
    store_output(scratch.O, scratch.state.totals, lanes, rows, n.D, O.stride, O.data + query * O.stride);
  }
}

template <typename Product, typename T, typename U>
void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask, float scale,
               const at::Tensor& out) {
  Sizes n{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), k.size(2)};
  n.pairs = round_up(n.D / 2, Product::kPairs), n.padded_D = round_up(n.D, Product::kD);
  n.padded_Lk = round_up(n.Lk, kKeyBlock), n.scale = scale * kLog2E;
  constexpr int64_t block = Product::kVectors * kLanes;
  const int64_t blocks = (n.Lq + block - 1) / block, heads = n.B * n.H, threads = at::get_num_threads();
  // Each item packs the keys of its head: queries are split only where there are too few heads for the threads.
  const int64_t wanted = heads >= 2 * threads ? 1 : (4 * threads + heads - 1) / heads;
  const int64_t parts = std::min(wanted, std::max<int64_t>(blocks / 4, 1));
  const int64_t part = (blocks + parts - 1) / parts * block;
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(n, block);
    Product::enter();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / parts / n.H, h = item / parts % n.H, kv = h / (n.H / n.kv_heads);
      const auto K = rows_of(k.const_data_ptr<T>(), k, b, kv), V = rows_of(v.const_data_ptr<T>(), v, b, kv);
      pack_keys(K.data, K.stride, n.Lk, round_up(n.Lk, Product::kKeys), n.D, n.pairs, scratch.K);
      pack_values(V.data, V.stride, n.Lk, n.D, n.padded_D, scratch.V);
      const int64_t query = item % parts * part;
      const auto Q = rows_of(q.const_data_ptr<T>(), q, b, h);
      const auto O = rows_of(out.mutable_data_ptr<U>(), out, b, h);
      attend_range<Product, T, U>(n, mask_of(mask, b, h), Q, O, query, std::min(n.Lq, query + part), scratch);
    }
    Product::leave();
  });
}

// [keys, queries] in units of log2, so that a vector of queries is one load; an axis that is broadcast stays 1.
at::Tensor additive(const at::Tensor& mask_BHQK) {
  at::Tensor m = mask_BHQK.scalar_type() == at::kBool
                     ? at::zeros_like(mask_BHQK, at::kFloat).masked_fill_(mask_BHQK.logical_not(), -kInfinity)
                     : mask_BHQK.to(at::kFloat).mul(kLog2E);
  return m.transpose(-1, -2).contiguous();
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(), "viditq::attention: q, k, v: [B, L, H, D]");
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3), "viditq::attention: q and k differ in B or D");
  TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "viditq::attention: q's heads are no multiple of k's");
  TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 256, "viditq::attention: head dim ", q.size(3));
  const auto dtype = q.scalar_type();
  TORCH_CHECK(dtype == k.scalar_type() && dtype == v.scalar_type(), "viditq::attention: q, k and v differ in dtype");
  if (!mask) return;
  const int64_t full[] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  bool fits = mask->dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = mask->size(i) == 1 || mask->size(i) == full[i];
  TORCH_CHECK(fits, "viditq::attention: a mask of ", mask->sizes(), " does not broadcast to ", at::IntArrayRef(full));
}

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const std::optional<at::Tensor>& mask, double scale, bool amx,
                         std::optional<at::ScalarType> out_dtype) {
  check(q, k, v, mask);
  const at::ScalarType type = q.scalar_type(), out_type = out_dtype.value_or(type);
  const bool widens = type == at::kBFloat16 && out_type == at::kFloat;
  TORCH_CHECK(out_type == type || widens, "viditq::attention: ", out_type, " of ", type);
  const auto rows = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor Q = rows(q), K = rows(k), V = rows(v), m = mask ? additive(*mask) : at::Tensor();
  const at::Tensor out = at::empty(q.sizes(), q.options().dtype(out_type));
  if (out.numel() == 0) return out;
  const auto run = [&]<typename T, typename U>(T, U) {
    const auto kernel = amx && Amx::available() ? attention<Amx, T, U> : attention<Avx512, T, U>;
    kernel(Q, K, V, m, static_cast<float>(scale), out);
  };
  if (widens) return run(at::BFloat16(), 0.f), out;
  switch (type) {
    case at::kBFloat16: run(at::BFloat16(), at::BFloat16()); break;
    case at::kHalf: run(at::Half(), at::Half()); break;
    case at::kFloat: run(0.f, 0.f); break;
    default: TORCH_CHECK(false, "viditq::attention: bfloat16, float16 or float32, not ", q.scalar_type());
  }
  return out;
}

}  // namespace
}  // namespace viditq

TORCH_LIBRARY_FRAGMENT(viditq, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool amx=True, "
        "ScalarType? out_dtype=None) -> Tensor");
  m.def("attention_amx() -> bool", &viditq::Amx::available);
}
TORCH_LIBRARY_IMPL(viditq, CPU, m) { m.impl("attention", &viditq::attention_cpu); }
