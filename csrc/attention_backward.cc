// Prefix attention backward, for one CPU level (docs/attention.md derives the formulas).
//
// P and dS are computed again from lse, tile by tile: a tile of queries stays in the processor while the blocks of keys
// that it sees go by. dQ is whole after the last block; dK, dV and the table's gradient gather what the tiles add, in
// order. A task is one (sequence, head); where those are too few for the threads, its queries (for dQ) and its keys
// (for the rest) are cut into tasks of their own, which compute the same sums in the same order.
#include "attention_tasks.h"
#include "attention_tiles.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int64_t query_chunk = 4 * query_tile;

// What a task computes, and of which queries and keys.
struct Share {
  bool q, k, v, table;
  int64_t q_begin, q_end, k_begin, k_end;
};

struct Scratch {
  int64_t k, v, k_paired, dk, dv, q, dout, q_paired, dout_paired, q_tile, dout_tile, dq, scores, dp, p_halves,
      ds_halves, ds_paired, table, end;

  Scratch(const AttentionShape& shape, int64_t keys) {
    const int64_t width = round_up(shape.head_dim, lanes), all = round_up(keys, group) * width;
    const int64_t tile = query_tile * width, block = key_block * query_tile;
    k = 0;
    v = k + all;
    k_paired = v + all;
    dk = k_paired + all / 2;
    dv = dk + all;
    q = dv + all;
    dout = q + tile;
    q_paired = dout + tile;
    dout_paired = q_paired + tile / 2;
    q_tile = dout_paired + tile / 2;
    dout_tile = q_tile + tile;
    dq = dout_tile + tile;
    scores = dq + tile;
    dp = scores + block;
    p_halves = dp + block;
    ds_halves = p_halves + block / 2;
    ds_paired = ds_halves + block / 2;
    table = ds_paired + block / 2;
    end = table + table_part(shape);
  }
};

// delta_i = <dout_i, out_i> − dlse_i: what a query's softmax subtracts from each dP.
template <class Float>
void deltas(const AttentionBackward& a, const Sequence& s, const Tile& tile, float* delta) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t row = s.q_start + tile.first + i;
    const auto *dout = row_at<Float>(a.dout, s, row), *out = row_at<Float>(a.out, s, row);
    vfloat sum = {};
    over_vectors<Float>(a.shape.head_dim,
                        [&](int64_t h, auto part) { sum += part.widen(dout + h) * part.widen(out + h); });
    delta[i] = reduce_add(sum) - (a.dlse == nullptr ? 0.0f : a.dlse[s.lse_start + (tile.first + i) * a.shape.heads]);
  }
}

// The products' operands that a tile's P and dS become: rows of queries for dV and dK, and dS by pairs of keys for dQ.
// Floats are all of these as they are.
struct Gradients {
  float *p, *ds;  // [rows, query_tile] floats
  float *p_rows, *ds_rows, *ds_paired;
};

// What the softmax of each query of a tile is made of: a score less its lse, in the scores' units, is less `base` and
// less what float32 rounded off `base`, which times the exponent of 2 is `rest`.
struct Softmax {
  alignas(64) float base[query_tile], rest[query_tile], delta[query_tile];
};

// scores → P = 2^((scores − base)·exponent + rest) and dp → dS = P·(dP − delta); where `Masked`, both exactly 0 where a
// query does not see the key, whatever dP is.
template <class Words, int Vectors, bool Masked>
void softmax_gradient(int64_t rows, float exponent, const Softmax& softmax, const Gradients& g) {
  for (int v = 0; v < Vectors; ++v) {
    const vfloat base = load(softmax.base + v * lanes), rest = load(softmax.rest + v * lanes);
    const vfloat delta = load(softmax.delta + v * lanes);
    for (int64_t j = 0; j < rows; j += 2) {
      vfloat p[2], ds[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (j + i) * query_tile + v * lanes;
        const vfloat score = load(g.p + at);
        p[i] = exp2_nonpositive((score - base) * exponent + rest);
        ds[i] = p[i] * (load(g.ds + at) - delta);
        if constexpr (Masked) ds[i] = score == splat(-infinity) ? vfloat{} : ds[i];
        store(g.ds + at, ds[i]);
        if constexpr (Words::pack == 1) {
          store(g.p + at, p[i]);
        } else {
          Words::store_halves(g.p_rows, at, p[i]);
          Words::store_halves(g.ds_rows, at, ds[i]);
        }
      }
      if constexpr (Words::pack == 2) {
        store(g.ds_paired + j / 2 * query_tile + v * lanes, Words::pair(ds[0], ds[1]));
      }
    }
  }
}

