// What the compiler's target machine always has: SSE2 on x86-64, NEON on arm64.
#include "ssim_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return true;
}
}  // namespace

extern const SsimVariant kSsimBaseline = {"cpu_baseline", "any CPU", supported, 2e8, scan, prepare, all, each};

}  // namespace pyprune
