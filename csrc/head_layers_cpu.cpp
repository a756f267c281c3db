// The small operations of a stack of heads on the CPU: norms, gated activations, rotation and what it appends to the caches.
//
// A head's layer is a dozen small tensor operations besides its matrix products. For the few rows of a round each costs a
// general library more to start than to do; fused, they are four calls for all heads.

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "hedgespec.h"

namespace hedgespec {
namespace {

constexpr std::int64_t worth_threads = 1 << 15;  // elements; waking a thread for fewer would cost more than it saves

int threads_for(std::int64_t elements, int threads) { return elements < worth_threads ? 1 : threads; }

HEDGESPEC_CLONES void normalise(const float* x, const float* weight, float* out, std::int64_t width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

// silu(gate) * up. 2^power as in rows_cpu.cpp: adding 1.5 * 2^23 leaves the whole part in the low bits, the polynomial is the
// minimax one of degree 5 for 2^rest. Beyond +-87 the sigmoid is 0 or 1 as far as float32's sums can tell.
HEDGESPEC_CLONES void gate_row(const float* gate, const float* up, float* out, std::int64_t width) {
  constexpr float rounder = 12582912.0f, log2_e = 1.44269504f;
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    float bounded = gate[i] < -87.0f ? -87.0f : gate[i];
    bounded = bounded > 87.0f ? 87.0f : bounded;
    const float power = rounder - bounded * log2_e;
    const float rest = -bounded * log2_e - (power - rounder);
    float value = rest * 1.3276472e-3f + 9.6755413e-3f;
    value = value * rest + 5.5507133e-2f;
    value = value * rest + 2.4022120e-1f;
    value = value * rest + 6.9314697e-1f;
    value = value * rest + 1.0000001f;
    value = std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) + (std::bit_cast<std::uint32_t>(power) << 23));
    out[i] = gate[i] / (1.0f + value) * up[i];
  }
}

HEDGESPEC_CLONES void rotate(const float* from, const float* cosine, const float* sine, float* to, std::int64_t half) {
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = from[i], high = from[half + i];
    to[i] = low * cosine[i] - high * sine[i];
    to[half + i] = high * cosine[i] + low * sine[i];
  }
}

}  // namespace

void stack_rms_norm_cpu(const RmsNormParams& p) {
  const std::int64_t rows = p.which ? p.rows : p.heads * p.rows;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (threads_for(rows * p.width, p.threads) > 1)
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t head = p.which ? p.which[row] : row / p.rows;
    const float* const x = p.x + (p.which ? row * p.x_stride_row : head * p.x_stride_head + row % p.rows * p.x_stride_row);
    normalise(x, p.weight + head * p.width, p.out + row * p.width, p.width, p.eps);
  }
}

void swiglu_cpu(const float* gate_up, float* out, std::int64_t rows, std::int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads_for(rows * width, threads) > 1)
  for (std::int64_t row = 0; row < rows; ++row) {
    gate_row(gate_up + 2 * row * width, gate_up + (2 * row + 1) * width, out + row * width, width);
  }
}

void rotary_append_cpu(const RotaryParams& p) {
  const std::int64_t half = p.head_dim / 2, parts = p.attention_heads + 2 * p.kv_heads, tokens = p.rows * p.steps;
  const std::int64_t heads = p.which ? 1 : p.heads;
  const std::size_t bytes = p.head_dim * sizeof(float);
  const std::int64_t elements = heads * tokens * parts * p.head_dim;
#pragma omp parallel num_threads(p.threads) if (threads_for(elements, p.threads) > 1)
  {
    std::vector<float> cosine(half), sine(half);
#pragma omp for schedule(static)
    for (std::int64_t token = 0; token < tokens; ++token) {
      const std::int64_t row = token / p.steps, step = token % p.steps;
      for (std::int64_t i = 0; i < half; ++i) {  // once for all heads
        const float angle = static_cast<float>(p.positions[row] + step) * p.frequency[i];
        cosine[i] = std::cos(angle);
        sine[i] = std::sin(angle);
      }
      for (std::int64_t each = 0; each < heads; ++each) {
        const float* from = p.qkv + (each * tokens + token) * parts * p.head_dim;
        float* const queries = p.queries + ((each * p.rows + row) * p.attention_heads * p.steps + step) * p.head_dim;
        for (std::int64_t a = 0; a < p.attention_heads; ++a, from += p.head_dim) {
          rotate(from, cosine.data(), sine.data(), queries + a * p.steps * p.head_dim, half);
        }
        const std::int64_t head = p.which ? p.which[row] : each;
        const std::int64_t at =
            head * p.stride_head + p.batch_rows[row] * p.stride_batch + (p.slots[row] + step) * p.stride_slot;
        for (std::int64_t k = 0; k < p.kv_heads; ++k, from += p.head_dim) {
          rotate(from, cosine.data(), sine.data(), p.keys + at + k * p.stride_kv_head, half);
          std::memcpy(p.values + at + k * p.stride_kv_head, from + p.kv_heads * p.head_dim, bytes);
        }
      }
    }
  }
}

}  // namespace hedgespec
