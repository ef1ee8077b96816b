// The rank kernel, compiled once per instruction set: kLanes maps side by side, one in each lane of a vector.
//
// Include it from one source file per instruction set, after defining PYPRUNE_LANES. Everything here has internal
// linkage and nothing inline is shared with other files, so no code for one instruction set can end up in another.
#include "half.h"
#include "pyprune/rank.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef PYPRUNE_LANES
#define PYPRUNE_LANES 2
#endif
#ifndef PYPRUNE_BLOCK
#define PYPRUNE_BLOCK 3  // 3 x 3 accumulators and 6 operands fill the 16 registers before AVX-512
#endif

// Loops over lanes and over the rows and columns of a block must vanish: otherwise the accumulators live in memory.
#ifdef __clang__
#define PYPRUNE_UNROLL _Pragma("unroll")
#else
#define PYPRUNE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;

constexpr int kLanes = PYPRUNE_LANES;
constexpr int kBlock = PYPRUNE_BLOCK;
constexpr double kTightness = 32;  // a bracket of 1 / (32 n^2) moves the threshold by 1/16 of the promised band
constexpr int kPowerSteps = 8;
constexpr int kSqueezeSteps = 24;
constexpr Index kTileItems = 4096;

typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef float VecFloat __attribute__((vector_size(4 * kLanes)));
typedef std::int64_t Mask __attribute__((vector_size(8 * kLanes)));

inline Vec broadcast(double value) {
  return Vec{} + value;
}
inline Mask constant(std::int64_t value) {
  return Mask{} + value;
}
inline Vec larger(Vec a, Vec b) {
  return a > b ? a : b;
}
inline Vec smaller(Vec a, Vec b) {
  return a < b ? a : b;
}
inline Vec widen(Vec a) {
  return a;
}
inline Vec widen(VecFloat a) {  // GCC 12 splits the plain conversion, and warns of the unmasked intrinsic
#if PYPRUNE_LANES == 8
  return reinterpret_cast<Vec>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(a)));
#elif PYPRUNE_LANES == 4
  return reinterpret_cast<Vec>(_mm256_cvtps_pd(reinterpret_cast<__m128>(a)));
#else
  return __builtin_convertvector(a, Vec);
#endif
}

inline Vec root(Vec a) {
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) a[l] = __builtin_sqrt(a[l]);
  return a;
}

inline bool any(Mask mask) {
  std::int64_t bits = 0;
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) bits |= mask[l];
  return bits != 0;
}

// Phase 1: transpose kLanes maps into a float64 tile [H][W][lane]. Widening here, once, beats widening in the Gram
// loop, where it costs half of the multiply-adds again.

typedef std::uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));
typedef std::uint32_t VecBits __attribute__((vector_size(4 * kLanes)));

struct AsFloat {
  using Lanes = VecFloat;
  typedef std::int32_t Pick __attribute__((vector_size(4 * kLanes)));
};
template <class T>
struct Traits : AsFloat {  // float16 and bfloat16
  using Stored = VecHalf;
  typedef std::uint16_t Unaligned __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
};
template <>
struct Traits<float> : AsFloat {
  using Stored = VecFloat;
  typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
};
template <>
struct Traits<double> {
  using Lanes = Vec;
  using Stored = Vec;
  typedef double Unaligned __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
  typedef std::int64_t Pick __attribute__((vector_size(8 * kLanes)));
};

template <class T>
using Lanes = typename Traits<T>::Lanes;

// What lies in memory as something to compute with: halves become float32 at once.
template <class T>
inline Lanes<T> decode(typename Traits<T>::Stored stored) {
  return stored;
}
template <>
inline VecFloat decode<BFloat16>(VecHalf stored) {
#if PYPRUNE_LANES == 8
  const VecBits bits = reinterpret_cast<VecBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(stored)));
#else
  const VecBits bits = __builtin_convertvector(stored, VecBits);
