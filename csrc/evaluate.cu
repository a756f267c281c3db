// Every drafter against the target, on a GPU: one launch, in one of two ways.
//
// Clusters (sm_90 and later). The vocabulary of a row is cut into one slice for each block of a cluster. A block's copy
// engine brings its slices of one row after another into a ring in shared memory: a target's row, then those of the drafters
// at its position. Each logit is read from memory once, whatever N is, and its exponential is taken once: a target's
// probabilities stay in shared memory for all its drafters, a drafter's exponentials in registers until its normaliser is
// known. Where a row needs the other blocks (the peak and the sum) each block stores its part into all the others' shared
// memory, asynchronously, and the next row's exponentials are taken while that travels: an exchange costs little more than
// its instructions.
//
// Splits (any GPU, and what the clusters cannot hold). Every row is cut into splits, a block for each, which writes a
// partial peak and sum to the workspace. The block that completes a drafter's pair of rows, by a count in the workspace,
// merges the partials and reads both rows again, from the L2 cache, for the overlap.
//
// Within a position the blocks of a cluster reduce through distributed shared memory: they run at the same time by
// construction, so a barrier in hardware is all they need. Across positions (the losses of a row need all its T positions)
// and across splits the last block to finish does the rest: those blocks need not run at the same time, so nobody may wait.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"
#include "hedgespec.h"

#if !defined(HEDGESPEC_THREADS)
#define HEDGESPEC_THREADS 384
#endif

namespace hedgespec {
namespace {

using device::Mbarrier;

// A thread takes quads of 4 neighbouring logits, and keeps them in registers. A quad is what one load brings (16 bytes of
// float32, 8 of a half type); neighbouring threads hold neighbouring quads, so loads from shared memory never meet in a
// bank, whatever the dtype. Two quads make a group, which a stage of the ring holds for every thread; the last is half
// empty.
constexpr int quads = 13;
constexpr int groups = (quads + 1) / 2;
constexpr int per_group = 8;
constexpr int per_thread = quads * 4;

// In clusters two rows are held at a time, one's exponentials and the next one's: 104 registers, and about 50 more. With 384
// threads a block a thread may have 168, so a block takes 19968 logits; with 512, 128 registers and 32 logits a thread,
// 16384. So 8 blocks hold a row of 159744, which takes in Qwen's 151936.
constexpr int cluster_threads = HEDGESPEC_THREADS;
constexpr int split_threads = HEDGESPEC_THREADS > 192 ? 192 : HEDGESPEC_THREADS;  // two blocks a multiprocessor, likewise

constexpr int largest_cluster = 16;
constexpr int most_stages = 40;
constexpr int records = 8;  // of pairs that wait to be scored, in each block
constexpr float log2_e = 1.44269504f;
constexpr int no_id = 0x7fffffff;

HEDGESPEC_HOST_DEVICE constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// What of a row a block sees, or of a distribution a whole row: the highest logit that is not masked out, the lowest id that
// holds it (no_id: there is none), the sum of exp2((logit - value) * scale).
struct alignas(16) Peak {
  float value;
  int id;
  float sum;
};

struct alignas(8) Candidate {
  float value;
  int id;  // a draft id; no_id: none
};

// One drafter at one position.
struct Pair {
  int drafter, row, position;
};

// Per-block constants of the cluster kernel.
struct ClusterPlan {
  int cluster_size, clusters;
  int target_slice, draft_slice;  // logits of a block, multiples of 8
  int stage_bytes, stages;
  int shared_bytes;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

__device__ __forceinline__ float load_logit(const unsigned char* row, Dtype dtype, std::int64_t index) {
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(row)[index];
  const unsigned bits = reinterpret_cast<const std::uint16_t*>(row)[index];
  return dtype == Dtype::bfloat16 ? device::widen_bfloat16(bits) : device::widen_float16(bits);
}

__device__ __forceinline__ const unsigned char* target_row(const EvaluateParams& params, int row, int position) {
  return static_cast<const unsigned char*>(params.target_logits) +
         (row * params.target_stride_batch + position * params.target_stride_position) * bytes_of(params.target_dtype);
}

__device__ __forceinline__ const unsigned char* drafter_row(const EvaluateParams& params, Pair at) {
  return static_cast<const unsigned char*>(params.drafter_logits) +
         (at.drafter * params.drafter_stride_drafter + at.row * params.drafter_stride_batch +
          at.position * params.drafter_stride_position) *
             bytes_of(params.drafter_dtype);
}

__device__ __forceinline__ int length_of(const EvaluateParams& params, int row) {
  if (!params.lengths) return static_cast<int>(params.positions);
  const std::int64_t length = params.lengths[row];
  return static_cast<int>(length < 0 ? 0 : length > params.positions ? params.positions : length);
}

__device__ __forceinline__ float target_threshold(const EvaluateParams& params, int row, int position) {
  return params.target_threshold ? params.target_threshold[row * params.positions + position] : -infinity();
}

__device__ __forceinline__ std::int64_t output_index(const EvaluateParams& params, Pair at) {
  return (at.drafter * params.batch + at.row) * params.positions + at.position;
}

__device__ __forceinline__ float drafter_threshold(const EvaluateParams& params, Pair at) {
  return params.drafter_threshold ? params.drafter_threshold[output_index(params, at)] : -infinity();
}

// For powers of two instead of e. A point mass (temperature 0) needs no exponentials; 1 keeps them finite.
__device__ __forceinline__ float exponent_scale(float temperature) {
  return temperature == 0.0f ? 1.0f : log2_e * device::reciprocal(temperature);
}

// One of these in every lane becomes what they make together, in every lane. Some lanes may hold nothing: {-inf, no_id, 0}.
__device__ __forceinline__ Peak merge_lanes(Peak mine, float scale) {
  Peak merged;
  merged.value = device::warp_max(mine.value);
  const bool any = merged.value > -infinity();
  merged.id = device::warp_min(any && mine.value == merged.value ? mine.id : no_id);
  merged.sum = device::warp_sum(any ? mine.sum * device::exp2_fast((mine.value - merged.value) * scale) : 0.0f);
  return merged;
}

__device__ __forceinline__ Peak no_peak() { return {-infinity(), no_id, 0.0f}; }

// The part of a row that a block has before it: from shared memory, in stages of `threads` groups each, or global memory.
template <int threads>
struct Tile {
  static constexpr int stage_logits = threads * per_group;

  const unsigned char* base;     // of the ring, or of the row's part
  int first, stages, stage_bytes;  // of the ring; stages = 0: no ring
  int size;                      // logits
  Dtype dtype;
  float threshold;
  int thread = device::opaque(static_cast<int>(threadIdx.x));

  // Where this thread's quad begins, in logits from the tile's first. Ids grow from quad to quad, and with the thread.
  __device__ __forceinline__ int quad_begin(int quad) const { return (quad * threads + thread) * 4; }

  __device__ __forceinline__ const unsigned char* stage(int group) const {
    if (stages == 0) return base + static_cast<std::int64_t>(group) * stage_logits * bytes_of(dtype);
    const int at = first + group;
    return base + (at < stages ? at : at - stages) * stage_bytes;
  }

