// Attention, as XLA calls it.
#include "attention.h"
#include "library.h"
#include "numbers.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace {

template <class T>
const T* given(const ffi::AnyBuffer& x) {
  return x.element_count() ? static_cast<const T*>(x.untyped_data()) : nullptr;
}

// Whether a storage of this kind keeps its numbers in a buffer of this type.
bool kept_in(Type kind, ffi::DataType type) {
  switch (kind) {
    case kFloat: return type == ffi::DataType::F32;
    case kHalf: return type == ffi::DataType::F16 || type == ffi::DataType::U16;
    case kBfloat: return type == ffi::DataType::BF16 || type == ffi::DataType::U16;
    case kInt8: return type == ffi::DataType::S8;
    default: return type == ffi::DataType::U8;
  }
}

// What a buffer [L, A, K, S, ...] has along its axes; of one layer it is without the first.
struct Lead {
  int64_t L, A, K, S;
  bool stacked;

  bool fits(const ffi::AnyBuffer& x, int64_t size) const { return has_shape(x, {L, A, K, S, size}, !stacked); }
};

// The vectors of a storage with `size` numbers each, or why they can't be read.
const char* read(const Lead& lead, int64_t kind, int64_t size, const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales,
                 const ffi::AnyBuffer& groups, Vectors& to) {
  if (kind < 0 || kind >= kTypes || !kept_in(static_cast<Type>(kind), codes.element_type()))
    return "jaxkv: keys or values of a type that is not read";
  to = {static_cast<Type>(kind), size, codes.untyped_data(), nullptr, nullptr, 0};
  const bool four = kind == kInt4;
  if (size < 0 || size > kMost || (four && size % 2)) return "jaxkv: sizes that are not read";
  if (!lead.fits(codes, four ? size / 2 : size)) return "jaxkv: keys or values of another shape";
  if (scales.element_count()) {
    const auto type = scales.element_type();
    if (four ? type != ffi::DataType::BF16 && type != ffi::DataType::U16 : type != ffi::DataType::F32)
      return "jaxkv: scales of a type that is not read";
    if (!lead.fits(scales, 1)) return "jaxkv: scales of another shape";
    to.scales = scales.untyped_data();
  } else if (kind >= kInt8) {
    return "jaxkv: no scales";
  }
  if (!four) return nullptr;
  const int64_t count = groups.dimensions().size() ? groups.dimensions().back() : 0;
  if (count < 2 || count % 2 || size % count || !lead.fits(groups, count) || groups.element_type() != ffi::DataType::U8)
    return "jaxkv: groups of another shape";
  to.groups = given<uint8_t>(groups), to.group = size / count;
  return nullptr;
}

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer v, ffi::AnyBuffer v_scales, ffi::AnyBuffer v_groups,
                  ffi::AnyBuffer k, ffi::AnyBuffer k_scales, ffi::AnyBuffer k_groups, ffi::AnyBuffer layer,
                  ffi::AnyBuffer rows, ffi::AnyBuffer filled, ffi::AnyBuffer kv_positions, ffi::AnyBuffer low,
                  ffi::AnyBuffer positions, ffi::AnyBuffer spans, ffi::AnyBuffer kv_spans, ffi::AnyBuffer high,
                  ffi::AnyBuffer base, ffi::AnyBuffer depths, ffi::AnyBuffer ancestors, ffi::AnyBuffer table,
                  ffi::AnyBuffer sink_logits, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> log_total,
                  int64_t k_type, int64_t v_type, int64_t inside, int64_t sinks, float softcap, int64_t in_order) {
  const auto qd = q.dimensions(), vd = v.dimensions(), held = kv_positions.dimensions();
  const bool stacked = vd.size() == 5;  // else the buffer of one layer, without its first axis
  const auto od = out->dimensions();
  if (qd.size() != 5 || vd.size() != 4 + stacked || held.size() != 2 || od.size() != 5) return wrong("jaxkv: wrong ranks");
  Call call{};
  call.B = qd[0], call.K = qd[1], call.G = qd[2], call.T = qd[3], call.H = qd[4];
  call.L = stacked ? vd[0] : 1, call.A = vd[stacked], call.S = vd[stacked + 2], call.V = held[1];
  call.inside = inside != 0;
  const int64_t B = call.B, T = call.T, K = call.K, V = call.V, Hv = od[4];
  for (const ffi::AnyBuffer& x : {q, sink_logits})
    if (x.element_type() != ffi::DataType::F32) return wrong("jaxkv: not float32");
  for (const ffi::AnyBuffer& x : {layer, rows, filled, kv_positions, low, positions, spans, kv_spans, high, base, depths, table})
    if (x.element_type() != ffi::DataType::S32) return wrong("jaxkv: not int32");
  const Lead lead{call.L, call.A, K, call.S, stacked};
  if (const char* why = read(lead, v_type, Hv, v, v_scales, v_groups, call.values)) return wrong(why);
  const int64_t own = call.H - (inside ? Hv : 0);
  if (own || !inside)
    if (const char* why = read(lead, k_type, own, k, k_scales, k_groups, call.keys)) return wrong(why);
  const bool fits = has_shape(layer, {}) && has_shape(rows, {B}) && has_shape(filled, {B}) &&
                    has_shape(kv_positions, {B, V}) && has_shape(low, {B, T}) && has_shape(positions, {B, T});
  const bool may = (!spans.element_count() || (has_shape(spans, {B, T}) && has_shape(kv_spans, {B, V}) && has_shape(high, {B, T}))) &&
                   (!base.element_count() || (has_shape(base, {B}) && has_shape(depths, {B, T}) && has_shape(ancestors, {B, T, T}) &&
                                              ancestors.element_type() == ffi::DataType::PRED)) &&
                   (!table.element_count() || has_shape(table, {B, V / std::max<int64_t>(call.S, 1)})) &&
                   (!sink_logits.element_count() || has_shape(sink_logits, {K, call.G}));
  const bool gives = has_shape(*out, {B, K, call.G, T, Hv}) && has_shape(*log_total, {B, K, call.G, T});
  if (!fits || !may || !gives) return wrong("jaxkv: shapes that don't fit together");
  if (call.H < 1 || Hv < 1 || call.H > kMost || call.L < 1 || call.A < 1 || call.S < 1)
    return wrong("jaxkv: sizes that are not read");
  if (table.element_count() ? V % call.S != 0 : V != call.S) return wrong("jaxkv: slots that are not there");
  const int32_t which = *static_cast<const int32_t*>(layer.untyped_data());
  call.layer = std::clamp<int64_t>(which, 0, call.L - 1);  // as XLA's own slices
  call.q = given<float>(q);
  call.rows = given<int32_t>(rows), call.filled = given<int32_t>(filled);
  call.kv_positions = given<int32_t>(kv_positions);
  call.low = given<int32_t>(low), call.positions = given<int32_t>(positions);
  call.spans = given<int32_t>(spans), call.kv_spans = given<int32_t>(kv_spans), call.high = given<int32_t>(high);
  call.base = given<int32_t>(base), call.depths = given<int32_t>(depths), call.ancestors = given<bool>(ancestors);
  call.table = given<int32_t>(table);
  call.sink_logits = given<float>(sink_logits);
  call.sinks = sinks, call.softcap = softcap, call.in_order = in_order != 0;
  call.out = static_cast<float*>(out->untyped_data());
  call.log_total = static_cast<float*>(log_total->untyped_data());
  const Threads threads{pool};
  Attention attention(call, isa(), threads.count());
  if (!attention.ready()) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxkv: out of memory");
  attend(attention, threads.count() - 1, threads);
  return ffi::Error::Success();
}

