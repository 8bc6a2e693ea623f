// The instruction sets: which are compiled, and which this machine has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Which instruction sets are compiled: all that there are, or one, as a bit each.
#ifndef JAXKV_SETS
#define JAXKV_SETS 7
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))  // what needs all registers for itself

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// function(arguments...) as it was compiled for an instruction set, by "each_set.h".
#if defined(__x86_64__) && JAXKV_SETS & 4
#define IF_AVX512(isa, call) if (isa == kAvx512) return avx512::call;
#else
#define IF_AVX512(isa, call)
#endif
#if defined(__x86_64__) && JAXKV_SETS & 2
#define IF_AVX2(isa, call) if (isa == kAvx2) return avx2::call;
#else
#define IF_AVX2(isa, call)
#endif
#if JAXKV_SETS & 1
#define IF_PLAIN(isa, call) return plain::call;
#else
#define IF_PLAIN(isa, call)
#endif
#define WITH_SET(isa, call) IF_AVX512(isa, call) IF_AVX2(isa, call) IF_PLAIN(isa, call)

namespace jaxkv {

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

enum Isa { kNone, kPlain, kAvx2, kAvx512 };

// The best instruction set that was compiled and that this machine has; kNone: none.
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;  // older versions of clang don't ask for f16c by name
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    const bool small = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool large = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (JAXKV_SETS & 4 && small && large) return kAvx512;
    if (JAXKV_SETS & 2 && small) return kAvx2;
    return JAXKV_SETS & 1 ? kPlain : kNone;
  }();
  return best;
#else
  return JAXKV_SETS & 1 ? kPlain : kNone;
#endif
}

inline bool has(Isa isa) { return isa >= kPlain && isa <= best_isa() && JAXKV_SETS >> (isa - 1) & 1; }

}  // namespace jaxkv
