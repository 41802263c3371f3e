// Cross-entropy with label smoothing: the loss, its gradient, and smoothed targets.
//
//   r_k  = own_k if k = y, else spread_k          class targets
//   r_k  = scale_k · p_k + spread_k               probabilities
//   S    = Σ_k r_k
//   loss = Σ_k r_k·(lse − x_k) + z·lse²           lse = logsumexp(x)
//   ∂loss/∂x_k = softmax_k·(S + 2·z·lse) − r_k
//
// Compiled when first needed, for the device at hand and for one kind of input:
//   LOGITS         f16, bf16 or f32
//   REAL           the type of the arithmetic: f32
//   TARGETS        u8, u32, i16, i32 or i64: class indices; f8, f16, bf16 or f32: probabilities
//   CLASS_TARGETS  1 for class indices, 0 for probabilities
//   PER_CLASS      1 if the coefficients differ from class to class, 0 if not
//
// Several lanes, neighbouring threads, share a row and take its classes in turn. Where it is the rows of
// a class that lie next to each other in memory, neighbouring threads have neighbouring rows instead.

#include <metal_stdlib>

typedef uchar u8;
typedef uint u32;
typedef ulong u64;
typedef short i16;
typedef int i32;
typedef long i64;
typedef float f32;
typedef REAL Real;

// ---- What the host hands over, laid out as `gpu.rs` has it.

#define DIMS 16

// The rows of a tensor and the classes of a row, in elements.
struct View {
  u64 start;
  u64 class_stride;
  u64 rank;
  u64 lengths[DIMS];
  u64 strides[DIMS];
};

struct Params {
  View logits, targets, upstream;
  u64 num_rows;
  // Of the whole row; the logits hold `range` of them, from `first_class` on.
  u64 num_classes, first_class, range;
  // Between one class of the gradient and the next.
  u64 positions;
  // How many classes a block takes, and how many blocks share a row.
  u64 segment, segments;
  // A row's parts in memory.
  u64 num_parts;
  i64 ignore_index;
  u32 ignores, along_rows, lanes;
  // Which results are asked for: parts or else losses; rows' weights; statistics.
  u32 wants_parts, wants_weights, wants_statistics;
  // Whether the parts in memory are of earlier ranges of the classes, for these to be merged into.
  u32 continues;
  // Whether the gradient takes the logits' place.
  u32 in_place;
  Real scale, spread, own, weight, z_loss;
};

struct Reduction {
  u64 len;
  // The rows of one block.
  u64 piece;
  // Whether there are weights to add up, and whether the sum is divided by theirs.
  u32 weighted, divides;
  // What it is divided by otherwise.
  Real divisor;
  // Powers of two: what the losses are multiplied by, so that their sum is in range where their mean is,
  // and what undoes it.
  Real scale, unscale;
};

// ---- Numbers

#define INFINITE as_type<f32>(0x7f800000u)
#define NOT_A_NUMBER as_type<f32>(0x7fc00000u)

// By their bits where there is no such type, or not on every device.
typedef char f8;
typedef half f16;
typedef ushort bf16;

