#include "pyprune/rank.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace pyprune {
namespace {

const RankVariant* const kVariants[] = {
    &kRankBaseline,
#ifdef PYPRUNE_X86
    &kRankAvx2,
    &kRankAvx512,
#endif
};

// Every compiled variant and why this CPU cannot run it ("" where it can), slowest first.
py::dict rank_variants() {
  py::dict variants;
  for (const RankVariant* variant : kVariants) {
    variants[variant->name] = variant->supported() ? "" : std::string("this CPU lacks ") + variant->needs;
  }
  return variants;
}

const RankVariant& find(const std::string& name) {
  for (const RankVariant* variant : kVariants) {
    if (name == variant->name && variant->supported()) return *variant;
  }
  throw std::invalid_argument("rank: no variant " + name + " on this CPU");
}

// numpy has no bfloat16: such maps come as their bits, uint16, and are called "bfloat16".
Element element_of(const py::array& maps, const std::string& dtype) {
  const py::dtype type = maps.dtype();
  if (dtype == "bfloat16" && type.equal(py::dtype::of<std::uint16_t>())) return Element::bfloat16;
  if (dtype.empty() || dtype == py::cast<std::string>(type.attr("name"))) {
    if (type.equal(py::dtype::of<float>())) return Element::float32;
    if (type.equal(py::dtype::of<double>())) return Element::float64;
    if (type.equal(py::dtype("float16"))) return Element::float16;
  }
  throw py::type_error("rank: maps must be float16, float32 or float64 in native byte order, or uint16 as 'bfloat16'");
}

Maps describe(const py::array& maps, const std::string& dtype) {
  const Element element = element_of(maps, dtype);
  const py::ssize_t item = maps.itemsize();
  std::ptrdiff_t strides[4];
  if (maps.ndim() != 4) throw std::invalid_argument("rank: maps must be [N, C, H, W]");
  for (int i = 0; i < 4; ++i) {
    if (maps.strides(i) % item) throw std::invalid_argument("rank: strides must be whole elements");
    strides[i] = maps.strides(i) / item;
  }
  if (reinterpret_cast<std::uintptr_t>(maps.data()) % static_cast<std::uintptr_t>(item)) {
    throw std::invalid_argument("rank: maps must be aligned");
  }
  return {maps.data(),
          element,
          maps.shape(0),
          maps.shape(1),
          strides[0],
          strides[1],
          {maps.shape(2), maps.shape(3), strides[2], strides[3]}};
}

Layout layout_of(const std::string& name) {
  if (name == "auto") return Layout::automatic;
  if (name == "lanes") return Layout::lanes;
  if (name == "inside") return Layout::inside;
  throw std::invalid_argument("rank: no layout " + name + "; there are auto, lanes and inside");
}

struct Spin {
  const RankVariant& variant;
  std::int64_t rounds;
};

// Float64 multiply-adds per second of so many threads that do nothing else: the floor that benchmarks divide by.
double multiply_adds(const std::string& name, int threads) {
  Spin spin{find(name), 1 << 16};
  const auto task = [](void* context, std::ptrdiff_t) {
    const Spin& given = *static_cast<const Spin*>(context);
    volatile double kept = given.variant.spin(given.rounds);
    static_cast<void>(kept);
  };
  py::gil_scoped_release release;
  const auto began = std::chrono::steady_clock::now();
  parallel_for(8 * threads, threads, task, &spin);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  return 8.0 * threads * static_cast<double>(spin.rounds * spin.variant.spin_width) / seconds.count();
}

// What "auto" chooses for a block of `maps` maps.
std::string layout_for(const std::string& name, std::ptrdiff_t H, std::ptrdiff_t W, std::ptrdiff_t maps) {
  return rank_layout(find(name), {H, W, W, 1}, maps) == Layout::inside ? "inside" : "lanes";
}

py::array_t<std::int32_t> rank(const py::array& array, double rtol, const std::string& name, int threads,
                               const std::string& dtype, const std::string& layout) {
  const Maps maps = describe(array, dtype);
  const RankVariant& variant = find(name);
  const Layout chosen = layout_of(layout);
  const std::ptrdiff_t count = maps.N * maps.C;
  py::array_t<std::int32_t> result(count);
  std::int32_t* ranks = result.mutable_data();
  if (count == 0 || short_side(maps.shape) == 0) {
    std::fill_n(ranks, count, 0);
    return result;
  }
  Signals signals;
  {
    py::gil_scoped_release release;
    if (rank_maps(maps, rtol, variant, chosen, threads, ranks, poll_signals, &signals)) return result;
  }
  throw py::error_already_set();
}

}  // namespace

void register_rank(py::module_& module) {
  module.def("rank_variants", &rank_variants, "Each compiled variant, slowest first, and why it cannot run ('').");
  module.def("rank", &rank, py::arg("maps"), py::arg("rtol"), py::arg("variant"), py::arg("threads"),
             py::arg("dtype") = "", py::arg("layout") = "auto",
             "Ranks int32 [N * C] of maps [N, C, H, W], any strides; -1 for a map with NaN or infinity.\n\n"
             "maps: float16, float32 or float64; bfloat16 as its bits, uint16, with dtype=\"bfloat16\".\n"
             "Halves are read in place, as exactly as float32.\n"
             "layout: \"lanes\" puts a map into each lane of a vector, \"inside\" works on one map at a time.");
  module.def(
      "multiply_adds", &multiply_adds, py::arg("variant"), py::arg("threads"),
      "Float64 multiply-adds per second of this variant's vectors, measured in milliseconds: a floor for benchmarks.");
  module.def("rank_layout", &layout_for, py::arg("variant"), py::arg("H"), py::arg("W"), py::arg("maps"),
             "The layout that \"auto\" chooses for a block of so many maps [H, W].");
}

}  // namespace pyprune
