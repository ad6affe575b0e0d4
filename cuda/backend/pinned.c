/* What crosses between the host and the GPU in training: tokens, and slots with what came of an update. It goes
 * through pinned memory, so that neither side waits for the other. */
#include "cuda/backend/pinned.h"

#include <string.h>

/* At least `bytes` in m, which the GPU is done with. Its address may change. */
static cudaError_t make_room(vd_pinned_slot *m, size_t bytes) {
  if (!m->done) {
    cudaError_t e = cudaEventCreateWithFlags(&m->done, cudaEventDisableTiming);
    if (e != cudaSuccess) return e;
  }
  if (bytes <= m->bytes) return cudaSuccess;
  cudaFreeHost(m->p);
  m->p = NULL;
  m->bytes = 0;
  cudaError_t e = cudaMallocHost(&m->p, bytes);
  if (e == cudaSuccess) m->bytes = bytes;
  return e;
}

int vd_cuda_push_stats(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_pinned_slot *m = &c->slot[slot];
  size_t bytes = 0;
  for (int i = 0; i < n; i++) bytes += part[i].bytes;
  cudaError_t e = make_room(m, bytes);
  if (e == cudaSuccess) e = vd_cuda_letter(n, part, m->p, c->stream);
  if (e == cudaSuccess) e = cudaEventRecord(m->done, c->stream);
  if (e == cudaSuccess) return VD_OK;
  return vd_fail(err, VD_FAILED, "GPU %d, a slot of %zu bytes: %s", c->device, bytes, cudaGetErrorString(e));
}

const void *vd_cuda_pull_stats(vd_ops *o, int slot, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_pinned_slot *m = &c->slot[slot];
  vd_cuda_record_error(c, cudaEventSynchronize(m->done), "waiting for the GPU");
  return o->check(o, err) == VD_OK ? m->p : NULL;
}

void vd_cuda_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_pinned_slot *m = &c->tokens[c->next_tokens];
  size_t bytes = n * sizeof *host;
  c->next_tokens = (c->next_tokens + 1) % VD_TOKEN_SLOTS;
  cudaError_t e = m->done ? cudaEventSynchronize(m->done) : cudaSuccess;
  if (e == cudaSuccess) e = make_room(m, bytes > 0 ? bytes : 1);
  if (e == cudaSuccess && n > 0) {
    memcpy(m->p, host, bytes);
    e = vd_cuda_fetch(n, m->p, (uint32_t *)device, c->stream);
  }
  if (e == cudaSuccess) e = cudaEventRecord(m->done, c->stream);
  vd_cuda_record_error(c, e, "copying tokens to the GPU");
}

static void end(vd_pinned_slot *m, int n) {
  for (int i = 0; i < n; i++) {
    cudaFreeHost(m[i].p);
    if (m[i].done) cudaEventDestroy(m[i].done);
    m[i] = (vd_pinned_slot){0};
  }
}

void vd_cuda_pinned_end(vd_cuda_backend *c) {
  end(c->slot, VD_PINNED_SLOTS);
  end(c->tokens, VD_TOKEN_SLOTS);
}
