#define PYPRUNE_LANES 8
#define PYPRUNE_BLOCK 4  // of 32 registers
#include "rank_kernel.h"
//
#include "rank_inside.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}
}  // namespace

extern const RankVariant kRankAvx512 = {
    "cpu_avx512", "AVX-512 F, VL and DQ", supported, kLanes, workspace_bytes, run_block, 14, 6, inside_bytes,
    run_inside,   kSpin * kLanes,         spin};

}  // namespace pyprune