  // Logit `index` of this thread's group, 0..7, or -inf where there is none or it is masked out.
  __device__ __forceinline__ float element(int group, int index) const {
    const int within = ((index >> 2) * threads + thread) * 4 + (index & 3);
    if (group * stage_logits + within >= size) return -infinity();
    const float value = load_logit(stage(group), dtype, within);
    return value >= threshold ? value : -infinity();
  }
  __device__ __forceinline__ int id_of(int group, int index) const {
    return quad_begin(group * 2 + (index >> 2)) + (index & 3);
  }
};

template <Dtype dtype, int threads, typename Wait>
__device__ __forceinline__ void load_vectors(const Tile<threads>& tile, const Wait& wait, float (&x)[per_thread]) {
#pragma unroll
  for (int group = 0; group < groups; ++group) {
    wait(group);
    const unsigned char* const stage = tile.stage(group);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int quad = group * 2 + half;
      if (quad >= quads) continue;
      float* const out = x + quad * 4;
      const int at = half * threads + tile.thread;  // in quads from the stage's first
      if (tile.quad_begin(quad) < tile.size) {
        if constexpr (dtype == Dtype::float32) {
          const float4 values = reinterpret_cast<const float4*>(stage)[at];
          out[0] = values.x, out[1] = values.y, out[2] = values.z, out[3] = values.w;
        } else {
          const uint2 bits = reinterpret_cast<const uint2*>(stage)[at];
          if constexpr (dtype == Dtype::bfloat16) {
            out[0] = device::widen_bfloat16(bits.x), out[1] = __uint_as_float(bits.x & 0xffff0000u);
            out[2] = device::widen_bfloat16(bits.y), out[3] = __uint_as_float(bits.y & 0xffff0000u);
          } else {
            out[0] = device::widen_float16(bits.x), out[1] = device::widen_float16(bits.x >> 16);
            out[2] = device::widen_float16(bits.y), out[3] = device::widen_float16(bits.y >> 16);
          }
        }
      } else {
        out[0] = out[1] = out[2] = out[3] = -infinity();
      }
    }
  }
}

// Whatever the alignment.
template <int threads>
__device__ __forceinline__ void load_singles(const Tile<threads>& tile, float (&x)[per_thread]) {
#pragma unroll
  for (int i = 0; i < per_thread; ++i) {
    const int group = i / per_group, within = (i % per_group / 4 * threads + tile.thread) * 4 + i % 4;
    const bool inside = group * Tile<threads>::stage_logits + within < tile.size;
    x[i] = inside ? load_logit(tile.stage(group), tile.dtype, within) : -infinity();
  }
}

// The choice stands outside of the loops: nothing in them depends on the dtype.
template <int threads, typename Wait>
__device__ __forceinline__ void load_tile(const Tile<threads>& tile, const Wait& wait, float (&x)[per_thread]) {
  if (tile.dtype == Dtype::bfloat16) {
    load_vectors<Dtype::bfloat16>(tile, wait, x);
  } else if (tile.dtype == Dtype::float16) {
    load_vectors<Dtype::float16>(tile, wait, x);
  } else {
    load_vectors<Dtype::float32>(tile, wait, x);
  }
}

template <int threads>
__device__ __forceinline__ void mask_tile(const Tile<threads>& tile, float (&x)[per_thread]) {
  if (tile.threshold > -infinity()) {
#pragma unroll
    for (int i = 0; i < per_thread; ++i) x[i] = x[i] >= tile.threshold ? x[i] : -infinity();
  }
}

// Turns logits into exp2((logit - the warp's highest) * scale); returns the warp's peak, ids from the tile's first.
// A warp's own highest logit needs no barrier, and one multiplication corrects it once the row's is known.
template <int threads>
__device__ __forceinline__ Peak exponentials(const Tile<threads>& tile, float scale, float (&x)[per_thread]) {
  float best = -infinity();
  int best_group = 0;
#pragma unroll
  for (int group = 0; group < groups; ++group) {
    float highest = x[group * per_group];
#pragma unroll
    for (int i = group * per_group + 1; i < (group + 1) * per_group && i < per_thread; ++i) highest = fmaxf(highest, x[i]);
    if (highest > best) best = highest, best_group = group;
  }
  Peak peak;
  peak.value = device::warp_max(best);
  const bool any = peak.value > -infinity();
  const float shift = any ? peak.value : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int quad = 0; quad < quads; ++quad) {
    float* const e = x + quad * 4;
    if (quad * threads * 4 < tile.size) {  // the same for all threads
      // The highest logit goes first, so that no scale, however large, can overflow.
#pragma unroll
      for (int i = 0; i < 4; ++i) e[i] = device::exp2_fast((e[i] - shift) * scale);
      sum += (e[0] + e[1]) + (e[2] + e[3]);
    } else {
      e[0] = e[1] = e[2] = e[3] = 0.0f;
    }
  }
  peak.sum = device::warp_sum(sum);
  // Few lanes hold the highest logit: they look for it once more instead of all lanes carrying ids along.
  int id = no_id;
  if (any && best == peak.value) {
    int index = 0;
    while (index < per_group - 1 && tile.element(best_group, index) != best) ++index;
    id = tile.id_of(best_group, index);
  }
  peak.id = device::warp_min(id);
  return peak;
}

// Whether a candidate comes after another, likeliest first, ties by id.
__device__ __forceinline__ bool comes_after(float value, int id, Candidate other) {
  return value < other.value || (value == other.value && id > other.id);
}

// The warp's `count` likeliest candidates, in order, ids from `first_id` on: rounds of a warp-wide argmax, in which the lane
// that gave the winner looks for its next best one. Each lane keeps the best that is left in each of its groups.
template <int threads>
__device__ __forceinline__ void top_of_warp(const Tile<threads>& tile, int first_id, int count, Candidate* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto best_after = [&](int group, Candidate taken) {
    Candidate best{-infinity(), no_id};
#pragma unroll 1
    for (int index = 0; index < per_group; ++index) {
      const float value = tile.element(group, index);
      const int id = first_id + tile.id_of(group, index);
      if (value > best.value && comes_after(value, id, taken)) best = {value, id};
    }
    return best;
  };
  Candidate left[groups];
#pragma unroll
  for (int group = 0; group < groups; ++group) left[group] = best_after(group, {infinity(), -1});
  for (int round = 0; round < count; ++round) {
    Candidate mine = left[0];
    int from = 0;
#pragma unroll
    for (int group = 1; group < groups; ++group) {
      if (left[group].value > mine.value) mine = left[group], from = group;
    }
    const float value = device::warp_max(mine.value);
    const int id = device::warp_min(mine.value == value ? mine.id : no_id);
    if (lane == 0) out[round] = {value, id};
    if (mine.id == id && id != no_id) {
      const Candidate next = best_after(from, mine);
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        if (group == from) left[group] = next;
      }
    }
  }
}

// The `count` likeliest of `size` candidates in any order, by one warp; lane i returns the i-th.
__device__ __forceinline__ Candidate select(const Candidate* candidates, int size, int count) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Candidate taken{infinity(), -1}, mine{-infinity(), no_id};
  for (int round = 0; round < count; ++round) {
    Candidate best{-infinity(), no_id};
    for (int i = lane; i < size; i += 32) {
      const Candidate other = candidates[i];
      if (comes_after(other.value, other.id, taken) && !comes_after(other.value, other.id, best)) best = other;
    }
    const float value = device::warp_max(best.value);
    const int id = device::warp_min(best.value == value ? best.id : no_id);
    taken = {value, id};
    if (lane == round) mine = taken;
  }
  return mine;
}

// A row's distribution: softmax((logits - peak) * scale), or a point mass on the peak.
struct Law {
  Peak peak;
  float scale;  // 1 / temperature; 0 for a point mass
  float threshold;

  __device__ __forceinline__ bool empty() const { return peak.id == no_id; }
  __device__ __forceinline__ bool point_mass() const { return scale == 0.0f; }
  __device__ __forceinline__ double log_prob(float logit, std::int64_t id) const {
    const double impossible = -infinity();
    if (empty()) return impossible;
    if (point_mass()) return id == peak.id ? 0.0 : impossible;
    if (logit < threshold) return impossible;
    return static_cast<double>((logit - peak.value) * scale) - log(static_cast<double>(peak.sum));
  }
};

__device__ __forceinline__ Law law(Peak peak, float temperature, float threshold) {
  return {peak, temperature == 0.0f ? 0.0f : device::reciprocal(temperature), threshold};
}

// What the passes over the vocabulary found for a pair. `token_id` and `peak_id` are the draft ids that mean the emitted
// token and the target's most likely one; -1: none.
struct Found {
  Peak target, draft;
  float overlap;
  int token_id, peak_id;
};

