// One quantized Linear: [LayerNorm, modulation, smoothing] -> codes -> u8 x s8 product -> scales, bias [, activation,
// gate, residual]. Shapes and meaning of every argument: ops.py, which is the only caller.
//
// Legend: M rows, K in_features, N out_features, P panels of 64 outputs, S segments of K with scales of their own,
// g = K / S, h = g padded to a multiple of 8. Weight s8 [P, S, h / 4, 64, 4]; 4-bit ones hold two k-quadruples a byte.
//   y[m, n] = sum_s sx sw (acc - zx colsum[n] - zw[n] (rowsum[m] - g zx)),   acc = sum_k u8 * s8
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "amx.h"
#include "epilogue.h"
#include "quantize.h"

namespace viditq {
namespace {

constexpr int64_t kPanel = 64, kRows = 128, kPanelsPerChunk = 8, kChunkBytes = 512 * 1024;

struct Prologue {
  int64_t K;
  bool layernorm;
  float eps;
  const float *mul, *add, *div;  // [M / rows_per_mul, K] twice, [K]
  int64_t rows_per_mul;
  bool empty() const { return !layernorm && !mul && !add && !div; }
};

void transform_row(const Prologue& prologue, int64_t m, float* __restrict row) {
  const int64_t K = prologue.K;
  if (prologue.layernorm) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < K; ++k) sum += row[k];
    const float mean = sum / K;
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < K; ++k) square += (row[k] - mean) * (row[k] - mean);
    const float inverse = 1.0f / std::sqrt(square / K + prologue.eps);
    for (int64_t k = 0; k < K; ++k) row[k] = (row[k] - mean) * inverse;
  }
  const int64_t offset = m / prologue.rows_per_mul * K;
  if (const float* mul = prologue.mul)
    for (int64_t k = 0; k < K; ++k) row[k] *= mul[offset + k];
  if (const float* add = prologue.add)
    for (int64_t k = 0; k < K; ++k) row[k] += add[offset + k];
  if (const float* div = prologue.div)
    for (int64_t k = 0; k < K; ++k) row[k] /= div[k];
}

// The transformed row m: in x itself where there is nothing to do to it, else in `buffer`.
template <typename T>
const float* row_of(const T* x, const Prologue& prologue, int64_t m, float* buffer) {
  const T* from = x + m * prologue.K;
  if constexpr (std::is_same_v<T, float>)
    if (prologue.empty()) return from;
  load_row(from, buffer, prologue.K);
  transform_row(prologue, m, buffer);
  return buffer;
}

struct Quantized {  // codes [S, M, h], so that a product's rows lie close together; grids and sums [M, S]
  std::vector<Grid> grids;
  std::vector<int32_t> sums;
  uint8_t* codes;
};

struct Activations {
  Format format;
  int64_t rows_per_range;    // 1: tokens; M / L: dynamic per tensor
  int64_t ranges;            // per row: 1, or the groups of a row
  const float *scale, *zero_point;  // static: [1] or [ranges]
};

void quantize_segments(const float* row, int64_t m, int64_t M, const Prologue& prologue, const Activations& activations,
                       const Grid* grids, int64_t S, int64_t h, Quantized& out) {
  const int64_t g = prologue.K / S, per_range = S / activations.ranges;
  for (int64_t s = 0; s < S; ++s) {
    uint8_t* codes = out.codes + (s * M + m) * h;
    Grid grid = grids[s / per_range];
    out.sums[m * S + s] = quantize_row(row + s * g, g, grid, activations.format.levels(), codes);
    out.grids[m * S + s] = grid;
    std::fill(codes + g, codes + h, 0);
  }
}

