// Prefix attention, forward and backward, for one CPU level (docs/attention.md derives the formulas).
//
// Query i of a sequence sees exactly its first `limit(i)` keys, and limits never fall from one query to the next: a
// tile of queries needs the key blocks below its last limit, and masks only where a block crosses a limit. Tiles start
// at the sequence's own first row and sums run in a fixed order, so results depend neither on the batch nor on the
// threads.
//
//   forward   task (sequence, head, chunk of queries): online softmax over key blocks.
//   backward  task (sequence, head): for each key block, for each query tile that sees it, P and dS are computed again
//             from lse; dK and dV stay in the block, dQ in float32 scratch, the table's gradient in a part of its own.
#include "attention.h"

#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int64_t key_block = 64;
constexpr int64_t query_tile = 48;    // a multiple of the product's 6 rows
constexpr int64_t query_chunk = 192;  // a forward task's queries: packing a key block is shared by four tiles
constexpr float infinity = std::numeric_limits<float>::infinity();

// ---- products -------------------------------------------------------------------------------------------------------

// C[rows, vectors·lanes] (+)= A·B over `depth`: A's element (m, k) at a + m·a_row + k·a_col, B and C row-major.
struct Product {
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  int64_t depth;
  bool accumulate;
};

constexpr int tile_rows = 6;
constexpr int tile_vectors = registers == 32 ? 4 : 2;  // 6·4 + 4 + 1 of 32 registers, 6·2 + 2 + 1 of 16

template <int Rows, int Vectors>
SIMVLM_INLINE void product_tile(const Product& p, int64_t m, int64_t column) {
  vfloat sum[Rows][Vectors];
  float* c = p.c + m * p.c_row + column;
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = p.accumulate ? load(c + r * p.c_row + v * lanes) : vfloat{};
  }
  const float* a = p.a + m * p.a_row;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k) {
    vfloat row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * lanes);
    for (int r = 0; r < Rows; ++r) {
      const vfloat x = splat(a[r * p.a_row]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * row[v];
    }
    a += p.a_col;
    b += p.b_row;
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(c + r * p.c_row + v * lanes, sum[r][v]);
  }
}

template <int Vectors>
void product_columns(const Product& p, int64_t rows, int64_t column) {
  int64_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) product_tile<tile_rows, Vectors>(p, m, column);
  switch (rows - m) {
    case 5:
      return product_tile<5, Vectors>(p, m, column);
    case 4:
      return product_tile<4, Vectors>(p, m, column);
    case 3:
      return product_tile<3, Vectors>(p, m, column);
    case 2:
      return product_tile<2, Vectors>(p, m, column);
    case 1:
      return product_tile<1, Vectors>(p, m, column);
    default:
      return;
  }
}

void product(const Product& p, int64_t rows, int64_t columns) {
  int64_t column = 0;
  for (; column + tile_vectors * lanes <= columns; column += tile_vectors * lanes) {
    product_columns<tile_vectors>(p, rows, column);
  }
  for (; column + 2 * lanes <= columns; column += 2 * lanes) product_columns<2>(p, rows, column);
  for (; column < columns; column += lanes) product_columns<1>(p, rows, column);
}

// ---- rows in and out ------------------------------------------------------------------------------------------------

// One sequence and head of the problem: its lengths, and where its rows begin in storage.
struct Sequence {
  int64_t b, n, width, padded_width;  // head_dim and head_dim rounded up to whole vectors
  int64_t q_len, k_len, prefix_len, offset, image_len;
  int64_t q_start, k_start;  // within the sequence's own rows if padded, else within all
  int64_t q_gap, k_gap;      // rows after the last that this sequence must fill with zeros
  int64_t grid_width, table_width;
  const float* table;  // of this head, or null; a copy with room after it, see table_room

  // How many leading keys query i sees.
  SIMVLM_INLINE int64_t limit(int64_t i) const { return least(k_len, most(prefix_len, offset + i + 1)); }
};

