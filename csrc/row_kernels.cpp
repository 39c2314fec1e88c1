// The loops of row_kernels.h. Each body is inlined into one function per instruction set, so that one library runs on
// all processors and all builds can be tested on one machine. GCC needs -fopenmp-simd to reorder the marked sums.

#include "row_kernels.h"

#include <algorithm>
#include <limits>

#define INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && (defined(__clang__) || defined(__GNUC__))
#define TARGET_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#if defined(__clang__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#else
#define TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")))
#endif
#else
#define TARGET_AVX2
#define TARGET_AVX512
#endif

namespace rmsd {
namespace {

int detect_cpu_level() {
#if defined(__x86_64__) && (defined(__clang__) || defined(__GNUC__))
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
    return kPortable;
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? kAvx512
             : kAvx2;
#else
  return kPortable;
#endif
}

const int kDetected = detect_cpu_level();
int level = kDetected;

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kSmallestExponent = -87.0f;  // e^-87 = 1.6e-38 is a normal float32
constexpr float kRound = 12582912.0f;        // 1.5 * 2^23: adding it puts the nearest integer into the low bits
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// e^x = scale * (1 + q): Cody-Waite reduction to |r| <= ln2/2, and q = e^r - 1 by a degree-6 polynomial fitted to a
// relative error of 1.3e-8.
struct ScaledExp {
  float scale, q;
};

INLINE ScaledExp split_exp(float x) {
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  float r = x - n * kLn2High;
  r = r - n * kLn2Low;
  float p = 1.388251640354441e-3f;
  p = p * r + 8.366547264814284e-3f;
  p = p * r + 4.1667200716785036e-2f;
  p = p * r + 0.1666654342325205f;
  p = p * r + 0.4999999814959416f;
  // The shift removes the bits of the rounding constant from the exponent.
  return {as_float((as_bits(shifted) << 23) + 0x3f800000u), p * (r * r) + r};
}

// Returns max(z, -88), and NaN for NaN. The exponential is already 0 at -88, and 0 times a finite number is 0.
INLINE float bounded(float z) { return z < -88.0f ? -88.0f : z; }

// Returns e^z for z <= 0 (or slightly above), and 0 below kSmallestExponent.
INLINE float exp_or_zero(float z) {
  const ScaledExp e = split_exp(z);
  const float value = e.scale * e.q + e.scale;
  return z < kSmallestExponent ? 0.0f : value;
}

// Returns log x for 0 < x <= 1: x = 2^e * (1 + f), 1/sqrt2 <= 1 + f < sqrt2; the polynomial's relative error is 6e-9.
INLINE float log_positive(float x) {
  const int32_t e = static_cast<int32_t>(as_bits(x) - 0x3f3504f3u) >> 23;
  const float f = as_float(as_bits(x) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  float p = -7.634497306345576e-2f;
  p = p * f + 0.12761582333706187f;
  p = p * f - 0.1316018464411004f;
  p = p * f + 0.14201757454071617f;
  p = p * f - 0.16623357068170128f;
  p = p * f + 0.20001226889962456f;
  p = p * f - 0.25000821042028665f;
  p = p * f + 0.3333333170761821f;
  const float n = static_cast<float>(e), square = f * f;
  return n * kLn2High + (f + (n * kLn2Low + (square * f * p - 0.5f * square)));
}

// Prefetches the data that the loop will read `ahead` bytes later. The rows come from memory, and the hardware
// prefetcher stops at every 4 KB page. On AVX512, this saves 20% of the time of the first pass over rows in memory
// (measured).
constexpr int64_t kAhead = 2048;
INLINE void prefetch(const void* from, int64_t bytes, int64_t ahead) {
  const char* p = static_cast<const char*>(from) + ahead;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p + i, 0, 3);
  }
}

// Returns a piece of a row as float32. The conversion is a separate loop, because the loop below would use vectors of
// half the width if it contained a 16-bit type.
INLINE const float* as_floats(const float* u, int64_t, float*) { return u; }
INLINE const float* as_floats(const uint16_t* u, int64_t n, float* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = to_float(u[i]);
  }
  return buffer;
}

