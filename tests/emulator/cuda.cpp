// The CUDA kernels for one kind of input, callable through one function, KERNELS.
#include "cuda.hpp"

namespace {
struct f16;
struct bf16;
float widen(f16 x);
void narrow(float x, f16 &out);
unsigned narrow_two(float low, float high, f16);
unsigned larger_two(unsigned a, unsigned b, f16 type);
unsigned larger_two(unsigned a, unsigned b, bf16 type);
#define HAS_LARGER_TWO

#include "cuda.cu"

float widen(f16 x) { return widen_half(x); }
void narrow(float x, f16 &out) { out = narrow_half<f16>(x); }
unsigned narrow_two(float low, float high, f16) {
  return narrow_half<f16>(low).bits | (unsigned)narrow_half<f16>(high).bits << 16;
}
template <class T> unsigned larger_halves(unsigned a, unsigned b) {
  unsigned larger = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    T x = {(u16)(a >> shift)}, y = {(u16)(b >> shift)};
    bool first = widen(x) > widen(y) || widen(y) != widen(y);
    larger |= (unsigned)(first ? x : y).bits << shift;
  }
  return larger;
}
unsigned larger_two(unsigned a, unsigned b, f16) { return larger_halves<f16>(a, b); }
unsigned larger_two(unsigned a, unsigned b, bf16) { return larger_halves<bf16>(a, b); }
}  // namespace

#define ARGUMENTS_OF_THREAD
#include "entries.hpp"
