// The vector loops over a run of columns of one row of logits. Compiled once for each vector level (setup.py).
//
// A run is read from memory once: a block small enough for the first-level cache at a time, its exponentials taken
// against a reference near the maximum of the columns so far, its sums folded into double.

#include "rows.h"
#include "simd.h"

#include <cstddef>

namespace {

using rpo::DType;
using rpo::GradRow;
using rpo::Partial;
using rpo::TokenTransform;

constexpr double kLn2 = 0.693147180559945309, kLog2e = 1.44269504088896341;
constexpr int64_t kBlock = 4096;    // columns whose sums are kept in float
constexpr int64_t kGlance = 256;    // columns looked at for a first reference
constexpr double kMargin = 8.0;     // how far a block's maximum may pass the reference: the error of a term is |z - reference| ulps
constexpr int kPrefetch = 1024;     // bytes ahead
constexpr int kStep = 2 * kLanes;   // columns a loop step takes
constexpr float kInfinity = __builtin_inff();

inline void prefetch(const void* p) { __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(p) + kPrefetch)); }

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// ---- kStep columns as float: the order among the two vectors is the type's own, the same in load and store

template <class T>
inline void load_step(const T* x, Floats& a, Floats& b);
template <>
inline void load_step(const float* x, Floats& a, Floats& b) {
  a = load<Floats>(x);
  b = load<Floats>(x + kLanes);
}
template <>
inline void load_step(const BFloat16* x, Floats& a, Floats& b) { unpack_bfloat16(load<Ints>(x), a, b); }
template <>
inline void load_step(const Float16* x, Floats& a, Floats& b) { unpack_float16(load<Ints>(x), a, b); }

template <bool kStream>
inline void store(void* p, Ints v) {
  if (kStream) stream(p, v);
  else __builtin_memcpy(p, &v, sizeof v);
}
template <bool kStream>
inline void store_step(float* x, Floats a, Floats b) {
  store<kStream>(x, bits(a));
  store<kStream>(x + kLanes, bits(b));
}
template <bool kStream>
inline void store_step(BFloat16* x, Floats a, Floats b) { store<kStream>(x, pack_bfloat16(a, b)); }
template <bool kStream>
inline void store_step(Float16* x, Floats a, Floats b) { store<kStream>(x, pack_float16(a, b)); }

// ---- transforms: y = (z - reference) * log2(e), accurate near the reference whatever its size

struct Scaled {
  Floats center, slope, rest;

  Scaled(const TokenTransform& options, double reference) {
    const double scale = options.logit_scale / options.temperature;
    const float x = float(reference / scale);  // the logit nearest the reference, subtracted before any rounding
    center = broadcast(x);
    slope = broadcast(float(scale * kLog2e));
    rest = broadcast(float((scale * x - reference) * kLog2e));
  }
  Floats log2_weight(Floats x) const { return multiply_add(x - center, slope, rest); }
  Floats gradient(Floats x, Floats factor) const { return exp2(log2_weight(x)) * factor; }
};

// tanh w for |w| < 0.55 by a polynomial, else as +-(1 - q), q = 1 - tanh|w|; the 1 goes into the constant, so that near
// the cap it is the small q that is rounded and not the tanh.
struct SoftCapped {
  Floats slope, cap, middle, high, low;

  SoftCapped(const TokenTransform& options, double reference) {
    const double largest = options.softcap / options.temperature;
    slope = broadcast(float(options.logit_scale / options.softcap));
    cap = broadcast(float(largest * kLog2e));
    middle = broadcast(float(-reference * kLog2e));
    high = broadcast(float((largest - reference) * kLog2e));
    low = broadcast(float((-largest - reference) * kLog2e));
  }
  static Floats complement(Floats w) {
    const Floats e = exp2(absolute(w) * float(-2 * kLog2e));
    return (e + e) / (e + 1.0f);
  }
  Floats log2_weight(Floats w, Floats q) const {
    constexpr float c[5] = {-0.3333331805f, 0.1333260169f, -0.05385385802f, 0.02107775856f, -0.006282473521f};
    const Floats square = w * w;
    Floats p = broadcast(c[4]);
    for (int i = 3; i >= 0; --i) p = multiply_add(p, square, broadcast(c[i]));
    const Ints is_small = absolute(w) < 0.55f, is_positive = w > 0.0f;
    const Floats value = select(is_small, multiply_add(p * square, w, w), select(is_positive, -q, q));
    return multiply_add(value, cap, select(is_small, middle, select(is_positive, high, low)));
  }
  Floats log2_weight(Floats x) const { return log2_weight(x * slope, complement(x * slope)); }
  Floats gradient(Floats x, Floats factor) const {
    const Floats w = x * slope, q = complement(w);
    return exp2(log2_weight(w, q)) * factor * (q * (2.0f - q));  // 1 - tanh^2
  }
};

