// Every drafter against the target, on the CPU.
//
// Each logit is read from memory once and its exponential is taken once. A target row's masses stay in scratch for all N
// drafters. A thread takes its drafters one after another in one buffer: while the masses of a drafter are written there,
// those of the drafter before, whose normaliser is known by then, are read for their overlap. Blocks are summed in float32
// and added up in float64, so the rounding error does not grow with the vocabulary.

#include <algorithm>
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

using rows::block_size;
using rows::chunk_size;
using rows::infinity;

constexpr std::int64_t parallel_from = 1 << 15;       // logits; below this, waking a thread costs more than it saves
constexpr std::int64_t scratch_logits = 1 << 24;      // target masses kept at a time: 64 MiB
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;
constexpr float longest_shift = 1 << 20;              // beyond, a shift and a power no longer fit one float
constexpr float smallest_scale = 0x1p-60f, largest_scale = 0x1p60f;
constexpr double negligible = 1e-33;                  // a block's weight: 2048 masses of up to 2^60 times this are nothing

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int thread_count() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

std::int64_t blocks_in(std::int64_t size) { return (size + block_size - 1) / block_size; }
std::int64_t chunks_in(std::int64_t size) { return (size + chunk_size - 1) / chunk_size; }
std::int64_t padded(std::int64_t size) { return chunks_in(size) * chunk_size; }

// A row of logits as it is handed in.
template <typename Logit>
struct Row {
  const Logit* logits;
  std::int64_t size;
  float temperature;
  float threshold;  // logits below it have no mass

  std::int64_t length(std::int64_t block) const { return std::min(block_size, size - block * block_size); }
};

// Its masses count 2^shift times as much as they say, which is `weight` of the row's whole mass; 0 where it has none.
struct Block {
  float shift, sum, highest;
  double weight;
};

// A row as a distribution: softmax(logits / temperature), or a point mass on the peak.
struct Law {
  float peak;          // the highest logit
  std::int64_t index;  // the lowest index that holds it; -1 where no logit is above -inf
  float threshold;
  bool point_mass;
  double scale;      // 1 / temperature
  double log_total;  // of the sum of exp((logit - peak) * scale)

  bool empty() const { return index < 0 || peak < threshold; }
  double log_prob(float logit, std::int64_t at) const {
    if (empty()) return -infinity;
    if (point_mass) return at == index ? 0.0 : -infinity;
    if (logit < threshold) return -infinity;
    return (static_cast<double>(logit) - peak) * scale - log_total;
  }
};

// e^x for x <= 0, and exactly 0 below x = -87.7; relative error below 2e-7. For rows that the fast loops cannot take.
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

// Masses relative to the peak, whatever the size of logits and temperature; shifts are 0.
template <typename Logit>
void fill_carefully(const Row<Logit>& row, float* masses, Block* blocks) {
  const auto& loops = rows::best_kernels<Logit>();
  float peak = -infinity;
  for (std::int64_t b = 0; b < blocks_in(row.size); ++b) {
    blocks[b].highest = loops.highest(row.logits + b * block_size, row.length(b));
    peak = std::max(peak, blocks[b].highest);
  }
  const float scale = std::min(1.0f / row.temperature, std::numeric_limits<float>::max());
  for (std::int64_t b = 0; b < blocks_in(row.size); ++b) {
    const Logit* const logits = row.logits + b * block_size;
    float* const out = masses + b * block_size;
    float sum = 0.0f;
    for (std::int64_t i = 0; i < row.length(b); ++i) {
      const float logit = widen(logits[i]);
      out[i] = logit >= row.threshold && logit > -infinity ? exp_nonpositive((logit - peak) * scale) : 0.0f;
      sum += out[i];
    }
    std::fill(out + row.length(b), out + padded(row.length(b)), 0.0f);
    blocks[b].shift = 0.0f;
    blocks[b].sum = sum;
  }
}

