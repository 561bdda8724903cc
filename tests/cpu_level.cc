// Runs every function of one CPU level, chosen without asking whether this processor has it, on small arrays of each
// dtype, and prints a hash of what each wrote: test_wheel.py runs it here and in qemu.
#include <cstdio>
#include <cstring>
#include <vector>

#include "arch.h"

namespace {

using simvlm::DType;
using Floats = std::vector<float>;

// count values in [-2, 2), the same in every run, as elements of the dtype.
std::vector<uint8_t> values(int64_t count, DType dtype, uint32_t seed) {
  std::vector<uint8_t> bytes(count * 4);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    const float value = static_cast<float>(seed >> 8) / (1 << 22) - 2;
    const _Float16 half = static_cast<_Float16>(value);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t brain = bits >> 16;
    if (dtype == DType::float32) std::memcpy(&bytes[4 * i], &value, 4);
    if (dtype == DType::bfloat16) std::memcpy(&bytes[2 * i], &brain, 2);
    if (dtype == DType::float16) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

Floats floats(int64_t count, uint32_t seed) {
  Floats result(count);
  std::memcpy(result.data(), values(count, DType::float32, seed).data(), count * 4);
  return result;
}

template <class T>
void show(const char* name, const std::vector<T>& written) {
  uint64_t hash = 14695981039346656037u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(written.data());
  for (size_t i = 0; i < written.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

bool attention(const simvlm::Kernels& level, DType dtype, std::vector<int32_t> q_lens, std::vector<int32_t> q_offsets) {
  constexpr int64_t batch = 2, heads = 2, head_dim = 72, rows = 57;
  const std::vector<int32_t> starts = {0, 37}, k_lens = {37, 20}, prefix_lens = {20, 0}, image_lens = {12, 0};
  const simvlm::Bounds bounds = {starts.data(),      q_lens.data(),    starts.data(),    k_lens.data(),
                                 prefix_lens.data(), q_offsets.data(), image_lens.data()};
  const simvlm::AttentionShape shape = {batch, heads, head_dim, false, rows, rows, bounds, 3, 4, 0.125f, dtype, 1};
  const int64_t size = rows * heads * head_dim;
  auto q = values(size, dtype, 1), k = values(size, dtype, 2), v = values(size, dtype, 3),
       dout = values(size, dtype, 4);
  auto out = values(size, dtype, 0), dq = out, dk = out, dv = out;
  const Floats table = floats(heads * table_size(shape), 5), dlse = floats(rows * heads, 6);
  Floats lse(rows * heads), dtable(table.size()), parts(batch * heads * table_chunks(shape) * table_part(shape));
  const auto tensor = [&](std::vector<uint8_t>& x) { return simvlm::Tensor{x.data(), 0, heads * head_dim, head_dim}; };
  if (!level.attention_forward({shape, tensor(q), tensor(k), tensor(v), tensor(out), table.data(), lse.data()}) ||
      !level.attention_backward({shape, tensor(q), tensor(k), tensor(v), tensor(out), tensor(dout), table.data(),
                                 lse.data(), dlse.data(), tensor(dq), tensor(dk), tensor(dv), parts.data(),
                                 dtable.data()})) {
    return false;
  }
  show("out", out), show("lse", lse), show("dq", dq), show("dk", dk), show("dv", dv), show("dtable", dtable);
  return true;
}

bool norm(const simvlm::Kernels& level, DType dtype) {
  constexpr int64_t batch = 2, height = 3, width = 5, channels = 40, size = batch * height * width * channels;
  const simvlm::NormShape shape = {batch, height, width, channels, dtype, 1};
  auto x = values(size, dtype, 1), residual = values(size, dtype, 2), dy = values(size, dtype, 3);
  auto y = values(size, dtype, 0), dresidual = y, dx = y;
  const auto images = [&](std::vector<uint8_t>& of) {
    return simvlm::Images{of.data(), height * width * channels, width * channels, channels};
  };
  const Floats weight = floats(channels, 4), bias = floats(channels, 5);
  Floats mean(channels), var(channels), sum_dz(channels), sum_dz_norm(channels);
  if (!level.norm_statistics({shape, images(x), mean.data(), var.data()})) return false;
  const simvlm::NormGiven given = {mean.data(), var.data(), weight.data(), bias.data(), nullptr, 1e-5, true};
  if (!level.norm_apply({shape, given, images(x), images(residual), y.data()}) ||
      !level.norm_backward_reductions(
          {shape, given, images(x), dy.data(), y.data(), dresidual.data(), sum_dz.data(), sum_dz_norm.data()}) ||
      !level.norm_backward_apply(
          {shape, given, images(x), dresidual.data(), sum_dz.data(), sum_dz_norm.data(), dx.data()})) {
    return false;
  }
  show("mean", mean), show("var", var), show("y", y), show("dresidual", dresidual);
  show("sum_dz", sum_dz), show("sum_dz_norm", sum_dz_norm), show("dx", dx);
  return true;
}

bool embed(const simvlm::Kernels& level, DType dtype) {
  constexpr int64_t batch = 2, patches = 6, texts = 9, width = 40, rows = patches + texts;
  const std::vector<int32_t> starts = {0, 10}, lens = {10, 5}, image_lens = {6, 0}, image = {0, 1},
                             text_starts = {0, 4};
  const simvlm::Places places = {starts.data(), lens.data(), image_lens.data(), image.data(), text_starts.data()};
  const simvlm::EmbedShape shape = {batch, rows, 1, 2, 3, texts, width, places, dtype, 1};
  Floats projected = floats(patches * width, 1), dpatches(patches * width);
  const Floats bias = floats(width, 2), positions = floats(patches * width, 3);
  auto text = values(texts * width, dtype, 4), drows = values(rows * width, dtype, 5);
  auto out = values(rows * width, dtype, 0), dtext = values(texts * width, dtype, 0);
  Floats dbias(width), dpositions(patches * width);
  if (!level.embed_forward({shape,
                            {projected.data(), patches * width, 3 * width, width},
                            true,
                            bias.data(),
                            positions.data(),
                            text.data(),
                            width,
                            out.data()}) ||
      !level.embed_backward(
          {shape, drows.data(), dpatches.data(), true, dbias.data(), dpositions.data(), dtext.data()})) {
    return false;
  }
  show("rows", out), show("dpatches", dpatches), show("dbias", dbias), show("dpositions", dpositions);
  show("dtext", dtext);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  int count = 0;
  const simvlm::Kernels* levels = simvlm::all_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (argc != 2 || std::strcmp(levels[i].level, argv[1]) != 0) continue;
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      if (!attention(levels[i], dtype, {37, 20}, {0, 0}) || !attention(levels[i], dtype, {1, 3}, {36, 17}) ||
          !norm(levels[i], dtype) || !embed(levels[i], dtype)) {
        return 2;
      }
    }
    return 0;
  }
  std::fprintf(stderr, "cpu_level: the argument must be a compiled level\n");
  return 3;
}
