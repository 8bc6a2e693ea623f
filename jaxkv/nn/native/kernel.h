// Attention of the queries of one kv head over one stretch of slots, for one instruction set.
//
// Included once per instruction set, in a namespace of its own, with W (floats of a vector), ACCUMULATORS (vectors that
// stay in registers) and the conversions of 16-bit floats to vectors. No include guard on purpose.

INLINE vf load(const float* p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE vf load(const Bfloat* p) {
  vh x; memcpy(&x, p, sizeof x);
  return bits_to_float(__builtin_convertvector(x, vi) << 16);
}
INLINE vf load(const Half* p) { return load_half(p); }
INLINE vf load(const int8_t* p) {
  vb x; memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
}

// The first n numbers at p, and zeros: never a byte further.
template <class E> INLINE vf load_some(const E* p, int n) {
  E x[W];
  memset(x, 0, sizeof x);
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return load(x);
}

// exp(x) of x <= 88, with a relative error of 1e-7; below -87 it is 0, and NaN stays.
INLINE vf exponential(vf x) {
  const float log2e = 1.44269504f, magic = 12582912.f;  // adding 1.5 * 2^23 rounds to whole numbers
  vf low = splat(-87.f), y = x > low ? x : low;
  vf shifted = y * log2e + magic;
  vf r = y * log2e - (shifted - magic);
  vf p = splat(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = p * r + kExp2[i];
  vi n = (float_to_bits(shifted) - float_to_bits(splat(magic))) << 23;
  p = bits_to_float(float_to_bits(p) + n);
  p = x > low ? p : vf{};
  return x == x ? p : x;
}

// tanh(x): a polynomial near 0, where exp would cancel.
INLINE vf hyperbolic(vf x) {
  vf a = x < 0.f ? -x : x;
  vf s = a * a, near = splat(kTanh[5]);
  for (int i = 4; i >= 0; --i) near = near * s + kTanh[i];
  near = near * s * a + a;
  vf capped = a < 10.f ? a : splat(10.f);
  vf far = 1.f - 2.f / (exponential(capped + capped) + 1.f);
  vf y = a < 0.625f ? near : far;
  y = x < 0.f ? -y : y;
  return x == x ? y : x;
}

#if W == 4
INLINE vf pairs(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 4, 1, 5}) + __builtin_shuffle(a, b, vi{2, 6, 3, 7});
}
INLINE vf fours(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 4, 5}) + __builtin_shuffle(a, b, vi{2, 3, 6, 7});
}
INLINE vf sums(const vf* a) { return fours(pairs(a[0], a[1]), pairs(a[2], a[3])); }
#elif W == 8
INLINE vf pairs(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 8, 1, 9, 4, 12, 5, 13}) + __builtin_shuffle(a, b, vi{2, 10, 3, 11, 6, 14, 7, 15});
}
INLINE vf fours(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 8, 9, 4, 5, 12, 13}) + __builtin_shuffle(a, b, vi{2, 3, 10, 11, 6, 7, 14, 15});
}
INLINE vf eights(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(a, b, vi{4, 5, 6, 7, 12, 13, 14, 15});
}
INLINE vf sums(const vf* a) {
  return eights(fours(pairs(a[0], a[1]), pairs(a[2], a[3])), fours(pairs(a[4], a[5]), pairs(a[6], a[7])));
}
#else
INLINE vf pairs(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}) +
         __builtin_shuffle(a, b, vi{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
}
INLINE vf fours(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
         __builtin_shuffle(a, b, vi{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
}
INLINE vf eights(vf a, vf b) {  // quarters 0 + 1 and 2 + 3 of both
  return __builtin_shuffle(a, b, vi{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, vi{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}
INLINE vf sums4(const vf* a) { return fours(pairs(a[0], a[1]), pairs(a[2], a[3])); }
INLINE vf sums(const vf* a) { return eights(eights(sums4(a), sums4(a + 4)), eights(sums4(a + 8), sums4(a + 12))); }
#endif

// Has the vector of `size` numbers come closer. While keys are multiplied, the values of the same block come from memory,
// and while values are, the keys of the next block.
template <class E> INLINE void fetch(const void* buffer, int64_t at, int size) {
  const char* p = reinterpret_cast<const char*>(static_cast<const E*>(buffer) + at * size);
  for (size_t i = 0; i < size * sizeof(E); i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Scores of keys [begin, begin + N) of the list for Q queries, in rows of kBlock.
template <class E, int Q, int N>
static void score_keys(const Task& task, const float* q, int64_t stride, int begin, bool first, float* scores) {
  constexpr int kRegisters = ((Q * N + W - 1) / W) * W;
  const int size = task.call->H, whole = size / W;
  const E* key[N];
  for (int j = 0; j < N; ++j) {
    const int last = task.count - 1, here = begin + j < last ? begin + j : last;  // again, rather than past the end
    key[j] = static_cast<const E*>(task.k) + task.at[here] * size;
    if (first) fetch<E>(task.v, task.at[here], task.call->Hv);
  }
  vf sum[kRegisters];
#pragma GCC unroll 16
  for (int i = 0; i < kRegisters; ++i) sum[i] = vf{};
  for (int h = 0; h < whole; ++h) {
    vf x[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) x[j] = load(key[j] + h * W);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      vf y = load(q + i * stride + h * W);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sum[i * N + j] += x[j] * y;
    }
  }
  if (size % W) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      vf x = load_some(key[j] + whole * W, size % W);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) sum[i * N + j] += x * load(q + i * stride + whole * W);
    }
  }
  float total[kRegisters];
#pragma GCC unroll 16
  for (int i = 0; i < kRegisters / W; ++i) {
    vf x = sums(sum + i * W);
    memcpy(total + i * W, &x, sizeof x);
  }
  for (int i = 0; i < Q; ++i) memcpy(scores + i * kBlock + begin - task.block, total + i * N, N * sizeof(float));
}

// out[i] * keep[i] + the sum over keys of weights[i][j] * v[j], of C vectors from number h on, for Q queries.
template <class E, int Q, int C>
static void mix_columns(const Task& task, const float* weights, const float* keep, int count, int h, int some, bool ahead,
                        float* out) {
  const int size = task.call->Hv;
  const E* values = static_cast<const E*>(task.v) + h;
  vf sum[Q * C];
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      sum[i * C + c] = (some ? load_some(out + i * size + h, some) : load(out + i * size + h + c * W)) * keep[i];
  for (int j = 0; j < count; ++j) {
    const E* value = values + task.at[task.block + j] * size;
    const int next = task.block + kBlock + j;
    if (ahead && next < task.count) fetch<E>(task.k, task.at[next], task.call->H);
    vf x[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      x[c] = some ? load_some(value, some) : load(value + c * W);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; ++i) {
      float w = weights[i * kBlock + j];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[i * C + c] += x[c] * w;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      if (some)
        memcpy(out + i * size + h, &sum[i * C], some * sizeof(float));
      else
        memcpy(out + i * size + h + c * W, &sum[i * C + c], sizeof(vf));
    }
}

template <class E, int Q>
INLINE void mix(const Task& task, const float* weights, const float* keep, int count, bool first, float* out) {
  constexpr int kWide = Q <= 2 ? 4 : ACCUMULATORS / 4;
  const int size = task.call->Hv;
  int h = 0;
  for (; h + kWide * W <= size; h += kWide * W) mix_columns<E, Q, kWide>(task, weights, keep, count, h, 0, first && h == 0, out);
  for (; h < size; h += W) mix_columns<E, Q, 1>(task, weights, keep, count, h, h + W <= size ? 0 : size - h, first && h == 0, out);
}

// One block of the list for queries [first, first + Q) of the kv head.
template <class E, int Q>
void attend_block(const Task& task, int first, int count) {
  constexpr int kKeys = Q == 1 ? ACCUMULATORS : Q == 2 ? ACCUMULATORS / 2 : ACCUMULATORS / 4;
  const Call& call = *task.call;
  alignas(64) float scores[Q * kBlock];
  alignas(64) float padded[Q * kMostPadded];
  const float* q = task.q + first * call.H;
  int64_t stride = call.H;
  if (call.H % W) {
    stride = (call.H + W - 1) / W * W;
    for (int i = 0; i < Q; ++i) {
      memcpy(padded + i * stride, q + i * call.H, call.H * sizeof(float));
      memset(padded + i * stride + call.H, 0, (stride - call.H) * sizeof(float));
    }
    q = padded;
  }
  for (int j = 0; j < count; j += kKeys) score_keys<E, Q, kKeys>(task, q, stride, task.block + j, first == 0, scores);

  float keep[Q];
  float* out = task.mixed + first * call.Hv;
  for (int i = 0; i < Q; ++i) {
    float* score = scores + i * kBlock;
    const int64_t t = (first + i) % call.T, n = task.row * call.T + t;
    const int filled = (count + W - 1) / W * W;
    for (int s = count; s < filled; ++s) score[s] = -INFINITY;
    if (task.k_scales)
      for (int s = 0; s < count; ++s) score[s] *= task.k_scales[task.at[task.block + s]];
    if (call.softcap > 0)
      for (int s = 0; s < filled; s += W) {
        vf x = load(score + s);
        x = hyperbolic(x / call.softcap) * call.softcap;
        memcpy(score + s, &x, sizeof x);
      }
    if (call.softcap > 0)
      for (int s = count; s < filled; ++s) score[s] = -INFINITY;
    if (task.each)  // the list has what any of the queries sees
      for (int s = 0; s < count; ++s)
        if (!call.sees(n, task.position[task.block + s], task.span[task.block + s])) score[s] = -INFINITY;
    vf top = splat(task.top[first + i]);
    for (int s = 0; s < filled; s += W) {
      vf x = load(score + s);
      top = x > top ? x : top;
    }
    float most = top[0];
    for (int l = 1; l < W; ++l) most = top[l] > most ? top[l] : most;
    vf sum{};
    for (int s = 0; s < filled; s += W) {
      vf x = exponential(load(score + s) - most);
      sum += x;
      memcpy(score + s, &x, sizeof x);
    }
    keep[i] = exponential(splat(task.top[first + i] - most))[0];
    float total = 0;
    for (int l = 0; l < W; ++l) total += sum[l];
    task.total[first + i] = task.total[first + i] * keep[i] + total;
    task.top[first + i] = most;
    if (task.v_scales)
      for (int s = 0; s < count; ++s) score[s] *= task.v_scales[task.at[task.block + s]];
  }
  mix<E, Q>(task, scores, keep, count, first == 0, out);
}

template <class E>
void attend_list(Task& task) {
  const int queries = task.call->G * task.call->T;
  for (int j = 0; j < task.count && j < kBlock; ++j) fetch<E>(task.k, task.at[j], task.call->H);
  for (task.block = 0; task.block < task.count; task.block += kBlock) {
    const int count = task.count - task.block < kBlock ? task.count - task.block : kBlock;
    int first = 0;
    for (; first + 4 <= queries; first += 4) attend_block<E, 4>(task, first, count);
    if (queries - first == 3) attend_block<E, 3>(task, first, count);
    if (queries - first == 2) attend_block<E, 2>(task, first, count);
    if (queries - first == 1) attend_block<E, 1>(task, first, count);
  }
}

void attend_task(Task& task) {
  switch (task.call->type) {
    case kFloat: return attend_list<float>(task);
    case kHalf: return attend_list<Half>(task);
    case kBfloat: return attend_list<Bfloat>(task);
    case kInt8: return attend_list<int8_t>(task);
  }
}
