// Lloyd's rounds of one K and restart by a team of threads: a block of a GPU, or, to prove it, the host. The same sums
// in the same order as on the CPU, but for the spreads, and without its bounds: every round scans all clusters, which a
// GPU does from its second-level cache.
#pragma once

#include <cstdint>

#include "pyprune/team.h"

namespace pyprune {

// A change of a row's nearest seed, when that many seeds were there before.
struct KMeansSeed {
  std::int32_t step, cluster;
};

// Problems [k_first + k, restart] and what they share.
struct KMeansBatch {
  const double* matrix;  // squared distances [blocks][F][32], `stride` numbers a block
  std::int64_t stride;
  const std::int32_t* first;  // [n_init, F + 1]: where a row's changes begin, within its restart's
  const std::int64_t* base;   // [n_init]: where a restart's do
  const KMeansSeed* seeds;
  std::int16_t* labels;  // [Ks, n_init, F]
  double* inertia;       // [Ks, n_init]
  std::int32_t* rounds;  // [Ks, n_init]
  double tolerance;
  std::int32_t F, k_first, Ks, n_init, max_iter;
};

constexpr int kKMeansThreads = 256;

namespace {

// What a team keeps in memory while it works on a problem.
struct KMeansScratch {
  double *own, *spread;                   // [F], [K]
  std::int32_t *target, *member, *start;  // [F], [F], [K + 1]
  std::int32_t *left, *moved;             // [K], [1]

  PYPRUNE_SHARED static std::int64_t bytes(std::int64_t F) { return (2 * F) * 8 + (4 * F + 2) * 4; }  // K < F
  PYPRUNE_SHARED KMeansScratch(void* memory, std::int64_t F)
      : own(static_cast<double*>(memory)),
        spread(own + F),
        target(reinterpret_cast<std::int32_t*>(spread + F)),
        member(target + F),
        start(member + F),
        left(start + F + 1),
        moved(left + F) {}
};

PYPRUNE_TEAM double kmeans_sum(const KMeansBatch& batch, const KMeansScratch& at, int k, int f) {
  const double* const column = batch.matrix + f / 32 * batch.stride + f % 32;
  double sum = 0;
  for (int m = at.start[k]; m < at.start[k + 1]; ++m) sum += column[static_cast<std::int64_t>(at.member[m]) * 32];
  return sum;
}

// Members by cluster, ascending; a single thread does it.
PYPRUNE_TEAM void kmeans_sort(const std::int16_t* label, int F, int K, const KMeansScratch& at) {
  for (int k = 0; k <= K; ++k) at.start[k] = 0;
  for (int f = 0; f < F; ++f) ++at.start[label[f] + 1];
  for (int k = 0; k < K; ++k) {
    at.start[k + 1] += at.start[k];
    at.left[k] = at.start[k];
  }
  for (int f = 0; f < F; ++f) at.member[at.left[label[f]]++] = f;
  for (int k = 0; k < K; ++k) at.left[k] = at.start[k + 1] - at.start[k];
}

// To the nearest centre, all rows at once; the last of a cluster stays, and becomes its centre.
PYPRUNE_TEAM void kmeans_move(std::int16_t* label, int F, const KMeansScratch& at) {
  *at.moved = 0;
  for (int f = 0; f < F; ++f) {
    const int to = at.target[f], from = label[f];
    if (to < 0 || at.left[from] == 1) continue;
    --at.left[from];
    ++at.left[to];
    label[f] = static_cast<std::int16_t>(to);
    *at.moved = 1;
  }
}

template <class Team>
PYPRUNE_TEAM void kmeans_rounds(const Team& team, const KMeansBatch& batch, std::int64_t problem, void* memory) {
  const int F = batch.F, K = batch.k_first + static_cast<int>(problem / batch.n_init);
  const std::int64_t restart = problem % batch.n_init;
  const KMeansScratch at(memory, F);
  std::int16_t* const label = batch.labels + problem * F;
  const auto for_rows = [&](int t, int count, const auto& f) {
    for (int i = t; i < count; i += team.size()) f(i);
  };

  // The nearest of the first K seeds.
  team.each([&](int t) {
    const std::int32_t* const first = batch.first + restart * (F + 1);
    const KMeansSeed* const seeds = batch.seeds + batch.base[restart];
    for_rows(t, F, [&](int f) {
      int c = first[f];
      while (c + 1 < first[f + 1] && seeds[c + 1].step < K) ++c;
      label[f] = static_cast<std::int16_t>(seeds[c].cluster);
    });
  });
  for (int round = 1;; ++round) {
    // Spreads: half the mean squared distance between members.
    team.each([&](int t) {
      if (t == 0) kmeans_sort(label, F, K, at);
    });
    team.each([&](int t) { for_rows(t, F, [&](int f) { at.own[f] = kmeans_sum(batch, at, label[f], f); }); });
    team.each([&](int t) {
      for_rows(t, K, [&](int k) {
        double sum = 0;
        for (int m = at.start[k]; m < at.start[k + 1]; ++m) sum += at.own[at.member[m]];
        const double n = at.left[k];
        at.spread[k] = sum / (2 * n * n);
      });
    });
    // Where rows want to go.
    team.each([&](int t) {
      for_rows(t, F, [&](int f) {
        const int own = label[f];
        const double n = at.left[own], limit = at.own[f] / n - at.spread[own] - batch.tolerance;
        double best = limit;
        int target = -1;
        for (int k = 0; k < K && n > 1; ++k) {
          if (k == own) continue;
          const double cost = kmeans_sum(batch, at, k, f) * (1.0 / at.left[k]) - at.spread[k];
          if (cost < best) {
            best = cost;
            target = k;
          }
        }
        at.target[f] = target;
      });
    });
    const bool last = round > batch.max_iter;
    team.each([&](int t) {
      if (t != 0) return;
      if (!last) kmeans_move(label, F, at);
      batch.rounds[problem] = round;
    });
    if (last || *at.moved == 0) break;
  }
  team.each([&](int t) {
    if (t != 0) return;
    double sum = 0;
    for (int k = 0; k < K; ++k) sum += at.spread[k] * (at.start[k + 1] - at.start[k]);
    batch.inertia[problem] = sum;
  });
}

}  // namespace
}  // namespace pyprune
