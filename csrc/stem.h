// The stem on the CPU: the arguments of its functions (docs/contract.md §3 and docs/stem.md define what they compute).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace simvlm {

// Channels-last images: element (b, h, w, c) lies at data + b·batch + h·row + w·column + c, counted in elements.
// data may be unaligned.
struct Images {
  void* data;
  int64_t batch, row, column;
};

struct NormShape {
  int64_t batch, height, width, channels;
  DType dtype;
  int threads;
};

// float32[C], but for branch_scale: float32[B], or null for 1.
struct NormGiven {
  const float *mean, *var, *weight, *bias, *branch_scale;
  double eps;
  bool relu;
};

struct NormStatistics {
  NormShape shape;
  Images x;
  float *mean, *var;
};

struct NormApply {
  NormShape shape;
  NormGiven given;
  Images x, residual;  // residual's data null: none
  void* y;             // contiguous, like dy, dresidual and dx below
};

struct NormBackwardReductions {
  NormShape shape;
  NormGiven given;
  Images x;
  const void *dy, *y;  // y null: relu's mask comes from x, and no dresidual is written
  void* dresidual;
  float *sum_dz, *sum_dz_norm;
};

struct NormBackwardApply {
  NormShape shape;
  NormGiven given;
  Images x;
  const void* dy;
  const float *mean_dz, *mean_dz_norm;  // both null: mean and var were constants
  void* dx;
};

// The rows of int32[5, B] that docs/stem.md calls places. No value of theirs makes a function leave its arrays.
struct Places {
  const int32_t *q_starts, *q_lens, *image_lens, *image_index, *text_starts;
};

struct EmbedShape {
  int64_t batch, rows;  // sequences; rows of storage, the padded ones among them
  int64_t images, grid_height, grid_width, text_rows, width;
  Places places;
  DType dtype;
  int threads;
};

struct EmbedForward {
  EmbedShape shape;
  Images patches;  // [images, Gh, Gw, width]: projected ones, float32, or features as they are
  bool projected;
  const float *bias, *positions;  // [width], [Gh·Gw, width]; each may be null
  const void* text;
  int64_t text_row;  // stride
  void* rows;        // contiguous, like all of the backward's
};

struct EmbedBackward {
  EmbedShape shape;
  const void* drows;
  void* dpatches;  // float32 if projected; what is not wanted is null
  bool projected;
  float *dbias, *dpositions;  // dbias needs dpositions
  void* dtext;
};

}  // namespace simvlm
