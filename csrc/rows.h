// Loops over rows of logits, vectorised for the instruction sets of this processor family and chosen when the module loads.
//
// A row is taken in blocks that stay in the first-level cache. The masses of a block are 2^(logit * scale - shift): `scale`
// is log2(e) / temperature and `shift` an integer near the highest logit so far, so that blocks with different shifts are
// brought together by a power of two, exactly.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "hedgespec.h"

namespace hedgespec {

struct Bfloat16 {
  std::uint16_t bits;
};

HEDGESPEC_INLINE float widen(float value) { return value; }
HEDGESPEC_INLINE float widen(Bfloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

namespace rows {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t block_size = 2048;  // logits, masses and the other side's masses together fill most of 32 KiB
constexpr std::int64_t chunk_size = 64;    // every vector width and unrolling divides it; buffers are padded to it
constexpr float highest_surplus = 60.0f;   // how far 2^x may exceed 1: sums of a block stay finite
constexpr float lowest_power = -120.0f;    // masses below 2^-120 of the shift are as good as none, and stay normal numbers

// How logits become masses in one block.
struct Scaling {
  float scale;      // log2(e) / temperature
  float shift;      // an integer; masses are relative to 2^shift
  float threshold;  // logits below it have no mass
};

struct BlockMasses {
  float sum;
  float highest;  // logit, masked or not
};

// The overlap of a drafter's block with the target's, computed while another drafter's masses take its place.
struct Pending {
  const float* target;  // masses of the block
  float weight;         // of the draft's masses, in the units of the target's
  float overlap;        // out: sum_i min(target[i], weight * draft[i])
};

// The loops for one instruction set. `masses` buffers are padded to whole chunks and are written to the end of the last one.
template <typename Logit>
struct Kernels {
  // The highest of `count` logits.
  float (*highest)(const Logit* row, std::int64_t count);
  // masses[i] = 2^(row[i] * scale - shift), about 0 where masked or -inf.
  BlockMasses (*masses)(const Logit* row, std::int64_t count, Scaling scaling, float* masses);
  // The same, and on the way the overlap of what was in `masses` before: reading and overwriting it in one pass is what
  // makes the second pass over a drafter's row nearly free.
  BlockMasses (*masses_and_overlap)(const Logit* row, std::int64_t count, Scaling scaling, float* masses, Pending& pending);
  // sum_i min(target[i], weight * draft[i])
  float (*overlap)(const float* target, const float* draft, float weight, std::int64_t count);
  // sum_i min(target[map[i]], weight * draft[i])
  float (*overlap_mapped)(const float* target, const float* draft, const std::int32_t* map, float weight, std::int64_t count);
  // The index of the first `value` in map, or -1.
  std::int64_t (*find)(const std::int32_t* map, std::int64_t count, std::int32_t value);
  // Without fused products the two that make masses are not precise enough to be used.
  bool fused;
};

// The best loops that this processor can run.
template <typename Logit>
const Kernels<Logit>& best_kernels();

}  // namespace rows
}  // namespace hedgespec
