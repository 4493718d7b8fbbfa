// The innermost matrix product: 14 x 32 sums in registers, accumulated over pairs of bfloat16.
#pragma once

#include "bfloat16.h"
#include "head.h"

namespace {

using rpo::kPanel;
using rpo::kPiece;
using rpo::kStrip;

typedef __m512 Sums[kStrip][2];

RPO_INLINE void clear(Sums& sums) {
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
}
RPO_INLINE void load(Sums& sums, const float* from) {
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
    sums[r][0] = _mm512_load_ps(from + r * kPanel);
    sums[r][1] = _mm512_load_ps(from + r * kPanel + 16);
  }
}
RPO_INLINE void store(const Sums& sums, float* to) {
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
    _mm512_store_ps(to + r * kPanel, sums[r][0]);
    _mm512_store_ps(to + r * kPanel + 16, sums[r][1]);
  }
}

// Adds one pair of each of 32 lanes, times that of each of 14 rows that lie `kStep` words apart.
template <int kStep>
RPO_INLINE void add_pair(Sums& sums, const uint32_t* rows, const uint32_t* lanes) {
  const __m512i first = _mm512_load_si512(lanes), second = _mm512_load_si512(lanes + 16);
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
    const __m512i row = _mm512_set1_epi32(int(rows[r * kStep]));
    sums[r][0] = add_products(sums[r][0], row, first);
    sums[r][1] = add_products(sums[r][1], row, second);
  }
}

// sums[r][lane] += sum over k of rows[k][r] * lanes[k][lane], rows [pieces][14][16], lanes [16 * pieces][32].
RPO_INLINE void add_pieces(Sums& sums, const uint32_t* rows, const uint32_t* lanes, int64_t pieces) {
  const FlushDenormals flush;
  for (int64_t piece = 0; piece < pieces; ++piece, rows += kStrip * kPiece, lanes += kPiece * kPanel)
    for (int k = 0; k < kPiece; k += 2) {
      add_pair<kPiece>(sums, rows + k, lanes + k * kPanel);
      add_pair<kPiece>(sums, rows + k + 1, lanes + (k + 1) * kPanel);
    }
}

// The same with rows [pairs][14], lanes [pairs][32].
RPO_INLINE void add_pairs(Sums& sums, const uint32_t* rows, const uint32_t* lanes, int64_t pairs) {
  const FlushDenormals flush;
  int64_t k = 0;
  for (; k + 2 <= pairs; k += 2) {
    add_pair<1>(sums, rows + k * kStrip, lanes + k * kPanel);
    add_pair<1>(sums, rows + (k + 1) * kStrip, lanes + (k + 1) * kPanel);
  }
  if (k < pairs) add_pair<1>(sums, rows + k * kStrip, lanes + k * kPanel);
}

}  // namespace
