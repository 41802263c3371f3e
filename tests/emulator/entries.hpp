// Fails unless each of several blocks has taken one ticket and the last one has set it back to 0.
inline void check_tickets(unsigned blocks, unsigned tickets, const Scratch *scratch) {
  if (!JOINS_BLOCKS || blocks == 1) return;
  if (tickets != blocks) gpu::fail("a block has taken no ticket, or several");
  if (scratch->ticket != 0) gpu::fail("the ticket is not 0 after a launch");
}

// Launches the kernel `name` with the buffers `b`. Returns false if there is no such kernel or its parameters have another size.
extern "C" bool KERNELS(
    const char *name, unsigned blocks, unsigned threads, gpu::Manner how, void *const *b, const void *params, size_t size) {
  if (size != sizeof(Params)) return false;
  const Params &p = *(const Params *)params;
  gpu::options = how.options;
  gpu::Block &block = gpu::block;
  auto is = [&](const char *kernel_name) { return strcmp(name, kernel_name) == 0; };
  auto launch = [&](auto kernel_body) { block.launch(blocks, threads, how, kernel_body); };
  // A launch whose last block continues, if `joins`.
  auto launch_joining = [&](bool joins, void *scratch, auto kernel_body) {
    launch(kernel_body);
    if (joins) check_tickets(blocks, block.tickets, (const Scratch *)scratch);
  };
  bool joins_forward = p.num_splits > 1 ? p.joins_splits : p.reduces;
#define LOSS(name)                                                                                            \
  name((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (u8 *)b[3], (Real *)b[4], (Real *)b[5], (Real *)b[6],  \
       (Real *)b[7], (u32 *)b[8], (Scratch *)b[9], p ARGUMENTS_OF_THREAD)
#define GRADIENT(name)                                                                                        \
  name((LOGITS *)b[0], (TARGETS *)b[1], (Real *)b[2], (u8 *)b[3], (Real *)b[4], (Real *)b[5], (LOGITS *)b[6], \
       p ARGUMENTS_OF_THREAD)
  if (is("forward")) {
    launch_joining(joins_forward, b[9], [&] { LOSS(forward); });
  } else if (is("forward_strided")) {
    launch_joining(joins_forward, b[9], [&] { LOSS(forward_strided); });
  } else if (is("finish")) {
    launch_joining(p.reduces, b[8], [&] {
      finish((TARGETS *)b[0], (Real *)b[1], (u8 *)b[2], (Real *)b[3], (Real *)b[4], (Real *)b[5], (Real *)b[6], (u32 *)b[7],
             (Scratch *)b[8], p ARGUMENTS_OF_THREAD);
    });
#ifdef HAS_REDUCE
  } else if (is("reduce")) {
    launch([&] { reduce((Real *)b[0], (Real *)b[1], (Scratch *)b[2], p ARGUMENTS_OF_THREAD); });
#endif
  } else if (is("backward")) {
    launch([&] { GRADIENT(backward); });
  } else if (is("backward_strided")) {
    launch([&] { GRADIENT(backward_strided); });
  } else if (is("smooth")) {
    launch([&] { smooth((TARGETS *)b[0], (Real *)b[1], (u8 *)b[2], (LOGITS *)b[3], p ARGUMENTS_OF_THREAD); });
  } else {
    return false;
  }
  return true;
}
