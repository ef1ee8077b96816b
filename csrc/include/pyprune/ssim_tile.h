// Kernel SSIM on a GPU, seen so that the same code runs on the host: three kernels of phases, each(f) as in team.h.
//
//   scan      parts of a layer: its largest weight, sum of squares, and weights that are not finite
//   prepare   every slice becomes a row of numbers: K centred values, zeros, m, s (ssim_math.h)
//   tile      Psi of kSide x kSide pairs of filters over a run of channels; the last run of a tile to end delivers
//
// Psi adds up in whole units, so that sums are exact: no order of threads, blocks or atomics changes a bit of any
// result. Many layers make one launch; a layer is an item of a small table among the kernel's parameters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/ssim_cuda.h"
#include "pyprune/ssim_math.h"
#include "pyprune/team.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

namespace pyprune {

namespace {

// What is one instruction on a GPU and not on a host.

#if defined(__CUDACC__)

PYPRUNE_TEAM void copy_16(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
PYPRUNE_TEAM void end_of_stage() {
  __pipeline_commit();
}
PYPRUNE_TEAM void wait_for_stage_before_last() {
  __pipeline_wait_prior(1);
}
template <class N>
PYPRUNE_TEAM N add_to(N* counter, N value) {
  return atomicAdd(counter, value);
}
PYPRUNE_TEAM void raise_to(Counter* counter, Counter value) {
  atomicMax(counter, value);
}
PYPRUNE_TEAM void publish() {
  __threadfence();
}
template <class N>
PYPRUNE_TEAM N read_published(const N* from) {
  return __ldcg(from);
}
PYPRUNE_TEAM float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYPRUNE_TEAM float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYPRUNE_TEAM float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

inline void copy_16(void* shared, const void* global) {
  std::memcpy(shared, global, 16);
}
inline void end_of_stage() {}
inline void wait_for_stage_before_last() {}
template <class N>
inline N add_to(N* counter, N value) {
  const N before = *counter;
  *counter += value;
  return before;
}
inline void raise_to(Counter* counter, Counter value) {
  if (*counter < value) *counter = value;
}
inline void publish() {}
template <class N>
inline N read_published(const N* from) {
  return *from;
}

// The three functions that a GPU approximates in one instruction. ssim_worst = -1 or 1 moves their results as far as
// NVIDIA's bounds allow (one unit in the last place; 2^-22; two units), to show that the gate holds for any GPU.
thread_local int ssim_worst = 0;

inline float reciprocal(float x) {
  return (1 / x) * (1 + static_cast<float>(ssim_worst) * 0x1p-23f);
}
inline float log2_of(float x) {
  const float y = std::log2(x), off = 0x1p-22f * static_cast<float>(ssim_worst);
  return y + (y < -1 ? -y * off : off);
}
inline float exp2_of(float x) {
  return std::exp2(x) * (1 + static_cast<float>(ssim_worst) * 0x1p-22f);
}

#endif

PYPRUNE_TEAM float multiply_add(float a, float b, float c) {
  return ::fmaf(a, b, c);
}

// Numbers of ssim_math.h. Two divisions in one reciprocal and a power in two more leave a GPU's special function unit,
// an eighth as fast as its multiply-adds, just not the bottleneck.
struct TileFloat {
  struct V {
    float v;
  };
  struct Power {
    float a;
  };
  using Number = float;
  static constexpr bool kDivideOnce = true;
  static PYPRUNE_TEAM V one() { return {1}; }
  static PYPRUNE_TEAM V fma(V a, V b, V c) { return {multiply_add(a.v, b.v, c.v)}; }
  static PYPRUNE_TEAM V abs(V a) { return {::fabsf(a.v)}; }
  static PYPRUNE_TEAM V power(V x, Power p) { return {exp2_of(p.a * log2_of(x.v))}; }
};
PYPRUNE_TEAM TileFloat::V operator+(TileFloat::V a, TileFloat::V b) {
  return {a.v + b.v};
}
PYPRUNE_TEAM TileFloat::V operator*(TileFloat::V a, TileFloat::V b) {
  return {a.v * b.v};
}
PYPRUNE_TEAM TileFloat::V operator/(TileFloat::V, TileFloat::V b) {
  return {reciprocal(b.v)};  // all that is divided is one
}

struct Exponents {
  double alpha, beta, gamma;
};

// Psi of one pair of slices in whole units, and what a sum of `count` of them starts at.
PYPRUNE_TEAM SliceNumbers<TileFloat::V> slice_numbers(float m, float s, float half_e) {
  return {{m}, {multiply_add(0.5f * m, m, half_e)}, {s}, {multiply_add(s, s, half_e)}};
}
PYPRUNE_TEAM std::uint32_t psi_units(const SliceNumbers<TileFloat::V>& x, const SliceNumbers<TileFloat::V>& y,
                                     TileFloat::V sxy, float e, const Exponents& exponents) {
  const TileFloat::Power alpha = {static_cast<float>(exponents.alpha)};
  const SsimTerms<TileFloat> terms = {{e}, {1}};
  // In 1 + psi the last bit is worth 2^-23: its bits, as a number, count units above those of 1.
  return bits_of(1 + ssim_psi<TileFloat, SsimForm::alpha_power>(x, y, sxy, terms, alpha, alpha, alpha).v);
}
PYPRUNE_TEAM std::uint32_t sum_of_none(std::uint32_t, int count) {
  return 0u - static_cast<std::uint32_t>(count) * 0x3f800000u;
}

// Float64 forms no products of e, which may be 2^-600, and takes any exponents.
PYPRUNE_TEAM SliceNumbers<double> slice_numbers(double m, double s, double half_e) {
  return {m, multiply_add(0.5 * m, m, half_e), s, multiply_add(s, s, half_e)};
}
PYPRUNE_TEAM std::int64_t psi_units(const SliceNumbers<double>& x, const SliceNumbers<double>& y, double sxy, double e,
                                    const Exponents& exponents) {
  const double below = multiply_add(x.s, y.s, e);
  const double L = multiply_add(x.m, y.m, e) / (x.q + y.q), C = multiply_add(x.s, y.s, below) / (x.r + y.r);
  const double S = (::fabs(sxy) + e) / below;
  const double psi = ::pow(L, exponents.alpha) * ::pow(C, exponents.beta) * ::pow(S, exponents.gamma);
  return static_cast<std::int64_t>(::rint(psi * kSsimWideUnit));
}
PYPRUNE_TEAM std::int64_t sum_of_none(std::int64_t, int) {
  return 0;
}

// Psi of a pair of filters from its sum over all channels.
template <class T>
PYPRUNE_TEAM float psi_of_sum(double sum, int F1) {
  const double unit = sizeof(T) == sizeof(float) ? kSsimFloatUnit : kSsimWideUnit;
  const double psi = sum / (unit * F1);
  return static_cast<float>(psi < 1 ? psi : 1);
}

template <class T>
struct alignas(16) Vector {
  T v[16 / sizeof(T)];
};

template <class T>
PYPRUNE_TEAM T* scratch_at(const SsimItem& item, std::size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(item.scratch) + offset);
}
PYPRUNE_TEAM SsimHead* ssim_head_of(const SsimItem& item) {
  return scratch_at<SsimHead>(item, 0);
}
PYPRUNE_TEAM SsimPart* ssim_parts_of(const SsimItem& item) {
  return scratch_at<SsimPart>(item, SsimLayout<float>::aligned(sizeof(SsimHead)));
}

// f(pointer to the weights in their own type)
template <class F>
PYPRUNE_TEAM void with_weights(const SsimItem& item, const F& f) {
  if (item.float64) {
    f(static_cast<const double*>(item.weights));
  } else {
    f(static_cast<const float*>(item.weights));
  }
}

// The two factors that multiply by 2^exponent, however large.
struct TwoPowers {
  double one, other;
};
PYPRUNE_TEAM TwoPowers powers_of_two(int exponent) {
  return {::ldexp(1.0, exponent / 2), ::ldexp(1.0, exponent - exponent / 2)};
}
// The exponent x with largest / 2^x in [1/2, 1); of zero and of what is not finite, 0.
PYPRUNE_TEAM int exponent_above(double largest) {
  int exponent = 0;
  if (largest > 0 && largest <= 1.7976931348623157e308) ::frexp(largest, &exponent);
  return exponent;
}

// Scan.

template <class Team>
PYPRUNE_TEAM void ssim_scan(const Team& team, const SsimItem& item, std::int64_t part) {
  const std::int64_t count = ssim_weights(item), size = divide_up(count, ssim_parts(item));
  const std::int64_t begin = part * size, end = begin + size < count ? begin + size : count;
  with_weights(item, [&](const auto* weights) {
    const double largest = team.max([&](int t) {
      double top = 0;
      for (std::int64_t i = begin + t; i < end; i += kSsimThreads) {
        const double w = static_cast<double>(weights[i]);
        top = larger(top, ::fabs(w));
      }
      return top;
    });
    const TwoPowers shrink = powers_of_two(-exponent_above(largest));
    const Pair sums = team.sum([&](int t) {
      Pair sum = {0, 0};
      for (std::int64_t i = begin + t; i < end; i += kSsimThreads) {
        const double w = static_cast<double>(weights[i]), scaled = w * shrink.one * shrink.other;
        sum.a = multiply_add(scaled, scaled, sum.a);
        sum.b += ::fabs(w) <= 1.7976931348623157e308 ? 0 : 1;
      }
      return sum;
    });
    team.each([&](int t) {
      if (t == 0) ssim_parts_of(item)[part] = {largest, sums.a, static_cast<std::int64_t>(sums.b)};
    });
  });
}

// Prepare.

// Every block works this out for itself from the parts: the same numbers in the same order.
template <class Team>
PYPRUNE_TEAM SsimHead ssim_decide(const Team& team, const SsimItem& item) {
  const SsimPart* const parts = ssim_parts_of(item);
  const int count = static_cast<int>(ssim_parts(item));
  const double largest = team.max([&](int t) { return t < count ? parts[t].largest : 0; });
  const int exponent = exponent_above(largest);
  const Pair sums = team.sum([&](int t) {
    if (t >= count) return Pair{0, 0};
    const int shift = 2 * (exponent_above(parts[t].largest) - exponent);
    return Pair{::ldexp(parts[t].sum_of_squares, shift), static_cast<double>(parts[t].not_finite)};
  });
  double e =
      item.absolute ? ::ldexp(item.eps, -2 * exponent) : item.eps * (sums.a / static_cast<double>(ssim_weights(item)));
  // Of zeros all slices are alike; what is not finite has no e, and its scratch may be too small for float64.
  e = largest == 0 || sums.b > 0 ? 1 : e < 0x1p-600 ? 0x1p-600 : e > 0x1p200 ? 0x1p200 : e;
  const bool wide = !(item.may_float && e >= kSsimLeastFloat && e <= kSsimMostFloat);
  const int grow = wide ? 0 : e > 1 ? 20 - (::ilogb(e) + 1) / 2 : 20;
  const TwoPowers scale = powers_of_two(grow - exponent);
  return {{scale.one, scale.other}, ::ldexp(e, 2 * grow), static_cast<std::int64_t>(sums.b), wide};
}

template <class T, int kK, class W>
PYPRUNE_TEAM void prepare_slice(const W* slice, int given_K, const SsimHead& head, int vectors, Vector<T>* row) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kHeld = kK ? kK : 1;
  const int K = kK ? kK : given_K, numbers = vectors * kVector;
  double held[kHeld];
  if (kK != 0) {
    PYPRUNE_UNROLL_ALL
    for (int k = 0; k < kHeld; ++k) held[k] = static_cast<double>(slice[k]) * head.scale[0] * head.scale[1];
  }
  const auto weight = [&](int k) {
    return kK != 0 ? held[k % kHeld] : static_cast<double>(slice[k]) * head.scale[0] * head.scale[1];
  };
  // Less the first weight, a constant slice is exactly zero.
  const double first = weight(0), shrink = 1 / ::sqrt(static_cast<double>(K));
  double sum = 0, square = 0;
  PYPRUNE_UNROLL_ALL
  for (int k = 1; k < K; ++k) sum += weight(k) - first;
  const double shift = sum / K;
  const auto number = [&](int n) -> T {
    if (n == numbers - 2) return static_cast<T>(::fabs(first + shift) * 1.4142135623730951);
    if (n == numbers - 1) return static_cast<T>(root(square));
    if (n >= K) return 0;
    const double c = ((weight(n) - first) - shift) * shrink;
    square = multiply_add(c, c, square);
    return static_cast<T>(c);
  };
  PYPRUNE_UNROLL_ALL
  for (int v = 0; v < vectors; ++v) {
    Vector<T> out;
    PYPRUNE_UNROLL_ALL
    for (int n = 0; n < kVector; ++n) out.v[n] = number(v * kVector + n);
    row[v] = out;
  }
}

// Neighbouring threads take eight channels of four filters: runs of memory on both sides.
template <class T, int kK>
PYPRUNE_TEAM void prepare_slices(const SsimItem& item, const SsimHead& head, std::int64_t block, int t) {
  const SsimLayout<T> layout(item);
  const std::int64_t across = divide_up(item.F2, kSsimSliceF2);
  const int c = static_cast<int>(block / across) * kSsimSliceF1 + t / 32 * 8 + t % 8;
  T* const rows = scratch_at<T>(item, layout.rows);
  for (int f = static_cast<int>(block % across) * kSsimSliceF2 + t % 32 / 8, q = 0; q < kSsimSliceF2 / 4; ++q, f += 4) {
    if (f >= item.F2 || c >= item.F1) continue;
    const std::int64_t slice = static_cast<std::int64_t>(f) * item.F1 + c;
    T* const row = rows + (static_cast<std::int64_t>(c) * item.F2 + f) * layout.numbers;
    with_weights(item, [&](const auto* weights) {
      const int vectors = kK == 9 ? 3 : layout.numbers / SsimLayout<T>::kVector;
      prepare_slice<T, kK>(weights + slice * item.K, item.K, head, vectors, reinterpret_cast<Vector<T>*>(row));
    });
  }
  unsigned* const arrivals = scratch_at<unsigned>(item, layout.arrivals);
  const std::int64_t threads = ssim_slice_blocks(item) * kSsimThreads;
  for (std::int64_t tile = block * kSsimThreads + t; tile < layout.tiles; tile += threads) arrivals[tile] = 0;
}

template <class Team>
PYPRUNE_TEAM void ssim_prepare(const Team& team, const SsimItem& item, std::int64_t block, Counter* not_finite) {
  const SsimHead head = ssim_decide(team, item);
  team.each([&](int t) {
    if (block == 0 && t == 0) {
      *ssim_head_of(item) = head;
      if (head.not_finite > 0 && not_finite) add_to(not_finite, static_cast<Counter>(head.not_finite));
    }
    if (head.wide) {
      prepare_slices<double, 0>(item, head, block, t);
    } else if (item.K == 9) {
      prepare_slices<float, 9>(item, head, block, t);
    } else {
      prepare_slices<float, 0>(item, head, block, t);
    }
  });
}

// Deliver.

PYPRUNE_TEAM Counter nearest_key(float psi, int partner) {
  return static_cast<Counter>(bits_of(psi)) << 32 | static_cast<std::uint32_t>(~partner);
}
PYPRUNE_TEAM int bin_of(float psi, int bins) {
  const std::int64_t bin = static_cast<std::int64_t>(static_cast<double>(psi) * bins);
  return bin < bins ? static_cast<int>(bin) : bins - 1;
}
PYPRUNE_TEAM Counter fixed_point(float psi, int shift) {
  return static_cast<Counter>(::rint(::ldexp(static_cast<double>(psi), shift)));
}

template <class T>
struct TileOwn {
  static constexpr int kPairs = SsimTile<T>::kPairs;
  typename SsimTile<T>::Sum sum[kPairs][kPairs];
  T covariance[kPairs][kPairs];
  float psi[kPairs][kPairs];  // -1 where there is no pair
};

// Thread t of a tile has the pairs (i(t, a), j(t, b)); those of a warp are a block of 8 kPairs x 4 kPairs.
template <class T>
struct TilePlace {
  static constexpr int kPairs = SsimTile<T>::kPairs, kSide = SsimLayout<T>::kSide;
  std::int64_t i0, j0;

