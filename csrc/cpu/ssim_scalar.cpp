// The formula of ssim_math.h in scalars, one slice pair at a time. For tests, which hold the vector variants against it
// bit for bit; statistics are the baseline's.
#include <cmath>

#include "pyprune/ssim.h"

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;

double in_units(float psi) {
  return static_cast<double>(std::lrint(psi));  // exact sums of whole numbers, as everywhere
}
double in_units(double psi) {
  return psi;
}

template <class Ops, SsimForm form>
double psi_of(const SsimFormula& f, int K, const typename Ops::V* x, const typename Ops::V* y) {
  using V = typename Ops::V;
  const SsimTerms<Ops> terms{static_cast<V>(f.e), static_cast<V>(f.unit)};
  const auto at = [](const V* slice) { return [slice](int k) { return slice[k * kSsimBlock]; }; };
  const auto from_x = at(x), from_y = at(y);
  const auto numbers = [K](const auto& of) {
    return SliceNumbers<V>{of(K + kSsimM), of(K + kSsimQ), of(K + kSsimS), of(K + kSsimR)};
  };
  if (K == 1) return in_units(ssim_psi_of_points<Ops, form>(numbers(from_x), numbers(from_y), terms, f.alpha));
  return in_units(ssim_psi<Ops, form>(numbers(from_x), numbers(from_y), ssim_covariance<Ops>(from_x, from_y, K), terms,
                                      f.alpha, f.beta, f.gamma));
}

template <class Ops>
double with_form(const SsimFormula& f, int K, const typename Ops::V* x, const typename Ops::V* y) {
  switch (f.form) {
    case SsimForm::alpha_zero:
      return psi_of<Ops, SsimForm::alpha_zero>(f, K, x, y);
    case SsimForm::alpha_half:
      return psi_of<Ops, SsimForm::alpha_half>(f, K, x, y);
    case SsimForm::alpha_one:
      return psi_of<Ops, SsimForm::alpha_one>(f, K, x, y);
    case SsimForm::alpha_power:
      return psi_of<Ops, SsimForm::alpha_power>(f, K, x, y);
    case SsimForm::all_powers:
      return psi_of<Ops, SsimForm::all_powers>(f, K, x, y);
  }
  return NAN;
}

double psi_at(const SsimPlan& plan, int K, Index offset_x, Index offset_y, const void* x, const void* y) {
  if (plan.wide) {
    return with_form<ScalarDouble>(plan.formula, K, static_cast<const double*>(x) + offset_x,
                                   static_cast<const double*>(y) + offset_y);
  }
  return with_form<ScalarFloat>(plan.formula, K, static_cast<const float*>(x) + offset_x,
                                static_cast<const float*>(y) + offset_y);
}

bool supported() {
  return true;
}

SsimScan scan(const SsimWeights& w, Index filter, double scale) {
  return kSsimBaseline.scan(w, filter, scale);
}

void prepare(const SsimWeights& w, const SsimPlan& plan, const Index* filters, Index first, Index last, double* scratch,
             void* block) {
  kSsimBaseline.prepare(w, plan, filters, first, last, scratch, block);
}

void all(const SsimPlan& plan, int K, Index channels, const void* x, const void* y, double* sums) {
  for (Index c = 0; c < channels; ++c) {
    const Index start = c * (K + kSsimRows) * kSsimBlock;
    for (int i = 0; i < kSsimBlock; ++i) {
      for (int j = 0; j < kSsimBlock; ++j) sums[i * kSsimBlock + j] += psi_at(plan, K, start + i, start + j, x, y);
    }
  }
}

void each(const SsimPlan& plan, int K, Index channels, const void* x, const void* y, double* sums) {
  for (Index c = 0; c < channels; ++c) {
    const Index start = c * (K + kSsimRows) * kSsimBlock;
    for (int l = 0; l < kSsimBlock; ++l) sums[l] += psi_at(plan, K, start + l, start + l, x, y);
  }
}

}  // namespace

extern const SsimVariant kSsimScalar = {"scalar", "any CPU", supported, 1e7, scan, prepare, all, each};

}  // namespace pyprune
