// The loops of video_kernels.h. The portable loops are here; video_loops.inl has the loops with vector instructions.

#include "video_kernels.h"

#include <algorithm>
#include <cstring>

#include "row_kernels.h"

#if defined(__x86_64__) && (defined(__clang__) || defined(__GNUC__))
#include <immintrin.h>
#define RMSD_X86 1
#endif

namespace rmsd {

Columns::Columns(const Axis& x, int64_t channels) {
  // When downscaling by 1.5, the input columns of 64 output columns fit in L1. Stronger downscaling uses fewer columns.
  constexpr int64_t kWanted = 512;
  const auto needed = [&](int64_t columns) {
    int64_t most = 0;
    for (int64_t i = 0; i < round_up(x.out, kPixelStep); i += columns) {
      most = std::max<int64_t>(most, x.start[i + columns - 1] - x.start[i]);
    }
    return round_up(most + 2 * x.pairs, 16);
  };
  for (chunk = 64; chunk > 8 && needed(chunk) > kWanted; chunk /= 2) {
  }
  pixels = needed(chunk);
  // Column pairs of kBlockRows rows, 4 bytes each, and 64 bytes for alignment.
  pairs.resize(pixels / 2 * channels * kBlockRows * 4 + 64);
  staged.resize(kBlockRows * channels * (pixels + 16));
}

namespace {

// Rounds to the nearest float16, ties to even. Numbers beyond 65504 become infinity; NaN does not occur here.
inline void from_float(float x, Half* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  // Changes the exponent bias from 127 to 15 and rounds off 13 bits of the mantissa.
  const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
  // Below 2^-14, float16 numbers are as far apart as float32 numbers at 0.5, so adding 0.5 rounds.
  float magnitude;
  std::memcpy(&magnitude, &size, sizeof(magnitude));
  magnitude += 0.5f;
  uint32_t small;
  std::memcpy(&small, &magnitude, sizeof(small));
  small -= 0x3f000000u;
  const uint32_t finite = size < 0x38800000u ? small : normal;
  to->bits = static_cast<uint16_t>(sign | (size >= 0x47800000u ? 0x7c00u : finite));
}
using rmsd::from_float;

// Processes one patch at a time. Its pixels are first copied to adjacent memory, so that the second loop is the same
// for every patch size. The function is inlined into each build and compiled with its instruction set.
template <typename T>
inline __attribute__((always_inline)) void patches_body(const uint8_t* rows, int64_t stride, const PatchRow& to,
                                                        float mean, float std, T* out) {
  alignas(64) uint8_t tile[kMaxPatch * kMaxPatch];
  const int64_t patch = to.patch, n = patch * patch;
  for (int64_t w = 0; w < to.count; ++w) {
    for (int64_t y = 0; y < patch; ++y) {
      std::memcpy(tile + y * patch, rows + y * stride + w * patch, patch);
    }
    T* at = out + (w / to.merge * to.merge * to.merge + w % to.merge) * to.stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      // Division, instead of multiplication by 1 / std, gives the same bits as torch. The stores take longer anyway.
      from_float((static_cast<float>(tile[i]) - mean) / std, at + i);
    }
  }
}

namespace portable {

// Processes rows in parallel as in video_loops.inl, in loops of fixed length that compilers vectorize.
void along_x(const RowBlock& rows, const Axis& x, Columns& room, uint8_t* out, int64_t stride, int64_t plane) {
  int16_t* columns = reinterpret_cast<int16_t*>(room.pairs.data());  // [pixel][C][row]
  const int64_t channels = rows.channels;
  for (int64_t begin = 0; begin < x.out; begin += room.chunk) {
    const int64_t end = std::min(begin + room.chunk, x.out), first = x.start[begin];
    const int64_t pixels = std::min(x.start[end - 1] + 2 * x.pairs, x.in) - first;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t offset = (first + p) * rows.sx + c * rows.sc;
        int16_t* to = columns + (p * channels + c) * kBlockRows;
        for (int64_t r = 0; r < kBlockRows; ++r) {
          to[r] = rows.row[r][offset];
        }
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      const int16_t* weights = x.weights_of(i);
      const int64_t start = x.start[i], taps = std::min(2 * x.pairs, x.in - start);
      for (int64_t c = 0; c < channels; ++c) {
        const int16_t* at = columns + ((start - first) * channels + c) * kBlockRows;
        int32_t sums[kBlockRows];
        std::fill_n(sums, kBlockRows, x.round());
        for (int64_t k = 0; k < taps; ++k, at += channels * kBlockRows) {
          const int16_t weight = weights[k];
#pragma omp simd
          for (int64_t r = 0; r < kBlockRows; ++r) {
            sums[r] += int32_t{weight} * int32_t{at[r]};
          }
        }
#pragma omp simd
        for (int64_t r = 0; r < kBlockRows; ++r) {
          sums[r] = std::min(std::max(sums[r] >> x.precision, 0), 255);
        }
        uint8_t* to = out + c * plane + 2 * i;
        for (int64_t r = 0; r < kBlockRows; r += 2, to += stride) {
          to[0] = static_cast<uint8_t>(sums[r]);
          to[1] = static_cast<uint8_t>(sums[r + 1]);
        }
      }
    }
  }
}

void along_y(const uint8_t* const* pairs, const int16_t* weights, const Axis& y, int64_t n, uint8_t* out) {
  for (int64_t start = 0; start < n; start += kPixelStep) {
    int32_t sums[kPixelStep];
    std::fill_n(sums, kPixelStep, y.round());
    for (int64_t k = 0; k < y.pairs; ++k) {
      const uint8_t* from = pairs[k] + 2 * start;
      const int32_t first = weights[2 * k], second = weights[2 * k + 1];
      for (int64_t i = 0; i < kPixelStep; ++i) {
        sums[i] += first * from[2 * i] + second * from[2 * i + 1];
      }
    }
    for (int64_t i = 0; i < kPixelStep; ++i) {
      out[start + i] = static_cast<uint8_t>(std::clamp(sums[i] >> y.precision, 0, 255));
    }
  }
}

template <typename T>
void patches(const uint8_t* rows, int64_t stride, const PatchRow& to, float mean, float std, T* out) {
  patches_body(rows, stride, to, mean, std, out);
}

constexpr VideoLoops kLoops = {along_x, along_y, patches<float>, patches<uint16_t>, patches<Half>};

}  // namespace portable

#ifdef RMSD_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
namespace avx2 {
#define V(name) _mm256_##name
#define V_BITS(name) _mm256_##name##_si256
#define RMSD_LANES 2
using vec = __m256i;
#include "video_loops.inl"
#undef V
#undef V_BITS
#undef RMSD_LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif
namespace avx512 {
#define V(name) _mm512_##name
#define V_BITS(name) _mm512_##name##_si512
#define RMSD_LANES 4
using vec = __m512i;
#include "video_loops.inl"
#undef V
#undef V_BITS
#undef RMSD_LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // RMSD_X86

}  // namespace

const VideoLoops& video_loops() {
#ifdef RMSD_X86
  if (cpu_level() == kAvx512) {
    return avx512::kLoops;
  }
  if (cpu_level() == kAvx2) {
    return avx2::kLoops;
  }
#endif
  return portable::kLoops;
}

}  // namespace rmsd