  PYPRUNE_TEAM static int local_i(int t, int a) { return t / 32 % 2 * 8 * kPairs + t % 8 + 8 * a; }
  PYPRUNE_TEAM static int local_j(int t, int b) { return t / 64 * 4 * kPairs + t % 32 / 8 + 4 * b; }
  PYPRUNE_TEAM std::int64_t i(int t, int a) const { return i0 + local_i(t, a); }
  PYPRUNE_TEAM std::int64_t j(int t, int b) const { return j0 + local_j(t, b); }
  // Whether the warp has any pair i < j at all.
  PYPRUNE_TEAM bool warp_has_pairs(int t, int F2) const {
    const std::int64_t least_i = i(t / 32 * 32, 0), least_j = j(t / 32 * 32, 0);
    return least_i < F2 && least_j < F2 && least_i < least_j + 4 * kPairs - 1;
  }
};

// Adds one to counter k of thresholds and bins, here or in shared memory.
struct Counters {
  const SsimItem& item;
  unsigned* local;  // or null

  PYPRUNE_TEAM void add(int k, unsigned value) const {
    if (local) {
      add_to(local + k, value);
    } else {
      add_to(k < item.threshold_count ? item.counts + k : item.histogram + (k - item.threshold_count),
             static_cast<Counter>(value));
    }
  }
};

// The shared memory of a tile at its end: [0, 8) the sum of Psi, [8, 12) the ticket, counters from 16 on.
template <class T, class Team, class State>
PYPRUNE_TEAM void deliver_tile(const Team& team, const SsimItem& item, const TilePlace<T>& place, State& own,
                               bool finite, void* memory) {
  constexpr int kPairs = SsimTile<T>::kPairs;
  Counter* const sum = static_cast<Counter*>(memory);
  unsigned* const local = static_cast<unsigned*>(memory) + 4;
  const int counters = item.threshold_count + item.bins;
  const bool is_local = counters <= kSsimLocalCounters;
  const Counters to = {item, is_local ? local : nullptr};
  const std::int64_t F2 = item.F2, first = item.first;
  const std::int64_t skipped = first * F2 - first * (first + 1) / 2;

  team.each([&](int t) {
    if (t == 0) *sum = 0;
    for (int k = t; is_local && k < counters; k += kSsimThreads) local[k] = 0;
    PYPRUNE_UNROLL_ALL
    for (int a = 0; a < kPairs; ++a) {
      PYPRUNE_UNROLL_ALL
      for (int b = 0; b < kPairs; ++b) {
        const std::int64_t i = place.i(t, a), j = place.j(t, b);
        float& psi = own(t).psi[a][b];
        const bool inside = i < F2 && j < F2 && i >= first && i < item.last;
        if (item.matrix && inside && i == j) item.matrix[i * F2 + i] = finite ? 1.0f : psi;
        if (!inside || i >= j) {
          psi = -1;
          continue;
        }
        if (item.matrix) item.matrix[i * F2 + j] = item.matrix[j * F2 + i] = psi;
        if (item.psi) item.psi[i * F2 - i * (i + 1) / 2 + (j - i - 1) - skipped] = psi;
      }
    }
  });
  if (!finite || !(counters > 0 || item.sum || item.nearest)) return;

  team.each([&](int t) {
    const TileOwn<T>& mine = own(t);
    for (int k = 0; k < item.threshold_count; ++k) {
      unsigned above = 0;
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kPairs * kPairs; ++q) {
        above += static_cast<double>(mine.psi[q / kPairs][q % kPairs]) > item.thresholds[k];
      }
      if (above) to.add(k, above);
    }
    Counter total = 0;
    PYPRUNE_UNROLL_ALL
    for (int q = 0; q < kPairs * kPairs; ++q) {
      const float psi = mine.psi[q / kPairs][q % kPairs];
      if (psi < 0) continue;
      if (item.bins) to.add(item.threshold_count + bin_of(psi, item.bins), 1u);
      total += fixed_point(psi, item.sum_shift);
    }
    if (item.sum && total) add_to(sum, total);
    if (item.nearest) {
      PYPRUNE_UNROLL_ALL
      for (int a = 0; a < kPairs; ++a) {
        Counter best_i = 0, best_j = 0;
        PYPRUNE_UNROLL_ALL
        for (int b = 0; b < kPairs; ++b) {
          const float from_i = mine.psi[a][b], from_j = mine.psi[b][a];
          const Counter key_i = from_i < 0 ? 0 : nearest_key(from_i, static_cast<int>(place.j(t, b)));
          const Counter key_j = from_j < 0 ? 0 : nearest_key(from_j, static_cast<int>(place.i(t, b)));
          best_i = key_i > best_i ? key_i : best_i;
          best_j = key_j > best_j ? key_j : best_j;
        }
        if (best_i) raise_to(item.nearest + place.i(t, a), best_i);
        if (best_j) raise_to(item.nearest + place.j(t, a), best_j);
      }
    }
  });
  team.each([&](int t) {
    if (t == 0 && item.sum && *sum) add_to(item.sum, *sum);
    for (int k = t; is_local && k < counters; k += kSsimThreads) {
      if (local[k]) Counters{item, nullptr}.add(k, local[k]);
    }
  });
}

