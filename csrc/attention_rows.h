// The problem of prefix attention as its passes see it, for one CPU level: a sequence and head, its scale, the words
// that products run over, and rows of the tensors in and out of them.
#pragma once

#include <initializer_list>
#include <limits>

#include "attention.h"
#include "simd.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest_score = -1e38f;  // where maxima start; times any exponent still finite, unlike -inf less -inf

constexpr int tile_vectors = 3;  // of queries, in a product
constexpr int64_t query_tile = tile_vectors * lanes;

// ---- the problem ----------------------------------------------------------------------------------------------------

// One sequence and head: its lengths, and where its rows begin in storage.
struct Sequence {
  int64_t b, n;
  int64_t q_len, k_len, prefix_len, offset, image_len;
  int64_t q_start, k_start;  // within the sequence's own rows if padded, else within all
  int64_t q_gap, k_gap;      // rows after the last that this sequence must fill with zeros
  int64_t lse_start;         // of its first query in [storage rows, N]

  // How many leading keys query i sees: never less than query i - 1.
  SIMVLM_INLINE int64_t limit(int64_t i) const { return least(k_len, most(prefix_len, offset + i + 1)); }
};

SIMVLM_INLINE Sequence sequence_of(const AttentionShape& shape, int64_t b, int64_t n) {
  const Bounds& at = shape.bounds;
  const bool last = b + 1 == shape.batch;
  Sequence s;
  s.b = b;
  s.n = n;
  s.q_len = at.q_lens[b];
  s.k_len = at.k_lens[b];
  s.prefix_len = at.prefix_lens[b];
  s.offset = at.q_offsets[b];
  s.image_len = at.image_lens[b];
  s.q_start = shape.padded ? 0 : at.q_starts[b];
  s.k_start = shape.padded ? 0 : at.k_starts[b];
  const int64_t q_end = shape.padded || last ? shape.q_rows : at.q_starts[b + 1];
  const int64_t k_end = shape.padded || last ? shape.k_rows : at.k_starts[b + 1];
  s.q_gap = q_end - s.q_start - s.q_len;
  s.k_gap = k_end - s.k_start - s.k_len;
  s.lse_start = ((shape.padded ? b * shape.q_rows : 0) + s.q_start) * shape.heads + n;
  return s;
}

// Scores are kept as ±<q, k> + bias/|scale|: the scale is not multiplied into q, which may be of 16 bits, but enters
// with the exponential. A scale out of all bounds is first brought within them by a power of two, which rounds nothing.
struct Scale {
  float q;     // what multiplies q: ±1, or a power of two
  float bias;  // what multiplies the table
  float rest;  // a kept score times this is the score
  float log2;  // and this is the exponent of 2
};

SIMVLM_INLINE Scale scale_of(float scale) {
  const uint32_t u = bits<uint32_t>(scale), exponent = (u >> 23) & 0xffu;
  if (exponent == 0) return {0.0f, 1.0f, 1.0f, 1.44269504f};  // 0, or too small for any score to matter
  const bool usual = exponent > 127 - 30 && exponent < 127 + 30;
  const float rest = bits<float>(usual ? u & 0x7fffffffu : (u & 0x7fffffu) | 0x3f800000u);
  return {usual ? (scale < 0 ? -1.0f : 1.0f) : bits<float>(u & 0xff800000u), 1.0f / rest, rest, rest * 1.44269504f};
}
// ---- words ----------------------------------------------------------------------------------------------------------

