// The rank of one map by a block of threads: short sides beyond a warp. Each thread keeps one square tile of the lower
// triangle of G in registers, from the Gram matrix through the whole factorisation, so L is never stored: shared memory
// holds a copy of G (for the next count), one block column of the factor, and before that a slice of the map.
#pragma once

#include "pyprune/rank_steps.h"

namespace pyprune {
namespace {

// Tile (I, K), I >= K, counted column by column: warps whose columns are done fall silent together.
// Entry e of all tiles is contiguous, so neighbouring threads find their tiles side by side.
template <int kTile>
struct TileIndex {
  int rows, tiles;  // tiles in a column of the whole matrix; in its lower triangle

  PYPRUNE_TEAM int tile(int I, int K) const { return K * rows - K * (K - 1) / 2 + I - K; }
  PYPRUNE_TEAM int operator()(int i, int j) const {
    return (i % kTile * kTile + j % kTile) * tiles + tile(i / kTile, j / kTile);
  }
};

template <int kTile>
struct TileLayout {
  int m, rows, tiles, threads;

  PYPRUNE_SHARED explicit TileLayout(int m)
      : m(m), rows((m + kTile - 1) / kTile), tiles(rows * (rows + 1) / 2), threads((tiles + 31) / 32 * 32) {}
  PYPRUNE_SHARED int padded() const { return rows * kTile; }
  PYPRUNE_SHARED int panel() const { return tiles * kTile * kTile; }        // where the block column starts
  PYPRUNE_SHARED int corner() const { return panel() + padded() * kTile; }  // its diagonal tile of L
  PYPRUNE_SHARED int inverses() const { return corner() + kTile * kTile; }  // 1 / d, two rows by turns
  PYPRUNE_SHARED int pivots() const { return inverses() + 2 * kTile; }      // d
  PYPRUNE_SHARED int warps() const { return pivots() + kTile; }             // a Pair each, for reductions
  PYPRUNE_SHARED int doubles() const { return warps() + threads / 16; }
  // Slices of the map lie [k][i] where G and the panel come later; two more doubles a row spread its columns over
  // banks.
  PYPRUNE_SHARED int pitch() const { return padded() + 2; }
  PYPRUNE_SHARED int slice(int n) const {
    const int most = corner() / pitch(), slices = (n - 1) / most + 1;
    return (n - 1) / slices + 1;
  }
};

template <class Team, int kTile>
struct TileRank {
  struct Tile {
    double g[kTile][kTile];
    double positive, growth;
    int I, K;
  };

  const Team team;
  const TileLayout<kTile> layout;
  const int m;
  double* const memory;  // layout.doubles()
  typename Team::template State<Tile> own;

  PYPRUNE_TEAM TileRank(const Team& team, double* memory, int m)
      : team(team), layout(m), m(m), memory(memory), own(layout.threads) {
    team.each([&](int t) {
      Tile& tile = own(t);
      int K = 0, before = 0;
      while (K < layout.rows && before + layout.rows - K <= t) before += layout.rows - K++;
      tile.K = K < layout.rows ? K : -1;  // threads beyond the last tile have none
      tile.I = K + t - before;
    });
  }

  // One thread's share of columns [first, first + part): lanes along the neighbours, warps across them.
  PYPRUNE_TEAM void stage(const MapView& map, int first, int part, int t, double scale) const {
    constexpr int kAhead = 4;  // loads in flight
    with_type(map, [&](const auto* data) {
      using T = typename std::remove_cv<typename std::remove_reference<decltype(*data)>::type>::type;
      const bool along_m = map.neighbours_along_m();
      const int across = team.size() / 32, width = along_m ? layout.padded() : part;
      const int height = along_m ? part : layout.padded();
      const std::int64_t stride = along_m ? map.stride_m : map.stride_n;
      const std::int64_t stride_across = along_m ? map.stride_n : map.stride_m;
      const int pitch = along_m ? 1 : layout.pitch(), pitch_across = along_m ? layout.pitch() : 1;
      data += first * map.stride_n;
      for (int x = t % 32; x < width; x += 32) {
        for (int y = t / 32; y < height; y += kAhead * across) {
          T values[kAhead];
          PYPRUNE_UNROLL_ALL
          for (int u = 0; u < kAhead; ++u) {
            const int z = y + u * across;
            values[u] = z < height && (along_m ? x : z) < map.m ? fetch(data + x * stride + z * stride_across) : T{};
          }
          PYPRUNE_UNROLL_ALL
          for (int u = 0; u < kAhead; ++u) {
            const int z = y + u * across;
            if (z < height) memory[x * pitch + z * pitch_across] = widen(values[u]) * scale;
          }
        }
      }
    });
  }

