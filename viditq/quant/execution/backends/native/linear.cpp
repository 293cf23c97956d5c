// Quantized Linears: [LayerNorm, modulation, smoothing] -> codes -> u8 x s8 product -> scales, bias [, activation,
// gate, residual]. Shapes and meaning of every argument: ops.py, which is the only caller.
//
// Legend: M rows, K in_features, N out_features, P panels of 64 outputs, S segments of K with scales of their own,
// g = K / S, h = g padded to a multiple of 8. Weight s8 [P, S, h / 4, 64, 4]; 4-bit ones hold two k-quadruples a byte.
//   y[m, n] = sum_s sx sw (acc - zx colsum[n] - zw[n] (rowsum[m] - g zx)),   acc = sum_k u8 * s8
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "activations.h"
#include "multiply.h"

namespace viditq {
namespace {

// AMX tiles instead of VNNI: set by `prepare`.
bool use_amx = false;

// Data of a contiguous tensor, of `count` elements where that is given; null where there is none.
template <typename T>
const T* data_of(const std::optional<at::Tensor>& tensor, const char* name, int64_t count = -1) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->is_contiguous() && (count < 0 || tensor->numel() == count),
              "viditq::linear: ", name, " must be contiguous and fit x and the weight; its shape is ", tensor->sizes());
  return tensor->const_data_ptr<T>();
}

int64_t rows_per(const std::optional<at::Tensor>& tensor, int64_t M, int64_t width) {
  if (!tensor || M == 0) return 1;
  const int64_t count = tensor->numel() / width;
  TORCH_CHECK(tensor->numel() % width == 0 && count > 0 && M % count == 0,
              "viditq::linear: ", M, " rows do not divide by a modulation of shape ", tensor->sizes());
  return M / count;
}

Prologue prologue_of(int64_t K, int64_t M, double layernorm_eps, const std::optional<at::Tensor>& mul,
                     const std::optional<at::Tensor>& add) {
  TORCH_CHECK(!mul || !add || mul->numel() == add->numel(), "viditq::linear: mul and add differ in shape");
  return {K,
          layernorm_eps >= 0,
          static_cast<float>(layernorm_eps),
          data_of<float>(mul, "mul"),
          data_of<float>(add, "add"),
          rows_per(mul ? mul : add, M, K)};
}

template <typename F>
void with_type(at::ScalarType type, F&& run) {
  if (type == at::kFloat) return run(float{});
  if (type == at::kBFloat16) return run(c10::BFloat16{});
  TORCH_CHECK(type == at::kHalf, "viditq::linear takes float32, bfloat16 and float16, not ", type);
  run(c10::Half{});
}

Weight weight_of(const at::Tensor& packed, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                 int64_t N, int64_t K, int64_t ranges) {
  const bool nibbles = packed.scalar_type() == at::kByte;
  TORCH_CHECK(packed.dim() == 5 && packed.is_contiguous(), "viditq::linear: this is no packed weight");
  const bool half = scale.scalar_type() == at::kHalf;
  const int64_t P = packed.size(0), S = packed.size(1), h = packed.size(2) * (nibbles ? 8 : 4);
  TORCH_CHECK(K % S == 0 && K / S <= h && N <= P * kPanel && S % ranges == 0, "viditq::linear: x of width ", K,
              " does not fit the packed weight ", packed.sizes());
  return {static_cast<const uint8_t*>(packed.const_data_ptr()),
          nibbles,
          half ? nullptr : data_of<float>(scale, "scale", S * P * kPanel),
          half ? data_of<c10::Half>(scale, "scale", S * P * kPanel) : nullptr,
          data_of<int8_t>(zero_point, "zero_point", S * P * kPanel),
          N, P, S, h};
}

