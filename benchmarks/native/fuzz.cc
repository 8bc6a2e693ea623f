// Random calls of attention, of the product and of memories that fade, compared with sums in double precision, and random
// moves of rows, in buffers that end where they say.
//   XLA=$(python -c "import jax; print(jax.ffi.include_dir())")
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -ffp-contract=fast -pthread -I$XLA benchmarks/native/fuzz.cc -o fuzz
//   ./fuzz 2000
// Each call is with one of the instruction sets of this machine.
// On ARM: aarch64-linux-gnu-g++ -std=c++17 -O2 -w ... , and qemu-aarch64 -L /usr/aarch64-linux-gnu ./fuzz 400.
// With -fsanitize=thread it looks for races. Lengths, rows, pages and positions are wrong on purpose, now and then: what is
// read must stay within the buffers all the same.
#include <cstdio>
#include <random>
#include <thread>

#include "../../jaxkv/native/memory.cc"
#include "../../jaxkv/native/numbers.h"
#include "../../jaxkv/native/product.cc"
#include "../../jaxkv/native/rows.h"

using namespace jaxkv;

Isa jaxkv::isa() { return best_isa(); }

static std::mt19937 source;
static int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint32_t>(n)); }
static bool rarely() { return below(8) == 0; }
static float number_below_1() { return static_cast<float>(below(2001)) / 1000 - 1; }

static Isa any_set() {
  Isa set = kNone;
  while (!has(set)) set = static_cast<Isa>(1 + below(best_isa()));
  return set;
}

template <class T, class F> static std::unique_ptr<T[]> made(int64_t n, const F& of) {
  std::unique_ptr<T[]> x(new T[n]);
  for (int64_t i = 0; i < n; ++i) x[i] = of(i);
  return x;
}

// A buffer of one storage, with random bytes: no NaN, no infinities.
struct Store {
  std::unique_ptr<uint8_t[]> codes, groups;
  std::unique_ptr<uint16_t[]> halves;
  std::unique_ptr<float[]> floats, factors;
  Vectors vectors;

  Store(Type type, int64_t size, int64_t places) {
    vectors = {type, size, nullptr, nullptr, nullptr, 0};
    const int64_t count = places * bytes_of(vectors);
    if (type == kFloat) {
      floats = made<float>(places * size, [](int64_t) { return number_below_1(); });
      vectors.codes = floats.get();
    } else if (type == kHalf || type == kBfloat) {
      halves = made<uint16_t>(places * size, [&](int64_t) { return source() & (type == kHalf ? 0xbbff : 0xbfff); });
      if (type == kBfloat)
        for (int64_t i = 0; i < places * size; ++i) halves[i] = (halves[i] & 0x807f) | 0x3e80;
      vectors.codes = halves.get();
    } else {
      const uint8_t used = type == kInt8 ? 3 : type == kInt4 ? 255 : 0xbf;
      codes = made<uint8_t>(count, [&](int64_t) { return source() & used; });
      vectors.codes = codes.get();
    }
    if (!size) return;
    if (type == kInt4) {
      int64_t group = 1 + below(size / 2);
      while (size % (2 * group)) --group;
      groups = made<uint8_t>(places * size / group, [](int64_t) { return source() & 0x1f; });
      halves = made<uint16_t>(places, [](int64_t) { return 0x3d00 | (source() & 0x7f); });
      vectors.groups = groups.get(), vectors.group = group, vectors.scales = halves.get();
    } else if (type >= kInt8) {
      factors = made<float>(places, [](int64_t) { return 0.5f + number_below_1() / 4; });
      vectors.scales = factors.get();
    }
  }
};