inline f32 widen(f16 x) { return (f32)x; }
inline void narrow(f32 x, thread f16 &out) { out = half(x); }
inline f32 widen(bf16 x) { return as_type<f32>((u32)x << 16); }
// To the nearest, ties to even.
inline void narrow(f32 x, thread bf16 &out) {
  u32 bits = as_type<u32>(x);
  out = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
// Four bits of exponent, three of mantissa, no infinities.
inline f32 widen(f8 x) {
  u32 bits = (u8)x, exponent = bits >> 3 & 15, mantissa = bits & 7;
  f32 size = exponent == 0 ? mantissa * (1.f / 512)
                           : as_type<f32>((exponent + 120) << 23 | mantissa << 20);
  if ((bits & 127) == 127) size = NOT_A_NUMBER;
  return bits & 128 ? -size : size;
}
inline f32 widen(f32 x) { return x; }
inline void narrow(f32 x, thread f32 &out) { out = x; }

// Number i of a pack, which is read and written as a whole.
inline void unpack(uint4 pack, int i, thread f32 &out) { out = as_type<f32>(pack[i]); }
inline void unpack(uint4 pack, int i, thread bf16 &out) { out = pack[i / 2] >> i % 2 * 16; }
inline void unpack(uint4 pack, int i, thread f16 &out) {
  out = as_type<half>((ushort)(pack[i / 2] >> i % 2 * 16));
}
// The pack is all zeros there.
inline void pack(thread uint4 &pack, int i, f32 x) { pack[i] = as_type<u32>(x); }
inline void pack(thread uint4 &pack, int i, bf16 x) { pack[i / 2] |= (u32)x << i % 2 * 16; }
inline void pack(thread uint4 &pack, int i, f16 x) {
  pack[i / 2] |= (u32)as_type<ushort>(x) << i % 2 * 16;
}

inline Real exponential(Real x) { return metal::exp(x); }
inline Real logarithm(Real x) { return metal::log(x); }

// NaN is passed over; it enters through the exponential.
inline Real larger(Real a, Real b) { return metal::fmax(a, b); }

// 0·∞ is 0 here: what has no weight has no say.
inline Real weigh(Real r, Real x) { return r == 0 ? 0 : r * x; }

// ---- Memory

// Logits of 16 bytes.
#define PACK (16 / (int)sizeof(LOGITS))
// Packs, or single values, that a thread has on their way at once: the loads come before whatever needs
// them, or the memory would idle.
#define PACKS (16 / PACK)
#define SINGLES 8
#define THREADS 256

// All memory begins at a multiple of 16 bytes, so a place in it says whether a pack can begin there.
inline bool is_aligned(u64 at) { return at % PACK == 0; }

// How many values come before the first whole pack.
inline u64 head(u64 at) { return (PACK - at % PACK) % PACK; }

// N packs, `step` apart, each in one piece.
template <int N>
inline void load_packs(thread Real *out, device const LOGITS *from, u64 at, u64 step) {
  uint4 packs[N];
#pragma unroll
  for (int u = 0; u < N; u++) packs[u] = *(device const uint4 *)(from + at + u * step);
#pragma unroll
  for (int u = 0; u < N; u++) {
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      LOGITS x;
      unpack(packs[u], i, x);
      out[u * PACK + i] = widen(x);
    }
  }
}

// A pack at a stride.
template <class T>
inline void load(thread Real *out, device const T *from, u64 at, u64 stride) {
  for (int i = 0; i < PACK; i++) out[i] = widen(from[at + i * stride]);
}

inline void fill(thread Real *out, Real value) {
  for (int i = 0; i < PACK; i++) out[i] = value;
}

inline void store(device LOGITS *to, u64 at, thread const Real *in) {
  uint4 values = {0, 0, 0, 0};
  for (int i = 0; i < PACK; i++) {
    LOGITS x;
    narrow(in[i], x);
    pack(values, i, x);
  }
  *(device uint4 *)(to + at) = values;
}

inline u64 offset(constant View &view, u64 row) {
  u64 offset = view.start;
  for (u64 dim = view.rank - 1; dim > 0; dim--) {
    offset += row % view.lengths[dim] * view.strides[dim];
    row /= view.lengths[dim];
  }
  return offset + row * view.strides[0];
}

// ---- Targets

struct Row {
  device const TARGETS *targets;
  // Where those of the row begin.
  u64 at;
  i64 label;
  Real own, weight;
  // Left out, or no class at all: checked before anything is read by it.
  bool ignored, bad;
};

inline Row row_of(constant Params &p, device const TARGETS *targets, device const Real *table, u64 row) {
  u64 at = offset(p.targets, row);
#if CLASS_TARGETS
  Row of = {targets, at, (i64)targets[at], NOT_A_NUMBER, 0, false, false};
  of.ignored = p.ignores && of.label == p.ignore_index;
  of.bad = !of.ignored && (of.label < 0 || (u64)of.label >= p.num_classes);
  if (!of.ignored && !of.bad) {
    of.own = PER_CLASS ? table[2 * p.num_classes + of.label] : p.own;
    of.weight = PER_CLASS ? table[3 * p.num_classes + of.label] : p.weight;
  }
  return of;
#else
  return {targets, at + p.first_class * p.targets.class_stride, -1, 0, 1, false, false};
#endif
}

