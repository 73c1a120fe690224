// Enough of CUDA's runtime to run csrc/cuda.cu on a CPU: blocks one after the other, the threads of a block as fibers
// that change at every barrier and warp shuffle. Found before the toolkit's header of this name; see module.cpp.
//
// What it shows: indexing, sums and their order, the last block, scalars, formulas. What it cannot: races, coalescing.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __builtin_assume(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

inline dim3 threadIdx(0), blockIdx(0), gridDim, blockDim;

// Fibers

namespace fibers {

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t start;
  bool started;
  jmp_buf at;  // unlike swapcontext, a jump costs no system call
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
};

inline std::vector<Fiber> all;
inline jmp_buf scheduler;
inline const std::function<void()>* body;
inline double slots[1024];  // what a thread shows the others
inline int launches;

inline void wait(State state) {
  Fiber& self = all[threadIdx.x];
  self.state = state;
  if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  (*body)();
  all[threadIdx.x].state = State::done;
  _longjmp(scheduler, 1);
}

// Lets a fiber run until it waits or is done.
inline void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(scheduler) != 0) return;
  if (all[t].started) _longjmp(all[t].at, 1);
  all[t].started = true;
  setcontext(&all[t].start);
}

// Makes the fibers [begin, end) ready if all of them that are not done wait for this.
inline void release(unsigned begin, unsigned end, State barrier) {
  bool waiting = false;
  for (unsigned t = begin; t < end; ++t) {
    if (all[t].state != barrier && all[t].state != State::done) return;
    waiting |= all[t].state == barrier;
  }
  for (unsigned t = begin; waiting && t < end; ++t)
    if (all[t].state == barrier) all[t].state = State::ready;
}

inline void run_block(const std::function<void()>& kernel) {
  body = &kernel;
  const unsigned n = blockDim.x;
  if (all.size() < n) all = std::vector<Fiber>(n);
  for (unsigned t = 0; t < n; ++t) {
    Fiber& fiber = all[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    fiber.started = false;
    fiber.state = State::ready;
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = 0; t < n; ++t)
      if (all[t].state == State::ready) {
        resume(t);
        running = true;
      }
    for (unsigned warp = 0; warp < n; warp += 32) release(warp, warp + 32, State::at_warp_barrier);
    release(0, n, State::at_block_barrier);
  }
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::State::at_block_barrier); }

inline int __syncthreads_or(int value) {
  fibers::slots[threadIdx.x] = value;
  __syncthreads();
  int any = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) any |= fibers::slots[t] != 0;
  __syncthreads();
  return any;
}

template <class X>
X __shfl_down_sync(unsigned, X value, unsigned distance) {
  fibers::slots[threadIdx.x] = double(value);
  fibers::wait(fibers::State::at_warp_barrier);
  const X other = threadIdx.x % 32 + distance < 32 ? X(fibers::slots[threadIdx.x + distance]) : value;
  fibers::wait(fibers::State::at_warp_barrier);
  return other;
}

inline void __threadfence() {}
template <class X>
X __ldcg(const X* from) { return *from; }
template <class X>
X atomicAdd(X* to, X value) {
  const X before = *to;
  *to += value;
  return before;
}

// The host

enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
struct cudaFuncAttributes {};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline int driver_version = 13000, runtime_version = 13000;
inline cudaError_t next_error = cudaSuccess;  // of the functions that may fail

inline const char* cudaGetErrorString(cudaError_t) { return "an error that a test asked for"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTest"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = driver_version, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = runtime_version, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrComputeCapabilityMajor ? 7 : 5;
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return next_error; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (next_error != cudaSuccess) return next_error;
  const std::function<void()> body = [&] { kernel(arguments...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  ++fibers::launches;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) fibers::run_block(body);
  return cudaSuccess;
}
