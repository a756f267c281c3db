// Runs CUDA kernels on the CPU, so that tests and sanitizers see them on a machine without a GPU.
//
// It takes what csrc/*.cu uses, and no more: kernels launched with cudaLaunchKernelEx, dynamic shared memory, clusters
// along x, warp operations over whole warps, mbarriers and bulk copies. csrc/device.cuh maps its own functions to these.
//
// Every CUDA thread is a fiber; one operating system thread runs them all, each up to the next point where it must wait
// (a barrier, a warp operation), in an order drawn anew for every cluster. That is fast, repeatable (by the variable
// HEDGESPEC_EMULATED_SEED) and tells a deadlock from a wait. The blocks of a cluster are alive together; clusters run one
// after another, shuffled.
//
// What it shows:
//   shared memory nobody wrote    every buffer, and the destination of every copy in flight, is filled with NaN bytes
//   a missing wait for a copy     copies land late, at a random moment
//   a missing barrier             by the order of the threads, or for certain with -fsanitize=thread: fibers are threads to
//                                 it, ordered only by what orders CUDA threads (a shuffle does not), clusters by nothing
//   accesses out of bounds        -fsanitize=address,undefined: buffers have their exact size, and a block's shared memory
//                                 is freed when its last thread ends, whatever another block of the cluster still reads
//   misuse                        divergent barriers, misaligned copies, more shared memory than was asked for: they throw
// What it cannot show: the memory model between the generic and the asynchronous proxy, timing, registers.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// The runtime's interface, as far as the kernels' host code uses it.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct EmulatedStream*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace hedgespec_emulator {

// The device that the runtime tells of. HEDGESPEC_EMULATED_DEVICE="CAPABILITY,SMS,SHARED,LARGEST,SMALLEST" makes another:
// its multiprocessors, a block's shared memory in bytes, and the sizes of clusters that it runs (a range, so that a test can
// have any size chosen). Every description is a device of its own: what host code keeps for a device stays right.
struct Device {
  int capability = 90, processors = 132, shared = 232448, largest_cluster = 16, smallest_cluster = 1;
};

inline std::vector<std::pair<std::string, Device>>& devices() {
  static std::vector<std::pair<std::string, Device>> list;
  return list;
}

inline int current_device() {
  const char* given = std::getenv("HEDGESPEC_EMULATED_DEVICE");
  const std::string description = given ? given : "";
  auto& list = devices();
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (list[i].first == description) return static_cast<int>(i);
  }
  Device made;
  if (!description.empty() && std::sscanf(description.c_str(), "%d,%d,%d,%d,%d", &made.capability, &made.processors,
                                          &made.shared, &made.largest_cluster, &made.smallest_cluster) != 5) {
    throw std::runtime_error("HEDGESPEC_EMULATED_DEVICE: expected five numbers; got " + description);
  }
  list.emplace_back(description, made);
  return static_cast<int>(list.size()) - 1;
}

struct Permissions {
  int shared = 48 * 1024;
  bool large_clusters = false;
};
// What a kernel may use on the current device.
inline Permissions& permissions(const void* kernel) {
  static std::map<std::pair<const void*, int>, Permissions> kept;
  return kept[{kernel, current_device()}];
}

// Fibers.

inline constexpr std::size_t stack_bytes = 128 * 1024;  // untouched pages cost nothing