#endif
  return reinterpret_cast<VecFloat>(bits << 16);
}
template <>
inline VecFloat decode<Float16>(VecHalf stored) {
#if defined(__F16C__) && PYPRUNE_LANES == 8
  return reinterpret_cast<VecFloat>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(stored)));
#elif defined(__F16C__) && PYPRUNE_LANES == 4
  return reinterpret_cast<VecFloat>(_mm_cvtph_ps(_mm_cvtsi64_si128(reinterpret_cast<long long>(stored))));
#else  // as value_of() in half.h
  const VecBits bits = __builtin_convertvector(stored, VecBits);
  const VecBits magnitude = (bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const auto special = exponent == 0x0f800000, tiny = exponent == 0;
  const VecBits one = VecBits{} + (1u << 23);
  const VecBits step = special ? one * 224 : tiny ? one * 113 : one * 112;
  const VecFloat value = reinterpret_cast<VecFloat>(magnitude + step);
  const VecFloat shifted = value - 0x1p-14f;
  const VecBits found = reinterpret_cast<VecBits>(tiny ? shifted : value);
  return reinterpret_cast<VecFloat>(found | (bits & 0x8000) << 16);
#endif
}

template <class T>
inline Lanes<T> load(const T* p) {
  return decode<T>(*reinterpret_cast<const typename Traits<T>::Unaligned*>(p));
}

inline float stored(float a) {
  return a;
}
inline double stored(double a) {
  return a;
}
template <class T>
inline std::uint16_t stored(T a) {
  return a.bits;
}

// One element of each map.
template <class T>
inline Lanes<T> gather(const T* const* maps, Index offset) {
  typename Traits<T>::Stored v{};
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) v[l] = stored(maps[l][offset]);
  return decode<T>(v);
}

// Lower (half = 0) or upper half of a and b, interleaved.
template <int half, class T>
inline Lanes<T> interleave(Lanes<T> a, Lanes<T> b) {
  constexpr int o = half * kLanes / 2, n = kLanes;
#if PYPRUNE_LANES == 2
  constexpr typename Traits<T>::Pick pick = {o, o + n};
#elif PYPRUNE_LANES == 4
  constexpr typename Traits<T>::Pick pick = {o, o + n, o + 1, o + 1 + n};
#elif PYPRUNE_LANES == 8
  constexpr typename Traits<T>::Pick pick = {o, o + n, o + 1, o + 1 + n, o + 2, o + 2 + n, o + 3, o + 3 + n};
#endif
#ifdef __clang__
  Lanes<T> both;
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) both[l] = pick[l] < n ? a[pick[l]] : b[pick[l] - n];
  return both;
#else
  return __builtin_shuffle(a, b, pick);
#endif
}

// Transposes a square of kLanes elements of kLanes maps: each round is one perfect shuffle.
template <class T>
inline void transpose(Lanes<T> (&v)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Lanes<T> w[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      w[2 * i] = interleave<0, T>(v[i], v[i + kLanes / 2]);
      w[2 * i + 1] = interleave<1, T>(v[i], v[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  }
}

// Maps of four elements that follow each other in memory: a perfect shuffle of all 4 kLanes elements turns the bits of
// their places [lane][element] by one, so log2(kLanes) of them give [element][lane].
template <class T>
inline void pack_quads(const T* first, Vec* tile) {
  Lanes<T> v[4];
  PYPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) v[i] = load(first + i * kLanes);
  PYPRUNE_UNROLL
  for (int round = 1; round < kLanes; round *= 2) {
    const Lanes<T> w[4] = {interleave<0, T>(v[0], v[2]), interleave<1, T>(v[0], v[2]), interleave<0, T>(v[1], v[3]),
                           interleave<1, T>(v[1], v[3])};
    PYPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = w[i];
  }
  PYPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) tile[i] = widen(v[i]);
}

template <class T>
void pack_run(const T* const* maps, Index offset, Index count, Vec* tile) {
  Index k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    Lanes<T> v[kLanes];
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) v[l] = load(maps[l] + offset + k);
    transpose<T>(v);
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) tile[k + l] = widen(v[l]);
  }
  for (; k < count; ++k) tile[k] = widen(gather(maps, offset + k));
}

