// CUDA kernels: squared norm, inner step, displacement, fused outer step, over a table of segments; one launch each.
//
// A grid of as many blocks as the chip holds walks the chunks of kChunk elements. A block works on one chunk at a time,
// each thread on 16 bytes of every operand at a time. What is summed is summed per chunk, by threads in a fixed order,
// and over chunks by the last block that finishes, in their order: results repeat bit for bit and depend neither on the
// grid nor on alignment. The scalars of a cycle are read by every block and written by one: the host is never asked.

#define NEXUS_ISA cuda
#include "cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

namespace nexus::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Memory. The update kernels read everything for the last time in a while, and say so to the cache (ld.cs, st.cs); the
// norm's gradients are read again at once, from the last chunk to the first, so that the end is still in L2. All are
// intrinsics for global memory: a plain access through an address of the table would be generic.

template <bool stream, bool aligned, class X, int n>
__device__ __forceinline__ void load(const X* from, X (&to)[n]) {
  if constexpr (aligned && n > 1) {
    static_assert(n * sizeof(X) % sizeof(uint4) == 0, "16 bytes at a time");
    uint4 words[n * sizeof(X) / sizeof(uint4)];
#pragma unroll
    for (int i = 0; i < int(sizeof words / sizeof(uint4)); ++i) {
      const uint4* word = reinterpret_cast<const uint4*>(from) + i;
      words[i] = stream ? __ldcs(word) : __ldg(word);
    }
    memcpy(to, words, sizeof words);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = stream ? __ldcs(from + i) : __ldg(from + i);
  }
}

template <bool aligned, class X, int n>
__device__ __forceinline__ void store(X* to, const X (&from)[n]) {
  if constexpr (aligned && n > 1) {
    uint4 words[n * sizeof(X) / sizeof(uint4)];
    memcpy(words, from, sizeof words);
#pragma unroll
    for (int i = 0; i < int(sizeof words / sizeof(uint4)); ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) __stcs(to + i, from[i]);
  }
}

template <class... Pointers>
__device__ __forceinline__ bool all_aligned(const Pointers*... pointers) {
  return ((... | reinterpret_cast<uintptr_t>(pointers)) & 15) == 0;
}

// Calls work.apply<width, batch, aligned>(i) so that each of n elements is worked on once: `batch` times `width` of
// them, kThreads · width apart, from element i. Which thread works on an element does not depend on `aligned`.
template <int width, int batch, bool aligned, class Work>
__device__ __forceinline__ void for_each(Work& work, int n) {
  constexpr int stride = kThreads * width;
  const int whole = n / width * width;
  int i = threadIdx.x * width;
#pragma unroll 1  // `batch` decides what is in flight; more copies of the work would only take registers
  for (; i + (batch - 1) * stride < whole; i += batch * stride) work.template apply<width, batch, aligned>(i);
  if constexpr (batch > 1) {
#pragma unroll 1
    for (; i < whole; i += stride) work.template apply<width, 1, aligned>(i);
  }
#pragma unroll 1
  for (i = whole + threadIdx.x; i < n; i += kThreads) work.template apply<1, 1, false>(i);
}

template <class T, int batch, class Work>
__device__ __forceinline__ void for_each_element(Work& work, int n, bool aligned) {
  constexpr int width = sizeof(uint4) / sizeof(typename T::Storage);
  if (aligned)
    for_each<width, batch, true>(work, n);
  else
    for_each<width, 1, false>(work, n);
}

// Sums

// The block's sum in a fixed order, for all of its threads.
template <class X>
__device__ X block_sum(X value) {
  __shared__ X of_warp[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  X sum = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
  __syncthreads();  // before `of_warp` is written again
  return sum;
}

// Σ partials[begin … end), which other blocks may have written, in an order that only their number decides.
__device__ double sum_of(const double* partials, int64_t begin, int64_t end) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += __ldcg(partials + i);
  return block_sum(sum);
}

