/* The tile scheduler: a kernel derives each head's band and the work list from the spans on the device, so that the
 * host reads nothing back. Also the key table and its gradient, as transposes. */
#include "cuda/attention/common.cuh"

size_t vd_cuda_attention_schedule_size(void) {
  return sizeof(vd_tile_schedule);
}

size_t vd_cuda_attention_bias_scores_size(const vd_cuda_attention *a) {
  return a->rel_key && !vd_uses_wgmma(a) ? (size_t)a->n_head * ((size_t)a->reach + 1) * sizeof(float) : 0;
}

/* The layer's window for its current spans: vd_model_window of src/model/model.h. */
VD_DEV int window_of_spans(const vd_cuda_attention &a) {
  double widest = 0;
  for (int i = 0; i < a.n_span; i++) widest = fmax(widest, (double)a.span[i]);
  int current = min(a.attn_span, (int)ceil(fmin(widest, 1.0) * a.attn_span) + a.ramp);
  return a.attn_span - 64 * (min(a.attn_span - 1, a.attn_span - current) / 64);
}

VD_DEV vd_band make_band(const vd_cuda_attention &a, int head) {
  if (a.rel_key) {
    vd_band same = vd_band_of<true>(a, nullptr, head);
    same.reach = same.own = min(same.reach, a.window); /* limited to the memory, for the projection of memory */
    return same;
  }
  int window = a.bounds ? min(a.window, window_of_spans(a)) : a.window;
  double z = (double)a.span[a.n_span == 1 ? 0 : head] * a.attn_span;
  vd_band b;
  b.whole = (int)floor(z);
  b.fraction = (float)(z - b.whole);
  b.ramp = a.ramp;
  b.inverse_ramp = 1.0f / (float)a.ramp;
  b.first = a.first_distance;
  b.own = min(window, b.whole + a.ramp + 1);
  b.reach = a.trimmed ? window : b.own;
  b.full = min(b.reach, b.whole + (b.fraction > 0 ? 1 : 0)); /* where the derivative of the mask is 0 too */
  b.oldest = -a.window;
  return b;
}

/* Shortens the longest heads, by a tile of keys at a time, until a query tile sees at most a.key_tiles: arrays with an
 * element for each score tile have no room for more. A span that the host has not read yet may have grown that much
 * (vd_model_set_span_margin in src/model/model.h). */
VD_DEV void cut_reaches(const vd_cuda_attention &a, vd_band *band) {
  int total = 0;
  for (int h = 0; h < a.n_head; h++) total += vd_tile_distances(band[h]);
  for (; total > a.key_tiles; total--) {
    int longest = 0;
    for (int h = 1; h < a.n_head; h++)
      if (band[h].reach > band[longest].reach) longest = h;
    vd_band &b = band[longest];
    b.reach = (vd_tile_distances(b) - 2) * VD_TILE;
    b.own = min(b.own, b.reach), b.full = min(b.full, b.reach);
  }
}

/* Splits of each head's query tiles: none much longer than a block's fair share of the layer's key tiles, unless it is
 * so short that a split costs more than it saves (an iteration of its own, and the sums' way through memory). */
enum { LEAST_SPLIT = 4 };
VD_DEV void split_heads(const vd_cuda_attention &a, int n_block, vd_tile_schedule *schedule) {
  const int per_head = a.n_stream * vd_ceil_div(a.block, VD_TILE);
  auto key_tiles = [&](int head) { return vd_ceil_div(schedule->band[head].reach, VD_TILE) + 1; };
  int total = 0, slots = VD_SPLIT_SLOTS, first = 0; /* slots: of all streams */
  for (int h = 0; h < a.n_head; h++) total += per_head * key_tiles(h);
  const int share = max((int)LEAST_SPLIT, vd_ceil_div(total, a.d_head > 64 ? n_block / 2 : n_block));
  for (int rank = 0; rank < a.n_head; rank++) {
    int wanted = vd_ceil_div(4 * key_tiles(schedule->head[rank]), 5 * share);
    int n = a.splits && !a.trimmed && !a.rel_key ? max(1, min(min(wanted, (int)VD_MAX_SPLITS), slots / per_head)) : 1;
    if (n > 1) slots -= n * per_head;
    schedule->n_split[rank] = n, schedule->split_first[rank] = first;
    first += n * vd_ceil_div(a.block, VD_TILE);
  }
  schedule->split_first[a.n_head] = first;
}

/* Layers of one launch; more would exceed the 4 KiB of kernel arguments. */
enum { LAYERS_PER_LAUNCH = (4096 - 16) / sizeof(vd_cuda_attention) };
typedef struct schedule_layers {
  vd_cuda_attention at[LAYERS_PER_LAUNCH];
} schedule_layers;

