// Prefix attention forward for sequences of a few queries, decoding above all, for one CPU level.
//
// With one query a tile's lanes would be idle, and the time is that of reading K and V once: a task reads a split of
// the keys, of fixed size, for all its heads, K by `lanes` rows at a time and V row by row. What the splits of a
// sequence found is then joined in order, so one query keeps every thread busy and the result depends neither on the
// threads nor on the batch.
#include <cmath>
#include <type_traits>

#include "attention_rows.h"
#include "attention_tasks.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int64_t split_keys = 128;

// What one (split, head, query) found: the largest score, the sum of exponentials, and their sum with V.
struct Found {
  float *top, *total, *sum;
};

// A part of one sequence's keys, and where what its heads and queries found begins in the room.
struct Split {
  int32_t b, number;
  int64_t room;
};

struct Few {
  const AttentionForward* a;
  int64_t count;   // of all splits
  Split* splits;   // in order of their sequences
  int64_t* first;  // of each sequence's splits
  float* room;     // [heads, q_len, lanes + width] for each split

  SIMVLM_INLINE int64_t width() const { return round_up(a->shape.head_dim, lanes); }
  SIMVLM_INLINE int64_t size() const { return lanes + width(); }
  SIMVLM_INLINE Found at(int64_t split, int64_t n, int64_t i) const {
    const Split& s = splits[split];
    float* found = room + s.room + (n * a->shape.bounds.q_lens[s.b] + i) * size();
    return {found, found + 1, found + lanes};
  }
};

// Entries of the table for query p and a vector of keys from `key` on; zeros where there is none.
SIMVLM_INLINE vfloat bias_of(const AttentionForward& a, const Sequence& s, int64_t p, int64_t key, float factor) {
  vfloat bias = {};
  if (a.table == nullptr || p >= s.image_len) return bias;
  const int64_t width = a.shape.grid_width, row = 2 * width - 1;
  const float* centre = a.table + s.n * table_size(a.shape) + (table_size(a.shape) - 1) / 2;
  const int64_t here = p / width * row + p % width;
  for (int64_t l = 0; l < lanes && key + l < s.image_len; ++l) {
    const int64_t j = key + l;
    bias[l] = centre[j / width * row + j % width - here] * factor;
  }
  return bias;
}

// <q, k> + bias of `lanes` keys, row l of which begins at k + row[l]; q as words, zeros past the last channel.
template <class Float>
SIMVLM_INLINE vfloat score_keys(const typename Float::Storage* k, const int64_t (&row)[lanes], int64_t width,
                                const float* q, vfloat bias) {
  typedef typename WordsOf<Float>::Type Words;
  typedef std::conditional_t<Words::pack == 1, Float, Float32> Word;  // as which a word of K is read
  const auto at = [&](int64_t l, int64_t h) {
    return reinterpret_cast<const typename Word::Storage*>(k + row[l] + h * Words::pack);
  };
  const int64_t words = width / Words::pack;
  if constexpr (std::is_same_v<Float, Float32>) {
    // Each score is summed over the channels in order, as tiles do: the backward pass computes the same score again and
    // finds exactly P = 1 where a query sees one key.
    vfloat sum = {};
    over_vectors<Word>(words, [&](int64_t h, auto part) {
      vfloat x[lanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) x[l] = part.widen(at(l, h));
      transpose(x);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) sum = sum + x[l] * q[h + l];
    });
    return sum + bias;
  } else {
    vfloat sum[lanes] = {};
    over_vectors<Word>(words, [&](int64_t h, auto part) {
      const vfloat x = load(q + h);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) sum[l] = Words::multiply_add(sum[l], part.widen(at(l, h)), x);
    });
    return sums_of(sum) + bias;
  }
}

