// Accepting a draft, on NVIDIA GPUs: one launch, nothing allocated.
//
// The blocks that share a row of the batch ("ranks") each own a slice of the vocabulary, in order. Every one measures its
// slice of all K+1 target rows and K draft rows: highest logit and sum of exponentials. Together they decide how far the draft
// is accepted, and leave one row to draw from. For that row every rank adds up its slice once more, now of the weights
// max(0, p - q), in segments; the rank in whose slice u * total lies looks into the one segment where it lies.
//
// From sm_90 the ranks are a cluster and meet in distributed shared memory. Before, they leave what they measured in the
// workspace and the last one to finish goes on alone, with all of the vocabulary as its slice: reading every logit is what
// costs, and that is still shared; a row of one's own, in turn, is read again from the L2 cache, once or twice.
//
// q on the target's ids lies in shared memory, a tile of the slice at a time (one tile for eight ranks and 151936 ids; more
// just mean that the draft row's map is walked again), so no size of the vocabulary needs memory of its own.

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"
#include "hedgespec.h"

#if !defined(HEDGESPEC_THREADS)
#define HEDGESPEC_THREADS 512
#endif

namespace hedgespec {
namespace {

constexpr int threads = HEDGESPEC_THREADS;
constexpr int warps = threads / 32;
constexpr int segment = 512;           // ids that one warp sums, and that the final search looks into
constexpr int rows_at_a_time = 16;     // measured between two barriers of the block
constexpr int largest_tile = 20480;    // ids: 80 KiB
constexpr int most_ranks = 32;         // a warp gathers what they measured, a lane each
constexpr int smallest_slice = 8 * threads;
constexpr std::size_t counter_bytes = 4096;  // at the workspace's start, in one place whatever the launch
constexpr int most_counted_rows = counter_bytes / sizeof(unsigned);

static_assert(warps <= 32, "one warp gathers what the warps measured");

// What some threads know of a row of logits.
struct Partial {
  double sum;      // of exponentials, relative to `peak`; those of a point mass are not taken
  double matched;  // that part of the sum which the map puts on the drafted token
  float peak;      // the highest logit, -inf where none is left
  int index;       // the lowest id that has it, of a point mass
};

// How the blocks divide the work; offsets are bytes of shared memory.
struct Plan {
  int ranks, slice, draft_slice, tile;
  unsigned measured, combined, of_warps, sums, totals, verdict, spread;
};

struct Verdict {
  int accepted;
  int token;     // that follows, or -1: it has yet to be drawn
  int removed;   // id without weight, or -1
  int subtract;  // whether the draft's probabilities are subtracted
  float peak, scale, threshold, inverse;
  float draft_peak, draft_scale, draft_threshold, draft_inverse;
};

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

HEDGESPEC_DEVICE float widen(float value) { return value; }
HEDGESPEC_DEVICE float widen(Bfloat16 value) { return device::widen_bfloat16(value.bits); }
HEDGESPEC_DEVICE float widen(Float16 value) { return device::widen_float16(value.bits); }

HEDGESPEC_DEVICE void unpack(uint4 raw, const float*, float (&values)[4]) {
  values[0] = __uint_as_float(raw.x);
  values[1] = __uint_as_float(raw.y);
  values[2] = __uint_as_float(raw.z);
  values[3] = __uint_as_float(raw.w);
}
template <typename Half>
HEDGESPEC_DEVICE void unpack(uint4 raw, const Half*, float (&values)[8]) {
  const unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = widen(Half{static_cast<std::uint16_t>(pairs[i] & 0xffffu)});
    values[2 * i + 1] = widen(Half{static_cast<std::uint16_t>(pairs[i] >> 16)});
  }
}

// body(pointer of the right type)
template <typename Body>
HEDGESPEC_DEVICE void with_type(const void* logits, Dtype dtype, Body body) {
  if (dtype == Dtype::float32) {
    body(static_cast<const float*>(logits));
  } else if (dtype == Dtype::bfloat16) {
    body(static_cast<const Bfloat16*>(logits));
  } else {
    body(static_cast<const Float16*>(logits));
  }
}

HEDGESPEC_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
HEDGESPEC_DEVICE int least(int a, int b) { return a < b ? a : b; }

// look(values[width]) and then take(values[width], id of the first) for all logits from begin to end, in ascending order for
// each thread, with settle() between: some vectors are looked at, then all of them are taken. Rows start at any address:
// what lies outside whole 16-byte vectors comes one by one.
template <typename Logit, typename Look, typename Settle, typename Take>
HEDGESPEC_DEVICE void visit_all(const Logit* row, int begin, int end, Look look, Settle settle, Take take) {
  constexpr int width = 16 / sizeof(Logit);
  constexpr int in_flight = width == 4 ? 4 : 3;  // vectors; what the registers hold
  const int thread = threadIdx.x, size = end - begin;
  const Logit* const start = row + begin;
  const int past_boundary = static_cast<int>(reinterpret_cast<std::uintptr_t>(start) % 16 / sizeof(Logit));
  const int head = least((width - past_boundary) % width, size);
  const int vectors = (size - head) / width, tail = head + vectors * width;
  const auto visit_one = [&](int at) {
    const float value[1] = {widen(start[at])};
    look(value);
    settle();
    take(value, begin + at);
  };
  if (thread < head) visit_one(thread);
  const uint4* const body = reinterpret_cast<const uint4*>(start + head);
  for (int first = thread; first < vectors; first += in_flight * threads) {
    uint4 raw[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads < vectors) raw[i] = body[first + i * threads];
    }
    // Unpacked twice: that is cheaper than the registers which would keep the values.
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads >= vectors) break;
      float values[width];
      unpack(raw[i], row, values);
      look(values);
    }
    settle();
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads >= vectors) break;
      float values[width];
      unpack(raw[i], row, values);
      take(values, begin + head + (first + i * threads) * width);
    }
  }
  if (tail + thread < size) visit_one(tail + thread);
}

