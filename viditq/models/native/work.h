// What both ways of attention work on: sizes, rows of a head, memory.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>

#include "softmax.h"

namespace viditq {

struct Sizes {
  int64_t B, H, Lq, Lk, D, kv_heads;
  float scale;  // in units of log2
  bool masked;
};

template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// One head: rows are tokens.
template <typename T, typename U>
struct Head {
  Rows<const T> Q, K, V;
  Rows<U> O;
  Mask mask;
};

// Memory at a multiple of 64 bytes, not set.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) {
    const int64_t bytes = round_up(size * sizeof(T), 64);
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    TORCH_CHECK(data_, "viditq::attention: no memory for ", bytes, " bytes");
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace viditq
