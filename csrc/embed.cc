// Where `embed_sequence` puts its rows, and takes their gradients from, for one CPU level (docs/stem.md).
//
//   forward   task (storage rows): each is a patch with bias and position, a text row, or zeros; one pass.
//   backward  task (a patch's position): the gradients of all images' patches there, and their sum.
//             task (text rows): copies. Then the bias's gradient, the positions' summed in order in float64.
//
// The projection's products are the caller's: forward reads its float32 result, backward writes what the products read.
#include <cstring>

#include "parallel.h"
#include "simd.h"
#include "stem.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int64_t bias_channels = 64;

int threads_for(const EmbedShape& shape, int64_t rows) { return threads_for(shape.threads, rows * shape.width); }

// Rows of a task: a function of the shape alone.
int64_t chunk_of(const EmbedShape& shape) { return most(1, 16384 / most(1, shape.width)); }

int64_t tasks_of(int64_t rows, int64_t chunk) { return (rows + chunk - 1) / chunk; }

// The last sequence whose start is not beyond `index`, or -1; starts ascend.
int64_t owner_of(const int32_t* starts, int64_t batch, int64_t index) {
  int64_t low = 0, high = batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

bool within(int64_t index, int64_t size) { return index >= 0 && index < size; }

template <class Problem>
struct Run {
  const Problem& problem;
  int64_t chunk;
};

// ---- forward --------------------------------------------------------------------------------------------------------

// One patch: (projected + bias) + position, rounded once.
template <class Float, class From>
SIMVLM_INLINE void place_patch(const EmbedForward& a, int64_t image, int64_t i, typename Float::Storage* to) {
  const int64_t grid_width = a.shape.grid_width, width = a.shape.width;
  const auto* from = static_cast<const typename From::Storage*>(a.patches.data) + image * a.patches.batch +
                     i / grid_width * a.patches.row + i % grid_width * a.patches.column;
  const float* position = a.positions == nullptr ? nullptr : a.positions + i * width;
  int64_t c = 0;
  const auto step = [&](auto source, auto wide, auto out) {
    vfloat v = source.widen(from + c);
    if (a.bias != nullptr) v += wide.widen(a.bias + c);
    if (position != nullptr) v += wide.widen(position + c);
    out.narrow(to + c, v);
  };
  for (; c + lanes <= width; c += lanes) step(Whole<From>{}, Whole<Float32>{}, Whole<Float>{});
  if (c < width) step(Part<From>{width - c}, Part<Float32>{width - c}, Part<Float>{width - c});
}

template <class Float>
void forward_rows(void* context, int64_t index) {
  typedef typename Float::Storage Storage;
  const auto& run = *static_cast<const Run<EmbedForward>*>(context);
  const EmbedForward& a = run.problem;
  const EmbedShape& shape = a.shape;
  const Places& at = shape.places;
  const int64_t patches = shape.grid_height * shape.grid_width, last = least(shape.rows, (index + 1) * run.chunk);
  const size_t bytes = sizeof(Storage) * static_cast<size_t>(shape.width);
  int64_t b = owner_of(at.q_starts, shape.batch, index * run.chunk);
  for (int64_t row = index * run.chunk; row < last; ++row) {
    while (b + 1 < shape.batch && at.q_starts[b + 1] <= row) ++b;
    Storage* to = static_cast<Storage*>(a.rows) + row * shape.width;
    const int64_t i = b < 0 ? -1 : row - at.q_starts[b];
    if (i < 0 || i >= at.q_lens[b]) {
      std::memset(to, 0, bytes);
    } else if (i < at.image_lens[b]) {
      const int64_t image = at.image_index[b];
      if (!within(image, shape.images) || i >= patches) {
        std::memset(to, 0, bytes);
      } else if (a.projected) {
        place_patch<Float, Float32>(a, image, i, to);
      } else {
        place_patch<Float, Float>(a, image, i, to);
      }
    } else {
      const int64_t text_row = static_cast<int64_t>(at.text_starts[b]) + i - at.image_lens[b];
      if (within(text_row, shape.text_rows)) {
        std::memcpy(to, static_cast<const Storage*>(a.text) + text_row * a.text_row, bytes);
      } else {
        std::memset(to, 0, bytes);
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The storage row of position i of sequence b, or null where there is none.
template <class Float>
SIMVLM_INLINE const typename Float::Storage* drow_of(const EmbedBackward& a, int64_t b, int64_t i) {
  const int64_t row = a.shape.places.q_starts[b] + i;
  if (i >= a.shape.places.q_lens[b] || !within(row, a.shape.rows)) return nullptr;
  return static_cast<const typename Float::Storage*>(a.drows) + row * a.shape.width;
}

template <class Float, class To>
SIMVLM_INLINE void gather_patch(const typename Float::Storage* from, int64_t width, float* sum, void* to) {
  auto* out = static_cast<typename To::Storage*>(to);
  int64_t c = 0;
  const auto step = [&](auto source, auto wide, auto target) {
    const vfloat v = source.widen(from + c);
    if (sum != nullptr) wide.narrow(sum + c, wide.widen(sum + c) + v);
    if (out != nullptr) target.narrow(out + c, v);
  };
  for (; c + lanes <= width; c += lanes) step(Whole<Float>{}, Whole<Float32>{}, Whole<To>{});
  if (c < width) step(Part<Float>{width - c}, Part<Float32>{width - c}, Part<To>{width - c});
}

// Position i of every image.
template <class Float, class To>
void backward_position(void* context, int64_t i) {
  const EmbedBackward& a = static_cast<const Run<EmbedBackward>*>(context)->problem;
  const EmbedShape& shape = a.shape;
  const Places& at = shape.places;
  const int64_t patches = shape.grid_height * shape.grid_width, width = shape.width;
  float* sum = a.dpositions == nullptr ? nullptr : a.dpositions + i * width;
  if (sum != nullptr) std::memset(sum, 0, sizeof(float) * static_cast<size_t>(width));
  int64_t b = -1;
  for (int64_t image = 0; image < shape.images; ++image) {
    // An image's sequence is the last with as many images before it.
    while (b + 1 < shape.batch && at.image_index[b + 1] <= image) ++b;
    const bool owned = b >= 0 && at.image_index[b] == image && i < at.image_lens[b];
    const auto* from = owned ? drow_of<Float>(a, b, i) : nullptr;
    auto* to = static_cast<typename To::Storage*>(a.dpatches);
    if (to != nullptr) to += (image * patches + i) * width;
    if (from != nullptr) {
      gather_patch<Float, To>(from, width, sum, to);
    } else if (to != nullptr) {
      std::memset(to, 0, sizeof(*to) * static_cast<size_t>(width));
    }
  }
}

template <class Float>
void backward_text(void* context, int64_t index) {
  typedef typename Float::Storage Storage;
  const auto& run = *static_cast<const Run<EmbedBackward>*>(context);
  const EmbedShape& shape = run.problem.shape;
  const Places& at = shape.places;
  const size_t bytes = sizeof(Storage) * static_cast<size_t>(shape.width);
  const int64_t last = least(shape.text_rows, (index + 1) * run.chunk);
  int64_t b = owner_of(at.text_starts, shape.batch, index * run.chunk);
  for (int64_t row = index * run.chunk; row < last; ++row) {
    while (b + 1 < shape.batch && at.text_starts[b + 1] <= row) ++b;
    const Storage* from =
        b < 0 ? nullptr : drow_of<Float>(run.problem, b, at.image_lens[b] + (row - at.text_starts[b]));
    Storage* to = static_cast<Storage*>(run.problem.dtext) + row * shape.width;
    if (from != nullptr) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
}

// dbias of `bias_channels` channels.
void sum_positions(void* context, int64_t block) {
  const EmbedBackward& a = static_cast<const Run<EmbedBackward>*>(context)->problem;
  const int64_t first = block * bias_channels, count = least(bias_channels, a.shape.width - first);
  double sum[bias_channels] = {};
  for (int64_t i = 0; i < a.shape.grid_height * a.shape.grid_width; ++i) {
    for (int64_t c = 0; c < count; ++c) sum[c] += a.dpositions[i * a.shape.width + first + c];
  }
  for (int64_t c = 0; c < count; ++c) a.dbias[first + c] = static_cast<float>(sum[c]);
}

}  // namespace

bool embed_forward(const EmbedForward& a) {
  Run<EmbedForward> run{a, chunk_of(a.shape)};
  const Task task = of_dtype(a.shape.dtype, [](auto f) { return forward_rows<decltype(f)>; });
  parallel_for(tasks_of(a.shape.rows, run.chunk), threads_for(a.shape, a.shape.rows), task, &run);
  return true;
}

bool embed_backward(const EmbedBackward& a) {
  const EmbedShape& shape = a.shape;
  Run<EmbedBackward> run{a, chunk_of(shape)};
  const int64_t patches = shape.grid_height * shape.grid_width;
  if (a.dpatches != nullptr || a.dpositions != nullptr) {
    const Task task = of_dtype(shape.dtype, [&](auto f) {
      return a.projected ? backward_position<decltype(f), Float32> : backward_position<decltype(f), decltype(f)>;
    });
    parallel_for(patches, threads_for(shape, shape.images * patches), task, &run);
  }
  if (a.dtext != nullptr) {
    const Task task = of_dtype(shape.dtype, [](auto f) { return backward_text<decltype(f)>; });
    parallel_for(tasks_of(shape.text_rows, run.chunk), threads_for(shape, shape.text_rows), task, &run);
  }
  if (a.dbias != nullptr) {
    parallel_for(tasks_of(shape.width, bias_channels), threads_for(shape, patches), sum_positions, &run);
  }
  return true;
}

}  // namespace simvlm::SIMVLM_LEVEL
