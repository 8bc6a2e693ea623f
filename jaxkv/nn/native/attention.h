// Attention of a few queries over keys and values as a cache holds them, where they lie.
//
// Work is cut into tasks (row, kv head, stretch of slots) by shapes and by what the row holds, never by the number of
// threads or by other rows, and parts are joined in the order of the slots: the result is the same, bit for bit, whoever
// computes it. Within a stretch the slots that a query sees are listed first; nothing else is read.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Which instruction sets are compiled: all that there are, or one, as a bit each.
#ifndef JAXKV_SETS
#define JAXKV_SETS 7
#endif

#define INLINE static inline __attribute__((always_inline))

namespace jaxkv {

constexpr int kStretch = 512;      // slots of a task
constexpr int kBlock = 64;         // keys between two looks at the maximum
constexpr int kMost = 1024;        // largest head_dim and value_dim
constexpr int kMostPadded = kMost + 16;
constexpr int64_t kAlone = 1 << 19;  // bytes, or as much arithmetic, below which another thread costs more than it brings

// 2^r for |r| <= 1/2, and (tanh(x) - x) / x^3 in x^2 for |x| <= 0.65: interpolated at Chebyshev's points.
constexpr float kExp2[] = {1.f,           0.693147206f,  0.240226509f,   0.0555032723f,
                           0.00961805668f, 0.00134004282f, 0.000154614447f};
constexpr float kTanh[] = {-0.333333331f, 0.133332907f,    -0.0539563493f,
                           0.0217461871f, -0.00827245673f, 0.00221490274f};

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

enum Type { kFloat, kHalf, kBfloat, kInt8 };
enum Isa { kNone, kPlain, kAvx2, kAvx512 };

// One call. Pointers that may be null say so.
struct Call {
  int64_t B, K, G, T, H, Hv;  // batch rows, kv heads, query heads of a kv head, queries, sizes of a key and a value
  int64_t L, A, S, V;         // buffers are [L, A, K, S, H]; a row has V slots
  Type type;
  const float* q;             // [B, K, G, T, H], scaled
  const void* k;              // [L, A, K, S, H]
  const void* v;              // [L, A, K, S, Hv]
  const float* k_scales;      // [L, A, K, S], or null
  const float* v_scales;      // [L, A, K, S], or null
  int64_t layer;
  const int32_t* rows;          // [B]
  const int32_t* filled;        // [B]: slots from here on are empty
  const int32_t* kv_positions;  // [B, V], below 0: empty
  const int32_t* low;           // [B, T]: the first position that a query sees, besides sinks
  const int32_t* positions;     // [B, T], below 0: padding
  const int32_t* spans;         // [B, T], or null
  const int32_t* kv_spans;      // [B, V], or null
  const int32_t* high;          // [B, T]: the last position within reach, for those of one span; or null
  const int32_t* table;         // [B, V / page]: A is pages and S their slots; or null: A is rows
  const float* sink_logits;     // [K, G], or null
  int64_t sinks;
  float softcap;                // 0: none
  bool in_order;                // slot = position
  float* out;                   // [B, K, G, T, Hv]
  float* log_total;             // [B, K, G, T]

