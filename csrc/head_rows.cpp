// Row ops on a head's logits on CPU: log-prob, entropy, log-sum-exp and exact KL, and the gradient of any linear
// combination of them.
//
//   z_v = cap(logit_v + bias_v) / temperature    cap(x) = softcap * tanh(x / softcap)
//   lse = log sum exp z    log p_v = z_v - lse    logp = min(log p_y, 0)    H = -sum p log p
//   KL = sum p (log p - log r)
//
// Bias, softcap and temperature are optional. The logit of the target y is target_logit. The first pass computes the
// statistics, and the second pass writes the gradient in place. A row of 151936 columns (608 KB in float32) stays in
// the L2 cache between them, so memory is read once and written once. The first pass sums exp(z - base) for a running
// maximum `base`, in float32 within a piece and in double across pieces.

#include "head_rows.h"

#include "row_common.h"

namespace rmsd {
namespace {

// The parameters of u. The logit of column `target` is replaced by `target_logit`; target = -1 means no replacement.
struct Head {
  const float* bias;
  float softcap;  // 0: none
  int64_t target;
  float target_logit;

  bool plain() const { return bias == nullptr && softcap == 0.0f; }
};

struct Reference {
  const void* logits;  // null: none
  const float* bias;
  double lse, logp;
};

struct RowResult {
  double logp, entropy, lse, full_kl;
  float base;      // value subtracted before exponentiation
  double log_sum;  // lse = base / temperature + log_sum
};

// Derivatives of a loss with respect to logp, entropy and full KL.
struct Coefficients {
  double logp, entropy, full_kl;
};

// Returns u of the target in double, and its slope du/dlogit.
double target_u(const Head& head, double* slope = nullptr) {
  const double logit = static_cast<double>(head.target_logit) + (head.bias == nullptr ? 0.0 : head.bias[head.target]);
  const double tanh_logit = head.softcap == 0.0f ? 0.0 : std::tanh(logit / head.softcap);
  if (slope != nullptr) {
    *slope = 1.0 - tanh_logit * tanh_logit;
  }
  return head.softcap == 0.0f ? logit : head.softcap * tanh_logit;
}

// Returns u of columns start..start+n: a pointer into the row if it contains u already, otherwise `buffer`.
template <typename T>
const float* block_of(const T* row, const Head& head, int64_t start, int64_t n, float* buffer, float* slope = nullptr) {
  const bool replaced = head.target >= start && head.target < start + n;
  prefetch_next_block(row + start, n);
  const float* u = as_floats(row + start, n, buffer);
  if (head.plain() && !replaced) {
    return u;
  }
  if (head.bias != nullptr) {
    add_bias(u, head.bias + start, n, buffer);
    u = buffer;
  }
  if (head.softcap != 0.0f) {
    cap(u, n, head.softcap, buffer, slope);
    u = buffer;
  }
  if (u != buffer) {
    std::memcpy(buffer, u, n * sizeof(float));
  }
  if (replaced) {
    buffer[head.target - start] = static_cast<float>(target_u(head));
  }
  return buffer;
}

// Computes log r of a block of the reference's row.
template <typename T>
void reference_block(const Reference& ref, const Head& head, double temperature, int64_t start, int64_t n,
                     float* log_r) {
  const Head ref_head{ref.bias, head.softcap, -1, 0.0f};
  const float* u = block_of(static_cast<const T*>(ref.logits), ref_head, start, n, log_r);
  const float c = static_cast<float>(ref.lse * temperature);
  log_ratios(u, n, c, static_cast<float>(1.0 / temperature), static_cast<float>(c / temperature - ref.lse), log_r);
  if (head.target >= start && head.target < start + n) {
    log_r[head.target - start] = static_cast<float>(ref.logp);
  }
}

template <typename T>
RowResult score_row(const T* row, int64_t vocab, const Head& head, double temperature, const Reference& ref) {
  const float inverse = static_cast<float>(1.0 / temperature);
  alignas(64) float buffer[kBlock], log_r[kBlock];
  float base = kMinusInfinity;
  double s = 0.0, w = 0.0, k = 0.0, u_target = kNaN;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    const bool has_target = head.target >= start && head.target < start + n;
    const bool direct = head.plain() && ref.logits == nullptr && !has_target;
    const float* u = direct ? nullptr : block_of(row, head, start, n, buffer);
    if (has_target) {
      // Use the value that is added to the sum, so that logp is exactly 0 if the target is the only term.
      u_target = u[head.target - start];
    }
    if (ref.logits != nullptr) {
      reference_block<T>(ref, head, temperature, start, n, log_r);
    }
    const auto block_sums = [&](float against) {
      if (direct) {
        return sums(row + start, n, against, inverse);
      }
      if (ref.logits == nullptr) {
        return sums(u, n, against, inverse);
      }
      // If both heads agree, z - base - log r equals log sum exp(z - base) in every column. It is subtracted from the
      // terms, because otherwise the sum would lose precision. An implausible value from a column without weight is
      // harmless.
      const float shift = std::fmin(std::fmax((u[0] - against) * inverse - log_r[0], 0.0f), 16.0f);
      Sums block = sums_against(u, log_r, n, against, inverse, shift);
      block.k += block.s * shift;
      return block;
    };
    Sums block = block_sums(base == kMinusInfinity ? 0.0f : base);
    if (block.top > base) {
      block = block_sums(block.top);
      // Before the first finite logit, the sums are 0, or a NaN that must be kept.
      const double step = base == kMinusInfinity ? 0.0 : (static_cast<double>(base) - block.top) * inverse;
      const double shrink = std::exp(step);
      w = shrink * (w + s * step);
      k = shrink == 0.0 && !std::isnan(k) ? 0.0 : shrink * (k + s * step);
      s *= shrink;
      base = block.top;
    }
    s += block.s;
    w += block.w;
    k += block.k;
  }
  if (base == kMinusInfinity) {
    s = kNaN;
  }
  RowResult result;
  result.base = base;
  result.log_sum = std::log(s);
  result.lse = base / temperature + result.log_sum;
  result.entropy = result.log_sum - w / s;
  result.full_kl = k / s - result.log_sum;
  result.logp = (u_target - base) / temperature - result.log_sum;
  result.logp = result.logp > 0.0 ? 0.0 : result.logp;
  return result;
}

// Overwrites the row with the gradient of g.logp * logp + g.entropy * H + g.full_kl * KL.
template <typename T>
void gradient_row(T* row, int64_t vocab, const Head& head, double temperature, const Reference& ref,
                  const RowResult& stats, const Coefficients& g) {
  const double inverse = 1.0 / temperature;
  const bool with_kl = g.full_kl != 0.0, with_log = with_kl || g.entropy != 0.0;
  if (g.logp == 0.0 && !with_log && std::isfinite(stats.log_sum)) {
    std::memset(row, 0, vocab * sizeof(T));
    return;
  }
  // dz = p * (constant + slope * log p - g.full_kl * log r) + [v == y] * g.logp
  const double factor = std::exp(-stats.log_sum) * inverse;
  const double constant = -g.logp - g.entropy * stats.entropy - (with_kl ? g.full_kl * stats.full_kl : 0.0);
  const GradientTerms terms{stats.base,
                            static_cast<float>(inverse),
                            static_cast<float>(-stats.log_sum),
                            static_cast<float>(factor * (g.full_kl - g.entropy)),
                            static_cast<float>(factor * constant),
                            static_cast<float>(factor * g.full_kl)};
  alignas(64) float buffer[kBlock], slope[kBlock], log_r[kBlock];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    T* x = row + start;
    if (head.plain() && !with_kl) {
      with_log ? entropy_gradient(x, n, terms) : scaled_exp(x, n, terms.c, terms.inverse, terms.constant);
      continue;
    }
    if (with_kl) {
      reference_block<T>(ref, head, temperature, start, n, log_r);
    }
    const float* u = block_of(row, head, start, n, buffer, slope);
    constexpr bool kInPlace = std::is_same_v<T, float>;
    float* out = buffer;
    if constexpr (kInPlace) {
      out = x;
    }
    general_gradient(u, with_kl ? log_r : nullptr, head.softcap == 0.0f ? nullptr : slope, n, terms, out);
    if constexpr (!kInPlace) {
      store_bf16(out, n, x);
    }
  }
  if (head.target < 0) {
    return;
  }
  double slope_at_target;
  target_u(head, &slope_at_target);
  const double p = std::exp(stats.logp);
  double dz = -g.logp * std::expm1(stats.logp);
  if (with_log && p != 0.0) {
    dz -= g.entropy * p * (stats.logp + stats.entropy);
    dz += with_kl ? g.full_kl * p * (stats.logp - ref.logp - stats.full_kl) : 0.0;
  }
  from_float(static_cast<float>(dz * slope_at_target * inverse), row + head.target);
}

