// The number formats that arrays come in.
#pragma once

#include <cstddef>

namespace pyprune {

enum class Element { float32, float64, float16, bfloat16 };

static inline std::ptrdiff_t bytes_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

}  // namespace pyprune