template <class T>
void pack(const T* const* maps, const MapShape& s, Vec* tile) {
  bool adjacent = true;  // channels last: the lanes lie side by side already
  bool quads = s.H * s.W == 4 && (s.W == 1 || s.stride_w == 1) && (s.H == 1 || s.stride_h == s.W);
  PYPRUNE_UNROLL
  for (int l = 1; l < kLanes; ++l) {
    adjacent &= maps[l] == maps[0] + l;
    quads &= maps[l] == maps[0] + 4 * l;
  }
  if (quads) {
    pack_quads(maps[0], tile);
  } else if (adjacent) {
    for (Index h = 0; h < s.H; ++h) {
      for (Index w = 0; w < s.W; ++w) tile[h * s.W + w] = widen(load(maps[0] + h * s.stride_h + w * s.stride_w));
    }
  } else if (s.stride_w == 1 && s.stride_h == s.W) {
    pack_run(maps, 0, s.H * s.W, tile);
  } else if (s.stride_w == 1) {
    for (Index h = 0; h < s.H; ++h) pack_run(maps, h * s.stride_h, s.W, tile + h * s.W);
  } else {
    for (Index h = 0; h < s.H; ++h) {
      for (Index w = 0; w < s.W; ++w) tile[h * s.W + w] = widen(gather(maps, h * s.stride_h + w * s.stride_w));
    }
  }
}

// Squares of float32 neither overflow nor vanish in float64. Float64 maps are scaled by a power of two, lane by lane.
template <class T>
inline Vec scale_of(const T* const*, const MapShape&) {
  return broadcast(1);
}

Vec scale_of(const double* const* maps, const MapShape& s) {
  Vec top = {};
  for (Index h = 0; h < s.H; ++h) {
    for (Index w = 0; w < s.W; ++w) {
      const Vec v = gather(maps, h * s.stride_h + w * s.stride_w);
      top = larger(larger(top, v), -v);
    }
  }
  const Mask exponent = reinterpret_cast<Mask>(top) >> 52;
  const Mask opposite = 2046 - exponent;
  return reinterpret_cast<Vec>((opposite < 1 ? Mask{} + 1 : opposite) << 52);
}

// Phase 2: the Gram matrix of the short side, its trace and its squared Frobenius norm.

inline Index triangle(Index i) {
  return i * (i + 1) / 2;
}  // start of row i in a packed lower triangle

struct Norms {
  Vec trace, square, top, rows;  // top: largest diagonal entry; rows: how many are not zero
};

// The maps of the next block, fetched bit by bit while this one is worked on: [next, end) of each lane's bytes.
struct Ahead {
  std::uintptr_t maps[kLanes];
  Index next, end, step;

  void fetch() {
    const Index stop = next + step < end ? next + step : end;
    for (; next < stop; next += 64) {
      PYPRUNE_UNROLL
      for (int l = 0; l < kLanes; ++l) {
        __builtin_prefetch(reinterpret_cast<const char*>(maps[l] + static_cast<std::size_t>(next)), 0, 2);
      }
    }
  }
};

// A tile seen with its short side first; first: no earlier tile of these maps is in G.
struct Sides {
  const Vec* tile;
  Index m, n, row, step;
  bool first;
  Ahead* ahead;
};

template <int R, int C>
inline void gram_block(const Sides& a, Index i, Index j, Vec* G, Norms& norms) {
  Vec sum[R][C];
  PYPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    PYPRUNE_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = a.first ? Vec{} : G[triangle(i + r) + j + c];
  }
  a.ahead->fetch();
  const Vec *x = a.tile + i * a.row, *y = a.tile + j * a.row;
  for (Index k = 0; k < a.n; ++k, x += a.step, y += a.step) {
    Vec left[R];
    PYPRUNE_UNROLL
    for (int r = 0; r < R; ++r) left[r] = x[r * a.row];
    PYPRUNE_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vec right = y[c * a.row];
      PYPRUNE_UNROLL
      for (int r = 0; r < R; ++r) sum[r][c] += left[r] * right;
    }
  }
  PYPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    Vec square = sum[r][0] * sum[r][0];  // one short chain a row
    PYPRUNE_UNROLL
    for (int c = 1; c < C; ++c) square += sum[r][c] * sum[r][c];
    PYPRUNE_UNROLL
    for (int c = 0; c < C; ++c) G[triangle(i + r) + j + c] = sum[r][c];
    norms.square += square + square;
  }
}

