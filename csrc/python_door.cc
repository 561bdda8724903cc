// The Python door: raw addresses and sizes in, nothing of torch or numpy. It checks the integers that kernels turn into
// addresses, releases the GIL and calls the level in use. The files cpp_cpu.py in simvlm/kernels/ are its only callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arch.h"
#include "parallel.h"

namespace py = pybind11;

#ifdef SIMVLM_SANITIZE
namespace simvlm {
float make_mistake(const std::string& name);  // mistakes.cc
}
#endif

namespace {

using simvlm::AttentionShape;
using simvlm::Tensor;

using Strided = std::array<int64_t, 4>;  // address, then the strides of sequence, row and head

Tensor tensor(const Strided& t) { return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]}; }

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void refuse(const std::string& what, int64_t b) {
  throw py::value_error("prefix_attention: layout must stay within the storage, got " + what + " for sequence " +
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

struct Statics {
  int64_t batch, heads, head_dim;
  bool padded;
  int64_t q_rows, k_rows, grid_height, grid_width;
  float scale;
  int dtype, threads;
};

// The layout's int32[7, B], copied: while kernels run without the GIL another thread may write into the caller's.
std::vector<int32_t> copied_bounds(int64_t bounds, int64_t batch) {
  const auto* from = pointer<const int32_t>(bounds);
  return batch < 1 ? std::vector<int32_t>() : std::vector<int32_t>(from, from + 7 * batch);
}

// Arrays that are read where the layout has rows; torch tensors whose storage was taken away have the address 0.
void check_memory(const char* name, const int32_t* lens, int64_t batch, std::initializer_list<Strided> arrays) {
  for (int64_t b = 0; b < batch; ++b) {
    for (const Strided& array : arrays) {
      if (lens[b] > 0 && array[0] == 0) {
        throw py::value_error(std::string("prefix_attention: ") + name + " must have memory, got an array without any");
      }
    }
  }
}

AttentionShape checked_shape(const std::vector<int32_t>& bounds, const Statics& s, bool table, bool keys_written) {
  if (s.batch < 0 || s.heads < 1 || s.head_dim < 8 || s.head_dim > 128 || s.head_dim % 8 != 0 || s.dtype < 0 ||
      s.dtype > 2 || s.grid_height < 0 || s.grid_width < 0 || s.q_rows < 0 || s.k_rows < 0) {
    throw py::value_error("prefix_attention: q must have at least one head and head_dim a multiple of 8 up to 128");
  }
  if (s.grid_height > 0 && s.grid_width > std::numeric_limits<int32_t>::max() / s.grid_height) {
    throw py::value_error("prefix_attention: image_grid must have fewer than 2**31 patches, got " +
                          std::to_string(s.grid_height) + " × " + std::to_string(s.grid_width));
  }
  const int32_t* row = bounds.data();
  const simvlm::Bounds at{row,
                          row + s.batch,
                          row + 2 * s.batch,
                          row + 3 * s.batch,
                          row + 4 * s.batch,
                          row + 5 * s.batch,
                          row + 6 * s.batch};
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
          static_cast<simvlm::DType>(s.dtype),
          s.threads < 1 ? 1 : s.threads};
}

void attention_forward(const Strided& q, const Strided& k, const Strided& v, const Strided& out, int64_t lse,
                       int64_t table, int64_t bounds, int64_t batch, int64_t heads, int64_t head_dim, bool padded,
                       int64_t q_rows, int64_t k_rows, int64_t grid_height, int64_t grid_width, float scale, int dtype,
                       int threads) {
  const Statics statics{batch, heads, head_dim, padded, q_rows, k_rows, grid_height, grid_width, scale, dtype, threads};
  const std::vector<int32_t> lengths = copied_bounds(bounds, batch);
  const simvlm::AttentionForward problem{checked_shape(lengths, statics, table != 0, false),
                                         tensor(q),
                                         tensor(k),
                                         tensor(v),
                                         tensor(out),
                                         pointer<const float>(table),
                                         pointer<float>(lse)};
  check_memory("q", problem.shape.bounds.q_lens, batch, {q, out});
  check_memory("k and v", problem.shape.bounds.k_lens, batch, {k, v});
  py::gil_scoped_release released;
  if (!simvlm::kernels().attention_forward(problem)) throw std::bad_alloc();
}

void attention_backward(const Strided& q, const Strided& k, const Strided& v, const Strided& out, const Strided& dout,
                        const Strided& dq, const Strided& dk, const Strided& dv, int64_t lse, int64_t dlse,
                        int64_t table, int64_t dtable, int64_t bounds, int64_t batch, int64_t heads, int64_t head_dim,
                        bool padded, int64_t q_rows, int64_t k_rows, int64_t grid_height, int64_t grid_width,
                        float scale, int dtype, int threads) {
  const Statics statics{batch, heads, head_dim, padded, q_rows, k_rows, grid_height, grid_width, scale, dtype, threads};
  const bool keys_written = dk[0] != 0 || dv[0] != 0;
  const std::vector<int32_t> lengths = copied_bounds(bounds, batch);
  simvlm::AttentionBackward problem{checked_shape(lengths, statics, table != 0, keys_written),
                                    tensor(q),
                                    tensor(k),
                                    tensor(v),
                                    tensor(out),
                                    tensor(dout),
                                    pointer<const float>(table),
                                    pointer<const float>(lse),
                                    pointer<const float>(dlse),
                                    tensor(dq),
                                    tensor(dk),
                                    tensor(dv),
                                    nullptr,
                                    pointer<float>(dtable)};
  check_memory("q, out and dout", problem.shape.bounds.q_lens, batch, {q, out, dout});
  check_memory("k and v", problem.shape.bounds.k_lens, batch, {k, v});
  if (dtable != 0 && table == 0) throw py::value_error("prefix_attention: rel_bias must be given for its gradient");
  py::gil_scoped_release released;
  if (dtable != 0) {
    const AttentionShape& shape = problem.shape;
    problem.dtable_parts = simvlm::shared_scratch(batch * heads * table_chunks(shape) * table_part(shape));
    if (problem.dtable_parts == nullptr) throw std::bad_alloc();
  }
  if (!simvlm::kernels().attention_backward(problem)) throw std::bad_alloc();
}

// ---- the stem -------------------------------------------------------------------------------------------------------

struct NormStatics {
  std::array<int64_t, 4> shape;  // B, Hh, Ww, C
  int dtype, threads;
};

simvlm::NormShape checked_shape(const NormStatics& s) {
  const auto& [batch, height, width, channels] = s.shape;
  if (batch < 0 || height < 0 || width < 0 || channels < 1 || s.dtype < 0 || s.dtype > 2) {
    throw py::value_error("batch_norm_act: x must have at least one channel and no negative size");
  }
  return {batch, height, width, channels, static_cast<simvlm::DType>(s.dtype), s.threads < 1 ? 1 : s.threads};
}

simvlm::Images images(const Strided& x) { return {reinterpret_cast<void*>(x[0]), x[1], x[2], x[3]}; }

// Addresses of mean, var, weight, bias and branch_scale.
simvlm::NormGiven given(const std::array<int64_t, 5>& vectors, double eps, bool relu) {
  return {pointer<const float>(vectors[0]),
          pointer<const float>(vectors[1]),
          pointer<const float>(vectors[2]),
          pointer<const float>(vectors[3]),
          pointer<const float>(vectors[4]),
          eps,
          relu};
}

void batch_norm_statistics(const Strided& x, int64_t mean, int64_t var, const std::array<int64_t, 4>& shape, int dtype,
                           int threads) {
  const simvlm::NormStatistics problem{checked_shape({shape, dtype, threads}), images(x), pointer<float>(mean),
                                       pointer<float>(var)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().norm_statistics(problem)) throw std::bad_alloc();
}

void batch_norm_apply(const Strided& x, const Strided& residual, int64_t y, const std::array<int64_t, 5>& vectors,
                      double eps, bool relu, const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormApply problem{checked_shape({shape, dtype, threads}), given(vectors, eps, relu), images(x),
                                  images(residual), pointer<void>(y)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().norm_apply(problem)) throw std::bad_alloc();
}

void batch_norm_backward_reductions(const Strided& x, int64_t dy, int64_t y, int64_t dresidual, int64_t sum_dz,
                                    int64_t sum_dz_norm, const std::array<int64_t, 5>& vectors, double eps, bool relu,
                                    const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormBackwardReductions problem{checked_shape({shape, dtype, threads}),
                                               given(vectors, eps, relu),
                                               images(x),
                                               pointer<const void>(dy),
                                               pointer<const void>(y),
                                               pointer<void>(dresidual),
                                               pointer<float>(sum_dz),
                                               pointer<float>(sum_dz_norm)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().norm_backward_reductions(problem)) throw std::bad_alloc();
}

void batch_norm_backward_apply(const Strided& x, int64_t dy, int64_t mean_dz, int64_t mean_dz_norm, int64_t dx,
                               const std::array<int64_t, 5>& vectors, double eps, bool relu,
                               const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormBackwardApply problem{checked_shape({shape, dtype, threads}),
                                          given(vectors, eps, relu),
                                          images(x),
                                          pointer<const void>(dy),
                                          pointer<const float>(mean_dz),
                                          pointer<const float>(mean_dz_norm),
                                          pointer<void>(dx)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().norm_backward_apply(problem)) throw std::bad_alloc();
}

struct EmbedStatics {
  std::array<int64_t, 7> shape;  // B, storage rows, Bi, Gh, Gw, Rt, D
  int64_t places;                // int32[5, B]
  int dtype, threads;
};

simvlm::EmbedShape checked_shape(const EmbedStatics& s) {
  for (const int64_t size : s.shape) {
    if (size < 0 || s.dtype < 0 || s.dtype > 2) {
      throw py::value_error("embed_sequence: text must be of a known dtype and have no negative size");
    }
  }
  const auto& [batch, rows, images, grid_height, grid_width, text_rows, width] = s.shape;
  const auto* row = pointer<const int32_t>(s.places);
  const simvlm::Places places{row, row + batch, row + 2 * batch, row + 3 * batch, row + 4 * batch};
  return {batch,
          rows,
          images,
          grid_height,
          grid_width,
          text_rows,
          width,
          places,
          static_cast<simvlm::DType>(s.dtype),
          s.threads < 1 ? 1 : s.threads};
}

void embed_forward(const Strided& patches, bool projected, int64_t bias, int64_t positions, int64_t text,
                   int64_t text_row, int64_t rows, const std::array<int64_t, 7>& shape, int64_t places, int dtype,
                   int threads) {
  const simvlm::EmbedForward problem{checked_shape({shape, places, dtype, threads}),
                                     images(patches),
                                     projected,
                                     pointer<const float>(bias),
                                     pointer<const float>(positions),
                                     pointer<const void>(text),
                                     text_row,
                                     pointer<void>(rows)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().embed_forward(problem)) throw std::bad_alloc();
}

void embed_backward(int64_t drows, int64_t dpatches, bool projected, int64_t dbias, int64_t dpositions, int64_t dtext,
                    const std::array<int64_t, 7>& shape, int64_t places, int dtype, int threads) {
  const simvlm::EmbedBackward problem{checked_shape({shape, places, dtype, threads}),
                                      pointer<const void>(drows),
                                      pointer<void>(dpatches),
                                      projected,
                                      pointer<float>(dbias),
                                      pointer<float>(dpositions),
                                      pointer<void>(dtext)};
  py::gil_scoped_release released;
  if (!simvlm::kernels().embed_backward(problem)) throw std::bad_alloc();
}

// ---- CPU levels -----------------------------------------------------------------------------------------------------

// Every compiled level and whether this processor runs it.
std::vector<std::pair<std::string, bool>> levels() {
  int count = 0;
  const simvlm::Kernels* rows = simvlm::all_kernels(&count);
  std::vector<std::pair<std::string, bool>> found;
  for (int i = 0; i < count; ++i) found.emplace_back(rows[i].level, simvlm::runs_here(rows[i].level));
  return found;
}

void select_level(const py::object& name) {
  if (name.is_none()) {
    simvlm::select(nullptr);
    return;
  }
  const auto level = name.cast<std::string>();
  if (simvlm::select(level.c_str())) return;
  std::string runnable;
  for (const auto& [known, runs] : levels()) {
    if (runs) runnable += (runnable.empty() ? "" : ", ") + known;
  }
  throw py::value_error("SIMVLM_CPU_LEVEL must be a level that this module holds and this processor runs (" + runnable +
                        "), got '" + level + "'");
}

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "C++ kernels of simvlm for the CPU, by raw address; use simvlm.kernels instead.";
  m.attr("source_hash") = SIMVLM_SOURCE_HASH;
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("batch_norm_statistics", &batch_norm_statistics);
  m.def("batch_norm_apply", &batch_norm_apply);
  m.def("batch_norm_backward_reductions", &batch_norm_backward_reductions);
  m.def("batch_norm_backward_apply", &batch_norm_backward_apply);
  m.def("embed_forward", &embed_forward);
  m.def("embed_backward", &embed_backward);
#ifdef SIMVLM_SANITIZE
  m.def("make_mistake", &simvlm::make_mistake);
#endif
  m.def("levels", &levels, "(name, runs here) of every compiled CPU level, the plainest first.");
  m.def("level", [] { return std::string(simvlm::kernels().level); }, "The CPU level in use.");
  m.def("select_level", &select_level, "Uses the named CPU level from now on; None: the newest that runs here.");
}
