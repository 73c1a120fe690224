// CPU kernels: sums of squares, inner step, displacement, fused outer step, over a table of segments.
//
// Compiled once for each instruction set; NEXUS_ISA names the namespace (see CMakeLists.txt). Work is cut into chunks
// of kChunk elements of one segment. Threads take chunks; whatever is summed is summed per chunk in kLanes fixed lanes,
// and then over chunks in their order, so that a result depends neither on threads nor on the width of a register.

#include "cpu.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Iterations of the next loop touch different elements, though its pointers may be equal.
#if defined(__clang__)
#define NEXUS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define NEXUS_INDEPENDENT _Pragma("GCC ivdep")
#endif

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
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += double(x[i]) * double(x[i]);
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

// Bytes per element: reads g.
template <class T>
double chunk_sum_squares(const Segment& segment, int64_t begin, int64_t end) {
  const auto* g = pointer<const typename T::Storage>(segment.grad);
  double lanes[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    if constexpr (T::low_precision) {
      typename T::State values[kBlock];
      for (int64_t j = 0; j < n; ++j) values[j] = T::load(g[i + j]);
      add_squares(values, n, lanes);
    } else {
      add_squares(g + i, n, lanes);
    }
  }
  return sum_lanes(lanes);
}

template <class T>
void table_sum_squares(const Segment* segments, int64_t n, int64_t chunks, double* partials, int threads) {
  for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
    partials[chunk] = segment.grad ? chunk_sum_squares<T>(segment, begin, end) : 0;
  });
}

// w ← w − γ·g/n. Bytes per element, float32: reads w g, writes w (12); the first time in a cycle also θ (16).
// bfloat16: reads walk (first: master) and g, writes walk and the parameter (12).
template <class T>
void chunk_inner_step(const Segment& segment, int64_t begin, int64_t end, double factor, int64_t& moves,
                      int64_t& lost_moves) {
  using State = typename T::State;
  const auto* g = pointer<const typename T::Storage>(segment.grad);
  auto* weight = pointer<typename T::Storage>(segment.weight);
  State* theta = pointer<State>(segment.theta);
  State* walk = pointer<State>(segment.walk);
  const bool first = !segment.touched;
  const GradientScale<State> scale(factor);

  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const State* w = T::low_precision && first ? theta + i : walk + i;
    if (first && (!T::low_precision || factor == 0))  // w_0 = θ, also where the step is skipped
      stream(T::low_precision ? walk + i : theta + i, w, n * sizeof(State));
    if (factor == 0) continue;

    State buffer[kBlock];
    State* next = T::low_precision ? buffer : walk + i;
    int32_t block_moves = 0, block_lost = 0;
#pragma omp simd reduction(+ : block_moves, block_lost)
    for (int64_t j = 0; j < n; ++j) {
      const State before = w[j], step = scale(T::load(g[i + j]));
      const State after = before - step;
      next[j] = after;
      block_moves += step != 0;
      block_lost += (step != 0) & (after == before);
    }
    moves += block_moves;
    lost_moves += block_lost;

    if constexpr (T::low_precision) {
      if (first)
        stream(walk + i, next, n * sizeof(State));
      else
        memcpy(walk + i, next, n * sizeof(State));
      typename T::Storage rounded[kBlock];
      for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(next[j]);
      stream(weight + i, rounded, n * sizeof(rounded[0]));
    }
  }
}

template <class T>
void table_inner_step(const Segment* segments, int64_t n, int64_t chunks, const double* factor, int64_t* moves,
                      int64_t* lost_moves, int threads) {
  int64_t total_moves = 0, total_lost = 0;
  for_each_chunk(segments, n, chunks, threads,
                 [=, &total_moves, &total_lost](const Segment& segment, int64_t begin, int64_t end, int64_t) {
                   if (!segment.grad) return;
                   int64_t chunk_moves = 0, chunk_lost = 0;
                   chunk_inner_step<T>(segment, begin, end, factor[segment.group], chunk_moves, chunk_lost);
#pragma omp atomic
                   total_moves += chunk_moves;  // integers: the order does not matter
#pragma omp atomic
                   total_lost += chunk_lost;
                 });
  *moves += total_moves;
  *lost_moves += total_lost;
}

