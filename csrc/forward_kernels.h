// The kernels of a forward over few tokens. Included by one source file per instruction set, which defines HEDGESPEC_LANES,
// floats in a vector register, HEDGESPEC_REGISTERS, and HEDGESPEC_FORWARD, the namespace.
//
// One parallel region spans all layers. Within it every product is dealt out in pieces on demand, so that a thread that the
// system does not schedule holds up one piece and not half of the work, and threads wait for each other five times a layer: they
// spin shortly and then yield. Sums are accumulated in float32, and so is the residual stream, whatever the weights' dtype.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include <sched.h>

#include "forward.h"

namespace hedgespec::forward::HEDGESPEC_FORWARD {
namespace {

#define FORWARD_INLINE [[gnu::always_inline]] inline

constexpr std::int64_t lanes = HEDGESPEC_LANES;
using Lanes = float __attribute__((vector_size(lanes * sizeof(float))));
using Words = std::uint32_t __attribute__((vector_size(lanes * sizeof(float))));
using Halves = std::uint16_t __attribute__((vector_size(lanes * sizeof(std::uint16_t))));
using Bfloat16 = std::uint16_t;

FORWARD_INLINE Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

FORWARD_INLINE Lanes load(const Bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

FORWARD_INLINE void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

FORWARD_INLINE float number(float value) { return value; }

FORWARD_INLINE float number(Bfloat16 value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

FORWARD_INLINE void put(float* to, float value) { *to = value; }

FORWARD_INLINE void put(Bfloat16* to, float value) {  // rounds to nearest, ties to even
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  *to = static_cast<Bfloat16>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// What a tensor of the model's dtype would hold. transformers rounds after every operation, and where this forward does so at
// the same places, its text is the same but for the order of sums.
template <typename Element>
FORWARD_INLINE Lanes rounded(Lanes value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    Words words;
    std::memcpy(&words, &value, sizeof words);
    words = (words + 0x7fffu + ((words >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&value, &words, sizeof value);
    return value;
  }
}

template <typename Element>
FORWARD_INLINE float rounded(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    Bfloat16 held;
    put(&held, value);
    return number(held);
  }
}

template <typename Element>
void round_all(float* values, std::int64_t count) {
  if constexpr (!std::is_same_v<Element, float>) {
    std::int64_t k = 0;
    for (; k + lanes <= count; k += lanes) store(values + k, rounded<Element>(load(values + k)));
    for (; k < count; ++k) values[k] = rounded<Element>(values[k]);
  }
}

FORWARD_INLINE float sum(Lanes value) {
  float parts[lanes];
  std::memcpy(parts, &value, sizeof parts);
  for (std::int64_t half = lanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  }
  return parts[0];
}

FORWARD_INLINE Lanes all(float value) { return Lanes{} + value; }

FORWARD_INLINE Lanes smaller(Lanes one, Lanes other) { return one < other ? one : other; }
FORWARD_INLINE Lanes larger(Lanes one, Lanes other) { return one > other ? one : other; }

// e^x to about 2e-7 of its value: 2^k * e^r with |r| <= ln(2) / 2, and e^r by its Taylor polynomial of degree 7.
FORWARD_INLINE Lanes exponential(Lanes x) {
  x = larger(smaller(x, all(88.0f)), all(-87.0f));
  const Lanes shift = all(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
  const Lanes shifted = x * 1.44269504f + shift;
  const Lanes whole = shifted - shift;
  const Lanes rest = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Lanes power = all(1.0f / 5040);
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^whole
  Lanes scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

FORWARD_INLINE Lanes hyperbolic_tangent(Lanes x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

// --- matrix products --------------------------------------------------------------------------------------------------

#if HEDGESPEC_LANES == 16
FORWARD_INLINE Lanes fold_halves(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

FORWARD_INLINE Lanes fold_quarters(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif HEDGESPEC_LANES == 8
FORWARD_INLINE Lanes fold_halves(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

FORWARD_INLINE Lanes fold_quarters(Lanes a, Lanes b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
#endif

// The sums of several vectors. Four of them are added up together, which takes a third of the shuffles.
template <int Count>
FORWARD_INLINE void totals_of(const Lanes* vectors, float* totals) {
  int n = 0;
#if HEDGESPEC_LANES >= 8
  for (; n + 4 <= Count; n += 4) {
    // Two vectors become one that holds half as many partial sums of each, and two of these again; then within each quarter.
    const Lanes* const v = vectors + n;
    Lanes parts = fold_quarters(fold_halves(v[0], v[1]), fold_halves(v[2], v[3]));
#if HEDGESPEC_LANES == 16
    parts += __builtin_shufflevector(parts, parts, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    parts += __builtin_shufflevector(parts, parts, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    parts += __builtin_shufflevector(parts, parts, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
    for (int one = 0; one < 4; ++one) totals[n + one] = parts[one * (lanes / 4)];
  }
#endif
  for (; n < Count; ++n) totals[n] = sum(vectors[n]);
}

// out[m * stride + n] = weight row n . x row m, for Rows rows of x and Columns rows of the weight.
template <int Rows, int Columns, typename Element>
FORWARD_INLINE void tile(const Element* weight, std::int64_t inner, const float* x, float* out, std::int64_t stride) {
  Lanes sums[Rows][Columns] = {};
  const std::int64_t whole = inner / lanes * lanes;
  for (std::int64_t k = 0; k < whole; k += lanes) {
    Lanes weights[Columns];
    for (int n = 0; n < Columns; ++n) {
      weights[n] = load(weight + n * inner + k);
      __builtin_prefetch(weight + (Columns + n) * inner + k);  // the next tile's; the hardware follows only so many rows
    }
    for (int m = 0; m < Rows; ++m) {
      const Lanes value = load(x + m * inner + k);
      for (int n = 0; n < Columns; ++n) sums[m][n] += weights[n] * value;
    }
  }
  for (int m = 0; m < Rows; ++m) {
    float totals[Columns];
    totals_of<Columns>(sums[m], totals);
    for (int n = 0; n < Columns; ++n) {
      for (std::int64_t k = whole; k < inner; ++k) totals[n] += number(weight[n * inner + k]) * x[m * inner + k];
      out[m * stride + n] = totals[n];
    }
  }
}

// Columns of a tile: as many accumulators as the registers hold beside the operands.
constexpr int columns_for(int rows) {
  if (HEDGESPEC_REGISTERS >= 32) return rows <= 3 ? 8 : 4;
  return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : rows == 4 ? 3 : 2;
}

constexpr int most_rows = HEDGESPEC_REGISTERS >= 32 ? 6 : 4;  // of a tile

// Rows of one tile's height over `columns` rows of the weight.
template <int Rows, typename Element>
void pass(const Element* weight, std::int64_t columns, std::int64_t inner, const float* x, float* out, std::int64_t stride) {
  constexpr int wide = columns_for(Rows);
  std::int64_t column = 0;
  for (; column + wide <= columns; column += wide) {
    tile<Rows, wide>(weight + column * inner, inner, x, out + column, stride);
  }
  for (; column < columns; ++column) tile<Rows, 1>(weight + column * inner, inner, x, out + column, stride);
}

template <typename Element>
void pass_of(std::int64_t rows, const Element* weight, std::int64_t columns, std::int64_t inner, const float* x, float* out,
             std::int64_t stride) {
  switch (rows) {
    case 1: return pass<1>(weight, columns, inner, x, out, stride);
    case 2: return pass<2>(weight, columns, inner, x, out, stride);
    case 3: return pass<3>(weight, columns, inner, x, out, stride);
    case 4: return pass<4>(weight, columns, inner, x, out, stride);
    case 5: return pass<5>(weight, columns, inner, x, out, stride);
    default: return pass<6>(weight, columns, inner, x, out, stride);
  }
}

// out [rows, columns] with row stride `stride` = x [rows, inner] @ weight [columns, inner].T. Weights are read from memory once:
// a block of them stays in the second-level cache from one group of rows to the next.
template <typename Element>
void product(const Element* weight, std::int64_t columns, std::int64_t inner, const float* x, std::int64_t rows, float* out,
             std::int64_t stride) {
  const std::int64_t groups = (rows + most_rows - 1) / most_rows;
  for (std::int64_t group = 0; group < groups; ++group) {  // of equal sizes, as far as that goes
    const std::int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
    pass_of(end - begin, weight, columns, inner, x + begin * inner, out + begin * stride, stride);
  }
}

// --- threads ----------------------------------------------------------------------------------------------------------

// What the threads of one call share.
class Team {
 public:
  Team(std::int64_t threads, std::int64_t stages) : threads_(threads), next_(new std::atomic<std::int64_t>[stages]) {
    for (std::int64_t stage = 0; stage < stages; ++stage) next_[stage].store(0, std::memory_order_relaxed);
  }

  // Calls work(piece) for pieces 0..count-1, each by the thread that asks first, and returns when all are done.
  template <typename Work>
  void share(std::int64_t stage, std::int64_t count, const Work& work) {
    for (;;) {
      const std::int64_t piece = next_[stage].fetch_add(1, std::memory_order_relaxed);
      if (piece >= count) break;
      work(piece);
    }
    wait();
  }

 private:
  void wait() {
    if (threads_ == 1) return;
    const std::int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (std::int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins > 4000) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  const std::int64_t threads_;
  std::unique_ptr<std::atomic<std::int64_t>[]> next_;
  alignas(64) std::atomic<std::int64_t> arrived_{0};
  alignas(64) std::atomic<std::int64_t> turn_{0};
};

// --- attention --------------------------------------------------------------------------------------------------------

// out[m, d] = sum of share[m * keys + key] * values[key * width + d], for Rows rows and Vectors registers of channels from d on.
template <int Rows, int Vectors, typename Element>
FORWARD_INLINE void mix_tile(const float* share, std::int64_t keys, const Element* values, std::int64_t width, float* out,
                             std::int64_t stride) {
  Lanes sums[Rows][Vectors] = {};
  for (std::int64_t key = 0; key < keys; ++key) {
    Lanes value[Vectors];
    for (int v = 0; v < Vectors; ++v) value[v] = load(values + key * width + v * lanes);
    for (int m = 0; m < Rows; ++m) {
      const float weight = share[m * keys + key];
      for (int v = 0; v < Vectors; ++v) sums[m][v] += value[v] * weight;
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) store(out + m * stride + v * lanes, sums[m][v]);
  }
}

template <int Rows, typename Element>
void mix_rows(const float* share, std::int64_t keys, const Element* values, std::int64_t width, float* out,
              std::int64_t stride) {
  std::int64_t d = 0;
  for (; d + 4 * lanes <= width; d += 4 * lanes) mix_tile<Rows, 4>(share, keys, values + d, width, out + d, stride);
  for (; d + lanes <= width; d += lanes) mix_tile<Rows, 1>(share, keys, values + d, width, out + d, stride);
  for (; d < width; ++d) {
    for (int m = 0; m < Rows; ++m) {
      float total = 0.0f;
      for (std::int64_t key = 0; key < keys; ++key) total += share[m * keys + key] * number(values[key * width + d]);
      out[m * stride + d] = total;
    }
  }
}

// out [rows, width] = share [rows, keys] @ values [keys, width].
template <typename Element>
void mix(const float* share, std::int64_t rows, std::int64_t keys, const Element* values, std::int64_t width, float* out,
         std::int64_t stride) {
  constexpr std::int64_t most = HEDGESPEC_REGISTERS >= 32 ? 6 : 2;
  for (std::int64_t row = 0; row < rows;) {
    const std::int64_t group = std::min(most, rows - row);
    const float* const from = share + row * keys;
    float* const to = out + row * stride;
    switch (group) {
      case 1: mix_rows<1>(from, keys, values, width, to, stride); break;
      case 2: mix_rows<2>(from, keys, values, width, to, stride); break;
#if HEDGESPEC_REGISTERS >= 32
      case 3: mix_rows<3>(from, keys, values, width, to, stride); break;
      case 4: mix_rows<4>(from, keys, values, width, to, stride); break;
      case 5: mix_rows<5>(from, keys, values, width, to, stride); break;
      default: mix_rows<6>(from, keys, values, width, to, stride); break;
#endif
    }
    row += group;
  }
}

// The softmax of scores[0..count-1], in place; entries that are -infinity get 0.
inline void softmax(float* scores, std::int64_t count) {
  float highest = -INFINITY;
  for (std::int64_t key = 0; key < count; ++key) highest = std::max(highest, scores[key]);
  Lanes totals{};
  std::int64_t key = 0;
  for (; key + lanes <= count; key += lanes) {
    const Lanes score = load(scores + key);
    const Lanes share = score == -INFINITY ? Lanes{} : exponential(score - highest);
    store(scores + key, share);
    totals += share;
  }
  float total = sum(totals);
  for (; key < count; ++key) {
    scores[key] = std::exp(scores[key] - highest);
    total += scores[key];
  }
  const float factor = 1.0f / total;
  for (key = 0; key < count; ++key) scores[key] *= factor;
}

// --- a forward --------------------------------------------------------------------------------------------------------

template <typename Element>
class Forward {
 public:
  Forward(const Model& model, const Call& call)
      : m_(model), c_(call), team_(call.threads, 5 * static_cast<std::int64_t>(model.layers.size()) + 1) {
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      first_.push_back(count_);
      count_ += c_.counts[row];
      longest_ = std::max(longest_, c_.lengths[row] + c_.counts[row]);
      widest_ = std::max(widest_, c_.counts[row]);
    }
    queries_.resize(count_ * m_.heads * m_.head_dim);
    attended_.resize(count_ * m_.heads * m_.head_dim);
    branch_.resize(count_ * m_.hidden);
    activations_.resize(count_ * m_.intermediate);
  }

  void run() {
    [[maybe_unused]] const int threads = static_cast<int>(c_.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    work();
  }

 private:
  // What each thread has for itself. Every thread keeps the whole residual stream: adding to it again costs less than waiting.
  struct Own {
    std::vector<float> residual, normed, piece, other, scores;
  };

  static const Element* weights(const void* address) { return static_cast<const Element*>(address); }

  static Element* cache(const std::int64_t* addresses, std::int64_t layer) {
    return reinterpret_cast<Element*>(static_cast<std::uintptr_t>(addresses[layer]));
  }

  // Columns of a piece of a product: several pieces a thread, none of them tiny.
  std::int64_t piece_columns(std::int64_t columns) const {
    const std::int64_t wanted = (columns + 8 * c_.threads - 1) / (8 * c_.threads);
    return std::max<std::int64_t>(24, (wanted + 23) / 24 * 24);
  }

  void norm(const float* x, const void* weight, std::int64_t inner, std::int64_t count, float* out) const {
    const Element* const scale = weights(weight);
    for (std::int64_t row = 0; row < count; ++row, x += inner, out += inner) {
      Lanes squares{};
      std::int64_t k = 0;
      for (; k + lanes <= inner; k += lanes) squares += load(x + k) * load(x + k);
      float total = sum(squares);
      for (; k < inner; ++k) total += x[k] * x[k];
      const float factor = 1.0f / std::sqrt(total / static_cast<float>(inner) + m_.epsilon);
      if (m_.norm_offset == 0.0f) {  // Llama rounds before the weight and after it
        for (k = 0; k + lanes <= inner; k += lanes) {
          store(out + k, rounded<Element>(rounded<Element>(load(x + k) * factor) * load(scale + k)));
        }
        for (; k < inner; ++k) out[k] = rounded<Element>(rounded<Element>(x[k] * factor) * number(scale[k]));
      } else {
        for (k = 0; k + lanes <= inner; k += lanes) {
          store(out + k, rounded<Element>(load(x + k) * factor * (load(scale + k) + m_.norm_offset)));
        }
        for (; k < inner; ++k) out[k] = rounded<Element>(x[k] * factor * (number(scale[k]) + m_.norm_offset));
      }
    }
  }

  void embed(float* residual) const {
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t place = 0; place < c_.counts[row]; ++place, residual += m_.hidden) {
        const Element* const from = weights(m_.embedding) + c_.tokens[row * c_.width + place] * m_.hidden;
        for (std::int64_t k = 0; k < m_.hidden; ++k) residual[k] = rounded<Element>(number(from[k]) * m_.embedding_scale);
      }
    }
  }

  // Writes states [count_, hidden] as those of the aux layer with this index.
  void keep_states(std::int64_t index, const float* states) const {
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t place = 0; place < c_.counts[row]; ++place, states += m_.hidden) {
        Element* const to =
            static_cast<Element*>(c_.aux_states) + ((row * c_.width + place) * c_.aux + index) * m_.hidden;
        for (std::int64_t k = 0; k < m_.hidden; ++k) put(to + k, states[k]);
      }
    }
  }

  std::int64_t aux_index(std::int64_t layer) const {
    const std::int64_t* const end = c_.aux_layers + c_.aux;
    const std::int64_t* const found = std::find(c_.aux_layers, end, layer);
    return found == end ? -1 : found - c_.aux_layers;
  }

  std::int64_t position(std::int64_t row, std::int64_t place) const {
    return c_.lengths[row] + (c_.depths ? c_.depths[row * c_.width + place] : place);
  }

  // One head of the queries, keys or values: its product, bias, norm and rotation. Keys and values go to the cache.
  void project_head(std::int64_t number_of_layer, std::int64_t head, Own& own) {
    const Layer& layer = m_.layers[number_of_layer];
    const std::int64_t width = m_.head_dim;
    const bool is_query = head < m_.heads, is_key = !is_query && head < m_.heads + m_.kv_heads;
    if (!is_query) head -= m_.heads + (is_key ? 0 : m_.kv_heads);
    const Element* const weight = weights(is_query ? layer.query : is_key ? layer.key : layer.value);
    const Element* const bias = weights(is_query ? layer.query_bias : is_key ? layer.key_bias : layer.value_bias);
    const void* const scale = is_query ? layer.query_norm : is_key ? layer.key_norm : nullptr;
    own.piece.resize(count_ * width);
    float* const states = own.piece.data();
    product(weight + head * width * m_.hidden, width, m_.hidden, own.normed.data(), count_, states, width);
    if (bias) {
      for (std::int64_t token = 0; token < count_; ++token) {
        for (std::int64_t d = 0; d < width; ++d) states[token * width + d] += number(bias[head * width + d]);
      }
    }
    round_all<Element>(states, count_ * width);
    if (scale) norm(states, scale, width, count_, states);
    float* one = states;
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t place = 0; place < c_.counts[row]; ++place, one += width) {
        if (is_query || is_key) rotate(layer, position(row, place), one);
        if (is_query) {
          float* const to = queries_.data() + (head * count_ + first_[row] + place) * width;
          for (std::int64_t d = 0; d < width; ++d) to[d] = one[d] * m_.attention_scale;
        } else {
          Element* const to = cache(is_key ? c_.keys : c_.values, number_of_layer) +
                              ((row * m_.kv_heads + head) * c_.capacity + c_.lengths[row] + place) * width;
          for (std::int64_t d = 0; d < width; ++d) put(to + d, one[d]);
        }
      }
    }
  }

  void rotate(const Layer& layer, std::int64_t position, float* states) const {
    const std::int64_t half = m_.rotary / 2;
    const float *const cosine = layer.cosine + position * half, *const sine = layer.sine + position * half;
    for (std::int64_t d = 0; d < half; ++d) {
      const float low = states[d], high = states[d + half];
      const auto product = [](float one, float other) { return rounded<Element>(one * other); };
      states[d] = rounded<Element>(product(low, cosine[d]) - product(high, sine[d]));
      states[d + half] = rounded<Element>(product(high, cosine[d]) + product(low, sine[d]));
    }
  }

  // The attention of one row's new tokens by one head.
  void attend(std::int64_t number_of_layer, std::int64_t row, std::int64_t head, Own& own) {
    const Layer& layer = m_.layers[number_of_layer];
    const std::int64_t rows = c_.counts[row], length = c_.lengths[row], width = m_.head_dim;
    if (rows == 0) return;
    // Nobody in the row sees a key before this one.
    const std::int64_t begin = layer.window ? std::max<std::int64_t>(0, length - layer.window + 1) : 0;
    const std::int64_t keys = length + rows - begin;
    const std::int64_t kv_head = head / (m_.heads / m_.kv_heads);
    const std::int64_t offset = ((row * m_.kv_heads + kv_head) * c_.capacity + begin) * width;
    float* const scores = own.scores.data();
    product(cache(c_.keys, number_of_layer) + offset, keys, width,
            queries_.data() + (head * count_ + first_[row]) * width, rows, scores, keys);
    for (std::int64_t place = 0; place < rows; ++place) {
      float* const own_scores = scores + place * keys;
      if (m_.attention_softcap > 0.0f) {
        for (std::int64_t key = 0; key < keys; ++key) {
          own_scores[key] = m_.attention_softcap * std::tanh(own_scores[key] / m_.attention_softcap);
        }
      }
      hide(layer, row, place, begin, own_scores);
      softmax(own_scores, keys);
    }
    const std::int64_t stride = m_.heads * width;
    mix(scores, rows, keys, cache(c_.values, number_of_layer) + offset, width,
        attended_.data() + first_[row] * stride + head * width, stride);
    for (std::int64_t place = 0; place < rows; ++place) {
      round_all<Element>(attended_.data() + (first_[row] + place) * stride + head * width, width);
    }
  }

  // Scores of keys that a query does not see become -infinity.
  void hide(const Layer& layer, std::int64_t row, std::int64_t place, std::int64_t begin, float* scores) const {
    const std::int64_t length = c_.lengths[row], rows = c_.counts[row], query = position(row, place);
    for (std::int64_t other = 0; other < rows; ++other) {
      const bool seen = c_.ancestors ? c_.ancestors[(row * c_.width + place) * c_.width + other] : other <= place;
      const bool near = !layer.window || position(row, other) > query - layer.window;
      if (!(seen && near)) scores[length - begin + other] = -INFINITY;
    }
    if (layer.window) {
      for (std::int64_t slot = begin; slot < length && slot <= query - layer.window; ++slot) scores[slot - begin] = -INFINITY;
    }
  }

  // branch_ = x [count_, inner] @ weight.T + bias, dealt out by columns.
  void share_product(std::int64_t stage, const void* weight, const void* bias, std::int64_t inner, const float* x) {
    const std::int64_t step = piece_columns(m_.hidden);
    team_.share(stage, (m_.hidden + step - 1) / step, [&](std::int64_t piece) {
      const std::int64_t begin = piece * step, columns = std::min(step, m_.hidden - begin);
      float* const out = branch_.data() + begin;
      product(weights(weight) + begin * inner, columns, inner, x, count_, out, m_.hidden);
      for (std::int64_t token = 0; token < count_; ++token) {
        float* const row = out + token * m_.hidden;
        for (std::int64_t column = 0; bias && column < columns; ++column) row[column] += number(weights(bias)[begin + column]);
        round_all<Element>(row, columns);
      }
    });
  }

  void add_branch(const void* scale, Own& own) const {
    const float* branch = branch_.data();
    if (scale) {
      norm(branch, scale, m_.hidden, count_, own.normed.data());
      branch = own.normed.data();
    }
    for (std::int64_t k = 0; k < count_ * m_.hidden; ++k) own.residual[k] = rounded<Element>(own.residual[k] + branch[k]);
  }

  void share_mlp(std::int64_t stage, const Layer& layer, Own& own) {
    const std::int64_t step = piece_columns(m_.intermediate);
    team_.share(stage, (m_.intermediate + step - 1) / step, [&](std::int64_t piece) {
      const std::int64_t begin = piece * step, columns = std::min(step, m_.intermediate - begin);
      own.piece.resize(count_ * step + lanes);
      own.other.resize(count_ * step + lanes);
      const float* const x = own.normed.data();
      product(weights(layer.gate) + begin * m_.hidden, columns, m_.hidden, x, count_, own.piece.data(), columns);
      product(weights(layer.up) + begin * m_.hidden, columns, m_.hidden, x, count_, own.other.data(), columns);
      for (std::int64_t k = 0; k < count_ * columns; k += lanes) {  // the last vector reaches into what is allocated behind
        const Lanes gate = rounded<Element>(activated(rounded<Element>(load(own.piece.data() + k))));
        store(own.piece.data() + k, rounded<Element>(gate * rounded<Element>(load(own.other.data() + k))));
      }
      for (std::int64_t token = 0; token < count_; ++token) {
        std::copy_n(own.piece.data() + token * columns, columns, activations_.data() + token * m_.intermediate + begin);
      }
    });
  }

  FORWARD_INLINE Lanes activated(Lanes x) const {
    if (m_.activation == Activation::silu) return x / (1.0f + exponential(-x));
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
  }

  void share_logits(std::int64_t stage, Own& own) {
    std::vector<float*> kept;  // where each token's logits go
    float* rows = own.other.data();
    for (std::int64_t row = 0; row < c_.rows; ++row) {
      for (std::int64_t place = std::max<std::int64_t>(0, c_.width - c_.keep); place < c_.counts[row]; ++place) {
        std::copy_n(own.normed.data() + (first_[row] + place) * m_.hidden, m_.hidden, rows + kept.size() * m_.hidden);
        kept.push_back(c_.logits + (row * c_.keep + place - (c_.width - c_.keep)) * m_.vocabulary);
      }
    }
    const std::int64_t step = 480, count = static_cast<std::int64_t>(kept.size());
    const std::int64_t final_states = aux_index(static_cast<std::int64_t>(m_.layers.size()));
    const std::int64_t pieces = count ? (m_.vocabulary + step - 1) / step : 0;
    own.piece.resize(count * step);
    team_.share(stage, pieces + (final_states >= 0), [&](std::int64_t piece) {
      if (piece == pieces) return keep_states(final_states, own.normed.data());
      const std::int64_t begin = piece * step, columns = std::min(step, m_.vocabulary - begin);
      product(weights(m_.head) + begin * m_.hidden, columns, m_.hidden, rows, count, own.piece.data(), columns);
      for (std::int64_t token = 0; token < count; ++token) {
        std::copy_n(own.piece.data() + token * columns, columns, kept[token] + begin);
      }
    });
  }

  void work() {
    Own own;
    own.residual.resize(count_ * m_.hidden);
    own.normed.resize(count_ * m_.hidden);
    own.scores.resize(widest_ * longest_);
    embed(own.residual.data());
    const std::int64_t layers = static_cast<std::int64_t>(m_.layers.size()), heads = m_.heads + 2 * m_.kv_heads;
    std::int64_t stage = 0;
    for (std::int64_t number_of_layer = 0; number_of_layer < layers; ++number_of_layer) {
      const Layer& layer = m_.layers[number_of_layer];
      const std::int64_t aux = aux_index(number_of_layer);
      norm(own.residual.data(), layer.input_norm, m_.hidden, count_, own.normed.data());
      team_.share(stage++, heads + (aux >= 0), [&](std::int64_t piece) {
        if (piece == heads) return keep_states(aux, own.residual.data());
        project_head(number_of_layer, piece, own);
      });
      team_.share(stage++, c_.rows * m_.heads, [&](std::int64_t piece) {
        attend(number_of_layer, piece / m_.heads, piece % m_.heads, own);
      });
      share_product(stage++, layer.output, layer.output_bias, m_.heads * m_.head_dim, attended_.data());
      add_branch(layer.attention_norm, own);
      norm(own.residual.data(), layer.mlp_norm, m_.hidden, count_, own.normed.data());
      share_mlp(stage++, layer, own);
      share_product(stage++, layer.down, nullptr, m_.intermediate, activations_.data());
      add_branch(layer.mlp_output_norm, own);
    }
    norm(own.residual.data(), m_.norm, m_.hidden, count_, own.normed.data());
    own.other.resize(count_ * m_.hidden);
    share_logits(stage, own);
  }

  const Model& m_;
  const Call& c_;
  Team team_;
  std::vector<std::int64_t> first_;  // a row's first token among all
  std::int64_t count_ = 0, longest_ = 0, widest_ = 0;
  std::vector<float> queries_, attended_, branch_, activations_;
};

}  // namespace

void run(const Model& model, const Call& call) {
  if (model.bfloat16) {
    Forward<Bfloat16>(model, call).run();
  } else {
    Forward<float>(model, call).run();
  }
}

}  // namespace hedgespec::forward::HEDGESPEC_FORWARD
