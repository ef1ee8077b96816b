#include "bindings.h"

namespace pyprune {

bool poll_signals(void* signals) {
  const auto now = std::chrono::steady_clock::now();
  auto& looked = static_cast<Signals*>(signals)->looked;
  if (now - looked < std::chrono::milliseconds(50)) return false;
  looked = now;
  pybind11::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

}  // namespace pyprune
