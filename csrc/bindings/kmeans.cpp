#include "pyprune/kmeans.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace pyprune {
namespace {

const KMeansVariant* const kVariants[] = {
    &kKMeansBaseline,
#ifdef PYPRUNE_X86
    &kKMeansAvx2,
    &kKMeansAvx512,
#endif
};

const KMeansVariant& find(const std::string& name) {
  for (const KMeansVariant* variant : kVariants) {
    if (name == variant->name && variant->supported()) return *variant;
  }
  throw std::invalid_argument("k_search: no variant " + name + " on this CPU");
}

KMeansElsewhere find_elsewhere(const std::string& name, int option) {
  if (name.empty()) return {nullptr, 0};
  if (name == "twin") return {kmeans_twin, option};
#ifdef PYPRUNE_HAS_CUDA
  if (name == "cuda") return {kmeans_cuda, option};
#endif
  throw std::runtime_error("k_search: this build has no CUDA kernels: none were asked for, or no nvcc was found");
}

// Tells how far the search is when it looks for signals.
struct Watch {
  Signals signals;
  const py::object& progress;
  std::ptrdiff_t told = 0;
};

bool poll(void* context, std::ptrdiff_t done) {
  Watch& watch = *static_cast<Watch*>(context);
  const auto before = watch.signals.looked;
  if (poll_signals(&watch.signals)) return true;
  if (watch.signals.looked == before || done == watch.told || watch.progress.is_none()) return false;
  py::gil_scoped_acquire acquire;
  try {
    watch.progress(done - watch.told);
  } catch (py::error_already_set& error) {
    error.restore();
    return true;
  }
  watch.told = done;
  return false;
}

using Matrix = py::array_t<double, py::array::c_style>;

py::tuple search(const Matrix& X, py::ssize_t k_min, py::ssize_t k_max, int n_init, int max_iter, std::uint64_t seed,
                 bool refine, const std::string& variant, int threads, const py::object& progress,
                 const std::string& elsewhere, int option) {
  const KMeansVariant& chosen = find(variant);
  if (X.ndim() != 2 || X.shape(1) < 1) throw std::invalid_argument("k_search: x must be [F, C]");
  const py::ssize_t F = X.shape(0), C = X.shape(1);
  if (k_min < 2 || k_max < k_min || k_max >= F) throw std::invalid_argument("k_search: needs 2 <= k_min <= k_max < F");
  if (F > INT16_MAX) throw std::invalid_argument("k_search: x must have at most 32767 rows");
  if (n_init < 1 || max_iter < 1) throw std::invalid_argument("k_search: n_init and max_iter must be at least 1");
  const py::ssize_t Ks = k_max - k_min + 1;
  py::array_t<std::int32_t> labels({Ks, F}), rounds(Ks), exchanges(Ks);
  py::array_t<double> silhouettes({Ks, F}), inertia(Ks), score(Ks);
  const KMeansProblem problem = {X.data(), F, C, k_min, k_max, n_init, max_iter, seed, refine};
  const KMeansResult result = {labels.mutable_data(), silhouettes.mutable_data(), inertia.mutable_data(),
                               score.mutable_data(),  rounds.mutable_data(),      exchanges.mutable_data()};
  Watch watch{{}, progress};
  KMeansEnd end;
  {
    py::gil_scoped_release release;
    end = k_search(problem, chosen, threads, {poll, &watch}, result, find_elsewhere(elsewhere, option));
  }
  if (end == KMeansEnd::interrupted) throw py::error_already_set();
  if (end == KMeansEnd::overflow) {
    throw py::value_error("k_search: squared distances of x must be below 1.8e308. Scale x, for example to [0, 1].");
  }
  if (!progress.is_none() && Ks > watch.told) progress(Ks - watch.told);
  return py::make_tuple(labels, silhouettes, inertia, score, rounds, exchanges);
}

}  // namespace

void register_kmeans(py::module_& module) {
  module.def(
      "k_search", &search, py::arg("x"), py::arg("k_min"), py::arg("k_max"), py::arg("n_init"), py::arg("max_iter"),
      py::arg("seed"), py::arg("refine"), py::arg("variant"), py::arg("threads"), py::arg("progress"),
      py::arg("elsewhere") = "", py::arg("option") = 0,
      "labels [K, F], silhouettes [K, F], inertia [K], mean silhouette [K], rounds [K] and exchanges [K] of the\n"
      "rows of x [F, C] for every K from k_min to k_max. progress(n): n more K are done.\n"
      "elsewhere: \"cuda\" on device `option`, or its host \"twin\", whose threads go backwards with option 1.");
}

}  // namespace pyprune
