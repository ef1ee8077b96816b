// Kernel SSIM of all pairs of filters: the matrix, or what is asked of it, without holding it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/element.h"
#include "pyprune/pool.h"
#include "pyprune/ssim_math.h"

namespace pyprune {

// Weights [F2, F1, K1, K2]; strides count elements.
struct SsimWeights {
  const void* data;
  Element element;
  std::ptrdiff_t F2, F1, K1, K2, stride_f2, stride_f1, stride_k1, stride_k2;
};

struct SsimConstants {
  double alpha, beta, gamma;
  double eps;     // times the mean square weight, or itself
  bool absolute;  // the latter
};

// What a pass over one filter finds; squares are of scaled weights. Numbers that are not finite are counted, and leave
// the rest without meaning.
struct SsimScan {
  double largest, sum_of_squares;
  std::ptrdiff_t not_finite;
};

// How weights become slices, and what is computed from these.
struct SsimPlan {
  bool wide;        // float64 lanes
  double scale[2];  // powers of two, applied one after the other: together they may not be a float64
  SsimFormula formula;
};

constexpr int kSsimBlock = 16;  // filters whose slices lie side by side in memory

// How many channels of a block are gathered before they are prepared.
static inline std::ptrdiff_t ssim_gathered(std::ptrdiff_t K) {
  return K < 16 ? 16 : K < 256 ? 256 / K : 1;
}

// One variant. A prepared block holds kSsimBlock filters over some channels: [channel][K + kSsimRows][kSsimBlock],
// float, or double in float64 lanes; 64-byte aligned.
struct SsimVariant {
  const char* name;
  const char* needs;  // instruction sets, in words
  bool (*supported)();
  double speed;  // rough, in slice pairs of 3 x 3 a second on one thread
  SsimScan (*scan)(const SsimWeights&, std::ptrdiff_t filter, double scale);
  // Prepares channels [first, last) of these kSsimBlock filters.
  // scratch: ssim_gathered(K) * K * kSsimBlock doubles, 64-byte aligned.
  void (*prepare)(const SsimWeights&, const SsimPlan&, const std::ptrdiff_t* filters, std::ptrdiff_t first,
                  std::ptrdiff_t last, double* scratch, void* block);
  // Adds psi * unit over the channels to sums [kSsimBlock][kSsimBlock] (x, y), for all pairs of two blocks.
  void (*all)(const SsimPlan&, int K, std::ptrdiff_t channels, const void* x, const void* y, double* sums);
  // The same to sums [kSsimBlock], for the pairs that have the same place in the two blocks.
  void (*each)(const SsimPlan&, int K, std::ptrdiff_t channels, const void* x, const void* y, double* sums);
};

extern const SsimVariant kSsimBaseline, kSsimAvx2, kSsimAvx512;  // the latter two on x86-64 only
extern const SsimVariant kSsimScalar;                            // scalar, for tests

// Where results go; null where they are not wanted. Psi is rounded to float first, unless the weights are float64.
struct SsimResult {
  void* matrix;  // [F2, F2], float or double
  std::ptrdiff_t thresholds, bins, top;
  const double* threshold;      // [thresholds]
  std::int64_t* count;          // [thresholds], pairs above
  std::int64_t* histogram;      // [bins]
  std::int64_t *top_i, *top_j;  // [top]
  double* top_psi;              // [top], descending, ties by (i, j)
  std::int64_t* nearest;        // [F2], -1 without pairs
  double* nearest_psi;          // [F2]
  double* mean;
};

// Asked on the calling thread between its pieces of work; true stops.
struct SsimInterrupt {
  PoolPoll poll;
  void* context;
};

enum class SsimEnd { done, interrupted, not_finite };

// pairs: int64 [count][2], i != j, or null for all i < j. not_finite: how many weights are not.
SsimEnd ssim(const SsimWeights&, const SsimConstants&, const std::int64_t* pairs, std::ptrdiff_t count,
             const SsimVariant&, int threads, const SsimInterrupt&, const SsimResult&, std::ptrdiff_t* not_finite);

// The plan for a layer with this largest weight, and this mean square one after dividing by the power of two that takes
// the largest into [0.5, 1).
SsimPlan ssim_plan(const SsimConstants&, double largest, double mean_square, Element, std::ptrdiff_t K);

}  // namespace pyprune
