// The forward's kernels for AVX2 with FMA; CMakeLists.txt compiles this file for them.

#define HEDGESPEC_LANES 8
#define HEDGESPEC_REGISTERS 16
#define HEDGESPEC_FORWARD avx2

#include "forward_kernels.h"
