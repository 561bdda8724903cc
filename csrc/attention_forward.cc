// Prefix attention forward, for one CPU level (docs/attention.md derives the formulas).
//
// Query i of a sequence sees exactly its first `limit(i)` keys, and limits never fall from one query to the next: a
// tile of queries needs the key blocks below its last limit, and masks only where a block crosses a limit. Tiles start
// at the sequence's own first row and sums run in a fixed order, so results depend neither on the batch nor on the
// threads. A task is one chunk of one (sequence, head)'s queries: online softmax over key blocks.
#include <cmath>

#include "attention_tasks.h"
#include "attention_tiles.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

// A task's tiles share each block's words of K and V. Any number gives the same sums: as many as leave every thread a
// few tasks.
constexpr int64_t most_tiles = 10;

// Floats of scratch, and where the parts begin.
struct Scratch {
  int64_t q, sum, top, total, k, v, paired, scores, staging, table, end;

  Scratch(const AttentionShape& shape, int64_t tiles) {
    const int64_t width = round_up(shape.head_dim, lanes);
    q = 0;
    sum = q + tiles * width * query_tile;
    top = sum + tiles * width * query_tile;
    total = top + tiles * query_tile;
    k = total + tiles * query_tile;
    v = k + key_block * width;
    paired = v + key_block * width;
    scores = paired + key_block * width;
    staging = scores + key_block * query_tile;
    table = staging + query_tile * width;
    end = table + table_part(shape);
  }
};

// Folds one block's scores of a tile into the running softmax: scores become unnormalised probabilities, as the words
// of a product over keys. `before` is the largest score of each query until this block, `top` now.
template <class Words, int Vectors>
void fold_scores(int64_t rows, float exponent, float* scores, const float* before, const float* top, float* total,
                 float* decay) {
  for (int v = 0; v < Vectors; ++v) {
    float* column = scores + v * lanes;
    float* words = column;
    const vfloat highest = load(top + v * lanes);
    const vfloat fade = exp2_nonpositive((load(before + v * lanes) - highest) * exponent);
    vfloat even = load(total + v * lanes) * fade, odd = {};
    for (int64_t j = 0; j < rows; j += 2, column += 2 * query_tile) {
      const vfloat p = exp2_nonpositive((load(column) - highest) * exponent);
      const vfloat next = exp2_nonpositive((load(column + query_tile) - highest) * exponent);
      even += p;
      odd += next;
      if constexpr (Words::pack == 1) {
        store(column, p);
        store(column + query_tile, next);
      } else {
        store(words, Words::pair(p, next));
        words += query_tile;
      }
    }
    store(total + v * lanes, even + odd);
    store(decay + v * lanes, fade);
  }
}

// The rows of K and V that are wanted next, asked for little by little.
struct Ahead {
  const Tensor *k, *v;
  Sequence s;
  int64_t first, count;

  template <class Float>
  SIMVLM_INLINE void fetch(int64_t width, int64_t m) const {
    const int64_t rows = least(group, count - m);
    prefetch_rows<Float>(*k, s, width, s.k_start + first + m, rows);
    prefetch_rows<Float>(*v, s, width, s.k_start + first + m, rows);
  }
};

template <class Float, class Words, int Vectors>
void forward_tile(const AttentionShape& shape, const Sequence& s, const Tile& tile, const Rows& k, const Rows& v,
                  int64_t first_key, int64_t rows, float exponent, float* scores, float* top, float* total, float* sum,
                  const Ahead& ahead) {
  alignas(64) float before[query_tile], decay[query_tile];
  std::memcpy(before, top, sizeof(before));
  score_block<Words, Vectors>(shape, s, tile, k, first_key, rows, scores, top,
                              [&](int64_t m) { ahead.fetch<Float>(shape.head_dim, m); });
  fold_scores<Words, Vectors>(round_up(rows, group), exponent, scores, before, top, total, decay);
  accumulate<Words, Vectors>({v.at, 1, v.row, scores, query_tile, round_up(rows, group) / Words::pack}, shape.head_dim,
                             sum, query_tile, decay);
}

