/* The attention weights that evaluation records (vd_attention_record in src/ops/ops.h):
 *
 *      a_ij = m(x) e^(s_ij - lse_i),  x = i - j
 *
 * with the scores s_ij and the soft mask m of the forward pass, whose lse is read. Scores are computed again from the
 * same rounded operands, by plain fp32 multiply-adds: evaluation alone pays for them.
 *
 * Tiles: a block has 128 distances of one head and stream, one a thread, and goes over the queries 32 at a time. A
 * thread owns its distance, so that every sum has a fixed order and needs no atomics.
 *
 * Shared memory: 32 columns of the 32 queries (with relative keys twice, with u and with v), of the 159 keys that they
 * have at these distances, and of the 128 position keys, in fp32. The rows of keys are 33 wide, which keeps the threads
 * of a warp on different banks.
 *
 * Bound: loads from shared memory, two for each multiply-add, with relative keys three for two. */
#include "cuda/attention/common.cuh"

namespace {

enum { DISTANCES = 128, QUERIES = 32, CHUNK = 32, KEYS = DISTANCES + QUERIES - 1 };

/* Streams from `stream` on, as many as the grid is deep, and their queries first .. end - 1. */
typedef struct weights_task {
  const void *block, *memory, *table;
  const float *lse;
  int stream, first, end, n_distance;
  bool adds_v; /* the forward pass multiplied position keys by q + v, rounded; else by q + u, and added bias scores */
  const int32_t *target; /* with sum */
  double *sum;           /* of all streams; NULL: `weight` */
  float *weight;         /* [n_head, n_distance] of the one query */
} weights_task;

template <typename T> struct weights_smem {
  float q[QUERIES][CHUNK];
  float with_v[QUERIES][CHUNK]; /* with relative keys, what position keys are multiplied by */
  float k[KEYS][CHUNK + 1];
  float p[DISTANCES][CHUNK + 1];
};

/* Columns c0 .. c0 + CHUNK - 1 of a head for queries from i0 on and distances from x0 on; zeros where there is no such
 * row or column. Queries have u or v added and are rounded, as in the forward pass. */
template <typename T, bool REL>
VD_DEV void load_columns(weights_smem<T> *m, const vd_cuda_attention &a, const weights_task &task, const vd_band &band,
                         int head, int stream, int i0, int x0, int c0) {
  const int lane = (int)threadIdx.x % CHUNK, c = c0 + lane;
  const vd_row_view<const T> queries = vd_block_rows(a, (const T *)task.block, VD_QUERY, head, stream);
  const vd_kv_view<const T> keys = vd_kv_view_of(a, (const T *)task.block, (const T *)task.memory, head, stream);
  const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, task.table, head);
  const int lowest = vd_lowest<REL>(band);
  const bool column = c < a.d_head, biased = REL && a.content_bias && column;
  const float u = biased ? a.content_bias[head * a.d_head + c] : 0;
  const float v = biased && task.adds_v ? a.position_bias[head * a.d_head + c] : u;
  for (int r = (int)threadIdx.x / CHUNK; r < KEYS; r += DISTANCES / CHUNK) {
    const int kappa = i0 - x0 - (DISTANCES - 1) + r;
    const vd_row_view<const T> rows = keys.at(kappa, VD_KEY);
    const bool exists = column && kappa >= lowest && kappa < a.block;
    m->k[r][lane] = exists ? (float)rows.row0[(int64_t)kappa * rows.stride + c] : 0;
    if (r < QUERIES) {
      const bool asks = column && i0 + r < task.end;
      const float q = asks ? (float)queries.row0[(int64_t)(i0 + r) * queries.stride + c] : 0;
      m->q[r][lane] = (float)(T)(q + (asks ? u : 0));
      if constexpr (REL) m->with_v[r][lane] = (float)(T)(q + (asks ? v : 0));
    }
    if (r < DISTANCES) {
      const int e = -(x0 + r);
      const bool known = column && e >= positions.lowest && e < positions.end;
      m->p[r][lane] = known ? (float)positions.row0[(int64_t)e * positions.stride + c] : 0;
    }
  }
}

