// The vectors of one instruction set: W floats. Included in its namespace, before kernel.h.

typedef float vf __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2)));
typedef int8_t vb __attribute__((vector_size(W), aligned(1)));
typedef uint8_t vu __attribute__((vector_size(W), aligned(1)));
typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
typedef uint8_t u8 __attribute__((vector_size(8), aligned(1)));

INLINE vf splat(float x) { return x - vf{}; }
// The same bytes as another type.
template <class To, class From> INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To y; memcpy(&y, &x, sizeof y); return y;
}
INLINE vf bits_to_float(vi x) { return as<vf>(x); }
INLINE vi float_to_bits(vf x) { return as<vi>(x); }
