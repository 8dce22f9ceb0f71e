/* The kernels of nextn.kernels for one CPU core, in float32 with weights kept as the checkpoint stores them.

Each function here is the implementation of the Python function of the same name; its torch reference says what it
computes. Floor: the bytes of the weights touched, 1 per element for FP8, until an expert or a linear sees a few rows.

Every output element is accumulated over K in ascending order by one accumulator, whatever the number of rows: a token's
result does not depend, to the bit, on what else is in the batch.

Weights are laid out in panels of 64 output columns, [N / 64][K][64]:
  float32   four vectors of 16 columns
  bfloat16  two vectors of 16 pairs: the low half is column c, the high half column c + 16
  FP8 e4m3  one vector of 16 quadruples: byte j of lane c is column 16 j + c; scaled per column after the sum
*/
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float f16v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16v __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16v __attribute__((vector_size(64), aligned(4), may_alias));
typedef float f8v __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f4v __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FP8 = 2 };
enum { PANEL = 64, MAX_ROWS = 6, MAX_HEADS = 2 };

/* Must match PackedWeight.descriptor in kernels/linear.py. */
typedef struct {
    const void *panels;
    const float *scale; /* [N padded to 64], FP8 only */
    const float *bias;  /* [N padded to 64] or NULL */
    int64_t n, k, format;
} Weight;

static int rows_at_once(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512f") ? MAX_ROWS : 2;
#else
    return 2;
#endif
}

/* e4m3 to float32: the exponent and mantissa moved into place are the value times 2^-120, subnormals included. */
INLINE f16v from_fp8(u16v at_top) {
    i16v bits = ((i16v)at_top >> 4) & (int32_t)0x87F00000;
    return (f16v)bits * 0x1p120f;
}

INLINE void load_columns(const int format, const char *panels, int64_t k, f16v w[4]) {
    if (format == FP8) {
        u16v codes = *(const u16v *)(panels + k * PANEL);
        w[0] = from_fp8(codes << 24);
        w[1] = from_fp8(codes << 16);
        w[2] = from_fp8(codes << 8);
        w[3] = from_fp8(codes);
    } else if (format == BFLOAT16) {
        const u16v *pairs = (const u16v *)(panels + k * PANEL * 2);
        w[0] = (f16v)(pairs[0] << 16);
        w[1] = (f16v)(pairs[0] & 0xFFFF0000u);
        w[2] = (f16v)(pairs[1] << 16);
        w[3] = (f16v)(pairs[1] & 0xFFFF0000u);
    } else {
        const f16v *columns = (const f16v *)(panels + k * PANEL * 4);
        for (int j = 0; j < 4; j++) w[j] = columns[j];
    }
}