Sequence sequence_of(const AttentionShape& shape, const float* table, int64_t b, int64_t n) {
  const Bounds& at = shape.bounds;
  const bool last = b + 1 == shape.batch;
  Sequence s;
  s.b = b;
  s.n = n;
  s.width = shape.head_dim;
  s.padded_width = round_up(shape.head_dim, lanes);
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
  s.grid_width = shape.grid_width;
  s.table_width = 2 * shape.grid_width - 1;
  const int64_t size = (2 * shape.grid_height - 1) * s.table_width;
  s.table = table == nullptr || s.image_len == 0 ? nullptr : table + n * size;
  return s;
}

template <class Float>
SIMVLM_INLINE typename Float::Storage* row_at(const Tensor& t, const Sequence& s, int64_t row) {
  return static_cast<typename Float::Storage*>(t.data) + s.b * t.batch + row * t.row + s.n * t.head;
}

// to[0 … padded_width) = a row of `width` elements, zeros after it.
template <class Float>
SIMVLM_INLINE void widen_row(const typename Float::Storage* from, int64_t width, float* to) {
  int64_t h = 0;
  for (; h + lanes <= width; h += lanes) store(to + h, Float::widen(from + h));
  if (h < width) store(to + h, widen_part<Float>(from + h, width - h));
}

template <class Float>
SIMVLM_INLINE void narrow_row(const float* from, int64_t width, float factor, typename Float::Storage* to) {
  int64_t h = 0;
  for (; h + lanes <= width; h += lanes) Float::narrow(to + h, load(from + h) * factor);
  if (h < width) narrow_part<Float>(to + h, load(from + h) * factor, width - h);
}

// Rows [first, first + count) of the sequence as float32 [count, padded_width].
template <class Float>
void widen_rows(const Tensor& t, const Sequence& s, int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    widen_row<Float>(row_at<Float>(t, s, first + i), s.width, to + i * s.padded_width);
  }
}

// A key block's rows [first, first + count) as float32 [key_block, padded_width], zeros past `count`.
template <class Float>
void widen_block(const Tensor& t, const Sequence& s, int64_t first, int64_t count, float* to) {
  widen_rows<Float>(t, s, first, count, to);
  float* rest = to + count * s.padded_width;
  for (int64_t i = 0; i < (key_block - count) * s.padded_width; i += lanes) store(rest + i, vfloat{});
}

// [key_block, padded_width] → [width, key_block].
void transpose_block(const float* from, const Sequence& s, float* to) {
  for (int64_t j = 0; j < key_block; ++j) {
    for (int64_t h = 0; h < s.width; ++h) to[h * key_block + j] = from[j * s.padded_width + h];
  }
}

template <class Float>
void narrow_rows(const float* from, float factor, const Tensor& t, const Sequence& s, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    narrow_row<Float>(from + i * s.padded_width, s.width, factor, row_at<Float>(t, s, first + i));
  }
}

// Zeros: all formats write zero as zero bits.
template <class Float>
void clear_rows(const Tensor& t, const Sequence& s, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memset(row_at<Float>(t, s, first + i), 0, sizeof(typename Float::Storage) * static_cast<size_t>(s.width));
  }
}

// ---- the table ------------------------------------------------------------------------------------------------------

int64_t table_size(const AttentionShape& shape) { return (2 * shape.grid_height - 1) * (2 * shape.grid_width - 1); }

// A head's table in scratch, with room after it: windows are read and added to in whole vectors.
int64_t table_room(const AttentionShape& shape) {
  return shape.grid_height == 0 ? 0 : round_up(table_size(shape) + lanes, lanes);
}

// For a patch at position p, the bias over image keys is one contiguous window of table rows for each row of patches.
// Calls visit(offset of the first key within the block, offset in the table, length) for each window that a block
// meets, in order.
template <class Visit>
SIMVLM_INLINE void windows(const Sequence& s, int64_t p, int64_t first_key, int64_t grid_height, Visit visit) {
  const int64_t end = least(first_key + key_block, s.image_len);
  const int32_t width = static_cast<int32_t>(s.grid_width);  // 32-bit divisions are several times as fast
  const int32_t p_row = static_cast<int32_t>(p) / width, p_col = static_cast<int32_t>(p) % width;
  const int32_t j_row = static_cast<int32_t>(first_key) / width, j_col = static_cast<int32_t>(first_key) % width;
  int64_t table_at = (j_row - p_row + grid_height - 1) * s.table_width + j_col - p_col + width - 1;
  int64_t length = width - j_col;
  for (int64_t j = first_key; j < end;) {
    length = least(length, end - j);
    visit(j - first_key, table_at, length);
    j += length;
    table_at += s.table_width - width + length;  // the next row's window begins at its first column
    length = width;
  }
}