HEDGESPEC_DEVICE Partial nothing() { return {0.0, 0.0, minus_infinity(), INT_MAX}; }

// What a thread finds of a point mass between two ids of a row.
HEDGESPEC_DEVICE Partial find_peak(const void* logits, Dtype dtype, int begin, int end, float threshold) {
  Partial best = nothing();
  const auto take = [&]<int width>(const float(&values)[width], int id) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (values[i] >= threshold && values[i] > best.peak) {
        best.peak = values[i];
        best.index = id + i;
      }
    }
  };
  with_type(logits, dtype, [&](auto* row) {
    visit_all(row, begin, end, []<int width>(const float(&)[width]) {}, [] {}, take);
  });
  return best;
}

// What a thread finds of a softmax between two ids of a row, in one pass: the sum is brought down to each new peak. With a
// map, `ids`, it also adds up what is mapped to `token`.
HEDGESPEC_DEVICE Partial add_up(const void* logits, Dtype dtype, int begin, int end, float threshold, float scale,
                                const std::int32_t* ids, std::int64_t token) {
  // Logits below the threshold may set the peak while there is no other: they are lower than whatever has mass.
  float peak = minus_infinity(), highest = minus_infinity(), shift = 0.0f, sum = 0.0f, matched = 0.0f;
  const auto look = [&]<int width>(const float(&values)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) highest = values[i] > highest ? values[i] : highest;
  };
  const auto settle = [&] {
    if (!(highest > peak)) return;
    const float height = peak > minus_infinity() ? device::exp2_fast((peak - highest) * scale) : 0.0f;
    sum *= height;
    matched *= height;
    peak = shift = highest;  // `shift` stays 0 while all is -inf: the difference of two would be NaN
  };
  const auto mass_of = [&](float logit) {
    return logit >= threshold ? device::exp2_fast((logit - shift) * scale) : 0.0f;
  };
  const auto take = [&]<int width>(const float(&values)[width], int) {
#pragma unroll
    for (int i = 0; i < width; ++i) sum += mass_of(values[i]);
  };
  with_type(logits, dtype, [&](auto* row) {
    visit_all(row, begin, end, look, settle, take);
    if (!ids) return;
#pragma unroll 4
    for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += threads) {
      if (ids[id] != token) continue;
      const float logit = widen(row[id]);
      highest = logit > highest ? logit : highest;
      settle();
      matched += mass_of(logit);
    }
  });
  return {sum, matched, peak, INT_MAX};
}

