// The kernel alone: times of calls over [rows, kv heads, slots, head size] beside a plain sum of the same numbers.
//   g++ -std=c++17 -O2 -ffp-contract=fast -pthread benchmarks/native/bench.cc -o bench && ./bench 8 32 8 128 4096 1024
// The last of nine arguments is the storage: 0 float32, 1 float16, 2 bfloat16, 3 Int8, 4 Int4, 5 and 6 Float8.
#include <time.h>

#include <cstdio>
#include <thread>

#include "../../jaxkv/native/attention.h"

using namespace jaxkv;

// Seconds of this thread alone: other processes on the machine don't count.
static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char** argv) {
  int64_t n[] = {1, 32, 8, 128, 4096, 4096, 0, 20, 0};
  for (int i = 1; i < argc && i <= 9; ++i) n[i - 1] = atoll(argv[i]);
  const auto [B, N, K, H, S, fill, helpers, rounds, type] = n;  // rows, query heads, kv heads, size, slots, ...
  std::vector<float> q(B * N * H, 0.1f), k(B * K * S * H, 0.2f), v(B * K * S * H, 0.3f), out(B * N * H), logs(B * N);
  std::vector<int32_t> rows(B), filled(B, fill), held(B * S), low(B, 0), at(B, fill - 1);
  for (int64_t i = 0; i < B * S; ++i) held[i] = i % S < fill ? i % S : -1;
  for (int64_t b = 0; b < B; ++b) rows[b] = b;
  Call call{};
  call.B = call.A = B, call.K = K, call.G = N / K, call.T = call.L = 1, call.H = H, call.S = call.V = S;
  const Type kind = static_cast<Type>(type);
  const std::vector<float> scales(B * K * S, 1.f);
  const std::vector<uint8_t> groups(B * K * S * H / 8);
  const void* factors = kind < kInt8 ? nullptr : scales.data();
  call.keys = {kind, H, k.data(), factors, groups.data(), 8}, call.values = {kind, H, v.data(), factors, groups.data(), 8};
  call.q = q.data(), call.rows = rows.data(), call.filled = filled.data(), call.kv_positions = held.data();
  call.low = low.data(), call.positions = at.data(), call.in_order = true, call.out = out.data(), call.log_total = logs.data();
  double best = 1e9, read = 1e9, total = 0;
  for (int64_t r = 0; r < rounds; ++r) {
    const double begin = now();
    for (const auto* x : {&k, &v})
      for (int64_t b = 0; b < B * K; ++b) {
        float sums[64] = {};
        const float* p = x->data() + b * S * H;
        for (int64_t i = 0; i + 64 <= fill * H; i += 64)
          for (int j = 0; j < 64; ++j) sums[j] += p[i + j];
        total += sums[0];
      }
    const double middle = now();
    Attention attention(call, best_isa(), helpers + 1);
    attend(attention, helpers, [](auto&& work) { std::thread(work).detach(); });
    const double end = now();
    read = std::min(read, middle - begin);
    best = std::min(best, end - middle);
  }
  printf("read %.3f ms, attention %.3f ms, ratio %.2f (%g)\n", 1e3 * read, 1e3 * best, best / read, total + out[0]);
}