// Products run over 32-bit words: one float, or two bfloat16 that are neighbours along the summed axis.
struct Floats {
  static constexpr int64_t pack = 1;
  static SIMVLM_INLINE vfloat spread(const float* word) { return splat(load_as<float>(word)); }  // at any address
  static SIMVLM_INLINE vfloat multiply_add(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int64_t pack = 2;
  static SIMVLM_INLINE vfloat spread(const float* word) { return bits<vfloat>(vint{} + load_as<int32_t>(word)); }
  static SIMVLM_INLINE vfloat multiply_add(vfloat sum, vfloat a, vfloat b) {
    return bits<vfloat>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
  }

  // Two vectors rounded and paired lane by lane, a in the low halves.
  static SIMVLM_INLINE vfloat pair(vfloat a, vfloat b) {
    typedef uint16_t Halves __attribute__((vector_size(lanes * 4)));
    const Halves x = bits<Halves>(_mm512_cvtne2ps_pbh(bits<__m512>(b), bits<__m512>(a)));
    return bits<vfloat>(__builtin_shufflevector(x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                                25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }

  // A vector rounded, as the halves from number `half` on.
  static SIMVLM_INLINE void store_halves(float* to, int64_t half, vfloat v) {
    const auto halves = _mm512_cvtneps_pbh(bits<__m512>(v));
    __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + half, &halves, sizeof(halves));
  }
};
template <class Float>
struct WordsOf {
  typedef Floats Type;
};
template <>
struct WordsOf<BFloat16> {
  typedef Pairs Type;
};
#else
template <class Float>
struct WordsOf {
  typedef Floats Type;
};
#endif

// ---- rows in and out ------------------------------------------------------------------------------------------------

template <class Float>
SIMVLM_INLINE typename Float::Storage* row_at(const Tensor& t, const Sequence& s, int64_t row) {
  return static_cast<typename Float::Storage*>(t.data) + s.b * t.batch + row * t.row + s.n * t.head;
}

// A row of `width` elements times `factor` (16 bits: a power of two), as words; zeros up to whole vectors.
template <class Words, class Float>
SIMVLM_INLINE void row_to_words(const typename Float::Storage* from, int64_t width, float factor, float* to) {
  if constexpr (Words::pack == 1) {
    over_vectors<Float>(width, [&](int64_t h, auto part) { store(to + h, part.widen(from + h) * factor); });
  } else {
    constexpr int64_t whole = 2 * lanes;
    int64_t h = 0;
    for (; h + whole <= width; h += whole) store(to + h / 2, load_as<vfloat>(from + h));
    if (h < width) {
      uint16_t rest[whole] = {};
      std::memcpy(rest, from + h, sizeof(uint16_t) * static_cast<size_t>(width - h));
      store(to + h / 2, load_as<vfloat>(rest));
    }
    auto* halves = reinterpret_cast<uint16_t*>(to);
    for (h = 0; h < width && factor != 1.0f; h += lanes) Float::narrow(halves + h, Float::widen(halves + h) * factor);
  }
}

// Rows [first, first + count) of the sequence as words [rows, words_row], zeros past `count`.
template <class Words, class Float>
void rows_to_words(const Tensor& t, const Sequence& s, int64_t first, int64_t count, int64_t rows, int64_t width,
                   float factor, float* to) {
  const int64_t words_row = round_up(width, Words::pack * lanes) / Words::pack;
  for (int64_t i = 0; i < count; ++i) {
    row_to_words<Words, Float>(row_at<Float>(t, s, first + i), width, factor, to + i * words_row);
  }
  for (int64_t at = count * words_row; at < rows * words_row; at += lanes) store(to + at, vfloat{});
}

// Rows of words: row i at `at` + i·row.
struct Rows {
  const float* at;
  int64_t row;
};

// `count` rows of the sequence from `first` on as words [whole, …]: where they lie, if that is possible and wished,
// else a copy in `room`, with zeros past `count`. `left` is how many rows the sequence has from `first` on.
template <class Words, class Float>
Rows rows_of_words(const Tensor& t, const Sequence& s, int64_t first, int64_t count, int64_t whole, int64_t left,
                   int64_t width, bool in_place, float* room) {
  // Pairs: an odd stride is no number of words, and pair_rows reads whole vectors, which may end beyond the storage.
  const bool are_words = sizeof(typename Float::Storage) * Words::pack == sizeof(float) &&
                         (Words::pack == 1 || (t.row % Words::pack == 0 && width % lanes == 0));
  if (in_place && whole <= left && are_words) {
    return {reinterpret_cast<const float*>(row_at<Float>(t, s, first)),
            t.row * static_cast<int64_t>(sizeof(typename Float::Storage)) / 4};
  }
  rows_to_words<Words, Float>(t, s, first, count, whole, width, 1.0f, room);
  return {room, round_up(width, Words::pack * lanes) / Words::pack};
}

// Asks for rows that will be read soon: in [B, T, N, H] each lies on a page of its own, too far apart for the processor
// to foresee.
template <class Float>
SIMVLM_INLINE void prefetch_rows(const Tensor& t, const Sequence& s, int64_t width, int64_t first, int64_t count) {
  constexpr int64_t line = 64 / sizeof(typename Float::Storage);
  const auto* row = row_at<Float>(t, s, first);
  for (int64_t i = 0; i < count; ++i, row += t.row) {
    for (int64_t h = 0; h < width; h += line) __builtin_prefetch(row + h, 0, 2);
  }
  asm volatile("");  // gcc drops calls of functions that do nothing but this
}

// words[rows, words_row] → [words_row, to_row], both axes in whole vectors.
SIMVLM_INLINE void transpose_words(const float* from, int64_t rows, int64_t words_row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t h = 0; h < words_row; h += lanes) {
      vfloat x[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) x[l] = load(from + (i + l) * words_row + h);
      transpose(x);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) store(to + (h + l) * to_row + i, x[l]);
    }
  }
}

