// The part of CUDA that the kernels use.
#pragma once
#include "device.hpp"
#include <cmath>

#define __global__ static
#define __device__
#define __launch_bounds__(threads)
#define __grid_constant__
#define __restrict__
#define threadIdx (gpu::Index{gpu::block.index()})
#define blockIdx (gpu::Index{gpu::block.block_index})
#define blockDim (gpu::Index{gpu::block.num_threads})
#define gridDim (gpu::Index{gpu::block.num_blocks})

#define __syncthreads() gpu::block.meet(__LINE__)
// Each exchange has its own number, so that the emulator detects lanes that wait at different
// exchanges.
#define __shfl_xor_sync(mask, value, by) exchange(mask, value, by, __COUNTER__)
template <class T> T exchange(unsigned mask, T value, unsigned by, unsigned place) {
  if (mask != ~0u) gpu::fail("an exchange between some lanes only");
  return gpu::block.exchange(value, gpu::block.lane() ^ by, place << 6 | by);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <class T> T min(T a, T b) { return a < b ? a : b; }
