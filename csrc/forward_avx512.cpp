// The forward's kernels for AVX-512; CMakeLists.txt compiles this file for it.

#define HEDGESPEC_LANES 16
#define HEDGESPEC_REGISTERS 32
#define HEDGESPEC_FORWARD avx512

#include "forward_kernels.h"
