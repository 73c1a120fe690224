// CPU kernels: sums of squares, inner step, end of a walk, outer step, over a table of segments.
//
// Compiled once for each instruction set; NEXUS_ISA names the namespace (see CMakeLists.txt). Work is cut into chunks
// of kChunk elements of one segment. Threads take chunks; whatever is summed is summed per chunk in kLanes fixed lanes,
// and then over chunks in their order, so that a result depends neither on threads nor on the width of a register.

#include "cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Of a lambda over blocks: a call would keep what it captures in memory, and its loops scalar.
#define NEXUS_INLINED __attribute__((always_inline))

NEXUS_DECLARE_KERNELS(NEXUS_ISA)

namespace nexus::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 256;  // elements worked on at a time: few enough that loads of one block overlap another
constexpr int kLanes = 32;

// Copies to memory that was not read before, past the cache: a normal store would first read the line it overwrites.
void stream(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
#if defined(__x86_64__)
  // The head up to a cache line: parameters that are not ours may start anywhere.
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(target) & 63);
  memcpy(target, source, head);
  target += head, source += head, bytes -= head;
  for (; bytes >= 64; target += 64, source += 64, bytes -= 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#elif defined(__AVX__)
    for (int i = 0; i < 64; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#else
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
  }
#endif
  memcpy(target, source, bytes);
}

// Makes streamed stores visible to the other threads.
void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Calls body(segment, begin, end, chunk) for every chunk of the table, on several threads.
template <class Body>
void for_each_chunk(const Segment* segments, int64_t n, int64_t chunks, int threads, const Body& body) {
  const auto starts_after = [](int64_t chunk, const Segment& s) { return chunk < s.chunk; };
  // Threads take runs of chunks: long ones, which prefetchers like, if there is enough for everybody.
  const int64_t run = std::clamp<int64_t>(chunks / (8 * threads), 1, 32);
#pragma omp parallel num_threads(threads) if (chunks > 1)
  {
#pragma omp for schedule(dynamic, run) nowait
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      // The last segment that starts at or before this chunk; empty segments own no chunk and are passed over.
      const Segment& segment = *(std::upper_bound(segments, segments + n, chunk, starts_after) - 1);
      const int64_t begin = (chunk - segment.chunk) * kChunk;
      body(segment, begin, std::min(begin + kChunk, segment.length), chunk);
    }
    stream_fence();
  }
}

template <class X>
void add_squares_plain(const X* x, int64_t i, int64_t n, double* lanes) {
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += double(x[i + lane]) * double(x[i + lane]);
  for (int64_t lane = 0; lane < n - i; ++lane) lanes[lane] += double(x[i + lane]) * double(x[i + lane]);
}

// Σ x² in float64 over kLanes fixed lanes, added to `lanes`; n is a multiple of kLanes but for the end of a segment.
// The square of a float is exact in float64, so a fused multiply-add rounds just as a product and a sum do.
void add_squares(const float* x, int64_t n, double* lanes) {
  int64_t i = 0;
#if defined(__AVX512F__)
  __m512d sums[kLanes / 8];
  for (int v = 0; v < kLanes / 8; ++v) sums[v] = _mm512_loadu_pd(lanes + 8 * v);
  for (; i + kLanes <= n; i += kLanes)
    for (int v = 0; v < kLanes / 8; ++v) {
      const __m512d values = _mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8 * v));
      sums[v] = _mm512_fmadd_pd(values, values, sums[v]);
    }
  for (int v = 0; v < kLanes / 8; ++v) _mm512_storeu_pd(lanes + 8 * v, sums[v]);
#elif defined(__FMA__)
  __m256d sums[kLanes / 4];
  for (int v = 0; v < kLanes / 4; ++v) sums[v] = _mm256_loadu_pd(lanes + 4 * v);
  for (; i + kLanes <= n; i += kLanes)
    for (int v = 0; v < kLanes / 4; ++v) {
      const __m256d values = _mm256_cvtps_pd(_mm_loadu_ps(x + i + 4 * v));
      sums[v] = _mm256_fmadd_pd(values, values, sums[v]);
    }
  for (int v = 0; v < kLanes / 4; ++v) _mm256_storeu_pd(lanes + 4 * v, sums[v]);
#endif
  add_squares_plain(x, i, n, lanes);
}

