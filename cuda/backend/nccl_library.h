/* libnccl.so.2, which is loaded at run time. */
#ifndef VD_CUDA_NCCL_LIBRARY_H
#define VD_CUDA_NCCL_LIBRARY_H

#include "src/ops/nccl_plugin.h"

#include <nccl.h>

_Static_assert(sizeof(vd_nccl_id) == sizeof(ncclUniqueId), "ncclUniqueId has another size");

#if NCCL_VERSION_CODE < 22700
typedef struct ncclWindow_vidmem *ncclWindow_t;
enum { NCCL_WIN_COLL_SYMMETRIC = 1 };
#endif

/* The functions that are used. The last four, for symmetric memory, are NULL where the library is older than 2.28. */
typedef struct vd_nccl_calls {
  ncclResult_t (*version)(int *);
  ncclResult_t (*unique_id)(ncclUniqueId *);
  ncclResult_t (*init)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *);
  ncclResult_t (*all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*reduce_scatter)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
  ncclResult_t (*finalize)(ncclComm_t);
  ncclResult_t (*destroy)(ncclComm_t);
  ncclResult_t (*abort)(ncclComm_t);
  const char *(*error_string)(ncclResult_t);
  const char *(*last_error)(ncclComm_t);
  ncclResult_t (*window_register)(ncclComm_t, void *, size_t, ncclWindow_t *, int);
  ncclResult_t (*window_deregister)(ncclComm_t, ncclWindow_t);
  ncclResult_t (*mem_alloc)(void **, size_t);
  ncclResult_t (*mem_free)(void *);
} vd_nccl_calls;

/* Not collective. Loads the library and turns NVLink multicast off (NCCL_NVLS_ENABLE=0) unless the environment sets it.
 * VD_FAILED where it cannot be loaded or lacks a function that NCCL 2.14 has. */
int vd_cuda_nccl_load(vd_nccl_calls *c, vd_error *err);
/* Not collective. vd_nccl_plugin.version. */
int vd_cuda_nccl_version(int *version, vd_error *err);
/* Not collective. vd_nccl_plugin.unique_id. */
int vd_cuda_nccl_unique_id(vd_nccl_id *id, vd_error *err);

#endif
