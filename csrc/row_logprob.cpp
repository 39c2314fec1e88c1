// Log-probability of one target per row, and entropy of the row, from logits: the CPU op behind linear_logprob without a gradient.
//
//   z = logits[t] / temperature[t]        m = max z,  s = sum exp(z - m),  w = sum exp(z - m) (z - m)
//   logp[t] = (z[target] - m) - log s     entropy[t] = log s - w / s
//
// logits [T, V] float32 or bfloat16, targets [T] int64, temperature [T] float32 -> logp, entropy [T] float32.
// The logits are read once from memory (T*V*sizeof bytes) and nothing of their size is written: each block of a row is
// brought to float32 in L1, its maximum taken, then m, s and w are moved to the new maximum and the block is added.
// Written against torch's stable ABI (torch >= 2.11); no Python headers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>

namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 2048;        // 8 KB of float32: stays in L1 between the two sweeps over it
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 64 * 1024;   // logits per task below which threads cost more than they bring

struct RowResult {
  float logp;
  float entropy;
};

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// exp(x) for x <= 0 without a call, so that the loops below vectorise. Below -87 the result would be denormal; clamping
// there adds at most 1.7e-38 per masked (-inf) logit. NaN goes through. Cody-Waite reduction to |r| <= ln2/2, then the
// degree-6 Taylor polynomial, whose truncation error there is below 2e-7 of the value.
inline __attribute__((always_inline)) float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;  // 2^n as a float; the rounding constant's own bits are shifted out
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

template <typename T>
inline __attribute__((always_inline)) RowResult row(const T* x, int64_t vocab, int64_t target, float temperature) {
  const float inverse = 1.0f / temperature;
  float block[kBlock];
  float m = kMinusInf;  // in logit units; z - m = (x - m) * inverse
  double s = 0.0, w = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    float top = m;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) {
      block[i] = to_float(x[start + i]);
      top = top < block[i] ? block[i] : top;
    }
    if (top > m) {
      // Before the first live logit s and w hold nothing but the clamped dust of masked ones (or a NaN, which stays).
      const double step = m == kMinusInf ? 0.0 : (static_cast<double>(m) - top) * inverse;
      const double shrink = m == kMinusInf ? 0.0 : std::exp(step);
      w = shrink * (w + s * step);
      s *= shrink;
      m = top;
    }
    const float base = m == kMinusInf ? 0.0f : m;
    float s_block = 0.0f, w_block = 0.0f;
#pragma omp simd reduction(+ : s_block, w_block)
    for (int64_t i = 0; i < n; ++i) {
      const float z = (block[i] - base) * inverse;
      const float e = exp_nonpositive(z);
      s_block += e;
      w_block += e * (z < -87.0f ? -87.0f : z);
    }
    s += s_block;
    w += w_block;
  }
  if (m == kMinusInf) {
    s = std::numeric_limits<double>::quiet_NaN();
  }
  const double log_s = std::log(s);
  const double z_target = (static_cast<double>(to_float(x[target])) - m) * inverse;
  return {static_cast<float>(z_target - log_s), static_cast<float>(log_s - w / s)};
}

// The instruction set is chosen when the library is loaded, so one wheel runs everywhere. Needs ifuncs (glibc on x86).
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__clang__) || defined(__GNUC__))
#define CPU_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CPU_CLONES
#endif

CPU_CLONES RowResult row_f32(const float* x, int64_t vocab, int64_t target, float temperature) {
  return row(x, vocab, target, temperature);
}
CPU_CLONES RowResult row_bf16(const uint16_t* x, int64_t vocab, int64_t target, float temperature) {
  return row(x, vocab, target, temperature);
}

std::tuple<Tensor, Tensor> row_logprob(const Tensor& logits_in, const Tensor& targets_in, const Tensor& temperature_in) {
  using torch::headeronly::ScalarType;
  const auto dtype = logits_in.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "row_logprob: logits: expected float32 or bfloat16");
  STD_TORCH_CHECK(targets_in.scalar_type() == ScalarType::Long, "row_logprob: targets: expected int64");
  STD_TORCH_CHECK(temperature_in.scalar_type() == ScalarType::Float, "row_logprob: temperature: expected float32");
  STD_TORCH_CHECK(logits_in.dim() == 2 && logits_in.size(1) > 0, "row_logprob: logits: expected shape [T, V], V >= 1");
  const int64_t rows = logits_in.size(0), vocab = logits_in.size(1);
  STD_TORCH_CHECK(targets_in.dim() == 1 && targets_in.size(0) == rows && temperature_in.dim() == 1 &&
                      temperature_in.size(0) == rows,
                  "row_logprob: targets and temperature: expected shape [", rows, "]");

  // Rows may be any distance apart (a slice of a larger buffer); only logits strided within a row are copied.
  const Tensor logits = logits_in.stride(1) == 1 || vocab == 1 ? logits_in : torch::stable::contiguous(logits_in);
  const Tensor targets = torch::stable::contiguous(targets_in);
  const Tensor temperature = torch::stable::contiguous(temperature_in);
  const int64_t stride = logits.stride(0);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float* temp = temperature.const_data_ptr<float>();
  for (int64_t t = 0; t < rows; ++t) {
    STD_TORCH_CHECK(target[t] >= 0 && target[t] < vocab, "row_logprob: targets[", t, "]: expected 0 to ", vocab - 1,
                    ", got ", target[t]);
    STD_TORCH_CHECK(temp[t] > 0.0f && std::isfinite(temp[t]), "row_logprob: temperature[", t,
                    "]: expected a finite positive number, got ", temp[t]);
  }

  Tensor logp = torch::stable::new_empty(temperature, {rows});
  Tensor entropy = torch::stable::new_empty(temperature, {rows});
  float* logp_out = logp.mutable_data_ptr<float>();
  float* entropy_out = entropy.mutable_data_ptr<float>();
  const void* data = logits.const_data_ptr();
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / vocab), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const RowResult r = dtype == ScalarType::Float
          ? row_f32(static_cast<const float*>(data) + t * stride, vocab, target[t], temp[t])
          : row_bf16(static_cast<const uint16_t*>(data) + t * stride, vocab, target[t], temp[t]);
      logp_out[t] = r.logp;
      entropy_out[t] = r.entropy;
    }
  });
  return {logp, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rmsd_kernels, m) {
  m.def("row_logprob(Tensor logits, Tensor targets, Tensor temperature) -> (Tensor logp, Tensor entropy)");
}

STABLE_TORCH_LIBRARY_IMPL(rmsd_kernels, CPU, m) {
  m.impl("row_logprob", TORCH_BOX(&row_logprob));
}