/* One thread, one distance. */
template <typename T, bool REL>
__global__ void __launch_bounds__(DISTANCES)
    weights_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ weights_task task) {
  __shared__ weights_smem<T> m;
  const int head = (int)blockIdx.y, stream = task.stream + (int)blockIdx.z, t = (int)threadIdx.x;
  const int x0 = (int)blockIdx.x * DISTANCES, x = x0 + t;
  const vd_band band = vd_band_of<REL>(a, (const vd_tile_schedule *)a.schedule, head);
  const float mask = REL ? 1 : vd_mask(band, x), factor = rsqrtf((float)a.d_head);
  const float bias = REL && !task.adds_v && x <= a.reach ? a.bias_scores[(int64_t)head * (a.reach + 1) + x] : 0;
  const float *lse = task.lse + ((int64_t)stream * a.n_head + head) * a.block;
  double sum = 0;
  float weight = 0;
  for (int i0 = task.first; i0 < task.end && x0 <= band.reach; i0 += QUERIES) {
    float s[QUERIES] = {};
    for (int c0 = 0; c0 < a.d_head; c0 += CHUNK) {
      __syncthreads();
      load_columns<T, REL>(&m, a, task, band, head, stream, i0, x0, c0);
      __syncthreads();
      for (int c = 0; c < CHUNK; c++) {
        const float p = m.p[t][c];
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
          const float k = m.k[i + DISTANCES - 1 - t][c];
          s[i] = REL ? fmaf(m.with_v[i][c], p, fmaf(m.q[i][c], k, s[i])) : fmaf(m.q[i][c], k + p, s[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
      const int query = i0 + i;
      const bool seen = query < task.end && vd_seen(band, x) && (!REL || query - x >= band.oldest);
      if (!seen) continue;
      /* Nothing bounds the score of a key with mask 0. */
      weight = mask > 0 ? mask * expf((s[i] + bias) * factor - lse[query]) : 0;
      if (task.sum && task.target[(int64_t)stream * a.block + query] >= 0) sum += weight;
    }
  }
  if (x >= task.n_distance) return;
  if (task.sum)
    task.sum[((int64_t)stream * a.n_head + head) * task.n_distance + x] += sum;
  else
    task.weight[(int64_t)head * task.n_distance + x] = weight;
}

template <typename T>
void launch(const vd_cuda_attention *a, const weights_task &task, int n_stream, cudaStream_t stream) {
  dim3 blocks((unsigned)vd_ceil_div(task.n_distance, DISTANCES), (unsigned)a->n_head, (unsigned)n_stream);
  if (a->rel_key)
    weights_kernel<T, true><<<blocks, DISTANCES, 0, stream>>>(*a, task);
  else
    weights_kernel<T, false><<<blocks, DISTANCES, 0, stream>>>(*a, task);
}

void launch_typed(const vd_cuda_attention *a, const weights_task &task, int n_stream, cudaStream_t stream) {
  if (a->type == VD_FP32) {
    launch<float>(a, task, n_stream, stream);
  } else if (a->type == VD_BF16) {
    launch<__nv_bfloat16>(a, task, n_stream, stream);
  } else {
    launch<__half>(a, task, n_stream, stream);
  }
}

} // namespace

cudaError_t vd_cuda_attention_record_weights(const vd_cuda_attention *a, const vd_cuda_attention_record *r,
                                             const void *block, const void *memory, const void *table, const float *lse,
                                             cudaStream_t stream) {
  if (a->dropout > 0) return cudaErrorInvalidValue;
  weights_task all = {block,         memory,           table,     lse,    0,   0, a->block,
                      r->n_distance, vd_uses_wgmma(a), r->target, r->sum, NULL};
  launch_typed(a, all, a->n_stream, stream);
  for (int64_t k = 0; k < r->n_chosen; k++) {
    weights_task one = all;
    one.stream = (int)(r->chosen[k] / a->block), one.first = (int)(r->chosen[k] % a->block), one.end = one.first + 1;
    one.sum = NULL, one.weight = r->weight + k * a->n_head * r->n_distance;
    launch_typed(a, one, 1, stream);
  }
  return cudaGetLastError();
}
