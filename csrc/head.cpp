// The kernels of head.h, for AVX-512 with bfloat16 products. Threads share out panels of rows, in which columns come in
// their order, or strips of columns, over which all rows are summed in theirs: so bits do not depend on the threads.
//
// A strip of the packed weight meets a panel of packed hidden states in 28 registers of sums; the softmax is taken on
// these, and what the two later products read is written at once in their layouts. One row in each lane: sums over
// columns need no shuffles.

#include "head.h"

#include "pack.h"
#include "softmax.h"

namespace {

using rpo::FinishedRows;
using rpo::HeadTile;
using rpo::Matrix;
using rpo::RunningRows;
using rpo::WeightGradient;
using rpo::Workers;

constexpr int64_t kGroup = 4;              // panels, at most, that meet a block of the weight while it is in the second-level cache
constexpr int64_t kBlockBytes = 322560;    // of such a block
constexpr int64_t kMaxBlockStrips = 18;    // of which the pairs of a panel are in the first-level cache
constexpr int64_t kDepth = 16;             // panels whose hidden states are in the first-level cache (weight_gradient)

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

// ---- packing

void pack_hidden(const Workers& workers, const Matrix& m, const float* factor, uint32_t* lanes, uint32_t* elements) {
  share_out(workers, over(m.rows, kPanel), [&](int64_t panel) {
    if (lanes) pack_lanes(m, panel, lanes + panel * over(m.width, kPanel) * kPiece * kPanel);
    if (elements) pack_elements(m, factor, panel, elements);
  });
}

void pack_weight(const Workers& workers, const Matrix& m, uint32_t* rows, uint32_t* pairs) {
  share_out(workers, over(m.rows, kStrip), [&](int64_t strip) {
    if (rows) pack_strip(m, strip, rows + strip * over(m.width, kPanel) * kPiece * kStrip);
    if (pairs) pack_pairs(m, strip, pairs);
  });
}

// ---- logits and what becomes of them

// Where a strip stands: its panel of rows, and the packed pairs of the block's columns so far.
struct Place {
  int64_t panel, strip;
  uint32_t* pairs;       // of the block, [block * 7][32]
  int64_t block_strip;   // strips of the block before this one
};

RPO_INLINE uint32_t* unit_of(const HeadTile& t, const Shape& shape, int64_t strip, int64_t panel) {
  return t.unit + (strip * shape.panels + panel) * kStrip * kPiece;
}

RPO_INLINE void make_logits(const HeadTile& t, const Shape& shape, const Place& place, Strip& strip) {
  Sums sums;
  clear(sums);
  add_pieces(sums, t.rows + place.strip * shape.pieces * kPiece * kStrip,
             t.lanes + place.panel * shape.pieces * kPiece * kPanel, shape.pieces);
  const int64_t column = place.strip * kStrip;
  fill(strip, sums, t.bias ? t.bias + column : nullptr, smaller(kStrip, t.column_count - column),
       t.labels + place.panel * kPanel, column);
}

RPO_INLINE void write(const HeadTile& t, const Shape& shape, const Place& place, const Strip& strip) {
  uint32_t* const unit = t.unit ? unit_of(t, shape, place.strip, place.panel) : nullptr;
  uint32_t* const pairs = t.pairs ? place.pairs + place.block_strip * kStrip / 2 * kPanel : nullptr;
  if (t.stream) write<true>(strip, unit, pairs);
  else write<false>(strip, unit, pairs);
}

// Adds the block's part in the gradient of the hidden states.
void add_gradient(const HeadTile& t, const Shape& shape, int64_t panel, int64_t first_strip, const uint32_t* pairs) {
  const int64_t first = first_strip * kStrip / 2;
  const int64_t count = smaller(shape.block * kStrip / 2, shape.pairs - first);
  for (int64_t part = 0; part < shape.parts; ++part) {
    float* const out = t.gradient + (panel * shape.parts + part) * kStrip * kPanel;
    Sums sums;
    load(sums, out);
    add_pairs(sums, t.pairs + (part * shape.pairs + first) * kStrip, pairs, count);
    store(sums, out);
  }
}

// Calls weigh(place, strip) for each strip and panel of a group, with the logits in the strip.
template <class Weigh>
RPO_INLINE void walk(const HeadTile& t, const Shape& shape, int64_t first_panel, int64_t last_panel,
                     const Weigh& weigh) {
  alignas(64) uint32_t pairs[kMaxBlockStrips * kStrip / 2 * kPanel];
  Strip strip;
  for (int64_t block = 0; block < shape.strips; block += shape.block)
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      for (int64_t i = block; i < smaller(block + shape.block, shape.strips); ++i) {
        const Place place{panel, i, pairs, i - block};
        make_logits(t, shape, place, strip);
        weigh(place, strip);
        if (t.unit || t.pairs) write(t, shape, place, strip);
      }
      if (t.pairs) add_gradient(t, shape, panel, block, pairs);
    }
  if (t.stream) _mm_sfence();  // before other threads read what was written past the caches
}

