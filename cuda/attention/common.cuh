/* Shared by all attention kernels: the tile scheduler's work list, each head's band, strided views of the operands,
 * the skew of position scores, dropout, persistent launches.
 *
 * Query i and key kappa are counted from the block's first token (keys in memory are negative), so that the distance
 * is x = i - kappa, and a position score depends on e = kappa - i = -x, row attn_span + e of the key table. Tiles
 * are 64 x 64 and start at multiples of 64; a warp works on sub-tiles of 16 x 16. In a sub-tile e takes 31 values,
 * which two adjacent 16-wide blocks of e cover. Column c of row r is column c - r of block 1 where c >= r and column
 * c - r + 16 of block 0 elsewhere; both are column (c - r) mod 16. Rotating row r by r columns, one shuffle per
 * element, therefore brings position scores to key order ("skew"), and the inverse rotation brings gradients back to
 * columns of e ("unskew"). */
#ifndef VD_ATTENTION_CUH
#define VD_ATTENTION_CUH

#include "cuda/attention/launch.cuh"
#include "cuda/kernels/mma.cuh"
#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/philox.cuh"

enum { VD_WORK_FORWARD, VD_WORK_DQ, VD_WORK_DKV, VD_WORK_KINDS };

/* The band of a head: queries see distances first .. reach, those up to `full` with mask 1 and those beyond `own` with
 * mask 0: `own` is less than the reach only where trimmed, and values are not needed beyond. The soft mask is (u + ramp
 * + fraction) / ramp clamped to 0..1, u = whole - (x - 1), where whole + fraction = z * attn_span. */
typedef struct vd_band {
  int reach, own, first, full, whole, ramp;
  float fraction, inverse_ramp;
  int oldest; /* with relative keys: the first key that exists */
} vd_band;

/* Key tiles of a block of the dK/dV kernel (bwd_dkv_wgmma.cu). */
enum { VD_DKV_TILES = 2 };

/* Where few query tiles reach far, their key tiles are shared out over several blocks, each with a split of them
 * (split-KV, as in Flash-Decoding). VD_SPLIT_SLOTS: partial sums that a->splits holds. */
enum { VD_MAX_SPLITS = 16, VD_SPLIT_SLOTS = 256 };

/* A layer's schedule, in device memory: bands, the order of the heads, and the counters from which persistent blocks
 * take tiles. All counters are zero between kernels. */
enum { VD_MAX_SM = 256 };
typedef struct vd_tile_schedule {
  int sm_blocks[VD_MAX_SM]; /* blocks seen on each multiprocessor; see first_tile() in fwd_wgmma.cu */
  int next[VD_WORK_KINDS], done[VD_WORK_KINDS], next_rest;
  int head[VD_CUDA_MAX_HEADS]; /* heads by decreasing reach, then own span */
  /* Of the head of this rank, for one stream; last: the number of all heads. With n streams a head has n times as many,
   * from n times that number on. */
  int key_tile_first[VD_CUDA_MAX_HEADS + 1];   /* key tiles */
  int dkv_first[VD_CUDA_MAX_HEADS + 1];        /* work items of the dK/dV kernel, VD_DKV_TILES key tiles each */
  int split_first[VD_CUDA_MAX_HEADS + 1];      /* splits of query tiles */
  int n_split[VD_CUDA_MAX_HEADS];              /* splits of a query tile of the head of this rank */
  int first_score_tile[VD_CUDA_MAX_HEADS + 1]; /* of head h: vd_tile_distances() of the heads before it; last: of all */
  int arrived[VD_SPLIT_SLOTS];     /* splits of a query tile that are done, at the number of its first split */
  vd_band band[VD_CUDA_MAX_HEADS]; /* of head h */
} vd_tile_schedule;

/* a / b, rounded up. */
static inline __host__ __device__ int vd_ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

/* Barrier of a consumer warpgroup (named barrier 1 + its number). */
VD_DEV void vd_consumer_sync(int consumer = 0) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
}

/* Dynamic tile scheduling: a block starts with the tile of its own number and requests the next one from a counter
 * while it works, which hides the latency of the atomic. All threads call this at the start of a tile. */
VD_DEV int vd_request_tile(vd_tile_schedule *schedule, int kind) {
  return threadIdx.x == 0 ? (int)gridDim.x + atomicAdd(&schedule->next[kind], 1) : 0;
}
/* The tile that was requested. Barrier: all warps have finished the previous tile. */
VD_DEV int vd_receive_tile(int requested, int *shared) {
  if (threadIdx.x == 0) *shared = requested;
  __syncthreads();
  return *shared;
}
/* The last block without work resets the counters for the next kernel. Every block calls it once, having made one
 * request for each tile that it worked on. */