// The table's gradient: each key's row of dS is added along the windows that its bias was read from. Keys that stand
// next to each other add to overlapping windows, so they are taken far apart: a load must not wait for the store of the
// window before.
template <int Vectors>
void add_to_table(const AttentionShape& shape, const Sequence& s, const Windows& windows, int64_t first_key,
                  int64_t rows, const float* ds, float* dtable) {
  constexpr int64_t apart = 16;
  int64_t places[key_block];
  const int64_t patches = key_places(shape, s, first_key, rows, places);
  for (int64_t start = 0; start < least(apart, patches); ++start) {
    for (int64_t j = start; j < patches; j += apart) {
      for (int v = 0; v < Vectors; ++v) {
        const vfloat row = load(ds + j * query_tile + v * lanes);
        for (int64_t i = 0; i < windows.count[v]; ++i) {
          const Windows::Segment& segment = windows.segments[v][i];
          float* to = dtable + (segment.at - places[j]);
          store(to, load(to) + (segment.inside ? row : vfloat{}));
        }
      }
    }
  }
}

template <class Words, int Vectors>
void backward_block(const AttentionBackward& a, const Sequence& s, const Share& share, const Scratch& at,
                    float* scratch, const Tile& tile, const Softmax& softmax, float exponent, int64_t first_key,
                    int64_t keys, float* dtable) {
  const AttentionShape& shape = a.shape;
  const int64_t width = round_up(shape.head_dim, lanes), rows = round_up(keys, group), depth = Vectors * lanes;
  const int64_t words_row = round_up(shape.head_dim, Words::pack * lanes) / Words::pack;
  const int64_t words = (first_key - share.k_begin) * words_row, floats = (first_key - share.k_begin) * width;
  const bool by_rows = Words::pack == 1;
  const Gradients g{scratch + at.scores, scratch + at.dp, scratch + (by_rows ? at.scores : at.p_halves),
                    scratch + (by_rows ? at.dp : at.ds_halves), scratch + (by_rows ? at.dp : at.ds_paired)};

  alignas(64) float top[query_tile] = {};
  score_block<Words, Vectors>(shape, s, tile, {scratch + at.k + words, words_row}, first_key, keys, g.p, top,
                              [](int64_t) {});
  for (int64_t m = 0; m < rows; m += group) {
    const Operands p{scratch + at.v + words + m * words_row,
                     words_row,
                     1,
                     scratch + at.dout_tile,
                     query_tile,
                     shape.head_dim / Words::pack};
    product_group<Words, Vectors>(
        p, [](int, int) { return vfloat{}; },
        [&](const auto& sum) { store_sums<Vectors>(sum, g.ds + m * query_tile, query_tile); });
  }
  if (s.limit(tile.first) >= first_key + rows) {
    softmax_gradient<Words, Vectors, false>(rows, exponent, softmax, g);
  } else {
    softmax_gradient<Words, Vectors, true>(rows, exponent, softmax, g);
  }
  if (dtable != nullptr && tile.table != nullptr) {
    add_to_table<Vectors>(shape, s, tile.windows, first_key, keys, g.ds, dtable);
  }
  const int64_t row = query_tile / Words::pack;
  const float *q = scratch + (by_rows ? at.q : at.q_paired), *dout = scratch + (by_rows ? at.dout : at.dout_paired);
  if (share.v) {
    accumulate_wide<Words>({g.p_rows, row, 1, dout, width, depth / Words::pack}, rows, width, scratch + at.dv + floats,
                           width);
  }
  if (share.k) {
    accumulate_wide<Words>({g.ds_rows, row, 1, q, width, depth / Words::pack}, rows, width, scratch + at.dk + floats,
                           width);
  }
  if (share.q) {
    const float* k = by_rows ? scratch + at.k + floats : scratch + at.k_paired + floats / 2;
    accumulate<Words, Vectors>({k, 1, width, g.ds_paired, query_tile, rows / Words::pack}, shape.head_dim,
                               scratch + at.dq, query_tile);
  }
}

// [rows, width] in scratch as rows of the tensor, times `factor`.
template <class Float>
void scratch_to_rows(const float* from, int64_t width, float factor, const Tensor& t, const Sequence& s, int64_t first,
                     int64_t count) {
  const int64_t row = round_up(width, lanes);
  for (int64_t i = 0; i < count; ++i) {
    auto* to = row_at<Float>(t, s, first + i);
    over_vectors<Float>(width, [&](int64_t h, auto part) { part.narrow(to + h, load(from + i * row + h) * factor); });
  }
}

