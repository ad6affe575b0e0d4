/* The gradients of a layer's key and value weights from its memory (memory_projection.h), for 16-bit types and heads of
 * 64: partial sums of dkv^T memory over shares of the rows.
 *
 * - Tiles: a block has the 128 columns of a group x 256 columns of d, contracted over its share of the rows, 64 at a
 *   time: tiles of the ring, as in memory_projection_wgmma.cu. Rows that a tile has beyond its range are set to zero.
 * - Warpgroups: a producer, of which one thread starts the copies, and two consumers (232 registers a thread), each
 * with 64 of the group's columns, 64 x 256 results.
 * - Shared memory, 192 KiB: four stages of dkv [64 x 128] and memory [64 x 256], in panels of 64 columns, swizzled as
 * in wgmma.cuh. One block a multiprocessor.
 * - Barriers: mbarriers `full`, a stage's rows have arrived, and `empty`, both consumers have read it; named barrier 1
 *   of both consumers, where rows of a stage were set to zero.
 * - Bound by L2: a stage reads 48 KiB for 1,024 cycles of the tensor cores. */
#include "cuda/attention/memory_projection.cuh"
#include "cuda/kernels/tma.cuh"
#include "cuda/kernels/wgmma.cuh"

enum { ACROSS = 256, STAGES = 4, CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS), PANEL = VD_TILE * 64 };

template <typename T> struct backward_smem {
  T dkv[STAGES][2 * PANEL], memory[STAGES][ACROSS / 64 * PANEL];
  uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(backward_smem<__half>) <= 200 * 1024, "shared memory of a block");

/* TMA's maps of the memory [stream, row, d] and of dkv [stream, row of the window, 2 d]. */
typedef struct backward_maps {
  CUtensorMap memory, dkv;
} backward_maps;

/* A block's part of the work: units first .. first + steps - 1 of the group's; per_stream of them are of one stream. */
typedef struct backward_work {
  int group, first, steps, slot, x0;
  vd_ring_tiles tiles;
} backward_work;
template <bool TRIM>
VD_DEV bool work_of(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *needed,
                    backward_work *w) {
  const int across = vd_ceil_div(vd_width(a), ACROSS);
  vd_row_share share;
  w->slot = (int)blockIdx.x / across, w->x0 = (int)blockIdx.x % across * ACROSS;
  if (!vd_find_share<TRIM>(a, needed, p, VD_TILE, w->slot, 0, &share)) return false;
  w->group = share.group, w->first = (w->slot - share.slot) * share.size;
  w->steps = min(share.size, share.units - w->first), w->tiles = vd_ring_tiles_of(p, share.rows);
  return true;
}

/* The producer's thread. */
template <typename T, bool TRIM>
VD_DEV void produce(const vd_cuda_attention &a, const vd_projection_args &p, const backward_maps &maps,
                    const backward_work &w, backward_smem<T> *m) {
  int slot = 0, parity = 1;
  for (int unit = w.first; unit < w.first + w.steps; unit++) {
    const int stream = unit / w.tiles.all;
    const vd_ring_tile t = vd_ring_tile_at(a, p, w.tiles, unit % w.tiles.all);
    vd_mbarrier_wait(&m->empty[slot], parity);
    vd_mbarrier_expect(&m->full[slot], (int)sizeof m->dkv[0] + (int)sizeof m->memory[0]);
#pragma unroll
    for (int half = 0; half < 2; half++)
      vd_copy_box_3d(m->dkv[slot] + half * PANEL, &maps.dkv, stream, t.row + t.shift,
                     vd_group_column<TRIM>(a, w.group, 64 * half), &m->full[slot]);
#pragma unroll
    for (int i = 0; i < ACROSS / 64; i++)
      vd_copy_box_3d(m->memory[slot] + i * PANEL, &maps.memory, stream, t.row, w.x0 + 64 * i, &m->full[slot]);
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
}

/* Sets the first `rows` rows of a panel to zero. A consumer warpgroup calls this. */
template <typename T> VD_DEV void zero_rows(T *panel, int rows) {
  for (int i = (int)threadIdx.x & 127; i < 8 * rows; i += 128) ((uint4 *)panel)[i] = make_uint4(0, 0, 0, 0);
}
/* Sets the rows of a stage to zero that nothing needs: others may hold NaN there. lowest: the first row of the window
 * that the group needs, and those that each half of its columns needs. Both consumers call this. */
template <typename T>
VD_DEV void zero_beyond(backward_smem<T> *m, int slot, int consumer, int row, const int lowest[3]) {
  if (row >= lowest[0] && row >= lowest[1] && row >= lowest[2]) return;
  zero_rows(m->dkv[slot] + consumer * PANEL, min(VD_TILE, lowest[1 + consumer] - row));
#pragma unroll
  for (int i = 0; i < ACROSS / 128; i++)
    zero_rows(m->memory[slot] + (ACROSS / 128 * consumer + i) * PANEL, min(VD_TILE, lowest[0] - row));
  vd_fence_proxy_async();
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

/* A consumer warpgroup: c [64, 256] = its columns of dkv^T memory. */
template <typename T, bool TRIM>
VD_DEV void multiply(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *needed,
                     const backward_work &w, backward_smem<T> *m, int consumer, float c[2][16][4]) {
  int slot = 0, parity = 0, before = 0, at = w.first % w.tiles.all;
  for (int step = 0; step < w.steps; step++) {
    const vd_ring_tile t = vd_ring_tile_at(a, p, w.tiles, at);
    int lowest[3] = {max(a.window - needed->group[w.group], t.shift)};
#pragma unroll
    for (int half = 0; half < 2; half++)
      lowest[1 + half] = max(a.window - vd_rows_of_column<TRIM>(a, needed, w.group, 64 * half), t.shift);
    vd_mbarrier_wait(&m->full[slot], parity);
    zero_beyond(m, slot, consumer, t.row + t.shift, lowest);
    const uint64_t left = vd_smem_descriptor<true>(m->dkv[slot] + consumer * PANEL),
                   right = vd_smem_descriptor<true>(m->memory[slot], PANEL * 2);
    vd_wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; i++)
      vd_wgmma_k64_ss<T, 128, VD_MN_MAJOR, VD_MN_MAJOR>(c[i], left, right + i * (2 * PANEL * 2 / 16), step > 0);
    vd_wgmma_commit();
    if (step > 0) {
      vd_wgmma_wait<1>();
      vd_mbarrier_arrive_warp(&m->empty[before]);
    }
    before = slot;
    if (++slot == STAGES) slot = 0, parity ^= 1;
    if (++at == w.tiles.all) at = 0;
  }
  vd_wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; i++) vd_wgmma_fence_operand<16>(c[i]);
}