// The losses of the pair's row and drafter, if it was the last of their T positions. By the warp that wrote the pair's
// outputs.
__device__ __forceinline__ void finish_losses(const EvaluateParams& params, unsigned* counters, Pair at) {
  if (params.draft_length == 0) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t line = at.drafter * params.batch + at.row;
  unsigned before = 0;
  __syncwarp();  // lane 0 makes known what all have written
  if (lane == 0) before = device::count_up(counters + line);
  before = __shfl_sync(device::whole_warp, before, 0);
  if (before != static_cast<unsigned>(params.positions - 1)) return;
  __syncwarp();  // what lane 0 has acquired, all have
  if (lane == 0) counters[line] = 0;  // for the next launch
  const float* const prob = params.length_prob + line * params.positions;
  const float* const ratio = params.length_ratio + line * params.positions;
  const int length = length_of(params, at.row);
  for (std::int64_t start = lane; start < params.positions; start += 32) {
    float* const losses = params.length_losses + (line * params.positions + start) * params.draft_length;
    const float expected = length_losses(prob, ratio, start, length, params.draft_length, params.product_estimator, losses);
    if (start == 0) params.expected_accepted_length[line] = expected;
  }
}

__device__ __forceinline__ void write_scores(const EvaluateParams& params, Pair at, float prob, float ratio,
                                             float argmax_prob, float argmax_ratio) {
  if (threadIdx.x % 32) return;
  const std::int64_t out = output_index(params, at);
  params.acceptance_prob[out] = prob;
  params.acceptance_ratio[out] = ratio;
  params.argmax_acceptance_prob[out] = argmax_prob;
  params.argmax_acceptance_ratio[out] = argmax_ratio;
}

// By one warp, whose lane i has what the first i+1 candidates make.
__device__ __forceinline__ void write_candidates(const EvaluateParams& params, Pair at, float prob, float ratio) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane >= params.top_k) return;
  const std::int64_t plane = params.drafters * params.batch * params.positions;
  float* const out = params.top_k_acceptance + 2 * lane * plane + output_index(params, at);
  out[0] = prob;
  out[plane] = ratio;
}

// A pair past its row's length; by one warp.
HEDGESPEC_CALLED void finish_skipped(const EvaluateParams& params, unsigned* counters, Pair at) {
  write_scores(params, at, 0.0f, 0.0f, 0.0f, 0.0f);
  if (params.top_k) write_candidates(params, at, 0.0f, 0.0f);
  finish_losses(params, counters, at);
}

// The end of a pair, by one warp: every lane computes the same, but for the candidates, of which each lane has one.
HEDGESPEC_CALLED void finish(const EvaluateParams& params, unsigned* counters, Pair at, Found found,
                                       const Candidate* candidates, int candidate_count) {
  const std::int64_t where = at.row * params.positions + at.position;
  const unsigned char* const target_logits = target_row(params, at.row, at.position);
  const unsigned char* const draft_logits = drafter_row(params, at);
  const std::int32_t* const map =
      params.draft_to_target ? params.draft_to_target + at.drafter * params.draft_vocabulary : nullptr;
  const Law target = law(found.target, params.target_temperature.at(at.row), target_threshold(params, at.row, at.position));
  const Law draft = law(found.draft, params.drafter_temperature.at(at.row), drafter_threshold(params, at));
  const std::int64_t token = params.tokens[where];
  const bool known = token >= 0 && token < params.vocabulary;  // else nobody can emit it, and it is no address
  const auto target_log_prob = [&](std::int64_t id) {
    return target.log_prob(load_logit(target_logits, params.target_dtype, id), id);
  };
  const auto draft_log_prob = [&](std::int64_t id) {
    return id < 0 ? -static_cast<double>(infinity())
                  : draft.log_prob(load_logit(draft_logits, params.drafter_dtype, id), id);
  };

  double prob = 0.0, ratio = 0.0, argmax_prob = 0.0;
  float argmax_ratio = 0.0f;
  if (!target.empty() && !draft.empty()) {
    const std::int64_t proposal = map ? map[draft.peak.id] : draft.peak.id;
    argmax_prob = exp(target_log_prob(proposal));
    argmax_ratio = token == proposal ? 1.0f : 0.0f;
    prob = draft.point_mass() ? argmax_prob : target.point_mass() ? exp(draft_log_prob(found.peak_id)) : found.overlap;
    // In logarithms: q(x) / p(x) stays right where both underflow. p(x) = 0 gives 1 if q(x) > 0, else 0.
    const double log_draft = known ? draft_log_prob(found.token_id) : -static_cast<double>(infinity());
    if (log_draft > -static_cast<double>(infinity())) ratio = exp(fmin(0.0, log_draft - target_log_prob(token)));
  }
  write_scores(params, at, static_cast<float>(fmin(prob, 1.0)), static_cast<float>(ratio), static_cast<float>(argmax_prob),
               argmax_ratio);
  if (params.top_k) {
    const Candidate mine = select(candidates, candidate_count, static_cast<int>(params.top_k));
    double mass = 0.0;
    bool is_token = false;
    if (mine.id != no_id && !target.empty()) {
      const std::int64_t id = map ? map[mine.id] : mine.id;
      mass = exp(target_log_prob(id));
      is_token = id == token;
    }
    // One after another: rounding then leaves no prefix above the next, as a tree of sums could.
    const int lane = static_cast<int>(threadIdx.x % 32);
    double sum = 0.0, of_prefix = 0.0;
    for (int i = 0; i < params.top_k; ++i) {
      sum += __shfl_sync(device::whole_warp, mass, i);
      if (lane == i) of_prefix = sum;
    }
    const unsigned tokens = __ballot_sync(device::whole_warp, is_token);
    write_candidates(params, at, static_cast<float>(fmin(of_prefix, 1.0)), tokens << (31 - lane) ? 1.0f : 0.0f);
  }
  finish_losses(params, counters, at);
}

// Clusters.

// A row in the order of a cluster's work: for each of its positions the target's, then the drafters'. Its producer describes
// it once, in shared memory: fewer registers, and nobody else waits for what is looked up in global memory.
struct Row {
  const unsigned char* logits;  // this block's slice
  int begin, size;              // of the slice, in logits
  int stages, slot, parity;     // of the ring that it takes, the first of them, and of that one's mbarrier
  int number;                   // of the cluster's rows
  Dtype dtype;
  float scale, threshold;
  Pair at;     // the drafter means nothing for a target
  int serial;  // of the cluster's pairs; a target's is that of the drafter that follows
  bool is_target, exists;
};

// What is known of a pair, in the block that will score it.
struct Record {
  Pair at;
  Peak target, draft;
  float overlap[largest_cluster];  // by block, each written by that block
  int token_id[largest_cluster], peak_id[largest_cluster];
};

using ClusterTile = Tile<cluster_threads>;

// Brings rows into the ring. Kept in shared memory, used by one thread.
struct Producer {
  // The next row to describe.
  std::int64_t pair, end;
  Pair at;
  int length, serial, number;
  bool target_is_due;
  // Where the copies are: in row `row` of the queue at `group`, into `slot` of the ring, which has `empty` more.
  int row, group, slot, parity, empty;
};

constexpr int queue_length = most_stages + 4;  // the ring's rows, two that are worked on, one that is described ahead

// A block's shared memory but for what its size depends on.
struct Common {
  Mbarrier landed[most_stages];
  Mbarrier exchanged[2];  // of of_blocks
  Row queue[queue_length];
  Producer producer;
  Peak of_warps[2][cluster_threads / 32];  // of the row that is read, in turns
  Peak of_blocks[2][largest_cluster];      // likewise, written by every block of the cluster
  Peak target;                             // at the position that is worked on
  float overlap[2][cluster_threads / 32];  // of the row that is used, in turns
  int token_id[2][cluster_threads / 32], peak_id[2][cluster_threads / 32];
  Record record[records];
};

constexpr int common_bytes = round_up(sizeof(Common), 128);

// Lists of top_k candidates: of the warps, in turns, and of the blocks for each record.
constexpr int candidate_lists(int cluster_size) { return 2 * (cluster_threads / 32) + records * cluster_size; }

