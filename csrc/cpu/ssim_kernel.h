// The kernel SSIM kernel, compiled once per instruction set: lanes are filters, side by side in blocks of 16.
//
// Include it from one source file per instruction set, after defining PYPRUNE_LANES. Everything here has internal
// linkage and nothing inline is shared with other files, so no code for one instruction set can end up in another.
#include <type_traits>

#include "half.h"
#include "pyprune/ssim.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef PYPRUNE_LANES
#define PYPRUNE_LANES 2
#endif

#ifdef __clang__
#define PYPRUNE_UNROLL _Pragma("unroll")
#else
#define PYPRUNE_UNROLL _Pragma("GCC unroll 16")
#endif
#define PYPRUNE_INLINE inline __attribute__((always_inline))
#define PYPRUNE_ALWAYS __attribute__((always_inline))

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;

constexpr int kDoubles = PYPRUNE_LANES, kFloats = 2 * PYPRUNE_LANES;

typedef double VecDouble __attribute__((vector_size(8 * kDoubles)));
typedef std::int64_t IntDouble __attribute__((vector_size(8 * kDoubles)));
typedef float VecFloat __attribute__((vector_size(4 * kFloats)));
typedef std::int32_t IntFloat __attribute__((vector_size(4 * kFloats)));
typedef float HalfFloat __attribute__((vector_size(4 * kDoubles)));

// Subtracting a positive zero changes nothing, which compilers know; adding one would turn -0 into 0.
PYPRUNE_INLINE VecFloat broadcast(float a) {
  return a - VecFloat{};
}
PYPRUNE_INLINE VecDouble broadcast(double a) {
  return a - VecDouble{};
}

struct FloatPower {
  VecFloat coefficient[kPowerDegree + 1];
#if PYPRUNE_LANES == 8 || defined(__AVX2__)
  VecFloat low, high;
#else
  const float *low, *high;
#endif
};

struct Floats {
  using T = float;
  using V = VecFloat;
  using Power = FloatPower;
  using Sum = IntFloat;  // psi in whole units: exact, so in any order
  static constexpr int kLanes = kFloats;
  static constexpr bool kDivideOnce = false;  // measured: a quarter faster than one division and five products
  static constexpr Index kChannels = 64;      // between emptying the sums; at most kSsimExactChannels

  static PYPRUNE_INLINE V abs(V a) { return reinterpret_cast<V>(reinterpret_cast<IntFloat>(a) & 0x7fffffff); }
#if PYPRUNE_LANES == 8
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
  static PYPRUNE_INLINE Sum rounded(V a) { return reinterpret_cast<Sum>(_mm512_maskz_cvtps_epi32(0xffff, a)); }
  static PYPRUNE_INLINE V pick(V table, IntFloat i) {
    return _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(i), table);
  }
#elif defined(__AVX2__)
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static PYPRUNE_INLINE Sum rounded(V a) { return reinterpret_cast<Sum>(_mm256_cvtps_epi32(a)); }
  static PYPRUNE_INLINE V pick(V table, IntFloat i) {
    return _mm256_permutevar8x32_ps(table, reinterpret_cast<__m256i>(i));
  }
#else
  static PYPRUNE_INLINE V pick(const float* table, IntFloat i) {
    return V{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
  }
#if defined(__SSE2__)
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm_sqrt_ps(a); }
  static PYPRUNE_INLINE Sum rounded(V a) { return reinterpret_cast<Sum>(_mm_cvtps_epi32(a)); }
#elif defined(__aarch64__)
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static PYPRUNE_INLINE V sqrt(V a) { return vsqrtq_f32(a); }
  static PYPRUNE_INLINE Sum rounded(V a) { return reinterpret_cast<Sum>(vcvtnq_s32_f32(a)); }
#else
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static PYPRUNE_INLINE V sqrt(V a) {
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) a[l] = __builtin_sqrtf(a[l]);
    return a;
  }
  static PYPRUNE_INLINE Sum rounded(V a) { return __builtin_convertvector(a + 0.5f, Sum); }
