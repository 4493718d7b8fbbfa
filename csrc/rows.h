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
double transform_slope(const TokenTransform& options, double x);

// Statistics of a run of columns. `sumexp` and `weighted` are relative to `reference`, a value of z near the maximum.
// `top` is the largest x that is not NaN; a NaN or an infinity among the columns makes `sumexp` NaN.
struct Partial {
  double reference, sumexp, weighted, total;
  float top;
};

// Columns to mark with 1 in `mask` (null: none) where the gradient exceeds `threshold` or is NaN.
struct Active {
  uint8_t* mask;
  float threshold;
};

// One row's part in the gradient: factor * exp(z - reference), times dz/dx over its value at x = 0.
struct GradRow {
  double reference;
  float factor;
  bool stream;           // store past the caches
  int64_t label_column;  // -1: not among these columns
  float label_grad;      // what stands there
  DType out_dtype;
  void* out;
  Active active;
};

// The kernels of one vector level.
struct Level {
  const char* name;
  void (*stats)(const TokenTransform&, DType, const void* x, int64_t columns, bool extras, Partial* out);
  void (*grad)(const TokenTransform&, DType, const void* x, int64_t columns, const GradRow&);
};

}  // namespace rpo
