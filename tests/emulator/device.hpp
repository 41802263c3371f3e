// An emulated GPU: runs the blocks of a kernel one after another on the calling thread.
//
// Each thread of a block has its own stack. A thread runs until it ends or waits for other threads,
// at a barrier or at an exchange between the lanes of its warp. The next thread runs then. A kernel
// that lacks a barrier therefore gives a wrong result in at least one thread order, and the same
// result in every run. Undefined behaviour and deadlocks end the program with a message.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>
#include <ucontext.h>

namespace gpu {

constexpr unsigned WIDEST_WARP = 64, NARROWEST_WARP = 4, MOST_THREADS = 1024;

// Options of an emulated launch. `backend.rs` has the same struct.
struct Manner {
  // Order of the threads: 0 is first to last, 1 is last to first, another number is a random seed.
  uint32_t order;
  // Line of the barrier or ticket to leave out, or 0.
  uint32_t without_line;
  // Number of threads in a warp, which exchange values directly.
  uint32_t warp;
  // The options that the kernel computes.
  uint32_t options;
};

struct Index { unsigned x; };

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "emulator: %s\n", what);
  abort();
}

// A group of threads that wait for each other, at a barrier or at an exchange.
struct Meeting {
  unsigned size = 0, arrived = 0, ended = 0, rounds = 0, place = 0;

  void arrive(unsigned at) {
    if (arrived == 0) place = at;
    if (place != at) fail("threads wait for each other at different places");
    arrived++;
    check();
  }
  void end() {
    ended++;
    check();
  }
  void check() {
    if (arrived > 0 && arrived + ended >= size) {
      if (ended > 0) fail("a thread has ended for which others wait");
      arrived = 0;
      rounds++;
    }
  }
};

struct Warp {
  Meeting meeting;
  // Values that the lanes offered in this round and in the previous one, which slower lanes may
  // still read.
  uint64_t offered[2][WIDEST_WARP];
};

// A stack and the thread that runs on it.
struct Fiber {
  // The kernels use at most 7 KiB, with sanitizers. AddressSanitizer clears the shadow of the whole stack at each switch, so a larger
  // stack takes more time.
  static constexpr size_t STACK = 32 * 1024, GUARD = 256;
  static constexpr char UNWRITTEN = 0x5a;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  unsigned thread = 0;
  // The meeting that the thread waits for.
  const Meeting *waits = nullptr;
  unsigned round = 0;

  Fiber() { memset(stack.get(), UNWRITTEN, GUARD); }
  // Stacks grow down, so a stack that is too small overwrites the guard, its first bytes.
  bool overflowed() const {
    return stack[0] != UNWRITTEN || memcmp(stack.get(), stack.get() + 1, GUARD - 1) != 0;
  }
};

class Block {
 public:
  template <class Kernel>
  void launch(unsigned blocks, unsigned threads, Manner how, const Kernel &kernel) {
    if (threads == 0 || threads > MOST_THREADS) fail("a block of no or too many threads");
    if (how.warp < NARROWEST_WARP || how.warp > WIDEST_WARP) fail("no such width of a warp");
    num_blocks = blocks;
    num_threads = threads;
    tickets = 0;
    manner = how;
    seed = how.order;
    for (unsigned i = 0; i < blocks; i++) run(how.order == 1 ? blocks - 1 - i : i, kernel);
  }

  template <class Kernel> void run(unsigned block, const Kernel &kernel) {
    block_index = block;
    call = [](const void *kernel) { (*(const Kernel *)kernel)(); };
    body = &kernel;
    barrier = Meeting{num_threads};
    memory.clear();
    for (unsigned first = 0; first < num_threads; first += manner.warp) {
      unsigned left = num_threads - first;
      warps[first / manner.warp].meeting = Meeting{left < manner.warp ? left : manner.warp};
    }
    std::vector<unsigned> order(num_threads);
    for (unsigned i = 0; i < num_threads; i++) order[i] = i;
    arrange(order);
    started = 0;
    next = order.data();
    // A stack runs one thread after another until a thread waits. Then the next stack continues.
    while (started < num_threads) resume(idle());
    while (!waiting.empty()) {
      std::vector<Fiber *> now;
      now.swap(waiting);
      arrange(now);
      bool any = false;
      for (Fiber *fiber : now) {
        if (fiber->waits->rounds == fiber->round) {
          waiting.push_back(fiber);
        } else {
          any = true;
          resume(fiber);
        }
      }
      if (!any) fail("threads wait for each other for ever");
    }
  }

