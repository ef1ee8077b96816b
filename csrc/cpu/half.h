// Float16 and bfloat16 as bits, and what they are in float32: every one of their values is exact there.
//
// static: each file that includes this keeps its own copy, compiled for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyprune {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

static inline double value_of(double a) {
  return a;
}
static inline double value_of(float a) {
  return static_cast<double>(a);
}

static inline double value_of(BFloat16 a) {
  const std::uint32_t bits = static_cast<std::uint32_t>(a.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<double>(value);
}

// Denormal numbers become float32 numbers by a subtraction, not by a product that a flushing processor would lose.
static inline double value_of(Float16 a) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(a.bits & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  const std::uint32_t step = exponent == 0x0f800000 ? 224u << 23 : exponent == 0 ? 113u << 23 : 112u << 23;
  const std::uint32_t bits = magnitude + step, least = 113u << 23;  // 2^-14
  float value, offset;
  std::memcpy(&value, &bits, sizeof value);
  std::memcpy(&offset, &least, sizeof offset);
  if (exponent == 0) value -= offset;
  return static_cast<double>(a.bits & 0x8000 ? -value : value);
}

}  // namespace pyprune
