// CUDA kernels: squared norm, inner step, end of a walk, gradients, outer step, over a table of segments; one launch each.
//
// What is summed is summed per chunk of kChunk elements, by threads in a fixed order, and over chunks by the last block
// that finishes, in their order: results repeat bit for bit and depend neither on the grid nor on alignment. The scalars
// of a cycle are read by every block and written by one: the host is never asked.
//
// Which block works where was measured (docs/gpu.md). Memory likes small blocks that start in the order of addresses: a
// block of an inner step or the end of a walk has a part of a chunk, one that sums a whole one. A norm,
// which only reads, is best with as many blocks as the chip holds, which walk the chunks. Hints to the cache (ld.cs, st.cs)
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

// Memory: 16 bytes at a time, or 8 or 4 where n elements are no more. An address of the table could be of shared memory,
// for all the compiler knows, and its accesses slower; hence the assumptions.

template <class X, int n>
using Word = std::conditional_t<n * sizeof(X) % sizeof(uint4) == 0, uint4,
                                std::conditional_t<n * sizeof(X) % sizeof(uint2) == 0, uint2, uint32_t>>;

template <bool aligned, class X, int n>
__device__ __forceinline__ void load(const X* from, X (&to)[n]) {
  __builtin_assume(__isGlobal(from));
  if constexpr (aligned && n > 1) {
    static_assert(n * sizeof(X) % sizeof(Word<X, n>) == 0, "4, 8 or 16 bytes at a time");
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

// w of the elements of a part: a parameter in full precision, else a parameter and its remainder.
template <class T>
struct Weights {
  using Storage = typename T::Storage;
  using State = typename T::State;
  Storage *parameter, *remainder;

  // Of n elements as they lie.
  template <int n>
  struct Raw {
    Storage parameter[n], remainder[T::low_precision ? n : 1];

    __device__ __forceinline__ State operator[](int j) const {
      if constexpr (T::low_precision)
        return T::read(parameter[j], remainder[j]);
      else
        return parameter[j];
    }
  };

  __device__ explicit Weights(const Part& part)
      : parameter(part.at<Storage>(part.row.weight)), remainder(part.at<Storage>(part.row.remainder)) {}
  __device__ __forceinline__ bool aligned() const { return all_aligned(parameter, remainder); }

  template <bool aligned, int n>
  __device__ __forceinline__ void read(int i, Raw<n>& raw) const {
    load<aligned>(parameter + i, raw.parameter);
    if constexpr (T::low_precision) load<aligned>(remainder + i, raw.remainder);
  }
  template <bool aligned, int n>
  __device__ __forceinline__ void write(int i, const State (&w)[n]) const {
    if constexpr (T::low_precision) {
      Raw<n> raw;
#pragma unroll
      for (int j = 0; j < n; ++j) T::write(w[j], raw.parameter[j], raw.remainder[j]);
      store<aligned>(parameter + i, raw.parameter);
      store<aligned>(remainder + i, raw.remainder);
    } else {
      store<aligned>(parameter + i, w);
    }
  }
};

// The gradient of a part, which may be of any dtype: all threads of a block branch alike.
struct Gradient {
  int64_t address;  // 0: none, or not to be read, as that of a skipped step, which may hold NaN
  DType dtype;

  __device__ Gradient(const Part& part, bool used) : address(0), dtype(DType(part.row.grad_dtype)) {
    const int bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
    if (used && part.row.grad) address = part.row.grad + part.begin * bytes;
  }
  __device__ __forceinline__ bool aligned() const { return (address & 15) == 0; }

  // Of `batch` times `width` elements; they stay as they are where there is none.
  template <bool aligned, class State, int batch, int width>
  __device__ __forceinline__ void read(int i, State (&to)[batch][width]) const {
    if (!address) return;
    with_dtype(dtype, [&](auto type) {
      using G = decltype(type);
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        typename G::Storage values[width];
        load<aligned>(pointer<const typename G::Storage>(address) + i + b * kThreads * width, values);
#pragma unroll
        for (int j = 0; j < width; ++j) to[b][j] = State(G::load(values[j]));
      }
    });
  }
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

// partials[chunk] = Σ g², sq_norm = Σ partials. Bytes per element: reads g (float32: 4, below: 2).
__global__ void __launch_bounds__(kThreads)
    sq_norm_kernel(Table table, double* partials, double* sq_norm, uint32_t* arrivals) {
  for (uint32_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    const Part part(table, chunk, 1);
    double sum = 0;
    with_dtype(DType(part.row.grad_dtype), [&](auto type) {
      using Storage = typename decltype(type)::Storage;
      SumSquares<decltype(type)> work{part.at<const Storage>(part.row.grad), 0};
      const bool aligned = all_aligned(work.g);
      if (work.g) for_each_element<width_of<Storage>, 4>(work, part.n, aligned, aligned);
      sum = work.sum;
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[chunk] = sum;
  }
  if (is_last_block(arrivals)) {
    const double sum = sum_of<kThreads>(partials, 0, table.chunks);
    if (threadIdx.x == 0) *sq_norm = sum;
  }
}

// Scalars: `Cycle.advance` and `Cycle.finish` of cycle.py.

__device__ InnerStep step_of(const MicroBatch& micro_batch) {
  double sq_norm = 0;
#pragma unroll  // an index known only at run time would put the array into local memory
  for (int i = 0; i < kMaxNorms; ++i)
    if (i < micro_batch.n_norms) sq_norm += *micro_batch.norms[i];
  return InnerStep(sq_norm, micro_batch.found_inf && *micro_batch.found_inf != 0);
}

// What a block of an inner step needs of it: one thread computes it, since double precision is slow on some chips.
template <class State>
struct Shared {
  GradientScale<State> scale;
  bool taken;  // by this group

  __device__ void compute(const MicroBatch& micro_batch, const Hyper& hyper) {
    if (threadIdx.x == 0) {
      const double factor = step_of(micro_batch).factor(hyper);
      taken = factor != 0;
      scale = GradientScale<State>(factor);
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
    const double grad_scale = micro_batch.grad_scale ? double(*micro_batch.grad_scale) : 1;
    cycle.sums[3 * cycle.groups + micro_batch.position] = step.unscaled(grad_scale);
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

template <class T, class D>
struct Move {
  using State = typename T::State;
  Weights<T> weights;
  typename D::Storage* displacement;
  State* anchor;    // null where it is not written
  Gradient g;       // none where the step is skipped
  GradientScale<State> scale;
  bool first;         // D is not valid yet
  bool of_parameter;  // a move is lost that leaves the parameter where it was, not w
  uint32_t counts;    // moves and, times 65536, those that rounding swallowed: a block has fewer

  __device__ __forceinline__ bool is_lost(typename T::Storage shown, State old, State next) const {
    typename T::Storage parameter{}, remainder;
    if constexpr (T::low_precision) T::write(next, parameter, remainder);
    return T::low_precision && of_parameter ? parameter == shown : next == old;
  }

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    constexpr int stride = kThreads * width;
    typename Weights<T>::template Raw<width> w[batch];
    typename D::Storage before[batch][width] = {};
    State gradient[batch][width] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) weights.template read<aligned>(i + b * stride, w[b]);
    if (!first)
#pragma unroll
      for (int b = 0; b < batch; ++b) load<aligned>(displacement + i + b * stride, before[b]);
    g.template read<aligned_g>(i, gradient);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      State old[width], next[width];
      typename D::Storage rounded[width];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const State step = scale(gradient[b][j]), from = D::load(before[b][j]);
        old[j] = w[b][j];
        rounded[j] = D::store(from + step);
        next[j] = walked_weight(outer_weight(old[j], from), D::load(rounded[j]));
        counts += step != 0 ? is_lost(w[b].parameter[j], old[j], next[j]) ? 0x10001u : 1u : 0u;
      }
      if (anchor) store<aligned>(anchor + i + b * stride, old);
      store<aligned>(displacement + i + b * stride, rounded);
      if (g.address) weights.template write<aligned>(i + b * stride, next);
    }
  }
};

// D' = Q(D + γ·g/n);  w ← (w + D) − D'. Bytes per element, float32 with D in bfloat16: reads w D g, writes w D (16), the
// first time in a cycle, when D is not read, 14; below (w is the parameter and its remainder): 14 and 12. An anchor, which
// keeps w the first time, is 4 more. Counts are integers, whose atomic sum does not depend on an order. Source: Algorithm
// 3 of arXiv 2604.09258.
template <class T, class D>
__global__ void __launch_bounds__(kThreads, 4)
    inner_step_kernel(Table table, Cycle cycle, MicroBatch micro_batch, bool of_parameter, bool last_table) {
  using State = typename T::State;
  const Part part(table, blockIdx.x, uint32_t(table.parts));
  const Segment& row = part.row;
  __shared__ Shared<State> step;
  step.compute(micro_batch, cycle.hyper[row.group]);
  const bool first = !is_touched(row, table.touch);
  Move<T, D> work{Weights<T>(part), part.at<typename D::Storage>(row.displacement),
                  first ? part.at<State>(row.anchor) : nullptr, Gradient(part, step.taken), step.scale, first,
                  of_parameter, 0};
  const bool aligned = work.weights.aligned() && all_aligned(work.displacement, work.anchor);
  if (row.grad && (step.taken || first)) for_each_element<width_of<State>, 2>(work, part.n, aligned, work.g.aligned());
  const uint32_t counts = block_sum(work.counts);
  if (threadIdx.x == 0 && counts) {
    auto* const total = reinterpret_cast<unsigned long long*>(cycle.counts);
    atomicAdd(total, static_cast<unsigned long long>(counts & 0xffffu));
    atomicAdd(total + 1, static_cast<unsigned long long>(counts >> 16));
  }
  // No block of an inner step reads the sums.
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, step_of(micro_batch));
}

// End of a walk

template <class T, class D>
struct EndWalk {
  using State = typename T::State;
  Weights<T> weights;
  typename D::Storage* displacement;
  const State* anchor;  // null without one
  Gradient g;           // none where the step is skipped
  GradientScale<State> scale;
  State share;
  bool touched;  // D is valid, and w is not θ

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "three operands are enough in flight");
    typename Weights<T>::template Raw<width> w;
    typename D::Storage before[width] = {}, rounded[width];
    State theta[width] = {}, gradient[1][width] = {};
    if (touched) {
      load<aligned>(displacement + i, before);
      if (anchor)
        load<aligned>(anchor + i, theta);
      else
        weights.template read<aligned>(i, w);
    }
    g.template read<aligned_g>(i, gradient);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const State from = D::load(before[j]);
      if (touched && !anchor) theta[j] = outer_weight(w[j], from);
      rounded[j] = D::store((g.address ? from + scale(gradient[0][j]) : from) * share);
    }
    store<aligned>(displacement + i, rounded);
    if (touched) weights.template write<aligned>(i, theta);
  }
};

