// The rank kernel of a GPU, run on the host: the same headers, the same operations in the same order.
#include "pyprune/rank_twin.h"

#include <vector>

#include "pyprune/rank_group.h"
#include "pyprune/rank_thread.h"
#include "pyprune/rank_tiles.h"

namespace pyprune {
namespace {

template <int kWidth>
Decision by_group(const MapView& map, double rtol, bool backwards) {
  std::vector<Pair> memory(GroupMemory<kWidth>::kDoubles / 2);
  double* const doubles = &memory[0].a;
  const HostTeam team(kWidth, backwards);
  return rank_by_group<kWidth>(team, map, rtol, doubles, [&](int first, int part) {
    team.each([&](int t) { stage_tile<kWidth>(map, first, part, t, doubles); });
  });
}

template <int kTile>
Decision by_tiles(const MapView& map, double rtol, bool backwards) {
  const TileLayout<kTile> layout(map.m);
  std::vector<Pair> memory(static_cast<std::size_t>(layout.doubles() + 1) / 2);
  return rank_by_tiles<kTile>(HostTeam(layout.threads, backwards), map, rtol, &memory[0].a);
}

Decision by_layout(const MapView& map, double rtol, int layout, bool backwards) {
  switch (layout) {
    case 0:
      return rank_by_thread(HostTeam(1, backwards), map, rtol);
    case 1:
      return by_group<8>(map, rtol, backwards);
    case 2:
      return by_group<16>(map, rtol, backwards);
    case 3:
      return by_group<32>(map, rtol, backwards);
    case 4:
      return by_tiles<4>(map, rtol, backwards);
    default:
      return by_tiles<8>(map, rtol, backwards);
  }
}

}  // namespace

void rank_twin(const RankCudaBatch& batch, bool backwards, std::uint8_t* paths) {
  const std::int64_t bytes = batch.type == 3 ? 8 : batch.type == 2 ? 4 : 2;
  for (std::int64_t i = 0; i < batch.N * batch.C; ++i) {
    const std::int64_t offset = i / batch.C * batch.stride_n + i % batch.C * batch.stride_c;
    const MapView map =
        view_map(static_cast<const char*>(batch.data) + offset * bytes, static_cast<MapType>(batch.type),
                 static_cast<int>(batch.H), static_cast<int>(batch.W), batch.stride_h, batch.stride_w);
    const Decision decision = by_layout(map, batch.rtol, batch.layout, backwards);
    batch.ranks[i] = decision.rank;
    paths[i] = static_cast<std::uint8_t>(decision.path);
  }
}

void twin_reduce(const double* values, int size, double* sum, double* max) {
  const HostTeam team(size, false);
  *sum = team.sum([&](int t) { return values[t]; });
  *max = team.max([&](int t) { return values[t]; });
}

}  // namespace pyprune
