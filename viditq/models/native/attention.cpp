// Flash attention on a CPU: products in bf16, sums and softmax in float.
// Transposed (lanes are queries), so that maxima and sums run down columns and never across a vector.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "blocks.h"
#include "stream.h"

namespace viditq {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

template <typename T>
Rows<T> rows_of(T* data, const at::Tensor& x_BLHD, int64_t b, int64_t h) {
  return {data + b * x_BLHD.stride(0) + h * x_BLHD.stride(2), x_BLHD.stride(1)};
}

Mask mask_of(const at::Tensor& mask_BHKQ, int64_t b, int64_t h) {
  if (!mask_BHKQ.defined()) return {};
  const auto stride = [&](int axis) { return mask_BHKQ.size(axis) == 1 ? 0 : mask_BHKQ.stride(axis); };
  return {mask_BHKQ.const_data_ptr<float>() + b * stride(0) + h * stride(1), stride(2), stride(3)};
}

template <template <typename, typename> class Way, typename T, typename U>
void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask, float scale,
               const at::Tensor& out) {
  const Sizes n{q.size(0), q.size(2), q.size(1), k.size(1), q.size(3), k.size(2), scale * kLog2E, mask.defined()};
  constexpr int64_t block = Way<T, U>::kQueries;
  const int64_t blocks = (n.Lq + block - 1) / block, heads = n.B * n.H, threads = at::get_num_threads();
  // Each item packs the keys of its head: queries are split only where there are too few heads for the threads.
  const int64_t wanted = heads >= 2 * threads ? 1 : (4 * threads + heads - 1) / heads;
  const int64_t parts = std::min(wanted, std::max<int64_t>(blocks / 4, 1));
  const int64_t part = (blocks + parts - 1) / parts * block;
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    Way<T, U> way(n);
    const auto head_of = [&](int64_t item) {
      const int64_t b = item / parts / n.H, h = item / parts % n.H, kv = h / (n.H / n.kv_heads);
      return Head<T, U>{rows_of(q.const_data_ptr<T>(), q, b, h), rows_of(k.const_data_ptr<T>(), k, b, kv),
                        rows_of(v.const_data_ptr<T>(), v, b, kv), rows_of(out.mutable_data_ptr<U>(), out, b, h),
                        mask_of(mask, b, h)};
    };
    Head<T, U> head = head_of(begin);
    for (int64_t item = begin; item < end; ++item) {
      const Head<T, U> next = head_of(std::min(item + 1, end - 1));
      const int64_t query = item % parts * part;
      way.run(head, query, std::min(n.Lq, query + part), next);
      head = next;
    }
    way.finish();
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
  if (k.numel() == 0) return out.zero_();
  const auto run = [&]<typename T, typename U>(T, U) {
    const bool streams = amx && Amx::available() && q.size(3) <= Amx::kChannels;
    const auto kernel = streams ? attention<Stream, T, U> : attention<Blocks, T, U>;
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