// The bytes of one stage of a row's slice: where they lie, and which of them a bulk copy can bring (16-byte units; a ragged
// row's few bytes before and after are loaded by threads). Shared memory keeps the address modulo 16.
struct StageBytes {
  const unsigned char* begin;
  const unsigned char* end;
  const unsigned char* copy_begin;
  const unsigned char* copy_end;
  int lead;  // begin % 16

  __device__ __forceinline__ StageBytes(const Row& row, int bytes, int group) {
    const int first = group * ClusterTile::stage_logits;
    const int count = row.size - first < ClusterTile::stage_logits ? row.size - first : ClusterTile::stage_logits;
    begin = row.logits + static_cast<std::int64_t>(first) * bytes;
    end = begin + (count > 0 ? count : 0) * bytes;
    lead = static_cast<int>(reinterpret_cast<std::uintptr_t>(begin) % 16);
    copy_begin = begin + (16 - lead) % 16;
    copy_end = end - reinterpret_cast<std::uintptr_t>(end) % 16;
    if (copy_begin > end) copy_begin = end;
    if (copy_end < copy_begin) copy_end = copy_begin;
  }
};

// One block's part in the work of a cluster: the pairs first..last-1, those of one position next to each other.
struct ClusterWorker {
  const EvaluateParams& params;
  const ClusterPlan& plan;
  unsigned* const counters;
  const int rank, warp, lane;

  static constexpr int warps = cluster_threads / 32;

  // Shared memory: Common, the target's probabilities, the ring, lists of candidates.
  __device__ __forceinline__ Common& common() const { return *reinterpret_cast<Common*>(device::shared_memory()); }
  __device__ __forceinline__ float* target_probs() const {
    return reinterpret_cast<float*>(device::shared_memory() + common_bytes);
  }
  __device__ __forceinline__ unsigned char* ring() const {
    return device::shared_memory() + common_bytes + plan.target_slice * 4;
  }
  __device__ __forceinline__ Candidate* candidates_of_warps(int of_turn) const {
    return reinterpret_cast<Candidate*>(ring() + plan.stages * plan.stage_bytes) +
           of_turn * warps * static_cast<int>(params.top_k);
  }
  __device__ __forceinline__ Candidate* candidates_of_record(int serial) const {
    return candidates_of_warps(2) + record_index(serial) * plan.cluster_size * static_cast<int>(params.top_k);
  }

  // Where a pair is scored: in the block of rank `serial % cluster_size`, so that all blocks share that work.
  __device__ __forceinline__ int owner(int serial) const { return serial % plan.cluster_size; }
  __device__ __forceinline__ int record_index(int serial) const { return serial / plan.cluster_size % records; }

  // The producer: the last warp's first lane, as warps 0 and 1 have other work between rows.

  __device__ __forceinline__ bool produces() const { return threadIdx.x == cluster_threads - 32; }

  __device__ __forceinline__ void start_production(std::int64_t first, std::int64_t last) const {
    Producer& state = common().producer;
    const std::int64_t position = first / params.drafters;
    state.pair = first;
    state.end = last;
    state.at = {static_cast<int>(first % params.drafters), static_cast<int>(position / params.positions),
                static_cast<int>(position % params.positions)};
    state.length = first < last ? length_of(params, state.at.row) : 0;
    state.serial = state.number = 0;
    state.target_is_due = true;
    state.row = state.group = state.slot = state.parity = 0;
    state.empty = plan.stages;
    describe_row(state, common().queue[0]);
    produce(0);
  }

  __device__ __forceinline__ void next_position(Producer& state) const {
    state.at.drafter = 0;
    state.target_is_due = true;
    if (++state.at.position < params.positions) return;
    state.at.position = 0;
    ++state.at.row;
    if (state.pair < state.end) state.length = length_of(params, state.at.row);
  }

  __device__ __forceinline__ void describe_row(Producer& state, Row& row) const {
    while (state.pair < state.end && state.at.position >= state.length) {
      state.pair += params.drafters - state.at.drafter;
      next_position(state);
    }
    row.exists = state.pair < state.end;
    if (!row.exists) return;
    const bool is_target = state.target_is_due;
    row.is_target = is_target;
    row.at = state.at;
    row.serial = state.serial;
    const int width = is_target ? plan.target_slice : plan.draft_slice;
    const int vocabulary = static_cast<int>(is_target ? params.vocabulary : params.draft_vocabulary);
    const int begin = rank * width < vocabulary ? rank * width : vocabulary;
    row.begin = begin;
    row.size = vocabulary - begin < width ? vocabulary - begin : width;
    row.stages = (width + ClusterTile::stage_logits - 1) / ClusterTile::stage_logits;
    row.slot = state.slot;
    row.parity = state.parity;
    row.number = state.number++;
    row.dtype = is_target ? params.target_dtype : params.drafter_dtype;
    row.logits = (is_target ? target_row(params, state.at.row, state.at.position) : drafter_row(params, state.at)) +
                 static_cast<std::int64_t>(begin) * bytes_of(row.dtype);
    row.scale = exponent_scale((is_target ? params.target_temperature : params.drafter_temperature).at(state.at.row));
    row.threshold =
        is_target ? target_threshold(params, state.at.row, state.at.position) : drafter_threshold(params, state.at);
    if (is_target) {
      state.target_is_due = false;
      return;
    }
    ++state.serial;
    ++state.pair;
    if (++state.at.drafter == params.drafters) next_position(state);
  }

  // Fills the ring, of which `freed` more stages are empty. Ends with the row after the last whole one described.
  __device__ __forceinline__ void produce(int freed) const {
    Producer& state = common().producer;
    state.empty += freed;
    device::fence_before_copies();  // the reads of what the stages held
    while (state.empty > 0) {
      const Row& row = common().queue[state.row];
      if (!row.exists) return;
      const StageBytes bytes(row, bytes_of(row.dtype), state.group);
      const unsigned copied = static_cast<unsigned>(bytes.copy_end - bytes.copy_begin);
      Mbarrier* const landed = common().landed + state.slot;
      device::mbarrier_arrive_expect(landed, copied);
      if (copied) {
        unsigned char* const stage = ring() + state.slot * plan.stage_bytes;
        device::bulk_load(stage + bytes.lead + (bytes.copy_begin - bytes.begin), bytes.copy_begin, copied, landed);
      }
      --state.empty;
      if (++state.slot == plan.stages) state.slot = 0, state.parity ^= 1;
      if (++state.group == row.stages) {
        state.group = 0;
        state.row = after(state.row);
        describe_row(state, common().queue[state.row]);
      }
    }
  }

  static __device__ __forceinline__ int after(int row) { return row + 1 < queue_length ? row + 1 : 0; }

  // The consumers: all threads.

  // Moves a row that does not consist of whole quads at aligned addresses to where it does: to the beginning of its stages,
  // padded with -inf. What the copies could not bring (at most 7 logits at either end of a stage) comes from global memory.
  template <typename Bits, typename StageAt, typename Wait>
  __device__ __forceinline__ void align(const Row& row, Bits minus_infinity, const StageAt& stage_at,
                                        const Wait& wait) const {
#pragma unroll 1
    for (int group = 0; group < row.stages; ++group) {
      const StageBytes bytes(row, sizeof(Bits), group);
      unsigned char* const stage = ring() + stage_at(group) * plan.stage_bytes;
      wait(group);
      Bits kept[per_group];
#pragma unroll
      for (int i = 0; i < per_group; ++i) {
        const unsigned char* const from = bytes.begin + (threadIdx.x + i * cluster_threads) * sizeof(Bits);
        kept[i] = minus_infinity;
        if (from >= bytes.end) continue;
        const bool copied = from >= bytes.copy_begin && from < bytes.copy_end;
        kept[i] = *reinterpret_cast<const Bits*>(copied ? stage + bytes.lead + (from - bytes.begin) : from);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < per_group; ++i) reinterpret_cast<Bits*>(stage)[threadIdx.x + i * cluster_threads] = kept[i];
    }
    device::fence_before_copies();  // of later rows into these stages
    __syncthreads();
  }

