// The vector loops over a run of columns of one row of logits. Compiled once for each vector level (setup.py).
//
// A run is read from memory once: a block small enough for the first-level cache at a time, its exponentials taken
// against a reference near the maximum of the columns so far, its sums folded into double.

#include "rows.h"

#include <cstddef>

#include "simd.h"

namespace {

using rpo::DType;
using rpo::GradRow;
using rpo::Partial;
using rpo::TokenTransform;

constexpr double kLn2 = 0.693147180559945309, kLog2e = 1.44269504088896341;
constexpr float kInfinity = __builtin_inff();
constexpr double kHuge = 1e6;  // a reference beyond which `Scaled` would move it by more than 0.1
constexpr int64_t kBlock = 8192;   // columns whose sums are kept in float
constexpr int64_t kGlance = 256;   // columns looked at for a first reference
constexpr double kMargin = 8.0;    // a maximum further above the reference moves it: a term's error grows with distance
constexpr int kPrefetch = 4096;    // bytes ahead
constexpr int kStep = 2 * kLanes;  // columns

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- kStep columns as float, in the order of the columns or, if `kInterleaved<T>`, all even ones first

template <class V>
RPO_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RPO_INLINE Floats load_step(const float* x) { return {load<Vector>(x), load<Vector>(x + kLanes)}; }
RPO_INLINE Floats load_step(const BFloat16* x) { return unpack_bfloat16(load<IntVector>(x)); }
RPO_INLINE Floats load_step(const Float16* x) { return unpack_float16(load<IntVector>(x)); }

template <class T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<BFloat16> = true;
template <>
constexpr bool kInterleaved<Float16> = kFloat16Interleaved;

template <bool kStream>
RPO_INLINE void store(void* p, IntVector v) {
  if (kStream)
    stream(p, v);
  else
    __builtin_memcpy(p, &v, sizeof v);
}
template <bool kStream>
RPO_INLINE void store_step(float* p, Floats x) {
  store<kStream>(p, (IntVector)x.a);
  store<kStream>(p + kLanes, (IntVector)x.b);
}
template <bool kStream>
RPO_INLINE void store_step(BFloat16* p, Floats x) {
  store<kStream>(p, pack_bfloat16(x));
}
template <bool kStream>
RPO_INLINE void store_step(Float16* p, Floats x) {
  store<kStream>(p, pack_float16(x));
}

// From the order of one type to that of another.
template <class From, class To>
RPO_INLINE Floats reorder(Floats x) {
  if (kInterleaved<From> == kInterleaved<To>) return x;
  return kInterleaved<To> ? interleaved(x) : sequential(x);
}

RPO_INLINE void prefetch(const void* p) { __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(p) + kPrefetch)); }

// The last, incomplete step of a run: padded, with the columns that count marked by a positive number.
template <class T>
struct Tail {
  T x[kStep] = {}, counts[kStep] = {};

  Tail(const T* row, int64_t columns) {
    __builtin_memcpy(x, row, size_t(columns) * sizeof(T));
    __builtin_memset(counts, 0x3c, size_t(columns) * sizeof(T));  // positive in every type
  }
};

// ---- transforms: y = (z - reference) * log2(e). Each is accurate near its `reference`, whatever that one's size.

inline double finite(double reference) { return reference == -__builtin_inf() ? 0.0 : reference; }

// One multiply-add. Rounding `offset` moves the reference, which therefore is computed from it and not the reverse.
struct Scaled {
  Floats slope, offset;
  double reference;

  static Scaled stored(const TokenTransform& options, double near) { return {options, near}; }

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

// The same for huge logits, and for machines whose multiply-add rounds twice.
struct Centered {
  Floats center, slope, limit = kInfinity;
  double reference;

  Centered(const TokenTransform& options, double near) {
    const double scale = options.logit_scale / options.temperature;
    const float x = float(near / scale);
    center = x;
    slope = float(scale * kLog2e);
    reference = x * scale;
  }
  // From a stored maximum so large that only its float is known: what lies within a step of it counts as the maximum.
  static Centered stored(const TokenTransform& options, double near) {
    Centered transform(options, near);
    if (__builtin_fabs(near) >= rpo::kCoarse && near - near == 0) {
      const float x = transform.center.a[0], step = __builtin_fabsf(x) * 0x1p-23f;
      transform.center = x - step;
      transform.limit = 0.0f;
      transform.reference = near;
    }
    return transform;
  }
  RPO_INLINE Floats log2_weight(Floats x) const {
    const Floats y = (x - center) * slope;
    return select(y > limit, limit, y);
  }
  template <class Factor>
  RPO_INLINE Floats gradient(Floats x, const Factor& factor) const {
    const Floats y = log2_weight(x);
    return exp2(y) * factor(y);
  }
};

// tanh w for |w| < 0.55 by a polynomial, else as +-(1 - q), q = 1 - tanh|w|; the 1 goes into the constant, so that near
// the cap it is the small q that is rounded and not the tanh.
struct SoftCapped {
  Floats slope, cap, middle, high, low;
  double reference;

