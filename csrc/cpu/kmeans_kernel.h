// The inner loops of the k search, compiled once per instruction set: lanes are rows, in blocks of kKMeansLanes.
//
// Include it from one source file per instruction set, after defining PYPRUNE_LANES. Everything here has internal
// linkage and nothing inline is shared with other files, so no code for one instruction set can end up in another.
// Compile with -ffp-contract=off: every variant rounds alike.
#include <limits>

#include "pyprune/kmeans.h"

#ifndef PYPRUNE_LANES
#define PYPRUNE_LANES 2
#endif

#ifdef __clang__
#define PYPRUNE_UNROLL _Pragma("unroll")
#else
#define PYPRUNE_UNROLL _Pragma("GCC unroll 16")
#endif
#define PYPRUNE_INLINE inline __attribute__((always_inline))

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;

constexpr int kLanes = PYPRUNE_LANES;
typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef double Unaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

constexpr int kAtOnce = kLanes == 2 ? 4 : kKMeansLanes / kLanes;  // vectors in registers beside their costs
constexpr int kWidth = kAtOnce * kLanes;

PYPRUNE_INLINE Vec broadcast(double a) {
  return a - Vec{};
}
PYPRUNE_INLINE Vec load(const double* p) {
  return *reinterpret_cast<const Unaligned*>(p);
}
PYPRUNE_INLINE void store(double* p, Vec a) {
  *reinterpret_cast<Unaligned*>(p) = a;
}
PYPRUNE_INLINE Vec smaller(Vec a, Vec b) {
  return a < b ? a : b;
}
PYPRUNE_INLINE Vec larger(Vec a, Vec b) {
  return a > b ? a : b;
}

double distances(const double* columns, Index F, Index C, Index stride, Index first, double* block) {
  constexpr int kRows = 2;  // so many share what is loaded
  double largest = 0;
  for (int l = 0; l < kKMeansLanes; l += kWidth) {
    const double* const own = columns + first + l;
    Vec most[kAtOnce] = {};
    for (Index j = 0; j < F; j += kRows) {
      const Index other = j + 1 < F ? j + 1 : j;
      Vec sum[kRows][kAtOnce] = {};
      for (Index c = 0; c < C; ++c) {
        const double* const column = columns + c * stride;
        const Vec x[kRows] = {broadcast(column[j]), broadcast(column[other])};
        PYPRUNE_UNROLL
        for (int v = 0; v < kAtOnce; ++v) {
          const Vec a = load(own + c * stride + v * kLanes);
          PYPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const Vec difference = a - x[r];
            sum[r][v] += difference * difference;
          }
        }
      }
      PYPRUNE_UNROLL
      for (int v = 0; v < kAtOnce; ++v) {
        store(block + j * kKMeansLanes + l + v * kLanes, sum[0][v]);
        store(block + other * kKMeansLanes + l + v * kLanes, sum[1][v]);
        most[v] = larger(most[v], larger(sum[0][v], sum[1][v]));
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      for (int i = 0; i < kLanes; ++i) largest = most[v][i] > largest ? most[v][i] : largest;
    }
  }
  return largest;
}

void roots(double* block, Index count) {
  for (Index i = 0; i < count; ++i) block[i] = __builtin_sqrt(block[i]);
}

void add_rows(const double* X, Index C, const std::int32_t* rows, Index count, double* sums) {
  for (Index r = 0; r < count; ++r) {
    const double* const row = X + rows[r] * C;
    Index c = 0;
    for (; c + kLanes <= C; c += kLanes) store(sums + c, load(sums + c) + load(row + c));
    for (; c < C; ++c) sums[c] += row[c];
  }
}

double potential(const double* matrix, Index blocks, Index stride, Index j, const double* closest) {
  Vec sum[kKMeansLanes / kLanes] = {};
  for (Index b = 0; b < blocks; ++b) {
    const double* const row = matrix + b * stride + j * kKMeansLanes;
    PYPRUNE_UNROLL
    for (int v = 0; v < kKMeansLanes / kLanes; ++v) {
      sum[v] += smaller(load(closest + b * kKMeansLanes + v * kLanes), load(row + v * kLanes));
    }
  }
  double total = 0;
  for (int v = 0; v < kKMeansLanes / kLanes; ++v) {
    for (int i = 0; i < kLanes; ++i) total += sum[v][i];
  }
  return total;
}

void nearest(const double* block, const KMeansClusters& clusters, const std::int32_t* listed, Index count,
             const double* label, KMeansNearest* found) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (int l = 0; l < kKMeansLanes; l += kWidth) {
    Vec best[kAtOnce], second[kAtOnce], cluster[kAtOnce], own[kAtOnce], mine[kAtOnce];
    PYPRUNE_UNROLL
    for (int v = 0; v < kAtOnce; ++v) {
      best[v] = second[v] = broadcast(kInfinity);
      cluster[v] = own[v] = Vec{};
      mine[v] = load(label + l + v * kLanes);
    }
    for (Index n = 0; n < count; ++n) {
      const std::int32_t k = listed[n];
      const std::int32_t* member = clusters.member + clusters.start[k];
      const std::int32_t* const end = clusters.member + clusters.start[k + 1];
      Vec sum[kAtOnce] = {};
      for (; member < end; ++member) {
        const double* const row = block + static_cast<Index>(*member) * kKMeansLanes + l;
        PYPRUNE_UNROLL
        for (int v = 0; v < kAtOnce; ++v) sum[v] += load(row + v * kLanes);
      }
      const Vec scale = broadcast(clusters.scale[k]), offset = broadcast(clusters.offset[k]);
      const Vec this_one = broadcast(static_cast<double>(k));
      PYPRUNE_UNROLL
      for (int v = 0; v < kAtOnce; ++v) {
        Vec cost = sum[v] * scale - offset;
        own[v] = mine[v] == this_one ? sum[v] : own[v];
        cost = mine[v] == this_one ? broadcast(kInfinity) : cost;
        second[v] = smaller(second[v], larger(best[v], cost));
        cluster[v] = cost < best[v] ? this_one : cluster[v];
        best[v] = smaller(best[v], cost);
      }
    }
    PYPRUNE_UNROLL
    for (int v = 0; v < kAtOnce; ++v) {
      store(found->best + l + v * kLanes, best[v]);
      store(found->second + l + v * kLanes, second[v]);
      store(found->cluster + l + v * kLanes, cluster[v]);
      store(found->own + l + v * kLanes, own[v]);
    }
  }
}

}  // namespace
}  // namespace pyprune