template <typename T>
void quantize(const T* x, int64_t M, const Prologue& prologue, const Activations& activations, int64_t S, int64_t h,
              Quantized& out) {
  const int64_t K = prologue.K, ranges = activations.ranges, span = activations.rows_per_range;
  std::vector<Grid> shared;  // grids known before the rows are: static, or of many rows
  if (activations.scale) {
    const int32_t middle = activations.format.symmetric ? activations.format.middle() : 0;
    for (int64_t i = 0; i < ranges; ++i)
      shared.push_back({activations.scale[i], static_cast<int32_t>(activations.zero_point[i]) + middle});
  } else if (span > 1) {
    std::vector<float> lo(M), hi(M);
    at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(K);
      for (int64_t m = begin; m < end; ++m)
        range_of(row_of(x, prologue, m, buffer.data()), K, lo[m], hi[m]);
    });
    for (int64_t m = 0; m < M; m += span) {
      float least = lo[m], most = hi[m];
      for (int64_t i = m; i < m + span; ++i) {
        least = lo[i] < least || lo[i] != lo[i] ? lo[i] : least;
        most = hi[i] > most || hi[i] != hi[i] ? hi[i] : most;
      }
      shared.push_back(grid_of_range(least, most, activations.format));
    }
  }
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(K);
    std::vector<Grid> own(ranges);
    for (int64_t m = begin; m < end; ++m) {
      const float* row = row_of(x, prologue, m, buffer.data());
      const Grid* grids = own.data();
      if (activations.scale) {
        grids = shared.data();
      } else if (span > 1) {
        grids = shared.data() + m / span;
      } else {
        for (int64_t i = 0; i < ranges; ++i) {
          float lo, hi;
          range_of(row + i * (K / ranges), K / ranges, lo, hi);
          own[i] = grid_of_range(lo, hi, activations.format);
        }
      }
      quantize_segments(row, m, M, prologue, activations, grids, S, h, out);
    }
  });
}

struct Weight {
  const uint8_t* data;
  bool nibbles;
  const float* scale;                  // [S, 64 P]
  const int32_t *colsum, *zero_point;  // [S, 64 P]; zero_point may be null: all 0
  int64_t N, P, S, h;
  int64_t panel_bytes() const { return S * h * kPanel; }  // as int8
};

struct Epilogue {
  const float* bias;  // [N]
  int64_t activation;
  const float* gate;  // [M / rows_per_gate, N]
  int64_t rows_per_gate;
};

void unpack_nibbles(const uint8_t* __restrict from, int64_t bytes, int8_t* __restrict to) {
  for (int64_t i = 0; i < bytes; i += 256)
    for (int64_t j = 0; j < 256; ++j) {
      to[2 * i + j] = static_cast<int8_t>(from[i + j] & 15);
      to[2 * i + 256 + j] = static_cast<int8_t>(from[i + j] >> 4);
    }
}

// y = sx sw (acc - zx colsum - zw rest) for one row of the only segment.
void dequantize_row(const int32_t* __restrict acc, const Weight& weight, int64_t n, int64_t count, Grid grid,
                    int32_t rest, float* __restrict y) {
  const int32_t* __restrict colsum = weight.colsum + n;
  const float* __restrict scale = weight.scale + n;
  const auto exact = [&](int64_t i) { return acc[i] - grid.zero_point * colsum[i]; };
  if (const int32_t* __restrict zero_point = weight.zero_point ? weight.zero_point + n : nullptr)
    for (int64_t i = 0; i < count; ++i) y[i] = (exact(i) - zero_point[i] * rest) * (grid.scale * scale[i]);
  else
    for (int64_t i = 0; i < count; ++i) y[i] = exact(i) * (grid.scale * scale[i]);
}

using Ints = int32_t __attribute__((vector_size(64), aligned(4)));
using Floats = float __attribute__((vector_size(64), aligned(4)));

// y += sx sw (acc - zx colsum - zw rest) for `rows` rows of a panel and segment, whose scales stay in registers.
void accumulate_panel(const int32_t* acc, const Weight& weight, int64_t offset, int64_t rows, const Grid* grids,
                      const int32_t* sums, int64_t step, int32_t size, float* y) {
  Ints colsum[4], zero_point[4] = {};
  Floats scale[4];
  for (int64_t j = 0; j < 4; ++j) {
    colsum[j] = *reinterpret_cast<const Ints*>(weight.colsum + offset + 16 * j);
    scale[j] = *reinterpret_cast<const Floats*>(weight.scale + offset + 16 * j);
    if (weight.zero_point) zero_point[j] = *reinterpret_cast<const Ints*>(weight.zero_point + offset + 16 * j);
  }
  for (int64_t i = 0; i < rows; ++i, acc += kPanel, y += kPanel, grids += step, sums += step) {
    const int32_t zx = grids->zero_point, rest = *sums - size * zx;
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Ints exact = reinterpret_cast<const Ints*>(acc)[j] - colsum[j] * zx - zero_point[j] * rest;
      reinterpret_cast<Floats*>(y)[j] += __builtin_convertvector(exact, Floats) * (scale[j] * grids->scale);
    }
  }
}