VD_DEV void vd_finish_work(vd_tile_schedule *schedule, int kind) {
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&schedule->done[kind], 1) == (int)gridDim.x - 1) schedule->next[kind] = schedule->done[kind] = 0;
  }
}

/* Position of a query tile or a key tile in the layer. */
typedef struct vd_work_tile {
  int head, stream, tile;
} vd_work_tile;

/* The rank of the head whose work items number `item` is among; `first` [n + 1] has the first item of each rank for one
 * stream. All lanes of a warp call it. */
VD_DEV int vd_rank_of(const int *first, int n, int n_stream, int item) {
  int rank = 0;
  for (int i = (int)threadIdx.x & 31; __any_sync(0xffffffffU, i < n); i += 32)
    rank += __popc(__ballot_sync(0xffffffffU, i < n && item >= n_stream * first[i + 1]));
  return rank;
}

/* The query tile of a number. REL, here and below: relative keys in place of spans, where all heads have the same
 * reach; the heads of a stream are then adjacent, which spreads the atomics on drel_key, and the longest tiles come
 * first. */
template <bool REL>
VD_DEV vd_work_tile vd_query_tile_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int tile_id) {
  int n_tile = vd_ceil_div(a.block, VD_TILE), per_head = a.n_stream * n_tile;
  if constexpr (REL) {
    int row = tile_id / n_tile;
    vd_work_tile at = {row % a.n_head, row / a.n_head, n_tile - 1 - tile_id % n_tile};
    return at;
  }
  int rest = tile_id % per_head;
  vd_work_tile at = {schedule->head[tile_id / per_head], rest / n_tile, rest % n_tile};
  return at;
}

/* The band of a head. */
template <bool REL> VD_DEV vd_band vd_band_of(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int head) {
  if constexpr (REL) {
    vd_band b = {};
    b.reach = b.own = b.full = a.reach, b.oldest = -a.window;
    return b;
  }
  return schedule->band[head];
}
/* The first key that the head sees. */
template <bool REL> VD_DEV int vd_lowest(const vd_band &b) {
  return REL ? max(-b.reach, b.oldest) : -b.reach;
}
/* The first key whose value the head needs. */
template <bool REL> VD_DEV int vd_lowest_value(const vd_band &b) {
  return REL ? vd_lowest<REL>(b) : -b.own;
}
/* Number of key tiles that a query tile sees, its own included. */
template <bool REL> VD_DEV int vd_key_tiles(const vd_band &b, int query_tile) {
  int far = vd_ceil_div(b.reach, VD_TILE);
  return (REL ? min(far, query_tile + vd_ceil_div(-b.oldest, VD_TILE)) : far) + 1;
}

/* Distances of tiles, from a query tile back to a key tile, that a head sees. */
VD_DEV int vd_tile_distances(const vd_band &b) {
  return vd_ceil_div(b.reach, VD_TILE) + 1;
}
/* A score tile is that of a query tile and a key tile within the head's reach. Arrays with an element for each are in
 * the order of streams, heads, query tiles and distances: the number of the score tile of a head's first query tile and
 * the key tile at its own place. */
template <bool REL>
VD_DEV int vd_first_score_tile(const vd_cuda_attention &a, const vd_tile_schedule *schedule, const vd_band &band,
                               int head, int stream) {
  const int n_tile = vd_ceil_div(a.block, VD_TILE), all = a.n_head * vd_tile_distances(band);
  if constexpr (REL) return n_tile * (stream * all + head * vd_tile_distances(band));
  return n_tile * (stream * schedule->first_score_tile[a.n_head] + schedule->first_score_tile[head]);
}

