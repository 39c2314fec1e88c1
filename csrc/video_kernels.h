// Loops of the media ops over one block of a frame, each in three builds (AVX512BW, AVX2, portable) chosen at run time.
//
// A frame is resized in two passes with integer weights: along x, rounded to uint8, then along y, rounded to uint8.
// A window of rows is kept between the passes, with two rows interleaved: a pair is [C][padded width][2] bytes.

#pragma once

#include <cstdint>
#include <vector>

namespace rmsd {

constexpr int64_t kBlockRows = 16;  // input rows that are resized along x at a time, kBlockRows / 2 pairs
constexpr int64_t kPixelStep = 64;  // widths are padded to this, which the pass along y writes at a time with AVX512
constexpr int64_t kMaxChannels = 4;
constexpr int64_t kMaxPatch = 64;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The resize of one axis: out[i] = (round + sum_k weight[i][k] * in[start[i] + k]) >> precision, clamped to 0..255.
// Starts are even and never decrease. Weights beyond the taps are 0; start + k may be beyond the input there.
struct Axis {
  int64_t in, out;
  int64_t pairs;                 // pairs of weights per output pixel
  int precision;                 // at least 1
  std::vector<int32_t> start;    // [out, padded to kPixelStep]
  std::vector<int16_t> weights;  // [out, padded][2 * pairs]

  const int16_t* weights_of(int64_t i) const { return weights.data() + i * 2 * pairs; }
  int32_t round() const { return int32_t{1} << (precision - 1); }
};

// Input rows of one frame; rows after the last one repeat it. Row r, pixel x, channel c is row[r][x * sx + c * sc].
struct RowBlock {
  const uint8_t* row[kBlockRows];
  int64_t channels, sx, sc;
};

// One thread's buffers for the pass along x.
struct Columns {
  explicit Columns(const Axis& x, int64_t channels);

  int64_t chunk;                // output columns processed at a time, a multiple of 8
  int64_t pixels;               // maximum number of input columns that they need, padded
  std::vector<uint8_t> pairs;   // input columns as 16-bit pairs of each row; see video_loops.inl
  std::vector<uint8_t> staged;  // copies of rows that cannot be read in place
};

// Output positions of one row of patches: patch w starts at (w / merge * merge^2 + w % merge) * stride.
struct PatchRow {
  int64_t patch, merge, count, stride;
};

struct Half {
  uint16_t bits;
};

struct VideoLoops {
  // Resizes a block of rows along x into kBlockRows / 2 pairs, `stride` bytes apart, channels `plane` bytes apart.
  void (*along_x)(const RowBlock& rows, const Axis& x, Columns& room, uint8_t* out, int64_t stride, int64_t plane);
  // Resizes one row of one channel along y: n pixels, a multiple of kPixelStep, from pairs[k] with two weights each.
  void (*along_y)(const uint8_t* const* pairs, const int16_t* weights, const Axis& y, int64_t n, uint8_t* out);
  // Writes (pixel - mean) / std of one channel's rows as patches. Rows are `stride` bytes apart.
  void (*patches_f32)(const uint8_t* rows, int64_t stride, const PatchRow& to, float mean, float std, float* out);
  void (*patches_bf16)(const uint8_t* rows, int64_t stride, const PatchRow& to, float mean, float std, uint16_t* out);
  void (*patches_f16)(const uint8_t* rows, int64_t stride, const PatchRow& to, float mean, float std, Half* out);
};

// Returns the build for the processor, or for the limit set by the op cpu_level.
const VideoLoops& video_loops();

}  // namespace rmsd