template <typename T>
void finish_row(float* __restrict y, float* __restrict buffer, const Epilogue& epilogue, int64_t m, int64_t n,
                int64_t count, int64_t N, const T* addend, const T* residual, T* out) {
  if (const float* bias = epilogue.bias)
    for (int64_t i = 0; i < count; ++i) y[i] += bias[n + i];
  if (addend) {
    load_row(addend + m * N + n, buffer, count);
    for (int64_t i = 0; i < count; ++i) y[i] += buffer[i];
  }
  activate_row(y, count, epilogue.activation);
  if (const float* gate = epilogue.gate) {
    gate += m / epilogue.rows_per_gate * N + n;
    for (int64_t i = 0; i < count; ++i) y[i] *= gate[i];
  }
  if (residual) {
    load_row(residual + m * N + n, buffer, count);
    for (int64_t i = 0; i < count; ++i) y[i] += buffer[i];
  }
  if constexpr (std::is_same_v<T, float>)
    if (y == out + m * N + n) return;
  store_row(y, out + m * N + n, count);
}

// u8 [rows, k] x a panel s8 [k / 4, 64, 4] -> int32 [rows, ldc]; one object per thread and call of the operator.
class Product {
 public:
  Product(int64_t k, bool amx) : k_(k), amx_(amx && k % amx::kDepth == 0) {
    if (amx_) amx::configure();
  }
  ~Product() {
    if (amx_)
      amx::release();
    else
      at::native::cpublas::brgemm_release(true);
  }
  void operator()(int64_t rows, int64_t ldc, const uint8_t* a, const int8_t* b, int32_t* c) const {
    if (amx_) return amx::product(rows, k_, ldc, a, b, c);
    at::native::cpublas::brgemm(rows, kPanel, k_, k_, kPanel, ldc, false, a, reinterpret_cast<const signed char*>(b),
                                c);
  }

 private:
  int64_t k_;
  bool amx_;
};

// Whether a product of extreme codes is exact: brgemm refuses some machines, and where it lacks VNNI pairs saturate.
bool is_exact(bool amx) {
  constexpr int64_t rows = 37, k = 1152, padded = 64;
  std::vector<uint8_t> a(padded * k);
  std::vector<int8_t> b(k * kPanel);
  std::vector<int32_t> c(padded * kPanel);
  for (int64_t i = 0; i < rows * k; ++i) a[i] = i % 5 ? 255 : i % 251;
  for (int64_t i = 0; i < k * kPanel; ++i) b[i] = i % 7 ? (i / 256 % 2 ? 127 : -128) : i % 127;
  try {
    Product(k, amx)(rows, kPanel, a.data(), b.data(), c.data());
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < kPanel; ++n) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += a[i * k + j] * b[j / 4 * 256 + n * 4 + j % 4];
      if (sum != c[i * kPanel + n]) return false;
    }
  return true;
}

// AMX tiles instead of brgemm: set once, by `native_prepare`.
bool use_amx = false;