// Whether this block is the last of the grid to come here; it then sees what all the others wrote.
__device__ bool is_last_block(uint32_t* arrivals) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    if (last) *arrivals = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Rows

__device__ __forceinline__ bool is_touched(const Segment& row, int64_t touch) {
  return touch == 2 ? row.touched != 0 : touch == 1 && row.grad != 0;
}

// Part of a row that one block works on: from element `begin`, n elements.
struct Chunk {
  const Segment& row;
  int64_t begin;
  int n;

  __device__ Chunk(const Table& table, int64_t chunk)
      : row(table.rows[table.row_of_chunk[chunk]]),
        begin((chunk - row.chunk) * kChunk),
        n(int(row.length - begin < kChunk ? row.length - begin : kChunk)) {}

  template <class X>
  __device__ X* at(int64_t address) const {
    return address ? pointer<X>(address) + begin : nullptr;
  }
};

// Squared norm

template <class T>
struct SumSquares {
  const typename T::Storage* g;
  double sum;

  template <int width, int batch, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    typename T::Storage values[batch][width];
#pragma unroll
    for (int b = 0; b < batch; ++b) load<false, aligned>(g + i + b * kThreads * width, values[b]);
#pragma unroll
    for (int b = 0; b < batch; ++b)
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const double x = T::load(values[b][j]);
        sum += x * x;
      }
  }
};

template <class T>
__device__ double sum_squares_of(const typename T::Storage* g, int n) {
  SumSquares<T> work{g, 0};
  if (g) for_each_element<T, 4>(work, n, all_aligned(g));
  return block_sum(work.sum);
}