// The coefficient r of a class, counted from the first of the range.
inline Real coefficient(constant Params &p, thread const Row &row, device const Real *table, u64 k) {
  u64 of_all = p.first_class + k;
  Real spread = PER_CLASS ? table[p.num_classes + of_all] : p.spread;
#if CLASS_TARGETS
  return row.label == (i64)of_all ? row.own : spread;
#else
  Real scale = PER_CLASS ? table[of_all] : p.scale;
  return scale * (Real)widen(row.targets[row.at + k * p.targets.class_stride]) + spread;
#endif
}

// Whether the label is among a pack's classes: the place to look for other coefficients than `spread`.
inline bool holds_label(constant Params &p, thread const Row &row, u64 k) {
  return (u64)row.label - (p.first_class + k) < PACK;
}

// The coefficients of a pack.
inline void coefficients(
    thread Real *r, constant Params &p, thread const Row &row, device const Real *table, u64 k) {
  u64 of_all = p.first_class + k;
  Real spread[PACK];
  if (PER_CLASS) {
    load(spread, table, p.num_classes + of_all, 1);
  } else {
    fill(spread, p.spread);
  }
#if CLASS_TARGETS
  u64 here = (u64)row.label - of_all;
  int own = here < PACK ? (int)here : -1;
  for (int i = 0; i < PACK; i++) r[i] = i == own ? row.own : spread[i];
#else
  Real scale[PACK];
  if (PER_CLASS) {
    load(scale, table, of_all, 1);
  } else {
    fill(scale, p.scale);
  }
  load(r, row.targets, row.at + k * p.targets.class_stride, p.targets.class_stride);
  for (int i = 0; i < PACK; i++) r[i] = scale[i] * r[i] + spread[i];
#endif
}

// ---- Rows and threads

// What a thread is told of itself and of the others.
struct Threads {
  // Within the block: its index, and how many there are.
  u32 index, count;
  // The block and how many there are.
  u32 block, blocks;
  // How many exchange values directly.
  u32 warp;
};

// Which row of which task a thread works on.
struct Place {
  // Within the block.
  u32 row, lane, rows, warp;
};

inline Place place_of(constant Params &p, Threads threads) {
  u32 rows = threads.count / p.lanes;
  u32 row = p.along_rows ? threads.index % rows : threads.index / p.lanes;
  u32 lane = p.along_rows ? threads.index / rows : threads.index % p.lanes;
  return {row, lane, rows, threads.warp};
}

inline u64 num_tasks(constant Params &p, thread const Place &place) {
  return (p.num_rows + place.rows - 1) / place.rows * p.segments;
}

// ---- Forward

// What some classes say of their row: max x, Σ exp(x − max), Σ r, and Σ r·(x − max), which a common
// offset of the logits does not enter.
struct Partial {
  Real max, sum, total, shortfall;
};

// What the logits are relative to: −∞ − −∞ would be NaN.
inline Real base(Real max) { return max == -INFINITE ? 0 : max; }

inline Partial none() { return {-INFINITE, 0, 0, 0}; }

// `part` relative to a larger maximum.
inline Partial moved(Partial part, Real max) {
  Real by = part.max - base(max);
  return {max, part.sum * exponential(by), part.total, part.shortfall + weigh(part.total, by)};
}

inline Partial merged(Partial a, Partial b) {
  Real max = larger(a.max, b.max);
  a = moved(a, max);
  b = moved(b, max);
  return {max, a.sum + b.sum, a.total + b.total, a.shortfall + b.shortfall};
}

// Adds N classes; those that are not there are −∞ with a coefficient of 0. If all coefficients are the
// same, there is but one. The classes are added up on their own first: fewer roundings.
template <int N, bool EQUAL>
inline void add(thread Partial &part, thread const Real *x, thread const Real *r) {
  Real max = part.max;
#pragma unroll
  for (int i = 0; i < N; i++) max = larger(x[i], max);
  Real origin = base(max), sum = 0, total = 0, shortfall = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    Real distance = x[i] - origin;
    sum += exponential(distance);
    if (!EQUAL) total += r[i];
    shortfall += EQUAL ? r[0] * distance : weigh(r[i], distance);
  }
  part = moved(part, max);
  part.sum += sum;
  part.total += EQUAL ? N * r[0] : total;
  part.shortfall += EQUAL && r[0] == 0 ? 0 : shortfall;
}