// Blocks of kRows rows by a chunk of panels; a chunk of weights stays in the second-level cache (and unpacked).
template <typename T>
void multiply(const Quantized& x, const Weight& weight, const Epilogue& epilogue, int64_t M, int64_t K,
              const T* addend, const T* residual, T* out) {
  const int64_t S = weight.S, h = weight.h, N = weight.N, threads = at::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(kChunkBytes / weight.panel_bytes(), 1, kPanelsPerChunk);
  const int64_t blocks = (M + kRows - 1) / kRows;
  const int64_t wanted = std::max<int64_t>(1, weight.P * blocks / (2 * threads));
  const int64_t panels = std::min(fitting, threads > 1 ? wanted : fitting);
  const int64_t chunks = (weight.P + panels - 1) / panels, width = panels * kPanel;
  // rows of a power of two would share few lines of the first-level cache
  const int64_t ldc = S > 1 ? kPanel : width + 16;
  at::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> acc(kRows * ldc);
    std::vector<float> y(S > 1 ? kRows * kPanel : width), buffer(width);
    std::vector<int8_t> unpacked(weight.nibbles ? panels * weight.panel_bytes() : 0);
    const Product product(h, use_amx);
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, m0 = task % blocks * kRows, rows = std::min(kRows, M - m0);
      const int64_t p0 = chunk * panels, p1 = std::min(p0 + panels, weight.P), n0 = p0 * kPanel;
      const int8_t* b = reinterpret_cast<const int8_t*>(weight.data) + p0 * weight.panel_bytes();
      if (weight.nibbles) {
        const int64_t bytes = weight.panel_bytes() / 2;
        if (held != chunk) unpack_nibbles(weight.data + p0 * bytes, (p1 - p0) * bytes, unpacked.data());
        held = chunk;
        b = unpacked.data();
      }
      const uint8_t* a = x.codes + m0 * h;
      const Grid* grids = x.grids.data() + m0 * S;
      const int32_t* sums = x.sums.data() + m0 * S;
      const int32_t size = static_cast<int32_t>(K / S);
      if (S == 1) {
        const int64_t count = std::min(p1 * kPanel, N) - n0;
        for (int64_t p = p0; p < p1; ++p, b += h * kPanel)
          product(rows, ldc, a, b, acc.data() + (p - p0) * kPanel);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = y.data();
          if constexpr (std::is_same_v<T, float>) row = out + (m0 + i) * N + n0;
          dequantize_row(acc.data() + i * ldc, weight, n0, count, grids[i], sums[i] - size * grids[i].zero_point, row);
          finish_row(row, buffer.data(), epilogue, m0 + i, n0, count, N, addend, residual, out);
        }
        continue;
      }
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t n = p * kPanel, count = std::min(kPanel, N - n);
        std::fill_n(y.data(), rows * kPanel, 0.0f);
        for (int64_t s = 0; s < S; ++s, b += h * kPanel) {
          product(rows, ldc, a + s * M * h, b, acc.data());
          accumulate_panel(acc.data(), weight, s * weight.P * kPanel + n, rows, grids + s, sums + s, S, size, y.data());
        }
        for (int64_t i = 0; i < rows; ++i)
          finish_row(y.data() + i * kPanel, buffer.data(), epilogue, m0 + i, n, count, N, addend, residual, out);
      }
    }
  });
}

const float* floats(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->scalar_type() == at::kFloat && tensor->is_contiguous(), "viditq::linear: float32, contiguous");
  return tensor->const_data_ptr<float>();
}

int64_t rows_per(const std::optional<at::Tensor>& tensor, int64_t M, int64_t width) {
  if (!tensor || M == 0) return 1;
  const int64_t count = tensor->numel() / width;
  TORCH_CHECK(tensor->numel() % width == 0 && count > 0 && M % count == 0,
              "viditq::linear: ", M, " rows do not divide by a modulation of shape ", tensor->sizes());
  return M / count;
}

Prologue prologue_of(int64_t K, int64_t M, double layernorm_eps, const std::optional<at::Tensor>& mul,
                     const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& div) {
  TORCH_CHECK(!mul || !add || mul->numel() == add->numel(), "viditq::linear: mul and add differ in shape");
  TORCH_CHECK(!div || div->numel() == K, "viditq::linear: div is not of x's width");
  return {K, layernorm_eps >= 0, static_cast<float>(layernorm_eps), floats(mul), floats(add), floats(div),
          rows_per(mul ? mul : add, M, K)};
}

template <typename F>
void with_type(at::ScalarType type, F&& run) {
  if (type == at::kFloat) return run(float{});
  if (type == at::kBFloat16) return run(c10::BFloat16{});
  TORCH_CHECK(type == at::kHalf, "viditq::linear takes float32, bfloat16 and float16, not ", type);
  run(c10::Half{});
}

