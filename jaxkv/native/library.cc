// What jaxkv/native/library.py asks of the library before it gives it to XLA.
#include "library.h"

#include <atomic>

namespace jaxkv {
namespace {

std::atomic<int> in_use{kNone};  // kNone: the best

constexpr int (*kParts[])(Isa) = {attention_is_wrong, product_is_wrong, rows_are_wrong, memory_is_wrong};

}  // namespace

Isa isa() {
  const Isa chosen = static_cast<Isa>(in_use.load(std::memory_order_relaxed));
  return chosen ? chosen : best_isa();
}

}  // namespace jaxkv

// The version of XLA's interface that this was built for: major * 1000 + minor.
EXPORTED int jaxkv_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// Has calls run with an instruction set: 1 plain, 2 AVX2, 3 AVX-512; with the best where it can't be used here. Returns it.
EXPORTED int jaxkv_use(int isa) {
  using namespace jaxkv;
  return in_use = has(static_cast<Isa>(isa)) ? isa : best_isa();
}

// 0 if all parts compute right with every instruction set that can be used here, else 100 * part + 10 * instruction set +
// case; -1: no instruction set can be used.
EXPORTED int jaxkv_self_test() {
  using namespace jaxkv;
  if (best_isa() == kNone) return -1;
  int number = 0;
  for (const auto& wrong_case : kParts) {
    ++number;
    for (int set = kPlain; set <= kAvx512; ++set) {
      const Isa isa = static_cast<Isa>(set);
      if (const int wrong = has(isa) ? wrong_case(isa) : 0) return 100 * number + 10 * set + wrong;
    }
  }
  return 0;
}
