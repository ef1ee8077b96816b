#define PYPRUNE_LANES 8
#include "kmeans_kernel.h"

namespace pyprune {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace

extern const KMeansVariant kKMeansAvx512 = {"cpu_avx512", supported, distances, roots, add_rows, potential, nearest};

}  // namespace pyprune
