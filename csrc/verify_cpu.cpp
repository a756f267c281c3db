// Accepting a draft, on the CPU.
//
// Positions are taken in order and those past a rejection are not looked at, so few rows are read that do not decide. A row
// goes block by block, each block first for its highest logit and then, while it is still in the nearest cache, for the sum
// of its exponentials: memory is read once and nothing is kept but a number or two a block. The draw then adds up those
// numbers and looks again into the one block where it ends.

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
#include "rows.h"

namespace hedgespec {
namespace {

// Arithmetic on one block of a row.

constexpr std::int64_t block_size = 1024;
constexpr std::int64_t strip_size = 256;  // summed in float32; strips, blocks and rows are added up in float64
using rows::infinity;

// 2^x for x <= 0: relative error below 2e-7 for x > -126, exactly 0 for x <= -127, below 2^-126 in between. Plain arithmetic
// and one maximum, so that the loop around it vectorises on every instruction set.
HEDGESPEC_INLINE float exp2_nonpositive(float x) {
  constexpr float round_to_whole = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
  const float kept = x > -127.0f ? x : -127.0f;
  const float rounded = kept + round_to_whole;
  const float rest = kept - (rounded - round_to_whole);
  float series = 1.3264727e-3f;  // minimax for the relative error over [-1/2, 1/2], and exact at 0: -127 must give 0
  series = series * rest + 9.671513e-3f;
  series = series * rest + 5.5507336e-2f;
  series = series * rest + 2.4022242e-1f;
  series = series * rest + 6.93147e-1f;
  series = series * rest + 1.0f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(series) + (std::bit_cast<std::uint32_t>(rounded) << 23));
}

// condition ? value : 0, as a bit mask: a select that feeds a sum becomes a branch in GCC, and the loop stays scalar.
HEDGESPEC_INLINE float keep_if(bool condition, float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & -static_cast<std::uint32_t>(condition));
}

template <typename Logit>
HEDGESPEC_INLINE float peak(const Logit* logits, std::int64_t size) {
  float highest = -infinity;
#pragma omp simd reduction(max : highest)
  for (std::int64_t i = 0; i < size; ++i) {
    const float logit = widen(logits[i]);
    highest = logit > highest ? logit : highest;
  }
  return highest;
}

// out[i] = 2^((logits[i] - shift) * scale), or 0 where logits[i] < threshold. Returns the sum.
template <typename Logit>
HEDGESPEC_INLINE double exponentials(const Logit* logits, std::int64_t size, float shift, float scale, float threshold,
                                     float* out) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += strip_size) {
    const std::int64_t end = std::min(begin + strip_size, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float logit = widen(logits[i]);
      const float mass = keep_if(logit >= threshold, exp2_nonpositive((logit - shift) * scale));
      out[i] = mass;
      sum += mass;
    }
    total += sum;
  }
  return total;
}

// target_clones does not apply to templates, hence one plain function for each element type.
HEDGESPEC_CLONES float peak_of(const float* logits, std::int64_t size) { return peak(logits, size); }
HEDGESPEC_CLONES float peak_of(const Bfloat16* logits, std::int64_t size) { return peak(logits, size); }

HEDGESPEC_CLONES double exponentials_of(const float* logits, std::int64_t size, float shift, float scale, float threshold,
                                        float* out) {
  return exponentials(logits, size, shift, scale, threshold, out);
}
HEDGESPEC_CLONES double exponentials_of(const Bfloat16* logits, std::int64_t size, float shift, float scale,
                                        float threshold, float* out) {
  return exponentials(logits, size, shift, scale, threshold, out);
}

// mass[i] = max(0, mass[i] * scale - other[i] * other_scale). Returns the sum.
HEDGESPEC_CLONES double subtract(float* mass, float scale, const float* other, float other_scale, std::int64_t size) {
  double total = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += strip_size) {
    const std::int64_t end = std::min(begin + strip_size, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = begin; i < end; ++i) {
      const float difference = mass[i] * scale - other[i] * other_scale;
      const float left = difference > 0.0f ? difference : 0.0f;
      mass[i] = left;
      sum += left;
    }
    total += sum;
  }
  return total;
}

