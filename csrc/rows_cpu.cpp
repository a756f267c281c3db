#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HEDGESPEC_X86 1
#else
#define HEDGESPEC_X86 0
#endif

namespace hedgespec::rows {
namespace {

// Vectors of `Width` floats in the compiler's own notation: the loops below are written once for all instruction sets. They
// are inlined into functions compiled for one set each, so no vector crosses a call.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about calls, of which there are none
#endif

template <int Width>
struct Types;
#define HEDGESPEC_TYPES(WIDTH)                                               \
  template <>                                                                \
  struct Types<WIDTH> {                                                      \
    typedef float Floats __attribute__((vector_size(WIDTH * 4)));            \
    typedef std::int32_t Integers __attribute__((vector_size(WIDTH * 4)));   \
    typedef std::uint32_t Words __attribute__((vector_size(WIDTH * 4)));     \
  }
HEDGESPEC_TYPES(4);
HEDGESPEC_TYPES(8);
HEDGESPEC_TYPES(16);

template <int Width>
struct Vector : Types<Width> {
  using typename Types<Width>::Floats;
  using typename Types<Width>::Integers;
  using typename Types<Width>::Words;

  HEDGESPEC_INLINE static Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  HEDGESPEC_INLINE static Floats load(const Bfloat16* from) {
    Words words;
    for (int i = 0; i < Width; ++i) words[i] = from[i].bits;  // GCC 12 makes one load of this, but not of a conversion
    return reinterpret_cast<Floats>(words << 16);
  }
  HEDGESPEC_INLINE static void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
  HEDGESPEC_INLINE static Floats all(float value) { return Floats{} + value; }
  HEDGESPEC_INLINE static Floats max(Floats one, Floats other) { return one > other ? one : other; }
  // Bits of numbers >= 0 are in the numbers' order, and integers leave the units that add floats to the sums.
  HEDGESPEC_INLINE static Floats min_nonnegative(Floats one, Floats other) {
    const Integers a = reinterpret_cast<Integers>(one), b = reinterpret_cast<Integers>(other);
    return reinterpret_cast<Floats>(a < b ? a : b);
  }
  HEDGESPEC_INLINE static float sum(Floats values) {
    float total = 0.0f;
    for (int i = 0; i < Width; ++i) total += values[i];
    return total;
  }
  HEDGESPEC_INLINE static float highest(Floats values) {
    float most = values[0];
    for (int i = 1; i < Width; ++i) most = values[i] > most ? values[i] : most;
    return most;
  }
};

// Two vectors at a time: enough independent work to hide latencies, few enough to keep everything in 16 registers.
constexpr int unroll = 2;
constexpr std::int64_t prefetch_distance = 1024;  // logits

template <int Width>
struct Loops {
  using V = Vector<Width>;
  using Floats = typename V::Floats;
  using Words = typename V::Words;
  static constexpr std::int64_t step = unroll * Width;
  static_assert(chunk_size % step == 0);

  struct Sums {
    Floats masses, highest, overlap;
  };

  // min(target, weight * draft), a step of it.
  HEDGESPEC_INLINE static Floats smaller(const float* target, const float* draft, Floats weight) {
    return V::min_nonnegative(V::load(target), V::load(draft) * weight) +
           V::min_nonnegative(V::load(target + Width), V::load(draft + Width) * weight);
  }

