// What the compiler's target machine always has: SSE2 on x86-64, NEON on arm64.
#include "kmeans_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return true;
}
}  // namespace

extern const KMeansVariant kKMeansBaseline = {"cpu_baseline", supported, distances, roots,
                                              add_rows,       potential, nearest};

}  // namespace pyprune
