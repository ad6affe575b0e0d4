/* Async copies through pinned slots: update statistics from the GPU to the host, tokens from the host to the GPU.
 * Neither side waits for the other unless a slot is still in use. */
#ifndef VD_CUDA_PINNED_H
#define VD_CUDA_PINNED_H

#include "cuda/backend/context.h"

/* Stream-ordered. vd_ops.push_stats. */
int vd_cuda_push_stats(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err);
/* Not collective. vd_ops.pull_stats. */
const void *vd_cuda_pull_stats(vd_ops *o, int slot, vd_error *err);
/* Stream-ordered. vd_ops.put_tokens: the host waits only for its copy of 16 calls before, and, where a slot grows, for
 * the GPU. */
void vd_cuda_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n);
/* Not collective. Frees the slots. */
void vd_cuda_pinned_end(vd_cuda_backend *c);

#endif
