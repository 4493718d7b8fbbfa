// What native.cpp (the interface, threads, statistics across segments) and rows.cpp (the vector loops) share.
#pragma once

#include <cstdint>

namespace rpo {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap 0 means none.
struct TokenTransform {
  double logit_scale, softcap, temperature;
};
double transform(const TokenTransform& options, double x);
constexpr double kCoarse = 0x1p30;  // beyond this size, a step of float outweighs a softmax
double transform_slope(const TokenTransform& options, double x);

// Statistics of a run of columns. The sums of exponentials are relative to `reference`, a value of z near the maximum.
// `top` is the largest x that is not NaN; a NaN or an infinity among the columns makes `sumexp` NaN. `top_before` is the
// largest x before the label's column.
struct Partial {
  double reference, sumexp, weighted, total, squares;
  float top, top_before;
};

// Columns to mark with 1 in `mask` (null: none) where the gradient exceeds `threshold` or is NaN.
struct Active {
  uint8_t* mask;
  float threshold;
};

// One row's part in the gradient: (factor + tilt * (z - reference + offset)) * exp(z - reference), times dz/dx over its
// value at x = 0. `tilt` is the entropy's part, 0 where none is wanted.
struct GradRow {
  double reference, factor, tilt, offset;
  bool stream;           // store past the caches
  int64_t label_column;  // -1: not among these columns
  float label_grad;      // what stands there
  DType out_dtype;
  void* out;
  Active active;
};

struct HeadKernels;

// The kernels of one vector level.
struct Level {
  const char* name;
  void (*stats)(const TokenTransform&, DType, const void* x, int64_t columns, bool extras, Partial* out);
  void (*grad)(const TokenTransform&, DType, const void* x, int64_t columns, const GradRow&);
  float (*largest)(DType, const void* x, int64_t columns);  // -inf of none; passes over NaN
  const HeadKernels* head = nullptr;  // null: none at this level
};

}  // namespace rpo
