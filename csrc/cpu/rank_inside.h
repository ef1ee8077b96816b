// The rank of one map: the lanes of a vector hold neighbouring columns of its Gram matrix. Included after
// rank_kernel.h, which explains the method; the phases are the same.
//
// G and its factors are upper triangles in row-major rows of `stride` elements, a whole number of vectors, so that row
// p of the factor D L^T is what later rows subtract: one kernel, a tile of rows times vectors, does both the Gram
// matrix and the factorisation. Rows of zeros fill the last tile; they change neither norms nor counts.

namespace pyprune {
namespace {

#if PYPRUNE_LANES == 8
constexpr int kTileRows = 8;  // 8 x 3 accumulators, 3 vectors of a row: 27 of 32 registers
#else
constexpr int kTileRows = 4;  // 4 x 3 accumulators, 3 vectors and a factor: all 16 registers
#endif
constexpr int kTileVecs = 3;
constexpr Index kDepth = 32;  // columns of the map that are packed at a time

inline Index whole_tiles(Index m) {
  return (m + kTileRows - 1) / kTileRows * kTileRows;
}

inline Index inside_stride(Index m) {
  return ((m + 7) / 8 | 1) * 8;  // an odd number of cache lines spreads the rows over the sets
}

struct Inside {
  Index m, stride;
  double *G, *U, *packed, *scaled, *inverse, *x, *y;
  Vec* run;

  Inside(void* memory, const MapShape& s) : m(whole_tiles(short_side(s))), stride(inside_stride(m)) {
    G = static_cast<double*>(memory);
    U = G + stride * m;
    packed = U + stride * m;
    scaled = packed + stride * kDepth;
    inverse = scaled + stride * kTileRows;
    x = inverse + stride;
    y = x + stride;
    run = reinterpret_cast<Vec*>(y + stride);
  }
};

std::size_t inside_bytes(const MapShape& s) {
  const Index m = whole_tiles(short_side(s));
  const Index doubles = inside_stride(m) * (2 * m + kDepth + kTileRows + 3) + kDepth * kLanes;
  return static_cast<std::size_t>(doubles) * sizeof(double);
}

inline Vec& vec(double* p) {
  typedef Vec Alias __attribute__((may_alias));
  return *reinterpret_cast<Alias*>(p);
}
inline const Vec& vec(const double* p) {
  typedef Vec Alias __attribute__((may_alias));
  return *reinterpret_cast<const Alias*>(p);
}

// C [kTileRows, V kLanes] += X^T Y over `depth` rows of X [depth, kTileRows] and Y [depth, V kLanes].
template <int V>
inline void tile(double* C, Index stride, const double* X, Index stride_x, const double* Y, Index depth) {
  Vec sum[kTileRows][V];
  PYPRUNE_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    PYPRUNE_UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = vec(C + r * stride + v * kLanes);
  }
  for (const double* const end = Y + depth * stride; Y != end; X += stride_x, Y += stride) {
    Vec y[V];
    PYPRUNE_UNROLL
    for (int v = 0; v < V; ++v) y[v] = vec(Y + v * kLanes);
    PYPRUNE_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x = broadcast(X[r]);
      PYPRUNE_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
  PYPRUNE_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    PYPRUNE_UNROLL
    for (int v = 0; v < V; ++v) vec(C + r * stride + v * kLanes) = sum[r][v];
  }
}

// Rows [row, row + kTileRows) of C, from the diagonal on.
void tile_row(double* C, Index row, const Inside& a, const double* X, Index stride_x, const double* Y, Index depth) {
  double* start = C + row * a.stride;
  Index i = row;
  for (; i + (kTileVecs - 1) * kLanes < a.m; i += kTileVecs * kLanes) {
    tile<kTileVecs>(start + i, a.stride, X, stride_x, Y + i, depth);
  }
  if (i + kLanes < a.m) {
    tile<2>(start + i, a.stride, X, stride_x, Y + i, depth);
  } else if (i < a.m) {
    tile<1>(start + i, a.stride, X, stride_x, Y + i, depth);
  }
}

struct InsideNorms {
  double trace, square, top;
  Index rows;
};

// Phases 1 and 2. The short side runs along the vectors.
template <class T>
InsideNorms inside_gram(const T* map, const MapShape& s, const Inside& a) {
  const bool wide = s.H <= s.W;
  const Index m = short_side(s), n = long_side(s);
  const Index along = wide ? s.stride_h : s.stride_w, across = wide ? s.stride_w : s.stride_h;
  const T* same[kLanes];
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) same[l] = map;
  const Vec factor = scale_of(same, s);
  for (Index i = 0; i < a.stride * a.m; ++i) a.G[i] = 0;
  for (Index k = 0; k < n; k += kDepth) {
    const Index depth = n - k < kDepth ? n - k : kDepth;
    for (Index i = 0; i < a.m; i += kLanes) {
      const T* rows[kLanes];
      Vec inside;
      PYPRUNE_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        rows[l] = map + (i + l < m ? i + l : m - 1) * along + k * across;
        inside[l] = i + l < m;
      }
      pack(rows, MapShape{1, depth, depth, across}, a.run);
      if (sizeof(T) == 8) {
        for (Index p = 0; p < depth; ++p) a.run[p] *= factor;
      }
      for (Index p = 0; p < depth; ++p) vec(a.packed + p * a.stride + i) = inside > 0 ? a.run[p] : Vec{};
    }
    for (Index i = 0; i < a.m; i += kTileRows) tile_row(a.G, i, a, a.packed + i, a.stride, a.packed, depth);
  }
  InsideNorms norms = {};
  for (Index i = 0; i < a.m; ++i) {
    const double* row = a.G + i * a.stride;
    double square = 0;
    Index j = i + 1;
    for (; j % kLanes; ++j) square += row[j] * row[j];
    Vec squares = {};
    for (; j < a.m; j += kLanes) squares += vec(row + j) * vec(row + j);
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) square += squares[l];
    norms.square += 2 * square + row[i] * row[i];
    norms.trace += row[i];
    norms.top = row[i] > norms.top ? row[i] : norms.top;
    norms.rows += row[i] > 0;
  }
  return norms;
}