  void wait(Meeting &meeting, unsigned place) {
    Fiber *self = current;
    self->waits = &meeting;
    self->round = meeting.rounds;
    meeting.arrive(place);
    // The last thread to arrive does not wait.
    if (meeting.rounds != self->round) return;
    waiting.push_back(self);
    swapcontext(&self->context, &scheduler);
  }

  template <class T> T exchange(T value, unsigned from, unsigned place) {
    static_assert(sizeof(T) <= 8);
    Warp &warp = warps[index() / manner.warp];
    auto &offered = warp.offered[warp.meeting.rounds % 2];
    memcpy(&offered[lane()], &value, sizeof value);
    wait(warp.meeting, place);
    memcpy(&value, &offered[from % manner.warp], sizeof value);
    return value;
  }

  // Shared memory of the block, one array per number. Unwritten memory is NaN.
  void *shared(size_t number, size_t size) {
    if (number >= memory.size()) memory.resize(number + 1);
    if (!memory[number]) {
      memory[number].reset(new char[size]);
      memset(memory[number].get(), 0xff, size);
    }
    return memory[number].get();
  }

  // A barrier for all threads of the block, unless the launch leaves out the barrier of this line.
  void meet(unsigned line) {
    if (line != manner.without_line) wait(barrier, line);
  }

  // Counts from 0 to `most` and then from 0 again. Returns the count before. Blocks run one after another.
  uint32_t take_ticket(uint32_t *ticket, uint32_t most, unsigned line) {
    uint32_t before = *ticket;
    if (line != manner.without_line) {
      *ticket = before >= most ? 0 : before + 1;
      tickets++;
    }
    return before;
  }

  unsigned index() const { return current->thread; }
  unsigned lane() const { return index() % manner.warp; }

  unsigned num_threads = 0, block_index = 0, num_blocks = 0;
  // Tickets that the blocks of the launch have taken.
  unsigned tickets = 0;
  Manner manner = {};
  Meeting barrier;

 private:
  template <class T> void arrange(std::vector<T> &these) {
    if (manner.order == 1) {
      for (size_t i = 0; i < these.size() / 2; i++) std::swap(these[i], these[these.size() - 1 - i]);
    } else if (manner.order > 1) {
      for (size_t i = these.size(); i > 1; i--) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(these[i - 1], these[(seed >> 33) % i]);
      }
    }
  }

  Fiber *idle() {
    if (unused.empty()) {
      fibers.emplace_back(new Fiber);
      return fibers.back().get();
    }
    Fiber *fiber = unused.back();
    unused.pop_back();
    return fiber;
  }

  // Continues a waiting thread, or starts a new one.
  void resume(Fiber *fiber) {
    current = fiber;
    if (fiber->waits == nullptr) {
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = Fiber::STACK;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, enter, 0);
    }
    swapcontext(&scheduler, &fiber->context);
    if (fiber->overflowed()) fail("a stack is too small");
  }

  static void enter();

  void work() {
    Fiber *self = current;
    bool first = self->waits == nullptr;
    while (first || started < num_threads) {
      first = false;
      self->thread = next[started++];
      self->waits = nullptr;
      call(body);
      barrier.end();
      warps[self->thread / manner.warp].meeting.end();
      // A thread that has waited starts no other thread here, because the others may wait for that
      // one.
      if (self->waits != nullptr) break;
    }
    self->waits = nullptr;
    unused.push_back(self);
    swapcontext(&self->context, &scheduler);
    fail("a thread has ended twice");
  }

  Warp warps[MOST_THREADS / NARROWEST_WARP];
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber *> unused, waiting;
  ucontext_t scheduler;
  Fiber *current = nullptr;
  unsigned started = 0;
  const unsigned *next = nullptr;
  void (*call)(const void *) = nullptr;
  const void *body = nullptr;
  uint64_t seed = 0;
};

// The block that runs on this host thread. Later blocks reuse its stacks.
inline thread_local Block block;
// The options of the launch, a constant on a GPU.
inline thread_local uint32_t options = 0;
#define OPTIONS gpu::options

// Whether the planted fault with this number is chosen. `faults.rs` describes them.
inline const int fault = getenv("EMULATOR_FAULT") ? atoi(getenv("EMULATOR_FAULT")) : 0;
#define FAULT(number) (gpu::fault == number)

inline void Block::enter() { block.work(); }

}  // namespace gpu
