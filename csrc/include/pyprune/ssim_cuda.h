// Kernel SSIM on a GPU: what is asked of it, where things lie in memory, and its launches. Nothing here waits for the
// device or allocates, so that a CUDA graph can capture it. docs/ops/ssim.md describes the kernels, ssim_tile.h holds
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pyprune/team.h"

namespace pyprune {

using Counter = unsigned long long;

// A layer and what is wanted of it; null, or 0 of them, is not wanted. Counters are added to: the caller zeroes them.
struct SsimItem {
  const void* weights;  // [F2, F1, K] contiguous, float or double
  void* scratch;        // ssim_scratch_bytes, 16-byte aligned
  double alpha, beta, gamma, eps;
  const std::int64_t* pairs;  // [pair_count, 2], or null: all i < j with first <= i < last
  std::int64_t pair_count;
  float* matrix;             // [F2, F2]
  float* psi;                // of every pair, in the order of i, then j; or of pairs
  const double* thresholds;  // [threshold_count]
  Counter* counts;           // [threshold_count]
  Counter* histogram;        // [bins]
  Counter* sum;              // [1], of Psi in units of 2^-sum_shift
  Counter* nearest;          // [F2], the largest of (bits of Psi, ~partner); 0 without any
  std::int32_t F2, F1, K, first, last, threshold_count, bins, sum_shift;
  bool float64, absolute;      // weights; eps
  bool may_float, may_double;  // the arithmetic that e can ask for, ssim_routes
};

// What the weights of a layer decide: one at the start of its scratch.
struct SsimHead {
  double scale[2];  // powers of two, one after the other: together they may not be a float64
  double e;         // on that scale
  std::int64_t not_finite;
  bool wide;  // float64 arithmetic
};

struct SsimPart {
  double largest, sum_of_squares;  // the latter on a scale where the former lies in [1/2, 1)
  std::int64_t not_finite;
};

constexpr int kSsimThreads = 256;          // of every block, in all kernels
constexpr int kSsimParts = 256;            // at most, of a layer's scan; no more than threads
constexpr int kSsimPartSize = 4096;        // weights, at least
constexpr int kSsimSliceF2 = 16;           // filters of a block of preparation
constexpr int kSsimSliceF1 = 64;           // and channels
constexpr int kSsimBand = 64;              // `first` is a multiple: the side of the larger tile
constexpr int kSsimMostChannels = 448;     // of a run: that many psi in units of 2^-23 fit 32 bits
constexpr int kSsimFewChannels = 32;       // of a run, where there are few tiles
constexpr int kSsimManyBlocks = 512;       // of one layer: a GPU a few times over
constexpr int kSsimMostNumbers = 52;       // of a row in shared memory at a time; longer rows come in pieces
constexpr std::size_t kSsimStage = 24576;  // bytes to load while as many are worked on
constexpr int kSsimLocalCounters = 4096;   // in shared memory at the end; more go to device memory one by one

// Float32 lies within 1e-6 where beta = gamma = 1 and the products of ssim_psi stay in range, with weights below 2^20:
// e between 2^-80 and 2^40 of the largest weight's square.
constexpr double kSsimLeastFloat = 0x1p-80, kSsimMostFloat = 0x1p40;
constexpr double kSsimWideUnit = 0x1p40;  // Psi in float64 arithmetic adds up in units of 2^-40

PYPRUNE_SHARED std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

PYPRUNE_SHARED std::int64_t ssim_weights(const SsimItem& item) {
  return static_cast<std::int64_t>(item.F2) * item.F1 * item.K;
}
PYPRUNE_SHARED std::int64_t ssim_parts(const SsimItem& item) {
  const std::int64_t parts = divide_up(ssim_weights(item), kSsimPartSize);
  return parts < kSsimParts ? parts : kSsimParts;
}
PYPRUNE_SHARED std::int64_t ssim_slice_blocks(const SsimItem& item) {
  return divide_up(item.F2, kSsimSliceF2) * divide_up(item.F1, kSsimSliceF1);
}

template <class T>
struct SsimTile;
template <>
struct SsimTile<float> {
  static constexpr int kPairs = 4;  // squared, of a thread
  using Sum = std::uint32_t;
};
template <>
struct SsimTile<double> {
  static constexpr int kPairs = 2;
  using Sum = std::int64_t;
};

// Where things are. Rows lie [F1][F2][numbers], so that the rows of neighbouring filters are one run of memory. A row,
// and each piece of one, is an odd number of 16 bytes: eight threads that read at that distance meet all banks once.
template <class T>
struct SsimLayout {
  static constexpr int kSide = 16 * SsimTile<T>::kPairs;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));

  std::int32_t pieces, piece, numbers;
  std::int64_t first_tile, tiles, across;  // tiles of the band in the upper triangle; tiles of a row of the matrix
  std::int32_t runs, channels;             // of a run
  std::size_t arrivals, rows, partial, bytes;

  PYPRUNE_SHARED static std::int64_t tiles_before(std::int64_t row, std::int64_t across) {
    return row * across - row * (row - 1) / 2;
  }
  PYPRUNE_SHARED static std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

  PYPRUNE_SHARED explicit SsimLayout(const SsimItem& item) {
    pieces = (item.K + 2 + kSsimMostNumbers - 1) / kSsimMostNumbers;
    const int least = (item.K + 2 + pieces - 1) / pieces;
    piece = (((least + kVector - 1) / kVector) | 1) * kVector;
    numbers = pieces * piece;
    across = divide_up(item.F2, kSide);
    first_tile = tiles_before(item.first / kSide, across);
    tiles = item.pairs ? 0 : tiles_before(divide_up(item.last, kSide), across) - first_tile;
    const std::int64_t least_runs = divide_up(item.F1, kSsimMostChannels), most = divide_up(item.F1, kSsimFewChannels);
    const std::int64_t filling = tiles < kSsimManyBlocks && tiles > 0 ? kSsimManyBlocks / tiles : 1;
    const std::int64_t wanted = filling < most ? filling : most;
    channels = static_cast<std::int32_t>(divide_up(item.F1, wanted > least_runs ? wanted : least_runs));
    runs = static_cast<std::int32_t>(divide_up(item.F1, channels));
    arrivals = aligned(sizeof(SsimHead)) + aligned(kSsimParts * sizeof(SsimPart));
    rows = arrivals + aligned(static_cast<std::size_t>(tiles) * sizeof(unsigned));
    partial = rows + aligned(static_cast<std::size_t>(item.F1) * item.F2 * numbers * sizeof(T));
    bytes = partial;
    if (runs > 1) {
      bytes += static_cast<std::size_t>(tiles) * runs * kSide * kSide * sizeof(typename SsimTile<T>::Sum);
    }
  }

  // Numbers of one (channel, piece) of a tile in shared memory, and how many such units are loaded at a time.
  PYPRUNE_SHARED int unit() const { return 2 * kSide * piece; }
  PYPRUNE_SHARED int units() const {
    const int fit = static_cast<int>(kSsimStage / (static_cast<std::size_t>(unit()) * sizeof(T)));
    return fit > 1 ? fit : 1;
  }
  PYPRUNE_SHARED std::size_t shared_bytes() const { return 2 * sizeof(T) * unit() * units(); }
};

