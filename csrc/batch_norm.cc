// Batch normalization with what surrounds it, for one CPU level (docs/stem.md derives the formulas).
//
// A task is a chunk of pixels, all channels; a chunk's size depends on the shape alone. Within it, groups of 8 pixels
// are folded in registers, channel vector by channel vector. Sums over pixels leave one float32 part a chunk, and the
// parts are merged in order, in float64: results do not depend on the threads.
//
//   statistics   x once: mean and Σ(x - mean)² of a group, then of its chunk, then of all (Chan, Golub, LeVeque 1983)
//   apply        x and residual once, y once
//   reductions   dy, x (and y) once, dresidual once
//   backward     dy and x once, dx once
#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"
#include "stem.h"

namespace simvlm::SIMVLM_LEVEL {
namespace {

constexpr int group_pixels = 8;
constexpr int64_t merged_channels = 64;
constexpr float infinity = std::numeric_limits<float>::infinity();

// ---- pixels, channels, tasks ----------------------------------------------------------------------------------------

int64_t pixels_of(const NormShape& shape) { return shape.batch * shape.height * shape.width; }

// Few enough pixels that float32 sums them well and tasks are many, enough that parts are small beside x.
int64_t chunk_of(const NormShape& shape) {
  return most(64, least(512, 16384 / shape.channels / group_pixels * group_pixels));
}

int threads_for(const NormShape& shape) { return threads_for(shape.threads, pixels_of(shape) * shape.channels); }

// Goes through an image's pixels in order.
class Walk {
 public:
  Walk(const NormShape& shape, const Images& images, int64_t pixel)
      : shape_(shape),
        images_(images),
        b_(pixel / (shape.height * shape.width)),
        h_(pixel / shape.width % shape.height),
        w_(pixel % shape.width),
        at_(b_ * images.batch + h_ * images.row + w_ * images.column) {}

  int64_t image() const { return b_; }

  // Where this pixel's channels begin, in elements; then on to the next one.
  SIMVLM_INLINE int64_t next() {
    const int64_t here = at_;
    at_ += images_.column;
    if (++w_ == shape_.width) {
      w_ = 0;
      if (++h_ == shape_.height) {
        h_ = 0;
        ++b_;
      }
      at_ = b_ * images_.batch + h_ * images_.row;
    }
    return here;
  }

 private:
  const NormShape& shape_;
  const Images& images_;
  int64_t b_, h_, w_, at_;
};

// What every pixel needs of its channel, in whole vectors with zeros after the last channel:
// z = ((x - mean)·gain + bias)·branch scale and dx = gain·(dz - mean_dz - (x - mean)·slope).
struct Channels {
  float *mean, *gain, *bias, *mean_dz, *slope;
};
constexpr int64_t channel_vectors = 5;

float rstd_of(const NormGiven& given, int64_t c) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(given.var[c]) + given.eps));
}

Channels prepare_channels(const NormShape& shape, const NormGiven& given, const float* mean_dz,
                          const float* mean_dz_norm, int64_t width, float* room) {
  const Channels to{room, room + width, room + 2 * width, room + 3 * width, room + 4 * width};
  for (int64_t i = 0; i < channel_vectors * width; ++i) room[i] = 0.0f;
  for (int64_t c = 0; c < shape.channels; ++c) {
    const float rstd = rstd_of(given, c);
    to.mean[c] = given.mean[c];
    to.gain[c] = given.weight[c] * rstd;
    to.bias[c] = given.bias[c];
    if (mean_dz != nullptr) {
      to.mean_dz[c] = mean_dz[c];
      to.slope[c] = mean_dz_norm[c] * rstd;
    }
  }
  return to;
}

// One call: its problem, its chunks, and scratch.
template <class Problem>
struct Run {
  const Problem& problem;
  int64_t pixels, chunk, chunks;
  int64_t width;  // channels rounded up to whole vectors
  Channels channels;
  float* parts;  // [chunks, 2, width]

  explicit Run(const Problem& p)
      : problem(p),
        pixels(pixels_of(p.shape)),
        chunk(chunk_of(p.shape)),
        chunks((pixels + chunk - 1) / chunk),
        width(round_up(p.shape.channels, lanes)),
        channels{},
        parts(nullptr) {}

  int64_t first(int64_t index) const { return index * chunk; }
  int64_t last(int64_t index) const { return least(pixels, (index + 1) * chunk); }
  float* part(int64_t index) const { return parts + index * 2 * width; }
};