template <int C>
inline void gram_corner(const Sides& a, Index j, Vec* G, Norms& norms) {
  Vec sum[C][C];
  PYPRUNE_UNROLL
  for (int r = 0; r < C; ++r) {
    PYPRUNE_UNROLL
    for (int c = 0; c <= r; ++c) sum[r][c] = a.first ? Vec{} : G[triangle(j + r) + j + c];
  }
  const Vec* x = a.tile + j * a.row;
  for (Index k = 0; k < a.n; ++k, x += a.step) {
    Vec left[C];
    PYPRUNE_UNROLL
    for (int r = 0; r < C; ++r) left[r] = x[r * a.row];
    PYPRUNE_UNROLL
    for (int r = 0; r < C; ++r) {
      PYPRUNE_UNROLL
      for (int c = 0; c <= r; ++c) sum[r][c] += left[r] * left[c];
    }
  }
  PYPRUNE_UNROLL
  for (int r = 0; r < C; ++r) {
    Vec square = {};
    PYPRUNE_UNROLL
    for (int c = 0; c < r; ++c) square += sum[r][c] * sum[r][c];
    norms.square += square + square + sum[r][r] * sum[r][r];
    norms.trace += sum[r][r];
    norms.top = larger(norms.top, sum[r][r]);
    norms.rows += sum[r][r] > 0 ? broadcast(1) : Vec{};
    PYPRUNE_UNROLL
    for (int c = 0; c <= r; ++c) G[triangle(j + r) + j + c] = sum[r][c];
  }
}

template <int C>
inline void gram_column(const Sides& a, Index j, Vec* G, Norms& norms) {
  gram_corner<C>(a, j, G, norms);
  Index i = j + C;
  for (; i + kBlock <= a.m; i += kBlock) gram_block<kBlock, C>(a, i, j, G, norms);
  if constexpr (kBlock > 3) {
    if (a.m - i == 3) gram_block<3, C>(a, i, j, G, norms);
  }
  if (a.m - i == 2) gram_block<2, C>(a, i, j, G, norms);
  if (a.m - i == 1) gram_block<1, C>(a, i, j, G, norms);
}

Norms gram(const Sides& a, Vec* G) {
  Norms norms = {};
  Index j = 0;
  for (; j + kBlock <= a.m; j += kBlock) gram_column<kBlock>(a, j, G, norms);
  if constexpr (kBlock > 3) {
    if (a.m - j == 3) gram_column<3>(a, j, G, norms);
  }
  if (a.m - j == 2) gram_column<2>(a, j, G, norms);
  if (a.m - j == 1) gram_column<1>(a, j, G, norms);
  return norms;
}

// Phase 3: inertia. The positive pivots of G - shift I = L D L^T are its eigenvalues above shift (Sylvester).

struct Count {
  Vec positive;
  Vec growth;  // sum of |d_k| l_ik^2 over the negative pivots: with the trace it bounds the backward error
};

struct Factor {
  const Vec* G;
  Vec shift;
  Index m;
  Vec *L, *D, *U;  // packed unit lower triangle; pivots; D L^T of the current block column, [k][kBlock]
};

