// What both doors ask of a caller's integers before kernels turn them into addresses, and what they say if it is amiss.
//
// The functions throw std::invalid_argument, whose text is the whole message, and std::bad_alloc.
#pragma once

#include <array>
#include <cstdint>

#include "attention.h"
#include "stem.h"

namespace simvlm {

struct AttentionStatics {
  int64_t batch, heads, head_dim;
  bool padded;
  int64_t q_rows, k_rows, grid_height, grid_width;
  float scale;
  int dtype, threads;
};

struct NormStatics {
  std::array<int64_t, 4> shape;  // B, Hh, Ww, C
  int dtype, threads;
};

struct EmbedStatics {
  std::array<int64_t, 7> shape;  // B, storage rows, Bi, Gh, Gw, Rt, D
  const int32_t* places;         // int32[5, B]
  int dtype, threads;
};

// bounds: the layout's int32[7, B], which must stay as it is while kernels run. table: is there one?
// keys_written: is dk or dv?
AttentionShape checked_shape(const int32_t* bounds, const AttentionStatics& statics, bool table, bool keys_written);
NormShape checked_shape(const NormStatics& statics);
EmbedShape checked_shape(const EmbedStatics& statics);

// Runs the level in use. The backward pass's dtable_parts are found here.
void run(const AttentionForward& problem);
void run(AttentionBackward problem);
void run(const NormStatistics& problem);
void run(const NormApply& problem);
void run(const NormBackwardReductions& problem);
void run(const NormBackwardApply& problem);
void run(const EmbedForward& problem);
void run(const EmbedBackward& problem);

}  // namespace simvlm
