/* See context.h. */
#include "cuda/backend/context.h"

void vd_cuda_record_error(vd_cuda_backend *c, cudaError_t e, const char *what) {
  if (e != cudaSuccess) vd_fail(&c->error, VD_FAILED, "GPU %d, %s: %s", c->device, what, cudaGetErrorString(e));
}

bool vd_cuda_trim_pool(vd_cuda_backend *c) {
  cudaGetLastError(); /* clears cudaErrorMemoryAllocation, which later calls would report */
  return c->pooled && cudaStreamSynchronize(c->stream) == cudaSuccess && cudaMemPoolTrimTo(c->pool, 0) == cudaSuccess;
}

void *vd_cuda_workspace(vd_cuda_backend *c, vd_workspace *s, size_t bytes) {
  if (bytes <= s->bytes) return s->p;
  bool pinned = s == &c->pinned;
  /* Growth waits for the streams, so workspaces that grow with the windows grow by a quarter at least. */
  size_t step = s->bytes / 4 * 5, capacity = bytes > step ? bytes : step;
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
  vd_cuda_record_error(c, cudaStreamSynchronize(c->gradient.stream), "waiting");
  if (pinned)
    cudaFreeHost(s->p);
  else
    cudaFree(s->p);
  *s = (vd_workspace){0};
  cudaError_t e = pinned ? cudaMallocHost(&s->p, capacity) : cudaMalloc(&s->p, capacity);
  if (e != cudaSuccess && !pinned && vd_cuda_trim_pool(c)) e = cudaMalloc(&s->p, capacity = bytes);
  vd_cuda_record_error(c, e, "allocating scratch memory");
  if (e != cudaSuccess) s->p = NULL;
  s->bytes = e == cudaSuccess ? capacity : 0;
  return s->p;
}

vd_arena *vd_cuda_arena_of(vd_cuda_backend *c, const real *p) {
  for (int i = 0; i < c->n_arena; i++)
    if (p >= c->arena[i].params && p < c->arena[i].params + c->arena[i].n) return &c->arena[i];
  return NULL;
}

const void *vd_cuda_weight(vd_cuda_backend *c, const real *weight) {
  if (c->type == VD_FP32) return weight;
  const vd_arena *a = vd_cuda_arena_of(c, weight);
  if (!a) vd_bug("weights_changed was not called for the arena of a weight");
  return (const char *)a->copy + (size_t)(weight - a->params) * c->act_size;
}

bool vd_cuda_are_contiguous(int n, const real *const tensor[], int64_t size) {
  bool contiguous = true;
  for (int i = 1; i < n; i++) contiguous = contiguous && tensor[i] == tensor[0] + i * size;
  return contiguous;
}