/* out[m][0..64) = rows[m] · panel, for m < num_rows, which is a constant in every caller. */
INLINE void panel_product(const int num_rows, const int format, const char *panel, int64_t k_len,
                          const float *const *rows, f16v out[][4]) {
    f16v acc[MAX_ROWS][4];
#pragma GCC unroll 6
    for (int m = 0; m < num_rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = (f16v){0};
    for (int64_t k = 0; k < k_len; k++) {
        f16v w[4];
        load_columns(format, panel, k, w);
#pragma GCC unroll 6
        for (int m = 0; m < num_rows; m++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] += w[j] * rows[m][k];
    }
#pragma GCC unroll 6
    for (int m = 0; m < num_rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) out[m][j] = acc[m][j];
}

INLINE void panel_of_format(const int format, int num_rows, const char *panel, int64_t k_len, const float *const *rows,
                            f16v out[][4]) {
    switch (num_rows) {
    case 1: panel_product(1, format, panel, k_len, rows, out); break;
    case 2: panel_product(2, format, panel, k_len, rows, out); break;
    case 3: panel_product(3, format, panel, k_len, rows, out); break;
    case 4: panel_product(4, format, panel, k_len, rows, out); break;
    case 5: panel_product(5, format, panel, k_len, rows, out); break;
    default: panel_product(6, format, panel, k_len, rows, out); break;
    }
}

/* One panel for up to MAX_ROWS rows, scaled and with its bias. */
DISPATCHED static void product(const Weight *w, int64_t p, int num_rows, const float *const *rows, float out[][PANEL]) {
    f16v sums[MAX_ROWS][4];
    const char *panels = w->panels;
    switch (w->format) {
    case FP8: panel_of_format(FP8, num_rows, panels + p * w->k * PANEL, w->k, rows, sums); break;
    case BFLOAT16: panel_of_format(BFLOAT16, num_rows, panels + p * w->k * PANEL * 2, w->k, rows, sums); break;
    default: panel_of_format(FLOAT32, num_rows, panels + p * w->k * PANEL * 4, w->k, rows, sums); break;
    }
    for (int m = 0; m < num_rows; m++)
        for (int j = 0; j < 4; j++) {
            f16v sum = sums[m][j];
            if (w->scale) sum *= *(const f16v *)(w->scale + p * PANEL + 16 * j);
            if (w->bias) sum += *(const f16v *)(w->bias + p * PANEL + 16 * j);
            *(f16v *)(out[m] + 16 * j) = sum;
        }
}

/* outs[m][0..N) = rows[m] · Wᵀ (+ adds[m]), for up to MAX_ROWS rows. */
static void multiply_rows(const Weight *w, int num_rows, const float *const *rows, const float *const *adds,
                          float *const *outs) {
    float tile[MAX_ROWS][PANEL];
    for (int64_t p = 0; p * PANEL < w->n; p++) {
        int64_t width = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
        product(w, p, num_rows, rows, tile);
        for (int m = 0; m < num_rows; m++) {
            float *out = outs[m] + p * PANEL;
            if (adds) {
                const float *add = adds[m] + p * PANEL;
                for (int64_t i = 0; i < width; i++) out[i] = tile[m][i] + add[i];
            } else
                memcpy(out, tile[m], width * sizeof(float));
        }
    }
}

/* Panels outside, rows inside: a panel is read from memory once, for all rows. */
static void linear(const Weight *w, const float *x, int64_t num_rows, const float *residual, float *out) {
    int step = rows_at_once();
    for (int64_t p = 0; p * PANEL < w->n; p++) {
        int64_t width = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
        for (int64_t first = 0; first < num_rows; first += step) {
            int count = num_rows - first < step ? (int)(num_rows - first) : step;
            const float *rows[MAX_ROWS];
            float tile[MAX_ROWS][PANEL];
            for (int m = 0; m < count; m++) rows[m] = x + (first + m) * w->k;
            product(w, p, count, rows, tile);
            for (int m = 0; m < count; m++) {
                int64_t at = (first + m) * w->n + p * PANEL;
                if (residual)
                    for (int64_t i = 0; i < width; i++) out[at + i] = tile[m][i] + residual[at + i];
                else
                    memcpy(out + at, tile[m], width * sizeof(float));
            }
        }
    }
}

INLINE void norm_row(const float *x, const float *weight, int64_t size, float eps, float *out) {
    float lanes[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
    for (; i < size; i++) lanes[0] += x[i] * x[i];
    for (int j = 0; j < 16; j++) sum += lanes[j];
    float factor = 1.0f / sqrtf(sum / size + eps);
    for (i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

DISPATCHED static void rms_norm(const float *x, const float *weight, int64_t num_rows, int64_t size, float eps,
                                float *out) {
    for (int64_t r = 0; r < num_rows; r++) norm_row(x + r * size, weight, size, eps, out + r * size);
}

DISPATCHED static void nextn_input(const int64_t *ids, const float *embedding, const float *hidden, const float *enorm,
                                   const float *hnorm, int64_t num_tokens, int64_t size, float eps, float *out) {
    for (int64_t t = 0; t < num_tokens; t++, out += 2 * size) {
        norm_row(embedding + ids[t] * size, enorm, size, eps, out);
        norm_row(hidden + t * size, hnorm, size, eps, out + size);
    }
}

INLINE f16v choose(i16v mask, f16v yes, f16v no) { return (f16v)((mask & (i16v)yes) | (~mask & (i16v)no)); }

/* exp for |x| < 87, clamped outside; relative error below 2e-7 (Cephes' polynomial, as in most vector libraries). */
INLINE f16v exp16(f16v x) {
    const f16v low = (f16v){0} - 87.0f, high = (f16v){0} + 87.0f;
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    f16v shifted = x * 1.44269504088896341f + 12582912.0f;
    f16v n = shifted - 12582912.0f;
    f16v r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f16v y = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
              1.6666665459e-1f) * r + 0.5f;
    y = y * r * r + r + 1.0f;
    i16v exponent = ((i16v)shifted - 0x4B400000 + 127) << 23;
    return y * (f16v)exponent;
}

/* silu(gate) · up: row [2I] → [I]; both padded by the caller to whole vectors. */
DISPATCHED static void silu_mul(const float *gate_up, int64_t size, float *out) {
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        f16v gate = *(const f16v *)(gate_up + i), up = *(const f16v *)(gate_up + size + i);
        *(f16v *)(out + i) = gate / (1.0f + exp16(-gate)) * up;
    }
    if (i < size) {
        float gates[16] = {0}, ups[16] = {0}, results[16];
        memcpy(gates, gate_up + i, (size - i) * sizeof(float));
        memcpy(ups, gate_up + size + i, (size - i) * sizeof(float));
        f16v gate = *(const f16v *)gates;
        *(f16v *)results = gate / (1.0f + exp16(-gate)) * *(const f16v *)ups;
        memcpy(out + i, results, (size - i) * sizeof(float));
    }
}

DISPATCHED static void add_scaled(float *out, const float *x, float factor, int64_t size) {
    for (int64_t i = 0; i < size; i++) out[i] += factor * x[i];
}

/* Experts over tokens. Expert num_experts, if there is one more, is the shared expert: every token's, with weight 1.
   Returns 0, or -1 when memory is out. */
static int fused_moe(const Weight *const *w13, const Weight *const *w2, int64_t num_experts, int has_shared,
                     const float *x, int64_t num_tokens, int64_t top_k, const int64_t *ids, const float *weights,
                     const float *residual, float *out) {
    int64_t total = num_experts + has_shared, fan = top_k + has_shared, num_pairs = num_tokens * fan;
    int64_t hidden = w2[total - 1]->n, widest = 0;
    for (int64_t e = 0; e < total; e++) widest = w13[e]->n > widest ? w13[e]->n : widest;
    int step = rows_at_once();
    int64_t *order = malloc((num_pairs + total + 1) * sizeof(int64_t));
    float *down = malloc((num_pairs * hidden + MAX_ROWS * (widest + widest / 2)) * sizeof(float));
    if (!order || !down) {
        free(order);
        free(down);
        return -1;
    }
    float *gate_up = down + num_pairs * hidden, *activated = gate_up + MAX_ROWS * widest;
    int64_t *ends = order + num_pairs;
    memset(ends, 0, (total + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < num_tokens * top_k; i++) ends[ids[i] + 1]++;
    if (has_shared) ends[total] += num_tokens;
    for (int64_t e = 0; e < total; e++) ends[e + 1] += ends[e];
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t j = 0; j < top_k; j++) order[ends[ids[t * top_k + j]]++] = t * fan + j;
        if (has_shared) order[ends[num_experts]++] = t * fan + top_k;
    }
    int64_t first = 0; /* ends[e] has moved from the expert's begin to its end */
    for (int64_t e = 0; e < total; first = ends[e], e++)
        for (; first < ends[e]; first += step) {
            int count = ends[e] - first < step ? (int)(ends[e] - first) : step;
            int64_t inner = w13[e]->n / 2;
            const float *rows[MAX_ROWS];
            const float *halves[MAX_ROWS];
            float *wide[MAX_ROWS], *outs[MAX_ROWS];
            for (int m = 0; m < count; m++) {
                rows[m] = x + order[first + m] / fan * w13[e]->k;
                wide[m] = gate_up + m * widest;
                halves[m] = activated + m * (widest / 2);
                outs[m] = down + order[first + m] * hidden;
            }
            multiply_rows(w13[e], count, rows, NULL, wide);
            for (int m = 0; m < count; m++) silu_mul(wide[m], inner, activated + m * (widest / 2));
            multiply_rows(w2[e], count, halves, NULL, outs);
        }
    for (int64_t t = 0; t < num_tokens; t++) {
        if (residual)
            memcpy(out + t * hidden, residual + t * hidden, hidden * sizeof(float));
        else
            memset(out + t * hidden, 0, hidden * sizeof(float));
        for (int64_t j = 0; j < fan; j++)
            add_scaled(out + t * hidden, down + (t * fan + j) * hidden, j < top_k ? weights[t * top_k + j] : 1.0f,
                       hidden);
    }
    free(order);
    free(down);
    return 0;
}

/* Choose experts: see kernels/router.py. Ties go to the lower index. Returns 0, or -1 when memory is out. */
static int route(const Weight *gate, const float *bias, const float *x, int64_t num_tokens, int64_t top_k,
                 int64_t n_group, int64_t topk_group, int normalise, float factor, float *weights, int64_t *ids) {
    int64_t num_experts = gate->n, group_size = num_experts / n_group;
    float *scores = malloc((num_tokens + 2) * num_experts * sizeof(float));
    if (!scores) return -1;
    float *biased = scores + num_tokens * num_experts, *group_scores = biased + num_experts;
    linear(gate, x, num_tokens, NULL, scores);
    for (int64_t t = 0; t < num_tokens; t++) {
        float *score = scores + t * num_experts, sum = 0;
        for (int64_t e = 0; e < num_experts; e++) {
            score[e] = 1.0f / (1.0f + expf(-score[e]));
            biased[e] = score[e] + bias[e];
        }
        if (n_group > 1) {
            for (int64_t g = 0; g < n_group; g++) {
                float best = -INFINITY, second = -INFINITY;
                for (int64_t e = g * group_size; e < (g + 1) * group_size; e++) {
                    if (biased[e] > best) {
                        second = best;
                        best = biased[e];
                    } else if (biased[e] > second)
                        second = biased[e];
                }
                group_scores[g] = best + second;
            }
            for (int64_t g = 0; g < n_group; g++) {
                int64_t rank = 0;
                for (int64_t h = 0; h < n_group; h++)
                    rank += group_scores[h] > group_scores[g] || (group_scores[h] == group_scores[g] && h < g);
                if (rank >= topk_group)
                    for (int64_t e = g * group_size; e < (g + 1) * group_size; e++) biased[e] = -INFINITY;
            }
        }
        for (int64_t j = 0; j < top_k; j++) {
            int64_t best = 0;
            for (int64_t e = 1; e < num_experts; e++)
                if (biased[e] > biased[best]) best = e;
            ids[t * top_k + j] = best;
            weights[t * top_k + j] = score[best];
            sum += score[best];
            biased[best] = -INFINITY;
        }
        for (int64_t j = 0; j < top_k; j++)
            weights[t * top_k + j] = (normalise ? weights[t * top_k + j] / (sum + 1e-20f) : weights[t * top_k + j]) * factor;
    }
    free(scores);
    return 0;
}

/* Norm (if weight) and rotate one head in place. */
INLINE void norm_and_rotate(float *head, const float *weight, int64_t dim, int64_t half, float eps, const float *cosine,
                            const float *sine) {
    if (weight) {
        float lanes[16] = {0}, sum = 0;
        for (int64_t i = 0; i < dim; i += 16)
            for (int j = 0; j < 16; j++) lanes[j] += head[i + j] * head[i + j];
        for (int j = 0; j < 16; j++) sum += lanes[j];
        float factor = 1.0f / sqrtf(sum / dim + eps);
        for (int64_t i = 0; i < dim; i++) head[i] = head[i] * factor * weight[i];
    }
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] + b * sine[i];
        head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

/* qkv: [T, (num_heads + 2 num_kv_heads) · dim], its queries and keys normed and rotated in place. */
DISPATCHED static void rope_and_cache(float *qkv, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                                      int64_t dim, int64_t half, const float *q_norm, const float *k_norm, float eps,
                                      const float *cosine, const float *sine, const int64_t *positions,
                                      const int64_t *slots, float *k_cache, float *v_cache) {
    int64_t kv_size = num_kv_heads * dim;
    for (int64_t t = 0; t < num_tokens; t++, qkv += (num_heads + 2 * num_kv_heads) * dim) {
        const float *c = cosine + positions[t] * dim, *s = sine + positions[t] * dim;
        for (int64_t h = 0; h < num_heads + num_kv_heads; h++)
            norm_and_rotate(qkv + h * dim, h < num_heads ? q_norm : k_norm, dim, half, eps, c, s);
        if (slots[t] < 0) continue; /* a row that nobody stores */
        memcpy(k_cache + slots[t] * kv_size, qkv + num_heads * dim, kv_size * sizeof(float));
        memcpy(v_cache + slots[t] * kv_size, qkv + (num_heads + num_kv_heads) * dim, kv_size * sizeof(float));
    }
}

typedef struct {
    const float *k, *v;
    const int64_t *pages;
    int64_t page_size, token_stride; /* floats from one token's heads to the next's */
} PagedKV;

INLINE const float *entry(const float *cache, const PagedKV *kv, int64_t key) {
    return cache + (kv->pages[key / kv->page_size] * kv->page_size + key % kv->page_size) * kv->token_stride;
}

INLINE float sum16(f16v x) {
    f8v a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    f4v b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[1]) + (b[2] + b[3]);
}

