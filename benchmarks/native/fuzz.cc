// Random calls of the kernel, compared with sums in double precision, in buffers that end where they say.
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -ffp-contract=fast -pthread benchmarks/native/fuzz.cc -o fuzz
//   ./fuzz 2000
// With -fsanitize=thread it looks for races. Lengths, rows, pages and positions are wrong on purpose, now and then: what is
// read must stay within the buffers all the same.
#include <cstdio>
#include <random>
#include <thread>

#include "../../jaxkv/nn/native/attention.h"

using namespace jaxkv;

static std::mt19937 source;
static int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint32_t>(n)); }
static bool rarely() { return below(8) == 0; }
static float number() { return static_cast<float>(below(2001)) / 1000 - 1; }

template <class T, class F> static std::unique_ptr<T[]> made(int64_t n, const F& of) {
  std::unique_ptr<T[]> x(new T[n]);
  for (int64_t i = 0; i < n; ++i) x[i] = of(i);
  return x;
}

static bool once(int64_t seed) {
  source.seed(static_cast<uint32_t>(seed));
  const int64_t B = 1 + below(4), K = 1 + below(3), G = 1 + below(5), T = rarely() ? 1 + below(9) : 1;
  const int64_t H = 1 + below(rarely() ? 150 : 40), Hv = 1 + below(rarely() ? 150 : 40), L = 1 + below(3);
  const bool paged = below(2);
  const int64_t page = 1 + below(20), V = paged ? page * (1 + below(60)) : 1 + below(1300);
  const int64_t A = paged ? 1 + below(70) : B + below(2), S = paged ? page : V;
  const bool bytes = below(2);
  auto positions = made<int32_t>(B * V, [&](int64_t i) { return rarely() ? -1 : rarely() ? int32_t(source()) : int32_t(i % V); });
  auto rows = made<int32_t>(B, [&](int64_t i) { return rarely() ? int32_t(source()) : int32_t(below(A)); });
  auto filled = made<int32_t>(B, [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(V + 1)); });
  auto at = made<int32_t>(B * T, [&](int64_t) { return rarely() ? -1 : int32_t(below(V)); });
  const int64_t window = 1 + below(V);
  auto low = made<int32_t>(B * T, [&](int64_t i) { return rarely() ? int32_t(source()) : int32_t(std::max<int64_t>(at[i] - window + 1, 0)); });
  auto spans = made<int32_t>(B * T, [&](int64_t) { return int32_t(below(3)); });
  auto kv_spans = made<int32_t>(B * V, [&](int64_t) { return int32_t(below(3)); });
  auto high = made<int32_t>(B * T, [&](int64_t i) { return at[i] + int32_t(below(5)); });
  auto table = made<int32_t>(B * (V / S), [&](int64_t) { return rarely() ? int32_t(source()) : int32_t(below(A)); });
  auto q = made<float>(B * K * G * T * H, [&](int64_t) { return number(); });
  const int64_t places = L * A * K * S;
  auto kf = made<float>(places * H, [&](int64_t) { return number(); }), vf = made<float>(places * Hv, [&](int64_t) { return number(); });
  auto kb = made<int8_t>(places * H, [&](int64_t) { return int8_t(below(5) - 2); }), vb = made<int8_t>(places * Hv, [&](int64_t) { return int8_t(below(5) - 2); });
  auto k_scales = made<float>(places, [&](int64_t) { return 1 + number() / 2; }), v_scales = made<float>(places, [&](int64_t) { return 1 + number() / 2; });
  auto logits = made<float>(K * G, [&](int64_t) { return number(); });
  const int64_t N = B * K * G * T;
  auto out = made<float>(N * Hv, [](int64_t) { return 0.f; }), logs = made<float>(N, [](int64_t) { return 0.f; });
  const bool with_spans = below(2), with_logits = below(2);
  Call call{B, K, G, T, H, Hv, L, A, S, V, bytes ? kInt8 : kFloat, q.get(),
            bytes ? static_cast<const void*>(kb.get()) : kf.get(), bytes ? static_cast<const void*>(vb.get()) : vf.get(),
            bytes ? k_scales.get() : nullptr, bytes ? v_scales.get() : nullptr, below(L), rows.get(), filled.get(),
            positions.get(), low.get(), at.get(), with_spans ? spans.get() : nullptr, with_spans ? kv_spans.get() : nullptr,
            with_spans ? high.get() : nullptr, paged ? table.get() : nullptr, with_logits ? logits.get() : nullptr,
            below(4), below(2) ? 3.f : 0.f, false, out.get(), logs.get()};
  std::vector<std::thread> threads;
  Attention attention(call, best_isa());
  attend(attention, below(4), [&](auto&& work) { threads.emplace_back(work); });
  for (auto& thread : threads) thread.join();
  for (int64_t n = 0; n < N; ++n) {
    const int64_t t = n % T, k = n / (G * T) % K, b = n / (K * G * T), query = b * T + t;
    double total = with_logits ? std::exp(double(logits[n / T % (K * G)])) : 0;
    std::vector<double> mixed(Hv);
    for (int64_t s = 0; s < std::min<int64_t>(std::max(filled[b], 0), V); ++s) {
      if (!call.sees(query, positions[b * V + s], kv_spans[b * V + s])) continue;
      int64_t place = std::clamp<int64_t>(rows[b], 0, A - 1), slot = s;
      if (paged) {
        place = table[b * (V / S) + s / S], slot = s % S;
        if (place < 0 || place >= A) continue;
      }
      const int64_t i = ((call.layer * A + place) * K + k) * S + slot;
      double score = 0;
      for (int64_t h = 0; h < H; ++h) score += double(q[n * H + h]) * (bytes ? kb[i * H + h] * k_scales[i] : kf[i * H + h]);
      if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
      const double weight = std::exp(score);
      total += weight;
      for (int64_t h = 0; h < Hv; ++h) mixed[h] += weight * (bytes ? vb[i * Hv + h] * v_scales[i] : vf[i * Hv + h]);
    }
    for (int64_t h = 0; h < Hv; ++h)
      if (!(std::fabs(out[n * Hv + h] - (total ? mixed[h] / total : 0)) < 1e-4)) return false;
  }
  return true;
}

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? atoll(argv[1]) : 1000;
  for (int64_t seed = 0; seed < count; ++seed)
    if (!once(seed)) {
      printf("seed %lld: wrong\n", static_cast<long long>(seed));
      return 1;
    }
  printf("%lld calls, instruction set %d: all right\n", static_cast<long long>(count), best_isa());
}
