/* The kernels of nextn.kernels for one CPU core: kernels.inc, compiled once per instruction set. */
#ifndef NEXTN_CPU_KERNELS_H
#define NEXTN_CPU_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX 1
#else
#define HAS_AVX 0
#endif

/* Must match PackedWeight.descriptor in kernels/linear.py. */
typedef struct {
    const void *panels;
    const float *scale; /* [N padded to 64], FP8 only */
    const float *bias;  /* [N padded to 64] or NULL */
    int64_t n, k, format;
} Weight;

/* Those that return an int return 0, or -1 when memory is out. */
typedef struct {
    void (*linear)(const Weight *w, const float *x, int64_t num_rows, const float *residual, float *out);
    void (*rms_norm)(const float *x, const float *weight, int64_t num_rows, int64_t size, float eps, float *out);
    void (*nextn_input)(const int64_t *ids, const float *embedding, const float *hidden, const float *enorm,
                        const float *hnorm, int64_t num_tokens, int64_t size, float eps, float *out);
    int (*fused_moe)(const Weight *const *w13, const Weight *const *w2, int64_t num_experts, int has_shared,
                     const float *x, int64_t num_tokens, int64_t top_k, const int64_t *ids, const float *weights,
                     const float *residual, float *out);
    int (*route)(const Weight *gate, const float *bias, const float *x, int64_t num_tokens, int64_t top_k,
                 int64_t n_group, int64_t topk_group, int normalise, float factor, float *weights, int64_t *ids);
    void (*rope_and_cache)(float *qkv, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
                           int64_t half, const float *q_norm, const float *k_norm, float eps, const float *cosine,
                           const float *sine, const int64_t *positions, const int64_t *slots, float *k_cache,
                           float *v_cache);
    int (*paged_attention)(const float *q, int64_t q_stride, const float *k_cache, const float *v_cache,
                           int64_t num_heads, int64_t num_kv_heads, int64_t dim, int64_t page_size, int64_t num_seqs,
                           const int64_t *starts, const int64_t *cu_seqlens_q, const int64_t *page_table,
                           int64_t max_pages, int64_t first_key, float scale, float *out);
} Kernels;

/* Of these a processor without AVX has kernels_any alone. */
extern const Kernels kernels_avx512, kernels_avx2, kernels_any;

#endif