// partials[chunk] = Σ g², sq_norm = Σ partials. Bytes per element: reads g (float32: 4, below: 2).
template <class T>
__global__ void __launch_bounds__(kThreads)
    sq_norm_kernel(Table table, double* partials, double* sq_norm, uint32_t* arrivals) {
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Chunk part(table, chunk);
    const double sum = sum_squares_of<T>(part.at<const typename T::Storage>(part.row.grad), part.n);
    if (threadIdx.x == 0) partials[chunk] = sum;
  }
  if (is_last_block(arrivals)) {
    const double sum = sum_of(partials, 0, table.chunks);
    if (threadIdx.x == 0) *sq_norm = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const typename T::Storage* g, int64_t length, double* partials) {
  for (int64_t chunk = blockIdx.x; chunk * kChunk < length; chunk += gridDim.x) {
    const int64_t begin = chunk * kChunk, left = length - begin;
    const double sum = sum_squares_of<T>(g + begin, int(left < kChunk ? left : kChunk));
    if (threadIdx.x == 0) partials[chunk] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) add_up_kernel(const double* partials, int64_t chunks, double* sq_norm) {
  const double sum = sum_of(partials, 0, chunks);
  if (threadIdx.x == 0) *sq_norm = sum;
}

// Scalars: `Cycle.advance` and `Cycle.finish` of cycle.py.

struct InnerStep {
  double norm;
  bool taken;  // whether anything moves

  __device__ explicit InnerStep(const MicroBatch& micro_batch) : norm(0) {
#pragma unroll  // an index known only at run time would put the array into local memory
    for (int i = 0; i < kMaxNorms; ++i)
      if (i < micro_batch.n_norms) norm += *micro_batch.norms[i];
    norm = sqrt(norm);
    taken = norm > 0 && norm < INFINITY && !(micro_batch.found_inf && *micro_batch.found_inf != 0);
  }
  __device__ double length(const Hyper& h) const { return taken ? h.inner_lr : 0; }
  __device__ double factor(const Hyper& h) const { return taken ? h.sign * h.inner_lr / norm : 0; }
};

// Counts an inner step; by one block, after all have read the sums.
__device__ void advance(const Cycle& cycle, const MicroBatch& micro_batch, const InnerStep& step) {
  if (!micro_batch.n_norms) return;
  for (int64_t group = threadIdx.x; group < cycle.groups; group += kThreads) {
    const double length = step.length(cycle.hyper[group]);
    cycle.sums[group] += length;
    cycle.sums[cycle.groups + group] += length * length;
  }
  if (threadIdx.x == 0) {
    cycle.totals[0] += !step.taken;
    const double unscaled = micro_batch.grad_scale ? step.norm / double(*micro_batch.grad_scale) : step.norm;
    cycle.sums[3 * cycle.groups + micro_batch.position] = unscaled == unscaled ? unscaled : -1;
  }
}

// Of one table: `step` of the parameters that took part, and ‖D‖² of each group, added to what earlier tables left.
__device__ void finish_table(const Table& table, const Cycle& cycle, const InnerStep& step,
                             const double* displacement_sq, bool first) {
  for (int64_t group = 0; group < cycle.groups; ++group) {
    double sum = 0;
    if (group < table.groups) {
      const int64_t* start = table.starts + 2 * group;
      if (cycle.sums[group] + step.length(cycle.hyper[group]) > 0)
        for (int64_t i = start[0] + threadIdx.x; i < start[2]; i += kThreads) {
          const Segment& row = table.rows[i];
          if (row.grad || is_touched(row, table.touch)) *pointer<float>(row.step) += 1;
        }
      sum = sum_of(displacement_sq, start[1], start[3]);
    }
    if (threadIdx.x == 0) {
      double* finished = cycle.finished_sums + 2 * cycle.groups + group;
      *finished = first ? sum : *finished + sum;
    }
  }
}

// After `advance`: keeps the sums of the cycle and starts from zero.
__device__ void finish(const Cycle& cycle, int64_t taken) {
  __syncthreads();
  bool walked = false;
  for (int64_t group = threadIdx.x; group < cycle.groups; group += kThreads) walked |= cycle.sums[group] > 0;
  if (!__syncthreads_or(walked) && threadIdx.x == 0) cycle.totals[1] += 1;
  for (int64_t i = threadIdx.x; i < 3 * cycle.groups + cycle.inner_steps; i += kThreads) {
    if (i < 2 * cycle.groups || i >= 3 * cycle.groups) cycle.finished_sums[i] = cycle.sums[i];
    cycle.sums[i] = 0;
  }
  if (threadIdx.x < 2) {
    cycle.finished_counts[threadIdx.x] = cycle.counts[threadIdx.x];
    cycle.counts[threadIdx.x] = 0;
  }
  if (threadIdx.x == 2) cycle.finished_counts[2] = taken;
}

// Inner step

template <class T>
struct Move {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const State* from;
  const Storage* g;  // null where the step is skipped: it may hold NaN
  State *theta, *walk;  // theta: null where it is not written
  Storage* weight;
  GradientScale<State> scale;
  uint32_t moves, lost_moves;

  template <int width, int batch, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    State w[batch][width];
    Storage gradient[batch][width] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      load<true, aligned>(from + i + b * kThreads * width, w[b]);
      if (g) load<true, aligned>(g + i + b * kThreads * width, gradient[b]);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int at = i + b * kThreads * width;
      State next[width];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const State step = scale(T::load(gradient[b][j]));
        next[j] = w[b][j] - step;
        moves += step != 0;
        lost_moves += step != 0 && next[j] == w[b][j];
      }
      if (theta) store<aligned>(theta + at, w[b]);
      store<aligned>(walk + at, next);
      if constexpr (T::low_precision) {
        Storage rounded[width];
#pragma unroll
        for (int j = 0; j < width; ++j) rounded[j] = T::store(next[j]);
        store<aligned>(weight + at, rounded);
      }
    }
  }
};