template <typename T>
INLINE Sums sums_body(const T* u, int64_t n, float base, float inverse) {
  alignas(64) float buffer[kPiece];
  Sums total{kMinusInf, 0.0, 0.0, 0.0};
  for (int64_t start = 0; start < n; start += kPiece) {
    prefetch(u + start, kPiece * sizeof(T), kAhead);
    const int64_t size = std::min(kPiece, n - start);
    const float* piece = as_floats(u + start, size, buffer);
    float top = kMinusInf, s = 0.0f, w = 0.0f;
#pragma omp simd reduction(max : top) reduction(+ : s, w)
    for (int64_t i = 0; i < size; ++i) {
      const float x = piece[i];
      top = top < x ? x : top;
      float z = (x - base) * inverse;
      // This is cheaper than exact zeros: a masked logit adds at most 1.7e-38 to a sum of at least 1.
      z = z < kSmallestExponent ? kSmallestExponent : z;
      const ScaledExp split = split_exp(z);
      const float e = split.scale * split.q + split.scale;
      s += e;
      w += e * z;
    }
    total = {std::max(total.top, top), total.s + s, total.w + w, 0.0};
  }
  return total;
}

INLINE Sums sums_against_body(const float* u, const float* other, int64_t n, float base, float inverse, float shift) {
  Sums total{kMinusInf, 0.0, 0.0, 0.0};
  for (int64_t start = 0; start < n; start += kShort) {
    float top = kMinusInf, s = 0.0f, w = 0.0f, k = 0.0f;
    const int64_t end = std::min(n, start + kShort);
#pragma omp simd reduction(max : top) reduction(+ : s, w, k)
    for (int64_t i = start; i < end; ++i) {
      const float x = u[i];
      top = top < x ? x : top;
      const float z = bounded((x - base) * inverse);
      const float e = exp_or_zero(z);
      s += e;
      w += e * z;
      k += e == 0.0f ? 0.0f : e * (z - other[i] - shift);
    }
    total = {std::max(total.top, top), total.s + s, total.w + w, total.k + k};
  }
  return total;
}

INLINE PairSums pair_sums_body(const float* a, const float* b, int64_t n, float base_a, float base_b, float inverse) {
  PairSums total{kMinusInf, kMinusInf, 0.0, 0.0, 0.0};
  for (int64_t start = 0; start < n; start += kShort) {
    float top_a = kMinusInf, top_b = kMinusInf, s_a = 0.0f, s_b = 0.0f, k = 0.0f;
    const int64_t end = std::min(n, start + kShort);
#pragma omp simd reduction(max : top_a, top_b) reduction(+ : s_a, s_b, k)
    for (int64_t i = start; i < end; ++i) {
      const float x_a = a[i], x_b = b[i];
      top_a = top_a < x_a ? x_a : top_a;
      top_b = top_b < x_b ? x_b : top_b;
      const float z_a = (x_a - base_a) * inverse, z_b = (x_b - base_b) * inverse;
      const float e_a = exp_or_zero(bounded(z_a));
      s_a += e_a;
      s_b += exp_or_zero(bounded(z_b));
      k += e_a == 0.0f ? 0.0f : e_a * (z_a - z_b);
    }
    total = {std::max(total.top_a, top_a), std::max(total.top_b, top_b), total.s_a + s_a, total.s_b + s_b, total.k + k};
  }
  return total;
}

struct Mixed {
  float q, p, q_log_ratio, p_log_ratio;  // log(q / M) and log(p / M), 0 where q or p is 0
};

// log M, starting from its larger term: log(w1 e^l1 + w2 e^l2) = l1 + log(w1 + w2 e^(l2 - l1)).
INLINE Mixed mix(float u_q, float u_p, const Mixture& m) {
  const float log_q = (u_q - m.c_q) * m.inverse + m.d_q, log_p = (u_p - m.c_p) * m.inverse + m.d_p;
  const float difference = log_p - log_q;
  const bool p_larger = difference > 0.0f;
  const float first = p_larger ? m.share : 1.0f - m.share, second = p_larger ? 1.0f - m.share : m.share;
  const float gap = log_positive(first + second * exp_or_zero(bounded(p_larger ? -difference : difference)));
  const float q = exp_or_zero(bounded(log_q)), p = exp_or_zero(bounded(log_p));
  const float of_q = p_larger ? -difference - gap : -gap, of_p = p_larger ? -gap : difference - gap;
  return {q, p, q == 0.0f ? 0.0f : of_q, p == 0.0f ? 0.0f : of_p};
}

