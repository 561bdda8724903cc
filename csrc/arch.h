// CPU levels: which are compiled in, which this processor runs, which one is in use.
#pragma once

#include "attention.h"
#include "stem.h"

namespace simvlm {

// One level's functions. False: out of memory.
struct Kernels {
  const char* level;
  bool (*attention_forward)(const AttentionForward&);
  bool (*attention_backward)(const AttentionBackward&);
  bool (*norm_statistics)(const NormStatistics&);
  bool (*norm_apply)(const NormApply&);
  bool (*norm_backward_reductions)(const NormBackwardReductions&);
  bool (*norm_backward_apply)(const NormBackwardApply&);
  bool (*embed_forward)(const EmbedForward&);
  bool (*embed_backward)(const EmbedBackward&);
};

// The levels compiled in, from the plainest on, and their number.
const Kernels* all_kernels(int* count);

// Whether this processor (and its operating system) runs the level.
bool runs_here(const char* level);

// The kernels in use: the newest level that runs here, until select() names another. Null name: back to the newest.
// False: no such level, or it does not run here.
const Kernels& kernels();
bool select(const char* level);

}  // namespace simvlm