// The overlap of a drafter with the target, block by block.
struct Overlap {
  const float* target_masses;
  const Block *target_blocks, *draft_blocks;
  double sum = 0.0;

  // The draft's masses in the units of the target's: 0 where one of the blocks is empty, or next to it.
  float relative_weight(std::int64_t block) const {
    const double own = target_blocks[block].weight;
    if (own < negligible) return 0.0f;
    return static_cast<float>(std::min<double>(draft_blocks[block].weight / own, std::numeric_limits<float>::max()));
  }
  void add(std::int64_t block, float overlap) { sum += overlap * target_blocks[block].weight; }
};

// Masses of the blocks [first, last) of a row; `overlap`, if given, is brought up to date with what they replace. False if
// the row needs fill_carefully: then only the overlap is complete.
template <typename Logit>
bool fill(const Row<Logit>& row, std::int64_t first, std::int64_t last, float* masses, Block* blocks, Overlap* overlap) {
  const auto& loops = rows::best_kernels<Logit>();
  const float scale = static_cast<float>(log2_e / row.temperature);
  bool fits = loops.fused && scale >= smallest_scale && scale <= largest_scale;
  float highest = -infinity;
  for (std::int64_t b = first; b < last; ++b) {
    const Logit* const logits = row.logits + b * block_size;
    float* const out = masses + b * block_size;
    const std::int64_t length = row.length(b);
    rows::Pending pending{};
    if (overlap) pending = {overlap->target_masses + b * block_size, overlap->relative_weight(b), 0.0f};

    // The highest logit so far is near enough to this block's own, most of the time.
    if (fits && highest == -infinity) highest = loops.highest(logits, length);
    rows::Scaling scaling{scale, highest == -infinity ? 0.0f : std::ceil(highest * scale), row.threshold};
    fits = fits && std::abs(scaling.shift) <= longest_shift;  // false for NaN too
    if (!fits) {
      if (overlap) overlap->add(b, loops.overlap(pending.target, out, pending.weight, length));
      continue;
    }
    rows::BlockMasses found = overlap ? loops.masses_and_overlap(logits, length, scaling, out, pending)
                                      : loops.masses(logits, length, scaling, out);
    if (overlap) overlap->add(b, pending.overlap);
    if (found.highest * scale > scaling.shift + rows::highest_surplus) {
      scaling.shift = std::ceil(found.highest * scale);
      fits = std::abs(scaling.shift) <= longest_shift;
      if (!fits) continue;
      found = loops.masses(logits, length, scaling, out);
    }
    highest = std::max(highest, found.highest);
    blocks[b] = found.highest == -infinity ? Block{0.0f, 0.0f, -infinity, 0.0}
                                              : Block{scaling.shift, found.sum, found.highest, 0.0};
  }
  return fits;
}

// The lowest index whose logit is `peak`, given each block's highest.
template <typename Logit>
std::int64_t find_peak(const Row<Logit>& row, const Block* blocks, float peak) {
  if (peak == -infinity) return -1;
  const auto& loops = rows::best_kernels<Logit>();
  std::int64_t b = 0;
  while (blocks[b].highest != peak) ++b;
  std::int64_t i = b * block_size;
  while (i + chunk_size <= row.size && loops.highest(row.logits + i, chunk_size) != peak) i += chunk_size;
  while (widen(row.logits[i]) != peak) ++i;
  return i;
}

