// The part of CUDA that the kernels use, and the functions of the dialect that are single instructions on a GPU.
#pragma once
#include "device.hpp"
#include <cmath>

#define EMULATED 1
#define __global__ static
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (gpu::Index{gpu::block.index()})
#define blockIdx (gpu::Index{gpu::block.block_index})
#define gridDim (gpu::Index{gpu::block.num_blocks})

#define SHARED_ARRAY(type, name, length) type *name = (type *)gpu::block.shared(__COUNTER__, sizeof(type[length]))
#define BLOCK_BARRIER() gpu::block.meet(__LINE__)
// Each exchange has its own number, so that the emulator detects lanes that wait at different exchanges.
#define SHUFFLE_XOR(value, by) exchange(value, by, __COUNTER__)
#define DEVICE_FENCE()
#define TAKE_TICKET(ticket, most) gpu::block.take_ticket(ticket, most, __LINE__)

template <class T> T exchange(T value, unsigned by, unsigned place) {
  return gpu::block.exchange(value, gpu::block.lane() ^ by, place << 6 | by);
}

template <class To, class From> To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "other bits");
  To same;
  memcpy(&same, &value, sizeof same);
  return same;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return same_bits<long long>(value); }

inline float divide_approximately(float a, float b) { return a / b; }
inline float exp2_approximately(float x) {
  float power = exp2f(x);
  return power < 0x1p-126f ? 0 : power;
}

// The processor's own conversions, which are independent of the kernels'. T has the bits of a half.
template <class T> float widen_half(T x) { return (float)same_bits<_Float16>(x); }
template <class T> T narrow_half(float x) { return same_bits<T>((_Float16)x); }
