// The library that jaxkv/nn/native loads: the handler that XLA calls, and what is asked before it is given to XLA.
#include "attention.h"

#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxkv {
namespace {

template <class T>
const T* given(const ffi::AnyBuffer& x) {
  return x.element_count() ? static_cast<const T*>(x.untyped_data()) : nullptr;
}

bool has_shape(const ffi::AnyBuffer& x, std::initializer_list<int64_t> shape, size_t skipped = 0) {
  const auto dims = x.dimensions();
  return dims.size() == shape.size() - skipped && std::equal(shape.begin() + skipped, shape.end(), dims.begin());
}

bool type_of(ffi::DataType type, Type& found) {
  switch (type) {
    case ffi::DataType::F32: found = kFloat; return true;
    case ffi::DataType::F16: found = kHalf; return true;
    case ffi::DataType::BF16:
    case ffi::DataType::U16: found = kBfloat; return true;  // where XLA is slow with them, a cache keeps the bits
    case ffi::DataType::S8: found = kInt8; return true;
    default: return false;
  }
}

std::atomic<int> in_use{kNone};  // the instruction set that calls run with; kNone: the best

ffi::Error wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

ffi::Error handle(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer k_scales,
                  ffi::AnyBuffer v_scales, ffi::AnyBuffer layer, ffi::AnyBuffer rows, ffi::AnyBuffer filled,
                  ffi::AnyBuffer kv_positions, ffi::AnyBuffer low, ffi::AnyBuffer positions, ffi::AnyBuffer spans,
                  ffi::AnyBuffer kv_spans, ffi::AnyBuffer high, ffi::AnyBuffer table, ffi::AnyBuffer sink_logits,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> log_total, int64_t sinks, float softcap,
                  int64_t in_order) {
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions(), held = kv_positions.dimensions();
  const size_t stacked = kd.size() == 5;  // else the buffer of one layer, without its first axis
  if (qd.size() != 5 || kd.size() != 4 + stacked || vd.size() != kd.size() || held.size() != 2)
    return wrong("jaxkv: wrong ranks");
  Call call;
  call.B = qd[0], call.K = qd[1], call.G = qd[2], call.T = qd[3], call.H = qd[4];
  call.L = stacked ? kd[0] : 1, call.A = kd[stacked], call.S = kd[stacked + 2], call.Hv = vd[stacked + 3], call.V = held[1];
  const int64_t B = call.B, T = call.T, K = call.K, V = call.V;
  for (const ffi::AnyBuffer& x : {q, k_scales, v_scales, sink_logits})
    if (x.element_type() != ffi::DataType::F32) return wrong("jaxkv: not float32");
  for (const ffi::AnyBuffer& x : {layer, rows, filled, kv_positions, low, positions, spans, kv_spans, high, table})
    if (x.element_type() != ffi::DataType::S32) return wrong("jaxkv: not int32");
  if (!type_of(k.element_type(), call.type) || v.element_type() != k.element_type())
    return wrong("jaxkv: keys and values of a type that is not read");
  const bool lies = has_shape(k, {call.L, call.A, K, call.S, call.H}, !stacked) &&
                    has_shape(v, {call.L, call.A, K, call.S, call.Hv}, !stacked);
  const bool fits = has_shape(layer, {}) && has_shape(rows, {B}) && has_shape(filled, {B}) &&
                    has_shape(kv_positions, {B, V}) && has_shape(low, {B, T}) && has_shape(positions, {B, T});
  const bool may = (!spans.element_count() || (has_shape(spans, {B, T}) && has_shape(kv_spans, {B, V}) && has_shape(high, {B, T}))) &&
                   (!table.element_count() || has_shape(table, {B, V / std::max<int64_t>(call.S, 1)})) &&
                   (!sink_logits.element_count() || has_shape(sink_logits, {K, call.G})) &&
                   (!k_scales.element_count() || has_shape(k_scales, {call.L, call.A, K, call.S, 1}, !stacked)) &&
                   (!v_scales.element_count() || has_shape(v_scales, {call.L, call.A, K, call.S, 1}, !stacked));
  const bool gives = has_shape(*out, {B, K, call.G, T, call.Hv}) && has_shape(*log_total, {B, K, call.G, T});
  if (!lies || !fits || !may || !gives) return wrong("jaxkv: shapes that don't fit together");
  if (call.H < 1 || call.Hv < 1 || call.H > kMost || call.Hv > kMost || call.L < 1 || call.A < 1 || call.S < 1)
    return wrong("jaxkv: sizes that are not read");
  if (table.element_count() ? V % call.S != 0 : V != call.S) return wrong("jaxkv: slots that are not there");
  const int32_t which = *static_cast<const int32_t*>(layer.untyped_data());
  call.layer = std::clamp<int64_t>(which, 0, call.L - 1);  // as XLA's own slices
  call.q = given<float>(q);
  call.k = k.untyped_data(), call.v = v.untyped_data();
  call.k_scales = given<float>(k_scales), call.v_scales = given<float>(v_scales);
  call.rows = given<int32_t>(rows), call.filled = given<int32_t>(filled);
  call.kv_positions = given<int32_t>(kv_positions);
  call.low = given<int32_t>(low), call.positions = given<int32_t>(positions);
  call.spans = given<int32_t>(spans), call.kv_spans = given<int32_t>(kv_spans), call.high = given<int32_t>(high);
  call.table = given<int32_t>(table);
  call.sink_logits = given<float>(sink_logits);
  call.sinks = sinks, call.softcap = softcap, call.in_order = in_order != 0;
  call.out = static_cast<float*>(out->untyped_data());
  call.log_total = static_cast<float*>(log_total->untyped_data());
  const Isa isa = static_cast<Isa>(in_use.load(std::memory_order_relaxed));
  Attention attention(call, isa ? isa : best_isa());
  if (!attention.ready()) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxkv: out of memory");
  attend(attention, attention.pays() ? pool.num_threads() - 1 : 0, [&](auto&& work) {
    auto task = work;
    pool.Schedule(std::move(task));
  });
  return ffi::Error::Success();
}

// A small case of everything that is multiplied, against sums in double precision.
template <class E>
bool right(Type type, Isa isa, E (*encode)(float), double (*decode)(E)) {
  constexpr int64_t K = 2, G = 3, T = 2, H = 24, Hv = 20, S = 600, N = K * G * T;
  uint32_t seed = 1;
  auto random = [&] { return (seed = seed * 1664525u + 1013904223u) * 0x1p-31f - 1.f; };
  std::vector<float> q(N * H), out(N * Hv), log_total(N), k_scales(K * S), v_scales(K * S);
  std::vector<E> k(K * S * H), v(K * S * Hv);
  for (float& x : q) x = random();
  for (E& x : k) x = encode(random());
  for (E& x : v) x = encode(random());
  for (float& x : k_scales) x = 1 + random() / 2;
  for (float& x : v_scales) x = 1 + random() / 2;
  std::vector<int32_t> held(S);
  for (int64_t s = 0; s < S; ++s) held[s] = s % 7 == 3 ? -1 : static_cast<int32_t>(s);
  const int32_t row = 0, filled = S - 1, low[T] = {5, 40}, positions[T] = {580, 598};
  const float sink_logits[K * G] = {0.f, 1.f, 2.f, 3.f, -1.f, 1.f};
  Call call{1, K, G, T, H, Hv, 1, 1, S, S, type, q.data(), k.data(), v.data(), k_scales.data(), v_scales.data(), 0, &row,
            &filled, held.data(), low, positions, nullptr, nullptr, nullptr, nullptr, sink_logits, 2, 3.f, true,
            out.data(), log_total.data()};
  Attention attention(call, isa);
  if (!attention.ready()) return false;
  attend(attention, 0, [](auto&&) {});
  for (int64_t n = 0; n < N; ++n) {
    const int64_t head = n / (G * T), t = n % T;
    double total = std::exp(double(sink_logits[n / T])), mixed[Hv] = {};
    for (int64_t s = 0; s < S; ++s) {
      if (!call.sees(t, held[s], 0)) continue;
      double score = 0;
      for (int64_t h = 0; h < H; ++h) score += double(q[n * H + h]) * decode(k[(head * S + s) * H + h]);
      const double weight = std::exp(3 * std::tanh(score * k_scales[head * S + s] / 3));
      total += weight;
      for (int64_t h = 0; h < Hv; ++h) mixed[h] += weight * v_scales[head * S + s] * decode(v[(head * S + s) * Hv + h]);
    }
    for (int64_t h = 0; h < Hv; ++h)
      if (!(std::fabs(out[n * Hv + h] - mixed[h] / total) < 1e-5)) return false;
    if (!(std::fabs(log_total[n] - std::log(total)) < 1e-5)) return false;
  }
  return true;
}

uint32_t bits_of(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
float float_of(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }

float same(float x) { return x; }
double widen(float x) { return x; }
Bfloat to_bfloat(float x) { return {static_cast<uint16_t>(bits_of(x) >> 16)}; }
double of_bfloat(Bfloat x) { return float_of(uint32_t(x.bits) << 16); }
Half to_half(float x) {  // of numbers below 1, cut
  const float small = std::fabs(x) < 0x1p-14f ? 0.f : x;
  const uint32_t b = bits_of(small);
  return {static_cast<uint16_t>(small == 0 ? 0 : (b >> 16 & 0x8000) | (((b & 0x7fffffff) - (112u << 23)) >> 13))};
}
double of_half(Half x) {
  const int exponent = x.bits >> 10 & 31;
  const double size = exponent ? std::ldexp(1024 + (x.bits & 1023), exponent - 25) : std::ldexp(x.bits & 1023, -24);
  return x.bits & 0x8000 ? -size : size;
}
int8_t to_int8(float x) { return static_cast<int8_t>(std::lrint(x * 3)); }
double of_int8(int8_t x) { return x; }

}  // namespace
}  // namespace jaxkv

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* jaxkv_attention(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxkv_attention, jaxkv::handle,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        .Attr<int64_t>("sinks").Attr<float>("softcap").Attr<int64_t>("in_order"));

