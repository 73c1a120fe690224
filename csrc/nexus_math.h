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

// One row of table.Table.rows: addresses in bytes (0: none), length in elements, grad_dtype a DType, chunk: number of its
// first chunk.
#define NEXUS_SEGMENT                                                                                       \
  weight, remainder, displacement, anchor, grad, grad_dtype, exp_avg, exp_avg_sq, max_exp_avg_sq, step, length, \
      group, touched, chunk
struct Segment {
  int64_t NEXUS_SEGMENT;
};

// One row of cycle.Cycle.hyper.
#define NEXUS_HYPER inner_lr, lr, beta1, beta2, eps, weight_decay, sign, normalize
struct Hyper {
  double NEXUS_HYPER;
};

enum class DType : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

// Of a table: of its parameters, and of their displacements.
struct DTypes {
  DType parameter, displacement;
};

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

// Storage types. `State` is the dtype of w, of all arithmetic and of the moments. load and store convert to and from it,
// rounding to nearest, ties to even. read and write are for weights: below float32, w is kept in two parts of 16 bits,
// the parameter, which is w rounded to nearest (ties away from zero), and a remainder. All of it is written with integers
// and selects so that it vectorizes everywhere. reference.read_weight and write_weight are the definition.

template <class Real>
struct FullPrecision {
  using Storage = Real;
  using State = Real;
  static constexpr DType dtype = sizeof(Real) == 8 ? DType::float64 : DType::float32;
  static constexpr bool low_precision = false;
  static NEXUS_INLINE State load(Storage x) { return x; }
  static NEXUS_INLINE Storage store(State x) { return x; }
};
using Float64 = FullPrecision<double>;
using Float32 = FullPrecision<float>;

