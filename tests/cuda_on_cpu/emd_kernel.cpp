// Runs csrc/emd_kernel.cuh, the body of the CUDA EMD, on a CPU. A shared library for test_emd_kernel.py.
#include "cuda_on_cpu/device.h"

#include "emd_kernel.cuh"

#include <vector>

extern "C" void emd_kernel_on_cpu(const double* x, const double* y, int n, double tolerance, int64_t most_rows,
                                  int threads, unsigned seed, double* distance, double* bound, int64_t* assignment,
                                  int64_t* statistics) {
  using namespace pointcmt::emd;
  std::vector<float4> objects(n);
  std::vector<double> others((n * device::kOtherBytes + 7) / 8 + 2);
  char* start = reinterpret_cast<char*>(others.data());
  start += (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
  const device::Arrays arrays = device::carve(reinterpret_cast<char*>(objects.data()), start, n);
  device::Scratch scratch;
  const device::Problem<double> problem{x,          y, distance,  bound, assignment,
                                        statistics, n, tolerance, most_rows};
  cuda_on_cpu::run_block(unsigned(threads), seed, [&] { device::Block<double>(problem, arrays, scratch).run(); });
}
