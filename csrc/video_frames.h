// The media ops. video_frames.cpp documents what they compute, and register.cpp has their schemas.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace rmsd {

// frames uint8 [F, C, H, W], any strides -> out uint8 [F, C, height, width], contiguous.
void resize_frames_(const torch::stable::Tensor& out, const torch::stable::Tensor& frames);

// frames uint8 [F, C, H, W], any strides -> patches [N, C * temporal * patch * patch] of dtype float32, bfloat16 or
// float16. mean and std [C]: float32, on the scale 0..255.
torch::stable::Tensor video_patches(const torch::stable::Tensor& frames, int64_t height, int64_t width, int64_t patch,
                                    int64_t temporal, int64_t merge, const torch::stable::Tensor& mean,
                                    const torch::stable::Tensor& std, torch::headeronly::ScalarType dtype);

}  // namespace rmsd