// What the threads of a warp know together; `scale` is 0 for a point mass.
HEDGESPEC_DEVICE Partial merge(const Partial& own, float scale, bool mapped) {
  Partial all{0.0, 0.0, device::warp_max(own.peak), INT_MAX};
  if (scale == 0.0f) {
    all.index = device::warp_min(own.peak == all.peak ? own.index : INT_MAX);
    return all;
  }
  const double height = own.peak > minus_infinity() ? device::exp2_fast((own.peak - all.peak) * scale) : 0.0f;
  all.sum = device::warp_sum(own.sum * height);
  if (mapped) all.matched = device::warp_sum(own.matched * height);
  return all;
}

struct Place {
  int index;      // -1: there is no weight
  double before;  // the weights before it
};

// The smallest index whose cumulative weight exceeds `bound`; where rounding leaves none, the last that has weight. For a
// whole warp; `weight` is a pure function.
template <typename Weight>
HEDGESPEC_DEVICE Place locate(int size, double bound, Weight weight) {
  const int lane = threadIdx.x % 32, share = (size + 31) / 32;
  const int begin = least(lane * share, size), end = least(begin + share, size);
  double own = 0.0;
  for (int i = begin; i < end; ++i) own += weight(i);
  double through = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double lower = __shfl_up_sync(device::whole_warp, through, distance);
    if (lane >= distance) through += lower;
  }
  double before = __shfl_up_sync(device::whole_warp, through, 1);
  if (lane == 0) before = 0.0;
  const unsigned weighty = __ballot_sync(device::whole_warp, own > 0.0);
  const unsigned crossing = __ballot_sync(device::whole_warp, own > 0.0 && through > bound);
  if (!weighty) return {-1, 0.0};
  int chosen = __ffs(static_cast<int>(crossing)) - 1;
  if (!crossing) {
    for (chosen = 31; !(weighty >> chosen & 1u);) --chosen;
  }
  Place place{-1, before};
  if (lane == chosen) {
    double cumulative = before;
    for (int i = begin; i < end; ++i) {
      const double own_weight = weight(i);
      if (!(own_weight > 0.0)) continue;
      place = {i, cumulative};
      cumulative += own_weight;
      if (cumulative > bound) break;
    }
  }
  return {__shfl_sync(device::whole_warp, place.index, chosen), __shfl_sync(device::whole_warp, place.before, chosen)};
}

// 1 / temperature, never infinite or 0, for 0 * inf would be NaN.
HEDGESPEC_DEVICE double rate_of(float temperature) {
  return 1.0 / (temperature < FLT_MIN ? FLT_MIN : temperature > FLT_MAX ? FLT_MAX : temperature);
}

// What logits are multiplied by under an exponential of base 2; 0 stands for a point mass.
HEDGESPEC_DEVICE float scale_of(float temperature) {
  return temperature == 0.0f ? 0.0f : static_cast<float>(rate_of(temperature) * 1.4426950408889634);
}

template <bool clustered>
class Verifier {
 public:
  HEDGESPEC_DEVICE Verifier(const VerifyParams& params, const Plan& plan, void* workspace)
      : params_(params),
        plan_(plan),
        batch_row_(static_cast<int>(blockIdx.x) / plan.ranks),
        rank_(static_cast<int>(blockIdx.x) % plan.ranks),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        scale_(scale_of(params.target_temperature.at(batch_row_))),
        draft_scale_(scale_of(params.draft_temperature.at(batch_row_))),
        workspace_(static_cast<unsigned char*>(workspace)) {
    length_ = static_cast<int>(params.draft_length);
    if (params.lengths) {
      const std::int64_t given = params.lengths[batch_row_];
      length_ = given < 0 ? 0 : given < length_ ? static_cast<int>(given) : length_;
    }
    rows_ = length_ + 1 + (params.draft_logits && scale_ != 0.0f ? length_ : 0);
  }

  HEDGESPEC_DEVICE void run() {
    measure_rows();
    if (!meet()) return;
    combine_rows();
    decide();
    emit_known();
    Verdict verdict = *verdict_();
    if (verdict.token < 0) draw(verdict);
    if constexpr (clustered) device::sync_cluster();  // nobody ends while others may read its shared memory
  }

 private:
  template <typename Element>
  HEDGESPEC_DEVICE Element* at(unsigned offset) const {
    return reinterpret_cast<Element*>(device::shared_memory() + offset);
  }
  HEDGESPEC_DEVICE Verdict* verdict_() const { return at<Verdict>(plan_.verdict); }