  bool sees(int64_t query, int32_t position, int32_t span) const {
    if (position < 0 || positions[query] < 0) return false;
    const bool reached = position >= low[query] || position < sinks;
    if (position <= positions[query]) return reached;
    return reached && spans && spans[query] && spans[query] == span && position <= high[query];
  }
};

struct Task {
  const Call* call;
  int64_t row;
  const float* q;         // [G * T, H]
  const void* k;
  const void* v;
  const float* k_scales;  // by the numbers of the list; or null
  const float* v_scales;
  float* top;             // [G * T]: maximum so far
  float* total;           // [G * T]: sum of exp(score - maximum)
  float* mixed;           // [G * T, Hv]
  bool each;              // queries see different slots of the list
  int block, count;
  int64_t at[kStretch];   // the listed slots: how many slots behind the beginning of the buffer
  int32_t position[kStretch], span[kStretch];
};

// Conversions where an instruction set has none: every number of 16 bits is one of 32.
#define SOFT_HALF                                                               \
  INLINE vf load_half(const Half* p) {                                          \
    vh h; memcpy(&h, p, sizeof h);                                              \
    vi x = __builtin_convertvector(h, vi);                                      \
    vi sign = (x & 0x8000) << 16, rest = (x & 0x7fff) << 13;                    \
    vi finite = float_to_bits(bits_to_float(rest) * 0x1p112f);                  \
    vi y = rest >= 0x0f800000 ? rest | 0x7f800000 : finite;                     \
    return bits_to_float(y | sign);                                             \
  }

#if JAXKV_SETS & 1
#define W 4
#if defined(__aarch64__)
#define ACCUMULATORS 16
#else
#define ACCUMULATORS 8
#endif
namespace plain {
#include "vector.h"
#if defined(__aarch64__)
INLINE vf load_half(const Half* p) {
  uint16x4_t h; memcpy(&h, p, sizeof h);
  float32x4_t y = vcvt_f32_f16(vreinterpret_f16_u16(h));
  vf x; memcpy(&x, &y, sizeof x); return x;
}
#else
SOFT_HALF
#endif
#include "kernel.h"
}  // namespace plain
#undef W
#undef ACCUMULATORS
#endif

#if defined(__x86_64__) && JAXKV_SETS & 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define W 8
#define ACCUMULATORS 8
namespace avx2 {
#include "vector.h"
INLINE vf load_half(const Half* p) {
  __m256 y = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  vf x; memcpy(&x, &y, sizeof x); return x;
}
#include "kernel.h"
}  // namespace avx2
#undef W
#undef ACCUMULATORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__x86_64__) && JAXKV_SETS & 4
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#define W 16
#define ACCUMULATORS 16
namespace avx512 {
#include "vector.h"
INLINE vf load_half(const Half* p) {
  __m512 y = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  vf x; memcpy(&x, &y, sizeof x); return x;
}
#include "kernel.h"
}  // namespace avx512
#undef W
#undef ACCUMULATORS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The best instruction set that was compiled and that this machine has; kNone: none.
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool small = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool large = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (JAXKV_SETS & 4 && small && large) return kAvx512;
    if (JAXKV_SETS & 2 && small) return kAvx2;
    return JAXKV_SETS & 1 ? kPlain : kNone;
  }();
  return best;
#else
  return JAXKV_SETS & 1 ? kPlain : kNone;
#endif
}

inline bool has(Isa isa) { return isa >= kPlain && isa <= best_isa() && JAXKV_SETS >> (isa - 1) & 1; }

inline void attend_task(Task& task, Isa isa) {
#if defined(__x86_64__) && JAXKV_SETS & 4
  if (isa == kAvx512) return avx512::attend_task(task);
#endif
#if defined(__x86_64__) && JAXKV_SETS & 2
  if (isa == kAvx2) return avx2::attend_task(task);
#endif
#if JAXKV_SETS & 1
  plain::attend_task(task);
#endif
}

// The slots that a row's queries may see, in stretches, and where their parts lie.
struct Row {
  int64_t begin, end;      // slots
  int64_t first, stretches;  // number of its first stretch; how many
  int64_t tasks;           // of the rows before
};