#if defined(__x86_64__)
// Saves the registers that a call must keep on the stack, then goes on where `to` was saved. Local to each object file.
asm(R"(
.pushsection .text
.type hedgespec_emulator_switch, @function
hedgespec_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hedgespec_emulator_switch, .-hedgespec_emulator_switch
.popsection
)");
extern "C" void hedgespec_emulator_switch(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<std::uintptr_t*>(stack + stack_bytes);
    *--top = 0;                                        // what `entry` sees as its return address; it never returns
    *--top = reinterpret_cast<std::uintptr_t>(entry);  // 16-byte alignment as after a call
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { hedgespec_emulator_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t state;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = stack_bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};
#endif

#if defined(__SANITIZE_THREAD__)
inline void order_before(void* object) { __tsan_release(object); }
inline void order_after(void* object) { __tsan_acquire(object); }
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
// While one lives, thread sanitizer does not look: the emulator's own state is no part of the kernel.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline void order_before(void*) {}
inline void order_after(void*) {}
struct Unwatched {
  Unwatched() {}
};
#endif

struct Grid;
struct Block;

// Threads that meet. Two marks in turn: who left the last meeting late must not look ordered by the next one.
struct Meeting {
  unsigned expected = 0, arrived = 0;
  std::uint64_t generation = 0;
  char marks[2];
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack;
  uint3 index{};
  Block* block = nullptr;
  bool done = false;
  // What it waits for: a meeting's end, or a phase of an mbarrier.
  const Meeting* meeting = nullptr;
  std::uint64_t generation = 0;
  const void* mbarrier = nullptr;
  unsigned parity = 0;
  bool in_cluster_barrier = false;
  std::uint64_t cluster_generation = 0;
  void* sanitizer_fiber = nullptr;
};

struct Warp {
  Meeting meeting;
  std::uint64_t values[2][32];
};

struct Block {
  Grid* grid = nullptr;
  uint3 index{};
  unsigned rank = 0, alive = 0;
  unsigned char* shared = nullptr;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  char end_mark;
};

struct Copy {
  void* destination;
  const void* source;  // null: `value`
  uint4 value;
  unsigned bytes;
  std::uint64_t* mbarrier;
  std::unique_ptr<char> mark;
};

// One cluster at a time.
struct Grid {
  dim3 size, block_size;
  unsigned cluster_size = 1;
  std::size_t shared_bytes = 0;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Block>> cluster;
  Meeting cluster_meeting;
  std::vector<Copy> copies;  // in flight
  std::exception_ptr error;
  Context scheduler;
  void* scheduler_fiber = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  char start_mark, end_mark;
};

inline Thread* current = nullptr;
inline std::vector<void*> ended_fibers;  // thread sanitizer's
inline std::vector<std::unique_ptr<char[]>> idle_stacks;
inline std::mt19937_64 random_numbers;

[[noreturn]] inline void misuse(const std::string& what) { throw std::runtime_error("CUDA emulator: " + what); }

// mbarriers, in the eight bytes that the hardware gives them.
struct MbarrierState {
  std::uint64_t expected : 12, pending : 12, phase : 1, bytes : 39;
};
static_assert(sizeof(MbarrierState) == 8);

inline MbarrierState mbarrier_read(const std::uint64_t* mbarrier) {
  return std::bit_cast<MbarrierState>(*static_cast<const volatile std::uint64_t*>(mbarrier));
}
inline void mbarrier_write(std::uint64_t* mbarrier, MbarrierState state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
  }
  *static_cast<volatile std::uint64_t*>(mbarrier) = std::bit_cast<std::uint64_t>(state);
}

inline bool ready(const Thread& thread) {
  if (thread.meeting) return thread.meeting->generation != thread.generation;
  if (thread.mbarrier) return mbarrier_read(static_cast<const std::uint64_t*>(thread.mbarrier)).phase != thread.parity;
  return true;
}

