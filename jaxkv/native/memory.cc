// A memory of keys by values that fades, as XLA calls it: S = exp(g) S + k w^T, y = S^T q, token after token, where w is v
// or, by the delta rule, beta (v - exp(g) S^T k). Values don't meet: a task takes some of a head's, and the part of the
// state that they need stays in the nearest cache. XLA's CPU backend goes through all of it several times for each token.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "division.h"
#include "library.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace memory {
namespace {

constexpr int kVectors = 4;  // of values, that a task takes

struct Memory {
  int64_t rows, tokens, heads, keys, values, kept;
  const float *q, *k, *v, *g, *beta;  // [rows, tokens, heads, ...]; beta: null without the delta rule
  const float* state;                 // [rows, heads, keys, values]
  const int32_t* counts;              // [rows, kept]: after how many tokens states are kept
  float* y;                           // [rows, tokens, heads, values]
  float* states;                      // [rows, kept, heads, keys, values]
};

struct Token {
  const float *key, *query, *value;
  float stays, share;  // exp(g), beta
  bool corrects;       // whether by the delta rule
};

#define KERNEL "memory_kernel.h"
#include "each_set.h"
#undef KERNEL

void remember(const Memory& m, int64_t row, int64_t head, int64_t first, [[maybe_unused]] Isa isa) {
  WITH_SET(isa, remember(m, row, head, first))
}

template <class Schedule> void remember_all(const Memory& m, Isa isa, int64_t threads, const Schedule& schedule) {
  const int64_t width = kVectors * (isa == kAvx512 ? 16 : isa == kAvx2 ? 8 : 4), parts = (m.values + width - 1) / width;
  const bool pays = m.rows * m.tokens * m.heads * m.keys * m.values * 4 > kAlone;
  auto run = [&](int64_t number, int64_t) {
    const int64_t head = number / parts;
    remember(m, head / m.heads, head % m.heads, number % parts * width, isa);
  };
  divide(m.rows * m.heads * parts, pays ? threads - 1 : 0, run, schedule);
}

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer g,
                  ffi::AnyBuffer beta, ffi::AnyBuffer state, ffi::AnyBuffer counts, ffi::Result<ffi::AnyBuffer> y,
                  ffi::Result<ffi::AnyBuffer> states, int64_t corrects) {
  for (const ffi::AnyBuffer& x : {q, k, v, g, beta, state, *y, *states})
    if (x.element_type() != ffi::DataType::F32) return wrong("jaxkv: a memory that is not float32");
  if (counts.element_type() != ffi::DataType::S32) return wrong("jaxkv: counts that are not int32");
  if (k.dimensions().size() != 4 || v.dimensions().size() != 4 || counts.dimensions().size() != 2)
    return wrong("jaxkv: a memory of a wrong rank");
  const auto kd = k.dimensions();
  Memory m{kd[0], kd[1], kd[2], kd[3], v.dimensions()[3], counts.dimensions()[1]};
  if (!has_shape(q, {m.rows, m.tokens, m.heads, m.keys}) || !has_shape(v, {m.rows, m.tokens, m.heads, m.values}) ||
      !has_shape(g, {m.rows, m.tokens, m.heads}) || !has_shape(beta, {m.rows, m.tokens, m.heads}) ||
      !has_shape(state, {m.rows, m.heads, m.keys, m.values}) || !has_shape(counts, {m.rows, m.kept}) ||
      !has_shape(*y, {m.rows, m.tokens, m.heads, m.values}) || !has_shape(*states, {m.rows, m.kept, m.heads, m.keys, m.values}))
    return wrong("jaxkv: a memory of shapes that don't belong together");
  const auto numbers = [](const ffi::AnyBuffer& x) { return static_cast<float*>(x.untyped_data()); };
  m.q = numbers(q), m.k = numbers(k), m.v = numbers(v), m.g = numbers(g), m.beta = corrects ? numbers(beta) : nullptr;
  m.state = numbers(state), m.y = numbers(*y), m.states = numbers(*states);
  m.counts = static_cast<const int32_t*>(counts.untyped_data());
  const Threads threads{pool};
  remember_all(m, isa(), threads.count(), threads);
  return ffi::Error::Success();
}

// Random memories, of sizes that vectors don't divide, compared with the same in double precision.
bool right(int64_t rows, int64_t tokens, int64_t heads, int64_t keys, int64_t values, bool corrects, Isa isa) {
  uint32_t seed = 1;
  const auto made = [&](int64_t count) {
    std::vector<float> x(count);
    for (float& each : x) each = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1.0f;
    return x;
  };
  const int64_t kept = 3, each = rows * tokens * heads, whole = rows * heads * keys * values;
  const auto q = made(each * keys), k = made(each * keys), v = made(each * values), beta = made(each), before = made(whole);
  auto g = made(each);
  for (float& x : g) x = x > 0 ? -x : x;
  std::vector<int32_t> counts(rows * kept);
  for (int64_t i = 0; i < rows * kept; ++i) counts[i] = static_cast<int32_t>(i % (tokens + 3)) - 1;
  std::vector<float> y(each * values), states(whole * kept);
  remember_all({rows, tokens, heads, keys, values, kept, q.data(), k.data(), v.data(), g.data(), corrects ? beta.data() : nullptr,
                before.data(), counts.data(), y.data(), states.data()}, isa, 1, [](auto&&) {});
  const auto close = [](double got, double want) { return std::abs(got - want) <= 1e-4 * (1 + std::abs(want)); };
  for (int64_t line = 0; line < rows * heads * values; ++line) {
    const int64_t row = line / (heads * values), head = line / values % heads, value = line % values;
    std::vector<double> state(keys);
    for (int64_t i = 0; i < keys; ++i) state[i] = before[((row * heads + head) * keys + i) * values + value];
    for (int64_t t = 0; t <= tokens; ++t) {
      for (int64_t j = 0; j < kept; ++j) {
        if (std::clamp<int64_t>(counts[row * kept + j], 0, tokens) != t) continue;
        for (int64_t i = 0; i < keys; ++i)
          if (!close(states[(((row * kept + j) * heads + head) * keys + i) * values + value], state[i])) return false;
      }
      if (t == tokens) break;
      const int64_t at = (row * tokens + t) * heads + head;
      double found = 0, read = 0, written = v[at * values + value];
      for (int64_t i = 0; i < keys; ++i) found += (state[i] *= std::exp(double{g[at]})) * k[at * keys + i];
      if (corrects) written = (written - found) * beta[at];
      for (int64_t i = 0; i < keys; ++i) read += (state[i] += written * k[at * keys + i]) * q[at * keys + i];
      if (!close(y[at * values + value], read)) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace memory

int memory_is_wrong(Isa isa) {
  using memory::right;
  if (!right(2, 3, 2, 5, 7, true, isa)) return 1;
  if (!right(1, 4, 1, 3, 67, false, isa)) return 2;
  return right(1, 1, 3, 8, 64, true, isa) ? 0 : 3;
}

}  // namespace jaxkv

EXPORTED XLA_FFI_Error* jaxkv_memory(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_memory, jaxkv::memory::handle,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        .Attr<int64_t>("corrects"));