/* HEADS query heads that share a KV head, dim floats apart, over keys first … last: every key and value is read once.
   scores: HEADS times ``room`` floats, room ≥ the number of keys rounded up to 16. */
INLINE void attend(const int heads, const int num_vectors, const float *q, const PagedKV *kv, int64_t first, int64_t last,
                   float scale, float *scores, int64_t room, float *out) {
    f16v query[MAX_HEADS][8], acc[MAX_HEADS][8];
    int64_t count = last - first + 1, padded = (count + 15) & ~(int64_t)15, dim = 16 * num_vectors;
    float largest[MAX_HEADS], inverse[MAX_HEADS];
#pragma GCC unroll 2
    for (int h = 0; h < heads; h++) {
        largest[h] = -INFINITY;
#pragma GCC unroll 8
        for (int j = 0; j < num_vectors; j++) {
            query[h][j] = *(const f16v *)(q + h * dim + 16 * j) * scale;
            acc[h][j] = (f16v){0};
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const float *key = entry(kv->k, kv, first + i);
        f16v dot[MAX_HEADS];
#pragma GCC unroll 8
        for (int j = 0; j < num_vectors; j++) {
            f16v part = *(const f16v *)(key + 16 * j);
#pragma GCC unroll 2
            for (int h = 0; h < heads; h++) dot[h] = j ? dot[h] + query[h][j] * part : query[h][j] * part;
        }
#pragma GCC unroll 2
        for (int h = 0; h < heads; h++) {
            float score = sum16(dot[h]);
            scores[h * room + i] = score;
            largest[h] = score > largest[h] ? score : largest[h];
        }
    }
    for (int h = 0; h < heads; h++) {
        float *row = scores + h * room;
        f16v total = {0};
        for (int64_t i = count; i < padded; i++) row[i] = -INFINITY;
        for (int64_t i = 0; i < padded; i += 16) {
            f16v weight = exp16(*(const f16v *)(row + i) - largest[h]);
            for (int j = 0; i + 16 > count && j < 16; j++)
                if (i + j >= count) weight[j] = 0;
            *(f16v *)(row + i) = weight;
            total += weight;
        }
        inverse[h] = count > 0 ? 1.0f / sum16(total) : 0.0f;
    }
    for (int64_t i = 0; i < count; i++) {
        const float *value = entry(kv->v, kv, first + i);
#pragma GCC unroll 8
        for (int j = 0; j < num_vectors; j++) {
            f16v part = *(const f16v *)(value + 16 * j);
#pragma GCC unroll 2
            for (int h = 0; h < heads; h++) acc[h][j] += scores[h * room + i] * part;
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 8
        for (int j = 0; j < num_vectors; j++) *(f16v *)(out + h * dim + 16 * j) = acc[h][j] * inverse[h];
}

INLINE void attend_by_dim(const int heads, int64_t dim, const float *q, const PagedKV *kv, int64_t first, int64_t last,
                          float scale, float *scores, int64_t room, float *out) {
    switch (dim / 16) {
    case 1: attend(heads, 1, q, kv, first, last, scale, scores, room, out); break;
    case 2: attend(heads, 2, q, kv, first, last, scale, scores, room, out); break;
    case 4: attend(heads, 4, q, kv, first, last, scale, scores, room, out); break;
    default: attend(heads, 8, q, kv, first, last, scale, scores, room, out); break;
    }
}

DISPATCHED static void attend_heads(int heads, int64_t dim, const float *q, const PagedKV *kv, int64_t first,
                                    int64_t last, float scale, float *scores, int64_t room, float *out) {
    if (heads == 2)
        attend_by_dim(2, dim, q, kv, first, last, scale, scores, room, out);
    else
        attend_by_dim(1, dim, q, kv, first, last, scale, scores, room, out);
}

/* q: T rows of q_stride floats, heads first. starts, cu_seqlens_q, page_table [S, max_pages]: see layers/batch.py. */
static int paged_attention(const float *q, int64_t q_stride, const float *k_cache, const float *v_cache,
                           int64_t num_heads, int64_t num_kv_heads, int64_t dim, int64_t page_size, int64_t num_seqs,
                           const int64_t *starts, const int64_t *cu_seqlens_q, const int64_t *page_table,
                           int64_t max_pages, int64_t first_key, float scale, float *out) {
    int64_t group = num_heads / num_kv_heads, room = max_pages * page_size + 32;
    int heads = group % MAX_HEADS ? 1 : MAX_HEADS;
    float *scores = malloc(MAX_HEADS * room * sizeof(float));
    if (!scores) return -1;
    for (int64_t s = 0; s < num_seqs; s++)
        for (int64_t t = cu_seqlens_q[s]; t < cu_seqlens_q[s + 1]; t++)
            for (int64_t h = 0; h < num_heads; h += heads) {
                int64_t offset = h / group * dim;
                PagedKV kv = {k_cache + offset, v_cache + offset, page_table + s * max_pages, page_size,
                              num_kv_heads * dim};
                attend_heads(heads, dim, q + t * q_stride + h * dim, &kv, first_key, starts[s] + t - cu_seqlens_q[s],
                             scale, scores, room, out + (t * num_heads + h) * dim);
            }
    free(scores);
    return 0;
}

/* --- Python: every argument is an int (an address, 0 for none, or a size) or a float. ------------------------------ */

enum { MAX_ARGUMENTS = 16 };
typedef union {
    int64_t i;
    double f;
    void *p;
} Argument;

static int parse(const char *name, PyObject *const *args, Py_ssize_t found, Py_ssize_t expected, Argument *out) {
    if (found != expected) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, found %zd", name, expected, found);
        return -1;
    }
    for (Py_ssize_t i = 0; i < found; i++) {
        if (PyFloat_Check(args[i]))
            out[i].f = PyFloat_AS_DOUBLE(args[i]);
        else
            out[i].i = PyLong_AsLongLong(args[i]);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *done(int status) {
    if (status) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#define METHOD(name, count)                                                                                            \
    static PyObject *py_##name(PyObject *self, PyObject *const *args, Py_ssize_t found) {                              \
        Argument a[MAX_ARGUMENTS];                                                                                     \
        (void)self;                                                                                                    \
        if (parse(#name, args, found, count, a)) return NULL;                                                          \
        return done(call_##name(a));                                                                                   \
    }

static int call_linear(const Argument *a) {
    linear(a[0].p, a[1].p, a[2].i, a[3].p, a[4].p);
    return 0;
}
static int call_rms_norm(const Argument *a) {
    rms_norm(a[0].p, a[1].p, a[2].i, a[3].i, (float)a[4].f, a[5].p);
    return 0;
}
static int call_nextn_input(const Argument *a) {
    nextn_input(a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].i, a[6].i, (float)a[7].f, a[8].p);
    return 0;
}
static int call_fused_moe(const Argument *a) {
    return fused_moe(a[0].p, a[1].p, a[2].i, (int)a[3].i, a[4].p, a[5].i, a[6].i, a[7].p, a[8].p, a[9].p, a[10].p);
}
static int call_route(const Argument *a) {
    return route(a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, a[5].i, a[6].i, (int)a[7].i, (float)a[8].f, a[9].p, a[10].p);
}
static int call_rope_and_cache(const Argument *a) {
    rope_and_cache(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p, (float)a[8].f, a[9].p, a[10].p,
                   a[11].p, a[12].p, a[13].p, a[14].p);
    return 0;
}
static int call_paged_attention(const Argument *a) {
    return paged_attention(a[0].p, a[1].i, a[2].p, a[3].p, a[4].i, a[5].i, a[6].i, a[7].i, a[8].i, a[9].p, a[10].p,
                           a[11].p, a[12].i, a[13].i, (float)a[14].f, a[15].p);
}

METHOD(linear, 5)
METHOD(rms_norm, 6)
METHOD(nextn_input, 9)
METHOD(fused_moe, 11)
METHOD(route, 11)
METHOD(rope_and_cache, 15)
METHOD(paged_attention, 16)

static PyMethodDef methods[] = {
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, "weight, x, num_rows, residual, out"},
    {"rms_norm", (PyCFunction)(void (*)(void))py_rms_norm, METH_FASTCALL, "x, weight, num_rows, size, eps, out"},
    {"nextn_input", (PyCFunction)(void (*)(void))py_nextn_input, METH_FASTCALL,
     "ids, embedding, hidden, enorm, hnorm, num_tokens, size, eps, out"},
    {"fused_moe", (PyCFunction)(void (*)(void))py_fused_moe, METH_FASTCALL,
     "w13, w2, num_experts, has_shared, x, num_tokens, top_k, ids, weights, residual, out"},
    {"route", (PyCFunction)(void (*)(void))py_route, METH_FASTCALL,
     "gate, bias, x, num_tokens, top_k, n_group, topk_group, normalise, factor, weights, ids"},
    {"rope_and_cache", (PyCFunction)(void (*)(void))py_rope_and_cache, METH_FASTCALL,
     "qkv, num_tokens, num_heads, num_kv_heads, dim, half, q_norm, k_norm, eps, cos, sin, positions, slots, k, v"},
    {"paged_attention", (PyCFunction)(void (*)(void))py_paged_attention, METH_FASTCALL,
     "q, q_stride, k, v, num_heads, num_kv_heads, dim, page_size, num_seqs, starts, cu_seqlens_q, page_table, "
     "max_pages, first_key, scale, out"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", "Kernels for one CPU core.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModule_Create(&module); }