#endif
#endif

  static PYPRUNE_INLINE Power load(const SsimPower& p) {
    Power power;
    PYPRUNE_UNROLL
    for (int j = 0; j <= kPowerDegree; ++j) power.coefficient[j] = broadcast(p.coefficient[j]);
#if PYPRUNE_LANES == 8
    power.low = _mm512_loadu_ps(p.low);
    power.high = _mm512_loadu_ps(p.high);
#elif defined(__AVX2__)
    power.low = _mm256_loadu_ps(p.low);
    power.high = _mm256_loadu_ps(p.high + 8);  // the shuffle looks at three bits only
#else
    power.low = p.low;
    power.high = p.high;
#endif
    return power;
  }

  static PYPRUNE_INLINE V power(V x, const Power& p) {
    const IntFloat bits = reinterpret_cast<IntFloat>(x), b = bits >> 23;
    const V t = reinterpret_cast<V>((bits & 0x007fffff) | 0x3f800000) - 1.5f;
    V sum = p.coefficient[kPowerDegree];
    PYPRUNE_UNROLL
    for (int j = kPowerDegree - 1; j >= 0; --j) sum = fma(sum, t, p.coefficient[j]);
#if PYPRUNE_LANES == 8 || defined(__AVX2__)
    return sum * (pick(p.low, b) * pick(p.high, bits >> 26));
#else
    return sum * (pick(p.low, b & 7) * pick(p.high, bits >> 26));
#endif
  }

  static PYPRUNE_INLINE void add(Sum& sum, V psi) { sum += rounded(psi); }
  static PYPRUNE_INLINE Sum begin(const double*) { return Sum{}; }
  static PYPRUNE_INLINE void end(Sum sum, double* sums) {
    for (int l = 0; l < kLanes; ++l) sums[l] += sum[l];
  }
};

// Float64 lanes: for float64 weights, and where float32 would not do. Exact to some 1e-15 instead of fast.
struct Doubles {
  using T = double;
  using V = VecDouble;
  using Power = double;
  using Sum = VecDouble;
  static constexpr int kLanes = kDoubles;
  static constexpr bool kDivideOnce = false;
  static constexpr Index kChannels = 64;

  static PYPRUNE_INLINE V abs(V a) { return reinterpret_cast<V>(reinterpret_cast<IntDouble>(a) & INT64_MAX); }
#if PYPRUNE_LANES == 8
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm512_maskz_sqrt_pd(0xff, a); }
#elif defined(__AVX2__)
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm256_sqrt_pd(a); }
#elif defined(__SSE2__)
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static PYPRUNE_INLINE V sqrt(V a) { return _mm_sqrt_pd(a); }
#else
  static PYPRUNE_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static PYPRUNE_INLINE V sqrt(V a) {
    PYPRUNE_UNROLL
    for (int l = 0; l < kLanes; ++l) a[l] = __builtin_sqrt(a[l]);
    return a;
  }
#endif
  static PYPRUNE_INLINE Power load(const SsimPower& p) { return p.a; }

  // log2(f 2^k) = k + 2 / ln 2 * atanh((f - 1) / (f + 1)), sqrt(1/2) <= f < sqrt(2).
  static PYPRUNE_INLINE V log2(V x) {
    const IntDouble shifted = reinterpret_cast<IntDouble>(x) - 0x3fe6a09e667f3bcd;  // less the bits of sqrt(1/2)
    const IntDouble k = (shifted >> 52);
    const V f = reinterpret_cast<V>(reinterpret_cast<IntDouble>(x) - (k << 52));
    const V magic = broadcast(6755399441055744.0);  // 1.5 * 2^52: small whole numbers are its last bits
    const V exponent = reinterpret_cast<V>(reinterpret_cast<IntDouble>(magic) + k) - magic;
    const V z = (f - 1.0) / (f + 1.0), w = z * z;
    V sum = broadcast(1.0 / 19);
    PYPRUNE_UNROLL
    for (int j = 17; j >= 1; j -= 2) sum = fma(sum, w, broadcast(1.0 / j));
    return fma(z * 2.8853900817779268, sum, exponent);
  }

  // 2^y for y <= 0, by the power series of e^(f ln 2), |f| <= 1/2.
  static PYPRUNE_INLINE V exp2(V y) {
    const V magic = broadcast(6755399441055744.0);
    y = y < -1000.0 ? broadcast(-1000.0) : y;
    const V shifted = y + magic, f = (y - (shifted - magic)) * 0.69314718055994531;
    constexpr double inverse[] = {
        1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
        1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
    V sum = broadcast(inverse[12]);
    PYPRUNE_UNROLL
    for (int j = 11; j >= 0; --j) sum = fma(sum, f, broadcast(inverse[j]));
    return reinterpret_cast<V>(reinterpret_cast<IntDouble>(sum) + (reinterpret_cast<IntDouble>(shifted) << 52));
  }

  static PYPRUNE_INLINE V power(V x, Power a) { return exp2(log2(x) * a); }
  // Channel after channel, however they are cut: the order shows in a sum that is rounded.
  typedef double Unaligned __attribute__((vector_size(8 * kDoubles), aligned(8), may_alias));
  static PYPRUNE_INLINE void add(Sum& sum, V psi) { sum += psi; }
  static PYPRUNE_INLINE Sum begin(const double* sums) { return *reinterpret_cast<const Unaligned*>(sums); }
  static PYPRUNE_INLINE void end(Sum sum, double* sums) { *reinterpret_cast<Unaligned*>(sums) = sum; }
};

