// What the CUDA kernels use of the hardware, one small function each, and reductions made of them.
//
// Inline PTX on a GPU; where HEDGESPEC_EMULATED is defined, tests/emulator/cuda_emulator.h supplies the same on a CPU.
// Clusters, mbarriers and bulk copies need sm_90: below it those functions trap, and no kernel that calls them is launched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(HEDGESPEC_EMULATED)
#define HEDGESPEC_DEVICE inline
#define HEDGESPEC_CALLED [[gnu::noinline]] inline
#else
#define HEDGESPEC_DEVICE __device__ __forceinline__
#define HEDGESPEC_CALLED __device__ __noinline__  // off the hot path: its registers are no concern of the caller's
#endif

// Whether this compilation pass has clusters.
#if defined(HEDGESPEC_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define HEDGESPEC_HAS_CLUSTERS 1
#else
#define HEDGESPEC_HAS_CLUSTERS 0
#endif

namespace hedgespec::device {

inline constexpr unsigned whole_warp = 0xffffffffu;
inline constexpr bool has_clusters = HEDGESPEC_HAS_CLUSTERS;
using Mbarrier = std::uint64_t;  // in shared memory, 8-byte aligned

// Dynamic shared memory; bulk copies want 16-byte addresses, which it has.
HEDGESPEC_DEVICE unsigned char* shared_memory() {
#if defined(HEDGESPEC_EMULATED)
  return hedgespec_emulator::shared_memory();
#else
  extern __shared__ __align__(1024) unsigned char hedgespec_shared_memory[];
  return hedgespec_shared_memory;
#endif
}

#if !defined(HEDGESPEC_EMULATED)
HEDGESPEC_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Clusters. All threads of all blocks of the cluster arrive and wait; what a thread wrote before it arrived, to its own
// shared memory or another block's, is seen by every thread that has waited.

HEDGESPEC_DEVICE unsigned cluster_rank() {
#if defined(HEDGESPEC_EMULATED)
  return hedgespec_emulator::cluster_rank();
#else
  unsigned rank = 0;
#if HEDGESPEC_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
#endif
}

HEDGESPEC_DEVICE unsigned cluster_size() {
#if defined(HEDGESPEC_EMULATED)
  return hedgespec_emulator::cluster_size();
#else
  unsigned size = 1;
#if HEDGESPEC_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
#endif
}

HEDGESPEC_DEVICE void cluster_arrive() {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::cluster_arrive();
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}

HEDGESPEC_DEVICE void cluster_wait() {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::cluster_wait();
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

HEDGESPEC_DEVICE void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of `rank` keeps what this block keeps at `local`, an address in shared memory: loads and stores through it
// are distributed shared memory. That block must have started (a cluster barrier has passed) and must not have ended.
template <typename Element>
HEDGESPEC_DEVICE Element* of_rank(Element* local, unsigned rank) {
#if defined(HEDGESPEC_EMULATED)
  return hedgespec_emulator::of_rank(local, rank);
#elif HEDGESPEC_HAS_CLUSTERS
  std::uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<std::uint64_t>(local)), "r"(rank));
  return reinterpret_cast<Element*>(address);
#else
  __trap();
  return local;
#endif
}

// Mbarriers and bulk copies. A phase ends when `count` threads have arrived and every byte that they expect has landed.
// mbarrier_wait(b, parity) returns once the phase of that parity has ended; the first phase has parity 0.

HEDGESPEC_DEVICE void mbarrier_init(Mbarrier* mbarrier, unsigned count) {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::mbarrier_init(mbarrier, count);
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(count) : "memory");
#else
  __trap();
#endif
}

// After mbarrier_init by the same thread, before the block's barrier: makes the mbarriers known to the copy engine.
HEDGESPEC_DEVICE void mbarrier_init_done() {
#if !defined(HEDGESPEC_EMULATED) && HEDGESPEC_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` more of bulk copies.
HEDGESPEC_DEVICE void mbarrier_arrive_expect(Mbarrier* mbarrier, unsigned bytes) {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::mbarrier_arrive_expect(mbarrier, bytes);
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

#if HEDGESPEC_HAS_CLUSTERS && !defined(HEDGESPEC_EMULATED)
// Instructions are spelt out, scope included. try_wait sleeps for a while in hardware before it gives up.
#define HEDGESPEC_MBARRIER_WAIT(scope)                                                    \
  const std::uint32_t address = shared_address(mbarrier);                                 \
  unsigned done;                                                                          \
  do {                                                                                    \
    asm volatile(                                                                         \
        "{\n"                                                                             \
        ".reg .pred ended;\n"                                                             \
        "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 ended, [%1], %2;\n"   \
        "selp.u32 %0, 1, 0, ended;\n"                                                     \
        "}"                                                                               \
        : "=r"(done)                                                                      \
        : "r"(address), "r"(parity)                                                       \
        : "memory");                                                                      \
  } while (!done)
#elif defined(HEDGESPEC_EMULATED)
#define HEDGESPEC_MBARRIER_WAIT(scope) hedgespec_emulator::mbarrier_wait(mbarrier, parity)
#else
#define HEDGESPEC_MBARRIER_WAIT(scope) __trap()
#endif

HEDGESPEC_DEVICE void mbarrier_wait(Mbarrier* mbarrier, unsigned parity) { HEDGESPEC_MBARRIER_WAIT("cta"); }

// The same, where other blocks of the cluster count at the mbarrier: what they did before is seen too.
HEDGESPEC_DEVICE void mbarrier_wait_cluster(Mbarrier* mbarrier, unsigned parity) { HEDGESPEC_MBARRIER_WAIT("cluster"); }

#undef HEDGESPEC_MBARRIER_WAIT

// Orders this thread's ordinary accesses to shared memory before the copy engine's that follow.
HEDGESPEC_DEVICE void fence_before_copies() {
#if !defined(HEDGESPEC_EMULATED) && HEDGESPEC_HAS_CLUSTERS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Starts a copy by one thread; both addresses and `bytes` are multiples of 16. It completes on `mbarrier`.
HEDGESPEC_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* mbarrier) {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::bulk_load(shared, global, bytes, mbarrier);
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(mbarrier))
               : "memory");
#else
  __trap();
#endif
}