  // One step: `step` logits from `row`, masses to `out`; where `Overlapping`, first the overlap of what `out` holds.
  //
  // 2^x = 2^whole * 2^rest with rest in [-1/2, 1/2]. Adding 1.5 * 2^23 rounds x to a whole number and leaves it in the low
  // bits, from where it is shifted into the exponent. The polynomial is the minimax one of degree 5 for the relative
  // error, 7.5e-8; with float32's rounding the relative error of a mass is below 2.5e-7. Products are fused (this is not
  // compiled without that), so `rest` has one rounding however large logit * scale is.
  template <bool Overlapping, bool Masked, typename Logit>
  HEDGESPEC_INLINE static void advance(const Logit* row, float* out, Sums& sums, const float* target, Floats weight,
                                       Floats scale, Floats rounder, Floats lowest, Floats threshold) {
    Floats logit[unroll], power[unroll], value[unroll];
    for (int j = 0; j < unroll; ++j) logit[j] = V::load(row + j * Width);
    sums.highest = V::max(V::max(logit[0], logit[1]), sums.highest);
    if constexpr (Masked) {
      for (int j = 0; j < unroll; ++j) logit[j] = logit[j] >= threshold ? logit[j] : lowest;
    }
    for (int j = 0; j < unroll; ++j) logit[j] = V::max(logit[j], lowest);
    for (int j = 0; j < unroll; ++j) power[j] = logit[j] * scale + rounder;
    for (int j = 0; j < unroll; ++j) value[j] = power[j] - rounder;
    for (int j = 0; j < unroll; ++j) logit[j] = logit[j] * scale - value[j];
    for (int j = 0; j < unroll; ++j) value[j] = logit[j] * 1.3276472e-3f + 9.6755413e-3f;
    for (int j = 0; j < unroll; ++j) value[j] = value[j] * logit[j] + 5.5507133e-2f;
    for (int j = 0; j < unroll; ++j) value[j] = value[j] * logit[j] + 2.4022120e-1f;
    for (int j = 0; j < unroll; ++j) value[j] = value[j] * logit[j] + 6.9314697e-1f;
    for (int j = 0; j < unroll; ++j) value[j] = value[j] * logit[j] + 1.0000001f;
    for (int j = 0; j < unroll; ++j) {
      value[j] = reinterpret_cast<Floats>(reinterpret_cast<Words>(value[j]) + (reinterpret_cast<Words>(power[j]) << 23));
    }
    if constexpr (Overlapping) sums.overlap += smaller(target, out, weight);
    for (int j = 0; j < unroll; ++j) V::store(out + j * Width, value[j]);
    sums.masses += value[0] + value[1];
  }

  template <bool Overlapping, bool Masked, typename Logit>
  HEDGESPEC_INLINE static BlockMasses masses(const Logit* row, std::int64_t count, Scaling scaling, float* out,
                                             Pending* pending) {
    Sums sums{Floats{}, V::all(-infinity), Floats{}};
    const Floats scale = V::all(scaling.scale), rounder = V::all(12582912.0f - scaling.shift);
    const Floats lowest = V::all((scaling.shift + lowest_power) / scaling.scale), threshold = V::all(scaling.threshold);
    const Floats weight = V::all(Overlapping ? pending->weight : 0.0f);
    const float* const target = Overlapping ? pending->target : nullptr;
    std::int64_t i = 0;
    for (; i + step <= count; i += step) {
      // Logits are read once: kept out of the second-level cache they leave it to the masses of both sides.
      __builtin_prefetch(row + i + prefetch_distance, 0, 0);
      advance<Overlapping, Masked>(row + i, out + i, sums, Overlapping ? target + i : nullptr, weight, scale, rounder, lowest,
                                   threshold);
    }
    // The rest of the last chunk comes from a copy: nothing is read past the row, and buffers end in masses of nothing.
    for (; i % chunk_size != 0 || i < count; i += step) {
      float rest[step];
      for (std::int64_t j = 0; j < step; ++j) rest[j] = i + j < count ? widen(row[i + j]) : -infinity;
      advance<Overlapping, Masked>(rest, out + i, sums, Overlapping ? target + i : nullptr, weight, scale, rounder, lowest,
                                   threshold);
    }
    if constexpr (Overlapping) pending->overlap = V::sum(sums.overlap);
    return {V::sum(sums.masses), V::highest(sums.highest)};
  }

  template <typename Logit>
  HEDGESPEC_INLINE static float highest(const Logit* row, std::int64_t count) {
    Floats most[unroll];
    for (int j = 0; j < unroll; ++j) most[j] = V::all(-infinity);
    std::int64_t i = 0;
    for (; i + step <= count; i += step) {
      for (int j = 0; j < unroll; ++j) most[j] = V::max(V::load(row + i + j * Width), most[j]);
    }
    float result = V::highest(V::max(most[0], most[1]));
    for (; i < count; ++i) result = widen(row[i]) > result ? widen(row[i]) : result;
    return result;
  }

