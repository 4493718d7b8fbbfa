// Loads and stores of a step of kStep columns as `Floats`, for each element type.
#pragma once

#include <cstddef>

#include "simd.h"

namespace {

constexpr int kPrefetch = 4096;    // bytes ahead
constexpr int kStep = 2 * kLanes;  // columns

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- kStep columns as float, in the order of the columns or, if `kInterleaved<T>`, all even ones first

template <class V>
RPO_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RPO_INLINE Floats load_step(const float* x) { return {load<Vector>(x), load<Vector>(x + kLanes)}; }
RPO_INLINE Floats load_step(const BFloat16* x) { return unpack_bfloat16(load<IntVector>(x)); }
RPO_INLINE Floats load_step(const Float16* x) { return unpack_float16(load<IntVector>(x)); }

template <class T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<BFloat16> = true;
template <>
constexpr bool kInterleaved<Float16> = kFloat16Interleaved;

template <bool kStream>
RPO_INLINE void store(void* p, IntVector v) {
  if (kStream)
    stream(p, v);
  else
    __builtin_memcpy(p, &v, sizeof v);
}
template <bool kStream>
RPO_INLINE void store_step(float* p, Floats x) {
  store<kStream>(p, (IntVector)x.a);
  store<kStream>(p + kLanes, (IntVector)x.b);
}
template <bool kStream>
RPO_INLINE void store_step(BFloat16* p, Floats x) {
  store<kStream>(p, pack_bfloat16(x));
}
template <bool kStream>
RPO_INLINE void store_step(Float16* p, Floats x) {
  store<kStream>(p, pack_float16(x));
}

// Permutes from the order of one type to that of another.
template <class From, class To>
RPO_INLINE Floats reorder(Floats x) {
  if (kInterleaved<From> == kInterleaved<To>) return x;
  return kInterleaved<To> ? interleaved(x) : sequential(x);
}

RPO_INLINE void prefetch(const void* p) { __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(p) + kPrefetch)); }

// The last, incomplete step of a run: padded, with the columns that count marked by a positive number.
template <class T>
struct Tail {
  T x[kStep] = {}, counts[kStep] = {};

  Tail(const T* row, int64_t columns) {
    __builtin_memcpy(x, row, size_t(columns) * sizeof(T));
    __builtin_memset(counts, 0x3c, size_t(columns) * sizeof(T));  // positive in every type
  }
};

}  // namespace
