#define PYPRUNE_LANES 8
#include "ssim_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}
}  // namespace

extern const SsimVariant kSsimAvx512 = {"cpu_avx512", "AVX-512 F, VL and DQ", supported, 2e9, scan, prepare, all, each};

}  // namespace pyprune
