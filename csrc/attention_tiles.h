// What both passes of prefix attention over tiles are made of, for one CPU level: products, the windows of the table,
// and scores.
//
// A tile holds queries along the lanes and keys along the rows. K and V then enter the products as they lie in memory,
// one element spread over the lanes at a time; softmax runs down the rows without a sum across lanes; and the bias of
// one key for the queries of a tile is contiguous in the table read backwards (docs/attention.md).
#pragma once

#include "attention.h"
#include "attention_rows.h"
#include "simd.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int group = registers == 32 ? 8 : 4;  // a product's rows at a time: 8·3 sums + 3 + 1 of 32 registers, or
                                                // 4·3 + 3 + 1 of 16; every head_dim is a multiple
constexpr int64_t key_block = 64;

// ---- products -------------------------------------------------------------------------------------------------------

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
    // The bias comes last: sums that begin with it round every product to its size.
    product_group<Words, Vectors>(
        p, [](int, int) { return vfloat{}; },
        [&](auto& sum) {
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) {
            vfloat highest = load(top + v * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < group; ++r) {
              if (r < biased) sum[r][v] += load(to + r * query_tile + v * lanes);
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
