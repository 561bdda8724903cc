#include "checks.h"

#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "arch.h"
#include "parallel.h"

namespace simvlm {
namespace {

[[noreturn]] void refuse(const std::string& what, int64_t b) {
  throw std::invalid_argument("prefix_attention: layout must stay within the storage, got " + what + " for sequence " +
                              std::to_string(b));
}

// Queries [start, start + len) within `rows`, ascending without overlap and from row 0 where they are to be written.
void check_ranges(const char* name, const int32_t* starts, const int32_t* lens, int64_t batch, int64_t rows,
                  bool padded, bool written) {
  int64_t end = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = padded ? 0 : starts[b], len = lens[b];
    const auto range = [&] {
      return std::string(name) + " rows " + std::to_string(start) + " to " + std::to_string(start + len);
    };
    if (start < 0 || len < 0 || start + len > rows) refuse(range() + " of " + std::to_string(rows), b);
    if (padded || !written) continue;
    if (start < end) refuse(range() + " after " + std::to_string(end) + " (ranges overlap or descend)", b);
    end = start + len;
  }
}

bool known(int dtype) { return dtype >= 0 && dtype <= 2; }

void or_no_memory(bool done) {
  if (!done) throw std::bad_alloc();
}

}  // namespace

AttentionShape checked_shape(const int32_t* bounds, const AttentionStatics& s, bool table, bool keys_written) {
  if (s.batch < 0 || s.heads < 1 || s.head_dim < 8 || s.head_dim > 128 || s.head_dim % 8 != 0 || !known(s.dtype) ||
      s.grid_height < 0 || s.grid_width < 0 || s.q_rows < 0 || s.k_rows < 0) {
    throw std::invalid_argument(
        "prefix_attention: q must have at least one head and head_dim a multiple of 8 up to 128");
  }
  if (s.grid_height > 0 && s.grid_width > std::numeric_limits<int32_t>::max() / s.grid_height) {
    throw std::invalid_argument("prefix_attention: image_grid must have fewer than 2**31 patches, got " +
                                std::to_string(s.grid_height) + " × " + std::to_string(s.grid_width));
  }
  const Bounds at{bounds,
                  bounds + s.batch,
                  bounds + 2 * s.batch,
                  bounds + 3 * s.batch,
                  bounds + 4 * s.batch,
                  bounds + 5 * s.batch,
                  bounds + 6 * s.batch};
  check_ranges("query", at.q_starts, at.q_lens, s.batch, s.q_rows, s.padded, true);
  check_ranges("key", at.k_starts, at.k_lens, s.batch, s.k_rows, s.padded, keys_written);
  for (int64_t b = 0; b < s.batch; ++b) {
    if (at.prefix_lens[b] < 0) refuse("prefix_lens " + std::to_string(at.prefix_lens[b]), b);
    if (at.q_offsets[b] < 0) refuse("q_offsets " + std::to_string(at.q_offsets[b]), b);
    if (at.image_lens[b] < 0 || at.image_lens[b] > s.grid_height * s.grid_width) {
      refuse("image_lens " + std::to_string(at.image_lens[b]), b);
    }
  }
  if (!s.padded && s.batch > 0 && at.q_starts[0] != 0) refuse("a first query row that is not 0", 0);
  return {s.batch,
          s.heads,
          s.head_dim,
          s.padded,
          s.q_rows,
          s.k_rows,
          at,
          table ? s.grid_height : 0,  // what has no table needs no scratch for it
          table ? s.grid_width : 0,
          s.scale,
          static_cast<DType>(s.dtype),
          s.threads < 1 ? 1 : s.threads};
}

NormShape checked_shape(const NormStatics& s) {
  const auto& [batch, height, width, channels] = s.shape;
  if (batch < 0 || height < 0 || width < 0 || channels < 1 || !known(s.dtype)) {
    throw std::invalid_argument("batch_norm_act: x must have at least one channel and no negative size");
  }
  return {batch, height, width, channels, static_cast<DType>(s.dtype), s.threads < 1 ? 1 : s.threads};
}

EmbedShape checked_shape(const EmbedStatics& s) {
  for (const int64_t size : s.shape) {
    if (size < 0 || !known(s.dtype)) {
      throw std::invalid_argument("embed_sequence: text must be of a known dtype and have no negative size");
    }
  }
  const auto& [batch, rows, images, grid_height, grid_width, text_rows, width] = s.shape;
  const int32_t* row = s.places;
  const Places places{row, row + batch, row + 2 * batch, row + 3 * batch, row + 4 * batch};
  return {batch,
          rows,
          images,
          grid_height,
          grid_width,
          text_rows,
          width,
          places,
          static_cast<DType>(s.dtype),
          s.threads < 1 ? 1 : s.threads};
}

void run(const AttentionForward& problem) { or_no_memory(kernels().attention_forward(problem)); }

void run(AttentionBackward problem) {
  if (problem.dtable != nullptr) {
    if (problem.table == nullptr) {
      throw std::invalid_argument("prefix_attention: rel_bias must be given for its gradient");
    }
    const AttentionShape& shape = problem.shape;
    problem.dtable_parts = shared_scratch(shape.batch * shape.heads * table_chunks(shape) * table_part(shape));
    or_no_memory(problem.dtable_parts != nullptr);
  }
  or_no_memory(kernels().attention_backward(problem));
}

void run(const NormStatistics& problem) { or_no_memory(kernels().norm_statistics(problem)); }
void run(const NormApply& problem) { or_no_memory(kernels().norm_apply(problem)); }
void run(const NormBackwardReductions& problem) { or_no_memory(kernels().norm_backward_reductions(problem)); }
void run(const NormBackwardApply& problem) { or_no_memory(kernels().norm_backward_apply(problem)); }
void run(const EmbedForward& problem) { or_no_memory(kernels().embed_forward(problem)); }
void run(const EmbedBackward& problem) { or_no_memory(kernels().embed_backward(problem)); }

}  // namespace simvlm
