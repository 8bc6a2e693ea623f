// What the parts of the library share. Each part is a file of its own, with a handler that XLA calls and a self-test.
#pragma once

#include <algorithm>
#include <cstdint>

#include "instructions.h"

#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace jaxkv {

Isa isa();  // the instruction set that calls run with

// 0 if what a part computes with an instruction set is right, else the number of the case that is wrong, 1 to 9.
int attention_is_wrong(Isa isa);
int product_is_wrong(Isa isa);
int rows_are_wrong(Isa isa);
int memory_is_wrong(Isa isa);

inline xla::ffi::Error wrong(const char* what) { return xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument, what); }

// Has a thread of XLA's begin a function: what `divide` asks for.
struct Threads {
  xla::ffi::ThreadPool& pool;
  int64_t count() const { return std::max<int64_t>(pool.num_threads(), 1); }
  template <class Work> void operator()(const Work& work) const {
    Work task = work;
    pool.Schedule(std::move(task));
  }
};

inline bool has_shape(const xla::ffi::AnyBuffer& x, std::initializer_list<int64_t> shape, size_t skipped = 0) {
  const auto dims = x.dimensions();
  return dims.size() == shape.size() - skipped && std::equal(shape.begin() + skipped, shape.end(), dims.begin());
}

}  // namespace jaxkv