// The law of a row whose blocks are filled, `carefully` or by the fast loops; gives the blocks their weights.
template <typename Logit>
Law law_of(const Row<Logit>& row, Block* blocks, bool carefully) {
  Law law{-infinity, -1, row.threshold, false, 0.0, 0.0};
  const std::int64_t count = blocks_in(row.size);
  for (std::int64_t b = 0; b < count; ++b) law.peak = std::max(law.peak, blocks[b].highest);
  law.index = find_peak(row, blocks, law.peak);
  if (law.empty()) return law;
  const float scale = static_cast<float>(log2_e / row.temperature);
  const float reference = carefully ? 0.0f : std::ceil(law.peak * scale);
  double total = 0.0;
  for (std::int64_t b = 0; b < count; ++b) {
    blocks[b].weight = blocks[b].sum > 0.0f ? std::ldexp(1.0, static_cast<int>(blocks[b].shift - reference)) : 0.0;
    total += blocks[b].sum * blocks[b].weight;
  }
  for (std::int64_t b = 0; b < count; ++b) blocks[b].weight /= total;
  if (carefully) {
    law.scale = std::min(1.0f / row.temperature, std::numeric_limits<float>::max());
    law.log_total = std::log(total);
  } else {
    // With the scale that the loops used, its rounding included.
    law.scale = static_cast<double>(scale) * ln_2;
    law.log_total = std::max(0.0, std::log(total) + reference * ln_2 - law.peak * law.scale);  // the peak alone gives 0
  }
  return law;
}

template <typename Logit>
Law point_mass(const Row<Logit>& row, Block* blocks) {
  const auto& loops = rows::best_kernels<Logit>();
  Law law{-infinity, -1, row.threshold, true, 0.0, 0.0};
  for (std::int64_t b = 0; b < blocks_in(row.size); ++b) {
    blocks[b].highest = loops.highest(row.logits + b * block_size, row.length(b));
    law.peak = std::max(law.peak, blocks[b].highest);
  }
  law.index = find_peak(row, blocks, law.peak);
  return law;
}

// The law of a row after `fill` went over all its blocks; `filled` says whether it could.
template <typename Logit>
Law finish(const Row<Logit>& row, float* masses, Block* blocks, bool filled) {
  if (row.temperature == 0.0f) return point_mass(row, blocks);
  if (!filled) fill_carefully(row, masses, blocks);
  return law_of(row, blocks, !filled);
}

// The indices of the `count` highest logits that have mass, ties to the lowest; returns how many there are.
template <typename Logit>
std::int64_t likeliest(const Row<Logit>& row, std::int64_t count, std::int64_t* indices) {
  const auto& loops = rows::best_kernels<Logit>();
  std::int64_t found = 0;
  for (std::int64_t begin = 0; begin < row.size; begin += chunk_size) {
    const std::int64_t end = std::min(begin + chunk_size, row.size);
    const float least = found < count ? -infinity : widen(row.logits[indices[count - 1]]);
    if (!(loops.highest(row.logits + begin, end - begin) > least)) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      const float logit = widen(row.logits[i]);
      if (!(logit >= row.threshold && logit > -infinity)) continue;
      if (found == count && !(logit > widen(row.logits[indices[count - 1]]))) continue;
      std::int64_t place = found < count ? found++ : count - 1;
      for (; place > 0 && logit > widen(row.logits[indices[place - 1]]); --place) indices[place] = indices[place - 1];
      indices[place] = i;
    }
  }
  return found;
}

// Memory of a thread or of a target row, kept from call to call: fresh pages cost more than the arithmetic.
struct Scratch {
  struct alignas(64) Chunk {  // no vector of masses straddles two cache lines
    float masses[chunk_size];
  };
  std::vector<Chunk> chunks;
  std::vector<Block> blocks;
  std::int64_t row_chunks = 0, row_blocks = 0;

  void reserve(std::int64_t count, std::int64_t size, std::int64_t block_sets) {
    row_chunks = chunks_in(size);
    row_blocks = blocks_in(size) * block_sets;
    chunks.resize(std::max(chunks.size(), static_cast<std::size_t>(count * row_chunks)));
    blocks.resize(std::max(blocks.size(), static_cast<std::size_t>(count * row_blocks)));
  }
  float* masses_of(std::int64_t row) { return reinterpret_cast<float*>(chunks.data() + row * row_chunks); }
  Block* blocks_of(std::int64_t row) { return blocks.data() + row * row_blocks; }
};

