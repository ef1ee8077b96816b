// Cuts a batch into work items, runs a variant over blocks of maps, and gathers what the first bracket of sigma_max
// left undecided into new, full blocks; what still resists goes to the tridiagonal path.
#include "pyprune/rank.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "pyprune/pool.h"

namespace pyprune {
namespace {

constexpr double kSerialSeconds = 1e-3;  // waking threads costs tens of microseconds
constexpr double kItemSeconds = 2e-4;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// What one thread needs while it works on an item.
struct Scratch {
  Memory memory;
  std::vector<std::ptrdiff_t> index;  // of the maps of an item that are still undecided

  Scratch(std::size_t bytes, std::ptrdiff_t per_item)
      : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), index(static_cast<std::size_t>(per_item)) {
    if (!memory) throw std::bad_alloc();
  }
};

// The scratches of one call, as many as threads meet in it. They are no thread_local objects: those of a library that
// is loaded late are freed behind a thread's back (ThreadSanitizer reports it), and would stay as large as the largest
// call ever made.
class Scratches {
 public:
  std::unique_ptr<Scratch> take(std::size_t bytes, std::ptrdiff_t per_item) {
    {
      std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
      }
    }
    return std::make_unique<Scratch>(bytes, per_item);
  }
  void give_back(std::unique_ptr<Scratch> scratch) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

struct Batch {
  const Maps& maps;
  const double rtol;
  const RankVariant& variant;
  const Layout layout;
  const std::ptrdiff_t count, per_item;
  std::int32_t* const ranks;
  const std::size_t bytes;  // of workspace
  Scratches scratches{};
  std::atomic<bool> out_of_memory{false};

  const void* map(std::ptrdiff_t i) const {
    const std::ptrdiff_t offset = i / maps.C * maps.stride_n + i % maps.C * maps.stride_c;
    return static_cast<const char*>(maps.data) + offset * bytes_of(maps.element);
  }
  bool one_at_a_time(std::size_t used) const {
    const Layout best = rank_layout(variant, maps.shape, static_cast<std::ptrdiff_t>(used));
    return (layout == Layout::automatic ? best : layout) == Layout::inside;
  }
  std::int32_t run_inside(const void* map, void* workspace) const {
    return variant.run_inside(map, maps.shape, maps.element, rtol, workspace);
  }
};

// Ranks of `count` maps from `first` on; returns how many stay undecided and lists them in index.
std::size_t sweep(const Batch& batch, std::ptrdiff_t first, std::size_t count, void* workspace, std::ptrdiff_t* index) {
  const std::size_t lanes = static_cast<std::size_t>(batch.variant.lanes);
  const std::ptrdiff_t step = batch.maps.stride_c * bytes_of(batch.maps.element);
  std::ptrdiff_t channel = first % batch.maps.C;  // divisions for every map would take longer than the smallest maps
  const char* map = static_cast<const char*>(batch.map(first));
  const void* maps[kMaxLanes];
  std::int32_t padded[kMaxLanes];
  std::size_t undecided = 0;
  for (std::size_t start = 0; start < count; start += lanes) {
    const std::size_t used = std::min(lanes, count - start);
    const std::ptrdiff_t block = first + static_cast<std::ptrdiff_t>(start);
    for (std::size_t l = 0; l < used; ++l) {
      maps[l] = map;
      map += step;
      if (++channel == batch.maps.C) {
        channel = 0;
        map = static_cast<const char*>(batch.map(block + static_cast<std::ptrdiff_t>(l) + 1));
      }
    }
    if (batch.one_at_a_time(used)) {
      for (std::size_t l = 0; l < used; ++l) {
        const std::ptrdiff_t i = block + static_cast<std::ptrdiff_t>(l);
        batch.ranks[i] = batch.run_inside(maps[l], workspace);
        if (batch.ranks[i] == kRankUndecided) index[undecided++] = i;
      }
      continue;
    }
    std::fill(maps + used, maps + lanes, maps[used - 1]);
    std::int32_t* ranks = used == lanes ? batch.ranks + block : padded;
    const bool open =
        batch.variant.run(maps, batch.maps.shape, batch.maps.element, batch.rtol, false, workspace, ranks);
    if (used < lanes) std::copy(padded, padded + used, batch.ranks + block);
    if (!open) continue;
    for (std::size_t l = 0; l < used; ++l) {
      if (ranks[l] == kRankUndecided) index[undecided++] = block + static_cast<std::ptrdiff_t>(l);
    }
  }
  return undecided;
}

// The same with all effort for the maps in index; moves those that stay undecided to its front.
std::size_t refine(const Batch& batch, std::ptrdiff_t* index, std::size_t count, void* workspace) {
  const std::size_t lanes = static_cast<std::size_t>(batch.variant.lanes);
  const void* maps[kMaxLanes];
  std::int32_t ranks[kMaxLanes];
  std::size_t undecided = 0;
  for (std::size_t start = 0; start < count; start += lanes) {
    const std::size_t used = std::min(lanes, count - start);
    for (std::size_t l = 0; l < lanes; ++l) maps[l] = batch.map(index[start + std::min(l, used - 1)]);
    if (batch.one_at_a_time(used)) {
      for (std::size_t l = 0; l < used; ++l) ranks[l] = batch.run_inside(maps[l], workspace);
    } else {
      batch.variant.run(maps, batch.maps.shape, batch.maps.element, batch.rtol, true, workspace, ranks);
    }
    for (std::size_t l = 0; l < used; ++l) {
      const std::ptrdiff_t i = index[start + l];
      batch.ranks[i] = ranks[l];
      if (ranks[l] == kRankUndecided) index[undecided++] = i;
    }
  }
  return undecided;
}

void run_item(Batch& batch, std::ptrdiff_t item) {
  const std::ptrdiff_t first = item * batch.per_item;
  std::unique_ptr<Scratch> scratch = batch.scratches.take(batch.bytes, batch.per_item);
  void* memory = scratch->memory.get();
  std::ptrdiff_t* index = scratch->index.data();
  const std::size_t count = static_cast<std::size_t>(std::min(batch.per_item, batch.count - first));
  std::size_t left = sweep(batch, first, count, memory, index);
  if (!batch.one_at_a_time(static_cast<std::size_t>(batch.variant.lanes))) {
    left = refine(batch, index, left, memory);
  }
  for (std::size_t i = 0; i < left; ++i) {
    batch.ranks[index[i]] = rank_tridiagonal(batch.map(index[i]), batch.maps.shape, batch.maps.element, batch.rtol,
                                             static_cast<double*>(memory));
  }
  batch.scratches.give_back(std::move(scratch));
}

void task(void* context, std::ptrdiff_t item) {
  Batch& batch = *static_cast<Batch*>(context);
  try {
    run_item(batch, item);
  } catch (const std::bad_alloc&) {
    batch.out_of_memory = true;
  }
}

// Rough cost of one map on an AVX-512 thread; others take up to four times as long.
double seconds_of(const MapShape& shape) {
  const double m = static_cast<double>(short_side(shape)), n = static_cast<double>(long_side(shape));
  return (100 + 2 * m * n + m * m * n / 8 + m * m * m / 12) * 1e-10;
}

}  // namespace

