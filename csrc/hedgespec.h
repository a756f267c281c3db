// Parameters of the native kernels, shared by the kernels and by bindings.cpp.
//
// Pointers are raw and nothing here is checked: the Python function that calls has validated every shape, stride, token and
// map entry. Strides count elements; the vocabulary is always the innermost dimension, with stride 1.
#pragma once

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

namespace hedgespec {

enum class Dtype { float32, bfloat16 };

// One temperature for every row, or one for each.
struct Temperature {
  float shared;
  const float* per_row;  // [B], or null: `shared` holds for every row

  float at(std::int64_t row) const { return per_row ? per_row[row] : shared; }
};

struct EvaluateParams {
  std::int64_t drafters, batch, positions, vocabulary, draft_vocabulary;

  const void* target_logits;  // [B, T, V]
  Dtype target_dtype;
  std::int64_t target_stride_batch, target_stride_position;

  const void* drafter_logits;  // [N, B, T, Vd]
  Dtype drafter_dtype;
  std::int64_t drafter_stride_drafter, drafter_stride_batch, drafter_stride_position;

  // From here on everything is contiguous.
  const std::int64_t* tokens;           // [B, T]
  const std::int64_t* lengths;          // [B], or null: every row is T long
  const std::int64_t* draft_to_target;  // [N, Vd], or null: Vd = V and ids agree
  const float* target_threshold;        // [B, T], or null: nothing is masked out
  const float* drafter_threshold;       // [N, B, T], or null
  Temperature target_temperature, drafter_temperature;

  // Outputs, each [N, B, T].
  float* acceptance_prob;
  float* acceptance_ratio;
  float* argmax_acceptance_prob;
  float* argmax_acceptance_ratio;

  int threads;
};

void evaluate_cpu(const EvaluateParams& params);

// out[m, n] = sum_k x[m, k] * weight[n, k]
struct LinearParams {
  std::int64_t rows, columns, inner;

  const float* x;         // [rows, inner]
  std::int64_t x_stride;  // from row to row; within a row contiguous
  const float* weight;    // [columns, inner], contiguous
  float* out;             // [rows, columns], contiguous

  int threads;
};

void linear_cpu(const LinearParams& params);

}  // namespace hedgespec