  // What this rank measured goes to its own shared memory, or to the workspace.
  HEDGESPEC_DEVICE Partial* measured(int rank, int row) const {
    if constexpr (clustered) return device::of_rank(at<Partial>(plan_.measured) + row, static_cast<unsigned>(rank));
    const std::int64_t rows = 2 * params_.draft_length + 1;
    return reinterpret_cast<Partial*>(workspace_ + counter_bytes) + (batch_row_ * plan_.ranks + rank) * rows + row;
  }

  HEDGESPEC_DEVICE int vocabulary() const { return static_cast<int>(params_.vocabulary); }
  HEDGESPEC_DEVICE int draft_vocabulary() const { return static_cast<int>(params_.draft_vocabulary); }
  HEDGESPEC_DEVICE const std::int32_t* map() const {
    return params_.draft_to_target ? params_.draft_to_target + batch_row_ * params_.map_stride_batch : nullptr;
  }

  // Rows are numbered: the target's positions first, then the draft's.
  HEDGESPEC_DEVICE bool is_draft(int row) const { return row > length_; }
  HEDGESPEC_DEVICE Partial merge_of(int row, const Partial& own) const {
    return merge(own, is_draft(row) ? draft_scale_ : scale_, is_draft(row) && params_.draft_to_target);
  }

  HEDGESPEC_DEVICE const void* target_logits(int position) const {
    const std::int64_t offset = batch_row_ * params_.target_stride_batch + position * params_.target_stride_position;
    return static_cast<const char*>(params_.target_logits) + offset * (params_.target_dtype == Dtype::float32 ? 4 : 2);
  }
  HEDGESPEC_DEVICE const void* draft_logits(int position) const {
    const std::int64_t offset = batch_row_ * params_.draft_stride_batch + position * params_.draft_stride_position;
    return static_cast<const char*>(params_.draft_logits) + offset * (params_.draft_dtype == Dtype::float32 ? 4 : 2);
  }
  HEDGESPEC_DEVICE float target_threshold(int position) const {
    const std::int64_t row = batch_row_ * (params_.draft_length + 1) + position;
    return params_.target_threshold ? params_.target_threshold[row] : minus_infinity();
  }
  HEDGESPEC_DEVICE float draft_threshold(int position) const {
    const std::int64_t row = batch_row_ * params_.draft_length + position;
    return params_.draft_threshold ? params_.draft_threshold[row] : minus_infinity();
  }
  HEDGESPEC_DEVICE std::int64_t drafted(int position) const {
    return params_.draft_tokens[batch_row_ * params_.draft_length + position];
  }
  HEDGESPEC_DEVICE double uniform(std::int64_t column) const {
    const std::int64_t index = batch_row_ * (params_.draft_length + 1) + column;
    return params_.uniforms_are_float64 ? static_cast<const double*>(params_.uniforms)[index]
                                        : static_cast<const float*>(params_.uniforms)[index];
  }

  HEDGESPEC_DEVICE void measure_rows() {
    Partial* const of_warps = at<Partial>(plan_.of_warps);
    for (int first = 0; first < rows_; first += rows_at_a_time) {
      const int last = least(first + rows_at_a_time, rows_);
      for (int row = first; row < last; ++row) {
        const Partial of_warp = merge_of(row, measure(row));
        if (lane_ == 0) of_warps[(row - first) * warps + warp_] = of_warp;
      }
      __syncthreads();
      for (int row = first + warp_; row < last; row += warps) {
        const Partial own = lane_ < warps ? of_warps[(row - first) * warps + lane_] : nothing();
        const Partial of_rank = merge_of(row, own);
        if (lane_ == 0) *measured(rank_, row) = of_rank;
      }
      __syncthreads();
    }
  }

  // This thread's share of a row's slice.
  HEDGESPEC_DEVICE Partial measure(int row) const {
    const bool draft = is_draft(row);
    const int position = draft ? row - length_ - 1 : row;
    const int size = draft ? draft_vocabulary() : vocabulary(), slice = draft ? plan_.draft_slice : plan_.slice;
    const int begin = least(rank_ * slice, size), end = least(begin + slice, size);
    const void* const logits = draft ? draft_logits(position) : target_logits(position);
    const Dtype dtype = draft ? params_.draft_dtype : params_.target_dtype;
    const float threshold = draft ? draft_threshold(position) : target_threshold(position);
    const float scale = draft ? draft_scale_ : scale_;
    if (scale == 0.0f) return find_peak(logits, dtype, begin, end, threshold);
    const std::int32_t* const ids = draft ? map() : nullptr;
    return add_up(logits, dtype, begin, end, threshold, scale, ids, ids ? drafted(position) : 0);
  }

