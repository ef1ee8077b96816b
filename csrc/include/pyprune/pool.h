// A persistent pool of threads: fork-aware, safe for several callers at once, nothing to join at exit.
#pragma once

#include <cstddef>

namespace pyprune {

using PoolTask = void (*)(void* context, std::ptrdiff_t item);

// Asked on the calling thread after each of its items; true stops the rest.
using PoolPoll = bool (*)(void* context);

// Runs task(context, i) for i in [0, items) on at most `threads` threads, the caller among them, and returns when all
// are done, or none is running any more after poll(poll_context) said stop; false then. Tasks and polls must not throw.
bool parallel_for(std::ptrdiff_t items, int threads, PoolTask task, void* context, PoolPoll poll = nullptr,
                  void* poll_context = nullptr);

}  // namespace pyprune
