// Deliberate mistakes, in sanitized modules alone: tests/sanitize.py makes each and must see it reported, for a
// sanitizer that is not really there reports nothing either.
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace simvlm {

float make_mistake(const std::string& name) {
  volatile int64_t size = 100;  // what the compiler knows it may warn of, or leave out
  if (name == "past scratch") {
    thread_scratch(10 * size);  // an earlier, larger call must not make room for a later overrun
    float* scratch = thread_scratch(size);
    scratch[size] = 1.0f;
    return scratch[size];
  }
  if (name == "past shared scratch") return shared_scratch(size)[size];
  if (name == "old scratch") {
    float* old = thread_scratch(size);
    thread_scratch(size);
    return old[0];
  }
  if (name == "unwritten scratch") return thread_scratch(size)[size - 1];  // no report: NaN
  if (name == "past the heap") {
    float* block = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(size)));
    const float value = block[size];
    std::free(block);
    return value;
  }
  if (name == "past the stack") {
    float array[8] = {};
    const float* at = array;
    return at[size / 12];
  }
  if (name == "overflow") {
    volatile int32_t most = std::numeric_limits<int32_t>::max();
    return static_cast<float>(most + static_cast<int32_t>(size));
  }
  if (name == "misaligned") {
    alignas(8) char bytes[8] = {};
    const auto* odd = reinterpret_cast<const float*>(bytes + size / 100);
    return *odd;
  }
  if (name == "race") {
    float* sum = shared_scratch(1);
    *sum = 0.0f;
    parallel_for(100000, 4, [](void* sum, int64_t) { *static_cast<float*>(sum) += 1.0f; }, sum);
    return *sum;
  }
  throw std::invalid_argument("no such mistake: " + name);
}

}  // namespace simvlm