void add_squares(const double* x, int64_t n, double* lanes) { add_squares_plain(x, 0, n, lanes); }

double sum_lanes(const double* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Calls body(i, n) for every block of a chunk: n elements from element i. n is a constant but for the last block, so that
// the loops over a block have no end that must be guessed.
template <class Body>
NEXUS_INLINE void for_each_block(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) body(i, std::integral_constant<int64_t, kBlock>{});
  if (i < end) body(i, end - i);
}

// The elements of a gradient of any floating dtype in `State`: where they lie if they are that, else in `buffer`.
template <class State, class Length>
const State* load_gradient(const Segment& segment, int64_t begin, Length n, State* buffer) {
  with_dtype(DType(segment.grad_dtype), [=](auto type) {
    using G = decltype(type);
    const auto* g = pointer<const typename G::Storage>(segment.grad) + begin;
    if constexpr (!std::is_same_v<State, typename G::Storage>)
      for (int64_t j = 0; j < n; ++j) buffer[j] = State(G::load(g[j]));
  });
  return DType(segment.grad_dtype) == FullPrecision<State>::dtype ? pointer<const State>(segment.grad) + begin : buffer;
}

// w of element j, and its parts.
template <class T>
NEXUS_INLINE typename T::State read_weight(const typename T::Storage* parameter, const typename T::Storage* remainder,
                                           int64_t j) {
  if constexpr (T::low_precision)
    return T::read(parameter[j], remainder[j]);
  else
    return parameter[j];
}
template <class T>
NEXUS_INLINE void write_weight(typename T::State w, typename T::Storage* parameter, typename T::Storage* remainder,
                               int64_t j) {
  if constexpr (T::low_precision)
    T::write(w, parameter[j], remainder[j]);
  else
    parameter[j] = w;
}

// w of n elements: where they lie in full precision, else in `buffer`.
template <class T, class Length>
const typename T::State* read_weights(const Segment& segment, int64_t begin, Length n, typename T::State* buffer) {
  const auto* parameter = pointer<const typename T::Storage>(segment.weight) + begin;
  if constexpr (T::low_precision) {
    const auto* remainder = pointer<const typename T::Storage>(segment.remainder) + begin;
    for (int64_t j = 0; j < n; ++j) buffer[j] = T::read(parameter[j], remainder[j]);
    return buffer;
  } else {
    return parameter;
  }
}

// D of n elements: zeros where it is not valid yet.
template <class D, class Length>
void read_displacements(const Segment& segment, int64_t begin, Length n, typename D::State* buffer) {
  const auto* displacement = pointer<const typename D::Storage>(segment.displacement) + begin;
  if (segment.touched)
    for (int64_t j = 0; j < n; ++j) buffer[j] = D::load(displacement[j]);
  else
    std::fill_n(buffer, int64_t(n), typename D::State(0));
}

// Rounds D and writes it: past the cache where it was not read before.
template <class D, class Length>
void write_displacements(const Segment& segment, int64_t begin, Length n, const typename D::State* values) {
  typename D::Storage rounded[kBlock];
  for (int64_t j = 0; j < n; ++j) rounded[j] = D::store(values[j]);
  auto* displacement = pointer<typename D::Storage>(segment.displacement) + begin;
  if (segment.touched)
    memcpy(displacement, rounded, n * sizeof *rounded);
  else
    stream(displacement, rounded, n * sizeof *rounded);
}

// Bytes per element: reads g.
double chunk_sum_squares(const Segment& segment, int64_t begin, int64_t end) {
  double lanes[kLanes] = {};
  for_each_block(begin, end, [&](int64_t i, auto n) NEXUS_INLINED {
    if (DType(segment.grad_dtype) == DType::float64) {
      add_squares(pointer<const double>(segment.grad) + i, n, lanes);
    } else {
      float buffer[kBlock];
      add_squares(load_gradient(segment, i, n, buffer), n, lanes);
    }
  });
  return sum_lanes(lanes);
}

