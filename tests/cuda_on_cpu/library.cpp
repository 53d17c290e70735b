// torch.ops.pointcmt_cuda_on_cpu: the operators of csrc/*_cuda.cu, run on a CPU.
#include "schemas.h"

#include "cuda_on_cpu/host.h"

TORCH_LIBRARY(pointcmt_cuda_on_cpu, m) {
  pointcmt::define_schemas(m);
  m.def("shared_memory_per_block(int bytes) -> ()", [](int64_t bytes) {
    cuda_on_cpu::shared_memory_per_block = static_cast<size_t>(bytes);
  });
}