static bool attention_is_right(int64_t seed) {
  source.seed(static_cast<uint32_t>(seed));
  const int64_t B = 1 + below(4), K = 1 + below(3), G = 1 + below(5), T = rarely() ? 1 + below(9) : 1;
  const int64_t L = 1 + below(3);
  const Type k_type = static_cast<Type>(below(kTypes)), v_type = static_cast<Type>(below(kTypes));
  auto size = [&](Type type) { return (1 + below(rarely() ? 150 : 40)) * (type == kInt4 ? 2 : 1); };
  const bool paged = below(2), inside = below(4) == 0, tree = below(4) == 0;
  const int64_t Hk = inside && below(3) == 0 ? 0 : size(k_type), Hv = size(v_type), H = Hk + (inside ? Hv : 0);
  const int64_t page = 1 + below(20), V = paged ? page * (1 + below(60)) : 1 + below(1300);
  const int64_t A = paged ? 1 + below(70) : B + below(2), S = paged ? page : V;
  auto positions = made<int32_t>(B * V, [&](int64_t i) { return rarely() ? -1 : rarely() ? int32_t(source()) : int32_t(i % V); });
  auto rows = made<int32_t>(B, [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(A)); });
  auto filled = made<int32_t>(B, [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(V + 1)); });
  auto at = made<int32_t>(B * T, [&](int64_t) { return rarely() ? -1 : int32_t(below(V)); });
  const int64_t window = 1 + below(V);
  auto low = made<int32_t>(B * T, [&](int64_t i) { return rarely() ? int32_t(source()) : int32_t(std::max<int64_t>(at[i] - window + 1, 0)); });
  auto spans = made<int32_t>(B * T, [&](int64_t) { return int32_t(below(3)); });
  auto kv_spans = made<int32_t>(B * V, [&](int64_t) { return int32_t(below(3)); });
  auto high = made<int32_t>(B * T, [&](int64_t i) { return at[i] + int32_t(below(5)); });
  auto base = made<int32_t>(B, [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(V)); });
  auto depths = made<int32_t>(B * T, [&](int64_t i) { return rarely() ? int32_t(source()) : base[i / T] + int32_t(below(T)); });
  auto ancestors = made<bool>(B * T * T, [&](int64_t) { return below(2) == 1; });
  auto table = made<int32_t>(B * (V / S), [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(A)); });
  auto q = made<float>(B * K * G * T * H, [&](int64_t) { return number_below_1() / 4; });
  const int64_t places = L * A * K * S, N = B * K * G * T;
  const Store k(inside && !Hk ? v_type : k_type, Hk, places), v(v_type, Hv, places);
  auto logits = made<float>(K * G, [&](int64_t) { return number_below_1(); });
  auto out = made<float>(N * Hv, [](int64_t) { return 0.f; }), logs = made<float>(N, [](int64_t) { return 0.f; });
  const bool with_spans = below(2), with_logits = below(2);
  Call call{};
  call.B = B, call.K = K, call.G = G, call.T = T, call.H = H, call.L = L, call.A = A, call.S = S, call.V = V;
  call.keys = k.vectors, call.values = v.vectors, call.inside = inside, call.q = q.get(), call.layer = below(L);
  call.rows = rows.get(), call.filled = filled.get(), call.kv_positions = positions.get(), call.low = low.get();
  call.positions = at.get();
  if (with_spans) call.spans = spans.get(), call.kv_spans = kv_spans.get(), call.high = high.get();
  if (tree) call.base = base.get(), call.depths = depths.get(), call.ancestors = ancestors.get();
  if (paged) call.table = table.get();
  if (with_logits) call.sink_logits = logits.get();
  call.sinks = below(4), call.softcap = below(2) ? 3.f : 0.f, call.out = out.get(), call.log_total = logs.get();
  std::vector<std::thread> threads;
  const int64_t helpers = below(4);
  Attention attention(call, any_set(), helpers + 1);
  attend(attention, helpers, [&](auto&& work) { threads.emplace_back(work); });
  for (auto& thread : threads) thread.join();
  for (int64_t n = 0; n < N; ++n) {
    const int64_t t = n % T, head = n / (G * T) % K, b = n / (K * G * T), query = b * T + t;
    double total = with_logits ? std::exp(double(logits[n / T % (K * G)])) : 0;
    std::vector<double> mixed(Hv);
    for (int64_t s = 0; s < std::min<int64_t>(std::max(filled[b], 0), V); ++s) {
      if (!call.sees(query, positions[b * V + s], kv_spans[b * V + s])) continue;
      int64_t place = std::clamp<int64_t>(rows[b], 0, A - 1), slot = s;
      if (paged) {
        place = table[b * (V / S) + s / S], slot = s % S;
        if (place < 0 || place >= A) continue;
      }
      const int64_t i = ((call.layer * A + place) * K + head) * S + slot;
      double score = 0;
      for (int64_t h = 0; h < Hk; ++h) score += double(q[n * H + H - Hk + h]) * number(k.vectors, i, h);
      for (int64_t h = 0; inside && h < Hv; ++h) score += double(q[n * H + h]) * number(v.vectors, i, h);
      if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
      const double weight = std::exp(score);
      total += weight;
      for (int64_t h = 0; h < Hv; ++h) mixed[h] += weight * number(v.vectors, i, h);
    }
    double most = 1;
    for (int64_t h = 0; h < Hv; ++h) most = std::max(most, total ? std::fabs(mixed[h] / total) : 0);
    for (int64_t h = 0; h < Hv; ++h)
      if (!(std::fabs(out[n * Hv + h] - (total ? mixed[h] / total : 0)) < 1e-4 * most)) return false;
  }
  return true;
}

