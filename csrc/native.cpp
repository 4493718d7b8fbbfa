// The C interface of the native backend: threads share out segments of rows; the kernels are in rows.cpp and head.cpp.
//
// A row is cut into segments of a fixed number of columns. Threads take segments as they become free; results are
// combined in the order of the columns. So the bits do not depend on the number of threads or on their timing.

#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "head.h"
#include "segments.h"
#include "workers.h"

namespace rpo {
#define RPO_DECLARE(isa) extern const InstructionSet isa_##isa;
RPO_DECLARE(avx512) RPO_DECLARE(avx2) RPO_DECLARE(neon) RPO_DECLARE(baseline)
extern const HeadKernels head_avx512bf16, head_emulated;

double transform(const TokenTransform& options, double x) {
  if (options.softcap <= 0) return x * (options.logit_scale / options.temperature);  // the bits of rows.cpp
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

constexpr int64_t kFinishGrain = 256;               // positions
constexpr int64_t kStreamBytes = int64_t(1) << 25;  // a larger result does not fit the caches: it is streamed

// ---- threads

struct Queue {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*run)(const void* task, int64_t item);
  const void* task;
};

void run_items(void* data) {
  Queue& queue = *static_cast<Queue*>(data);
  for (int64_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.count;) queue.run(queue.task, i);
}

void run_on_new_threads(Queue& queue, int threads) {
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(size_t(threads));
    for (int i = 1; i < threads; ++i) helpers.emplace_back(run_items, &queue);
  } catch (const std::exception&) {
    // No more threads or memory available: continue with the threads that were started.
  }
  run_items(&queue);
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
  if (threads <= 1) run_items(&queue);
  else if (workers.parallel) workers.parallel(run_items, &queue, unsigned(threads), 0);
  else run_on_new_threads(queue, threads);
}

namespace {

// Runs task(0) ... task(count - 1), on one thread for each `grain` of them or fewer.
template <class Task>
void for_each(const Workers& workers, int64_t count, int64_t grain, const Task& task) {
  share_out(workers, count, grain, [](const void* t, int64_t item) { (*static_cast<const Task*>(t))(item); }, &task);
}

}  // namespace

extern "C" {

#define RPO_API __attribute__((visibility("default")))

// The instruction sets this machine can run, best first, separated by spaces. "emulated", for tests, is AVX-512 with an
// emulation of the bfloat16 products of head.cpp.
RPO_API const char* rpo_instruction_sets() {
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

// One of `rpo_instruction_sets` or "emulated", or null.
RPO_API const InstructionSet* rpo_instruction_set(const char* name) {
#if defined(RPO_HAVE_AVX512BF16)
  static const InstructionSet avx512bf16{"avx512bf16", isa_avx512.stats, isa_avx512.grad, isa_avx512.largest,
                                &head_avx512bf16};
  static const InstructionSet emulated{"emulated", isa_avx512.stats, isa_avx512.grad, isa_avx512.largest,
                              &head_emulated};
#endif
  static const InstructionSet* const built[] = {
#if defined(RPO_HAVE_AVX512BF16)
      &avx512bf16, &emulated,
#endif
#if defined(RPO_HAVE_AVX512)
      &isa_avx512, &isa_avx2, &isa_baseline,
#elif defined(RPO_HAVE_NEON)
      &isa_neon,
#else
      &isa_baseline,
#endif
  };
  for (const InstructionSet* isa : built)
    if (std::strcmp(isa->name, name) == 0) return isa;
  return nullptr;
}

// Asks for huge pages for newly mapped memory: page faults otherwise cost more than computing the gradient.
RPO_API void rpo_use_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t first = (uintptr_t(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a hint
#endif
}

// Returns 0, or 1 if the segments' statistics could not be allocated.
RPO_API int rpo_row_stats(const InstructionSet* isa, const Workers* workers, const Logits* logits, int32_t continued,
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
    isa->stats(l.options, l.dtype, x, s.columns, out->wants_all_sums(), &partial);
    if (std::isnan(partial.sumexp)) rescan(l, p.row, s, partial);
    if (out->max_before_label) partial.max_before_label = segment_max_before_label(isa, l, p, s, partial);
  });
  for_each(*workers, positions, kFinishGrain, [&](int64_t i) {
    finish(l, Position(l, i / l.time, i % l.time), &partials[i * segments], continued != 0, *out);
  });
  return 0;
}

RPO_API void rpo_row_grad(const InstructionSet* isa, const Workers* workers, const Logits* logits, const Grad* grad) {
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
    isa->grad(l.options, l.dtype, p.row + s.first * size, s.columns, row);
  });
}

// ---- kernels of the LM head (head.h); only for instruction sets with `rpo_has_head`.

RPO_API int rpo_has_head(const InstructionSet* isa) { return isa->head != nullptr; }

RPO_API void rpo_head_pack_hidden(const InstructionSet* isa, const Workers* workers, const Matrix* hidden,
                                  const float* factor, uint32_t* lanes, uint32_t* elements) {
  isa->head->pack_hidden(*workers, *hidden, factor, lanes, elements);
}

RPO_API void rpo_head_pack_weight(const InstructionSet* isa, const Workers* workers, const Matrix* weight,
                                  uint32_t* rows, uint32_t* pairs) {
  isa->head->pack_weight(*workers, *weight, rows, pairs);
}

RPO_API void rpo_head_forward(const InstructionSet* isa, const Workers* workers, const HeadTile* tile,
                              const RunningRows* rows) {
  isa->head->forward(*workers, *tile, *rows);
}

RPO_API void rpo_head_backward(const InstructionSet* isa, const Workers* workers, const HeadTile* tile,
                               const FinishedRows* rows) {
  isa->head->backward(*workers, *tile, *rows);
}

RPO_API void rpo_head_weight_gradient(const InstructionSet* isa, const Workers* workers, const HeadTile* tile,
                                      const WeightGradient* gradient) {
  isa->head->weight_gradient(*workers, *tile, *gradient);
}

RPO_API void rpo_head_bias_gradient(const InstructionSet* isa, const Workers* workers, const HeadTile* tile,
                                    const float* factor, const int32_t* index, float* out) {
  isa->head->bias_gradient(*workers, *tile, factor, index, out);
}

}  // extern "C"
