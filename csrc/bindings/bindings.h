#pragma once

#include <pybind11/pybind11.h>

namespace pyprune {

void register_rank(pybind11::module_& module);

}  // namespace pyprune
