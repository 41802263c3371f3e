// The CUDA dialect of the kernels: types, intrinsics and entry points. It needs no headers, so that NVRTC needs no toolkit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;
struct f8 { u8 bits; };
struct f16 { u16 bits; };
struct bf16 { u16 bits; };
typedef REAL Real;

#define FUNCTION __device__ inline
#define DEVICE
#define SHARED
#define THREAD
#define CONSTANT const

#define THREADS 256
#define MAX_WARP 32
// A multiprocessor has room for at least so many blocks.
#define MIN_BLOCKS (sizeof(Real) == 4 ? 4 : 2)
// The largest number of blocks that sum losses in one launch.
#define MAX_PARTIALS 4096
// A launch knows its last block.
#define JOINS_BLOCKS 1
#define HAS_F64 1

struct Threads {
  u32 index, block, num_blocks;
  static constexpr u32 count = THREADS, warp = MAX_WARP;
};

#define INFINITE __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)
// The lowest finite number.
#define LOWEST ((Real)(sizeof(Real) == 4 ? -3.402823466e38 : -1.7976931348623157e308))

// ---- Instructions. The emulator has functions of its own for them.

#ifndef EMULATED
#define SHARED_ARRAY(type, name, length) __shared__ type name[length]
#define BLOCK_BARRIER() __syncthreads()
#define SHUFFLE_XOR(value, by) __shfl_xor_sync(~0u, value, by)
#define DEVICE_FENCE() __threadfence()
// Counts from 0 to `most` and then from 0 again. Returns the count before.
#define TAKE_TICKET(ticket, most) atomicInc(ticket, most)

