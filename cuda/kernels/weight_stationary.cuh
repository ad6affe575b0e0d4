/* Weight-stationary products on Hopper: x W for many rows of x, where the contracted size is at most 512. A block keeps
 * the weights of 128 units (columns of results), [128, depth], in shared memory and goes over tiles of 64 rows, so that
 * only rows are read. For 16-bit types; ffn.cu, rows_product.cu and cuda/attention/memory_projection_wgmma.cu.
 *
 * - Warpgroups: a producer, of which one thread starts the copies, and three consumers (160 registers a thread), which
 *   take the block's tiles in turns, so that some multiply while others end their tiles.
 * - Shared memory, 224 KiB: weights [8 steps of 64 contracted elements][128 x 64], 128 KiB; rows [12 stages][64 x 64],
 *   96 KiB; both swizzled as in wgmma.cuh. One block a multiprocessor.
 * - Barriers: mbarriers `full`, a stage's rows have arrived, `empty`, its consumer has read it, and `weights_full`, for
 *   each step of the weights; named barriers VD_TURN .. VD_TURN + 2, a consumer may start its products.
 * - Bound by the tensor cores: 780 TFLOP/s on an H200 without an epilogue. A tile's products take 2,048 cycles for a
 *   depth of 512, and the other consumers' epilogues run beside them (doc/notes/2026-11-28-weight-stationary.md).
 */
#ifndef VD_WEIGHT_STATIONARY_CUH
#define VD_WEIGHT_STATIONARY_CUH

#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/tma.cuh"
#include "cuda/kernels/wgmma.cuh"

enum {
  VD_UNITS = 128,
  VD_ROWS = 64,
  VD_CONSUMERS = 3,
  VD_STATIONARY_THREADS = 128 * (1 + VD_CONSUMERS),
  VD_STEP = 64, /* contracted elements of a step */
  VD_MAX_STEPS = 8,
  VD_STAGES = 12,
  VD_TURN = 1
};

template <typename T> struct vd_stationary {
  T weights[VD_MAX_STEPS][VD_UNITS * VD_STEP], rows[VD_STAGES][VD_ROWS * VD_STEP];
  uint64_t weights_full[VD_MAX_STEPS], full[VD_STAGES], empty[VD_STAGES];
};
static_assert(sizeof(vd_stationary<__half>) <= 226 * 1024, "shared memory of a block");

/* Initializes the barriers. All threads call this before anything else. */
template <typename T> VD_DEV void vd_start_stationary(vd_stationary<T> *m) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < VD_MAX_STEPS; i++) vd_mbarrier_init(&m->weights_full[i], 1);
    for (int i = 0; i < VD_STAGES; i++) {
      vd_mbarrier_init(&m->full[i], 1);
      vd_mbarrier_init(&m->empty[i], 4); /* warps of a consumer */
    }
    vd_mbarrier_init_fence();
  }
  __syncthreads();
}

/* The number of this warpgroup's consumer, or -1 for the producer. The shuffle tells the compiler that it is uniform in
 * the warp: descriptors of operands, which depend on it, then stay in uniform registers. */
VD_DEV int vd_stationary_consumer() {
  return __shfl_sync(0xffffffffU, (int)threadIdx.x / 128 - 1, 0);
}
/* Registers move from the producer to the consumers; each warpgroup calls its function first. */
VD_DEV void vd_producer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
}
VD_DEV void vd_consumer_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
}

/* The producer's place in the pipeline of rows. */
typedef struct vd_stage_cursor {
  int slot, parity;
} vd_stage_cursor;
/* Waits until the next stage is empty, and returns its number; its rows are then copied to m->rows and completed at
 * m->full. */
template <typename T> VD_DEV int vd_next_stage(vd_stationary<T> *m, vd_stage_cursor &at) {
  const int slot = at.slot;
  vd_mbarrier_wait(&m->empty[slot], at.parity ^ 1);
  vd_mbarrier_expect(&m->full[slot], VD_ROWS * VD_STEP * 2);
  if (++at.slot == VD_STAGES) at.slot = 0, at.parity ^= 1;
  return slot;
}
/* Waits until all stages have been read: then nobody reads the weights. */
template <typename T> VD_DEV void vd_drain_stages(vd_stationary<T> *m, const vd_stage_cursor &at) {
  for (int slot = 0; slot < VD_STAGES; slot++)
    vd_mbarrier_wait(&m->empty[slot], slot < at.slot ? at.parity : at.parity ^ 1);
}

/* A block's part of a product [n, d] x [d, width]: its first unit, and row tiles `split`, split + row_splits and so on
 * below n_tile. Consumer i % VD_CONSUMERS takes the i-th of them. width / VD_UNITS * row_splits blocks run. */
typedef struct vd_stationary_work {
  int unit0, split, row_splits, n_tile, steps; /* steps: of d */
} vd_stationary_work;
VD_DEV vd_stationary_work vd_stationary_work_of(int64_t n, int d, int width, int row_splits) {
  const int unit_blocks = width / VD_UNITS;
  vd_stationary_work w = {(int)blockIdx.x % unit_blocks * VD_UNITS, (int)blockIdx.x / unit_blocks, row_splits,
                          (int)((n + VD_ROWS - 1) / VD_ROWS), d / VD_STEP};
  return w;
}

/* The producer's thread: copies of the weights, and of rows as stages become empty. Weights are K-major (weight:
 * vd_make_weight_map), or MN-major (vd_make_matrix_map of [d, width]): 64 contracted rows of 128
 * units in two panels. ahead: an array [n, width] that the epilogue reads, and that is brought to
 * L2; or NULL. */
