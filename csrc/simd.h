// Vector operations of the row kernels, for the instruction set that this file is compiled for (RPO_ISA, setup.py).
// Arithmetic and comparisons are GCC/Clang vector extensions; intrinsics are used only for what these lack.
//
// Everything has internal linkage: with external linkage, the linker would merge functions of different instruction
// sets.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define RPO_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr bool kFused = true;  // multiply_add rounds once
#else
constexpr bool kFused = false;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVector __attribute__((vector_size(4 * kLanes)));

// Two vectors processed together: one chain of dependent operations would leave half of the units idle.
struct Ints {
  IntVector a, b;
};
struct Floats {
  Vector a{}, b{};
  Floats() = default;
  Floats(Vector a, Vector b) : a(a), b(b) {}
  Floats(float x) : a(x - Vector{}), b(a) {}  // NOLINT: implicit broadcast
};

RPO_INLINE Floats operator+(Floats x, Floats y) { return {x.a + y.a, x.b + y.b}; }
RPO_INLINE Floats operator-(Floats x, Floats y) { return {x.a - y.a, x.b - y.b}; }
RPO_INLINE Floats operator*(Floats x, Floats y) { return {x.a * y.a, x.b * y.b}; }
RPO_INLINE Floats operator/(Floats x, Floats y) { return {x.a / y.a, x.b / y.b}; }
RPO_INLINE Floats operator-(Floats x) { return {-x.a, -x.b}; }
RPO_INLINE Ints operator>(Floats x, Floats y) { return {x.a > y.a, x.b > y.b}; }
// x > y, and true of NaN.
RPO_INLINE Ints exceeds(Floats x, Floats y) { return {~(x.a <= y.a), ~(x.b <= y.b)}; }
RPO_INLINE Vector masked(IntVector mask, Vector x) { return (Vector)(mask & (IntVector)x); }
RPO_INLINE Floats masked(Ints mask, Floats x) { return {masked(mask.a, x.a), masked(mask.b, x.b)}; }
RPO_INLINE Vector select(IntVector mask, Vector x, Vector y) {
  return (Vector)((mask & (IntVector)x) | (~mask & (IntVector)y));
}
RPO_INLINE Floats select(Ints mask, Floats x, Floats y) { return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)}; }
RPO_INLINE Floats absolute(Floats x) { return masked({0x7fffffff - IntVector{}, 0x7fffffff - IntVector{}}, x); }
RPO_INLINE IntVector shift_right(IntVector x, int count) { return (IntVector)((WordVector)x >> count); }

// ---- per instruction set. maximum(x, y) is x > y ? x : y, so y if either is NaN; stream(p, v) bypasses the caches

