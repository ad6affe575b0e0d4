/* See symmetric_memory.h. */
#include "cuda/backend/symmetric_memory.h"

#include "cuda/backend/nccl_library.h"

#include <stdlib.h>

struct vd_symmetric_memory {
  vd_nccl_calls call;
  void *taken[3 * VD_MAX_ARENAS]; /* parameters, their copy, gradients */
  int n;
};

/* CTAs of an operation. NCCL would take 8, with which it takes longer, and what a compute kernel of one wave loses
 * beside it does not depend on their number. Measured: doc/notes/2026-11-29-symmetric-memory.md. */
static const char CTAS[] = "32";

int vd_cuda_use_symmetric_memory(vd_ops *o, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_nccl_calls calls;
  if (c->symmetric || vd_cuda_nccl_load(&calls, err) || !calls.window_register) return err->status;
  setenv("NCCL_SYM_CTAS", CTAS, 0);
  c->symmetric = vd_calloc(1, sizeof *c->symmetric);
  c->symmetric->call = calls;
  return VD_OK;
}

int vd_cuda_symmetric_alloc(vd_cuda_backend *c, void **p, size_t bytes, vd_error *err) {
  vd_symmetric_memory *s = c->symmetric;
  if (s->n == sizeof s->taken / sizeof *s->taken) vd_bug("more than %d arenas in symmetric memory", s->n);
  ncclResult_t r = s->call.mem_alloc(p, bytes);
  if (r != ncclSuccess && vd_cuda_trim_pool(c)) r = s->call.mem_alloc(p, bytes);
  if (r != ncclSuccess) {
    cudaGetLastError(); /* clears cudaErrorMemoryAllocation, which later calls would report */
    return vd_fail(err, VD_FAILED, "GPU %d: NCCL allocates no %.1f MiB: %s (%s)", c->device, (double)bytes / 1048576.0,
                   s->call.error_string(r), s->call.last_error(NULL));
  }
  s->taken[s->n++] = *p;
  return VD_OK;
}

/* Its number in `taken`; -1: not there. */
static int find(const vd_symmetric_memory *s, const void *p) {
  for (int i = 0; s && i < s->n; i++)
    if (s->taken[i] == p) return i;
  return -1;
}

bool vd_cuda_is_symmetric(const vd_cuda_backend *c, const void *p) {
  return find(c->symmetric, p) >= 0;
}

bool vd_cuda_symmetric_free(vd_cuda_backend *c, void *p) {
  vd_symmetric_memory *s = c->symmetric;
  int i = find(s, p);
  if (i < 0) return false;
  /* Unlike cudaFree, ncclMemFree does not wait for kernels that use the memory. */
  vd_cuda_record_error(c, cudaDeviceSynchronize(), "waiting for the GPU");
  s->taken[i] = s->taken[--s->n];
  if (s->call.mem_free(p) != ncclSuccess) vd_cuda_record_error(c, cudaErrorInvalidValue, "ncclMemFree");
  return true;
}

void vd_cuda_symmetric_end(vd_cuda_backend *c) {
  while (c->symmetric && c->symmetric->n > 0) vd_cuda_symmetric_free(c, c->symmetric->taken[0]);
  free(c->symmetric);
  c->symmetric = NULL;
}
