// Vector loops over a run of consecutive columns of one row of logits; compiled once per instruction set (setup.py).
//
// A run is read from memory once, in blocks that fit the first-level cache. A block's exponentials are relative to a
// reference near the maximum of the columns so far; its sums are accumulated in double.

#include "rows.h"

#include "steps.h"
#include "transforms.h"

namespace {

using rpo::DType;
using rpo::GradRow;
using rpo::Partial;

constexpr double kHuge = 1e6;           // beyond this, `Scaled` would move a reference by more than 0.1
constexpr int64_t kBlock = 8192;        // columns whose sums are accumulated in float
constexpr int64_t kFirstColumns = 256;  // columns whose maximum is the first reference
constexpr double kMargin = 8.0;  // the reference moves to a maximum further above it: errors grow with the distance

// ---- statistics

template <bool kAllSums>
struct Sums {
  Floats top = -kInfinity, sumexp, sum_exp_z, sum_z, sum_sq_exp;

  template <class Transform>
  RPO_INLINE void add(const Transform& transform, Floats x) {
    const Floats y = transform.log2_weight(x), weight = exp2(y);
    top = maximum(x, top);
    sumexp = sumexp + weight;
    if (kAllSums) {
      sum_exp_z = multiply_add(weight, maximum(y, kLog2OfZero), sum_exp_z);
      sum_z = sum_z + y;
      sum_sq_exp = multiply_add(weight, weight, sum_sq_exp);
    }
  }
  // Adds only the columns set in `counted`.
  template <class Transform>
  RPO_INLINE void add(const Transform& transform, Floats x, Ints counted) {
    Sums all;
    all.add(transform, x);
    top = maximum(select(counted, x, top), top);
    sumexp = sumexp + masked(counted, all.sumexp);
    sum_exp_z = sum_exp_z + masked(counted, all.sum_exp_z);
    sum_z = sum_z + masked(counted, all.sum_z);
    sum_sq_exp = sum_sq_exp + masked(counted, all.sum_sq_exp);
  }
  void add(const Sums& other) {
    top = maximum(other.top, top);
    sumexp = sumexp + other.sumexp;
    sum_exp_z = sum_exp_z + other.sum_exp_z;
    sum_z = sum_z + other.sum_z;
    sum_sq_exp = sum_sq_exp + other.sum_sq_exp;
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

// Sums are nested: each accumulates a few dozen terms before it is added to the next, so that a sum that holds one
// large term rounds off only few small ones.
template <class T, class Transform, bool kAllSums>
inline Partial block_stats(const Transform& transform, const T* x, int64_t columns) {
  constexpr int kSets = 16 / kLanes;  // so that every instruction set has the same number of partial sums
  constexpr int64_t kChunk = 32 * kSets * kStep;
  Sums<kAllSums> all;
  int64_t i = 0;
  while (i + kStep <= columns) {
    Sums<kAllSums> sums[kSets];
    const int64_t end = columns - i < kChunk ? columns : i + kChunk;
    for (; i + kSets * kStep <= end; i += kSets * kStep) {
      prefetch(x + i);
      for (int set = 0; set < kSets; ++set) sums[set].add(transform, load_step(x + i + set * kStep));
    }
    for (int set = 0; i + kStep <= end; ++set, i += kStep) sums[set].add(transform, load_step(x + i));
    for (const Sums<kAllSums>& set : sums) all.add(set);
  }
  if (i < columns) {
    const Tail<T> tail(x + i, columns - i);
    all.add(transform, load_step(tail.x), load_step(tail.counts) > 0.0f);
  }
  return {transform.reference, sum(all.sumexp), sum(all.sum_exp_z) * kLn2,
          sum(all.sum_z) * kLn2 + double(columns) * transform.reference, sum(all.sum_sq_exp), largest(all.top),
          -kInfinity};
}

template <class T>
inline float max_of_first_columns(const T* x, int64_t columns) {
  Floats best = -kInfinity;
  for (int64_t i = 0; i + kStep <= columns && i < kFirstColumns; i += kStep) best = maximum(load_step(x + i), best);
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

// Rescales the sums to another reference.
inline void move_reference(Partial& p, double reference) {
  const double distance = p.sumexp > 0 ? p.reference - reference : 0.0, weight = __builtin_exp(distance);
  p.sum_exp_z = (p.sum_exp_z + p.sumexp * distance) * weight;
  p.sum_sq_exp *= weight * weight;
  p.sumexp *= weight;
  p.reference = reference;
}

template <class T, class Transform, bool kAllSums>
void run_stats(const TokenTransform& options, const T* x, int64_t columns, Partial& run) {
  float near = max_of_first_columns(x, columns);
  Transform transform(options, finite(rpo::transform(options, near)));
  run = {transform.reference, 0.0, 0.0, 0.0, 0.0, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < columns; i += kBlock) {
    const int64_t n = columns - i < kBlock ? columns - i : kBlock;
    Partial block = block_stats<T, Transform, kAllSums>(transform, x + i, n);
    if (block.top > near && (near == -kInfinity || rpo::transform(options, block.top) - run.reference > kMargin)) {
      near = block.top;
      transform = Transform(options, rpo::transform(options, near));
      move_reference(run, transform.reference);
      block = block_stats<T, Transform, kAllSums>(transform, x + i, n);
    }
    run.sumexp += block.sumexp;
    run.sum_exp_z += block.sum_exp_z;
    run.sum_z += block.sum_z;
    run.sum_sq_exp += block.sum_sq_exp;
    run.top = block.top > run.top ? block.top : run.top;
  }
  if (run.top == -kInfinity) return;
  // Replace the largest term, which in a confident row is nearly all of the sum, by its value in double.
  const Floats y = transform.log2_weight(run.top);
  const double distance = rpo::transform(options, run.top) - run.reference, weight = __builtin_exp(distance);
  const double rounded_distance = y.a[0] * kLn2, rounded_weight = exp2(y).a[0];
  run.sumexp += weight - rounded_weight;
  run.sum_exp_z += weight * distance - rounded_weight * rounded_distance;
  run.sum_sq_exp += weight * weight - rounded_weight * rounded_weight;
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

// Factor of 2^y in the gradient: constant, or affine in y with the entropy's gradient.
struct Constant {
  Floats factor;
  RPO_INLINE Floats operator()(Floats) const { return factor; }
};
struct WithEntropy {
  Floats factor, slope;
  RPO_INLINE Floats operator()(Floats y) const { return multiply_add(maximum(y, kLog2OfZero), slope, factor); }
};

template <class T, class Out, class Transform>
struct Gradient {
  const Transform transform;
  const double distance, weight;  // the transform's reference minus the row's, and its exponential
  const WithEntropy factor;
  const T* const x;
  Out* const out;
  const GradRow& row;

  Gradient(const TokenTransform& options, const T* x, Out* out, const GradRow& row)
      : transform(options, finite(row.reference)),
        distance(transform.reference - finite(row.reference)), weight(__builtin_exp(distance)),
        factor{float((row.factor + row.entropy_factor * (row.entropy_offset + distance)) * weight),
               float(row.entropy_factor * kLn2 * weight)},
        x(x), out(out), row(row) {}

  RPO_INLINE Floats step(const T* from, int64_t column, int64_t columns, bool with_marks, bool with_entropy) const {
    const Floats logits = load_step(from);
    const Floats gradient =
        with_entropy ? transform.gradient(logits, factor) : transform.gradient(logits, Constant{factor.factor});
    if (with_marks && any(exceeds(absolute(gradient), row.active.threshold)))
      mark<T>(row.active, gradient, column, columns, row.label_column);
    return reorder<T, Out>(gradient);
  }
  // Writes whole steps from column i on; returns the first column after them.
  template <bool kStream, bool kMarks, bool kEntropy>
  int64_t steps(int64_t i, int64_t columns) const {
    for (; i + kStep <= columns; i += kStep) {
      prefetch(x + i);
      store_step<kStream>(out + i, step(x + i, i, kStep, kMarks, kEntropy));
    }
    return i;
  }
  template <bool kStream, bool kMarks>
  int64_t steps(int64_t i, int64_t columns) const {
    if (row.entropy_factor != 0) return steps<kStream, kMarks, true>(i, columns);
    return steps<kStream, kMarks, false>(i, columns);
  }
  // Writes columns i to `end`, fewer than a step.
  void rest(int64_t i, int64_t end) const {
    if (i == end) return;
    const Tail<T> tail(x + i, end - i);
    Out result[kStep];
    store_step<false>(result, step(tail.x, i, end - i, row.active.mask != nullptr, row.entropy_factor != 0));
    __builtin_memcpy(out + i, result, size_t(end - i) * sizeof(Out));
  }
  void write_label() const {
    Out rounded[kStep];
    store_step<false>(rounded, row.label_grad);
    out[row.label_column] = rounded[0];
    if (row.active.mask && !(__builtin_fabsf(row.label_grad) <= row.active.threshold))
      __atomic_store_n(row.active.mask + row.label_column, uint8_t(1), __ATOMIC_RELAXED);
  }
  void run(int64_t columns) const {
    int64_t i = 0;
    if (row.stream) {
      const int64_t misaligned = int64_t(uintptr_t(out) % sizeof(Vector) / sizeof(Out));
      i = misaligned == 0 ? 0 : int64_t(sizeof(Vector) / sizeof(Out)) - misaligned;  // columns before `out` is aligned
      i = i < columns ? i : columns;
      rest(0, i);
      i = steps<true, false>(i, columns);
      stream_fence();
    } else {
      i = row.active.mask ? steps<false, true>(0, columns) : steps<false, false>(0, columns);
    }
    rest(i, columns);
    if (row.label_column >= 0) write_label();
  }
};

// ---- instantiations, chosen at run time

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
void stats_with(const TokenTransform& options, DType dtype, const void* x, int64_t n, bool all_sums, Partial* out) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = all_sums ? run_stats<T, Transform, true> : run_stats<T, Transform, false>;
    run(options, static_cast<const T*>(x), n, *out);
  });
}

void stats(const TokenTransform& options, DType dtype, const void* x, int64_t n, bool all_sums, Partial* out) {
  if (options.softcap > 0) return stats_with<SoftCapped>(options, dtype, x, n, all_sums, out);
  if (kFused) {
    stats_with<Scaled>(options, dtype, x, n, all_sums, out);
    if (__builtin_fabs(out->reference) < kHuge && out->sumexp - out->sumexp == 0) return;  // finite
  }
  stats_with<Centered>(options, dtype, x, n, all_sums, out);
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

// A stored maximum beyond kCoarse does not tell which logit it was: the largest of these columns, or none of them.
GradRow with_exact_max(const TokenTransform& options, DType dtype, const void* x, int64_t columns, GradRow row) {
  const double top = rpo::transform(options, largest_logit(dtype, x, columns));
  if (double(float(top)) != row.reference) row.factor = row.entropy_factor = 0;
  row.reference = top;
  return row;
}

void grad(const TokenTransform& options, DType dtype, const void* x, int64_t columns, const GradRow& stored) {
  const bool is_coarse = __builtin_fabs(stored.reference) >= rpo::kCoarse && stored.reference - stored.reference == 0;
  const GradRow row = is_coarse ? with_exact_max(options, dtype, x, columns, stored) : stored;
  if (options.softcap > 0) return grad_with<SoftCapped>(options, dtype, x, columns, row);
  if (kFused && __builtin_fabs(row.reference) < kHuge) return grad_with<Scaled>(options, dtype, x, columns, row);
  grad_with<Centered>(options, dtype, x, columns, row);
}

}  // namespace

#define RPO_NAME_(isa) isa_##isa
#define RPO_NAME(isa) RPO_NAME_(isa)
#define RPO_STRING_(isa) #isa
#define RPO_STRING(isa) RPO_STRING_(isa)

namespace rpo {
extern const InstructionSet RPO_NAME(RPO_ISA);
const InstructionSet RPO_NAME(RPO_ISA) = {RPO_STRING(RPO_ISA), stats, grad, largest_logit};
}  // namespace rpo
