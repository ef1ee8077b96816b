// The kernel SSIM of one pair of slices, written once for every kind of number: a scalar on a CPU or a GPU, or a
// vector.
//
// Two steps, kept apart. Preparation, in float64, reduces a slice w[0..K) of K = K1 K2 weights to
//
//   c_k = (w_k - mean) / sqrt(K)   so that a covariance is a plain product, sxy = sum_k cx_k cy_k
//   m = sqrt(2) |mean|             so that 2 |mx my| is a plain product
//   s = sqrt(sum_k c_k^2)          the deviation
//   q = mean^2 + e/2, r = s^2 + e/2    so that denominators are sums
//
// and rounds these K + 4 numbers once. The formula then is
//
//   L = (mx my + e) / (qx + qy),  C = (2 sx sy + e) / (rx + ry),  S = (|sxy| + e) / (sx sy + e),
//   psi = L^alpha C^beta S^gamma.
//
// Every operation below is symmetric in x and y, so psi(x, y) and psi(y, x) have the same bits.
//
// Ops says what the numbers are: a type V with + * /, and fma, abs, sqrt and power(x, exponent). Every product that is
// added is an explicit fma; kDivideOnce says that a division costs more than five products, and asks for one(). Compile
// with -ffp-contract=off and all that have a fused one give the same bits. Unnamed namespace: no file may pick up
// another instruction set's copy of an inline function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PYPRUNE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYPRUNE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pyprune {

// Which exponents are special. Where beta = gamma = 1, their two quotients are one.
enum class SsimForm { alpha_zero, alpha_half, alpha_one, alpha_power, all_powers };

constexpr int kPowerDegree = 7;

// x^a for x = f 2^(b - 127), 1 <= f < 2, b < 128: a polynomial in f - 1.5 times unit * 2^(a (b - 127)), which is the
// product of an entry picked by the three low bits of b and one picked by the others. Entries fit a shuffle of 16
// floats, and for b >= 64, which the CPU kernels see to, one of 8. Float64 lanes use only `a`.
struct SsimPower {
  double a;
  float coefficient[kPowerDegree + 1];  // of (f - 1.5)^j
  float low[16];                        // 2^(a (i % 8))
  float high[16];                       // unit * 2^(a (8 i - 127))
};

// What is the same for all slice pairs of a layer. psi comes out in units: 2^23 for float32 lanes, which add it up in
// whole numbers, and 1 for float64 lanes.
struct SsimFormula {
  SsimForm form;
  double e, unit;
  SsimPower alpha, beta, gamma;  // unit is folded into alpha's tables
};

constexpr double kSsimFloatUnit = 8388608;  // 2^23
constexpr int kSsimExactChannels = 255;     // that many psi, each at most 1 + 2^-16, add up within 31 bits

// The rows of a prepared slice after its K centred values.
enum : int { kSsimM = 0, kSsimQ = 1, kSsimS = 2, kSsimR = 3, kSsimRows = 4 };