struct Policy {
  const float *scale, *advantage, *old_logp, *ref_logp, *rollout_logp;  // the last three may be null
  int64_t kl;
  double kl_coef, log_ratio_clip, clip_low, clip_high, tis_cap, entropy_coef;
};

constexpr double kExpLimit = 80.0;  // exp(80) = 5.5e34 is finite in float32

// Derivatives of scale * (-w min(r A, clip(r) A) + kl_coef KL - entropy_coef H), r = exp(logp - old_logp),
// w = min(exp(logp - rollout_logp), tis_cap), which is not differentiated.
Coefficients policy_coefficients(const Policy& policy, int64_t t, float logp) {
  const double scale = policy.scale[t];
  double advantage = policy.advantage[t];
  if (policy.rollout_logp != nullptr) {
    const double correction = std::exp(std::min(static_cast<double>(logp) - policy.rollout_logp[t], kExpLimit));
    advantage *= correction > policy.tis_cap ? policy.tis_cap : correction;
  }
  double g = -advantage;
  if (policy.old_logp != nullptr) {
    const double log_ratio = static_cast<double>(logp) - policy.old_logp[t];
    const double ratio = std::exp(log_ratio > kExpLimit ? kExpLimit : log_ratio);
    const bool clipped = (ratio > 1.0 + policy.clip_high && advantage > 0.0) ||
                         (ratio < 1.0 - policy.clip_low && advantage < 0.0) || log_ratio > kExpLimit;
    g = clipped ? 0.0 : -advantage * ratio;
  }
  if (policy.kl >= kK1 && policy.kl <= kK3) {
    const double d = static_cast<double>(policy.ref_logp[t]) - logp;
    const double of_k3 = d > kExpLimit ? 1.0 : -std::expm1(d);
    const double slope = policy.kl == kK1 ? 1.0 : policy.kl == kK2 ? -d : of_k3;
    g += policy.kl_coef * (std::abs(d) > policy.log_ratio_clip ? 0.0 : slope);
  }
  return {scale * g, -scale * policy.entropy_coef, policy.kl == kFull ? scale * policy.kl_coef : 0.0};
}