// D = (θ − w) + γ·g/n; D · share overwrites the walk or, with `in_weight`, rounded the parameter.
// Bytes per element, float32: reads anchor w g, writes w, or reads w g, writes anchor w (16); bfloat16: reads master walk
// g, writes walk (14) or the parameter (12).
template <class T>
void chunk_displace(const Segment& segment, int64_t begin, int64_t end, double factor, double share, bool in_weight) {
  using State = typename T::State;
  const GradientScale<State> scale(factor);
  const State part = State(share);
  // A skipped last step has factor 0, and its gradient, which may hold NaN, is not looked at.
  const bool with_gradient = segment.grad && factor != 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const auto* g = pointer<const typename T::Storage>(segment.grad) + i;
    State* theta = pointer<State>(segment.theta) + i;
    State* walk = pointer<State>(segment.walk) + i;
    State D[kBlock];
    if (segment.touched) {
      for (int64_t j = 0; j < n; ++j) D[j] = theta[j] - walk[j];
    } else {
      std::fill_n(D, n, State(0));
      if (!T::low_precision) stream(theta, walk, n * sizeof(State));
    }
    if (with_gradient)
      for (int64_t j = 0; j < n; ++j) D[j] = D[j] + scale(T::load(g[j]));
    for (int64_t j = 0; j < n; ++j) D[j] = D[j] * part;
    if constexpr (T::low_precision) {
      if (in_weight) {
        typename T::Storage rounded[kBlock];
        for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(D[j]);
        stream(pointer<typename T::Storage>(segment.weight) + i, rounded, n * sizeof(rounded[0]));
        continue;
      }
      if (!segment.touched) {
        stream(walk, D, n * sizeof(State));
        continue;
      }
    }
    memcpy(walk, D, n * sizeof(State));
  }
}

template <class T>
void table_displace(const Segment* segments, int64_t n, int64_t chunks, const double* factor, double share,
                    bool in_weight, int threads) {
  for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t) {
    chunk_displace<T>(segment, begin, end, factor[segment.group], share, in_weight);
  });
}

// w ← θ, for a parameter whose weight holds a displacement and that takes no part in the outer step.
template <class T>
void chunk_restore(const Segment& segment, int64_t begin, int64_t end) {
  const auto* theta = pointer<const typename T::State>(segment.theta);
  auto* weight = pointer<typename T::Storage>(segment.weight);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    if constexpr (T::low_precision) {
      typename T::Storage rounded[kBlock];
      for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(theta[i + j]);
      stream(weight + i, rounded, n * sizeof(rounded[0]));
    } else {
      stream(weight + i, theta + i, n * sizeof(theta[0]));
    }
  }
}

// D = (θ − w) + γ·g/n;  G = D/Γ;  θ ← AdamW(θ, G);  w ← θ. Returns ‖D‖² of the chunk.
// Bytes per element, float32: reads anchor w g m v, writes w m v (32); bfloat16: reads master walk g m v, writes
// master m v and the parameter (32). displaced: D is read in the gradient's place or, without one, the walk's. Bytes,
// float32: reads anchor D m v, writes w m v (28); bfloat16: reads master D m v, writes master m v and the parameter (30,
// with D in bfloat16 28).
template <class T, bool amsgrad, bool touched, bool with_gradient, bool displaced>
double chunk_outer_step(const Segment& segment, int64_t begin, int64_t end, double factor, double inv_walk_length,
                        const AdamW<typename T::State>& adamw) {
  using State = typename T::State;
  const GradientScale<State> scale(factor);
  const State inv_gamma = State(inv_walk_length);

  double lanes[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const auto* g = pointer<const typename T::Storage>(segment.grad) + i;
    State* theta = pointer<State>(segment.theta) + i;
    State* walk = pointer<State>(segment.walk) + i;
    const State* from = touched || T::low_precision ? theta : walk;
    State* to = T::low_precision ? theta : walk;
    State* exp_avg = pointer<State>(segment.exp_avg) + i;
    State* exp_avg_sq = pointer<State>(segment.exp_avg_sq) + i;
    State* max_exp_avg_sq = amsgrad ? pointer<State>(segment.max_exp_avg_sq) + i : exp_avg_sq;
    // Two loops: one with all these pointers has more of them than compilers check for overlap, and stays scalar.
    State displacement[kBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (displaced) {
        displacement[j] = with_gradient ? T::load(g[j]) : walk[j];
      } else {
        const State walked = touched ? from[j] - walk[j] : State(0);
        displacement[j] = with_gradient ? walked + scale(T::load(g[j])) : walked;
      }
    }
    NEXUS_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      State m = exp_avg[j], v = exp_avg_sq[j], v_max = max_exp_avg_sq[j];
      to[j] = adamw.template operator()<amsgrad>(from[j], displacement[j] * inv_gamma, m, v, v_max);
      exp_avg[j] = m;
      exp_avg_sq[j] = v;
      if (amsgrad) max_exp_avg_sq[j] = v_max;
    }
    add_squares(displacement, n, lanes);
    if constexpr (T::low_precision) {
      typename T::Storage rounded[kBlock];
      for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(theta[j]);
      stream(pointer<typename T::Storage>(segment.weight) + i, rounded, n * sizeof(rounded[0]));
    }
  }
  return sum_lanes(lanes);
}

