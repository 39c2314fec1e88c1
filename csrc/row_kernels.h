// Loops over one block of a row of logits, each in three builds (AVX512, AVX2 with FMA, portable) chosen at run time.
//
// A block has up to kBlock columns. Sums are float32 within kPiece or kShort columns and double across them. Symbols:
//
//   u = cap(logit + bias)    z = u / temperature    base = a value of u near its maximum    inverse = 1 / temperature
//   exp((u - base) * inverse) is exactly 0 below e^-87; all functions propagate NaN.

#pragma once

#include <cstdint>
#include <cstring>

namespace rmsd {

constexpr int64_t kBlock = 2048;  // 8 KB of float32: three such buffers stay in L1
constexpr int64_t kPiece = 512;   // at most 128 numbers in sequence are summed in float32 (4 lanes)
constexpr int64_t kShort = 128;   // for sums of which large parts cancel later

// The instruction sets of the loops; also the argument and result of the op cpu_level.
enum CpuLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
// Limits the instruction set to `limit` from now on, and to the support of the processor; returns the level in use.
int limit_cpu_level(int limit);
int cpu_level();

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline void from_float(float x, float* to) { *to = x; }
// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline void from_float(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

struct Sums {
  float top;  // maximum of u, ignoring NaN
  double s;   // sum of e = exp((u - base) * inverse), correct only if top <= base
  double w;   // sum of e * (u - base) * inverse
  double k;   // only sums_against: sum of e * ((u - base) * inverse - other - shift), where e = 0 adds 0
};

struct PairSums {
  float top_a, top_b;
  double s_a, s_b;
  double k;  // sum of e_a * (z_a - base_a - (z_b - base_b)), where e_a = 0 adds 0
};

// exp(z) * (slope_of_log * log p + constant - other_coef * log r) with z = (u - c) * inverse, log p = z + log_offset.
// The coefficients include the factors 1/sum and 1/temperature.
struct GradientTerms {
  float c, inverse, log_offset, slope_of_log, constant, other_coef;
};

// Two distributions over a block: log q = (u_q - c_q) * inverse + d_q, and the same for p.
struct Mixture {
  float c_q, d_q, c_p, d_p, inverse;
  float share;  // M = share * p + (1 - share) * q, 0 < share < 1
};

struct MixtureSums {
  double p_log_ratio;  // sum of p * log(p / M)
  double q_log_ratio;  // sum of q * log(q / M)
  double overlap;      // sum of q * p / M
};

void load_bf16(const uint16_t* x, int64_t n, float* u);
void store_bf16(const float* u, int64_t n, uint16_t* x);
// out = u + bias; out may be u.
void add_bias(const float* u, const float* bias, int64_t n, float* out);
// out = softcap * tanh(u / softcap), and slope, if not null, = 1 - tanh^2; out may be u.
void cap(const float* u, int64_t n, float softcap, float* out, float* slope);
// log_r = (u - c) * inverse + d.
void log_ratios(const float* u, int64_t n, float c, float inverse, float d, float* log_r);

Sums sums(const float* u, int64_t n, float base, float inverse);
Sums sums(const uint16_t* u, int64_t n, float base, float inverse);
Sums sums_against(const float* u, const float* other, int64_t n, float base, float inverse, float shift);
PairSums pair_sums(const float* a, const float* b, int64_t n, float base_a, float base_b, float inverse);
MixtureSums mixture_sums(const float* q, const float* p, int64_t n, const Mixture& m);

// x = factor * exp((x - c) * inverse), in place.
void scaled_exp(float* x, int64_t n, float c, float inverse, float factor);
void scaled_exp(uint16_t* x, int64_t n, float c, float inverse, float factor);
// The same as with GradientTerms, but without log r.
void entropy_gradient(float* x, int64_t n, const GradientTerms& t);
void entropy_gradient(uint16_t* x, int64_t n, const GradientTerms& t);
// g = the expression of GradientTerms for u and log_r (null: no such term), times slope (null: 1). g may be u.
void general_gradient(const float* u, const float* log_r, const float* slope, int64_t n, const GradientTerms& t,
                      float* g);

// Gradients of divergences; g may be q.
void forward_kl_gradient(const float* q, const float* p, int64_t n, const Mixture& m, float factor, float* g);
void reverse_kl_gradient(const float* q, const float* p, int64_t n, const Mixture& m, float value, float factor,
                         float* g);
// factor * q * (log(q / M) - mean), and factor * q * (mean - p / M).
void jsd_gradient(const float* q, const float* p, int64_t n, const Mixture& m, float mean, float factor, float* g);
void skew_gradient(const float* q, const float* p, int64_t n, const Mixture& m, float mean, float factor, float* g);

}  // namespace rmsd
