// The C interface of the native backend: which rows there are, who works on them, and what their parts add up to.
//
// A row is cut into segments of a fixed number of columns. Threads take segments as they come; results are combined in
// the order of the columns. So the bits do not depend on the number of threads, nor on who did what.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "head.h"
#include "rows.h"

namespace rpo {
#define RPO_DECLARE(level) extern const Level level_##level;
RPO_DECLARE(avx512) RPO_DECLARE(avx2) RPO_DECLARE(neon) RPO_DECLARE(baseline)
extern const HeadKernels head_avx512bf16, head_emulated;

double transform(const TokenTransform& options, double x) {
  if (options.softcap <= 0) return x * (options.logit_scale / options.temperature);  // to the bit what rows.cpp computes
  return options.softcap * std::tanh(x * options.logit_scale / options.softcap) / options.temperature;
}

double transform_slope(const TokenTransform& options, double x) {
  const double slope = options.logit_scale / options.temperature;
  if (options.softcap <= 0) return slope;
  const double cosh = std::cosh(options.logit_scale * x / options.softcap);
  return slope / (cosh * cosh);
}
}  // namespace rpo

namespace {

using namespace rpo;

constexpr int64_t kSegment = 32768;                // columns; also the least work that is worth a thread
constexpr int64_t kFinishGrain = 256;              // positions
constexpr int64_t kStreamBytes = int64_t(1) << 25;  // a result larger than this leaves the caches anyway
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- what Python passes (native.py mirrors these). Strides are in elements; [batch, time] tensors without are dense.

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
  float *weighted, *total, *top_before, *squares;  // null where not wanted

  bool wants_sums() const { return weighted || total || squares; }
};

struct Grad {
  const float *logp, *max, *sumexp, *grad_logps;
  int64_t grad_logps_stride[2];
  void* out;
  int64_t out_stride[2];
  DType out_dtype;
  Active active;
  const float *entropy, *grad_entropy;  // null without
  int64_t grad_entropy_stride[2];
};

// ---- threads

struct Queue {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*run)(const void* task, int64_t item);
  const void* task;
};

void drain(void* data) {
  Queue& queue = *static_cast<Queue*>(data);
  for (int64_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.count;) queue.run(queue.task, i);
}

void drain_on_new_threads(Queue& queue, int threads) {
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(size_t(threads));
    for (int i = 1; i < threads; ++i) helpers.emplace_back(drain, &queue);
  } catch (const std::exception&) {
    // No more threads or memory to be had: those there are do the work.
  }
  drain(&queue);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void rpo::share_out(const Workers& workers, int64_t count, int64_t grain, void (*run)(const void*, int64_t),
                    const void* task) {
  Queue queue;
  queue.count = count;
  queue.run = run;
  queue.task = task;
  const int threads = int(std::min<int64_t>(workers.threads, count / grain));
  if (threads <= 1) drain(&queue);
  else if (workers.parallel) workers.parallel(drain, &queue, unsigned(threads), 0);
  else drain_on_new_threads(queue, threads);
}

namespace {

// Runs task(0) ... task(count - 1), on one thread for each `grain` of them or fewer.
template <class Task>
void for_each(const Workers& workers, int64_t count, int64_t grain, const Task& task) {
  share_out(workers, count, grain, [](const void* t, int64_t item) { (*static_cast<const Task*>(t))(item); }, &task);
}

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
  double max = -kInfinity, label_logit = -kInfinity, sumexp = 0, weighted = 0, total = 0, top_before = -kInfinity,
         squares = 0;
};

double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }  // NaN if either is

// Adds sums taken against `reference`; `row.max` is final.
template <class Sums>
void add(Row& row, double reference, const Sums& sums) {
  const double finite_max = row.max == -kInfinity ? 0 : row.max;
  const double away = sums.sumexp > 0 ? reference - finite_max : 0, weight = std::exp(away);
  row.sumexp += sums.sumexp * weight;
  row.weighted += (sums.weighted + sums.sumexp * away) * weight;
  row.total += sums.total;
  row.squares += sums.squares * weight * weight;
}

// Largest logit and sum of a segment in which there is a NaN or an infinity.
void rescan(const Logits& l, const char* row, const Segment& s, Partial& partial) {
  double top = -kInfinity;
  partial.total = 0;
  for (int64_t i = s.first; i < s.first + s.columns; ++i) {
    const double x = element(row, l.dtype, i);
    top = larger(top, x);
    partial.total += transform(l.options, x);
  }
  partial.top = float(top);
}

// Statistics are stored in float. Where its step outweighs a softmax, z itself counts as rounded to it.
double stored(double z) { return std::fabs(z) < rpo::kCoarse ? z : double(float(z)); }