// ---- forward

// A panel's sums of one tile, and what they are compared with: the sum of all columns before, label included.
struct PanelSums {
  alignas(64) float reference[kPanel], before[kPanel], sum[kPanel];

  void begin(const RunningRows& rows, int64_t panel) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = panel * kPanel + lane;
      reference[lane] = rows.reference[row];
      before[lane] = float(rows.sum[row]);
      sum[lane] = 0;
    }
    const Floats label = load(rows.label + panel * kPanel) - load(reference);
    ::store(before, load(before) + exp2(label));
  }
  void end(const RunningRows& rows, int64_t panel) const {
    for (int64_t lane = 0; lane < kPanel; ++lane) rows.sum[panel * kPanel + lane] += double(sum[lane]);
  }
  RPO_INLINE static Floats load(const float* x) { return ::load(x); }
};

// Moves the references of the rows whose `top`, in bits, lies too high, and with them all that is relative to them.
__attribute__((noinline)) void move_references(const HeadTile& t, const Shape& shape, const RunningRows& rows,
                                               const Place& place, Floats top, PanelSums& sums) {
  const Floats old = load(sums.reference), above = {(Vector)_mm512_ceil_ps((__m512)top.a),
                                                    (Vector)_mm512_ceil_ps((__m512)top.b)};
  const Floats reference = select(top > old + kMargin, above, old);
  alignas(64) float factor[kPanel];
  store(factor, select(reference > old, exp2(old - reference), 1.0f));
  const Floats by_lane = load(factor);
  store(sums.reference, reference);
  store(sums.before, load(sums.before) * by_lane);
  store(sums.sum, load(sums.sum) * by_lane);
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t row = place.panel * kPanel + lane;
    rows.reference[row] = sums.reference[lane];
    rows.sum[row] *= double(factor[lane]);
    if (rows.dropped) rows.dropped[row] *= double(factor[lane]);
  }
  if (t.pairs) {
    float* const gradient = t.gradient + place.panel * shape.parts * kStrip * kPanel;
    for (int64_t i = 0; i < shape.parts * kStrip; ++i)
      store(gradient + i * kPanel, load(gradient + i * kPanel) * by_lane);
    for (int64_t i = 0; i < place.block_strip * kStrip / 2; ++i) {
      uint32_t* const pair = place.pairs + i * kPanel;
      _mm512_store_si512(pair, scaled(_mm512_load_si512(pair), (__m512)by_lane.a, (__m512)by_lane.a));
      _mm512_store_si512(pair + 16, scaled(_mm512_load_si512(pair + 16), (__m512)by_lane.b, (__m512)by_lane.b));
    }
  }
  if (t.unit) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 evens = _mm512_permutex2var_ps((__m512)by_lane.a, even, (__m512)by_lane.b);
    const __m512 odds = _mm512_permutex2var_ps((__m512)by_lane.a, odd, (__m512)by_lane.b);
    for (int64_t i = 0; i < place.strip; ++i) {
      uint32_t* const unit = unit_of(t, shape, i, place.panel);
      for (int64_t r = 0; r < kStrip; ++r)
        _mm512_store_si512(unit + r * kPiece, scaled(_mm512_load_si512(unit + r * kPiece), evens, odds));
    }
  }
}

// Turns logits into weights, adds them up, marks columns.
template <class Transform>
RPO_INLINE void weigh_forward(const Transform& transform, const RunningRows& rows, const Place& place, bool keep,
                              PanelSums& sums, Strip& strip) {
  const Floats reference = load(sums.reference), limit = (load(sums.before) + load(sums.sum)) * rows.threshold;
  uint8_t* const marks = rows.marks ? rows.marks + place.strip * kStrip : nullptr;
  Floats even = 0.0f, odd = 0.0f;
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
    Floats steepness, weight = exp2(transform.bits(load(strip.x[r]), reference, steepness));
    if (__builtin_expect(strip.masked, 0)) weight = masked(load(strip.live[r]), weight);
    (r % 2 ? odd : even) = (r % 2 ? odd : even) + weight;
    if (marks && r < strip.columns && any_exceeds(weight, limit)) __atomic_store_n(marks + r, uint8_t(1), __ATOMIC_RELAXED);
    if (keep) store(strip.x[r], weight * steepness);
  }
  store(sums.sum, load(sums.sum) + (even + odd));
}

