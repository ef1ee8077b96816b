// The rank kernel of a GPU, run on the host to prove it there.
#pragma once

#include "pyprune/rank_cuda.h"

namespace pyprune {

// Ranks of maps in host memory, and the path that decided each. backwards: the threads of a phase from last to first.
void rank_twin(const RankCudaBatch& batch, bool backwards, std::uint8_t* paths);

// What a team of this size makes of one value for each thread.
void twin_reduce(const double* values, int size, double* sum, double* max);

}  // namespace pyprune
