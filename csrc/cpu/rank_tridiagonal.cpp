#include <algorithm>
#include <cfloat>
#include <cmath>

#include "half.h"
#include "pyprune/rank.h"

namespace pyprune {
namespace {

// Copies the map so that its short side comes first, scaled by a power of two to a largest entry in [1/2, 1).
// Returns that entry, or NaN if the map is not finite.
template <class T>
double load(const T* map, const MapShape& s, double* A) {
  const bool flip = s.H > s.W;
  const std::ptrdiff_t m = short_side(s), n = long_side(s);
  const std::ptrdiff_t row = flip ? s.stride_w : s.stride_h, column = flip ? s.stride_h : s.stride_w;
  double top = 0, check = 0;
  for (std::ptrdiff_t i = 0; i < m; ++i) {
    for (std::ptrdiff_t k = 0; k < n; ++k) {
      const double a = value_of(map[i * row + k * column]);
      A[i * n + k] = a;
      top = std::max(top, std::fabs(a));
      check += a * 0;
    }
  }
  if (check != 0) return NAN;
  int exponent = 0;
  std::frexp(top, &exponent);
  for (std::ptrdiff_t i = 0; i < m * n; ++i) A[i] = std::ldexp(A[i], -exponent);
  return top;
}

double load(const void* map, const MapShape& s, Element element, double* A) {
  switch (element) {
    case Element::float32:
      return load(static_cast<const float*>(map), s, A);
    case Element::float64:
      return load(static_cast<const double*>(map), s, A);
    case Element::float16:
      return load(static_cast<const Float16*>(map), s, A);
    case Element::bfloat16:
      return load(static_cast<const BFloat16*>(map), s, A);
  }
  return NAN;
}

void gram(const double* A, std::ptrdiff_t m, std::ptrdiff_t n, double* G) {
  for (std::ptrdiff_t i = 0; i < m; ++i) {
    for (std::ptrdiff_t j = 0; j <= i; ++j) {
      double sum[4] = {0, 0, 0, 0};  // four chains: faster, and a shorter chain rounds less
      std::ptrdiff_t k = 0;
      for (; k + 4 <= n; k += 4) {
        for (int q = 0; q < 4; ++q) sum[q] += A[i * n + k + q] * A[j * n + k + q];
      }
      for (; k < n; ++k) sum[0] += A[i * n + k] * A[j * n + k];
      G[i * m + j] = G[j * m + i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }
}

// Reduces the symmetric G [m, m] to diagonal d [m] and squared off-diagonal e2 [m] (e2[0] = 0); overwrites G.
void tridiagonalise(double* G, std::ptrdiff_t m, double* d, double* e2, double* v, double* w) {
  e2[0] = 0;
  for (std::ptrdiff_t k = 0; k + 1 < m; ++k) {
    d[k] = G[k * m + k];
    double norm2 = 0;
    for (std::ptrdiff_t i = k + 1; i < m; ++i) {
      v[i] = G[i * m + k];
      norm2 += v[i] * v[i];
    }
    e2[k + 1] = norm2;
    const double norm = std::sqrt(norm2);
    const double head = v[k + 1] > 0 ? v[k + 1] + norm : v[k + 1] - norm;  // no cancellation
    const double vv = norm2 - v[k + 1] * v[k + 1] + head * head;
    if (!(vv > 0)) continue;
    v[k + 1] = head;
    // G <- (I - 2 v v^T / vv) G (I - 2 v v^T / vv), as G - v w^T - w v^T with w = p - (p.v / vv) v, p = 2 G v / vv.
    double pv = 0;
    for (std::ptrdiff_t i = k + 1; i < m; ++i) {
      double sum = 0;
      for (std::ptrdiff_t j = k + 1; j < m; ++j) sum += G[i * m + j] * v[j];
      w[i] = 2 * sum / vv;
      pv += w[i] * v[i];
    }
    for (std::ptrdiff_t i = k + 1; i < m; ++i) w[i] -= pv / vv * v[i];
    for (std::ptrdiff_t i = k + 1; i < m; ++i) {
      for (std::ptrdiff_t j = k + 1; j < m; ++j) G[i * m + j] -= v[i] * w[j] + w[i] * v[j];
    }
  }
  d[m - 1] = G[m * m - 1];
}

// Eigenvalues of the tridiagonal matrix above x: the positive terms of its Sturm sequence.
std::int32_t count_above(const double* d, const double* e2, std::ptrdiff_t m, double x, double floor) {
  std::int32_t count = 0;
  double q = 1;
  for (std::ptrdiff_t i = 0; i < m; ++i) {
    q = d[i] - x - e2[i] / q;
    if (std::fabs(q) < floor) q = -floor;
    count += q > 0;
  }
  return count;
}

}  // namespace

std::size_t rank_tridiagonal_workspace(const MapShape& s) {
  const std::size_t m = static_cast<std::size_t>(short_side(s)), n = static_cast<std::size_t>(long_side(s));
  return m * n + m * m + 4 * m;
}

std::int32_t rank_tridiagonal(const void* map, const MapShape& s, Element element, double rtol, double* workspace) {
  const std::ptrdiff_t m = short_side(s), n = long_side(s);
  double *A = workspace, *G = A + m * n, *d = G + m * m, *e2 = d + m, *v = e2 + m, *w = v + m;
  const double top = load(map, s, element, A);
  if (std::isnan(top)) return kRankNotFinite;
  if (top == 0) return 0;
  gram(A, m, n, G);
  tridiagonalise(G, m, d, e2, v, w);

  double hi = 0, lo = 0;  // Gershgorin above, the largest diagonal entry below
  for (std::ptrdiff_t i = 0; i < m; ++i) {
    const double next = i + 1 < m ? std::sqrt(e2[i + 1]) : 0;
    hi = std::max(hi, d[i] + std::sqrt(e2[i]) + next);
    lo = std::max(lo, d[i]);
  }
  const double floor = hi * DBL_EPSILON * DBL_EPSILON;
  for (int step = 0; step < 64 && hi - lo > 2 * DBL_EPSILON * hi; ++step) {
    const double middle = lo + (hi - lo) / 2;
    (count_above(d, e2, m, middle, floor) > 0 ? lo : hi) = middle;
  }
  return count_above(d, e2, m, rtol * rtol * hi, floor);
}

}  // namespace pyprune
