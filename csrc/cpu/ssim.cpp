// Scans and scales a layer, prepares its slices panel by panel, hands tiles of filter pairs to the threads, and takes
// from every finished tile what was asked for.
#include "pyprune/ssim.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <vector>

#include "pyprune/pool.h"

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;

constexpr double kSerialSeconds = 2e-4;           // waking threads costs tens of microseconds
constexpr double kTileSeconds = 0.01;             // between two looks for Ctrl-C, where channels can be cut
constexpr std::size_t kPreparedBytes = 2u << 20;  // for prepared slices: what does not fit goes panel by panel
constexpr Index kPanel = 512;                     // filters of a panel: a slice is prepared once for that many others
constexpr Index kGroup = 4;                       // blocks per side of a tile, and
constexpr Index kChannels = 64;                   // channels at a time: both sides share the second-level cache
constexpr Index kNone = -1;

// Aligned memory that reports failure by an exception.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(std::size_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return memory;
}

Index blocks_of(Index filters) {
  return (filters + kSsimBlock - 1) / kSsimBlock;
}

// Coefficients in t = x - 1.5 of the polynomial that meets x^a in the Chebyshev points of [1, 2]: its relative error is
// at most 4e-8 for 0 <= a <= 2.
void fit(double a, float* coefficient) {
  constexpr int n = kPowerDegree + 1;
  double node[n], divided[n], sum[n] = {};
  for (int i = 0; i < n; ++i) {
    node[i] = 0.5 * std::cos(M_PI * (i + 0.5) / n);
    divided[i] = std::pow(1.5 + node[i], a);
  }
  for (int order = 1; order < n; ++order) {  // Newton's form
    for (int i = n - 1; i >= order; --i) divided[i] = (divided[i] - divided[i - 1]) / (node[i] - node[i - order]);
  }
  for (int i = n - 1; i >= 0; --i) {  // to powers of t: sum = sum * (t - node) + divided
    for (int j = n - 1; j > 0; --j) sum[j] = sum[j - 1] - node[i] * sum[j];
    sum[0] = divided[i] - node[i] * sum[0];
  }
  for (int j = 0; j < n; ++j) coefficient[j] = static_cast<float>(sum[j]);
}

SsimPower power_of(double a, double unit) {
  SsimPower power{};
  power.a = a;
  fit(std::min(a, 2.0), power.coefficient);
  for (int i = 0; i < 16; ++i) {
    power.low[i] = static_cast<float>(std::exp2(a * (i % 8)));
    power.high[i] = static_cast<float>(unit * std::exp2(a * (8 * i - 127)));
  }
  return power;
}

SsimForm form_of(const SsimConstants& c) {
  if (c.beta != 1 || c.gamma != 1) return SsimForm::all_powers;
  if (c.alpha == 0) return SsimForm::alpha_zero;
  if (c.alpha == 0.5) return SsimForm::alpha_half;
  return c.alpha == 1 ? SsimForm::alpha_one : SsimForm::alpha_power;
}

// What one thread has found so far. Everything merges in any order: whole numbers, and picks by a total order.
struct Found {
  std::vector<std::int64_t> count, histogram, nearest;
  std::vector<double> nearest_psi;
  struct Pair {
    double psi;
    Index i, j;
    // As a heap's order it keeps the least similar pair on top.
    bool operator<(const Pair& o) const { return std::tie(o.psi, i, j) < std::tie(psi, o.i, o.j); }
  };
  std::vector<Pair> top;
  std::size_t top_limit;

  Found(const SsimResult& r, Index F2)
      : count(static_cast<std::size_t>(r.thresholds)),
        histogram(static_cast<std::size_t>(r.bins)),
        nearest(r.nearest ? static_cast<std::size_t>(F2) : 0, kNone),
        nearest_psi(r.nearest ? static_cast<std::size_t>(F2) : 0, -1),
        top_limit(static_cast<std::size_t>(r.top)) {
    top.reserve(top_limit);
  }

