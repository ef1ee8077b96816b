// The kernel SSIM kernels of a GPU, run on the host: the same headers, the same operations. Only reciprocal, logarithm
// and power, single instructions of a GPU, round differently here.
#include <vector>

#include "pyprune/ssim_tile.h"

namespace pyprune {
namespace {

// f(block) for all blocks of a launch, in either order.
template <class F>
void for_blocks(std::int64_t count, bool backwards, const F& f) {
  for (std::int64_t block = 0; block < count; ++block) f(backwards ? count - 1 - block : block);
}

template <class T, int kK>
void all_tiles(const SsimItem& item, const HostTeam& team, bool backwards) {
  const SsimLayout<T> layout(item);
  for_blocks(layout.tiles * layout.runs, backwards, [&](std::int64_t block) {
    std::vector<Pair> memory(layout.shared_bytes() / sizeof(Pair));
    ssim_tile<T, kK>(team, item, block, memory.data());
  });
}

template <class T>
void all_pairs(const SsimItem& item, bool backwards) {
  const HostTeam team(32, backwards);
  for_blocks(item.pair_count, backwards, [&](std::int64_t pair) { ssim_pair<T>(team, item, pair); });
}

}  // namespace

void ssim_twin(const std::vector<SsimItem>& items, Counter* not_finite, bool backwards, int worst) {
  ssim_worst = worst;
  const HostTeam team(kSsimThreads, backwards);
  for (const SsimItem& item : items) {
    for_blocks(ssim_parts(item), backwards, [&](std::int64_t part) { ssim_scan(team, item, part); });
    for_blocks(ssim_slice_blocks(item), backwards,
               [&](std::int64_t block) { ssim_prepare(team, item, block, not_finite); });
    const bool wide = ssim_head_of(item)->wide;
    if (item.pairs) {
      wide ? all_pairs<double>(item, backwards) : all_pairs<float>(item, backwards);
    } else if (wide) {
      all_tiles<double, 0>(item, team, backwards);
    } else if (item.K == 9) {
      all_tiles<float, 9>(item, team, backwards);
    } else {
      all_tiles<float, 0>(item, team, backwards);
    }
  }
  ssim_worst = 0;
}

}  // namespace pyprune
