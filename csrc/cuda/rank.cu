// One kernel for each layout of the rank kernel, over many batches at once: a block finds its batch in a small table
// among the kernel's parameters. Built with -fmad=false: multiply-adds are written where they are meant, so that the
// host's twin (csrc/cpu/rank_twin.cpp) computes the same bits.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "pyprune/rank_cuda.h"
#include "pyprune/rank_group.h"
#include "pyprune/rank_thread.h"
#include "pyprune/rank_tiles.h"

namespace pyprune {
namespace {

constexpr int kThreads = 128;     // of a block of groups, or of single threads
constexpr int kMostTiles4 = 160;  // threads of a block for 64 x 64 in tiles of 4 x 4
constexpr int kMostTiles8 = 384;  // for 216 x 216 in tiles of 8 x 8: twelve warps can have 168 registers each
constexpr int kMostTiles = 416;   // for 224 x 224: thirteen warps can have 128, so that some of the tile spills
constexpr std::int64_t kMost = 2147483647;  // maps of a batch, blocks of a launch
constexpr std::size_t kMostTable = 28;      // batches of a launch: its parameters may take 4 KiB on every driver

struct Entry {
  const void* data;
  std::uint32_t count, C;
  std::int32_t H, W;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
  std::int32_t* ranks;
  unsigned long long* sums;
  std::int64_t sums_stride;
  double rtol;
  MapType type;
};

struct Table {
  std::int32_t used;
  std::uint32_t first_block[kMostTable];
  const void* labels;
  bool labels_are_64_bit;
  std::int64_t classes;
  unsigned long long* not_finite;
  Entry entries[kMostTable];
};
static_assert(sizeof(Table) <= 4096, "parameters of a launch");

// Which batch this block works on, and which of its blocks this is.
__device__ __forceinline__ const Entry& find_batch(const Table& table, std::uint32_t& block) {
  int low = 0, high = table.used;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  block = blockIdx.x - table.first_block[low];
  return table.entries[low];
}

struct Place {
  std::uint32_t n, c;
};

__device__ __forceinline__ Place place_of(const Entry& batch, std::uint32_t index) {
  const std::uint32_t n = index / batch.C;
  return {n, index - n * batch.C};
}

__device__ __forceinline__ MapView view_of(const Entry& batch, const Place& place) {
  const std::int64_t offset =
      static_cast<std::int64_t>(place.n) * batch.stride_n + static_cast<std::int64_t>(place.c) * batch.stride_c;
  const int size = batch.type == MapType::kFloat64 ? 8 : batch.type == MapType::kFloat32 ? 4 : 2;
  return view_map(static_cast<const char*>(batch.data) + offset * size, batch.type, batch.H, batch.W, batch.stride_h,
                  batch.stride_w);
}

__device__ __forceinline__ void deliver(const Table& table, const Entry& batch, const Place& place, std::uint32_t index,
                                        std::int32_t rank) {
  if (batch.ranks) batch.ranks[index] = rank;
  if (rank < 0) {
    if (table.not_finite) atomicAdd(table.not_finite, 1ull);
  } else if (batch.sums) {
    const std::int64_t label = table.labels_are_64_bit ? static_cast<const std::int64_t*>(table.labels)[place.n]
                                                       : static_cast<const std::int32_t*>(table.labels)[place.n];
    if (label >= 0 && label < table.classes) {
      atomicAdd(batch.sums + label * batch.sums_stride + place.c, static_cast<unsigned long long>(rank));
    }
  }
}

__global__ void __launch_bounds__(kThreads) thread_kernel(const __grid_constant__ Table table) {
  std::uint32_t block;
  const Entry& batch = find_batch(table, block);
  const std::uint32_t index = block * kThreads + threadIdx.x;
  if (index >= batch.count) return;
  const Place place = place_of(batch, index);
  deliver(table, batch, place, index, rank_by_thread(LaneTeam<1>(), view_of(batch, place), batch.rtol).rank);
}

// Where neighbouring maps are neighbours in memory (channels last), the whole block reads its maps together, a lane of
// each in turn; otherwise each group reads its own.
template <int kWidth, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) group_kernel(const __grid_constant__ Table table) {
  constexpr int kGroups = kThreads / kWidth, kDoubles = GroupMemory<kWidth>::kDoubles;
  __shared__ alignas(16) double memory[kGroups * kDoubles];
  std::uint32_t block;
  const Entry& batch = find_batch(table, block);
  const int group = static_cast<int>(threadIdx.x) / kWidth, lane = static_cast<int>(threadIdx.x) % kWidth;
  const std::uint32_t index = block * kGroups + group, last = batch.count - 1;
  // Groups beyond the last map count it again, for nothing: they are needed at the barriers.
  const Place place = place_of(batch, index < last ? index : last);
  const MapView map = view_of(batch, place);

  const bool together = batch.stride_c == 1 && (batch.H * batch.W > 1) && batch.stride_w != 1 && batch.stride_h != 1;
  MapView source = map;
  int source_group = group, source_lane = lane;
  if (together) {
    source_group = static_cast<int>(threadIdx.x) % kGroups;
    source_lane = static_cast<int>(threadIdx.x) / kGroups;
    const std::uint32_t other = block * kGroups + source_group;
    source = view_of(batch, place_of(batch, other < last ? other : last));
  }
  const LaneTeam<kWidth> team;
  const Decision decision =
      rank_by_group<kWidth>(team, map, batch.rtol, memory + group * kDoubles, [&](int first, int part) {
        if (together && first > 0) __syncthreads();  // others may still read what this thread is about to replace
        stage_tile<kWidth>(source, first, part, source_lane, memory + source_group * kDoubles);
        if (together) {
          __syncthreads();
        } else {
          team.wait();
        }
      });
  if (lane == 0 && index <= last) deliver(table, batch, place, index, decision.rank);
}

template <int kTile, int kThreadsMost, int kBlocks>
__global__ void __launch_bounds__(kThreadsMost, kBlocks) tile_kernel(const __grid_constant__ Table table) {
  extern __shared__ Pair tile_memory[];
  double* const memory = reinterpret_cast<double*>(tile_memory);
  std::uint32_t index;
  const Entry& batch = find_batch(table, index);
  const Place place = place_of(batch, index);
  const MapView map = view_of(batch, place);
  const BlockTeam team(reinterpret_cast<Pair*>(memory + TileLayout<kTile>(map.m).warps()));
  const Decision decision = rank_by_tiles<kTile>(team, map, batch.rtol, memory);
  if (threadIdx.x == 0) deliver(table, batch, place, index, decision.rank);
}

using Kernel = void (*)(const Table);

struct LayoutPlan {
  Kernel kernel;
  int maps_per_block;  // 1 also where the block's size depends on the map's
  int tile;
};

const LayoutPlan kPlans[kRankLayoutCount] = {
    {thread_kernel, kThreads, 0},
    {group_kernel<8, 5>, kThreads / 8, 0},
    {group_kernel<16, 5>, kThreads / 16, 0},
    {group_kernel<32, 4>, kThreads / 32, 0},
    {tile_kernel<4, kMostTiles4, 4>, 1, 4},
    {tile_kernel<8, kMostTiles8, 1>, 1, 8},
};

struct BlockSize {
  int threads;
  std::size_t bytes;
};

BlockSize block_size(int layout, int side) {
  switch (kPlans[layout].tile) {
    case 4:
      return {TileLayout<4>(side).threads, TileLayout<4>(side).doubles() * sizeof(double)};
    case 8:
      return {TileLayout<8>(side).threads, TileLayout<8>(side).doubles() * sizeof(double)};
    default:
      return {kThreads, 0};
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // told here; the next caller shall not meet it again
    throw std::runtime_error(std::string("rank: CUDA could not ") + what + ": " + cudaGetErrorString(status) + ".");
  }
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "tell the current device");
    if (device != before_) check(cudaSetDevice(device), "change to the maps' device");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int side_of(const RankCudaBatch& batch) {
  return static_cast<int>(std::min(batch.H, batch.W));
}

void launch(int layout, int threads, const std::vector<const RankCudaBatch*>& batches, const RankCudaCall& call) {
  const LayoutPlan& plan = kPlans[layout];
  Table table = {};
  table.labels = call.labels;
  table.labels_are_64_bit = call.labels_are_64_bit;
  table.classes = call.classes;
  table.not_finite = reinterpret_cast<unsigned long long*>(call.not_finite);
  std::int64_t blocks = 0;
  std::size_t bytes = 0;
  const Kernel kernel = threads > kMostTiles8 ? tile_kernel<8, kMostTiles, 1> : plan.kernel;
  const auto go = [&] {
    if (bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
            "reserve shared memory");
    }
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(call.stream)>>>(table);
    check(cudaGetLastError(), "launch the kernel");
    table.used = 0;
    blocks = 0;
    bytes = 0;
  };
  for (const RankCudaBatch* batch : batches) {
    const std::int64_t count = batch->N * batch->C, per_block = plan.maps_per_block;
    const std::int64_t more = (count + per_block - 1) / per_block;
    if (table.used == static_cast<int>(kMostTable) || blocks + more > kMost) go();
    table.first_block[table.used] = static_cast<std::uint32_t>(blocks);
    table.entries[table.used++] = {batch->data,
                                   static_cast<std::uint32_t>(count),
                                   static_cast<std::uint32_t>(batch->C),
                                   static_cast<std::int32_t>(batch->H),
                                   static_cast<std::int32_t>(batch->W),
                                   batch->stride_n,
                                   batch->stride_c,
                                   batch->stride_h,
                                   batch->stride_w,
                                   batch->ranks,
                                   reinterpret_cast<unsigned long long*>(batch->sums),
                                   batch->sums_stride,
                                   batch->rtol,
                                   static_cast<MapType>(batch->type)};
    blocks += more;
    bytes = std::max(bytes, block_size(layout, side_of(*batch)).bytes);
  }
  if (table.used > 0) go();
}

}  // namespace

