// Rows of buffers chosen anew: row r becomes what row rows[r] was, in place, and only as far as something is held.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "division.h"

namespace jaxkv {

constexpr int64_t kPiece = 1 << 13;  // bytes of a row moved at a time: those of all rows stay near the core
constexpr int64_t kTask = 1 << 18;     // bytes that a thread moves before it looks for more
constexpr int64_t kPage = 1 << 12;     // bytes of memory that are found together
constexpr int kAhead = 6;              // moves before one, its pages are looked for: each row lies on others
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

// What moves alike in one buffer [lead, rows, heads, slots, size]: the first `held` bytes of each head of each row.
struct Rows {
  char* data;
  int64_t lead, rows, heads, head, held;  // head: bytes from one to the next

  int64_t row() const { return heads * head; }
  int64_t pieces() const { return (held + kPiece - 1) / kPiece; }
  int64_t places() const { return lead * heads * pieces(); }  // what all rows have: a piece of a head

  // All moves in one place, then in the next one.
  struct Cursor {
    const Rows& rows;
    const std::vector<Move>& moves;
    int64_t place, end;
    size_t number = 0;
    char* first = nullptr;  // where that place of row 0 is
    int64_t bytes = 0;

    Cursor(const Rows& rows, const std::vector<Move>& moves, int64_t place, int64_t end)
        : rows(rows), moves(moves), place(place), end(end) { enter(); }
    void enter() {
      if (!more()) return;
      const int64_t begin = place % rows.pieces() * kPiece, one = place / rows.pieces();
      first = rows.data + one / rows.heads * rows.rows * rows.row() + one % rows.heads * rows.head + begin;
      bytes = std::min(rows.held - begin, kPiece);
    }
    bool more() const { return place < end; }
    void step() {
      if (++number < moves.size()) return;
      number = 0, ++place;
      enter();
    }
    const Move& move() const { return moves[number]; }
    char* at(int64_t row) const { return first + row * rows.row(); }
  };

  void run(const std::vector<Move>& moves, int64_t begin, int64_t end) const {
    alignas(64) char aside[kPiece];
    Cursor ahead(*this, moves, begin, end);
    auto ask = [&] {
      if (!ahead.more()) return;
      for (const int64_t row : {ahead.move().from, ahead.move().to})
        for (int64_t byte = 0; row != kAside && byte < ahead.bytes; byte += kPage) __builtin_prefetch(ahead.at(row) + byte);
      ahead.step();
    };
    for (int i = 0; i < kAhead; ++i) ask();
    for (Cursor now(*this, moves, begin, end); now.more(); now.step()) {
      ask();
      const Move& move = now.move();
      std::memcpy(move.to == kAside ? aside : now.at(move.to), move.from == kAside ? aside : now.at(move.from), now.bytes);
    }
  }
};

// Moves the rows of several buffers, on several threads if that pays.
template <class Schedule>
void move(const std::vector<Rows>& buffers, const std::vector<Move>& moves, int64_t threads, const Schedule& schedule) {
  if (moves.empty()) return;
  std::vector<int64_t> ends, sizes;  // of each buffer: the number after its last task, and how many places a task has
  int64_t tasks = 0, bytes = 0;
  for (const Rows& each : buffers) {
    const int64_t place = std::min(each.held, kPiece) * static_cast<int64_t>(moves.size());
    sizes.push_back(std::max<int64_t>(kTask / std::max<int64_t>(place, 1), 1));
    ends.push_back(tasks += (each.places() + sizes.back() - 1) / sizes.back());
    bytes += each.places() * place;
  }
  auto run = [&](int64_t task, int64_t) {
    const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const int64_t begin = (i ? task - ends[i - 1] : task) * sizes[i];
    buffers[i].run(moves, begin, std::min(begin + sizes[i], buffers[i].places()));
  };
  divide(tasks, bytes > kAlone ? threads - 1 : 0, run, schedule);
}

}  // namespace jaxkv