template <class Float>
bool backward_task(const AttentionBackward& a, int64_t b, int64_t n, const Share& share) {
  typedef typename WordsOf<Float>::Type Words;
  const AttentionShape& shape = a.shape;
  const Sequence s = sequence_of(shape, b, n);
  const int64_t width = shape.head_dim, keys = share.k_end - share.k_begin, whole_keys = round_up(keys, group);
  const int64_t words_row = round_up(width, Words::pack * lanes) / Words::pack;
  const Scratch at(shape, keys);
  float* scratch = thread_scratch(at.end);
  if (scratch == nullptr) return false;
  const Scale scale = scale_of(shape.scale);

  const float* table = nullptr;
  if (a.table != nullptr && s.offset + share.q_begin < s.image_len) {
    reverse_table(a.table + n * table_size(shape), table_size(shape), scale.bias, scratch + at.table);
    table = scratch + at.table;
  }
  float* dtable = nullptr;  // of the keys' first chunk
  if (share.table && s.image_len > share.k_begin) {
    dtable = a.dtable_parts +
             ((b * shape.heads + n) * table_chunks(shape) + share.k_begin / table_chunk) * table_part(shape);
    const int64_t end = least(share.k_end, s.image_len);
    const int64_t chunks = (end - share.k_begin + table_chunk - 1) / table_chunk;
    std::memset(dtable, 0, sizeof(float) * static_cast<size_t>(chunks * table_part(shape)));
  }

  const auto prefetch_tile = [&](int64_t first) {
    const int64_t rows = least(query_tile, share.q_end - first);
    for (const Tensor* t : {&a.q, &a.dout, &a.out}) prefetch_rows<Float>(*t, s, width, s.q_start + first, rows);
  };
  prefetch_rows<Float>(a.k, s, width, s.k_start + share.k_begin, keys);
  prefetch_rows<Float>(a.v, s, width, s.k_start + share.k_begin, keys);
  prefetch_tile(share.q_begin);
  rows_to_words<Words, Float>(a.k, s, s.k_start + share.k_begin, keys, whole_keys, width, 1.0f, scratch + at.k);
  rows_to_words<Words, Float>(a.v, s, s.k_start + share.k_begin, keys, whole_keys, width, 1.0f, scratch + at.v);
  if constexpr (Words::pack == 2) {
    if (share.q) pair_rows<Words>({scratch + at.k, words_row}, whole_keys, width, scratch + at.k_paired);
  }
  if (share.k || share.v) clear(scratch + at.dk, 2 * whole_keys * round_up(width, lanes));  // dv follows dk

  Tile tile;
  tile.q = scratch + at.q_tile;
  Softmax softmax;
  float factor[query_tile];
  for (int64_t i = 0; i < query_tile; ++i) factor[i] = shape.scale;
  for (int64_t first = share.q_begin; first < share.q_end; first += query_tile) {
    const int64_t rows = least(query_tile, share.q_end - first), whole = round_up(rows, lanes);
    const int64_t seen = least(share.k_end, s.limit(first + rows - 1));
    if (seen <= share.k_begin && !share.q) continue;
    place_tile(shape, s, first, rows, table, &tile);
    rows_to_words<Words, Float>(a.q, s, s.q_start + first, rows, whole, width, scale.q, scratch + at.q);
    rows_to_words<Words, Float>(a.dout, s, s.q_start + first, rows, whole, width, 1.0f, scratch + at.dout);
    transpose_words(scratch + at.q, whole, words_row, scratch + at.q_tile, query_tile);
    transpose_words(scratch + at.dout, whole, words_row, scratch + at.dout_tile, query_tile);
    if constexpr (Words::pack == 2) {
      if (share.k) pair_rows<Words>({scratch + at.q, words_row}, whole, width, scratch + at.q_paired);
      if (share.v) pair_rows<Words>({scratch + at.dout, words_row}, whole, width, scratch + at.dout_paired);
    }
    for (int64_t i = 0; i < query_tile; ++i) {
      const double base = i < rows ? a.lse[s.lse_start + (first + i) * shape.heads] / double{scale.rest} : infinity;
      softmax.base[i] = static_cast<float>(base);
      const double left = softmax.base[i] - base;
      softmax.rest[i] = left == left ? static_cast<float>(left * scale.log2) : 0.0f;  // infinities leave NaN
      softmax.delta[i] = 0.0f;
    }
    deltas<Float>(a, s, tile, softmax.delta);
    if (share.q) clear(scratch + at.dq, round_up(width, lanes) * query_tile);

    prefetch_tile(first + query_tile);
    const auto run = rows > 2 * lanes ? backward_block<Words, 3>
                     : rows > lanes   ? backward_block<Words, 2>
                                      : backward_block<Words, 1>;
    for (int64_t key = share.k_begin; key < seen; key += key_block) {
      float* to = dtable == nullptr || key >= s.image_len
                      ? nullptr
                      : dtable + (key - share.k_begin) / table_chunk * table_part(shape);
      run(a, s, share, at, scratch, tile, softmax, scale.log2, key, least(key_block, seen - key), to);
    }
    if (share.q) tile_to_rows<Float>(scratch + at.dq, width, factor, a.dq, s, s.q_start + first, rows);
  }

  if (share.q && share.q_end == s.q_len) clear_rows<Float>(a.dq, s, width, s.q_start + s.q_len, s.q_gap);
  const auto finish = [&](const Tensor& t, int64_t from, float by) {
    scratch_to_rows<Float>(scratch + from, width, by, t, s, s.k_start + share.k_begin, keys);
    if (b == 0 && share.k_begin == 0) clear_rows<Float>(t, s, width, 0, s.k_start);  // its keys may begin later
    if (share.k_end == s.k_len) clear_rows<Float>(t, s, width, s.k_start + s.k_len, s.k_gap);
  };
  if (share.k) finish(a.dk, at.dk, scale.rest);
  if (share.v) finish(a.dv, at.dv, 1.0f);
  return true;
}

