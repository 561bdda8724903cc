// The XLA door: the kernels as handlers of XLA's foreign function interface, which JAX calls on the CPU. Arrays come
// contiguous, with their shapes; layouts are data here, so what is wrong with one is an error when the program runs.
// The files cpp_jax.py in simvlm/kernels/ are the only callers. Built where jax's headers are.
//
// jax.vmap calls with vmap_method="expand_dims": see Mapped. An array of no elements stands for one that is not there
// (no table, a gradient that nobody wants).
#include <cfenv>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "arch.h"
#include "checks.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace simvlm {

std::pair<int, int> xla_interface();
std::vector<std::pair<const char*, void*>> xla_targets();

namespace {

namespace ffi = xla::ffi;

using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
template <class Buffer>
using Out = ffi::Result<Buffer>;

// One call in which vmap put `axes` axes before each array's own: of the mapped sizes in results, of these or of 1 in
// operands. The kernels run for one element of the mapped axes after the other.
class Mapped {
 public:
  template <class Buffer>
  Mapped(size_t axes, const Buffer& result) : sizes_(result.dimensions().first(axes)) {}

  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes_) product *= size;
    return product;
  }

  // Where an array's part for that element begins; null for an array of no elements.
  template <class T, class Buffer>
  T* at(int64_t element, const Buffer& array) const {
    if (array.element_count() == 0) return nullptr;
    int64_t place = 0, parts = 1;
    for (size_t axis = sizes_.size(); axis-- > 0; element /= sizes_[axis]) {
      const int64_t size = array.dimensions()[axis];
      if (size != 1) place += element % sizes_[axis] * parts;
      parts *= size;
    }
    auto* data = static_cast<char*>(array.untyped_data());
    return reinterpret_cast<T*>(data + place * static_cast<int64_t>(array.size_bytes()) / parts);
  }

 private:
  ffi::Span<const int64_t> sizes_;
};

int dtype_number(ffi::DataType type) {
  if (type == ffi::F32) return static_cast<int>(DType::float32);
  if (type == ffi::BF16) return static_cast<int>(DType::bfloat16);
  return type == ffi::F16 ? static_cast<int>(DType::float16) : -1;
}

// While one lives, this thread computes as the language says: XLA's threads flush denormals to zero, which the baseline
// level's float16 cannot do without, and threads that the pool starts would inherit.
class PlainFloats {
 public:
  PlainFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainFloats() { std::fesetenv(&before_); }
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  std::fenv_t before_;
};

// body(element) for each element of the mapped axes; what it throws, as an error of XLA's.
template <class Body>
ffi::Error for_each(const Mapped& mapped, Body body) {
  const OwnPool own_pool;
  const PlainFloats plain_floats;
  try {
    for (int64_t element = 0; element < mapped.count(); ++element) body(element);
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "simvlm: out of memory");
  }
  return ffi::Error::Success();
}

// ---- prefix_attention -----------------------------------------------------------------------------------------------

AttentionStatics attention_statics(const Any& q, const Any& k, const Integers& bounds, bool padded, int64_t grid_height,
                                   int64_t grid_width, float scale, int64_t threads) {
  const auto own = q.dimensions().last(3), keys = k.dimensions().last(3);  // [rows, N, H]
  return {bounds.dimensions().back(),
          own[1],
          own[2],
          padded,
          own[0],
          keys[0],
          grid_height,
          grid_width,
          scale,
          dtype_number(q.element_type()),
          static_cast<int>(threads)};
}

Tensor tensor(void* data, const AttentionStatics& s, int64_t rows) {
  const int64_t row = s.heads * s.head_dim;
  return {data, s.padded ? rows * row : 0, row, s.head_dim};
}

ffi::Error attention_forward(Any q, Any k, Any v, Floats table, Integers bounds, Out<Any> out, Out<Floats> lse,
                             bool padded, int64_t grid_height, int64_t grid_width, float scale, int64_t threads) {
  const AttentionStatics s = attention_statics(q, k, bounds, padded, grid_height, grid_width, scale, threads);
  const Mapped mapped(bounds.dimensions().size() - 2, *out);
  return for_each(mapped, [&](int64_t e) {
    const auto* entries = mapped.at<const float>(e, table);
    run(AttentionForward{checked_shape(mapped.at<const int32_t>(e, bounds), s, entries != nullptr, false),
                         tensor(mapped.at<void>(e, q), s, s.q_rows), tensor(mapped.at<void>(e, k), s, s.k_rows),
                         tensor(mapped.at<void>(e, v), s, s.k_rows), tensor(mapped.at<void>(e, *out), s, s.q_rows),
                         entries, mapped.at<float>(e, *lse)});
  });
}