INLINE MixtureSums mixture_sums_body(const float* q, const float* p, int64_t n, const Mixture& terms) {
  const Mixture m = terms;
  MixtureSums total{0.0, 0.0, 0.0};
  for (int64_t start = 0; start < n; start += kShort) {
    float p_sum = 0.0f, q_sum = 0.0f, overlap = 0.0f;
    const int64_t end = std::min(n, start + kShort);
#pragma omp simd reduction(+ : p_sum, q_sum, overlap)
    for (int64_t i = start; i < end; ++i) {
      const Mixed v = mix(q[i], p[i], m);
      p_sum += v.p * v.p_log_ratio;
      q_sum += v.q * v.q_log_ratio;
      overlap += v.p == 0.0f ? v.p : v.q * exp_or_zero(bounded(v.p_log_ratio));
    }
    total = {total.p_log_ratio + p_sum, total.q_log_ratio + q_sum, total.overlap + overlap};
  }
  return total;
}

INLINE void load_bf16_body(const uint16_t* x, int64_t n, float* u) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    u[i] = to_float(x[i]);
  }
}

INLINE void store_bf16_body(const float* u, int64_t n, uint16_t* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    from_float(u[i], &x[i]);
  }
}

INLINE void add_bias_body(const float* u, const float* bias, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = u[i] + bias[i];
  }
}

// With e = e^(-2|a|) and t = e - 1, tanh |a| = -t / (2 + t) = 1 - 2 e / (2 + t). The first form is accurate near 0; the
// second form rounds only once where tanh is near 1. 1 - tanh^2 = 4 e / (2 + t)^2.
template <bool kSlope>
INLINE void cap_body(const float* u, int64_t n, float softcap, float* out, float* slope) {
  const float factor = -2.0f / softcap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = u[i];
    const float a = as_float(as_bits(x) & 0x7fffffffu) * factor;
    const ScaledExp split = split_exp(a < kSmallestExponent ? kSmallestExponent : a);
    const float t = split.scale * split.q + (split.scale - 1.0f), e = split.scale * split.q + split.scale;
    const bool small = a > -1.0f;
    float ratio = small ? -t : 2.0f * e;
    if constexpr (kSlope) {
      // Use one division for both. The gradient tolerates an additional rounding; the log-sum-exp does not.
      const float below = 1.0f / (2.0f + t);
      slope[i] = 4.0f * e * below * below;
      ratio *= below;
    } else {
      ratio /= 2.0f + t;
    }
    out[i] = as_float(as_bits(softcap * (small ? ratio : 1.0f - ratio)) | (as_bits(x) & 0x80000000u));
  }
}

INLINE void log_ratios_body(const float* u, int64_t n, float c, float inverse, float d, float* log_r) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    log_r[i] = (u[i] - c) * inverse + d;
  }
}

template <typename T>
INLINE void scaled_exp_body(T* x, int64_t n, float c, float inverse, float factor) {
  for (int64_t start = 0; start < n; start += kPiece) {
    prefetch(x + start, kPiece * sizeof(T), kAhead);
    const int64_t end = std::min(n, start + kPiece);
#pragma omp simd
    for (int64_t i = start; i < end; ++i) {
      from_float(factor * exp_or_zero((to_float(x[i]) - c) * inverse), &x[i]);
    }
  }
}

template <typename T>
INLINE void entropy_gradient_body(T* x, int64_t n, const GradientTerms& terms) {
  const GradientTerms t = terms;
  for (int64_t start = 0; start < n; start += kPiece) {
    prefetch(x + start, kPiece * sizeof(T), kAhead);
    const int64_t end = std::min(n, start + kPiece);
#pragma omp simd
    for (int64_t i = start; i < end; ++i) {
      const float z = bounded((to_float(x[i]) - t.c) * t.inverse);
      from_float(exp_or_zero(z) * (t.slope_of_log * (z + t.log_offset) + t.constant), &x[i]);
    }
  }
}

