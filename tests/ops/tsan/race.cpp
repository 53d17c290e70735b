// A race on purpose: ThreadSanitizer must report it, or that it reports none of the kernels says nothing.
#include <ATen/Parallel.h>

extern "C" int64_t race(int64_t count) {
  int64_t calls = 0;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { calls += end - begin; });
  return calls;
}