  // Summed as in `advance`, in the same order: a drafter's score does not depend on which of the two computed it.
  HEDGESPEC_INLINE static float overlap(const float* target, const float* draft, float weight, std::int64_t count) {
    Floats sum{};
    const Floats weights = V::all(weight);
    for (std::int64_t i = 0; i < count; i += chunk_size) {
      for (std::int64_t j = i; j < i + chunk_size; j += step) sum += smaller(target + j, draft + j, weights);
    }
    return V::sum(sum);
  }

  HEDGESPEC_INLINE static float overlap_mapped(const float* target, const float* draft, const std::int32_t* map, float weight,
                                               std::int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < count; ++i) {
      const float mass = draft[i] * weight, other = target[map[i]];
      sum += other < mass ? other : mass;
    }
    return sum;
  }

  HEDGESPEC_INLINE static std::int64_t find(const std::int32_t* map, std::int64_t count, std::int32_t value) {
    for (std::int64_t i = 0; i < count; i += chunk_size) {
      const std::int64_t end = i + chunk_size < count ? i + chunk_size : count;
      std::int32_t found = 0;
#pragma omp simd reduction(| : found)
      for (std::int64_t j = i; j < end; ++j) found |= map[j] == value;
      if (!found) continue;
      for (std::int64_t j = i; j < end; ++j) {
        if (map[j] == value) return j;
      }
    }
    return -1;
  }
};

// A function of each loop for one instruction set, and the table of them.
#define HEDGESPEC_KERNELS(NAME, TARGET, WIDTH, FUSED)                                                                        \
  template <typename Logit>                                                                                                 \
  struct NAME {                                                                                                             \
    using L = Loops<WIDTH>;                                                                                                 \
    TARGET static float highest(const Logit* row, std::int64_t count) { return L::highest(row, count); }                    \
    TARGET static BlockMasses masses(const Logit* row, std::int64_t count, Scaling scaling, float* out) {                   \
      return scaling.threshold == -infinity ? L::template masses<false, false>(row, count, scaling, out, nullptr)           \
                                            : L::template masses<false, true>(row, count, scaling, out, nullptr);           \
    }                                                                                                                       \
    TARGET static BlockMasses masses_and_overlap(const Logit* row, std::int64_t count, Scaling scaling, float* out,         \
                                                 Pending& pending) {                                                        \
      return scaling.threshold == -infinity ? L::template masses<true, false>(row, count, scaling, out, &pending)           \
                                            : L::template masses<true, true>(row, count, scaling, out, &pending);           \
    }                                                                                                                       \
    TARGET static float overlap(const float* target, const float* draft, float weight, std::int64_t count) {                \
      return L::overlap(target, draft, weight, count);                                                                      \
    }                                                                                                                       \
    TARGET static float overlap_mapped(const float* target, const float* draft, const std::int32_t* map, float weight,      \
                                       std::int64_t count) {                                                                \
      return L::overlap_mapped(target, draft, map, weight, count);                                                          \
    }                                                                                                                       \
    TARGET static std::int64_t find(const std::int32_t* map, std::int64_t count, std::int32_t value) {                      \
      return L::find(map, count, value);                                                                                    \
    }                                                                                                                       \
    static constexpr Kernels<Logit> table{highest, masses, masses_and_overlap, overlap, overlap_mapped, find, FUSED};       \
  }

#if HEDGESPEC_X86
HEDGESPEC_KERNELS(Avx512, [[gnu::target("arch=x86-64-v4")]], 16, true);
HEDGESPEC_KERNELS(Avx2, [[gnu::target("arch=x86-64-v3")]], 8, true);
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
HEDGESPEC_KERNELS(Baseline, , 4, true);
#else
HEDGESPEC_KERNELS(Baseline, , 4, false);
#endif

}  // namespace

template <typename Logit>
const Kernels<Logit>& best_kernels() {
#if HEDGESPEC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Avx512<Logit>::table;
  if (__builtin_cpu_supports("x86-64-v3")) return Avx2<Logit>::table;
#endif
  return Baseline<Logit>::table;
}

template const Kernels<float>& best_kernels();
template const Kernels<Bfloat16>& best_kernels();

}  // namespace hedgespec::rows
