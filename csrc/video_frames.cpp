// Bicubic, antialiased resize of uint8 frames on CPU, and their conversion to the normalized patches of a vision tower.
//The resize is bit-identical to torch.nn.functional.interpolate for uint8 on CPU: cubic weights (a = -0.5) stretched by
// the downscaling factor, as 16-bit integers with one precision per axis; x first, rounded to uint8, then y. An axis
// that keeps its size gets a single weight of 1, which is exact.
//
// A frame is read once and a patch is written once. In between, each thread buffers the rows resized along x that the
// current output row needs, and one row of patches. Both stay in the L2 cache (200 KB for 720p -> 832x448).

#include "video_frames.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "row_common.h"
#include "video_kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rmsd {
namespace {

double cubic(double x) {
  constexpr double kA = -0.5;
  x = std::fabs(x);
  if (x < 1.0) {
    return ((kA + 2.0) * x - (kA + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * kA : 0.0;
}

// Computes the taps of each output pixel as doubles, then as 16-bit integers with the highest precision that the
// largest tap allows.
Axis make_axis(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double support = 2.0 * std::max(scale, 1.0), inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
  const int64_t most = in == out ? 1 : static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  std::vector<double> taps(out * most);
  std::vector<int64_t> starts(out), counts(out);
  double largest = 0.0;
  Axis axis{in, out, 1, 0, {}, {}};
  for (int64_t i = 0; i < out; ++i) {
    double* tap = taps.data() + i * most;
    if (in == out) {
      starts[i] = i, counts[i] = 1, *tap = 1.0;
    } else {
      const double center = scale * (i + 0.5);
      starts[i] = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      counts[i] = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in) - starts[i];
      counts[i] = std::clamp<int64_t>(counts[i], 0, most);
      double total = 0.0;
      for (int64_t k = 0; k < counts[i]; ++k) {
        tap[k] = cubic((k + starts[i] - center + 0.5) * inverse);
        total += tap[k];
      }
      for (int64_t k = 0; k < counts[i] && total != 0.0; ++k) {
        tap[k] /= total;
      }
    }
    for (int64_t k = 0; k < counts[i]; ++k) {
      largest = std::max(largest, tap[k]);
    }
    axis.pairs = std::max(axis.pairs, (starts[i] % 2 + counts[i] + 1) / 2);
  }
  while (axis.precision < 22 && static_cast<int>(0.5 + largest * (1 << (axis.precision + 1))) < (1 << 15)) {
    ++axis.precision;
  }
  // Output pixels after the last one are not used, but loops that process several pixels at a time read them.
  const int64_t padded = round_up(out, kPixelStep);
  axis.start.assign(padded, static_cast<int32_t>(starts[out - 1] / 2 * 2));
  axis.weights.assign(padded * 2 * axis.pairs, 0);
  for (int64_t i = 0; i < out; ++i) {
    axis.start[i] = static_cast<int32_t>(starts[i] / 2 * 2);
    for (int64_t k = 0; k < counts[i]; ++k) {
      const double tap = taps[i * most + k] * (1 << axis.precision);
      axis.weights[i * 2 * axis.pairs + starts[i] % 2 + k] = static_cast<int16_t>(tap + (tap < 0.0 ? -0.5 : 0.5));
    }
  }
  return axis;
}

struct Frames {
  Frames(const char* op, const Tensor& t, int64_t out_height, int64_t out_width)
      : count(t.dim() == 4 ? t.size(0) : 0), height(out_height), width(out_width) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte, op, ": frames: expected uint8");
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) > 0 && t.size(2) > 0 && t.size(3) > 0 && t.size(1) > 0 &&
                        t.size(1) <= kMaxChannels,
                    op, ": frames: expected shape [F, C, H, W] with C in 1..4 and no empty axis");
    STD_TORCH_CHECK(out_height > 0 && out_width > 0, op, ": height and width: expected numbers above 0, got ",
                    out_height, " and ", out_width);
    channels = t.size(1);
    in_height = t.size(2);
    in_width = t.size(3);
    STD_TORCH_CHECK(std::max({in_height, in_width, height, width}) < (int64_t{1} << 24), op,
                    ": frames: expected sides below 2^24");
    data = t.const_data_ptr<uint8_t>();
    sf = t.stride(0), sc = t.stride(1), sy = t.stride(2), sx = t.stride(3);
  }

  const uint8_t* frame(int64_t f) const { return data + f * sf; }

  // One past the last byte.
  const uint8_t* end() const {
    return data + (count - 1) * sf + (channels - 1) * sc + (in_height - 1) * sy + (in_width - 1) * sx + 1;
  }

  const uint8_t* data;
  int64_t count, channels, in_height, in_width, height, width;
  int64_t sf, sc, sy, sx;
};