Reader reader_of(const at::Tensor& x, int64_t M, const Weight& weight, int64_t ranges,
                 const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero_point,
                 const std::optional<at::Tensor>& div) {
  const int64_t S = weight.S;
  // more rows than there are: amx.h computes whole blocks of them
  at::Tensor codes = at::empty({M * S + amx::kBlock, weight.h}, x.options().dtype(at::kByte));
  auto* data = codes.data_ptr<uint8_t>();
  return {data_of<float>(div, "div", x.size(-1)),
          data_of<float>(scale, "input_scale", ranges),
          data_of<float>(zero_point, "input_zero_point", ranges),
          S,
          weight.h,
          std::move(codes),
          {std::vector<Row>(M * S), data},
          {}};
}

void quantize_all(const at::Tensor& x, int64_t M, const Prologue& prologue, Format format, int64_t ranges,
                  bool per_tensor, std::vector<Reader>& readers) {
  const Activations activations{format, per_tensor && x.dim() > 1 ? M / x.size(0) : 1, ranges};
  with_type(x.scalar_type(), [&](auto type) {
    quantize(x.const_data_ptr<decltype(type)>(), M, prologue, activations, readers);
  });
}

at::Tensor empty_output(const at::Tensor& x, int64_t N, at::ScalarType type) {
  auto shape = x.sizes().vec();
  shape.back() = N;
  return at::empty(shape, x.options().dtype(type));
}

at::Tensor linear(const at::Tensor& x_in, const at::Tensor& packed, const at::Tensor& scale,
                  const std::optional<at::Tensor>& zero_point, const std::optional<at::Tensor>& bias,
                  int64_t out_features, int64_t act_bits, bool act_symmetric, int64_t act_groups, bool act_per_tensor,
                  const std::optional<at::Tensor>& input_scale, const std::optional<at::Tensor>& input_zero_point,
                  double layernorm_eps, const std::optional<at::Tensor>& mul, const std::optional<at::Tensor>& add,
                  const std::optional<at::Tensor>& div, const std::optional<at::Tensor>& addend, int64_t activation,
                  const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& residual,
                  at::ScalarType out_type) {
  const at::Tensor x = x_in.contiguous();
  const int64_t K = x.size(-1), N = out_features;
  at::Tensor out = empty_output(x, N, out_type);
  const int64_t M = out.numel() / std::max<int64_t>(N, 1);
  if (out.numel() == 0) return out;
  const Weight weight = weight_of(packed, scale, zero_point, N, K, act_groups);
  const float* lines = data_of<float>(gate, "gate");
  const int64_t per_line = rows_per(gate, M, N);
  std::vector<Reader> readers;
  readers.push_back(reader_of(x, M, weight, act_groups, input_scale, input_zero_point, div));
  quantize_all(x, M, prologue_of(K, M, layernorm_eps, mul, add), {act_bits, act_symmetric}, act_groups, act_per_tensor,
               readers);
  with_type(out_type, [&](auto type) {
    using T = decltype(type);
    const Epilogue<T> epilogue{data_of<float>(bias, "bias", N), data_of<T>(addend, "addend", M * N), activation, lines,
                               per_line, data_of<T>(residual, "residual", M * N), out.data_ptr<T>(), N};
    multiply(readers[0].quantized, weight, epilogue, M, K, use_amx);
  });
  return out;
}

using Optionals = c10::List<std::optional<at::Tensor>>;

