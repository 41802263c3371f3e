// Cross-entropy with label smoothing: the loss, its gradient, and smoothed targets.
//
//   r_k  = own_k if k = y, else spread_k          class targets
//   r_k  = scale_k · p_k + spread_k               probabilities
//   S    = Σ_k r_k
//   loss = Σ_k r_k·(lse − x_k) + z·lse²           lse = logsumexp(x)
//   ∂loss/∂x_k = softmax_k·(S + 2·z·lse) − r_k
//
// Compiled when first needed, without headers, for the device at hand and for one kind of input:
//   LOGITS         f16, bf16, f32 or f64
//   REAL           the type of the arithmetic: f64 for f64, else f32
//   TARGETS        u8, u32, i16, i32 or i64: class indices; f8, f16, bf16, f32 or f64: probabilities
//   CLASS_TARGETS  1 for class indices, 0 for probabilities
//   PER_CLASS      1 if the coefficients differ from class to class, 0 if not
//
// Several lanes, neighbouring threads, share a row and take its classes in turn. Where it is the rows of
// a class that lie next to each other in memory, neighbouring threads have neighbouring rows instead.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;
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

#define INFINITE __uint_as_float(0x7f800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

struct f8 { u8 bits; };
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

#ifndef EMULATED
__device__ inline f32 widen(f16 x) {
  f32 wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ inline void narrow(f32 x, f16 &out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
__device__ inline f32 exp2_approximately(f32 x) {
  f32 power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
#endif
__device__ inline f32 widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
// To the nearest, ties to even; older devices have no instruction for it.
__device__ inline void narrow(f32 x, bf16 &out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  u32 bits = __float_as_uint(x);
  out.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
#endif
}
// Four bits of exponent, three of mantissa, no infinities.
__device__ inline f32 widen(f8 x) {
  u32 exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  f32 size = exponent == 0 ? mantissa * (1.f / 512)
                           : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
  if ((x.bits & 127) == 127) size = NOT_A_NUMBER;
  return x.bits & 128 ? -size : size;
}
__device__ inline f32 widen(f32 x) { return x; }
__device__ inline f64 widen(f64 x) { return x; }
__device__ inline void narrow(f32 x, f32 &out) { out = x; }
__device__ inline void narrow(f64 x, f64 &out) { out = x; }

// exp2 of a rounded product: 2 + |x| ulp, which is little where exp(x) is not negligible.
__device__ inline f32 exponential(f32 x) { return exp2_approximately(x * 1.44269504f); }
__device__ inline f64 exponential(f64 x) { return exp(x); }
__device__ inline f32 logarithm(f32 x) { return logf(x); }
__device__ inline f64 logarithm(f64 x) { return log(x); }

// NaN is passed over; it enters through the exponential.
__device__ inline f32 larger(f32 a, f32 b) { return fmaxf(a, b); }
__device__ inline f64 larger(f64 a, f64 b) { return fmax(a, b); }

// 0·∞ is 0 here: what has no weight has no say.
__device__ inline Real weigh(Real r, Real x) { return r == 0 ? 0 : r * x; }

// ---- Memory

// Logits of 16 bytes.
#define PACK (16 / (int)sizeof(LOGITS))
// Packs, or single values, that a thread has on their way at once: the loads come before whatever needs
// them, or the memory would idle.
#define PACKS (16 / PACK)
#define SINGLES 8
#define THREADS 256
#define WARP 32

template <class T> struct alignas(PACK * sizeof(T) < 16 ? PACK * sizeof(T) : 16) Values {
  T value[PACK];
};

// All memory begins at a multiple of 16 bytes, so a place in it says whether a pack can begin there.
__device__ inline bool is_aligned(u64 at) { return at % PACK == 0; }

// How many values come before the first whole pack.
__device__ inline u64 head(u64 at) { return (PACK - at % PACK) % PACK; }

// N packs, `step` apart, each in one piece.
template <int N>
__device__ inline void load_packs(Real *out, const LOGITS *from, u64 at, u64 step) {
  Values<LOGITS> packs[N];
#pragma unroll
  for (int u = 0; u < N; u++) packs[u] = *(const Values<LOGITS> *)(from + at + u * step);
#pragma unroll
  for (int u = 0; u < N; u++) {
#pragma unroll
    for (int i = 0; i < PACK; i++) out[u * PACK + i] = widen(packs[u].value[i]);
  }
}

// A pack at a stride; in one piece where it lies so.
template <class T>
__device__ inline void load(Real *out, const T *from, u64 at, u64 stride) {
  if (stride == 1 && is_aligned(at)) {
    Values<T> values = *(const Values<T> *)(from + at);
    for (int i = 0; i < PACK; i++) out[i] = widen(values.value[i]);
  } else {
    for (int i = 0; i < PACK; i++) out[i] = widen(from[at + i * stride]);
  }
}

__device__ inline void fill(Real *out, Real value) {
  for (int i = 0; i < PACK; i++) out[i] = value;
}

__device__ inline void store(LOGITS *to, u64 at, const Real *in) {
  Values<LOGITS> values;
  for (int i = 0; i < PACK; i++) narrow(in[i], values.value[i]);
  *(Values<LOGITS> *)(to + at) = values;
}

__device__ inline u64 offset(const View &view, u64 row) {
  u64 offset = view.start;
  for (u64 dim = view.rank - 1; dim > 0; dim--) {
    offset += row % view.lengths[dim] * view.strides[dim];
    row /= view.lengths[dim];
  }
  return offset + row * view.strides[0];
}

// ---- Targets

struct Row {
  const TARGETS *targets;
  // Where those of the row begin.
  u64 at;
  i64 label;
  Real own, weight;
  // Left out, or no class at all: checked before anything is read by it.
  bool ignored, bad;
};

__device__ inline Row row_of(const Params &p, const TARGETS *targets, const Real *table, u64 row) {
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
__device__ inline Real coefficient(const Params &p, const Row &row, const Real *table, u64 k) {
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
__device__ inline bool holds_label(const Params &p, const Row &row, u64 k) {
  return (u64)row.label - (p.first_class + k) < PACK;
}

// The coefficients of a pack.
__device__ inline void coefficients(
    Real *r, const Params &p, const Row &row, const Real *table, u64 k) {
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

// Which row of which task a thread works on.
struct Place {
  // Within the block.
  u32 row, lane, rows;
  __device__ Place(const Params &p) : rows(blockDim.x / p.lanes) {
    row = p.along_rows ? threadIdx.x % rows : threadIdx.x / p.lanes;
    lane = p.along_rows ? threadIdx.x / rows : threadIdx.x % p.lanes;
  }
};

__device__ inline u64 num_tasks(const Params &p, const Place &place) {
  return (p.num_rows + place.rows - 1) / place.rows * p.segments;
}

// ---- Forward

// What some classes say of their row: max x, Σ exp(x − max), Σ r, and Σ r·(x − max), which a common
// offset of the logits does not enter.
struct Partial {
  Real max, sum, total, shortfall;
};

// What the logits are relative to: −∞ − −∞ would be NaN.
__device__ inline Real base(Real max) { return max == -INFINITE ? 0 : max; }

__device__ inline Partial none() { return {-INFINITE, 0, 0, 0}; }

// `part` relative to a larger maximum.
__device__ inline Partial moved(Partial part, Real max) {
  Real by = part.max - base(max);
  return {max, part.sum * exponential(by), part.total, part.shortfall + weigh(part.total, by)};
}

__device__ inline Partial merged(Partial a, Partial b) {
  Real max = larger(a.max, b.max);
  a = moved(a, max);
  b = moved(b, max);
  return {max, a.sum + b.sum, a.total + b.total, a.shortfall + b.shortfall};
}

// Adds N classes; those that are not there are −∞ with a coefficient of 0. If all coefficients are the
// same, there is but one. The classes are added up on their own first: fewer roundings.
template <int N, bool EQUAL>
__device__ inline void add(Partial &part, const Real *x, const Real *r) {
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
__device__ inline void add_packs(
    Partial &part, const Params &p, const Row &row, const LOGITS *logits, u64 x, const Real *table,
    u64 k, u64 step) {
  Real values[N * PACK];
  load_packs<N>(values, logits, x + k, step);
  bool equal = CLASS_TARGETS && !PER_CLASS;
#pragma unroll
  for (int u = 0; u < N; u++) equal = equal && !holds_label(p, row, k + u * step);
  if (equal) {
    add<N * PACK, true>(part, values, &p.spread);
  } else {
    Real r[N * PACK];
#pragma unroll
    for (int u = 0; u < N; u++) coefficients(r + u * PACK, p, row, table, k + u * step);
    add<N * PACK, false>(part, values, r);
  }
}

// Adds a lane's share of the classes, one at a time.
__device__ inline void add_singles(
    Partial &part, const Params &p, const Row &row, const LOGITS *logits, u64 x, const Real *table,
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
__device__ inline Partial sums(
    const Params &p, const Row &row, const LOGITS *logits, u64 x, const Real *table, u64 from,
    u64 to, u32 lane) {
  Partial part = none();
  u64 body = from, end = from;
  if (p.logits.class_stride == 1 && !p.along_rows) {
    body = min(to, from + head(x + from));
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
__device__ inline Partial merged_lanes(
    const Params &p, const Place &place, Partial *slots, Partial part) {
  u32 width = p.along_rows ? 1 : min(p.lanes, (u32)WARP);
  for (u32 by = width / 2; by > 0; by /= 2) {
    Partial other = {
        __shfl_xor_sync(~0u, part.max, by), __shfl_xor_sync(~0u, part.sum, by),
        __shfl_xor_sync(~0u, part.total, by), __shfl_xor_sync(~0u, part.shortfall, by)};
    part = merged(part, other);
  }
  u32 num_slots = p.lanes / width;
  if (num_slots > 1) {
    if (place.lane % width == 0) slots[place.lane / width * place.rows + place.row] = part;
    __syncthreads();
    if (place.lane == 0) {
      for (u32 slot = 1; slot < num_slots; slot++) {
        part = merged(part, slots[slot * place.rows + place.row]);
      }
    }
    // Before another task writes there.
    __syncthreads();
  }
  return part;
}

// A row's results from the whole of its classes.
__device__ inline void finish_row(
    const Params &p, const Row &of, u64 row, Partial whole, Real *losses, Real *weights,
    Real *statistics) {
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
__device__ inline u64 part_of(const Params &p, u64 part, u64 row) {
  return 4 * part * p.num_rows + row;
}

__device__ inline Partial kept(const Params &p, const Real *parts, u64 part, u64 row) {
  const Real *at = parts + part_of(p, part, row);
  return {at[0], at[p.num_rows], at[2 * p.num_rows], at[3 * p.num_rows]};
}

__device__ inline void keep(const Params &p, Real *parts, u64 part, u64 row, Partial found) {
  if (p.continues) found = merged(kept(p, parts, part, row), found);
  Real *at = parts + part_of(p, part, row);
  at[0] = found.max;
  at[p.num_rows] = found.sum;
  at[2 * p.num_rows] = found.total;
  at[3 * p.num_rows] = found.shortfall;
}

// A sum and what was lost when it was rounded: of a million losses it would be half the digits.
struct Sum {
  Real high, low;
};

__device__ inline Sum plus(Sum sum, Real x) {
  Real high = sum.high + x;
  Real added = high - sum.high;
  return {high, sum.low + ((sum.high - (high - added)) + (x - added))};
}

__device__ inline Sum plus(Sum a, Sum b) {
  Sum sum = plus(a, b.high);
  return {sum.high, sum.low + b.low};
}

// Of an infinite sum nothing can be lost.
__device__ inline Real rounded(Sum sum) {
  return sum.low == sum.low ? sum.high + sum.low : sum.high;
}

extern "C" {

// Every row's loss; or parts of each row, if several blocks share it or the classes are but a range of all.
__global__ void __launch_bounds__(THREADS) forward(
    const LOGITS *logits, const TARGETS *targets, const Real *table, Real *parts, Real *losses,
    Real *weights, Real *statistics, const __grid_constant__ Params p) {
  __shared__ Partial slots[THREADS];
  Place place(p);
  for (u64 task = blockIdx.x; task < num_tasks(p, place); task += gridDim.x) {
    u64 row = task / p.segments * place.rows + place.row;
    u64 segment = task % p.segments;
    bool is_here = row < p.num_rows;
    Row of = row_of(p, targets, table, is_here ? row : 0);
    Partial part = none();
    if (is_here && !of.ignored) {
      u64 x = offset(p.logits, row), from = segment * p.segment;
      part = sums(p, of, logits, x, table, from, min(p.range, from + p.segment), place.lane);
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
__global__ void __launch_bounds__(THREADS) finish(
    const TARGETS *targets, const Real *table, const Real *parts, Real *all_parts, Real *losses,
    Real *weights, Real *statistics, const __grid_constant__ Params p) {
  __shared__ Partial slots[THREADS];
  Place place(p);
  for (u64 task = blockIdx.x; task < num_tasks(p, place); task += gridDim.x) {
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
__global__ void __launch_bounds__(THREADS) reduce(
    const Real *losses, const Real *weights, Real *out, Real *out_weights, const Reduction p) {
  __shared__ Sum sums[2][THREADS];
  Sum loss = {0, 0}, weight = {0, 0};
  u64 from = blockIdx.x * p.piece, to = min(p.len, from + p.piece);
  for (u64 i = from + threadIdx.x; i < to; i += blockDim.x) {
    loss = plus(loss, losses[i] * p.scale);
    if (p.weighted) weight = plus(weight, weights[i]);
  }
  sums[0][threadIdx.x] = loss;
  sums[1][threadIdx.x] = weight;
  for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      for (int i = 0; i < 2; i++) {
        sums[i][threadIdx.x] = plus(sums[i][threadIdx.x], sums[i][threadIdx.x + half]);
      }
    }
  }
  if (threadIdx.x == 0) {
    Real divisor = p.weighted ? rounded(sums[1][0]) : p.divisor;
    Real sum = rounded(sums[0][0]);
    out[blockIdx.x] = p.divides ? sum / divisor * p.unscale : sum;
    if (p.weighted) out_weights[blockIdx.x] = divisor;
  }
}

}

// ---- Backward, and smoothed targets

// What is written of a row: exp(x − max)·scale + r·against.
struct RowGradient {
  Real max, scale, against;
};

__device__ inline RowGradient gradient_of(
    const Params &p, const Row &of, const Real *upstream, const Real *statistics, u64 row) {
  Real max = statistics[row], sum = statistics[p.num_rows + row];
  Real pull = statistics[2 * p.num_rows + row];
  Real grad = of.bad ? (Real)NOT_A_NUMBER : upstream[offset(p.upstream, row)];
  if (p.z_loss != 0) pull += p.z_loss * (2 * (max + logarithm(sum)));
  return {max, grad * pull / sum, -grad};
}

template <bool SMOOTH> __device__ inline Real value(const RowGradient &of, Real x, Real r) {
  Real of_target = r * of.against;
  return SMOOTH ? of_target : exponential(x - of.max) * of.scale + of_target;
}

// Writes N packs, `step` apart. The logits can be read in packs too, or else one by one.
template <bool SMOOTH, bool PACKED, int N>
__device__ inline void write_packs(
    const Params &p, const Row &of, const RowGradient &gradient, const LOGITS *logits, u64 x,
    const Real *table, LOGITS *out, u64 line, u64 k, u64 step) {
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
    Real *these = values + u * PACK;
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
__device__ inline void write_row(
    const Params &p, const Row &of, const RowGradient &gradient, const LOGITS *logits, u64 x,
    const Real *table, LOGITS *out, u64 line, u64 from, u64 to, u32 lane) {
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
__device__ inline void write_rows(
    const LOGITS *logits, const TARGETS *targets, const Real *table, const Real *upstream,
    const Real *statistics, LOGITS *out, const Params &p) {
  Place place(p);
  for (u64 task = blockIdx.x; task < num_tasks(p, place); task += gridDim.x) {
    u64 row = task / p.segments * place.rows + place.row;
    if (row >= p.num_rows) continue;
    u64 from = task % p.segments * p.segment, to = min(p.range, from + p.segment);
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
      body = min(to, from + head(line + from));
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

extern "C" {

// The gradient of the logits, contiguous, as they are if it takes their place: whoever writes an element has
// read it.
__global__ void __launch_bounds__(THREADS) backward(
    const LOGITS *logits, const TARGETS *targets, const Real *table, const Real *upstream,
    const Real *statistics, LOGITS *gradient, const __grid_constant__ Params p) {
  const LOGITS *from = p.in_place ? gradient : logits;
  write_rows<false>(from, targets, table, upstream, statistics, gradient, p);
}

// The coefficients of all classes themselves.
__global__ void __launch_bounds__(THREADS) smooth(
    const TARGETS *targets, const Real *table, LOGITS *soft, const __grid_constant__ Params p) {
  write_rows<true>(soft, targets, table, nullptr, nullptr, soft, p);
}

}
