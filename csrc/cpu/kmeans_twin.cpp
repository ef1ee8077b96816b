// The rounds of csrc/cuda/kmeans.cu run on the host: the same header, the same operations.
#include <vector>

#include "pyprune/kmeans.h"
#include "pyprune/kmeans_steps.h"

namespace pyprune {

bool kmeans_twin(const KMeansBatch& batch, const KMeansInterrupt& interrupt, int backwards) {
  const HostTeam team(kKMeansThreads, backwards != 0);
  std::vector<double> memory(static_cast<std::size_t>(KMeansScratch::bytes(batch.F) / 8 + 1));
  const std::int64_t problems = static_cast<std::int64_t>(batch.Ks) * batch.n_init;
  for (std::int64_t p = 0; p < problems; ++p) {
    kmeans_rounds(team, batch, backwards ? problems - 1 - p : p, memory.data());
    if (interrupt.poll && interrupt.poll(interrupt.context, 0)) return false;
  }
  return true;
}

}  // namespace pyprune