/* One block a layer, one thread a head. */
__global__ void schedule_kernel(const __grid_constant__ schedule_layers layers, int n_block) {
  const vd_cuda_attention &a = layers.at[blockIdx.x];
  __shared__ int reach[VD_CUDA_MAX_HEADS], own[VD_CUDA_MAX_HEADS], head[VD_CUDA_MAX_HEADS];
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  int h = (int)threadIdx.x;
  if (h < a.n_head) schedule->band[h] = make_band(a, h);
  __syncthreads();
  if (h == 0 && a.key_tiles > 0 && !a.rel_key) cut_reaches(a, schedule->band);
  __syncthreads();
  if (h < a.n_head) reach[h] = schedule->band[h].reach, own[h] = schedule->band[h].own;
  __syncthreads();
  if (h < a.n_head) {
    int rank = 0;
    for (int i = 0; i < a.n_head; i++) {
      bool equal = reach[i] == reach[h] && own[i] == own[h];
      rank += reach[i] > reach[h] || (reach[i] == reach[h] && own[i] > own[h]) || (equal && i < h);
    }
    head[rank] = schedule->head[rank] = h;
  }
  __syncthreads();
  if (h == 0) {
    int first = 0, items = 0;
    for (int i = 0; i < a.n_head; i++) {
      const int tiles = vd_ceil_div(reach[head[i]], VD_TILE) + vd_ceil_div(a.block, VD_TILE);
      schedule->key_tile_first[i] = first, schedule->dkv_first[i] = items;
      first += tiles, items += vd_ceil_div(tiles, VD_DKV_TILES);
    }
    schedule->key_tile_first[a.n_head] = first, schedule->dkv_first[a.n_head] = items;
    int score_tiles = 0;
    for (int i = 0; i < a.n_head; i++) {
      schedule->first_score_tile[i] = score_tiles;
      score_tiles += vd_tile_distances(schedule->band[i]);
    }
    schedule->first_score_tile[a.n_head] = score_tiles;
    split_heads(a, n_block, schedule);
  }
}

/* Whether offsets within a stream's rows fit in the 32 bits that the kernels use. */
static bool offsets_fit(const vd_cuda_attention *a) {
  /* Two tiles more: of a pair of query tiles the second may lie beyond the block. */
  static_assert(VD_TILE == 64, "vd_cuda_max_window(), vd_cuda_max_block()");
  int64_t width = (int64_t)a->n_head * a->d_head, most = INT32_MAX, keys = a->rel_key ? a->reach : a->attn_span;
  return a->window <= vd_cuda_max_window(width) && a->block <= vd_cuda_max_block(width) &&
         (a->rel_key ? a->rel_stride : a->d_head) * (keys + VD_TILE) <= most;
}

/* Whether the kernels support these shapes: 16-byte chunks lie within one head's columns. */
static bool shapes_fit(const vd_cuda_attention *a) {
  if (a->n_head <= 0 || a->d_head <= 0 || !offsets_fit(a)) return false;
  int chunk = a->type == VD_FP32 ? 4 : 8;
  if (a->n_stream <= 0 || a->n_stream > VD_CUDA_MAX_STREAMS || a->block <= 0 || a->window < 0 ||
      a->n_head > VD_CUDA_MAX_HEADS || a->d_head > VD_CUDA_MAX_D_HEAD || a->d_head % chunk != 0 ||
      a->window > a->attn_span || a->kv_rows < a->window)
    return false;
  if (a->rel_key)
    return a->first_distance == 0 && a->rel_stride % chunk == 0 && a->reach >= 0 && a->reach < a->window + a->block &&
           (a->bias_scores || vd_uses_wgmma(a)) && !a->content_bias == !a->position_bias;
  /* A head sees a query tile's own keys and those before it. */
  if (a->key_tiles != 0 && a->key_tiles < 2 * a->n_head) return false;
  return a->window > 0 && a->ramp > 0 && a->first_distance > 0 && (a->n_span == 1 || a->n_span == a->n_head);
}

cudaError_t vd_cuda_attention_make_schedules(int32_t n, const vd_cuda_attention *a, cudaStream_t stream) {
  for (int32_t i = 0; i < n; i++)
    if (!shapes_fit(&a[i])) return cudaErrorInvalidValue;
  int device, n_sm;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (e != cudaSuccess) return e;
  for (int32_t first = 0; first < n; first += LAYERS_PER_LAUNCH) {
    schedule_layers layers = {};
    int32_t here = n - first < LAYERS_PER_LAUNCH ? n - first : LAYERS_PER_LAUNCH;
    for (int32_t i = 0; i < here; i++) layers.at[i] = a[first + i];
    schedule_kernel<<<(unsigned)here, VD_CUDA_MAX_HEADS, 0, stream>>>(layers, 2 * n_sm);
  }
  return cudaGetLastError();
}

cudaError_t vd_cuda_attention_make_schedule(const vd_cuda_attention *a, cudaStream_t stream) {
  return vd_cuda_attention_make_schedules(1, a, stream);
}

VD_DEV void store(float *to, float x) {
  *to = x;
}
VD_DEV void store(__nv_bfloat16 *to, float x) {
  *to = __float2bfloat16(x);
}
VD_DEV void store(__half *to, float x) {
  *to = __float2half(x);
}