ffi::Error attention_backward(Any q, Any k, Any v, Any out, Any dout, Floats lse, Floats dlse, Floats table,
                              Integers bounds, Out<Any> dq, Out<Any> dk, Out<Any> dv, Out<Floats> dtable, bool padded,
                              int64_t grid_height, int64_t grid_width, float scale, int64_t threads) {
  const AttentionStatics s = attention_statics(q, k, bounds, padded, grid_height, grid_width, scale, threads);
  const Mapped mapped(bounds.dimensions().size() - 2, *dq);
  const bool keys_written = dk->element_count() != 0 || dv->element_count() != 0;
  return for_each(mapped, [&](int64_t e) {
    const auto* entries = mapped.at<const float>(e, table);
    run(AttentionBackward{checked_shape(mapped.at<const int32_t>(e, bounds), s, entries != nullptr, keys_written),
                          tensor(mapped.at<void>(e, q), s, s.q_rows), tensor(mapped.at<void>(e, k), s, s.k_rows),
                          tensor(mapped.at<void>(e, v), s, s.k_rows), tensor(mapped.at<void>(e, out), s, s.q_rows),
                          tensor(mapped.at<void>(e, dout), s, s.q_rows), entries, mapped.at<const float>(e, lse),
                          mapped.at<const float>(e, dlse), tensor(mapped.at<void>(e, *dq), s, s.q_rows),
                          tensor(mapped.at<void>(e, *dk), s, s.k_rows), tensor(mapped.at<void>(e, *dv), s, s.k_rows),
                          nullptr, mapped.at<float>(e, *dtable)});
  });
}

// ---- batch_norm_act -------------------------------------------------------------------------------------------------

NormShape norm_shape(const Any& x, int64_t threads) {
  const auto own = x.dimensions().last(4);
  return checked_shape(
      NormStatics{{own[0], own[1], own[2], own[3]}, dtype_number(x.element_type()), static_cast<int>(threads)});
}

Images images(void* data, ffi::Span<const int64_t> dimensions) {
  const auto own = dimensions.last(3);
  return {data, own[0] * own[1] * own[2], own[1] * own[2], own[2]};
}

ffi::Error batch_norm_statistics(Any x, Out<Floats> mean, Out<Floats> var, int64_t threads) {
  const Mapped mapped(x.dimensions().size() - 4, *mean);
  return for_each(mapped, [&](int64_t e) {
    run(NormStatistics{norm_shape(x, threads), images(mapped.at<void>(e, x), x.dimensions()),
                       mapped.at<float>(e, *mean), mapped.at<float>(e, *var)});
  });
}

ffi::Error batch_norm_apply(Any x, Any residual, Floats mean, Floats var, Floats weight, Floats bias,
                            Floats branch_scale, Out<Any> y, double eps, bool relu, int64_t threads) {
  const Mapped mapped(x.dimensions().size() - 4, *y);
  return for_each(mapped, [&](int64_t e) {
    const NormGiven given{mapped.at<const float>(e, mean),
                          mapped.at<const float>(e, var),
                          mapped.at<const float>(e, weight),
                          mapped.at<const float>(e, bias),
                          mapped.at<const float>(e, branch_scale),
                          eps,
                          relu};
    run(NormApply{norm_shape(x, threads), given, images(mapped.at<void>(e, x), x.dimensions()),
                  images(mapped.at<void>(e, residual), x.dimensions()), mapped.at<void>(e, *y)});
  });
}

ffi::Error batch_norm_backward_reductions(Any dy, Any x, Any y, Floats mean, Floats var, Floats weight, Floats bias,
                                          Floats branch_scale, Out<Floats> sum_dz, Out<Floats> sum_dz_norm,
                                          Out<Any> dresidual, double eps, bool relu, int64_t threads) {
  const Mapped mapped(x.dimensions().size() - 4, *sum_dz);
  return for_each(mapped, [&](int64_t e) {
    const NormGiven given{mapped.at<const float>(e, mean),
                          mapped.at<const float>(e, var),
                          mapped.at<const float>(e, weight),
                          mapped.at<const float>(e, bias),
                          mapped.at<const float>(e, branch_scale),
                          eps,
                          relu};
    run(NormBackwardReductions{norm_shape(x, threads), given, images(mapped.at<void>(e, x), x.dimensions()),
                               mapped.at<const void>(e, dy), mapped.at<const void>(e, y),
                               mapped.at<void>(e, *dresidual), mapped.at<float>(e, *sum_dz),
                               mapped.at<float>(e, *sum_dz_norm)});
  });
}

