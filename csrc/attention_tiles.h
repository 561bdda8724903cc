// What both passes of prefix attention are made of, for one CPU level: the problem's sequences, products of small
// tiles, rows in and out of them, and the table's windows.
//
// A tile holds queries along the lanes and keys along the rows. K and V then enter the products as they lie in memory,
// one element spread over the lanes at a time; softmax runs down the rows without a sum across lanes; and the bias of
// one key for the queries of a tile is contiguous in the table read backwards (docs/attention.md).
#pragma once

#include <initializer_list>
#include <limits>

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int group = registers == 32 ? 8 : 4;  // a product's rows at a time; every head_dim is a multiple
constexpr int tile_vectors = 3;                 // 8·3 sums + 3 + 1 of 32 registers, 4·3 + 3 + 1 of 16
constexpr int64_t query_tile = tile_vectors * lanes;
constexpr int64_t key_block = 64;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float lowest_score = -1e38f;  // where maxima start; times any exponent still finite, unlike -inf less -inf

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

// ---- products -------------------------------------------------------------------------------------------------------

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

// A's word (row, k) at a + row·a_row + k·a_col; B's rows of words at b + k·b_row.
struct Operands {
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row;
  int64_t depth;
};

// One group of rows: sum[r][v] starts as begin(r, v) and gains A·B; then end(sum). No vector but these may live across
// the loop, or registers run out: what `end` joins its sums to it must load and store itself.
template <class Words, int Vectors, class Begin, class End>
SIMVLM_INLINE void product_group(const Operands& p, Begin begin, End end) {
  vfloat sum[group][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < group; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[r][v] = begin(r, v);
  }
  const float* a = p.a;
  const float* b = p.b;
  for (int64_t k = 0; k < p.depth; ++k) {
    vfloat column[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < group; ++r) {
      const vfloat x = Words::spread(a + r * p.a_row);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Words::multiply_add(sum[r][v], x, column[v]);
    }
    a += p.a_col;
    b += p.b_row;
  }
  end(sum);
}

template <int Vectors>
SIMVLM_INLINE void store_sums(const vfloat (&sum)[group][Vectors], float* to, int64_t row) {
#pragma GCC unroll 8
  for (int r = 0; r < group; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(to + r * row + v * lanes, sum[r][v]);
  }
}

// C[rows, Vectors·lanes] = C·decay + A·B; rows in whole groups, decay (of each column) 1 where it is null.
template <class Words, int Vectors>
void accumulate(Operands p, int64_t rows, float* c, int64_t c_row, const float* decay = nullptr) {
  for (int64_t m = 0; m < rows; m += group) {
    const auto end = [&](const auto& sum) { store_sums<Vectors>(sum, c, c_row); };
    if (decay == nullptr) {
      product_group<Words, Vectors>(p, [&](int r, int v) { return load(c + r * c_row + v * lanes); }, end);
    } else {
      product_group<Words, Vectors>(
          p, [&](int r, int v) { return load(c + r * c_row + v * lanes) * load(decay + v * lanes); }, end);
    }
    p.a += group * p.a_row;
    c += group * c_row;
  }
}

// The same for any number of columns, in whole vectors.
template <class Words>
void accumulate_wide(Operands p, int64_t rows, int64_t columns, float* c, int64_t c_row) {
  for (int64_t left = columns / lanes; left > 0;) {
    const int64_t taken = left == 4 ? 2 : least(left, tile_vectors);
    if (taken == 3) accumulate<Words, 3>(p, rows, c, c_row);
    if (taken == 2) accumulate<Words, 2>(p, rows, c, c_row);
    if (taken == 1) accumulate<Words, 1>(p, rows, c, c_row);
    p.b += taken * lanes;
    c += taken * lanes;
    left -= taken;
  }
}

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

// ---- the table ------------------------------------------------------------------------------------------------------

// A table in scratch has room before and after it, for windows are read and added to in whole vectors.
static_assert(table_margin >= lanes);

// The table backwards, times `factor`, within its room.
SIMVLM_INLINE void reverse_table(const float* table, int64_t size, float factor, float* room) {
  for (int64_t i = 0; i < size; ++i) room[table_margin + i] = table[size - 1 - i] * factor;
}

// Where a tile's queries meet the table.
//
// Position x stands at u(x) = x + row(x)·(Gw - 1) on a grid 2·Gw - 1 wide, and the entry of query p and key j is number
// u(p) - u(j) + centre of the table read backwards. Neighbouring queries of one grid row thus read neighbouring
// entries; from one grid row to the next the entry moves by Gw - 1 more. A vector of queries meets a few grid rows: a
// segment each.
struct Windows {
  static constexpr int most_segments = lanes + 1;
  struct Segment {
    int64_t at;  // entry of lane 0 less -u(j): may lie outside the table where lane 0 is not inside
    vint inside;
  };
  int64_t count[tile_vectors];  // 0: no patch among these queries
  Segment segments[tile_vectors][most_segments];
};

