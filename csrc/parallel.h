// The only room that names the thread library: threads, and scratch memory that each of them keeps.
//
// Where torch is loaded its OpenMP threads do the work. They spin for a while after each of torch's own loops, and
// would take the processor from threads of ours: on two cores, attention between two products ran no faster than on
// one. Elsewhere a pool of sleeping workers does.
#pragma once

#include <cstdint>

namespace simvlm {

// Runs task(context, i) for every i in [0, count) on up to `threads` threads, the caller among them, and returns when
// all are done. Which thread runs which index is not fixed: a task must write only what its index owns. A call from
// inside a task, or without torch while another caller holds the pool, runs on the caller alone. Safe after fork.
void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t index), void* context);

// While one lives, this thread's calls of parallel_for leave torch's threads alone. For XLA, which calls from whichever
// of its threads is free: OpenMP would start a team for every one of them.
class OwnPool {
 public:
  OwnPool();
  ~OwnPool();
  OwnPool(const OwnPool&) = delete;
  OwnPool& operator=(const OwnPool&) = delete;

 private:
  bool before_;
};

// This thread's scratch: at least `floats` floats, 64-byte aligned, unspecified contents, valid until the next call
// from the same thread. Null when memory is exhausted.
float* thread_scratch(int64_t floats);

// The same, apart from it: for what a caller of parallel_for shares with its tasks.
float* shared_scratch(int64_t floats);

}  // namespace simvlm