/* View of one head and stream: row r begins at row0 + r * stride. */
template <typename T> struct vd_row_view {
  T *row0;
  int stride;
};
/* The parts of a row of the block. */
enum vd_part { VD_QUERY, VD_KEY, VD_VALUE };
/* Width of the heads together. */
VD_DEV int vd_width(const vd_cuda_attention &a) {
  return a.n_head * a.d_head;
}
/* View of an array [n_stream * block, width], such as out or dout. */
template <typename T> VD_DEV vd_row_view<T> vd_output_rows(const vd_cuda_attention &a, T *x, int head, int stream) {
  vd_row_view<T> l = {x + (int64_t)stream * a.block * vd_width(a) + head * a.d_head, vd_width(a)};
  return l;
}
template <typename T>
VD_DEV vd_row_view<T> vd_block_rows(const vd_cuda_attention &a, T *block, vd_part part, int head, int stream) {
  int width = vd_width(a);
  vd_row_view<T> l = {block + ((int64_t)stream * a.block * 3 + part) * width + head * a.d_head, 3 * width};
  return l;
}
/* View of keys and values of the block and of the memory before it (rows < 0); values follow keys after `width`. */
template <typename T> struct vd_kv_view {
  T *block, *memory;
  int width;
  /* Keys or values of the tile from row kappa0 on; a tile lies wholly in the block or in the memory. */
  VD_DEV vd_row_view<T> at(int kappa0, vd_part part) const {
    vd_row_view<T> l = {(kappa0 >= 0 ? block : memory) + (part - VD_KEY) * width, kappa0 >= 0 ? 3 * width : 2 * width};
    return l;
  }
};
template <typename T>
VD_DEV vd_kv_view<T> vd_kv_view_of(const vd_cuda_attention &a, T *block, T *memory, int head, int stream) {
  int width = vd_width(a);
  vd_kv_view<T> k = {vd_block_rows(a, block, VD_KEY, head, stream).row0,
                     memory + ((int64_t)stream * a.kv_rows + a.window) * 2 * width + head * a.d_head, width};
  return k;
}

/* Starts the copies of a tile of keys and of values, rows kappa0 .. kappa0 + 63, to shared memory; zeros for what the
 * head does not need. */
template <typename T, int D, bool REL>
VD_DEV void vd_copy_kv_tile(T *k, T *v, const vd_cuda_attention &a, const vd_kv_view<const T> &from, int kappa0,
                            const vd_band &band) {
  const vd_row_view<const T> keys = from.at(kappa0, VD_KEY), values = from.at(kappa0, VD_VALUE);
  vd_copy_tile<T, D>(k, keys.row0, keys.stride, kappa0, vd_lowest<REL>(band), a.block, a.d_head);
  vd_copy_tile<T, D>(v, values.row0, values.stride, kappa0, vd_lowest_value<REL>(band), a.block, a.d_head);
}

/* The soft mask at distance x. */
VD_DEV float vd_mask(const vd_band &b, int x) {
  return __saturatef(((float)(b.whole - x + 1 + b.ramp) + b.fraction) * b.inverse_ramp);
}
/* Whether the mask depends on the span at x: the unclamped mask is in 0..1, both ends included. */
VD_DEV bool vd_mask_moves(const vd_band &b, int x) {
  int u = b.whole - x + 1;
  return u + b.ramp >= 0 && (u < 0 || (u == 0 && b.fraction == 0));
}
/* Whether the head sees distance x. */
VD_DEV bool vd_seen(const vd_band &b, int x) {
  return x >= b.first && x <= b.reach;
}
/* Whether a query of a 16 x 16 sub-tile sees a key of it (any_seen), and whether all pairs are seen with mask 1
 * (all_full). x0: distance of query 0 and key kappa0 of the sub-tile. */
template <bool REL> VD_DEV bool vd_any_seen(const vd_band &b, int x0, int kappa0) {
  return x0 + 15 >= b.first && x0 - 15 <= b.reach && (!REL || kappa0 + 15 >= b.oldest);
}
template <bool REL> VD_DEV bool vd_all_full(const vd_band &b, int x0, int kappa0) {
  return x0 - 15 >= b.first && x0 + 15 <= b.full && (!REL || kappa0 >= b.oldest);
}

/* A head's position keys: row e = -distance, lowest <= e < end. */
template <typename T> struct vd_position_keys {
  const T *row0;
  int stride, lowest, end;
  const float *score; /* mma kernels with relative keys: (v - u).r(x) at x = -e */
};
template <bool REL, typename T>
VD_DEV vd_position_keys<T> vd_position_keys_of(const vd_cuda_attention &a, const void *table, int head) {
  if constexpr (REL) {
    vd_position_keys<T> p = {(const T *)a.rel_key + head * a.d_head, -(int)a.rel_stride, -a.reach, 1, nullptr};
    if (a.bias_scores) p.score = a.bias_scores + (int64_t)head * (a.reach + 1);
    return p;
  }
  vd_position_keys<T> p = {(const T *)table + (int64_t)a.attn_span * a.d_head, a.d_head, -a.attn_span, 0, nullptr};
  return p;
}
/* Starts the copies of position keys e0 .. e0 + 63 and of their bias scores. */
template <typename T, int D, bool REL>
VD_DEV void vd_copy_position_keys(T *tile, float *score, const vd_position_keys<T> &p, int e0, int width) {
  vd_copy_tile<T, D>(tile, p.row0, p.stride, e0, p.lowest, p.end, width);
  int i = (int)threadIdx.x & 127;
  if (REL && i < VD_TILE) {
    bool valid = e0 + i >= p.lowest && e0 + i < p.end;
    vd_cp_async4(score + i, valid ? p.score - e0 - i : p.score, valid);
  }
}
/* Initial accumulators of (queries + u) x (position keys)^T: zero, or with relative keys (v - u).r(x), so that the
 * result is that of queries + v. */
