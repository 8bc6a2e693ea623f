// A few tokens times a matrix of weights: XLA's CPU backend copies the whole matrix in each call, to multiply it in another
// order. Here it is read once, in the order in which it lies. And tokens of several groups, times a matrix for each group.
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
constexpr int kDeep = 64;          // the same of a few columns, which more than kFew tokens are multiplied by one after another
constexpr int64_t kFew = 16;
constexpr int64_t kColumns = 512;  // the most that a task sums at once: those of some tokens stay in the nearest cache
constexpr int64_t kTogether = 64;     // tokens of a group that a task takes: a part of its matrix stays close for them
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

void part(const Product& p, int64_t begin, int64_t end, [[maybe_unused]] Isa isa) { WITH_SET(isa, part(p, begin, end)) }

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

// Tokens ordered by group, and one matrix for each group: x[begin, end) times w[group], in pieces of up to kTogether tokens.
template <class Schedule>
void multiply_groups(const Product& all, const std::vector<int64_t>& ends, Isa isa, int64_t threads, const Schedule& schedule) {
  struct Piece { int64_t group, begin, end; };
  std::vector<Piece> pieces;
  for (size_t group = 0; group < ends.size(); ++group)
    for (int64_t t = group ? ends[group - 1] : 0; t < ends[group]; t += kTogether)
      pieces.push_back({static_cast<int64_t>(group), t, std::min(t + kTogether, ends[group])});
  const int64_t count = pieces.size(), wanted = (4 * threads + count - 1) / std::max<int64_t>(count, 1);
  const int64_t even = (all.outer + wanted - 1) / wanted;
  const int64_t size = std::min((even + kLine - 1) / kLine * kLine, kColumns), parts = (all.outer + size - 1) / size;
  const int64_t bytes = all.inner * all.outer * (all.type == ffi::DataType::F32 ? 4 : 2);
  auto run = [&](int64_t number, int64_t) {
    const Piece& piece = pieces[number / parts];
    Product p = all;
    p.tokens = piece.end - piece.begin;
    p.x += piece.begin * p.inner, p.y += piece.begin * p.outer;
    p.w = static_cast<const char*>(p.w) + piece.group * bytes;
    const int64_t begin = number % parts * size;
    part(p, begin, std::min(begin + size, p.outer), isa);
  };
  const bool pays = all.inner * all.outer * std::max<int64_t>(all.tokens, 4) > kAlone;
  divide(count * parts, pays ? threads - 1 : 0, run, schedule);
  const int64_t done = ends.empty() ? 0 : ends.back();  // tokens of no group give zeros
  std::fill(all.y + done * all.outer, all.y + all.tokens * all.outer, 0.f);
}

// What is wrong with the types of these buffers, or null.
const char* unusable(const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& y) {
  for (const ffi::AnyBuffer& each : {x, y})
    if (each.element_type() != ffi::DataType::F32) return "jaxkv: tokens that are not float32";
  const ffi::DataType type = w.element_type();
  if (type != ffi::DataType::F32 && type != ffi::DataType::F16 && type != ffi::DataType::BF16)
    return "jaxkv: weights that are not floats of 32 or 16 bits";
  return nullptr;
}

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y, int64_t transposed) {
  const Threads threads{pool};
  if (const char* reason = unusable(x, w, *y)) return wrong(reason);
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 2) return wrong("jaxkv: wrong ranks");
  Product p{xd[0], xd[1], wd[!transposed], nullptr, nullptr, w.element_type(), transposed != 0, nullptr};
  if (wd[transposed != 0] != p.inner || !has_shape(*y, {p.tokens, p.outer})) return wrong("jaxkv: shapes that don't fit together");
  if (p.tokens < 1 || p.inner < 1 || p.outer < 1) return wrong("jaxkv: sizes that are not read");
  p.x = static_cast<const float*>(x.untyped_data()), p.w = w.untyped_data();
  p.y = static_cast<float*>(y->untyped_data());
  multiply(p, isa(), threads.count(), threads);
  return ffi::Error::Success();
}

