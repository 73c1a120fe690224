// The extension nexus_fused._C: addresses, sizes, a thread count or a stream in, nothing of torch.
//
// A CPU function of a table takes the address of table.Table.rows with its numbers of rows and chunks, and the addresses
// of float64 scalars and buffers as cycle.Cycle lays them out. The instruction set is chosen once, when the module is
// imported. The CUDA functions are in bindings_cuda.h.

#include <pybind11/pybind11.h>

#include <string>

#define NEXUS_ISA baseline
#include "cpu.h"
#include "look.h"
#if defined(NEXUS_HAVE_CUDA)
#include "bindings_cuda.h"
#endif

#if defined(NEXUS_HAVE_X86_VARIANTS)
#include <cpuid.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

NEXUS_DECLARE_KERNELS(baseline)
#if defined(NEXUS_HAVE_X86_VARIANTS)
NEXUS_DECLARE_KERNELS(avx2)
NEXUS_DECLARE_KERNELS(avx512)
#endif

namespace py = pybind11;
using namespace nexus;

namespace {

struct Kernels {
  const char* name;
  decltype(&baseline::sum_squares) sum_squares;
  decltype(&baseline::inner_step) inner_step;
  decltype(&baseline::end_walk) end_walk;
  decltype(&baseline::gradients) gradients;
  decltype(&baseline::outer_step) outer_step;
};

constexpr Kernels kVariants[] = {
#if defined(NEXUS_HAVE_X86_VARIANTS)
    {"avx512", avx512::sum_squares, avx512::inner_step, avx512::end_walk, avx512::gradients, avx512::outer_step},
    {"avx2", avx2::sum_squares, avx2::inner_step, avx2::end_walk, avx2::gradients, avx2::outer_step},
#endif
    {"baseline", baseline::sum_squares, baseline::inner_step, baseline::end_walk, baseline::gradients, baseline::outer_step},
};

#if defined(NEXUS_HAVE_X86_VARIANTS)
// Conversions of float16. __builtin_cpu_supports does not know the word in clang before 19.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool runs_here(const std::string& name) {
#if defined(NEXUS_HAVE_X86_VARIANTS)
  __builtin_cpu_init();
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return name == "baseline";
}

const Kernels* best() {
  const Kernels* variant = kVariants;
  while (!runs_here(variant->name)) ++variant;
  return variant;
}

const Kernels* kernels = best();

double sq_norm(int64_t rows, int64_t n, int64_t chunks, int64_t partials, int threads) {
  py::gil_scoped_release released;
  kernels->sum_squares(pointer<const Segment>(rows), n, chunks, pointer<double>(partials), threads);
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += pointer<const double>(partials)[chunk];
  return sum;
}

void advance(int64_t hyper, int64_t factor, int64_t sums, int64_t totals, int64_t groups, int64_t position,
             double sq_norm, double grad_scale, bool found_inf) {
  const baseline::InnerStep step(sq_norm, found_inf);
  for (int64_t group = 0; group < groups; ++group) {
    const Hyper& h = pointer<const Hyper>(hyper)[group];
    const double length = step.length(h);
    pointer<double>(factor)[group] = step.factor(h);
    pointer<double>(sums)[group] += length;
    pointer<double>(sums)[groups + group] += length * length;
  }
  pointer<double>(totals)[0] += !step.taken;
  pointer<double>(sums)[3 * groups + position] = step.unscaled(grad_scale);
}

void inner_step(int64_t rows, int64_t n, int64_t chunks, int dtype, int of_displacement, int64_t factor,
                bool of_parameter, int64_t moves, int64_t lost_moves, int threads) {
  py::gil_scoped_release released;
  kernels->inner_step(pointer<const Segment>(rows), n, chunks, {DType(dtype), DType(of_displacement)},
                      pointer<const double>(factor), of_parameter, pointer<int64_t>(moves), pointer<int64_t>(lost_moves),
                      threads);
}

void end_walk(int64_t rows, int64_t n, int64_t chunks, int dtype, int of_displacement, int64_t factor, double share,
              int threads) {
  py::gil_scoped_release released;
  kernels->end_walk(pointer<const Segment>(rows), n, chunks, {DType(dtype), DType(of_displacement)},
                    pointer<const double>(factor), share, threads);
}

void gradients(int64_t rows, int64_t n, int64_t chunks, int dtype, int of_displacement, int64_t scale,
               int64_t displacement_sq, int64_t partials, int threads) {
  py::gil_scoped_release released;
  kernels->gradients(pointer<const Segment>(rows), n, chunks, {DType(dtype), DType(of_displacement)},
                     pointer<const double>(scale), pointer<double>(displacement_sq), pointer<double>(partials), threads);
}

void outer_step(int64_t rows, int64_t n, int64_t chunks, int dtype, int of_displacement, bool has_ended, int64_t hyper,
                int64_t factor, int64_t walk_length, int64_t displacement_sq, int64_t partials, int threads) {
  py::gil_scoped_release released;
  kernels->outer_step(pointer<const Segment>(rows), n, chunks, {DType(dtype), DType(of_displacement)}, has_ended,
                      pointer<const Hyper>(hyper), pointer<const double>(factor), pointer<const double>(walk_length),
                      pointer<double>(displacement_sq), pointer<double>(partials), threads);
}

py::list instruction_sets() {
  py::list names;
  for (const Kernels& variant : kVariants)
    if (runs_here(variant.name)) names.append(variant.name);
  return names;
}

void set_instruction_set(const std::string& name) {
  for (const Kernels& variant : kVariants)
    if (name == variant.name && runs_here(name)) {
      kernels = &variant;
      return;
    }
  throw py::value_error("instruction set '" + name + "' was not built or does not run on this processor");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("sq_norm", &sq_norm);
  m.def("advance", &advance);
  m.def("inner_step", &inner_step);
  m.def("end_walk", &end_walk);
  m.def("gradients", &gradients);
  m.def("outer_step", &outer_step);
  m.def("instruction_sets", &instruction_sets, "Those that were built and run on this processor, best first.");
  m.def("instruction_set", [] { return kernels->name; }, "The one in use.");
  m.def("set_instruction_set", &set_instruction_set, "For tests: results must be the same with each.");
  define_look(m);
  m.attr("CUDA_TARGETS") = NEXUS_CUDA_TARGETS;  // architectures, as CMake names them; empty without CUDA kernels
#if defined(NEXUS_HAVE_CUDA)
  define_cuda(m);
#endif
// The names of a struct's members, from their macro.
#define NEXUS_TEXT_OF(...) #__VA_ARGS__
#define NEXUS_TEXT(...) NEXUS_TEXT_OF(__VA_ARGS__)
  m.attr("SEGMENT") = NEXUS_TEXT(NEXUS_SEGMENT);
  m.attr("HYPER") = NEXUS_TEXT(NEXUS_HYPER);
  m.attr("CHUNK_ELEMENTS") = kChunk;
#if defined(_OPENMP)
  m.attr("OPENMP") = _OPENMP;
#else
  m.attr("OPENMP") = 0;
#endif
}
