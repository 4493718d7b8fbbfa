// How a tile is cut into panels, strips and blocks, and shared out among threads.
#pragma once

#include "head.h"
#include "simd.h"

namespace {

using rpo::HeadTile;
using rpo::kPanel;
using rpo::kPiece;
using rpo::kStrip;
using rpo::Workers;

RPO_INLINE int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
RPO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kGroup = 4;            // panels, at most, per block of the weight in the second-level cache
constexpr int64_t kBlockBytes = 322560;  // of such a block
constexpr int64_t kMaxBlockStrips = 18;  // of which the pairs of a panel are in the first-level cache
constexpr int64_t kDepth = 16;           // panels whose hidden states are in the first-level cache (weight_gradient)

struct Shape {
  int64_t panels, strips, pieces, parts, pairs, block;
  explicit Shape(const HeadTile& t)
      : panels(over(t.row_count, kPanel)), strips(over(t.column_count, kStrip)), pieces(over(t.width, kPanel)),
        parts(over(t.width, kStrip)), pairs(over(t.column_count, 2)) {
    const int64_t fitting = kBlockBytes / (pieces * kStrip * kPiece * 4);
    block = fitting < 1 ? 1 : smaller(fitting, kMaxBlockStrips);
  }
};

// Panels in a group: fewer where there are threads for more groups.
RPO_INLINE int64_t group_of(const Workers& workers, const Shape& shape) {
  const int64_t share = shape.panels / workers.threads;
  return share < 1 ? 1 : smaller(share, kGroup);
}

template <class Task>
RPO_INLINE void share_out(const Workers& workers, int64_t count, const Task& task) {
  rpo::share_out(
      workers, count, 1, [](const void* t, int64_t item) { (*static_cast<const Task*>(t))(item); }, &task);
}

RPO_INLINE uint32_t* grad_logits_of(const HeadTile& t, const Shape& shape, int64_t strip, int64_t panel) {
  return t.grad_logits + (strip * shape.panels + panel) * kStrip * kPiece;
}

}  // namespace