// Phase 1: statistics in float64, lanes are filters.

PYPRUNE_INLINE VecDouble widen(const double* p) {
  return *reinterpret_cast<const VecDouble*>(p);
}
PYPRUNE_INLINE VecDouble widen_vector(VecDouble a) {
  return a;
}
PYPRUNE_INLINE VecDouble widen_vector(HalfFloat a) {
#if PYPRUNE_LANES == 8
  return _mm512_maskz_cvtps_pd(0xff, a);
#else
  return __builtin_convertvector(a, VecDouble);
#endif
}
PYPRUNE_INLINE VecDouble widen(const float* p) {
  return widen_vector(*reinterpret_cast<const HalfFloat*>(p));
}
PYPRUNE_INLINE void store(double* p, VecDouble a) {
  *reinterpret_cast<VecDouble*>(p) = a;
}
PYPRUNE_INLINE void store(float* p, VecDouble a) {
#if PYPRUNE_LANES == 8
  *reinterpret_cast<HalfFloat*>(p) = _mm512_maskz_cvtpd_ps(0xff, a);
#else
  *reinterpret_cast<HalfFloat*>(p) = __builtin_convertvector(a, HalfFloat);
#endif
}

// raw [K][kSsimBlock] to [K + kSsimRows][kSsimBlock]. kK: K where it is known, else 0.
template <int kK, class Raw, class T>
PYPRUNE_INLINE void prepare_slices(const Raw* raw, int given_K, const double (&scale)[2], double e, T* out) {
  const int K = kK ? kK : given_K;
  const double shrink = 1 / __builtin_sqrt(static_cast<double>(K));
  for (int l = 0; l < kSsimBlock; l += kDoubles) {
    const auto value = [&](int k) PYPRUNE_ALWAYS {
      const VecDouble a = widen(raw + k * kSsimBlock + l);
      if constexpr (std::is_same_v<Raw, float>) return a * (scale[0] * scale[1]);
      return a * scale[0] * scale[1];
    };
    const VecDouble first = value(0);
    VecDouble shifted[kK ? kK : 1], sum = {}, square = {};
    PYPRUNE_UNROLL
    for (int k = 1; k < K; ++k) {
      const VecDouble a = value(k) - first;
      if constexpr (kK != 0) shifted[k] = a;
      sum += a;
    }
    const VecDouble shift = sum / static_cast<double>(K), mean = first + shift;
    PYPRUNE_UNROLL
    for (int k = 0; k < K; ++k) {
      VecDouble c = -shift;
      if constexpr (kK != 0) {
        if (k > 0) c = shifted[k] - shift;
      } else {
        c = (value(k) - first) - shift;
      }
      c *= shrink;
      square += c * c;  // not fused: the same bits for all variants
      store(out + k * kSsimBlock + l, c);
    }
    T* rows = out + K * kSsimBlock + l;
    store(rows + kSsimM * kSsimBlock, Doubles::abs(mean) * 1.4142135623730951);
    store(rows + kSsimQ * kSsimBlock, mean * mean + 0.5 * e);
    store(rows + kSsimS * kSsimBlock, Doubles::sqrt(square));
    store(rows + kSsimR * kSsimBlock, square + 0.5 * e);
  }
}

