/* NCCL's symmetric memory: registered with all ranks, it lets a GPU read and write its peers' memory in place. */
#ifndef VD_CUDA_SYMMETRIC_MEMORY_H
#define VD_CUDA_SYMMETRIC_MEMORY_H

#include "cuda/backend/context.h"

typedef struct vd_symmetric_memory vd_symmetric_memory;

/* Not collective. vd_nccl_plugin.use_symmetric_memory. */
int vd_cuda_use_symmetric_memory(vd_ops *o, vd_error *err);
/* Not collective. Memory for an arena or for the copy of one, after vd_cuda_use_symmetric_memory alone. Free with
 * vd_cuda_symmetric_free. VD_FAILED where NCCL gives none, with NCCL's reason. */
int vd_cuda_symmetric_alloc(vd_cuda_backend *c, void **p, size_t bytes, vd_error *err);
/* Not collective. Frees p and waits for the GPU; false, and nothing done, where vd_cuda_symmetric_alloc did not give
 * it.
 */
bool vd_cuda_symmetric_free(vd_cuda_backend *c, void *p);
/* Not collective. True where vd_cuda_symmetric_alloc gave p, registered or not. */
bool vd_cuda_is_symmetric(const vd_cuda_backend *c, const void *p);
/* Not collective. At the end of the backend. Frees what was not freed. */
void vd_cuda_symmetric_end(vd_cuda_backend *c);

#endif