// A small case of everything that is multiplied, against sums in double precision: random bytes, and `number` says which
// number the i-th of a vector of some storage is.
bool right(Type type, Isa isa) {
  constexpr int64_t K = 2, G = 3, T = 2, H = 24, Hv = 20, S = 600, N = K * G * T, kGroup = 2;
  uint32_t seed = 1;
  auto random = [&] { return (seed = seed * 1664525u + 1013904223u) >> 16 & 0xffff; };
  std::vector<float> q(N * H), out(N * Hv), log_total(N);
  for (float& x : q) x = (random() / 32768.f - 1) / 4;
  struct Store {
    std::vector<uint32_t> codes;  // of 8 to 32 bits, from the lowest byte on
    std::vector<uint32_t> scales;
    std::vector<uint8_t> groups;
    Vectors vectors;
  };
  auto store = [&](Store& s, int64_t size) {
    s.vectors = {type, size, nullptr, nullptr, nullptr, 0};
    s.codes.resize((K * S * bytes_of(s.vectors) + 3) / 4);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(s.codes.data());
    for (int64_t i = 0; i < K * S * bytes_of(s.vectors); ++i) bytes[i] = random();
    for (int64_t i = 0; i < K * S * size; ++i) {
      const uint32_t x = random();
      if (type == kFloat) s.codes[i] = (x & 0x8000) << 16 | 0x3f000000 | x << 8;      // 0.5 to 1
      if (type == kBfloat) reinterpret_cast<uint16_t*>(bytes)[i] = (x & 0x8000) | 0x3f00 | (x & 0x7f);
      if (type == kHalf) reinterpret_cast<uint16_t*>(bytes)[i] = x & 0xbbff;  // below 1, and the smallest
      if (type == kInt8) bytes[i] = x % 7 - 3;
      if (type == kE4m3) bytes[i] = x & 0xbf;  // below 2
      if (type == kE5m2) bytes[i] = x & 0xbf;
    }
    s.scales.resize(K * S);
    for (int64_t i = 0; i < K * S; ++i) s.scales[i] = 0x3f000000 | (random() & 0x7f) << 16;
    if (type == kInt4) {
      s.groups.resize(K * S * size / kGroup);
      for (uint8_t& x : s.groups) x = random() & 0x1f;
      for (int64_t i = 0; i < K * S; ++i) reinterpret_cast<uint16_t*>(s.scales.data())[i] = 0x3d00 | (random() & 0x7f);
      s.vectors.groups = s.groups.data(), s.vectors.group = kGroup;
    }
    s.vectors.codes = s.codes.data();
    if (type >= kInt8) s.vectors.scales = s.scales.data();
  };
  Store k, v;
  store(k, H), store(v, Hv);
  std::vector<int32_t> held(S);
  for (int64_t s = 0; s < S; ++s) held[s] = s % 7 == 3 ? -1 : static_cast<int32_t>(s);
  const int32_t row = 0, filled = S - 1, low[T] = {5, 40}, positions[T] = {580, 598};
  const float sink_logits[K * G] = {0.f, 1.f, 2.f, 3.f, -1.f, 1.f};
  Call call{};
  call.B = 1, call.K = K, call.G = G, call.T = T, call.H = H, call.L = call.A = 1, call.S = call.V = S;
  call.keys = k.vectors, call.values = v.vectors;
  call.q = q.data(), call.rows = &row, call.filled = &filled, call.kv_positions = held.data();
  call.low = low, call.positions = positions, call.sink_logits = sink_logits;
  call.sinks = 2, call.softcap = 3.f, call.in_order = true, call.out = out.data(), call.log_total = log_total.data();
  Attention attention(call, isa, 1);
  if (!attention.ready()) return false;
  attend(attention, 0, [](auto&&) {});
  for (int64_t n = 0; n < N; ++n) {
    const int64_t head = n / (G * T), t = n % T;
    double total = std::exp(double(sink_logits[n / T])), mixed[Hv] = {};
    for (int64_t s = 0; s < S; ++s) {
      if (!call.sees(t, held[s], 0)) continue;
      double score = 0;
      for (int64_t h = 0; h < H; ++h) score += double(q[n * H + h]) * number(k.vectors, head * S + s, h);
      const double weight = std::exp(3 * std::tanh(score / 3));
      total += weight;
      for (int64_t h = 0; h < Hv; ++h) mixed[h] += weight * number(v.vectors, head * S + s, h);
    }
    for (int64_t h = 0; h < Hv; ++h)
      if (!(std::fabs(out[n * Hv + h] - mixed[h] / total) < 1e-5)) return false;
    if (!(std::fabs(log_total[n] - std::log(total)) < 1e-5)) return false;
  }
  return true;
}

}  // namespace

int attention_is_wrong(Isa isa) {
  for (int type = 0; type < kTypes; ++type)
    if (!right(static_cast<Type>(type), isa)) return 1 + type;
  return 0;
}

}  // namespace jaxkv

EXPORTED XLA_FFI_Error* jaxkv_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_attention, jaxkv::handle,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        .Attr<int64_t>("k_type").Attr<int64_t>("v_type").Attr<int64_t>("inside")
        .Attr<int64_t>("sinks").Attr<float>("softcap").Attr<int64_t>("in_order"));
