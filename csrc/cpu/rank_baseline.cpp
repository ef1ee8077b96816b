// What the compiler's target machine always has: SSE2 on x86-64, NEON on arm64.
#include "rank_kernel.h"
//
#include "rank_inside.h"

namespace pyprune {
namespace {
bool supported() {
  return true;
}
}  // namespace

extern const RankVariant kRankBaseline = {"cpu_baseline", "any CPU", supported, kLanes,       workspace_bytes,
                                          run_block,      504,       496,       inside_bytes, run_inside,
                                          kSpin * kLanes, spin};

}  // namespace pyprune