// Measured (benchmarks/rank_layouts.py): on AVX-512 a map of 112 x 112 takes 33 us alone and 34 us in a full block, on
// AVX2 53 and 54; and a block costs the same however few of its lanes are used.
Layout rank_layout(const RankVariant& variant, const MapShape& shape, std::ptrdiff_t maps) {
  return maps * variant.inside_slope <= short_side(shape) + variant.inside_offset ? Layout::inside : Layout::lanes;
}

bool rank_maps(const Maps& maps, double rtol, const RankVariant& variant, Layout layout, int threads,
               std::int32_t* ranks, PoolPoll poll, void* poll_context) {
  const double seconds = seconds_of(maps.shape);
  const std::ptrdiff_t count = maps.N * maps.C;
  const Layout full = layout == Layout::automatic ? rank_layout(variant, maps.shape, variant.lanes) : layout;
  const std::ptrdiff_t lanes = full == Layout::inside ? 1 : variant.lanes;
  const std::ptrdiff_t blocks = static_cast<std::ptrdiff_t>(kItemSeconds / (seconds * static_cast<double>(lanes))) + 1;
  if (seconds * static_cast<double>(count) < kSerialSeconds) threads = 1;
  const std::ptrdiff_t per_item = std::min(blocks * lanes, count);
  const std::size_t bytes =
      std::max({lanes == 1 ? 0 : variant.workspace(maps.shape), variant.inside_workspace(maps.shape),
                rank_tridiagonal_workspace(maps.shape) * sizeof(double)});
  Batch batch{maps, rtol, variant, layout, count, per_item, ranks, bytes};
  const std::ptrdiff_t items = (count + per_item - 1) / per_item;
  const bool finished = parallel_for(items, threads, task, &batch, poll, poll_context);
  if (batch.out_of_memory) throw std::bad_alloc();
  return finished;
}

}  // namespace pyprune
