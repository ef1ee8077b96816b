// The rank of one map by one thread: short sides up to 4. G lives in registers, the map is read once, in place.
#pragma once

#include "pyprune/rank_steps.h"

namespace pyprune {
namespace {

constexpr int kThreadSide = 4;

struct TriangleIndex {
  PYPRUNE_TEAM int operator()(int i, int j) const { return at(i, j); }
  PYPRUNE_TEAM static constexpr int at(int i, int j) { return i * (i + 1) / 2 + j; }
};

template <class Team>
struct ThreadRank {
  static constexpr int kSide = kThreadSide, kEntries = kSide * (kSide + 1) / 2, kDoubles = kEntries + 4 * kSide;

  PYPRUNE_TEAM static constexpr int at(int i, int j) { return TriangleIndex::at(i, j); }

  const Team team;
  const int m;
  double G[kEntries] = {};  // as it was, only ever indexed by constants
  double* const memory;     // kDoubles, where the rare steps may index G and four vectors as they like

  PYPRUNE_TEAM ThreadRank(const Team& team, double* memory, int m) : team(team), m(m), memory(memory) {}

  PYPRUNE_TEAM Norms gram(const MapView& map) {
    const double scale = scale_of(team, map);
    with_type(map, [&](const auto* data) {
      for (int k = 0; k < map.n; ++k, data += map.stride_n) {
        double a[kSide];
        PYPRUNE_UNROLL_ALL
        for (int i = 0; i < kSide; ++i) a[i] = i < m ? widen(fetch(data + i * map.stride_m)) * scale : 0;
        PYPRUNE_UNROLL_ALL
        for (int i = 0; i < kSide; ++i) {
          PYPRUNE_UNROLL_ALL
          for (int j = 0; j <= i; ++j) G[at(i, j)] = multiply_add(a[i], a[j], G[at(i, j)]);
        }
      }
    });
    Norms norms = {0, 0, 0};
    PYPRUNE_UNROLL_ALL
    for (int i = 0; i < kSide; ++i) {
      double square = 0;
      PYPRUNE_UNROLL_ALL
      for (int j = 0; j < i; ++j) square = multiply_add(G[at(i, j)], G[at(i, j)], square);
      const double diagonal = G[at(i, i)];
      norms.trace += diagonal;
      norms.square += multiply_add(diagonal, diagonal, 2 * square);
      norms.top = larger(norms.top, diagonal);
    }
    return norms;
  }

  PYPRUNE_TEAM void save() const {
    PYPRUNE_UNROLL_ALL
    for (int e = 0; e < kEntries; ++e) memory[e] = G[e];
  }
  PYPRUNE_TEAM void load() {
    PYPRUNE_UNROLL_ALL
    for (int e = 0; e < kEntries; ++e) G[e] = memory[e];
  }

  PYPRUNE_TEAM Count count(double shift) const {
    double u[kEntries];
    PYPRUNE_UNROLL_ALL
    for (int e = 0; e < kEntries; ++e) u[e] = G[e];
    Count count = {0, 0};
    PYPRUNE_UNROLL_ALL
    for (int k = 0; k < kSide; ++k) {
      if (k < m) {
        const double pivot = u[at(k, k)] - shift, inverse = 1 / pivot;
        double squares = 1;
        PYPRUNE_UNROLL_ALL
        for (int i = k + 1; i < kSide; ++i) {
          const double l = u[at(i, k)] * inverse;
          squares = multiply_add(l, l, squares);
          PYPRUNE_UNROLL_ALL
          for (int j = k + 1; j <= i; ++j) u[at(i, j)] = multiply_add(-l, u[at(j, k)], u[at(i, j)]);
        }
        if (pivot > 0) {
          count.positive += 1;
        } else {
          count.growth = multiply_add(-pivot, squares, count.growth);
        }
      }
    }
    return count;
  }

  PYPRUNE_TEAM Symmetric<TriangleIndex> matrix() const { return {memory, {}}; }
  PYPRUNE_TEAM double* vector(int i) { return memory + kEntries + i * kSide; }
};

template <class Team>
PYPRUNE_TEAM Decision rank_by_thread(const Team& team, const MapView& map, double rtol) {
  // Apart from the engine: an array whose address is taken would keep G out of registers.
  double memory[ThreadRank<Team>::kDoubles];
  ThreadRank<Team> engine(team, memory, map.m);
  const Norms norms = engine.gram(map);
  return decide_rank(engine, norms, map.n, rtol);
}

}  // namespace
}  // namespace pyprune