// The arguments of all three ops, as pointers.
struct Rows {
  int64_t count, vocab, stride;
  bool is_float;
  const int64_t* targets;
  const float *target_logit, *bias, *temperature;
  float softcap;
  const char* ref_logits;
  int64_t ref_stride;
  const float *ref_bias, *ref_lse, *ref_logp;

  Rows(const char* op, const HeadArguments& a)
      : count(0), vocab(0), ref_logits(nullptr), ref_stride(0), ref_bias(nullptr), ref_lse(nullptr), ref_logp(nullptr) {
    check_logits(op, "logits", a.logits);
    count = a.logits.size(0);
    vocab = a.logits.size(1);
    stride = a.logits.stride(0);
    is_float = a.logits.scalar_type() == ScalarType::Float;
    targets = vector_data<int64_t>(op, "targets", a.targets, count);
    target_logit = vector_data<float>(op, "target_logit", a.target_logit, count);
    bias = vector_data(op, "bias", a.bias, vocab);
    temperature = vector_data(op, "temperature", a.temperature, count);
    STD_TORCH_CHECK(!a.softcap.has_value() || *a.softcap > 0.0, op, ": softcap: expected a positive number");
    softcap = a.softcap.has_value() ? static_cast<float>(*a.softcap) : 0.0f;
    if (a.ref_logits.has_value()) {
      check_logits(op, "ref_logits", *a.ref_logits);
      STD_TORCH_CHECK(a.ref_logits->scalar_type() == a.logits.scalar_type() && a.ref_logits->size(0) == count &&
                          a.ref_logits->size(1) == vocab,
                      op, ": ref_logits: expected shape and dtype of logits");
      STD_TORCH_CHECK(a.ref_lse.has_value() && a.ref_logp.has_value(), op,
                      ": ref_logits: needs ref_lse and ref_logp too");
      ref_logits = static_cast<const char*>(a.ref_logits->const_data_ptr());
      ref_stride = a.ref_logits->stride(0);
      ref_bias = vector_data(op, "ref_bias", a.ref_bias, vocab);
      ref_lse = vector_data(op, "ref_lse", a.ref_lse, count);
      ref_logp = vector_data(op, "ref_logp", a.ref_logp, count);
    }
  }

