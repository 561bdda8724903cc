#include "arch.h"

#include <atomic>
#include <cstring>

// SIMVLM_LEVELS is X(baseline) X(avx2) …: the levels that CMakeLists.txt compiled, in order.
#define X(level)                                                \
  namespace simvlm::level {                                     \
  bool attention_forward(const AttentionForward&);              \
  bool attention_backward(const AttentionBackward&);            \
  bool norm_statistics(const NormStatistics&);                  \
  bool norm_apply(const NormApply&);                            \
  bool norm_backward_reductions(const NormBackwardReductions&); \
  bool norm_backward_apply(const NormBackwardApply&);           \
  bool embed_forward(const EmbedForward&);                      \
  bool embed_backward(const EmbedBackward&);                    \
  }
SIMVLM_LEVELS
#undef X

namespace simvlm {
namespace {

#define X(level)                    \
  {#level,                          \
   level::attention_forward,        \
   level::attention_backward,       \
   level::norm_statistics,          \
   level::norm_apply,               \
   level::norm_backward_reductions, \
   level::norm_backward_apply,      \
   level::embed_forward,            \
   level::embed_backward},
constexpr Kernels rows[] = {SIMVLM_LEVELS};
#undef X
constexpr int row_count = sizeof(rows) / sizeof(rows[0]);

const Kernels* newest() {
  const Kernels* best = &rows[0];
  for (const Kernels& row : rows) {
    if (runs_here(row.level)) best = &row;
  }
  return best;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels* all_kernels(int* count) {
  *count = row_count;
  return rows;
}

bool runs_here(const char* level) {
  if (std::strcmp(level, "baseline") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(level, "avx2") == 0) return avx2;
  if (std::strcmp(level, "avx512") == 0) return avx512;
  if (std::strcmp(level, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const Kernels& kernels() {
  const Kernels* row = chosen.load(std::memory_order_relaxed);
  if (row == nullptr) {
    row = newest();
    chosen.store(row);
  }
  return *row;
}

bool select(const char* level) {
  if (level == nullptr) {
    chosen.store(newest());
    return true;
  }
  for (const Kernels& row : rows) {
    if (std::strcmp(level, row.level) == 0 && runs_here(level)) {
      chosen.store(&row);
      return true;
    }
  }
  return false;
}

}  // namespace simvlm