struct BFloat16 {
  using Storage = uint16_t;
  using State = float;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr bool low_precision = true;
  static NEXUS_INLINE State load(Storage x) { return bit_cast<float>(uint32_t(x) << 16); }
  static NEXUS_INLINE Storage store(State x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return Storage((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
  // w's upper and lower half, the upper one rounded: where the lower one is 0x8000 or more, it borrows one. Never from
  // ±0, inf or NaN, which somebody else must have written.
  static NEXUS_INLINE State read(Storage parameter, Storage remainder) {
    const uint32_t high = parameter, low = remainder, borrow = low >> 15, magnitude = high & 0x7fffu;
    const uint32_t alone = (uint32_t(magnitude == 0) & borrow) | uint32_t(magnitude >= 0x7f80u);
    return bit_cast<float>(alone ? high << 16 : (high - borrow) << 16 | low);
  }
  static NEXUS_INLINE void write(State w, Storage& parameter, Storage& remainder) {
    const uint32_t bits = bit_cast<uint32_t>(w);
    const uint32_t rounded = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x8000u) >> 16;
    parameter = Storage(rounded);
    remainder = Storage((rounded & 0x7fffu) >= 0x7f80u ? 0u : bits & 0xffffu);
  }
};

struct Float16 {
  using Storage = uint16_t;
  using State = float;
  static constexpr DType dtype = DType::float16;
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
  // |w| = |parameter| ± units of 2^-16 of the parameter's spacing. Remainder: their number below a bit that says minus;
  // minus none means minus 0x8000.
  static NEXUS_INLINE State read(Storage parameter, Storage remainder) {
    const uint32_t sign = uint32_t(parameter & 0x8000u) << 16, magnitude = parameter & 0x7fffu;
    const float rounded = load(Storage(magnitude));
    const bool minus = remainder >= 0x8000u;
    const bool alone = (int(magnitude == 0) & int(minus)) | int(magnitude >= 0x7c00u);
    const uint32_t number = remainder == 0x8000u ? 0x8000u : remainder & 0x7fffu;
    const float units = float(int32_t(minus ? 0u - number : number)) * unit(rounded);
    const float w = rounded + (alone ? 0.0f : units);
    return bit_cast<float>(bit_cast<uint32_t>(w) | sign);
  }
  static NEXUS_INLINE void write(State w, Storage& parameter, Storage& remainder) {
    const uint32_t bits = bit_cast<uint32_t>(w), sign = bits >> 16 & 0x8000u;
    const float all = bit_cast<float>(bits & 0x7fffffffu);
    const float magnitude = all < 0x1p-17f ? (all + 0x1p-17f) - 0x1p-17f : all;  // to a multiple of 2^-40
    const uint32_t of_it = bit_cast<uint32_t>(magnitude);
    const bool finite = magnitude < 65520.0f;
    // Ties away from zero; the subnormal ones are their number of 2^-24.
    const uint32_t normal = (of_it - 0x38000000u + 0x1000u) >> 13;
    const uint32_t subnormal = uint32_t(int32_t((magnitude < 0x1p-14f ? magnitude : 0.0f) * 0x1p24f + 0.5f));
    uint32_t half = magnitude < 0x1p-14f ? subnormal : normal;
    half = finite ? half : 0x7c00u;
    const float rounded = load(Storage(half));
    const float inverse_unit = bit_cast<float>(0x7f000000u - bit_cast<uint32_t>(unit(rounded)));
    const int32_t number = int32_t((finite ? magnitude - rounded : 0.0f) * inverse_unit);
    parameter = Storage(of_it > 0x7f800000u ? 0x7e00u : half | sign);
    remainder = Storage(number < 0 ? 0x8000u | (uint32_t(-number) & 0x7fffu) : uint32_t(number));
  }

 private:
  // 2^-16 of the spacing of float16 at a number of its; at inf, that of the largest.
  static NEXUS_INLINE float unit(float rounded) {
    uint32_t exponent = bit_cast<uint32_t>(rounded) >> 23;
    exponent = exponent < 113u ? 113u : exponent > 142u ? 142u : exponent;
    return bit_cast<float>((exponent - 26u) << 23);
  }
};

// Calls the function with the storage type that belongs to a dtype.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the function may be one of the host
#endif
template <class Function>
NEXUS_INLINE void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float64: return function(Float64{});
    case DType::float32: return function(Float32{});
    case DType::bfloat16: return function(BFloat16{});
    case DType::float16: return function(Float16{});
  }
}

// The same for a table's two: displacements are float64 for float64, else bfloat16 or float32.
template <class Function>
void with_dtypes(DTypes dtypes, const Function& function) {
  with_dtype(dtypes.parameter, [&](auto type) {
    if constexpr (sizeof(typename decltype(type)::State) == 8)
      function(type, Float64{});
    else if (dtypes.displacement == DType::bfloat16)
      function(type, BFloat16{});
    else
      function(type, Float32{});
  });
}

// θ, the outer weights, from w and D; and w from θ and the next D. An element that has no displacement is not touched,
// so that -0 stays -0.
template <class State>
NEXUS_INLINE State outer_weight(State w, State D) {
  return D != 0 ? w + D : w;
}
template <class State>
NEXUS_INLINE State walked_weight(State theta, State D) {
  return D != 0 ? theta - D : theta;
}

// The norm of a micro-batch's gradients and what it decides: see Cycle.advance in cycle.py.
struct InnerStep {
  double norm;
  bool taken;  // whether anything moves

  NEXUS_INLINE InnerStep(double sq_norm, bool found_inf)
      : norm(sqrt(sq_norm)), taken(norm > 0 && norm < INFINITY && !found_inf) {}
  NEXUS_INLINE double length(const Hyper& h) const { return taken ? h.inner_lr : 0; }
  NEXUS_INLINE double factor(const Hyper& h) const { return taken ? h.sign * h.inner_lr / norm : 0; }
  // For `metrics()`, -1 in place of NaN.
  NEXUS_INLINE double unscaled(double grad_scale) const {
    const double unscaled = norm / grad_scale;
    return unscaled == unscaled ? unscaled : -1;
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