  // Reads the block's slice of the row from the ring into exponentials, and leaves the warps' peaks and candidates. Where
  // the row does not count it writes x all the same: or else, as the compiler sees it, the registers could still hold an
  // earlier row, and two rows would have to be kept everywhere.
  __device__ __forceinline__ void read(const Row& row, bool counts, float (&x)[per_thread]) const {
    const int slot = row.slot, turn = row.number % 2;
    const auto stage_at = [&](int group) { return slot + group < plan.stages ? slot + group : slot + group - plan.stages; };
    const auto wait = [&](int group) {
      if (!counts || group >= row.stages) return;
      const int parity = slot + group < plan.stages ? row.parity : row.parity ^ 1;
      device::mbarrier_wait(common().landed + stage_at(group), static_cast<unsigned>(parity));
    };
    ClusterTile tile;
    tile.base = ring();
    tile.first = slot;
    tile.stages = plan.stages;
    tile.stage_bytes = plan.stage_bytes;
    tile.size = counts ? row.size : 0;
    tile.dtype = row.dtype;
    tile.threshold = row.threshold;
    if (counts && (row.size % per_group || reinterpret_cast<std::uintptr_t>(row.logits) % 16)) {
      if (row.dtype == Dtype::float32) {
        align<std::uint32_t>(row, 0xff800000u, stage_at, wait);
      } else {
        align<std::uint16_t>(row, row.dtype == Dtype::bfloat16 ? 0xff80 : 0xfc00, stage_at, wait);
      }
    }
    load_tile(tile, wait, x);
    mask_tile(tile, x);
    Peak peak = exponentials(tile, row.scale, x);
    if (!counts) return;
    if (peak.id != no_id) peak.id += row.begin;
    if (lane == 0) common().of_warps[turn][warp] = peak;
    if (params.top_k && !row.is_target) {
      const int top_k = static_cast<int>(params.top_k);
      top_of_warp(tile, row.begin, top_k, candidates_of_warps(turn) + warp * top_k);
    }
  }

  // Once all warps have read: frees the row's stages, and tells every block of the cluster about this one's part of the row.
  __device__ __forceinline__ void post_peak(const Row& row) const {
    const int turn = row.number % 2;
    if (warp == 0) {
      Mbarrier* const exchanged = common().exchanged + turn;
      if (lane == 0) device::mbarrier_arrive_expect(exchanged, static_cast<unsigned>(plan.cluster_size) * 16);
      const Peak of_block = merge_lanes(lane < warps ? common().of_warps[turn][lane] : no_peak(), row.scale);
      if (params.draft_to_target) device::fence_cluster();  // this block's target probabilities are there for the others
      if (lane < plan.cluster_size) {
        const uint4 bits{__float_as_uint(of_block.value), static_cast<unsigned>(of_block.id),
                         __float_as_uint(of_block.sum), 0};
        device::store_async(&common().of_blocks[turn][rank], static_cast<unsigned>(lane), bits, exchanged);
      }
    }
    if (produces()) produce(row.stages);
    if (params.top_k && !row.is_target && warp == 1 % warps) {
      const int top_k = static_cast<int>(params.top_k);
      const Candidate mine = select(candidates_of_warps(turn), warps * top_k, top_k);
      Candidate* const list = candidates_of_record(row.serial) + rank * top_k;
      if (lane < top_k) *device::of_rank(list + lane, static_cast<unsigned>(owner(row.serial))) = mine;
    }
  }

  // Keeps a target's probabilities, or sums their overlap with a drafter's.
  __device__ __forceinline__ void use(const Row& row, float (&x)[per_thread]) const {
    const int turn = row.number % 2, thread = device::opaque(static_cast<int>(threadIdx.x));
    // When this returns, every block has read this row and used all rows before it: it stores its peak after that. So this
    // row may overwrite the target's probabilities, a drafter finds those of all the cluster, and the exchange of the next
    // row but one may overwrite this one's.
    device::mbarrier_wait_cluster(common().exchanged + turn, static_cast<unsigned>(row.number / 2 % 2));
    const Peak peak = merge_lanes(lane < plan.cluster_size ? common().of_blocks[turn][lane] : no_peak(), row.scale);
    const float shift = common().of_warps[turn][warp].value - peak.value;
    const float factor = peak.id == no_id ? 0.0f : device::exp2_fast(shift * row.scale) * device::reciprocal(peak.sum);
    if (row.is_target) {
      if (threadIdx.x == 0) common().target = peak;
#pragma unroll
      for (int quad = 0; quad < quads; ++quad) {
        const int at = (quad * cluster_threads + thread) * 4;
        if (at < plan.target_slice) {
          const float* const e = x + quad * 4;
          *reinterpret_cast<float4*>(target_probs() + at) =
              make_float4(e[0] * factor, e[1] * factor, e[2] * factor, e[3] * factor);
        }
      }
      return;
    }
    float sum = 0.0f;
    if (params.draft_to_target) {
      sum = mapped_overlap(row, factor, x);
    } else {
#pragma unroll
      for (int quad = 0; quad < quads; ++quad) {
        const int at = (quad * cluster_threads + thread) * 4;
        if (at < plan.target_slice) {
          const float4 p = *reinterpret_cast<const float4*>(target_probs() + at);
          sum += (fminf(p.x, x[quad * 4] * factor) + fminf(p.y, x[quad * 4 + 1] * factor)) +
                 (fminf(p.z, x[quad * 4 + 2] * factor) + fminf(p.w, x[quad * 4 + 3] * factor));
        }
      }
    }
    sum = device::warp_sum(sum);
    if (lane == 0) common().overlap[turn][warp] = sum;
    if (threadIdx.x == 0 && owner(row.serial) == rank) {
      Record& record = common().record[record_index(row.serial)];
      record.at = row.at;
      record.target = common().target;
      record.draft = peak;
    }
  }

  // A drafter with ids of its own finds the target's probabilities in the block that has them, through distributed shared
  // memory: 4 bytes of a probability that is ready, where a logit from the L2 cache would move 32 and cost an exponential.
  __device__ __forceinline__ float mapped_overlap(const Row& row, float factor, float (&x)[per_thread]) const {
    const std::int32_t* const map = params.draft_to_target + row.at.drafter * params.draft_vocabulary + row.begin;
    const bool aligned = reinterpret_cast<std::uintptr_t>(map) % 16 == 0;
    const std::int64_t token = params.tokens[row.at.row * params.positions + row.at.position];
    const int likeliest = common().target.id, size = row.size, thread = device::opaque(static_cast<int>(threadIdx.x));
    const float slices_per_id = device::reciprocal(static_cast<float>(plan.target_slice));
    float sum = 0.0f;
    int token_id = -1, peak_id = -1;
#pragma unroll
    for (int quad = 0; quad < quads; ++quad) {
      const int at = (quad * cluster_threads + thread) * 4;
      int ids[4] = {-1, -1, -1, -1};
      if (aligned && at + 4 <= size) {
        const uint4 four = *reinterpret_cast<const uint4*>(map + at);
        ids[0] = static_cast<int>(four.x), ids[1] = static_cast<int>(four.y);
        ids[2] = static_cast<int>(four.z), ids[3] = static_cast<int>(four.w);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at + i < size) ids[i] = map[at + i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (ids[i] < 0) continue;
        // A quotient by way of float32 is off by one at most.
        int holder = static_cast<int>(static_cast<float>(ids[i]) * slices_per_id);
        if (holder * plan.target_slice > ids[i]) --holder;
        if ((holder + 1) * plan.target_slice <= ids[i]) ++holder;
        const float* const there =
            device::of_rank(target_probs() + (ids[i] - holder * plan.target_slice), static_cast<unsigned>(holder));
        sum += fminf(*there, x[quad * 4 + i] * factor);
        if (ids[i] == token) token_id = row.begin + at + i;
        if (ids[i] == likeliest) peak_id = row.begin + at + i;
      }
    }
    token_id = device::warp_max(token_id);
    peak_id = device::warp_max(peak_id);
    if (lane == 0) {
      common().token_id[row.number % 2][warp] = token_id;
      common().peak_id[row.number % 2][warp] = peak_id;
    }
    return sum;
  }

