// The launches of kernel SSIM: a block finds its layer in a small table among the kernel's parameters. Built with
// -fmad=false: multiply-adds are written where they are meant, as the host's twin (csrc/cpu/ssim_twin.cpp) has them.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "pyprune/ssim_tile.h"

namespace pyprune {
namespace {

constexpr int kMostItems = 24;  // of a launch: its parameters may take 4 KiB on every driver
constexpr int kWarpsOfPairs = kSsimThreads / 32;

struct Table {
  Counter* not_finite;
  std::int32_t used;
  std::uint32_t first_block[kMostItems];
  SsimItem items[kMostItems];
};
static_assert(sizeof(Table) <= 4096, "parameters of a launch");

// Which layer this block works on, and which of its blocks this is.
__device__ __forceinline__ const SsimItem& find_item(const Table& table, std::int64_t& block) {
  int low = 0, high = table.used;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  block = blockIdx.x - table.first_block[low];
  return table.items[low];
}

__global__ void __launch_bounds__(kSsimThreads) scan_kernel(const __grid_constant__ Table table) {
  __shared__ Pair warps[kSsimThreads / 32];
  std::int64_t block;
  const SsimItem& item = find_item(table, block);
  ssim_scan(BlockTeam(warps), item, block);
}

__global__ void __launch_bounds__(kSsimThreads) prepare_kernel(const __grid_constant__ Table table) {
  __shared__ Pair warps[kSsimThreads / 32];
  std::int64_t block;
  const SsimItem& item = find_item(table, block);
  ssim_prepare(BlockTeam(warps), item, block, table.not_finite);
}

// Both arithmetics are launched where only the device knows which one a layer needs; the other one's blocks end at
// once.
template <class T>
__global__ void __launch_bounds__(kSsimThreads, 2) tile_kernel(const __grid_constant__ Table table) {
  extern __shared__ Pair tile_memory[];
  std::int64_t block;
  const SsimItem& item = find_item(table, block);
  const bool wide = sizeof(T) == sizeof(double);
  if (ssim_head_of(item)->wide != wide) return;
  const BlockTeam team(nullptr);
  if (!wide && item.K == 9) {
    ssim_tile<float, 9>(team, item, block, tile_memory);
  } else {
    ssim_tile<T, 0>(team, item, block, tile_memory);
  }
}

template <class T>
__global__ void __launch_bounds__(kSsimThreads) pair_kernel(const __grid_constant__ Table table) {
  std::int64_t block;
  const SsimItem& item = find_item(table, block);
  if (ssim_head_of(item)->wide != (sizeof(T) == sizeof(double))) return;
  const std::int64_t pair = block * kWarpsOfPairs + threadIdx.x / 32;
  if (pair < item.pair_count) ssim_pair<T>(LaneTeam<32>(), item, pair);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("ssim: CUDA could not ") + what + ": " + cudaGetErrorString(status) + ".");
  }
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "tell the current device");
    if (device != before_) check(cudaSetDevice(device), "change to the weights' device");
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

struct Launch {
  void (*kernel)(const Table);
  std::int64_t (*blocks)(const SsimItem&);  // 0: the item has no part in this launch
  std::size_t (*shared)(const SsimItem&);
};

template <class T>
bool takes_part(const SsimItem& item) {
  return sizeof(T) == sizeof(double) ? item.may_double : item.may_float;
}
template <class T>
std::int64_t tile_blocks(const SsimItem& item) {
  const SsimLayout<T> layout(item);
  return takes_part<T>(item) ? layout.tiles * layout.runs : 0;
}
template <class T>
std::size_t tile_shared(const SsimItem& item) {
  return SsimLayout<T>(item).shared_bytes();
}
template <class T>
std::int64_t pair_blocks(const SsimItem& item) {
  return item.pairs && takes_part<T>(item) ? divide_up(item.pair_count, kWarpsOfPairs) : 0;
}
std::size_t no_shared(const SsimItem&) {
  return 0;
}

const Launch kLaunches[] = {
    {scan_kernel, ssim_parts, no_shared},
    {prepare_kernel, ssim_slice_blocks, no_shared},
    {tile_kernel<float>, tile_blocks<float>, tile_shared<float>},
    {tile_kernel<double>, tile_blocks<double>, tile_shared<double>},
    {pair_kernel<float>, pair_blocks<float>, no_shared},
    {pair_kernel<double>, pair_blocks<double>, no_shared},
};

void run(const Launch& launch, const SsimItem* first, const SsimItem* last, Counter* not_finite, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 2147483647;
  Table table = {};
  table.not_finite = not_finite;
  std::int64_t blocks = 0;
  std::size_t bytes = 0;
  for (const SsimItem* item = first; item < last; ++item) {
    const std::int64_t more = launch.blocks(*item);
    if (more == 0) continue;
    if (blocks + more > kMostBlocks) throw std::runtime_error("ssim: too many filters for one launch; pass fewer.");
    table.first_block[table.used] = static_cast<std::uint32_t>(blocks);
    table.items[table.used++] = *item;
    blocks += more;
    bytes = std::max(bytes, launch.shared(*item));
  }
  if (blocks == 0) return;
  if (bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "reserve shared memory");
  }
  launch.kernel<<<static_cast<unsigned>(blocks), kSsimThreads, bytes, stream>>>(table);
  check(cudaGetLastError(), "launch the kernel");
}

}  // namespace

void ssim_cuda(const std::vector<SsimItem>& items, Counter* not_finite, void* stream, int device) {
  const DeviceGuard guard(device);
  for (std::size_t first = 0; first < items.size(); first += kMostItems) {
    const std::size_t last = std::min(items.size(), first + kMostItems);
    for (const Launch& launch : kLaunches) {
      run(launch, items.data() + first, items.data() + last, not_finite, static_cast<cudaStream_t>(stream));
    }
  }
}

}  // namespace pyprune