template <class Source>
struct RawOf {
  using Type = float;
};
template <>
struct RawOf<double> {
  using Type = double;
};

// Lower (half = 0) or upper half of a and b, interleaved.
template <int half>
PYPRUNE_INLINE VecFloat interleave(VecFloat a, VecFloat b) {
  constexpr int o = half * kFloats / 2, n = kFloats;
#if PYPRUNE_LANES == 2
  constexpr IntFloat pick = {o, o + n, o + 1, o + 1 + n};
#elif PYPRUNE_LANES == 4
  constexpr IntFloat pick = {o, o + n, o + 1, o + 1 + n, o + 2, o + 2 + n, o + 3, o + 3 + n};
#else
  constexpr IntFloat pick = {o,     o + n,     o + 1, o + 1 + n, o + 2, o + 2 + n, o + 3, o + 3 + n,
                             o + 4, o + 4 + n, o + 5, o + 5 + n, o + 6, o + 6 + n, o + 7, o + 7 + n};
#endif
#ifdef __clang__
  VecFloat both;
  PYPRUNE_UNROLL
  for (int l = 0; l < kFloats; ++l) both[l] = pick[l] < n ? a[pick[l]] : b[pick[l] - n];
  return both;
#else
  return __builtin_shuffle(a, b, pick);
#endif
}

// Transposes a square of kFloats numbers of kFloats filters: each round is one perfect shuffle.
PYPRUNE_INLINE void transpose(VecFloat (&v)[kFloats]) {
  PYPRUNE_UNROLL
  for (int round = 1; round < kFloats; round *= 2) {
    VecFloat w[kFloats];
    PYPRUNE_UNROLL
    for (int i = 0; i < kFloats / 2; ++i) {
      w[2 * i] = interleave<0>(v[i], v[i + kFloats / 2]);
      w[2 * i + 1] = interleave<1>(v[i], v[i + kFloats / 2]);
    }
    PYPRUNE_UNROLL
    for (int i = 0; i < kFloats; ++i) v[i] = w[i];
  }
}

// Runs of adjacent weights, one of each filter, to raw [count][kSsimBlock].
void gather_runs(const float* const* runs, Index count, float* raw) {
  typedef float Unaligned __attribute__((vector_size(4 * kFloats), aligned(4), may_alias));
  Index k = 0;
  for (; k + kFloats <= count; k += kFloats) {
    for (int group = 0; group < kSsimBlock; group += kFloats) {
      VecFloat v[kFloats];
      PYPRUNE_UNROLL
      for (int l = 0; l < kFloats; ++l) v[l] = *reinterpret_cast<const Unaligned*>(runs[group + l] + k);
      transpose(v);
      PYPRUNE_UNROLL
      for (int l = 0; l < kFloats; ++l) *reinterpret_cast<VecFloat*>(raw + (k + l) * kSsimBlock + group) = v[l];
    }
  }
  for (; k < count; ++k) {
    for (int l = 0; l < kSsimBlock; ++l) raw[k * kSsimBlock + l] = runs[l][k];
  }
}

// Channels [first, last) of kSsimBlock filters to raw [channel][K][kSsimBlock].
template <class Source, class Raw>
void gather(const SsimWeights& w, const Index* filters, Index first, Index last, Raw* raw) {
  const Index K = w.K1 * w.K2;
  const Source* start[kSsimBlock];
  for (int l = 0; l < kSsimBlock; ++l) {
    start[l] = static_cast<const Source*>(w.data) + filters[l] * w.stride_f2 + first * w.stride_f1;
  }
  if constexpr (std::is_same_v<Source, float>) {
    if (w.stride_f1 == K && w.stride_k2 == 1 && w.stride_k1 == w.K2) {
      return gather_runs(start, (last - first) * K, raw);
    }
  }
  for (Index c = 0; c < last - first; ++c, raw += K * kSsimBlock) {
    for (int l = 0; l < kSsimBlock; ++l) {
      const Source* slice = start[l] + c * w.stride_f1;
      Raw* to = raw + l;
      for (Index i = 0; i < w.K1; ++i) {
        for (Index j = 0; j < w.K2; ++j, to += kSsimBlock) {
          *to = static_cast<Raw>(value_of(slice[i * w.stride_k1 + j * w.stride_k2]));
        }
      }
    }
  }
}

