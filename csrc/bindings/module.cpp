#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native kernels of pyprune.";
  pyprune::register_kmeans(module);
  pyprune::register_rank(module);
  pyprune::register_rank_cuda(module);
  pyprune::register_ssim(module);
  pyprune::register_ssim_cuda(module);
}
