// Seeds every restart once for all K, lets Lloyd's rounds run for a few K and all their restarts side by side, so that
// a block of distances is read from the cache by all of them, and improves and judges the best of each K.
#include "pyprune/kmeans.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "pyprune/kmeans_steps.h"

namespace pyprune {
namespace {

using Index = std::ptrdiff_t;
using Row = std::int32_t;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSerialSeconds = 2e-4;    // waking threads costs tens of microseconds
constexpr double kAdditionsASecond = 5e9;  // of distances, roughly
constexpr Index kSideBySide = 32;          // problems that share a block of distances while it is in the cache

std::size_t at(Index i) {
  return static_cast<std::size_t>(i);
}

// Aligned memory that reports failure by an exception.
struct Free {
  void operator()(double* p) const { std::free(p); }
};
using Memory = std::unique_ptr<double, Free>;

Memory allocate(std::size_t count) {
  Memory memory(static_cast<double*>(std::aligned_alloc(64, (count * sizeof(double) + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// A generator of its own for every restart (splitmix64).
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t stream) : state_(mix(seed) ^ mix(~stream)) {}
  double uniform() {  // in [0, 1)
    state_ += 0x9e3779b97f4a7c15u;
    return static_cast<double>(mix(state_) >> 11) * 0x1p-53;
  }

 private:
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

struct Interrupted {};

// Everything that is the same for all tasks of a call.
struct Call {
  const KMeansProblem& problem;
  const KMeansVariant& variant;
  const KMeansInterrupt& interrupt;
  const KMeansResult& result;
  const int threads;
  const Index F, C, blocks, stride;  // of the matrix: `stride` numbers a block
  Memory matrix;
  std::vector<double> X, norm;  // rows about their mean, and the squares of their lengths
  double tolerance = 0;         // what rounding can make of costs
  std::atomic<Index> done{0};   // K
  std::atomic<bool> out_of_memory{false}, stopped{false};
  const std::thread::id caller = std::this_thread::get_id();

  Call(const KMeansProblem& p, const KMeansVariant& v, const KMeansInterrupt& i, const KMeansResult& r, int t)
      : problem(p),
        variant(v),
        interrupt(i),
        result(r),
        threads(t),
        F(p.F),
        C(p.C),
        blocks((p.F + kKMeansLanes - 1) / kKMeansLanes),
        stride(p.F * kKMeansLanes),
        matrix(allocate(at(blocks * stride))) {}

  const double* block(Index b) const { return matrix.get() + b * stride; }
  // Of rows j and i; neighbouring j lie side by side.
  double distance(Index j, Index i) const { return block(j / kKMeansLanes)[i * kKMeansLanes + j % kKMeansLanes]; }
  // Whether to leave everything as it is; on the calling thread this looks for Ctrl-C.
  bool stop() {
    if (!stopped && interrupt.poll && std::this_thread::get_id() == caller) {
      stopped = interrupt.poll(interrupt.context, done.load(std::memory_order_relaxed));
    }
    return stopped;
  }
  Index rows_of(Index b) const { return std::min<Index>(kKMeansLanes, F - b * kKMeansLanes); }
};

// Runs items, looking for Ctrl-C in between.
template <class Task>
void run(Call& call, Index items, double additions, const Task& task) {
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
  const auto poll = [](void* raw) { return static_cast<Context*>(raw)->call.stop(); };
  const int threads = additions / kAdditionsASecond < kSerialSeconds ? 1 : std::max(call.threads, 1);
  const bool finished = parallel_for(items, threads, invoke, &context, poll, &context);
  if (!finished) throw Interrupted();
  if (call.out_of_memory) throw std::bad_alloc();
}

void centre(Call& call) {
  const Index F = call.F, C = call.C;
  std::vector<double> mean(at(C), 0.0);
  for (Index f = 0; f < F; ++f) {
    for (Index c = 0; c < C; ++c) mean[at(c)] += call.problem.X[f * C + c];
  }
  for (double& m : mean) m /= static_cast<double>(F);
  call.X.resize(at(F * C));
  call.norm.assign(at(F), 0.0);
  for (Index f = 0; f < F; ++f) {
    for (Index c = 0; c < C; ++c) {
      const double x = call.problem.X[f * C + c] - mean[at(c)];
      call.X[at(f * C + c)] = x;
      call.norm[at(f)] += x * x;
    }
  }
}

// Fills the matrix with squared distances and returns the largest.
double fill(Call& call) {
  const Index F = call.F, C = call.C, padded = call.blocks * kKMeansLanes;
  std::vector<double> columns(at(padded * C), 0.0), largest(at(call.blocks), 0.0);
  for (Index f = 0; f < F; ++f) {
    for (Index c = 0; c < C; ++c) columns[at(c * padded + f)] = call.problem.X[f * C + c];
  }
  for (Index f = F; f < padded; ++f) {  // copies of the last row: no distance is larger for them
    for (Index c = 0; c < C; ++c) columns[at(c * padded + f)] = columns[at(c * padded + F - 1)];
  }
  run(call, call.blocks, static_cast<double>(F * F * (C + 8)), [&](Index b) {
    largest[at(b)] =
        call.variant.distances(columns.data(), F, C, padded, b * kKMeansLanes, call.matrix.get() + b * call.stride);
  });
  return *std::max_element(largest.begin(), largest.end());
}

// Phase 1: seeds.
//
// The first K seeds of a restart are seeds for K, so one sequence serves all K. What a new seed changes is written
// down: few rows are nearer to it than to the two nearest before.
struct Seeds {
  struct Change {
    Row row, cluster;
    double second;  // squared distance to the second nearest seed
  };
  std::vector<Row> order;
  std::vector<Change> changes;
  std::vector<std::size_t> until;  // [k]: changes that the first k + 1 seeds have made
};

class Seeding {
 public:
  Seeding(const Call& call, int restart)
      : call_(call),
        random_(call.problem.seed, static_cast<std::uint64_t>(restart)),
        closest_(at(call.blocks * kKMeansLanes), 0.0),
        second_(at(call.F), kInfinity),
        nearest_(at(call.F), -1),
        sums_(at(call.F)) {
    std::fill_n(closest_.begin(), call.F, kInfinity);
  }

  Seeds run() {
    const Index F = call_.F;
    add(std::min(static_cast<Index>(random_.uniform() * static_cast<double>(F)), F - 1));
    while (static_cast<Index>(seeds_.order.size()) < call_.problem.k_max) add(choose());
    return std::move(seeds_);
  }

 private:
  // The best of a few rows, drawn with probabilities proportional to their squared distance to the nearest seed.
  Index choose() {
    std::partial_sum(closest_.begin(), closest_.begin() + call_.F, sums_.begin());
    const double total = sums_.back();
    if (!(total > 0)) return next_row();
    const int trials = 4 + static_cast<int>(2 * std::log(static_cast<double>(call_.F)));
    Index best = -1;
    double least = kInfinity;
    for (int t = 0; t < trials; ++t) {
      const double drawn = random_.uniform() * total;
      Index j = std::upper_bound(sums_.begin(), sums_.end(), drawn) - sums_.begin();
      for (j = std::min(j, call_.F - 1); !(closest_[at(j)] > 0);) j = j ? j - 1 : call_.F - 1;
      const double potential =
          call_.variant.potential(call_.matrix.get(), call_.blocks, call_.stride, j, closest_.data());
      if (potential < least) {
        least = potential;
        best = j;
      }
    }
    return best;
  }

  // Rows whose distance to a seed vanishes can still be clusters of their own.
  Index next_row() const {
    for (Index f = 0; f < call_.F; ++f) {
      if (seeds_.order[at(nearest_[at(f)])] != f) return f;
    }
    return 0;
  }

  void add(Index seed) {
    const Row k = static_cast<Row>(seeds_.order.size());
    seeds_.order.push_back(static_cast<Row>(seed));
    for (Index b = 0; b < call_.blocks; ++b) {
      const double* const to = call_.block(b) + seed * kKMeansLanes;
      for (Index l = 0; l < call_.rows_of(b); ++l) {
        const Index f = b * kKMeansLanes + l;
        double& closest = closest_[at(f)];
        double& second = second_[at(f)];
        if (to[l] >= second && f != seed) continue;
        if (to[l] < closest || f == seed) {
          second = closest;
          closest = to[l];
          nearest_[at(f)] = k;
        } else {
          second = to[l];
        }
        seeds_.changes.push_back({static_cast<Row>(f), nearest_[at(f)], second});
      }
    }
    seeds_.until.push_back(seeds_.changes.size());
  }

  const Call& call_;
  Random random_;
  std::vector<double> closest_, second_;
  std::vector<Row> nearest_;
  std::vector<double> sums_;
  Seeds seeds_;
};

// Phase 2: rounds, of one K and restart.
//
// The squared distance of row i to the centre of cluster k is sum_j d_ij / n - W with W = sum_jl d_jl / (2 n^2), so a
// round needs additions only. A row's cost at the clusters that did not change is at least `low`: where its own cost is
// not above that, only clusters that changed can win it over.
class Search {
 public:
  Search(const Call& call, Index k)
      : call_(call),
        K_(k),
        label_(at(call.blocks * kKMeansLanes), -1.0),
        cost_(at(call.F), 0.0),
        low_(at(call.F), kInfinity),
        target_(at(call.F), -1),
        member_(at(call.F)),
        start_(at(k + 1)),
        all_(at(k)),
        is_changed_(at(k), 0),
        spread_(at(k), 0.0),
        scale_(at(k), 1.0),
        offset_(at(k), 0.0),
        centre_(at(call.C)) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  Search(const Call& call, Index k, const Seeds& seeds) : Search(call, k) {
    for (std::size_t n = 0; n < seeds.until[at(k - 1)]; ++n) {
      const Seeds::Change& change = seeds.changes[n];
      label_[at(change.row)] = static_cast<double>(change.cluster);
      low_[at(change.row)] = change.second;
    }
    for (Index f = 0; f < call.F; ++f) cost_[at(f)] = call.distance(f, seeds.order[at(cluster_of(f))]);
    sort();
    for (Row i = 0; i < K_; ++i) {  // a single row is its own seed and centre
      if (size(i) > 1) change(i);
    }
  }

  // At rest after so many rounds.
  Search(const Call& call, Index k, const std::int16_t* labels, int rounds) : Search(call, k) {
    std::copy(labels, labels + call.F, label_.begin());
    rounds_ = rounds;
    sort();
  }

  bool active() const { return !changed_.empty(); }
  int rounds() const { return rounds_; }
  int exchanges() const { return exchanges_; }
  Index clusters() const { return K_; }
  Index cluster_of(Index f) const { return static_cast<Index>(label_[at(f)]); }

  // From whole rounds to single rows, whose gain counts the centres that move with them (Hartigan and Wong): a row is
  // worth n / (n - 1) of its squared distance where it is, n / (n + 1) where it would be.
  void exchange() {
    exchanging_ = true;
    lloyd_rounds_ = rounds_;
    rounds_ = 0;
    std::fill(low_.begin(), low_.end(), kInfinity);
    for (Row k = 0; k < K_; ++k) change(k);
  }
  int lloyd_rounds() const { return exchanging_ ? lloyd_rounds_ : rounds_; }

  void begin_round() {
    for (const Row k : changed_) {
      spread_[at(k)] = spread(k);
      const double n = static_cast<double>(size(k)), share = exchanging_ ? n / (n + 1) : 1;
      scale_[at(k)] = share / n;
      offset_[at(k)] = share * spread_[at(k)];
    }
  }

  void scan(Index b) {
    const double* const block = call_.block(b);
    const double* const label = label_.data() + b * kKMeansLanes;
    const KMeansClusters clusters = {member_.data(), start_.data(), scale_.data(), offset_.data()};
    KMeansNearest found;
    call_.variant.nearest(block, clusters, changed_.data(), static_cast<Index>(changed_.size()), label, &found);
    bool lost = false;
    const Index rows = call_.rows_of(b), first = b * kKMeansLanes;
    for (Index l = 0; l < rows; ++l) {
      const Index f = first + l, k = static_cast<Index>(label[l]);
      if (is_changed_[at(k)]) cost_[at(f)] = own_cost(k, found.own[l]);
      lost = lost || !settle(f, found.best[l], found.second[l], found.cluster[l], low_[at(f)]);
    }
    if (!lost) return;
    call_.variant.nearest(block, clusters, all_.data(), K_, label, &found);
    for (Index l = 0; l < rows; ++l) settle(first + l, found.best[l], found.second[l], found.cluster[l], kInfinity);
  }

  // Moves rows and says so by which clusters changed.
  void end_round() {
    for (const Row k : changed_) is_changed_[at(k)] = 0;
    changed_.clear();
    if (++rounds_ > call_.problem.max_iter) return;
    exchanging_ ? move_one_by_one() : move_together();
    if (active()) sort();
  }

  double inertia() const {
    double sum = 0;
    for (Row k = 0; k < K_; ++k) sum += spread(k) * static_cast<double>(size(k));
    return sum;
  }

 private:
  Index size(Index k) const { return start_[at(k + 1)] - start_[at(k)]; }
  const Row* members(Index k) const { return member_.data() + start_[at(k)]; }

  void change(Index k) {
    if (is_changed_[at(k)]) return;
    is_changed_[at(k)] = 1;
    changed_.push_back(static_cast<Row>(k));
  }

  // Members by cluster, ascending.
  void sort() {
    std::fill(start_.begin(), start_.end(), 0);
    for (Index f = 0; f < call_.F; ++f) ++start_[at(cluster_of(f) + 1)];
    std::partial_sum(start_.begin(), start_.end(), start_.begin());
    std::vector<Row>& next = next_;
    next.assign(start_.begin(), start_.end() - 1);
    for (Index f = 0; f < call_.F; ++f) member_[at(next[at(cluster_of(f))]++)] = static_cast<Row>(f);
    std::sort(changed_.begin(), changed_.end());
  }

  // Mean squared distance of the members to their centre: by pairs, or by coordinates where that is less work.
  double spread(Index k) const {
    const Index n = size(k), C = call_.C;
    const Row* const row = members(k);
    const double count = static_cast<double>(n);
    double sum = 0;
    if (4 * n <= C || n < 4) {
      for (Index i = 1; i < n; ++i) {
        for (Index j = 0; j < i; ++j) sum += call_.distance(row[j], row[i]);
      }
      return sum / (count * count);
    }
    std::fill(centre_.begin(), centre_.end(), 0.0);
    call_.variant.add_rows(call_.X.data(), C, row, n, centre_.data());
    for (Index i = 0; i < n; ++i) sum += call_.norm[at(row[i])];
    double square = 0;
    for (const double c : centre_) square += c * c;
    return std::max((sum - square / count) / count, 0.0);
  }

  double own_cost(Index k, double sum) const {
    const double n = static_cast<double>(size(k));
    const double d = sum / n - spread_[at(k)];
    return exchanging_ && n > 1 ? d * (n / (n - 1)) : d;
  }

  // Decides where row f goes, given the best of the clusters that were scanned and that others cost at least `low`.
  // False if that does not decide it.
  bool settle(Index f, double best, double second, double cluster, double low) {
    const double limit = cost_[at(f)] - call_.tolerance;
    target_[at(f)] = -1;
    low_[at(f)] = std::min(low, best);
    if (size(cluster_of(f)) == 1 || limit <= low_[at(f)]) return true;
    if (best >= low) return false;  // on a tie the first in order wins, which may not have been scanned
    target_[at(f)] = static_cast<Row>(cluster);
    low_[at(f)] = std::min(low, second);
    return true;
  }

  // All rows at once, to the nearest centre; the last of a cluster stays, and becomes its centre.
  void move_together() {
    left_.resize(at(K_));
    for (Index k = 0; k < K_; ++k) left_[at(k)] = static_cast<Row>(size(k));
    for (Index f = 0; f < call_.F; ++f) {
      const Index from = cluster_of(f), to = target_[at(f)];
      if (to < 0) continue;
      if (left_[at(from)] == 1) {
        low_[at(f)] = -kInfinity;
        continue;
      }
      --left_[at(from)];
      ++left_[at(to)];
      move(f, from, to);
    }
  }

  // One after the other, each after looking again at what the ones before have left.
  void move_one_by_one() {
    moved_.clear();
    left_.resize(at(K_));
    for (Index k = 0; k < K_; ++k) left_[at(k)] = static_cast<Row>(size(k));
    for (Index f = 0; f < call_.F; ++f) {
      const Index from = cluster_of(f), to = target_[at(f)];
      if (to < 0) continue;
      low_[at(f)] = -kInfinity;
      if (left_[at(from)] == 1) continue;
      const double a = static_cast<double>(left_[at(from)]), b = static_cast<double>(left_[at(to)]);
      const double leaving = sum_to(from, f), joining = sum_to(to, f);
      const double worth = (leaving / a - spread_[at(from)]) * (a / (a - 1));
      const double price = (joining / b - spread_[at(to)]) * (b / (b + 1));
      if (!(price < worth - call_.tolerance)) continue;
      spread_[at(from)] = (spread_[at(from)] * a * a - leaving) / ((a - 1) * (a - 1));
      spread_[at(to)] = (spread_[at(to)] * b * b + joining) / ((b + 1) * (b + 1));
      --left_[at(from)];
      ++left_[at(to)];
      move(f, from, to);
      moved_.push_back(static_cast<Row>(f));
      ++exchanges_;
    }
  }

  void move(Index f, Index from, Index to) {
    label_[at(f)] = static_cast<double>(to);
    change(from);
    change(to);
  }

  // Sum of squared distances of the present members of a cluster to row f.
  double sum_to(Index k, Index f) const {
    double sum = 0;
    for (const Row* j = members(k); j < members(k + 1); ++j) {
      if (cluster_of(*j) == k) sum += call_.distance(*j, f);
    }
    for (const Row j : moved_) {
      if (cluster_of(j) == k) sum += call_.distance(j, f);
    }
    return sum;
  }

  const Call& call_;
  const Index K_;
  std::vector<double> label_, cost_, low_;
  std::vector<Row> target_, member_, start_, all_, changed_, next_, left_, moved_;
  std::vector<char> is_changed_;
  std::vector<double> spread_, scale_, offset_;
  mutable std::vector<double> centre_;
  bool exchanging_ = false;
  int rounds_ = 0, lloyd_rounds_ = 0, exchanges_ = 0;
};

void run_rounds(Call& call, const std::vector<Search*>& searches) {
  std::vector<Search*> active;
  const auto keep_active = [&](const std::vector<Search*>& from) {
    std::vector<Search*> next;
    for (Search* search : from) {
      if (search->active()) next.push_back(search);
    }
    active.swap(next);
  };
  for (keep_active(searches); !active.empty() && !call.stop(); keep_active(active)) {
    for (Search* search : active) search->begin_round();
    for (Index b = 0; b < call.blocks; ++b) {
      for (Search* search : active) search->scan(b);
    }
    for (Search* search : active) search->end_round();
  }
}

// The best of its restarts for some K, refined if asked, to the results.
void finish_some(Call& call, const std::vector<Search*>& winners) {
  if (call.problem.refine) {
    for (Search* winner : winners) winner->exchange();
    run_rounds(call, winners);
  }
  std::vector<std::int32_t> number;
  for (const Search* winner : winners) {
    const Index K = winner->clusters(), place = K - call.problem.k_min;
    std::int32_t* const labels = call.result.labels + place * call.F;
    number.assign(at(K), -1);
    std::int32_t next = 0;
    for (Index f = 0; f < call.F; ++f) {
      std::int32_t& own = number[at(winner->cluster_of(f))];
      if (own < 0) own = next++;
      labels[f] = own;
    }
    call.result.inertia[place] = winner->inertia();
    call.result.rounds[place] = winner->lloyd_rounds();
    call.result.exchanges[place] = winner->exchanges();
  }
  call.done += static_cast<Index>(winners.size());
}

Index least(const double* inertia, Index count) {
  return std::min_element(inertia, inertia + count) - inertia;
}

// All restarts of K in [k, k + count).
void search_some(Call& call, const std::vector<Seeds>& seeds, Index k, Index count) {
  std::vector<std::unique_ptr<Search>> searches;
  std::vector<Search*> all, winners;
  for (Index i = 0; i < count; ++i) {
    for (const Seeds& one : seeds) {
      searches.push_back(std::make_unique<Search>(call, k + i, one));
      all.push_back(searches.back().get());
    }
  }
  run_rounds(call, all);
  if (call.stopped) return;
  const Index n_init = static_cast<Index>(seeds.size());
  std::vector<double> inertia;
  for (const Search* search : all) inertia.push_back(search->inertia());
  for (Index i = 0; i < count; ++i) winners.push_back(all[at(i * n_init + least(&inertia[at(i * n_init)], n_init))]);
  finish_some(call, winners);
}

// All restarts of every K somewhere else.
void search_elsewhere(Call& call, const std::vector<Seeds>& seeds, KMeansElsewhere elsewhere) {
  const KMeansProblem& problem = call.problem;
  const Index F = call.F, Ks = problem.k_max - problem.k_min + 1, n_init = problem.n_init;
  std::vector<std::int32_t> first(at(n_init * (F + 1)), 0), rounds(at(Ks * n_init));
  std::vector<std::int64_t> base;
  std::vector<KMeansSeed> changes;
  for (Index r = 0; r < n_init; ++r) {  // the log by rows
    base.push_back(static_cast<std::int64_t>(changes.size()));
    const Seeds& own = seeds[at(r)];
    std::int32_t* const start = first.data() + r * (F + 1);
    for (const Seeds::Change& change : own.changes) ++start[change.row + 1];
    std::partial_sum(start, start + F + 1, start);
    changes.resize(changes.size() + own.changes.size());
    std::vector<std::int32_t> next(start, start + F);
    std::size_t n = 0;
    for (std::size_t step = 0; step < own.until.size(); ++step) {
      for (; n < own.until[step]; ++n) {
        const Seeds::Change& change = own.changes[n];
        changes[at(base.back() + next[at(change.row)]++)] = {static_cast<std::int32_t>(step), change.cluster};
      }
    }
  }
  std::vector<std::int16_t> labels(at(Ks * n_init * F));
  std::vector<double> inertia(at(Ks * n_init));
  const KMeansBatch batch = {call.matrix.get(),
                             call.stride,
                             first.data(),
                             base.data(),
                             changes.data(),
                             labels.data(),
                             inertia.data(),
                             rounds.data(),
                             call.tolerance,
                             static_cast<std::int32_t>(F),
                             static_cast<std::int32_t>(problem.k_min),
                             static_cast<std::int32_t>(Ks),
                             problem.n_init,
                             problem.max_iter};
  if (!elsewhere.run(batch, call.interrupt, elsewhere.option)) throw Interrupted();
  run(call, Ks, static_cast<double>(Ks * F * F), [&](Index i) {
    const Index best = i * n_init + least(&inertia[at(i * n_init)], n_init);
    Search winner(call, problem.k_min + i, &labels[at(best * F)], rounds[at(best)]);
    finish_some(call, {&winner});
  });
}

// Phase 3: silhouettes of `count` labellings from `place` on, off one pass over the distances.
class Judged {
 public:
  Judged(const Call& call, Index place)
      : call_(call),
        K_(call.problem.k_min + place),
        labels_(call.result.labels + place * call.F),
        silhouettes_(call.result.silhouettes + place * call.F),
        label_(at(call.blocks * kKMeansLanes), -1.0),
        member_(at(call.F)),
        start_(at(K_ + 1), 0),
        all_(at(K_)),
        scale_(at(K_)),
        offset_(at(K_), 0.0) {
    std::iota(all_.begin(), all_.end(), 0);
    for (Index f = 0; f < call.F; ++f) {
      label_[at(f)] = static_cast<double>(labels_[f]);
      ++start_[at(labels_[f] + 1)];
    }
    std::partial_sum(start_.begin(), start_.end(), start_.begin());
    std::vector<Row> next(start_.begin(), start_.end() - 1);
    for (Index f = 0; f < call.F; ++f) member_[at(next[at(labels_[f])]++)] = static_cast<Row>(f);
    for (Index k = 0; k < K_; ++k) scale_[at(k)] = 1.0 / static_cast<double>(size(k));
  }

  void judge(Index b) {
    KMeansNearest found;
    call_.variant.nearest(call_.block(b), {member_.data(), start_.data(), scale_.data(), offset_.data()}, all_.data(),
                          K_, label_.data() + b * kKMeansLanes, &found);
    for (Index l = 0; l < call_.rows_of(b); ++l) {
      const Index f = b * kKMeansLanes + l, n = size(labels_[f]);
      const double within = n > 1 ? found.own[l] / static_cast<double>(n - 1) : 0,
                   larger = std::max(within, found.best[l]);
      silhouettes_[f] = n > 1 && larger > 0 ? (found.best[l] - within) / larger : 0;
    }
  }

  double mean() const {
    double sum = 0;
    for (Index f = 0; f < call_.F; ++f) sum += silhouettes_[f];
    return sum / static_cast<double>(call_.F);
  }

 private:
  Index size(Index k) const { return start_[at(k + 1)] - start_[at(k)]; }

  const Call& call_;
  const Index K_;
  const std::int32_t* labels_;
  double* silhouettes_;
  std::vector<double> label_;
  std::vector<Row> member_, start_, all_;
  std::vector<double> scale_, offset_;
};

void judge_some(const Call& call, Index place, Index count) {
  std::vector<std::unique_ptr<Judged>> all;
  for (Index i = 0; i < count; ++i) all.push_back(std::make_unique<Judged>(call, place + i));
  for (Index b = 0; b < call.blocks; ++b) {
    for (const auto& one : all) one->judge(b);
  }
  for (Index i = 0; i < count; ++i) call.result.score[place + i] = all[at(i)]->mean();
}

}  // namespace

KMeansEnd k_search(const KMeansProblem& problem, const KMeansVariant& variant, int threads,
                   const KMeansInterrupt& interrupt, const KMeansResult& result, KMeansElsewhere elsewhere) try {
  Call call(problem, variant, interrupt, result, threads);
  const Index Ks = problem.k_max - problem.k_min + 1, n_init = problem.n_init;
  const double every = static_cast<double>(call.F) * static_cast<double>(call.F) * static_cast<double>(Ks);
  centre(call);
  const double largest = fill(call);
  if (!std::isfinite(largest)) return KMeansEnd::overflow;
  call.tolerance = largest * static_cast<double>(call.F) * 0x1p-51;

  std::vector<Seeds> seeds(at(n_init));
  run(call, n_init, 10 * every / static_cast<double>(call.F) * static_cast<double>(n_init),
      [&](Index r) { seeds[at(r)] = Seeding(call, static_cast<int>(r)).run(); });

  const Index share = std::max<Index>(Ks / (4 * std::max(threads, 1)), 1);
  const auto pieces = [&](Index count) { return (Ks + count - 1) / count; };
  const Index some = std::min(share, (kSideBySide + n_init - 1) / n_init);
  if (elsewhere.run) {
    search_elsewhere(call, seeds, elsewhere);
  } else {
    run(call, pieces(some), 2 * every * static_cast<double>(n_init),
        [&](Index i) { search_some(call, seeds, problem.k_min + i * some, std::min(some, Ks - i * some)); });
  }

  run(call, call.blocks, static_cast<double>(call.F * call.F),
      [&](Index b) { variant.roots(call.matrix.get() + b * call.stride, call.stride); });
  const Index many = std::min(share, kSideBySide);
  run(call, pieces(many), every, [&](Index i) { judge_some(call, i * many, std::min(many, Ks - i * many)); });
  return KMeansEnd::done;
} catch (const Interrupted&) {
  return KMeansEnd::interrupted;
}

}  // namespace pyprune
