// From a logit x to y = (z - reference) * log2(e), z the transformed logit (rows.h), and to the gradient of 2^y. Each
// transform is accurate near its `reference`, however large that is.
#pragma once

#include "rows.h"
#include "simd.h"

namespace {

using rpo::TokenTransform;

constexpr double kLn2 = 0.693147180559945309, kLog2e = 1.44269504088896341;
constexpr float kInfinity = __builtin_inff();

inline double finite(double reference) { return reference == -__builtin_inf() ? 0.0 : reference; }

// One multiply-add. `reference` is computed from the rounded `offset`, so that both are exactly consistent.
struct Scaled {
  Floats slope, offset;
  double reference;

  Scaled(const TokenTransform& options, double near) {
    const double scale = options.logit_scale / options.temperature;
    const float a = float(scale * kLog2e), b = float(-a * near / scale);
    slope = a;
    offset = b;
    reference = -b / double(a) * scale;
  }
  RPO_INLINE Floats log2_weight(Floats x) const { return multiply_add(x, slope, offset); }
  template <class Factor>
  RPO_INLINE Floats gradient(Floats x, const Factor& factor) const {
    const Floats y = log2_weight(x);
    return exp2(y) * factor(y);
  }
};

// The same for huge logits, and for CPUs without fused multiply-add.
struct Centered {
  Floats center, slope;
  double reference;

  Centered(const TokenTransform& options, double near) {
    const double scale = options.logit_scale / options.temperature;
    const float x = float(near / scale);
    center = x;
    slope = float(scale * kLog2e);
    reference = rpo::transform(options, x);  // not inlined: a fused subtraction would not see its rounding
  }
  RPO_INLINE Floats log2_weight(Floats x) const { return (x - center) * slope; }
  template <class Factor>
  RPO_INLINE Floats gradient(Floats x, const Factor& factor) const {
    const Floats y = log2_weight(x);
    return exp2(y) * factor(y);
  }
};

// tanh w for |w| < 0.55 by a polynomial, else as +-(1 - q) with q = 1 - tanh|w|; the 1 is part of the constants `high`
// and `low`, so that near the cap the small q is rounded and not the tanh.
struct SoftCapped {
  Floats slope, cap, middle, high, low;
  double reference;

  SoftCapped(const TokenTransform& options, double near) {
    const double largest = options.softcap / options.temperature;
    slope = float(options.logit_scale / options.softcap);
    cap = float(largest * kLog2e);
    middle = float(-near * kLog2e);
    high = float((largest - near) * kLog2e);
    low = float((-largest - near) * kLog2e);
    reference = near;
  }
  RPO_INLINE static Floats one_minus_tanh(Floats w) {
    const Floats e = exp2(absolute(w) * float(-2 * kLog2e));
    return (e + e) / (e + 1.0f);
  }
  RPO_INLINE Floats log2_weight(Floats w, Floats q) const {
    constexpr float c[] = {-0.3333331805f, 0.1333260169f, -0.05385385802f, 0.02107775856f, -0.006282473521f};
    const Floats square = w * w, by_polynomial = multiply_add(polynomial(square, c) * square, w, w);
    const Ints is_small = 0.55f > absolute(w), is_positive = w > 0.0f;
    const Floats value = select(is_small, by_polynomial, select(is_positive, -q, q));
    return multiply_add(value, cap, select(is_small, middle, select(is_positive, high, low)));
  }
  RPO_INLINE Floats log2_weight(Floats x) const { return log2_weight(x * slope, one_minus_tanh(x * slope)); }
  template <class Factor>
  RPO_INLINE Floats gradient(Floats x, const Factor& factor) const {
    const Floats w = x * slope, q = one_minus_tanh(w), y = log2_weight(w, q);
    return exp2(y) * factor(y) * (q * (2.0f - q));  // 1 - tanh^2 = q (2 - q)
  }
};

constexpr float kLog2OfZero = -1e4f;  // stands for log2(0) = -infinity: 0 times it is 0 and not NaN

}  // namespace