ffi::Error batch_norm_backward_apply(Any dy, Any x, Floats mean, Floats var, Floats weight, Floats bias,
                                     Floats branch_scale, Floats mean_dz, Floats mean_dz_norm, Out<Any> dx, double eps,
                                     bool relu, int64_t threads) {
  const Mapped mapped(x.dimensions().size() - 4, *dx);
  return for_each(mapped, [&](int64_t e) {
    const NormGiven given{mapped.at<const float>(e, mean),
                          mapped.at<const float>(e, var),
                          mapped.at<const float>(e, weight),
                          mapped.at<const float>(e, bias),
                          mapped.at<const float>(e, branch_scale),
                          eps,
                          relu};
    run(NormBackwardApply{norm_shape(x, threads), given, images(mapped.at<void>(e, x), x.dimensions()),
                          mapped.at<const void>(e, dy), mapped.at<const float>(e, mean_dz),
                          mapped.at<const float>(e, mean_dz_norm), mapped.at<void>(e, *dx)});
  });
}

// ---- embed_sequence: patches are float32 where they are projected ---------------------------------------------------

int64_t batch_of(const Integers& places) { return places.dimensions().back(); }

// Rows [.., D] of one element of the mapped axes.
int64_t rows_of(const Any& array, size_t axes) {
  const auto own = array.dimensions().last(array.dimensions().size() - axes);
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < own.size(); ++axis) rows *= own[axis];
  return rows;
}

ffi::Error embed_forward(Any patches, Floats bias, Floats positions, Any text, Integers places, Out<Any> rows,
                         int64_t threads) {
  const size_t axes = places.dimensions().size() - 2;
  const Mapped mapped(axes, *rows);
  const auto grid = patches.dimensions().last(4);  // [Bi, Gh, Gw, D]
  const auto words = text.dimensions().last(2);    // [Rt, D]
  return for_each(mapped, [&](int64_t e) {
    const EmbedShape shape = checked_shape(
        EmbedStatics{{batch_of(places), rows_of(*rows, axes), grid[0], grid[1], grid[2], words[0], words[1]},
                     mapped.at<const int32_t>(e, places),
                     dtype_number(text.element_type()),
                     static_cast<int>(threads)});
    run(EmbedForward{shape, images(mapped.at<void>(e, patches), patches.dimensions()),
                     patches.element_type() == ffi::F32, mapped.at<const float>(e, bias),
                     mapped.at<const float>(e, positions), mapped.at<const void>(e, text), words[1],
                     mapped.at<void>(e, *rows)});
  });
}

ffi::Error embed_backward(Any drows, Integers places, Out<Any> dpatches, Out<Floats> dbias, Out<Floats> dpositions,
                          Out<Any> dtext, int64_t images, int64_t grid_height, int64_t grid_width, int64_t text_rows,
                          int64_t threads) {
  const size_t axes = places.dimensions().size() - 2;
  const Mapped mapped(axes, *dpatches);
  return for_each(mapped, [&](int64_t e) {
    const EmbedShape shape = checked_shape(EmbedStatics{
        {batch_of(places), rows_of(drows, axes), images, grid_height, grid_width, text_rows, drows.dimensions().back()},
        mapped.at<const int32_t>(e, places),
        dtype_number(drows.element_type()),
        static_cast<int>(threads)});
    run(EmbedBackward{shape, mapped.at<const void>(e, drows), mapped.at<void>(e, *dpatches),
                      dpatches->element_type() == ffi::F32, mapped.at<float>(e, *dbias),
                      mapped.at<float>(e, *dpositions), mapped.at<void>(e, *dtext)});
  });
}

// ---- handlers -------------------------------------------------------------------------------------------------------