  // Waits for the other ranks, or leaves the rest to the last of them: false where this block has nothing more to do.
  HEDGESPEC_DEVICE bool meet() {
    if constexpr (clustered) {
      device::sync_cluster();
      return true;
    }
    if (plan_.ranks > 1) {
      int* const last = at<int>(plan_.totals);
      if (threadIdx.x == 0) {  // measure_rows ended with a barrier
        unsigned* const counter = reinterpret_cast<unsigned*>(workspace_) + batch_row_;
        *last = device::count_up(counter) == static_cast<unsigned>(plan_.ranks) - 1;
        if (*last) *counter = 0;  // for the next launch
      }
      __syncthreads();
      if (!*last) return false;
      __syncthreads();
    }
    return true;
  }

  HEDGESPEC_DEVICE void combine_rows() const {
    for (int row = warp_; row < rows_; row += warps) {
      const Partial own = lane_ < plan_.ranks ? *measured(lane_, row) : nothing();
      const Partial whole = merge_of(row, own);
      if (lane_ == 0) at<Partial>(plan_.combined)[row] = whole;
    }
    __syncthreads();
  }

  // Probability of an id in a row that is no point mass, in float64 and from the logit.
  HEDGESPEC_DEVICE double prob(const void* logits, Dtype dtype, std::int64_t id, float threshold, float temperature,
                               const Partial& row) const {
    if (!(row.sum > 0.0)) return 0.0;
    float logit = 0.0f;
    with_type(logits, dtype, [&](auto* typed) { logit = widen(typed[id]); });
    return logit >= threshold ? exp((static_cast<double>(logit) - row.peak) * rate_of(temperature)) / row.sum : 0.0;
  }

  // Warp 0, a position a lane: every rank comes to the same verdict.
  HEDGESPEC_DEVICE void decide() const {
    if (warp_ == 0) {
      for (int first = 0;; first += 32) {
        const int position = first + lane_;
        Verdict verdict{};
        const bool stops = position <= length_ && stops_at(position, verdict);
        const unsigned stopping = __ballot_sync(device::whole_warp, stops);
        if (!stopping) continue;  // the bonus position stops everyone
        if (lane_ == __ffs(static_cast<int>(stopping)) - 1) *verdict_() = verdict;
        break;
      }
    }
    __syncthreads();
  }