// One block of rows below the diagonal of block column j: left-looking, so each entry of L is stored once.
template <int R, int C>
inline void factor_rows(const Factor& f, Index i, Index j, const Vec (&corner)[C][C], const Vec (&inverse)[C],
                        Vec (&squares)[C]) {
  Vec u[R][C];
  const Vec* rows[R];
  PYPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    rows[r] = f.L + triangle(i + r);
    PYPRUNE_UNROLL
    for (int c = 0; c < C; ++c) u[r][c] = f.G[triangle(i + r) + j + c];
  }
  for (Index k = 0; k < j; ++k) {
    PYPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec l = rows[r][k];
      PYPRUNE_UNROLL
      for (int c = 0; c < C; ++c) u[r][c] -= l * f.U[k * kBlock + c];
    }
  }
  PYPRUNE_UNROLL
  for (int c = 0; c < C; ++c) {
    PYPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec l = u[r][c] * inverse[c];
      PYPRUNE_UNROLL
      for (int q = c + 1; q < C; ++q) u[r][q] -= u[r][c] * corner[q][c];
      f.L[triangle(i + r) + j + c] = l;
      squares[c] += l * l;
    }
  }
}

template <int C>
inline void factor_column(const Factor& f, Index j, Count& count) {
  Vec u[C][C], corner[C][C], inverse[C], squares[C], pivot[C];
  const Vec* rows[C];
  PYPRUNE_UNROLL
  for (int r = 0; r < C; ++r) {
    rows[r] = f.L + triangle(j + r);
    PYPRUNE_UNROLL
    for (int c = 0; c <= r; ++c) u[r][c] = f.G[triangle(j + r) + j + c];
    u[r][r] -= f.shift;
  }
  for (Index k = 0; k < j; ++k) {
    Vec scaled[C];
    PYPRUNE_UNROLL
    for (int c = 0; c < C; ++c) f.U[k * kBlock + c] = scaled[c] = rows[c][k] * f.D[k];
    PYPRUNE_UNROLL
    for (int r = 0; r < C; ++r) {
      PYPRUNE_UNROLL
      for (int c = 0; c <= r; ++c) u[r][c] -= rows[r][k] * scaled[c];
    }
  }
  PYPRUNE_UNROLL
  for (int c = 0; c < C; ++c) {
    pivot[c] = f.D[j + c] = u[c][c];
    inverse[c] = 1 / pivot[c];
    squares[c] = broadcast(1);
    PYPRUNE_UNROLL
    for (int r = c + 1; r < C; ++r) {
      corner[r][c] = u[r][c] * inverse[c];
      PYPRUNE_UNROLL
      for (int q = c + 1; q <= r; ++q) u[r][q] -= corner[r][c] * u[q][c];
      f.L[triangle(j + r) + j + c] = corner[r][c];
      squares[c] += corner[r][c] * corner[r][c];
    }
  }
  Index i = j + C;
  for (; i + kBlock <= f.m; i += kBlock) factor_rows<kBlock, C>(f, i, j, corner, inverse, squares);
  if constexpr (kBlock > 3) {
    if (f.m - i == 3) factor_rows<3, C>(f, i, j, corner, inverse, squares);
  }
  if (f.m - i == 2) factor_rows<2, C>(f, i, j, corner, inverse, squares);
  if (f.m - i == 1) factor_rows<1, C>(f, i, j, corner, inverse, squares);
  PYPRUNE_UNROLL
  for (int c = 0; c < C; ++c) {
    const Mask positive = pivot[c] > 0;
    count.positive += positive ? broadcast(1) : Vec{};
    count.growth -= squares[c] * (positive ? Vec{} : pivot[c]);
  }
}

Count count_above(const Factor& f) {
  Count count = {};
  Index j = 0;
  for (; j + kBlock <= f.m; j += kBlock) factor_column<kBlock>(f, j, count);
  if constexpr (kBlock > 3) {
    if (f.m - j == 3) factor_column<3>(f, j, count);
  }
  if (f.m - j == 2) factor_column<2>(f, j, count);
  if (f.m - j == 1) factor_column<1>(f, j, count);
  return count;
}

// Phase 4: brackets of lambda = sigma_max^2.

struct Bracket {
  Vec lo, hi;
};

