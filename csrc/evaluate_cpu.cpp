// Every drafter against the target, on the CPU.
//
// Each logit is read from memory once and its exponential is taken once: a target row's exponentials stay in scratch for
// all N drafters, a drafter row's until its normaliser is known. Rows are summed in blocks, in float32 within a block and
// in float64 across blocks, so the rounding error does not grow with the vocabulary.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "hedgespec.h"

namespace hedgespec {
namespace {

constexpr std::int64_t block_size = 1024;
constexpr std::int64_t parallel_from = 1 << 15;  // logits; below this, waking a thread costs more than it saves
constexpr float infinity = std::numeric_limits<float>::infinity();

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Bfloat16 {
  std::uint16_t bits;
};

HEDGESPEC_INLINE float widen(float value) { return value; }
HEDGESPEC_INLINE float widen(Bfloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

// e^x for x <= 0: relative error below 2e-7 (under 2 ulp), and exactly 0 below x = -87.7, where float32 runs out of normal
// numbers. Plain arithmetic, and no select at the end: calls (expf, rintf, fmaf) and branches keep the loop around it from
// vectorising on one instruction set or another.
HEDGESPEC_INLINE float exp_nonpositive(float x) {
  const float kept = x > -88.0f ? x : -88.0f;
  const std::int32_t power = static_cast<std::int32_t>(kept * 1.44269504f - 0.5f);  // truncation rounds: kept <= 0
  const float whole = static_cast<float>(power);
  const float rest = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts (Cody and Waite)
  float series = 1.9875691500e-4f;                                           // minimax coefficients of Cephes' expf
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  const float value = series * rest * rest + rest + 1.0f;
  return value * std::bit_cast<float>((power + 127) << 23);  // power -127 makes the second factor 0
}

// condition ? value : 0, as a bit mask: a select that feeds a sum becomes a branch in GCC, and the loop stays scalar.
HEDGESPEC_INLINE float keep_if(bool condition, float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & -static_cast<std::uint32_t>(condition));
}

struct Peak {
  float value;
  std::int64_t index;  // the lowest index that holds `value`; -1 where no logit is above -inf
};

template <typename Logit>
HEDGESPEC_INLINE Peak find_peak(const Logit* row, std::int64_t size) {
  Peak peak{-infinity, -1};
  for (std::int64_t begin = 0; begin < size; begin += block_size) {
    const std::int64_t end = std::min(begin + block_size, size);
    float highest = -infinity;
#pragma omp simd reduction(max : highest)
    for (std::int64_t i = begin; i < end; ++i) {
      const float logit = widen(row[i]);
      highest = logit > highest ? logit : highest;
    }
    if (highest > peak.value) peak = {highest, begin};
  }
  if (peak.index < 0) return peak;
  while (peak.index < size - 1 && widen(row[peak.index]) != peak.value) ++peak.index;
  return peak;
}

// out[i] = exp((row[i] - shift) * scale), or 0 where row[i] < threshold. Returns the sum.
template <typename Logit>
HEDGESPEC_INLINE double exponentials(const Logit* row, std::int64_t size, float shift, float scale, float threshold,
                                     float* out) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += block_size) {
    const std::int64_t end = std::min(begin + block_size, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float logit = widen(row[i]);
      const float mass = keep_if(logit >= threshold, exp_nonpositive((logit - shift) * scale));
      out[i] = mass;
      sum += mass;
    }
    total += sum;
  }
  return total;
}

// target_clones does not apply to templates, hence one plain function for each element type.
HEDGESPEC_CLONES Peak peak_of(const float* row, std::int64_t size) { return find_peak(row, size); }
HEDGESPEC_CLONES Peak peak_of(const Bfloat16* row, std::int64_t size) { return find_peak(row, size); }

HEDGESPEC_CLONES double exponentials_of(const float* row, std::int64_t size, float shift, float scale, float threshold,
                                        float* out) {
  return exponentials(row, size, shift, scale, threshold, out);
}
HEDGESPEC_CLONES double exponentials_of(const Bfloat16* row, std::int64_t size, float shift, float scale,
                                        float threshold, float* out) {
  return exponentials(row, size, shift, scale, threshold, out);
}

// sum_i min(target[i] * target_scale, draft[i] * draft_scale)
HEDGESPEC_CLONES double overlap(const float* target, float target_scale, const float* draft, float draft_scale,
                                std::int64_t size) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += block_size) {
    const std::int64_t end = std::min(begin + block_size, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float target_mass = target[i] * target_scale, draft_mass = draft[i] * draft_scale;
      sum += target_mass < draft_mass ? target_mass : draft_mass;
    }
    total += sum;
  }
  return total;
}