/* to[column, row] = from[row, column], or +=; a block transposes 32 x 32 elements. One of the two numbers is a head's
 * width; the other one may be large, which dimension x of a grid may be alone. */
template <typename T, bool ADD>
__global__ void transpose_kernel(int rows, int columns, const float *from, T *to, bool rows_by_x) {
  __shared__ float tile[32][33];
  const int row0 = 32 * (int)(rows_by_x ? blockIdx.x : blockIdx.y),
            column0 = 32 * (int)(rows_by_x ? blockIdx.y : blockIdx.x);
  int c = column0 + (int)threadIdx.x, r = row0 + (int)threadIdx.x;
  for (int i = (int)threadIdx.y; i < 32; i += 8) {
    int row = row0 + i;
    if (row < rows && c < columns) tile[i][threadIdx.x] = from[(int64_t)row * columns + c];
  }
  __syncthreads();
  for (int i = (int)threadIdx.y; i < 32; i += 8) {
    int column = column0 + i;
    if (r >= rows || column >= columns) continue;
    T *p = to + (int64_t)column * rows + r;
    if constexpr (ADD) {
      *p += tile[threadIdx.x][i];
    } else {
      store(p, tile[threadIdx.x][i]);
    }
  }
}

cudaError_t vd_cuda_attention_key_pe(enum vd_precision type, int32_t d_head, int32_t attn_span, const float *key_pe,
                                     void *table, cudaStream_t stream) {
  dim3 blocks((unsigned)vd_ceil_div(attn_span, 32), (unsigned)vd_ceil_div(d_head, 32)), threads(32, 8);
  if (type == VD_FP32) {
    transpose_kernel<float, false><<<blocks, threads, 0, stream>>>(d_head, attn_span, key_pe, (float *)table, false);
  } else if (type == VD_BF16) {
    transpose_kernel<__nv_bfloat16, false>
        <<<blocks, threads, 0, stream>>>(d_head, attn_span, key_pe, (__nv_bfloat16 *)table, false);
  } else {
    transpose_kernel<__half, false><<<blocks, threads, 0, stream>>>(d_head, attn_span, key_pe, (__half *)table, false);
  }
  return cudaGetLastError();
}

/* dkey_pe [d_head, attn_span] += a block of 64 rows of dtable [64, width] in the order of vd_add_table_block(),
 * transposed. */
__global__ void add_table_block_kernel(int width, int d_head, int attn_span, const float *dtable, float *dkey_pe) {
  __shared__ float tile[96][VD_TILE + 1]; /* [column of d_head][row of e] */
  const int row0 = attn_span - ((int)blockIdx.x + 1) * VD_TILE;
  for (int i = (int)threadIdx.x; i < VD_TILE * width; i += (int)blockDim.x) {
    const int k = i & 3, thread = i / 4 % VD_WARPGROUP, n = i / (4 * VD_WARPGROUP), lane = thread & 31;
    tile[8 * n + 2 * (lane & 3) + (k & 1)][16 * (thread >> 5) + (lane >> 2) + 8 * (k >> 1)] =
        dtable[(int64_t)blockIdx.x * VD_TILE * width + i];
  }
  __syncthreads();
  for (int i = (int)threadIdx.x; i < VD_TILE * d_head; i += (int)blockDim.x) {
    const int row = row0 + i % VD_TILE;
    if (row >= 0) dkey_pe[(int64_t)(i / VD_TILE) * attn_span + row] += tile[i / VD_TILE][i % VD_TILE];
  }
}

/* Whether the gradient of the key table has the order of vd_add_table_block(). */
static bool in_blocks(enum vd_precision type, int d_head) {
  vd_cuda_attention a = {};
  a.type = type, a.d_head = d_head;
  return vd_uses_wgmma(&a);
}

size_t vd_cuda_attention_dtable_size(enum vd_precision type, int32_t d_head, int32_t attn_span) {
  if (!in_blocks(type, d_head)) return (size_t)attn_span * (size_t)d_head * sizeof(float);
  return (size_t)vd_ceil_div(attn_span, VD_TILE) * VD_TILE * (size_t)vd_wgmma_width(d_head) * sizeof(float);
}

cudaError_t vd_cuda_attention_key_pe_backward(enum vd_precision type, int32_t d_head, int32_t attn_span,
                                              const float *dtable, float *dkey_pe, cudaStream_t stream) {
  if (in_blocks(type, d_head)) {
    add_table_block_kernel<<<(unsigned)vd_ceil_div(attn_span, VD_TILE), 256, 0, stream>>>(
        vd_wgmma_width(d_head), d_head, attn_span, dtable, dkey_pe);
    return cudaGetLastError();
  }
  dim3 blocks((unsigned)vd_ceil_div(attn_span, 32), (unsigned)vd_ceil_div(d_head, 32)), threads(32, 8);
  transpose_kernel<float, true><<<blocks, threads, 0, stream>>>(attn_span, d_head, dtable, dkey_pe, true);
  return cudaGetLastError();
}
