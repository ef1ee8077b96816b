#include "pyprune/ssim.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace pyprune {
namespace {

const SsimVariant* const kVariants[] = {
    &kSsimScalar,
    &kSsimBaseline,
#ifdef PYPRUNE_X86
    &kSsimAvx2,
    &kSsimAvx512,
#endif
};

const SsimVariant& find(const std::string& name) {
  for (const SsimVariant* variant : kVariants) {
    if (name == variant->name && variant->supported()) return *variant;
  }
  throw std::invalid_argument("ssim: no variant " + name + " on this CPU");
}

// numpy has no bfloat16: such weights come as their bits, uint16, and are called "bfloat16".
Element element_of(const py::array& weights, const std::string& dtype) {
  const py::dtype type = weights.dtype();
  if (dtype == "bfloat16" && type.equal(py::dtype::of<std::uint16_t>())) return Element::bfloat16;
  if (dtype.empty() || dtype == py::cast<std::string>(type.attr("name"))) {
    if (type.equal(py::dtype::of<float>())) return Element::float32;
    if (type.equal(py::dtype::of<double>())) return Element::float64;
    if (type.equal(py::dtype("float16"))) return Element::float16;
  }
  throw py::type_error(
      "ssim: weights must be float16, float32 or float64 in native byte order, or uint16 as 'bfloat16'");
}

SsimWeights describe(const py::array& weights, const std::string& dtype) {
  const Element element = element_of(weights, dtype);
  const py::ssize_t item = weights.itemsize();
  std::ptrdiff_t strides[4];
  if (weights.ndim() != 4) throw std::invalid_argument("ssim: weights must be [F2, F1, K1, K2]");
  if (weights.size() == 0) throw std::invalid_argument("ssim: weights must not be empty");
  if (weights.shape(2) > INT16_MAX || weights.shape(3) > INT16_MAX) {
    throw std::invalid_argument("ssim: slices must be at most 32767 wide and high");
  }
  for (int i = 0; i < 4; ++i) {
    if (weights.strides(i) % item) throw std::invalid_argument("ssim: strides must be whole elements");
    strides[i] = weights.strides(i) / item;
  }
  if (reinterpret_cast<std::uintptr_t>(weights.data()) % static_cast<std::uintptr_t>(item)) {
    throw std::invalid_argument("ssim: weights must be aligned");
  }
  return {weights.data(),   element,    weights.shape(0), weights.shape(1), weights.shape(2),
          weights.shape(3), strides[0], strides[1],       strides[2],       strides[3]};
}

struct Job {
  SsimWeights weights;
  SsimConstants constants;
  const SsimVariant& variant;
  int threads;

  void run(const std::int64_t* pairs, std::ptrdiff_t count, const SsimResult& result) const {
    Signals signals;
    std::ptrdiff_t not_finite = 0;
    SsimEnd end;
    {
      py::gil_scoped_release release;
      end = ssim(weights, constants, pairs, count, variant, threads, {poll_signals, &signals}, result, &not_finite);
    }
    if (end == SsimEnd::interrupted) throw py::error_already_set();
    if (end == SsimEnd::not_finite) {
      const std::ptrdiff_t all = weights.F2 * weights.F1 * weights.K1 * weights.K2;
      throw std::invalid_argument("kernel_ssim: weights must be finite; " + std::to_string(not_finite) + " of " +
                                  std::to_string(all) + " are NaN or infinite.");
    }
  }
};

using Constants = std::tuple<double, double, double, double, std::optional<double>>;

Job job_of(const py::array& weights, const Constants& c, const std::string& variant, int threads,
           const std::string& dtype) {
  const auto& [alpha, beta, gamma, eps, absolute] = c;
  return {describe(weights, dtype),
          {alpha, beta, gamma, absolute.value_or(eps), absolute.has_value()},
          find(variant),
          threads};
}

template <class T>
py::array matrix_of(const Job& job) {
  const std::ptrdiff_t F2 = job.weights.F2;
  py::array_t<T> matrix({F2, F2});
  SsimResult result{};
  result.matrix = matrix.mutable_data();
  job.run(nullptr, 0, result);
  return std::move(matrix);
}

py::array ssim_matrix(const py::array& weights, const Constants& constants, const std::string& variant, int threads,
                      const std::string& dtype) {
  const Job job = job_of(weights, constants, variant, threads, dtype);
  return job.weights.element == Element::float64 ? matrix_of<double>(job) : matrix_of<float>(job);
}

using Whole = py::array_t<std::int64_t, py::array::c_style>;

py::tuple ssim_statistics(const py::array& weights, const Constants& constants, const std::vector<double>& thresholds,
                          py::ssize_t bins, py::ssize_t top, bool nearest, const std::optional<Whole>& pairs,
                          const std::string& variant, int threads, const std::string& dtype) {
  const Job job = job_of(weights, constants, variant, threads, dtype);
  const std::ptrdiff_t F2 = job.weights.F2;
  if (bins < 0 || top < 0) throw std::invalid_argument("ssim: bins and top must not be negative");
  if (pairs) {
    if (pairs->ndim() != 2 || pairs->shape(1) != 2) throw std::invalid_argument("ssim: pairs must be [P, 2]");
    for (py::ssize_t p = 0; p < pairs->size(); ++p) {
      const std::int64_t filter = pairs->data()[p];
      if (filter < 0 || filter >= F2) throw std::invalid_argument("ssim: pairs must be of filters there are");
    }
  }
  const py::ssize_t count = pairs ? pairs->shape(0) : F2 * (F2 - 1) / 2;
  if (top > count) throw std::invalid_argument("ssim: top is more than there are pairs");
  Whole counts(static_cast<py::ssize_t>(thresholds.size())), histogram(bins), top_i(top), top_j(top);
  Whole index(nearest ? F2 : 0);
  py::array_t<double> top_psi(top), index_psi(nearest ? F2 : 0);
  double mean = 0;
  SsimResult result{};
  result.thresholds = static_cast<std::ptrdiff_t>(thresholds.size());
  result.threshold = thresholds.data();
  result.count = counts.mutable_data();
  result.bins = bins;
  result.histogram = histogram.mutable_data();
  result.top = top;
  result.top_i = top_i.mutable_data();
  result.top_j = top_j.mutable_data();
  result.top_psi = top_psi.mutable_data();
  result.nearest = nearest ? index.mutable_data() : nullptr;
  result.nearest_psi = index_psi.mutable_data();
  result.mean = &mean;
  job.run(pairs ? pairs->data() : nullptr, count, result);
  return py::make_tuple(count, mean, counts, histogram, top_i, top_j, top_psi, index, index_psi);
}

}  // namespace

void register_ssim(py::module_& module) {
  module.def("ssim_matrix", &ssim_matrix, py::arg("weights"), py::arg("constants"), py::arg("variant"),
             py::arg("threads"), py::arg("dtype") = "",
             "Psi [F2, F2] of weights [F2, F1, K1, K2], any strides: float64 for float64 weights, else float32.\n\n"
             "constants: alpha, beta, gamma, eps, eps_absolute or None. bfloat16 comes as its bits, uint16, with\n"
             "dtype=\"bfloat16\".");
  module.def("ssim_statistics", &ssim_statistics, py::arg("weights"), py::arg("constants"), py::arg("thresholds"),
             py::arg("bins"), py::arg("top"), py::arg("nearest"), py::arg("pairs"), py::arg("variant"),
             py::arg("threads"), py::arg("dtype") = "",
             "pairs, mean, counts, histogram, top i, j and psi, nearest index and psi, without the matrix.");
}

}  // namespace pyprune