// Scores of one tile against one key block, in place: s·scale + bias, −inf where a query does not see the key.
void finish_scores(const Sequence& s, const AttentionShape& shape, int64_t first, int64_t rows, int64_t first_key,
                   float* scores) {
  const vint lane = lane_index();
  alignas(64) float bias[key_block + lanes];
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * key_block;
    const int64_t p = s.offset + first + i;
    const int64_t visible = s.limit(first + i) - first_key;
    if (s.table != nullptr && p < s.image_len && first_key < s.image_len) {
      windows(s, p, first_key, shape.grid_height, [&](int64_t at, int64_t from, int64_t length) {
        // Past the window lies another row of the table; the next window, or the zeros below, overwrite it.
        for (int64_t x = 0; x < length; x += lanes) store(bias + at + x, load(s.table + from + x));
      });
      const vint patches = splat_int(s.image_len - first_key);
      for (int64_t j = 0; j < key_block; j += lanes) {
        const vfloat b = lane + static_cast<int32_t>(j) < patches ? load(bias + j) : vfloat{};
        store(row + j, load(row + j) * shape.scale + b);
      }
    } else {
      for (int64_t j = 0; j < key_block; j += lanes) store(row + j, load(row + j) * shape.scale);
    }
    if (visible < key_block) {
      for (int64_t j = 0; j < key_block; j += lanes) {
        const vint index = lane + static_cast<int32_t>(j);
        store(row + j, index < static_cast<int32_t>(most(visible, 0)) ? load(row + j) : splat(-infinity));
      }
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

int64_t forward_scratch(const AttentionShape& shape, int64_t width) {
  return 2 * query_chunk * width + 2 * query_chunk + 3 * key_block * width + query_tile * key_block + table_room(shape);
}

// The head's table, copied to where there is room after it.
void take_table(const AttentionShape& shape, float* room, Sequence* s) {
  if (s->table == nullptr) return;
  std::memcpy(room, s->table, sizeof(float) * static_cast<size_t>(table_size(shape)));
  s->table = room;
}

// Folds one key block's scores of a tile into the running softmax: scores become unnormalised probabilities.
void fold_scores(int64_t rows, int64_t width, float* scores, float* top, float* total, float* sum) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * key_block;
    vfloat highest = splat(-infinity);
    for (int64_t j = 0; j < key_block; j += lanes) highest = max(highest, load(row + j));
    const float before = top[i], here = reduce_max(highest), now = here > before ? here : before;
    if (now == -infinity) {  // nothing seen yet
      for (int64_t j = 0; j < key_block; j += lanes) store(row + j, vfloat{});
      continue;
    }
    vfloat added = {};
    for (int64_t j = 0; j < key_block; j += lanes) {
      const vfloat p = exp_nonpositive(load(row + j) - now);
      added += p;
      store(row + j, p);
    }
    if (now != before) {
      const float decay = exp_nonpositive(splat(before - now))[0];
      total[i] *= decay;
      for (int64_t h = 0; h < width; h += lanes) store(sum + i * width + h, load(sum + i * width + h) * decay);
    }
    total[i] += reduce_add(added);
    top[i] = now;
  }
}

