#include "kernels.h"

#if HAS_AVX
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define KERNELS kernels_avx512
#define LANES 16
#define REGISTERS 32
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