inline Bracket first_bracket(const Norms& norms) {
  const Vec hi = root(norms.square);
  return {larger(norms.square / norms.trace, norms.top), hi};
}

void multiply(const Vec* G, Index m, const Vec* x, Vec* y) {
  for (Index i = 0; i < m; ++i) {
    const Vec* row = G + triangle(i);
    Vec sum = row[i] * x[i];
    for (Index j = 0; j < i; ++j) {
      sum += row[j] * x[j];
      y[j] += row[j] * x[i];
    }
    y[i] = sum;
  }
}

// Power steps. For |x| = 1, rho = x.Gx and r = Gx - rho x: |Gx| <= lambda, and where every other eigenvalue is at most
// other < rho, lambda <= rho + |r|^2 / (rho - other) (Kato-Temple). The trace and the Frobenius norm bound the others.
Bracket refine_bracket(const Vec* G, Index m, const Norms& norms, Bracket bracket, double tight, Vec* x, Vec* y) {
  // The column of the largest diagonal entry is seldom far from the leading eigenvector.
  for (Index i = 0; i < m; ++i) x[i] = Vec{};
  for (Index j = 0; j < m; ++j) {
    const Mask chosen = G[triangle(j) + j] == norms.top;
    if (!any(chosen)) continue;
    for (Index i = 0; i < m; ++i) x[i] += chosen ? G[i < j ? triangle(j) + i : triangle(i) + j] : Vec{};
  }
  Vec length = {};
  for (Index i = 0; i < m; ++i) length += x[i] * x[i];
  length = root(length);
  for (Index i = 0; i < m; ++i) x[i] /= length;

  for (int step = 0; step < kPowerSteps; ++step) {
    multiply(G, m, x, y);
    Vec rho = {}, residual = {};
    length = Vec{};
    for (Index i = 0; i < m; ++i) {
      rho += x[i] * y[i];
      length += y[i] * y[i];
    }
    for (Index i = 0; i < m; ++i) residual += (y[i] - rho * x[i]) * (y[i] - rho * x[i]);
    length = root(length);
    const Vec other = smaller(norms.trace - rho, root(larger(norms.square - rho * rho, Vec{})));
    const Vec upper = rho + residual / (rho - other);
    bracket.lo = larger(bracket.lo, length);
    bracket.hi = rho > other ? smaller(bracket.hi, upper) : bracket.hi;
    if (!any(bracket.hi > bracket.lo * (1 + tight))) break;
    for (Index i = 0; i < m; ++i) x[i] = y[i] / length;
  }
  return bracket;
}

// What power steps leave open: G - x I has no positive pivot just when x is above lambda. The first x lies so little
// above lo, which is often sharp, that it closes the bracket at once; then they spread.
Bracket squeeze_bracket(Factor factor, const Norms& norms, Bracket bracket, double tight) {
  const double m = static_cast<double>(factor.m), rounding = 3 * (m + 2) * 0x1p-53;
  Vec width = broadcast(tight);
  Mask usable = constant(-1);
  for (int step = 0; step < kSqueezeSteps; ++step) {
    const Mask open = usable & (bracket.hi > bracket.lo * (1 + tight));
    if (!any(open)) break;
    factor.shift = smaller(bracket.lo * (1 + width), bracket.lo + (bracket.hi - bracket.lo) / 2);
    factor.shift = larger(factor.shift, smaller(bracket.lo * (1 + tight), bracket.hi));
    const Count count = count_above(factor);
    // The bound of docs/ops/rank.md: the sign is right for a lambda that is off by a quarter of what is tolerated.
    usable &= rounding * (norms.trace + m * factor.shift + 2 * count.growth) <= tight / 4 * factor.shift;
    const Mask below = usable & (count.positive == 0), above = usable & (count.positive > 0);
    bracket.hi = below ? factor.shift : bracket.hi;
    bracket.lo = above ? factor.shift : bracket.lo;
    width = below ? larger((bracket.hi / bracket.lo - 1) / 8, broadcast(tight)) : width * 8;
  }
  return bracket;
}