template <class Float>
bool forward_task(const AttentionForward& a, int64_t b, int64_t n, int64_t chunk) {
  Sequence s = sequence_of(a.shape, a.table, b, n);
  const int64_t first = chunk * query_chunk, rows = least(query_chunk, s.q_len - first);
  const int64_t width = s.padded_width;
  float* lse = a.lse + ((a.shape.padded ? b * a.shape.q_rows : 0) + s.q_start) * a.shape.heads + n;
  if (chunk == 0) {
    clear_rows<Float>(a.out, s, s.q_start + s.q_len, s.q_gap);
    for (int64_t i = s.q_len; i < s.q_len + s.q_gap; ++i) lse[i * a.shape.heads] = -infinity;
  }
  if (rows <= 0) return true;

  float* q = thread_scratch(forward_scratch(a.shape, width));
  if (q == nullptr) return false;
  float* sum = q + query_chunk * width;
  float* top = sum + query_chunk * width;
  float* total = top + query_chunk;
  float* k = total + query_chunk;
  float* v = k + key_block * width;
  float* k_transposed = v + key_block * width;
  float* scores = k_transposed + key_block * width;
  take_table(a.shape, scores + query_tile * key_block, &s);

  widen_rows<Float>(a.q, s, s.q_start + first, rows, q);
  for (int64_t i = 0; i < rows * width; i += lanes) store(sum + i, vfloat{});
  for (int64_t i = 0; i < rows; ++i) {
    top[i] = -infinity;
    total[i] = 0.0f;
  }
  const int64_t keys = s.limit(first + rows - 1);
  for (int64_t key = 0; key < keys; key += key_block) {
    const int64_t count = least(key_block, s.k_len - key);
    widen_block<Float>(a.k, s, s.k_start + key, count, k);
    widen_block<Float>(a.v, s, s.k_start + key, count, v);
    transpose_block(k, s, k_transposed);
    for (int64_t tile = 0; tile < rows; tile += query_tile) {
      const int64_t tile_rows_ = least(query_tile, rows - tile);
      if (s.limit(first + tile + tile_rows_ - 1) <= key) continue;
      product({q + tile * width, width, 1, k_transposed, key_block, scores, key_block, s.width, false}, tile_rows_,
              key_block);
      finish_scores(s, a.shape, first + tile, tile_rows_, key, scores);
      fold_scores(tile_rows_, width, scores, top + tile, total + tile, sum + tile * width);
      product({scores, key_block, 1, v, width, sum + tile * width, width, count, true}, tile_rows_, width);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool sees_any = s.limit(first + i) > 0;
    narrow_row<Float>(sum + i * width, s.width, sees_any ? 1.0f / total[i] : 0.0f,
                      row_at<Float>(a.out, s, s.q_start + first + i));
    lse[(first + i) * a.shape.heads] = sees_any ? top[i] + std::log(total[i]) : -infinity;
  }
  return true;
}

// ---- backward -------------------------------------------------------------------------------------------------------

int64_t backward_scratch(const AttentionShape& shape, int64_t width, int64_t q_len) {
  return q_len * width + round_up(q_len, lanes) + 6 * key_block * width + 2 * query_tile * width +
         2 * query_tile * key_block + 2 * table_room(shape);
}

// delta_i = <dout_i, out_i> − dlse_i: what a query's softmax subtracts from each dP.
template <class Float>
void deltas(const AttentionBackward& a, const Sequence& s, const float* dlse, float* delta) {
  alignas(64) float dout[128], out[128];
  for (int64_t i = 0; i < s.q_len; ++i) {
    widen_row<Float>(row_at<Float>(a.dout, s, s.q_start + i), s.width, dout);
    widen_row<Float>(row_at<Float>(a.out, s, s.q_start + i), s.width, out);
    vfloat sum = {};
    for (int64_t h = 0; h < s.padded_width; h += lanes) sum += load(dout + h) * load(out + h);
    delta[i] = reduce_add(sum) - (dlse == nullptr ? 0.0f : dlse[i * a.shape.heads]);
  }
}

// scores → P = exp(scores − lse) and dp → dS = P·(dP − delta); both exactly 0 where a query does not see the key.
void softmax_gradient(const Sequence& s, int64_t heads, int64_t first, int64_t rows, int64_t first_key,
                      const float* lse, const float* delta, float* scores, float* dp) {
  const vint lane = lane_index();
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t visible = static_cast<int32_t>(least(key_block, most(0, s.limit(first + i) - first_key)));
    const float row_lse = lse[(first + i) * heads], row_delta = delta[first + i];
    float *p_row = scores + i * key_block, *ds_row = dp + i * key_block;
    for (int64_t j = 0; j < key_block; j += lanes) {
      const vint seen = lane + static_cast<int32_t>(j) < visible;
      const vfloat p = exp_nonpositive(load(p_row + j) - row_lse);
      const vfloat ds = p * (load(ds_row + j) - row_delta);
      store(p_row + j, seen ? p : vfloat{});
      store(ds_row + j, seen ? ds : vfloat{});
    }
  }
}