template <typename Target, typename Draft>
class Evaluation {
 public:
  Evaluation(const EvaluateParams& given, int threads)
      : params(given),
        row_count(given.batch * given.positions),
        most_threads(row_count * (given.vocabulary + given.drafters * given.draft_vocabulary) < parallel_from
                         ? 1
                         : std::max(threads, 1)) {}

  void run() {
    const std::int64_t group =
        std::min(row_count, std::max<std::int64_t>(most_threads, scratch_logits / params.vocabulary));
    static thread_local Scratch target_scratch, draft_scratch;
    static thread_local std::vector<Law> all_laws;
    static thread_local std::vector<double> all_parts;
    target_scratch.reserve(group, params.vocabulary, 1);
    draft_scratch.reserve(most_threads, params.draft_vocabulary, 2);
    all_laws.resize(std::max<std::size_t>(all_laws.size(), group + most_threads));
    all_parts.resize(std::max<std::size_t>(all_parts.size(), (group + most_threads) * most_threads));
    targets = &target_scratch, drafts = &draft_scratch;
    target_laws = all_laws.data(), draft_laws = target_laws + group, parts = all_parts.data();

    for (first = 0; first < row_count; first += group) {
      count = std::min(group, row_count - first);
      if (most_threads == 1) {
        evaluate_group();  // even a team of one would take as long to set up as a few small rows
      } else {
#pragma omp parallel num_threads(most_threads)
        evaluate_group();
      }
    }
    if (params.draft_length > 0) expect_lengths();
  }

 private:
  const EvaluateParams& params;
  const std::int64_t row_count;
  const int most_threads;
  std::int64_t first = 0, count = 0;  // the rows at hand
  Scratch *targets = nullptr, *drafts = nullptr;
  Law *target_laws = nullptr, *draft_laws = nullptr;
  double* parts = nullptr;  // what threads that share a row found, [rows or units, splits]

  bool valid(std::int64_t row) const {
    return !params.lengths || row % params.positions < params.lengths[row / params.positions];
  }
  Row<Target> target_row(std::int64_t row) const {
    const std::int64_t b = row / params.positions, t = row % params.positions;
    return {static_cast<const Target*>(params.target_logits) + b * params.target_stride_batch +
                t * params.target_stride_position,
            params.vocabulary, params.target_temperature.at(b),
            params.target_threshold ? params.target_threshold[row] : -infinity};
  }
  Row<Draft> draft_row(std::int64_t drafter, std::int64_t row) const {
    const std::int64_t b = row / params.positions, t = row % params.positions;
    return {static_cast<const Draft*>(params.drafter_logits) + drafter * params.drafter_stride_drafter +
                b * params.drafter_stride_batch + t * params.drafter_stride_position,
            params.draft_vocabulary, params.drafter_temperature.at(b),
            params.drafter_threshold ? params.drafter_threshold[drafter * row_count + row] : -infinity};
  }
  const std::int32_t* map_of(std::int64_t drafter) const {
    return params.draft_to_target ? params.draft_to_target + drafter * params.draft_vocabulary : nullptr;
  }

  // The rows at hand. This and the three below are called by every thread of a team.
  void evaluate_group() {
    normalise_targets();
    if (count * params.drafters >= thread_count()) {
      score_in_turn();
    } else {
      score_together();
    }
  }

