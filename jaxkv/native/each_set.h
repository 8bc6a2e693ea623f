// Includes the file KERNEL once per instruction set, in a namespace of its own, with W (floats of a vector), ACCUMULATORS
// (vectors that stay in registers) and what vector.h has. No include guard on purpose.

#if JAXKV_SETS & 1
#define W 4
#if defined(__aarch64__)
#define ACCUMULATORS 16
#else
#define ACCUMULATORS 8
#endif
namespace plain {
#include "vector.h"
#include KERNEL
}  // namespace plain
#undef W
#undef ACCUMULATORS
#endif

#if defined(__x86_64__) && JAXKV_SETS & 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define W 8
#define ACCUMULATORS 8
namespace avx2 {
#include "vector.h"
#include KERNEL
}  // namespace avx2
#undef W
#undef ACCUMULATORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__x86_64__) && JAXKV_SETS & 4
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define W 16
#define ACCUMULATORS 16
namespace avx512 {
#include "vector.h"
#include KERNEL
}  // namespace avx512
#undef W
#undef ACCUMULATORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
