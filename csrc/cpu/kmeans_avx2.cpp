#define PYPRUNE_LANES 4
#include "kmeans_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const KMeansVariant kKMeansAvx2 = {"cpu_avx2", supported, distances, roots, add_rows, potential, nearest};

}  // namespace pyprune