template <bool REL> VD_DEV void vd_init_position_scores(float c[2][4], const float *score) {
  vd_clear(c);
  if constexpr (REL) {
#pragma unroll
    for (int jn = 0; jn < 2; jn++) {
      float2 x = *(const float2 *)(score + 8 * jn + 2 * (threadIdx.x & 3));
      c[jn][0] = c[jn][2] = x.x, c[jn][1] = c[jn][3] = x.y;
    }
  }
}

/* Row of block `unit` in a ring buffer of `ring` 16-row blocks; 0 <= unit < 2 ring. */
VD_DEV int vd_ring_row(int unit, int ring) {
  return (unit >= ring ? unit - ring : unit) * 16;
}

/* Skew: position scores of 16 queries (rows) by columns of e, in blocks 0 and 1, to key order. */
VD_DEV void vd_skew(float out[2][4], const float block0[2][4], const float block1[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, odd = g & 1;
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float v[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int jn = i >> 1, jj = i & 1;
      v[jn][jj] = 8 * jn + 2 * t + jj + g + 8 * ih >= 16 ? block0[jn][2 * ih + jj] : block1[jn][2 * ih + jj];
    }
#pragma unroll
    for (int jj = 0; jj < 2; jj++) {
      float u0 = odd ? v[0][1 - jj] : v[0][jj], u1 = odd ? v[1][1 - jj] : v[1][jj];
      bool swap = (((2 * t + (jj ^ odd) + g) >> 3) + ih) & 1;
      int from = (g << 2) | ((t - ((g + 1 - jj) >> 1)) & 3);
      out[0][2 * ih + jj] = __shfl_sync(0xffffffffU, swap ? u1 : u0, from);
      out[1][2 * ih + jj] = __shfl_sync(0xffffffffU, swap ? u0 : u1, from);
    }
  }
}