  void add(const SsimResult& r, Index i, Index j, double psi) {
    for (std::size_t t = 0; t < count.size(); ++t) count[t] += psi > r.threshold[t];
    if (!histogram.empty()) {
      const double bin = psi * static_cast<double>(r.bins);
      ++histogram[std::min(static_cast<std::size_t>(bin), histogram.size() - 1)];
    }
    if (!nearest.empty()) {
      meet(i, j, psi);
      meet(j, i, psi);
    }
    if (top_limit) keep({psi, i, j});
  }

  void meet(Index one, Index other, double psi) {
    const std::size_t at = static_cast<std::size_t>(one);
    if (other == kNone || psi < nearest_psi[at]) return;
    if (psi == nearest_psi[at] && nearest[at] <= other) return;
    nearest_psi[at] = psi;
    nearest[at] = other;
  }

  void keep(const Pair& pair) {
    if (top.size() == top_limit) {
      if (!(pair < top.front())) return;
      std::pop_heap(top.begin(), top.end());
      top.back() = pair;
    } else {
      top.push_back(pair);
    }
    std::push_heap(top.begin(), top.end());
  }

  void merge(const Found& other) {
    for (std::size_t t = 0; t < count.size(); ++t) count[t] += other.count[t];
    for (std::size_t b = 0; b < histogram.size(); ++b) histogram[b] += other.histogram[b];
    for (std::size_t f = 0; f < nearest.size(); ++f) {
      meet(static_cast<Index>(f), other.nearest[f], other.nearest_psi[f]);
    }
    for (const Pair& pair : other.top) keep(pair);
  }
};

// Lends every running task a Found of its own; there are never more than threads.
class Ledger {
 public:
  Ledger(const SsimResult& result, Index F2) : result_(result), F2_(F2) {}

  Found* borrow() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) {
      all_.push_back(std::make_unique<Found>(result_, F2_));
      free_.reserve(all_.size());
      return all_.back().get();
    }
    Found* found = free_.back();
    free_.pop_back();
    return found;
  }
  void give_back(Found* found) {
    std::lock_guard lock(mutex_);
    free_.push_back(found);
  }

  void write(double mean) {
    Found* total = borrow();
    for (const auto& found : all_) {
      if (found.get() != total) total->merge(*found);
    }
    std::copy(total->count.begin(), total->count.end(), result_.count);
    std::copy(total->histogram.begin(), total->histogram.end(), result_.histogram);
    if (result_.nearest) {
      std::copy(total->nearest.begin(), total->nearest.end(), result_.nearest);
      std::copy(total->nearest_psi.begin(), total->nearest_psi.end(), result_.nearest_psi);
    }
    std::sort_heap(total->top.begin(), total->top.end());
    for (std::size_t t = 0; t < total->top.size(); ++t) {
      result_.top_i[t] = total->top[t].i;
      result_.top_j[t] = total->top[t].j;
      result_.top_psi[t] = total->top[t].psi;
    }
    if (result_.mean) *result_.mean = mean;
  }

 private:
  const SsimResult& result_;
  const Index F2_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Found>> all_;
  std::vector<Found*> free_;
};

struct Interrupted {};

// Everything that is the same for all tasks of a call.
struct Call {
  const SsimWeights& w;
  const SsimVariant& variant;
  const SsimInterrupt& interrupt;
  const SsimResult& result;
  const int threads;
  const Index K;
  SsimPlan plan{};
  std::atomic<bool> out_of_memory{false};

  Call(const SsimWeights& weights, const SsimVariant& v, const SsimInterrupt& i, const SsimResult& r, int t)
      : w(weights), variant(v), interrupt(i), result(r), threads(t), K(weights.K1 * weights.K2) {}