  // Whether the token drafted here is rejected (or there is none, at the bonus position), and then what follows from.
  HEDGESPEC_DEVICE bool stops_at(int position, Verdict& verdict) const {
    const Partial target = at<Partial>(plan_.combined)[position];
    const bool tests = position < length_;
    const std::int64_t token = tests ? drafted(position) : -1;
    const int best = target.index < vocabulary() ? target.index : 0;
    if (scale_ == 0.0f) {
      verdict = {position, best, -1, 0, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
      return token != best;
    }
    verdict = {position,
               -1,
               -1,
               0,
               target.peak,
               scale_,
               target_threshold(position),
               target.sum > 0.0 ? static_cast<float>(1.0 / target.sum) : 0.0f,
               0.0f,
               0.0f,
               0.0f,
               0.0f};
    if (!(target.sum > 0.0)) verdict.token = 0;  // nothing is defined there; at least it is an id
    if (!tests) return true;
    const bool known = token >= 0 && token < vocabulary();  // an unknown one has p = q = 0
    double target_prob = 0.0, draft_prob = 0.0;
    if (known) {
      target_prob = prob(target_logits(position), params_.target_dtype, token, verdict.threshold,
                         params_.target_temperature.at(batch_row_), target);
    }
    if (!params_.draft_logits) {
      draft_prob = known;
      verdict.removed = known ? static_cast<int>(token) : -1;
    } else {
      const Partial draft = at<Partial>(plan_.combined)[length_ + 1 + position];
      if (draft_scale_ == 0.0f) {
        if (draft.index < draft_vocabulary()) verdict.removed = map() ? map()[draft.index] : draft.index;
        draft_prob = known && token == verdict.removed;
      } else if (draft.sum > 0.0) {
        verdict.subtract = 1;
        verdict.draft_peak = draft.peak;
        verdict.draft_scale = draft_scale_;
        verdict.draft_threshold = draft_threshold(position);
        verdict.draft_inverse = static_cast<float>(1.0 / draft.sum);
        if (params_.draft_to_target) {
          draft_prob = draft.matched / draft.sum;
        } else if (known) {
          draft_prob = prob(draft_logits(position), params_.draft_dtype, token, verdict.draft_threshold,
                            params_.draft_temperature.at(batch_row_), draft);
        }
      }
    }
    return !(uniform(position) * draft_prob < target_prob);  // strict: u = 0 must not accept what the target never says
  }

  HEDGESPEC_DEVICE void emit_known() const {
    if (clustered && rank_ > 0) return;
    const Verdict verdict = *verdict_();
    std::int64_t* const tokens = params_.tokens + batch_row_ * (params_.draft_length + 1);
    for (int i = threadIdx.x; i <= params_.draft_length; i += threads) {
      if (i < verdict.accepted) tokens[i] = drafted(i);
      if (i == verdict.accepted && verdict.token >= 0) tokens[i] = verdict.token;
      if (i > verdict.accepted) tokens[i] = -1;
    }
    if (threadIdx.x == 0) params_.accepted_length[batch_row_] = verdict.accepted;
  }

  // The weights of one row, the verdict's: what every rank adds up for its slice, and one of them searches.
  template <typename Logit>
  HEDGESPEC_DEVICE float weight(const Logit* logits, int id, const Verdict& verdict, int tile_begin) const {
    const float logit = widen(logits[id]);
    const float mass = logit >= verdict.threshold ? device::exp2_fast((logit - verdict.peak) * verdict.scale) : 0.0f;
    const float subtracted = verdict.subtract ? at<float>(plan_.spread)[id - tile_begin] : 0.0f;
    // An explicit fma: the search must see the very weights that were added up, and the compiler may not choose.
    const float left = fmaf(mass, verdict.inverse, -subtracted);
    return left > 0.0f && id != verdict.removed ? left : 0.0f;
  }

  // The draft's probabilities on the target ids from begin to end, in shared memory.
  HEDGESPEC_DEVICE void spread_draft(const Verdict& verdict, int begin, int end) const {
    float* const spread = at<float>(plan_.spread);
    __syncthreads();  // whoever reads what was there has done so
    with_type(draft_logits(verdict.accepted), params_.draft_dtype, [&](auto* typed) {
      const auto draft_prob = [&](int id) {
        const float logit = widen(typed[id]);
        const float mass =
            logit >= verdict.draft_threshold ? device::exp2_fast((logit - verdict.draft_peak) * verdict.draft_scale) : 0.0f;
        return mass * verdict.draft_inverse;
      };
      const std::int32_t* const ids = map();
      if (!ids) {
#pragma unroll 4
        for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += threads) spread[id - begin] = draft_prob(id);
        return;
      }
      for (int i = threadIdx.x; i < end - begin; i += threads) spread[i] = 0.0f;
      __syncthreads();
#pragma unroll 4
      for (int id = threadIdx.x; id < draft_vocabulary(); id += threads) {
        const int target_id = ids[id];
        if (target_id >= begin && target_id < end) device::add_shared(spread + (target_id - begin), draft_prob(id));
      }
    });
    __syncthreads();
  }