SIMVLM_INLINE void find_windows(const AttentionShape& shape, const Sequence& s, int64_t first, int vectors,
                                Windows* w) {
  const int64_t width = shape.grid_width, centre = (table_size(shape) - 1) / 2;
  for (int v = 0; v < vectors; ++v) {
    const int64_t begin = s.offset + first + v * lanes, end = least(begin + lanes, s.image_len);
    int64_t count = 0;
    for (int64_t p = begin; p < end; ++count) {
      const int64_t row = p / width, next = width == 1 ? end : least(end, (row + 1) * width);
      const vint lane = lane_index();
      Windows::Segment& segment = w->segments[v][count];
      segment.at = table_margin + centre + begin + row * (width - 1);
      segment.inside = (lane >= splat_int(p - begin)) & (lane < splat_int(next - begin));
      p = next;
    }
    w->count[v] = count;
  }
}

// u(j) of a block's keys from `first_key` on, as many as are patches; returns their number.
SIMVLM_INLINE int64_t key_places(const AttentionShape& shape, const Sequence& s, int64_t first_key, int64_t rows,
                                 int64_t* places) {
  const int64_t count = least(rows, most(0, s.image_len - first_key)), width = shape.grid_width;
  if (count == 0) return 0;
  int64_t row = first_key / width, end = (row + 1) * width;
  for (int64_t j = 0; j < count; ++j) {
    if (first_key + j == end) {
      ++row;
      end += width;
    }
    places[j] = first_key + j + row * (width - 1);
  }
  return count;
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// What one tile of queries needs to know to score a block of keys.
struct Tile {
  int64_t first;              // its first query
  int64_t rows;               // queries
  const float* q;             // words [head_dim / pack, query_tile]
  const float* table;         // reversed, or null
  Windows windows;            // where there is a table
  vint limits[tile_vectors];  // of each lane
};

SIMVLM_INLINE void place_tile(const AttentionShape& shape, const Sequence& s, int64_t first, int64_t rows,
                              const float* table, Tile* tile) {
  tile->first = first;
  tile->rows = rows;
  tile->table = table != nullptr && s.offset + first < s.image_len ? table : nullptr;
  const int vectors = static_cast<int>((rows + lanes - 1) / lanes);
  if (tile->table != nullptr) find_windows(shape, s, first, vectors, &tile->windows);
  for (int v = 0; v < vectors; ++v) {
    const vint seen = lane_index() + splat_int(least(s.offset + first + v * lanes + 1, s.k_len));
    const vint prefix = splat_int(s.prefix_len), keys = splat_int(s.k_len);
    const vint wide = seen > prefix ? seen : prefix;
    tile->limits[v] = wide < keys ? wide : keys;
  }
}

// scores[rows in whole groups, query_tile] of a block of keys, and the largest of each column joined into `top`; -inf
// where a query does not see the key. meanwhile(m) is called before the
// product of rows m … m + group.
template <class Words, int Vectors, class Meanwhile>
SIMVLM_INLINE void score_block(const AttentionShape& shape, const Sequence& s, const Tile& tile, const Rows& keys,
                               int64_t first_key, int64_t rows, float* scores, float* top, Meanwhile meanwhile) {
  int64_t places[key_block];
  const int64_t patches = tile.table == nullptr ? 0 : key_places(shape, s, first_key, rows, places);
  for (int v = 0; v < Vectors && patches > 0; ++v) {
    const int64_t count = tile.windows.count[v];
    const Windows::Segment* segments = tile.windows.segments[v];
    for (int64_t j = 0; j < patches; ++j) {
      vfloat bias = {};
      const float* at = tile.table - places[j];
      for (int64_t i = 0; i < count; ++i) bias = segments[i].inside ? load(at + segments[i].at) : bias;
      store(scores + j * query_tile + v * lanes, bias);
    }
  }
  const bool all_seen = s.limit(tile.first) >= first_key + round_up(rows, group);
  for (int64_t m = 0; m < rows; m += group) {
    const Operands p{keys.at + m * keys.row, keys.row, 1, tile.q, query_tile, shape.head_dim / Words::pack};
    float* to = scores + m * query_tile;
    meanwhile(m);
    const int64_t biased = patches - m;
    product_group<Words, Vectors>(
        p, [&](int r, int v) { return r < biased ? load(to + r * query_tile + v * lanes) : vfloat{}; },
        [&](auto& sum) {
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) {
            vfloat highest = load(top + v * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < group; ++r) {
              if (!all_seen) {
                sum[r][v] = splat_int(first_key + m + r) < tile.limits[v] ? sum[r][v] : splat(-infinity);
              }
              highest = max(highest, sum[r][v]);
              store(to + r * query_tile + v * lanes, sum[r][v]);
            }
            store(top + v * lanes, highest);
          }
        });
  }
}

}  // namespace
}  // namespace simvlm::SIMVLM_LEVEL