template <typename T, int B_MAJOR>
VD_DEV void vd_produce_tiles(const vd_stationary_work &w, vd_stationary<T> *m, const CUtensorMap *x,
                             const CUtensorMap *weight, const CUtensorMap *ahead) {
  vd_stage_cursor at = {0, 0};
  for (int tile = w.split; tile < w.n_tile; tile += w.row_splits) {
    for (int i = 0; ahead && i < 2; i++) vd_prefetch_box(ahead, tile * VD_ROWS, w.unit0 + 64 * i);
    for (int step = 0; step < w.steps; step++) {
      const int slot = vd_next_stage(m, at);
      if (tile == w.split) {
        uint64_t *full = &m->weights_full[step];
        vd_mbarrier_expect(full, VD_UNITS * VD_STEP * 2);
        if constexpr (B_MAJOR == VD_MN_MAJOR) {
          vd_copy_box(m->weights[step], weight, step * VD_STEP, w.unit0, full);
          vd_copy_box(m->weights[step] + 64 * VD_STEP, weight, step * VD_STEP, w.unit0 + 64, full);
        } else {
          vd_copy_box_5d(m->weights[step], weight, step * VD_STEP, w.unit0 / 32, full);
        }
      }
      vd_copy_box(m->rows[slot], x, tile * VD_ROWS, step * VD_STEP, &m->full[slot]);
    }
  }
}

/* Named barriers of a consumer and the one before it: consumers start their products in the order of tiles. An mbarrier
 * tells only whether the last phase was even or odd, so that nobody may wait for a stage two uses ahead. */
VD_DEV void vd_wait_for_turn(int consumer) {
  asm volatile("bar.sync %0, 256;" ::"r"(VD_TURN + consumer) : "memory");
}
VD_DEV void vd_give_turn(int consumer) {
  asm volatile("bar.arrive %0, 256;" ::"r"(VD_TURN + consumer) : "memory");
}

/* Multiplies the i-th tile of the block, of `steps` steps (STEPS, or any number where STEPS is 0): c [64, 128] of this
 * consumer warpgroup. new_weights: waits for the weights of this parity first. more: the block has another tile. */
template <typename T, int B_MAJOR, int STEPS>
VD_DEV void vd_multiply_tile(vd_stationary<T> *m, int i, int steps, bool new_weights, int parity_of_weights, bool more,
                             float c[16][4]) {
  int slot = i * steps % VD_STAGES, parity = i * steps / VD_STAGES & 1, before = 0;
  if (i > 0) vd_wait_for_turn(i % VD_CONSUMERS);
#pragma unroll
  for (int step = 0; step < (STEPS > 0 ? STEPS : steps); step++) {
    if (new_weights) vd_mbarrier_wait(&m->weights_full[step], parity_of_weights);
    vd_mbarrier_wait(&m->full[slot], parity);
    vd_wgmma_fence();
    vd_wgmma_k64_ss<T, VD_UNITS, VD_K_MAJOR, B_MAJOR>(c, vd_smem_descriptor<true>(m->rows[slot]),
                                                      vd_smem_descriptor<true>(m->weights[step], 64 * VD_STEP * 2),
                                                      step > 0);
    vd_wgmma_commit();
    if (step > 0) {
      vd_wgmma_wait<1>();
      vd_mbarrier_arrive_warp(&m->empty[before]);
    }
    before = slot;
    if (++slot == VD_STAGES) slot = 0, parity ^= 1;
  }
  if (more) vd_give_turn((i + 1) % VD_CONSUMERS);
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<16>(c);
  vd_mbarrier_arrive_warp(&m->empty[before]);
}

/* Transposes 4 x 4 words over the lanes of a quad: word u of lane t becomes word t of lane u. A lane's four words are
 * then eight neighbouring columns, one 16-byte store. */
VD_DEV void vd_transpose_quad(uint32_t w[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = __shfl_xor_sync(0xffffffffU, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i], w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t got = __shfl_xor_sync(0xffffffffU, high ? w[i] : w[i + 2], 2);
    w[i] = high ? got : w[i], w[i + 2] = high ? w[i + 2] : got;
  }
}

/* Stream-ordered. Launches a kernel of one argument with `blocks` blocks of the pipeline. */
template <typename T, typename ARGS>
static cudaError_t vd_launch_stationary(void (*kernel)(ARGS), int64_t blocks, const ARGS *args, cudaStream_t stream) {
  const int shared = (int)sizeof(vd_stationary<T>);
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(kernel, (unsigned)blocks, VD_STATIONARY_THREADS, (size_t)shared, stream, *args);
}

/* Not collective. The map of K-major weights [rows, d], in boxes of `units` rows (a multiple of 32) of 64 contracted
 * elements. Of each 32 units, units 8 t + 2 j + i come in the order of j, t, i: lane t of a quad holds columns 8 j + 2
 * t + i of a product (wgmma.cuh), so that it gets units 8 t .. 8 t + 7 of each 32, the 16 bytes of a store: c[4 b +
 * j][2 ih + i] is unit 32 b + 8 t + 2 j + i. `last` of vd_copy_box_5d() counts 32 units. The strides do not ascend,
 * which cuda.h neither shows nor forbids; drivers of CUDA 13 take them. */
static inline cudaError_t vd_make_weight_map(CUtensorMap *map, const void *weight, int64_t rows, int64_t d, int units) {
  const cuuint64_t row = (cuuint64_t)d * 2, size[5] = {(cuuint64_t)d, 2, 4, 4, (cuuint64_t)rows / 32},
                   stride[4] = {row, 8 * row, 2 * row, 32 * row};
  const cuuint32_t box[5] = {VD_STEP, 2, 4, 4, (cuuint32_t)units / 32};
  return vd_make_tensor_map(map, weight, 5, size, stride, box);
}

#endif
