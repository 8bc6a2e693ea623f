// Some values of a head's memory, compiled once for each instruction set: token after token, in the nearest cache.

// What a token finds, in N vectors of a state: two keys at a time, as one chain of sums keeps no machine busy.
template <int N> INLINE void find(const float* key, int64_t keys, const float* state, vf* found) {
  vf even[N] = {}, odd[N] = {};
  int64_t at = 0;
  for (; at + 2 <= keys; at += 2) {
    const float* const row = state + at * N * W;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      even[i] = fused(load(row + i * W), splat(key[at]), even[i]);
      odd[i] = fused(load(row + (N + i) * W), splat(key[at + 1]), odd[i]);
    }
  }
  for (; at < keys; ++at)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) even[i] = fused(load(state + (at * N + i) * W), splat(key[at]), even[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) found[i] = even[i] + odd[i];
}

template <int N> INLINE void token(const Token& t, int64_t keys, float* state, float* y) {
  vf value[N], read[N] = {};
  const vf stays = splat(t.stays);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) value[i] = load(t.value + i * W);
  if (t.corrects) {
    vf found[N];
    find<N>(t.key, keys, state, found);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) value[i] = (value[i] - stays * found[i]) * splat(t.share);
  }
  for (int64_t at = 0; at < keys; ++at) {
    const vf k = splat(t.key[at]), q = splat(t.query[at]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      float* const place = state + (at * N + i) * W;
      const vf now = fused(value[i], k, load(place) * stays);
      store(place, now);
      read[i] = fused(now, q, read[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(y + i * W, read[i]);
}

// One of up to kVectors vectors of values.
APART void remember(const Memory& m, int64_t row, int64_t head, int64_t first) {
  constexpr int64_t kWidth = kVectors * W;
  const int64_t count = std::min(kWidth, m.values - first), place = (row * m.heads + head) * m.keys;
  const std::unique_ptr<float[]> room(new float[m.keys * kWidth + 16]);
  float* const state = room.get() + (-reinterpret_cast<uintptr_t>(room.get()) / 4 & 15);  // at a line of the cache
  for (int64_t key = 0; key < m.keys; ++key) {
    const float* const from = m.state + (place + key) * m.values + first;
    std::copy(from, from + count, state + key * kWidth);
    std::fill(state + key * kWidth + count, state + (key + 1) * kWidth, 0.0f);
  }
  const auto keep = [&](int64_t tokens) {
    for (int64_t i = 0; i < m.kept; ++i) {
      if (std::clamp<int64_t>(m.counts[row * m.kept + i], 0, m.tokens) != tokens) continue;
      float* const to = m.states + ((row * m.kept + i) * m.heads + head) * m.keys * m.values + first;
      for (int64_t key = 0; key < m.keys; ++key)
        std::copy(state + key * kWidth, state + key * kWidth + count, to + key * m.values);
    }
  };
  keep(0);
  alignas(64) float value[kWidth] = {}, y[kWidth];
  for (int64_t t = 0; t < m.tokens; ++t) {
    const int64_t at = (row * m.tokens + t) * m.heads + head;
    std::copy(m.v + at * m.values + first, m.v + at * m.values + first + count, value);
    const Token now{m.k + at * m.keys, m.q + at * m.keys, value, std::exp(m.g[at]), m.beta ? m.beta[at] : 0, m.beta != nullptr};
    token<kVectors>(now, m.keys, state, y);
    std::copy(y, y + count, m.y + at * m.values + first);
    keep(t + 1);
  }
}