// The whole kernel.

struct Memory {
  Vec *G, *L, *D, *U, *x, *y, *tile;

  Memory(void* memory, Index m) {
    G = static_cast<Vec*>(memory);
    L = G + triangle(m);
    D = L + triangle(m);
    U = D + m;
    x = U + m * kBlock;
    y = x + m;
    tile = y + m;
  }
};

// Columns of a tile: whole maps up to 64 x 64, and beyond as much as leaves the L2 cache room for G.
inline Index tile_columns(const MapShape& s) {
  const Index columns = kTileItems / short_side(s) / kLanes * kLanes;
  return columns < long_side(s) ? (columns > 2 * kLanes ? columns : 2 * kLanes) : long_side(s);
}

std::size_t workspace_bytes(const MapShape& s) {
  const Index m = short_side(s);
  return static_cast<std::size_t>(2 * triangle(m) + (3 + kBlock) * m + m * tile_columns(s)) * sizeof(Vec);
}

// Where the next block lies if it goes on like this one. Small maps come faster than they can be asked for.
template <class T>
Ahead next_block(const T* const* maps, Index m, Index n, Index columns) {
  Ahead ahead = {};
  const Index span = maps[1] - maps[0];
  if (span < m * n || m < 2 * kBlock) return ahead;
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) {  // whole numbers: there may be no next block
    ahead.maps[l] = reinterpret_cast<std::uintptr_t>(maps[l]) + static_cast<std::size_t>(kLanes * span) * sizeof(T);
  }
  ahead.end = m * n * static_cast<Index>(sizeof(T));
  const Index calls = triangle(m / kBlock - 1) * ((n + columns - 1) / columns);
  ahead.step = (ahead.end / calls + 63) / 64 * 64;
  return ahead;
}

template <class T>
Norms load_gram(const T* const* maps, const MapShape& s, const Memory& memory, bool more) {
  const bool wide = s.H <= s.W;
  const Index m = short_side(s), n = long_side(s), columns = tile_columns(s);
  const Vec factor = scale_of(maps, s);
  Norms norms;
  Ahead ahead = more ? next_block(maps, m, n, tile_columns(s)) : Ahead{};
  for (Index k = 0; k < n; k += columns) {
    const Index part = n - k < columns ? n - k : columns;
    const MapShape slice = {wide ? m : part, wide ? part : m, s.stride_h, s.stride_w};
    const T* starts[kLanes];
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) starts[l] = maps[l] + k * (wide ? s.stride_w : s.stride_h);
    pack(starts, slice, memory.tile);
    if (sizeof(T) == 8) {
      for (Index i = 0; i < m * part; ++i) memory.tile[i] *= factor;
    }
    norms = gram({memory.tile, m, part, wide ? part : 1, wide ? 1 : m, k == 0, &ahead}, memory.G);
  }
  return norms;
}

// 2 x 2 has a closed form. s_1 s_2 = |det| and s_1^2 + s_2^2 = T; s_2 > rtol s_1 says |det| > rtol s_1^2, and with
// s_1^2 + det^2 / s_1^2 = T that is |det| (1 + rtol^2) > rtol T: neither roots nor quotients.
template <class T>
bool run_2x2(const T* const* maps, const MapShape& s, double rtol, std::int32_t* ranks) {
  Vec a[4];
  pack(maps, s, a);
  if (sizeof(T) == 8) {
    const Vec factor = scale_of(maps, s);
    PYPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) a[i] *= factor;
  }
  const Vec trace = (a[0] * a[0] + a[1] * a[1]) + (a[2] * a[2] + a[3] * a[3]);
  const Vec det = a[0] * a[3] - a[1] * a[2];
  const Mask full = larger(det, -det) * (1 + rtol * rtol) > rtol * trace;
  const Mask rank = trace == 0 ? Mask{} : 1 - full;  // a true lane is -1
  const Mask found = trace < __builtin_inf() ? rank : constant(kRankNotFinite);
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) ranks[l] = static_cast<std::int32_t>(found[l]);
  return false;
}

