// The CUDA kernels as the host sees them. Addresses are the device's; `stream` is a CUstream. Launches are asynchronous;
// one that fails throws std::runtime_error with the kernel's name and the device.
#pragma once

#include <string>

#include "nexus_math.h"

namespace nexus::cuda {

constexpr int kMaxNorms = 8;  // tables of one optimizer that a MicroBatch can bring

// table.Table as its kernels read it. row_of_chunk [chunks]; starts [groups + 1][2]: first row and first chunk of each
// group and of the end; touch: see Table.on_device; parts: see Table.
struct Table {
  const Segment* rows;
  const int32_t* row_of_chunk;
  const int64_t* starts;
  int64_t groups, chunks, touch, parts;
};

// cycle.Cycle: `sums` and `counts` of the running cycle, and the memory that keeps them when it is finished.
struct Cycle {
  const Hyper* hyper;
  double *sums, *totals;
  int64_t* counts;
  double* finished_sums;
  int64_t* finished_counts;
  int64_t groups, inner_steps;
};

// cycle.MicroBatch: ‖g‖² is the sum of n_norms numbers, in their order; none: there is no last gradient.
struct MicroBatch {
  const double* norms[kMaxNorms];
  int64_t n_norms, position;
  const float *grad_scale, *found_inf;
};

// What a launch goes to. first, last: whether the table is the first or last one of its device.
struct Where {
  int device;
  void* stream;
  bool first, last;
};

// Empty if the kernels run on a device, else why not and what to do.
std::string why_not(int device);

// Number of the graph capture that a stream is in; 0: none.
uint64_t capture_id(void* stream);

// sq_norm, partials [chunks]; arrivals: one zero, and zero again afterwards.
void sq_norm(const Table& table, double* partials, double* sq_norm, uint32_t* arrivals, const Where& where);

void inner_step(const Table& table, DTypes dtypes, const Cycle& cycle, const MicroBatch& micro_batch, bool of_parameter,
                const Where& where);

void end_walk(const Table& table, DTypes dtypes, const Cycle& cycle, const MicroBatch& micro_batch, double share,
              const Where& where);

// D · scale into what the rows have as gradients, in the parameters' dtype; adds ‖D‖² to displacement_sq. scale,
// displacement_sq: of each group; partials [chunks]. The table is that of Table.on_device_with.
void gradients(const Table& table, DTypes dtypes, const double* scale, double* displacement_sq, double* partials,
               uint32_t* arrivals, const Where& where);

// displacement_sq [chunks]; taken: inner steps of this cycle. has_ended: after end_walk; the table is then that of
// Table.on_device_after_walk, and micro_batch has no norms.
void outer_step(const Table& table, DTypes dtypes, bool amsgrad, const Cycle& cycle, const MicroBatch& micro_batch,
                bool has_ended, int64_t taken, double* displacement_sq, uint32_t* arrivals, const Where& where);

}  // namespace nexus::cuda
