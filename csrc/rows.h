// Types shared by rows.cpp (vector loops) and native.cpp with segments.h (C interface, threads, segments of rows).
#pragma once

#include <cstdint>

namespace rpo {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap 0 means none.
struct TokenTransform {
  double logit_scale, softcap, temperature;
};
double transform(const TokenTransform& options, double x);
constexpr double kCoarse = 0x1p30;  // beyond this, neighbouring floats are too far apart for a softmax
double transform_slope(const TokenTransform& options, double x);

// Statistics of a run of columns, named as in RowStats (kernels/interface.py), relative to `reference`, a z near the
// maximum. `top` is the largest x that is not NaN, `max_before_label` the largest x before the label's column. A NaN or
// an infinity among the columns makes `sumexp` NaN.
struct Partial {
  double reference, sumexp, sum_exp_z, sum_z, sum_sq_exp;
  float top, max_before_label;
};

// Columns to mark with 1 in `mask` (null: none) where the gradient exceeds `threshold` or is NaN.
struct Active {
  uint8_t* mask;
  float threshold;
};

// Gradient of one row: (factor + entropy_factor * (z - reference + entropy_offset)) * exp(z - reference), times dz/dx
// relative to its value at x = 0. `entropy_factor` is 0 without a gradient of the entropy.
struct GradRow {
  double reference, factor, entropy_factor, entropy_offset;
  bool stream;           // store without filling the caches
  int64_t label_column;  // -1: not among these columns
  float label_grad;      // gradient at the label's column
  DType out_dtype;
  void* out;
  Active active;
};

struct HeadKernels;

// The kernels of one instruction set.
struct InstructionSet {
  const char* name;
  void (*stats)(const TokenTransform&, DType, const void* x, int64_t columns, bool all_sums, Partial* out);
  void (*grad)(const TokenTransform&, DType, const void* x, int64_t columns, const GradRow&);
  float (*largest)(DType, const void* x, int64_t columns);  // -inf of no columns; ignores NaN
  const HeadKernels* head = nullptr;  // null: this instruction set has none
};

}  // namespace rpo
