// A persistent pool of threads: fork-aware, safe for several callers at once, nothing to join at exit.
#pragma once

#include <cstddef>

namespace pyprune {

using PoolTask = void (*)(void* context, std::ptrdiff_t item);

// Runs task(context, i) for i in [0, items) on at most `threads` threads, the caller among them, and returns when all
// are done. Tasks must not throw.
void parallel_for(std::ptrdiff_t items, int threads, PoolTask task, void* context);

}  // namespace pyprune