namespace {

template <class V>
struct SliceNumbers {
  V m, q, s, r;
};

template <class Ops>
struct SsimTerms {
  using V = typename Ops::V;
  V e, unit;
};

// psi * unit for K > 1.
template <class Ops, SsimForm form>
PYPRUNE_HOST_DEVICE typename Ops::V ssim_psi(const SliceNumbers<typename Ops::V>& x,
                                             const SliceNumbers<typename Ops::V>& y, typename Ops::V sxy,
                                             const SsimTerms<Ops>& terms, const typename Ops::Power& alpha,
                                             const typename Ops::Power& beta, const typename Ops::Power& gamma) {
  using V = typename Ops::V;
  const V l_above = Ops::fma(x.m, y.m, terms.e), l_below = x.q + y.q;
  const V s_below = Ops::fma(x.s, y.s, terms.e), s_above = Ops::abs(sxy) + terms.e;
  const V c_above = Ops::fma(x.s, y.s, s_below), c_below = x.r + y.r;
  const V above = c_above * s_above, below = c_below * s_below;
  if constexpr (form == SsimForm::alpha_zero) {
    return (terms.unit * above) / below;
  } else if constexpr (form == SsimForm::alpha_one) {
    return (terms.unit * (above * l_above)) / (below * l_below);
  } else if constexpr (form == SsimForm::all_powers) {
    return Ops::power(l_above / l_below, alpha) *
           (Ops::power(c_above / c_below, beta) * Ops::power(s_above / s_below, gamma));
  } else if constexpr (form == SsimForm::alpha_half) {
    return (terms.unit * Ops::sqrt(l_above / l_below)) * (above / below);
  } else if constexpr (Ops::kDivideOnce) {
    const V inverse = Ops::one() / (below * l_below);
    return Ops::power(l_above * (below * inverse), alpha) * (above * (l_below * inverse));
  } else {
    return Ops::power(l_above / l_below, alpha) * (above / below);
  }
}

// psi * unit for K = 1: no structure, so C = S = 1.
template <class Ops, SsimForm form>
PYPRUNE_HOST_DEVICE typename Ops::V ssim_psi_of_points(const SliceNumbers<typename Ops::V>& x,
                                                       const SliceNumbers<typename Ops::V>& y,
                                                       const SsimTerms<Ops>& terms, const typename Ops::Power& alpha) {
  using V = typename Ops::V;
  if constexpr (form == SsimForm::alpha_zero) return terms.unit;
  const V L = Ops::fma(x.m, y.m, terms.e) / (x.q + y.q);
  if constexpr (form == SsimForm::alpha_one) return L * terms.unit;
  if constexpr (form == SsimForm::alpha_half) return Ops::sqrt(L) * terms.unit;
  return Ops::power(L, alpha);
}

// Scalars, on host and device.

PYPRUNE_HOST_DEVICE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
PYPRUNE_HOST_DEVICE float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct ScalarFloat {
  using V = float;
  using Power = SsimPower;
  static constexpr bool kDivideOnce = false;
  static PYPRUNE_HOST_DEVICE V fma(V a, V b, V c) { return ::fmaf(a, b, c); }
  static PYPRUNE_HOST_DEVICE V abs(V a) { return ::fabsf(a); }
  static PYPRUNE_HOST_DEVICE V sqrt(V a) { return ::sqrtf(a); }
  static PYPRUNE_HOST_DEVICE V power(V x, const Power& p) {
    const std::uint32_t bits = bits_of(x), b = bits >> 23;
    const V t = float_of((bits & 0x007fffff) | 0x3f800000) - 1.5f;
    V sum = p.coefficient[kPowerDegree];
    for (int j = kPowerDegree - 1; j >= 0; --j) sum = fma(sum, t, p.coefficient[j]);
    return sum * (p.low[b & 7] * p.high[b >> 3]);
  }
};

struct ScalarDouble {
  using V = double;
  using Power = SsimPower;
  static constexpr bool kDivideOnce = false;
  static PYPRUNE_HOST_DEVICE V fma(V a, V b, V c) { return ::fma(a, b, c); }
  static PYPRUNE_HOST_DEVICE V abs(V a) { return ::fabs(a); }
  static PYPRUNE_HOST_DEVICE V sqrt(V a) { return ::sqrt(a); }
  static PYPRUNE_HOST_DEVICE V power(V x, const Power& p) { return ::pow(x, p.a); }
};

// sum_k x_k y_k in three chains per nine values and one sum over the nines: short chains round little.
// x(k), y(k) -> V.
template <class Ops, class X, class Y>
PYPRUNE_HOST_DEVICE typename Ops::V ssim_nine(const X& x, const Y& y, int k) {
  using V = typename Ops::V;
  const V a = Ops::fma(x(k + 2), y(k + 2), Ops::fma(x(k + 1), y(k + 1), x(k) * y(k)));
  const V b = Ops::fma(x(k + 5), y(k + 5), Ops::fma(x(k + 4), y(k + 4), x(k + 3) * y(k + 3)));
  const V c = Ops::fma(x(k + 8), y(k + 8), Ops::fma(x(k + 7), y(k + 7), x(k + 6) * y(k + 6)));
  return (a + b) + c;
}

// How many of K values come before the nines.
PYPRUNE_HOST_DEVICE int ssim_head(int K) {
  return K % 9 == 0 ? 9 : K % 9;
}

template <class Ops, class X, class Y>
PYPRUNE_HOST_DEVICE typename Ops::V ssim_covariance(const X& x, const Y& y, int K) {
  using V = typename Ops::V;
  if (K == 9) return ssim_nine<Ops>(x, y, 0);
  V sum = x(0) * y(0);
  const int head = ssim_head(K);
  for (int k = 1; k < head; ++k) sum = Ops::fma(x(k), y(k), sum);
  for (int k = head; k < K; k += 9) sum = sum + ssim_nine<Ops>(x, y, k);
  return sum;
}

}  // namespace
}  // namespace pyprune
