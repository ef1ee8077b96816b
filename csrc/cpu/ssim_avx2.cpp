#define PYPRUNE_LANES 4
#include "ssim_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

extern const SsimVariant kSsimAvx2 = {"cpu_avx2", "AVX2 and FMA", supported, 8e8, scan, prepare, all, each};

}  // namespace pyprune