FUNCTION f32 widen(f16 x) {
  f32 wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
FUNCTION void narrow(f32 x, f16 &out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
FUNCTION f32 divide_approximately(f32 a, f32 b) { return __fdividef(a, b); }
FUNCTION f32 exp2_approximately(f32 x) {
  f32 power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
// Two numbers, rounded, in one word. The first is in the lower half.
FUNCTION u32 narrow_two(f32 low, f32 high, f16) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#if __CUDA_ARCH__ >= 800
FUNCTION void narrow(f32 x, bf16 &out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
FUNCTION u32 narrow_two(f32 low, f32 high, bf16) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#define HAS_LARGER_TWO
// The larger of each half of two words.
FUNCTION u32 larger_two(u32 a, u32 b, f16) {
  u32 word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
FUNCTION u32 larger_two(u32 a, u32 b, bf16) {
  u32 word;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
#endif
#endif

#if EMULATED || __CUDA_ARCH__ < 800
// To the nearest, ties to even.
FUNCTION void narrow(f32 x, bf16 &out) {
  u32 bits = __float_as_uint(x);
  out.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
FUNCTION u32 narrow_two(f32 low, f32 high, bf16) {
  bf16 halves[2];
  narrow(low, halves[0]);
  narrow(high, halves[1]);
  return halves[0].bits | (u32)halves[1].bits << 16;
}
#endif

// ---- Numbers

FUNCTION f32 widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
// Four bits of exponent, three of mantissa, no infinities.
FUNCTION f32 widen(f8 x) {
  u32 exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  f32 size = exponent == 0 ? mantissa * (1.f / 512) : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
  if ((x.bits & 127) == 127) size = NOT_A_NUMBER;
  return x.bits & 128 ? -size : size;
}
FUNCTION f32 widen(f32 x) { return x; }
FUNCTION f64 widen(f64 x) { return x; }
FUNCTION void narrow(f32 x, f32 &out) { out = x; }
FUNCTION void narrow(f64 x, f64 &out) { out = x; }

// For f32 exp2 of a rounded product, with an error of 2 + |x| ulp.
FUNCTION f32 exponential(f32 x) { return exp2_approximately(x * 1.44269504f); }
FUNCTION f64 exponential(f64 x) { return exp(x); }
// The quotient with an error of 2 ulp, for b from 1 to 2¹²⁶. The quotient by 0 is infinite or NaN.
FUNCTION f32 quotient(f32 a, f32 b) { return divide_approximately(a, b); }
FUNCTION f64 quotient(f64 a, f64 b) { return a / b; }
FUNCTION f32 logarithm(f32 x) { return logf(x); }
FUNCTION f64 logarithm(f64 x) { return log(x); }
FUNCTION f32 hyperbolic_tangent(f32 x) { return tanhf(x); }
FUNCTION f64 hyperbolic_tangent(f64 x) { return tanh(x); }
// Below it tanh x rounds to x.
#define TANH_LINEAR ((Real)(sizeof(Real) == 4 ? 1e-4 : 1e-9))
// The index of a class as a number: its bits, where numbers have fewer digits than indices.
FUNCTION void store_index(u32 index, f32 &out) { out = __uint_as_float(index); }
FUNCTION void store_index(u32 index, f64 &out) { out = index; }
FUNCTION u32 stored_index(f32 x) { return __float_as_uint(x); }
FUNCTION u32 stored_index(f64 x) { return (u32)x; }
// NaN only if both are NaN.
FUNCTION f32 larger(f32 a, f32 b) { return fmaxf(a, b); }
FUNCTION f64 larger(f64 a, f64 b) { return fmax(a, b); }

// ---- Packs of 16 bytes

struct alignas(16) Pack { u32 word[4]; };
#define ZERO_PACK Pack{}

// An address modulo 16.
template <class T> FUNCTION u32 misalignment(const T *from, u64 at) { return (u32)(u64)(from + at) % 16; }
template <class T> FUNCTION Pack load_pack(const T *from) { return *(const Pack *)from; }
template <class T> FUNCTION void store_pack(T *to, Pack pack) { *(Pack *)to = pack; }

// Number i of a pack.
FUNCTION void unpack(const Pack &pack, int i, f8 &out) { out.bits = pack.word[i / 4] >> i % 4 * 8; }
FUNCTION void unpack(const Pack &pack, int i, f16 &out) { out.bits = pack.word[i / 2] >> i % 2 * 16; }
FUNCTION void unpack(const Pack &pack, int i, bf16 &out) { out.bits = pack.word[i / 2] >> i % 2 * 16; }
FUNCTION void unpack(const Pack &pack, int i, f32 &out) { out = __uint_as_float(pack.word[i]); }
FUNCTION void unpack(const Pack &pack, int i, f64 &out) {
  out = __longlong_as_double((i64)((u64)pack.word[2 * i + 1] << 32 | pack.word[2 * i]));
}

// A pack of numbers, rounded to the type of the logits.
template <class T> FUNCTION void pack_as(T, const f32 *x, Pack &pack) {
  for (int i = 0; i < 4; i++) pack.word[i] = narrow_two(x[2 * i], x[2 * i + 1], T{});
}
FUNCTION void pack_as(f32, const f32 *x, Pack &pack) {
  for (int i = 0; i < 4; i++) pack.word[i] = __float_as_uint(x[i]);
}
FUNCTION void pack_as(f64, const f64 *x, Pack &pack) {
  for (int i = 0; i < 2; i++) {
    u64 bits = __double_as_longlong(x[i]);
    pack.word[2 * i] = (u32)bits;
    pack.word[2 * i + 1] = (u32)(bits >> 32);
  }
}
FUNCTION Pack pack_logits(const Real *x) {
  Pack pack;
  pack_as(LOGITS{}, x, pack);
  return pack;
}

#ifdef HAS_LARGER_TWO
// The largest number of `count` packs of a half type.
template <class T> FUNCTION f32 largest_half(const Pack *packs, int count, T type) {
  u32 two = packs[0].word[0];
#pragma unroll
  for (int i = 1; i < 4 * count; i++) two = larger_two(two, packs[i / 4].word[i % 4], type);
  T low = {(u16)two}, high = {(u16)(two >> 16)};
  return fmaxf(widen(low), widen(high));
}
#endif

#include "kernels.inc"

// ---- Entry points

extern "C" {

#define SHARED_MEMORY                        \
  SHARED_ARRAY(Real, shared, SHARED_REALS); \
  SHARED_ARRAY(u32, flag, 1)
#define THREAD_INDICES Threads{threadIdx.x, blockIdx.x, gridDim.x}
#define INPUTS Inputs{targets, class_params, row_weights}
#define OUTPUTS Outputs{out, saved, metrics, predictions}

__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) forward(
    const LOGITS *logits, const TARGETS *targets, const Real *class_params, const u8 *row_weights, Real *split_states, Real *out,
    Real *saved, Real *metrics, u32 *predictions, Scratch *scratch, const __grid_constant__ Params p) {
  SHARED_MEMORY;
  forward_rows<false>(p, THREAD_INDICES, logits, INPUTS, split_states, OUTPUTS, scratch, shared, flag);
}

__global__ void __launch_bounds__(THREADS) forward_strided(
    const LOGITS *logits, const TARGETS *targets, const Real *class_params, const u8 *row_weights, Real *split_states, Real *out,
    Real *saved, Real *metrics, u32 *predictions, Scratch *scratch, const __grid_constant__ Params p) {
  SHARED_MEMORY;
  forward_rows<true>(p, THREAD_INDICES, logits, INPUTS, split_states, OUTPUTS, scratch, shared, flag);
}

__global__ void __launch_bounds__(THREADS) finish(
    const TARGETS *targets, const Real *class_params, const u8 *row_weights, const Real *states, Real *out, Real *saved,
    Real *metrics, u32 *predictions, Scratch *scratch, const __grid_constant__ Params p) {
  SHARED_MEMORY;
  finish_rows(p, THREAD_INDICES, INPUTS, states, OUTPUTS, scratch, shared, flag);
}

__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) backward(
    const LOGITS *logits, const TARGETS *targets, const Real *class_params, const u8 *row_weights, const Real *grad_output,
    const Real *saved, LOGITS *grad_logits, const __grid_constant__ Params p) {
  write_rows<WRITES_PACKS>(p, THREAD_INDICES, logits, INPUTS, grad_output, saved, grad_logits);
}

__global__ void __launch_bounds__(THREADS) backward_strided(
    const LOGITS *logits, const TARGETS *targets, const Real *class_params, const u8 *row_weights, const Real *grad_output,
    const Real *saved, LOGITS *grad_logits, const __grid_constant__ Params p) {
  write_rows<WRITES_STRIDED>(p, THREAD_INDICES, logits, INPUTS, grad_output, saved, grad_logits);
}

__global__ void __launch_bounds__(THREADS) smooth(
    const TARGETS *targets, const Real *class_params, const u8 *row_weights, LOGITS *smoothed,
    const __grid_constant__ Params p) {
  write_rows<WRITES_SMOOTH>(p, THREAD_INDICES, nullptr, INPUTS, nullptr, nullptr, smoothed);
}

}