// w ← w − γ·g/n, and θ ← w before the first move of a cycle. Bytes per element, float32: reads w g, writes w (12), the
// first time also θ (16). Below: reads walk (the first time θ) and g, writes walk and the weight (12). Counts are
// integers, whose atomic sum does not depend on an order. Source: Algorithm 3 of arXiv 2604.09258.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    inner_step_kernel(Table table, Cycle cycle, MicroBatch micro_batch, bool last_table) {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const InnerStep step(micro_batch);
  int64_t group = -1;
  double factor = 0;
  Move<T> work{};
  for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
    const Chunk part(table, table.chunks - 1 - i);
    const Segment& row = part.row;
    if (row.group != group) {
      group = row.group;
      factor = step.factor(cycle.hyper[group]);
      work.scale = GradientScale<State>(factor);
    }
    const bool first = !is_touched(row, table.touch);
    if (!row.grad || !(step.taken || first)) continue;
    work.g = step.taken ? part.at<const Storage>(row.grad) : nullptr;
    work.weight = part.at<Storage>(row.weight);
    work.walk = part.at<State>(row.walk);
    State* const theta = part.at<State>(row.theta);
    work.from = T::low_precision && first ? theta : work.walk;
    work.theta = !T::low_precision && first ? theta : nullptr;
    for_each_element<T, 2>(work, part.n, all_aligned(work.from, work.g, work.weight, work.walk, theta));
  }
  const uint64_t moves = block_sum(uint64_t(work.moves)), lost_moves = block_sum(uint64_t(work.lost_moves));
  if (threadIdx.x == 0 && moves) {
    atomicAdd(reinterpret_cast<unsigned long long*>(cycle.counts), static_cast<unsigned long long>(moves));
    atomicAdd(reinterpret_cast<unsigned long long*>(cycle.counts + 1), static_cast<unsigned long long>(lost_moves));
  }
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, step);  // no block of an inner step reads the sums
}

// Displacement

template <class T>
struct Displace {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const State* theta;  // null where the parameter has not moved
  const Storage* g;    // null without one, or where the step is skipped
  State *anchor, *walk;  // anchor: where w must be kept as θ; walk: w, and where D goes if it is not `rounded`
  Storage* rounded;
  GradientScale<State> scale;
  State share;

  template <int width, int batch, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "three operands are enough in flight");
    State old[width] = {}, w[width] = {};
    Storage gradient[width] = {};
    if (theta) load<true, aligned>(theta + i, old);
    if (theta || anchor) load<true, aligned>(walk + i, w);
    if (g) load<true, aligned>(g + i, gradient);
    State D[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      D[j] = theta ? old[j] - w[j] : 0;
      if (g) D[j] = D[j] + scale(T::load(gradient[j]));
      D[j] = D[j] * share;
    }
    if constexpr (T::low_precision) {
      if (rounded) {
        Storage to[width];
#pragma unroll
        for (int j = 0; j < width; ++j) to[j] = T::store(D[j]);
        store<aligned>(rounded + i, to);
        return;
      }
    }
    if (anchor) store<aligned>(anchor + i, w);
    store<aligned>(walk + i, D);
  }
};

// D = (θ − w) + γ·g/n; D · share overwrites the walk or, with `in_weight`, rounded the weight; for every parameter. Bytes
// per element, float32: reads θ w g, writes w, or reads w g, writes θ w (16). Below: reads θ walk g, writes walk (14) or
// the weight (12).
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    displace_kernel(Table table, Cycle cycle, MicroBatch micro_batch, double share, bool in_weight, bool last_table) {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const InnerStep step(micro_batch);
  int64_t group = -1;
  Displace<T> work{};
  work.share = State(share);
  for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
    const Chunk part(table, table.chunks - 1 - i);
    const Segment& row = part.row;
    if (row.group != group) {
      group = row.group;
      work.scale = GradientScale<State>(step.factor(cycle.hyper[group]));
    }
    const bool touched = is_touched(row, table.touch);
    State* const theta = part.at<State>(row.theta);
    work.theta = touched ? theta : nullptr;
    work.g = step.taken ? part.at<const Storage>(row.grad) : nullptr;
    work.anchor = !T::low_precision && !touched ? theta : nullptr;
    work.walk = part.at<State>(row.walk);
    work.rounded = T::low_precision && in_weight ? part.at<Storage>(row.weight) : nullptr;
    for_each_element<T, 1>(work, part.n, all_aligned(theta, work.g, work.walk, work.rounded));
  }
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, step);  // no block of this kernel reads the sums
}