  Head head(int64_t t) const {
    const bool valid = targets[t] >= 0 && targets[t] < vocab;
    return {bias, softcap, valid ? targets[t] : -1, target_logit[t]};
  }
  double temperature_of(int64_t t) const { return temperature == nullptr ? 1.0 : temperature[t]; }
  Reference reference(int64_t t) const {
    if (ref_logits == nullptr) {
      return {nullptr, nullptr, 0.0, 0.0};
    }
    const int64_t size = is_float ? 4 : 2;
    return {ref_logits + t * ref_stride * size, ref_bias, ref_lse[t], ref_logp[t]};
  }
};

// The result vectors; full_kl is empty without a reference.
struct Output {
  Tensor logp, entropy, lse, full_kl;
  float *logp_data, *entropy_data, *lse_data, *full_kl_data;

  Output(const Tensor& like, const Rows& rows)
      : logp(torch::stable::new_empty(like, {rows.count})),
        entropy(torch::stable::new_empty(like, {rows.count})),
        lse(torch::stable::new_empty(like, {rows.count})),
        full_kl(torch::stable::new_empty(like, {rows.ref_logits == nullptr ? 0 : rows.count})),
        logp_data(logp.mutable_data_ptr<float>()),
        entropy_data(entropy.mutable_data_ptr<float>()),
        lse_data(lse.mutable_data_ptr<float>()),
        full_kl_data(rows.ref_logits == nullptr ? nullptr : full_kl.mutable_data_ptr<float>()) {}

  void put(int64_t t, const RowResult& r) const {
    logp_data[t] = static_cast<float>(r.logp);
    entropy_data[t] = static_cast<float>(r.entropy);
    lse_data[t] = static_cast<float>(r.lse);
    if (full_kl_data != nullptr) {
      full_kl_data[t] = static_cast<float>(r.full_kl);
    }
  }
};

// Calls each(row pointer, t) for all rows in parallel. One thread processes a row, so results do not depend on the
// number of threads.
template <typename Each>
void for_rows(const Rows& rows, void* data, const Each& each) {
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      rows.is_float ? each(static_cast<float*>(data) + t * rows.stride, t)
                    : each(static_cast<uint16_t*>(data) + t * rows.stride, t);
    }
  });
}

}  // namespace

HeadStats row_score(const HeadArguments& arguments) {
  const Rows rows("row_score", arguments);
  const Output out(arguments.target_logit, rows);
  // The logits are only read here. The cast is needed because for_rows passes writable pointers to support the other
  // ops.
  for_rows(rows, const_cast<void*>(arguments.logits.const_data_ptr()), [&](const auto* row, int64_t t) {
    out.put(t, score_row(row, rows.vocab, rows.head(t), rows.temperature_of(t), rows.reference(t)));
  });
  return {out.logp, out.entropy, out.lse, out.full_kl};
}

