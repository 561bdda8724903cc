// Element types of the tensors that the kernels take.
#pragma once

namespace simvlm {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace simvlm
