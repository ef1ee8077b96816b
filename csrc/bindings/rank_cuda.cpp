#include "pyprune/rank_cuda.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "pyprune/rank_twin.h"

namespace py = pybind11;

namespace pyprune {
namespace {

using Four = std::array<std::int64_t, 4>;
using Item = std::tuple<std::uintptr_t, std::string, Four, Four, std::uintptr_t, std::uintptr_t, std::int64_t>;

constexpr const char* kTypes[] = {"float16", "bfloat16", "float32", "float64"};

std::int32_t find_type(const std::string& name) {
  for (std::int32_t type = 0; type < 4; ++type) {
    if (name == kTypes[type]) return type;
  }
  throw py::type_error("rank: maps must be float16, bfloat16, float32 or float64; got " + name);
}

int find_layout(const std::string& name) {
  for (int layout = 0; layout < kRankLayoutCount; ++layout) {
    if (name == kRankLayouts[layout].name) return layout;
  }
  throw std::invalid_argument("rank: no layout " + name);
}

void check_side(int layout, int largest, std::int64_t side) {
  if (side > largest) {
    throw std::invalid_argument(std::string("rank: ") + kRankLayouts[layout].name + " takes short sides up to " +
                                std::to_string(largest) + "; got " + std::to_string(side));
  }
}

#ifdef PYPRUNE_HAS_CUDA
double default_rtol(std::int64_t H, std::int64_t W) {
  return static_cast<double>(std::max(H, W)) * static_cast<double>(FLT_EPSILON);
}
#endif

std::pair<bool, std::string> cuda_built() {
#ifdef PYPRUNE_HAS_CUDA
  return {true, PYPRUNE_CUDA_ARCHITECTURES};
#else
  return {false, ""};
#endif
}

#ifdef PYPRUNE_HAS_CUDA

py::dict rank_cuda_layouts(int device) {
  py::dict layouts;
  for (int layout = 0; layout < kRankLayoutCount; ++layout) {
    layouts[kRankLayouts[layout].name] = device < 0 ? kRankLayouts[layout].largest : rank_cuda_largest(layout, device);
  }
  return layouts;
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

RankCudaBatch describe(const Item& item, std::optional<double> rtol) {
  const auto& [data, type, shape, strides, ranks, sums, sums_stride] = item;
  const auto& [N, C, H, W] = shape;
  if (N < 0 || C < 0 || H < 0 || W < 0) throw std::invalid_argument("rank: sizes must not be negative");
  return {pointer<const void>(data),
          find_type(type),
          N,
          C,
          H,
          W,
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          pointer<std::int32_t>(ranks),
          pointer<std::int64_t>(sums),
          sums_stride,
          rtol.value_or(default_rtol(H, W)),
          0};
}

std::vector<std::string> launch_rank(const std::vector<Item>& items, std::optional<double> rtol,
                                     const std::string& forced, std::uintptr_t labels, int label_bits,
                                     std::int64_t classes, std::uintptr_t not_finite, std::uintptr_t stream,
                                     int device) {
  if (label_bits != 32 && label_bits != 64) throw std::invalid_argument("rank: labels must have 32 or 64 bits");
  std::vector<RankCudaBatch> batches;
  std::vector<std::string> names;
  std::array<int, kRankLayoutCount> largest;
  for (int layout = 0; layout < kRankLayoutCount; ++layout) largest[layout] = rank_cuda_largest(layout, device);
  for (const Item& item : items) {
    RankCudaBatch batch = describe(item, rtol);
    if (batch.sums && !labels) throw std::invalid_argument("rank: sums need labels");
    const std::int64_t side = std::min(batch.H, batch.W);
    if (forced.empty()) {
      while (batch.layout + 1 < kRankLayoutCount && side > largest[batch.layout]) ++batch.layout;
    } else {
      batch.layout = find_layout(forced);
    }
    check_side(batch.layout, largest[batch.layout], side);
    names.emplace_back(kRankLayouts[batch.layout].name);
    batches.push_back(batch);
  }
  const RankCudaCall call = {pointer<const void>(labels),       label_bits == 64,      classes,
                             pointer<std::int64_t>(not_finite), pointer<void>(stream), device};
  py::gil_scoped_release release;
  rank_cuda(batches, call);
  return names;
}

#else

constexpr const char* kNotBuilt = "this build has no CUDA kernels: none were asked for, or no nvcc was found";

py::dict rank_cuda_layouts(int) {
  return {};
}
std::vector<std::string> launch_rank(const std::vector<Item>&, std::optional<double>, const std::string&,
                                     std::uintptr_t, int, std::int64_t, std::uintptr_t, std::uintptr_t, int) {
  throw std::runtime_error(std::string("rank: ") + kNotBuilt);
}

}  // namespace

std::string rank_cuda_reason(int) {
  return kNotBuilt;
}

namespace {

#endif

std::int32_t type_of(const py::array& maps) {
  const std::string kind = py::str(maps.dtype().attr("name"));
  if (!maps.dtype().attr("isnative").cast<bool>()) throw py::type_error("rank: maps must be in native byte order");
  return find_type(kind == "uint16" ? "bfloat16" : kind);
}

py::tuple twin(const py::array& maps, double rtol, const std::string& name, bool backwards) {
  if (maps.ndim() != 4) throw std::invalid_argument("rank: maps must be [N, C, H, W]");
  const py::ssize_t item = maps.itemsize();
  const int layout = find_layout(name);
  const std::int64_t H = maps.shape(2), W = maps.shape(3);
  check_side(layout, kRankLayouts[layout].largest, std::min(H, W));
  const py::ssize_t count = maps.shape(0) * maps.shape(1);
  py::array_t<std::int32_t> ranks(count);
  py::array_t<std::uint8_t> paths(count);
  const RankCudaBatch batch = {maps.data(),
                               type_of(maps),
                               maps.shape(0),
                               maps.shape(1),
                               H,
                               W,
                               maps.strides(0) / item,
                               maps.strides(1) / item,
                               maps.strides(2) / item,
                               maps.strides(3) / item,
                               ranks.mutable_data(),
                               nullptr,
                               0,
                               rtol,
                               layout};
  std::uint8_t* const path = paths.mutable_data();
  if (std::min(H, W) == 0) {
    std::fill_n(ranks.mutable_data(), count, 0);
    std::fill_n(path, count, std::uint8_t{5});
  } else {
    py::gil_scoped_release release;
    rank_twin(batch, backwards, path);
  }
  return py::make_tuple(ranks, paths);
}

std::pair<double, double> reduce(const py::array_t<double, py::array::c_style | py::array::forcecast>& values) {
  const py::ssize_t size = values.size();
  const bool lanes = size == 1 || size == 8 || size == 16, block = size > 0 && size % 32 == 0 && size <= 1024;
  if (!lanes && !block) throw std::invalid_argument("rank: a team has 1, 8, 16 or a multiple of 32 threads");
  double sum, max;
  twin_reduce(values.data(), static_cast<int>(size), &sum, &max);
  return {sum, max};
}

}  // namespace

void register_rank_cuda(py::module_& module) {
  module.def("cuda_built", &cuda_built, "Whether the GPU kernels are in this build, and for which architectures.");
  module.def("cuda_device_reason", &rank_cuda_reason, py::arg("device"), "Why this device cannot run them ('').");
  module.def("rank_cuda_layouts", &rank_cuda_layouts, py::arg("device") = -1,
             "Each layout, in order of choice, and its largest short side, on this device or at best.");
  module.def("rank_cuda", &launch_rank, py::arg("batches"), py::kw_only(), py::arg("rtol") = py::none(),
             py::arg("layout") = "", py::arg("labels") = 0, py::arg("label_bits") = 64, py::arg("classes") = 0,
             py::arg("not_finite") = 0, py::arg("stream") = 0, py::arg("device") = 0,
             "Enqueue the ranks of batches (data, dtype, shape, strides, ranks, sums, stride of sums), pointers as "
             "integers; return the layout of each.");
  module.def("rank_twin", &twin, py::arg("maps"), py::arg("rtol"), py::arg("layout"), py::arg("backwards") = false,
             "The GPU's kernel run on the host: ranks [N * C], and the path that decided each.");
  module.def("rank_twin_reduce", &reduce, py::arg("values"), "Sum and maximum of one value a thread, as teams do it.");
}

}  // namespace pyprune