Row combine(const Logits& l, const Position& p, const Partial* partials, const Row& running) {
  Row row;
  const Partial* const end = partials + segments_of(l);
  row.max = running.max;
  for (const Partial* i = partials; i < end; ++i) row.max = larger(row.max, transform(l.options, i->top));
  row.max = double(float(row.max));  // as it is stored: the sums are relative to that
  add(row, running.max, running);
  for (const Partial* i = partials; i < end; ++i) add(row, stored(i->reference), *i);
  row.top_before = running.top_before;
  for (const Partial* i = partials; i < end; ++i)
    row.top_before = larger(row.top_before, transform(l.options, i->top_before));

  row.label_logit = running.label_logit;
  const int64_t column = p.label - l.first_column;
  if (column >= 0 && column < l.columns)
    row.label_logit = larger(row.label_logit, stored(transform(l.options, element(p.row, l.dtype, column))));
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
      if (out.weighted) running.weighted = out.weighted[i];
      if (out.total) running.total = out.total[i];
      if (out.top_before) running.top_before = out.top_before[i];
      if (out.squares) running.squares = out.squares[i];
    }
    row = combine(l, p, partials, running);
    logp = row.label_logit - row.max - std::log(row.sumexp);
    if (logp > 0) logp = 0;  // by rounding alone
  }
  out.logp[i] = float(logp);
  out.max[i] = float(row.max);
  out.sumexp[i] = float(row.sumexp);
  out.label_logit[i] = float(row.label_logit);
  if (out.weighted) out.weighted[i] = float(row.weighted);
  if (out.total) out.total[i] = float(row.total);
  if (out.top_before) out.top_before[i] = float(row.top_before);
  if (out.squares) out.squares[i] = float(row.squares);
}

// Largest logit of a segment among the columns before the label's.
float top_before_label(const Level* level, const Logits& l, const Position& p, const Segment& s, const Partial& partial) {
  const int64_t column = p.label - l.first_column - s.first;
  if (column >= s.columns) return partial.top;
  return column > 0 ? level->largest(l.dtype, p.row + s.first * element_size(l.dtype), column) : -kInfinity;
}

// ---- gradient

double quiet(double x) { return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x; }  // see pack_bfloat16

GradRow grad_row(const Logits& l, const Position& p, const Segment& s, const Grad& g) {
  const int64_t i = p.b * l.time + p.t, column = p.label - l.first_column - s.first;
  const double outer = g.grad_logps[p.b * g.grad_logps_stride[0] + p.t * g.grad_logps_stride[1]];
  GradRow row{};
  row.reference = quiet(g.max[i]);
  const double unit = -transform_slope(l.options, 0) / g.sumexp[i];
  row.factor = quiet(outer * unit);
  double label_entropy = 0;  // the entropy's gradient at the label, before the transform's slope
  if (g.entropy) {
    const double inner = g.grad_entropy[p.b * g.grad_entropy_stride[0] + p.t * g.grad_entropy_stride[1]];
    const double logp = std::max(double(g.logp[i]), -1e4);
    row.tilt = quiet(inner * unit);
    row.offset = g.entropy[i] - std::log(g.sumexp[i]);
    label_entropy = -inner * std::exp(logp) * (logp + g.entropy[i]);
  }
  row.out_dtype = g.out_dtype;
  row.active = g.active;
  if (row.active.mask) row.active.mask += s.first;
  row.label_column = column >= 0 && column < s.columns ? column : -1;
  if (row.label_column >= 0) {
    const double slope = transform_slope(l.options, element(p.row, l.dtype, s.first + column));
    row.label_grad = float(quiet((-std::expm1(double(g.logp[i])) * outer + label_entropy) * slope));
  }
  return row;
}

}  // namespace

