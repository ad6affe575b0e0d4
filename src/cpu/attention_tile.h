/* What the forward and the backward of the CPU attention share: vectors, the small matrix product, packed operands, the
 * dropout mask of a tile. Internal to src/cpu/attention*.c; product.c takes its vectors.
 *
 * The sheared tile. For T queries from i0 and a head that sees n distances (first_distance .. reach) the scores lie in
 * a buffer of T rows with leading dimension ld > n: element (t, u), u = reach - x = 0..n-1, is query i0 + t against
 * distance x. Read with leading dimension ld - 1 the SAME buffer is the band matrix of queries against keys: element
 * (t, c), c = t + u, is key c counted from the farthest key of query i0. So position scores (sheared) and content
 * scores (band) accumulate in place, and the shift of relative positions costs nothing. The ld - n elements between
 * rows are a margin that products may overshoot into; they are zeroed before the tile is used as a left operand. */
#ifndef VD_CPU_ATTENTION_TILE_H
#define VD_CPU_ATTENTION_TILE_H

#include "src/ops/ops.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define VD_VECTOR_BYTES 64
#define VD_ROWS 8 /* rows of C that one kernel holds in registers, VD_ROWS x 2 vectors */
#elif defined(__AVX__)
#define VD_VECTOR_BYTES 32
#define VD_ROWS 4
#else
#define VD_VECTOR_BYTES 16
#define VD_ROWS 4
#endif
#define VD_LANES (VD_VECTOR_BYTES / (int64_t)sizeof(real))
#define VD_MARGIN (VD_ROWS + 2 * VD_LANES)
/* Keeps vector x, which was loaded, in a register. Compilers for some processors (gcc for AMD's) otherwise load it anew
 * for each row of C, so that loads bound the kernel, or unroll until sums are spilled. */
#if defined(__x86_64__)
#define VD_KEEP(x) __asm__("" : "+v"(x))
#else
#define VD_KEEP(x) (void)(x)
#endif
#define VD_TILE_MAX 64 /* queries a tile: a multiple of the 16 rows of a dropout tile and of VD_ROWS */

/* One head's share: which distances it sees and how the soft mask weighs them. Arrays over u = reach - x. */
typedef struct vd_head_plan {
  int64_t reach, n;    /* n = reach - first_distance + 1 distances */
  int64_t skip;        /* distances of the head's own plan that a tile leaves out: see vd_tile_head */
  int64_t first;       /* below it u has no effect at all (masked), or 0 (trimmed: it counts in the denominator) */
  int64_t seen;        /* below it u has mask 0 */
  int64_t ld, tile;    /* of the sheared tile; queries a tile */
  const real *mask;    /* [n] m */
  const real *slope;   /* [n] dm/dz */
  const real *pe;      /* [d_head] rows of leading dimension plan->ld_pe: column u is pe(x) or r_h(x), then zeros */
  const real *pe_rows; /* [n, wide]: row u is pe(x); NULL unless planned for backward */
} vd_head_plan;

/* All that is computed once a call. Owned by the caller of vd_attention_plan_new. */
typedef struct vd_attention_plan {
  const vd_attention *a;
  int64_t d, wide, ld_pe; /* model width; d_head rounded up to VD_LANES; leading dimension of heads[].pe */
  int64_t longest;        /* greatest heads[].n */
  int64_t keys;           /* greatest number of keys of a head and stream, margin included */
  real scale;             /* 1 / sqrt(d_head) */
  bool biased;            /* queries of content and position differ */
  uint32_t threshold;     /* of dropout; 0: none */
  real keep_scale;
  vd_head_plan *heads; /* [n_head] */
  int64_t *order;      /* [n_head] heads by falling reach, so that threads end together */
  real *store;
} vd_attention_plan;

/* Not collective. Checks the contract of `a` (vd_bug where broken) and fills *plan; `a` must outlive it. */
void vd_attention_plan_new(vd_attention_plan *plan, const vd_attention *a, bool backward);

/* Not collective. Frees what the plan owns. */
void vd_attention_plan_free(vd_attention_plan *plan);

/* Not collective. Memory for `count` reals (or as many bytes), aligned for vectors, not zeroed; vd_bug where there is
 * none. Free with free(). */
void *vd_aligned(int64_t count);

/* Not collective. C[m, n] = A B, or C += A B where `add`. A is [m, k] with element (i, p) at a[i * a_row + p * a_col];
 * B [k, n] and C have contiguous rows. m is a multiple of VD_ROWS, n of VD_LANES. Sums run over p in ascending order,
 * the same for every element whatever m and n. */
void vd_tile_product(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col, const real *b,
                     int64_t ldb, real *c, int64_t ldc, bool add);

/* Not collective. The head as the T queries from i0 see it: where its reach goes beyond the first key, distances that
 * none of them has a key at are left out. head->skip of them (a multiple of VD_LANES and VD_ROWS): arrays over u begin
 * so much later, and so do the tile's keys. */
vd_head_plan vd_tile_head(const vd_attention_plan *plan, int64_t h, int64_t i0, int64_t T);

/* Not collective. The first u at which query i has a key. */
static inline int64_t vd_first_key(const vd_attention_plan *plan, const vd_head_plan *head, int64_t i) {
  int64_t absent = head->reach - plan->a->window - i;
  return absent > 0 ? absent : 0;
}

