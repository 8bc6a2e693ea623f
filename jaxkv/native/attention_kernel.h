// Attention of the queries of one kv head over one stretch of slots, for one instruction set.
// Included by each_set.h.

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

// Vectors of some slots of the list as they are multiplied: numbers of `type`, vector j at slot at[j] behind `base`.
struct Block {
  Type type;
  int size;
  const void* base;
  const int64_t* at;
};

// Floats of 8 bits with M of mantissa, as they are stored: halves that lack their last bits, and of three bits of mantissa
// the exponent of one that is 2^8 as large.
template <int M> INLINE vf load_eight(const uint8_t* p) {
  vh bits = widen16(*reinterpret_cast<const vu*>(p));
  return M == 2 ? halves(bits << 8) : halves((bits & 128) << 8 | (bits & 127) << 7) * 0x1p8f;
}

template <int M> static void expand_eight(const uint8_t* from, int size, float* to) {
  int h = 0;
  for (; h + W <= size; h += W) store(to + h, load_eight<M>(from + h));
  if (h == size) return;
  uint8_t some[W] = {};
  memcpy(some, from + h, size - h);
  vf x = load_eight<M>(some);
  memcpy(to + h, &x, (size - h) * sizeof(float));
}

// Two numbers a byte: number i shares one with number i + size / 2. A group has a step (1 to 16) and a zero (0 to 15).
static void expand_four(const uint8_t* codes, const uint8_t* groups, int size, int group, float* to) {
  const int half = size / 2, count = half / group;
  for (int g = 0; g < count; ++g) {
    const uint8_t first = groups[g], second = groups[count + g];
    const float a = (first >> 4) + 1, b = (second >> 4) + 1, za = (first & 15) * a, zb = (second & 15) * b;
    int i = g * group;
    const int end = i + group;
    for (; i + 8 <= end; i += 8) {
      i8 x = widen8(*reinterpret_cast<const u8*>(codes + i));
      *reinterpret_cast<f8*>(to + i) = __builtin_convertvector(x & 15, f8) * a - za;
      *reinterpret_cast<f8*>(to + half + i) = __builtin_convertvector(x >> 4, f8) * b - zb;
    }
    for (; i < end; ++i) {
      to[i] = (codes[i] & 15) * a - za;
      to[half + i] = (codes[i] >> 4) * b - zb;
    }
  }
}

// A block of the list as it can be multiplied: where it lies, or, of what must be expanded first, in `scratch`.
static Block block_of(const Vectors& x, const int64_t* at, int count, float* scratch) {
  if (!x.size || !expands(x.type)) return {x.type, static_cast<int>(x.size), x.codes, at};
  for (int j = 0; j < count; ++j) {
    const uint8_t* codes = static_cast<const uint8_t*>(x.codes) + at[j] * bytes_of(x);
    float* to = scratch + j * x.size;
    if (x.type == kInt4)
      expand_four(codes, x.groups + at[j] * (x.size / x.group), x.size, x.group, to);
    else if (x.type == kE4m3)
      expand_eight<3>(codes, x.size, to);
    else
      expand_eight<2>(codes, x.size, to);
  }
  return {kFloat, static_cast<int>(x.size), scratch, kInOrder.at};
}

// The factors of the vectors of a block, and zeros up to kBlock.
static bool scales_of(const Vectors& x, const int64_t* at, int count, float* to) {
  if (!x.scales) return false;
  if (x.type == kInt4) {
    for (int j = 0; j < count; ++j) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x.scales)[at[j]]) << 16;
      memcpy(to + j, &bits, sizeof bits);
    }
  } else {
    for (int j = 0; j < count; ++j) to[j] = static_cast<const float*>(x.scales)[at[j]];
  }
  for (int j = count; j < kBlock; ++j) to[j] = 0;
  return true;
}

// Has the vector of slot `at` come closer. While keys are multiplied, the values of the same block come from memory, and
// while values are, the keys of the next block.
INLINE void fetch(const void* codes, int64_t at, int64_t bytes) {
  const char* p = static_cast<const char*>(codes) + at * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}
INLINE void fetch_key(const Task& task, int64_t at) {
  fetch(task.call->keys.codes, at, task.k_bytes);
  if (task.call->inside) fetch(task.call->values.codes, at, task.v_bytes);
}

