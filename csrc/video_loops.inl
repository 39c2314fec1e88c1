// The loops of video_kernels.h with vectors of RMSD_LANES lanes of 16 bytes. video_kernels.cpp includes this file once
// per instruction set. Instructions work lane by lane; V(name) is an intrinsic.
//
// In the pass along x, a vector holds 4 rows per lane, 32 bits per row: two adjacent pixels of the row as 16-bit
// numbers. One multiply-add therefore processes two taps of an output column for all rows.

constexpr int64_t kLanes = RMSD_LANES;
constexpr int64_t kRows = 4 * kLanes;
constexpr int64_t kBytes = 16 * kLanes;

#if RMSD_LANES == 4
inline vec every_lane(__m128i lane) { return _mm512_broadcast_i32x4(lane); }
// Loads one 16-byte piece of each of rows 0, 4, 8 and 12.
inline vec load_lanes(const uint8_t* const* rows, int64_t offset) {
  const auto piece = reinterpret_cast<const __m128i*>(rows[0] + offset);
  vec v = _mm512_castsi128_si512(_mm_loadu_si128(piece));
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4] + offset)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[8] + offset)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[12] + offset)), 3);
}
// Stores lane l at `at` + 2 * l * stride.
inline void store_lanes(vec v, uint8_t* at, int64_t stride) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_castsi512_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * stride), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 4 * stride), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 6 * stride), _mm512_extracti32x4_epi32(v, 3));
}
inline vec load_widened(const uint8_t* at) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
// Interleaves the 32-bit words of the four lanes.
inline vec in_order(vec v) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
#else
inline vec every_lane(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }
inline vec load_lanes(const uint8_t* const* rows, int64_t offset) {
  const vec v = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0] + offset)));
  return _mm256_inserti128_si256(v, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4] + offset)), 1);
}
inline void store_lanes(vec v, uint8_t* at, int64_t stride) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 2 * stride), _mm256_extracti128_si256(v, 1));
}
inline vec load_widened(const uint8_t* at) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
inline vec in_order(vec v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
#endif

inline vec two_weights(const int16_t* at) {
  int32_t both;
  std::memcpy(&both, at, sizeof(both));
  return V(set1_epi32)(both);
}

// Converts four vectors of 32-bit sums to uint8: 4 bytes of the first vector's lane, 4 of the second's, and so on.
inline vec to_bytes(const vec* sums, __m128i precision) {
  const vec first = V(packs_epi32)(V(sra_epi32)(sums[0], precision), V(sra_epi32)(sums[1], precision));
  const vec second = V(packs_epi32)(V(sra_epi32)(sums[2], precision), V(sra_epi32)(sums[3], precision));
  return V(packus_epi16)(first, second);
}

// Sets v[j] to the 32-bit words j of the old v[0], v[1], v[2], v[3], lane by lane.
inline void transpose(vec* v) {
  const vec a = V(unpacklo_epi32)(v[0], v[1]), b = V(unpackhi_epi32)(v[0], v[1]);
  const vec c = V(unpacklo_epi32)(v[2], v[3]), d = V(unpackhi_epi32)(v[2], v[3]);
  v[0] = V(unpacklo_epi64)(a, c);
  v[1] = V(unpackhi_epi64)(a, c);
  v[2] = V(unpacklo_epi64)(b, d);
  v[3] = V(unpackhi_epi64)(b, d);
}

// Stores four pixels of every row as two vectors of pairs, `step` vectors apart.
inline void store_pairs(vec four_pixels, vec* at, int64_t step) {
  const vec low = every_lane(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
  const vec high = every_lane(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
  at[0] = V(shuffle_epi8)(four_pixels, low);
  at[step] = V(shuffle_epi8)(four_pixels, high);
}

// Loads columns [first, first + pixels) of kRows rows. The rows must be readable 16 bytes beyond the last column.
template <int C>
void load_columns(const uint8_t* const* rows, bool interleaved, int64_t plane, int64_t first, int64_t pixels,
                  vec* columns) {
  vec v[4];
  if (interleaved) {
    const __m128i by_channel = C == 3 ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                                      : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t x = 0; x < pixels; x += 4, columns += 2 * C) {
      for (int i = 0; i < 4; ++i) {
        v[i] = V(shuffle_epi8)(load_lanes(rows + i, (first + x) * C), every_lane(by_channel));
      }
      transpose(v);
      for (int c = 0; c < C; ++c) {
        store_pairs(v[c], columns + c, C);
      }
    }
    return;
  }
  for (int64_t x = 0; x < pixels; x += 16, columns += 8 * C) {
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < 4; ++i) {
        v[i] = load_lanes(rows + i, c * plane + first + x);
      }
      transpose(v);
      for (int i = 0; i < 4; ++i) {
        store_pairs(v[i], columns + 2 * i * C + c, C);
      }
    }
  }
}

// Copies rows that load_columns cannot read in place: to [row][C][width] planes, or unchanged if they are interleaved.
inline int64_t stage(const RowBlock& block, const uint8_t* const* from, bool interleaved, int64_t first, int64_t pixels,
                     int64_t in, uint8_t* staged, const uint8_t** to) {
  const int64_t width = pixels + 16, valid = std::min(pixels, in - first), channels = block.channels;
  for (int64_t r = 0; r < kRows; ++r) {
    uint8_t* at = staged + r * channels * width;
    to[r] = at;
    if (interleaved) {
      std::memcpy(at, from[r] + first * channels, valid * channels);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c, at += width) {
      const uint8_t* source = from[r] + c * block.sc + first * block.sx;
      for (int64_t x = 0; x < valid; ++x) {
        at[x] = source[x * block.sx];
      }
    }
  }
  return width;
}