// Outer step

template <class T>
struct Scalars {
  AdamW<typename T::State> adamw;
  GradientScale<typename T::State> scale;
  typename T::State inv_gamma;
};

// A call of its own: its powers in double precision would else take registers from the loop over elements.
template <class T>
__device__ __noinline__ void compute(Scalars<T>& scalars, const Hyper& hyper, double update, double factor,
                                     double walk_length) {
  using State = typename T::State;
  scalars.adamw = AdamW<State>(hyper, update);
  scalars.scale = GradientScale<State>(factor);
  scalars.inv_gamma = State(hyper.normalize != 0 ? 1 / walk_length : 1);
}

template <class T, bool amsgrad, bool displaced>
struct Update {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const Scalars<T>& scalars;
  const State *from, *walk;  // walk: `from` where the parameter has not moved; displaced: D where it is not g
  const Storage* g;          // null without one, or where the step is skipped; displaced: D, or null
  State *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *theta;  // max_exp_avg_sq: null where the group has no maxima
  Storage* weight;
  double displacement_sq;

  template <int width, int batch, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "five operands are enough in flight");
    State old[width], w[width], m[width], v[width], v_max[width];
    Storage gradient[width];
    load<true, aligned>(from + i, old);
    if (!displaced || !g) load<true, aligned>(walk + i, w);
    if (g) load<true, aligned>(g + i, gradient);
    load<true, aligned>(exp_avg + i, m);
    load<true, aligned>(exp_avg_sq + i, v);
    if (amsgrad && max_exp_avg_sq) {
      load<true, aligned>(max_exp_avg_sq + i, v_max);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) v_max[j] = -INFINITY;  // below every exp_avg_sq, which then is the maximum
    }
    State next[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      State D;
      if constexpr (displaced) {
        D = g ? T::load(gradient[j]) : w[j];
      } else {
        D = old[j] - w[j];
        if (g) D = D + scalars.scale(T::load(gradient[j]));
      }
      displacement_sq += double(D) * double(D);
      next[j] = scalars.adamw.template operator()<amsgrad>(old[j], D * scalars.inv_gamma, m[j], v[j], v_max[j]);
    }
    store<aligned>(theta + i, next);
    store<aligned>(exp_avg + i, m);
    store<aligned>(exp_avg_sq + i, v);
    if (amsgrad && max_exp_avg_sq) store<aligned>(max_exp_avg_sq + i, v_max);
    if constexpr (T::low_precision) {
      Storage rounded[width];
#pragma unroll
      for (int j = 0; j < width; ++j) rounded[j] = T::store(next[j]);
      store<aligned>(weight + i, rounded);
    }
  }
};

template <class T, bool amsgrad, bool displaced>
__device__ __forceinline__ double update(const Scalars<T>& scalars, const Chunk& part, bool touched, bool taken) {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const Segment& row = part.row;
  Storage* const weight = part.at<Storage>(row.weight);
  State* const theta = T::low_precision ? part.at<State>(row.theta) : pointer<State>(row.weight) + part.begin;
  const State* const from = touched ? part.at<const State>(row.theta) : theta;
  Update<T, amsgrad, displaced> work{
      scalars,
      from,
      touched ? part.at<const State>(row.walk) : from,
      taken ? part.at<const Storage>(row.grad) : nullptr,
      part.at<State>(row.exp_avg),
      part.at<State>(row.exp_avg_sq),
      part.at<State>(row.max_exp_avg_sq),
      theta,
      weight,
      0,
  };
  for_each_element<T, 1>(work, part.n,
                         all_aligned(work.from, work.walk, work.g, work.exp_avg, work.exp_avg_sq, work.max_exp_avg_sq,
                                     work.theta, work.weight));
  return work.displacement_sq;
}

