/* Scores and score gradients of the dQ kernel (bwd_dq_wgmma.cu), which also describes the shared memory. */
#ifndef VD_ATTENTION_DQ_SCORES_CUH
#define VD_ATTENTION_DQ_SCORES_CUH

#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/bwd_skew.cuh"
#include "cuda/attention/splits.cuh"

namespace {

/* Query tiles of a block, each with a consumer warpgroup of its own, and the slots of keys and values: those of an
 * iteration and of the next one. */
enum { VD_DQ_TILES = VD_HEAD_WIDTH == 64 ? 2 : 1, VD_DQ_KEY_SLOTS = 2 * VD_DQ_TILES };

/* A work item: its first query tile, with the numbers of key tiles of the last one. A closing iteration after the last
 * key tile adds the block of e that it ends with. */
typedef struct dq_work {
  vd_query_work tile;
  int iterations;
  char *stored[VD_DQ_TILES];                 /* of each query tile, the stored tile of the first iteration's key tile */
  const uint32_t *dropout_mask[VD_DQ_TILES]; /* and its tile of the dropout mask */
} dq_work;

/* What the table warpgroup does in an iteration: ADDS_BLOCK: it adds the block of e that begins with e0;
 * LAST_ITERATION: it ends. Bit 0 of the flags is the slot of q. */
enum { ADDS_BLOCK = 2, LAST_ITERATION = 4 };
typedef struct dq_table_iteration {
  int e0, head, flags;
} dq_table_iteration;

/* Iterations are counted through the work of a block: iteration c has the block of e number c in slot c % 3 of the
 * table, which consumer x completes in slot c & 1 of skewed[x]. Work item i has slot i & 1 of q, biases, work and more.
 */
template <typename T> struct dq_smem {
  T skewed[VD_DQ_TILES][2][VD_PANEL]; /* score gradients by columns of e */
  T q[2][VD_DQ_TILES][VD_OPERAND], dout[VD_DQ_TILES][VD_OPERAND];
  T k[VD_DQ_KEY_SLOTS][VD_OPERAND], v[VD_DQ_KEY_SLOTS][VD_OPERAND], table[3][VD_OPERAND];
  __half ring[VD_DQ_TILES][VD_WARPGROUP / 32][16 * VD_RING_STRIDE];
  T ones[8 * 64];
  uint32_t dropout_mask[2][VD_DQ_TILES][VD_WARPGROUP]; /* bits of an iteration's key tile, by consumer thread */
  vd_biases biases[2];                                 /* with relative keys */
  float shift[VD_DQ_TILES][VD_TILE], delta[VD_DQ_TILES][VD_TILE], sums[VD_DQ_TILES][4];
  dq_work work[2];
  dq_table_iteration table_iteration[2];
  int more[2], next, last_split[VD_DQ_TILES]; /* more: whether an item follows; next: its number, for the producer */
  uint64_t full[2], empty[2], skewed_full[VD_DQ_TILES][2], skewed_empty[VD_DQ_TILES][2];
};
static_assert(sizeof(dq_smem<__half>) + 1024 <= 227 * 1024, "shared memory of a block");

/* A consumer warp's state over the key tiles. */
template <typename T> struct dq_state {
  vd_frag_a<T> dout[VD_LEFTS], queries[VD_LEFTS];
  vd_frag_a<T> positions[VD_LEFTS]; /* with relative keys, queries with v added; the others have u */
  float dq[VD_SUMS][4];
  float shift[2], delta[2]; /* of rows g and g + 8 */
  float dspan;
};

/* The operands of a consumer's iteration: the key tile, the block of e that it ends with, the warp's ring, this
 * thread's place in the stored tile (row g, the chunk of its first columns), the numbers of that block and of the key
 * tile's first key. */
template <typename T> struct dq_iteration {
  const T *k, *v, *table;
  __half *ring;
  char *stored;
  int block, kappa0;
};

/* Scores of a warp's 16 queries and a key tile: products, then in place score gradients. */
typedef struct dq_scores {
  float s[8][4], ds[8][4]; /* ds: not of far tiles */
  uint32_t dropout_mask;
} dq_scores;

/* The products of an iteration: position scores, which go to the ring, scores and, unless FAR, gradients of weights. */
template <bool FAR, bool REL, typename T>
VD_DEV void multiply_scores(const dq_iteration<T> &m, const dq_state<T> &w, dq_scores &y) {
  float position[8][4];
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_K_MAJOR>(position, REL ? w.positions : w.queries, m.table, false);
  vd_wgmma_commit();
  vd_tile_product_rs<T, VD_K_MAJOR>(y.s, w.queries, m.k, false);
  if constexpr (!FAR) vd_tile_product_rs<T, VD_K_MAJOR>(y.ds, w.dout, m.v, false);
  vd_wgmma_commit();
  vd_end_scores(m.ring, m.block, position, y.s);
  if constexpr (!FAR) vd_wgmma_fence_operand<8>(y.ds);
}

/* Sub-tile j of 16 queries from i0 on and 64 keys: gradients of weights ds become gradients of scores, scores s become
 * weights before dropout. */
template <typename T, bool FULL, bool DROP, bool REL, bool TRIM>
VD_DEV void score_gradients(const vd_band &band, float scale, dq_state<T> &w, uint32_t dropout_mask, int j, int i0,
                            int kappa0, float factor, float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, i0 - kappa0 - 16 * j + g - 2 * t, scale);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, nearer = 8 * jn + (e & 1) - 8 * (e >> 1);
    float score = fmaf(s[jn][e], factor, w.shift[e >> 1]), delta = w.delta[e >> 1];
    const bool keep = !DROP || (dropout_mask >> vd_mask_bit(j, jn, e) & 1);
    if (REL && !FULL)
      score = vd_masks_seen(m, nearer) && kappa0 + 16 * j + 8 * jn + 2 * t + (e & 1) >= band.oldest ? score : -INFINITY;
    if constexpr (FULL || REL) {
      s[jn][e] = vd_exp2(score);
      ds[jn][e] = vd_kept_gradient(s[jn][e], keep, ds[jn][e], delta);
    } else {
      ds[jn][e] = vd_masked_gradient<TRIM>(m, nearer, score, keep ? ds[jn][e] : 0, delta, &s[jn][e], &w.dspan);
    }
  }
}