// Tile.

// One thread's share of loading units [first, first + count) of a run: rows of kSide filters i, then of kSide filters
// j. Rows of neighbouring filters are one run of memory, unless they come in pieces. Nothing is loaded for filters
// beyond the last: what their threads find is worked on for nothing.
template <class T, int kK>
PYPRUNE_TEAM void load_units(const SsimItem& item, const SsimLayout<T>& layout, const TilePlace<T>& place,
                             std::int64_t channel, int first, int count, int t, T* shared) {
  constexpr int kSide = SsimLayout<T>::kSide, kVector = SsimLayout<T>::kVector;
  const int per_row = kK == 9 ? 3 : layout.piece / kVector, half = kSide * per_row;  // vectors
  const std::int64_t row = kK == 9 ? 3 : layout.numbers / kVector;                   // vectors
  const auto end_of = [&](std::int64_t f) {
    return (item.F2 - f < kSide ? static_cast<int>(item.F2 - f) : kSide) * per_row;
  };
  const int end_i = end_of(place.i0), end_j = half + end_of(place.j0);
  const Vector<T>* const rows = scratch_at<Vector<T>>(item, layout.rows);
  Vector<T>* const to = reinterpret_cast<Vector<T>*>(shared);
  for (int u = 0; u < count; ++u) {
    const int unit = first + u, c = kK == 9 ? unit : unit / layout.pieces;
    const Vector<T>* from = rows + (channel + c) * item.F2 * row;
    if (kK != 9) from += (unit - c * layout.pieces) * per_row;
    PYPRUNE_UNROLL_ALL
    for (int before = 0; before < 2 * half; before += kSsimThreads) {
      const int q = before + t;
      const bool of_j = q >= half;
      if (q >= (of_j ? end_j : end_i)) continue;
      const int r = of_j ? q - half : q;
      const std::int64_t f = of_j ? place.j0 : place.i0;
      copy_16(to + u * 2 * half + q, from + f * row + (kK == 9 ? r : r / per_row * row + r % per_row));
    }
  }
}

