// The kernels of head.h, for AVX-512 with bfloat16 products. Threads process panels of rows, whose columns are added in
// order, or strips of columns, whose rows are added in order: so bits do not depend on the threads.
//
// A strip of the packed weight times a panel of packed hidden states gives 28 registers of logits. The softmax is taken
// on these, and the operands of the two later products are written in their layouts. Each lane holds one row, so that
// sums over columns need no shuffles.

#include "head.h"

#include "blocks.h"
#include "pack.h"
#include "softmax.h"
#include "weight_gradient.h"

namespace {

using rpo::FinishedRows;
using rpo::HeadTile;
using rpo::Matrix;
using rpo::OutputRows;
using rpo::RunningRows;
using rpo::Workers;

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

// ---- logits and their softmax

// Position of a strip: its panel of rows, and the packed pairs of the block's columns so far.
struct Place {
  int64_t panel, strip;
  uint32_t* pairs;       // of the block, [block * 7][32]
  int64_t block_strip;   // strips of the block before this one
};

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
  uint32_t* const grad_logits = t.grad_logits ? grad_logits_of(t, shape, place.strip, place.panel) : nullptr;
  uint32_t* const pairs = t.pairs ? place.pairs + place.block_strip * kStrip / 2 * kPanel : nullptr;
  if (t.stream) write<true>(strip, grad_logits, pairs);
  else write<false>(strip, grad_logits, pairs);
}

// Adds the block's contribution to the gradient of the hidden states.
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
        if (t.grad_logits || t.pairs) write(t, shape, place, strip);
      }
      if (t.pairs) add_gradient(t, shape, panel, block, pairs);
    }
  if (t.stream) _mm_sfence();  // before other threads read the non-temporal stores
}

// ---- forward

// A panel's sums of one tile, and the sum of all columns before it, label included.
struct PanelSums {
  alignas(64) float reference[kPanel], before[kPanel], sum[kPanel];
  alignas(64) float sum_exp_z[kPanel], sum_z[kPanel], sum_sq_exp[kPanel];  // as in OutputRows

  void begin(const RunningRows& rows, int64_t panel) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = panel * kPanel + lane;
      reference[lane] = rows.reference[row];
      before[lane] = float(rows.sum[row]);
      sum[lane] = sum_exp_z[lane] = sum_z[lane] = sum_sq_exp[lane] = 0;
    }
    const Floats label = load(rows.label + panel * kPanel) - load(reference);
    ::store(before, load(before) + exp2(label));
  }
  void end(const RunningRows& rows, int64_t panel) const {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t row = panel * kPanel + lane;
      rows.sum[row] += double(sum[lane]);
      if (!rows.outputs.sum_exp_z) continue;
      rows.outputs.sum_exp_z[row] += double(sum_exp_z[lane]);
      rows.outputs.sum_z[row] += double(sum_z[lane]);
      rows.outputs.sum_sq_exp[row] += double(sum_sq_exp[lane]);
    }
  }
  RPO_INLINE static Floats load(const float* x) { return ::load(x); }
};

// Moves the references of the rows whose `top`, in bits, lies too high, and rescales all that is relative to them.
__attribute__((noinline)) void move_references(const HeadTile& t, const Shape& shape, const RunningRows& rows,
                                               const Place& place, Floats top, PanelSums& sums) {
  const Floats old = load(sums.reference), above = {(Vector)_mm512_ceil_ps((__m512)top.a),
                                                    (Vector)_mm512_ceil_ps((__m512)top.b)};
  const Floats reference = select(top > old + kMargin, above, old);
  alignas(64) float factor[kPanel];
  store(factor, select(reference > old, exp2(old - reference), 1.0f));
  const Floats by_lane = load(factor), step = select(reference > old, reference - old, 0.0f);
  store(sums.sum_exp_z, (load(sums.sum_exp_z) - step * load(sums.sum)) * by_lane);
  store(sums.sum_sq_exp, load(sums.sum_sq_exp) * by_lane * by_lane);
  store(sums.reference, reference);
  store(sums.before, load(sums.before) * by_lane);
  store(sums.sum, load(sums.sum) * by_lane);
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t row = place.panel * kPanel + lane;
    if (rows.outputs.sum_exp_z) {
      const double moved = factor[lane] < 1 ? double(sums.reference[lane]) - double(rows.reference[row]) : 0;
      rows.outputs.sum_exp_z[row] = (rows.outputs.sum_exp_z[row] - moved * rows.sum[row]) * double(factor[lane]);
      rows.outputs.sum_sq_exp[row] *= double(factor[lane]) * double(factor[lane]);
    }
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
  if (t.grad_logits) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 evens = _mm512_permutex2var_ps((__m512)by_lane.a, even, (__m512)by_lane.b);
    const __m512 odds = _mm512_permutex2var_ps((__m512)by_lane.a, odd, (__m512)by_lane.b);
    for (int64_t i = 0; i < place.strip; ++i) {
      uint32_t* const grad_logits = grad_logits_of(t, shape, i, place.panel);
      for (int64_t r = 0; r < kStrip; ++r)
        _mm512_store_si512(grad_logits + r * kPiece, scaled(_mm512_load_si512(grad_logits + r * kPiece), evens, odds));
    }
  }
}