// w ← θ, for a parameter whose weight holds a displacement and that takes no part.
template <class T>
struct Restore {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const State* theta;
  Storage* weight;

  template <int width, int batch, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    State old[width];
    load<true, aligned>(theta + i, old);
    if constexpr (T::low_precision) {
      Storage rounded[width];
#pragma unroll
      for (int j = 0; j < width; ++j) rounded[j] = T::store(old[j]);
      store<aligned>(weight + i, rounded);
    } else {
      store<aligned>(weight + i, old);
    }
  }
};

template <class T>
__device__ __forceinline__ void restore(const Chunk& part) {
  Restore<T> work{part.at<const typename T::State>(part.row.theta), part.at<typename T::Storage>(part.row.weight)};
  for_each_element<T, 1>(work, part.n, all_aligned(work.theta, work.weight));
}

// D = (θ − w) + γ·g/n;  G = D/Γ;  θ ← AdamW(θ, G);  w ← θ.  displacement_sq[chunk] = Σ D².
// Bytes per element, float32: reads θ w g m v, writes w m v (32). Below: reads θ walk g m v, writes θ m v and the weight
// (32). amsgrad: 8 more. Source: Algorithm 3 of arXiv 2604.09258; torch/optim/adam.py.
// displaced: D is read, in the gradient's place or, without one, the walk's; micro_batch is empty. Bytes, float32: reads
// θ D m v, writes w m v (28). Below: reads θ D m v, writes θ m v and the weight (30, with D in the weight 28).
template <class T, bool amsgrad, bool displaced>
__global__ void __launch_bounds__(kThreads, 2)
    outer_step_kernel(Table table, Cycle cycle, MicroBatch micro_batch, int64_t taken, double* displacement_sq,
                      uint32_t* arrivals, bool first_table, bool last_table) {
  __shared__ Scalars<T> scalars;
  const InnerStep step(micro_batch);
  int64_t group = -1;
  float updates = -1;
  for (int64_t i = blockIdx.x; i < table.chunks; i += gridDim.x) {
    const int64_t chunk = table.chunks - 1 - i;
    const Chunk part(table, chunk);
    const Segment& row = part.row;
    const Hyper& hyper = cycle.hyper[row.group];
    const double walk_length = cycle.sums[row.group] + step.length(hyper);
    const bool touched = is_touched(row, table.touch);
    double sum = 0;
    if ((touched || row.grad) && walk_length > 0) {
      const float updates_before = *pointer<const float>(row.step);
      if (row.group != group || updates_before != updates) {  // mostly those of the chunk before: powers are not cheap
        group = row.group, updates = updates_before;
        __syncthreads();
        if (threadIdx.x == 0) compute(scalars, hyper, double(updates) + 1, step.factor(hyper), walk_length);
        __syncthreads();
      }
      sum = update<T, amsgrad, displaced>(scalars, part, touched, displaced || step.taken);
    } else if constexpr (displaced) {
      restore<T>(part);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) displacement_sq[chunk] = sum;
  }
  if (is_last_block(arrivals)) {  // nobody reads steps or sums any more
    finish_table(table, cycle, step, displacement_sq, first_table);
    if (last_table) {
      __syncthreads();
      advance(cycle, micro_batch, step);
      finish(cycle, taken);
    }
  }
}

// The host

[[noreturn]] void fail(const char* kernel, int device, cudaError_t error) {
  throw std::runtime_error("the CUDA kernel " + std::string(kernel) + " could not be started on cuda:" +
                           std::to_string(device) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                           "). An error of work started earlier shows up here too: CUDA_LAUNCH_BLOCKING=1 tells which");
}