template <class Problem>
SIMVLM_INLINE const Run<Problem>& run_of(void* context) {
  return *static_cast<const Run<Problem>*>(context);
}

// Neighbouring pixels, the first of them `pixel`: where each one's channels begin in x, and its branch scale.
template <int Pixels>
struct Group {
  static constexpr int pixels = Pixels;
  int64_t pixel;
  int64_t at[Pixels];
  float scale[Pixels];

  SIMVLM_INLINE Group(int64_t first, Walk& walk, const float* scales) : pixel(first) {
    for (int i = 0; i < Pixels; ++i) {
      scale[i] = scales == nullptr ? 1.0f : scales[walk.image()];
      at[i] = walk.next();
    }
  }
};

// step(Group) for all pixels of a chunk, in order; what is left of it goes pixel by pixel. `scales`: branch scales.
template <class Problem, class Step>
SIMVLM_INLINE void over_groups(const Run<Problem>& run, int64_t index, const float* scales, Step step) {
  const int64_t last = run.last(index);
  int64_t pixel = run.first(index);
  Walk walk(run.problem.shape, run.problem.x, pixel);
  for (; pixel + group_pixels <= last; pixel += group_pixels) step(Group<group_pixels>(pixel, walk, scales));
  for (; pixel < last; ++pixel) step(Group<1>(pixel, walk, scales));
}

// The same pixel by pixel: what sums nothing reads and writes rows best in the order in which they lie.
template <class Problem, class Step>
SIMVLM_INLINE void over_pixels(const Run<Problem>& run, int64_t index, const float* scales, Step step) {
  const int64_t last = run.last(index);
  int64_t pixel = run.first(index);
  Walk walk(run.problem.shape, run.problem.x, pixel);
  for (; pixel < last; ++pixel) step(Group<1>(pixel, walk, scales));
}

template <class Problem>
void clear_part(const Run<Problem>& run, int64_t index) {
  for (int64_t c = 0; c < 2 * run.width; c += lanes) store(run.part(index) + c, vfloat{});
}

// ---- statistics -----------------------------------------------------------------------------------------------------

template <class Float>
void statistics_chunk(void* context, int64_t index) {
  const auto& run = run_of<NormStatistics>(context);
  const auto* x = static_cast<const typename Float::Storage*>(run.problem.x.data);
  float* means = run.part(index);
  float* spreads = means + run.width;
  clear_part(run, index);
  over_groups(run, index, nullptr, [&](auto group) {
    constexpr int pixels = decltype(group)::pixels;
    const float before = static_cast<float>(group.pixel - run.first(index));
    const float share = pixels / (before + pixels), between = before * share;
    over_vectors<Float>(run.problem.shape.channels, [&](int64_t c, auto part) {
      vfloat row[pixels], mean = {}, spread = {};
      for (int i = 0; i < pixels; ++i) row[i] = part.widen(x + group.at[i] + c);
      for (int i = 0; i < pixels; ++i) mean += row[i];
      mean *= 1.0f / pixels;
      for (int i = 0; i < pixels; ++i) spread += (row[i] - mean) * (row[i] - mean);
      const vfloat delta = mean - load(means + c);
      store(means + c, load(means + c) + delta * share);
      store(spreads + c, load(spreads + c) + (spread + delta * delta * between));
    });
  });
}

// The parts of `merged_channels` channels, in order.
void merge_statistics(void* context, int64_t block) {
  const auto& run = run_of<NormStatistics>(context);
  const int64_t first = block * merged_channels, count = least(merged_channels, run.problem.shape.channels - first);
  double mean[merged_channels] = {}, spread[merged_channels] = {};
  for (int64_t index = 0; index < run.chunks; ++index) {
    const float* means = run.part(index) + first;
    const float* spreads = means + run.width;
    const double before = static_cast<double>(run.first(index));
    const double here = static_cast<double>(run.last(index) - run.first(index));
    const double share = here / (before + here), between = before * share;
    for (int64_t c = 0; c < count; ++c) {
      const double delta = means[c] - mean[c];
      mean[c] += delta * share;
      spread[c] += spreads[c] + delta * delta * between;
    }
  }
  const double pixels = static_cast<double>(most(run.pixels, 1));
  for (int64_t c = 0; c < count; ++c) {
    run.problem.mean[first + c] = static_cast<float>(mean[c]);
    run.problem.var[first + c] = static_cast<float>(spread[c] / pixels);
  }
}

// ---- apply ----------------------------------------------------------------------------------------------------------