// Scores of keys [begin, begin + N) of a block for Q queries, in rows of kBlock.
template <class E, int Q, int N>
INLINE void score_keys(const Task& task, const Block& keys, int count, const float* q, int64_t stride, int begin,
                       bool ahead, float* scores) {
  constexpr int kRegisters = ((Q * N + W - 1) / W) * W;
  const int size = keys.size, whole = size / W;
  const E* key[N];
  for (int j = 0; j < N; ++j) {
    const int here = begin + j < count ? begin + j : count - 1;  // again, rather than past the end
    key[j] = static_cast<const E*>(keys.base) + keys.at[here] * size;
    if (ahead) fetch(task.call->values.codes, task.at[task.block + here], task.v_bytes);
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
  for (int i = 0; i < kRegisters / W; ++i) store(total + i * W, sums(sum + i * W));
  for (int i = 0; i < Q; ++i) memcpy(scores + i * kBlock + begin, total + i * N, N * sizeof(float));
}

template <class E, int Q>
APART void score_block(const Task& task, const Block& keys, int count, const float* q, int64_t stride, bool ahead,
                        float* scores) {
  constexpr int kKeys = Q == 1 ? ACCUMULATORS : Q == 2 ? ACCUMULATORS / 2 : ACCUMULATORS / 4;
  for (int j = 0; j < count; j += kKeys) score_keys<E, Q, kKeys>(task, keys, count, q, stride, j, ahead, scores);
}

// out[i] * keep[i] + the sum over keys of weights[i][j] * v[j], of C vectors from number h on, for Q queries.
template <class E, int Q, int C>
APART void mix_columns(const Task& task, const Block& block, const float* weights, const float* keep, int count, int h,
                        int some, bool ahead, float* out) {
  const int size = block.size;
  const E* values = static_cast<const E*>(block.base) + h;
  vf sum[Q * C];
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      sum[i * C + c] = (some ? load_some(out + i * size + h, some) : load(out + i * size + h + c * W)) * keep[i];
  for (int j = 0; j < count; ++j) {
    const E* value = values + block.at[j] * size;
    const int next = task.block + kBlock + j;
    if (ahead && next < task.count) fetch_key(task, task.at[next]);
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
        store(out + i * size + h + c * W, sum[i * C + c]);
    }
}

template <class E, int Q>
static void mix_block(const Task& task, const Block& values, const float* weights, const float* keep, int count, bool ahead,
                      float* out) {
  constexpr int kWide = Q <= 2 ? 4 : ACCUMULATORS / 4;
  const int size = values.size;
  int h = 0;
  for (; h + kWide * W <= size; h += kWide * W)
    mix_columns<E, Q, kWide>(task, values, weights, keep, count, h, 0, ahead && h == 0, out);
  for (; h < size; h += W)
    mix_columns<E, Q, 1>(task, values, weights, keep, count, h, h + W <= size ? 0 : size - h, ahead && h == 0, out);
}

template <int Q>
static void score(const Task& task, const Block& keys, int count, const float* q, int64_t stride, bool ahead, float* scores) {
  alignas(64) float padded[Q * kMostPadded];
  if (keys.size % W) {
    const int64_t wide = (keys.size + W - 1) / W * W;
    for (int i = 0; i < Q; ++i) {
      memcpy(padded + i * wide, q + i * stride, keys.size * sizeof(float));
      memset(padded + i * wide + keys.size, 0, (wide - keys.size) * sizeof(float));
    }
    q = padded, stride = wide;
  }
  switch (keys.type) {
    case kHalf: return score_block<Half, Q>(task, keys, count, q, stride, ahead, scores);
    case kBfloat: return score_block<Bfloat, Q>(task, keys, count, q, stride, ahead, scores);
    case kInt8: return score_block<int8_t, Q>(task, keys, count, q, stride, ahead, scores);
    default: return score_block<float, Q>(task, keys, count, q, stride, ahead, scores);
  }
}

template <int Q>
static void mix(const Task& task, const Block& values, const float* weights, const float* keep, int count, bool ahead,
                float* out) {
  switch (values.type) {
    case kHalf: return mix_block<Half, Q>(task, values, weights, keep, count, ahead, out);
    case kBfloat: return mix_block<Bfloat, Q>(task, values, weights, keep, count, ahead, out);
    case kInt8: return mix_block<int8_t, Q>(task, values, weights, keep, count, ahead, out);
    default: return mix_block<float, Q>(task, values, weights, keep, count, ahead, out);
  }
}

// A block of the list, ready to be multiplied. Where values are in keys, a key is a value and then what `keys` has.
struct Ready {
  Block keys, values;
  bool each;  // queries see different slots of it
  const float* k_scales;  // or null
  const float* v_scales;
  int count;
};

// Scores of a block are -inf where query n does not see the slot.
static void hide(const Task& task, int64_t n, int count, float* score) {
  const Call& call = *task.call;
  const int32_t* position = task.position + task.block;
  if (call.base || call.spans) {
    for (int s = 0; s < count; ++s)
      if (!call.sees(n, position[s], task.span[task.block + s])) score[s] = -INFINITY;
    return;
  }
  const vi last = vi{} + call.positions[n], low = vi{} + call.low[n];
  const vi sinks = vi{} + static_cast<int32_t>(std::min<int64_t>(call.sinks, INT32_MAX));
  for (int s = 0; s < count; s += W) {  // kStretch is a multiple of W
    const vi p = *reinterpret_cast<const vi*>(position + s);
    const vi seen = (p >= 0) & (p <= last) & ((p >= low) | (p < sinks));
    store(score + s, seen ? load(score + s) : splat(-INFINITY));
  }
}

// One block of the list for queries [first, first + Q) of the kv head.
template <int Q>
void attend_block(const Task& task, const Ready& block, int first) {
  const Call& call = *task.call;
  const int count = block.count, filled = (count + W - 1) / W * W;
  alignas(64) float scores[Q * kBlock], more[Q * kBlock];
  const float* q = task.q + first * call.H;
  const bool ahead = first == 0;
  if (call.inside) {
    score<Q>(task, block.values, count, q, call.H, false, scores);
    if (block.keys.size) score<Q>(task, block.keys, count, q + call.values.size, call.H, false, more);
  } else {
    score<Q>(task, block.keys, count, q, call.H, ahead, scores);
  }
  float keep[Q];
  float* out = task.mixed + first * call.values.size;
  for (int i = 0; i < Q; ++i) {
    float* score = scores + i * kBlock;
    const int64_t t = (first + i) % call.T, n = task.row * call.T + t;
    const float* factors = call.inside ? block.v_scales : block.k_scales;
    for (int s = 0; s < filled; s += W) {
      vf x = load(score + s);
      if (factors) x *= load(factors + s);
      if (call.inside && block.keys.size)
        x += block.k_scales ? load(more + i * kBlock + s) * load(block.k_scales + s) : load(more + i * kBlock + s);
      if (call.softcap > 0) x = hyperbolic(x / call.softcap) * call.softcap;
      store(score + s, x);
    }
    if (call.positions[n] < 0)
      for (int s = 0; s < count; ++s) score[s] = -INFINITY;
    else if (block.each)  // the list has what any of the queries sees
      hide(task, n, count, score);
    for (int s = count; s < filled; ++s) score[s] = -INFINITY;
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
      if (block.v_scales) x *= load(block.v_scales + s);
      store(score + s, x);
    }
    keep[i] = exponential(splat(task.top[first + i] - most))[0];
    float total = 0;
    for (int l = 0; l < W; ++l) total += sum[l];
    task.total[first + i] = task.total[first + i] * keep[i] + total;
    task.top[first + i] = most;
  }
  mix<Q>(task, block.values, scores, keep, count, ahead, out);
}