  // Once all warps have used the row: tells the pair's owner.
  __device__ __forceinline__ void post_overlap(const Row& row) const {
    if (row.is_target || warp != 0) return;
    const int turn = row.number % 2;
    const float sum = device::warp_sum(lane < warps ? common().overlap[turn][lane] : 0.0f);
    int token_id = -1, peak_id = -1;
    if (params.draft_to_target) {
      token_id = device::warp_max(lane < warps ? common().token_id[turn][lane] : -1);
      peak_id = device::warp_max(lane < warps ? common().peak_id[turn][lane] : -1);
    }
    if (lane != 0) return;
    Record* const record =
        device::of_rank(common().record + record_index(row.serial), static_cast<unsigned>(owner(row.serial)));
    record->overlap[rank] = sum;
    record->token_id[rank] = token_id;
    record->peak_id[rank] = peak_id;
  }

  // Scores this block's pairs among first..last-1, a warp each. Memory latency and double precision: so it stands outside of
  // the pipeline, for as many pairs at once as there are records.
  __device__ __forceinline__ void score(int first, int last) const {
    const int size = plan.cluster_size;
    for (int serial = first + rank + warp * size; serial < last; serial += warps * size) {
      const Record& record = common().record[record_index(serial)];
      Found found;
      found.target = record.target;
      found.draft = record.draft;
      found.overlap = device::warp_sum(lane < size ? record.overlap[lane] : 0.0f);
      if (params.draft_to_target) {
        found.token_id = device::warp_max(lane < size ? record.token_id[lane] : -1);
        found.peak_id = device::warp_max(lane < size ? record.peak_id[lane] : -1);
      } else {
        found.token_id = static_cast<int>(params.tokens[record.at.row * params.positions + record.at.position]);
        found.peak_id = record.target.id;
      }
      finish(params, counters, record.at, found, candidates_of_record(serial), size * static_cast<int>(params.top_k));
    }
  }

  // One step of the pipeline: reads the next row, then uses the one before it (`index` in the queue; -1: there is none yet),
  // whose peaks have travelled meanwhile. False once there is no next row below `last`.
  __device__ __forceinline__ bool step(int& index, int next_index, int last, float (&x)[per_thread],
                                       float (&next)[per_thread]) const {
    const Row& next_row = common().queue[next_index];
    const bool more = next_row.exists && next_row.serial < last;
    read(next_row, more, next);
    if (index >= 0) use(common().queue[index], x);
    __syncthreads();
    if (more) post_peak(next_row);
    if (index >= 0) post_overlap(common().queue[index]);
    index = next_index;
    return more;
  }
};

__global__ void __launch_bounds__(cluster_threads, 1)
    evaluate_clusters(const __grid_constant__ EvaluateParams params, const __grid_constant__ ClusterPlan plan,
                      unsigned* counters) {
  if (!device::has_clusters) return;  // compiled for an older GPU: never launched
  const std::int64_t pairs = params.drafters * params.batch * params.positions;
  const std::int64_t cluster = blockIdx.x / static_cast<unsigned>(plan.cluster_size);
  const std::int64_t first = pairs * cluster / plan.clusters, last = pairs * (cluster + 1) / plan.clusters;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const ClusterWorker worker{params, plan, counters, static_cast<int>(device::cluster_rank()), warp, lane};

  if (worker.produces()) {
    for (int i = 0; i < plan.stages; ++i) device::mbarrier_init(worker.common().landed + i, 1);
    for (int i = 0; i < 2; ++i) device::mbarrier_init(worker.common().exchanged + i, 1);
    device::mbarrier_init_done();
    worker.start_production(first, last);
  }
  if (params.lengths) {
    const int step = plan.cluster_size * ClusterWorker::warps;
    for (std::int64_t pair = first + worker.rank * ClusterWorker::warps + warp; pair < last; pair += step) {
      const std::int64_t position = pair / params.drafters;
      const Pair at{static_cast<int>(pair % params.drafters), static_cast<int>(position / params.positions),
                    static_cast<int>(position % params.positions)};
      if (at.position >= length_of(params, at.row)) finish_skipped(params, counters, at);
    }
  }

  // Batches of as many pairs as there are records. The pipeline runs dry between them, which is seldom.
  const int batch = plan.cluster_size * records;
  int next = 0;  // in the queue
  for (int begin = 0;; begin += batch) {
    // All blocks have started, and scored the batch before: their shared memory may be written. The same among the threads
    // of a block, which find the mbarriers and the queue.
    device::sync_cluster();
    if (!worker.common().queue[next].exists) return;
    float x[per_thread], of_next[per_thread];
#pragma unroll
    for (float& value : x) value = 0.0f;
    int index = -1;
    // The moves cost a tenth of the loop's instructions. Two copies of its body whose registers swap roles do without, and
    // the compiler spills in them.
#pragma unroll 1
    while (worker.step(index, next, begin + batch, x, of_next)) {
      next = worker.after(next);
#pragma unroll
      for (int i = 0; i < per_thread; ++i) x[i] = of_next[i];
    }
    device::sync_cluster();  // what the blocks posted has arrived
    const Row& next_row = worker.common().queue[next];
    worker.score(begin, next_row.exists ? next_row.serial : worker.common().producer.serial);
  }
}

// Splits.

using SplitTile = Tile<split_threads>;
constexpr int split_logits = split_threads * per_thread;

// What a split leaves in the workspace, 0 before and after the launch.
struct alignas(16) Partial {
  Peak peak;
};

// The workspace. Every part is zero when a launch begins and when it has ended, so launches of any shapes share it.
struct Workspace {
  unsigned* of_lines;      // [N, B] positions that are done: for the losses
  unsigned* of_pairs;      // [B, T, N] splits that are done
  unsigned* of_positions;  // [B, T] pairs that have read the target's partials
  Partial* partials;       // [B, T, target splits + N * draft splits]
  Candidate* candidates;   // [B, T, N, draft splits, top_k]
  std::size_t bytes;
};

HEDGESPEC_HOST_DEVICE inline std::int64_t splits_of(std::int64_t vocabulary) {
  return (vocabulary + split_logits - 1) / split_logits;
}

HEDGESPEC_HOST_DEVICE inline Workspace workspace_of(const EvaluateParams& params, void* memory) {
  const std::int64_t positions = params.batch * params.positions, pairs = positions * params.drafters;
  const std::int64_t draft_splits = splits_of(params.draft_vocabulary);
  const std::int64_t partials = positions * splits_of(params.vocabulary) + pairs * draft_splits;
  std::size_t offset = 0;
  const auto take = [&](std::int64_t count, std::size_t size) {
    const std::size_t at = offset;
    offset += (static_cast<std::size_t>(count) * size + 15) / 16 * 16;
    return static_cast<unsigned char*>(memory) + at;
  };
  Workspace workspace;
  workspace.of_lines = reinterpret_cast<unsigned*>(take(params.drafters * params.batch, sizeof(unsigned)));
  workspace.of_pairs = reinterpret_cast<unsigned*>(take(pairs, sizeof(unsigned)));
  workspace.of_positions = reinterpret_cast<unsigned*>(take(positions, sizeof(unsigned)));
  workspace.partials = reinterpret_cast<Partial*>(take(partials, sizeof(Partial)));
  workspace.candidates = reinterpret_cast<Candidate*>(take(pairs * draft_splits * params.top_k, sizeof(Candidate)));
  workspace.bytes = offset;
  return workspace;
}

struct SplitShared {
  Peak of_warps[split_threads / 32];
  float overlap[split_threads / 32];
  int token_id[split_threads / 32], peak_id[split_threads / 32];
  unsigned completed;
};

struct SplitWorker {
  const EvaluateParams& params;
  const Workspace& workspace;
  SplitShared& shared;
  const int row, position;
  const int target_splits, draft_splits;