// A few channels at a time: vectors read too soon after the single numbers were written would have to wait for them.
template <class Source, class T>
void prepare_block(const SsimWeights& w, const SsimPlan& plan, const Index* filters, Index first, Index last,
                   double* scratch, T* block) {
  using Raw = typename RawOf<Source>::Type;
  const int K = static_cast<int>(w.K1 * w.K2);
  const Index some = ssim_gathered(K);
  const double e = plan.formula.e;
  Raw* raw = reinterpret_cast<Raw*>(scratch);
  for (Index start = first; start < last; start += some) {
    const Index stop = start + some < last ? start + some : last;
    gather<Source>(w, filters, start, stop, raw);
    const Raw* slices = raw;
    for (Index c = start; c < stop; ++c, slices += K * kSsimBlock, block += (K + kSsimRows) * kSsimBlock) {
      if (K == 9) {
        prepare_slices<9>(slices, K, plan.scale, e, block);
      } else {
        prepare_slices<0>(slices, K, plan.scale, e, block);
      }
    }
  }
}

template <class Source>
void prepare_from(const SsimWeights& w, const SsimPlan& plan, const Index* filters, Index first, Index last,
                  double* scratch, void* block) {
  if (plan.wide) {
    prepare_block<Source>(w, plan, filters, first, last, scratch, static_cast<double*>(block));
  } else {
    prepare_block<Source>(w, plan, filters, first, last, scratch, static_cast<float*>(block));
  }
}

void prepare(const SsimWeights& w, const SsimPlan& plan, const Index* filters, Index first, Index last, double* scratch,
             void* block) {
  switch (w.element) {
    case Element::float32:
      return prepare_from<float>(w, plan, filters, first, last, scratch, block);
    case Element::float64:
      return prepare_from<double>(w, plan, filters, first, last, scratch, block);
    case Element::float16:
      return prepare_from<Float16>(w, plan, filters, first, last, scratch, block);
    case Element::bfloat16:
      return prepare_from<BFloat16>(w, plan, filters, first, last, scratch, block);
  }
}

// The bits of a number without its sign: they grow with it, and those of infinity and NaN are the largest.
PYPRUNE_INLINE std::int64_t magnitude(double a) {
  std::int64_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits & INT64_MAX;
}

// Sixteen sums whatever the instruction set, so that it does not show in the result.
struct Scan {
  double square[16];
  std::int64_t largest;

  SsimScan result(Index not_finite) const {
    double sums[16];
    for (int l = 0; l < 16; ++l) sums[l] = square[l];
    for (int half = 8; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    double top;
    __builtin_memcpy(&top, &largest, sizeof top);
    return {top, sums[0], not_finite};
  }
};

// A dense filter, as a run of so many numbers.
template <class Source>
Scan scan_run(const Source* run, Index count, double scale) {
  using Raw = typename RawOf<Source>::Type;
  constexpr int kVectors = 16 / kDoubles;
  VecDouble square[kVectors] = {};
  IntDouble largest[kVectors] = {};
  const auto take = [&](const Raw* raw) PYPRUNE_ALWAYS {
    PYPRUNE_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      typedef Raw Unaligned __attribute__((vector_size(sizeof(Raw) * kDoubles), aligned(sizeof(Raw)), may_alias));
      const VecDouble a = widen_vector(*reinterpret_cast<const Unaligned*>(raw + v * kDoubles));
      const IntDouble bits = reinterpret_cast<IntDouble>(a) & INT64_MAX;
      const VecDouble scaled = a * scale;
      largest[v] = bits > largest[v] ? bits : largest[v];
      square[v] += scaled * scaled;
    }
  };
  Index n = 0;
  if constexpr (std::is_same_v<Source, Raw>) {
    for (; n + 16 <= count; n += 16) take(run + n);
  }
  for (; n < count; n += 16) {
    Raw raw[16] = {};
    for (Index l = 0; l < 16 && n + l < count; ++l) raw[l] = static_cast<Raw>(value_of(run[n + l]));
    take(raw);
  }
  Scan scan{};
  for (int l = 0; l < 16; ++l) {
    scan.square[l] = square[l / kDoubles][l % kDoubles];
    const std::int64_t bits = largest[l / kDoubles][l % kDoubles];
    scan.largest = bits > scan.largest ? bits : scan.largest;
  }
  return scan;
}

