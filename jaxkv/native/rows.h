// Rows of buffers chosen anew: row r becomes what row rows[r] was, in place, and only as far as something is held.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "division.h"

namespace jaxkv {

constexpr int64_t kStretch = 1 << 13;  // bytes of a row moved at a time: those of all rows stay near the core
constexpr int64_t kAhead = 1 << 10;    // bytes of the next row that are asked for meanwhile: it lies on other pages
constexpr int64_t kAside = -1;         // the number of a place beside the rows

// Row `to` becomes what row `from` is at that time.
struct Move {
  int64_t to, from;
};

// The moves after which each row r is what row rows[r] was; numbers of no row are those of the nearest.
inline std::vector<Move> in_order(const int32_t* rows, int64_t count) {
  std::vector<int64_t> from(count), readers(count);
  for (int64_t r = 0; r < count; ++r) {
    from[r] = std::clamp<int64_t>(rows[r], 0, count - 1);
    if (from[r] != r) ++readers[from[r]];
  }
  std::vector<Move> moves;
  auto become = [&](int64_t row, int64_t source) {
    moves.push_back({row, source});
    from[row] = row;
  };
  // First the rows that nobody reads, and those that then nobody reads any more.
  for (int64_t r = 0; r < count; ++r)
    for (int64_t row = r; from[row] != row && !readers[row];) {
      const int64_t source = from[row];
      become(row, source);
      --readers[source];
      row = source;
    }
  // Of what is left each row is read by one other: cycles.
  for (int64_t r = 0; r < count; ++r) {
    if (from[r] == r) continue;
    moves.push_back({kAside, r});
    int64_t row = r;
    for (int64_t source = from[row]; source != r; source = from[row]) {
      become(row, source);
      row = source;
    }
    become(row, kAside);
  }
  return moves;
}

// What moves alike in one buffer [lead, rows, heads, slots, size]: the first `held` bytes of each row and head.
struct Rows {
  char* data;
  int64_t lead, rows, heads, head, held;  // head: bytes from one to the next

  int64_t row() const { return heads * head; }
  int64_t stretches() const { return (held + kStretch - 1) / kStretch; }
  int64_t tasks() const { return lead * heads * stretches(); }

  void run(const std::vector<Move>& moves, int64_t task) const {
    const int64_t begin = task % stretches() * kStretch, bytes = std::min(held - begin, kStretch), place = task / stretches();
    char* const first = data + place / heads * rows * row() + place % heads * head + begin;
    alignas(64) char aside[kStretch];
    for (size_t i = 0; i < moves.size(); ++i) {
      const Move& move = moves[i];
      if (i + 1 < moves.size() && moves[i + 1].from != kAside)
        for (int64_t byte = 0; byte < std::min(bytes, kAhead); byte += 64)
          __builtin_prefetch(first + moves[i + 1].from * row() + byte);
      std::memcpy(move.to == kAside ? aside : first + move.to * row(),
                  move.from == kAside ? aside : first + move.from * row(), bytes);
    }
  }
};

// Moves the rows of several buffers: each head and stretch by itself, on several threads if that pays.
template <class Schedule>
void move(const std::vector<Rows>& buffers, const std::vector<Move>& moves, int64_t threads, const Schedule& schedule) {
  std::vector<int64_t> ends;
  int64_t tasks = 0, bytes = 0;
  for (const Rows& each : buffers) {
    ends.push_back(tasks += each.tasks());
    bytes += each.lead * each.heads * each.held * static_cast<int64_t>(moves.size());
  }
  if (moves.empty()) return;
  auto run = [&](int64_t task, int64_t) {
    const size_t number = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    buffers[number].run(moves, number ? task - ends[number - 1] : task);
  };
  divide(tasks, bytes > kAlone ? threads - 1 : 0, run, schedule);
}

}  // namespace jaxkv