// Largest logits before and after each row's label, and the label's own.
RPO_INLINE void note_tops(const HeadTile& t, const OutputRows& rows, const Place& place, const Strip& strip,
                          Floats top) {
  const int64_t first = place.strip * kStrip, panel = place.panel * kPanel;
  float* const before = rows.max_before_label + panel;
  float* const after = rows.max_after_label + panel;
  const int32_t* const labels = t.labels + panel;
  if (__builtin_expect(strip.masked, 0)) {
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t label = labels[lane] - first;
      if (label >= 0 && label < strip.columns) rows.at_label[panel + lane] = strip.at_label[lane];
      for (int64_t r = 0; r < strip.columns; ++r) {
        float& to = r < label ? before[lane] : after[lane];
        if (r != label && strip.x[r][lane] > to) to = strip.x[r][lane];
      }
    }
    return;
  }
  const IntVector last = int32_t(first + kStrip - 1) - IntVector{};
  const Ints label = load(labels), is_before = {label.a > last, label.b > last};
  store(before, select(is_before, maximum(top, load(before)), load(before)));
  store(after, select(is_before, load(after), maximum(top, load(after))));
}

// Computes weights from logits, sums them, marks columns.
template <bool kOutputs, class Transform>
RPO_INLINE void weigh_forward(const Transform& transform, const RunningRows& rows, const Place& place, bool keep,
                              PanelSums& sums, Strip& strip) {
  const Floats reference = load(sums.reference), limit = (load(sums.before) + load(sums.sum)) * rows.threshold;
  uint8_t* const marks = rows.marks ? rows.marks + place.strip * kStrip : nullptr;
  Floats even = 0.0f, odd = 0.0f, sum_exp_z = 0.0f, sum_z = 0.0f, sum_sq_exp = 0.0f;
  RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
    const Floats x = load(strip.x[r]);
    Floats steepness, bits = transform.bits(x, reference, steepness), weight = exp2(bits);
    if (__builtin_expect(strip.masked, 0)) weight = masked(load(strip.live[r]), weight);
    (r % 2 ? odd : even) = (r % 2 ? odd : even) + weight;
    if (marks && r < strip.columns && any_exceeds(weight, limit))
      __atomic_store_n(marks + r, uint8_t(1), __ATOMIC_RELAXED);
    if (kOutputs) {
      Floats z = transform.absolute_bits(x, bits, reference);
      if (__builtin_expect(strip.masked, 0)) z = masked(load(strip.live[r]), z);
      sum_z = sum_z + z;
      sum_exp_z = sum_exp_z + masked(weight > 0.0f, weight * bits);  // not 0 * -inf
      sum_sq_exp = multiply_add(weight, weight, sum_sq_exp);
    }
    if (keep) store(strip.x[r], weight * steepness);
  }
  store(sums.sum, load(sums.sum) + (even + odd));
  if (!kOutputs) return;
  store(sums.sum_exp_z, load(sums.sum_exp_z) + sum_exp_z);
  store(sums.sum_z, load(sums.sum_z) + sum_z);
  store(sums.sum_sq_exp, load(sums.sum_sq_exp) + sum_sq_exp);
}

