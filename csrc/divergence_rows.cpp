// Divergence between a teacher's rows p and a student's rows q on CPU, and its gradient with respect to the student's
// logits, in place.
//
//   forward_kl sum p log(p/q)    reverse_kl sum q log(q/p)    with M = a p + (1 - a) q:
//   skew_kl sum p log(p/M)       jsd a sum p log(p/M) + (1 - a) sum q log(q/M)
//   dD/dz_v = q_v (f_v - sum q f),  f = dD/dq up to a constant: -p/q, log(q/p), -(1 - a) p/M, (1 - a) log(q/M)
//
// The pass that computes the log-sum-exps also computes both KLs. M needs the log-sum-exps first, so jsd and skew_kl
// take one more pass.

#include "head_rows.h"
#include "row_common.h"

namespace rmsd {
namespace {

// Sums of exponentials of two rows relative to running maxima, and k = sum e_a ((z_a - base_a) - (z_b - base_b)).
struct PairTotals {
  float base_a = kMinusInfinity, base_b = kMinusInfinity;
  double s_a = 0.0, s_b = 0.0, k = 0.0;

  double log_s_a() const { return base_a == kMinusInfinity ? kNaN : std::log(s_a); }
  double log_s_b() const { return base_b == kMinusInfinity ? kNaN : std::log(s_b); }
  double kl() const { return k / s_a - log_s_a() + log_s_b(); }
};

template <typename A, typename B>
PairTotals pair_totals(const A* a, const B* b, int64_t vocab, float inverse) {
  alignas(64) float buffer_a[kBlock], buffer_b[kBlock];
  PairTotals total;
  const auto live = [](float base) { return base == kMinusInfinity ? 0.0f : base; };
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    prefetch_next_block(a + start, n);
    prefetch_next_block(b + start, n);
    const float* u_a = as_floats(a + start, n, buffer_a);
    const float* u_b = as_floats(b + start, n, buffer_b);
    PairSums block = pair_sums(u_a, u_b, n, live(total.base_a), live(total.base_b), inverse);
    if (block.top_a > total.base_a || block.top_b > total.base_b) {
      const float base_a = std::max(total.base_a, block.top_a), base_b = std::max(total.base_b, block.top_b);
      block = pair_sums(u_a, u_b, n, live(base_a), live(base_b), inverse);
      // If a row has no finite logit so far, its sums are 0 (or NaN), or its k stays infinite.
      const double step_a =
          total.base_a == kMinusInfinity ? 0.0 : (static_cast<double>(total.base_a) - base_a) * inverse;
      const double step_b =
          total.base_b == kMinusInfinity ? 0.0 : (static_cast<double>(total.base_b) - base_b) * inverse;
      const double shrink = std::exp(step_a);
      total.k = shrink == 0.0 && !std::isnan(total.k) ? 0.0 : shrink * (total.k + total.s_a * (step_a - step_b));
      total.s_a *= shrink;
      total.s_b *= std::exp(step_b);
      total.base_a = base_a;
      total.base_b = base_b;
    }
    total.s_a += block.s_a;
    total.s_b += block.s_b;
    total.k += block.k;
  }
  return total;
}

// Returns the divergence of one row. With a scale, row q is overwritten with the gradient.
template <typename Q, typename P>
double divergence_row(Q* q, const P* p, int64_t vocab, double temperature, int64_t kind, double alpha,
                      const float* scale) {
  const float inverse = static_cast<float>(1.0 / temperature);
  alignas(64) float buffer_q[kBlock], buffer_p[kBlock];
  Mixture mixture;
  mixture.inverse = inverse;
  mixture.share = static_cast<float>(alpha);
  double value, mean = 0.0;
  // pair_totals takes the expectation under its first argument.
  if (kind == kForwardKl) {
    const PairTotals total = pair_totals(p, q, vocab, inverse);
    mixture = {total.base_b, static_cast<float>(-total.log_s_b()),
               total.base_a, static_cast<float>(-total.log_s_a()),
               inverse,      0.0f};
    value = total.kl();
  } else {
    const PairTotals total = pair_totals(q, p, vocab, inverse);
    mixture.c_q = total.base_a;
    mixture.d_q = static_cast<float>(-total.log_s_a());
    mixture.c_p = total.base_b;
    mixture.d_p = static_cast<float>(-total.log_s_b());
    value = total.kl();
  }
  if (kind == kJsd || kind == kSkewKl) {
    double p_sum = 0.0, q_sum = 0.0, overlap = 0.0;
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int64_t n = std::min(kBlock, vocab - start);
      const MixtureSums block =
          mixture_sums(as_floats(q + start, n, buffer_q), as_floats(p + start, n, buffer_p), n, mixture);
      p_sum += block.p_log_ratio;
      q_sum += block.q_log_ratio;
      overlap += block.overlap;
    }
    value = kind == kJsd ? alpha * p_sum + (1.0 - alpha) * q_sum : p_sum;
    mean = kind == kJsd ? q_sum : overlap;
  }
  if (scale == nullptr) {
    return value;
  }
  const float factor = static_cast<float>(*scale / temperature * (kind == kJsd || kind == kSkewKl ? 1.0 - alpha : 1.0));
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    const float* u_q = as_floats(q + start, n, buffer_q);
    const float* u_p = as_floats(p + start, n, buffer_p);
    float* out = buffer_q;
    if constexpr (std::is_same_v<Q, float>) {
      out = q + start;
    }
    if (kind == kForwardKl) {
      forward_kl_gradient(u_q, u_p, n, mixture, factor, out);
    } else if (kind == kReverseKl) {
      reverse_kl_gradient(u_q, u_p, n, mixture, static_cast<float>(value), factor, out);
    } else if (kind == kJsd) {
      jsd_gradient(u_q, u_p, n, mixture, static_cast<float>(mean), factor, out);
    } else {
      skew_gradient(u_q, u_p, n, mixture, static_cast<float>(mean), factor, out);
    }
    if constexpr (!std::is_same_v<Q, float>) {
      store_bf16(out, n, q + start);
    }
  }
  return value;
}

}  // namespace