extern "C" {

// The version of XLA's interface that this was built for: major * 1000 + minor.
__attribute__((visibility("default"))) int jaxkv_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// Has calls run with an instruction set: 1 plain, 2 AVX2, 3 AVX-512; with the best where it can't be used here. Returns it.
__attribute__((visibility("default"))) int jaxkv_use(int isa) {
  using namespace jaxkv;
  return in_use = has(static_cast<Isa>(isa)) ? isa : best_isa();
}

// 0 if every instruction set that can be used here gives right sums, else 10 * instruction set + type; 100: none can.
__attribute__((visibility("default"))) int jaxkv_self_test() {
  using namespace jaxkv;
  if (best_isa() == kNone) return 100;
  for (int isa = kPlain; isa <= kAvx512; ++isa) {
    if (!has(static_cast<Isa>(isa))) continue;
    const Isa set = static_cast<Isa>(isa);
    if (!right<float>(kFloat, set, same, widen)) return 10 * isa + kFloat;
    if (!right<Half>(kHalf, set, to_half, of_half)) return 10 * isa + kHalf;
    if (!right<Bfloat>(kBfloat, set, to_bfloat, of_bfloat)) return 10 * isa + kBfloat;
    if (!right<int8_t>(kInt8, set, to_int8, of_int8)) return 10 * isa + kInt8;
  }
  return 0;
}
}