  __device__ __forceinline__ std::int64_t where() const { return row * params.positions + position; }
  __device__ __forceinline__ Partial* target_partials() const {
    return workspace.partials + where() * (target_splits + params.drafters * draft_splits);
  }
  __device__ __forceinline__ Partial* draft_partials(int drafter) const {
    return target_partials() + target_splits + static_cast<std::int64_t>(drafter) * draft_splits;
  }
  __device__ __forceinline__ Candidate* candidates(int drafter) const {
    return workspace.candidates + (where() * params.drafters + drafter) * draft_splits * params.top_k;
  }

  // Every warp merges all of a row's partials.
  static __device__ __forceinline__ Peak merge(const Partial* partials, int count, float scale) {
    Peak merged = no_peak();
    for (int first = 0; first < count; first += 31) {  // one lane carries what is merged so far
      const int at = first + static_cast<int>(threadIdx.x % 32);
      Peak mine = at < count && at < first + 31 ? partials[at].peak : no_peak();
      if (threadIdx.x % 32 == 31) mine = merged;
      merged = merge_lanes(mine, scale);
    }
    return merged;
  }

  // The block is the last of all splits of the drafter's row and the target's: scores the pair.
  __device__ __forceinline__ void complete(int drafter) const {
    const Pair at{drafter, row, position};
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const float target_scale = exponent_scale(params.target_temperature.at(row));
    const float draft_scale = exponent_scale(params.drafter_temperature.at(row));
    Found found;
    found.target = merge(target_partials(), target_splits, target_scale);
    found.draft = merge(draft_partials(drafter), draft_splits, draft_scale);

    float sum = 0.0f;
    int token_id = -1, peak_id = -1;
    const std::int64_t token = params.tokens[where()];
    if (found.target.id != no_id && found.draft.id != no_id) {
      const unsigned char* const target = target_row(params, row, position);
      const unsigned char* const draft = drafter_row(params, at);
      const float target_floor = target_threshold(params, row, position), draft_floor = drafter_threshold(params, at);
      const float target_log = log2f(found.target.sum), draft_log = log2f(found.draft.sum);
      // One exponential for both: the smaller probability has the smaller logarithm.
      const auto add = [&](float target_logit, float draft_logit) {
        const float log_target = (target_logit - found.target.value) * target_scale - target_log;
        const float log_draft = (draft_logit - found.draft.value) * draft_scale - draft_log;
        const float mass = device::exp2_fast(fminf(log_target, log_draft));
        sum += target_logit >= target_floor && draft_logit >= draft_floor ? mass : 0.0f;
      };
      const int size = static_cast<int>(params.draft_vocabulary);
      if (params.draft_to_target) {
        const std::int32_t* const map = params.draft_to_target + drafter * params.draft_vocabulary;
#pragma unroll 4
        for (int id = static_cast<int>(threadIdx.x); id < size; id += split_threads) {
          const int meant = map[id];
          add(load_logit(target, params.target_dtype, meant), load_logit(draft, params.drafter_dtype, id));
          if (meant == token) token_id = id;
          if (meant == found.target.id) peak_id = id;
        }
      } else {
#pragma unroll 4
        for (int id = static_cast<int>(threadIdx.x); id < size; id += split_threads) {
          add(load_logit(target, params.target_dtype, id), load_logit(draft, params.drafter_dtype, id));
        }
      }
    }
    sum = device::warp_sum(sum);
    if (lane == 0) shared.overlap[warp] = sum;
    if (params.draft_to_target) {
      token_id = device::warp_max(token_id);
      peak_id = device::warp_max(peak_id);
      if (lane == 0) shared.token_id[warp] = token_id, shared.peak_id[warp] = peak_id;
    }
    __syncthreads();
    if (warp == 0) {
      constexpr int warps = split_threads / 32;
      found.overlap = device::warp_sum(lane < warps ? shared.overlap[lane] : 0.0f);
      found.token_id = static_cast<int>(token);
      found.peak_id = found.target.id;
      if (params.draft_to_target) {
        found.token_id = device::warp_max(lane < warps ? shared.token_id[lane] : -1);
        found.peak_id = device::warp_max(lane < warps ? shared.peak_id[lane] : -1);
      }
      const int candidate_count = draft_splits * static_cast<int>(params.top_k);
      finish(params, workspace.of_lines, at, found, candidates(drafter), candidate_count);
      __syncwarp();
      clear(draft_partials(drafter), draft_splits);
      for (int i = lane; i < candidate_count; i += 32) candidates(drafter)[i] = {0.0f, 0};
      // The target's partials go with the last of the drafters that read them.
      unsigned readers = 0;
      if (lane == 0) readers = device::count_up(workspace.of_positions + where());
      readers = __shfl_sync(device::whole_warp, readers, 0);
      if (readers == static_cast<unsigned>(params.drafters - 1)) {
        __syncwarp();
        clear(target_partials(), target_splits);
        if (lane == 0) workspace.of_positions[where()] = 0;
      }
    }
    __syncthreads();
  }

  static __device__ __forceinline__ void clear(Partial* partials, int count) {
    for (int i = static_cast<int>(threadIdx.x % 32); i < count; i += 32) partials[i] = {{0.0f, 0, 0.0f}};
  }
};

__global__ void __launch_bounds__(split_threads, 2)
    evaluate_splits(const __grid_constant__ EvaluateParams params, const __grid_constant__ Workspace workspace) {
  const int target_splits = static_cast<int>(splits_of(params.vocabulary));
  const int draft_splits = static_cast<int>(splits_of(params.draft_vocabulary));
  const std::int64_t blocks = target_splits + params.drafters * draft_splits;  // of a position, the target's first
  const int in_position = static_cast<int>(blockIdx.x % blocks);
  const std::int64_t where = blockIdx.x / blocks;
  const int row = static_cast<int>(where / params.positions), position = static_cast<int>(where % params.positions);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const bool is_target = in_position < target_splits;
  const int drafter = is_target ? 0 : (in_position - target_splits) / draft_splits;
  const int split = is_target ? in_position : (in_position - target_splits) % draft_splits;
  const Pair at{drafter, row, position};
  if (position >= length_of(params, row)) {
    if (!is_target && split == 0 && warp == 0) finish_skipped(params, workspace.of_lines, at);
    return;
  }
  SplitShared& shared = *reinterpret_cast<SplitShared*>(device::shared_memory());
  Candidate* const of_warps = reinterpret_cast<Candidate*>(device::shared_memory() + round_up(sizeof(SplitShared), 16));
  const SplitWorker worker{params, workspace, shared, row, position, target_splits, draft_splits};

  const int begin = split * split_logits;
  const int left = static_cast<int>(is_target ? params.vocabulary : params.draft_vocabulary) - begin;
  SplitTile tile;
  tile.dtype = is_target ? params.target_dtype : params.drafter_dtype;
  tile.base = (is_target ? target_row(params, row, position) : drafter_row(params, at)) +
              static_cast<std::int64_t>(begin) * bytes_of(tile.dtype);
  tile.first = tile.stages = tile.stage_bytes = 0;
  tile.size = left < split_logits ? left : split_logits;
  tile.threshold = is_target ? target_threshold(params, row, position) : drafter_threshold(params, at);
  const float scale =
      exponent_scale(is_target ? params.target_temperature.at(row) : params.drafter_temperature.at(row));
  float x[per_thread];
  if (reinterpret_cast<std::uintptr_t>(tile.base) % 16 == 0 && tile.size % 4 == 0) {
    load_tile(tile, [](int) {}, x);
  } else {
    load_singles(tile, x);
  }
  mask_tile(tile, x);
  Peak peak = exponentials(tile, scale, x);
  if (peak.id != no_id) peak.id += begin;
  if (lane == 0) shared.of_warps[warp] = peak;
  const int top_k = is_target ? 0 : static_cast<int>(params.top_k);
  if (top_k) top_of_warp(tile, begin, top_k, of_warps + warp * top_k);
  __syncthreads();
  constexpr int warps = split_threads / 32;
  if (warp == 0) {
    const Peak merged = merge_lanes(lane < warps ? shared.of_warps[lane] : no_peak(), scale);
    if (lane == 0) (is_target ? worker.target_partials() : worker.draft_partials(drafter))[split] = {merged};
  }
  if (top_k && warp == warps - 1) {
    const Candidate mine = select(of_warps, warps * top_k, top_k);
    if (lane < top_k) worker.candidates(drafter)[split * top_k + lane] = mine;
  }
  __syncthreads();

  // A pair is complete when all splits of both its rows are. A target's split may complete many.
  const int first = is_target ? 0 : drafter, last = is_target ? static_cast<int>(params.drafters) : drafter + 1;
  for (int base = first; base < last; base += 32) {
    if (warp == 0) {
      bool completes = false;
      if (base + lane < last) {
        unsigned* const counter = workspace.of_pairs + where * params.drafters + base + lane;
        completes = device::count_up(counter) == static_cast<unsigned>(target_splits + draft_splits - 1);
        if (completes) *counter = 0;
      }
      const unsigned completed = __ballot_sync(device::whole_warp, completes);
      __syncwarp();
      if (lane == 0) shared.completed = completed;
    }
    __syncthreads();
    const unsigned completed = shared.completed;
    for (int i = 0; i < 32; ++i) {
      if (completed >> i & 1) worker.complete(base + i);
    }
    __syncthreads();
  }
}