  HEDGESPEC_DEVICE void draw(Verdict& verdict) const {
    // Past a meeting in the workspace this block is alone.
    const int ranks = clustered ? plan_.ranks : 1, rank = clustered ? rank_ : 0;
    const int slice = clustered ? plan_.slice : vocabulary();
    const int begin = least(rank * slice, vocabulary()), end = least(begin + slice, vocabulary());
    const int tile = verdict.subtract ? plan_.tile : end - begin, segments = (end - begin + segment - 1) / segment;
    double* const sums = at<double>(plan_.sums);
    const void* const logits = target_logits(verdict.accepted);

    double total = 0.0, before = 0.0;
    int chosen = -1;
    for (int round = 0; round < 2 && chosen < 0; ++round) {
      if (round == 1) {  // rounding left a rejection without residual: the target's own law
        verdict.subtract = 0;
        verdict.removed = -1;
      }
      for (int tile_begin = begin; tile_begin < end; tile_begin += tile) {
        const int tile_end = least(tile_begin + tile, end);
        if (verdict.subtract) spread_draft(verdict, tile_begin, tile_end);
        with_type(logits, params_.target_dtype, [&](auto* typed) {
          for (int first = tile_begin + warp_ * segment; first < tile_end; first += warps * segment) {
            const int last = least(first + segment, tile_end);
            float sum = 0.0f;
#pragma unroll 4
            for (int id = first + lane_; id < last; id += 32) sum += weight(typed, id, verdict, tile_begin);
            const double of_segment = device::warp_sum(static_cast<double>(sum));
            if (lane_ == 0) sums[(first - begin) / segment] = of_segment;
          }
        });
      }
      __syncthreads();
      double* const totals = at<double>(plan_.totals) + round;
      if (warp_ == 0) {
        double own = 0.0;
        for (int i = lane_; i < segments; i += 32) own += sums[i];
        own = device::warp_sum(own);
        if (lane_ == 0) *totals = own;
      }
      if constexpr (clustered) {
        device::sync_cluster();
      } else {
        __syncthreads();
      }
      const auto of_rank = [&](int other) {
        if constexpr (clustered) return *device::of_rank(totals, static_cast<unsigned>(other));
        return *totals;
      };
      total = 0.0;
      for (int other = 0; other < ranks; ++other) total += of_rank(other);
      const Place place = locate(ranks, uniform(params_.draft_length) * total, of_rank);
      chosen = place.index;
      before = place.before;
    }
    if (chosen != rank) return;

    double bound = uniform(params_.draft_length) * total - before;
    const Place place = locate(segments, bound, [&](int i) { return sums[i]; });
    bound -= place.before;
    const int first = begin + place.index * segment, last = least(first + segment, end);
    int tile_begin = begin;
    if (verdict.subtract && tile < end - begin) {  // another tile may lie there by now
      tile_begin = first;
      spread_draft(verdict, first, last);
    }
    if (warp_ > 0) return;
    with_type(logits, params_.target_dtype, [&](auto* typed) {
      const Place found = locate(last - first, bound, [&](int i) -> double {
        return weight(typed, first + i, verdict, tile_begin);
      });
      if (lane_ == 0) params_.tokens[batch_row_ * (params_.draft_length + 1) + verdict.accepted] = first + found.index;
    });
  }

  const VerifyParams& params_;
  const Plan& plan_;
  int batch_row_, rank_, warp_, lane_;
  float scale_, draft_scale_;
  int length_, rows_;
  unsigned char* workspace_;
};

template <bool clustered>
__global__ void __launch_bounds__(threads, 1)
    verify_kernel(const __grid_constant__ VerifyParams params, const __grid_constant__ Plan plan, void* workspace) {
#if HEDGESPEC_HAS_CLUSTERS
  Verifier<clustered>(params, plan, workspace).run();
#else
  if constexpr (!clustered) Verifier<false>(params, plan, workspace).run();  // the other one is not launched here
#endif
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("verify: ") + cudaGetErrorString(error));
}

struct Device {
  int processors = 0;
  int shared_bytes = 0;
  int largest_cluster = 0;  // 0: it has none
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

cudaLaunchConfig_t configuration(unsigned blocks, std::size_t shared, cudaStream_t stream, cudaLaunchAttribute* cluster,
                                 unsigned ranks) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{blocks, 1, 1};
  config.blockDim = dim3{threads, 1, 1};
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  if (cluster) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {ranks, 1, 1};
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Whether the code that this device runs was compiled for one with clusters.
bool has_clusters(int device) {
#if defined(HEDGESPEC_EMULATED)
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, verify_kernel<true>));
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 && attributes.ptxVersion >= 90;
#endif
}

// The current device, asked once a thread.
const Device& current_device() {
  static thread_local std::vector<Device> known;
  int index = 0;
  check(cudaGetDevice(&index));
  if (known.size() <= static_cast<std::size_t>(index)) known.resize(static_cast<std::size_t>(index) + 1);
  Device& device = known[static_cast<std::size_t>(index)];
  if (device.processors) return device;

  Device found;
  found.processors = attribute(cudaDevAttrMultiProcessorCount, index);
  found.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  check(cudaFuncSetAttribute(verify_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_bytes));
  if (has_clusters(index)) {
    check(cudaFuncSetAttribute(verify_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_bytes));
    // Eight is the most that every such device promises; a slice of one may have less room.
    for (int size = 8; size > 0 && !found.largest_cluster; size /= 2) {
      cudaLaunchAttribute cluster{};
      const std::size_t shared = std::min<std::size_t>(static_cast<std::size_t>(found.shared_bytes), 100 * 1024);
      const auto config = configuration(static_cast<unsigned>(size), shared, nullptr, &cluster, static_cast<unsigned>(size));
      int clusters = 0;
      check(cudaOccupancyMaxActiveClusters(&clusters, verify_kernel<true>, &config));
      if (clusters > 0) found.largest_cluster = size;
    }
  }
  device = found;
  return device;
}