template <bool kOther>
INLINE void general_gradient_body(const float* u, const float* log_r, int64_t n, const GradientTerms& terms, float* g) {
  const GradientTerms t = terms;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float z = bounded((u[i] - t.c) * t.inverse);
    const float e = exp_or_zero(z);
    float inner = t.slope_of_log * (z + t.log_offset) + t.constant;
    if constexpr (kOther) {
      inner -= t.other_coef * log_r[i];
    }
    g[i] = e == 0.0f ? 0.0f : e * inner;
  }
}

INLINE void multiply_body(float* g, const float* slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    g[i] *= slope[i];
  }
}

INLINE void forward_kl_gradient_body(const float* q, const float* p, int64_t n, const Mixture& mixture, float factor,
                                     float* g) {
  const Mixture m = mixture;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float q_i = exp_or_zero(bounded((q[i] - m.c_q) * m.inverse + m.d_q));
    const float p_i = exp_or_zero(bounded((p[i] - m.c_p) * m.inverse + m.d_p));
    g[i] = factor * (q_i - p_i);
  }
}

INLINE void reverse_kl_gradient_body(const float* q, const float* p, int64_t n, const Mixture& mixture, float value,
                                     float factor, float* g) {
  const Mixture m = mixture;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float log_q = bounded((q[i] - m.c_q) * m.inverse + m.d_q), log_p = (p[i] - m.c_p) * m.inverse + m.d_p;
    const float q_i = exp_or_zero(log_q);
    g[i] = q_i == 0.0f ? 0.0f : factor * q_i * (log_q - log_p - value);
  }
}

INLINE void jsd_gradient_body(const float* q, const float* p, int64_t n, const Mixture& mixture, float mean,
                              float factor, float* g) {
  const Mixture m = mixture;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Mixed v = mix(q[i], p[i], m);
    g[i] = factor * v.q * (v.q_log_ratio - mean);
  }
}

INLINE void skew_gradient_body(const float* q, const float* p, int64_t n, const Mixture& mixture, float mean,
                               float factor, float* g) {
  const Mixture m = mixture;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Mixed v = mix(q[i], p[i], m);
    const float ratio = v.p == 0.0f ? v.p : exp_or_zero(bounded(v.p_log_ratio));
    g[i] = factor * v.q * (mean - ratio);
  }
}

}  // namespace

int limit_cpu_level(int limit) { return level = std::clamp(limit, static_cast<int>(kPortable), kDetected); }

int cpu_level() { return level; }

// Defines the function in three builds, and the function in row_kernels.h that chooses among them.
#define DISPATCH(returns, name, label, body, parameters, arguments)                                    \
  namespace {                                                                                          \
  TARGET_AVX512 __attribute__((noinline)) returns label##_avx512 parameters { return body arguments; } \
  TARGET_AVX2 __attribute__((noinline)) returns label##_avx2 parameters { return body arguments; }     \
  __attribute__((noinline)) returns label##_portable parameters { return body arguments; }             \
  }                                                                                                    \
  returns name parameters {                                                                            \
    if (level == kAvx512) {                                                                            \
      return label##_avx512 arguments;                                                                 \
    }                                                                                                  \
    return level == kAvx2 ? label##_avx2 arguments : label##_portable arguments;                       \
  }

DISPATCH(void, load_bf16, load_bf16, load_bf16_body, (const uint16_t* x, int64_t n, float* u), (x, n, u))
DISPATCH(void, store_bf16, store_bf16, store_bf16_body, (const float* u, int64_t n, uint16_t* x), (u, n, x))
DISPATCH(void, add_bias, add_bias, add_bias_body, (const float* u, const float* bias, int64_t n, float* out),
         (u, bias, n, out))
DISPATCH(void, log_ratios, log_ratios, log_ratios_body,
         (const float* u, int64_t n, float c, float inverse, float d, float* log_r), (u, n, c, inverse, d, log_r))