  // g += left right^T for one column of operands; pairs of the left ones are used up at once to save registers.
  PYPRUNE_TEAM static void add_product(Tile& own, const double* left, const double* right, double factor) {
    double r[kTile];
    PYPRUNE_UNROLL_ALL
    for (int q = 0; q < kTile; q += 2) {
      const Pair pair = *reinterpret_cast<const Pair*>(right + q);
      r[q] = pair.a;
      r[q + 1] = pair.b;
    }
    PYPRUNE_UNROLL_ALL
    for (int i = 0; i < kTile; i += 2) {
      const Pair pair = *reinterpret_cast<const Pair*>(left + i);
      const double a = pair.a * factor, b = pair.b * factor;
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kTile; ++q) {
        own.g[i][q] = multiply_add(a, r[q], own.g[i][q]);
        own.g[i + 1][q] = multiply_add(b, r[q], own.g[i + 1][q]);
      }
    }
  }

  PYPRUNE_TEAM Norms gram(const MapView& map) {
    const double scale = scale_of(team, map);
    team.each([&](int t) {
      Tile& tile = own(t);
      PYPRUNE_UNROLL_ALL
      for (int r = 0; r < kTile; ++r) {
        PYPRUNE_UNROLL_ALL
        for (int q = 0; q < kTile; ++q) tile.g[r][q] = 0;
      }
    });
    const int slice = layout.slice(map.n);
    for (int first = 0; first < map.n; first += slice) {
      const int part = map.n - first < slice ? map.n - first : slice;
      team.each([&](int t) { stage(map, first, part, t, scale); });
      team.each([&](int t) {
        Tile& tile = own(t);
        if (tile.K < 0) return;
        PYPRUNE_UNROLL_ONE
        for (int k = 0; k < part; ++k) {
          const double* const row = memory + k * layout.pitch();
          add_product(tile, row + tile.I * kTile, row + tile.K * kTile, 1);
        }
      });
    }
    const Pair sums = team.sum([&](int t) {
      Tile& tile = own(t);
      Pair sum = {0, 0};
      PYPRUNE_UNROLL_ALL
      for (int r = 0; r < kTile; ++r) {
        PYPRUNE_UNROLL_ALL
        for (int q = 0; q < kTile; ++q) sum.b = multiply_add(tile.g[r][q], tile.g[r][q], sum.b);
        sum.a += tile.g[r][r];
      }
      return tile.I == tile.K ? sum : Pair{0, 2 * sum.b};
    });
    const double top = team.max([&](int t) {
      Tile& tile = own(t);
      double top = 0;
      PYPRUNE_UNROLL_ALL
      for (int r = 0; r < kTile; ++r) top = larger(top, tile.g[r][r]);
      return tile.I == tile.K ? top : 0;
    });
    team.each([&](int t) {
      Tile& tile = own(t);
      if (tile.K < 0) return;
      double* entry = memory + t;
      PYPRUNE_UNROLL_ALL
      for (int e = 0; e < kTile * kTile; ++e, entry += layout.tiles) *entry = tile.g[e / kTile][e % kTile];
    });
    return {sums.a, sums.b, top};
  }

  PYPRUNE_TEAM void save() const {}  // the Gram matrix went to memory at once
  PYPRUNE_TEAM void load() const {}

  // Factor the diagonal tile J in its thread's registers; the others of its block column wait for corner and pivots.
  PYPRUNE_TEAM void factor_corner(Tile& tile, int J) const {
    PYPRUNE_UNROLL_ALL
    for (int c = 0; c < kTile; ++c) {
      const double pivot = tile.g[c][c], inverse = 1 / pivot;
      double squares = 1;
      PYPRUNE_UNROLL_ALL
      for (int r = c + 1; r < kTile; ++r) {
        const double l = tile.g[r][c] * inverse;
        PYPRUNE_UNROLL_ALL
        for (int q = c + 1; q <= r; ++q) tile.g[r][q] = multiply_add(-l, tile.g[q][c], tile.g[r][q]);
        memory[layout.corner() + r * kTile + c] = l;
        squares = multiply_add(l, l, squares);
      }
      memory[layout.inverses() + J % 2 * kTile + c] = inverse;
      memory[layout.pivots() + c] = pivot;
      if (!(pivot > 0)) {
        tile.growth = multiply_add(-pivot, squares, tile.growth);
      } else if (J * kTile + c < layout.m) {
        tile.positive += 1;
      }
    }
  }