std::string rank_cuda_reason(int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && device >= count) {
    return "there is no CUDA device " + std::to_string(device) + ": " + std::to_string(count) + " found";
  }
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) {
    try {
      const DeviceGuard guard(device);
      status = cudaFuncGetAttributes(&attributes, thread_kernel);  // loads the code: an old device has none
    } catch (const std::runtime_error& error) {
      cudaGetLastError();
      return error.what();
    }
  }
  cudaGetLastError();  // forget what was answered here
  return status == cudaSuccess ? "" : std::string("CUDA says: ") + cudaGetErrorString(status);
}

int rank_cuda_largest(int layout, int device) {
  int bytes = 0, largest = kRankLayouts[layout].largest;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "tell the shared memory");
  while (block_size(layout, largest).bytes > static_cast<std::size_t>(bytes)) --largest;
  return largest;
}

void rank_cuda(const std::vector<RankCudaBatch>& batches, const RankCudaCall& call) {
  const DeviceGuard guard(call.device);
  std::map<std::pair<int, int>, std::vector<const RankCudaBatch*>> launches;
  for (const RankCudaBatch& batch : batches) {
    const std::int64_t count = batch.N * batch.C;
    if (count == 0) continue;
    if (side_of(batch) == 0) {
      if (batch.ranks) {
        check(cudaMemsetAsync(batch.ranks, 0, static_cast<std::size_t>(count) * sizeof(std::int32_t),
                              static_cast<cudaStream_t>(call.stream)),
              "set ranks to zero");
      }
      continue;
    }
    // Indices of maps and rows have 32 bits, those of elements 64.
    if (std::max({batch.N, batch.C, count, batch.H, batch.W}) > kMost) {
      throw std::runtime_error(
          "rank: a batch may have up to 2147483647 maps, of sides up to as much; pass fewer at once.");
    }
    launches[{batch.layout, block_size(batch.layout, side_of(batch)).threads}].push_back(&batch);
  }
  for (const auto& [key, members] : launches) launch(key.first, key.second, members, call);
}

}  // namespace pyprune