// Adds N packs of classes, `step` apart.
template <int N>
inline void add_packs(
    thread Partial &part, constant Params &p, thread const Row &row, device const LOGITS *logits, u64 x, device const Real *table,
    u64 k, u64 step) {
  Real values[N * PACK];
  load_packs<N>(values, logits, x + k, step);
  bool equal = CLASS_TARGETS && !PER_CLASS;
#pragma unroll
  for (int u = 0; u < N; u++) equal = equal && !holds_label(p, row, k + u * step);
  if (equal) {
    Real r = p.spread;
    add<N * PACK, true>(part, values, &r);
  } else {
    Real r[N * PACK];
#pragma unroll
    for (int u = 0; u < N; u++) coefficients(r + u * PACK, p, row, table, k + u * step);
    add<N * PACK, false>(part, values, r);
  }
}

// Adds a lane's share of the classes, one at a time.
inline void add_singles(
    thread Partial &part, constant Params &p, thread const Row &row, device const LOGITS *logits, u64 x, device const Real *table,
    u64 from, u64 to, u32 lane) {
  for (u64 first = from + lane; first < to; first += SINGLES * p.lanes) {
    Real values[SINGLES], r[SINGLES];
#pragma unroll
    for (int i = 0; i < SINGLES; i++) {
      u64 k = first + i * p.lanes;
      values[i] = k < to ? (Real)widen(logits[x + k * p.logits.class_stride]) : -INFINITE;
      r[i] = k < to ? coefficient(p, row, table, k) : 0;
    }
    add<SINGLES, false>(part, values, r);
  }
}

// The same in packs, as far as there are whole ones.
inline Partial sums(
    constant Params &p, thread const Row &row, device const LOGITS *logits, u64 x, device const Real *table, u64 from,
    u64 to, u32 lane) {
  Partial part = none();
  u64 body = from, end = from;
  if (p.logits.class_stride == 1 && !p.along_rows) {
    body = metal::min(to, from + head(x + from));
    end = body + (to - body) / PACK * PACK;
  }
  u64 step = PACK * p.lanes, k = body + PACK * lane;
  for (; k + (PACKS - 1) * step < end; k += PACKS * step) {
    add_packs<PACKS>(part, p, row, logits, x, table, k, step);
  }
  for (; k < end; k += step) add_packs<1>(part, p, row, logits, x, table, k, step);
  add_singles(part, p, row, logits, x, table, from, body, lane);
  add_singles(part, p, row, logits, x, table, end, to, lane);
  return part;
}