template <class Source, class Visitor>
void for_each_weight(const SsimWeights& w, const Source* filter, const Visitor& visit) {
  for (Index c = 0; c < w.F1; ++c) {
    for (Index i = 0; i < w.K1; ++i) {
      for (Index j = 0; j < w.K2; ++j) {
        visit(value_of(filter[c * w.stride_f1 + i * w.stride_k1 + j * w.stride_k2]));
      }
    }
  }
}

// Whether a filter's weights lie side by side, in whatever order: contiguous, or channels last.
bool dense(const SsimWeights& w) {
  const Index K = w.K1 * w.K2;
  return (w.stride_k2 == 1 && w.stride_k1 == w.K2 && w.stride_f1 == K) ||
         (w.stride_f1 == 1 && w.stride_k2 == w.F1 && w.stride_k1 == w.K2 * w.F1);
}

template <class Source>
SsimScan scan_filter(const SsimWeights& w, const Source* filter, double scale) {
  Scan scan{};
  if (dense(w)) {
    scan = scan_run(filter, w.F1 * w.K1 * w.K2, scale);
  } else {
    int l = 0;
    for_each_weight(w, filter, [&](double a) {
      const std::int64_t bits = magnitude(a);
      scan.largest = bits > scan.largest ? bits : scan.largest;
      scan.square[l] += (a * scale) * (a * scale);
      l = (l + 1) % 16;
    });
  }
  constexpr std::int64_t kInfinity = 0x7ff0000000000000;
  Index not_finite = 0;
  if (scan.largest >= kInfinity) {
    for_each_weight(w, filter, [&](double a) { not_finite += magnitude(a) >= kInfinity; });
  }
  return scan.result(not_finite);
}

SsimScan scan(const SsimWeights& w, Index filter, double scale) {
  const void* start = static_cast<const char*>(w.data) + filter * w.stride_f2 * bytes_of(w.element);
  switch (w.element) {
    case Element::float32:
      return scan_filter(w, static_cast<const float*>(start), scale);
    case Element::float64:
      return scan_filter(w, static_cast<const double*>(start), scale);
    case Element::float16:
      return scan_filter(w, static_cast<const Float16*>(start), scale);
    case Element::bfloat16:
      return scan_filter(w, static_cast<const BFloat16*>(start), scale);
  }
  return {0, 0, 0};
}

// Phase 2: psi of all pairs of two blocks. One filter of x is held against a vector of filters of y; psi adds up in
// memory, which stays in the first-level cache, because that leaves the registers to y and the polynomial.

template <class Ops>
PYPRUNE_INLINE typename Ops::V at(const typename Ops::T* p) {
  return *reinterpret_cast<const typename Ops::V*>(p);
}

template <class Ops, class Load>
PYPRUNE_INLINE SliceNumbers<typename Ops::V> numbers(const Load& load, int K) {
  return {load(K + kSsimM), load(K + kSsimQ), load(K + kSsimS), load(K + kSsimR)};
}

template <class Ops>
struct Formula {
  SsimTerms<Ops> terms;
  typename Ops::Power alpha, beta, gamma;

  explicit Formula(const SsimFormula& f)
      : terms{broadcast(static_cast<typename Ops::T>(f.e)), broadcast(static_cast<typename Ops::T>(f.unit))},
        alpha(Ops::load(f.alpha)),
        beta(Ops::load(f.beta)),
        gamma(Ops::load(f.gamma)) {}
};

// sxy: not looked at for K = 1.
template <class Ops, int kK, SsimForm form, class X, class Y>
PYPRUNE_INLINE typename Ops::V psi_of(const X& x, const Y& y, int K, typename Ops::V sxy, const Formula<Ops>& f) {
  const SliceNumbers<typename Ops::V> nx = numbers<Ops>(x, K), ny = numbers<Ops>(y, K);
  if constexpr (kK == 1) {
    return ssim_psi_of_points<Ops, form>(nx, ny, f.terms, f.alpha);
  } else {
    return ssim_psi<Ops, form>(nx, ny, sxy, f.terms, f.alpha, f.beta, f.gamma);
  }
}

