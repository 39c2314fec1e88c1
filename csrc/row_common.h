// Shared code of the row ops: reading a row as float32 blocks, and argument checks.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "row_kernels.h"

namespace rmsd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGrain = 64 * 1024;  // with fewer logits per task, threads cost more than they save

inline int64_t rows_per_task(int64_t vocab) { return std::max<int64_t>(1, kGrain / vocab); }

// Prefetches the block after the block at x. The hardware prefetcher stops at each page, and does not read far enough
// ahead in these slow loops.
template <typename T>
void prefetch_next_block(const T* x, int64_t n) {
  const char* next = reinterpret_cast<const char*>(x + n);
  for (int64_t i = 0; i < static_cast<int64_t>(n * sizeof(T)); i += 64) {
    __builtin_prefetch(next + i, 0, 3);
  }
}

// Returns a block of x as float32: x itself if it is float32, otherwise `buffer`.
inline const float* as_floats(const float* x, int64_t, float*) { return x; }
inline const float* as_floats(const uint16_t* x, int64_t n, float* buffer) {
  load_bf16(x, n, buffer);
  return buffer;
}

// Checks for [n, V], float32 or bfloat16, with adjacent columns and rows that do not overlap.
inline void check_logits(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, op, ": ", name,
                  ": expected float32 or bfloat16");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) > 0, op, ": ", name, ": expected shape [n, V], V >= 1");
  STD_TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, op, ": ", name,
                  ": expected adjacent columns (stride 1), got stride ", t.stride(1));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), op, ": ", name, ": rows overlap: stride ", t.stride(0));
}

// Returns the data of a contiguous vector of `size` numbers.
template <typename T = float>
const T* vector_data(const char* op, const char* name, const Tensor& t, int64_t size) {
  constexpr ScalarType kType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long;
  STD_TORCH_CHECK(t.scalar_type() == kType, op, ": ", name, ": expected ",
                  kType == ScalarType::Float ? "float32" : "int64");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, ": expected shape [", size, "]");
  STD_TORCH_CHECK(size <= 1 || t.stride(0) == 1, op, ": ", name, ": expected a contiguous vector, got stride ",
                  t.stride(0));
  return t.const_data_ptr<T>();
}

inline const float* vector_data(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size) {
  return t.has_value() ? vector_data<float>(op, name, *t, size) : nullptr;
}

}  // namespace rmsd