// One thread's resize of a frame. Output rows must be requested in order.
class Resizer {
 public:
  Resizer(const Frames& frames, const Axis& x, const Axis& y)
      : frames_(frames),
        x_(x),
        y_(y),
        loops_(video_loops()),
        room_(x, frames.channels),
        plane_(2 * padded_width()),
        stride_(frames.channels * plane_),
        // The pairs that a row needs, and up to one block minus one pair before and after them.
        capacity_(round_up(y.pairs + 2 * kBlockPairs, kBlockPairs)),
        window_(capacity_ * stride_),
        needed_(y.pairs) {}

  int64_t padded_width() const { return round_up(frames_.width, kPixelStep); }

  void start(const uint8_t* frame) {
    frame_ = frame;
    made_ = 0;
  }

  // Writes channel c of output row i to out + c * plane, padded_width() pixels.
  void row(int64_t i, uint8_t* out, int64_t plane) {
    const int64_t first = y_.start[i] / 2;
    const int64_t last = std::min(first + y_.pairs, (frames_.in_height + 1) / 2);
    while (made_ < last) {
      make_block();
    }
    for (int64_t c = 0; c < frames_.channels; ++c) {
      for (int64_t k = 0; k < y_.pairs; ++k) {
        needed_[k] = window_.data() + (first + k) % capacity_ * stride_ + c * plane_;
      }
      loops_.along_y(needed_.data(), y_.weights_of(i), y_, padded_width(), out + c * plane);
    }
  }

 private:
  static constexpr int64_t kBlockPairs = kBlockRows / 2;

  void make_block() {
    RowBlock block{{}, frames_.channels, frames_.sx, frames_.sc};
    for (int64_t r = 0; r < kBlockRows; ++r) {
      block.row[r] = frame_ + std::min(2 * made_ + r, frames_.in_height - 1) * frames_.sy;
    }
    loops_.along_x(block, x_, room_, window_.data() + made_ % capacity_ * stride_, stride_, plane_);
    made_ += kBlockPairs;
  }

  const Frames& frames_;
  const Axis &x_, &y_;
  const VideoLoops& loops_;
  Columns room_;
  const int64_t plane_, stride_, capacity_;
  std::vector<uint8_t> window_;
  std::vector<const uint8_t*> needed_;
  const uint8_t* frame_ = nullptr;
  int64_t made_ = 0;  // pairs of rows resized along x so far, a multiple of kBlockPairs
};

// Frames per task: a 720p frame takes about a millisecond.
constexpr int64_t kFrameGrain = 1;

struct PatchGrid {
  int64_t patch, temporal, merge, rows, columns;  // rows and columns of patches in a frame
  int64_t values(int64_t channels) const { return channels * temporal * patch * patch; }
};

// Resizes the frames of a group in sequence, one row of patches at a time. mean and std are [C].
template <typename T>
void write_patches(const Frames& frames, const Axis& x, const Axis& y, const PatchGrid& grid, const float* mean,
                   const float* std, T* out) {
  const VideoLoops& loops = video_loops();
  const int64_t area = grid.patch * grid.patch, values = grid.values(frames.channels);
  const int64_t group_values = grid.rows * grid.columns * values;
  const PatchRow to{grid.patch, grid.merge, grid.columns, values};
  // Frames that do not need a resize and have adjacent pixels are read in place.
  const bool in_place = frames.height == frames.in_height && frames.width == frames.in_width && frames.sx == 1;
  const int64_t groups = (frames.count + grid.temporal - 1) / grid.temporal;
  torch::stable::parallel_for(0, groups, kFrameGrain, [&](int64_t begin, int64_t end) {
    Resizer resizer(frames, x, y);
    const int64_t stride = resizer.padded_width(), plane = grid.patch * stride;
    std::vector<uint8_t> band(in_place ? 0 : frames.channels * plane);
    for (int64_t f = begin * grid.temporal; f < std::min(end * grid.temporal, frames.count); ++f) {
      const uint8_t* frame = frames.frame(f);
      resizer.start(frame);
      const int64_t slot = f % grid.temporal, slots = f + 1 == frames.count ? grid.temporal - slot : 1;
      for (int64_t i = 0; i < grid.rows; ++i) {
        for (int64_t r = 0; r < grid.patch && !in_place; ++r) {
          resizer.row(i * grid.patch + r, band.data() + r * stride, plane);
        }
        T* row = out + f / grid.temporal * group_values +
                 (i / grid.merge * grid.columns + i % grid.merge) * grid.merge * values;
        for (int64_t c = 0; c < frames.channels; ++c) {
          const uint8_t* from = in_place ? frame + i * grid.patch * frames.sy + c * frames.sc : band.data() + c * plane;
          const int64_t from_stride = in_place ? frames.sy : stride;
          for (int64_t s = slot; s < slot + slots; ++s) {
            T* at = row + (c * grid.temporal + s) * area;
            if constexpr (std::is_same_v<T, float>) {
              loops.patches_f32(from, from_stride, to, mean[c], std[c], at);
            } else if constexpr (std::is_same_v<T, Half>) {
              loops.patches_f16(from, from_stride, to, mean[c], std[c], at);
            } else {
              loops.patches_bf16(from, from_stride, to, mean[c], std[c], at);
            }
          }
        }
      }
    }
  });
}

