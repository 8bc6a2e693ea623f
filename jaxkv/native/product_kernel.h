// Products of a few tokens with a part of a matrix, for one instruction set. Included by each_set.h.

// y[q, c...] += sums over `rows` rows of w, for Q tokens and C vectors of columns; `some`: only so many columns, C is 1.
template <int Q, int C, class E>
APART void add_columns(const float* x, int64_t inner, const E* w, int64_t outer, int rows, bool first, int64_t ahead,
                       int some, float* y) {
  vf sum[Q * C];
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      sum[q * C + c] = first ? vf{} : some ? load_some(y + q * outer, some) : load(y + q * outer + c * W);
  for (int r = 0; r < rows; ++r, w += outer) {
    vf z[C];
    if (ahead)
#pragma GCC unroll 16
      for (int c = 0; c < C * W; c += 64 / sizeof(E)) __builtin_prefetch(w + ahead + c, 0, 3);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) z[c] = some ? load_some(w, some) : load(w + c * W);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const vf factor = splat(x[q * inner + r]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[q * C + c] = fused(z[c], factor, sum[q * C + c]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      if (some)
        store_some(y + q * outer, sum[q], some);
      else
        store(y + q * outer + c * W, sum[q * C + c]);
}

// Tokens [t, t + Q), rows [i, i + rows) and columns [begin, end) of a matrix [inner, outer].
template <int Q, class E>
static void add_rows(const Product& p, int64_t t, int64_t i, int rows, int64_t begin, int64_t end) {
  constexpr int C = ACCUMULATORS / (Q < 3 ? Q : 4);
  const float* x = p.x + t * p.inner + i;
  const E* w = static_cast<const E*>(p.w) + i * p.outer;
  float* y = p.y + t * p.outer;
  const int64_t ahead = t == 0 && i + rows < p.inner ? rows * p.outer : 0;  // the next rows come closer meanwhile
  int64_t c = begin;
  for (; c + C * W <= end; c += C * W) add_columns<Q, C, E>(x, p.inner, w + c, p.outer, rows, i == 0, ahead, 0, y + c);
  for (; c < end; c += W)
    add_columns<Q, 1, E>(x, p.inner, w + c, p.outer, rows, i == 0, ahead, c + W <= end ? 0 : end - c, y + c);
}

// Columns [begin, end) of the product with a matrix [inner, outer], `deep` rows of it at once.
template <class E>
static void columns(const Product& p, int64_t begin, int64_t end, int64_t deep) {
  for (int64_t i = 0; i < p.inner; i += deep) {
    const int rows = p.inner - i < deep ? p.inner - i : deep;
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) add_rows<4, E>(p, t, i, rows, begin, end);
    if (p.tokens - t == 3) add_rows<3, E>(p, t, i, rows, begin, end);
    if (p.tokens - t == 2) add_rows<2, E>(p, t, i, rows, begin, end);
    if (p.tokens - t == 1) add_rows<1, E>(p, t, i, rows, begin, end);
  }
}

// The same: a few tokens' sums stay in the nearest cache, and the matrix passes by; of many tokens its parts stay there.
template <class E>
static void columns(const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = ACCUMULATORS / 4 * W;
  if (p.tokens <= kFew) return columns<E>(p, begin, end, kRows);
  for (int64_t c = begin; c < end; c += kWidth) columns<E>(p, c, c + kWidth < end ? c + kWidth : end, kDeep);
}

// Products of Q tokens with N rows of a matrix [outer, inner].
template <int Q, int N, class E>
APART void dots(const float* x, const E* w, int64_t inner, int64_t outer, bool ahead, float* y) {
  constexpr int kRegisters = (Q * N + W - 1) / W * W;
  vf sum[kRegisters];
#pragma GCC unroll 16
  for (int i = 0; i < kRegisters; ++i) sum[i] = vf{};
  int64_t h = 0;
  for (; h + W <= inner; h += W) {
    vf z[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      z[j] = load(w + j * inner + h);
      if (ahead) __builtin_prefetch(w + (N + j) * inner + h, 0, 3);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      vf a = load(x + q * inner + h);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sum[q * N + j] = fused(z[j], a, sum[q * N + j]);
    }
  }
  if (h < inner) {
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      vf z = load_some(w + j * inner + h, inner - h);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sum[q * N + j] = fused(z, load_some(x + q * inner + h, inner - h), sum[q * N + j]);
    }
  }
  float total[kRegisters];
#pragma GCC unroll 16
  for (int i = 0; i < kRegisters / W; ++i) store(total + i * W, sums(sum + i * W));
  for (int q = 0; q < Q; ++q) memcpy(y + q * outer, total + q * N, N * sizeof(float));
}

// Outputs [o, o + count) of tokens [t, t + Q).
template <int Q, class E>
static void dots_of(const Product& p, int64_t t, int64_t o, int count) {
  constexpr int N = ACCUMULATORS / 4;
  const float* x = p.x + t * p.inner;
  const E* w = static_cast<const E*>(p.w) + o * p.inner;
  float* y = p.y + t * p.outer + o;
  if (count == N) return dots<Q, N, E>(x, w, p.inner, p.outer, t == 0, y);
  for (int j = 0; j < count; ++j) dots<Q, 1, E>(x, w + j * p.inner, p.inner, p.outer, false, y + j);
}

// Outputs [begin, end) of the product with a matrix [outer, inner].
template <class E>
static void rows(const Product& p, int64_t begin, int64_t end) {
  constexpr int N = ACCUMULATORS / 4;
  for (int64_t o = begin; o < end; o += N) {
    const int count = end - o < N ? end - o : N;
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) dots_of<4, E>(p, t, o, count);
    if (p.tokens - t == 3) dots_of<3, E>(p, t, o, count);
    if (p.tokens - t == 2) dots_of<2, E>(p, t, o, count);
    if (p.tokens - t == 1) dots_of<1, E>(p, t, o, count);
  }
}

// Columns [begin, end) of the result.
template <class E>
static void part_of(const Product& p, int64_t begin, int64_t end) {
  p.transposed ? rows<E>(p, begin, end) : columns<E>(p, begin, end);
}

static void part(const Product& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ffi::DataType::F16: return part_of<Half>(p, begin, end);
    case ffi::DataType::BF16: return part_of<Bfloat>(p, begin, end);
    default: return part_of<float>(p, begin, end);
  }
}