// Adds the psi of all channels that are here, when slices have nine values and need no pieces.
PYPRUNE_TEAM void add_nines(const float* shared, int count, int t, float e, const Exponents& exponents,
                            TileOwn<float>& own) {
  using V = TileFloat::V;
  constexpr int kPairs = TileOwn<float>::kPairs, kSide = SsimLayout<float>::kSide, kRow = 12;
  struct Row {
    Vector<float> v[3];
    PYPRUNE_TEAM V operator()(int k) const { return {v[k / 4].v[k % 4]}; }
  };
  const float half_e = 0.5f * e;
  const auto row_at = [&](int u, int row) {
    const Vector<float>* const from = reinterpret_cast<const Vector<float>*>(shared + (u * 2 * kSide + row) * kRow);
    return Row{{from[0], from[1], from[2]}};
  };
  PYPRUNE_UNROLL_ONE
  for (int u = 0; u < count; ++u) {
    Row y[kPairs];
    SliceNumbers<V> of_y[kPairs];
    PYPRUNE_UNROLL_ALL
    for (int b = 0; b < kPairs; ++b) {
      y[b] = row_at(u, kSide + TilePlace<float>::local_j(t, b));
      of_y[b] = slice_numbers(y[b](10).v, y[b](11).v, half_e);
    }
    PYPRUNE_UNROLL_ALL
    for (int a = 0; a < kPairs; ++a) {
      const Row x = row_at(u, TilePlace<float>::local_i(t, a));
      const SliceNumbers<V> of_x = slice_numbers(x(10).v, x(11).v, half_e);
      PYPRUNE_UNROLL_ALL
      for (int b = 0; b < kPairs; ++b) {
        own.sum[a][b] += psi_units(of_x, of_y[b], ssim_nine<TileFloat>(x, y[b], 0), e, exponents);
      }
    }
  }
}

