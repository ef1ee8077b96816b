// The rank of one map by a group of 8, 16 or 32 lanes: short sides up to as many. Lane j keeps column j of G in
// registers, which are indexed by constants only; what all lanes need of another's registers passes through shared
// memory, whose broadcasts of 16 bytes feed two multiply-adds each (two shuffles would feed one).
#pragma once

#include "pyprune/rank_steps.h"

namespace pyprune {
namespace {

// Rows of 16 bytes more than the lanes need keep a column of the tile off a single bank; 16 more between the maps of a
// warp let their broadcasts fall into different banks.
template <int kWidth>
struct GroupMemory {
  static constexpr int kPitch = kWidth + 2;
  static constexpr int kVectors = kWidth * kPitch;            // the tile of the map, later G [i][j]
  static constexpr int kDoubles = kVectors + 4 * kWidth + 2;  // rows for broadcasts; four vectors for the rare steps
};

template <int kPitch>
struct PitchIndex {
  PYPRUNE_TEAM int operator()(int i, int j) const { return i * kPitch + j; }
};

// One lane's share of columns [first, first + part) of a map, part <= kWidth, as tile [k][i], zeros from row m on.
template <int kWidth>
PYPRUNE_TEAM void stage_tile(const MapView& map, int first, int part, int lane, double* tile) {
  constexpr int kPitch = GroupMemory<kWidth>::kPitch, kAhead = 8;  // loads in flight
  with_type(map, [&](const auto* data) {
    using T = typename std::remove_cv<typename std::remove_reference<decltype(*data)>::type>::type;
    data += first * map.stride_n;
    const bool along_m = map.neighbours_along_m();
    const int own = along_m ? map.m : part, others = along_m ? part : kWidth, used = along_m ? part : map.m;
    const std::int64_t own_stride = along_m ? map.stride_m : map.stride_n;
    const std::int64_t stride = along_m ? map.stride_n : map.stride_m;
    const int own_pitch = along_m ? 1 : kPitch, pitch = along_m ? kPitch : 1;
    data += lane * own_stride;
    tile += lane * own_pitch;
    const int mine = lane < own ? used : 0;
    const int written = along_m || lane < part ? others : 0;
    for (int q = 0; q < written; q += kAhead) {
      T values[kAhead];
      PYPRUNE_UNROLL_ALL
      for (int u = 0; u < kAhead; ++u) values[u] = q + u < mine ? fetch(data + (q + u) * stride) : T{};
      PYPRUNE_UNROLL_ALL
      for (int u = 0; u < kAhead; ++u) {
        if (q + u < written) tile[(q + u) * pitch] = widen(values[u]);
      }
    }
  });
}

template <class Team, int kWidth>
struct GroupRank {
  using Memory = GroupMemory<kWidth>;
  static constexpr int kPitch = Memory::kPitch;

  struct Column {
    double c[kWidth];
    double growth;
    int positive;
  };

  const Team team;
  double* const memory;  // Memory::kDoubles
  const int m;
  typename Team::template State<Column> column;

  PYPRUNE_TEAM GroupRank(const Team& team, double* memory, int m) : team(team), memory(memory), m(m), column(kWidth) {}

