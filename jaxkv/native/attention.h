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
#include <vector>

#include "division.h"
#include "instructions.h"

namespace jaxkv {

constexpr int kStretch = 512;      // slots of a task
constexpr int kBlock = 64;         // keys between two looks at the maximum
constexpr int kMost = 1024;        // largest head_dim and value_dim
constexpr int kMostPadded = kMost + 16;

// 2^r for |r| <= 1/2, and (tanh(x) - x) / x^3 in x^2 for |x| <= 0.65: interpolated at Chebyshev's points.
constexpr float kExp2[] = {1.f,           0.693147206f,  0.240226509f,   0.0555032723f,
                           0.00961805668f, 0.00134004282f, 0.000154614447f};
constexpr float kTanh[] = {-0.333333331f, 0.133332907f,    -0.0539563493f,
                           0.0217461871f, -0.00827245673f, 0.00221490274f};

enum Type { kFloat, kHalf, kBfloat, kInt8, kInt4, kE4m3, kE5m2, kTypes };

// Whether vectors are made floats, once for all queries, before they are multiplied.
INLINE bool expands(Type type) { return type >= kInt4; }

// One buffer, as its storage keeps it.
struct Vectors {
  Type type;
  int64_t size;           // numbers of a vector
  const void* codes;      // [L, A, K, S, size]; two numbers a byte in kInt4
  const void* scales;     // [L, A, K, S], or null; bfloat16 in kInt4, else float
  const uint8_t* groups;  // [L, A, K, S, size / group]: the steps and zeros of kInt4; else null
  int64_t group;          // of kInt4
};

INLINE int64_t bytes_of(const Vectors& x) {
  return x.type == kFloat ? 4 * x.size : x.type == kHalf || x.type == kBfloat ? 2 * x.size : x.type == kInt4 ? x.size / 2 : x.size;
}

// One call. Pointers that may be null say so.
struct Call {
  int64_t B, K, G, T, H;      // batch rows, kv heads, query heads of a kv head, queries, size of a query
  int64_t L, A, S, V;         // buffers are [L, A, K, S, size]; a row has V slots
  Vectors keys, values;
  bool inside;                // a key is its value, and then what `keys` has: maybe nothing
  const float* q;             // [B, K, G, T, H], scaled
  int64_t layer;
  const int32_t* rows;          // [B]
  const int32_t* filled;        // [B]: slots from here on are empty
  const int32_t* kv_positions;  // [B, V], below 0: empty
  const int32_t* low;           // [B, T]: the first position that a query sees, besides sinks
  const int32_t* positions;     // [B, T], below 0: padding
  const int32_t* spans;         // [B, T], or null
  const int32_t* kv_spans;      // [B, V], or null
  const int32_t* high;          // [B, T]: the last position within reach, for those of one span; or null
  const int32_t* base;          // [B]: the first position of the call's tokens, which are a tree; or null
  const int32_t* depths;        // [B, T]: where each of them stands; or null
  const bool* ancestors;        // [B, T, T]: whether the second is on the way to the first, itself included; or null
  const int32_t* table;         // [B, V / page]: A is pages and S their slots; or null: A is rows
  const float* sink_logits;     // [K, G], or null
  int64_t sinks;
  float softcap;                // 0: none
  bool in_order;                // slot = position
  float* out;                   // [B, K, G, T, values.size]
  float* log_total;             // [B, K, G, T]

  bool sees(int64_t query, int32_t position, int32_t span) const {
    if (position < 0 || positions[query] < 0) return false;
    if (base) return sees_in_tree(query, position);
    const bool reached = position >= low[query] || position < sinks;
    if (position <= positions[query]) return reached;
    return reached && spans && spans[query] && spans[query] == span && position <= high[query];
  }

  bool sees_in_tree(int64_t query, int32_t position) const {
    const int64_t b = query / T, own = column(b, positions[query]);
    int32_t depth = position;
    if (position >= base[b]) {
      const int64_t other = column(b, position);
      if (!ancestors[(b * T + own) * T + other]) return false;
      depth = depths[b * T + other];
    }
    return depth >= 0 && depth <= depths[b * T + own] && (depth >= low[query] || depth < sinks);
  }

