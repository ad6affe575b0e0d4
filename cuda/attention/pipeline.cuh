/* Shared by the warp-specialized attention kernels (fwd_wgmma.cu, bwd_dq_wgmma.cu, bwd_dkv_wgmma.cu): 16-bit types,
 * heads up to 64 wide (up to 96 in the files for wider heads), tiles of 64 queries or keys.
 *
 * The backward kernels have warpgroups and barriers of their own. A block of the forward kernel has two warpgroups. The
 * consumer warpgroup (threads 0 .. 127) multiplies by wgmma and keeps accumulators in 192 registers a thread. The
 * producer warpgroup (threads 128 .. 255) copies the tiles by cp.async and draws the dropout mask, one tile ahead, in
 * issue slots that the consumer leaves free; it starts the next work tile while the consumer ends the current one. Two
 * blocks share a multiprocessor; with wider heads one has it alone, and each thread 255 registers.
 *
 * Named barriers: 1, the consumer warpgroup alone; VD_TILE_FULL, the producer arrives when a tile's copies have
 * landed and the consumer waits; VD_TILE_EMPTY, the consumer arrives once for each tile and the producer waits
 * before it copies the next one; VD_PRODUCER, the producer warpgroup alone.
 *
 * A tile is 64 rows of 128 bytes (wider heads: and a second panel, of which 64 bytes a row are used), swizzled
 * (vd_swizzled_chunk) and aligned to 1024 bytes; wgmma contracts over its columns (K-major) or its rows (MN-major).
 * Warp w has rows 16 w .. 16 w + 15 of a result, laid out as eight adjacent m16n8k16 results (mma.cuh), so that c + 2 j
 * is the 16 x 16 sub-tile of columns 16 j. */
#ifndef VD_PIPELINE_CUH
#define VD_PIPELINE_CUH

#include "cuda/attention/common.cuh"
#include "cuda/kernels/wgmma.cuh"

/* Columns of a head in shared memory, 64 or 96: a file for wider heads defines it before it includes a kernel. */
#ifndef VD_HEAD_WIDTH
#define VD_HEAD_WIDTH 64
#endif
/* Panels of 64 columns of an operand [64, d_head], and its elements; accumulators [64, d_head] of a lane, in fours;
 * left operands of 16 columns. Operands of heads of 64 leave shared memory for two blocks on a multiprocessor. */
enum {
  VD_PANEL = VD_TILE * 64,
  VD_PANELS = (VD_HEAD_WIDTH + 63) / 64,
  VD_OPERAND = VD_PANELS * VD_PANEL,
  VD_SUMS = VD_HEAD_WIDTH / 8,
  VD_LEFTS = VD_HEAD_WIDTH / 16,
  VD_BLOCKS = VD_HEAD_WIDTH == 64 ? 2 : 1,
  VD_TILE_BYTES = VD_PANEL * 2
};

/* Starts c [64, d_head] = a b, or += where `add`. Asynchronous. a is a panel [64, 64] (A: contracted over its columns
 * or its rows), b is [64, d_head], MN-major: contracted over its rows. */
template <typename T, int A> VD_DEV void vd_tile_product(float (*c)[4], const T *a, const T *b, bool add) {
  vd_wgmma_k64_ss<T, VD_HEAD_WIDTH, A, VD_MN_MAJOR>(c, vd_smem_descriptor(a),
                                                    vd_smem_descriptor(b, VD_PANELS == 1 ? 16 : 2 * VD_PANEL), add);
}
/* The same with the left operand in the registers of the warpgroup: [64, 64], or for a K-major b, which is contracted
 * over its columns, [64, d_head]; c is then [64, 64]. */
template <typename T, int B>
VD_DEV void vd_tile_product_rs(float (*c)[4], const vd_frag_a<T> *a, const T *b, bool add) {
  if constexpr (B == VD_K_MAJOR && VD_PANELS == 1) {
    vd_wgmma_k64_rs<T, 64, B>(c, a, vd_smem_descriptor(b), add);
  } else if constexpr (B == VD_K_MAJOR) {
#pragma unroll
    for (int k = 0; k < VD_LEFTS; k++)
      vd_wgmma_rs<T, 64, B>(c, a[k], vd_smem_descriptor(b + k / 4 * VD_PANEL) + k % 4 * B, add || k > 0);
  } else {
    vd_wgmma_k64_rs<T, VD_HEAD_WIDTH, B>(c, a, vd_smem_descriptor(b, VD_PANELS == 1 ? 16 : 2 * VD_PANEL), add);
  }
}