/* Not collective. Scores of a tile of T queries from i0: s (sheared tile, T rounded up to VD_ROWS) = q_content k +
 * q_position pe; the queries [block + margin, wide] are scaled by 1/sqrt(d_head) and hold their biases, k_columns
 * [d_head, ld_k] holds the head's keys from the farthest that the tile sees for i0 = 0 on. Margins are left undefined.
 */
void vd_tile_scores(const vd_attention_plan *plan, const vd_head_plan *head, int64_t i0, int64_t T,
                    const real *q_content, const real *q_position, const real *k_columns, int64_t ld_k, real *s);

/* Not collective. Band product of T rows: s (band view) = x[i0..] y, or += where `add`: x [.., wide], y_columns
 * [d_head, ld_y]. */
void vd_tile_band(const vd_attention_plan *plan, const vd_head_plan *head, int64_t i0, int64_t T, const real *x,
                  const real *y_columns, int64_t ld_y, real *s, bool add);

/* Not collective. Copies d_head columns of `rows` rows of leading dimension ld to [rows, wide], zeros in the padding;
 * rows up to `padded` are zeroed. */
void vd_pack_rows(const vd_attention_plan *plan, const real *from, int64_t ld, int64_t rows, int64_t padded, real *to);

/* What stands side by side in a row of struct vd_qkv. */
enum vd_part { VD_QUERY, VD_KEY, VD_VALUE };

/* Keys, values or their gradients of one head and stream. Of its reach + block places the first `absent` lie before row
 * 0, and are zeros when packed; `remembered` rows of the memory and the rows of the block follow. */
typedef struct vd_key_rows {
  int64_t absent, remembered;
  real *memory, *block; /* the head's elements of the first row of each, of leading dimensions 2 d and 3 d */
} vd_key_rows;

/* Not collective. The keys or values of head h in stream b of x. */
vd_key_rows vd_key_rows_of(const vd_attention_plan *plan, const vd_qkv *x, enum vd_part part, int64_t b, int64_t h);

/* Not collective. The block's part of head h in stream b of x: rows of leading dimension 3 d. */
real *vd_block_rows(const vd_attention_plan *plan, const vd_qkv *x, enum vd_part part, int64_t b, int64_t h);

/* Not collective. The block's queries of head h in stream b, scaled, plus the head's row of `bias` (NULL: none), as
 * vd_pack_rows. */
void vd_pack_queries(const vd_attention_plan *plan, const vd_qkv *x, int64_t b, int64_t h, const real *bias, real *to);

/* Not collective. A head's keys as vd_pack_rows. */
void vd_pack_key_rows(const vd_attention_plan *plan, const vd_key_rows *keys, real *to);
/* Not collective. The same, transposed: to [d_head, ld], what follows the keys zeroed. */
void vd_pack_key_columns(const vd_attention_plan *plan, const vd_key_rows *keys, int64_t ld, real *to);
/* Not collective. The reverse of vd_pack_key_rows, for the rows that exist. */
void vd_unpack_key_rows(const vd_attention_plan *plan, const vd_key_rows *keys, const real *from);

/* Not collective. The 16-bit halves of the dropout of stream (of this call), head and queries i0 .. i0 + T - 1: row t
 * lies at halves + t * vd_half_ld(head) and its element u at the returned offset + t + u. */
int64_t vd_tile_halves(const vd_attention_plan *plan, const vd_head_plan *head, int64_t stream, int64_t h, int64_t i0,
                       int64_t T, uint16_t *halves);

/* Not collective. Leading dimension of vd_tile_halves' buffer for a head that sees n distances. */
static inline int64_t vd_half_ld(int64_t n) {
  return (n + VD_TILE_MAX + 47) / 16 * 16;
}

/* Not collective. Rounds n up to a multiple of `to`. */
static inline int64_t vd_round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

/* Not collective. Leading dimension of at least n reals: whole vectors, an odd number of them, because rows a power of
 * two apart would share few cache sets. */
static inline int64_t vd_leading(int64_t n) {
  return (vd_round_up(n, VD_LANES) / VD_LANES | 1) * VD_LANES;
}

/* Not collective. e^x, written so that compilers make vectors of it. In float within 2 units in the last place between
 * -87 and 88.3; below that it is e^-87 (1.6e-38), above it infinity; NaN stays NaN. In double libm's. */
static inline real vd_exp(real x) {
#ifdef VD_DOUBLE
  return exp(x);
#else
  /* e^x = 2^i e^r with i = round(x / ln 2); adding 1.5 * 2^23 rounds and leaves i in the low bits. The polynomial is
   * the least-squares fit of e^r at the Chebyshev points of |r| <= ln(2)/2. */
  union {
    float f;
    int32_t i;
  } round, power;
  float y = x < -87.0F ? -87.0F : x;
  round.f = y * 1.44269504F + 12582912.0F;
  float i = round.f - 12582912.0F;
  float r = y - i * 0.693145752F;
  r = r - i * 1.42860677e-6F;
  float p = 0.00139336503F;
  p = p * r + 0.00836318012F;
  p = p * r + 0.0416664649F;
  p = p * r + 0.166665770F;
  p = p * r + 0.500000001F;
  p = p * r * r + r + 1.0F;
  power.i = (round.i - 0x4B400000 + 127) * (1 << 23);
  return x > 88.3F ? INFINITY : p * power.f;
#endif
}

#endif
