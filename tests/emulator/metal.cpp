// The Metal kernels for one kind of input, callable through one function, KERNELS.
#include <metal_stdlib>

namespace {
// Metal has no f64. The tests use f64 here to tell errors from rounding.
typedef double f64;
inline double widen(double x) { return x; }
inline void narrow(double x, double &out) { out = x; }
inline void unpack(uint4 pack, int i, double &out) {
  out = as_type<double>((ulong)pack[2 * i + 1] << 32 | pack[2 * i]);
}
inline void set_packed(uint4 &pack, int i, double x) {
  pack[2 * i] = (uint)as_type<ulong>(x);
  pack[2 * i + 1] = as_type<ulong>(x) >> 32;
}
inline void store_index(unsigned index, double &out) { out = index; }
inline unsigned stored_index(double x) { return (unsigned)x; }
#define HAS_F64 1
#define LOWEST (sizeof(Real) == 8 ? (Real)-1.7976931348623157e308 : (Real)-3.402823466e38f)

#include "metal.metal"
}  // namespace

#define ARGUMENTS_OF_THREAD , block.index(), threads, block.block_index, blocks, how.warp
#define HAS_REDUCE
#include "entries.hpp"