/* This warp's 16 rows of an operand [64, d_head] as left operands. */
template <typename T> VD_DEV void vd_load_lefts(const T *tile, vd_frag_a<T> left[VD_LEFTS]) {
#pragma unroll
  for (int k = 0; k < VD_LEFTS; k++)
    vd_load_a<T, 64>(left[k], tile + k / 4 * VD_PANEL, 16 * (int)(threadIdx.x >> 5), k % 4 * 16);
}

/* The biases u and v of relative keys (struct vd_attention in src/ops/ops.h) of a head, in shared memory; zeros beyond
 * it, or without biases. */
typedef struct vd_biases {
  float u[VD_TILE], v[VD_TILE];
} vd_biases;
/* Starts their copies. All threads of a warpgroup call it. */
VD_DEV void vd_copy_biases(const vd_cuda_attention &a, int head, vd_biases *to) {
  const int thread = (int)threadIdx.x & 127, column = thread & 63;
  const float *from = thread < VD_TILE ? a.content_bias : a.position_bias;
  const bool valid = from && column < a.d_head;
  vd_cp_async4((float *)to + thread, valid ? from + head * a.d_head + column : (const float *)a.schedule, valid);
}
/* Adds a bias to left operands. */
template <typename T>
VD_DEV void vd_add_bias(const vd_frag_a<T> queries[VD_LEFTS], const float *bias, vd_frag_a<T> sum[VD_LEFTS]) {
#pragma unroll
  for (int i = 0; i < 2 * VD_LEFTS; i++) {
    const float2 x = *(const float2 *)(bias + 8 * i + 2 * ((int)threadIdx.x & 3));
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      const float2 q = vd_unpack(queries[i >> 1].x[2 * (i & 1) + ih], T());
      sum[i >> 1].x[2 * (i & 1) + ih] = vd_pack(q.x + x.x, q.y + x.y, T());
    }
  }
}
/* Queries with u added, for keys, and with v, for position keys. */
template <typename T>
VD_DEV void vd_add_biases(const vd_biases *biases, vd_frag_a<T> queries[VD_LEFTS], vd_frag_a<T> positions[VD_LEFTS]) {
  vd_add_bias(queries, biases->v, positions);
  vd_add_bias(queries, biases->u, queries);
}

/* vd_copy_tile to an operand [64, d_head]. */
template <typename T>
VD_DEV void vd_copy_operand(T *tile, const T *matrix, int stride, int first, int lowest, int end, int width) {
  vd_copy_tile<T, 64>(tile, matrix, stride, first, lowest, end, width);
  if constexpr (VD_HEAD_WIDTH > 64) {
    constexpr int step = VD_WARPGROUP / 4; /* four chunks of 8 columns are left of a row */
    int thread = (int)threadIdx.x & 127, across = stride;
    asm volatile("" : "+r"(thread), "+r"(across)); /* as in vd_copy_tile() */
    const int row = thread / 4, column = 64 + thread % 4 * 8;
    const unsigned above = (unsigned)(first + row - lowest), rows = column < width ? (unsigned)(end - lowest) : 0;
    const T *from = matrix + ((first + row) * across + column);
#pragma unroll
    for (int i = 0; i < VD_TILE / step; i++, from += step * across)
      vd_cp_async16(tile + VD_PANEL + vd_swizzled_chunk<T, 64>(row + i * step, thread % 4), from,
                    above + (unsigned)(i * step) < rows);
  }
}
/* vd_copy_position_keys to an operand [64, d_head], without bias scores. */
template <typename T> VD_DEV void vd_copy_positions(T *tile, const vd_position_keys<T> &p, int e0, int width) {
  vd_copy_operand(tile, p.row0, p.stride, e0, p.lowest, p.end, width);
}

/* Zeros accumulators. */
template <int N> VD_DEV void vd_clear_sums(float (&c)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) c[i >> 2][i & 3] = 0;
}
/* A 64 x 64 result as left operand. */
template <typename T> VD_DEV void vd_results_to_a(vd_frag_a<T> a[4], const float c[8][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) vd_result_to_a(a[i], c + 2 * i);
}