  // Masses and laws of the target rows.
  void normalise_targets() {
    const std::int64_t blocks = blocks_in(params.vocabulary);
    const std::int64_t splits = std::clamp<std::int64_t>(thread_count() / count, 1, blocks);
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < count * splits; ++part) {
      const std::int64_t at = part / splits, split = part % splits;
      if (!valid(first + at)) continue;
      const Row<Target> row = target_row(first + at);
      if (row.temperature == 0.0f) continue;
      parts[part] = fill(row, blocks * split / splits, blocks * (split + 1) / splits, targets->masses_of(at),
                         targets->blocks_of(at), nullptr);
    }
#pragma omp for schedule(static)
    for (std::int64_t at = 0; at < count; ++at) {
      if (!valid(first + at)) continue;
      const bool filled = std::all_of(parts + at * splits, parts + (at + 1) * splits, [](double part) { return part != 0.0; });
      const Law& law = target_laws[at] = finish(target_row(first + at), targets->masses_of(at), targets->blocks_of(at), filled);
      if (params.draft_to_target && !law.point_mass && !law.empty()) normalise(at);
    }
  }

  // A map leads to any block of the target's masses, so they are brought to one scale.
  void normalise(std::int64_t at) {
    for (std::int64_t b = 0; b < blocks_in(params.vocabulary); ++b) {
      const float weight = static_cast<float>(targets->blocks_of(at)[b].weight);
      float* const masses = targets->masses_of(at) + b * block_size;
      for (std::int64_t i = 0; i < std::min(block_size, params.vocabulary - b * block_size); ++i) masses[i] *= weight;
    }
  }

  // A drafter at a row whose masses are in a buffer, and whose overlap is still to come.
  struct Unit {
    std::int64_t drafter, at;
    Law law;
    Block* blocks;
  };

  Overlap overlap_of(const Unit& unit) const {
    return {targets->masses_of(unit.at), targets->blocks_of(unit.at), unit.blocks};
  }

  // The threads take one drafter after another, row by row, each through one buffer. A thread that something holds up takes
  // fewer.
  void score_in_turn() {
    const std::int64_t units = count * params.drafters, thread = thread_index();
    const std::int64_t blocks = blocks_in(params.draft_vocabulary);
    float* const masses = drafts->masses_of(thread);
    Block* const block_sets[] = {drafts->blocks_of(thread), drafts->blocks_of(thread) + blocks};
    Unit waiting{-1, 0, {}, nullptr};  // the drafter before, as long as its overlap is not known
#pragma omp for schedule(dynamic) nowait
    for (std::int64_t u = 0; u < units; ++u) {
      Unit unit{u % params.drafters, u / params.drafters, {}, block_sets[waiting.blocks == block_sets[0]]};
      if (!valid(first + unit.at)) {
        skip(unit);
        continue;
      }
      const Row<Draft> row = draft_row(unit.drafter, first + unit.at);
      bool filled = true;
      if (row.temperature != 0.0f) {
        if (waiting.drafter >= 0) {
          Overlap overlap = overlap_of(waiting);
          filled = fill(row, 0, blocks, masses, unit.blocks, &overlap);
          write_prob(waiting, overlap.sum);
          waiting.drafter = -1;
        } else {
          filled = fill(row, 0, blocks, masses, unit.blocks, nullptr);
        }
      }
      unit.law = finish(row, masses, unit.blocks, filled);
      score(unit, row);
      if (!overlaps(unit)) continue;
      if (map_of(unit.drafter)) {
        write_prob(unit, overlap_in_blocks(unit, masses, 0, blocks));
      } else {
        waiting = unit;
      }
    }
    if (waiting.drafter >= 0) write_prob(waiting, overlap_in_blocks(waiting, masses, 0, blocks));
  }

  // Fewer drafters at hand than threads: the threads share each row.
  void score_together() {
    const std::int64_t units = count * params.drafters, blocks = blocks_in(params.draft_vocabulary);
    const std::int64_t splits = std::clamp<std::int64_t>(thread_count() / units, 1, blocks);
    const auto unit_at = [&](std::int64_t u) {
      return Unit{u % params.drafters, u / params.drafters, draft_laws[u], drafts->blocks_of(u)};
    };
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < units * splits; ++part) {
      const Unit unit = unit_at(part / splits);
      if (!valid(first + unit.at)) continue;
      const Row<Draft> row = draft_row(unit.drafter, first + unit.at);
      if (row.temperature == 0.0f) continue;
      const std::int64_t split = part % splits;
      parts[part] = fill(row, blocks * split / splits, blocks * (split + 1) / splits, drafts->masses_of(part / splits),
                         unit.blocks, nullptr);
    }