// How often `id` stands in `ids`.
HEDGESPEC_CLONES std::int32_t count(const std::int32_t* ids, std::int64_t size, std::int32_t id) {
  std::int32_t found = 0;
#pragma omp simd reduction(+ : found)
  for (std::int64_t i = 0; i < size; ++i) found += ids[i] == id;
  return found;
}

// Rows.

constexpr std::int64_t blocks_of(std::int64_t size) { return (size + block_size - 1) / block_size; }

// A row of logits as a distribution, softmax(logits / temperature) or a point mass on the highest.
template <typename Logit>
class Distribution {
 public:
  // `peaks` and `sums` are scratch for a value a block each.
  Distribution(const Logit* logits, std::int64_t size, float temperature, float threshold, float* peaks, double* sums)
      : logits_(logits),
        size_(size),
        threshold_(threshold),
        point_mass_(temperature == 0.0f),
        // Neither infinite nor 0, however extreme the temperature: 0 * inf would be NaN.
        rate_(1.0 / std::clamp(temperature, std::numeric_limits<float>::min(), std::numeric_limits<float>::max())),
        scale_(static_cast<float>(rate_ * 1.4426950408889634)),
        peaks_(peaks),
        sums_(sums) {}

  std::int64_t blocks() const { return blocks_of(size_); }
  std::int64_t width(std::int64_t block) const { return std::min(block_size, size_ - block * block_size); }
  bool point_mass() const { return point_mass_; }
  bool empty() const { return !has_mass(peak_); }
  double total() const { return total_; }
  const double* sums() const { return sums_; }  // of the blocks' exponentials, relative to the row's highest logit

  void measure() {
    for (std::int64_t block = 0; block < blocks(); ++block) {
      const float highest = peaks_[block] = peak_of(at(block), width(block));
      peak_ = std::max(peak_, highest);
      if (point_mass_) continue;
      alignas(64) float mass[block_size];
      sums_[block] = has_mass(highest) ? exponentials_of(at(block), width(block), highest, scale_, threshold_, mass) : 0.0;
    }
    if (point_mass_ || empty()) return;
    for (std::int64_t block = 0; block < blocks(); ++block) {
      if (sums_[block] > 0.0) sums_[block] *= height(block);
      total_ += sums_[block];
    }
  }

  // The lowest id that has the highest logit, and 0 where no logit is above -inf.
  std::int64_t argmax() const {
    if (peak_ == -infinity) return 0;
    std::int64_t id = (std::find(peaks_, peaks_ + blocks(), peak_) - peaks_) * block_size;
    while (widen(logits_[id]) != peak_) ++id;
    return id;
  }

  // In float64 and from the logit: right also where float32 has no number so small.
  double prob(std::int64_t id) const {
    if (empty()) return 0.0;
    if (point_mass_) return id == argmax() ? 1.0 : 0.0;
    const float logit = widen(logits_[id]);
    return logit < threshold_ ? 0.0 : std::exp((static_cast<double>(logit) - peak_) * rate_) / total_;
  }

  // A block's unnormalised probabilities, relative to the row's highest logit.
  void fill(std::int64_t block, float* mass) const {
    exponentials_of(at(block), width(block), peak_, scale_, threshold_, mass);
  }

  // The same, relative to the block's own highest logit, which keeps the small ones apart. Returns what they are to be
  // multiplied by. For a block that has mass.
  double fill_low(std::int64_t block, float* mass) const {
    exponentials_of(at(block), width(block), peaks_[block], scale_, threshold_, mass);
    return height(block);
  }

 private:
  const Logit* at(std::int64_t block) const { return logits_ + block * block_size; }
  bool has_mass(float peak) const { return peak > -infinity && peak >= threshold_; }
  double height(std::int64_t block) const { return std::exp((static_cast<double>(peaks_[block]) - peak_) * rate_); }

  const Logit* logits_;
  std::int64_t size_;
  float threshold_;
  bool point_mass_;
  double rate_;
  float scale_;
  float* peaks_;
  double* sums_;
  float peak_ = -infinity;
  double total_ = 0.0;
};

