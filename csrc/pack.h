// Packing of hidden states and weight into the layouts of head.h.
#pragma once

#include "bfloat16.h"
#include "blocks.h"

namespace {

using rpo::Matrix;

// Up to 16 pairs of a row, padded with zeros.
RPO_INLINE __m512i row_piece(const uint16_t* row, int64_t elements) {
  if (elements >= kPanel) return _mm512_loadu_si512(row);
  return _mm512_maskz_loadu_epi16(elements <= 0 ? 0 : (__mmask32)((uint64_t(1) << elements) - 1), row);
}

RPO_INLINE const uint16_t* row_of(const Matrix& m, int64_t i) {
  return m.data + (m.index ? int64_t(m.index[i]) : i) * m.stride;
}

void pack_lanes(const Matrix& m, int64_t panel, uint32_t* out) {
  for (int64_t piece = 0; piece < over(m.width, kPanel); ++piece)
    for (int64_t half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = panel * kPanel + half * 16 + i;
        rows[i] = _mm512_setzero_si512();
        if (row < m.rows) rows[i] = row_piece(row_of(m, row) + piece * kPanel, m.width - piece * kPanel);
      }
      transpose(rows);
      for (int64_t k = 0; k < 16; ++k) _mm512_store_si512(out + (piece * kPiece + k) * kPanel + half * 16, rows[k]);
    }
}

RPO_INLINE __m512i multiplied(__m512i x, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  const __m512 even = _mm512_mul_ps(even_floats(x), f), odd = _mm512_mul_ps(odd_floats(x), f);
  const __m512i low = pack(even, even), high = pack(odd, odd);
  return _mm512_permutex2var_epi16(low, pair_order(), high);
}

void pack_elements(const Matrix& m, const float* factor, int64_t panel, uint32_t* out) {
  const int64_t panels = over(m.rows, kPanel);
  for (int64_t piece = 0; piece < over(m.width, kPanel); ++piece)
    for (int64_t pair = 0; pair < kPiece; ++pair) {
      __m512i rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t row = panel * kPanel + 2 * pair + i;
        rows[i] = _mm512_setzero_si512();
        if (row >= m.rows) continue;
        rows[i] = row_piece(row_of(m, row) + piece * kPanel, m.width - piece * kPanel);
        if (factor) rows[i] = multiplied(rows[i], factor[row]);
      }
      uint32_t* const to = out + ((piece * panels + panel) * kPiece + pair) * kPanel;
      interleave(rows[0], rows[1], to, to + 16);
    }
}

void pack_strip(const Matrix& m, int64_t strip, uint32_t* out) {
  for (int64_t r = 0; r < kStrip; ++r) {
    const int64_t row = strip * kStrip + r;
    for (int64_t piece = 0; piece < over(m.width, kPanel); ++piece) {
      __m512i x = _mm512_setzero_si512();
      if (row < m.rows) x = row_piece(row_of(m, row) + piece * kPanel, m.width - piece * kPanel);
      _mm512_store_si512(out + (piece * kStrip + r) * kPiece, x);
    }
  }
}

// The pairs of a strip's columns, 14 elements of the hidden states at a time.
void pack_pairs(const Matrix& m, int64_t strip, uint32_t* out) {
  const int64_t pairs = over(m.rows, 2), first = strip * kStrip / 2, last = smaller(first + kStrip / 2, pairs);
  for (int64_t part = 0; part < over(m.width, kStrip); ++part) {
    const __mmask16 mask = __mmask16((1u << smaller(kStrip, m.width - part * kStrip)) - 1);
    for (int64_t pair = first; pair < last; ++pair) {
      const uint16_t* const even = row_of(m, 2 * pair) + part * kStrip;
      const uint16_t* const odd = 2 * pair + 1 < m.rows ? row_of(m, 2 * pair + 1) + part * kStrip : nullptr;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
      const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd)) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(out + (part * pairs + pair) * kStrip, (1u << kStrip) - 1,
                               _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

}  // namespace
