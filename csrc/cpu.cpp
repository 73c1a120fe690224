// CPU kernels: squared norm, inner step, fused outer step, over a table of segments.
//
// Compiled once for each instruction set; NEXUS_ISA names the namespace (see CMakeLists.txt). Work is cut into chunks
// of kChunk elements of one segment. Threads take chunks; whatever is summed is summed per chunk in 16 fixed lanes and
// then over chunks in their order, so that a result depends neither on threads nor on the width of a register.

#include "cpu.h"

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

NEXUS_DECLARE_KERNELS(NEXUS_ISA)

namespace nexus::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 512;  // elements whose intermediate results stay in the first-level cache
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

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// Calls body(segment, begin, end, chunk) for every chunk of the table, on several threads.
template <class Body>
void for_each_chunk(const Segment* segments, int64_t n, int64_t chunks, int threads, const Body& body) {
  const auto starts_after = [](int64_t chunk, const Segment& s) { return chunk < s.chunk; };
#pragma omp parallel num_threads(threads) if (chunks > 1)
  {
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      // The last segment that starts at or before this chunk; empty segments own no chunk and are passed over.
      const Segment& segment = *(std::upper_bound(segments, segments + n, chunk, starts_after) - 1);
      const int64_t begin = (chunk - segment.chunk) * kChunk;
      body(segment, begin, std::min(begin + kChunk, segment.length), chunk);
    }
    stream_fence();
  }
}

// Eight doubles; the compiler maps them to whatever registers there are, with the same result.
typedef double Doubles __attribute__((vector_size(64), aligned(8)));
typedef float Floats __attribute__((vector_size(32), aligned(4)));

inline Doubles load_doubles(const double* x) { return *reinterpret_cast<const Doubles*>(x); }
inline Doubles load_doubles(const float* x) { return __builtin_convertvector(*reinterpret_cast<const Floats*>(x), Doubles); }

// Σ x² in float64 over kLanes fixed lanes, added to `lanes`; n is a multiple of kLanes but for the end of a segment.
template <class X>
void add_squares(const X* x, int64_t n, double* lanes) {
  constexpr int kVectors = kLanes / 8;
  Doubles sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = load_doubles(lanes + 8 * v);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int v = 0; v < kVectors; ++v) {
      const Doubles values = load_doubles(x + i + 8 * v);
      sums[v] += values * values;
    }
  for (int v = 0; v < kVectors; ++v) memcpy(lanes + 8 * v, &sums[v], sizeof sums[v]);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += double(x[i]) * double(x[i]);
}

