// Schemas of the CPU ops, for torch's stable ABI (torch >= 2.11), without Python headers. The Python modules
// heads/native_rows.py and video/native_patches.py call them.

#include <torch/csrc/stable/library.h>

#include "head_rows.h"
#include "row_kernels.h"
#include "video_frames.h"

namespace {

using rmsd::HeadStats;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

HeadStats score(const Tensor& logits, const Tensor& targets, const Tensor& target_logit, const Maybe& bias,
                const Maybe& temperature, std::optional<double> softcap, const Maybe& ref_logits, const Maybe& ref_bias,
                const Maybe& ref_lse, const Maybe& ref_logp) {
  return rmsd::row_score(
      {logits, targets, target_logit, bias, temperature, softcap, ref_logits, ref_bias, ref_lse, ref_logp});
}

void gradient_(const Tensor& logits, const Tensor& targets, const Tensor& target_logit, const Maybe& bias,
               const Maybe& temperature, std::optional<double> softcap, const Maybe& ref_logits, const Maybe& ref_bias,
               const Maybe& ref_lse, const Maybe& ref_logp, const Tensor& logp, const Tensor& lse, const Maybe& entropy,
               const Maybe& full_kl, const Tensor& g_logp, const Maybe& g_entropy, const Maybe& g_full_kl) {
  rmsd::row_gradient_(
      {logits, targets, target_logit, bias, temperature, softcap, ref_logits, ref_bias, ref_lse, ref_logp},
      {logp, lse, entropy, full_kl, g_logp, g_entropy, g_full_kl});
}

HeadStats policy_(const Tensor& logits, const Tensor& targets, const Tensor& target_logit, const Maybe& bias,
                  const Maybe& temperature, std::optional<double> softcap, const Maybe& ref_logits,
                  const Maybe& ref_bias, const Maybe& ref_lse, const Maybe& ref_logp, const Tensor& scale,
                  const Tensor& advantage, const Maybe& old_logp, const Maybe& policy_ref_logp,
                  const Maybe& rollout_logp, int64_t kl, double kl_coef, std::optional<double> kl_log_ratio_clip,
                  double clip_low, double clip_high, std::optional<double> tis_cap, double entropy_coef) {
  return rmsd::row_policy_(
      {logits, targets, target_logit, bias, temperature, softcap, ref_logits, ref_bias, ref_lse, ref_logp},
      {scale, advantage, old_logp, policy_ref_logp, rollout_logp, kl, kl_coef, kl_log_ratio_clip, clip_low, clip_high,
       tis_cap, entropy_coef});
}

int64_t cpu_level(int64_t limit) { return rmsd::limit_cpu_level(static_cast<int>(limit)); }

}  // namespace

// The arguments up to ref_logp define how z is computed from the logits, and from the reference's; see head_rows.h.
#define HEAD_ARGUMENTS                                                                                        \
  " logits, Tensor targets, Tensor target_logit, Tensor? bias, Tensor? temperature, float? softcap, Tensor? " \
  "ref_logits, "                                                                                              \
  "Tensor? ref_bias, Tensor? ref_lse, Tensor? ref_logp"
#define HEAD_STATS " -> (Tensor logp, Tensor entropy, Tensor lse, Tensor full_kl)"

STABLE_TORCH_LIBRARY_FRAGMENT(rmsd_kernels, m) {
  m.def("row_score(Tensor" HEAD_ARGUMENTS ")" HEAD_STATS);
  m.def("row_gradient_(Tensor(a!)" HEAD_ARGUMENTS
        ", Tensor logp, Tensor lse, Tensor? entropy, Tensor? full_kl, Tensor g_logp, Tensor? g_entropy, Tensor? "
        "g_full_kl)"
        " -> ()");
  m.def("row_policy_(Tensor(a!)" HEAD_ARGUMENTS
        ", Tensor scale, Tensor advantage, Tensor? old_logp, Tensor? policy_ref_logp, Tensor? rollout_logp, int kl, "
        "float kl_coef, float? kl_log_ratio_clip, float clip_low, float clip_high, float? tis_cap, "
        "float entropy_coef)" HEAD_STATS);
  m.def(
      "row_divergence_(Tensor(a!) logits, Tensor teacher_logits, Tensor? temperature, int kind, float alpha, "
      "Tensor? scale) -> Tensor");
  m.def("resize_frames_(Tensor(a!) out, Tensor frames) -> ()");
  m.def(
      "video_patches(Tensor frames, int height, int width, int patch, int temporal, int merge, Tensor mean, Tensor std, "
      "ScalarType dtype) -> Tensor");
  // For tests: limits the instruction set (0 portable, 1 AVX2, 2 AVX512) from now on; returns the level in use.
  m.def("cpu_level(int limit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rmsd_kernels, CPU, m) {
  m.impl("row_score", TORCH_BOX(&score));
  m.impl("row_gradient_", TORCH_BOX(&gradient_));
  m.impl("row_policy_", TORCH_BOX(&policy_));
  m.impl("row_divergence_", TORCH_BOX(&rmsd::row_divergence_));
  m.impl("resize_frames_", TORCH_BOX(&rmsd::resize_frames_));
  m.impl("video_patches", TORCH_BOX(&rmsd::video_patches));
}

STABLE_TORCH_LIBRARY_IMPL(rmsd_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&cpu_level)); }