__attribute__((no_sanitize("thread"))) inline void switch_to_scheduler(Thread& thread) {
  Grid& grid = *thread.block->grid;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, grid.scheduler_stack, grid.scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(grid.scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(thread.context, grid.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

__attribute__((no_sanitize("thread"))) inline void run_thread(Thread& thread) {
  Grid& grid = *thread.block->grid;
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, thread.stack.get(), stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.sanitizer_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  Context::change(grid.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  current = nullptr;
}

inline void wait_until_ready(Thread& thread) {
  if (!ready(thread)) switch_to_scheduler(thread);
  thread.meeting = nullptr;
  thread.mbarrier = nullptr;
}

inline void complete_if_full(Meeting& meeting) {
  if (meeting.arrived < meeting.expected || meeting.arrived == 0) return;
  meeting.arrived = 0;
  ++meeting.generation;
}

// Returns the generation to wait past.
inline std::uint64_t arrive(Meeting& meeting, bool orders) {
  const std::uint64_t generation = meeting.generation;
  if (orders) order_before(&meeting.marks[generation & 1]);
  ++meeting.arrived;
  complete_if_full(meeting);
  return generation;
}

inline void wait(Meeting& meeting, std::uint64_t generation, bool orders) {
  Thread& thread = *current;
  thread.meeting = &meeting;
  thread.generation = generation;
  wait_until_ready(thread);
  if (orders) order_after(&meeting.marks[generation & 1]);
}

inline void leave(Meeting& meeting) {
  --meeting.expected;
  complete_if_full(meeting);
}

inline void finish_thread(Thread& thread) {
  const Unwatched unwatched;
  Block& block = *thread.block;
  Grid& grid = *block.grid;
  order_before(&grid.end_mark);
  order_before(&block.end_mark);
  thread.done = true;
  leave(block.meeting);
  leave(block.warps[thread.index.x / 32].meeting);
  leave(grid.cluster_meeting);
  if (--block.alive == 0) {
    order_after(&block.end_mark);
    std::free(block.shared);
    block.shared = nullptr;
  }
}

__attribute__((no_sanitize("thread"))) inline void thread_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Thread& thread = *current;
  Grid& grid = *thread.block->grid;
  order_after(&grid.start_mark);
  try {
    grid.kernel();
    if (thread.in_cluster_barrier) misuse("a thread ended between arriving at a cluster barrier and waiting for it");
  } catch (...) {
    if (!grid.error) grid.error = std::current_exception();
  }
  finish_thread(thread);
  switch_to_scheduler(thread);
}

inline void land(Copy& copy) {
#if defined(__SANITIZE_THREAD__)
  void* engine = __tsan_create_fiber(0);
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(engine, __tsan_switch_to_fiber_no_sync);
#endif
  order_after(copy.mark.get());
  std::memcpy(copy.destination, copy.source ? copy.source : &copy.value, copy.bytes);
  order_before(copy.mbarrier);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(engine);
#endif
  MbarrierState state = mbarrier_read(copy.mbarrier);
  state.bytes = state.bytes - copy.bytes;
  mbarrier_write(copy.mbarrier, state);
}

inline void land_any(Grid& grid) {
  const std::size_t chosen = random_numbers() % grid.copies.size();
  std::swap(grid.copies[chosen], grid.copies.back());
  Copy copy = std::move(grid.copies.back());
  grid.copies.pop_back();
  land(copy);
}

inline void start_cluster(Grid& grid, std::uint64_t first_block) {
  grid.cluster.clear();
  grid.cluster_meeting = Meeting{};
  const unsigned threads = grid.block_size.x;
  for (unsigned rank = 0; rank < grid.cluster_size; ++rank) {
    auto block = std::make_unique<Block>();
    const std::uint64_t at = first_block + rank;
    block->grid = &grid;
    block->rank = rank;
    block->index = {static_cast<unsigned>(at % grid.size.x), static_cast<unsigned>(at / grid.size.x % grid.size.y),
                    static_cast<unsigned>(at / grid.size.x / grid.size.y)};
    block->alive = block->meeting.expected = threads;
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, std::max<std::size_t>(grid.shared_bytes, 1))) misuse("out of memory");
    block->shared = static_cast<unsigned char*>(shared);
    std::memset(block->shared, 0xff, grid.shared_bytes);
    block->warps.resize((threads + 31) / 32);
    block->threads = std::vector<Thread>(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& thread = block->threads[i];
      thread.block = block.get();
      thread.index = {i, 0, 0};
      ++block->warps[i / 32].meeting.expected;
      if (idle_stacks.empty()) idle_stacks.emplace_back(new char[stack_bytes]);
      thread.stack = std::move(idle_stacks.back());
      idle_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(thread.stack.get(), stack_bytes);
#endif
      thread.context.prepare(thread.stack.get(), thread_entry);
#if defined(__SANITIZE_THREAD__)
      thread.sanitizer_fiber = __tsan_create_fiber(0);
#endif
    }
    grid.cluster_meeting.expected += threads;
    grid.cluster.push_back(std::move(block));
  }
}

// Destroys what thread sanitizer keeps of threads that have ended, but for the last `kept`: the name of a destroyed one is
// given to another, and a race between the two is not seen.
inline void destroy_fibers([[maybe_unused]] std::size_t kept) {
#if defined(__SANITIZE_THREAD__)
  if (ended_fibers.size() <= kept) return;
  const auto last = ended_fibers.end() - static_cast<std::ptrdiff_t>(kept);
  std::for_each(ended_fibers.begin(), last, __tsan_destroy_fiber);
  ended_fibers.erase(ended_fibers.begin(), last);
#endif
}

inline void end_cluster(Grid& grid) {
  for (auto& block : grid.cluster) {
    for (Thread& thread : block->threads) {
#if defined(__SANITIZE_THREAD__)
      ended_fibers.push_back(thread.sanitizer_fiber);  // and its stack goes: another fiber on it would look like a race
#else
      idle_stacks.push_back(std::move(thread.stack));
#endif
    }
    std::free(block->shared);
  }
  grid.cluster.clear();
  if (!grid.copies.empty() && !grid.error) {
    grid.copies.clear();
    misuse("a cluster ended with a copy in flight");
  }
  grid.copies.clear();
}

inline std::string where(const Grid& grid) {
  std::map<std::string, int> counts;
  for (const auto& block : grid.cluster) {
    for (const Thread& thread : block->threads) {
      if (thread.done) continue;
      const char* what = thread.mbarrier                             ? "an mbarrier"
                         : thread.meeting == &grid.cluster_meeting   ? "the cluster barrier"
                         : thread.meeting == &thread.block->meeting ? "the block barrier"
                                                                     : "a warp operation";
      ++counts[std::string(what) + " in block rank " + std::to_string(block->rank)];
    }
  }
  std::string text;
  for (const auto& [what, count] : counts) text += "; " + std::to_string(count) + " threads wait for " + what;
  return text;
}

inline void run_cluster(Grid& grid) {
  std::vector<Thread*> order;
  for (auto& block : grid.cluster) {
    for (Thread& thread : block->threads) order.push_back(&thread);
  }
  std::shuffle(order.begin(), order.end(), random_numbers);
  while (!order.empty()) {
    bool moved = false;
    for (Thread* thread : order) {
      if (!ready(*thread)) continue;
      run_thread(*thread);
      if (grid.error) return;
      moved = true;
    }
    std::erase_if(order, [](const Thread* thread) { return thread->done; });
    if (!grid.copies.empty() && (!moved || random_numbers() % 4 == 0)) {
      land_any(grid);
    } else if (!moved && !order.empty()) {
      misuse("deadlock" + where(grid));
    }
  }
}

inline void launch(Grid& grid) {
  const Unwatched unwatched;
  const char* seed = std::getenv("HEDGESPEC_EMULATED_SEED");
  random_numbers.seed(seed ? std::strtoull(seed, nullptr, 10) : 0);
#if defined(__SANITIZE_THREAD__)
  grid.scheduler_fiber = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
  // The bounds of this stack; an approximation is enough for what address sanitizer does with them.
  grid.scheduler_stack_bytes = 1 << 20;
  grid.scheduler_stack = static_cast<char*>(__builtin_frame_address(0)) - (1 << 20) + 4096;
#endif
  order_before(&grid.start_mark);
  const std::uint64_t blocks = std::uint64_t{grid.size.x} * grid.size.y * grid.size.z;
  std::vector<std::uint64_t> firsts;
  for (std::uint64_t first = 0; first < blocks; first += grid.cluster_size) firsts.push_back(first);
  std::shuffle(firsts.begin(), firsts.end(), random_numbers);
  for (const std::uint64_t first : firsts) {
    start_cluster(grid, first);
    try {
      run_cluster(grid);
    } catch (...) {
      grid.error = std::current_exception();
    }
    end_cluster(grid);
    destroy_fibers(4000);  // it has room for 8000 threads at a time
    if (!grid.error) continue;
    order_after(&grid.end_mark);
    std::rethrow_exception(grid.error);
  }
  destroy_fibers(0);
  order_after(&grid.end_mark);
}

// What csrc/device.cuh asks for.

inline unsigned char* shared_memory() { return current->block->shared; }
inline unsigned cluster_rank() { return current->block->rank; }
inline unsigned cluster_size() { return current->block->grid->cluster_size; }

inline void cluster_arrive() {
  const Unwatched unwatched;
  Thread& thread = *current;
  if (thread.in_cluster_barrier) misuse("a thread arrived twice at a cluster barrier");
  thread.in_cluster_barrier = true;
  thread.cluster_generation = arrive(thread.block->grid->cluster_meeting, true);
}

inline void cluster_wait() {
  const Unwatched unwatched;
  Thread& thread = *current;
  if (!thread.in_cluster_barrier) misuse("a thread waits for a cluster barrier where it did not arrive");
  thread.in_cluster_barrier = false;
  wait(thread.block->grid->cluster_meeting, thread.cluster_generation, true);
}

template <typename Element>
Element* of_rank(Element* local, unsigned rank) {
  const Unwatched unwatched;
  Block& block = *current->block;
  const auto offset = reinterpret_cast<std::uintptr_t>(local) - reinterpret_cast<std::uintptr_t>(block.shared);
  if (offset + sizeof(Element) > block.grid->shared_bytes) misuse("an address outside shared memory was mapped");
  if (rank != block.rank && block.grid->cluster_meeting.generation == 0) {
    misuse("another block's shared memory before any cluster barrier: on a GPU that block may not have started");
  }
  if (rank >= block.grid->cluster.size()) misuse("no block of rank " + std::to_string(rank) + " in the cluster");
  unsigned char* shared = block.grid->cluster[rank]->shared;
  if (!shared) misuse("shared memory of a block that has ended");
  return reinterpret_cast<Element*>(shared + offset);
}

inline void mbarrier_init(std::uint64_t* mbarrier, unsigned count) {
  const Unwatched unwatched;
  mbarrier_write(mbarrier, {.expected = count, .pending = count, .phase = 0, .bytes = 0});
}

inline void mbarrier_arrive_expect(std::uint64_t* mbarrier, unsigned bytes) {
  const Unwatched unwatched;
  order_before(mbarrier);
  MbarrierState state = mbarrier_read(mbarrier);
  if (state.pending == 0 || state.pending > state.expected) misuse("too many arrivals at an mbarrier");
  state.bytes = state.bytes + bytes;
  state.pending = state.pending - 1;
  mbarrier_write(mbarrier, state);
}

inline void mbarrier_wait(std::uint64_t* mbarrier, unsigned parity) {
  const Unwatched unwatched;
  Thread& thread = *current;
  thread.mbarrier = mbarrier;
  thread.parity = parity & 1;
  wait_until_ready(thread);
  order_after(mbarrier);
}

inline void bulk_load(void* shared, const void* global, unsigned bytes, std::uint64_t* mbarrier) {
  Grid& grid = *current->block->grid;
  const auto destination = reinterpret_cast<std::uintptr_t>(shared), source = reinterpret_cast<std::uintptr_t>(global);
  if (destination % 16 || source % 16 || bytes % 16 || bytes == 0) misuse("a bulk copy that is not made of 16-byte units");
  const auto offset = destination - reinterpret_cast<std::uintptr_t>(current->block->shared);
  if (offset + bytes > grid.shared_bytes) misuse("a bulk copy to outside shared memory");
  std::memset(shared, 0xff, bytes);
  const Unwatched unwatched;
  auto mark = std::make_unique<char>();
  order_before(mark.get());
  grid.copies.push_back({shared, global, {}, bytes, mbarrier, std::move(mark)});
}

inline void store_async(void* shared, unsigned rank, uint4 value, std::uint64_t* mbarrier) {
  auto* const destination = of_rank(static_cast<uint4*>(shared), rank);
  const Unwatched unwatched;
  auto mark = std::make_unique<char>();
  order_before(mark.get());
  current->block->grid->copies.push_back({destination, nullptr, value, 16, of_rank(mbarrier, rank), std::move(mark)});
}

template <typename Element>
Element atomic_add(Element* address, Element value) {
  return std::atomic_ref<Element>(*address).fetch_add(value, std::memory_order_acq_rel);
}

template <typename Value>
Value exchange_lanes(unsigned mask, Value value, unsigned source_lane) {
  const Unwatched unwatched;
  static_assert(sizeof(Value) <= 8);
  if (mask != 0xffffffffu) misuse("warp operations are emulated over whole warps only");
  Warp& warp = current->block->warps[current->index.x / 32];
  std::uint64_t* const values = warp.values[warp.meeting.generation & 1];
  std::memcpy(&values[current->index.x % 32], &value, sizeof(Value));
  wait(warp.meeting, arrive(warp.meeting, false), false);
  std::memcpy(&value, &values[source_lane % 32], sizeof(Value));
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  const Unwatched unwatched;
  if (mask != 0xffffffffu) misuse("warp operations are emulated over whole warps only");
  Warp& warp = current->block->warps[current->index.x / 32];
  std::uint64_t* const values = warp.values[warp.meeting.generation & 1];
  values[current->index.x % 32] = predicate;
  wait(warp.meeting, arrive(warp.meeting, false), false);
  unsigned bits = 0;
  const unsigned first = current->index.x / 32 * 32, threads = current->block->grid->block_size.x;
  for (unsigned lane = 0; lane < std::min(32u, threads - first); ++lane) bits |= (values[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}

template <unsigned (*get)()>
struct SpecialRegister {
  constexpr operator unsigned() const { return get(); }
};
inline unsigned thread_x() { return current->index.x; }
inline unsigned block_x() { return current->block->index.x; }
inline unsigned block_y() { return current->block->index.y; }
inline unsigned block_z() { return current->block->index.z; }
inline unsigned block_size_x() { return current->block->grid->block_size.x; }
inline unsigned grid_x() { return current->block->grid->size.x; }
inline unsigned grid_y() { return current->block->grid->size.y; }
inline unsigned grid_z() { return current->block->grid->size.z; }

}  // namespace hedgespec_emulator

inline constexpr struct {
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::thread_x> x;
} threadIdx;
inline constexpr struct {
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::block_x> x;
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::block_y> y;
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::block_z> z;
} blockIdx;
inline constexpr struct {
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::block_size_x> x;
} blockDim;
inline constexpr struct {
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::grid_x> x;
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::grid_y> y;
  hedgespec_emulator::SpecialRegister<hedgespec_emulator::grid_z> z;
} gridDim;

inline void __syncthreads() {
  const hedgespec_emulator::Unwatched unwatched;
  auto& meeting = hedgespec_emulator::current->block->meeting;
  hedgespec_emulator::wait(meeting, hedgespec_emulator::arrive(meeting, true), true);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) hedgespec_emulator::misuse("warp operations are emulated over whole warps only");
  const hedgespec_emulator::Unwatched unwatched;
  auto& meeting = hedgespec_emulator::current->block->warps[threadIdx.x / 32].meeting;
  hedgespec_emulator::wait(meeting, hedgespec_emulator::arrive(meeting, true), true);
}
template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return hedgespec_emulator::exchange_lanes(mask, value, static_cast<unsigned>(lane));
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return hedgespec_emulator::exchange_lanes(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return hedgespec_emulator::exchange_lanes(mask, value, lane < distance ? lane : lane - distance);
}
template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return hedgespec_emulator::exchange_lanes(mask, value, lane + distance > 31 ? lane : lane + distance);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return hedgespec_emulator::ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return hedgespec_emulator::ballot(mask, predicate) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = hedgespec_emulator::current_device();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto& of = hedgespec_emulator::devices().at(static_cast<std::size_t>(device)).second;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = of.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of.shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = of.shared + 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = of.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = of.capability % 10; break;
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  auto& allowed = hedgespec_emulator::permissions(reinterpret_cast<const void*>(kernel));
  const auto& device = hedgespec_emulator::devices()[static_cast<std::size_t>(hedgespec_emulator::current_device())].second;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device.shared) return cudaErrorInvalidValue;
    allowed.shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    allowed.large_clusters = value != 0;
  }
  return cudaSuccess;
}