template <class Float>
bool backward_task(const AttentionBackward& a, int64_t b, int64_t n) {
  Sequence s = sequence_of(a.shape, a.table, b, n);
  const int64_t width = s.padded_width, heads = a.shape.heads;
  const int64_t lse_at = ((a.shape.padded ? b * a.shape.q_rows : 0) + s.q_start) * heads + n;
  const float* lse = a.lse + lse_at;
  float* dq = thread_scratch(backward_scratch(a.shape, width, s.q_len));
  if (dq == nullptr) return false;
  float* delta = dq + s.q_len * width;
  float* k = delta + round_up(s.q_len, lanes);
  float* v = k + key_block * width;
  float* k_transposed = v + key_block * width;
  float* v_transposed = k_transposed + key_block * width;
  float* dk = v_transposed + key_block * width;
  float* dv = dk + key_block * width;
  float* q = dv + key_block * width;
  float* dout = q + query_tile * width;
  float* scores = dout + query_tile * width;
  float* dp = scores + query_tile * key_block;
  float* dtable = dp + query_tile * key_block;  // after dp: a vector that begins in dp's last row ends within scratch
  take_table(a.shape, dtable + table_room(a.shape), &s);
  const bool wants_table = a.dtable_parts != nullptr && s.image_len != 0;
  for (int64_t i = 0; wants_table && i < table_room(a.shape); i += lanes) store(dtable + i, vfloat{});

  for (int64_t i = 0; i < s.q_len * width; i += lanes) store(dq + i, vfloat{});
  deltas<Float>(a, s, a.dlse == nullptr ? nullptr : a.dlse + lse_at, delta);

  for (int64_t key = 0; key < s.k_len; key += key_block) {
    const int64_t count = least(key_block, s.k_len - key);
    widen_block<Float>(a.k, s, s.k_start + key, count, k);
    widen_block<Float>(a.v, s, s.k_start + key, count, v);
    transpose_block(k, s, k_transposed);
    transpose_block(v, s, v_transposed);
    for (int64_t i = 0; i < 2 * key_block * width; i += lanes) store(dk + i, vfloat{});  // dv follows dk
    for (int64_t tile = 0; tile < s.q_len; tile += query_tile) {
      const int64_t rows = least(query_tile, s.q_len - tile);
      if (s.limit(tile + rows - 1) <= key) continue;
      widen_rows<Float>(a.q, s, s.q_start + tile, rows, q);
      widen_rows<Float>(a.dout, s, s.q_start + tile, rows, dout);
      product({q, width, 1, k_transposed, key_block, scores, key_block, s.width, false}, rows, key_block);
      product({dout, width, 1, v_transposed, key_block, dp, key_block, s.width, false}, rows, key_block);
      finish_scores(s, a.shape, tile, rows, key, scores);
      softmax_gradient(s, heads, tile, rows, key, lse, delta, scores, dp);
      if (wants_table && key < s.image_len) {
        for (int64_t i = 0; i < rows && s.offset + tile + i < s.image_len; ++i) {
          const float* row = dp + i * key_block;
          windows(s, s.offset + tile + i, key, a.shape.grid_height, [&](int64_t at, int64_t to, int64_t length) {
            for (int64_t x = 0; x < length; x += lanes) {
              const vint inside = lane_index() < splat_int(length - x);
              store(dtable + to + x, load(dtable + to + x) + (inside ? load(row + at + x) : vfloat{}));
            }
          });
        }
      }
      product({scores, 1, key_block, dout, width, dv, width, rows, true}, count, width);
      product({dp, 1, key_block, q, width, dk, width, rows, true}, count, width);
      product({dp, key_block, 1, k, width, dq + tile * width, width, count, true}, rows, width);
    }
    if (a.dk.data != nullptr) narrow_rows<Float>(dk, a.shape.scale, a.dk, s, s.k_start + key, count);
    if (a.dv.data != nullptr) narrow_rows<Float>(dv, 1.0f, a.dv, s, s.k_start + key, count);
  }
  if (wants_table) {
    float* part = a.dtable_parts + (b * heads + n) * table_size(a.shape);
    std::memcpy(part, dtable, sizeof(float) * static_cast<size_t>(table_size(a.shape)));
  }
  if (a.dq.data != nullptr) {
    narrow_rows<Float>(dq, a.shape.scale, a.dq, s, s.q_start, s.q_len);
    clear_rows<Float>(a.dq, s, s.q_start + s.q_len, s.q_gap);
  }
  const Tensor* written[] = {&a.dk, &a.dv};
  for (const Tensor* t : written) {
    if (t->data == nullptr) continue;
    if (b == 0) clear_rows<Float>(*t, s, 0, s.k_start);  // the first sequence's keys may begin later
    clear_rows<Float>(*t, s, s.k_start + s.k_len, s.k_gap);
  }
  return true;
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// Waking a second thread costs more than this many multiply-adds.
constexpr int64_t worth_a_thread = 1 << 18;

int threads_for(const AttentionShape& shape) {
  int64_t work = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    work += static_cast<int64_t>(shape.bounds.q_lens[b]) * shape.bounds.k_lens[b] * shape.heads * shape.head_dim;
  }
  return static_cast<int>(least(shape.threads, 1 + work / worth_a_thread));
}