// Merges what the lanes of a row have found. The row's lane 0 gets the whole.
inline Partial merged_lanes(
    constant Params &p, thread const Place &place, threadgroup Real (*slots)[THREADS], Partial part) {
  u32 width = p.along_rows ? 1 : metal::min(p.lanes, place.warp);
  for (ushort by = width / 2; by > 0; by /= 2) {
    Partial other = {
        metal::simd_shuffle_xor(part.max, by), metal::simd_shuffle_xor(part.sum, by),
        metal::simd_shuffle_xor(part.total, by), metal::simd_shuffle_xor(part.shortfall, by)};
    part = merged(part, other);
  }
  u32 num_slots = p.lanes / width;
  if (num_slots > 1) {
    if (place.lane % width == 0) {
      u32 slot = place.lane / width * place.rows + place.row;
      slots[0][slot] = part.max;
      slots[1][slot] = part.sum;
      slots[2][slot] = part.total;
      slots[3][slot] = part.shortfall;
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (place.lane == 0) {
      for (u32 i = 1; i < num_slots; i++) {
        u32 slot = i * place.rows + place.row;
        part = merged(part, {slots[0][slot], slots[1][slot], slots[2][slot], slots[3][slot]});
      }
    }
    // Before another task writes there.
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  return part;
}

// A row's results from the whole of its classes.
inline void finish_row(
    constant Params &p, thread const Row &of, u64 row, Partial whole, device Real *losses, device Real *weights,
    device Real *statistics) {
  Real log_sum = logarithm(whole.sum);
  Real lse = whole.max + log_sum;
  // From the left: without z-loss an overflowing square must not become 0·∞.
  Real loss = whole.total * log_sum - whole.shortfall + p.z_loss * lse * lse;
  losses[row] = of.ignored ? 0 : of.bad ? (Real)NOT_A_NUMBER : loss;
  if (p.wants_weights) weights[row] = of.weight;
  if (p.wants_statistics) {
    statistics[row] = whole.max;
    statistics[p.num_rows + row] = whole.sum;
    statistics[2 * p.num_rows + row] = whole.total;
  }
}

// Four numbers for each part and row, those of neighbouring rows next to each other.
inline u64 part_of(constant Params &p, u64 part, u64 row) {
  return 4 * part * p.num_rows + row;
}

inline Partial kept(constant Params &p, device const Real *parts, u64 part, u64 row) {
  device const Real *at = parts + part_of(p, part, row);
  return {at[0], at[p.num_rows], at[2 * p.num_rows], at[3 * p.num_rows]};
}

inline void keep(constant Params &p, device Real *parts, u64 part, u64 row, Partial found) {
  if (p.continues) found = merged(kept(p, parts, part, row), found);
  device Real *at = parts + part_of(p, part, row);
  at[0] = found.max;
  at[p.num_rows] = found.sum;
  at[2 * p.num_rows] = found.total;
  at[3 * p.num_rows] = found.shortfall;
}

// A sum and what was lost when it was rounded: of a million losses it would be half the digits.
struct Sum {
  Real high, low;
};

inline Sum plus(Sum sum, Real x) {
  Real high = sum.high + x;
  Real added = high - sum.high;
  return {high, sum.low + ((sum.high - (high - added)) + (x - added))};
}

inline Sum plus(Sum a, Sum b) {
  Sum sum = plus(a, b.high);
  return {sum.high, sum.low + b.low};
}

// Of an infinite sum nothing can be lost.
inline Real rounded(Sum sum) {
  return sum.low == sum.low ? sum.high + sum.low : sum.high;
}

// Every row's loss; or parts of each row, if several blocks share it or the classes are but a range of all.
kernel void forward(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *table [[buffer(2)]],
    device Real *parts [[buffer(3)]],
    device Real *losses [[buffer(4)]],
    device Real *weights [[buffer(5)]],
    device Real *statistics [[buffer(6)]],
    constant Params &p [[buffer(7)]],
    u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],
    u32 block [[threadgroup_position_in_grid]], u32 blocks [[threadgroups_per_grid]],
    u32 warp [[threads_per_simdgroup]]) {
  threadgroup Real slots[4][THREADS];
  Threads threads = {index, count, block, blocks, warp};
  Place place = place_of(p, threads);
  for (u64 task = threads.block; task < num_tasks(p, place); task += threads.blocks) {
    u64 row = task / p.segments * place.rows + place.row;
    u64 segment = task % p.segments;
    bool is_here = row < p.num_rows;
    Row of = row_of(p, targets, table, is_here ? row : 0);
    Partial part = none();
    if (is_here && !of.ignored) {
      u64 x = offset(p.logits, row), from = segment * p.segment;
      part = sums(p, of, logits, x, table, from, metal::min(p.range, from + p.segment), place.lane);
    }
    part = merged_lanes(p, place, slots, part);
    if (is_here && place.lane == 0) {
      if (p.wants_parts) {
        keep(p, parts, segment, row, part);
      } else {
        finish_row(p, of, row, part, losses, weights, statistics);
      }
    }
  }
}

// The same from the parts of each row, which its lanes share: its loss, or one part of all.
kernel void finish(
    device const TARGETS *targets [[buffer(0)]],
    device const Real *table [[buffer(1)]],
    device const Real *parts [[buffer(2)]],
    device Real *all_parts [[buffer(3)]],
    device Real *losses [[buffer(4)]],
    device Real *weights [[buffer(5)]],
    device Real *statistics [[buffer(6)]],
    constant Params &p [[buffer(7)]],
    u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],
    u32 block [[threadgroup_position_in_grid]], u32 blocks [[threadgroups_per_grid]],
    u32 warp [[threads_per_simdgroup]]) {
  threadgroup Real slots[4][THREADS];
  Threads threads = {index, count, block, blocks, warp};
  Place place = place_of(p, threads);
  for (u64 task = threads.block; task < num_tasks(p, place); task += threads.blocks) {
    u64 row = task * place.rows + place.row;
    bool is_here = row < p.num_rows;
    Partial whole = none();
    for (u64 part = place.lane; is_here && part < p.num_parts; part += p.lanes) {
      whole = merged(whole, kept(p, parts, part, row));
    }
    whole = merged_lanes(p, place, slots, whole);
    if (is_here && place.lane == 0) {
      if (p.wants_parts) {
        keep(p, all_parts, 0, row, whole);
      } else {
        finish_row(p, row_of(p, targets, table, row), row, whole, losses, weights, statistics);
      }
    }
  }
}