// Starts a kernel with one block for each of `items`, but no more than the device holds at a time.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t items, const Where& where,
            const Arguments&... arguments) {
  static std::map<std::pair<const void*, int>, int64_t> resident;  // the caller holds Python's lock
  const int device = where.device;
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      cudaGetLastError();
      fail(name, device, error);
    }
  };
  check(cudaSetDevice(device));
  int64_t& blocks = resident[{reinterpret_cast<const void*>(kernel), device}];
  if (!blocks) {
    int processors = 0, each = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0));
    blocks = int64_t(processors) * each;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::clamp<int64_t>(items, 1, blocks)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float64: return function(Float64{});
    case DType::float32: return function(Float32{});
    case DType::bfloat16: return function(BFloat16{});
    case DType::float16: return function(Float16{});
  }
}

// Loads every kernel, which a capture into a graph must not be the first to do.
cudaError_t load_all() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, add_up_kernel);
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16})
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      const auto load = [&](auto kernel) {
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
      };
      load(sq_norm_kernel<T>);
      load(sum_squares_kernel<T>);
      load(inner_step_kernel<T>);
      load(displace_kernel<T>);
      load(outer_step_kernel<T, false, false>);
      load(outer_step_kernel<T, true, false>);
      load(outer_step_kernel<T, true, true>);
    });
  return error;
}

}  // namespace

std::string why_not(int device) {
  int driver = 0, runtime = 0, major = 0, minor = 0;
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver: install one";
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver knows CUDA " + version(driver) + ", older than the CUDA " + version(runtime) +
           " that these kernels were built with: update the driver, or build nexus_fused with an older toolkit";
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = load_all();
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    return "the GPU has compute capability " + capability + ", and these kernels were built for " NEXUS_CUDA_TARGETS
           ": use backend='triton'";
  return std::string("cuda:") + std::to_string(device) + " cannot be used: " + cudaGetErrorString(error);
}

uint64_t capture_id(void* stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive ? id : 0;
}

void sq_norm(const Table& table, DType dtype, double* partials, double* sq_norm, uint32_t* arrivals,
             const Where& where) {
  with_dtype(dtype, [&](auto type) {
    launch("sq_norm", sq_norm_kernel<decltype(type)>, table.chunks, where, table, partials, sq_norm, arrivals);
  });
}

void sum_squares(const void* grad, int64_t length, DType dtype, double* partials, const Where& where) {
  with_dtype(dtype, [&](auto type) {
    using Storage = typename decltype(type)::Storage;
    launch("sum_squares", sum_squares_kernel<decltype(type)>, (length + kChunk - 1) / kChunk, where,
           static_cast<const Storage*>(grad), length, partials);
  });
}

void add_up(const double* partials, int64_t chunks, double* sq_norm, const Where& where) {
  launch("add_up", add_up_kernel, 1, where, partials, chunks, sq_norm);
}

void inner_step(const Table& table, DType dtype, const Cycle& cycle, const MicroBatch& micro_batch,
                const Where& where) {
  with_dtype(dtype, [&](auto type) {
    launch("inner_step", inner_step_kernel<decltype(type)>, table.chunks, where, table, cycle, micro_batch, where.last);
  });
}

void outer_step(const Table& table, DType dtype, bool amsgrad, const Cycle& cycle, const MicroBatch& micro_batch,
                int64_t taken, double* displacement_sq, uint32_t* arrivals, bool displaced, const Where& where) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    // Displaced ones are rare: one kernel, which also serves groups without maxima, is enough.
    const auto kernel = displaced ? outer_step_kernel<T, true, true>
                        : amsgrad ? outer_step_kernel<T, true, false>
                                  : outer_step_kernel<T, false, false>;
    launch("outer_step", kernel, table.chunks, where, table, cycle, micro_batch, taken, displacement_sq, arrivals,
           where.first, where.last);
  });
}

void displace(const Table& table, DType dtype, const Cycle& cycle, const MicroBatch& micro_batch, double share,
              bool in_weight, const Where& where) {
  with_dtype(dtype, [&](auto type) {
    launch("displace", displace_kernel<decltype(type)>, table.chunks, where, table, cycle, micro_batch, share, in_weight,
           where.last);
  });
}

}  // namespace nexus::cuda