  int64_t column(int64_t b, int32_t position) const {
    return std::clamp<int64_t>(int64_t{position} - base[b], 0, T - 1);
  }
};

struct Task {
  const Call* call;
  int64_t row;
  int64_t k_bytes, v_bytes;  // of a vector
  const float* q;         // [G * T, H]
  float* top;             // [G * T]: maximum so far
  float* total;           // [G * T]: sum of exp(score - maximum)
  float* mixed;           // [G * T, values.size]
  float* scratch;         // kBlock keys and values as floats, where they must be made such
  bool each;              // queries see different slots of the list
  int32_t low, last;      // positions from low to last are seen by all queries but padding
  int block, count;
  int64_t at[kStretch];   // the listed slots: how many slots behind the beginning of the buffer
  int32_t position[kStretch], span[kStretch];
};

// What the tasks of one kv head of one row leave, in the order of the slots. Joining them turns their maxima into weights.
struct Parts {
  float* first;               // [stretches, stride]: as in Task, maxima, sums and mixed values
  int64_t stretches, stride;
  int64_t queries, T, size;   // G * T, T, and numbers of a value
  const float* sink_logits;   // [G], or null
};

// The slots of a block that lie one after another.
struct InOrder {
  int64_t at[kBlock];
  constexpr InOrder() : at() { for (int i = 0; i < kBlock; ++i) at[i] = i; }
};
constexpr InOrder kInOrder;

#define KERNEL "attention_kernel.h"
#include "each_set.h"
#undef KERNEL

inline void attend_task(Task& task, [[maybe_unused]] Isa isa) { WITH_SET(isa, attend_task(task)) }
inline void join_parts(const Parts& parts, float* out, float* log_total, [[maybe_unused]] Isa isa) {
  WITH_SET(isa, join_parts(parts, out, log_total))
}

// The slots that a row's queries may see, in stretches, and where their parts lie.
struct Row {
  int64_t begin, end;      // slots
  int64_t first, stretches;  // number of its first stretch; how many
  int64_t tasks;           // of the rows before
};

class Attention {
 public:
  // `threads`: how many may run tasks.
  Attention(const Call& call, Isa isa, int64_t threads) : call_(call), isa_(isa), rows_(call.B) {
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
    const int64_t queries = call.G * call.T, numbers = call.H + call.values.size;
    work_ = slots * call.K * std::max(bytes_of(call.keys) + bytes_of(call.values), numbers * queries);
    threads = pays() ? threads : 1;
    parts_.reset(static_cast<float*>(malloc((std::max<int64_t>(tasks, 1) * part() + threads * scratch()) * sizeof(float))));
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

  // Computes one of the tasks; different ones on different threads, of which this is one.
  void run(int64_t number, int64_t thread) {
    const auto after = std::upper_bound(rows_.begin(), rows_.end(), number,
                                        [](int64_t n, const Row& row) { return n < row.tasks; });
    const int64_t b = after - rows_.begin() - 1, inner = number - rows_[b].tasks;
    const int64_t k = inner / rows_[b].stretches, stretch = inner % rows_[b].stretches;
    stretch_of(b, k, stretch, number, thread);
    if (left_[b * call_.K + k].fetch_sub(1, std::memory_order_acq_rel) == 1) join(b, k);
  }

 private:
  int64_t part() const { return call_.G * call_.T * (call_.values.size + 2); }  // maxima, sums, mixed values
  int64_t scratch() const {
    return expands(call_.keys.type) || expands(call_.values.type) ? kBlock * (call_.keys.size + call_.values.size) : 0;
  }

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

  void stretch_of(int64_t b, int64_t k, int64_t stretch, int64_t number, int64_t thread) {
    const int64_t queries = call_.G * call_.T;
    Task task;
    task.call = &call_;
    task.row = b;
    task.q = call_.q + (b * call_.K + k) * queries * call_.H;
    task.k_bytes = bytes_of(call_.keys), task.v_bytes = bytes_of(call_.values);
    task.scratch = parts_.get() + std::max<int64_t>(tasks_, 1) * part() + thread * scratch();
    task.top = parts_.get() + number * part();
    task.total = task.top + queries;
    task.mixed = task.total + queries;
    std::fill_n(task.top, queries, -FLT_MAX);
    std::fill_n(task.total, queries * (call_.values.size + 1), 0.f);
    task.each = call_.T > 1;
    task.count = 0;
    const Row& row = rows_[b];
    const int64_t begin = std::max(row.begin, (row.first + stretch) * kStretch);
    const int64_t end = std::min(row.end, (row.first + stretch + 1) * kStretch);
    const int32_t* held = call_.kv_positions + b * call_.V;
    const int32_t* spans = call_.kv_spans ? call_.kv_spans + b * call_.V : nullptr;
    const int64_t first = call_.layer * call_.A;
    const int64_t lane = call_.rows[b] < 0 ? 0 : std::min<int64_t>(call_.rows[b], call_.A - 1);
    int32_t low = 0, last = call_.base ? std::max(call_.base[b], 0) - 1 : INT32_MAX;
    for (int64_t n = b * call_.T; n < (b + 1) * call_.T; ++n) {
      if (call_.positions[n] < 0) continue;
      low = std::max(low, call_.low[n]);
      last = std::min(last, call_.positions[n]);
      if (call_.base) last = std::min(last, call_.depths[b * call_.T + call_.column(b, call_.positions[n])]);
    }
    task.low = low, task.last = last;
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
    const int64_t queries = call_.G * call_.T, first = (b * call_.K + k) * queries;
    Parts parts;
    parts.stretches = rows_[b].stretches, parts.stride = part(), parts.queries = queries, parts.size = call_.values.size;
    parts.first = parts_.get() + (rows_[b].tasks + k * parts.stretches) * parts.stride;
    parts.sink_logits = call_.sink_logits ? call_.sink_logits + k * call_.G : nullptr;
    parts.T = call_.T;
    join_parts(parts, call_.out + first * parts.size, call_.log_total + first, isa_);
  }

  struct Free { void operator()(float* x) const { free(x); } };

  Call call_;
  Isa isa_;
  std::vector<Row> rows_;
  int64_t tasks_ = 0, work_ = 0;
  std::unique_ptr<float, Free> parts_;
  std::vector<std::atomic<int64_t>> left_;
};

template <class Schedule>
void attend(Attention& attention, int64_t helpers, const Schedule& schedule) {
  auto run = [&](int64_t number, int64_t thread) { attention.run(number, thread); };
  divide(attention.tasks(), attention.pays() ? helpers : 0, run, schedule);
}

}  // namespace jaxkv
