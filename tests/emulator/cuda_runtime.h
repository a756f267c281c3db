// Found first on the include path, this stands for the CUDA runtime's header where kernels are compiled for the emulator.
#pragma once

#include "cuda_emulator.h"
