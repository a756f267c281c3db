// Parameters of the native kernels, shared by the kernels and by bindings.cpp.
//
// Pointers are raw and nothing here is checked: the Python function that calls has validated every shape, stride and map
// entry, and on the CPU every value. On a GPU, where looking would wait for the device, a kernel takes a token outside the
// vocabulary for one that nobody can emit and brings a length into its range; it never reads out of bounds.
// Strides count elements; the vocabulary is always the innermost dimension, with stride 1.
#pragma once

#include <cstddef>
#include <cstdint>

// Row loops marked HEDGESPEC_CLONES are compiled once per instruction set and chosen when the module loads. Other compilers
// and architectures build them once, for their own baseline.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define HEDGESPEC_HAS_CLONES 1
#define HEDGESPEC_CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define HEDGESPEC_HAS_CLONES 0
#define HEDGESPEC_CLONES
#endif

#if defined(__GNUC__)
#define HEDGESPEC_INLINE [[gnu::always_inline]] inline
#else
#define HEDGESPEC_INLINE inline
#endif

#if defined(__CUDACC__)
#define HEDGESPEC_HOST_DEVICE __host__ __device__
#else
#define HEDGESPEC_HOST_DEVICE
#endif

namespace hedgespec {

enum class Dtype : std::int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// One temperature for every row, or one for each; 0 is a point mass on the argmax, ties to the lowest id.
struct Temperature {
  float shared;
  const float* per_row;  // [B], or null: `shared` holds for every row

  HEDGESPEC_HOST_DEVICE float at(std::int64_t row) const { return per_row ? per_row[row] : shared; }
};

struct EvaluateParams {
  std::int64_t drafters, batch, positions, vocabulary, draft_vocabulary;  // N, B, T, V, Vd

  const void* target_logits;  // [B, T, V]
  Dtype target_dtype;
  std::int64_t target_stride_batch, target_stride_position;

  const void* drafter_logits;  // [N, B, T, Vd]
  Dtype drafter_dtype;
  std::int64_t drafter_stride_drafter, drafter_stride_batch, drafter_stride_position;

  // From here on everything is contiguous.
  const std::int64_t* tokens;           // [B, T]
  const std::int64_t* lengths;          // [B], or null: every row is T long
  const std::int32_t* draft_to_target;  // [N, Vd], or null: Vd = V and ids agree
  const float* target_threshold;        // [B, T], or null: nothing is masked out
  const float* drafter_threshold;       // [N, B, T], or null
  Temperature target_temperature, drafter_temperature;

  std::int64_t top_k;           // candidates of the tree mode, 0 where it is not asked for
  std::int64_t draft_length;    // K of the losses, 0 where they are not asked for
  bool product_estimator;       // else exact
  const float* length_prob;     // the two outputs below that the losses are made of, of the mode asked for
  const float* length_ratio;

  // Outputs, each [N, B, T]; 0 past a row's length.
  float* acceptance_prob;
  float* acceptance_ratio;
  float* argmax_acceptance_prob;
  float* argmax_acceptance_ratio;
  // [top_k, 2, N, B, T], likewise; null where top_k is 0: prob and ratio of the tree mode with 1, 2, .. top_k candidates.
  float* top_k_acceptance;
  // Outputs where draft_length > 0, else null. NaN where the row ends before the sum is complete.
  float* expected_accepted_length;  // [N, B]
  float* length_losses;             // [N, B, T, K]
};

struct VerifyParams {
  std::int64_t batch, draft_length, vocabulary, draft_vocabulary;  // B, K, V, Vd

  const void* target_logits;  // [B, K+1, V]
  Dtype target_dtype;
  std::int64_t target_stride_batch, target_stride_position;

  const void* draft_logits;  // [B, K, Vd], or null: the proposal is a point mass on the drafted token
  Dtype draft_dtype;
  std::int64_t draft_stride_batch, draft_stride_position;

  // From here on everything is contiguous.
  const std::int64_t* draft_tokens;     // [B, K]
  const void* uniforms;                 // [B, K+1]
  bool uniforms_are_float64;            // else float32
  const std::int64_t* lengths;          // [B], or null: K
  const std::int32_t* draft_to_target;  // [Vd] or [B, Vd], or null; ids that repeat add up
  std::int64_t map_stride_batch;        // 0 where all rows share one map
  const float* target_threshold;        // [B, K+1], or null
  const float* draft_threshold;         // [B, K], or null
  Temperature target_temperature, draft_temperature;

