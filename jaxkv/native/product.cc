// A few tokens times a matrix of weights: XLA's CPU backend copies the whole matrix in each call, to multiply it in another
// order. Here it is read once, in the order in which it lies.
//
// A number of the result is summed in the same order whatever part computes it, and whatever the other tokens are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "division.h"
#include "library.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace {

constexpr int kRows = 8;           // of a matrix [inner, outer], between two looks at the sums
constexpr int64_t kColumns = 512;  // the most that a task sums at once: those of some tokens stay in the nearest cache
constexpr int64_t kLine = 16;      // numbers of a line of the cache, which two threads should not write both

struct Product {
  int64_t tokens, inner, outer;
  const float* x;  // [tokens, inner]
  const void* w;   // [inner, outer]; or transposed, [outer, inner]
  ffi::DataType type;  // of w: a float of 32 or 16 bits
  bool transposed;
  float* y;        // [tokens, outer]
};

#define KERNEL "product_kernel.h"
#include "each_set.h"
#undef KERNEL

void part(const Product& p, int64_t begin, int64_t end, Isa isa) { WITH_SET(isa, part(p, begin, end)) }

template <class Schedule>
void multiply(const Product& p, Isa isa, int64_t threads, const Schedule& schedule) {
  // Some tasks for each thread: who is late takes fewer.
  const int64_t even = (p.outer + 4 * threads - 1) / (4 * threads);
  const int64_t size = std::min((even + kLine - 1) / kLine * kLine, kColumns);
  const bool pays = p.inner * p.outer * std::max<int64_t>(p.tokens, 4) > kAlone;
  auto run = [&](int64_t number, int64_t) {
    part(p, number * size, std::min((number + 1) * size, p.outer), isa);
  };
  divide((p.outer + size - 1) / size, pays ? threads - 1 : 0, run, schedule);
}

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y, int64_t transposed) {
  for (const ffi::AnyBuffer& each : {x, *y})
    if (each.element_type() != ffi::DataType::F32) return wrong("jaxkv: tokens that are not float32");
  const ffi::DataType type = w.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::F16 && type != ffi::DataType::BF16)
    return wrong("jaxkv: weights that are not floats of 32 or 16 bits");
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2) return wrong("jaxkv: wrong ranks");
  Product p{xd[0], xd[1], wd[!transposed], nullptr, nullptr, type, transposed != 0, nullptr};
  if (wd[transposed != 0] != p.inner || !has_shape(*y, {p.tokens, p.outer})) return wrong("jaxkv: shapes that don't fit together");
  if (p.tokens < 1 || p.inner < 1 || p.outer < 1) return wrong("jaxkv: sizes that are not read");
  p.x = static_cast<const float*>(x.untyped_data()), p.w = w.untyped_data();
  p.y = static_cast<float*>(y->untyped_data());
  multiply(p, isa(), std::max<int64_t>(pool.num_threads(), 1), [&](auto&& work) {
    auto task = work;
    pool.Schedule(std::move(task));
  });
  return ffi::Error::Success();
}

// Sizes that vectors don't divide, against sums in double precision.
bool right(int64_t tokens, bool transposed, ffi::DataType type, Isa isa) {
  constexpr int64_t inner = 45, outer = 107;
  uint32_t seed = 1;
  auto random = [&] { return static_cast<int32_t>((seed = seed * 1664525u + 1013904223u) >> 16 & 0xffff) / 32768.f - 1; };
  std::vector<float> x(tokens * inner), w(inner * outer), y(tokens * outer, NAN);
  for (float& number : x) number = random();
  std::vector<uint16_t> halves(w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    w[i] = int(64 * random()) / 64.f;  // of seven bits: the floats of 16 bits have all of them
    uint32_t bits;
    memcpy(&bits, &w[i], sizeof bits);
    const uint32_t half = w[i] ? (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)) : 0;
    halves[i] = type == ffi::DataType::F16 ? half : bits >> 16;
  }
  const void* read = type == ffi::DataType::F32 ? static_cast<const void*>(w.data()) : halves.data();
  multiply({tokens, inner, outer, x.data(), read, type, transposed, y.data()}, isa, 1, [](auto&&) {});
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < outer; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < inner; ++i) sum += double(x[t * inner + i]) * w[transposed ? o * inner + i : i * outer + o];
      if (!(std::fabs(y[t * outer + o] - sum) < 1e-5)) return false;
    }
  return true;
}

}  // namespace

int product_is_wrong(Isa isa) {
  int number = 0;
  for (ffi::DataType type : {ffi::DataType::F32, ffi::DataType::F16, ffi::DataType::BF16})
    for (int transposed = 0; transposed < 2; ++transposed) {
      ++number;
      for (int64_t tokens = 4; tokens < 8; ++tokens)
        if (!right(tokens, transposed, type, isa)) return number;
    }
  return 0;
}

}  // namespace jaxkv

EXPORTED XLA_FFI_Error* jaxkv_product(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_product, jaxkv::handle,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("transposed"));
