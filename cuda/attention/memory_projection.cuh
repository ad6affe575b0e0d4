/* Shared by the kernels that project a layer's memory (memory_projection.cu, memory_projection_wgmma.cu,
 * memory_projection_bwd_wgmma.cu): their
 * arguments, the groups of columns and the rows that each needs. */
#ifndef VD_MEMORY_PROJECTION_CUH
#define VD_MEMORY_PROJECTION_CUH

#include "cuda/attention/common.cuh"
#include "cuda/attention/memory_projection.h"

typedef struct vd_projection_args {
  vd_cuda_ring memory;
  const void *wk, *wv; /* forward */
  void *kv;
  const void *dkv; /* backward */
  float *partial;  /* backward: [slots, 2 d_head, d] */
  int slots;
  bool by_ring; /* backward: units are tiles of the ring */
} vd_projection_args;

enum { VD_GROUP = 128 }; /* columns of a group of heads of 64 */

/* The groups of columns. Where trimmed, a group has keys of two heads, needed as far back as the window goes, or their
 * values, needed within a head's own span: groups of keys come first. */
enum { VD_MAX_GROUPS = 2 * VD_CUDA_MAX_HEADS };
template <bool TRIM> static inline __host__ __device__ int vd_group_count(const vd_cuda_attention &a) {
  return TRIM ? 2 * vd_ceil_div(a.n_head, 2) : a.n_head;
}
template <bool TRIM> VD_DEV bool vd_has_keys_alone(const vd_cuda_attention &a, int group) {
  return TRIM && 2 * group < vd_group_count<TRIM>(a);
}
/* The first head of a group. */
template <bool TRIM> VD_DEV int vd_group_head(const vd_cuda_attention &a, int group) {
  return TRIM ? 2 * group - (vd_has_keys_alone<TRIM>(a, group) ? 0 : vd_group_count<TRIM>(a)) : group;
}
/* Number of the group's columns. */
template <bool TRIM> VD_DEV int vd_group_width(const vd_cuda_attention &a, int group) {
  return (TRIM ? min(2, a.n_head - vd_group_head<TRIM>(a, group)) : 2) * a.d_head;
}
/* Column of a row of keys and values that column y of the group is, or -1. */
template <bool TRIM> VD_DEV int vd_group_column(const vd_cuda_attention &a, int group, int y) {
  const int d = vd_width(a);
  if (y >= vd_group_width<TRIM>(a, group)) return -1;
  const bool value = TRIM ? !vd_has_keys_alone<TRIM>(a, group) : y >= a.d_head;
  return vd_group_head<TRIM>(a, group) * a.d_head + y + (value ? d - (TRIM ? 0 : a.d_head) : 0);
}

/* Rows of memory that each group needs, and that the values of each head need, in shared memory: a block searches them
 * often. All threads call this. */
struct vd_rows_needed {
  int group[VD_MAX_GROUPS], own[VD_CUDA_MAX_HEADS];
};
template <bool TRIM>
VD_DEV const vd_rows_needed *vd_find_rows(const vd_cuda_attention &a, const vd_projection_args &p) {
  __shared__ vd_rows_needed rows;
  const vd_band *band = ((const vd_tile_schedule *)a.schedule)->band;
  const int group = (int)threadIdx.x;
  if (TRIM && group < a.n_head) rows.own[group] = (int)min((int64_t)band[group].own, p.memory.rows);
  if (group < vd_group_count<TRIM>(a)) {
    const int head = vd_group_head<TRIM>(a, group);
    int most = band[head].reach;
    if (TRIM && !vd_has_keys_alone<TRIM>(a, group)) {
      most = band[head].own;
      if (head + 1 < a.n_head) most = max(most, band[head + 1].own);
    }
    rows.group[group] = (int)min((int64_t)most, p.memory.rows);
  }
  __syncthreads();
  return &rows;
}
/* Rows that column y of the group needs. */
template <bool TRIM>
VD_DEV int vd_rows_of_column(const vd_cuda_attention &a, const vd_rows_needed *rows, int group, int y) {
  if (!TRIM || vd_has_keys_alone<TRIM>(a, group)) return rows->group[group];
  return rows->own[vd_group_head<TRIM>(a, group) + (y >= a.d_head ? 1 : 0)];
}