int divided(std::int64_t size, std::int64_t parts, std::int64_t unit) {
  const std::int64_t part = (size + parts - 1) / parts;
  return static_cast<int>((part + unit - 1) / unit * unit);
}

// As many ranks as keep the device busy with the whole batch at once, each with enough to do.
int ranks_for(const VerifyParams& params, const Device& device) {
  const std::int64_t most = device.largest_cluster > 0                ? device.largest_cluster
                            : params.batch <= most_counted_rows ? most_ranks
                                                                      : 1;
  const std::int64_t wanted = std::min(device.processors / params.batch, params.vocabulary / smallest_slice);
  int ranks = 1;
  while (2 * ranks <= std::min(most, wanted)) ranks *= 2;
  return ranks;
}

struct Launch {
  Plan plan;
  std::size_t shared_bytes;
};

Launch plan_for(const VerifyParams& params, const Device& device) {
  const bool clustered = device.largest_cluster > 0;
  Plan plan{};
  plan.ranks = ranks_for(params, device);
  plan.slice = divided(params.vocabulary, plan.ranks, segment);
  plan.draft_slice = divided(params.draft_vocabulary, plan.ranks, 8);
  const std::size_t rows = static_cast<std::size_t>(2 * params.draft_length + 1);
  const int drawn_slice = clustered ? plan.slice : divided(params.vocabulary, 1, segment);

  std::size_t bytes = 0;
  const auto take = [&](std::size_t size) {
    const std::size_t offset = bytes;
    bytes += (size + 15) / 16 * 16;
    return static_cast<unsigned>(offset);
  };
  plan.measured = take(clustered ? rows * sizeof(Partial) : 0);
  plan.combined = take(rows * sizeof(Partial));
  plan.of_warps = take(std::min<std::size_t>(rows, rows_at_a_time) * warps * sizeof(Partial));
  plan.sums = take(static_cast<std::size_t>(drawn_slice / segment) * sizeof(double));
  plan.totals = take(2 * sizeof(double));
  plan.verdict = take(sizeof(Verdict));
  if (params.draft_logits) {
    const std::int64_t room = (device.shared_bytes - static_cast<std::int64_t>(bytes)) / 4;  // floats
    plan.tile = static_cast<int>(std::min<std::int64_t>({drawn_slice, largest_tile, room})) / segment * segment;
    if (plan.tile <= 0) throw std::runtime_error("verify: the draft is too long for the device's shared memory");
    plan.spread = take(static_cast<std::size_t>(plan.tile) * sizeof(float));
  }
  return {plan, bytes};
}

}  // namespace

std::size_t verify_cuda_workspace_bytes(const VerifyParams& params) {
  const Device& device = current_device();
  if (device.largest_cluster > 0) return 0;
  const std::size_t rows = static_cast<std::size_t>(2 * params.draft_length + 1);
  return counter_bytes + static_cast<std::size_t>(params.batch * ranks_for(params, device)) * rows * sizeof(Partial);
}

void verify_cuda(const VerifyParams& params, void* workspace, void* stream) {
  const Device& device = current_device();
  const Launch launch = plan_for(params, device);
  const unsigned blocks = static_cast<unsigned>(params.batch * launch.plan.ranks);
  cudaLaunchAttribute cluster{};
  const bool clustered = device.largest_cluster > 0;
  const auto config = configuration(blocks, launch.shared_bytes, static_cast<cudaStream_t>(stream),
                                    clustered ? &cluster : nullptr, static_cast<unsigned>(launch.plan.ranks));
  check(clustered ? cudaLaunchKernelEx(&config, verify_kernel<true>, params, launch.plan, workspace)
                  : cudaLaunchKernelEx(&config, verify_kernel<false>, params, launch.plan, workspace));
}

}  // namespace hedgespec