// The smallest id whose cumulative weight exceeds uniform * total, or -1 where there is no weight at all. `sums` are the
// blocks' weights; `fill(block, weights)` writes those of a block whose sum is positive, in any unit, and returns the unit.
// The id always has a positive weight: where rounding runs past the end of a block, its last one.
template <typename Fill>
std::int64_t draw(const double* sums, std::int64_t size, double uniform, Fill fill) {
  const std::int64_t blocks = blocks_of(size);
  double total = 0.0;
  for (std::int64_t block = 0; block < blocks; ++block) total += sums[block];
  const double bound = uniform * total;

  std::int64_t chosen = -1;
  double before = 0.0, cumulative = 0.0;
  for (std::int64_t block = 0; block < blocks && cumulative <= bound; ++block) {
    if (!(sums[block] > 0.0)) continue;
    chosen = block;
    before = cumulative;
    cumulative += sums[block];
  }
  if (chosen < 0) return -1;

  alignas(64) float weights[block_size];
  const double unit = fill(chosen, weights);
  const double rest = (bound - before) / unit;
  const std::int64_t begin = chosen * block_size, width = std::min(block_size, size - begin);
  std::int64_t last = 0;
  cumulative = 0.0;
  for (std::int64_t i = 0; i < width && cumulative <= rest; ++i) {
    if (weights[i] > 0.0f) last = i;
    cumulative += weights[i];
  }
  return begin + last;
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Scratch of one thread, for a position at a time.
struct Scratch {
  std::vector<float> target_peaks, draft_peaks;
  std::vector<double> target_sums, draft_sums, residual_sums;
  std::vector<float> spread;  // a draft row on the target's ids; all 0 between rows

  void reserve(std::int64_t vocabulary, std::int64_t draft_vocabulary, bool mapped) {
    const auto grow = [](auto& values, std::int64_t size) {
      if (values.size() < static_cast<std::size_t>(size)) values.resize(static_cast<std::size_t>(size));
    };
    grow(target_peaks, blocks_of(vocabulary));
    grow(target_sums, blocks_of(vocabulary));
    grow(residual_sums, blocks_of(vocabulary));
    grow(draft_peaks, blocks_of(draft_vocabulary));
    grow(draft_sums, blocks_of(draft_vocabulary));
    if (mapped) grow(spread, vocabulary);
  }
};

// One position of one row of the batch.
template <typename Target, typename Draft>
class Position {
 public:
  Position(const VerifyParams& params, std::int64_t row, std::int64_t position, Scratch& scratch)
      : params_(params),
        row_(row),
        position_(position),
        scratch_(scratch),
        map_(params.draft_to_target ? params.draft_to_target + row * params.map_stride_batch : nullptr) {}

  // -1 where the drafted token is accepted, else the token to emit in its place.
  std::int64_t test() const {
    const std::int64_t token = params_.draft_tokens[row_ * params_.draft_length + position_];
    const Distribution<Target> target = measured_target();
    if (target.point_mass()) return token == target.argmax() ? -1 : target.argmax();
    if (!params_.draft_logits) return accepts(1.0, target.prob(token)) ? -1 : draw_without(target, token);
    const Distribution<Draft> draft = measured_draft();
    if (accepts(prob_of(token, draft), target.prob(token))) return -1;
    if (draft.empty()) return draw_from(target);
    if (draft.point_mass()) return draw_without(target, map_ ? map_[draft.argmax()] : draft.argmax());
    return draw_from_residual(target, draft);
  }

  std::int64_t bonus() const {
    const Distribution<Target> target = measured_target();
    return target.point_mass() ? target.argmax() : draw_from(target);
  }

 private:
  Distribution<Target> measured_target() const {
    const std::int64_t at = row_ * (params_.draft_length + 1) + position_;
    Distribution<Target> target(static_cast<const Target*>(params_.target_logits) + row_ * params_.target_stride_batch +
                                    position_ * params_.target_stride_position,
                                params_.vocabulary, params_.target_temperature.at(row_),
                                params_.target_threshold ? params_.target_threshold[at] : -infinity,
                                scratch_.target_peaks.data(), scratch_.target_sums.data());
    target.measure();
    return target;
  }

  Distribution<Draft> measured_draft() const {
    const std::int64_t at = row_ * params_.draft_length + position_;
    Distribution<Draft> draft(static_cast<const Draft*>(params_.draft_logits) + row_ * params_.draft_stride_batch +
                                  position_ * params_.draft_stride_position,
                              params_.draft_vocabulary, params_.draft_temperature.at(row_),
                              params_.draft_threshold ? params_.draft_threshold[at] : -infinity,
                              scratch_.draft_peaks.data(), scratch_.draft_sums.data());
    draft.measure();
    return draft;
  }

  double uniform(std::int64_t column) const {
    const std::int64_t at = row_ * (params_.draft_length + 1) + column;
    return params_.uniforms_are_float64 ? static_cast<const double*>(params_.uniforms)[at]
                                        : static_cast<const float*>(params_.uniforms)[at];
  }

  // Strict: a uniform of 0 must not accept what the target never says.
  bool accepts(double draft_prob, double target_prob) const {
    return uniform(position_) * draft_prob < target_prob;
  }

  // Probability that the proposal gives to a target id.
  double prob_of(std::int64_t token, const Distribution<Draft>& draft) const {
    if (!map_) return draft.prob(token);
    double prob = 0.0;
    for (std::int64_t block = 0; block < draft.blocks(); ++block) {
      const std::int64_t begin = block * block_size, end = begin + draft.width(block);
      if (count(map_ + begin, end - begin, static_cast<std::int32_t>(token)) == 0) continue;
      for (std::int64_t id = begin; id < end; ++id) {
        if (map_[id] == token) prob += draft.prob(id);
      }
    }
    return prob;
  }

  std::int64_t draw_from(const Distribution<Target>& target) const {
    if (target.empty()) return target.argmax();  // nothing is defined there; at least it is an id
    return draw(target.sums(), params_.vocabulary, uniform(params_.draft_length),
                [&](std::int64_t block, float* mass) { return target.fill_low(block, mass); });
  }

  // max(0, p - q) where q is a point mass.
  std::int64_t draw_without(const Distribution<Target>& target, std::int64_t token) const {
    if (target.empty()) return target.argmax();
    const std::int64_t changed = token / block_size;
    const auto fill = [&](std::int64_t block, float* mass) {
      const double unit = target.fill_low(block, mass);
      if (block == changed) mass[token % block_size] = 0.0f;
      return unit;
    };
    double* const sums = scratch_.residual_sums.data();
    std::copy(target.sums(), target.sums() + target.blocks(), sums);
    if (sums[changed] > 0.0) {
      alignas(64) float mass[block_size];
      const double unit = fill(changed, mass);
      sums[changed] = 0.0;
      for (std::int64_t i = 0; i < target.width(changed); ++i) sums[changed] += mass[i];
      sums[changed] *= unit;
    }
    const std::int64_t drawn = draw(sums, params_.vocabulary, uniform(params_.draft_length), fill);
    return drawn < 0 ? draw_from(target) : drawn;
  }

  std::int64_t draw_from_residual(const Distribution<Target>& target, const Distribution<Draft>& draft) const {
    if (target.empty()) return target.argmax();
    const float scale = static_cast<float>(1.0 / target.total()), draft_scale = static_cast<float>(1.0 / draft.total());
    float* const spread = scratch_.spread.data();
    if (map_) add_up(draft, spread);
    const auto fill = [&](std::int64_t block, float* mass) {
      target.fill(block, mass);
      if (map_) return subtract(mass, scale, spread + block * block_size, draft_scale, target.width(block));
      alignas(64) float draft_mass[block_size];
      draft.fill(block, draft_mass);
      return subtract(mass, scale, draft_mass, draft_scale, target.width(block));
    };
    double* const sums = scratch_.residual_sums.data();
    for (std::int64_t block = 0; block < target.blocks(); ++block) {
      alignas(64) float mass[block_size];
      sums[block] = fill(block, mass);
    }
    const std::int64_t drawn =
        draw(sums, params_.vocabulary, uniform(params_.draft_length), [&](std::int64_t block, float* mass) {
          fill(block, mass);
          return 1.0;
        });
    if (map_) {
      for (std::int64_t id = 0; id < params_.draft_vocabulary; ++id) spread[map_[id]] = 0.0f;
    }
    return drawn < 0 ? draw_from(target) : drawn;  // rounding may leave a rejection without residual
  }

  void add_up(const Distribution<Draft>& draft, float* spread) const {
    alignas(64) float mass[block_size];
    for (std::int64_t block = 0; block < draft.blocks(); ++block) {
      draft.fill(block, mass);
      const std::int32_t* const ids = map_ + block * block_size;
      for (std::int64_t i = 0; i < draft.width(block); ++i) spread[ids[i]] += mass[i];
    }
  }

  const VerifyParams& params_;
  std::int64_t row_, position_;
  Scratch& scratch_;
  const std::int32_t* map_;
};

constexpr std::int64_t parallel_from = 1 << 18;  // logits to sum; below this, waking a thread costs more than it saves
constexpr std::int64_t argmax_gain = 8;         // so many logits are searched while one is summed

template <typename Target, typename Draft>
void run(const VerifyParams& params, int most_threads) {
  const std::int64_t positions = params.draft_length + 1, items = params.batch * positions;
  const bool cold = !params.target_temperature.per_row && params.target_temperature.shared == 0.0f;
  const std::int64_t work = cold ? items * params.vocabulary / argmax_gain
                                 : items * (params.vocabulary + (params.draft_logits ? params.draft_vocabulary : 0));
  const int threads = work < parallel_from ? 1 : static_cast<int>(std::clamp<std::int64_t>(most_threads, 1, items));

  // Kept from call to call: fresh pages cost more than the arithmetic.
  static thread_local std::vector<Scratch> kept;
  if (kept.size() < static_cast<std::size_t>(threads)) kept.resize(static_cast<std::size_t>(threads));
  Scratch* const scratch = kept.data();
  for (int thread = 0; thread < threads; ++thread) {
    scratch[thread].reserve(params.vocabulary, params.draft_vocabulary, params.draft_to_target != nullptr);
  }

  for (std::int64_t row = 0; row < params.batch; ++row) {
    params.accepted_length[row] = params.lengths ? params.lengths[row] : params.draft_length;
  }

  // All rows' first position, then all rows' second: a thread that is free looks ahead, and whoever finds a rejection lowers
  // accepted_length, past which nobody looks any more. So one row keeps several threads busy, and they meet only once.
  const auto decide = [&](std::int64_t item, Scratch& own) {
    const std::int64_t row = item % params.batch, position = item / params.batch;
    std::int64_t length;
#pragma omp atomic read
    length = params.accepted_length[row];
    if (position > length) return;
    const Position<Target, Draft> here(params, row, position, own);
    const bool drafted = position < (params.lengths ? params.lengths[row] : params.draft_length);
    const std::int64_t following = drafted ? here.test() : here.bonus();
    if (following < 0) return;
    params.tokens[row * positions + position] = following;
#pragma omp critical(hedgespec_verify_rejection)
    if (position < params.accepted_length[row]) {
#pragma omp atomic write
      params.accepted_length[row] = position;
    }
  };
  if (threads == 1) {
    for (std::int64_t item = 0; item < items; ++item) decide(item, *scratch);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t item = 0; item < items; ++item) decide(item, scratch[thread_index()]);
  }

  for (std::int64_t row = 0; row < params.batch; ++row) {
    const std::int64_t accepted = params.accepted_length[row];
    std::copy_n(params.draft_tokens + row * params.draft_length, accepted, params.tokens + row * positions);
    std::fill(params.tokens + row * positions + accepted + 1, params.tokens + (row + 1) * positions, -1);
  }
}

}  // namespace

void verify_cpu(const VerifyParams& params, int threads) {
  const bool narrow_target = params.target_dtype == Dtype::bfloat16;
  const bool narrow_draft = params.draft_logits && params.draft_dtype == Dtype::bfloat16;
  if (narrow_target && narrow_draft) return run<Bfloat16, Bfloat16>(params, threads);
  if (narrow_target) return run<Bfloat16, float>(params, threads);
  if (narrow_draft) return run<float, Bfloat16>(params, threads);
  return run<float, float>(params, threads);
}

}  // namespace hedgespec