at::Tensor linear(const at::Tensor& x_in, const at::Tensor& weight_in, const at::Tensor& scale,
                  const at::Tensor& colsum, const std::optional<at::Tensor>& zero_point,
                  const std::optional<at::Tensor>& bias, int64_t out_features, int64_t act_bits, bool act_symmetric,
                  int64_t act_groups, bool act_per_tensor, const std::optional<at::Tensor>& input_scale,
                  const std::optional<at::Tensor>& input_zero_point, double layernorm_eps,
                  const std::optional<at::Tensor>& mul, const std::optional<at::Tensor>& add,
                  const std::optional<at::Tensor>& div, const std::optional<at::Tensor>& addend, int64_t activation,
                  const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& residual,
                  at::ScalarType out_type) {
  const at::Tensor x = x_in.contiguous();
  const int64_t K = x.size(-1), N = out_features;
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor out = at::empty(shape, x.options().dtype(out_type));
  const int64_t M = out.numel() / std::max<int64_t>(N, 1);
  if (out.numel() == 0) return out;

  const bool nibbles = weight_in.scalar_type() == at::kByte;
  const Weight weight{static_cast<const uint8_t*>(weight_in.const_data_ptr()), nibbles, floats(scale),
                      colsum.const_data_ptr<int32_t>(), zero_point ? zero_point->const_data_ptr<int32_t>() : nullptr,
                      N, weight_in.size(0), weight_in.size(1), weight_in.size(2) * (nibbles ? 8 : 4)};
  TORCH_CHECK(weight_in.is_contiguous() && K % weight.S == 0 && K / weight.S <= weight.h && N <= weight.P * kPanel &&
                  weight.S % act_groups == 0,
              "viditq::linear: x ", x.sizes(), " does not fit the packed weight ", weight_in.sizes());
  const Prologue prologue = prologue_of(K, M, layernorm_eps, mul, add, div);
  const int64_t span = act_per_tensor && x.dim() > 1 ? M / x.size(0) : 1;
  const Activations activations{{act_bits, act_symmetric}, span, act_groups, floats(input_scale),
                                floats(input_zero_point)};
  const Epilogue epilogue{floats(bias), activation, floats(gate), rows_per(gate, M, N)};

  const at::Tensor codes = at::empty({M * weight.S + amx::kBlock, weight.h}, x.options().dtype(at::kByte));
  Quantized quantized{std::vector<Grid>(M * weight.S), std::vector<int32_t>(M * weight.S),
                      codes.data_ptr<uint8_t>()};
  with_type(x.scalar_type(), [&](auto type) {
    quantize(x.const_data_ptr<decltype(type)>(), M, prologue, activations, weight.S, weight.h, quantized);
  });
  with_type(out_type, [&](auto type) {
    using T = decltype(type);
    const auto data = [&](const std::optional<at::Tensor>& tensor) -> const T* {
      if (!tensor) return nullptr;
      TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == M * N, "viditq::linear: addend or residual");
      return tensor->const_data_ptr<T>();
    };
    multiply<T>(quantized, weight, epilogue, M, K, data(addend), data(residual), out.data_ptr<T>());
  });
  return out;
}

// What `linear` quantizes, in float32, for what has to be done to it in between: a rotation, a low-rank branch.
at::Tensor transform(const at::Tensor& x_in, double layernorm_eps, const std::optional<at::Tensor>& mul,
                     const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& div) {
  const at::Tensor x = x_in.contiguous();
  const int64_t K = x.size(-1), M = x.numel() / std::max<int64_t>(K, 1);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const Prologue prologue = prologue_of(K, M, layernorm_eps, mul, add, div);
  float* to = out.data_ptr<float>();
  with_type(x.scalar_type(), [&](auto type) {
    const auto* from = x.const_data_ptr<decltype(type)>();
    at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        load_row(from + m * K, to + m * K, K);
        transform_row(prologue, m, to + m * K);
      }
    });
  });
  return out;
}

// How products are computed from now on, "amx" (if allowed and right here) or "brgemm"; "" = not exactly in any way.
std::string prepare(bool allow_amx) {
  use_amx = allow_amx && amx::granted() && is_exact(true);
  return use_amx ? "amx" : is_exact(false) ? "brgemm" : "";
}

}  // namespace
}  // namespace viditq

TORCH_LIBRARY_FRAGMENT(viditq, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor scale, Tensor colsum, Tensor? zero_point, Tensor? bias, "
      "int out_features, int act_bits, bool act_symmetric, int act_groups, bool act_per_tensor, Tensor? input_scale, "
      "Tensor? input_zero_point, float layernorm_eps, Tensor? mul, Tensor? add, Tensor? div, Tensor? addend, "
      "int activation, Tensor? gate, Tensor? residual, ScalarType out_dtype) -> Tensor");
  m.def("transform(Tensor x, float layernorm_eps, Tensor? mul, Tensor? add, Tensor? div) -> Tensor");
  m.def("native_prepare(bool allow_amx) -> str", viditq::prepare);
}

TORCH_LIBRARY_IMPL(viditq, CPU, m) {
  m.impl("linear", viditq::linear);
  m.impl("transform", viditq::transform);
}