// Adds to `dropped` the weights of a panel in the columns without a mark.
void add_dropped(const HeadTile& t, const Shape& shape, const RunningRows& rows, int64_t panel) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (int64_t column = 0; column < t.column_count; ++column) {
    if (rows.marks[column]) continue;
    const uint32_t* const unit = unit_of(t, shape, column / kStrip, panel) + column % kStrip * kPiece;
    const __m512i x = _mm512_load_si512(unit);
    even = _mm512_add_ps(even, even_floats(x));
    odd = _mm512_add_ps(odd, odd_floats(x));
  }
  for (int64_t lane = 0; lane < 16; ++lane) {
    rows.dropped[panel * kPanel + 2 * lane] += double(even[lane]);
    rows.dropped[panel * kPanel + 2 * lane + 1] += double(odd[lane]);
  }
}

template <class Transform>
void forward_with(const Workers& workers, const HeadTile& t, const RunningRows& rows) {
  const Shape shape(t);
  const Transform transform(t.options);
  const bool keep = t.unit || t.pairs;
  const int64_t size = group_of(workers, shape);
  share_out(workers, over(shape.panels, size), [&](int64_t group) {
    const int64_t first = group * size, last = smaller(first + size, shape.panels);
    PanelSums sums[kGroup];
    for (int64_t panel = first; panel < last; ++panel) sums[panel - first].begin(rows, panel);
    walk(t, shape, first, last, [&](const Place& place, Strip& strip) __attribute__((always_inline)) {
      PanelSums& own = sums[place.panel - first];
      const Floats top = transform.bits(top_of(strip), 0.0f);
      const Ints high = top > load(own.reference) + kMargin;
      if (__builtin_expect(any(high), 0)) move_references(t, shape, rows, place, top, own);
      weigh_forward(transform, rows, place, keep, own, strip);
    });
    for (int64_t panel = first; panel < last; ++panel) sums[panel - first].end(rows, panel);
  });
  if (rows.marks && rows.dropped)
    share_out(workers, shape.panels, [&](int64_t panel) { add_dropped(t, shape, rows, panel); });
}

void forward(const Workers& workers, const HeadTile& t, const RunningRows& rows) {
  if (t.options.softcap > 0) forward_with<SoftCapped>(workers, t, rows);
  else forward_with<Scaled>(workers, t, rows);
}

// ---- backward

template <class Transform>
void backward_with(const Workers& workers, const HeadTile& t, const FinishedRows& rows) {
  const Shape shape(t);
  const Transform transform(t.options);
  const int64_t size = group_of(workers, shape);
  share_out(workers, over(shape.panels, size), [&](int64_t group) {
    const int64_t first = group * size, last = smaller(first + size, shape.panels);
    walk(t, shape, first, last, [&](const Place& place, Strip& strip) __attribute__((always_inline)) {
      const Floats reference = load(rows.reference + place.panel * kPanel);
      const Floats factor = load(rows.factor + place.panel * kPanel);
      RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
        Floats steepness, weight = exp2(transform.bits(load(strip.x[r]), reference, steepness));
        if (__builtin_expect(strip.masked, 0)) weight = masked(load(strip.live[r]), weight);
        store(strip.x[r], weight * steepness * factor);
      }
    });
  });
}

void backward(const Workers& workers, const HeadTile& t, const FinishedRows& rows) {
  if (t.options.softcap > 0) backward_with<SoftCapped>(workers, t, rows);
  else backward_with<Scaled>(workers, t, rows);
}

// ---- gradients of weight and bias

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
        add_pieces(sums, unit_of(t, shape, strip, panel), lanes, smaller(kDepth, shape.panels - panel));
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
        const __m512i x = _mm512_load_si512(unit_of(t, shape, strip, panel) + r * kPiece);
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

// RPO_HEAD: the name of this compilation's kernels (setup.py).
#define RPO_JOIN(a, b) a##b
#define RPO_HEAD_OF(name) RPO_JOIN(head_, name)

namespace rpo {
extern const HeadKernels RPO_HEAD_OF(RPO_HEAD);
const HeadKernels RPO_HEAD_OF(RPO_HEAD) = {pack_hidden, pack_weight,     forward,
                                           backward,    weight_gradient, bias_gradient};
}  // namespace rpo
