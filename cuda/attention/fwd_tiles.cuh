/* Shared by the forward kernel by wgmma (fwd_wgmma.cu) and its parts for a trimmed softmax (fwd_trimmed.cuh): shared
 * memory, scores, the on-line softmax, the next work tile, dropout. */
#ifndef VD_ATTENTION_FORWARD_TILES_CUH
#define VD_ATTENTION_FORWARD_TILES_CUH

#include "cuda/attention/pipeline.cuh"

namespace {

template <typename T> struct forward_smem {
  T tile[6][VD_OPERAND];  /* queries, keys, values: query_slot() and so on */
  T table[3][VD_OPERAND]; /* with relative keys the last one: the block before a work tile's first key tile */
  __half ring[VD_WARPGROUP / 32][16 * VD_RING_STRIDE];
  vd_biases biases; /* with relative keys */
  /* Mask bits of a key tile for each consumer thread, drawn one tile ahead of the copies. With three slots the
   * producer overwrites one only after a barrier that the consumer reached after reading it. */
  uint32_t dropout_mask[3][VD_WARPGROUP];
  int next[2], last_split;
};

/* Slots of the block's i-th work tile and c-th key tile. Where trimmed, queries pass to registers at once, and keys
 * have three slots, as has the table: with far tiles, copies of one tile ahead would arrive too late. */
template <bool TRIM, typename T> VD_DEV T *query_slot(forward_smem<T> *m, int i) {
  return m->tile[TRIM ? 0 : i & 1];
}
template <bool TRIM, typename T> VD_DEV T *key_slot(forward_smem<T> *m, int c) {
  return m->tile[TRIM ? 1 + c % 3 : 2 + (c & 1)];
}
template <typename T> VD_DEV T *value_slot(forward_smem<T> *m, int c) {
  return m->tile[4 + (c & 1)];
}
template <bool TRIM> VD_DEV int table_slot(int c) {
  return TRIM ? c % 3 : c & 1;
}

static_assert(VD_BLOCKS * (sizeof(forward_smem<__half>) + 1024) <= 228 * 1024, "blocks of a multiprocessor");

/* Operands of the kernel. */
template <typename T> struct forward_task {
  const T *block, *memory, *table;
  T *out;
  float *lse;
};

/* A warp's 16 queries over the key tiles. Scores are multiplied by sqrt(d_head); `factor` brings them to units of
 * log 2. */
struct forward_state {
  float sum[VD_SUMS][4];
  float highest[2], total[2]; /* of rows g and g + 8; total: only of this lane's columns */
};

/* Masks the scores of a partly seen sub-tile. */
template <bool REL, bool TRIM>
VD_DEV void mask_scores(const vd_band &band, int x0, int kappa0, float unit, float s[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, x0 + g - 2 * t);
  if (!REL && !TRIM) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      s[i >> 2][i & 3] += __log2f(vd_masks_at(m, 8 * (i >> 2) + (i & 1) - 8 * (i >> 1 & 1))) * unit;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, k = i & 3;
    bool seen =
        vd_masks_seen(m, 8 * jn + (k & 1) - 8 * (k >> 1)) && (!REL || kappa0 + 8 * jn + 2 * t + (k & 1) >= band.oldest);
    s[jn][k] = seen ? s[jn][k] : -INFINITY;
  }
}

/* Adds position scores to the scores of 64 keys, and masks pairs that are not seen in full. */
template <bool REL, bool TRIM>
VD_DEV void finish_scores(const vd_band &band, const __half *ring, int unit, int iw, int kappa0, float factor,
                          float s[8][4]) {
  if (vd_row_full<REL>(band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, unit + j);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int kappa = kappa0 + 16 * j;
    if (vd_any_seen<REL>(band, iw - kappa, kappa)) {
      vd_add_ring(s + 2 * j, ring, unit + j);
      mask_scores<REL, TRIM>(band, iw - kappa, kappa, 1 / factor, s + 2 * j);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) s[2 * j + (i >> 2)][i & 3] = -INFINITY;
    }
  }
}

/* One step of the on-line softmax with 64 keys: scores become weights (not yet divided by the sum), sums are
 * rescaled. */
VD_DEV void softmax_tile(forward_state &w, float factor, float s[8][4]) {
  float rescale[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float highest = w.highest[ih], total = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) highest = fmaxf(highest, fmaxf(s[n][2 * ih], s[n][2 * ih + 1]));
    highest = vd_quad_max(highest);
    float base = highest == -INFINITY ? 0 : highest * factor; /* no key seen so far */
    rescale[ih] = vd_exp2(w.highest[ih] * factor - base);
    w.highest[ih] = highest;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int jj = 0; jj < 2; jj++) {
        float p = vd_exp2(fmaf(s[n][2 * ih + jj], factor, -base));
        s[n][2 * ih + jj] = p;
        total += p;
      }
    w.total[ih] = w.total[ih] * rescale[ih] + total;
  }
  if (__all_sync(0xffffffffU, rescale[0] == 1 && rescale[1] == 1)) return;
#pragma unroll
  for (int i = 0; i < 4 * VD_SUMS; i++) w.sum[i >> 2][i & 3] *= rescale[i >> 1 & 1];
}

/* Content scores of the c-th key tile of the block, and its position scores in the ring buffer. Queries for both are in
 * registers, which leaves bandwidth of shared memory to the rest. */
template <typename T, bool TRIM>
VD_DEV void multiply_scores(forward_smem<T> *m, const vd_frag_a<T> *queries, const vd_frag_a<T> *positions, int c,
                            float s[8][4]) {
  float position[8][4];
  __half *ring = m->ring[threadIdx.x >> 5];
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_K_MAJOR>(position, positions, m->table[table_slot<TRIM>(c)], false);
  vd_wgmma_commit();
  vd_tile_product_rs<T, VD_K_MAJOR>(s, queries, key_slot<TRIM>(m, c), false);
  vd_wgmma_commit();
  vd_end_scores(ring, c + 1, position, s);
}

/* Work tiles are sorted by length. Each multiprocessor runs two blocks: the first to start there takes one of the
 * longest tiles, the second takes a later tile, so that no two of the longest tiles share a multiprocessor. */
VD_DEV int longest_tiles(int n_work_tile) {
  return min((int)gridDim.x / 2, n_work_tile);
}
VD_DEV int pop_tile(vd_tile_schedule *schedule, int n_longest) {
  int tile_id = atomicAdd(&schedule->next[VD_WORK_FORWARD], 1);
  return tile_id < n_longest ? tile_id : n_longest + atomicAdd(&schedule->next_rest, 1);
}

/* Draws the dropout mask of key tile t of the work tile, the c-th of the block, and stores it for the backward pass. */
template <typename T>
VD_DEV void draw_mask(const vd_cuda_attention &a, const vd_dropout_draws &drop, const vd_query_work &work,
                      forward_smem<T> *m, int t, int c) {
  const int thread = (int)threadIdx.x - VD_WARPGROUP;
  uint32_t bits = vd_draw_dropout_mask(drop, work.i0 + 16 * (thread >> 5), work.start + t * VD_TILE);
  m->dropout_mask[c % 3][thread] = bits;
  if (a.dropout_mask) a.dropout_mask[(int64_t)(work.score_tile - t) * VD_WARPGROUP + thread] = bits;
}

} // namespace

#endif