template <class Ops, int kK, SsimForm form, class X, class Y>
PYPRUNE_INLINE typename Ops::V psi_of(const X& x, const Y& y, int K, const Formula<Ops>& f) {
  if constexpr (kK == 1) return psi_of<Ops, kK, form>(x, y, K, typename Ops::V{}, f);
  return psi_of<Ops, kK, form>(x, y, K, ssim_covariance<Ops>(x, y, K), f);
}

// ssim_covariance of some filters of x with the same vector of y, which is read once for all.
template <class Ops, int kFilters, class Y>
PYPRUNE_INLINE void covariances(const typename Ops::T* x, const Y& y, int K, typename Ops::V* sums) {
  using V = typename Ops::V;
  const auto one = [&](int i, int k) PYPRUNE_ALWAYS { return broadcast(x[k * kSsimBlock + i]); };
  const int head = ssim_head(K);
  V held[9];
  held[0] = y(0);
  PYPRUNE_UNROLL
  for (int i = 0; i < kFilters; ++i) sums[i] = one(i, 0) * held[0];
  for (int k = 1; k < head; ++k) {
    held[0] = y(k);
    PYPRUNE_UNROLL
    for (int i = 0; i < kFilters; ++i) sums[i] = Ops::fma(one(i, k), held[0], sums[i]);
  }
  for (int k = head; k < K; k += 9) {
    PYPRUNE_UNROLL
    for (int n = 0; n < 9; ++n) held[n] = y(k + n);
    PYPRUNE_UNROLL
    for (int i = 0; i < kFilters; ++i) {
      const auto from_x = [&](int n) PYPRUNE_ALWAYS { return one(i, k + n); };
      const auto from_y = [&](int n) PYPRUNE_ALWAYS { return held[n]; };
      sums[i] = sums[i] + ssim_nine<Ops>(from_x, from_y, 0);
    }
  }
}

template <class Ops, int kK, SsimForm form>
void all_pairs(const SsimFormula& formula, int given_K, Index channels, const typename Ops::T* x,
               const typename Ops::T* y, double* sums) {
  using T = typename Ops::T;
  const int K = kK ? kK : given_K;
  const Index step = (K + kSsimRows) * kSsimBlock;
  constexpr int kVectors = kSsimBlock / Ops::kLanes;
  const Formula<Ops> f(formula);
  for (Index start = 0; start < channels; start += Ops::kChannels) {
    const Index stop = start + Ops::kChannels < channels ? start + Ops::kChannels : channels;
    typename Ops::Sum sum[kSsimBlock][kVectors];
    for (int i = 0; i < kSsimBlock; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Ops::begin(sums + i * kSsimBlock + v * Ops::kLanes);
    }
    for (Index c = start; c < stop; ++c, x += step, y += step) {
      for (int v = 0; v < kVectors; ++v) {
        const T* lanes = y + v * Ops::kLanes;
        if constexpr (kK != 0) {
          typename Ops::V held[kK + kSsimRows];
          PYPRUNE_UNROLL
          for (int k = 0; k < kK + kSsimRows; ++k) held[k] = at<Ops>(lanes + k * kSsimBlock);
          const auto from_y = [&](int k) PYPRUNE_ALWAYS { return held[k]; };
          for (int i = 0; i < kSsimBlock; ++i) {
            const auto from_x = [&](int k) PYPRUNE_ALWAYS { return broadcast(x[k * kSsimBlock + i]); };
            Ops::add(sum[i][v], psi_of<Ops, kK, form>(from_x, from_y, K, f));
          }
        } else {
          constexpr int kFilters = 4;
          const auto from_y = [&](int k) PYPRUNE_ALWAYS { return at<Ops>(lanes + k * kSsimBlock); };
          for (int start_i = 0; start_i < kSsimBlock; start_i += kFilters) {
            typename Ops::V sxy[kFilters];
            covariances<Ops, kFilters>(x + start_i, from_y, K, sxy);
            PYPRUNE_UNROLL
            for (int i = 0; i < kFilters; ++i) {
              const auto from_x = [&](int k) PYPRUNE_ALWAYS { return broadcast(x[k * kSsimBlock + start_i + i]); };
              Ops::add(sum[start_i + i][v], psi_of<Ops, kK, form>(from_x, from_y, K, sxy[i], f));
            }
          }
        }
      }
    }
    for (int i = 0; i < kSsimBlock; ++i) {
      for (int v = 0; v < kVectors; ++v) Ops::end(sum[i][v], sums + i * kSsimBlock + v * Ops::kLanes);
    }
  }
}