// D' = Q(D + γ·g/n);  w ← (w + D) − D'. Bytes per element, float32 with D in bfloat16: reads w D g, writes w D (16), the
// first time in a cycle, when D is not read, 14; bfloat16 (w is the parameter and its remainder): 14 and 12. With an
// anchor it keeps w there, the first time (4 more). G: what gradients are read as, the parameter's dtype or `State`.
// of_parameter: a move is lost that leaves the parameter where it was, not w.
template <class T, class D, class G, bool touched, bool of_parameter>
void chunk_inner_step(const Segment& segment, int64_t begin, int64_t end, double factor, int64_t& moves,
                      int64_t& lost_moves) {
  using State = typename T::State;
  const GradientScale<State> scale(factor);
  for_each_block(begin, end, [&](int64_t i, auto n) NEXUS_INLINED {
    auto* parameter = pointer<typename T::Storage>(segment.weight) + i;
    auto* remainder = pointer<typename T::Storage>(segment.remainder) + i;
    auto* displacement = pointer<typename D::Storage>(segment.displacement) + i;
    State buffer[kBlock];
    if (!touched && segment.anchor)
      stream(pointer<State>(segment.anchor) + i, read_weights<T>(segment, i, n, buffer), n * sizeof(State));
    typename D::Storage fresh[kBlock];  // written past the cache: that memory was not read before
    if (factor == 0) {  // skipped; D is valid from now on
      std::fill_n(fresh, int64_t(n), D::store(0));
      if (!touched) stream(displacement, fresh, n * sizeof *fresh);
      return;
    }
    auto* rounded = touched ? displacement : fresh;
    const typename G::Storage* g;
    if constexpr (std::is_same_v<typename G::Storage, State>)
      g = load_gradient(segment, i, n, buffer);
    else
      g = pointer<const typename G::Storage>(segment.grad) + i;
    int32_t block_moves = 0, block_lost = 0;
#pragma omp simd reduction(+ : block_moves, block_lost)
    for (int64_t j = 0; j < n; ++j) {
      const State before = touched ? D::load(displacement[j]) : State(0), step = scale(G::load(g[j]));
      rounded[j] = D::store(before + step);
      const State old = read_weight<T>(parameter, remainder, j);
      const State moved = walked_weight(outer_weight(old, before), D::load(rounded[j]));
      block_moves += step != 0;
      if constexpr (of_parameter) {
        typename T::Storage next, rest;  // not in place: what is read again after a store is no vector
        T::write(moved, next, rest);
        block_lost += (step != 0) & (uint32_t(next) == uint32_t(parameter[j]));
        parameter[j] = next, remainder[j] = rest;
      } else {
        write_weight<T>(moved, parameter, remainder, j);
        block_lost += (step != 0) & (moved == old);
      }
    }
    moves += block_moves;
    lost_moves += block_lost;
    if (!touched) stream(displacement, fresh, n * sizeof *fresh);
  });
}

template <class T, class D, bool of_parameter>
auto inner_step_of(const Segment& segment) {
  using State = FullPrecision<typename T::State>;
  if (T::low_precision && segment.grad_dtype == int64_t(T::dtype))
    return segment.touched ? chunk_inner_step<T, D, T, true, of_parameter>
                           : chunk_inner_step<T, D, T, false, of_parameter>;
  return segment.touched ? chunk_inner_step<T, D, State, true, of_parameter>
                         : chunk_inner_step<T, D, State, false, of_parameter>;
}

template <class T, class D>
void table_inner_step(const Segment* segments, int64_t n, int64_t chunks, const double* factor, bool of_parameter,
                      int64_t* moves, int64_t* lost_moves, int threads) {
  int64_t total_moves = 0, total_lost = 0;
  for_each_chunk(segments, n, chunks, threads,
                 [=, &total_moves, &total_lost](const Segment& segment, int64_t begin, int64_t end, int64_t) {
                   if (!segment.grad) return;
                   int64_t chunk_moves = 0, chunk_lost = 0;
                   const auto inner_step = of_parameter ? inner_step_of<T, D, T::low_precision>(segment)
                                                        : inner_step_of<T, D, false>(segment);
                   inner_step(segment, begin, end, factor[segment.group], chunk_moves, chunk_lost);
#pragma omp atomic
                   total_moves += chunk_moves;  // integers: the order does not matter
#pragma omp atomic
                   total_lost += chunk_lost;
                 });
  *moves += total_moves;
  *lost_moves += total_lost;
}