// D ← Q((D + γ·g/n) · share);  w ← θ; for every parameter. Bytes per element, float32 with D in bfloat16: reads θ (the
// anchor, or w) D g, writes w D (16); below: 16 with an anchor, else 14. What did not walk has w = θ: reads g, writes D.
template <class T, class D>
__global__ void __launch_bounds__(kThreads, 4)
    end_walk_kernel(Table table, Cycle cycle, MicroBatch micro_batch, double share, bool last_table) {
  using State = typename T::State;
  const Part part(table, blockIdx.x, uint32_t(table.parts));
  const Segment& row = part.row;
  __shared__ Shared<State> step;
  step.compute(micro_batch, cycle.hyper[row.group]);
  EndWalk<T, D> work{Weights<T>(part), part.at<typename D::Storage>(row.displacement), part.at<const State>(row.anchor),
                     Gradient(part, step.taken), step.scale, State(share), is_touched(row, table.touch)};
  const bool aligned = work.weights.aligned() && all_aligned(work.displacement, work.anchor);
  for_each_element<width_of<State>, 1>(work, part.n, aligned, work.g.aligned());
  // No block of this kernel reads the sums.
  if (last_table && blockIdx.x == 0) advance(cycle, micro_batch, step_of(micro_batch));
}

// Gradients for the optimizers of others

