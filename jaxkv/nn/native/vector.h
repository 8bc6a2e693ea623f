// The vectors of one instruction set: W floats. Included in its namespace, before kernel.h.

// They may lie anywhere, in memory of any type, so they are read and written by dereferencing pointers. For memcpy g++ 12
// moves 32 bytes as two halves, by way of the stack, and a load from there waits until both are written.
#define VECTOR(bytes, align) __attribute__((vector_size(bytes), aligned(align), may_alias))
typedef float vf VECTOR(W * 4, 4);
typedef int32_t vi VECTOR(W * 4, 4);
typedef uint16_t vh VECTOR(W * 2, 2);
typedef int8_t vb VECTOR(W, 1);
typedef uint8_t vu VECTOR(W, 1);
typedef float f8 VECTOR(32, 4);
typedef int32_t i8 VECTOR(32, 4);
typedef uint8_t u8 VECTOR(8, 1);
#undef VECTOR

INLINE vf splat(float x) { return x - vf{}; }
// The same bytes as another type.
template <class To, class From> INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To y; memcpy(&y, &x, sizeof y); return y;
}
INLINE vf bits_to_float(vi x) { return as<vf>(x); }
INLINE vi float_to_bits(vf x) { return as<vi>(x); }