/* Threads of a warp-specialized block, and its named barriers (above). */
enum { VD_SPECIALIZED_THREADS = 2 * VD_WARPGROUP };
enum { VD_TILE_FULL = 2, VD_TILE_EMPTY, VD_PRODUCER = 5 }; /* 1 is vd_consumer_sync(); a second consumer has 2 */
/* Waits at a named barrier of both warpgroups. */
template <int BARRIER> VD_DEV void vd_barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"((int)VD_SPECIALIZED_THREADS) : "memory");
}
/* Arrives there without waiting. */
template <int BARRIER> VD_DEV void vd_barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(BARRIER), "n"((int)VD_SPECIALIZED_THREADS) : "memory");
}
/* The producer announces the next work tile, which it requested when it started one, with the last copies of the
 * current one: it writes `announced` before VD_TILE_FULL; then both warpgroups read it. */
VD_DEV void vd_producer_announce(int requested, int *announced) {
  if (threadIdx.x == VD_WARPGROUP) *announced = requested;
}
/* Barrier of the producer warpgroup. */
VD_DEV void vd_producer_sync() {
  asm volatile("bar.sync %0, 128;" ::"n"((int)VD_PRODUCER) : "memory");
}
VD_DEV int vd_announced_tile(const int *announced) {
  return __shfl_sync(0xffffffffU, *announced,
                     0); /* the shuffle tells the compiler that the value is uniform in the warp */
}

/* Registers move from the producer to the consumer warpgroup: 256 for a thread of each together. A block of two
 * warpgroups that is alone on its multiprocessor has enough. */
template <int N, bool MOVE = (VD_BLOCKS > 1)> VD_DEV void vd_setmaxnreg_inc() {
  if constexpr (MOVE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N, bool MOVE = (VD_BLOCKS > 1)> VD_DEV void vd_setmaxnreg_dec() {
  if constexpr (MOVE) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Two numbers in half precision. Position scores pass from the columns of e to the order of keys in that form, in the
 * forward and the dQ kernel: a score's position part (before division by sqrt(d_head)) has a relative error of at most
 * 2^-11. For a part of 80, 10 in the exponent, the weight changes by 0.5 %; rounding the weight to bf16 changes it by
 * 0.4 %. Beyond 65504 it saturates. */
VD_DEV uint32_t vd_half_pair(float x, float y) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}

/* Ring buffer of a warp's position scores (16 queries) in shared memory, written by columns of e and read in key
 * order: two 64-wide blocks of e, one of even and one of odd number, and the first 16 columns again after the last,
 * so that 32 columns from any multiple of 16 on are contiguous. The row stride avoids bank conflicts of the writes. */
enum { VD_RING_STRIDE = 152 };

/* Writes the scores of 64 columns, block number `block` of e. */
VD_DEV void vd_write_ring(__half *ring, int block, const float c[8][4]) {
  const int lane = threadIdx.x & 31, odd = block & 1; /* lane: of a row of the four 8 x 8 matrices of a store */
  const uint32_t to = vd_smem_address(ring + (lane & 15) * VD_RING_STRIDE + 64 * odd + 8 * (lane >> 4));
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = vd_half_pair(c[j + (i >> 1)][2 * (i & 1)], c[j + (i >> 1)][2 * (i & 1) + 1]);
    vd_stmatrix(to + 16 * j, x);
    if (j == 0 && !odd) vd_stmatrix(to + 256, x);
  }
}
/* Position scores of the block of e before a split's first key tile, or with relative keys before the first of all:
 * block number `block`, to the ring. */
template <typename T>
VD_DEV void vd_write_positions(const vd_frag_a<T> queries[VD_LEFTS], const T *table, __half *ring, int block) {
  float position[8][4];
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_K_MAJOR>(position, queries, table, false);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(ring, block, position);
}
/* s += position scores of 16 keys. unit: the 16-wide block of e that is the keys' block 0 (common.cuh). */
VD_DEV void vd_add_ring(float s[2][4], const __half *ring, int unit) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const __half *from = ring + g * (VD_RING_STRIDE - 1) + 16 + 2 * t + (unit & 7) * 16;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, ih = i >> 1 & 1, jj = i & 1;
    s[jn][2 * ih + jj] += (float)from[ih * 8 * (VD_RING_STRIDE - 1) + 8 * jn + jj];
  }
}