// D ← Q((D + γ·g/n) · share);  w ← θ. Bytes per element, float32 with D in bfloat16: reads θ (the anchor, or w) D g, writes
// w D (16); bfloat16: 14. What did not walk has w = θ: reads g, writes D.
template <class T, class D>
void chunk_end_walk(const Segment& segment, int64_t begin, int64_t end, double factor, double share) {
  using State = typename T::State;
  const GradientScale<State> scale(factor);
  const State part = State(share);
  for_each_block(begin, end, [&](int64_t i, auto n) NEXUS_INLINED {
    auto* parameter = pointer<typename T::Storage>(segment.weight) + i;
    auto* remainder = pointer<typename T::Storage>(segment.remainder) + i;
    State of_w[kBlock], of_g[kBlock], displacement[kBlock];
    read_displacements<D>(segment, i, n, displacement);
    if (segment.touched) {
      const State* from = segment.anchor ? pointer<const State>(segment.anchor) + i : read_weights<T>(segment, i, n, of_w);
      for (int64_t j = 0; j < n; ++j) of_w[j] = segment.anchor ? from[j] : outer_weight(from[j], displacement[j]);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) write_weight<T>(of_w[j], parameter, remainder, j);
    }
    if (segment.grad && factor != 0) {  // of a skipped step, g may hold NaN
      const State* g = load_gradient(segment, i, n, of_g);
      for (int64_t j = 0; j < n; ++j) displacement[j] = displacement[j] + scale(g[j]);
    }
    for (int64_t j = 0; j < n; ++j) displacement[j] = displacement[j] * part;
    write_displacements<D>(segment, i, n, displacement);
  });
}

template <class T, class D>
void table_end_walk(const Segment* segments, int64_t n, int64_t chunks, const double* factor, double share,
                    int threads) {
  for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t) {
    chunk_end_walk<T, D>(segment, begin, end, factor[segment.group], share);
  });
}

// G ← D · scale, after the end of a walk; `grad` is where G goes, in the parameter's dtype. Returns ‖D‖² of the chunk.
// Bytes per element, D in bfloat16: reads D, writes G (float32 6, bfloat16 4).
template <class T, class D>
double chunk_gradient(const Segment& segment, int64_t begin, int64_t end, double scale) {
  using State = typename T::State;
  const State factor = State(scale);
  const auto* displacement = pointer<const typename D::Storage>(segment.displacement);
  auto* target = pointer<typename T::Storage>(segment.grad);
  double lanes[kLanes] = {};
  for_each_block(begin, end, [&](int64_t i, auto n) NEXUS_INLINED {
    State values[kBlock];
    for (int64_t j = 0; j < n; ++j) values[j] = D::load(displacement[i + j]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) target[i + j] = T::store(values[j] * factor);
    add_squares(values, n, lanes);
  });
  return sum_lanes(lanes);
}

// Adds the partial sums of chunks up, for each group, in their order.
void add_to_groups(const Segment* segments, int64_t n, int64_t chunks, const double* partials, double* sums) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = i + 1 < n ? segments[i + 1].chunk : chunks;
    for (int64_t chunk = segments[i].chunk; chunk < end; ++chunk) sums[segments[i].group] += partials[chunk];
  }
}

// θ = w + D, or w where the walk has ended;  D ← D + γ·g/n;  w ← AdamW(θ, D/Γ). Returns ‖D‖² of the chunk. Bytes per
// element, float32 with D in bfloat16: reads w D g m v, writes w m v (30); bfloat16: 28.
template <class T, class D, bool amsgrad>
double chunk_outer_step(const Segment& segment, int64_t begin, int64_t end, bool has_ended, double factor,
                        double inv_walk_length, const AdamW<typename T::State>& adamw) {
  using State = typename T::State;
  const GradientScale<State> scale(factor);
  const State inv_gamma = State(inv_walk_length);

  double lanes[kLanes] = {};
  for_each_block(begin, end, [&](int64_t i, auto n) NEXUS_INLINED {
    auto* parameter = pointer<typename T::Storage>(segment.weight) + i;
    auto* remainder = pointer<typename T::Storage>(segment.remainder) + i;
    State buffer[kBlock], displacement[kBlock], theta[kBlock];
    read_displacements<D>(segment, i, n, displacement);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const State w = read_weight<T>(parameter, remainder, j);
      theta[j] = has_ended ? w : outer_weight(w, displacement[j]);
    }
    if (segment.grad && factor != 0) {  // of a skipped step, g may hold NaN
      const State* g = load_gradient(segment, i, n, buffer);
      for (int64_t j = 0; j < n; ++j) displacement[j] = displacement[j] + scale(g[j]);
    }
    State* exp_avg = pointer<State>(segment.exp_avg) + i;
    State* exp_avg_sq = pointer<State>(segment.exp_avg_sq) + i;
    State* max_exp_avg_sq = amsgrad ? pointer<State>(segment.max_exp_avg_sq) + i : exp_avg_sq;
    State* next;
    if constexpr (T::low_precision)
      next = theta;  // a loop of its own for elements of another size: compilers leave this one scalar
    else
      next = parameter;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      State m = exp_avg[j], v = exp_avg_sq[j], v_max = max_exp_avg_sq[j];
      next[j] = adamw.template operator()<amsgrad>(theta[j], displacement[j] * inv_gamma, m, v, v_max);
      exp_avg[j] = m;
      exp_avg_sq[j] = v;
      if (amsgrad) max_exp_avg_sq[j] = v_max;
    }
    if constexpr (T::low_precision) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) T::write(next[j], parameter[j], remainder[j]);
    }
    add_squares(displacement, n, lanes);
  });
  return sum_lanes(lanes);
}