// Several Linears of one input, to each of which smoothing, grids and weight are its own.
std::vector<at::Tensor> linears(const at::Tensor& x_in, at::TensorList packed, at::TensorList scales,
                                const Optionals& zero_points, const Optionals& biases, at::IntArrayRef out_features,
                                int64_t act_bits, bool act_symmetric, int64_t act_groups, bool act_per_tensor,
                                const Optionals& input_scales, const Optionals& input_zero_points,
                                double layernorm_eps, const std::optional<at::Tensor>& mul,
                                const std::optional<at::Tensor>& add, const Optionals& divs, at::ScalarType out_type) {
  const at::Tensor x = x_in.contiguous();
  const size_t count = packed.size();
  TORCH_CHECK(scales.size() == count && out_features.size() == count && zero_points.size() == count &&
                  biases.size() == count && input_scales.size() == count && input_zero_points.size() == count &&
                  divs.size() == count,
              "viditq::linears: lists of different lengths");
  const int64_t K = x.size(-1), M = x.numel() / std::max<int64_t>(K, 1);
  std::vector<at::Tensor> outs;
  for (const int64_t N : out_features) outs.push_back(empty_output(x, N, out_type));
  if (x.numel() == 0) return outs;
  std::vector<Weight> weights;
  std::vector<Reader> readers;
  for (size_t i = 0; i < count; ++i) {
    weights.push_back(weight_of(packed[i], scales[i], zero_points.get(i), out_features[i], K, act_groups));
    readers.push_back(reader_of(x, M, weights[i], act_groups, input_scales.get(i), input_zero_points.get(i), divs.get(i)));
  }
  quantize_all(x, M, prologue_of(K, M, layernorm_eps, mul, add), {act_bits, act_symmetric}, act_groups, act_per_tensor,
               readers);
  for (size_t i = 0; i < count; ++i) {
    const std::optional<at::Tensor> bias = biases.get(i);
    const float* added = data_of<float>(bias, "bias", out_features[i]);
    with_type(out_type, [&](auto type) {
      using T = decltype(type);
      const Epilogue<T> epilogue{added, nullptr, kNone, nullptr, 1, nullptr, outs[i].data_ptr<T>(), out_features[i]};
      multiply(readers[i].quantized, weights[i], epilogue, M, K, use_amx);
    });
  }
  return outs;
}

// What `linear` quantizes, in float32, for what has to be done to it in between: a rotation, a low-rank branch.
at::Tensor transform(const at::Tensor& x_in, double layernorm_eps, const std::optional<at::Tensor>& mul,
                     const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& div) {
  const at::Tensor x = x_in.contiguous();
  const int64_t K = x.size(-1), M = x.numel() / std::max<int64_t>(K, 1);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const Prologue prologue = prologue_of(K, M, layernorm_eps, mul, add);
  const float* scale = data_of<float>(div, "div", K);
  float* to = out.data_ptr<float>();
  with_type(x.scalar_type(), [&](auto type) {
    const auto* from = x.const_data_ptr<decltype(type)>();
    for_rows(from, M, prologue,
             [&](int64_t m, const auto* row, const Range*, float*) { smooth(row, scale, K, to + m * K); });
  });
  return out;
}

// How products are computed from now on, "amx" (if allowed and right here) or "vnni"; "" = not exactly in any way.
std::string prepare(bool allow_amx) {
  use_amx = allow_amx && amx::granted() && is_exact(true);
  return use_amx ? "amx" : is_exact(false) ? "vnni" : "";
}

}  // namespace
}  // namespace viditq

TORCH_LIBRARY_FRAGMENT(viditq, m) {
  // else a compiler may choose other strides for what it computes, and what is contiguous in eager mode is not
  const std::vector<at::Tag> as_traced{at::Tag::needs_exact_strides};
  m.def(
      "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, "
      "int out_features, int act_bits, bool act_symmetric, int act_groups, bool act_per_tensor, Tensor? input_scale, "
      "Tensor? input_zero_point, float layernorm_eps, Tensor? mul, Tensor? add, Tensor? div, Tensor? addend, "
      "int activation, Tensor? gate, Tensor? residual, ScalarType out_dtype) -> Tensor",
      as_traced);
  m.def(
      "linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] zero_points, Tensor?[] biases, "
      "int[] out_features, int act_bits, bool act_symmetric, int act_groups, bool act_per_tensor, "
      "Tensor?[] input_scales, Tensor?[] input_zero_points, float layernorm_eps, Tensor? mul, Tensor? add, "
      "Tensor?[] divs, ScalarType out_dtype) -> Tensor[]",
      as_traced);
  m.def("transform(Tensor x, float layernorm_eps, Tensor? mul, Tensor? add, Tensor? div) -> Tensor", as_traced);
  m.def("native_prepare(bool allow_amx) -> str", viditq::prepare);
}

TORCH_LIBRARY_IMPL(viditq, CPU, m) {
  m.impl("linear", viditq::linear);
  m.impl("linears", viditq::linears);
  m.impl("transform", viditq::transform);
}
