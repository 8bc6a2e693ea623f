// What the numbers are that the storages keep, one at a time in double precision: what the kernel is compared with.
#pragma once

#include "attention.h"

namespace jaxkv {

inline double float_of(uint32_t bits) { float y; memcpy(&y, &bits, sizeof y); return y; }

// A float of `bits` bits, `mantissa` of them behind the point.
inline double small_float(uint32_t x, int bits, int mantissa) {
  const int exponents = bits - 1 - mantissa, bias = (1 << (exponents - 1)) - 1;
  const int exponent = x >> mantissa & ((1 << exponents) - 1), rest = x & ((1 << mantissa) - 1);
  const double size = exponent ? std::ldexp((1 << mantissa) + rest, exponent - bias - mantissa) : std::ldexp(rest, 1 - bias - mantissa);
  return x >> (bits - 1) & 1 ? -size : size;
}

// Number h of the vector in slot `at`.
inline double number(const Vectors& x, int64_t at, int64_t h) {
  const int64_t i = at * x.size + h;
  const auto* bytes = static_cast<const uint8_t*>(x.codes);
  const double scale = !x.scales            ? 1.
                       : x.type == kInt4 ? float_of(uint32_t{static_cast<const uint16_t*>(x.scales)[at]} << 16)
                                            : static_cast<const float*>(x.scales)[at];
  switch (x.type) {
    case kFloat: return static_cast<const float*>(x.codes)[i] * scale;
    case kHalf: return small_float(static_cast<const uint16_t*>(x.codes)[i], 16, 10) * scale;
    case kBfloat: return float_of(uint32_t{static_cast<const uint16_t*>(x.codes)[i]} << 16) * scale;
    case kInt8: return static_cast<int8_t>(bytes[i]) * scale;
    case kE4m3: return small_float(bytes[i], 8, 3) * scale;
    case kE5m2: return small_float(bytes[i], 8, 2) * scale;
    default: {
      const int64_t half = x.size / 2;
      const uint8_t both = bytes[at * half + h % half], group = x.groups[(at * x.size + h) / x.group];
      return ((h < half ? both & 15 : both >> 4) - (group & 15)) * ((group >> 4) + 1) * scale;
    }
  }
}

}  // namespace jaxkv
