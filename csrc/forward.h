// A decoder stack's forward over few tokens, in one call: parameters, shared by the kernels (forward_kernels.h, compiled once per
// instruction set) and by the bindings. Pointers are raw and nothing is checked here; hedgespec/runtime/native_forward.py does.

#pragma once

#include <cstdint>
#include <vector>

namespace hedgespec::forward {

enum class Activation : std::int32_t { silu = 0, gelu_tanh = 1 };

// Weights are [columns, inner], row by row, of the model's dtype; null stands for "the model has none".
struct Layer {
  const void *query, *key, *value, *output;                            // projections of the attention
  const void *query_bias, *key_bias, *value_bias, *output_bias;
  const void *query_norm, *key_norm;                                   // over a head's channels (Qwen3, Gemma 3)
  const void *gate, *up, *down;                                        // of the MLP
  const void *input_norm, *attention_norm;                             // before the attention; of its output (Gemma)
  const void *mlp_norm, *mlp_output_norm;                              // before the MLP; of its output (Gemma)
  std::int64_t window;                                                 // tokens that a query sees, itself included; 0: all
  const float *cosine, *sine;                                          // [positions, rotary / 2]
};

struct Model {
  bool bfloat16;  // else float32
  std::int64_t hidden, heads, kv_heads, head_dim, intermediate, vocabulary, rotary;
  float epsilon, norm_offset;  // a norm multiplies by norm_offset + weight
  float attention_scale, attention_softcap;  // softcap 0: none
  float embedding_scale;
  Activation activation;
  const void *embedding, *norm, *head;
  std::vector<Layer> layers;
};

// Row r reads counts[r] tokens, at most `width`, behind lengths[r] that its cache holds.
struct Call {
  std::int64_t rows, width, threads;
  const std::int64_t* tokens;     // [rows, width]
  const std::int64_t* lengths;    // [rows]
  const std::int64_t* counts;     // [rows]
  const std::int64_t* depths;     // [rows, width]: a token's position is its row's length and this; null: a chain
  const bool* ancestors;          // [rows, width, width]: which tokens of its row each one sees; null: a chain
  const std::int64_t* keys;       // [layers] addresses of [rows, kv_heads, capacity, head_dim] of the model's dtype
  const std::int64_t* values;     // likewise
  std::int64_t capacity;
  std::int64_t keep;              // logits are computed for the last `keep` of `width` places
  float* logits;                  // [rows, keep, vocabulary]; places without a token are left as they are
  const std::int64_t* aux_layers; // [aux]: layers whose input is wanted, ascending; the number of layers stands for the final
                                  // norm's output
  std::int64_t aux;
  void* aux_states;               // [rows, width, aux * hidden] of the model's dtype
};

// The instruction sets that the kernels were compiled for. `run` computes the forward; `supported` tells whether this
// processor can.
namespace avx512 { void run(const Model&, const Call&); }
namespace avx2 { void run(const Model&, const Call&); }
namespace baseline { void run(const Model&, const Call&); }

void run(const Model&, const Call&);  // by the best that the processor can
const char* instruction_set();

}  // namespace hedgespec::forward