  std::size_t number_bytes() const { return plan.wide ? 8 : 4; }
  // Bytes of one channel of one block.
  std::size_t channel_bytes() const { return static_cast<std::size_t>((K + kSsimRows) * kSsimBlock) * number_bytes(); }
  std::size_t scratch_bytes() const { return static_cast<std::size_t>(ssim_gathered(K) * K * kSsimBlock) * 8; }
  // Seconds for so many slice pairs, roughly.
  double seconds(double slice_pairs) const {
    return slice_pairs * (static_cast<double>(K) + 26) / 35 / variant.speed * (plan.wide ? 6 : 1);
  }

  // Psi as it is reported: rounded like the matrix, at most 1.
  double psi(double sum) const {
    const double value = std::min(sum / (plan.formula.unit * static_cast<double>(w.F1)), 1.0);
    return w.element == Element::float64 ? value : static_cast<double>(static_cast<float>(value));
  }
};

// Runs items of about so many seconds each, looking for Ctrl-C in between.
template <class Task>
void run(Call& call, Index items, double seconds_each, const Task& task) {
  struct Context {
    Call& call;
    const Task& task;
  } context{call, task};
  const auto invoke = [](void* raw, Index item) {
    Context& c = *static_cast<Context*>(raw);
    try {
      c.task(item);
    } catch (const std::bad_alloc&) {
      c.call.out_of_memory = true;
    }
  };
  const int threads = seconds_each * static_cast<double>(items) < kSerialSeconds ? 1 : std::max(call.threads, 1);
  const bool finished = parallel_for(items, threads, invoke, &context, call.interrupt.poll, call.interrupt.context);
  if (!finished) throw Interrupted();
  if (call.out_of_memory) throw std::bad_alloc();
}

// Prepares channels [first, first + channels) of blocks [block, block + blocks).
void prepare_panel(Call& call, Index block, Index blocks, Index first, Index channels, char* out) {
  const double each = call.seconds(static_cast<double>(channels) * kSsimBlock * 20);
  run(call, blocks, each, [&](Index b) {
    const Memory scratch = allocate(call.scratch_bytes());
    Index filters[kSsimBlock];
    for (int l = 0; l < kSsimBlock; ++l) filters[l] = std::min((block + b) * kSsimBlock + l, call.w.F2 - 1);
    call.variant.prepare(call.w, call.plan, filters, first, first + channels, static_cast<double*>(scratch.get()),
                         out + static_cast<std::size_t>(b * channels) * call.channel_bytes());
  });
}

// Takes what is asked for from psi of blocks (x, y) and returns the sum over pairs i < j.
double emit(const Call& call, Index x, Index y, const double* sums, Found& found) {
  const SsimResult& r = call.result;
  const Index F2 = call.w.F2, rows = std::min<Index>(kSsimBlock, F2 - x * kSsimBlock),
              columns = std::min<Index>(kSsimBlock, F2 - y * kSsimBlock);
  double total = 0;
  for (Index a = 0; a < rows; ++a) {
    const Index i = x * kSsimBlock + a;
    for (Index b = x == y ? a + 1 : 0; b < columns; ++b) {
      const Index j = y * kSsimBlock + b;
      const double psi = call.psi(sums[a * kSsimBlock + b]);
      total += psi;
      if (r.matrix) {
        if (call.w.element == Element::float64) {
          double* matrix = static_cast<double*>(r.matrix);
          matrix[i * F2 + j] = matrix[j * F2 + i] = psi;
        } else {
          float* matrix = static_cast<float*>(r.matrix);
          matrix[i * F2 + j] = matrix[j * F2 + i] = static_cast<float>(psi);
        }
      } else {
        found.add(r, i, j, psi);
      }
    }
  }
  return total;
}

// All pairs of two panels, or of one with itself. Channels come in slabs where a panel does not fit as a whole; then
// `sums` keeps the tiles [tile][kGroup][kGroup][block pair] in between.
struct Tiles {
  Call& call;
  Ledger& ledger;
  const Index x_block, x_blocks, y_block, y_blocks, group;  // in blocks
  std::vector<double>& totals;  // of every pair of blocks: a mean in an order that no number of threads changes

