/* NCCL's symmetric memory: registered with all ranks, it lets a GPU read and write its peers' memory in place. */
#ifndef VD_CUDA_SYMMETRIC_MEMORY_H
#define VD_CUDA_SYMMETRIC_MEMORY_H

#include "cuda/backend/context.h"

typedef struct vd_symmetric_memory vd_symmetric_memory;

/* Not collective. vd_nccl_plugin.use_symmetric_memory. */
int vd_cuda_use_symmetric_memory(vd_ops *o, vd_error *err);
/* Not collective. Memory for an arena or a copy of one: NCCL's after vd_cuda_use_symmetric_memory, else that of
 * cudaMalloc. Free with vd_cuda_symmetric_free. */
cudaError_t vd_cuda_symmetric_alloc(vd_cuda_backend *c, void **p, size_t bytes);
/* Not collective. NULL is allowed. */
void vd_cuda_symmetric_free(vd_cuda_backend *c, void *p);
/* Not collective. True where p is the start of NCCL's memory. */
bool vd_cuda_is_symmetric(const vd_cuda_backend *c, const void *p);
/* Not collective. At the end of the backend. Frees what was not freed. */
void vd_cuda_symmetric_end(vd_cuda_backend *c);

#endif
