// What the row kernels need of a vector unit, for the level this file is compiled for (RPO_LEVEL, see setup.py).
// Arithmetic and comparisons are GCC/Clang vector extensions; only what these cannot say is written per level.
//
// Everything here has internal linkage: a function that two levels shared by name could be linked from the wrong one.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints bits(Floats x) { return (Ints)x; }
inline Floats as_floats(Ints x) { return (Floats)x; }
inline Ints shift_right(Ints x, int count) {  // logical
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  return (Ints)((Words)x >> count);
}
inline Floats select(Ints mask, Floats yes, Floats no) { return as_floats((mask & bits(yes)) | (~mask & bits(no))); }
inline Floats absolute(Floats x) { return as_floats(bits(x) & 0x7fffffff); }

template <class Vector>
inline Vector load(const void* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// ---- per level: maximum (`best` where x is NaN), fused multiply-add, a store past the caches (p aligned)

#if defined(__AVX512F__)
inline Floats maximum(Floats x, Floats best) { return _mm512_max_ps(x, best); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline void stream(void* p, Ints v) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v); }
inline void stream_fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline Floats maximum(Floats x, Floats best) { return _mm256_max_ps(x, best); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline void stream(void* p, Ints v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
inline void stream_fence() { _mm_sfence(); }
#else
inline Floats maximum(Floats x, Floats best) { return select(x > best, x, best); }
#if defined(__ARM_NEON)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
#else
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
inline void stream(void* p, Ints v) { __builtin_memcpy(p, &v, sizeof v); }
inline void stream_fence() {}
#endif

// ---- 2^y: relative error below 1e-7; 0 below y = -126; NaN stays NaN. Minimax polynomials with p(0) = 1.

inline Floats polynomial(Floats x, const float (&c)[6]) {
  Floats p = broadcast(c[5]);
  for (int i = 4; i >= 0; --i) p = multiply_add(p, x, broadcast(c[i]));
  return multiply_add(p, x, broadcast(1.0f));
}

#if defined(__AVX512F__)
inline Floats exp2(Floats y) {
  constexpr float kCoefficients[6] = {0.6931470444f, 0.2402293056f, 0.05548528062f,
                                      0.00967545157f, 0.001246784645f, 0.0002161291495f};  // on [0, 1)
  const Floats fraction = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(fraction, kCoefficients), y);  // scales by 2^floor(y)
}
#else
inline Floats exp2(Floats y) {
  constexpr float kCoefficients[6] = {0.6931472029f, 0.2402264791f, 0.05550332471f,
                                      0.009618437357f, 0.001339887440f, 0.0001535336195f};  // on [-1/2, 1/2]
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's low bits are round(y) + 127
  const Floats lowest = broadcast(-126.0f);
  const Floats clamped = select(y < lowest, lowest, y);
  const Floats shifted = clamped + kRound;
  const Floats power = as_floats(bits(shifted) << 23);
  const Floats result = polynomial(clamped - (shifted - kRound), kCoefficients) * power;
  return as_floats(bits(result) & ~(y < lowest));
}
#endif

// ---- half precision: kLanes words hold 2 * kLanes elements; which of them share a vector is the level's own choice

#if defined(__AVX512F__)
inline void unpack_float16(Ints words, Floats& a, Floats& b) {
  a = _mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)words));
  b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)words, 1));
}
inline Ints pack_float16(Floats a, Floats b) {
  const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  return (Ints)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#elif defined(__AVX2__)
inline void unpack_float16(Ints words, Floats& a, Floats& b) {
  a = _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)words));
  b = _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)words, 1));
}
inline Ints pack_float16(Floats a, Floats b) {
  const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  return (Ints)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
#elif defined(__ARM_NEON)
inline void unpack_float16(Ints words, Floats& a, Floats& b) {
  const float16x8_t halves = vreinterpretq_f16_s32(words);
  a = vcvt_f32_f16(vget_low_f16(halves));
  b = vcvt_f32_f16(vget_high_f16(halves));
}
inline Ints pack_float16(Floats a, Floats b) {
  return vreinterpretq_s32_f16(vcombine_f16(vcvt_f16_f32(a), vcvt_f16_f32(b)));
}
#else
inline Floats float16_to_float(Ints half) {
  const Ints magnitude = (half & 0x7fff) << 13;
  const Floats finite = as_floats(magnitude) * 0x1p112f;  // rebiases the exponent, subnormals included
  const Ints special = (half & 0x7c00) == 0x7c00;         // infinity and NaN
  const Ints result = (special & (magnitude | 0x7f800000)) | (~special & bits(finite));
  return as_floats(result | (half & 0x8000) << 16);
}
inline Ints float_to_float16(Floats x) {
  const Ints sign = shift_right(bits(x), 16) & 0x8000, magnitude = bits(x) & 0x7fffffff;
  const Ints even = shift_right(magnitude, 13) & 1;  // round to nearest, ties to even
  const Ints normal = shift_right(magnitude - 0x38000000 + 0xfff + even, 13);
  const Ints subnormal = bits(as_floats(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds to multiples of 2^-24
  const Ints small = magnitude < 0x38800000, large = magnitude >= 0x47800000, nan = magnitude > 0x7f800000;
  Ints result = (small & subnormal) | (~small & normal);
  result = (large & 0x7c00) | (~large & result);
  return sign | result | (nan & 0x200);
}
inline void unpack_float16(Ints words, Floats& a, Floats& b) {
  a = float16_to_float(words & 0xffff);
  b = float16_to_float(shift_right(words, 16));
}
inline Ints pack_float16(Floats a, Floats b) { return float_to_float16(a) | float_to_float16(b) << 16; }
#endif

inline void unpack_bfloat16(Ints words, Floats& a, Floats& b) {
  a = as_floats(words << 16);
  b = as_floats(words & int32_t(0xffff0000));
}
// Rounds to nearest, ties to even. A NaN stays one if its low half is 0, as it is in a bfloat16 and in `quiet_nan`.
inline Ints pack_bfloat16(Floats a, Floats b) {
  const Ints even = shift_right(bits(a), 16) & 1, odd = shift_right(bits(b), 16) & 1;
  const Ints low = bits(a) + 0x7fff + even, high = bits(b) + 0x7fff + odd;
  return shift_right(low, 16) | (high & int32_t(0xffff0000));
}

}  // namespace
