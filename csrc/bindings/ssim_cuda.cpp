#include "pyprune/ssim_cuda.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace pyprune {
namespace {

using Constants = std::tuple<double, double, double, double, std::optional<double>>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("ssim: ") + what);
}

// A layer comes as a dict; pointers as integers, and what is left out is not wanted.
class Fields {
 public:
  explicit Fields(const py::dict& dict) : dict_(dict) {}

  template <class T>
  T needed(const char* name) const {
    return dict_[name].cast<T>();
  }
  template <class T>
  T optional(const char* name, T otherwise) const {
    return dict_.contains(name) ? needed<T>(name) : otherwise;
  }
  template <class T>
  T* pointer(const char* name) const {
    return reinterpret_cast<T*>(optional<std::uintptr_t>(name, 0));
  }

 private:
  const py::dict& dict_;
};

SsimItem item_of(const py::dict& dict) {
  const Fields fields(dict);
  const auto [F2, F1, K] = fields.needed<std::tuple<std::int64_t, std::int64_t, std::int64_t>>("shape");
  const auto [alpha, beta, gamma, eps, absolute] = fields.needed<Constants>("constants");
  constexpr std::int64_t kMost = 1 << 30;
  require(F2 > 0 && F1 > 0 && K > 0 && F2 <= kMost && F1 <= kMost && K <= kMost, "weights must be [F2, F1, K]");
  SsimItem item = {};
  item.weights = fields.pointer<const void>("weights");
  item.scratch = fields.pointer<void>("scratch");
  item.alpha = alpha;
  item.beta = beta;
  item.gamma = gamma;
  item.eps = absolute.value_or(eps);
  item.absolute = absolute.has_value();
  item.float64 = fields.optional<bool>("float64", false);
  item.F2 = static_cast<std::int32_t>(F2);
  item.F1 = static_cast<std::int32_t>(F1);
  item.K = static_cast<std::int32_t>(K);
  item.first = fields.optional<std::int32_t>("first", 0);
  item.last = fields.optional<std::int32_t>("last", item.F2);
  item.pairs = fields.pointer<const std::int64_t>("pairs");
  item.pair_count = fields.optional<std::int64_t>("pair_count", 0);
  item.matrix = fields.pointer<float>("matrix");
  item.psi = fields.pointer<float>("psi");
  item.thresholds = fields.pointer<const double>("thresholds");
  item.threshold_count = fields.optional<std::int32_t>("threshold_count", 0);
  item.counts = fields.pointer<Counter>("counts");
  item.bins = fields.optional<std::int32_t>("bins", 0);
  item.histogram = fields.pointer<Counter>("histogram");
  item.sum = fields.pointer<Counter>("sum");
  item.sum_shift = fields.optional<std::int32_t>("sum_shift", 0);
  item.nearest = fields.pointer<Counter>("nearest");
  require(item.first >= 0 && item.first % kSsimBand == 0, "first must be a multiple of 64");
  require(item.last == item.F2 || item.last % kSsimBand == 0, "last must be a multiple of 64, or all filters");
  require(item.first < item.last && item.last <= item.F2, "filters must be first < last <= F2");
  require(item.threshold_count == 0 || (item.thresholds && item.counts), "thresholds need counts");
  require(item.bins == 0 || item.histogram, "bins need a histogram");
  require(reinterpret_cast<std::uintptr_t>(item.scratch) % 16 == 0, "scratch must be aligned to 16 bytes");
  ssim_routes(item);
  return item;
}

std::vector<SsimItem> items_of(const std::vector<py::dict>& layers) {
  std::vector<SsimItem> items;
  for (const py::dict& layer : layers) {
    items.push_back(item_of(layer));
    require(items.back().weights && items.back().scratch, "weights and scratch must be given");
  }
  return items;
}

std::size_t scratch(const py::dict& layer) {
  return ssim_scratch_bytes(item_of(layer));
}

Counter* counter(std::uintptr_t address) {
  return reinterpret_cast<Counter*>(address);
}

void cuda(const std::vector<py::dict>& layers, std::uintptr_t not_finite, std::uintptr_t stream, int device) {
#ifdef PYPRUNE_HAS_CUDA
  const std::vector<SsimItem> items = items_of(layers);
  py::gil_scoped_release release;
  ssim_cuda(items, counter(not_finite), reinterpret_cast<void*>(stream), device);
#else
  (void)layers, (void)not_finite, (void)stream, (void)device;
  throw std::runtime_error("ssim: this build has no CUDA kernels: none were asked for, or no nvcc was found");
#endif
}

void twin(const std::vector<py::dict>& layers, std::uintptr_t not_finite, bool backwards, int worst) {
  const std::vector<SsimItem> items = items_of(layers);
  py::gil_scoped_release release;
  ssim_twin(items, counter(not_finite), backwards, worst);
}

}  // namespace

void register_ssim_cuda(py::module_& module) {
  module.def("ssim_scratch", &scratch, py::arg("layer"), "Bytes of scratch memory that a layer's kernels need.");
  module.def("ssim_cuda", &cuda, py::arg("layers"), py::kw_only(), py::arg("not_finite") = 0, py::arg("stream") = 0,
             py::arg("device") = 0,
             "Enqueue kernel SSIM of layers: dicts of weights [F2, F1, K] (contiguous), shape, float64, constants,\n"
             "scratch, and what is wanted: matrix, psi, thresholds and counts, bins and histogram, sum and sum_shift,\n"
             "nearest; of all pairs, filters first to last, or pairs. Pointers are integers; counters are added to.");
  module.def("ssim_twin", &twin, py::arg("layers"), py::kw_only(), py::arg("not_finite") = 0,
             py::arg("backwards") = false, py::arg("worst") = 0,
             "The same kernels run on the host. worst: -1, 0 or 1, where in their bounds approximations lie.");
}

}  // namespace pyprune