  bool same() const { return x_block == y_block; }
  Index across() const { return (y_blocks + group - 1) / group; }
  Index count() const { return (x_blocks + group - 1) / group * across(); }

  void run_tile(Index tile, Index channels, const char* x, const char* y, double* sums, bool last) {
    const Index bi = tile / across() * group, bj = tile % across() * group;
    if (same() && bj + group <= bi) return;  // below the diagonal
    std::vector<double> own;  // not thread_local: in a library loaded late that is freed behind its thread
    if (!sums) {
      own.assign(static_cast<std::size_t>(group * group * kSsimBlock * kSsimBlock), 0.0);
      sums = own.data();
    }
    const std::size_t bytes = call.channel_bytes();
    for (Index c = 0; c < channels; c += kChannels) {
      visit(bi, bj, [&](Index i, Index j, Index place) {
        call.variant.all(call.plan, static_cast<int>(call.K), std::min(kChannels, channels - c),
                         x + static_cast<std::size_t>(i * channels + c) * bytes,
                         y + static_cast<std::size_t>(j * channels + c) * bytes, sums + place);
      });
    }
    if (!last) return;
    Found* found = ledger.borrow();
    visit(bi, bj, [&](Index i, Index j, Index place) {
      totals[static_cast<std::size_t>(i * y_blocks + j)] = emit(call, x_block + i, y_block + j, sums + place, *found);
    });
    ledger.give_back(found);
  }

  template <class Visitor>
  void visit(Index bi, Index bj, const Visitor& visitor) const {
    for (Index i = bi; i < std::min(bi + group, x_blocks); ++i) {
      for (Index j = same() ? std::max(bj, i) : bj; j < std::min(bj + group, y_blocks); ++j) {
        visitor(i, j, ((i - bi) * group + j - bj) * kSsimBlock * kSsimBlock);
      }
    }
  }
};

// Cuts the upper triangle into panels and slabs that fit kPreparedBytes.
double all_pairs(Call& call, Ledger& ledger) {
  const Index blocks = blocks_of(call.w.F2), F1 = call.w.F1;
  const std::size_t bytes = call.channel_bytes();
  const auto fits = [&](Index b, Index channels) {
    return static_cast<std::size_t>(b) * static_cast<std::size_t>(channels) * bytes <= kPreparedBytes;
  };
  Index panel = fits(blocks, F1) ? blocks : std::min(blocks, kPanel / kSsimBlock);
  while (panel > 1 && !fits(2 * panel, std::min(F1, kChannels))) panel /= 2;
  const Index sides = panel < blocks ? 2 : 1;
  const Index most = static_cast<Index>(kPreparedBytes / (static_cast<std::size_t>(sides * panel) * bytes));
  const Index tiles_wanted = 8 * std::max(call.threads, 1);
  Index group = kGroup;
  while (group > 1 && blocks * blocks / (2 * group * group) < tiles_wanted) group /= 2;
  const double channel_seconds = call.seconds(static_cast<double>(group * group * kSsimBlock * kSsimBlock));
  const Index patient = std::max(kChannels, static_cast<Index>(kTileSeconds / channel_seconds));
  const Index slab = std::max<Index>(std::min({F1, most, patient}), 1);

  const std::size_t side_bytes = static_cast<std::size_t>(panel * slab) * bytes;
  Memory memory_x = allocate(side_bytes), memory_y = sides == 2 ? allocate(side_bytes) : nullptr;
  char* const x = static_cast<char*>(memory_x.get());
  std::vector<double> sums, totals;
  double total = 0;
  for (Index i = 0; i < blocks; i += panel) {
    for (Index j = i; j < blocks; j += panel) {
      Tiles tiles{call, ledger, i, std::min(panel, blocks - i), j, std::min(panel, blocks - j), group, totals};
      char* const y = i == j ? x : static_cast<char*>(memory_y.get());
      const std::size_t tile_sums = static_cast<std::size_t>(group * group * kSsimBlock * kSsimBlock);
      totals.assign(static_cast<std::size_t>(tiles.x_blocks * tiles.y_blocks), 0.0);
      if (slab < F1) sums.assign(static_cast<std::size_t>(tiles.count()) * tile_sums, 0.0);
      for (Index c = 0; c < F1; c += slab) {
        const Index channels = std::min(slab, F1 - c);
        if (i == j || slab < F1) prepare_panel(call, i, tiles.x_blocks, c, channels, x);
        if (i != j) prepare_panel(call, j, tiles.y_blocks, c, channels, y);
        const double each = call.seconds(static_cast<double>(tile_sums) * static_cast<double>(channels));
        run(call, tiles.count(), each, [&](Index tile) {
          double* kept = sums.empty() ? nullptr : sums.data() + static_cast<std::size_t>(tile) * tile_sums;
          tiles.run_tile(tile, channels, x, y, kept, c + channels == F1);
        });
      }
      for (const double part : totals) total += part;
    }
  }
  return total;
}