// ---- statistics

template <bool kExtras>
struct Sums {
  Floats top = broadcast(-kInfinity), sumexp{}, weighted{}, total{};

  template <class Transform>
  inline void add(const Transform& transform, Floats x) {
    const Floats y = transform.log2_weight(x), weight = exp2(y);
    top = maximum(x, top);
    sumexp += weight;
    if (kExtras) {
      weighted += weight * maximum(y, broadcast(-1e4f));  // 0 where the weight is, not 0 * inf
      total += y;
    }
  }
  // Only the lanes of `keep`.
  template <class Transform>
  inline void add(const Transform& transform, Floats x, Ints keep) {
    Sums all;
    all.add(transform, x);
    top = maximum(select(keep, x, top), top);
    sumexp += as_floats(keep & bits(all.sumexp));
    weighted += as_floats(keep & bits(all.weighted));
    total += as_floats(keep & bits(all.total));
  }
};

// The last, incomplete step of a run: padded, with the columns that count marked by a positive number.
template <class T>
struct Tail {
  T x[kStep] = {}, counts[kStep] = {};

  Tail(const T* row, int64_t columns) {
    __builtin_memcpy(x, row, size_t(columns) * sizeof(T));
    __builtin_memset(counts, 0x3c, size_t(columns) * sizeof(T));  // positive in every type
  }
};

inline float largest(Floats v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
inline double sum(Floats v) {
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += double(v[i]);
  return s;
}

template <class T, class Transform, bool kExtras>
inline Partial block_stats(const Transform& transform, const T* x, int64_t columns) {
  Sums<kExtras> s, t;
  Floats a, b;
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    prefetch(x + i);
    load_step(x + i, a, b);
    s.add(transform, a);
    t.add(transform, b);
  }
  if (i < columns) {
    const Tail<T> tail(x + i, columns - i);
    Floats keep_a, keep_b;
    load_step(tail.x, a, b);
    load_step(tail.counts, keep_a, keep_b);
    s.add(transform, a, keep_a > 0.0f);
    t.add(transform, b, keep_b > 0.0f);
  }
  return {0.0, sum(s.sumexp + t.sumexp), sum(s.weighted + t.weighted) * kLn2, sum(s.total + t.total) * kLn2,
          largest(maximum(s.top, t.top))};
}

template <class T>
inline float glance(const T* x, int64_t columns) {
  Floats best = broadcast(-kInfinity), a, b;
  int64_t i = 0;
  for (; i + kStep <= columns && i < kGlance; i += kStep) {
    load_step(x + i, a, b);
    best = maximum(b, maximum(a, best));
  }
  return largest(best);
}

inline double finite(double reference) { return reference == -__builtin_inf() ? 0.0 : reference; }

// Moves sums to another reference.
inline void refer(Partial& p, double reference) {
  const double away = p.sumexp > 0 ? p.reference - reference : 0.0, weight = __builtin_exp(away);
  p.weighted = (p.weighted + p.sumexp * away) * weight;
  p.sumexp *= weight;
  p.reference = reference;
}