// One split, for heads n_begin … n_end.
template <class Float>
bool few_task(const Few& few, int64_t split, int64_t n_begin, int64_t n_end) {
  const AttentionForward& a = *few.a;
  const AttentionShape& shape = a.shape;
  const int64_t width = shape.head_dim, heads = n_end - n_begin;
  Sequence s = sequence_of(shape, few.splits[split].b, n_begin);
  const int64_t first = few.splits[split].number * split_keys, queries = s.q_len;
  const int64_t keys = least(split_keys, s.limit(queries - 1) - first);
  if (keys < 1) return true;
  const Scale scale = scale_of(shape.scale);

  // q [heads, queries, words]; scores [heads, queries, split_keys]
  typedef typename WordsOf<Float>::Type Words;
  const int64_t words = round_up(width, Words::pack * lanes) / Words::pack, rows = heads * queries;
  float* q = thread_scratch(rows * (words + split_keys));
  if (q == nullptr) return false;
  float* scores = q + rows * words;
  for (int64_t n = 0; n < heads; ++n) {
    s.n = n_begin + n;
    rows_to_words<Words, Float>(a.q, s, s.q_start, queries, queries, width, scale.q, q + n * queries * words);
  }

  for (int64_t j = 0; j < keys; j += lanes) {
    const int64_t count = least(lanes, keys - j), ahead = least(lanes, keys - j - lanes);
    int64_t row[lanes];  // past the last key that one again: nobody sees these lanes
    for (int64_t l = 0; l < lanes; ++l) row[l] = least(l, count - 1) * a.k.row;
    for (int64_t n = 0; n < heads; ++n) {
      s.n = n_begin + n;
      prefetch_rows<Float>(a.k, s, width, s.k_start + first + j + lanes, ahead);
      const auto* k = row_at<Float>(a.k, s, s.k_start + first + j);
      for (int64_t i = 0; i < queries; ++i) {
        const vfloat bias = bias_of(a, s, s.offset + i, first + j, scale.bias);
        const vfloat score = score_keys<Float>(k, row, width, q + (n * queries + i) * words, bias);
        const vint seen = lane_index() < splat_int(least(lanes, most(0, s.limit(i) - first - j)));
        store(scores + (n * queries + i) * split_keys + j, seen ? score : splat(-infinity));
      }
    }
  }

  for (int64_t n = 0; n < heads; ++n) {
    for (int64_t i = 0; i < queries; ++i) {
      float* row = scores + (n * queries + i) * split_keys;
      vfloat highest = splat(lowest_score), total = {};
      for (int64_t j = 0; j < keys; j += lanes) highest = max(highest, load(row + j));
      const float top = reduce_max(highest);
      for (int64_t j = 0; j < keys; j += lanes) {
        const vfloat p = exp2_nonpositive((load(row + j) - top) * scale.log2);
        total += p;
        store(row + j, p);
      }
      const Found found = few.at(split, n_begin + n, i);
      *found.top = top;
      *found.total = reduce_add(total);
      clear(found.sum, few.width());
    }
  }

  for (int64_t j = 0; j < keys; ++j) {
    s.n = n_begin;
    const auto* v = row_at<Float>(a.v, s, s.k_start + first + j);
    const float* p = scores + j;
    float* sum = few.at(split, n_begin, 0).sum;  // and those of all heads and queries after it
    for (int64_t n = 0; n < heads; ++n, v += a.v.head) {
      for (int64_t i = 0; i < queries; ++i, p += split_keys, sum += few.size()) {
        if (*p == 0.0f) continue;  // a key that this query does not see
        over_vectors<Float>(width,
                            [&](int64_t h, auto part) { store(sum + h, load(sum + h) + part.widen(v + h) * *p); });
      }
    }
  }
  return true;
}