template <class T, class D>
void table_outer_step(const Segment* segments, int64_t n, int64_t chunks, bool has_ended, const Hyper* hyper,
                      const double* factor, const double* walk_length, double* displacement_sq, double* partials,
                      int threads) {
  const auto moves = [=](const Segment& s) { return (s.touched || s.grad) && walk_length[s.group] > 0; };
  // Parameters mostly share group and step: two powers for a run of them, not for each.
  std::vector<AdamW<typename T::State>> adamw(n);
  AdamW<typename T::State> current;
  int64_t group = -1;
  double step = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Segment& segment = segments[i];
    if (!moves(segment)) continue;
    const double next = double(*pointer<float>(segment.step) += 1);
    if (segment.group != group || next != step) current = AdamW<typename T::State>(hyper[segment.group], next);
    group = segment.group, step = next;
    adamw[i] = current;
  }
  for_each_chunk(segments, n, chunks, threads, [&](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
    partials[chunk] = 0;
    if (!moves(segment)) return;
    const int64_t group = segment.group;
    const auto outer_step = segment.max_exp_avg_sq ? chunk_outer_step<T, D, true> : chunk_outer_step<T, D, false>;
    partials[chunk] = outer_step(segment, begin, end, has_ended, factor[group],
                                 hyper[group].normalize != 0 ? 1 / walk_length[group] : 1, adamw[&segment - segments]);
  });
  add_to_groups(segments, n, chunks, partials, displacement_sq);
}

}  // namespace

void sum_squares(const Segment* segments, int64_t n, int64_t chunks, double* partials, int threads) {
  for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
    partials[chunk] = segment.grad ? chunk_sum_squares(segment, begin, end) : 0;
  });
}

void inner_step(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* factor,
                bool of_parameter, int64_t* moves, int64_t* lost_moves, int threads) {
  with_dtypes(dtypes, [=](auto type, auto of_displacement) {
    table_inner_step<decltype(type), decltype(of_displacement)>(segments, n, chunks, factor, of_parameter, moves,
                                                                lost_moves, threads);
  });
}

void end_walk(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* factor, double share,
              int threads) {
  with_dtypes(dtypes, [=](auto type, auto of_displacement) {
    table_end_walk<decltype(type), decltype(of_displacement)>(segments, n, chunks, factor, share, threads);
  });
}

void gradients(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, const double* scale,
               double* displacement_sq, double* partials, int threads) {
  with_dtypes(dtypes, [=](auto type, auto of_displacement) {
    for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
      const auto gradient = chunk_gradient<decltype(type), decltype(of_displacement)>;
      partials[chunk] = segment.grad ? gradient(segment, begin, end, scale[segment.group]) : 0;
    });
  });
  add_to_groups(segments, n, chunks, partials, displacement_sq);
}

void outer_step(const Segment* segments, int64_t n, int64_t chunks, DTypes dtypes, bool has_ended, const Hyper* hyper,
                const double* factor, const double* walk_length, double* displacement_sq, double* partials,
                int threads) {
  with_dtypes(dtypes, [=](auto type, auto of_displacement) {
    table_outer_step<decltype(type), decltype(of_displacement)>(segments, n, chunks, has_ended, hyper, factor,
                                                                walk_length, displacement_sq, partials, threads);
  });
}

}  // namespace nexus::NEXUS_ISA