// The same over a reduced vocabulary: draft id i means target id map[i].
HEDGESPEC_CLONES double overlap_mapped(const float* target, float target_scale, const float* draft, float draft_scale,
                                       const std::int32_t* map, std::int64_t size) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += block_size) {
    const std::int64_t end = std::min(begin + block_size, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float target_mass = target[map[i]] * target_scale, draft_mass = draft[i] * draft_scale;
      sum += target_mass < draft_mass ? target_mass : draft_mass;
    }
    total += sum;
  }
  return total;
}

// The draft id that means `token`, or -1. No early exit: the loop vectorises without one.
HEDGESPEC_CLONES std::int64_t draft_id_of(std::int64_t token, const std::int32_t* map, std::int64_t size) {
  std::int64_t found = -1;
#pragma omp simd reduction(max : found)
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t id = map[i] == token ? i : -1;
    found = id > found ? id : found;
  }
  return found;
}

// A row of logits turned into a distribution: softmax((logits - peak) * scale), or a point mass on the peak.
struct Distribution {
  Peak peak;
  float scale;       // 1 / temperature; 0 for a point mass
  float threshold;   // logits below it have no mass
  double total;      // sum of the exponentials
  double log_total;

  bool empty() const { return peak.index < 0 || peak.value < threshold; }
  bool point_mass() const { return scale == 0.0f; }

  double log_prob(float logit, std::int64_t index) const {
    if (empty()) return -infinity;
    if (point_mass()) return index == peak.index ? 0.0 : -infinity;
    if (logit < threshold) return -infinity;
    return static_cast<double>((logit - peak.value) * scale) - log_total;
  }
};

// Fills `mass` with the row's exponentials; a point mass leaves it alone.
template <typename Logit>
Distribution normalise(const Logit* row, std::int64_t size, float temperature, float threshold, float* mass) {
  Distribution row_law{peak_of(row, size), 0.0f, threshold, 1.0, 0.0};
  if (temperature == 0.0f || row_law.empty()) return row_law;
  row_law.scale = std::min(1.0f / temperature, std::numeric_limits<float>::max());
  row_law.total = exponentials_of(row, size, row_law.peak.value, row_law.scale, threshold, mass);
  row_law.log_total = std::log(row_law.total);
  return row_law;
}

struct Scores {
  float prob, ratio, argmax_prob, argmax_ratio;
};

// A drafter at a position: what the target's mass (unnormalised, [V]) makes of the drafter's row.
template <typename Target, typename Draft>
Scores score(const Target* target_row, const Distribution& target, const float* target_mass, const Draft* draft_row,
             const Distribution& draft, const float* draft_mass, std::int64_t token, const std::int32_t* map,
             std::int64_t draft_vocabulary) {
  if (target.empty() || draft.empty()) return {0.0f, 0.0f, 0.0f, 0.0f};
  const auto target_prob = [&](std::int64_t id) {
    return std::exp(target.log_prob(widen(target_row[id]), id));
  };
  const auto draft_log_prob = [&](std::int64_t token_id) {
    const std::int64_t id = map ? draft_id_of(token_id, map, draft_vocabulary) : token_id;
    return id < 0 ? -static_cast<double>(infinity) : draft.log_prob(widen(draft_row[id]), id);
  };

  const std::int64_t proposal = map ? map[draft.peak.index] : draft.peak.index;
  const double argmax_prob = target_prob(proposal);

  double prob;
  if (draft.point_mass()) {
    prob = argmax_prob;
  } else if (target.point_mass()) {
    prob = std::exp(draft_log_prob(target.peak.index));
  } else {
    const float target_scale = static_cast<float>(1.0 / target.total), draft_scale = static_cast<float>(1.0 / draft.total);
    prob = map ? overlap_mapped(target_mass, target_scale, draft_mass, draft_scale, map, draft_vocabulary)
               : overlap(target_mass, target_scale, draft_mass, draft_scale, draft_vocabulary);
  }

  // In logarithms: q(x) / p(x) stays right where both underflow. p(x) = 0 gives 1 if q(x) > 0, else 0.
  const double log_draft = draft_log_prob(token);
  const double log_target = target.log_prob(widen(target_row[token]), token);
  const double ratio = log_draft == -infinity ? 0.0 : std::exp(std::min(0.0, log_draft - log_target));

  return {static_cast<float>(std::min(prob, 1.0)), static_cast<float>(ratio), static_cast<float>(argmax_prob),
          token == proposal ? 1.0f : 0.0f};
}