// Returns whether a rank stays undecided.
template <class T>
bool run(const T* const* maps, const MapShape& s, double rtol, bool refine, void* workspace, std::int32_t* ranks) {
  if (s.H == 2 && s.W == 2) return run_2x2(maps, s, rtol, ranks);
  const Index m = short_side(s), n = long_side(s);
  const Memory memory(workspace, m);
  const Norms norms = load_gram(maps, s, memory, !refine);

  // The upper end of the bracket. A count of all rows that are not zero decides: no rank is larger.
  const Vec rtol2 = broadcast(rtol) * rtol;
  Bracket bracket = first_bracket(norms);
  Factor factor = {memory.G, rtol2 * bracket.hi, m, memory.L, memory.D, memory.U};
  Count above = count_above(factor);
  Mask decided = (above.positive >= norms.rows) | (norms.trace == 0);
  // The lower end: the same count decides.
  if (any(~decided)) {
    factor.shift = rtol2 * bracket.lo;
    const Count below = count_above(factor);
    decided |= (above.positive == below.positive) & (above.growth <= norms.trace) & (below.growth <= norms.trace);
  }

  // What the ends of the bracket do not decide.
  const double tight = 1 / (kTightness * static_cast<double>(n * n));
  if (refine && any(~decided)) {
    bracket = refine_bracket(memory.G, m, norms, bracket, tight, memory.x, memory.y);
    bracket.hi = decided ? bracket.lo : bracket.hi;
    bracket = squeeze_bracket(factor, norms, bracket, tight);
    factor.shift = rtol2 * bracket.hi;
    const Count last = count_above(factor);
    above.positive = decided ? above.positive : last.positive;
    decided |= (bracket.hi <= bracket.lo * (1 + tight)) & (last.growth <= norms.trace);
  }

  // rtol < 1: sigma_max itself always counts, however wide the bracket is.
  const Mask count = __builtin_convertvector(larger(above.positive, broadcast(1)), Mask);
  Mask found = norms.trace == 0 ? Mask{} : decided ? count : constant(kRankUndecided);
  found = norms.trace < __builtin_inf() ? found : constant(kRankNotFinite);
  PYPRUNE_UNROLL
  for (int l = 0; l < kLanes; ++l) ranks[l] = static_cast<std::int32_t>(found[l]);
  return any(found == constant(kRankUndecided));
}

// The floor: nothing but independent multiply-adds in registers, `rounds` times kSpin vectors.
constexpr int kSpin = PYPRUNE_BLOCK == 3 ? 12 : 16;  // as many chains as hide the latency and stay in registers

double spin(std::int64_t rounds) {
  Vec sum[kSpin];
  PYPRUNE_UNROLL
  for (int i = 0; i < kSpin; ++i) sum[i] = broadcast(i);
  const Vec half = broadcast(0.5), one = broadcast(1);
  for (std::int64_t round = 0; round < rounds; ++round) {
    PYPRUNE_UNROLL
    for (int i = 0; i < kSpin; ++i) sum[i] = sum[i] * half + one;
  }
  double total = 0;
  for (int i = 0; i < kSpin; ++i) total += sum[i][0];
  return total;
}

bool run_block(const void* const* maps, const MapShape& s, Element element, double rtol, bool refine, void* workspace,
               std::int32_t* ranks) {
  switch (element) {
    case Element::float32:
      return run(reinterpret_cast<const float* const*>(maps), s, rtol, refine, workspace, ranks);
    case Element::float64:
      return run(reinterpret_cast<const double* const*>(maps), s, rtol, refine, workspace, ranks);
    case Element::float16:
      return run(reinterpret_cast<const Float16* const*>(maps), s, rtol, refine, workspace, ranks);
    case Element::bfloat16:
      return run(reinterpret_cast<const BFloat16* const*>(maps), s, rtol, refine, workspace, ranks);
  }
  return false;
}

}  // namespace
}  // namespace pyprune