inline unsigned hedgespec_cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}

// One number for the whole device; that a cluster must fit a GPC, whose sizes differ, is left out.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  const auto& device = hedgespec_emulator::devices()[static_cast<std::size_t>(hedgespec_emulator::current_device())].second;
  const int size = static_cast<int>(hedgespec_cluster_size(*config));
  const int by_shared = static_cast<int>((device.shared + 1024) / (config->dynamicSmemBytes + 1024));
  const int by_threads = static_cast<int>(2048 / config->blockDim.x);
  const bool runs = size >= device.smallest_cluster && size <= device.largest_cluster;
  *clusters = !runs ? 0 : device.processors * std::min(by_shared, by_threads) / size;
  return cudaSuccess;
}

// What was launched last, for tests (ctypes): which way a kernel's host code chose. With HEDGESPEC_EMULATED_DRY in the
// environment nothing runs, so that it can be asked about shapes that no emulator finishes.
struct HedgespecEmulatedLaunch {
  int blocks, cluster_size, threads, shared_bytes;
};
extern "C" {
__attribute__((weak, used)) HedgespecEmulatedLaunch hedgespec_emulated_launch{};
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto& device = hedgespec_emulator::devices()[static_cast<std::size_t>(hedgespec_emulator::current_device())].second;
  const auto allowed = hedgespec_emulator::permissions(reinterpret_cast<const void*>(kernel));
  hedgespec_emulator::Grid grid;
  grid.size = config->gridDim;
  grid.block_size = config->blockDim;
  grid.cluster_size = hedgespec_cluster_size(*config);
  grid.shared_bytes = config->dynamicSmemBytes;
  const bool fits = grid.size.x && grid.size.y && grid.size.z && grid.size.y < 65536 && grid.size.z < 65536 &&
                    grid.block_size.x && grid.block_size.x <= 1024 && grid.block_size.y == 1 && grid.block_size.z == 1 &&
                    grid.size.x % grid.cluster_size == 0;
  const bool may_cluster = grid.cluster_size <= static_cast<unsigned>(device.largest_cluster) &&
                           (grid.cluster_size <= 8 || allowed.large_clusters) &&
                           (grid.cluster_size == 1 || device.capability >= 90);
  if (!fits || !may_cluster || config->dynamicSmemBytes > static_cast<std::size_t>(allowed.shared)) {
    return cudaErrorInvalidConfiguration;
  }
  const std::uint64_t blocks = std::uint64_t{grid.size.x} * grid.size.y * grid.size.z;
  hedgespec_emulated_launch = {static_cast<int>(blocks), static_cast<int>(grid.cluster_size),
                               static_cast<int>(grid.block_size.x), static_cast<int>(grid.shared_bytes)};
  grid.kernel = [&] { kernel(arguments...); };
  if (!std::getenv("HEDGESPEC_EMULATED_DRY")) hedgespec_emulator::launch(grid);
  return cudaSuccess;
}