template <typename Target, typename Draft>
void run(const EvaluateParams& params, int most_threads) {
  const std::int64_t rows = params.batch * params.positions;
  const std::int64_t vocabulary = params.vocabulary, draft_vocabulary = params.draft_vocabulary;
  const std::int64_t work = rows * (vocabulary + params.drafters * draft_vocabulary);
  const int threads = work < parallel_from ? 1 : std::max(most_threads, 1);

  // Rows go in groups, which bounds the scratch. It is kept from call to call: fresh pages cost more than the arithmetic.
  const std::int64_t group = std::min(rows, std::max<std::int64_t>(8, threads));
  static thread_local std::vector<float> target_scratch, draft_scratch;
  static thread_local std::vector<Distribution> target_laws;
  target_scratch.resize(std::max(target_scratch.size(), static_cast<std::size_t>(group * vocabulary)));
  draft_scratch.resize(std::max(draft_scratch.size(), static_cast<std::size_t>(threads * draft_vocabulary)));
  target_laws.resize(std::max(target_laws.size(), static_cast<std::size_t>(group)));
  float* const target_masses = target_scratch.data();
  float* const draft_masses = draft_scratch.data();
  Distribution* const targets = target_laws.data();

  const auto target_row = [&](std::int64_t row) {
    return static_cast<const Target*>(params.target_logits) + row / params.positions * params.target_stride_batch +
           row % params.positions * params.target_stride_position;
  };
  const auto draft_row = [&](std::int64_t drafter, std::int64_t row) {
    return static_cast<const Draft*>(params.drafter_logits) + drafter * params.drafter_stride_drafter +
           row / params.positions * params.drafter_stride_batch + row % params.positions * params.drafter_stride_position;
  };
  const auto within = [&](std::int64_t row) {
    return !params.lengths || row % params.positions < params.lengths[row / params.positions];
  };

  for (std::int64_t first = 0; first < rows; first += group) {
    const std::int64_t last = std::min(first + group, rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (std::int64_t row = first; row < last; ++row) {
        if (!within(row)) continue;
        const float threshold = params.target_threshold ? params.target_threshold[row] : -infinity;
        targets[row - first] = normalise(target_row(row), vocabulary, params.target_temperature.at(row / params.positions),
                                         threshold, target_masses + (row - first) * vocabulary);
      }
#pragma omp for collapse(2) schedule(static)
      for (std::int64_t row = first; row < last; ++row) {
        for (std::int64_t drafter = 0; drafter < params.drafters; ++drafter) {
          const std::int64_t at = drafter * rows + row;
          Scores scores{0.0f, 0.0f, 0.0f, 0.0f};
          if (within(row)) {
            float* const mass = draft_masses + thread_index() * draft_vocabulary;
            const float threshold = params.drafter_threshold ? params.drafter_threshold[at] : -infinity;
            const Draft* const logits = draft_row(drafter, row);
            const Distribution draft = normalise(
                logits, draft_vocabulary, params.drafter_temperature.at(row / params.positions), threshold, mass);
            scores = score(target_row(row), targets[row - first], target_masses + (row - first) * vocabulary, logits,
                           draft, mass, params.tokens[row],
                           params.draft_to_target ? params.draft_to_target + drafter * draft_vocabulary : nullptr,
                           draft_vocabulary);
          }
          params.acceptance_prob[at] = scores.prob;
          params.acceptance_ratio[at] = scores.ratio;
          params.argmax_acceptance_prob[at] = scores.argmax_prob;
          params.argmax_acceptance_ratio[at] = scores.argmax_ratio;
        }
      }
    }
  }
}

}  // namespace

void evaluate_cpu(const EvaluateParams& params, int threads) {
  const bool narrow_target = params.target_dtype == Dtype::bfloat16;
  const bool narrow_draft = params.drafter_dtype == Dtype::bfloat16;
  if (narrow_target && narrow_draft) return run<Bfloat16, Bfloat16>(params, threads);
  if (narrow_target) return run<Bfloat16, float>(params, threads);
  if (narrow_draft) return run<float, Bfloat16>(params, threads);
  return run<float, float>(params, threads);
}

}  // namespace hedgespec
