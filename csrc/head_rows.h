// The row ops on a head's logits. head_rows.cpp documents what they compute, and register.cpp has their schemas.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace rmsd {

// logits and ref_logits [n, V] are float32 or bfloat16, and their rows may be strided. targets [n] is int64. bias [V]
// and the other vectors [n] are contiguous float32. ref_* belongs to the reference head: ref_logits, ref_lse and
// ref_logp are all present or all absent, and ref_bias is optional.
struct HeadArguments {
  const torch::stable::Tensor &logits, &targets, &target_logit;
  const std::optional<torch::stable::Tensor>&bias, &temperature;
  std::optional<double> softcap;
  const std::optional<torch::stable::Tensor>&ref_logits, &ref_bias, &ref_lse, &ref_logp;
};

struct GradientArguments {
  const torch::stable::Tensor &logp, &lse;
  const std::optional<torch::stable::Tensor>&entropy, &full_kl;
  const torch::stable::Tensor& g_logp;
  const std::optional<torch::stable::Tensor>&g_entropy, &g_full_kl;
};

enum KlKind : int64_t { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3, kFull = 4 };

struct PolicyArguments {
  const torch::stable::Tensor &scale, &advantage;
  const std::optional<torch::stable::Tensor>&old_logp, &ref_logp, &rollout_logp;
  int64_t kl;
  double kl_coef;
  std::optional<double> kl_log_ratio_clip;
  double clip_low, clip_high;
  std::optional<double> tis_cap;  // needed with rollout_logp
  double entropy_coef;
};

// logp, entropy, lse [n] and full_kl ([n] with a reference, otherwise [0]), float32.
using HeadStats =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

HeadStats row_score(const HeadArguments& arguments);
void row_gradient_(const HeadArguments& arguments, const GradientArguments& given);
HeadStats row_policy_(const HeadArguments& arguments, const PolicyArguments& given);

enum DivergenceKind : int64_t { kForwardKl = 0, kReverseKl = 1, kJsd = 2, kSkewKl = 3 };

// Returns the divergence [n] between the teacher's rows and the student's rows (logits). With a scale, logits are
// overwritten with the gradient of the sum of scale * divergence.
torch::stable::Tensor row_divergence_(const torch::stable::Tensor& logits, const torch::stable::Tensor& teacher_logits,
                                      const std::optional<torch::stable::Tensor>& temperature, int64_t kind,
                                      double alpha, const std::optional<torch::stable::Tensor>& scale);

}  // namespace rmsd
