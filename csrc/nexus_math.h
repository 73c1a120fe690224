// The math of Nexus for one element, shared by every traversal that is written in C++.
// nexus_fused/reference.py is the definition; the operations and their order are the same here, and with contraction
// into fused multiply-adds off (the build sees to it) results are equal to it bit for bit, given the same scalars.
//
// NEXUS_ISA names the namespace: a file may be compiled once for each instruction set, and no inline function of one
// may serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define NEXUS_INLINE __host__ __device__ __forceinline__
#else
#define NEXUS_INLINE inline __attribute__((always_inline))
#endif

namespace nexus {

// Members are macros so that a test can compare their names with the lists in Python.

// One row of table.Table.rows: addresses in bytes (0: none), length in elements, chunk: number of its first chunk.
#define NEXUS_SEGMENT \
  weight, grad, theta, walk, exp_avg, exp_avg_sq, max_exp_avg_sq, step, length, group, touched, chunk
struct Segment {
  int64_t NEXUS_SEGMENT;
};

// One row of cycle.Cycle.hyper.
#define NEXUS_HYPER inner_lr, lr, beta1, beta2, eps, weight_decay, sign, normalize
struct Hyper {
  double NEXUS_HYPER;
};

enum class DType : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

constexpr int64_t kChunk = 16384;  // elements with a partial sum of their own: table.CHUNK_ELEMENTS

template <class T>
NEXUS_INLINE T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

namespace NEXUS_ISA {

template <class To, class From>
NEXUS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Storage types. `State` is the dtype of walk, master and moments. Conversions round to nearest, ties to even, and are
// written with integers and selects so that they vectorize everywhere.

template <class Real>
struct FullPrecision {
  using Storage = Real;
  using State = Real;
  static constexpr bool low_precision = false;
  static NEXUS_INLINE State load(Storage x) { return x; }
};
using Float64 = FullPrecision<double>;
using Float32 = FullPrecision<float>;

struct BFloat16 {
  using Storage = uint16_t;
  using State = float;
  static constexpr bool low_precision = true;
  static NEXUS_INLINE State load(Storage x) { return bit_cast<float>(uint32_t(x) << 16); }
  static NEXUS_INLINE Storage store(State x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return Storage((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  using State = float;
  static constexpr bool low_precision = true;
  static NEXUS_INLINE State load(Storage x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x));  // one instruction
#else
    // Exponent and mantissa moved into place and rebiased by a multiplication, which is exact for subnormals too.
    const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u));  // 2^112
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t bits = (x & 0x7c00u) == 0x7c00u ? special : finite;
    return bit_cast<float>(bits | uint32_t(x & 0x8000u) << 16);
#endif
  }
  static NEXUS_INLINE Storage store(State x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal: rebias the exponent, round at bit 13. Subnormal: adding 0.5 lets the floating-point unit round at 2^-24.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
    return Storage(half | (bits >> 16 & 0x8000u));
  }
};

// γ·g/n as (g · 2^a) · (m · 2^b) in the state's dtype: γ/n leaves float32's range long before γ·g/n does, and the first
// product is exact. `factor` is ±γ/n in float64.
template <class State>
struct GradientScale {
  State power, rest;

  GradientScale() = default;
  explicit NEXUS_INLINE GradientScale(double factor) {
    int exponent;
    const double mantissa = frexp(factor, &exponent);
    const int half = exponent >> 1;
    power = State(ldexp(1.0, half));
    rest = State(ldexp(mantissa, exponent - half));
  }
  NEXUS_INLINE State operator()(State g) const { return (g * power) * rest; }
};

// torch.optim.AdamW's formula for update number `step` of one parameter, its scalars computed in float64 and rounded
// to the state's dtype as PyTorch does with Python scalars.
template <class State>
struct AdamW {
  State decay, beta1, one_minus_beta1, beta2, one_minus_beta2, neg_step_size, inv_bias_correction2_sqrt, eps;
  bool lerp_from_start;

  AdamW() = default;
  NEXUS_INLINE AdamW(const Hyper& h, double step)
      : decay(State(1 - h.lr * h.weight_decay)),
        beta1(State(h.beta1)),
        one_minus_beta1(State(1 - h.beta1)),
        beta2(State(h.beta2)),
        one_minus_beta2(State(1 - h.beta2)),
        neg_step_size(State(-(h.lr / (1 - pow(h.beta1, step))))),
        inv_bias_correction2_sqrt(State(1 / sqrt(1 - pow(h.beta2, step)))),
        eps(State(h.eps)),
        lerp_from_start(1 - h.beta1 < 0.5) {}

  // Returns the new θ; updates the moments (and, for amsgrad, their maximum) in place.
  template <bool amsgrad>
  NEXUS_INLINE State operator()(State theta, State G, State& exp_avg, State& exp_avg_sq, State& max_exp_avg_sq) const {
    const State change = G - exp_avg;
    const State near_start = exp_avg + one_minus_beta1 * change, near_end = G - beta1 * change;
    exp_avg = lerp_from_start ? near_start : near_end;
    exp_avg_sq = beta2 * exp_avg_sq + (one_minus_beta2 * G) * G;
    State second = exp_avg_sq;
    if (amsgrad) {
      // As torch.maximum: NaN wins.
      const bool keep = max_exp_avg_sq > exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq;
      second = max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
    }
    const State denom = std::sqrt(second) * inv_bias_correction2_sqrt + eps;
    return theta * decay + (neg_step_size * exp_avg) / denom;
  }
};

}  // namespace NEXUS_ISA
}  // namespace nexus
