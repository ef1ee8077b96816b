// Cuts a batch into work items, runs a variant over blocks of maps, and gathers what the first bracket of sigma_max
// left undecided into new, full blocks; what still resists goes to the tridiagonal path.
#include "pyprune/rank.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

#include "pyprune/pool.h"

namespace pyprune {
namespace {

constexpr double kSerialSeconds = 1e-3;  // waking threads costs tens of microseconds
constexpr double kItemSeconds = 2e-4;

class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, size_);
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

struct Batch {
  const Maps& maps;
  const double rtol;
  const RankVariant& variant;
  const std::ptrdiff_t first, last, per_item;
  std::int32_t* const ranks;
  std::atomic<bool> out_of_memory{false};

  const void* map(std::ptrdiff_t i) const {
    const std::ptrdiff_t offset = i / maps.C * maps.stride_n + i % maps.C * maps.stride_c;
    return static_cast<const char*>(maps.data) + offset * bytes_of(maps.element);
  }
};

// Ranks of the maps with these indices; returns how many stay undecided and moves their indices to the front.
std::size_t run_blocks(const Batch& batch, std::ptrdiff_t* index, std::size_t count, bool refine, void* workspace) {
  const std::size_t lanes = static_cast<std::size_t>(batch.variant.lanes);
  const void* maps[kMaxLanes];
  std::int32_t ranks[kMaxLanes];
  std::size_t undecided = 0;
  for (std::size_t start = 0; start < count; start += lanes) {
    const std::size_t used = std::min(lanes, count - start);
    for (std::size_t l = 0; l < lanes; ++l) maps[l] = batch.map(index[start + std::min(l, used - 1)]);
    batch.variant.run(maps, batch.maps.shape, batch.maps.element, batch.rtol, refine, workspace, ranks);
    for (std::size_t l = 0; l < used; ++l) {
      const std::ptrdiff_t i = index[start + l];
      batch.ranks[i] = ranks[l];
      if (ranks[l] == kRankUndecided) index[undecided++] = i;
    }
  }
  return undecided;
}

void run_item(Batch& batch, std::ptrdiff_t item) {
  thread_local Workspace workspace;
  thread_local std::vector<std::ptrdiff_t> index;
  const MapShape& shape = batch.maps.shape;
  const std::ptrdiff_t first = batch.first + item * batch.per_item;
  index.resize(static_cast<std::size_t>(std::min(batch.per_item, batch.last - first)));
  std::iota(index.begin(), index.end(), first);
  void* memory =
      workspace.reserve(std::max(batch.variant.workspace(shape), rank_tridiagonal_workspace(shape) * sizeof(double)));
  std::size_t left = run_blocks(batch, index.data(), index.size(), false, memory);
  left = run_blocks(batch, index.data(), left, true, memory);
  for (std::size_t i = 0; i < left; ++i) {
    batch.ranks[index[i]] =
        rank_tridiagonal(batch.map(index[i]), shape, batch.maps.element, batch.rtol, static_cast<double*>(memory));
  }
}

void task(void* context, std::ptrdiff_t item) {
  Batch& batch = *static_cast<Batch*>(context);
  try {
    run_item(batch, item);
  } catch (const std::bad_alloc&) {
    batch.out_of_memory = true;
  }
}

}  // namespace

double rank_seconds(const MapShape& shape) {
  const double m = static_cast<double>(short_side(shape)), n = static_cast<double>(long_side(shape));
  // Fits an AVX-512 thread; others take up to four times as long.
  return (100 + 2 * m * n + m * m * n / 8 + m * m * m / 12) * 1e-10;
}

void rank_maps(const Maps& maps, double rtol, const RankVariant& variant, int threads, std::ptrdiff_t first,
               std::ptrdiff_t last, std::int32_t* ranks) {
  const double seconds = rank_seconds(maps.shape);
  const std::ptrdiff_t count = last - first, lanes = variant.lanes;
  const std::ptrdiff_t blocks = static_cast<std::ptrdiff_t>(kItemSeconds / (seconds * static_cast<double>(lanes))) + 1;
  if (seconds * static_cast<double>(count) < kSerialSeconds) threads = 1;
  Batch batch{maps, rtol, variant, first, last, blocks * lanes, ranks};
  parallel_for((count + batch.per_item - 1) / batch.per_item, threads, task, &batch);
  if (batch.out_of_memory) throw std::bad_alloc();
}

}  // namespace pyprune