template <class T, class Transform, bool kExtras>
void run_stats(const TokenTransform& options, const void* data, int64_t columns, Partial* out) {
  const T* x = static_cast<const T*>(data);
  float center = glance(x, columns);
  Partial run{finite(rpo::transform(options, center)), 0.0, 0.0, 0.0, -kInfinity};
  Transform transform(options, run.reference);
  for (int64_t i = 0; i < columns; i += kBlock) {
    const int64_t n = columns - i < kBlock ? columns - i : kBlock;
    Partial block = block_stats<T, Transform, kExtras>(transform, x + i, n);
    if (block.top > center && (center == -kInfinity || rpo::transform(options, block.top) - run.reference > kMargin)) {
      center = block.top;
      refer(run, rpo::transform(options, center));
      transform = Transform(options, run.reference);
      block = block_stats<T, Transform, kExtras>(transform, x + i, n);
    }
    run.sumexp += block.sumexp;
    run.weighted += block.weighted;
    run.total += block.total + double(n) * run.reference;
    run.top = block.top > run.top ? block.top : run.top;
  }
  *out = run;
}

// ---- gradient

template <class T, class Transform, bool kStream>
inline int64_t grad_steps(const Transform& transform, Floats factor, const T* x, T* out, int64_t columns) {
  Floats a, b;
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    prefetch(x + i);
    load_step(x + i, a, b);
    store_step<kStream>(out + i, transform.gradient(a, factor), transform.gradient(b, factor));
  }
  return i;
}

// Fewer columns than a step.
template <class T, class Transform>
inline void grad_rest(const Transform& transform, Floats factor, const T* x, T* out, int64_t columns) {
  Tail<T> tail(x, columns);
  Floats a, b;
  load_step(tail.x, a, b);
  store_step<false>(tail.x, transform.gradient(a, factor), transform.gradient(b, factor));
  __builtin_memcpy(out, tail.x, size_t(columns) * sizeof(T));
}

template <class T, class Transform>
void run_grad(const TokenTransform& options, const void* data, void* out_data, int64_t columns, const GradRow& row) {
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(out_data);
  const Transform transform(options, finite(row.reference));
  const Floats factor = broadcast(row.factor);
  int64_t i = 0;
  if (row.stream) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % sizeof(Floats) / sizeof(T));
    i = past == 0 ? 0 : int64_t(sizeof(Floats) / sizeof(T)) - past;  // columns before `out` is aligned
    i = i < columns ? i : columns;
    if (i > 0) grad_rest(transform, factor, x, out, i);
    i += grad_steps<T, Transform, true>(transform, factor, x + i, out + i, columns - i);
    stream_fence();
  } else {
    i = grad_steps<T, Transform, false>(transform, factor, x, out, columns);
  }
  if (i < columns) grad_rest(transform, factor, x + i, out + i, columns - i);
  if (row.label_column >= 0) {
    T rounded[kStep];
    store_step<false>(rounded, broadcast(row.label_grad), broadcast(row.label_grad));
    out[row.label_column] = rounded[0];
  }
}

// ---- from run-time choices to template arguments

template <class Call>
inline void with_types(DType dtype, bool softcap, const Call& call) {
  const auto with_transform = [&](auto element) {
    if (softcap) call(element, static_cast<SoftCapped*>(nullptr));
    else call(element, static_cast<Scaled*>(nullptr));
  };
  if (dtype == DType::kFloat32) with_transform(float{});
  else if (dtype == DType::kBFloat16) with_transform(BFloat16{});
  else with_transform(Float16{});
}

void stats(const TokenTransform& options, DType dtype, const void* x, int64_t columns, bool extras, Partial* out) {
  with_types(dtype, options.softcap > 0, [&](auto element, auto* kind) {
    using T = decltype(element);
    using Transform = __typeof__(*kind);
    if (extras) run_stats<T, Transform, true>(options, x, columns, out);
    else run_stats<T, Transform, false>(options, x, columns, out);
  });
}

void grad(const TokenTransform& options, DType dtype, const void* x, void* out, int64_t columns, const GradRow& row) {
  with_types(dtype, options.softcap > 0, [&](auto element, auto* kind) {
    run_grad<decltype(element), __typeof__(*kind)>(options, x, out, columns, row);
  });
}

}  // namespace

#define RPO_NAME_(level) level_##level
#define RPO_NAME(level) RPO_NAME_(level)
#define RPO_STRING_(level) #level
#define RPO_STRING(level) RPO_STRING_(level)

namespace rpo {
extern const Level RPO_NAME(RPO_LEVEL);
const Level RPO_NAME(RPO_LEVEL) = {RPO_STRING(RPO_LEVEL), stats, grad};
}  // namespace rpo