// Host.

struct Device {
  int capability, processors, shared_bytes;
  // How many clusters of 1, 2, 4, 8, 16 blocks run at the same time, one block to a multiprocessor.
  std::array<int, 5> active_clusters;
};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("evaluate: ") + what + ": " + cudaGetErrorString(error));
}

cudaLaunchConfig_t cluster_launch(int clusters, int cluster_size, int shared_bytes, cudaStream_t stream,
                                  cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{static_cast<unsigned>(clusters * cluster_size), 1, 1};
  config.blockDim = dim3{cluster_threads, 1, 1};
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

Device describe(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  Device device{};
  device.capability = attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor);
  device.processors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (device.capability < 90) return device;
  check(cudaFuncSetAttribute(evaluate_clusters, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes),
        "dynamic shared memory");
  if (cudaFuncSetAttribute(evaluate_clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // clusters of 16 are not for this device: what is active of them says so
  }
  for (int i = 0, size = 1; i < 5; ++i, size *= 2) {
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = cluster_launch(1, size, device.shared_bytes, nullptr, &cluster);
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, evaluate_clusters, &config) == cudaSuccess) {
      device.active_clusters[static_cast<std::size_t>(i)] = active;
    } else {
      static_cast<void>(cudaGetLastError());  // this size cannot run here
    }
  }
  return device;
}

// Asked once for each device: the answers take microseconds, a launch does not.
const Device& current_device() {
  static std::mutex mutex;
  static std::vector<const Device*> known;  // kept for the life of the process
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<std::size_t>(index)) known.resize(static_cast<std::size_t>(index) + 1);
  if (!known[static_cast<std::size_t>(index)]) known[static_cast<std::size_t>(index)] = new Device(describe(index));
  return *known[static_cast<std::size_t>(index)];
}

// The clusters' size, number and share of the work; cluster_size 0: they cannot hold these rows.
//
// A multiprocessor holds one block (its registers are full), and the pairs are dealt out evenly to the clusters that run at
// the same time, so there are no waves, and no multiprocessors are left over but those that a cluster's size does not
// divide. Pairs of one position lie next to each other; a cluster whose share begins within a position reads that target
// once more, mostly from L2. What counts is the longest share: the logits that a block of it takes, in whole quads for all
// its threads, and what a row costs however short it is (its barriers, its reductions; an estimate).
//
// At N=7, T=9, B=1, V=151936 on 132 multiprocessors that is 16 clusters of 8 (128 blocks) with 4 pairs each, hence 5 or 6
// rows of 18992 logits a block: 190 to 230 KB of bfloat16, of which the ring keeps about 120 KB in flight (4.8 TB/s times a
// latency of 0.8 us asks for 30 KB a multiprocessor). A logit costs one exponential (16 a clock: 7500 clocks for 6 rows,
// 4 us), about ten other instructions (four warps a clock: 9400 clocks, 5 us) and 8 bytes of shared memory written and read
// (128 a clock: 7100 clocks, 4 us): these, and the 4.6 us that memory takes, overlap. Where 8 clusters of 16 run at the same
// time, they are about even (8 pairs each, 10 rows of 9496 logits). Worked out on paper: to be measured.
ClusterPlan plan_clusters(const EvaluateParams& params, const Device& device) {
  ClusterPlan best{};
  if (device.capability < 90 || params.vocabulary > largest_cluster * cluster_threads * per_thread ||
      params.draft_vocabulary > largest_cluster * cluster_threads * per_thread || params.drafters > (1 << 20)) {
    return best;
  }
  const int widest = params.target_dtype == Dtype::float32 || params.drafter_dtype == Dtype::float32 ? 4 : 2;
  const int stage_bytes = ClusterTile::stage_logits * widest + 32;  // room for an address modulo 16
  const std::int64_t pairs = params.drafters * params.batch * params.positions;
  std::int64_t best_cost = 0;
  for (int i = 0, size = 1; i < 5; ++i, size *= 2) {
    const std::int64_t active = device.active_clusters[static_cast<std::size_t>(i)];
    const auto slice = [&](std::int64_t vocabulary) {
      return round_up(static_cast<int>((vocabulary + size - 1) / size), per_group);
    };
    const int target_slice = slice(params.vocabulary), draft_slice = slice(params.draft_vocabulary);
    if (active == 0 || std::max(target_slice, draft_slice) > cluster_threads * per_thread) continue;
    const int lists = candidate_lists(size) * static_cast<int>(params.top_k) * static_cast<int>(sizeof(Candidate));
    const int fixed = common_bytes + target_slice * 4 + lists;
    const int stages = std::min((device.shared_bytes - fixed) / stage_bytes, most_stages);
    const int stages_of_row =
        (std::max(target_slice, draft_slice) + ClusterTile::stage_logits - 1) / ClusterTile::stage_logits;
    if (device.shared_bytes < fixed || stages < stages_of_row) continue;
    const std::int64_t clusters = std::min(active, pairs), share = (pairs + clusters - 1) / clusters;
    const std::int64_t targets = std::min(share, (share + params.drafters - 2) / params.drafters + 1);
    const int row_cost = size == 1 ? 1024 : 2048;
    constexpr int column = cluster_threads * 4;
    const std::int64_t cost = share * (round_up(draft_slice, column) + row_cost) +
                              targets * (round_up(target_slice, column) + row_cost);
    if (best.cluster_size && best_cost <= cost) continue;
    best_cost = cost;
    best = {size, static_cast<int>(clusters), target_slice, draft_slice, stage_bytes, stages, fixed + stages * stage_bytes};
  }
  return best;
}

}  // namespace

std::size_t evaluate_cuda_workspace_bytes(const EvaluateParams& params) { return workspace_of(params, nullptr).bytes; }

void evaluate_cuda(const EvaluateParams& params, void* memory, void* stream) {
  if (params.drafters * params.batch * params.positions == 0) return;
  const Workspace workspace = workspace_of(params, memory);
  const ClusterPlan plan = plan_clusters(params, current_device());
  if (plan.cluster_size) {
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = cluster_launch(plan.clusters, plan.cluster_size, plan.shared_bytes,
                                                     static_cast<cudaStream_t>(stream), &cluster);
    check(cudaLaunchKernelEx(&config, evaluate_clusters, params, plan, workspace.of_lines), "launch of clusters");
    return;
  }
  const std::int64_t blocks =
      params.batch * params.positions *
      (splits_of(params.vocabulary) + params.drafters * splits_of(params.draft_vocabulary));
  if (blocks > 0x7fffffff) throw std::runtime_error("evaluate: too many rows for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{static_cast<unsigned>(blocks), 1, 1};
  config.blockDim = dim3{split_threads, 1, 1};
  config.dynamicSmemBytes = static_cast<std::size_t>(round_up(sizeof(SplitShared), 16)) +
                            static_cast<std::size_t>(split_threads / 32 * params.top_k) * sizeof(Candidate);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, evaluate_splits, params, workspace), "launch of splits");
}

}  // namespace hedgespec