template <typename T, bool TRIM>
__global__ void __launch_bounds__(THREADS, 1)
    project_backward_wgmma_kernel(const __grid_constant__ vd_cuda_attention a,
                                  const __grid_constant__ vd_projection_args p,
                                  const __grid_constant__ backward_maps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  backward_smem<T> *m = (backward_smem<T> *)shared;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      vd_mbarrier_init(&m->full[i], 1);
      vd_mbarrier_init(&m->empty[i], 4 * CONSUMERS); /* warps */
    }
    vd_mbarrier_init_fence();
  }
  vd_pdl_wait();
  const vd_rows_needed *needed = vd_find_rows<TRIM>(a, p); /* a barrier of the block */
  backward_work w;
  if (!work_of<TRIM>(a, p, needed, &w)) return;
  const int consumer = __shfl_sync(0xffffffffU, (int)threadIdx.x / 128 - 1, 0); /* uniform, for descriptors */
  if (consumer < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<T, TRIM>(a, p, maps, w, m);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float c[2][16][4];
    multiply<T, TRIM>(a, p, needed, w, m, consumer, c);
    const int column0 = 64 * consumer + 16 * ((int)threadIdx.x >> 5 & 3);
    float *partial = p.partial + (int64_t)w.slot * VD_GROUP * vd_width(a);
#pragma unroll
    for (int i = 0; i < 2; i++) vd_write_partial(a, partial, VD_GROUP, column0, w.x0 + 128 * i, c[i]);
  }
}

template <typename T, bool TRIM>
static cudaError_t launch(const vd_cuda_attention *a, const vd_projection_args *p, const backward_maps *maps,
                          cudaStream_t stream) {
  auto kernel = project_backward_wgmma_kernel<T, TRIM>;
  const int shared = (int)sizeof(backward_smem<T>), across = vd_ceil_div(a->n_head * a->d_head, ACROSS);
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(kernel, (unsigned)(p->slots * across), THREADS, (size_t)shared, stream, *a, *p, *maps);
}

cudaError_t vd_project_backward_wgmma(const vd_cuda_attention *a, const vd_projection_args *p, cudaStream_t stream) {
  const int64_t d = (int64_t)a->n_head * a->d_head;
  backward_maps maps;
  if (p->memory.rows == 0) return cudaSuccess;
  cudaError_t e = vd_make_stream_map(&maps.memory, p->memory.at, a->n_stream, p->memory.rows, d);
  if (e == cudaSuccess) e = vd_make_stream_map(&maps.dkv, p->dkv, a->n_stream, a->kv_rows, 2 * d);
  if (e != cudaSuccess) return e;
  if (a->type == VD_BF16)
    return (a->trimmed ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)(a, p, &maps, stream);
  return (a->trimmed ? launch<__half, true> : launch<__half, false>)(a, p, &maps, stream);
}