  std::int64_t* accepted_length;  // [B]
  std::int64_t* tokens;           // [B, K+1], padded with -1
};

void evaluate_cpu(const EvaluateParams& params, int threads);
void verify_cpu(const VerifyParams& params, int threads);

// Each enqueues one launch on `stream` of the current device, allocates nothing and may be captured in a CUDA graph.
// `workspace` is device memory of at least the size that the function of that name gives, zeroed once: every launch leaves
// it zeroed where it must be, so launches that follow each other on a stream share it. A failed launch throws
// std::runtime_error.
std::size_t evaluate_cuda_workspace_bytes(const EvaluateParams& params);
void evaluate_cuda(const EvaluateParams& params, void* workspace, void* stream);
std::size_t verify_cuda_workspace_bytes(const VerifyParams& params);
void verify_cuda(const VerifyParams& params, void* workspace, void* stream);

// The losses of one drafter for rounds that start at one position: losses[k-1] for a draft of k tokens, NaN where it would end
// past the row's length; [K]. `prob` and `ratio` are the row's, [T]. Returns the expected length for K, NaN likewise.
// Source: with `product` arXiv 2510.20064, Theorem 3; else ours, as `expected_accepted_length` in hedgespec/ops/evaluate.py.
HEDGESPEC_HOST_DEVICE inline float length_losses(const float* prob, const float* ratio, std::int64_t start, std::int64_t length,
                                                 std::int64_t draft_length, bool product, float* losses) {
  const float unknown = __builtin_nanf("");
  float alive = 1.0f, expected = 1.0f;
  for (std::int64_t k = 1; k <= draft_length; ++k) {
    const std::int64_t at = start + k - 1;
    if (at < length) {
      expected += alive * prob[at];
      alive *= product ? prob[at] : ratio[at];
      losses[k - 1] = 1.0f - expected / static_cast<float>(k + 1);
    } else {
      losses[k - 1] = expected = unknown;
    }
  }
  return expected;
}

// Matrix products with few rows, on the CPU, for N heads at once: out[n] = x[n] @ weight[n].T; or each row with the weight of
// the head it names. With an index column j of head n is row index[n, j] of one table.
struct LinearParams {
  std::int64_t heads, rows, columns, inner;  // rows: of each head, or with `which` of all together

  const float* x;                             // [heads, rows, inner], or with `which` [rows, inner]
  std::int64_t x_stride_head, x_stride_row;   // within a row contiguous
  const std::int64_t* which;                  // [rows], or null
  const float* weight;                        // [heads, columns, inner], or with `index` [table_rows, inner]; contiguous
  const std::int64_t* index;                  // [heads, columns], contiguous, or null
  std::int64_t table_rows;
  float* out;                                 // [heads, rows, columns], or with `which` [rows, columns]; contiguous

  int threads;
};

void linear_cpu(const LinearParams& params);

// The other layer operations of a stack of heads, likewise.
struct RmsNormParams {
  std::int64_t heads, rows, width;

  const float* x;  // [heads, rows, width], or with `which` [rows, width]
  std::int64_t x_stride_head, x_stride_row;
  const std::int64_t* which;
  const float* weight;  // [heads, width], contiguous
  float eps;
  float* out;  // contiguous

  int threads;
};

struct RotaryParams {
  std::int64_t heads, rows, steps, attention_heads, kv_heads, head_dim;  // N, R, T, A, KV, D

  const float* qkv;  // [N, R, T, (A + 2 KV) D], or with `which` [R, T, ...]; contiguous
  const float* frequency;          // [D/2]
  const std::int64_t* positions;   // [R]
  const std::int64_t* slots;       // [R]
  const std::int64_t* batch_rows;  // [R], distinct
  const std::int64_t* which;       // [R], or null
  float* keys;                     // [N, B, KV, C, D]
  float* values;
  std::int64_t stride_head, stride_batch, stride_kv_head, stride_slot;  // of both
  float* queries;  // [N, R, A, T, D], or with `which` [R, A, T, D]; contiguous

  int threads;
};

void stack_rms_norm_cpu(const RmsNormParams& params);
void swiglu_cpu(const float* gate_up, float* out, std::int64_t rows, std::int64_t width, int threads);
void rotary_append_cpu(const RotaryParams& params);

}  // namespace hedgespec