double sum_lanes(const double* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Bytes per element: reads g.
template <class T>
double chunk_sq_norm(const Segment& segment, int64_t begin, int64_t end) {
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
double table_sq_norm(const Segment* segments, int64_t n, int64_t chunks, double* partials, int threads) {
  for_each_chunk(segments, n, chunks, threads, [=](const Segment& segment, int64_t begin, int64_t end, int64_t chunk) {
    partials[chunk] = segment.grad ? chunk_sq_norm<T>(segment, begin, end) : 0;
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[chunk];
  return sum;
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

  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const State* w = T::low_precision && first ? theta + i : walk + i;
    if (first && (!T::low_precision || factor == 0))  // w_0 = θ, also where the step is skipped
      stream(T::low_precision ? walk + i : theta + i, w, n * sizeof(State));
    if (factor == 0) continue;

    State next[kBlock];
    int32_t block_moves = 0, block_lost = 0;
#pragma omp simd reduction(+ : block_moves, block_lost)
    for (int64_t j = 0; j < n; ++j) {
      const State step = scaled_gradient<State>(T::load(g[i + j]), factor);
      next[j] = w[j] - step;
      const int32_t moved = step != 0;
      block_moves += moved;
      block_lost += moved & int32_t(next[j] == w[j]);
    }
    moves += block_moves;
    lost_moves += block_lost;

    if (T::low_precision && first)
      stream(walk + i, next, n * sizeof(State));
    else
      memcpy(walk + i, next, n * sizeof(State));
    if constexpr (T::low_precision) {
      typename T::Storage rounded[kBlock];
      for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(next[j]);
      stream(weight + i, rounded, n * sizeof(rounded[0]));
    }
  }
}

template <class T>
void table_inner_step(const Segment* segments, int64_t n, int64_t chunks, const double* factor, double* moves,
                      double* lost_moves, int threads) {
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
  *moves += double(total_moves);
  *lost_moves += double(total_lost);
}

// D = (θ − w) + γ·g/n;  G = D/Γ;  θ ← AdamW(θ, G);  w ← θ. Returns ‖D‖² of the chunk.
// Bytes per element, float32: reads anchor w g m v, writes w m v (32); bfloat16: reads master walk g m v, writes
// master m v and the parameter (32).
template <class T, bool amsgrad>
double chunk_outer_step(const Segment& segment, int64_t begin, int64_t end, double factor, double walk_length,
                        bool normalize, const AdamW<typename T::State>& adamw) {
  using State = typename T::State;
  const auto* g = pointer<const typename T::Storage>(factor == 0 ? 0 : segment.grad);
  auto* weight = pointer<typename T::Storage>(segment.weight);
  State* theta = pointer<State>(segment.theta);
  const State* walk = pointer<const State>(segment.walk);
  State* exp_avg = pointer<State>(segment.exp_avg);
  State* exp_avg_sq = pointer<State>(segment.exp_avg_sq);
  State* max_exp_avg_sq = pointer<State>(segment.max_exp_avg_sq);
  const bool from_theta = segment.touched || T::low_precision;
  const State inv_gamma = normalize ? State(1 / walk_length) : State(1);

  double lanes[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const State* from = from_theta ? theta + i : walk + i;
    State D[kBlock], next[kBlock];
    if (segment.touched)
      for (int64_t j = 0; j < n; ++j) D[j] = from[j] - walk[i + j];
    else
      std::fill(D, D + n, State(0));
    if (g)
      for (int64_t j = 0; j < n; ++j) D[j] += scaled_gradient<State>(T::load(g[i + j]), factor);
    add_squares(D, n, lanes);
    State* m = exp_avg + i;
    State* v = exp_avg_sq + i;
    State* v_max = amsgrad ? max_exp_avg_sq + i : v;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      State first = m[j], second = v[j], maximum = v_max[j];
      next[j] = adamw.template operator()<amsgrad>(from[j], D[j] * inv_gamma, first, second, maximum);
      m[j] = first;
      v[j] = second;
      if (amsgrad) v_max[j] = maximum;
    }
    if constexpr (T::low_precision) {
      memcpy(theta + i, next, n * sizeof(State));
      typename T::Storage rounded[kBlock];
      for (int64_t j = 0; j < n; ++j) rounded[j] = T::store(next[j]);
      stream(weight + i, rounded, n * sizeof(rounded[0]));
    } else {
      memcpy(weight + i, next, n * sizeof(State));
    }
  }
  return sum_lanes(lanes);
}

template <class T>
void table_outer_step(const Segment* segments, int64_t n, int64_t chunks, const Hyper* hyper, const double* factor,
                      const double* walk_length, double* displacement_sq, double* partials, int threads) {
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
    if (!(segment.touched || segment.grad) || !(walk_length[group] > 0)) return;
    const auto step = segment.max_exp_avg_sq ? chunk_outer_step<T, true> : chunk_outer_step<T, false>;
    partials[chunk] = step(segment, begin, end, factor[group], walk_length[group], hyper[group].normalize != 0,
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

double sq_norm(const Segment* segments, int64_t n, int64_t chunks, DType dtype, double* partials, int threads) {
  return with_dtype(dtype, [=](auto type) {
    return table_sq_norm<decltype(type)>(segments, n, chunks, partials, threads);
  });
}

void inner_step(const Segment* segments, int64_t n, int64_t chunks, DType dtype, const double* factor, double* moves,
                double* lost_moves, int threads) {
  with_dtype(dtype, [=](auto type) {
    table_inner_step<decltype(type)>(segments, n, chunks, factor, moves, lost_moves, threads);
  });
}

void outer_step(const Segment* segments, int64_t n, int64_t chunks, DType dtype, const Hyper* hyper,
                const double* factor, const double* walk_length, double* displacement_sq, double* partials,
                int threads) {
  with_dtype(dtype, [=](auto type) {
    table_outer_step<decltype(type)>(segments, n, chunks, hyper, factor, walk_length, displacement_sq, partials,
                                     threads);
  });
}

}  // namespace nexus::NEXUS_ISA