/* Ends the products of a tile's scores: position scores, which were started first, go to this warp's ring buffer as
 * block `block` of e, and s is complete. One group of products, s among them, was started after the position scores. */
VD_DEV void vd_end_scores(__half *ring, int block, float position[8][4], float s[8][4]) {
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(ring, block, position);
  __syncwarp();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(s);
}

/* A work tile of the forward and dQ kernels: 64 queries. Key tile t needs blocks t and t + 1 of the table; block y
 * begins with e = first_block + 64 y. Block 0 is beyond a span's reach (with relative keys it may be within), and
 * block n has distances <= 0: scores from those entries are masked. The first `far` key tiles are beyond the head's own
 * span: every mask there is 0.
 *
 * A split has some of these key tiles; n, start and first_block are then its own. The block of e before its first key
 * tile is also the last of the split before it, so that both multiply its position scores: such a split has a `lead`, a
 * iteration t = 0 for them alone, without keys and values. `left` counts key tiles from t = 0 to the query tile's own.
 *
 * The score tile of the query tile and key tile t is number score_tile - t (vd_first_score_tile). In that order lie the
 * tiles of the stored dropout mask: the words of 128 threads as vd_draw_dropout_mask() makes them. */
typedef struct vd_query_work {
  vd_work_tile at;
  vd_band band;
  int i0, n, far, start, first_block; /* first query, key tiles, first key */
  int left, score_tile;
  bool lead;
  int n_split, split, slot; /* splits of the query tile; this one; the number of the first one */
} vd_query_work;
/* Whether query tiles can be split: not with relative keys, which all reach equally far, nor where trimmed. */
template <bool REL, bool TRIM> VD_DEV constexpr bool vd_can_split() {
  return !REL && !TRIM;
}
/* Number of work items of the forward and dQ kernels: query tiles, or their splits. */
template <bool REL, bool TRIM> VD_DEV int vd_query_items(const vd_cuda_attention &a, const vd_tile_schedule *schedule) {
  if constexpr (vd_can_split<REL, TRIM>()) return a.n_stream * schedule->split_first[a.n_head];
  return a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
}
/* The rest of a work tile whose place and split are set: as many key tiles as query tile `last` of its stream sees. */
template <bool REL, bool TRIM>
VD_DEV void vd_set_key_tiles(const vd_cuda_attention &a, const vd_tile_schedule *schedule, vd_query_work &w, int last) {
  w.band = vd_band_of<REL>(a, schedule, w.at.head);
  w.i0 = w.at.tile * VD_TILE, w.n = w.left = vd_key_tiles<REL>(w.band, last), w.lead = false;
  w.start = w.i0 - (w.n - 1) * VD_TILE;
  w.far = REL ? 0 : w.n - 1 - vd_ceil_div(w.band.own, VD_TILE);
  if constexpr (vd_can_split<REL, TRIM>()) {
    const int first = w.split * w.left / w.n_split, end = (w.split + 1) * w.left / w.n_split;
    w.lead = first > 0;
    const int begin = first - (w.lead ? 1 : 0);
    w.n = end - begin, w.left -= begin, w.start += begin * VD_TILE;
  }
  w.first_block = w.start - w.i0 - VD_TILE;
  w.score_tile = vd_first_score_tile<REL>(a, schedule, w.band, w.at.head, w.at.stream) +
                 w.at.tile * vd_tile_distances(w.band) + w.left - 1;
}
template <bool REL, bool TRIM>
VD_DEV vd_query_work vd_query_work_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int item) {
  vd_query_work w;
  w.n_split = 1, w.split = 0, w.slot = item;
  if constexpr (vd_can_split<REL, TRIM>()) {
    const int rank = vd_rank_of(schedule->split_first, a.n_head, a.n_stream, item),
              n_tile = vd_ceil_div(a.block, VD_TILE);
    w.n_split = schedule->n_split[rank];
    const int rest = item - a.n_stream * schedule->split_first[rank], tile = rest / w.n_split;
    w.split = rest - tile * w.n_split, w.slot = item - w.split;
    w.at = {schedule->head[rank], tile / n_tile, tile % n_tile};
  } else {
    w.at = vd_query_tile_at<REL>(a, schedule, item);
  }
  vd_set_key_tiles<REL, TRIM>(a, schedule, w, w.at.tile);
  return w;
}
/* Whether the head sees all pairs of 16 queries from i0 on and 64 keys from kappa0 on, in a far tile. */
VD_DEV bool vd_far_row_seen(const vd_band &b, int i0, int kappa0) {
  return vd_seen(b, i0 + 15 - kappa0) && vd_seen(b, i0 - kappa0 - 63);
}

