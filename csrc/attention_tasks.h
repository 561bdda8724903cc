// How prefix attention is spread over threads.
#pragma once

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace simvlm::SIMVLM_LEVEL {

// The forward pass of those sequences that have at most `few_queries` queries, and of no others.
bool attention_few(const AttentionForward& a);

namespace {

constexpr int64_t few_queries = 8;

SIMVLM_INLINE int64_t longest(const int32_t* lens, int64_t batch) {
  int64_t length = 0;
  for (int64_t b = 0; b < batch; ++b) length = most(length, lens[b]);
  return length;
}
SIMVLM_INLINE int64_t longest_query(const AttentionShape& shape) { return longest(shape.bounds.q_lens, shape.batch); }
SIMVLM_INLINE int64_t longest_key(const AttentionShape& shape) { return longest(shape.bounds.k_lens, shape.batch); }

// Waking a second thread costs more than this many multiply-adds of one product.
constexpr int64_t worth_a_thread = 1 << 18;

// As many threads as the work deserves.
SIMVLM_INLINE int64_t threads_for(const AttentionShape& shape) {
  int64_t work = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t queries = shape.bounds.q_lens[b] + few_queries;  // reading the keys costs as much as a few queries
    work += queries * shape.bounds.k_lens[b] * shape.heads * shape.head_dim;
  }
  return least(shape.threads, 1 + work / worth_a_thread);
}

// task(index) for each index; false if one of them ran out of memory.
template <class Task>
bool run_tasks(int64_t threads, int64_t count, Task task) {
  struct Run {
    Task* task;
    bool failed;
  } run{&task, false};
  const auto one = [](void* context, int64_t index) {
    Run* run = static_cast<Run*>(context);
    if (!(*run->task)(index)) __atomic_store_n(&run->failed, true, __ATOMIC_RELAXED);
  };
  parallel_for(count, static_cast<int>(threads), one, &run);
  return !run.failed;
}

// task(b, chunk, n, n_next) for every sequence, chunk of it and head; `n_next` is the head that the same thread
// computes next, or -1. Heads are grouped while every thread still has several groups.
template <class Task>
bool run_heads(const AttentionShape& shape, int64_t threads, int64_t chunks, Task task) {
  const int64_t all = shape.batch * shape.heads * chunks;
  const int64_t together = most(1, least(shape.heads, all / (8 * threads)));
  const int64_t groups = (shape.heads + together - 1) / together;
  return run_tasks(threads, shape.batch * groups * chunks, [&](int64_t index) {
    const int64_t b = index / (groups * chunks), begin = index / chunks % groups * together;
    const int64_t end = least(begin + together, shape.heads);
    for (int64_t n = begin; n < end; ++n) {
      if (!task(b, index % chunks, n, n + 1 < end ? n + 1 : -1)) return false;
    }
    return true;
  });
}

}  // namespace
}  // namespace simvlm::SIMVLM_LEVEL
