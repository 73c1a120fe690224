// The CPU kernels, declared once for each instruction set they are compiled for.
#pragma once

#include "nexus_math.h"

#define NEXUS_DECLARE_KERNELS(isa)                                                                                     \
  namespace nexus::isa {                                                                                               \
  void sum_squares(const Segment* segments, int64_t n, int64_t chunks, double* partials, int threads);                 \
  void inner_step(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* factor,             \
                  bool of_parameter, int64_t* moves, int64_t* lost_moves, int threads);                                \
  void end_walk(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* factor, double share, \
                int threads);                                                                                          \
  void gradients(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* scale,               \
                 double* displacement_sq, double* partials, int threads);                                              \
  void outer_step(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, bool has_ended,                   \
                  const Hyper* hyper, const double* factor, const double* walk_length, double* displacement_sq,        \
                  double* partials, int threads);                                                                      \
  }
