// The kernels in SOURCE for one kind of input, callable through one function, KERNELS.
#include <metal_stdlib>

namespace {
// Metal has no f64. The tests use f64 here to tell errors from rounding.
typedef double f64;
inline double widen(double x) { return x; }
inline void narrow(double x, double &out) { out = x; }
inline void unpack(uint4 pack, int i, double &out) {
  out = as_type<double>((ulong)pack[2 * i + 1] << 32 | pack[2 * i]);
}
inline void pack(uint4 &pack, int i, double x) {
  pack[2 * i] = (uint)as_type<ulong>(x);
  pack[2 * i + 1] = as_type<ulong>(x) >> 32;
}

#include SOURCE
}  // namespace

// Launches the kernel `name`. Returns false if there is no such kernel or its parameters have
// another size.
extern "C" bool KERNELS(
    const char *name, unsigned groups, unsigned threads, gpu::Manner manner, void *const *b,
    const void *params, size_t size) {
  auto is = [&](const char *kernel_name, size_t its_size) {
    return strcmp(name, kernel_name) == 0 && size == its_size;
  };
  gpu::Block &block = gpu::block;
  auto launch = [&](auto kernel_body) { block.launch(groups, threads, manner, kernel_body); };
  const Params &p = *(const Params *)params;
  if (is("forward", sizeof p)) {
    launch([&] {
      forward((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4], (Real *)b[5],
              (Real *)b[6], p, block.index(), threads, block.block_index, groups, manner.warp);
    });
  } else if (is("finish", sizeof p)) {
    launch([&] {
      finish((TARGETS *)b[0], (Real *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4], (Real *)b[5],
             (Real *)b[6], p, block.index(), threads, block.block_index, groups, manner.warp);
    });
  } else if (is("reduce", sizeof(Reduction))) {
    launch([&] {
      reduce((Real *)b[0], (Real *)b[1], (Real *)b[2], (Real *)b[3], *(const Reduction *)params,
             block.index(), threads, block.block_index, groups, manner.warp);
    });
  } else if (is("backward", sizeof p)) {
    launch([&] {
      backward((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4],
               (LOGITS *)b[5], p, block.index(), threads, block.block_index, groups, manner.warp);
    });
  } else if (is("smooth", sizeof p)) {
    if constexpr (sizeof(LOGITS) == 4) {
      launch([&] {
        smooth((TARGETS *)b[0], (Real *)b[1], (LOGITS *)b[2], p, block.index(), threads,
               block.block_index, groups, manner.warp);
      });
    }
  } else {
    return false;
  }
  return true;
}