template <class T>
PYPRUNE_TEAM void add_units(const T* shared, const SsimLayout<T>& layout, int first, int count, int t, T e,
                            const Exponents& exponents, TileOwn<T>& own) {
  constexpr int kPairs = TileOwn<T>::kPairs, kSide = SsimLayout<T>::kSide, kVector = SsimLayout<T>::kVector;
  const int vectors = layout.piece / kVector;
  Vector<T> x[kPairs], y[kPairs];
  PYPRUNE_UNROLL_ONE
  for (int u = 0; u < count; ++u) {
    const T* const unit = shared + static_cast<std::int64_t>(u) * layout.unit();
    const int p = (first + u) % layout.pieces;
    const bool last = p == layout.pieces - 1;
    const auto load = [&](int v) {
      PYPRUNE_UNROLL_ALL
      for (int a = 0; a < kPairs; ++a) {
        const T* const of_i = unit + TilePlace<T>::local_i(t, a) * layout.piece + v * kVector;
        const T* const of_j = unit + (kSide + TilePlace<T>::local_j(t, a)) * layout.piece + v * kVector;
        x[a] = *reinterpret_cast<const Vector<T>*>(of_i);
        y[a] = *reinterpret_cast<const Vector<T>*>(of_j);
      }
    };
    const auto multiply = [&](int k) {
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kPairs * kPairs; ++q) {
        T& sum = own.covariance[q / kPairs][q % kPairs];
        sum = multiply_add(x[q / kPairs].v[k], y[q % kPairs].v[k], sum);
      }
    };
    if (p == 0) {
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kPairs * kPairs; ++q) own.covariance[q / kPairs][q % kPairs] = 0;
    }
    PYPRUNE_UNROLL_ONE
    for (int v = 0; v < vectors - last; ++v) {
      load(v);
      PYPRUNE_UNROLL_ALL
      for (int k = 0; k < kVector; ++k) multiply(k);
    }
    if (!last) continue;
    // The last two numbers of a row are m and s.
    load(vectors - 1);
    PYPRUNE_UNROLL_ALL
    for (int k = 0; k < kVector - 2; ++k) multiply(k);
    PYPRUNE_UNROLL_ALL
    for (int q = 0; q < kPairs * kPairs; ++q) {
      const Vector<T>&of_x = x[q / kPairs], &of_y = y[q % kPairs];
      own.sum[q / kPairs][q % kPairs] += psi_units(slice_numbers(of_x.v[kVector - 2], of_x.v[kVector - 1], e / 2),
                                                   slice_numbers(of_y.v[kVector - 2], of_y.v[kVector - 1], e / 2),
                                                   {own.covariance[q / kPairs][q % kPairs]}, e, exponents);
    }
  }
}