  // stage(first, part) fills the tile and waits.
  template <class Stage>
  PYPRUNE_TEAM Norms gram(const MapView& map, const Stage& stage) {
    const double scale = scale_of(team, map);
    team.each([&](int t) {
      PYPRUNE_UNROLL_ALL
      for (int i = 0; i < kWidth; ++i) column(t).c[i] = 0;
    });
    for (int first = 0; first < map.n; first += kWidth) {
      const int part = map.n - first < kWidth ? map.n - first : kWidth;
      stage(first, part);
      if (map.type == MapType::kFloat64) {
        team.each([&](int t) {
          for (int k = 0; k < part; ++k) memory[k * kPitch + t] *= scale;
        });
      }
      team.each([&](int t) {
        double (&c)[kWidth] = column(t).c;
        PYPRUNE_UNROLL_ONE
        for (int k = 0; k < part; ++k) {
          const double own = memory[k * kPitch + t];
          const Pair* const all = reinterpret_cast<const Pair*>(memory + k * kPitch);
          PYPRUNE_UNROLL_ALL
          for (int p = 0; p < kWidth / 2; ++p) {
            const Pair pair = all[p];
            c[2 * p] = multiply_add(pair.a, own, c[2 * p]);
            c[2 * p + 1] = multiply_add(pair.b, own, c[2 * p + 1]);
          }
        }
      });
    }
    const auto diagonal = [&](int t) {
      double value = 0;
      PYPRUNE_UNROLL_ALL
      for (int i = 0; i < kWidth; ++i) value = i == t ? column(t).c[i] : value;
      return value;
    };
    const Pair sums = team.sum([&](int t) {
      Pair square = {0, 0};
      const double (&c)[kWidth] = column(t).c;
      PYPRUNE_UNROLL_ALL
      for (int i = 0; i < kWidth; i += 2) {
        square = {multiply_add(c[i], c[i], square.a), multiply_add(c[i + 1], c[i + 1], square.b)};
      }
      return Pair{diagonal(t), square.a + square.b};
    });
    const double top = team.max(diagonal);
    team.each([&](int t) {
      PYPRUNE_UNROLL_ALL
      for (int i = 0; i < kWidth; ++i) memory[i * kPitch + t] = column(t).c[i];
    });
    return {sums.a, sums.b, top};
  }

  PYPRUNE_TEAM void save() const {}  // the Gram matrix went to memory at once
  PYPRUNE_TEAM void load() const {}

  // Right-looking: at step k every lane j > k subtracts u_ik l_jk from its entries i > k. Row k of U, which is also
  // column k, goes round in one of two rows of shared memory by turns, so that a step needs one wait.
  PYPRUNE_TEAM Count count(double shift) {
    double* const rows = vector(0);
    team.each([&](int t) {
      Column& own = column(t);
      own.positive = 0;
      own.growth = 0;
      PYPRUNE_UNROLL_ALL
      for (int i = 0; i < kWidth; ++i) own.c[i] = memory[i * kPitch + t] - (i == t ? shift : 0);
      rows[t] = own.c[0];
    });
    PYPRUNE_UNROLL_ALL
    for (int k = 0; k < kWidth; ++k) {
      if (k < m) {
        team.each([&](int t) {
          Column& own = column(t);
          const double* const row = rows + k % 2 * kWidth;
          const double pivot = row[k], inverse = 1 / pivot;
          const double l = t > k ? own.c[k] * inverse : 0;
          if (pivot > 0) {
            own.positive += 1;
          } else {
            own.growth = multiply_add(-pivot, t == k ? 1 : l * l, own.growth);
          }
          PYPRUNE_UNROLL_ALL
          for (int p = (k + 1) / 2; p < kWidth / 2; ++p) {
            const Pair pair = reinterpret_cast<const Pair*>(row)[p];
            if (2 * p > k) own.c[2 * p] = multiply_add(-l, pair.a, own.c[2 * p]);
            own.c[2 * p + 1] = multiply_add(-l, pair.b, own.c[2 * p + 1]);
          }
          if (k + 1 < kWidth) rows[(k + 1) % 2 * kWidth + t] = own.c[(k + 1) % kWidth];
        });
      }
    }
    const double growth = team.sum([&](int t) { return column(t).growth; });
    return {static_cast<double>(column(0).positive), growth};  // each lane counted all of them
  }

  PYPRUNE_TEAM Symmetric<PitchIndex<kPitch>> matrix() const { return {memory, {}}; }
  PYPRUNE_TEAM double* vector(int i) const { return memory + Memory::kVectors + i * kWidth; }
};

template <int kWidth, class Team, class Stage>
PYPRUNE_TEAM Decision rank_by_group(const Team& team, const MapView& map, double rtol, double* memory,
                                    const Stage& stage) {
  GroupRank<Team, kWidth> engine(team, memory, map.m);
  const Norms norms = engine.gram(map, stage);
  return decide_rank(engine, norms, map.n, rtol);
}

}  // namespace
}  // namespace pyprune