// Joins what the splits of a sequence found, in order.
template <class Float>
void join_splits(const Few& few, int64_t b) {
  const AttentionForward& a = *few.a;
  const AttentionShape& shape = a.shape;
  const int64_t width = shape.head_dim;
  const Scale scale = scale_of(shape.scale);
  for (int64_t n = 0; n < shape.heads; ++n) {
    const Sequence s = sequence_of(shape, b, n);
    if (s.q_len > few_queries) return;
    float* lse = a.lse + s.lse_start;
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t splits = (s.limit(i) + split_keys - 1) / split_keys;
      float top = lowest_score, total = 0.0f;
      alignas(64) float sum[128] = {};
      for (int64_t split = 0; split < splits; ++split) {
        const float here = *few.at(few.first[b] + split, n, i).top;
        top = here > top ? here : top;
      }
      for (int64_t split = 0; split < splits; ++split) {
        const Found found = few.at(few.first[b] + split, n, i);
        const float weight = exp2_nonpositive(splat((*found.top - top) * scale.log2))[0];
        total += *found.total * weight;
        for (int64_t h = 0; h < few.width(); h += lanes) store(sum + h, load(sum + h) + load(found.sum + h) * weight);
      }
      auto* out = row_at<Float>(a.out, s, s.q_start + i);
      const float factor = splits == 0 ? 0.0f : 1.0f / total;
      over_vectors<Float>(width, [&](int64_t h, auto part) { part.narrow(out + h, load(sum + h) * factor); });
      lse[i * shape.heads] = splits == 0 ? -infinity : top * scale.rest + std::log(total);
    }
    clear_rows<Float>(a.out, s, width, s.q_start + s.q_len, s.q_gap);
    for (int64_t i = s.q_len; i < s.q_len + s.q_gap; ++i) lse[i * shape.heads] = -infinity;
  }
}

// The splits of the sequences of few queries, and room for what they will find; null room: no memory.
Few plan(const AttentionForward& a) {
  const AttentionShape& shape = a.shape;
  Few few{&a, 0, nullptr, nullptr, nullptr};
  const auto splits_of = [&](int64_t b) -> int64_t {
    const int64_t queries = shape.bounds.q_lens[b];
    return queries < 1 || queries > few_queries ? 0 : (shape.bounds.k_lens[b] + split_keys - 1) / split_keys;
  };
  int64_t room = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    few.count += splits_of(b);
    room += splits_of(b) * shape.heads * shape.bounds.q_lens[b] * few.size();
  }
  static_assert(sizeof(Split) % sizeof(float) == 0);
  const int64_t lists = round_up(few.count * static_cast<int64_t>(sizeof(Split) / 4) + shape.batch * 2, lanes);
  float* memory = shared_scratch(lists + room);
  if (memory == nullptr) return few;
  few.splits = reinterpret_cast<Split*>(memory);
  few.first = reinterpret_cast<int64_t*>(few.splits + few.count);
  few.room = memory + lists;
  int64_t next = 0, at = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    few.first[b] = next;
    for (int64_t number = 0; number < splits_of(b); ++number) {
      few.splits[next++] = {static_cast<int32_t>(b), static_cast<int32_t>(number), at};
      at += shape.heads * shape.bounds.q_lens[b] * few.size();
    }
  }
  return few;
}

template <class Float>
bool few_of(const AttentionForward& a) {
  const AttentionShape& shape = a.shape;
  const Few few = plan(a);
  if (few.room == nullptr) return false;
  const int64_t threads = threads_for(shape);
  int64_t groups = 1;  // of heads: whole rows of storage if that leaves every thread a few tasks
  while (groups < shape.heads && few.count * groups < 4 * threads) groups *= 2;
  const int64_t together = (shape.heads + groups - 1) / groups;
  const bool done = run_tasks(threads, few.count * groups, [&](int64_t index) {
    const int64_t begin = index % groups * together;
    return few_task<Float>(few, index / groups, begin, least(begin + together, shape.heads));
  });
  return done && run_tasks(threads, shape.batch, [&](int64_t b) {
           join_splits<Float>(few, b);
           return true;
         });
}

}  // namespace

bool attention_few(const AttentionForward& a) {
  return of_dtype(a.shape.dtype, [&](auto f) { return few_of<decltype(f)>(a); });
}

}  // namespace simvlm::SIMVLM_LEVEL