// The words of a product that sums over rows: floats as they are, bfloat16 with rows 2i and 2i + 1 paired. `from` holds
// words of rows (see rows_to_words); to [rows / pack, width in whole vectors].
template <class Words>
SIMVLM_INLINE void pair_rows(const Rows& from, int64_t rows, int64_t width, float* to) {
  static_assert(Words::pack == 2);
  const int64_t to_row = round_up(width, lanes);
  for (int64_t i = 0; i < rows; i += 2) {
    const auto* even = reinterpret_cast<const uint16_t*>(from.at + i * from.row);
    const auto* odd = reinterpret_cast<const uint16_t*>(from.at + (i + 1) * from.row);
    for (int64_t h = 0; h < to_row; h += lanes) {
      const vuint low = widen_halves(load_as<vhalf>(even + h));
      const vuint high = widen_halves(load_as<vhalf>(odd + h));
      store(to + i / 2 * to_row + h, bits<vfloat>(low | high << 16));
    }
  }
}

// Columns [0, rows) of tile[width, query_tile] as rows of the tensor, row i times factor[i].
template <class Float>
void tile_to_rows(const float* tile, int64_t width, const float* factor, const Tensor& t, const Sequence& s,
                  int64_t first, int64_t rows) {
  for (int64_t i = 0; i < rows; i += lanes) {
    over_vectors<Float>(width, [&](int64_t h, auto part) {
      vfloat x[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) x[l] = load(tile + (h + l) * query_tile + i);
      transpose(x);
      for (int64_t l = 0; l < least(lanes, rows - i); ++l) {
        part.narrow(row_at<Float>(t, s, first + i + l) + h, x[l] * factor[i + l]);
      }
    });
  }
}

// Zeros: all formats write zero as zero bits.
template <class Float>
void clear_rows(const Tensor& t, const Sequence& s, int64_t width, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memset(row_at<Float>(t, s, first + i), 0, sizeof(typename Float::Storage) * static_cast<size_t>(width));
  }
}

SIMVLM_INLINE void clear(float* to, int64_t floats) {
  for (int64_t i = 0; i < floats; i += lanes) store(to + i, vfloat{});
}

}  // namespace
}  // namespace simvlm::SIMVLM_LEVEL