ffi::Error handle_groups(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer sizes,
                         ffi::Result<ffi::AnyBuffer> y) {
  const Threads threads{pool};
  if (const char* reason = unusable(x, w, *y)) return wrong(reason);
  if (sizes.element_type() != ffi::DataType::S32) return wrong("jaxkv: sizes of groups that are not int32");
  const auto xd = x.dimensions(), wd = w.dimensions();
  if (xd.size() != 2 || wd.size() != 3 || sizes.dimensions().size() != 1) return wrong("jaxkv: wrong ranks");
  const int64_t groups = wd[0];
  Product p{xd[0], xd[1], wd[2], nullptr, nullptr, w.element_type(), false, nullptr};
  if (wd[1] != p.inner || !has_shape(sizes, {groups}) || !has_shape(*y, {p.tokens, p.outer}))
    return wrong("jaxkv: shapes that don't fit together");
  if (p.tokens < 1 || p.inner < 1 || p.outer < 1 || groups < 1) return wrong("jaxkv: sizes that are not read");
  std::vector<int64_t> ends(groups);
  const int32_t* each = static_cast<const int32_t*>(sizes.untyped_data());
  int64_t end = 0;
  for (int64_t group = 0; group < groups; ++group) {
    if (each[group] < 0) return wrong("jaxkv: a group of fewer than 0 tokens");
    ends[group] = end += each[group];
  }
  if (end > p.tokens) return wrong("jaxkv: groups of more tokens than there are");
  p.x = static_cast<const float*>(x.untyped_data()), p.w = w.untyped_data();
  p.y = static_cast<float*>(y->untyped_data());
  multiply_groups(p, ends, isa(), threads.count(), threads);
  return ffi::Error::Success();
}

// A product of random numbers, beside sums in double precision.
struct Case {
  int64_t inner, outer;
  std::vector<float> x, w, y;
  std::vector<uint16_t> halves;
  uint32_t seed = 1;

  Case(int64_t tokens, int64_t inner, int64_t outer, int64_t groups, ffi::DataType type)
      : inner(inner), outer(outer), x(tokens * inner), w(groups * inner * outer), y(tokens * outer, NAN), halves(w.size()) {
    for (float& number : x) number = random();
    for (size_t i = 0; i < w.size(); ++i) {
      w[i] = int(64 * random()) / 64.f;  // of seven bits: the floats of 16 bits have all of them
      uint32_t bits;
      memcpy(&bits, &w[i], sizeof bits);
      const uint32_t half = w[i] ? (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)) : 0;
      halves[i] = type == ffi::DataType::F16 ? half : bits >> 16;
    }
  }

  float random() { return static_cast<int32_t>((seed = seed * 1664525u + 1013904223u) >> 16 & 0xffff) / 32768.f - 1; }

  Product product(ffi::DataType type, bool transposed) {
    const void* read = type == ffi::DataType::F32 ? static_cast<const void*>(w.data()) : halves.data();
    return {int64_t(x.size()) / inner, inner, outer, x.data(), read, type, transposed, y.data()};
  }

  bool is_right(int64_t begin, int64_t end, int64_t group, bool transposed) const {
    const float* matrix = w.data() + group * inner * outer;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t o = 0; o < outer; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < inner; ++i) sum += double(x[t * inner + i]) * matrix[transposed ? o * inner + i : i * outer + o];
        if (!(std::fabs(y[t * outer + o] - sum) < 1e-5)) return false;
      }
    return true;
  }
};

// Sizes that vectors don't divide.
bool right(int64_t tokens, bool transposed, ffi::DataType type, Isa isa) {
  Case c(tokens, 45, 107, 1, type);
  multiply(c.product(type, transposed), isa, 1, [](auto&&) {});
  return c.is_right(0, tokens, 0, transposed);
}

// No token, several and a few, and two of no group; more rows than are taken at once.
bool groups_are_right(ffi::DataType type, Isa isa) {
  Case c(kFew + 6, 2 * kDeep + 5, 107, 3, type);
  multiply_groups(c.product(type, false), {0, kFew + 1, kFew + 4}, isa, 1, [](auto&&) {});
  for (size_t i = (kFew + 4) * c.outer; i < c.y.size(); ++i)
    if (c.y[i] != 0) return false;
  return c.is_right(0, kFew + 1, 1, false) && c.is_right(kFew + 1, kFew + 4, 2, false);
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
  for (ffi::DataType type : {ffi::DataType::F32, ffi::DataType::F16, ffi::DataType::BF16}) {
    ++number;
    if (!groups_are_right(type, isa)) return number;
  }
  return 0;
}

}  // namespace jaxkv

EXPORTED XLA_FFI_Error* jaxkv_product(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_product, jaxkv::handle,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<int64_t>("transposed"));

EXPORTED XLA_FFI_Error* jaxkv_groups(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_groups, jaxkv::handle_groups,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
