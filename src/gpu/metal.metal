// The Metal dialect of the kernels: types, intrinsics and entry points.

#include <metal_stdlib>

typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef ulong u64;
typedef short i16;
typedef int i32;
typedef long i64;
typedef float f32;
// By their bits where Metal has no such type, or has it only on newer devices.
typedef char f8;
typedef half f16;
typedef ushort bf16;
typedef REAL Real;

#define FUNCTION inline
#define DEVICE device
#define SHARED threadgroup
#define THREAD thread
#define CONSTANT constant

// Threads in a threadgroup at most, and threadgroups of a forward that reduces at most.
#define THREADS 256
#define MAX_WARP 64
#define MAX_PARTIALS 4096

// A block is a threadgroup, and a warp a simdgroup.
struct Threads {
  u32 index, count, block, num_blocks, warp;
};

#define INFINITE as_type<f32>(0x7f800000u)
#define NOT_A_NUMBER as_type<f32>(0x7fc00000u)
#ifndef LOWEST
// The lowest finite number.
#define LOWEST as_type<f32>(0xff7fffffu)
#endif

#ifndef SHARED_ARRAY
#define SHARED_ARRAY(type, name, length) threadgroup type name[length]
#endif
#define BLOCK_BARRIER() \
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device)
#define SHUFFLE_XOR(value, by) metal::simd_shuffle_xor(value, (ushort)(by))
// Metal orders memory between threadgroups only since version 3.2, so a launch of its own reduces their partial sums.
#define JOINS_BLOCKS 0

// ---- Numbers

FUNCTION f32 widen(f16 x) { return (f32)x; }
FUNCTION void narrow(f32 x, thread f16 &out) { out = half(x); }
FUNCTION f32 widen(bf16 x) { return as_type<f32>((u32)x << 16); }
// To the nearest, ties to even.
FUNCTION void narrow(f32 x, thread bf16 &out) {
  u32 bits = as_type<u32>(x);
  out = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
// Four bits of exponent, three of mantissa, no infinities.
FUNCTION f32 widen(f8 x) {
  u32 bits = (u8)x, exponent = bits >> 3 & 15, mantissa = bits & 7;
  f32 size = exponent == 0 ? mantissa * (1.f / 512) : as_type<f32>((exponent + 120) << 23 | mantissa << 20);
  if ((bits & 127) == 127) size = NOT_A_NUMBER;
  return bits & 128 ? -size : size;
}
FUNCTION f32 widen(f32 x) { return x; }
FUNCTION void narrow(f32 x, thread f32 &out) { out = x; }

FUNCTION Real exponential(Real x) { return metal::exp(x); }
FUNCTION Real quotient(Real a, Real b) { return a / b; }
FUNCTION Real logarithm(Real x) { return metal::log(x); }
FUNCTION Real hyperbolic_tangent(Real x) { return metal::tanh(x); }
// Below it tanh x rounds to x.
#define TANH_LINEAR ((Real)(sizeof(Real) == 4 ? 1e-4f : 1e-9f))
// The index of a class as a number: its bits, because f32 has fewer digits than indices.
FUNCTION void store_index(u32 index, thread f32 &out) { out = as_type<f32>(index); }
FUNCTION u32 stored_index(f32 x) { return as_type<u32>(x); }
// NaN only if both are NaN.
FUNCTION Real larger(Real a, Real b) { return metal::fmax(a, b); }

// ---- Packs of 16 bytes

typedef uint4 Pack;
#define ZERO_PACK Pack{0, 0, 0, 0}

// An address modulo 16. All buffers begin at a multiple of 16.
template <class T> FUNCTION u32 misalignment(device const T *, u64 at) { return (u32)(at * sizeof(T)) % 16; }
template <class T> FUNCTION Pack load_pack(device const T *from) { return *(device const Pack *)from; }
template <class T> FUNCTION void store_pack(device T *to, Pack pack) { *(device Pack *)to = pack; }

// Number i of a pack.
FUNCTION void unpack(Pack pack, int i, thread f8 &out) { out = (f8)(pack[i / 4] >> i % 4 * 8); }
FUNCTION void unpack(Pack pack, int i, thread bf16 &out) { out = pack[i / 2] >> i % 2 * 16; }
FUNCTION void unpack(Pack pack, int i, thread f16 &out) { out = as_type<half>((ushort)(pack[i / 2] >> i % 2 * 16)); }
FUNCTION void unpack(Pack pack, int i, thread f32 &out) { out = as_type<f32>(pack[i]); }

// Sets number i of a pack that is zero there.
FUNCTION void set_packed(thread Pack &pack, int i, f32 x) { pack[i] = as_type<u32>(x); }
FUNCTION void set_packed(thread Pack &pack, int i, bf16 x) { pack[i / 2] |= (u32)x << i % 2 * 16; }
FUNCTION void set_packed(thread Pack &pack, int i, f16 x) { pack[i / 2] |= (u32)as_type<ushort>(x) << i % 2 * 16; }

// A pack of numbers, rounded to the type of the logits.
FUNCTION Pack pack_logits(thread const Real *x) {
  Pack pack = ZERO_PACK;
  for (int i = 0; i < 16 / (int)sizeof(LOGITS); i++) {
    LOGITS narrowed;
    narrow(x[i], narrowed);
    set_packed(pack, i, narrowed);
  }
  return pack;
}

#include "kernels.inc"

// ---- Entry points

#define THREAD_ARGUMENTS                                                                                     \
  u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],                          \
  u32 block [[threadgroup_position_in_grid]], u32 num_blocks [[threadgroups_per_grid]],                      \
  u32 warp [[threads_per_simdgroup]]