// One head's table gradient: the parts of its sequences with an image, in order, turned forward again.
void sum_table(const AttentionBackward& a, int64_t n) {
  const AttentionShape& shape = a.shape;
  const int64_t size = table_size(shape);
  float* sum = a.dtable + n * size;
  for (int64_t i = 0; i < size; ++i) sum[i] = 0.0f;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t patches = least(shape.bounds.image_lens[b], shape.bounds.k_lens[b]);
    for (int64_t chunk = 0; chunk * table_chunk < patches; ++chunk) {
      const float* part =
          a.dtable_parts + ((b * shape.heads + n) * table_chunks(shape) + chunk) * table_part(shape) + table_margin;
      for (int64_t i = 0; i < size; ++i) sum[i] += part[size - 1 - i];
    }
  }
}

template <class Float>
bool backward_of(const AttentionBackward& a) {
  const AttentionShape& shape = a.shape;
  const int64_t pairs = shape.batch * shape.heads, threads = threads_for(shape);
  const bool q = a.dq.data != nullptr, k = a.dk.data != nullptr, v = a.dv.data != nullptr, table = a.dtable != nullptr;
  const auto q_len = [&](int64_t b) -> int64_t { return shape.bounds.q_lens[b]; };
  const auto k_len = [&](int64_t b) -> int64_t { return shape.bounds.k_lens[b]; };
  bool done = true;
  // Cutting costs two of five products again: worth it where whole heads would leave threads idle for longer than that.
  if ((pairs + threads - 1) / threads * threads * 5 <= pairs * 7) {
    done = run_heads(shape, threads, 1, [&](int64_t b, int64_t, int64_t n, int64_t) {
      return backward_task<Float>(a, b, n, Share{q, k, v, table, 0, q_len(b), 0, k_len(b)});
    });
  } else {
    const int64_t q_chunks = q ? most(1, (longest_query(shape) + query_chunk - 1) / query_chunk) : 0;
    const int64_t k_chunks = k || v || table ? most(1, (longest_key(shape) + table_chunk - 1) / table_chunk) : 0;
    done = run_tasks(threads, pairs * (q_chunks + k_chunks), [&](int64_t index) {
      const int64_t b = index / (q_chunks + k_chunks) / shape.heads, n = index / (q_chunks + k_chunks) % shape.heads;
      const int64_t chunk = index % (q_chunks + k_chunks);
      if (chunk < q_chunks) {
        const int64_t begin = chunk * query_chunk, end = least(q_len(b), begin + query_chunk);
        if (begin >= end && chunk > 0) return true;
        return backward_task<Float>(a, b, n, Share{true, false, false, false, begin, end, 0, k_len(b)});
      }
      const int64_t begin = (chunk - q_chunks) * table_chunk, end = least(k_len(b), begin + table_chunk);
      if (begin >= end && chunk > q_chunks) return true;
      return backward_task<Float>(a, b, n, Share{false, k, v, table, 0, q_len(b), begin, end});
    });
  }
  if (table && done) {
    done = run_tasks(threads, shape.heads, [&](int64_t n) {
      sum_table(a, n);
      return true;
    });
  }
  return done;
}

}  // namespace

bool attention_backward(const AttentionBackward& a) {
  return of_dtype(a.shape.dtype, [&](auto f) { return backward_of<decltype(f)>(a); });
}

}  // namespace simvlm::SIMVLM_LEVEL