// One run of channels of one tile. memory: SsimLayout::shared_bytes, at least kSsimStage.
template <class T, int kK, class Team>
PYPRUNE_TEAM void ssim_tile(const Team& team, const SsimItem& item, std::int64_t block, void* memory) {
  using Sum = typename SsimTile<T>::Sum;
  constexpr int kPairs = SsimTile<T>::kPairs, kSide = SsimLayout<T>::kSide;
  const SsimLayout<T> layout(item);
  const double e = ssim_head_of(item)->e;
  const bool finite = ssim_head_of(item)->not_finite == 0;
  const Exponents exponents = {item.alpha, item.beta, item.gamma};
  const std::int64_t run = block / layout.tiles, tile = block % layout.tiles;
  std::int64_t row = item.first / kSide;
  while (SsimLayout<T>::tiles_before(row + 1, layout.across) <= layout.first_tile + tile) ++row;
  const std::int64_t column = row + layout.first_tile + tile - SsimLayout<T>::tiles_before(row, layout.across);
  const TilePlace<T> place = {row * kSide, column * kSide};
  const std::int64_t channel = run * layout.channels;
  const int left = item.F1 - static_cast<int>(channel), channels = left < layout.channels ? left : layout.channels;
  typename Team::template State<TileOwn<T>> own(kSsimThreads);

  // Load a stage while the one before it is worked on.
  const int per_stage = layout.units(), units = channels * layout.pieces;
  T* const shared = static_cast<T*>(memory);
  const auto buffer = [&](int stage) { return shared + stage % 2 * per_stage * layout.unit(); };
  const auto size_of = [&](int stage) {
    return units - stage * per_stage < per_stage ? units - stage * per_stage : per_stage;
  };
  const auto load = [&](int stage, int t) {
    load_units<T, kK>(item, layout, place, channel, stage * per_stage, size_of(stage), t, buffer(stage));
    end_of_stage();
  };
  team.each([&](int t) {
    PYPRUNE_UNROLL_ALL
    for (int q = 0; q < kPairs * kPairs; ++q) own(t).sum[q / kPairs][q % kPairs] = sum_of_none(Sum(), channels);
    load(0, t);
  });
  for (int stage = 0; stage * per_stage < units; ++stage) {
    team.each([&](int t) {
      load(stage + 1, t);
      wait_for_stage_before_last();
    });
    team.each([&](int t) {
      if (!place.warp_has_pairs(t, item.F2)) return;
      if constexpr (kK == 9) {
        add_nines(buffer(stage), size_of(stage), t, static_cast<float>(e), exponents, own(t));
      } else {
        add_units<T>(buffer(stage), layout, stage * per_stage, size_of(stage), t, static_cast<T>(e), exponents, own(t));
      }
    });
  }

  // The runs of a tile meet in memory; whichever ends last adds them up.
  constexpr int kSums = kPairs * kPairs;
  Sum* const partial = scratch_at<Sum>(item, layout.partial) + tile * layout.runs * kSums * kSsimThreads;
  if (layout.runs > 1) {
    unsigned* const ticket = static_cast<unsigned*>(memory) + 2;
    team.each([&](int t) {
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kSums; ++q) {
        partial[(run * kSums + q) * kSsimThreads + t] = own(t).sum[q / kPairs][q % kPairs];
      }
      publish();
    });
    team.each([&](int t) {
      if (t == 0) *ticket = add_to(scratch_at<unsigned>(item, layout.arrivals) + tile, 1u);
    });
    if (*ticket != static_cast<unsigned>(layout.runs - 1)) return;
    publish();
  }
  team.each([&](int t) {
    std::int64_t total[kSums] = {};
    if (layout.runs == 1) {
      PYPRUNE_UNROLL_ALL
      for (int q = 0; q < kSums; ++q) total[q] = own(t).sum[q / kPairs][q % kPairs];
    } else {
      PYPRUNE_UNROLL_ONE
      for (int r = 0; r < layout.runs; ++r) {
        PYPRUNE_UNROLL_ALL
        for (int q = 0; q < kSums; ++q) total[q] += read_published(partial + (r * kSums + q) * kSsimThreads + t);
      }
    }
    PYPRUNE_UNROLL_ALL
    for (int q = 0; q < kSums; ++q) {
      const float psi = psi_of_sum<T>(static_cast<double>(total[q]), item.F1);
      own(t).psi[q / kPairs][q % kPairs] = finite ? psi : float_of(0x7fc00000);
    }
  });
  deliver_tile<T>(team, item, place, own, finite, memory);
}