// Stores 16 bytes into the shared memory of another block of the cluster and counts them at an mbarrier beside them, which
// that block waits for: what is stored is seen there after mbarrier_wait, without a fence. Addresses of this block's own.
HEDGESPEC_DEVICE void store_async(void* shared, unsigned rank, uint4 value, Mbarrier* mbarrier) {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::store_async(shared, rank, value, mbarrier);
#elif HEDGESPEC_HAS_CLUSTERS
  asm volatile(
      "{\n"
      ".reg .b32 there, counted;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counted, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [counted];\n"
      "}" ::"r"(shared_address(shared)),
      "r"(shared_address(mbarrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
#else
  __trap();
#endif
}

// Orders what the block's threads did before (a block barrier between) before this thread's asynchronous stores that follow,
// for the other blocks of the cluster. Expensive: it waits for the whole memory system.
HEDGESPEC_DEVICE void fence_cluster() {
#if !defined(HEDGESPEC_EMULATED) && HEDGESPEC_HAS_CLUSTERS
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

// Global memory that other blocks of the same launch write.

// Counts up, and returns what the counter was. What the block wrote before (with a block barrier between, where other
// threads wrote) is seen by whoever counts later, and the other way round.
HEDGESPEC_DEVICE unsigned count_up(unsigned* counter) {
#if defined(HEDGESPEC_EMULATED)
  return hedgespec_emulator::atomic_add(counter, 1u);
#else
  unsigned before;
  asm volatile("fence.acq_rel.gpu;\natom.add.relaxed.gpu.global.u32 %0, [%1], 1;\nfence.acq_rel.gpu;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#endif
}

// Adds to a number in this block's shared memory that other threads add to as well.
HEDGESPEC_DEVICE void add_shared(float* sum, float value) {
#if defined(HEDGESPEC_EMULATED)
  hedgespec_emulator::atomic_add(sum, value);
#else
  atomicAdd(sum, value);
#endif
}

// `value`, of which the compiler knows nothing: what follows from it is computed where it is used, rather than once before a
// loop and then kept in registers that the loop has better use for.
HEDGESPEC_DEVICE int opaque(int value) {
#if !defined(HEDGESPEC_EMULATED)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Arithmetic.

// 2^x by the special function unit: relative error 2^-22, results below 2^-126 are 0, of -inf too.
HEDGESPEC_DEVICE float exp2_fast(float x) {
#if defined(HEDGESPEC_EMULATED)
  return x < -126.0f ? 0.0f : std::exp2(x);
#else
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

// 1 / x for x > 0, brought into the range of normal numbers. A division proper comes with a call for the cases that this
// excludes, and a call takes registers from all around it.
HEDGESPEC_DEVICE float reciprocal(float x) {
  x = fminf(fmaxf(x, 0x1p-126f), 0x1p126f);
#if defined(HEDGESPEC_EMULATED)
  return 1.0f / x;
#else
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return fmaf(fmaf(-x, value, 1.0f), value, value);  // one step of Newton's: what the approximation lacks
#endif
}

HEDGESPEC_DEVICE float widen_bfloat16(unsigned bits) { return __uint_as_float(bits << 16); }

// Of the lower half of `bits`.
HEDGESPEC_DEVICE float widen_float16(unsigned bits) {
#if defined(HEDGESPEC_EMULATED)
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<std::uint16_t>(bits)));
#else
  float value;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(value) : "r"(bits));
  return value;
#endif
}

// Over a warp; every lane gets the result. All 32 lanes take part.

HEDGESPEC_DEVICE float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(whole_warp, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

template <typename Value>
HEDGESPEC_DEVICE Value warp_sum(Value value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(whole_warp, value, lanes);
  return value;
}

HEDGESPEC_DEVICE int warp_min(int value) {
#if defined(HEDGESPEC_EMULATED)
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int other = __shfl_xor_sync(whole_warp, value, lanes);
    value = other < value ? other : value;
  }
  return value;
#else
  return __reduce_min_sync(whole_warp, value);
#endif
}

HEDGESPEC_DEVICE int warp_max(int value) {
#if defined(HEDGESPEC_EMULATED)
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int other = __shfl_xor_sync(whole_warp, value, lanes);
    value = other > value ? other : value;
  }
  return value;
#else
  return __reduce_max_sync(whole_warp, value);
#endif
}

}  // namespace hedgespec::device
