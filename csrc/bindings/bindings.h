#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

namespace pyprune {

void register_kmeans(pybind11::module_& module);
void register_rank(pybind11::module_& module);
void register_rank_cuda(pybind11::module_& module);
void register_ssim(pybind11::module_& module);
void register_ssim_cuda(pybind11::module_& module);

// When a long call that gave up the GIL last looked for Ctrl-C.
struct Signals {
  std::chrono::steady_clock::time_point looked = std::chrono::steady_clock::now();
};

// A PoolPoll: looks for signals about every 50 ms. After true a Python exception is set on this thread.
bool poll_signals(void* signals);

}  // namespace pyprune
