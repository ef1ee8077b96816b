// The launches of Lloyd's rounds: a block for each K and restart. Built with -fmad=false: the host's twin
// (csrc/cpu/kmeans_twin.cpp) has the same operations.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pyprune/kmeans.h"
#include "pyprune/kmeans_steps.h"

namespace pyprune {
namespace {

constexpr int kBlocksOfOne = 4;  // of a multiprocessor, side by side
constexpr int kTurns = 4;        // problems of a block in one launch, between two looks for Ctrl-C

__global__ void __launch_bounds__(kKMeansThreads)
    rounds_kernel(const KMeansBatch batch, std::int64_t first, std::int64_t last, char* scratch, std::int64_t bytes) {
  const BlockTeam team(nullptr);
  for (std::int64_t p = first + blockIdx.x; p < last; p += gridDim.x) {
    kmeans_rounds(team, batch, p, scratch + blockIdx.x * bytes);
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("k_search: CUDA could not ") + what + ": " + cudaGetErrorString(status) + ".");
  }
}

// Memory of the device, filled from the host's if there is any.
template <class T>
class OnDevice {
 public:
  OnDevice(std::int64_t count, const T* from) : count_(static_cast<std::size_t>(count)) {
    check(cudaMalloc(&data_, count_ * sizeof(T)), "allocate memory");
    if (from) {
      const cudaError_t status = cudaMemcpy(data_, from, count_ * sizeof(T), cudaMemcpyHostToDevice);
      if (status != cudaSuccess) cudaFree(data_);
      check(status, "copy to the device");
    }
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* get() const { return data_; }
  void copy_to(T* to) const {
    check(cudaMemcpy(to, data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

// Restores the caller's device.
class Device {
 public:
  explicit Device(int device) {
    check(cudaGetDevice(&before_), "find the device");
    check(cudaSetDevice(device), "choose the device");
  }
  ~Device() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

}  // namespace

bool kmeans_cuda(const KMeansBatch& batch, const KMeansInterrupt& interrupt, int device) {
  const Device guard(device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "ask for the device");
  const std::int64_t problems = static_cast<std::int64_t>(batch.Ks) * batch.n_init;
  const std::int64_t blocks = (batch.F + 31) / 32, restarts = batch.n_init;
  const std::int64_t side_by_side = std::min<std::int64_t>(problems, processors * kBlocksOfOne);
  const std::int64_t bytes = (KMeansScratch::bytes(batch.F) + 255) / 256 * 256;
  std::int64_t changes = batch.base[restarts - 1] + batch.first[restarts * (batch.F + 1) - 1];

  const OnDevice<double> matrix(blocks * batch.stride, batch.matrix);
  const OnDevice<std::int32_t> first(restarts * (batch.F + 1), batch.first);
  const OnDevice<std::int64_t> base(restarts, batch.base);
  const OnDevice<KMeansSeed> seeds(changes, batch.seeds);
  const OnDevice<std::int16_t> labels(problems * batch.F, nullptr);
  const OnDevice<double> inertia(problems, nullptr);
  const OnDevice<std::int32_t> rounds(problems, nullptr);
  const OnDevice<char> scratch(side_by_side * bytes, nullptr);
  KMeansBatch there = batch;
  there.matrix = matrix.get();
  there.first = first.get();
  there.base = base.get();
  there.seeds = seeds.get();
  there.labels = labels.get();
  there.inertia = inertia.get();
  there.rounds = rounds.get();
  const std::int64_t turn = side_by_side * kTurns;
  for (std::int64_t p = 0; p < problems; p += turn) {
    rounds_kernel<<<static_cast<unsigned>(side_by_side), kKMeansThreads>>>(there, p, std::min(p + turn, problems),
                                                                           scratch.get(), bytes);
    check(cudaGetLastError(), "launch");
    check(cudaDeviceSynchronize(), "finish");
    if (interrupt.poll && interrupt.poll(interrupt.context, 0)) return false;
  }
  labels.copy_to(batch.labels);
  inertia.copy_to(batch.inertia);
  rounds.copy_to(batch.rounds);
  return true;
}

}  // namespace pyprune
