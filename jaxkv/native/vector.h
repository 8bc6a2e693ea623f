// The vectors of one instruction set: W floats. Included in its namespace, before what computes with them.

// Loads and stores are of these types: of memcpy some compilers make two halves and a way through the stack.
typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint8_t vu __attribute__((vector_size(W), aligned(1), may_alias));
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t u8 __attribute__((vector_size(8), aligned(1), may_alias));

INLINE vf splat(float x) { return x - vf{}; }
// The same bytes as another type.
template <class To, class From> INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To y; memcpy(&y, &x, sizeof y); return y;
}
INLINE vf bits_to_float(vi x) { return as<vf>(x); }
INLINE vi float_to_bits(vf x) { return as<vi>(x); }

// Compilers put __builtin_convertvector from bytes together of many small steps.
#if W == 4
INLINE vi widen(vb x) { return __builtin_convertvector(x, vi); }
INLINE vi widen(vu x) { return __builtin_convertvector(x, vi); }
INLINE vh widen16(vu x) { return __builtin_convertvector(x, vh); }
INLINE vi widen32(vh x) { return __builtin_convertvector(x, vi); }
INLINE i8 widen8(u8 x) { return __builtin_convertvector(x, i8); }
INLINE vf halves(vh h) {
#if defined(__aarch64__)
  uint16x4_t x; memcpy(&x, &h, sizeof x);
  const float32x4_t y = vcvt_f32_f16(vreinterpret_f16_u16(x));
  vf z; memcpy(&z, &y, sizeof z); return z;
#else  // the smallest ones without the denormal floats that XLA switches off
  vi x = __builtin_convertvector(h, vi), sign = (x & 0x8000) << 16, size = x & 0x7fff;
  vf small = __builtin_convertvector(size, vf) * 0x1p-24f;
  vi normal = (size << 13) + (112 << 23);
  vi y = size < 0x400 ? float_to_bits(small) : normal;
  y = size >= 0x7c00 ? normal | 0x7f800000 : y;
  return bits_to_float(y | sign);
#endif
}
#elif W == 8
INLINE vi widen(vb x) { return as<vi>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(as<int64_t>(x)))); }
INLINE vi widen(vu x) { return as<vi>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(as<int64_t>(x)))); }
INLINE vh widen16(vu x) { return as<vh>(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(as<int64_t>(x)))); }
INLINE vi widen32(vh x) { return as<vi>(_mm256_cvtepu16_epi32(as<__m128i>(x))); }
INLINE i8 widen8(u8 x) { return as<i8>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(as<int64_t>(x)))); }
INLINE vf halves(vh x) { return as<vf>(_mm256_cvtph_ps(as<__m128i>(x))); }
#else
INLINE vi widen(vb x) { return as<vi>(_mm512_cvtepi8_epi32(as<__m128i>(x))); }
INLINE vi widen(vu x) { return as<vi>(_mm512_cvtepu8_epi32(as<__m128i>(x))); }
INLINE vh widen16(vu x) { return as<vh>(_mm256_cvtepu8_epi16(as<__m128i>(x))); }
INLINE vi widen32(vh x) { return as<vi>(_mm512_cvtepu16_epi32(as<__m256i>(x))); }
INLINE i8 widen8(u8 x) { return as<i8>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(as<int64_t>(x)))); }
INLINE vf halves(vh x) { return as<vf>(_mm512_cvtph_ps(as<__m256i>(x))); }
#endif

INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
INLINE vf load(const Bfloat* p) { return bits_to_float(widen32(*reinterpret_cast<const vh*>(p)) << 16); }
INLINE vf load(const Half* p) { return halves(*reinterpret_cast<const vh*>(p)); }
INLINE vf load(const int8_t* p) { return __builtin_convertvector(widen(*reinterpret_cast<const vb*>(p)), vf); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }

// The first n numbers at p, and zeros: never a byte further.
template <class E> INLINE vf load_some(const E* p, int n) {
  E x[W];
  memset(x, 0, sizeof x);
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return load(x);
}

// The first n numbers of a vector, of which it gets a copy: it may stay in its register.
INLINE void store_some(float* p, vf x, int n) {
  float all[W];
  store(all, x);
  for (int i = 0; i < n; ++i) p[i] = all[i];
}

// a * b + c, rounded once where the machine can: left to themselves, compilers do it here and not there.
#if W == 16
INLINE vf fused(vf a, vf b, vf c) { return as<vf>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c))); }
#elif W == 8
INLINE vf fused(vf a, vf b, vf c) { return as<vf>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c))); }
#elif defined(__aarch64__)
INLINE vf fused(vf a, vf b, vf c) { return as<vf>(vfmaq_f32(as<float32x4_t>(c), as<float32x4_t>(a), as<float32x4_t>(b))); }
#else
INLINE vf fused(vf a, vf b, vf c) { return a * b + c; }
#endif

// The sums of W vectors, as one.
#if W == 4
INLINE vf pairs(vf a, vf b) { return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE vf fours(vf a, vf b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
INLINE vf sums(const vf* a) { return fours(pairs(a[0], a[1]), pairs(a[2], a[3])); }
#elif W == 8
INLINE vf pairs(vf a, vf b) {
  return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
INLINE vf fours(vf a, vf b) {
  return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vf eights(vf a, vf b) {
  return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE vf sums(const vf* a) {
  return eights(fours(pairs(a[0], a[1]), pairs(a[2], a[3])), fours(pairs(a[4], a[5]), pairs(a[6], a[7])));
}
#else
INLINE vf pairs(vf a, vf b) {
  return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
INLINE vf fours(vf a, vf b) {
  return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE vf eights(vf a, vf b) {  // quarters 0 + 1 and 2 + 3 of both
  return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE vf sums4(const vf* a) { return fours(pairs(a[0], a[1]), pairs(a[2], a[3])); }
INLINE vf sums(const vf* a) { return eights(eights(sums4(a), sums4(a + 4)), eights(sums4(a + 8), sums4(a + 12))); }
#endif