template <class T, class D>
struct Give {
  using State = typename T::State;
  const typename D::Storage* displacement;
  typename T::Storage* target;
  State scale;
  double displacement_sq;

  template <int width, int batch, bool aligned, bool>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "one operand is enough in flight: as much is written");
    typename D::Storage values[width];
    typename T::Storage scaled[width];
    load<aligned>(displacement + i, values);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const State x = D::load(values[j]);
      displacement_sq += double(x) * double(x);
      scaled[j] = T::store(x * scale);
    }
    store<aligned>(target + i, scaled);
  }
};

// Adds the partial sums of chunks up, for each group.
template <int team>
__device__ void add_to_groups(const Table& table, const double* partials, double* sums) {
  for (int64_t group = threadIdx.x / team; group < table.groups; group += kThreads / team) {
    const int64_t* start = table.starts + 2 * group;
    const double sum = sum_of<team>(partials, start[1], start[3]);
    if (threadIdx.x % team == 0) sums[group] += sum;
  }
}

// G ← D · scale, after the end of a walk; `grad` is where G goes, in the parameter's dtype. partials[chunk] = Σ D²,
// displacement_sq[group] += Σ partials. Bytes per element, D in bfloat16: reads D, writes G (float32 6, below 4).
template <class T, class D>
__global__ void __launch_bounds__(kThreads, 4)
    gradients_kernel(Table table, const double* scale, double* displacement_sq, double* partials, uint32_t* arrivals) {
  using Wider = std::conditional_t<sizeof(typename D::Storage) < sizeof(typename T::Storage), T, D>;
  const uint32_t chunk = blockIdx.x;
  const Part part(table, chunk, 1);
  const Segment& row = part.row;
  Give<T, D> work{part.at<const typename D::Storage>(row.displacement), part.at<typename T::Storage>(row.grad),
                  typename T::State(scale[row.group]), 0};
  const bool aligned = all_aligned(work.displacement, work.target);
  // Asked of `row.grad` instead, nvcc 13 splits the stores.
  if (work.target) for_each_element<width_of<typename Wider::Storage>, 1>(work, part.n, aligned, aligned);
  const double sum = block_sum(work.displacement_sq);
  if (threadIdx.x == 0 && chunk < table.chunks) partials[chunk] = sum;
  if (is_last_block(arrivals)) {
    if (table.groups < kThreads / kWarp)
      add_to_groups<kThreads>(table, partials, displacement_sq);
    else
      add_to_groups<kWarp>(table, partials, displacement_sq);
  }
}

