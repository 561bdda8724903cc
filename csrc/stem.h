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

}  // namespace simvlm
