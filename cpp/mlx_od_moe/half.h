// float16 and bfloat16 to and from float32, bit by bit, for code that is not on the hot path.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace mlx_od_moe {

inline float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bfloat(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31u;
  const uint32_t fraction = half & 1023u;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
    value = std::bit_cast<float>(wide << 23 | fraction << 13);
  }
  return (half & 0x8000u) != 0 ? -value : value;
}

// Rounds to nearest, ties to even; what is too large becomes infinity.
inline uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) {  // subnormal: units of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)));
  }
  const uint32_t rest = (bits & 0x7fffffffu) - 0x38000000u;
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rest + 0xfffu + (rest >> 13 & 1u)) >> 13));
}

}  // namespace mlx_od_moe