#if defined(__AVX512F__)
RPO_INLINE bool any(IntVector mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
RPO_INLINE Vector maximum(Vector x, Vector y) { return _mm512_max_ps(x, y); }
RPO_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
RPO_INLINE void stream(void* p, IntVector v) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v); }
#elif defined(__AVX2__)
RPO_INLINE bool any(IntVector mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
RPO_INLINE Vector maximum(Vector x, Vector y) { return _mm256_max_ps(x, y); }
RPO_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
RPO_INLINE void stream(void* p, IntVector v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
#else
RPO_INLINE bool any(IntVector mask) {
  int64_t halves[2];
  __builtin_memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
}
RPO_INLINE Vector maximum(Vector x, Vector y) { return select(x > y, x, y); }
#if defined(__ARM_NEON)
RPO_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
#else
RPO_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
RPO_INLINE void stream(void* p, IntVector v) { __builtin_memcpy(p, &v, sizeof v); }
#endif
RPO_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

RPO_INLINE bool any(Ints mask) { return any(mask.a | mask.b); }
RPO_INLINE Floats maximum(Floats x, Floats y) { return {maximum(x.a, y.a), maximum(x.b, y.b)}; }
RPO_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return {multiply_add(a.a, b.a, c.a), multiply_add(a.b, b.b, c.b)};
}

// c[0] + c[1] x + c[2] x^2 + ...
template <int kTerms>
RPO_INLINE Floats polynomial(Floats x, const float (&c)[kTerms]) {
  Floats p = c[kTerms - 1];
  for (int i = kTerms - 2; i >= 0; --i) p = multiply_add(p, x, c[i]);
  return p;
}

// ---- 2^y: relative error below 1.7e-7, 0 where the result is not a normal number, NaN for NaN. Minimax polynomials.

#if defined(__AVX512F__)
RPO_INLINE Floats exp2(Floats y) {
  constexpr float c[] = {1.0f,          0.6931513118f,  0.240164450155f,
                         0.0557999131f, 0.00901703032f, 0.00186713007f};  // on [0, 1)
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Floats p = polynomial({_mm512_reduce_ps(y.a, kDown), _mm512_reduce_ps(y.b, kDown)}, c);
  return {_mm512_scalef_ps(p.a, y.a), _mm512_scalef_ps(p.b, y.b)};  // p * 2^floor(y)
}
#else
RPO_INLINE Floats exp2(Floats y) {
  constexpr float c[] = {1.0f,           0.6931469776f,  0.24022242085f,
                         0.05550733743f, 0.00967151267f, 0.00132647272f};  // on [-1/2, 1/2]
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 + 127: the sum's low bits are round(y) + 127
  const Floats clamped = maximum(-127.0f, y), sum = clamped + kRound;
  const Floats power = {(Vector)((IntVector)sum.a << 23), (Vector)((IntVector)sum.b << 23)};
  return polynomial(clamped - (sum - kRound), c) * power;
}
#endif

// ---- half precision: kLanes words hold 2 * kLanes elements, in `Floats` in their order or the even ones first

#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr bool kFloat16Interleaved = false;
#else
constexpr bool kFloat16Interleaved = true;
#endif

#if defined(__AVX512F__)
RPO_INLINE Floats unpack_float16(IntVector words) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)words)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)words, 1))};
}
RPO_INLINE IntVector pack_float16(Floats x) {
  const __m256i low = _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  return (IntVector)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#elif defined(__AVX2__)
RPO_INLINE Floats unpack_float16(IntVector words) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)words)),
          _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)words, 1))};
}
RPO_INLINE IntVector pack_float16(Floats x) {
  const __m128i low = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  return (IntVector)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
#elif defined(__ARM_NEON)
RPO_INLINE Floats unpack_float16(IntVector words) {
  const float16x8_t halves = vreinterpretq_f16_s32(words);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
}
RPO_INLINE IntVector pack_float16(Floats x) {
  return vreinterpretq_s32_f16(vcombine_f16(vcvt_f16_f32(x.a), vcvt_f16_f32(x.b)));
}
#else
RPO_INLINE Vector float16_to_float(IntVector half) {
  const IntVector magnitude = (half & 0x7fff) << 13;
  const Vector finite = (Vector)magnitude * 0x1p112f;        // rebiases the exponent, subnormals included
  const IntVector special = (half & 0x7c00) == 0x7c00;       // infinity and NaN
  const IntVector result = (special & (magnitude | 0x7f800000)) | (~special & (IntVector)finite);
  return (Vector)(result | (half & 0x8000) << 16);
}
RPO_INLINE IntVector float_to_float16(Vector x) {
  const IntVector sign = shift_right((IntVector)x, 16) & 0x8000, magnitude = (IntVector)x & 0x7fffffff;
  const IntVector odd = shift_right(magnitude, 13) & 1;      // round to nearest, ties to even
  const IntVector normal = shift_right(magnitude - 0x38000000 + 0xfff + odd, 13);
  const IntVector subnormal = (IntVector)((Vector)magnitude + 0.5f) - 0x3f000000;  // the sum rounds to 2^-24
  const IntVector small = magnitude < 0x38800000, large = magnitude >= 0x47800000, nan = magnitude > 0x7f800000;
  const IntVector finite = (small & subnormal) | (~small & normal);
  return sign | (large & 0x7c00) | (~large & finite) | (nan & 0x200);
}
RPO_INLINE Floats unpack_float16(IntVector words) {
  return {float16_to_float(words & 0xffff), float16_to_float(shift_right(words, 16))};
}
RPO_INLINE IntVector pack_float16(Floats x) { return float_to_float16(x.a) | float_to_float16(x.b) << 16; }
#endif

RPO_INLINE Floats unpack_bfloat16(IntVector words) {
  return {(Vector)(words << 16), (Vector)(words & int32_t(0xffff0000))};
}

// Rounds to nearest, ties to even. Only a NaN whose low 16 bits are 0 stays a NaN: one from a bfloat16, or quiet_nan's.
RPO_INLINE IntVector pack_bfloat16(Floats x) {
  const IntVector a = (IntVector)x.a, b = (IntVector)x.b;
  const IntVector low = a + (0x7fff + (shift_right(a, 16) & 1)), high = b + (0x7fff + (shift_right(b, 16) & 1));
  return shift_right(low, 16) | (high & int32_t(0xffff0000));
}

// Even elements first, then the odd ones; and the inverse.
#if defined(__AVX512F__)
RPO_INLINE Floats interleaved(Floats x) {
  const IntVector even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return {_mm512_permutex2var_ps(x.a, (__m512i)even, x.b), _mm512_permutex2var_ps(x.a, (__m512i)(even + 1), x.b)};
}
RPO_INLINE Floats sequential(Floats x) {
  const IntVector first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return {_mm512_permutex2var_ps(x.a, (__m512i)first, x.b), _mm512_permutex2var_ps(x.a, (__m512i)(first + 8), x.b)};
}
#else
RPO_INLINE Floats interleaved(Floats x) {
  Floats y;
  for (int i = 0; i < kLanes / 2; ++i) {
    y.a[i] = x.a[2 * i];
    y.b[i] = x.a[2 * i + 1];
    y.a[kLanes / 2 + i] = x.b[2 * i];
    y.b[kLanes / 2 + i] = x.b[2 * i + 1];
  }
  return y;
}
RPO_INLINE Floats sequential(Floats x) {
  Floats y;
  for (int i = 0; i < kLanes / 2; ++i) {
    y.a[2 * i] = x.a[i];
    y.a[2 * i + 1] = x.b[i];
    y.b[2 * i] = x.a[kLanes / 2 + i];
    y.b[2 * i + 1] = x.b[kLanes / 2 + i];
  }
  return y;
}
#endif

}  // namespace