// Outer step

template <class State>
struct Scalars {
  AdamW<State> adamw;
  GradientScale<State> scale;
  State inv_gamma;
};

// A call of its own: its powers in double precision would else take registers from the loop over elements.
template <class State>
__device__ __noinline__ void compute(Scalars<State>& scalars, const Hyper& hyper, double update, double factor,
                                     double walk_length) {
  scalars.adamw = AdamW<State>(hyper, update);
  scalars.scale = GradientScale<State>(factor);
  scalars.inv_gamma = State(hyper.normalize != 0 ? 1 / walk_length : 1);
}

template <class T, class D, bool amsgrad>
struct Update {
  using State = typename T::State;
  const Scalars<State>& scalars;
  Weights<T> weights;
  const typename D::Storage* displacement;       // null where it is not valid
  Gradient g;                                    // none where the step is skipped
  State *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // max_exp_avg_sq: null where the group has no maxima
  bool has_ended;
  double displacement_sq;

  template <int width, int batch, bool aligned, bool aligned_g>
  __device__ __forceinline__ void apply(int i) {
    static_assert(batch == 1, "five operands are enough in flight");
    typename Weights<T>::template Raw<width> w;
    typename D::Storage before[width] = {};
    State gradient[1][width] = {}, m[width], v[width], v_max[width];
    weights.template read<aligned>(i, w);
    load<aligned>(exp_avg + i, m);
    load<aligned>(exp_avg_sq + i, v);
    if (displacement) load<aligned>(displacement + i, before);
    if (amsgrad && max_exp_avg_sq) {
      load<aligned>(max_exp_avg_sq + i, v_max);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) v_max[j] = -INFINITY;  // below every exp_avg_sq, which then is the maximum
    }
    g.template read<aligned_g>(i, gradient);
    State next[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const State from = D::load(before[j]), old = w[j], theta = has_ended ? old : outer_weight(old, from);
      const State to = g.address ? from + scalars.scale(gradient[0][j]) : from;
      displacement_sq += double(to) * double(to);
      next[j] = scalars.adamw.template operator()<amsgrad>(theta, to * scalars.inv_gamma, m[j], v[j], v_max[j]);
    }
    weights.template write<aligned>(i, next);
    store<aligned>(exp_avg + i, m);
    store<aligned>(exp_avg_sq + i, v);
    if (amsgrad && max_exp_avg_sq) store<aligned>(max_exp_avg_sq + i, v_max);
  }
};