class Attention {
 public:
  Attention(const Call& call, Isa isa) : call_(call), isa_(isa), rows_(call.B) {
    int64_t tasks = 0, slots = 0;
    for (int64_t b = 0; b < call.B; ++b) {
      Row& row = rows_[b];
      bounds(b, row);
      row.first = row.begin / kStretch;
      row.stretches = row.end > row.begin ? (row.end - 1) / kStretch - row.first + 1 : 0;
      row.tasks = tasks;
      tasks += row.stretches * call.K;
      slots += row.end - row.begin;
    }
    tasks_ = tasks;
    const int64_t queries = call.G * call.T, bytes = call.type == kFloat ? 4 : call.type == kInt8 ? 1 : 2;
    work_ = slots * call.K * (call.H + call.Hv) * std::max(bytes, queries);
    parts_.reset(static_cast<float*>(malloc(std::max<int64_t>(tasks, 1) * part() * sizeof(float))));
    left_ = std::vector<std::atomic<int64_t>>(call.B * call.K);
    for (int64_t b = 0; b < call.B; ++b)
      for (int64_t k = 0; k < call.K; ++k) {
        left_[b * call.K + k].store(rows_[b].stretches, std::memory_order_relaxed);
        if (!rows_[b].stretches) join(b, k);
      }
  }

  bool ready() const { return parts_ != nullptr; }
  int64_t tasks() const { return tasks_; }
  bool pays() const { return work_ > kAlone && tasks_ > 1; }

  // Computes one of the tasks; different ones on different threads.
  void run(int64_t number) {
    const auto after = std::upper_bound(rows_.begin(), rows_.end(), number,
                                        [](int64_t n, const Row& row) { return n < row.tasks; });
    const int64_t b = after - rows_.begin() - 1, inner = number - rows_[b].tasks;
    const int64_t k = inner / rows_[b].stretches, stretch = inner % rows_[b].stretches;
    stretch_of(b, k, stretch, number);
    if (left_[b * call_.K + k].fetch_sub(1, std::memory_order_acq_rel) == 1) join(b, k);
  }

 private:
  int64_t part() const { return call_.G * call_.T * (call_.Hv + 2); }  // maxima, sums, mixed values

  void bounds(int64_t b, Row& row) const {
    int64_t end = 0, begin = call_.V, last = -1;
    for (int64_t t = 0; t < call_.T; ++t) {
      const int64_t n = b * call_.T + t;
      if (call_.positions[n] < 0) continue;
      end = std::min<int64_t>(std::max(call_.filled[b], 0), call_.V);
      begin = std::min<int64_t>(begin, std::max(call_.low[n], 0));
      last = std::max<int64_t>(last, call_.positions[n]);
    }
    row.begin = 0;
    if (call_.in_order && !call_.sinks) row.begin = begin;
    if (call_.in_order && !call_.spans) end = std::min(end, last + 1);
    row.end = std::max(end, row.begin);
  }

  void stretch_of(int64_t b, int64_t k, int64_t stretch, int64_t number) {
    const int64_t queries = call_.G * call_.T;
    Task task;
    task.call = &call_;
    task.row = b;
    task.q = call_.q + (b * call_.K + k) * queries * call_.H;
    task.k = call_.k;
    task.v = call_.v;
    task.k_scales = call_.k_scales;
    task.v_scales = call_.v_scales;
    task.top = parts_.get() + number * part();
    task.total = task.top + queries;
    task.mixed = task.total + queries;
    std::fill_n(task.top, queries, -FLT_MAX);
    std::fill_n(task.total, queries * (call_.Hv + 1), 0.f);
    task.each = call_.T > 1;
    task.count = 0;
    const Row& row = rows_[b];
    const int64_t begin = std::max(row.begin, (row.first + stretch) * kStretch);
    const int64_t end = std::min(row.end, (row.first + stretch + 1) * kStretch);
    const int32_t* held = call_.kv_positions + b * call_.V;
    const int32_t* spans = call_.kv_spans ? call_.kv_spans + b * call_.V : nullptr;
    const int64_t first = call_.layer * call_.A;
    const int64_t lane = call_.rows[b] < 0 ? 0 : std::min<int64_t>(call_.rows[b], call_.A - 1);
    int32_t low = 0, last = INT32_MAX;  // what all queries see
    for (int64_t n = b * call_.T; n < (b + 1) * call_.T; ++n) {
      low = std::max(low, call_.low[n]);
      last = std::min(last, call_.positions[n]);
    }
    int all = 1;
    for (int64_t s = begin; s < end; ++s) all &= (held[s] >= low) & (held[s] <= last);
    if (all) task.each = false;
    if (all && !call_.table) {  // the usual case, without a look at each slot
      const int64_t from = ((first + lane) * call_.K + k) * call_.S + begin;
      task.count = static_cast<int>(end - begin);
      for (int i = 0; i < task.count; ++i) task.at[i] = from + i;
      attend_task(task, isa_);
      return;
    }
    for (int64_t s = begin; s < end; ++s) {
      const int32_t position = held[s], span = spans ? spans[s] : 0;
      bool seen = all;
      for (int64_t t = 0; t < call_.T && !seen; ++t) seen = call_.sees(b * call_.T + t, position, span);
      if (!seen) continue;
      int64_t place = lane, slot = s;
      if (call_.table) {
        place = call_.table[b * (call_.V / call_.S) + s / call_.S];
        slot = s % call_.S;
        if (place < 0 || place >= call_.A) continue;  // no page: nothing can lie there
      }
      task.at[task.count] = ((first + place) * call_.K + k) * call_.S + slot;
      task.position[task.count] = position;
      task.span[task.count++] = span;
    }
    attend_task(task, isa_);
  }