  static SoftCapped stored(const TokenTransform& options, double near) { return {options, near}; }
  SoftCapped(const TokenTransform& options, double near) {
    const double largest = options.softcap / options.temperature;
    slope = float(options.logit_scale / options.softcap);
    cap = float(largest * kLog2e);
    middle = float(-near * kLog2e);
    high = float((largest - near) * kLog2e);
    low = float((-largest - near) * kLog2e);
    reference = near;
  }
  RPO_INLINE static Floats complement(Floats w) {
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
  RPO_INLINE Floats log2_weight(Floats x) const { return log2_weight(x * slope, complement(x * slope)); }
  template <class Factor>
  RPO_INLINE Floats gradient(Floats x, const Factor& factor) const {
    const Floats w = x * slope, q = complement(w), y = log2_weight(w, q);
    return exp2(y) * factor(y) * (q * (2.0f - q));  // 1 - tanh^2 = q (2 - q)
  }
};

constexpr float kNoWeight = -1e4f;  // log2 of what counts as 0; finite, so that 0 times it is 0

// ---- statistics

template <bool kExtras>
struct Sums {
  Floats top = -kInfinity, sumexp, weighted, total, squares;

  template <class Transform>
  RPO_INLINE void add(const Transform& transform, Floats x) {
    const Floats y = transform.log2_weight(x), weight = exp2(y);
    top = maximum(x, top);
    sumexp = sumexp + weight;
    if (kExtras) {
      weighted = multiply_add(weight, maximum(y, kNoWeight), weighted);
      total = total + y;
      squares = multiply_add(weight, weight, squares);
    }
  }
  // Only the columns in `counted`.
  template <class Transform>
  RPO_INLINE void add(const Transform& transform, Floats x, Ints counted) {
    Sums all;
    all.add(transform, x);
    top = maximum(select(counted, x, top), top);
    sumexp = sumexp + masked(counted, all.sumexp);
    weighted = weighted + masked(counted, all.weighted);
    total = total + masked(counted, all.total);
    squares = squares + masked(counted, all.squares);
  }
  void add(const Sums& other) {
    top = maximum(other.top, top);
    sumexp = sumexp + other.sumexp;
    weighted = weighted + other.weighted;
    total = total + other.total;
    squares = squares + other.squares;
  }
};

inline float largest(Floats x) {
  const Vector v = maximum(x.a, x.b);
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
inline double sum(Floats x) {
  const Vector v = x.a + x.b;
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += double(v[i]);
  return s;
}

// Each of the sums takes a few dozen terms before it goes into the next: where one large term has made a sum coarse,
// few small ones are rounded to that.
template <class T, class Transform, bool kExtras>
inline Partial block_stats(const Transform& transform, const T* x, int64_t columns) {
  constexpr int kSets = 16 / kLanes;  // as many partial sums at every level
  constexpr int64_t kChunk = 32 * kSets * kStep;
  Sums<kExtras> all;
  int64_t i = 0;
  while (i + kStep <= columns) {
    Sums<kExtras> sums[kSets];
    const int64_t end = columns - i < kChunk ? columns : i + kChunk;
    for (; i + kSets * kStep <= end; i += kSets * kStep) {
      prefetch(x + i);
      for (int set = 0; set < kSets; ++set) sums[set].add(transform, load_step(x + i + set * kStep));
    }
    for (int set = 0; i + kStep <= end; ++set, i += kStep) sums[set].add(transform, load_step(x + i));
    for (const Sums<kExtras>& set : sums) all.add(set);
  }
  if (i < columns) {
    const Tail<T> tail(x + i, columns - i);
    all.add(transform, load_step(tail.x), load_step(tail.counts) > 0.0f);
  }
  return {transform.reference, sum(all.sumexp), sum(all.weighted) * kLn2,
          sum(all.total) * kLn2 + double(columns) * transform.reference, sum(all.squares), largest(all.top),
          -kInfinity};
}

template <class T>
inline float glance(const T* x, int64_t columns) {
  Floats best = -kInfinity;
  for (int64_t i = 0; i + kStep <= columns && i < kGlance; i += kStep) best = maximum(load_step(x + i), best);
  return largest(best);
}

template <class T>
float largest_of(const T* x, int64_t columns) {
  Floats best = -kInfinity;
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) best = maximum(load_step(x + i), best);
  if (i < columns) {
    const Tail<T> tail(x + i, columns - i);
    best = maximum(select(load_step(tail.counts) > 0.0f, load_step(tail.x), -kInfinity), best);
  }
  return largest(best);
}

// Moves sums to another reference.
inline void refer(Partial& p, double reference) {
  const double away = p.sumexp > 0 ? p.reference - reference : 0.0, weight = __builtin_exp(away);
  p.weighted = (p.weighted + p.sumexp * away) * weight;
  p.squares *= weight * weight;
  p.sumexp *= weight;
  p.reference = reference;
}

template <class T, class Transform, bool kExtras>
void run_stats(const TokenTransform& options, const T* x, int64_t columns, Partial& run) {
  float near = glance(x, columns);
  Transform transform(options, finite(rpo::transform(options, near)));
  run = {transform.reference, 0.0, 0.0, 0.0, 0.0, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < columns; i += kBlock) {
    const int64_t n = columns - i < kBlock ? columns - i : kBlock;
    Partial block = block_stats<T, Transform, kExtras>(transform, x + i, n);
    if (block.top > near && (near == -kInfinity || rpo::transform(options, block.top) - run.reference > kMargin)) {
      near = block.top;
      transform = Transform(options, rpo::transform(options, near));
      refer(run, transform.reference);
      block = block_stats<T, Transform, kExtras>(transform, x + i, n);
    }
    run.sumexp += block.sumexp;
    run.weighted += block.weighted;
    run.total += block.total;
    run.squares += block.squares;
    run.top = block.top > run.top ? block.top : run.top;
  }
  if (run.top == -kInfinity) return;
  // The largest term, which in a confident row is nearly all of the sum, is made exact.
  const Floats y = transform.log2_weight(run.top);
  const double away = rpo::transform(options, run.top) - run.reference, weight = __builtin_exp(away);
  const double rounded_away = y.a[0] * kLn2, rounded_weight = exp2(y).a[0];
  run.sumexp += weight - rounded_weight;
  run.weighted += weight * away - rounded_weight * rounded_away;
  run.squares += weight * weight - rounded_weight * rounded_weight;
}

// ---- gradient

// Marks the columns among kStep whose gradient exceeds the threshold or is NaN. Other threads mark the same bytes.
template <class T>
inline void mark(const rpo::Active& active, Floats gradient, int64_t column, int64_t columns, int64_t label_column) {
  float values[kStep];
  store_step<false>(values, reorder<T, float>(absolute(gradient)));
  for (int64_t j = 0; j < columns; ++j)
    if (!(values[j] <= active.threshold) && column + j != label_column)
      __atomic_store_n(active.mask + column + j, uint8_t(1), __ATOMIC_RELAXED);
}

// What 2^y is multiplied by.
struct Constant {
  Floats factor;
  RPO_INLINE Floats operator()(Floats) const { return factor; }
};
struct Tilted {
  Floats factor, tilt;
  RPO_INLINE Floats operator()(Floats y) const { return multiply_add(maximum(y, kNoWeight), tilt, factor); }
};

template <class T, class Out, class Transform>
struct Gradient {
  const Transform transform;
  const double away, weight;  // from the row's reference to the transform's
  const Tilted factor;
  const T* const x;
  Out* const out;
  const GradRow& row;

