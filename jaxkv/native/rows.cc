// Rows of buffers chosen anew, as XLA calls it: XLA's CPU backend gathers number by number.
#include "rows.h"

#include "library.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace {

// Numbers that some backends pack: how they lie is not known here.
bool packed(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::S1: case ffi::DataType::S2: case ffi::DataType::S4:
    case ffi::DataType::U1: case ffi::DataType::U2: case ffi::DataType::U4:
    case ffi::DataType::F4E2M1FN: return true;
    default: return ffi::ByteWidth(type) == 0;
  }
}

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer filled, ffi::RemainingArgs from, ffi::RemainingRets to) {
  const Threads threads{pool};
  for (const ffi::AnyBuffer& each : {rows, filled})
    if (each.element_type() != ffi::DataType::S32) return wrong("jaxkv: rows that are not int32");
  if (rows.dimensions().size() != 1 || filled.dimensions().size()) return wrong("jaxkv: rows of a wrong rank");
  if (from.size() != to.size()) return wrong("jaxkv: not as many results as buffers");
  const int64_t count = rows.dimensions()[0];
  std::vector<Rows> buffers;
  for (size_t i = 0; i < from.size(); ++i) {
    const auto given = from.get<ffi::AnyBuffer>(i);
    auto result = to.get<ffi::AnyBuffer>(i);
    if (!given || !result) return wrong("jaxkv: what is moved is not a buffer");
    const ffi::AnyBuffer& x = *given;
    const ffi::AnyBuffer& y = **result;
    const auto xd = x.dimensions(), yd = y.dimensions();
    if (packed(x.element_type())) return wrong("jaxkv: numbers that are not whole bytes");
    if (x.element_type() != y.element_type() || xd.size() != yd.size() || !std::equal(xd.begin(), xd.end(), yd.begin()))
      return wrong("jaxkv: a result unlike its buffer");
    const size_t rank = xd.size();
    if (rank < 4 || xd[rank - 4] != count) return wrong("jaxkv: a buffer with another number of rows");
    if (!x.element_count()) continue;
    const int64_t slots = xd[rank - 2], slot = xd[rank - 1] * static_cast<int64_t>(ffi::ByteWidth(x.element_type()));
    const int64_t held = std::clamp<int64_t>(*static_cast<const int32_t*>(filled.untyped_data()), 0, slots) * slot;
    char* const data = static_cast<char*>(y.untyped_data());
    if (data != x.untyped_data()) std::memcpy(data, x.untyped_data(), x.size_bytes());
    const int64_t heads = xd[rank - 3], row = heads * slots * slot;
    buffers.push_back({data, static_cast<int64_t>(x.size_bytes()) / (row * count), count, heads, slots * slot, held});
  }
  move(buffers, in_order(static_cast<const int32_t*>(rows.untyped_data()), count), threads.count(), threads);
  return ffi::Error::Success();
}

// Rows that swap, follow one another in a circle, are read by several, stay, or are of no number; what is not held stays.
bool right(const std::vector<int32_t>& rows, int64_t held) {
  const int64_t lead = 2, heads = 3, head = held + 8;
  const int64_t count = static_cast<int64_t>(rows.size());
  std::vector<char> was(lead * count * heads * head);
  uint32_t seed = 1;
  for (char& byte : was) byte = static_cast<char>((seed = seed * 1664525u + 1013904223u) >> 24);
  std::vector<char> is = was;
  move({{is.data(), lead, count, heads, head, held}}, in_order(rows.data(), count), 1, [](auto&&) {});
  for (int64_t place = 0; place < lead * count * heads; ++place) {
    const int64_t row = place / heads % count, source = std::clamp<int64_t>(rows[row], 0, count - 1);
    const char *now = is.data() + place * head, *old = was.data() + place * head;
    if (std::memcmp(now, old + (source - row) * heads * head, held) || std::memcmp(now + held, old + held, head - held)) return false;
  }
  return true;
}

}  // namespace

int rows_are_wrong(Isa) {
  const std::vector<int32_t> cases[] = {{1, 0}, {1, 2, 0, 4, 3}, {2, 2, 2, 1, 3}, {0, -7, 99, 3, 4}, {3, 0, 1, 2, 0, 5, 4}};
  int number = 0;
  for (const auto& rows : cases) {
    ++number;
    for (const int64_t held : {int64_t{0}, int64_t{5}, number == 1 ? kPiece + 3 : 600})
      if (!right(rows, held)) return number;
  }
  return 0;
}

}  // namespace jaxkv

EXPORTED XLA_FFI_Error* jaxkv_rows(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_rows, jaxkv::handle,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());