#pragma omp for schedule(static)
    for (std::int64_t u = 0; u < units; ++u) {
      Unit unit = unit_at(u);
      if (!valid(first + unit.at)) {
        skip(unit);
        continue;
      }
      const Row<Draft> row = draft_row(unit.drafter, first + unit.at);
      const bool filled = std::all_of(parts + u * splits, parts + (u + 1) * splits, [](double part) { return part != 0.0; });
      draft_laws[u] = unit.law = finish(row, drafts->masses_of(u), unit.blocks, filled);
      score(unit, row);
    }
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < units * splits; ++part) {
      const Unit unit = unit_at(part / splits);
      const std::int64_t split = part % splits;
      if (!valid(first + unit.at) || !overlaps(unit)) continue;
      parts[part] = overlap_in_blocks(unit, drafts->masses_of(part / splits), blocks * split / splits,
                                      blocks * (split + 1) / splits);
    }
#pragma omp for schedule(static)
    for (std::int64_t u = 0; u < units; ++u) {
      const Unit unit = unit_at(u);
      if (!valid(first + unit.at) || !overlaps(unit)) continue;
      double sum = 0.0;
      for (std::int64_t split = 0; split < splits; ++split) sum += parts[u * splits + split];
      write_prob(unit, sum);
    }
  }

  // sum_v min(p(v), q(v)) takes the masses of both; where one side has none or is a point mass there are none.
  bool overlaps(const Unit& unit) const {
    const Law& target = target_laws[unit.at];
    return !target.empty() && !target.point_mass && !unit.law.empty() && !unit.law.point_mass;
  }

  double overlap_in_blocks(const Unit& unit, const float* masses, std::int64_t begin, std::int64_t end) const {
    const auto& loops = rows::best_kernels<Draft>();
    const std::int32_t* const map = map_of(unit.drafter);
    Overlap overlap = overlap_of(unit);
    const std::int64_t size = params.draft_vocabulary;
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t start = b * block_size, length = std::min(block_size, size - start);
      if (!map) {
        overlap.add(b, loops.overlap(overlap.target_masses + start, masses + start, overlap.relative_weight(b), length));
        continue;
      }
      overlap.sum += loops.overlap_mapped(overlap.target_masses, masses + start, map + start,
                                          static_cast<float>(unit.blocks[b].weight), length);
    }
    return overlap.sum;
  }

  struct Scores {
    double prob, ratio, argmax_prob, argmax_ratio;
  };

  // What is known of a unit once its law is.
  void score(const Unit& unit, const Row<Draft>& row) const {
    write(unit, scores(unit, row));
    if (params.top_k > 0) score_candidates(unit, row);
  }

  // All but the overlap, which is 0 here where there is one to come.
  Scores scores(const Unit& unit, const Row<Draft>& row) const {
    const Law &target = target_laws[unit.at], &draft = unit.law;
    if (target.empty() || draft.empty()) return {};
    const Row<Target> target_side = target_row(first + unit.at);
    const std::int32_t* const map = map_of(unit.drafter);
    const auto target_id = [&](std::int64_t id) { return map ? map[id] : id; };
    const auto target_log_prob = [&](std::int64_t id) { return target.log_prob(widen(target_side.logits[id]), id); };
    const auto draft_log_prob = [&](std::int64_t token) {
      const std::int64_t id = map ? rows::best_kernels<Draft>().find(map, row.size, static_cast<std::int32_t>(token)) : token;
      return id < 0 ? -static_cast<double>(infinity) : draft.log_prob(widen(row.logits[id]), id);
    };
    const std::int64_t token = params.tokens[first + unit.at], proposal = target_id(draft.index);

    Scores found{};
    found.argmax_prob = std::exp(target_log_prob(proposal));
    found.argmax_ratio = token == proposal;
    if (draft.point_mass) {
      found.prob = found.argmax_prob;
    } else if (target.point_mass) {
      found.prob = std::exp(draft_log_prob(target.index));
    }
    // In logarithms: q(x) / p(x) stays right where both underflow. p(x) = 0 gives 1 if q(x) > 0, else 0.
    const double log_draft = draft_log_prob(token);
    found.ratio = log_draft == -infinity ? 0.0 : std::exp(std::min(0.0, log_draft - target_log_prob(token)));
    return found;
  }

  // The tree mode for every number of candidates: what the first ones add up to.
  void score_candidates(const Unit& unit, const Row<Draft>& row) const {
    const Law& target = target_laws[unit.at];
    const Row<Target> target_side = target_row(first + unit.at);
    const std::int32_t* const map = map_of(unit.drafter);
    const std::int64_t token = params.tokens[first + unit.at];
    std::int64_t candidates[32];
    const std::int64_t usable = target.empty() || unit.law.empty() ? 0 : likeliest(row, params.top_k, candidates);
    double mass = 0.0;
    bool is_in = false;
    for (std::int64_t i = 0; i < params.top_k; ++i) {
      if (i < usable) {
        const std::int64_t id = map ? map[candidates[i]] : candidates[i];
        mass += std::exp(target.log_prob(widen(target_side.logits[id]), id));
        is_in = is_in || id == token;
      }
      write_candidates(unit, i, static_cast<float>(std::min(mass, 1.0)), is_in ? 1.0f : 0.0f);
    }
  }

  // With index + 1 candidates.
  void write_candidates(const Unit& unit, std::int64_t index, float prob, float ratio) const {
    const std::int64_t plane = params.drafters * row_count;
    float* const at = params.top_k_acceptance + 2 * index * plane + unit.drafter * row_count + first + unit.at;
    at[0] = prob;
    at[plane] = ratio;
  }

  // A unit past its row's length.
  void skip(const Unit& unit) const {
    write(unit, Scores{});
    for (std::int64_t i = 0; i < params.top_k; ++i) write_candidates(unit, i, 0.0f, 0.0f);
  }

  void write(const Unit& unit, const Scores& found) const {
    const std::int64_t at = unit.drafter * row_count + first + unit.at;
    write_prob(unit, found.prob);
    params.acceptance_ratio[at] = static_cast<float>(found.ratio);
    params.argmax_acceptance_prob[at] = static_cast<float>(found.argmax_prob);
    params.argmax_acceptance_ratio[at] = static_cast<float>(found.argmax_ratio);
  }
  void write_prob(const Unit& unit, double prob) const {
    params.acceptance_prob[unit.drafter * row_count + first + unit.at] = static_cast<float>(std::min(prob, 1.0));
  }

  void expect_lengths() const {
    const std::int64_t positions = params.positions, draft_length = params.draft_length;
    for (std::int64_t row = 0; row < params.drafters * params.batch; ++row) {
      const std::int64_t length = params.lengths ? params.lengths[row % params.batch] : positions;
      for (std::int64_t start = 0; start < positions; ++start) {
        const float expected =
            length_losses(params.length_prob + row * positions, params.length_ratio + row * positions, start, length,
                          draft_length, params.product_estimator, params.length_losses + (row * positions + start) * draft_length);
        if (start == 0) params.expected_accepted_length[row] = expected;
      }
    }
  }
};

}  // namespace

void evaluate_cpu(const EvaluateParams& params, int threads) {
  const bool narrow_target = params.target_dtype == Dtype::bfloat16;
  const bool narrow_draft = params.drafter_dtype == Dtype::bfloat16;
  if (narrow_target && narrow_draft) return Evaluation<Bfloat16, Bfloat16>(params, threads).run();
  if (narrow_target) return Evaluation<Bfloat16, float>(params, threads).run();
  if (narrow_draft) return Evaluation<float, Bfloat16>(params, threads).run();
  return Evaluation<float, float>(params, threads).run();
}

}  // namespace hedgespec
