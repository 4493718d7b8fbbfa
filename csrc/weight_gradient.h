// Gradients of weight and bias, from the gradient of the logits of a tile.
#pragma once

#include "blocks.h"
#include "pack.h"
#include "product.h"

namespace {

using rpo::WeightGradient;

// Adds to the sums of a strip what its labels gain: gain * hidden state of each row whose label lies in it.
RPO_INLINE void add_labels(const HeadTile& t, const WeightGradient& g, int64_t strip, int64_t piece,
                           float (&x)[kStrip][kPanel]) {
  const __m512i first = _mm512_set1_epi32(int(strip * kStrip)), count = _mm512_set1_epi32(int(kStrip));
  for (int64_t row = 0; row < t.row_count; row += 16) {
    const __m512i column = _mm512_sub_epi32(_mm512_load_si512(t.labels + row), first);
    for (uint32_t found = _mm512_cmplt_epu32_mask(column, count); found; found &= found - 1) {
      const int64_t i = row + __builtin_ctz(found);
      if (i >= t.row_count) break;
      float* const to = x[t.labels[i] - strip * kStrip];
      const uint16_t* const hidden = row_of(g.hidden, i) + piece * kPanel;
      for (int64_t k = 0; k < smaller(kPanel, t.width - piece * kPanel); ++k) {
        const uint32_t bits = uint32_t(hidden[k]) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        to[k] += g.gain[i] * value;
      }
    }
  }
}

// Writes sums of a strip to their rows of the gradient, up to the last column and element.
RPO_INLINE void write_gradient(const HeadTile& t, const WeightGradient& g, int64_t strip, int64_t piece,
                               const float (&x)[kStrip][kPanel]) {
  const int64_t elements = t.width - piece * kPanel;
  const uint32_t mask = elements >= kPanel ? 0xffffffffu : (1u << elements) - 1;
  const __mmask16 low = __mmask16(mask), high = __mmask16(mask >> 16);
  for (int64_t r = 0; r < smaller(kStrip, t.column_count - strip * kStrip); ++r) {
    const int64_t column = strip * kStrip + r, place = (g.index ? int64_t(g.index[column]) : column) * t.width;
    __m512 a = _mm512_load_ps(x[r]), b = _mm512_load_ps(x[r] + 16);
    if (g.rounded) {
      uint16_t* const out = g.rounded + place + piece * kPanel;
      _mm512_mask_storeu_epi16(out, mask, pack(a, b));
      continue;
    }
    float* const out = g.exact + place + piece * kPanel;
    if (g.add) {
      a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, out));
      b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, out + 16));
    }
    _mm512_mask_storeu_ps(out, low, a);
    _mm512_mask_storeu_ps(out + 16, high, b);
  }
}

void weight_gradient(const Workers& workers, const HeadTile& t, const WeightGradient& g) {
  const Shape shape(t);
  share_out(workers, over(shape.strips, kMaxBlockStrips) * shape.pieces, [&](int64_t item) {
    const int64_t first = item / shape.pieces * kMaxBlockStrips, piece = item % shape.pieces;
    alignas(64) float x[kMaxBlockStrips][kStrip][kPanel];
    for (int64_t panel = 0; panel < shape.panels; panel += kDepth) {
      const uint32_t* const lanes = g.elements + (piece * shape.panels + panel) * kPiece * kPanel;
      for (int64_t strip = first; strip < smaller(first + kMaxBlockStrips, shape.strips); ++strip) {
        Sums sums;
        if (panel) load(sums, x[strip - first][0]);
        else clear(sums);
        add_pieces(sums, grad_logits_of(t, shape, strip, panel), lanes, smaller(kDepth, shape.panels - panel));
        store(sums, x[strip - first][0]);
      }
    }
    for (int64_t strip = first; strip < smaller(first + kMaxBlockStrips, shape.strips); ++strip) {
      add_labels(t, g, strip, piece, x[strip - first]);
      write_gradient(t, g, strip, piece, x[strip - first]);
    }
  });
}

void bias_gradient(const Workers& workers, const HeadTile& t, const float* factor, const int32_t* index, float* out) {
  const Shape shape(t);
  share_out(workers, shape.strips, [&](int64_t strip) {
    for (int64_t r = 0; r < smaller(kStrip, t.column_count - strip * kStrip); ++r) {
      double sum = 0;
      for (int64_t panel = 0; panel < shape.panels; ++panel) {
        const __m512i x = _mm512_load_si512(grad_logits_of(t, shape, strip, panel) + r * kPiece);
        const __m512 even = even_floats(x), odd = odd_floats(x);
        for (int64_t lane = 0; lane < 16; ++lane) {
          const float* const f = factor + panel * kPanel + 2 * lane;
          sum += double(even[lane]) * double(f[0]) + double(odd[lane]) * double(f[1]);
        }
      }
      const int64_t column = strip * kStrip + r;
      out[index ? int64_t(index[column]) : column] += float(sum);
    }
  });
}

}  // namespace
