// The forward's kernels for whatever the compiler takes for granted, and the choice among them.

#define HEDGESPEC_LANES 4
#define HEDGESPEC_REGISTERS 16
#define HEDGESPEC_FORWARD baseline

#include "forward_kernels.h"

namespace hedgespec::forward {

const char* instruction_set() {
#if defined(HEDGESPEC_FORWARD_X86)
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "baseline";
}

void run(const Model& model, const Call& call) {
#if defined(HEDGESPEC_FORWARD_X86)
  if (__builtin_cpu_supports("x86-64-v4")) return avx512::run(model, call);
  if (__builtin_cpu_supports("x86-64-v3")) return avx2::run(model, call);
#endif
  baseline::run(model, call);
}

}  // namespace hedgespec::forward