/* The bits of `dropped`, the complement of mask bits, for row half ih: those of elements 0 and 1 in bytes 1 and 3. */
VD_DEV uint32_t sign_bytes(uint32_t dropped, int ih) {
  return __byte_perm(dropped, 0, ih ? 0x3424 : 0x1404);
}
/* Stores a thread's part of columns 32 half .. 32 half + 31 of two rows, left operands `pair`, at its place in a stored
 * tile. */
template <typename T> VD_DEV void store_columns(char *place, int half, const vd_frag_a<T> pair[2]) {
  char *to = half ? (char *)((uint64_t)place ^ 64) : place;
#pragma unroll
  for (int ih = 0; ih < 2; ih++)
    __stcg((uint4 *)(to + ih * 1024), make_uint4(pair[0].x[ih], pair[0].x[2 + ih], pair[1].x[ih], pair[1].x[2 + ih]));
}
/* Stores weights of sub-tiles 2 half and 2 half + 1, negative where dropped, likewise. */
template <bool DROP, typename T>
VD_DEV void store_weights(char *place, int half, const uint32_t sign[2], const float s[4][4]) {
  vd_frag_a<T> pair[2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int j = 2 * half + (i >> 2), jn = i >> 1 & 1, ih = i & 1;
    const float *weight = s[i >> 1] + 2 * ih;
    pair[i >> 2].x[i & 3] = vd_pack(weight[0], weight[1], T());
    if (DROP) pair[i >> 2].x[i & 3] ^= sign[ih] << (2 * j + jn) & 0x80008000U;
  }
  store_columns<T>(place, half, pair);
}

