#include "pyprune/rank.h"
#ifndef PYPRUNE_LANES
#define PYPRUNE_LANES 2
#endif
namespace pyprune {
namespace {
constexpr int kLanes = PYPRUNE_LANES;
std::size_t workspace_bytes(const MapShape&, bool) {
  return 64;
}
void run_block(const void* const*, const MapShape&, bool, double, bool, void*, std::int32_t* ranks) {
  for (int l = 0; l < kLanes; ++l) ranks[l] = kRankUndecided;
}
}  // namespace
}  // namespace pyprune