// Pairs: a warp for each. The same additions as in tiles give the same bits.

PYPRUNE_TEAM double pair_covariance(const double* x, const double* y, int K) {
  double sum = 0;
  for (int k = 0; k < K; ++k) sum = multiply_add(x[k], y[k], sum);
  return sum;
}
PYPRUNE_TEAM float pair_covariance(const float* x, const float* y, int K) {
  using V = TileFloat::V;
  if (K == 9) {
    return ssim_nine<TileFloat>([&](int k) { return V{x[k]}; }, [&](int k) { return V{y[k]}; }, 0).v;
  }
  float sum = 0;
  for (int k = 0; k < K; ++k) sum = multiply_add(x[k], y[k], sum);
  return sum;
}

template <class T, class Team>
PYPRUNE_TEAM void ssim_pair(const Team& team, const SsimItem& item, std::int64_t pair) {
  const SsimLayout<T> layout(item);
  const SsimHead* const head = ssim_head_of(item);
  const T e = static_cast<T>(head->e);
  const std::int64_t i = item.pairs[2 * pair], j = item.pairs[2 * pair + 1];
  const T* const rows = scratch_at<T>(item, layout.rows);
  const Exponents exponents = {item.alpha, item.beta, item.gamma};
  const double sum = team.sum([&](int t) {
    double sum = 0;
    for (std::int64_t c = t; c < item.F1; c += 32) {
      const T* const x = rows + (c * item.F2 + i) * layout.numbers;
      const T* const y = rows + (c * item.F2 + j) * layout.numbers;
      const T covariance = pair_covariance(x, y, item.K);
      const auto units =
          psi_units(slice_numbers(x[layout.numbers - 2], x[layout.numbers - 1], e / 2),
                    slice_numbers(y[layout.numbers - 2], y[layout.numbers - 1], e / 2), {covariance}, e, exponents);
      using Sum = typename SsimTile<T>::Sum;
      sum += static_cast<double>(static_cast<Sum>(units + sum_of_none(Sum(), 1)));
    }
    return sum;
  });
  team.each([&](int t) {
    if (t != 0) return;
    const bool finite = head->not_finite == 0;
    const float psi = finite ? psi_of_sum<T>(sum, item.F1) : float_of(0x7fc00000);
    if (item.psi) item.psi[pair] = psi;
    if (!finite) return;
    const Counters to = {item, nullptr};
    for (int k = 0; k < item.threshold_count; ++k) {
      if (static_cast<double>(psi) > item.thresholds[k]) to.add(k, 1u);
    }
    if (item.bins) to.add(item.threshold_count + bin_of(psi, item.bins), 1u);
    if (item.sum) add_to(item.sum, fixed_point(psi, item.sum_shift));
    if (item.nearest) {
      raise_to(item.nearest + i, nearest_key(psi, static_cast<int>(j)));
      raise_to(item.nearest + j, nearest_key(psi, static_cast<int>(i)));
    }
  });
}

}  // namespace
}  // namespace pyprune