XLA_FFI_DEFINE_HANDLER(attention_forward_handler, attention_forward,
                       ffi::Ffi::Bind()
                           .Arg<Any>()       // q
                           .Arg<Any>()       // k
                           .Arg<Any>()       // v
                           .Arg<Floats>()    // table
                           .Arg<Integers>()  // bounds
                           .Ret<Any>()       // out
                           .Ret<Floats>()    // lse
                           .Attr<bool>("padded")
                           .Attr<int64_t>("grid_height")
                           .Attr<int64_t>("grid_width")
                           .Attr<float>("scale")
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(attention_backward_handler, attention_backward,
                       ffi::Ffi::Bind()
                           .Arg<Any>()       // q
                           .Arg<Any>()       // k
                           .Arg<Any>()       // v
                           .Arg<Any>()       // out
                           .Arg<Any>()       // dout
                           .Arg<Floats>()    // lse
                           .Arg<Floats>()    // dlse
                           .Arg<Floats>()    // table
                           .Arg<Integers>()  // bounds
                           .Ret<Any>()       // dq
                           .Ret<Any>()       // dk
                           .Ret<Any>()       // dv
                           .Ret<Floats>()    // dtable
                           .Attr<bool>("padded")
                           .Attr<int64_t>("grid_height")
                           .Attr<int64_t>("grid_width")
                           .Attr<float>("scale")
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(batch_norm_statistics_handler, batch_norm_statistics,
                       ffi::Ffi::Bind()
                           .Arg<Any>()     // x
                           .Ret<Floats>()  // mean
                           .Ret<Floats>()  // var
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(batch_norm_apply_handler, batch_norm_apply,
                       ffi::Ffi::Bind()
                           .Arg<Any>()     // x
                           .Arg<Any>()     // residual
                           .Arg<Floats>()  // mean
                           .Arg<Floats>()  // var
                           .Arg<Floats>()  // weight
                           .Arg<Floats>()  // bias
                           .Arg<Floats>()  // branch_scale
                           .Ret<Any>()     // y
                           .Attr<double>("eps")
                           .Attr<bool>("relu")
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(batch_norm_backward_reductions_handler, batch_norm_backward_reductions,
                       ffi::Ffi::Bind()
                           .Arg<Any>()     // dy
                           .Arg<Any>()     // x
                           .Arg<Any>()     // y
                           .Arg<Floats>()  // mean
                           .Arg<Floats>()  // var
                           .Arg<Floats>()  // weight
                           .Arg<Floats>()  // bias
                           .Arg<Floats>()  // branch_scale
                           .Ret<Floats>()  // sum_dz
                           .Ret<Floats>()  // sum_dz_norm
                           .Ret<Any>()     // dresidual
                           .Attr<double>("eps")
                           .Attr<bool>("relu")
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(batch_norm_backward_apply_handler, batch_norm_backward_apply,
                       ffi::Ffi::Bind()
                           .Arg<Any>()     // dy
                           .Arg<Any>()     // x
                           .Arg<Floats>()  // mean
                           .Arg<Floats>()  // var
                           .Arg<Floats>()  // weight
                           .Arg<Floats>()  // bias
                           .Arg<Floats>()  // branch_scale
                           .Arg<Floats>()  // mean_dz
                           .Arg<Floats>()  // mean_dz_norm
                           .Ret<Any>()     // dx
                           .Attr<double>("eps")
                           .Attr<bool>("relu")
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(embed_forward_handler, embed_forward,
                       ffi::Ffi::Bind()
                           .Arg<Any>()       // patches
                           .Arg<Floats>()    // bias
                           .Arg<Floats>()    // positions
                           .Arg<Any>()       // text
                           .Arg<Integers>()  // places
                           .Ret<Any>()       // rows
                           .Attr<int64_t>("threads"));
XLA_FFI_DEFINE_HANDLER(embed_backward_handler, embed_backward,
                       ffi::Ffi::Bind()
                           .Arg<Any>()       // drows
                           .Arg<Integers>()  // places
                           .Ret<Any>()       // dpatches
                           .Ret<Floats>()    // dbias
                           .Ret<Floats>()    // dpositions
                           .Ret<Any>()       // dtext
                           .Attr<int64_t>("images")
                           .Attr<int64_t>("grid_height")
                           .Attr<int64_t>("grid_width")
                           .Attr<int64_t>("text_rows")
                           .Attr<int64_t>("threads"));

}  // namespace

// The version of XLA's interface that the handlers are built for: XLA takes its own and older ones.
std::pair<int, int> xla_interface() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

std::vector<std::pair<const char*, void*>> xla_targets() {
  const auto target = [](const char* name, XLA_FFI_Handler* handler) {
    return std::make_pair(name, reinterpret_cast<void*>(handler));
  };
  return {target("attention_forward", attention_forward_handler),
          target("attention_backward", attention_backward_handler),
          target("batch_norm_statistics", batch_norm_statistics_handler),
          target("batch_norm_apply", batch_norm_apply_handler),
          target("batch_norm_backward_reductions", batch_norm_backward_reductions_handler),
          target("batch_norm_backward_apply", batch_norm_backward_apply_handler),
          target("embed_forward", embed_forward_handler),
          target("embed_backward", embed_backward_handler)};
}

}  // namespace simvlm