// θ = w + D, or w where the walk has ended;  D ← D + γ·g/n;  w ← AdamW(θ, D/Γ).  displacement_sq[chunk] = Σ D². Bytes per
// element, float32 with D in bfloat16: reads w D g m v, writes w m v (30); below 28; has_ended, without g: 26. amsgrad: 8
// more. Source: Algorithm 3 of arXiv 2604.09258; torch/optim/adam.py.
template <class T, class D, bool amsgrad>
__global__ void __launch_bounds__(kThreads, 2)
    outer_step_kernel(Table table, Cycle cycle, MicroBatch micro_batch, bool has_ended, int64_t taken,
                      double* displacement_sq, uint32_t* arrivals, bool first_table, bool last_table) {
  using State = typename T::State;
  const uint32_t chunk = blockIdx.x;
  const Part part(table, chunk, 1);
  const Segment& row = part.row;
  __shared__ Scalars<State> scalars;
  __shared__ bool moved, taken_last;
  if (threadIdx.x == 0) {
    const Hyper& hyper = cycle.hyper[row.group];
    const InnerStep step = step_of(micro_batch);
    const double walk_length = cycle.sums[row.group] + step.length(hyper), factor = step.factor(hyper);
    moved = walk_length > 0, taken_last = factor != 0;
    if (moved) compute(scalars, hyper, double(*pointer<const float>(row.step)) + 1, factor, walk_length);
  }
  __syncthreads();
  const bool touched = is_touched(row, table.touch);
  double sum = 0;
  if ((touched || row.grad) && moved) {
    Update<T, D, amsgrad> work{
        scalars,
        Weights<T>(part),
        touched ? part.at<const typename D::Storage>(row.displacement) : nullptr,
        Gradient(part, taken_last),
        part.at<State>(row.exp_avg),
        part.at<State>(row.exp_avg_sq),
        part.at<State>(row.max_exp_avg_sq),
        has_ended,
        0,
    };
    const bool aligned = work.weights.aligned() &&
                         all_aligned(work.displacement, work.exp_avg, work.exp_avg_sq, work.max_exp_avg_sq);
    for_each_element<width_of<State>, 1>(work, part.n, aligned, work.g.aligned());
    sum = work.displacement_sq;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0 && chunk < table.chunks) displacement_sq[chunk] = sum;
  if (is_last_block(arrivals)) {  // nobody reads steps or sums any more
    const InnerStep step = step_of(micro_batch);
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

// Loads every kernel, which a capture into a graph must not be the first to do.
cudaError_t load_all() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  const auto load = [&](auto kernel) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  };
  load(sq_norm_kernel);
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16})
    for (const DType of_displacement : {DType::bfloat16, DType::float32})
      with_dtypes({dtype, of_displacement}, [&](auto type, auto other) {
        using T = decltype(type);
        using D = decltype(other);
        load(inner_step_kernel<T, D>);
        load(end_walk_kernel<T, D>);
        load(gradients_kernel<T, D>);
        load(outer_step_kernel<T, D, false>);
        load(outer_step_kernel<T, D, true>);
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

void sq_norm(const Table& table, double* partials, double* sq_norm, uint32_t* arrivals, const Where& where) {
  const int64_t blocks = std::min(table.chunks, resident("sq_norm", sq_norm_kernel, where.device));
  launch("sq_norm", sq_norm_kernel, blocks, where, table, partials, sq_norm, arrivals);
}

void inner_step(const Table& table, DTypes dtypes, const Cycle& cycle, const MicroBatch& micro_batch, bool of_parameter,
                const Where& where) {
  with_dtypes(dtypes, [&](auto type, auto of_displacement) {
    launch("inner_step", inner_step_kernel<decltype(type), decltype(of_displacement)>, table.chunks * table.parts, where,
           table, cycle, micro_batch, of_parameter, where.last);
  });
}

void end_walk(const Table& table, DTypes dtypes, const Cycle& cycle, const MicroBatch& micro_batch, double share,
              const Where& where) {
  with_dtypes(dtypes, [&](auto type, auto of_displacement) {
    launch("end_walk", end_walk_kernel<decltype(type), decltype(of_displacement)>, table.chunks * table.parts, where,
           table, cycle, micro_batch, share, where.last);
  });
}

void gradients(const Table& table, DTypes dtypes, const double* scale, double* displacement_sq, double* partials,
               uint32_t* arrivals, const Where& where) {
  with_dtypes(dtypes, [&](auto type, auto of_displacement) {
    launch("gradients", gradients_kernel<decltype(type), decltype(of_displacement)>, table.chunks, where, table, scale,
           displacement_sq, partials, arrivals);
  });
}

void outer_step(const Table& table, DTypes dtypes, bool amsgrad, const Cycle& cycle, const MicroBatch& micro_batch,
                bool has_ended, int64_t taken, double* displacement_sq, uint32_t* arrivals, const Where& where) {
  with_dtypes(dtypes, [&](auto type, auto of_displacement) {
    using T = decltype(type);
    using D = decltype(of_displacement);
    const auto kernel = amsgrad ? outer_step_kernel<T, D, true> : outer_step_kernel<T, D, false>;
    launch("outer_step", kernel, table.chunks, where, table, cycle, micro_batch, has_ended, taken, displacement_sq,
           arrivals, where.first, where.last);
  });
}

}  // namespace nexus::cuda