// The sum of the losses, divided, and what it was divided by; or the sums of the losses and weights of
// each block's piece, for the next launch.
kernel void reduce(
    device const Real *losses [[buffer(0)]],
    device const Real *weights [[buffer(1)]],
    device Real *out [[buffer(2)]],
    device Real *out_weights [[buffer(3)]],
    constant Reduction &p [[buffer(4)]],
    u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],
    u32 block [[threadgroup_position_in_grid]], u32 blocks [[threadgroups_per_grid]],
    u32 warp [[threads_per_simdgroup]]) {
  threadgroup Real high[2][THREADS];
  threadgroup Real low[2][THREADS];
  Sum loss = {0, 0}, weight = {0, 0};
  u64 from = block * p.piece, to = metal::min(p.len, from + p.piece);
  for (u64 i = from + index; i < to; i += count) {
    loss = plus(loss, losses[i] * p.scale);
    if (p.weighted) weight = plus(weight, weights[i]);
  }
  high[0][index] = loss.high;
  low[0][index] = loss.low;
  high[1][index] = weight.high;
  low[1][index] = weight.low;
  for (u32 half_of = count / 2; half_of > 0; half_of /= 2) {
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (index < half_of) {
      for (int i = 0; i < 2; i++) {
        Sum sum = {high[i][index], low[i][index]};
        Sum other = {high[i][index + half_of], low[i][index + half_of]};
        sum = plus(sum, other);
        high[i][index] = sum.high;
        low[i][index] = sum.low;
      }
    }
  }
  if (index == 0) {
    loss = {high[0][0], low[0][0]};
    weight = {high[1][0], low[1][0]};
    Real divisor = p.weighted ? rounded(weight) : p.divisor;
    Real sum = rounded(loss);
    out[block] = p.divides ? sum / divisor * p.unscale : sum;
    if (p.weighted) out_weights[block] = divisor;
  }
}

// ---- Backward, and smoothed targets

// What is written of a row: exp(x − max)·scale + r·against.
struct RowGradient {
  Real max, scale, against;
};

inline RowGradient gradient_of(
    constant Params &p, thread const Row &of, device const Real *upstream, device const Real *statistics, u64 row) {
  Real max = statistics[row], sum = statistics[p.num_rows + row];
  Real pull = statistics[2 * p.num_rows + row];
  Real grad = of.bad ? (Real)NOT_A_NUMBER : upstream[offset(p.upstream, row)];
  if (p.z_loss != 0) pull += p.z_loss * (2 * (max + logarithm(sum)));
  return {max, grad * pull / sum, -grad};
}

template <bool SMOOTH> inline Real value(thread const RowGradient &of, Real x, Real r) {
  Real of_target = r * of.against;
  return SMOOTH ? of_target : exponential(x - of.max) * of.scale + of_target;
}