#define THREAD_INDICES Threads{index, count, block, num_blocks, warp}
#define INPUTS Inputs{targets, class_params, row_weights}
#define OUTPUTS Outputs{out, saved, metrics, predictions}
#define SHARED_MEMORY                        \
  SHARED_ARRAY(Real, shared, SHARED_REALS); \
  SHARED_ARRAY(u32, flag, 1)

kernel void forward(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *class_params [[buffer(2)]],
    device const u8 *row_weights [[buffer(3)]],
    device Real *split_states [[buffer(4)]],
    device Real *out [[buffer(5)]],
    device Real *saved [[buffer(6)]],
    device Real *metrics [[buffer(7)]],
    device u32 *predictions [[buffer(8)]],
    device Scratch *scratch [[buffer(9)]],
    constant Params &p [[buffer(10)]],
    THREAD_ARGUMENTS) {
  SHARED_MEMORY;
  forward_rows<false>(p, THREAD_INDICES, logits, INPUTS, split_states, OUTPUTS, scratch, shared, flag);
}

kernel void forward_strided(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *class_params [[buffer(2)]],
    device const u8 *row_weights [[buffer(3)]],
    device Real *split_states [[buffer(4)]],
    device Real *out [[buffer(5)]],
    device Real *saved [[buffer(6)]],
    device Real *metrics [[buffer(7)]],
    device u32 *predictions [[buffer(8)]],
    device Scratch *scratch [[buffer(9)]],
    constant Params &p [[buffer(10)]],
    THREAD_ARGUMENTS) {
  SHARED_MEMORY;
  forward_rows<true>(p, THREAD_INDICES, logits, INPUTS, split_states, OUTPUTS, scratch, shared, flag);
}

kernel void finish(
    device const TARGETS *targets [[buffer(0)]],
    device const Real *class_params [[buffer(1)]],
    device const u8 *row_weights [[buffer(2)]],
    device const Real *states [[buffer(3)]],
    device Real *out [[buffer(4)]],
    device Real *saved [[buffer(5)]],
    device Real *metrics [[buffer(6)]],
    device u32 *predictions [[buffer(7)]],
    device Scratch *scratch [[buffer(8)]],
    constant Params &p [[buffer(9)]],
    THREAD_ARGUMENTS) {
  SHARED_MEMORY;
  finish_rows(p, THREAD_INDICES, INPUTS, states, OUTPUTS, scratch, shared, flag);
}

// The reduced loss from the partial sums of the blocks of `forward` or `finish`, by one threadgroup.
kernel void reduce(
    device Real *out [[buffer(0)]],
    device Real *saved [[buffer(1)]],
    device const Scratch *scratch [[buffer(2)]],
    constant Params &p [[buffer(3)]],
    THREAD_ARGUMENTS) {
  SHARED_ARRAY(Real, shared, SHARED_REALS);
  reduce_partials(p, THREAD_INDICES, p.num_partials, scratch, Outputs{out, saved, nullptr, nullptr}, shared);
}

kernel void backward(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *class_params [[buffer(2)]],
    device const u8 *row_weights [[buffer(3)]],
    device const Real *grad_output [[buffer(4)]],
    device const Real *saved [[buffer(5)]],
    device LOGITS *grad_logits [[buffer(6)]],
    constant Params &p [[buffer(7)]],
    THREAD_ARGUMENTS) {
  write_rows<WRITES_PACKS>(p, THREAD_INDICES, logits, INPUTS, grad_output, saved, grad_logits);
}

kernel void backward_strided(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *class_params [[buffer(2)]],
    device const u8 *row_weights [[buffer(3)]],
    device const Real *grad_output [[buffer(4)]],
    device const Real *saved [[buffer(5)]],
    device LOGITS *grad_logits [[buffer(6)]],
    constant Params &p [[buffer(7)]],
    THREAD_ARGUMENTS) {
  write_rows<WRITES_STRIDED>(p, THREAD_INDICES, logits, INPUTS, grad_output, saved, grad_logits);
}

kernel void smooth(
    device const TARGETS *targets [[buffer(0)]],
    device const Real *class_params [[buffer(1)]],
    device const u8 *row_weights [[buffer(2)]],
    device LOGITS *smoothed [[buffer(3)]],
    constant Params &p [[buffer(4)]],
    THREAD_ARGUMENTS) {
  write_rows<WRITES_SMOOTH>(p, THREAD_INDICES, nullptr, INPUTS, nullptr, nullptr, smoothed);
}
