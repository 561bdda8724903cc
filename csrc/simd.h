// Vectors of float for the CPU level that this file is compiled for: the compiler's own vector types, `lanes` wide.
//
// Everything here has internal linkage: one object per level is linked into one module, and the linker must never keep
// a copy that was compiled for a newer processor (tests/test_cpp.py reads the symbol tables).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef SIMVLM_LEVEL
#error "compile with -DSIMVLM_LEVEL=<baseline|avx2|avx512|avx512_bf16>"
#endif

#define SIMVLM_INLINE inline __attribute__((always_inline))

namespace simvlm::SIMVLM_LEVEL {
namespace {

SIMVLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SIMVLM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
SIMVLM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
constexpr int registers = 32;
#elif defined(__AVX2__)
constexpr int64_t lanes = 8;
constexpr int registers = 16;
#elif defined(__aarch64__)
constexpr int64_t lanes = 4;
constexpr int registers = 32;
#else
constexpr int64_t lanes = 4;
constexpr int registers = 16;
#endif

typedef float vfloat __attribute__((vector_size(lanes * 4)));
typedef int32_t vint __attribute__((vector_size(lanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(lanes * 4)));
typedef uint16_t vhalf __attribute__((vector_size(lanes * 2)));

template <class To, class From>
SIMVLM_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
SIMVLM_INLINE V load_as(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

SIMVLM_INLINE vfloat load(const float* from) { return load_as<vfloat>(from); }
SIMVLM_INLINE void store(float* to, vfloat v) { __builtin_memcpy(to, &v, sizeof(v)); }
SIMVLM_INLINE vfloat splat(float x) { return x - vfloat{}; }
SIMVLM_INLINE vint splat_int(int64_t x) { return vint{} + static_cast<int32_t>(x); }
SIMVLM_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

// Index of each lane: 0, 1, 2, …
SIMVLM_INLINE vint lane_index() {
  vint v;
  for (int64_t i = 0; i < lanes; ++i) v[i] = static_cast<int32_t>(i);
  return v;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> To;
};

// Swaps the blocks of `Step` lanes off the diagonal of each 2·Step × 2·Step square that two rows make.
template <int Step, int... I>
SIMVLM_INLINE void swap_blocks(vfloat& a, vfloat& b, Indices<I...>) {
  const vfloat low = __builtin_shufflevector(a, b, ((I & Step) ? static_cast<int>(lanes) + I - Step : I)...);
  b = __builtin_shufflevector(a, b, ((I & Step) ? static_cast<int>(lanes) + I : I + Step)...);
  a = low;
}

template <int Step>
SIMVLM_INLINE void transpose_by(vfloat* x) {
  if constexpr (Step > 0) {
    for (int i = 0; i < lanes; ++i) {
      if ((i & Step) == 0) swap_blocks<Step>(x[i], x[i + Step], typename Count<lanes>::To{});
    }
    transpose_by<Step / 2>(x);
  }
}

// x[i][j] and x[j][i] change places.
SIMVLM_INLINE void transpose(vfloat (&x)[lanes]) { transpose_by<lanes / 2>(x); }

// Lane i: the sum of x[i].
template <int Step = lanes / 2>
SIMVLM_INLINE vfloat sums_of(vfloat* x) {
  for (int i = 0; i < Step; ++i) {
    swap_blocks<Step>(x[i], x[i + Step], typename Count<lanes>::To{});
    x[i] += x[i + Step];
  }
  if constexpr (Step > 1) return sums_of<Step / 2>(x);
  return x[0];
}

// Each lane and the one `Step` lanes on, and so on: a sum in a fixed order.
template <int Step, int... I>
SIMVLM_INLINE vfloat rotate(vfloat v, Indices<I...>) {
  return __builtin_shufflevector(v, v, ((I + Step) % static_cast<int>(lanes))...);
}

template <int Step = lanes / 2>
SIMVLM_INLINE float reduce_add(vfloat v) {
  v += rotate<Step>(v, typename Count<lanes>::To{});
  if constexpr (Step > 1) return reduce_add<Step / 2>(v);
  return v[0];
}

template <int Step = lanes / 2>
SIMVLM_INLINE float reduce_max(vfloat v) {
  v = max(v, rotate<Step>(v, typename Count<lanes>::To{}));
  if constexpr (Step > 1) return reduce_max<Step / 2>(v);
  return v[0];
}

// 2^x for x <= 0 (or a rounding above): relative error below 2^-22 (tests/test_cpp.py), exactly 0 below -126, NaN for
// NaN.
#if defined(__AVX512F__)
// x = n + i/16 + r with |r| <= 1/32: 1.5·2^19 rounds x to sixteenths, which leaves 16·n + i in the low bits. 2^(i/16)
// is looked up less i·2^19, so that those bits shifted by 19 add n to the exponent and i's share back; 2^r is a cubic,
// its error spread over Chebyshev's nodes.
SIMVLM_INLINE vfloat exp2_nonpositive(vfloat x) {
  const vuint powers = {0x3f800000u, 0x3f7daac3u, 0x3f7b95c2u, 0x3f79c3d3u, 0x3f7837f0u, 0x3f76f532u,
                        0x3f75fed7u, 0x3f75583fu, 0x3f7504f3u, 0x3f7508a4u, 0x3f75672au, 0x3f76248cu,
                        0x3f7744fdu, 0x3f78ccdfu, 0x3f7ac0c7u, 0x3f7d257du};
  const vfloat shift = splat(786432.0f);
  const vfloat t = x + shift;
  const vfloat r = x - (t - shift);
  vfloat p = splat(0.0555050857f);
  p = p * r + 0.240233555f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  const vuint power = bits<vuint>(_mm512_permutexvar_epi32(bits<__m512i>(t), bits<__m512i>(powers)));
  const vfloat value = p * bits<vfloat>(power + (bits<vuint>(t) << 19));
  return x < -126.0f ? vfloat{} : value;
}
#else
// x = n + r with |r| <= 1/2; 2^r by a polynomial of degree 6 with its error spread over Chebyshev's nodes; 2^n by the
// exponent: 1.5·2^23 + 127 rounds x + 127 to an integer in the low bits, and the shift throws the others out.
SIMVLM_INLINE vfloat exp2_nonpositive(vfloat x) {
  const vfloat shift = splat(12583039.0f);
  const vfloat t = x + shift;
  const vfloat r = x - (t - shift);
  vfloat p = splat(0.000154531634f);
  p = p * r + 0.00133908633f;
  p = p * r + 0.00961808302f;
  p = p * r + 0.0555035695f;
  p = p * r + 0.240226507f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  const vfloat value = p * bits<vfloat>(bits<vuint>(t) << 23);
  return x < -126.0f ? vfloat{} : value;
}
#endif

SIMVLM_INLINE vuint widen_halves(vhalf v) {
#if defined(__AVX512F__)
  return bits<vuint>(_mm512_cvtepu16_epi32(bits<__m256i>(v)));  // gcc 12 makes five instructions of the line below
#else
  return __builtin_convertvector(v, vuint);
#endif
}

// 16-bit floats cross the door as integers; they become float32 at the load and are rounded to nearest even once, at
// the store.
struct Float32 {
  typedef float Storage;
  static SIMVLM_INLINE vfloat widen(const Storage* from) { return load_as<vfloat>(from); }
  static SIMVLM_INLINE void narrow(Storage* to, vfloat v) { __builtin_memcpy(to, &v, sizeof(v)); }
};

struct BFloat16 {
  typedef uint16_t Storage;
  static SIMVLM_INLINE vfloat widen(const Storage* from) {
    return bits<vfloat>(widen_halves(load_as<vhalf>(from)) << 16);
  }
  static SIMVLM_INLINE void narrow(Storage* to, vfloat v) {
    vuint u = bits<vuint>(v);
    vuint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vuint quiet = (u >> 16) | 0x40u;  // rounding a NaN's mantissa up could make it an infinity
    vhalf half = __builtin_convertvector((v == v) ? rounded : quiet, vhalf);
    __builtin_memcpy(to, &half, sizeof(half));
  }
};

struct Float16 {
  typedef uint16_t Storage;
#if defined(__AVX512F__)
  static SIMVLM_INLINE vfloat widen(const Storage* from) {
    return bits<vfloat>(_mm512_cvtph_ps(load_as<__m256i>(from)));
  }
  static SIMVLM_INLINE void narrow(Storage* to, vfloat v) {
    __m256i half = _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(to, &half, sizeof(half));
  }
#elif defined(__F16C__)
  static SIMVLM_INLINE vfloat widen(const Storage* from) {
    return bits<vfloat>(_mm256_cvtph_ps(load_as<__m128i>(from)));
  }
  static SIMVLM_INLINE void narrow(Storage* to, vfloat v) {
    __m128i half = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(to, &half, sizeof(half));
  }
#else
  static SIMVLM_INLINE vfloat widen(const Storage* from) {
    vuint h = __builtin_convertvector(load_as<vhalf>(from), vuint);
    vuint sign = (h & 0x8000u) << 16;
    vuint magnitude = (h & 0x7fffu) << 13;
    // A product by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals right; then infinities and NaN.
    vuint scaled = bits<vuint>(bits<vfloat>(magnitude) * 5.192296858534828e33f);
    scaled = (h & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : scaled;
    return bits<vfloat>(scaled | sign);
  }
  static SIMVLM_INLINE void narrow(Storage* to, vfloat v) {
    vuint u = bits<vuint>(v);
    vuint sign = (u >> 16) & 0x8000u;
    vuint magnitude = u & 0x7fffffffu;
    vuint normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormals: adding 0.5 lines the mantissa up with half's smallest step and rounds to nearest even.
    vuint subnormal = bits<vuint>(bits<vfloat>(magnitude) + 0.5f) - 0x3f000000u;
    vuint half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? vuint{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? vuint{} + 0x7e00u : half;
    vhalf out = __builtin_convertvector(half | sign, vhalf);
    __builtin_memcpy(to, &out, sizeof(out));
  }
#endif
};

// The first `count` < lanes elements of a vector, zeros after them: nothing beyond them is touched. A copy whose length
// only the run knows costs more than what is done with the vector, so masks do it where there are any.
template <class Storage>
SIMVLM_INLINE void load_part(Storage (&part)[lanes], const Storage* from, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Storage) == 4) {
    _mm512_storeu_si512(part, _mm512_maskz_loadu_epi32(mask, from));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(part), _mm256_maskz_loadu_epi16(mask, from));
  }
#else
  for (Storage& element : part) element = 0;
  __builtin_memcpy(part, from, sizeof(Storage) * static_cast<size_t>(count));
#endif
}

template <class Storage>
SIMVLM_INLINE void store_part(Storage* to, const Storage (&part)[lanes], int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(Storage) == 4) {
    _mm512_mask_storeu_epi32(to, mask, load_as<__m512i>(part));
  } else {
    _mm256_mask_storeu_epi16(to, mask, load_as<__m256i>(part));
  }
#else
  __builtin_memcpy(to, part, sizeof(Storage) * static_cast<size_t>(count));
#endif
}

template <class Float>
SIMVLM_INLINE vfloat widen_part(const typename Float::Storage* from, int64_t count) {
  typename Float::Storage part[lanes];
  load_part(part, from, count);
  return Float::widen(part);
}

template <class Float>
SIMVLM_INLINE void narrow_part(typename Float::Storage* to, vfloat v, int64_t count) {
  typename Float::Storage part[lanes];
  Float::narrow(part, v);
  store_part(to, part, count);
}

template <class Float>
struct Whole {
  SIMVLM_INLINE vfloat widen(const typename Float::Storage* from) const { return Float::widen(from); }
  SIMVLM_INLINE void narrow(typename Float::Storage* to, vfloat v) const { Float::narrow(to, v); }
};

template <class Float>
struct Part {
  int64_t count;
  SIMVLM_INLINE vfloat widen(const typename Float::Storage* from) const { return widen_part<Float>(from, count); }
  SIMVLM_INLINE void narrow(typename Float::Storage* to, vfloat v) const { narrow_part<Float>(to, v, count); }
};

// step(where it begins, Whole or Part) for every vector of a row of `count` elements.
template <class Float, class Step>
SIMVLM_INLINE void over_vectors(int64_t count, Step step) {
  int64_t at = 0;
  for (; at + lanes <= count; at += lanes) step(at, Whole<Float>{});
  if (at < count) step(at, Part<Float>{count - at});
}

// Threads for a pass over so many elements: waking another one costs as much as 65536 of them.
SIMVLM_INLINE int threads_for(int threads, int64_t elements) {
  return static_cast<int>(least(threads, 1 + elements / 65536));
}

// A function for parallel_for.
typedef void (*Task)(void* context, int64_t index);

// choose(Float{}) for the dtype's Float: what it does, or the function that it names.
template <class Choose>
SIMVLM_INLINE auto of_dtype(DType dtype, Choose choose) {
  return dtype == DType::float32    ? choose(Float32{})
         : dtype == DType::bfloat16 ? choose(BFloat16{})
                                    : choose(Float16{});
}

}  // namespace
}  // namespace simvlm::SIMVLM_LEVEL