  Gradient(const TokenTransform& options, const T* x, Out* out, const GradRow& row)
      : transform(Transform::stored(options, finite(row.reference))),
        away(transform.reference - finite(row.reference)), weight(__builtin_exp(away)),
        factor{float((row.factor + row.tilt * (row.offset + away)) * weight), float(row.tilt * kLn2 * weight)},
        x(x), out(out), row(row) {}

  RPO_INLINE Floats step(const T* from, int64_t column, int64_t columns, bool marks, bool tilts) const {
    const Floats logits = load_step(from);
    const Floats gradient =
        tilts ? transform.gradient(logits, factor) : transform.gradient(logits, Constant{factor.factor});
    if (marks && any(exceeds(absolute(gradient), row.active.threshold)))
      mark<T>(row.active, gradient, column, columns, row.label_column);
    return reorder<T, Out>(gradient);
  }
  // Whole steps from column i on; returns the column where they end.
  template <bool kStream, bool kMarks, bool kTilts>
  int64_t steps(int64_t i, int64_t columns) const {
    for (; i + kStep <= columns; i += kStep) {
      prefetch(x + i);
      store_step<kStream>(out + i, step(x + i, i, kStep, kMarks, kTilts));
    }
    return i;
  }
  template <bool kStream, bool kMarks>
  int64_t steps(int64_t i, int64_t columns) const {
    return row.tilt != 0 ? steps<kStream, kMarks, true>(i, columns) : steps<kStream, kMarks, false>(i, columns);
  }
  // Columns i to `end`, fewer than a step.
  void rest(int64_t i, int64_t end) const {
    if (i == end) return;
    const Tail<T> tail(x + i, end - i);
    Out result[kStep];
    store_step<false>(result, step(tail.x, i, end - i, row.active.mask != nullptr, row.tilt != 0));
    __builtin_memcpy(out + i, result, size_t(end - i) * sizeof(Out));
  }
  void label() const {
    Out rounded[kStep];
    store_step<false>(rounded, row.label_grad);
    out[row.label_column] = rounded[0];
    if (row.active.mask && !(__builtin_fabsf(row.label_grad) <= row.active.threshold))
      __atomic_store_n(row.active.mask + row.label_column, uint8_t(1), __ATOMIC_RELAXED);
  }
  void run(int64_t columns) const {
    int64_t i = 0;
    if (row.stream) {
      const int64_t past = int64_t(uintptr_t(out) % sizeof(Vector) / sizeof(Out));
      i = past == 0 ? 0 : int64_t(sizeof(Vector) / sizeof(Out)) - past;  // columns before `out` is aligned
      i = i < columns ? i : columns;
      rest(0, i);
      i = steps<true, false>(i, columns);
      stream_fence();
    } else {
      i = row.active.mask ? steps<false, true>(0, columns) : steps<false, false>(0, columns);
    }
    rest(i, columns);
    if (row.label_column >= 0) label();
  }
};

// ---- from run-time choices to template arguments

template <class Call>
inline void with_type(DType dtype, const Call& call) {
  if (dtype == DType::kFloat32)
    call(float{});
  else if (dtype == DType::kBFloat16)
    call(BFloat16{});
  else
    call(Float16{});
}

template <class Transform>
void stats_with(const TokenTransform& options, DType dtype, const void* x, int64_t n, bool extras, Partial* out) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = extras ? run_stats<T, Transform, true> : run_stats<T, Transform, false>;
    run(options, static_cast<const T*>(x), n, *out);
  });
}

