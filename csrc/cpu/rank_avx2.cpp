#define PYPRUNE_LANES 4
#include "rank_kernel.h"
//
#include "rank_inside.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

extern const RankVariant kRankAvx2 = {
    "cpu_avx2",   "AVX2, FMA and F16C", supported,      kLanes, workspace_bytes, run_block, 32, 24,
    inside_bytes, run_inside,           kSpin * kLanes, spin};

}  // namespace pyprune
