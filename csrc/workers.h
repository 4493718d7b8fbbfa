// The threads that run the items of a task; defined in native.cpp.
#pragma once

#include <cstdint>

namespace rpo {

// `parallel(f, arg, threads, 0)` calls f(arg) on each thread of torch's own OpenMP pool; null if torch has none.
struct Workers {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int32_t threads;
};

// Runs run(task, 0) ... run(task, count - 1), on one thread for each `grain` of them or fewer.
void share_out(const Workers& workers, int64_t count, int64_t grain, void (*run)(const void* task, int64_t item),
               const void* task);

}  // namespace rpo