// Explicit pairs: lanes are pairs, so every slice is prepared for one use.
double chosen_pairs(Call& call, Ledger& ledger, const std::int64_t* pairs, Index count) {
  std::vector<double> psi(static_cast<std::size_t>(count));
  const Index batches = blocks_of(count), F1 = call.w.F1;
  const double each = call.seconds(static_cast<double>(F1) * kSsimBlock * 50);
  run(call, batches, each, [&](Index batch) {
    Index filters[2][kSsimBlock];
    const Index first = batch * kSsimBlock, used = std::min<Index>(kSsimBlock, count - first);
    for (Index l = 0; l < kSsimBlock; ++l) {
      const std::int64_t* pair = pairs + 2 * (first + std::min(l, used - 1));
      filters[0][l] = static_cast<Index>(pair[0]);
      filters[1][l] = static_cast<Index>(pair[1]);
    }
    const Index slab = std::min<Index>(F1, kChannels);
    const std::size_t side = static_cast<std::size_t>(slab) * call.channel_bytes();
    const Memory memory = allocate(2 * side);
    char *const x = static_cast<char*>(memory.get()), *const y = x + side;
    const Memory scratch = allocate(call.scratch_bytes());
    double sums[kSsimBlock] = {};
    for (Index c = 0; c < F1; c += slab) {
      const Index stop = std::min(c + slab, F1);
      call.variant.prepare(call.w, call.plan, filters[0], c, stop, static_cast<double*>(scratch.get()), x);
      call.variant.prepare(call.w, call.plan, filters[1], c, stop, static_cast<double*>(scratch.get()), y);
      call.variant.each(call.plan, static_cast<int>(call.K), stop - c, x, y, sums);
    }
    for (Index l = 0; l < used; ++l) psi[static_cast<std::size_t>(first + l)] = call.psi(sums[l]);
  });
  Found* found = ledger.borrow();
  double total = 0;
  for (Index p = 0; p < count; ++p) {
    const double value = psi[static_cast<std::size_t>(p)];
    found->add(call.result, static_cast<Index>(pairs[2 * p]), static_cast<Index>(pairs[2 * p + 1]), value);
    total += value;
  }
  ledger.give_back(found);
  return total;
}

// The largest weight and the mean square one on the scale where the largest is in [0.5, 1).
SsimScan scan(Call& call) {
  std::vector<SsimScan> scans(static_cast<std::size_t>(call.w.F2));
  const double numbers = static_cast<double>(call.w.F1 * call.K);
  const auto pass = [&](double scale) {
    run(call, call.w.F2, numbers * 1e-9,
        [&](Index f) { scans[static_cast<std::size_t>(f)] = call.variant.scan(call.w, f, scale); });
    SsimScan total{0, 0, 0};
    for (const SsimScan& one : scans) {
      total.largest = std::max(total.largest, one.largest);
      total.sum_of_squares += one.sum_of_squares;
      total.not_finite += one.not_finite;
    }
    return total;
  };
  SsimScan total = pass(1);
  int exponent = 0;
  std::frexp(total.largest, &exponent);
  if (std::abs(exponent) > 400 && !total.not_finite) {  // only float64: its squares may overflow or vanish
    exponent = std::min(std::max(exponent, -1020), 1020);
    total.sum_of_squares = pass(std::ldexp(1.0, -exponent)).sum_of_squares;
    std::frexp(std::ldexp(total.largest, -exponent), &exponent);
  }
  total.sum_of_squares = std::ldexp(total.sum_of_squares, -2 * exponent);
  total.sum_of_squares /= numbers * static_cast<double>(call.w.F2);
  return total;
}