// Phase 3.

struct InsideCount {
  Index positive = 0;
  double growth = 0;
};

// A block on the diagonal and all to its right: its pivots, and D L^T in place.
void factor_tile(const Inside& a, Index row, InsideCount& count) {
  double L[kTileRows][kTileRows];
  double *block = a.U + row * a.stride, *inverse = a.inverse + row;
  for (int c = 0; c < kTileRows; ++c) {
    const double* top = block + c * a.stride + row;
    const double pivot = top[c];
    inverse[c] = 1 / pivot;
    double squares = 1;
    for (int q = c + 1; q < kTileRows; ++q) {
      L[c][q] = top[q] * inverse[c];
      squares += L[c][q] * L[c][q];
      for (int i = q; i < kTileRows; ++i) block[q * a.stride + row + i] -= L[c][q] * top[i];
    }
    count.positive += pivot > 0;
    if (!(pivot > 0)) count.growth -= pivot * squares;
  }
  Vec squares[kTileRows] = {};
  for (Index i = row + kTileRows; i < a.m; i += kLanes) {
    Vec u[kTileRows];
    PYPRUNE_UNROLL
    for (int c = 0; c < kTileRows; ++c) u[c] = vec(block + c * a.stride + i);
    PYPRUNE_UNROLL
    for (int c = 0; c < kTileRows; ++c) {
      PYPRUNE_UNROLL
      for (int q = c + 1; q < kTileRows; ++q) u[q] -= L[c][q] * u[c];
      vec(block + c * a.stride + i) = u[c];
      squares[c] += u[c] * u[c];
    }
  }
  for (int c = 0; c < kTileRows; ++c) {
    if (block[c * a.stride + row + c] > 0) continue;
    double sum = 0;
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) sum += squares[c][l];
    count.growth += __builtin_fabs(sum * inverse[c]);
  }
}

// Left-looking: a row of the factor is stored once, when all rows above it have been subtracted.
InsideCount inside_count(const Inside& a, double shift) {
  InsideCount count;
  for (Index row = 0; row < a.m; row += kTileRows) {
    for (Index r = row; r < row + kTileRows; ++r) {
      const double* from = a.G + r * a.stride;
      double* to = a.U + r * a.stride;
      for (Index i = row; i < a.m; i += kLanes) vec(to + i) = vec(from + i);
      to[r] -= shift;
    }
    for (Index p = 0; p < row; ++p) {
      for (Index r = 0; r < kTileRows; r += kLanes) {
        vec(a.scaled + p * kTileRows + r) = vec(a.U + p * a.stride + row + r) * -a.inverse[p];
      }
    }
    tile_row(a.U, row, a, a.scaled, kTileRows, a.U, row);
    factor_tile(a, row, count);
  }
  return count;
}

// Phase 4.

struct InsideBracket {
  double lo, hi;
};

void inside_multiply(const Inside& a) {  // y = G x
  for (Index i = 0; i < a.m; ++i) a.y[i] = 0;
  for (Index i = 0; i < a.m; ++i) {
    const double* row = a.G + i * a.stride;
    const Vec x = broadcast(a.x[i]);
    double sum = row[i] * a.x[i];
    Index j = i + 1;
    for (; j % kLanes; ++j) {
      sum += row[j] * a.x[j];
      a.y[j] += row[j] * a.x[i];
    }
    Vec sums = {};
    for (; j < a.m; j += kLanes) {
      sums += vec(row + j) * vec(a.x + j);
      vec(a.y + j) += vec(row + j) * x;
    }
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) sum += sums[l];
    a.y[i] += sum;
  }
}