extern "C" {

#define RPO_API __attribute__((visibility("default")))

// The vector levels this machine can run, best first, separated by spaces. Beside them, "emulated" is AVX-512 with the
// head level's products emulated, for tests.
RPO_API const char* rpo_levels() {
#if defined(RPO_HAVE_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // such CPUs all have F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(RPO_HAVE_AVX512BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512bf16 avx512 avx2 baseline";
#endif
  return avx512 ? "avx512 avx2 baseline" : avx2 ? "avx2 baseline" : "baseline";
#elif defined(RPO_HAVE_NEON)
  return "neon";
#else
  return "baseline";
#endif
}

// One of `rpo_levels` or "emulated", or null.
RPO_API const Level* rpo_level(const char* name) {
#if defined(RPO_HAVE_AVX512BF16)
  static const Level avx512bf16{"avx512bf16", level_avx512.stats, level_avx512.grad, level_avx512.largest,
                                &head_avx512bf16};
  static const Level emulated{"emulated", level_avx512.stats, level_avx512.grad, level_avx512.largest,
                              &head_emulated};
#endif
  static const Level* const built[] = {
#if defined(RPO_HAVE_AVX512BF16)
      &avx512bf16, &emulated,
#endif
#if defined(RPO_HAVE_AVX512)
      &level_avx512, &level_avx2, &level_baseline,
#elif defined(RPO_HAVE_NEON)
      &level_neon,
#else
      &level_baseline,
#endif
  };
  for (const Level* level : built)
    if (std::strcmp(level->name, name) == 0) return level;
  return nullptr;
}

// Asks for large pages under memory that has just been mapped: its first touch otherwise costs more than the gradient.
RPO_API void rpo_use_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t first = (uintptr_t(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // refused: as before
#endif
}

// Returns 0, or 1 if memory for the parts ran out.
RPO_API int rpo_row_stats(const Level* level, const Workers* workers, const Logits* logits, int32_t continued,
                          const Stats* out) {
  const Logits& l = *logits;
  const int64_t positions = l.batch * l.time, segments = segments_of(l);
  const std::unique_ptr<Partial[]> partials(new (std::nothrow) Partial[size_t(positions * segments)]);
  if (!partials) return 1;
  for_each(*workers, positions * segments, grain_of(l), [&](int64_t item) {
    const Segment s(l, item);
    const Position p(l, s.position / l.time, s.position % l.time);
    if (!p.is_scored) return;
    const char* x = p.row + s.first * element_size(l.dtype);
    Partial& partial = partials[item];
    level->stats(l.options, l.dtype, x, s.columns, out->wants_sums(), &partial);
    if (std::isnan(partial.sumexp)) rescan(l, p.row, s, partial);
    if (out->top_before) partial.top_before = top_before_label(level, l, p, s, partial);
  });
  for_each(*workers, positions, kFinishGrain, [&](int64_t i) {
    finish(l, Position(l, i / l.time, i % l.time), &partials[i * segments], continued != 0, *out);
  });
  return 0;
}

RPO_API void rpo_row_grad(const Level* level, const Workers* workers, const Logits* logits, const Grad* grad) {
  const Logits& l = *logits;
  const Grad& g = *grad;
  const int64_t size = element_size(l.dtype), out_size = element_size(g.out_dtype), rows = l.batch * l.time;
  const bool stream = g.out != l.data && !g.active.mask && rows * l.columns * out_size > kStreamBytes;
  for_each(*workers, rows * segments_of(l), grain_of(l), [&](int64_t item) {
    const Segment s(l, item);
    const int64_t b = s.position / l.time, t = s.position % l.time;
    char* out = static_cast<char*>(g.out) + (b * g.out_stride[0] + t * g.out_stride[1] + s.first) * out_size;
    const Position p(l, b, t + l.shift);
    if (!p.is_scored) {
      std::memset(out, 0, size_t(s.columns * out_size));
      return;
    }
    GradRow row = grad_row(l, p, s, g);
    row.stream = stream;
    row.out = out;
    level->grad(l.options, l.dtype, p.row + s.first * size, s.columns, row);
  });
}

// ---- the head level: see head.h. Only for levels that have it.

RPO_API int rpo_has_head(const Level* level) { return level->head != nullptr; }

RPO_API void rpo_head_pack_hidden(const Level* level, const Workers* workers, const Matrix* hidden, const float* factor,
                                  uint32_t* lanes, uint32_t* elements) {
  level->head->pack_hidden(*workers, *hidden, factor, lanes, elements);
}

RPO_API void rpo_head_pack_weight(const Level* level, const Workers* workers, const Matrix* weight, uint32_t* rows,
                                  uint32_t* pairs) {
  level->head->pack_weight(*workers, *weight, rows, pairs);
}

RPO_API void rpo_head_forward(const Level* level, const Workers* workers, const HeadTile* tile,
                              const RunningRows* rows) {
  level->head->forward(*workers, *tile, *rows);
}

RPO_API void rpo_head_backward(const Level* level, const Workers* workers, const HeadTile* tile,
                               const FinishedRows* rows) {
  level->head->backward(*workers, *tile, *rows);
}

RPO_API void rpo_head_weight_gradient(const Level* level, const Workers* workers, const HeadTile* tile,
                                      const WeightGradient* gradient) {
  level->head->weight_gradient(*workers, *tile, *gradient);
}

RPO_API void rpo_head_bias_gradient(const Level* level, const Workers* workers, const HeadTile* tile,
                                    const float* factor, const int32_t* index, float* out) {
  level->head->bias_gradient(*workers, *tile, factor, index, out);
}

}  // extern "C"