void fill_diagonal(const Call& call) {
  for (Index f = 0; f < call.w.F2; ++f) {
    const Index at = f * call.w.F2 + f;
    if (call.w.element == Element::float64) {
      static_cast<double*>(call.result.matrix)[at] = 1;
    } else {
      static_cast<float*>(call.result.matrix)[at] = 1;
    }
  }
}

}  // namespace

SsimPlan ssim_plan(const SsimConstants& c, double largest, double mean_square, Element element, std::ptrdiff_t K) {
  constexpr double kFloatRange = 0x1p60;  // of largest^2 / e, in float32 lanes, and
  constexpr int kFloatK = 512;            // weights of a slice: the bound on rounding grows with them
  SsimPlan plan{};
  int exponent = 0;
  double e = 1;  // on the scale where the largest weight is in [0.5, 1); slices of zeros are alike whatever e is
  if (largest > 0) {
    std::frexp(largest, &exponent);
    e = c.absolute ? std::ldexp(std::ldexp(c.eps, -exponent), -exponent) : c.eps * mean_square;
    e = std::min(std::max(e, 0x1p-600), 0x1p200);
  }
  // Two errors of the structure's are as large as one of the others: docs/ops/ssim.md.
  plan.wide = element == Element::float64 || e * kFloatRange < 1 || K > kFloatK || c.alpha + c.beta + 2 * c.gamma > 4;
  if (!plan.wide) e = std::min(e, kFloatRange);
  // Balanced about 1, so that no product of three denominators overflows or vanishes: e largest^2 is about 1.
  const int balance = -std::ilogb(e) / 4, shift = balance - exponent;
  plan.scale[0] = std::ldexp(1.0, shift / 2);
  plan.scale[1] = std::ldexp(1.0, shift - shift / 2);
  plan.formula.form = form_of(c);
  plan.formula.e = std::ldexp(e, 2 * balance);
  plan.formula.unit = plan.wide ? 1 : kSsimFloatUnit;
  plan.formula.alpha = power_of(c.alpha, plan.formula.unit);
  plan.formula.beta = power_of(c.beta, 1);
  plan.formula.gamma = power_of(c.gamma, 1);
  return plan;
}

SsimEnd ssim(const SsimWeights& w, const SsimConstants& constants, const std::int64_t* pairs, std::ptrdiff_t count,
             const SsimVariant& variant, int threads, const SsimInterrupt& interrupt, const SsimResult& result,
             std::ptrdiff_t* not_finite) try {
  Call call(w, variant, interrupt, result, threads);
  const SsimScan found = scan(call);
  *not_finite = found.not_finite;
  if (found.not_finite) return SsimEnd::not_finite;
  call.plan = ssim_plan(constants, found.largest, found.sum_of_squares, w.element, call.K);
  if (result.matrix) fill_diagonal(call);
  Ledger ledger(result, w.F2);
  const double total = pairs ? chosen_pairs(call, ledger, pairs, count) : all_pairs(call, ledger);
  const double of = static_cast<double>(pairs ? count : w.F2 * (w.F2 - 1) / 2);
  ledger.write(of > 0 ? total / of : std::numeric_limits<double>::quiet_NaN());
  return SsimEnd::done;
} catch (const Interrupted&) {
  return SsimEnd::interrupted;
}

}  // namespace pyprune