// The variant of chunk_outer_step for a segment.
template <class T>
auto outer_step_of(bool amsgrad, bool touched, bool with_gradient, bool displaced) {
  const auto choose = [=](auto ams) {
    constexpr bool a = decltype(ams)::value;
    const auto with = [=](auto gradient) {
      constexpr bool g = decltype(gradient)::value;
      if (displaced) return chunk_outer_step<T, a, true, g, true>;
      return touched ? chunk_outer_step<T, a, true, g, false> : chunk_outer_step<T, a, false, g, false>;
    };
    return with_gradient ? with(std::true_type{}) : with(std::false_type{});
  };
  return amsgrad ? choose(std::true_type{}) : choose(std::false_type{});
}

template <class T>
void table_outer_step(const Segment* segments, int64_t n, int64_t chunks, const Hyper* hyper, const double* factor,
                      const double* walk_length, double* displacement_sq, double* partials, bool displaced,
                      int threads) {
  // Parameters mostly share group and step: two powers for a run of them, not for each.
  std::vector<AdamW<typename T::State>> adamw(n);
  AdamW<typename T::State> current;
  int64_t group = -1;
  double step = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Segment& segment = segments[i];
    if (!(segment.touched || segment.grad) || !(walk_length[segment.group] > 0)) continue;
    const double next = double(*pointer<float>(segment.step) += 1);
    if (segment.group != group || next != step) current = AdamW<typename T::State>(hyper[segment.group], next);
    group = segment.group, step = next;
    adamw[i] = current;
  }
  for_each_chunk(segments, n, chunks, threads, [&](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
    const int64_t group = segment.group;
    partials[chunk] = 0;
    if (!(segment.touched || segment.grad) || !(walk_length[group] > 0)) {
      if (displaced) chunk_restore<T>(segment, begin, end);
      return;
    }
    // A skipped last step has factor 0, and its gradient, which may hold NaN, is not looked at.
    const bool with_gradient = segment.grad && (displaced || factor[group] != 0);
    const auto step = outer_step_of<T>(segment.max_exp_avg_sq, segment.touched, with_gradient, displaced);
    partials[chunk] = step(segment, begin, end, factor[group], hyper[group].normalize != 0 ? 1 / walk_length[group] : 1,
                           adamw[&segment - segments]);
  });
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = i + 1 < n ? segments[i + 1].chunk : chunks;
    for (int64_t chunk = segments[i].chunk; chunk < end; ++chunk) displacement_sq[segments[i].group] += partials[chunk];
  }
}

// Calls the function with the storage type that belongs to a dtype.
template <class Function>
auto with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float64: return function(Float64{});
    case DType::float32: return function(Float32{});
    case DType::bfloat16: return function(BFloat16{});
    default: return function(Float16{});
  }
}

}  // namespace

void sum_squares(const Segment* segments, int64_t n, int64_t chunks, DType dtype, double* partials, int threads) {
  with_dtype(dtype, [=](auto type) {
    table_sum_squares<decltype(type)>(segments, n, chunks, partials, threads);
  });
}

void inner_step(const Segment* segments, int64_t n, int64_t chunks, DType dtype, const double* factor, int64_t* moves,
                int64_t* lost_moves, int threads) {
  with_dtype(dtype, [=](auto type) {
    table_inner_step<decltype(type)>(segments, n, chunks, factor, moves, lost_moves, threads);
  });
}

void outer_step(const Segment* segments, int64_t n, int64_t chunks, DType dtype, const Hyper* hyper,
                const double* factor, const double* walk_length, double* displacement_sq, double* partials,
                bool displaced, int threads) {
  with_dtype(dtype, [=](auto type) {
    table_outer_step<decltype(type)>(segments, n, chunks, hyper, factor, walk_length, displacement_sq, partials,
                                     displaced, threads);
  });
}

void displace(const Segment* segments, int64_t n, int64_t chunks, DType dtype, const double* factor, double share,
              bool in_weight, int threads) {
  with_dtype(dtype, [=](auto type) {
    table_displace<decltype(type)>(segments, n, chunks, factor, share, in_weight, threads);
  });
}

}  // namespace nexus::NEXUS_ISA