  // Joins the parts of one kv head of one row, in the order of the slots.
  void join(int64_t b, int64_t k) {
    const int64_t queries = call_.G * call_.T, count = rows_[b].stretches;
    const float* parts = parts_.get() + (rows_[b].tasks + k * count) * part();
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t to = (b * call_.K + k) * queries + i;
      float* out = call_.out + to * call_.Hv;
      float top = -FLT_MAX, total = 0;
      if (call_.sink_logits) {
        top = call_.sink_logits[k * call_.G + i / call_.T];
        total = 1;
      }
      std::fill_n(out, call_.Hv, 0.f);
      for (int64_t n = 0; n < count; ++n) {
        const float* part_top = parts + n * part();
        const float* mixed = part_top + 2 * queries + i * call_.Hv;
        const float most = part_top[i] > top ? part_top[i] : top;
        const float keep = std::exp(top - most), add = std::exp(part_top[i] - most);
        total = total * keep + part_top[queries + i] * add;
        for (int64_t h = 0; h < call_.Hv; ++h) out[h] = out[h] * keep + mixed[h] * add;
        top = most;
      }
      if (total == 0) total = 1;  // a query that sees nothing
      for (int64_t h = 0; h < call_.Hv; ++h) out[h] /= total;
      call_.log_total[to] = top + std::log(total);
    }
  }

  struct Free { void operator()(float* x) const { free(x); } };

  Call call_;
  Isa isa_;
  std::vector<Row> rows_;
  int64_t tasks_ = 0, work_ = 0;
  std::unique_ptr<float, Free> parts_;
  std::vector<std::atomic<int64_t>> left_;
};

// Runs all tasks on this thread and, if it pays, on those that `schedule` can have begin a function. This thread takes
// tasks until none is left, and then waits only for those that have been begun: never for a thread to become free.
template <class Schedule>
void attend(Attention& attention, int64_t helpers, const Schedule& schedule) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    Attention* attention;
    int64_t tasks;
    void work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        attention->run(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  if (!attention.pays() || helpers < 1) {
    for (int64_t i = 0; i < attention.tasks(); ++i) attention.run(i);
    return;
  }
  auto shared = std::make_shared<Shared>();  // a helper that comes late finds it, and nothing to do
  shared->attention = &attention;
  shared->tasks = attention.tasks();
  helpers = std::min(helpers, shared->tasks - 1);
  for (int64_t i = 0; i < helpers; ++i) schedule([shared] { shared->work(); });
  shared->work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < shared->tasks; ++spins) {
    if (spins > 1000) std::this_thread::yield();  // one of them may wait for this very core
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

}  // namespace jaxkv