template <int C>
void resize_columns(const vec* columns, const Axis& axis, int64_t begin, int64_t end, uint8_t* out, int64_t stride,
                    int64_t plane) {
  // Transposes [column][row] to [row][column], two rows at a time, in the halves of a lane.
  const vec by_row = every_lane(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const vec round = V(set1_epi32)(axis.round());
  const __m128i precision = _mm_cvtsi32_si128(axis.precision);
  const int64_t pairs = axis.pairs, first = axis.start[begin];
  for (int64_t x = begin; x < end; x += 8) {
    vec packed[2][C];
    for (int half = 0; half < 2; ++half) {
      vec sums[C][4];
      for (int i = 0; i < 4; ++i) {
        const int64_t column = x + 4 * half + i;
        const vec* at = columns + (axis.start[column] - first) / 2 * C;
        const int16_t* weights = axis.weights_of(column);
        vec sum[C];
        for (int c = 0; c < C; ++c) {
          sum[c] = round;
        }
        for (int64_t k = 0; k < pairs; ++k, at += C) {
          const vec weight = two_weights(weights + 2 * k);
          for (int c = 0; c < C; ++c) {
            sum[c] = V(add_epi32)(sum[c], V(madd_epi16)(at[c], weight));
          }
        }
        for (int c = 0; c < C; ++c) {
          sums[c][i] = sum[c];
        }
      }
      for (int c = 0; c < C; ++c) {
        packed[half][c] = V(shuffle_epi8)(to_bytes(sums[c], precision), by_row);
      }
    }
    for (int c = 0; c < C; ++c) {
      uint8_t* at = out + c * plane + 2 * x;
      store_lanes(V(unpacklo_epi64)(packed[0][c], packed[1][c]), at, stride);
      store_lanes(V(unpackhi_epi64)(packed[0][c], packed[1][c]), at + stride, stride);
    }
  }
}

template <int C>
void along_x_of(const RowBlock& block, const Axis& axis, Columns& room, uint8_t* out, int64_t stride, int64_t plane) {
  const bool interleaved = C >= 3 && block.sc == 1 && block.sx == C;
  const auto address = reinterpret_cast<uintptr_t>(room.pairs.data());
  vec* columns = reinterpret_cast<vec*>(room.pairs.data() + (-address & 63));
  const uint8_t* staged[kRows];
  for (int64_t r = 0; r < kBlockRows; r += kRows, out += kRows / 2 * stride) {
    for (int64_t begin = 0; begin < axis.out; begin += room.chunk) {
      const int64_t end = begin + room.chunk, first = axis.start[begin];
      const int64_t pixels = round_up(axis.start[end - 1] + 2 * axis.pairs - first, 16);
      // The interleaved form reads at most 6 bytes beyond the pixels.
      if (first + pixels + 2 <= axis.in && (interleaved || block.sx == 1)) {
        load_columns<C>(block.row + r, interleaved, block.sc, first, pixels, columns);
      } else {
        const int64_t width =
            stage(block, block.row + r, interleaved, first, pixels, axis.in, room.staged.data(), staged);
        load_columns<C>(staged, interleaved, width, 0, pixels, columns);
      }
      resize_columns<C>(columns, axis, begin, end, out, stride, plane);
    }
  }
}

void along_x(const RowBlock& block, const Axis& axis, Columns& room, uint8_t* out, int64_t stride, int64_t plane) {
  switch (block.channels) {
    case 1:
      return along_x_of<1>(block, axis, room, out, stride, plane);
    case 2:
      return along_x_of<2>(block, axis, room, out, stride, plane);
    case 3:
      return along_x_of<3>(block, axis, room, out, stride, plane);
    default:
      return along_x_of<4>(block, axis, room, out, stride, plane);
  }
}

void along_y(const uint8_t* const* pairs, const int16_t* weights, const Axis& axis, int64_t n, uint8_t* out) {
  const vec round = V(set1_epi32)(axis.round());
  const __m128i precision = _mm_cvtsi32_si128(axis.precision);
  const int64_t count = axis.pairs;
  for (int64_t x = 0; x < n; x += kBytes) {
    vec sums[4] = {round, round, round, round};
    for (int64_t k = 0; k < count; ++k) {
      const vec weight = two_weights(weights + 2 * k);
      const uint8_t* from = pairs[k] + 2 * x;
      for (int i = 0; i < 4; ++i) {
        sums[i] = V(add_epi32)(sums[i], V(madd_epi16)(load_widened(from + i * kBytes / 2), weight));
      }
    }
    V_BITS(storeu)(reinterpret_cast<vec*>(out + x), in_order(to_bytes(sums, precision)));
  }
}

template <typename T>
void patches(const uint8_t* rows, int64_t stride, const PatchRow& to, float mean, float std, T* out) {
  patches_body(rows, stride, to, mean, std, out);
}

constexpr VideoLoops kLoops = {along_x, along_y, patches<float>, patches<uint16_t>, patches<Half>};
