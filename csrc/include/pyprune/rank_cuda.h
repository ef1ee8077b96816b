// The rank kernel on a GPU: launches only. Nothing here waits for the device or allocates, so that a CUDA graph can
// capture it. docs/ops/rank.md describes the layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pyprune {

// Where a map lives while it is counted, in order of choice.
struct RankLayout {
  const char* name;
  int largest;  // short side
};
constexpr RankLayout kRankLayouts[] = {{"cuda_thread", 4},   {"cuda_group8", 8}, {"cuda_group16", 16},
                                       {"cuda_group32", 32}, {"cuda_tile4", 64}, {"cuda_tile8", 224}};
constexpr int kRankLayoutCount = 6;

// Maps [N, C, H, W] in device memory; strides count elements.
struct RankCudaBatch {
  const void* data;
  std::int32_t type;  // 0 float16, 1 bfloat16, 2 float32, 3 float64
  std::int64_t N, C, H, W, stride_n, stride_c, stride_h, stride_w;
  std::int32_t* ranks;  // [N * C] or null
  std::int64_t* sums;   // the first of C columns, or null: ranks are added to the row of their image's label
  std::int64_t sums_stride;
  double rtol;
  int layout;  // into kRankLayouts
};

struct RankCudaCall {
  const void* labels;  // [N], needed with sums
  bool labels_are_64_bit;
  std::int64_t classes;      // rows of sums; other labels add nothing
  std::int64_t* not_finite;  // counts the maps of rank -1, or null
  void* stream;
  int device;
};

// Why this device cannot run the kernels ("" if it can).
std::string rank_cuda_reason(int device);

// The largest short side of a layout on a device: shared memory bounds the last.
int rank_cuda_largest(int layout, int device);

// Enqueues the ranks of all batches, one launch for every layout and size of block that occurs. Throws
// std::runtime_error if CUDA reports an error.
void rank_cuda(const std::vector<RankCudaBatch>& batches, const RankCudaCall& call);

}  // namespace pyprune