InsideBracket inside_refine(const Inside& a, const InsideNorms& norms, InsideBracket bracket, double tight) {
  Index start = 0;
  while (a.G[start * a.stride + start] < norms.top) ++start;
  double length = 0;
  for (Index i = 0; i < a.m; ++i) {
    a.x[i] = i < start ? a.G[i * a.stride + start] : a.G[start * a.stride + i];
    length += a.x[i] * a.x[i];
  }
  length = __builtin_sqrt(length);
  for (Index i = 0; i < a.m; ++i) a.x[i] /= length;
  for (int step = 0; step < kPowerSteps; ++step) {
    inside_multiply(a);
    double rho = 0, residual = 0;
    length = 0;
    for (Index i = 0; i < a.m; ++i) {
      rho += a.x[i] * a.y[i];
      length += a.y[i] * a.y[i];
    }
    for (Index i = 0; i < a.m; ++i) residual += (a.y[i] - rho * a.x[i]) * (a.y[i] - rho * a.x[i]);
    length = __builtin_sqrt(length);
    const double rest = norms.square - rho * rho, by_norm = rest > 0 ? __builtin_sqrt(rest) : 0;
    const double other = norms.trace - rho < by_norm ? norms.trace - rho : by_norm;
    bracket.lo = length > bracket.lo ? length : bracket.lo;
    if (rho > other) {
      const double upper = rho + residual / (rho - other);
      bracket.hi = upper < bracket.hi ? upper : bracket.hi;
    }
    if (!(bracket.hi > bracket.lo * (1 + tight))) break;
    for (Index i = 0; i < a.m; ++i) a.x[i] = a.y[i] / length;
  }
  return bracket;
}

InsideBracket inside_squeeze(const Inside& a, const InsideNorms& norms, InsideBracket bracket, double tight) {
  const double m = static_cast<double>(a.m), rounding = 3 * (m + 2) * 0x1p-53;
  double width = tight;
  for (int step = 0; step < kSqueezeSteps && bracket.hi > bracket.lo * (1 + tight); ++step) {
    const double near = bracket.lo * (1 + width), middle = bracket.lo + (bracket.hi - bracket.lo) / 2;
    const double least = bracket.lo * (1 + tight) < bracket.hi ? bracket.lo * (1 + tight) : bracket.hi;
    double shift = near < middle ? near : middle;
    shift = shift > least ? shift : least;
    const InsideCount count = inside_count(a, shift);
    if (!(rounding * (norms.trace + m * shift + 2 * count.growth) <= tight / 4 * shift)) break;
    if (count.positive == 0) {
      bracket.hi = shift;
      width = (bracket.hi / bracket.lo - 1) / 8;
      width = width > tight ? width : tight;
    } else {
      bracket.lo = shift;
      width *= 8;
    }
  }
  return bracket;
}

template <class T>
std::int32_t inside(const T* map, const MapShape& s, double rtol, void* workspace) {
  const Inside a(workspace, s);
  const InsideNorms norms = inside_gram(map, s, a);
  if (!(norms.trace < __builtin_inf())) return kRankNotFinite;
  if (norms.trace == 0) return 0;
  const double rtol2 = rtol * rtol, ratio = norms.square / norms.trace;
  InsideBracket bracket = {ratio > norms.top ? ratio : norms.top, __builtin_sqrt(norms.square)};
  InsideCount count = inside_count(a, rtol2 * bracket.hi);
  bool decided = count.positive >= norms.rows;
  if (!decided) {
    const InsideCount below = inside_count(a, rtol2 * bracket.lo);
    decided = count.positive == below.positive && count.growth <= norms.trace && below.growth <= norms.trace;
  }
  if (!decided) {
    const double n = static_cast<double>(long_side(s)), tight = 1 / (kTightness * n * n);
    bracket = inside_squeeze(a, norms, inside_refine(a, norms, bracket, tight), tight);
    count = inside_count(a, rtol2 * bracket.hi);
    decided = bracket.hi <= bracket.lo * (1 + tight) && count.growth <= norms.trace;
  }
  return !decided ? kRankUndecided : count.positive == 0 ? 1 : static_cast<std::int32_t>(count.positive);
}

std::int32_t run_inside(const void* map, const MapShape& s, Element element, double rtol, void* workspace) {
  switch (element) {
    case Element::float32:
      return inside(static_cast<const float*>(map), s, rtol, workspace);
    case Element::float64:
      return inside(static_cast<const double*>(map), s, rtol, workspace);
    case Element::float16:
      return inside(static_cast<const Float16*>(map), s, rtol, workspace);
    case Element::bfloat16:
      return inside(static_cast<const BFloat16*>(map), s, rtol, workspace);
  }
  return kRankUndecided;
}

}  // namespace
}  // namespace pyprune
