// Kernels with one fault each, chosen by FAULT: what the emulator must not let pass. FAULT=0 is right.
// Prints the message of what was caught, or "right" or "wrong".

#include "device.cuh"

#include <cstdio>
#include <exception>

namespace device = hedgespec::device;

constexpr unsigned threads = 64;
constexpr int per_block = 128;

// Sums clusters of 4 slices of 128: copy, warp, block, cluster, and the last cluster to finish adds them all up.
__global__ void sum_slices(const float* in, float* out, unsigned* counter) {
  auto* const landed = reinterpret_cast<device::Mbarrier*>(device::shared_memory());
  auto* const of_warps = reinterpret_cast<float*>(device::shared_memory() + 16);
  auto* const of_blocks = reinterpret_cast<float*>(device::shared_memory() + 32);
  auto* const slice = reinterpret_cast<float*>(device::shared_memory() + 64);
  const unsigned rank = device::cluster_rank(), clusters = gridDim.x / device::cluster_size();
  if (threadIdx.x == 0) {
    device::mbarrier_init(landed, 1);
    device::mbarrier_init_done();
    device::mbarrier_arrive_expect(landed, per_block * 4);
    device::bulk_load(slice, in + blockIdx.x * per_block + (FAULT == 1), per_block * 4, landed);
  }
  if (FAULT != 2) device::sync_cluster();
  if (FAULT != 3) device::mbarrier_wait(landed, 0);
  float sum = 0.0f;
  for (unsigned i = threadIdx.x; i < per_block + (FAULT == 4); i += threads) sum += slice[i];
  sum = device::warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  if (FAULT == 5 ? threadIdx.x < 32 : FAULT != 6) __syncthreads();
  if (FAULT == 5 && threadIdx.x >= 32) __syncwarp(), device::mbarrier_wait(landed, 1);
  if (threadIdx.x == 0) *device::of_rank(of_blocks + rank, 0) = of_warps[0] + of_warps[1];
  if (FAULT != 7) device::sync_cluster();
  if (rank != 0 || threadIdx.x != 0) return;
  float total = 0.0f;
  for (unsigned i = 0; i < device::cluster_size(); ++i) total += of_blocks[i];
  out[1 + blockIdx.x / device::cluster_size()] = total;
  const unsigned before = FAULT == 8 ? (*counter)++ : device::count_up(counter);
  if (before != clusters - 1) return;
  for (unsigned i = 0; i < clusters; ++i) out[0] += out[1 + i];
}

int main() {
  alignas(16) static float in[12 * per_block + 4];
  for (float& value : in) value = 1.0f;
  float out[4] = {};
  unsigned counter = 0;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {4, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{12, 1, 1};
  config.blockDim = dim3{threads, 1, 1};
  config.dynamicSmemBytes = 64 + per_block * 4;
  config.attrs = &cluster;
  config.numAttrs = 1;
  try {
    cudaLaunchKernelEx(&config, sum_slices, static_cast<const float*>(in), static_cast<float*>(out), &counter);
    std::puts(out[0] == 12 * per_block ? "right" : "wrong");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
