// A strip of logits, 14 columns x 32 rows, and its weights 2^(z - reference); each lane holds one row.
#pragma once

#include "head.h"
#include "product.h"

namespace {

constexpr double kLog2e = 1.44269504088896341;
constexpr float kMargin = 10.0f;  // bits that a logit may lie above its row's reference

struct Strip {
  alignas(64) float x[kStrip][kPanel];      // logits, then weights
  alignas(64) int32_t live[kStrip][kPanel];  // with `masked`: 0 for labels and beyond the last column, else -1
  alignas(64) float at_label[kPanel];        // with `masked`, of rows whose label is here: its logit
  bool masked;
  int64_t columns;
};

RPO_INLINE Floats load(const float* x) { return {(Vector)_mm512_load_ps(x), (Vector)_mm512_load_ps(x + 16)}; }
RPO_INLINE void store(float* x, Floats v) {
  _mm512_store_ps(x, (__m512)v.a);
  _mm512_store_ps(x + 16, (__m512)v.b);
}
RPO_INLINE Ints load(const int32_t* x) {
  return {(IntVector)_mm512_load_si512(x), (IntVector)_mm512_load_si512(x + 16)};
}
// x > y in any lane, or NaN.
RPO_INLINE bool any_exceeds(Floats x, Floats y) {
  return (_mm512_cmp_ps_mask((__m512)x.a, (__m512)y.a, _CMP_NLE_UQ) |
          _mm512_cmp_ps_mask((__m512)x.b, (__m512)y.b, _CMP_NLE_UQ)) != 0;
}

// ---- transforms: z in bits above the reference (`absolute_bits`: above 0, given the former), and dz/dx over its value
// at x = 0

struct Scaled {
  Floats slope;
  explicit Scaled(const rpo::TokenTransform& options)
      : slope(float(options.logit_scale / options.temperature * kLog2e)) {}
  RPO_INLINE Floats bits(Floats x, Floats reference) const { return multiply_add(x, slope, -reference); }
  RPO_INLINE Floats bits(Floats x, Floats reference, Floats& steepness) const {
    steepness = 1.0f;
    return bits(x, reference);
  }
  RPO_INLINE Floats absolute_bits(Floats x, Floats, Floats) const { return x * slope; }
};

// tanh w for |w| < 0.55 by a polynomial, else as +-(1 - q), q = 1 - tanh|w| (as in rows.cpp, with a reference a lane).
struct SoftCapped {
  Floats slope, cap;
  explicit SoftCapped(const rpo::TokenTransform& options)
      : slope(float(options.logit_scale / options.softcap)),
        cap(float(options.softcap / options.temperature * kLog2e)) {}
  RPO_INLINE Floats bits(Floats x, Floats reference, Floats& steepness) const {
    constexpr float c[] = {-0.3333331805f, 0.1333260169f, -0.05385385802f, 0.02107775856f, -0.006282473521f};
    const Floats w = x * slope, e = exp2(absolute(w) * float(-2 * kLog2e)), q = (e + e) / (e + 1.0f);
    const Floats square = w * w, by_polynomial = multiply_add(polynomial(square, c) * square, w, w);
    const Ints is_small = 0.55f > absolute(w), is_positive = w > 0.0f;
    const Floats value = select(is_small, by_polynomial, select(is_positive, -q, q));
    const Floats rest = select(is_positive, cap - reference, -cap - reference);
    steepness = q * (2.0f - q);  // 1 - tanh^2
    return multiply_add(value, cap, select(is_small, -reference, rest));
  }
  RPO_INLINE Floats bits(Floats x, Floats reference) const {
    Floats steepness;
    return bits(x, reference, steepness);
  }
  RPO_INLINE Floats absolute_bits(Floats, Floats bits, Floats reference) const { return bits + reference; }
};

// ---- the strip

// Fills the strip with the sums of a product as logits, and masks labels and columns beyond the last.
RPO_INLINE void fill(Strip& strip, const Sums& sums, const float* bias, int64_t columns, const int32_t* labels,
                     int64_t first_column) {
  store(sums, strip.x[0]);
  if (bias)
    for (int64_t r = 0; r < columns; ++r) store(strip.x[r], load(strip.x[r]) + bias[r]);
  const __m512i count = _mm512_set1_epi32(int(columns)), first = _mm512_set1_epi32(int(first_column));
  const __m512i a = _mm512_sub_epi32(_mm512_load_si512(labels), first);
  const __m512i b = _mm512_sub_epi32(_mm512_load_si512(labels + 16), first);
  strip.columns = columns;
  strip.masked =
      columns < kStrip || (_mm512_cmplt_epu32_mask(a, count) | _mm512_cmplt_epu32_mask(b, count)) != 0;
  if (__builtin_expect(!strip.masked, 1)) return;
  for (int64_t r = 0; r < kStrip; ++r)
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const bool is_live = r < columns && int64_t(labels[lane]) - first_column != r;
      strip.live[r][lane] = is_live ? -1 : 0;
      if (!is_live && r < columns) strip.at_label[lane] = strip.x[r][lane];
      if (!is_live) strip.x[r][lane] = -__builtin_inff();
    }
}

// Largest logit of each row.
RPO_INLINE Floats top_of(const Strip& strip) {
  Floats top = load(strip.x[0]);
  RPO_UNROLL for (int r = 1; r < kStrip; ++r) top = maximum(load(strip.x[r]), top);
  return top;
}

// Writes the strip as bfloat16, unless null: a row of 32 for each column to `grad_logits`, pairs of columns to `pairs`.
template <bool kStream>
RPO_INLINE void write(const Strip& strip, uint32_t* grad_logits, uint32_t* pairs) {
  const auto put = [](uint32_t* to, __m512i x) __attribute__((always_inline)) {
    if (kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x);
    else _mm512_store_si512(to, x);
  };
  RPO_UNROLL for (int r = 0; r < kStrip; r += 2) {
    const Floats x = load(strip.x[r]), y = load(strip.x[r + 1]);
    const __m512i even = pack((__m512)x.a, (__m512)x.b), odd = pack((__m512)y.a, (__m512)y.b);
    if (grad_logits) {
      put(grad_logits + r * kPiece, even);
      put(grad_logits + (r + 1) * kPiece, odd);
    }
    if (pairs) interleave(even, odd, pairs + r / 2 * kPanel, pairs + r / 2 * kPanel + 16);
  }
}

// Multiplies pairs of bfloat16 by a power of two.
RPO_INLINE __m512i scaled(__m512i x, __m512 even, __m512 odd) {
  const __m512 low = _mm512_mul_ps(even_floats(x), even), high = _mm512_mul_ps(odd_floats(x), odd);
  return _mm512_or_si512(_mm512_srli_epi32((__m512i)low, 16),
                         _mm512_and_si512((__m512i)high, _mm512_set1_epi32(int(0xffff0000))));
}

}  // namespace
