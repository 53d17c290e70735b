// In the place of PyTorch's header of this name where the kernels are built for ThreadSanitizer: at::parallel_for on
// threads of the standard library. GCC's OpenMP runtime is not instrumented, so that every fork and join of it, which
// order memory, would be reported as a race.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at::internal {

template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t count = at::get_num_threads();
  if (grain_size > 0) count = std::min(count, divup(end - begin, grain_size));
  const int64_t chunk = divup(end - begin, count);
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      const int64_t first = begin + t * chunk;
      if (first >= end) return;
      try {
        const ThreadIdGuard guard(static_cast<int>(t));
        f(first, std::min(end, first + chunk));
      } catch (...) {
        errors[t] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace at::internal