template <class Float>
bool forward_task(const AttentionForward& a, int64_t b, int64_t n, int64_t n_next, int64_t chunk, int64_t chunk_tiles) {
  typedef typename WordsOf<Float>::Type Words;
  const AttentionShape& shape = a.shape;
  const Sequence s = sequence_of(shape, b, n);
  const int64_t query_chunk = chunk_tiles * query_tile;
  const int64_t first = chunk * query_chunk, count = least(query_chunk, s.q_len - first), width = shape.head_dim;
  if (s.q_len <= few_queries) return true;
  float* lse = a.lse + s.lse_start;
  if (chunk == 0) {
    clear_rows<Float>(a.out, s, width, s.q_start + s.q_len, s.q_gap);
    for (int64_t i = s.q_len; i < s.q_len + s.q_gap; ++i) lse[i * shape.heads] = -infinity;
  }
  if (count <= 0) return true;

  const Scratch at(shape, chunk_tiles);
  float* scratch = thread_scratch(at.end);
  if (scratch == nullptr) return false;
  const int64_t keys = s.limit(first + count - 1);
  const Scale scale = scale_of(shape.scale);
  const float* table = nullptr;
  if (a.table != nullptr && s.offset + first < s.image_len) {
    reverse_table(a.table + n * table_size(shape), table_size(shape), scale.bias, scratch + at.table);
    table = scratch + at.table;
  }

  Tile tiles[most_tiles];
  const int64_t tile_floats = round_up(width, lanes) * query_tile;
  const int64_t words_row = round_up(width, Words::pack * lanes) / Words::pack;
  for (int64_t t = 0; t * query_tile < count; ++t) {
    const int64_t rows = least(query_tile, count - t * query_tile), whole = round_up(rows, lanes);
    Tile& tile = tiles[t];
    place_tile(shape, s, first + t * query_tile, rows, table, &tile);
    float* q = scratch + at.q + t * tile_floats;
    rows_to_words<Words, Float>(a.q, s, s.q_start + tile.first, rows, whole, width, scale.q, scratch + at.staging);
    transpose_words(scratch + at.staging, whole, words_row, q, query_tile);
    tile.q = q;
  }
  clear(scratch + at.sum, chunk_tiles * tile_floats);
  for (int64_t i = 0; i < query_chunk; i += lanes) {
    store(scratch + at.top + i, splat(lowest_score));
    store(scratch + at.total + i, vfloat{});
  }

  for (int64_t key = 0; key < keys; key += key_block) {
    const int64_t block = least(key_block, keys - key), whole = round_up(block, group);
    // A copy pays where several tiles read it: rows in storage lie on pages of their own.
    const bool in_place = count <= 2 * query_tile;
    const auto words = [&](const Tensor& t, float* room) {
      return rows_of_words<Words, Float>(t, s, s.k_start + key, block, whole, s.k_len - key, width, in_place, room);
    };
    const Rows k = words(a.k, scratch + at.k);
    Rows v = words(a.v, scratch + at.v);
    if constexpr (Words::pack == 2) {
      pair_rows<Words>(v, whole, width, scratch + at.paired);
      v = {scratch + at.paired, round_up(width, lanes)};
    }
    Ahead ahead{&a.k, &a.v, s, key + key_block, least(key_block, keys - key - key_block)};
    if (ahead.count <= 0 && n_next >= 0) {
      ahead = {&a.k, &a.v, sequence_of(shape, b, n_next), 0, least(key_block, keys)};
      prefetch_rows<Float>(a.q, ahead.s, width, s.q_start + first, count);
    }
    for (int64_t t = 0; t * query_tile < count; ++t) {
      const Tile& tile = tiles[t];
      const int64_t rows = least(block, s.limit(tile.first + tile.rows - 1) - key);
      if (rows <= 0) continue;
      const auto run = tile.rows > 2 * lanes ? forward_tile<Float, Words, 3>
                       : tile.rows > lanes   ? forward_tile<Float, Words, 2>
                                             : forward_tile<Float, Words, 1>;
      run(shape, s, tile, k, v, key, rows, scale.log2, scratch + at.scores, scratch + at.top + t * query_tile,
          scratch + at.total + t * query_tile, scratch + at.sum + t * tile_floats, ahead);
      ahead.count = 0;
    }
  }
  for (int64_t t = 0; t * query_tile < count; ++t) {
    const Tile& tile = tiles[t];
    const float *top = scratch + at.top + t * query_tile, *total = scratch + at.total + t * query_tile;
    alignas(64) float factor[query_tile];
    for (int64_t i = 0; i < tile.rows; ++i) {
      const bool sees_any = s.limit(tile.first + i) > 0;
      factor[i] = sees_any ? 1.0f / total[i] : 0.0f;
      lse[(tile.first + i) * shape.heads] = sees_any ? top[i] * scale.rest + std::log(total[i]) : -infinity;
    }
    tile_to_rows<Float>(scratch + at.sum + t * tile_floats, width, factor, a.out, s, s.q_start + tile.first, tile.rows);
  }
  return true;
}

template <class Float>
bool forward_of(const AttentionForward& a) {
  const int64_t threads = threads_for(a.shape), tiles = most(1, (longest_query(a.shape) + query_tile - 1) / query_tile);
  int64_t chunk_tiles = least(tiles, most_tiles);
  const auto chunks_of = [&](int64_t each) { return (tiles + each - 1) / each; };
  while (chunk_tiles > 1 && a.shape.batch * a.shape.heads * chunks_of(chunk_tiles) < 4 * threads) --chunk_tiles;
  const int64_t chunks = chunks_of(chunk_tiles);
  return run_heads(a.shape, threads, chunks, [&](int64_t b, int64_t chunk, int64_t n, int64_t n_next) {
    // The last chunk sees the most keys: first.
    return forward_task<Float>(a, b, n, n_next, chunks - 1 - chunk, chunk_tiles);
  });
}

}  // namespace

bool attention_forward(const AttentionForward& a) {
  const int32_t* q_lens = a.shape.bounds.q_lens;
  bool few = false, many = false;
  for (int64_t b = 0; b < a.shape.batch; ++b) (q_lens[b] <= few_queries ? few : many) = true;
  if (few && !attention_few(a)) return false;
  if (!many) return true;
  return of_dtype(a.shape.dtype, [&](auto f) { return forward_of<decltype(f)>(a); });
}

}  // namespace simvlm::SIMVLM_LEVEL
