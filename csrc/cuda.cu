// CUDA kernels: squared norm, inner step, displacement, fused outer step, over a table of segments; one launch each.
//
// What is summed is summed per chunk of kChunk elements, by threads in a fixed order, and over chunks by the last block
// that finishes, in their order: results repeat bit for bit and depend neither on the grid nor on alignment. The scalars
// of a cycle are read by every block and written by one: the host is never asked.
//
// Which block works where was measured (docs/gpu.md). Memory likes small blocks that start in the order of addresses: a
// block of an inner step or displacement has a part of a chunk, one of an outer step, which sums, a whole one. A norm, which
// only reads, is best with as many blocks as the chip holds, which walk the chunks. Hints to the cache (ld.cs, st.cs)
// cost up to a tenth, and walking backwards after the norm, to find its end in the cache, gains nothing.

#define NEXUS_ISA cuda
#include "cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace nexus::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Memory: 16 bytes at a time, or 8 where n elements are no more. An address of the table could be of shared memory, for
// all the compiler knows, and its accesses slower; hence the assumptions.

template <class X, int n>
using Word = std::conditional_t<n * sizeof(X) % sizeof(uint4) == 0, uint4, uint2>;

template <bool aligned, class X, int n>
__device__ __forceinline__ void load(const X* from, X (&to)[n]) {
  __builtin_assume(__isGlobal(from));
  if constexpr (aligned && n > 1) {
    static_assert(n * sizeof(X) % sizeof(Word<X, n>) == 0, "8 or 16 bytes at a time");
    Word<X, n> words[n * sizeof(X) / sizeof(Word<X, n>)];
#pragma unroll
    for (int i = 0; i < int(sizeof words / sizeof *words); ++i) words[i] = reinterpret_cast<const Word<X, n>*>(from)[i];
    memcpy(to, words, sizeof words);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

template <bool aligned, class X, int n>
__device__ __forceinline__ void store(X* to, const X (&from)[n]) {
  __builtin_assume(__isGlobal(to));
  if constexpr (aligned && n > 1) {
    Word<X, n> words[n * sizeof(X) / sizeof(Word<X, n>)];
    memcpy(words, from, sizeof words);
#pragma unroll
    for (int i = 0; i < int(sizeof words / sizeof *words); ++i) reinterpret_cast<Word<X, n>*>(to)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

template <class... Pointers>
__device__ __forceinline__ bool all_aligned(const Pointers*... pointers) {
  return ((... | reinterpret_cast<uintptr_t>(pointers)) & 15) == 0;
}

// Calls work.apply<width, batch, aligned, aligned_g>(i) so that each of n elements is worked on once: `batch` times
// `width` of them, kThreads · width apart, from element i. Which thread works on an element does not depend on alignment.
template <int width, int batch, bool aligned, bool aligned_g, class Work>
__device__ __forceinline__ void for_each(Work& work, int n) {
  constexpr int stride = kThreads * width;
  const int whole = n / width * width;
  int i = threadIdx.x * width;
#pragma unroll 1  // `batch` decides what is in flight; more copies of the work would only take registers
  for (; i + (batch - 1) * stride < whole; i += batch * stride)
    work.template apply<width, batch, aligned, aligned_g>(i);
  if constexpr (batch > 1) {
#pragma unroll 1
    for (; i < whole; i += stride) work.template apply<width, 1, aligned, aligned_g>(i);
  }
#pragma unroll 1
  for (i = whole + threadIdx.x; i < n; i += kThreads) work.template apply<1, 1, false, false>(i);
}

// A gradient may lie anywhere (in a bucket of DistributedDataParallel behind an odd parameter, for example), which does
// not make the accesses to the others narrow.
template <int width, int batch, class Work>
__device__ __forceinline__ void for_each_element(Work& work, int n, bool aligned, bool aligned_g) {
  if (aligned && aligned_g)
    for_each<width, batch, true, true>(work, n);
  else if (aligned)
    for_each<width, batch, true, false>(work, n);
  else
    for_each<width, 1, false, false>(work, n);
}

// Elements of which a thread's share of a value of type X is 16 bytes: of the state, whose bytes are most.
template <class X>
constexpr int width_of = sizeof(uint4) / sizeof(X);

// Sums

// The sum of a warp in a fixed order, for its first thread.
template <class X>
__device__ X warp_sum(X value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  return value;
}

// The same of a block, for all of its threads.
template <class X>
__device__ X block_sum(X value) {
  __shared__ X of_warp[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  X sum = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
  __syncthreads();  // before `of_warp` is written again
  return sum;
}

// Σ partials[begin … end), which other blocks may have written, by a block or a warp, for its first thread, in an order
// that only their number decides.
template <int team>
__device__ double sum_of(const double* partials, int64_t begin, int64_t end) {
  static_assert(team == kThreads || team == kWarp, "a block or a warp");
  double sum = 0;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x % team; i < end; i += team) sum += __ldcg(partials + i);
  if constexpr (team == kThreads)
    return block_sum(sum);
  else
    return warp_sum(sum);
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

// Part of a row: n elements from `begin`; n is 0 or less behind the row's end. Where no row has elements, one block works
// on none.
struct Part {
  const Segment& row;
  int64_t begin;
  int n;

  // Part `number` of all chunks, of which each has `parts`.
  __device__ Part(const Table& table, uint32_t number, uint32_t parts)
      : Part(table, number / parts, number % parts, uint32_t(kChunk) / parts) {}

  template <class X>
  __device__ X* at(int64_t address) const {
    return address ? pointer<X>(address) + begin : nullptr;
  }

 private:
  __device__ Part(const Table& table, uint32_t chunk, uint32_t part, uint32_t size)
      : row(table.rows[table.chunks ? table.row_of_chunk[chunk] : 0]),
        begin((chunk - row.chunk) * kChunk + part * size),
        n(int(row.length - begin < size ? row.length - begin : size)) {}
};

// Squared norm

template <class T>
struct SumSquares {
  const typename T::Storage* g;
  double sum;

  template <int width, int batch, bool, bool aligned>
  __device__ __forceinline__ void apply(int i) {
    typename T::Storage values[batch][width];
#pragma unroll
    for (int b = 0; b < batch; ++b) load<aligned>(g + i + b * kThreads * width, values[b]);
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
  if (g) for_each_element<width_of<typename T::Storage>, 4>(work, n, all_aligned(g), all_aligned(g));
  return block_sum(work.sum);
}

// partials[chunk] = Σ g², sq_norm = Σ partials. Bytes per element: reads g (float32: 4, below: 2).
template <class T>
__global__ void __launch_bounds__(kThreads)
    sq_norm_kernel(Table table, double* partials, double* sq_norm, uint32_t* arrivals) {
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Part part(table, uint32_t(chunk), 1);
    const double sum = sum_squares_of<T>(part.at<const typename T::Storage>(part.row.grad), part.n);
    if (threadIdx.x == 0) partials[chunk] = sum;
  }
  if (is_last_block(arrivals)) {
    const double sum = sum_of<kThreads>(partials, 0, table.chunks);
    if (threadIdx.x == 0) *sq_norm = sum;
  }
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

// What a block of an inner step needs of it: one thread computes it, since double precision is slow on some chips.
template <class State>
struct Shared {
  GradientScale<State> scale;
  bool taken;

  __device__ void compute(const MicroBatch& micro_batch, const Hyper& hyper) {
    if (threadIdx.x == 0) {
      const InnerStep step(micro_batch);
      taken = step.taken;
      scale = GradientScale<State>(step.factor(hyper));
    }
    __syncthreads();
  }
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

// Of one table: `step` of the parameters that took part, and ‖D‖² of each group, added to what earlier tables left. A
// block for each group in turn would be slow for many groups: then each warp takes one at a time.
template <int team>
__device__ void finish_table(const Table& table, const Cycle& cycle, const InnerStep& step,
                             const double* displacement_sq, bool first) {
  const int lane = threadIdx.x % team;
  for (int64_t group = threadIdx.x / team; group < cycle.groups; group += kThreads / team) {
    double sum = 0;
    if (group < table.groups) {
      const int64_t* start = table.starts + 2 * group;
      if (cycle.sums[group] + step.length(cycle.hyper[group]) > 0)
        for (int64_t i = start[0] + lane; i < start[2]; i += team) {
          const Segment& row = table.rows[i];
          if (row.grad || is_touched(row, table.touch)) *pointer<float>(row.step) += 1;
        }
      sum = sum_of<team>(displacement_sq, start[1], start[3]);
    }
    if (lane == 0) {
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

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    State w[batch][width];
    Storage gradient[batch][width] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      load<aligned>(from + i + b * kThreads * width, w[b]);
      if (g) load<aligned_g>(g + i + b * kThreads * width, gradient[b]);
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
  const Part part(table, blockIdx.x, uint32_t(table.parts));
  const Segment& row = part.row;
  __shared__ Shared<State> step;
  step.compute(micro_batch, cycle.hyper[row.group]);
  const bool first = !is_touched(row, table.touch);
  Move<T> work{};
  if (row.grad && (step.taken || first)) {
    work.scale = step.scale;
    work.g = step.taken ? part.at<const Storage>(row.grad) : nullptr;
    work.weight = part.at<Storage>(row.weight);
    work.walk = part.at<State>(row.walk);
    State* const theta = part.at<State>(row.theta);
    work.from = T::low_precision && first ? theta : work.walk;
    work.theta = !T::low_precision && first ? theta : nullptr;
    const bool aligned = all_aligned(work.from, work.weight, work.walk, theta);
    for_each_element<width_of<State>, 2>(work, part.n, aligned, all_aligned(work.g));
  }
  const uint64_t counts = block_sum(uint64_t(work.lost_moves) << 32 | work.moves);
  if (threadIdx.x == 0 && counts) {
    auto* const total = reinterpret_cast<unsigned long long*>(cycle.counts);
    atomicAdd(total, static_cast<unsigned long long>(counts & 0xffffffffu));
    atomicAdd(total + 1, static_cast<unsigned long long>(counts >> 32));
  }
  // No block of an inner step reads the sums.
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, InnerStep(micro_batch));
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

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "three operands are enough in flight");
    State old[width] = {}, w[width] = {};
    Storage gradient[width] = {};
    if (theta) load<aligned>(theta + i, old);
    if (theta || anchor) load<aligned>(walk + i, w);
    if (g) load<aligned_g>(g + i, gradient);
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
  const Part part(table, blockIdx.x, uint32_t(table.parts));
  const Segment& row = part.row;
  __shared__ Shared<State> step;
  step.compute(micro_batch, cycle.hyper[row.group]);
  const bool touched = is_touched(row, table.touch);
  State* const theta = part.at<State>(row.theta);
  Displace<T> work{};
  work.scale = step.scale;
  work.share = State(share);
  work.theta = touched ? theta : nullptr;
  work.g = step.taken ? part.at<const Storage>(row.grad) : nullptr;
  work.anchor = !T::low_precision && !touched ? theta : nullptr;
  work.walk = part.at<State>(row.walk);
  work.rounded = T::low_precision && in_weight ? part.at<Storage>(row.weight) : nullptr;
  const bool aligned = all_aligned(theta, work.walk, work.rounded);
  for_each_element<width_of<State>, 1>(work, part.n, aligned, all_aligned(work.g));
  // No block of this kernel reads the sums.
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, InnerStep(micro_batch));
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

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "five operands are enough in flight");
    State old[width], w[width], m[width], v[width], v_max[width];
    Storage gradient[width];
    load<aligned>(from + i, old);
    if (!displaced || !g) load<aligned>(walk + i, w);
    if (g) load<aligned_g>(g + i, gradient);
    load<aligned>(exp_avg + i, m);
    load<aligned>(exp_avg_sq + i, v);
    if (amsgrad && max_exp_avg_sq) {
      load<aligned>(max_exp_avg_sq + i, v_max);
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
__device__ __forceinline__ double update(const Scalars<T>& scalars, const Part& part, bool touched, bool taken) {
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
  const bool aligned = all_aligned(work.from, work.walk, work.exp_avg, work.exp_avg_sq, work.max_exp_avg_sq, work.theta,
                                   work.weight);
  for_each_element<width_of<State>, 1>(work, part.n, aligned, all_aligned(work.g));
  return work.displacement_sq;
}

// w ← θ, for a parameter whose weight holds a displacement and that takes no part.
template <class T>
struct Restore {
  using Storage = typename T::Storage;
  using State = typename T::State;
  const State* theta;
  Storage* weight;

  template <int width, int batch, bool aligned, bool>
  __device__ __forceinline__ void apply(int i) {
    State old[width];
    load<aligned>(theta + i, old);
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
__device__ __forceinline__ void restore(const Part& part) {
  Restore<T> work{part.at<const typename T::State>(part.row.theta), part.at<typename T::Storage>(part.row.weight)};
  const bool aligned = all_aligned(work.theta, work.weight);
  for_each_element<width_of<typename T::State>, 1>(work, part.n, aligned, aligned);
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
  const uint32_t chunk = blockIdx.x;
  const Part part(table, chunk, 1);
  const Segment& row = part.row;
  __shared__ Scalars<T> scalars;
  __shared__ bool moved, taken_last;
  if (threadIdx.x == 0) {
    const Hyper& hyper = cycle.hyper[row.group];
    const InnerStep step(micro_batch);
    const double walk_length = cycle.sums[row.group] + step.length(hyper);
    moved = walk_length > 0, taken_last = step.taken;
    if (moved) compute(scalars, hyper, double(*pointer<const float>(row.step)) + 1, step.factor(hyper), walk_length);
  }
  __syncthreads();
  const bool touched = is_touched(row, table.touch);
  double sum = 0;
  if ((touched || row.grad) && moved)
    sum = update<T, amsgrad, displaced>(scalars, part, touched, displaced || taken_last);
  else if constexpr (displaced)
    restore<T>(part);
  sum = block_sum(sum);
  if (threadIdx.x == 0 && chunk < table.chunks) displacement_sq[chunk] = sum;
  if (is_last_block(arrivals)) {  // nobody reads steps or sums any more
    const InnerStep step(micro_batch);
    if (cycle.groups < kThreads / kWarp)
      finish_table<kThreads>(table, cycle, step, displacement_sq, first_table);
    else
      finish_table<kWarp>(table, cycle, step, displacement_sq, first_table);
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

void check(cudaError_t error, const char* kernel, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail(kernel, device, error);
}

// The blocks of a kernel that a device holds at a time.
template <class... Parameters>
int64_t resident(const char* name, void (*kernel)(Parameters...), int device) {
  static std::map<std::pair<const void*, int>, int64_t> known;  // the caller holds Python's lock
  int64_t& blocks = known[{reinterpret_cast<const void*>(kernel), device}];
  if (!blocks) {
    int processors = 0, each = 0;
    check(cudaSetDevice(device), name, device);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name, device);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0), name, device);
    blocks = int64_t(processors) * each;
  }
  return blocks;
}

// Starts a kernel of one block at least, which advances the cycle's scalars even where no row has elements.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, const Where& where,
            const Arguments&... arguments) {
  check(cudaSetDevice(where.device), name, where.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(blocks, 1)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name, where.device);
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
  cudaError_t error = cudaSuccess;
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16})
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      const auto load = [&](auto kernel) {
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
      };
      load(sq_norm_kernel<T>);
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
    const auto kernel = sq_norm_kernel<decltype(type)>;
    const int64_t blocks = std::min(table.chunks, resident("sq_norm", kernel, where.device));
    launch("sq_norm", kernel, blocks, where, table, partials, sq_norm, arrivals);
  });
}

void inner_step(const Table& table, DType dtype, const Cycle& cycle, const MicroBatch& micro_batch,
                const Where& where) {
  with_dtype(dtype, [&](auto type) {
    launch("inner_step", inner_step_kernel<decltype(type)>, table.chunks * table.parts, where, table, cycle,
           micro_batch, where.last);
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
    launch("displace", displace_kernel<decltype(type)>, table.chunks * table.parts, where, table, cycle, micro_batch,
           share, in_weight, where.last);
  });
}

}  // namespace nexus::cuda