void attend_task(Task& task) {
  const Call& call = *task.call;
  const int queries = call.G * call.T;
  for (int j = 0; j < task.count && j < kBlock; ++j) fetch_key(task, task.at[j]);
  alignas(64) float k_scales[kBlock], v_scales[kBlock];
  for (task.block = 0; task.block < task.count; task.block += kBlock) {
    Ready block;
    const int count = block.count = task.count - task.block < kBlock ? task.count - task.block : kBlock;
    const int64_t* at = task.at + task.block;
    block.keys = block_of(call.keys, at, count, task.scratch);
    block.values = block_of(call.values, at, count, task.scratch + kBlock * call.keys.size);
    block.k_scales = scales_of(call.keys, at, count, k_scales) ? k_scales : nullptr;
    block.v_scales = scales_of(call.values, at, count, v_scales) ? v_scales : nullptr;
    block.each = false;
    if (task.each) {
      int all = 1;
      const int32_t* position = task.position + task.block;
      for (int s = 0; s < count; ++s) all &= (position[s] >= task.low) & (position[s] <= task.last);
      block.each = !all;
    }
    int first = 0;
    for (; first + 4 <= queries; first += 4) attend_block<4>(task, block, first);
    if (queries - first == 3) attend_block<3>(task, block, first);
    if (queries - first == 2) attend_block<2>(task, block, first);
    if (queries - first == 1) attend_block<1>(task, block, first);
  }
}

// C vectors of the joined values, from number h on: each part is read once.
template <int C> INLINE void join_columns(const Parts& parts, int64_t i, int64_t h, float* out) {
  const float* part = parts.first;
  vf sum[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) sum[c] = vf{};
  for (int64_t n = 0; n < parts.stretches; ++n, part += parts.stride) {
    const float weight = part[i], *mixed = part + 2 * parts.queries + i * parts.size + h;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[c] += load(mixed + c * W) * weight;
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) store(out + h + c * W, sum[c]);
}

void join_parts(const Parts& parts, float* out, float* log_total) {
  for (int64_t i = 0; i < parts.queries; ++i, out += parts.size) {
    float* const end = parts.first + parts.stretches * parts.stride;
    float top = parts.sink_logits ? parts.sink_logits[i / parts.T] : -FLT_MAX, total = 0;
    const float sink = top;
    for (float* part = parts.first; part != end; part += parts.stride) top = part[i] > top ? part[i] : top;
    if (parts.sink_logits) total = exponential(splat(sink - top))[0];
    for (float* part = parts.first; part != end; part += parts.stride) {
      part[i] = exponential(splat(part[i] - top))[0];
      total += part[parts.queries + i] * part[i];
    }
    if (total == 0) total = 1;  // a query that sees nothing
    for (float* part = parts.first; part != end; part += parts.stride) part[i] /= total;
    log_total[i] = top + std::log(total);
    int64_t h = 0;
    for (; h + 4 * W <= parts.size; h += 4 * W) join_columns<4>(parts, i, h, out);
    for (; h + W <= parts.size; h += W) join_columns<1>(parts, i, h, out);
    for (; h < parts.size; ++h) {
      float sum = 0;
      for (const float* part = parts.first; part != end; part += parts.stride)
        sum += part[2 * parts.queries + i * parts.size + h] * part[i];
      out[h] = sum;
    }
  }
}