// Rows moved in several buffers at once, compared with copies of what they were.
static bool moves_are_right(int64_t seed) {
  source.seed(static_cast<uint32_t>(seed));
  const int64_t count = 1 + below(9), helpers = below(4);
  auto rows = made<int32_t>(count, [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(count)); });
  if (below(2)) {  // cycles only
    for (int64_t r = 0; r < count; ++r) rows[r] = static_cast<int32_t>(r);
    std::shuffle(rows.get(), rows.get() + count, source);
  }
  std::vector<std::unique_ptr<char[]>> is, was;
  std::vector<Rows> buffers;
  for (int64_t i = below(5); i >= 0; --i) {
    const int64_t lead = 1 + below(3), heads = 1 + below(4), head = 1 + below(rarely() ? 3 * kPiece : 300);
    const int64_t size = lead * count * heads * head;
    is.push_back(made<char>(size, [](int64_t) { return static_cast<char>(source()); }));
    was.push_back(made<char>(size, [&](int64_t i) { return is.back()[i]; }));
    buffers.push_back({is.back().get(), lead, count, heads, head, rarely() ? 0 : below(head + 1)});
  }
  std::vector<std::thread> threads;
  move(buffers, in_order(rows.get(), count), helpers + 1, [&](auto&& work) { threads.emplace_back(work); });
  for (auto& thread : threads) thread.join();
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Rows& x = buffers[i];
    for (int64_t place = 0; place < x.lead * count * x.heads; ++place) {
      const int64_t row = place / x.heads % count, from = std::clamp<int64_t>(rows[row], 0, count - 1);
      for (int64_t byte = 0; byte < x.head; ++byte)
        if (is[i][place * x.head + byte] != was[i][(place + (byte < x.held) * (from - row) * x.heads) * x.head + byte]) return false;
    }
  }
  return true;
}

static bool product_is_right(int64_t seed) {
  source.seed(static_cast<uint32_t>(seed));
  const bool large = rarely(), transposed = below(2);  // only large ones are shared out among threads
  const int64_t tokens = 1 + below(16), inner = 1 + below(large ? 400 : 70), outer = 1 + below(large ? 1500 : 70);
  const int64_t shifts[] = {below(16), below(16), below(16)};  // of the numbers from where a line of the cache begins
  auto number = [](int64_t) { return number_below_1(); };
  auto x = made<float>(shifts[0] + tokens * inner, number), w = made<float>(shifts[1] + inner * outer, number);
  auto none = [](int64_t) { return NAN; };
  auto y = made<float>(shifts[2] + tokens * outer, none), alone = made<float>(outer, none);
  const ffi::DataType type = below(2) ? ffi::DataType::F32 : below(2) ? ffi::DataType::F16 : ffi::DataType::BF16;
  auto halves = made<uint16_t>(shifts[1] + inner * outer, [&](int64_t i) {
    const bool half = type == ffi::DataType::F16;
    const uint16_t bits = half ? source() & 0xbbff : 0x3f00 | (source() & 0x80ff);
    if (type != ffi::DataType::F32) w[i] = static_cast<float>(half ? small_float(bits, 16, 10) : float_of(uint32_t{bits} << 16));
    return bits;
  });
  Product p{};
  p.tokens = tokens, p.inner = inner, p.outer = outer, p.transposed = transposed;
  p.x = x.get() + shifts[0], p.y = y.get() + shifts[2], p.type = type;
  p.w = type == ffi::DataType::F32 ? static_cast<const void*>(w.get() + shifts[1]) : halves.get() + shifts[1];
  const Isa set = any_set();
  std::vector<std::thread> threads;
  multiply(p, set, 1 + below(4), [&](auto&& work) { threads.emplace_back(work); });
  for (auto& thread : threads) thread.join();
  for (int64_t t = 0; t < tokens; ++t) {
    Product one = p;
    one.tokens = 1, one.x = p.x + t * inner, one.y = alone.get();
    multiply(one, set, 1, [](auto&&) {});
    for (int64_t o = 0; o < outer; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < inner; ++i) {
        const double term = double(p.x[t * inner + i]) * w[shifts[1] + (transposed ? o * inner + i : i * outer + o)];
        sum += term, size += std::fabs(term);
      }
      // The most that a sum of floats can be off, in whatever order; and a token's result does not depend on the others.
      if (!(std::fabs(p.y[t * outer + o] - sum) <= (inner + 1) * 0x1p-24 * size) || p.y[t * outer + o] != alone[o]) return false;
    }
  }
  return true;
}

static bool memory_is_right(int64_t seed) {
  source.seed(static_cast<uint32_t>(seed));
  const int64_t rows = 1 + below(3), tokens = below(9), heads = 1 + below(4), keys = 1 + below(40), values = 1 + below(150);
  return memory::right(rows, tokens, heads, keys, values, below(2), any_set());
}

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? atoll(argv[1]) : 1000;
  const std::pair<const char*, bool (*)(int64_t)> parts[] = {
      {"attention is", attention_is_right}, {"the product is", product_is_right}, {"moves of rows are", moves_are_right},
      {"a memory is", memory_is_right}};
  for (int64_t seed = 0; seed < count; ++seed)
    for (const auto& [part, is_right] : parts)
      if (!is_right(seed)) {
        printf("seed %lld: %s wrong\n", static_cast<long long>(seed), part);
        return 1;
      }
  printf("%lld calls of each, the best instruction set is %d: all right\n", static_cast<long long>(count), best_isa());
}