void stats(const TokenTransform& options, DType dtype, const void* x, int64_t n, bool extras, Partial* out) {
  if (options.softcap > 0) return stats_with<SoftCapped>(options, dtype, x, n, extras, out);
  if (kFused) {
    stats_with<Scaled>(options, dtype, x, n, extras, out);
    if (__builtin_fabs(out->reference) < kHuge && out->sumexp - out->sumexp == 0) return;  // not NaN or infinite
  }
  stats_with<Centered>(options, dtype, x, n, extras, out);
}

float largest_logit(DType dtype, const void* x, int64_t columns) {
  float top = -kInfinity;
  with_type(dtype, [&](auto element) { top = largest_of(static_cast<const decltype(element)*>(x), columns); });
  return top;
}

template <class Transform>
void grad_with(const TokenTransform& options, DType dtype, const void* x, int64_t columns, const GradRow& row) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    with_type(row.out_dtype, [&](auto out_element) {
      using Out = decltype(out_element);
      Gradient<T, Out, Transform>(options, static_cast<const T*>(x), static_cast<Out*>(row.out), row).run(columns);
    });
  });
}

void grad(const TokenTransform& options, DType dtype, const void* x, int64_t columns, const GradRow& row) {
  if (options.softcap > 0) return grad_with<SoftCapped>(options, dtype, x, columns, row);
  if (kFused && __builtin_fabs(row.reference) < kHuge) return grad_with<Scaled>(options, dtype, x, columns, row);
  grad_with<Centered>(options, dtype, x, columns, row);
}

}  // namespace

#define RPO_NAME_(level) level_##level
#define RPO_NAME(level) RPO_NAME_(level)
#define RPO_STRING_(level) #level
#define RPO_STRING(level) RPO_STRING_(level)

namespace rpo {
extern const Level RPO_NAME(RPO_LEVEL);
const Level RPO_NAME(RPO_LEVEL) = {RPO_STRING(RPO_LEVEL), stats, grad, largest_logit};
}  // namespace rpo