int64_t longest(const AttentionShape& shape) {
  int64_t length = 0;
  for (int64_t b = 0; b < shape.batch; ++b) length = most(length, shape.bounds.q_lens[b]);
  return length;
}

// A run of tasks: the problem, and whether one of them ran out of memory.
template <class Problem>
struct Run {
  const Problem* problem;
  int64_t chunks;
  bool failed;
};

template <class Float>
void forward_index(void* context, int64_t index) {
  auto* run = static_cast<Run<AttentionForward>*>(context);
  const int64_t heads = run->problem->shape.heads, chunk = index % run->chunks, bn = index / run->chunks;
  if (!forward_task<Float>(*run->problem, bn / heads, bn % heads, chunk)) {
    __atomic_store_n(&run->failed, true, __ATOMIC_RELAXED);
  }
}

template <class Float>
void backward_index(void* context, int64_t index) {
  auto* run = static_cast<Run<AttentionBackward>*>(context);
  const int64_t heads = run->problem->shape.heads;
  if (!backward_task<Float>(*run->problem, index / heads, index % heads)) {
    __atomic_store_n(&run->failed, true, __ATOMIC_RELAXED);
  }
}

// One head's table gradient: the parts of its sequences with an image, in order.
void sum_index(void* context, int64_t n) {
  const AttentionBackward& a = *static_cast<Run<AttentionBackward>*>(context)->problem;
  const int64_t size = table_size(a.shape);
  float* sum = a.dtable + n * size;
  for (int64_t i = 0; i < size; ++i) sum[i] = 0.0f;
  for (int64_t b = 0; b < a.shape.batch; ++b) {
    if (a.shape.bounds.image_lens[b] == 0) continue;
    const float* part = a.dtable_parts + (b * a.shape.heads + n) * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += part[i];
  }
}

}  // namespace

bool attention_forward(const AttentionForward& a) {
  Run<AttentionForward> run{&a, most(1, (longest(a.shape) + query_chunk - 1) / query_chunk), false};
  void (*task)(void*, int64_t) = a.shape.dtype == DType::float32    ? forward_index<Float32>
                                 : a.shape.dtype == DType::bfloat16 ? forward_index<BFloat16>
                                                                    : forward_index<Float16>;
  parallel_for(a.shape.batch * a.shape.heads * run.chunks, threads_for(a.shape), task, &run);
  return !run.failed;
}

bool attention_backward(const AttentionBackward& a) {
  Run<AttentionBackward> run{&a, 1, false};
  void (*task)(void*, int64_t) = a.shape.dtype == DType::float32    ? backward_index<Float32>
                                 : a.shape.dtype == DType::bfloat16 ? backward_index<BFloat16>
                                                                    : backward_index<Float16>;
  const int threads = threads_for(a.shape);
  parallel_for(a.shape.batch * a.shape.heads, threads, task, &run);
  if (a.dtable != nullptr && !run.failed) parallel_for(a.shape.heads, threads, sum_index, &run);
  return !run.failed;
}

}  // namespace simvlm::SIMVLM_LEVEL