// The arithmetic that a layer may turn out to need: its largest weight squared is at most 4 K F1 F2 mean squares.
inline void ssim_routes(SsimItem& item) {
  const double least = item.eps / (4 * static_cast<double>(ssim_weights(item)));
  const bool simple = item.beta == 1 && item.gamma == 1 && item.alpha <= 1;
  const bool sure = !item.absolute && least >= kSsimLeastFloat && item.eps <= kSsimMostFloat;
  item.may_float = simple;
  item.may_double = !(simple && sure);
}

inline std::size_t ssim_scratch_bytes(const SsimItem& item) {
  const std::size_t narrow = item.may_float ? SsimLayout<float>(item).bytes : 0;
  const std::size_t wide = item.may_double ? SsimLayout<double>(item).bytes : 0;
  return narrow > wide ? narrow : wide;
}

// Enqueues scan, preparation and tiles of all layers: one launch each, whatever their number, and one more where a
// layer may need float64. not_finite: counts weights that are not, or null. Throws std::runtime_error if CUDA reports
// an error.
void ssim_cuda(const std::vector<SsimItem>& items, Counter* not_finite, void* stream, int device);

// The same on the host, to prove it there. backwards: threads of a phase, and blocks, from last to first. worst: -1, 0
// or 1, where within their bounds the GPU's approximate functions lie.
void ssim_twin(const std::vector<SsimItem>& items, Counter* not_finite, bool backwards, int worst);

}  // namespace pyprune