// Writes N packs, `step` apart. The logits can be read in packs too, or else one by one.
template <bool SMOOTH, bool PACKED, int N>
inline void write_packs(
    constant Params &p, thread const Row &of, thread const RowGradient &gradient, device const LOGITS *logits, u64 x,
    device const Real *table, device LOGITS *out, u64 line, u64 k, u64 step) {
  Real values[N * PACK] = {};
  if (!SMOOTH && !of.ignored) {
    if (PACKED) {
      load_packs<N>(values, logits, x + k, step);
    } else {
      u64 stride = p.logits.class_stride;
#pragma unroll
      for (int u = 0; u < N; u++) {
        load(values + u * PACK, logits, x + (k + u * step) * stride, stride);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < N; u++) {
    thread Real *these = values + u * PACK;
    if (!of.ignored) {
      Real r[PACK];
      coefficients(r, p, of, table, k + u * step);
      for (int i = 0; i < PACK; i++) these[i] = value<SMOOTH>(gradient, these[i], r[i]);
    }
    store(out, line + k + u * step, these);
  }
}

// Writes a lane's share of the packs of a row.
template <bool SMOOTH, bool PACKED>
inline void write_row(
    constant Params &p, thread const Row &of, thread const RowGradient &gradient, device const LOGITS *logits, u64 x,
    device const Real *table, device LOGITS *out, u64 line, u64 from, u64 to, u32 lane) {
  u64 step = PACK * p.lanes, k = from + PACK * lane;
  for (; k + (PACKS - 1) * step < to; k += PACKS * step) {
    write_packs<SMOOTH, PACKED, PACKS>(p, of, gradient, logits, x, table, out, line, k, step);
  }
  for (; k < to; k += step) {
    write_packs<SMOOTH, PACKED, 1>(p, of, gradient, logits, x, table, out, line, k, step);
  }
}

// Writes the gradient of all rows, or their coefficients, a segment of a row's classes at a time.
template <bool SMOOTH>
inline void write_rows(
    device const LOGITS *logits, device const TARGETS *targets, device const Real *table, device const Real *upstream,
    device const Real *statistics, device LOGITS *out, constant Params &p, Threads threads) {
  Place place = place_of(p, threads);
  for (u64 task = threads.block; task < num_tasks(p, place); task += threads.blocks) {
    u64 row = task / p.segments * place.rows + place.row;
    if (row >= p.num_rows) continue;
    u64 from = task % p.segments * p.segment, to = metal::min(p.range, from + p.segment);
    Row of = row_of(p, targets, table, row);
    u64 x = 0;
    RowGradient gradient = {0, 0, of.bad ? (Real)NOT_A_NUMBER : 1};
    if (!SMOOTH) {
      x = offset(p.logits, row);
      gradient = gradient_of(p, of, upstream, statistics, row);
    }
    u64 outer = p.positions == 1 ? row : row / p.positions;
    u64 line = outer * p.positions * p.range + (row - outer * p.positions);

    u64 stride = p.logits.class_stride, body = from, end = from;
    if (p.positions == 1 && !p.along_rows) {
      body = metal::min(to, from + head(line + from));
      end = body + (to - body) / PACK * PACK;
      if (SMOOTH || (stride == 1 && is_aligned(x + body))) {
        write_row<SMOOTH, true>(
            p, of, gradient, logits, x, table, out, line, body, end, place.lane);
      } else {
        write_row<SMOOTH, false>(
            p, of, gradient, logits, x, table, out, line, body, end, place.lane);
      }
    }
    // What comes before and after whole packs.
    u64 rest = to - from - (end - body);
    for (u64 i = place.lane; i < rest; i += p.lanes) {
      u64 k = from + i < body ? from + i : end + i - (body - from);
      Real written = 0;
      if (!of.ignored) {
        Real x_k = SMOOTH ? 0 : (Real)widen(logits[x + k * stride]);
        written = value<SMOOTH>(gradient, x_k, coefficient(p, of, table, k));
      }
      LOGITS rounded;
      narrow(written, rounded);
      out[line + k * p.positions] = rounded;
    }
  }
}

// The gradient of the logits, contiguous, as they are if it takes their place: whoever writes an element has
// read it.
kernel void backward(
    device const LOGITS *logits [[buffer(0)]],
    device const TARGETS *targets [[buffer(1)]],
    device const Real *table [[buffer(2)]],
    device const Real *upstream [[buffer(3)]],
    device const Real *statistics [[buffer(4)]],
    device LOGITS *gradient [[buffer(5)]],
    constant Params &p [[buffer(6)]],
    u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],
    u32 block [[threadgroup_position_in_grid]], u32 blocks [[threadgroups_per_grid]],
    u32 warp [[threads_per_simdgroup]]) {
  Threads threads = {index, count, block, blocks, warp};
  device const LOGITS *from = p.in_place ? gradient : logits;
  write_rows<false>(from, targets, table, upstream, statistics, gradient, p, threads);
}

// The coefficients of all classes themselves.
kernel void smooth(
    device const TARGETS *targets [[buffer(0)]],
    device const Real *table [[buffer(1)]],
    device LOGITS *soft [[buffer(2)]],
    constant Params &p [[buffer(3)]],
    u32 index [[thread_index_in_threadgroup]], u32 count [[threads_per_threadgroup]],
    u32 block [[threadgroup_position_in_grid]], u32 blocks [[threadgroups_per_grid]],
    u32 warp [[threads_per_simdgroup]]) {
  Threads threads = {index, count, block, blocks, warp};
  write_rows<true>(soft, targets, table, nullptr, nullptr, soft, p, threads);
}
