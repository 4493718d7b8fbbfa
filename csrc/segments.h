// Rows of logits as Python passes them and their segments of columns: the arguments of a segment's kernel, and the
// combination of the segments' statistics. Scalar code in double; the vector loops are in rows.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rows.h"

namespace {

using namespace rpo;

constexpr int64_t kSegment = 32768;  // columns; also the least work that is worth a thread
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- arguments from Python (mirrored in native.py). Strides are in elements; [batch, time] tensors without are dense.

struct Logits {
  const void* data;
  const int64_t* labels;
  int64_t stride[2], labels_stride[2];
  int64_t batch, time, columns, first_column, ignore_index;
  TokenTransform options;
  DType dtype;
  int32_t shift;
};

struct Stats {
  float *logp, *max, *sumexp, *label_logit;
  float *sum_exp_z, *sum_z, *max_before_label, *sum_sq_exp;  // null: not asked for

  bool wants_all_sums() const { return sum_exp_z || sum_z || sum_sq_exp; }
};

struct Grad {
  const float *logp, *max, *sumexp, *grad_logps;
  int64_t grad_logps_stride[2];
  void* out;
  int64_t out_stride[2];
  DType out_dtype;
  Active active;
  const float *entropy, *grad_entropy;  // null: no gradient of the entropy
  int64_t grad_entropy_stride[2];
};

// ---- elements and rows

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

double float16_value(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  double value = exponent == 31 ? (mantissa ? std::nan("") : kInfinity)
                 : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                : std::ldexp(mantissa, -24);
  return half & 0x8000 ? -value : value;
}

double element(const void* row, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[i];
  const uint16_t raw = static_cast<const uint16_t*>(row)[i];
  if (dtype == DType::kFloat16) return float16_value(raw);
  const uint32_t wide = uint32_t(raw) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

const char* row_data(const Logits& l, int64_t b, int64_t t) {
  return static_cast<const char*>(l.data) + (b * l.stride[0] + t * l.stride[1]) * element_size(l.dtype);
}

// The label position [b, t] and the row of logits that predicts it.
struct Position {
  int64_t b, t, label;
  bool is_scored;
  const char* row;

  Position(const Logits& l, int64_t b, int64_t t) : b(b), t(t), label(l.ignore_index), is_scored(false), row(nullptr) {
    if (t < l.shift || t >= l.time) return;
    label = l.labels[b * l.labels_stride[0] + t * l.labels_stride[1]];
    is_scored = label != l.ignore_index;
    row = row_data(l, b, t - l.shift);
  }
};

int64_t segments_of(const Logits& l) { return (l.columns + kSegment - 1) / kSegment; }
int64_t grain_of(const Logits& l) { return std::max<int64_t>(1, kSegment / l.columns); }

struct Segment {
  int64_t position, index, first, columns;
  Segment(const Logits& l, int64_t item)
      : position(item / segments_of(l)), index(item % segments_of(l)), first(index * kSegment),
        columns(std::min(kSegment, l.columns - first)) {}
};

// ---- statistics

struct Row {
  double max = -kInfinity, label_logit = -kInfinity, sumexp = 0;
  double sum_exp_z = 0, sum_z = 0, max_before_label = -kInfinity, sum_sq_exp = 0;
};

double max_or_nan(double a, double b) { return std::isnan(a) || a > b ? a : b; }  // NaN if either is

// Adds sums relative to `reference`; `row.max` is final.
template <class Sums>
void add(Row& row, double reference, const Sums& sums) {
  const double finite_max = row.max == -kInfinity ? 0 : row.max;
  const double distance = sums.sumexp > 0 ? reference - finite_max : 0, weight = std::exp(distance);
  row.sumexp += sums.sumexp * weight;
  row.sum_exp_z += (sums.sum_exp_z + sums.sumexp * distance) * weight;
  row.sum_z += sums.sum_z;
  row.sum_sq_exp += sums.sum_sq_exp * weight * weight;
}

// Maximum and sum_z of a segment that contains a NaN or an infinity.
void rescan(const Logits& l, const char* row, const Segment& s, Partial& partial) {
  double top = -kInfinity;
  partial.sum_z = 0;
  for (int64_t i = s.first; i < s.first + s.columns; ++i) {
    const double x = element(row, l.dtype, i);
    top = max_or_nan(top, x);
    partial.sum_z += transform(l.options, x);
  }
  partial.top = float(top);
}

// Statistics are stored in float: beyond kCoarse, what is compared with stored ones is rounded to float itself.
double as_stored(double z) { return std::fabs(z) < rpo::kCoarse ? z : double(float(z)); }
double exact(double z) { return z; }

Row with_stored_max(const Row& row) {
  Row rounded = row;
  rounded.max = double(float(row.max));
  rounded.sumexp = rounded.sum_exp_z = rounded.sum_z = rounded.sum_sq_exp = 0;
  add(rounded, std::fabs(rounded.max) < rpo::kCoarse ? row.max : rounded.max, row);
  return rounded;
}

Row combine(const Logits& l, const Position& p, const Partial* partials, const Row& running, bool continued) {
  double (*const known)(double) = continued ? as_stored : exact;
  Row row;
  const Partial* const end = partials + segments_of(l);
  row.max = running.max;
  for (const Partial* i = partials; i < end; ++i) row.max = max_or_nan(row.max, transform(l.options, i->top));
  row.max = known(row.max);
  add(row, running.max, running);
  for (const Partial* i = partials; i < end; ++i) add(row, known(i->reference), *i);
  row.max_before_label = running.max_before_label;
  for (const Partial* i = partials; i < end; ++i)
    row.max_before_label = max_or_nan(row.max_before_label, transform(l.options, i->max_before_label));

  row.label_logit = running.label_logit;
  const int64_t column = p.label - l.first_column;
  if (column >= 0 && column < l.columns)
    row.label_logit = max_or_nan(row.label_logit, known(transform(l.options, element(p.row, l.dtype, column))));
  return row;
}

void finish(const Logits& l, const Position& p, const Partial* partials, bool continued, const Stats& out) {
  const int64_t i = p.b * l.time + p.t;
  Row row{0, 0, 1, 0, 0, 0, 1};
  double logp = 0;
  if (p.is_scored) {
    Row running;
    if (continued) {
      running = {out.max[i], out.label_logit[i], out.sumexp[i]};
      if (out.sum_exp_z) running.sum_exp_z = out.sum_exp_z[i];
      if (out.sum_z) running.sum_z = out.sum_z[i];
      if (out.max_before_label) running.max_before_label = out.max_before_label[i];
      if (out.sum_sq_exp) running.sum_sq_exp = out.sum_sq_exp[i];
    }
    row = combine(l, p, partials, running, continued);
    logp = row.label_logit - row.max - std::log(row.sumexp);
    if (logp > 0) logp = 0;  // positive only by rounding
    row = with_stored_max(row);
  }
  out.logp[i] = float(logp);
  out.max[i] = float(row.max);
  out.sumexp[i] = float(row.sumexp);
  out.label_logit[i] = float(row.label_logit);
  if (out.sum_exp_z) out.sum_exp_z[i] = float(row.sum_exp_z);
  if (out.sum_z) out.sum_z[i] = float(row.sum_z);
  if (out.max_before_label) out.max_before_label[i] = float(row.max_before_label);
  if (out.sum_sq_exp) out.sum_sq_exp[i] = float(row.sum_sq_exp);
}

// Maximum of a segment's logits before the label's column.
float segment_max_before_label(const InstructionSet* isa, const Logits& l, const Position& p, const Segment& s,
                               const Partial& partial) {
  const int64_t column = p.label - l.first_column - s.first;
  if (column >= s.columns) return partial.top;
  return column > 0 ? isa->largest(l.dtype, p.row + s.first * element_size(l.dtype), column) : -kInfinity;
}

// ---- gradient

// Only the default NaN is sure to survive pack_bfloat16.
double quiet_nan(double x) { return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x; }

GradRow grad_row(const Logits& l, const Position& p, const Segment& s, const Grad& g) {
  const int64_t i = p.b * l.time + p.t, column = p.label - l.first_column - s.first;
  const double outer = g.grad_logps[p.b * g.grad_logps_stride[0] + p.t * g.grad_logps_stride[1]];
  GradRow row{};
  row.reference = quiet_nan(g.max[i]);
  const double unit = -transform_slope(l.options, 0) / g.sumexp[i];
  row.factor = quiet_nan(outer * unit);
  double label_entropy = 0;  // gradient of the entropy at the label, without dz/dx
  if (g.entropy) {
    const double inner = g.grad_entropy[p.b * g.grad_entropy_stride[0] + p.t * g.grad_entropy_stride[1]];
    const double logp = std::max(double(g.logp[i]), -1e4);
    row.entropy_factor = quiet_nan(inner * unit);
    row.entropy_offset = g.entropy[i] - std::log(g.sumexp[i]);
    label_entropy = -inner * std::exp(logp) * (logp + g.entropy[i]);
  }
  row.out_dtype = g.out_dtype;
  row.active = g.active;
  if (row.active.mask) row.active.mask += s.first;
  row.label_column = column >= 0 && column < s.columns ? column : -1;
  if (row.label_column >= 0) {
    const double slope = transform_slope(l.options, element(p.row, l.dtype, s.first + column));
    row.label_grad = float(quiet_nan((-std::expm1(double(g.logp[i])) * outer + label_entropy) * slope));
  }
  return row;
}

}  // namespace