DISPATCH(Sums, sums, sums_f32, sums_body<float>, (const float* u, int64_t n, float base, float inverse),
         (u, n, base, inverse))
DISPATCH(Sums, sums, sums_bf16, sums_body<uint16_t>, (const uint16_t* u, int64_t n, float base, float inverse),
         (u, n, base, inverse))
DISPATCH(Sums, sums_against, sums_against, sums_against_body,
         (const float* u, const float* other, int64_t n, float base, float inverse, float shift),
         (u, other, n, base, inverse, shift))
DISPATCH(PairSums, pair_sums, pair_sums, pair_sums_body,
         (const float* a, const float* b, int64_t n, float base_a, float base_b, float inverse),
         (a, b, n, base_a, base_b, inverse))
DISPATCH(MixtureSums, mixture_sums, mixture_sums, mixture_sums_body,
         (const float* q, const float* p, int64_t n, const Mixture& m), (q, p, n, m))

DISPATCH(void, scaled_exp, scaled_exp_f32, scaled_exp_body<float>,
         (float* x, int64_t n, float c, float inverse, float factor), (x, n, c, inverse, factor))
DISPATCH(void, scaled_exp, scaled_exp_bf16, scaled_exp_body<uint16_t>,
         (uint16_t* x, int64_t n, float c, float inverse, float factor), (x, n, c, inverse, factor))
DISPATCH(void, entropy_gradient, entropy_gradient_f32, entropy_gradient_body<float>,
         (float* x, int64_t n, const GradientTerms& t), (x, n, t))
DISPATCH(void, entropy_gradient, entropy_gradient_bf16, entropy_gradient_body<uint16_t>,
         (uint16_t* x, int64_t n, const GradientTerms& t), (x, n, t))

DISPATCH(void, forward_kl_gradient, forward_kl_gradient, forward_kl_gradient_body,
         (const float* q, const float* p, int64_t n, const Mixture& m, float factor, float* g), (q, p, n, m, factor, g))
DISPATCH(void, reverse_kl_gradient, reverse_kl_gradient, reverse_kl_gradient_body,
         (const float* q, const float* p, int64_t n, const Mixture& m, float value, float factor, float* g),
         (q, p, n, m, value, factor, g))
DISPATCH(void, jsd_gradient, jsd_gradient, jsd_gradient_body,
         (const float* q, const float* p, int64_t n, const Mixture& m, float mean, float factor, float* g),
         (q, p, n, m, mean, factor, g))
DISPATCH(void, skew_gradient, skew_gradient, skew_gradient_body,
         (const float* q, const float* p, int64_t n, const Mixture& m, float mean, float factor, float* g),
         (q, p, n, m, mean, factor, g))

namespace {
DISPATCH(void, cap_values, cap_values, cap_body<false>,
         (const float* u, int64_t n, float softcap, float* out, float* slope), (u, n, softcap, out, slope))
DISPATCH(void, cap_slopes, cap_slopes, cap_body<true>,
         (const float* u, int64_t n, float softcap, float* out, float* slope), (u, n, softcap, out, slope))
DISPATCH(void, gradient_alone, gradient_alone, general_gradient_body<false>,
         (const float* u, const float* log_r, int64_t n, const GradientTerms& t, float* g), (u, log_r, n, t, g))
DISPATCH(void, gradient_against, gradient_against, general_gradient_body<true>,
         (const float* u, const float* log_r, int64_t n, const GradientTerms& t, float* g), (u, log_r, n, t, g))
DISPATCH(void, multiply, multiply, multiply_body, (float* g, const float* slope, int64_t n), (g, slope, n))
}  // namespace

void cap(const float* u, int64_t n, float softcap, float* out, float* slope) {
  slope == nullptr ? cap_values(u, n, softcap, out, slope) : cap_slopes(u, n, softcap, out, slope);
}

void general_gradient(const float* u, const float* log_r, const float* slope, int64_t n, const GradientTerms& t,
                      float* g) {
  log_r == nullptr ? gradient_alone(u, log_r, n, t, g) : gradient_against(u, log_r, n, t, g);
  if (slope != nullptr) {
    multiply(g, slope, n);
  }
}

}  // namespace rmsd
