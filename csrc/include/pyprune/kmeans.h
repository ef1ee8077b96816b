// K-means of the same rows for every number of clusters and every restart, judged by silhouettes. docs/ops/kmeans.md
// tells the method: everything is read off one matrix of squared distances, whatever the number of columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/pool.h"

namespace pyprune {

constexpr int kKMeansLanes = 32;  // rows whose distances to another lie side by side: a multiple of every vector

// Clusters of one labelling: the members of k, ascending, are member[start[k]] to member[start[k + 1] - 1].
struct KMeansClusters {
  const std::int32_t *member, *start;
  const double *scale, *offset;  // the cost of cluster k to a row is (sum of distances) * scale[k] - offset[k]
};

// What a row finds among the clusters that are scanned.
struct KMeansNearest {
  double best[kKMeansLanes], second[kKMeansLanes];  // the least costs of others' clusters; infinity without any
  double cluster[kKMeansLanes];                     // of the best, the first in order on a tie
  double own[kKMeansLanes];                         // the sum of distances to the own cluster, if it is scanned
};

// One variant. A block is [F][kKMeansLanes]: the distances of every row to kKMeansLanes neighbouring ones. All variants
// give the same bits: lanes never meet but in fixed order, and nothing is fused.
struct KMeansVariant {
  const char* name;
  bool (*supported)();
  // Squared distances of the rows of columns [C][stride] to those at `first`; returns the largest.
  double (*distances)(const double* columns, std::ptrdiff_t F, std::ptrdiff_t C, std::ptrdiff_t stride,
                      std::ptrdiff_t first, double* block);
  void (*roots)(double* block, std::ptrdiff_t count);
  // sums[C] += rows of X [.., C].
  void (*add_rows)(const double* X, std::ptrdiff_t C, const std::int32_t* rows, std::ptrdiff_t count, double* sums);
  // Sum over rows of min(closest, distance to row j); `blocks` of them, one every `stride` numbers.
  double (*potential)(const double* matrix, std::ptrdiff_t blocks, std::ptrdiff_t stride, std::ptrdiff_t j,
                      const double* closest);
  // Scans clusters listed [count], label being the own ones of the block's rows.
  void (*nearest)(const double* block, const KMeansClusters&, const std::int32_t* listed, std::ptrdiff_t count,
                  const double* label, KMeansNearest*);
};

extern const KMeansVariant kKMeansBaseline, kKMeansAvx2, kKMeansAvx512;  // the latter two on x86-64 only

struct KMeansProblem {
  const double* X;  // [F, C] contiguous, finite
  std::ptrdiff_t F, C, k_min, k_max;
  int n_init, max_iter;
  std::uint64_t seed;
  bool refine;  // afterwards move single rows for as long as that lowers the inertia
};

// For every K, in order: the best labelling of n_init and what it is worth.
struct KMeansResult {
  std::int32_t* labels;     // [K, F], numbered in order of their first member
  double* silhouettes;      // [K, F]
  double* inertia;          // [K]
  double* score;            // [K], the mean silhouette
  std::int32_t* rounds;     // [K], Lloyd's, of the restart that won
  std::int32_t* exchanges;  // [K], single rows moved afterwards
};

// Asked on the calling thread between its pieces of work, with how many K are done; true stops.
struct KMeansInterrupt {
  bool (*poll)(void* context, std::ptrdiff_t done);
  void* context;
};

enum class KMeansEnd { done, interrupted, overflow };

struct KMeansBatch;  // kmeans_steps.h

// Lloyd's rounds of every K and restart somewhere else than on the CPU's variants; null for there. All pointers are to
// host memory. False if poll said stop; std::runtime_error if CUDA reports an error.
struct KMeansElsewhere {
  bool (*run)(const KMeansBatch&, const KMeansInterrupt&, int option);
  int option;
};
bool kmeans_cuda(const KMeansBatch&, const KMeansInterrupt&, int device);
bool kmeans_twin(const KMeansBatch&, const KMeansInterrupt&, int backwards);  // the same on the host, to prove it

// 2 <= k_min <= k_max < F. overflow: a squared distance is no finite number.
KMeansEnd k_search(const KMeansProblem&, const KMeansVariant&, int threads, const KMeansInterrupt&, const KMeansResult&,
                   KMeansElsewhere);

}  // namespace pyprune