template <class Float, bool Residual>
void apply_chunk(void* context, int64_t index) {
  typedef typename Float::Storage Storage;
  const auto& run = run_of<NormApply>(context);
  const NormApply& a = run.problem;
  const int64_t channels = a.shape.channels;
  const auto* x = static_cast<const Storage*>(a.x.data);
  const auto* residual = static_cast<const Storage*>(a.residual.data);
  auto* y = static_cast<Storage*>(a.y);
  const vfloat lowest = splat(a.given.relu ? 0.0f : -infinity);
  Walk residual_walk(a.shape, a.residual, run.first(index));
  over_pixels(run, index, a.given.branch_scale, [&](auto group) {
    constexpr int pixels = decltype(group)::pixels;
    int64_t residual_at[pixels];
    if constexpr (Residual) {
      for (int i = 0; i < pixels; ++i) residual_at[i] = residual_walk.next();
    }
    over_vectors<Float>(channels, [&](int64_t c, auto part) {
      const vfloat mean = load(run.channels.mean + c), gain = load(run.channels.gain + c);
      const vfloat bias = load(run.channels.bias + c);
      for (int i = 0; i < pixels; ++i) {
        vfloat z = ((part.widen(x + group.at[i] + c) - mean) * gain + bias) * group.scale[i];
        if constexpr (Residual) z += part.widen(residual + residual_at[i] + c);
        part.narrow(y + (group.pixel + i) * channels + c, max(lowest, z));  // in this order NaN stays NaN
      }
    });
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Where relu's mask comes from.
enum class Mask { none, x, y };

template <class Float, Mask From>
void reductions_chunk(void* context, int64_t index) {
  typedef typename Float::Storage Storage;
  const auto& run = run_of<NormBackwardReductions>(context);
  const NormBackwardReductions& a = run.problem;
  const int64_t channels = a.shape.channels;
  const auto* x = static_cast<const Storage*>(a.x.data);
  const auto* dy = static_cast<const Storage*>(a.dy);
  const auto* y = static_cast<const Storage*>(a.y);
  auto* dresidual = static_cast<Storage*>(a.dresidual);
  float* sums_dz = run.part(index);
  float* sums_dz_x = sums_dz + run.width;
  clear_part(run, index);
  over_groups(run, index, a.given.branch_scale, [&](auto group) {
    over_vectors<Float>(channels, [&](int64_t c, auto part) {
      const vfloat mean = load(run.channels.mean + c), gain = load(run.channels.gain + c);
      const vfloat bias = load(run.channels.bias + c);
      vfloat sum_dz = {}, sum_dz_x = {};
      for (int i = 0; i < group.pixels; ++i) {
        const int64_t here = (group.pixel + i) * channels + c;
        const vfloat centred = part.widen(x + group.at[i] + c) - mean;
        vfloat dz = part.widen(dy + here);
        if constexpr (From == Mask::x) dz = (centred * gain + bias) * group.scale[i] > 0.0f ? dz : vfloat{};
        if constexpr (From == Mask::y) {
          dz = part.widen(y + here) > 0.0f ? dz : vfloat{};
          part.narrow(dresidual + here, dz);
        }
        dz *= group.scale[i];
        sum_dz += dz;
        sum_dz_x += dz * centred;
      }
      store(sums_dz + c, load(sums_dz + c) + sum_dz);
      store(sums_dz_x + c, load(sums_dz_x + c) + sum_dz_x);
    });
  });
}

void merge_reductions(void* context, int64_t block) {
  const auto& run = run_of<NormBackwardReductions>(context);
  const int64_t first = block * merged_channels, count = least(merged_channels, run.problem.shape.channels - first);
  double dz[merged_channels] = {}, dz_x[merged_channels] = {};
  for (int64_t index = 0; index < run.chunks; ++index) {
    const float* part = run.part(index) + first;
    for (int64_t c = 0; c < count; ++c) {
      dz[c] += part[c];
      dz_x[c] += part[run.width + c];
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    run.problem.sum_dz[first + c] = static_cast<float>(dz[c]);
    run.problem.sum_dz_norm[first + c] = static_cast<float>(dz_x[c] * rstd_of(run.problem.given, first + c));
  }
}

template <class Float, bool Relu, bool Constant>
void backward_chunk(void* context, int64_t index) {
  typedef typename Float::Storage Storage;
  const auto& run = run_of<NormBackwardApply>(context);
  const NormBackwardApply& a = run.problem;
  const int64_t channels = a.shape.channels;
  const auto* x = static_cast<const Storage*>(a.x.data);
  const auto* dy = static_cast<const Storage*>(a.dy);
  auto* dx = static_cast<Storage*>(a.dx);
  over_pixels(run, index, a.given.branch_scale, [&](auto group) {
    over_vectors<Float>(channels, [&](int64_t c, auto part) {
      const vfloat mean = load(run.channels.mean + c), gain = load(run.channels.gain + c);
      const vfloat bias = load(run.channels.bias + c), mean_dz = load(run.channels.mean_dz + c);
      const vfloat slope = load(run.channels.slope + c);
      for (int i = 0; i < group.pixels; ++i) {
        const int64_t here = (group.pixel + i) * channels + c;
        vfloat dz = part.widen(dy + here), centred = {};
        if constexpr (Relu || !Constant) centred = part.widen(x + group.at[i] + c) - mean;
        if constexpr (Relu) dz = (centred * gain + bias) * group.scale[i] > 0.0f ? dz : vfloat{};
        dz *= group.scale[i];
        if constexpr (!Constant) dz = dz - mean_dz - centred * slope;
        part.narrow(dx + here, dz * gain);
      }
    });
  });
}

// ---- one task function for the dtype, the activation, the statistics ----

template <class Float>
Task reductions_task(const NormBackwardReductions& a) {
  if (!a.given.relu) return reductions_chunk<Float, Mask::none>;
  return a.y == nullptr ? reductions_chunk<Float, Mask::x> : reductions_chunk<Float, Mask::y>;
}

template <class Float>
Task backward_task(const NormBackwardApply& a) {
  if (a.mean_dz == nullptr)
    return a.given.relu ? backward_chunk<Float, true, true> : backward_chunk<Float, false, true>;
  return a.given.relu ? backward_chunk<Float, true, false> : backward_chunk<Float, false, false>;
}

template <class Problem>
void run_merge(const Run<Problem>& run, Task merge) {
  const int64_t channels = run.problem.shape.channels;
  const int threads = threads_for(run.problem.shape.threads, run.chunks * channels);
  parallel_for((channels + merged_channels - 1) / merged_channels, threads, merge, const_cast<Run<Problem>*>(&run));
}

}  // namespace

bool norm_statistics(const NormStatistics& a) {
  Run<NormStatistics> run(a);
  run.parts = thread_scratch(run.chunks * 2 * run.width);
  if (run.parts == nullptr) return false;
  const Task task = of_dtype(a.shape.dtype, [](auto f) { return statistics_chunk<decltype(f)>; });
  parallel_for(run.chunks, threads_for(a.shape), task, &run);
  run_merge(run, merge_statistics);
  return true;
}

bool norm_apply(const NormApply& a) {
  Run<NormApply> run(a);
  float* room = thread_scratch(channel_vectors * run.width);
  if (room == nullptr) return false;
  run.channels = prepare_channels(a.shape, a.given, nullptr, nullptr, run.width, room);
  const Task task = of_dtype(a.shape.dtype, [&](auto f) {
    return a.residual.data == nullptr ? apply_chunk<decltype(f), false> : apply_chunk<decltype(f), true>;
  });
  parallel_for(run.chunks, threads_for(a.shape), task, &run);
  return true;
}

bool norm_backward_reductions(const NormBackwardReductions& a) {
  Run<NormBackwardReductions> run(a);
  float* room = thread_scratch((channel_vectors + 2 * run.chunks) * run.width);
  if (room == nullptr) return false;
  run.channels = prepare_channels(a.shape, a.given, nullptr, nullptr, run.width, room);
  run.parts = room + channel_vectors * run.width;
  const Task task = of_dtype(a.shape.dtype, [&](auto f) { return reductions_task<decltype(f)>(a); });
  parallel_for(run.chunks, threads_for(a.shape), task, &run);
  run_merge(run, merge_reductions);
  return true;
}

bool norm_backward_apply(const NormBackwardApply& a) {
  Run<NormBackwardApply> run(a);
  float* room = thread_scratch(channel_vectors * run.width);
  if (room == nullptr) return false;
  run.channels = prepare_channels(a.shape, a.given, a.mean_dz, a.mean_dz_norm, run.width, room);
  const Task task = of_dtype(a.shape.dtype, [&](auto f) { return backward_task<decltype(f)>(a); });
  parallel_for(run.chunks, threads_for(a.shape), task, &run);
  return true;
}

}  // namespace simvlm::SIMVLM_LEVEL