/* The dropout mask of 16 queries from i0 on and 64 keys from kappa0 on, 32 bits a lane, 1 = kept: element jj of row
 * half ih and column half jn of sub-tile j is bit 7 - 2 j - jn of byte 2 ih + jj, so that a left shift brings the
 * bits of two adjacent pairs to the sign bits of bytes. */
VD_DEV int vd_mask_bit(int j, int jn, int k) {
  return 8 * k + 7 - 2 * j - jn;
}
VD_DEV uint32_t vd_draw_dropout_mask(const vd_dropout_draws &drop, int i0, int kappa0) {
  uint32_t bits[2] = {0, 0}; /* of a row half: elements 0 from bit 0 on, 1 from bit 16 on */
  vd_philox_words words[4];
  vd_draw_calls<4>(drop.keys, vd_dropout_call(drop, i0, kappa0), 32, words);
#pragma unroll
  for (int i = 0; i < 16; i++)
    bits[i >> 1 & 1] = 2 * bits[i >> 1 & 1] + vd_kept_halves(words[i >> 2].v[i & 3], drop.threshold);
  return __byte_perm(bits[0], bits[1], 0x6420);
}

/* Whether 16 queries from i0 on see all of 64 keys from kappa0 on with mask 1. */
template <bool REL> VD_DEV bool vd_row_full(const vd_band &b, int i0, int kappa0) {
  return vd_all_full<REL>(b, i0 - kappa0, kappa0) && vd_all_full<REL>(b, i0 - kappa0 - 48, kappa0);
}

/* The gradient of a score whose mask is 1: p is its weight times dropout's scale, dp the gradient of the weight; delta
 * is divided by scale. */
VD_DEV float vd_kept_gradient(float p, bool keep, float dp, float delta) {
  return fmaf(keep ? p : 0, dp, -p * delta);
}

/* Masks of a partly seen 16 x 16 sub-tile; `scale` is that of the weights, which the ramp bounds. `nearer`: distance of
 * the sub-tile's corner less that of the element. */
typedef struct vd_masks {
  float least, fraction, factor, ramp; /* the mask is (least + nearer + fraction) factor in 0..1 */
  unsigned x, seen;                    /* distance of the corner - first; number of distances - 1 */
  unsigned moving, moves;              /* the mask depends on the span where moving + nearer < moves */
} vd_masks;
VD_DEV vd_masks vd_masks_of(const vd_band &b, int x, float scale = 1) {
  int u = b.whole - x + 1 + b.ramp;
  vd_masks m = {(float)u, b.fraction, b.inverse_ramp, (float)b.ramp * scale, (unsigned)(x - b.first)};
  m.seen = (unsigned)(b.reach - b.first);
  m.moving = (unsigned)u, m.moves = (unsigned)b.ramp + (b.fraction == 0 ? 1U : 0U);
  return m;
}
VD_DEV bool vd_masks_seen(const vd_masks &m, int nearer) {
  return m.x - (unsigned)nearer <= m.seen;
}
VD_DEV float vd_masks_at(const vd_masks &m, int nearer) {
  return __saturatef((m.least + (float)nearer + m.fraction) * m.factor);
}
/* vd_score_gradient of adaptive span for a partly seen sub-tile. s includes the shift, dp is 0 where dropped: as in
 * vd_kept_gradient. weight: before dropout; where trimmed, before the mask, too. */
template <bool TRIM>
VD_DEV float vd_masked_gradient(const vd_masks &m, int nearer, float s, float dp, float delta, float *weight,
                                float *dspan) {
  float p = vd_masks_seen(m, nearer) ? vd_exp2(s) : 0, mask = vd_masks_at(m, nearer);
  p = !TRIM && mask == 0 ? fminf(p, m.ramp) : p;
  const float masked = p * mask, own = TRIM ? 0 : p * delta;
  *dspan += m.moving + (unsigned)nearer < m.moves ? fmaf(p, dp, -own) : 0;
  *weight = TRIM ? p : masked;
  return fmaf(masked, dp, -*weight * delta);
}
#endif