template <class Ops, int kK, SsimForm form>
void each_pair(const SsimFormula& formula, int given_K, Index channels, const typename Ops::T* x,
               const typename Ops::T* y, double* sums) {
  const int K = kK ? kK : given_K;
  const Index step = (K + kSsimRows) * kSsimBlock;
  constexpr int kVectors = kSsimBlock / Ops::kLanes;
  const Formula<Ops> f(formula);
  for (Index start = 0; start < channels; start += Ops::kChannels) {
    const Index stop = start + Ops::kChannels < channels ? start + Ops::kChannels : channels;
    typename Ops::Sum sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = Ops::begin(sums + v * Ops::kLanes);
    for (Index c = start; c < stop; ++c, x += step, y += step) {
      for (int v = 0; v < kVectors; ++v) {
        const auto from_x = [&](int k) PYPRUNE_ALWAYS { return at<Ops>(x + v * Ops::kLanes + k * kSsimBlock); };
        const auto from_y = [&](int k) PYPRUNE_ALWAYS { return at<Ops>(y + v * Ops::kLanes + k * kSsimBlock); };
        Ops::add(sum[v], psi_of<Ops, kK, form>(from_x, from_y, K, f));
      }
    }
    for (int v = 0; v < kVectors; ++v) Ops::end(sum[v], sums + v * Ops::kLanes);
  }
}

struct All {
  template <class Ops, int kK, SsimForm form, class... Args>
  static void run(const Args&... args) {
    all_pairs<Ops, kK, form>(args...);
  }
};
struct Each {
  template <class Ops, int kK, SsimForm form, class... Args>
  static void run(const Args&... args) {
    each_pair<Ops, kK, form>(args...);
  }
};

template <class Which, class Ops, int kK>
void with_form(const SsimFormula& f, int K, Index channels, const void* x, const void* y, double* sums) {
  const auto *a = static_cast<const typename Ops::T*>(x), *b = static_cast<const typename Ops::T*>(y);
  switch (f.form) {
    case SsimForm::alpha_zero:
      return Which::template run<Ops, kK, SsimForm::alpha_zero>(f, K, channels, a, b, sums);
    case SsimForm::alpha_half:
      return Which::template run<Ops, kK, SsimForm::alpha_half>(f, K, channels, a, b, sums);
    case SsimForm::alpha_one:
      return Which::template run<Ops, kK, SsimForm::alpha_one>(f, K, channels, a, b, sums);
    case SsimForm::alpha_power:
      return Which::template run<Ops, kK, SsimForm::alpha_power>(f, K, channels, a, b, sums);
    case SsimForm::all_powers:
      return Which::template run<Ops, kK, kK == 1 ? SsimForm::alpha_power : SsimForm::all_powers>(f, K, channels, a, b,
                                                                                                  sums);
  }
}

template <class Which, class Ops>
void with_size(const SsimFormula& f, int K, Index channels, const void* x, const void* y, double* sums) {
  if (K == 1) return with_form<Which, Ops, 1>(f, K, channels, x, y, sums);
  if (K == 9) return with_form<Which, Ops, 9>(f, K, channels, x, y, sums);
  return with_form<Which, Ops, 0>(f, K, channels, x, y, sums);
}

void all(const SsimPlan& plan, int K, Index channels, const void* x, const void* y, double* sums) {
  if (plan.wide) return with_size<All, Doubles>(plan.formula, K, channels, x, y, sums);
  return with_size<All, Floats>(plan.formula, K, channels, x, y, sums);
}

void each(const SsimPlan& plan, int K, Index channels, const void* x, const void* y, double* sums) {
  if (plan.wide) return with_size<Each, Doubles>(plan.formula, K, channels, x, y, sums);
  return with_size<Each, Floats>(plan.formula, K, channels, x, y, sums);
}

}  // namespace
}  // namespace pyprune
