#include "kernels.h"

#if HAS_AVX
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define KERNELS kernels_avx2
#define LANES 8
#define REGISTERS 16
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