/* Tiles of a group in one stream: those of the newest rows, which end at `end` of the ring, and those of rows that wrap
 * around it. */
typedef struct vd_ring_tiles {
  int end, newest, all;
} vd_ring_tiles;
VD_DEV vd_ring_tiles vd_ring_tiles_of(const vd_projection_args &p, int needed) {
  const int end = (int)(p.memory.oldest == 0 ? p.memory.rows : p.memory.oldest), near = min(needed, end);
  vd_ring_tiles r = {end, vd_ceil_div(near, VD_TILE), 0};
  r.all = r.newest + vd_ceil_div(needed - near, VD_TILE);
  return r;
}

/* A tile of them: its first row in the ring, which may be negative; the row of the window is that of the ring + shift.
 * Rows of the window below `shift` are not this tile's. */
typedef struct vd_ring_tile {
  int row, shift;
} vd_ring_tile;
VD_DEV vd_ring_tile vd_ring_tile_at(const vd_cuda_attention &a, const vd_projection_args &p, const vd_ring_tiles &r,
                                    int at) {
  const bool wraps = at >= r.newest;
  vd_ring_tile t = {(wraps ? (int)p.memory.rows + r.newest * VD_TILE : r.end) - (at + 1) * VD_TILE,
                    a.window - r.end - (wraps ? (int)p.memory.rows : 0)};
  return t;
}

enum { VD_MIN_UNITS = 4 }; /* fewest units of rows in one partial sum */
/* Division of backward's rows: a unit is `depth` rows of one stream and group, or a tile of the ring; a slot is `size`
 * units of one group and has one partial sum. */
typedef struct vd_row_share {
  int size;               /* units of a slot */
  int group, slot, slots; /* of a group: its first slot and their number */
  int rows, units;        /* of the group: rows of a stream; units of all streams */
} vd_row_share;

/* The share of the slot's group, or of `group` where slot < 0. Returns false if there is no such slot. */
template <bool TRIM>
VD_DEV bool vd_find_share(const vd_cuda_attention &a, const vd_rows_needed *needed, const vd_projection_args &p,
                          int depth, int slot, int group, vd_row_share *s) {
  int units = 0, first = 0, n_group = vd_group_count<TRIM>(a);
  auto units_of = [&](int rows) { return p.by_ring ? vd_ring_tiles_of(p, rows).all : vd_ceil_div(rows, depth); };
  for (int g = 0; g < n_group; g++) units += a.n_stream * units_of(needed->group[g]);
  s->size = max((int)VD_MIN_UNITS, vd_ceil_div(units, p.slots - n_group));
  for (int g = 0; g < n_group; g++) {
    int rows = needed->group[g], mine = a.n_stream * units_of(rows);
    int slots = vd_ceil_div(mine, s->size);
    if (slot < 0 ? g == group : slot < first + slots) {
      s->group = g, s->slot = first, s->slots = slots, s->rows = rows, s->units = mine;
      return true;
    }
    first += slots;
  }
  return false;
}

/* Writes a warp's part of a partial sum: 16 rows from column0 on of `width`, 128 columns from x0 on of d. */
VD_DEV void vd_write_partial(const vd_cuda_attention &a, float *partial, int width, int column0, int x0,
                             const float c[16][4]) {
  int lane = threadIdx.x & 31, d = vd_width(a), row0 = column0 + (lane >> 2);
  x0 += 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 32; i++) {
    int j = i >> 1, ih = i & 1, row = row0 + 8 * ih, x = x0 + 8 * j;
    if (row < width && x < d) *(float2 *)(partial + (int64_t)row * d + x) = make_float2(c[j][2 * ih], c[j][2 * ih + 1]);
  }
}

/* Not collective. Whether vd_project_wgmma() and vd_project_backward_wgmma() take these shapes: 16-bit types, up to 8
 * heads of 64, where trimmed an even number. */
bool vd_projects_by_wgmma(const vd_cuda_attention *a);
/* Stream-ordered. vd_cuda_project_memory() for them. */
cudaError_t vd_project_wgmma(const vd_cuda_attention *a, const vd_projection_args *p, cudaStream_t stream);
/* Stream-ordered. The partial sums of vd_cuda_project_memory_backward() for them, with p->by_ring. */
cudaError_t vd_project_backward_wgmma(const vd_cuda_attention *a, const vd_projection_args *p, cudaStream_t stream);

#endif