void row_gradient_(const HeadArguments& arguments, const GradientArguments& given) {
  const Rows rows("row_gradient_", arguments);
  const char* op = "row_gradient_";
  const float* logp = vector_data<float>(op, "logp", given.logp, rows.count);
  const float* lse = vector_data<float>(op, "lse", given.lse, rows.count);
  const float* entropy = vector_data(op, "entropy", given.entropy, rows.count);
  const float* full_kl = vector_data(op, "full_kl", given.full_kl, rows.count);
  const float* g_logp = vector_data<float>(op, "g_logp", given.g_logp, rows.count);
  const float* g_entropy = vector_data(op, "g_entropy", given.g_entropy, rows.count);
  const float* g_full_kl = vector_data(op, "g_full_kl", given.g_full_kl, rows.count);
  STD_TORCH_CHECK(g_entropy == nullptr || entropy != nullptr, op, ": g_entropy: needs the rows' entropy");
  STD_TORCH_CHECK(g_full_kl == nullptr || (full_kl != nullptr && rows.ref_logits != nullptr), op,
                  ": g_full_kl: needs the reference and the rows' full_kl");
  for_rows(rows, arguments.logits.mutable_data_ptr(), [&](auto* row, int64_t t) {
    const double temperature = rows.temperature_of(t);
    RowResult stats{logp[t], entropy == nullptr ? 0.0 : entropy[t], lse[t], full_kl == nullptr ? 0.0 : full_kl[t], 0.0f,
                    0.0};
    stats.base = static_cast<float>(stats.lse * temperature);
    stats.log_sum = stats.lse - stats.base / temperature;
    const Coefficients g{g_logp[t], g_entropy == nullptr ? 0.0 : g_entropy[t],
                         g_full_kl == nullptr ? 0.0 : g_full_kl[t]};
    gradient_row(row, rows.vocab, rows.head(t), temperature, rows.reference(t), stats, g);
  });
}

HeadStats row_policy_(const HeadArguments& arguments, const PolicyArguments& given) {
  const char* op = "row_policy_";
  const Rows rows(op, arguments);
  const Policy policy{vector_data<float>(op, "scale", given.scale, rows.count),
                      vector_data<float>(op, "advantage", given.advantage, rows.count),
                      vector_data(op, "old_logp", given.old_logp, rows.count),
                      vector_data(op, "policy_ref_logp", given.ref_logp, rows.count),
                      vector_data(op, "rollout_logp", given.rollout_logp, rows.count),
                      given.kl,
                      given.kl_coef,
                      given.kl_log_ratio_clip.value_or(std::numeric_limits<double>::infinity()),
                      given.clip_low,
                      given.clip_high,
                      given.tis_cap.value_or(0.0),
                      given.entropy_coef};
  STD_TORCH_CHECK(policy.rollout_logp == nullptr || given.tis_cap.has_value(), op, ": rollout_logp: needs tis_cap");
  STD_TORCH_CHECK(given.kl >= kNone && given.kl <= kFull, op,
                  ": kl: expected 0 (none), 1, 2, 3 (k1, k2, k3) or 4 (full)");
  STD_TORCH_CHECK(given.kl < kK1 || given.kl > kK3 || policy.ref_logp != nullptr, op,
                  ": kl: k1, k2 and k3 need ref_logp");
  STD_TORCH_CHECK(given.kl != kFull || rows.ref_logits != nullptr, op, ": kl: full needs the reference's logits");
  const Output out(arguments.target_logit, rows);
  for_rows(rows, arguments.logits.mutable_data_ptr(), [&](auto* row, int64_t t) {
    const Head head = rows.head(t);
    const Reference ref = rows.reference(t);
    const double temperature = rows.temperature_of(t);
    const RowResult stats = score_row(row, rows.vocab, head, temperature, ref);
    out.put(t, stats);
    gradient_row(row, rows.vocab, head, temperature, ref, stats,
                 policy_coefficients(policy, t, static_cast<float>(stats.logp)));
  });
  return {out.logp, out.entropy, out.lse, out.full_kl};
}

}  // namespace rmsd