// Adds the weights of a panel in the unmarked columns to `dropped`.
void add_dropped(const HeadTile& t, const Shape& shape, const RunningRows& rows, int64_t panel) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (int64_t column = 0; column < t.column_count; ++column) {
    if (rows.marks[column]) continue;
    const uint32_t* const grad_logits = grad_logits_of(t, shape, column / kStrip, panel) + column % kStrip * kPiece;
    const __m512i x = _mm512_load_si512(grad_logits);
    even = _mm512_add_ps(even, even_floats(x));
    odd = _mm512_add_ps(odd, odd_floats(x));
  }
  for (int64_t lane = 0; lane < 16; ++lane) {
    rows.dropped[panel * kPanel + 2 * lane] += double(even[lane]);
    rows.dropped[panel * kPanel + 2 * lane + 1] += double(odd[lane]);
  }
}

template <bool kOutputs, class Transform>
void forward_with(const Workers& workers, const HeadTile& t, const RunningRows& rows) {
  const Shape shape(t);
  const Transform transform(t.options);
  const bool keep = t.grad_logits || t.pairs;
  const int64_t size = group_of(workers, shape);
  share_out(workers, over(shape.panels, size), [&](int64_t group) {
    const int64_t first = group * size, last = smaller(first + size, shape.panels);
    PanelSums sums[kGroup];
    for (int64_t panel = first; panel < last; ++panel) sums[panel - first].begin(rows, panel);
    walk(t, shape, first, last, [&](const Place& place, Strip& strip) __attribute__((always_inline)) {
      PanelSums& own = sums[place.panel - first];
      const Floats largest = top_of(strip), top = transform.bits(largest, 0.0f);
      if (kOutputs) note_tops(t, rows.outputs, place, strip, largest);
      const Ints high = top > load(own.reference) + kMargin;
      if (__builtin_expect(any(high), 0)) move_references(t, shape, rows, place, top, own);
      weigh_forward<kOutputs>(transform, rows, place, keep, own, strip);
    });
    for (int64_t panel = first; panel < last; ++panel) sums[panel - first].end(rows, panel);
  });
  if (rows.marks && rows.dropped)
    share_out(workers, shape.panels, [&](int64_t panel) { add_dropped(t, shape, rows, panel); });
}

template <bool kOutputs>
void forward_of(const Workers& workers, const HeadTile& t, const RunningRows& rows) {
  if (t.options.softcap > 0) forward_with<kOutputs, SoftCapped>(workers, t, rows);
  else forward_with<kOutputs, Scaled>(workers, t, rows);
}

void forward(const Workers& workers, const HeadTile& t, const RunningRows& rows) {
  if (rows.outputs.sum_exp_z) forward_of<true>(workers, t, rows);
  else forward_of<false>(workers, t, rows);
}

// ---- backward

template <bool kEntropy, class Transform>
void backward_with(const Workers& workers, const HeadTile& t, const FinishedRows& rows) {
  const Shape shape(t);
  const Transform transform(t.options);
  const int64_t size = group_of(workers, shape);
  share_out(workers, over(shape.panels, size), [&](int64_t group) {
    const int64_t first = group * size, last = smaller(first + size, shape.panels);
    walk(t, shape, first, last, [&](const Place& place, Strip& strip) __attribute__((always_inline)) {
      const Floats reference = load(rows.reference + place.panel * kPanel);
      const Floats factor = load(rows.factor + place.panel * kPanel);
      const Floats entropy_factor = kEntropy ? load(rows.entropy_factor + place.panel * kPanel) : 0.0f;
      const Floats entropy_offset = kEntropy ? load(rows.entropy_offset + place.panel * kPanel) : 0.0f;
      RPO_UNROLL for (int r = 0; r < kStrip; ++r) {
        Floats steepness, bits = transform.bits(load(strip.x[r]), reference, steepness), weight = exp2(bits);
        if (__builtin_expect(strip.masked, 0)) weight = masked(load(strip.live[r]), weight);
        Floats slope = factor;
        if (kEntropy)  // not 0 * -inf
          slope = select(weight > 0.0f, multiply_add(entropy_factor, bits + entropy_offset, factor), factor);
        store(strip.x[r], weight * steepness * slope);
      }
    });
  });
}

template <bool kEntropy>
void backward_of(const Workers& workers, const HeadTile& t, const FinishedRows& rows) {
  if (t.options.softcap > 0) backward_with<kEntropy, SoftCapped>(workers, t, rows);
  else backward_with<kEntropy, Scaled>(workers, t, rows);
}

void backward(const Workers& workers, const HeadTile& t, const FinishedRows& rows) {
  if (rows.entropy_factor) backward_of<true>(workers, t, rows);
  else backward_of<false>(workers, t, rows);
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
