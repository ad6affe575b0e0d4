/* See pinned.h. A slot's event says when the GPU has finished its copy. */
#include "cuda/backend/pinned.h"

#include "cuda/backend/gradient_stream.h"

#include <stdlib.h>
#include <string.h>

/* Pinned host memory for one async copy, and the event that says when the GPU has finished it. */
typedef struct pinned_slot {
  void *p;
  size_t bytes;
  cudaEvent_t done; /* NULL: not used yet */
  /* Of tokens: device memory, and the event of the copy that fills it. */
  vd_workspace device;
  cudaEvent_t copied;
} pinned_slot;

enum { VD_TOKEN_SLOTS = 16, FEW_TOKENS = 2048 };
struct vd_pinned_slots {
  pinned_slot stats[VD_PINNED_SLOTS], tokens[VD_TOKEN_SLOTS];
  int next_tokens;
  cudaStream_t copies; /* of tokens to the device, ahead of the main stream; NULL: none yet */
};

static struct vd_pinned_slots *slots_of(vd_cuda_backend *c) {
  if (!c->slots) c->slots = vd_calloc(1, sizeof *c->slots);
  return c->slots;
}

/* Grows slot s, which the GPU does not use now, to at least `bytes`. Its address may change. */
static cudaError_t grow(pinned_slot *s, size_t bytes) {
  if (!s->done) {
    cudaError_t e = cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming);
    if (e != cudaSuccess) return e;
  }
  if (bytes <= s->bytes) return cudaSuccess;
  cudaFreeHost(s->p);
  s->p = NULL;
  s->bytes = 0;
  cudaError_t e = cudaMallocHost(&s->p, bytes);
  if (e == cudaSuccess) s->bytes = bytes;
  return e;
}

int vd_cuda_push_stats(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  pinned_slot *s = &slots_of(c)->stats[slot];
  size_t bytes = 0;
  for (int i = 0; i < n; i++) bytes += part[i].bytes;
  cudaError_t e = grow(s, bytes);
  vd_cuda_gradient_join(c);
  if (e == cudaSuccess) e = vd_cuda_copy_parts(n, part, s->p, c->stream);
  if (e == cudaSuccess) e = cudaEventRecord(s->done, c->stream);
  if (e == cudaSuccess) return VD_OK;
  return vd_fail(err, VD_FAILED, "GPU %d, a pinned slot of %zu bytes: %s", c->device, bytes, cudaGetErrorString(e));
}

const void *vd_cuda_pull_stats(vd_ops *o, int slot, vd_error *err) {
  vd_cuda_backend *c = vd_cuda_of(o);
  pinned_slot *s = &slots_of(c)->stats[slot];
  vd_cuda_record_error(c, cudaEventSynchronize(s->done), "waiting for the GPU");
  return o->check(o, err) == VD_OK ? s->p : NULL;
}

/* Grows a slot of tokens, which the GPU does not use now. */
static cudaError_t grow_tokens(vd_cuda_backend *c, pinned_slot *s, size_t bytes) {
  struct vd_pinned_slots *slots = slots_of(c);
  cudaError_t e = cudaSuccess;
  if (!slots->copies) e = cudaStreamCreateWithFlags(&slots->copies, cudaStreamNonBlocking);
  if (e == cudaSuccess && !s->copied) e = cudaEventCreateWithFlags(&s->copied, cudaEventDisableTiming);
  if (e == cudaSuccess) e = grow(s, bytes);
  if (e == cudaSuccess && !vd_cuda_workspace(c, &s->device, bytes)) e = cudaErrorMemoryAllocation;
  return e;
}

/* The host runs ahead of the GPU: tokens cross the bus while the main stream is busy with earlier work, whose tokens
 * `device` may still hold, and the main stream later copies them within device memory. A kernel on the main stream
 * fetches a few tokens itself through the bus (2.8 to 4.8 GB/s): that begins sooner than a copy. */
void vd_cuda_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n) {
  vd_cuda_backend *c = vd_cuda_of(o);
  struct vd_pinned_slots *slots = slots_of(c);
  pinned_slot *s = &slots->tokens[slots->next_tokens];
  const size_t bytes = n * sizeof *host;
  const bool ahead = n > FEW_TOKENS;
  if (n == 0) return;
  slots->next_tokens = (slots->next_tokens + 1) % VD_TOKEN_SLOTS;
  cudaError_t e = s->done ? cudaEventSynchronize(s->done) : cudaSuccess;
  if (e == cudaSuccess) e = ahead ? grow_tokens(c, s, bytes) : grow(s, bytes);
  if (e == cudaSuccess) memcpy(s->p, host, bytes);
  if (e == cudaSuccess && ahead) {
    e = cudaMemcpyAsync(s->device.p, s->p, bytes, cudaMemcpyHostToDevice, slots->copies);
    if (e == cudaSuccess) e = cudaEventRecord(s->copied, slots->copies);
    if (e == cudaSuccess) e = cudaStreamWaitEvent(c->stream, s->copied, 0);
  }
  if (e == cudaSuccess) e = vd_cuda_copy_words(n, ahead ? s->device.p : s->p, (uint32_t *)device, c->stream);
  if (e == cudaSuccess) e = cudaEventRecord(s->done, c->stream);
  vd_cuda_record_error(c, e, "copying tokens to the GPU");
}

static void free_slots(pinned_slot *s, int n) {
  for (int i = 0; i < n; i++) {
    cudaFreeHost(s[i].p);
    cudaFree(s[i].device.p);
    if (s[i].done) cudaEventDestroy(s[i].done);
    if (s[i].copied) cudaEventDestroy(s[i].copied);
    s[i] = (pinned_slot){0};
  }
}

void vd_cuda_pinned_end(vd_cuda_backend *c) {
  if (!c->slots) return;
  free_slots(c->slots->stats, VD_PINNED_SLOTS);
  free_slots(c->slots->tokens, VD_TOKEN_SLOTS);
  if (c->slots->copies) cudaStreamDestroy(c->slots->copies);
  free(c->slots);
  c->slots = NULL;
}