  // One tile below it: U = A L^-T goes to the panel.
  PYPRUNE_TEAM void solve_panel(Tile& tile, int J) const {
    PYPRUNE_UNROLL_ALL
    for (int c = 0; c < kTile; ++c) {
      const double pivot = memory[layout.pivots() + c];
      const double inverse = memory[layout.inverses() + J % 2 * kTile + c];
      double squares = 0;
      PYPRUNE_UNROLL_ALL
      for (int r = 0; r < kTile; ++r) {
        const double u = tile.g[r][c], l = u * inverse;
        squares = multiply_add(l, l, squares);
        memory[layout.panel() + c * layout.padded() + tile.I * kTile + r] = u;
      }
      if (!(pivot > 0)) tile.growth = multiply_add(-pivot, squares, tile.growth);
      PYPRUNE_UNROLL_ALL
      for (int q = c + 1; q < kTile; ++q) {
        const double l = memory[layout.corner() + q * kTile + c];
        PYPRUNE_UNROLL_ALL
        for (int r = 0; r < kTile; ++r) tile.g[r][q] = multiply_add(-l, tile.g[r][c], tile.g[r][q]);
      }
    }
  }

  // Right-looking over block columns J, two phases each: the panel; then the tiles behind it, and the next corner.
  PYPRUNE_TEAM Count count(double shift) {
    team.each([&](int t) {
      Tile& tile = own(t);
      tile.positive = 0;
      tile.growth = 0;
      const int step = opaque(layout.tiles);
      const double* entry = memory + (t < step ? t : 0);  // whoever has no tile reads another's, and leaves it alone
      PYPRUNE_UNROLL_ALL
      for (int e = 0; e < kTile * kTile; ++e, entry += step) tile.g[e / kTile][e % kTile] = *entry;
      if (tile.I == tile.K) {
        PYPRUNE_UNROLL_ALL
        for (int r = 0; r < kTile; ++r) {
          // Rows beyond the matrix get a pivot that touches nothing.
          tile.g[r][r] = tile.I * kTile + r < layout.m ? tile.g[r][r] - shift : 1;
        }
        if (tile.I == 0) factor_corner(tile, 0);
      }
    });
    for (int J = 0; J + 1 < layout.rows; ++J) {
      team.each([&](int t) {
        Tile& tile = own(t);
        if (tile.K == J && tile.I > J) solve_panel(tile, J);
      });
      team.each([&](int t) {
        Tile& tile = own(t);
        if (tile.K <= J) return;
        PYPRUNE_UNROLL_ONE
        for (int c = 0; c < kTile; ++c) {
          const double* const column = memory + layout.panel() + c * layout.padded();
          add_product(tile, column + tile.I * kTile, column + tile.K * kTile,
                      -memory[layout.inverses() + J % 2 * kTile + c]);
        }
        if (tile.I == J + 1) factor_corner(tile, J + 1);  // then K is J + 1 too
      });
    }
    const Pair sums = team.sum([&](int t) { return Pair{own(t).positive, own(t).growth}; });
    return {sums.a, sums.b};
  }

  PYPRUNE_TEAM Symmetric<TileIndex<kTile>> matrix() const { return {memory, {layout.rows, layout.tiles}}; }
  PYPRUNE_TEAM double* vector(int i) const { return memory + layout.panel() + i * layout.padded(); }
};

template <int kTile, class Team>
PYPRUNE_TEAM Decision rank_by_tiles(const Team& team, const MapView& map, double rtol, double* memory) {
  TileRank<Team, kTile> engine(team, memory, map.m);
  const Norms norms = engine.gram(map);
  return decide_rank(engine, norms, map.n, rtol);
}

}  // namespace
}  // namespace pyprune
