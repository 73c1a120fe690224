// csrc/cuda.cu, with this folder's cuda_runtime.h instead of the toolkit's, as a Python module for tests.
#define NEXUS_CUDA_TARGETS "tests"
#include "cuda.cu"

#include "bindings_cuda.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
  m.attr("CUDA_TARGETS") = NEXUS_CUDA_TARGETS;
  define_cuda(m);
  m.def("launches", [] { return fibers::launches; }, "How many kernels were started so far.");
  m.def("set_versions", [](int driver, int runtime) { driver_version = driver, runtime_version = runtime; });
  m.def("set_error", [](int error) { next_error = cudaError_t(error); }, "What functions that may fail return.");
}