// Large results get new pages from the system. With 4 KB pages, the page faults cost as much as all the work on the
// pixels (64 frames of 720p, 286 MB: 0.20 s with small pages, 0.11 s with large ones). For blocks of 32 MB or more,
// glibc's malloc maps every block separately, so the advice ends with the block. Non-temporal stores were not faster
// (0.10 s).
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes >= (int64_t{32} << 20)) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    // This is only advice, and systems that do not support it ignore it.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

void resize_frames_(const Tensor& out, const Tensor& frames_in) {
  const char* op = "resize_frames_";
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.dim() == 4 && out.is_contiguous(), op,
                  ": out: expected a contiguous uint8 tensor [F, C, height, width]");
  const Frames frames(op, frames_in, out.size(2), out.size(3));
  STD_TORCH_CHECK(out.size(0) == frames.count && out.size(1) == frames.channels, op,
                  ": out: expected the frames and channels of frames, [", frames.count, ", ", frames.channels,
                  ", height, width]");
  const uint8_t* const out_begin = out.const_data_ptr<uint8_t>();
  STD_TORCH_CHECK(frames.end() <= out_begin || out_begin + out.numel() <= frames.data, op,
                  ": out: overlaps with frames; pass a copy of frames");
  const Axis x = make_axis(frames.in_width, frames.width), y = make_axis(frames.in_height, frames.height);
  uint8_t* data = out.mutable_data_ptr<uint8_t>();
  const int64_t plane = frames.height * frames.width;
  torch::stable::parallel_for(0, frames.count, kFrameGrain, [&](int64_t begin, int64_t end) {
    Resizer resizer(frames, x, y);
    const int64_t padded = resizer.padded_width();
    std::vector<uint8_t> row(frames.channels * padded);
    for (int64_t f = begin; f < end; ++f) {
      resizer.start(frames.frame(f));
      for (int64_t i = 0; i < frames.height; ++i) {
        resizer.row(i, row.data(), padded);
        for (int64_t c = 0; c < frames.channels; ++c) {
          std::memcpy(data + (f * frames.channels + c) * plane + i * frames.width, row.data() + c * padded,
                      frames.width);
        }
      }
    }
  });
}

Tensor video_patches(const Tensor& frames_in, int64_t height, int64_t width, int64_t patch, int64_t temporal,
                     int64_t merge, const Tensor& mean_in, const Tensor& std_in, ScalarType dtype) {
  const char* op = "video_patches";
  const Frames frames(op, frames_in, height, width);
  STD_TORCH_CHECK(patch > 0 && patch <= kMaxPatch && temporal > 0 && merge > 0, op, ": patch: expected 1..", kMaxPatch,
                  "; temporal and merge: expected numbers above 0");
  STD_TORCH_CHECK(height % (patch * merge) == 0 && width % (patch * merge) == 0, op,
                  ": height and width: expected multiples of ", patch * merge, ", got ", height, " and ", width);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": dtype: expected float32, bfloat16 or float16");
  const float* mean = vector_data<float>(op, "mean", mean_in, frames.channels);
  const float* std = vector_data<float>(op, "std", std_in, frames.channels);
  const Axis x = make_axis(frames.in_width, width), y = make_axis(frames.in_height, height);
  const PatchGrid grid{patch, temporal, merge, height / patch, width / patch};
  const int64_t count = (frames.count + temporal - 1) / temporal * grid.rows * grid.columns;
  Tensor out = torch::stable::new_empty(frames_in, {count, grid.values(frames.channels)}, dtype);
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  if (dtype == ScalarType::Float) {
    write_patches(frames, x, y, grid, mean, std, out.mutable_data_ptr<float>());
  } else if (dtype == ScalarType::BFloat16) {
    write_patches(frames, x, y, grid, mean, std, static_cast<uint16_t*>(out.mutable_data_ptr()));
  } else {
    write_patches(frames, x, y, grid, mean, std, static_cast<Half*>(out.mutable_data_ptr()));
  }
  return out;
}

}  // namespace rmsd
