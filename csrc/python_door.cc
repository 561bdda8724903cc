// The Python door: raw addresses and sizes in, nothing of torch or numpy. It has the integers that kernels turn into
// addresses checked, releases the GIL and runs the level in use. The files cpp_cpu.py in simvlm/kernels/ are its only
// callers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "arch.h"
#include "checks.h"

namespace py = pybind11;

namespace simvlm {
#ifdef SIMVLM_SANITIZE
float make_mistake(const std::string& name);  // mistakes.cc
#endif
#ifdef SIMVLM_XLA_DOOR
std::pair<int, int> xla_interface();  // xla_door.cc
std::vector<std::pair<const char*, void*>> xla_targets();
#endif
}  // namespace simvlm

namespace {

using simvlm::AttentionStatics;
using simvlm::checked_shape;
using simvlm::EmbedStatics;
using simvlm::NormStatics;
using simvlm::Tensor;

using Strided = std::array<int64_t, 4>;  // address, then the strides of sequence, row and head

Tensor tensor(const Strided& t) { return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]}; }

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

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

void attention_forward(const Strided& q, const Strided& k, const Strided& v, const Strided& out, int64_t lse,
                       int64_t table, int64_t bounds, int64_t batch, int64_t heads, int64_t head_dim, bool padded,
                       int64_t q_rows, int64_t k_rows, int64_t grid_height, int64_t grid_width, float scale, int dtype,
                       int threads) {
  const AttentionStatics statics{batch,       heads,      head_dim, padded, q_rows, k_rows,
                                 grid_height, grid_width, scale,    dtype,  threads};
  const std::vector<int32_t> lengths = copied_bounds(bounds, batch);
  const simvlm::AttentionForward problem{checked_shape(lengths.data(), statics, table != 0, false),
                                         tensor(q),
                                         tensor(k),
                                         tensor(v),
                                         tensor(out),
                                         pointer<const float>(table),
                                         pointer<float>(lse)};
  check_memory("q", problem.shape.bounds.q_lens, batch, {q, out});
  check_memory("k and v", problem.shape.bounds.k_lens, batch, {k, v});
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void attention_backward(const Strided& q, const Strided& k, const Strided& v, const Strided& out, const Strided& dout,
                        const Strided& dq, const Strided& dk, const Strided& dv, int64_t lse, int64_t dlse,
                        int64_t table, int64_t dtable, int64_t bounds, int64_t batch, int64_t heads, int64_t head_dim,
                        bool padded, int64_t q_rows, int64_t k_rows, int64_t grid_height, int64_t grid_width,
                        float scale, int dtype, int threads) {
  const AttentionStatics statics{batch,       heads,      head_dim, padded, q_rows, k_rows,
                                 grid_height, grid_width, scale,    dtype,  threads};
  const bool keys_written = dk[0] != 0 || dv[0] != 0;
  const std::vector<int32_t> lengths = copied_bounds(bounds, batch);
  const simvlm::AttentionBackward problem{checked_shape(lengths.data(), statics, table != 0, keys_written),
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
  py::gil_scoped_release released;
  simvlm::run(problem);
}

// ---- the stem -------------------------------------------------------------------------------------------------------

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
  const simvlm::NormStatistics problem{checked_shape(NormStatics{shape, dtype, threads}), images(x),
                                       pointer<float>(mean), pointer<float>(var)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void batch_norm_apply(const Strided& x, const Strided& residual, int64_t y, const std::array<int64_t, 5>& vectors,
                      double eps, bool relu, const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormApply problem{checked_shape(NormStatics{shape, dtype, threads}), given(vectors, eps, relu),
                                  images(x), images(residual), pointer<void>(y)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void batch_norm_backward_reductions(const Strided& x, int64_t dy, int64_t y, int64_t dresidual, int64_t sum_dz,
                                    int64_t sum_dz_norm, const std::array<int64_t, 5>& vectors, double eps, bool relu,
                                    const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormBackwardReductions problem{checked_shape(NormStatics{shape, dtype, threads}),
                                               given(vectors, eps, relu),
                                               images(x),
                                               pointer<const void>(dy),
                                               pointer<const void>(y),
                                               pointer<void>(dresidual),
                                               pointer<float>(sum_dz),
                                               pointer<float>(sum_dz_norm)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void batch_norm_backward_apply(const Strided& x, int64_t dy, int64_t mean_dz, int64_t mean_dz_norm, int64_t dx,
                               const std::array<int64_t, 5>& vectors, double eps, bool relu,
                               const std::array<int64_t, 4>& shape, int dtype, int threads) {
  const simvlm::NormBackwardApply problem{checked_shape(NormStatics{shape, dtype, threads}),
                                          given(vectors, eps, relu),
                                          images(x),
                                          pointer<const void>(dy),
                                          pointer<const float>(mean_dz),
                                          pointer<const float>(mean_dz_norm),
                                          pointer<void>(dx)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void embed_forward(const Strided& patches, bool projected, int64_t bias, int64_t positions, int64_t text,
                   int64_t text_row, int64_t rows, const std::array<int64_t, 7>& shape, int64_t places, int dtype,
                   int threads) {
  const simvlm::EmbedForward problem{checked_shape(EmbedStatics{shape, pointer<const int32_t>(places), dtype, threads}),
                                     images(patches),
                                     projected,
                                     pointer<const float>(bias),
                                     pointer<const float>(positions),
                                     pointer<const void>(text),
                                     text_row,
                                     pointer<void>(rows)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

void embed_backward(int64_t drows, int64_t dpatches, bool projected, int64_t dbias, int64_t dpositions, int64_t dtext,
                    const std::array<int64_t, 7>& shape, int64_t places, int dtype, int threads) {
  const simvlm::EmbedBackward problem{
      checked_shape(EmbedStatics{shape, pointer<const int32_t>(places), dtype, threads}),
      pointer<const void>(drows),
      pointer<void>(dpatches),
      projected,
      pointer<float>(dbias),
      pointer<float>(dpositions),
      pointer<void>(dtext)};
  py::gil_scoped_release released;
  simvlm::run(problem);
}

#ifdef SIMVLM_XLA_DOOR
py::dict xla_targets() {
  py::dict found;
  for (const auto& [name, handler] : simvlm::xla_targets())
    found[name] = py::capsule(handler, "xla._CUSTOM_CALL_TARGET");
  return found;
}
#endif

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
#ifdef SIMVLM_XLA_DOOR
  m.attr("xla_interface") = simvlm::xla_interface();
  m.def("xla_targets", &xla_targets, "XLA's handlers by name, for jax.ffi.register_ffi_target.");
#endif
  m.def("levels", &levels, "(name, runs here) of every compiled CPU level, the plainest first.");
  m.def("level", [] { return std::string(simvlm::kernels().level); }, "The CPU level in use.");
  m.def("select_level", &select_level, "Uses the named CPU level from now on; None: the newest that runs here.");
}
