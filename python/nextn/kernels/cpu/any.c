/* Four floats are a vector of SSE2 and of NEON. */
#include "kernels.h"

#define KERNELS kernels_any
#define LANES 4
#ifdef __aarch64__
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#include "kernels.inc"