/* Score gradients, as left operands, of this warp's queries, from i0 on, and a key tile, whose weights are stored. */
template <bool DROP, bool REL, bool TRIM, typename T>
VD_DEV void near_gradients(const vd_band &band, float scale, const dq_iteration<T> &m, dq_state<T> &w, int i0,
                           float factor, dq_scores &y, vd_frag_a<T> gradient[4]) {
  const int unit = 4 * m.block + 7 - (int)(threadIdx.x >> 5);
  const uint32_t sign[2] = {DROP ? sign_bytes(~y.dropout_mask, 0) : 0, DROP ? sign_bytes(~y.dropout_mask, 1) : 0};
  if (vd_row_full<REL>(band, i0, m.kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_ring(y.s + 2 * j, m.ring, unit + j);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      score_gradients<T, true, DROP, REL, TRIM>(band, scale, w, y.dropout_mask, j, i0, m.kappa0, factor, y.s + 2 * j,
                                                y.ds + 2 * j);
      if (REL && (j & 1)) store_weights<DROP, T>(m.stored, j >> 1, sign, y.s + 2 * (j - 1));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (vd_any_seen<REL>(band, i0 - m.kappa0 - 16 * j, m.kappa0 + 16 * j)) {
        vd_add_ring(y.s + 2 * j, m.ring, unit + j);
        score_gradients<T, false, DROP, REL, TRIM>(band, scale, w, y.dropout_mask, j, i0, m.kappa0, factor, y.s + 2 * j,
                                                   y.ds + 2 * j);
      } else {
        vd_clear(y.s + 2 * j), vd_clear(y.ds + 2 * j);
      }
      if (REL && (j & 1)) store_weights<DROP, T>(m.stored, j >> 1, sign, y.s + 2 * (j - 1));
    }
  }
  if constexpr (!REL)
    store_weights<DROP, T>(m.stored, 0, sign, y.s), store_weights<DROP, T>(m.stored, 1, sign, y.s + 4);
  vd_results_to_a(gradient, y.ds);
}

/* The same for a far tile, whose weights are 0: ds = -p delta. The size of delta is added to the exponent, and its sign
 * is set last. */
template <typename T>
VD_DEV void far_gradients(const vd_band &band, const dq_iteration<T> &m, const dq_state<T> &w, int i0, float factor,
                          dq_scores &y, vd_frag_a<T> gradient[4]) {
  float(*s)[4] = y.s, shift[2];
  uint32_t sign[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    shift[ih] = __log2f(fabsf(w.delta[ih])) + w.shift[ih];
    sign[ih] = w.delta[ih] > 0 ? 0x80008000U : 0;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, m.ring, 4 * m.block + 7 - (int)(threadIdx.x >> 5) + j);
#pragma unroll
  for (int i = 0; i < 32; i++) s[i >> 2][i & 3] = vd_exp2(fmaf(s[i >> 2][i & 3], factor, shift[i >> 1 & 1]));
  if (!vd_far_row_seen(band, i0, m.kappa0)) {
    const int x = i0 - m.kappa0 + (int)(threadIdx.x & 31) / 4 - 2 * (int)(threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < 32; i++)
      s[i >> 2][i & 3] = vd_seen(band, x + 8 * (i >> 1 & 1) - 8 * (i >> 2) - (i & 1)) ? s[i >> 2][i & 3] : 0;
  }
  vd_results_to_a(gradient, s);
#pragma unroll
  for (int i = 0; i < 16; i++) gradient[i >> 2].x[i & 3] ^= sign[i & 1];
  store_columns<T>(m.stored, 0, gradient), store_columns<T>(m.stored, 1, gradient + 2);
}

} // namespace

#endif
