// Teams: the threads that work on one map, seen so that the same code runs on a GPU and on the host.
//
// A kernel is a sequence of phases. each(f) runs f(thread) for every thread of the team and then waits for all of them;
// sum(f) and max(f) reduce what f(thread) returns. On a GPU a thread runs its own f and the wait is a barrier; on the
// host a loop runs them one after the other. Values outside phases are the same in every thread. Within a phase no
// thread may read what another writes: the host can run a phase's threads in either order, and must find the same bits.
//
// Sums are butterflies: with w = min(size, 32), step by step for o = w/2, ..., 2, 1, thread t adds the value of t ^ o;
// the warps of a block are then added in order, from the first.
#pragma once

#if defined(__CUDACC__)
#define PYPRUNE_TEAM __device__ __forceinline__
#define PYPRUNE_RARE __device__ __noinline__  // its registers should not be taken from what runs for every map
#define PYPRUNE_SHARED __host__ __device__ __forceinline__
#define PYPRUNE_UNROLL_ALL _Pragma("unroll")
#define PYPRUNE_UNROLL_ONE _Pragma("unroll 1")
#else
#include <cmath>
#include <cstddef>
#include <vector>
#define PYPRUNE_TEAM inline
#define PYPRUNE_RARE inline
#define PYPRUNE_SHARED inline
#define PYPRUNE_UNROLL_ALL
#define PYPRUNE_UNROLL_ONE
#endif

namespace pyprune {
namespace {

// Two numbers that are read, or added, at once: 16 bytes are one access to shared memory.
struct alignas(16) Pair {
  double a, b;
};
PYPRUNE_TEAM Pair operator+(const Pair& x, const Pair& y) {
  return {x.a + y.a, x.b + y.b};
}

PYPRUNE_TEAM double larger(double a, double b) {
  return a > b ? a : b;
}
PYPRUNE_TEAM double smaller(double a, double b) {
  return a < b ? a : b;
}

#if defined(__CUDACC__)

PYPRUNE_TEAM double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
PYPRUNE_TEAM double root(double a) {
  return __dsqrt_rn(a);
}

// Hides a value from the compiler, which would compute its multiples ahead of a loop and run out of registers.
PYPRUNE_TEAM int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

PYPRUNE_TEAM double from_lane(unsigned mask, double value, int other) {
  return __shfl_xor_sync(mask, value, other);
}
PYPRUNE_TEAM Pair from_lane(unsigned mask, const Pair& value, int other) {
  return {__shfl_xor_sync(mask, value.a, other), __shfl_xor_sync(mask, value.b, other)};
}

template <int kWidth, class Value>
PYPRUNE_TEAM Value sum_lanes(unsigned mask, Value value) {
  PYPRUNE_UNROLL_ALL
  for (int o = kWidth / 2; o > 0; o /= 2) value = value + from_lane(mask, value, o);
  return value;
}
template <int kWidth>
PYPRUNE_TEAM double max_lanes(unsigned mask, double value) {
  PYPRUNE_UNROLL_ALL
  for (int o = kWidth / 2; o > 0; o /= 2) value = larger(value, from_lane(mask, value, o));
  return value;
}

// What each thread keeps to itself from phase to phase: registers.
template <class T>
struct OwnState {
  T value;
  PYPRUNE_TEAM explicit OwnState(int) {}
  PYPRUNE_TEAM T& operator()(int) { return value; }
};

// kWidth neighbouring lanes of a warp, or a single thread. Other lanes of the warp may be elsewhere.
template <int kWidth>
class LaneTeam {
 public:
  template <class T>
  using State = OwnState<T>;

  PYPRUNE_TEAM LaneTeam()
      : lane_(static_cast<int>(threadIdx.x) % kWidth),
        mask_((kWidth == 32 ? ~0u : (1u << (kWidth % 32)) - 1) << (threadIdx.x % 32 / kWidth * kWidth)) {}
  PYPRUNE_TEAM int size() const { return kWidth; }
  PYPRUNE_TEAM void wait() const {
    if (kWidth > 1) __syncwarp(mask_);
  }
  template <class F>
  PYPRUNE_TEAM void each(const F& f) const {
    f(lane_);
    wait();
  }
  template <class F>
  PYPRUNE_TEAM auto sum(const F& f) const {
    return sum_lanes<kWidth>(mask_, f(lane_));
  }
  template <class F>
  PYPRUNE_TEAM double max(const F& f) const {
    return max_lanes<kWidth>(mask_, f(lane_));
  }

 private:
  int lane_;
  unsigned mask_;
};

// All threads of a block: whole warps.
class BlockTeam {
 public:
  template <class T>
  using State = OwnState<T>;

  PYPRUNE_TEAM explicit BlockTeam(Pair* warps) : warps_(warps) {}  // one Pair of shared memory for each warp
  PYPRUNE_TEAM int size() const { return static_cast<int>(blockDim.x); }
  template <class F>
  PYPRUNE_TEAM void each(const F& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  PYPRUNE_TEAM auto sum(const F& f) const {
    return gather(sum_lanes<32>(~0u, f(static_cast<int>(threadIdx.x))), [](auto a, auto b) { return a + b; });
  }
  template <class F>
  PYPRUNE_TEAM double max(const F& f) const {
    return gather(max_lanes<32>(~0u, f(static_cast<int>(threadIdx.x))), [](auto a, auto b) { return larger(a, b); });
  }

 private:
  template <class Value, class Join>
  PYPRUNE_TEAM Value gather(Value value, const Join& join) const {
    Value* const values = reinterpret_cast<Value*>(warps_);
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value;
    __syncthreads();
    value = values[0];
    for (int w = 1; w < size() / 32; ++w) value = join(value, values[w]);
    __syncthreads();
    return value;
  }
  Pair* warps_;
};

#else

inline double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline double root(double a) {
  return std::sqrt(a);
}
inline int opaque(int value) {
  return value;
}

// The host's stand-in for both teams; `backwards` runs the threads of every phase from last to first.
class HostTeam {
 public:
  template <class T>
  class State {
   public:
    explicit State(int size) : values_(static_cast<std::size_t>(size)) {}
    T& operator()(int thread) { return values_[static_cast<std::size_t>(thread)]; }

   private:
    std::vector<T> values_;
  };

  HostTeam(int size, bool backwards) : size_(size), backwards_(backwards) {}
  int size() const { return size_; }
  template <class F>
  void each(const F& f) const {
    for (int i = 0; i < size_; ++i) f(backwards_ ? size_ - 1 - i : i);
  }
  template <class F>
  auto sum(const F& f) const {
    return reduce(f, [](auto a, auto b) { return a + b; });
  }
  template <class F>
  double max(const F& f) const {
    return reduce(f, [](auto a, auto b) { return larger(a, b); });
  }

 private:
  template <class F, class Join>
  auto reduce(const F& f, const Join& join) const {
    std::vector<decltype(f(0))> now(static_cast<std::size_t>(size_)), next(now);
    each([&](int t) { now[static_cast<std::size_t>(t)] = f(t); });
    const std::size_t size = now.size(), width = size < 32 ? size : 32;
    for (std::size_t o = width / 2; o > 0; o /= 2) {
      for (std::size_t t = 0; t < size; ++t) next[t] = join(now[t], now[t ^ o]);
      now.swap(next);
    }
    auto value = now[0];
    for (std::size_t w = 32; w < size; w += 32) value = join(value, now[w]);
    return value;
  }
  int size_;
  bool backwards_;
};

#endif

}  // namespace
}  // namespace pyprune
