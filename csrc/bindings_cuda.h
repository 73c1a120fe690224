// The CUDA kernels for Python. Structs arrive as tuples of integers, in the order of their fields in cuda.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "cuda.h"

namespace nexus::cuda {

using Integers = std::vector<int64_t>;

inline Table table_from(const std::array<int64_t, 7>& a) {
  return {pointer<const Segment>(a[0]), pointer<const int32_t>(a[1]), pointer<const int64_t>(a[2]), a[3], a[4], a[5], a[6]};
}

inline DTypes dtypes_from(const std::array<int, 2>& a) { return {DType(a[0]), DType(a[1])}; }

inline Cycle cycle_from(const std::array<int64_t, 8>& a) {
  return {pointer<const Hyper>(a[0]), pointer<double>(a[1]),  pointer<double>(a[2]), pointer<int64_t>(a[3]),
          pointer<double>(a[4]),      pointer<int64_t>(a[5]), a[6],                  a[7]};
}

inline MicroBatch micro_batch_from(const Integers& norms, const std::array<int64_t, 3>& rest) {
  if (norms.size() > kMaxNorms) throw std::invalid_argument("too many norms");
  MicroBatch made{{}, int64_t(norms.size()), rest[0], pointer<const float>(rest[1]), pointer<const float>(rest[2])};
  for (size_t i = 0; i < norms.size(); ++i) made.norms[i] = pointer<const double>(norms[i]);
  return made;
}

inline Where where_from(const std::array<int64_t, 4>& a) {
  return {int(a[0]), pointer<void>(a[1]), a[2] != 0, a[3] != 0};
}

inline void define_cuda(pybind11::module_& m) {
  m.attr("CUDA_MAX_NORMS") = kMaxNorms;
  m.def("cuda_why_not", &why_not);
  m.def("cuda_capture_id", [](int64_t stream) { return capture_id(pointer<void>(stream)); });
  m.def("cuda_sq_norm", [](const std::array<int64_t, 7>& table, int64_t partials, int64_t norm, int64_t arrivals,
                           const std::array<int64_t, 4>& where) {
    sq_norm(table_from(table), pointer<double>(partials), pointer<double>(norm), pointer<uint32_t>(arrivals),
            where_from(where));
  });
  m.def("cuda_inner_step", [](const std::array<int64_t, 7>& table, const std::array<int, 2>& dtypes,
                              const std::array<int64_t, 8>& cycle, const Integers& norms,
                              const std::array<int64_t, 3>& micro_batch, bool of_parameter,
                              const std::array<int64_t, 4>& where) {
    inner_step(table_from(table), dtypes_from(dtypes), cycle_from(cycle), micro_batch_from(norms, micro_batch),
               of_parameter, where_from(where));
  });
  m.def("cuda_end_walk", [](const std::array<int64_t, 7>& table, const std::array<int, 2>& dtypes,
                            const std::array<int64_t, 8>& cycle, const Integers& norms,
                            const std::array<int64_t, 3>& micro_batch, double share,
                            const std::array<int64_t, 4>& where) {
    end_walk(table_from(table), dtypes_from(dtypes), cycle_from(cycle), micro_batch_from(norms, micro_batch), share,
             where_from(where));
  });
  m.def("cuda_gradients", [](const std::array<int64_t, 7>& table, const std::array<int, 2>& dtypes, int64_t scale,
                             int64_t displacement_sq, int64_t partials, int64_t arrivals,
                             const std::array<int64_t, 4>& where) {
    gradients(table_from(table), dtypes_from(dtypes), pointer<const double>(scale), pointer<double>(displacement_sq),
              pointer<double>(partials), pointer<uint32_t>(arrivals), where_from(where));
  });
  m.def("cuda_outer_step", [](const std::array<int64_t, 7>& table, const std::array<int, 2>& dtypes, bool amsgrad,
                              const std::array<int64_t, 8>& cycle, const Integers& norms,
                              const std::array<int64_t, 3>& micro_batch, bool has_ended, int64_t taken,
                              int64_t displacement_sq, int64_t arrivals, const std::array<int64_t, 4>& where) {
    outer_step(table_from(table), dtypes_from(dtypes), amsgrad, cycle_from(cycle), micro_batch_from(norms, micro_batch),
               has_ended, taken, pointer<double>(displacement_sq), pointer<uint32_t>(arrivals), where_from(where));
  });
}

}  // namespace nexus::cuda

using nexus::cuda::define_cuda;
