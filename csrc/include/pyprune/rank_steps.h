// What every layout of the rank kernel on a GPU shares: reading maps, the order of decisions, power steps, and the
// sure path. docs/ops/rank.md has the method and its bounds.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pyprune/team.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace pyprune {
namespace {

// Reading maps.

enum class MapType : std::int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};

PYPRUNE_TEAM double widen(double value) {
  return value;
}
PYPRUNE_TEAM double widen(float value) {
  return static_cast<double>(value);
}
#if defined(__CUDACC__)
// Through the read-only path: nothing writes maps while they are counted.
template <class T>
PYPRUNE_TEAM T fetch(const T* p) {
  return __ldg(p);
}
PYPRUNE_TEAM Half fetch(const Half* p) {
  return {__ldg(&p->bits)};
}
PYPRUNE_TEAM BFloat fetch(const BFloat* p) {
  return {__ldg(&p->bits)};
}
PYPRUNE_TEAM double widen(BFloat value) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(value.bits) << 16));
}
PYPRUNE_TEAM double widen(Half value) {
  return static_cast<double>(__half2float(__ushort_as_half(value.bits)));
}
PYPRUNE_TEAM double power_of_two(int biased) {
  return __hiloint2double(biased << 20, 0);
}
PYPRUNE_TEAM int exponent_of(double value) {
  return __double2hiint(value) >> 20 & 2047;
}
#else
template <class T>
inline T fetch(const T* p) {
  return *p;
}
inline double widen(BFloat value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return static_cast<double>(result);
}
inline double widen(Half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return value.bits >> 15 ? -size : size;
}
inline double power_of_two(int biased) {
  const std::uint64_t bits = static_cast<std::uint64_t>(biased) << 52;
  double result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline int exponent_of(double value) {
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<int>(bits >> 52 & 2047);
}
#endif

PYPRUNE_SHARED std::int64_t distance(std::int64_t stride) {
  return stride < 0 ? -stride : stride;
}

// One map with its short side first, m <= n; strides count elements. Of a square map's sides either may come first,
// and the one whose elements are neighbours does: threads then read them side by side.
struct MapView {
  const void* data;
  MapType type;
  int m, n;
  std::int64_t stride_m, stride_n;

  PYPRUNE_TEAM bool neighbours_along_m() const { return distance(stride_m) <= distance(stride_n); }
};

PYPRUNE_SHARED MapView view_map(const void* data, MapType type, int H, int W, std::int64_t stride_h,
                                std::int64_t stride_w) {
  const bool flip = H != W ? H > W : distance(stride_w) < distance(stride_h);
  return flip ? MapView{data, type, W, H, stride_w, stride_h} : MapView{data, type, H, W, stride_h, stride_w};
}

// f(pointer to the map's first element, in its own type)
template <class F>
PYPRUNE_TEAM void with_type(const MapView& map, const F& f) {
  switch (map.type) {
    case MapType::kFloat16:
      return f(static_cast<const Half*>(map.data));
    case MapType::kBFloat16:
      return f(static_cast<const BFloat*>(map.data));
    case MapType::kFloat32:
      return f(static_cast<const float*>(map.data));
    case MapType::kFloat64:
      return f(static_cast<const double*>(map.data));
  }
}

// Squares of float32 neither overflow nor vanish in float64. Float64 maps are scaled by a power of two, so that their
// largest entry lies in [1, 2).
template <class Team>
PYPRUNE_TEAM double scale_of(const Team& team, const MapView& map) {
  if (map.type != MapType::kFloat64) return 1;
  const double* const data = static_cast<const double*>(map.data);
  const double top = team.max([&](int t) {
    double top = 0;
    for (int k = t; k < map.n; k += team.size()) {
      for (int i = 0; i < map.m; ++i) {
        const double value = fetch(data + i * map.stride_m + k * map.stride_n);
        top = larger(larger(top, value), -value);
      }
    }
    return top;
  });
  const int opposite = 2046 - exponent_of(top);
  return power_of_two(opposite < 1 ? 1 : opposite);
}

// A symmetric matrix in memory, of which an Index finds the entries of the lower triangle.
template <class Index>
struct Symmetric {
  double* data;
  Index index;

  PYPRUNE_TEAM double& operator()(int i, int j) const { return data[i < j ? index(j, i) : index(i, j)]; }
};

// Decisions.

struct Norms {
  double trace, square, top;  // of G: the trace, the squared Frobenius norm, the largest diagonal entry
};
struct Count {
  double positive;  // positive pivots of G - shift I = L D L^T: eigenvalues above shift (Sylvester)
  double growth;    // sum of |d_k| l_ik^2 over the negative pivots: with the trace it bounds the backward error
};
struct Bracket {
  double lo, hi;  // of lambda = sigma_max^2
};
struct Decision {
  std::int32_t rank, path;
};
enum : std::int32_t {
  kPathUpper,  // the count at the upper end: full rank, or a bracket as good as the exact threshold
  kPathBoth,   // equal counts at both ends
  kPathRefinedUpper,
  kPathRefinedBoth,  // the same after power steps
  kPathSure,         // tridiagonalisation
  kPathTrivial,      // a map of zeros, or one that is not finite
};

constexpr int kTeamPowerSteps = 24;

// Power steps. For |x| = 1, rho = x.Gx and r = Gx - rho x: |Gx| <= lambda, and where every other eigenvalue is at most
// other < rho, lambda <= rho + |r|^2 / (rho - other) (Kato-Temple). The trace and the Frobenius norm bound the others.
template <class Team, class Matrix>
PYPRUNE_RARE Bracket refine_bracket(const Team team, const Matrix G, int m, const Norms norms, Bracket bracket,
                                    double tight, double* x, double* y) {
  const auto dot = [&](const double* a, const double* b) {
    return team.sum([&](int t) {
      double sum = 0;
      for (int i = t; i < m; i += team.size()) sum = multiply_add(a[i], b[i], sum);
      return sum;
    });
  };
  // The column of the largest diagonal entry (the first of equals) is seldom far from the leading eigenvector.
  const int start = -static_cast<int>(team.max([&](int t) {
    double last = -m;
    for (int i = t; i < m; i += team.size()) last = G(i, i) == norms.top ? larger(last, -i) : last;
    return last;
  }));
  team.each([&](int t) {
    for (int i = t; i < m; i += team.size()) y[i] = G(i, start);
  });
  double length = root(dot(y, y));

  for (int step = 0; step < kTeamPowerSteps; ++step) {
    team.each([&](int t) {
      for (int i = t; i < m; i += team.size()) x[i] = y[i] / length;
    });
    team.each([&](int t) {
      for (int i = t; i < m; i += team.size()) {
        double sum = 0;
        for (int j = 0; j < m; ++j) sum = multiply_add(G(i, j), x[j], sum);
        y[i] = sum;
      }
    });
    const double rho = dot(x, y);
    length = root(dot(y, y));
    const double residual = team.sum([&](int t) {
      double sum = 0;
      for (int i = t; i < m; i += team.size()) {
        const double r = multiply_add(-rho, x[i], y[i]);
        sum = multiply_add(r, r, sum);
      }
      return sum;
    });
    const double other = smaller(norms.trace - rho, root(larger(norms.square - rho * rho, 0)));
    bracket.lo = larger(bracket.lo, length);
    if (rho > other) bracket.hi = smaller(bracket.hi, rho + residual / (rho - other));
    if (!(bracket.hi > bracket.lo * (1 + tight))) break;
  }
  return bracket;
}

// The sure path.

// Reduces G to diagonal d and squared off-diagonal e2 (e2[0] = 0) by Householder reflections; overwrites G, v and w.
template <class Team, class Matrix>
PYPRUNE_RARE void tridiagonalise(const Team team, const Matrix G, int m, double* d, double* e2, double* v, double* w) {
  for (int k = 0; k + 1 < m; ++k) {
    team.each([&](int t) {
      for (int i = k + 1 + t; i < m; i += team.size()) v[i] = G(i, k);
      if (t == 0) d[k] = G(k, k);
    });
    const double norm2 = team.sum([&](int t) {
      double sum = 0;
      for (int i = k + 1 + t; i < m; i += team.size()) sum = multiply_add(v[i], v[i], sum);
      return sum;
    });
    const double first = v[k + 1], norm = root(norm2);
    const double head = first > 0 ? first + norm : first - norm;  // no cancellation
    const double vv = norm2 - first * first + head * head;
    team.each([&](int t) {
      if (t == 0) e2[k + 1] = norm2;
    });
    if (!(vv > 0)) continue;
    team.each([&](int t) {
      if (t == 0) v[k + 1] = head;
    });
    // G <- (I - 2 v v^T / vv) G (I - 2 v v^T / vv), as G - v w^T - w v^T with w = p - (p.v / vv) v, p = 2 G v / vv.
    team.each([&](int t) {
      for (int i = k + 1 + t; i < m; i += team.size()) {
        double sum = 0;
        for (int j = k + 1; j < m; ++j) sum = multiply_add(G(i, j), v[j], sum);
        w[i] = 2 * sum / vv;
      }
    });
    const double pv = team.sum([&](int t) {
      double sum = 0;
      for (int i = k + 1 + t; i < m; i += team.size()) sum = multiply_add(w[i], v[i], sum);
      return sum;
    });
    team.each([&](int t) {
      for (int i = k + 1 + t; i < m; i += team.size()) w[i] = multiply_add(-(pv / vv), v[i], w[i]);
    });
    team.each([&](int t) {
      for (int i = k + 1 + t; i < m; i += team.size()) {
        for (int j = k + 1; j <= i; ++j) G(i, j) = multiply_add(-v[i], w[j], multiply_add(-w[i], v[j], G(i, j)));
      }
    });
  }
  team.each([&](int t) {
    if (t == 0) {
      d[m - 1] = G(m - 1, m - 1);
      e2[0] = 0;
    }
  });
}

// Eigenvalues of the tridiagonal matrix above x: the positive terms of its Sturm sequence.
PYPRUNE_TEAM int sturm_count(const double* d, const double* e2, int m, double x, double floor) {
  int count = 0;
  double q = 1;
  for (int i = 0; i < m; ++i) {
    q = d[i] - x - e2[i] / q;
    if ((q < 0 ? -q : q) < floor) q = -floor;
    count += q > 0;
  }
  return count;
}

// Every thread counts at its own place in the bracket of lambda, so a round cuts it into size + 1 parts.
template <class Team>
PYPRUNE_RARE std::int32_t count_tridiagonal(const Team team, int m, double rtol2, const double* d, const double* e2) {
  constexpr double kEpsilon = 0x1p-52;
  Bracket bracket;  // Gershgorin above, the largest diagonal entry below
  bracket.lo = team.max([&](int t) {
    double top = 0;
    for (int i = t; i < m; i += team.size()) top = larger(top, d[i]);
    return top;
  });
  bracket.hi = team.max([&](int t) {
    double top = 0;
    for (int i = t; i < m; i += team.size()) {
      top = larger(top, d[i] + root(e2[i]) + (i + 1 < m ? root(e2[i + 1]) : 0));
    }
    return top;
  });
  const double floor = bracket.hi * kEpsilon * kEpsilon;
  for (int round = 0; round < 64 && bracket.hi - bracket.lo > 2 * kEpsilon * bracket.hi; ++round) {
    const double step = (bracket.hi - bracket.lo) / (team.size() + 1);
    const auto place = [&](int t) { return multiply_add(step, t + 1, bracket.lo); };
    // The highest place with an eigenvalue above it is the new lower end; the next place, or the old end, the upper.
    const int below = static_cast<int>(
        team.max([&](int t) -> double { return sturm_count(d, e2, m, place(t), floor) > 0 ? t + 1 : 0; }));
    bracket = {below > 0 ? place(below - 1) : bracket.lo, below < team.size() ? place(below) : bracket.hi};
  }
  return sturm_count(d, e2, m, rtol2 * bracket.hi, floor);
}

// The order of decisions. An engine has a team, and G in memory with four vectors beside it, from which count(shift)
// starts; where it starts from registers instead, save() and load() go between the two.

constexpr std::int32_t kUndecided = -2;

// Counts at the upper and then the lower end. One place in the code counts: unrolled over registers it is long.
template <class Engine>
PYPRUNE_TEAM Decision try_bracket(Engine& engine, const Norms& norms, const Bracket& bracket, double tight, double rtol,
                                  std::int32_t path) {
  double at_upper = 0;
  for (int lower = 0; lower < 2; ++lower) {
    const Count count = engine.count(rtol * rtol * (lower ? bracket.lo : bracket.hi));
    const bool calm = count.growth <= norms.trace;
    const bool decided = lower ? calm && count.positive == at_upper
                               : count.positive == engine.m || (calm && bracket.hi <= bracket.lo * (1 + tight));
    if (decided) return {static_cast<std::int32_t>(count.positive), path + lower};
    if (!calm) break;
    at_upper = count.positive;
  }
  return {kUndecided, path};
}

// What the norms do not decide. Out of line, so that the common steps need not save registers for it.
template <class Engine, class Team>
PYPRUNE_RARE Decision decide_hard_map(const Team team, double* memory, int m, const Norms norms, Bracket bracket,
                                      double tight, double rtol) {
  Engine engine(team, memory, m);
  engine.load();
  bracket = refine_bracket(team, engine.matrix(), m, norms, bracket, tight, engine.vector(0), engine.vector(1));
  const Decision decision = try_bracket(engine, norms, bracket, tight, rtol, kPathRefinedUpper);
  if (decision.rank != kUndecided) return decision;
  double *const d = engine.vector(0), *const e2 = engine.vector(1);
  tridiagonalise(team, engine.matrix(), m, d, e2, engine.vector(2), engine.vector(3));
  return {count_tridiagonal(team, m, rtol * rtol, d, e2), kPathSure};
}

template <class Engine>
PYPRUNE_TEAM Decision decide_rank(Engine& engine, const Norms& norms, int n, double rtol) {
  if (!(norms.trace < power_of_two(2047))) return {-1, kPathTrivial};  // infinity
  if (norms.trace == 0) return {0, kPathTrivial};
  // A threshold off by half the guaranteed band of 1 / (4 n^2) is as good as the exact one.
  const double tight = 1 / (4 * static_cast<double>(n) * static_cast<double>(n));
  const Bracket bracket = {larger(norms.square / norms.trace, norms.top), root(norms.square)};
  const Decision decision = try_bracket(engine, norms, bracket, tight, rtol, kPathUpper);
  if (decision.rank != kUndecided) return decision;
  engine.save();
  return decide_hard_map<Engine>(engine.team, engine.memory, engine.m, norms, bracket, tight, rtol);
}

}  // namespace
}  // namespace pyprune
