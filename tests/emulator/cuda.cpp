// The kernels in SOURCE for one kind of input, callable through one function, KERNELS.
#include "cuda.hpp"

#define EMULATED
namespace {
struct f16;
float widen(f16 x);
void narrow(float x, f16 &out);
float exp2_approximately(float x);

#include SOURCE

// The processor's own conversions are independent of the kernels' conversions.
float widen(f16 x) {
  _Float16 half;
  memcpy(&half, &x, sizeof half);
  return (float)half;
}
void narrow(float x, f16 &out) {
  _Float16 half = (_Float16)x;
  memcpy(&out, &half, sizeof half);
}
float exp2_approximately(float x) {
  float power = exp2f(x);
  return power < 0x1p-126f ? 0 : power;
}

}  // namespace

// Launches the kernel `name`. Returns false if there is no such kernel or its parameters have
// another size.
extern "C" bool KERNELS(
    const char *name, unsigned groups, unsigned threads, gpu::Manner manner, void *const *b,
    const void *params, size_t size) {
  auto is = [&](const char *kernel, size_t its_size) {
    return strcmp(name, kernel) == 0 && size == its_size;
  };
  auto launch = [&](auto kernel) { gpu::block.launch(groups, threads, manner, kernel); };
  const Params &p = *(const Params *)params;
  if (is("forward", sizeof p)) {
    launch([&] {
      forward((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4], (Real *)b[5],
              (Real *)b[6], p);
    });
  } else if (is("finish", sizeof p)) {
    launch([&] {
      finish((TARGETS *)b[0], (Real *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4], (Real *)b[5],
             (Real *)b[6], p);
    });
  } else if (is("reduce", sizeof(Reduction))) {
    launch([&] {
      reduce((Real *)b[0], (Real *)b[1], (Real *)b[2], (Real *)b[3], *(const Reduction *)params);
    });
  } else if (is("backward", sizeof p)) {
    launch([&] {
      backward((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (Real *)b[3], (Real *)b[4],
               (LOGITS *)b[5], p);
    });
  } else if (is("smooth", sizeof p)) {
    if constexpr (sizeof(LOGITS) == 4) {
      launch([&] { smooth((TARGETS *)b[0], (Real *)b[1], (LOGITS *)b[2], p); });
    }
  } else {
    return false;
  }
  return true;
}