Tensor row_divergence_(const Tensor& logits, const Tensor& teacher_logits, const std::optional<Tensor>& temperature_in,
                       int64_t kind, double alpha, const std::optional<Tensor>& scale_in) {
  const char* op = "row_divergence_";
  check_logits(op, "logits", logits);
  check_logits(op, "teacher_logits", teacher_logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(teacher_logits.size(0) == rows && teacher_logits.size(1) == vocab, op,
                  ": teacher_logits: expected the shape of logits, [", rows, ", ", vocab, "]");
  STD_TORCH_CHECK(kind >= kForwardKl && kind <= kSkewKl, op,
                  ": kind: expected 0 to 3 (forward_kl, reverse_kl, jsd, skew_kl)");
  STD_TORCH_CHECK(kind < kJsd || (alpha > 0.0 && alpha < 1.0), op, ": alpha: expected a number between 0 and 1, got ",
                  alpha);
  const float* temperature = vector_data(op, "temperature", temperature_in, rows);
  const float* scale = vector_data(op, "scale", scale_in, rows);
  const bool q_float = logits.scalar_type() == ScalarType::Float;
  const bool p_float = teacher_logits.scalar_type() == ScalarType::Float;
  Tensor value = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  float* out = value.mutable_data_ptr<float>();
  // The logits are written only with a scale.
  void* q = scale == nullptr ? const_cast<void*>(logits.const_data_ptr()) : logits.mutable_data_ptr();
  const void* p = teacher_logits.const_data_ptr();
  const int64_t q_stride = logits.stride(0), p_stride = teacher_logits.stride(0);
  torch::stable::parallel_for(0, rows, rows_per_task(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const double row_temperature = temperature == nullptr ? 1.0 : temperature[t];
      const float* factor = scale == nullptr ? nullptr : scale + t;
      const auto with_teacher = [&](auto* q_row) {
        return p_float ? divergence_row(q_row, static_cast<const float*>(p) + t * p_stride, vocab, row_temperature,
                                        kind, alpha, factor)
                       : divergence_row(q_row, static_cast<const uint16_t*>(p) + t * p_stride, vocab, row_temperature,
                                        kind, alpha, factor);
      };
      out[t] = static_cast<float>(q_float ? with_teacher(static_cast<float*>(q) + t * q_stride)
                                          : with_teacher(static_cast<uint16_t*>(q) + t * q_stride));
    }
  });
  return value;
}

}  // namespace rmsd
