// Prefix attention on the CPU: the arguments of its two functions (docs/contract.md §2 defines what they compute).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace simvlm {

// One of q, k, v, out and their gradients: element (b, row, n, h) of a padded tensor [B, T, N, H] lies at
// data + b·batch + row·row_stride + n·head + h, counted in elements; a packed tensor [R, N, H] has batch = 0 and its
// rows start at the layout's q_starts or k_starts. The last axis is contiguous, data may be unaligned.
struct Tensor {
  void* data;
  int64_t batch, row, head;
};

// The rows of the layout's int32[7, B].
struct Bounds {
  const int32_t *q_starts, *q_lens, *k_starts, *k_lens, *prefix_lens, *q_offsets, *image_lens;
};

struct AttentionShape {
  int64_t batch, heads, head_dim;
  bool padded;
  int64_t q_rows, k_rows;  // storage rows: T and S per sequence if padded, else R and R' in all
  Bounds bounds;
  int64_t grid_height, grid_width;  // 0 without an image grid
  float scale;
  DType dtype;
  int threads;
};

// The table's gradient is summed apart for each sequence, head and chunk of image keys, backwards and with a margin on
// both sides: whoever computes which keys, the order of the sum is the same.
constexpr int64_t table_chunk = 256;
constexpr int64_t table_margin = 16;

static inline int64_t table_size(const AttentionShape& shape) {
  return shape.grid_height == 0 ? 0 : (2 * shape.grid_height - 1) * (2 * shape.grid_width - 1);
}
static inline int64_t table_part(const AttentionShape& shape) { return table_size(shape) + 2 * table_margin; }
static inline int64_t table_chunks(const AttentionShape& shape) {
  return (shape.grid_height * shape.grid_width + table_chunk - 1) / table_chunk;
}

struct AttentionForward {
  AttentionShape shape;
  Tensor q, k, v, out;
  const float* table;  // float32[N, 2Gh-1, 2Gw-1] or null
  float* lse;          // [storage rows, N], contiguous
};

struct AttentionBackward {
  AttentionShape shape;
  Tensor q, k, v, out, dout;
  const float* table;
  const float *lse, *dlse;  // contiguous; dlse may be null
  Tensor dq, dk, dv;        // data null where not wanted
  float* dtable_parts;      // [B, N, table_chunks, table_part] of scratch, or null; then summed in order
  float* dtable;            // [N, 2Gh-1, 2Gw-1]
};

}  // namespace simvlm
