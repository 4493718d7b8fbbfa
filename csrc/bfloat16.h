// Products of bfloat16 with float results: the instruction vdpbf16ps, or its emulation in AVX-512 (RPO_EMULATED), which
// is slow and gives the same bits, so that CPUs without the instruction can run the tests.
//
// vdpbf16ps is two fused multiply-adds: the odd product first, then the even one, each sum rounded to nearest even.
// Denormal operands, addends and sums count as 0, whatever the rounding mode and flags of the thread.
#pragma once

#include "simd.h"

#define RPO_UNROLL _Pragma("GCC unroll 64")  // or accumulators go to memory

namespace {

#if defined(RPO_EMULATED)

// Makes this thread's float arithmetic flush denormals as the instruction does.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

RPO_INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  sum = _mm512_fmadd_ps((__m512)_mm512_and_si512(a, high), (__m512)_mm512_and_si512(b, high), sum);
  return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16), sum);
}

// 32 bfloat16: those of `low` first. Denormals become 0, a NaN stays one.
RPO_INLINE __m512i pack(__m512 low, __m512 high) {
  const FlushDenormals flush;
  __m256i half[2];
  const __m512 parts[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
    const __m512i bits = (__m512i)_mm512_mul_ps(parts[i], _mm512_set1_ps(1.0f));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(parts[i], parts[i], _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    half[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

#else

struct FlushDenormals {
  ~FlushDenormals() {}
};

RPO_INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
RPO_INLINE __m512i pack(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

#endif

// The even elements of 32 bfloat16, and the odd ones.
RPO_INLINE __m512 even_floats(__m512i x) { return (__m512)_mm512_slli_epi32(x, 16); }
RPO_INLINE __m512 odd_floats(__m512i x) { return (__m512)_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))); }

// Takes element i of two vectors, one behind the other, for i = 0 ... 15.
RPO_INLINE __m512i pair_order() {
  return _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009,
                          0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002,
                          0x00210001, 0x00200000);
}

// 32 bfloat16 of two rows as pairs (a[i], b[i]): those of the first 16 elements, and of the others.
RPO_INLINE void interleave(__m512i a, __m512i b, void* first, void* second) {
  const __m512i order = pair_order();
  _mm512_store_si512(first, _mm512_permutex2var_epi16(a, order, b));
  _mm512_store_si512(second, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b));
}

// A 16 x 16 transposition of pairs: row i of `rows` becomes lane i of each of the 16 vectors.
RPO_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  RPO_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  RPO_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  RPO_UNROLL for (int i = 0; i < 16; i += 8) RPO_UNROLL for (int j = 0; j < 4; ++j) {
    t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
    t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
  }
  RPO_UNROLL for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

}  // namespace