/* Unskew: key order to columns (c - r) mod 16. */
VD_DEV void vd_unskew(float out[2][4], const float in[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, odd = g & 1;
#pragma unroll
  for (int ih = 0; ih < 2; ih++)
#pragma unroll
    for (int jj = 0; jj < 2; jj++) {
      float u0 = odd ? in[0][2 * ih + 1 - jj] : in[0][2 * ih + jj];
      float u1 = odd ? in[1][2 * ih + 1 - jj] : in[1][2 * ih + jj];
      bool swap = ((2 * t + (jj ^ odd) < g ? 1 : 0) + ih) & 1;
      int from = (g << 2) | ((t + ((g + jj) >> 1)) & 3);
      out[0][2 * ih + jj] = __shfl_sync(0xffffffffU, swap ? u1 : u0, from);
      out[1][2 * ih + jj] = __shfl_sync(0xffffffffU, swap ? u0 : u1, from);
    }
}
/* A block of e from unskewed gradients: those of key sub-tile k - 1 where column + row < 16, of sub-tile k
 * elsewhere. */
VD_DEV void vd_join(float out[2][4], const float before[2][4], const float here[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, k = i & 3;
    out[jn][k] = 8 * jn + 2 * t + (k & 1) + g + 8 * (k >> 1) >= 16 ? here[jn][k] : before[jn][k];
  }
}

/* Skew of scores with keys as rows: block0 and block1 have rows e and columns i; out has rows kappa. */
VD_DEV void vd_skew_keys(float out[2][4], const float block0[2][4], const float block1[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int jn = i >> 1, jj = i & 1, column = 8 * jn + 2 * t + jj;
    float u0 = g + column >= 16 ? block0[jn][jj] : block1[jn][jj];
    float u1 = g + 8 + column >= 16 ? block0[jn][2 + jj] : block1[jn][2 + jj];
    bool swap = (((g + 2 * t + jj) >> 3) + jn) & 1;
    int from = (((g - 2 * t - jj) & 7) << 2) | t;
    out[jn][jj] = __shfl_sync(0xffffffffU, swap ? u1 : u0, from);
    out[jn][2 + jj] = __shfl_sync(0xffffffffU, swap ? u0 : u1, from);
  }
}

/* Dropout of one head and stream (src/base/random.h numbers the draws). */
typedef struct vd_dropout_draws {
  uint32_t threshold; /* 0: off */
  float scale;
  int tiles, offset; /* sub-tiles of a row of queries; sub-tiles before the block */
  uint64_t tile0;    /* number of the head's first sub-tile */
  vd_philox_keys keys;
} vd_dropout_draws;

/* Not collective. Dropout of a layer, before vd_seek_dropout() chooses the head. */
static inline vd_dropout_draws vd_make_dropout_draws(const vd_cuda_attention *a) {
  vd_dropout_draws d;
  d.threshold = vd_dropout_threshold(a->dropout);
  d.scale = (float)vd_dropout_scale(d.threshold);
  d.offset = (a->attn_span + 15) / 16;
  d.tiles = d.offset + (a->block + 15) / 16;
  d.tile0 = 0;
  d.keys = vd_make_philox_keys(a->rng);
  return d;
}
/* Chooses the head and stream. */
VD_DEV void vd_seek_dropout(vd_dropout_draws *d, const vd_cuda_attention &a, int head, int stream) {
  int query = d->tiles - d->offset;
  d->tile0 = ((uint64_t)(a.row0 + stream) * (uint64_t)a.n_head + (uint64_t)head) * (uint64_t)(query * d->tiles);
}
/* This lane's Philox call for the sub-tile of queries i0.. and keys kappa0..; for the next 16 keys it is 32 more. */
VD_DEV uint64_t vd_dropout_call(const vd_dropout_draws &d, int i0, int kappa0) {
  const uint64_t tile = d.tile0 + (uint64_t)((i0 >> 4) * d.tiles + (kappa0 >> 4) + d.offset);
  return tile * 32 + (threadIdx.x & 31);
}
/* The four words of that call. */
VD_DEV vd_philox_words vd_dropout_words(const vd_dropout_draws &d, int i0, int kappa0) {
  return vd_draw_words(d.keys, vd_dropout_call(d, i0, kappa0));
}
/* Whether dropout keeps element [jn][2 ih + jj]; k = 2 ih + jj. */
VD_DEV bool vd_dropout_keeps(const vd_philox_words &words, uint32_t threshold, int jn, int k) {
  uint32_t w = words.v[jn + (k & 2)];
  return (k & 1) ? w >= (threshold << 16) : (w << 16) >= (threshold << 16);
}

/* 2^x. */
VD_DEV float vd_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* Maximum and sum over the four lanes of a quad, which share rows of a result. */
VD_DEV float vd_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}
VD_DEV float vd_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

/* Writes a warp's 16 x D accumulators, times factor (of rows g and g + 8), to rows first.., only rows lowest .. end
 * - 1. */
template <typename T, int D>
VD_DEV void vd_write_rows(T *matrix, int stride, int first, int lowest, int end, int width, float sum[D / 8][4],
                          const float *factor) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int row = first + g + 8 * ih;
    if (row < lowest || row >= end) continue;
    T *to = matrix + (int64_t)row * stride;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      int column = 8 * n + 2 * t;
      float x = sum[n][2 * ih] * factor[ih], y = sum[n][2 * ih + 1] * factor[ih];
      if (column >= width) continue;
      if constexpr (sizeof(T) == 4) {
        *(float2 *)(to + column) = make_float2(x, y);
      } else {
        *(uint32_t *)(to + column) = vd_pack(x, y, T());
      }
    }
  }
}

/* Adds the content bias u to a warp's 16 queries in shared memory; rows beyond the block stay zero. */
template <typename T, int D> VD_DEV void vd_add_content_bias(const vd_cuda_attention &a, T *tile, int head, int iw) {
  constexpr int per_chunk = 16 / (int)sizeof(T), chunks = D / per_chunk;
  const float *u = a.content_bias + head * a.d_head;
  int row0 = (threadIdx.x >> 5) * 16;
#pragma unroll
  for (int i = 0; i < 16 * chunks / 32; i++) {
    int id = i * 32 + (int)(threadIdx.x & 31), row = id / chunks, chunk = id % chunks;
    if (iw + row >= a.block || chunk * per_chunk >= a.d_head) continue;
    T *at = tile + vd_swizzled_chunk<T, D>(row0 + row, chunk);
#pragma unroll
    for (int e = 0; e < per_chunk; e++) at[e] = (T)((float)at[e] + u[chunk * per_chunk + e]);
  }
  __syncwarp();
}

#endif
